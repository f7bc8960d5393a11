"""Ends of slices that are numbers, though the graph computes them from dynamic sizes.

``x[:, :, -y.shape[2]:]`` cuts a signal to the length of another. Where that one is a convolution of
it, the same values are left out however long the signal is.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import argument, is_negative, shape_of

__all__ = ["ends_to_numbers"]

aten = torch.ops.aten

_ENDS = {"start": 2, "end": 3}


def ends_to_numbers(model: GraphModule) -> int:
    """Write ends that are the same for all sizes as numbers, in place; returns how many.

    They count from the beginning where they can, and else from the end.
    """
    count = 0
    for node in model.graph.nodes:
        if node.target is not aten.slice.Tensor:
            continue
        shape = shape_of(cast(Node, node.args[0]))
        size = shape[int(argument(node, 1, "dim", 0)) % len(shape)]
        for name, position in _ENDS.items():
            end = argument(node, position, name)
            number = _number(end.meta.get("val"), size) if isinstance(end, Node) else None
            if number is None:
                continue
            if position < len(node.args):
                node.update_arg(position, number)
            else:
                node.update_kwarg(name, number)
            count += 1
    return count


def _number(end: Any, size: Any) -> int | None:
    """An end of a dim of some size as a number; ``None``: it is not the same one for all sizes."""
    if not isinstance(end, torch.SymInt):
        return None
    place = end.node.expr
    length = size.node.expr if isinstance(size, torch.SymInt) else size
    negative = is_negative(end)
    if negative is None:
        return None
    if negative:
        place = (place + length).expand()
    if place.is_Integer:
        return max(int(place), 0)
    behind = (place - length).expand()
    if not behind.is_Integer:
        return None
    return int(behind) if behind < 0 else sys.maxsize
