"""Programs whose batch, or number of tokens, may change: one delegate, the same integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackPartitioner as UpstreamPartitioner,
)
from executorch.exir import to_edge_transform_and_lower
from support.graphs import Function, canonicalize, capture, differences
from support.models import convert
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.contents import DelegateOp
from custom_quantizer.backends.xnnpack.passes.movement import splits_to_slices
from custom_quantizer.core.graph import reads_sizes
from custom_quantizer.ops.placement import Placement

aten = torch.ops.aten

MOST = 12
"""Largest size of all dims that change."""


def program_of(
    model: nn.Module, example: tuple[Tensor, ...], sizes: Any
) -> tuple[Any, cq.LoweredProgram]:
    """The converted graph and its program; ``sizes``: of each input, names of its dynamic dims."""
    bounds = {name: Dim(name, min=1 if name == "batch" else 4, max=MOST) for name in NAMES}
    dims = tuple({dim: bounds[name] for dim, name in of.items()} for of in sizes)
    shapes: Any = (dims,) if isinstance(model, Function) else dims
    captured = torch.export.export(model.eval(), example, dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*example)
    graph = convert_pt2e(prepared)
    return graph, cq.lower(graph, example)


NAMES = ("batch", "tokens", "keys", "rows", "columns")


def check(graph: Any, program: cq.LoweredProgram, batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Outputs are those of the reference, as the sizes grow and shrink from call to call."""
    reference = cq.integer_reference(graph)
    for batch in batches:
        shapes = [tuple(x.shape) for x in batch]
        assert differences(program.run(*batch), reference(*batch)) == [], shapes


def is_whole(program: cq.LoweredProgram) -> bool:
    return (program.report.delegates, program.report.outside) == (1, ())


def kinds(program: cq.LoweredProgram, kind: str) -> list[DelegateOp]:
    (delegate,) = program.contents.delegates
    return [op for op in delegate.ops if op.kind == kind]


# ---------------------------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------------------------

OF_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "first": lambda x: x[:, :3],
    "from the end": lambda x: x[:, -3:-1],
    "every second": lambda x: x[:, ::2],
    "every fourth, unevenly": lambda x: x[:, 1::4],
    "one": lambda x: x[:, -1],
    "exchanged": lambda x: x.roll(2, 2),
    "the first sample": lambda x: x[:1],
}
OF_IMAGES: dict[str, Callable[[Tensor], Any]] = {
    "channels": lambda x: x[:, 2:5],
    "every fourth channel": lambda x: x[:, ::4],
    "rows": lambda x: x[:, :, 1:, :-2],
    "every second row": lambda x: x[:, :, 1::2],
}


@pytest.mark.slow
def test_slices_of_a_dynamic_batch() -> None:
    """A size of 0 in XNNPACK's slices is all there is of a dim."""
    layer = nn.Conv2d(6, 6, 1)

    def function(s: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        rows, image = x + x, s.layer(y)
        cut = [take(rows) * 1.5 for take in OF_ROWS.values()]
        return cut + [take(image) * 1.5 for take in OF_IMAGES.values()]

    example = (torch.randn(2, 6, 9), torch.randn(2, 6, 8, 7))
    sizes = ({0: "batch"}, {0: "batch"})
    graph, program = program_of(Function(function, layer=layer), example, sizes)
    assert is_whole(program)
    assert {row.placement for row in program.report.ops if row.family == "slice"} == {
        Placement.INTEGER
    }
    check(
        graph, program, [(torch.randn(n, 6, 9), torch.randn(n, 6, 8, 7)) for n in (1, 7, 3, MOST)]
    )


@pytest.mark.slow
def test_slices_of_dims_that_are_dynamic_themselves() -> None:
    """They may begin anywhere, if counted from the beginning, and end with the dim."""

    def function(_s: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        rows, image = x + x, y + y
        cut = [rows[:, :2], rows[:, 1:], rows[:, 1:3], rows[:, 0], rows[:, 2:, 1:]]
        cut += [image[:, :, 1:, 2:], image[:, :, ::2], image[:, 1:3]]
        return [part * 1.5 for part in cut]

    example = (torch.randn(2, 6, 8), torch.randn(2, 4, 6, 8))
    sizes = ({0: "batch", 1: "tokens"}, {0: "batch", 2: "rows", 3: "columns"})
    graph, program = program_of(Function(function), example, sizes)
    assert is_whole(program)
    counts = ((1, 4, 5, 4), (5, MOST, 4, 9), (2, 7, MOST, 5))
    check(
        graph,
        program,
        [(torch.randn(n, t, 8), torch.randn(n, 4, h, w)) for n, t, h, w in counts],
    )


@pytest.mark.slow
def test_what_counts_from_the_end_of_a_dynamic_dim_stays_outside() -> None:
    def function(_s: Any, x: Tensor) -> list[Tensor]:
        rows = x + x
        return [part * 1.5 for part in (rows[:, -1], rows[:, :-1], rows[:, -2:], rows[:, ::2])]

    graph, program = program_of(Function(function), (torch.randn(2, 6, 8),), ({1: "tokens"},))
    assert program.report.outside == ("aten::slice_copy.Tensor_out",) * 4
    reasons = [row.reason for row in program.report.ops if row.placement is Placement.OUTSIDE]
    assert sorted(reasons) == [
        *["XNNPACK counts from the beginning, and its size is dynamic"] * 3,
        "XNNPACK has no strided slices, and its views one dynamic size",
    ]
    check(graph, program, [(torch.randn(2, n, 8),) for n in (4, MOST, 7)])


@pytest.mark.slow
def test_factors_that_are_dynamic_sizes() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        n, y = x.shape[1], s.layer(x)
        curve = torch.ops.aten.elu.default(y, n / 16, 1.5, n / 8)
        total = torch.add(curve.clamp(-n / 8, n / 4), torch.sin(y), alpha=n)
        return torch.rsub(torch.sub(total, 3, alpha=n), y, alpha=n / 4)

    model = Function(function, layer=nn.Linear(8, 8))
    graph, program = program_of(model, (torch.randn(2, 6, 8),), ({1: "tokens"},))
    assert program.report.delegates == 1  # outside are the numbers
    reference = cq.integer_reference(graph)
    for n in (4, MOST, 7):
        x = torch.randn(2, n, 8)
        # PyTorch rounds a product and its sum once where the CPU can, XNNPACK twice: six roundings
        # of at most the largest value, and last bits of the curve and of the sine.
        largest = n / 4 * (n / 4 + n + 3 * n) + float(model.layer(x).abs().max())
        assert (program.run(x) - reference(x)).abs().max() <= 8 * 2**-24 * largest


def halves(s: Any, x: Tensor) -> list[Tensor]:
    n, y = x.shape[1], s.layer(x)
    first, second = y.chunk(2, 1)
    third = y.split(n // 2, 1)[1] * y[:, : n // 2]
    return [first * second, third, y[:, n // 2 :], y[:, -(n // 2) :], y.narrow(0, 0, 1)]


def captured_of_even_sizes(function: Callable[..., Any]) -> Any:
    model = Function(function, layer=nn.Linear(8, 8)).eval()
    sizes = (({1: 2 * Dim("half", min=2, max=8)},),)
    return torch.export.export(model, (torch.randn(2, 6, 8),), dynamic_shapes=sizes).module()


def test_halves_of_a_dynamic_dim_are_pieces_of_a_dim_of_two() -> None:
    graph = captured_of_even_sizes(halves)
    x = torch.randn(2, 10, 8)
    want = graph(x)
    canonicalize(graph)
    assert not any(reads_sizes(n) for n in graph.graph.nodes if n.target is aten.slice.Tensor)
    assert differences(graph(x), want) == []


def test_splits_of_a_dynamic_dim_are_slices_where_its_ends_are_numbers() -> None:
    def function(_self: Any, x: Tensor) -> list[Tensor]:
        n = x.shape[1]
        return [*x.split([3, n - 3], 1), *x.split([n - 3, 3], 1)]

    graph = captured_of_even_sizes(function)
    x = torch.randn(2, 10, 8)
    want = graph(x)
    assert splits_to_slices.run(graph) == 1
    graph.recompile()
    assert differences(graph(x), want) == []


@pytest.mark.slow
def test_parts_of_dynamic_dims_run() -> None:
    def function(s: Any, x: Tensor) -> list[Tensor]:
        later, last = x.split([x.shape[1] - 3, 3], 1)
        return [*halves(s, x), torch.relu(later), last * 2]

    prepared = prepare_pt2e(
        captured_of_even_sizes(function), cq.IntegerQuantizer().set_global("a8w8")
    )
    example = (torch.randn(2, 6, 8),)
    prepared(*example)
    graph = convert_pt2e(prepared)
    program = cq.lower(graph, example)
    assert set(program.report.outside) <= {
        *("aten::sym_size.int", "executorch_prim::sub.Scalar", "aten::split_with_sizes_copy.out")
    }
    check(graph, program, [(torch.randn(2, n, 8),) for n in (4, 16, 10)])


@pytest.mark.slow
def test_ends_that_a_causal_convolution_cuts_off_are_not_padded() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        y = torch.relu(s.first(x)[:, :, :-4]) + x
        image = s.second(y.unsqueeze(1))[:, :, :, 1:]
        return torch.cat([image[:, 0], s.third(x)[..., :-1], s.fourth(x)[..., :-2]], 1)

    layers = {
        "first": nn.Conv1d(4, 4, 3, dilation=2, padding=4),
        "second": nn.Conv2d(1, 1, 3, padding=1),
        "third": nn.Conv1d(4, 4, 3, padding=1),
        "fourth": nn.Conv1d(4, 4, 2, padding=1),  # more than its padding
    }
    model, example = Function(function, **layers), (torch.randn(1, 4, 9),)
    graph, program = program_of(model, example, ({2: "tokens"},))
    slices = [op for op in program.report.ops if op.placement is Placement.OUTSIDE]
    assert len(slices) == 1
    check(graph, program, [(torch.randn(1, 4, n),) for n in (4, MOST, 7)])


@pytest.mark.slow
def test_what_is_cut_to_the_size_of_a_convolution_of_it() -> None:
    """It begins at the same place for all sizes, as skip connections of causal convolutions do."""
    layers = {"first": nn.Conv1d(4, 4, 3, dilation=2), "second": nn.Conv1d(4, 4, 2)}

    def function(s: Any, x: Tensor) -> Tensor:
        y = s.first(x)
        z = s.second(y)
        return x[:, :, -z.shape[2] :] + y[:, :, y.shape[2] - z.shape[2] :] + z

    bounds = Dim("length", min=8, max=MOST)
    model, example = Function(function, **layers), (torch.randn(1, 4, 9),)
    captured = torch.export.export(model.eval(), example, dynamic_shapes=(({2: bounds},),)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*example)
    graph = convert_pt2e(prepared)
    program = cq.lower(graph, example)
    assert is_whole(program)
    check(graph, program, [(torch.randn(1, 4, n),) for n in (8, MOST, 10)])


@pytest.mark.slow
def test_upstream_s_partitioner_still_finds_convolutions_for_slices_of_channels() -> None:
    done = convert(
        Function(lambda s, x: s.layer(x)[:, 1:3] * 1.5, layer=nn.Conv2d(3, 4, 1)),
        (torch.randn(2, 3, 4, 4),),
        dynamic_shapes=(({0: Dim("batch", min=1, max=MOST)},),),
    )
    exported = cq.export_converted(done.graph, done.example)
    edge = to_edge_transform_and_lower(exported, partitioner=[UpstreamPartitioner()])
    contents = cq.read_program(bytes(edge.to_executorch().buffer))
    assert (len(contents.delegates), contents.kernels) == (1, ())
    assert not kinds(cq.lower(done.graph, done.example), "fully_connected")
    assert len(kinds(cq.lower(done.graph, done.example), "conv2d")) == 1


# ---------------------------------------------------------------------------------------------
# Expands
# ---------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A learned token for each sample: joined in integers, joined in float, and one by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.several = nn.Parameter(torch.randn(3, 8))
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, image: Tensor) -> list[Tensor]:
        rows, batch = self.layer(x), x.shape[0]
        joined = torch.cat([self.token.expand(batch, -1, -1), rows], 1)
        before = self.norm(torch.cat([rows, self.token.expand(batch, -1, -1)], 1))
        queries = self.layer(self.several.unsqueeze(1).repeat(1, 1, 1).expand(3, 1, 8))
        learned = torch.cat([self.several.expand(batch, -1, -1), rows], 1)
        larger = F.interpolate(image + image, scale_factor=2)
        return [self.layer(joined), self.layer(before), queries, learned * 1.5, larger * 1.5]


@pytest.mark.slow
def test_what_is_filled_with_one_number_for_any_batch() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = s.linear(x)
        state = torch.cat([y.new_zeros(x.shape[0], 1, 6), y, torch.ones_like(y)], 1)
        written = y * 1.5
        written[:, 0] = 0.5
        return state, torch.ones_like(y) - y, y + torch.full((x.shape[0], 4, 6), 0.5), written

    model = Function(forward, linear=nn.Linear(6, 6))
    graph, program = program_of(model, (torch.randn(3, 4, 6),), ({0: "batch"},))
    assert is_whole(program)
    check(graph, program, [(torch.randn(n, 4, 6),) for n in (3, 1, 12, 2)])


def test_a_convolution_whose_groups_are_the_samples_stays_float() -> None:
    def forward(s: Any, x: Tensor, weight: Tensor) -> Tensor:
        count = x.shape[0]
        groups = x.reshape(1, count * 4, 6, 6), weight.reshape(count * 2, 4, 1, 1)
        return s.linear(F.conv2d(*groups, groups=count))

    model, batch = Function(forward, linear=nn.Linear(6, 6)), Dim("batch", min=1, max=MOST)
    example = (torch.randn(3, 4, 6, 6), torch.randn(3, 2, 4))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    captured = capture(model, example, dynamic_shapes=(({0: batch}, {0: batch}),))
    prepare_pt2e(captured, quantizer)
    assert (
        quantizer.last_plan.op("conv2d").reason == "one of its arguments depends on a dynamic size"
    )
    assert quantizer.last_plan.op("linear").scheme == "a8w8"


@pytest.mark.slow
def test_expands_to_and_in_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 5, 8), torch.randn(2, 3, 4, 4))
    graph, program = program_of(Tokens(), example, ({0: "batch"}, {0: "batch"}))
    assert is_whole(program)
    assert program.report.passes["expands_to_biases"] == 3
    check(graph, program, [(torch.randn(n, 5, 8), torch.randn(n, 3, 4, 4)) for n in (1, 7, 3)])


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------

WIDTH, HEADS = 48, 4


class Block(nn.Module):
    """A transformer block with one layer for queries, keys and values, in one of several ways."""

    def __init__(self, way: str, *, fused: bool = True) -> None:
        super().__init__()
        self.way, self.fused = way, fused
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def factors(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, ``(batch, heads, tokens, width)``."""
        batch, tokens, _ = x.shape
        packed = self.packed(x)
        if self.way == "unbind":  # timm
            rows = packed.reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
            return cast("Sequence[Tensor]", rows.permute(2, 0, 3, 1, 4).unbind(0))
        parts = packed.split(WIDTH, 2) if self.way == "split" else packed.chunk(3, -1)  # GPT-2
        return [p.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2) for p in parts]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.factors(self.norm(x))
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
            seen = scores.softmax(-1) @ v
        return cast(Tensor, x + self.out(seen.transpose(1, 2).reshape(x.shape)))


def tokens(batch: int, count: int = 6) -> Tensor:
    return torch.randn(batch, count, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["unbind", "split"])
def test_packed_projections_of_a_dynamic_batch(way: str) -> None:
    torch.manual_seed(0)
    graph, program = program_of(Block(way), (tokens(2),), ({0: "batch"},))
    assert is_whole(program)
    check(graph, program, [(tokens(n),) for n in (1, 7, 3)])


@pytest.mark.slow
def test_attention_of_any_number_of_tokens() -> None:
    """Scores have two dynamic sizes, so no view joins heads and batch: products stay whole."""
    torch.manual_seed(0)
    model = Block("split", fused=False)
    graph, program = program_of(model, (tokens(1),), ({1: "tokens"},))
    assert is_whole(program)
    products = kinds(program, "batch_matrix_multiply")
    assert [product.is_transposed for product in products] == [True] * 2
    (delegate,) = program.contents.delegates
    assert {delegate.tensors[p.outputs[0]].dtype for p in products} == {"int8"}
    assert {len(delegate.tensors[p.outputs[0]].shape) for p in products} == {4}
    check(graph, program, [(tokens(1, n),) for n in (4, MOST, 7)])


class SharedHeads(nn.Module):
    """Attention whose queries share the keys and values of fewer heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.pair = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH // HEADS * heads),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = (
            part.view(batch, count, -1, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query(x), *self.pair(x).chunk(2, -1))
        )
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return seen.transpose(1, 2).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_that_share_keys_of_any_number_of_tokens(heads: int) -> None:
    torch.manual_seed(0)
    graph, program = program_of(SharedHeads(heads), (tokens(1),), ({1: "tokens"},))
    assert is_whole(program)
    check(graph, program, [(tokens(1, n),) for n in (4, MOST, 7)])


@pytest.mark.slow
def test_a_factor_that_the_delegate_keeps_channels_last_is_not_multiplied_whole() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        image = s.layer(x)
        return cast(Tensor, image @ image.transpose(-2, -1) * 1.5)

    model = Function(function, layer=nn.Conv2d(3, 4, 1))
    sizes = ({0: "batch", 2: "rows", 3: "columns"},)
    graph, program = program_of(model, (torch.randn(2, 3, 6, 5),), sizes)
    assert "executorch_prim::et_view.default" in program.report.outside
    assert all(
        len(delegate.tensors[op.outputs[0]].shape) == 3
        for delegate in program.contents.delegates
        for op in delegate.ops
        if op.kind == "batch_matrix_multiply"
    )
    check(graph, program, [(torch.randn(n, 3, h, w),) for n, h, w in ((1, 4, 9), (5, 9, 4))])


class Cross(nn.Module):
    """Attention to the keys and values of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, kdim=8, vdim=8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, self.attention(x, y, y, need_weights=False)[0])


@pytest.mark.slow
def test_a_dynamic_batch_and_any_number_of_tokens() -> None:
    """Heads are split by views with two dynamic sizes, which stay outside, with the right memory.

    Of two inputs that share their batch export has to know that: told of each alone, sizes are made
    of quotients, and the memory that is planned for a view is not that of what it views.
    """
    torch.manual_seed(0)
    example = (torch.randn(2, 6, 16), torch.randn(2, 5, 8))
    sizes = ({0: "batch", 1: "tokens"}, {0: "batch", 1: "keys"})
    graph, program = program_of(Cross(), example, sizes)
    outside = {kernel.split("::")[1].partition(".")[0] for kernel in program.report.outside}
    assert outside <= {"et_view", "sym_size", "mul"}
    counts = ((1, 4, 7), (5, MOST, 4), (MOST, 5, MOST))
    check(graph, program, [(torch.randn(n, t, 16), torch.randn(n, k, 8)) for n, t, k in counts])


# ---------------------------------------------------------------------------------------------
# Many models
# ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of one input, or of two."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.call = {"need_weights": False} if call is None else call

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = x if y is None else y
        return cast(Tensor, self.attention(x, z, z, **self.call)[0])


class Last(nn.Module):
    """A head for the last step of a recurrent layer."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.layers = kind(16, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layers(x)[0][:, -1]))


class Windows(nn.Module):
    """A layer for each window of a shifted image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        shifted = x.roll((-2, -2), (1, 2)).view(batch, height // 4, 4, width // 4, 4, channels)
        rows = self.layer(shifted.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels))
        windows = rows.view(batch, height // 4, width // 4, 4, 4, channels)
        return windows.permute(0, 1, 3, 2, 4, 5).reshape(x.shape).roll((2, 2), (1, 2))


def vision_transformer() -> nn.Module:
    model = VisionTransformer(32, 16, 2, 4, 16, 32, num_classes=5)
    nn.init.normal_(cast(nn.Linear, model.heads.head).weight)
    return model


def swin_transformer() -> nn.Module:
    return SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5
    )


CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
ROWS, IMAGE = (2, 6, 16), (2, 3, 8, 8)
LAYER: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "batch_first": True}
GRID: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "attention": (Attention, (ROWS,)),
    "attention with weights": (lambda: Attention({}), (ROWS,)),
    "attention, a mask of bools": (lambda: Attention({"attn_mask": CAUSAL}), (ROWS,)),
    "attention, a mask of floats": (
        lambda: Attention({"attn_mask": CAUSAL.float() * -1e9, "need_weights": False}),
        (ROWS,),
    ),
    "attention to others": (Attention, (ROWS, (2, 5, 16))),
    "attention to others, of another width": (
        lambda: Attention(kdim=8, vdim=8),
        (ROWS, (2, 5, 8)),
    ),
    "attention without biases": (lambda: Attention(bias=False), (ROWS,)),
    "attention with a key of its own": (lambda: Attention(add_bias_kv=True), (ROWS,)),
    "encoder": (lambda: nn.TransformerEncoderLayer(**LAYER), (ROWS,)),
    "encoder, norms first": (
        lambda: nn.TransformerEncoderLayer(**LAYER, norm_first=True),
        (ROWS,),
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(**LAYER), (ROWS, (2, 5, 16))),
    "lstm": (lambda: Last(nn.LSTM, num_layers=2), (ROWS,)),
    "lstm, both ways": (lambda: Last(nn.LSTM, bidirectional=True), (ROWS,)),
    "gru": (lambda: Last(nn.GRU), (ROWS,)),
    "windows": (Windows, ((2, 8, 8, 8),)),
    "vision transformer": (vision_transformer, ((2, 3, 32, 32),)),
    "swin transformer": (swin_transformer, ((2, 3, 32, 32),)),
    "glu of rows": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.GLU(-1), nn.Linear(16, 4)),
        (ROWS,),
    ),
    "glu of an image": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 4, 3)),
        (IMAGE,),
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3)),
        (IMAGE,),
    ),
    "reflected padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)),
        (IMAGE,),
    ),
}
"""Models that are one delegate with a static batch, and shapes of their inputs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_a_dynamic_batch_takes_nothing_out_of_the_delegate(name: str) -> None:
    make, shapes = GRID[name]
    torch.manual_seed(0)
    example = tuple(torch.randn(shape) for shape in shapes)
    graph, program = program_of(make(), example, [{0: "batch"}] * len(shapes))
    assert is_whole(program), program.report.outside
    batches = [tuple(torch.randn(n, *shape[1:]) for shape in shapes) for n in (1, 7, 3)]
    check_outputs(graph, program, batches)


def check_outputs(graph: Any, program: cq.LoweredProgram, batches: Sequence[Any]) -> None:
    """Integers are those of the reference; a norm at the end rounds floats below 4 a few times."""
    checked = cq.verify(graph, program, batches)
    assert checked.constants_equal
    for output in checked.outputs:
        assert output.mismatches == 0 or (output.max_lsb is None and output.max_abs <= 2**-20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["attention", "attention to others", "encoder", "encoder, norms first", "decoder"]
)
@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_any_number_of_tokens(name: str, batch: str) -> None:
    make, shapes = GRID[name]
    torch.manual_seed(0)
    example = tuple(torch.randn(shape) for shape in shapes)
    first = {} if batch == "static" else {0: "batch"}
    sizes = [{**first, 1: length} for length, _ in zip(("tokens", "keys"), shapes, strict=False)]
    graph, program = program_of(make(), example, sizes)
    assert is_whole(program) is (batch == "static"), program.report.outside
    counts = [(2, 4, 7), (2, MOST, 5)] if batch == "static" else [(1, 4, 7), (7, MOST, 5)]
    batches = [
        tuple(torch.randn(n, *lengths[i : i + 1], s[2]) for i, s in enumerate(shapes))
        for n, *lengths in counts
    ]
    check_outputs(graph, program, batches)


def test_a_size_that_values_tell_is_compared_with_no_number() -> None:
    """How many rows are chosen is known in no capture; asking whether it is 1 is an error."""
    model = Function(
        lambda s, x: s.fc(x)[torch.nonzero(x[:, 0] > 0)[:, 0]].unsqueeze(0) * 2.0,
        fc=nn.Linear(4, 4),
    )
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(capture(model, (torch.randn(6, 4),)))
    assert plan.op("unsqueeze").family == "reshape"


@pytest.mark.slow
def test_a_resize_to_the_size_of_another_image() -> None:
    """Upstream keeps the op whole for a delegate that does not take it: its own kernel runs."""

    def function(s: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.interpolate(s.layer(x), size=y.shape[-2:], mode="bilinear")

    example = (torch.randn(1, 2, 4, 4), torch.randn(1, 2, 5, 6))
    sizes = ({}, {2: "rows", 3: "columns"})
    graph, program = program_of(Function(function, layer=nn.Conv2d(2, 2, 1)), example, sizes)
    reference = cq.integer_reference(graph)
    for n in (4, 8):
        inputs = (example[0], torch.randn(1, 2, n, 12 - n))
        # As floats, of which each of the two kernels rounds the weights.
        assert torch.allclose(program.run(*inputs), reference(*inputs), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_unsqueeze_of_two_dynamic_sizes_stays_outside() -> None:
    """Coordinates of the pixels of an image of any size; upstream takes it, and then refuses."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        height, width = y.shape[2:]
        rows = torch.arange(height).float().sqrt().unsqueeze(1).expand(height, width)
        columns = torch.arange(width).float().sqrt().expand(height, width)
        return y.permute(0, 2, 3, 1) * torch.stack([columns, rows], -1)

    model, x = Function(forward, conv=nn.Conv2d(3, 2, 1)), torch.randn(1, 3, 6, 8)
    graph, program = program_of(model, (x,), [{2: "rows", 3: "columns"}])
    check(graph, program, [(x,), (torch.randn(1, 3, 9, 5),)])


def test_sizes_that_are_one_size_are_checked() -> None:
    """XNNPACK and PyTorch's ops may read as far as the smaller one: a result, and a wrong one."""
    queries, keys = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    model = Function(lambda s, q, k: s.layer(q) @ s.layer(k).mT, layer=nn.Linear(4, 4))
    sizes = [{0: "batch", 1: "tokens"}, {0: "batch", 1: "keys"}]
    graph, program = program_of(model, (queries, keys), sizes)
    for run in (program, cq.integer_reference(graph)):
        assert run(torch.randn(3, 4, 4), torch.randn(3, 7, 4)).shape == (3, 4, 7)
        with pytest.raises(cq.InputError, match="dim 0 of input 1 is 2, and dim 0 of input 0 is 3"):
            run(torch.randn(3, 5, 4), torch.randn(2, 6, 4))


def test_sizes_that_follow_from_others_are_checked() -> None:
    model = Function(lambda s, x, y: s.layer(x) + y[:, ::2], layer=nn.Linear(4, 4))
    tokens = Dim("tokens", min=2, max=8)
    inputs = torch.randn(1, 3, 4), torch.randn(1, 6, 4)
    captured = capture(model, inputs, dynamic_shapes={"inputs": ({1: tokens}, {1: 2 * tokens})})
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(*inputs)
    reference = cq.integer_reference(convert_pt2e(prepared))
    assert reference(torch.randn(1, 5, 4), torch.randn(1, 10, 4)).shape == (1, 5, 4)
    with pytest.raises(cq.InputError, match=r"dim 1 of input 1 is 8, and has to be 10: .* = 5$"):
        reference(torch.randn(1, 5, 4), torch.randn(1, 8, 4))
