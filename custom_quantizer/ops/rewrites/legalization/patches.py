"""Patches of images: moves where they lie side by side, else convolutions that pick one value."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import are_static, shape_of
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.rewrites.legalization._common import MAX_PIECES, float_input

aten = torch.ops.aten

MAX_TAPS = 64
"""Largest patch: a convolution has that many outputs for each channel."""


def unfold(insert: Insertion) -> Node | None:
    """Columns of patches: a depthwise convolution with one output for each value of a patch.

    Patches that lie side by side (those of a transformer) are moves, of whatever size, and large
    ones that overlap are slices, if there are few of them.
    """
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 4 or not are_static(shape_of(data)[1:]):
        return None
    kernel, dilation, padding, stride = (per_dim(arg, 2) for arg in node.args[1:5])
    batch, channels = shape_of(data)[:2]
    if _are_side_by_side(kernel, dilation, padding, stride):
        counts = [size // k for size, k in zip(shape_of(data)[2:], kernel, strict=True)]
        for dim, (count, k) in enumerate(zip(counts, kernel, strict=True), start=2):
            data = insert.slice(data, dim, 0, count * k)
        (rows, columns), (height, width) = counts, kernel
        parts = insert.reshape(data, [batch, channels, rows, height, columns, width])
        moved = insert.permute(parts, [0, 1, 3, 5, 2, 4])
        return insert.reshape(moved, [batch, channels * height * width, rows * columns])
    if math.prod(kernel) > MAX_TAPS:
        few = shape_of(node)[2] <= MAX_PIECES and all(step == 1 for step in dilation)
        return _cut_out(insert, data, kernel, padding, stride) if few else None
    weight = insert.constant("weight", _picks(channels, kernel))
    patches = insert.call(
        aten.conv2d.default, data, weight, None, stride, padding, dilation, channels
    )
    return insert.reshape(patches, [batch, channels * math.prod(kernel), shape_of(node)[2]])


def _cut_out(
    insert: Insertion, data: Node, kernel: list[int], padding: list[int], stride: list[int]
) -> Node:
    """Patches one by one."""
    if any(padding):
        sides = [padding[1], padding[1], padding[0], padding[0]]
        data = insert.call(aten.constant_pad_nd.default, data, sides)
    batch, channels, height, width = shape_of(data)
    patches = []
    for top in range(0, height - kernel[0] + 1, stride[0]):
        strip = insert.slice(data, 2, top, top + kernel[0])
        for left in range(0, width - kernel[1] + 1, stride[1]):
            patch = insert.slice(strip, 3, left, left + kernel[1])
            patches.append(insert.reshape(patch, [batch, 1, channels * math.prod(kernel)]))
    rows = insert.call(aten.cat.default, patches, 1) if len(patches) > 1 else patches[0]
    return insert.permute(rows, [0, 2, 1])


def fold(insert: Insertion) -> Node | None:
    """Sums of overlapping patches: a depthwise transposed convolution.

    Patches that lie side by side, and are all of the image, are moves.
    """
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 3 or not are_static(shape_of(data)[1:]):
        return None
    size, kernel, dilation, padding, stride = (per_dim(arg, 2) for arg in node.args[1:6])
    batch, rows = shape_of(data)[:2]
    taps = math.prod(kernel)
    room = [
        s + 2 * p - d * (k - 1) - 1
        for s, k, d, p in zip(size, kernel, dilation, padding, strict=True)
    ]
    counts = [r // step + 1 for r, step in zip(room, stride, strict=True)]
    rest = [r % step for r, step in zip(room, stride, strict=True)]
    if math.prod(counts) != shape_of(data)[2]:
        return None
    channels = rows // taps
    if _are_side_by_side(kernel, dilation, padding, stride) and not any(rest):
        parts = insert.reshape(data, [batch, channels, *kernel, *counts])
        return insert.reshape(insert.permute(parts, [0, 1, 4, 2, 5, 3]), [batch, channels, *size])
    if taps > MAX_TAPS:
        return None
    patches = insert.reshape(data, [batch, rows, *counts])
    weight = insert.constant("weight", _picks(channels, kernel))
    return insert.call(
        aten.conv_transpose2d.input,
        patches,
        weight,
        None,
        stride,
        padding,
        rest,
        channels,
        dilation,
    )


def _are_side_by_side(
    kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> bool:
    return stride == kernel and not any(padding) and all(step == 1 for step in dilation)


def _picks(channels: int, kernel: list[int]) -> Tensor:
    """Weights ``(channels * taps, 1, *kernel)``, each of which picks one value of a patch."""
    taps = math.prod(kernel)
    return torch.eye(taps).reshape(taps, 1, *kernel).repeat(channels, 1, 1, 1)
