"""What our visitors write: in every route, and in no graph but ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackPartitioner as UpstreamPartitioner,
)
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.export import ExportRecipe
from executorch.export import export as export_session
from support.graphs import Function, differences
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import visitors
from custom_quantizer.backends.xnnpack.contents import DelegateOp, ProgramContents
from custom_quantizer.backends.xnnpack.program import StoredProgram
from custom_quantizer.backends.xnnpack.visitors import VISITORS

LEFT, RIGHT = (2, 3, 5, 16), (2, 3, 16, 40)


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def kinds(contents: ProgramContents, kind: str) -> list[DelegateOp]:
    return [op for delegate in contents.delegates for op in delegate.ops if op.kind == kind]


def lowered(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> cq.LoweredProgram:
    """The program, whose outputs are those of the reference on two more batches."""
    done = convert(Function(function), inputs(*shapes))
    program = cq.lower(done.graph, done.example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    reference = cq.integer_reference(done.graph)
    for seed in (1, 2):
        batch = inputs(*shapes, seed=seed)
        assert differences(program.run(*batch), reference(*batch)) == []
    return program


CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], bool, int]] = {
    "narrow": (lambda _s, a, b: a @ b, ((3, 5, 16), (3, 16, 8)), False, 0),
    "wide": (lambda _s, a, b: a @ b, ((3, 5, 16), (3, 16, 9)), True, 2),
    "two batch dims": (lambda _s, a, b: a @ b, (LEFT, RIGHT), True, 1),
    "transposed": (lambda _s, a, b: a @ b.transpose(-1, -2), (LEFT, (2, 3, 40, 16)), True, 0),
    "transposed, of one batch": (lambda _s, a, b: a @ b.mT, ((3, 5, 16), (3, 40, 16)), True, 0),
    "permuted": (lambda _s, a, b: a @ b.permute(1, 2, 0), ((3, 5, 16), (40, 3, 16)), True, 1),
    "one row": (lambda _s, a, b: a @ b, ((3, 5, 1), (3, 1, 40)), True, 0),
    "read by another op, too": (
        lambda _s, a, b: torch.cat([a @ b.mT, b.mT], 1),
        ((3, 5, 16), (3, 40, 16)),
        True,
        1,
    ),
}
"""A function, shapes, whether its product is written transposed, and the transposes in memory.

A transpose of the last two dims alone is followed by a copy, or XNNPACK takes it and the flag away.
"""


@pytest.mark.parametrize("name", CASES)
def test_wide_products_read_what_lies_transposed(name: str) -> None:
    function, shapes, transposed, moves = CASES[name]
    contents = lowered(function, *shapes).contents
    (product,) = kinds(contents, "batch_matrix_multiply")
    assert product.is_transposed is transposed
    assert len(kinds(contents, "static_transpose")) == moves


def test_a_product_in_float_is_not_transposed() -> None:
    done = convert(Function(lambda _s, a, b: a @ b), inputs(LEFT, RIGHT), "a16w8")
    contents = cq.lower(done.graph, done.example).contents
    (product,) = kinds(contents, "batch_matrix_multiply")
    assert not product.is_transposed
    assert kinds(contents, "static_transpose") == []


# ---------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Scores and values of one head; tokens may be dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        return (q @ k.transpose(-1, -2)) @ v


TOKENS = (2, 12, 16)


def attention(**dynamic: Any) -> Any:
    torch.manual_seed(0)
    return convert(Attention(), inputs(TOKENS), **dynamic)


def are_transposed(contents: ProgramContents) -> list[bool]:
    return [op.is_transposed for op in kinds(contents, "batch_matrix_multiply")]


def stock_call(graph: Any, *partitioners: Any) -> EdgeProgramManager:
    exported = torch.export.export(graph, inputs(TOKENS))
    return to_edge_transform_and_lower(exported, partitioner=list(partitioners))


@pytest.mark.slow
def test_every_route_writes_products_transposed() -> None:
    done = attention()
    program = cq.lower(done.graph, done.example)
    assert are_transposed(program.contents) == [True, True]
    assert len(kinds(program.contents, "static_transpose")) == 2  # of the values, and a copy
    edge = stock_call(done.graph, cq.XnnpackPartitioner())
    assert are_transposed(cq.read_program(bytes(edge.to_executorch().buffer))) == [True, True]
    both = torch.export.export(done.graph, inputs(TOKENS))
    edge = to_edge_transform_and_lower(
        {"forward": both, "again": both}, partitioner=[cq.XnnpackPartitioner()]
    )
    assert are_transposed(cq.read_program(bytes(edge.to_executorch().buffer))) == [True] * 4
    torch.manual_seed(0)
    recipe = ExportRecipe.get_recipe(cq.IntegerRecipe.A8W8)
    session = export_session(Attention().eval(), [inputs(TOKENS)], recipe)
    assert are_transposed(cq.session_program(session).contents) == [True, True]


@pytest.mark.slow
def test_upstream_s_partitioner_has_products_in_float_which_are_right() -> None:
    done = attention()
    exported = cq.export_converted(done.graph, done.example)
    edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
    data = bytes(edge.to_executorch().buffer)
    contents = cq.read_program(data)
    (delegate,) = contents.delegates
    products = kinds(contents, "batch_matrix_multiply")
    assert [delegate.tensors[op.inputs[1]].dtype for op in products] == ["float32", "float32"]
    assert are_transposed(contents) == [False, False]
    assert len(kinds(contents, "static_transpose")) == 1  # of the keys
    program = StoredProgram(data, "the program", isolated=False)
    reference = cq.integer_reference(done.graph)
    for seed in (1, 2):
        batch = inputs(TOKENS, seed=seed)
        assert differences(program.run(*batch), reference(*batch)) == []


@pytest.mark.slow
def test_any_number_of_tokens() -> None:
    tokens = Dim("tokens", min=2, max=20)
    shape = {"x": {1: tokens}}
    torch.manual_seed(0)
    captured = torch.export.export(
        Attention().eval(), inputs(TOKENS), dynamic_shapes=shape
    ).module()
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_pt2e(captured, quantizer)
    prepared(*inputs(TOKENS))
    graph = convert_pt2e(prepared)
    program = cq.lower(graph, inputs(TOKENS))
    assert are_transposed(program.contents) == [True, True]
    reference = cq.integer_reference(graph)
    for size in (2, 20, 7):
        batch = inputs((2, size, 16), seed=size)
        assert differences(program.run(*batch), reference(*batch)) == []


# ---------------------------------------------------------------------------------------------
# Pointwise convolutions
# ---------------------------------------------------------------------------------------------

POINTWISE: dict[str, tuple[nn.Module, tuple[int, ...], str, bool]] = {
    "image": (nn.Conv2d(8, 12, 1), (2, 8, 5, 6), "a8w4", True),
    "without a bias, clamped": (
        nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.ReLU6()),
        (2, 8, 5, 6),
        "a8w4",
        True,
    ),
    "one scale": (nn.Conv2d(8, 12, 1), (2, 8, 5, 6), "a8w4-per_tensor", True),
    "full range": (nn.Conv2d(8, 12, 1), (2, 8, 5, 6), "a8w4-full", True),
    "2 bits": (nn.Conv2d(8, 12, 1, padding="same"), (2, 8, 5, 6), "a4w2-bias16", True),
    "signal": (nn.Conv1d(8, 12, 1), (2, 8, 9), "a8w4", True),
    "3 bits": (nn.Conv2d(4, 6, 1), (2, 4, 5, 6), "a8w3", True),
    "5 bits": (nn.Conv2d(8, 12, 1), (2, 8, 5, 6), "a8w5", False),
    "odd number of channels": (nn.Conv2d(7, 12, 1), (2, 7, 5, 6), "a8w4", False),
    "one output channel": (nn.Conv2d(8, 1, 1), (2, 8, 5, 6), "a8w4", False),
    "stride": (nn.Conv2d(128, 128, 1, 2), (2, 128, 5, 6), "a8w4", True),
    "stride of rows": (nn.Conv2d(128, 128, 1, (3, 1), bias=False), (2, 128, 8, 6), "a8w3", True),
    "stride, few weights": (nn.Conv2d(8, 12, 1, 2), (2, 8, 5, 6), "a8w4", False),
    "stride, 5 bits": (nn.Conv2d(128, 128, 1, 2), (2, 128, 5, 6), "a8w5", False),
    "padding": (nn.Conv2d(8, 12, 1, padding=(0, 1)), (2, 8, 5, 6), "a8w4", False),
    "groups": (nn.Conv2d(8, 12, 1, groups=2), (2, 8, 5, 6), "a8w4", False),
    "two taps": (nn.Conv2d(8, 12, (1, 2)), (2, 8, 5, 6), "a8w4", False),
}
"""A layer, the shape of its input, a scheme, and whether two weights share a byte."""


def layers(contents: ProgramContents) -> list[tuple[str, str]]:
    """Kind of each weighted op, and dtype of its weight."""
    return [
        (op.kind, delegate.tensors[op.weight].dtype)
        for delegate in contents.delegates
        for op in delegate.ops
        if op.weight is not None
    ]


FAST = ("image", "2 bits", "5 bits", "odd number of channels", "stride", "stride, few weights")


@pytest.mark.parametrize("name", slow_but(FAST, POINTWISE))
def test_pointwise_convolutions_of_4_bits_are_packed(name: str) -> None:
    layer, shape, scheme, packed = POINTWISE[name]
    done = convert(layer.eval(), inputs(shape), scheme)
    (planned,) = (op.backend for op in done.plan.quantized if op.family == "conv")
    program = cq.lower(done.graph, done.example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    (row,) = (row for row in program.report.ops if row.family == "conv")
    assert planned == row.kernel
    assert (row.kernel == "xnnpack packed int4") is packed
    wanted = ("fully_connected", "int4") if packed else ("conv2d", "int8")
    taken = [("depthwise_conv2d", "int8")] * (packed and "stride" in name)
    assert layers(program.contents) == [*taken, wanted]
    reference = cq.integer_reference(done.graph)
    for seed in (1, 2):
        batch = tuple(2 * x for x in inputs(shape, seed=seed))
        assert differences(program.run(*batch), reference(*batch)) == []


class Shared(nn.Module):
    """One weight of three convolutions, one of which cannot be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        strided = torch.conv2d(x, self.weight, stride=2)
        return torch.conv2d(torch.conv2d(strided, self.weight), self.weight)


def test_a_shared_weight_is_packed_where_it_can_be() -> None:
    torch.manual_seed(0)
    done = convert(Shared(), inputs((2, 8, 6, 6)), "a8w4")
    program = cq.lower(done.graph, done.example)
    packed = ("fully_connected", "int4")
    assert layers(program.contents) == [("conv2d", "int8"), packed, packed]
    batch = inputs((2, 8, 6, 6), seed=1)
    reference = cq.integer_reference(done.graph)
    assert differences(program.run(*batch), reference(*batch)) == []


def pointwise_net() -> Any:
    torch.manual_seed(0)
    blocks = (
        nn.Conv2d(16, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 16, 1),
    )
    return convert(nn.Sequential(*blocks).eval(), inputs(IMAGE), "a8w4")


IMAGE = (1, 16, 8, 8)
PACKED = [("fully_connected", "int4"), ("depthwise_conv2d", "int8"), ("fully_connected", "int4")]
CONTAINERS = [("conv2d", "int8"), ("depthwise_conv2d", "int8"), ("conv2d", "int8")]


@pytest.mark.slow
def test_every_route_packs_pointwise_convolutions() -> None:
    done = pointwise_net()
    program = cq.lower(done.graph, done.example)
    assert layers(program.contents) == PACKED
    exported = torch.export.export(done.graph, done.example)
    edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
    cq.check(edge, done.graph, done.example)
    assert layers(cq.read_program(bytes(edge.to_executorch().buffer))) == PACKED
    exported = cq.export_converted(done.graph, done.example)
    edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
    data = bytes(edge.to_executorch().buffer)
    assert layers(cq.read_program(data)) == PACKED
    batch = inputs(IMAGE, seed=1)
    outputs = StoredProgram(data, "the program", isolated=False).run(*batch)
    assert differences(outputs, cq.integer_reference(done.graph)(*batch)) == []


@pytest.mark.slow
def test_without_our_visitors_a_pointwise_convolution_is_right_and_larger() -> None:
    """As in a process that got what ``export_converted`` gave and does not know this package."""
    done = pointwise_net()
    exported = cq.export_converted(done.graph, done.example)
    with upstream_s_visitors():
        edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
        data = bytes(edge.to_executorch().buffer)
    assert layers(cq.read_program(data)) == CONTAINERS
    cq.check(data, done.graph, done.example)
    assert len(data) - len(cq.lower(done.graph, done.example).buffer) > 0


# ---------------------------------------------------------------------------------------------
# Other graphs than ours
# ---------------------------------------------------------------------------------------------


def upstream_s(visitor: type[Any]) -> type[Any]:
    """The visitor in whose place one of ours stands, or of which it is one for another op."""
    return next(base for base in visitor.__mro__ if base not in VISITORS)


@contextmanager
def upstream_s_visitors() -> Iterator[None]:
    """ExecuTorch as it is without this package."""
    for visitor in VISITORS:
        node_visitor.register_node_visitor(upstream_s(visitor))
    try:
        yield
    finally:
        for visitor in VISITORS:
            node_visitor.register_node_visitor(visitor)


class Stock(nn.Module):
    """Every op that has a visitor here."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.pointwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(torch.relu(self.wide(x))).flatten(2)[:, 1:]
        return y @ y.permute(0, 2, 1)


@pytest.mark.slow
def test_other_graphs_are_written_as_upstream_writes_them() -> None:
    """What this module rests on is ExecuTorch 1.5.1's registry of visitors."""
    assert version("executorch").partition("+")[0] == "1.5.1"
    registered = node_visitor.get_node_visitors(None, {}, None)
    for visitor in VISITORS:
        assert type(registered[visitor.target]) is visitor
        assert upstream_s(visitor).__module__.startswith("executorch.backends.xnnpack.operators.")
    example = inputs((2, 3, 8, 8))
    torch.manual_seed(0)
    captured = torch.export.export(Stock().eval(), example).module()
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True)
    )
    prepared = prepare_pt2e(captured, quantizer)
    prepared(*example)
    exported = torch.export.export(convert_pt2e(prepared), example)
    written = []
    for _ in range(2):
        edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
        written.append(bytes(edge.to_executorch().buffer))
        if len(written) == 1:
            with upstream_s_visitors():
                edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
                written.append(bytes(edge.to_executorch().buffer))
    assert written[0] == written[1] == written[2]


def test_a_flag_that_xnnpack_takes_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no copy between a transpose of the last two dims and the product."""
    done = convert(Function(lambda _s, a, b: a @ b), inputs((3, 5, 16), (3, 16, 40)))
    monkeypatch.setattr(visitors, "_behind_a_copy", lambda operand, *_: operand)
    with pytest.raises(cq.VerificationError, match=r"second factor: its 40 columns are not"):
        cq.lower(done.graph, done.example)


@pytest.mark.slow
def test_a_program_without_the_flag_is_found() -> None:
    """This machine computes it rightly, and most ARM CPUs would not."""
    done = attention()
    with upstream_s_visitors():
        data = cq.lower(done.graph, done.example, check=False).buffer
        edge = stock_call(done.graph, cq.XnnpackPartitioner())
        with pytest.raises(cq.VerificationError, match=r"second factor: its 12 columns are not"):
            cq.check(edge, done.graph, done.example)
        with pytest.raises(cq.VerificationError, match=r"matmul.* second factor: its 12 columns"):
            cq.lower(done.graph, done.example)
    assert are_transposed(cq.read_program(data)) == [False, False]
