"""Pooling and means."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    calls,
    graph_pass,
    quantized_neighbours,
    replace,
)
from custom_quantizer.core.graph import argument, is_float32, shape_of
from custom_quantizer.ops.pool import (
    ADAPTIVE_AVG_POOL,
    AVG_POOL,
    MAX_POOL,
    adaptive_kernel,
    counts_padding,
    is_global_pool,
    max_pool_window,
    pool_window,
    spatial_mean_dims,
)

aten = torch.ops.aten


@graph_pass("means that drop dims", "means that keep them")
def means_keep_dims(model: GraphModule) -> int:
    """A spatial mean that drops its dims keeps them and is viewed without: XNNPACK wants so."""
    count = 0
    for node in calls(model, frozenset({aten.mean.dim})):
        found = spatial_mean_dims(node)
        around = quantized_neighbours(node)
        if found is None or (found[1] and list(cast(Any, node.args[1])) == [2, 3]):
            continue
        build = Builder(model, node)
        mean = build.call(aten.mean.dim, node.args[0], [2, 3], True)
        if not found[1]:
            if around is not None:
                mean = build.requantized(mean, around[1])
            shape = [s if isinstance(s, int) else -1 for s in shape_of(node)]
            mean = build.call(aten.view.default, mean, shape)
        replace(node, mean)
        count += 1
    return count


@graph_pass("adaptive and padded pools", "plain pools")
def simplify_pools(model: GraphModule) -> int:
    """Adaptive pooling over equal windows is pooling; counted padding is an explicit pad.

    Over one window it is a mean: its own decomposition restores the strides of images that are
    channels last, with an op no delegate has.
    """
    count = 0
    for node in calls(model, ADAPTIVE_AVG_POOL.targets):
        if is_global_pool(node):
            mean = Builder(model, node).call(aten.mean.dim, node.args[0], [2, 3], True)
            replace(node, mean)
            count += 1
            continue
        equal = adaptive_kernel(node)
        if equal is None:
            continue
        if equal == (1, 1):
            replace(node, cast(Node, node.args[0]))
        else:
            build = Builder(model, node)
            pooled = build.call(aten.avg_pool2d.default, node.args[0], list(equal), list(equal))
            replace(node, pooled)
        count += 1
    for node in calls(model, AVG_POOL.targets):
        # Windows of different sizes, or that the inputs tell: a float kernel knows them.
        if isinstance(AVG_POOL.match(AVG_POOL, node), str) or not counts_padding(node):
            continue
        kernel, stride, (vertical, horizontal) = pool_window(node)
        build = Builder(model, node)
        pads = [horizontal, horizontal, vertical, vertical]
        padded = build.call(aten.constant_pad_nd.default, node.args[0], pads, 0.0)
        pooled = build.call(aten.avg_pool2d.default, padded, kernel, stride)
        replace(node, pooled)
        count += 1
    return count


@graph_pass("max pools with stride > kernel", "dense max pools and strided slices")
def split_sparse_max_pools(model: GraphModule) -> int:
    """A max pool that skips rows pools densely first, then takes a strided slice.

    So does one of floats: XNNPACK has no other kernel for these.
    """
    count = 0
    for node in calls(model, MAX_POOL.targets):
        if isinstance(MAX_POOL.match(MAX_POOL, node), str):
            continue
        kernel, stride, padding, dilation = max_pool_window(node)
        around = quantized_neighbours(node)
        if not any(s > k for s, k in zip(stride, kernel, strict=True)):
            continue
        if argument(node, 5, "ceil_mode", False) or (around is None and not is_float32(node)):
            continue
        build = Builder(model, node)
        value = cast(Node, node.args[0])
        if kernel != [1, 1]:
            value = build.call(aten.max_pool2d.default, value, kernel, [1, 1], padding, dilation)
            value = value if around is None else build.requantized(value, around[0])
        for dim in (2, 3):
            step = stride[dim - 2]
            if step > 1:
                end = 9223372036854775807
                value = build.call(aten.slice.Tensor, value, dim, 0, end, step)
                value = value if around is None else build.requantized(value, around[0])
        # The last dequantize goes back to where the op's quantize node expects a real tensor.
        replace(node, value)
        count += 1
    return count
