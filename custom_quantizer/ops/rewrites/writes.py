"""In-place ops as functions: an observer cannot stand between an op and its own input.

A write through a view, ``x[:, 1:] += y``, becomes a new value of the tensor that owns the memory,
with all that was not written as it was; who reads the memory later reads the new value. Where it is
not certain what shares memory (a reshape copies where it has to), or where the memory is a
buffer's, the op stays, and every tensor in that memory is marked
(:mod:`custom_quantizer.core.memory`). So it is where an input is written through a view; one that
is written as a whole becomes a value, too, and the caller's tensor keeps what it held.
"""

from __future__ import annotations

import itertools
import math
import operator
from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    describe,
    is_constant,
    is_same_shape,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.core.memory import (
    OVERWRITTEN,
    aliases_of,
    names_beside,
    overwritten_by,
    reached,
    shares_memory,
    viewed_by,
    written_inputs,
)
from custom_quantizer.core.rewriting import Insertion, replace
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.ops.rewrites.constants import MAX_GROWTH, restated

__all__ = ["copy_for_layers", "functionalize", "mark_overwritten", "write_whole"]

aten = torch.ops.aten


@cache
def functional_overload(target: Any) -> Any | None:
    """The out-of-place twin of an in-place overload, or ``None`` if it is not in-place."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    if packet is None:
        return None
    # `pow_.Scalar` is `pow.Tensor_Scalar` in place: `pow.Scalar` is a power of a number.
    names = sorted(packet.overloads(), key=lambda overload: overload != target._overloadname)
    twins = (getattr(packet, overload) for overload in names)
    return next((twin for twin in twins if _arguments(twin) == _arguments(target)), None)


def _arguments(target: Any) -> list[tuple[str, bool]]:
    """Types of the arguments of an overload; a tensor may go by another name in a twin."""
    return [(str(argument.type), argument.kwarg_only) for argument in target._schema.arguments]


def mark_overwritten(model: GraphModule) -> None:
    """Let :func:`overwritten_by` know what the writes of a graph reach.

    What ``canonicalize`` left in place it has marked; exporting a graph again loses that. A tensor
    is marked with the last write that reaches it, so that the last one is looked at first, and
    what it reaches no write before it has to visit.
    """
    marks: dict[Node, str] = {}
    writes = [(node, found) for node in model.graph.nodes if (found := written_inputs(node))]
    # What a write returns is a name of the memory for the writes that come later.
    new = {node for node, _ in writes if overwritten_by(node) is None}
    for node in new:
        node.meta[OVERWRITTEN] = describe(node)
    for node, (first, *others) in reversed(writes):
        for written in (*others, first):
            if written is first and node in new:
                node.meta.pop(OVERWRITTEN, None)
            names = set() if written in marks else aliases_of(written)
            for alias in (*names, node):
                marks.setdefault(alias, describe(node))
    for alias, mark in marks.items():
        alias.meta[OVERWRITTEN] = mark


def _is_view_in_place(node: Node, functional: Any) -> bool:
    """Whether a call writes no values: its tensor becomes a view of itself, as ``unsqueeze_`` does.

    Other names of the memory keep their shapes.
    """
    if torch.Tag.inplace_view not in cast("torch._ops.OpOverload", node.target).tags:
        return False
    return all(result.alias_info is not None for result in functional._schema.returns)


def _keeps_dtype(node: Node, written: Node, functional: Any) -> bool:
    """Whether the functional twin gives the dtype of the tensor that was written.

    It may give a wider one, and comparisons give booleans: ``x.gt_(0)`` writes floats.
    """
    meta = tensor_meta(written)
    mode = getattr(meta, "fake_mode", None)
    if meta is None or mode is None:
        return False
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    with mode, enable_python_dispatcher():
        result = functional(*args, **kwargs)
    return isinstance(result, torch.Tensor) and result.dtype == meta.dtype


_PutBack = Callable[[Insertion, Node], Node]
"""Makes the new value of a view's source of a new value of the view."""

_View = tuple[Node, _PutBack]
"""A view, and what makes the new value of its source of a new value of the view."""


def functionalize(model: GraphModule) -> bool:
    """Make in-place ops functional, and mark the tensors of those that stay.

    Returns:
        Whether there were any.
    """
    _copy_surely(model)
    writes = _Writes(model)
    found = False
    for node in list(model.graph.nodes):
        writes.read_current(node)
        for written in written_inputs(node):
            writes.make_functional(node, written)
            found = True
    writes.finish()
    writes.read_directly()
    _write_plainly(model)
    return found


def write_whole(model: GraphModule) -> None:
    """A buffer of which a part is written is written as a whole, with the rest as it was.

    As ``state[:, :-2] = state[:, 2:].clone()``, of which ``torch.export`` makes scatters that no
    backend has; slices and a concatenation they all have. Of several writes that nobody reads in
    between, the last is left.
    """
    pending: dict[Node, Node] = {}  # buffer -> its last write, since which nobody read it
    for node in list(model.graph.nodes):
        if shares_memory(node) and not written_inputs(node):
            continue  # a view reads nothing yet
        found = _views_of_buffer(node)
        if found is None:
            if any(overwritten_by(source) is not None for source in node.all_input_nodes):
                pending.clear()
            continue
        *views, buffer = found
        source, value = buffer, cast(Node, node.args[1])
        before = pending.get(buffer)
        if before is not None and overwritten_by(value) is None:
            # The rest is what that write would have left there.
            source = cast(Node, before.args[1])
            model.graph.erase_node(before)
        first, insert = node.prev, Insertion(model, node)
        copies = {buffer: source}
        for view in reversed(views):
            with model.graph.inserting_before(node):
                copies[view] = model.graph.node_copy(view, partial(_replaced, copies))
        for view in views:
            value = cast("_PutBack", _put_back(copies[view]))(insert, value)
        while (first := first.next) is not node:
            if shares_memory(first):
                # Else integers would be put together, and rounded in every call.
                first.meta[OVERWRITTEN] = overwritten_by(node)
        node.replace_all_uses_with(cast(Node, node.args[0]))
        node.args = (buffer, value)
        node.meta["val"] = buffer.meta["val"]
        pending = {buffer: node}


def _views_of_buffer(write: Node) -> list[Node] | None:
    """From what is written to the buffer, both included, if a call copies values into a view."""
    if write.target is not aten.copy_.default or overwritten_by(write) is None:
        return None
    written, value = cast("tuple[Node, Any]", write.args[:2])
    if not isinstance(value, Node) or not _is_like(written, value):
        return None
    views: list[Node] = []
    while shares_memory(written) and not written_inputs(written):
        views.append(written)
        written = cast(Node, written.args[0])
    known = written.op == "get_attr" and all(map(_put_back, views))
    return [*views, written] if known else None


def _is_like(a: Node, b: Node) -> bool:
    """Whether two tensors have one dtype, and one shape of numbers."""
    first, second = tensor_meta(a), tensor_meta(b)
    if first is None or second is None or not are_static((*first.shape, *second.shape)):
        return False
    return (first.shape, first.dtype) == (second.shape, second.dtype)


def copy_for_layers(model: GraphModule) -> None:
    """Let layers read a copy of memory that is written in place, as of a state that a call changes.

    It is made just before the layer and holds what the layer would read; no write reaches it, so
    that it can be quantized. Other ops read the memory itself: for them a copy and a quantize step
    are most of the work.
    """
    copies: dict[Node, Node] = {}
    for node in list(model.graph.nodes):
        if written_inputs(node):
            copies.clear()
        if node.target not in _LAYERS:
            continue
        data = cast(Node, node.args[0])
        if overwritten_by(data) is not None:
            if data not in copies:
                copies[data] = Insertion(model, node).call(aten.clone.default, data)
            node.update_arg(0, copies[data])


_LAYERS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets


def _copy_surely(model: GraphModule) -> None:
    """What strides made a copy at capture is one whatever strides its source will have.

    The flatten of a part of a tensor is a copy. What a function gives in the place of a write into
    that part may be contiguous, and its flatten a view.
    """
    names: set[Node] = set()
    for start in [source for node in model.graph.nodes for source in written_inputs(node)]:
        if start not in names:
            names |= reached(start, names_beside)
    for node in [node for node in model.graph.nodes if node in names]:
        if node.op != "call_function" or node.target in _CERTAIN or not _is_stride_copy(node):
            continue
        order = torch.contiguous_format
        if node.target is aten.contiguous.default:
            order = argument(node, 1, "memory_format", order)
        insert = Insertion(model, node)
        copied = insert.call(aten.clone.default, node.args[0], memory_format=order)
        sizes = view_sizes(shape_of(node))
        if sizes.count(-1) > 1:
            node.replace_input_with(cast(Node, node.args[0]), copied)
            continue
        if not is_same_shape(shape_of(node), shape_of(copied)):
            copied = insert.call(aten.view.default, copied, sizes)
        replace(model, node, copied)


def _is_stride_copy(node: Node) -> bool:
    """Whether a call copied at capture what it views where strides are others."""
    if tuple(viewed_by(node)) != node.args[:1] or tensor_meta(node) is None:
        return False
    values = {source: _as_captured(source.meta.get("val")) for source in node.all_input_nodes}
    if None in values.values():
        return False
    args, kwargs = torch.fx.node.map_arg((node.args[1:], node.kwargs), values.__getitem__)
    # Tensors without values stay where they are.
    args, kwargs = pytree.tree_map_only(
        torch.device, lambda _: torch.device("meta"), (args, dict(kwargs))
    )

    def is_copy(value: Tensor) -> bool:
        result = cast("Callable[..., Tensor]", node.target)(value, *args, **kwargs)
        return bool(result.untyped_storage()._cdata != value.untyped_storage()._cdata)

    given = cast(Tensor, values[cast(Node, node.args[0])])
    if not is_copy(given):
        return False
    in_order = torch.empty_like(given, memory_format=torch.contiguous_format)
    return node.target is aten.contiguous.default or not is_copy(in_order)


def _as_captured(value: Any) -> Any | None:
    """A tensor without values, laid out as the example's, or its size; ``None``: not known."""
    if isinstance(value, Tensor):
        layout: list[Any] = [_as_captured(size) for size in (*value.shape, *value.stride())]
        if None in layout:
            return None
        sizes, strides = layout[: value.dim()], layout[value.dim() :]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    return value if isinstance(value, int) else getattr(getattr(value, "node", None), "hint", None)


class _Memory:
    """One piece of memory at some place of a graph: its names.

    Attributes:
        names: tensors that were made before that place and show what is in the memory there.
        unread: of these, what nobody reads any more.
        owners: names that are views of nothing.
        later: names that are made behind it, the last one first.
        read_later: how many of these anybody reads.
        last_write: where the last of the names is written.
        uncertain_later: where those names are made, the last one first, that may be copies.
        is_state: whether a buffer is among its names.
    """

    def __init__(self, names: Iterable[Node], order: Mapping[Node, int], position: int) -> None:
        found = sorted(names, key=order.__getitem__)
        self.names = {name: None for name in found if order[name] < position}
        self.unread: dict[Node, None] = {}
        self.owners = [name for name in found if not shares_memory(name)]
        self.later = [name for name in reversed(found) if order[name] >= position]
        self.read_later = sum(bool(name.users) for name in self.later)
        writes = (order[u] for name in found for u in name.users if name in written_inputs(u))
        self.last_write = max(writes, default=-1)
        self.uncertain_later = [order[name] for name in self.later if _is_uncertain(name)]
        self.is_state = any(name.op == "get_attr" for name in found)
        self._order, self._position = order, position
        # The last write that stays, which names it reaches, and which came after it.
        self._mark = ""
        self._marked: dict[Node, None] = {}
        self._unmarked = dict(self.names)
        self._unmarked_later = list(self.later)

    def go_to(self, position: int) -> None:
        """Count as names what was made before a place further on."""
        self._position = position
        while self.uncertain_later and self.uncertain_later[-1] < position:
            self.uncertain_later.pop()
        while self.later and self._order[self.later[-1]] < position:
            name = self.later.pop()
            self.read_later -= bool(name.users)
            self.names[name] = None
            if name not in self._marked:
                self._unmarked[name] = None

    def join(self, other: _Memory) -> None:
        """Add the names of what is the same memory from here on."""
        self.names |= other.names
        self.owners += [name for name in other.names if not shares_memory(name)]
        self._unmarked |= other.names
        for name in other.later:
            insort(self.later, name, key=lambda node: -self._order[node])
        self._unmarked_later += other.later
        self.read_later += other.read_later
        self.last_write = max(self.last_write, other.last_write)
        for position in other.uncertain_later:
            insort(self.uncertain_later, position, key=lambda made: -made)
        self.is_state = self.is_state or other.is_state

    def may_write_a_copy(self) -> bool:
        """Whether what may be a copy is made before a write that is still to come.

        Who only reads it finds the same values in a copy.
        """
        return bool(self.uncertain_later) and self.uncertain_later[-1] < self.last_write

    def put_mark(self, mark: str) -> None:
        """Mark all names with a write that stays; nodes show it when they are flushed."""
        later = (name for name in self._unmarked_later if self._order[name] >= self._position)
        self._marked |= self._unmarked | dict.fromkeys(later)
        self._unmarked, self._unmarked_later = {}, []
        self._mark = mark

    def is_marked(self, name: Node) -> bool:
        """Whether a write that stays reaches a name."""
        return name in self._marked

    def flush(self, names: Iterable[Node] | None = None) -> None:
        """Write the mark of names, or of all names, into their nodes."""
        if not self._marked:
            return
        for name in list(self._marked if names is None else names):
            if name in self._marked:
                name.meta[OVERWRITTEN] = self._mark
                del self._marked[name]

    def become(self, names: Iterable[Node]) -> None:
        """From here on these are the names of the values, next to those that are made later."""
        self.flush(self.names | self.unread)
        self.names, self.unread = dict.fromkeys(names), {}
        self.owners = [name for name in self.names if not shares_memory(name)]
        self._unmarked = dict(self.names)

    def rename(self, old: Node, new: Node) -> None:
        """Put a name in the place of another one, which is of other memory now."""
        self.flush([old])
        self.owners = [new if owner is old else owner for owner in self.owners]
        for names in (self.names, self.unread, self._unmarked):
            names.pop(old, None)
        self.names[new] = self._unmarked[new] = None


def _is_uncertain(name: Node) -> bool:
    """Whether somebody reads what may be a view or a copy."""
    return bool(name.users) and name.target not in _CERTAIN


class _Writes:
    """The writes of a graph, one after the other.

    A node that comes later reads what holds the values by then, once the walk has come to it.

    Attributes:
        _order: positions of nodes; what takes the place of one has its position.
        _last_read: position of the last node that reads a tensor, or what takes its place.
        _current: by tensor, what holds its values from here on.
        _memories: by name.
        _equal: by source and arguments of a view, a value that is equal to it. The view stays until
            all writes are known: one that comes later may go through it.
    """

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._order = {node: i for i, node in enumerate(model.graph.nodes)}
        self._last_read = dict.fromkeys(self._order, -1)
        for node, position in self._order.items():
            for source in node.all_input_nodes:
                self._last_read[source] = position
        self._current: dict[Node, Node] = {}
        self._memories: dict[Node, _Memory] = {}
        self._equal: dict[tuple[Node, str], Node] = {}

    def read_current(self, node: Node) -> None:
        """Let ``node`` read what holds the values that it would have read."""
        for source in node.all_input_nodes:
            now = source
            while now in self._current:
                now = self._current[now]
            passed = source
            while passed is not now:
                self._current[passed], passed = now, self._current[passed]
            if now is not source:
                node.replace_input_with(source, now)

    def finish(self) -> None:
        """Mark the names of what is still written in place."""
        for memory in {id(memory): memory for memory in self._memories.values()}.values():
            memory.flush()

    def make_functional(self, node: Node, written: Node) -> None:
        """Put a function in the place of ``node``, or mark what it writes."""
        if node.target is aten.copy_.default and self._is_same(written, node.args[1]):
            # What ``x[1:] += y`` ends with: its result is assigned to where it is.
            if written in self._memories:
                memory = self._memory(written, node)
                self._join(memory, self._results(node), node)
                if written in memory.unread:
                    del memory.unread[written]
                    memory.names[written] = None
            self._take_over(written, node)
            node.replace_all_uses_with(written)
            self._model.graph.erase_node(node)
            return
        memory, results = self._memory(written, node), self._results(node)
        functional = functional_overload(node.target)
        if functional is not None and _is_view_in_place(node, functional):
            node.meta["original_target"] = node.target
            node.target = functional
            self._read(written, node, node)
            self._join(memory, results)
            return
        # A write through a view changes what is later read under another name.
        late = self._read_later(memory, node)
        seen = bool(memory.read_later) or any(name is not written for name in late)
        views = self._views_to_owner(written, late, memory) if seen else []
        stays = memory.is_state or functional is None or not _keeps_dtype(node, written, functional)
        if stays or functional is None or views is None:
            self._keep_strides(memory)
            memory.put_mark(describe(node))
            node.meta[OVERWRITTEN] = describe(node)
            self._join(memory, results)
        elif seen:
            self._write_through(node, written, functional, views, memory, late)
            self._join(memory, results, node)
        else:
            node.meta["original_target"] = node.target
            node.target = functional
            self._read(written, node, node)
            memory.become(())
            self._join(memory, results)

    def _memory(self, name: Node, node: Node) -> _Memory:
        """The memory of a tensor that ``node`` reads."""
        position = self._order[node]
        if name not in self._memories:
            names = aliases_of(name)
            memory = _Memory(names, self._order, position)
            self._memories.update(dict.fromkeys(names, memory))
        memory = self._memories[name]
        memory.go_to(position)
        return memory

    def _results(self, node: Node) -> _Memory:
        """What ``node`` returns, as if it were in memory of its own."""
        names = aliases_of(node)
        return _Memory(names, self._order, self._order[node] + 1)

    def _join(self, memory: _Memory, results: _Memory, gone: Node | None = None) -> None:
        """Let what an op returns be names of the memory that it wrote; ``gone``: but this one."""
        if gone is not None:
            results.become(name for name in results.names if name is not gone)
        memory.join(results)
        self._memories.update(dict.fromkeys((*results.names, *results.later), memory))

    def _keep_strides(self, memory: _Memory) -> None:
        """Copy with the strides of capture, where they tell which names share the memory.

        A flatten is a view of what is contiguous, and a copy of other tensors. What an op gives may
        be laid out in another way once those before it are rewritten.

        Args:
            memory: what is written in place.
        """
        certain = _CERTAIN - {aten.view.default}
        for owner in memory.owners:
            meta = tensor_meta(owner)
            if owner.op != "call_function" or meta is None or _is_contiguous_copy(owner):
                continue
            if not are_static(meta.shape):
                continue
            names = chain(memory.unread, memory.names, memory.later)
            views = (name for name in names if name is not owner)
            if all(view.target in certain for view in views) or not meta.is_contiguous():
                continue
            readers = list(owner.users)
            copied = Insertion(self._model, owner).call(
                aten.clone.default, owner, memory_format=torch.contiguous_format
            )
            owner.append(copied)  # it was inserted before what it reads
            self._order[copied] = self._order[owner]
            for reader in readers:
                reader.replace_input_with(owner, copied)
            self._take_over(copied, owner)
            self._current[owner] = copied
            memory.rename(owner, copied)
            self._memories[copied] = memory

    def _is_read_after(self, name: Node, node: Node) -> bool:
        return self._last_read[name] > self._order[node]

    def _read_later(self, memory: _Memory, node: Node) -> list[Node]:
        """Names of a memory that somebody reads after ``node``; others are not looked at again."""
        late = [name for name in memory.names if self._is_read_after(name, node)]
        memory.unread |= memory.names
        for name in late:
            del memory.unread[name]
        memory.names = dict.fromkeys(late)
        return late

    def _take_over(self, new: Node, old: Node) -> None:
        """Note that who reads ``old`` later will read ``new``."""
        self._last_read[new] = max(self._last_read.get(new, -1), self._last_read[old])

    def _read(self, old: Node, new: Node, node: Node) -> None:
        """Let who reads ``old`` after ``node`` read ``new``."""
        if self._is_read_after(old, node):
            self._take_over(new, old)
            self._current[old] = new
            self._last_read[old] = self._order[node]

    def read_directly(self) -> None:
        """Let who reads a view of what was written read what was written there."""
        found: dict[Node, Node] = {}
        for node in list(self._model.graph.nodes):
            known = found[node] = self._known(node, found)
            if known is not node and overwritten_by(node) is None and overwritten_by(known) is None:
                node.replace_all_uses_with(known)

    def _is_same(self, written: Node, value: object) -> bool:
        """Whether a value is the one that stands where it is written to."""
        memory = self._memories.get(written)
        return (
            isinstance(value, Node)
            and self._known(written) is self._known(value)
            and overwritten_by(written) is None
            and not (memory is not None and memory.is_marked(written))
        )

    def _known(self, value: Node, found: Mapping[Node, Node] = MappingProxyType({})) -> Node:
        """A value that ``value``, which may be a view, is equal to; ``found``: of other nodes."""
        views: list[Node] = []  # of one another: graphs may have more than Python nests calls
        while value not in found and shares_memory(value):
            if not value.args or not isinstance(value.args[0], Node):
                break
            views.append(value)
            value = value.args[0]
        value = found.get(value, value)
        for view in reversed(views):
            value = self._equal.get((value, _what(view)), view)
        return value

    def _views_to_owner(
        self, written: Node, late: list[Node], memory: _Memory
    ) -> list[_View] | None:
        """The views from what is written to what owns the memory.

        ``None``: it is not certain what shares the memory, or only writing in place reaches it.
        """
        views: list[_View] = []
        owner = written
        while shares_memory(owner):
            put_back = _put_back(owner)
            if put_back is None:
                return None
            views.append((owner, put_back))
            owner = cast(Node, owner.args[0])
        if memory.may_write_a_copy():
            return None
        for name in late:
            while name is not owner:
                if name.target not in _CERTAIN:
                    return None
                name = cast(Node, name.args[0])
        return views if owner.op == "call_function" else None

    def _write_through(
        self,
        node: Node,
        written: Node,
        functional: Any,
        views: list[_View],
        memory: _Memory,
        late: list[Node],
    ) -> None:
        memory.flush(
            memory.names | memory.unread
        )  # views of the new value are copies, with their marks
        first = node.prev
        insert = Insertion(self._model, node)
        result = value = insert.call(functional, *node.args, **node.kwargs)
        owner = written
        for view, put_back in views:
            inner, owner = value, cast(Node, view.args[0])
            value = put_back(insert, inner)
            self._equal[value, _what(view)] = inner
        values = {owner: value}

        def derived(alias: Node) -> Node:
            """The same view of the new value, through which more may be written."""
            passed = []  # graphs may have more views of views than Python nests calls
            while alias not in values:
                passed.append(alias)
                alias = cast(Node, alias.args[0])
            new = values[alias]
            for view in reversed(passed):
                replaced = {cast(Node, view.args[0]): new}
                with self._model.graph.inserting_before(node):
                    new = self._model.graph.node_copy(view, partial(_replaced, replaced))
                values[view] = new
            return new

        changed = {alias: derived(alias) for alias in late}
        after = derived(written)
        added: set[Node] = set()
        last = node.prev
        while last is not first:
            self._order[last] = self._order[node]
            self._last_read[last] = self._order[node]
            added.add(last)
            last = last.prev
        for alias, new in changed.items():
            self._read(alias, new, node)
        self._take_over(after, node)
        node.replace_all_uses_with(after)
        self._model.graph.erase_node(node)
        result.name = node.name
        names = reached(value, lambda name: [n for n in names_beside(name) if n in added])
        memory.become(names)
        self._memories.update(dict.fromkeys(names, memory))


def _replaced(replaced: Mapping[Node, Node], node: Node) -> Node:
    return replaced.get(node, node)


def _is_contiguous_copy(node: Node) -> bool:
    """Whether a tensor has the strides of its sizes, whatever it is a copy of."""
    layout = node.kwargs.get("memory_format")
    return node.target is aten.clone.default and layout is torch.contiguous_format


def _what(view: Node) -> str:
    """What a view takes of its source."""
    return f"{view.target} {view.args[1:]} {view.kwargs}"


_CERTAIN = frozenset(
    {
        *(operator.getitem, aten.slice.Tensor, aten.select.int, aten.view.default),
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default),
        *(aten.detach.default, aten.alias.default, aten.unbind.int, aten.chunk.default),
        *(aten.split.Tensor, aten.split_with_sizes.default),
    }
)
"""Ops whose results share memory with their first argument in any case."""

_SAME_ORDER = frozenset(
    {
        *(aten.view.default, aten.detach.default, aten.alias.default, aten.unsqueeze.default),
        *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    }
)
"""Views of all of a tensor, whose values are in its order."""


def _put_back(view: Node) -> _PutBack | None:
    """What makes the new value of a view's source of a new value of the view, if that is known."""
    source = view.args[0]
    if not isinstance(source, Node) or tensor_meta(source) is None:
        return None
    shape: tuple[Any, ...] = shape_of(source)  # sizes may be symbolic
    if view.target in _SAME_ORDER and are_static(shape):
        return lambda insert, value: insert.reshape(value, shape)
    if view.target is aten.transpose.int:
        a, b = view.args[1:]
        return lambda insert, value: insert.call(aten.transpose.int, value, a, b)
    if view.target is aten.permute.default:
        order = [int(dim) % len(shape) for dim in cast("list[int]", view.args[1])]
        back = sorted(range(len(shape)), key=order.__getitem__)
        return lambda insert, value: insert.permute(value, back)
    if view.target in (aten.slice.Tensor, aten.select.int):
        dim = int(argument(view, 1, "dim", 0)) % len(shape)
        size = shape[dim]
        if not isinstance(size, int):
            return None
        if view.target is aten.select.int:
            index = argument(view, 2, "index")
            if not isinstance(index, int):
                return None
            start = index % size
            return partial(_between, source, dim, start, start + 1, is_row=True)
        start, stop = argument(view, 2, "start", None), argument(view, 3, "end", None)
        step = argument(view, 4, "step", 1)
        if any(isinstance(at, Node) for at in (start, stop, step)):
            return None
        start, stop, _ = slice(start, stop).indices(size)
        if step == 1:
            return partial(_between, source, dim, start, max(start, stop), is_row=False)
        return lambda insert, value: insert.call(
            aten.slice_scatter.default, source, value, dim, start, stop, step
        )
    return None


def _between(
    source: Node,
    dim: int,
    start: int,
    stop: int,
    insert: Insertion,
    value: Node,
    *,
    is_row: bool,
) -> Node:
    """``source`` with ``value`` in the place of ``source[start:stop]`` along a dim."""
    size = shape_of(source)[dim]
    row = insert.call(aten.unsqueeze.default, value, dim) if is_row else value
    parts = [
        *_range(insert, source, dim, 0, start),
        row,
        *_range(insert, source, dim, stop, size),
    ]
    return row if len(parts) == 1 else insert.call(aten.cat.default, parts, dim)


def _range(insert: Insertion, source: Node, dim: int, start: int, stop: int) -> list[Node]:
    """Tensors that are ``source[start:stop]`` along a dim, one behind the other.

    Of what was put together those that lie in it, which nobody has to take apart again.
    """
    if start >= stop:
        return []
    rank = len(shape_of(source))
    joined = source.target is aten.cat.default and int(argument(source, 1, "dim", 0)) % rank == dim
    parts = cast("list[Node]", source.args[0]) if joined else []
    shapes = [shape_of(part) for part in parts]
    if parts and all(len(shape) == rank and isinstance(shape[dim], int) for shape in shapes):
        ends = [0, *itertools.accumulate(shape[dim] for shape in shapes)]
        if start in ends and stop in ends:
            inside = parts[ends.index(start) : ends.index(stop)]
            if not any(map(overwritten_by, (source, *inside))):
                return inside
    return [insert.slice(source, dim, start, stop)]


def _write_plainly(model: GraphModule) -> None:
    """What a tensor is overwritten with is that, not an op on what was there before."""
    for node in list(model.graph.nodes):
        if overwritten_by(node) is not None:
            continue
        _fill_places(model, node)
        if node.target not in _OVERWRITE_ALL:
            continue
        kept = tensor_meta(cast(Node, node.args[0]))
        if kept is None:
            continue
        is_static = are_static(kept.shape)
        if node.target is not aten.copy.default:
            if not is_static:
                continue
            number = argument(node, 1, "value", 0)
            if isinstance(number, (int, float)):
                value = torch.full(kept.shape, number, dtype=kept.dtype)
                replace(model, node, Insertion(model, node).constant("value", value))
            continue
        given = cast(Node, node.args[1])
        meta = tensor_meta(given)
        if meta is None or meta.dtype != kept.dtype or overwritten_by(given) is not None:
            continue
        if is_same_shape(meta.shape, kept.shape):
            node.replace_all_uses_with(given)
        elif is_static:
            node.target, node.args = aten.expand.default, (given, list(kept.shape))


def _fill_places(model: GraphModule, node: Node) -> None:
    """One number that is put in places that are always the same fills a mask of these."""
    arguments: Any = node.args
    if node.target is aten.index_put.default and not argument(node, 3, "accumulate", False):
        data, indices, value = arguments[:3]
    elif node.target in (aten.index_fill.int_Scalar, aten.index_fill.int_Tensor):
        data, dim, index, value = arguments
        indices = [*[None] * (dim % max(len(shape_of(data)), 1)), index]
    else:
        return
    places = [_stored(model, index) for index in indices]
    number = _stored(model, value) if isinstance(value, Node) else torch.tensor(value)
    known = all(i is None or place is not None for i, place in zip(indices, places, strict=True))
    if not known or number is None or number.numel() != 1:
        return
    # Dims before the first index are filled alike, whatever sizes they have.
    before = next(i for i, place in enumerate(places) if place is not None)
    shape = [1] * before + list(shape_of(data)[before:])
    if not are_static(shape) or math.prod(shape) > MAX_GROWTH:
        return
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(None) if place is None else place for place in places)] = True
    insert = Insertion(model, node)
    filled = insert.call(
        aten.masked_fill.Scalar, data, insert.constant("places", mask), number.item()
    )
    replace(model, node, filled)


def _stored(model: GraphModule, source: Node | None) -> Tensor | None:
    """The values of a constant, also of one that is only handed on."""
    source = source and restated(source)
    if source is None or not is_constant(source) or overwritten_by(source) is not None:
        return None
    return constant_of(model, source)


_OVERWRITE_ALL = frozenset({aten.copy.default, aten.fill.Scalar, aten.zero.default})
"""Ops of whose first argument only shape and dtype count."""
