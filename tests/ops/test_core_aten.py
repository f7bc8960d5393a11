"""Graphs that ``run_decompositions`` rewrote become the integers that the captured ones become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.graphs import differences
from support.models import convert, randomize_batch_norms, torchvision_model
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.core.graph import is_quantize
from custom_quantizer.core.noise import Noise
from custom_quantizer.ops.rewrites.core_aten import CORE_ATEN

aten = torch.ops.aten


class Then(nn.Module):
    """A layer, and a function of its result."""

    def __init__(self, layer: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


class Attention(nn.Module):
    """Attention over an image's rows, whose scores a mask may be added to."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.project = nn.Linear(6, 3 * 8)
        mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


IMAGE, ROW, SEQUENCE = (2, 4, 8, 8), (2, 4, 12), (2, 5, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), ROW),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), 2, (1, 0), (1, 2), 2, False), IMAGE),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1), ROW),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), IMAGE),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE,
    ),
    "batch norm before": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1)),
        IMAGE,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 1), nn.LayerNorm(12)), ROW),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6)), IMAGE),
    "softmax": (lambda: Then(nn.Conv2d(4, 6, 1), lambda y: y.softmax(1)), IMAGE),
    "log_softmax": (lambda: Then(nn.Conv2d(4, 6, 1), lambda y: y.log_softmax(1)), IMAGE),
    "max_pool2d": (lambda: Then(nn.Conv2d(4, 6, 1), lambda y: F.max_pool2d(y, 3, 2, 1)), IMAGE),
    "adaptive pool": (
        lambda: Then(nn.Conv2d(4, 6, 1), lambda y: F.adaptive_avg_pool2d(y, (2, 4))),
        IMAGE,
    ),
}


def decomposed(model: nn.Module, example: tuple[Tensor, ...]) -> GraphModule:
    graph = torch.export.export(model.eval(), example).run_decompositions().module()
    assert isinstance(graph, GraphModule)
    return graph


def quantized(graph: GraphModule, example: tuple[Tensor, ...]) -> GraphModule:
    prepared = prepare_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*example)
    return convert_pt2e(prepared)


def integers(graph: GraphModule) -> int:
    return sum(map(is_quantize, graph.graph.nodes))


QUICK = ("conv1d", "conv_transpose2d", "batch norm", "layer norm", "softmax", "max_pool2d")


@pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
def test_a_decomposed_graph_becomes_the_same_integers(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, example = randomize_batch_norms(build()), (torch.randn(shape),)
    graph = decomposed(model, example)
    assert CORE_ATEN.keys() & {node.target for node in graph.graph.nodes}
    wanted, got = convert(model, example).graph, quantized(graph, example)
    assert integers(got) == integers(wanted)
    x = torch.randn(shape)
    assert differences(got(x), wanted(x)) == []


PRODUCTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "attention": lambda: Attention(masked=False),
    "masked attention": lambda: Attention(masked=True),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_decomposed_products_are_one_delegate(name: str) -> None:
    """They sum in another order, and scale both factors of attention: other last bits of floats."""
    torch.manual_seed(0)
    model, example = PRODUCTS[name](), (torch.randn(SEQUENCE),)
    converted = quantized(decomposed(model, example), example)
    program = cq.lower(converted, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    noise = Noise()
    noise.add(model(*example), program.run(*example))
    assert noise.ratio > 35


def test_rules_name_the_op_that_is_in_the_graph_or_the_one_that_was_written() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU())
    graph = decomposed(model, (torch.randn(IMAGE),))
    for target in (aten.convolution.default, aten.conv2d.default):
        quantizer = cq.IntegerQuantizer().set_operator_type(target, "a8w4")
        (op,) = [op for op in quantizer.plan(graph).ops if op.path == "0"]
        assert (op.node, op.target, op.scheme) == (
            "convolution",
            str(aten.convolution.default),
            "a8w4",
        )
    graph = decomposed(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), (torch.randn(2, 8),))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(aten.native_layer_norm.default, None)
    norm, _ = quantizer.plan(graph).ops
    assert norm.target == "aten.native_layer_norm.default"
    assert quantizer.last_plan.warnings == ()  # the rule selects something
    with pytest.raises(cq.ConfigError, match="not an operator this quantizer knows"):
        cq.IntegerQuantizer().set_operator_type("aten.convolutions.default", "a8w4")


def test_a_decomposed_graph_is_trained_and_lowered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    example = (torch.randn(IMAGE),)
    graph = decomposed(randomize_batch_norms(model), example)
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(*example).square().mean().backward()
        optimizer.step()
    converted = convert_pt2e(prepared)
    program = cq.lower(converted, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert cq.verify(converted, program, [(torch.randn(IMAGE),)]).bit_exact


def test_what_asks_for_other_rows_stays() -> None:
    """Only rows that are minus infinity throughout are those that no softmax has a value for."""

    def forward(x: Tensor) -> Tensor:
        no_row = torch.logical_not(torch.any(torch.logical_not(x == 0.0), -1, True))
        return torch.where(no_row, torch.zeros_like(x), x.softmax(-1))

    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    x = torch.randn(3, 4)
    x[1] = 0.0
    prepared = prepare_pt2e(decomposed(Rows(), (x,)), cq.IntegerQuantizer().set_global("a8w8"))
    assert torch.equal(prepared(x), forward(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vit_b_32"])
def test_a_decomposed_network_is_one_delegate(name: str) -> None:
    example = (torch.randn(1, 3, 224, 224),)
    converted = quantized(decomposed(torchvision_model(name), example), example)
    program = cq.lower(converted, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
