"""The shape of a pass, and what passes are built of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import LARGEST_FLOAT, scale_along
from custom_quantizer.core.formats import signed_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    constant_of,
    describe,
    effective_users,
    is_dequantize,
    is_float32,
    is_number,
    is_quantize,
    qparams_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.core.memory import overwritten_by, written_inputs
from custom_quantizer.core.rewriting import fake_result
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.ops.movement import GETITEM, SPLIT
from custom_quantizer.ops.resize import UPSAMPLE_BILINEAR

aten = torch.ops.aten

ORIGIN = "custom_quantizer_op"
"""Key in ``node.meta["custom"]``: name of the converted graph's op a node stands for."""

GEMMS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets
"""Calls with a weight and a bias."""


FLOAT32_MAX = LARGEST_FLOAT
"""A clamp between this and its negative changes nothing."""

_FINITE = (-FLOAT32_MAX, FLOAT32_MAX * (1 - 2.0**-24))
"""Bounds of :meth:`Builder.finite`: a clamp at the largest float would be dropped as of nothing."""


@dataclass(frozen=True)
class GraphPass:
    """One rewrite.

    Attributes:
        name: shown in errors and in the lowering report.
        before: what the pass looks for.
        after: what holds when it is done.
        run: applies it; returns how many places it changed.
        exact: every integer of the result stays the same.
        requires: passes that must have run before it, by name: it looks for what they leave.
    """

    name: str
    before: str
    after: str
    run: Callable[[GraphModule], int]
    exact: bool = True
    requires: frozenset[str] = frozenset()


def graph_pass(
    before: str, after: str, *, exact: bool = True, requires: Iterable[str] = ()
) -> Callable[[Callable[[GraphModule], int]], GraphPass]:
    """Make a pass, called like it, of a function that applies one."""
    return lambda run: GraphPass(run.__name__, before, after, run, exact, frozenset(requires))


def origin_of(node: Node) -> str | None:
    """Name of the converted op a node stands for, across export and edge passes.

    A node that stands for several names them all, separated by commas.
    """
    custom = node.meta.get("custom")
    return cast("str | None", custom.get(ORIGIN)) if isinstance(custom, dict) else None


def set_origin(node: Node, name: str) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), ORIGIN: name}


def only_moves(node: Node) -> bool:
    """Whether the results of a call are among the numbers it reads, or zeros."""
    rule = rule_of(node)
    if node.target in (aten.view_copy.default, aten.permute_copy.default):
        return True
    if rule is None or not rule.moves_values or rule is UPSAMPLE_BILINEAR:
        return False
    return rule not in (SPLIT, GETITEM) and not isinstance(rule.match(rule, node), str)


class Mark(Enum):
    """What a pass tells a visitor of a node: a key in ``node.meta["custom"]``; export keeps it."""

    OPERAND_TRANSPOSE = "custom_quantizer_operand_transpose"
    """A permute, of which a product reads the result, that is written as a flag of the product."""
    WHOLE = "custom_quantizer_whole"
    """A product over several batch dims that is written as it is."""
    PACKED = "custom_quantizer_packed"
    """A pointwise convolution that is written as a layer with two weights to a byte."""
    JOINED_COLUMNS = "custom_quantizer_joined_columns"
    """A convolution that is written with neighbouring columns as channels."""
    MOVED_FIRST = "custom_quantizer_moved_first"
    """A quantize node of floats that may be put into another layout before it, not after."""

    def put(self, node: Node) -> None:
        """Mark a node."""
        node.meta["custom"] = {**(node.meta.get("custom") or {}), self.value: True}

    def on(self, node: Node) -> bool:
        """Whether a node is marked."""
        custom = node.meta.get("custom")
        return isinstance(custom, dict) and custom.get(self.value) is True


class Builder:
    """Inserts nodes before ``anchor`` on behalf of the op ``origin``, with fake values."""

    def __init__(self, model: GraphModule, anchor: Node, origin: str | None = None) -> None:
        self.model = model
        self.anchor = anchor
        self.origin = origin or origin_of(anchor) or anchor.name

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call; its fake value is computed where its inputs have one."""
        with self.model.graph.inserting_before(self.anchor):
            node = self.model.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = self.anchor.meta.get("nn_module_stack", {})
        if "val" not in node.meta and target not in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR):
            node.meta["val"] = _fake(target, args, kwargs)
            set_origin(node, self.origin)
        return node

    def finite(self, value: Node) -> Node:
        """``value`` with the largest numbers for infinities, whose differences are numbers."""
        return self.call(aten.hardtanh.default, value, *_FINITE)

    def requantized(self, value: Node, like: Node) -> Node:
        """Quantize ``value`` with the parameters of the q/dq node ``like``, and dequantize it."""
        params = like.args[1:]
        quantized = self.call(QUANTIZE_PER_TENSOR, value, *params)
        return self.call(DEQUANTIZE_PER_TENSOR, quantized, *params)


class Numbers(Builder):
    """A builder that gives ops their numbers as one-element tensors, as XNNPACK fuses them."""

    def number(self, value: float) -> Node:
        return self.constant("constant", torch.tensor([value]))

    def constant(self, name: str, value: Tensor) -> Node:
        """A constant that is named after the op."""
        return add_constant(self.model, f"{self.origin}_{name}", value, self.anchor)

    def times(self, value: Node, factor: float | Node) -> Node:
        """The product with a number, also one that the graph computes from sizes."""
        if factor == 1.0:
            return value
        number = factor if isinstance(factor, Node) else self.number(factor)
        return self.call(aten.mul.Tensor, value, number)

    def tensor(self, value: Any) -> Node:
        """A number as a tensor, also one that the graph computes from sizes."""
        if not isinstance(value, Node):
            return self.number(float(value))
        is_number = not isinstance(value.meta.get("val", tensor_meta(value)), Tensor)
        return self.call(aten.mul.Tensor, self.number(1.0), value) if is_number else value

    def trunc(self, x: Node) -> Node:
        """``x`` without what is behind the point; zeros are positive."""
        sides = (x, self.call(aten.neg.default, x))
        parts = [
            self.call(aten.floor.default, self.call(aten.relu.default, side)) for side in sides
        ]
        return self.call(aten.sub.Tensor, *parts)

    def sign(self, x: Node) -> Node:
        """1, 0 or -1, which is also that of subnormal numbers: kernels take them for zeros."""
        return self.call(aten.add.Tensor, self.above_zero(x), self.below_zero(x))

    def above_zero(self, x: Node) -> Node:
        """1 where ``x`` is positive, else 0."""
        return self.call(aten.ceil.default, self.call(aten.hardtanh.default, x, 0.0, 1.0))

    def below_zero(self, x: Node) -> Node:
        """-1 where ``x`` is negative, else 0."""
        return self.call(aten.floor.default, self.call(aten.hardtanh.default, x, -1.0, 0.0))


def _fake(target: Any, args: Any, kwargs: Any) -> Any:
    def value(node: Node) -> Any:
        meta = tensor_meta(node)
        return node.meta.get("val") if meta is None else meta

    mapped = torch.fx.node.map_arg(args, value)
    tensors = [a for a in torch.utils._pytree.tree_leaves(mapped) if isinstance(a, Tensor)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    return None if mode is None else fake_result(mode, target, mapped, kwargs)


def calls(model: GraphModule, targets: frozenset[Any]) -> list[Node]:
    """Calls of the targets, without views of what is written in place later: those stay views."""
    found = [n for n in model.graph.nodes if n.op == "call_function" and n.target in targets]
    if all(overwritten_by(node) is None for node in found):
        return found
    order = {node: position for position, node in enumerate(model.graph.nodes)}
    writes = {describe(node): position for node, position in order.items() if written_inputs(node)}
    # A tensor is marked with the last write that reaches it.
    last = (writes.get(mark, len(order)) if (mark := overwritten_by(n)) else -1 for n in found)
    return [node for node, write in zip(found, last, strict=True) if write < order[node]]


def replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


Steps = Mapping[Any, Callable[..., Node | None]]
"""By op, what adds its steps to a graph, of its arguments, and returns the last of them.

``None``: the op stays.
"""


def in_steps(model: GraphModule, steps: Steps) -> int:
    """Put steps in the place of ops of float32, and count these."""
    count = 0
    for node in calls(model, frozenset(steps)):
        tensors = (t for t in node.all_input_nodes if not is_number(t))
        if not all(map(is_float32, (node, *tensors))):
            continue
        new = steps[node.target](Numbers(model, node), *node.args, **node.kwargs)
        if new is not None:
            replace(node, new)
            count += 1
    return count


def quantized_neighbours(node: Node) -> tuple[Node, Node] | None:
    """``(dequantize before, quantize after)`` of an op on one quantized tensor."""
    source = node.args[0]
    users = effective_users(node)
    if isinstance(source, Node) and is_dequantize(source) and len(users) == 1:
        (after,) = users
        if is_quantize(after):
            return source, after
    return None


def maker_of(source: object) -> Node | None:
    """What makes a tensor, seen through a q/dq pair that changes nothing."""
    if not isinstance(source, Node):
        return None
    if not is_dequantize(source):
        return source
    stored = cast(Node, source.args[0])
    same = is_quantize(stored) and stored.args[1:] == source.args[1:]
    return cast(Node, stored.args[0]) if same else None


def viewed(build: Builder, tensor: Node, shape: Sequence[Any]) -> Node:
    """``tensor`` in another shape, in integers if it is."""
    view = build.call(aten.view_copy.default, tensor, view_sizes(shape))
    return build.requantized(view, tensor) if is_dequantize(tensor) else view


def then_move(build: Builder, source: Node, value: Node, target: Any, *args: Any) -> Node:
    """Move ``value``, which is ``source`` moved, once more."""
    return build.call(target, between_moves(build, source, value), *args)


def between_moves(build: Builder, source: Node, value: Node) -> Node:
    """``value``, which is ``source`` moved, to be moved once more: integers have a Q/DQ pair."""
    return build.requantized(value, source) if is_dequantize(source) else value


def stored_bits(node: Node) -> int:
    """Width of the integers of a static quantize or dequantize node."""
    return signed_bits(cast(int, node.args[-3]), cast(int, node.args[-2]))


def is_wide(node: object) -> bool:
    """Whether a quantize or dequantize node is above 8 bits, so that no int8 kernel takes it."""
    return (
        isinstance(node, Node)
        and (is_quantize(node) or is_dequantize(node))
        and isinstance(node.args[-2], int)
        and stored_bits(node) > 8
    )


def is_wide_gemm(node: Node) -> bool:
    return is_wide(node.args[0]) or is_wide(node.args[1])


def dequantized_constant(model: GraphModule, dequantize: Node, before: Node) -> Node:
    """A float32 constant with the values that a dequantize node of a constant gives."""
    source = cast(Node, dequantize.args[0])
    qparams = qparams_of(model, dequantize)
    integers = constant_of(model, source).to(torch.float32) - qparams.zero_point
    return add_constant(
        model, f"{source.target}_float", integers * scale_along(qparams, integers), before
    )
