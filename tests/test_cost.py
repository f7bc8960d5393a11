"""What planning, preparing, converting, reading and lowering cost, as a model grows."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from support.graphs import Function, capture, quantized
from support.long_graphs import KINDS
from support.processes import measured
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.passes import run_passes
from custom_quantizer.backends.xnnpack.quick_partitioner import QuickPartitioner
from custom_quantizer.core.graph import detached_copy
from custom_quantizer.planning.insertion import ANNOTATION_KEY, insert_observers
from custom_quantizer.reference.converted import read_converted

aten = torch.ops.aten

FLAT = 1.5
"""Most that seconds per op may grow from a short chain to a long one."""


def chain(ops: int) -> GraphModule:
    """Convolution, in-place relu, residual add, times a number, reshape, and again.

    Made by hand: ``torch.export`` would take longer than everything that is measured here.
    """
    root, graph, mode = nn.Module(), Graph(), FakeTensorMode()
    value = mode.from_tensor(torch.zeros(1, 4, 2, 2))

    def constant(name: str, tensor: Tensor) -> Node:
        root.register_parameter(name, nn.Parameter(tensor))
        node = graph.get_attr(name)
        node.meta["val"] = mode.from_tensor(tensor)
        return node

    last = graph.placeholder("x")
    last.meta["val"] = value
    skip = last
    for i in range(ops):
        kind = i % 5
        if kind == 0:
            weight = constant(f"weight_{i}", torch.randn(4, 4, 1, 1))
            skip = last
            last = graph.call_function(
                aten.conv2d.default, (last, weight, constant(f"bias_{i}", torch.randn(4)))
            )
        elif kind == 1:
            last = graph.call_function(aten.relu_.default, (last,))
        elif kind == 2:
            last = graph.call_function(aten.add.Tensor, (last, skip))
        elif kind == 3:
            last = graph.call_function(aten.mul.Tensor, (last, 0.5))
        else:
            last = graph.call_function(aten.reshape.default, (last, [1, 4, 2, 2]))
        last.meta |= {"val": value, "nn_module_stack": {"m": (f"L['self'].m{i}", "Module")}}
    graph.output((last,))
    return GraphModule(root, graph)


def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of a call, without the garbage collector's, which depend on what else lives."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        function()
        return time.process_time() - start
    finally:
        gc.enable()


def costs(ops: int) -> dict[str, float]:
    """Seconds per op of each stage."""
    graph, kept = chain(ops), {}
    quantizer = cq.IntegerQuantizer().set_global("a8w8")

    def prepare() -> None:
        kept["prepared"] = prepare_pt2e(graph, quantizer)

    def convert() -> None:
        kept["converted"] = convert_pt2e(kept["prepared"])

    found = {"plan and prepare": seconds(prepare)}
    kept["prepared"](torch.randn(1, 4, 2, 2))
    found["convert"] = seconds(convert)
    found["read"] = seconds(lambda: read_converted(kept["converted"]))
    assert len(quantizer.last_plan.quantized) >= ops * 3 // 5
    return {stage: spent / ops for stage, spent in found.items()}


def least(ops: int, runs: int) -> dict[str, float]:
    """The smallest cost of each stage over a few runs: what else runs can only add to it."""
    found = [costs(ops) for _ in range(runs)]
    return {stage: min(cost[stage] for cost in found) for stage in found[0]}


def growth(lengths: tuple[int, ...], runs: int) -> dict[str, float]:
    """By stage, seconds per op on the longest chain over those on the shortest."""
    costs(50)  # what the first call does once
    short, *_, long = [least(ops, runs if ops < 5_000 else 1) for ops in lengths]
    return {stage: long[stage] / short[stage] for stage in short}


PACKAGE = str(Path(cq.__file__).parent)


@contextmanager
def counted_calls() -> Iterator[Callable[[], int]]:
    """How many calls of this package's functions there were: work that no other load changes."""
    count = 0

    def note(frame: Any, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield lambda: count
    finally:
        sys.setprofile(before)


def work(kind: str, ops: int) -> dict[str, int]:
    """Calls in each stage from a captured network to what the partitioner gets."""
    torch.manual_seed(0)
    model, inputs = KINDS[kind](ops)
    graph, found = torch.export.export(model, inputs).module(), {}
    with counted_calls() as calls:
        prepared = prepare_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
        found["prepare"] = calls()
    prepared(*inputs)
    with counted_calls() as calls:
        converted = convert_pt2e(prepared)
        found["convert"] = calls()
    with counted_calls() as calls:
        run_passes(detached_copy(converted), read_converted(converted))
        found["rewrite"] = calls()
    return found


QUICK = {"residual", "writes of a buffer"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
        for kind in sorted(KINDS.keys() - {"nested", "conv, relu", "functions"})
    ],
)
def test_work_per_op_does_not_grow(kind: str) -> None:
    """Where every op looks at all others, twice the ops are four times the work."""
    short, long = work(kind, 48), work(kind, 96)
    growth = {stage: long[stage] / short[stage] for stage in short}
    assert max(growth.values()) < 2.1, growth


@pytest.mark.slow
def test_cost_per_op_does_not_grow() -> None:
    found = growth((100, 1_000), runs=2)
    assert max(found.values()) < FLAT, found


@pytest.mark.slow
def test_cost_per_op_does_not_grow_up_to_10000_ops() -> None:
    found = growth((100, 1_000, 10_000), runs=3)
    assert max(found.values()) < FLAT, found


@pytest.mark.slow
def test_cost_and_memory_per_op_do_not_grow_up_to_the_program() -> None:
    """In processes of their own; tables of ExecuTorch's partitioner made it 3 times the memory."""
    short, long = (benchmarked("chains.py", str(ops)) for ops in (250, 1_000))
    spent = {stage: long["seconds"][stage] / short["seconds"][stage] / 4 for stage in LONG_STAGES}
    held = {stage: long["peaks"][stage] / short["peaks"][stage] / 4 for stage in short["peaks"]}
    assert max(spent.values()) < FLAT, spent
    assert max(held.values()) < FLAT, held


@pytest.mark.slow
def test_no_more_memory_than_the_stock_flow() -> None:
    """A layer of 4,096 x 4,096 (64 MB): at its peak a flow holds what it makes of such a weight."""
    ours, stock = (benchmarked("memory.py", f"linear 4096, {flow}") for flow in ("ours", "stock"))
    assert ours["peak"] <= stock["peak"], (ours, stock)
    # Ours runs the program once more to check it: one copy of the integers, of 16 MB.
    assert ours["peaks"]["lower"] <= stock["peaks"]["lower"] + 17, (ours, stock)


@pytest.mark.slow
def test_what_was_converted_is_not_kept() -> None:
    """torchao remembers the device of every model; ours are forgotten."""
    x = torch.randn(1, 3, 4, 4)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_pt2e(capture(nn.Conv2d(3, 4, 3).eval(), (x,)), quantizer)
    prepared(x)
    weights = [weakref.ref(value) for value in prepared.parameters()]
    converted = convert_pt2e(prepared)
    del prepared
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights)
    assert converted is not None


def test_what_was_lowered_is_not_kept() -> None:
    """Caches of PyTorch (2.15) and ExecuTorch (1.5) held every delegate, and its weights."""
    x = torch.randn(2, 4)
    held = sum(type(value) is LoweredBackendModule for value in gc.get_objects())
    graph = quantized(nn.Linear(4, 4), (x,))
    weights = [weakref.ref(value) for value in graph.buffers()]
    assert cq.lower(graph, (x,)).report.delegates == 1
    known = len(FakeTensorMode.cache)
    del graph
    gc.collect()
    now = sum(type(value) is LoweredBackendModule for value in gc.get_objects())
    assert now <= held
    assert weights
    assert not any(weight() is not None for weight in weights)
    assert known  # what makes the next capture quick stays


def benchmarked(script: str, case: str) -> dict[str, Any]:
    """What a benchmark finds for one case, in a process of its own."""
    return measured(Path(__file__).parent / "benchmarks" / script, case)


LONG_STAGES = ("prepare", "convert", "rewriting the graph", "partitioning for XNNPACK")
"""Stages that take long enough for a clock that is rounded to hundredths of a second."""


# ---------------------------------------------------------------------------------------------
# What is faster than upstream gives the same
# ---------------------------------------------------------------------------------------------


class Upstream(cq.IntegerQuantizer):
    """Leaves it to torchao to insert the observers."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, observers: dict[Any, Any]) -> None:
        return Quantizer.prepare_obs_or_fq_callback(self, model, observers)


def residual(self: Function, x: Tensor) -> Tensor:
    y = self.first(x)
    a, b = torch.split(torch.relu(y), 2, dim=1)
    joined = torch.cat([a, b, y + y], dim=1)
    return self.last(joined) + self.last(joined * joined).mean((2, 3), keepdim=True)


def requantized(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.first(x), self.last(torch.cat([x, self.first(x)], dim=1))


CASES = {
    "residual": (residual, {"first": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(8, 5, 1)}, {}),
    "two widths": (
        requantized,
        {"first": nn.Conv2d(3, 4, 1), "last": nn.Conv2d(7, 5, 1)},
        {"first": "a4w8", "last": "a16w8"},
    ),
}


def described(graph: GraphModule) -> list[tuple[Any, ...]]:
    """Each node, and for an observer's call the other names of that observer."""
    names: dict[int, list[str]] = {}
    for name, module in graph.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return [
        (
            node.op,
            node.name,
            str(node.target),
            str(node.args),
            sorted(node.meta),
            names[id(graph.get_submodule(str(node.target)))] if node.op == "call_module" else None,
        )
        for node in graph.graph.nodes
    ]


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
@pytest.mark.parametrize("case", CASES)
def test_observers_stand_where_torchao_018_puts_them(
    case: str, prepare: Callable[..., GraphModule]
) -> None:
    function, children, rules = CASES[case]
    prepared = []
    for kind in (Upstream, cq.IntegerQuantizer):
        quantizer = kind().set_global("a8w8")
        for module, scheme in rules.items():
            quantizer.set_module_name(module, scheme)
        graph = capture(Function(function, **children), (torch.randn(2, 3, 6, 6),))
        prepared.append(described(prepare(graph, quantizer)))
    assert prepared[0] == prepared[1]
    assert sum(node[0] == "call_module" for node in prepared[0]) > 4


def test_a_name_that_is_taken_is_not_given_to_an_observer() -> None:
    graph = chain(5)
    graph.register_buffer("activation_post_process_1", torch.tensor(7.0))
    insert_observers(graph, {node: nn.Identity() for node in annotated(graph)})
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert names[:2] == ["activation_post_process_0", "activation_post_process_2"]
    assert graph.activation_post_process_1 == 7.0


def annotated(graph: GraphModule) -> list[Node]:
    """All calls, marked as annotated."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    for node in calls:
        node.meta[ANNOTATION_KEY] = True
    return calls


class Everything(nn.Module):
    """Ops that ExecuTorch would decompose unless the partitioner wants them whole."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2, stride)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(nn.functional.hardswish(self.conv(x)))
        return self.head(x.flatten(1))


def whole_ops(stride: int) -> nn.Module:
    model = Everything(stride).eval()
    model(torch.randn(1, 3, 8, 8))  # makes the linear layer
    return model


def test_the_quick_partitioner_says_less_and_gives_the_same_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 3, 8, 8)
    exported = torch.export.export(whole_ops(2), (x,))
    ops, accepts = QuickPartitioner().ops_to_not_decompose(exported)
    assert ops == XnnpackPartitioner().ops_to_not_decompose(exported)[0]
    assert accepts is None

    converted = quantized(whole_ops(2), (x,))
    quick = cq.lower(converted, (x,)).buffer
    upstream = XnnpackPartitioner.ops_to_not_decompose
    monkeypatch.setattr(QuickPartitioner, "ops_to_not_decompose", upstream)
    assert cq.lower(converted, (x,)).buffer == quick


def test_the_quick_partitioner_says_all_where_xnnpack_refuses_a_call() -> None:
    """ExecuTorch 1.5.1 leaves out max pools with a stride larger than their kernel."""
    exported = torch.export.export(whole_ops(3), (torch.randn(1, 3, 8, 8),))
    _, accepts = QuickPartitioner().ops_to_not_decompose(exported)
    assert accepts is not None
    taken = {str(n.target): accepts(n) for n in exported.graph.nodes if n.op == "call_function"}
    assert taken["aten.hardswish.default"]
    assert not taken["aten.max_pool2d.default"]
