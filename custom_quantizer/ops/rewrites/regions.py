"""Regions under ``torch.no_grad()`` or without autocast are inlined into the graph around them.

``torch.export`` makes a call of a graph of its own of each ``with torch.no_grad():`` and each
``with torch.autocast(..., enabled=False):`` of a model. Neither changes a value that a quantized
model computes; but no op inside of a call would be quantized, and none would be delegated.

A region without autocast is there because its author saw fewer bits fail in it: the normalizer of
EfficientViT's attention is a product of unnormalized sums (18 dB with integers, 33 dB without). Its
ops are marked, and products of activations among them stay in float unless a rule names them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import is_parameter, tensor_meta
from custom_quantizer.core.rewriting import FULL_PRECISION

__all__ = ["inline_regions"]

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(model: GraphModule, *, training: bool = False) -> int:
    """Put the ops of such regions in the place of their calls, in place.

    Regions in which autocast changes dtypes stay calls.

    Args:
        model: a captured graph.
        training: detach what a region without gradients reads, so that none go through it. Its ops
            may write into memory (``out=``), which autograd refuses where it looks.

    Returns:
        The number of regions that are part of the graph now.
    """
    count = 0
    for node in list(model.graph.nodes):
        if node.target is _NO_GRAD:
            enabled, region, *inputs = node.args
            _inline(model, node, region, inputs, detach=training and not enabled)
        elif node.target is _AUTOCAST and not _changes_dtypes(node):
            _device, _dtype, enabled, _cached, region, *inputs = node.args
            if not enabled:
                for inner in _graph_of(model, region).graph.nodes:
                    inner.meta[FULL_PRECISION] = True
            _inline(model, node, region, inputs)
        else:
            continue
        count += 1
    if count:
        model.graph.eliminate_dead_code()
        model.delete_all_unused_submodules()
        model.recompile()
    return count


def _changes_dtypes(node: Node) -> bool:
    """Whether autocast is on where the tensors of a region are."""
    device, _dtype, enabled, *_ = node.args
    metas = [tensor_meta(source) for source in node.all_input_nodes]
    return bool(enabled) and any(m is not None and m.device.type == device for m in metas)


def _graph_of(model: GraphModule, region: Any) -> GraphModule:
    return cast(GraphModule, operator.attrgetter(str(region.target))(model))


def _inline(
    model: GraphModule, node: Node, region: Any, inputs: Sequence[Any], detach: bool = False
) -> None:
    inner = _graph_of(model, region)
    inline_regions(inner, training=detach)
    with model.graph.inserting_before(node):
        if detach:
            inputs = [_detached(model, value) for value in inputs]
        values = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
        results = cast("Sequence[Node]", model.graph.graph_copy(inner.graph, values))
    for user in list(node.users):  # each takes one result
        result, name = results[cast(int, user.args[1])], user.name
        user.replace_all_uses_with(result)
        model.graph.erase_node(user)
        if result.op == "call_function" and result not in node.all_input_nodes:
            result.name = name
    model.graph.erase_node(node)


def _detached(model: GraphModule, value: Any) -> Any:
    """``value`` without gradients; buffers have none."""
    meta = tensor_meta(value) if isinstance(value, Node) else None
    if meta is None or not meta.is_floating_point():
        return value
    if value.op == "get_attr" and not is_parameter(model, value):
        return value
    detached = model.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached
