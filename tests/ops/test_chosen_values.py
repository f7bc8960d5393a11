"""Values that a mask chooses, a function of them, and their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, differences
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq

aten = torch.ops.aten
IMAGE = (2, 3, 6, 6)

Write = Callable[[Any, Tensor, Tensor], None]


def _write(y: Tensor, mask: Tensor, value: Tensor) -> None:
    y[mask] = value


def _in_turn(s: Any, y: Tensor, x: Tensor) -> None:
    """As a hue is computed: the later write wins."""
    _write(y, x[:, :1].expand_as(x) > 0, (y + 1)[x[:, :1].expand_as(x) > 0])
    _write(y, x > 1, x[x > 1] * 3 - 1)


WRITES: dict[str, Write] = {
    "as they are": lambda s, y, x: _write(y, x > 0, x[x > 0]),
    "one mask": lambda s, y, x: (lambda m: _write(y, m, x[m]))(x > 0),
    "a function": lambda s, y, x: _write(y, x > 0, torch.tanh(2 * x[x > 0]) + 1),
    "of two tensors": lambda s, y, x: _write(y, x > 0, y[x > 0] - x[x > 0].clamp(max=0.5)),
    "divided by a number": lambda s, y, x: _write(y, x < y, (x[x < y] / 4) % 3),
    "a logarithm": lambda s, y, x: _write(y, x > 0, x[x > 0].log()),
    "a quotient": lambda s, y, x: _write(y, x.abs() > 0.1, y[x.abs() > 0.1] / x[x.abs() > 0.1]),
    "a root": lambda s, y, x: _write(y, x > 0, x[x > 0].sqrt() * 2),
    "rows": lambda s, y, x: _write(y, x[:, :, 0, 0] > 0, x[x[:, :, 0, 0] > 0] * 2),
    "one row for all": lambda s, y, x: _write(y, x[:, :, :, 0] > 0, s.token.weight[0]),
    "a row added": lambda s, y, x: _write(
        y, x[:, :, :, 0] > 0, x[x[:, :, :, 0] > 0] + s.token.weight
    ),
    "in turn": _in_turn,
    "the writer's own": lambda s, y, x: y.__setitem__(y > 0, y[y > 0] * 0.5),
}


def _model(write: Write) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.conv(x)
        y = 1 - x
        write(s, y, x)
        return F.relu(s.conv(y))

    torch.manual_seed(0)
    return Function(forward, conv=nn.Conv2d(3, 3, 1), token=nn.Embedding(1, 6)).eval()


def _captured(write: Write) -> tuple[nn.Module, GraphModule, Tensor]:
    model, x = _model(write), torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))
    return model, capture(model, (x,)), x


@pytest.mark.parametrize("name", WRITES)
def test_they_are_computed_everywhere(name: str) -> None:
    model, graph, x = _captured(WRITES[name])
    canonicalize(graph)
    for target in (aten.index.Tensor, aten.index_put.default, aten._assert_scalar.default):
        assert not calls(graph, target)
    with torch.no_grad():
        for each in (x, -x, torch.zeros_like(x)):
            assert differences(graph(each), model(each)) == []


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["a quotient", "in turn"],
        ["a function", "a quotient", "a root", "one row for all", "in turn"],
    ),
)
def test_all_of_it_is_one_delegate(name: str) -> None:
    """No size waits for values, and what the mask leaves out is not NaN."""
    _, graph, x = _captured(WRITES[name])
    result = cq.quantize(graph, (x,), [(x,), (-x,), (torch.zeros_like(x),)], progress=False)
    assert result.lowered is not None
    assert result.lowered.report.outside == ()
    reference = cq.integer_reference(result.converted)
    for given in (x, -x, torch.zeros_like(x)):
        assert differences(result.lowered.run(given), reference(given)) == []


KEPT: dict[str, Write] = {
    "a running sum": lambda s, y, x: _write(y, x > 0, x[x > 0].cumsum(0)),
    "a mean": lambda s, y, x: _write(y, x > 0, x[x > 0] - x[x > 0].mean()),
    "the others": lambda s, y, x: _write(y, x > 0, x[x > 0].flip(0)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_depends_on_other_entries_stays(name: str) -> None:
    model, graph, x = _captured(KEPT[name])
    canonicalize(graph)
    assert calls(graph, aten.index.Tensor)
    with torch.no_grad():
        assert differences(graph(x), model(x)) == []


def test_a_mask_of_other_values_is_another_one() -> None:
    """Both have as many ones."""

    def write(s: Any, y: Tensor, x: Tensor) -> None:
        mask = x > 0
        chosen = x.flip(0)[mask.flip(0)]
        torch._check(chosen.shape[0] == x[mask].shape[0])
        _write(y, mask, chosen)

    model, graph, x = _captured(write)
    canonicalize(graph)
    assert calls(graph, aten.index.Tensor)
    with torch.no_grad():
        assert differences(graph(x), model(x)) == []


def test_a_mask_of_what_is_written_in_between_is_another_one() -> None:
    def write(s: Any, y: Tensor, x: Tensor) -> None:
        h = s.conv(x)
        chosen = x[h > 0]
        h.flatten(1)[:, ::2].mul_(2.0)  # stays in place
        torch._check(chosen.shape[0] == h[h > 0].shape[0])
        _write(y, h > 0, chosen)

    model, graph, x = _captured(write)
    canonicalize(graph)
    assert calls(graph, aten.index_put.default)
    with torch.no_grad():
        assert differences(graph(x), model(x)) == []


def test_for_any_batch() -> None:
    model, x = _model(WRITES["a function"]), torch.randn(IMAGE)
    batch = torch.export.Dim("batch", min=1, max=8)
    graph = canonicalize(capture(model, (x,), dynamic_shapes=((((batch,) + (None,) * 3),),)))
    assert not calls(graph, aten.index.Tensor)
    with torch.no_grad():
        for given in (x[:1], torch.cat([x, x])):
            assert differences(graph(given), model(given)) == []


def test_values_that_are_read_elsewhere_are_chosen_there() -> None:
    def write(s: Any, y: Tensor, x: Tensor) -> None:
        chosen = x[x > 0]
        _write(y, x > 0, chosen * 2)
        y[:, :1] += chosen.sum()

    model, graph, x = _captured(write)
    canonicalize(graph)
    assert len(calls(graph, aten.index.Tensor)) == 1
    with torch.no_grad():
        assert differences(graph(x), model(x)) == []
