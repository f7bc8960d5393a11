"""Functions of angles, hyperbolic functions, the inverses of both, and the error function.

XNNPACK has sines and cosines, exponentials and logarithms. What these cannot say is a polynomial:
where a function needs one for each of two ranges, the smaller of two arguments is the one in its
range, and a factor of 0 or 1 tells which it was. NaN stays what it is, and so do arguments that
have no result.

References:
    S. L. Moshier, "Cephes", 1989: how arguments are reduced. The polynomials are fitted anew, by
    weighted least squares, to the least relative error of the result.
    Eigen, ``generic_fast_erf``: the quotient of polynomials.
    W. H. Press et al., "Numerical Recipes in C", 1992, section 6.2: ``erfcc``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    FLOAT32_MAX,
    Numbers,
    Steps,
    graph_pass,
    in_steps,
)
from custom_quantizer.backends.xnnpack.passes.functions import elus, log1p
from custom_quantizer.backends.xnnpack.passes.running import sum_of_exponentials

aten = torch.ops.aten


@graph_pass(
    "functions of angles, hyperbolic functions, erf",
    "steps of float, up to the last bits of float32",
    exact=False,
)
def transcendentals_in_steps(model: GraphModule) -> int:
    """How far each is from PyTorch is in ``docs/ops.md``."""
    return in_steps(model, STEPS)


class _Terms:
    """Sums and products of a function, as steps of a graph."""

    def __init__(self, build: Numbers) -> None:
        self.build = build

    def plus(self, a: Node, b: Node | float) -> Node:
        b = b if isinstance(b, Node) else self.build.number(b)
        return self.build.call(aten.add.Tensor, a, b)

    def minus(self, a: Node | float, b: Node | float) -> Node:
        a, b = (x if isinstance(x, Node) else self.build.number(x) for x in (a, b))
        return self.build.call(aten.sub.Tensor, a, b)

    def times(self, a: Node, b: Node | float) -> Node:
        return self.build.times(a, b)

    def over(self, a: Node | float, b: Node) -> Node:
        a = a if isinstance(a, Node) else self.build.number(a)
        return self.build.call(aten.div.Tensor, a, b)

    def of(self, name: str, x: Node) -> Node:
        return self.build.call(getattr(aten, name).default, x)

    def polynomial(self, z: Node, factors: Sequence[float]) -> Node:
        """``factors[0] + factors[1] * z + ...``, by Horner's rule."""
        *others, last = factors
        total = self.times(z, last)
        for factor in reversed(others[1:]):
            total = self.times(self.plus(total, factor), z)
        return self.plus(total, others[0])


def _tan(build: Numbers, x: Node) -> Node:
    f = _Terms(build)
    return f.over(f.of("sin", x), f.of("cos", x))


def _sinc(build: Numbers, x: Node) -> Node:
    """``sin(pi x) / (pi x)``, both 1 more where ``x`` is 0."""
    f = _Terms(build)
    angle = f.times(x, math.pi)
    zero = f.minus(1.0, build.above_zero(f.of("abs", angle)))
    return f.over(f.plus(f.of("sin", angle), zero), f.plus(angle, zero))


_ASIN = (
    0.16666753590106964,
    0.07495241612195969,
    0.04547709971666336,
    0.024147601798176765,
    0.042218565940856934,
)
"""``(asin(s) / s - 1) / s**2`` by powers of ``s**2`` up to 1/4, off by ``2**-27`` of ``asin``."""


def _arc(build: Numbers, x: Node) -> tuple[Node, Node, Node]:
    """``asin`` of ``s``, which is ``|x|`` or ``sqrt((1 - |x|) / 2)``; ``|x| > 1/2``; the sign.

    The smaller one is ``s``. Beyond 1/2 ``asin |x|`` is ``pi / 2 - 2 asin(s)``.
    """
    f = _Terms(build)
    size = f.of("abs", x)
    half = f.times(f.minus(1.0, size), 0.5)
    s = build.call(aten.minimum.default, size, f.of("sqrt", half))
    square = build.call(aten.minimum.default, f.times(size, size), half)
    arc = f.plus(s, f.times(f.times(s, square), f.polynomial(square, _ASIN)))
    return arc, build.above_zero(f.minus(size, 0.5)), build.sign(x)


def _asin(build: Numbers, x: Node) -> Node:
    f = _Terms(build)
    arc, beyond, sign = _arc(build, x)
    arc = f.times(arc, f.minus(1.0, f.times(beyond, 3.0)))
    return f.times(f.plus(arc, f.times(beyond, math.pi / 2)), sign)


def _acos(build: Numbers, x: Node) -> Node:
    """``pi / 2 - asin(x)``; next to 1 that is ``2 asin(s)``, of which nothing is lost."""
    f = _Terms(build)
    arc, beyond, sign = _arc(build, x)
    arc = f.times(f.times(arc, f.minus(f.times(beyond, 3.0), 1.0)), sign)
    right = f.times(f.minus(1.0, f.times(beyond, sign)), math.pi / 2)
    return f.plus(right, arc)


_ATAN = (
    -0.3333316743373871,
    0.19994136691093445,
    -0.14214208722114563,
    0.10678939521312714,
    -0.07580576092004776,
    0.043553516268730164,
    -0.01658116839826107,
    0.0029745865613222122,
)
"""``(atan(t) / t - 1) / t**2`` by powers of ``t**2`` up to 1, off by ``2**-26`` of ``atan``."""


def _turned(build: Numbers, t: Node, beyond: Node) -> Node:
    """``atan(t)`` of what is between 0 and 1, and ``pi / 2`` less that where it was inverted."""
    f = _Terms(build)
    square = f.times(t, t)
    angle = f.plus(t, f.times(f.times(t, square), f.polynomial(square, _ATAN)))
    angle = f.times(angle, f.minus(1.0, f.times(beyond, 2.0)))
    return f.plus(angle, f.times(beyond, math.pi / 2))


def _atan(build: Numbers, x: Node) -> Node:
    f = _Terms(build)
    size = f.of("abs", x)
    t = build.call(aten.minimum.default, size, f.over(1.0, size))
    angle = _turned(build, t, build.above_zero(f.minus(size, 1.0)))
    return f.times(angle, build.sign(x))


def _atan2(build: Numbers, y: Node, x: Node) -> Node:
    """The angle of a vector: ``atan`` of the smaller size over the larger, turned and reflected.

    The sign of zeros counts: it is that of ``1 / y`` and ``1 / x``. The quotient of two is 0.
    """
    f = _Terms(build)
    sizes = f.of("abs", y), f.of("abs", x)
    _, t = _by_larger(build, *sizes)
    angle = _turned(build, t, build.above_zero(f.minus(*sizes)))
    (up, right) = (_side(build, value) for value in (y, x))
    back = f.times(f.minus(1.0, right), 0.5)
    return f.times(f.plus(f.times(angle, right), f.times(back, math.pi)), up)


def _by_larger(build: Numbers, a: Node, b: Node) -> tuple[Node, Node]:
    """The larger of two sizes, and the smaller one over it."""
    small, large = (build.call(op.default, a, b) for op in (aten.minimum, aten.maximum))
    divisor = build.call(aten.hardtanh.default, large, 2.0**-126, math.inf)
    return large, build.call(aten.div.Tensor, small, divisor)


def _side(build: Numbers, x: Node) -> Node:
    """1 or -1, the sign of a number, also that of zeros."""
    f = _Terms(build)
    near = build.call(aten.hardtanh.default, x, -1.0, 1.0)
    return build.call(aten.hardtanh.default, f.over(1.0, near), -1.0, 1.0)


def _sinh(build: Numbers, x: Node) -> Node:
    """``(exp(|x|) + 1) / 2`` times ``1 - exp(-|x|)``, which has the sign of ``x``."""
    f = _Terms(build)
    lack = f.minus(*elus(build, x, f.of("relu", x)))
    growth = f.plus(f.times(f.of("exp", f.of("abs", x)), 0.5), 0.5)
    return f.times(growth, lack)


def _cosh(build: Numbers, x: Node) -> Node:
    f = _Terms(build)
    size = f.of("abs", x)
    both = f.plus(f.of("exp", size), f.of("exp", f.of("neg", size)))
    return f.times(both, 0.5)


def _asinh(build: Numbers, x: Node) -> Node:
    """``log1p(a + a**2 / (1 + sqrt(1 + a**2)))`` of ``a = |x|``, without squares of large ones."""
    f = _Terms(build)
    size = f.of("abs", x)
    # The square of a larger one is infinite; of 0 this makes 0 all the same.
    inverse = build.call(aten.hardtanh.default, f.over(1.0, size), 0.0, 2.0**60)
    root = f.of("sqrt", f.plus(f.times(inverse, inverse), 1.0))
    raised = f.plus(size, f.over(size, f.plus(inverse, root)))
    return f.times(log1p(build, raised), build.sign(x))


def _acosh(build: Numbers, x: Node) -> Node:
    """``log1p(t + sqrt(t) * sqrt(t + 2))`` with ``t = x - 1``."""
    f = _Terms(build)
    t = f.minus(x, 1.0)
    root = f.times(f.of("sqrt", t), f.of("sqrt", f.plus(t, 2.0)))
    return log1p(build, f.plus(t, root))


def _atanh(build: Numbers, x: Node) -> Node:
    """``log1p(2 a / (1 - a)) / 2`` of ``a = |x|``; XNNPACK's logarithm of infinity is none."""
    f = _Terms(build)
    size = f.of("abs", x)
    ratio = f.over(f.times(size, 2.0), f.minus(1.0, size))
    endless = f.of("relu", f.minus(ratio, FLOAT32_MAX))
    half = f.times(log1p(build, ratio), 0.5)
    return f.times(f.plus(half, endless), build.sign(x))


_ERF = (
    1.128379143519084,
    0.18520832239976145,
    0.050955695062380861,
    0.0034082910107109506,
    0.00022905065861350646,
)
_ERF_UNDER = (
    1.0,
    0.49746925110067538,
    0.11098505178285362,
    0.014070470171167667,
    0.0010179625278914885,
    0.000023547966471313185,
    -1.1791602954361697e-7,
)
_ERF_END = 3.832506856900711
"""From here on ``erf`` is 1 in float32."""


def _erf(build: Numbers, x: Node) -> Node:
    f = _Terms(build)
    x = build.call(aten.hardtanh.default, x, -_ERF_END, _ERF_END)
    square = f.times(x, x)
    ratio = f.over(f.polynomial(square, _ERF), f.polynomial(square, _ERF_UNDER))
    return build.call(aten.hardtanh.default, f.times(x, ratio), -1.0, 1.0)


_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)
"""``log(erfc(z) / t) + z**2`` by powers of ``t = 1 / (1 + z / 2)``, off by ``1.2e-7``."""


def _erfc(build: Numbers, x: Node) -> Node:
    """Of ``z = |x|``, small as it may be; below 0 what it lacks of 2."""
    f = _Terms(build)
    z = build.call(aten.hardtanh.default, f.of("abs", x), 0.0, 16.0)
    t = f.over(1.0, f.plus(f.times(z, 0.5), 1.0))
    power = f.of("exp", f.minus(f.polynomial(t, _ERFC), f.times(z, z)))
    below = f.times(build.below_zero(x), -1.0)
    value = f.times(f.times(t, power), f.minus(1.0, f.times(below, 2.0)))
    return f.plus(value, f.times(below, 2.0))


def _log_add_exp2(build: Numbers, x: Node, y: Node) -> Node:
    f = _Terms(build)
    total = sum_of_exponentials(build, f.times(x, math.log(2)), f.times(y, math.log(2)))
    return f.times(total, 1 / math.log(2))


def _hypot(build: Numbers, x: Node, y: Node) -> Node:
    """The larger size times ``sqrt(1 + t**2)``, where ``t`` is the smaller one over it."""
    f = _Terms(build)
    large, t = _by_larger(build, f.of("abs", x), f.of("abs", y))
    return f.times(large, f.of("sqrt", f.plus(f.times(t, t), 1.0)))


def _copysign(build: Numbers, x: Node, y: Node) -> Node:
    return build.times(build.call(aten.abs.default, x), _side(build, y))


def _heaviside(build: Numbers, x: Node, y: Node) -> Node:
    """1 above 0, and ``y`` at 0."""
    f = _Terms(build)
    zero = f.minus(1.0, build.above_zero(f.of("abs", x)))
    return f.plus(build.above_zero(x), f.times(zero, y))


def _logit(build: Numbers, x: Node, eps: float | None = None) -> Node:
    """``log(x / (1 - x))`` of what is kept away from 0 and 1, if that is asked for."""
    f = _Terms(build)
    if eps is not None:
        x = build.call(aten.hardtanh.default, x, eps, 1 - eps)
    return f.of("log", f.over(x, f.minus(1.0, x)))


def _x_log_y(build: Numbers, x: Node, y: Node) -> Node:
    """``x * log(y)``, with 1 for ``y`` where ``x`` is 0."""
    f = _Terms(build)
    kept = build.above_zero(f.of("abs", x))
    return f.times(x, f.of("log", f.plus(f.times(y, kept), f.minus(1.0, kept))))


STEPS: Steps = {
    aten.acos.default: _acos,
    aten.acosh.default: _acosh,
    aten.asin.default: _asin,
    aten.asinh.default: _asinh,
    aten.atan.default: _atan,
    aten.atan2.default: _atan2,
    aten.atanh.default: _atanh,
    aten.copysign.Tensor: _copysign,
    aten.cosh.default: _cosh,
    aten.erf.default: _erf,
    aten.erfc.default: _erfc,
    aten.heaviside.default: _heaviside,
    aten.hypot.default: _hypot,
    aten.logaddexp.default: sum_of_exponentials,
    aten.logaddexp2.default: _log_add_exp2,
    aten.logit.default: _logit,
    aten.sinc.default: _sinc,
    aten.sinh.default: _sinh,
    aten.tan.default: _tan,
    aten.xlogy.Tensor: _x_log_y,
}
"""By overload."""
