"""Layers of which each row takes one of many (mixtures of experts), and what sorts rows by them.

Rows come sorted by the number of their layer; ``offsets`` says behind which row each one's end. How
many each has, only the inputs say: as one layer over all, of rows that are zero but in the place of
their own, all shapes are known.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    is_float32,
    is_whole,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite

__all__ = ["FOREIGN_GROUPS", "GROUPS", "sorted_numbers"]

aten = torch.ops.aten

_INDEXED = frozenset(
    {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim}
)
"""Ops whose second result are indices."""

_INDICES = frozenset({aten.argmax.default, aten.argmin.default, aten.argsort.default})

_MOVED = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unsqueeze.default,
        aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.t.default,
        aten.slice.Tensor, aten.select.int, aten.contiguous.default, aten.clone.default,
    }
)  # fmt: skip

_MOST_COMPARISONS = 2**20
"""Comparisons that a histogram or an order of any numbers may take."""


def _grouped_product(insert: Insertion) -> Node | None:
    """``grouped_mm`` of rows: each is multiplied by the matrix of its group.

    A row behind the last group is 0, as in PyTorch's own fallback.
    """
    node = insert.node
    rows, matrices = (cast(Node, arg) for arg in node.args[:2])
    offsets = argument(node, 2, "offs")
    bias, dtype = argument(node, 3, "bias"), argument(node, 4, "out_dtype")
    if offsets is None or bias is not None or dtype is not None or not is_float32(rows):
        return None
    sizes: tuple[Any, ...] = (*shape_of(rows), *shape_of(matrices))
    if len(sizes) != 5 or not are_static(sizes):
        return None
    count, width, groups, _, outputs = sizes
    order = insert.constant("rows", torch.arange(count, dtype=torch.int64)[:, None])
    ends = insert.call(aten.unsqueeze.default, offsets, 0)
    behind = insert.call(aten.ge.Tensor, order, ends)
    group = insert.call(aten.sum.dim_IntList, behind, [1], True)
    each = insert.constant("groups", torch.arange(groups, dtype=torch.int64)[None])
    chosen = insert.call(aten.eq.Tensor, group, each)
    chosen = insert.call(aten.to.dtype, chosen, torch.float32)
    chosen = insert.call(aten.unsqueeze.default, chosen, -1)
    spread = insert.call(aten.unsqueeze.default, rows, 1)
    spread = insert.call(aten.mul.Tensor, spread, chosen)
    spread = insert.call(aten.reshape.default, spread, [count, groups * width])
    stacked = insert.call(aten.reshape.default, matrices, [groups * width, outputs])
    weight = insert.settled(insert.call(aten.t.default, stacked), "weight")
    return insert.call(aten.linear.default, spread, weight)


def sorted_numbers(insert: Insertion) -> Node | None:
    """One result of ``sort``: as ``topk`` of numbers that are all different.

    Equal ones have no order in ``topk``; here they keep the one that they had.
    """
    node = insert.node
    source, index = cast(Node, node.args[0]), node.args[1]
    if not isinstance(source, Node) or source.target not in _SORTS:
        return None
    start = 1 if source.target is aten.sort.default else 2  # "stable" comes before
    dim = argument(source, start, "dim", -1)
    descending = bool(argument(source, start + 1, "descending", False))
    if index == 0:
        best = _ordered(insert, cast(Node, source.args[0]), dim, descending=descending)
        return best and insert.call(aten.gather.default, source.args[0], dim, best)
    return _ordered(insert, cast(Node, source.args[0]), dim, descending=descending)


_SORTS = frozenset({aten.sort.default, aten.sort.stable})


def _argsort(insert: Insertion) -> Node | None:
    node = insert.node
    start = 1 if node.target is aten.argsort.default else 2
    descending = bool(argument(node, start + 1, "descending", False))
    data, dim = cast(Node, node.args[0]), argument(node, start, "dim", -1)
    return _ordered(insert, data, dim, descending=descending)


def _ordered(insert: Insertion, data: Node, dim: int, *, descending: bool) -> Node | None:
    """Where the numbers came from, in their order."""
    shape: tuple[Any, ...] = shape_of(data)
    meta = tensor_meta(data)
    if meta is None or not shape or not isinstance(shape[dim], int) or meta.is_complex():
        return None
    dim %= len(shape)
    if _is_below(data, 32):
        keys, largest = _keys(insert, data, dim, descending=descending), descending
    elif meta.numel() * shape[dim] <= _MOST_COMPARISONS:
        keys, largest = _numbers_before(insert, data, dim, descending=descending), False
    else:
        return None
    best = insert.call(aten.topk.default, keys, shape[dim], dim, largest, True)
    return insert.call(operator.getitem, best, 1)


def _keys(insert: Insertion, data: Node, dim: int, *, descending: bool) -> Node:
    """Small integers times their count, and where each stands."""
    shape: tuple[Any, ...] = shape_of(data)
    places = torch.arange(shape[dim], dtype=torch.int64).view(-1, *[1] * (len(shape) - 1 - dim))
    places = places.flip(0) if descending else places
    keys = insert.call(aten.to.dtype, data, torch.int64)
    keys = insert.call(aten.mul.Tensor, keys, shape[dim])
    return insert.call(aten.add.Tensor, keys, insert.constant("places", places))


def _numbers_before(insert: Insertion, data: Node, dim: int, *, descending: bool) -> Node:
    """How many numbers come before each: all are compared with all. NaN has no place."""
    shape: tuple[Any, ...] = shape_of(data)
    count, behind = shape[dim], len(shape) - 1 - dim
    own = insert.call(aten.unsqueeze.default, data, dim + 1)
    other = insert.call(aten.unsqueeze.default, data, dim)
    better, as_good = (aten.gt, aten.ge) if descending else (aten.lt, aten.le)
    earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
    earlier = earlier.view(count, count, *[1] * behind)
    first = insert.call(as_good.Tensor, other, own)
    first = insert.call(aten.logical_and.default, first, insert.constant("earlier", earlier))
    before = insert.call(better.Tensor, other, own)
    before = insert.call(aten.logical_or.default, before, first)
    return insert.call(aten.sum.dim_IntList, before, [dim + 1])


def _is_below(data: Node, bits: int) -> bool:
    """Whether integers have at most that many bits: by their dtype, or since they are indices."""
    meta = tensor_meta(data)
    if meta is None or not is_whole(data):
        return False
    if meta.dtype != torch.int64:
        return True
    if data.target is operator.getitem:
        return bool(data.args[1] == 1 and cast(Node, data.args[0]).target in _INDEXED)
    if data.target is aten.masked_fill.Scalar:
        filled = abs(int(cast(int, data.args[2])))
        return filled < 2 ** (bits - 1) and _is_below(cast(Node, data.args[0]), bits)
    if data.target in _MOVED:
        return _is_below(cast(Node, data.args[0]), bits)
    return data.target in _INDICES


def _histogram(insert: Insertion) -> Node | None:
    """``histc`` between given ends: how many numbers fall into each bin."""
    node = insert.node
    data = cast(Node, node.args[0])
    bins, low, high = (argument(node, i, n, d) for i, n, d in _HISTC)
    shape: tuple[Any, ...] = shape_of(data)
    count = torch.Size(shape).numel() if are_static(shape) else None
    if count is None or not low < high or count * bins > _MOST_COMPARISONS or not is_float32(data):
        return None
    whole = _whole(data)
    if whole is not None and _are_whole(low, high) and bins == high - low + 1:  # one number a bin
        numbers = insert.call(aten.reshape.default, whole, [count, 1])
        each = insert.constant(
            "bins", torch.arange(int(low), int(high) + 1, dtype=torch.int64)[None]
        )
        found = insert.call(aten.eq.Tensor, numbers, each)
    else:
        found = _in_bins(insert, insert.call(aten.reshape.default, data, [count, 1]))
    total = insert.call(aten.sum.dim_IntList, found, [0])
    return insert.call(aten.to.dtype, total, torch.float32)


def _are_whole(*ends: float) -> bool:
    """Whether ends are integers that float32 tells from all others."""
    return all(float(end).is_integer() and abs(end) < 2**24 for end in ends)


def _whole(data: Node) -> Node | None:
    """The integers that float32 numbers were made of."""
    source = data.args[0] if data.target is aten.to.dtype else None
    return cast(Node, source) if is_whole(source) else None


def _in_bins(insert: Insertion, numbers: Node) -> Node:
    """Whether each number of a column is in each bin, by the steps of PyTorch's kernel."""
    bins, low, high = (argument(insert.node, i, n, d) for i, n, d in _HISTC)
    steps = insert.call(aten.mul.Tensor, insert.call(aten.sub.Tensor, numbers, low), bins)
    steps = insert.call(aten.div.Tensor, steps, high - low)
    places = insert.call(aten.to.dtype, steps, torch.int64)
    places = insert.call(aten.clamp_max.default, places, bins - 1)  # the upper end is inside
    each = insert.constant("bins", torch.arange(bins, dtype=torch.int64)[None])
    found = insert.call(aten.eq.Tensor, places, each)
    for target, end in ((aten.ge.Scalar, low), (aten.le.Scalar, high)):
        within = insert.call(target, numbers, end)
        found = insert.call(aten.logical_and.default, found, within)
    return found


_HISTC = ((1, "bins", 100), (2, "min", 0), (3, "max", 0))

GROUPS: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten._grouped_mm.default: _grouped_product,
        aten.argsort.default: _argsort,
        aten.argsort.stable: _argsort,
        aten.histc.default: _histogram,
    }
)
"""Rewrites of calls of aten ops."""

FOREIGN_GROUPS: Mapping[str, Rewrite] = MappingProxyType(
    {"transformers::grouped_mm_fallback": _grouped_product}
)
"""Of ops that other libraries register, by name: they exist once these are imported."""
