"""What a view is made of: columns, rows, tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from custom_quantizer.report.advice import Advice

Json = Mapping[str, Any]
"""A part of the JSON of a report."""

WORST = "Ops that lose most, and what may help"
"""Heading of the list of them."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: heading.
        numeric: stands to the right.
        name: holds identifiers, which are folded before anything else.
        extra: left out of a terminal where the table would not fit; details tell it too.
    """

    title: str
    numeric: bool = False
    name: bool = False
    extra: bool = False


@dataclass(frozen=True)
class Row:
    """One op, ready to show.

    Attributes:
        names: under which a reader may ask for it; the first is its own.
        kind: what it computes on, to filter by.
        cells: of each column, the lines.
        headline: one line that says which op this is.
        details: label and text.
        table: header and rows of its channels; empty without a bias.
        bits: widths of its integers, to filter by: ``a8`` for activations, ``w4`` for the weight.
    """

    names: tuple[str, ...]
    kind: str
    cells: tuple[tuple[str, ...], ...]
    headline: str
    details: tuple[tuple[str, str], ...]
    table: tuple[tuple[str, ...], ...] = ()
    bits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Something that was measured, ready to show.

    Attributes:
        name: what it is: ``accuracy``, ``sensitivity`` or ``search``.
        title: heading.
        rows: headers first.
        lines: sentences below.
    """

    name: str
    title: str
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A whole report, ready to show.

    Attributes:
        title: what it is a report of.
        summary: lines above the table.
        columns: of the table.
        rows: of the table.
        notes: heading and lines below the table.
        unseen: ops that nothing in the table stands for; a reader may ask for them.
        facts: label, value and remark of what a reader wants to know first.
        tables: what was measured of the whole network.
        worst: ops that lose most.
        elsewhere: of ops that are not on integer kernels: where they compute, why, and which.
    """

    title: str
    summary: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    unseen: tuple[Row, ...] = field(default=())
    facts: tuple[tuple[str, str, str], ...] = field(default=())
    tables: tuple[Table, ...] = field(default=())
    worst: tuple[Advice, ...] = field(default=())
    elsewhere: tuple[tuple[str, str, tuple[str, ...]], ...] = field(default=())

    @property
    def bits(self) -> tuple[str, ...]:
        """Widths that occur in rows, activations first, the widest first."""
        found = {bits for row in self.rows for bits in row.bits}
        numbers = {bits: int(bits[1:]) if bits[1:].isdigit() else 99 for bits in found}
        return tuple(sorted(found, key=lambda bits: (bits[0], -numbers[bits])))
