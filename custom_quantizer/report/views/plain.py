"""A view as plain text, as wide as it is asked for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Sequence

from custom_quantizer.core.text_table import GAP, limit, table_lines, within
from custom_quantizer.report.views.values import WORST, Row, View

WIDTH = 120
"""Columns of a terminal that the text fits in."""

_NARROW_NAME, _NARROWEST = 16, 7
_LEGEND = (
    "input, output: type, scale, zero point (z). weight: number of scales (ch). bias: bits its "
    "largest integer needs (b). acc: bits the accumulator needs in the worst case."
)
_BREAK = re.compile(r" |(?<=[^\W_])[._](?=[^\W\d])")
"""Where a cell may be folded: at a space, or behind a separator, but never inside a number."""


def text(view: View) -> str:
    """The view as plain text, no line longer than ``WIDTH`` and than the terminal."""
    lines = [line for entry in view.summary for line in _wrapped(entry)]
    lines += ["", *_table(view), "", *_wrapped(_LEGEND)]
    for table in view.tables:
        lines += ["", f"{table.title}:", *_indented(table.rows)]
        for entry in table.lines:
            lines += _wrapped(entry, "  ")
    if view.worst:
        lines += ["", f"{WORST}:"]
        for advice in view.worst:
            lines += _wrapped(f"{advice.where}: {advice.how_much}; {advice.why}", "  ")
            for way in advice.what:
                lines += _wrapped(way, "    - ")
    for heading, entries in view.notes:
        lines += ["", f"{heading}:"]
        for entry in entries:
            lines += _wrapped(entry, "  ")
    return "\n".join(lines)


def detail_text(row: Row) -> str:
    """One op as plain text, channel by channel."""
    lines = _wrapped(row.headline)
    label_width = max(len(label) for label, _ in row.details)
    for label, value in row.details:
        lines += _wrapped(value, f"  {label.ljust(label_width)}  ")
    if row.table:
        lines += ["", *_indented(row.table, left=())]
    return "\n".join(lines)


def _indented(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    room = limit()
    with within(None if room is None else room - len(GAP)):
        return [f"{GAP}{line}".rstrip() for line in table_lines(rows, left)]


def _wrapped(entry: str, prefix: str = "") -> list[str]:
    """The entry behind a prefix, further lines indented below it."""
    return textwrap.wrap(
        entry,
        min(WIDTH, limit() or WIDTH),
        initial_indent=prefix,
        subsequent_indent=" " * (len(prefix) or 2),
        break_long_words=limit() is None,
    ) or [prefix.rstrip()]


def _table(view: View) -> list[str]:
    # Columns that nothing stands in are left out.
    kept = [i for i in range(len(view.columns)) if any(any(row.cells[i]) for row in view.rows)]
    left = [i for i, k in enumerate(kept) if not view.columns[k].numeric]
    width = {i: _natural_width(view, i) for i in kept}
    if _total(width.values()) > (limit() or WIDTH) and limit() is not None:
        plain = [[view.columns[i].title for i in kept]]
        plain += [[", ".join(filter(None, row.cells[i])) for i in kept] for row in view.rows]
        return table_lines(plain, left)
    for i in list(kept):
        if view.columns[i].extra and _total(width[k] for k in kept) > WIDTH:
            kept.remove(i)
    columns = [view.columns[i] for i in kept]
    widths = [width[i] for i in kept]
    _narrow(widths, [i for i, column in enumerate(columns) if column.name], _NARROW_NAME)
    _narrow(widths, list(range(len(widths))), _NARROWEST)
    rows = _folded([(column.title,) for column in columns], widths)
    rows.append(["-" * width for width in widths])
    for row in view.rows:
        rows += _folded([row.cells[i] for i in kept], widths)
    return table_lines(rows, left=[i for i, column in enumerate(columns) if not column.numeric])


def _natural_width(view: View, column: int) -> int:
    lines = (line for row in view.rows for line in row.cells[column])
    return max([len(view.columns[column].title), *map(len, lines)])


def _total(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + len(GAP) * (len(each) - 1)


def _narrow(widths: list[int], columns: Sequence[int], least: int) -> None:
    """Take from the widest of ``columns`` until the table fits or all are down to ``least``."""
    while columns and _total(widths) > WIDTH:
        widest = max(columns, key=lambda i: widths[i])
        if widths[widest] <= least:
            return
        widths[widest] -= 1


def _folded(cells: Sequence[tuple[str, ...]], widths: Sequence[int]) -> list[list[str]]:
    """The lines that a row takes once its cells are folded to ``widths``, cell by cell."""
    columns = [
        [part for line in cell for part in _fold(line, width)]
        for cell, width in zip(cells, widths, strict=True)
    ]
    height = max([1, *map(len, columns)])
    padded = [[*column, *[""] * (height - len(column))] for column in columns]
    return [list(line) for line in zip(*padded, strict=True)]


def _fold(line: str, width: int) -> list[str]:
    """Cut a line into parts of at most ``width``, where a word or part of a name ends."""
    parts = []
    while len(line) > width:
        ends = [match.end() for match in _BREAK.finditer(line) if match.start() <= width]
        fitting = [end for end in ends if len(line[:end].rstrip()) <= width]
        at = fitting[-1] if fitting else width
        parts.append(line[:at].rstrip())
        line = line[at:]
    return [*parts, line]
