"""Grouped convolutions with few channels a group, as fewer and wider groups.

XNNPACK has int8 kernels for depthwise convolutions of up to 25 taps. All other grouped convolutions
run as one matrix product a group, which computes 16 outputs from a multiple of 8 inputs at least: a
depthwise convolution of 7x7 then does 128 times the work that is needed. Groups joined to blocks,
with zeros between channels that do not meet, fill the product better; adding zeros changes no sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEPTHWISE_TAPS", "INPUTS", "join_factor", "joined", "rounded_up"]

DEPTHWISE_TAPS = 25
"""Most taps of a depthwise int8 kernel (``src/configs/dwconv-config.c`` of XNNPACK 92a7ad50)."""

INPUTS, _OUTPUTS = 8, 16
"""What a matrix product is rounded up to: ``kr`` and ``nr`` of the int8 kernels."""

_MOST_INPUTS = 16


def join_factor(groups: int, weight: tuple[int, ...]) -> int:
    """How many groups to join, so that the products do the least work; 1: as it is.

    Args:
        groups: of the convolution.
        weight: shape of its weight, ``(out_channels, in_channels / groups, *kernel)``.
    """
    outputs, inputs = weight[0] // groups, weight[1]
    taps = torch.Size(weight[2:]).numel()
    if groups == 1 or (inputs == outputs == 1 and taps <= DEPTHWISE_TAPS):
        return 1

    def work(factor: int) -> float:
        return rounded_up(factor * outputs, _OUTPUTS) * rounded_up(factor * inputs, INPUTS) / factor

    factors = [f for f in range(1, _MOST_INPUTS // inputs + 1) if groups % f == 0]
    return min(factors, key=work, default=1)


def rounded_up(value: int, multiple: int) -> int:
    """The first multiple that is not smaller."""
    return -(-value // multiple) * multiple


def joined(weight: Tensor, groups: int, factor: int) -> Tensor:
    """The weight of the same convolution with ``groups / factor`` groups.

    Args:
        weight: ``(out_channels, in_channels / groups, *kernel)``.
        groups: as it was.
        factor: a divisor of ``groups``.

    Returns:
        ``(out_channels, factor * in_channels / groups, *kernel)``.
    """
    outputs, inputs, *kernel = weight.shape
    blocks = weight.reshape(groups // factor, factor, outputs // groups, inputs, *kernel)
    wide = weight.new_zeros(groups // factor, factor, outputs // groups, factor, inputs, *kernel)
    for i in range(factor):
        wide[:, i, :, i] = blocks[:, i]
    return wide.reshape(outputs, factor * inputs, *kernel)
