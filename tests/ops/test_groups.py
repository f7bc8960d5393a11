"""Rows that are sorted by which layer they take (mixtures of experts)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from torch import Tensor, nn

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)


def whole_numbers(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (3, 9), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (lambda s, x: tuple(torch.sort(x, stable=True)), aten.sort.stable),
        (lambda s, x: torch.sort(x, 0, True)[1], aten.sort.default),
        (lambda s, x: torch.argsort(x, 0), aten.argsort.default),
        (lambda s, x: torch.argsort(x, dim=0, descending=True, stable=True), aten.argsort.stable),
        (lambda s, x: torch.sort(x.argmax(1)), aten.sort.default),
        (
            lambda s, x: torch.sort(x.argmax(1).view(3, 1).masked_fill(x[:, :1] > 0, -1), 0),
            aten.sort.default,
        ),
        (lambda s, x: torch.histc(x.float(), 7, -3, 3), aten.histc.default),
        (lambda s, x: torch.histc(x.float(), 4, -2.5, 0.5), aten.histc.default),
        (lambda s, x: torch.histc(x.float() / 3, 4, -0.7, 0.9), aten.histc.default),
    ],
)
def test_whole_numbers_in_order_and_counted(function: Callable[..., Any], gone: Any) -> None:
    graph = canonicalize(capture(Function(function), (whole_numbers(0),)))
    assert not calls(graph, gone)
    for seed in range(4):
        x = whole_numbers(seed)
        given, wanted = graph(x), function(None, x)
        pairs = zip(given, wanted, strict=True) if isinstance(given, tuple) else [(given, wanted)]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: tuple(torch.sort(x, stable=True)),
        lambda s, x: torch.sort(x, 0, True)[1],
        lambda s, x: torch.argsort(torch.argsort(x, 1), dim=1),
        lambda s, x: torch.argsort(x, dim=0, descending=True, stable=True),
    ],
)
def test_any_numbers_are_put_in_order(function: Callable[..., Any]) -> None:
    """Also integers that would not fit times their count; equal ones stay in the order they had."""
    numbers = whole_numbers(1).to(torch.int64) * 2**61
    for x in (torch.randn(3, 7, 2), whole_numbers(0).float().round(), numbers):
        graph = canonicalize(capture(Function(function), (x,)))
        assert not any(calls(graph, op) for op in SORTS)
        given, wanted = graph(x), function(None, x)
        pairs = zip(given, wanted, strict=True) if isinstance(given, tuple) else [(given, wanted)]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_integers_of_a_layer_are_put_in_order_by_the_program() -> None:
    """Many are equal after rounding."""
    x = torch.randn(2, 12)
    model = Function(
        lambda s, x: s.m(x).gather(1, s.m(x).argsort(1).argsort(1)), m=nn.Linear(12, 12)
    )
    lowered_exactly(quantized(model, (x,)), (x,))


def test_too_many_numbers_are_not_put_in_order() -> None:
    x = torch.randn(2, 1025)
    graph = canonicalize(capture(Function(lambda s, x: torch.sort(x).indices), (x,)))
    assert calls(graph, aten.sort.default)


OFFSETS = [[2, 2, 6], [0, 0, 0], [6, 6, 6], [1, 4, 5]]


def by_group(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    result, start = rows.new_zeros(rows.shape[0], matrices.shape[2]), 0
    for matrix, end in zip(matrices, offsets.tolist(), strict=True):
        result[start:end] = rows[start:end] @ matrix
        start = end
    return result


@pytest.fixture
def foreign() -> Any:
    """The op that transformers registers, where it is not imported."""
    schema = "grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor"
    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define(schema)
        library.impl("grouped_mm_fallback", by_group, "CPU")
        library.impl(
            "grouped_mm_fallback", lambda x, w, o: x.new_empty(x.shape[0], w.shape[2]), "Meta"
        )
        yield torch.ops.transformers.grouped_mm_fallback.default


def test_each_row_takes_the_matrix_of_its_group(foreign: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randint(-8, 9, (3, 4, 8), generator=generator).float()
    rows = torch.randint(-8, 9, (6, 4), generator=generator).float()
    for target in (aten._grouped_mm.default, foreign):
        layer = Function(lambda s, x, o, target=target: target(x, s.w, offs=o))
        layer.w = nn.Parameter(matrices)
        offsets = [torch.tensor(each, dtype=torch.int32) for each in OFFSETS]
        graph = canonicalize(capture(layer, (rows, offsets[0])))
        assert not calls(graph, target)
        assert len(calls(graph, aten.linear.default)) == 1
        for each in offsets:
            assert torch.equal(graph(rows, each), by_group(rows, matrices, each))


def test_a_mixture_of_experts_runs_as_the_reference_says() -> None:
    experts, width, count = 3, 8, 6
    torch.manual_seed(0)

    def forward(s: Any, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(s.router(x).softmax(-1), 2)
        weights /= weights.sum(-1, keepdim=True)
        order = chosen.reshape(-1).sort()
        rows = x[order.indices // 2]
        counts = torch.histc(order.values.float(), experts, 0, experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(F.silu(F.grouped_mm(rows, s.up, offs=ends)), s.down, offs=ends)
        rows = rows * weights.reshape(-1)[order.indices, None]
        back = torch.empty_like(order.indices)
        back[order.indices] = torch.arange(2 * count)
        return s.last(rows[back].view(count, 2, width).sum(1))

    model = Function(forward, router=nn.Linear(width, experts), last=nn.Linear(width, 4))
    model.up = nn.Parameter(torch.randn(experts, width, 16))
    model.down = nn.Parameter(torch.randn(experts, 16, width))
    x = torch.randn(count, width)
    few = [(x,), (x + 1,), (torch.zeros_like(x),)]
    lowered = lowered_exactly(quantized(model, (x,)), (x,), few)
    assert sum(row.family == "linear" for row in lowered.report.ops) == 4
