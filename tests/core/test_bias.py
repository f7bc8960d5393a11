"""The derived int32 bias: its scale, its rounding, and what gives way when it does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import Function, calls, lowered_exactly, quantized
from support.models import conv
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.core.bias import (
    MAX_EXACT_BIAS,
    bias_shift,
    derived_scale,
    quantize_bias,
    raise_scale,
)
from custom_quantizer.core.graph import constant_of, is_dequantize, qparams_of
from custom_quantizer.reference.converted import read_converted

aten = torch.ops.aten
INT32_MAX = 2**31 - 1

# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive float32 numbers, spread over the exponents."""
    return st.tuples(
        st.floats(np.log2(low), np.log2(high)), st.floats(1, 2, exclude_max=True, width=32)
    ).map(lambda pair: float(np.float32(np.clip(2.0 ** pair[0] * pair[1], low, high))))


SCALES = floats(1e-12, 1e4)
SIGNED = st.tuples(floats(1e-20, 1e20), st.sampled_from([-1.0, 0.0, 1.0])).map(
    lambda pair: pair[0] * pair[1]
)


@given(SIGNED, SCALES, SCALES)
def test_a_bias_is_rounded_to_the_nearest_unit_of_the_accumulator(
    bias: float, input_scale: float, weight_scale: float
) -> None:
    got = quantize_bias(torch.tensor([bias]), input_scale, torch.tensor([weight_scale]))
    assert got.dtype is torch.int32
    exact = Fraction(float(np.float32(bias))) / (Fraction(input_scale) * Fraction(weight_scale))
    if abs(exact) >= INT32_MAX:
        assert int(got) == (INT32_MAX if exact > 0 else -INT32_MAX)
    else:
        # The product is exact in float64 (24 + 24 bits), the quotient is rounded once.
        assert abs(int(got) - exact) <= Fraction(1, 2) + abs(exact) * Fraction(1, 2**52)


@pytest.mark.parametrize(
    ("bias", "integer"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (0.49999997, 0), (3.0, 3)],
)
def test_ties_go_to_the_even_integer(bias: float, integer: int) -> None:
    assert quantize_bias(torch.tensor([bias]), 1.0, torch.tensor(1.0)).tolist() == [integer]


@pytest.mark.parametrize(
    ("bias", "integer"),
    [
        (2147483520.0, 2147483520),  # the largest float32 below 2**31
        (2147483648.0, INT32_MAX),
        (1e30, INT32_MAX),
        (-2147483520.0, -2147483520),
        (-2147483648.0, -INT32_MAX),
        (-1e30, -INT32_MAX),
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_sign_never_wraps(bias: float, integer: int, per_channel: bool) -> None:
    """PyTorch's own quantize makes -2**31 of a positive overflow (on x86)."""
    scale = torch.ones(3) if per_channel else torch.tensor(1.0)
    assert quantize_bias(torch.full((3,), bias), 1.0, scale).tolist() == [integer] * 3


@given(SCALES, st.lists(SCALES, min_size=1, max_size=4))
def test_the_derived_scale_is_the_product_rounded_once(
    input_scale: float, weight_scale: list[float]
) -> None:
    got = derived_scale(input_scale, torch.tensor(weight_scale))
    assert got.dtype is torch.float32
    wanted = [float(np.float32(input_scale * w)) for w in weight_scale]
    assert got.tolist() == wanted


# ---------------------------------------------------------------------------------------------
# Raising the weight scale
# ---------------------------------------------------------------------------------------------

LIMITS = st.sampled_from([1, 7, 127, 32767, MAX_EXACT_BIAS, 1 << 30])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[tuple[float, Tensor]], int]:
    """Weight scales, and the biases of the ops that use the weight."""
    channels = draw(st.integers(1, 5))
    per_tensor = draw(st.booleans())
    size = 1 if per_tensor else channels
    scales = torch.tensor(draw(st.lists(SCALES, min_size=size, max_size=size)))
    if per_tensor:
        scales = scales[0]
    users = draw(st.integers(1, 3))
    constraints = [
        (
            draw(SCALES),
            torch.tensor(draw(st.lists(SIGNED, min_size=channels, max_size=channels))),
        )
        for _ in range(users)
    ]
    return scales, constraints, draw(LIMITS)


Problem = tuple[Tensor, list[tuple[float, Tensor]], int]


@given(problems())
def test_with_the_raised_scale_every_bias_fits(problem: Problem) -> None:
    scale, constraints, limit = problem
    raised = raise_scale(scale, constraints, limit)
    assert raised.dtype is torch.float32
    assert raised.shape == scale.shape
    for input_scale, bias in constraints:
        assert int(quantize_bias(bias, input_scale, raised).abs().max()) <= limit


@given(problems())
def test_no_scale_falls_and_those_that_fit_stay(problem: Problem) -> None:
    scale, constraints, limit = problem
    raised = raise_scale(scale, constraints, limit)
    assert bool((raised >= scale).all())
    for channel in range(scale.numel()):
        fits = all(
            float(_channel(bias, channel, scale).abs().max())
            <= input_scale * float(scale.reshape(-1)[channel].double()) * (limit - 0.5)
            for input_scale, bias in constraints
        )
        if fits:
            assert raised.reshape(-1)[channel] == scale.reshape(-1)[channel]


@pytest.mark.parametrize("weight", [1e-37, [1e-37, 0.5]])
def test_the_scale_of_a_bias_is_normal(weight: float | list[float]) -> None:
    """Weights so small that their products with the input vanish count as zero."""
    scale, tiny = torch.tensor(weight), float(torch.finfo(torch.float32).tiny)
    raised = raise_scale(scale, [(1e-3, torch.zeros(scale.numel()))])
    derived = derived_scale(1e-3, raised).reshape(-1)
    assert float(derived.min()) == tiny
    assert float(derived[-1]) == (tiny if scale.dim() == 0 else float(torch.tensor(0.5) * 1e-3))


@given(problems())
def test_the_raised_scale_is_the_smallest(problem: Problem) -> None:
    """One unit in the last place less, and some bias has no half unit of room left."""
    scale, constraints, limit = problem
    raised = raise_scale(scale, constraints, limit)
    below = torch.nextafter(raised, torch.tensor(0.0))
    for channel in range(scale.numel()):
        if raised.reshape(-1)[channel] == scale.reshape(-1)[channel]:
            continue
        room = [
            float(below.reshape(-1)[channel].double()) * input_scale * (limit - 0.5)
            - float(_channel(bias, channel, scale).double().abs().max())
            for input_scale, bias in constraints
        ]
        # Exactly at the limit a rounding of the bound decides.
        largest = max(float(bias.abs().max()) for _, bias in constraints)
        assert min(room) <= 2.0**-50 * largest


def _channel(bias: Tensor, channel: int, scale: Tensor) -> Tensor:
    return bias if scale.dim() == 0 else bias[channel]


@given(problems(), st.integers(0, 4), st.floats(1, 1e6))
def test_a_larger_bias_never_lowers_a_scale(problem: Problem, which: int, factor: float) -> None:
    scale, constraints, limit = problem
    before = raise_scale(scale, constraints, limit)
    input_scale, bias = constraints[which % len(constraints)]
    larger = [*constraints, (input_scale, bias * factor)]
    assert bool((raise_scale(scale, larger, limit) >= before).all())


@given(problems())
def test_the_order_of_the_ops_does_not_matter(problem: Problem) -> None:
    scale, constraints, limit = problem
    forward = raise_scale(scale, constraints, limit)
    assert torch.equal(raise_scale(scale, constraints[::-1], limit), forward)
    # Raising twice is raising once.
    assert torch.equal(raise_scale(forward, constraints, limit), forward)


@given(
    st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([7, 127, 32767]),
)
def test_a_narrow_bias_is_shifted_no_farther_than_it_must(
    bias: list[float], per_tensor: bool, quant_max: int
) -> None:
    """Half a step above the largest integer is as far as rounding reaches."""
    values, unit = torch.tensor(bias), Fraction(1, 8)
    scale = torch.tensor(0.25) if per_tensor else torch.full((len(bias),), 0.25)
    shift = bias_shift(values, 0.5, scale, quant_max)
    assert shift.dtype is torch.int64
    assert shift.shape == scale.shape
    groups = [bias] if per_tensor else [[value] for value in bias]
    for group, found in zip(groups, shift.reshape(-1).tolist(), strict=True):
        steps = max(abs(Fraction(value)) for value in group) / unit
        room = Fraction(2 * quant_max + 1, 2)
        assert steps <= room * 2**found
        assert found == 0 or steps > room * 2 ** (found - 1)


@pytest.mark.parametrize("exponent", [0, 1, 5])
def test_the_shift_of_a_bias_at_the_end_of_its_range(exponent: int) -> None:
    end = torch.tensor(127.5 * 2**exponent)
    beyond = torch.nextafter(end, torch.tensor(torch.inf))
    shifts = bias_shift(torch.stack([end, beyond]), 1.0, torch.ones(2), 127)
    assert shifts.tolist() == [exponent, exponent + 1]


# ---------------------------------------------------------------------------------------------
# In a graph
# ---------------------------------------------------------------------------------------------


def _bias_of(graph: GraphModule, node: Node) -> Tensor:
    dequantize = cast(Node, node.args[2])
    return constant_of(graph, cast(Node, dequantize.args[0]))


def _units(graph: GraphModule, node: Node) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Input scale times weight scale in float64, without the package's own product."""
    data, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
    scale = qparams_of(graph, weight).scale
    given = np.asarray(scale if isinstance(scale, float) else scale.numpy(), dtype=np.float64)
    units: np.ndarray[Any, np.dtype[np.float64]] = float(cast(float, data.args[1])) * given
    return units


def check_biases(graph: GraphModule, floats: dict[str, Tensor]) -> None:
    """Every named call has the int32 bias that its float bias gives."""
    found = {op.node.name: op.node for op in read_converted(graph).integer}
    for name, bias in floats.items():
        node = found[name]
        wanted = np.rint(bias.detach().numpy().astype(np.float64) / _units(graph, node))
        integers = _bias_of(graph, node)
        assert integers.dtype is torch.int32
        assert np.array_equal(integers.numpy(), wanted), name
        assert int(integers.abs().max()) <= MAX_EXACT_BIAS, name


# What a graph has of a bias does not depend on the kind of weight scale.
SCHEME = pytest.mark.parametrize("scheme", slow_but(["a8w8"], ["a8w8", "a8w8-per_tensor"]))


def image(*channels: int) -> Tensor:
    return torch.randn(2, *(channels or (4,)), 6, 6)


def test_a_module_called_twice_has_one_weight_and_a_bias_for_each_call() -> None:
    model = Function(lambda s, x: (s.conv(x), s.conv(x * 50.0)), conv=conv())
    x = image()
    graph = quantized(model, (x,))
    check_biases(graph, dict.fromkeys(("conv2d", "conv2d_1"), model.conv.bias))
    one, two = calls(graph, aten.conv2d.default)
    assert cast(Node, one.args[1]).args[0] is cast(Node, two.args[1]).args[0]
    assert _bias_of(graph, one).tolist() != _bias_of(graph, two).tolist()
    lowered_exactly(graph, (x,))


@SCHEME
def test_weights_and_biases_shared_between_modules(scheme: str) -> None:
    model = Function(
        lambda s, x: (s.a(x), s.b(x * 30.0), s.c(x * 0.01)), a=conv(), b=conv(), c=conv()
    )
    model.b.weight = model.a.weight
    model.c.bias = model.a.bias
    x = image()
    graph = quantized(model, (x,), scheme)
    a, b, c = model.a.bias, model.b.bias, model.c.bias
    check_biases(graph, {"conv2d": a, "conv2d_1": b, "conv2d_2": c})
    assert lowered_exactly(graph, (x,)).report.fully_delegated


def test_a_weight_shared_by_a_convolution_and_a_transposed_one() -> None:
    """One tensor, two axes of output channels: each use has scales of its own."""
    weight, bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(s: Any, x: Tensor) -> Any:
        return F.conv2d(x, s.weight, s.bias), F.conv_transpose2d(x * 9, s.weight, s.bias)

    model = Function(forward)
    model.weight, model.bias = weight, bias
    x = image()
    graph = quantized(model, (x,))
    check_biases(graph, {"conv2d": bias, "conv_transpose2d": bias})
    axes = [
        qparams_of(graph, cast(Node, n.args[1])).axis
        for t in (aten.conv2d.default, aten.conv_transpose2d.input)
        for n in calls(graph, t)
    ]
    assert axes == [0, 1]
    lowered_exactly(graph, (x,))


def test_a_weight_raised_for_one_call_is_raised_for_all() -> None:
    """The second call's input is small, so that its bias needs many units: one weight for both."""
    model = Function(lambda s, x: (s.conv(x), s.conv(x * 1e-3)), conv=conv())
    nn.init.constant_(model.conv.bias, 3.0)
    x = image()
    graph = quantized(model, (x,))
    check_biases(graph, dict.fromkeys(("conv2d", "conv2d_1"), model.conv.bias))
    biases = [int(_bias_of(graph, n).abs().max()) for n in calls(graph, aten.conv2d.default)]
    assert biases[1] in (MAX_EXACT_BIAS - 1, MAX_EXACT_BIAS)
    assert biases[0] < MAX_EXACT_BIAS // 900
    lowered_exactly(graph, (x,))


def test_a_wide_call_leaves_the_bias_of_a_narrow_one_within_its_limit() -> None:
    """Above 8 bits a bias may be larger: not so where the same weight also runs in int8."""
    model = Function(lambda s, x: (s.conv(x), s.conv(x * 30.0)), conv=conv())
    with torch.no_grad():
        model.conv.bias *= 1e6
    x = image()
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("conv2d_1", "a16w8")
    graph = quantized(model, (x,), quantizer)
    check_biases(graph, {"conv2d": model.conv.bias})
    lowered_exactly(graph, (x,))


@pytest.mark.parametrize(("scheme", "kept"), [("a8w8", False), ("a16w8", True)])
def test_a_bias_above_8_bits_may_be_larger(scheme: str, kept: bool) -> None:
    """It does not pass through the serializer, which has 24 bits for it."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.fill_(2.0**-10)
        layer.bias.copy_(torch.tensor([2.0**-7, 0.0]))
    graph = quantized(
        Function(lambda s, x: s.layer(x), layer=layer), (torch.ones(1, 4) / 16,), scheme
    )
    (node,) = calls(graph, aten.linear.default)
    largest = int(_bias_of(graph, node).max())
    raised = cast(Node, node.args[1]).meta[META_KEY]["raised"]
    assert (largest > MAX_EXACT_BIAS) is kept
    assert (raised == {}) is kept


def test_one_call_in_float_leaves_the_other_its_bias() -> None:
    model = Function(lambda s, x: (s.conv(x), s.conv(x * 50.0)), conv=conv())
    x = image()
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_node_name("conv2d_1", None)
    graph = quantized(model, (x,), quantizer)
    check_biases(graph, {"conv2d": model.conv.bias})
    one, two = calls(graph, aten.conv2d.default)
    assert cast(Node, two.args[1]).op == "get_attr"
    assert torch.equal(graph.get_parameter(str(cast(Node, two.args[1]).target)), model.conv.weight)
    lowered = cq.lower(graph, (x,))
    assert lowered.integer_biases().keys() == {one.name}


def test_constants_used_outside_of_convolutions_keep_their_values() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return F.relu(s.conv(x)) + (s.conv.bias * 2).view(1, -1, 1, 1), s.conv.weight.max()

    model = Function(forward, conv=conv())
    x = image()
    graph = quantized(model, (x,))
    check_biases(graph, {"conv2d": model.conv.bias})
    with torch.no_grad():
        assert float(graph(x)[1]) == float(model.conv.weight.max())
    lowered_exactly(graph, (x,))


@pytest.mark.parametrize("groups", slow_but([2, 4], [1, 2, 4]))
@pytest.mark.parametrize("out", slow_but([4], [4, 8]))
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-per_tensor"])
def test_transposed_convolutions_keep_the_order_of_their_channels(
    groups: int, out: int, scheme: str
) -> None:
    model: Any = nn.ConvTranspose2d(4, out, 3, groups=groups)
    with torch.no_grad():
        # Channels far apart, so that no two can be taken for each other.
        model.bias.copy_(torch.arange(1, out + 1) * torch.tensor([1.0, -1.0]).repeat(out // 2))
        model.weight *= torch.arange(1, out // groups + 1).reshape(1, -1, 1, 1)
    x = image()
    graph = quantized(model, (x,), scheme)
    check_biases(graph, {"conv_transpose2d": model.bias})
    # Where nothing is added to it, the output is the bias, to half a unit and its own scale's.
    zero = torch.zeros_like(x)
    reference = cq.integer_reference(graph)
    got = reference(zero)[0, :, 0, 0]
    scale = float(graph.graph.find_nodes(op="output")[0].args[0][0].args[1])
    assert bool(((got - model.bias).abs() <= 0.51 * scale + 1e-3).all())
    lowered = lowered_exactly(graph, (x,))
    (stored,) = lowered.integer_biases().values()
    assert np.array_equal(stored, _bias_of(graph, calls(graph, aten.conv_transpose2d.input)[0]))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        # Of convolutions the contract in tests/ops checks the same.
        pytest.param(
            *(lambda: nn.Conv2d(4, 4, 3, bias=False), aten.conv2d.default), marks=pytest.mark.slow
        ),
        (lambda: nn.ConvTranspose2d(4, 4, 3, bias=False), aten.conv_transpose2d.input),
    ],
)
def test_a_bias_that_only_folding_makes_is_quantized(
    make: Callable[[], nn.Module], target: Any
) -> None:
    norm: Any = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.normal_()
    x = image()
    model = nn.Sequential(make(), norm)
    graph = quantized(model, (x,))
    (node,) = calls(graph, target)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    folded = norm.bias.double() - mean / (variance + norm.eps).sqrt()
    wanted = folded.detach().numpy() / _units(graph, node)
    # Folding happens in float32: a few of its units, and half of the bias's own.
    assert np.all(np.abs(_bias_of(graph, node).numpy() - wanted) <= 0.5 + 1e-6 * np.abs(wanted))
    assert lowered_exactly(graph, (x,)).report.fully_delegated


def _from_input(s: Any, x: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, s.conv.weight, bias)


@SCHEME
@pytest.mark.parametrize("forward", [_from_input])
def test_a_bias_that_is_not_a_constant_stays_in_float_and_is_reported(
    forward: Callable[..., Tensor], scheme: str
) -> None:
    model = Function(lambda s, x, b: s.head(forward(s, x, b)), conv=conv(), head=conv())
    inputs = (image(), torch.randn(4))
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    graph = quantized(model, inputs, quantizer)
    (bias,) = (t for t in quantizer.last_plan.op("conv2d").tensors if t.role == "bias")
    assert (bias.dtype, bias.group) == ("float32", None)
    assert "computed by" in bias.reason
    assert not is_dequantize(calls(graph, aten.conv2d.default)[0].args[2])
    check_biases(graph, {"conv2d_1": model.head.bias})
    # It lowers, in float where it must, and says so.
    lowered = cq.lower(graph, inputs)
    row = next(op for op in lowered.report.ops if op.node == "conv2d")
    assert row.backend.label != "xnnpack int8"
    assert row.reason == "its bias is in float"
    worst = (lowered.run(*inputs) - graph(*inputs)).abs().max()
    scale = float(graph.graph.find_nodes(op="output")[0].args[0][0].args[1])
    assert float(worst) <= 1.01 * scale  # a float sum in another order may move a tie


# ---------------------------------------------------------------------------------------------
# Biases that are hard to hold
# ---------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (conv, (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 6, 6)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), (2, 4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 4), (5, 4)),
}


class Layers(nn.Module):
    """All layers, each with its own input and output: one lowering for all."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for make, _ in LAYERS.values())
        with torch.no_grad():
            for layer in self.layers:
                change(layer)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]

    @staticmethod
    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape) for _, shape in LAYERS.values())


def _scaled(factor: float) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        layer.bias *= factor

    return change


def _one_channel(layer: Any) -> None:
    layer.bias.copy_(torch.tensor([1e9, 0.0, -1e-3, 1.0]))


def _dead_weights(layer: Any) -> None:
    layer.weight.zero_()


def _dead_channels(layer: Any) -> None:
    (layer.weight[0] if layer.weight.dim() == 2 else layer.weight[:, :1]).zero_()
    layer.bias[0] = 2.0


def _no_bias_left(layer: Any) -> None:
    layer.bias.zero_()


def _all_dead(layer: Any) -> None:
    layer.weight.zero_()
    layer.bias.zero_()


def _tiny_weights(layer: Any) -> None:
    layer.weight *= 1e-20


HARD: dict[str, Callable[[Any], None]] = {
    "1e3 times": _scaled(1e3),
    "1e6 times": _scaled(1e6),
    "1e9 times": _scaled(1e9),
    "one channel of 1e9": _one_channel,
    "dead weights": _dead_weights,
    "dead channels": _dead_channels,
    "zero biases": _no_bias_left,
    "all zero": _all_dead,
    "tiny weights": _tiny_weights,
}


QUICK = {
    ("1e9 times", "a8w8-per_tensor"),
    ("dead channels", "a8w8"),
    ("all zero", "a8w8"),
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    slow_but(QUICK, itertools.product(HARD, ("a8w8", "a8w8-per_tensor"))),
)
def test_hard_biases_are_exact_in_the_file(name: str, scheme: str) -> None:
    model, inputs = Layers(HARD[name]), Layers.inputs()
    graph = quantized(model, inputs, scheme)
    ops = read_converted(graph).with_bias()
    assert len(ops) == len(LAYERS)
    for op, layer in zip(ops, model.layers, strict=True):
        check_biases(graph, {op.node.name: cast(Tensor, layer.bias)})
    lowered = lowered_exactly(graph, inputs)
    stored = lowered.integer_biases()
    for op in ops:
        assert np.array_equal(stored[op.node.name], cast(Tensor, op.bias).numpy())
    assert lowered.report.fully_delegated


@pytest.mark.parametrize("name", ["1e6 times", "one channel of 1e9"])
def test_what_was_raised_is_reported_with_its_factor(name: str) -> None:
    model, inputs = Layers(HARD[name]), Layers.inputs()
    plain = quantized(Layers(_no_bias_left), inputs)
    graph = quantized(model, inputs)
    for op, layer in zip(read_converted(graph).with_bias(), model.layers, strict=True):
        weight = cast(Node, op.match.weight)
        raised = weight.meta[META_KEY]["raised"]
        bias = cast(Tensor, layer.bias)
        if name.startswith("one"):
            assert list(raised) == [0]
        else:
            assert set(raised) == set(range(len(raised)))
        scale = np.asarray(cast(Any, qparams_of(graph, weight).scale), dtype=np.float64)
        maximum = cast(Tensor, layer.weight).detach().abs()
        axis = op.match.weight_axis
        others = [d for d in range(maximum.dim()) if d != axis]
        own = maximum.amax(others) if scale.ndim else maximum.max()
        for channel, factor in raised.items():
            before = float(own.reshape(-1)[channel]) / 127
            assert factor == pytest.approx(float(scale.reshape(-1)[channel]) / before, rel=1e-6)
            assert factor > 1
        assert bias is not None
    for op in read_converted(plain).with_bias():
        assert cast(Node, op.match.weight).meta[META_KEY]["raised"] == {}


def test_a_float_bias_on_request() -> None:
    model, x = conv(), image()
    quantizer = cq.IntegerQuantizer().set_global("a8w8-biasfloat")
    graph = quantized(model, (x,), quantizer)
    (bias,) = (t for t in quantizer.last_plan.op("conv2d").tensors if t.role == "bias")
    assert (bias.dtype, bias.reason) == ("float32", "a8w8-biasfloat leaves it in float")
    assert read_converted(graph).with_bias() == ()
