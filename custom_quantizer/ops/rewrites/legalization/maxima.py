"""Maxima: max pools over height and width. Minima are maxima of what is negated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    is_float32,
    reduced_dims,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.pool import max_pool_window
from custom_quantizer.ops.rewrites.legalization._common import (
    MAX_PIECES,
    adds_window,
    float_input,
    window_bounds,
)

aten = torch.ops.aten


def max_pool2d(insert: Insertion) -> Node | None:
    """``ceil_mode`` that adds no window is dropped: pools without have kernels.

    A pool that rounds up in one dim and skips in the other becomes one for each.
    """
    node, data = insert.node, float_input(insert)
    if data is None or not argument(node, 5, "ceil_mode", False):
        return None
    if not are_static(shape_of(data)[-2:]) or len(shape_of(data)) != 4:
        return None
    return _max_pool(insert, data, *max_pool_window(node), True)


def max_pool1d(insert: Insertion) -> Node | None:
    """Max pooling of images of height 1."""
    data = float_input(insert)
    if data is None or len(shape_of(data)) != 3:
        return None
    image = insert.call(aten.unsqueeze.default, data, 2)
    kernel, stride, padding, dilation = max_pool_window(insert.node, 1)
    window = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    pooled = _max_pool(insert, image, *window, _rounds_up(insert.node))
    return insert.call(aten.squeeze.dim, pooled, 2)


def max_pool3d(insert: Insertion) -> Node | None:
    """The largest of a box is the largest, over depth, of the largest of each of its images."""
    data = float_input(insert)
    if data is None or len(shape_of(data)) != 5:
        return None
    batch, channels, depth, height, width = shape_of(data)
    if batch == 1 and not are_static((channels,)):
        # As of a single sample, whose channels are a batch of images: they lie in memory alike.
        batch, channels = channels, 1
    if not are_static((channels, depth, height, width)):
        return None
    kernel, stride, padding, dilation = max_pool_window(insert.node, 3)
    rounds_up = _rounds_up(insert.node)
    images = insert.reshape(data, [batch, channels * depth, height, width])
    window = kernel[1:], stride[1:], padding[1:], dilation[1:]
    images = _max_pool(insert, images, *window, rounds_up)
    height, width = shape_of(images)[-2:]
    columns = insert.reshape(images, [batch, channels, depth, height * width])
    window = [kernel[0], 1], [stride[0], 1], [padding[0], 0], [dilation[0], 1]
    columns = _max_pool(insert, columns, *window, rounds_up)
    return insert.reshape(columns, [*shape_of(data)[:2], shape_of(columns)[2], height, width])


def _rounds_up(node: Node) -> bool:
    return bool(argument(node, 5, "ceil_mode", False))


def _max_pool(
    insert: Insertion,
    data: Node,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Node:
    if kernel == stride == [1, 1] and padding == [0, 0]:
        return data
    sizes = shape_of(data)[-2:]
    if ceil_mode and are_static(sizes):
        rounds = list(map(adds_window, sizes, kernel, stride, padding, dilation))
        skips = [s > k for s, k in zip(stride, kernel, strict=True)]
        if any(rounds) and any(skips) and rounds != skips:
            # Kernels neither round up nor skip rows; one of them at once can be made up for.
            for i in (0, 1):
                window = (_only(i, kernel, 1), _only(i, stride, 1), _only(i, padding, 0))
                data = _max_pool(insert, data, *window, _only(i, dilation, 1), rounds[i])
            return data
        ceil_mode = any(rounds)
    options = (ceil_mode,) if ceil_mode else ()
    return insert.call(aten.max_pool2d.default, data, kernel, stride, padding, dilation, *options)


def _only(along: int, numbers: list[int], rest: int) -> list[int]:
    """The number of one dim; the other stays as it is."""
    return [n if i == along else rest for i, n in enumerate(numbers)]


def without_indices(insert: Insertion) -> Node | None:
    """Maxima of adaptive max pooling, or extremes over a dim, if their indices are not used."""
    node = insert.node
    source, index = cast(Node, node.args[0]), node.args[1]
    if not isinstance(source, Node) or index != 0:
        return None
    if any(other.users for other in source.users if other is not node):
        return None
    if source.target in _ADAPTIVE:
        return _adaptive_max_pool(insert, source)
    if source.target is aten.max.dim:
        return _largest(insert, source, [cast(int, source.args[1])])
    if source.target is aten.min.dim:
        return _largest(insert, source, [cast(int, source.args[1])], negated=True)
    return None


def largest(insert: Insertion) -> Node | None:
    """The maximum or minimum over some dims, or over all."""
    given = argument(insert.node, 1, "dim", ())
    dims = [given] if isinstance(given, int) else list(given)
    negated = insert.node.target in (aten.amin.default, aten.min.default)
    return _largest(insert, insert.node, dims, negated=negated)


def _largest(
    insert: Insertion, node: Node, given: Sequence[int], *, negated: bool = False
) -> Node | None:
    """The maximum over dims is a max pool with a window as large as they are."""
    data = cast(Node, node.args[0])
    shape = shape_of(data)
    dims = reduced_dims(given, len(shape))
    outer = [d for d in range(len(shape)) if d not in dims]
    if not is_float32(data) or not dims:
        return None
    # A delegate takes no tensors without dims, so of a whole tensor one row is made.
    first, *rest = [shape[d] for d in outer] or [1]
    if not are_static([*rest, *(shape[d] for d in dims)]):
        return None
    if negated:
        data = insert.call(aten.neg.default, data)
    if len(shape) != 4 or dims != [2, 3]:
        # All that is kept but the first as channels, all that is not as one row.
        data = insert.permute(data, [*outer, *dims])
        row = math.prod(int(shape[d]) for d in dims)
        data = insert.reshape(data, [first, math.prod(rest), 1, row])
    window = [int(size) for size in shape_of(data)[2:]]
    pooled = _max_pool(insert, data, window, window, [0, 0], [1, 1], False)
    if negated:
        pooled = insert.call(aten.neg.default, pooled)
    if argument(node, 2, "keepdim", False):
        return insert.reshape(pooled, [1 if d in dims else shape[d] for d in range(len(shape))])
    return insert.reshape(pooled, [shape[d] for d in outer])


def _adaptive_max_pool(insert: Insertion, source: Node) -> Node | None:
    """Adaptive max pooling of a batch, or of a single image."""
    maxima, dims = _ADAPTIVE[source.target]
    value, wanted = cast(Node, source.args[0]), per_dim(source.args[1], dims)
    single = len(shape_of(value)) == dims + 1
    if not _is_batch(value, dims, wanted, single=single):
        return None
    batch = insert.call(aten.unsqueeze.default, value, 0) if single else value
    pooled = maxima(insert, batch, wanted)
    return insert.call(aten.squeeze.dim, pooled, 0) if single and pooled is not None else pooled


def _maxima_of_signals(insert: Insertion, value: Node, wanted: Sequence[int]) -> Node:
    """Those of images of height 1."""
    image = insert.call(aten.unsqueeze.default, value, 2)
    return insert.call(aten.squeeze.dim, _adaptive_maxima(insert, image, [1, *wanted]), 2)


def _maxima_of_volumes(insert: Insertion, value: Node, wanted: Sequence[int]) -> Node | None:
    """Those of each image, then over depth."""
    if not are_static(shape_of(value)[1:]):
        return None
    batch, channels, depth, height, width = shape_of(value)
    images = insert.reshape(value, [batch, channels * depth, height, width])
    images = _adaptive_maxima(insert, images, wanted[1:])
    columns = insert.reshape(images, [batch, channels, depth, wanted[1] * wanted[2]])
    columns = _adaptive_maxima(insert, columns, [wanted[0], wanted[1] * wanted[2]])
    return insert.reshape(columns, [batch, channels, *wanted])


def _is_batch(value: Node, dims: int, wanted: Sequence[int], *, single: bool) -> bool:
    """Whether adaptive pooling of ``value`` is a few max pools over dims of static size."""
    meta, shape = tensor_meta(value), shape_of(value)
    floating = meta is not None and meta.dtype == torch.float32
    static = len(shape) == dims + (1 if single else 2) and are_static(shape[-dims:])
    return floating and static and sum(wanted) <= MAX_PIECES


def _adaptive_maxima(insert: Insertion, value: Node, wanted: Sequence[int]) -> Node:
    """Maxima of the windows of adaptive pooling over the last two dims.

    Windows that are all equal are one max pool; others one for each row and each column.
    """
    for along, size in enumerate(shape_of(value)[-2:]):
        steps = int(wanted[along])
        if size % steps == 0:
            window = [1, 1]
            window[along] = size // steps
            value = _max_pool(insert, value, window, window, [0, 0], [1, 1], False)
            continue
        pieces = []
        for start, stop in window_bounds(int(size), steps):
            window = [1, 1]
            window[along] = stop - start
            piece = insert.slice(value, 2 + along, start, stop)
            pieces.append(_max_pool(insert, piece, window, window, [0, 0], [1, 1], False))
        value = insert.call(aten.cat.default, pieces, 2 + along)
    return value


_ADAPTIVE: Mapping[Any, tuple[Callable[..., Node | None], int]] = {
    aten.adaptive_max_pool1d.default: (_maxima_of_signals, 1),
    aten.adaptive_max_pool2d.default: (_adaptive_maxima, 2),
    aten.adaptive_max_pool3d.default: (_maxima_of_volumes, 3),
}
"""By overload, the maxima of a batch, and over how many dims."""
