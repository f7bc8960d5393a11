"""add, sub, mul of two tensors, and the activations that clamp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.graph import argument, reads_sizes, tensor_meta
from custom_quantizer.ops._rule import (
    Case,
    Integers,
    OpRule,
    PatternMatch,
    QuantizedOp,
    Trait,
)

__all__ = ["ADD", "CLAMP", "MUL", "RELU", "RULES", "SUB", "WHERE"]

aten = torch.ops.aten


def _match_pair(rule: OpRule, node: Node) -> PatternMatch | str:
    left, right = node.args[0], node.args[1]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return "one operand is a number that was not made a tensor"
    if argument(node, 2, "alpha", 1) != 1:
        return "its alpha is not 1"
    metas = (tensor_meta(left), tensor_meta(right))
    if any(meta is not None and not meta.dtype.is_floating_point for meta in metas):
        return "one operand is not a floating-point tensor"
    return PatternMatch(rule, node, (left, right))


def _match_single(rule: OpRule, node: Node) -> PatternMatch | str:
    if reads_sizes(node):
        return "one of its arguments depends on a dynamic size"
    data = node.args[0]
    if not isinstance(data, Node):
        return "its input is not a tensor of the graph"
    return PatternMatch(rule, node, (data,))


def _sum_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    (a, b), (qa, qb) = inputs, op.inputs
    subtract, bounds = op.match.rule.family == "sub", op.stored_bounds(arithmetic)
    return arithmetic.add(a, b, qa, qb, op.output, subtract=subtract, bounds=bounds)


def _mul_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    (a, b), (qa, qb), bounds = inputs, op.inputs, op.stored_bounds(arithmetic)
    # x * x runs on dequantized values, so it rounds otherwise than the product of two tensors.
    if op.match.inputs[0] is op.match.inputs[1]:
        return arithmetic.square(a, qa, op.output, bounds=bounds)
    return arithmetic.mul(a, b, qa, qb, op.output, bounds=bounds)


def _clamp_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    low, high = cast("tuple[float, float]", op.match.bounds)
    return arithmetic.clamp(inputs[0], op.inputs[0], op.output, low, high)


def _clamp_bounds(node: Node) -> tuple[float | None, float | None]:
    target = node.target
    if target is aten.relu6.default:
        return 0.0, 6.0
    if target is aten.hardtanh.default:
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    if target is aten.clamp_min.default:
        return float(argument(node, 1, "min")), None
    if target is aten.clamp_max.default:
        return None, float(argument(node, 1, "max"))
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return None if low is None else float(low), None if high is None else float(high)


class _Function(nn.Module):
    """A function of its inputs as a module, for the cases that tests run."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _case(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(name, lambda: _Function(function), shapes)


_IMAGE = (2, 8, 5, 7)
_ACTIVATIONS = frozenset({"relu", "clamp"})
_pair = partial(OpRule, match=_match_pair, traits=frozenset({Trait.SUM}), fuses=_ACTIVATIONS)


def _pair_cases(function: Callable[[Tensor, Tensor | float], Tensor]) -> tuple[Case, ...]:
    return (
        _case("same_shape", function, _IMAGE, _IMAGE),
        _case("broadcast_channel", function, _IMAGE, (1, 8, 1, 1)),
        _case("broadcast_left", function, (7,), _IMAGE),
        _case("scalar", lambda x: function(x, 0.75), _IMAGE),
        _case("itself", lambda x: function(x, x), _IMAGE),
        _case("relu", lambda x, y: F.relu(function(x, y)), _IMAGE, _IMAGE),
        _case("relu6", lambda x, y: F.relu6(function(x, y)), _IMAGE, _IMAGE),
        _case("clamp", lambda x, y: function(x, y).clamp(-0.5, 0.7), _IMAGE, _IMAGE),
    )


ADD = _pair(
    family="add",
    targets=frozenset({aten.add.Tensor}),
    integers=_sum_integers,
    cases=(
        *_pair_cases(lambda x, y: x + y),
        _case("in_place", lambda x, y: (x * 1.5).add_(y), _IMAGE, _IMAGE),
    ),
)

SUB = _pair(
    family="sub",
    targets=frozenset({aten.sub.Tensor}),
    integers=_sum_integers,
    cases=(
        *_pair_cases(lambda x, y: x - y),
        _case("reversed_scalar", lambda x: 1.5 - x, _IMAGE),
    ),
)

MUL = _pair(
    family="mul",
    targets=frozenset({aten.mul.Tensor}),
    integers=_mul_integers,
    cases=_pair_cases(lambda x, y: x * y),
)

RELU = OpRule(
    family="relu",
    targets=frozenset({aten.relu.default}),
    match=_match_single,
    bounds=lambda _node: (0.0, None),
    integers=_clamp_integers,
    cases=(_case("plain", F.relu, _IMAGE), _case("rank2", F.relu, (3, 11))),
)

CLAMP = OpRule(
    family="clamp",
    targets=frozenset(
        {
            aten.relu6.default,
            aten.hardtanh.default,
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
        }
    ),
    match=_match_single,
    bounds=_clamp_bounds,
    integers=_clamp_integers,
    cases=(
        _case("relu6", lambda x: F.relu6(x * 4), _IMAGE),
        _case("hardtanh", F.hardtanh, _IMAGE),
        _case("clamp", lambda x: x.clamp(-0.3, 1.1), _IMAGE),
        _case("clamp_min", lambda x: x.clamp(min=-0.3), _IMAGE),
        _case("clamp_max", lambda x: x.clamp(max=0.9), _IMAGE),
        _case("in_place", lambda x: (x * 2).clamp_(0, 1), _IMAGE),
    ),
)


def _match_where(rule: OpRule, node: Node) -> PatternMatch | str:
    condition, left, right = node.args
    if not all(isinstance(arg, Node) for arg in (condition, left, right)):
        return "one operand is a number that was not made a tensor"
    return PatternMatch(rule, node, (cast(Node, left), cast(Node, right)))


WHERE = OpRule(
    family="where",
    targets=frozenset({aten.where.self}),
    match=_match_where,
    cases=(
        # Of two finite tensors, a sum of products is planned instead.
        _case("compared", lambda x, y: torch.where(x > y, x, y.exp()), _IMAGE, _IMAGE),
        _case("number", lambda x: torch.where(x > 0.25, x, x.exp()), _IMAGE),
        _case("broadcast", lambda x, y: torch.where(y > 0, x.exp(), y), _IMAGE, (1, 8, 1, 1)),
    ),
)

RULES = (ADD, SUB, MUL, RELU, CLAMP, WHERE)
