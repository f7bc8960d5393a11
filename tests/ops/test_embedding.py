"""Embeddings: bags as rows of a table, and a table of integers in the program."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from support.contracts import FloatContract
from support.graphs import Function, calls, canonicalize, capture, differences
from support.models import convert
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer
from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("mode", "padding"), [("sum", 0), ("mean", 3), ("mean", -1)])
def test_what_pads_bags_does_not_count(mode: str, padding: int, training: bool) -> None:
    # Whole numbers, and bags of four, two, one and none: every sum and mean is exact.
    table = torch.randint(-8, 9, (20, 8)).float()
    model = nn.EmbeddingBag.from_pretrained(table, False, mode=mode)
    model.padding_idx = padding % 20
    x = torch.randint(0, 19, (5, 4))
    x += x >= padding % 20
    x[0, 1:3] = x[1, :] = x[2, 1:] = padding % 20
    graph = canonicalize(capture(model, (x,)), training=training)
    assert not calls(graph, aten.embedding_bag.padding_idx)
    assert torch.equal(graph(x), model(x))
    if training:
        (trained,) = graph.parameters()
        for network in (graph, model):
            network(x).square().sum().backward()
        assert not trained.grad[padding].any()
        assert torch.equal(trained.grad, model.weight.grad)


def test_bags_with_padding_and_weights_are_lowered() -> None:
    model = Function(
        lambda s, x, w: s.layer(s.sums(x, per_sample_weights=w) + s.means(x)),
        sums=nn.EmbeddingBag(20, 8, mode="sum", padding_idx=2),
        means=nn.EmbeddingBag(20, 8, mode="mean", padding_idx=2),
        layer=nn.Linear(8, 4),
    )
    batches = [(torch.randint(0, 6, (3, 5)), torch.randn(3, 5)) for _ in range(3)]
    converted = convert(model.eval(), batches[0], calibration=batches)
    program = cq.lower(converted.graph, batches[0])
    assert program.report.delegates == 1
    assert set(program.report.outside) == {"aten::embedding.out"}
    reference = cq.integer_reference(converted.graph)
    for given in batches:
        assert differences(program.run(*given), reference(*given)) == []


@pytest.mark.parametrize(
    ("offsets", "options"),
    [
        ([0, 8], {}),
        ([0, 4, 4, 9], {"mode": "sum"}),  # the second is empty
        ([0, 4, 4, 8], {"mode": "mean"}),
        ([0, 2, 9], {"mode": "max"}),
        ([0, 2, 6], {"padding_idx": 1, "mode": "mean"}),
        ([0, 5, 10], {"include_last_offset": True, "mode": "sum"}),
        ([0, 3, 3, 8], {"include_last_offset": True, "mode": "sum"}),
    ],
)
def test_bags_of_constant_offsets(offsets: list[int], options: dict[str, Any]) -> None:
    bags = nn.EmbeddingBag(20, 8, **options)
    bags.weight.data.round_()  # whole numbers: every sum and mean is exact
    model = Function(lambda s, x: s.bags(x, torch.tensor(offsets)), bags=bags)
    x = torch.randint(0, 20, (10,))
    x[3] = 1
    graph = canonicalize(capture(model, (x,)))
    assert not calls(graph, aten.embedding_bag.padding_idx)
    assert torch.equal(graph(x), model(x))


def test_bags_of_constant_offsets_are_lowered() -> None:
    def function(s: Function, x: Tensor, w: Tensor) -> Tensor:
        offsets = torch.tensor([0, 4, 4, 9])
        bags = [s.sums(x, offsets, per_sample_weights=w), s.means(x, offsets)]
        return cast(Tensor, s.layer(torch.cat([*bags, s.maxima(x, offsets[::2])])))

    tables = {f"{mode}s": nn.EmbeddingBag(20, 8, mode=mode) for mode in ("sum", "mean")}
    model = Function(
        function, **tables, maxima=nn.EmbeddingBag(20, 8, mode="max"), layer=nn.Linear(8, 4)
    )
    batches = [(torch.randint(0, 20, (10,)), torch.randn(10)) for _ in range(3)]
    converted = convert(model.eval(), batches[0], calibration=batches)
    program = cq.lower(converted.graph, batches[0])
    assert set(program.report.outside) == {"aten::embedding.out"}
    reference = cq.integer_reference(converted.graph)
    for given in batches:
        assert differences(program.run(*given), reference(*given)) == []


@pytest.mark.parametrize(
    ("offsets", "options"),
    [
        ([0, 5], {"padding_idx": 1, "mode": "max"}),
        ([0, 4, 4, 9], {"mode": "max"}),
    ],
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


class Scores(nn.Module):
    """Candidates by two queries: rows of the table are a factor of a product themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.query = nn.Linear(8, 8)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        queries = self.query(self.table(history))[:, -2:]
        return cast(Tensor, self.table(candidates) @ queries.mT)


def test_rows_of_a_table_are_factors_of_products() -> None:
    torch.manual_seed(0)
    ids = [(torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (2, 9))) for _ in range(4)]
    converted = convert(Scores().eval(), ids[0], calibration=ids)
    program = cq.lower(converted.graph, ids[0])
    assert program.report.delegates == 1
    assert program.report.passes["quantize_tables"] == 2
    reference = cq.integer_reference(converted.graph)
    for given in ids:
        assert differences(program.run(*given), reference(*given)) == []


def test_a_plan_counts_the_bytes_of_tables() -> None:
    """As integers where what reads the rows wants them, else in float."""
    tokens = (torch.randint(0, 300, (1, 6)),)
    models = {1: nn.Sequential(nn.Embedding(300, 32), nn.Linear(32, 4)), 4: Tied()}
    for each, model in models.items():
        graph = convert(model.eval(), tokens)
        (op,) = (op for op in graph.plan.ops if op.family == "embedding")
        assert op.size_bytes == 300 * 32 * each
        program = cq.lower(graph.graph, tokens)
        assert abs(program.report.size_bytes - graph.plan.size_bytes) < 12_000


class TestContract(FloatContract):
    families = ("embedding",)


# ---------------------------------------------------------------------------------------------
# Tables that are stored as integers although their rows are read in float
# ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table whose rows are read in float, and whose transpose is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 32)
        self.norm = nn.LayerNorm(32)
        self.layer = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.norm(self.table(tokens)))
        return nn.functional.linear(hidden, self.table.weight)


def tied(quantizer: cq.IntegerQuantizer) -> tuple[nn.Module, Any, Any, tuple[Tensor]]:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), (torch.randint(0, 300, (1, 6)),)
    converted = convert(model, tokens, quantizer=quantizer)
    return model, converted.graph, cq.lower(converted.graph, tokens), tokens


@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4"])
def test_a_dynamic_scheme_stores_tables_as_bytes(scheme: str) -> None:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    model, graph, program, tokens = tied(quantizer)
    (op,) = (op for op in quantizer.plan(capture(model, tokens)).ops if op.family == "embedding")
    assert "stored as int8, one scale a row" in op.reason
    assert op.size_bytes == 300 * 32 + 4 * 300
    assert [(t.role, t.dtype) for t in op.tensors] == [("weight", "int8")]
    assert program.report.delegates == 1
    assert program.report.outside == ("aten::embedding.out", "aten::embedding.out")
    # One row in PyTorch and one in the program, bit for bit.
    (rows,) = calls(graph, aten.embedding.default)
    table = cast(Any, rows.args[0])
    assert table.target is torch.ops.quantized_decomposed.dequantize_per_channel.default
    packed = 300 * 32 if scheme == "dyn8w8" else 300 * 16
    assert program.report.size_bytes < 300 * 32 + packed + 4 * 900 + 32 * 32 + 8_000


def test_rows_are_those_of_the_converted_graph() -> None:
    torch.manual_seed(0)
    bare = Function(lambda s, x, y: s.table(x) * y, table=nn.Embedding(50, 8))
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.embedding.default, "a8w8")
    inputs = (torch.arange(50)[None], torch.ones(1))
    graph = convert(bare, inputs, quantizer=quantizer).graph
    program = cq.lower(graph, inputs)
    assert program.report.passes["gather_rows"] == 1
    assert differences(program.run(*inputs), graph(*inputs)) == []
    table = bare.table.weight.detach()
    steps = table.abs().amax(1, keepdim=True) / 127
    error = ((program.run(*inputs)[0] - table).abs() / steps).max()
    assert 0.4 < float(error) <= 0.5 + 1e-4


class Table(nn.Module):
    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 8), nn.Linear(8, 4)
        nn.init.uniform_(self.table.weight, -0.5, 3.0)
        self.reads_layer = layer

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        rows = self.table(tokens)
        return self.layer(rows) if self.reads_layer else self.layer(x) + rows[:, :4]


@pytest.mark.parametrize("scheme", ["a8w8", "dyn8w8"])
@pytest.mark.parametrize("layer", [True, False])
def test_tables_of_another_quantizer(scheme: str, layer: bool) -> None:
    """uint8 with a zero point for each row: what is read is what that graph says, bit for bit."""
    torch.manual_seed(0)
    inputs = (torch.arange(50), torch.randn(50, 8))
    ours = cq.IntegerQuantizer().set_module_name("layer", scheme)
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), ours])
    exported = torch.export.export(Table(layer=layer).eval(), inputs)
    prepared = prepare_pt2e(exported.module(), quantizer)
    prepared(*inputs)
    graph = convert_pt2e(prepared)
    (rows,) = calls(graph, aten.embedding.default)
    assert cast(Any, rows.args[0]).args[-1] is torch.uint8
    program = cq.lower(graph, inputs)
    assert differences(program.run(*inputs), cq.integer_reference(graph)(*inputs)) == []


def test_a_static_scheme_leaves_tables_to_what_reads_them() -> None:
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    _, graph, _, _ = tied(quantizer)
    (rows,) = calls(graph, aten.embedding.default)
    assert cast(Any, rows.args[0]).op == "get_attr"
