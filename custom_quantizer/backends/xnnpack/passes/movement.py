"""Ops that move values, as the few that XNNPACK has on integers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    between_moves,
    calls,
    graph_pass,
    is_wide,
    origin_of,
    quantized_neighbours,
    replace,
    then_move,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    add_constant,
    are_static,
    argument,
    constant_of,
    dynamic_sizes,
    effective_users,
    is_constant,
    is_dequantize,
    is_float32,
    is_same_shape,
    reads_sizes,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops.movement import CAT, EXPAND, RESHAPE, SELECT, SLICE, SPLIT, slice_of

aten = torch.ops.aten


_MAX_REPEATS = 4096
"""Beyond this an expand stays outside the delegate: a cat names each of its inputs, for a while."""


@graph_pass("splits", "slices")
def splits_to_slices(model: GraphModule) -> int:
    """chunk, split and unbind become one slice a piece (and a reshape, for unbind)."""
    count = 0
    for node in calls(model, SPLIT.targets):
        source = cast(Node, node.args[0])
        pieces = node.meta["val"]
        rank = len(shape_of(source))
        unbind = node.target is aten.unbind.int
        dim = int(argument(node, 1 if unbind else 2, "dim", 0)) % rank
        sizes = [1 if unbind else piece.shape[dim] for piece in pieces]
        ends = list(accumulate(sizes, initial=0))
        if not isinstance(ends[-1], int):
            ends[-1] = sys.maxsize  # the last piece goes to the end of a dynamic dim
        if not are_static(ends):
            continue
        for user in list(node.users):
            index = cast(int, user.args[1])
            build = Builder(model, user, origin_of(user))
            taken = build.call(aten.slice.Tensor, source, dim, ends[index], ends[index + 1])
            if unbind:
                taken = then_move(build, source, taken, aten.squeeze.dim, dim)
            replace(user, taken)
        model.graph.erase_node(node)
        count += 1
    return count


@graph_pass("selects", "slices and reshapes")
def selects_to_slices(model: GraphModule) -> int:
    """Select becomes slice and reshape."""
    targets = [node for node in calls(model, SELECT.targets) if not reads_sizes(node)]
    for node in targets:
        source = cast(Node, node.args[0])
        shape = shape_of(source)
        dim = int(cast(int, node.args[1])) % len(shape)
        index = cast(int, node.args[2])
        static = isinstance(shape[dim], int)
        start = index + shape[dim] if index < 0 and static else index
        build = Builder(model, node)
        # From -1 on is the last one; to 0 would be none.
        stop = sys.maxsize if start == -1 else start + 1
        taken = build.call(aten.slice.Tensor, source, dim, start, stop)
        replace(node, then_move(build, source, taken, aten.squeeze.dim, dim))
    return len(targets)


@graph_pass(
    "reshapes", "view copies", requires={"splits_to_slices", "selects_to_slices", "means_keep_dims"}
)
def reshapes_to_views(model: GraphModule) -> int:
    """All reshapes become view_copy, with at most one dynamic size.

    Unlike a view, it takes any strides: the ``contiguous`` before a view may be gone by now.
    """
    count = 0
    for node in calls(model, RESHAPE.targets):
        shape = list(shape_of(node))
        dynamic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        if len(dynamic) > 1:
            continue
        sizes = [-1 if i in dynamic else int(size) for i, size in enumerate(shape)]
        build = Builder(model, node)
        replace(node, build.call(aten.view_copy.default, node.args[0], sizes))
        count += 1
    return count


@graph_pass("strided slices of images", "depthwise 1x1 convolutions")
def strided_slices_to_convs(model: GraphModule) -> int:
    """A strided slice of an image is a depthwise 1x1 convolution with weights 1 and that stride.

    With equal input and output scale the requantization multiplier is exactly 1, so every integer
    arrives unchanged. Neighbouring slices of height and width become one convolution.
    """
    count = 0
    taken: set[Node] = set()
    for node in calls(model, SLICE.targets):
        around = quantized_neighbours(node) if node not in taken else None
        shape = shape_of(node) if around is not None else ()
        if around is None or len(shape) != 4:
            continue
        dim, start, stop, step = slice_of(node)
        channels = shape[1]
        if step == 1 or dim not in (2, 3) or not isinstance(channels, int):
            continue
        before, after = around
        build = Builder(model, node)
        source = before
        size = shape_of(before)[dim]
        if start != 0 or (isinstance(size, int) and stop != size):
            end = stop if isinstance(stop, int) else sys.maxsize
            cut = build.call(aten.slice.Tensor, before, dim, start, end)
            source = build.requantized(cut, before)
        stride = [1, 1]
        stride[dim - 2] = step
        # The next slice takes the other dim at once.
        follower = _next_strided_slice(after, 5 - dim)
        if follower is not None:
            next_node, after, stride[3 - dim] = follower
            taken.add(next_node)
            build.origin = f"{build.origin},{next_node.name}"
        conv = _identity_conv(build, source, channels, stride)
        after.args = (conv, *after.args[1:])
        count += 1
    model.graph.eliminate_dead_code()
    return count


def _next_strided_slice(quantize: Node, dim: int) -> tuple[Node, Node, int] | None:
    """The strided slice of ``dim`` that is the only use of a quantized tensor."""
    users = list(quantize.users)
    if len(users) != 1 or not is_dequantize(users[0]) or len(users[0].users) != 1:
        return None
    (node,) = users[0].users
    if node.target not in SLICE.targets:
        return None
    around = quantized_neighbours(node)
    if around is None:
        return None
    found, start, stop, step = slice_of(node)
    size = shape_of(cast(Node, node.args[0]))[dim]
    if found != dim or step == 1 or start != 0 or (isinstance(size, int) and stop != size):
        return None
    return node, around[1], step


def _identity_conv(build: Builder, source: Node, channels: int, stride: Sequence[int]) -> Node:
    """Depthwise 1x1 convolution whose weights are the integer 1 at scale 1."""
    prefix = f"{build.origin}_identity"
    if is_wide(source):
        ones = torch.ones(channels, 1, 1, 1)
        weight = add_constant(build.model, f"{prefix}_float", ones, build.anchor)
        return build.call(
            aten.conv2d.default, source, weight, None, list(stride), [0, 0], [1, 1], channels
        )
    dequantized = _unit_weight(build, torch.ones(channels, 1, 1, 1, dtype=torch.int8), prefix)
    return build.call(
        aten.conv2d.default, source, dequantized, None, list(stride), [0, 0], [1, 1], channels
    )


def _unit_weight(build: Builder, integers: Tensor, prefix: str) -> Node:
    """A constant int8 weight of scale 1."""
    weight = add_constant(build.model, f"{prefix}_integers", integers, build.anchor)
    dequantized = build.call(DEQUANTIZE_PER_TENSOR, weight, 1.0, 0, -127, 127, torch.int8)
    if (meta := weight.meta.get("val")) is not None:
        dequantized.meta["val"] = meta.to(torch.float32)
    return dequantized


@graph_pass("slices of the channels of a dynamic batch", "1x1 convolutions")
def channel_slices_to_convs(model: GraphModule) -> int:
    """A slice of the channels of a dynamic batch is a 1x1 convolution with weights 0 and 1.

    For upstream's partitioner, which leaves slices of dynamic sizes outside the delegate. Equal
    scales make the multiplier exactly 1.
    """
    count = 0
    for node in calls(model, SLICE.targets):
        around = quantized_neighbours(node)
        if around is None or is_wide(around[0]):
            continue
        shape: tuple[Any, ...] = shape_of(around[0])
        dim, start, stop, step = slice_of(node)
        if len(shape) != 4 or dim != 1 or isinstance(shape[0], int):
            continue
        if not isinstance(shape[1], int):
            continue
        build = Builder(model, node)
        weight = torch.zeros(len(range(start, stop, step)), shape[1], 1, 1, dtype=torch.int8)
        for row, column in enumerate(range(start, stop, step)):
            weight[row, column] = 1
        selected = _unit_weight(build, weight, f"{build.origin}_selection")
        ones = [1, 1]
        conv = build.call(aten.conv2d.default, around[0], selected, None, ones, [0, 0], ones, 1)
        replace(node, conv)
        count += 1
    return count


@graph_pass(
    "other strided slices",
    "slices of groups",
    requires={
        "splits_to_slices",
        "selects_to_slices",
        "strided_slices_to_views",
        "strided_slices_to_convs",
    },
)
def strided_slices_to_groups(model: GraphModule) -> int:
    """A strided slice splits its dim into groups of its step and takes one of each group.

    As ``strided_slices_to_views``, where the step does not divide the size. XNNPACK slices with
    step 1 only.
    """
    count = 0
    for node in calls(model, SLICE.targets):
        source = cast(Node, node.args[0])
        dim, start, stop, step = slice_of(node)
        if step == 1 or not is_float32(source) or reads_sizes(node):
            continue
        shape = shape_of(source)
        dynamic = [d for d, size in enumerate(shape) if not isinstance(size, int)]
        if len(dynamic) > 1 or dim in dynamic:
            continue
        build, number = Builder(model, node), len(range(start, stop, step))
        if number == 0:
            continue
        beyond = start + number * step - shape[dim]
        if beyond <= start:
            # The last group may reach beyond the end: then all of them begin earlier.
            shift = max(beyond, 0)
            taken = _take(build, source, dim, (start - shift, number, step, shift))
        else:
            last = build.call(
                aten.slice.Tensor, source, dim, start + (number - 1) * step, shape[dim]
            )
            if start + (number - 1) * step + 1 < shape[dim]:
                last = then_move(build, source, last, aten.slice.Tensor, dim, 0, 1)
            if number == 1:
                taken = last
            else:
                first = _take(build, source, dim, (start, number - 1, step, 0))
                parts = [between_moves(build, source, part) for part in (first, last)]
                taken = build.call(aten.cat.default, parts, dim)
        replace(node, taken)
        count += 1
    return count


def _take(build: Builder, source: Node, dim: int, groups: tuple[int, int, int, int]) -> Node:
    """One entry of each group along ``dim``: ``(start, number of groups, size, which entry)``."""
    start, number, step, entry = groups
    shape = shape_of(source)
    value = source
    if (start, number * step) != (0, shape[dim]):
        cut = build.call(aten.slice.Tensor, value, dim, start, start + number * step)
        value = between_moves(build, source, cut)
    before, behind = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    groups_of_step = view_sizes([before, number, step, behind])
    grouped = build.call(aten.view_copy.default, value, groups_of_step)
    picked = then_move(build, source, grouped, aten.slice.Tensor, 2, entry, entry + 1)
    taken = view_sizes([*shape[:dim], number, *shape[dim + 1 :]])
    return then_move(build, source, picked, aten.view_copy.default, taken)


@graph_pass("expands", "concatenations", requires={"drop_broadcasts"})
def expands_to_cats(model: GraphModule) -> int:
    """Expanding becomes repeated concatenation: XNNPACK has no expand.

    Sizes that are not expanded may be dynamic.
    """
    count = 0
    for node in calls(model, EXPAND.targets):
        source = node.args[0]
        if not isinstance(source, Node) or not _is_expanded_inside(source, node):
            continue
        old: list[Any] = list(shape_of(source))
        new: list[Any] = list(shape_of(node))
        missing = len(new) - len(old)
        if missing < 0 or (missing and dynamic_sizes(old) > 1):
            continue
        old = [1] * missing + old
        dims = [d for d in range(len(new)) if not is_same_shape([old[d]], [new[d]])]
        if not dims or any(not isinstance(new[d], int) or new[d] > _MAX_REPEATS for d in dims):
            continue
        build = Builder(model, node)
        value = source
        if missing:
            viewed = build.call(aten.view.default, value, view_sizes(old))
            value = _kept(build, viewed, source)
        result = value
        for dim in reversed(dims):  # small pieces are copied while there are few of them
            result = build.call(aten.cat.default, [value] * int(new[dim]), dim)
            if dim != dims[0]:
                value = _kept(build, result, source)
        replace(node, result)
        count += 1
    return count


_MOST_JOINED = 5
"""Tensors that one concatenation of XNNPACK takes."""


@graph_pass(
    "concatenations of more than five",
    "concatenations of concatenations",
    requires={"expands_to_cats", "strided_slices_to_groups", "continue_cats"},
)
def cats_of_five(model: GraphModule) -> int:
    """Joins by fives, then those by fives: each number is copied once for each level.

    ExecuTorch (1.5.1) would join five, then four more to these and so on, which copies the first
    ones each time. What is repeated is joined once.
    """
    count = 0
    for node in calls(model, CAT.targets):
        tensors = list(cast("Sequence[Node]", node.args[0]))
        grids = {tensor.args[1:] if is_dequantize(tensor) else None for tensor in tensors}
        if len(tensors) <= _MOST_JOINED or len(grids) != 1:
            continue
        build, source = Builder(model, node, origin_of(node)), tensors[0]
        while len(tensors) > _MOST_JOINED:
            joined: dict[tuple[Node, ...], Node] = {}
            starts = range(0, len(tensors), _MOST_JOINED)
            parts = [tuple(tensors[start : start + _MOST_JOINED]) for start in starts]
            for part in parts:
                if part not in joined and len(part) > 1:
                    value = build.call(aten.cat.default, list(part), *node.args[1:])
                    joined[part] = _kept(build, value, source)
            tensors = [joined.get(part, part[0]) for part in parts]
        node.args = (tensors, *node.args[1:])
        count += 1
    return count


@graph_pass(
    "constants expanded to a dynamic size",
    "layers of zeros with the constant as bias",
    requires={"drop_broadcasts"},
)
def expands_to_biases(model: GraphModule) -> int:
    """A constant for each sample of a dynamic batch, such as a class token, is a bias.

    The layer reads one finite number of each sample, and multiplies it by 0.
    """
    count = 0
    for node in calls(model, _REPEATS):
        source, users = node.args[0], effective_users(node)
        if not is_constant(source) or not users or not reads_sizes(node):
            continue
        shape: list[Any] = list(shape_of(node))
        values = constant_of(model, cast(Node, source))
        dynamic = [d for d, size in enumerate(shape) if not isinstance(size, int)]
        if len(dynamic) != 1 or values.dtype != torch.float32:
            continue
        rest = [*shape[: dynamic[0]], *shape[dynamic[0] + 1 :]]
        before = math.prod(shape[: dynamic[0]])
        if before != 1 or math.prod(rest) != values.numel():
            continue
        first = next(other for other in model.graph.nodes if other in users)
        batch = _integers_of_size(first, shape[dynamic[0]])
        if batch is None:
            continue
        build = Builder(model, first, origin_of(node) or node.name)
        weight = add_constant(model, f"{node.name}_zeros", torch.zeros(values.numel(), 1), first)
        bias = add_constant(model, f"{node.name}_bias", values.flatten(), first)
        one = _one_of_each(build, *batch)
        layer = build.call(aten.linear.default, one, weight, bias)
        replace(node, build.call(aten.view_copy.default, layer, view_sizes(shape)))
        count += 1
    return count


_REPEATS = EXPAND.targets | {aten.repeat.default}


def _integers_of_size(before: Node, size: Any) -> tuple[Node, int] | None:
    """The nearest integers, dequantized, whose one dynamic size is a given one; and which dim."""
    node = before.prev
    while node.op != "root":
        meta = tensor_meta(node) if node.target is DEQUANTIZE_PER_TENSOR else None
        if meta is not None and not is_wide(node):
            dynamic = [d for d, given in enumerate(meta.shape) if not isinstance(given, int)]
            if len(dynamic) == 1 and is_same_shape([meta.shape[dynamic[0]]], [size]):
                return node, dynamic[0]
        node = node.prev
    return None


def _one_of_each(build: Builder, source: Node, dim: int) -> Node:
    """The first number at each place of a dim, as rows of one."""
    value = source
    for other, size in enumerate(shape_of(source)):
        if other != dim and size != 1:
            value = build.requantized(build.call(aten.slice.Tensor, value, other, 0, 1), source)
    return build.requantized(build.call(aten.view_copy.default, value, [-1, 1]), source)


def _is_expanded_inside(source: Node, node: Node) -> bool:
    """Whether an expand is of integers, or of floats between ops that compute."""
    if is_dequantize(source):
        return True
    meta = tensor_meta(source)
    is_float = meta is not None and meta.dtype == torch.float32
    return is_float and source.op == "call_function" and bool(effective_users(node))


def _kept(build: Builder, value: Node, source: Node) -> Node:
    """A move of ``source``, on the same integers if that is integers."""
    return build.requantized(value, source) if is_dequantize(source) else value
