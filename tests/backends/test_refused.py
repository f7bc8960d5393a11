"""A program that the runtime refuses: the error names the op, and what to do about it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from support.graphs import Function
from support.models import convert
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import move_exported_model_to_train

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.passes import float_fallback
from custom_quantizer.core.arithmetic import round_to_float32
from custom_quantizer.errors import LoweringError

EXAMPLE = (torch.randn(1, 3, 6, 6),)


class Branches(nn.Module):
    """Two branches of a layer and an activation, which meet."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(3, 4, 3, bias=False) for _ in range(2))
        self.last = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1)[:, 2:6]
        return torch.softmax(self.last(y), 1)


def refused(layer: str) -> GraphModule:
    """A converted graph with a layer whose requantization multiplier is too large for XNNPACK."""
    graph = convert(Branches(), EXAMPLE, "a8w8-per_tensor").graph
    (node,) = (n for n in graph.graph.nodes if n.name == layer)
    scale = round_to_float32(node.args[0].args[1] * node.args[1].args[1] / 300.0)
    (quantize,) = node.users
    for user in (quantize, *quantize.users):
        user.args = (user.args[0], scale, *user.args[2:])
    graph.recompile()
    return graph


@pytest.mark.parametrize(
    ("layer", "path"),
    [pytest.param("conv2d", "left", marks=pytest.mark.slow), ("conv2d_2", "last")],
)
def test_the_op_is_named(layer: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_fallback, "mark_fallbacks", lambda *_: None)
    with pytest.raises(LoweringError) as caught:
        cq.lower(refused(layer), EXAMPLE)
    assert str(caught.value).startswith(
        f"{layer} ({path}) is the first op that the runtime refuses; leave it in float with "
        f"set_node_name('{layer}', None): the program does not load"
    )


def test_an_op_that_draws_random_numbers_is_named() -> None:
    """Two runs differ, so that the program would be said to be wrong."""
    net = Function(lambda s, x: s.layer(x) + torch.rand_like(x), layer=nn.Conv2d(3, 3, 1))
    graph = convert(net, EXAMPLE).graph
    with pytest.raises(LoweringError, match=r"^rand_like draws random numbers .*an input of the"):
        cq.lower(graph, EXAMPLE)


def test_a_graph_that_was_decomposed_too_late_is_named() -> None:
    net = Function(lambda s, x: s.layer(x), layer=nn.Conv2d(3, 3, 1))
    exported = torch.export.export(convert(net, EXAMPLE).graph, EXAMPLE)
    late = exported.run_decompositions()
    with pytest.raises(LoweringError, match=r"decomposed after convert_pt2e.*run_decompositions$"):
        cq.lower(late.module(), EXAMPLE)
    with pytest.raises(LoweringError, match=r"decomposed after convert_pt2e.*run_decompositions$"):
        to_edge_transform_and_lower(late, partitioner=[cq.XnnpackPartitioner()])


def test_an_op_that_was_left_in_training_is_named() -> None:
    net = Function(
        lambda s, x: F.dropout(s.layer(x), 0.5, training=False), layer=nn.Conv2d(3, 3, 1)
    )
    graph = convert(net, EXAMPLE).graph
    move_exported_model_to_train(graph)
    with pytest.raises(LoweringError, match=r"is in training mode .*capture model.eval"):
        cq.lower(graph, EXAMPLE)


def test_what_draws_only_in_training_is_lowered() -> None:
    net = Function(lambda s, x: s.layer(F.rrelu(x)), layer=nn.Conv2d(3, 3, 1))
    assert cq.lower(convert(net, EXAMPLE).graph, EXAMPLE).report.delegates == 1
