"""Core ATen ops become the ops that ``torch.export`` captures.

``ExportedProgram.run_decompositions()`` writes a model with fewer ops: every convolution is one op,
norms return statistics too, a softmax that attention uses asks for rows of minus infinity. The
registry knows the ops that were written; these forms lead back to them, value for value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from custom_quantizer.core.graph import argument, shape_of
from custom_quantizer.core.rewriting import Insertion, Rewrite, renamed

__all__ = ["CORE_ATEN", "CORE_OPS"]

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}
"""By the number of dims that the window moves along."""


def _convolution(insert: Insertion) -> Node | None:
    arguments: Any = insert.node.args
    data, weight, bias, stride, padding, dilation, transposed, grown, groups = arguments
    dims = len(shape_of(weight)) - 2
    if transposed:
        rest = (stride, padding, grown, groups, dilation)
        return insert.call(_TRANSPOSED[dims], data, weight, bias, *rest)
    return insert.call(_CONVOLUTIONS[dims], data, weight, bias, stride, padding, dilation, groups)


def _softmax(target: Any) -> Rewrite:
    def form(insert: Insertion) -> Node | None:
        data, dim, half_to_float = insert.node.args
        return None if half_to_float else insert.call(target, data, dim)

    return form


def _batch_norm(insert: Insertion, norm: Node) -> Node:
    data, weight, bias, mean, variance, momentum, eps = norm.args
    statistics = (mean, variance, False, momentum, eps, False)
    return insert.call(aten.batch_norm.default, data, weight, bias, *statistics)


def _layer_norm(insert: Insertion, norm: Node) -> Node:
    return insert.call(aten.layer_norm.default, *norm.args)


def _group_norm(insert: Insertion, norm: Node) -> Node:
    data, weight, bias, _, _, _, groups, eps = norm.args
    return insert.call(aten.group_norm.default, data, groups, weight, bias, eps)


def _pool(target: Any) -> Any:
    return lambda insert, pool: insert.call(target, *pool.args)


_FIRST_RESULTS: dict[Any, Any] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.max_pool2d_with_indices.default: _pool(aten.max_pool2d.default),
    aten.max_pool3d_with_indices.default: _pool(aten.max_pool3d.default),
}
"""Ops whose first result is all that a model mostly reads."""


def _first_result(insert: Insertion) -> Node | None:
    source, index = insert.node.args
    if not isinstance(source, Node) or source.target not in _FIRST_RESULTS or index != 0:
        return None
    form = _FIRST_RESULTS[source.target]
    result: Node = form(insert, source)
    result.meta["original_target"] = source.target
    return result


_MOMENTS: dict[Any, Any] = {
    aten.std_mean.correction: aten.std.correction,
    aten.std_mean.dim: aten.std.dim,
    aten.var_mean.correction: aten.var.correction,
    aten.var_mean.dim: aten.var.dim,
}
"""Ops of two results, by the op that gives the first; the second is a mean."""


def _moment(insert: Insertion) -> Node | None:
    source, index = insert.node.args
    if not isinstance(source, Node) or source.target not in _MOMENTS:
        return None
    if index == 0:
        result = insert.call(_MOMENTS[source.target], *source.args, **source.kwargs)
    else:
        position = 3 if source.target in (aten.std_mean.dim, aten.var_mean.dim) else 4
        keep = bool(argument(source, position, "keepdim", False))
        dims = argument(source, 1, "dim")
        result = insert.call(aten.mean.dim, source.args[0], dims, keep)
    result.meta["original_target"] = source.target
    return result


def _result(insert: Insertion) -> Node | None:
    """One of several results of an op."""
    found = _first_result(insert)
    return _moment(insert) if found is None else found


def _safe_softmax(insert: Insertion) -> Node | None:
    """``where(all(scores == -inf), 0, softmax(scores))``: attention, whose rows are not all masked.

    As for ``scaled_dot_product_attention``, rows that are masked completely are not told apart.
    """
    condition, other, softmax = insert.node.args
    if not isinstance(softmax, Node) or softmax.target is not aten.softmax.int:
        return None
    scores, dim = softmax.args[:2]
    found = _argument_of(condition, aten.logical_not.default)
    found = _argument_of(found, aten.any.dim, dim, True)
    found = _argument_of(found, aten.logical_not.default)
    found = _argument_of(found, aten.eq.Scalar, -math.inf)
    is_zero = isinstance(other, Node) and (
        other.target is aten.zeros_like.default
        or (other.target in (aten.full_like.default, aten.full.default) and other.args[1] == 0)
    )
    return softmax if found is scores and is_zero else None


def _argument_of(node: object, target: Any, *rest: object) -> object:
    """The first argument of a call of ``target`` whose others are ``rest``; ``None`` of others."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs:
        return None
    return node.args[0] if node.args[1:] == rest else None


def _power(insert: Insertion) -> Node | None:
    """A power of 0 is 1, whatever it is a power of."""
    data, exponent = insert.node.args
    return insert.call(aten.ones_like.default, data) if exponent == 0 else None


CORE_ATEN: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten.convolution.default: _convolution,
        aten._softmax.default: _softmax(aten.softmax.int),
        aten._log_softmax.default: _softmax(aten.log_softmax.int),
        aten._adaptive_avg_pool2d.default: renamed(aten.adaptive_avg_pool2d.default),
        aten._adaptive_avg_pool3d.default: renamed(aten.adaptive_avg_pool3d.default),
        aten.pow.Tensor_Scalar: _power,
        aten.where.self: _safe_softmax,
        operator.getitem: _result,
    }
)
"""By overload."""

CORE_OPS = frozenset({*CORE_ATEN, *_FIRST_RESULTS, *_MOMENTS})
"""Ops that may be replaced; what replaces them answers to rules for them."""
