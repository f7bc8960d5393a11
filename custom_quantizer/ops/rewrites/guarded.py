"""What a choice leaves out need not be NaN: ``torch.where(x > 0, torch.log(x), 0)``.

Maxima and minima choose for a ``where`` if no side may be NaN. Here a side gets another number to
compute with where it is not chosen, if the condition says that what is left gives none.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by, reached
from custom_quantizer.core.rewriting import IN_FLOAT, Insertion
from custom_quantizer.ops.values import (
    Holds,
    Values,
    asks_what_is_finite,
    compared_by,
    forget_values,
    values_if,
    values_of,
    where_held,
)

__all__ = ["guard_choices"]

aten = torch.ops.aten


def guard_choices(model: GraphModule, *, training: bool = False) -> None:
    """Let what a choice would make NaN be a number where it is not chosen, in place.

    What is chosen keeps its bits.
    """
    for node in list(model.graph.nodes):
        if node.target is not aten.where.self or overwritten_by(node) is not None:
            continue
        condition, *sides = cast("tuple[Node, ...]", node.args)
        if is_constant(condition) or asks_what_is_finite(condition):
            continue
        for side, held in zip(sides, (True, False), strict=True):
            if node.args.count(side) == 1 and values_of(model, side).holds is Holds.NAN:
                _guard(model, node, side, held=held, training=training)


def _guard(model: GraphModule, where: Node, side: Node, *, held: bool, training: bool) -> None:
    condition = cast(Node, where.args[0])
    inside = reached(side, _elementwise)
    calls = sorted(inside)
    reads = {source for call in calls for source in call.all_input_nodes}
    safe: dict[Node, tuple[float, Values]] = {}
    for tensor in compared_by(condition):
        values = values_of(model, tensor)
        fits = tensor in reads and is_same_shape(shape_of(condition), shape_of(tensor))
        if fits and is_float32(tensor) and values.holds is not Holds.NAN:
            safe[tensor] = _with_number(where_held(values, condition, tensor, held=held))
    given = {tensor: values for tensor, (_, values) in safe.items()}
    if not safe or values_if(model, calls, given).holds is Holds.NAN:
        return
    readers = [call for call in calls if not safe.keys().isdisjoint(call.all_input_nodes)]
    behind = {c for r in readers for c in reached(r, lambda n: [u for u in n.users if u in inside])}
    if any(user not in inside and user is not where for call in behind for user in call.users):
        return  # others read it where it is not chosen
    insert = Insertion(model, readers[0], training=training)
    chosen = _before(insert, condition)
    if chosen is None:
        return
    for tensor, (number, _) in safe.items():
        other = insert.constant("guard", torch.tensor(number))
        both = (tensor, other) if held else (other, tensor)
        guarded = insert.call(aten.where.self, chosen, *both)
        for reader in readers:
            reader.replace_input_with(tensor, guarded)
    forget_values(behind)
    for call in behind:
        call.meta[IN_FLOAT] = "a choice keeps it from NaN, and integers could bring it there"


def _with_number(values: Values) -> tuple[float, Values]:
    """A number between the bounds of what is left, and what there may be with it."""
    number = next((n for n in (1.0, -1.0) if values.low <= n <= values.high), values.low)
    return number, Values(values.holds, values.low, values.high, values.has_zeros)


def _elementwise(node: Node) -> list[Node]:
    """What a call reads, if it computes each value of its own."""
    return [source for source in node.all_input_nodes if _is_elementwise(source)]


def _is_elementwise(node: Node) -> bool:
    target: Any = node.target
    known = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return known and overwritten_by(node) is None


def _before(insert: Insertion, condition: Node) -> Node | None:
    """A condition where a call is made that stands before it; ``None``: it is not known there."""
    if condition < insert.node:
        return condition
    meta = tensor_meta(condition)
    if condition.op != "call_function" or meta is None or meta.dtype != torch.bool:
        return None
    sources = {source: _before(insert, source) for source in condition.all_input_nodes}
    if None in sources.values():
        return None
    args, kwargs = torch.fx.node.map_arg((condition.args, condition.kwargs), sources.__getitem__)
    return insert.call(condition.target, *args, **kwargs)
