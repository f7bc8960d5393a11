"""Norms, written out in float ops that the delegate has.

The partitioner takes means over height and width only. A mean over the last dimension is a linear
layer with one output whose weights are ``1 / n``; the variance another one, of the squares. A group
norm is that of each group laid out in a row; a root-mean-square norm leaves the first mean out.

    m = linear(x, 1/n)    d = x - m    v = linear(d * d, 1/n) + eps    y = d * rsqrt(v) * w + b

How far from the real number can it be? With ``u = 2**-24``: ``1/n`` and each of the ``n`` fused
multiply-adds round once, so ``m`` is off by at most ``e = (n + 1) u max|x|``, and so is each ``d``,
which then rounds by ``u |d|``. ``v`` is off by at most ``(n + 3) u v + 2 e mean|d| + e**2``; half
of its relative error goes into ``y``, along with 2 u of ``rsqrt`` and 2 u of the products. In units
of the standard deviation ``s = sqrt(v)``, with ``r = max|x| / s`` and ``|y| = |d| / s``:

    |error| <= (n + 1) u r (1 + |y|) + (n / 2 + 6) u |y|

For 768 channels, values within 10 standard deviations and ``|y| <= 10`` that is 0.0056 at worst:
a fifteenth of a unit of an int8 output in [-10, 10]; roundings of random sign give less by a factor
of ``sqrt(n)``. PyTorch's kernel, which the integer reference calls, has an error of the same kind,
so the integers behind a norm are those of the reference or their neighbours. A mean of more than
4,096 values is one of ``a`` means of ``b``: ``n + 1`` becomes ``a + b + 2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import are_rows
from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    calls,
    graph_pass,
    quantized_neighbours,
    replace,
    viewed,
)
from custom_quantizer.core.graph import (
    add_constant,
    argument,
    constant_of,
    is_dequantize,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops.attention import LOG_SOFTMAX
from custom_quantizer.ops.movement import EXPAND
from custom_quantizer.ops.normalization import (
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    VECTOR_NORM,
    normalized_size,
    number_of_groups,
)
from custom_quantizer.ops.rewrites.batch_norms import (
    factor_and_shift,
    fold_into_layers,
    give_layers,
    has_constants,
)

aten = torch.ops.aten


class _Sums:
    """Constants that average or sum the last dimension, one of each kind per graph."""

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._known: dict[tuple[str, float], Node] = {}

    def row(self, size: int, value: float) -> Node:
        """Weights ``(1, size)`` of a linear layer, all equal."""
        return self._constant(f"row_{size}", value, torch.full((1, size), value))

    def single(self, value: float) -> Node:
        """One number, as the bias of a linear layer or a factor."""
        return self._constant("single", value, torch.tensor([value]))

    def _constant(self, name: str, value: float, tensor: Tensor) -> Node:
        key = (name, value)
        if key not in self._known:
            first = next(iter(self._model.graph.nodes))
            self._known[key] = add_constant(self._model, f"norm_{name}", tensor, first)
        return self._known[key]


@graph_pass(
    "layer norms and root-mean-square norms",
    "means as linear layers of one output, and elementwise ops: other roundings in float",
    exact=False,
)
def layer_norms_to_linears(model: GraphModule) -> int:
    """Layer norms, and root-mean-square norms, which do not center."""
    sums = _Sums(model)
    count = 0
    for rule in (LAYER_NORM, RMS_NORM):
        for node in calls(model, rule.targets):
            if isinstance(rule.match(rule, node), str):
                continue
            size, shape = normalized_size(node), shape_of(node)
            dims = len(cast("Sequence[int]", node.args[1]))
            build = Builder(model, node)
            data = cast(Node, node.args[0])
            if dims > 1:
                data = viewed(build, data, [*shape[:-dims], size])
            weight, bias = argument(node, 2, "weight"), None
            if rule is LAYER_NORM:
                data = build.call(aten.sub.Tensor, data, _mean(build, sums, data))
                bias, epsilon = argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
            else:
                epsilon = argument(node, 3, "eps")
                epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
            result = _over_deviation(build, sums, data, float(epsilon))
            result = _affine(build, node, result, _values(model, weight, bias), [size])
            if dims > 1:
                result = build.call(aten.view_copy.default, result, view_sizes(shape))
            replace(node, result)
            count += 1
    return count


@graph_pass(
    "group and instance norms",
    "means as linear layers of one output, and elementwise ops: other roundings in float",
    exact=False,
)
def group_norms_to_linears(model: GraphModule) -> int:
    """Group and instance norms: each group in a row, then back to the shape of the image."""
    sums = _Sums(model)
    count = 0
    for rule, affine_at, eps_at in ((GROUP_NORM, 2, 4), (INSTANCE_NORM, 1, 7)):
        for node in calls(model, rule.targets):
            if isinstance(rule.match(rule, node), str):
                continue
            shape = shape_of(node)
            groups = number_of_groups(node)
            size = math.prod(int(n) for n in shape[1:]) // groups
            build = Builder(model, node)
            data = cast(Node, node.args[0])
            # All values of an image in one row may stand in any order: in that of convolutions.
            last = groups == 1 and len(shape) == 4
            if last:
                data = _moved(build, data, _CHANNELS_LAST)
                shape = shape_of(data)
            data = viewed(build, data, [shape[0], groups, size])
            centered = build.call(aten.sub.Tensor, data, _mean(build, sums, data))
            epsilon = float(argument(node, eps_at, "eps", 1e-5))
            result = _over_deviation(build, sums, centered, epsilon)
            result = build.call(aten.view_copy.default, result, view_sizes(shape))
            weight, bias = (
                argument(node, affine_at, "weight"),
                argument(node, affine_at + 1, "bias"),
            )
            dims = [-1] if last else [-1, *[1] * (len(shape) - 2)]
            result = _affine(build, node, result, _values(model, weight, bias), dims)
            if last:
                result = build.call(aten.permute.default, result, list(_CHANNELS_FIRST))
            replace(node, result)
            count += 1
    return count


_LONGEST_ROW = 4096
"""Means of more values are means of means: the constants are smaller, and so are the errors."""


def _mean(build: Builder, sums: _Sums, data: Node, epsilon: float | None = None) -> Node:
    """``mean(data, -1, keepdim=True) + epsilon``."""
    *outer, size = shape_of(data)
    last, rows = int(size), 1
    if last > _LONGEST_ROW:
        rows = next(n for n in range(math.isqrt(last), 0, -1) if last % n == 0)
    if rows > 1:
        last //= rows
        parts = build.call(aten.view_copy.default, data, [*view_sizes(outer), rows, last])
        means = build.call(aten.linear.default, parts, sums.row(last, 1.0 / last))
        data = build.call(aten.view_copy.default, means, [*view_sizes(outer), rows])
        last = rows
    row = sums.row(last, 1.0 / last)
    if epsilon is None:
        return build.call(aten.linear.default, data, row)
    return build.call(aten.linear.default, data, row, sums.single(epsilon))


def _over_deviation(build: Builder, sums: _Sums, centered: Node, epsilon: float) -> Node:
    """``centered * rsqrt(mean(centered**2) + epsilon)``."""
    squares = build.call(aten.mul.Tensor, centered, centered)
    inverse = build.call(aten.rsqrt.default, _mean(build, sums, squares, epsilon))
    return build.call(aten.mul.Tensor, centered, inverse)


def _values(
    model: GraphModule, weight: Node | None, bias: Node | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of the constants that a norm has."""
    weight_value, bias_value = (
        None if node is None else constant_of(model, node) for node in (weight, bias)
    )
    return weight_value, bias_value


def _affine(
    build: Builder,
    node: Node,
    result: Node,
    given: tuple[Tensor | None, Tensor | None],
    shape: Sequence[int],
) -> Node:
    """``result * weight + bias``, without what would change nothing."""
    steps = (("weight", aten.mul.Tensor, 1), ("bias", aten.add.Tensor, 0))
    for value, (name, target, neutral) in zip(given, steps, strict=True):
        if value is None or bool((value == neutral).all()):
            continue
        constant = add_constant(build.model, f"{node.name}_{name}", value.reshape(shape), node)
        result = build.call(target, result, constant)
    return result


@graph_pass(
    "batch norms, which another quantizer left alone",
    "convolutions with one weight a channel, or a product and a sum: other roundings in float",
    exact=False,
)
def batch_norms_to_layers(model: GraphModule) -> int:
    """What is done before annotation, for those that it did not reach.

    ExecuTorch (1.5.1) makes layers of batch norms behind all passes. Where the next op is a
    quantize, that of signals does not load (see ``keep_convs_float``), and two norms with one
    weight, or without any, get the same name.
    """
    give_layers(model, has_constants)
    count = fold_into_layers(model)
    for node in calls(model, frozenset({aten.batch_norm.default})):
        meta = tensor_meta(node)
        if meta is None or meta.dtype != torch.float32 or not has_constants(node):
            continue
        build, data = Builder(model, node), cast(Node, node.args[0])
        factor, shift = factor_and_shift(model, node)
        dims = [-1, *[1] * (meta.dim() - 2)]
        replace(node, _affine(build, node, data, (factor.float(), shift.float()), dims))
        count += 1
    return count


_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def _moved(build: Builder, data: Node, order: Sequence[int]) -> Node:
    """``data`` with its dims in another order, in integers if it is."""
    moved = build.call(aten.permute.default, data, list(order))
    return build.requantized(moved, data) if is_dequantize(data) else moved


@graph_pass(
    "Euclidean norms", "sums as linear layers of one output: other roundings in float", exact=False
)
def norms_to_linears(model: GraphModule) -> int:
    """The Euclidean norm over the last dimension: squares, their sum, its root."""
    sums = _Sums(model)
    count = 0
    for node in calls(model, VECTOR_NORM.targets):
        if isinstance(VECTOR_NORM.match(VECTOR_NORM, node), str):
            continue
        data = cast(Node, node.args[0])
        build = Builder(model, node)
        squares = build.call(aten.mul.Tensor, data, data)
        ones = sums.row(int(shape_of(data)[-1]), 1.0)
        result = build.call(aten.sqrt.default, build.call(aten.linear.default, squares, ones))
        if not argument(node, 3, "keepdim", False):
            result = build.call(aten.view_copy.default, result, view_sizes(shape_of(node)))
        replace(node, result)
        count += 1
    return count


@graph_pass(
    "logarithms of sums of exponentials, and of softmaxes",
    "a max pool, a linear layer of one output, and elementwise ops: other roundings in float",
    exact=False,
)
def logsumexps_to_linears(model: GraphModule) -> int:
    """``m + log(sum(exp(x - m)))``, where ``m`` is the maximum; ``x - m`` less the logarithm.

    It is made finite before it is subtracted, so that rows of nothing but minus infinity give that,
    as they do in PyTorch, and not a NaN.
    """
    sums = _Sums(model)
    count = 0
    for node in calls(model, _IN_ROWS):
        data, given = cast("tuple[Node, Any]", node.args[:2])
        shape = shape_of(data)
        dims = sorted({int(d) % len(shape) for d in pytree.tree_leaves(given) if shape})
        outer = [d for d in range(len(shape)) if d not in dims]
        if not is_float32(node) or not dims or not are_rows(shape, dims):
            continue
        build, order = Builder(model, node), [*outer, *dims]
        size = math.prod(int(shape[d]) for d in dims)
        if order != list(range(len(shape))):
            data = _moved(build, data, order)
        rows = math.prod(shape[d] for d in outer)
        data = viewed(build, data, [rows, size])
        images = build.call(aten.view_copy.default, data, view_sizes([rows, 1, 1, size]))
        largest = build.call(aten.max_pool2d.default, images, [1, size])
        largest = build.call(aten.view_copy.default, largest, view_sizes([rows, 1]))
        below = build.call(aten.sub.Tensor, data, build.finite(largest))
        powers = build.call(aten.exp.default, below)
        total = build.call(aten.linear.default, powers, sums.row(size, 1.0))
        logarithm = build.call(aten.log.default, total)
        if node.target is aten.logsumexp.default:
            result = build.call(aten.add.Tensor, logarithm, largest)
            result = build.call(aten.view_copy.default, result, view_sizes(shape_of(node)))
        else:
            result = build.call(aten.sub.Tensor, below, logarithm)
            moved = [shape[d] for d in order]
            result = build.call(aten.view_copy.default, result, view_sizes(moved))
            if order != list(range(len(shape))):
                back = sorted(range(len(order)), key=order.__getitem__)
                result = build.call(aten.permute.default, result, back)
        replace(node, result)
        count += 1
    return count


_IN_ROWS = LOG_SOFTMAX.targets | {aten.logsumexp.default}


_BROADCASTING = frozenset({aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor})


@graph_pass("expands before elementwise ops", "none")
def drop_broadcasts(model: GraphModule) -> int:
    """An expand, in float or in integers, that only ops read which broadcast by themselves."""
    count = 0
    for node in calls(model, EXPAND.targets):
        source = cast(Node, node.args[0])
        expanded = _expanded_integers(node, source) if is_dequantize(source) else [node]
        readers = [(user, value) for value in expanded for user in value.users]
        if not readers or not all(_broadcasts(user, value, source) for user, value in readers):
            continue
        for value in expanded:
            # Each reader keeps a dequantize of its own.
            own = value is not node
            build = Builder(model, value)
            replace(value, build.call(source.target, *source.args) if own else source)
        count += 1
    return count


def _expanded_integers(node: Node, source: Node) -> list[Node]:
    """What dequantizes the integers of ``source`` behind an expand; empty if others read them."""
    around = quantized_neighbours(node)
    if around is None or around[1].args[1:] != source.args[1:]:
        return []
    found = list(around[1].users)
    same = all(is_dequantize(user) and user.args[1:] == source.args[1:] for user in found)
    return found if same and len(shape_of(source)) == len(shape_of(node)) else []


def _broadcasts(user: Node, node: Node, source: Node) -> bool:
    if user.target not in _BROADCASTING:
        return False
    others = [arg for arg in user.args[:2] if isinstance(arg, Node) and arg is not node]
    shapes = [shape_of(source), *(shape_of(other) for other in others)]
    broadcast = cast("Callable[..., torch.Size]", torch.broadcast_shapes)
    return is_same_shape(broadcast(*shapes), shape_of(user))


IN_STEPS = frozenset({aten.batch_norm.default, aten.logsumexp.default})
"""Ops of no family that are written here."""
