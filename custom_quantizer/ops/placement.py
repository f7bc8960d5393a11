"""Where an op computes, and how all views count that.

A plan, a lowering report, a saved report and a program tell one story: they count the ops that the
user wrote, each once, by the words of :class:`Placement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["PlacedOp", "Placement", "Tally", "tally"]


class Placement(Enum):
    """Where and on what an op computes; in the order in which parts of an op outweigh others."""

    FOLDED = "folded away"
    """Nothing is left of it to run."""
    INTEGER = "integer kernel"
    """On integers, from its inputs to its output."""
    TABLE = "table"
    """One entry for each stored integer: integers in and out, filled when a program is loaded."""
    EMULATED = "emulated"
    """On float32 numbers that stand for integers wider than the kernels."""
    FLOAT = "float inside"
    """On float32, inside the delegate."""
    OUTSIDE = "outside"
    """By another runtime's kernel, outside the delegate."""


_WEIGHT = {placement: weight for weight, placement in enumerate(Placement)}


@dataclass(frozen=True)
class Tally:
    """How many ops compute where.

    Attributes:
        placements: name of the op that the user wrote -> where it computes; what was written as one
            op and runs as several is where the least integer of them is.
    """

    placements: Mapping[str, Placement]

    @property
    def total(self) -> int:
        """How many ops there are."""
        return len(self.placements)

    def count(self, placement: Placement) -> int:
        """How many of them compute there."""
        return Counter(self.placements.values())[placement]

    def __str__(self) -> str:
        """For instance ``21 ops: 17 integer kernel, 2 table, 2 float inside``."""
        counts = Counter(self.placements.values())
        parts = [f"{counts[where]} {where.value}" for where in Placement if counts[where]]
        # What runs comes first.
        parts.sort(key=lambda part: part.endswith(Placement.FOLDED.value))
        return f"{self.total} op{'s' if self.total != 1 else ''}: {', '.join(parts) or 'none'}"


def tally(parts: Iterable[tuple[str, Placement]]) -> Tally:
    """Count ops.

    Args:
        parts: of each op that runs, the name of the op that it is a part of, and where it computes.
    """
    found: dict[str, Placement] = {}
    for written, placement in parts:
        before = found.get(written, Placement.FOLDED)
        found[written] = max(before, placement, key=_WEIGHT.__getitem__)
    return Tally(found)


@dataclass(frozen=True)
class PlacedOp:
    """What became of one op of a converted graph.

    Attributes:
        node: its anchor.
        path: module path.
        family: of the registry, or the aten overload.
        written: name of the captured call that it is a part of; its own, if it is all of it.
        placement: where it computes.
        kernel: label of the kernel that it runs on.
        reason: why it is not a plain kernel on integers; empty if it is, or to save space.
    """

    node: str
    path: str
    family: str
    written: str
    placement: Placement
    kernel: str
    reason: str

    def __str__(self) -> str:
        where = f" ({self.path})" if self.path else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.node}{where} [{self.family}] {self.kernel}{why}"
