"""Functions that are written out, and the ops that they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from torch import Tensor, nn

from custom_quantizer.ops import match_of

aten = torch.ops.aten

ROOT = math.sqrt(2 / math.pi)

# As models write them (the names are those of transformers), and which op that is.
SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu_python": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), F.gelu),
    "gelu, last factor": (lambda x: 0.5 * (x * (torch.erf(x * 0.7071067812) + 1.0)), F.gelu),
    "gelu_new": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu_fast": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu_accurate": (
        lambda x: 0.5 * x * (1 + torch.tanh(torch.tensor(ROOT) * (x + 0.044715 * x**3)).float()),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "hardswish": (lambda x: x * F.relu6(x + 3.0) / 6.0, F.hardswish),
    "hardswish, by clamp": (lambda x: x * ((x + 3).clamp(0, 6) / 6), F.hardswish),
    "hardswish, of its gate": (lambda x: x * F.hardsigmoid(x), F.hardswish),
    "silu": (lambda x: x * torch.sigmoid(x), F.silu),
    "silu, as a quotient": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "mish, of a logarithm": (lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), F.mish),
    "sigmoid": (lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid),
    "sigmoid, as a quotient": (lambda x: x.exp() / (x.exp() + 1), torch.sigmoid),
    "tanh": (lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()), torch.tanh),
    "hardsigmoid": (lambda x: F.relu6(x + 3.0) * (1 / 6), F.hardsigmoid),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_function_that_is_written_out_is_one_op(name: str) -> None:
    written, op = SPELLINGS[name]
    x = torch.linspace(-9, 9, 999).reshape(3, 333)
    graph = canonicalize(capture(Function(lambda s, x: written(torch.relu(x) - 3.0)), (x,)))
    wanted = canonicalize(capture(Function(lambda s, x: op(torch.relu(x) - 3.0)), (x,)))
    ops = [
        [(n.target, n.kwargs) for n in g.graph.nodes if n.op == "call_function"]
        for g in (graph, wanted)
    ]
    assert ops[0] == ops[1]
    # Two formulas of one function, each of a few float32 steps.
    torch.testing.assert_close(graph(x), written(torch.relu(x) - 3.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 0.5 * x * (1.0 + torch.erf(x / 1.4142)),  # four digits are another function
        lambda x, y: 0.5 * x * (1.0 + torch.erf(y / math.sqrt(2.0))),
        lambda x, y: x * F.relu6(x + 3.0) / 6.01,
        lambda x, y: x * torch.tanh(x),
        lambda x, y: x * torch.sigmoid(1.702 * x),
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: x * F.relu6(y[:1] + 3.0) / 6.0,
    ],
)
def test_another_function_stays(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = torch.randn(4, 8), torch.randn(4, 8)
    graph = canonicalize(capture(Function(lambda s, x, x_1: function(x, x_1)), inputs))
    ops = (aten.gelu.default, aten.hardswish.default, aten.silu.default)
    assert not [call for op in ops for call in calls(graph, op)]
    assert torch.equal(graph(*inputs), function(*inputs))


def test_what_others_read_of_a_function_stays() -> None:
    def forward(_s: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = 1.0 + torch.erf(x / math.sqrt(2.0))
        return 0.5 * x * gate, gate

    x = torch.randn(4, 8)
    graph = canonicalize(capture(Function(forward), (x,)))
    assert len(calls(graph, aten.gelu.default)) == len(calls(graph, aten.erf.default)) == 1
    for got, want in zip(graph(x), forward(nn.Module(), x), strict=True):  # as above
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_gelu_that_is_written_out_is_a_table_in_one_delegate() -> None:
    erf = SPELLINGS["gelu_python"][0]
    model = Function(lambda s, x: s.b(erf(s.a(x)) + 0.5), a=nn.Linear(8, 16), b=nn.Linear(16, 8))
    x = torch.randn(4, 8)
    graph = quantized(model, (x,))
    assert all(match_of(n) for n in graph.graph.nodes if n.target is aten.gelu.default)
    report = lowered_exactly(graph, (x,)).report
    assert report.fully_delegated
    assert [op.backend.label for op in report.ops if op.family == "gelu"] == ["xnnpack table"]
