"""Factors and shifts beside a layer become part of its weights and its bias.

ConvNeXt scales the result of each block by a learned factor of each channel (layer scale); a frozen
batch norm is a factor and a shift; ``x @ w + b`` is a linear layer, written out. As ops of their
own these are more tensors to round, with one scale for factors that may differ by orders of
magnitude. In the weights, which have a scale of their own for each channel, and in the bias, which
has 32 bits, they cost nothing.

A factor that is one number, such as the scale of attention's queries, changes no integer of the
weights: it may stand behind a layer or before one.

Where there is no layer that they may become part of, a factor and the shift behind it are weight
and bias of a layer of their own, as those of a batch norm are
(:mod:`custom_quantizer.ops.rewrites.batch_norms`): one tensor to round instead of two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    dynamic_sizes,
    effective_users,
    is_constant,
    is_float32,
    is_same_shape,
    reads_sizes,
    set_argument,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import MERGED, Insertion, merge_into, original_name, replace
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.elementwise import ADD, CLAMP, RELU, SUB
from custom_quantizer.ops.functions import (
    ELU,
    GELU,
    HARDSWISH,
    LEAKY_RELU,
    MISH,
    PRELU,
    SILU,
)
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.ops.movement import CAT, PERMUTE, RESHAPE, passes_on, permutation
from custom_quantizer.ops.pool import ADAPTIVE_AVG_POOL, AVG_POOL, MAX_POOL, MEAN

__all__ = ["fold_factors", "join_factors", "operands"]

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

_WITH_BIAS = {**_LAYERS, aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1}
"""Likewise layers whose bias a shift may become part of."""

_READING = frozenset(_WITH_BIAS) - {aten.batch_norm.default}
"""Layers that are linear in what they read."""

_LEAST = 2.0**-60
"""Smaller numbers could leave nothing of a weight."""

_COMMUTING = frozenset({aten.dropout.default, aten.feature_dropout.default})
"""Dropouts that set to 0 or scale, whatever the values are."""


def fold_factors(model: GraphModule, *, training: bool = False) -> int:
    """Put factors and shifts into weights and biases of the layers beside them, in place.

    The real numbers stay the same; each weight is rounded once more to float32, as when a batch
    norm is folded.

    Args:
        model: the graph.
        training: parameters change: weights become functions of them and of the factors.

    Returns:
        The number of factors and shifts that became part of layers.
    """
    reads = Counter(node.target for node in model.graph.nodes if node.op == "get_attr")
    shared = frozenset(target for target, count in reads.items() if count > 1)
    return sum(
        _fold(model, node, training) or _fold_number(model, node, shared, training)
        for node in list(model.graph.nodes)
        if node.target in _OPS
        and overwritten_by(node) is None
        and not reads_sizes(node)
        and argument(node, 2, "alpha", 1) == 1  # else it could not be written as a product
    )


def _fold(model: GraphModule, node: Node, training: bool) -> bool:
    """Put what an op does with each channel into the layer before it, if it may be."""
    scales = node.target in (aten.div.Tensor, aten.mul.Tensor)
    for data, constant in operands(node):
        if isinstance(constant, Node) and is_constant(constant):
            layer = _layer_before(data, constant, scales)
            if layer is None:
                continue
            insert = Insertion(model, layer, training=training)
            if scales:
                _scale(insert, node.target, constant)
            else:
                _shift(insert, constant, negative=node.target is aten.sub.Tensor)
            merge_into(layer, node, data)
            return True
    return False


def operands(node: Node) -> list[tuple[Node, Any]]:
    """What may be data, and the operand beside it."""
    left, right = node.args[:2]
    pairs = [(left, right)]
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        pairs.append((right, left))
    return [(data, other) for data, other in pairs if isinstance(data, Node)]


def _fold_number(model: GraphModule, node: Node, shared: Collection[Any], training: bool) -> bool:
    """Put a number, by which an op multiplies or divides, into the layers beside it.

    The weight of a layer that shares it is left alone: it would be stored twice.
    """
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or node.kwargs:
        return False
    for data, other in operands(node):
        insert = Insertion(model, node, training=training)
        is_number = type(other) in (int, float) and is_float32(data)
        number = float(other) if is_number else insert.number_beside(other, data)
        if number is None or not _LEAST <= abs(number) <= 1 / _LEAST or not is_float32(node):
            continue
        factor = 1 / number if node.target is aten.div.Tensor else number
        before = _scalable(insert, data, shared)
        layers = _readers(insert, shared) if before is None else [before]
        for layer in layers:
            at_layer = Insertion(model, layer, training=training)
            _scale(at_layer, aten.mul.Tensor, factor, bias=layer is before)
        if layers:
            merge_into(layers[0], node, data)
            return True
    return False


def _scalable(insert: Insertion, node: Node, shared: Collection[Any]) -> Node | None:
    """The layer before ``node``, behind which moves at most stand."""
    while node.target not in _WITH_BIAS:
        if not _passes_factors(node) or len(effective_users(node)) != 1:
            return None
        node = cast(Node, node.args[0])
    return node if len(effective_users(node)) == 1 and _is_own(insert, node, shared) else None


def _readers(insert: Insertion, shared: Collection[Any]) -> list[Node]:
    """The layers that read the node, directly or moved; none, if anything else does."""
    found: dict[Node, None] = {}
    waiting = [insert.node]
    for part in waiting:
        for user in effective_users(part):
            if _passes_factors(user):
                waiting.append(user)
            elif user.target in _READING and user.args[0] is part and _is_own(insert, user, shared):
                found[user] = None
            else:
                return []
    return list(found)


def _passes_factors(node: Node) -> bool:
    """Whether a call of a multiple gives that multiple, whatever the number."""
    if node.op != "call_function" or overwritten_by(node) is not None:
        return False
    return rule_of(node) in (PERMUTE, RESHAPE) or node.target in _COMMUTING or passes_on(node)


def _is_own(insert: Insertion, layer: Node, shared: Collection[Any]) -> bool:
    """Whether weight and bias are constants, and the weight is read by no other call.

    What adds up has a weight, too, all of whose numbers are one: it is no layer of the model.
    """
    weight, bias = argument(layer, 1, "weight"), argument(layer, 2, "bias")
    if not all(isinstance(each, Node) and is_constant(each) for each in (weight, bias or weight)):
        return False
    is_sum = insert.number_beside(weight, weight) is not None
    return len(weight.users) == 1 and weight.target not in shared and not is_sum


def _layer_before(data: Node, constant: Node, scales: bool) -> Node | None:
    """The layer that made ``data``, if moves at most stand between, and there is one a channel.

    Args:
        data: what is scaled or shifted.
        constant: by which numbers.
        scales: whether it is scaled.
    """
    value, rank = tensor_meta(constant), len(shape_of(data))
    if value is None or value.dtype != torch.float32 or not is_float32(data):
        return None
    if not 0 < value.dim() <= rank:
        return None
    first = rank - value.dim()
    varying = [first + d for d, size in enumerate(value.shape) if size > 1]
    if scales and not varying:
        return None
    dims = tuple(varying or [first])
    layers = _LAYERS if scales else _WITH_BIAS
    node = data
    while node.target not in layers:
        before = _dims_before(node, dims, scales)
        if before is None or len(effective_users(node)) != 1:
            return None
        node, dims = cast(Node, node.args[0]), before
    weight, bias, shape = node.args[1], argument(node, 2, "bias"), shape_of(node)
    fixed = all(is_constant(each) or each is None for each in (weight, bias))
    channel = layers[node.target] % len(shape)
    if len(effective_users(node)) != 1 or not fixed or dims != (channel,):
        return None
    return node if shape[channel] == value.numel() else None


def _dims_before(node: Node, dims: tuple[int, ...], scales: bool) -> tuple[int, ...] | None:
    """Which dims of what a move reads its channels come from; ``None``: it is no such move.

    A reshape keeps them, or makes several of one (heads). A dropout that drops is a move before a
    factor: what it leaves is scaled all the same.
    """
    if node.op != "call_function":
        return None
    source = node.args[0]
    rule = rule_of(node)
    if rule is PERMUTE:
        return tuple(permutation(node)[dim] for dim in dims)
    if rule is RESHAPE and isinstance(source, Node):
        old, new, start, end = shape_of(source), shape_of(node), dims[0], dims[-1] + 1
        sizes = new[start:end]
        if dims != tuple(range(start, end)) or not are_static(sizes):
            return None
        kept = len(old) - len(new[end:])
        for dim, same in (
            (start, is_same_shape(old[:start], new[:start])),
            (kept - 1, is_same_shape(old[kept:], new[end:])),
        ):
            if same and 0 <= dim < len(old) and is_same_shape([old[dim]], [math.prod(sizes)]):
                return (dim,)
        return None
    if scales and node.target in _COMMUTING:
        return dims
    return dims if passes_on(node) else None


def _scale(insert: Insertion, target: Any, factor: Node | float, *, bias: bool = True) -> None:
    """Multiply or divide the weight of the layer that ``insert`` stands at, and its bias.

    Args:
        insert: at the layer.
        target: ``mul`` or ``div``.
        factor: a number, or a constant with one for each channel.
        bias: whether the bias, too.
    """
    layer = insert.node
    if isinstance(factor, Node):
        factor = insert.reshape(insert.again(factor), [-1])
        if layer.args[1] is None:  # a batch norm, which has a factor all the same
            ones = torch.ones(int(shape_of(factor)[0]))
            layer.update_arg(1, insert.constant("ones", ones))
    for position, name in [(1, "weight"), (2, "bias")][: 1 + bias]:
        value = argument(layer, position, name)
        if isinstance(value, Node):
            by: Any = factor
            if isinstance(factor, Node):
                by = insert.reshape(factor, [-1, *[1] * (len(shape_of(value)) - 1)])
            scaled = insert.call(target, value, by)
            set_argument(layer, position, name, insert.settled(scaled, name))


def _shift(insert: Insertion, shift: Node, *, negative: bool) -> None:
    """Add ``shift`` to the bias of the layer that ``insert`` stands at, or take it away."""
    layer, bias = insert.node, argument(insert.node, 2, "bias")
    moved = insert.reshape(insert.again(shift), [-1])
    if negative:
        moved = insert.call(aten.neg.default, moved)
    if bias is not None:
        moved = insert.call(aten.add.Tensor, bias, moved)
    set_argument(layer, 2, "bias", insert.settled(moved, "bias"))


_OPS = frozenset({aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor})


def join_factors(model: GraphModule, *, training: bool = False) -> int:
    """Write a factor of each channel and the shift behind it as one layer, in place.

    It is a depthwise convolution of one tap. Only between ops that have integer kernels: in a norm
    that is written out both are float, and cost nothing. What can become part of a layer
    (:func:`fold_factors`) is part of it by now.

    Args:
        model: the graph.
        training: parameters change: the weight is a function of the factor.

    Returns:
        How many pairs became layers.
    """
    sums = [node for node in model.graph.nodes if node.target is aten.add.Tensor]
    return sum(_join(Insertion(model, node, training=training)) for node in sums)


def _join(insert: Insertion) -> bool:
    node = insert.node
    product, shift = _by_channel(node)
    if product is None or product.target is not aten.mul.Tensor:
        return False
    data, factor = _by_channel(product)
    if data is None or shift is None or factor is None or shift[1] != factor[1]:
        return False
    alone = effective_users(product) == [node] and argument(node, 2, "alpha", 1) == 1
    written = overwritten_by(node) is not None or overwritten_by(product) is not None
    if not alone or written or reads_sizes(node) or reads_sizes(product):
        return False
    if not _is_between_integers(data, node):
        return False
    shape, channel = shape_of(data), factor[1]
    rank, channels = len(shape), shape[channel]
    last = channel == rank - 1
    if rank not in (2, 3, 4) or not (last or channel == 1):
        return False
    if last and dynamic_sizes(shape) > 1:
        return False  # a reshape to these sizes would have to infer two
    image = data
    if last:  # an image whose channels are last costs no transpose
        image = insert.reshape(data, [shape[0], *[1] * (4 - rank), *shape[1:]])
        image = insert.permute(image, [0, 3, 1, 2])
    spatial = len(shape_of(image)) - 2
    weight = insert.reshape(insert.again(factor[0]), [channels, 1, *[1] * spatial])
    bias = insert.reshape(insert.again(shift[0]), [channels])
    layer = insert.call(
        aten.conv2d.default if spatial == 2 else aten.conv1d.default,
        image,
        insert.settled(weight, "weight"),
        insert.settled(bias, "bias"),
        *([1] * spatial, [0] * spatial, [1] * spatial),
        channels,
    )
    layer.meta[MERGED] = (original_name(product),)
    if last:
        layer = insert.reshape(insert.permute(layer, [0, 2, 3, 1]), shape)
    replace(insert.model, node, layer)
    return True


def _by_channel(node: Node) -> tuple[Node | None, tuple[Node, int] | None]:
    """The activation that an op reads, and the constant vector beside it, with the dim it is of."""
    for data, constant in (node.args[:2], node.args[1::-1]):
        if not (isinstance(constant, Node) and isinstance(data, Node)) or is_constant(data):
            continue
        value, rank = tensor_meta(constant), len(shape_of(data))
        if not is_constant(constant) or not is_float32(data):
            continue
        if value is None or value.dtype != torch.float32 or value.dim() > rank:
            continue
        varying = [d for d, size in enumerate(value.shape, rank - value.dim()) if size > 1]
        if len(varying) == 1 and is_same_shape([shape_of(data)[varying[0]]], [value.numel()]):
            return data, (constant, varying[0])
    return None, None


def _is_between_integers(data: Node, result: Node) -> bool:
    """Whether ops with integer kernels make ``data``, and read ``result``."""
    while (rule := rule_of(data)) is not None and rule.moves_values and rule is not CAT:
        data = cast(Node, data.args[0])
    readers = list(effective_users(result))
    for reader in readers:
        rule = rule_of(reader)
        if rule is not None and rule.moves_values and rule is not CAT:
            readers += effective_users(reader)
        elif not _is_on_integers(reader):
            return False
    return _is_on_integers(data)


def _is_on_integers(node: Node) -> bool:
    """Whether an op is a layer, a pool, an activation function, or adds or joins tensors."""
    rule = rule_of(node)
    if rule in (ADD, SUB):
        return not any(is_constant(arg) for arg in node.args[:2] if isinstance(arg, Node))
    return rule in _ON_INTEGERS


_ON_INTEGERS = (
    *(CONV, CONV_TRANSPOSE, LINEAR),
    *(ADAPTIVE_AVG_POOL, AVG_POOL, MAX_POOL, MEAN),
    *(CAT, CLAMP, RELU),
    *(ELU, GELU, HARDSWISH, LEAKY_RELU, MISH, PRELU, SILU),
)
