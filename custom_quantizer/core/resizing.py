"""Where the pixels of a resized image lie in the image it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from custom_quantizer.errors import SchemeError

__all__ = ["POSITION_BITS", "Resizing"]

POSITION_BITS = 11
"""Positions are stored in units of ``2**-11`` of a pixel, as XNNPACK's int8 kernels have them."""


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

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """:attr:`places` in units of ``2**-POSITION_BITS``, rounded half to even."""
        return tuple(round(place * (1 << POSITION_BITS)) for place in self.places)
