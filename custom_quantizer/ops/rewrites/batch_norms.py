"""Batch norms: part of the layer before them, or the depthwise 1x1 convolutions they are.

``prepare_pt2e`` folds a batch norm into the weight of the layer before it, where it stands. That is
wrong if somebody else reads the weight (one convolution with a batch norm for each level of a
pyramid, tied weights) or the layer's result (``bn(z) + z``), and
:mod:`custom_quantizer.planning.torchao_patches` keeps it from doing so. Here the layer gets a
weight and a bias of its own, and a batch norm whose layer has other users stays apart.

What cannot be folded (DenseNet's come before their convolutions) would stay in float and tear the
model apart; ``convert_pt2e`` (torchao 0.18) searches such a graph for training patterns besides,
for 20 seconds. In eval mode it computes ``x * factor + shift`` per channel, which is a convolution
with one weight a channel.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from custom_quantizer.core.graph import (
    add_constant,
    argument,
    constant_of,
    effective_users,
    is_constant,
    read_constant,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import ORIGINAL_NAME, Insertion, replace, rewrite_calls
from custom_quantizer.ops import PatternMatch, match_of
from custom_quantizer.ops.gemm import CONV_TRANSPOSE, LINEAR

__all__ = [
    "batch_norms_to_convs",
    "fold_in_place",
    "fold_into_layers",
    "has_constants",
    "keep_own_statistics",
    "layer_before",
    "norm_constants",
    "scale_channels",
    "uses_own_statistics",
]

aten = torch.ops.aten

_IN_PLACE = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose2d.input,
    aten.linear.default,
)
"""Layers with rules that torchao (0.18) folds batch norms into."""

_CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default}
"""By the rank of the input."""


def layer_before(norm: Node) -> PatternMatch | None:
    """The layer that a batch norm can be folded into: it makes the norm's input for it alone.

    Weight and bias of the layer are constants, or computed from parameters in training, and the
    channels of its result are those of the norm.
    """
    layer = norm.args[0]
    if not isinstance(layer, Node) or effective_users(layer) != [norm]:
        return None
    if overwritten_by(norm) is not None:
        return None
    match = match_of(layer)
    if match is None or not is_constant(match.weight):
        return None
    if match.bias is not None and not is_constant(match.bias):
        return None
    result, weight = tensor_meta(layer), tensor_meta(cast(Node, match.weight))
    if result is None or weight is None or result.dtype != torch.float32:
        return None
    # A norm has its channels on axis 1: a linear layer only in a matrix, a convolution not
    # where there is no batch.
    rank = 2 if match.rule is LINEAR else weight.dim()
    return match if result.dim() == rank else None


def fold_in_place(model: GraphModule) -> int:
    """Multiply batch norms into the weights of the layers before them, where these are stored.

    The same bits and names as ``prepare_pt2e`` (torchao 0.18) has, which collects dead nodes after
    every norm, so that its time grows with the square of their number. Norms that it would get
    wrong are left: see :func:`_is_in_place`.

    Returns:
        How many were folded.
    """
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in model.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)].extend(node.users)
    count = 0
    for norm in list(model.graph.nodes):
        if norm.target is not aten.batch_norm.default:
            continue
        match = layer_before(norm)
        if match is not None and _is_in_place(model, norm, match, readers):
            _fold_in_place(model, match, norm)
            count += 1
    if count:
        model.graph.eliminate_dead_code()
        model.recompile()
    return count


def _is_in_place(
    model: GraphModule, norm: Node, match: PatternMatch, readers: Mapping[str, list[Node]]
) -> bool:
    """Whether a norm may be multiplied into the weight of its layer where that weight is stored.

    As torchao 0.18 does it: nobody else may read weight or bias, the name it gives to a bias that
    was not there must be free, the groups of a transposed convolution have to be one, and a norm
    behind a linear layer has factors and shifts.

    Args:
        model: the graph.
        norm: the batch norm.
        match: the layer before it.
        readers: by the name of a constant, who reads it.
    """
    if match.node.target not in _IN_PLACE or not has_constants(norm):
        return False
    if match.rule is CONV_TRANSPOSE and match.groups > 1:
        return False
    if match.rule is LINEAR and None in norm.args[1:3]:
        return False
    weight = cast(Node, match.weight)
    if match.bias is None and _has_attribute(model, f"{weight.target}_bias"):
        return False
    targets = {str(read.target) for read in (weight, match.bias) if read is not None}
    return all(user is match.node for target in targets for user in readers[target])


def _fold_in_place(model: GraphModule, match: PatternMatch, norm: Node) -> None:
    layer, weight, bias = match.node, cast(Node, match.weight), match.bias

    def stored(node: object) -> Tensor | None:
        return attrgetter(str(node.target))(model) if isinstance(node, Node) else None

    gamma, beta, mean, var = map(stored, norm.args[1:5])
    constants: tuple[Any, ...] = (stored(weight), stored(bias), mean, var, _eps(norm), gamma, beta)
    fuse: Callable[..., tuple[Tensor, Tensor]] = fuse_linear_bn_weights
    if match.rule is not LINEAR:
        fuse = partial(fuse_conv_bn_weights, transpose=match.rule is CONV_TRANSPOSE)
    fused = fuse(*constants)
    names = [str(weight.target), f"{weight.target}_bias" if bias is None else str(bias.target)]
    for name, values in zip(names, fused, strict=True):
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, values)
    layer.args = (*layer.args[:2], bias or read_constant(model, names[1], layer), *layer.args[3:])
    norm.replace_all_uses_with(layer)
    model.graph.erase_node(norm)


def _has_attribute(model: GraphModule, target: str) -> bool:
    path, _, name = target.rpartition(".")
    return hasattr(model.get_submodule(path), name)


def fold_into_layers(model: GraphModule) -> int:
    """Fold batch norms into the layers before them, each with a weight and a bias of its own.

    In place. The same real numbers; each weight is computed in float64 and rounded once.

    Returns:
        How many were folded.
    """
    count = 0
    for norm in list(model.graph.nodes):
        if norm.op != "call_function" or norm.target is not aten.batch_norm.default:
            continue
        match = layer_before(norm) if has_constants(norm) else None
        if match is not None:
            _fold(model, match, norm)
            count += 1
    return count


def _fold(model: GraphModule, match: PatternMatch, norm: Node) -> None:
    layer, weight = match.node, cast(Node, match.weight)
    factor, shift = _factor_and_shift(model, norm)
    values = constant_of(model, weight).double()
    folded = scale_channels(values, factor, match.weight_axis, match.groups)
    if match.bias is not None:
        shift = shift + constant_of(model, match.bias).double() * factor
    stack = weight.meta.get("nn_module_stack", {})
    constants = [
        add_constant(model, f"{weight.target}_folded", folded.float(), layer),
        add_constant(model, f"{weight.target}_folded_bias", shift.float(), layer),
    ]
    for constant in constants:
        constant.meta["nn_module_stack"] = stack
    layer.args = (layer.args[0], *constants, *layer.args[3:])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k not in ("weight", "bias")}
    norm.replace_all_uses_with(layer)
    model.graph.erase_node(norm)


def scale_channels(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """The weight of a layer, each output channel times its factor.

    Args:
        weight: with output channels on ``axis``; on axis 1 (transposed convolutions) they are
            ``channels / groups`` for each group of input channels.
        factor: ``(channels,)``.
        axis: 0 or 1.
        groups: channel groups.
    """
    if axis == 0:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    factor = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (grouped * factor).reshape(weight.shape)


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
    factor, shift = _factor_and_shift(model, norm)
    return factor.float(), shift.float()


def _factor_and_shift(model: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = (
        None if arg is None else constant_of(model, cast(Node, arg)).double()
        for arg in norm.args[1:5]
    )
    factor = torch.rsqrt(cast(Tensor, var) + _eps(norm))
    if gamma is not None:
        factor = factor * gamma
    shift = -cast(Tensor, mean) * factor
    if beta is not None:
        shift = shift + beta
    return factor, shift


def _eps(norm: Node) -> float:
    return float(cast(float, argument(norm, 7, "eps")))
