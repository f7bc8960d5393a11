"""Rational arithmetic, one rounding (half to even) at the end: mode ``exact``."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from custom_quantizer.core.arithmetic import (
    INT32,
    Arithmetic,
    Bounds,
    PoolWindows,
    QParams,
    along,
    as_integers,
    as_reals,
    checked_count,
    checked_limits,
    refuse_nan,
    resizable,
    round_to_24_bits,
    scale_along,
    scale_of,
    split_multiplier,
    store,
)
from custom_quantizer.core.resizing import Resizing
from custom_quantizer.errors import InputError

__all__ = ["EXACT", "ExactArithmetic"]

_Objects = npt.NDArray[np.object_]


def _objects(x: Tensor) -> _Objects:
    """Arrays of Python integers: numpy computes with them elementwise, without overflow."""
    return np.asarray(x.detach().cpu().numpy().astype(object), dtype=object)


def _round_half_even(numerator: Any, denominator: Any) -> Any:
    """``numerator / denominator`` rounded half to even; denominators are positive."""
    floor = numerator // denominator
    twice_rest = 2 * (numerator - floor * denominator)
    up = (twice_rest > denominator) | ((twice_rest == denominator) & (floor % 2 == 1))
    return floor + up


def _store_exact(numerator: Any, ratio: tuple[Any, Any], q: QParams) -> Tensor:
    """Store ``numerator * ratio[0] / ratio[1]``, which is in units of the scale of ``q``."""
    top, bottom = ratio
    stored = np.asarray(_round_half_even(numerator * top, bottom) + q.zero_point, dtype=object)
    # Object arrays of no dimension turn into scalars under arithmetic: keep the shape.
    limited = np.asarray(np.minimum(np.maximum(stored, q.quant_min), q.quant_max), dtype=object)
    return store(torch.from_numpy(limited.reshape(stored.shape).astype(np.int64)), q)


def _scale_ratio(scale: Tensor) -> tuple[_Objects, _Objects]:
    """float32 scales as elementwise numerators and denominators."""
    ratios = [Fraction(value) for value in scale.reshape(-1).tolist()]
    tops = np.array([r.numerator for r in ratios], dtype=object).reshape(tuple(scale.shape))
    bottoms = np.array([r.denominator for r in ratios], dtype=object).reshape(tuple(scale.shape))
    return tops, bottoms


class ExactArithmetic(Arithmetic):
    """Rational arithmetic (mode ``exact``): the real result over the scale, rounded once.

    float32 scales are exact rationals. ``RNE(real / scale)`` is rounded half to even before the
    zero point is added, as PyTorch's quantize does. Nothing wraps. Arbitrary precision costs about
    a microsecond per element.
    """

    name = "exact"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``RNE(x / s) + zp``; infinities saturate.

        Raises:
            InputError: ``x`` is not float32, or holds NaN.
        """
        refuse_nan(as_reals(x, "The tensor to quantize"))
        finite = torch.where(torch.isfinite(x), x, 0.0)
        # Every float32 is an integer times 2**-173: 24 bits of mantissa, exponents down to -149.
        fraction, exponent = torch.frexp(finite)
        mantissa = _objects((fraction * 2.0**24).to(torch.int64))
        numerator = mantissa << _objects(exponent.to(torch.int64) + 149)
        top, bottom = _scale_ratio(scale_along(q, x))
        stored = _store_exact(numerator, (bottom, top * 2**173), q)
        stored = torch.where(torch.isposinf(x), q.quant_max, stored)
        return torch.where(torch.isneginf(x), q.quant_min, stored)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """The float32 nearest to ``(q - zp) * s``, half to even."""
        mantissa, shift = split_multiplier(scale_along(q, x))
        offset = as_integers(x, "The tensor to dequantize") - q.zero_point
        if bool((offset.abs() > 2 * -INT32[0]).any()):
            raise InputError("The tensor to dequantize exceeds 32 bits")
        # Rounded to 24 bits here, so that double holds the result and float32 rounds no more.
        rounded = round_to_24_bits(offset * mantissa)
        units = torch.from_numpy(np.asarray(np.ldexp(1.0, -shift.numpy())))
        return (rounded.to(torch.float64) * units).to(torch.float32)

    def _requantize_accumulator(
        self, acc: Tensor, input_scale: float, weight: Tensor, axis: int, out: QParams, width: int
    ) -> Tensor:
        """``RNE(acc * sx * sw / s_out) + zp``; the accumulator never wraps."""
        del width
        numerator = _objects(as_integers(acc, "The accumulator"))
        common = Fraction(input_scale) / Fraction(scale_of(out))
        top, bottom = _scale_ratio(along(weight, axis, acc))
        ratio = (top * common.numerator, bottom * common.denominator)
        return _store_exact(numerator, ratio, out)

    def _requantize(self, x: Tensor, src: QParams, dst: QParams) -> Tensor:
        """``RNE((q - zp) * s_in / s_out) + zp``."""
        offset = _objects(as_integers(x, "The tensor to requantize") - src.zero_point)
        ratio = Fraction(scale_of(src)) / Fraction(scale_of(dst))
        return _store_exact(offset, ratio.as_integer_ratio(), dst)

    def _add(
        self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams, subtract: bool
    ) -> Tensor:
        """``RNE(((a - za) * sa +- (b - zb) * sb) / so) + zo``."""
        ratio_a = Fraction(scale_of(qa)) / Fraction(scale_of(out))
        ratio_b = Fraction(scale_of(qb)) / Fraction(scale_of(out))
        common = math.lcm(ratio_a.denominator, ratio_b.denominator)
        weight_a, weight_b = int(ratio_a * common), int(ratio_b * common)
        offset_a = _objects(as_integers(a, "The first operand") - qa.zero_point)
        offset_b = _objects(as_integers(b, "The second operand") - qb.zero_point)
        total = offset_a * weight_a + offset_b * (-weight_b if subtract else weight_b)
        return _store_exact(total, (1, common), out)

    def _mul(self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams) -> Tensor:
        """``RNE((a - za) * (b - zb) * sa * sb / so) + zo``."""
        offset_a = _objects(as_integers(a, "The first operand") - qa.zero_point)
        offset_b = _objects(as_integers(b, "The second operand") - qb.zero_point)
        ratio = Fraction(scale_of(qa)) * Fraction(scale_of(qb)) / Fraction(scale_of(out))
        return _store_exact(offset_a * offset_b, ratio.as_integer_ratio(), out)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """``RNE((total - n * zi) * s_in / (n * s_out)) + zo``."""
        offset = _objects(as_integers(total, "The sum") - checked_count(count) * src.zero_point)
        ratio = Fraction(scale_of(src)) / Fraction(scale_of(dst)) / count
        return _store_exact(offset, ratio.as_integer_ratio(), dst)

    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor:
        """:meth:`mean` of each window."""
        ratio = Fraction(scale_of(src)) / Fraction(scale_of(dst))
        bottom = _objects(windows.counts) * ratio.denominator
        return _store_exact(_objects(windows.total()), (ratio.numerator, bottom), dst)

    def interpolate(self, x: Tensor, q: QParams, rows: Resizing, columns: Resizing) -> Tensor:
        """``RNE`` of the sum weighted with the true positions."""
        values, denominator = _objects(resizable(x, rows, columns)), 1
        for dim, resizing in ((-2, rows), (-1, columns)):
            unit = math.lcm(*(place.denominator for place in resizing.places))
            place = [int(place * unit) for place in resizing.places]
            lower = np.array([numerator // unit for numerator in place])
            rest = np.array([numerator % unit for numerator in place], dtype=object)
            first = np.take(values, lower, dim)
            second = np.take(values, np.minimum(lower + 1, resizing.size - 1), dim)
            values = first * unit + (second - first) * (rest[:, None] if dim == -2 else rest)
            denominator *= unit
        offset = values - denominator * q.zero_point
        return _store_exact(offset, (1, denominator), q)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """``RNE(clamp((q - zp) * s_in) / s_out) + zp``; rounding and clamping commute."""
        return self.requantize(x, src, dst, bounds=self.clamp_bounds(low, high, dst))

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """``RNE(v / s) + zp``, saturated."""
        scale = Fraction(scale_of(q))

        def stored(limit: float) -> int:
            if math.isinf(limit):
                return q.quant_max if limit > 0 else q.quant_min
            value = round(Fraction(limit) / scale) + q.zero_point
            return min(max(value, q.quant_min), q.quant_max)

        lower, upper = checked_limits(low, high)
        return stored(lower), stored(upper)


EXACT: Arithmetic = ExactArithmetic()
