"""Sums of what stands before, in float ops that the delegate has."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import Builder, calls, graph_pass, replace
from custom_quantizer.core.graph import argument, shape_of, tensor_meta

aten = torch.ops.aten

_MOST_SUMMED = 1 << 11
"""Longest dim that is summed up step by step."""


@graph_pass(
    "sums of what stands before",
    "a few sums of shifted tensors: added in another order",
    exact=False,
)
def running_sums_in_steps(model: GraphModule) -> int:
    """Each value and the one before it, these and those two before, four before, and so on.

    Nothing is multiplied by zero, so what is infinite stays where it is.
    """
    count = 0
    for node in calls(model, frozenset({aten.cumsum.default})):
        data, meta, shape = cast(Node, node.args[0]), tensor_meta(node), shape_of(node)
        dtype = argument(node, 2, "dtype")
        if meta is None or meta.dtype != torch.float32 or dtype is not None or not shape:
            continue
        dim = int(cast(int, node.args[1])) % len(shape)
        if not isinstance(shape[dim], int) or not 0 < shape[dim] <= _MOST_SUMMED:
            continue
        build, size, shift = Builder(model, node), int(shape[dim]), 1
        while shift < size:
            early = build.call(aten.slice.Tensor, data, dim, 0, size - shift)
            amounts = [*[0] * (2 * (len(shape) - 1 - dim)), shift, 0]
            late = build.call(aten.constant_pad_nd.default, early, amounts)
            data, shift = build.call(aten.add.Tensor, data, late), 2 * shift
        replace(node, data)
        count += 1
    return count
