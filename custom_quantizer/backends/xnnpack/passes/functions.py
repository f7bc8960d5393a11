"""Functions of one tensor: what the delegate lacks, and tables that every kernel fills alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import LEAST_THRESHOLD
from custom_quantizer.backends.xnnpack.passes._pass import (
    FLOAT32_MAX,
    Builder,
    Numbers,
    Steps,
    calls,
    graph_pass,
    in_steps,
    is_wide,
    quantized_neighbours,
    replace,
)
from custom_quantizer.backends.xnnpack.tables import (
    delegated_function,
    function_offset,
    sigmoid_qparams,
)
from custom_quantizer.core.arithmetic import round_to_float32
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    argument,
    constant_of,
    is_constant,
    is_float32,
    qparams_of,
    reads_sizes,
    shape_of,
)
from custom_quantizer.ops.functions import (
    ELU,
    FUNCTIONS,
    GELU,
    HARDSIGMOID,
    MISH,
    PRELU,
    RECIPROCAL,
    SILU,
    SOFTPLUS,
    elu_factors,
    is_tanh_gelu,
    softplus_factors,
)

aten = torch.ops.aten


def _int8_neighbours(node: Node) -> tuple[Node, Node] | None:
    """``(dequantize before, quantize after)`` of a function between integers of up to 8 bits."""
    around = quantized_neighbours(node)
    return None if around is None or any(is_wide(side) for side in around) else around


@graph_pass(
    "functions with a result next to the middle between two integers",
    "the same plus some ten-thousandths of a step, as the integer reference adds them",
    exact=False,
)
def tie_break_offsets(model: GraphModule) -> int:
    """An offset moves entries of a table away from the middle between two integers.

    See ``tie_break_offset`` in ``arithmetic.py``; the integer reference adds the same.
    """
    count = 0
    for node in calls(model, frozenset(FUNCTIONS) - SILU.targets - _IN_STEPS):
        around, function = _int8_neighbours(node), delegated_function(node)
        if around is None or function is None:
            continue
        before, after = around
        offset = function_offset(function, qparams_of(model, before), qparams_of(model, after))
        if offset == 0.0:
            continue
        build = Numbers(model, after, Builder(model, node).origin)
        after.args = (build.call(aten.add.Tensor, node, build.number(offset)), *after.args[1:])
        count += 1
    return count


@graph_pass(
    "silu",
    "products with a sigmoid: between int8 Q/DQ boundaries an int8 one, as the integer reference",
    exact=False,
)
def silu_products(model: GraphModule) -> int:
    """``silu`` between int8 Q/DQ boundaries becomes its input times an int8 sigmoid: a table again.

    Left to itself, ExecuTorch multiplies in float by a sigmoid in float; the input is read twice,
    and XNNPACK fuses no table of that. In float it is that product, which tracing would find too,
    but not as fast for thousands of them (``written_out.py``).
    """
    count = 0
    for node in calls(model, SILU.targets):
        build, around = Builder(model, node), _int8_neighbours(node)
        if around is None:
            data = cast(Node, node.args[0])
            sigmoid = build.call(aten.sigmoid.default, data)
            replace(node, build.call(aten.mul.Tensor, data, sigmoid))
            count += 1
            continue
        before, after = around
        q = sigmoid_qparams(qparams_of(model, before), qparams_of(model, after))
        params = (q.scale, q.zero_point, q.quant_min, q.quant_max, torch.int8)
        sigmoid = build.call(aten.sigmoid.default, before)
        stored = build.call(QUANTIZE_PER_TENSOR, sigmoid, *params)
        factor = build.call(DEQUANTIZE_PER_TENSOR, stored, *params)
        replace(node, build.call(aten.mul.Tensor, before, factor))
        count += 1
    return count


@graph_pass("hardsigmoid, reciprocal, prelu", "the steps that compute them")
def written_out(model: GraphModule) -> int:
    """Functions without a kernel become steps that have one.

    - hardsigmoid: ``clamp(x + 3, 0, 6) / 6``;
    - reciprocal: ``1 / x``;
    - prelu: leaky_relu if it has one slope; ``relu(x) + slope * min(x, 0)`` unless its input has
      four dimensions, for which there is a kernel.

    All give the float32 numbers that PyTorch gives, bit for bit.
    """
    count = 0
    for node in calls(model, _WRITTEN_OUT):
        build, data = Numbers(model, node), cast(Node, node.args[0])
        new: Node | None = None
        if node.target in HARDSIGMOID.targets:
            raised = build.call(aten.add.Tensor, data, build.number(3.0))
            clamped = build.call(aten.hardtanh.default, raised, 0.0, 6.0)
            new = build.call(aten.div.Tensor, clamped, build.number(6.0))
        elif node.target in RECIPROCAL.targets:
            new = build.call(aten.div.Tensor, build.number(1.0), data)
        elif node.target in PRELU.targets:
            new = _prelu(model, build, node)
        if new is not None:
            replace(node, new)
            count += 1
    return count


_WRITTEN_OUT = HARDSIGMOID.targets | RECIPROCAL.targets | PRELU.targets | ELU.targets | GELU.targets

_ALMOST_ONE = 1.0 + 2.0**-40
"""1 in float32. Export drops arguments that equal their default, which the serializer of
ExecuTorch 1.5.1 then misses."""


def _prelu(model: GraphModule, build: Numbers, node: Node) -> Node | None:
    data, slope = cast(Node, node.args[0]), cast(Node, node.args[1])
    if not is_constant(slope):
        return None
    values: Tensor = constant_of(model, slope)
    if values.numel() == 1:
        return build.call(aten.leaky_relu.default, data, float(values))
    rank = len(shape_of(node))
    if rank == 4:
        return None
    shaped = values.reshape(-1, *[1] * (rank - 2))
    slopes = add_constant(model, f"{build.origin}_slopes", shaped, node)
    negative = build.call(aten.hardtanh.default, data, -FLOAT32_MAX, 0.0)
    scaled = build.call(aten.mul.Tensor, negative, slopes)
    return build.call(aten.add.Tensor, build.call(aten.relu.default, data), scaled)


@graph_pass(
    "elu with scales or alpha 1, selu, celu",
    "elu with nothing but an alpha, up to the last bits of float32",
    exact=False,
    requires={"tie_break_offsets"},
)
def plain_elus(model: GraphModule) -> int:
    """Elus with scales, selu and celu become products around an elu without: XNNPACK's has none.

    ``elu(x, alpha, scale, inner) = scale / inner * elu(inner * x, alpha * inner)``.
    """
    count = 0
    for node in _with_numbers(model, ELU.targets):
        if node.target is aten.elu.default and tuple(node.args[1:]) == (_ALMOST_ONE,):
            continue
        alpha, scale, inner = elu_factors(node)
        if node.target is aten.elu.default and alpha != 1.0 and len(node.args) == 2:
            continue
        build, value = Numbers(model, node), cast(Node, node.args[0])
        value = build.times(value, inner)
        factor = round_to_float32(alpha * inner)
        value = build.call(aten.elu.default, value, _ALMOST_ONE if factor == 1.0 else factor)
        replace(node, build.times(value, scale / inner))
        count += 1
    return count


@graph_pass(
    "functions with numbers that the graph computes from sizes",
    "the steps that compute them, with the numbers as tensors",
    exact=False,
)
def functions_of_sizes(model: GraphModule) -> int:
    """Kernels have numbers of their own only; products, sums and extremes read them as tensors."""
    count = 0
    for node in calls(model, frozenset(_OF_SIZES)):
        if not reads_sizes(node) or not is_float32(node):
            continue
        new = _OF_SIZES[node.target](Numbers(model, node), node)
        if new is not None:
            replace(node, new)
            count += 1
    return count


def _below(build: Numbers, node: Node) -> Node:
    return build.call(aten.hardtanh.default, node.args[0], -FLOAT32_MAX, 0.0)


def _elu_of_sizes(build: Numbers, node: Node) -> Node:
    """``elu(x, n) = relu(x) + n * elu(min(x, 0), 1)``."""
    names = ("alpha", "scale", "input_scale")
    alpha, scale, inner = (argument(node, i, name, 1.0) for i, name in enumerate(names, 1))
    below = build.times(_below(build, node), inner)
    if node.target is aten.celu.default:
        below = build.call(aten.div.Tensor, _below(build, node), alpha)
    below = build.call(aten.elu.default, below, _ALMOST_ONE)
    above = build.call(aten.relu.default, node.args[0])
    return build.times(build.call(aten.add.Tensor, above, build.times(below, alpha)), scale)


def _leaky_relu_of_sizes(build: Numbers, node: Node) -> Node:
    above = build.call(aten.relu.default, node.args[0])
    below = build.times(_below(build, node), cast(Node, node.args[1]))
    return build.call(aten.add.Tensor, above, below)


def _clamp_of_sizes(build: Numbers, node: Node) -> Node:
    bounds: tuple[Any, Any] = _BOUNDS[node.target](node)
    value = cast(Node, node.args[0])
    for target, bound in zip((aten.maximum.default, aten.minimum.default), bounds, strict=True):
        if bound is not None:
            value = build.call(target, value, build.tensor(bound))
    return value


_BOUNDS: Mapping[Any, Callable[[Node], tuple[Any, Any]]] = {
    aten.clamp.default: lambda node: (argument(node, 1, "min"), argument(node, 2, "max")),
    aten.clamp_max.default: lambda node: (None, node.args[1]),
    aten.clamp_min.default: lambda node: (node.args[1], None),
    aten.hardtanh.default: lambda node: (
        argument(node, 1, "min_val", -1.0),
        argument(node, 2, "max_val", 1.0),
    ),
}


def _softplus_of_sizes(build: Numbers, node: Node) -> Node | None:
    """``softplus(b * x) / b``: with a threshold that is a size it may be something else."""
    beta, threshold = argument(node, 1, "beta", 1.0), argument(node, 2, "threshold", 20.0)
    if isinstance(threshold, Node) or threshold < LEAST_THRESHOLD:
        return None
    raised = build.times(cast(Node, node.args[0]), beta)
    return build.call(aten.div.Tensor, _softplus(build, raised, 1.0), beta)


_OF_SIZES: Mapping[Any, Callable[[Numbers, Node], Node | None]] = {
    **dict.fromkeys(_BOUNDS, _clamp_of_sizes),
    **dict.fromkeys((aten.celu.default, aten.elu.default), _elu_of_sizes),
    aten.leaky_relu.default: _leaky_relu_of_sizes,
    aten.softplus.default: _softplus_of_sizes,
}


def _with_numbers(model: GraphModule, targets: frozenset[Any]) -> list[Node]:
    """Calls whose factors the graph does not compute from sizes of the inputs."""
    return [node for node in calls(model, targets) if not reads_sizes(node)]


_IN_STEPS = SOFTPLUS.targets | MISH.targets


@graph_pass("softplus, mish", "steps of float, up to the last bits of float32", exact=False)
def softplus_steps(model: GraphModule) -> int:
    """``softplus(x) = relu(x) + log1p(exp(-|x|))``, and ``mish(x) = x * tanh(softplus(x))``.

    No step overflows, and no result is farther off than a few of its own last bits: far below 0 it
    is ``exp(x)``, of which a logarithm of ``1 + exp(x)`` would leave nothing.
    """
    count = 0
    for node in _with_numbers(model, _IN_STEPS):
        build, data = Numbers(model, node), cast(Node, node.args[0])
        if node.target in MISH.targets:
            curve = build.call(aten.tanh.default, _softplus(build, data, 1.0))
            new = build.call(aten.mul.Tensor, data, curve)
        else:
            beta, threshold = softplus_factors(node)
            if threshold < LEAST_THRESHOLD:
                continue
            new = _softplus(build, data, beta)
        replace(node, new)
        count += 1
    return count


_LOG1P = (0.08333301640509581, 0.012506781068124086, 0.002187432536784716, 0.0005473530771909696)
"""``(2 atanh(t / 2) / t - 1) / t**2`` by powers of ``t**2`` up to 4/9, off by ``2**-27``."""


def _softplus(build: Numbers, x: Node, beta: float) -> Node:
    size = build.call(aten.exp.default, build.times(build.call(aten.abs.default, x), -beta))
    rest = build.times(_log1p_up_to_one(build, size), 1.0 / beta)
    return build.call(aten.add.Tensor, build.call(aten.relu.default, x), rest)


def _log1p_up_to_one(build: Numbers, x: Node) -> Node:
    """``2 atanh(t / 2)`` with ``t = x / (1 + x / 2)``, of what is between 0 and 1.

    Nothing of a small ``x`` is lost, as in :func:`log1p`, and it takes fewer steps.
    """
    half = build.call(aten.add.Tensor, build.times(x, 0.5), build.number(1.0))
    t = build.call(aten.div.Tensor, x, half)
    square = build.call(aten.mul.Tensor, t, t)
    *others, last = _LOG1P
    excess = build.times(square, last)
    for factor in reversed(others):
        excess = build.call(aten.add.Tensor, excess, build.number(factor))
        excess = build.times(excess, square)
    return build.call(aten.add.Tensor, t, build.times(t, excess))


@graph_pass(
    "exp2, expm1, log10, log1p, log2", "steps of float, up to the last bits of float32", exact=False
)
def exponentials_and_logarithms(model: GraphModule) -> int:
    """Exponentials and logarithms that the delegate lacks, by those that it has.

    ``exp2(x) = exp(x * ln 2)`` is off by ``2**-24`` for each unit of its exponent, ``log2`` and
    ``log10`` by as much as XNNPACK's logarithm; ``expm1`` and ``log1p`` are as near where their
    results are next to 0.
    """
    return in_steps(model, _BY_OTHERS)


_LARGEST_POWER = 16
"""Each squaring doubles the error of what it squares: ``x**16`` may be 16 roundings off."""


def _power(build: Numbers, x: Node, exponent: Any) -> Node | None:
    """``x**p`` as ``x**n * x**f``, where ``n`` is whole and ``f`` at least 0 and below 1.

    A whole power is a product of squares, one of halves and quarters one of roots. Others are
    ``exp(f * log(x))``, off by as much as ``f * log(x)`` is rounded: up to 64 units in the last
    place, where ``x`` is next to the largest or smallest of numbers.
    """
    if not isinstance(exponent, (int, float)) or not 0 < abs(exponent) < _LARGEST_POWER + 1:
        return None
    fraction, whole = math.modf(abs(exponent))
    factors = [_whole_power(build, x, int(whole))] if whole else []
    if fraction:
        factors += _fractional_power(build, x, fraction)
    result = factors[0]
    for factor in factors[1:]:
        result = build.call(aten.mul.Tensor, result, factor)
    return build.call(aten.div.Tensor, build.number(1.0), result) if exponent < 0 else result


def _whole_power(build: Numbers, x: Node, exponent: int) -> Node:
    """Squares, and what is missing to the exponent."""
    result = x
    for digit in f"{exponent:b}"[1:]:
        result = build.call(aten.mul.Tensor, result, result)
        if digit == "1":
            result = build.call(aten.mul.Tensor, result, x)
    return result


def _fractional_power(build: Numbers, x: Node, exponent: float) -> list[Node]:
    """Its factors."""
    if exponent not in {0.25, 0.5, 0.75}:
        power = build.call(aten.exp.default, build.times(build.call(aten.log.default, x), exponent))
        # NaN for negative numbers, of which XNNPACK's logarithm makes minus infinity.
        nothing = build.call(aten.sqrt.default, build.call(aten.hardtanh.default, x, -1.0, 0.0))
        return [build.call(aten.add.Tensor, power, nothing)]
    root = build.call(aten.sqrt.default, x)
    if exponent == 0.5:
        return [root]
    fourth = build.call(aten.sqrt.default, root)
    return [fourth] if exponent == 0.25 else [root, fourth]


def _power_of_number(build: Numbers, base: Any, x: Node) -> Node | None:
    """``exp(x * log(base))``, of a positive number."""
    if not isinstance(base, (int, float)) or not 0 < base < math.inf:
        return None
    return build.call(aten.exp.default, build.times(x, math.log(base)))


def _exp2(build: Numbers, x: Node) -> Node | None:
    return _power_of_number(build, 2, x)


def _logarithm(base: int) -> Callable[[Numbers, Node], Node]:
    def steps(build: Numbers, x: Node) -> Node:
        return build.times(build.call(aten.log.default, x), 1 / math.log(base))

    return steps


def log1p(build: Numbers, x: Node) -> Node:
    """``y = log(1 + x)``, less ``(expm1(y) - x) / (1 + x)``, a step of Newton's method.

    XNNPACK's logarithm is up to ``2**-23`` away next to 1, which may be more than the result. The
    step is bounded, as ``expm1(y)`` rounds by more than it is worth where ``x`` is next to -1.
    """
    raised = build.call(aten.add.Tensor, x, build.number(1.0))
    log = build.call(aten.log.default, raised)
    finite = build.call(aten.hardtanh.default, x, -1.0, FLOAT32_MAX)
    excess = build.call(aten.sub.Tensor, _expm1(build, log), finite)
    divisor = build.call(aten.hardtanh.default, raised, 2.0**-24, FLOAT32_MAX)
    step = build.call(aten.div.Tensor, excess, divisor)
    step = build.call(aten.hardtanh.default, step, -(2.0**-21), 2.0**-21)
    return build.call(aten.sub.Tensor, log, step)


def _expm1(build: Numbers, x: Node) -> Node:
    """``elu(x)`` up to 0, and ``-exp(x) * elu(-x)`` above; either is 0 where the other is not."""
    above = build.call(aten.relu.default, x)
    below, lack = elus(build, x, above)
    growth = build.call(aten.mul.Tensor, build.call(aten.exp.default, above), lack)
    return build.call(aten.sub.Tensor, below, growth)


def elus(build: Numbers, x: Node, above: Node) -> tuple[Node, Node]:
    """``exp(x) - 1`` up to 0, and ``exp(-x) - 1`` of what is ``above``; else they are 0."""
    below = build.call(aten.hardtanh.default, x, -FLOAT32_MAX, 0.0)
    lack = build.call(aten.neg.default, above)
    first, second = (build.call(aten.elu.default, end, _ALMOST_ONE) for end in (below, lack))
    return first, second


_BY_OTHERS: Steps = {
    aten.exp2.default: _exp2,
    aten.expm1.default: _expm1,
    aten.log10.default: _logarithm(10),
    aten.log1p.default: log1p,
    aten.log2.default: _logarithm(2),
}


@graph_pass("round, trunc, frac, sign", "steps of float with the same values")
def roundings_in_steps(model: GraphModule) -> int:
    """Roundings that the delegate lacks, by floor, ceil and sums.

    Only the sign of a zero is lost, and subnormal numbers, which kernels take for zeros.
    """
    return in_steps(model, _ROUNDINGS)


def _round(build: Numbers, x: Node) -> Node:
    """To the nearest even, as a sum with ``1.5 * 2**23`` rounds what is within ``2**22``.

    What is left of a larger number is within ``2**22`` again, or whole.
    """

    def small(value: Node) -> tuple[Node, Node]:
        part = build.call(aten.hardtanh.default, value, -(2.0**22), 2.0**22)
        raised = build.call(aten.add.Tensor, part, build.number(1.5 * 2**23))
        rounded = build.call(aten.sub.Tensor, raised, build.number(1.5 * 2**23))
        return rounded, build.call(aten.sub.Tensor, value, part)

    first, left = small(x)
    second, left = small(left)
    return build.call(aten.add.Tensor, build.call(aten.add.Tensor, first, second), left)


def _frac(build: Numbers, x: Node) -> Node:
    return build.call(aten.sub.Tensor, x, build.trunc(x))


_ROUNDINGS: Steps = {
    aten.frac.default: _frac,
    aten.round.default: _round,
    aten.sign.default: Numbers.sign,
    aten.trunc.default: Numbers.trunc,
}


@graph_pass(
    "powers between -17 and 17, and of positive numbers",
    "products, roots and exponentials of float, up to the last bits of float32",
    exact=False,
)
def powers_by_squares(model: GraphModule) -> int:
    """Powers, which have no integers and of which the delegate has squares only."""
    return in_steps(model, _POWERS)


_POWERS: Steps = {
    aten.pow.Scalar: _power_of_number,
    aten.pow.Tensor_Scalar: _power,
}

BY_STEPS = frozenset({*_BY_OTHERS, *_POWERS, *_ROUNDINGS})
"""Ops of one tensor that have no family."""


@graph_pass(
    "the tanh approximation of gelu in float",
    "its formula, up to the last bits of float32",
    exact=False,
)
def tanh_gelus(model: GraphModule) -> int:
    """The tanh approximation of gelu becomes its formula, except between int8 Q/DQ boundaries.

    XNNPACK's kernel is the gelu that it approximates, up to 4.8e-4 away. In a table that is less
    than a step, and the integer reference knows it.
    """
    count = 0
    for node in calls(model, GELU.targets):
        if is_tanh_gelu(node) and _int8_neighbours(node) is None:
            replace(node, _tanh_gelu(Numbers(model, node), cast(Node, node.args[0])))
            count += 1
    return count


def _tanh_gelu(build: Numbers, x: Node) -> Node:
    """``x * (0.5 * (1 + tanh(sqrt(2 / pi) * x * (1 + 0.044715 * x**2))))``."""

    def plus_one(value: Node) -> Node:
        return build.call(aten.add.Tensor, value, build.number(1.0))

    cubic = plus_one(build.times(build.call(aten.mul.Tensor, x, x), 0.044715))
    inner = build.times(build.call(aten.mul.Tensor, x, cubic), math.sqrt(2 / math.pi))
    half = build.times(plus_one(build.call(aten.tanh.default, inner)), 0.5)
    return build.call(aten.mul.Tensor, x, half)
