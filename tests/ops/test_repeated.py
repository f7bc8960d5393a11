"""What several layers compute of integers in the same way is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import Function, calls, canonicalize, capture, quantized
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import read_program

aten = torch.ops.aten

LENGTH, FEATURES = 6, 8
TWO, THREE = torch.tensor(2), torch.tensor(3)


class Layer(nn.Module):
    """Attends to the entries up to a position, which it compares for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        visible = torch.arange(LENGTH) <= at[:, None]
        scores = (x @ x.transpose(1, 2)).masked_fill(~visible, -100.0)
        return x + self.out(scores.softmax(-1) @ self.values(x))


class Layers(nn.Module):
    """One behind the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.last = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, at: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, at)
        return self.last(x)


def kernels_of(count: int) -> list[str]:
    torch.manual_seed(0)
    data = [(torch.randn(1, LENGTH, FEATURES), torch.tensor([at])) for at in range(LENGTH)]
    converted = quantized(Layers(count), data[0], calibration=data)
    lowered = cq.lower(converted, data[0])
    reference = cq.integer_reference(converted)
    for call in data:
        assert torch.equal(lowered.run(*call), reference(*call))
    contents = read_program(lowered.buffer)
    assert len(contents.delegates) == 1
    return [str(kernel) for kernel in contents.kernels]


def test_more_layers_call_no_more_kernels() -> None:
    assert kernels_of(3) == kernels_of(1) != []


def written(_: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """The second comparison reads what was written after the first."""
    first = at > 2
    at.add_(1)
    return x * first + x * (at > 2)


def written_through_a_view(_: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """A write that stays in place: the mask itself is another one after it."""
    mask = at > 2
    first = x * (~mask)
    mask.reshape(2, 2).flatten()[::2].logical_not_()
    return first + x * (~mask)


@pytest.mark.parametrize(
    ("function", "target", "left"),
    [
        (lambda _, x, at: x * (at > 2) + x * (at > 2), aten.gt.Scalar, 1),
        (lambda _, x, at: x * (at > 2) + x * (at > 3), aten.gt.Scalar, 2),
        (lambda _, x, at: x * (at > TWO) + x * (at > TWO.clone()), aten.gt.Tensor, 1),
        (lambda _, x, at: x * (at > TWO) + x * (at > THREE), aten.gt.Tensor, 2),
        # Tables of equal values and another dtype or shape.
        (lambda _, x, at: x * (at % TWO) + x * (at % TWO.reshape(1)), None, 2),
        (written, aten.gt.Scalar, 2),
        (written_through_a_view, aten.bitwise_not.default, 2),
        # Each of these may have a scale of its own.
        (lambda _, x, at: x.sigmoid() * at + x.sigmoid(), aten.sigmoid.default, 2),
        (lambda _, x, at: (x > 0.5) * x + (x > 0.5) * at, aten.gt.Scalar, 2),
    ],
)  # fmt: skip
def test_only_what_is_the_same(function: Callable[..., Any], target: Any, left: int) -> None:
    inputs = torch.randn(4), torch.arange(4)
    graph = canonicalize(capture(Function(function), inputs))
    found = calls(graph, aten.remainder.Tensor if target is None else target)
    assert len(found) == left
    given = inputs[0], inputs[1].clone()
    assert torch.equal(graph(*given), function(graph, inputs[0], inputs[1].clone()))
