"""Integer formats as data: every property follows from the width."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from custom_quantizer.errors import SchemeError

__all__ = ["MAX_BITS", "MIN_BITS", "IntFormat", "dtype_name", "range_bits", "signed_bits"]

MIN_BITS, MAX_BITS = 2, 32

# Smallest torch dtype that holds a width; a new storage dtype is one line here.
_STORAGE = ((8, torch.int8), (16, torch.int16), (32, torch.int32))


@dataclass(frozen=True, order=True)
class IntFormat:
    """A signed two's-complement integer of ``bits`` bits.

    Attributes:
        bits: 2 to 32.
        narrow: leave out the most negative value, so that the range is symmetric
            (``[-127, 127]`` instead of ``[-128, 127]``).

    Raises:
        SchemeError: ``bits`` is not an integer from 2 to 32.
    """

    bits: int
    narrow: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(
                f"an integer format has {MIN_BITS} to {MAX_BITS} bits, not {self.bits!r}"
            )

    @property
    def quant_min(self) -> int:
        """Smallest representable integer."""
        return -(1 << (self.bits - 1)) + self.narrow

    @property
    def quant_max(self) -> int:
        """Largest representable integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def storage_dtype(self) -> torch.dtype:
        """The narrowest torch dtype that holds every value."""
        return next(dtype for bits, dtype in _STORAGE if self.bits <= bits)

    def __str__(self) -> str:
        return f"int{self.bits}"


def signed_bits(low: int, high: int) -> int:
    """Bits of the smallest two's-complement integer that holds all of ``[low, high]``."""
    return max((value if value >= 0 else ~value).bit_length() for value in (low, high)) + 1


def range_bits(low: int, high: int) -> int:
    """The same, without a sign bit for a range that has no negative integer, as uint8's."""
    return signed_bits(low, high) - (low >= 0)


def dtype_name(dtype: torch.dtype) -> str:
    """``int8`` of ``torch.int8``."""
    return str(dtype).removeprefix("torch.")
