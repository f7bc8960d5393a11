"""Products of matrices in any spelling: layers where one operand is constant, else batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, canonicalize, capture, lowered_exactly, quantized, stress
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.reference.converted import read_converted

aten = torch.ops.aten
LINEAR, CONV, MATMUL = aten.linear.default, aten.conv2d.default, aten.matmul.default
X, HEADS, MATRIX = (2, 4, 8), (2, 3, 4, 8), (8, 5)

# Name: the product, shapes of its parameters, shapes of its inputs, what it becomes.
CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Any], Sequence[Any], Any]] = {
    "matrix": (lambda w, x: x @ w, [MATRIX], [X], LINEAR),
    "batch of one": (lambda w, x: x @ w, [(1, 8, 5)], [X], LINEAR),
    "one for each sample": (lambda w, x: x @ w, [(2, 8, 5)], [X], CONV),
    "one for each head": (lambda w, x: x @ w, [(3, 8, 5)], [HEADS], CONV),
    "of one sample, several": (lambda w, x: x @ w, [(3, 8, 5)], [(1, 4, 8)], LINEAR),
    "across": (lambda w, x: x @ w, [(1, 3, 8, 5)], [(2, 1, 4, 8)], LINEAR),
    "one for each of one dim": (lambda w, x: x @ w, [(3, 1, 8, 5)], [(3, 2, 4, 8)], CONV),
    "expanded": (lambda w, x: torch.bmm(x, w.expand(2, 8, 5)), [(1, 8, 5)], [X], LINEAR),
    "first": (lambda w, x: w @ x, [(5, 4)], [X], LINEAR),
    "first, expanded": (lambda w, x: w.expand(2, 5, 4) @ x, [(1, 5, 4)], [X], LINEAR),
    "first, one for each sample": (lambda w, x: w @ x, [(2, 5, 4)], [X], CONV),
    "vector": (lambda w, x: x @ w, [(8,)], [X], LINEAR),
    "vector first": (lambda w, x: w @ x, [(4,)], [X], LINEAR),
    "of a vector": (lambda w, x: x @ w, [MATRIX], [(8,)], LINEAR),
    "of a vector, several": (lambda w, x: x @ w, [(3, 8, 5)], [(8,)], LINEAR),
    "mv": (lambda w, x: torch.mv(x, w), [(8,)], [(4, 8)], LINEAR),
    "layer of a vector": (lambda w, x: F.linear(x, w), [(8,)], [X], LINEAR),
    "layer of a vector, bias": (lambda w, b, x: F.linear(x, w, b), [(8,), ()], [X], LINEAR),
    "addmm": (lambda w, b, x: torch.addmm(b, x, w), [MATRIX, (5,)], [(4, 8)], LINEAR),
    "addmv": (lambda w, b, x: torch.addmv(b, w, x), [(5, 8), (5,)], [(8,)], LINEAR),
    "baddbmm": (
        lambda w, b, x: torch.baddbmm(b, x, w.expand(2, 8, 5)),
        [(1, 8, 5), (1, 1, 5)],
        [X],
        LINEAR,
    ),
    "einsum": (lambda w, x: torch.einsum("bnc,cd->bnd", x, w), [MATRIX], [X], LINEAR),
    "einsum to columns": (lambda w, x: torch.einsum("bnc,dc->bdn", x, w), [(5, 8)], [X], LINEAR),
    "einsum of heads": (
        lambda w, x: torch.einsum("hcd,bhnc->nbhd", w, x),
        [(3, 8, 5)],
        [HEADS],
        CONV,
    ),
    "einsum over three": (
        lambda w, x: torch.einsum("bnchk,chkd->bnd", x, w),
        [(8, 2, 3, 5)],
        [(2, 4, 8, 2, 3)],
        LINEAR,
    ),
    "broadcast rows": (lambda x, y: x @ y, [], [(2, 3, 4, 8), (2, 1, 8, 5)], MATMUL),
    "broadcast columns": (lambda x, y: x @ y, [], [(2, 1, 4, 8), (2, 3, 8, 5)], MATMUL),
    "broadcast both": (lambda x, y: x @ y, [], [(2, 1, 4, 8), (1, 3, 8, 5)], MATMUL),
    "broadcast by rank": (lambda x, y: x @ y, [], [X, MATRIX], MATMUL),
    "broadcast by rank, first": (lambda x, y: x @ y, [], [(4, 8), (2, 8, 5)], MATMUL),
    "broadcast by expand": (
        lambda x, y: x.expand(2, 3, 4, 8) @ y,
        [],
        [(2, 1, 4, 8), (2, 3, 8, 5)],
        MATMUL,
    ),
    "of two vectors, each": (lambda x, y: x @ y, [], [X, (8,)], MATMUL),
    "einsum, broadcast": (
        lambda x, y: torch.einsum("bhnc,bmc->bhnm", x, y),
        [],
        [HEADS, (2, 6, 8)],
        MATMUL,
    ),
}


class Parametrized(nn.Module):
    def __init__(self, function: Callable[..., Any], shapes: Sequence[Any]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.weights, *inputs)


def built(name: str) -> Parametrized:
    torch.manual_seed(0)
    return Parametrized(*CASES[name][:2]).eval()


@pytest.mark.parametrize("name", CASES)
def test_a_product_becomes_a_layer_or_one_batched_product(name: str) -> None:
    _, _, shapes, target = CASES[name]
    model, inputs = built(name), tuple(torch.randn(shape) for shape in shapes)
    graph = canonicalize(capture(model, inputs))
    products = [n for n in graph.graph.nodes if n.target in (LINEAR, CONV, MATMUL)]
    assert [n.target for n in products] == [target]
    if target is MATMUL:
        left, right = (tuple(n.meta["val"].shape) for n in products[0].args[:2])
        assert left[:-2] == right[:-2]
    got, want = graph(*inputs), model(*inputs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["batch of one", "one for each head", "first", "expanded"])
def test_the_batch_may_be_dynamic(name: str) -> None:
    function, parameters, (shape,), target = CASES[name]
    if name == "expanded":
        function = lambda w, x: torch.bmm(x, w.expand(x.shape[0], 8, 5))  # noqa: E731
    model = Parametrized(function, parameters).eval()
    sizes = (({0: torch.export.Dim("n", min=1, max=8)},),)
    graph = canonicalize(capture(model, (torch.randn(shape),), dynamic_shapes=sizes))
    assert [n.target for n in graph.graph.nodes if n.target in (LINEAR, CONV, MATMUL)] == [target]
    given = torch.randn(5, *shape[1:])
    torch.testing.assert_close(graph(given), model(given), rtol=1e-5, atol=1e-5)


@cache
def program() -> tuple[GraphModule, cq.LoweredProgram, list[tuple[int, ...]]]:
    """All cases side by side, between integers."""
    shapes = [shape for case in CASES.values() for shape in case[2]]

    def run(model: Any, *inputs: Tensor) -> list[Tensor]:
        feed = iter(inputs)
        return [
            getattr(model, f"m{i}")(*[(lambda x: x + x)(next(feed)) for _ in case[2]])
            for i, case in enumerate(CASES.values())
        ]

    model = Function(run, **{f"m{i}": built(name) for i, name in enumerate(CASES)})
    inputs = tuple(torch.randn(shape) for shape in shapes)
    # Also that with a vector, which is float where only float outputs show it.
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(torch.ops.aten.matmul.default, "a8w8")
    graph = quantized(model, inputs, quantizer)
    return graph, cq.lower(graph, inputs), shapes


def test_products_are_one_delegate_in_integers() -> None:
    _, lowered, _ = program()
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    assert lowered.report.not_integer() == ()


def test_products_run_as_the_reference_says() -> None:
    graph, lowered, shapes = program()
    reference = cq.integer_reference(graph)
    for given in stress(shapes):
        got, want = lowered.run(*given), reference(*given)
        for name, a, b in zip(CASES, got, want, strict=True):
            assert torch.equal(a, b), name


def test_constants_are_weights_of_one_scale_a_channel() -> None:
    graph, _, _ = program()
    layers = [op for op in read_converted(graph).integer if op.weight is not None]
    assert len(layers) == sum(case[3] is not MATMUL for case in CASES.values())
    for op in layers:
        assert op.weight_qparams is not None
        assert op.weight_qparams.axis == 0, op.node
    biases = [op.bias for op in layers if op.bias is not None]
    assert [bias.dtype for bias in biases] == [torch.int32] * 3


@pytest.mark.parametrize("scheme", ["a8w4", "a4w4", "a8w8-per_tensor"])
def test_constants_take_any_width(scheme: str) -> None:
    model = Function(
        lambda s, x: s.heads(s.one(x)).sum(1, keepdim=True),
        one=built("batch of one"),
        heads=Parametrized(lambda w, x: x @ w, [(2, 5, 5)]),
    )
    inputs = (torch.randn(X),)
    graph = quantized(model, inputs, scheme)
    assert lowered_exactly(graph, inputs).report.outside == ()


def test_learned_queries_are_weights() -> None:
    """As in DETR: the same queries for every sample, and values that are learned."""

    def attend(model: Any, x: Tensor) -> Tensor:
        keys = model.layer(x)
        queries = model.learned.weights[0].expand(len(x), -1, -1)
        return F.scaled_dot_product_attention(queries, keys, keys)

    model = Function(attend, layer=nn.Linear(8, 8), learned=Parametrized(lambda: None, [(1, 5, 8)]))
    graph = quantized(model, (torch.randn(X),))
    report = cq.lower(graph, (torch.randn(X),)).report
    assert (report.delegates, report.outside) == (1, ())


def test_constants_are_trained() -> None:
    """What is computed from a parameter for a layer's weight is computed anew in each step."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    model, x = built("one for each head"), torch.randn(HEADS)
    prepared = prepare_qat_pt2e(
        torch.export.export(model.train(), (x,)).module(), cq.IntegerQuantizer().set_global("a8w8")
    )
    (weight,) = prepared.parameters()
    prepared(x).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0
