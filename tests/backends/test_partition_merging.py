"""Groups of nodes become the delegates that ExecuTorch would make of them."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.pattern_op_partitioner import (
    generate_grouped_partitions_from_list_of_nodes,
)
from support.graphs import outside
from support.models import convert
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.partitioner import Partition

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import partition_merging
from custom_quantizer.backends.xnnpack.partition_merging import merge_groups
from custom_quantizer.backends.xnnpack.quick_partitioner import QuickPartitioner


def named(partitions: Iterable[Partition]) -> list[tuple[int | None, set[Node]]]:
    """Numbers and nodes, in their order."""
    return [(partition.id, set(partition.nodes)) for partition in partitions]


def random_graph(nodes: int, seed: int) -> tuple[Graph, list[list[Node]]]:
    """Calls that read what is near or far, some of them parts of others' results, and groups.

    Some groups have paths that leave them and come back.
    """
    choose = random.Random(seed)
    graph = Graph()
    made = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(nodes):
        near = made[-choose.choice((2, 4, 30)) :]
        if choose.random() < 0.15:
            made.append(graph.call_function(operator.getitem, (choose.choice(near), 0)))
        else:
            read = tuple(choose.sample(near, min(len(near), choose.choice((1, 1, 2)))))
            made.append(graph.call_function(torch.relu, read))
    graph.output(tuple(choose.sample(made, 2)))
    left, groups = list(made), []
    while left:
        size = choose.choice((1, 1, 2, 3))
        start = choose.randrange(len(left))
        group = [left.pop(start) for _ in range(min(size, len(left) - start))]
        if choose.random() < 0.7:  # the rest are in no group
            choose.shuffle(group)
            groups.append(group)
    return graph, groups


@pytest.mark.parametrize("nodes", [4, 8, 16, 32])
def test_the_partitions_are_those_of_executorch_151(nodes: int) -> None:
    counts = set()
    for seed in range(60):
        graph, groups = random_graph(nodes, seed)
        module = GraphModule(nn.Module(), graph)
        wanted = generate_grouped_partitions_from_list_of_nodes(module, groups)
        assert named(merge_groups(graph, groups)) == named(wanted), (seed, graph)
        counts.add(len(groups) - len(wanted))
    assert len(counts) > nodes // 8 + 1  # some merge, by more or less


def test_nothing_is_proposed_where_there_are_no_groups() -> None:
    graph, _ = random_graph(4, 0)
    assert merge_groups(graph, []) == []


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


def test_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4)
    graph = convert(Interleaved().eval(), (x,), "a8w8").graph
    program = cq.lower(graph, (x,))
    assert program.report.delegates > 1
    for method in ("generate_partitions", "partition"):
        monkeypatch.setattr(QuickPartitioner, method, getattr(XnnpackPartitioner, method))
    assert program.buffer == cq.lower(graph, (x,)).buffer


class Alternating(nn.Module):
    """Layers with an op in between that no delegate has."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = outside(layer(x))
        return x


def test_code_is_written_for_each_delegate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for all before as well, whenever one is cut out of the graph."""
    x, written = torch.randn(1, 4), 0
    python_code = Graph.python_code

    def counted(self: Graph, *args: Any, **options: Any) -> Any:
        nonlocal written
        written += 1
        return python_code(self, *args, **options)

    graphs = {n: convert(Alternating(n).eval(), (x,), "a8w8").graph for n in (2, 4, 6)}
    monkeypatch.setattr(Graph, "python_code", counted)
    counts = []
    for layers, graph in graphs.items():
        written = 0
        assert cq.lower(graph, (x,)).report.delegates == layers
        counts.append(written)
    assert counts[2] - counts[1] == counts[1] - counts[0]


def test_work_grows_with_the_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain is one delegate: each group is looked at once, from its neighbor."""
    merges = readers = 0

    class Counted(partition_merging._Group):
        def merge(self, other: Any, numbers: Any) -> bool:
            nonlocal merges, readers
            merges += 1
            readers += len(self.readers) + len(other.readers)
            return super().merge(other, numbers)

    monkeypatch.setattr(partition_merging, "_Group", Counted)
    graph, length = Graph(), 300
    nodes = [graph.placeholder("x")]
    for _ in range(3 * length):
        nodes.append(graph.call_function(torch.relu, (nodes[-1],)))
    graph.output(nodes[-1])
    groups = [nodes[i : i + 3] for i in range(1, 3 * length, 3)]
    (partition,) = merge_groups(graph, groups)
    assert partition.size() == 3 * length
    assert merges == length - 1
    assert readers == length - 1
