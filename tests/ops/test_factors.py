"""Factors and shifts become part of the weights and biases beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchvision.ops import FrozenBatchNorm2d

import custom_quantizer as cq
from custom_quantizer.training import qat

aten = torch.ops.aten
IMAGE = (2, 4, 5, 6)


def children() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    factors = nn.ParameterDict({"image": torch.randn(7, 1, 1), "last": torch.randn(6)})
    norms = {"norm": nn.BatchNorm2d(7), "plain": nn.BatchNorm2d(7, affine=False)}
    return {"conv": nn.Conv2d(4, 7, 3), "linear": nn.Linear(6, 6), "factors": factors, **norms}


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) * s.factors["image"],
        lambda s, x: s.factors["image"] * s.conv(x),
        lambda s, x: s.linear(x) * s.factors["last"],
        lambda s, x: F.linear(x, s.linear.weight) * s.factors["last"],
        lambda s, x: s.linear(x).permute(0, 3, 1, 2) * s.factors["last"].view(6, 1, 1),
        lambda s, x: F.dropout(s.conv(x), 0.5, False).contiguous() * s.factors["image"],
        lambda s, x: s.plain(s.conv(x)) * s.factors["image"],
        lambda s, x: s.plain(s.conv(x)) / s.factors["image"],
        lambda s, x: s.norm(s.conv(x) * s.factors["image"]),
        lambda s, x: s.linear(x).view(-1, 6) * s.factors["last"],
        lambda s, x: s.conv(x).flatten(2) * s.factors["image"].flatten(1),
        lambda s, x: s.conv(x) / s.factors["image"],
    ],
)
def test_a_factor_of_each_channel_is_folded(function: Callable[..., Any]) -> None:
    model, x = Function(function, **children()).eval(), torch.randn(IMAGE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = canonicalize(capture(model, (x,)))
    assert not calls(graph, aten.mul.Tensor)
    assert not calls(graph, aten.div.Tensor)
    assert len(calls(graph, aten.conv2d.default)) <= 1
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (lambda y: y * s.factors["image"] + y)(s.conv(x)),
        lambda s, x: F.relu(s.conv(x)) * s.factors["image"],
        lambda s, x: s.linear(x) * torch.arange(5.0).view(5, 1),
        lambda s, x: s.linear(x).view(2, 4, 30) * torch.arange(30.0),
        lambda s, x: F.linear(x, s.linear.weight, x[0, 0, 0]) * s.factors["last"],
    ],
)
def test_other_factors_stay(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(function, **children()), (x,)))
    assert len(calls(graph, aten.mul.Tensor)) == 1


NUMBERS: dict[str, Callable[..., Any]] = {
    "behind a conv": lambda s, x: s.conv(x) * 0.25,
    "behind a norm": lambda s, x: s.norm(s.conv(x)) * 0.25,
    "in front": lambda s, x: 2.0 * s.linear(x),
    "a quotient": lambda s, x: s.linear(x) / 4,
    "a tensor": lambda s, x: s.linear(x) * torch.tensor([0.5]),
    "many, all alike": lambda s, x: s.linear(x) * torch.full((5, 6), 0.5),
    "negative": lambda s, x: s.transposed(x) * -2.0,
    "of heads": lambda s, x: s.linear(x).view(2, 4, 5, 2, 3).transpose(2, 3) / 2.0,
    "before a layer": lambda s, x: s.conv(F.relu(x) * 0.5),
    "before layers": lambda s, x: (lambda y: s.linear(y) + F.linear(y, s.linear.weight.t() + 1))(
        F.relu(x) * 0.5
    ),
    "moved": lambda s, x: s.linear((F.relu(x) * 0.5).transpose(1, 2).flatten(1, 2)),
    "dropped": lambda s, x: s.conv(F.dropout(F.relu(x) * 0.5, 0.5, False)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_part_of_the_layers_beside_it(name: str) -> None:
    model = Function(NUMBERS[name], **layers()).eval()
    x = torch.randint(-4, 5, IMAGE).to(torch.float32)
    graph = canonicalize(capture(model, (x,)))
    assert not any(calls(graph, op) for op in (aten.mul.Tensor, aten.div.Tensor))
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) * 0.0,
        lambda s, x: (lambda y: y * 0.5 + y)(s.conv(x)),
        lambda s, x: s.linear(x) * 0.5 + F.linear(x + 1, s.linear.weight),  # would be stored twice
        lambda s, x: (lambda y: (s.linear(y), y))(F.relu(x) * 0.5),
        lambda s, x: (lambda y: s.linear(y) + torch.sin(y))(F.relu(x) * 0.5),
        lambda s, x: s.norm(F.relu(x).repeat(1, 2, 1, 1)[:, 1:] * 0.5),
        lambda s, x: F.relu(s.conv(x)) * 0.5,
    ],
)
def test_other_numbers_stay(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(function, **children()).eval(), (x,)))
    assert len(calls(graph, aten.mul.Tensor)) == 1


SHIFTS: dict[str, Callable[..., Any]] = {
    "a product": lambda s, x: x @ s.linear.weight + s.factors["last"],
    "a vector": lambda s, x: s.factors["last"] + torch.mm(x.flatten(0, 2), s.linear.weight),
    "one column": lambda s, x: x @ s.linear.weight[:, :1] + s.factors["last"][:1],
    "another bias": lambda s, x: s.linear(x) + s.factors["last"],
    "no bias": lambda s, x: F.linear(x, s.linear.weight) + s.factors["last"],
    "a difference": lambda s, x: s.linear(x) - s.factors["last"],
    "a conv": lambda s, x: s.factors["image"] + s.conv(x),
    "a conv of one dim": lambda s, x: s.signal(x[:, :, 0]) + s.factors["image"][..., 0],
    "a transposed conv": lambda s, x: s.transposed(x) + s.factors["image"],
    "both": lambda s, x: s.conv(x) * s.factors["image"] + s.factors["image"].flip(0),
    "one call": lambda s, x: torch.addcmul(
        s.factors["image"].flip(0), s.conv(x), s.factors["image"]
    ),
    "a frozen norm": lambda s, x: s.frozen(s.conv(x)),
    "a norm": lambda s, x: s.norm(s.conv(x)) + s.factors["image"],
    "moved": lambda s, x: s.conv(x).permute(0, 2, 3, 1) + s.factors["image"].flatten(),
    "transposed": lambda s, x: s.linear(x).transpose(2, 3) + s.factors["last"].view(6, 1),
    "in rows": lambda s, x: s.linear(x).view(-1, 6) + s.factors["last"],
    "in columns": lambda s, x: s.conv(x).flatten(2) + s.factors["image"].flatten(1),
    "in heads": lambda s, x: s.linear(x).view(2, 4, 5, 2, 3) + s.factors["last"].view(2, 3),
    "before heads": lambda s, x: (
        s.linear(x).view(2, 4, 5, 2, 3).permute(0, 3, 1, 2, 4) + s.factors["last"].view(2, 1, 1, 3)
    ),
    "of a product with heads": lambda s, x: (
        torch.einsum("bcnd,dhe->bchne", x, s.linear.weight.view(6, 2, 3))
        + s.factors["last"].view(2, 1, 3)
    ),
    "dropped": lambda s, x: F.dropout(s.conv(x), 0.5, False) + s.factors["image"],
}


def layers() -> dict[str, nn.Module]:
    """Of whole numbers, and of variances that are powers of four: nothing is rounded."""
    frozen, signal = FrozenBatchNorm2d(7, eps=0.0), nn.Conv1d(4, 7, 3, bias=False)
    norm, transposed = nn.BatchNorm2d(7, eps=0.0), nn.ConvTranspose2d(4, 7, 3)
    added = {"frozen": frozen, "norm": norm, "signal": signal, "transposed": transposed}
    made = nn.ModuleDict({**children(), **added})
    with torch.no_grad():
        for name, value in (*made.named_parameters(), *made.named_buffers()):
            whole = torch.randint(-3, 4, value.shape)
            value.copy_(4 ** (whole % 2) if name.endswith("var") else whole)
    return dict(made)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_of_each_channel_is_part_of_the_bias(name: str) -> None:
    model = Function(SHIFTS[name], **layers()).eval()
    x = torch.randint(-4, 5, IMAGE).to(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = canonicalize(capture(model, (x,)))
    assert not any(calls(graph, op) for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor))
    assert torch.equal(graph(x), model(x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) + 1e-6,  # which keeps a divisor away from zero
        lambda s, x: (lambda y: (y + s.factors["image"]) * y)(s.conv(x)),
        lambda s, x: F.relu(s.conv(x)) + s.factors["image"],
        lambda s, x: s.linear(x) + torch.arange(5.0).view(5, 1),
        lambda s, x: s.linear(x).view(2, 4, 30) + torch.arange(30.0),
        lambda s, x: s.factors["last"] - s.linear(x),
        lambda s, x: (
            s.linear(x).view(2, 4, 5, 2, 3).permute(0, 1, 2, 4, 3) + s.factors["last"].view(3, 2)
        ),
        lambda s, x: s.linear(x).view(2, 4, 5, 2, 3) + s.factors["last"][:3],
        lambda s, x: s.linear(x).view(2, 4, 5, 2, 3) + s.factors["last"][:2].view(2, 1),
        lambda s, x: F.linear(x, s.linear.weight, x[0, 0, 0]) + s.factors["last"],
        lambda s, x: s.linear(x) + s.factors["last"].double(),
    ],
)
def test_other_shifts_stay(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(function, **children()), (x,)))
    assert calls(graph, aten.add.Tensor) or calls(graph, aten.sub.Tensor)


PAIRS: dict[str, Callable[..., Any]] = {
    "images": lambda s, x: F.relu(
        F.relu(s.conv(x)) * s.factors["image"] + s.factors["image"].flip(0)
    ).mean((2, 3)),
    "a frozen norm": lambda s, x: F.relu(s.frozen(F.max_pool2d(s.conv(x), 2))),
    "an activation": lambda s, x: F.leaky_relu(
        F.leaky_relu(s.conv(x), 0.5) * s.factors["image"] + s.factors["image"].flip(0), 0.5
    ).mean((2, 3)),
    "the last dim": lambda s, x: s.linear(
        s.factors["last"].flip(0) + s.factors["last"] * (x + s.linear(x))
    ),
    "one call": lambda s, x: s.linear(
        torch.addcmul(s.factors["last"].flip(0), s.factors["last"], F.relu(x[0]))
    ),
    "rows": lambda s, x: s.linear(F.relu(x[0, 0]) * s.factors["last"] + s.factors["last"].flip(0)),
    "columns": lambda s, x: F.relu(
        F.relu(s.signal(x[:, :, 0])) * s.factors["image"][..., 0] + s.factors["image"][..., 0]
    ),
    "moved": lambda s, x: s.linear(
        F.relu(x).transpose(1, 2) * s.factors["last"] + s.factors["last"].flip(0).view(1, 6)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_factor_and_the_shift_behind_it_are_one_layer(name: str) -> None:
    model = Function(PAIRS[name], **layers()).eval()
    x = torch.randint(-4, 5, IMAGE).to(torch.float32)
    graph = canonicalize(capture(model, (x,)))
    convs = [*calls(graph, aten.conv1d.default), *calls(graph, aten.conv2d.default)]
    assert [conv.args[6] for conv in convs if len(conv.args) > 6] in ([6], [7])
    assert not calls(graph, aten.mul.Tensor)
    assert len(calls(graph, aten.add.Tensor)) == (name == "the last dim")
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.linear(x * s.factors["last"] + s.factors["last"]),  # float for the first
        lambda s, x: F.relu(x) * s.factors["last"] + s.factors["last"],  # shown as it is
        lambda s, x: s.linear(F.layer_norm(x, (6,)) * s.factors["last"] + s.factors["last"]),
        lambda s, x: s.linear(torch.log(x) * s.factors["last"] + s.factors["last"]),
        lambda s, x: F.softmax(F.relu(x) * s.factors["last"] + s.factors["last"], -1),
        lambda s, x: (lambda y: s.linear(y + s.factors["last"]) + y)(F.relu(x) * s.factors["last"]),
        lambda s, x: s.linear(torch.add(F.relu(x) * s.factors["last"], s.factors["last"], alpha=2)),
        lambda s, x: s.linear(F.relu(x) * torch.arange(5.0).view(5, 1) + s.factors["last"]),
        lambda s, x: s.linear(F.relu(x) * torch.arange(5.0).view(5, 1) + torch.ones(5, 1)),
        lambda s, x: s.linear(F.relu(x) * s.factors["last"] + 1.0),
        lambda s, x: s.linear(F.relu(x) * s.factors["last"] + x[0, 0, 0]),
        lambda s, x: s.linear(F.relu(x)[None] * s.factors["last"] + s.factors["last"]),
    ],
)
def test_other_pairs_stay(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(function, **children()), (x,)))
    assert len(calls(graph, aten.mul.Tensor)) == 1
    assert calls(graph, aten.add.Tensor)


def test_what_has_two_dynamic_sizes_stays_a_product_and_a_sum() -> None:
    model = Function(
        lambda s, x: s.linear(F.relu(x) * s.factors["last"] + s.factors["last"]), **children()
    )
    auto = torch.export.Dim.AUTO
    graphs = [
        canonicalize(capture(model, (torch.randn(3, 4, 6),), dynamic_shapes=(({0: auto} | more,),)))
        for more in ({}, {1: auto})
    ]
    assert [len(calls(graph, aten.mul.Tensor)) for graph in graphs] == [0, 1]


def test_a_factor_and_the_shift_behind_it_round_once() -> None:
    """A result is no further off than half a step of it, and half a step of what is scaled."""
    factor, shift = torch.linspace(0.1, 2.0, 6), torch.linspace(3.0, -1.0, 6)
    model = Function(lambda s, x: F.relu(F.relu(x) * factor + shift))
    data = [(torch.rand(64, 6),) for _ in range(4)]
    result = cq.quantize(model, data[0], data, progress=False)
    (x,) = data[1]
    steps = max(float(model(*batch).max()) for batch in data) / 255 + float(factor.max()) / 255
    assert float((result.lowered.run(x) - model(x)).abs().max()) <= 0.51 * steps


def test_a_layer_that_is_written_out_has_the_integers_of_the_layer() -> None:
    layers, x = children(), torch.randn(4, 6)
    data = [(x,), (torch.randn(4, 6),)]
    results = [
        cq.quantize(Function(function, **layers), (x,), data, progress=False)
        for function in (
            lambda s, x: F.relu(s.linear(x)),
            lambda s, x: F.relu(x @ s.linear.weight.T + s.linear.bias),
        )
    ]
    for (batch,) in data:
        got = [result.lowered.run(batch) for result in results]
        assert torch.equal(got[0], got[1])
    assert [len(result.plan.ops) for result in results] == [1, 1]


def test_a_rule_for_what_became_part_of_a_layer_says_so() -> None:
    model = Function(SHIFTS["both"], **layers()).eval()
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("add", None)
    message = "no node named 'add': it is part of the weight and bias of 'conv2d'; name that one"
    with pytest.raises(cq.ConfigError, match=message):
        quantizer.plan(torch.export.export(model, (torch.randn(IMAGE),)))


def test_what_is_dropped_to_another_value_than_0_is_not_scaled_before() -> None:
    model = Function(
        lambda s, x: F.alpha_dropout(s.linear(x), 0.3, True) * s.factors["last"], **children()
    )
    graph = canonicalize(capture(model, (torch.randn(IMAGE),)), training=True)
    assert len(calls(graph, aten.mul.Tensor)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.linear(x) * s.factors["last"],
        lambda s, x: F.dropout(s.conv(x), 0.0, True) * s.factors["image"].reshape(1, 7, 1, 1),
        lambda s, x: s.norm(s.conv(x)) * s.factors["image"],
        lambda s, x: s.plain(s.conv(x)) * s.factors["image"],
        lambda s, x: s.plain(s.conv(x)) / s.factors["image"],
        lambda s, x: x @ s.linear.weight + s.factors["last"],
        lambda s, x: s.conv(x) * s.factors["image"] - s.factors["image"].sin(),
        lambda s, x: s.norm(s.conv(x)) + s.factors["image"],
        lambda s, x: s.linear(F.relu(s.linear(x)) * s.factors["last"] + s.factors["last"].sin()),
    ],
)
def test_factors_are_trained_where_they_ship(function: Callable[..., Any]) -> None:
    """Weight and bias are functions of them, and dropouts scale what they leave."""
    model, x = Function(function, **children()), torch.randn(IMAGE)
    prepared = prepare_qat_pt2e(capture(model, (x,)), cq.IntegerQuantizer().set_global("a8w8"))
    qat.rounding(prepared, False)
    for module in (model, prepared):
        module(x).square().mean().backward()
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-5)
    trained = dict(prepared.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    qat.rounding(prepared, True)
    qat.freeze_observers(qat.evaluation_mode(prepared))
    want = prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), want)
    assert not any(calls(converted, op) for op in (aten.mul.Tensor, aten.add.Tensor))
