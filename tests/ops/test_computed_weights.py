"""Layers whose weight depends on an input are products inside the delegate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from support.selection import slow_but
from torch import Tensor

aten = torch.ops.aten

Shape = tuple[int, ...]

# The layer, and the shapes of input, weight and bias.
LAYERS: dict[str, tuple[Callable[..., Tensor], Shape, Shape, Shape]] = {
    "correlation": (F.conv2d, (1, 4, 9, 8), (2, 4, 5, 3), (2,)),
    "1x1": (F.conv2d, (2, 4, 3, 5), (6, 4, 1, 1), (6,)),
    "1x1, every second": (lambda *a: F.conv2d(*a, stride=2), (1, 4, 5, 5), (6, 4, 1, 1), (6,)),
    "one group a sample": (
        lambda x, w, b: F.conv2d(x.view(1, 12, 7, 7), w, b, 1, 1, 1, 3).view(3, 2, 7, 7),
        (3, 4, 7, 7),
        (6, 4, 3, 3),
        (6,),
    ),
    "groups of a batch": (
        lambda *a: F.conv2d(*a, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        (3, 4, 8, 9),
        (6, 2, 3, 3),
        (6,),
    ),
    "even kernel": (lambda *a: F.conv2d(*a, padding="same"), (2, 2, 6, 5), (3, 2, 4, 2), (3,)),
    "signal": (lambda *a: F.conv1d(*a, padding=1, groups=2), (2, 4, 9), (4, 2, 3), (4,)),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0), 2, (1, 2)),
        (2, 4, 3, 5),
        (4, 3, 3, 3),
        (6,),
    ),
    "transposed signal": (
        lambda *a: F.conv_transpose1d(*a, stride=2),
        (1, 4, 5),
        (4, 3, 2),
        (3,),
    ),
    "linear": (F.linear, (2, 3, 4), (5, 4), (5,)),
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", slow_but(list(LAYERS)[::3], LAYERS))
def test_they_compute_what_the_layer_does(name: str, has_bias: bool) -> None:
    layer, *shapes = LAYERS[name]
    # Whole numbers, whose sums are exact in any order.
    inputs = [torch.randint(-8, 9, shape).float() for shape in shapes]
    model = Function(lambda _, x, w, b: layer(x, w, b if has_bias else None))
    graph = canonicalize(capture(model, tuple(inputs)))
    assert len(calls(graph, aten.matmul.default)) == 1
    assert torch.equal(graph(*inputs), model(*inputs))


SOME = ("groups of a batch", "transposed signal", "linear")


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(LAYERS), marks=pytest.mark.slow)])
def test_they_run_as_integers_in_one_delegate(names: tuple[str, ...]) -> None:
    layers = [LAYERS[name] for name in names]
    inputs = tuple(torch.randn(shape) for _, *shapes in layers for shape in shapes)

    def forward(_: Any, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            layer(*(2 * x for x in given[3 * i : 3 * i + 3]))
            for i, (layer, *_) in enumerate(layers)
        )

    other = tuple(torch.randn_like(x) for x in inputs)
    program = lowered_exactly(quantized(Function(forward), inputs), inputs, [other])
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert "matmul" not in {op.family for op in program.report.not_integer()}


def test_a_weight_that_parameters_tell_is_one_also_where_they_are_trained() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, s.weight * s.weight.norm())

    model = Function(forward)
    model.weight = torch.nn.Parameter(torch.randn(2, 3, 3, 3))
    graph = canonicalize(capture(model, (torch.randn(1, 3, 6, 6),)), training=True)
    assert len(calls(graph, aten.conv2d.default)) == 1
