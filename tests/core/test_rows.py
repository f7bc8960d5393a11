"""Scales and integers that are chosen for each row, against XNNPACK's scalar code, rewritten."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.run_time import fused_multiply_add
from custom_quantizer.core.rows import quantize_rows, round_rows

f32 = np.float32


def scalar(row: list[float]) -> tuple[list[int], int, np.float32]:
    """``q``, zero point and scale of one row, float32 number by float32 number, none subnormal.

    After ``xnn_f32_qd8_asymmetric_quantization_params`` and ``f32-qs8-vcvt``, AVX2.
    """
    with np.errstate(all="ignore"):
        row = [0.0 if abs(value) < 2.0**-126 else value for value in row]
        low = min(f32(0), *map(f32, row))
        high = max(f32(0), *map(f32, row))
        steps = f32(1) if low == high else f32(255) / (high - low)
        below, above = low * steps, high * steps
        from_low = (f32(-128) + below) + (f32(127) + above) > 0
        zero = f32(-128) - below if from_low else f32(127) - above
        zero = zero if f32(-128) < zero else f32(-128)
        zero = f32(127) if f32(127) < zero else zero
        zero_point = int(np.rint(zero))
        stored = []
        for value in map(f32, row):
            scaled = value * steps
            scaled = scaled if scaled < f32(32767) else f32(32767)  # as minps: NaN gives 32767
            rounded = -(2**31) if scaled < f32(-(2.0**31)) else int(np.rint(scaled))
            moved = min(max(rounded, -(2**15)), 2**15 - 1) + zero_point
            stored.append(min(max(moved, -128), 127))
        scale = f32(1) / steps
        return stored, zero_point, scale if scale >= f32(2.0**-126) else f32(0)


magnitudes = st.one_of(
    st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126),
    st.floats(width=32, min_value=-4, max_value=4),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 127.0, -128.0, 0.5, 255.0, 2.0**-149, -(2.0**-130)]),
)


@given(st.lists(magnitudes, min_size=1, max_size=9))
def test_each_row_is_quantized_as_the_scalar_code_does(row: list[float]) -> None:
    x = torch.tensor([row, [-value for value in row]], dtype=torch.float32)
    found = quantize_rows(x, (-1,))
    for i, values in enumerate(x.tolist()):
        stored, zero_point, scale = scalar(values)
        assert int(found.zero_point[i]) == zero_point
        assert f32(found.scale[i]) == scale
        assert (found.offsets[i] + found.zero_point[i]).tolist() == stored


def test_rows_are_what_shares_a_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6)
    for dims in ((-1,), (1,), (1, 2, 3)):
        whole = quantize_rows(x, dims)
        kept = [d for d in range(4) if d not in {n % 4 for n in dims}]
        flat = x.permute(*kept, *(n % 4 for n in dims)).flatten(len(kept)).flatten(0, -2)
        rows = [scalar(row)[1] for row in flat.tolist()]
        assert whole.zero_point.flatten().tolist() == rows
        assert torch.equal(round_rows(x, dims), whole.offsets * whole.scale)
        assert float((round_rows(x, dims) - x).abs().max()) <= 0.51 * float(whole.scale.max())


@pytest.mark.parametrize(
    "row", [[1.0, float("nan")], [float("inf"), 0.0], [-float("inf")], [-3e38, 3e38]]
)
def test_rows_without_a_scale_are_refused(row: list[float]) -> None:
    x = torch.zeros(3, len(row))
    x[1] = torch.tensor(row)
    with pytest.raises(cq.InputError, match="1 of 3 rows hold NaN or infinities, or span more"):
        quantize_rows(x, (-1,))


def test_no_rows() -> None:
    found = quantize_rows(torch.zeros(0, 4), (-1,))
    assert (found.offsets.shape, found.scale.shape) == ((0, 4), (0, 1))


def test_gradients_pass_through() -> None:
    x = torch.tensor([[0.3, -2.0], [5.0, 1.0]], requires_grad=True)
    (round_rows(x, (-1,)) * torch.tensor([1.0, 2.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    assert round_rows(half, (-1,)).dtype is torch.bfloat16


wide = st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)


@given(wide, wide, wide)
def test_a_fused_multiply_add_is_rounded_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    for third in (c, -float(f32(a) * f32(b)), float(np.nextafter(f32(c), f32(9)))):
        exact = Fraction(a) * Fraction(b) + Fraction(third)
        got = float(fused_multiply_add(*(torch.tensor([v]) for v in (a, b, third))))
        neighbours = [float(np.nextafter(f32(got), f32(end))) for end in (-np.inf, np.inf)]
        off = abs(Fraction(got) - exact)
        for other in neighbours:
            distance = abs(Fraction(other) - exact)
            assert off <= distance
            if off == distance:  # a tie goes to the even one
                assert np.array([got], f32).view(np.uint32)[0] % 2 == 0
