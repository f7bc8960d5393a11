"""Tables for people: the same records that JSON holds, drawn with ``rich``."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape, render
from rich.table import Table

from custom_quantizer.core.text_table import GAP, least_width, table_lines, within, wrapped

if TYPE_CHECKING:
    from custom_quantizer.analysis.evaluation import Evaluation
    from custom_quantizer.planning.plan import Plan
    from custom_quantizer.report.record import BiasRecord, Report, TensorRecord

__all__ = [
    "accuracy_table",
    "fitted",
    "make_console",
    "make_table",
    "op_table",
    "plan_table",
    "print_table",
    "size_text",
    "terminal_width",
]

_FILE_WIDTH = 110
"""Columns where there is no terminal to ask: in files and pipes nothing should be cut at 80."""

_NARROWEST = 20


def terminal_width(file: IO[str] | None = None) -> int | None:
    """Columns of the terminal behind ``file``, or behind standard output; ``None``: there is none.

    ``COLUMNS`` in the environment stands for a terminal of that width.
    """
    stream: Any = file or sys.stdout
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdecimal() and 0 < len(asked) < 6 and int(asked):
        return max(int(asked), _NARROWEST)
    return (
        max(shutil.get_terminal_size().columns, _NARROWEST) if stream and stream.isatty() else None
    )


def make_console() -> Console:
    """A console on standard output, of which there may be none."""
    file = cast("IO[str] | None", sys.stdout) or io.StringIO()
    return Console(
        file=file,
        width=terminal_width(file) or _FILE_WIDTH,
        highlight=False,
        soft_wrap=False,
    )


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table, in a form in which no name is cut if it is wider than the terminal.

    Without a terminal only sentences take several lines, in a table of :data:`_FILE_WIDTH` columns
    or as many as its names need.
    """
    console = console or make_console()
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= (
        console.width
    ):
        console.print(table)
        return
    headers = [str(column.header) for column in table.columns]
    columns = [[render(str(cell)).plain for cell in column.cells] for column in table.columns]
    rows = [headers, *map(list, zip(*columns, strict=True))]
    left = [i for i, column in enumerate(table.columns) if column.justify != "right"]
    lines = [str(table.title)] if table.title else []
    with within(terminal_width(console.file) or max(console.width, least_width(rows))):
        lines += table_lines(rows, left)
    console.file.write("\n".join(lines) + "\n")


def fitted(text: str) -> str:
    """``text`` with lines that are broken between words where the terminal would break them."""
    width = terminal_width()
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        start = line[:indent]
        lines += (
            [start + part for part in wrapped(line[indent:], max(width - indent, 1), GAP)]
            if len(line) > width
            else [line]
        )
    return "\n".join(lines)


def make_table(title: str, columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    """An empty table.

    Args:
        title: shown above it.
        columns: headers.
        right: those whose cells are aligned right.
    """
    from rich import box

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def plan_table(plan: Plan) -> Table:
    """Op, scheme, where it will run, bytes of its constants, why: one row per op."""
    columns = ("node", "module", "op", "scheme", "runs as", "bytes", "why")
    table = make_table("", columns, right=("bytes",))
    for op in plan.ops:
        why = "; ".join(text for text in (op.reason, op.note) if text)
        cells = (
            op.node,
            op.path,
            op.family or op.target,
            op.scheme or "float",
            (op.backend or op.placement).removeprefix("xnnpack "),
            f"{op.size_bytes:,}" if op.size_bytes else "",
            why,
        )
        table.add_row(*map(escape, cells), style=None if op.scheme else "yellow")
    return table


def op_table(report: Report) -> Table:
    """Dtype of input, weight, bias and output, and where the op runs: one row per op.

    A weight with one scale per channel shows their number; the table fits 80 columns.
    """
    columns = ("op", "family", "input", "weight", "bias", "output", "runs on")
    table = make_table("One row per op (weights: number of scales)", columns)
    for row in report.rows:
        family = f"{row.family} + {row.fused_family}" if row.fused_family else row.family
        cells = (
            row.path or row.node,
            family,
            ", ".join(dict.fromkeys(map(_dtype, row.inputs))),
            "-" if row.weight is None else _weight(row.weight),
            "-" if row.bias is None else _bias(row.bias),
            _dtype(row.output),
            (row.backend or "").removeprefix("xnnpack "),
        )
        style = None if row.compute != "float" else "yellow"
        table.add_row(*map(escape, cells), style=style)
    return table


def accuracy_table(evaluation: Evaluation) -> Table:
    """Accuracy, agreement with the first model and difference to it: one row per model."""
    columns, *rows = evaluation.rows()
    table = make_table("", columns, right=columns[1:])
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def size_text(size: int) -> str:
    """``25,896 bytes``."""
    return f"{size:,} bytes"


def _dtype(record: TensorRecord) -> str:
    if record.bits is None:
        return record.dtype
    text = f"int{record.bits}"
    return text if text == record.dtype else f"{text} in {record.dtype}"


def _weight(record: TensorRecord) -> str:
    if record.channels is None:
        return _dtype(record)
    group = "" if record.group_size is None else f", groups of {record.group_size}"
    return f"{_dtype(record)} x{record.channels}{group}"


def _bias(record: BiasRecord) -> str:
    if record.bits is None:
        return record.dtype
    return record.dtype if record.bits == 32 else f"int{record.bits} in {record.dtype}"
