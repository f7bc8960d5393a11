"""Factors of each channel become part of the weights before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture
from torch import nn

aten = torch.ops.aten
IMAGE = (2, 4, 5, 6)


def children() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    factors = nn.ParameterDict({"image": torch.randn(7, 1, 1), "last": torch.randn(6)})
    return {"conv": nn.Conv2d(4, 7, 3), "linear": nn.Linear(6, 6), "factors": factors}


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) * s.factors["image"],
        lambda s, x: s.factors["image"] * s.conv(x),
        lambda s, x: s.linear(x) * s.factors["last"],
        lambda s, x: F.linear(x, s.linear.weight) * s.factors["last"],
        lambda s, x: s.linear(x).permute(0, 3, 1, 2) * s.factors["last"].view(6, 1, 1),
        lambda s, x: F.dropout(s.conv(x), 0.5, False).contiguous() * s.factors["image"],
    ],
)
def test_a_factor_of_each_channel_is_folded(function: Callable[..., Any]) -> None:
    model, x = Function(function, **children()).eval(), torch.randn(IMAGE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = canonicalize(capture(model, (x,)))
    assert not calls(graph, aten.mul.Tensor)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x) * 2.0,
        lambda s, x: (lambda y: y * s.factors["image"] + y)(s.conv(x)),
        lambda s, x: F.relu(s.conv(x)) * s.factors["image"],
        lambda s, x: F.dropout(s.conv(x), 0.5, True) * s.factors["image"],
        lambda s, x: s.linear(x) * torch.arange(5.0).view(5, 1),
        lambda s, x: s.linear(x).view(2, 4, 30) * torch.arange(30.0),
        lambda s, x: F.linear(x, s.linear.weight, x[0, 0, 0]) * s.factors["last"],
    ],
)
def test_other_factors_stay(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(function, **children()), (x,)))
    assert len(calls(graph, aten.mul.Tensor)) == 1


def test_factors_stay_in_training() -> None:
    model = Function(lambda s, x: s.linear(x) * s.factors["last"], **children())
    graph = canonicalize(capture(model, (torch.randn(IMAGE),)), training=True)
    assert len(calls(graph, aten.mul.Tensor)) == 1
