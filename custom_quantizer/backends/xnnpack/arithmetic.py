"""What the XNNPACK delegate computes, step by step in float32.

Mode ``xnnpack`` is that of x86-64, mode ``xnnpack-neon`` that of ARM, which rounds products of two
tensors in another way and is equal otherwise.

``fl()`` below is one float32 rounding, ``RNE`` rounds half to even, ``sat8``/``sat16`` saturate to
8/16 signed bits. The conventions are those of :mod:`custom_quantizer.core.arithmetic`.

References:
    XNNPACK at commit 92a7ad50: ``src/microparams-init.c`` (add, mul: ``scalar``, ``rndnu_neon``),
    ``src/operators/reduce-nd.c`` (mean), ``src/f32-avgpool/avgpool.c.in`` and
    ``src/indirection.c`` (tap order), ``src/f32-qs8-vcvt`` (quantize), ``src/qs8-gemm`` with fp32
    requantization.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from custom_quantizer.core.arithmetic import (
    INT8,
    INT16,
    ROUNDOFF,
    SMALLEST_NORMAL,
    Arithmetic,
    Bounds,
    PoolWindows,
    QParams,
    along,
    as_integers,
    as_reals,
    between_pixels,
    check_width,
    checked_count,
    checked_limits,
    checked_scale,
    checked_weight_scale,
    f32,
    float_to_integers,
    refuse_nan,
    resizable,
    round_to_24_bits,
    round_to_float32,
    saturate,
    scale_along,
    scale_of,
    shift_right_even,
    split_multiplier,
    store,
    wrap_int32,
)
from custom_quantizer.core.resizing import POSITION_BITS, Resizing
from custom_quantizer.errors import SchemeError

__all__ = [
    "XNNPACK",
    "XNNPACK_NEON",
    "XnnpackArithmetic",
    "XnnpackNeonArithmetic",
    "quantize_emulated_int16",
    "requantize_integer_only",
    "tie_break_offset",
    "xnnpack_add_parameters",
    "xnnpack_multiplier",
    "xnnpack_positions",
]

_AVGPOOL_CHUNK = 9


def _inverse(q: QParams, like: Tensor) -> Tensor:
    # A tensor over a tensor: dividing a number by a tensor may be computed as a reciprocal.
    scale = scale_along(q, like)
    return torch.ones_like(scale) / scale


def _quantize_a(x: Tensor, q: QParams) -> Tensor:
    """``A(x) = sat8(sat16(RNE(min(fl(x * fl(1 / s)), 32767))) + zp)``; NaN becomes 32767."""
    scaled = torch.fmin(x * _inverse(q, x), f32(INT16[1]))
    rounded = float_to_integers(torch.round(scaled)).clamp(*INT16)
    return saturate(rounded + q.zero_point, *INT8)


def _quantize_b(x: Tensor, q: QParams) -> Tensor:
    """``B(x) = sat8(RNE(fl(fl(x * fl(1 / s)) + zp)))``: the zero point goes in before rounding."""
    shifted = x * _inverse(q, x) + f32(q.zero_point)
    return saturate(float_to_integers(torch.round(shifted)), *INT8)


def quantize_emulated_int16(x: Tensor, q: QParams) -> Tensor:
    """Store float32 reals on a symmetric grid of up to 16 bits, with delegated float operators.

    Computes ``clamp(floor(fl(fl(x * fl(1 / s)) + 0.5)), quant_min, quant_max)``: half goes up.
    The delegate has no 16-bit kernels; this chain of float operators stays inside it.

    Args:
        x: float32 reals, without NaN.
        q: Zero point 0, a range within int16.

    Returns:
        int32 stored integers of the shape of ``x``.

    Raises:
        InputError: ``x`` is not float32, or holds NaN.
        SchemeError: The zero point is not 0, or the range exceeds int16.
    """
    if q.zero_point != 0 or q.quant_min < INT16[0] or q.quant_max > INT16[1]:
        raise SchemeError(
            "The delegate stores more than 8 bits only as symmetric integers within int16, got "
            f"[{q.quant_min}, {q.quant_max}] with zero point {q.zero_point}"
        )
    refuse_nan(as_reals(x, "The tensor to quantize"))
    floored = torch.floor(x * _inverse(q, x) + f32(0.5))
    return saturate(float_to_integers(floored), q.quant_min, q.quant_max)


def xnnpack_multiplier(
    input_scale: float, weight_scale: float | Tensor, output_scale: float
) -> Tensor:
    """Requantization multiplier of the delegate, ``S = fl(fl(sx * sw) / s_out)``.

    Returns:
        float32, 0-D, or 1-D with one entry per output channel.

    Raises:
        SchemeError: A scale is not a positive normal float32; or a multiplier reaches 256, which
            the delegate refuses to load, or underflows.
    """
    weight = checked_weight_scale(weight_scale)
    product = weight * f32(checked_scale(input_scale, "input_scale"))
    output = f32(checked_scale(output_scale, "output_scale"))
    multiplier = product / output.expand_as(product)
    legal = (multiplier >= SMALLEST_NORMAL) & (multiplier < 256.0)
    if not bool(legal.all()):
        worst = float(multiplier.reshape(-1)[~legal.reshape(-1)][0])
        raise SchemeError(
            f"A requantization multiplier is {worst!r}: the delegate needs a normal number below "
            "256; widen the output's range"
        )
    return multiplier


def requantize_integer_only(
    acc: Tensor,
    multiplier: Tensor,
    channel_axis: int,
    out: QParams,
    *,
    bounds: Bounds | None = None,
) -> Tensor:
    """Requantize as the delegate does, without one floating-point operation: for hardware.

    Rounds the wrapped accumulator to 24 significant bits, multiplies by the multiplier's 24-bit
    mantissa, rounds the product to 24 significant bits, shifts right; each rounding is half to
    even. Equals ``RNE(fl(fl(acc) * S))``: float32 rounds the accumulator and the product, so a
    single rounding of the exact product would differ now and then.

    Args:
        acc: As for :meth:`Arithmetic.requantize_accumulator`.
        multiplier: From :func:`xnnpack_multiplier`.
        channel_axis: Dimension of ``acc`` that holds the output channels.
        out: Parameters of the output; an int8 range.
        bounds: Limits of a fused activation.
    """
    _require_int8(out)
    mantissa, shift = split_multiplier(multiplier)
    narrowed = round_to_24_bits(wrap_int32(acc).to(torch.int64))
    product = round_to_24_bits(narrowed * along(mantissa, channel_axis, acc))
    # The product has at most 56 bits, so that any longer shift leaves 0 just as well.
    rounded = shift_right_even(product, along(shift, channel_axis, acc).clamp(max=60))
    return store(saturate(rounded + out.zero_point, *INT8), out, bounds)


def xnnpack_add_parameters(
    qa: QParams, qb: QParams, out: QParams, *, subtract: bool = False
) -> tuple[int, int, int]:
    """Integers with which the delegate adds: ``(multiplier_a, multiplier_b, shift)``.

    With ``ra = fl(sa / so)``, ``rb = fl(+-sb / so)`` and ``e`` the exponent of the larger of
    their magnitudes, ``shift = 20 - e`` and the multipliers are ``RNE(r * 2**shift)``.

    Raises:
        SchemeError: Not three int8 tensors of one scale each, or the larger ratio lies outside
            ``[2**-10, 2**8)``, for which the kernel is not defined.
    """
    for q in (qa, qb, out):
        _require_int8(q)
    output = np.float32(scale_of(out))
    with np.errstate(over="ignore", under="ignore"):
        ratio_a = float(np.float32(scale_of(qa)) / output)
        ratio_b = float(np.float32(scale_of(qb)) / output)
    largest = max(ratio_a, ratio_b)
    if not 2.0**-10 <= largest < 2.0**8:
        raise SchemeError(
            f"The larger of the scale ratios of an add is {largest!r}: the delegate needs it in "
            "[2**-10, 2**8); change the output's scale"
        )
    shift = 20 - (math.frexp(largest)[1] - 1)
    # Exact in double; Python's round() is half to even.
    multiplier_a, multiplier_b = round(ratio_a * 2.0**shift), round(ratio_b * 2.0**shift)
    return multiplier_a, -multiplier_b if subtract else multiplier_b, shift


def xnnpack_positions(resizing: Resizing, *, fused: bool) -> tuple[int, ...]:
    """Positions with which the delegate resizes int8 images, in units of ``2**-11``.

    It computes them in float32 when it loads a program. Where they are those of
    :meth:`Resizing.positions`, fused or not, they are so on every CPU.

    Args:
        resizing: of one dimension.
        fused: ``index * scale + offset`` is rounded once, as compilers for ARM may have it.

    References:
        XNNPACK at commit 92a7ad50, ``src/indirection.c``:
        ``xnn_indirection_init_resize_bilinear2d_hwc_q11``.
    """
    size, out, last = resizing.size, resizing.out, np.float32(resizing.size - 1)
    less = int(resizing.align_corners and out != 1)
    scale = np.float32(size - less) / np.float32(out - less)
    index = np.arange(out, dtype=np.float32)
    if resizing.align_corners:
        place = np.minimum(index * scale, last)
    else:
        offset = np.float32(0.5) * scale - np.float32(0.5)
        if fused:
            # The product is exact in float64. The sum may round there once more: by less than what
            # makes a difference, except next to a tie, which then differs from one of the others.
            exact = index.astype(np.float64) * np.float64(scale) + np.float64(offset)
            place = exact.astype(np.float32)
        else:
            place = index * scale + offset
        place = np.minimum(np.maximum(place, np.float32(0)), last)
    lower = np.floor(place)
    weight = np.rint((place - lower) * np.float32(1 << POSITION_BITS))
    return tuple((lower.astype(np.int64) * (1 << POSITION_BITS) + weight.astype(np.int64)).tolist())


def float_resize_error(rows: Resizing, columns: Resizing, largest: float) -> float:
    """How far two bilinear resizes in float32 may be from each other: this backend's, PyTorch's.

    With ``u = 2**-24``, to first order in it: where a pixel is taken from is ``index * scale +
    offset`` or ``(index + 0.5) * scale - 0.5`` with a rounded scale, off by at most ``3.5 u size``
    and ``3 u size``, and the result is continuous in it, with a slope of at most ``2 largest`` a
    pixel. That makes ``13 u (height + width) largest``. ``a + (b - a) * w`` in both directions
    rounds by at most ``10 u largest``, sums of products with weights ``w`` and ``1 - w`` by
    ``8 u largest``. One more unit of each is for what is of second order.

    Args:
        rows: how the height changes.
        columns: how the width changes.
        largest: absolute value of a pixel.

    References:
        XNNPACK at commit 92a7ad50, ``src/indirection.c``:
        ``xnn_indirection_init_resize_bilinear2d_hwc_f32``, ``src/f32-ibilinear``; PyTorch,
        ``aten/src/ATen/native/UpSample.h`` and ``cpu/UpSampleKernel.cpp``.
    """
    return (14 * (rows.size + columns.size) + 19) * ROUNDOFF * largest


def float_sum_error(terms: int, largest: float) -> float:
    """How far two sums of products in float32 may be from each other, in whatever order.

    Each is off by at most ``terms u`` of the sum of the absolute products, to first order in
    ``u = 2**-24``; one more unit of each is for what is of second order.

    Args:
        terms: products in the sum.
        largest: of the sum of their absolute values.

    References:
        N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1.
    """
    return 2 * (terms + 1) * ROUNDOFF * largest


def _store_emulated(real: Tensor, q: QParams) -> Tensor:
    """Store float64 reals as the float32 emulation does: half up above 8 bits, even below."""
    scaled = real / scale_of(q)
    rounded = torch.round(scaled) if q.fits_int8 else torch.floor(scaled + 0.5)
    return store(float_to_integers(rounded) + q.zero_point, q)


def _require_int8(q: QParams) -> None:
    if not q.fits_int8:
        raise SchemeError(
            f"The delegate has no integer kernel for the range [{q.quant_min}, {q.quant_max}]: "
            "only for ranges within int8"
        )


_MOST_OFFSETS = 64


def tie_break_offset(values: Tensor, ulps: float, q: QParams) -> float:
    """What the delegate adds to a function's value before it quantizes it to 8 bits or less.

    XNNPACK fuses dequantize, function and quantize into a table when it loads a program, and fills
    it by running its float32 kernels once; they are a few units in the last place off the true
    value, by other amounts on other CPUs. Let ``t`` be the value of an entry in output steps.
    Kernels agree on its integer unless ``t`` is within ``w = (ulps + 4) * 2**-24 * max |t|`` of the
    middle between two integers; the 4 are the roundings of the sum, of the reciprocal scale and of
    the product with it. The offset is 0 if no entry is that close, otherwise the smallest multiple
    of ``4 * w`` that leaves none.

    Args:
        values: of all entries of the table, float32.
        ulps: how far kernels may be off, in units of ``2**-24`` of the largest value; 0: exact.
        q: of the result.

    Returns:
        A float32 number, in units of the function's value.

    References:
        XNNPACK at commit 92a7ad50, ``src/subgraph.c``:
        ``xnn_subgraph_fuse_unary_quantized_into_lut``.
    """
    if ulps == 0.0:
        return 0.0
    scale = scale_of(q)
    steps = values.to(torch.float64) / scale
    # Far outside of what is stored the nearest integer does not matter.
    steps = steps[steps.abs() < 2 * q.levels]
    if not steps.numel():
        return 0.0
    window = (ulps + 4) * ROUNDOFF * float(steps.abs().max().clamp(min=1.0))
    for multiple in range(_MOST_OFFSETS):
        for sign in (1, -1):
            offset = sign * multiple * 4 * window
            moved = steps + offset
            if bool(((moved - torch.floor(moved) - 0.5).abs() > window).all()):
                return round_to_float32(offset * scale)
    return 0.0


class XnnpackArithmetic(Arithmetic):
    """The arithmetic of the XNNPACK delegate on x86-64 (mode ``xnnpack``).

    Ranges within int8 take the int8 kernels: saturation to 8 bits, then to a narrower range if
    the parameters have one. Where a tensor is wider, elementwise operators and average pooling run
    in float32 on the dequantized values and end in :func:`quantize_emulated_int16`; GEMMs and
    means then have no defined order of summation, and are computed in float64.
    """

    name = "xnnpack"
    continues_in_float32 = True

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``A(x)``; NaN gives the largest integer; :func:`quantize_emulated_int16` if wider."""
        as_reals(x, "The tensor to quantize")
        if not q.fits_int8:
            return quantize_emulated_int16(x, q)
        return store(_quantize_a(x, q), q)

    def quantize_table(self, values: Tensor, q: QParams, ulps: float) -> Tensor:
        """``A(fl(values + offset))``: see :func:`tie_break_offset`; no offset above 8 bits."""
        if q.fits_int8:
            values = values + f32(tie_break_offset(values, ulps, q))
        return self.quantize(values, q)

    def _requantize_accumulator(
        self, acc: Tensor, input_scale: float, weight: Tensor, axis: int, out: QParams, width: int
    ) -> Tensor:
        """``sat8(RNE(fl(fl(wrap32(acc)) * S)) + zp)``, ``S`` from :func:`xnnpack_multiplier`.

        ``acc`` may also be float32 that holds integers below 2**24, which it then does exactly.

        With a ``width`` of 64 or a wider output there is no integer kernel: the
        delegate multiplies and sums in float32, whose order of summation is not defined. The
        result here is that of float64, rounded as :func:`quantize_emulated_int16` does, which the
        delegate's agrees with to within one unit (see ``docs/device_arithmetic.md``).
        """
        check_width(width)
        if width != 32 or not out.fits_int8:
            unit = along(weight, axis, acc).to(torch.float64) * input_scale
            total = as_integers(acc, "The accumulator").to(torch.float64)
            return _store_emulated(total * unit, out)
        multiplier = along(xnnpack_multiplier(input_scale, weight, scale_of(out)), axis, acc)
        if acc.dtype == torch.float32:
            # Beyond 2**24 the sum with the zero point rounds, far outside of what is stored.
            stored = (acc * multiplier).round_().add_(float(out.zero_point)).clamp_(*INT8)
            return stored.clamp_(out.quant_min, out.quant_max).to(torch.int32)
        scaled = wrap_int32(acc).to(torch.float32) * multiplier
        rounded = float_to_integers(torch.round(scaled))
        return store(saturate(rounded + out.zero_point, *INT8), out)

    def _requantize(self, x: Tensor, src: QParams, dst: QParams) -> Tensor:
        """``A(dequantize(x))``."""
        return store(self.quantize(self.dequantize(x, src), dst), dst)

    def _add(
        self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams, subtract: bool
    ) -> Tensor:
        """``sat8(sat16((ma*(a-za) + mb*(b-zb) + 2**(sh-1)) >> sh) + zo)``: half goes up.

        The integers are those of :func:`xnnpack_add_parameters`.
        """
        if not (qa.fits_int8 and qb.fits_int8 and out.fits_int8):
            real_a, real_b = self.dequantize(a, qa), self.dequantize(b, qb)
            real = real_a - real_b if subtract else real_a + real_b
            return store(self.quantize(real, out), out)
        multiplier_a, multiplier_b, shift = xnnpack_add_parameters(qa, qb, out, subtract=subtract)
        acc = (
            multiplier_a * (as_integers(a, "The first operand") - qa.zero_point)
            + multiplier_b * (as_integers(b, "The second operand") - qb.zero_point)
            + (1 << (shift - 1))
        )
        shifted = (acc >> shift).clamp(*INT16)
        return store(saturate(shifted + out.zero_point, *INT8), out)

    def _mul(self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams) -> Tensor:
        """``sat8(sat16(RNE(fl((a-za)*(b-zb) * S))) + zo)``, ``S = fl(fl(sa * sb) / so)``."""
        if not (qa.fits_int8 and qb.fits_int8 and out.fits_int8):
            real = self.dequantize(a, qa) * self.dequantize(b, qb)
            return store(self.quantize(real, out), out)
        multiplier = xnnpack_multiplier(scale_of(qa), scale_of(qb), scale_of(out))
        product = as_integers(a, "The first operand") - qa.zero_point
        product = product * (as_integers(b, "The second operand") - qb.zero_point)
        rounded = self._rounded_product(product, multiplier).clamp(*INT16)
        return store(saturate(rounded + out.zero_point, *INT8), out)

    def _rounded_product(self, product: Tensor, multiplier: Tensor) -> Tensor:
        """``RNE(fl(product * S))``."""
        return float_to_integers(torch.round(product.to(torch.float32) * multiplier))

    def _square(self, a: Tensor, qa: QParams, out: QParams) -> Tensor:
        """``B(fl(x * x))`` of the dequantized values: a multiply of a tensor by itself."""
        real = self.dequantize(a, qa)
        real = real * real
        stored = _quantize_b(real, out) if out.fits_int8 else self.quantize(real, out)
        return store(stored, out)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """``sat8(RNE(fl(fl(fl(total) * S) + Z)))``, a global average pool.

        ``S = fl(fl(si / so) * fl(1 / n))`` and ``Z = fl(zo - fl(fl(n * zi) * S))``. Wider tensors
        are averaged in float64, as in :meth:`requantize_accumulator`.
        """
        if not (src.fits_int8 and dst.fits_int8):
            offset = as_integers(total, "The sum") - checked_count(count) * src.zero_point
            mean = offset.to(torch.float64) * (scale_of(src) / count)
            return _store_emulated(mean, dst)
        number = np.float32(checked_count(count))
        with np.errstate(over="ignore", under="ignore"):
            ratio = np.float32(scale_of(src)) / np.float32(scale_of(dst))
            scale = ratio * (np.float32(1.0) / number)
            offset = np.float32(dst.zero_point) - (number * np.float32(src.zero_point)) * scale
        if not scale < 256.0:
            raise SchemeError(
                f"The multiplier of a mean is {float(scale)!r}, 256 or more; widen the output's "
                "range"
            )
        scaled = wrap_int32(total).to(torch.float32) * f32(float(scale))
        rounded = float_to_integers(torch.round(scaled + f32(float(offset))))
        return store(saturate(rounded, *INT8), dst)

    def _pooled(self, x: Tensor, src: QParams) -> Tensor:
        return self.dequantize(x, src)

    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor:
        """``A(fl(sum * fl(1 / count)))``, the sum in float32 in the order of the kernel.

        Taps come kernel column by kernel column, in chunks of nine of which each is
        ``((2+3) + (4+5)) + (((0+1) + 8) + (6+7))``; chunks are added in turn.

        With padding that counts, the delegate leaves the pooling to ExecuTorch's portable kernel:
        ``A(fl(sum / count))``, the sum row by row, one tap at a time.
        """
        counts = windows.counts.to(torch.float32)
        if windows.counts_padding:
            rows = windows.rows
            by_row = [tap for row in range(rows) for tap in windows.taps[row::rows]]
            return self.quantize(sum(by_row, f32(0.0)) / counts, dst)
        total = zero = f32(0.0)
        for start in range(0, len(windows.taps), _AVGPOOL_CHUNK):
            chunk = windows.taps[start : start + _AVGPOOL_CHUNK]
            t = chunk + [zero] * (_AVGPOOL_CHUNK - len(chunk))
            chunk_sum = ((t[2] + t[3]) + (t[4] + t[5])) + (((t[0] + t[1]) + t[8]) + (t[6] + t[7]))
            total = total + chunk_sum
        return self.quantize(total * (torch.ones_like(counts) / counts), dst)

    def interpolate(self, x: Tensor, q: QParams, rows: Resizing, columns: Resizing) -> Tensor:
        """As in all modes; above 8 bits in float, which the delegate agrees with to one unit."""
        if q.fits_int8:
            return super().interpolate(x, q, rows, columns)
        values = resizable(x, rows, columns).to(torch.float64)
        for dim, resizing in ((-2, rows), (-1, columns)):
            place = torch.tensor(list(map(float, resizing.places)), dtype=torch.float64)
            lower = place.floor()
            values = between_pixels(values, dim, lower.to(torch.int64), place - lower)
        return store(float_to_integers(torch.floor(values + 0.5)), q)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Clamp integers on one grid; ``B(clamp(dequantize(x)))`` between two."""
        limits = checked_limits(low, high)
        if src.same_grid(dst):
            bounds = self.clamp_bounds(*limits, dst)
            return store(as_integers(x, "The tensor to clamp"), dst, bounds)
        real = self.dequantize(x, src).clamp(*limits)
        if not (src.fits_int8 and dst.fits_int8):
            return self.quantize(real, dst)
        return store(_quantize_b(real, dst), dst)

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """``RNE(clip(fl(fl(v / s) + zp), -128, 127))``: the zero point goes in before rounding.

        Wider ranges: the limits as :func:`quantize_emulated_int16` stores them.
        """
        limits = checked_limits(low, high)
        if not q.fits_int8:
            stored = quantize_emulated_int16(torch.tensor(limits, dtype=torch.float32), q)
            return int(stored[0]), int(stored[1])
        with np.errstate(over="ignore", under="ignore"):
            scaled = np.array(limits, dtype=np.float32) / np.float32(scale_of(q))
            clipped = np.clip(scaled + np.float32(q.zero_point), *INT8)
        lower, upper = (
            min(max(int(bound), q.quant_min), q.quant_max) for bound in np.rint(clipped)
        )
        return lower, upper


class XnnpackNeonArithmetic(XnnpackArithmetic):
    """The arithmetic of the XNNPACK delegate on ARM (mode ``xnnpack-neon``).

    Products of two tensors round half up, without a step in float32; all else is
    :class:`XnnpackArithmetic`'s.
    """

    name = "xnnpack-neon"

    def _rounded_product(self, product: Tensor, multiplier: Tensor) -> Tensor:
        """``floor(product * S + 1/2)``, as ``vqdmulh`` and ``vrshl`` have it.

        With ``S = m * 2**(-31 - n)`` and ``m`` its 24 bits shifted left by 7, NEON computes
        ``floor(floor(product * m / 2**31) / 2**n + 1/2)``. ``n`` is 1 at least (the product is
        shifted left before, if ``S`` reaches one half), so that the inner floor changes nothing.
        """
        # 17 bits times 24 bits, and one half: exact in float64.
        return float_to_integers(torch.floor(product.to(torch.float64) * multiplier + 0.5))


XNNPACK: Arithmetic = XnnpackArithmetic()
XNNPACK_NEON: Arithmetic = XnnpackNeonArithmetic()
