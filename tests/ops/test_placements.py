"""Tensors that are put in constant places, or added there, are moves, or layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.graphs import Function, canonicalize, capture
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.ops.rewrites.legalization.placements import PLACEMENTS

aten = torch.ops.aten

FIVE, MIXED = torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 0, 1, 2, 0])
ALONG = torch.tensor([4, -1 + 1, 3, 1, 2]).reshape(1, 5, 1).expand(2, 5, 8)


def put(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, [0, -2]] = x[:, [1, 2]] * 2
    return x


def masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([True, False, False, True, True])] = x[:, :3].relu()
    return x


def spread(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, [1, 5]] = x[:, :, :1]
    return x


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "index_put": put,
    "index_put of a mask": masked,
    "index_put of one row": spread,
    "index_copy": lambda x: torch.zeros(2, 9, 8).index_copy(1, FIVE, x),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, ALONG, x),
    "scatter of a vector": lambda x: x.flatten().scatter(0, FIVE, x[0, :, 0] * 2.0),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :2].relu(), -2, 1, 4, 2),
}
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": lambda x: x[:, :3].index_add(1, MIXED, x),
    "scatter_add": lambda x: torch.zeros(2, 3, 8).scatter_add(
        1, MIXED.reshape(1, 5, 1).expand(2, 5, 8), x
    ),
    "index_put": lambda x: torch.zeros(3, 8).index_put((MIXED,), x[0], accumulate=True),
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in (MOVES, SUMS) for n in k])
def test_nothing_but_moves_and_layers_is_left(
    kind: dict[str, Callable[[Tensor], Tensor]], name: str
) -> None:
    model, x = Function(lambda _self, x: kind[name](x)), torch.randn(2, 5, 8)
    graph = canonicalize(capture(model, (x,)))
    assert not {node.target for node in graph.graph.nodes} & PLACEMENTS.keys()
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0 if kind is MOVES else 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.zeros(2, 5, 8).index_copy(1, torch.tensor([0, 1, 1, 2, 3]), x),
        lambda x: x.scatter(1, torch.arange(8).reshape(1, 1, 8).expand(2, 1, 8) % 5, x[:, :1]),
        lambda x: x.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), x[:, 0]),
    ],
)
def test_other_places_stay(function: Callable[[Tensor], Tensor]) -> None:
    """Entries that are named twice, entries of several dims."""
    graph = canonicalize(capture(Function(lambda _self, x: function(x)), (torch.randn(2, 5, 8),)))
    assert {node.target for node in graph.graph.nodes} & PLACEMENTS.keys()


@pytest.mark.slow
def test_of_any_batch_they_are_part_of_the_one_delegate() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = put(self.first(x))
        y[:, 1:3] = y[:, 1:3].relu()
        frames = y.view(y.shape[0] // 2, 2, *y.shape[1:])  # a dim that is a number only if divided
        later = torch.cat([frames[:, 1:], frames[:, :-1]], 1).view_as(y)
        return self.last(y.slice_scatter(later[:, :2], 1, 3, 5))

    model = Function(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 4)).eval()
    half = torch.export.Dim("half", min=1, max=8)
    x, y = torch.randn(4, 5, 8), torch.randn(10, 5, 8)
    graph = capture(model, (x,), dynamic_shapes={"inputs": ({0: 2 * half},)})
    prepared = prepare_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    done = convert_pt2e(prepared)
    lowered = cq.lower(done, (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    assert torch.equal(lowered.run(y), cq.integer_reference(done)(y))
