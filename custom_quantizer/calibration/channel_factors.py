"""Batch norms that became convolutions, at the cost of batch norms while they are calibrated.

A batch norm that no layer comes before is a depthwise 1x1 convolution in the prepared graph
(:mod:`custom_quantizer.ops.rewrites.batch_norms`). For one image and one thread PyTorch (2.15)
calls a matrix product for each of its channels, 34,000 in DenseNet-121, which takes longer than all
other layers together. The same bits are one multiplication and one addition of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChannelFactors"]

aten = torch.ops.aten


class ChannelFactors(Tensor):
    """Weight of a depthwise 1x1 convolution, ``(channels, 1, 1, 1)``, which multiplies quickly.

    It is what it was made of for all else; no result of an op is one.
    """

    @classmethod
    def of(cls, weight: Tensor) -> Tensor:
        """``weight`` as such a tensor, in the same memory, if it is one and no gradient is kept."""
        plain = type(weight) in (Tensor, torch.nn.Parameter) and not torch.is_grad_enabled()
        if plain and weight.dim() == 4 and weight.numel() == len(weight) > 1:
            return weight.as_subclass(cls)
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or what has the same bits."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is aten.conv2d.default and not kwargs and _is_slow(*args):
                images, weight, bias = args[:3]
                scaled = images * weight.reshape(-1, 1, 1)
                return scaled if bias is None else scaled.add_(bias.reshape(-1, 1, 1))
            return func(*args, **(kwargs or {}))


def _is_slow(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> bool:
    """Whether each channel is multiplied on its own, and PyTorch makes a matrix product of each.

    Its other kernels round once where these round twice.
    """
    if images.dim() != 4 or groups != images.shape[1] or groups != len(weight):
        return False
    if set(stride) != {1} or set(padding) != {0}:
        return False
    sizes = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    chosen = torch._C._select_conv_backend(images, weight, bias, *sizes)
    return bool(chosen == torch._C._ConvBackend.Slow2d)  # type: ignore[attr-defined]  # no stub
