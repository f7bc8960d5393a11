"""Recurrent layers, written out step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import Function, calls, canonicalize, capture
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.core.rewriting import ALIKE
from custom_quantizer.ops import match_of
from custom_quantizer.ops.rewrites import recurrent

aten = torch.ops.aten

X = (5, 2, 8)

CASES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 6),
    "lstm, batch first": lambda: nn.LSTM(8, 6, batch_first=True),
    "lstm, two layers both ways": lambda: nn.LSTM(8, 6, 2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(8, 6, proj_size=3, bidirectional=True),
    "lstm, no bias": lambda: nn.LSTM(8, 6, bias=False),
    "gru": lambda: nn.GRU(8, 6),
    "gru, two layers both ways": lambda: nn.GRU(8, 6, 2, bidirectional=True, batch_first=True),
    "gru, no bias": lambda: nn.GRU(8, 6, bias=False),
    "rnn": lambda: nn.RNN(8, 6, bidirectional=True),
    "rnn of relu": lambda: nn.RNN(8, 6, nonlinearity="relu"),
}


class Started(nn.Module):
    """A recurrent layer that starts with a state of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        return self.layer(x, state if len(state) > 1 else state[0])


def same(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The rewritten graph has families only, and computes what the model does."""
    graph = canonicalize(capture(model, inputs))
    left = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert [n for n in left if match_of(n) is None] == []
    got, want = torch.utils._pytree.tree_leaves(graph(*inputs)), model(*inputs)
    want = torch.utils._pytree.tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


QUICK = ("lstm, batch first", "lstm, projected", "gru, two layers both ways", "rnn")


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
@torch.no_grad()
def test_steps_compute_what_the_layer_does(name: str) -> None:
    torch.manual_seed(0)
    layer = CASES[name]().eval()
    same(layer, (torch.randn(X),))
    batch = X[0] if getattr(layer, "batch_first", False) else X[1]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or 6, 6][: 2 if isinstance(layer, nn.LSTM) else 1]
    same(Started(layer).eval(), (torch.randn(X), *(torch.randn(count, batch, s) for s in sizes)))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@torch.no_grad()
def test_cells_are_one_step(cell: Callable[..., nn.Module]) -> None:
    layer = cell(8, 6).eval()
    same(layer, (torch.randn(3, 8),))
    states = [torch.randn(3, 6) for _ in range(2 if cell is nn.LSTMCell else 1)]
    same(Started(layer).eval(), (torch.randn(3, 8), *states))


def test_the_batch_may_be_dynamic_and_the_length_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Function(lambda s, x: s.r(x)[0], r=nn.LSTM(8, 6, batch_first=True))
    x = torch.randn(2, 5, 8)
    sizes = (({0: torch.export.Dim("n", min=2, max=9)},),)
    graph = canonicalize(capture(model, (x,), dynamic_shapes=sizes))
    assert len(calls(graph, aten.linear.default)) == 1 + 4
    given = torch.randn(4, 5, 8)
    torch.testing.assert_close(graph(given), model(given), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(recurrent, "MAX_STEPS", 4)
    graph = canonicalize(capture(model, (x,)))
    assert len(calls(graph, aten.lstm.input)) == 1


class Spotter(nn.Module):
    """Words in a signal: a layer of each kind, and a classifier of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.gru = nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


@torch.no_grad()
def test_all_steps_have_the_ranges_of_one() -> None:
    torch.manual_seed(0)
    model = Function(lambda s, x: s.gru(s.lstm(x)[0])[0], lstm=nn.LSTM(8, 6), gru=nn.GRU(6, 6))
    model.eval()
    graph = convert(model, (torch.randn(X),)).graph
    scales: dict[object, set[tuple[object, ...]]] = {}
    for node in graph.graph.nodes:
        if ALIKE in node.meta and node.op == "call_function":
            (rounded,) = node.users
            scales.setdefault(node.meta[ALIKE], set()).add(rounded.args[1:3])
    assert len(scales) == 8 + 9
    assert all(len(found) == 1 for found in scales.values())


@torch.no_grad()
def test_cells_of_a_loop_have_the_ranges_of_one() -> None:
    def loop(s: Any, x: Tensor) -> Tensor:
        h = torch.zeros(2, 6)
        for row in x:
            h = s.cell(row, h)
        return h

    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    plan = quantizer.plan(capture(Function(loop, cell=nn.GRUCell(8, 6)).eval(), (torch.randn(X),)))
    for what, count in (("tanh", 1), ("linear", 2)):  # of the input, and of the state
        made = [edge.output for name, edge in plan.annotations.items() if what in name]
        assert len(made) == count * X[0] - (what == "linear")
        assert len({edge.group for edge in made if edge is not None}) == count


def test_a_network_of_them_is_integers_in_one_delegate() -> None:
    torch.manual_seed(0)
    model, data = Spotter().eval(), [(torch.randn(4, 3, 16),) for _ in range(8)]
    converted = convert(model, data[0], calibration=data)
    graph, plan = converted.graph, converted.plan
    assert [op.written or op.family for op in plan.ops] == ["lstm", "gru", "select", "linear"]
    program = cq.lower(graph, data[0])
    reference = cq.integer_reference(graph)
    assert program.report.delegates == 1
    outside = [row.node for row in program.report.not_integer() if "float" in str(row.backend)]
    assert outside == []
    x = torch.randn(4, 3, 16)
    assert torch.equal(program.run(x), reference(x))
    noise = (program.run(x) - model(x)).norm() / model(x).norm()
    assert float(noise) < 0.05
