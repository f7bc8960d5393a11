"""Moves of the same tensor, one after the other, become one: each is a copy on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import MOST_DIMS, WIDEST_PRODUCT
from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    Mark,
    calls,
    graph_pass,
    is_wide,
    maker_of,
    origin_of,
    quantized_neighbours,
    replace,
    set_origin,
    then_move,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    argument,
    dynamic_sizes,
    effective_users,
    is_dequantize,
    is_quantize,
    is_same_shape,
    shape_of,
    view_sizes,
)
from custom_quantizer.ops.movement import (
    CAT,
    PERMUTE,
    SLICE,
    is_split_evenly,
    permutation,
    slice_of,
)

aten = torch.ops.aten

_VIEW, _PERMUTE = aten.view_copy.default, aten.permute.default
_MOVES = frozenset({_VIEW, _PERMUTE})


@graph_pass(
    "permutes of more dims than XNNPACK has", "several of fewer", requires={"reshapes_to_views"}
)
def permutes_of_few_dims(model: GraphModule) -> int:
    """A permute of more dims than XNNPACK has becomes several of fewer.

    Patches of a video are a view of 8 dims, a permute, and a view. Dims that stay side by side are
    one, and what is left of views of that many dims is merged with views around it.
    """
    count = 0
    for node in calls(model, PERMUTE.targets):
        source, order = cast(Node, node.args[0]), permutation(node)
        shape = shape_of(source)
        dynamic = dynamic_sizes(shape)
        order = [d for d in order if not (isinstance(shape[d], int) and shape[d] == 1)]
        if len(shape) <= MOST_DIMS or dynamic > 1 or order == sorted(order):
            continue
        build, value = Builder(model, node), source
        for blocks, places in _of_few_blocks(order):
            sizes = view_sizes([math.prod(shape[d] for d in block) for block in blocks])
            if value is source:
                value = build.call(_VIEW, value, sizes)
            else:
                value = then_move(build, source, value, _VIEW, sizes)
            value = then_move(build, source, value, _PERMUTE, places)
        sizes = view_sizes(shape_of(node))
        for user in list(node.users):
            if is_quantize(user) and user.all_input_nodes == [node]:
                # Integers are made while the dims are few: only views of integers merge with such.
                viewed = build.call(_VIEW, build.requantized(value, user), sizes)
                user.replace_input_with(node, viewed)
        replace(node, then_move(build, source, value, _VIEW, sizes))
        count += 1
    return count


@graph_pass(
    "views of views, permutes of permutes, moves that change nothing",
    "one view or permute, or none",
    requires={
        "strided_slices_to_views",
        "reshapes_to_views",
        "transpose_second_factors",
        "ops_of_few_dims",
        "permutes_of_few_dims",
    },
)
def merge_moves(model: GraphModule) -> int:
    """A view of a view is one view, a permute of a permute one permute; what undoes itself goes."""
    count = 0
    for node in calls(model, PERMUTE.targets):
        if not Mark.OPERAND_TRANSPOSE.on(node) and _drop_single_sizes(model, node):
            count += 1
    for node in calls(model, _MOVES):
        if Mark.OPERAND_TRANSPOSE.on(node):
            continue
        while (inner := _move_before(node)) is not None:
            source = cast(Node, inner.args[0])
            if node.target is _PERMUTE:
                order = [permutation(inner)[d] for d in permutation(node)]
                node.args = (source, order)
            else:
                node.replace_input_with(cast(Node, node.args[0]), source)
            set_origin(node, f"{origin_of(inner) or inner.name},{origin_of(node) or node.name}")
            count += 1
        if _changes_nothing(node):
            _drop(node)
            count += 1
    model.graph.eliminate_dead_code()
    return count


@graph_pass("concatenations that begin as another one", "the other one, and what follows")
def continue_cats(model: GraphModule) -> int:
    """A concatenation that begins as one before goes on from its result, as those of a DenseNet.

    Of all that begin with the same tensor the last one is looked at.
    """
    count = 0
    known: dict[Any, tuple[list[Any], Node]] = {}
    joins: dict[Node, list[Any]] = {}  # what each joins, as it was written
    for node in list(model.graph.nodes):
        if is_quantize(node) and node.args[0] in joins:
            integers = joins[cast(Node, node.args[0])]
            known[integers[0], integers[1], node.args[1:]] = integers, node
        if node.target not in CAT.targets:
            continue
        tensors = list(cast("Sequence[Node]", node.args[0]))
        grid = tensors[0].args[1:]
        if not all(is_dequantize(tensor) and tensor.args[1:] == grid for tensor in tensors):
            continue
        dim = int(cast(int, argument(node, 1, "dim", 0))) % len(shape_of(node))
        joins[node] = integers = [dim, *(tensor.args[0] for tensor in tensors)]
        first, joined = known.get((dim, integers[1], grid), ([], node))
        if 2 < len(first) < len(integers) and integers[: len(first)] == first:
            begun = Builder(model, node, origin_of(node)).call(DEQUANTIZE_PER_TENSOR, joined, *grid)
            node.args = ([begun, *tensors[len(first) - 1 :]], *node.args[1:])
            count += 1
    return count


def _of_few_blocks(order: Sequence[int]) -> Iterator[tuple[list[list[int]], list[int]]]:
    """A permute as permutes of at most as many blocks of neighbouring dims as XNNPACK has dims.

    Two neighbouring blocks change places, those after which most dims are where they belong, until
    so few blocks are left that one permute does the rest.

    Args:
        order: which dim of the input each dim of the result is.

    Yields:
        Blocks of dims, side by side, and which of them each block of the result is.
    """
    place = {dim: position for position, dim in enumerate(order)}

    def runs(line: Sequence[int]) -> list[list[int]]:
        """Dims that stay side by side."""
        found: list[list[int]] = []
        for dim in line:
            if found and place[dim] == place[found[-1][-1]] + 1:
                found[-1].append(dim)
            else:
                found.append([dim])
        return found

    blocks = runs(sorted(order))
    while len(blocks) > MOST_DIMS:
        cuts = combinations(range(len(blocks) + 1), 3)
        exchanged = [
            [_joined(blocks[i:j]) for i, j in pairwise((0, *cut, len(blocks)))] for cut in cuts
        ]
        before, left, right, behind = min(
            exchanged, key=lambda parts: len(runs(_joined([parts[i] for i in (0, 2, 1, 3)])))
        )
        parts = [part for part in (before, left, right, behind) if part]
        moved = [part for part in (before, right, left, behind) if part]
        yield parts, [parts.index(part) for part in moved]
        blocks = runs(_joined(moved))
    moved = sorted(blocks, key=lambda block: place[block[0]])
    yield blocks, [blocks.index(block) for block in moved]


def _joined(blocks: Sequence[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(blocks))


def _drop_single_sizes(model: GraphModule, node: Node) -> bool:
    """Permute without dimensions of size 1: where only those move, it is a view."""
    source = cast(Node, node.args[0])
    shape, order = shape_of(source), permutation(node)
    kept = [d for d in range(len(shape)) if not (isinstance(shape[d], int) and shape[d] == 1)]
    moved = [d for d in order if d in kept]
    build = Builder(model, node)
    if moved == sorted(moved):
        replace(node, build.call(_VIEW, source, view_sizes(shape_of(node))))
        return True
    if len(kept) < len(shape) and _is_viewed(node):
        smaller = build.call(_VIEW, source, view_sizes([shape[d] for d in kept]))
        permuted = then_move(build, source, smaller, _PERMUTE, [kept.index(d) for d in moved])
        replace(node, then_move(build, source, permuted, _VIEW, view_sizes(shape_of(node))))
        return True
    if node.target is _PERMUTE:
        return False
    replace(node, build.call(_PERMUTE, source, order))
    return True


def _is_viewed(node: Node) -> bool:
    """Whether there is a view before a permute and all that is behind it are views."""
    before = _across_boundary(node)
    if before is None or before.target is not _VIEW:
        return False
    users = list(node.users)
    if len(users) == 1 and is_quantize(users[0]):
        users = [user for dequantize in users[0].users for user in dequantize.users]
    return bool(users) and all(user.target is _VIEW for user in users)


def _across_boundary(node: Node) -> Node | None:
    """What makes the input of a move, seen through a q/dq pair that changes nothing."""
    return maker_of(node.args[0])


def _move_before(node: Node) -> Node | None:
    """A move of the same kind right before one, whose input has the same Q/DQ boundaries."""
    inner = _across_boundary(node)
    if inner is None or inner.op != "call_function" or inner.target is not node.target:
        return None
    outer_source, inner_source = cast(Node, node.args[0]), inner.args[0]
    if is_dequantize(outer_source):
        if not isinstance(inner_source, Node) or not is_dequantize(inner_source):
            return None
        return inner if inner_source.args[1:] == outer_source.args[1:] else None
    return inner


def _changes_nothing(node: Node) -> bool:
    if node.target is _PERMUTE:
        order = permutation(node)
        return order == sorted(order)
    return is_same_shape(shape_of(node), shape_of(cast(Node, node.args[0])))


def _drop(node: Node) -> None:
    """Let the users of a move read its input; a q/dq pair that changes nothing goes as well."""
    source = cast(Node, node.args[0])
    users = list(node.users)
    replace(node, source)
    if not is_dequantize(source):
        return
    for user in users:
        if is_quantize(user) and user.args[1:] == source.args[1:]:
            replace(user, cast(Node, source.args[0]))


@graph_pass(
    "integer products by matrices of many columns",
    "products by transposed matrices, which every CPU multiplies rightly",
    requires={"matmuls_to_bmms", "reshapes_to_views"},
)
def transpose_second_factors(model: GraphModule) -> int:
    """Second factors of integer products are stored transposed, if they have many columns.

    See :data:`~custom_quantizer.backends.xnnpack.kernels.WIDEST_PRODUCT`. The factor is transposed
    twice: once in memory, which is merged into moves before it, and back by what the file writes as
    a flag of the product (:class:`~custom_quantizer.backends.xnnpack.visitors.ProductVisitor`).
    """
    count = 0
    for node in calls(model, frozenset({aten.bmm.default, aten.matmul.default})):
        if node.target is aten.matmul.default and not Mark.WHOLE.on(node):
            continue
        factor = cast(Node, node.args[1])
        columns = shape_of(node)[-1]
        if isinstance(columns, int) and columns <= WIDEST_PRODUCT:
            continue
        if not _is_integer_product(node) or _is_marked(maker_of(factor)):
            continue
        build = Builder(model, node)
        swapped = _swapped(build, factor)
        back = build.call(_PERMUTE, swapped, _last_swapped(len(shape_of(factor))))
        Mark.OPERAND_TRANSPOSE.put(back)
        node.update_arg(1, build.requantized(back, factor))
        count += 1
    return count


def _is_integer_product(node: Node) -> bool:
    """Whether XNNPACK multiplies integers: of at most 8 bits, and without a second zero point."""
    users = effective_users(node)
    left, right = cast("tuple[Node, Node]", node.args[:2])
    return (
        len(users) == 1
        and is_quantize(users[0])
        and is_dequantize(left)
        and is_dequantize(right)
        and bool(right.args[2] == 0)
        and not any(is_wide(tensor) for tensor in (left, right, users[0]))
    )


def _is_marked(node: Node | None) -> bool:
    return node is not None and Mark.OPERAND_TRANSPOSE.on(node)


def _last_swapped(rank: int) -> list[int]:
    """The order of dims whose last two change places."""
    return [*range(rank - 2), rank - 1, rank - 2]


def _swapped(build: Builder, factor: Node) -> Node:
    """``factor`` with rows and columns swapped, before its batch dimensions became one if so."""
    view = maker_of(factor)
    inner = factor
    batched = len(shape_of(factor)) == 3
    if batched and view is not None and view.target is _VIEW and isinstance(view.args[0], Node):
        source = view.args[0]
        if len(shape_of(source)) >= 3 and shape_of(source)[-2:] == shape_of(factor)[-2:]:
            inner = source if is_dequantize(source) else factor
    order = _last_swapped(len(shape_of(inner)))
    swapped = build.requantized(build.call(_PERMUTE, inner, order), factor)
    if inner is factor:
        return swapped
    batch, rows, columns = shape_of(factor)
    viewed = build.call(_VIEW, swapped, view_sizes([batch, columns, rows]))
    return build.requantized(viewed, factor)


@graph_pass("strided slices of dimensions that their step divides", "views and slices")
def strided_slices_to_views(model: GraphModule) -> int:
    """Every ``k``-th entry of a dimension that ``k`` divides: a view splits it, a slice takes one.

    Height and width of a quantized image with channels first are left to a strided convolution.
    """
    slices = calls(model, SLICE.targets)
    slices = [
        node
        for node in slices
        if is_split_evenly(node) and not _is_of_image(node) and _can_be_viewed(node)
    ]
    for node in slices:
        source = cast(Node, node.args[0])
        shape, (dim, start, _, step) = shape_of(source), slice_of(node)
        build = Builder(model, node)
        split = view_sizes([*shape[:dim], shape[dim] // step, step, *shape[dim + 1 :]])
        value = build.call(_VIEW, source, split)
        value = then_move(build, source, value, aten.slice.Tensor, dim + 1, start, start + 1)
        replace(node, then_move(build, source, value, _VIEW, view_sizes(shape_of(node))))
    return len(slices)


def _can_be_viewed(node: Node) -> bool:
    """Whether at most one size is dynamic."""
    return dynamic_sizes(shape_of(cast(Node, node.args[0]))) <= 1


def _is_of_image(node: Node) -> bool:
    """Whether a strided slice is one of height or width that a convolution will take."""
    if quantized_neighbours(node) is None or len(shape_of(node)) != 4:
        return False
    chain = [node, *_slices_around(node)]
    return all(slice_of(other)[0] in (2, 3) for other in chain)


def _slices_around(node: Node) -> list[Node]:
    """Strided slices right before and behind one."""
    users = [dq for q in node.users if is_quantize(q) for dq in q.users]
    near = [_across_boundary(node), *(user for dq in users for user in dq.users)]
    return [n for n in near if n is not None and n.target in SLICE.targets and slice_of(n)[3] > 1]
