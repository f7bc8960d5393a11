"""Arithmetic in one op each of sums, differences, products and quotients.

``addcmul``, ``lerp`` or ``tril`` are a few of these, and ``multiply`` is one by another name. Last
bits of float32 may differ where two roundings become three.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    is_float32,
    recorded_value,
    reduced_dims,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite, renamed
from custom_quantizer.ops.rewrites.masks import is_finite

__all__ = ["ARITHMETIC", "PRODUCTS_APART"]

aten = torch.ops.aten

_MAX_FACTORS = 1 << 5
"""Longest dim that is multiplied up: as many products, each of them rounded."""

_MAX_SUMMED = 1 << 11
"""Longest dim that is summed up step by step: a layer with as many rows and columns."""


def _added(insert: Insertion, start: Any, term: Node, factor: float) -> Node:
    if factor != 1:
        term = insert.call(aten.mul.Tensor, term, float(factor))
    return insert.call(aten.add.Tensor, start, term)


def _product_apart(insert: Insertion) -> Node | None:
    """A sum or difference with a factor (``alpha``) is one of a product."""
    node = insert.node
    scaled, meta = _SCALED[cast(Any, node.target)], tensor_meta(node)
    alpha, operand = argument(node, 2, "alpha", 1), node.args[scaled]
    kind = tensor_meta(operand) if isinstance(operand, Node) else None
    wide = kind is not None and kind.dtype != torch.float32
    if meta is None or meta.dtype != torch.float32 or alpha == 1 or wide:
        return None
    operands = list(node.args[:2])
    if kind is not None:
        operands[scaled] = insert.call(aten.mul.Tensor, operand, alpha)
    elif isinstance(operand, Node) or isinstance(alpha, Node):
        operands[scaled] = product = insert.call(operator.mul, operand, alpha)
        sizes = [recorded_value(n) if isinstance(n, Node) else n for n in (operand, alpha)]
        product.meta["val"] = math.prod(sizes)
    else:
        operands[scaled] = cast(float, operand) * alpha
    return insert.call(node.target, *operands)


_SCALED = {
    aten.add.Tensor: 1,
    aten.rsub.Scalar: 0,
    aten.rsub.Tensor: 0,
    aten.sub.Tensor: 1,
}
"""Which operand the factor is of."""

PRODUCTS_APART: Mapping[Any, Rewrite] = MappingProxyType(dict.fromkeys(_SCALED, _product_apart))
"""By overload; the factor may be a dynamic size."""


def _addcmul(insert: Insertion) -> Node:
    start, left, right = insert.node.args[:3]
    product = insert.call(aten.mul.Tensor, left, right)
    return _added(insert, start, product, float(argument(insert.node, 3, "value", 1)))


def _addcdiv(insert: Insertion) -> Node:
    start, left, right = insert.node.args[:3]
    quotient = insert.call(aten.div.Tensor, left, right)
    return _added(insert, start, quotient, float(argument(insert.node, 3, "value", 1)))


def _lerp(insert: Insertion) -> Node:
    start, end, weight = insert.node.args[:3]
    way = insert.call(aten.sub.Tensor, end, start)
    return insert.call(aten.add.Tensor, start, insert.call(aten.mul.Tensor, way, weight))


def _plain_quotient(insert: Insertion) -> Node | None:
    if argument(insert.node, 2, "rounding_mode") is not None:
        return None
    return insert.call(aten.div.Tensor, *insert.node.args[:2])


def _triangle(insert: Insertion) -> Node | None:
    """A triangle of a matrix: zeros elsewhere."""
    node = insert.node
    data = cast(Node, node.args[0])
    sizes = shape_of(data)[-2:]
    if not is_float32(data) or not are_static(sizes):
        return None
    cut = torch.tril if node.target is aten.tril.default else torch.triu
    return _kept(insert, data, cut(torch.ones(*sizes), int(argument(node, 1, "diagonal", 0))))


def _diagonal(insert: Insertion) -> Node | None:
    """A vector as the diagonal of a matrix of zeros: its columns, or its rows, are the vector."""
    data, place = cast(Node, insert.node.args[0]), int(argument(insert.node, 1, "diagonal", 0))
    shape = shape_of(data)
    if not is_float32(data) or len(shape) != 1 or not isinstance(shape[0], int):
        return None
    if place:
        data = insert.call(aten.pad.default, data, [abs(place), 0])
    line = insert.call(aten.unsqueeze.default, data, 0 if place > 0 else 1)
    return _kept(insert, line, torch.diag(torch.ones(shape[0]), place))


def _kept(insert: Insertion, data: Node, ones: Tensor) -> Node:
    """What is multiplied by ones, and zeros else; 0 times infinity is no number."""
    if is_finite(insert, data):
        return insert.call(aten.mul.Tensor, data, insert.constant("ones", ones))
    zero = insert.constant("zero", torch.zeros(()))
    return insert.call(aten.where.self, insert.constant("kept", ones.bool()), data, zero)


def _differences(insert: Insertion) -> Node | None:
    """Each value less the one before it."""
    node = insert.node
    data = cast(Node, node.args[0])
    shape = shape_of(data)
    order = int(argument(node, 1, "n", 1))
    dim = int(argument(node, 2, "dim", -1)) % len(shape)
    if any(argument(node, i, name) is not None for i, name in ((3, "prepend"), (4, "append"))):
        return None
    if not isinstance(shape[dim], int) or not 0 <= order < shape[dim]:
        return None
    for _ in range(order):
        size = int(shape_of(data)[dim])
        later = insert.slice(data, dim, 1, size)
        data = insert.call(aten.sub.Tensor, later, insert.slice(data, dim, 0, size - 1))
    return data


def _sums_so_far(insert: Insertion) -> Node | None:
    """Sums of what stands before are a linear layer along a dim, whose weights are 0 and 1."""
    node = insert.node
    data = cast(Node, node.args[0])
    shape = shape_of(data)
    if not is_float32(data) or argument(node, 2, "dtype") is not None:
        return None
    if not shape or not is_finite(insert, data):
        return None
    dim, last = int(cast(int, node.args[1])) % len(shape), len(shape) - 1
    if not isinstance(shape[dim], int) or shape[dim] > _MAX_SUMMED:
        return None
    weight = insert.constant("weight", torch.ones(shape[dim], shape[dim]).tril())
    rows = insert.permute(data, [*(d for d in range(len(shape)) if d != dim), dim])
    sums = insert.call(aten.linear.default, rows, weight)
    return insert.permute(sums, [*range(dim), last, *range(dim, last)])


def _product_of_all(insert: Insertion) -> Node | None:
    """A product along a dim is one of its slices, from the first to the last."""
    node = insert.node
    data = cast(Node, node.args[0])
    shape = shape_of(data)
    if not is_float32(data) or argument(node, 3, "dtype") is not None:
        return None
    dim = int(cast(int, node.args[1]))
    count = shape[dim] if shape else 0
    if not isinstance(count, int) or not 0 < count <= _MAX_FACTORS:
        return None
    product = insert.call(aten.select.int, data, dim, 0)
    for i in range(1, count):
        product = insert.call(aten.mul.Tensor, product, insert.call(aten.select.int, data, dim, i))
    keepdim = bool(argument(node, 2, "keepdim", False))
    return insert.call(aten.unsqueeze.default, product, dim) if keepdim else product


def _log_sigmoid(insert: Insertion) -> Node:
    """``log(1 / (1 + exp(-x))) = -softplus(-x)``."""
    opposite = insert.call(aten.neg.default, insert.node.args[0])
    return insert.call(aten.neg.default, insert.call(aten.softplus.default, opposite))


def _finite_already(insert: Insertion) -> Node | None:
    """What cannot be anything but a finite number need not be made one."""
    data = cast(Node, insert.node.args[0])
    return data if is_finite(insert, data) else None


def _spread(insert: Insertion) -> Node | None:
    """A variance is the mean of squares of what the mean leaves; a standard deviation its root."""
    node = insert.node
    data = cast(Node, node.args[0])
    shape = shape_of(data)
    if not is_float32(data):
        return None
    correction: Any
    if node.target in (aten.var.dim, aten.std.dim):
        correction, keepdim = int(argument(node, 2, "unbiased", True)), argument(node, 3, "keepdim")
    else:
        correction, keepdim = node.kwargs.get("correction"), node.kwargs.get("keepdim")
        correction = 1 if correction is None else correction
    dims = reduced_dims(argument(node, 1, "dim"), len(shape))
    sizes = [shape[dim] for dim in dims]
    count = math.prod(sizes) if are_static(sizes) else 0
    if count <= correction:
        return None  # of a dynamic number of values, or no number
    apart = insert.call(aten.sub.Tensor, data, insert.call(aten.mean.dim, data, dims, True))
    squares = insert.call(aten.mul.Tensor, apart, apart)
    spread = insert.call(aten.mean.dim, squares, dims, bool(keepdim))
    if correction:
        spread = insert.call(aten.mul.Tensor, spread, count / (count - correction))
    if node.target in (aten.std.correction, aten.std.dim):
        return insert.call(aten.sqrt.default, spread)
    return spread


ARITHMETIC: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten.absolute.default: renamed(aten.abs.default),
        aten.add.Scalar: renamed(aten.add.Tensor),
        aten.addcdiv.default: _addcdiv,
        aten.addcmul.default: _addcmul,
        aten.arctan.default: renamed(aten.atan.default),
        aten.clip.default: renamed(aten.clamp.default),
        aten.cumsum.default: _sums_so_far,
        aten.diag.default: _diagonal,
        aten.diff.default: _differences,
        aten.div.Scalar: renamed(aten.div.Tensor),
        aten.div.Scalar_mode: _plain_quotient,
        aten.div.Tensor_mode: _plain_quotient,
        aten.divide.Scalar: renamed(aten.div.Tensor),
        aten.divide.Scalar_mode: _plain_quotient,
        aten.divide.Tensor: renamed(aten.div.Tensor),
        aten.divide.Tensor_mode: _plain_quotient,
        aten.fix.default: renamed(aten.trunc.default),
        aten.lerp.Scalar: _lerp,
        aten.lerp.Tensor: _lerp,
        aten.log_sigmoid.default: _log_sigmoid,
        aten.mul.Scalar: renamed(aten.mul.Tensor),
        aten.multiply.Scalar: renamed(aten.mul.Tensor),
        aten.multiply.Tensor: renamed(aten.mul.Tensor),
        aten.nan_to_num.default: _finite_already,
        aten.negative.default: renamed(aten.neg.default),
        aten.prod.dim_int: _product_of_all,
        aten.special_erf.default: renamed(aten.erf.default),
        aten.special_erfc.default: renamed(aten.erfc.default),
        aten.special_exp2.default: renamed(aten.exp2.default),
        aten.special_expit.default: renamed(aten.sigmoid.default),
        aten.special_xlogy.default: renamed(aten.xlogy.Tensor),
        aten.special_expm1.default: renamed(aten.expm1.default),
        aten.special_log1p.default: renamed(aten.log1p.default),
        aten.special_log_softmax.default: renamed(aten.log_softmax.int),
        aten.special_softmax.default: renamed(aten.softmax.int),
        aten.std.correction: _spread,
        aten.std.dim: _spread,
        aten.sub.Scalar: renamed(aten.sub.Tensor),
        aten.subtract.Scalar: renamed(aten.sub.Tensor),
        aten.subtract.Tensor: renamed(aten.sub.Tensor),
        aten.tril.default: _triangle,
        aten.triu.default: _triangle,
        aten.true_divide.Scalar: renamed(aten.div.Tensor),
        aten.true_divide.Tensor: renamed(aten.div.Tensor),
        aten.var.correction: _spread,
        aten.var.dim: _spread,
    }
)
"""By overload."""
