"""A lowering that would be wrong raises, and names the op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.graphs import (
    Function,
    Inputs,
    quantized,
)
from support.models import conv
from torch import Tensor
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import passes
from custom_quantizer.backends.xnnpack.passes import PASSES
from custom_quantizer.core.graph import is_quantize
from custom_quantizer.errors import LoweringError, VerificationError

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)


def sabotaged(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[GraphModule], Any]
) -> None:
    """Let a pass do something else besides."""

    def run(model: GraphModule) -> int:
        count = original.run(model)
        change(model)
        return count

    (original,) = (p for p in PASSES if p.name == name)
    patched = tuple(dataclasses.replace(p, run=run) if p is original else p for p in PASSES)
    monkeypatch.setattr(passes, "PASSES", patched)


def _own_constant(model: GraphModule, suffix: str) -> Tensor:
    """A constant of the second layer whose name ends so; no longer the converted graph's."""
    (node,) = (n for n in model.graph.nodes if n.name == "conv2d_1")
    for source in node.all_input_nodes:
        while source.op == "call_function":
            source = cast(Node, source.args[0])
        if source.op == "get_attr" and str(source.target).endswith(suffix):
            own = cast(Tensor, getattr(model, str(source.target))).clone()
            setattr(model, str(source.target), own)
            return own
    raise AssertionError(suffix)


def _bias_off_by_one(model: GraphModule) -> None:
    bias = _own_constant(model, "_folded")
    (node,) = (n for n in model.graph.nodes if n.name == "conv2d_1")
    weight, data = cast(Node, node.args[1]), cast(Node, node.args[0])
    scale = getattr(model, str(cast(Node, weight.args[1]).target)) * data.args[1]
    bias[2] += scale[2]


def _weight_off_by_one(model: GraphModule) -> None:
    _own_constant(model, "_integers")[1, 0, 1, 1] += 1


def _swapped_channels(model: GraphModule) -> None:
    bias = _own_constant(model, "_folded")
    bias.copy_(bias.flip(0))


def _no_activation(model: GraphModule) -> None:
    (node,) = (n for n in model.graph.nodes if n.target is aten.relu.default)
    node.replace_all_uses_with(cast(Node, node.args[0]))
    model.graph.erase_node(node)


def _other_scale(model: GraphModule) -> None:
    (node,) = (n for n in model.graph.nodes if n.name == "conv2d_1")
    (quantize,) = (u for u in node.users if is_quantize(u))
    for user in (quantize, *quantize.users):
        user.args = (user.args[0], cast(float, user.args[1]) * 1.01, *user.args[2:])


def _other_stride(model: GraphModule) -> None:
    (pool,) = (n for n in model.graph.nodes if n.target is aten.max_pool2d.default)
    pool.args = (pool.args[0], [1, 1], [1, 1], [0, 0])


SABOTAGE: dict[str, tuple[str, Callable[[GraphModule], Any], str]] = {
    "bias off by one": ("fold_bias", _bias_off_by_one, r"conv2d_1 \(body\): bias: .* at \(?2"),
    "channels swapped": ("fold_bias", _swapped_channels, r"conv2d_1 \(body\): bias"),
    "weight off by one": ("fold_bias", _weight_off_by_one, r"conv2d_1 \(body\): weight"),
    "activation lost": ("fold_bias", _no_activation, r"conv2d \(stem\): clamp"),
    "scale changed": ("fold_bias", _other_scale, r"conv2d_1 \(body\): output scale"),
    "window changed": ("fold_bias", _other_stride, r"output 0: \d+ of \d+ values differ"),
}


@cache
def right_so_far() -> tuple[GraphModule, Inputs]:
    """What is lowered without complaint before anything is made wrong."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = Function(
        lambda s, x: F.max_pool2d(s.body(F.relu(s.stem(x))), 3, 1, 1), stem=conv(), body=conv()
    )
    graph = quantized(model, (x,))
    cq.lower(graph, (x,))
    return graph, (x,)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_rewrite_is_caught_and_the_op_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, example = right_so_far()
    at, change, message = SABOTAGE[name]
    sabotaged(monkeypatch, at, change)
    with pytest.raises(VerificationError, match=message):
        cq.lower(graph, example)


def test_a_pass_that_writes_into_the_converted_graph_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Program and graph would agree, as both are wrong."""
    x = torch.randn(IMAGE)
    graph = quantized(Function(lambda s, x: s.body(x), body=conv()), (x,))

    def write(model: GraphModule) -> None:
        (name,) = (name for name, _ in model.named_buffers() if name.endswith("weight_integers"))
        model.get_buffer(name)[1, 0, 1, 1] += 1

    sabotaged(monkeypatch, "fold_bias", write)
    with pytest.raises(LoweringError, match=r"constant body_weight_integers .* written into"):
        cq.lower(graph, (x,), check=False)


def test_a_wrong_program_is_returned_only_if_asked_not_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, example = right_so_far()
    at, change, _ = SABOTAGE["bias off by one"]
    sabotaged(monkeypatch, at, change)
    assert isinstance(cq.lower(graph, example, check=False), cq.LoweredProgram)
