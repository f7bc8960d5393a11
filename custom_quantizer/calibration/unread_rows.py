"""Rows of constant tables that calibration did not read, and that its ranges would cut off.

A decoder step that reads a rotary or learned embedding at its position is calibrated on the
positions of the data: the range of the rows that were read is not that of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import ActivationObserver, activation_observer
from custom_quantizer.core.graph import constant_of, is_constant, is_observer
from custom_quantizer.ops import rule_of

__all__ = ["UnreadRows", "unread_rows"]

aten = torch.ops.aten

_LOOKUPS = frozenset(
    {
        aten.embedding.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.take.default,
        aten.take_along_dim.default,
    }
)
"""Ops whose results are values of their first argument, chosen by integers."""


@dataclass(frozen=True)
class UnreadRows:
    """A table with rows whose error by clipping is larger than that by rounding.

    Attributes:
        reader: name of the node that reads the rows.
        table: name of the parameter or buffer.
        rows: of the table, along its first dimension.
        outside: rows that would be cut off.
    """

    reader: str
    table: str
    rows: int
    outside: int

    def __str__(self) -> str:
        return f"{self.reader} ({self.outside:,} of {self.rows:,} rows of {self.table})"


def unread_rows(prepared: GraphModule) -> tuple[UnreadRows, ...]:
    """Tables of which the calibrated ranges would cut off so much that rounding costs less.

    Values outside are expected where a table has many rows; they count once the mean square of
    what is cut off, over the whole table, exceeds that of rounding, ``scale ** 2 / 12``.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated.
    """
    found: dict[Node, UnreadRows] = {}
    for node in prepared.graph.nodes:
        observer = activation_observer(prepared, node)
        if observer is None or observer.is_dynamic or observer.frozen:
            continue
        for reader, table in _tables_behind(prepared, cast(Node, node.args[0])):
            if reader not in found and (rows := _cut_off(prepared, reader, table, observer)):
                found[reader] = rows
    return tuple(found.values())


def _tables_behind(prepared: GraphModule, node: Node) -> Iterator[tuple[Node, Node]]:
    """Readers of constant tables whose rows a tensor holds, moved or not, with the tables."""
    while True:
        rule = rule_of(node)
        if node.target in _LOOKUPS:
            table = cast(Node, node.args[0])
            while is_observer(table):
                table = cast(Node, table.args[0])
            if is_constant(table) and table.op == "get_attr":
                yield node, table
                return
        elif not (is_observer(node) or (rule is not None and rule.moves_values)):
            return
        sources = [source for source in node.all_input_nodes if _is_float(source)]
        if len(sources) != 1:
            return
        (node,) = sources


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return is_observer(node) or (isinstance(value, Tensor) and value.is_floating_point())


def _cut_off(
    prepared: GraphModule, reader: Node, table: Node, observer: ActivationObserver
) -> UnreadRows | None:
    """The rows outside the range that an observer saw, if they cost more than rounding."""
    low, high = min(float(observer.min_val), 0.0), max(float(observer.max_val), 0.0)
    if not low < high < torch.inf:
        return None  # nothing was seen
    form = observer.scheme.format
    rounding = ((high - low) / (form.quant_max - form.quant_min)) ** 2 / 12
    values = constant_of(prepared, table)
    rows = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
    power = (rows - rows.clamp(low, high)).to(torch.float64).square().mean(dim=1)
    if not power.mean() > rounding:
        return None
    outside = int((power > rounding).sum())
    return UnreadRows(reader.name, str(table.target), len(rows), outside)
