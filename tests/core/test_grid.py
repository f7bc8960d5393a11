"""Fake quantization: the bits and gradients of PyTorch's own, and of the converted graph's ops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_quantizer.core.arithmetic import QParams, round_to_float32
from custom_quantizer.core.graph import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from custom_quantizer.core.grid import fake_quantize
from custom_quantizer.errors import SchemeError


@st.composite
def _grids(draw: st.DrawFn) -> QParams:
    bits = draw(st.integers(2, 16))
    low = draw(st.sampled_from([0, -(1 << (bits - 1)), 1 - (1 << (bits - 1))]))
    high = (1 << bits) - 1 if low == 0 else (1 << (bits - 1)) - 1
    scale = round_to_float32(math.ldexp(draw(st.floats(1, 2)), draw(st.integers(-120, 100))))
    return QParams(scale, draw(st.integers(low, high)), low, high)


def _values(qparams: QParams) -> torch.Tensor:
    """Everything near the grid, its ties and ends, and far away."""
    offsets = torch.arange(-70, 70) / 2
    ends = torch.tensor([qparams.quant_min, qparams.zero_point, qparams.quant_max])
    near = (offsets + (ends - qparams.zero_point).unsqueeze(1)).flatten() * qparams.scale
    near = torch.stack([near, *(near.nextafter(torch.tensor(e)) for e in (math.inf, -math.inf))])
    far = torch.tensor([1e30, -1e30, math.inf, -math.inf, 0.0, -0.0])
    return torch.cat([near.flatten(), far])


@given(_grids())
def test_values_and_gradients_are_those_of_pytorch(qparams: QParams) -> None:
    x = _values(qparams)
    limits = (qparams.quant_min, qparams.quant_max)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = fake_quantize(mine, qparams)
    want = torch.fake_quantize_per_tensor_affine(theirs, qparams.scale, qparams.zero_point, *limits)
    assert torch.equal(got, want)
    weights = torch.arange(1.0, 1 + len(x))
    got.backward(weights)
    want.backward(weights)
    assert torch.equal(mine.grad, theirs.grad)


@given(_grids())
def test_values_are_those_of_the_converted_graph(qparams: QParams) -> None:
    x = _values(qparams)
    args = (qparams.scale, qparams.zero_point, qparams.quant_min, qparams.quant_max, torch.int32)
    integers = QUANTIZE_PER_TENSOR(x, *args)
    assert torch.equal(fake_quantize(x, qparams), DEQUANTIZE_PER_TENSOR(integers, *args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(999, generator=torch.Generator().manual_seed(0)).to(dtype)
    qparams = QParams(round_to_float32(0.013), 3, -128, 127)
    want = torch.fake_quantize_per_tensor_affine(x, qparams.scale, 3, -128, 127)
    got = fake_quantize(x, qparams)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_the_input_is_left_alone_and_nan_is_not_hidden() -> None:
    x = torch.tensor([1.0, math.nan])
    got = fake_quantize(x, QParams(1.0, 0, -8, 7))
    assert x.tolist()[0] == 1
    assert got.tolist()[0] == 1
    assert got[1].isnan()


def test_a_scale_per_channel_is_refused() -> None:
    with pytest.raises(SchemeError, match="one scale per tensor"):
        fake_quantize(torch.ones(2), QParams(torch.ones(2), 0, -8, 7, axis=0))
