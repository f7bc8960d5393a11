"""Averages and sums: linear layers and convolutions with constant weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, dynamic_sizes, reduced_dims, shape_of
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.rewrites.legalization._common import (
    adds_window,
    float_input,
    window_bounds,
)
from custom_quantizer.ops.rewrites.legalization.branches import added

aten = torch.ops.aten

MAX_WEIGHTS = 1 << 22
"""Most weights that a linear layer standing for an average may have: 4 MB as int8."""

CONVOLVED_TAPS = 9
"""Largest window for which a depthwise convolution is faster than padding and pooling in float."""


def mean(insert: Insertion) -> Node | None:
    """A mean is a linear layer, unless it averages images of a fixed batch, which has integers.

    A mean of a dynamic batch of images is a layer too: the kernel of a backend may be wrong where
    the batch grows; the layer is right for all of them.
    """
    return _reduce(insert, average=True)


def total(insert: Insertion) -> Node | None:
    """A sum is a linear layer with weights 1, or additions of a few branches."""
    return _reduce(insert, average=False)


def _reduce(insert: Insertion, *, average: bool) -> Node | None:
    node, data = insert.node, float_input(insert)
    if data is None or argument(node, 3, "dtype") is not None:
        return None
    shape = shape_of(data)
    dims = reduced_dims(argument(node, 1, "dim"), len(shape))
    keepdim = bool(argument(node, 2, "keepdim", False))
    outer = [d for d in range(len(shape)) if d not in dims]
    spatial = len(shape) == 4 and dims == [2, 3]
    if not shape:
        return data  # of a number; kernels take no dim of one
    if not are_static([shape[d] for d in dims]) or 0 in [shape[d] for d in dims]:
        return None
    if average and spatial and are_static([shape[d] for d in outer]):
        return None
    count = math.prod(shape[d] for d in dims)
    value = 1.0 / count if average else 1.0
    total = added(insert, data, dims[0]) if len(dims) == 1 else None
    if total is not None:
        total = insert.call(aten.mul.Tensor, total, value) if average else total
        return insert.call(aten.unsqueeze.default, total, dims[0]) if keepdim else total
    if len(shape) == 4 and dims == [1]:
        weight = insert.constant("weight", torch.full((1, count, 1, 1), value))
        image = insert.call(aten.conv2d.default, data, weight)
        return image if keepdim else insert.call(aten.squeeze.dim, image, 1)
    if dynamic_sizes(shape[d] for d in outer) > 1:
        return None
    averaged = _weighted(insert, data, dims, torch.full((1, count), value))
    if averaged is None:
        return None
    kept = [1 if d in dims else shape[d] for d in range(len(shape))]
    return insert.reshape(averaged, kept if keepdim else [shape[d] for d in outer])


def _weighted(insert: Insertion, data: Node, dims: list[int], matrix: Tensor) -> Node | None:
    """``matrix @ data`` over some dims, flattened: ``(*outer dims, rows of the matrix)``."""
    if matrix.numel() > MAX_WEIGHTS:
        return None
    shape = shape_of(data)
    outer = [d for d in range(len(shape)) if d not in dims]
    data = insert.permute(data, [*outer, *dims])
    # A delegate takes no tensors without dims, so of a whole tensor one row is made.
    rows = [shape[d] for d in outer] or [1]
    data = insert.reshape(data, [*rows, matrix.shape[1]])
    return insert.call(aten.linear.default, data, insert.constant("weight", matrix))


def norm(insert: Insertion) -> Node | None:
    """A Euclidean norm over any dims is one over the last, of which they are moved to the end."""
    node, data = insert.node, float_input(insert)
    if data is None or argument(node, 1, "ord", 2) != 2 or argument(node, 4, "dtype") is not None:
        return None
    shape = shape_of(data)
    dims = reduced_dims(argument(node, 2, "dim"), len(shape))
    outer = [d for d in range(len(shape)) if d not in dims]
    if (outer and dims == [len(shape) - 1]) or not are_static([shape[d] for d in dims]):
        return None
    if dynamic_sizes(shape[d] for d in outer) > 1:
        return None
    rows = insert.permute(data, [*outer, *dims])
    count = math.prod(shape[d] for d in dims)
    rows = insert.reshape(rows, [*([shape[d] for d in outer] or [1]), count])
    norms = insert.call(aten.linalg_vector_norm.default, rows, 2, [-1], True)
    return insert.reshape(norms, shape_of(node))


def adaptive_avg_pool(insert: Insertion) -> Node | None:
    """Windows of different sizes are the rows of a linear layer over the image.

    Equal windows are pooled as usual, and one window of a static batch is a mean.
    """
    data = float_input(insert)
    if data is None:
        return None
    shape = shape_of(data)
    wanted = cast("Sequence[int | None]", insert.node.args[1])
    rank = len(wanted)
    sizes = shape[-rank:]
    if not are_static(sizes) or len(shape) != rank + 2 or 0 in wanted:
        return None
    out = [int(size) if w is None else int(w) for size, w in zip(sizes, wanted, strict=True)]
    # What pools in two dims is left to the entry of the registry.
    equal = all(size % w == 0 for size, w in zip(sizes, out, strict=True))
    if rank == 2 and equal and (math.prod(out) > 1 or are_static(shape)):
        return None
    if out == list(sizes):
        return data
    matrix = torch.ones(1, 1)
    for size, steps in zip(sizes, out, strict=True):
        matrix = torch.kron(matrix, _windows(int(size), steps))
    if math.prod(out) * math.prod(sizes) > MAX_WEIGHTS:
        return None
    total = _weighted(insert, data, list(range(2, rank + 2)), matrix)
    return None if total is None else insert.reshape(total, [*shape[:2], *out])


def _windows(size: int, steps: int) -> Tensor:
    """Averages along one dim as a matrix, float32 ``(steps, size)``."""
    matrix = torch.zeros(steps, size)
    for i, (start, stop) in enumerate(window_bounds(size, steps)):
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def avg_pool2d(insert: Insertion) -> Node | None:
    """Counted padding and a divisor of one's own: a depthwise convolution.

    Pooling averages what is inside of the image only, and with the size of the window. Last windows
    that ``ceil_mode`` adds are smaller, and pooled apart.
    """
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 4:
        return None
    kernel = per_dim(node.args[1], 2)
    stride = per_dim(argument(node, 2, "stride") or kernel, 2)
    padding = per_dim(argument(node, 3, "padding", 0), 2)
    ceil_mode = bool(argument(node, 4, "ceil_mode", False))
    counted = bool(argument(node, 5, "count_include_pad", True))
    divisor = argument(node, 6, "divisor_override")
    shape: tuple[Any, ...] = shape_of(data)
    channels, sizes = shape[1], shape[2:]
    if ceil_mode and not are_static(sizes):
        return None
    added_last = list(map(adds_window, sizes, kernel, stride, padding, [1, 1]))
    if ceil_mode and any(added_last):
        if divisor is not None or (any(padding) and not counted):
            return None
        if any(padding):  # counted as zeros, but not what lies behind it
            sides = [padding[1], padding[1], padding[0], padding[0]]
            data = insert.call(aten.constant_pad_nd.default, data, sides)
        return _pooled_apart(insert, data, kernel, stride, added_last)
    taps = math.prod(kernel)
    if divisor is None and not (counted and any(padding) and taps <= CONVOLVED_TAPS):
        if not ceil_mode:
            return None
        return insert.call(aten.avg_pool2d.default, data, kernel, stride, padding, False, counted)
    if not isinstance(channels, int):
        return None
    value = 1.0 / (taps if divisor is None else int(divisor))
    weight = insert.constant("weight", torch.full((channels, 1, *kernel), value))
    return insert.call(aten.conv2d.default, data, weight, None, stride, padding, [1, 1], channels)


def _pooled_apart(
    insert: Insertion, data: Node, kernel: list[int], stride: list[int], added_last: list[bool]
) -> Node:
    """Average an image of which the last windows of some dims are cut off: they divide by less."""
    sizes: list[Any] = list(shape_of(data)[2:])
    below, beside = map(_pieces, sizes, kernel, stride, added_last)
    rows = []
    for top, height, down in below:
        row = []
        strip = insert.slice(data, 2, top, sizes[0]) if top else data
        for left, width, right in beside:
            part = insert.slice(strip, 3, left, sizes[1]) if left else strip
            row.append(insert.call(aten.avg_pool2d.default, part, [height, width], [down, right]))
        rows.append(insert.call(aten.cat.default, row, 3) if len(row) > 1 else row[0])
    return insert.call(aten.cat.default, rows, 2) if len(rows) > 1 else rows[0]


def _pieces(size: int, kernel: int, stride: int, added_last: bool) -> list[tuple[int, int, int]]:
    """``(start, kernel, stride)`` of the whole windows along a dim, then of the one cut off."""
    whole = (size - kernel) // stride + 1 if size >= kernel else 0
    pieces = [(0, kernel, stride)] if whole else []
    start = whole * stride
    return [*pieces, (start, size - start, size - start)] if added_last else pieces


def avg_pool3d(insert: Insertion) -> Node | None:
    """The average of a box is the average, over depth, of those of each of its images.

    That holds for padding and for windows that are cut off, too: how many values count in a box is
    the product of how many count along each dim.
    """
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 5 or not are_static(shape_of(data)[1:]):
        return None
    batch, channels, depth, height, width = shape_of(data)
    kernel = per_dim(node.args[1], 3)
    stride = per_dim(argument(node, 2, "stride") or kernel, 3)
    padding = per_dim(argument(node, 3, "padding", 0), 3)
    rest = (argument(node, 4, "ceil_mode", False), argument(node, 5, "count_include_pad", True))
    divisor = argument(node, 6, "divisor_override")
    # Sums of images, if the divisor is one of its own.
    divisors = ((), ()) if divisor is None else ((1,), (divisor,))

    def pool(images: Node, window: list[list[int]], own: tuple[Any, ...]) -> Node:
        return insert.formed(avg_pool2d, aten.avg_pool2d.default, images, *window, *rest, *own)

    images = insert.reshape(data, [batch, channels * depth, height, width])
    images = pool(images, [kernel[1:], stride[1:], padding[1:]], divisors[0])
    height, width = shape_of(images)[-2:]
    columns = insert.reshape(images, [batch, channels, depth, height * width])
    columns = pool(columns, [[kernel[0], 1], [stride[0], 1], [padding[0], 0]], divisors[1])
    return insert.reshape(columns, [batch, channels, shape_of(columns)[2], height, width])


def avg_pool1d(insert: Insertion) -> Node | None:
    """Average pooling of images of height 1."""
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 3:
        return None
    (kernel,) = per_dim(node.args[1], 1)
    (stride,) = per_dim(argument(node, 2, "stride") or kernel, 1)
    (padding,) = per_dim(argument(node, 3, "padding", 0), 1)
    rest = (argument(node, 4, "ceil_mode", False), argument(node, 5, "count_include_pad", True))
    image = insert.call(aten.unsqueeze.default, data, 2)
    window = [1, kernel], [1, stride], [0, padding]
    pooled = insert.formed(avg_pool2d, aten.avg_pool2d.default, image, *window, *rest)
    return insert.call(aten.squeeze.dim, pooled, 2)
