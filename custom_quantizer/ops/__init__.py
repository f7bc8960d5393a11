"""The registry: which family an aten op belongs to, and all that is known of it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

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
)
from custom_quantizer.ops._rule import (
    Backend,
    Binding,
    Case,
    Delegation,
    Formats,
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
    "Formats",
    "OpRule",
    "QParamSharing",
    "QuantizedOp",
    "Verdict",
    "known_targets",
    "predict_backend",
    "rule_of",
]

REGISTRY: tuple[OpRule, ...] = (
    gemm.CONV,
    gemm.CONV_TRANSPOSE,
    gemm.LINEAR,
    attention.MATMUL,
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
    *functions.RULES,
    attention.SOFTMAX,
    normalization.LAYER_NORM,
    normalization.RMS_NORM,
    normalization.GROUP_NORM,
    normalization.INSTANCE_NORM,
    normalization.VECTOR_NORM,
    embedding.EMBEDDING,
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


def predict_backend(binding: Binding, formats: Formats) -> Delegation:
    """Where and how an op will run after lowering.

    Args:
        binding: the op.
        formats: its widths.
    """
    wide = formats.activation_bits > 8 or (formats.weight_bits or 0) > 8
    if not wide:
        found = binding.rule.delegation(binding, formats)
        if formats.activation_bits == 8 or found.reason:
            return found
        reason = f"int{formats.activation_bits} activations: clamped to their range"
        return Delegation(found.backend, reason)
    bits = max(formats.activation_bits, formats.weight_bits or 0)
    if binding.rule.sharing is QParamSharing.SAME:
        found = binding.rule.delegation(binding, formats)
        if found.backend in (Backend.FOLDED, Backend.PORTABLE):
            return found
        return Delegation(Backend.EMULATED, f"moves int{bits} values as float")
    return Delegation(
        Backend.EMULATED, f"int{bits}: emulated in float, XNNPACK has no kernel above 8 bits"
    )
