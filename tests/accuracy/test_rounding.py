"""Rounding of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_quantizer.accuracy.rounding import (
    MomentsAccumulator,
    coordinate_descent,
    damped,
    gptq,
    output_error,
    refit,
)

LIMITS = (-7, 7)


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, inputs that go together, and a scale that clips nothing: two groups."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(2, 24, 24, generator=generator, dtype=torch.float64)
    inputs = mixing @ torch.randn(2, 24, 500, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 10, 24, generator=generator, dtype=torch.float64)
    return rows, inputs, rows.abs().amax(2, keepdim=True) / 7


def test_every_row_is_better_than_nearest() -> None:
    rows, inputs, scale = _problem()
    square = inputs @ inputs.mT / inputs.shape[2]
    nearest = output_error(rows, (rows / scale).round() * scale, square)
    integers = gptq(rows, scale, damped(square), LIMITS)
    assert torch.equal(integers, integers.round())
    assert int(integers.abs().max()) <= 7
    one = output_error(rows, integers * scale, square)
    assert bool((one < nearest).all())
    better = coordinate_descent(rows, integers, scale, square, LIMITS)
    two = output_error(rows, better * scale, square)
    assert bool((two <= one * (1 + 1e-12)).all())
    assert float(two.sum()) < float(one.sum())


def test_coordinate_descent_ends_where_no_single_change_helps() -> None:
    rows, inputs, scale = _problem()
    square = inputs @ inputs.mT / inputs.shape[2]
    nearest = (rows / scale).round()
    best = coordinate_descent(rows, nearest, scale, square, LIMITS, sweeps=100)
    error = output_error(rows, best * scale, square)
    for column in range(rows.shape[2]):
        for step in (-1, 1):
            changed = best.clone()
            changed[:, :, column] = (changed[:, :, column] + step).clamp(*LIMITS)
            other = output_error(rows, changed * scale, square)
            assert bool((other >= error * (1 - 1e-12)).all())


def test_the_output_error_is_that_of_the_outputs() -> None:
    rows, inputs, scale = _problem()
    rounded = (rows / scale).round() * scale
    direct = ((rows - rounded) @ inputs).square().mean(2)
    square = inputs @ inputs.mT / inputs.shape[2]
    assert torch.allclose(output_error(rows, rounded, square), direct, rtol=1e-10)


def test_moments_are_those_of_all_batches() -> None:
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(2, 5, 90, generator=generator) + 100
    f = p + torch.randn(2, 5, 90, generator=generator)
    sums = MomentsAccumulator()
    for start, stop in ((0, 10), (10, 60), (60, 90)):
        sums.add(p[:, :, start:stop], f[:, :, start:stop])
    moments = sums.moments()
    p, f = p.double(), f.double()
    centered, float_centered = p - p.mean(2, keepdim=True), f - f.mean(2, keepdim=True)
    assert moments.count == 90
    assert torch.allclose(moments.mean, p.mean(2), rtol=1e-6)
    assert torch.allclose(moments.float_mean, f.mean(2), rtol=1e-6)
    assert torch.allclose(moments.square, centered @ centered.mT / 90, atol=1e-5)
    assert torch.allclose(moments.cross, float_centered @ centered.mT / 90, atol=1e-5)


def test_a_refit_is_the_least_squares_solution() -> None:
    rows, inputs, _ = _problem()
    noisy = inputs + torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5)).double()
    square = noisy @ noisy.mT
    refitted = refit(rows, inputs @ noisy.mT - square, square)
    wanted = torch.linalg.lstsq(noisy.mT, (rows @ inputs).mT).solution.mT
    assert torch.allclose(refitted, wanted, rtol=1e-8)
