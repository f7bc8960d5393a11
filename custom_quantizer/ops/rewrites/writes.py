"""In-place ops as functions: an observer cannot stand between an op and its own input.

A write through a view, ``x[:, 1:] += y``, becomes a new value of the tensor that owns the memory,
with all that was not written as it was; who reads the memory later reads the new value. Where it is
not certain what shares memory (a reshape copies where it has to), or where the memory is a
buffer's, the op stays, and every tensor in that memory is marked
(:mod:`custom_quantizer.core.memory`). So it is where an input is written through a view; one that
is written as a whole becomes a value, too, and the caller's tensor keeps what it held.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import argument, describe, shape_of, tensor_meta
from custom_quantizer.core.memory import (
    OVERWRITTEN,
    aliases_of,
    overwritten_by,
    shares_memory,
    written_inputs,
)
from custom_quantizer.core.rewriting import Insertion, replace

__all__ = ["functionalize", "mark_overwritten"]

aten = torch.ops.aten


def functional_overload(target: Any) -> Any | None:
    """The out-of-place twin of an in-place overload, or ``None`` if it is not in-place."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def mark_overwritten(model: GraphModule) -> None:
    """Let :func:`overwritten_by` know what the writes of a graph reach.

    What :func:`canonicalize` left in place it has marked; exporting a graph again loses that. A
    tensor is marked with the last write that reaches it, so that the last one is looked at first,
    and what it reaches no write before it has to visit.
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
    with mode:
        result = functional(*args, **kwargs)
    return isinstance(result, torch.Tensor) and result.dtype == meta.dtype


_View = tuple[Node, Callable[[Insertion, Node], Node]]
"""A view, and what makes the new value of its source of a new value of the view."""


def functionalize(model: GraphModule) -> None:
    """Make in-place ops functional, and mark the tensors of those that stay."""
    writes = _Writes(model)
    for node in list(model.graph.nodes):
        for written in written_inputs(node):
            writes.make_functional(node, written)
    writes.read_directly()
    _write_plainly(model)


class _Writes:
    """The writes of a graph, one after the other.

    Attributes:
        _order: positions of nodes; what takes the place of one has its position.
        _equal: by source and arguments of a view, a value that is equal to it. The view stays until
            all writes are known: one that comes later may go through it.
    """

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._order = {node: i for i, node in enumerate(model.graph.nodes)}
        self._equal: dict[tuple[Node, str], Node] = {}

    def make_functional(self, node: Node, written: Node) -> None:
        """Put a function in the place of ``node``, or mark what it writes."""
        if node.target is aten.copy_.default and self._is_same(written, node.args[1]):
            # What ``x[1:] += y`` ends with: its result is assigned to where it is.
            node.replace_all_uses_with(written)
            self._model.graph.erase_node(node)
            return
        functional = functional_overload(node.target)
        if functional is not None and _is_view_in_place(node, functional):
            node.meta["original_target"] = node.target
            node.target = functional
            self._read(written, node, node)
            return
        aliases = aliases_of(written)
        stateful = any(alias.op == "get_attr" for alias in aliases)
        # A write through a view changes what is later read under another name.
        others = aliases - {written}
        seen = any(self._later(alias, node) for alias in others)
        views = self._views_to_owner(node, written, aliases) if seen else []
        stays = stateful or functional is None or not _keeps_dtype(node, written, functional)
        if stays or functional is None or views is None:
            written = self._keep_strides(written, aliases)
            for alias in (*aliases_of(written), node):
                alias.meta[OVERWRITTEN] = describe(node)
        elif seen:
            self._write_through(node, written, functional, views, aliases)
        else:
            node.meta["original_target"] = node.target
            node.target = functional
            self._read(written, node, node)

    def _keep_strides(self, written: Node, aliases: set[Node]) -> Node:
        """A copy with the strides of capture, where they tell which names share the memory.

        A flatten is a view of what is contiguous, and a copy of other tensors. What an op gives may
        be laid out in another way once those before it are rewritten.

        Args:
            written: a tensor that is written in place.
            aliases: all names of its memory.

        Returns:
            The tensor that is written now: ``written``, or its copy.
        """
        certain = _CERTAIN - {aten.view.default}
        for owner in [alias for alias in aliases if not shares_memory(alias)]:
            meta = tensor_meta(owner)
            if owner.op != "call_function" or meta is None or _is_contiguous_copy(owner):
                continue
            if not all(isinstance(size, int) for size in meta.shape):
                continue
            names = aliases - {owner}
            if all(name.target in certain for name in names) or not meta.is_contiguous():
                continue
            readers = list(owner.users)
            copied = Insertion(self._model, owner).call(
                aten.clone.default, owner, memory_format=torch.contiguous_format
            )
            owner.append(copied)  # it was inserted before what it reads
            self._order[copied] = self._order[owner]
            for reader in readers:
                reader.replace_input_with(owner, copied)
            written = copied if written is owner else written
        return written

    def _later(self, alias: Node, node: Node) -> list[Node]:
        """Who reads ``alias`` after ``node``."""
        return [user for user in alias.users if self._order[user] > self._order[node]]

    def _read(self, old: Node, new: Node, node: Node) -> None:
        """Let who reads ``old`` after ``node`` read ``new``."""
        for user in self._later(old, node):
            if user is not node:
                user.replace_input_with(old, new)

    def read_directly(self) -> None:
        """Let who reads a view of what was written read what was written there."""
        found: dict[Node, Node] = {}
        for node in list(self._model.graph.nodes):
            known = found[node] = self._known(node, found)
            if known is not node and overwritten_by(node) is None and overwritten_by(known) is None:
                node.replace_all_uses_with(known)

    def _is_same(self, written: Node, value: object) -> bool:
        """Whether a value is the one that stands where it is written to."""
        return (
            isinstance(value, Node)
            and self._known(written) is self._known(value)
            and overwritten_by(written) is None
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

    def _views_to_owner(self, node: Node, written: Node, aliases: set[Node]) -> list[_View] | None:
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
        for alias in aliases:
            name = alias if self._later(alias, node) else owner
            while name is not owner:
                if name.target not in _CERTAIN:
                    return None
                name = cast(Node, name.args[0])
        return views if owner.op == "call_function" else None

    def _write_through(
        self, node: Node, written: Node, functional: Any, views: list[_View], aliases: set[Node]
    ) -> None:
        late = [
            alias
            for alias in aliases
            if self._order[alias] < self._order[node] and self._later(alias, node)
        ]
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
            if alias not in values:
                source = cast(Node, alias.args[0])
                new = derived(source)
                with self._model.graph.inserting_before(node):
                    values[alias] = self._model.graph.node_copy(
                        alias, lambda arg: new if arg is source else arg
                    )
            return values[alias]

        changed = {alias: derived(alias) for alias in late}
        after = derived(written)
        added = node.prev
        while added not in self._order:
            self._order[added] = self._order[node]
            added = added.prev
        for alias, new in changed.items():
            self._read(alias, new, node)
        node.replace_all_uses_with(after)
        self._model.graph.erase_node(node)
        result.name = node.name


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


def _put_back(view: Node) -> Callable[[Insertion, Node], Node] | None:
    """What makes the new value of a view's source of a new value of the view, if that is known."""
    source = view.args[0]
    if not isinstance(source, Node) or tensor_meta(source) is None:
        return None
    shape: tuple[Any, ...] = shape_of(source)  # sizes may be symbolic
    if view.target in _SAME_ORDER and all(isinstance(size, int) for size in shape):
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
        if argument(view, 4, "step", 1) != 1 or any(isinstance(at, Node) for at in (start, stop)):
            return None
        start, stop, _ = slice(start, stop).indices(size)
        return partial(_between, source, dim, start, max(start, stop), is_row=False)
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
    parts = [row]
    if start > 0:
        parts.insert(0, insert.slice(source, dim, 0, start))
    if stop < size:
        parts.append(insert.slice(source, dim, stop, size))
    return row if len(parts) == 1 else insert.call(aten.cat.default, parts, dim)


def _write_plainly(model: GraphModule) -> None:
    """What a tensor is overwritten with is that, not an op on what was there before."""
    for node in list(model.graph.nodes):
        if overwritten_by(node) is not None or node.target not in _OVERWRITE_ALL:
            continue
        kept = tensor_meta(cast(Node, node.args[0]))
        if kept is None or not all(isinstance(size, int) for size in kept.shape):
            continue
        if node.target is not aten.copy.default:
            number = argument(node, 1, "value", 0)
            if isinstance(number, (int, float)):
                value = torch.full(kept.shape, number, dtype=kept.dtype)
                replace(model, node, Insertion(model, node).constant("value", value))
            continue
        given = cast(Node, node.args[1])
        meta = tensor_meta(given)
        if meta is None or meta.dtype != kept.dtype or overwritten_by(given) is not None:
            continue
        if meta.shape == kept.shape:
            node.replace_all_uses_with(given)
        else:
            node.target, node.args = aten.expand.default, (given, list(kept.shape))


_OVERWRITE_ALL = frozenset({aten.copy.default, aten.fill.Scalar, aten.zero.default})
"""Ops of whose first argument only shape and dtype count."""
