"""Resized images, signals and volumes: bilinear resizes, and layers with constant weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, shape_of
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.resize import steps_otherwise
from custom_quantizer.ops.rewrites.legalization._common import float_input
from custom_quantizer.ops.rewrites.legalization.sums import MAX_WEIGHTS

aten = torch.ops.aten

_PLAIN: dict[Any, Any] = {
    aten.upsample_linear1d.vec: aten.upsample_linear1d.default,
    aten.upsample_bilinear2d.vec: aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.vec: aten.upsample_trilinear3d.default,
    aten.upsample_bicubic2d.vec: aten.upsample_bicubic2d.default,
    aten._upsample_bilinear2d_aa.vec: aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.vec: aten._upsample_bicubic2d_aa.default,
}
"""The same ops, told the size of their output in any case."""

_ANTIALIASED = frozenset(
    {aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec},
)
"""PyTorch (2.15) interpolates images of width 1 wrongly with them: these stay as they are."""


def resize(insert: Insertion) -> Node | None:
    """A signal is an image of height 1, and a bilinear resize stays; others are layers.

    One that steps by other than the ratio of its sizes is a layer, too: kernels know sizes only.
    """
    node, data = insert.node, float_input(insert)
    if data is None:
        return None
    after = shape_of(node)
    if not are_static((*shape_of(data)[2:], *after[2:])):
        return None
    if node.target is aten.upsample_linear1d.vec and _steps_by_sizes(node):
        image = insert.call(aten.unsqueeze.default, data, 2)
        align_corners = bool(argument(node, 2, "align_corners"))
        sizes = [1, int(after[2])]
        resized = insert.call(aten.upsample_bilinear2d.vec, image, sizes, align_corners, None)
        return insert.call(aten.squeeze.dim, resized, 2)
    if node.target is aten.upsample_bilinear2d.vec and not steps_otherwise(node):
        return None
    return by_layers(insert)


def by_layers(insert: Insertion) -> Node | None:
    """Interpolate dim by dim: each is a linear layer, whose weights the op itself tells."""
    node, data = insert.node, float_input(insert)
    if data is None:
        return None
    sizes = (*shape_of(data)[2:], *shape_of(node)[2:])
    if not are_static(sizes) or (node.target in _ANTIALIASED and 1 in sizes):
        return None
    rank = len(shape_of(data))
    matrices = {dim: _matrix(node, dim) for dim in range(2, rank)}
    if any(matrix.numel() > MAX_WEIGHTS for matrix in matrices.values()):
        return None
    value = data
    for dim, matrix in matrices.items():
        rows, columns = matrix.shape
        if rows == columns and torch.equal(matrix, torch.eye(rows)):
            continue
        order = list(range(rank))
        order[dim], order[-1] = order[-1], order[dim]
        weight = insert.constant(f"weight_{dim}", matrix)
        value = insert.permute(value, order)
        value = insert.call(aten.linear.default, value, weight)
        value = insert.permute(value, order)
    return value


def _steps_by_sizes(node: Node) -> bool:
    """Whether a resized signal steps by the ratio of its sizes."""
    factors: Any = argument(node, 3, "scale_factors", None)
    if factors is None or bool(argument(node, 2, "align_corners")):
        return True
    before, after = (shape_of(tensor)[2] for tensor in (node.all_input_nodes[0], node))
    return bool(before * factors[0] == after)


def _matrix(node: Node, dim: int) -> Tensor:
    """How the op interpolates along a dim, float32 ``(out, in)``: what it makes of unit vectors.

    Of an image they are its lines, and not its channels: see :data:`_ANTIALIASED`.
    """
    rank = len(shape_of(node))
    size, out = int(shape_of(node.all_input_nodes[0])[dim]), int(shape_of(node)[dim])
    factors: Any = argument(node, 3, "scale_factors", None)
    sizes: list[int] = [1] * (rank - 2)
    scales: list[float | None] = [None] * (rank - 2)
    shape, across = [1] * rank, 5 - dim if rank == 4 else 1
    if rank == 4:
        sizes[across - 2] = size
    sizes[dim - 2], scales[dim - 2] = out, None if factors is None else float(factors[dim - 2])
    shape[across], shape[dim] = size, size
    align_corners = bool(argument(node, 2, "align_corners"))
    vectors = torch.eye(size).reshape(shape)
    made: Tensor = _PLAIN[node.target](vectors, sizes, align_corners, *scales)
    matrix = made.movedim(across, -1).reshape(out, size)
    return matrix.contiguous()


FORMS = dict.fromkeys(_PLAIN, resize)
"""By overload, what makes its form."""
