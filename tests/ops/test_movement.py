"""Ops that move values: merged where they follow each other, exact where they run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contracts import IntegerContract
from support.graphs import Function, differences, lowered_exactly, quantized
from torch import nn
from torch.fx import GraphModule

from custom_quantizer.backends.xnnpack.passes import run_passes

aten = torch.ops.aten


def moved(function: Callable[..., Any], shape: tuple[int, ...]) -> tuple[GraphModule, GraphModule]:
    """A graph of moves of integers before and after all passes, which compute the same."""
    inputs = (torch.randn(shape),)
    graph = quantized(Function(lambda s, x: function(x + x)), inputs)
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    assert differences(rewritten(*inputs), graph(*inputs)) == []
    return graph, rewritten


@pytest.mark.parametrize(
    ("function", "shape", "left"),
    [
        (lambda x: x.view(2, 12).view(4, 6).view(2, 3, 4), (2, 3, 4), []),
        (lambda x: x.view(2, 12).view(4, 6), (2, 3, 4), ["view_copy"]),
        (lambda x: x.permute(0, 2, 1).permute(1, 0, 2), (2, 3, 4), ["permute"]),
        (lambda x: x.permute(0, 2, 1).transpose(1, 2), (2, 3, 4), []),
        (lambda x: x.movedim(0, 2).movedim(2, 0), (2, 3, 4), []),
        (lambda x: x.transpose(0, 1), (1, 3, 4), ["view_copy"]),
        (
            lambda x: x.unflatten(-1, (3, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2),
            (5, 2, 12),
            ["view_copy", "permute"],
        ),
        (lambda x: x[:, ::2], (2, 4, 3), ["view_copy", "slice", "view_copy"]),
        (lambda x: x[:, :, ::2], (2, 3, 4), ["view_copy", "slice", "view_copy"]),
        (lambda x: x[:, 1::2, ::3, :], (2, 4, 6, 5), ["view_copy", "slice"] * 2 + ["view_copy"]),
    ],
)
def test_moves_are_merged(
    function: Callable[..., Any], shape: tuple[int, ...], left: list[str]
) -> None:
    _, rewritten = moved(function, shape)
    names = [str(n.target).split(".")[1] for n in rewritten.graph.nodes if n.op == "call_function"]
    found = [name for name in names if name in ("view_copy", "permute", "slice", "transpose")]
    assert found == left


class TestContract(IntegerContract):
    together = True
    families = (
        "cat",
        "identity",
        "reshape",
        "permute",
        "slice",
        "select",
        "expand",
        "split",
        "getitem",
        "pad",
    )


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout2d])
def test_in_evaluation_a_dropout_of_any_kind_is_nothing(kind: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), kind(), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 2, 5, 5)
    lowered = lowered_exactly(quantized(model, (x,)), (x,), [])
    assert not lowered.report.not_integer()
    assert lowered.report.fully_delegated
