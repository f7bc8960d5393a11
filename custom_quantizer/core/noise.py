"""How large an error is beside the signal: SQNR, ``10 log10(sum(x^2) / sum((x - y)^2))`` dB."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["NOTHING_DB", "Noise", "inner_product", "inner_products", "ratio_db"]


NOTHING_DB = -999.0
"""In JSON, the SQNR of an output of which nothing is left: minus infinity, which JSON does not
have. Its null stands for an output without any error."""


_PART = 1 << 15
"""Values at a time: they stay in the processor's cache, which takes a tenth of the time."""


class Noise:
    """Power of a signal and of its error, in float64, over any number of tensors.

    Attributes:
        signal: sum of squares of what is exact.
        error: of what is wrong; infinite if any value is ``lost``, or a tensor has another size.
        lost: values that are not finite, where the exact ones are.
    """

    def __init__(self) -> None:
        self.signal = self.error = 0.0
        self.lost = 0

    def add(self, exact: Tensor, other: Tensor) -> None:
        """Count one pair of tensors; where the exact one is not finite, nothing is counted.

        Sizes may depend on values: of a tensor that rounding gave another size nothing is left.
        """
        exact, other = exact.detach(), other.detach()
        resized = exact.shape != other.shape
        if not resized:
            signal, error = _powers(exact.flatten(), other.flatten())
            if math.isfinite(signal + error):
                self.signal, self.error = self.signal + signal, self.error + error
                return
        finite = torch.isfinite(exact)
        exact, other = exact[finite], other if resized else other[finite]
        lost = int((~torch.isfinite(other)).sum())
        nothing_left = resized or lost > 0
        signal, error = _powers(exact, exact if nothing_left else other)
        self.lost += lost
        self.signal += signal
        self.error += math.inf if nothing_left else error

    @property
    def ratio(self) -> float:
        """SQNR in dB; infinite where there is no error, minus infinity without a signal."""
        return ratio_db(self.signal, self.error)


def _powers(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """Sums of squares, computed in float64, of ``exact`` and of what ``other`` differs by."""
    powers = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for x, y in _parts(exact, other):
        difference = x - y
        powers += torch.stack((x.dot(x), difference.dot(difference)))
    signal, error = powers.tolist()
    return signal, error


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of two tensors of one size, float64, in which it is computed."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, other in _parts(x.flatten(), y.flatten()):
        total += part.dot(other)
    return total


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """:func:`inner_product` of each sample, ``(samples,)``: of what the first dim counts."""
    rows = [tensor.reshape(len(tensor), -1) for tensor in (x, y)]
    if rows[0].shape[1] > _PART:
        return torch.stack([inner_product(*pair) for pair in zip(*rows, strict=True)])
    samples = max(1, _PART // max(1, rows[0].shape[1]))
    chunks = zip(*(torch.split(part, samples) for part in rows), strict=True)
    return torch.cat([(part.double() * other.double()).sum(1) for part, other in chunks])


def _parts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two vectors, a few thousand values at a time, in float64."""
    for part, other in zip(torch.split(x, _PART), torch.split(y, _PART), strict=True):
        yield part.double(), other.double()


def ratio_db(signal: float, error: float) -> float:
    """``10 log10(signal / error)`` of two powers; infinite where there is no error.

    Minus infinity where the error is infinite or no number: nothing is left of the signal.
    """
    if error == 0:
        return math.inf
    if not math.isfinite(error):
        return -math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
