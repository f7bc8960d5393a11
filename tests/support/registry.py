"""Cases of the registry, put where the planner quantizes them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.ops import (
    REGISTRY,
    Case,
    Formats,
    OpRule,
    PatternMatch,
    rule_of,
)
from support.graphs import canonicalize

WEIGHTED = frozenset({"conv", "conv_transpose", "linear", "matmul", "prelu"})
"""Families that a scheme's part about weights may concern; others get the same graph without it."""

LEFT_IN_FLOAT = tuple(
    rule for rule in REGISTRY if rule.integers is not None and BACKEND.support(rule).float_reason
)
"""Families that have integers, which XNNPACK computes in float all the same."""


def cases_and_schemes(*schemes: str, of_weights: str) -> list[Any]:
    """Parameters ``(rule, case, scheme)``: every case of integers in every scheme that matters.

    Slow is what is neither in the first scheme nor the first case of a meaning on integers: most
    functions have one, that of a table.

    Args:
        schemes: for all families.
        of_weights: one that differs from the first in the weights only.
    """
    first = {rule.integers: rule.cases[0] for rule in reversed(REGISTRY) if rule.cases}
    return [
        pytest.param(
            *(rule, case, scheme),
            id=f"{rule.family}-{case.name}-{scheme}",
            marks=() if scheme == schemes[0] or case is first[rule.integers] else pytest.mark.slow,
        )
        for rule in REGISTRY
        for case in rule.cases
        for scheme in (*schemes, *((of_weights,) if rule.family in WEIGHTED else ()))
        if rule.integers is not None and rule not in LEFT_IN_FLOAT
    ]


class Traits(NamedTuple):
    """What the cases of a family are, captured once and forgotten."""

    weighed: bool
    """Whether one has an op of the family without an int8 kernel, which is quantized between ops
    that give and take integers only."""
    ends_in_float: bool
    """Whether one has an op of the family that float outputs of a model read as float."""


@cache
def traits(family: str) -> Traits:
    """Of the first op of the family in each of its cases."""
    (rule,) = (rule for rule in REGISTRY if rule.family == family)
    ops = [op for case in rule.cases if (op := _op_of(rule, case)) is not None]
    return Traits(
        weighed=any(BACKEND.predict(op, Formats(8)).kernel.needs_integers for op in ops),
        ends_in_float=any(BACKEND.support(op.rule).float_output(op) for op in ops),
    )


def _op_of(rule: OpRule, case: Case) -> PatternMatch | None:
    example = tuple(torch.randn(shape) for shape in case.shapes)
    graph = canonicalize(torch.export.export(case.build().eval(), example).module())
    for node in graph.graph.nodes:
        bound = rule.match(rule, node) if rule_of(node) is rule else "another op"
        if not isinstance(bound, str):
            return bound
    return None


class Surrounded(nn.Module):
    """A case with integers before it, if it needs some, and an op that takes integers behind it.

    Ops that move values, and those without an int8 kernel, are quantized between other ops only. A
    result that would be float where only float outputs show it is joined to itself, which changes
    no integer.
    """

    def __init__(self, rule: OpRule, case: Case) -> None:
        super().__init__()
        found = traits(rule.family)
        moves, costs = rule.moves_values, found.weighed
        self.before, self.behind = moves or costs, costs and not moves
        self.joined = found.ends_in_float
        self.case = case.build()

    def forward(self, *inputs: Tensor) -> Any:
        result = self.case(*[x + x for x in inputs] if self.before else inputs)
        if self.joined:
            return torch.cat([result, result])
        return result + 1.25 if self.behind else result
