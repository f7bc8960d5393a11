"""Normalization over the last dimensions: float ops between exact borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch.fx import Node

from custom_quantizer.graph import argument, is_constant, shape_of
from custom_quantizer.ops._rule import Backend, Binding, Case, Delegation, OpRule, no_integers
from custom_quantizer.ops.elementwise import _bind_single, _case

__all__ = ["LAYER_NORM", "VECTOR_NORM", "normalized_size"]

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# layer_norm
# ---------------------------------------------------------------------------------------------


def normalized_size(node: Node) -> int:
    """How many values a ``layer_norm`` call averages."""
    return math.prod(int(size) for size in cast("Sequence[int]", node.args[1]))


def _bind_layer_norm(rule: OpRule, node: Node) -> Binding | str:
    for name, position in (("weight", 2), ("bias", 3)):
        value = argument(node, position, name)
        if value is not None and not is_constant(value):
            return f"its {name} is computed"
    return _bind_single(rule, node)


def _layer_norm_case(name: str, size: int | list[int], *shape: int, affine: bool = True) -> Case:
    def build() -> torch.nn.Module:
        norm = torch.nn.LayerNorm(size, elementwise_affine=affine)
        if affine:
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
            torch.nn.init.uniform_(norm.bias, -1.0, 1.0)
        return norm

    return Case(name, build, (shape,))


LAYER_NORM = OpRule(
    family="layer_norm",
    targets=frozenset({aten.layer_norm.default}),
    bind=_bind_layer_norm,
    integers=no_integers,
    float_reason="XNNPACK has no integer layer norm: it runs in float inside the delegate",
    delegation=lambda _binding, _formats: Delegation(Backend.FLOAT),
    cases=(
        _layer_norm_case("last", 16, 2, 5, 16),
        _layer_norm_case("image", 16, 2, 3, 4, 16),
        _layer_norm_case("two_dims", [4, 6], 2, 3, 4, 6),
        _layer_norm_case("plain", 16, 5, 16, affine=False),
    ),
)

# ---------------------------------------------------------------------------------------------
# Euclidean norm
# ---------------------------------------------------------------------------------------------


def _bind_vector_norm(rule: OpRule, node: Node) -> Binding | str:
    if argument(node, 1, "ord", 2) != 2:
        return "it is not the Euclidean norm"
    dims = argument(node, 2, "dim")
    rank = len(shape_of(cast(Node, node.args[0])))
    if dims is None or [int(d) % rank for d in dims] != [rank - 1]:
        return "it is not over the last dimension"
    if argument(node, 4, "dtype") is not None:
        return "it changes the dtype"
    return _bind_single(rule, node)


VECTOR_NORM = OpRule(
    family="vector_norm",
    targets=frozenset({aten.linalg_vector_norm.default}),
    bind=_bind_vector_norm,
    integers=no_integers,
    float_reason="XNNPACK has no integer norm: it runs in float inside the delegate",
    delegation=lambda _binding, _formats: Delegation(Backend.FLOAT),
    cases=(
        _case("keepdim", lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), (2, 5, 16)),
        _case("flat", lambda x: torch.linalg.vector_norm(x, dim=-1), (2, 5, 16)),
        _case("normalize", lambda x: F.normalize(x, dim=-1), (2, 3, 5, 16)),
    ),
)
