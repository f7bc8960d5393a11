"""Families without a meaning on integers: planned, placed and reported like all others.

All their examples, between integers, make one model that is lowered once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from support.models import Converted, convert
from support.scripts import DOCS
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.core.graph import module_path
from custom_quantizer.ops import REGISTRY, OpRule, rule_of
from custom_quantizer.ops.placement import Placement
from custom_quantizer.reference.converted import FloatOp, read_converted

RULES = {rule.family: rule for rule in REGISTRY if rule.integers is None}
CASES = [(rule, case) for rule in RULES.values() for case in rule.cases]
SHAPES = [shape for _, case in CASES for shape in case.shapes]
IDS = [f"{rule.family}-{case.name}" for rule, case in CASES]


class SideBySide(nn.Module):
    """Every case on integers, and read by an op on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case.build() for _, case in CASES)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given = iter([x + x for x in inputs])
        return [
            built(*[next(given) for _ in case.shapes]) * 1.25
            for built, (_, case) in zip(self.cases, CASES, strict=True)
        ]


@dataclass(frozen=True)
class Lowered:
    """What became of the cases."""

    converted: Converted
    program: cq.LoweredProgram
    ops: dict[int, list[FloatOp]]


@cache
def lowered() -> Lowered:
    torch.manual_seed(0)
    model = SideBySide()
    example = tuple(torch.randn(shape) for shape in SHAPES)
    done = convert(model, example)
    ops: dict[int, list[FloatOp]] = {index: [] for index in range(len(CASES))}
    for op in read_converted(done.graph).floating:
        path = module_path(op.node).split(".")
        if path[0] == "cases":
            ops[int(path[1])].append(op)
    return Lowered(done, cq.lower(done.graph, example), ops)


def of_family(index: int) -> list[FloatOp]:
    """The ops of a case that are of the family it is an example of."""
    rule, _ = CASES[index]
    return [op for op in lowered().ops[index] if rule_of(op.node) is rule]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_it_is_planned_in_float_for_the_backend_s_reason(index: int) -> None:
    rule, _ = CASES[index]
    found = of_family(index)
    assert found
    for op in found:
        planned = lowered().converted.plan.op(op.node.name)
        assert (planned.family, planned.scheme) == (rule.family, None)
        assert planned.reason == op.reason == BACKEND.support(rule).float_reason
        assert planned.tensors == ()


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_it_runs_where_predicted_and_the_report_says_no_other_place(index: int) -> None:
    rows = {row.node: row for row in lowered().program.report.ops}
    for op in of_family(index):
        row = rows[op.node.name]
        predicted = BACKEND.in_float(op.node)
        assert row.backend == predicted, op.node.name
        planned = lowered().converted.plan.op(op.node.name)
        assert planned.placement == predicted.placement.value
        assert row.reason
        if predicted.placement is not Placement.OUTSIDE:
            assert "outside" not in row.reason
            assert row.outside == ()
        else:
            assert "inside the delegate" not in row.reason
            assert row.outside


@pytest.mark.parametrize("family", RULES)
def test_it_has_a_row_in_the_docs(family: str) -> None:
    text = (DOCS / "ops.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {family} |"))
    rule: OpRule = RULES[family]
    for target in rule.targets:
        assert str(target).split(".")[1] in row


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_it_computes_what_the_reference_does(scale: float) -> None:
    done = lowered()
    reference = cq.integer_reference(done.converted.graph)
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(shape, generator=generator) * scale for shape in SHAPES)
    steps = [float(op.output.scale) for op in reference.graph.integer if op.node.name[:3] == "mul"]
    assert len(steps) == len(CASES)
    for name, got, want, step in zip(
        IDS, done.program.run(*given), reference(*given), steps, strict=True
    ):
        # Float kernels differ in last bits, which may move a value to the next integer.
        assert float((got - want).abs().max()) <= step * 1.001, name
