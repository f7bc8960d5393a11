"""Attention: products and softmax, from the captured graph to the runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.contracts import FloatContract, IntegerContract
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.passes import PASSES
from custom_quantizer.core.graph import is_constant, is_dequantize, is_quantize
from custom_quantizer.ops import match_of
from custom_quantizer.ops.rewrites.masks import MASKED

aten = torch.ops.aten
PASS = {graph_pass.name: graph_pass for graph_pass in PASSES}

# ---------------------------------------------------------------------------------------------
# Written out before annotation
# ---------------------------------------------------------------------------------------------

Q, K = (2, 3, 5, 8), (2, 3, 7, 8)
SDPA = F.scaled_dot_product_attention


def written_out(
    function: Callable[..., Any], *shapes: tuple[int, ...], **children: nn.Module
) -> GraphModule:
    """The canonical graph, which computes what the captured one does, up to float rounding."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    model = Function(function, **children).eval()
    graph = canonicalize(capture(model, inputs))
    graph.graph.lint()
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    return graph


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.arange(35).reshape(5, 7) % 3 > 0)
        self.register_buffer("bias", torch.randn(5, 7))
        self.register_buffer("drop", torch.where(self.keep, 0.0, -math.inf))


@pytest.mark.parametrize(
    ("function", "elementwise"),
    [
        (lambda s, q, k, v: SDPA(q, k, v), [aten.mul.Tensor]),
        (lambda s, q, k, v: SDPA(q, k, v, scale=1.0), []),
        (lambda s, q, k, v: SDPA(q, k, v, scale=0.3), [aten.mul.Tensor]),
        (lambda s, q, k, v: SDPA(q, k, v, is_causal=True), [aten.mul.Tensor, aten.add.Tensor]),
        (lambda s, q, k, v: SDPA(q, k, v, s.m.bias), [aten.mul.Tensor, aten.add.Tensor]),
        (lambda s, q, k, v: SDPA(q, k, v, s.m.keep), [aten.mul.Tensor, aten.add.Tensor]),
        (lambda s, q, k, v: SDPA(q, k, v, s.m.drop), [aten.mul.Tensor, aten.add.Tensor]),
        (
            lambda s, q, k, v: ((q @ k.transpose(-2, -1)) + s.m.drop).softmax(-1) @ v,
            [aten.add.Tensor],
        ),
    ],
)
def test_attention_is_two_products_and_a_softmax(
    function: Callable[..., Any], elementwise: list[Any]
) -> None:
    graph = written_out(function, Q, K, K, m=Masks())
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [
        aten.transpose.int,
        aten.matmul.default,
        *elementwise,
        aten.softmax.int,
        aten.matmul.default,
    ]
    for node in graph.graph.nodes:
        if is_constant(node):
            assert torch.isfinite(graph.get_buffer(str(node.target))).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (5, 1)])
def test_rows_that_attend_to_nothing_are_zero(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    keep = torch.rand(shape) > 0.3
    keep[..., 0, :], keep[..., 3, :] = False, True
    child = nn.Module()
    child.register_buffer("mask", keep if kind is torch.bool else keep.float().log())
    graph = written_out(lambda s, q, k, v: SDPA(q, k, v, s.child.mask), Q, K, K, child=child)
    assert torch.equal(
        graph(torch.randn(Q), torch.randn(K), torch.randn(K))[:, :, 0], torch.zeros(2, 3, 8)
    )


def test_a_mask_that_is_an_input_is_added() -> None:
    model = Function(lambda s, q, k, v, mask: SDPA(q, k, v, mask))
    mask = torch.arange(35).reshape(5, 7) % 3 > 0
    inputs = (torch.randn(Q), torch.randn(K), torch.randn(K))
    for given in (mask, torch.where(mask, 0.5, -math.inf)):
        graph = canonicalize(capture(model, (*inputs, given)))
        assert not calls(graph, aten.scaled_dot_product_attention.default)
        torch.testing.assert_close(graph(*inputs, given), model(*inputs, given))


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_heads_may_share_keys_and_values(heads: int) -> None:
    def function(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, is_causal=True, enable_gqa=True)

    graph = written_out(function, (2, 6, 5, 8), (2, heads, 7, 8), (2, heads, 7, 4))
    left = [n for n in graph.graph.nodes if n.op == "call_function" and match_of(n) is None]
    assert left == []


def test_attention_with_dropout_is_left_alone() -> None:
    model = Function(lambda s, q, k, v: SDPA(q, k, v, dropout_p=0.5))
    graph = canonicalize(capture(model, (torch.randn(Q), torch.randn(K), torch.randn(K))))
    assert calls(graph, aten.scaled_dot_product_attention.default)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bgid,bgjd->bgij", Q, K),
        ("bgij,bgjd->bgid", (2, 3, 5, 7), K),
        ("b h i d, b h j d -> b i h j", Q, K),
        ("ij,jk", (5, 7), (7, 8)),
        ("ijk,lkj->il", (5, 3, 4), (6, 4, 3)),
        ("bij,bjk->kbi", (2, 5, 7), (2, 7, 8)),
    ],
)
def test_einsum_of_two_tensors_is_one_product(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    graph = written_out(lambda s, a, b: torch.einsum(equation, a, b), left, right)
    assert not calls(graph, aten.einsum.default)
    assert len(calls(graph, aten.matmul.default)) == 1


CHUNKS = ((2, 3, 4, 2, 5), (2, 3, 4, 2, 5), (2, 2, 3, 4, 4), (2, 3, 4, 2, 6))


@pytest.mark.parametrize(
    ("equation", "shapes", "products"),
    [
        ("ij,ik->j", ((5, 3), (5, 4)), [aten.matmul.default]),
        ("bi,bj->bij", ((2, 5), (2, 7)), [aten.mul.Tensor]),
        ("bi,bi->ib", ((2, 5), (2, 5)), [aten.mul.Tensor]),
        ("bi,bjk->kb", ((2, 5), (2, 4, 7)), [aten.mul.Tensor]),
        ("bi,bi,bj->bj", ((2, 5), (2, 5), (2, 7)), [aten.matmul.default, aten.mul.Tensor]),
        ("ii,ij->j", ((5, 5), (5, 4)), [aten.matmul.default]),
        ("...i,ij->...j", ((2, 5), (5, 4)), [aten.matmul.default]),
        ("a...d,a...d", ((2, 3, 5), (2, 3, 5)), [aten.matmul.default]),
        ("ij->ji", ((5, 3),), []),
        ("bijji->bi", ((2, 3, 4, 4, 3),), []),
        ("i...", ((3, 2, 4),), []),
        (
            "bclhn,bcshn,bhcls,bcshp->bclhp",
            CHUNKS,
            [aten.matmul.default, aten.mul.Tensor, aten.matmul.default],
        ),
    ],
)
def test_other_einsums_are_contractions_and_products(
    equation: str, shapes: tuple[tuple[int, ...], ...], products: list[Any]
) -> None:
    graph = written_out(lambda s, *tensors: torch.einsum(equation, *tensors), *shapes)
    assert not calls(graph, aten.einsum.default)
    kinds = (aten.matmul.default, aten.mul.Tensor)
    assert [n.target for n in graph.graph.nodes if n.target in kinds] == products


def test_an_einsum_of_chunks_is_one_delegate() -> None:
    """ExecuTorch alone writes it with tensors of more dims than XNNPACK has."""
    inputs = tuple(torch.randn(shape) for shape in CHUNKS)
    model = Function(lambda s, *tensors: torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", *tensors))
    lowered = lowered_exactly(quantized(model, inputs), inputs)
    assert lowered.report.delegates == 1
    assert lowered.report.outside == ()


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x @ s.layer.weight,
        lambda s, x: torch.mm(x, s.layer.weight.exp()),
        lambda s, x: torch.addmm(s.layer.bias, x, s.layer.weight),
    ],
)
def test_a_product_with_a_constant_is_a_linear_layer(function: Callable[..., Any]) -> None:
    graph = written_out(function, (3, 4), layer=nn.Linear(4, 4))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [aten.linear.default]


def test_sums_and_products() -> None:
    graph = written_out(torch_baddbmm, (2, 3, 5), (2, 3, 4), (2, 4, 5))
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [aten.matmul.default, aten.add.Tensor]


def torch_baddbmm(_self: Any, added: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(added, a, b)


@pytest.mark.parametrize(
    ("function", "gone", "left"),
    [
        (lambda s, x: x.clamp(1.0, -0.5), None, aten.clamp.default),
        (lambda s, x: x.clamp(min=0.3, max=0.2) + x.clamp(-1, 1), None, aten.clamp.default),
        (lambda s, x: F.pad(x, (-1, -2)), aten.pad.default, aten.slice.Tensor),
        (lambda s, x: F.pad(x, (-1, 2, 1, -2)), aten.pad.default, aten.constant_pad_nd.default),
        (lambda s, x: F.pad(x, (0, -1), value=3.0), aten.pad.default, aten.slice.Tensor),
        (
            lambda s, x: F.pad(x, (1, -1), value=float("-inf")),
            aten.pad.default,
            aten.constant_pad_nd.default,
        ),
        (
            lambda s, x: F.pad(x, (1, -1), value=3.0),
            aten.pad.default,
            aten.constant_pad_nd.default,
        ),
        (lambda s, x: x.T, aten.numpy_T.default, aten.permute.default),
        (lambda s, x: x.mH, aten.mH.default, aten.transpose.int),
        (lambda s, x: F.rrelu(x), aten.rrelu.default, aten.leaky_relu.default),
        (lambda s, x: torch.sort(x)[0], aten.sort.default, aten.topk.default),
        (lambda s, x: torch.sort(x, 0, True).values, aten.sort.default, aten.topk.default),
        (
            lambda s, x: torch.sort(x, stable=True, dim=0)[0],
            aten.sort.stable,
            aten.topk.default,
        ),
        (lambda s, x: torch.sort(x).indices, aten.sort.default, aten.topk.default),
    ],
)
def test_the_same_values_under_another_name(
    function: Callable[..., Any], gone: Any, left: Any
) -> None:
    x = torch.randn(6, 7)
    graph = canonicalize(capture(Function(function), (x,)))
    assert not calls(graph, gone)
    assert calls(graph, left)
    for given in (x, x.round(), torch.full((6, 7), 2.0)):
        assert torch.equal(graph(given), function(None, given))


def test_a_pad_by_nothing_does_not_alias_what_is_written_later() -> None:
    def function(_self: Any, x: Tensor) -> Tensor:
        y = F.pad(x, (0, 0))
        y.add_(1)
        return x * y

    written_out(function, (3, 4))


# ---------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention with one projection for all three, and a mask."""

    def __init__(self, unsigned: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.unsigned = unsigned
        self.register_buffer("mask", torch.where(torch.eye(5) > 0, 0.0, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.unsigned:
            k, v = torch.relu(k), torch.relu(v)
        scores = (q @ k.transpose(-2, -1)) * 0.5 + self.mask
        return cast(Tensor, scores.softmax(-1) @ v)


def test_the_projection_of_a_second_operand_has_zero_point_zero() -> None:
    converted = convert(Heads(), (torch.randn(2, 5, 8),))
    graph = converted.graph
    for node in calls(graph, aten.matmul.default):
        right = cast(Node, node.args[1])
        assert is_dequantize(right)
        assert right.args[2] == 0
    (linear,) = calls(graph, aten.linear.default)
    (stored,) = linear.users
    assert is_quantize(stored)
    assert stored.args[2] == 0
    # Nothing is requantized on the way: all moves share the scale of the projection.
    scales = {n.args[1] for n in graph.graph.nodes if is_quantize(n) and n.args[2] == 0}
    assert scales == {stored.args[1]}


def test_an_unsigned_second_operand_is_requantized() -> None:
    converted = convert(Heads(unsigned=True), (torch.randn(2, 5, 8),))
    products, relus = (
        calls(converted.graph, target) for target in (aten.matmul.default, aten.relu.default)
    )
    assert products
    assert relus
    for node in products:
        assert cast(Node, node.args[1]).args[2] == 0
    for node in relus:
        (stored,) = node.users
        assert stored.args[2] == -128, "the range of a relu is not halved"


def test_scores_stay_in_float_unless_asked_for() -> None:
    plan = convert(Heads(), (torch.randn(2, 5, 8),)).plan
    for name in ("mul", "add"):
        assert plan.op(name).scheme is None
        assert "only float ops read its result" in plan.op(name).reason
    assert plan.op("softmax").scheme is None
    assert "no integer softmax" in plan.op("softmax").reason
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("mul", "a8w8")
    assert convert(Heads(), (torch.randn(2, 5, 8),), quantizer).plan.op("mul").scheme == "a8w8"


def test_a_residual_between_layer_norms_stays_in_float() -> None:
    """The first sum is read by a norm and by the second sum, that one by a norm alone."""

    def function(s: Any, x: Tensor) -> Tensor:
        first = x + s.a(s.norm(x))
        return cast(Tensor, s.c(s.norm(first + s.b(s.norm(first)))))

    layers = {name: nn.Linear(8, 8) for name in "abc"}
    model = Function(function, norm=nn.LayerNorm(8), **layers)
    plan = convert(model, (torch.randn(2, 5, 8),)).plan
    assert [op.scheme for op in plan.ops if op.family == "add"] == [None, None]
    assert [op.scheme for op in plan.ops if op.family == "linear"] == ["a8w8"] * 3


def test_a_sum_that_integers_read_stays_integer() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return (lambda y: s.norm(y) + s.layer(y))(x + s.layer(x))

    model = Function(function, norm=nn.LayerNorm(8), layer=nn.Linear(8, 8))
    plan = convert(model, (torch.randn(2, 5, 8),)).plan
    assert plan.op("add").scheme == "a8w8"


def test_a_rule_for_attention_reaches_what_it_is_written_out_to() -> None:
    model = Function(lambda s, q, k, v: SDPA(s.layer(q), k, v), layer=nn.Linear(8, 8))
    inputs = tuple(torch.randn(shape) for shape in (Q, K, K))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(aten.scaled_dot_product_attention.default, None)
    plan = convert(model, inputs, quantizer).plan
    assert [op.scheme for op in plan.parts if op.family == "matmul"] == [None, None]
    assert plan.op("linear").scheme == "a8w8"


def test_products_of_other_shapes_say_why_they_stay_in_float() -> None:
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, None)
    cases: tuple[tuple[Callable[..., Any], tuple[tuple[int, ...], ...], Any, str], ...] = (
        (torch.matmul, ((2, 3, 4), (4,)), sizes, "is a vector"),
        (torch.matmul, ((2, 3, 4, 4), (4, 5)), sizes, "batch dimensions of its operands differ"),
        (lambda x, y: x @ x + y, ((4, 4), (4, 4)), None, "the same tensor"),
    )
    for function, shapes, dynamic, reason in cases:
        model = Function(lambda s, a, b, f=function: (f(a, b), s.layer(a)), layer=nn.Linear(4, 2))
        inputs = tuple(torch.randn(shape) for shape in shapes)
        plan = convert(model, inputs, dynamic_shapes=dynamic and (dynamic,)).plan
        (op,) = (op for op in plan.ops if op.family == "matmul")
        assert op.scheme is None
        assert reason in op.reason


# ---------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape", "left", "exact"),
    [
        (lambda s, x: s.norm(x), (2, 3, 4, 6), "layer_norms_to_linears", False),
        (lambda s, x: F.rms_norm(x, (4, 6)), (2, 3, 4, 6), "layer_norms_to_linears", False),
        (lambda s, x: F.group_norm(x, 2), (2, 4, 6, 5), "group_norms_to_linears", False),
        (lambda s, x: F.instance_norm(x), (2, 4, 6, 5), "group_norms_to_linears", False),
        (lambda s, x: torch.linalg.vector_norm(x, dim=-1), (2, 5, 6), "norms_to_linears", False),
        (lambda s, x: x.softmax(1), (2, 5, 6), "softmaxes_over_last_dim", False),
        (lambda s, x: torch.sin(x).softmax(-1), (2, 3, 4, 6), "softmaxes_of_rows", True),
        (lambda s, x: x.softmax(-1), (2, 1, 2, 1, 3, 2, 4), "ops_of_few_dims", True),
        (lambda s, x: x / x[:1].expand(2, 5, 6), (2, 5, 6), "drop_broadcasts", True),
    ],
)
def test_float_ops_are_rewritten_once(
    function: Callable[..., Any], shape: tuple[int, ...], left: str, exact: bool
) -> None:
    torch.manual_seed(0)
    graph_pass = PASS[left]
    assert graph_pass.exact is exact
    x = torch.rand(shape) + 0.5
    graph = capture(Function(function, norm=nn.LayerNorm([4, 6])), (x,))
    want = graph(x)
    assert graph_pass.run(graph) == 1
    graph.graph.lint()
    graph.recompile()
    if exact:
        assert torch.equal(graph(x), want)
    else:
        torch.testing.assert_close(graph(x), want, rtol=2e-6, atol=2e-6)
    assert graph_pass.run(graph) == 0


def test_a_softmax_over_more_dims_than_the_delegate_has() -> None:
    def function(s: Function, x: Tensor) -> Tensor:
        scores = s.first(x).reshape(1, 2, 1, 2, 1, 3, 4)
        return cast(Tensor, s.last(scores.softmax(-1).reshape(12, 4)))

    model, x = Function(function, first=nn.Linear(8, 4), last=nn.Linear(4, 2)), torch.randn(12, 8)
    assert lowered_exactly(quantized(model, (x,)), (x,), []).report.fully_delegated


@pytest.mark.parametrize(
    "between", [lambda y: y * 0.5, lambda y: y / 2.0, lambda y: y.permute(0, 2, 1, 3)]
)
def test_a_softmax_of_scores_stays_as_it_is(between: Callable[[Tensor], Tensor]) -> None:
    """What comes out of a view is not kept channels last."""
    x = torch.randn(6, 4, 4)
    graph = capture(Function(lambda s, x: between(x.view(2, 3, 4, 4)).softmax(-1)), (x,))
    assert PASS["softmaxes_of_rows"].run(graph) == 0


def test_an_expand_that_gives_the_shape_stays() -> None:
    x = torch.randn(1, 5)
    graph = capture(Function(lambda s, x: x.expand(3, 5) * x), (x,))
    assert PASS["drop_broadcasts"].run(graph) == 0


def test_an_expand_that_one_reader_needs_stays() -> None:
    x, y = torch.randn(1, 5), torch.randn(3, 5)
    graph = capture(Function(lambda s, x, y: ((e := x.expand(3, 5)) * y, e.flatten())), (x, y))
    assert PASS["drop_broadcasts"].run(graph) == 0


# ---------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts with zeros
    return model


def swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as s

    options: dict[str, Any] = {}
    if version == 2:
        options = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2}
    return s.SwinTransformer([4, 4], 32, [2, 2], [2, 2], [4, 4], num_classes=10, **options)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(blocks, layer_scale=0.5, num_classes=10)


def maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 8, [16, 32], [1, 1], 2, 0.0, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64), (8, 2, 32)),
    "encoder_layer_norm_first": (
        lambda: nn.TransformerEncoderLayer(
            32, 4, 64, norm_first=True, activation="gelu", batch_first=True
        ),
        (2, 8, 32),
    ),
    "multihead_attention": (
        lambda: Function(lambda s, x: s.m(x, x, x), m=nn.MultiheadAttention(32, 4)),
        (8, 2, 32),
    ),
    "vit": (vision_transformer, (2, 3, 32, 32)),
    "swin": (lambda: swin(1), (2, 3, 64, 64)),
    "swin_v2": (lambda: swin(2), (2, 3, 64, 64)),
    "convnext": (convnext, (2, 3, 32, 32)),
    "maxvit": (maxvit, (1, 3, 64, 64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_is_one_delegate_near_the_reference(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    batches = [(torch.randn(shape),) for _ in range(4)]
    converted = convert(model, batches[0], calibration=batches)
    program = cq.lower(converted.graph, batches[0])
    assert program.report.fully_delegated, str(program.report)
    linears = [op for op in program.report.ops if op.family in ("linear", "matmul")]
    assert {op.backend for op in linears} == {kernels.INT8}
    reference = cq.integer_reference(converted.graph)
    for given in batches:
        got, want = pytree.tree_leaves(program.run(*given)), pytree.tree_leaves(reference(*given))
        real = pytree.tree_leaves(model(*given))
        for a, b, c in zip(got, want, real, strict=True):
            # Float steps differ in last bits, which a rounding behind them turns into a unit.
            assert float((a - b).square().mean()) <= 1e-3 * float(c.square().mean())
            assert float((b - c).square().mean()) <= 0.05 * float(c.square().mean())


def test_masked_scores_vanish_in_the_runtime() -> None:
    """XNNPACK's softmax gives exactly 0 for what a mask leaves out."""
    torch.manual_seed(0)
    model = Function(lambda s, q, k, v: SDPA(q, k, v, is_causal=True))
    shapes = ((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    inputs = tuple(torch.randn(shape) for shape in shapes)
    converted = convert(model, inputs)
    program = cq.lower(converted.graph, inputs)
    assert program.report.fully_delegated
    later = [tensor.clone() for tensor in inputs]
    later[1][:, :, 1:], later[2][:, :, 1:] = 3.0, -3.0
    # The first row sees the first key only, whatever the others are.
    assert torch.equal(program.run(*later)[:, :, 0], program.run(*inputs)[:, :, 0])
    assert torch.exp(torch.tensor(MASKED + 1e4)) == 0.0


class TestContract(IntegerContract):
    families = ("matmul",)


class TestFloatContract(FloatContract):
    families = ("softmax", "log_softmax")


@pytest.mark.parametrize(("scheme", "units"), slow_but([("a8w8", 0)], [("a8w8", 0), ("a16w8", 1)]))
def test_a_product_over_two_sizes_that_are_not_known_stays_whole(scheme: str, units: int) -> None:
    sizes = {dim: torch.export.Dim(f"size{dim}", min=2, max=9) for dim in (0, 1)}
    model = Function(lambda s, a, b: torch.matmul(a + a, b + b) * 1.5)
    inputs = (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 7))
    done = convert(model, inputs, scheme, dynamic_shapes=((sizes, sizes),))
    assert done.plan.op("matmul").scheme == scheme
    program = cq.lower(done.graph, inputs)
    assert (program.report.delegates, program.report.outside) == (1, ())
    counts = ((2, 8), (9, 2), (4, 5))
    batches = [(torch.randn(*n, 5, 8), torch.randn(*n, 8, 7)) for n in counts]
    (output,) = cq.verify(done.graph, program, batches).outputs
    assert (output.max_lsb or 0.0) <= units
