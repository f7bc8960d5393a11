"""Tensors that are put in constant places of another one, or added there.

What is put in some entries of a dim takes the place of these: both tensors are joined, and each
entry is taken from one of them. What is added is a product with a matrix of ones and zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.rewrites.constants import restated
from custom_quantizer.ops.rewrites.legalization.arrangements import pieces
from custom_quantizer.ops.rewrites.legalization.sums import MAX_WEIGHTS

__all__ = ["PLACEMENTS"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Placement:
    """What is put, or added, where.

    Attributes:
        dim: of the tensor.
        entries: of that dim.
        values: as many along the dim.
        added: to what is there.
    """

    dim: int
    entries: list[int]
    values: Any
    added: bool = False


def _placed(insert: Insertion) -> Node | None:
    node = insert.node
    data = cast(Node, node.args[0])
    found = _PLACES[node.target](insert)
    if found is None or not is_float32(node) or not is_float32(found.values):
        return None
    shape: list[Any] = list(shape_of(data))
    size = shape[found.dim]
    if not isinstance(size, int) or not all(-size <= entry < size for entry in found.entries):
        return None
    entries = [entry % size for entry in found.entries]
    shape[found.dim] = len(entries)
    values = found.values
    if not is_same_shape(shape_of(values), shape):
        if not are_static(shape):
            return None
        values = insert.call(aten.expand.default, values, shape)
    if found.added:
        return _added(insert, data, found.dim, entries, values)
    if len(set(entries)) < len(entries):
        return None  # which of them is there is not said
    order = list(range(size))
    for position, entry in enumerate(entries):
        order[entry] = size + position
    both = insert.call(aten.cat.default, [data, values], found.dim)
    return pieces(insert, both, found.dim, order)


def _added(
    insert: Insertion, data: Node, dim: int, entries: list[int], values: Node
) -> Node | None:
    size, last = int(shape_of(data)[dim]), len(shape_of(data)) - 1
    if size * len(entries) > MAX_WEIGHTS:
        return None
    ones = torch.zeros(size, len(entries))
    ones[torch.tensor(entries), torch.arange(len(entries))] = 1.0
    rows = insert.permute(values, [*(d for d in range(last + 1) if d != dim), dim])
    sums = insert.call(aten.linear.default, rows, insert.constant("ones", ones))
    sums = insert.permute(sums, [*range(dim), last, *range(dim, last)])
    return insert.call(aten.add.Tensor, data, sums)


def _known(insert: Insertion, index: Any) -> Tensor | None:
    """An index that is the same in all calls."""
    index = restated(index) if isinstance(index, Node) else None
    return constant_of(insert.model, index) if is_constant(index) else None


def _line(insert: Insertion, index: Any) -> list[int] | None:
    value = _known(insert, index)
    if value is None or value.dim() > 1:
        return None
    if value.dtype == torch.bool:
        return value.nonzero().flatten().tolist() if value.dim() == 1 else None
    return value.reshape(-1).tolist()


def _by_index_put(insert: Insertion) -> _Placement | None:
    """Indices of one dim; before it stand all values of a dim."""
    indices = cast("list[Node | None]", insert.node.args[1])
    dim = len(indices) - 1
    if any(index is not None for index in indices[:-1]):
        return None
    entries = _line(insert, indices[dim])
    added = bool(argument(insert.node, 3, "accumulate", False))
    values = insert.node.args[2]
    return None if entries is None else _Placement(dim, entries, values, added)


def _by_index(insert: Insertion) -> _Placement | None:
    dim, index, values = cast("tuple[int, Node, Node]", insert.node.args[1:4])
    entries = _line(insert, index)
    if entries is None or insert.node.kwargs.get("alpha", 1) != 1:
        return None
    added = insert.node.target is aten.index_add.default
    return _Placement(dim % len(shape_of(insert.node)), entries, values, added)


def _by_scatter(insert: Insertion) -> _Placement | None:
    """An index that is the same along all other dims."""
    dim, index, values = cast("tuple[int, Node, Node]", insert.node.args[1:4])
    dim, value = dim % max(len(shape_of(insert.node)), 1), _known(insert, index)
    if value is None or not value.dim() or not value.numel() or not is_float32(values):
        return None
    line = value.movedim(dim, 0).reshape(value.shape[dim], -1)
    if not torch.equal(line, line[:, :1].expand_as(line)):
        return None
    others: tuple[Any, ...] = shape_of(values)
    if not is_same_shape(others, value.shape):
        return None
    added = insert.node.target is aten.scatter_add.default
    return _Placement(dim, line[:, 0].tolist(), values, added)


def _by_slice(insert: Insertion) -> _Placement | None:
    node = insert.node
    dim = int(argument(node, 2, "dim", 0)) % len(shape_of(node))
    bounds = [argument(node, i, n) for i, n in ((3, "start"), (4, "end"), (5, "step"))]
    size: Any = shape_of(node)[dim]
    if not isinstance(size, int) or any(isinstance(bound, Node) for bound in bounds):
        return None
    return _Placement(dim, list(range(*slice(*bounds).indices(size))), node.args[1])


_PLACES: dict[Any, Any] = {
    aten.index_add.default: _by_index,
    aten.index_copy.default: _by_index,
    aten.index_put.default: _by_index_put,
    aten.scatter.src: _by_scatter,
    aten.scatter_add.default: _by_scatter,
    aten.slice_scatter.default: _by_slice,
}

PLACEMENTS: Mapping[Any, Rewrite] = MappingProxyType(dict.fromkeys(_PLACES, _placed))
"""By overload."""
