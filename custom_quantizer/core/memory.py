"""Whose memory is whose in a captured graph, and what is written there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

__all__ = [
    "OVERWRITTEN",
    "UNSAID",
    "aliases_of",
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
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)
        for i, parameter in enumerate(node.target._schema.arguments)
        if parameter.alias_info is not None and parameter.alias_info.is_write
    ]
    return [value for value in values if isinstance(value, Node)]


def viewed_by(node: Node) -> list[Node]:
    """The tensors of which the result of ``node`` may be a view, or several results may be some.

    In-place ops that come later do not count: they see the new values once ``node`` is functional.
    """
    target = node.target
    if target in UNSAID:
        viewed = node.args[UNSAID[target]] if len(node.args) > UNSAID[target] else None
        if target is aten.einsum.default and len(cast("list[Node]", viewed)) > 1:
            return []  # a product
    elif not isinstance(target, torch._ops.OpOverload):
        return []
    elif target._schema.is_mutable:
        return [] if overwritten_by(node) is None else written_inputs(node)
    elif all(result.alias_info is None for result in target._schema.returns):
        return []
    else:
        viewed = node.args[0] if node.args else None
    return [value for value in pytree.tree_leaves(viewed) if isinstance(value, Node)]


def shares_memory(node: Node) -> bool:
    """Whether the result of ``node`` may be a view of another tensor: :func:`viewed_by`."""
    return bool(viewed_by(node))


def aliases_of(written: Node) -> set[Node]:
    """All nodes whose tensors may share memory with ``written``, itself included."""
    return reached(written, _share_memory_with)


def _share_memory_with(node: Node) -> list[Node]:
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
