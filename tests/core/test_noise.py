"""SQNR: sums of squares in float64, whatever the size, the dtype and the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from custom_quantizer.core.noise import Noise, inner_product, inner_products

SEVERAL_PARTS = (3, 40_001)


def _noise(exact: torch.Tensor, other: torch.Tensor) -> Noise:
    noise = Noise()
    noise.add(exact, other)
    return noise


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4), SEVERAL_PARTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_powers_are_sums_of_squares(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-99, 99, shape, generator=generator).to(dtype) for _ in range(2))
    noise = _noise(x, y)
    a, b = (v.double().numpy() for v in (x, y))
    assert (noise.signal, noise.error, noise.lost) == (np.sum(a * a), np.sum((a - b) ** 2), 0)


def test_differences_are_not_rounded_to_float32() -> None:
    x = torch.full(SEVERAL_PARTS, 1.0)
    y = torch.full(SEVERAL_PARTS, -(2.0**-30))
    count = x.numel()
    assert _noise(x, y).error == count * (1 + 2.0**-30) ** 2


def test_tensors_add_up_and_views_count_by_their_shape() -> None:
    noise = Noise()
    noise.add(torch.ones(2, 3).T, torch.zeros(3, 2))
    noise.add(torch.full((1,), 2.0), torch.full((1,), 1.0))
    assert (noise.signal, noise.error) == (10.0, 7.0)


@pytest.mark.parametrize("at", [0, -1])
def test_values_that_are_not_finite(at: int) -> None:
    x = torch.ones(SEVERAL_PARTS)
    y = x + 1
    x[at, at] = math.inf
    y[at, at] = math.nan
    count = x.numel() - 1
    noise = _noise(x, y)
    assert (noise.signal, noise.error, noise.lost) == (count, count, 0)  # infinite in both
    y[1, 1] = math.nan
    noise = _noise(x, y)
    assert (noise.signal, noise.error, noise.lost) == (count, math.inf, 1)
    assert noise.ratio == -math.inf


def test_of_a_tensor_of_another_size_nothing_is_left() -> None:
    noise = _noise(torch.tensor([1.0, math.inf]), torch.tensor([[1.0, math.nan]]))
    assert (noise.signal, noise.error, noise.lost) == (1.0, math.inf, 1)


def test_powers_beyond_float64() -> None:
    noise = _noise(torch.tensor([1e200], dtype=torch.float64), torch.tensor([0.0]))
    assert (noise.signal, noise.error, noise.lost) == (math.inf, math.inf, 0)


@pytest.mark.parametrize("shape", [(), (0,), SEVERAL_PARTS])
def test_inner_products(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-99, 99, shape, generator=generator).float() for _ in range(2))
    assert float(inner_product(x, y)) == float((x.double() * y.double()).sum())
    assert float(inner_product(torch.ones(2), torch.tensor([1.0, 2.0**-30]))) == 1 + 2.0**-30


@pytest.mark.parametrize("shape", [(7,), (2, 0), (5, 3, 4), (9, 20_000), SEVERAL_PARTS])
def test_inner_products_of_samples(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-99, 99, shape, generator=generator).float() for _ in range(2))
    wanted = (x.double() * y.double()).reshape(len(x), -1).sum(1)
    assert torch.equal(inner_products(x, y), wanted)
