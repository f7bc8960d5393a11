"""Where the pixels of a resized image lie in the image it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from custom_quantizer.errors import SchemeError

__all__ = ["POSITION_BITS", "Resizing", "position_bits"]

POSITION_BITS = 11
"""Positions in int8 images are stored in units of ``2**-11`` of a pixel, as XNNPACK has them."""


def position_bits(bits: int) -> int:
    """Bits of a fraction of a pixel, for images of ``bits``-bit integers.

    Three more than the integers have, and no fewer than :data:`POSITION_BITS`: the rounding of a
    position moves a result by at most 1/8 unit, half a unit of it in each of two dims times the
    largest difference of two pixels.
    """
    return max(POSITION_BITS, bits + 3)


@dataclass(frozen=True)
class Resizing:
    """One dimension of a linear interpolation.

    Attributes:
        size: pixels of the input.
        out: pixels of the output.
        align_corners: the first and the last pixels of both lie on each other; otherwise their
            outer edges do, and what lies beyond the middle of the last pixel has its value.

    Raises:
        SchemeError: a size below 1.
    """

    size: int
    out: int
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.out < 1:
            raise SchemeError(
                f"Interpolation takes sizes of at least 1, got {self.size} and {self.out}"
            )

    @cached_property
    def places(self) -> tuple[Fraction, ...]:
        """Position of each output in the input, in pixels: the formula of PyTorch, not rounded.

        References:
            PyTorch, ``aten/src/ATen/native/UpSample.h``: ``area_pixel_compute_source_index``.
        """
        if self.align_corners:
            step = Fraction(self.size - 1, self.out - 1) if self.out > 1 else Fraction(0)
            return tuple(index * step for index in range(self.out))
        scale, half = Fraction(self.size, self.out), Fraction(1, 2)
        last = Fraction(self.size - 1)
        return tuple(
            min(max((index + half) * scale - half, Fraction(0)), last) for index in range(self.out)
        )

    def positions(self, bits: int = POSITION_BITS) -> tuple[int, ...]:
        """:attr:`places` in units of ``2**-bits``, rounded half to even."""
        return tuple(round(place * (1 << bits)) for place in self.places)
