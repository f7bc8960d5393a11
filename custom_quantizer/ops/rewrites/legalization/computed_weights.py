"""Layers whose weight depends on an input: products of two tensors that are computed.

Modulated and conditional convolutions, the correlation of two images (trackers), networks that
make the weights of others. Runtimes have kernels for constant weights, and for products; the rows
of a convolution's weight are multiplied by patches, which are moves or depthwise convolutions
(:mod:`custom_quantizer.ops.rewrites.legalization.patches`).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, shape_of
from custom_quantizer.core.memory import reached
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.gemm import per_dim, symmetric_padding
from custom_quantizer.ops.rewrites.legalization import patches
from custom_quantizer.ops.rewrites.legalization._common import float_input
from custom_quantizer.ops.rewrites.products import product

aten = torch.ops.aten


def with_weight_of_inputs(other: Rewrite = lambda _: None) -> Rewrite:
    """A convolution over one or two dims whose weight depends on an input, else ``other``."""

    def rewrite(insert: Insertion) -> Node | None:
        data, weight = float_input(insert), insert.node.args[1]
        if data is None or not isinstance(weight, Node) or not _depends_on_input(weight):
            return other(insert)
        dims = len(shape_of(weight)) - 2
        is_known = are_static(shape_of(data)) and are_static(shape_of(weight))
        if not is_known or len(shape_of(data)) != dims + 2:
            return other(insert)
        is_transposed = insert.node.target in _TRANSPOSED
        result = (_transposed if is_transposed else _convolution)(insert, data, weight)
        return result or other(insert)

    return rewrite


def linear(insert: Insertion) -> Node | None:
    """A linear layer whose weight depends on an input."""
    data, weight = float_input(insert), insert.node.args[1]
    if data is None or not isinstance(weight, Node) or not _depends_on_input(weight):
        return None
    if len(shape_of(weight)) != 2:
        return None
    result = product(insert, data, insert.permute(weight, [1, 0]))
    bias = argument(insert.node, 2, "bias")
    return result if bias is None else insert.call(aten.add.Tensor, result, bias)


_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)


def _depends_on_input(value: Node) -> bool:
    parts = reached(value, lambda part: part.all_input_nodes)
    return any(part.op == "placeholder" for part in parts)


def _convolution(insert: Insertion, data: Node, weight: Node) -> Node | None:
    """Patches are the columns of a matrix, weights the rows of another one."""
    node = insert.node
    outputs, _, *kernel = shape_of(weight)
    dims = len(kernel)
    stride = per_dim(argument(node, 3, "stride", 1), dims)
    dilation = per_dim(argument(node, 5, "dilation", 1), dims)
    groups = int(argument(node, 6, "groups", 1))
    before, after = symmetric_padding(node)
    if before != after:
        sides = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
        data = insert.call(aten.constant_pad_nd.default, data, sides)
        before = [0] * dims
    columns = _patches(insert, data, kernel, dilation, before, stride)
    if columns is None:
        return None
    rows = insert.reshape(weight, [groups, outputs // groups, -1])
    return _with_bias(insert, _product(insert, rows, columns, list(shape_of(node)[2:])))


def _transposed(insert: Insertion, data: Node, weight: Node) -> Node | None:
    """Each value gives a patch of the result, and where these overlap they are added."""
    node = insert.node
    inputs, outputs, *kernel = shape_of(weight)
    dims = len(kernel)
    stride, padding = (
        per_dim(argument(node, place, name, default), dims)
        for place, name, default in ((3, "stride", 1), (4, "padding", 0))
    )
    groups = int(argument(node, 6, "groups", 1))
    dilation = per_dim(argument(node, 7, "dilation", 1), dims)
    batch, _, *places = shape_of(data)
    rows = insert.reshape(weight, [groups, inputs // groups, outputs * math.prod(kernel)])
    columns = insert.reshape(data, [batch, inputs, math.prod(places)])
    rows = insert.permute(rows, [0, 2, 1])
    patched = _product(insert, rows, columns, [math.prod(places)])
    size = list(shape_of(node)[2:])
    lines = [
        _of_images(list(values), filler)
        for values, filler in ((size, 1), (kernel, 1), (dilation, 1), (padding, 0), (stride, 1))
    ]
    folded = _by(patches.fold, insert, aten.col2im.default, patched, *lines)
    return folded and _with_bias(insert, insert.reshape(folded, shape_of(node)))


def _patches(
    insert: Insertion,
    data: Node,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Node | None:
    """``(batch, channels * taps, places)``."""
    batch, channels, *places = shape_of(data)
    if math.prod(kernel) == 1 and not any(padding) and all(step == 1 for step in stride):
        return insert.reshape(data, [batch, channels, math.prod(places)])
    if len(kernel) == 1:
        data = insert.call(aten.unsqueeze.default, data, 2)
    lines = (
        _of_images(values, filler)
        for values, filler in ((kernel, 1), (dilation, 1), (padding, 0), (stride, 1))
    )
    return _by(patches.unfold, insert, aten.im2col.default, data, *lines)


def _of_images(values: list[int], filler: int) -> list[int]:
    """Numbers for height and width; a signal is an image of one row."""
    return [filler, *values] if len(values) == 1 else values


def _by(rewrite: Rewrite, insert: Insertion, target: object, *args: object) -> Node | None:
    """The form of a call; ``None``: it has none."""
    made = insert.formed(rewrite, target, *args)
    return None if made.target is target else made


def _product(insert: Insertion, rows: Node, columns: Node, places: list[int]) -> Node:
    """``(groups, outputs, inputs) x (batch, groups * inputs, places)``, as images."""
    groups, outputs, inputs = shape_of(rows)
    batch, _, count = shape_of(columns)
    columns = insert.reshape(columns, [batch, groups, inputs, count])
    columns = insert.permute(columns, [1, 2, 0, 3]) if batch > 1 else columns
    columns = insert.reshape(columns, [groups, inputs, batch * count])
    result = product(insert, rows, columns)
    if batch > 1:
        result = insert.reshape(result, [groups, outputs, batch, count])
        result = insert.permute(result, [2, 0, 1, 3])
    return insert.reshape(result, [batch, groups * outputs, *places])


def _with_bias(insert: Insertion, result: Node) -> Node:
    bias = cast("Node | None", argument(insert.node, 2, "bias"))
    if bias is None:
        return result
    dims = len(shape_of(result)) - 2
    along = insert.reshape(bias, [1, *shape_of(bias), *[1] * dims])
    return insert.call(aten.add.Tensor, result, along)
