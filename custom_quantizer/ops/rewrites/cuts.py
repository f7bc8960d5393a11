"""Slices of dynamic dims whose ends are the same for all sizes, if they are written otherwise.

``x[:, :, -y.shape[2]:]`` cuts a signal to the length of another. Where that one is a convolution of
it, the same values are left out however long the signal is. Halves of a dynamic dim, as
``x.chunk(2)`` gives, are pieces of a dim of two.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    argument,
    dynamic_sizes,
    is_negative,
    recorded_value,
    set_argument,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.movement import SPLIT

__all__ = ["PARTS", "ends_to_numbers"]

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
            number = _number(end.meta.get("val") if isinstance(end, Node) else end, size)
            if number is None:
                continue
            set_argument(node, position, name, number)
            count += 1
    return count


def _number(end: Any, size: Any) -> int | None:
    """An end of a dim of some size as a number; ``None``: it is not the same one for all sizes."""
    if isinstance(end, int):  # of a size that is no number where the program is traced again
        return max(end + size, 0) if end < 0 and isinstance(size, int) else None
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


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else number


def _part(insert: Insertion, data: Node, dim: int, start: Any) -> Node | None:
    """What begins at a fraction of a dynamic dim, and is one: of as many pieces as both have."""
    shape, wanted = list(shape_of(data)), list(shape_of(insert.node))
    size = _expression(shape[dim])
    if isinstance(shape[dim], int) or tensor_meta(insert.node) is None:
        return None
    if dynamic_sizes(shape) > 1 or isinstance(wanted[dim], int):
        return None
    first, length = ((_expression(n) / size).simplify() for n in (start, wanted[dim]))
    if not (first.is_Rational and length.is_Rational) or length == 1:
        return None
    pieces = math.lcm(int(first.q), int(length.q))
    begin, end = (int(fraction * pieces) for fraction in (first, first + length))
    # Sizes are whole, so the dim has that many pieces of one size whatever it is.
    parted = insert.call(aten.reshape.default, data, [*shape[:dim], pieces, -1, *shape[dim + 1 :]])
    taken = insert.call(aten.slice.Tensor, parted, dim, begin, end)
    return insert.call(aten.reshape.default, taken, [*wanted[:dim], -1, *wanted[dim + 1 :]])


def _part_of_slice(insert: Insertion) -> Node | None:
    node, data = insert.node, cast(Node, insert.node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(shape_of(data))
    given = argument(node, 2, "start")
    start: Any = given.meta.get("val") if isinstance(given, Node) else given or 0
    negative = start < 0 if isinstance(start, int) else is_negative(start)
    if int(argument(node, 4, "step", 1)) != 1 or negative is None:
        return None
    return _part(insert, data, dim, start + shape_of(data)[dim] if negative else start)


def _part_of_split(insert: Insertion) -> Node | None:
    split, index = insert.node.args
    if not isinstance(split, Node) or split.target not in SPLIT.targets - {aten.unbind.int}:
        return None
    data = cast(Node, split.args[0])
    dim = int(argument(split, 2, "dim", 0)) % len(shape_of(data))
    before = cast("Sequence[Any]", recorded_value(split))[: cast(int, index)]
    return _part(insert, data, dim, sum(piece.shape[dim] for piece in before))


PARTS: Mapping[Any, Rewrite] = MappingProxyType(
    {aten.slice.Tensor: _part_of_slice, operator.getitem: _part_of_split}
)
"""By overload; ends may be dynamic sizes."""
