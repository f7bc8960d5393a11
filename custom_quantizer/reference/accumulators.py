"""How many bits the sums of a network need in the worst case.

An op whose worst case exceeds its accumulator may wrap around on some input; one that needs far
less could run on a narrower adder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.core.arithmetic import accumulator_bits
from custom_quantizer.core.formats import signed_bits
from custom_quantizer.core.graph import are_static, argument, module_path, shape_of
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.pool import adaptive_kernel, is_global_pool, pool_window
from custom_quantizer.reference.converted import read_converted

__all__ = ["Accumulator", "accumulator_of", "accumulators"]


@dataclass(frozen=True)
class Accumulator:
    """The widest sum or product of one op.

    Attributes:
        op: name of the node, for instance of the convolution of conv-relu.
        module: path of the module it was captured from.
        family: of the op.
        bits: signed bits of the worst case. Some input reaches it for convolutions, linear layers,
            means and products, so no smaller number is safe.
        width: bits of the accumulator that the op has, 32 or 64.
    """

    op: str
    module: str
    family: str
    bits: int
    width: int

    @property
    def fits(self) -> bool:
        """Whether no input can overflow the accumulator."""
        return self.bits <= self.width

    @property
    def fits_int32(self) -> bool:
        """Whether 32 bits would do."""
        return self.bits <= 32


def accumulators(converted: GraphModule) -> tuple[Accumulator, ...]:
    """Worst-case accumulators of every integer op that computes, in graph order.

    Ops that only move, clamp or rescale values, and ops left in float, have none; nor have means
    and matrix products over a size that was dynamic at capture.

    Args:
        converted: what ``convert_pt2e`` returns.

    Raises:
        ConversionError: the graph is not a converted one.
    """
    found = (accumulator_of(op) for op in read_converted(converted).integer)
    return tuple(accumulator for accumulator in found if accumulator is not None)


def accumulator_of(op: QuantizedOp) -> Accumulator | None:
    """The worst case of one op; ``None``: it has none, see :func:`accumulators`."""
    family = op.match.rule.family
    if op.weight is not None:
        data = op.inputs[0]
        bits = weight_accumulator_bits(
            _weights_that_meet(op),
            quant_min=data.quant_min,
            quant_max=data.quant_max,
            zero_point=data.zero_point,
            bias=op.bias,
        )
        return _accumulator(op, bits, 64 if op.is_wide else 32)
    extremes = [q.offsets for q in op.inputs]
    if family == "mul":
        products = [a * b for a in extremes[0] for b in extremes[1]]
        return _accumulator(op, signed_bits(min(products), max(products)), mul_width(op))
    if family == "matmul":
        products = [a * b for a in extremes[0] for b in extremes[1]]
        terms: object = shape_of(op.match.inputs[0])[-1]
        if not isinstance(terms, int):
            return None
        bits = signed_bits(terms * min(products), terms * max(products))
        return _accumulator(op, bits, 64 if op.is_wide else 32)
    if family in ("add", "sub"):
        (low_a, high_a), (low_b, high_b) = extremes
        ends = [low_a, high_a, low_b, high_b]
        # Multipliers are at most one half, so a sum stays between its shifted operands.
        if family == "sub":
            ends += [(low_a - high_b) // 2, -((low_b - high_a) // 2)]
        shift = left_shift(op)
        return _accumulator(op, signed_bits(min(ends) << shift, max(ends) << shift), 32)
    count = _summed(op)
    if count is None:
        return None
    (src,), (low, high) = op.inputs, extremes[0]
    if family == "avg_pool2d" and src.same_grid(op.output):
        low, high = src.quant_min, src.quant_max  # summed and divided with their zero point
    wide = max(src.levels, op.output.levels) > 256
    return _accumulator(op, signed_bits(count * low, count * high), 64 if wide else 32)


def _accumulator(op: QuantizedOp, bits: int, width: int) -> Accumulator:
    return Accumulator(op.node.name, module_path(op.node), op.match.rule.family, bits, width)


def left_shift(op: QuantizedOp) -> int:
    """How far the operands of an add or sub are shifted left before they are rescaled."""
    return 20 if max(q.levels for q in (*op.inputs, op.output)) <= 256 else 15


def mul_width(op: QuantizedOp) -> int:
    """Bits of the accumulator of a product: 64 where 32 could overflow."""
    return 32 if math.prod(q.reach for q in op.inputs) < 1 << 31 else 64


def _summed(op: QuantizedOp) -> int | None:
    """How many values a mean or pool sums; ``None`` for other ops and for unknown image sizes."""
    family, node = op.match.rule.family, op.node
    if family == "avg_pool2d":
        height, width = pool_window(node)[0]
        return height * width
    if family == "adaptive_avg_pool2d" and not is_global_pool(node):
        kernel = adaptive_kernel(node)
        return None if kernel is None or kernel == (1, 1) else kernel[0] * kernel[1]
    if family in ("mean", "adaptive_avg_pool2d"):
        return image_size(op)
    return None


def image_size(op: QuantizedOp) -> int | None:
    """Number of pixels of the op's input; ``None``: dynamic at capture."""
    sizes = shape_of(op.match.inputs[0])[2:]
    return math.prod(sizes) if are_static(sizes) else None


def weight_accumulator_bits(
    weights: Iterable[Tensor],
    *,
    quant_min: int,
    quant_max: int,
    zero_point: int,
    bias: Tensor | None,
) -> int:
    """Signed bits of the widest sum of a layer, whichever of its ``weights`` a sum meets.

    Args:
        weights: of one layer, output channels first: its weight, or :func:`phases_of`.
        quant_min: smallest stored input.
        quant_max: largest stored input.
        zero_point: of the input.
        bias: integers in units of the accumulator, one per output channel.
    """
    return max(
        accumulator_bits(
            weight, quant_min=quant_min, quant_max=quant_max, zero_point=zero_point, bias=bias
        )
        for weight in weights
    )


def phases_of(
    weight: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """The parts of a transposed convolution's weight that one sum meets, output channels first.

    With a stride of ``s``, neighbouring outputs see different taps: those whose dilated position is
    the same modulo ``s``.

    Args:
        weight: ``(in_channels, out_channels / groups, *kernel)``.
        groups: of the channels.
        stride: one per dimension of the kernel.
        dilation: likewise.

    Yields:
        ``(out_channels, in_channels / groups, *taps)``.
    """
    kernel = tuple(weight.shape[2:])
    split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    weight = split.reshape(-1, split.shape[2], *kernel)
    phases = [
        [[t for t in range(k) if t * d % s == phase] for phase in range(s)]
        for k, s, d in zip(kernel, stride, dilation, strict=True)
    ]
    for taps in itertools.product(*phases):
        met = weight
        for dim, chosen in enumerate(taps):
            met = met.index_select(dim + 2, torch.tensor(chosen, dtype=torch.int64))
        # A phase without taps is an output that holds the bias alone; others hold that and more.
        if met.numel():
            yield met


def _weights_that_meet(op: QuantizedOp) -> Iterable[Tensor]:
    weight = cast(Tensor, op.weight)
    if op.match.rule.family != "conv_transpose":
        return (weight,)
    dims = weight.dim() - 2
    stride = per_dim(argument(op.node, 3, "stride", 1), dims)
    dilation = per_dim(argument(op.node, 7, "dilation", 1), dims)
    return phases_of(weight, op.match.groups, stride, dilation)
