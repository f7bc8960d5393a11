"""What a TOSA program computes, step by step in integers: mode ``tosa``.

Everything that changes a scale is one or more RESCALE operators: a multiplication by an integer, an
addition of half of what is shifted out, a shift to the right. So ties go up, and there is one
rounding. Accumulators of 8-bit activations have 32 bits and meet multipliers of 31 bits; those of
16-bit activations have 48 bits and meet multipliers of 15 bits.

References:
    The TOSA specification, version 1.0: ``RESCALE``, ``apply_scale_32``, ``apply_scale_16``; its
    note on precision scaling. ExecuTorch 1.5.1: ``backends/arm/operators/op_tosa_rescale.py``
    (multipliers of real numbers), ``backends/arm/_passes/insert_rescales_pass.py`` (which RESCALE
    operators stand around a sum or a product), ``rewrite_conv_pass.py`` (behind a convolution).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    check_width,
    checked_limits,
    float_to_integers,
    refuse_nan,
    scale_along,
    scale_of,
    store,
)
from custom_quantizer.errors import InputError, SchemeError

__all__ = [
    "TOSA",
    "Rescales",
    "TosaArithmetic",
    "check_reach",
    "compare_rescales",
    "product_rescales",
    "rescale",
    "rescale_by",
    "rescale_multiplier",
    "sum_rescales",
]

Rescales = tuple[tuple[float, ...], float]
"""Factors of the RESCALE operators that bring operands to int32, and of that which stores the
result."""

INT48: Bounds = (-(2**47), 2**47 - 1)

_LARGEST_SHIFT = 62


def rescale_multiplier(real: float, bits: int = 31) -> tuple[int, int]:
    """Write a positive real factor as ``multiplier * 2**-shift``.

    Args:
        real: the factor, in double precision.
        bits: of the multiplier: 31, or 15 behind an accumulator of 48 bits.

    Returns:
        A multiplier in ``[2**(bits - 1), 2**bits)``, rounded half to even, and a shift to the right
        in ``[2, 62]``. For factors so small that the shift would be larger, the multiplier is
        shifted instead, and loses its last bits.

    Raises:
        SchemeError: the factor is not positive and finite, or needs a shift below 2.

    References:
        ``_compute_multiplier_and_shift`` in ``op_tosa_rescale.py``.
    """
    if not 0.0 < real < math.inf:
        raise SchemeError(f"A RESCALE factor must be positive and finite, got {real!r}")
    fraction, exponent = math.frexp(real)
    multiplier, shift = round(fraction * 2.0**bits), bits - exponent
    if multiplier == 1 << bits:
        multiplier, shift = multiplier >> 1, shift - 1
    if shift > _LARGEST_SHIFT:
        multiplier, shift = multiplier >> min(31, shift - _LARGEST_SHIFT), _LARGEST_SHIFT
    if shift < 2:
        raise SchemeError(
            f"The RESCALE factor {real!r} is too large: it must be below 2**{bits - 2}; widen the "
            "output's range"
        )
    return multiplier, shift


def check_reach(real: float, bits: int, limits: Bounds) -> None:
    """Raise unless RESCALE is defined for all integers within ``limits``.

    Args:
        real: its factor.
        bits: of its multiplier.
        limits: smallest and largest value that it is given.

    Raises:
        SchemeError: it is not.
    """
    _, shift = rescale_multiplier(real, bits)
    low, high = _defined(shift, bits)
    if limits[0] < low or limits[1] > high:
        raise SchemeError(
            f"RESCALE by {real!r} is defined for values in [{low}, {high}], and these may reach "
            f"[{limits[0]}, {limits[1]}]; widen the output's range"
        )


def _defined(shift: int, bits: int) -> Bounds:
    """Values for which the specification defines the result.

    Of 32-bit values ``apply_scale_32`` wants ``shift`` bits; ``apply_scale_16`` takes 48 bits, and
    wants a result of 32.
    """
    largest = (1 << (shift - 1)) - 1 if bits == 31 else (INT32[1] << shift) >> bits
    low, high = INT32 if bits == 31 else INT48
    return max(low, -largest - 1), min(high, largest)


def rescale(x: Tensor, multiplier: Tensor, shift: Tensor, bits: int = 31) -> Tensor:
    """``(x * multiplier + 2**(shift - 1)) >> shift``: one rounding, ties upwards.

    Args:
        x: integers, zero point taken off.
        multiplier: int64 from :func:`rescale_multiplier`, broadcast to ``x``.
        shift: likewise.
        bits: of the multipliers.

    Returns:
        int64, to be stored behind the zero point.

    Raises:
        InputError: a value is so large that the specification leaves the result open.
    """
    value = as_integers(x, "The tensor to rescale")
    for each in sorted(set(shift.reshape(-1).tolist())):
        low, high = _defined(each, bits)
        met = value if shift.numel() == 1 else value[(shift == each).expand_as(value)]
        if met.numel() and (int(met.min()) < low or int(met.max()) > high):
            raise InputError(
                f"RESCALE with a shift of {each} is defined for values in [{low}, {high}], got "
                f"[{int(met.min())}, {int(met.max())}]"
            )
    return (value * multiplier + (torch.ones_like(shift) << (shift - 1))) >> shift


def rescale_by(x: Tensor, real: float) -> Tensor:
    """:func:`rescale` of 32-bit integers by a real factor."""
    multiplier, shift = rescale_multiplier(real)
    return rescale(x, torch.tensor(multiplier), torch.tensor(shift))


def sum_rescales(inputs: Sequence[QParams], out: QParams) -> Rescales:
    """Around a sum.

    Both operands are brought to twice the larger of their scales, shifted left by 20 bits, or by 12
    if they have 16 bits.

    References:
        ``InsertRescaleInt32Pass._get_inputs_rescaled_qparams``.
    """
    scales = [scale_of(q) for q in inputs]
    common = 2 * max(scales) / (1 << (20 if inputs[0].fits_int8 else 12))
    return tuple(scale / common for scale in scales), common / scale_of(out)


def product_rescales(inputs: Sequence[QParams], out: QParams) -> Rescales:
    """Around a product: operands keep their scales."""
    return (1.0,) * len(inputs), math.prod(map(scale_of, inputs)) / scale_of(out)


def compare_rescales(inputs: Sequence[QParams], out: QParams) -> Rescales:
    """Around a maximum, a minimum or an absolute value: operands get the smallest of their scales.

    References:
        ``InsertRescaleInt32Pass._get_inputs_rescaled_qparams``.
    """
    scales = [scale_of(q) for q in inputs]
    return tuple(scale / min(scales) for scale in scales), min(scales) / scale_of(out)


class TosaArithmetic(Arithmetic):
    """The arithmetic of TOSA 1.0 as ExecuTorch's arm backend writes it (mode ``tosa``).

    Results saturate at 8 or 16 bits and at nothing narrower; the kernel table
    (:mod:`custom_quantizer.backends.tosa.kernels`) refuses other ranges. Means and averages are
    layers with constant weights by then, so they have no arithmetic of their own.
    """

    name = "tosa"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``RNE(fl(x * fl(1 / s))) + zp``, saturated: outside of the delegate, in float32.

        Raises:
            InputError: ``x`` is not float32, or holds NaN.

        References:
            ``quantize_per_tensor`` of PyTorch and of ExecuTorch (``op_quantize.cpp``).
        """
        refuse_nan(as_reals(x, "The tensor to quantize"))
        scale = scale_along(q, x)
        rounded = torch.round(x * (torch.ones_like(scale) / scale))
        return store(float_to_integers(rounded) + q.zero_point, q)

    def _requantize_accumulator(
        self, acc: Tensor, input_scale: float, weight: Tensor, axis: int, out: QParams, width: int
    ) -> Tensor:
        """RESCALE by ``sx * sw / s_out``, in double precision, per channel.

        Raises:
            InputError: an accumulator does not fit 32 bits (48 for 16-bit activations).
        """
        check_width(width)
        bits, limits = (31, INT32) if width == 32 else (15, INT48)
        total = as_integers(acc, "The accumulator")
        if total.numel() and (int(total.min()) < limits[0] or int(total.max()) > limits[1]):
            raise InputError(
                f"An accumulator exceeds [{limits[0]}, {limits[1]}], for which TOSA does not say "
                "what comes out; choose fewer bits for the weights"
            )
        reals = [input_scale * scale / scale_of(out) for scale in weight.reshape(-1).tolist()]
        pairs = torch.tensor([rescale_multiplier(real, bits) for real in reals])
        multiplier = along(pairs[:, 0].reshape(weight.shape), axis, acc)
        shift = along(pairs[:, 1].reshape(weight.shape), axis, acc)
        return store(rescale(total, multiplier, shift, bits) + out.zero_point, out)

    def _requantize(self, x: Tensor, src: QParams, dst: QParams) -> Tensor:
        """RESCALE by ``s_in / s_out``."""
        offset = as_integers(x, "The tensor to requantize") - src.zero_point
        return store(rescale_by(offset, scale_of(src) / scale_of(dst)) + dst.zero_point, dst)

    def _add(
        self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams, subtract: bool
    ) -> Tensor:
        """RESCALE of each operand to int32 (:func:`sum_rescales`), the sum, RESCALE."""
        (factor_a, factor_b), factor = sum_rescales((qa, qb), out)
        left = rescale_by(as_integers(a, "The first operand") - qa.zero_point, factor_a)
        right = rescale_by(as_integers(b, "The second operand") - qb.zero_point, factor_b)
        total = left - right if subtract else left + right
        return store(rescale_by(total, factor) + out.zero_point, out)

    def _mul(self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams) -> Tensor:
        """The product of the integers, in int32, then RESCALE by ``sa * sb / s_out``."""
        product = as_integers(a, "The first operand") - qa.zero_point
        product = product * (as_integers(b, "The second operand") - qb.zero_point)
        _, factor = product_rescales((qa, qb), out)
        return store(rescale_by(product, factor) + out.zero_point, out)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """There is none: a mean is a linear layer."""
        raise SchemeError("TOSA averages by layers with constant weights; plan with backend='tosa'")

    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor:
        raise SchemeError("TOSA averages by layers with constant weights; plan with backend='tosa'")

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """CLAMP of integers on one grid; between two, RESCALE first."""
        bounds = self.clamp_bounds(low, high, dst)
        if src.same_grid(dst):
            return store(as_integers(x, "The tensor to clamp"), dst, bounds)
        return self.requantize(x, src, dst, bounds=bounds)

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """The limits as :meth:`quantize` stores them."""
        limits = torch.tensor(checked_limits(low, high), dtype=torch.float32)
        stored = self.quantize(limits, q)
        return int(stored[0]), int(stored[1])


TOSA: Arithmetic = TosaArithmetic()
