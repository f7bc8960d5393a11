"""Whose memory is whose in a captured graph, and what is written there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

__all__ = [
    "OVERWRITTEN",
    "UNSAID",
    "aliases_of",
    "names_beside",
    "overwritten_by",
    "reached",
    "shares_memory",
    "viewed_by",
    "written_inputs",
]

aten = torch.ops.aten

OVERWRITTEN = "custom_quantizer_overwritten"
"""Key in ``node.meta`` of what :func:`overwritten_by` returns."""

UNSAID: Mapping[Any, int] = MappingProxyType(
    {
        operator.getitem: 0,
        **dict.fromkeys((aten.alpha_dropout.default, aten.dropout.default), 0),
        **dict.fromkeys((aten.feature_alpha_dropout.default, aten.feature_dropout.default), 0),
        **dict.fromkeys((aten.atleast_1d.default, aten.atleast_1d.Sequence), 0),
        **dict.fromkeys((aten.atleast_2d.default, aten.atleast_2d.Sequence), 0),
        **dict.fromkeys((aten.atleast_3d.default, aten.atleast_3d.Sequence), 0),
        **dict.fromkeys((aten.meshgrid.default, aten.meshgrid.indexing), 0),
        **dict.fromkeys((aten.unsafe_chunk.default, aten.unsafe_split.Tensor), 0),
        aten._unsafe_view.default: 0,
        aten.broadcast_tensors.default: 0,
        aten.cartesian_prod.default: 0,
        aten.conj_physical.default: 0,
        aten.data.default: 0,
        aten.einsum.default: 1,
        aten.flatten_dense_tensors.default: 0,
        aten.lift.default: 0,
        aten.sum_to_size.default: 0,
        aten.to_dense.default: 0,
        aten.type_as.default: 0,
        aten.unsafe_split_with_sizes.default: 0,
    }
)
"""Ops that return an input itself or a view of it, which their schema does not say; by position.

Some only where there is nothing to do (a dropout in evaluation, an ``einsum`` of one operand).
"""


def overwritten_by(node: Node) -> str | None:
    """Name of an op that writes into the memory of ``node``'s tensor, if one is left."""
    return cast("str | None", node.meta.get(OVERWRITTEN))


def written_inputs(node: Node) -> list[Node]:
    """The tensors a call writes into."""
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in _written(node.target)
    ]
    return [value for value in values if isinstance(value, Node)]


@cache
def _written(target: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that calls of ``target`` write into."""
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    return tuple(
        (i, parameter.name)
        for i, parameter in enumerate(target._schema.arguments)
        if parameter.alias_info is not None and parameter.alias_info.is_write
    )


def viewed_by(node: Node) -> list[Node]:
    """The tensors of which the result of ``node`` may be a view, or several results may be some.

    In-place ops that come later do not count: they see the new values once ``node`` is functional.
    """
    position = _viewed(node.target)
    if position is None:
        return []
    if node.target is operator.getitem and _gives_new(node.args[0]):
        same = [user for user in cast(Node, node.args[0]).users if user.args[1:] == node.args[1:]]
        return [] if same[0] is node else same[:1]
    if position == _WRITTEN:
        return [] if overwritten_by(node) is None else written_inputs(node)
    viewed = node.args[position] if len(node.args) > position else None
    if isinstance(viewed, Node):
        return [viewed]
    values = [value for value in pytree.tree_leaves(viewed) if isinstance(value, Node)]
    is_product = node.target is aten.einsum.default and len(values) > 1
    return [] if is_product else values


_WRITTEN = -1
"""In the place of a position: results of an op that writes are what it writes into."""


@cache
def _viewed(target: Any) -> int | None:
    """Position of what results of ``target`` may be views of; ``None``: they are new."""
    if target in UNSAID:
        return UNSAID[target]
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target._schema.is_mutable:
        return _WRITTEN
    views = any(result.alias_info is not None for result in target._schema.returns)
    return 0 if views else None


def _gives_new(source: object) -> bool:
    """Whether several results of a call have memory of their own each (values and indices)."""
    if not isinstance(source, Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    return _viewed(source.target) is None


def shares_memory(node: Node) -> bool:
    """Whether the result of ``node`` may be a view of another tensor: :func:`viewed_by`."""
    return bool(viewed_by(node))


def aliases_of(written: Node) -> set[Node]:
    """All nodes whose tensors may share memory with ``written``, itself included."""
    return reached(written, names_beside)


def names_beside(node: Node) -> list[Node]:
    """Tensors of which ``node`` may be a view, or which may be views of it, and equal constants."""
    near = [*viewed_by(node), *(user for user in node.users if node in viewed_by(user))]
    if node.op == "get_attr":  # a constant may be read in several places
        near += [read for read in node.graph.nodes if _is_same_constant(read, node)]
    return near


def reached(start: Node, near: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All nodes that can be reached from one, itself included; ``near``: in one step."""
    seen, stack = {start}, [start]
    while stack:
        new = [node for node in near(stack.pop()) if node not in seen]
        seen.update(new)
        stack += new
    return seen


def _is_same_constant(read: Node, node: Node) -> bool:
    return read.op == "get_attr" and read.target == node.target
