"""Rewrites that only TOSA needs: its averages and resizes as layers with constant weights.

ExecuTorch's arm backend takes a mean apart into a sum, a product and roundings between them, and
hands an average pooling to ``AVG_POOL2D``, which wants input and output of one scale and is
silently wrong otherwise. A layer whose weights are ``1 / n`` rounds once, at any scales: as all
weights are the same number, none of them is off the grid.

``RESIZE`` sums four neighbours with fractions of its own and is not modelled here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from custom_quantizer.core.graph import are_static, argument, shape_of
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.gemm import per_dim
from custom_quantizer.ops.pool import adaptive_kernel, is_global_pool, spatial_mean_dims
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS
from custom_quantizer.ops.rewrites.legalization.interpolations import by_layers

__all__ = ["FORMS"]

aten = torch.ops.aten


def _mean(insert: Insertion) -> Node | None:
    found = spatial_mean_dims(insert.node)
    if found is None or argument(insert.node, 3, "dtype") is not None:
        return None
    return _over_image(insert, keepdim=found[1])


def _over_image(insert: Insertion, *, keepdim: bool) -> Node | None:
    """The mean of each image as a linear layer."""
    data = insert.node.args[0]
    if not isinstance(data, Node):
        return None
    batch, channels, *image = shape_of(data)
    if not are_static((channels, *image)):
        return None
    count = math.prod(image)
    rows = insert.reshape(data, [batch, channels, count])
    weight = insert.constant("weight", torch.full((1, count), 1.0 / count))
    averaged = insert.call(aten.linear.default, rows, weight)
    return insert.reshape(averaged, [batch, channels, *([1, 1] if keepdim else [])])


def _adaptive_avg_pool(insert: Insertion) -> Node | None:
    if is_global_pool(insert.node):
        return _over_image(insert, keepdim=True)
    kernel = adaptive_kernel(insert.node)
    data = insert.node.args[0]
    if kernel is None or not isinstance(data, Node) or len(shape_of(data)) != 4:
        return None
    return data if kernel == (1, 1) else _windows(insert, kernel, kernel, (0, 0))


def _avg_pool(insert: Insertion) -> Node | None:
    node, data = insert.node, insert.node.args[0]
    if not isinstance(data, Node) or len(shape_of(data)) != 4:
        return None
    kernel = per_dim(node.args[1], 2)
    stride = per_dim(argument(node, 2, "stride") or kernel, 2)
    padding = per_dim(argument(node, 3, "padding", 0), 2)
    counted = bool(argument(node, 5, "count_include_pad", True))
    if argument(node, 4, "ceil_mode", False) or argument(node, 6, "divisor_override") is not None:
        return None
    if any(padding) and not counted:
        return None  # windows of different sizes
    return _windows(insert, kernel, stride, padding)


def _windows(insert: Insertion, kernel: Any, stride: Any, padding: Any) -> Node | None:
    """The average of each window as a depthwise convolution."""
    data = insert.node.args[0]
    channels = shape_of(data)[1] if isinstance(data, Node) else None
    if not isinstance(channels, int):
        return None
    value = torch.full((channels, 1, *kernel), 1.0 / math.prod(kernel))
    weight = insert.constant("weight", value)
    places = (list(stride), list(padding), [1, 1])
    return insert.call(aten.conv2d.default, data, weight, None, *places, channels)


def _then(first: Rewrite | None, second: Rewrite) -> Rewrite:
    """A rewrite for what another one leaves as it is."""

    def rewrite(insert: Insertion) -> Node | None:
        made = None if first is None else first(insert)
        return second(insert) if made is None else made

    return rewrite


_LAYERS: dict[Any, Rewrite] = {
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.upsample_bilinear2d.vec: by_layers,
}

FORMS: Mapping[Any, Rewrite] = MappingProxyType(
    dict(LEGALIZATIONS)
    | {target: _then(LEGALIZATIONS.get(target), form) for target, form in _LAYERS.items()}
)
"""By overload, what makes its form."""
