"""How large an error is beside the signal: SQNR, ``10 log10(sum(x^2) / sum((x - y)^2))`` dB."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NOTHING_DB", "Noise", "ratio_db"]


NOTHING_DB = -999.0
"""In JSON, the SQNR of an output of which nothing is left: minus infinity, which JSON does not
have. Its null stands for an output without any error."""


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
        exact, other = exact.detach().double(), other.detach().double()
        resized = exact.shape != other.shape
        finite = torch.isfinite(exact)
        if not bool(finite.all()):
            exact, other = exact[finite], other if resized else other[finite]
        self.signal += float((exact * exact).sum())
        lost = int((~torch.isfinite(other)).sum())
        self.lost += lost
        self.error += math.inf if lost or resized else float(((exact - other) ** 2).sum())

    @property
    def ratio(self) -> float:
        """SQNR in dB; infinite where there is no error, minus infinity without a signal."""
        return ratio_db(self.signal, self.error)


def ratio_db(signal: float, error: float) -> float:
    """``10 log10(signal / error)`` of two powers; infinite where there is no error.

    Minus infinity where the error is infinite or no number: nothing is left of the signal.
    """
    if error == 0:
        return math.inf
    if not math.isfinite(error):
        return -math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
