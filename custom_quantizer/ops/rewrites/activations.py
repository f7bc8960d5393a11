"""A relu behind the moves and maxima of a layer's result is taken first, as part of the layer.

``relu(max_pool2d(conv(x), 2))`` is ``max_pool2d(relu(conv(x)), 2)``, to the bit: a clamp is
monotone. Behind the pool it is an op more, and the integers between carry negative numbers that
nobody reads; in the layer it costs nothing.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import effective_users, is_float32, reads_sizes
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.elementwise import CLAMP, RELU
from custom_quantizer.ops.movement import IDENTITY, PERMUTE, RESHAPE, SELECT, SLICE
from custom_quantizer.ops.pool import MAX_POOL

__all__ = ["activations_to_layers"]

aten = torch.ops.aten

_PASSED = (IDENTITY, MAX_POOL, PERMUTE, RESHAPE, SELECT, SLICE)
"""What gives of clamped values what it gives of the others, clamped."""


def activations_to_layers(model: GraphModule) -> None:
    """Let activations stand right behind the ops that they can be part of, in place."""
    for node in list(model.graph.nodes):
        if rule_of(node) not in (CLAMP, RELU) or reads_sizes(node) or not is_float32(node):
            continue
        last = data = node.args[0]
        first = None
        while isinstance(data, Node) and _passes(data):
            first, data = data, data.args[0]
        if first is None or not isinstance(data, Node) or not _takes(data, node):
            continue
        node.replace_all_uses_with(last)
        first.replace_input_with(data, node)
        node.replace_input_with(last, data)
        data.append(node)
        node.meta["val"] = data.meta["val"]


def _passes(node: Node) -> bool:
    return rule_of(node) in _PASSED and _is_between(node)


def _is_between(node: Node) -> bool:
    return len(effective_users(node)) == 1 and is_float32(node) and overwritten_by(node) is None


def _takes(node: Node, activation: Node) -> bool:
    """Whether an activation can be part of the op; a batch norm is part of the layer before it."""
    rule, wanted = rule_of(node), rule_of(activation)
    fuses = rule is not None and wanted is not None and wanted.family in rule.fuses
    return _is_between(node) and (fuses or node.target is aten.batch_norm.default)
