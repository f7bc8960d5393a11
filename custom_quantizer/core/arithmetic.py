"""Values and shared pieces of integer arithmetic, and what a mode of it has to provide.

Three modes compute the same operators on stored integers and differ in how they round:

``fixed_point`` (:mod:`custom_quantizer.core.fixed_point`)
    gemmlowp and TensorFlow Lite: an int32 multiplier in Q31 and a shift; no float at run time.
``exact`` (:mod:`custom_quantizer.core.exact`)
    Rational arithmetic, one rounding (half to even) at the end: the yardstick for the others.
that of a backend, under its name
    What its runtime computes, step by step.

Op families are written once against :class:`Arithmetic`;
:func:`custom_quantizer.ops.backend.get_mode` picks the mode.

Conventions, everywhere: stored integers come in as any integer dtype (int8 to int64, uint8), are
computed in int64 and go out as int32; real values are float32; a stored ``q`` stands for
``(q - zero_point) * scale``. Tensors live on the CPU and run eagerly: a compiler that fuses a
multiply with an add would change results.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_quantizer.core.formats import signed_bits
from custom_quantizer.core.resizing import Resizing, position_bits
from custom_quantizer.errors import InputError, SchemeError

__all__ = [
    "INT8",
    "INT16",
    "INT32",
    "LARGEST_FLOAT",
    "ROUNDOFF",
    "SMALLEST_NORMAL",
    "Arithmetic",
    "Bounds",
    "PoolWindows",
    "QParams",
    "accumulator_bits",
    "along",
    "as_integers",
    "as_reals",
    "between_pixels",
    "bit_length",
    "check_width",
    "checked_count",
    "checked_limits",
    "checked_scale",
    "checked_weight_scale",
    "f32",
    "float_to_integers",
    "pool_windows",
    "refuse_nan",
    "resizable",
    "round_to_24_bits",
    "round_to_float32",
    "saturate",
    "scale_along",
    "scale_of",
    "shift_right_even",
    "split_multiplier",
    "store",
    "wrap_int32",
]

Bounds = tuple[int, int]
"""Inclusive stored-integer limits of a fused activation, from :meth:`Arithmetic.clamp_bounds`."""

INT8: Bounds = (-(2**7), 2**7 - 1)
INT16: Bounds = (-(2**15), 2**15 - 1)
INT32: Bounds = (-(2**31), 2**31 - 1)
_INTEGER_DTYPES = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})
# Of float32: the limits of normal numbers, and half a unit in the last place, relative.
SMALLEST_NORMAL, LARGEST_FLOAT, ROUNDOFF = 2.0**-126, float(np.finfo(np.float32).max), 2.0**-24
# Values past any stored integer, yet small enough to convert to int64 and to add a zero point to.
_HUGE = 2.0**40


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
        if not INT32[0] <= self.quant_min <= self.zero_point <= self.quant_max <= INT32[1]:
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
            object.__setattr__(self, "scale", checked_scale(self.scale, "QParams.scale"))

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
        return INT8[0] <= self.quant_min and self.quant_max <= INT8[1]

    @property
    def levels(self) -> int:
        """The number of stored integers."""
        return self.quant_max - self.quant_min + 1

    @property
    def bits(self) -> int:
        """Width of the stored integers, as signed ones."""
        return signed_bits(self.quant_min, self.quant_max)

    @property
    def offsets(self) -> tuple[int, int]:
        """Smallest and largest value of ``q - zero_point``."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    @property
    def reach(self) -> int:
        """Largest absolute value of ``q - zero_point``."""
        return max(map(abs, self.offsets))

    def same_grid(self, other: QParams) -> bool:
        """Whether equal integers stand for equal reals: same scale and zero point, any range."""
        mine, theirs = self._key(), other._key()
        return (mine[0], mine[1], mine[4]) == (theirs[0], theirs[1], theirs[4])


def checked_scale(scale: object, what: str) -> float:
    """A positive, finite, normal float32 number; ``SchemeError`` names ``what`` otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise SchemeError(f"{what} must be a float or a float32 tensor, got {scale!r}")
    if not (SMALLEST_NORMAL <= scale < math.inf) or round_to_float32(scale) != scale:
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
    normal = torch.isfinite(copy) & (copy >= SMALLEST_NORMAL)
    if not bool(normal.all()):
        channel = int((~normal).nonzero()[0])
        raise SchemeError(
            f"The scale of channel {channel} is {float(copy[channel])!r}: scales must be "
            "positive, finite and normal in float32"
        )
    return copy


# Shared pieces -----------------------------------------------------------------------------------


def f32(value: float) -> Tensor:
    """A float32 constant: arithmetic with it rounds as the tensor's does, whatever the default."""
    return torch.tensor(value, dtype=torch.float32)


def as_integers(x: Tensor, what: str) -> Tensor:
    """Stored integers as int64; ``InputError`` for real numbers."""
    if x.dtype not in _INTEGER_DTYPES:
        raise InputError(f"{what} must hold integers, got {x.dtype}: quantize it first")
    return x.to(torch.int64)


def as_reals(x: Tensor, what: str) -> Tensor:
    """Real values, unchanged; ``InputError`` unless they are float32."""
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
    return as_integers(x, "The tensor to saturate").clamp(low, high).to(torch.int32)


def wrap_int32(x: Tensor) -> Tensor:
    """Reduce integers modulo 2**32 into int32, as a 32-bit accumulator that overflows does.

    Wrapping a 64-bit sum once equals wrapping after every addition.

    Raises:
        InputError: ``x`` does not hold integers.
    """
    low, _ = INT32
    return (((as_integers(x, "The accumulator") - low) & 0xFFFFFFFF) + low).to(torch.int32)


def store(x: Tensor, q: QParams, bounds: Bounds | None = None) -> Tensor:
    """Saturate int64 values, zero point included, to the range of ``q`` and then to ``bounds``."""
    return _activated(saturate(x, q.quant_min, q.quant_max), bounds)


def along(values: Tensor, axis: int, like: Tensor) -> Tensor:
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


def scale_along(q: QParams, like: Tensor) -> Tensor:
    """The scale, float32, shaped to broadcast with ``like``."""
    if isinstance(q.scale, Tensor) and q.axis is not None:
        return along(q.scale, q.axis, like)
    return f32(scale_of(q))


def scale_of(q: QParams) -> float:
    """The one scale of a tensor; ``SchemeError`` if there is one per channel."""
    if isinstance(q.scale, Tensor):
        raise SchemeError("This operator takes one scale per tensor, not one per channel")
    return q.scale


def checked_weight_scale(weight_scale: float | Tensor) -> Tensor:
    """Scales of a weight as float32, 0-D or one per channel."""
    if isinstance(weight_scale, Tensor) and weight_scale.ndim > 0:
        return _checked_scales(weight_scale)
    return f32(checked_scale(float(weight_scale), "weight_scale"))


def check_width(accumulator_width: int) -> None:
    """Raise ``SchemeError`` for an accumulator of other than 32 or 64 bits."""
    if accumulator_width not in (32, 64):
        raise SchemeError(f"Accumulators have 32 or 64 bits, asked for {accumulator_width}")


def checked_limits(low: float, high: float) -> tuple[float, float]:
    """Round the limits of a clamp to float32, as an operator on float32 tensors does."""
    limits = round_to_float32(low), round_to_float32(high)
    if not limits[0] <= limits[1]:
        raise SchemeError(f"A clamp needs low <= high, got [{low}, {high}]")
    return limits


def checked_count(count: int) -> int:
    """How many elements a mean averages: at least one."""
    if count < 1:
        raise SchemeError(f"A mean needs at least one element, got {count}")
    return count


@dataclass(frozen=True)
class PoolWindows:
    """The taps of a pooling window, kernel column outermost, and how many of them count.

    Attributes:
        taps: one tensor for each position of the kernel.
        counts: how many values the windows divide by.
        rows: height of the kernel.
        counts_padding: whether there is padding, and it counts.
    """

    taps: list[Tensor]
    counts: Tensor
    rows: int
    counts_padding: bool

    def total(self) -> Tensor:
        """Sum of the taps of each window."""
        return torch.stack(self.taps).sum(0)


def pool_windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> PoolWindows:
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
    return PoolWindows(taps_of(x), counts, kernel_h, count_include_pad and any(padding))


def resizable(x: Tensor, rows: Resizing, columns: Resizing) -> Tensor:
    """The integers of images as int64, if they have the size that is to be resized."""
    values = as_integers(x, "The tensor to resize")
    if values.ndim < 2 or tuple(values.shape[-2:]) != (rows.size, columns.size):
        raise InputError(
            f"An image of {rows.size} x {columns.size} pixels is to be resized, got a tensor of "
            f"shape {tuple(values.shape)}"
        )
    return values


def between_pixels(values: Tensor, dim: int, lower: Tensor, rest: Tensor, unit: int = 1) -> Tensor:
    """``unit`` times what lies ``rest / unit`` behind each pixel ``lower``, on a line to the next.

    Args:
        values: images, of shape (..., H, W).
        dim: -2 or -1.
        lower: indices along ``dim``; behind the last pixel comes itself.
        rest: from 0 to ``unit``.
        unit: what a pixel is divided into.
    """
    upper = (lower + 1).clamp(max=values.shape[dim] - 1)
    first, second = values.index_select(dim, lower), values.index_select(dim, upper)
    return first * unit + (second - first) * (rest.unsqueeze(-1) if dim == -2 else rest)


def float_to_integers(rounded: Tensor) -> Tensor:
    """Convert integral float32 values to int64, out-of-range ones to something still out of it."""
    return rounded.clamp(-_HUGE, _HUGE).to(torch.int64)


def refuse_nan(x: Tensor) -> None:
    """Raise ``InputError`` if a value is NaN."""
    if bool(torch.isnan(x).any()):
        raise InputError("The tensor to quantize holds NaN, which no integer stands for")


def split_multiplier(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Write float32 multipliers as integers: ``multiplier == mantissa * 2**-shift``.

    Args:
        multiplier: Positive normal float32.

    Returns:
        int64 mantissas in ``[2**23, 2**24)``, and int64 shifts.
    """
    fraction, exponent = torch.frexp(as_reals(multiplier, "The multiplier"))
    mantissa = (fraction * 2.0**24).to(torch.int64)
    return mantissa, 24 - exponent.to(torch.int64)


def bit_length(x: Tensor) -> Tensor:
    """Number of bits of non-negative int64 values; 0 has none."""
    bits = torch.zeros_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        long = x >= 1 << step
        bits = bits + long * step
        x = torch.where(long, x >> step, x)
    return bits + (x > 0)


def round_to_24_bits(x: Tensor) -> Tensor:
    """Round int64 values to 24 significant bits, half to even, as a conversion to float32 does."""
    excess = (bit_length(x.abs()) - 24).clamp(min=0)
    return shift_right_even(x, excess) << excess


def shift_right_even(x: Tensor, shift: Tensor) -> Tensor:
    """``x / 2**shift`` rounded half to even; int64, ``0 <= shift <= 62``."""
    floor = x >> shift
    rest = x - (floor << shift)
    half = (torch.ones_like(shift) << shift) >> 1
    up = (rest > half) | ((rest == half) & (shift > 0) & (floor % 2 == 1))
    return floor + up


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
    rows = as_integers(weight, "The weight").reshape(weight.shape[0], -1)
    positive: list[int] = rows.clamp(min=0).sum(1).tolist()
    negative: list[int] = rows.clamp(max=0).sum(1).tolist()
    biases: list[int] = [0] * len(positive)
    if bias is not None:
        if bias.shape != rows.shape[:1]:
            raise InputError(
                f"A bias of shape {tuple(bias.shape)} does not fit {len(positive)} output channels"
            )
        biases = as_integers(bias, "The bias").tolist()
    # Python integers from here: the products may exceed 64 bits.
    low, high = quant_min - zero_point, quant_max - zero_point
    channels = list(zip(positive, negative, biases, strict=True))
    largest = max(b + p * high + n * low for p, n, b in channels)
    smallest = min(b + p * low + n * high for p, n, b in channels)
    return signed_bits(smallest, largest)


# The interface -----------------------------------------------------------------------------------


class Arithmetic(ABC):
    """The operators of quantized inference on stored integers, in one rounding mode.

    Stored integers in: any integer dtype. Stored integers out: int32, saturated to the range of
    the output's :class:`QParams` and then, where given, to the ``bounds`` of a fused activation.
    All methods raise :class:`~custom_quantizer.errors.InputError` for a tensor of the wrong dtype
    or shape, and :class:`~custom_quantizer.errors.SchemeError` for parameters that the mode
    cannot compute with.

    A mode writes the methods that are abstract; the others say what is the same in all modes.

    Attributes:
        name: by which :func:`~custom_quantizer.ops.backend.get_mode` finds it.
        continues_in_float32: whether accumulators may come as float32 that holds integers below
            2**24.
    """

    name: ClassVar[str]
    continues_in_float32: ClassVar[bool] = False

    @abstractmethod
    def quantize(self, x: Tensor, q: QParams) -> Tensor:
        """Store float32 reals as integers."""

    def quantize_table(self, values: Tensor, q: QParams, ulps: float) -> Tensor:
        """Store the values of a function for all integers of its input, float32, without NaN.

        As :meth:`quantize`, where the table is made once, here, and shipped.

        Args:
            values: of every entry, in order.
            q: of the result.
            ulps: how far kernels may be off, in units of ``2**-24`` of the largest value.
        """
        del ulps
        return self.quantize(values, q)

    def dequantize(self, x: Tensor, q: QParams) -> Tensor:
        """Give the float32 reals that stored integers stand for: ``fl(fl(q - zp) * s)``."""
        offset = (as_integers(x, "The tensor to dequantize") - q.zero_point).to(torch.float32)
        return offset * scale_along(q, x)

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
        base, weight = checked_scale(input_scale, "input_scale"), checked_weight_scale(weight_scale)
        stored = self._requantize_accumulator(
            acc, base, weight, channel_axis, out, accumulator_width
        )
        return _activated(stored, bounds)

    @abstractmethod
    def _requantize_accumulator(
        self, acc: Tensor, input_scale: float, weight: Tensor, axis: int, out: QParams, width: int
    ) -> Tensor: ...

    def requantize(
        self, x: Tensor, src: QParams, dst: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """Move stored integers from one scale and zero point to another."""
        return _activated(self._requantize(x, src, dst), bounds)

    @abstractmethod
    def _requantize(self, x: Tensor, src: QParams, dst: QParams) -> Tensor: ...

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
        return _activated(self._add(a, b, qa, qb, out, subtract), bounds)

    @abstractmethod
    def _add(
        self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams, subtract: bool
    ) -> Tensor: ...

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
        return _activated(self._mul(a, b, qa, qb, out), bounds)

    @abstractmethod
    def _mul(self, a: Tensor, b: Tensor, qa: QParams, qb: QParams, out: QParams) -> Tensor: ...

    def square(
        self, a: Tensor, qa: QParams, out: QParams, *, bounds: Bounds | None = None
    ) -> Tensor:
        """Store ``a * a``: :meth:`mul` of the tensor with itself, unless the mode differs."""
        return _activated(self._square(a, qa, out), bounds)

    def _square(self, a: Tensor, qa: QParams, out: QParams) -> Tensor:
        return self._mul(a, a, qa, qa, out)

    @abstractmethod
    def mean(self, total: Tensor, count: int, src: QParams, dst: QParams) -> Tensor:
        """Store the mean of ``count`` elements, whose stored integers sum to ``total``."""

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
        values = self._pooled(x, src)
        windows = pool_windows(values, kernel_size, stride, padding, count_include_pad)
        return self._avg_pool2d(windows, src, dst)

    def _pooled(self, x: Tensor, src: QParams) -> Tensor:
        """What windows sum, of which padding is 0."""
        return as_integers(x, "The tensor to pool") - src.zero_point

    @abstractmethod
    def _avg_pool2d(self, windows: PoolWindows, src: QParams, dst: QParams) -> Tensor: ...

    def interpolate(self, x: Tensor, q: QParams, rows: Resizing, columns: Resizing) -> Tensor:
        """Resize stored integers of shape (..., H, W) by bilinear interpolation, on one grid.

        With the four neighbours of an output, and its position between them in units of
        ``2**-f``, ``(weighted sum + 2**(2 * f - 1)) >> 2 * f``: half goes up.
        :func:`~custom_quantizer.core.resizing.position_bits` gives ``f``, 11 for int8.

        Args:
            x: stored integers.
            q: of input and output.
            rows: how the height changes.
            columns: how the width changes.

        References:
            XNNPACK at commit 92a7ad50, ``src/s8-ibilinear``; TensorFlow Lite resizes with
            fractions of 10 bits.
        """
        values, fraction = resizable(x, rows, columns), position_bits(q.bits)
        for dim, resizing in ((-2, rows), (-1, columns)):
            place = torch.tensor(resizing.positions(fraction))
            lower = place >> fraction
            rest = place - (lower << fraction)
            values = between_pixels(values, dim, lower, rest, 1 << fraction)
        return store((values + (1 << (2 * fraction - 1))) >> 2 * fraction, q)

    @abstractmethod
    def clamp(self, x: Tensor, src: QParams, dst: QParams, low: float, high: float) -> Tensor:
        """Store ``min(max(x, low), high)``: an activation that is an operator of its own."""

    @abstractmethod
    def clamp_bounds(self, low: float, high: float, q: QParams) -> Bounds:
        """Give the stored integers of a fused activation's real limits, which may be infinite."""


def _activated(stored: Tensor, bounds: Bounds | None) -> Tensor:
    """Stored integers behind a fused activation."""
    if bounds is None:
        return stored
    low, high = bounds
    if low > high:
        raise SchemeError(f"The activation bounds [{low}, {high}] are empty")
    return stored.clamp(low, high)
