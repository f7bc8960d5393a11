"""Whose memory is whose in a captured graph, and what is written there."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Node

__all__ = ["OVERWRITTEN", "aliases_of", "overwritten_by", "shares_memory"]

aten = torch.ops.aten

OVERWRITTEN = "custom_quantizer_overwritten"
"""Key in ``node.meta`` of what :func:`overwritten_by` returns."""

# In eval mode these return their input itself, which their schema does not say.
_PASS_THROUGH = frozenset({operator.getitem, aten.dropout.default, aten.feature_dropout.default})


def overwritten_by(node: Node) -> str | None:
    """Name of an op that writes into the memory of ``node``'s tensor, if one is left."""
    return cast("str | None", node.meta.get(OVERWRITTEN))


def shares_memory(node: Node) -> bool:
    """Whether the result of ``node`` may be a view of its first argument.

    In-place ops that come later do not count: they see the new values once ``node`` is functional.
    """
    target = node.target
    if target in _PASS_THROUGH:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable:
        return overwritten_by(node) is not None
    return any(result.alias_info is not None for result in target._schema.returns)


def aliases_of(written: Node) -> set[Node]:
    """All nodes whose tensors may share memory with ``written``, itself included."""
    base = written
    while shares_memory(base) and base.args and isinstance(base.args[0], Node):
        base = base.args[0]
    aliases, stack = {base}, [base]
    while stack:
        for user in stack.pop().users:
            if user not in aliases and shares_memory(user) and user.args[0] in aliases:
                aliases.add(user)
                stack.append(user)
    return aliases
