"""What upstream's tables of dependencies say, without the tables."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from executorch.exir.backend.canonical_partitioners import group_partitioner
from support.models import convert
from torch import Tensor, nn
from torch.fx.passes.infra import partitioner

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import undecomposed
from custom_quantizer.backends.xnnpack.dependencies import Dependencies, dependencies_on_demand


class Interleaved(nn.Module):
    """Two ops that no delegate has, one beside and one between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        between = torch.sort(y)[0]
        beside = torch.sign(self.b(y)) + y
        return self.c(between) + y, beside * 2.0


def test_the_same_nodes_as_upstreams_tables() -> None:
    module: Any = torch.export.export(Interleaved().eval(), (torch.ones(1, 4),)).module()
    viewers = group_partitioner._DependencyViewer(module), partitioner._DependencyViewer(module)
    for node in module.graph.nodes:
        found = Dependencies(module).downstreams_of(node)
        assert [found] * 2 == [viewer.downstreams_of(node) for viewer in viewers]


def test_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4)
    graph = convert(Interleaved().eval(), (x,), "a8w8").graph
    program = cq.lower(graph, (x,))
    assert program.report.delegates > 1
    monkeypatch.setattr(undecomposed, "dependencies_on_demand", nullcontext)
    assert program.buffer == cq.lower(graph, (x,)).buffer


def test_no_table_is_made_and_upstream_gets_its_own_back(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = group_partitioner._DependencyViewer, partitioner._DependencyViewer
    with dependencies_on_demand():
        assert {group_partitioner._DependencyViewer, partitioner._DependencyViewer} == {
            Dependencies
        }
    assert (group_partitioner._DependencyViewer, partitioner._DependencyViewer) == upstream

    def table(self: Any, module: Any) -> None:
        raise AssertionError("a table of the square of the graph's size")

    for kind in upstream:
        monkeypatch.setattr(kind, "__init__", table)
    x = torch.randn(1, 4)
    cq.lower(convert(Interleaved().eval(), (x,), "a8w8").graph, (x,), check=False)
