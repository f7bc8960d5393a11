"""Convolutions over three dims, or with ends cut off, and batch norms."""

from __future__ import annotations

import math
import sys
from typing import cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    effective_users,
    is_constant,
    reads_sizes,
    shape_of,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim, symmetric_padding
from custom_quantizer.ops.rewrites.batch_norms import layer_before, reads_constants
from custom_quantizer.ops.rewrites.legalization._common import float_input

aten = torch.ops.aten


def batch_norm(insert: Insertion) -> Node | None:
    """Norms of rows and of volumes are norms of images (``ops/rewrites/batch_norms.py``).

    Not of rows that a layer makes: the norm becomes part of it as it is.
    """
    node, data = insert.node, float_input(insert)
    if data is None:
        return None
    shape = shape_of(data)
    if len(shape) not in (2, 5) or not are_static(shape[1:]) or not reads_constants(node):
        return None
    if layer_before(node) is not None:
        return None
    image = [1, 1] if len(shape) == 2 else [math.prod(shape[2:-1]), shape[-1]]
    images = insert.reshape(data, [*shape[:2], *image])
    normed = insert.call(aten.batch_norm.default, images, *node.args[1:], **node.kwargs)
    return insert.reshape(normed, shape)


def cut_short(insert: Insertion) -> Node | None:
    """A convolution of which the ends of a dynamic dim are cut off pads less (causal networks).

    ``conv(x, padding=p)[..., : -p]``. Runtimes may have no slices that count from such an end.
    """
    node, users = insert.node, effective_users(insert.node)
    data, cut = float_input(insert), users[0] if len(users) == 1 else None
    if data is None or cut is None or cut.target is not aten.slice.Tensor or reads_sizes(cut):
        return None
    if overwritten_by(cut) is not None or int(argument(cut, 4, "step", 1)) != 1:
        return None
    shape = shape_of(node)
    dim = int(argument(cut, 1, "dim", 0)) % len(shape)
    place, window = dim - 2, len(shape) - 2
    if place < 0 or isinstance(shape[dim], int):
        return None
    start, end = argument(cut, 2, "start") or 0, argument(cut, 3, "end")
    end = 0 if end is None or end == sys.maxsize else end
    stride, padding, dilation = (
        per_dim(argument(node, i, name, default), window)
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    pad = padding[place]
    if stride[place] != 1 or not (0 <= start <= pad and -pad <= end <= 0):
        return None
    padding[place] = 0
    amounts = [*[0] * (2 * (window - 1 - place)), pad - start, pad + end]
    padded = insert.call(aten.constant_pad_nd.default, data, amounts) if any(amounts) else data
    bias, groups = argument(node, 2, "bias"), argument(node, 6, "groups", 1)
    layer = node.args[1], bias, stride, padding, dilation, groups
    return _in_place_of(cut, node, insert.call(node.target, padded, *layer))


def _volumes(insert: Insertion) -> Node | None:
    """What a layer whose weight and bias are constants computes on, if that is float volumes."""
    node, data = insert.node, float_input(insert)
    if data is None or len(shape_of(data)) != 5 or not is_constant(node.args[1]):
        return None
    bias = argument(node, 2, "bias")
    return data if bias is None or is_constant(bias) else None


def conv3d(insert: Insertion) -> Node | None:
    """A convolution over depth, height and width as one over height and width.

    Neighbouring frames become channels: output frame ``d`` is a convolution of the frames
    ``d * stride + k * dilation`` for all ``k``, one behind the other. All products of one output
    meet in one accumulator, so in integers it is the same convolution. A batch norm behind it comes
    along, so that it can be fused.
    """
    node, data = insert.node, _volumes(insert)
    if data is None:
        return None
    weight, bias = cast(Node, node.args[1]), argument(node, 2, "bias")
    batch, channels, depth, *_ = shape_of(data)
    outputs, _, *kernel = shape_of(weight)
    stride = per_dim(argument(node, 3, "stride", 1), 3)
    dilation = per_dim(argument(node, 5, "dilation", 1), 3)
    groups = int(argument(node, 6, "groups", 1))
    if not are_static((channels, depth)):
        return None
    before, after = symmetric_padding(node)
    taps = kernel[0]
    frames = _padded(insert, insert.permute(data, [0, 2, 1, 3, 4]), 1, before[0], after[0])
    padded = depth + before[0] + after[0]
    count = (padded - dilation[0] * (taps - 1) - 1) // stride[0] + 1
    pieces = [_frames(insert, frames, k * dilation[0], count, stride[0]) for k in range(taps)]
    images = _images(insert, pieces, groups)
    # (out, in / groups, depth, ...) -> (out, depth * in / groups, ...), tap by tap.
    flat = insert.permute(weight, [0, 2, 1, 3, 4])
    flat = insert.reshape(flat, [outputs, -1, *kernel[1:]])
    even = before[1:] == after[1:]
    result = insert.call(
        aten.conv2d.default if even else aten.conv2d.padding,
        images,
        insert.settled(flat, "weight"),
        bias,
        stride[1:],
        before[1:] if even else "same",
        dilation[1:],
        groups,
    )
    result, last = _normed(insert, result)
    out = shape_of(result)
    result = insert.reshape(result, [batch, count, *out[1:]])
    return _in_place_of(last, node, insert.permute(result, [0, 2, 1, 3, 4]))


def conv_transpose3d(insert: Insertion) -> Node | None:
    """A transposed convolution over depth, height and width as one over height and width.

    Output frames ``q * stride + r`` add up the input frames ``q - j``, each times the tap
    ``j * stride + r`` of the depth. So the frames of all ``j`` become channels, one behind the
    other, and each output channel becomes ``stride`` ones, one for each ``r``. As for ``conv3d``,
    all products of one output meet in one accumulator; where a kernel has no such tap, its weight
    is 0.
    """
    node, data = insert.node, _volumes(insert)
    if data is None:
        return None
    weight, bias = cast(Node, node.args[1]), argument(node, 2, "bias")
    batch, channels, depth, height, width = shape_of(data)
    if not are_static((channels, depth, height, width)):
        return None
    inputs, outputs, length, *kernel = shape_of(weight)
    stride, padding, spare = (
        per_dim(argument(node, place, name, default), 3)
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    groups = int(argument(node, 6, "groups", 1))
    dilation = per_dim(argument(node, 7, "dilation", 1), 3)
    step, skipped = stride[0], padding[0]
    reach = dilation[0] * (length - 1) + 1
    taps = -(-reach // step)
    count = (depth - 1) * step - 2 * skipped + reach + spare[0]
    first, end = skipped // step, -(-(skipped + count) // step)
    before, after = max(0, taps - 1 - first), max(0, end - depth)
    frames = _padded(insert, insert.permute(data, [0, 2, 1, 3, 4]), 1, before, after)
    starts = [before + first - j for j in range(taps)]
    pieces = [_frames(insert, frames, start, end - first, 1) for start in starts]
    images = _images(insert, pieces, groups)
    # Zeros between the taps, and behind them up to a multiple of the stride.
    spread = insert.reshape(weight, [inputs, outputs, length, 1, *kernel])
    spread = _padded(insert, spread, 3, 0, dilation[0] - 1)
    spread = insert.reshape(spread, [inputs, outputs, length * dilation[0], *kernel])
    spread = _padded(insert, spread, 2, 0, taps * step - length * dilation[0])
    # (in, out / groups, depth, ...) -> (group, in / groups, out / groups, tap j, r, ...)
    spread = insert.reshape(spread, [groups, inputs // groups, outputs, taps, step, *kernel])
    flat = insert.permute(spread, [0, 3, 1, 2, 4, 5, 6])
    flat = insert.reshape(flat, [taps * channels, outputs * step, *kernel])
    result = insert.call(
        aten.conv_transpose2d.input,
        images,
        insert.settled(flat, "weight"),
        bias if bias is None else _repeated(insert, bias, step, "bias"),
        stride[1:],
        padding[1:],
        spare[1:],
        groups,
        dilation[1:],
    )
    result, last = _normed(insert, result, step)
    pixels = [int(size) for size in shape_of(result)[2:]]
    result = insert.reshape(result, [batch, end - first, groups * outputs, step, math.prod(pixels)])
    result = insert.permute(result, [0, 2, 1, 3, 4])
    result = insert.reshape(result, [batch, groups * outputs, (end - first) * step, *pixels])
    begin = skipped - first * step
    if (begin, count) != (0, (end - first) * step):
        result = insert.slice(result, 2, begin, begin + count)
    return _in_place_of(last, node, result)


def _normed(insert: Insertion, result: Node, step: int = 1) -> tuple[Node, Node]:
    """``result`` with the batch norm behind the layer, if there is one, and what it stands for.

    Args:
        insert: at the layer.
        result: images whose channels are those of the layer.
        step: each channel stands there so often. Statistics of a batch are those of all of them,
            so that in training such a norm stays apart.
    """
    node = insert.node
    users = effective_users(node)
    if len(users) != 1 or users[0].target is not aten.batch_norm.default:
        return result, node
    norm = users[0]
    if overwritten_by(norm) is not None or not reads_constants(norm):
        return result, node
    reads = cast("list[Node | None]", norm.args[1:5])
    if any(read is not None and read.op != "get_attr" for read in reads):
        return result, node
    if insert.training and step > 1:
        return result, node
    names = ("gamma", "beta", "mean", "var")
    repeated = [
        None if read is None else _repeated(insert, insert.again(read), step, name)
        for read, name in zip(reads, names, strict=True)
    ]
    rest = norm.args[5:]
    return insert.call(aten.batch_norm.default, result, *repeated, *rest, **norm.kwargs), norm


def _repeated(insert: Insertion, values: Node, step: int, name: str) -> Node:
    """Each of the values ``step`` times, one behind the other."""
    if step == 1:
        return values
    return insert.settled(insert.call(aten.repeat_interleave.self_int, values, step), name)


def _in_place_of(last: Node, node: Node, result: Node) -> Node:
    """``result`` in the place of ``last``, which came along with the call ``node``."""
    if last is not node:
        last.replace_all_uses_with(result)
    return result


def _padded(insert: Insertion, data: Node, dim: int, before: int, after: int) -> Node:
    """``data`` with so many zeros more along a dim."""
    if not before and not after:
        return data
    behind = len(shape_of(data)) - 1 - dim
    return insert.call(aten.constant_pad_nd.default, data, [*[0] * (2 * behind), before, after])


def _frames(insert: Insertion, frames: Node, start: int, count: int, step: int) -> Node:
    """``count`` frames along dim 1, from ``start``, ``step`` apart."""
    if step == 1:
        return insert.slice(frames, 1, start, start + count)
    return insert.call(aten.slice.Tensor, frames, 1, start, start + (count - 1) * step + 1, step)


def _images(insert: Insertion, pieces: list[Node], groups: int) -> Node:
    """Frames of all taps as images, whose channels are those of all taps, group by group.

    Args:
        insert: at the layer.
        pieces: the frames that each tap sees, ``(batch, frames, channels, height, width)``.
        groups: of the layer.
    """
    channels, *pixels = shape_of(pieces[0])[2:]
    taps = len(pieces)
    if groups > 1 and taps > 1:
        apart = [-1, groups, channels // groups, *pixels]
        pieces = [insert.reshape(piece, apart) for piece in pieces]
    joined = insert.call(aten.cat.default, pieces, 2) if taps > 1 else pieces[0]
    return insert.reshape(joined, [-1, taps * channels, *pixels])
