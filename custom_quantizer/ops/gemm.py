"""Convolutions, transposed convolutions and linear layers: weight, bias, one accumulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic, along
from custom_quantizer.core.graph import argument, describe, is_constant, reads_sizes, tensor_meta
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.errors import ConversionError
from custom_quantizer.ops._rule import (
    ACCEPTED,
    Case,
    Integers,
    OpRule,
    PatternMatch,
    QuantizedOp,
    Verdict,
    refused,
)

__all__ = [
    "CONV",
    "CONV_TRANSPOSE",
    "LINEAR",
    "RULES",
    "channel_axis",
    "expand_channels",
    "per_dim",
    "sums_of_products",
    "symmetric_padding",
]

aten = torch.ops.aten

_CONV_TARGETS = frozenset(
    {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding}
)
_CONV_TRANSPOSE_TARGETS = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
_LINEAR_TARGETS = frozenset({aten.linear.default})


def _roles(
    rule: OpRule, node: Node, *, weight_axis: int = 0, groups: int = 1
) -> PatternMatch | str:
    data, weight = node.args[0], node.args[1]
    bias = argument(node, 2, "bias")
    if not isinstance(data, Node) or not isinstance(weight, Node):
        return "its input or weight is not a tensor of the graph"
    return PatternMatch(rule, node, (data,), weight, cast("Node | None", bias), weight_axis, groups)


def _match_conv(rule: OpRule, node: Node, *, weight_axis: int = 0) -> PatternMatch | str:
    if reads_sizes(node):
        return "one of its arguments depends on a dynamic size"
    groups = int(argument(node, 6, "groups", 1))
    return _roles(rule, node, weight_axis=weight_axis, groups=groups)


def _match_conv_transpose(rule: OpRule, node: Node) -> PatternMatch | str:
    return _match_conv(rule, node, weight_axis=1)


def expand_channels(scale: Tensor, match: PatternMatch) -> Tensor:
    """One value per output channel of the op, from one per channel of the weight's axis.

    A grouped transposed convolution stores ``out_channels / groups`` channels on axis 1, used by
    every group in turn, so the scales repeat group by group.
    """
    if match.rule is CONV_TRANSPOSE and scale.ndim > 0:
        return scale.repeat(match.groups)
    return scale


def symmetric_padding(
    node: Node, kernel: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """``(before, after)`` padding per spatial dim of a convolution, ``'same'`` resolved.

    Args:
        node: the call.
        kernel: sizes of the kernel; by default those recorded for the weight.

    Raises:
        ConversionError: the kernel size is not known.
    """
    if kernel is None:
        meta = tensor_meta(cast(Node, node.args[1]))
        if meta is None:
            raise ConversionError(f"{describe(node)}: no shape is recorded for its weight")
        kernel = meta.shape[2:]
    dims = len(kernel)
    padding = argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        if padding == "valid":
            return [0] * dims, [0] * dims
        dilation = per_dim(argument(node, 5, "dilation", 1), dims)
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    both = per_dim(padding, dims)
    return both, list(both)


def per_dim(value: Any, dims: int) -> list[int]:
    """An argument with one number for all dims, or one each."""
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * dims if len(values) == 1 else values


def _accepts_gemm(match: PatternMatch, _scheme: OpScheme) -> Verdict:
    weight = cast(Node, match.weight)
    if not is_constant(weight):
        return refused(f"its weight is computed by {describe(weight)}, not a constant")
    meta = tensor_meta(weight)
    if meta is not None and meta.dtype != torch.float32:
        return refused(f"its weight is {meta.dtype}; only float32 weights are quantized")
    return ACCEPTED


# ---------------------------------------------------------------------------------------------
# Integer semantics
# ---------------------------------------------------------------------------------------------

# Floating-point types and the integers below which all sums in them are exact.
_EXACT = ((torch.float32, 1 << 24), (torch.float64, 1 << 53))

_PART = 1 << 18
"""Weights that are copied to a wider type at a time: 1 MB of 32 bits."""


def _accumulate(op: QuantizedOp, data: Tensor, contract: Callable[..., Tensor]) -> Tensor:
    """``bias + sum((x - z_x) * w)`` as exact integers, held in a floating-point tensor."""
    (qx,) = op.inputs
    weight = cast(Tensor, op.weight)
    largest_bias = 0 if op.bias is None else int(op.bias.to(torch.int64).abs().max())
    dtype = _exact_dtype(op.match, qx.reach * _largest_row(op.match, weight) + largest_bias)
    acc = contract((data - qx.zero_point).to(dtype), weight)
    if op.bias is not None:
        acc += along(op.bias.to(dtype), channel_axis(op.match), acc)
    return acc


def _exact_dtype(match: PatternMatch, bound: int) -> torch.dtype:
    """Floating-point numbers in which sums up to ``bound`` are exact.

    Convolutions of floats are fast and, as long as no partial sum can reach 2**24 (float32) or
    2**53 (float64), exact in any order. The worst case over all inputs decides the type.
    """
    dtype = next((dtype for dtype, limit in _EXACT if bound < limit), None)
    if dtype is None:
        raise ConversionError(
            f"{describe(match.node)}: its accumulator may need {bound.bit_length() + 1} bits; at "
            "most 54 are computed exactly; choose fewer bits for weights or activations"
        )
    return dtype


def sums_of_products(match: PatternMatch, data: Tensor, weight: Tensor, reach: int) -> Tensor:
    """``sum(x * w)`` of a convolution or linear layer as exact integers, held in floats.

    Args:
        match: the layer.
        data: integers less their zero point, any dtype.
        weight: integers, in the layout of the aten op.
        reach: the largest absolute value that ``data`` may hold.
    """
    dtype = _exact_dtype(match, reach * _largest_row(match, weight))
    contract = _linear if match.rule is LINEAR else _convolution(match.node, match.groups)
    return contract(data.to(dtype), weight)


def channel_axis(match: PatternMatch) -> int:
    """Dimension of a layer's result that holds its output channels."""
    return -1 if match.rule is LINEAR else 1


def _largest_row(match: PatternMatch, weight: Tensor) -> int:
    """Largest sum of absolute weights that meet in one accumulator."""
    if match.rule is CONV_TRANSPOSE:
        # Input channels are summed within a group; every kernel position may overlap.
        grouped = weight.to(torch.int64).abs().reshape(match.groups, -1, *weight.shape[1:])
        return int(grouped.sum(dim=1).flatten(2).sum(dim=2).max())
    parts = _parts(weight.flatten(1))
    return max(int(part.to(torch.int32).abs().sum(dim=1).max()) for part in parts)


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """Some rows at a time, so that their copies in a wider type stay in the processor's cache."""
    return torch.split(weight, max(1, _PART * len(weight) // weight.numel()))


def _requantize(op: QuantizedOp, acc: Tensor, arithmetic: Arithmetic) -> Tensor:
    weight_qparams = op.weight_qparams
    if weight_qparams is None:
        raise ConversionError(f"{describe(op.node)} has no quantized weight")
    scale = weight_qparams.scale
    if isinstance(scale, Tensor):
        scale = expand_channels(scale, op.match)
    return arithmetic.requantize_accumulator(
        acc if _continues_in_float32(op, acc, arithmetic) else acc.to(torch.int64),
        input_scale=cast(float, op.inputs[0].scale),
        weight_scale=scale,
        channel_axis=channel_axis(op.match) % acc.dim(),
        out=op.output,
        bounds=op.stored_bounds(arithmetic),
        accumulator_width=64 if op.is_wide else 32,
    )


def _continues_in_float32(op: QuantizedOp, acc: Tensor, arithmetic: Arithmetic) -> bool:
    """Some arithmetics go on in float32; all others are defined on integers."""
    return acc.dtype == torch.float32 and arithmetic.continues_in_float32 and not op.is_wide


def _convolution(node: Node, groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A convolution of integers that are held in floats."""
    before, after = symmetric_padding(node)
    dims = len(before)
    stride = per_dim(argument(node, 3, "stride", 1), dims)
    dilation = per_dim(argument(node, 5, "dilation", 1), dims)
    conv = F.conv1d if dims == 1 else F.conv2d

    def contract(data: Tensor, integers: Tensor) -> Tensor:
        weight = integers.to(data.dtype)
        # Padding with the zero point is padding the centered input with zero.
        if before == after:
            return conv(data, weight, None, stride, before, dilation, groups)
        pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        return conv(F.pad(data, pads), weight, None, stride, 0, dilation, groups)

    return contract


def _conv_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    contract = _convolution(op.node, op.match.groups)
    return _requantize(op, _accumulate(op, inputs[0], contract), arithmetic)


def _conv_transpose_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    node = op.node
    dims = inputs[0].dim() - 2
    conv = F.conv_transpose1d if dims == 1 else F.conv_transpose2d
    stride = per_dim(argument(node, 3, "stride", 1), dims)
    padding = per_dim(argument(node, 4, "padding", 0), dims)
    output_padding = per_dim(argument(node, 5, "output_padding", 0), dims)
    dilation = per_dim(argument(node, 7, "dilation", 1), dims)

    def contract(data: Tensor, integers: Tensor) -> Tensor:
        weight = integers.to(data.dtype)
        return conv(data, weight, None, stride, padding, output_padding, op.match.groups, dilation)

    return _requantize(op, _accumulate(op, inputs[0], contract), arithmetic)


def _linear(data: Tensor, integers: Tensor) -> Tensor:
    parts = _parts(integers)
    return torch.cat([F.linear(data, part.to(data.dtype)) for part in parts], dim=-1)


def _linear_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    return _requantize(op, _accumulate(op, inputs[0], _linear), arithmetic)


# ---------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------

_layer = partial(OpRule, fuses=frozenset({"relu", "clamp"}), accepts=_accepts_gemm)


def _conv(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


def _then(
    first: Callable[[], nn.Module], *rest: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(first(), *(build() for build in rest))


_IMAGE = ((2, 8, 10, 9),)
_SIGNAL = ((2, 8, 21),)

CONV = _layer(
    family="conv",
    targets=_CONV_TARGETS,
    match=_match_conv,
    integers=_conv_integers,
    cases=(
        Case("2d", _conv(8, 12, 3), _IMAGE),
        Case("2d_padded", _conv(8, 12, 3, padding=1), _IMAGE),
        Case("2d_stride", _conv(8, 12, 3, stride=2, padding=1), _IMAGE),
        Case("2d_first", _conv(3, 12, 3, stride=2, padding=1), ((2, 3, 9, 10),)),
        Case("2d_pointwise", _conv(8, 16, 1), _IMAGE),
        Case("2d_rectangular", _conv(8, 12, (3, 1), padding=(1, 0), stride=(1, 2)), _IMAGE),
        Case("2d_dilated", _conv(8, 12, 3, dilation=2, padding=2), _IMAGE),
        Case("2d_grouped", _conv(8, 12, 3, groups=4), _IMAGE),
        Case("2d_depthwise", _conv(8, 8, 3, groups=8, padding=1), _IMAGE),
        Case("2d_depthwise_multiplier", _conv(8, 16, 3, groups=8, padding=1), _IMAGE),
        Case("2d_depthwise_wide", _conv(8, 8, 7, groups=8, padding=3), _IMAGE),
        Case("2d_same", _conv(8, 12, 3, padding="same"), _IMAGE),
        Case("2d_same_even", _conv(8, 12, (2, 4), padding="same"), _IMAGE),
        Case("2d_no_bias", _conv(8, 12, 3, bias=False), _IMAGE),
        Case("2d_relu", _then(_conv(8, 12, 3), nn.ReLU), _IMAGE),
        Case("2d_relu6", _then(_conv(8, 12, 3), nn.ReLU6), _IMAGE),
        Case("2d_hardtanh", _then(_conv(8, 12, 3), lambda: nn.Hardtanh(-0.3, 0.4)), _IMAGE),
        Case("2d_bn", _then(_conv(8, 12, 3), lambda: nn.BatchNorm2d(12)), _IMAGE),
        Case(
            "2d_bn_relu",
            _then(_conv(8, 12, 3, bias=False), lambda: nn.BatchNorm2d(12), nn.ReLU),
            _IMAGE,
        ),
        Case("1d", lambda: nn.Conv1d(8, 12, 3), _SIGNAL),
        Case("1d_first", lambda: nn.Conv1d(1, 8, 10, stride=5), ((2, 1, 50),)),
        Case("1d_same_grouped", lambda: nn.Conv1d(8, 12, 3, padding="same", groups=4), _SIGNAL),
        Case("1d_relu", _then(lambda: nn.Conv1d(8, 12, 3, stride=2), nn.ReLU), _SIGNAL),
        Case("1d_bn", _then(lambda: nn.Conv1d(8, 12, 3), lambda: nn.BatchNorm1d(12)), _SIGNAL),
    ),
)

CONV_TRANSPOSE = _layer(
    family="conv_transpose",
    targets=_CONV_TRANSPOSE_TARGETS,
    match=_match_conv_transpose,
    integers=_conv_transpose_integers,
    cases=(
        Case("2d", lambda: nn.ConvTranspose2d(8, 12, 3), _IMAGE),
        Case(
            "2d_stride",
            lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1),
            _IMAGE,
        ),
        Case("2d_grouped", lambda: nn.ConvTranspose2d(8, 12, 3, groups=4), _IMAGE),
        Case("2d_depthwise", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), _IMAGE),
        Case("2d_no_bias", lambda: nn.ConvTranspose2d(8, 12, 3, bias=False), _IMAGE),
        Case("2d_dilated", lambda: nn.ConvTranspose2d(8, 12, 3, dilation=2), _IMAGE),
        Case("2d_relu", _then(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), nn.ReLU), _IMAGE),
        Case(
            "2d_bn_relu6",
            _then(lambda: nn.ConvTranspose2d(8, 12, 3), lambda: nn.BatchNorm2d(12), nn.ReLU6),
            _IMAGE,
        ),
        Case("1d", lambda: nn.ConvTranspose1d(8, 12, 3), _SIGNAL),
        Case("1d_stride", lambda: nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1), _SIGNAL),
    ),
)

LINEAR = _layer(
    family="linear",
    targets=_LINEAR_TARGETS,
    match=_roles,
    integers=_linear_integers,
    cases=(
        Case("plain", lambda: nn.Linear(16, 10), ((5, 16),)),
        Case("no_bias", lambda: nn.Linear(16, 10, bias=False), ((5, 16),)),
        Case("3d", lambda: nn.Linear(16, 10), ((2, 7, 16),)),
        Case("relu", _then(lambda: nn.Linear(16, 10), nn.ReLU), ((5, 16),)),
        Case("relu6", _then(lambda: nn.Linear(16, 10), nn.ReLU6), ((5, 16),)),
        Case("bn", _then(lambda: nn.Linear(16, 10), lambda: nn.BatchNorm1d(10)), ((5, 16),)),
    ),
)

RULES = (CONV, CONV_TRANSPOSE, LINEAR)
