"""The registry: which family an aten op belongs to, and all that is known of it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from custom_quantizer.errors import CustomQuantizerError
from custom_quantizer.ops import elementwise, gemm, movement, pool
from custom_quantizer.ops._rule import (
    Backend,
    Binding,
    Case,
    Delegation,
    OpRule,
    QParamSharing,
    QuantizedOp,
    Verdict,
)

__all__ = [
    "REGISTRY",
    "Backend",
    "Binding",
    "Case",
    "Delegation",
    "OpRule",
    "QParamSharing",
    "QuantizedOp",
    "Verdict",
    "rule_of",
]

REGISTRY: tuple[OpRule, ...] = (
    gemm.CONV,
    gemm.CONV_TRANSPOSE,
    gemm.LINEAR,
    elementwise.ADD,
    elementwise.SUB,
    elementwise.MUL,
    elementwise.RELU,
    elementwise.CLAMP,
    pool.MAX_POOL,
    pool.AVG_POOL,
    pool.ADAPTIVE_AVG_POOL,
    pool.MEAN,
    movement.CAT,
    movement.IDENTITY,
    movement.RESHAPE,
    movement.PERMUTE,
    movement.SLICE,
    movement.SELECT,
    movement.EXPAND,
    movement.SPLIT,
    movement.GETITEM,
    movement.PAD,
)


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


_BY_TARGET = _index(REGISTRY)


def rule_of(node: Node) -> OpRule | None:
    """The family of a node, or ``None`` for ops that are not known."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


def known_targets() -> tuple[Any, ...]:
    """Every aten overload some family claims."""
    return tuple(_BY_TARGET)
