"""Activations stand right behind the layers that they are part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, capture, lowered_exactly, quantized
from torch import nn

import custom_quantizer as cq


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, eps=0.0)
    norm.running_var = torch.full((8,), 4.0)  # a factor of one half: folding it rounds nothing
    return {
        "conv": nn.Conv2d(4, 8, 3, padding=1),
        "norm": norm,
        "signal": nn.Conv1d(4, 8, 3, padding=2),
        "linear": nn.Linear(6, 6),
    }


BEHIND: dict[str, Callable[..., Any]] = {
    "a pool": lambda s, x: F.relu(F.max_pool2d(s.conv(x), 2)),
    "a pool of a norm": lambda s, x: F.relu6(F.max_pool2d(s.norm(s.conv(x)), 2)),
    "a pool of signals": lambda s, x: F.relu(F.max_pool1d(s.signal(x[:, :, 0]), 2)),
    "a cut": lambda s, x: F.relu(s.signal(x[:, :, 0])[:, :, :-2]),
    "one of them": lambda s, x: F.relu(s.conv(x)[:, 0]),
    "a shuffle": lambda s, x: F.relu(F.pixel_shuffle(s.conv(x), 2)),
    "a flatten": lambda s, x: s.conv(x).flatten(1).clamp(-0.25, 0.5),
    "heads": lambda s, x: s.linear(x).view(2, 4, 5, 2, 3).transpose(2, 3).clamp(max=0.5),
    "a sum": lambda s, x: F.relu((x + s.linear(x))[:, 1:].permute(0, 2, 3, 1)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_an_activation_is_part_of_the_layer(name: str) -> None:
    model, x = Function(BEHIND[name], **_layers()).eval(), torch.randn(2, 4, 5, 6)
    graph = capture(model, (x,))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(graph)
    assert not [op for op in plan.ops if op.family in ("relu", "clamp")]
    assert len([op for op in plan.ops if op.fused]) == 1
    prepared = (
        cq.IntegerQuantizer().set_global("a8w8").transform_for_annotation(capture(model, (x,)))
    )
    assert torch.equal(prepared(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: F.relu(F.avg_pool2d(s.conv(x), 2)),
        lambda s, x: (lambda y: F.relu(y) + y)(F.max_pool2d(s.conv(x), 2)),
        lambda s, x: (lambda y: F.relu(F.max_pool2d(y, 3, 1, 1)) + y)(s.conv(x)),
        lambda s, x: F.relu(F.max_pool2d(torch.sin(s.conv(x)), 2)),
        lambda s, x: F.relu(torch.cat([s.conv(x), x], 1)),
        lambda s, x: F.relu(F.pad(s.conv(x), (1, 1), value=-1.0)),
    ],
)
def test_others_stay(function: Callable[..., Any]) -> None:
    model, x = Function(function, **_layers()).eval(), torch.randn(2, 4, 5, 6)
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(capture(model, (x,)))
    assert [op.node for op in plan.ops if op.family == "relu"]


def test_the_program_is_the_reference_and_better_than_what_is_rounded_first() -> None:
    x = (torch.randn(2, 4, 6, 6),)
    program = lowered_exactly(quantized(Function(BEHIND["a pool"], **_layers()).eval(), x), x)
    assert program.report.fully_delegated
    assert [op.family for op in program.report.ops if op.family] == ["conv", "max_pool2d"]


def test_a_rule_may_still_name_the_activation() -> None:
    model, x = Function(BEHIND["a pool"], **_layers()).eval(), torch.randn(2, 4, 6, 6)
    plan = (
        cq.IntegerQuantizer()
        .set_global("a8w8")
        .set_node_name("relu", "a16w8")
        .plan(capture(model, (x,)))
    )
    assert [(op.node, op.scheme) for op in plan.ops if op.family == "relu"] == [("relu", "a16w8")]
