"""ExecuTorch's own lowering call gives the program that ``lower`` gives."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackPartitioner as UpstreamPartitioner,
)
from executorch.exir import EdgeProgramManager, to_edge, to_edge_transform_and_lower
from executorch.exir.lowered_backend_module import executorch_call_delegate
from support.graphs import Function, differences
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.program import StoredProgram
from custom_quantizer.core.names import restore_names
from custom_quantizer.core.rewriting import ORIGINAL_NAME
from custom_quantizer.reference.converted import read_converted


class Net(nn.Module):
    """A residual, a strided slice, an elu, a product of activations, and a head in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.elu(self.stem(x))[:, :, ::2, ::2]
        x = torch.relu(x + self.depthwise(x))
        rows = self.mix(x.flatten(2))
        y = self.head((rows @ rows.transpose(1, 2)).mean(1))
        return y, torch.softmax(y, -1)


IMAGE = (2, 3, 8, 8)
SCHEMES = ["a8w8", "a8w8-per_tensor", "a8w4", "a4w4", "a16w8", "dyn8w8", "dyn8w4"]


def images(seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, *IMAGE[1:], generator=generator),)


def converted(scheme: str = "a8w8", build: Any = Net, seed: int = 0) -> GraphModule:
    torch.manual_seed(seed)
    return convert(build(), images(), scheme).graph


def standard_call(graph: GraphModule, **dynamic: Any) -> EdgeProgramManager:
    return to_edge_transform_and_lower(
        torch.export.export(graph, images(), **dynamic), partitioner=[cq.XnnpackPartitioner()]
    )


def run(data: bytes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return StoredProgram(data, "the program", isolated=False).run(*inputs)


@pytest.mark.parametrize("scheme", slow_but(["a8w4"], SCHEMES))
def test_the_standard_call_gives_the_program_that_lower_gives(scheme: str) -> None:
    graph = converted(scheme)
    lowered = cq.lower(graph, images())
    edge = standard_call(graph)
    cq.check(edge, graph, images())
    data = bytes(edge.to_executorch().buffer)
    contents = cq.read_program(data)
    assert (len(contents.delegates), contents.kernels) == (
        lowered.report.delegates,
        lowered.contents.kernels,
    )
    if not scheme.startswith("dyn"):
        assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    for seed in (0, 1):
        assert differences(run(data, images(seed)), lowered.run(*images(seed))) == []


class Gated(nn.Module):
    """Export gives what it records of an op of several results to each of these."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, 1)
        last, first = (value * torch.sigmoid(gate)).split(2, 1)
        return self.head(torch.cat([first, last], 1).flatten(2).mean(1))


@pytest.mark.parametrize("build", [Net, Gated])
def test_exporting_again_changes_no_name(build: Any) -> None:
    """The mean over rows is a linear layer here; export numbers it before the head."""
    graph = converted(build=build)
    exported = torch.export.export(graph, images()).module()
    renumbered = {node.name for node in exported.graph.nodes if "linear" in node.name}
    restore_names(exported)
    for first, second in zip(ops(graph), ops(exported), strict=True):
        assert (first.name, first.target) == (second.name, second.target)
        assert first.meta.get(ORIGINAL_NAME) == second.meta.get(ORIGINAL_NAME)
    assert renumbered - {node.name for node in exported.graph.nodes}
    assert differences(exported(*images()), graph(*images())) == []


class Recurrent(nn.Module):
    """Its parts have names that export numbers in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(24, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.steps(x.flatten(2).mT.unflatten(1, (8, 8)).flatten(2)[:, :2])[0])


@pytest.mark.slow
def test_a_graph_that_was_exported_again_is_checked_by_the_names_it_had() -> None:
    again = torch.export.export(converted(build=Recurrent), images()).module()
    cq.check(standard_call(again), again, images())
    exported = cq.export_converted(again, images())
    edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
    cq.check(edge, again, images())


def ops(graph: GraphModule) -> list[Node]:
    """Calls that are no quantize or dequantize node."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and "quantize" not in str(node.target)
    ]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("most", [5, 16])  # 16: a limit of PyTorch's own, with one thread
def test_a_dynamic_batch(most: int) -> None:
    dynamic = {"x": {0: Dim("batch", min=1, max=most)}}
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 5)).eval()
    exported = torch.export.export(model, images(), dynamic_shapes=({0: dynamic["x"][0]},))
    graph = convert_captured(exported.module())
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, images(), dynamic_shapes=({0: dynamic["x"][0]},)),
        partitioner=[cq.XnnpackPartitioner()],
    )
    lowered = cq.lower(graph, images())
    data = bytes(edge.to_executorch().buffer)
    assert len(cq.read_program(data).delegates) == 1
    reference = cq.integer_reference(graph)
    for batch in (most, 1, 3):
        given = images(3, batch)
        want = reference(*given)
        assert differences(run(data, given), want) == []
        assert differences(lowered.run(*given), want) == []


def convert_captured(graph: GraphModule) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*images())
    return cast(GraphModule, convert_pt2e(prepared))


@pytest.mark.slow
@pytest.mark.parametrize(
    "route", slow_but(["standard call"], ["lower", "standard call", "exported"])
)
def test_every_route_gives_a_program_of_contiguous_inputs(route: str) -> None:
    """An image whose pixels hold all their channels together is no other example."""
    graph = converted()
    last = tuple(x.contiguous(memory_format=torch.channels_last) for x in images())
    if route == "lower":
        data = cq.lower(graph, last).buffer
    elif route == "exported":
        exported = cq.export_converted(graph, last)
        edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
        data = bytes(edge.to_executorch().buffer)
    else:
        edge = to_edge_transform_and_lower(
            torch.export.export(graph, last), partitioner=[cq.XnnpackPartitioner()]
        )
        cq.check(edge, graph, last)
        data = bytes(edge.to_executorch().buffer)
    want = cq.integer_reference(graph)(*images())
    assert torch.equal(run(data, images())[0], want[0])


@pytest.mark.slow
def test_several_methods_in_one_program() -> None:
    graphs = {"forward": converted("a8w8"), "small": converted("a8w4", seed=1)}
    edge = to_edge_transform_and_lower(
        {name: torch.export.export(graph, images()) for name, graph in graphs.items()},
        partitioner={name: [cq.XnnpackPartitioner()] for name in graphs},
    )
    for name, graph in graphs.items():
        cq.check(edge, graph, images(), method=name)
    with pytest.raises(cq.InputError, match="no method 'large'; it has forward, small"):
        cq.check(edge, graphs["small"], images(), method="large")
    with pytest.raises(cq.VerificationError):
        cq.check(edge, graphs["small"], images(), method="forward")


@pytest.mark.slow
def test_upstream_s_partitioner_takes_what_was_exported_for_it() -> None:
    """Of a network without products of activations and elus, which it does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    graph = convert(model, images(), "a8w4").graph
    edge = to_edge_transform_and_lower(
        cq.export_converted(graph, images()), partitioner=[UpstreamPartitioner()]
    )
    cq.check(edge, graph, images())
    data = bytes(edge.to_executorch().buffer)
    contents = cq.read_program(data)
    assert (len(contents.delegates), contents.kernels) == (1, ())
    assert differences(run(data, images(1)), cq.integer_reference(graph)(*images(1))) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dyn8w8", "a8w8"])
def test_the_way_that_does_not_work_is_told_the_ways_that_do(scheme: str) -> None:
    rows = (torch.randn(2, 16),)
    graph = convert(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), rows, scheme).graph
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, rows), partitioner=[UpstreamPartitioner()]
    )
    with pytest.raises(cq.LoweringError, match=r"cq\.XnnpackPartitioner\(\)"):
        cq.check(edge, graph, rows)


# ---------------------------------------------------------------------------------------------
# check
# ---------------------------------------------------------------------------------------------


def with_one_bias_changed(graph: GraphModule) -> tuple[GraphModule, str]:
    """A copy whose first bias is one unit larger in one channel."""
    twin = copy.deepcopy(graph)
    op = next(op for op in read_converted(twin).integer if op.bias is not None)
    stored = cast(Node, cast(Node, op.match.bias).args[0])
    bias = operator.attrgetter(str(stored.target))(twin)
    bias.data[1] += 1
    return twin, op.node.name


@pytest.fixture(scope="module")
def done() -> tuple[GraphModule, EdgeProgramManager]:
    graph = converted()
    return graph, standard_call(graph)


@pytest.mark.slow
def test_check_takes_every_form_of_a_program(
    done: tuple[GraphModule, EdgeProgramManager], tmp_path: Path
) -> None:
    graph, edge = done
    program = copy.deepcopy(edge).to_executorch()
    (tmp_path / "net.pte").write_bytes(program.buffer)
    for form in (edge, program, bytes(program.buffer), tmp_path / "net.pte"):
        cq.check(form, graph, images())


def test_debug_handles_are_those_of_another_way_to_the_same_program() -> None:
    contents = cq.lower(converted(), images()).contents.main
    (delegate,) = contents.delegates
    later = tuple(replace(op, debug_handle=op.debug_handle + 4) for op in delegate.ops)
    counted = replace(contents, delegates=(replace(delegate, ops=later),))
    assert counted.numbered_like(contents) == contents
    less = replace(contents, delegates=(replace(delegate, ops=later[1:]),))
    assert less.numbered_like(contents) == less


class Cached(nn.Module):
    """One step of a decoder whose keys and values are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        key, value = self.both(x).view(1, 1, 2, 2, 4).permute(2, 0, 3, 1, 4)
        keys, values = keys.index_copy(2, at, key), values.index_copy(2, at, value)
        y = F.scaled_dot_product_attention(key, keys, values, (torch.arange(6) <= at)[None])
        return self.out(y.reshape(1, 1, 8)), keys, values


@pytest.mark.slow
def test_a_finished_program_with_kernels_between_its_delegates(tmp_path: Path) -> None:
    keys, values = torch.randn(2, 1, 2, 6, 4)
    example = (torch.randn(1, 1, 8), keys, values, torch.tensor([2]))
    graph = convert(Cached(), example, "a8w8").graph
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, example), partitioner=[cq.XnnpackPartitioner()]
    )
    cq.check(bytes(edge.to_executorch().buffer), graph, example)
    cq.load_graph(cq.save_graph(graph, example, tmp_path / "net.graph.safetensors"))


@pytest.mark.parametrize("finished", slow_but([True], [False, True]))
def test_check_notices_one_unit_of_one_bias(
    finished: bool, done: tuple[GraphModule, EdgeProgramManager]
) -> None:
    graph, edge = done
    other, name = with_one_bias_changed(graph)
    program = bytes(copy.deepcopy(edge).to_executorch().buffer) if finished else edge
    with pytest.raises(cq.VerificationError, match=rf"^{name} \(stem\): bias: "):
        cq.check(program, other, images())


@pytest.mark.slow
def test_check_of_something_else(done: tuple[GraphModule, EdgeProgramManager]) -> None:
    graph, _ = done
    with pytest.raises(
        cq.InputError, match=r"expected what to_edge_transform_and_lower .* got int"
    ):
        cq.check(cast(Any, 3), graph, images())
    with pytest.raises(cq.ProgramError):
        cq.check(b"not a program", graph, images())


def test_check_wants_a_tensor_for_each_input() -> None:
    """torch.export takes one that is given twice for one input, and no output would differ."""
    x, y = torch.randn(2, 4)[:, None]
    net = Function(lambda s, a, b: s.layer(a) + b, layer=nn.Linear(4, 4))
    with pytest.raises(cq.InputError, match="holds one tensor twice"):
        cq.check(b"", convert(net, (x, y)).graph, (x, x))


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


def test_a_float_graph_is_lowered_in_float_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    exported = torch.export.export(model, images())
    with pytest.warns(UserWarning, match="without a quantized tensor: it is lowered in float"):
        edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
    (got,) = run(bytes(edge.to_executorch().buffer), images())
    torch.testing.assert_close(got, model(*images()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_old_call_says_that_it_comes_too_late() -> None:
    """``to_edge`` and ``to_backend``, deprecated; the way out that the warning names works."""
    x = torch.randn(2, 4)
    graph = convert(nn.Linear(4, 5), (x,)).graph
    with pytest.warns(UserWarning, match=r"1 integer biases reached .*export_converted returns"):
        to_edge(torch.export.export(graph, (x,))).to_backend(cq.XnnpackPartitioner())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*integer biases.*")
        edge = to_edge(cq.export_converted(graph, (x,))).to_backend(cq.XnnpackPartitioner())
    delegate, _ = (n for n in edge.exported_program().graph.nodes if n.op == "call_function")
    assert delegate.target is executorch_call_delegate
    (got,) = StoredProgram(edge.to_executorch().buffer, "").run(x)
    assert torch.equal(got, cq.integer_reference(graph)(x))


@pytest.mark.parametrize("argument", ["configs", "config_precisions", "per_op_mode"])
def test_arguments_of_upstream_s_partitioner(argument: str) -> None:
    with pytest.raises(cq.InputError, match=f"takes no {argument}: .* leave it out"):
        cq.XnnpackPartitioner(**{argument: None})


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "8"])
def test_a_wrong_upper_bound(wrong: Any) -> None:
    with pytest.raises(cq.InputError, match="dynamic_max is a size of at least 1"):
        cq.XnnpackPartitioner(dynamic_max=wrong)


def test_a_product_that_upstream_refuses_leaves_its_inputs_written() -> None:
    """One that no quantizer saw as it becomes."""
    x = torch.randn(4, 8)
    model = Function(lambda m, x: ((rows := m.a(x)), rows.T), a=nn.Linear(8, 8))
    graph = convert(model, (x,), "a8w8").graph
    output = graph.graph.output_node()
    rows, columns = output.all_input_nodes
    with graph.graph.inserting_before(output):
        product = graph.graph.call_function(
            torch.ops.aten.linalg_multi_dot.default, ([rows, columns],)
        )
    output.args = ((product, columns),)
    graph.recompile()
    lowered = cq.lower(graph, (x,))
    assert lowered.report.outside == ("aten::mm.out",)
    for got, want in zip(lowered.run(x), graph(x), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
