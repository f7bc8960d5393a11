"""An int32 multiplier in Q31 and a shift, no float at run time: mode ``fixed_point``.

References:
    gemmlowp: ``fixedpoint/fixedpoint.h``.

    TensorFlow Lite, under ``tensorflow/lite/kernels``: ``internal/quantization_util.cc``,
    ``internal/common.cc``, ``kernel_util.cc``, and ``internal/reference/`` with ``quantize.h``,
    ``requantize.h``, ``reduce.h``, ``sub.h``, ``integer_ops/{add,mul,conv,pooling}.h``.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 2.2.
"""

from __future__ import annotations

import math

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
    bit_length,
    check_width,
    checked_count,
    checked_limits,
    float_to_integers,
    refuse_nan,
    saturate,
    scale_along,
    scale_of,
    store,
    wrap_int32,
)
from custom_quantizer.errors import InputError, SchemeError

__all__ = [
    "FIXED_POINT",
    "FixedPointArithmetic",
    "multiply_by_quantized_multiplier",
    "multiply_by_quantized_multiplier_int64",
    "quantize_multiplier",
    "rounding_divide_by_pot",
    "saturating_rounding_doubling_high_mul",
]


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Write a real multiplier as ``multiplier * 2**(shift - 31)``.

    Args:
        real: Non-negative and finite, in double precision.

    Returns:
        An int32 multiplier in ``[2**30, 2**31)``, rounded half away from zero, and a shift,
        positive to the left. Multipliers below about ``2**-32`` become ``(0, 0)``.

    Raises:
        SchemeError: ``real`` is negative or not finite, or needs a left shift beyond 30.

    References:
        ``QuantizeMultiplier`` in ``quantization_util.cc``.
    """
    if not 0.0 <= real < math.inf:
        raise SchemeError(f"A requantization multiplier must be finite and >= 0, got {real!r}")
    fraction, shift = math.frexp(real)
    # The 53-bit fraction to 31 bits, in integers: adding half before the shift rounds half up.
    multiplier = (int(fraction * 2.0**53) + (1 << 21)) >> 22
    if multiplier == 1 << 31:
        multiplier, shift = 1 << 30, shift + 1
    if shift < -31:
        return 0, 0
    if shift > 30:
        raise SchemeError(f"The requantization multiplier {real!r} is too large: 2**30 or more")
    return multiplier, shift


def _as_int64(value: int | Tensor) -> Tensor:
    return value.to(torch.int64) if isinstance(value, Tensor) else torch.tensor(value)


def _check_shift(multiplier: Tensor, shift: Tensor, largest: int) -> None:
    if bool((multiplier < 0).any()) or bool((multiplier > INT32[1]).any()):
        raise SchemeError("A fixed-point multiplier must lie in [0, 2**31)")
    if bool((shift < -31).any()) or bool((shift > largest).any()):
        raise SchemeError(
            f"A fixed-point shift must lie in [-31, {largest}], got [{int(shift.min())}, "
            f"{int(shift.max())}]: the ratio of the scales is out of reach of this arithmetic"
        )


def saturating_rounding_doubling_high_mul(a: Tensor, b: int | Tensor) -> Tensor:
    """``a * b / 2**31`` rounded to nearest, ties upwards, as the NEON instruction VQRDMULH.

    Args:
        a: Integers within int32.
        b: Integers within int32, broadcast to ``a``.

    Returns:
        int32. ``-2**31`` times itself saturates to ``2**31 - 1``.

    References:
        ``SaturatingRoundingDoublingHighMul`` in ``fixedpoint.h``: a division that truncates,
        after a nudge of ``2**30``, or ``1 - 2**30`` for a negative product.
    """
    product = as_integers(a, "The first factor") * _as_int64(b)
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return saturate(torch.div(product + nudge, 1 << 31, rounding_mode="trunc"), *INT32)


def rounding_divide_by_pot(x: Tensor, exponent: int | Tensor) -> Tensor:
    """``x / 2**exponent`` rounded to nearest, ties away from zero.

    Args:
        x: Integers within int32.
        exponent: 0 to 31, broadcast to ``x``.

    Returns:
        int32.

    References:
        ``RoundingDivideByPOT`` in ``fixedpoint.h``.
    """
    value, power = as_integers(x, "The dividend"), _as_int64(exponent)
    mask = (torch.ones_like(power) << power) - 1
    threshold = (mask >> 1) + (value < 0)
    return ((value >> power) + ((value & mask) > threshold)).to(torch.int32)


def multiply_by_quantized_multiplier(
    x: Tensor, multiplier: int | Tensor, shift: int | Tensor
) -> Tensor:
    """``x * multiplier * 2**(shift - 31)`` with two roundings: the path of int32 accumulators.

    A left shift is applied first and saturates where the C code would overflow, which is
    undefined there; then :func:`saturating_rounding_doubling_high_mul`; then
    :func:`rounding_divide_by_pot` for a right shift.

    Args:
        x: Integers within int32.
        multiplier: In ``[0, 2**31)``, from :func:`quantize_multiplier`, broadcast to ``x``.
        shift: In ``[-31, 30]``, broadcast to ``x``.

    Returns:
        int32.

    Raises:
        SchemeError: A multiplier or shift lies outside its range.

    References:
        ``MultiplyByQuantizedMultiplier(int32_t, ...)``, double rounding, in ``common.cc``.
    """
    factor, power = _as_int64(multiplier), _as_int64(shift)
    _check_shift(factor, power, largest=30)
    shifted = saturate(as_integers(x, "The accumulator") << power.clamp(min=0), *INT32)
    high = saturating_rounding_doubling_high_mul(shifted, factor)
    return rounding_divide_by_pot(high, (-power).clamp(min=0))


def multiply_by_quantized_multiplier_int64(
    x: Tensor, multiplier: int | Tensor, shift: int | Tensor
) -> Tensor:
    """``x * multiplier * 2**(shift - 31)`` for 48-bit accumulators: 16-bit activations.

    The multiplier is reduced to 15 bits, so that the product fits 64; one rounding, ties upwards.

    Args:
        x: Integers in ``[-2**47, 2**47)``.
        multiplier: In ``[0, 2**31)``, from :func:`quantize_multiplier`, broadcast to ``x``.
        shift: In ``[-31, 7]``, broadcast to ``x``.

    Returns:
        int32, saturated (the C code asserts that the result fits).

    Raises:
        InputError: An accumulator exceeds 48 bits.
        SchemeError: A multiplier or shift lies outside its range.

    References:
        ``MultiplyByQuantizedMultiplier(int64_t, ...)`` in ``common.cc``.
    """
    value = as_integers(x, "The accumulator")
    factor, power = _as_int64(multiplier), _as_int64(shift)
    _check_shift(factor, power, largest=7)
    if bool(((value < -(1 << 47)) | (value >= 1 << 47)).any()):
        raise InputError("An accumulator exceeds the 48 bits of the 16x8 path")
    reduced = ((factor + (1 << 15)) >> 16).clamp(max=0x7FFF)
    total_shift = 15 - power
    half = torch.ones_like(total_shift) << (total_shift - 1)
    return saturate((value * reduced + half) >> total_shift, *INT32)


class FixedPointArithmetic(Arithmetic):
    """gemmlowp and TensorFlow Lite (mode ``fixed_point``): integer multipliers and shifts.

    Multipliers come from scales in double precision, offline. Where TFLite chooses by storage
    type, this class chooses by range, so that other widths work: tensors of at most 256 levels
    behave as int8, others as int16.
    """

    name = "fixed_point"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``fl(x / s)`` rounded half away from zero, plus the zero point, saturated.

        Raises:
            InputError: ``x`` is not float32, or holds NaN.

        References:
            ``AffineQuantize`` in ``quantize.h``.
        """
        refuse_nan(as_reals(x, "The tensor to quantize"))
        scaled = x / scale_along(q, x).expand_as(x)
        # Adding a half before truncating would itself round; the fraction is exact.
        whole = torch.trunc(scaled)
        away = torch.where((scaled - whole).abs() >= 0.5, torch.sign(scaled), 0.0)
        return store(float_to_integers(whole + away) + q.zero_point, q)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """``(q - zp) * s`` in double, rounded to float32."""
        offset = (as_integers(x, "The tensor to dequantize") - q.zero_point).to(torch.float64)
        return (offset * scale_along(q, x).to(torch.float64)).to(torch.float32)

    def _requantize_accumulator(
        self, acc: Tensor, input_scale: float, weight: Tensor, axis: int, out: QParams, width: int
    ) -> Tensor:
        """Multiply by ``sx * sw / s_out``, add the zero point, saturate.

        A 32-bit accumulator wraps and takes :func:`multiply_by_quantized_multiplier`; a 64-bit one
        takes :func:`multiply_by_quantized_multiplier_int64`.

        References:
            ``ConvPerChannel`` in ``integer_ops/conv.h``; the multipliers as in
            ``PopulateConvolutionQuantizationParams``, ``kernel_util.cc``.
        """
        check_width(width)
        reals = [input_scale * w / scale_of(out) for w in weight.reshape(-1).tolist()]
        pairs = torch.tensor([quantize_multiplier(real) for real in reals])
        multiplier = along(pairs[:, 0].reshape(weight.shape), axis, acc)
        shift = along(pairs[:, 1].reshape(weight.shape), axis, acc)
        if width == 32:
            scaled = multiply_by_quantized_multiplier(wrap_int32(acc), multiplier, shift)
        else:
            scaled = multiply_by_quantized_multiplier_int64(acc, multiplier, shift)
        return store(scaled.to(torch.int64) + out.zero_point, out)

    def _requantize(self, x: Tensor, src: QParams, dst: QParams) -> Tensor:
        """Multiply ``q - zp`` by ``s_in / s_out``, add the zero point, saturate.

        References:
            ``Requantize`` in ``requantize.h``.
        """
        multiplier, shift = quantize_multiplier(scale_of(src) / scale_of(dst))
        offset = as_integers(x, "The tensor to requantize") - src.zero_point
        scaled = multiply_by_quantized_multiplier(offset, multiplier, shift)
        return store(scaled.to(torch.int64) + dst.zero_point, dst)

    def _add(
        self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams, subtract: bool
    ) -> Tensor:
        """Bring both operands to twice the larger scale, add, bring the sum to the output's.

        The operands are first shifted left, by 20 bits if all three tensors have at most 256
        levels and by 15 otherwise.

        References:
            ``AddFunc`` in ``integer_ops/add.h``, ``SubElementwise`` in ``sub.h``; the multipliers
            as in ``add.cc``.
        """
        scale_a, scale_b = scale_of(qa), scale_of(qb)
        levels = max(qa.levels, qb.levels, out.levels)
        if levels > 1 << 16:
            raise SchemeError(f"A fixed-point add takes at most 16 bits, got {levels} levels")
        left_shift = 20 if levels <= 256 else 15
        twice_max = 2.0 * max(scale_a, scale_b)
        output = twice_max / (2.0**left_shift * scale_of(out))
        offset_a = as_integers(a, "The first operand") - qa.zero_point
        offset_b = as_integers(b, "The second operand") - qb.zero_point
        scaled_a = multiply_by_quantized_multiplier(
            offset_a << left_shift, *quantize_multiplier(scale_a / twice_max)
        )
        scaled_b = multiply_by_quantized_multiplier(
            offset_b << left_shift, *quantize_multiplier(scale_b / twice_max)
        )
        # Each of them is below 2**30 with at most 16 bits: their int32 sum holds.
        raw = scaled_a - scaled_b if subtract else scaled_a + scaled_b
        stored = multiply_by_quantized_multiplier(raw, *quantize_multiplier(output))
        return store(stored.to(torch.int64) + out.zero_point, out)

    def _mul(self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams) -> Tensor:
        """Multiply the integers, then by ``sa * sb / so``.

        TFLite requires zero point 0 for int16, which keeps the product in 32 bits. Where the
        ranges allow a larger product, this takes the 64-bit path instead of overflowing.

        References:
            ``MulElementwise`` in ``integer_ops/mul.h``; the multiplier as in ``mul_common.cc``.
        """
        real = scale_of(qa) * scale_of(qb) / scale_of(out)
        multiplier, shift = quantize_multiplier(real)
        offset_a = as_integers(a, "The first operand") - qa.zero_point
        offset_b = as_integers(b, "The second operand") - qb.zero_point
        multiply = (
            multiply_by_quantized_multiplier
            if qa.reach * qb.reach <= INT32[1]
            else multiply_by_quantized_multiplier_int64
        )
        scaled = multiply(offset_a * offset_b, multiplier, shift)
        return store(scaled.to(torch.int64) + out.zero_point, out)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """Multiply ``total - n * zp`` by ``s_in / (s_out * n)``, with ``1 / n`` in the multiplier.

        The multiplier of ``s_in / s_out`` is shifted left as far as ``n`` allows and divided by
        ``n``, truncating. Tensors of at most 256 levels take the int32 path, others the int64 one.

        References:
            ``QuantizedMeanOrSum`` in ``reduce.h``.
        """
        offset = as_integers(total, "The sum") - checked_count(count) * src.zero_point
        return self._scaled_mean(offset, torch.tensor(count), src, dst)

    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor:
        """Divide the sum of the stored integers by the count, ties away from zero.

        That is TFLite on one grid, its only case; between two grids, :meth:`mean` of each window.

        References:
            ``AveragePool`` in ``integer_ops/pooling.h``.
        """
        total, counts = windows.total(), windows.counts
        if not src.same_grid(dst):
            return self._scaled_mean(total, counts, src, dst)
        raw = total + counts * src.zero_point
        half = torch.div(counts, 2, rounding_mode="floor")
        nudged = torch.where(raw > 0, raw + half, raw - half)
        return store(torch.div(nudged, counts, rounding_mode="trunc"), dst)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Clamp integers; between two grids, requantize first."""
        bounds = self.clamp_bounds(low, high, dst)
        if src.same_grid(dst):
            return store(as_integers(x, "The tensor to clamp"), dst, bounds)
        return self.requantize(x, src, dst, bounds=bounds)

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """The limits as :meth:`quantize` stores them.

        References:
            ``CalculateActivationRangeQuantized`` in ``kernel_util.cc``.
        """
        scale_of(q)
        limits = torch.tensor(checked_limits(low, high), dtype=torch.float32)
        stored = self.quantize(limits, q)
        return int(stored[0]), int(stored[1])

    def _scaled_mean(self, offset: Tensor, counts: Tensor, src: QParams, dst: QParams) -> Tensor:
        multiplier, shift = quantize_multiplier(scale_of(src) / scale_of(dst))
        extra = (bit_length(counts) - 1).clamp(max=min(32, 31 + shift))
        scaled = torch.div(torch.tensor(multiplier) << extra, counts, rounding_mode="floor")
        if max(src.levels, dst.levels) <= 256:
            mean = multiply_by_quantized_multiplier(wrap_int32(offset), scaled, shift - extra)
        else:
            mean = multiply_by_quantized_multiplier_int64(offset, scaled, shift - extra)
        return store(mean.to(torch.int64) + dst.zero_point, dst)


FIXED_POINT: Arithmetic = FixedPointArithmetic()
