"""Regions under no_grad and outside of autocast are part of the graph around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.graphs import Function, capture
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.ops.rewrites.regions import inline_regions

X = torch.randn(2, 4)


def nested(self: Any, x: Tensor) -> Tensor:
    """A region without autocast, and one without gradients that holds another."""
    with torch.autocast("cpu", enabled=False):
        y = self.seen(x)
        z = y.relu()
    with torch.no_grad():
        w = self.hidden(z)
        with torch.autocast("cpu", enabled=False):
            v = w * 3
    return y + z + w + v


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"seen": nn.Linear(4, 4), "hidden": nn.Linear(4, 4)}


def test_ops_of_regions_are_planned_under_the_names_of_their_results() -> None:
    model = Function(nested, **layers())
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(torch.export.export(model, (X,)))
    assert [(op.node, op.family) for op in plan.ops] == [
        ("linear", "linear"),
        ("relu", "relu"),
        ("linear_1", "linear"),
        ("mul", "mul"),
        *((name, "add") for name in ("add", "add_1", "add_2")),
    ]


def test_the_same_values() -> None:
    graph = capture(Function(nested, **layers()), (X,))
    want = graph(X)
    assert inline_regions(graph) == 2
    assert not [n for n in graph.graph.nodes if "wrap_with" in str(n.target)]
    assert not [name for name, _ in graph.named_modules() if name.startswith("submod")]
    graph.graph.lint()
    assert torch.equal(graph(X), want)


def test_no_gradients_in_training() -> None:
    """What is computed without gradients in the model has none in the prepared graph either."""
    graph = torch.export.export(Function(nested, **layers()), (X,)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(X).sum().backward()
    grads = {name: p.grad is not None for name, p in prepared.named_parameters()}
    assert grads == {
        f"{a}.{b}": a == "seen" for a in ("seen", "hidden") for b in ("weight", "bias")
    }


def test_a_region_that_writes_is_trained() -> None:
    """The power iteration of a spectral norm writes its vectors with ``out=``."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())
    graph = torch.export.export(model.train(), (X,)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(X).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("device", "inlined"), [("cpu", 0), ("cuda", 1)])
def test_autocast_that_changes_dtypes_stays_a_call(device: str, inlined: int) -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return self.layer(x).float() + 1.0

    assert inline_regions(capture(Function(function, layer=nn.Linear(4, 4)), (X,))) == inlined


def linear_attention(_self: Any, q: Tensor, k: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        product = torch.matmul(q, k.mT)
    return product.relu()


def test_products_without_autocast_are_float_unless_named() -> None:
    inputs = (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    exported = torch.export.export(Function(linear_attention), inputs)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    assert [op.scheme for op in quantizer.plan(exported).ops if op.family == "matmul"] == [None]
    quantizer.set_operator_type(torch.ops.aten.matmul.default, "a8w8")
    assert [op.scheme for op in quantizer.plan(exported).ops if op.family == "matmul"] == ["a8w8"]


def test_a_model_of_one_region_is_a_captured_graph() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)

    exported = torch.export.export(Function(function, layer=nn.Linear(4, 4)), (X,))
    (op,) = cq.IntegerQuantizer().set_global("a8w8").plan(exported).ops
    assert op.scheme == "a8w8"
