"""Our quantizer in torchao's ``ComposableQuantizer``, next to another one or to itself."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.graphs import differences
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.checksum import split_checksum
from custom_quantizer.backends.xnnpack.op_record import split_record
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.planning.drafts import ANNOTATED_BEFORE
from custom_quantizer.reference.verifying import output_scales

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
RELU = torch.ops.aten.relu.default
LINEAR = torch.ops.aten.linear.default
STOCK = get_symmetric_quantization_config(is_per_channel=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(x))).mean((2, 3)))


def quantized(*quantizers: Quantizer) -> GraphModule:
    torch.manual_seed(0)
    captured = torch.export.export(Net().eval(), EXAMPLE).module()
    prepared = prepare_pt2e(captured, ComposableQuantizer(list(quantizers)))
    prepared(*EXAMPLE)
    return convert_pt2e(prepared)


def ours(scheme: str | None = None) -> cq.IntegerQuantizer:
    quantizer = cq.IntegerQuantizer()
    return quantizer if scheme is None else quantizer.set_global(scheme)


def stock_head() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_module_name("head", STOCK)


def reasons(quantizer: cq.IntegerQuantizer) -> dict[str, str]:
    return {op.node: op.reason for op in quantizer.last_plan.floating}


def test_what_another_annotated_first_stays_its_own() -> None:
    mine = ours("a8w8")
    graph = quantized(stock_head(), mine)
    assert reasons(mine) == {"linear": ANNOTATED_BEFORE}
    lowered = cq.lower(graph, EXAMPLE)
    # The stock quantizer leaves the bias in float; XNNPACK's serializer rounds it.
    assert list(lowered.integer_biases()) == ["conv2d", "conv2d_1"]
    (row,) = (op for op in lowered.report.ops if op.node == "linear")
    assert "its bias is in float" in row.reason
    _agree(graph, lowered)


class Pooled(nn.Module):
    """A pool of any batch is a layer of ours, inside of a module that others know by its type."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.stem(x)).flatten(1)


def test_ops_that_a_module_became_are_not_taken_for_the_module() -> None:
    batch = ({0: torch.export.Dim("batch", max=8)},)
    captured = torch.export.export(Pooled().eval(), EXAMPLE, dynamic_shapes=batch).module()
    theirs = XNNPACKQuantizer().set_global(STOCK)
    prepared = prepare_pt2e(captured, ComposableQuantizer([ours("a8w8"), theirs]))
    prepared(*EXAMPLE)
    assert cq.lower(convert_pt2e(prepared), EXAMPLE).report.delegates == 1


def test_what_ours_leaves_another_may_take() -> None:
    mine = ours().set_module_name("head", "a8w8")
    graph = quantized(mine, XNNPACKQuantizer().set_global(STOCK))
    assert [op.node for op in mine.last_plan.quantized] == ["linear"]
    lowered = cq.lower(graph, EXAMPLE)
    assert list(lowered.integer_biases()) == ["linear"]
    _agree(graph, lowered)


def _agree(graph: GraphModule, lowered: cq.LoweredProgram) -> None:
    assert lowered.report.fully_delegated
    (scale,) = output_scales(graph)
    assert scale is not None
    error = (lowered.run(*EXAMPLE) - cq.integer_reference(graph)(*EXAMPLE)).abs().max()
    assert error <= 1.001 * scale


class Annotates(Quantizer):
    """Gives all calls of one overload this annotation of their output."""

    def __init__(self, target: object, output: QuantizationSpec | None = None) -> None:
        super().__init__()
        self.target, self.output = target, output

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is self.target:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    output_qspec=self.output, _annotated=True
                )
        return model

    def validate(self, model: GraphModule) -> None: ...


@pytest.mark.parametrize(("lowest", "again"), [(-128, 0), (-127, 2)])
def test_a_tensor_that_another_quantizes_has_one_observer(lowest: int, again: int) -> None:
    """A second one would round again; it is there only where ours wants other integers."""
    spec = QuantizationSpec(
        torch.int8, MinMaxObserver, lowest, 127, qscheme=torch.per_tensor_affine
    )
    graph = quantized(Annotates(RELU, spec), ours("a8w8"))
    twice = [n for n in graph.graph.nodes if is_quantize(n) and is_dequantize(n.args[0])]
    assert len(twice) == again
    inner = next(n for n in graph.graph.nodes if n.name == "conv2d_1")
    assert is_dequantize(inner.args[0])


@pytest.mark.parametrize(
    ("mine", "theirs", "shared"),
    [("a8w8", False, True), ("a8w8", True, False), ("dyn8w8", False, False)],
)
def test_scales_of_run_time_are_shared_with_nobody(mine: str, theirs: bool, shared: bool) -> None:
    """Neither ours with a tensor that another quantizes statically, nor the other way round."""
    spec = QuantizationSpec(
        torch.int8, MinMaxObserver, -128, 127, qscheme=torch.per_tensor_affine, is_dynamic=theirs
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    captured = torch.export.export(model.eval(), (torch.randn(2, 4),)).module()
    quantizer = ComposableQuantizer([Annotates(RELU, spec), ours().set_module_name("2", mine)])
    annotated = quantizer.annotate(quantizer.transform_for_annotation(captured))
    (relu,) = (node for node in annotated.graph.nodes if node.target is RELU)
    (reader,) = relu.users
    given = reader.meta["quantization_annotation"].input_qspec_map[relu]
    assert isinstance(given, SharedQuantizationSpec) is shared
    assert shared or given.is_dynamic is (mine == "dyn8w8")


@pytest.mark.parametrize("explicit_first", [True, False])
def test_two_of_ours_are_one_with_the_rules_of_both(explicit_first: bool) -> None:
    body = ours().set_module_name("body.*", "a8w4")
    rest = ours("a8w8") if explicit_first else ours("a8w8").set_module_name("body.*", None)
    both = (body, rest) if explicit_first else (rest, body)
    graph = quantized(*both)
    single = quantized(ours("a8w8").set_module_name("body.*", "a8w4"))
    lowered, wanted = cq.lower(graph, EXAMPLE), cq.lower(single, EXAMPLE)
    assert lowered.report.fully_delegated
    biases, expected = lowered.integer_biases(), wanted.integer_biases()
    assert biases.keys() == expected.keys()
    assert all((biases[name] == expected[name]).all() for name in biases)
    assert [op.backend for op in lowered.report.ops] == [op.backend for op in wanted.report.ops]
    for scale in (1.0, 30.0):
        given = EXAMPLE[0] * scale
        assert differences(lowered.run(given), wanted.run(given)) == []
        assert differences(lowered.run(given), cq.integer_reference(graph)(given)) == []
    # The same grid twice in a row: in the graph, but not in the program.
    assert program_size(lowered) == program_size(wanted)


def program_size(lowered: cq.LoweredProgram) -> int:
    """Without the record of ops: it has debug handles, which such a grid moves."""
    whole, _ = split_checksum(memoryview(lowered.buffer), "the program")
    return len(split_record(whole)[0])


def test_filters_say_who_annotates_what() -> None:
    first = ours("a8w8").set_filter_function(lambda node: node.target is not LINEAR)
    second = ours("a16w8")
    graph = quantized(first, second)
    assert {op.scheme for op in first.last_plan.quantized} == {"a8w8"}
    assert {op.node: op.scheme for op in second.last_plan.quantized} == {"linear": "a16w8"}
    assert set(reasons(second).values()) == {ANNOTATED_BEFORE}
    assert [op.node.name for op in cq.integer_reference(graph).graph.integer][-1] == "linear"


def test_an_activation_that_another_annotated_is_not_fused() -> None:
    mine = ours("a8w8")
    graph = quantized(Annotates(RELU), mine)
    assert reasons(mine) == {"relu": ANNOTATED_BEFORE, "relu_1": ANNOTATED_BEFORE}
    assert {op.fused for op in mine.last_plan.ops} == {None}
    _agree(graph, cq.lower(graph, EXAMPLE))


def test_nothing_is_left_for_the_second() -> None:
    second = ours("a8w4")
    quantized(ours("a8w8"), second)
    with pytest.raises(cq.ConfigError, match=r"nothing to quantize.*another quantizer annotated"):
        second.check_plan()
    stock = XNNPACKQuantizer().set_global(STOCK)
    with pytest.raises(cq.ConfigError, match="the first quantizer of a Composable"):
        quantized(stock, ours().set_module_name("head", "a8w8"))


def test_outputs_have_one_format() -> None:
    first = ours().set_module_name("head", "a8w8").set_io(outputs="a8")
    with pytest.raises(cq.ConfigError, match=r"output is annotated by another.*set_io on one"):
        quantized(first, ours("a8w8").set_io(outputs="a16"))


def test_a_later_quantizer_may_not_change_ours() -> None:
    with pytest.raises(RuntimeError, match="Annotates has changed annotations on node linear"):
        quantized(ours("a8w8"), Annotates(LINEAR))
