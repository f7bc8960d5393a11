"""Factors of each channel right behind a layer become part of its weights.

ConvNeXt scales the result of each block by a learned factor of each channel (layer scale). As an op
of its own that is one more tensor to round, with one scale for factors that may differ by orders of
magnitude. In the weights, which have a scale of their own for each channel, it costs nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    argument,
    effective_users,
    is_constant,
    reads_sizes,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.movement import IDENTITY, is_identity

__all__ = ["fold_factors"]

aten = torch.ops.aten

_LAYERS = {
    aten.batch_norm.default: 1,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.linear.default: -1,
}
"""Layers, and the dimension of their result that holds the channels.

A batch norm becomes part of the layer before it later; it has a factor and a shift of each channel.
"""


_COMMUTING = frozenset({aten.dropout.default, aten.feature_dropout.default})
"""Dropouts that set to 0 or scale, whatever the values are."""


def fold_factors(model: GraphModule, *, training: bool = False) -> int:
    """Multiply weights and biases by the factors behind their layer, in place.

    The real numbers stay the same; each weight is rounded once more to float32, as when a batch
    norm is folded.

    Args:
        model: the graph.
        training: parameters change: weights become functions of them and of the factors.

    Returns:
        The number of factors that became part of weights.
    """
    count = 0
    for node in list(model.graph.nodes):
        if node.target is not aten.mul.Tensor or overwritten_by(node) is not None:
            continue
        if reads_sizes(node):
            continue
        for factor, data in (node.args[:2], node.args[1::-1]):
            if isinstance(factor, Node) and isinstance(data, Node) and is_constant(factor):
                layer = _scaled_layer(factor, data)
                if layer is not None:
                    _scale(Insertion(model, layer, training=training), factor)
                    node.replace_all_uses_with(data)
                    model.graph.erase_node(node)
                    count += 1
                    break
    return count


def _scaled_layer(factor: Node, data: Node) -> Node | None:
    """The layer that made ``data``, if moves at most stand between, and there is one a channel.

    A dropout that drops may stand there, too: what it leaves is scaled all the same.
    """
    value, rank = tensor_meta(factor), len(shape_of(data))
    if value is None or not value.is_floating_point() or value.numel() < 2 or value.dim() > rank:
        return None
    varying = [d + rank - value.dim() for d, size in enumerate(value.shape) if size > 1]
    if len(varying) != 1:
        return None
    (channel,) = varying
    node = data
    while node.target not in _LAYERS:
        if len(effective_users(node)) != 1:
            return None
        if node.target is aten.permute.default:
            channel = int(cast("list[int]", node.args[1])[channel]) % rank
        elif node.target not in _COMMUTING and (
            not is_identity(node) or isinstance(IDENTITY.match(IDENTITY, node), str)
        ):
            return None
        node = cast(Node, node.args[0])
    weight, bias = node.args[1], argument(node, 2, "bias")
    constant = all(is_constant(each) or each is None for each in (weight, bias))
    if len(effective_users(node)) != 1 or not constant or channel != _LAYERS[node.target] % rank:
        return None
    meta = tensor_meta(node)
    same = meta is not None and meta.shape[channel] == value.numel()
    return node if same else None


def _scale(insert: Insertion, factor: Node) -> None:
    """Multiply weight and bias of the layer that ``insert`` stands at."""
    layer = insert.node
    weight, bias = (
        cast("Node | None", argument(layer, *at)) for at in ((1, "weight"), (2, "bias"))
    )
    factor = insert.again(factor)
    rank = 1 if weight is None else len(shape_of(weight))
    scaled = insert.reshape(factor, [-1, *[1] * (rank - 1)])
    if weight is not None:  # a batch norm may have none
        scaled = insert.call(aten.mul.Tensor, weight, scaled)
    layer.update_arg(1, insert.settled(scaled, "weight"))
    if bias is not None:
        scaled = insert.call(aten.mul.Tensor, bias, insert.reshape(factor, [-1]))
        layer.replace_input_with(bias, insert.settled(scaled, "bias"))
