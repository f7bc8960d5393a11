"""Composite ops as the ops they stand for, before annotation.

Attention arrives as one op (``scaled_dot_product_attention``), as ``einsum`` or as products of
matrices in several spellings. Written out, its two products can be quantized like any other, and
what the backend does with each step shows in the plan. Every rewrite computes the same real
numbers; those that change the order of float32 roundings say so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import IN_FLOAT, Insertion, Rewrite, rewrite_calls
from custom_quantizer.ops.rewrites.arithmetic import ARITHMETIC
from custom_quantizer.ops.rewrites.curves import CURVES
from custom_quantizer.ops.rewrites.groups import FOREIGN_GROUPS, GROUPS, sorted_numbers
from custom_quantizer.ops.rewrites.masks import CONDITIONS, MASKED, MASKS, added_mask, attended
from custom_quantizer.ops.rewrites.paddings import PADDINGS
from custom_quantizer.ops.rewrites.products import (
    bilinear,
    einsum,
    product,
    sum_and_product,
    vector_layer,
    written_product,
)
from custom_quantizer.ops.rewrites.recurrent import RECURRENT
from custom_quantizer.ops.rewrites.softmaxes import SOFTMAXES
from custom_quantizer.ops.rewrites.straight_through import ESTIMATORS

__all__ = ["REWRITTEN", "decompose"]

aten = torch.ops.aten


def decompose(model: GraphModule, *, training: bool = False) -> int:
    """Apply all rewrites of this module in place.

    Args:
        model: a captured graph.
        training: parameters change.

    Returns:
        How many calls were rewritten.
    """
    return rewrite_calls(model, {**_REWRITES, **_foreign()}, training=training)


def _foreign() -> dict[Any, Rewrite]:
    """Rewrites of ops of other libraries that are imported."""
    found: dict[Any, Rewrite] = {}
    for name, rewrite in FOREIGN_GROUPS.items():
        space, op = name.split("::")
        packet = getattr(getattr(torch.ops, space), op, None)
        if packet is not None:
            found[packet.default] = rewrite
    return found


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
    dropped = float(argument(node, 4, "dropout_p", 0.0))
    if dropped and not insert.training:
        return None
    if len({len(shape_of(tensor)) for tensor in (query, key, value)}) != 1:
        return None
    if argument(node, 7, "enable_gqa", False):
        key, value = (_for_all_heads(insert, tensor, query) for tensor in (key, value))
    scale = argument(node, 6, "scale")
    sizes: tuple[Any, ...] = (shape_of(query)[-2], shape_of(key)[-2], shape_of(query)[-1])
    rows, columns, width = sizes
    if scale is None:
        if not isinstance(width, int):
            return None
        scale = 1.0 / math.sqrt(width)
    shown: Node | None = None
    if causal:
        if not (isinstance(rows, int) and isinstance(columns, int)):
            return None
        bias = torch.full((rows, columns), MASKED).triu(1)
        mask = insert.constant("causal_mask", bias)
    elif mask is not None:
        mask = added_mask(insert, cast(Node, mask))
        shown = attended(insert, mask)
    scores = product(insert, query, _swap_last(insert, key))
    if scale != 1.0:
        scores = insert.call(aten.mul.Tensor, scores, float(scale))
    if mask is not None:
        scores = insert.call(aten.add.Tensor, scores, mask)
    weights = insert.call(aten.softmax.int, scores, -1)
    if shown is not None:
        weights = insert.call(aten.mul.Tensor, weights, shown)
        weights.meta[IN_FLOAT] = "it makes 0 of rows that attend to nothing"
    if dropped:
        weights = insert.call(aten.dropout.default, weights, dropped, True)
    return product(insert, weights, value)


def _for_all_heads(insert: Insertion, tensor: Node, query: Node) -> Node:
    """Keys or values of heads that share them, in groups (``enable_gqa``)."""
    group = shape_of(query)[-3] // shape_of(tensor)[-3]
    return insert.call(aten.repeat_interleave.self_int, tensor, group, -3) if group > 1 else tensor


def _swap_last(insert: Insertion, tensor: Node) -> Node:
    rank = len(shape_of(tensor))
    return insert.call(aten.transpose.int, tensor, rank - 2, rank - 1)


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


def _vector_norm(insert: Insertion) -> Node | None:
    """Euclidean norms by one name; sums of absolute values, and the largest of them."""
    node, data = insert.node, cast(Node, insert.node.args[0])
    power: Any = argument(node, 1, "p", argument(node, 1, "ord", 2))
    given: Any = argument(node, 2, "dim")
    dims = given if given or given == 0 else list(range(len(shape_of(data))))
    keep = bool(argument(node, 3, "keepdim", False))
    if argument(node, 4, "dtype") is not None:
        return None
    norm = _norm(insert, data, power, dims, keep=keep)
    return None if norm.target is node.target else norm


def _norm(insert: Insertion, data: Node, power: Any, dims: Any, *, keep: bool = False) -> Node:
    if power in (1, math.inf):
        target = aten.sum.dim_IntList if power == 1 else aten.amax.default
        return insert.call(target, insert.call(aten.abs.default, data), dims, keep)
    power = 2 if power is None else power
    return insert.call(aten.linalg_vector_norm.default, data, power, dims, keep)


def _distance(insert: Insertion) -> Node:
    """``dist``: a norm of the difference."""
    left, right = insert.node.args[:2]
    difference = insert.call(aten.sub.Tensor, left, right)
    dims = list(range(len(shape_of(difference))))
    return _norm(insert, difference, argument(insert.node, 2, "p", 2), dims)


def _distances(insert: Insertion) -> Node | None:
    """Of each row of one matrix to each of another: norms of differences, if they are few."""
    node = insert.node
    left, right = (cast(Node, arg) for arg in node.args[:2])
    sizes = [*shape_of(node), shape_of(left)[-1]]
    if math.prod(s for s in sizes if isinstance(s, int)) > _MOST:
        return None
    rows = insert.call(aten.unsqueeze.default, left, -2)
    columns = insert.call(aten.unsqueeze.default, right, -3)
    difference = insert.call(aten.sub.Tensor, rows, columns)
    return _norm(insert, difference, argument(node, 2, "p", 2), [-1])


_MOST = 2**20
"""Differences that are computed one by one, 4 MB."""


def _outer_sum(insert: Insertion) -> Node | None:
    """``addr``: a product of a column and a row, and a sum."""
    node = insert.node
    added, left, right = (cast(Node, arg) for arg in node.args[:3])
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    column, row = (insert.call(aten.unsqueeze.default, *each) for each in ((left, 1), (right, 0)))
    return insert.call(aten.add.Tensor, insert.call(aten.mul.Tensor, column, row), added)


def _expand_as(insert: Insertion) -> Node | None:
    """A dim that keeps its size need not be known."""
    source = cast(Node, insert.node.args[0])
    shape: tuple[Any, ...] = shape_of(insert.node)
    before = (None,) * (len(shape) - len(shape_of(source))) + tuple(shape_of(source))
    sizes = [
        size if old is None or isinstance(size, int) or not is_same_shape((old,), (size,)) else -1
        for old, size in zip(before, shape, strict=True)
    ]
    if not are_static(sizes):
        return None
    return insert.call(aten.expand.default, source, sizes)


def _clamp(insert: Insertion) -> Node | None:
    """Bounds the wrong way round leave the upper one everywhere."""
    low, high = (argument(insert.node, i, name) for i, name in ((1, "min"), (2, "max")))
    if low is None or high is None or not low > high:
        return None
    return insert.call(aten.clamp.default, insert.node.args[0], high, high)


def _bounded(targets: tuple[Any, ...]) -> Rewrite:
    """Bounds that are tensors: numbers, where they are constant, else maxima and minima."""

    def form(insert: Insertion) -> Node | None:
        result: Any = insert.node.args[0]
        for position, target in enumerate(targets, 1):
            bound: Any = argument(insert.node, position, "max" if target in _UPPER else "min")
            if bound is None:
                continue
            clamped = _clamped(insert, target, result, bound)
            result = insert.call(target, result, bound) if clamped is None else clamped
        return cast(Node, result)

    return form


def _clamped(insert: Insertion, target: Any, data: Node, bound: Node) -> Node | None:
    """A maximum or minimum with a number, which is the same in all calls."""
    number = insert.number_beside(bound, data) if bound.op == "get_attr" else None
    if number is None or not math.isfinite(number):
        return None
    limits = (None, number) if target in _UPPER else (number,)
    return insert.call(aten.clamp.default, data, *limits)


def _extreme(target: Any) -> Rewrite:
    """By either of its names; with a number it is a clamp."""

    def form(insert: Insertion) -> Node | None:
        left, right = (cast(Node, arg) for arg in insert.node.args[:2])
        for data, bound in ((left, right), (right, left)):
            clamped = _clamped(insert, target, data, bound)
            if clamped is not None:
                return clamped
        return None if insert.node.target is target else insert.call(target, left, right)

    return form


_UPPER = (aten.minimum.default,)


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
    """Bags are rows of a table, and sums, means or maxima of those of each bag.

    ``nn.EmbeddingBag`` of a matrix of indices has bags of one size; offsets of others have to be
    constant. The row of an index that only pads becomes zero, and does not count in a mean.
    """
    node = insert.node
    source, index = cast(Node, node.args[0]), node.args[1]
    if not isinstance(source, Node) or source.target not in _BAGS or index != 0:
        return None
    table, indices, offsets = (cast(Node, arg) for arg in source.args[:3])
    mode, weights = int(argument(source, 4, "mode", 0)), argument(source, 6, "per_sample_weights")
    padding = argument(source, 8, "padding_idx")
    ends_last = bool(argument(source, 7, "include_last_offset", False))
    bags = _Bags.of(insert, indices, offsets, ends_last)
    if bags is None or (weights is not None and mode != 0) or (padding is not None and mode == 2):
        return None
    rows = bags.lines(indices)
    if padding is not None:
        kept = torch.ones(shape_of(table)[0], 1)
        kept[int(padding)] = 0.0
        ones = insert.constant("kept", kept)
        table = insert.settled(insert.call(aten.mul.Tensor, table, ones), "table")
    vectors = insert.call(aten.embedding.default, table, rows)
    if weights is not None:
        factors = insert.call(aten.unsqueeze.default, bags.lines(weights), -1)
        vectors = insert.call(aten.mul.Tensor, vectors, factors)
    if mode == 2:
        return bags.maxima(vectors)
    if mode == 0 or padding is None:
        return bags.sums(vectors, mean=mode == 1)
    counts = bags.sums(insert.call(aten.embedding.default, ones, rows))
    counts = insert.call(aten.clamp.default, counts, 1.0)
    return insert.call(aten.div.Tensor, bags.sums(vectors), counts)


@dataclass(frozen=True)
class _Bags:
    """Where bags begin and end among the indices.

    Attributes:
        insert: at the result.
        size: of all bags, if they have one and are all there is.
        bounds: of each bag, else.
    """

    insert: Insertion
    size: int | None
    bounds: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, insert: Insertion, indices: Node, offsets: Node, ends_last: bool) -> _Bags | None:
        """What offsets say; ``None``: only the inputs tell."""
        if offsets.target is aten.arange.start_step:
            start, step = offsets.args[0], offsets.args[2]
            known = start == 0 and isinstance(step, int) and step > 0 and not ends_last
            return cls(insert, cast(int, step)) if known else None
        (count,) = cast("tuple[Any]", shape_of(indices))
        if not is_constant(offsets) or not isinstance(count, int):
            return None
        begin: list[int] = constant_of(insert.model, offsets).tolist()
        bounds = list(pairwise(begin if ends_last else [*begin, count]))
        sizes = {stop - start for start, stop in bounds}
        if len(sizes) == 1 and bounds[-1][1] == count and 0 not in sizes:
            return cls(insert, sizes.pop())
        return cls(insert, None, bounds) if bounds and max(begin) <= count else None

    def lines(self, values: Node) -> Node:
        """Values of the indices, with a line for each bag if all have one size."""
        if self.size is None:
            return values
        return self.insert.call(aten.reshape.default, values, [-1, self.size])

    def sums(self, vectors: Node, *, mean: bool = False) -> Node:
        """Sums or means of each bag; zeros of an empty one."""
        insert = self.insert
        if self.size is not None:
            target = aten.mean.dim if mean else aten.sum.dim_IntList
            return insert.call(target, vectors, [1])
        matrix = torch.zeros(len(self.bounds), shape_of(vectors)[0])
        for row, (start, stop) in zip(matrix, self.bounds, strict=True):
            row[start:stop] = 1.0 / (stop - start) if mean and stop > start else 1.0
        columns = insert.call(aten.t.default, vectors)
        columns = insert.call(aten.linear.default, columns, insert.constant("bags", matrix))
        return insert.call(aten.t.default, columns)

    def maxima(self, vectors: Node) -> Node | None:
        """Of each bag, none of which may be empty."""
        insert = self.insert
        if self.size is not None:
            return insert.call(aten.amax.default, vectors, [1])
        if any(start == stop for start, stop in self.bounds):
            return None
        pieces = [insert.slice(vectors, 0, start, stop) for start, stop in self.bounds]
        return insert.call(
            aten.cat.default, [insert.call(aten.amax.default, p, [0], True) for p in pieces]
        )


_BAGS = frozenset({aten.embedding_bag.default, aten.embedding_bag.padding_idx})


def _dropout(insert: Insertion) -> Node | None:
    """In evaluation every dropout is the same op; in training they are not."""
    if insert.training or argument(insert.node, 2, "train", False):
        return None
    return insert.call(aten.dropout.default, *insert.node.args, **insert.node.kwargs)


def _stored_statistics(insert: Insertion) -> Node | None:
    """With stored statistics an instance norm is a batch norm; in training it is none."""
    node = insert.node
    if insert.training or argument(node, 5, "use_input_stats", True):
        return None
    return insert.call(aten.batch_norm.default, *node.args, **node.kwargs)


def _cross(insert: Insertion) -> Node | None:
    """Vectors of three, of which each number is a difference of products of the other two."""
    left, right = (cast(Node, arg) for arg in insert.node.args[:2])
    dim = argument(insert.node, 2, "dim", -1)

    def product(shift: int, other: int) -> Node:
        factors = (
            insert.call(aten.roll.default, vectors, [by], [dim])
            for vectors, by in ((left, shift), (right, other))
        )
        return insert.call(aten.mul.Tensor, *factors)

    return insert.call(aten.sub.Tensor, product(-1, -2), product(-2, -1))


def _glu(insert: Insertion) -> Node | None:
    """One half of a tensor, gated by the sigmoid of the other."""
    data, dim = cast(Node, insert.node.args[0]), argument(insert.node, 1, "dim", -1)
    shape: tuple[Any, ...] = shape_of(data)
    if not isinstance(shape[dim], int):
        return None
    half, dim = shape[dim] // 2, dim % len(shape)
    value, gate = insert.slice(data, dim, 0, half), insert.slice(data, dim, half, 2 * half)
    return insert.call(aten.mul.Tensor, value, insert.call(aten.sigmoid.default, gate))


def _conversion(insert: Insertion) -> Node | None:
    """A conversion is one to a dtype, or nothing: all tensors are on one device, in one layout.

    Of floats, nothing is an op that says so, which rules may name.
    """
    node, source = insert.node, cast(Node, insert.node.args[0])
    meta, before = tensor_meta(node), tensor_meta(source)
    if meta is None or before is None or meta.device != before.device or source.op == "placeholder":
        return None
    if meta.dtype != before.dtype or is_float32(node):
        same = node.target is aten.to.dtype
        return None if same else insert.call(aten.to.dtype, source, meta.dtype)
    return source


def _merged(*tables: Mapping[Any, Rewrite]) -> dict[Any, Rewrite]:
    """The rewrites of all tables; of an op that several have, the first that makes something."""
    found: dict[Any, list[Rewrite]] = {}
    for table in tables:
        for target, rewrite in table.items():
            found.setdefault(target, []).append(rewrite)
    return {target: _first(*rewrites) for target, rewrites in found.items()}


def _first(*rewrites: Rewrite) -> Rewrite:
    if len(rewrites) == 1:
        return rewrites[0]

    def rewrite(insert: Insertion) -> Node | None:
        made = (form(insert) for form in rewrites)
        return next((result for result in made if result is not None), None)

    return rewrite


_EXTREMES: dict[Any, Rewrite] = {
    aten.clamp.default: _clamp,
    aten.max.other: _extreme(aten.maximum.default),
    aten.maximum.default: _extreme(aten.maximum.default),
    aten.min.other: _extreme(aten.minimum.default),
    aten.minimum.default: _extreme(aten.minimum.default),
}

_REWRITES: dict[Any, Rewrite] = {
    **_merged(
        *(ESTIMATORS, SOFTMAXES, CURVES, ARITHMETIC, GROUPS, CONDITIONS, MASKS, PADDINGS),
        RECURRENT,
        _EXTREMES,
    ),
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: einsum,
    aten.linear.default: vector_layer,
    aten.matmul.default: written_product,
    aten.mm.default: written_product,
    aten.bmm.default: written_product,
    aten.mv.default: written_product,
    aten.dot.default: written_product,
    aten.addmm.default: sum_and_product,
    aten.baddbmm.default: sum_and_product,
    aten.addmv.default: sum_and_product,
    aten.bilinear.default: bilinear,
    aten.addr.default: _outer_sum,
    aten.cdist.default: _distances,
    aten.dist.default: _distance,
    aten.linalg_cross.default: _cross,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.norm.Scalar: _vector_norm,
    aten.norm.ScalarOpt_dim: _vector_norm,
    aten.swapaxes.default: _swap,
    aten.swapdims.default: _swap,
    aten.mT.default: _matrix_transpose,
    aten.mH.default: _matrix_transpose,
    aten.adjoint.default: _matrix_transpose,
    aten.matrix_H.default: _matrix_transpose,
    aten.numpy_T.default: _reversed_dims,
    aten.expand_as.default: _expand_as,
    aten.clamp.Tensor: _bounded((aten.maximum.default, aten.minimum.default)),
    aten.clamp_max.Tensor: _bounded((aten.minimum.default,)),
    aten.clamp_min.Tensor: _bounded((aten.maximum.default,)),
    aten.rrelu.default: _rrelu,
    aten.instance_norm.default: _stored_statistics,
    aten.alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
    aten.glu.default: _glu,
    **dict.fromkeys(
        (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default),
        _conversion,
    ),
    operator.getitem: _first(_sorted, sorted_numbers, _embedding_bag),
}

REWRITTEN = frozenset(_REWRITES)
"""Ops that may be replaced; what replaces them answers to rules for them."""
