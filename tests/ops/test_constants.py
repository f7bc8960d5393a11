"""Folding of what does not depend on the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import Function, calls, capture
from torch import Tensor, nn
from torch.fx import GraphModule

from custom_quantizer.core.graph import is_constant
from custom_quantizer.ops.rewrites.constants import MAX_GROWTH, fold_constants

aten = torch.ops.aten


def folded(
    function: Callable[..., Any], *shapes: tuple[int, ...], parameters: bool = True, **children: Any
) -> tuple[GraphModule, int]:
    """The graph after folding, which computes the same bits as before."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    graph = capture(Function(function, **children), inputs)
    want = graph(*inputs)
    made = fold_constants(graph, parameters=parameters)
    graph.graph.lint()
    graph.recompile()
    got = graph(*inputs)
    assert torch.equal(got, want)
    return graph, made


def window_mask(_self: Any, x: Tensor) -> Tensor:
    """A mask written piece by piece into fresh memory, as shifted windows make it."""
    mask = x.new_zeros((4, 4))
    for i, rows in enumerate((slice(0, -2), slice(-2, None))):
        for j, columns in enumerate((slice(0, -2), slice(-2, None))):
            mask[rows, columns] = i * 2 + j
    mask = mask.view(1, 16) - mask.view(16, 1)
    return x + mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


def cleared_bias(self: Any, x: Tensor) -> Tensor:
    bias = self.layer.bias.clone()
    bias[1:3].zero_()
    return nn.functional.linear(x, self.layer.weight, bias)


def learned_attention(self: Any, x: Tensor) -> Tensor:
    """The first attention of a decoder, among queries that it has learned; nothing is dropped."""
    q = self.layer.weight.view(1, 1, 4, 4)
    seen = nn.functional.scaled_dot_product_attention(q, q, q).view(4, 4)
    return x + nn.functional.dropout(seen, 0.5, training=False)


@pytest.mark.parametrize(
    ("function", "shape", "left"),
    [
        (window_mask, (16, 16), [aten.add.Tensor]),
        (cleared_bias, (2, 4), [aten.linear.default]),
        (
            lambda s, x: x + s.layer.weight[torch.tensor([1, 0, 2, 2])].view(2, 8).t().contiguous(),
            (8, 2),
            [aten.add.Tensor],
        ),
        (lambda s, x: x * torch.arange(4.0).exp(), (2, 4), [aten.mul.Tensor]),
        (
            lambda s, x: torch.cat([s.layer.weight[:1].expand(3, -1), x]),
            (2, 4),
            [aten.cat.default],
        ),
        (lambda s, x: x + torch.zeros_like(x).add(2.0), (2, 4), [aten.add.Tensor]),
        (lambda s, x: x + s.layer.weight.split(2)[1].sum(), (2, 4), [aten.add.Tensor]),
        (learned_attention, (4, 4), [aten.add.Tensor]),
    ],
)
def test_what_is_the_same_in_all_calls_is_one_constant(
    function: Callable[..., Any], shape: tuple[int, ...], left: list[Any]
) -> None:
    graph, made = folded(function, shape, layer=nn.Linear(4, 4))
    assert made == 1
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == left


def test_each_use_sees_the_memory_as_it_was_then() -> None:
    def function(_self: Any, x: Tensor) -> Tensor:
        memory = torch.zeros(4)
        before = x + memory
        memory[1:3] = 5.0
        return before * memory

    graph, made = folded(function, (4,))
    assert made == 2
    values = [graph.get_buffer(str(n.target)).tolist() for n in graph.graph.nodes if is_constant(n)]
    assert values == [[0, 0, 0, 0], [0, 5, 5, 0]]


class Counter(nn.Module):
    """Counts its calls in a buffer, and hands on what it counted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        before = self.count * 3
        self.count.add_(1)
        return x + before + self.count * 3 + self.scale * 3


def test_a_buffer_that_changes_is_no_constant() -> None:
    model = Counter()
    graph = capture(model, (torch.ones(2),))
    assert fold_constants(graph) == 1
    graph.recompile()
    assert [graph(torch.ones(2))[0].item() for _ in range(3)] == [10.0, 16.0, 22.0]
    assert graph.get_buffer("count").item() == 3.0


def test_memory_that_inputs_are_written_to_is_no_constant() -> None:
    def function(_self: Any, x: Tensor) -> Tensor:
        memory = torch.zeros(4)
        memory[1:3] = x[:2]
        return x * memory

    graph, made = folded(function, (4,))
    assert made == 0
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert graph(x).tolist() == [0.0, 2.0, 6.0, 0.0]


def dropped_attention(_self: Any, x: Tensor) -> Tensor:
    q = torch.ones(1, 1, 2, 3)
    return x + nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (lambda _s, x: x + torch.rand(3), aten.rand.default),
        (
            lambda _s, x: x + nn.functional.dropout(torch.ones(3), training=True),
            aten.dropout.default,
        ),
        (dropped_attention, aten.scaled_dot_product_attention.default),
    ],
)
def test_random_numbers_are_no_constant(function: Callable[..., Any], call: Any) -> None:
    graph = capture(Function(function), (torch.randn(3),))
    fold_constants(graph)
    assert calls(graph, call)


def test_parameters_in_training_are_no_constants() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return x * self.layer.weight.exp() + self.norm.running_var.sqrt()

    children = {"layer": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
    graph, made = folded(function, (4, 4), parameters=False, **children)
    assert made == 1
    assert calls(graph, aten.exp.default)
    assert not calls(graph, aten.sqrt.default)


def test_what_would_grow_too_large_is_computed() -> None:
    size = MAX_GROWTH + 5
    graph, made = folded(
        lambda s, x: x + s.layer.weight.view(-1)[:1].expand(size).sum(0),
        (2,),
        layer=nn.Linear(2, 2),
    )
    assert made == 1  # the sum is small, whatever it is computed from
    graph, made = folded(
        lambda s, x: x + s.layer.weight.view(-1)[:1].expand(size), (1,), layer=nn.Linear(2, 2)
    )
    assert made == 0
    assert calls(graph, aten.expand.default)


def test_a_constant_is_not_copied() -> None:
    _, made = folded(lambda s, x: x + s.layer.bias.detach(), (4,), layer=nn.Linear(4, 4))
    assert made == 0


def test_a_constant_that_is_an_output_is_stored() -> None:
    """Also where it is what a layer makes of constants: nothing is left to quantize of it."""
    layer = nn.Linear(4, 3)
    graph = capture(
        Function(lambda s, x: (s.layer(s.layer.weight[:1]), s.layer(x)), layer=layer),
        (torch.randn(2, 4),),
    )
    x = torch.randn(2, 4)
    want = graph(x)
    assert fold_constants(graph) == 1
    graph.recompile()
    assert len(calls(graph, aten.linear.default)) == 1
    assert all(torch.equal(a, b) for a, b in zip(graph(x), want, strict=True))


def test_what_has_only_the_dtype_of_an_input_is_constant_in_any_batch() -> None:
    """Shifted windows and anchors are made so; what has the shape of a batch is no constant."""

    def forward(s: Any, x: Tensor) -> Tensor:
        anchors = torch.arange(4).type_as(x) + torch.arange(4).to(x)
        anchors = anchors + torch.ones(()).expand_as(x[0])
        return x.type_as(x) + x.new_zeros((4, 4)).fill_(2.0) + anchors + torch.ones_like(x)

    model = Function(forward)
    sizes = {0: torch.export.Dim("batch", min=1, max=8)}
    graph = capture(model, (torch.randn(2, 4, 4),), dynamic_shapes=((sizes,),))
    assert fold_constants(graph) == 2
    graph.recompile()
    for target in (aten.new_zeros.default, aten.arange.default, aten.expand_as.default):
        assert calls(graph, target) == []
    assert len(calls(graph, aten.ones_like.default)) == 1
    x = torch.randn(5, 4, 4)
    assert torch.equal(graph(x), forward(None, x))


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a parameter": lambda s, x: x * s.scale.item(),
    "a function of one": lambda s, x: x / s.scale.exp().item(),
    "arithmetic": lambda s, x: x * (1 / (s.scale.item() + 1.0)),
    "an entry": lambda s, x: x.clamp(max=s.bounds[1].item()),
    "an exponent": lambda s, x: x.abs() ** s.scale.item(),
    "a whole number": lambda s, x: x * s.count.item(),
}


class _Numbers(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("bounds", torch.tensor([0.0, 0.5]))
        self.register_buffer("count", torch.tensor(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_constants_are_told(name: str) -> None:
    """``item`` is a kernel outside of any delegate, and its number is no tensor in it."""
    model, x = _Numbers(NUMBERS[name]), torch.randn(3, 4)
    graph = capture(model, (x,))
    assert calls(graph, torch.ops.aten.item.default)
    fold_constants(graph)
    assert not calls(graph, torch.ops.aten.item.default)
    assert not calls(graph, torch.ops.aten._assert_scalar.default)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


def test_numbers_of_what_is_trained_or_given_are_asked_for() -> None:
    x, item = torch.randn(3, 4), torch.ops.aten.item.default
    trained = capture(_Numbers(NUMBERS["a parameter"]), (x,))
    fold_constants(trained, parameters=False)
    assert calls(trained, item)
    given = capture(_Numbers(lambda s, x: x * x[0, 0].item()), (x,))
    fold_constants(given)
    assert calls(given, item)


def test_a_whole_number_that_is_a_size_is_asked_for() -> None:
    """The shapes that follow from it are recorded with its symbol."""

    def function(s: Any, x: Tensor) -> Tensor:
        count = s.count.item()
        torch._check(count <= 3)
        return x + torch.zeros_like(x[:count]).sum() * count

    model, x = _Numbers(function), torch.randn(3, 4)
    graph = capture(model, (x,))
    fold_constants(graph)
    assert calls(graph, torch.ops.aten.item.default)
    assert torch.equal(graph(x), model(x))
