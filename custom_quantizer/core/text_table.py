"""Tables in plain text, for ``str()`` of records; a terminal's are drawn by ``rich``.

A table is as wide as its cells. Where a terminal is narrower (:func:`within`), cells of several
words take several lines; where that is not enough, each row becomes a paragraph of its own. Names
are never cut.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["GAP", "least_width", "limit", "table_lines", "within", "wrapped"]

GAP = "  "
"""Stands between columns."""

_LIMIT: ContextVar[int | None] = ContextVar("columns of the terminal", default=None)


@contextmanager
def within(width: int | None) -> Iterator[None]:
    """Make tables of at most ``width`` columns in this block; ``None``: as wide as they are."""
    token = _LIMIT.set(width)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limit() -> int | None:
    """Columns that a table may take, if they are limited."""
    return _LIMIT.get()


def table_lines(
    rows: Sequence[Sequence[str]], left: Collection[int] = (0,), *, headers: bool = True
) -> list[str]:
    """The lines of a table.

    Args:
        rows: of one length each, headers first.
        left: columns that are aligned left, by default the first; all others are aligned right.
        headers: whether the first row holds headers.

    Returns:
        Lines without spaces at their end, one for each row where the width is not limited.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    most = _LIMIT.get()
    if most is None or _total(widths) <= most:
        return [_line(row, widths, left) for row in rows]
    least = _least(rows)
    if _total(least) > most:
        return _paragraphs(rows if headers else [[""] * len(rows[0]), *rows], most)
    while _total(widths) > most:
        # From the column that has most to give, so that all get about as many lines.
        widest = max((i for i, w in enumerate(widths) if w > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for row in rows:
        cells = [wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            lines.append(_line(parts, widths, left))
    return lines


def least_width(rows: Sequence[Sequence[str]]) -> int:
    """Columns that a table takes at least, with cells on several lines."""
    return _total(_least(rows))


def _least(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(_longest_word, column)) for column in zip(*rows, strict=True)]


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most ``width`` columns, broken between words only; ``indent`` from the second."""
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _line(cells: Sequence[str], widths: Sequence[int], left: Collection[int]) -> str:
    return GAP.join(
        cell.ljust(width) if i in left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _paragraphs(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """One paragraph for each row: its first cell, and below it the others behind their headers."""
    headers, *others = rows
    label = max([len(header) for header in headers[1:]], default=0)
    lines: list[str] = []
    for row in others:
        if set("".join(row)) == {"-"}:  # a rule below the headers
            continue
        lines += ["", *wrapped(row[0], width)] if lines else wrapped(row[0], width)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if cell:
                text = f"{GAP}{header.ljust(label)}{GAP if label else ''}{cell}"
                lines += _hanging(text, width, len(GAP) + label + len(GAP))
    return lines


def _hanging(text: str, width: int, column: int) -> list[str]:
    """A cell behind its header; further lines stand below the cell if there is room."""
    if len(text) <= width:
        return [text]
    if max(map(len, text[column:].split())) > width - column:  # a name: a line of its own
        rest = wrapped(text[column:], width - 2 * len(GAP))
        return [text[:column].rstrip(), *(f"{GAP}{GAP}{line}" for line in rest)]
    head, *rest = wrapped(text[column:], width - column)
    return [text[:column] + head, *(" " * column + line for line in rest)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)
