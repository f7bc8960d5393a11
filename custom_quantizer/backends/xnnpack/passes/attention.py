"""Products of activations, softmax and embeddings in the form the backend takes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK
from custom_quantizer.backends.xnnpack.kernels import can_be_batched, matmul_batch
from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    Mark,
    calls,
    graph_pass,
    is_wide,
    replace,
    viewed,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    are_static,
    constant_of,
    dynamic_sizes,
    effective_users,
    has_zero_points,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    qparams_of,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops import match_of
from custom_quantizer.ops.attention import (
    MATMUL,
    SOFTMAX,
    softmax_dim,
)
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, SUB
from custom_quantizer.ops.embedding import EMBEDDING
from custom_quantizer.ops.functions import DIV
from custom_quantizer.ops.movement import (
    CAT,
    EXPAND,
    PERMUTE,
    RESHAPE,
    SELECT,
    SLICE,
    SPLIT,
    slice_of,
)
from custom_quantizer.ops.normalization import LAYER_NORM, RMS_NORM

aten = torch.ops.aten


@graph_pass("products of two activations", "bmm, of one batch; marked where that cannot be")
def matmuls_to_bmms(model: GraphModule) -> int:
    """Products over several batch dimensions are products over one: views before and after.

    A view has at most one dynamic size. Where it would have two, the product is marked and stays
    whole (:class:`~custom_quantizer.backends.xnnpack.visitors.WholeProductVisitor`), which is right
    if the delegate keeps both factors in the order of the model.
    """
    count = 0
    for node in calls(model, MATMUL.targets):
        batch = matmul_batch(node)
        left, right = cast(Node, node.args[0]), cast(Node, node.args[1])
        if batch is None:
            continue
        if not can_be_batched(node):
            in_order = all(_keeps_order(factor, _MOVED_ROWS) for factor in (left, right))
            if in_order and not Mark.WHOLE.on(node):
                Mark.WHOLE.put(node)
                count += 1
            continue
        build = Builder(model, node)
        count += 1
        if len(batch) == 1:
            replace(node, build.call(aten.bmm.default, left, right))
            continue
        dynamic = not are_static(batch)
        size = -1 if dynamic else math.prod(batch)
        shapes = [view_sizes([size, *shape_of(arg)[-2:]]) for arg in (left, right)]
        operands = [viewed(build, *pair) for pair in zip((left, right), shapes, strict=True)]
        product = build.call(aten.bmm.default, *operands)
        users = effective_users(node)
        if len(users) == 1 and is_quantize(users[0]):
            product = build.requantized(product, users[0])
        replace(node, build.call(aten.view_copy.default, product, view_sizes(shape_of(node))))
    return count


@graph_pass(
    "softmax over another dim",
    "permuted softmax over the last: other roundings in float",
    exact=False,
)
def softmaxes_over_last_dim(model: GraphModule) -> int:
    """Another dimension is moved to the end first, and back afterwards."""
    count = 0
    for node in calls(model, SOFTMAX.targets):
        source = cast(Node, node.args[0])
        dim, rank = softmax_dim(node), len(shape_of(node))
        if dim == rank - 1:
            continue
        build = Builder(model, node)
        order = list(range(rank))
        order[dim], order[-1] = order[-1], order[dim]
        moved = build.call(aten.permute.default, source, order)
        softmax = build.call(aten.softmax.int, moved, -1)
        replace(node, build.call(aten.permute.default, softmax, order))
        count += 1
    return count


_VIEWS = frozenset({aten.view_copy.default, aten.linear.default, *RESHAPE.targets})
_ELEMENTWISE = (
    ADD.targets | SUB.targets | MUL.targets | DIV.targets | CLAMP.targets | PERMUTE.targets
)


_MOVED_ROWS = (
    (SOFTMAX.targets | SELECT.targets | SPLIT.targets | CAT.targets | EXPAND.targets)
    | LAYER_NORM.targets
    | RMS_NORM.targets
    | {operator.getitem}
)
"""What products of rows are often made of, besides."""


def _keeps_order(source: Node, others: frozenset[Any] = frozenset()) -> bool:
    """Whether no op before ``source`` makes the delegate keep it channels last.

    Scores of attention are such tensors: products, scaled and masked.

    Args:
        source: a tensor of four dims.
        others: ops that keep the order of what they read.
    """
    waiting: list[Node] = [source]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        meta = tensor_meta(node)
        if node in seen or node.op != "call_function" or node.target in _VIEWS:
            continue
        if meta is not None and meta.dim() < 4:
            continue
        if others and _reads_others(node):
            continue  # no delegate computes that
        keeps = node.target in _ELEMENTWISE | others or Mark.WHOLE.on(node)
        dense = node.target in SLICE.targets and slice_of(node)[3] == 1 and bool(others)
        if not (is_quantize(node) or is_dequantize(node) or keeps or dense):
            return False
        seen.add(node)
        waiting += node.all_input_nodes
    return True


def _reads_others(node: Node) -> bool:
    """Whether a call makes floats of another kind of numbers: of a mask, or rows of a table."""
    metas = [tensor_meta(source) for source in node.all_input_nodes]
    other = any(meta is not None and not meta.is_floating_point() for meta in metas)
    return other and not (is_quantize(node) or is_dequantize(node))


@graph_pass(
    "softmax of images",
    "softmax of rows, between views",
    requires={"softmaxes_over_last_dim"},
)
def softmaxes_of_rows(model: GraphModule) -> int:
    """A softmax of an image becomes one of rows.

    The delegate keeps images channels last, behind convolutions for instance, and XNNPACK's softmax
    runs over the last dimension in memory: there it would be the channels. ExecuTorch (1.5.1) knows
    that of other ops, not of softmax. A view always gets its input in the order of the model.
    """
    count = 0
    for node in calls(model, SOFTMAX.targets):
        shape = shape_of(node)
        dynamic = dynamic_sizes(shape)
        if dynamic > 1 or softmax_dim(node) != len(shape) - 1:
            continue
        if len(shape) != 4 or _keeps_order(cast(Node, node.args[0])):
            continue
        build = Builder(model, node)
        last = shape[-1] if isinstance(shape[-1], int) else -1
        rows = -1 if dynamic and last != -1 else math.prod(shape[:-1])
        source = viewed(build, cast(Node, node.args[0]), [rows, last])
        result = build.call(aten.softmax.int, source, -1)
        users = effective_users(node)
        if len(users) == 1 and is_quantize(users[0]):
            result = build.requantized(result, users[0])
        replace(node, build.call(aten.view_copy.default, result, view_sizes(shape)))
        count += 1
    return count


@graph_pass("weights and tables with zero points", "the floats that they stand for")
def constants_of_others(model: GraphModule) -> int:
    """Weights that have zero points, and tables that are no int8 without them, are floats.

    Another quantizer made them (affine weights, torchao's ``EmbeddingQuantizer``): no kernel takes
    them, and partitioning would drop the zero points of a weight silently. Where the rows of a
    table are quantized next, it is stored as those integers.
    """
    count = 0
    for node in list(model.graph.nodes):
        if not is_dequantize(node) or not is_static(node) or not is_constant(node.args[0]):
            continue
        if not (has_zero_points(model, node) or any(_cannot_read(model, node))):
            continue
        arguments = [
            constant_of(model, value) if isinstance(value, Node) else value for value in node.args
        ]
        values = cast("Callable[..., Tensor]", node.target)(*arguments, **node.kwargs)
        stored = cast(Node, node.args[0])
        reals = add_constant(model, f"{stored.target}_reals", values, node, stored)
        node.replace_all_uses_with(reals)
        model.graph.erase_node(node)
        count += 1
    return count


def _cannot_read(model: GraphModule, dequantize: Node) -> Iterator[bool]:
    """For each reader of a dequantized constant, whether it has no kernel for these integers."""
    for user in dequantize.users:
        if user.target in EMBEDDING.targets and user.args[0] is dequantize:
            yield not _has_scaled_rows(model, dequantize)
        elif dequantize.target is DEQUANTIZE_PER_TENSOR and dequantize.args[2] != 0:
            match = match_of(user)
            yield match is not None and match.weight is dequantize


def _has_scaled_rows(model: GraphModule, dequantize: Node) -> bool:
    if dequantize.target is not DEQUANTIZE_PER_CHANNEL or dequantize.args[3] != 0:
        return False
    stored = constant_of(model, cast(Node, dequantize.args[0]))
    return stored.dtype is torch.int8 and not has_zero_points(model, dequantize)


@graph_pass(
    "embeddings of dequantized tables",
    "embeddings of integers and of their scales",
    requires={"constants_of_others"},
)
def gather_rows(model: GraphModule) -> int:
    """Rows of integers and their scales are read, and multiplied: ``fl(q * s)`` as before."""
    count = 0
    for node in calls(model, EMBEDDING.targets):
        dequantize = cast(Node, node.args[0])
        if dequantize.target is not DEQUANTIZE_PER_CHANNEL:
            continue
        stored = cast(Node, dequantize.args[0])
        scale = cast(Tensor, qparams_of(model, dequantize).scale)
        build = Builder(model, node)
        scales = add_constant(model, f"{stored.target}_scales", scale[:, None].contiguous(), node)
        if len(dequantize.users) > 1 or len(stored.users) > 1:
            # A layer has the same weights: what a delegate holds, nobody else reads.
            table = constant_of(model, stored).clone()
            stored = add_constant(model, f"{stored.target}_rows", table, node, stored)
        rows = build.call(node.target, stored, *node.args[1:])
        factors = build.call(node.target, scales, *node.args[1:])
        units = build.call(DEQUANTIZE_PER_TENSOR, rows, 1.0, 0, -128, 127, torch.int8)
        units.meta["val"] = node.meta["val"]
        replace(node, build.call(aten.mul.Tensor, units, factors))
        count += 1
    return count


@graph_pass(
    "embeddings that are quantized", "embeddings of integers", requires={"constants_of_others"}
)
def quantize_tables(model: GraphModule) -> int:
    """A table whose rows are quantized after the lookup is quantized before it.

    Quantizing looks at one value at a time, so it gives the same integers; the table takes a
    quarter of the space.
    """
    count = 0
    for node in calls(model, EMBEDDING.targets):
        table = cast(Node, node.args[0])
        users = effective_users(node)
        if not is_constant(table) or not users or not all(is_quantize(user) for user in users):
            continue
        first = users[0]
        if is_wide(first) or any(
            user.target is not QUANTIZE_PER_TENSOR or user.args[1:] != first.args[1:]
            for user in users
        ):
            continue
        integers = XNNPACK.quantize(constant_of(model, table), qparams_of(model, first))
        narrow = integers.to(torch.int8)
        constant = add_constant(model, f"{table.target}_rows", narrow, node, table)
        build = Builder(model, node)
        rows = build.call(node.target, constant, *node.args[1:])
        for user in users:
            user.replace_all_uses_with(rows)
            model.graph.erase_node(user)
        model.graph.erase_node(node)
        count += 1
    return count
