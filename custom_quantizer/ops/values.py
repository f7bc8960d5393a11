"""What numbers tensors may hold: all finite, infinite ones as well, or some that are none.

What layers give and what a model is given is taken to be finite, and no sum or product of finite
numbers to overflow. Functions make infinities of ordinary numbers: exponentials, quotients,
logarithms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    constant_of,
    is_constant,
    is_dequantize,
    is_number,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.ops import match_of, rule_of
from custom_quantizer.ops._rule import OpRule
from custom_quantizer.ops.attention import MATMUL, SOFTMAX
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB, WHERE
from custom_quantizer.ops.functions import (
    ABS,
    CEIL,
    DIV,
    ELU,
    EXP,
    FLOOR,
    HARDSIGMOID,
    LEAKY_RELU,
    LOG,
    MAXIMUM,
    MINIMUM,
    NEG,
    RECIPROCAL,
    RSQRT,
    SIGMOID,
    SOFTPLUS,
    SQRT,
    TANH,
)
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.ops.movement import PAD
from custom_quantizer.ops.resize import UPSAMPLE_BILINEAR

__all__ = [
    "COMPARISONS",
    "SUMS",
    "Holds",
    "Values",
    "asks_what_is_finite",
    "chooses_numbers",
    "compared_by",
    "forget_values",
    "values_if",
    "values_of",
    "where_held",
]

aten = torch.ops.aten


class Holds(IntEnum):
    """What a tensor may hold besides ordinary numbers."""

    FINITE = 0
    INFINITE = 1
    NAN = 2


@dataclass(frozen=True)
class Values:
    """What a tensor may hold: which kinds of numbers, and from where to where."""

    holds: Holds = Holds.FINITE
    low: float = -math.inf
    high: float = math.inf
    has_zeros: bool = True

    @property
    def is_never_zero(self) -> bool:
        """Kernels take subnormal numbers for zeros."""
        return not self.has_zeros or self.low >= _LEAST or self.high <= -_LEAST


_MAKE_OTHERS = (PAD, UPSAMPLE_BILINEAR)
"""Families of moves whose results hold other numbers than they read."""

_LEAST = torch.finfo(torch.float32).tiny
_ANY = Values(Holds.NAN)
_FINITE = Values()
_SHARE = Values(low=0.0, high=1.0)

_KNOWN = "custom_quantizer_values"
"""Key in ``meta`` of what was found to be no NaN, so that chains are not walked again.

What may be NaN may turn out not to be, once ops that nothing knows are written as others.
"""


def values_of(model: torch.nn.Module, tensor: Node) -> Values:
    """What a tensor of a graph may hold."""
    found: dict[Any, Values] = {}
    waiting = [tensor]
    while waiting:
        node = waiting[-1]
        known = found.get(node) or node.meta.get(_KNOWN) or _given(model, node)
        missing = [] if known else [s for s in node.all_input_nodes if s not in found]
        if missing:
            waiting += missing
            continue
        found[waiting.pop()] = result = known or _made(node, found)
        if result.holds is Holds.NAN:
            return result  # as is all that is made of it
        node.meta[_KNOWN] = result
    return found[tensor]


def forget_values(calls: Iterable[Node]) -> None:
    """Look at calls again: what they read has changed, or was rounded."""
    for call in calls:
        call.meta.pop(_KNOWN, None)


def chooses_numbers(where: Node) -> bool:
    """Whether nothing that a ``where`` reads may be NaN, so that extremes can choose for it."""
    model = cast(GraphModule, where.graph.owning_module)
    condition, *sides = where.args[:3]
    return not asks_what_is_finite(cast(Node, condition)) and all(
        values_of(model, side).holds < Holds.NAN if isinstance(side, Node) else side == side
        for side in sides
    )


def asks_what_is_finite(condition: Node) -> bool:
    """Whether values that are no numbers are expected: they are what the condition is about."""
    waiting, seen = [condition], {condition}
    while waiting:
        node = waiting.pop()
        values = node.args[:2]
        if node.target in _ASKS or (len(values) == 2 and values[0] is values[1]):
            return True
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            return True
        near = [source for source in node.all_input_nodes if source not in seen]
        seen.update(near)
        waiting += [n for n in near if (m := tensor_meta(n)) is not None and m.dtype == torch.bool]
    return False


_ASKS = frozenset(
    {
        *(aten.isfinite.default, aten.isinf.default, aten.isnan.default),
        *(aten.isneginf.default, aten.isposinf.default),
    }
)

SUMS = frozenset({CONV, CONV_TRANSPOSE, LINEAR, MATMUL, SOFTMAX})
"""Families that mix values: one that is no number in there spoils results anyway."""


def _given(model: torch.nn.Module, node: Node) -> Values | None:
    """What is known of a tensor without a look at what it is made of."""
    if node.op == "get_attr" and is_constant(node):
        return _of_constant(constant_of(model, node))
    meta, rule = tensor_meta(node), rule_of(node)
    if is_number(node) or (meta is not None and not meta.is_floating_point()):
        return _SHARE if meta is not None and meta.dtype == torch.bool else _FINITE
    if is_dequantize(node):
        return _of_integers(node)
    if node.op == "placeholder" or rule in SUMS:
        return _SHARE if rule is SOFTMAX else _FINITE
    return _ANY if node.op != "call_function" or overwritten_by(node) is not None else None


def _of_constant(value: torch.Tensor) -> Values:
    if not value.numel() or not value.is_floating_point():
        return _FINITE
    low, high = (float(end) for end in value.aminmax())
    if math.isnan(low):
        return _ANY
    holds = Holds.FINITE if math.isfinite(high - low) else Holds.INFINITE
    return Values(holds, low, high, has_zeros=bool((value.abs() < _LEAST).any()))


def _of_integers(dequantize: Node) -> Values:
    """What a scale and a zero point make of the least and the largest integer."""
    if dequantize.target is not DEQUANTIZE_PER_TENSOR:
        return _FINITE
    params = dequantize.args[1:5]
    if not all(isinstance(number, (int, float)) for number in params):
        return _FINITE
    scale, zero_point, least, most = cast("tuple[float, int, int, int]", params)
    return Values(low=(least - zero_point) * scale, high=(most - zero_point) * scale)


def _made(node: Node, found: Mapping[Any, Values]) -> Values:
    """What a call gives of what it reads."""
    rule, sources = rule_of(node), [found[source] for source in node.all_input_nodes]
    holds = max((source.holds for source in sources), default=Holds.FINITE)
    if holds is Holds.NAN:
        return _ANY
    steps = _OF_TARGETS.get(node.target) or (_OF_FAMILIES.get(rule) if rule is not None else None)
    if steps is not None:
        operands = [_operand(arg, found) for arg in node.args[:2]]
        return steps(node, *(operand for operand in operands if operand is not None))
    if rule is WHERE:
        return _chosen(node, found)
    if rule is not None and rule.moves_values and rule not in _MAKE_OTHERS:
        return _one_of(holds, sources)
    return _FINITE if rule is not None and holds is Holds.FINITE else _ANY


def _operand(arg: Any, found: Mapping[Any, Values]) -> Values | None:
    if isinstance(arg, Node):
        return found[arg]
    if not isinstance(arg, (int, float)):
        return None
    number = float(arg)
    holds = Holds.FINITE if math.isfinite(number) else Holds.INFINITE
    return _ANY if math.isnan(number) else Values(holds, number, number)


def _one_of(holds: Holds, sources: Sequence[Values]) -> Values:
    zeros = any(s.has_zeros for s in sources)
    return Values(holds, min(s.low for s in sources), max(s.high for s in sources), zeros)


def _chosen(where: Node, found: Mapping[Any, Values]) -> Values:
    """One of two sides, each as far as the condition lets it be."""
    condition, *sides = where.args[:3]
    read: list[Values] = []
    for side, held in zip(sides, (True, False), strict=True):
        values = _operand(side, found)
        if values is None or values.holds is Holds.NAN:
            return _ANY
        read.append(
            where_held(values, cast(Node, condition), side, held=held)
            if isinstance(side, Node)
            else values
        )
    return _one_of(max(values.holds for values in read), read)


def where_held(values: Values, condition: Node, tensor: Node, *, held: bool) -> Values:
    """What a tensor that is no NaN may hold where a condition is true, or where it is not."""
    for said in _said_of(condition, tensor, held=held):
        low, high = max(values.low, said.low), min(values.high, said.high)
        values = Values(values.holds, low, high, values.has_zeros and said.has_zeros)
    return values


def _said_of(condition: Node, tensor: Node, *, held: bool) -> Iterator[Values]:
    """What a condition says of a tensor, or of its size, if it compares it with numbers."""
    if condition.target in _NOT:
        yield from _said_of(cast(Node, condition.args[0]), tensor, held=not held)
    elif condition.target in (_BOTH if held else _EITHER):
        for part in condition.all_input_nodes:
            yield from _said_of(part, tensor, held=held)
    elif condition.target in COMPARISONS:
        compares = COMPARISONS[condition.target]
        compares = compares if held else _OPPOSITES[compares]
        compared, number = cast(Node, condition.args[0]), _number(condition.args[1])
        if number is None:
            return
        above = compares in (operator.gt, operator.ge, operator.eq)
        below = compares in (operator.lt, operator.le, operator.eq)
        zeros = bool(compares(0.0, number))
        if _is_same(compared, tensor):
            low, high = number if above else -math.inf, number if below else math.inf
            yield Values(low=low, high=high, has_zeros=zeros)
        elif rule_of(compared) is ABS and _is_same(cast(Node, compared.args[0]), tensor):
            size = number if below else math.inf
            yield Values(low=-size, high=size, has_zeros=zeros)


def _number(arg: Any) -> float | None:
    """A number, also one that is a tensor."""
    if isinstance(arg, Node) and arg.op == "get_attr" and is_constant(arg):
        value = constant_of(cast(GraphModule, arg.graph.owning_module), arg)
        return float(value) if value.numel() == 1 else None
    return float(arg) if isinstance(arg, (int, float)) else None


def _is_same(a: Node, b: Node) -> bool:
    """Whether two tensors have the same values: each op may have a dequantize of its own."""
    return a is b or (is_dequantize(a) and a.target is b.target and a.args == b.args)


_NOT = frozenset({aten.bitwise_not.default, aten.logical_not.default})
_BOTH = frozenset({aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor})
_EITHER = frozenset({aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor})

COMPARISONS: Mapping[Any, Callable[[float, float], bool]] = {
    getattr(getattr(aten, name), overload): getattr(operator, name)
    for name in ("eq", "ge", "gt", "le", "lt", "ne")
    for overload in ("Scalar", "Tensor")
}
"""By overload, which comparison it is."""

_OPPOSITES: Mapping[Any, Callable[[float, float], bool]] = {
    operator.eq: operator.ne,
    operator.ge: operator.lt,
    operator.gt: operator.le,
    operator.le: operator.gt,
    operator.lt: operator.ge,
    operator.ne: operator.eq,
}


def compared_by(condition: Node) -> list[Node]:
    """The tensors of which a condition says something."""
    if condition.target in _NOT | _BOTH | _EITHER:
        return [tensor for part in condition.all_input_nodes for tensor in compared_by(part)]
    if condition.target not in COMPARISONS:
        return []
    compared = cast(Node, condition.args[0])
    return [compared, cast(Node, compared.args[0])] if rule_of(compared) is ABS else [compared]


def values_if(
    model: torch.nn.Module, calls: Sequence[Node], given: Mapping[Node, Values]
) -> Values:
    """What the last of some calls gives if tensors that they read hold something else."""
    found: dict[Node, Values] = {}
    for call in calls:
        for source in call.all_input_nodes:
            known = given.get(source) or found.get(source)
            found[source] = values_of(model, source) if known is None else known
        found[call] = _made(call, found)
    return found[calls[-1]]


def _add(node: Node, a: Values, b: Values) -> Values:
    if node.kwargs:  # a factor
        return _FINITE if a.holds is b.holds is Holds.FINITE else _ANY
    infinite = (a.holds, b.holds) == (Holds.INFINITE, Holds.INFINITE)
    opposite = max(a.high, b.high) == math.inf and min(a.low, b.low) == -math.inf
    if infinite and opposite:
        return _ANY
    ends = (a.low + b.low, a.high + b.high)
    return _ANY if any(map(math.isnan, ends)) else Values(max(a.holds, b.holds), *ends)


def _negative(x: Values) -> Values:
    return Values(x.holds, -x.high, -x.low)


def _sub(node: Node, a: Values, b: Values) -> Values:
    return _add(node, a, _negative(b))


def _mul(node: Node, a: Values, b: Values) -> Values:
    same = node.args[0] is node.args[1]
    low = 0.0 if same or min(a.low, b.low) >= 0.0 else -math.inf
    for x, other in ((a, b), (b, a)):
        if x.holds is Holds.INFINITE and not (same or other.is_never_zero):
            return _ANY
    return Values(max(a.holds, b.holds), low)


def _div(_node: Node, a: Values, b: Values) -> Values:
    if (a.holds, b.holds) == (Holds.INFINITE, Holds.INFINITE):
        return _ANY
    if b.is_never_zero:
        return Values(a.holds, 0.0 if a.low >= 0.0 and b.low > 0.0 else -math.inf)
    return Values(Holds.INFINITE) if a.is_never_zero else _ANY


def _reciprocal(node: Node, x: Values) -> Values:
    return _div(node, Values(low=1.0, high=1.0), x)


_LARGEST_POWER = 80.0
"""``exp`` of it is a float32 number."""


def _exp(_node: Node, x: Values) -> Values:
    return Values(Holds.FINITE if x.high < _LARGEST_POWER else Holds.INFINITE, 0.0)


def _power_of_number(_node: Node, base: Values, _x: Values) -> Values:
    return Values(Holds.INFINITE, 0.0) if 0.0 < base.low == base.high else _ANY


def _expm1(node: Node, x: Values) -> Values:
    return Values(_exp(node, x).holds, -1.0)


def _log(_node: Node, x: Values) -> Values:
    if x.low < 0.0:
        return _ANY
    return Values(x.holds if x.is_never_zero else Holds.INFINITE)


def _log1p(node: Node, x: Values) -> Values:
    return _log(node, Values(x.holds, x.low + 1.0, x.high + 1.0))


def _power(node: Node, x: Values, exponent: Values) -> Values:
    """Of a negative number there are whole ones alone; of zero there are negative infinite ones."""
    power = exponent.low
    if x.holds is not Holds.FINITE or power != exponent.high:
        return _ANY
    if x.low < 0.0 and not power.is_integer():
        return _ANY
    finite = power >= 0.0 or x.is_never_zero
    low = 0.0 if x.low >= 0.0 or power % 2 == 0 else -math.inf
    return Values(Holds.FINITE if finite else Holds.INFINITE, low)


def _acosh(_node: Node, x: Values) -> Values:
    return Values(x.holds, 0.0) if x.low >= 1.0 else _ANY


def _arc(_node: Node, x: Values) -> Values:
    """``atanh`` of the ends is infinite, ``asin`` and ``acos`` are not."""
    return Values(Holds.INFINITE) if x.low >= -1.0 and x.high <= 1.0 else _ANY


def _sqrt(_node: Node, x: Values) -> Values:
    return _ANY if x.low < 0.0 else Values(x.holds, 0.0)


def _rsqrt(_node: Node, x: Values) -> Values:
    if x.low < 0.0:
        return _ANY
    return Values(low=0.0) if x.is_never_zero else Values(Holds.INFINITE)


def _clamp(node: Node, x: Values, *_bounds: Values) -> Values:
    match = match_of(node)
    if match is None or match.bounds is None:
        return Values(x.holds)
    least, most = match.bounds
    low, high = (min(max(end, least), most) for end in (x.low, x.high))
    bounded = math.isfinite(low) and math.isfinite(high)
    return Values(Holds.FINITE if bounded else x.holds, low, high)


def _maximum(_node: Node, a: Values, b: Values) -> Values:
    return Values(max(a.holds, b.holds), max(a.low, b.low), max(a.high, b.high))


def _minimum(_node: Node, a: Values, b: Values) -> Values:
    return Values(max(a.holds, b.holds), min(a.low, b.low), min(a.high, b.high))


def _within(low: float, high: float) -> Callable[..., Values]:
    return lambda _node, *_read: Values(low=low, high=high)


def _from(low: float) -> Callable[..., Values]:
    return lambda _node, x, *_read: Values(x.holds, low)


def _wave(_node: Node, x: Values) -> Values:
    return Values(low=-1.0, high=1.0) if x.holds is Holds.FINITE else _ANY


_OF_TARGETS: Mapping[Any, Callable[..., Values]] = {
    aten.acos.default: _arc,
    aten.acosh.default: _acosh,
    aten.asin.default: _arc,
    aten.atanh.default: _arc,
    aten.cos.default: _wave,
    aten.exp2.default: _exp,
    aten.expm1.default: _expm1,
    aten.log10.default: _log,
    aten.log1p.default: _log1p,
    aten.log2.default: _log,
    aten.pow.Scalar: _power_of_number,
    aten.pow.Tensor_Scalar: _power,
    aten.sin.default: _wave,
}

_OF_FAMILIES: Mapping[OpRule, Callable[..., Values]] = {
    ABS: _from(0.0),
    ADD: _add,
    CEIL: _from(-math.inf),
    CLAMP: _clamp,
    DIV: _div,
    ELU: _from(-math.inf),
    EXP: _exp,
    FLOOR: _from(-math.inf),
    HARDSIGMOID: _within(0.0, 1.0),
    LEAKY_RELU: _from(-math.inf),
    LOG: _log,
    MAXIMUM: _maximum,
    MINIMUM: _minimum,
    MUL: _mul,
    NEG: lambda _node, x: _negative(x),
    RECIPROCAL: _reciprocal,
    RELU: _clamp,
    RSQRT: _rsqrt,
    SIGMOID: _within(0.0, 1.0),
    SOFTPLUS: _from(0.0),
    SQRT: _sqrt,
    SUB: _sub,
    TANH: _within(-1.0, 1.0),
}
