"""Sums, products, choices and clamps keep what the registry promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.contracts import RULES, FloatContract, IntegerContract
from torch.fx import Node

aten = torch.ops.aten


class TestContract(IntegerContract):
    together = True
    families = ("add", "sub", "mul", "relu", "clamp")


class TestFloatContract(FloatContract):
    families = ("where",)


def _call(target: Any, *args: Any) -> Node:
    """A call of ``target`` on a tensor of which nothing is recorded."""
    graph = torch.fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args))


@pytest.mark.parametrize("family", ["add", "sub", "mul", "maximum"])
def test_a_number_in_the_place_of_a_tensor_is_refused(family: str) -> None:
    """Such as :mod:`custom_quantizer.ops.rewrites.canonical` leaves alone."""
    rule = RULES[family]
    (target,) = rule.targets
    reason = "one operand is a number that was not made a tensor"
    assert rule.match(rule, _call(target, 0.5)) == reason


@pytest.mark.parametrize(
    ("target", "args", "bounds"),
    [
        (aten.relu6.default, (), (0.0, 6.0)),
        (aten.hardtanh.default, (), (-1.0, 1.0)),
        (aten.hardtanh.default, (-0.25,), (-0.25, 1.0)),
        (aten.hardtanh.default, (-0.25, 0.5), (-0.25, 0.5)),
        (aten.clamp.default, (-0.25,), (-0.25, None)),
        (aten.clamp.default, (None, 0.5), (None, 0.5)),
        (aten.clamp_min.default, (-0.25,), (-0.25, None)),
        (aten.clamp_max.default, (0.5,), (None, 0.5)),
    ],
)
def test_bounds_of_clamps(
    target: Any, args: tuple[Any, ...], bounds: tuple[float | None, float | None]
) -> None:
    """Export leaves out arguments that equal their defaults."""
    bounds_of = RULES["clamp"].bounds
    assert bounds_of is not None
    assert bounds_of(_call(target, *args)) == bounds
