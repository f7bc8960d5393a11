"""Straight-through estimators: the value without the way that gradients take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from torch import Tensor, nn

aten = torch.ops.aten
Estimator = Callable[[Tensor, Tensor], Tensor]

# What stands for q, whose gradient is that of z.
SPELLINGS: dict[str, Estimator] = {
    "of the difference": lambda q, z: z + (q - z).detach(),
    "the other way round": lambda q, z: (q - z).detach() + z,
    "of the input": lambda q, z: q - z.detach() + z,
    "of both": lambda q, z: q.detach() + (z - z.detach()),
    "subtracted last": lambda q, z: q.detach() + z - z.detach(),
    "of a difference from it": lambda q, z: z - (z - q).detach(),
}
OTHERS: dict[str, Estimator] = {
    "no detach": lambda q, z: z + (q - z),
    "the same sign": lambda q, z: z + (q + z).detach(),
    "negated": lambda q, z: z - (q + z).detach(),
    "scaled": lambda q, z: z + torch.sub(q, z, alpha=2).detach(),
    "of another": lambda q, z: z.abs() + (q - z).detach(),
    "broadcast": lambda q, z: z + (q[:1] - z).detach(),
}


def sums(spelling: Estimator, x: Tensor, *, training: bool = False) -> int:
    model = Function(lambda _s, z: spelling(torch.round(z), z))
    graph = canonicalize(capture(model, (x,)), training=training)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-6)
    return len(calls(graph, aten.add.Tensor) + calls(graph, aten.sub.Tensor))


@pytest.mark.parametrize("name", SPELLINGS)
def test_estimators_are_what_they_stand_for(name: str) -> None:
    x = torch.randn(3, 8)
    assert sums(SPELLINGS[name], x) == 0
    assert sums(SPELLINGS[name], x, training=True) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name: str) -> None:
    assert sums(OTHERS[name], torch.randn(3, 8)) == 2


class Quantizer(nn.Module):
    """The nearest of a few vectors (VQ-VAE), and a decision by ``gumbel_softmax``'s last lines."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        self.codebook = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        soft = (z @ self.codebook.T).softmax(-1)
        chosen = (soft == soft.amax(-1, keepdim=True)).float()
        hard = chosen - soft.detach() + soft
        q = hard @ self.codebook
        return self.decode(z + (q - z).detach())


def test_a_vector_quantizer_rounds_no_estimator() -> None:
    torch.manual_seed(0)
    model, x = Quantizer().eval(), torch.randn(4, 8)
    converted = quantized(model, (x,))
    assert calls(converted, aten.sub.Tensor) == []
    lowered_exactly(converted, (x,), [])
    assert F.cosine_similarity(converted(x), model(x)).min() > 0.99
