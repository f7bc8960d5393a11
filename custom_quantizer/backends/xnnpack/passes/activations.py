"""Clamps, fused and alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import CHAIN_LIMIT
from custom_quantizer.backends.xnnpack.passes._pass import (
    FLOAT32_MAX,
    GEMMS,
    Builder,
    calls,
    graph_pass,
    is_wide,
    origin_of,
    quantized_neighbours,
    replace,
)
from custom_quantizer.core.graph import (
    effective_users,
    is_constant,
    is_dequantize,
    is_float32,
    is_quantize,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.elementwise import CLAMP, RELU
from custom_quantizer.ops.pool import MAX_POOL

aten = torch.ops.aten


@graph_pass("activations after add, sub, mul", "clamps of integers")
def split_activations(model: GraphModule) -> int:
    """An activation that XNNPACK cannot fuse clamps the quantized result instead.

    Rounding is monotone, so clamping before or after it gives the same integers.
    """
    count = 0
    fused_by_xnnpack = {(aten.add.Tensor, "relu")}
    for node in calls(model, RELU.targets | CLAMP.targets):
        source = node.args[0]
        if not isinstance(source, Node) or source.target not in (
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
        ):
            continue
        family = "relu" if node.target in RELU.targets else "clamp"
        users = effective_users(node)
        integer = all(is_dequantize(arg) and not is_wide(arg) for arg in source.all_input_nodes)
        if (source.target, family) in fused_by_xnnpack or not integer:
            continue
        if node.args[1:] == (-FLOAT32_MAX, FLOAT32_MAX):
            continue  # it keeps the op before it in float, see float_fallback.py
        if len(users) != 1 or not is_quantize(users[0]) or len(source.users) != 1:
            continue
        build = Builder(model, node)
        node.replace_input_with(source, build.requantized(source, users[0]))
        count += 1
    return count


@graph_pass("clamps", "hardtanh or relu")
def clamps_to_hardtanh(model: GraphModule) -> int:
    """Every clamp that follows a GEMM becomes hardtanh or relu, the two that XNNPACK fuses."""
    count = 0
    bounds_of = cast(Callable[[Node], tuple[float | None, float | None]], CLAMP.bounds)
    for node in calls(model, CLAMP.targets - {aten.hardtanh.default}):
        if not is_float32(node) or isinstance(CLAMP.match(CLAMP, node), str):
            continue
        low, high = bounds_of(node)
        build = Builder(model, node)
        if low == 0.0 and high is None:
            new = build.call(aten.relu.default, node.args[0])
        else:
            # An open side is closed beyond what float32 activations reach.
            new = build.call(
                aten.hardtanh.default,
                node.args[0],
                -FLOAT32_MAX if low is None else low,
                FLOAT32_MAX if high is None else high,
            )
        replace(node, new)
        count += 1
    return count


@graph_pass(
    "activations behind activations",
    "one clamp to what both leave",
    requires={"split_activations", "narrow_activations", "emulate_wide", "clamps_to_hardtanh"},
)
def merge_activations(model: GraphModule) -> int:
    """Of two activations in a row one clamp is left.

    ExecuTorch's FuseActivationPass (1.5.1) makes both part of the op before them, one by one, and
    keeps the limits of the last alone.
    """
    count = 0
    for node in calls(model, _FUSED):
        first = node.args[0]
        if not isinstance(first, Node) or first.target not in _FUSED or len(first.users) != 1:
            continue
        (low, high), (least, most) = _limits(first), _limits(node)
        low, high = (min(max(end, least), most) for end in (low, high))
        build = Builder(model, node)
        replace(node, build.call(aten.hardtanh.default, first.args[0], low, high))
        model.graph.erase_node(first)
        count += 1
    return count


_FUSED = frozenset({aten.relu.default, aten.hardtanh.default})


def _limits(node: Node) -> tuple[float, float]:
    """What an activation leaves, open sides closed beyond what float32 activations reach."""
    if node.target is aten.relu.default:
        return 0.0, FLOAT32_MAX
    low, high = cast(Callable[[Node], tuple[float, float]], CLAMP.bounds)(node)
    return low, high


@graph_pass(
    "clamps from one scale to another behind what XNNPACK fuses them into", "a reshape between them"
)
def keep_apart(model: GraphModule) -> int:
    """A clamp to another scale stays an op of its own: a reshape stands before it.

    XNNPACK fuses a clamp into the convolution, linear layer or max pool that makes its input,
    whatever the scale of the tensor between them; that of a max pool would just be dropped.
    """
    count = 0
    for node in calls(model, RELU.targets | CLAMP.targets):
        around = quantized_neighbours(node)
        if around is None or is_wide(around[0]) or around[0].args[1:] == around[1].args[1:]:
            continue
        before, _ = around
        stored = cast(Node, before.args[0])
        if not is_quantize(stored) or len(stored.users) != 1 or len(before.users) != 1:
            continue
        maker = cast(Node, stored.args[0])
        if rule_of(maker) in (RELU, CLAMP):
            maker = cast(Node, maker.args[0])
        if maker.target not in GEMMS | MAX_POOL.targets:
            continue
        build = Builder(model, node)
        same = _moved(build, before, before)
        node.replace_input_with(before, build.requantized(same, before))
        count += 1
    return count


@graph_pass(
    "long chains of functions of one tensor",
    "a reshape in them",
    requires={
        "dedicate_dequantize",
        "quantize_pads",
        "quantize_scalars_as_rows",
        "rescale_behind_moves",
        "shield_composites",
    },
)
def break_chains(model: GraphModule) -> int:
    """No chain of functions of one int8 tensor has the length at which XNNPACK fails to load it.

    XNNPACK (92a7ad50, ``xnn_subgraph_fuse_unary_quantized_into_lut``) makes a table of a chain of
    up to 10 ops that ends with integers. It computes the table with a copy of the ops that has room
    for just 10, where ``xnn_subgraph_rewrite_dequant_bmm`` asks for room for one more: with 10 ops
    memory is enlarged that was never allocated, and the process is aborted.
    """
    count = 0
    for first in list(model.graph.nodes):
        if not is_dequantize(first) or is_wide(first):
            continue
        chain = _chain(first)
        if not any(is_quantize(node) for node in chain[CHAIN_LIMIT - 1 :]):
            continue
        before = chain[: CHAIN_LIMIT - 1]
        quantize = next((node for node in reversed(before) if is_quantize(node)), None)
        last = before[-1] if quantize is None else cast(Node, quantize.args[0])
        reader = chain[CHAIN_LIMIT - 1] if quantize is None else quantize
        build = Builder(model, reader, origin_of(last))
        value = last if quantize is None else build.requantized(last, quantize)
        reader.replace_input_with(last, _moved(build, value, quantize))
        count += 1
    return count


def _chain(first: Node) -> list[Node]:
    """What XNNPACK may compute as one table that begins with a dequantize node.

    Rather too many nodes than too few: which of those between integers and floats become ops is
    not known yet. Of three nodes at least one does, so that no more are needed than are listed.
    """
    chain, values = [first], {first.args[0], first}
    while len(chain) < 3 * CHAIN_LIMIT:
        last = chain[-1]
        readers = list(last.users)
        if is_quantize(last) and len({user for reader in readers for user in reader.users}) == 1:
            readers = readers[:1]  # all that dequantize these integers do so for one op
        if len(readers) != 1 or not _is_function_of(readers[0], values):
            break
        chain.append(readers[0])
        values.add(readers[0])
    return chain


def _is_function_of(node: Node, values: set[Any]) -> bool:
    """Whether a node computes each number of some of ``values`` and single constants."""
    rule = rule_of(node)
    moves = rule is not None and rule.moves_values
    return (
        node.op == "call_function"
        and not moves
        and node.target not in GEMMS | {aten.view_copy.default, aten.permute_copy.default}
        and all(
            arg in values
            or (is_dequantize(arg) and arg.args[0] in values)
            or (is_constant(_stored(arg)) and _is_single(arg))
            for arg in node.all_input_nodes
        )
    )


def _is_single(node: Node) -> bool:
    meta = tensor_meta(node)
    return meta is not None and meta.numel() == 1


def _stored(node: Node) -> object:
    """What a dequantize node reads, else the node itself."""
    return node.args[0] if is_dequantize(node) else node


def _moved(build: Builder, value: Node, like: Node | None) -> Node:
    """A value, moved to where it is: by a reshape, or to and fro where several sizes are dynamic.

    ``like`` has the scale of the value, if it is one of integers.
    """
    shape = view_sizes(shape_of(value))
    if shape.count(-1) < 2:
        return build.call(aten.view_copy.default, value, shape)
    dims = [1, 0, *range(2, len(shape))]
    turned = build.call(aten.permute_copy.default, value, dims)
    if like is not None:
        turned = build.requantized(turned, like)
    return build.call(aten.permute_copy.default, turned, dims)
