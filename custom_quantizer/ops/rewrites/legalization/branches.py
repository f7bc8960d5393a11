"""Sums over branches: what was stacked to be summed up is added as it is.

Networks with branches stack their results, weigh them and sum them up (selective kernels, split
attention, weighted feature pyramids). A layer of one output over the new dim would have to gather
it first, and takes twenty times as long as an addition; and tensors that are joined share a scale,
which those of an addition need not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import (
    argument,
    dynamic_sizes,
    is_same_shape,
    reduced_dims,
    shape_of,
)
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.ops.rewrites.legalization._common import CATS, float_input

__all__ = ["added", "product"]

aten = torch.ops.aten

MAX_STACKED = 3
"""Most tensors that are added one by one: each sum on the way is rounded."""

MAX_CUT = 2
"""Most parts of one tensor that are added: they share a scale already."""

MIN_LINE = 4
"""Fewest values in a row that are worth cutting out: shorter ones cost as much as a layer."""

_VIEWS = (
    aten.reshape.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
)


def added(insert: Insertion, data: Node, dim: int) -> Node | None:
    """The sum over a dim, without it, as additions; ``None``: a layer is better."""
    terms = _stacked(insert, data, dim) or _cut(insert, data, dim)
    if terms is None:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = insert.call(aten.add.Tensor, total, term)
    return total


def product(insert: Insertion) -> Node | None:
    """Branches that are weighed to be summed up are weighed one by one."""
    node = insert.node
    dims = {_summed_dim(user) for user in node.users}
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None or float_input(insert) is None:
        return None
    left, right = node.args[:2]
    for data, weights in ((left, right), (right, left)):
        if not isinstance(data, Node) or not isinstance(weights, Node):
            continue
        if not is_same_shape(shape_of(data), shape_of(node)):
            continue
        branches = _stacked(insert, data, dim)
        if branches is None:
            continue
        factors = _entries(insert, weights, dim - len(shape_of(data)), len(branches))
        pairs = zip(branches, factors, strict=True)
        weighed = [insert.call(aten.mul.Tensor, *pair) for pair in pairs]
        pieces = [insert.call(aten.unsqueeze.default, branch, dim) for branch in weighed]
        return insert.call(aten.cat.default, pieces, dim)
    return None


def _summed_dim(node: Node) -> int | None:
    """The one dim that a call sums up or averages."""
    if node.target not in (aten.sum.dim_IntList, aten.mean.dim):
        return None
    if argument(node, 3, "dtype") is not None:
        return None
    dims = reduced_dims(argument(node, 1, "dim"), len(shape_of(cast(Node, node.args[0]))))
    return dims[0] if len(dims) == 1 else None


def _stacked(insert: Insertion, data: Node, dim: int) -> list[Node] | None:
    """The tensors that were stacked along a dim, or are parts of another dim of one tensor."""
    shape: tuple[Any, ...] = shape_of(data)
    count = shape[dim]
    if not isinstance(count, int) or not 1 < count <= MAX_STACKED:
        return None
    without = [*shape[:dim], *shape[dim + 1 :]]
    if data.target in CATS and int(argument(data, 1, "dim", 0)) % len(shape) == dim:
        tensors = cast("Sequence[Node]", data.args[0])
        sources = [cast(Node, t.args[0]) for t in tensors if t.target in _VIEWS]
        if len(sources) == count and all(is_same_shape(shape_of(s), without) for s in sources):
            return sources
    if data.target not in _VIEWS or dim + 1 == len(shape):
        return None
    source, size = cast(Node, data.args[0]), shape[dim + 1]
    if not isinstance(size, int):
        return None
    if not is_same_shape(shape_of(source), [*shape[:dim], count * size, *shape[dim + 2 :]]):
        return None
    if source.target in CATS and int(argument(source, 1, "dim", 0)) % (len(shape) - 1) == dim:
        tensors = cast("Sequence[Node]", source.args[0])
        if len(tensors) == count and all(is_same_shape(shape_of(t), without) for t in tensors):
            return list(tensors)
    return [insert.slice(source, dim, i * size, (i + 1) * size) for i in range(count)]


def _cut(insert: Insertion, data: Node, dim: int) -> list[Node] | None:
    """The entries of a dim, where each is made of long rows."""
    shape: tuple[Any, ...] = shape_of(data)
    rows = [size for size in shape[dim + 1 :] if isinstance(size, int)]
    if not isinstance(shape[dim], int) or not 1 < shape[dim] <= MAX_CUT:
        return None
    if dynamic_sizes(shape) > 1:
        return None
    # Channels of images lie side by side.
    if math.prod(rows) < MIN_LINE or (len(shape) == 4 and dim == 1):
        return None
    return [insert.call(aten.select.int, data, dim, i) for i in range(shape[dim])]


def _entries(insert: Insertion, value: Node, dim: int, count: int) -> list[Node]:
    """What is broadcast along a dim, which counts from the end, one entry after the other."""
    shape = shape_of(value)
    if len(shape) + dim < 0:
        return [value] * count
    dim %= len(shape)
    if len(shape) == 1:  # no kernel takes scalars
        return [insert.slice(value, 0, i % shape[0], i % shape[0] + 1) for i in range(count)]
    if shape[dim] == 1:
        return [insert.reshape(value, [*shape[:dim], *shape[dim + 1 :]])] * count
    return _stacked(insert, value, dim) or [
        insert.call(aten.select.int, value, dim, i) for i in range(count)
    ]
