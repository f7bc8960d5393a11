"""Convolutions of few channels that step over columns, as ones over columns that were joined.

XNNPACK's int8 convolutions are one matrix product over all taps of the kernel, and the channels of
each tap are rounded up to 8 (to 4 on ARM CPUs with dot products and no more). So a first layer,
which reads three channels, computes mostly padding: 49 taps of 7x7 cost 392 products for 147. If it
steps over every second column, two neighbouring columns can be read as one of six channels: in
memory an image with channels last is the same for both. The kernel gets a column of zeros where a
pair is read by half, 28 taps cost 224 products, and every sum is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import cast

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.backends.xnnpack.grouped_convs import INPUTS, rounded_up
from custom_quantizer.core.graph import are_static, argument, shape_of, tensor_meta
from custom_quantizer.ops import PatternMatch
from custom_quantizer.ops.gemm import CONV, per_dim, symmetric_padding

__all__ = ["JoinedColumns", "columns_of", "join_columns"]

_WORTH = 0.75
"""Joined where no more than this part of the products is left. Copying the image costs something,
and rounding up to 4 channels gains less."""


@dataclass(frozen=True)
class JoinedColumns:
    """A convolution over joined columns.

    Attributes:
        factor: How many columns become one.
        zeros: Columns of zeros that the kernel gets, left and right.
        taps: Of the kernel, in joined columns.
        stride: In joined columns.
        padding: Left and right, in joined columns.
    """

    factor: int
    zeros: tuple[int, int]
    taps: int
    stride: int
    padding: tuple[int, int]

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight with its zeros.

        Args:
            weight: ``(out_channels, channels, rows, columns)``.

        Returns:
            ``(out_channels, channels, rows, factor * taps)``.
        """
        return F.pad(weight, self.zeros)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight of the convolution over joined columns.

        Args:
            weight: ``(out_channels, channels, rows, columns)``.

        Returns:
            ``(out_channels, factor * channels, rows, taps)``, channels of a column side by side.
        """
        outputs, channels, rows, _ = weight.shape
        split = self.kernel(weight).reshape(outputs, channels, rows, self.taps, self.factor)
        return split.permute(0, 4, 1, 2, 3).reshape(outputs, -1, rows, self.taps)


def join_columns(
    channels: int, columns: int, taps: int, stride: int, padding: int
) -> JoinedColumns | None:
    """How to join columns for the least work; ``None``: not at all.

    Args:
        channels: of the input.
        columns: of the input.
        taps: of the kernel in this direction, without dilation.
        stride: in this direction.
        padding: on each side, in columns.
    """
    outputs = (columns + 2 * padding - taps) // stride + 1
    least, found = _WORTH * taps * rounded_up(channels, INPUTS), None
    for factor in range(2, gcd(columns, stride) + 1):
        if columns % factor or stride % factor:
            continue
        left = -(-padding // factor)
        zeros = left * factor - padding
        joined_taps = -(-(taps + zeros) // factor)
        width, step = columns // factor, stride // factor
        right = max(0, (outputs - 1) * step + joined_taps - left - width)
        work = joined_taps * rounded_up(factor * channels, INPUTS)
        if (left + width + right - joined_taps) // step + 1 == outputs and work <= least:
            after = factor * joined_taps - taps - zeros
            found = JoinedColumns(factor, (zeros, after), joined_taps, step, (left, right))
            least = work
    return found


def columns_of(match: PatternMatch, groups: int) -> JoinedColumns | None:
    """How to join the columns that a convolution of an exported graph reads, if that is less work.

    A convolution over a signal has its samples for columns.

    Args:
        match: the convolution.
        groups: that are left of its groups; only one can read joined columns.
    """
    meta = tensor_meta(cast(Node, match.weight))
    if match.rule is not CONV or groups != 1 or meta is None:
        return None
    sizes = shape_of(cast(Node, match.node.args[0]))
    before, after = symmetric_padding(match.node)
    dims = len(before)
    dilation = per_dim(argument(match.node, 5, "dilation", 1), dims)
    stride = per_dim(argument(match.node, 3, "stride", 1), dims)
    static = are_static(sizes)
    if not static or len(sizes) != dims + 2 or before != after or dilation[-1] != 1:
        return None
    return join_columns(sizes[1], sizes[-1], int(meta.shape[-1]), stride[-1], before[-1])
