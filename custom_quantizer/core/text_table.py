"""Tables in plain text, for ``str()`` of records; a terminal's are drawn by ``rich``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["GAP", "table_lines"]

GAP = "  "
"""Stands between columns."""


def table_lines(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table whose columns are as wide as their widest cell.

    Args:
        rows: of one length each, headers first.
        left: columns that are aligned left, by default the first; all others are aligned right.

    Returns:
        One line per row, without spaces at its end.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
