"""Remainders and rounded quotients, in float ops that the delegate has.

``a - n b`` with ``n`` next to ``a / b`` is a float32 number ``r``, but a product and a difference
round on the way to it. They do not where ``b = h + l`` is taken in halves of 12 bits: with
``|n| <= 2**11``, ``n h`` and ``n l`` have 24 bits at most, and so has ``a - n h = r + n l``, a
multiple of the last bit of ``b`` and not larger than ``b``. A first step by ``2**11 b`` brings
``a`` near enough, so that quotients of up to ``2**22`` are exact. The remainder has the sign that
it should, or ``b`` more of it. Tensors may hold divisors between ``2**-100`` and ``2**100``; by 0
or infinity everything gives NaN here.

References:
    T. J. Dekker, "A floating-point technique for extending the available precision", 1971: the
    halves of a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import Numbers, calls, graph_pass, replace
from custom_quantizer.core.arithmetic import round_to_float32
from custom_quantizer.core.graph import argument, is_float32

aten = torch.ops.aten

_STEP = 2.0**11
"""Largest multiple that is subtracted at once."""

_WHOLE = 1.5 * 2.0**23
"""A sum with it rounds what is within ``2**22`` to the nearest whole number."""

_DIVISORS = (2.0**-100, 2.0**100)
"""Sizes of constant divisors whose halves and multiples are normal numbers."""


@graph_pass("remainders and rounded quotients", "steps of float with the same values")
def quotients_in_steps(model: GraphModule) -> int:
    """Those of float32, with quotients of up to ``2**22``."""
    count = 0
    for node in calls(model, frozenset(STEPS)):
        operands = [node, *(arg for arg in node.args[:2] if _is_tensor(arg))]
        if not all(map(is_float32, operands)):
            continue
        dividend, divisor = node.args[:2]
        if isinstance(divisor, (int, float)):
            divisor = round_to_float32(divisor)
            if not _DIVISORS[0] < abs(divisor) < _DIVISORS[1]:
                continue
        elif not _is_tensor(divisor):
            divisor = Numbers(model, node).tensor(divisor)
        build = Numbers(model, node)
        new = STEPS[node.target](build, node, build.tensor(dividend), divisor)
        if new is not None:
            replace(node, new)
            count += 1
    return count


_Divisor = Node | float
"""A tensor, or a number that float32 has."""


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _next(build: Numbers, a: Node, b: _Divisor) -> tuple[Node, Node]:
    """A whole number next to ``a / b``, and what it leaves of ``a``: half of ``b`` at most."""
    high: _Divisor
    low: _Divisor
    if isinstance(b, float):
        high = round_to_float32(b * _HALVING)
        high = round_to_float32(high - round_to_float32(high - b))
        low = b - high
    else:
        far = build.times(b, _HALVING)
        high = build.call(aten.sub.Tensor, far, build.call(aten.sub.Tensor, far, b))
        low = build.call(aten.sub.Tensor, b, high)
    total = None
    for step in (_STEP, 1.0):
        unit = build.tensor(b * step if isinstance(b, float) else build.times(b, step))
        count = build.call(aten.div.Tensor, a, unit)
        count = build.call(aten.add.Tensor, count, build.number(_WHOLE))
        count = build.call(aten.sub.Tensor, count, build.number(_WHOLE))
        count = build.times(count, step)
        for half in (high, low):
            if half != 0.0:
                a = build.call(aten.sub.Tensor, a, build.times(count, half))
        total = count if total is None else build.call(aten.add.Tensor, total, count)
    return cast(Node, total), a


_HALVING = 2.0**12 + 1


def _beyond(build: Numbers, rest: Node, b: _Divisor) -> Node:
    """-1 where a remainder has another sign than ``b``, else 0."""
    return build.below_zero(
        build.times(rest, math.copysign(1.0, b) if isinstance(b, float) else build.sign(b))
    )


def _remainder(build: Numbers, _node: Node, a: Node, b: _Divisor) -> Node:
    """With the sign of the divisor."""
    _, rest = _next(build, a, b)
    return build.call(aten.sub.Tensor, rest, build.times(_beyond(build, rest, b), b))


def _fmod(build: Numbers, node: Node, a: Node, b: _Divisor) -> Node:
    """With the sign of the dividend."""
    size = abs(b) if isinstance(b, float) else build.call(aten.abs.default, b)
    rest = _remainder(build, node, build.call(aten.abs.default, a), size)
    return build.call(aten.mul.Tensor, rest, build.sign(a))


def _floor(build: Numbers, _node: Node, a: Node, b: _Divisor) -> Node:
    count, rest = _next(build, a, b)
    return build.call(aten.add.Tensor, count, _beyond(build, rest, b))


def _rounded(build: Numbers, node: Node, a: Node, b: _Divisor) -> Node | None:
    mode = argument(node, 2, "rounding_mode")
    if mode == "floor":
        return _floor(build, node, a, b)
    return build.trunc(build.call(aten.div.Tensor, a, build.tensor(b))) if mode == "trunc" else None


STEPS: Mapping[Any, Callable[[Numbers, Node, Node, Any], Node | None]] = {
    aten.div.Scalar_mode: _rounded,
    aten.div.Tensor_mode: _rounded,
    aten.floor_divide.Scalar: _floor,
    aten.floor_divide.default: _floor,
    aten.fmod.Scalar: _fmod,
    aten.fmod.Tensor: _fmod,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Scalar_Tensor: _remainder,
    aten.remainder.Tensor: _remainder,
}
