"""``where``, by maxima and minima: XNNPACK has no kernel that chooses between two tensors."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import chooses_in_steps
from custom_quantizer.backends.xnnpack.passes._pass import Numbers, calls, graph_pass, replace
from custom_quantizer.core.graph import constant_of, is_constant, is_same_shape, shape_of
from custom_quantizer.ops.elementwise import WHERE
from custom_quantizer.ops.values import forget_values

aten = torch.ops.aten

_Ends = tuple[Node, Node]


@graph_pass("where", "maxima and minima with infinite numbers")
def choices_by_extremes(model: GraphModule) -> int:
    """``where(c, x, y)`` is ``max(min(x, e), min(y, -e))``, ``e`` infinity where ``c`` holds.

    Elsewhere ``e`` is minus infinity. What is chosen keeps its bits, and what is not is multiplied
    by nothing. Extremes of NaN differ between CPUs, so that nothing that is read may be NaN.
    """
    count = 0
    ends: dict[Node, _Ends] = {}
    forget_values(model.graph.nodes)
    # What one of them keeps from being NaN is known while it is there.
    for node in [node for node in calls(model, WHERE.targets) if chooses_in_steps(node)]:
        build, (condition, *sides) = Numbers(model, node), cast("tuple[Node, ...]", node.args)
        if condition not in ends:
            ends[condition] = _ends(build, condition)
        parts = [
            build.call(aten.minimum.default, side, end)
            for side, end in zip(sides, ends[condition], strict=True)
            if not _is_least(model, side)
        ]
        chosen = parts[0] if len(parts) == 1 else None
        if chosen is None or not is_same_shape(shape_of(chosen), shape_of(node)):
            parts += [side for side in sides if _is_least(model, side)]
            chosen = build.call(aten.maximum.default, *parts)
        replace(node, chosen)
        count += 1
    return count


def _ends(build: Numbers, condition: Node) -> _Ends:
    """Infinity where a condition holds, minus infinity elsewhere; and the other way round."""
    if is_constant(condition):
        held = constant_of(build.model, condition)
        ends = torch.where(held, math.inf, -math.inf)
        return build.constant("chosen", ends), build.constant("else", -ends)
    numbers = build.call(aten.to.dtype, condition, torch.float32)
    sign = build.call(aten.sub.Tensor, numbers, build.number(0.5))
    return build.times(sign, math.inf), build.times(sign, -math.inf)


def _is_least(model: GraphModule, side: Node) -> bool:
    """Whether a tensor is minus infinity everywhere, so that the other one decides."""
    return is_constant(side) and bool((constant_of(model, side) == -math.inf).all())
