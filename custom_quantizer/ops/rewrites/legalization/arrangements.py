"""Any op that only moves values, told by what it does with numbered values.

PyTorch has some hundred ways to say "the same values in another order": views and their copies,
splits, flips, gathers by constant indices, paddings that repeat. Each is run once on a tensor whose
values are their own positions; the result says where every value comes from. That is taken apart
into the moves that have integers: slices, concatenations, permutes, reshapes and expands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
    dynamic_sizes,
    expression_bounds,
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.rewrites.constants import LIKE_ANOTHER, restated
from custom_quantizer.ops.rewrites.legalization._common import MAX_PIECES, float_input, spread
from custom_quantizer.ops.rewrites.legalization.sums import MAX_WEIGHTS

__all__ = ["ARRANGEMENTS", "arrangement"]

aten = torch.ops.aten

MIN_TURNS, MAX_TURNS = 2, 8
"""Of how many ranges it is looked for whether their entries take turns."""

MAX_VALUES = 1 << 24
"""Largest tensor that is numbered: 128 MB for a moment."""


# ---------------------------------------------------------------------------------------------
# One result
# ---------------------------------------------------------------------------------------------


def arrangement(insert: Insertion) -> Node | None:
    """The moves that a call stands for; ``None``: it computes, or is no few of them."""
    node, data = insert.node, float_input(insert)
    if data is None or not is_float32(node):
        return None
    found = _Places.of(insert, data)
    if found is None or not _holds_for_all_sizes(insert, data, found):
        return None
    if found.stay:
        return _reshaped(insert, data, shape_of(node))
    if found.gather is not None:
        return found.gather.written(insert, data)
    return _flat(insert, data, found.places)


@dataclass(frozen=True)
class _Places:
    """Where the values of a result come from.

    Attributes:
        source: sizes of the input.
        places: of the result, int64: positions in the flat input.
        gather: entries of each dim on their own, if it is that.
    """

    source: list[int]
    places: Tensor
    gather: _Gather | None

    @property
    def stay(self) -> bool:
        """Whether the values are those of the input in their order."""
        return torch.equal(self.places.flatten(), torch.arange(math.prod(self.source)))

    @classmethod
    def of(cls, insert: Insertion, data: Node, symbols: _Symbols | None = None) -> _Places | None:
        """Apply the call to numbers; ``None``: it computes, or is too large."""
        source, result = _sizes(data, symbols), _sizes(insert.node, symbols)
        if source is None or result is None or 0 in source + result:
            return None
        if max(math.prod(source), math.prod(result)) > MAX_VALUES:
            return None
        # From 1 on: a zero is none of the values, as beside the diagonal of torch.diag.
        numbers = torch.arange(1, math.prod(source) + 1, dtype=torch.float64).reshape(source)
        numbered = _applied(insert, data, numbers, symbols)
        if numbered is None or list(numbered.shape) != result or bool((numbered == 0).any()):
            return None
        places = numbered.to(torch.int64) - 1
        return cls(source, places, _Gather.of(places, source))

    def is_like(self, other: _Places, dynamic: Sequence[bool]) -> bool:
        """Whether ``other`` says the same of other sizes of some dims of the input."""
        if self.stay or other.stay:
            return self.stay and other.stay
        mine, theirs = self.gather, other.gather
        if mine is None or theirs is None:
            alike = mine is None and theirs is None and self.places.dim() == other.places.dim()
            return alike and torch.equal(self.places[:1].flatten(), other.places[:1].flatten())
        return mine.dims == theirs.dims and all(
            (a == list(range(before)) and b == list(range(after))) if varies else a == b
            for a, b, before, after, varies in zip(
                mine.taken, theirs.taken, self.source, other.source, dynamic, strict=True
            )
        )


_Symbols = Mapping[Any, int]
"""Values of the symbols that dynamic sizes are made of."""


def _holds_for_all_sizes(insert: Insertion, data: Node, found: _Places) -> bool:
    """Whether a call says the same where dynamic sizes are not those of the example.

    Rolled by as many as the example has samples, a batch is what it was; one of another size is
    not. Each dynamic size is tried with some values that no other has.
    """
    dynamic = [
        size
        for tensor in (*insert.node.all_input_nodes, insert.node)
        if tensor_meta(tensor) is not None
        for size in cast("tuple[Any, ...]", shape_of(tensor))
        if not isinstance(size, int)
    ]
    if not dynamic:
        return True
    varies = [not isinstance(size, int) for size in cast("tuple[Any, ...]", shape_of(data))]
    tried = 0
    for first in _TRIED:
        try:
            other = _Places.of(insert, data, _values(dynamic, first))
        except (RuntimeError, IndexError):
            continue  # sizes that the model does not take
        if other is not None:
            if not found.is_like(other, varies):
                return False
            tried += 1
    return tried > 0


_TRIED = (1, 3, 24, 60)
"""By how much the sizes that are tried exceed the smallest: some, and some that can be divided."""


def _values(dynamic: Sequence[Any], first: int) -> dict[Any, int]:
    """A value for each symbol of dynamic sizes, within its bounds."""
    values: dict[Any, int] = {}
    for size in dynamic:
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            if symbol not in values:
                low, high = expression_bounds(size, symbol)
                # From 0 on where that is possible, so that what can be divided stays so.
                start = low if first < _TRIED[2] else 0
                value = max(low, start + first * (len(values) + 1))
                values[symbol] = value if high is None else min(value, high)
    return values


def _sizes(node: Node, symbols: _Symbols | None = None) -> list[int] | None:
    """Sizes of a tensor, dynamic ones as symbols say, or as capture's example had them."""
    sizes: list[int] = []
    for size in cast("tuple[Any, ...]", shape_of(node)):
        known = size if isinstance(size, int) else _value(size, symbols)
        if known is None or (known < 2 and not isinstance(size, int)):
            return None
        sizes.append(known)
    return sizes


def _value(size: torch.SymInt, symbols: _Symbols | None) -> int | None:
    """A dynamic size, as symbols say, or as capture's example had it; ``None``: neither does."""
    if symbols is None:
        return cast("int | None", size.node.hint)
    known = size.node.expr.subs(symbols)
    return int(known) if known.is_number else None


def _applied(
    insert: Insertion, data: Node, numbers: Tensor, symbols: _Symbols | None = None
) -> Tensor | None:
    """What the call makes of numbered values; ``None``: it depends on other values."""
    node = insert.node
    values: dict[Node, Tensor | int] = {data: numbers}
    for source in node.all_input_nodes:
        if source is data:
            continue
        size = source.meta.get("val")
        if isinstance(size, torch.SymInt) and (number := _value(size, symbols)) is not None:
            values[source] = number
            continue
        origin = restated(source)
        if is_constant(origin) and origin.op == "get_attr":
            values[source] = constant_of(insert.model, origin)
        elif node.target in LIKE_ANOTHER and (sizes := _sizes(source, symbols)) is not None:
            values[source] = torch.empty(sizes, dtype=cast(Tensor, tensor_meta(source)).dtype)
        else:
            return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    moved = cast("Callable[..., Any]", node.target)(*args, **kwargs)
    return moved if isinstance(moved, Tensor) else None


def _reshaped(insert: Insertion, data: Node, shape: Sequence[Any]) -> Node | None:
    """A reshape; ``None``: it has two dynamic sizes."""
    if dynamic_sizes(shape) > 1:
        return None
    return insert.reshape(data, shape) if shape else insert.call(aten.reshape.default, data, [])


@dataclass(frozen=True)
class _Gather:
    """A call that takes entries of each dim of its input on their own.

    Attributes:
        taken: by dim of the input, which entries.
        dims: by dim of the result, the dim of the input it shows; ``None``: it repeats. Several
            may show one: windows, and the entries of each.
        shape: of the result.
    """

    taken: list[list[int]]
    dims: list[int | None]
    shape: list[int]

    @classmethod
    def of(cls, places: Tensor, source: Sequence[int]) -> _Gather | None:
        """Find it; ``None``: the places are not of this form."""
        first = places[(0,) * places.dim()]
        sums = first
        lines: list[Tensor] = []
        for d in range(places.dim()):
            line = places[(0,) * d + (slice(None),) + (0,) * (places.dim() - d - 1)]
            lines.append(line)
            steps = (line - first).reshape([-1 if i == d else 1 for i in range(places.dim())])
            sums = sums + steps
        if not torch.equal(sums.expand_as(places), places):
            return None
        start = [int(c) for c in torch.unravel_index(first, tuple(source))]
        taken = [[c] for c in start]
        dims: list[int | None] = []
        for line in lines:
            coordinates = torch.unravel_index(line, tuple(source))
            moving = [j for j, c in enumerate(coordinates) if int(c.min()) != int(c.max())]
            if len(moving) > 1:
                return None
            dims.append(moving[0] if moving else None)
            for j in moving:
                apart = [int(c) - start[j] for c in coordinates[j]]
                taken[j] = [entry + step for entry in taken[j] for step in apart]
        for chosen, size in zip(taken, source, strict=True):
            if min(chosen) < 0 or max(chosen) >= size:
                return None  # what looks like steps along one dim goes on to the next row
        return cls(taken, dims, list(places.shape))

    def written(self, insert: Insertion, data: Node) -> Node | None:
        """Slices, then a permute, then an expand."""
        shape: tuple[Any, ...] = shape_of(data)
        out: tuple[Any, ...] = shape_of(insert.node)
        value: Node | None = data
        for dim, entries in enumerate(self.taken):
            if entries == list(range(len(entries))) and not isinstance(shape[dim], int):
                # All of a dynamic size, which stands where it stood in the result.
                if dim not in self.dims:
                    return None
                if not is_same_shape([out[self.dims.index(dim)]], [shape[dim]]):
                    return None
                continue
            if not isinstance(shape[dim], int):
                return None
            value = pieces(insert, cast(Node, value), dim, entries)
            if value is None:
                return None
        shown = [r for r, dim in enumerate(self.dims) if dim is not None]
        kept = sorted(shown, key=lambda r: (cast(int, self.dims[r]), r))
        moved = _reshaped(insert, cast(Node, value), [out[r] for r in kept])
        if moved is None:
            return None
        moved = insert.permute(moved, [kept.index(r) for r in shown])
        ones = [1 if dim is None else size for dim, size in zip(self.dims, out, strict=True)]
        moved = _reshaped(insert, moved, ones)
        repeats = [size if dim is None else -1 for dim, size in zip(self.dims, out, strict=True)]
        if moved is None or not are_static(repeats):
            return None
        if all(size in (-1, 1) for size in repeats):
            return moved
        return insert.call(aten.expand.default, moved, repeats)


def _flat(insert: Insertion, data: Node, places: Tensor) -> Node | None:
    """Any other move: entries of the values one behind the other, sample by sample if it can be."""
    shape, out = shape_of(data), shape_of(insert.node)
    rest = math.prod(places.shape[1:])
    each = math.prod(_sizes(data) or []) // places.shape[0] if places.dim() else 0
    if places.dim() > 1 and len(shape) > 1 and places.shape[0] == (_sizes(data) or [0])[0]:
        rows = places.reshape(places.shape[0], rest)
        starts = torch.arange(places.shape[0]).unsqueeze(1) * each
        alike = torch.equal(rows - starts, rows[:1].expand_as(rows))
        if alike and is_same_shape(out[:1], shape[:1]):
            if not are_static(shape[1:]):
                return None
            flat = insert.reshape(data, [shape[0], each])
            taken = pieces(insert, flat, 1, rows[0].tolist())
            return None if taken is None else _reshaped(insert, taken, out)
    if not are_static(shape):
        return None
    flat = insert.reshape(data, [math.prod(shape)])
    taken = pieces(insert, flat, 0, places.flatten().tolist())
    return None if taken is None else _reshaped(insert, taken, out)


# ---------------------------------------------------------------------------------------------
# Entries of one dim
# ---------------------------------------------------------------------------------------------


def pieces(insert: Insertion, data: Node, dim: int, entries: Sequence[int]) -> Node | None:
    """Entries of a dim of static size: slices, one behind the other.

    Where these are too many a layer picks them, whose weights are 0 and 1.

    Returns:
        ``None``: there are too many for that, too.
    """
    size = int(shape_of(data)[dim])
    if list(entries) == list(range(size)):
        return data
    if size == 1:
        shape = [-1] * len(shape_of(data))
        shape[dim] = len(entries)
        return insert.call(aten.expand.default, data, shape)
    each = next((i for i, e in enumerate(entries) if e != entries[0]), len(entries))
    # A reshape takes one dynamic size.
    can_reshape = dynamic_sizes(shape_of(data)) <= 1
    repeats = each > 1 and list(entries) == [e for e in entries[::each] for _ in range(each)]
    if repeats and can_reshape:
        value = pieces(insert, data, dim, entries[::each])
        return None if value is None else spread(insert, value, dim, each)
    runs = _runs(entries)
    lines = _interleaved(entries) if can_reshape and len(runs) > MIN_TURNS else None
    if lines is not None and len(lines) < len(runs):
        shape = list(shape_of(data))
        # As few dims as can be: runtimes take six or so.
        first = [math.prod(shape[:dim])] if are_static(shape[:dim]) else shape[:dim]
        column = [*first, len(lines[0]), 1, math.prod(shape[dim + 1 :])]
        columns = [insert.reshape(_cut(insert, data, dim, line), column) for line in lines]
        shape[dim] = len(entries)
        return insert.reshape(insert.call(aten.cat.default, columns, len(first) + 1), shape)
    if len(runs) > MAX_PIECES:
        return _picked(insert, data, dim, entries)
    slices = {run: _cut(insert, data, dim, run) for run in runs}
    if len(runs) == 1:
        return slices[runs[0]]
    return insert.call(aten.cat.default, [slices[run] for run in runs], dim)


def _cut(insert: Insertion, data: Node, dim: int, run: range) -> Node:
    """The entries of a range along a dim."""
    if run.step == 1:
        return insert.slice(data, dim, run.start, run.stop)
    return insert.call(aten.slice.Tensor, data, dim, run.start, run.stop, run.step)


def _interleaved(entries: Sequence[int]) -> list[range] | None:
    """Ranges that take turns, the first entry of each, then the second one of each, and so on."""
    for turns in range(MIN_TURNS, MAX_TURNS + 1):
        if len(entries) % turns:
            continue
        lines = (_runs(entries[first::turns]) for first in range(turns))
        regular = [line[0] for line in itertools.takewhile(lambda line: len(line) == 1, lines)]
        if len(regular) == turns:
            return regular
    return None


def _runs(entries: Sequence[int]) -> list[range]:
    """Entries as ranges: as long as they go on by the same step, from the front."""
    runs: list[range] = []
    start = 0
    while start < len(entries):
        stop, step = start + 1, 1
        if stop < len(entries) and entries[stop] > entries[start]:
            step = entries[stop] - entries[start]
            # A larger step is worth a slice of its own only for more than a pair of entries.
            more = stop + 1 < len(entries) and entries[stop + 1] - entries[stop] == step
            if step == 1 or more or stop + 1 == len(entries):
                while stop < len(entries) and entries[stop] - entries[stop - 1] == step:
                    stop += 1
            else:
                step = 1
        runs.append(range(entries[start], entries[stop - 1] + 1, step))
        start = stop
    return runs


def _picked(insert: Insertion, data: Node, dim: int, entries: Sequence[int]) -> Node | None:
    """A linear layer along a dim whose weights pick one entry each."""
    shape = list(shape_of(data))
    size, last = int(shape[dim]), len(shape) - 1
    if size * len(entries) > MAX_WEIGHTS:
        return None
    picks = torch.zeros(len(entries), size)
    picks[torch.arange(len(entries)), torch.tensor(list(entries))] = 1.0
    order = [d for d in range(len(shape)) if d != dim] + [dim]
    rows = insert.permute(data, order)
    taken = insert.call(aten.linear.default, rows, insert.constant("picks", picks))
    return insert.permute(taken, [*range(dim), last, *range(dim, last)])


# ---------------------------------------------------------------------------------------------
# Several results
# ---------------------------------------------------------------------------------------------


def split(insert: Insertion) -> Node | None:
    """Splits by any name are splits along a dim into pieces of given sizes."""
    node, data = insert.node, float_input(insert)
    parts = node.meta.get("val")
    if data is None or not isinstance(parts, (list, tuple)) or not parts:
        return None
    name = cast(Any, node.target)._schema.name.removeprefix("aten::")
    rank = len(shape_of(data))
    if name in ("hsplit", "vsplit", "dsplit"):
        dim = {"hsplit": min(1, rank - 1), "vsplit": 0, "dsplit": 2}[name]
    else:
        dim = int(argument(node, 1 if name == "unbind_copy" else 2, "dim", 0)) % rank
    if name == "unbind_copy":
        return insert.call(aten.unbind.int, data, dim)
    sizes = [part.shape[dim] for part in parts]
    if not are_static(sizes) or 0 in sizes:
        return None
    return insert.call(aten.split_with_sizes.default, data, sizes, dim)


_SPLITS = (
    aten.hsplit.array,
    aten.hsplit.int,
    aten.vsplit.array,
    aten.vsplit.int,
    aten.dsplit.array,
    aten.dsplit.int,
    aten.split_copy.Tensor,
    aten.split_with_sizes_copy.default,
    aten.tensor_split.indices,
    aten.tensor_split.sections,
    aten.unbind_copy.int,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
)
_MOVES = (
    aten._pad_circular.default,
    aten._reshape_alias.default,
    aten._reshape_alias_copy.default,
    aten._reshape_copy.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_view.default,
    aten.alias_copy.default,
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten._to_copy.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
    aten.broadcast_to.default,
    aten.conj.default,
    aten.conj_physical.default,
    aten.data.default,
    aten.detach_copy.default,
    aten.diag.default,
    aten.diagonal.default,
    aten.diagonal_copy.default,
    aten.expand_copy.default,
    aten.fliplr.default,
    aten.flipud.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.linalg_diagonal.default,
    aten.matrix_H.default,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.movedim.int,
    aten.narrow_copy.default,
    aten.native_channel_shuffle.default,
    aten.permute_copy.default,
    aten.positive.default,
    aten.ravel.default,
    aten.real.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.repeat_interleave.self_Tensor,
    aten.repeat_interleave.self_int,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.reshape_as.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.rot90.default,
    aten.select_copy.int,
    aten.slice_copy.Tensor,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.t_copy.default,
    aten.take.default,
    aten.take_along_dim.default,
    aten.tile.default,
    aten.to.dtype_layout,
    aten.to.other,
    aten.transpose_copy.int,
    aten.type_as.default,
    aten.unfold.default,
    aten.unfold_copy.default,
    aten.unsqueeze_copy.default,
    aten.view_as.default,
    aten.view_copy.default,
)

ARRANGEMENTS: Mapping[Any, Rewrite] = MappingProxyType(
    {
        **dict.fromkeys(_MOVES, arrangement),
        **dict.fromkeys(_SPLITS, split),
    }
)
"""By overload. ``tests/ops/test_arrangements.py`` runs all of aten to find one that is missing."""
