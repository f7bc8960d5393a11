"""What keeps a number away from zero: a bound, or a small number that is added."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import constant_of, effective_users
from custom_quantizer.ops import rule_of
from custom_quantizer.ops._rule import as_limits
from custom_quantizer.ops.elementwise import SUB

__all__ = ["adds_epsilon", "bounds_of", "leaves_little", "may_guard", "numbers_of"]

_LARGEST_EPSILON = 1e-3
"""Of numbers that keep a divisor away from zero, as norms add them."""

_LITTLE = 2e-3
"""Half a step of probabilities in 8 bits, which is rounded to zero."""


def bounds_of(node: Node) -> tuple[float, float]:
    """Those of a clamp; infinite of another op."""
    rule = rule_of(node)
    given = (None, None) if rule is None or rule.bounds is None else rule.bounds(node)
    return as_limits(*given)


def adds_epsilon(node: Node) -> bool:
    """Whether an op adds a small number."""
    numbers = numbers_of(node) if node.target is torch.ops.aten.add.Tensor else []
    return any(bool((number > 0) & (number <= _LARGEST_EPSILON)) for number in numbers)


def leaves_little(difference: Node, clamp: Node) -> bool:
    """Whether a bound is next to the number that a difference is taken to: ``1 - p``."""
    numbers = numbers_of(difference) if rule_of(difference) is SUB else []
    if len(numbers) != 1:
        return False
    low, high = (float(numbers[0]) - end for end in bounds_of(clamp))
    # Of two signs, if the number lies between the bounds.
    return low * high > 0 and min(abs(low), abs(high)) <= _LITTLE


def may_guard(clamp: Node) -> bool:
    """Whether a clamp keeps itself, or what is subtracted from it, away from zero."""
    return 0 < bounds_of(clamp)[0] <= _LARGEST_EPSILON or any(
        leaves_little(user, clamp) for user in effective_users(clamp)
    )


def numbers_of(node: Node) -> list[Tensor]:
    """The constants of one element among what an op reads."""
    model = cast(GraphModule, node.graph.owning_module)
    constants = [constant_of(model, s) for s in node.all_input_nodes if s.op == "get_attr"]
    return [constant for constant in constants if constant.numel() == 1]
