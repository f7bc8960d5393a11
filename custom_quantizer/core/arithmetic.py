"""Rounding, requantizing, saturating: the one place where this project decides a last bit.

Three modes compute the same operators on stored integers and differ in how they round:

``xnnpack``
    What the XNNPACK delegate computes on x86-64, step by step in float32. ``fl()`` below is one
    float32 rounding, ``RNE`` rounds half to even, ``sat8``/``sat16`` saturate to 8/16 signed bits.
``fixed_point``
    gemmlowp and TensorFlow Lite: an int32 multiplier in Q31 and a shift; no float at run time.
``exact``
    Rational arithmetic, one rounding (half to even) at the end: the yardstick for the other two.

Op families are written once against :class:`Arithmetic`; :func:`get_arithmetic` picks the mode.

Conventions, everywhere in this module: stored integers come in as any integer dtype (int8 to
int64, uint8), are computed in int64 and go out as int32; real values are float32; a stored ``q``
stands for ``(q - zero_point) * scale``. Tensors live on the CPU and run eagerly: a compiler that
fuses a multiply with an add would change results.

References:
    XNNPACK at commit 92a7ad50: ``src/microparams-init.c`` (add, mul), ``src/operators/reduce-nd.c``
    (mean), ``src/f32-avgpool/avgpool.c.in`` and ``src/indirection.c`` (tap order),
    ``src/f32-qs8-vcvt`` (quantize), ``src/qs8-gemm`` with fp32 requantization.

    gemmlowp: ``fixedpoint/fixedpoint.h``.

    TensorFlow Lite, under ``tensorflow/lite/kernels``: ``internal/quantization_util.cc``,
    ``internal/common.cc``, ``kernel_util.cc``, and ``internal/reference/`` with ``quantize.h``,
    ``requantize.h``, ``reduce.h``, ``sub.h``, ``integer_ops/{add,mul,conv,pooling}.h``.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_quantizer.core.formats import signed_bits
from custom_quantizer.errors import InputError, SchemeError

__all__ = [
    "ARITHMETICS",
    "EXACT",
    "FIXED_POINT",
    "XNNPACK",
    "Arithmetic",
    "Bounds",
    "ExactArithmetic",
    "FixedPointArithmetic",
    "QParams",
    "XnnpackArithmetic",
    "accumulator_bits",
    "get_arithmetic",
    "multiply_by_quantized_multiplier",
    "multiply_by_quantized_multiplier_int64",
    "quantize_emulated_int16",
    "quantize_multiplier",
    "requantize_integer_only",
    "round_to_float32",
    "rounding_divide_by_pot",
    "saturate",
    "saturating_rounding_doubling_high_mul",
    "split_multiplier",
    "wrap_int32",
    "xnnpack_add_parameters",
    "xnnpack_multiplier",
]

Bounds = tuple[int, int]
"""Inclusive stored-integer limits of a fused activation, from :meth:`Arithmetic.clamp_bounds`."""

_INT8: Bounds = (-(2**7), 2**7 - 1)
_INT16: Bounds = (-(2**15), 2**15 - 1)
_INT32: Bounds = (-(2**31), 2**31 - 1)
_INTEGER_DTYPES = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})
_SMALLEST_NORMAL = 2.0**-126
# Values past any stored integer, yet small enough to convert to int64 and to add a zero point to.
_HUGE = 2.0**40
_AVGPOOL_CHUNK = 9

_Objects = npt.NDArray[np.object_]


# Values ------------------------------------------------------------------------------------------


def round_to_float32(value: float) -> float:
    """Round a Python float to the nearest float32, half to even; overflow gives an infinity."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


@dataclass(frozen=True, eq=False)
class QParams:
    """How stored integers stand for reals: ``real = (q - zero_point) * scale``.

    Attributes:
        scale: Positive, finite, normal float32: a Python float that float32 represents exactly,
            or, per channel, a 1-D float32 tensor (copied, one entry per channel).
        zero_point: The integer that stands for 0.0, shared by all channels.
        quant_min: Smallest stored integer.
        quant_max: Largest stored integer.
        axis: The channel dimension; given exactly when ``scale`` is a tensor.

    Raises:
        SchemeError: A field is not what is said above, or not
            ``-2**31 <= quant_min <= zero_point <= quant_max < 2**31``.
    """

    scale: float | Tensor
    zero_point: int
    quant_min: int
    quant_max: int
    axis: int | None = None

    def __post_init__(self) -> None:
        for name in ("zero_point", "quant_min", "quant_max"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SchemeError(f"QParams.{name} must be an int, got {value!r}")
        if not _INT32[0] <= self.quant_min <= self.zero_point <= self.quant_max <= _INT32[1]:
            raise SchemeError(
                "QParams needs -2**31 <= quant_min <= zero_point <= quant_max < 2**31, got "
                f"[{self.quant_min}, {self.quant_max}] with zero point {self.zero_point}"
            )
        if isinstance(self.scale, Tensor):
            if self.axis is None:
                raise SchemeError("QParams with a scale per channel needs an axis")
            object.__setattr__(self, "scale", _checked_scales(self.scale))
        else:
            if self.axis is not None:
                raise SchemeError(f"QParams.axis is {self.axis}, but the scale is one number")
            object.__setattr__(self, "scale", _checked_scale(self.scale, "QParams.scale"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QParams) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        scales = tuple(self.scale.tolist()) if isinstance(self.scale, Tensor) else self.scale
        return (scales, self.zero_point, self.quant_min, self.quant_max, self.axis)

    @property
    def fits_int8(self) -> bool:
        """Whether every stored integer fits a signed byte, and so the int8 kernels."""
        return _INT8[0] <= self.quant_min and self.quant_max <= _INT8[1]

    @property
    def levels(self) -> int:
        """The number of stored integers."""
        return self.quant_max - self.quant_min + 1

    @property
    def bits(self) -> int:
        """Width of the stored integers, as signed ones."""
        return signed_bits(self.quant_min, self.quant_max)

    def same_grid(self, other: QParams) -> bool:
        """Whether equal integers stand for equal reals: same scale and zero point, any range."""
        mine, theirs = self._key(), other._key()
        return (mine[0], mine[1], mine[4]) == (theirs[0], theirs[1], theirs[4])


def _checked_scale(scale: object, what: str) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise SchemeError(f"{what} must be a float or a float32 tensor, got {scale!r}")
    if not (_SMALLEST_NORMAL <= scale < math.inf) or round_to_float32(scale) != scale:
        raise SchemeError(
            f"{what} is {scale!r}: it must be positive, finite, normal and representable in "
            "float32; round it with round_to_float32 first"
        )
    return float(scale)


def _checked_scales(scale: Tensor) -> Tensor:
    if scale.dtype != torch.float32 or scale.ndim != 1 or scale.numel() == 0:
        raise SchemeError(
            "A scale per channel must be a 1-D float32 tensor with at least one entry, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )
    copy = scale.detach().clone().cpu()
    normal = torch.isfinite(copy) & (copy >= _SMALLEST_NORMAL)
    if not bool(normal.all()):
        channel = int((~normal).nonzero()[0])
        raise SchemeError(
            f"The scale of channel {channel} is {float(copy[channel])!r}: scales must be "
            "positive, finite and normal in float32"
        )
    return copy


# Shared pieces -----------------------------------------------------------------------------------


def _f32(value: float) -> Tensor:
    """A float32 constant: arithmetic with it rounds as the tensor's does, whatever the default."""
    return torch.tensor(value, dtype=torch.float32)


def _integers(x: Tensor, what: str) -> Tensor:
    if x.dtype not in _INTEGER_DTYPES:
        raise InputError(f"{what} must hold integers, got {x.dtype}: quantize it first")
    return x.to(torch.int64)


def _reals(x: Tensor, what: str) -> Tensor:
    if x.dtype != torch.float32:
        raise InputError(
            f"{what} must be float32, got {x.dtype}: the rounding of another width differs"
        )
    return x


def saturate(x: Tensor, low: int, high: int) -> Tensor:
    """Clamp integers to ``[low, high]``, a range within int32; returns int32.

    Raises:
        InputError: ``x`` does not hold integers.
    """
    return _integers(x, "The tensor to saturate").clamp(low, high).to(torch.int32)


def wrap_int32(x: Tensor) -> Tensor:
    """Reduce integers modulo 2**32 into int32, as a 32-bit accumulator that overflows does.

    Wrapping a 64-bit sum once equals wrapping after every addition.

    Raises:
        InputError: ``x`` does not hold integers.
    """
    low, _ = _INT32
    return (((_integers(x, "The accumulator") - low) & 0xFFFFFFFF) + low).to(torch.int32)


def _store(x: Tensor, q: QParams, bounds: Bounds | None = None) -> Tensor:
    """Saturate int64 values, zero point included, to the range of ``q`` and then to ``bounds``."""
    stored = saturate(x, q.quant_min, q.quant_max)
    if bounds is None:
        return stored
    low, high = bounds
    if low > high:
        raise SchemeError(f"The activation bounds [{low}, {high}] are empty")
    return stored.clamp(low, high)


def _along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    """Shape 0-D or 1-D ``values`` to broadcast along dimension ``axis`` of ``like``."""
    if values.ndim == 0:
        return values
    if not -like.ndim <= axis < like.ndim or like.shape[axis] != values.numel():
        raise InputError(
            f"{values.numel()} per-channel values do not fit dimension {axis} of a tensor of "
            f"shape {tuple(like.shape)}"
        )
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _scale_along(q: QParams, like: Tensor) -> Tensor:
    if isinstance(q.scale, Tensor) and q.axis is not None:
        return _along(q.scale, q.axis, like)
    return _f32(_scale_of(q))


def _scale_of(q: QParams) -> float:
    if isinstance(q.scale, Tensor):
        raise SchemeError("This operator takes one scale per tensor, not one per channel")
    return q.scale


def _checked_weight_scale(weight_scale: float | Tensor) -> Tensor:
    if isinstance(weight_scale, Tensor) and weight_scale.ndim > 0:
        return _checked_scales(weight_scale)
    return _f32(_checked_scale(float(weight_scale), "weight_scale"))


def _check_width(accumulator_width: int) -> None:
    if accumulator_width not in (32, 64):
        raise SchemeError(f"Accumulators have 32 or 64 bits, asked for {accumulator_width}")


def _checked_limits(low: float, high: float) -> tuple[float, float]:
    """Round the limits of a clamp to float32, as an operator on float32 tensors does."""
    limits = round_to_float32(low), round_to_float32(high)
    if not limits[0] <= limits[1]:
        raise SchemeError(f"A clamp needs low <= high, got [{low}, {high}]")
    return limits


def _checked_count(count: int) -> int:
    if count < 1:
        raise SchemeError(f"A mean needs at least one element, got {count}")
    return count


@dataclass(frozen=True)
class _Windows:
    """The taps of a pooling window, kernel column outermost, and how many are not padding."""

    taps: list[Tensor]
    counts: Tensor

    def total(self) -> Tensor:
        return torch.stack(self.taps).sum(0)


def _windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> _Windows:
    """Slice ``x`` (..., H, W) into the shifted views that a pooling window sums."""
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = kernel_size, stride, padding
    if not (0 <= 2 * pad_h <= kernel_h and 0 <= 2 * pad_w <= kernel_w and min(stride) >= 1):
        raise SchemeError(
            f"avg_pool2d needs strides of at least 1 and padding of at most half the kernel, got "
            f"kernel {tuple(kernel_size)}, stride {tuple(stride)}, padding {tuple(padding)}"
        )
    if x.ndim < 2 or x.shape[-2] + 2 * pad_h < kernel_h or x.shape[-1] + 2 * pad_w < kernel_w:
        raise InputError(
            f"avg_pool2d with kernel {tuple(kernel_size)} and padding {tuple(padding)} does not "
            f"fit an input of shape {tuple(x.shape)}"
        )

    def taps_of(image: Tensor) -> list[Tensor]:
        padded = F.pad(image, (pad_w, pad_w, pad_h, pad_h))
        rows = padded.shape[-2] - kernel_h + 1
        columns = padded.shape[-1] - kernel_w + 1
        return [
            padded[..., ky : ky + rows : stride_h, kx : kx + columns : stride_w]
            for kx in range(kernel_w)
            for ky in range(kernel_h)
        ]

    inside = torch.ones(x.shape[-2:], dtype=torch.int64)
    counts = torch.stack(taps_of(inside)).sum(0)
    if count_include_pad:
        counts = torch.full_like(counts, kernel_h * kernel_w)
    return _Windows(taps_of(x), counts)


def accumulator_bits(
    weight: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    zero_point: int,
    bias: Tensor | None = None,
) -> int:
    """Signed bits that the accumulator of a GEMM or convolution needs in the worst case.

    The bound is reached by some input and so cannot be lowered. It also covers every partial sum
    that starts from the bias, in any order, and padding with the zero point.

    Args:
        weight: Stored weights, one output channel per entry of dimension 0.
        quant_min: Smallest stored input.
        quant_max: Largest stored input.
        zero_point: Zero point of the input, within its range.
        bias: Stored biases in units of the accumulator, one per output channel.

    Returns:
        The smallest ``n`` with every sum in ``[-2**(n-1), 2**(n-1) - 1]``.

    Raises:
        InputError: The tensors do not hold integers, or their shapes disagree.
        SchemeError: The zero point lies outside the range.
    """
    if not quant_min <= zero_point <= quant_max:
        raise SchemeError(f"Zero point {zero_point} lies outside [{quant_min}, {quant_max}]")
    if weight.ndim < 1 or weight.numel() == 0:
        raise InputError(f"The weight has no output channel: shape {tuple(weight.shape)}")
    rows = _integers(weight, "The weight").reshape(weight.shape[0], -1)
    positive: list[int] = rows.clamp(min=0).sum(1).tolist()
    negative: list[int] = rows.clamp(max=0).sum(1).tolist()
    biases: list[int] = [0] * len(positive)
    if bias is not None:
        if bias.shape != rows.shape[:1]:
            raise InputError(
                f"A bias of shape {tuple(bias.shape)} does not fit {len(positive)} output channels"
            )
        biases = _integers(bias, "The bias").tolist()
    # Python integers from here: the products may exceed 64 bits.
    low, high = quant_min - zero_point, quant_max - zero_point
    channels = list(zip(positive, negative, biases, strict=True))
    largest = max(b + p * high + n * low for p, n, b in channels)
    smallest = min(b + p * low + n * high for p, n, b in channels)
    return signed_bits(smallest, largest)


# The interface -----------------------------------------------------------------------------------


class Arithmetic(Protocol):
    """The operators of quantized inference on stored integers, in one rounding mode.

    Stored integers in: any integer dtype. Stored integers out: int32, saturated to the range of
    the output's :class:`QParams` and then, where given, to the ``bounds`` of a fused activation.
    All methods raise :class:`~custom_quantizer.errors.InputError` for a tensor of the wrong dtype
    or shape, and :class:`~custom_quantizer.errors.SchemeError` for parameters that the mode
    cannot compute with.
    """

    @property
    def name(self) -> str:
        """The name :func:`get_arithmetic` knows the mode by."""
        ...

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """Store float32 reals as integers."""
        ...

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """Give the float32 reals that stored integers stand for."""
        ...

    def requantize_accumulator(
        self,
        acc: Tensor,
        input_scale: float,
        weight_scale: float | Tensor,
        channel_axis: int,
        out: QParams,
        *,
        bounds: Bounds | None = None,
        accumulator_width: int = 32,
    ) -> Tensor:
        """Store the accumulator of a GEMM or convolution.

        Args:
            acc: ``bias + sum((x - zero_point) * w)``, exact; the mode wraps it if its hardware
                would.
            input_scale: Scale of the input.
            weight_scale: Scale of the weight: one number, or one per output channel (1-D).
            channel_axis: Dimension of ``acc`` that holds the output channels.
            out: Parameters of the output.
            bounds: Limits of a fused activation.
            accumulator_width: Bits of the accumulator, 32 or 64 (for 16-bit activations).
        """
        ...

    def requantize(
        self, x: Tensor, src: QParams, dst: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """Move stored integers from one scale and zero point to another."""
        ...

    def add(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        subtract: bool = False,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Store ``a + b``, or ``a - b``; the tensors broadcast."""
        ...

    def mul(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Store ``a * b``; the tensors broadcast. For one operand twice, see :meth:`square`."""
        ...

    def square(
        self, a: Tensor, qa: QParams, out: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """Store ``a * a``."""
        ...

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """Store the mean of ``count`` elements, whose stored integers sum to ``total``."""
        ...

    def avg_pool2d(
        self,
        x: Tensor,
        src: QParams,
        dst: QParams,
        *,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        count_include_pad: bool = True,
    ) -> Tensor:
        """Average-pool stored integers of shape (..., H, W); sizes are (height, width) pairs."""
        ...

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Store ``min(max(x, low), high)``: an activation that is an operator of its own."""
        ...

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """Give the stored integers of a fused activation's real limits, which may be infinite."""
        ...


# xnnpack -----------------------------------------------------------------------------------------


def _inverse(q: QParams, like: Tensor) -> Tensor:
    # A tensor over a tensor: dividing a number by a tensor may be computed as a reciprocal.
    scale = _scale_along(q, like)
    return torch.ones_like(scale) / scale


def _to_integers(rounded: Tensor) -> Tensor:
    """Convert integral float32 values to int64, out-of-range ones to something still out of it."""
    return rounded.clamp(-_HUGE, _HUGE).to(torch.int64)


def _quantize_a(x: Tensor, q: QParams) -> Tensor:
    """``A(x) = sat8(sat16(RNE(min(fl(x * fl(1 / s)), 32767))) + zp)``; NaN becomes 32767."""
    scaled = torch.fmin(x * _inverse(q, x), _f32(_INT16[1]))
    rounded = _to_integers(torch.round(scaled)).clamp(*_INT16)
    return saturate(rounded + q.zero_point, *_INT8)


def _quantize_b(x: Tensor, q: QParams) -> Tensor:
    """``B(x) = sat8(RNE(fl(fl(x * fl(1 / s)) + zp)))``: the zero point goes in before rounding."""
    shifted = x * _inverse(q, x) + _f32(q.zero_point)
    return saturate(_to_integers(torch.round(shifted)), *_INT8)


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
    if q.zero_point != 0 or q.quant_min < _INT16[0] or q.quant_max > _INT16[1]:
        raise SchemeError(
            "The delegate stores more than 8 bits only as symmetric integers within int16, got "
            f"[{q.quant_min}, {q.quant_max}] with zero point {q.zero_point}"
        )
    _refuse_nan(_reals(x, "The tensor to quantize"))
    floored = torch.floor(x * _inverse(q, x) + _f32(0.5))
    return saturate(_to_integers(floored), q.quant_min, q.quant_max)


def _refuse_nan(x: Tensor) -> None:
    if bool(torch.isnan(x).any()):
        raise InputError("The tensor to quantize holds NaN, which no integer stands for")


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
    weight = _checked_weight_scale(weight_scale)
    product = weight * _f32(_checked_scale(input_scale, "input_scale"))
    output = _f32(_checked_scale(output_scale, "output_scale"))
    multiplier = product / output.expand_as(product)
    legal = (multiplier >= _SMALLEST_NORMAL) & (multiplier < 256.0)
    if not bool(legal.all()):
        worst = float(multiplier.reshape(-1)[~legal.reshape(-1)][0])
        raise SchemeError(
            f"A requantization multiplier is {worst!r}: the delegate needs a normal number below "
            "256; widen the output's range"
        )
    return multiplier


def split_multiplier(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Write float32 multipliers as integers: ``multiplier == mantissa * 2**-shift``.

    Args:
        multiplier: Positive normal float32.

    Returns:
        int64 mantissas in ``[2**23, 2**24)``, and int64 shifts.
    """
    fraction, exponent = torch.frexp(_reals(multiplier, "The multiplier"))
    mantissa = (fraction * 2.0**24).to(torch.int64)
    return mantissa, 24 - exponent.to(torch.int64)


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
    narrowed = _round_to_24_bits(wrap_int32(acc).to(torch.int64))
    product = _round_to_24_bits(narrowed * _along(mantissa, channel_axis, acc))
    # The product has at most 56 bits, so that any longer shift leaves 0 just as well.
    rounded = _shift_right_even(product, _along(shift, channel_axis, acc).clamp(max=60))
    return _store(saturate(rounded + out.zero_point, *_INT8), out, bounds)


def _bit_length(x: Tensor) -> Tensor:
    """Number of bits of non-negative int64 values; 0 has none."""
    bits = torch.zeros_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        long = x >= 1 << step
        bits = bits + long * step
        x = torch.where(long, x >> step, x)
    return bits + (x > 0)


def _round_to_24_bits(x: Tensor) -> Tensor:
    """Round int64 values to 24 significant bits, half to even, as a conversion to float32 does."""
    excess = (_bit_length(x.abs()) - 24).clamp(min=0)
    return _shift_right_even(x, excess) << excess


def _shift_right_even(x: Tensor, shift: Tensor) -> Tensor:
    """``x / 2**shift`` rounded half to even; int64, ``0 <= shift <= 62``."""
    floor = x >> shift
    rest = x - (floor << shift)
    half = (torch.ones_like(shift) << shift) >> 1
    up = (rest > half) | ((rest == half) & (shift > 0) & (floor % 2 == 1))
    return floor + up


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
    output = np.float32(_scale_of(out))
    with np.errstate(over="ignore", under="ignore"):
        ratio_a = float(np.float32(_scale_of(qa)) / output)
        ratio_b = float(np.float32(_scale_of(qb)) / output)
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


def _store_emulated(real: Tensor, q: QParams, bounds: Bounds | None) -> Tensor:
    """Store float64 reals as the float32 emulation does: half up above 8 bits, even below."""
    scaled = real / _scale_of(q)
    rounded = torch.round(scaled) if q.fits_int8 else torch.floor(scaled + 0.5)
    return _store(_to_integers(rounded) + q.zero_point, q, bounds)


def _require_int8(q: QParams) -> None:
    if not q.fits_int8:
        raise SchemeError(
            f"The delegate has no integer kernel for the range [{q.quant_min}, {q.quant_max}]: "
            "only for ranges within int8"
        )


class XnnpackArithmetic:
    """The arithmetic of the XNNPACK delegate on x86-64 (mode ``xnnpack``).

    Ranges within int8 take the int8 kernels: saturation to 8 bits, then to a narrower range if
    the parameters have one. Where a tensor is wider, elementwise operators and average pooling run
    in float32 on the dequantized values and end in :func:`quantize_emulated_int16`; GEMMs and
    means then have no defined order of summation, and are computed in float64.
    """

    name: Final = "xnnpack"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``A(x)``; NaN gives the largest integer; :func:`quantize_emulated_int16` if wider."""
        _reals(x, "The tensor to quantize")
        if not q.fits_int8:
            return quantize_emulated_int16(x, q)
        return _store(_quantize_a(x, q), q)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """``fl(fl(q - zp) * s)``."""
        offset = (_integers(x, "The tensor to dequantize") - q.zero_point).to(torch.float32)
        return offset * _scale_along(q, x)

    def requantize_accumulator(
        self,
        acc: Tensor,
        input_scale: float,
        weight_scale: float | Tensor,
        channel_axis: int,
        out: QParams,
        *,
        bounds: Bounds | None = None,
        accumulator_width: int = 32,
    ) -> Tensor:
        """``sat8(RNE(fl(fl(wrap32(acc)) * S)) + zp)``, ``S`` from :func:`xnnpack_multiplier`.

        ``acc`` may also be float32 that holds integers below 2**24, which it then does exactly.

        With an ``accumulator_width`` of 64 or a wider output there is no integer kernel: the
        delegate multiplies and sums in float32, whose order of summation is not defined. The
        result here is that of float64, rounded as :func:`quantize_emulated_int16` does, which the
        delegate's agrees with to within one unit (see ``docs/device_arithmetic.md``).
        """
        _check_width(accumulator_width)
        if accumulator_width != 32 or not out.fits_int8:
            weight = _along(_checked_weight_scale(weight_scale), channel_axis, acc)
            unit = weight.to(torch.float64) * _checked_scale(input_scale, "input_scale")
            total = _integers(acc, "The accumulator").to(torch.float64)
            return _store_emulated(total * unit, out, bounds)
        multiplier = xnnpack_multiplier(input_scale, weight_scale, _scale_of(out))
        if acc.dtype == torch.float32:
            scaled = acc * _along(multiplier, channel_axis, acc)
            # Beyond 2**24 the sum with the zero point rounds, far outside of what is stored.
            low, high = (out.quant_min, out.quant_max) if bounds is None else bounds
            stored = scaled.round_().add_(float(out.zero_point)).clamp_(*_INT8)
            stored = stored.clamp_(out.quant_min, out.quant_max).clamp_(low, high)
            return stored.to(torch.int32)
        scaled = wrap_int32(acc).to(torch.float32) * _along(multiplier, channel_axis, acc)
        rounded = _to_integers(torch.round(scaled))
        return _store(saturate(rounded + out.zero_point, *_INT8), out, bounds)

    def requantize(
        self, x: Tensor, src: QParams, dst: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """``A(dequantize(x))``."""
        return _store(self.quantize(self.dequantize(x, src), dst), dst, bounds)

    def add(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        subtract: bool = False,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """``sat8(sat16((ma*(a-za) + mb*(b-zb) + 2**(sh-1)) >> sh) + zo)``: half goes up.

        The integers are those of :func:`xnnpack_add_parameters`.
        """
        if not (qa.fits_int8 and qb.fits_int8 and out.fits_int8):
            real_a, real_b = self.dequantize(a, qa), self.dequantize(b, qb)
            real = real_a - real_b if subtract else real_a + real_b
            return _store(self.quantize(real, out), out, bounds)
        multiplier_a, multiplier_b, shift = xnnpack_add_parameters(qa, qb, out, subtract=subtract)
        acc = (
            multiplier_a * (_integers(a, "The first operand") - qa.zero_point)
            + multiplier_b * (_integers(b, "The second operand") - qb.zero_point)
            + (1 << (shift - 1))
        )
        shifted = (acc >> shift).clamp(*_INT16)
        return _store(saturate(shifted + out.zero_point, *_INT8), out, bounds)

    def mul(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """``sat8(sat16(RNE(fl((a-za)*(b-zb) * S))) + zo)``, ``S = fl(fl(sa * sb) / so)``."""
        if not (qa.fits_int8 and qb.fits_int8 and out.fits_int8):
            real = self.dequantize(a, qa) * self.dequantize(b, qb)
            return _store(self.quantize(real, out), out, bounds)
        multiplier = xnnpack_multiplier(_scale_of(qa), _scale_of(qb), _scale_of(out))
        product = _integers(a, "The first operand") - qa.zero_point
        product = product * (_integers(b, "The second operand") - qb.zero_point)
        rounded = _to_integers(torch.round(product.to(torch.float32) * multiplier)).clamp(*_INT16)
        return _store(saturate(rounded + out.zero_point, *_INT8), out, bounds)

    def square(
        self, a: Tensor, qa: QParams, out: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """``B(fl(x * x))`` of the dequantized values: a multiply of a tensor by itself."""
        real = self.dequantize(a, qa)
        real = real * real
        stored = _quantize_b(real, out) if out.fits_int8 else self.quantize(real, out)
        return _store(stored, out, bounds)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """``sat8(RNE(fl(fl(fl(total) * S) + Z)))``, a global average pool.

        ``S = fl(fl(si / so) * fl(1 / n))`` and ``Z = fl(zo - fl(fl(n * zi) * S))``. Wider tensors
        are averaged in float64, as in :meth:`requantize_accumulator`.
        """
        if not (src.fits_int8 and dst.fits_int8):
            offset = _integers(total, "The sum") - _checked_count(count) * src.zero_point
            mean = offset.to(torch.float64) * (_scale_of(src) / count)
            return _store_emulated(mean, dst, None)
        number = np.float32(_checked_count(count))
        with np.errstate(over="ignore", under="ignore"):
            ratio = np.float32(_scale_of(src)) / np.float32(_scale_of(dst))
            scale = ratio * (np.float32(1.0) / number)
            offset = np.float32(dst.zero_point) - (number * np.float32(src.zero_point)) * scale
        if not scale < 256.0:
            raise SchemeError(
                f"The multiplier of a mean is {float(scale)!r}, 256 or more; widen the output's "
                "range"
            )
        scaled = wrap_int32(total).to(torch.float32) * _f32(float(scale))
        rounded = _to_integers(torch.round(scaled + _f32(float(offset))))
        return _store(saturate(rounded, *_INT8), dst)

    def avg_pool2d(
        self,
        x: Tensor,
        src: QParams,
        dst: QParams,
        *,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        count_include_pad: bool = True,
    ) -> Tensor:
        """``A(fl(sum * fl(1 / count)))``, the sum in float32 in the order of the kernel.

        Taps come kernel column by kernel column, in chunks of nine of which each is
        ``((2+3) + (4+5)) + (((0+1) + 8) + (6+7))``; chunks are added in turn.

        With padding that counts, the delegate leaves the pooling to ExecuTorch's portable kernel:
        ``A(fl(sum / count))``, the sum row by row, one tap at a time.
        """
        windows = _windows(self.dequantize(x, src), kernel_size, stride, padding, count_include_pad)
        counts = windows.counts.to(torch.float32)
        if count_include_pad and any(padding):
            rows = kernel_size[0]
            by_row = [tap for row in range(rows) for tap in windows.taps[row::rows]]
            return self.quantize(sum(by_row, _f32(0.0)) / counts, dst)
        total = zero = _f32(0.0)
        for start in range(0, len(windows.taps), _AVGPOOL_CHUNK):
            chunk = windows.taps[start : start + _AVGPOOL_CHUNK]
            t = chunk + [zero] * (_AVGPOOL_CHUNK - len(chunk))
            chunk_sum = ((t[2] + t[3]) + (t[4] + t[5])) + (((t[0] + t[1]) + t[8]) + (t[6] + t[7]))
            total = total + chunk_sum
        return self.quantize(total * (torch.ones_like(counts) / counts), dst)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Clamp integers on one grid; ``B(clamp(dequantize(x)))`` between two."""
        limits = _checked_limits(low, high)
        if src.same_grid(dst):
            bounds = self.clamp_bounds(*limits, dst)
            return _store(_integers(x, "The tensor to clamp"), dst, bounds)
        real = self.dequantize(x, src).clamp(*limits)
        if not (src.fits_int8 and dst.fits_int8):
            return self.quantize(real, dst)
        return _store(_quantize_b(real, dst), dst)

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """``RNE(clip(fl(fl(v / s) + zp), -128, 127))``: the zero point goes in before rounding.

        Wider ranges: the limits as :func:`quantize_emulated_int16` stores them.
        """
        limits = _checked_limits(low, high)
        if not q.fits_int8:
            stored = quantize_emulated_int16(torch.tensor(limits, dtype=torch.float32), q)
            return int(stored[0]), int(stored[1])
        with np.errstate(over="ignore", under="ignore"):
            scaled = np.array(limits, dtype=np.float32) / np.float32(_scale_of(q))
            clipped = np.clip(scaled + np.float32(q.zero_point), *_INT8)
        lower, upper = (
            min(max(int(bound), q.quant_min), q.quant_max) for bound in np.rint(clipped)
        )
        return lower, upper


# fixed_point -------------------------------------------------------------------------------------


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
    if bool((multiplier < 0).any()) or bool((multiplier > _INT32[1]).any()):
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
    product = _integers(a, "The first factor") * _as_int64(b)
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return saturate(torch.div(product + nudge, 1 << 31, rounding_mode="trunc"), *_INT32)


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
    value, power = _integers(x, "The dividend"), _as_int64(exponent)
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
    shifted = saturate(_integers(x, "The accumulator") << power.clamp(min=0), *_INT32)
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
    value, factor, power = _integers(x, "The accumulator"), _as_int64(multiplier), _as_int64(shift)
    _check_shift(factor, power, largest=7)
    if bool(((value < -(1 << 47)) | (value >= 1 << 47)).any()):
        raise InputError("An accumulator exceeds the 48 bits of the 16x8 path")
    reduced = ((factor + (1 << 15)) >> 16).clamp(max=0x7FFF)
    total_shift = 15 - power
    half = torch.ones_like(total_shift) << (total_shift - 1)
    return saturate((value * reduced + half) >> total_shift, *_INT32)


class FixedPointArithmetic:
    """gemmlowp and TensorFlow Lite (mode ``fixed_point``): integer multipliers and shifts.

    Multipliers come from scales in double precision, offline. Where TFLite chooses by storage
    type, this class chooses by range, so that other widths work: tensors of at most 256 levels
    behave as int8, others as int16.
    """

    name: Final = "fixed_point"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``fl(x / s)`` rounded half away from zero, plus the zero point, saturated.

        Raises:
            InputError: ``x`` is not float32, or holds NaN.

        References:
            ``AffineQuantize`` in ``quantize.h``.
        """
        _refuse_nan(_reals(x, "The tensor to quantize"))
        scaled = x / _scale_along(q, x).expand_as(x)
        # Adding a half before truncating would itself round; the fraction is exact.
        whole = torch.trunc(scaled)
        away = torch.where((scaled - whole).abs() >= 0.5, torch.sign(scaled), 0.0)
        return _store(_to_integers(whole + away) + q.zero_point, q)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """``(q - zp) * s`` in double, rounded to float32."""
        offset = (_integers(x, "The tensor to dequantize") - q.zero_point).to(torch.float64)
        return (offset * _scale_along(q, x).to(torch.float64)).to(torch.float32)

    def requantize_accumulator(
        self,
        acc: Tensor,
        input_scale: float,
        weight_scale: float | Tensor,
        channel_axis: int,
        out: QParams,
        *,
        bounds: Bounds | None = None,
        accumulator_width: int = 32,
    ) -> Tensor:
        """Multiply by ``sx * sw / s_out``, add the zero point, saturate.

        A 32-bit accumulator wraps and takes :func:`multiply_by_quantized_multiplier`; a 64-bit one
        takes :func:`multiply_by_quantized_multiplier_int64`.

        References:
            ``ConvPerChannel`` in ``integer_ops/conv.h``; the multipliers as in
            ``PopulateConvolutionQuantizationParams``, ``kernel_util.cc``.
        """
        _check_width(accumulator_width)
        weight = _checked_weight_scale(weight_scale)
        base = _checked_scale(input_scale, "input_scale")
        pairs = torch.tensor(
            [quantize_multiplier(base * w / _scale_of(out)) for w in weight.reshape(-1).tolist()]
        )
        multiplier = _along(pairs[:, 0].reshape(weight.shape), channel_axis, acc)
        shift = _along(pairs[:, 1].reshape(weight.shape), channel_axis, acc)
        if accumulator_width == 32:
            scaled = multiply_by_quantized_multiplier(wrap_int32(acc), multiplier, shift)
        else:
            scaled = multiply_by_quantized_multiplier_int64(acc, multiplier, shift)
        return _store(scaled.to(torch.int64) + out.zero_point, out, bounds)

    def requantize(
        self, x: Tensor, src: QParams, dst: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """Multiply ``q - zp`` by ``s_in / s_out``, add the zero point, saturate.

        References:
            ``Requantize`` in ``requantize.h``.
        """
        multiplier, shift = quantize_multiplier(_scale_of(src) / _scale_of(dst))
        offset = _integers(x, "The tensor to requantize") - src.zero_point
        scaled = multiply_by_quantized_multiplier(offset, multiplier, shift)
        return _store(scaled.to(torch.int64) + dst.zero_point, dst, bounds)

    def add(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        subtract: bool = False,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Bring both operands to twice the larger scale, add, bring the sum to the output's.

        The operands are first shifted left, by 20 bits if all three tensors have at most 256
        levels and by 15 otherwise.

        References:
            ``AddFunc`` in ``integer_ops/add.h``, ``SubElementwise`` in ``sub.h``; the multipliers
            as in ``add.cc``.
        """
        scale_a, scale_b = _scale_of(qa), _scale_of(qb)
        levels = max(qa.levels, qb.levels, out.levels)
        if levels > 1 << 16:
            raise SchemeError(f"A fixed-point add takes at most 16 bits, got {levels} levels")
        left_shift = 20 if levels <= 256 else 15
        twice_max = 2.0 * max(scale_a, scale_b)
        output = twice_max / (2.0**left_shift * _scale_of(out))
        offset_a = _integers(a, "The first operand") - qa.zero_point
        offset_b = _integers(b, "The second operand") - qb.zero_point
        scaled_a = multiply_by_quantized_multiplier(
            offset_a << left_shift, *quantize_multiplier(scale_a / twice_max)
        )
        scaled_b = multiply_by_quantized_multiplier(
            offset_b << left_shift, *quantize_multiplier(scale_b / twice_max)
        )
        # Each of them is below 2**30 with at most 16 bits: their int32 sum holds.
        raw = scaled_a - scaled_b if subtract else scaled_a + scaled_b
        stored = multiply_by_quantized_multiplier(raw, *quantize_multiplier(output))
        return _store(stored.to(torch.int64) + out.zero_point, out, bounds)

    def mul(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Multiply the integers, then by ``sa * sb / so``.

        TFLite requires zero point 0 for int16, which keeps the product in 32 bits. Where the
        ranges allow a larger product, this takes the 64-bit path instead of overflowing.

        References:
            ``MulElementwise`` in ``integer_ops/mul.h``; the multiplier as in ``mul_common.cc``.
        """
        real = _scale_of(qa) * _scale_of(qb) / _scale_of(out)
        multiplier, shift = quantize_multiplier(real)
        offset_a = _integers(a, "The first operand") - qa.zero_point
        offset_b = _integers(b, "The second operand") - qb.zero_point
        multiply = (
            multiply_by_quantized_multiplier
            if _largest_offset(qa) * _largest_offset(qb) <= _INT32[1]
            else multiply_by_quantized_multiplier_int64
        )
        scaled = multiply(offset_a * offset_b, multiplier, shift)
        return _store(scaled.to(torch.int64) + out.zero_point, out, bounds)

    def square(
        self, a: Tensor, qa: QParams, out: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """:meth:`mul` of the tensor with itself."""
        return self.mul(a, a, qa, qa, out, bounds=bounds)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """Multiply ``total - n * zp`` by ``s_in / (s_out * n)``, with ``1 / n`` in the multiplier.

        The multiplier of ``s_in / s_out`` is shifted left as far as ``n`` allows and divided by
        ``n``, truncating. Tensors of at most 256 levels take the int32 path, others the int64 one.

        References:
            ``QuantizedMeanOrSum`` in ``reduce.h``.
        """
        offset = _integers(total, "The sum") - _checked_count(count) * src.zero_point
        return self._scaled_mean(offset, torch.tensor(count), src, dst)

    def avg_pool2d(
        self,
        x: Tensor,
        src: QParams,
        dst: QParams,
        *,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        count_include_pad: bool = True,
    ) -> Tensor:
        """Divide the sum of the stored integers by the count, ties away from zero.

        That is TFLite on one grid, its only case; between two grids, :meth:`mean` of each window.

        References:
            ``AveragePool`` in ``integer_ops/pooling.h``.
        """
        offset = _integers(x, "The tensor to pool") - src.zero_point
        windows = _windows(offset, kernel_size, stride, padding, count_include_pad)
        total, counts = windows.total(), windows.counts
        if not src.same_grid(dst):
            return self._scaled_mean(total, counts, src, dst)
        raw = total + counts * src.zero_point
        half = torch.div(counts, 2, rounding_mode="floor")
        nudged = torch.where(raw > 0, raw + half, raw - half)
        return _store(torch.div(nudged, counts, rounding_mode="trunc"), dst)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Clamp integers; between two grids, requantize first."""
        bounds = self.clamp_bounds(low, high, dst)
        if src.same_grid(dst):
            return _store(_integers(x, "The tensor to clamp"), dst, bounds)
        return self.requantize(x, src, dst, bounds=bounds)

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """The limits as :meth:`quantize` stores them.

        References:
            ``CalculateActivationRangeQuantized`` in ``kernel_util.cc``.
        """
        _scale_of(q)
        limits = torch.tensor(_checked_limits(low, high), dtype=torch.float32)
        stored = self.quantize(limits, q)
        return int(stored[0]), int(stored[1])

    def _scaled_mean(self, offset: Tensor, counts: Tensor, src: QParams, dst: QParams) -> Tensor:
        multiplier, shift = quantize_multiplier(_scale_of(src) / _scale_of(dst))
        extra = (_bit_length(counts) - 1).clamp(max=min(32, 31 + shift))
        scaled = torch.div(torch.tensor(multiplier) << extra, counts, rounding_mode="floor")
        if max(src.levels, dst.levels) <= 256:
            mean = multiply_by_quantized_multiplier(wrap_int32(offset), scaled, shift - extra)
        else:
            mean = multiply_by_quantized_multiplier_int64(offset, scaled, shift - extra)
        return _store(mean.to(torch.int64) + dst.zero_point, dst)


def _largest_offset(q: QParams) -> int:
    return max(q.quant_max - q.zero_point, q.zero_point - q.quant_min)


# exact -------------------------------------------------------------------------------------------


def _objects(x: Tensor) -> _Objects:
    """Arrays of Python integers: numpy computes with them elementwise, without overflow."""
    return np.asarray(x.detach().cpu().numpy().astype(object), dtype=object)


def _round_half_even(numerator: Any, denominator: Any) -> Any:
    """``numerator / denominator`` rounded half to even; denominators are positive."""
    floor = numerator // denominator
    twice_rest = 2 * (numerator - floor * denominator)
    up = (twice_rest > denominator) | ((twice_rest == denominator) & (floor % 2 == 1))
    return floor + up


def _store_exact(
    numerator: Any, ratio: tuple[Any, Any], q: QParams, bounds: Bounds | None = None
) -> Tensor:
    """Store ``numerator * ratio[0] / ratio[1]``, which is in units of the scale of ``q``."""
    top, bottom = ratio
    stored = np.asarray(_round_half_even(numerator * top, bottom) + q.zero_point, dtype=object)
    # Object arrays of no dimension turn into scalars under arithmetic: keep the shape.
    limited = np.asarray(np.minimum(np.maximum(stored, q.quant_min), q.quant_max), dtype=object)
    return _store(torch.from_numpy(limited.reshape(stored.shape).astype(np.int64)), q, bounds)


def _scale_ratio(scale: Tensor) -> tuple[_Objects, _Objects]:
    """float32 scales as elementwise numerators and denominators."""
    ratios = [Fraction(value) for value in scale.reshape(-1).tolist()]
    tops = np.array([r.numerator for r in ratios], dtype=object).reshape(tuple(scale.shape))
    bottoms = np.array([r.denominator for r in ratios], dtype=object).reshape(tuple(scale.shape))
    return tops, bottoms


class ExactArithmetic:
    """Rational arithmetic (mode ``exact``): the real result over the scale, rounded once.

    float32 scales are exact rationals. ``RNE(real / scale)`` is rounded half to even before the
    zero point is added, as PyTorch's quantize does. Nothing wraps. Arbitrary precision costs about
    a microsecond per element.
    """

    name: Final = "exact"

    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """``RNE(x / s) + zp``; infinities saturate.

        Raises:
            InputError: ``x`` is not float32, or holds NaN.
        """
        _refuse_nan(_reals(x, "The tensor to quantize"))
        finite = torch.where(torch.isfinite(x), x, 0.0)
        # Every float32 is an integer times 2**-173: 24 bits of mantissa, exponents down to -149.
        fraction, exponent = torch.frexp(finite)
        mantissa = _objects((fraction * 2.0**24).to(torch.int64))
        numerator = mantissa << _objects(exponent.to(torch.int64) + 149)
        top, bottom = _scale_ratio(_scale_along(q, x))
        stored = _store_exact(numerator, (bottom, top * 2**173), q)
        stored = torch.where(torch.isposinf(x), q.quant_max, stored)
        return torch.where(torch.isneginf(x), q.quant_min, stored)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """The float32 nearest to ``(q - zp) * s``, half to even."""
        mantissa, shift = split_multiplier(_scale_along(q, x))
        offset = _integers(x, "The tensor to dequantize") - q.zero_point
        if bool((offset.abs() > 2 * -_INT32[0]).any()):
            raise InputError("The tensor to dequantize exceeds 32 bits")
        # Rounded to 24 bits here, so that double holds the result and float32 rounds no more.
        rounded = _round_to_24_bits(offset * mantissa)
        units = torch.from_numpy(np.asarray(np.ldexp(1.0, -shift.numpy())))
        return (rounded.to(torch.float64) * units).to(torch.float32)

    def requantize_accumulator(
        self,
        acc: Tensor,
        input_scale: float,
        weight_scale: float | Tensor,
        channel_axis: int,
        out: QParams,
        *,
        bounds: Bounds | None = None,
        accumulator_width: int = 32,
    ) -> Tensor:
        """``RNE(acc * sx * sw / s_out) + zp``; the accumulator never wraps."""
        del accumulator_width
        numerator = _objects(_integers(acc, "The accumulator"))
        common = Fraction(_checked_scale(input_scale, "input_scale")) / Fraction(_scale_of(out))
        weight = _along(_checked_weight_scale(weight_scale), channel_axis, acc)
        top, bottom = _scale_ratio(weight)
        ratio = (top * common.numerator, bottom * common.denominator)
        return _store_exact(numerator, ratio, out, bounds)

    def requantize(
        self, x: Tensor, src: QParams, dst: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """``RNE((q - zp) * s_in / s_out) + zp``."""
        offset = _objects(_integers(x, "The tensor to requantize") - src.zero_point)
        ratio = Fraction(_scale_of(src)) / Fraction(_scale_of(dst))
        return _store_exact(offset, ratio.as_integer_ratio(), dst, bounds)

    def add(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        subtract: bool = False,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """``RNE(((a - za) * sa +- (b - zb) * sb) / so) + zo``."""
        ratio_a = Fraction(_scale_of(qa)) / Fraction(_scale_of(out))
        ratio_b = Fraction(_scale_of(qb)) / Fraction(_scale_of(out))
        common = math.lcm(ratio_a.denominator, ratio_b.denominator)
        weight_a, weight_b = int(ratio_a * common), int(ratio_b * common)
        offset_a = _objects(_integers(a, "The first operand") - qa.zero_point)
        offset_b = _objects(_integers(b, "The second operand") - qb.zero_point)
        total = offset_a * weight_a + offset_b * (-weight_b if subtract else weight_b)
        return _store_exact(total, (1, common), out, bounds)

    def mul(
        self,
        a: Tensor,
        b: Tensor,
        qa: QParams,
        qb: QParams,
        out: QParams,
        *,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """``RNE((a - za) * (b - zb) * sa * sb / so) + zo``."""
        offset_a = _objects(_integers(a, "The first operand") - qa.zero_point)
        offset_b = _objects(_integers(b, "The second operand") - qb.zero_point)
        ratio = Fraction(_scale_of(qa)) * Fraction(_scale_of(qb)) / Fraction(_scale_of(out))
        return _store_exact(offset_a * offset_b, ratio.as_integer_ratio(), out, bounds)

    def square(
        self, a: Tensor, qa: QParams, out: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """:meth:`mul` of the tensor with itself."""
        return self.mul(a, a, qa, qa, out, bounds=bounds)

    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """``RNE((total - n * zi) * s_in / (n * s_out)) + zo``."""
        offset = _objects(_integers(total, "The sum") - _checked_count(count) * src.zero_point)
        ratio = Fraction(_scale_of(src)) / Fraction(_scale_of(dst)) / count
        return _store_exact(offset, ratio.as_integer_ratio(), dst)

    def avg_pool2d(
        self,
        x: Tensor,
        src: QParams,
        dst: QParams,
        *,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        count_include_pad: bool = True,
    ) -> Tensor:
        """:meth:`mean` of each window."""
        offset = _integers(x, "The tensor to pool") - src.zero_point
        windows = _windows(offset, kernel_size, stride, padding, count_include_pad)
        ratio = Fraction(_scale_of(src)) / Fraction(_scale_of(dst))
        bottom = _objects(windows.counts) * ratio.denominator
        return _store_exact(_objects(windows.total()), (ratio.numerator, bottom), dst)

    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """``RNE(clamp((q - zp) * s_in) / s_out) + zp``; rounding and clamping commute."""
        return self.requantize(x, src, dst, bounds=self.clamp_bounds(low, high, dst))

    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """``RNE(v / s) + zp``, saturated."""
        scale = Fraction(_scale_of(q))

        def stored(limit: float) -> int:
            if math.isinf(limit):
                return q.quant_max if limit > 0 else q.quant_min
            value = round(Fraction(limit) / scale) + q.zero_point
            return min(max(value, q.quant_min), q.quant_max)

        lower, upper = _checked_limits(low, high)
        return stored(lower), stored(upper)


# The modes ---------------------------------------------------------------------------------------

XNNPACK: Arithmetic = XnnpackArithmetic()
FIXED_POINT: Arithmetic = FixedPointArithmetic()
EXACT: Arithmetic = ExactArithmetic()

ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {mode.name: mode for mode in (XNNPACK, FIXED_POINT, EXACT)}
)


def get_arithmetic(name: str) -> Arithmetic:
    """Look up a mode: ``"xnnpack"``, ``"fixed_point"`` or ``"exact"``.

    Raises:
        SchemeError: No mode has that name.
    """
    try:
        return ARITHMETICS[name]
    except KeyError:
        legal = ", ".join(ARITHMETICS)
        raise SchemeError(f"Unknown arithmetic {name!r}: choose one of {legal}") from None
