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
    "relu, by a condition": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), F.relu),
    "relu, by another": (lambda x: torch.where(x <= 0, 0.0, x), F.relu),
    "relu, by a mask": (lambda x: x * (x > 0), F.relu),
    "relu, by a mask of floats": (lambda x: x * (x > 0).float(), F.relu),
    "relu, by what is filled": (lambda x: x.masked_fill(x < 0, 0.0), F.relu),
    "relu, by a maximum": (
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: x.clamp(min=0),
    ),
    "relu, of a magnitude": (lambda x: (x + x.abs()) / 2, F.relu),
    "relu6": (lambda x: torch.minimum(F.relu(x), torch.tensor(6.0)), lambda x: x.clamp(0, 6)),
    "clamp of a clamp": (lambda x: x.clamp(min=-2).clamp(max=3), lambda x: x.clamp(-2, 3)),
    "abs": (lambda x: torch.max(x, -x), torch.abs),
    "abs, of two relus": (lambda x: F.relu(x) + F.relu(-x), torch.abs),
    "leaky_relu": (lambda x: torch.maximum(x, 0.1 * x), lambda x: F.leaky_relu(x, 0.1)),
    "leaky_relu, by a condition": (
        lambda x: torch.where(x >= 0, x, 0.2 * x),
        lambda x: F.leaky_relu(x, 0.2),
    ),
    "leaky_relu, of two relus": (
        lambda x: F.relu(x) - 0.25 * F.relu(-x),
        lambda x: F.leaky_relu(x, 0.25),
    ),
    "elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1), F.elu),
    "elu, of expm1": (lambda x: torch.where(x > 0, x, torch.expm1(x)), F.elu),
    "elu, of two relus": (lambda x: F.relu(x) - F.relu(1 - torch.exp(x)), F.elu),
    "elu, another": (
        lambda x: torch.where(x < 0, 0.7 * (torch.exp(x) - 1), x),
        lambda x: F.elu(x, 0.7),
    ),
    "selu": (
        lambda x: 1.0507 * torch.where(x > 0, x, 1.67326 * (torch.exp(x) - 1)),
        lambda x: aten.elu.default(x, 1.67326, 1.0507),
    ),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), F.softplus),
    "softplus, of log1p": (lambda x: torch.log1p(torch.exp(x)), F.softplus),
    "logsigmoid": (lambda x: torch.log(torch.sigmoid(x)), F.logsigmoid),
    "quick_gelu": (
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.silu(x * 1.702) * (1 / 1.702),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_function_that_is_written_out_is_one_op(name: str) -> None:
    written, op = SPELLINGS[name]
    x = torch.linspace(-9, 9, 999).reshape(3, 333)
    graph = canonicalize(capture(Function(lambda s, x: written(torch.sin(x) * 9.0)), (x,)))
    wanted = canonicalize(capture(Function(lambda s, x: op(torch.sin(x) * 9.0)), (x,)))
    ops = [
        [(n.target, n.kwargs) for n in g.graph.nodes if n.op == "call_function"]
        for g in (graph, wanted)
    ]
    assert ops[0] == ops[1]
    # Two formulas of one function, each of a few float32 steps.
    torch.testing.assert_close(graph(x), written(torch.sin(x) * 9.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: 0.5 * x * (1.0 + torch.erf(x / 1.4142)),  # four digits are another function
        lambda x, y: 0.5 * x * (1.0 + torch.erf(y / math.sqrt(2.0))),
        lambda x, y: x * F.relu6(x + 3.0) / 6.01,
        lambda x, y: x * torch.tanh(x),
        lambda x, y: x * torch.sigmoid(1.702 * x + 0.1),
        lambda x, y: torch.where(x > 1e-4, x, 0.0),
        lambda x, y: torch.where(y > 0, x, 0.0),
        lambda x, y: F.relu(x).clamp(max=1e6) + 0.5 * x,
        lambda x, y: x.clamp(max=30.0) * torch.sigmoid(x),
        lambda x, y: torch.where(x > 0, x, -0.1 * x),
        lambda x, y: torch.maximum(x, y * 0),
        lambda x, y: x.masked_fill(x <= 0, -math.inf),
        lambda x, y: F.relu(x).clamp(max=3.0) + 1e-12,
        lambda x, y: torch.where(x < 100, F.relu(x), -math.inf),
        lambda x, y: torch.maximum(x, 0.5 * x.to(torch.int32).to(torch.float32)),
        lambda x, y: x * x.to(torch.bool),
        lambda x, y: x * torch.sigmoid(y),
        lambda x, y: x * F.relu6(y[:1] + 3.0) / 6.0,
    ],
)
def test_another_function_stays(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = torch.randn(4, 8), torch.randn(4, 8)
    graph = canonicalize(capture(Function(lambda s, x, x_1: function(x, x_1)), inputs))
    ops = (
        *(aten.abs.default, aten.elu.default, aten.gelu.default, aten.hardswish.default),
        *(aten.leaky_relu.default, aten.silu.default),
    )
    assert not [call for op in ops for call in calls(graph, op)]
    relus = [call for call in calls(graph, aten.relu.default) if call.name != "relu"]
    assert not relus
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
