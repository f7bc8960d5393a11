"""Batch norms: part of the layer before them; where there is none, one that changes nothing.

``prepare_pt2e`` folds a batch norm into the weight of the layer before it, where it stands. That is
wrong if somebody else reads the weight (one convolution with a batch norm for each level of a
pyramid, tied weights) or the layer's result (``bn(z) + z``), and
:mod:`custom_quantizer.planning.torchao_patches` keeps it from doing so. Here the layer gets a
weight and a bias of its own, and a batch norm whose layer has other users stays apart.

What cannot be folded (DenseNet's come before their convolutions) would stay in float and tear the
model apart; ``convert_pt2e`` (torchao 0.18) searches such a graph for training patterns besides,
for 20 seconds. They get a layer of their own, the depthwise 1x1 convolution whose weights are 1;
folded into that, ``x * factor + shift`` is a convolution with one weight a channel. In training
(:mod:`custom_quantizer.ops.rewrites.training_graph`) they are folded into the same layers.
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
from custom_quantizer.core.rewriting import (
    ORIGINAL_NAME,
    Insertion,
    merge_into,
    original_name,
    original_target,
    rewrite_calls,
)
from custom_quantizer.ops import PatternMatch, match_of
from custom_quantizer.ops.gemm import CONV_TRANSPOSE, LINEAR

__all__ = [
    "factor_and_shift",
    "fold_in_place",
    "fold_into_layers",
    "give_layers",
    "has_constants",
    "is_counter",
    "keep_own_statistics",
    "layer_before",
    "reads_constants",
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


def is_counter(node: Node) -> bool:
    """Whether a call counts the batches that a batch norm was trained with."""
    counted = node.args[0] if node.args and node.target is aten.add_.Tensor else None
    return isinstance(counted, Node) and str(counted.target).endswith("num_batches_tracked")


def _as_if_captured_in_evaluation(model: GraphModule) -> None:
    """Mend what ``move_exported_model_to_eval`` (torchao 0.18) leaves where it switches calls.

    It leaves the shapes of its own example on norms and dropouts; and counters of batches, which
    a graph that was captured in evaluation mode does not have.
    """
    for node in model.graph.nodes:
        if node.target not in (aten.batch_norm.default, aten.dropout.default):
            continue
        given, made = tensor_meta(node.args[0]), tensor_meta(node)
        if given is not None and (made is None or made.shape != given.shape):
            node.meta.pop("tensor_meta", None)
            node.meta["val"] = given
    norms = [n for n in model.graph.nodes if n.target is aten.batch_norm.default]
    if any(argument(norm, 5, "training") is True for norm in norms):
        return
    for node in list(model.graph.nodes):
        if is_counter(node) and not node.users:
            model.graph.erase_node(node)


def fold_in_place(model: GraphModule) -> int:
    """Multiply batch norms into the weights of the layers before them, where these are stored.

    The same bits and names as ``prepare_pt2e`` (torchao 0.18) has, which collects dead nodes after
    every norm, so that its time grows with the square of their number. Norms that it would get
    wrong are left: see :func:`_is_in_place`.

    Returns:
        How many were folded.
    """
    _as_if_captured_in_evaluation(model)
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
    factor, shift = factor_and_shift(model, norm)
    # The factor is float64, and so is the product.
    folded = scale_channels(constant_of(model, weight), factor, match.weight_axis, match.groups)
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
    merge_into(layer, norm)


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


def give_layers(model: GraphModule, wanted: Callable[[Node], bool] = lambda _norm: True) -> int:
    """Put a layer that changes nothing before each batch norm that has none, in place.

    Of norms of ``(N, C, L)`` and ``(N, C, H, W)`` that are not folded into the layer before them.

    Args:
        model: the graph.
        wanted: which norms.

    Returns:
        How many got one.
    """
    norms = [n for n in model.graph.nodes if n.target is aten.batch_norm.default and wanted(n)]
    return sum(_give_layer(model, norm) for norm in norms)


def _give_layer(model: GraphModule, norm: Node) -> bool:
    data, meta = norm.args[0], tensor_meta(norm)
    if meta is None or meta.dtype != torch.float32 or meta.dim() not in _CONVS:
        return False
    channels = meta.shape[1]
    if not reads_constants(norm) or not isinstance(channels, int) or layer_before(norm) is not None:
        return False
    if overwritten_by(norm) is not None:
        return False
    spatial = meta.dim() - 2
    ones = torch.ones(channels, 1, *[1] * spatial, device=meta.device)
    args = (
        data,
        add_constant(model, f"{norm.name}_layer", ones, norm),
        None,
        *([1] * spatial, [0] * spatial, [1] * spatial),
        channels,
    )
    # The layer is what stays, and answers to rules for the norm.
    with model.graph.inserting_before(norm):
        conv = model.graph.call_function(_CONVS[meta.dim()], args)
    captured = {"original_target": original_target(norm), ORIGINAL_NAME: original_name(norm)}
    conv.meta = {**norm.meta, **captured}
    name = norm.name
    norm.name, conv.name = conv.name, name
    norm.update_arg(0, conv)
    return True


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


def reads_constants(norm: Node) -> bool:
    """Whether all that a ``batch_norm`` call reads but its input is constant, or trained."""
    gamma, beta, mean, var = norm.args[1:5]
    if not (is_constant(mean) and is_constant(var)):
        return False
    return all(arg is None or is_constant(arg) for arg in (gamma, beta))


def has_constants(norm: Node) -> bool:
    """Whether a ``batch_norm`` call reads constants, and not the statistics of the batch."""
    return reads_constants(norm) and not argument(norm, 5, "training", False)


def factor_and_shift(model: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by, and what it adds then, in float64."""
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
