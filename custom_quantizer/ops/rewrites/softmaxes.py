"""Softmax and its logarithm that a model writes out, as the op that computes them.

``exp(x) / exp(x).sum(-1, keepdim=True)``, with or without the largest score taken away first, is a
softmax; ``x - logsumexp(x, -1, keepdim=True)`` is its logarithm. On integers each step would be
rounded, and the sum, too. Last bits of float32 differ; where exp overflows, the op does not.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import argument, is_float32, shape_of
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.movement import passes_on

__all__ = ["SOFTMAXES"]

aten = torch.ops.aten

_MOST_STEPS = 4
"""Calls that two spellings of one tensor are compared over."""


def _quotient(insert: Insertion) -> Node | None:
    """Each exp over the sum of all."""
    top, bottom = insert.node.args[:2]
    scores = _source(top, aten.exp.default)
    total = _reduced(bottom, aten.sum.dim_IntList)
    if scores is None or total is None or not _is_same(top, total[0]):
        return None
    return insert.call(aten.softmax.int, _unmoved(scores, total[1]), total[1])


def _difference(insert: Insertion) -> Node | None:
    """Scores less the logarithm of the sum of their exp."""
    scores, taken = insert.node.args[:2]
    total = _reduced(taken, aten.logsumexp.default)
    if total is None or not _is_same(scores, total[0]) or not is_float32(scores):
        return None
    return insert.call(aten.log_softmax.int, scores, total[1])


def _exponential(insert: Insertion) -> Node | None:
    """Of the logarithm of a softmax."""
    source = _inner(insert.node.args[0])
    if source is None or source.target is not aten.log_softmax.int:
        return None
    return insert.call(aten.softmax.int, *source.args[:2])


def _logarithm(insert: Insertion) -> Node | None:
    """Of a softmax."""
    source = _inner(insert.node.args[0])
    if source is None or source.target is not aten.softmax.int or len(source.args) > 2:
        return None
    return insert.call(aten.log_softmax.int, *source.args)


def _inner(value: Any) -> Node | None:
    """What passes its values on to ``value``, unless something overwrites it."""
    while isinstance(value, Node) and passes_on(value) and overwritten_by(value) is None:
        value = value.args[0]
    if not isinstance(value, Node) or value.op != "call_function" or overwritten_by(value):
        return None
    return value if is_float32(value) else None


def _source(value: Any, target: Any) -> Node | None:
    """What a call of ``target`` reads."""
    node = _inner(value)
    return cast(Node, node.args[0]) if node is not None and node.target is target else None


def _reduced(value: Any, target: Any) -> tuple[Node, int] | None:
    """What is reduced over one dim, which the result keeps or is given back, and that dim."""
    node = _inner(value)
    given = None
    if node is not None and node.target is aten.unsqueeze.default:
        rank = len(shape_of(node))
        given, node = cast(int, node.args[1]) % rank, _inner(node.args[0])
    if node is None or node.target is not target or node.kwargs:
        return None
    data, dims = cast(Node, node.args[0]), argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or len(dims) != 1:
        return None
    dim = int(dims[0]) % len(shape_of(data))
    keeps = bool(argument(node, 2, "keepdim", False))
    return (data, dim) if keeps == (given is None) and given in (None, dim) else None


def _unmoved(scores: Node, dim: int) -> Node:
    """Scores before the largest, which is one number for each row, was taken away."""
    node = _inner(scores)
    if node is None or node.target is not aten.sub.Tensor or node.kwargs:
        return scores
    data, taken = node.args[:2]
    if not isinstance(data, Node) or not isinstance(taken, Node) or not is_float32(data):
        return scores
    sizes, rank = shape_of(taken), len(shape_of(node))
    is_one = ((1,) * (rank - len(sizes)) + tuple(sizes))[dim] == 1
    return data if is_one and len(shape_of(data)) == rank and _is_largest(taken, data) else scores


def _is_largest(value: Node, data: Node) -> bool:
    """Whether ``value`` is the largest of ``data``, along a dim or of all."""
    node: Any = value
    while isinstance(node, Node) and (passes_on(node) or node.target is aten.unsqueeze.default):
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    return isinstance(node, Node) and node.target in _MAXIMA and node.args[0] is data


_MAXIMA = frozenset({aten.amax.default, aten.max.default, aten.max.dim})


def _is_same(left: Any, right: Any, depth: int = 0) -> bool:
    """Whether two values are one, or computed alike from the same."""
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return left is right or bool(left == right)
    if depth == _MOST_STEPS or left.op != "call_function" or left.target is not right.target:
        return False
    if left.is_impure() or overwritten_by(left) or overwritten_by(right):
        return False
    if len(left.args) != len(right.args) or left.kwargs != right.kwargs:
        return False
    pairs = zip(left.args, right.args, strict=True)
    return all(_is_same(a, b, depth + 1) for a, b in pairs)


SOFTMAXES: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten.div.Tensor: _quotient,
        aten.exp.default: _exponential,
        aten.log.default: _logarithm,
        aten.sub.Tensor: _difference,
    }
)
"""By overload."""
