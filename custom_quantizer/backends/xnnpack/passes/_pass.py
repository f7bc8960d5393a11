"""The shape of a pass, and what passes are built of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import scale_along
from custom_quantizer.core.formats import signed_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    constant_of,
    effective_users,
    is_dequantize,
    is_quantize,
    qparams_of,
    tensor_meta,
)
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.ops.rewrites.writes import overwritten_by

aten = torch.ops.aten

ORIGIN = "custom_quantizer_op"
"""Key in ``node.meta["custom"]``: name of the converted graph's op a node stands for."""

_OPERAND_TRANSPOSE = "custom_quantizer_operand_transpose"
"""Key in ``node.meta["custom"]`` of a permute that is written as a flag of a product."""

_PACKED = "custom_quantizer_packed"
"""Key in ``node.meta["custom"]`` of a convolution that is written with two weights to a byte."""

_JOINED = "custom_quantizer_joined_columns"
"""Key in ``node.meta["custom"]`` of a convolution that is written with columns as channels."""

_MOVED_FIRST = "custom_quantizer_moved_first"
"""Key in ``node.meta["custom"]`` of a quantize node behind a change of layout, not before it."""

GEMMS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets
"""Calls with a weight and a bias."""


FLOAT32_MAX = float(torch.finfo(torch.float32).max)
"""A clamp between this and its negative changes nothing."""


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


def mark_operand_transpose(permute: Node) -> None:
    """Say that a permute, of which a product reads the result, shall be a flag of the product."""
    _mark(permute, _OPERAND_TRANSPOSE)


def is_operand_transpose(node: Node) -> bool:
    """Whether :func:`mark_operand_transpose` was called for a node, across export and passes."""
    return _is_marked(node, _OPERAND_TRANSPOSE)


def mark_packed(conv: Node) -> None:
    """Say that a pointwise convolution shall be written as a layer of packed 4-bit weights."""
    _mark(conv, _PACKED)


def is_packed(node: Node) -> bool:
    """Whether :func:`mark_packed` was called for a node, across export and passes."""
    return _is_marked(node, _PACKED)


def mark_joined(conv: Node) -> None:
    """Say that a convolution shall be written as one over joined columns."""
    _mark(conv, _JOINED)


def is_joined(node: Node) -> bool:
    """Whether :func:`mark_joined` was called for a node, across export and passes."""
    return _is_marked(node, _JOINED)


def mark_moved_first(quantize: Node) -> None:
    """Say that floats may be put into another layout before they are quantized, not after."""
    _mark(quantize, _MOVED_FIRST)


def is_moved_first(node: Node) -> bool:
    """Whether :func:`mark_moved_first` was called for a node, across export and passes."""
    return _is_marked(node, _MOVED_FIRST)


def _mark(node: Node, key: str) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), key: True}


def _is_marked(node: Node, key: str) -> bool:
    custom = node.meta.get("custom")
    return isinstance(custom, dict) and custom.get(key) is True


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

    def requantized(self, value: Node, like: Node) -> Node:
        """Quantize ``value`` with the parameters of the q/dq node ``like``, and dequantize it."""
        params = like.args[1:]
        quantized = self.call(QUANTIZE_PER_TENSOR, value, *params)
        return self.call(DEQUANTIZE_PER_TENSOR, quantized, *params)


def _fake(target: Any, args: Any, kwargs: Any) -> Any:
    def value(node: Node) -> Any:
        meta = tensor_meta(node)
        return node.meta.get("val") if meta is None else meta

    mapped = torch.fx.node.map_arg(args, value)
    tensors = [a for a in torch.utils._pytree.tree_leaves(mapped) if isinstance(a, Tensor)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    if mode is None:
        return None
    with mode:
        return target(*mapped, **kwargs)


def calls(model: GraphModule, targets: frozenset[Any]) -> list[Node]:
    """Calls of the targets, without tensors that are written in place: those stay views."""
    return [
        n
        for n in model.graph.nodes
        if n.op == "call_function" and n.target in targets and overwritten_by(n) is None
    ]


def replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def quantized_neighbours(node: Node) -> tuple[Node, Node] | None:
    """``(dequantize before, quantize after)`` of an op on one quantized tensor."""
    source = node.args[0]
    users = effective_users(node)
    if isinstance(source, Node) and is_dequantize(source) and len(users) == 1:
        (after,) = users
        if is_quantize(after):
            return source, after
    return None


def then_move(build: Builder, source: Node, value: Node, target: Any, *args: Any) -> Node:
    """Move ``value`` once more; between two data-movement ops on integers stands a Q/DQ pair."""
    if is_dequantize(source):
        value = build.requantized(value, source)
    return build.call(target, value, *args)


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
