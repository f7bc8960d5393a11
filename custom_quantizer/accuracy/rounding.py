"""Rounding a matrix so that its product with its inputs changes least, rather than its entries.

For rows ``w`` of a layer and inputs ``p`` with second moments ``H = E[p p^T]``, integers ``q`` and
scales ``s`` are sought that make ``(w - s q) H (w - s q)^T`` small, which is the mean squared error
of the layer's outputs. Nearest rounding minimizes it for ``H = 1`` only. All functions work on
``(groups, rows, inputs)`` at once, for depthwise and grouped convolutions.

References:
    E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh. GPTQ: accurate post-training quantization for
    generative pre-trained transformers. ICLR 2023. https://arxiv.org/abs/2210.17323
    K. Behdin et al. QuantEase: optimization-based quantization for language models. 2023
    (coordinate descent). https://arxiv.org/abs/2309.01885
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "MomentsAccumulator",
    "coordinate_descent",
    "damped",
    "gptq",
    "output_error",
    "refit",
]

_BLOCK = 128
"""Columns after which errors are handed on to all others at once."""


@dataclass(eq=False)
class Moments:
    """Means and centered second moments of a layer's inputs, of integers and of the float model.

    Attributes:
        count: positions.
        mean: of the rounded inputs, float64 ``(groups, inputs)``.
        float_mean: of the float model's.
        square: ``E[(p - mean)(p - mean)^T]`` of the rounded inputs, float64 ``(groups, inputs,
            inputs)``.
        cross: ``E[(f - float_mean)(p - mean)^T]`` of float inputs ``f`` with rounded ones.
    """

    count: int
    mean: Tensor
    float_mean: Tensor
    square: Tensor
    cross: Tensor


class MomentsAccumulator:
    """Sums up :class:`Moments` batch by batch, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] | None = None
        self._origin: tuple[Tensor, Tensor] | None = None

    def add(self, rounded: Tensor, floating: Tensor) -> None:
        """Take in patches ``(groups, inputs, positions)`` of the same positions."""
        if self._origin is None:
            # Moments around a point near the mean lose no digits when they are centered.
            self._origin = (rounded.mean(2, keepdim=True), floating.mean(2, keepdim=True))
        p, f = rounded - self._origin[0], floating - self._origin[1]
        new = [p.sum(2), f.sum(2), p @ p.mT, f @ p.mT]
        new = [value.to(torch.float64) for value in new]
        self._count += rounded.shape[2]
        if self._sums is None:
            self._sums = new
        else:
            for total, value in zip(self._sums, new, strict=True):
                total += value

    def moments(self) -> Moments:
        """What was taken in."""
        if self._sums is None or self._origin is None:
            raise ValueError("nothing was taken in")
        p, f, pp, fp = (total / self._count for total in self._sums)
        square = pp - p.unsqueeze(2) * p.unsqueeze(1)
        cross = fp - f.unsqueeze(2) * p.unsqueeze(1)
        origin, float_origin = (o.squeeze(2).to(torch.float64) for o in self._origin)
        return Moments(self._count, p + origin, f + float_origin, square, cross)


def damped(square: Tensor) -> Tensor:
    """``H`` with a hundredth of its mean diagonal added to it, so that it can be inverted."""
    diagonal = square.diagonal(dim1=1, dim2=2)
    floor = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return square + torch.diag_embed((0.01 * floor).expand_as(diagonal))


def refit(rows: Tensor, difference: Tensor, hessian: Tensor) -> Tensor:
    """Rows that give on rounded inputs what ``rows`` give on float ones, in the least squares.

    Args:
        rows: float64 ``(groups, outputs, inputs)``.
        difference: moments of float with rounded inputs, less those of rounded ones with
            themselves.
        hessian: the damped second moments; the damping draws towards ``rows``.
    """
    return rows + cast(Tensor, torch.linalg.solve(hessian, rows @ difference, left=False))


def output_error(rows: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of each output: ``(groups, rows)``."""
    error = rows - rounded
    return ((error @ hessian) * error).sum(2)


def gptq(rows: Tensor, scale: Tensor, hessian: Tensor, limits: tuple[int, int]) -> Tensor:
    """Integers, one column after the other, the columns not yet rounded making up for the error.

    Columns of large inputs come first.

    Args:
        rows: ``(groups, rows, inputs)``.
        scale: of a shape that multiplies ``rows``.
        hessian: damped, ``(groups, inputs, inputs)``.
        limits: smallest and largest integer.

    Returns:
        Integers, in the dtype of ``rows``.
    """
    groups, _, inputs = rows.shape
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    inverse_order = order.argsort(dim=1)
    by_row = order.unsqueeze(1).expand(-1, rows.shape[1], -1)
    w = rows.gather(2, by_row)
    s = scale.expand_as(rows).gather(2, by_row)
    h = hessian.gather(1, order.unsqueeze(2).expand(-1, -1, inputs))
    h = h.gather(2, order.unsqueeze(1).expand(-1, inputs, -1))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    factor = factor.to(rows.dtype)
    integers = torch.empty_like(w)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = torch.empty(groups, rows.shape[1], stop - start, dtype=w.dtype, device=w.device)
        for j in range(start, stop):
            q = (w[:, :, j] / s[:, :, j]).round_().clamp_(*limits)
            integers[:, :, j] = q
            error = (w[:, :, j] - q * s[:, :, j]) / factor[:, j, j].unsqueeze(1)
            w[:, :, j:stop] -= error.unsqueeze(2) * factor[:, j, j:stop].unsqueeze(1)
            errors[:, :, j - start] = error
        w[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return integers.gather(2, inverse_order.unsqueeze(1).expand_as(by_row))


def coordinate_descent(
    rows: Tensor,
    integers: Tensor,
    scale: Tensor,
    hessian: Tensor,
    limits: tuple[int, int],
    sweeps: int = 4,
) -> Tensor:
    """Change one integer at a time to the best one, given all others, sweep by sweep.

    The error of no row grows. Ends where nothing changes.

    Args:
        rows: ``(groups, rows, inputs)``.
        integers: to begin with.
        scale: of a shape that multiplies ``rows``.
        hessian: damped.
        limits: smallest and largest integer.
        sweeps: at most.
    """
    q = integers.clone()
    s = scale.expand_as(rows)
    h = hessian.to(rows.dtype)
    diagonal = h.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        before = q.clone()
        gradient = (rows - s * q) @ h
        for j in range(rows.shape[2]):
            step = gradient[:, :, j] / (diagonal[:, j].unsqueeze(1) * s[:, :, j])
            new = (q[:, :, j] + step).round_().clamp_(*limits)
            change = (new - q[:, :, j]) * s[:, :, j]
            q[:, :, j] = new
            gradient -= change.unsqueeze(2) * h[:, j].unsqueeze(1)
        if torch.equal(before, q):
            break
    return q
