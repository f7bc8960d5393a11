"""Ops that move values: slices, concatenations, reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    is_empty,
    is_same_shape,
    reads_sizes,
    shape_of,
)
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.movement import slice_of
from custom_quantizer.ops.rewrites.legalization._common import CATS, MAX_PIECES, float_input, spread

aten = torch.ops.aten


def stack(insert: Insertion) -> Node | None:
    """Stacking is concatenation along a new dim."""
    tensors = cast("Sequence[Node]", insert.node.args[0])
    dim = int(argument(insert.node, 1, "dim", 0)) % len(shape_of(insert.node))
    pieces = [insert.call(aten.unsqueeze.default, tensor, dim) for tensor in tensors]
    return pieces[0] if len(pieces) == 1 else insert.call(aten.cat.default, pieces, dim)


def expand(insert: Insertion) -> Node | None:
    """Sizes that the graph computes, and the input has, are said by -1."""
    data = insert.node.args[0]
    if not reads_sizes(insert.node) or not isinstance(data, Node):
        return None
    sizes, shape = list(cast("Sequence[Any]", insert.node.args[1])), shape_of(data)
    own = range(len(sizes) - len(shape), len(sizes))
    for dim, size in zip(own, shape, strict=True):
        if isinstance(sizes[dim], Node) and is_same_shape([sizes[dim].meta["val"]], [size]):
            sizes[dim] = -1
    known = not any(isinstance(size, Node) for size in sizes)
    return insert.call(insert.node.target, data, sizes) if known else None


def piece(insert: Insertion) -> Node | None:
    """What is cut out of joined tensors, and lies in one of them, is cut out of that one.

    A class token that is joined to patches, and taken from them again, then need not share their
    scale.
    """
    node, joined = insert.node, insert.node.args[0]
    if not isinstance(joined, Node) or joined.target not in CATS:
        return None
    shape = shape_of(joined)
    dim = int(argument(joined, 1, "dim", 0)) % len(shape)
    pieces = cast("Sequence[Node]", joined.args[0])
    if any(len(shape_of(tensor)) != len(shape) for tensor in pieces):
        return None  # an empty one of rank 1 may be joined to anything
    sizes: list[Any] = [shape_of(tensor)[dim] for tensor in pieces]
    if int(argument(node, 1, "dim", 0)) % len(shape) != dim or not are_static(sizes):
        return None
    if node.target is aten.select.int:
        start = int(cast(int, argument(node, 2, "index"))) % sum(sizes)
        stop = start + 1
    else:
        _, start, stop, step = slice_of(node)
        if step != 1 or start >= stop:
            return None
    offset = 0
    for tensor, size in zip(pieces, sizes, strict=True):
        if offset <= start and stop <= offset + size:
            if node.target is aten.select.int:
                return insert.call(aten.select.int, tensor, dim, start - offset)
            return insert.slice(tensor, dim, start - offset, stop - offset)
        offset += size
    return None


_RANKS: dict[Any, int] = {
    aten.column_stack.default: 2,
    aten.dstack.default: 3,
    aten.hstack.default: 1,
    aten.row_stack.default: 2,
    aten.vstack.default: 2,
}


def stack_along(insert: Insertion) -> Node | None:
    """Stacking by the name of a direction: tensors of some rank at least, one behind the other."""
    target = insert.node.target
    tensors = cast("Sequence[Node]", insert.node.args[0])
    rank = _RANKS[target]
    pieces = []
    for tensor in tensors:
        shape = list(shape_of(tensor))
        if target is aten.column_stack.default:
            shape += [1] * (rank - len(shape))
        elif len(shape) < rank:
            # Rows first, then columns, depth last.
            shape = ([1] * (min(rank, 2) - len(shape)) + shape + [1])[:rank]
        pieces.append(insert.reshape(tensor, shape))
    by_rows = target in (aten.vstack.default, aten.row_stack.default)
    depth = 2 if target is aten.dstack.default else min(1, len(shape_of(pieces[0])) - 1)
    dim = 0 if by_rows else depth
    return pieces[0] if len(pieces) == 1 else insert.call(aten.cat.default, pieces, dim)


def cat(insert: Insertion) -> Node | None:
    """``cat`` by any of its names; a concatenation of one tensor is that tensor.

    Tensors without elements are left out, such as the rest of a vector that a rotary embedding
    turns completely.
    """
    given = cast("Sequence[Node]", insert.node.args[0])
    tensors = [tensor for tensor in given if not is_empty(tensor)]
    if len(tensors) == 1:
        return tensors[0]
    if not tensors or (insert.node.target is aten.cat.default and len(tensors) == len(given)):
        return None
    return insert.call(aten.cat.default, tensors, argument(insert.node, 1, "dim", 0))


def broadcast_result(insert: Insertion) -> Node | None:
    """One of several tensors that are broadcast to one shape."""
    source, index = insert.node.args
    if not isinstance(source, Node) or source.target is not aten.broadcast_tensors.default:
        return None
    tensor = cast("Sequence[Node]", source.args[0])[cast(int, index)]
    shape = shape_of(insert.node)
    if is_same_shape(shape_of(tensor), shape):
        return tensor
    return insert.call(aten.expand.default, tensor, list(shape)) if are_static(shape) else None


def roll(insert: Insertion) -> Node | None:
    """Rolling exchanges the two parts of a tensor, dim by dim."""
    data = float_input(insert)
    if data is None:
        return None
    shifts = per_dim(insert.node.args[1], 1)
    dims = list(cast("Sequence[int]", argument(insert.node, 2, "dims", [])))
    shape = shape_of(data)
    if not dims or not are_static([shape[d] for d in dims]):
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        dim %= len(shape)
        size = int(shape[dim])
        cut = (-shift) % size
        if cut:
            parts = [insert.slice(data, dim, cut, size), insert.slice(data, dim, 0, cut)]
            data = insert.call(aten.cat.default, parts, dim)
    return data


def flip(insert: Insertion) -> Node | None:
    """Flipping concatenates the slices of a dim in reverse."""
    data = float_input(insert)
    if data is None:
        return None
    shape = shape_of(data)
    dims = [int(d) % len(shape) for d in cast("Sequence[int]", insert.node.args[1])]
    if not are_static([shape[d] for d in dims]) or sum(shape[d] for d in dims) > MAX_PIECES:
        return None
    for dim in dims:
        size = int(shape[dim])
        pieces = [insert.slice(data, dim, i, i + 1) for i in reversed(range(size))]
        data = insert.call(aten.cat.default, pieces, dim) if size > 1 else data
    return data


def channel_shuffle(insert: Insertion) -> Node | None:
    """Groups of channels are a dim of their own, which is transposed with the channels."""
    data = float_input(insert)
    groups = int(cast(int, insert.node.args[1]))
    if data is None or not are_static(shape_of(data)[1:]):
        return None
    batch, channels, *image = shape_of(data)
    split = insert.reshape(data, [batch, groups, channels // groups, *image])
    swapped = insert.call(aten.transpose.int, split, 1, 2)
    return insert.reshape(swapped, [batch, channels, *image])


def pixel_shuffle(insert: Insertion) -> Node | None:
    """Channels become rows and columns."""
    data = float_input(insert)
    if data is None or len(shape_of(data)) != 4 or not are_static(shape_of(data)[1:]):
        return None
    factor = int(cast(int, insert.node.args[1]))
    batch, channels, height, width = shape_of(data)
    out = channels // factor**2
    split = insert.reshape(data, [batch, out, factor, factor, height, width])
    order = insert.permute(split, [0, 1, 4, 2, 5, 3])
    return insert.reshape(order, [batch, out, height * factor, width * factor])


def pixel_unshuffle(insert: Insertion) -> Node | None:
    """Rows and columns become channels."""
    data = float_input(insert)
    if data is None or len(shape_of(data)) != 4 or not are_static(shape_of(data)[1:]):
        return None
    factor = int(cast(int, insert.node.args[1]))
    batch, channels, height, width = shape_of(data)
    small = [height // factor, width // factor]
    split = insert.reshape(data, [batch, channels, small[0], factor, small[1], factor])
    order = insert.permute(split, [0, 1, 3, 5, 2, 4])
    return insert.reshape(order, [batch, channels * factor**2, *small])


def upsample_nearest(insert: Insertion) -> Node | None:
    """Nearest-neighbour upsampling repeats values: by a whole factor, or each as often as it is.

    Whole factors repeat in a dim of their own, the last dim first and with channels last, as next
    to convolutions: pixels, then whole rows are copied, not number by number. What is left
    concatenates slices.
    """
    node, data = insert.node, float_input(insert)
    if data is None:
        return None
    shape, out = shape_of(data), shape_of(node)
    if not are_static(shape[1:]) or not are_static(out[1:]):
        return None
    rank = len(shape)
    entries = {dim: _nearest(node, dim) for dim in range(2, rank)}
    # A given factor need not be the ratio of the sizes: 2.05 doubles ten entries otherwise.
    factors = {dim: -(-int(out[dim]) // int(shape[dim])) for dim in entries}
    whole = [d for d in entries if entries[d] == [i // factors[d] for i in range(out[d])]]
    value = data
    if any(out[dim] != shape[dim] for dim in whole):
        value = insert.permute(value, [0, *range(2, rank), 1])
        for dim in reversed(whole):
            value = spread(insert, value, dim - 1, factors[dim])
            before, (repeated, *rest) = shape_of(value)[: dim - 1], shape_of(value)[dim - 1 :]
            if repeated != out[dim]:
                lines = insert.reshape(value, [*before, repeated * math.prod(rest)])
                lines = insert.slice(lines, dim - 1, 0, out[dim] * math.prod(rest))
                value = insert.reshape(lines, [*before, out[dim], *rest])
        value = insert.permute(value, [0, rank - 1, *range(1, rank - 1)])
    for dim, wanted in entries.items():
        if dim in whole:
            continue
        if len(wanted) > MAX_PIECES:
            return None
        pieces = [insert.slice(value, dim, i, i + 1) for i in wanted]
        value = insert.call(aten.cat.default, pieces, dim)
    return value


def _nearest(node: Node, dim: int) -> list[int]:
    """Which entry of a dim each entry of the result repeats, as the op itself says."""
    sizes = [1] * len(shape_of(node))
    sizes[dim] = shape_of(cast(Node, node.args[0]))[dim]
    numbers = torch.arange(float(sizes[dim])).reshape(sizes)
    # The other dims as they are: factors may be given instead of sizes.
    numbers = numbers.expand([1, 1, *shape_of(cast(Node, node.args[0]))[2:]])
    target = cast("Callable[..., Tensor]", node.target)
    repeated = target(numbers, *node.args[1:], **node.kwargs)
    return [int(i) for i in repeated.movedim(dim, 0).flatten(1)[:, 0]]


def repeat(insert: Insertion) -> Node | None:
    """Repeating a dim concatenates it with itself."""
    data = float_input(insert)
    repeats = list(cast("Sequence[Any]", insert.node.args[1]))
    if data is None or not are_static(repeats) or max(repeats, default=1) > MAX_PIECES:
        return None
    shape = shape_of(data)
    missing = len(repeats) - len(shape)
    value = insert.reshape(data, [*[1] * missing, *shape])
    for dim, count in enumerate(repeats):
        if count < 1:
            return None
        if count > 1:
            value = insert.call(aten.cat.default, [value] * count, dim)
    return value
