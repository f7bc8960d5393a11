"""Comparisons of float32 tensors, where numbers are made of them.

XNNPACK has no booleans: what is compared outside cuts the delegate in two. A difference has the
sign of a comparison, as float32 rounds no difference of two numbers to 0; but kernels take
subnormal numbers for zeros, so that what is nearer than ``2**-126`` is taken to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    FINITE,
    Numbers,
    calls,
    graph_pass,
    replace,
)
from custom_quantizer.core.graph import (
    is_constant,
    is_dequantize,
    is_sized_by_data,
    tensor_meta,
)

aten = torch.ops.aten


@graph_pass("comparisons that become numbers", "steps of float with the same values")
def comparisons_in_steps(model: GraphModule) -> int:
    """1 where a comparison of float32 holds, else 0; also where several are joined."""
    count = 0
    conditions = calls(model, _COMPARED | _JOINED.keys())
    able: set[Any] = set()
    for condition in conditions:
        if _compares(condition) or (
            condition.target in _JOINED and able.issuperset(condition.args)
        ):
            able.add(condition)
    readers = [n for n in calls(model, _TO_DTYPE) if n.args[1] is torch.float32]
    wanted = able.intersection(reader.args[0] for reader in readers)
    for condition in reversed(conditions):
        if condition in wanted and condition.target in _JOINED:
            wanted.update(condition.args)
    numbers: dict[Any, Node] = {}
    for condition in conditions:
        if condition in wanted:
            build = _Conditions(model, condition)
            if condition.target in _JOINED:
                parts = (numbers[part] for part in condition.args)
                numbers[condition] = _JOINED[condition.target](build, *parts)
            else:
                numbers[condition] = build.compared(condition)
    for reader in readers:
        if reader.args[0] in numbers:
            replace(reader, numbers[reader.args[0]])
            count += 1
    return count


class _Conditions(Numbers):
    """A builder of conditions as numbers."""

    def compared(self, condition: Node) -> Node:
        """1 where a comparison holds, else 0."""
        name = _name(condition)
        left, right = map(self.operand, condition.args[:2])
        if name in ("lt", "ge"):
            left, right = right, left
        difference = self.call(aten.sub.Tensor, left, right)
        if name in ("eq", "ne"):
            difference = self.call(aten.abs.default, difference)
        held = self.above_zero(difference)
        return self.negated(held) if name in ("ge", "le", "eq") else held

    def negated(self, numbers: Node) -> Node:
        """1 for 0, and 0 for 1."""
        return self.call(aten.sub.Tensor, self.number(1.0), numbers)

    def both(self, first: Node, second: Node) -> Node:
        """1 where both are."""
        return self.call(aten.mul.Tensor, first, second)

    def either(self, first: Node, second: Node) -> Node:
        """1 where one of them is."""
        return self.call(aten.maximum.default, first, second)

    def operand(self, value: Any) -> Node:
        """A number as a tensor; a tensor without infinities, whose difference is no number."""
        tensor = self.tensor(value)
        if tensor is not value or is_constant(value) or is_dequantize(value):
            return tensor
        return self.call(aten.hardtanh.default, value, *FINITE)


_JOINED: Mapping[Any, Callable[..., Node]] = {
    aten.__and__.Tensor: _Conditions.both,
    aten.__or__.Tensor: _Conditions.either,
    aten.bitwise_and.Tensor: _Conditions.both,
    aten.bitwise_not.default: _Conditions.negated,
    aten.bitwise_or.Tensor: _Conditions.either,
    aten.logical_and.default: _Conditions.both,
    aten.logical_not.default: _Conditions.negated,
    aten.logical_or.default: _Conditions.either,
}

_TO_DTYPE = frozenset({aten.to.dtype})

_COMPARED = frozenset(
    getattr(getattr(aten, name), overload)
    for name in ("eq", "ge", "gt", "le", "lt", "ne")
    for overload in ("Scalar", "Tensor")
)


def _name(comparison: Node) -> str:
    return cast(str, cast(Any, comparison.target)._schema.name).removeprefix("aten::")


def _compares(condition: Node) -> bool:
    """Whether a call compares float32 tensors of the delegate."""
    left, right = condition.args[:2] if condition.target in _COMPARED else (None, None)
    # A tensor is compared with itself to find what is no number.
    return left is not right and _is_comparable(left) and _is_comparable(right)


def _is_comparable(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= FINITE[1]
    meta = tensor_meta(value) if isinstance(value, Node) else None
    is_float = meta is not None and meta.dtype == torch.float32 and meta.dim() > 0
    return is_float and not is_sized_by_data(value)
