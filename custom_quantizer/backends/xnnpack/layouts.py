"""Transposes of a delegate that undo each other, and those that ops between them make necessary.

ExecuTorch (1.5.1) keeps images in one of two layouts and lets each op choose
(``ChannelsLastTaggedReshapePass``): behind a convolution channels stand last, a permute, a view or
a constant of fewer dims puts them first again, the next convolution last. Each change is a copy.
XNNPACK runs transposes as they are written. So, in the graph that ExecuTorch wrote:

- moves that are made twice are made once;
- a change of layout that gives back what was there before is left out;
- elementwise ops between two such changes work on what is before the first;
- a view reads what is before a view, or before a transpose that moves dims of size 1 only.

No number changes: elementwise ops give the same values in any order of dims. Other transposes stay,
as some are there to keep ops apart (``activations.keep_apart``, ``activations.break_chains``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from custom_quantizer.backends.xnnpack.flatbuffer import Contents, Member, Schema
from custom_quantizer.backends.xnnpack.kernels import CHAIN_LIMIT
from custom_quantizer.backends.xnnpack.readback import INVALID_ID

__all__ = ["simplify"]

_PLAIN_TYPES = frozenset({1, 3, 4})
"""float32 and integers of one scale: what an elementwise op reads and writes value by value."""

_MOST_OPS = 64
"""Elementwise ops between transposes that are looked at: bounds the time for a graph."""

_ELEMENTWISE = frozenset(
    {
        "XNNAbs",
        "XNNAdd",
        "XNNCeiling",
        "XNNClamp",
        "XNNConvert",
        "XNNCos",
        "XNNDiv",
        "XNNELU",
        "XNNExp",
        "XNNFloor",
        "XNNGelu",
        "XNNHardswish",
        "XNNLeakyReLU",
        "XNNLog",
        "XNNMaximum",
        "XNNMinimum",
        "XNNMultiply",
        "XNNNegate",
        "XNNReciprocalSquareRoot",
        "XNNSigmoid",
        "XNNSin",
        "XNNSquare",
        "XNNSquareRoot",
        "XNNSubtract",
        "XNNTanh",
    }
)
_VIEW, _TRANSPOSE = "XNNStaticReshape", "XNNStaticTranspose"
_COPIES = frozenset({_VIEW, "XNNStaticSlice", _TRANSPOSE})
_CLAMPS = frozenset({"XNNClamp", "XNNMaximum", "XNNMinimum"})
"""Clamps, and what XNNPACK makes clamps of where an operand is one number."""
_KEEP_CLAMPS = _COPIES | (_ELEMENTWISE - _CLAMPS)
"""What takes no clamp behind it into itself."""
_LAYOUTS = frozenset({(0, 2, 3, 1), (0, 3, 1, 2)})
"""Transposes that put the channels of images last, and first: each undoes the other."""

_NO_HANDLE = 65535
"""Debug handle of what no node of the exported graph asked for, as upstream gives it."""


def simplify(graph: Contents, schema: Schema) -> bool:
    """Leave out copies, in place.

    Args:
        graph: of XNNPACK.
        schema: its schema.

    Returns:
        Whether the graph may be used. It may not where ops came together that XNNPACK would take
        for one, or fail on.
    """
    before = len(graph["xnodes"])
    moves = _Moves(graph, schema)
    risks = moves.risks()
    while any([moves.share_copies(), moves.read_before(), moves.undo(), moves.keep_layout()]):
        moves.drop_unread()
    if len(graph["xnodes"]) == before:
        return True
    moves.renumber()
    return moves.risks() <= risks


@dataclass(eq=False)
class _Op:
    """An op: its kind, its table and, by field, the values it reads."""

    kind: str
    table: Contents
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def output(self) -> int:
        return self.table.number(self.writes[0])

    def inputs(self) -> Iterator[tuple[str, int]]:
        """Fields, and the values they refer to."""
        for name in self.reads:
            if (value := self.table.number(name)) != INVALID_ID:
                yield name, value

    @property
    def order(self) -> tuple[int, ...] | None:
        """Of a transpose: the dim of its input that each dim of its result is.

        ``None`` of other ops, and of a copy that is written as a transpose.
        """
        if self.kind != _TRANSPOSE:
            return None
        order = tuple(int(d) for d in self.table["perm"])
        return None if order == tuple(range(len(order))) else order


@dataclass
class _Region:
    """Elementwise ops that would work in another layout.

    Attributes:
        values: what they write.
        absorbed: transposes behind them, that would give what they write.
        sources: what they would read instead, by op and field; of what stays where it is, in
            which dims.
    """

    values: set[int] = field(default_factory=set)
    absorbed: list[_Op] = field(default_factory=list)
    sources: list[tuple[_Op, str, int, tuple[int, ...] | None]] = field(default_factory=list)


class _Moves:
    """A graph, by value: what makes it, and what reads it."""

    def __init__(self, graph: Contents, schema: Schema) -> None:
        self.graph = graph
        self._kinds = [alias for alias, _ in schema.unions["XNodeUnion"]]
        self._fields = {
            table: tuple(name for name in fields if name.endswith("_id"))
            for table, fields in schema.tables.items()
        }
        self._outputs = frozenset(int(i) for i in graph["output_ids"])
        self._views: list[tuple[_Op | None, Contents]] = []  # new, and what they stand behind
        self._index()

    def _index(self) -> None:
        """Read ops, makers and readers anew."""
        self._ops = [self._op(node) for node in self.graph["xnodes"]]
        self._makers: dict[int, _Op] = {}
        self._readers: defaultdict[int, dict[_Op, None]] = defaultdict(dict)
        for op in self._ops:
            for name in op.writes:
                self._makers[op.table.number(name)] = op
            for _, value in op.inputs():
                self._readers[value][op] = None

    def _op(self, node: Contents) -> _Op:
        member = node["xnode_union"]
        names = self._fields[member.value.table]
        reads = tuple(name for name in names if not name.startswith("output"))
        writes = tuple(name for name in names if name.startswith("output"))
        return _Op(self._kinds[member.tag - 1], member.value, reads, writes)

    # What values are

    def _tensor(self, value: int) -> Contents:
        """The tensor that a value is."""
        union: Contents = self.graph["xvalues"][value]["xvalue_union"].value
        tensor: Contents = union["tensor_value"] or union
        return tensor

    def _dims(self, value: int) -> tuple[int, ...]:
        dims = self._tensor(value)["dims"]
        return () if dims is None else tuple(int(d) for d in dims)

    def _kind(self, value: int) -> str:
        """Type and parameters of a value, as text."""
        union: Contents = self.graph["xvalues"][value]["xvalue_union"].value
        return f"{self._tensor(value).number('datatype')} {union['quant_params']}"

    def _is_plain(self, value: int) -> bool:
        union: Contents = self.graph["xvalues"][value]["xvalue_union"].value
        params = union["quant_params"]
        per_tensor = params is None or params.value.table == "PerTensorQuant"
        return per_tensor and self._tensor(value).number("datatype") in _PLAIN_TYPES

    # Steps

    def share_copies(self) -> int:
        """One of several moves of a value to the same.

        Conversions are not shared: what stands between two, and nothing else reads, is a table.
        """
        known: dict[Any, int] = {}
        count = 0
        for op in self._ops:
            if op.kind not in _COPIES or (op.kind == _TRANSPOSE and op.order is None):
                continue
            if op.output in self._outputs:
                continue
            fields = ((name, _plain(value)) for name, value in sorted(op.table.fields.items()))
            rest = tuple(entry for entry in fields if entry[0] not in op.writes)
            key = op.kind, rest, self._dims(op.output), self._kind(op.output)
            if key in known:
                self._replace(op.output, known[key])
                count += 1
            else:
                known[key] = op.output
        return count

    def read_before(self) -> int:
        """Views that read what is before a view, or before a transpose of dims of size 1."""
        count = 0
        for op in self._ops:
            source = self._makers.get(op.table.number("input_id"))
            if op.kind != _VIEW or source is None:
                continue
            if any("Conv" in reader.kind for reader in self._readers[op.output]):
                continue  # whose columns it joins: what they were is read from it
            data = source.table.number("input_id")
            is_view = source.kind == _VIEW
            if is_view or (source.order and _same_order(self._dims(data), source.order)):
                self._read(op, "input_id", data)
                count += 1
        return count

    def undo(self) -> int:
        """Transposes that give back what another one was given."""
        count = 0
        for op in self._ops:
            source = self._before(op.table.number("input_id"), op.order)
            if source is None or op.output in self._outputs or not self._readers[op.output]:
                continue
            if self._is_plain(source) and self._kind(source) == self._kind(op.output):
                self._replace(op.output, source)
                count += 1
        return count

    def keep_layout(self) -> int:
        """Elementwise ops that work on what is before a transpose that one behind them undoes."""
        count = 0
        failed: set[tuple[int, tuple[int, ...]]] = set()
        for op in self._ops:
            order = op.order
            # An earlier step may have taken it along.
            if order not in _LAYOUTS or not self._readers[op.output]:
                continue
            value = op.table.number("input_id")
            if (value, order) in failed:
                continue
            region = _Region()
            if not self._fill(region, value, order) or not self._pays(region):
                # Each of these ops would have to take the others along.
                failed.update((value, order) for value in region.values)
                continue
            for value in region.values:
                dims = self._dims(value)
                self._tensor(value).fields["dims"] = _array([dims[d] for d in order])
            for reader, name, source, dims_of in region.sources:
                given = source if dims_of is None else self._viewed(source, dims_of)
                self._read(reader, name, given)
            for transpose in region.absorbed:
                self._replace(transpose.output, transpose.table.number("input_id"))
            count += 1
        return count

    def _fill(self, region: _Region, value: int, order: tuple[int, ...]) -> bool:
        """Find all that has to change if a value is to be written as a transpose would give it.

        Returns:
            Whether it can.
        """
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in region.values:
                continue
            maker = self._makers.get(value)
            if maker is None or maker.kind not in _ELEMENTWISE or value in self._outputs:
                return False
            if len(self._dims(value)) != len(order) or not self._is_plain(value):
                return False
            region.values.add(value)
            if len(region.values) > _MOST_OPS:
                return False
            for name, source in maker.inputs():
                if all(size == 1 for size in self._dims(source)):
                    continue  # one number is the same in all layouts
                before, dims = self._before(source, order), self._viewed_dims(source, order)
                if before is not None:
                    region.sources.append((maker, name, before, None))
                elif dims is not None:
                    region.sources.append((maker, name, source, dims))
                else:
                    waiting.append(source)
            for reader in self._readers[value]:
                if reader.order == order and reader.output not in self._outputs:
                    region.absorbed.append(reader)
                elif reader.kind in _ELEMENTWISE:
                    waiting.append(reader.output)
                else:
                    return False
        return True

    def _before(self, value: int, order: tuple[int, ...] | None) -> int | None:
        """What was transposed to a value, if a transpose of this order would give it back."""
        maker = self._makers.get(value)
        if order not in _LAYOUTS or maker is None or maker.order not in _LAYOUTS:
            return None
        if maker.order == order:
            return None
        return maker.table.number("input_id")

    def _viewed_dims(self, value: int, order: tuple[int, ...]) -> tuple[int, ...] | None:
        """Dims of a number or a row, such as one of each channel, for ops in another layout."""
        dims = self._dims(value)
        if not self._is_plain(value) or len(dims) > len(order):
            return None
        dims = (*[1] * (len(order) - len(dims)), *dims)
        return tuple(dims[d] for d in order) if sum(size != 1 for size in dims) < 2 else None

    def _pays(self, region: _Region) -> bool:
        """Whether there are fewer ops then."""
        given = {source for _, _, source, dims in region.sources if dims is not None}
        views = [source for source in given if not self._is_constant(source)]
        read = {op.table.number(name) for op, name, _, dims in region.sources if dims is None}
        unread = [
            value
            for value in read
            if all(reader.output in region.values for reader in self._readers[value])
        ]
        return len(region.absorbed) + len(unread) > len(views)

    def _is_constant(self, value: int) -> bool:
        return bool(self._tensor(value).number("constant_buffer_idx"))

    # Changes

    def _viewed(self, value: int, dims: Sequence[int]) -> int:
        """A value in other dims: another constant, or a view."""
        values: list[Contents] = self.graph["xvalues"]
        made = len(values)
        values.append(deepcopy(values[value]))
        self._tensor(made).fields |= {"dims": _array(dims), "num_dims": len(dims), "id_out": made}
        if self._is_constant(value):
            return made
        self._tensor(made).fields |= {"external_id": INVALID_ID, "flags": 0}
        view = Contents(
            _VIEW,
            {
                "num_dims": len(dims),
                # 0 is what is left, should that be dynamic.
                "new_shape": _array([0 if size != 1 else 1 for size in dims]),
                "input_id": value,
                "output_id": made,
                "flags": 0,
            },
        )
        member = Member(self._kinds.index(_VIEW) + 1, view)
        node = Contents("XNode", {"xnode_union": member, "debug_handle": _NO_HANDLE})
        self._views.append((self._makers.get(value), node))
        return made

    def _read(self, op: _Op, name: str, value: int) -> None:
        """Let an op read another value."""
        old = op.table.number(name)
        op.table.fields[name] = value
        if old not in (given for _, given in op.inputs()):
            self._readers[old].pop(op, None)
        self._readers[value][op] = None

    def _replace(self, old: int, new: int) -> None:
        """Let all that read a value read another one."""
        for reader in list(self._readers[old]):
            for name, value in list(reader.inputs()):
                if value == old:
                    self._read(reader, name, new)

    def drop_unread(self) -> None:
        """Leave out moves that nothing reads any more; put new views in place."""
        views: defaultdict[int, list[Contents]] = defaultdict(list)
        for maker, node in self._views:
            views[id(maker)].append(node)
        kept: list[Contents] = []
        for node, op in zip(reversed(self.graph["xnodes"]), reversed(self._ops), strict=True):
            kept += views[id(op)]
            if (
                op.kind in _COPIES
                and op.output not in self._outputs
                and not self._readers[op.output]
            ):
                for _, value in op.inputs():
                    self._readers[value].pop(op, None)
            else:
                kept.append(node)
        kept += views[id(None)]
        self.graph.fields["xnodes"] = kept[::-1]
        self._views.clear()
        self._index()

    def risks(self) -> int:
        """How many ops stand where XNNPACK might not compute what they say.

        It takes a clamp for a part of what makes its input, whatever the scale between them, and
        the transpose of an operand for a part of its product; and it fails on long chains.
        """
        return sum(map(self._is_risk, self._ops))

    def _is_risk(self, op: _Op) -> bool:
        makers = {value: self._makers.get(value) for _, value in op.inputs()}
        if op.kind in _CLAMPS:
            return any(
                maker is not None
                and maker.kind not in _KEEP_CLAMPS
                and self._kind(value) != self._kind(op.output)
                for value, maker in makers.items()
            )
        if op.kind == "XNNBatchMatrixMultiply":
            return any(maker is not None and maker.kind == _TRANSPOSE for maker in makers.values())
        return op.kind in _ELEMENTWISE and self._chain(op) >= CHAIN_LIMIT

    def _chain(self, op: _Op) -> int:
        """How many ops compute each number of a value of one that nothing else reads."""
        values, length = {v for _, v in op.inputs() if any(n != 1 for n in self._dims(v))}, 1
        if len(values) > 1:
            return 1
        while length < CHAIN_LIMIT:
            values.add(op.output)
            readers = self._readers[op.output]
            if len(readers) != 1:
                break
            (op,) = readers
            if op.kind not in _ELEMENTWISE:
                break
            others = {value for _, value in op.inputs()} - values
            if any(size != 1 for value in others for size in self._dims(value)):
                break
            length += 1
        return length

    def renumber(self) -> None:
        """Leave out values that no op refers to."""
        used = {value for op in self._ops for _, value in op.inputs()}
        used |= {op.table.number(name) for op in self._ops for name in op.writes}
        used |= {int(i) for name in ("input_ids", "output_ids") for i in self.graph[name]}
        values: list[Contents] = self.graph["xvalues"]
        numbers = {old: new for new, old in enumerate(sorted(used - {INVALID_ID}))}
        for op in self._ops:
            for name in (*op.reads, *op.writes):
                if (value := op.table.number(name)) != INVALID_ID:
                    op.table.fields[name] = numbers[value]
        for name in ("input_ids", "output_ids"):
            self.graph.fields[name] = _array([numbers[int(i)] for i in self.graph[name]])
        self._outputs = frozenset(numbers[i] for i in self._outputs)
        for old, new in numbers.items():
            self._tensor(old).fields["id_out"] = new
        self.graph.fields["xvalues"] = [values[old] for old in numbers]
        self._index()


def _same_order(dims: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a transpose leaves values where they are: dims of size 1 alone change places."""
    moved = [d for d in order if dims[d] != 1]
    return moved == sorted(moved)


def _array(numbers: Sequence[int]) -> Any:
    return np.array(numbers, "<u4")


def _plain(value: Any) -> Any:
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else value
