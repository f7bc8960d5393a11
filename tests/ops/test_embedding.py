"""Embeddings: bags as rows of a table, and a table of integers in the program."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from support.contracts import FloatContract
from support.graphs import Function, calls, canonicalize, capture, differences
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels

aten = torch.ops.aten


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size_are_rows_of_a_table(mode: str) -> None:
    model = nn.EmbeddingBag(20, 8, mode=mode)
    x = torch.randint(0, 20, (3, 5))
    graph = canonicalize(capture(model, (x,)))
    assert not calls(graph, aten.embedding_bag.padding_idx)
    assert len(calls(graph, aten.embedding.default)) == 1
    # Sums of five in another order.
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=5 * 2.0**-22)


def test_weighted_bags_of_a_dynamic_batch() -> None:
    model = nn.EmbeddingBag(20, 8, mode="sum")
    x, weights = torch.randint(0, 20, (3, 5)), torch.randn(3, 5)
    batch = torch.export.Dim("batch", max=8)
    graph = canonicalize(
        capture(
            Function(lambda s, x, w: s.bag(x, per_sample_weights=w), bag=model),
            (x, weights),
            dynamic_shapes=(({0: batch}, {0: batch}),),
        )
    )
    assert len(calls(graph, aten.embedding.default)) == 1
    for size in (2, 8):
        given = (torch.randint(0, 20, (size, 5)), torch.randn(size, 5))
        want = model(given[0], per_sample_weights=given[1])
        torch.testing.assert_close(graph(*given), want, rtol=0, atol=5 * 2.0**-20)


@pytest.mark.parametrize(
    ("offsets", "options"),
    [([0, 4], {}), ([0, 5], {"padding_idx": 1}), ([0, 5, 10], {"include_last_offset": True})],
)
def test_other_bags_are_left_alone(offsets: list[int], options: dict[str, Any]) -> None:
    bags = nn.EmbeddingBag(20, 8, **options)
    model = Function(lambda s, x: s.bags(x, torch.tensor(offsets)), bags=bags)
    graph = canonicalize(capture(model, (torch.randint(0, 20, (10,)),)))
    assert calls(graph, aten.embedding_bag.padding_idx)


class Words(nn.Module):
    """A table, positions, one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 16)
        self.positions = nn.Parameter(torch.randn(1, 6, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(self.table(tokens) + self.positions)[:, 0]))


def test_a_text_model_is_a_table_of_integers_and_one_delegate() -> None:
    torch.manual_seed(0)
    model = Words().eval()
    tokens = [(torch.randint(0, 2000, (2, 6)),) for _ in range(4)]
    converted = convert(model, tokens[0], calibration=tokens)
    program = cq.lower(converted.graph, tokens[0])
    assert program.report.delegates == 1
    assert program.report.outside == ("aten::embedding.out",)
    assert program.report.passes["quantize_tables"] == 1
    # One byte a weight, and what a program of this many ops takes anyway.
    assert program.report.size_bytes < sum(p.numel() for p in model.parameters()) + 25_000
    linears = [op for op in program.report.ops if op.family == "linear"]
    assert {op.backend for op in linears} == {kernels.INT8}
    assert len(program.integer_biases()) == len(linears) == 5
    reference = cq.integer_reference(converted.graph)
    for given in tokens:
        assert differences(program.run(*given), reference(*given)) == []


class TestContract(FloatContract):
    families = ("embedding",)
