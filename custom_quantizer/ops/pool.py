"""Pooling and spatial means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.graph import are_static, argument, reads_sizes, tensor_meta
from custom_quantizer.ops._rule import (
    Case,
    Integers,
    OpRule,
    PatternMatch,
    QParamSharing,
    QuantizedOp,
)
from custom_quantizer.ops.elementwise import _case, _match_single
from custom_quantizer.ops.gemm import per_dim

__all__ = ["ADAPTIVE_AVG_POOL", "AVG_POOL", "MAX_POOL", "MEAN", "RULES"]

aten = torch.ops.aten


def pool_window(node: Node, dims: int = 2) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of a pooling call, each a number a dim."""
    kernel = per_dim(node.args[1], dims)
    stride = per_dim(argument(node, 2, "stride") or kernel, dims)
    return kernel, stride, per_dim(argument(node, 3, "padding", 0), dims)


def max_pool_window(node: Node, dims: int = 2) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation of a max pool, each a number a dim."""
    return *pool_window(node, dims), per_dim(argument(node, 4, "dilation", 1), dims)


# ---------------------------------------------------------------------------------------------
# max_pool2d
# ---------------------------------------------------------------------------------------------


def _max_pool_integers(op: QuantizedOp, inputs: Integers, _arithmetic: Arithmetic) -> Tensor:
    node = op.node
    ceil_mode = bool(argument(node, 5, "ceil_mode", False))
    # Integers up to 16 bits are exact in float32, and padding is minus infinity.
    pooled = F.max_pool2d(inputs[0].to(torch.float32), *max_pool_window(node), ceil_mode)
    return pooled.to(torch.int32)


MAX_POOL = OpRule(
    family="max_pool2d",
    targets=frozenset({aten.max_pool2d.default}),
    match=_match_single,
    sharing=QParamSharing.SAME,
    integers=_max_pool_integers,
    cases=(
        _case("2x2", lambda x: F.max_pool2d(x, 2), (2, 8, 10, 9)),
        _case("3x3_padded", lambda x: F.max_pool2d(x, 3, 2, 1), (2, 8, 10, 9)),
        _case("ceil_mode", lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), (2, 8, 10, 9)),
        _case("dilated", lambda x: F.max_pool2d(x, 2, 1, dilation=2), (2, 8, 10, 9)),
    ),
)

# ---------------------------------------------------------------------------------------------
# Spatial means
# ---------------------------------------------------------------------------------------------


def spatial_mean_dims(node: Node) -> tuple[tuple[int, ...], bool] | None:
    """``((2, 3), keepdim)`` if a ``mean.dim`` call averages the spatial dims of a 4-d tensor."""
    data = tensor_meta(cast(Node, node.args[0]))
    dims = node.args[1]
    if data is None or data.dim() != 4 or not isinstance(dims, Sequence):
        return None
    normalized = tuple(sorted(int(cast(int, d)) % 4 for d in dims))
    return (normalized, bool(argument(node, 2, "keepdim", False))) if normalized == (2, 3) else None


def _match_mean(rule: OpRule, node: Node) -> PatternMatch | str:
    if argument(node, 3, "dtype") is not None:
        return "it changes the dtype"
    if spatial_mean_dims(node) is None:
        return "only a mean over the two spatial dims of a 4-d tensor has an integer form"
    return _match_single(rule, node)


def _mean_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    _, keepdim = cast("tuple[tuple[int, ...], bool]", spatial_mean_dims(op.node))
    data = inputs[0]
    count = data.shape[2] * data.shape[3]
    total = data.to(torch.int64).sum(dim=(2, 3), keepdim=keepdim)
    return arithmetic.mean(total, count, op.inputs[0], op.output)


MEAN = OpRule(
    family="mean",
    targets=frozenset({aten.mean.dim}),
    match=_match_mean,
    integers=_mean_integers,
    cases=(
        _case("keepdim", lambda x: x.mean((2, 3), keepdim=True), (2, 8, 5, 7)),
        _case("flat", lambda x: x.mean((2, 3)), (2, 8, 5, 7)),
        _case("negative_dims", lambda x: x.mean([-1, -2]), (2, 8, 6, 6)),
    ),
)

# ---------------------------------------------------------------------------------------------
# adaptive_avg_pool2d
# ---------------------------------------------------------------------------------------------


def adaptive_window(node: Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """``(input, output)`` sizes of an adaptive pooling call, if both are static."""
    data = tensor_meta(cast(Node, node.args[0]))
    if data is None or data.dim() not in (3, 4) or reads_sizes(node):
        return None
    size = data.shape[-2:]
    if not are_static(size):
        return None
    wanted = node.args[1]
    out = [
        int(size[i]) if w is None else int(w)
        for i, w in enumerate(cast("Sequence[int | None]", wanted))
    ]
    out = out * 2 if len(out) == 1 else out
    return (int(size[0]), int(size[1])), (out[0], out[1])


def adaptive_kernel(node: Node) -> tuple[int, int] | None:
    """The window if an adaptive pooling call is an ordinary one: kernel equal to stride."""
    window = adaptive_window(node)
    if window is None:
        return None
    (height, width), (out_height, out_width) = window
    if height % out_height or width % out_width:
        return None
    return height // out_height, width // out_width


def is_global_pool(node: Node) -> bool:
    """Whether an adaptive pooling call averages all of a 4-d image."""
    data = tensor_meta(cast(Node, node.args[0]))
    wanted = list(cast("Sequence[int | None]", node.args[1]))
    return data is not None and data.dim() == 4 and all(w == 1 for w in wanted)


def _match_adaptive(rule: OpRule, node: Node) -> PatternMatch | str:
    if not is_global_pool(node) and adaptive_kernel(node) is None:
        return "its output size does not divide its input size, so windows overlap"
    return _match_single(rule, node)


def _adaptive_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    data = inputs[0]
    if is_global_pool(op.node):
        total = data.to(torch.int64).sum(dim=(2, 3), keepdim=True)
        return arithmetic.mean(total, data.shape[2] * data.shape[3], op.inputs[0], op.output)
    kernel = cast("tuple[int, int]", adaptive_kernel(op.node))  # or it would be no op of this rule
    if kernel == (1, 1):
        return arithmetic.requantize(data, op.inputs[0], op.output)
    return arithmetic.avg_pool2d(data, op.inputs[0], op.output, kernel_size=kernel, stride=kernel)


ADAPTIVE_AVG_POOL = OpRule(
    family="adaptive_avg_pool2d",
    targets=frozenset({aten.adaptive_avg_pool2d.default}),
    match=_match_adaptive,
    integers=_adaptive_integers,
    cases=(
        _case("global", lambda x: F.adaptive_avg_pool2d(x, 1), (2, 8, 5, 7)),
        _case("identity", lambda x: F.adaptive_avg_pool2d(x, (5, 7)), (2, 8, 5, 7)),
        _case("windows", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 8, 4, 9)),
    ),
)

# ---------------------------------------------------------------------------------------------
# avg_pool2d
# ---------------------------------------------------------------------------------------------


def _match_avg_pool(rule: OpRule, node: Node) -> PatternMatch | str:
    if argument(node, 4, "ceil_mode", False):
        return "ceil_mode makes windows of different sizes"
    if argument(node, 6, "divisor_override") is not None:
        return "its divisor is overridden"
    return _match_single(rule, node)


def counts_padding(node: Node) -> bool:
    """Whether padding zeros count in the average."""
    _, _, padding = pool_window(node)
    return bool(argument(node, 5, "count_include_pad", True)) and any(padding)


def _avg_pool_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    kernel, stride, padding = pool_window(op.node)
    data = inputs[0]
    if counts_padding(op.node):
        # A pad by zero and a pool without padding.
        vertical, horizontal = padding
        pads = (horizontal, horizontal, vertical, vertical)
        data, padding = F.pad(data, pads, value=op.inputs[0].zero_point), [0, 0]
    return arithmetic.avg_pool2d(
        data,
        op.inputs[0],
        op.output,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        count_include_pad=False,
    )


AVG_POOL = OpRule(
    family="avg_pool2d",
    targets=frozenset({aten.avg_pool2d.default}),
    match=_match_avg_pool,
    integers=_avg_pool_integers,
    cases=(
        _case("2x2", lambda x: F.avg_pool2d(x, 2), (2, 8, 10, 9)),
        _case("3x3_stride1", lambda x: F.avg_pool2d(x, 3, 1), (2, 8, 10, 9)),
        _case("counted_padding", lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 8, 10, 9)),
        _case(
            "uncounted_padding",
            lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            (2, 8, 10, 9),
        ),
        Case("module_4x4", lambda: nn.AvgPool2d(4), ((2, 8, 12, 8),)),
    ),
)

RULES = (MAX_POOL, AVG_POOL, ADAPTIVE_AVG_POOL, MEAN)
