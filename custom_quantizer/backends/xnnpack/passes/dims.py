"""Ops over more dims than XNNPACK's tensors have, as the same ops over fewer.

Windows of a video are cut in eight dims. What an op does is the same over neighbouring dims, none
of which it treats apart: they are one dim, between views. Views of views become one
(:mod:`custom_quantizer.backends.xnnpack.passes.merging`), so that most of them go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import MOST_DIMS
from custom_quantizer.backends.xnnpack.passes._pass import (
    Builder,
    calls,
    graph_pass,
    maker_of,
    viewed,
)
from custom_quantizer.backends.xnnpack.passes.functions import BY_STEPS
from custom_quantizer.backends.xnnpack.passes.quotients import STEPS
from custom_quantizer.backends.xnnpack.passes.run_time import quantized_again, source_of_rows
from custom_quantizer.core.graph import (
    DEQUANTIZE_DYNAMIC,
    DEQUANTIZE_PER_TENSOR,
    add_constant,
    are_static,
    argument,
    constant_of,
    is_dequantize,
    is_quantize,
    is_same_shape,
    is_static,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops import elementwise, functions
from custom_quantizer.ops.attention import SOFTMAX, softmax_dim
from custom_quantizer.ops.gemm import LINEAR
from custom_quantizer.ops.movement import CAT, PAD, SLICE, padding_of

aten = torch.ops.aten

_VIEW, _PERMUTE = aten.view_copy.default, aten.permute.default


@graph_pass(
    "ops over more dims than XNNPACK has, but for permutes",
    "the same ops over fewer dims, between views",
    requires={
        "drop_identities",
        "expands_to_biases",
        "expands_to_cats",
        "group_norms_to_linears",
        "layer_norms_to_linears",
        "logsumexps_to_linears",
        "matmuls_to_bmms",
        "norms_to_linears",
        "reshapes_to_views",
        "running_sums_in_steps",
        "softmaxes_over_last_dim",
        "strided_slices_to_groups",
        "strided_slices_to_views",
    },
)
def ops_of_few_dims(model: GraphModule) -> int:
    """Dims that an op treats alike become one, if few enough are left."""
    count = 0
    for node in calls(model, frozenset(_APART)):
        if all(len(shape_of(tensor)) <= MOST_DIMS for tensor in (*_operands(node), node)):
            continue
        if len(blocks_of(node)) > MOST_DIMS:
            _expand_constants(model, node)
        operands, blocks = _operands(node), blocks_of(node)
        small = [_joined(shape_of(tensor), blocks) for tensor in (*operands, node)]
        if not 0 < len(blocks) <= MOST_DIMS or any(sizes.count(-1) > 1 for sizes in small):
            continue
        build = Builder(model, node)
        values = {n: n for n in node.all_input_nodes} | {
            tensor: _small(build, tensor, sizes)
            for tensor, sizes in zip(operands, small, strict=False)
        }
        args = list(torch.fx.node.map_arg(node.args, values.get))
        _write_dims(node, args, blocks)
        _replace(node, build.call(node.target, *args, **node.kwargs), build)
        count += 1
    for node in list(model.graph.nodes):
        if is_quantize(node) and len(shape_of(node)) > MOST_DIMS:
            count += _quantize_before_view(model, node)
    return count + _float_views(model)


def _operands(node: Node) -> list[Node]:
    """Tensors whose dims are those of the result."""
    given = node.args[0] if node.target in CAT.targets else node.args[:2]
    if node.target in LINEAR.targets:
        given = node.args[:1]
    return [
        arg for arg in cast("Sequence[Any]", given) if isinstance(arg, Node) and _is_tensor(arg)
    ]


def _is_tensor(node: Node) -> bool:
    return tensor_meta(node) is not None


def blocks_of(node: Node) -> list[list[int]]:
    """Neighbouring dims of an op that may be one; none of what is not known here.

    Each operand has all of them, or is broadcast along all, and the op treats them alike.
    """
    if node.target not in _APART or "dim" in node.kwargs:
        return []
    out, apart = shape_of(node), _APART[node.target](node)
    shapes = [shape_of(tensor) for tensor in _operands(node)]

    def kinds(dim: int) -> tuple[bool, ...]:
        sizes = [[1, *shape][max(dim - len(out) + len(shape) + 1, 0)] for shape in shapes]
        return tuple(is_same_shape([size], [out[dim]]) for size in sizes)

    blocks: list[list[int]] = [[0]]
    for before, dim in pairwise(range(len(out))):
        # A dim of size 1 goes with any other.
        near = [d for d in blocks[-1] if not is_same_shape([out[d]], [1])] or [before]
        single = any(is_same_shape([out[d]], [1]) for d in (dim, near[-1]))
        if (single or kinds(dim) == kinds(near[-1])) and not {before, dim} & apart:
            blocks[-1].append(dim)
        else:
            blocks.append([dim])
    return blocks


def _expand_constants(model: GraphModule, node: Node) -> None:
    """Constants that are broadcast along some dims get all of them, of which blocks are few."""
    sizes = shape_of(node)
    if not are_static(sizes) or math.prod(sizes) > _MOST_VALUES:
        return
    for tensor in _operands(node):
        stored = cast(Node, tensor.args[0]) if tensor.target is DEQUANTIZE_PER_TENSOR else tensor
        if stored.op != "get_attr" or is_same_shape(shape_of(tensor), sizes):
            continue
        value = constant_of(model, stored).expand(sizes).contiguous()
        new = _with_values(Builder(model, node), tensor, f"{stored.target}_expanded", value)
        new.meta.setdefault("val", node.meta["val"])
        node.replace_input_with(tensor, new)


_MOST_VALUES = 2**20
"""Of a constant that is expanded."""


def _joined(shape: Sequence[Any], blocks: Sequence[list[int]]) -> list[int]:
    """Sizes of blocks; dims that a tensor lacks are of size 1."""
    rank = sum(map(len, blocks))
    full = [*[1] * (rank - len(shape)), *shape]
    return view_sizes([math.prod(full[d] for d in block) for block in blocks])


def _small(build: Builder, tensor: Node, sizes: list[int]) -> Node:
    """A tensor in other sizes; a constant is another one, as is what is made of integers."""
    if tensor.target is DEQUANTIZE_DYNAMIC:  # rows keep their scales
        return quantized_again(build, tensor, viewed(build, source_of_rows(tensor), sizes))
    stored = cast(Node, tensor.args[0]) if is_dequantize(tensor) else tensor
    if stored.op != "get_attr":
        return viewed(build, tensor, sizes)
    value = constant_of(build.model, stored).reshape(sizes)
    return _with_values(build, tensor, f"{stored.target}_few_dims", value)


def _with_values(build: Builder, tensor: Node, name: str, value: Tensor) -> Node:
    """A constant of other values, dequantized as the one that it stands for."""
    constant = add_constant(build.model, name, value, build.anchor)
    if not is_dequantize(tensor):
        return constant
    return build.call(tensor.target, constant, *tensor.args[1:])


def _replace(node: Node, small: Node, build: Builder) -> None:
    """Let users read a view; integers are made of what has few dims."""
    sizes = view_sizes(shape_of(node))
    for user in list(node.users):
        if is_quantize(user) and user.all_input_nodes == [node]:
            user.update_arg(0, build.call(_VIEW, build.requantized(small, user), sizes))
    if node.users:
        node.replace_all_uses_with(build.call(_VIEW, small, sizes))
    node.graph.erase_node(node)


def _quantize_before_view(model: GraphModule, quantize: Node) -> int:
    """What comes from outside with many dims is viewed there, as floats.

    What has another scale is viewed as integers of that one.
    """
    source = cast(Node, quantize.args[0])
    stored = cast(Node, source.args[0]) if is_dequantize(source) else source
    if (
        not is_static(quantize)
        or stored.op == "get_attr"
        or source.target in (_VIEW, _PERMUTE, DEQUANTIZE_DYNAMIC)
    ):
        return 0
    build, shape = Builder(model, quantize), shape_of(source)
    blocks = [list(range(len(shape) - 1)), [len(shape) - 1]]
    flat = viewed(build, source, _joined(shape, blocks))
    back = build.call(_VIEW, build.requantized(flat, quantize), view_sizes(shape))
    quantize.update_arg(0, back)
    return 1


def _float_views(model: GraphModule) -> int:
    """What goes outside with many dims is viewed there, as floats."""
    count = 0
    for node in list(model.graph.nodes):
        view = maker_of(node) if is_dequantize(node) else None
        if view is None or view.target is not _VIEW or len(shape_of(node)) <= MOST_DIMS:
            continue
        inner = cast(Node, view.args[0])
        if not is_dequantize(inner) or inner.args[1:] != node.args[1:]:
            continue  # it rounds
        for user in list(node.users):
            if user.target not in (_VIEW, _PERMUTE):
                user.replace_input_with(node, view)
                count += 1
    return count


# ---------------------------------------------------------------------------------------------
# Dims that ops treat apart
# ---------------------------------------------------------------------------------------------


def _last(node: Node) -> set[int]:
    """Also of elementwise ops: layers before and behind them have rows."""
    return {len(shape_of(node)) - 1}


def _along(node: Node) -> set[int]:
    return {int(argument(node, 1, "dim", 0)) % len(shape_of(node))}


def _padded(node: Node) -> set[int]:
    amounts, rank = padding_of(node), len(shape_of(node))
    return {rank - 1 - i for i in range(len(amounts) // 2) if any(amounts[2 * i : 2 * i + 2])}


def _softmax_dim(node: Node) -> set[int]:
    return {softmax_dim(node)}


_ELEMENTWISE = frozenset(
    {target for rule in (*elementwise.RULES, *functions.RULES) for target in rule.targets}
    - elementwise.WHERE.targets
    - functions.PRELU.targets
    | BY_STEPS
    | STEPS.keys()
    | {aten.cos.default, aten.sin.default}
)

_APART: Mapping[Any, Callable[[Node], set[int]]] = {
    **dict.fromkeys((*_ELEMENTWISE, *LINEAR.targets), _last),
    **dict.fromkeys((*CAT.targets, *SLICE.targets), _along),
    **dict.fromkeys(PAD.targets, _padded),
    **dict.fromkeys(SOFTMAX.targets, _softmax_dim),
}
"""By overload, the dims that stay one each."""


def _write_dims(node: Node, args: list[Any], blocks: Sequence[list[int]]) -> None:
    """Dims among the arguments, by their new numbers."""
    if node.target in PAD.targets:
        amounts = dict.fromkeys(range(len(blocks)), (0, 0))
        given = padding_of(node)
        for dim in _padded(node):
            at = 2 * (len(shape_of(node)) - 1 - dim)
            amounts[blocks.index([dim])] = (given[at], given[at + 1])
        args[1] = [amount for i in reversed(range(len(blocks))) for amount in amounts[i]]
    elif node.target in SOFTMAX.targets | CAT.targets | SLICE.targets:
        (dim,) = _APART[node.target](node)
        args[1:2] = [blocks.index([dim])]
