"""Functions of one tensor, element by element.

On integers such a function is a table with one entry for each stored integer, whatever it computes.

**Bit exactness.** A float32 kernel is a few units in the last place off the true value, by other
amounts on other CPUs. That matters only where the true value lies next to the middle between two
integers. How far kernels may be off is part of what a function means here
(:attr:`Function.ulps`); an arithmetic that fills tables at run time moves entries out of the way of
that (:meth:`~custom_quantizer.core.arithmetic.Arithmetic.quantize_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic, QParams, round_to_float32
from custom_quantizer.core.graph import argument, is_constant, reads_sizes
from custom_quantizer.ops._rule import (
    Case,
    Integers,
    OpRule,
    PatternMatch,
    QuantizedOp,
    Trait,
)
from custom_quantizer.ops.elementwise import _case, _match_pair, _match_single

__all__ = [
    "DIV",
    "ELU",
    "EXACT_GELU",
    "FUNCTIONS",
    "GELU",
    "HARDSIGMOID",
    "MAXIMUM",
    "MINIMUM",
    "MISH",
    "PRELU",
    "RECIPROCAL",
    "RULES",
    "SIGMOID_FUNCTION",
    "SILU",
    "SILU_FUNCTION",
    "SOFTPLUS",
    "Function",
    "elu_factors",
    "function_of",
    "is_tanh_gelu",
    "levels",
    "look_up",
    "real",
    "saturated",
    "softplus_factors",
    "table",
    "table_of",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Function:
    """A function of one variable, as the delegate computes it.

    Attributes:
        compute: float64 values (exact float32 numbers) to float64.
        ulps: how far any float32 kernel is from that, in units of ``2**-24`` of the largest value
            of a table; 0: every kernel gives ``compute`` rounded to float32.
    """

    compute: Callable[[Tensor], Tensor]
    ulps: float = 0.0


LARGEST_TABLE = 2**16
"""Above 16 bits the elements are fewer than the entries of a table."""


def levels(q: QParams) -> Tensor:
    """All stored integers of a range, in order, int64."""
    return torch.arange(q.quant_min, q.quant_max + 1)


def real(function: Function, stored: Tensor, src: QParams, arithmetic: Arithmetic) -> Tensor:
    """The function of what stored integers stand for, float32; NaN is stored as infinity is."""
    value = function.compute(arithmetic.dequantize(stored, src).to(torch.float64))
    return torch.where(torch.isnan(value), torch.inf, value).to(torch.float32)


def table(function: Function, src: QParams, dst: QParams, arithmetic: Arithmetic) -> Tensor:
    """The stored results of a function for all stored integers of ``src``, int32, in order."""
    values = real(function, levels(src), src, arithmetic)
    return arithmetic.quantize_table(_finite(values), dst, function.ulps)


def _finite(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.float32).max
    return values.clamp(-limit, limit)


def saturated(values: Tensor, dst: QParams, arithmetic: Arithmetic) -> Tensor:
    """Real numbers stored as integers; infinite ones as the largest."""
    return arithmetic.quantize(_finite(values), dst)


def look_up(op: QuantizedOp, stored: Tensor, entries: Tensor) -> Tensor:
    """The entries of a table for stored integers of the op's input."""
    return entries[stored.to(torch.int64) - op.inputs[0].quant_min]


def function_of(node: Node) -> Function | None:
    """The function that a node applies to one tensor, if it is one of this module.

    With an argument that only the inputs tell, it is none.
    """
    make = FUNCTIONS.get(node.target)
    return None if make is None or reads_sizes(node) else make(node)


def _table_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    function = cast(Function, function_of(op.node))
    src, dst = op.inputs[0], op.output
    if src.levels > LARGEST_TABLE:
        return saturated(real(function, inputs[0], src, arithmetic), dst, arithmetic)
    return look_up(op, inputs[0], table(function, src, dst, arithmetic))


# ---------------------------------------------------------------------------------------------
# The functions
# ---------------------------------------------------------------------------------------------


def _always(function: Function) -> Callable[[Node], Function]:
    return lambda _node: function


def _float32(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Compute in float32, for kernels whose every step is one IEEE operation."""
    return lambda x: compute(x.to(torch.float32)).to(torch.float64)


def _number(node: Node, index: int, name: str, default: float) -> float:
    """An argument in float32, as kernels of float32 get it."""
    return round_to_float32(float(argument(node, index, name, default)))


def _leaky_relu(node: Node) -> Function:
    slope = _number(node, 1, "negative_slope", 0.01)
    return Function(_float32(lambda x: torch.where(x < 0, x * slope, x)))


def elu_factors(node: Node) -> tuple[float, float, float]:
    """``(alpha, scale, input_scale)`` of an elu, selu or celu, in float32.

    They compute ``scale * x`` above zero and ``scale * alpha * (exp(input_scale * x) - 1)`` below.
    """
    if node.target is aten.selu.default:
        return _SELU_ALPHA, _SELU_SCALE, 1.0
    if node.target is aten.celu.default:
        alpha = _number(node, 1, "alpha", 1.0)
        return alpha, 1.0, round_to_float32(1 / alpha)
    names = ("alpha", "scale", "input_scale")
    alpha, scale, inner = (_number(node, i, name, 1.0) for i, name in enumerate(names, 1))
    return alpha, scale, inner


# Klambauer et al., "Self-Normalizing Neural Networks", 2017, as PyTorch writes them.
_SELU_ALPHA = round_to_float32(1.6732632423543772848170429916717)
_SELU_SCALE = round_to_float32(1.0507009873554804934193349852946)


def _elu(node: Node) -> Function:
    alpha, scale, inner = elu_factors(node)
    return Function(lambda x: scale * torch.where(x < 0, alpha * torch.expm1(inner * x), x), 8)


def softplus_factors(node: Node) -> tuple[float, float]:
    """``(beta, threshold)`` of a softplus: ``log(1 + exp(beta * x)) / beta``, or ``x`` above."""
    return _number(node, 1, "beta", 1.0), _number(node, 2, "threshold", 20.0)


def _softplus(node: Node) -> Function:
    beta, threshold = softplus_factors(node)
    return Function(lambda x: F.softplus(x, beta, threshold), 8)


def _div(node: Node) -> Function | None:
    divisor = node.args[1]
    if isinstance(divisor, Node):
        return None
    number = torch.tensor(float(cast(float, divisor)), dtype=torch.float32)
    return Function(_float32(lambda x: x / number.expand_as(x)))


def _hardsigmoid(x: Tensor) -> Tensor:
    # A tensor over a tensor: dividing by a number may be computed as a product.
    return (x + 3).clamp(0, 6) / torch.full_like(x, 6.0)


EXACT_GELU = Function(F.gelu, 8)
SIGMOID_FUNCTION = Function(torch.sigmoid, 8)
SILU_FUNCTION = Function(F.silu, 8)

_TANH_GELU = Function(lambda x: F.gelu(x, approximate="tanh"), 8)


def _gelu(node: Node) -> Function:
    return _TANH_GELU if is_tanh_gelu(node) else EXACT_GELU


FUNCTIONS: dict[Any, Callable[[Node], Function | None]] = {
    aten.abs.default: _always(Function(torch.abs)),
    aten.ceil.default: _always(Function(torch.ceil)),
    aten.celu.default: _elu,
    aten.div.Tensor: _div,
    aten.elu.default: _elu,
    aten.exp.default: _always(Function(torch.exp, 32)),
    aten.floor.default: _always(Function(torch.floor)),
    aten.gelu.default: _gelu,
    aten.hardsigmoid.default: _always(Function(_float32(_hardsigmoid))),
    aten.hardswish.default: _always(Function(F.hardswish, 4)),
    aten.leaky_relu.default: _leaky_relu,
    aten.log.default: _always(Function(torch.log, 8)),
    aten.mish.default: _always(Function(F.mish, 8)),
    aten.neg.default: _always(Function(torch.neg)),
    aten.reciprocal.default: _always(Function(_float32(lambda x: torch.ones_like(x) / x))),
    aten.rsqrt.default: _always(Function(torch.rsqrt, 4)),
    aten.selu.default: _elu,
    aten.sigmoid.default: _always(SIGMOID_FUNCTION),
    aten.silu.default: _always(SILU_FUNCTION),
    aten.softplus.default: _softplus,
    aten.sqrt.default: _always(Function(torch.sqrt, 6)),
    aten.tanh.default: _always(Function(torch.tanh, 8)),
}
"""By aten overload, the function a call applies; ``None`` for a call of more than one tensor.

``ulps`` is twice what was measured on x86-64 (``docs/device_arithmetic.md``) or more. abs, neg,
floor, ceil, leaky_relu, division and hardsigmoid are sequences of single IEEE operations.
"""


def table_of(match: PatternMatch) -> bool:
    """Whether an op is a function of one tensor, and so a table on integers."""
    return Trait.TABLE in match.rule.traits and len(match.inputs) == 1


_TABLE = frozenset({Trait.TABLE})
_IMAGE = (2, 8, 5, 7)


def _function_rule(
    family: str,
    target: Any,
    *cases: Case,
    also: Sequence[Any] = (),
    traits: frozenset[Trait] = _TABLE,
) -> OpRule:
    return OpRule(
        family=family,
        targets=frozenset({target, *also}),
        match=_match_single,
        traits=traits,
        integers=_table_integers,
        cases=cases,
    )


_BOUNDED = _TABLE | {Trait.BOUNDED}


def _cases(function: Callable[..., Tensor]) -> tuple[Case, ...]:
    return (_case("image", function, _IMAGE), _case("rank2", function, (3, 11)))


ABS = _function_rule("abs", aten.abs.default, *_cases(torch.abs))
CEIL = _function_rule("ceil", aten.ceil.default, *_cases(lambda x: torch.ceil(x * 3)))
EXP = _function_rule("exp", aten.exp.default, *_cases(torch.exp))
FLOOR = _function_rule("floor", aten.floor.default, *_cases(lambda x: torch.floor(x * 3)))
HARDSIGMOID = _function_rule(
    "hardsigmoid",
    aten.hardsigmoid.default,
    *_cases(lambda x: F.hardsigmoid(x * 3)),
    _case("in_place", lambda x: F.hardsigmoid(x * 2, inplace=True), _IMAGE),
    traits=_BOUNDED,
)
HARDSWISH = _function_rule(
    "hardswish", aten.hardswish.default, *_cases(lambda x: F.hardswish(x * 3))
)
LEAKY_RELU = _function_rule(
    "leaky_relu",
    aten.leaky_relu.default,
    *_cases(F.leaky_relu),
    _case("slope", lambda x: F.leaky_relu(x, 0.3), _IMAGE),
    _case("in_place", lambda x: F.leaky_relu_(x * 2, 0.2), _IMAGE),
)
LOG = _function_rule("log", aten.log.default, *_cases(lambda x: torch.log(F.relu(x) + 0.5)))
MISH = _function_rule("mish", aten.mish.default, *_cases(F.mish))
NEG = _function_rule("neg", aten.neg.default, *_cases(torch.neg))
RECIPROCAL = _function_rule(
    "reciprocal", aten.reciprocal.default, *_cases(lambda x: torch.reciprocal(F.relu(x) + 0.5))
)
RSQRT = _function_rule("rsqrt", aten.rsqrt.default, *_cases(lambda x: (F.relu(x) + 0.5).rsqrt()))
SIGMOID = _function_rule("sigmoid", aten.sigmoid.default, *_cases(torch.sigmoid), traits=_BOUNDED)
SOFTPLUS = _function_rule(
    "softplus",
    aten.softplus.default,
    *_cases(F.softplus),
    _case("beta", lambda x: F.softplus(x, 2.5), _IMAGE),
)
SQRT = _function_rule("sqrt", aten.sqrt.default, *_cases(lambda x: torch.sqrt(F.relu(x))))
TANH = _function_rule("tanh", aten.tanh.default, *_cases(torch.tanh), traits=_BOUNDED)

# ---------------------------------------------------------------------------------------------
# elu
# ---------------------------------------------------------------------------------------------


ELU = _function_rule(
    "elu",
    aten.elu.default,
    *_cases(F.elu),
    _case("alpha", lambda x: F.elu(x, 1.3), _IMAGE),
    _case("selu", F.selu, _IMAGE),
    _case("celu", lambda x: F.celu(x, 0.6), _IMAGE),
    _case("in_place", lambda x: F.elu_(x * 2), _IMAGE),
    also=(aten.celu.default, aten.selu.default),
)

# ---------------------------------------------------------------------------------------------
# gelu
# ---------------------------------------------------------------------------------------------


def is_tanh_gelu(node: Node) -> bool:
    """Whether a node is the tanh approximation of gelu."""
    return node.target is aten.gelu.default and argument(node, 1, "approximate", "none") == "tanh"


GELU = _function_rule(
    "gelu",
    aten.gelu.default,
    *_cases(F.gelu),
    _case("tanh", lambda x: F.gelu(x, approximate="tanh"), _IMAGE),
)

# ---------------------------------------------------------------------------------------------
# silu
# ---------------------------------------------------------------------------------------------


SILU = _function_rule(
    "silu",
    aten.silu.default,
    *_cases(lambda x: F.silu(x * 3)),
    _case("in_place", lambda x: F.silu(x * 2, inplace=True), _IMAGE),
)

# ---------------------------------------------------------------------------------------------
# prelu: a slope a channel
# ---------------------------------------------------------------------------------------------


def _match_prelu(rule: OpRule, node: Node) -> PatternMatch | str:
    slope = node.args[1]
    if not is_constant(slope):
        return "its slope is computed"
    return _match_single(rule, node)


def _prelu_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    slope = op.constants[cast(Node, op.node.args[1])].to(torch.float32)
    x = arithmetic.dequantize(inputs[0], op.inputs[0])
    shape = [1] * x.dim()
    if slope.numel() > 1:
        shape[1] = -1
    return arithmetic.quantize(torch.where(x < 0, x * slope.reshape(shape), x), op.output)


PRELU = OpRule(
    family="prelu",
    targets=frozenset({aten.prelu.default}),
    match=_match_prelu,
    integers=_prelu_integers,
    cases=(
        Case("channels", lambda: _slopes(nn.PReLU(8)), (_IMAGE,)),
        Case("single", lambda: nn.PReLU(), (_IMAGE,)),
        Case("rank2", lambda: _slopes(nn.PReLU(11)), ((3, 11),)),
    ),
)


def _slopes(module: nn.PReLU) -> nn.PReLU:
    """Give a module a different slope for each channel."""
    module.weight.data = torch.linspace(-0.2, 0.9, module.num_parameters)
    return module


# ---------------------------------------------------------------------------------------------
# Functions of two tensors
# ---------------------------------------------------------------------------------------------


def _match_div(rule: OpRule, node: Node) -> PatternMatch | str:
    if isinstance(node.args[1], Node):
        return _match_pair(rule, node)
    return _match_single(rule, node)


def _div_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    if len(inputs) == 1:
        return _table_integers(op, inputs, arithmetic)
    # One IEEE division in float32, in the delegate as here.
    left, right = (arithmetic.dequantize(x, q) for x, q in zip(inputs, op.inputs, strict=True))
    # A tensor over a tensor of its shape: dividing by one number may be computed as a product.
    value = torch.div(left + torch.zeros_like(right), right + torch.zeros_like(left))
    return saturated(torch.where(torch.isnan(value), torch.inf, value), op.output, arithmetic)


DIV = OpRule(
    family="div",
    targets=frozenset({aten.div.Tensor}),
    match=_match_div,
    traits=frozenset({Trait.TABLE, Trait.DIVISION}),
    integers=_div_integers,
    cases=(
        _case("number", lambda x: x / 3.7, _IMAGE),
        _case("tensors", lambda x, y: x / (F.relu(y) + 0.5), _IMAGE, _IMAGE),
        _case("broadcast", lambda x, y: x / (F.relu(y) + 0.5), _IMAGE, (1, 8, 1, 1)),
    ),
)


def _extremum_integers(
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[QuantizedOp, Integers, Arithmetic], Tensor]:
    """Rounding keeps the order, so that comparing before and after it is the same."""

    def integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
        stored = (
            arithmetic.requantize(x, q, op.output) for x, q in zip(inputs, op.inputs, strict=True)
        )
        return compare(*stored)

    return integers


def _extremum_rule(family: str, target: Any, compute: Callable[..., Tensor]) -> OpRule:
    return OpRule(
        family=family,
        targets=frozenset({target}),
        match=_match_pair,
        integers=_extremum_integers(compute),
        cases=(
            _case("same_shape", compute, _IMAGE, _IMAGE),
            _case("broadcast", compute, _IMAGE, (1, 8, 1, 1)),
        ),
    )


MAXIMUM = _extremum_rule("maximum", aten.maximum.default, torch.maximum)
MINIMUM = _extremum_rule("minimum", aten.minimum.default, torch.minimum)

RULES: Sequence[OpRule] = (
    ABS,
    CEIL,
    DIV,
    ELU,
    EXP,
    FLOOR,
    GELU,
    HARDSIGMOID,
    HARDSWISH,
    LEAKY_RELU,
    LOG,
    MAXIMUM,
    MINIMUM,
    MISH,
    NEG,
    PRELU,
    RECIPROCAL,
    RSQRT,
    SIGMOID,
    SILU,
    SOFTPLUS,
    SQRT,
    TANH,
)
