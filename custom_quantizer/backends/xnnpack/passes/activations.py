"""Clamps, fused and alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.fx import GraphModule, Node

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
    is_dequantize,
    is_quantize,
    shape_of,
    view_sizes,
)
from custom_quantizer.ops import QParamSharing, rule_of
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
        if isinstance(CLAMP.match(CLAMP, node), str):
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
    "clamps of integers before functions of one tensor",
    "a reshape between them",
    requires={"split_activations", "narrow_activations"},
)
def break_chains(model: GraphModule) -> int:
    """A clamp of integers that a function of one tensor follows is the last of its chain.

    XNNPACK (92a7ad50) makes a table of a chain of such functions when it loads a program. With two
    clamps from int8 to int8 in one chain it corrupts memory, and the process is aborted.
    """
    count = 0
    sums = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)  # clamped at once
    for node in calls(model, RELU.targets | CLAMP.targets):
        around = quantized_neighbours(node)
        if around is None or is_wide(around[0]) or around[0].args[1:] != around[1].args[1:]:
            continue
        before, after = around
        stored = cast(Node, before.args[0])
        maker = stored.args[0] if is_quantize(stored) else None
        readers = [user for dequantize in after.users for user in dequantize.users]
        if (isinstance(maker, Node) and maker.target in sums) or not any(map(_maps, readers)):
            continue
        build = Builder(model, after, origin_of(node))
        after.replace_input_with(node, _moved(build, build.requantized(node, after), after))
        count += 1
    return count


def _moved(build: Builder, value: Node, like: Node) -> Node:
    """A value, moved to where it is: by a reshape, or to and fro where several sizes are dynamic.

    ``like`` has the scale of the value.
    """
    shape = view_sizes(shape_of(value))
    if shape.count(-1) < 2:
        return build.call(aten.view_copy.default, value, shape)
    dims = [1, 0, *range(2, len(shape))]
    turned = build.call(aten.permute_copy.default, value, dims)
    return build.call(aten.permute_copy.default, build.requantized(turned, like), dims)


def _maps(node: Node) -> bool:
    """Whether a node may be computed as a table: it reads one tensor, and does not move it."""
    rule = rule_of(node)
    moves = rule is not None and rule.sharing is QParamSharing.SAME
    others = (aten.add.Tensor, aten.sub.Tensor, aten.view_copy.default)
    single = len(node.all_input_nodes) == 1 and node.op == "call_function"
    return single and not moves and node.target not in others
