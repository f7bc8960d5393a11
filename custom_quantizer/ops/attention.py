"""Products of two activations, and softmax: the steps of attention."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.graph import argument, shape_of
from custom_quantizer.ops._rule import (
    Integers,
    OpRule,
    PatternMatch,
    QuantizedOp,
    Trait,
)
from custom_quantizer.ops.elementwise import _case, _match_single

__all__ = ["LOG_SOFTMAX", "MATMUL", "RULES", "SOFTMAX", "softmax_dim"]

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------
# matmul
# ---------------------------------------------------------------------------------------------


def _match_matmul(rule: OpRule, node: Node) -> PatternMatch | str:
    left, right = cast("tuple[Node, Node]", node.args[:2])
    return PatternMatch(rule, node, (left, right))


def _matmul_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    left, right = op.inputs
    # Sums of products of integers up to 16 bits are exact in float64 for up to 4 million terms.
    a = (inputs[0] - left.zero_point).to(torch.float64)
    b = (inputs[1] - right.zero_point).to(torch.float64)
    return arithmetic.requantize_accumulator(
        torch.matmul(a, b).to(torch.int64),
        input_scale=cast(float, left.scale),
        weight_scale=cast(float, right.scale),
        channel_axis=inputs[0].dim() - 1,
        out=op.output,
        bounds=op.stored_bounds(arithmetic),
        accumulator_width=64 if op.is_wide else 32,
    )


MATMUL = OpRule(
    family="matmul",
    targets=frozenset({aten.matmul.default}),
    match=_match_matmul,
    integers=_matmul_integers,
    traits=frozenset({Trait.PRODUCT}),
    cases=(
        _case("bmm", torch.bmm, (3, 5, 8), (3, 8, 7)),
        _case("matmul", torch.matmul, (2, 3, 5, 8), (2, 3, 8, 7)),
        _case("many columns", torch.matmul, (2, 3, 5, 8), (2, 3, 8, 12)),
        _case("rank2", torch.mm, (5, 8), (8, 7)),
        _case("transposed", lambda a, b: a @ b.transpose(-2, -1), (2, 3, 5, 8), (2, 3, 7, 8)),
        _case(
            "einsum", lambda a, b: torch.einsum("bgid,bgjd->bgij", a, b), (2, 3, 5, 8), (2, 3, 7, 8)
        ),
        _case("unsigned", lambda a, b: torch.relu(a) @ torch.relu(b), (3, 5, 8), (3, 8, 7)),
    ),
)

# ---------------------------------------------------------------------------------------------
# softmax
# ---------------------------------------------------------------------------------------------


def softmax_dim(node: Node) -> int:
    """The dimension a softmax runs over, counted from the front."""
    return int(cast(int, argument(node, 1, "dim"))) % len(shape_of(node))


def _match_softmax(rule: OpRule, node: Node) -> PatternMatch | str:
    dtype = argument(node, 2, "dtype")
    if dtype not in (None, torch.float32):
        return "it changes the dtype"
    return _match_single(rule, node)


SOFTMAX = OpRule(
    family="softmax",
    targets=frozenset({aten.softmax.int}),
    match=_match_softmax,
    traits=frozenset({Trait.BOUNDED}),
    cases=(
        _case("last", lambda x: F.softmax(x, -1), (2, 3, 5, 7)),
        _case("channels", lambda x: F.softmax(x, 1), (2, 6, 4, 5)),
    ),
)

LOG_SOFTMAX = OpRule(
    family="log_softmax",
    title="log softmax",
    targets=frozenset({aten.log_softmax.int}),
    match=_match_softmax,
    cases=(
        _case("last", lambda x: F.log_softmax(x, -1), (2, 3, 5, 7)),
        _case("channels", lambda x: F.log_softmax(x, 1), (2, 6, 4, 5)),
    ),
)

RULES = (MATMUL, SOFTMAX, LOG_SOFTMAX)
