"""The derived int32 bias.

An integer convolution or linear layer accumulates ``sum((x - z_x) * w)`` in units of
``s_x * s_w``. A bias joins that sum only if it is an integer of the same unit, so its scale is
not chosen but derived: ``s_b = s_x * s_w``, zero point 0, per output channel where the weight is.

References:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, section 2.4 (scale of the bias).
    TensorFlow, ``lite/tools/optimize/quantization_utils.cc``, ``AdjustWeightsForBiasScale``
    (raising the weight scale of a channel whose bias does not fit).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from custom_quantizer.core.arithmetic import SMALLEST_NORMAL

__all__ = [
    "MAX_EXACT_BIAS",
    "WIDE_BIAS",
    "BiasLimits",
    "bias_shift",
    "derived_scale",
    "quantize_bias",
    "raise_scale",
]

MAX_EXACT_BIAS = 1 << 21
"""Largest absolute integer a derived bias may have.

XNNPACK's serializer takes the bias as float32 and quantizes it again: the constant, the
reciprocal of the scale and their product are each rounded once to 24 bits, so the integer ``q``
comes back within ``|q| * 3 * 2**-24`` (plus terms of order ``2**-48``) before it is rounded. Up to
2**21 that is at most 0.375 < 0.5, so every integer returns; the limit also keeps the sum far from
the sign bit.
"""


WIDE_BIAS = 1 << 30
"""The same limit for ops above 8 bits, whose bias never passes through the serializer."""


@dataclass(frozen=True)
class BiasLimits:
    """Largest absolute integers of biases that a backend passes on unchanged.

    Attributes:
        narrow: of ops whose integers have at most 8 bits.
        wide: of all others.
    """

    narrow: int = MAX_EXACT_BIAS
    wide: int = WIDE_BIAS

    def of(self, bits: int) -> int:
        """The limit of an op whose widest integer, input or weight, has ``bits`` bits."""
        return self.wide if bits > 8 else self.narrow


def derived_scale(input_scale: float, weight_scale: Tensor) -> Tensor:
    """``s_x * s_w`` rounded once to float32, as the delegate computes it.

    Args:
        input_scale: scale of the activation, float32-representable.
        weight_scale: float32, scalar or one value per output channel.
    """
    return torch.tensor(input_scale, dtype=torch.float32) * weight_scale.to(torch.float32)


def quantize_bias(
    bias: Tensor, input_scale: float, weight_scale: Tensor, shift: Tensor | None = None
) -> Tensor:
    """``round(b / (s_x * s_w * 2**shift))``, half to even, computed in float64.

    Args:
        bias: float, ``(out_channels,)``.
        input_scale: scale of the activation.
        weight_scale: float32, scalar or ``(out_channels,)``.
        shift: int64, like ``weight_scale``; how far the hardware shifts the integer left before it
            joins the accumulator (:func:`bias_shift`). Default: not at all.

    Returns:
        int32, ``(out_channels,)``, saturated to ``[-(2**31 - 1), 2**31 - 1]``: its sign never
        wraps.
    """
    unit = input_scale * weight_scale.to(torch.float64)
    if shift is not None:
        unit = torch.ldexp(unit, shift)
    limit = float((1 << 31) - 1)
    return torch.round(bias.to(torch.float64) / unit).clamp(-limit, limit).to(torch.int32)


def bias_shift(bias: Tensor, input_scale: float, weight_scale: Tensor, quant_max: int) -> Tensor:
    """Smallest left shift with which a bias of few bits fits: one per weight scale.

    A bias narrower than the accumulator keeps its most significant bits: its scale is the derived
    one times a power of two, so adding it still costs the hardware a shift and nothing else.

    Args:
        bias: float, ``(out_channels,)``.
        input_scale: scale of the activation.
        weight_scale: float32, scalar or ``(out_channels,)``.
        quant_max: largest integer of the narrow format.

    Returns:
        int64, the shape of ``weight_scale``, 0 where nothing has to be shifted.
    """
    needed = bias.to(torch.float64).abs() / (input_scale * weight_scale.to(torch.float64))
    needed = needed.max() if weight_scale.dim() == 0 else needed
    # The rounded integer must not exceed quant_max, hence half a unit of slack.
    ratio = (needed / (quant_max + 0.5)).clamp_min(2.0**-1000)
    _, exponent = torch.frexp(ratio)
    exact = torch.ldexp(torch.ones_like(ratio), exponent - 1) == ratio
    return (exponent.to(torch.int64) - exact.to(torch.int64)).clamp_min(0)


def raise_scale(
    weight_scale: Tensor, constraints: list[tuple[float, Tensor]], limit: int = MAX_EXACT_BIAS
) -> Tensor:
    """Smallest scales, not below ``weight_scale``, with which every bias fits.

    Their products with the input scales, the scales of the biases, are normal in float32.

    Args:
        weight_scale: float32, scalar or ``(out_channels,)``.
        constraints: ``(input scale, float bias (out_channels,))`` of each op that uses the weight.
        limit: largest absolute integer allowed.

    Returns:
        float32, the shape of ``weight_scale``.
    """
    needed = weight_scale.to(torch.float64)
    for input_scale, bias in constraints:
        # Half a unit of slack keeps the rounded integer within the limit.
        least = bias.to(torch.float64).abs() / (input_scale * (limit - 0.5))
        least = least.clamp_min(SMALLEST_NORMAL / input_scale)
        needed = torch.maximum(needed, least.max() if needed.dim() == 0 else least)
    raised = needed.to(torch.float32)
    short = raised.to(torch.float64) < needed
    raised = torch.where(short, torch.nextafter(raised, torch.tensor(torch.inf)), raised)
    return torch.where(needed > weight_scale.to(torch.float64), raised, weight_scale)
