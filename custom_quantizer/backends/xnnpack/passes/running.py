"""Sums and products of what stands before, in float ops that the delegate has.

Each value and the one before it are joined, these and those two before, four before, and so on.
No sum is a product with zeros, so what is infinite stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    Numbers,
    calls,
    graph_pass,
    replace,
)
from custom_quantizer.core.graph import argument, is_float32, shape_of

aten = torch.ops.aten

_MOST_SUMMED = 1 << 11
"""Longest dim that is summed up step by step."""


@graph_pass(
    "sums, logarithms of sums, and products of what stands before",
    "a few sums or products of shifted tensors: computed in another order",
    exact=False,
)
def running_sums_in_steps(model: GraphModule) -> int:
    """Those of float32, along dims of static size."""
    count = 0
    for node in calls(model, frozenset(SUMS)):
        data, shape = cast(Node, node.args[0]), shape_of(node)
        dtype = argument(node, 2, "dtype")
        if not is_float32(node) or dtype is not None or not shape:
            continue
        dim = int(cast(int, node.args[1])) % len(shape)
        if not isinstance(shape[dim], int) or not 0 < shape[dim] <= _MOST_SUMMED:
            continue
        build, size, shift = Numbers(model, node), int(shape[dim]), 1
        join, neutral = SUMS[node.target]
        while shift < size:
            early = build.call(aten.slice.Tensor, data, dim, 0, size - shift)
            amounts = [*[0] * (2 * (len(shape) - 1 - dim)), shift, 0]
            late = build.call(aten.constant_pad_nd.default, early, amounts, neutral)
            data, shift = join(build, data, late), 2 * shift
        replace(node, data)
        count += 1
    return count


def _sum(build: Numbers, a: Node, b: Node) -> Node:
    return build.call(aten.add.Tensor, a, b)


def _product(build: Numbers, a: Node, b: Node) -> Node:
    return build.call(aten.mul.Tensor, a, b)


def sum_of_exponentials(build: Numbers, a: Node, b: Node) -> Node:
    """``log(exp(a) + exp(b)) = max(a, b) + log(1 + exp(-|a - b|))``.

    The difference is one of finite numbers, as that of two infinities is none.
    """
    near = map(build.finite, (a, b))
    apart = build.call(aten.abs.default, build.call(aten.sub.Tensor, *near))
    power = build.call(aten.exp.default, build.times(apart, -1.0))
    raised = build.call(aten.add.Tensor, power, build.number(1.0))
    largest = build.call(aten.maximum.default, a, b)
    return build.call(aten.add.Tensor, largest, build.call(aten.log.default, raised))


SUMS: Mapping[Any, tuple[Callable[[Numbers, Node, Node], Node], float]] = {
    aten.cumprod.default: (_product, 1.0),
    aten.cumsum.default: (_sum, 0.0),
    aten.logcumsumexp.default: (sum_of_exponentials, -math.inf),
}
"""By overload, what joins two tensors, and what changes nothing of the other."""
