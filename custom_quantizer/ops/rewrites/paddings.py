"""Pads of a constant: slices, the own padding of a max pool, and what is added to patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, is_same_shape, reads_sizes, shape_of
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.pool import max_pool_window

__all__ = ["PADDINGS", "constant_pad"]

aten = torch.ops.aten

_TO_THE_END = (1 << 63) - 1

_NEVER_LARGEST = -1e4
"""A pad by this or less is taken for minus infinity in front of a max pool."""


def constant_pad(node: Node) -> tuple[list[Any], float] | None:
    """Amounts, last dim first, and value of a pad by a constant; ``None`` for any other node."""
    if node.target is aten.pad.default:
        if argument(node, 2, "mode", "constant") != "constant":
            return None
        value = argument(node, 3, "value")
    elif node.target is aten.constant_pad_nd.default:
        value = argument(node, 2, "value", 0)
    else:
        return None
    return list(cast("Sequence[Any]", node.args[1])), 0.0 if value is None else value


def _pad(insert: Insertion) -> Node | None:
    """A pad by nothing is its input; a constant pad by less than nothing is a slice."""
    node = insert.node
    data, amounts = cast(Node, node.args[0]), list(cast("Sequence[int]", node.args[1]))
    if not any(amounts):
        return data
    constant = constant_pad(node)
    if constant is None or all(p >= 0 for p in amounts):
        return None
    rank = len(shape_of(data))
    for position in range(0, len(amounts), 2):
        before, after = (min(p, 0) for p in amounts[position : position + 2])
        if before or after:
            dim = rank - 1 - position // 2
            stop = after if after else _TO_THE_END
            data = insert.call(aten.slice.Tensor, data, dim, -before, stop)
    kept = [max(p, 0) for p in amounts]
    if not any(kept):
        return data
    return insert.call(aten.constant_pad_nd.default, data, kept, constant[1])


def _max_pool(dims: int) -> Rewrite:
    """A max pool of what was padded with minus infinity: TensorFlow's "same" padding.

    No integer stands for minus infinity. The own padding of a max pool does, by the same amount on
    both sides; where they differ, ``ceil_mode`` may make up for it. What neither says is a pad that
    repeats the outermost values: each window that reaches into it holds the value it repeats.
    """

    def rewrite(insert: Insertion) -> Node | None:
        node = insert.node
        pad = cast(Node, node.args[0])
        constant = constant_pad(pad)
        if constant is None or constant[1] > _NEVER_LARGEST:
            return None
        amounts, spatial = constant[0], 2 * dims
        if any(amounts[spatial:]) or not all(isinstance(p, int) and p >= 0 for p in amounts):
            return None
        amounts = (amounts + [0] * spatial)[:spatial]
        before, after = amounts[::2][::-1], amounts[1::2][::-1]
        data = cast(Node, pad.args[0])
        kernel, stride, padding, dilation = max_pool_window(node, dims)
        own = [b + p for b, p in zip(before, padding, strict=True)]
        sizes = shape_of(data)[-dims:]
        if all(map(_can_pad, own, sizes, kernel, dilation)):
            for ceil_mode in (False, True):
                options = (kernel, stride, own, dilation, ceil_mode)
                pooled = insert.call(node.target, data, *options)
                # As many windows, which begin where they did: more of them may lie outside.
                if is_same_shape(shape_of(pooled), shape_of(node)):
                    return pooled
        inside = all(
            max(b, a) + p < k for b, a, p, k in zip(before, after, padding, kernel, strict=True)
        )
        if not inside or any(d != 1 for d in dilation) or argument(node, 5, "ceil_mode", False):
            return None
        repeated = insert.call(aten.pad.default, data, amounts, "replicate")
        return insert.call(node.target, repeated, *node.args[1:], **node.kwargs)

    return rewrite


def _can_pad(padding: int, size: Any, kernel: int, dilation: int) -> bool:
    """Whether a pool can pad so much: half a kernel at most, and one window has to fit."""
    fits = not isinstance(size, int) or size + 2 * padding > dilation * (kernel - 1)
    return 2 * padding <= kernel and fits


def _patches(insert: Insertion) -> Node | None:
    """Patches of what was padded with a number: patches of zeros around it, and numbers added.

    Patches are sums of products with one and zeros, and minus infinity times zero is no number.
    """
    node = insert.node
    pad = cast(Node, node.args[0])
    constant = constant_pad(pad)
    if constant is None or not constant[1] or len(shape_of(pad)) != 4 or reads_sizes(pad):
        return None
    amounts, data = constant[0], cast(Node, pad.args[0])
    channels, *sizes = shape_of(data)[1:]
    count = shape_of(node)[2]
    if any(amounts[4:]) or not are_static((channels, *sizes, count)):
        return None
    kernel, *others = (tuple(per_dim(arg, 2)) for arg in node.args[1:5])
    around = F.pad(torch.zeros(1, 1, *sizes), amounts, value=constant[1])
    numbers = F.unfold(around, kernel, *others)
    padded = insert.call(aten.constant_pad_nd.default, data, amounts, 0)
    patches = insert.call(node.target, padded, *node.args[1:])
    split = [-1, channels, math.prod(kernel), count]
    parts = patches if channels == 1 else insert.reshape(patches, split)
    added = insert.constant("around", numbers if channels == 1 else numbers[:, None])
    parts = insert.call(aten.add.Tensor, parts, added)
    return parts if channels == 1 else insert.reshape(parts, [-1, *shape_of(node)[1:]])


_FORMS: dict[Any, Rewrite] = {
    aten.im2col.default: _patches,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
}

PADDINGS: Mapping[Any, Rewrite] = MappingProxyType(_FORMS)
"""By overload, what makes the form without the pad."""
