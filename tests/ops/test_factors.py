"""Factors of each channel become part of the weights before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

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
        lambda s, x: s.norm(s.conv(x) * s.factors["image"]),
    ],
)
def test_a_factor_of_each_channel_is_folded(function: Callable[..., Any]) -> None:
    model, x = Function(function, **children()).eval(), torch.randn(IMAGE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = canonicalize(capture(model, (x,)))
    assert not calls(graph, aten.mul.Tensor)
    assert len(calls(graph, aten.conv2d.default)) <= 1
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) * 2.0,
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
    assert not calls(converted, aten.mul.Tensor)
