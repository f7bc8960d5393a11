"""Normalization: no integers give its means and deviations, so it has a meaning in float only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, is_constant, shape_of
from custom_quantizer.ops._rule import Case, OpRule, PatternMatch
from custom_quantizer.ops.elementwise import _case, _match_single

__all__ = [
    "GROUP_NORM",
    "INSTANCE_NORM",
    "LAYER_NORM",
    "RMS_NORM",
    "RULES",
    "VECTOR_NORM",
    "normalized_size",
    "number_of_groups",
]

aten = torch.ops.aten


def _computed(node: Node, *affine: int) -> str:
    """Why the arguments at these positions, a weight and a bias, are not constant; or nothing."""
    for name, position in zip(("weight", "bias"), affine, strict=False):
        value = argument(node, position, name)
        if value is not None and not is_constant(value):
            return f"its {name} is computed"
    return ""


def _norm_case(name: str, build: Callable[[], nn.Module], *shape: int) -> Case:
    """A norm whose weight and bias, if any, are not those it starts with."""

    def randomized() -> nn.Module:
        norm = build()
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2.0)
        return norm

    return Case(name, randomized, (shape,))


# ---------------------------------------------------------------------------------------------
# layer_norm, rms_norm: over the last dimensions
# ---------------------------------------------------------------------------------------------


def normalized_size(node: Node) -> int:
    """How many values a ``layer_norm`` or ``rms_norm`` call averages."""
    return math.prod(int(size) for size in cast("Sequence[int]", node.args[1]))


def _match_layer_norm(rule: OpRule, node: Node) -> PatternMatch | str:
    return _computed(node, 2, 3) or _match_single(rule, node)


LAYER_NORM = OpRule(
    family="layer_norm",
    title="layer norm",
    targets=frozenset({aten.layer_norm.default}),
    match=_match_layer_norm,
    cases=(
        _norm_case("last", lambda: nn.LayerNorm(16), 2, 5, 16),
        _norm_case("image", lambda: nn.LayerNorm(16), 2, 3, 4, 16),
        _norm_case("two_dims", lambda: nn.LayerNorm([4, 6]), 2, 3, 4, 6),
        _norm_case("plain", lambda: nn.LayerNorm(16, elementwise_affine=False), 5, 16),
    ),
)


def _match_rms_norm(rule: OpRule, node: Node) -> PatternMatch | str:
    return _computed(node, 2) or _match_single(rule, node)


RMS_NORM = OpRule(
    family="rms_norm",
    title="root-mean-square norm",
    targets=frozenset({aten.rms_norm.default}),
    match=_match_rms_norm,
    cases=(
        _norm_case("last", lambda: nn.RMSNorm(16), 2, 5, 16),
        _norm_case("two_dims", lambda: nn.RMSNorm([4, 6], eps=1e-3), 2, 3, 4, 6),
        _norm_case("plain", lambda: nn.RMSNorm(16, elementwise_affine=False), 5, 16),
    ),
)

# ---------------------------------------------------------------------------------------------
# group_norm, instance_norm: over channels and all that is behind them
# ---------------------------------------------------------------------------------------------


def number_of_groups(node: Node) -> int:
    """Into how many parts a norm cuts the channels; an instance norm makes each one a part."""
    if node.target is aten.group_norm.default:
        return int(cast(int, node.args[1]))
    return int(shape_of(cast(Node, node.args[0]))[1])


def _static_behind_batch(node: Node) -> str:
    sizes = shape_of(cast(Node, node.args[0]))[1:]
    return "" if are_static(sizes) else "its image size is dynamic"


def _match_group_norm(rule: OpRule, node: Node) -> PatternMatch | str:
    return _computed(node, 2, 3) or _static_behind_batch(node) or _match_single(rule, node)


GROUP_NORM = OpRule(
    family="group_norm",
    title="group norm",
    targets=frozenset({aten.group_norm.default}),
    match=_match_group_norm,
    cases=(
        _norm_case("image", lambda: nn.GroupNorm(2, 8), 2, 8, 5, 6),
        _norm_case("signal", lambda: nn.GroupNorm(4, 8), 2, 8, 21),
        _norm_case("one_group", lambda: nn.GroupNorm(1, 8, affine=False), 2, 8, 5, 6),
        _norm_case("large", lambda: nn.GroupNorm(2, 8, eps=1e-3), 1, 8, 24, 32),
    ),
)


def _match_instance_norm(rule: OpRule, node: Node) -> PatternMatch | str:
    if not argument(node, 5, "use_input_stats", True):
        return "it uses running statistics"
    return _computed(node, 1, 2) or _static_behind_batch(node) or _match_single(rule, node)


INSTANCE_NORM = OpRule(
    family="instance_norm",
    title="instance norm",
    targets=frozenset({aten.instance_norm.default}),
    match=_match_instance_norm,
    cases=(
        _norm_case("image", lambda: nn.InstanceNorm2d(8, affine=True), 2, 8, 5, 6),
        _norm_case("signal", lambda: nn.InstanceNorm1d(8), 2, 8, 21),
    ),
)

# ---------------------------------------------------------------------------------------------
# Euclidean norm
# ---------------------------------------------------------------------------------------------


def _match_vector_norm(rule: OpRule, node: Node) -> PatternMatch | str:
    if argument(node, 1, "ord", 2) != 2:
        return "it is not the Euclidean norm"
    dims = argument(node, 2, "dim")
    rank = len(shape_of(cast(Node, node.args[0])))
    if dims is None or [int(d) % rank for d in dims] != [rank - 1]:
        return "it is not over the last dimension"
    if argument(node, 4, "dtype") is not None:
        return "it changes the dtype"
    return _match_single(rule, node)


VECTOR_NORM = OpRule(
    family="vector_norm",
    title="norm",
    targets=frozenset({aten.linalg_vector_norm.default}),
    match=_match_vector_norm,
    cases=(
        _case("keepdim", lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), (2, 5, 16)),
        _case("flat", lambda x: torch.linalg.vector_norm(x, dim=-1), (2, 5, 16)),
        _case("normalize", lambda x: F.normalize(x, dim=-1), (2, 3, 5, 16)),
        _case("channels", lambda x: F.normalize(x, dim=1), (2, 8, 3, 4)),
        _case("image", lambda x: torch.linalg.vector_norm(x, dim=(1, 2)), (2, 5, 4, 8)),
    ),
)

RULES = (LAYER_NORM, RMS_NORM, GROUP_NORM, INSTANCE_NORM, VECTOR_NORM)
