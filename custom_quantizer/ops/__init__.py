"""The registry: which family an aten op belongs to, and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from custom_quantizer.core.graph import describe, tensor_meta
from custom_quantizer.errors import CustomQuantizerError
from custom_quantizer.ops import (
    attention,
    elementwise,
    embedding,
    functions,
    gemm,
    movement,
    normalization,
    pool,
    resize,
)
from custom_quantizer.ops._rule import (
    Case,
    Formats,
    OpRule,
    PatternMatch,
    QParamSharing,
    QuantizedOp,
    Trait,
    Verdict,
)

__all__ = [
    "OF_TARGET",
    "REGISTRY",
    "Case",
    "Formats",
    "OpRule",
    "PatternMatch",
    "QParamSharing",
    "QuantizedOp",
    "Trait",
    "Verdict",
    "known_targets",
    "match_of",
    "rule_of",
    "unknown_op",
]

REGISTRY: tuple[OpRule, ...] = (
    *gemm.RULES,
    *elementwise.RULES,
    *pool.RULES,
    *resize.RULES,
    *movement.RULES,
    *functions.RULES,
    *attention.RULES,
    *normalization.RULES,
    *embedding.RULES,
)
"""All families; tables show them in this order."""


def _index(rules: tuple[OpRule, ...]) -> dict[Any, OpRule]:
    index: dict[Any, OpRule] = {}
    for rule in rules:
        for target in rule.targets:
            if target in index:
                raise CustomQuantizerError(
                    f"{target} is claimed by two families, {index[target].family} and {rule.family}"
                )
            index[target] = rule
    return index


OF_TARGET: Mapping[Any, OpRule] = MappingProxyType(_index(REGISTRY))
"""By aten overload, the family that claims it."""


def rule_of(node: Node) -> OpRule | None:
    """The family of a node, or ``None`` for ops that are not known."""
    return OF_TARGET.get(node.target) if node.op == "call_function" else None


def unknown_op(node: Node) -> str:
    """Why a node that no family claims has no integers."""
    target = node.target
    if target is torch.ops.higher_order.wrap_with_autocast:
        return (
            f"torch.autocast computes it in {node.args[1]}; to have it quantized, call "
            "torch.export.export outside of torch.autocast, or with enabled=False"
        )
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target} is control flow: the graphs it runs stay in float"
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return (
            f"{target} writes in place into memory that is read under another name, or by the next "
            "call; without the write the op may have integers"
        )
    for source in node.all_input_nodes:
        meta = tensor_meta(source)
        if meta is not None and not (meta.is_floating_point() or meta.dtype == torch.bool):
            return f"it reads {describe(source)}, which is {meta.dtype}: no number with a scale"
    return f"no integer form of {target} is known"


def match_of(node: Node) -> PatternMatch | None:
    """A node as an op of its family, arguments sorted by role; ``None``: it is of none."""
    rule = rule_of(node)
    found = None if rule is None else rule.match(rule, node)
    return found if isinstance(found, PatternMatch) else None


def known_targets() -> tuple[Any, ...]:
    """Every aten overload some family claims."""
    return tuple(OF_TARGET)
