"""Rewrites before lowering: exact, complete, named in their errors, traceable to their op."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from support.exact import with_dyadic_scales
from support.graphs import (
    Function,
    calls,
    canonicalize,
    capture,
    differences,
    lowered_exactly,
    quantized,
)
from support.models import convert
from support.registry import Surrounded
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels, passes
from custom_quantizer.backends.xnnpack.grouped_convs import join_factor, joined
from custom_quantizer.backends.xnnpack.passes import (
    PASSES,
    STAGES,
    GraphPass,
    ordered,
    origin_of,
    run_passes,
)
from custom_quantizer.backends.xnnpack.passes._pass import Builder
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    is_constant,
    is_dequantize,
    is_quantize,
    tensor_meta,
)
from custom_quantizer.errors import LoweringError
from custom_quantizer.ops import REGISTRY
from custom_quantizer.reference.converted import read_converted

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)
BY_NAME = {graph_pass.name: graph_pass for graph_pass in PASSES}


class Cases(nn.Module):
    """All cases of a family side by side, where they are quantized."""

    def __init__(self, family: str) -> None:
        super().__init__()
        rule = next(rule for rule in REGISTRY if rule.family == family)
        # A view whose contiguous is dropped runs again after reshapes_to_views (tested below).
        cases = [case for case in rule.cases if case.name != "shuffle"]
        self.arity = [len(case.shapes) for case in cases]
        self.shapes = [shape for case in cases for shape in case.shapes]
        self.cases = nn.ModuleList(Surrounded(rule, case) for case in cases)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        feed = iter(inputs)
        outputs = []
        for count, module in zip(self.arity, self.cases, strict=True):
            outputs.append(module(*[next(feed) for _ in range(count)]))
        return outputs


FAMILIES = [rule.family for rule in REGISTRY if rule.cases and rule.integers is not None]
SCHEMES = ("a8w8", "a8w8-per_tensor", "a4w4", "a6w3-per_tensor")
CORPUS = [
    (f, s) for f in FAMILIES for s in SCHEMES if s == "a8w8" or f in ("conv", "linear", "add")
]


@cache
def converted(family: str, scheme: str) -> tuple[GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Cases(family)
    inputs = tuple(torch.randn(shape) for shape in model.shapes)
    return quantized(model, inputs, scheme), inputs


def stepwise(graph: GraphModule, upto: str) -> tuple[GraphModule, GraphModule]:
    """The graph before and after a pass, with all earlier passes applied."""
    before = copy.deepcopy(graph)
    for graph_pass in PASSES:
        if graph_pass.name == upto:
            break
        graph_pass.run(before)
    before.recompile()
    after = copy.deepcopy(before)
    BY_NAME[upto].run(after)
    after.graph.lint()
    after.recompile()
    return before, after


def units(graph: GraphModule, got: Any, want: Any) -> int:
    """Largest difference of two runs in units of the outputs' scales."""
    worst = 0.0
    outputs = pytree.tree_leaves(graph.graph.find_nodes(op="output")[0].args[0])
    for node, a, b in zip(outputs, got, want, strict=True):
        scale = float(node.args[1]) if is_dequantize(node) else 1.0
        worst = max(worst, float((a - b).abs().max()) / scale)
    return round(worst)


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


def test_passes_require_passes_of_their_stage() -> None:
    for stage in STAGES.values():
        names = {graph_pass.name for graph_pass in stage}
        assert [p.name for p in stage if not p.requires <= names] == []
    assert len(BY_NAME) == len(PASSES) == sum(map(len, STAGES.values()))


def test_a_stage_is_in_the_order_of_its_requirements() -> None:
    first, second = PASSES[:2]
    behind = dataclasses.replace(first, requires=frozenset({second.name}))
    assert ordered([behind, second]) == (second, behind)
    assert ordered([second, first]) == (second, first)
    around = dataclasses.replace(second, requires=frozenset({first.name}))
    with pytest.raises(cq.LoweringError, match=f"requires {second.name}, which cannot run before"):
        ordered([behind, around])


def any_order(seed: int) -> list[GraphPass]:
    """All passes, each stage in some order of which no pass complains."""
    generator = random.Random(seed)
    return [
        graph_pass
        for stage in STAGES.values()
        for graph_pass in ordered(generator.sample(stage, len(stage)))
    ]


def rewritten(graph: GraphModule, passes: Iterable[GraphPass]) -> GraphModule:
    copied = copy.deepcopy(graph)
    for graph_pass in passes:
        graph_pass.run(copied)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied


def targets(graph: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def with_more_to_do(graph: GraphModule) -> set[str]:
    """Names of the passes that still change the graph, each by itself."""
    found, copied = set(), copy.deepcopy(graph)
    for graph_pass in PASSES:
        if graph_pass.run(copied):
            found.add(graph_pass.name)
            copied = copy.deepcopy(graph)
    return found


@cache
def in_usual_order(family: str) -> tuple[Counter[str], set[str]]:
    """Ops of the rewritten corpus, and the passes that have more to do there."""
    usual = rewritten(converted(family, "a8w8")[0], PASSES)
    return targets(usual), with_more_to_do(usual)


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_require_is_all_that_their_order_matters_for(family: str, seed: int) -> None:
    """In any order that they allow the result has the same ops, and no pass has more to do."""
    ops, left = in_usual_order(family)
    other = rewritten(converted(family, "a8w8")[0], any_order(seed))
    assert targets(other) == ops
    assert with_more_to_do(other) <= left


# ---------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------


def calls_of(graph: GraphModule) -> list[tuple[Any, ...]]:
    """What the graph computes: in a hundredth of the time that its text takes."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.graph.nodes]


@pytest.mark.parametrize(("family", "scheme"), slow_but(CORPUS[::8], CORPUS))
def test_no_pass_changes_a_value(family: str, scheme: str) -> None:
    """With scales of which every kernel gives the same values: passes choose other kernels."""
    graph, inputs = converted(family, scheme)
    graph = with_dyadic_scales(graph)
    rewritten = copy.deepcopy(graph)
    batches = [inputs, tuple(x * 50.0 for x in inputs)]
    values = [graph(*batch) for batch in batches]
    for graph_pass in PASSES:
        before = calls_of(rewritten)
        if not graph_pass.run(rewritten) and calls_of(rewritten) == before:
            continue
        rewritten.graph.lint()
        rewritten.recompile()
        after = [rewritten(*batch) for batch in batches]
        if graph_pass.exact:
            assert differences(after, values) == [], graph_pass.name
        values = after
    # Also of passes that said that they changed nothing.
    assert differences([rewritten(*batch) for batch in batches], values) == []


@pytest.mark.parametrize(
    ("family", "scheme"), [(f, s) for f, s in CORPUS if "conv" in f or f == "linear"]
)
def test_folded_biases_are_the_integers_times_the_scale_of_the_serializer(
    family: str, scheme: str
) -> None:
    """PyTorch sees a float that differs by its rounding; the serializer sees the same integers."""
    graph, inputs = converted(family, scheme)
    wanted = {op.node.name: op.bias for op in read_converted(graph).integer}
    before, after = stepwise(graph, "fold_bias")
    for target in passes.GEMMS:
        for node in calls(after, target):
            bias = node.args[2] if len(node.args) > 2 else None
            if bias is None:
                continue
            assert is_constant(bias)
            weight, data = cast(Node, node.args[1]), cast(Node, node.args[0])
            scale: Any = weight.args[1]
            if isinstance(scale, Node):
                scale = after.get_buffer(str(scale.target))
            product = scale * float(cast(float, data.args[1]))  # as QuantParams.from_bias does
            folded = after.get_buffer(str(cast(Node, bias).target))
            again = torch.round(folded.double() / torch.as_tensor(product).double())
            assert torch.equal(again.int(), cast(Tensor, wanted[node.name]))
    assert units(before, after(*inputs), before(*inputs)) <= 1


# What these look for is what they leave: they only say it again.
REPEATS = ("reshapes_to_views", "simplify_pools", "weight_containers")


@pytest.mark.parametrize(
    ("family", "scheme"), [(f, s) for f, s in CORPUS if s != "a8w8-per_tensor"]
)
def test_a_pass_has_nothing_left_to_do_after_itself(family: str, scheme: str) -> None:
    graph = copy.deepcopy(converted(family, scheme)[0])
    for graph_pass in PASSES:
        if graph_pass.run(graph) == 0 or graph_pass.name in REPEATS:
            continue
        graph.graph.lint()
        before = str(graph.graph)
        assert graph_pass.run(graph) == 0, graph_pass.name
        assert str(graph.graph) == before, graph_pass.name


def written(model: GraphModule) -> tuple[str, list[Any]]:
    """A graph, and what its nodes are marked as."""
    return str(model.graph), [node.meta.get("custom") for node in model.graph.nodes]


@pytest.mark.parametrize("scheme", ["a8w8", pytest.param("a16w8", marks=pytest.mark.slow)])
def test_a_pass_counts_something_if_and_only_if_it_changes_something(scheme: str) -> None:
    """The report names the passes that did something, by these counts."""
    for family in ("conv", "linear", "add", "select", "adaptive_avg_pool2d", "hardsigmoid"):
        rewritten = copy.deepcopy(converted(family, scheme)[0])
        for graph_pass in PASSES:
            rewritten.graph.eliminate_dead_code()  # what a pass leaves behind counts for nothing
            before = written(rewritten)
            count = graph_pass.run(rewritten)
            rewritten.graph.eliminate_dead_code()
            assert count >= 0
            assert (count > 0) == (written(rewritten) != before), (graph_pass.name, family)


# These rewrite float ops, which no family of the corpus has: tested in tests/ops,
# and in test_lowering_combinations.py.
FLOAT_OPS = {
    "choices_by_extremes",
    "comparisons_in_steps",
    "constants_of_others",
    "drop_broadcasts",
    "exponentials_and_logarithms",
    "gather_rows",
    "group_norms_to_linears",
    "layer_norms_to_linears",
    "logsumexps_to_linears",
    "norms_to_linears",
    "powers_by_squares",
    "quantize_tables",
    "roundings_in_steps",
    "running_sums_in_steps",
    "shield_composites",
    "softmaxes_of_rows",
    "softmaxes_over_last_dim",
    "softplus_steps",
    "tanh_gelus",
    "transcendentals_in_steps",
}


def test_every_pass_works_somewhere_in_the_corpus() -> None:
    found: set[str] = set()
    for family, scheme in CORPUS:
        found |= run_passes(copy.deepcopy(converted(family, scheme)[0])).keys()
    rare = {
        "batch_norms_to_layers",
        "biases_of_each",
        "float_fallbacks",
        "functions_of_sizes",
        "powers_of_sizes",
        "split_sparse_max_pools",
        "thin_strided_convs",
        "emulate_wide",
        "quantize_pads",
        "keep_convs_float",
        "quantize_scalars_as_rows",
        "quotients_in_steps",
        "refused_to_float",
        "channel_slices_to_convs",
        "expands_to_biases",
        "keep_apart",
        "merge_activations",
        "ops_of_few_dims",
        "permutes_of_few_dims",
        "tell_copies_apart",
        "rescale_behind_moves",
        "break_chains",
        "dedicate_run_time",
        "dedicate_signal_weights",
        "continue_cats",
        "dequantize_late",
        "flatten_rows",
        "order_images",
        "pad_images",
        *FLOAT_OPS,
    }
    assert found | rare == set(BY_NAME)


class Masked(nn.Module):
    """A mask, which the graph reads first, in scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((32, 32), -100.0).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-2, -1) + cast(Tensor, self.mask)
        return cast(Tensor, scores.softmax(-1) @ x)


def test_a_constant_is_dequantized_where_a_sum_reads_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 8)
    lowered = cq.lower(quantized(Masked(), (x,)), (x,))
    assert lowered.report.passes["dequantize_late"] == 1
    (delegate,) = lowered.contents.delegates
    (at,) = (i for i, op in enumerate(delegate.ops) if op.kind == "add")
    before = delegate.ops[at - 1]
    assert before.kind == "convert"
    assert delegate.tensors[before.inputs[0]].shape == (32, 32)
    assert delegate.tensors[before.inputs[0]].dtype == "int8"


# ---------------------------------------------------------------------------------------------
# What holds after all of them
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "scheme"), CORPUS)
def test_after_all_passes(family: str, scheme: str) -> None:
    graph, _ = converted(family, scheme)
    code, rewritten = graph.code, copy.deepcopy(graph)
    applied = run_passes(rewritten)
    assert graph.code == code
    assert all(count > 0 for count in applied.values())
    assert applied.keys() <= BY_NAME.keys()
    ops = {op.node.name for op in read_converted(graph)}
    ops |= {op.output_node.name for op in read_converted(graph).integer}
    ops |= {node.name for node in graph.graph.nodes if is_quantize(node)}
    forbidden = {
        aten.dropout.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.unbind.int,
        aten.select.int,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.relu6.default,
        aten.clamp.default,
    }
    for node in rewritten.graph.nodes:
        assert node.target not in forbidden, node.name
        if is_dequantize(node):
            assert len(node.users) == 1, f"{node.name} has several uses"
        elif node.op == "call_function" and not is_quantize(node):
            for origin in (origin_of(node) or "").split(","):
                assert origin in ops, f"{node.name} stands for no op"
    for target in passes.GEMMS:
        for node in calls(rewritten, target):
            weight = tensor_meta(cast(Node, node.args[1]))
            assert weight is not None
            assert weight.dtype is torch.float32, "what dequantizing gives"
            for bias in node.args[2:3]:
                assert bias is None or is_constant(bias)
    for node in filter(is_dequantize, rewritten.graph.nodes):
        if is_constant(node.args[0]):
            integers = rewritten.get_buffer(str(node.args[0].target))
            low, high = node.args[-3:-1]
            assert low <= int(integers.min()) <= int(integers.max()) <= high, node.name


# ---------------------------------------------------------------------------------------------
# Rewrites that the registry's cases do not reach
# ---------------------------------------------------------------------------------------------


def applied_to(
    function: Callable[..., Any],
    shape: tuple[int, ...] = IMAGE,
    leave: str | None = None,
    **children: nn.Module,
) -> tuple[GraphModule, dict[str, int]]:
    """Passes applied to a function, which must not change what it computes."""
    x = torch.randn(shape)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    if leave is not None:
        quantizer.set_node_name(leave, None)
    graph = quantized(Function(function, **children), (x,), quantizer)
    rewritten = copy.deepcopy(graph)
    applied = run_passes(rewritten)
    got, want = (pytree.tree_leaves(g(x)) for g in (rewritten, graph))
    assert units(graph, got, want) <= 1
    return rewritten, applied


@pytest.mark.parametrize("stride", [3, (2, 3), (3, 2)])
def test_a_max_pool_that_skips_rows_is_dense_first(stride: Any) -> None:
    graph, applied = applied_to(lambda s, x: F.max_pool2d(x + x, 2, stride))
    assert applied["split_sparse_max_pools"] == 1
    assert applied["strided_slices_to_convs"] == 1
    (pool,) = calls(graph, aten.max_pool2d.default)
    assert pool.args[2] == [1, 1]


@pytest.mark.parametrize(("kernel", "stride"), [(2, 3), (1, 2), ((3, 1), (1, 2))])
def test_a_max_pool_of_floats_that_skips_rows_is_in_the_delegate(kernel: Any, stride: Any) -> None:
    x = torch.randn(IMAGE)
    model = Function(lambda s, x: F.max_pool2d(s.conv(x), kernel, stride), conv=nn.Conv2d(4, 4, 1))
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("max_pool2d", None)
    program = lowered_exactly(quantized(model.eval(), (x,), quantizer), (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())


@pytest.mark.parametrize(
    "slices", [(slice(None, None, 2),) * 2, (slice(1, None, 3), slice(None, -1, 2))]
)
def test_a_strided_slice_of_an_image_is_a_convolution(slices: tuple[slice, slice]) -> None:
    graph, applied = applied_to(lambda s, x: (x + x)[:, :, slices[0], slices[1]] + 1.0)
    assert applied["strided_slices_to_convs"] >= 1
    for conv in calls(graph, aten.conv2d.default):
        stored = cast(Node, cast(Node, conv.args[1]).args[0])
        weight = graph.get_buffer(str(stored.target))
        assert weight.dtype is torch.int8
        assert bool((weight == 1).all())
        assert conv.args[6] == 4


def test_a_strided_slice_of_channels_stays_a_slice() -> None:
    _, applied = applied_to(lambda s, x: (x + x)[:, ::2] * 2.0)
    assert "strided_slices_to_convs" not in applied


def test_a_pad_of_integers_that_stays_float_is_quantized_at_once() -> None:
    graph, applied = applied_to(lambda s, x: F.pad(x + x, (1, 1)), leave="pad")
    assert applied["quantize_pads"] == 1
    (pad,) = (n for n in graph.graph.nodes if "pad" in str(n.target))
    assert all(is_quantize(user) for user in pad.users)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [(), (0, 3)])
def test_chains_of_all_lengths_can_be_loaded(dynamic: tuple[int, ...]) -> None:
    """XNNPACK aborts the process when it loads a chain of exactly 10 ops; a tanh takes 3."""

    def chains(_self: Function, x: Tensor) -> list[Tensor]:
        ends = []
        for functions, clamps in itertools.product(range(4), range(4)):
            y = x + x
            for i in range(functions):
                y = (torch.tanh, F.silu)[i % 2](y)
            for i in range(clamps):
                y = F.hardtanh(y, -0.7 + 0.1 * i, 0.8)
            ends.append(y[:, :1] + 1.0)
        return ends

    x = torch.randn(2, *IMAGE[1:])
    sizes = {dim: torch.export.Dim(f"d{dim}", min=1, max=8) for dim in dynamic}
    captured = convert(Function(chains), (x,), dynamic_shapes=((sizes,),)).graph
    assert run_passes(copy.deepcopy(captured))["break_chains"] > 0
    program = cq.lower(captured, (x,))
    assert differences(program.run(x), cq.integer_reference(captured)(x)) == []


HALF, EYE = torch.tensor([0.5]), torch.eye(6)


def _repeated(function: Callable[..., Tensor], times: int) -> Callable[..., Tensor]:
    """Integers, a function over and over, integers."""

    def repeated(_self: Function, x: Tensor) -> Tensor:
        x = on(x)
        for _ in range(times):
            x = function(x)
        return on(x)

    return repeated


@pytest.mark.parametrize(
    ("function", "times", "count"),
    [
        (torch.sin, 7, 0),
        (torch.sin, 8, 1),
        (torch.sin, 18, 1),
        (torch.sin, 40, 0),  # no integers where XNNPACK cuts it
        (lambda x: on(torch.sin(x)), 2, 0),
        (lambda x: on(torch.sin(x)), 3, 1),
        (lambda x: on(torch.sin(x)), 6, 2),
        (lambda x: on(F.relu(x)), 3, 1),
        (lambda x: on(x + x), 3, 1),
        (lambda x: on(x * 0.5), 3, 1),
        (lambda x: on(x * HALF), 3, 1),
        (lambda x: on(torch.sin(x)).permute(0, 1, 3, 2), 4, 0),
        (lambda x: F.max_pool2d(on(torch.sin(x)), 1), 4, 0),
        (lambda x: on(torch.sin(x)) @ EYE, 4, 0),
    ],
)
def test_which_chains_are_broken(function: Callable[..., Tensor], times: int, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    graph = capture(Function(_repeated(function, times)), (x,))
    rewritten, found = after("break_chains", graph)
    assert found == count
    assert differences(rewritten(x), graph(x)) == []


def test_a_pad_by_another_value_is_not_rounded_to_the_grid() -> None:
    """The value may lie outside of what the integers can hold."""
    x = torch.rand(IMAGE)
    graph = quantized(Function(lambda s, x: F.pad(x + x, (1, 1), value=-7.0)), (x,))
    rewritten = copy.deepcopy(graph)
    assert "quantize_pads" not in run_passes(rewritten)
    assert differences(rewritten(x), graph(x)) == []
    assert float(rewritten(x).min()) == -7.0


def test_a_gemm_with_a_computed_bias_has_a_float_weight() -> None:
    graph, applied = applied_to(
        lambda s, x: F.linear(x, s.layer.weight, s.layer.bias * x[0]), (3, 4), layer=nn.Linear(4, 4)
    )
    assert applied["float_fallbacks"] == 1
    (linear,) = calls(graph, aten.linear.default)
    assert is_constant(linear.args[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (x + x).permute(0, 2, 3, 1).contiguous().view(2, -1),
        lambda s, x: (x + x).view(2, 2, 2, 6, 6).transpose(1, 2).contiguous().view(IMAGE),
        lambda s, x: torch.sin(x + x).permute(0, 2, 3, 1).contiguous().view(2, -1),
        lambda s, x: (x + x).transpose(2, 3).reshape(2, -1),
        lambda s, x: (x + x).permute(1, 0, 2, 3).flatten(1),
    ],
)
def test_a_view_needs_no_contiguous_before_it(function: Callable[..., Any]) -> None:
    graph, _ = applied_to(function)
    assert calls(graph, aten.contiguous.default) == []
    assert calls(graph, aten.view.default) == []


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions_of_signals_share_weights(kind: Any) -> None:
    """A layer that is called twice, and a parameter that two layers have."""

    def forward(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.layer(x) + s.layer(x * 0.5) + s.other(x))

    layer, other = kind(4, 4, 3), kind(4, 4, 3)
    other.weight = layer.weight
    model, x = Function(forward, layer=layer, other=other), torch.randn(1, 4, 12)
    report = lowered_exactly(quantized(model, (x,)), (x,)).report
    assert report.delegates == 1
    assert report.passes["dedicate_signal_weights"] == 2


def test_two_uses_of_a_tensor_have_a_dequantize_node_each() -> None:
    graph, applied = applied_to(lambda s, x: (lambda h: (h * h, torch.cat([h, h, h], 1), h))(x + x))
    assert applied["dedicate_dequantize"] >= 2
    for node in graph.graph.nodes:
        assert not is_dequantize(node) or len(node.users) == 1
    (cat,) = calls(graph, aten.cat.default)
    assert len(set(cast(Any, cat.args[0]))) == 3


@pytest.mark.parametrize(
    ("activation", "target"),
    [
        (lambda x: x.clamp(min=0.0), aten.relu.default),
        (lambda x: x.clamp(min=0.1), aten.hardtanh.default),
        (lambda x: x.clamp(max=0.4), aten.hardtanh.default),
        (F.relu6, aten.hardtanh.default),
        (lambda x: x.clamp(-1, 1), aten.hardtanh.default),
    ],
)
def test_clamps_become_what_xnnpack_fuses(activation: Any, target: Any) -> None:
    graph, _ = applied_to(lambda s, x: activation(s.conv(x)), conv=nn.Conv2d(4, 4, 3))
    assert len(calls(graph, target)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_clamp_to_another_scale_is_not_fused(dynamic: bool) -> None:
    """XNNPACK would fuse it into what makes its input, and forget the scale between them."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        pooled = F.relu(F.max_pool2d(x, 2))
        after_conv = F.relu(F.max_pool2d(s.conv(x), 2))
        return pooled, after_conv, F.relu(s.conv(x)), F.relu(s.linear(x))

    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(aten.relu.default, "a8w8-percentile90")
    model = Function(forward, conv=nn.Conv2d(4, 4, 3), linear=nn.Linear(6, 5))
    inputs = (torch.randn(IMAGE) * 4,)
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", min=6, max=16)}
    sizes = sizes if dynamic else {}
    graph = convert(model, inputs, quantizer, dynamic_shapes=((sizes,),)).graph
    lowered = lowered_exactly(graph, inputs)
    assert lowered.report.passes["keep_apart"] == 4
    assert lowered.report.fully_delegated
    assert {op.backend for op in lowered.report.ops} == {kernels.INT8}


def test_memory_that_is_written_stays_a_view() -> None:
    """A copy in place of a view would lose the write."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(x)
        h.flatten(1)[:, ::3].mul_(2.0)  # which is written in place
        h.clone()[0].add_(1.0)
        return h, x + x

    x = torch.randn(IMAGE)
    graph = quantized(Function(forward), (x,))
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    assert differences(rewritten(x), graph(x)) == []
    assert len(calls(rewritten, aten.flatten.using_ints)) == 1


def test_dynamic_sizes_survive() -> None:
    batch = torch.export.Dim("batch", max=8)
    model = Function(
        lambda s, x: s.conv(x).mean((2, 3)).view(x.shape[0], 2, 2).transpose(1, 2).flatten(1),
        conv=nn.Conv2d(4, 4, 3),
    )
    x = torch.randn(IMAGE)
    prepared = prepare_pt2e(
        capture(model, (x,), dynamic_shapes=(({0: batch},),)),
        cq.IntegerQuantizer().set_global("a8w8"),
    )
    prepared(x)
    graph = convert_pt2e(prepared)
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    for size in (2, 5, 8):
        given = torch.randn(size, *IMAGE[1:])
        assert units(graph, [rewritten(given)], [graph(given)]) <= 1


# ---------------------------------------------------------------------------------------------
# One pass on a graph with quantize and dequantize nodes written by hand
# ---------------------------------------------------------------------------------------------

Grid = tuple[float, int, int, int, torch.dtype]
INT8: Grid = (0.0625, 3, -128, 127, torch.int8)
COARSE: Grid = (0.15625, -7, -128, 127, torch.int8)
INT16: Grid = (0.001, 0, -32768, 32767, torch.int16)


def on(x: Tensor, grid: Grid = INT8) -> Tensor:
    """What is left of ``x`` on a grid of integers."""
    return cast(Tensor, DEQUANTIZE_PER_TENSOR(QUANTIZE_PER_TENSOR(x, *grid), *grid))


def after(name: str, graph: GraphModule) -> tuple[GraphModule, int]:
    """A copy of the graph after one pass, and how many places that changed."""
    rewritten = copy.deepcopy(graph)
    count = BY_NAME[name].run(rewritten)
    rewritten.graph.lint()
    rewritten.recompile()
    return rewritten, count


@pytest.mark.parametrize(
    ("name", "function", "shape", "count"),
    [
        ("drop_identities", lambda s, x: on(on(x)), IMAGE, 1),
        ("drop_identities", lambda s, x: on(on(x), COARSE), IMAGE, 0),
        # No convolution takes a slice of a float tensor, nor one of five dimensions.
        ("strided_slices_to_views", lambda s, x: torch.sin(x)[:, :, ::2, ::3], IMAGE, 2),
        ("strided_slices_to_views", lambda s, x: on(on(x)[:, :, ::2]), IMAGE, 0),
        ("strided_slices_to_views", lambda s, x: on(on(x)[:, :, ::2]), (*IMAGE, 2), 1),
        # What no step divides is taken out of groups, in float too; whole numbers are no floats.
        ("strided_slices_to_groups", lambda s, x: torch.sin(x)[:, 3::3, ::4], (2, 7, 6), 2),
        ("strided_slices_to_groups", lambda s, x: on(on(x)[..., 1::4]), (2, 7, 6), 1),
        ("strided_slices_to_groups", lambda s, x: x.to(torch.int64)[:, ::2], (2, 7), 0),
        # A float op that reads a softmax sees no rounding that another one asks for.
        (
            "softmaxes_of_rows",
            lambda s, x: (lambda y: (on(y), y + 1.0))(torch.sin(x).softmax(-1)),
            IMAGE,
            1,
        ),
        # Sizes of 1 are not unknown ones.
        (
            "keep_apart",
            lambda s, x: on(F.relu(on(F.max_pool2d(on(x), 2))), COARSE),
            (1, 1, 6, 6),
            1,
        ),
        ("tell_copies_apart", lambda s, x: torch.cat([y := torch.sin(x), y]), (1, 1, 4), 1),
        ("tell_copies_apart", lambda s, x: torch.cat([y := on(x), y]), (1, 1, 4), 0),
        # Without the expand the difference would read integers, and be taken for one of them.
        ("drop_broadcasts", lambda s, x: on(on(x[:1]).expand(3, 5) - on(x)), (3, 5), 0),
        ("drop_broadcasts", lambda s, x: on(on(on(x[:1]).expand(3, 5)) - on(x)), (3, 5), 1),
        ("drop_broadcasts", lambda s, x: on(on(on(x[0]).expand(3, 5)) - on(x)), (3, 5), 0),
        (
            "drop_broadcasts",
            lambda s, x: (lambda y: (on(y - on(x)), y))(on(on(x[:1]).expand(3, 5))),
            (3, 5),
            0,
        ),
        (
            "merge_moves",
            lambda s, x: (lambda y: (aten.view_copy.default(y, (6, 4)), torch.sin(y)))(
                aten.view_copy.default(x, (3, 1, 2, 4)).permute(2, 1, 0, 3)
            ),
            (6, 4),
            0,
        ),
    ],
)
def test_what_a_pass_takes_and_what_it_leaves(
    name: str, function: Callable[..., Any], shape: tuple[int, ...], count: int
) -> None:
    x = torch.randn(shape)
    graph = capture(Function(function), (x,))
    rewritten, found = after(name, graph)
    assert found == count
    assert differences(rewritten(x), graph(x)) == []


@pytest.mark.parametrize(
    ("function", "step"),
    [
        (lambda s, x: F.silu(torch.sin(x)), 1e-6),
        (lambda s, x: on(F.silu(on(x)), INT16), INT16[0]),
        (lambda s, x: on(F.silu(on(x, INT16))), INT8[0]),
    ],
)
def test_a_silu_in_float_is_a_product_in_float(function: Callable[..., Any], step: float) -> None:
    """For a silu that is left, ExecuTorch would trace the whole graph again."""
    x = torch.randn(IMAGE)
    graph = capture(Function(function), (x,))
    rewritten, found = after("silu_products", graph)
    assert found == 1
    assert not calls(rewritten, aten.silu.default)
    steps = [len([n for n in g.graph.nodes if is_quantize(n)]) for g in (graph, rewritten)]
    assert steps[0] == steps[1]
    # PyTorch's kernel divides: last bits differ, or a step that is rounded to.
    torch.testing.assert_close(rewritten(x), graph(x), rtol=1e-6, atol=1.001 * step)


@pytest.mark.parametrize(
    ("name", "function", "count"),
    [
        ("tell_copies_apart", lambda s, x: torch.cat([y := torch.sin(x), y]), 0),
        ("keep_apart", lambda s, x: on(F.relu(on(F.max_pool2d(on(x), 2))), COARSE), 1),
        ("break_chains", _repeated(lambda x: on(torch.sin(x)), 4), 1),
        ("break_chains", _repeated(torch.sin, 8), 1),
        ("means_keep_dims", lambda s, x: x.mean((2, 3)), 1),
    ],
)
def test_two_sizes_that_are_not_known(name: str, function: Callable[..., Any], count: int) -> None:
    """A view takes one: a pass that would need one of more leaves the op as it is, or moves it."""
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", min=4, max=16)}
    graph = capture(
        Function(function), (torch.randn(IMAGE),), dynamic_shapes=(({0: sizes[0], 2: sizes[2]},),)
    )
    rewritten, found = after(name, graph)
    assert found == count
    for shape in (IMAGE, (5, 4, 8, 6)):
        x = torch.randn(shape)
        assert differences(rewritten(x), graph(x)) == []


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: aten.reshape.default(x, (2, 24, 6)),
    "flatten": lambda x: aten.view_copy.default(x, (2, -1)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "slice": lambda x: x[:, :, 1:5],
    "cat": lambda x: torch.cat([x, on(x[:, :1])], 1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_moved_to_another_scale_is_moved_first(name: str) -> None:
    """XNNPACK refuses a move whose result has another scale; between two of one it has a kernel."""

    def moved(_self: Function, x: Tensor) -> list[Tensor]:
        x = on(x)
        other = MOVES[name](x)
        return [on(other, COARSE), torch.sin(other), on(MOVES[name](x))]

    x = torch.randn(IMAGE)
    graph = capture(Function(moved), (x,))
    rewritten, count = after("rescale_behind_moves", graph)
    assert count == 1
    assert differences(rewritten(x), graph(x)) == []
    program = cq.lower(graph, (x,))
    assert program.report.delegates == 1
    assert differences(program.run(x)[::2], graph(x)[::2]) == []


def dense(s: Any, x: Tensor) -> Tensor:
    """As in a DenseNet: each layer reads all that was computed before."""
    features = [x]
    for layer in s.layers:
        features.append(layer(torch.cat(features, 1)))
    return torch.cat(features, 1)


def pieces(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, :, i % 4 : i % 4 + 1] for i in range(23)], 2) * 0.5


def repeated(s: Any, x: Tensor) -> Tensor:
    return (x + x)[:, :1].expand(-1, 200, -1, -1) * 0.5


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("function", "most"),
    [(dense, 4.4), (pieces, 2), (repeated, 2.2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_joined_tensors_are_copied_few_times(
    function: Callable[..., Any], most: float, dynamic: bool
) -> None:
    """All copies of a program next to its result: by fives and fours they are many more."""
    x = torch.randn(2, 2, 4, 5)
    sizes = (({0: torch.export.Dim("n", max=8)},),) if dynamic else None
    layers = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for width in range(1, 8))
    graph = convert(Function(function, layers=layers), (x,), dynamic_shapes=sizes).graph
    program = cq.lower(graph, (x,))
    (delegate,) = program.contents.delegates
    cats = [op for op in delegate.ops if op.kind.startswith("concatenate")]
    made = [math.prod(delegate.tensors[op.outputs[0]].shape) for op in cats]
    assert sum(made) <= most * max(made)
    assert differences(program.run(x), cq.integer_reference(graph)(x)) == []


def moved(s: Any, x: Tensor) -> Tensor:
    y = F.interpolate(F.relu(x), scale_factor=2)
    y = torch.cat([y.transpose(1, 2), y.transpose(1, 2)], 1)
    return F.max_pool2d(F.pad(y, (1, 1)), 2).flatten(1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("scheme", "target"),
    slow_but(
        [("a16w8", aten.floor.default)],
        [("a16w8", aten.floor.default), ("a4w4", aten.hardtanh.default)],
    ),
)
def test_what_only_moves_is_not_rounded_again(scheme: str, target: Any, dynamic: bool) -> None:
    """Of other widths than 8 bits, the input and what a function gives are put on a grid."""
    x = torch.randn(2, 3, 4, 5)
    sizes = (({0: torch.export.Dim("n", max=8)},),) if dynamic else None
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    graph = convert(Function(moved), (x,), quantizer, dynamic_shapes=sizes).graph
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    assert len(calls(rewritten, target)) == 2
    assert differences(cq.lower(graph, (x,)).run(x), cq.integer_reference(graph)(x)) == []


def test_joined_tensors_of_different_scales_stay_float() -> None:
    x = torch.randn(IMAGE)
    graph = capture(
        Function(lambda s, x: on(torch.cat([on(x), on(torch.sin(x), COARSE)], 1), COARSE)), (x,)
    )
    rewritten, count = after("rescale_behind_moves", graph)
    assert count == 1
    assert differences(rewritten(x), graph(x)) == []
    program = cq.lower(graph, (x,))
    assert program.report.delegates == 1
    assert differences(program.run(x)[:, :4], graph(x)[:, :4]) == []


def test_a_dense_max_pool_is_on_the_grid_of_its_input() -> None:
    """XNNPACK's kernel copies integers, whatever the scale of the tensor it writes."""
    x = torch.randn(IMAGE)
    graph = capture(Function(lambda s, x: on(F.max_pool2d(on(x), 2, 3), COARSE)), (x,))
    rewritten, count = after("split_sparse_max_pools", graph)
    assert count == 1
    (pool,) = calls(rewritten, aten.max_pool2d.default)
    assert [quantize.args[1:] for quantize in pool.users] == [INT8]
    assert differences(rewritten(x), graph(x)) == []


@pytest.mark.parametrize(("second", "count"), [(INT8, 1), (COARSE, 0)])
def test_a_table_is_quantized_for_readers_of_one_grid(second: Grid, count: int) -> None:
    graph = capture(
        Function(
            lambda s, x: (lambda y: (on(y), on(y, second)))(F.embedding(x, s.table.weight)),
            table=nn.Embedding(7, 5),
        ),
        (torch.tensor([[1, 6], [0, 3]]),),
    )
    rewritten, found = after("quantize_tables", graph)
    assert found == count
    x = torch.arange(7)[:4].reshape(2, 2)
    assert differences(rewritten(x), graph(x)) == []


def test_float_convolutions_are_multiplied_by_one_constant() -> None:
    graph = capture(
        Function(
            lambda s, x: (on(s.a(on(x))), on(s.b(on(x)))),
            a=nn.Conv1d(4, 4, 3),
            b=nn.Conv1d(4, 4, 3),
        ),
        (x := torch.randn(2, 4, 9),),
    )
    rewritten, count = after("keep_convs_float", graph)
    products = calls(rewritten, aten.mul.Tensor)
    assert count == len(products) == 4
    assert len({product.args[1] for product in products}) == 1
    assert differences(rewritten(x), graph(x)) == []


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def test_a_pass_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_model: GraphModule) -> int:
        raise IndexError("no such argument")

    broken = tuple(
        dataclasses.replace(p, run=fails) if p.name == "splits_to_slices" else p for p in PASSES
    )
    monkeypatch.setattr(passes, "PASSES", broken)
    graph, _ = converted("split", "a8w8")
    with pytest.raises(
        LoweringError,
        match=r"pass splits_to_slices \(splits\) failed: IndexError: no such argument",
    ):
        run_passes(copy.deepcopy(graph))


OF_SIZES: tuple[Callable[[Tensor, Any], Tensor], ...] = (
    lambda x, n: aten.elu.default(x, n / 16, 1.5, n / 8),
    lambda x, n: F.celu(x, n / 8),
    lambda x, n: F.leaky_relu(x, n / 40),
    lambda x, n: F.softplus(x, n - 6.5),
    lambda x, n: F.hardtanh(x, -n / 4, n / 8),
    lambda x, n: x.clamp(1 - n / 4, n / 8),
    lambda x, n: x.clamp(max=n / 10),
    lambda x, n: torch.clamp_min(x, n / 30),
    lambda x, n: torch.clamp_max(x, n / 30),
)


def test_numbers_that_are_dynamic_sizes_are_read_as_tensors() -> None:
    def function(s: Any, x: Tensor) -> list[Tensor]:
        return [f(x, x.shape[0]) for f in OF_SIZES]

    x = torch.linspace(-3, 3, 48).reshape(6, 8)
    shapes = (({0: torch.export.Dim("batch", min=2, max=9)},),)
    graph = capture(Function(function), (x,), dynamic_shapes=shapes)
    written = copy.deepcopy(graph)
    assert BY_NAME["functions_of_sizes"].run(written) == len(OF_SIZES)
    written.recompile()
    for batch in (x, x[1:3], torch.cat([x, x[:3] * 100])):
        for got, want in zip(written(batch), graph(batch), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-7, atol=2e-7)


POWERS: tuple[Callable[[Tensor, Any], Tensor], ...] = (
    lambda x, n: x * n**0.5,
    lambda x, n: x / torch.sym_sqrt(n),
    lambda x, n: x * n**3 + 2**n,
    lambda x, n: (1 / n**0.5 + 2) - x,
    lambda x, n: x.mean() * (n * 3) ** -1.5,
    lambda x, n: x.clamp(max=n**0.5 / 5),
    lambda x, n: x[: (n - 1) ** 2],
    lambda x, n: (x.abs() + 0.1) ** (n**0.5 / 5),
)


def test_powers_of_dynamic_sizes_are_exact() -> None:
    """Those that a program has no numbers for are tensors, as exact as numbers in Python."""

    def function(s: Any, x: Tensor) -> list[Tensor]:
        return [f(x, x.shape[0]) for f in POWERS]

    x = torch.randn(6, 8)
    shapes = (({0: torch.export.Dim("batch", min=3, max=9)},),)
    graph = capture(Function(function), (x,), dynamic_shapes=shapes)
    written, _ = after("functions_of_sizes", graph)
    assert BY_NAME["powers_of_sizes"].run(written) == 9
    assert not {operator.pow, torch.sym_sqrt} & {node.target for node in written.graph.nodes}
    written.recompile()
    for batch in (x, x[1:4], torch.cat([x, x[:3] * 100])):
        *got, raised = written(batch)
        *want, expected = graph(batch)
        assert all(map(torch.equal, got, want))
        # PyTorch's power of a tensor with a number is another function than that of two tensors.
        torch.testing.assert_close(raised, expected, rtol=2e-7, atol=0)


def test_powers_of_dynamic_sizes_that_no_tensor_stands_for_are_named() -> None:
    shapes = (({0: torch.export.Dim("batch", max=9)},),)
    model = Function(lambda _self, x: x * torch.full((8,), x.shape[0] ** 0.5))
    graph = capture(model, (torch.randn(6, 8),), dynamic_shapes=shapes)
    with pytest.raises(LoweringError, match=r"pow_1 is a number made .* lacks where full reads it"):
        after("powers_of_sizes", graph)


@pytest.mark.parametrize("number", [0.3, -6.2831855])
def test_remainders_and_rounded_quotients_are_exact(number: float) -> None:
    """Of what lies between multiples, on them and next to them."""

    def function(_self: Any, a: Tensor, c: Tensor, b: Tensor) -> list[Tensor]:
        modes = (aten.fmod, aten.remainder, aten.floor_divide)
        return [mode(value, by) for mode in modes for value, by in ((a, number), (c, b))]

    def near_multiples(unit: Tensor) -> Tensor:
        between = counts * unit
        values = torch.cat([between, torch.round(counts) * unit, counts / 2**22 * unit])
        values = torch.cat([values, torch.nextafter(values, torch.zeros(()))])
        return torch.cat([values, -values])

    counts = torch.exp2(torch.rand(3000) * 21.9)
    units = torch.exp2(torch.rand(3000) * 40 - 20) * number
    inputs = (near_multiples(torch.tensor(number)), near_multiples(units), units.repeat(12))
    graph = capture(Function(function), inputs)
    want = graph(*inputs)
    assert BY_NAME["quotients_in_steps"].run(graph) == 6
    graph.recompile()
    assert differences(graph(*inputs), want) == []


MASKS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: x * (x > 0.2),
    lambda x, y: x * (x < -0.2) + (x >= 0.2),
    lambda x, y: (x <= 0.2).float(),
    lambda x, y: (x == 0.2).float() - (x != 0).float(),
    lambda x, y: x * ((x > -1) & (x < 1)) * ((x > y) | ~(x >= 3)),
    lambda x, y: y * torch.logical_xor(x <= y, x < 0.0)[:, None].flatten(1),
    lambda x, y: (x == y).float() * (x != y),
    lambda x, y: F.softshrink(x),
    lambda x, y: F.softshrink(x, 0.2),
    lambda x, y: F.hardshrink(x),
    lambda x, y: F.hardshrink(x, 0.2),
    lambda x, y: F.threshold(x, 0.2, 0.0),
    lambda x, y: F.threshold(x, 0.2, -20.3),
)


def test_comparisons_that_are_read_as_numbers_are_steps_of_float() -> None:
    """Next to numbers that are compared with, too."""

    def function(_self: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        return [mask(x, y) for mask in MASKS]

    x = torch.tensor([0.0, 0.2, -0.2, 0.5, -0.5, 1.0, 2.0**-26, 3e38]).repeat(6, 1)
    x[1:3] = torch.nextafter(x[1:3], torch.tensor([[-3e38], [3e38]]))
    x[3:] = torch.randn(3, 8)
    y = torch.where(torch.rand(6, 8) < 0.5, x, -x)
    graph = canonicalize(capture(Function(function), (x, y)))
    rewritten, count = after("comparisons_in_steps", graph)
    assert count == 17
    rewritten.graph.eliminate_dead_code()
    kept = {node.target for node in rewritten.graph.nodes if node.op == "call_function"}
    assert not {aten.to.dtype, aten.gt.Scalar, aten.__and__.Tensor} & kept
    for got, want in zip(rewritten(x, y), graph(x, y), strict=True):
        assert torch.equal(got, want)


CHOSEN: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda x, y, m: torch.where(x > 0, x, 0.1 * (x.exp() - 2)),
    lambda x, y, m: torch.where(x > 0, F.relu(x).log(), y),
    lambda x, y, m: torch.where(m, x, 1 / y),
    lambda x, y, m: torch.where(m & (x < y), y.exp(), -y.exp()),
    lambda x, y, m: torch.where(KEPT, x.exp(), -math.inf),
    lambda x, y, m: torch.where(x[:, :1] > 0, y[0], -math.inf),
    lambda x, y, m: torch.where(x > y, -math.inf, math.inf),
    lambda x, y, m: torch.where(x > y, 1e9, y),
    lambda x, y, m: x.masked_fill(~KEPT, -math.inf).amax(1, keepdim=True),
)
KEPT = torch.arange(8) % 3 > 0


def test_where_is_an_extreme_of_extremes() -> None:
    """Of infinities, too, and with the sign of zeros."""
    inputs = torch.tensor([0.0, -0.0, 90.0, -90.0, 1.0, 3e38, -3e38, math.inf]).repeat(6, 1)
    inputs = torch.cat([inputs, torch.randn(3, 8)])
    x, y = inputs, inputs.flip(0)[:, torch.randperm(8)]
    given = (x, y, torch.rand(9, 8) > 0.5)
    function = Function(lambda _s, *args: [choose(*args) for choose in CHOSEN])
    graph = canonicalize(capture(function, given))
    rewritten, count = after("choices_by_extremes", graph)
    assert count == len(CHOSEN)
    rewritten.graph.eliminate_dead_code()
    assert not calls(rewritten, aten.where.self)
    for got, want, model in zip(rewritten(*given), graph(*given), function(*given), strict=True):
        assert torch.equal(want.view(torch.int32), model.view(torch.int32))
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize(
    "choose",
    [
        lambda x, y: torch.where(x > -1, x.log(), y),
        lambda x, y: torch.where(x > 0, x, x / y),
        lambda x, y: torch.where(y > 0, y, x.exp() * y),
        lambda x, y: torch.where(x < 0, y, x.exp() - y.exp()),
        lambda x, y: torch.where(x > 0, y, x.sqrt()),
        lambda x, y: torch.where(x.isnan(), y, x.exp()),
        lambda x, y: torch.where(x == x, x.exp(), y),
        lambda x, y: torch.where(x > 0, math.nan, y),
        lambda x, y: torch.where(x > 0, x.round(), y),  # of no family
    ],
)
def test_where_of_what_may_be_nan_stays(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    function = Function(lambda _s, *args: choose(*args))
    graph = canonicalize(capture(function, (torch.randn(4), torch.randn(4))))
    assert after("choices_by_extremes", graph)[1] == 0


def test_integers_are_compared_with_small_numbers_as_float() -> None:
    """Rounded to float32 they are above, below or equal to these as they were."""
    most = 2**24 - 1

    def function(_self: Any, i: Tensor, x: Tensor) -> list[Tensor]:
        conditions = (i == 3, i != 0, (i > most) & (i < 2**40), (i >= most) | ~(i <= -most), i > i)
        return [x * condition for condition in conditions]

    near = [*range(-2, 5), *range(2**24 - 3, 2**24 + 4), 2**40, 2**62, 2**63 - 1]
    inputs = torch.tensor([*near, *(-n for n in near)]), torch.ones(2 * len(near))
    graph = canonicalize(capture(Function(function), inputs))
    rewritten, count = after("comparisons_in_steps", graph)
    assert count == 3  # a larger number, and integers with each other, are compared as they are
    for got, want in zip(rewritten(*inputs), graph(*inputs), strict=True):
        assert torch.equal(got, want)


def test_clamps_of_integers_stay() -> None:
    function = Function(lambda _s, i: [i.clamp(min=1), i.clamp(0, 3), i.relu()])
    graph = canonicalize(capture(function, (torch.arange(4),)))
    assert after("clamps_to_hardtanh", graph)[1] == 0


def test_what_asks_whether_values_are_numbers_is_compared() -> None:
    ends = torch.tensor([1.0, math.inf, 2.0])
    function = Function(lambda _s, x: x * (x == x) + (x > 1e-37) + (x < math.inf) + (x == ends))
    graph = canonicalize(capture(function, (torch.randn(3),)))
    assert after("comparisons_in_steps", graph)[1] == 0


def test_passes_say_what_they_look_for_and_what_they_leave() -> None:
    assert len(BY_NAME) == len(PASSES)
    for graph_pass in PASSES:
        assert graph_pass.before
        assert graph_pass.after
    inexact = {
        "batch_norms_to_layers",
        "emulate_wide",
        "exponentials_and_logarithms",
        "functions_of_sizes",
        "group_norms_to_linears",
        "layer_norms_to_linears",
        "logsumexps_to_linears",
        "norms_to_linears",
        "plain_elus",
        "powers_by_squares",
        "running_sums_in_steps",
        "silu_products",
        "softmaxes_over_last_dim",
        "softplus_steps",
        "tie_break_offsets",
        "tanh_gelus",
        "transcendentals_in_steps",
    }
    assert {p.name for p in PASSES if not p.exact} == inexact


# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "weight", "factor"),
    [
        (1, (8, 3, 3, 3), 1),
        (16, (16, 1, 3, 3), 1),  # a depthwise kernel exists
        (16, (16, 1, 5, 5), 1),
        (96, (96, 1, 7, 7), 8),
        (96, (96, 1, 31), 8),
        (16, (32, 1, 3, 3), 8),  # two outputs a channel: no depthwise kernel
        (6, (6, 1, 7, 7), 6),
        (31, (31, 1, 7, 7), 1),  # 31 channels have no blocks of up to 16
        (32, (128, 4, 3, 3), 2),
        (32, (256, 8, 3, 3), 1),
        (4, (64, 16, 3, 3), 1),
    ],
)
def test_as_many_groups_are_joined_as_fill_a_product(
    groups: int, weight: tuple[int, ...], factor: int
) -> None:
    assert join_factor(groups, weight) == factor


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_joined_groups_give_the_same_sums(
    data: st.DataObject, blocks: int, outputs: int, inputs: int, factor: int
) -> None:
    groups = blocks * factor
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randint(-128, 128, (groups * outputs, inputs, 3, 2), generator=generator)
    x = torch.randint(-255, 256, (1, groups * inputs, 4, 5), generator=generator).double()
    wide = joined(weight, groups, factor)
    assert wide.shape == (groups * outputs, factor * inputs, 3, 2)
    want = F.conv2d(x, weight.double(), groups=groups)
    assert torch.equal(F.conv2d(x, wide.double(), groups=blocks), want)


@pytest.mark.parametrize(
    "scheme",
    slow_but(["a8w8", "a6w8"], ["a8w8", "a8w8-per_tensor", "a8w4", "a6w8", "a8w8-bias16"]),
)
def test_wide_depthwise_convolutions_are_exact(scheme: str) -> None:
    x = torch.randn(1, 12, 9, 8)
    model = Function(
        lambda s, x: (s.a(x), s.b(x), s.c(x.flatten(2)), s.d(x)),
        a=nn.Conv2d(12, 12, 7, padding=3, groups=12),
        b=nn.Conv2d(12, 24, 3, 2, 1, dilation=2, groups=12, bias=False),
        c=nn.Conv1d(12, 12, 27, padding=13, groups=12),
        d=nn.Conv2d(12, 9, (6, 5), groups=3),
    )
    lowered = lowered_exactly(quantized(model, (x,), scheme), (x,))
    assert lowered.report.passes["join_narrow_groups"] == 4
    assert lowered.report.fully_delegated
    assert {row.backend for row in lowered.report.ops} <= {
        kernels.INT8,
        kernels.INT8_CONTAINER,
        kernels.FOLDED,
    }


def test_a_weight_between_channels_that_do_not_meet_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(weight: Tensor, groups: int, factor: int) -> Tensor:
        wide = joined(weight, groups, factor)
        wide[0, 1, 0, 0] = 3
        return wide

    x = torch.randn(1, 8, 8, 8)
    graph = quantized(Function(lambda s, x: s.a(x), a=nn.Conv2d(8, 8, 7, groups=8)), (x,))
    monkeypatch.setattr(passes.gemm, "joined", wrong)
    with pytest.raises(cq.VerificationError, match=r"conv2d \(a\): weight: 1 of 3136 integers"):
        cq.lower(graph, (x,))


def test_what_is_made_of_a_folded_constant_has_a_shape() -> None:
    """``convert_pt2e`` records none for the constants it folds: a decoder's learned queries."""

    def function(self: Any, x: Tensor) -> Tensor:
        return torch.relu(x) + self.layer.weight

    model = capture(Function(function, layer=nn.Linear(3, 4, bias=False)), (torch.randn(4, 3),))
    (weight,) = (n for n in model.graph.nodes if n.op == "get_attr")
    (add,) = calls(model, aten.add.Tensor)
    recorded = weight.meta.pop("val")
    moved = Builder(model, add).call(aten.permute.default, weight, [1, 0])
    assert moved.meta["val"].fake_mode is recorded.fake_mode
    assert tensor_meta(moved).shape == (3, 4)


def test_a_row_that_only_the_inputs_tell_stays_selected() -> None:
    """Where it is, counted from the end or not, nobody knows before."""
    table = torch.randn(5, 4)

    def forward(s: Any, x: Tensor, i: Tensor) -> Tensor:
        return s.layer(x) + table[i.item()]

    inputs = (torch.randn(2, 4), torch.tensor(-2))
    graph = quantized(Function(forward, layer=nn.Linear(4, 4)), inputs)
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    assert len(calls(rewritten, torch.ops.aten.select.int)) == 1
    assert differences(rewritten(*inputs), graph(*inputs)) == []


def test_what_changes_nothing_in_the_example_may_change_other_sizes() -> None:
    """Slices that end where the example ends, of any batch and of a table."""
    table = torch.randn(9, 4)

    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = s.layer(x)
        return h[:3] * 2.0, h + table[: x.shape[1]]

    sizes = {0: torch.export.Dim("n", min=3, max=8), 1: torch.export.Dim("m", min=2, max=9)}
    model, x = Function(forward, layer=nn.Linear(4, 4)), torch.randn(3, 3, 4)
    prepared = prepare_pt2e(
        capture(model, (x,), dynamic_shapes=((sizes,),)), cq.IntegerQuantizer().set_global("a8w8")
    )
    prepared(x)
    graph = convert_pt2e(prepared)
    rewritten = copy.deepcopy(graph)
    run_passes(rewritten)
    for shape in ((3, 3, 4), (5, 9, 4)):
        x = torch.randn(shape)
        got, want = rewritten(x), graph(x)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) < 0.1
