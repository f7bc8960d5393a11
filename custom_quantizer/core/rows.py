"""Integers of activations with a scale for each row, chosen from the row itself.

A row is whatever shares a scale: the features of a token, an image, the channels of a pixel. With
``fl()`` one float32 rounding, ``RNE`` half to even, and ``lo`` and ``hi`` the extremes of the row
and 0::

    t    = fl(255 / fl(hi - lo)), or 1 if lo = hi       scale = fl(1 / t)
    below, above = fl(lo * t), fl(hi * t)
    zp   = RNE(fl(-128 - below)) if fl(fl(-128 + below) + fl(127 + above)) > 0
           else RNE(fl(127 - above)), within [-128, 127]
    q    = sat8(sat16(RNE(min(fl(x * t), 32767))) + zp)

Numbers below ``2**-126`` are 0 here, read or written: the runtime switches subnormal numbers off
while it computes. A range below ``3e-36`` so has the scale 0, and all that is left of the row is 0.
Values that are not finite, and ranges beyond float32, have no scale; kernels differ in what they
make of them, so that they are refused here.

References:
    XNNPACK at commit 92a7ad50: ``src/xnnpack/quantization.h``
    (``xnn_f32_qd8_asymmetric_quantization_params``), ``src/f32-qs8-vcvt``, ``src/operator-run.c``
    (``xnn_compute_f32_qx8_convert``, and ``PTHREADPOOL_FLAG_DISABLE_DENORMALS``). It is compiled
    with ``-ffp-contract=off``. CPUs with VNNI store ``q + 128`` and ``zp + 128``; the differences
    are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from custom_quantizer.core.arithmetic import INT8, INT16, SMALLEST_NORMAL, as_reals, f32
from custom_quantizer.errors import InputError

__all__ = ["RowIntegers", "quantize_rows", "round_rows", "without_subnormal"]


@dataclass(frozen=True)
class RowIntegers:
    """A tensor that was quantized row by row.

    Attributes:
        offsets: ``q - zp``, float32 integers of the shape of the tensor.
        zero_point: float32 integers, with size 1 in the dims that share a scale.
        scale: float32, likewise: one step of the integers.
    """

    offsets: Tensor
    zero_point: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, dims: tuple[int, ...]) -> RowIntegers:
    """Integers of at most 8 bits, with one scale for all values along ``dims``.

    Args:
        x: float32, of any shape.
        dims: that share a scale.

    Raises:
        InputError: ``x`` is not float32; or values that share a scale are not all finite, or span
            more than float32.
    """
    as_reals(x, "The tensor to quantize")
    if x.numel() == 0:
        shape = [1 if d in {n % x.dim() for n in dims} else n for d, n in enumerate(x.shape)]
        return RowIntegers(x, x.new_zeros(shape), x.new_ones(shape))
    low = without_subnormal(x.amin(dims, keepdim=True).clamp(max=0.0))
    high = without_subnormal(x.amax(dims, keepdim=True).clamp(min=0.0))
    span = high - low
    if not bool(torch.isfinite(span).all()):
        raise InputError(
            f"{int((~torch.isfinite(span)).sum())} of {span.numel()} rows hold NaN or infinities, "
            "or span more than float32, so that no scale can be chosen for them; look for it in "
            "the data and the ops before"
        )
    least, most = (f32(float(end)) for end in INT8)
    # A tensor over a tensor: dividing a number by a tensor may be computed as a reciprocal.
    steps = torch.where(span == 0, f32(1.0), (most - least).expand_as(span) / span)
    below, above = low * steps, high * steps
    from_low = (least + below) + (most + above) > 0
    # What is no number comes of infinite steps; clamping takes it for the least integer.
    zero_point = torch.where(from_low, least - below, most - above).nan_to_num(float(least))
    zero_point = torch.round(zero_point.clamp(*INT8))
    if bool((span < _SMALL).any()):
        x = without_subnormal(x)
    scaled = torch.fmin(x * steps, f32(INT16[1]))
    stored = (torch.round(scaled).clamp(*INT16) + zero_point).clamp(*INT8)
    scale = without_subnormal(torch.ones_like(steps) / steps)
    return RowIntegers(stored - zero_point, zero_point, scale)


_SMALL = 2.0**-100
"""Below this range a subnormal number may be half a step."""


def without_subnormal(x: Tensor) -> Tensor:
    """``x`` with 0 in the place of numbers too small for the exponents of float32."""
    return torch.where(x.abs() < SMALLEST_NORMAL, torch.zeros_like(x), x)


class _StraightThrough(torch.autograd.Function):
    """Rounded values forward, all of the gradient backward: no value is beyond its own range."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        rows = quantize_rows(x.to(torch.float32), dims)
        return (rows.offsets * rows.scale).to(x.dtype)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def round_rows(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x``, of any floating-point dtype, as the integers of its rows stand for it.

    Gradients pass through.

    Raises:
        InputError: as :func:`quantize_rows`.
    """
    return cast(Tensor, _StraightThrough.apply(x, dims))
