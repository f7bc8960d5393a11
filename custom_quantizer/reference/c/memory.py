"""Where the tensors of a network lie: one static arena whose parts are used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ALIGNMENT", "Buffer", "Span", "place"]

ALIGNMENT = 4
"""Bytes that parts of the arena start at multiples of."""


class Buffer(NamedTuple):
    """Where a tensor lies.

    Attributes:
        kind: ``input``, ``output``, ``arena`` or ``constant``.
        number: of the input or output; offset in the arena in bytes; or 0.
        name: of the constant.
    """

    kind: str
    number: int = 0
    name: str = ""


@dataclass
class Span:
    """A part of the arena and when it is in use, by index of ops, both ends included."""

    size: int
    start: int
    end: int
    offset: int = 0

    def meets(self, other: Span) -> bool:
        """Whether both are in use at some op."""
        return self.start <= other.end and other.start <= self.end


def place(spans: Sequence[Span]) -> int:
    """Give every span an offset, the largest first, each as low as it fits; the size of all.

    References:
        Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020),
        "greedy by size", as TensorFlow Lite for Microcontrollers plans its arena.
    """
    placed: list[Span] = []
    for span in sorted(spans, key=lambda s: (-s.size, s.start)):
        span.offset = 0
        for other in sorted((s for s in placed if s.meets(span)), key=lambda s: s.offset):
            if span.offset + span.size <= other.offset:
                break
            span.offset = max(span.offset, other.offset + other.size)
        placed.append(span)
    return max((span.offset + span.size for span in placed), default=0)
