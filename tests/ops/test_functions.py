"""Functions of one tensor: tables that no last bit of a float kernel decides; missing kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contracts import FloatContract, IntegerContract
from support.graphs import Function, capture, differences, lowered_exactly, quantized, stress
from torch import Tensor, fx, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import tables
from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK, tie_break_offset
from custom_quantizer.backends.xnnpack.partition_configs import partitioner
from custom_quantizer.config.rules import returned_nodes
from custom_quantizer.core.arithmetic import QParams, round_to_float32
from custom_quantizer.core.exact import EXACT
from custom_quantizer.core.fixed_point import FIXED_POINT
from custom_quantizer.ops import functions
from custom_quantizer.ops.functions import FUNCTIONS

aten = torch.ops.aten


def named(target: Any, *args: Any) -> functions.Function:
    """The function that a call of ``target`` applies."""
    graph = fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"), *args))
    found = functions.function_of(node)
    assert found is not None
    return found


def qparams(low: float, high: float) -> QParams:
    """An int8 range that holds zero."""
    low, high = min(low, 0.0), max(high, 0.0, 1e-3)
    scale = round_to_float32((high - low) / 255)
    return QParams(scale, max(-128, min(127, round(-128 - low / scale))), -128, 127)


# Overload, arguments, the same function of a Python float, and where it is defined.
SCALAR: dict[str, tuple[Any, tuple[Any, ...], Callable[[float], float], bool]] = {
    "abs": (aten.abs.default, (), abs, False),
    "ceil": (aten.ceil.default, (), math.ceil, False),
    "celu": (
        aten.celu.default,
        (0.5,),
        lambda x: x if x > 0 else math.expm1(2 * x) / 2,
        False,
    ),
    "div": (aten.div.Tensor, (3.5,), lambda x: x / 3.5, False),
    "elu": (aten.elu.default, (1.25,), lambda x: x if x > 0 else 1.25 * math.expm1(x), False),
    "exp": (aten.exp.default, (), math.exp, False),
    "floor": (aten.floor.default, (), math.floor, False),
    "gelu": (
        aten.gelu.default,
        (),
        lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        False,
    ),
    "hardsigmoid": (aten.hardsigmoid.default, (), lambda x: min(max(x + 3, 0), 6) / 6, False),
    "hardswish": (aten.hardswish.default, (), lambda x: x * min(max(x + 3, 0), 6) / 6, False),
    "leaky_relu": (aten.leaky_relu.default, (0.25,), lambda x: x if x > 0 else x / 4, False),
    "log": (aten.log.default, (), math.log, True),
    "mish": (
        aten.mish.default,
        (),
        lambda x: x * math.tanh(math.log1p(math.exp(x))),
        False,
    ),
    "neg": (aten.neg.default, (), lambda x: -x, False),
    "reciprocal": (aten.reciprocal.default, (), lambda x: 1 / x, True),
    "rsqrt": (aten.rsqrt.default, (), lambda x: x**-0.5, True),
    "selu": (
        aten.selu.default,
        (),
        lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
        False,
    ),
    "sigmoid": (aten.sigmoid.default, (), lambda x: 1 / (1 + math.exp(-x)), False),
    "silu": (aten.silu.default, (), lambda x: x / (1 + math.exp(-x)), False),
    "softplus": (aten.softplus.default, (2.0,), lambda x: math.log1p(math.exp(2 * x)) / 2, False),
    "sqrt": (aten.sqrt.default, (), math.sqrt, True),
    "tanh": (aten.tanh.default, (), math.tanh, False),
}
WITHOUT_TABLE = ("mish", "softplus")
"""XNNPACK makes no tables of these, other backends do."""

RANGES = [(-4.0, 4.0), (-0.3, 9.0), (0.0, 1.0), (-20.0, 0.5)]


def test_every_function_is_tested_here() -> None:
    assert {target for target, *_ in SCALAR.values()} == set(FUNCTIONS)


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_entries_of_a_table_are_the_functions_values_rounded(
    name: str, low: float, high: float
) -> None:
    target, args, scalar, positive = SCALAR[name]
    src, function = qparams(low, high), named(target, *args)
    reals = XNNPACK.dequantize(functions.levels(src), src).tolist()
    legal = [i for i, x in enumerate(reals) if x > 0 or not positive]
    values = [scalar(reals[i]) for i in legal]
    dst = qparams(min(values), min(max(values), 100.0))
    for arithmetic in (XNNPACK, FIXED_POINT, EXACT):
        entries = functions.table(function, src, dst, arithmetic).tolist()
        for i, value in zip(legal, values, strict=True):
            steps = min(max(value / float(dst.scale) + dst.zero_point, -128), 127)
            # The tie-break offset is a few ten-thousandths of a step.
            assert abs(entries[i] - steps) <= 0.5 + 5e-3, (arithmetic.name, i)


def test_a_value_that_is_no_number_is_stored_as_the_largest() -> None:
    src, dst = qparams(-4, 4), qparams(-1, 2)
    entries = functions.table(named(aten.log.default), src, dst, XNNPACK)
    assert entries[0] == 127
    assert entries[src.zero_point + 128] == -128  # log(0) is minus infinity


# ---------------------------------------------------------------------------------------------
# Tie-break offsets
# ---------------------------------------------------------------------------------------------

INEXACT = sorted(
    name
    for name, (target, args, *_) in SCALAR.items()
    if named(target, *args).ulps and name != "silu"
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(INEXACT),
    st.floats(-12, 0),
    st.floats(0.01, 12),
    st.floats(0.3, 3),
    st.integers(0, 2**32),
)
def test_no_kernel_within_its_bound_changes_an_entry(
    name: str, low: float, high: float, stretch: float, seed: int
) -> None:
    """What the delegate computes, with kernels that err by as much as is allowed."""
    target, args, _, positive = SCALAR[name]
    function = named(target, *args)
    src = qparams(0.0 if positive else low, high)
    stored = functions.levels(src)
    real = XNNPACK.dequantize(stored, src).double()
    values = function.compute(real).nan_to_num(posinf=100.0, neginf=-100.0).clamp(-1e6, 1e6)
    dst = qparams(float(values.min()) * stretch, min(float(values.max()), 100.0) * stretch)
    expected = functions.table(function, src, dst, XNNPACK)
    shift = tables.function_offset(function, src, dst)
    assert abs(shift) < 0.02 * float(dst.scale)

    # What is not finite, such as the logarithm of 0, counts neither here nor there.
    legal = torch.isfinite(function.compute(real))
    seen = values[legal & (values.abs() < 2 * dst.levels * float(dst.scale))]
    bound = function.ulps * 2.0**-24 * float(seen.abs().max()) if seen.numel() else 0.0
    generator = torch.Generator().manual_seed(seed)
    for error in (
        torch.full_like(values, bound),
        torch.full_like(values, -bound),
        (torch.rand(values.shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound,
    ):
        kernel = (values + error).float()
        if shift:
            kernel = kernel + torch.tensor(shift)
        limit = torch.finfo(torch.float32).max
        got = XNNPACK.quantize(kernel.clamp(-limit, limit), dst)
        assert torch.equal(got[legal], expected[legal])


@pytest.mark.parametrize("ulps", [2.0, 8.0])
def test_the_window_of_ties_counts_four_roundings_besides_the_kernel(ulps: float) -> None:
    """An entry is moved if it is within ``(ulps + 4) * 2**-24`` of the largest from a half."""
    dst = QParams(1.0, 0, -128, 127)
    for part, moved in ((0.0, True), (0.5, True), (0.99, True), (1.01, False), (2.0, False)):
        apart = part * (ulps + 4) * 2.0**-24 * 100.0
        for half in (0.5 + apart, 0.5 - apart):
            values = torch.tensor([0.0, half, 100.0], dtype=torch.float64)
            assert (tie_break_offset(values, ulps, dst) != 0.0) is moved, part


def test_tables_with_an_entry_next_to_the_middle_are_shifted() -> None:
    """Found by search: an entry of this table lies within 1e-5 steps of a half."""
    function, dst = named(aten.tanh.default), qparams(-1, 1)
    found = 0
    for k in range(200):
        src = qparams(-2 - k / 100, 2 + k / 77)
        if tables.function_offset(function, src, dst) != 0.0:
            found += 1
    # 256 entries, each within about 1e-4 of a half with a probability of 2e-4.
    assert 1 <= found <= 60
    # Kernels that all agree need no shift.
    assert tables.function_offset(named(aten.neg.default), qparams(-1, 1), qparams(-2, 2)) == 0.0


@pytest.mark.slow
def test_float_kernels_of_this_machine_are_within_their_bounds() -> None:
    """256 inputs at a time, as in a table: relative to the largest value among them."""
    written_out = (*WITHOUT_TABLE, "reciprocal", "hardsigmoid", "selu", "celu")  # by passes
    names = [name for name in SCALAR if name not in written_out]
    calls = [(named(SCALAR[n][0], *SCALAR[n][1]), SCALAR[n][0], SCALAR[n][1]) for n in names]
    model = Function(
        lambda _s, x, p: [
            t(p if SCALAR[n][3] else x, *a) for n, (_, t, a) in zip(names, calls, strict=True)
        ]
    )
    x = torch.stack([torch.linspace(-w, w, 256) for w in torch.linspace(0.05, 18, 512)])
    p = torch.stack([torch.linspace(w / 255, w, 256) for w in torch.linspace(0.05, 18, 512)])
    exported = torch.export.export(model, (x, p))
    edge = to_edge_transform_and_lower(exported, partitioner=[partitioner()])
    data = edge.to_executorch().buffer  # the runtime reads it where it is
    program = Runtime.get().load_program(data)
    outputs = program.load_method("forward").execute([x, p])
    for name, (function, _, _), got in zip(names, calls, outputs, strict=True):
        want = function.compute((p if SCALAR[name][3] else x).double())
        largest = want.abs().amax(1, keepdim=True)
        error = ((got.double() - want).abs() / largest).max() * 2.0**24
        if function.ulps == 0:
            assert torch.equal(got, want.float()), name
        else:
            assert float(error) <= function.ulps / 1.5, (name, float(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SCALAR if not SCALAR[n][3] and n not in WITHOUT_TABLE])
def test_runtime_has_the_same_tables_at_many_scales(name: str) -> None:
    """All 256 integers go through each of 24 tables in one program."""
    target, args, *_ = SCALAR[name]
    widths = torch.logspace(-1.0, 1.2, 24).tolist()
    model = Function(lambda _s, x: [target(x * w, *args) + 1.25 for w in widths])
    x = torch.linspace(-1, 1, 256).reshape(1, 256)
    graph = quantized(model, (x,))
    assert cq.integer_reference(graph).float_ops == ()
    lowered_exactly(graph, (x,), [(x * 0.7,), (x * 1.3,)])


# ---------------------------------------------------------------------------------------------
# silu
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-4, 4), (-8, 6), (-0.5, 0.5), (-3, 20), (-20, 3)])
def test_silu_with_an_int8_sigmoid_is_next_to_silu_rounded_once(low: float, high: float) -> None:
    src = qparams(low, high)
    values = F.silu(XNNPACK.dequantize(functions.levels(src), src).double())
    dst = qparams(float(values.min()), float(values.max()))
    sigmoid = tables.sigmoid_qparams(src, dst)
    got = tables.product_table(src, sigmoid, dst)
    once = functions.table(named(aten.silu.default), src, dst, EXACT)
    assert int((got - once).abs().max()) <= 1
    assert int((got != once).sum()) <= 96
    # Its sigmoid needs no offset, and the product is one of integers: no kernel decides anything.
    assert tables.function_offset(named(aten.sigmoid.default), src, sigmoid) == 0.0
    largest = 1 / (1 + math.exp(-(127 - src.zero_point) * float(src.scale)))
    assert largest / 255 <= float(sigmoid.scale) * (1 + 1e-6) <= largest / 255 * 1.03


def test_where_no_sigmoid_is_steady_its_scale_is_that_of_the_largest_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "tie_break_offset", lambda *_: 1.0)
    find = tables.sigmoid_qparams.__wrapped__  # without its cache
    found = find(QParams(0.5, -128, -128, 127), qparams(0, 100))
    assert found == QParams(round_to_float32(1 / (1 + math.exp(-127.5)) / 255), -128, -128, 127)


# ---------------------------------------------------------------------------------------------
# gelu
# ---------------------------------------------------------------------------------------------


def test_gelu_and_its_approximation_are_two_functions() -> None:
    """The delegate fills both tables with the same one, all other arithmetic does not."""
    model = Function(
        lambda s, x: [F.gelu(x + x, approximate=name) * 1.25 for name in ("none", "tanh")]
    )
    x = torch.linspace(-2.5, 2.5, 256).reshape(1, 256)
    graph = quantized(model, (x,), "a16w8")
    for mode in ("exact", "fixed_point"):
        exact, approximated = cq.integer_reference(graph, mode)(x)
        apart = (exact - approximated).abs().max()
        assert 4e-4 < float(apart) / 1.25 < 6e-4  # 4.8e-4, and roundings of 16 bits


# ---------------------------------------------------------------------------------------------
# What has no kernel, or a wrong one
# ---------------------------------------------------------------------------------------------


IN_FLOAT: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: F.gelu(x * 2, approximate="tanh"),
    F.hardsigmoid,
    F.elu,
    lambda x: F.elu(x, 0.7),
    lambda x: torch.reciprocal(torch.exp(x) + 1),
    F.silu,
    # elus with scales, which ExecuTorch's serializer would drop
    F.selu,
    lambda x: F.celu(x, 0.6),
    lambda x: aten.elu.default(x, 0.5, 2.0, 3.0),
)


def test_in_float_the_program_computes_what_was_asked() -> None:
    """XNNPACK's own gelu is 4.8e-4 off the tanh approximation."""
    torch.manual_seed(0)
    model = Function(lambda s, x: [f(s.conv(x)) for f in IN_FLOAT], conv=nn.Conv2d(4, 4, 1))
    inputs = (torch.randn(2, 4, 5, 5) * 3,)
    graph = quantized(model, inputs)
    lowered = cq.lower(graph, inputs)
    assert lowered.report.fully_delegated
    for got, want in zip(lowered.run(*inputs), cq.integer_reference(graph)(*inputs), strict=True):
        assert float((got - want).abs().max()) <= 2e-6


def test_prelu_of_any_rank_is_exact() -> None:
    shapes = ((2, 6), (2, 6, 5), (2, 6, 5, 4), (2, 6, 3, 2, 2))
    layers: dict[str, nn.Module] = {}
    for rank in range(2, 6):
        for slopes in (1, 6):
            layers[f"p{rank}{slopes}"] = prelu = nn.PReLU(slopes)
            prelu.weight.data = torch.linspace(-0.3, 0.8, slopes)

    def forward(s: Any, *xs: Tensor) -> Any:
        return [getattr(s, f"p{x.dim()}{n}")(x + x) * 1.5 for x in xs for n in (1, 6)]

    inputs = stress(shapes)[0]
    lowered = lowered_exactly(quantized(Function(forward, **layers), inputs), inputs)
    assert lowered.report.fully_delegated


def test_a_computed_slope_stays_in_float() -> None:
    plan = (
        cq.IntegerQuantizer()
        .set_global("a8w8")
        .plan(
            capture(
                Function(lambda s, x: F.prelu(s.c(x), x.mean().reshape(1)), c=nn.Conv2d(4, 4, 1)),
                (torch.randn(1, 4, 3, 3),),
            )
        )
    )
    assert plan.op("prelu").reason == "its slope is computed"


def test_functions_above_8_bits_are_within_one_unit() -> None:
    """Emulated: no shift, and a float kernel's last bits are far below a step."""

    def forward(_s: Any, x: Tensor) -> Any:
        return [f(x * 2) * 1.25 for f in (torch.sigmoid, F.silu, F.gelu, F.hardswish, torch.tanh)]

    inputs = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),)
    graph = quantized(Function(forward), inputs, "a16w8")
    lowered = cq.lower(graph, inputs)
    assert lowered.report.fully_delegated
    for batch in (inputs, *stress([(2, 4, 8, 8)])[:3]):
        record = cq.integer_reference(graph).with_integers(*batch)[1]
        for got, node in zip(lowered.run(*batch), returned_nodes(graph), strict=True):
            scale, source = float(node.args[1]), node.args[0].args[0]
            apart = (torch.round(got / scale) - record[source.name]).abs().max()
            assert float(apart) <= 2, source.name  # two ops deep


def test_a_row_of_zeros_is_normalized_to_zero() -> None:
    """The bound that keeps its norm from being 0 is far below one step of any grid."""
    model = Function(lambda s, x: F.normalize(x + x, dim=-1) + 1.0)
    x = torch.randn(4, 16)
    graph = quantized(model, (x,))
    x[2] = 0.0
    reference = cq.integer_reference(graph)(x)
    assert differences(cq.lower(graph, (x,)).run(x), reference) == []
    assert float((reference[2] - 1.0).abs().max()) < 0.02


class TestContract(IntegerContract):
    together = True
    families = (
        "abs",
        "ceil",
        "div",
        "exp",
        "floor",
        "log",
        "maximum",
        "minimum",
        "neg",
        "reciprocal",
        "rsqrt",
        "sqrt",
    )


class TestFloatContract(FloatContract):
    together = True
    families = ("mish", "softplus")


# Where results are next to zero or infinite, too.
SMALL = torch.logspace(-30, 1.5, 300)
AROUND = torch.cat([SMALL, -SMALL[SMALL < 1], torch.tensor([0.0, -1.0, -1 + 2**-24, 3e37])])
LARGE = torch.linspace(-125.0, 126.0, 501)
POSITIVE = torch.logspace(-37.0, 38.0, 400)
_LOWEST = torch.finfo(torch.float32).min
ROWS = torch.tensor(
    [
        [0.5, -2.0, 40.0, 40.0],
        [-math.inf] * 4,
        [-math.inf, 1.0, -math.inf, -90.0],
        [_LOWEST] * 4,
        [1.0, math.inf, 0.0, 2.0],
    ]
)


FRACTIONS = torch.cat(
    [
        *(torch.linspace(-9.0, 9.0, 73), torch.randn(200) * 1e6),
        torch.tensor([2**22 + 0.5, 2**22 + 1.5, -(2**22) - 0.5, 2**23 - 0.5, 2**23 - 1.5]),
        torch.tensor([2**22 - 0.5, 2**24 + 2, 3e38, math.inf, -math.inf, 1e-30, 0.49999997]),
    ]
)


def exactly(values: Tensor) -> tuple[Tensor, ...]:
    near, some = values.clamp(-1e6, 1e6), values.clamp(0.7, 5.3)
    return (
        *(torch.round(values), torch.trunc(values), torch.frac(values), torch.sign(values)),
        *(torch.fmod(near, 0.3), near % -some, near // some),
        torch.div(near, some, rounding_mode="trunc"),
    )


def in_steps(around: Tensor, large: Tensor, positive: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    usual = positive.clamp(1e-9, 1e9)
    return (
        *(torch.log1p(around), torch.expm1(around), torch.exp2(large)),
        *(torch.log2(positive), torch.log10(positive)),
        *(torch.logsumexp(rows, -1), torch.logsumexp(rows[:3], (0, 1), keepdim=True)),
        *(torch.log_softmax(rows[:4], -1), torch.log_softmax(rows[:3], 0)),
        *map(rows.logcumsumexp, (0, 1)),
        *(around**4, around**9, around**16.0, around**1.3),
        *(usual**-3, usual ** (1 / 3), usual**-0.75),
        *(torch.erfc(around), 10.0**around, 0.5**around),
        *(F.softplus(large), F.softplus(large, 0.5), F.mish(large)),
    )


def as_integers(given: Tensor) -> Tensor:
    """Without any tensor of integers, a graph is no converted one."""
    grid: tuple[Any, ...] = (0.125, 3, -128, 127, torch.int8)
    integers = torch.ops.quantized_decomposed.quantize_per_tensor(given, *grid)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *grid)


def beside_integers(_self: Function, *given: Tensor) -> tuple[Tensor, ...]:
    values = as_integers(given[0])
    so_far = (*map(given[3].cumsum, (0, 1)), given[3].sign().cumprod(1))
    return (*in_steps(*given[:-1]), values, *exactly(given[-1]), *so_far)


def test_functions_in_steps_are_as_near_as_the_kernels_of_the_steps() -> None:
    examples = (AROUND, LARGE, POSITIVE, ROWS, FRACTIONS)
    usual = tuple(map(torch.rand_like, examples))
    lowered = cq.lower(capture(Function(beside_integers), usual), usual)
    assert lowered.report.fully_delegated
    got, want = lowered.run(*examples), in_steps(*(example.double() for example in examples[:-1]))
    # XNNPACK's exponential and logarithm: 32 units in the last place, and 2^-23.
    logarithms = [(4, 2**-22)] * 6 + [(4, 2**-20)] * 2
    powers = [(n, 2**-60) for n in (4, 9, 16, 40, 4, 16, 4, 170, 110, 110)]
    # Of what is below 2^-126 the exponential leaves nothing; mish is up to 88 times as much.
    softplus = [(32, 2**-126), (32, 2**-126), (32, 2**-119)]
    bounds = ((4, 0), (32, 0), (80, 0), *logarithms, *powers, *softplus)
    for result, exact, (ulps, absolute) in zip(got, want, bounds, strict=False):
        near = ((ulps + 1) * 2**-23 * exact.abs() + absolute).nan_to_num(0.0, 0.0, 0.0)
        same = (result == exact.float()) | (result.isnan() & exact.isnan())
        assert bool((same | ((result - exact).abs() <= near)).all())
    for result, wanted in zip(got[-11:-3], exactly(FRACTIONS), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
    so_far = (*map(ROWS.cumsum, (0, 1)), ROWS.sign().cumprod(1))
    for result, wanted in zip(got[-3:], so_far, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


UNITS = torch.cat([torch.linspace(-1.0, 1.0, 2001), SMALL[SMALL < 1], torch.tensor([2.0, -1.5])])
SIZES = torch.cat([torch.linspace(-9.0, 9.0, 2001), POSITIVE[POSITIVE < 2.0**126], -SMALL])
CURVES = torch.cat([torch.linspace(-9.0, 9.0, 2001), torch.linspace(-88.0, 88.0, 501), SMALL])
SIDES = torch.tensor([0.0, -0.0, 1.0, -1.0, 2e-30, 3e38, math.inf, -math.inf])


def transcendental(units: Tensor, sizes: Tensor, curves: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        *(units.asin(), units.acos(), units.atanh(), sizes.abs().acosh()),
        *(sizes.atan(), sizes.asinh(), sizes.erf(), torch.atan2(y[:, None], y)),
        *(curves.sinh(), curves.cosh(), curves.tan(), curves.sinc()),
        *(torch.copysign(y[:, None], y), torch.heaviside(y, units[:8]), torch.hypot(y[:, None], y)),
        *(torch.logaddexp(y[:, None], y), torch.logaddexp2(y[:, None], y)),
        *(units.logit(0.125), torch.xlogy(units, units)),
    )


def test_angles_and_hyperbolic_functions_are_steps_of_the_delegate() -> None:
    """NaN is where PyTorch has it, but for the angle of two infinities and their length."""

    def function(_self: Function, *given: Tensor) -> tuple[Tensor, ...]:
        return as_integers(given[0]), *transcendental(*given)

    examples = UNITS, SIZES, CURVES, SIDES
    usual = tuple(map(torch.rand_like, examples))
    lowered = cq.lower(capture(Function(function), usual), usual)
    assert lowered.report.fully_delegated
    got = lowered.run(*examples)[1:]
    want = transcendental(*(example.double() for example in examples))
    for result, exact in zip(got[:8], want[:8], strict=True):
        near = (8 * 2**-23 * exact.abs()).clamp(min=2.0**-126)
        right = (result == exact.float()) | ((result - exact).abs() <= near)
        assert bool((right | result.isnan()).all())
    for result, exact in zip(got[8:10], want[8:10], strict=True):
        assert bool(((result - exact).abs() <= 66 * 2**-23 * exact.abs() + 2.0**-126).all())
    tangent, exact = got[10], want[10]
    # As far as the tangent of an angle that is off by that.
    assert bool(((tangent - exact).abs() <= 2**-21 * (1 + exact**2)).all())
    assert bool(((got[11] - want[11]).abs() <= 2**-22).all())
    for result, exact in zip(got[12:14], want[12:14], strict=True):
        assert torch.equal(result, exact.float())
    for result, exact in zip(got[14:], want[14:], strict=True):
        right = (result == exact.float()) | result.isnan()
        near = (result - exact).abs() <= 8 * 2**-23 * exact.abs() + 2**-22
        assert bool((right | near).all())
    infinite = SIDES.isinf() & SIDES[:, None].isinf()
    for position, (result, exact) in enumerate(zip(got, want, strict=True)):
        unknown = exact.isnan() | infinite if position in (7, 14) else exact.isnan()
        assert torch.equal(result.isnan(), unknown)


class Generalized(nn.Module):
    """A generalized mean, whose exponent is learned."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([exponent]))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        powers = self.conv(x).clamp(min=1e-6) ** self.exponent
        return powers.mean((2, 3)) ** (1.0 / self.exponent)


@pytest.mark.parametrize("exponent", [3.0, 2.7])
def test_a_learned_exponent_is_a_number(exponent: float) -> None:
    x = torch.rand(2, 3, 8, 8)
    model = Generalized(exponent).eval()
    done = quantized(model, (x,), "a8w8")
    lowered = cq.lower(done, (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    torch.testing.assert_close(lowered.run(x), done(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(done(x), model(x), rtol=0.05, atol=0.01)
