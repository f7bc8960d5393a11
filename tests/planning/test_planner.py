"""The plan: what shares parameters, what is fused, which rule wins, and why."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import Function, canonicalize, capture, quantized
from support.models import conv, convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.config.rules import Config, Rule, Scope
from custom_quantizer.core.graph import constant_of, is_dequantize
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import ConfigError
from custom_quantizer.ops import Formats, OpRule, PatternMatch, rule_of
from custom_quantizer.ops.backend import INTEGERS, Kernel
from custom_quantizer.planning.plan import Edge, Plan
from custom_quantizer.planning.planner import make_plan

IMAGE = (2, 4, 6, 6)
A8W8 = scheme("a8w8")


def plan_of(
    function: Callable[..., Any],
    *rules: Rule,
    shapes: Iterable[tuple[int, ...]] = (IMAGE,),
    **children: nn.Module,
) -> Plan:
    inputs = tuple(torch.randn(shape) for shape in shapes)
    graph = canonicalize(capture(Function(function, **children), inputs))
    return make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8), *rules]), BACKEND)


def group(plan: Plan, op: str, role: str = "output", tensor: str | None = None) -> int:
    """Group of one tensor of an op."""
    (found,) = {
        t.group
        for t in plan.op(op).tensors
        if t.role == role and (tensor is None or t.tensor == tensor)
    }
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("dims", "ok"),
    [((), True), ((2, 3), True), ((0,), True), ((0, 2, 3), False), ((1, 2, 3), False)],
)
def test_means_of_what_may_grow(dims: tuple[int, ...], ok: bool) -> None:
    """XNNPACK's mean is wrong when the batch or the channels grow, but not the image."""
    sizes = {dim: torch.export.Dim(f"size{dim}", min=2, max=9) for dim in dims}
    model = Function(lambda s, x: (mean := (x + x).mean((2, 3))) @ mean.T)
    graph = capture(model, (torch.randn(IMAGE),), dynamic_shapes=((sizes,),))
    plan = make_plan(canonicalize(graph), Config([Rule(Scope.GLOBAL, "", A8W8)]), BACKEND)
    op = next(op for op in plan.ops if op.family in ("mean", "linear"))
    assert (op.scheme == "a8w8") is ok, op
    if not ok:
        assert "wrong when the batch grows" in op.reason


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"kernel_size": 2}, kernels.INT8),
        ({"kernel_size": 2, "ceil_mode": True}, kernels.INT8),
        ({"kernel_size": 2, "stride": 3}, kernels.INT8),
        ({"kernel_size": 2, "stride": 3, "ceil_mode": True}, kernels.PORTABLE),
        ({"kernel_size": 2, "stride": (2, 3), "ceil_mode": True}, kernels.PORTABLE),
        ({"kernel_size": (3, 2), "stride": (3, 2), "ceil_mode": True}, kernels.INT8),
    ],
)
def test_where_max_pools_run(options: dict[str, Any], backend: Kernel) -> None:
    graph = capture(nn.MaxPool2d(**options), (torch.randn(IMAGE),))
    (node,) = (node for node in graph.graph.nodes if rule_of(node) is not None)
    bound = cast(OpRule, rule_of(node)).match(cast(OpRule, rule_of(node)), node)
    assert BACKEND.predict(cast(PatternMatch, bound), Formats(8)).kernel is backend


@pytest.mark.parametrize(
    ("group_size", "features", "reason"),
    [
        (32, 96, None),
        (96, 96, None),
        (48, 96, "in groups of a multiple of 32"),
        (16, 96, "in groups of a multiple of 32"),
        (64, 96, "its 96 input features do not divide into groups of 64"),
    ],
)
def test_sizes_of_weight_groups(group_size: int, features: int, reason: str | None) -> None:
    rule = Rule(Scope.GLOBAL, "", scheme(f"dyn8w4g{group_size}"))
    graph = canonicalize(capture(nn.Linear(features, 4), (torch.randn(2, features),)))
    (op,) = make_plan(graph, Config([rule]), BACKEND).ops
    assert (op.scheme is not None) is (reason is None)
    assert reason is None or reason in op.reason


@pytest.mark.parametrize(
    ("function", "quantized"),
    [
        (lambda _, x: x.mean(1), False),  # a linear layer over positions, in the graph
        (lambda _, x: x.cumsum(1), False),
        (lambda _, x: x.cumsum(1) * 3, False),  # the number is part of the made-up weight
        (lambda _, x: torch.fft.rfft(x).abs(), False),
        (lambda _, x: torch.fft.irfft(torch.complex(x, x)), False),
        (lambda m, x: x @ m.layer.weight, True),
        (lambda m, x: torch.einsum("bnc,cd->bnd", x, m.layer.weight) / 3, True),
        (lambda m, x: F.linear(x, m.layer.weight.T * 2), True),
    ],
)
def test_only_layers_of_the_model_are_quantized_at_run_time(
    function: Callable[[Any, Tensor], Tensor], quantized: bool
) -> None:
    model = Function(function, layer=nn.Linear(8, 16))
    graph = canonicalize(capture(model, (torch.randn(2, 10, 16),)))
    plan = make_plan(graph, Config([Rule(Scope.GLOBAL, "", scheme("dyn8w8"))]), BACKEND)
    layers = [op for op in plan.parts if "linear" in op.target]
    assert layers
    for op in layers:
        assert (op.scheme is not None) is quantized
        assert quantized or "layers with weights" in op.reason


@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize(
    ("name", "wide"), [("a8w4", "a8w8"), ("a4w2-full", "a4w8-full"), ("a8w16", "a8w16")]
)
def test_weights_that_are_none_of_the_model_have_8_bits(name: str, wide: str, aimed: bool) -> None:
    model = Function(lambda m, x: torch.fft.rfft(m.layer(x)).real.relu(), layer=nn.Linear(16, 16))
    graph = canonicalize(capture(model, (torch.randn(2, 10, 16),)))
    rules = [Rule(Scope.GLOBAL, "", scheme(name))]
    if aimed:
        rules.append(Rule(Scope.NODE_NAME, "fft_rfft", scheme(name)))
    plan = make_plan(graph, Config(rules), BACKEND)
    assert plan.op("linear").scheme == name
    parts = [op for op in plan.parts if op.written == "fft_rfft" and "linear" in op.target]
    assert {op.scheme for op in parts} == {name if aimed else wide}
    told = ["8 bits for a weight that is not one of the model" in op.reason for op in parts]
    assert all(told) if name != wide and not aimed else not any(told)


@pytest.mark.parametrize("function", [lambda m, x: m.layer(x.mean(1)), lambda m, x: x.cumsum(1)])
def test_sums_and_means_lose_nothing_in_few_bits(function: Callable[[Any, Tensor], Tensor]) -> None:
    model = Function(lambda m, x: function(m, x).relu(), layer=nn.Linear(16, 16))
    graph = canonicalize(capture(model, (torch.randn(2, 10, 16),)))
    plan = make_plan(graph, Config([Rule(Scope.GLOBAL, "", scheme("a8w4"))]), BACKEND)
    assert {op.scheme for op in plan.parts if "linear" in op.target} == {"a8w4"}


@pytest.mark.parametrize("name", ["dyn8w8-symmetric", "dyn8w4g32-symmetric"])
def test_activations_have_a_zero_point_at_run_time(name: str) -> None:
    graph = canonicalize(capture(nn.Linear(32, 4), (torch.randn(2, 32),)))
    (op,) = make_plan(graph, Config([Rule(Scope.GLOBAL, "", scheme(name))]), BACKEND).ops
    assert op.scheme is None
    assert "at run time with a zero point only" in op.reason


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        (lambda y: y.clamp(min=1e-6), False),
        (lambda y: y.clamp(1e-6, 1.0), False),
        (F.relu, True),
        (lambda y: y.clamp(min=0.0), True),
        (lambda y: y.clamp(min=-1.0), True),
        (lambda y: y.clamp(max=1.0), True),
    ],
)
@pytest.mark.parametrize(
    "before", [lambda y: y + y, lambda y: torch.tanh(y + y)], ids=["fused", "alone"]
)
def test_bounds_that_keep_divisors_from_zero(
    bound: Callable[[Tensor], Tensor], kept: bool, before: Callable[[Tensor], Tensor]
) -> None:
    """A bound above 0 stays in float; a relu keeps no divisor from 0, and is quantized."""
    plan = plan_of(lambda s, x, y: (x + x) / bound(before(y)) * 2.0, shapes=(IMAGE, IMAGE))
    op = next(op for op in plan.ops if op.fused or op.family in ("relu", "clamp"))
    assert ("keeps a divisor away from zero" in op.reason) is not kept, op
    assert (op.scheme is not None) is kept, op


POLES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "log": (lambda y: torch.log(y.clamp(min=1e-5)), "clamp"),
    "log of a sum": (lambda y: torch.log(y + 1e-6), "add"),
    "log10": (lambda y: torch.log10(y + 1e-6), "add"),
    "log2": (lambda y: torch.log2(y.clamp(min=1e-6)), "clamp"),
    "reciprocal": (lambda y: torch.reciprocal(y + 1e-3), "add"),
    "power": (lambda y: (y + 1e-4) ** -2, "add"),
    "root": (lambda y: (y + 1e-4) ** -0.5, "add"),
    "moved": (lambda y: torch.log((y + 1e-6).permute(0, 2, 3, 1)), "add"),
    "divided by a root": (lambda y: torch.sin(y) / torch.sqrt(y + 1e-6), "add"),
    "log of a quotient": (
        lambda y: torch.log(y.clamp(min=1e-5) / (1 - y).clamp(min=1e-5)),
        "clamp",
    ),
    "log of odds": (lambda y: torch.log((p := y.clamp(1e-3, 1 - 1e-3)) / (1 - p)), "rsub"),
    "log of a rest": (lambda y: torch.log(1 - y.clamp(max=1 - 1e-4)), "rsub"),
    "log of a difference": (lambda y: torch.log(y.clamp(min=2.0001) - 2), "sub"),
}


@pytest.mark.parametrize("name", POLES)
def test_what_keeps_float_ops_from_infinity_stays_in_float(name: str) -> None:
    """The op is in float where its result is: nothing of an infinity would be cut off."""
    function, guard = POLES[name]
    plan = plan_of(lambda s, x: function(F.relu(s.conv(x))), conv=conv())
    (op,) = (op for op in plan.ops if op.node == guard)
    assert op.scheme is None
    assert "away from zero, to which integers would round it" in op.reason
    assert all(op.scheme is None for op in plan.ops if op.family in ("sqrt", "div"))


@pytest.mark.parametrize("name", ["log", "log2", "log of odds", "log of a rest"])
def test_a_layer_is_integer_where_its_clamp_is_float(name: str) -> None:
    function, _ = POLES[name]
    plan = plan_of(lambda s, x: function(s.conv(x)), conv=conv())
    assert (plan.op("conv2d").scheme, plan.op("conv2d").fused) == ("a8w8", None)
    assert "away from zero" in plan.op("clamp").reason


ROOTS: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "rms norm": (
        lambda y: y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6),
        {"pow_1", "mean", "add", "rsqrt"},
    ),
    "row of length one": (
        lambda y: y / (y * y).sum(1, keepdim=True).sqrt(),
        {"mul", "sum_1", "sqrt"},
    ),
    "standard deviation": (
        lambda y: ((y - 1.0) ** 2).mean((2, 3), keepdim=True).sqrt() + y,
        {"pow_1", "mean", "sqrt"},
    ),
    "standard deviation of one call": (
        lambda y: y / (y.std((2, 3), keepdim=True) + 0.1),
        {"std"},
    ),
    "variance of one call": (
        lambda y: y * (y.var(1, keepdim=True) + 1e-6).rsqrt(),
        {"var", "add", "rsqrt"},
    ),
    "generalized mean": (
        lambda y: y + F.avg_pool2d(y.clamp(min=1e-6) ** 3, 6) ** 0.5,
        {"pow_1", "avg_pool2d", "pow_2"},
    ),
    "length of two": (
        lambda y: (y.square() + 0.5 * (y + 1.0).square()).sqrt(),
        {"square", "square_1", "mul", "add_1", "sqrt"},
    ),
}


BESIDE = ("would just round once more", "it divides by a root in float")
"""Why sums and products next to such chains are in float, too."""


@pytest.mark.parametrize("name", ROOTS)
def test_powers_under_a_root_stay_in_float(name: str) -> None:
    """A norm that is written out, as XNNPACK has norms of one call: in float."""
    function, chain = ROOTS[name]
    plan = plan_of(lambda s, x: s.conv(function(s.conv(x))), conv=conv())
    found = {op.node for op in plan.ops if "a power and its root" in op.reason}
    assert found == chain
    assert {op.placement for op in plan.ops if op.node in chain} == {"float inside"}
    others = [op for op in plan.ops if op.node not in {*chain, "div"}]
    integers = [op for op in others if not any(reason in op.reason for reason in BESIDE)]
    assert {op.scheme for op in integers} <= {"a8w8", "a8"}


def test_powers_under_a_root_are_integers_where_a_rule_or_the_hardware_says_so() -> None:
    function, chain = ROOTS["rms norm"]

    def through(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.conv(function(s.conv(x))))

    graph = canonicalize(capture(Function(through, conv=conv()), (torch.randn(IMAGE),)))
    for plan in (
        plan_of(through, Rule(Scope.NODE_NAME, "mean", A8W8), conv=conv()),
        make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS),
    ):
        assert {op.scheme for op in plan.ops if op.node in chain} == {"a8w8"}


def test_powers_that_no_root_is_taken_of_are_integers() -> None:
    plan = plan_of(lambda s, x: s.conv((s.conv(x) ** 2).mean((2, 3), True) + x), conv=conv())
    assert {op.scheme for op in plan.ops} == {"a8w8"}


EXPONENTIALS: dict[str, tuple[Callable[..., Tensor], set[str], str]] = {
    "gaussian": (
        lambda y: torch.exp(-(y**2) / 0.5),
        {"pow_1", "neg", "div", "exp"},
        "a power under an exponential",
    ),
    "spline": (
        lambda y: torch.exp(-(((y.unsqueeze(-1) - torch.linspace(-2, 2, 4)) / 0.6) ** 2)).sum(-1),
        {"sub", "div", "pow_1", "neg", "exp"},
        "a power under an exponential",
    ),
    "gaussian of what others read": (
        lambda y: (lambda z: torch.exp(-(z * z)) + z)(y - 0.3),
        {"mul", "neg", "exp"},
        "a power under an exponential",
    ),
    "logarithm of a sum": (
        lambda y: torch.log(torch.exp(y).sum(1, keepdim=True) + 1.5) * y,
        {"exp", "sum_1", "add", "log"},
        "exponentials or powers and their logarithm",
    ),
    "logarithm of a power": (
        lambda y: torch.log(y**2),
        {"pow_1", "log"},
        "exponentials or powers and their logarithm",
    ),
    "mel filters": (
        lambda y: torch.log(y.pow(2) @ torch.ones(6, 6) + 1.5),
        {"pow_1", "matmul", "add", "log"},
        "exponentials or powers and their logarithm",
    ),
    "gaussian density": (
        lambda y: y / (2 * torch.exp(y) ** 2),
        {"exp", "pow_1", "mul", "div"},
        "that is never zero",
    ),
    "divided by a sum": (
        lambda y: y / (torch.exp(y) + torch.sigmoid(-y)),
        {"exp", "sigmoid", "add", "div"},
        "that is never zero",
    ),
    "logarithm of a rest": (
        lambda y: torch.log(1 - torch.sigmoid(y)),
        {"sigmoid", "rsub", "log"},
        "that is never zero",
    ),
    "divided by an exponential and a guard": (
        lambda y: y / (torch.exp(y) * 0.5 + 1e-6),
        {"exp", "mul"},
        "that is never zero",
    ),
    "linear attention": (
        lambda y: y * torch.reciprocal(F.elu(y) + 1),
        {"elu", "add", "reciprocal"},
        "that is never zero",
    ),
    "opacity": (
        lambda y: 1 - torch.exp(-F.relu(y) * 0.1),
        {"exp", "rsub"},
        "what an exponential lacks of a number",
    ),
    "growth": (
        lambda y: (torch.exp(y) * 0.5 - 0.5) * y,
        {"exp", "mul", "sub"},
        "what an exponential lacks of a number",
    ),
}


@pytest.mark.parametrize("name", slow_but(["linear attention", "opacity"], EXPONENTIALS))
def test_what_is_narrow_only_behind_an_exponential_or_logarithm_stays_in_float(name: str) -> None:
    """Where XNNPACK has either in float only; hardware with tables of integers has them there."""
    function, chain, reason = EXPONENTIALS[name]

    def through(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.conv(function(s.conv(x))))

    plan = plan_of(through, conv=conv())
    assert {op.node for op in plan.ops if reason in op.reason} == chain
    assert {op.placement for op in plan.ops if op.node in chain} == {"float inside"}
    assert {op.scheme for op in plan.ops if op.node not in chain} <= {"a8w8", "a8", None}
    named = "exp" if "exp" in chain else max(chain)
    ordered = plan_of(through, Rule(Scope.NODE_NAME, named, A8W8), conv=conv())
    assert not any(reason in op.reason for op in ordered.ops)
    graph = canonicalize(capture(Function(through, conv=conv()), (torch.randn(IMAGE),)))
    for_integers = make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS)
    assert {op.scheme for op in for_integers.ops if op.node in chain} == {"a8w8"}


def test_a_divisor_that_is_never_close_to_zero_is_an_integer() -> None:
    plan = plan_of(
        lambda s, x: s.conv((y := s.conv(x)) / (0.1 * torch.sigmoid(y) + 1.0)), conv=conv()
    )
    assert {op.scheme for op in plan.ops if op.family in ("sigmoid", "mul", "add")} == {"a8w8"}


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda y, m: y.masked_fill(m == 0, -1e9).amax(2),
    "chosen": lambda y, m: torch.where(m > 0, y, torch.finfo(y.dtype).min).amax((2, 3)),
    "added": lambda y, m: (y + (1.0 - m) * -1e4).amax(2),
    "taken away": lambda y, m: F.relu(y - (1.0 - m) * 1e9),
    "constant": lambda y, m: (y + torch.tensor([0.0, -1e9]).repeat(3)).amax(3),
    "for a minimum": lambda y, m: torch.where(m > 0, y, 1e9).amin(2),
}


@pytest.mark.parametrize("name", MASKS)
def test_numbers_that_stand_for_infinity_have_no_scale(name: str) -> None:
    """All others would be zero on it."""
    torch.manual_seed(0)
    model = Function(lambda s, x, m: MASKS[name](s.conv(x), m) * 2.0, conv=conv())
    data = [(torch.randn(IMAGE), (torch.rand(IMAGE) > 0.3).float()) for _ in range(4)]
    graph = quantized(model, data[0], calibration=data)
    for inputs in data:
        want = model(*inputs)
        masked = want.abs() > 1e3
        # A few steps of what the convolution gives; on the mask's scale all would be zero.
        torch.testing.assert_close(graph(*inputs)[~masked], want[~masked], rtol=0, atol=0.1)


def test_what_a_layer_gives_is_no_mask() -> None:
    plan = plan_of(lambda s, x: s.conv(s.conv(x) * 1e4 + s.conv(x)), conv=conv())
    assert {op.scheme for op in plan.ops} == {"a8w8"}


@pytest.mark.parametrize("shift", [1e5, -1e5])
def test_numbers_of_the_data_have_a_scale(shift: float) -> None:
    plan = plan_of(lambda s, x: s.head((s.conv(x) - shift) * 1e5), conv=conv(), head=conv())
    assert {op.scheme for op in plan.ops} == {"a8w8"}


TOTALS: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "energy": (lambda y: y.flatten(1).sum(1), {"sum_1"}),
    "likelihood": (
        lambda y: ((y - 0.1) * torch.tanh(y)).sum(1, keepdim=True) - 3.0,
        {"sub", "mul", "sum_1", "sub_1"},
    ),
    "coordinate": (
        lambda y: torch.cat([(y * torch.arange(6.0)).sum(d) / 6 - 0.5 for d in (2, 3)], 1),
        {"mul", "sum_1", "div", "sub", "mul_1", "sum_2", "div_1", "sub_1"},
    ),
    "mean of sums": (lambda y: y.sum(1).mean(-1), {"sum_1", "mean"}),
    "mean of tokens": (lambda y: y.flatten(2).transpose(1, 2).mean(1), {"mean"}),
    "scores of items": (
        lambda y: (y.flatten(2) @ torch.tanh(y).flatten(2)[:, 0, :, None]).squeeze(-1) + 0.5,
        {"matmul", "add"},
    ),
    "a row of scores": (lambda y: y[:, 0, :1] @ y[:, 1], {"matmul"}),
}


def test_a_pool_of_any_batch_is_no_total() -> None:
    """It is the integer kernel that it is of one batch, or a layer that computes the same."""
    model = Function(lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 1), conv=conv())
    batch = ({0: torch.export.Dim("batch", min=1, max=9)},)
    exported = torch.export.export(model, (torch.randn(IMAGE),), dynamic_shapes=(batch,))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert [op.scheme for op in plan.ops if op.scheme is None] == []


@pytest.mark.parametrize("name", TOTALS)
def test_totals_that_only_float_outputs_show_stay_in_float(name: str) -> None:
    """And what is behind them, and what is added up, if nothing else reads it."""
    function, chain = TOTALS[name]

    def through(s: Any, x: Tensor) -> Tensor:
        return function(s.conv(x))

    plan = plan_of(through, conv=conv())
    assert {
        op.node for op in plan.ops if "outputs of the model show the total" in op.reason
    } == chain
    assert {op.placement for op in plan.ops if op.node in chain} == {"float inside"}
    assert plan.op("conv2d").scheme == "a8w8"
    graph = canonicalize(capture(Function(through, conv=conv()), (torch.randn(IMAGE),)))
    for_integers = make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS)
    assert {op.scheme for op in for_integers.ops if op.node in chain} == {"a8w8"}


def test_products_of_matrices_and_those_that_a_layer_reads_are_no_totals() -> None:
    plan = plan_of(lambda s, x: (lambda y: y @ y.mT)(s.conv(x)), conv=conv())
    assert plan.op("matmul").scheme == "a8w8"
    plan = plan_of(lambda s, x: (lambda y: s.conv(y @ y[..., :1] + y))(s.conv(x)), conv=conv())
    assert plan.op("matmul").scheme == "a8w8"


class _Scores(nn.Module):
    """Scores of some items for a user, as recommenders return them."""

    def __init__(self, *, shown: bool = False) -> None:
        super().__init__()
        self.items, self.user, self.shown = nn.Embedding(50, 16), nn.Linear(8, 16), shown

    def forward(self, user: Tensor, ids: Tensor) -> Any:
        rows = self.items(ids)
        scores = torch.bmm(rows, self.user(user).unsqueeze(2)).squeeze(-1)
        return (scores, rows) if self.shown else scores


def test_rows_that_a_product_in_float_reads_are_stored_as_integers() -> None:
    """Next to the eight bits of what it is multiplied by, those of a table lose nothing."""
    torch.manual_seed(0)
    batches = [(2 * torch.rand(4, 8) - 1, torch.randint(50, (4, 6))) for _ in range(12)]
    model, (example, *data) = _Scores().eval(), batches
    exported = torch.export.export(model, example)
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert plan.op("bmm").scheme is None
    assert "one scale a row" in plan.op("embedding").reason
    result = cq.quantize(model, example, data[:4], config="a8w8", progress=False)
    for batch in data[4:]:  # of which calibration has not seen the largest
        want, got = model(*batch), result.lowered.run(*batch)
        assert float((got - want).norm() / want.norm()) < 0.1  # 0.23 if scores are integers
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("embedding", None)
    assert "one scale a row" not in quantizer.plan(exported).op("embedding").reason
    exported = torch.export.export(_Scores(shown=True).eval(), example)
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert plan.op("bmm").scheme is None
    assert "one scale a row" not in plan.op("embedding").reason


def test_totals_are_integers_where_a_layer_reads_them_or_a_rule_says_so() -> None:
    def total(s: Any, x: Tensor) -> Tensor:
        return s.conv(x).sum(1, keepdim=True) * 0.5

    for plan in (
        plan_of(lambda s, x: s.conv(x * total(s, x)), conv=conv()),
        plan_of(total, Rule(Scope.NODE_NAME, "mul", A8W8), conv=conv()),
    ):
        assert {op.scheme for op in plan.ops} == {"a8w8"}
    plan = plan_of(total, Rule(Scope.NODE_NAME, "sum_1", A8W8), conv=conv())
    assert plan.op("sum_1").scheme == "a8w8"
    exported = torch.export.export(Function(total, conv=conv()), (torch.randn(IMAGE),))
    plan = cq.IntegerQuantizer().set_global("a8w8").set_io(outputs="a8").plan(exported)
    assert {op.scheme for op in plan.ops} == {"a8w8"}


@pytest.mark.parametrize(
    "total",
    [
        lambda y: torch.einsum("bchw->bc", y),
        lambda y: torch.einsum("bchw,h->bcw", y, torch.full((6,), 1 / 6)),
        lambda y: y.flatten(2) @ torch.ones(36, 1) / 36,
        lambda y: torch.bmm(torch.ones(2, 1, 4), y.flatten(2)),
        lambda y: F.adaptive_avg_pool1d(y.flatten(2), 1),
    ],
)
def test_totals_are_totals_however_they_are_written(total: Callable[[Tensor], Tensor]) -> None:
    plan = plan_of(lambda s, x: total(s.conv(x)), conv=conv())
    layers = [op for op in plan.parts if op.family == "linear"]
    assert [(op.scheme, "show the total" in op.reason) for op in layers] == [(None, True)]
    assert plan.op("conv2d").scheme == "a8w8"


def test_weights_that_a_model_has_make_no_total() -> None:
    head = nn.Linear(6, 1, bias=False)
    nn.init.ones_(head.weight)
    plan = plan_of(lambda s, x: s.head(s.conv(x)), conv=conv(), head=head)
    assert plan.op("linear").scheme == "a8w8"


def test_what_is_compared_for_equality_stays_in_float() -> None:
    """A table makes equal what its argument held apart, and two peaks of one."""

    def peaks(s: Any, x: Tensor) -> Tensor:
        scores = s.conv(x).sigmoid().clamp(1e-4, 1 - 1e-4)
        return cast(Tensor, scores * (F.max_pool2d(scores, 3, 1, 1) == scores))

    plan = plan_of(peaks, conv=conv())
    functions = {op.node for op in plan.ops if "compared for equality" in op.reason}
    assert functions == {"sigmoid", "clamp"}
    moved = {*functions, "max_pool2d"}
    assert {op.placement for op in plan.ops if op.node in moved} == {"float inside"}
    assert plan.op("conv2d").scheme == "a8w8"
    named = plan_of(peaks, Rule(Scope.NODE_NAME, "sigmoid", A8W8), conv=conv())
    assert named.op("sigmoid").scheme == named.op("clamp").scheme == "a8w8"


TO_INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the pixel next to a position": lambda p: (p * 8.0 + 4.0).floor().clamp(0, 15).long(),
    "the nearest bin": lambda p: ((p.abs() - 0.01) / 0.25).round().to(torch.int32),
    "a quotient": lambda p: torch.div(p * 3.0 + 1.0, 0.125, rounding_mode="floor").to(torch.int64),
    "the bin in a cycle": lambda p: torch.remainder(p * 12.0, 5.0).int(),
    "through other ops": lambda p: torch.cat([p.sigmoid() * 15.0, p.tanh() + 1.0], 1).long(),
}


@pytest.mark.parametrize("name", TO_INTEGERS)
def test_what_becomes_integers_is_what_the_model_makes_of_it(name: str) -> None:
    """A grid that holds 0.988 in the place of 1.0 gives the index before."""

    def both(s: Any, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return s.conv(x), TO_INTEGERS[name](p)

    model = Function(both, conv=conv()).eval()
    x, p = torch.randn(IMAGE), torch.rand(64, 2) * 2 - 0.5
    done = convert(model, (x, p))
    with torch.no_grad():
        want, got = model(x, p)[1], done.graph(x, p)[1]
    assert torch.equal(want, got)
    assert any("become integers" in op.reason for op in done.plan.floating)
    assert done.plan.op("conv2d").scheme == "a8w8"


def test_what_becomes_integers_is_left_up_to_the_layer_before() -> None:
    def sampled(s: Any, x: Tensor) -> Tensor:
        rows = s.layer(x)
        place = (rows.sigmoid() * 7.0).floor().long()
        return cast(Tensor, torch.gather(s.layer(x * 2.0), 1, place))

    plan = plan_of(sampled, shapes=((4, 8),), layer=nn.Linear(8, 8))
    left = {op.node for op in plan.floating if "become integers" in op.reason}
    assert left == {"sigmoid", "mul", "floor"}
    assert plan.op("linear").scheme == plan.op("linear_1").scheme == "a8w8"
    named = plan_of(
        sampled, Rule(Scope.NODE_NAME, "mul", A8W8), shapes=((4, 8),), layer=nn.Linear(8, 8)
    )
    assert named.op("mul").scheme == "a8w8"


def test_sums_that_float_ops_read_repeated_are_float() -> None:
    """Distances to prototypes: each is the mean of some rows, next to every row."""

    def distances(s: Any, x: Tensor) -> Tensor:
        rows = s.layer(x)
        means = rows.view(2, 2, 8).mean(1)
        apart = rows.unsqueeze(1).expand(4, 2, -1) - means.unsqueeze(0).expand(4, 2, -1)
        return F.log_softmax(-(apart**2).sum(-1), 1)

    model = Function(distances, layer=nn.Linear(8, 8))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(capture(model, (torch.randn(4, 8),)))
    assert "only float ops read its result" in plan.op("mean").reason
    assert plan.op("linear").scheme == "a8w8"


def test_sums_between_float_ops_are_rounded_once_or_not_at_all() -> None:
    """A float op may be one of no family, or one that is not worth integers where it stands."""

    def supported(s: Any, x: Tensor) -> Tensor:  # as a sparsemax written out, up to its layer
        y = s.conv(x)
        threshold = torch.cos(y) * 0.5 - 0.25
        return cast(Tensor, s.conv(torch.where(y * 2.0 + 1.0 > torch.sin(y), y, threshold)))

    plan = plan_of(supported, conv=conv())
    before = {op.node for op in plan.ops if "only float ops read its result" in op.reason}
    behind = {op.node for op in plan.ops if "float ops compute what it reads" in op.reason}
    assert (before, behind) == ({"mul_1", "add"}, {"mul", "sub"})
    assert {op.scheme for op in plan.ops if op.family == "conv"} == {"a8w8"}
    named = plan_of(supported, Rule(Scope.OPERATOR_TYPE, "aten.mul.Tensor", A8W8), conv=conv())
    assert {op.scheme for op in named.ops if op.family == "mul"} == {"a8w8"}
    inputs = (torch.arange(6),)
    read = Function(lambda s, i: torch.cos(s.rows(i) * 2.0), rows=nn.Embedding(6, 6))
    plan = make_plan(
        canonicalize(capture(read, inputs)), Config([Rule(Scope.GLOBAL, "", A8W8)]), BACKEND
    )
    assert plan.op("mul").scheme == "a8w8"  # rows of a table, which is stored as integers
    positions = nn.Parameter(torch.randn(1, 4, 6, 6))
    plan = plan_of(lambda s, x: torch.cos(s.conv(x) + positions), conv=conv())
    assert plan.op("add").scheme == "a8w8"  # floats would take four times the bytes
    plan = plan_of(lambda s, x: torch.cos(s.conv(x) + positions[:, :1, :1]), conv=conv())
    assert plan.op("add").scheme is None


def test_a_float_sum_keeps_no_movement_from_integers() -> None:
    """A part has the range of the whole tensor, of which calibration sees more."""

    def shifted(s: Any, x: Tensor) -> Tensor:
        last = x[..., -1:]
        return cast(Tensor, s.conv(torch.cos(x - last)) + last)

    plan = plan_of(shifted, conv=conv())
    assert (plan.op("sub").scheme, plan.op("add").scheme) == (None, "a8w8")
    assert plan.op("slice_1").scheme == "a8"


def test_what_becomes_float_next_to_a_logarithm_has_a_guard_in_float() -> None:
    """The sum is float for the softmax, the logarithms for the sum: of zero they are infinite."""
    torch.manual_seed(0)
    model = Function(
        lambda s, x, u: (s.conv(x) - torch.log(-torch.log(u * 1.0 + 1e-9) + 1e-9)).softmax(1),
        conv=conv(),
    )
    data = [(torch.randn(IMAGE), torch.rand(IMAGE)) for _ in range(4)]
    graph = quantized(model, data[0], calibration=data)
    for inputs in data:
        # To the float model, by 8 bits; without the guard there are values that are no numbers.
        torch.testing.assert_close(graph(*inputs), model(*inputs), atol=0.05, rtol=0.0)


def test_what_prepares_a_float_input_for_a_layer_stays_in_float() -> None:
    """Each op would round what the layer's input is rounded to anyway."""

    def normalized(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.conv((((x - s.mean) / s.deviation).clamp(-5, 5)).flip(3)))

    def transformed(s: Any, x: Tensor) -> Tensor:
        parts = [x[:, i : i + 1] * (0.5 + i) - 0.1 for i in range(4)]
        return cast(Tensor, s.conv(torch.cat(parts, 1)))

    model = Function(normalized, conv=conv())
    model.register_buffer("mean", torch.rand(4, 1, 1))
    model.register_buffer("deviation", 1 + torch.rand(4, 1, 1))
    exported = torch.export.export(model, (torch.randn(IMAGE),))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    plan = quantizer.plan(exported)
    prepared = {op.node for op in plan.ops if "it prepares a float input" in op.reason}
    assert prepared == {"sub", "div", "clamp"}
    assert plan.op("conv2d").scheme == "a8w8"
    named = cq.IntegerQuantizer().set_global("a8w8").set_node_name("sub", "a8w8").plan(exported)
    assert named.op("sub").scheme == named.op("clamp").scheme == "a8w8"
    given = cq.IntegerQuantizer().set_global("a8w8").set_io(inputs="a8").plan(exported)
    assert given.op("sub").scheme == given.op("clamp").scheme == "a8w8"
    plan = plan_of(transformed, conv=conv())
    assert {op.scheme for op in plan.ops if op.family in ("mul", "sub")} == {None}
    assert plan.op("cat").scheme == "a8"


def test_means_of_tokens_that_only_a_norm_reads_stay_in_float() -> None:
    """Calibration sees one value a channel and sample, and the norm dequantizes it at once."""

    def pooled(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.head(s.norm(s.conv(x).flatten(2).mean(1))))

    layers = {"conv": conv(), "norm": nn.LayerNorm(36), "head": nn.Linear(36, 4)}
    plan = plan_of(pooled, **layers)
    assert "only float ops read" in plan.op("mean_linear").reason
    assert plan.op("mean_linear").placement == plan.op("mean").placement == "float inside"
    assert plan.op("conv2d").scheme == plan.op("linear").scheme == "a8w8"
    named = plan_of(pooled, Rule(Scope.NODE_NAME, "mean", A8W8), **layers)
    assert named.op("mean_linear").scheme == "a8w8"


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, 1:],
    "select": lambda y: y[:, 0],
    "split": lambda y: y.split([1, 3], 1)[1],
    "part of a view": lambda y: y.mT[..., 2:].mT,
}


@pytest.mark.parametrize("name", PARTS)
def test_sums_that_float_ops_read_in_part_stay_in_float(name: str) -> None:
    """The residual stream of a transformer that pools all tokens but the first."""

    def stream(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x).flatten(2)
        y = y + s.first(s.norm(y))
        y = y + s.second(s.norm(y))
        return cast(Tensor, s.head(s.norm(PARTS[name](y))))

    layers = {key: nn.Linear(36, 36) for key in ("first", "second", "head")}
    plan = plan_of(stream, conv=conv(), norm=nn.LayerNorm(36), **layers)
    for op in (plan.op("add"), plan.op("add_1")):
        assert "only float ops read" in op.reason
    assert plan.op("conv2d").scheme == plan.op("linear").scheme == "a8w8"


STREAMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "a sum": (lambda s, y: y + s.second(s.norm(y)), True),
    "two sums": (lambda s, y: (y + s.second(s.norm(y))) * 2.0 + s.head(s.norm(y) + y), True),
    "a sum and a layer": (lambda s, y: s.second(y) + s.head(s.norm(y)) + y, False),
    "a product": (lambda s, y: y * s.second(s.norm(y)), False),
    "a sum, and no float op": (lambda s, y: y + s.second(y), False),
}


@pytest.mark.parametrize("name", STREAMS)
def test_sums_that_float_ops_and_sums_read_stay_in_float(name: str) -> None:
    """A residual stream whose end a layer reads, as a convolution between blocks does."""
    rest, left = STREAMS[name]

    def stream(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x).flatten(2)
        return cast(Tensor, s.head(rest(s, y + s.first(y))))

    layers = {key: nn.Linear(36, 36) for key in ("first", "second", "head")}
    plan = plan_of(stream, conv=conv(), norm=nn.LayerNorm(36), **layers)
    assert ("sums that go on with it" in plan.op("add").reason) is left
    assert plan.op("add").scheme == (None if left else "a8w8")
    rule = Rule(Scope.NODE_NAME, "add", A8W8)
    assert plan_of(stream, rule, conv=conv(), norm=nn.LayerNorm(36), **layers).op("add").scheme


@pytest.mark.parametrize("mean", [lambda x: x.mean((2, 3)), nn.AdaptiveAvgPool2d(1)])
def test_so_do_means_of_images(mean: Callable[[Tensor], Tensor]) -> None:
    def pooled(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.head(s.norm(mean(s.conv(x)).flatten(1))))

    layers = {"conv": conv(), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 4)}
    plan = plan_of(pooled, **layers)
    (op,) = [op for op in plan.ops if op.family in {"mean", "adaptive_avg_pool2d"}]
    assert "only float ops read" in op.reason
    assert op.placement == "float inside"
    named = plan_of(pooled, Rule(Scope.NODE_NAME, op.node, A8W8), **layers)
    assert named.op(op.node).scheme == "a8w8"
    plan = plan_of(lambda s, x: s.head(mean(s.conv(x)).flatten(1)), **layers)
    assert plan.op(op.node).scheme == "a8w8"  # a layer reads it


def test_phases_that_a_constant_matrix_makes_stay_in_float() -> None:
    def waves(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.conv(((x * x[:, :1]) @ torch.eye(x.shape[-1])).sin()))

    plan = plan_of(waves, conv=conv())
    found = {op.node for op in plan.ops if "phases of a sine" in op.reason}
    assert found == {"mul", "matmul"}
    assert plan.op("matmul").placement == "float inside"
    plan = plan_of(waves, Rule(Scope.NODE_NAME, "matmul", A8W8), conv=conv())
    assert plan.op("matmul").scheme == "a8w8"
    graph = canonicalize(capture(Function(waves, conv=conv()), (torch.randn(IMAGE),)))
    plan = make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS)
    assert plan.op("matmul").scheme == "a8w8"


def second_order(s: Any, x: Tensor) -> Tensor:
    """A factorization machine: what all pairs of some tensors have in common."""
    y = s.conv(x)
    pairs = y.sum(1, keepdim=True) ** 2 - (y * y).sum(1, keepdim=True)
    return cast(Tensor, s.conv(pairs * y))


def test_a_difference_of_powers_stays_in_float() -> None:
    plan = plan_of(second_order, conv=conv())
    found = {op.node for op in plan.ops if "a difference of powers" in op.reason}
    assert found == {"pow_1", "mul", "sum_2", "sub"}
    assert {plan.op(name).placement for name in found if name != "sum_2"} == {"float inside"}
    plan = plan_of(second_order, Rule(Scope.NODE_NAME, "sub", A8W8), conv=conv())
    assert {plan.op(name).scheme for name in ("pow_1", "mul", "sub")} == {"a8w8"}
    graph = canonicalize(capture(Function(second_order, conv=conv()), (torch.randn(IMAGE),)))
    plan = make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS)
    assert {plan.op(name).scheme for name in ("pow_1", "mul", "sub")} == {"a8w8"}


def test_a_power_less_what_is_no_power_is_integers() -> None:
    plan = plan_of(lambda s, x: (lambda y: s.conv(y**2 - y))(s.conv(x)), conv=conv())
    assert {plan.op(name).scheme for name in ("pow_1", "sub")} == {"a8w8"}


def test_exponentials_of_no_power_are_tables() -> None:
    for function in (lambda y: torch.exp(-y) * 2.0, lambda y: torch.exp(-y) + 1.0):
        plan = plan_of(lambda s, x, f=function: s.conv(f(s.conv(x))), conv=conv())
        assert plan.op("exp").placement == "table"


def test_a_table_is_stored_as_what_others_than_a_power_want() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(1000, 16), nn.Linear(16, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            y = self.table(tokens)
            return cast(Tensor, self.layer(y * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6)))

    example = (torch.arange(6).reshape(1, 6),)
    exported = torch.export.export(Tokens().eval(), example)
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert plan.op("pow_1").scheme is None
    assert plan.op("embedding").size_bytes == 1000 * (16 + 4)  # of each row, a scale
    program = cq.lower(convert(Tokens(), example).graph, example)
    assert len(program.buffer) < 1000 * 16 * 2


def test_a_table_that_integers_and_a_norm_read_is_stored_as_these_integers() -> None:
    def residual(s: Any, tokens: Tensor) -> Tensor:
        y = s.table(tokens)
        norm = y * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6)
        return cast(Tensor, s.head(y + s.layer(norm)))

    model = Function(
        residual, table=nn.Embedding(1000, 16), layer=nn.Linear(16, 16), head=nn.Linear(16, 16)
    )
    exported = torch.export.export(model.eval(), (torch.arange(6).reshape(1, 6),))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert plan.op("mul").scheme is None
    assert plan.op("add_1").scheme == "a8w8"
    assert plan.op("embedding").size_bytes == 1000 * 16


@pytest.mark.parametrize("name", ["log", "log of a sum", "reciprocal", "root"])
def test_tables_need_nothing_that_keeps_them_from_infinity(name: str) -> None:
    function, guard = POLES[name]
    plan = plan_of(lambda s, x: s.conv(function(F.relu(s.conv(x)))), conv=conv())
    (op,) = (op for op in plan.ops if op.node == guard)
    assert op.scheme == "a8w8"


HIDDEN_QUOTIENTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a root": (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6), True),
    "a power": (lambda y: ((y * y).mean(-1, keepdim=True) + 1e-6) ** -0.5 * y, True),
    "one over": (lambda y: y * (1 / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6)), True),
    "a multiple": (lambda y: y * (8 * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)), True),
    "moved": (lambda y: y * torch.rsqrt((y * y).mean(-1) + 1e-6).unsqueeze(-1), True),
    "of integers": (lambda y: y * torch.rsqrt(1 + torch.sigmoid(y)), False),
    "no factor": (lambda y: y * y.square().mean(-1, keepdim=True).sqrt(), False),
}


@pytest.mark.parametrize("name", HIDDEN_QUOTIENTS)
def test_products_that_divide_by_a_root_stay_in_float(name: str) -> None:
    quotient, left = HIDDEN_QUOTIENTS[name]

    def norm(s: Any, x: Tensor) -> Tensor:
        return cast(Tensor, s.second(quotient(s.first(x))))

    def graph_of(*rules: Rule) -> Plan:
        layers = {key: nn.Linear(8, 8) for key in ("first", "second")}
        return plan_of(norm, *rules, shapes=[(4, 8)], **layers)

    plan = graph_of()
    products = [op for op in plan.ops if "divides by a root" in op.reason]
    assert bool(products) is left
    assert {op.scheme for op in plan.ops if op.family == "linear"} == {"a8w8"}
    for op in products:
        assert graph_of(Rule(Scope.NODE_NAME, op.node, A8W8)).op(op.node).scheme == "a8w8"


def test_a_norm_by_hand_loses_no_more_than_the_op() -> None:
    """With a padding token, of which the norm makes a thousand times as much as of others."""

    def by_hand(y: Tensor) -> Tensor:
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    def ratio(norm: Callable[[Tensor], Tensor]) -> float:
        torch.manual_seed(0)
        layers = {key: nn.Linear(32, 32, bias=False) for key in ("first", "second")}
        model = Function(lambda s, x: s.second(norm(s.first(x))), **layers)
        data = [(torch.cat([torch.zeros(1, 32), torch.randn(7, 32)]),) for _ in range(4)]
        result = cq.quantize(model, data[0], data, lower=False, progress=False)
        return result.fidelity.outputs[0].sqnr

    assert ratio(by_hand) > ratio(lambda y: F.rms_norm(y, (32,), eps=1e-6)) - 0.1


QUOTIENTS_OF_PARTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a guard": (lambda y: y[..., :-1] / (y[..., -1:] + 1e-6), True),
    "a bound": (lambda y: y[..., :-1] / y[..., -1:].clamp(min=0.1), True),
    "pieces": (lambda y: (lambda a, b: a / b.clamp(min=0.1))(*y.chunk(2, -1)), True),
    "moved": (lambda y: y.transpose(1, 2)[:, :-1] / y[..., -1:].transpose(1, 2), True),
    "another": (lambda y: y[..., :-1] / torch.sigmoid(y[..., -1:]), False),
    "a number": (lambda y: y[..., :-1] / 2.0 + y[..., -1:], False),
}


@pytest.mark.parametrize("name", QUOTIENTS_OF_PARTS)
def test_products_whose_parts_are_divided_by_one_another_stay_in_float(name: str) -> None:
    """As in linear attention, where values and the sum of their weights are one product."""
    quotient, left = QUOTIENTS_OF_PARTS[name]

    def attention(s: Any, x: Tensor) -> Tensor:
        y = quotient(s.layer(x) @ (s.layer(x).transpose(1, 2) @ x))
        return y @ y.transpose(1, 2)

    def graph_of(*rules: Rule) -> Plan:
        return plan_of(attention, *rules, shapes=[(1, 6, 8)], layer=nn.Linear(8, 8))

    plan = graph_of()
    assert plan.op("matmul").scheme == "a8w8"
    assert (plan.op("matmul_1").scheme is None) is left
    assert ("divided by one another" in plan.op("matmul_1").reason) is left
    rule = Rule(Scope.NODE_NAME, "matmul_1", A8W8)
    assert graph_of(rule).op("matmul_1").scheme == "a8w8"


@pytest.mark.parametrize(
    ("added", "kept"), [(1e-15, False), (1e-3, False), (1.0, True), (0.0, True), (-1e-6, True)]
)
def test_small_numbers_that_keep_divisors_from_zero(added: float, kept: bool) -> None:
    plan = plan_of(
        lambda s, x, y: (x + x) / (torch.tanh(y + y) + added) * 2.0, shapes=(IMAGE, IMAGE)
    )
    op = plan.op("add_2")
    assert ("keeps a divisor away from zero" in op.reason) is not kept, op
    assert (op.scheme is not None) is kept, op


@pytest.mark.parametrize(
    ("rule", "scheme"),
    [
        (Rule(Scope.OPERATOR_TYPE, "aten.clamp.default", A8W8), "a8w8"),
        (Rule(Scope.NODE_NAME, "clamp", A8W8), "a8w8"),
        (Rule(Scope.OPERATOR_TYPE, "aten.tanh.default", A8W8), None),
    ],
)
def test_a_rule_for_the_bound_of_a_divisor_is_obeyed(rule: Rule, scheme: str | None) -> None:
    plan = plan_of(
        lambda s, x, y: (x + x) / torch.tanh(y).clamp(1e-6, 1.0) * 2.0, rule, shapes=(IMAGE, IMAGE)
    )
    assert plan.op("clamp").scheme == scheme


Partition = frozenset[frozenset[tuple[str, ...]]]


def partition(plan: Plan) -> Partition:
    """Which edges share an observer, without the numbers of the groups."""
    groups: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for node, annotation in plan.annotations.items():
        for name, edge in annotation.inputs.items():
            groups[edge.group].add((node, "input", name))
        if annotation.output is not None:
            groups[annotation.output.group].add((node, "output"))
    return frozenset(frozenset(members) for members in groups.values())


def edges(plan: Plan) -> dict[tuple[str, ...], Edge]:
    found: dict[tuple[str, ...], Edge] = {}
    for node, annotation in plan.annotations.items():
        found.update({(node, "input", n): e for n, e in annotation.inputs.items()})
        if annotation.output is not None:
            found[node, "output"] = annotation.output
    return found


# ---------------------------------------------------------------------------------------------
# Random graphs
# ---------------------------------------------------------------------------------------------

Op = Callable[[nn.Module, list[Tensor]], Tensor]
OPS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "conv": (1, lambda layer, x: layer(x)),
    "relu": (1, lambda _, x: torch.relu(x)),
    "clamp": (1, lambda _, x: x.clamp(-1, 1)),
    "float": (1, lambda _, x: torch.sin(x)),
    "max pool": (1, lambda _, x: F.max_pool2d(x, 3, 1, 1)),
    "average pool": (1, lambda _, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    "permute": (1, lambda _, x: x.permute(0, 1, 3, 2)),
    "dropout": (1, lambda _, x: F.dropout(x, 0.5, False)),
    "reshape": (1, lambda _, x: x.flatten(2).view(x.shape)),
    "swap": (1, lambda _, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "add": (2, lambda _, x, y: x + y),
    "mul": (2, lambda _, x, y: x * y),
    "cat": (2, lambda _, x, y: torch.cat([x, y], 1)[:, 2:6]),
    "cat of rows": (2, lambda _, x, y: torch.cat([x[:1], y[1:]], 0)),
}
STEP = st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 9), st.integers(0, 9))


class Random(nn.Module):
    """Applies ops to earlier values and returns what nobody used."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(conv() for _ in steps)

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        values, used = [x, y], set()
        for (name, i, j), layer in zip(self.steps, self.layers, strict=True):
            count, apply = OPS[name]
            picked = [index % len(values) for index in (i, j)[:count]]
            used.update(picked)
            values.append(apply(layer, *[values[index] for index in picked]))
        return [value for i, value in enumerate(values) if i not in used] or [values[-1]]


def random_graph(steps: list[tuple[str, int, int]]) -> GraphModule:
    inputs = (torch.randn(IMAGE), torch.randn(IMAGE))
    return canonicalize(capture(Random(steps), inputs))


def shuffled(model: GraphModule, seed: int) -> GraphModule:
    """The same graph with its nodes in another topological order."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    nodes = list(model.graph.nodes)
    placed: list[Node] = [n for n in nodes if n.op == "placeholder"]
    waiting = [n for n in nodes if n.op not in ("placeholder", "output")]
    while waiting:
        ready = [n for n in waiting if all(source in placed for source in n.all_input_nodes)]
        chosen = ready[int(torch.randint(len(ready), (1,), generator=generator))]
        placed[-1].append(chosen)
        placed.append(chosen)
        waiting.remove(chosen)
    model.graph.lint()
    model.recompile()
    return model


# Different widths and observers for different ops: groups must not only meet by chance.
RULES = (
    Rule(Scope.GLOBAL, "", A8W8),
    Rule(Scope.OPERATOR_TYPE, "aten.mul.Tensor", scheme("a6w8")),
    Rule(Scope.OPERATOR_TYPE, "aten.add.Tensor", scheme("a8w8-moving_average")),
    Rule(Scope.OPERATOR_TYPE, "aten.avg_pool2d.default", scheme("a16w8")),
    Rule(Scope.OPERATOR_TYPE, "aten.clamp.default", None),
)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(STEP, min_size=2, max_size=9), st.integers(0, 99), st.booleans())
def test_the_order_of_the_nodes_does_not_matter(
    steps: list[tuple[str, int, int]], seed: int, mixed: bool
) -> None:
    graph = random_graph(steps)
    config = Config(list(RULES if mixed else RULES[:1]))
    plan, again = (
        make_plan(graph, config, BACKEND),
        make_plan(shuffled(graph, seed), config, BACKEND),
    )
    assert partition(plan) == partition(again)
    for key, edge in edges(plan).items():
        other = edges(again)[key]
        assert (edge.kind, edge.scheme, edge.bias, edge.axis) == (
            (other.kind, other.scheme, other.bias, other.axis)
        ), key
    ops = {op.node: (op.fused, op.family, op.scheme, op.reason) for op in plan.ops}
    assert ops == {op.node: (op.fused, op.family, op.scheme, op.reason) for op in again.ops}


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(STEP, min_size=2, max_size=8), st.booleans())
def test_observers_are_shared_exactly_as_planned(
    steps: list[tuple[str, int, int]], mixed: bool
) -> None:
    """What prepare_pt2e inserts is the plan: one observer a group, none elsewhere."""
    quantizer = cq.IntegerQuantizer()
    quantizer._config.rules.extend(RULES if mixed else RULES[:1])
    inputs = (torch.randn(IMAGE), torch.randn(IMAGE))
    model = Function(lambda s, x, y: [*s.random(x, y), x + y], random=Random(steps))
    prepared = prepare_pt2e(capture(model, inputs), quantizer)
    plan = quantizer.last_plan
    nodes = {node.name: node for node in prepared.graph.nodes}
    observed: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for name, annotation in plan.annotations.items():
        for source in nodes[name].all_input_nodes:
            if source.op == "call_module":
                original = cast(Node, source.args[0])
                while original.op == "call_module":  # observed once more for this user
                    original = cast(Node, original.args[0])
                observer = prepared.get_submodule(str(source.target))
                observed[id(observer)].add((name, "input", original.name))
        if annotation.output is not None:
            users = [u for u in nodes[name].users if u.op == "call_module"]
            assert users, name
            observer = prepared.get_submodule(str(users[0].target))
            observed[id(observer)].add((name, "output"))
    assert frozenset(frozenset(keys) for keys in observed.values()) == partition(plan)


@settings(max_examples=12)
@given(st.lists(STEP, min_size=1, max_size=8), st.booleans())
def test_every_op_and_tensor_has_a_reason(steps: list[tuple[str, int, int]], mixed: bool) -> None:
    graph = random_graph(steps)
    code, metas = graph.code, {n.name: set(n.meta) for n in graph.graph.nodes}
    plan = make_plan(graph, Config(list(RULES if mixed else RULES[:1])), BACKEND)
    assert [op.node for op in plan.ops if not op.reason] == []
    assert [t for op in plan.ops for t in op.tensors if not t.reason] == []
    for op in plan.ops:
        assert (op.scheme is None) == (op.tensors == ())
        for tensor in op.tensors:
            assert (tensor.group is None) == (tensor.dtype == "float32")
    assert set(plan.quantized) | set(plan.floating) == set(plan.ops)
    # Planning writes nothing.
    assert graph.code == code
    assert {n.name: set(n.meta) for n in graph.graph.nodes} == metas


# ---------------------------------------------------------------------------------------------
# Data movement
# ---------------------------------------------------------------------------------------------


def test_a_movement_follows_its_producer() -> None:
    plan = plan_of(
        lambda s, x: s.head(s.conv(x).permute(0, 2, 3, 1).flatten(1)),
        conv=conv(),
        head=nn.Linear(144, 3),
    )
    shared = group(plan, "conv2d")
    for op in ("permute", "flatten"):
        assert group(plan, op, "input") == group(plan, op, "output") == shared
        assert plan.op(op).reason == "moves values: keeps the integers it is given"
        assert plan.op(op).scheme == "a8"
    assert group(plan, "linear", "input") == shared != group(plan, "linear")


def test_a_movement_of_a_float_tensor_follows_its_consumers() -> None:
    plan = plan_of(
        lambda s, x: s.head(torch.sin(x).permute(0, 2, 3, 1).flatten(1)), head=nn.Linear(144, 3)
    )
    shared = group(plan, "linear", "input")
    assert group(plan, "permute", "input") == group(plan, "flatten") == shared
    assert "as its consumers want integers" in plan.op("permute").reason


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: torch.sin(x.flatten(1)),
        lambda s, x: x.flatten(1),
        # One consumer wants integers, the other does not.
        lambda s, x: (lambda t: (s.conv(t), torch.sin(t)))(x.permute(0, 1, 3, 2)),
    ],
)
def test_a_movement_of_a_float_tensor_stays_float_for_float_consumers(
    function: Callable[..., Any],
) -> None:
    plan = plan_of(lambda s, x: (function(s, x), s.conv(x)), conv=conv())
    (movement,) = (op for op in plan.ops if op.family in ("reshape", "permute"))
    assert movement.scheme is None
    assert movement.reason == "moves values of a float tensor"


def test_a_movement_between_integers_stays_integer_for_a_float_consumer() -> None:
    plan = plan_of(lambda s, x: torch.sin(s.conv(x).flatten(1)), conv=conv())
    assert plan.op("flatten").scheme == "a8"
    assert plan.op("sin").scheme is None
    assert plan.op("sin").reason == "no integer form of aten.sin.default is known"


def test_a_movement_left_out_by_a_rule_stays_float() -> None:
    plan = plan_of(
        lambda s, x: s.head(s.conv(x).flatten(1)),
        Rule(Scope.NODE_NAME, "flatten", None),
        conv=conv(),
        head=nn.Linear(144, 3),
    )
    assert plan.op("flatten").reason == 'set_node_name("flatten", None)'
    assert plan.op("flatten").scheme is None
    assert group(plan, "conv2d") != group(plan, "linear", "input")


def test_pieces_of_a_split_share_with_the_whole() -> None:
    plan = plan_of(lambda s, x: [p * 2 for p in s.conv(x).chunk(2, 1)], conv=conv())
    whole = group(plan, "conv2d")
    assert group(plan, "chunk", "input") == whole
    for op in ("getitem", "getitem_1"):
        assert group(plan, op) == whole
    assert group(plan, "mul", "input", "getitem") == whole


# ---------------------------------------------------------------------------------------------
# cat
# ---------------------------------------------------------------------------------------------


def test_all_inputs_of_a_cat_share_with_its_output_whoever_made_them() -> None:
    plan = plan_of(
        lambda s, x, y: s.c(torch.cat([s.a(x), s.b(x), y, torch.sin(x)], 1)),
        shapes=(IMAGE, IMAGE),
        a=conv(),
        b=conv(),
        c=nn.Conv2d(16, 4, 1),
    )
    shared = group(plan, "cat")
    for tensor in ("conv2d", "conv2d_1", "inputs_1", "sin"):
        assert group(plan, "cat", "input", tensor) == shared
    assert group(plan, "conv2d") == group(plan, "conv2d_1") == shared
    assert group(plan, "conv2d_2", "input") == shared != group(plan, "conv2d", "input")


def test_cats_that_meet_form_one_group() -> None:
    """The second cat joins what the first two do not know of each other."""

    def forward(s: Any, x: Tensor) -> Any:
        a, b, c = s.a(x), s.b(x), s.c(x)
        return torch.cat([a, b], 1), torch.cat([c, a], 1), torch.cat([b, b], 1)

    plan = plan_of(forward, a=conv(), b=conv(), c=conv())
    groups = {group(plan, op) for op in ("conv2d", "conv2d_1", "conv2d_2", "cat", "cat_1", "cat_2")}
    assert len(groups) == 1


def test_a_cat_of_different_widths_requantizes_the_narrower() -> None:
    plan = plan_of(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1),
        Rule(Scope.MODULE_NAME, "a", scheme("a5w8")),
        a=conv(),
        b=conv(),
    )
    shared = group(plan, "cat")
    assert group(plan, "conv2d_1") == shared
    assert group(plan, "cat", "input", "conv2d") == shared != group(plan, "conv2d")
    assert plan.op("cat").scheme == "a8"
    assert edges(plan)["conv2d", "output"].scheme == scheme("a5w8").activation


# ---------------------------------------------------------------------------------------------
# Requantizing
# ---------------------------------------------------------------------------------------------


def test_an_op_of_another_width_requantizes_its_input_once_for_all_who_want_that() -> None:
    plan = plan_of(
        lambda s, x: (lambda h: (s.b(h), s.c(h), s.d(h)))(s.a(x)),
        Rule(Scope.MODULE_NAME, "[bc]", scheme("a4w8")),
        a=conv(),
        b=conv(),
        c=conv(),
        d=conv(),
    )
    made = group(plan, "conv2d")
    narrow = group(plan, "conv2d_1", "input")
    assert group(plan, "conv2d_2", "input") == narrow != made
    assert group(plan, "conv2d_3", "input") == made
    assert edges(plan)["conv2d_1", "input", "conv2d"].scheme == scheme("a4w8").activation


def test_the_input_of_two_ops_is_observed_once() -> None:
    plan = plan_of(lambda s, x: (s.a(x), s.b(x)), a=conv(), b=conv())
    assert group(plan, "conv2d", "input") == group(plan, "conv2d_1", "input")


def test_observers_are_the_producers_choice_and_do_not_requantize() -> None:
    plan = plan_of(
        lambda s, x: s.b(s.a(x)),
        Rule(Scope.MODULE_NAME, "b", scheme("a8w8-histogram")),
        a=conv(),
        b=conv(),
    )
    assert group(plan, "conv2d") == group(plan, "conv2d_1", "input")
    assert edges(plan)["conv2d", "output"].scheme == A8W8.activation
    output = edges(plan)["conv2d_1", "output"].scheme
    assert output is not None
    assert output.observer == "histogram"


# ---------------------------------------------------------------------------------------------
# Fusing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        pytest.param(F.relu6, marks=pytest.mark.slow),
        pytest.param(F.hardtanh, marks=pytest.mark.slow),
        pytest.param(lambda x: x.clamp(0, 1), marks=pytest.mark.slow),
        lambda x: x.clamp(min=0.1),
    ],
)
@pytest.mark.parametrize("op", [lambda s, x: s.conv(x), lambda s, x: x + x, lambda s, x: x * x])
def test_an_activation_behind_an_op_is_part_of_it(op: Any, activation: Any) -> None:
    plan = plan_of(lambda s, x: activation(op(s, x)), conv=conv())
    (planned,) = plan.ops
    assert planned.fused is not None
    assert plan.op(planned.fused) is planned
    # The tensor between the two is not quantized.
    assert plan.annotations[planned.node].output is None
    assert plan.annotations[planned.fused].inputs == {}
    assert group(plan, planned.node) == cast(Edge, plan.annotations[planned.fused].output).group


def _two_users(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    return F.relu(h), h


def _relu_and_view(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    return F.relu(h) + h.permute(0, 1, 3, 2)


@pytest.mark.parametrize("function", [_two_users, _relu_and_view])
def test_an_op_with_other_users_is_not_fused(function: Callable[..., Any]) -> None:
    plan = plan_of(function, conv=conv())
    assert plan.op("conv2d").fused is None
    assert plan.op("relu").scheme == "a8w8"
    assert group(plan, "conv2d") == group(plan, "relu", "input") != group(plan, "relu")


def test_only_the_first_activation_is_fused() -> None:
    plan = plan_of(lambda s, x: F.relu6(F.relu(s.conv(x))), conv=conv())
    assert plan.op("conv2d").fused == "relu"
    assert plan.op("relu6").scheme == "a8w8"


def test_asking_for_a_size_is_not_using_the_tensor() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        h = s.conv(x)
        return F.relu(h).view(h.shape[0], -1)

    batch = torch.export.Dim("batch", max=8)
    model = Function(forward, conv=conv())
    graph = capture(model, (torch.randn(IMAGE),), dynamic_shapes=(({0: batch},),))
    plan = make_plan(canonicalize(graph), Config([Rule(Scope.GLOBAL, "", A8W8)]), BACKEND)
    assert plan.op("conv2d").fused == "relu"


@pytest.mark.parametrize("wanted", [None, scheme("a4w8")])
def test_a_rule_for_the_activation_itself_keeps_it_apart(wanted: Any) -> None:
    plan = plan_of(
        lambda s, x: F.relu(s.conv(x)), Rule(Scope.NODE_NAME, "relu", wanted), conv=conv()
    )
    assert plan.op("conv2d").fused is None
    assert plan.op("relu").scheme == (None if wanted is None else "a4w8")


def test_an_activation_behind_a_float_op_is_an_op_of_its_own() -> None:
    plan = plan_of(
        lambda s, x: F.relu(s.conv(x)), Rule(Scope.NODE_NAME, "conv2d", None), conv=conv()
    )
    assert plan.op("conv2d").scheme is None
    assert plan.op("relu").scheme == "a8w8"


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------

SELECTORS = {
    Scope.GLOBAL: "",
    Scope.OPERATOR_TYPE: "aten.conv2d.default",
    Scope.MODULE_TYPE: "torch.nn.modules.conv.Conv2d",
    Scope.MODULE_NAME: "conv",
    Scope.NODE_NAME: "conv2d",
}
PAIRS = [(low, high) for low in SELECTORS for high in SELECTORS if low < high]


@pytest.mark.parametrize(("low", "high"), PAIRS)
@pytest.mark.parametrize("specific_first", slow_but([True], [False, True]))
def test_the_more_specific_rule_wins_in_any_order(
    low: Scope, high: Scope, specific_first: bool
) -> None:
    rules = [
        Rule(low, SELECTORS[low], scheme("a8w4")),
        Rule(high, SELECTORS[high], scheme("a8w6")),
    ]
    plan = plan_of(
        lambda s, x: s.conv(x), *(reversed(rules) if specific_first else rules), conv=conv()
    )
    assert plan.op("conv2d").scheme == "a8w6"
    assert plan.op("conv2d").reason == str(rules[1])


@pytest.mark.parametrize("scope", SELECTORS)
def test_within_a_scope_the_later_rule_wins(scope: Scope) -> None:
    plan = plan_of(
        lambda s, x: s.conv(x),
        Rule(scope, SELECTORS[scope], scheme("a8w4")),
        Rule(scope, SELECTORS[scope], scheme("a8w6")),
        conv=conv(),
    )
    assert plan.op("conv2d").scheme == "a8w6"


@pytest.mark.parametrize("scope", SELECTORS)
def test_none_leaves_an_op_in_float_at_every_scope(scope: Scope) -> None:
    plan = plan_of(
        lambda s, x: (s.conv(x), x + x), Rule(scope, SELECTORS[scope], None), conv=conv()
    )
    op = plan.op("conv2d")
    assert (op.scheme, op.tensors) == (None, ())
    assert op.reason == str(Rule(scope, SELECTORS[scope], None))
    assert (plan.op("add").scheme is None) == (scope is Scope.GLOBAL)


def test_nested_modules_match_by_any_module_around_the_op() -> None:
    block = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv())
    for key, chosen in [
        ("layer1", {"conv2d", "conv2d_1"}),
        ("layer1.0", {"conv2d"}),
        ("layer1.1", {"conv2d_1"}),
        ("layer1.*", {"conv2d", "conv2d_1"}),
        ("layer1.0.*", {"conv2d"}),
        ("*1", {"conv2d", "conv2d_1"}),
        ("layer[1].?", {"conv2d", "conv2d_1"}),
    ]:
        plan = plan_of(
            lambda s, x: s.layer1(x), Rule(Scope.MODULE_NAME, key, scheme("a8w4")), layer1=block
        )
        assert {op.node for op in plan.ops if op.scheme == "a8w4"} == chosen, key


def test_a_filter_leaves_out_what_it_refuses_whatever_the_rules_say() -> None:
    graph = canonicalize(
        capture(Function(lambda s, x: s.b(s.a(x)), a=conv(), b=conv()), (torch.randn(IMAGE),))
    )
    config = Config([Rule(Scope.GLOBAL, "", A8W8), Rule(Scope.NODE_NAME, "conv2d", A8W8)])
    config.filter_function = lambda node: node.name != "conv2d"
    plan = make_plan(graph, config, BACKEND)
    assert plan.op("conv2d").scheme is None
    assert plan.op("conv2d").reason == "the filter function left it out"
    assert plan.op("conv2d_1").scheme == "a8w8"


def test_in_place_overloads_are_selected_by_either_name() -> None:
    for key in ("aten.relu.default", "aten.relu_.default"):
        plan = plan_of(
            lambda s, x: F.relu(s.conv(x), inplace=True),
            Rule(Scope.OPERATOR_TYPE, key, None),
            conv=conv(),
        )
        assert plan.op("relu_").scheme is None, key


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(Scope.NODE_NAME, "conv2dd", A8W8), "no node named 'conv2dd'; did you mean conv2d"),
        (Rule(Scope.NODE_NAME, "layer*", None), "no node named 'layer*'"),
        (Rule(Scope.MODULE_NAME, "stme", A8W8), "no module 'stme'; did you mean stem"),
        (Rule(Scope.MODULE_NAME, "stem.*", None), "no module 'stem.*'"),
    ],
)
def test_names_that_do_not_exist_are_errors_with_the_nearest(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(lambda s, x: s.stem(x), rule, stem=conv())
    assert message in str(error.value)
    assert str(error.value).startswith(str(rule))


@pytest.mark.parametrize(
    "rule",
    [
        Rule(Scope.OPERATOR_TYPE, "aten.linear.default", A8W8),
        Rule(Scope.MODULE_TYPE, "torch.nn.modules.linear.Linear", None),
    ],
)
def test_types_that_do_not_occur_are_warnings(rule: Rule) -> None:
    plan = plan_of(lambda s, x: s.stem(x), rule, stem=conv())
    (warning,) = plan.warnings
    assert warning.startswith(f"{rule} selects nothing")


@pytest.mark.parametrize(
    ("node", "why"),
    [("linear_1", "nothing reads its result"), ("linear_2", "it computes a constant")],
)
def test_nodes_that_no_program_runs_are_warnings(node: str, why: str) -> None:
    """Rules by the names of what was captured, such as one for its last layer, may meet one."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.a(x)
        s.b(y)
        return y + s.c(s.a.weight[:1])

    layers = {name: nn.Linear(4, 4) for name in "abc"}
    exported = torch.export.export(Function(forward, **layers).eval(), (torch.randn(2, 4),))
    (warning,) = (
        cq.IntegerQuantizer().set_global("a8w4").set_node_name(node, "a8w8").plan(exported).warnings
    )
    assert warning.startswith(f'set_node_name("{node}", "a8w8") selects nothing')
    assert why in warning


def test_a_module_that_was_folded_away_still_has_its_name() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval()
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("1", None)
    prepare_pt2e(capture(model, (torch.randn(IMAGE),)), quantizer)
    assert quantizer.last_plan.op("conv2d").scheme == "a8w8"


# ---------------------------------------------------------------------------------------------
# What an op cannot be
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "node", "reason"),
    [
        (
            lambda s, x: F.conv2d(x, x[:1].tile(1, 1, 2, 2) * 0.5, padding=16),  # large patches
            "conv2d",
            "its weight is computed by mul",
        ),
        (lambda s, x: x + x.argmax(1, True), "add", "not a floating-point tensor"),
        (lambda s, x: x.mean((2, 3), dtype=torch.float64), "mean", "changes the dtype"),
        (
            lambda s, x: F.avg_pool2d(x, 4, ceil_mode=True, divisor_override=3),
            "avg_pool2d",
            "ceil_mode",
        ),
        (lambda s, x: F.pad(s.conv(x), (1, 1), value=1.0), "pad", "pads with 1.0"),
        (lambda s, x: x.double() + x.double(), "add", "torch.float64"),
        (lambda s, x: torch.sin(x), "sin", "no integer form of aten.sin.default"),
        (lambda s, x: torch.sort(x, 1)[0], "getitem", "several results of an op"),
    ],
)
def test_what_cannot_be_integer_says_why(
    function: Callable[..., Any], node: str, reason: str
) -> None:
    plan = plan_of(lambda s, x: (function(s, x), s.other(x)), conv=conv(), other=conv())
    assert plan.op(node).scheme is None
    assert reason in plan.op(node).reason
    assert plan.quantized, "the rest is not held back"


# ---------------------------------------------------------------------------------------------
# The plan as a value
# ---------------------------------------------------------------------------------------------


def test_a_plan_prints_and_serializes_every_op() -> None:
    plan = plan_of(lambda s, x: torch.sin(F.relu(s.conv(x))), conv=conv())
    record = json.loads(plan.to_json())
    assert [op["node"] for op in record["ops"]] == ["conv2d", "sin"]
    assert {t["role"] for t in record["ops"][0]["tensors"]} == {"input", "weight", "bias", "output"}
    text = str(plan)
    for word in ("conv2d", "a8w8", "sin", "float32", "no integer form of aten.sin.default"):
        assert word in text


def test_an_op_that_does_not_exist_is_an_error_with_the_nearest() -> None:
    plan = plan_of(lambda s, x: s.conv(x), conv=conv())
    with pytest.raises(ConfigError, match="no op 'conv2'; did you mean conv2d"):
        plan.op("conv2")


def test_roles_and_dtypes_of_a_convolution() -> None:
    plan = plan_of(lambda s, x: s.conv(x), conv=conv())
    found = {t.role: (t.tensor, t.dtype) for t in plan.op("conv2d").tensors}
    assert found == {
        "input": ("inputs_0", "int8"),
        "weight": ("conv_weight", "int8"),
        "bias": ("conv_bias", "int32"),
        "output": ("conv2d", "int8"),
    }
    groups = [t.group for t in plan.op("conv2d").tensors]
    assert len(set(groups)) == 4


def test_a_grouped_transposed_convolution_gets_one_weight_scale_and_says_why() -> None:
    plan = plan_of(lambda s, x: s.up(x), up=nn.ConvTranspose2d(4, 4, 2, groups=2))
    (weight,) = (t for t in plan.op("conv_transpose2d").tensors if t.role == "weight")
    assert "one scale for all channels" in weight.reason
    edge = edges(plan)["conv_transpose2d", "input", weight.tensor]
    assert edge.scheme is not None
    assert edge.scheme.granularity == "per_tensor"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a8w8", 6 * 4 + 4 * 4 * 2),  # integers; a bias and a scale for each channel
        ("a8w8-per_tensor", 6 * 4 + 4 * 4),
        ("a8w4", 6 * 4 // 2 + 4 * 4 * 2),
        (None, 4 * (6 * 4) + 4 * 4),
    ],
)
def test_the_bytes_of_a_layer(name: str | None, size: int) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("0", name)
    plan = quantizer.plan(torch.export.export(model.eval(), (torch.randn(2, 6),)))
    assert plan.op("linear").size_bytes == size


@pytest.mark.parametrize(
    ("formats", "text"),
    [
        (Formats(16, 8), "int16: emulated in float"),
        (Formats(8, 16), "int16: emulated in float"),
        (Formats(9, 2), "int9: emulated in float"),
        (Formats(4, 8), "int4 activations: clamped to their range"),
        (Formats(8, 8), ""),
    ],
)
def test_the_width_in_a_prediction(formats: Formats, text: str) -> None:
    graph = capture(nn.Linear(6, 4), (torch.randn(2, 6),))
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    rule = cast(OpRule, rule_of(node))
    found = BACKEND.predict(cast(PatternMatch, rule.match(rule, node)), formats)
    assert found.reason.startswith(text)
    assert bool(found.reason) is bool(text)


@pytest.mark.parametrize(
    ("bits", "features", "backend"),
    [
        (4, 8, kernels.PACKED_INT4),
        (4, 7, kernels.DYNAMIC_INT8),
        (5, 8, kernels.DYNAMIC_INT8),
        (8, 8, kernels.DYNAMIC_INT8),
        (8, 7, kernels.DYNAMIC_INT8),
    ],
)
def test_where_linear_layers_of_run_time_scales_run(
    bits: int, features: int, backend: Kernel
) -> None:
    """Two weights to a byte: up to 4 bits, and an even number of them."""
    graph = capture(nn.Linear(features, 3), (torch.randn(2, features),))
    (node,) = (node for node in graph.graph.nodes if rule_of(node) is not None)
    rule = cast(OpRule, rule_of(node))
    formats = Formats(8, bits, "per_channel", dynamic=True)
    assert BACKEND.predict(cast(PatternMatch, rule.match(rule, node)), formats).kernel is backend


@pytest.mark.parametrize(
    ("approximate", "reason"),
    [
        ("none", "a table, which XNNPACK fills in float when it loads the program"),
        (
            "tanh",
            "a table, which XNNPACK fills with the gelu that is approximated (up to 4.8e-4 away)",
        ),
    ],
    ids=["exact", "tanh"],
)
def test_which_gelu_a_table_is_filled_with(approximate: str, reason: str) -> None:
    graph = capture(nn.GELU(approximate), (torch.randn(IMAGE),))
    (node,) = (node for node in graph.graph.nodes if rule_of(node) is not None)
    rule = cast(OpRule, rule_of(node))
    assert BACKEND.predict(cast(PatternMatch, rule.match(rule, node)), Formats(8)).reason == reason


@pytest.mark.parametrize(
    ("function", "dims", "node", "reason"),
    [
        (lambda s, x: x[:, :, : x.shape[0]], (0,), "slice_1", "depends on a dynamic size"),
        (lambda s, x: F.group_norm(x, 2), (2,), "group_norm", "its image size is dynamic"),
        (lambda s, x: F.instance_norm(x), (3,), "instance_norm", "its image size is dynamic"),
        (lambda s, x: F.group_norm(x, 2), (0,), "group_norm", "XNNPACK has no integer group norm"),
    ],
)
def test_what_dynamic_sizes_forbid(
    function: Callable[..., Any], dims: tuple[int, ...], node: str, reason: str
) -> None:
    sizes = {dim: torch.export.Dim(f"size{dim}", min=2, max=16 if dim else 5) for dim in dims}
    model = Function(lambda s, x: function(s, x + x))
    graph = capture(model, (torch.randn(4, 4, 6, 6),), dynamic_shapes=((sizes,),))
    plan = make_plan(canonicalize(graph), Config([Rule(Scope.GLOBAL, "", A8W8)]), BACKEND)
    op = plan.op(node)
    assert op.scheme is None
    assert reason in op.reason


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(Scope.OPERATOR_TYPE, "aten.conv2d.default", A8W8)],
        [Rule(Scope.GLOBAL, "", A8W8), Rule(Scope.NODE_NAME, "flatten", A8W8)],
    ],
    ids=["no rule", "a scheme"],
)
def test_a_movement_that_no_rule_leaves_out_passes_integers_on(rules: list[Rule]) -> None:
    graph = capture(Function(lambda s, x: s.conv(x).flatten(1), conv=conv()), (torch.randn(IMAGE),))
    op = make_plan(canonicalize(graph), Config(rules), BACKEND).op("flatten")
    assert (op.scheme, op.reason) == ("a8", "moves values: keeps the integers it is given")


# ---------------------------------------------------------------------------------------------
# Tensors that are joined for float ops
# ---------------------------------------------------------------------------------------------


def token_and_patches(s: Any, x: Tensor) -> Tensor:
    """A class token, joined to patches before a norm."""
    patches = s.patches(x)
    token = s.token(x[:, :1])
    return cast(Tensor, s.head(F.layer_norm(torch.cat([token, patches], 1), (8,))))


def joined(*rules: Rule) -> Plan:
    layers = {name: nn.Linear(8, 8) for name in ("patches", "token", "head")}
    return plan_of(token_and_patches, *rules, shapes=[(2, 5, 8)], **layers)


def test_what_is_joined_for_a_norm_keeps_scales_of_its_own() -> None:
    plan = joined()
    assert plan.op("cat").scheme is None
    assert "it joins tensors of different scales" in plan.op("cat").reason
    assert plan.op("cat").placement == "float inside"
    assert group(plan, "linear") != group(plan, "linear_1")


def test_sums_that_are_joined_as_floats_stay_in_float() -> None:
    """The residual stream of an image, to which a class token is joined after some blocks."""

    def late_token(s: Any, x: Tensor, *, norm: bool = True) -> Tensor:
        y = s.patches(x)
        for layer in (s.first, s.second):
            y = y + layer(F.layer_norm(y, (8,)))
        y = torch.cat([s.token(x[:, :1]), y], 1)
        return cast(Tensor, s.head(F.layer_norm(y, (8,)) if norm else y))

    layers = {name: nn.Linear(8, 8) for name in ("patches", "first", "second", "token", "head")}
    plan = plan_of(late_token, shapes=[(2, 5, 8)], **layers)
    assert plan.op("add").scheme is None
    assert "only float ops read" in plan.op("add_1").reason
    assert {op.scheme for op in plan.ops if op.family == "linear"} == {"a8w8"}
    plan = plan_of(lambda s, x: late_token(s, x, norm=False), shapes=[(2, 5, 8)], **layers)
    assert plan.op("add_1").scheme == "a8w8"


def test_a_rule_joins_them_on_one_scale() -> None:
    plan = joined(Rule(Scope.OPERATOR_TYPE, "aten.cat.default", A8W8))
    assert plan.op("cat").scheme == "a8"
    assert group(plan, "linear") == group(plan, "linear_1")


def test_pieces_of_one_tensor_are_joined_as_they_are() -> None:
    """They share a scale anyway: merged patches of a window transformer."""
    plan = plan_of(
        lambda s, x: s.head(
            F.layer_norm(torch.cat([s.conv(x)[..., ::2], s.conv(x)[..., 1::2]], 1), (3,))
        ),
        conv=conv(),
        head=nn.Linear(3, 3),
    )
    assert plan.op("cat").scheme is None  # two calls of the layer are two tensors

    def merged(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        rows = torch.cat([y[..., ::2], y[..., 1::2]], 1)
        return cast(Tensor, s.head(F.layer_norm(rows, (3,))))

    assert plan_of(merged, conv=conv(), head=nn.Linear(3, 3)).op("cat").scheme == "a8"


def beside(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Features beside their interaction, as recommenders and matching networks have them."""

    def function(s: Any, x: Tensor) -> Tensor:
        u, v = s.a(x), s.b(x)
        return cast(Tensor, s.head(torch.cat([u, v, product(u, v)], -1)))

    return function


INTERACTIONS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "product": (beside(lambda u, v: u * v), True),
    "moved product": (beside(lambda u, v: torch.cat([v, (u * v).flip(-1)], -1)[..., 8:]), True),
    "matrix product": (beside(lambda u, v: u @ v.transpose(1, 2) @ v), True),
    "average": (beside(lambda u, v: (u @ v.transpose(1, 2)).softmax(-1) @ v), False),
    "gate": (beside(lambda u, v: u * v.sigmoid()), False),
    "scaled": (beside(lambda u, v: u * 3.0), False),
    "sum": (beside(lambda u, v: u + v), False),
    "of others": (beside(lambda u, v: (u + 1.0) * (v + 1.0)), False),
}


@pytest.mark.parametrize("name", slow_but(["product", "gate", "of others"], INTERACTIONS))
def test_a_product_beside_its_factors_has_a_scale_of_its_own(name: str) -> None:
    function, apart = INTERACTIONS[name]
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(24, 8)}
    plan = plan_of(function, shapes=[(2, 5, 8)], **layers)
    join = [op for op in plan.ops if op.family == "cat"][-1]
    assert ("it joins a product to what it is a product of" in join.reason) is apart
    assert join.placement == ("float inside" if apart else "integer kernel")
    plan = plan_of(
        function, Rule(Scope.OPERATOR_TYPE, "aten.cat.default", A8W8), shapes=[(2, 5, 8)], **layers
    )
    assert plan.op(join.node).scheme == "a8"
    graph = canonicalize(capture(Function(function, **layers), (torch.randn(2, 5, 8),)))
    plan = make_plan(graph, Config([Rule(Scope.GLOBAL, "", A8W8)]), INTEGERS)
    assert plan.op(join.node).scheme == "a8"


def test_rows_of_a_table_are_joined_to_their_product_as_integers() -> None:
    """Otherwise the table would be stored as floats."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(50, 8), nn.Linear(24, 4)

        def forward(self, i: Tensor, j: Tensor) -> Tensor:
            u, v = self.table(i), self.table(j)
            return cast(Tensor, self.layer(torch.cat([u, v, u * v], -1)))

    tokens = torch.arange(6)
    exported = torch.export.export(Pairs().eval(), (tokens, tokens.flip(0)))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    assert plan.op("cat").scheme == "a8"
    assert plan.op("embedding").size_bytes == 50 * 8


def detections(s: Any, x: Tensor) -> Tensor:
    """Boxes in pixels and probabilities, of two levels of a pyramid."""

    def level(y: Tensor) -> Tensor:
        p = y.sigmoid()
        return torch.cat([p[..., :2] * 640.0, p[..., 2:]], -1)

    return torch.cat([level(s.a(x)), level(s.b(x)).flip(1)], 1)


HEADS = {name: nn.Linear(8, 8) for name in "ab"}


def test_probabilities_beside_boxes_keep_a_scale_of_their_own() -> None:
    plan = plan_of(detections, shapes=[(2, 5, 8)], **HEADS)
    joins = [op for op in plan.ops if op.family == "cat"]
    assert [(op.scheme, op.placement) for op in joins] == [(None, "float inside")] * len(joins)
    assert "it joins values between -1 and 1 with others" in joins[0].reason
    assert group(plan, "sigmoid") != group(plan, "mul")
    assert group(plan, "mul") != group(plan, "mul_1")


JOINED_AS_INTEGERS: dict[str, tuple[Callable[..., Any], Sequence[Rule]]] = {
    "a rule": (detections, [Rule(Scope.OPERATOR_TYPE, "aten.cat.default", A8W8)]),
    "boxes alone": (lambda s, x: torch.cat([s.a(x), F.relu(s.b(x))], 1), ()),
    "probabilities alone": (lambda s, x: torch.cat([s.a(x).sigmoid(), s.b(x).tanh()], 1), ()),
    "zeros beside them": (lambda s, x: torch.cat([s.a(x).sigmoid(), s.zeros], 1), ()),
    "read by a layer": (lambda s, x: s.b(torch.cat([s.a(x), s.a(x).sigmoid()], 1)), ()),
    "read by a layer too": (
        lambda s, x: (lambda y: (y, s.b(y)))(torch.cat([s.a(x), s.a(x).sigmoid()], 1)),
        (),
    ),
}


@pytest.mark.parametrize(
    "name", slow_but(["a rule", "boxes alone", "read by a layer"], JOINED_AS_INTEGERS)
)
def test_all_others_are_joined_as_integers(name: str) -> None:
    function, rules = JOINED_AS_INTEGERS[name]
    zeros = nn.Parameter(torch.zeros(2, 5, 8))
    plan = plan_of(function, *rules, shapes=[(2, 5, 8)], zeros=zeros, **HEADS)
    joins = [op for op in plan.ops if op.family == "cat"]
    assert joins
    assert all("it joins" not in op.reason for op in joins)
    # What has no integer kernel is not worth one where only float outputs show it.
    floats = name in ("probabilities alone", "zeros beside them")
    assert {op.scheme for op in joins} == {None if floats else "a8"}


def test_integers_alone_are_joined_as_integers() -> None:
    """So are they where the program returns them, whatever their ranges."""
    graph = torch.export.export(Function(detections, **HEADS).eval(), (torch.randn(2, 5, 8),))
    for quantizer in (
        cq.IntegerQuantizer(backend=None),
        cq.IntegerQuantizer().set_io(integer=True),
    ):
        plan = quantizer.set_global("a8w8").plan(graph)
        assert {op.scheme for op in plan.ops if op.family == "cat"} == {"a8"}


def test_what_integers_read_too_is_joined_on_one_scale() -> None:
    def both(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([s.a(x), s.b(x)], 1)
        return F.layer_norm(rows, (8,)), s.head(rows)

    layers = {name: nn.Linear(8, 8) for name in ("a", "b", "head")}
    plan = plan_of(both, shapes=[(2, 5, 8)], **layers)
    assert plan.op("cat").scheme == "a8"


class Scores(nn.Module):
    """Products whose softmax reads a constant, which is added in float."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-2, -1)
        return cast(Tensor, (scores + cast(Tensor, self.constant)).softmax(-1) @ x)


def _table() -> Tensor:
    return torch.randn(32, 32, generator=torch.Generator().manual_seed(0))


def _mask(hidden: float) -> Tensor:
    return torch.full((32, 32), hidden).triu(1)


@pytest.mark.parametrize(
    ("constant", "stored"),
    [
        (_table(), True),
        (_mask(-100.0), True),
        (_mask(-1e9), True),
        (torch.full((32, 32), 0.1), True),
        (_table()[:31], False),  # 992 numbers are not worth a conversion
        (_table() + _mask(-100.0), False),  # one scale for both would leave the mask alone
        (_mask(-torch.inf), True),  # it becomes -1e9
    ],
)
def test_a_large_constant_of_a_float_sum_is_stored_as_integers(
    constant: Tensor, stored: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 8)
    made = convert(Scores(constant[:, : len(constant)]), (x[:, : len(constant)],))
    op = made.plan.op("add")
    assert op.scheme is None
    assert [(t.role, t.dtype) for t in op.tensors] == ([("weight", "int8")] if stored else [])
    assert ("its constant is stored as int8" in op.reason) is stored
    assert op.size_bytes == (constant.numel() if stored else 0)
    (add,) = (n for n in made.graph.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    operand = add.args[1]
    assert is_dequantize(operand) is stored
    if stored:
        integers = constant_of(made.graph, operand.args[0])
        assert integers.dtype == torch.int8
        constant = constant.clamp(min=-1e9)
        wrong = (integers * operand.args[1] - constant).abs().max()
        assert wrong <= 0.5 * operand.args[1]
        if constant.unique().numel() <= 2:
            assert wrong <= 1e-6 * constant.abs().max()


class Wide(Scores):
    """Of which the constant is a small part."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__(constant)
        self.layer = nn.Linear(8, 60_000)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(super().forward(x)))


@pytest.mark.parametrize(("constant", "stored"), [(_table(), False), (_mask(-100.0), True)])
def test_a_small_part_of_a_file_is_stored_as_integers_only_where_that_is_exact(
    constant: Tensor, stored: bool
) -> None:
    graph = capture(Wide(constant), (torch.randn(1, 32, 8),))
    op = cq.IntegerQuantizer().set_global("a8w8").plan(graph).op("add")
    assert ("its constant is stored as int8" in op.reason) is stored


@pytest.mark.parametrize("scheme", slow_but(["a9w8"], ["a16w8", "a16w16", "a9w8", "a8w16"]))
def test_wider_schemes_round_no_constant_of_a_float_sum_to_8_bits(scheme: str) -> None:
    x = torch.randn(2, 32, 8)
    for constant, stored in ((_table(), False), (_mask(-100.0), True)):
        op = convert(Scores(constant), (x,), scheme).plan.op("add")
        assert op.scheme is None
        assert ("its constant is stored as int8" in op.reason) is stored
