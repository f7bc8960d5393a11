"""TOSA: its arithmetic, what plans say, and (slow) its programs on Arm's reference model."""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.contracts import cases_of
from support.graphs import Function, Inputs, calls
from support.models import convert
from support.tosa import NETWORKS, network, planned, run_cases, use_tools
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.tosa import BACKEND, kernels, passes
from custom_quantizer.backends.tosa.arithmetic import (
    TOSA,
    TosaArithmetic,
    rescale,
    rescale_multiplier,
    sum_rescales,
)
from custom_quantizer.backends.tosa.checked_lowering import lower_graph
from custom_quantizer.backends.tosa.program import TosaProgram
from custom_quantizer.core.arithmetic import PoolWindows, QParams, scale_of, store
from custom_quantizer.core.graph import detached_copy
from custom_quantizer.ops import REGISTRY, OpRule
from custom_quantizer.ops.backend import Support, get_mode
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS, legalize_by
from custom_quantizer.reference.converted import read_converted

aten = torch.ops.aten
WITH_WEIGHTS = ("conv", "conv_transpose", "linear")
_q = torch.ops.quantized_decomposed

INT8 = QParams(0.0625, -3, -128, 127)
INT16 = QParams(0.0625, 0, -(2**15), 2**15 - 1)

# ---------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------


@given(st.floats(2.0**-30, 2.0**12), st.sampled_from([31, 15]))
def test_a_multiplier_is_the_nearest_of_its_bits(real: float, bits: int) -> None:
    multiplier, shift = rescale_multiplier(real, bits)
    assert 2 ** (bits - 1) <= multiplier < 2**bits
    assert 2 <= shift <= 62
    assert abs(Fraction(multiplier, 2**shift) - Fraction(real)) <= Fraction(1, 2 ** (shift + 1))


def test_multipliers_at_the_ends() -> None:
    assert rescale_multiplier(1.0) == (1 << 30, 30)
    assert rescale_multiplier(2.0**-7) == (1 << 30, 37)
    assert rescale_multiplier(1 - 2.0**-40) == (1 << 30, 30)  # rounded up to the next power of two
    assert rescale_multiplier(2.0**-40) == (1 << 22, 62)  # the shift ends, bits are lost
    for real in (0.0, -1.0, float("inf"), 2.0**29):
        with pytest.raises(cq.SchemeError, match="RESCALE factor"):
            rescale_multiplier(real)


@given(st.integers(-(2**20), 2**20), st.floats(2.0**-20, 0.9))
def test_rescale_rounds_the_exact_product_once_and_ties_up(value: int, real: float) -> None:
    multiplier, shift = rescale_multiplier(real)
    got = rescale(torch.tensor([value]), torch.tensor(multiplier), torch.tensor(shift))
    exact = Fraction(value * multiplier, 2**shift)
    assert int(got) == floor(exact + Fraction(1, 2))


def test_rescale_says_where_the_specification_ends() -> None:
    multiplier, shift = (torch.tensor(n) for n in rescale_multiplier(2.0**20))
    assert int(rescale(torch.tensor([511]), multiplier, shift)) == 511 << 20
    with pytest.raises(cq.InputError, match=r"shift of 10 is defined for values in \[-512, 511\]"):
        rescale(torch.tensor([512]), multiplier, shift)


def test_sums_are_brought_to_twice_the_larger_scale() -> None:
    a, b, out = (QParams(scale, 0, -128, 127) for scale in (0.5, 0.125, 0.25))
    assert sum_rescales((a, b), out) == ((2.0**19, 2.0**17), 2.0**-18)
    a, b, out = (QParams(q.scale, 0, -(2**15), 2**15 - 1) for q in (a, b, out))
    assert sum_rescales((a, b), out) == ((2.0**11, 2.0**9), 2.0**-10)


@pytest.mark.parametrize("q", [INT8, INT16], ids=["int8", "int16"])
def test_the_mode_is_within_a_unit_of_exact_arithmetic(q: QParams) -> None:
    exact = get_mode("exact").arithmetic
    a, b = (torch.randint(q.quant_min, q.quant_max + 1, (1000,)) for _ in range(2))
    qa, qb = replace_scale(q, 0.03125), replace_scale(q, 0.078125)
    out = replace_scale(q, 0.1 if q is INT8 else 90.0)
    for mode in ("add", "mul"):
        got = getattr(TOSA, mode)(a, b, qa, qb, out)
        assert int((got - getattr(exact, mode)(a, b, qa, qb, out)).abs().max()) <= 1
    got = TOSA.requantize(a, qa, qb)
    assert int((got - exact.requantize(a, qa, qb)).abs().max()) <= 1


def replace_scale(q: QParams, scale: float) -> QParams:
    rounded = float(torch.tensor(scale, dtype=torch.float32))
    return QParams(rounded, q.zero_point, q.quant_min, q.quant_max)


def test_accumulators_end_where_tosa_s_do() -> None:
    big = torch.tensor([2**31])
    with pytest.raises(cq.InputError, match="exceeds"):
        TOSA.requantize_accumulator(big, 2.0**-10, 2.0**-10, 0, INT8)
    wide = TOSA.requantize_accumulator(big, 2.0**-13, 2.0**-14, 0, INT16, accumulator_width=64)
    assert int(wide) == 2**31 * 2.0**-27 / 2.0**-4


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


def plan_of(model: nn.Module, *shapes: tuple[int, ...], scheme: str = "a8w8") -> cq.Plan:
    example = tuple(torch.randn(shape) for shape in shapes)
    quantizer = cq.IntegerQuantizer(backend="tosa").set_global(scheme)
    return quantizer.plan(torch.export.export(model.eval(), example))


def test_averages_are_layers_with_scales_of_their_own() -> None:
    """TOSA's own pools share one scale, and are silently wrong where a graph has two."""
    model = Function(lambda _s, x: F.avg_pool2d(x, 2).mean((2, 3)))
    plan = plan_of(model, (2, 3, 8, 8))
    pool, mean = plan.ops
    assert (pool.node, pool.family, pool.placement) == (
        "avg_pool2d",
        "avg_pool2d",
        "integer kernel",
    )
    assert pool.note == "becomes conv"
    assert mean.note == "becomes reshape, linear"
    windows = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    uneven = plan_of(nn.Sequential(nn.Conv2d(3, 4, 1), windows), (2, 3, 8, 8)).op("avg_pool2d")
    assert uneven.scheme is None
    assert "its windows differ in size" in uneven.reason


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("a4w4", r"end at \[-8, 7\]; choose a8 or a16"),
        ("a8w8-narrow", r"end at \[-127, 127\]; choose a8 or a16"),
        ("dyn8w8", "dyn8w8 quantizes at run time"),
        ("a8w12", "no operator for weights of 12 bits"),
        ("a8w8-biasfloat", "adds integer biases only"),
    ],
)
def test_what_tosa_s_operators_do_not_take(scheme: str, reason: str) -> None:
    with pytest.raises(cq.ConfigError, match=reason):
        plan_of(nn.Linear(8, 4), (2, 8), scheme=scheme)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(4, 4, (2, 4), padding="same"), (1, 4, 8, 8), "padded differently"),
        (nn.ConvTranspose1d(4, 4, 3), (1, 4, 8), "in two dims only"),
        (nn.ConvTranspose2d(4, 4, 3, dilation=2), (1, 4, 8, 8), "with dilation"),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), (1, 4, 8, 8), "no grouped transposed"),
    ],
)
def test_layers_that_have_no_operator(
    layer: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(cq.ConfigError, match=reason):
        plan_of(layer, shape)


@pytest.mark.parametrize(
    ("scheme", "label", "size"),
    [
        ("a8w8", "tosa int8", 32 + 32),
        ("a8w4", "tosa int8, int4 weights", 16 + 32),
        ("a8w6", "tosa int8", 32 + 32),
        ("a16w8", "tosa int16", 32 + 32),
        ("a16w4", "tosa int16", 32 + 32),
    ],
)
def test_widths_of_a_layer(scheme: str, label: str, size: int) -> None:
    (op,) = plan_of(nn.Linear(8, 4), (2, 8), scheme=scheme).ops
    assert (op.backend, op.placement, op.size_bytes) == (label, "integer kernel", size)


def test_a_family_without_an_entry_stays_outside() -> None:
    plan = plan_of(nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1)), (2, 8))
    assert plan.op("softmax").placement == "outside"
    assert plan.op("softmax").reason == "TOSA has no integer softmax"


# ---------------------------------------------------------------------------------------------
# What is done before ExecuTorch sees a graph
# ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block: an activation behind a layer, one behind a sum, a layer before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return F.relu(x + self.second(x))


def block(scheme: str) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8),)
    return planned(Block(), example, scheme), example


def test_a_relu_that_saturation_does_is_dropped_and_any_other_stands_alone() -> None:
    graph, _ = block("a8w8")
    model = detached_copy(graph.model)
    assert [op.output.zero_point for op in graph.integer] == [-128, -12, -128]
    done = passes.run_passes(model, graph)
    assert done["explicit_activations"] == 2
    assert calls(model, aten.relu.default) == calls(model, aten.clamp.default) == []

    graph, _ = block("a16w8")
    model = detached_copy(graph.model)
    done = passes.run_passes(model, graph)
    assert calls(model, aten.relu.default) == []
    relus = [c for c in calls(model, aten.clamp.default) if c.args[1:] == (0.0, None)]
    assert len(relus) == done["explicit_activations"] == 2
    for clamp in relus:
        before, (behind,) = cast(Any, clamp.args[0]), clamp.users
        assert before.target is _q.dequantize_per_tensor.default
        assert before.args[1:] == behind.args[1:]


def test_an_int16_accumulator_saturates_before_it_is_added() -> None:
    graph, _ = block("a16w8")
    model = detached_copy(graph.model)
    assert passes.run_passes(model, graph)["saturation_before_sums"] == 1
    scale = scale_of(graph.integer[1].output)
    (whole,) = (c for c in calls(model, aten.clamp.default) if c.args[1] != 0.0)
    assert whole.args[1:] == ((-(2**15) - 1) * scale, 2**15 * scale)


def sums() -> tuple[Any, Inputs]:
    """Two sums on one scale: int32 to int8 to int32, by a factor of 1 in all."""
    example = (torch.full((2, 8), 7.0), torch.full((2, 8), 5.0))
    graph = planned(Function(lambda _s, x, y: (x + y) - x), example, "a8w8")
    for node in graph.model.graph.nodes:
        if "quantize" in str(node.target):
            node.args = (node.args[0], 0.0625, 0, *node.args[3:])
    return read_converted(graph.model, BACKEND), example


def test_two_sums_whose_scales_cancel_keep_the_rounding_between_them() -> None:
    """``FuseConsecutiveRescalesPass`` would drop it."""
    graph, _ = sums()
    model = detached_copy(graph.model)
    assert passes.run_passes(model, graph)["saturation_before_sums"] == 1


def test_no_tensor_is_split_for_several_readers() -> None:
    graph = planned(SplitAttention(), (torch.randn(2, 5, 16),), "a8w8")
    model = detached_copy(graph.model)
    assert passes.run_passes(model, graph)["parts_by_themselves"] == 3
    assert calls(model, aten.chunk.default) == []
    cut = calls(model, aten.slice.Tensor)
    assert [node.args[1:] for node in cut] == [(2, 0, 16), (2, 16, 32), (2, 32, 48)]
    assert len({node.args[0] for node in cut}) == 3  # a rounding of its own for each


def test_every_integer_op_is_marked_and_no_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4))
    graph = planned(model, (torch.randn(2, 8),), "a8w8")
    copy = detached_copy(graph.model)
    passes.run_passes(copy, graph)
    marked = [
        n.name for n in copy.graph.nodes if "_arm_annotation_info" in n.meta.get("custom", {})
    ]
    assert marked == ["linear", "linear_1"]


def test_a_bias_of_few_bits_is_written_with_its_shift_done() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    layer.bias.data.mul_(20)
    graph = planned(layer, (torch.randn(2, 8),), "a8w8-bias8")
    model = detached_copy(graph.model)
    assert passes.run_passes(model, graph)["biases_in_units"] == 1
    (call,) = calls(model, aten.linear.default)
    stored = cast(Any, call.args[2]).args[0]
    assert torch.equal(getattr(model, stored.target), cast(Tensor, graph.integer[0].bias))


def test_what_is_left_in_float_has_its_reason_in_the_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4))
    done = convert(model, (torch.randn(2, 8),), cq.IntegerQuantizer("tosa").set_global("a8w8"))
    (op,) = cq.integer_reference(done.graph, mode="tosa").float_ops
    assert op.reason == "TOSA has no integer softmax"


# ---------------------------------------------------------------------------------------------
# Calling it
# ---------------------------------------------------------------------------------------------


def test_without_the_tools_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    done = convert(
        nn.Linear(8, 4), (torch.randn(2, 8),), cq.IntegerQuantizer("tosa").set_global("a8w8")
    )
    monkeypatch.setitem(sys.modules, "tosa_serializer", None)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(
        cq.LoweringError,
        match=r"pip install --no-deps tosa-tools==2026\.5\.0 ml-dtypes==0\.5\.1",
    ):
        cq.lower(done.graph, done.example, backend="tosa")


def test_a_backend_that_makes_no_programs() -> None:
    with pytest.raises(cq.ConfigError, match="write them with save_integers or save_c"):
        cq.lower(nn.Module(), (), backend=None)  # type: ignore[call-overload]
    with pytest.raises(cq.ConfigError, match="there is no backend 'tflite'"):
        cq.lower(nn.Module(), (), backend="tflite")  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------
# Programs on the reference model
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def _tools() -> None:
    use_tools()


FAMILIES = [
    pytest.param(rule, scheme, id=f"{rule.family}-{scheme}")
    for rule in REGISTRY
    if rule.family in BACKEND.kernels and rule.integers is not None and cases_of(rule)
    for scheme in ("a8w8", "a16w8", *(("a8w4", "a16w4") if rule.family in WITH_WEIGHTS else ()))
]


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize(("rule", "scheme"), FAMILIES)
def test_every_family_equals_the_reference(rule: OpRule, scheme: str) -> None:
    """On inputs that saturate, too; ops are where the plan says, in one TOSA program."""
    graph, program, found = run_cases(rule, cases_of(rule), scheme)
    assert found == []
    assert program.report.programs == 1
    integer = {op.node.name for op in graph.integer}
    placed = {row.node for row in program.report.ops if row.backend is not kernels.OUTSIDE}
    assert placed == integer
    assert program.buffer[4:8] == b"TOSA"


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_the_reference(name: str, scheme: str) -> None:
    model, calibration, images = network(name)
    size = len(images) // 2
    quantizer = cq.IntegerQuantizer("tosa").set_global(scheme)
    batches = [(batch,) for batch in calibration.split(size)]
    converted = convert(model, (images[:size],), quantizer, batches).graph
    program = cq.lower(converted, (images[:size],), backend="tosa")
    assert program.report.tally.count(Placement.OUTSIDE) == 0
    one, another = program.run(images[:size])[:2]
    assert (one != another).float().mean() > 0.5
    outputs = len(images) * (10 if name == "ResNet-20" else 1000)
    assert program.differing([(batch,) for batch in images.split(size)]) == (0, outputs)


class _WithPools(TosaArithmetic):
    """Averages between two scales, which no operator of TOSA computes."""

    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor:
        mean = windows.total().to(torch.float64) / windows.counts
        stored = torch.floor(mean * (scale_of(src) / scale_of(dst)) + 0.5).to(torch.int64)
        return store(stored + dst.zero_point, dst)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_verification_catches_a_pool_between_two_scales() -> None:
    """A tampered plan: the pool is not made a layer, and may have scales of its own."""
    tampered = replace(
        BACKEND,
        arithmetic=_WithPools(),
        kernels={
            **BACKEND.kernels,
            "avg_pool2d": Support(BACKEND.kernels["max_pool2d"].delegation),
        },
        legalize=lambda model, training: legalize_by(model, LEGALIZATIONS, training=training),
    )
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8),)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))
    graph = planned(model, example, "a8w8", tampered)
    with pytest.raises(cq.VerificationError, match=r"avg_pool2d \(1\): the TOSA program computes"):
        lower_graph(graph, example)
    checked = cq.verify(graph.model, lower_graph(graph, example, check=False), [example])
    assert not checked.bit_exact
    assert str(checked.first).startswith("avg_pool2d (1): output: ")
    assert lower_graph(planned(model, example, "a8w8"), example).report.programs == 1


def _but(*names: str) -> list[Any]:
    return [each for each in passes.PASSES if each.__name__ not in names]


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_verification_catches_a_relu_that_int16_saturation_does_not_do() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8),)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    graph = planned(model, example, "a16w8")
    with pytest.raises(cq.VerificationError, match=r"conv2d \(0\): .* outputs differ on the"):
        lower_graph(graph, example, passes=_but("explicit_activations"))
    wrong = lower_graph(graph, example, check=False, passes=_but("explicit_activations"))
    checked = cq.verify(graph.model, wrong, [example])
    assert (checked.bit_exact, checked.exact_expected) == (False, True)
    assert cast(Any, checked.first).node in ("conv2d", "relu")
    right = cq.verify(graph.model, lower_graph(graph, example), [example])
    assert (right.bit_exact, right.constants_equal, right.first) == (True, None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
def test_verification_catches_a_sum_of_what_did_not_saturate(scheme: str) -> None:
    graph, example = sums() if scheme == "a8w8" else block(scheme)
    example = tuple(value * 50 for value in example)  # let what comes before the sum saturate
    with pytest.raises(cq.VerificationError, match="outputs differ on the example"):
        lower_graph(graph, example, passes=_but("saturation_before_sums"))
    lower_graph(graph, example)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_what_executorch_leaves_out_is_an_error() -> None:
    tampered = replace(
        BACKEND,
        kernels={
            **BACKEND.kernels,
            "conv_transpose": replace(BACKEND.kernels["conv_transpose"], refuses=lambda _match: ""),
        },
    )
    example = (torch.randn(2, 4, 8, 8),)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=2))
    graph = planned(model, example, "a8w8", tampered)
    with pytest.raises(cq.LoweringError, match="conv_transpose2d: planned on integers, but"):
        lower_graph(graph, example)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_a_program_with_float_between(tmp_path: Any) -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 8),)
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4))
    graph = planned(model, example, "a8w8-bias16")
    program = lower_graph(graph, example)
    assert program.report.programs == len(program.buffers) == 2
    assert "aten::_softmax" in program.report.outside
    assert program.differing([(torch.randn(2, 8),) for _ in range(3)]) == (0, 24)
    checked = cq.verify(graph.model, program, [example], float_model=model)
    assert checked.bit_exact
    assert not checked.exact_expected
    assert checked.inexact_ops == ("softmax: TOSA has no integer softmax",)
    assert "the file's constants were not read back" in str(checked)
    with pytest.raises(cq.LoweringError, match=r"2 TOSA programs with calls between .*softmax"):
        program.save(tmp_path / "net.tosa")
    with pytest.raises(cq.InputError, match=r"input 0 must have shape \(2, 8\), got \(3, 8\)"):
        program.run(torch.randn(3, 8))


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_a_dynamic_batch_becomes_that_of_the_example(tmp_path: Any) -> None:
    torch.manual_seed(0)
    example = (torch.randn(3, 4, 8, 8),)
    model = Function(lambda s, x: s.c(x).mean((2, 3)).flatten(1), c=nn.Conv2d(4, 4, 3))
    quantizer = cq.IntegerQuantizer("tosa").set_global("a8w8")
    done = convert(
        model, example, quantizer, dynamic_shapes=(({0: torch.export.Dim("n", max=8)},),)
    )
    program = cq.lower(done.graph, example, backend="tosa")
    assert program.differing([example]) == (0, 12)
    assert program.save(tmp_path / "net.tosa").read_bytes() == program.buffer


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_products_of_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    example = (torch.randn(3, 2, 4, 8),)
    model = Function(lambda s, x: s.a(x) @ x.transpose(2, 3), a=nn.Linear(8, 8))
    sizes = (({0: torch.export.Dim("n", max=8), 2: torch.export.Dim("m", max=8)},),)
    done = convert(
        model, example, cq.IntegerQuantizer("tosa").set_global("a8w8"), dynamic_shapes=sizes
    )
    assert cq.lower(done.graph, example, backend="tosa").differing([example]) == (0, 96)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_parts_of_a_dynamic_batch() -> None:
    """Nothing that is planned on integers is left out, whatever is cut on which side."""
    torch.manual_seed(0)
    example = (torch.randn(3, 5, 16),)
    sizes = ({0: torch.export.Dim("n", max=8)},)
    quantizer = cq.IntegerQuantizer("tosa").set_global("a8w8")
    done = convert(UnboundAttention(), example, quantizer, dynamic_shapes=sizes)
    assert cq.lower(done.graph, example, backend="tosa").differing([example]) == (0, 240)


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
def test_last_bits_of_float_ops_outside_are_no_wrong_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 8),)
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4), nn.Softplus())
    graph = planned(model, example, "a8w8")
    run = TosaProgram.run
    off = 1 + 1e-6

    def nudged(program: TosaProgram, *inputs: Tensor) -> Any:
        values = run(program, *inputs)
        many = isinstance(values, tuple)  # the integer tensors, and then the output
        return (*values[:-1], values[-1] * off) if many else values * off

    monkeypatch.setattr(TosaProgram, "run", nudged)
    program = lower_graph(graph, example)
    checked = cq.verify(graph.model, program, [example])
    assert not checked.bit_exact
    assert checked.tensors is not None
    assert checked.tensors.equal == checked.tensors.tensors == 4
    off = 1.01
    with pytest.raises(cq.VerificationError, match="8 of 8 outputs differ"):
        lower_graph(graph, example)


class Attention(nn.Module):
    """One head more than none, between a norm and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        normed = self.norm(x)
        q, k, v = (
            layer(normed).view(batch, tokens, 2, 8).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) * 0.35).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class SplitAttention(nn.Module):
    """Queries, keys and values of one layer; softmax is outside, between what reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.reshape(batch, tokens, 2, 8).transpose(1, 2) for part in parts)
        return self.attend(q, k, v).reshape(batch, tokens, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * 0.35).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class UnboundAttention(SplitAttention):
    """The same, as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return self.attend(*parts.unbind(0))


def _chain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 10)),
    )


def _tosa(scheme: str) -> cq.IntegerQuantizer:
    return cq.IntegerQuantizer("tosa").set_global(scheme)


IMAGE, TOKENS, ROWS = (2, 3, 8, 8), (2, 5, 16), (4, 8)
COMBINATIONS: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
    "16 bits in the middle": (
        _chain,
        (IMAGE,),
        lambda: _tosa("a8w8").set_module_name("2", "a16w8"),
    ),
    "8 bits in the middle": (_chain, (IMAGE,), lambda: _tosa("a16w8").set_module_name("2", "a8w4")),
    "float in the middle": (_chain, (IMAGE,), lambda: _tosa("a8w8").set_module_name("2", None)),
    "inputs and outputs": (_chain, (IMAGE,), lambda: _tosa("a16w8").set_io("a8", "a8")),
    "integers at the border": (
        _chain,
        (IMAGE,),
        lambda: _tosa("a16w8").set_io("a8", "a16", integer=True),
    ),
    "planned for XNNPACK": (_chain, (IMAGE,), lambda: cq.IntegerQuantizer().set_global("a8w8")),
    "one scale, bias of 8 bits": (_chain, (IMAGE,), lambda: _tosa("a16w8-per_tensor-bias8")),
    "attention": (Attention, (TOKENS,), lambda: _tosa("a8w8")),
    "attention, 16 bits": (Attention, (TOKENS,), lambda: _tosa("a16w8")),
    "a layer used twice": (
        lambda: Function(lambda s, x: s.c(F.relu(s.c(x)) * 3) + x, c=nn.Linear(8, 8)),
        (ROWS,),
        lambda: _tosa("a8w8-bias8"),
    ),
    "a move before a sum, 16 bits": (
        lambda: Function(lambda s, x: s.c(x).t() + x.t(), c=nn.Linear(8, 8)),
        (ROWS,),
        lambda: _tosa("a16w8"),
    ),
    "gates": (
        lambda: Function(
            lambda s, x: torch.sigmoid(s.a(x)) * torch.tanh(s.b(x)),
            a=nn.Linear(8, 8),
            b=nn.Linear(8, 8),
        ),
        (ROWS,),
        lambda: _tosa("a16w8"),
    ),
    "parts on both sides of an op outside": (SplitAttention, (TOKENS,), lambda: _tosa("a8w8")),
    "unbound on both sides of an op outside": (UnboundAttention, (TOKENS,), lambda: _tosa("a8w8")),
    "three outputs and an input that nothing reads": (
        lambda: Function(lambda s, x, _y: (s.a(x), F.relu(s.a(x)), x), a=nn.Linear(8, 8)),
        (ROWS, (2,)),
        lambda: _tosa("a8w8"),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_equal_the_reference(name: str) -> None:
    build, shapes, quantizer = COMBINATIONS[name]
    torch.manual_seed(0)
    example = tuple(torch.randn(shape) for shape in shapes)
    graph = convert(build(), example, quantizer()).graph
    program = cq.lower(graph, example, backend="tosa")
    inputs = [tuple(torch.randn(shape) * size for shape in shapes) for size in (1, 3, 100)]
    assert program.differing(inputs)[0] == 0
