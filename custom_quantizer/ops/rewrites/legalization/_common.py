"""What several of these rewrites need."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import shape_of, tensor_meta
from custom_quantizer.core.rewriting import Insertion

aten = torch.ops.aten

CATS = (aten.cat.default, aten.concat.default, aten.concatenate.default)
"""All names of a concatenation."""

MAX_PIECES = 64
"""Most slices that one op is cut into."""


def float_input(insert: Insertion) -> Node | None:
    """The float32 tensor a call works on."""
    source = insert.node.args[0]
    meta = tensor_meta(source) if isinstance(source, Node) else None
    return cast(Node, source) if meta is not None and meta.dtype == torch.float32 else None


def window_bounds(size: int, steps: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of the windows of adaptive pooling along one dim."""
    return [(i * size // steps, -(-(i + 1) * size // steps)) for i in range(steps)]


def adds_window(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether rounding the output size up adds a window; the last one must begin inside."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    return room % stride != 0 and (room // stride + 1) * stride < size + padding


def spread(insert: Insertion, value: Node, dim: int, factor: int) -> Node:
    """Repeat every entry of a dim."""
    if factor == 1:
        return value
    shape = list(shape_of(value))
    # As few dims as can be: runtimes take six or so.
    rest = math.prod(shape[dim + 1 :])
    lines = insert.reshape(value, [*shape[: dim + 1], 1, rest])
    spread = insert.call(aten.expand.default, lines, [*[-1] * (dim + 1), factor, -1])
    shape[dim] *= factor
    return insert.reshape(spread, shape)
