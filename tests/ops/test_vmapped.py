"""What torch.vmap runs is planned as ops over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import Function, canonicalize, capture
from torch import Tensor, nn
from torch.export import Dim

import custom_quantizer as cq
from custom_quantizer.ops.rewrites.vmapped import write_out_batches

X = torch.randn(3, 4)


def ensemble(self: Any, x: Tensor) -> Tensor:
    """Networks of one kind, each with weights of its own."""
    return torch.vmap(lambda w, b: torch.relu(x @ w + b))(self.weights.w, self.weights.b)


def weights() -> dict[str, nn.Module]:
    values = {"w": torch.randn(2, 4, 5), "b": torch.randn(2, 5)}
    return {"weights": nn.ParameterDict({k: nn.Parameter(v) for k, v in values.items()})}


def mask(self: Any, x: Tensor) -> Tensor:
    """Positions that see each other, as transformers make them: a batch in a batch."""
    places = torch.arange(3)
    row = torch.vmap(lambda i, j: (j <= i) & (j > i - 2), in_dims=(None, 0))
    seen = torch.vmap(row, in_dims=(0, None))(places, places)
    return (x @ x.t()).masked_fill(~seen, -9.0)


def pairs(self: Any, x: Tensor) -> Tensor:
    row = torch.vmap(lambda a, b: (a * b).sum(), in_dims=(None, 0))
    return torch.vmap(row, in_dims=(0, None))(x, x) + 1.0


@pytest.mark.parametrize("function", [ensemble, mask, pairs])
def test_the_same_values(function: Callable[..., Tensor]) -> None:
    graph = capture(Function(function, **weights()), (X,))
    want = graph(X)
    assert write_out_batches(graph) == 1
    graph.graph.lint()
    assert all(
        isinstance(n.target, torch._ops.OpOverload)
        for n in graph.graph.nodes
        if n.args and n.op == "call_function"
    )
    assert torch.equal(graph(X), want)


def test_of_any_batch() -> None:
    shapes: Any = (({0: Dim("batch", min=2, max=8)},),)
    graph = canonicalize(capture(Function(pairs), (X,), dynamic_shapes=shapes))
    more = torch.randn(5, 4)
    assert torch.equal(graph(more), pairs(None, more))


def test_what_is_vmapped_is_planned() -> None:
    graph = torch.export.export(Function(ensemble, **weights()), (X,))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(graph)
    assert [op.node for op in plan.ops if op.scheme == "a8w8"] == ["bmm"]  # with bias and relu
