"""Softmax and its logarithm, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from torch import Tensor, nn

aten = torch.ops.aten


def _shifted(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(dim=-1, keepdim=True)[0])
    return e / e.sum(dim=-1, keepdim=True)


def _kept(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(1).unsqueeze(1).detach())
    return e / e.sum(1)[:, None]


SOFTMAXES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "twice": (lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True), lambda x: x.softmax(-1)),
    "shifted": (_shifted, lambda x: x.softmax(-1)),
    "another dim": (_kept, lambda x: x.softmax(1)),
    "of all": (
        lambda x: (x - x.max()).exp() / (x - x.max()).exp().sum(2, True),
        lambda x: x.softmax(2),
    ),
    "of logsumexp": (
        lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
        lambda x: x.softmax(-1),
    ),
    "logarithm": (lambda x: torch.log(F.softmax(x, dim=1)), lambda x: x.log_softmax(1)),
    "logarithm, less": (
        lambda x: x - torch.logsumexp(x, 1).unsqueeze(1),
        lambda x: x.log_softmax(1),
    ),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_that_is_written_out_is_one_op(name: str) -> None:
    written, op = SOFTMAXES[name]
    x = torch.randn(2, 5, 7)
    graph, wanted = (
        canonicalize(capture(Function(lambda s, x, f=f: f(torch.sin(x))), (x,)))
        for f in (written, op)
    )
    ops = [[n.target for n in g.graph.nodes if n.op == "call_function"] for g in (graph, wanted)]
    assert ops[0] == ops[1]
    assert torch.equal(graph(x), wanted(x))
    torch.testing.assert_close(graph(x), written(torch.sin(x)), rtol=1e-5, atol=1e-6)  # last bits


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.exp(x) / torch.exp(y).sum(-1, keepdim=True),
        lambda x, y: torch.exp(x) / torch.exp(x).sum(-1).unsqueeze(1),
        lambda x, y: torch.exp(x) / torch.exp(x).sum((1, 2), keepdim=True),
        lambda x, y: torch.exp(x) / (torch.exp(x).sum(-1, keepdim=True) + 1.0),
        lambda x, y: x - torch.logsumexp(y, -1, keepdim=True),
        lambda x, y: x - torch.logsumexp(x, -1).unsqueeze(1),
        lambda x, y: torch.exp(x - y) / torch.exp(y - x).sum(-1, keepdim=True),
    ],
)
def test_what_is_none_stays(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = torch.randn(2, 5, 5), torch.randn(2, 5, 5)
    graph = canonicalize(capture(Function(lambda s, x, x_1: function(x, x_1)), inputs))
    for op in (aten.softmax.int, aten.log_softmax.int):
        assert not calls(graph, op)
    torch.testing.assert_close(graph(*inputs), function(*inputs))  # a sum may be a layer


def test_what_is_not_the_largest_of_the_scores_is_taken_away_first() -> None:
    def forward(_s: nn.Module, x: Tensor) -> Tensor:
        e = torch.exp(x - x.mean(-1, keepdim=True) * 90)  # a softmax of this does not overflow
        return e / e.sum(-1, keepdim=True)

    x = torch.rand(2, 5)
    graph = canonicalize(capture(Function(forward), (x,)))
    (softmax,) = calls(graph, aten.softmax.int)
    assert softmax.args[0].target is aten.sub.Tensor


def test_a_softmax_that_is_written_out_is_in_one_delegate() -> None:
    model = Function(lambda s, x: s.b(_shifted(s.a(x))), a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    x = (torch.randn(4, 8),)
    report = lowered_exactly(quantized(model, x), x).report
    assert report.fully_delegated
    assert [op.family for op in report.ops if op.family] == ["linear", "aten.softmax.int", "linear"]
