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
    FLOAT32_MAX,
    Builder,
    calls,
    graph_pass,
    replace,
)
from custom_quantizer.core.graph import (
    add_constant,
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
    for node in calls(model, frozenset({aten.to.dtype})):
        if node.args[1] is not torch.float32 or not _can_be_numbers(node.args[0]):
            continue
        replace(node, _Conditions(model, node).numbers(cast(Node, node.args[0])))
        count += 1
    return count


class _Conditions(Builder):
    """A builder of conditions as numbers."""

    def numbers(self, condition: Node) -> Node:
        """1 where a condition holds, else 0."""
        if condition.target in _JOINED:
            joined = [self.numbers(cast(Node, argument)) for argument in condition.args]
            return _JOINED[condition.target](self, *joined)
        name = _name(condition)
        left, right = map(self.operand, condition.args[:2])
        if name in ("lt", "ge"):
            left, right = right, left
        difference = self.call(aten.sub.Tensor, left, right)
        if name in ("eq", "ne"):
            difference = self.call(aten.abs.default, difference)
        held = self.call(aten.hardtanh.default, difference, 0.0, 1.0)
        held = self.call(aten.ceil.default, held)
        return self.negated(held) if name in ("ge", "le", "eq") else held

    def negated(self, numbers: Node) -> Node:
        """1 for 0, and 0 for 1."""
        return self.call(aten.sub.Tensor, self.operand(1.0), numbers)

    def both(self, first: Node, second: Node) -> Node:
        """1 where both are."""
        return self.call(aten.mul.Tensor, first, second)

    def either(self, first: Node, second: Node) -> Node:
        """1 where one of them is."""
        return self.call(aten.maximum.default, first, second)

    def operand(self, value: Any) -> Node:
        """A number as a tensor; a tensor without infinities, whose difference is no number."""
        if not isinstance(value, Node):
            number = torch.tensor([float(value)])
            return add_constant(self.model, f"{self.origin}_constant", number, self.anchor)
        if is_constant(value) or is_dequantize(value):
            return value
        return self.call(aten.hardtanh.default, value, *_FINITE)


_FINITE = (-FLOAT32_MAX, FLOAT32_MAX * (1 - 2.0**-24))
"""A clamp between the largest numbers would be left out as one that changes nothing."""

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

_COMPARED = frozenset(
    getattr(getattr(aten, name), overload)
    for name in ("eq", "ge", "gt", "le", "lt", "ne")
    for overload in ("Scalar", "Tensor")
)


def _name(comparison: Node) -> str:
    return cast(str, cast(Any, comparison.target)._schema.name).removeprefix("aten::")


def _can_be_numbers(condition: Any) -> bool:
    """Whether a condition compares float32 tensors of the delegate, or joins such comparisons."""
    meta = tensor_meta(condition) if isinstance(condition, Node) else None
    if meta is None or meta.dtype != torch.bool or is_constant(condition):
        return False
    if condition.target in _JOINED:
        return all(map(_can_be_numbers, condition.args))
    left, right = condition.args[:2] if condition.target in _COMPARED else (None, None)
    # A tensor is compared with itself to find what is no number.
    return left is not right and _is_comparable(left) and _is_comparable(right)


def _is_comparable(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= _FINITE[1]
    meta = tensor_meta(value) if isinstance(value, Node) else None
    is_float = meta is not None and meta.dtype == torch.float32 and meta.dim() > 0
    return is_float and not is_sized_by_data(value)
