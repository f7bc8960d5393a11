"""Straight-through estimators: what a model computes only to steer gradients.

``z + (q - z).detach()`` has the value of ``q`` and the gradient of ``z`` (Bengio, Leonard and
Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013). Vector
quantizers, binary layers and ``gumbel_softmax(hard=True)`` end so. On integers both sums would be
rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from custom_quantizer.core.graph import argument
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.rewrites.constants import restated

__all__ = ["ESTIMATORS"]

aten = torch.ops.aten


def _terms(node: Node) -> list[tuple[int, Node]]:
    """Signs and operands of a sum or difference of two tensors; none of anything else."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or argument(node, 2, "alpha", 1) != 1:
        return []
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return []
    return [(1, left), (1 if node.target is aten.add.Tensor else -1, right)]


def _estimator(insert: Insertion) -> Node | None:
    """Of three terms, two of which cancel but for their gradients, the third.

    The float model rounds twice on the way: last bits differ.
    """
    outer = _terms(insert.node)
    if insert.training or not outer:
        return None
    for (sign, inner), last in (outer, outer[::-1]):
        parts = [(sign * s, term) for s, term in _terms(restated(inner))]
        terms = [*parts, last] if parts else []
        steers = any(term is not restated(term) for _, term in [*terms, (sign, inner)])
        for i, (rest_sign, rest) in enumerate(terms):
            (one_sign, one), (other_sign, other) = terms[:i] + terms[i + 1 :]
            cancel = one_sign == -other_sign and restated(one) is restated(other)
            if cancel and steers and rest_sign == 1:
                return restated(rest)
    return None


ESTIMATORS: Mapping[Any, Rewrite] = MappingProxyType(
    {aten.add.Tensor: _estimator, aten.sub.Tensor: _estimator}
)
"""By overload."""
