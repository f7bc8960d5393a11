"""Patches of images: convolutions whose weights pick one value each."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import shape_of
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.rewrites.legalization._common import float_input, is_static

aten = torch.ops.aten

MAX_TAPS = 64
"""Largest patch: a convolution has that many outputs for each channel."""


def unfold(insert: Insertion) -> Node | None:
    """Columns of patches: a depthwise convolution with one output for each value of a patch."""
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 4 or not is_static(shape_of(data)[1:]):
        return None
    kernel, dilation, padding, stride = (per_dim(arg, 2) for arg in node.args[1:5])
    batch, channels = shape_of(data)[:2]
    if math.prod(kernel) > MAX_TAPS:
        return None
    weight = insert.constant("weight", _picks(channels, kernel))
    patches = insert.call(
        aten.conv2d.default, data, weight, None, stride, padding, dilation, channels
    )
    return insert.reshape(patches, [batch, channels * math.prod(kernel), shape_of(node)[2]])


def fold(insert: Insertion) -> Node | None:
    """Sums of overlapping patches: a depthwise transposed convolution."""
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 3 or not is_static(shape_of(data)[1:]):
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
    if taps > MAX_TAPS or math.prod(counts) != shape_of(data)[2]:
        return None
    channels = rows // taps
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


def _picks(channels: int, kernel: list[int]) -> Tensor:
    """Weights ``(channels * taps, 1, *kernel)``, each of which picks one value of a patch."""
    taps = math.prod(kernel)
    return torch.eye(taps).reshape(taps, 1, *kernel).repeat(channels, 1, 1, 1)
