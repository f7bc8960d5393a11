"""Batch norms that stand alone, as the depthwise 1x1 convolutions they are.

``prepare_pt2e`` folds a batch norm into the layer before it. One that has none (DenseNet's come
before their convolutions) would stay in float and tear the model apart; ``convert_pt2e`` (torchao
0.18) searches such a graph for training patterns besides, for 20 seconds. In eval mode it computes
``x * factor + shift`` per channel, which is a convolution with one weight a channel.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.graph import add_constant, argument, constant_of, is_constant, tensor_meta
from custom_quantizer.rewriting import ORIGINAL_NAME, Insertion, replace, rewrite_calls

__all__ = [
    "batch_norms_to_convs",
    "has_constants",
    "keep_own_statistics",
    "norm_constants",
    "uses_own_statistics",
]

aten = torch.ops.aten

_CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default}
"""By the rank of the input."""


def batch_norms_to_convs(model: GraphModule) -> int:
    """Rewrite eval-mode batch norms of ``(N, C, L)`` and ``(N, C, H, W)`` in place.

    The same real numbers; factor and shift are computed in float64 and rounded once, so last bits
    of float32 differ from the batch norm's.

    Returns:
        How many were rewritten.
    """
    count = 0
    for node in list(model.graph.nodes):
        if node.op == "call_function" and node.target in _NORMS:
            count += _rewrite(model, node)
    return count


_NORMS = frozenset({aten.batch_norm.default, aten.instance_norm.default})
"""With stored statistics both compute the same; so they take them, their arguments are the same."""

_OWN_STATISTICS = aten._native_batch_norm_legit.no_stats


def uses_own_statistics(node: Node) -> bool:
    """Whether a call normalizes with the statistics of its input always, as it keeps no others.

    ``BatchNorm2d(track_running_stats=False)`` does, and weights that are standardized.
    """
    if node.target is _OWN_STATISTICS:
        return True
    return node.target is aten.batch_norm.default and node.args[3] is None and node.args[4] is None


def keep_own_statistics(model: GraphModule) -> int:
    """Write batch norms that keep no statistics as what they are in training and evaluation alike.

    torchao (0.18) takes every ``aten.batch_norm`` for one that has running statistics: it folds
    them into layers, and switches training off in evaluation.

    Returns:
        How many were rewritten.
    """
    return rewrite_calls(model, {aten.batch_norm.default: _with_own_statistics})


def _with_own_statistics(insert: Insertion) -> Node | None:
    norm = insert.node
    if not uses_own_statistics(norm):
        return None
    data, gamma, beta = norm.args[:3]
    momentum, eps = argument(norm, 6, "momentum"), argument(norm, 7, "eps")
    normalized = insert.call(_OWN_STATISTICS, data, gamma, beta, True, momentum, eps)
    return insert.call(operator.getitem, normalized, 0)


def _rewrite(model: GraphModule, node: Node) -> bool:
    meta = tensor_meta(node)
    if meta is None or meta.dtype != torch.float32 or meta.dim() not in _CONVS:
        return False
    if not has_constants(node):
        return False
    factor, shift = norm_constants(model, node)
    spatial = meta.dim() - 2
    weight = factor.reshape(-1, *[1] * (spatial + 1))
    args = (
        node.args[0],
        add_constant(model, f"{node.name}_factor", weight, node),
        add_constant(model, f"{node.name}_shift", shift, node),
        *([1] * spatial, [0] * spatial, [1] * spatial),
        factor.numel(),
    )
    with model.graph.inserting_before(node):
        conv = model.graph.call_function(_CONVS[meta.dim()], args)
    conv.meta = {**node.meta, "original_target": node.target, ORIGINAL_NAME: node.name}
    replace(model, node, conv)
    return True


def has_constants(norm: Node) -> bool:
    """Whether a ``batch_norm`` call uses stored statistics, and all it reads but its input is."""
    gamma, beta, mean, var = norm.args[1:5]
    if argument(norm, 5, "training", False) or not (is_constant(mean) and is_constant(var)):
        return False
    return all(arg is None or is_constant(arg) for arg in (gamma, beta))


def norm_constants(model: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel, float32, of a norm that :func:`has_constants`."""
    gamma, beta, mean, var = (
        None if arg is None else constant_of(model, cast(Node, arg)).double()
        for arg in norm.args[1:5]
    )
    eps = float(cast(float, argument(norm, 7, "eps")))
    factor = torch.rsqrt(cast(Tensor, var) + eps)
    if gamma is not None:
        factor = factor * gamma
    shift = -cast(Tensor, mean) * factor
    if beta is not None:
        shift = shift + beta
    return factor.float(), shift.float()
