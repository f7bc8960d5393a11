"""Ops whose integer kernel refuses their scales: they compute in float inside the delegate."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    FLOAT32_MAX,
    GEMMS,
    Builder,
    dequantized_constant,
    graph_pass,
)
from custom_quantizer.core.graph import (
    argument,
    effective_users,
    is_constant,
    is_dequantize,
    is_quantize,
)
from custom_quantizer.ops import rule_of
from custom_quantizer.reference.converted import ConvertedGraph

aten = torch.ops.aten


_FALLBACK = "custom_quantizer_float_fallback"


def mark_fallbacks(model: GraphModule, graph: ConvertedGraph) -> None:
    """Mark the ops that the pass is for.

    Args:
        model: a copy of the graph's model; its nodes have the same names.
        graph: what was read from that.
    """
    names = {op.node.name for op in graph.floating if op.float_fallback}
    for node in model.graph.nodes:
        if node.name in names:
            node.meta[_FALLBACK] = True


@graph_pass("quantized ops whose scales XNNPACK refuses", "the same ops in float")
def refused_to_float(model: GraphModule) -> int:
    """Such an op must not look quantized: XNNPACK would fail at load.

    Weights and biases become float constants. Where there are none, a clamp to all of float32
    stands between the op and its quantize node; the op then is float to the partitioner.
    """
    count = 0
    for node in [node for node in model.graph.nodes if node.meta.get(_FALLBACK)]:
        if node.target in GEMMS:
            constants: tuple[Any, ...] = (node.args[1], argument(node, 2, "bias"))
            for source in constants:
                if is_dequantize(source) and is_constant(source.args[0]):
                    node.replace_input_with(source, dequantized_constant(model, source, node))
        else:
            last = _with_activation(node)
            for user in [user for user in last.users if is_quantize(user)]:
                build = Builder(model, user, node.name)
                clamped = build.call(aten.hardtanh.default, last, -FLOAT32_MAX, FLOAT32_MAX)
                user.replace_input_with(last, clamped)
        count += 1
    return count


def _with_activation(node: Node) -> Node:
    """The op, or the activation that XNNPACK would fuse into it."""
    rule, users = rule_of(node), effective_users(node)
    follower = rule_of(users[0]) if len(users) == 1 else None
    fused = rule is not None and follower is not None and follower.family in rule.fuses
    return users[0] if fused else node
