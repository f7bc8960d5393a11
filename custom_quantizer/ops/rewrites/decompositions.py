"""Composite ops as the ops they stand for, before annotation.

Attention arrives as one op (``scaled_dot_product_attention``), as ``einsum`` or as products of
matrices in several spellings. Written out, its two products can be quantized like any other, and
what the backend does with each step shows in the plan. Every rewrite computes the same real
numbers; those that change the order of float32 roundings say so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    argument,
    constant_of,
    is_constant,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import Insertion, Rewrite, rewrite_calls

__all__ = ["REWRITTEN", "decompose"]

aten = torch.ops.aten

MASKED = -1e9
"""Added to scores that a mask leaves out, in place of minus infinity.

``exp`` of it is 0 in float32, as that of minus infinity is, but ``-inf - (-inf)`` is no number: the
softmax kernels subtract the largest score first. A row that is masked out completely
becomes uniform instead of NaN.
"""


def decompose(model: GraphModule) -> int:
    """Apply all rewrites of this module in place; returns how many calls were rewritten."""
    return rewrite_calls(model, _REWRITES)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def _attention(insert: Insertion) -> Node | None:
    """``softmax(q @ k^T * scale + mask) @ v``.

    PyTorch's own kernels scale ``q`` and ``k`` by the root of the scale each, or sum in tiles: last
    bits of float32 differ.
    """
    node = insert.node
    query, key, value = (cast(Node, arg) for arg in node.args[:3])
    mask = argument(node, 3, "attn_mask")
    causal = bool(argument(node, 5, "is_causal", False))
    if argument(node, 4, "dropout_p", 0.0) or argument(node, 7, "enable_gqa", False):
        return None
    if len({len(shape_of(tensor)) for tensor in (query, key, value)}) != 1:
        return None
    scale = argument(node, 6, "scale")
    sizes: tuple[Any, ...] = (shape_of(query)[-2], shape_of(key)[-2], shape_of(query)[-1])
    rows, columns, width = sizes
    if scale is None:
        if not isinstance(width, int):
            return None
        scale = 1.0 / math.sqrt(width)
    if causal:
        if not (isinstance(rows, int) and isinstance(columns, int)):
            return None
        bias = torch.full((rows, columns), MASKED).triu(1)
        mask = insert.constant("causal_mask", bias)
    elif mask is not None:
        mask = _additive(insert, cast(Node, mask))
    scores = insert.call(aten.matmul.default, query, _swap_last(insert, key))
    if scale != 1.0:
        scores = insert.call(aten.mul.Tensor, scores, float(scale))
    if mask is not None:
        scores = insert.call(aten.add.Tensor, scores, mask)
    weights = insert.call(aten.softmax.int, scores, -1)
    return insert.call(aten.matmul.default, weights, value)


def _swap_last(insert: Insertion, tensor: Node) -> Node:
    rank = len(shape_of(tensor))
    return insert.call(aten.transpose.int, tensor, rank - 2, rank - 1)


def _additive(insert: Insertion, mask: Node) -> Node:
    """A mask as numbers to add; minus infinity becomes :data:`MASKED`."""
    meta = cast(Tensor, tensor_meta(mask))
    if is_constant(mask):
        value = constant_of(insert.model, mask)
        if value.dtype == torch.bool:
            value = torch.zeros(value.shape).masked_fill(~value, MASKED)
        elif bool(torch.isfinite(value).all()):
            return mask
        return insert.constant("mask", value.clamp(min=MASKED))
    if meta.dtype == torch.bool:
        left_out = insert.call(aten.logical_not.default, mask)
        zeros = insert.call(aten.zeros_like.default, mask, dtype=torch.float32)
        return insert.call(aten.masked_fill.Scalar, zeros, left_out, MASKED)
    return insert.call(aten.clamp_min.default, mask, MASKED)


def _softmax(insert: Insertion) -> Node | None:
    """Constant minus infinity before a softmax becomes :data:`MASKED`: see there."""
    added = insert.node.args[0]
    if not isinstance(added, Node) or added.target is not aten.add.Tensor:
        return None
    for position, term in enumerate(added.args[:2]):
        if isinstance(term, Node) and is_constant(term):
            value = constant_of(insert.model, term)
            if value.is_floating_point() and bool((value == -math.inf).any()):
                finite = Insertion(insert.model, added).constant("mask", value.clamp(min=MASKED))
                added.update_arg(position, finite)
    return None


# ---------------------------------------------------------------------------------------------
# Products of matrices
# ---------------------------------------------------------------------------------------------


def _einsum(insert: Insertion) -> Node | None:
    """A contraction of two tensors: permute, reshape, one batched product, and back.

    It is how PyTorch computes it. Operands with a repeated index, or with one that stands nowhere
    else, are left alone.
    """
    equation, operands = insert.node.args[:2]
    plan = _contraction(str(equation), len(cast("Sequence[Node]", operands)))
    if plan is None:
        return None
    left, right = cast("Sequence[Node]", operands)
    (left_labels, right_labels), output, batch, summed, rows, columns = plan
    sizes = dict(zip(left_labels, shape_of(left), strict=True))
    sizes.update(zip(right_labels, shape_of(right), strict=True))
    if not all(isinstance(size, int) for size in sizes.values()):
        return None

    def matrix(tensor: Node, labels: str, groups: tuple[str, ...]) -> Node:
        order = [labels.index(label) for group in groups for label in group]
        if order != sorted(order):
            tensor = insert.call(aten.permute.default, tensor, order)
        last = [math.prod(sizes[label] for label in group) for group in groups[1:]]
        shape = [sizes[label] for label in groups[0]] + last
        if list(shape_of(tensor)) != shape:
            tensor = insert.call(aten.reshape.default, tensor, shape)
        return tensor

    a = matrix(left, left_labels, (batch, rows, summed))
    b = matrix(right, right_labels, (batch, summed, columns))
    product = insert.call(aten.matmul.default, a, b)
    labels = batch + rows + columns
    shape = [sizes[label] for label in labels]
    if list(shape_of(product)) != shape:
        product = insert.call(aten.reshape.default, product, shape)
    order = [labels.index(label) for label in output]
    return product if order == sorted(order) else insert.call(aten.permute.default, product, order)


def _contraction(
    equation: str, count: int
) -> tuple[tuple[str, str], str, str, str, str, str] | None:
    """``(inputs, output, batch, summed, rows, columns)`` of an equation of two operands."""
    equation = equation.replace(" ", "")
    if count != 2 or "..." in equation:
        return None
    inputs, arrow, output = equation.partition("->")
    left, _, right = inputs.partition(",")
    if not arrow:
        both = left + right
        output = "".join(sorted(label for label in set(both) if both.count(label) == 1))
    if any(len(set(part)) != len(part) for part in (left, right, output)):
        return None
    batch = "".join(label for label in output if label in left and label in right)
    summed = "".join(label for label in left if label in right and label not in output)
    rows = "".join(label for label in left if label not in right)
    columns = "".join(label for label in right if label not in left)
    if not set(rows + columns) <= set(output) or not summed:
        return None
    return (left, right), output, batch, summed, rows, columns


def _product(insert: Insertion) -> Node | None:
    """A product with a constant matrix is a linear layer; the rest are spelled ``matmul``."""
    left, right = (cast(Node, arg) for arg in insert.node.args[:2])
    if is_constant(right) and len(shape_of(right)) == 2 and not is_constant(left):
        weight = insert.constant("weight", constant_of(insert.model, right).t().contiguous())
        return insert.call(aten.linear.default, left, weight)
    if insert.node.target is aten.matmul.default:
        return None
    return insert.call(aten.matmul.default, left, right)


def _sum_and_product(insert: Insertion) -> Node | None:
    """``addmm`` and ``baddbmm``: a product, and a sum. Roundings differ in the last bit."""
    node = insert.node
    added, left, right = (cast(Node, arg) for arg in node.args[:3])
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    if is_constant(right) and len(shape_of(right)) == 2:
        weight = insert.constant("weight", constant_of(insert.model, right).t().contiguous())
        if is_constant(added) and len(shape_of(added)) == 1:
            return insert.call(aten.linear.default, left, weight, added)
        return insert.call(aten.add.Tensor, insert.call(aten.linear.default, left, weight), added)
    product = insert.call(aten.matmul.default, left, right)
    return insert.call(aten.add.Tensor, product, added)


# ---------------------------------------------------------------------------------------------
# Other names for the same op
# ---------------------------------------------------------------------------------------------


def _swap(insert: Insertion) -> Node | None:
    return insert.call(aten.transpose.int, *insert.node.args[:3])


def _matrix_transpose(insert: Insertion) -> Node | None:
    data = cast(Node, insert.node.args[0])
    meta = tensor_meta(data)
    return None if meta is None or meta.is_complex() else _swap_last(insert, data)


def _reversed_dims(insert: Insertion) -> Node | None:
    data = cast(Node, insert.node.args[0])
    return insert.permute(data, list(range(len(shape_of(data))))[::-1])


def _expand_as(insert: Insertion) -> Node | None:
    shape = shape_of(insert.node)
    if not all(isinstance(size, int) for size in shape):
        return None
    return insert.call(aten.expand.default, insert.node.args[0], list(shape))


def _pad(insert: Insertion) -> Node | None:
    """A pad by nothing is its input; a constant pad by less than nothing is a slice."""
    node = insert.node
    data, pads = cast(Node, node.args[0]), list(cast("Sequence[int]", node.args[1]))
    if not any(pads):
        return data
    mode = argument(node, 2, "mode", "constant") if node.target is aten.pad.default else "constant"
    if mode != "constant" or all(p >= 0 for p in pads):
        return None
    rank = len(shape_of(data))
    for position in range(0, len(pads), 2):
        before, after = (min(p, 0) for p in pads[position : position + 2])
        if before or after:
            dim = rank - 1 - position // 2
            stop = after if after else _TO_THE_END
            data = insert.call(aten.slice.Tensor, data, dim, -before, stop)
    kept = [max(p, 0) for p in pads]
    if not any(kept):
        return data
    value = argument(node, 3 if node.target is aten.pad.default else 2, "value")
    return insert.call(aten.constant_pad_nd.default, data, kept, 0.0 if value is None else value)


_TO_THE_END = (1 << 63) - 1


def _clamp(insert: Insertion) -> Node | None:
    """Bounds the wrong way round leave the upper one everywhere."""
    low, high = (argument(insert.node, i, name) for i, name in ((1, "min"), (2, "max")))
    if low is None or high is None or not low > high:
        return None
    return insert.call(aten.clamp.default, insert.node.args[0], high, high)


# ---------------------------------------------------------------------------------------------
# Ops that the runtime has under another name only
# ---------------------------------------------------------------------------------------------


def _rrelu(insert: Insertion) -> Node | None:
    """In evaluation the slope is the middle of the range it is drawn from in training."""
    node = insert.node
    if argument(node, 3, "training", False):
        return None
    lower, upper = argument(node, 1, "lower", 0.125), argument(node, 2, "upper", 1 / 3)
    return insert.call(aten.leaky_relu.default, node.args[0], (lower + upper) / 2)


def _sorted(insert: Insertion) -> Node | None:
    """Sorted values are the largest, or smallest, of all; where they came from is left alone.

    Equal values have no order, which two kernels choose differently.
    """
    node = insert.node
    source, index = cast(Node, node.args[0]), node.args[1]
    if not isinstance(source, Node) or source.target not in _SORTS or index != 0:
        return None
    if any(other.users for other in source.users if other is not node):
        return None
    data = cast(Node, source.args[0])
    start = 1 if source.target is aten.sort.default else 2  # "stable" comes before
    given = argument(source, start, "dim", -1)
    shape: tuple[Any, ...] = shape_of(data)
    meta = tensor_meta(data)
    if (
        not shape
        or not isinstance(shape[given], int)
        or meta is None
        or not meta.is_floating_point()
    ):
        return None
    descending = bool(argument(source, start + 1, "descending", False))
    best = insert.call(aten.topk.default, data, shape[given], given, descending, True)
    return insert.call(operator.getitem, best, 0)


_SORTS = frozenset({aten.sort.default, aten.sort.stable})


def _embedding_bag(insert: Insertion) -> Node | None:
    """Bags of one size are rows of a matrix: an embedding, and a sum, a mean or a maximum over it.

    ``nn.EmbeddingBag`` of a matrix of indices is that; offsets that are an input may be anything.
    """
    node = insert.node
    source, index = cast(Node, node.args[0]), node.args[1]
    if not isinstance(source, Node) or source.target not in _BAGS or index != 0:
        return None
    table, indices, offsets = (cast(Node, arg) for arg in source.args[:3])
    mode, weights = int(argument(source, 4, "mode", 0)), argument(source, 6, "per_sample_weights")
    padded = argument(source, 8, "padding_idx", -1)
    size = _bag_size(insert.model, indices, offsets)
    if size is None or padded not in (None, -1) or argument(source, 7, "include_last_offset"):
        return None
    if weights is not None and mode != 0:
        return None
    rows = insert.call(aten.reshape.default, indices, [-1, size])
    vectors = insert.call(aten.embedding.default, table, rows)
    if weights is not None:
        factors = insert.call(aten.reshape.default, weights, [-1, size, 1])
        vectors = insert.call(aten.mul.Tensor, vectors, factors)
    if mode == 2:
        return insert.call(aten.amax.default, vectors, [1])
    reduce = aten.sum.dim_IntList if mode == 0 else aten.mean.dim
    return insert.call(reduce, vectors, [1])


def _bag_size(model: GraphModule, indices: Node, offsets: Node) -> int | None:
    """How many indices each bag has, if that is the same for all: bags begin at multiples of it."""
    if offsets.target is aten.arange.start_step:
        start, step = offsets.args[0], offsets.args[2]
        return step if start == 0 and isinstance(step, int) and step > 0 else None
    (count,) = cast("tuple[Any]", shape_of(indices))
    if not is_constant(offsets) or not isinstance(count, int):
        return None
    begin = constant_of(model, offsets)
    size = count // max(len(begin), 1)
    even = torch.equal(begin, torch.arange(len(begin), dtype=begin.dtype) * size)
    return size if size > 0 and size * len(begin) == count and even else None


_BAGS = frozenset({aten.embedding_bag.default, aten.embedding_bag.padding_idx})


def _result(insert: Insertion) -> Node | None:
    """One of several results of an op."""
    found = _sorted(insert)
    return _embedding_bag(insert) if found is None else found


_REWRITES: dict[Any, Rewrite] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.softmax.int: _softmax,
    aten.einsum.default: _einsum,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _sum_and_product,
    aten.baddbmm.default: _sum_and_product,
    aten.swapaxes.default: _swap,
    aten.swapdims.default: _swap,
    aten.mT.default: _matrix_transpose,
    aten.mH.default: _matrix_transpose,
    aten.adjoint.default: _matrix_transpose,
    aten.matrix_H.default: _matrix_transpose,
    aten.numpy_T.default: _reversed_dims,
    aten.expand_as.default: _expand_as,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.clamp.default: _clamp,
    aten.rrelu.default: _rrelu,
    operator.getitem: _result,
}

REWRITTEN = frozenset(_REWRITES)
"""Ops that may be replaced; what replaces them answers to rules for them."""
