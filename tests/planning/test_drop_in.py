"""In place of ``XNNPACKQuantizer``, inside ``ComposableQuantizer``, with dynamic batches."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.models import convert
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import custom_quantizer as cq
from custom_quantizer.core.graph import is_quantize

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"is_per_channel": True}, "a8w8-histogram"),
        ({}, "a8w8-per_tensor-histogram"),
        ({"is_per_channel": True, "is_dynamic": True}, "dyn8w8"),
        ({"is_per_channel": True, "weight_qmin": -7, "weight_qmax": 7}, "a8w4-histogram"),
    ],
)
def test_torchao_configs_keep_their_meaning(options: dict[str, object], name: str) -> None:
    config = get_symmetric_quantization_config(**options)
    by_config = cq.IntegerQuantizer().set_global(config)
    exported = torch.export.export(net(), EXAMPLE)
    plan = by_config.plan(exported)
    assert plan.op("linear").scheme == name
    assert plan.to_json() == cq.IntegerQuantizer().set_global(name).plan(exported).to_json()


@pytest.mark.parametrize("scope", ["set_module_name", "set_module_type", "set_operator_type"])
def test_one_import_is_all_that_changes(scope: str) -> None:
    key = {
        "set_module_name": "head",
        "set_module_type": nn.Linear,
        "set_operator_type": torch.ops.aten.linear.default,
    }[scope]
    config = get_symmetric_quantization_config(is_per_channel=True)
    quantized = []
    for kind in (XNNPACKQuantizer, cq.IntegerQuantizer):
        quantizer = getattr(kind(), scope)(key, config)
        prepared = prepare_pt2e(torch.export.export(net(), EXAMPLE).module(), quantizer)
        prepared(*EXAMPLE)
        graph = convert_pt2e(prepared)
        node = next(n for n in graph.graph.nodes if n.name == "linear")
        quantized.append(
            [
                sum(is_quantize(n) for n in graph.graph.nodes),
                "dequantize" in str(node.args[0].target),
                "dequantize" in str(node.args[1].target),
            ]
        )
    assert quantized[0] == quantized[1] == [2, True, True]


def test_composable_quantizer_gives_the_same_graph() -> None:
    plain = convert(net(), EXAMPLE)
    composed = ComposableQuantizer([cq.IntegerQuantizer().set_global("a8w8")])
    prepared = prepare_pt2e(torch.export.export(net(), EXAMPLE).module(), composed)
    prepared(*EXAMPLE)
    graph = convert_pt2e(prepared)
    assert str(graph.graph) == str(plain.graph.graph)
    for (name, ours), (other, theirs) in zip(
        plain.graph.named_buffers(), graph.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def dynamic() -> tuple[torch.fx.GraphModule, cq.LoweredProgram]:
    shapes = ({0: torch.export.Dim("batch", min=1, max=24)},)
    captured = torch.export.export(net(), EXAMPLE, dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*EXAMPLE)
    graph = convert_pt2e(prepared)
    return graph, cq.lower(graph, EXAMPLE)


@pytest.mark.parametrize("batch", [1, 2, 7, 24])
def test_dynamic_batches_are_exact(dynamic, batch: int) -> None:
    graph, lowered = dynamic
    assert lowered.report.fully_delegated
    x = torch.randn(batch, 3, 8, 8)
    assert torch.equal(lowered.run(x), cq.integer_reference(graph)(x))


def test_any_memory_layout(dynamic) -> None:
    _, lowered = dynamic
    x = torch.randn(4, 3, 8, 8)
    expected = lowered.run(x)
    assert torch.equal(lowered.run(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(lowered.run(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.randn(2, 3, 8), r"shape \(\*, 3, 8, 8\)"),
        (torch.randn(2, 3, 8, 9), r"shape \(\*, 3, 8, 8\)"),
        (torch.randn(2, 3, 8, 8).double(), "float32"),
        (torch.randn(2, 3, 8, 8, dtype=torch.complex64), "float32"),
        (torch.randint(0, 255, (2, 3, 8, 8)), "float32"),
    ],
)
def test_wrong_inputs(dynamic, value: Tensor, message: str) -> None:
    _, lowered = dynamic
    with pytest.raises(cq.InputError, match=message):
        lowered.run(value)


def test_lowering_leaves_the_graph_alone() -> None:
    converted = convert(net(), EXAMPLE)
    before = str(converted.graph.graph)
    buffers = {name: value.clone() for name, value in converted.graph.named_buffers()}
    cq.lower(converted.graph, EXAMPLE)
    assert str(converted.graph.graph) == before
    after = dict(converted.graph.named_buffers())
    assert buffers.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in buffers.items())


def test_a_module_called_twice_has_a_bias_for_each_input_scale() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x) * 9)

    torch.manual_seed(0)
    example = (torch.randn(1, 4, 5, 5),)
    converted = convert(Twice(), example)
    lowered = cq.lower(converted.graph, example)
    first, second = lowered.integer_biases().values()
    assert not (first == second).all()
    assert cq.verify(converted.graph, lowered, example).bit_exact
