"""Rewrites of a converted graph that keep every op inside the delegate.

A pass is one small rewrite: what it looks for, what it puts there, and whether it changes
numerics. They run in the order of :data:`PASSES` on a copy of the converted graph. Nodes that a
pass makes carry the name of the op they stand for (``node.meta["custom"]``), so that what the
backend did can be traced back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.canonical import overwritten_by
from custom_quantizer.errors import CustomQuantizerError, LoweringError
from custom_quantizer.graph import (
    DEQUANTIZE_DYNAMIC,
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    argument,
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_dequantize,
    is_quantize,
    qparams_of,
    shape_of,
    tensor_meta,
)
from custom_quantizer.ops import QParamSharing, rule_of
from custom_quantizer.ops.elementwise import CLAMP, RELU
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, expand_channels
from custom_quantizer.ops.movement import (
    CAT,
    EXPAND,
    GETITEM,
    PAD,
    RESHAPE,
    SELECT,
    SLICE,
    SPLIT,
    is_identity,
    slice_of,
)
from custom_quantizer.ops.pool import (
    ADAPTIVE_AVG_POOL,
    AVG_POOL,
    MAX_POOL,
    adaptive_kernel,
    counts_padding,
    is_global_pool,
    pool_window,
    spatial_mean_dims,
)

__all__ = ["ORIGIN", "PASSES", "GraphPass", "origin_of", "run_passes"]

aten = torch.ops.aten

ORIGIN = "custom_quantizer_op"
"""Key in ``node.meta["custom"]``: name of the converted graph's op a node stands for."""


@dataclass(frozen=True)
class GraphPass:
    """One rewrite.

    Attributes:
        name: shown in errors and in the lowering report.
        before: what the pass looks for.
        after: what holds when it is done.
        run: applies it; returns how many places it changed.
        exact: every integer of the result stays the same.
    """

    name: str
    before: str
    after: str
    run: Callable[[GraphModule], int]
    exact: bool = True


def origin_of(node: Node) -> str | None:
    """Name of the converted op a node stands for, across export and edge passes.

    A node that stands for several names them all, separated by commas.
    """
    custom = node.meta.get("custom")
    return cast("str | None", custom.get(ORIGIN)) if isinstance(custom, dict) else None


def _set_origin(node: Node, name: str) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), ORIGIN: name}


def run_passes(model: GraphModule) -> dict[str, int]:
    """Apply all passes to ``model`` in place.

    Returns:
        Pass name -> number of places changed, for the passes that changed any.

    Raises:
        LoweringError: a pass met a graph it does not understand; the pass is named.
    """
    for node in model.graph.nodes:
        if node.op == "call_function" and not (is_quantize(node) or is_dequantize(node)):
            _set_origin(node, node.name)
    applied: dict[str, int] = {}
    for graph_pass in PASSES:
        try:
            changed = graph_pass.run(model)
        except CustomQuantizerError:
            raise
        except Exception as error:
            raise LoweringError(
                f"pass {graph_pass.name} ({graph_pass.before}) failed: {error}"
            ) from error
        if changed:
            applied[graph_pass.name] = changed
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return applied


# ---------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------


class _Builder:
    """Inserts nodes before ``anchor`` on behalf of the op ``origin``, with fake values."""

    def __init__(self, model: GraphModule, anchor: Node, origin: str | None = None) -> None:
        self.model = model
        self.anchor = anchor
        self.origin = origin or origin_of(anchor) or anchor.name

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call; its fake value is computed where its inputs have one."""
        with self.model.graph.inserting_before(self.anchor):
            node = self.model.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = self.anchor.meta.get("nn_module_stack", {})
        if "val" not in node.meta and target not in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR):
            node.meta["val"] = _fake(target, args, kwargs)
            _set_origin(node, self.origin)
        return node

    def requantized(self, value: Node, like: Node) -> Node:
        """Quantize ``value`` with the parameters of the q/dq node ``like``, and dequantize it."""
        params = like.args[1:]
        quantized = self.call(QUANTIZE_PER_TENSOR, value, *params)
        return self.call(DEQUANTIZE_PER_TENSOR, quantized, *params)


def _fake(target: Any, args: Any, kwargs: Any) -> Any:
    def value(node: Node) -> Any:
        meta = tensor_meta(node)
        return node.meta.get("val") if meta is None else meta

    mapped = torch.fx.node.map_arg(args, value)
    tensors = [a for a in torch.utils._pytree.tree_leaves(mapped) if isinstance(a, Tensor)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    if mode is None:
        return None
    with mode:
        return target(*mapped, **kwargs)


def _calls(model: GraphModule, targets: frozenset[Any]) -> list[Node]:
    """Calls of the targets, without tensors that are written in place: those stay views."""
    return [
        n
        for n in model.graph.nodes
        if n.op == "call_function" and n.target in targets and overwritten_by(n) is None
    ]


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _quantized_neighbours(node: Node) -> tuple[Node, Node] | None:
    """``(dequantize before, quantize after)`` of an op on one quantized tensor."""
    source = node.args[0]
    users = effective_users(node)
    if isinstance(source, Node) and is_dequantize(source) and len(users) == 1:
        (after,) = users
        if is_quantize(after):
            return source, after
    return None


# ---------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------


def _drop_checks(model: GraphModule) -> int:
    """Input guards and metadata assertions: shapes are fixed by export again."""
    doomed = [
        node
        for node in model.graph.nodes
        if node.target == "_guards_fn"
        or node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
    ]
    for node in reversed(doomed):
        model.graph.erase_node(node)
    return len(doomed)


def _fold_bias(model: GraphModule) -> int:
    """An integer bias becomes the float constant that the serializer turns into the same integers.

    The constant is ``q * s_b`` rounded once; up to ``COMFORTABLE_BIAS`` the serializer's float32
    quantization returns ``q``.
    """
    count = 0
    for node in _calls(model, _GEMMS):
        bias = argument(node, 2, "bias")
        if not (is_dequantize(bias) and is_constant(bias.args[0])):
            continue
        integers = constant_of(model, bias.args[0]).to(torch.float64)
        derived = torch.as_tensor(qparams_of(model, bias).scale)
        if not _is_wide_gemm(node):
            # A narrow bias is shifted into place: its scale is the accumulator's times 2**k.
            unit = _serializer_scale(model, node)
            integers = integers * torch.round(derived.to(torch.float64) / unit)
            derived = unit
        value = (integers * derived.to(torch.float64)).to(torch.float32)
        constant = add_constant(model, f"{bias.args[0].target}_folded", value, node)
        node.replace_input_with(bias, constant)
        count += 1
    return count


def _stored_bits(node: Node) -> int:
    """Width of the integers of a static quantize or dequantize node."""
    return int(cast(int, node.args[-2])).bit_length() + 1


def _is_wide(node: object) -> bool:
    """Whether a quantize or dequantize node is above 8 bits, so that no int8 kernel takes it."""
    return (
        isinstance(node, Node)
        and (is_quantize(node) or is_dequantize(node))
        and isinstance(node.args[-2], int)
        and _stored_bits(node) > 8
    )


def _is_wide_gemm(node: Node) -> bool:
    return _is_wide(node.args[0]) or _is_wide(node.args[1])


def _serializer_scale(model: GraphModule, node: Node) -> Tensor:
    """The bias scale as ExecuTorch's serializer computes it, in float64."""
    weight, data = cast(Node, node.args[1]), cast(Node, node.args[0])
    if not is_dequantize(weight) or not is_dequantize(data):
        raise LoweringError(f"{describe(node)} has an integer bias but a float weight or input")
    input_scale = cast(float, qparams_of(model, data).scale)
    weight_scale = qparams_of(model, weight).scale
    if isinstance(weight_scale, float):
        # Per tensor, upstream multiplies two Python floats.
        return torch.tensor(weight_scale * input_scale, dtype=torch.float64)
    rule = CONV_TRANSPOSE if node.target in CONV_TRANSPOSE.targets else CONV
    bound = rule.bind(rule, node)
    product = weight_scale.to(torch.float32) * torch.tensor(input_scale, dtype=torch.float32)
    if not isinstance(bound, str):
        product = expand_channels(product, bound)
    return product.to(torch.float64)


def _drop_identities(model: GraphModule) -> int:
    """Dropout, clone, contiguous and the like: their users read their input."""
    count = 0
    for node in list(model.graph.nodes):
        noop = node.op == "call_function" and is_identity(node)
        noop = noop or (
            node.op == "call_function"
            and node.target in EXPAND.targets | RESHAPE.targets | ADAPTIVE_AVG_POOL.targets
            and _same_shape(node)
        )
        if not noop or not isinstance(node.args[0], Node) or overwritten_by(node) is not None:
            continue
        around = _quantized_neighbours(node)
        if around is not None and around[0].args[1:] == around[1].args[1:]:
            before, after = around
            after.replace_all_uses_with(cast(Node, before.args[0]))
            model.graph.erase_node(after)
            model.graph.erase_node(node)
            count += 1
        elif not is_dequantize(node.args[0]) or around is None or is_identity(node):
            meta, source = tensor_meta(node), tensor_meta(node.args[0])
            if meta is not None and source is not None and meta.dtype != source.dtype:
                continue
            _replace(node, node.args[0])
            count += 1
    return count


def _same_shape(node: Node) -> bool:
    if not isinstance(node.args[0], Node):
        return False
    if node.target in ADAPTIVE_AVG_POOL.targets and adaptive_kernel(node) != (1, 1):
        return False
    meta, source = tensor_meta(node), tensor_meta(node.args[0])
    return meta is not None and source is not None and tuple(meta.shape) == tuple(source.shape)


def _splits_to_slices(model: GraphModule) -> int:
    """chunk, split and unbind become one slice a piece (and a reshape, for unbind)."""
    count = 0
    for node in _calls(model, SPLIT.targets):
        source = cast(Node, node.args[0])
        pieces = node.meta["val"]
        rank = len(shape_of(source))
        unbind = node.target is aten.unbind.int
        dim = int(argument(node, 1 if unbind else 2, "dim", 0)) % rank
        starts, offset = [], 0
        for piece in pieces:
            starts.append(offset)
            offset = offset + (1 if unbind else piece.shape[dim])
        for user in list(node.users):
            index = cast(int, user.args[1])
            size = 1 if unbind else pieces[index].shape[dim]
            build = _Builder(model, user, origin_of(user))
            start = starts[index]
            taken = build.call(aten.slice.Tensor, source, dim, start, start + size)
            if unbind:
                taken = _then(build, source, taken, aten.squeeze.dim, dim)
            _replace(user, taken)
        model.graph.erase_node(node)
        count += 1
    return count


def _then(build: _Builder, source: Node, value: Node, target: Any, *args: Any) -> Node:
    """Apply a second mover to ``value``; between two movers of integers stands a q/dq pair."""
    if is_dequantize(source):
        value = build.requantized(value, source)
    return build.call(target, value, *args)


def _selects_to_slices(model: GraphModule) -> int:
    """Select becomes slice and reshape."""
    targets = _calls(model, SELECT.targets)
    for node in targets:
        source = cast(Node, node.args[0])
        shape = shape_of(source)
        dim = int(cast(int, node.args[1])) % len(shape)
        index = cast(int, node.args[2])
        start = index + shape[dim] if index < 0 else index
        build = _Builder(model, node)
        taken = build.call(aten.slice.Tensor, source, dim, start, start + 1)
        _replace(node, _then(build, source, taken, aten.squeeze.dim, dim))
    return len(targets)


def _reshapes_to_views(model: GraphModule) -> int:
    """All reshapes become view_copy, with at most one dynamic size.

    Unlike a view, it takes any strides: the ``contiguous`` before a view may be gone by now.
    """
    count = 0
    for node in _calls(model, RESHAPE.targets):
        shape = list(shape_of(node))
        dynamic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        if len(dynamic) > 1:
            continue
        sizes = [-1 if i in dynamic else int(size) for i, size in enumerate(shape)]
        build = _Builder(model, node)
        _replace(node, build.call(aten.view_copy.default, node.args[0], sizes))
        count += 1
    return count


def _strided_slices_to_convs(model: GraphModule) -> int:
    """A strided slice of an image is a depthwise 1x1 convolution with weights 1 and that stride.

    With equal input and output scale the requantization multiplier is exactly 1, so every integer
    arrives unchanged. Neighbouring slices of height and width become one convolution.
    """
    count = 0
    taken: set[Node] = set()
    for node in _calls(model, SLICE.targets):
        around = _quantized_neighbours(node) if node not in taken else None
        shape = shape_of(node) if around is not None else ()
        if around is None or len(shape) != 4:
            continue
        dim, start, stop, step = slice_of(node)
        channels = shape[1]
        if step == 1 or dim not in (2, 3) or not isinstance(channels, int):
            continue
        before, after = around
        build = _Builder(model, node)
        source = before
        size = shape_of(before)[dim]
        if start != 0 or (isinstance(size, int) and stop != size):
            cut = build.call(aten.slice.Tensor, before, dim, start, stop)
            source = build.requantized(cut, before)
        stride = [1, 1]
        stride[dim - 2] = step
        # The next slice takes the other dim at once.
        follower = _next_strided_slice(after, 5 - dim)
        if follower is not None:
            next_node, after, stride[3 - dim] = follower
            taken.add(next_node)
            build.origin = f"{build.origin},{next_node.name}"
        conv = _identity_conv(build, source, channels, stride)
        after.args = (conv, *after.args[1:])
        count += 1
    model.graph.eliminate_dead_code()
    return count


def _next_strided_slice(quantize: Node, dim: int) -> tuple[Node, Node, int] | None:
    """The strided slice of ``dim`` that is the only use of a quantized tensor."""
    users = list(quantize.users)
    if len(users) != 1 or not is_dequantize(users[0]) or len(users[0].users) != 1:
        return None
    (node,) = users[0].users
    if node.target not in SLICE.targets:
        return None
    around = _quantized_neighbours(node)
    if around is None:
        return None
    found, start, stop, step = slice_of(node)
    size = shape_of(cast(Node, node.args[0]))[dim]
    if found != dim or step == 1 or start != 0 or (isinstance(size, int) and stop != size):
        return None
    return node, around[1], step


def _identity_conv(build: _Builder, source: Node, channels: int, stride: Sequence[int]) -> Node:
    """Depthwise 1x1 convolution whose weights are the integer 1 at scale 1."""
    prefix = f"{build.origin}_identity"
    if _is_wide(source):
        ones = torch.ones(channels, 1, 1, 1)
        weight = add_constant(build.model, f"{prefix}_float", ones, build.anchor)
        return build.call(
            aten.conv2d.default, source, weight, None, list(stride), [0, 0], [1, 1], channels
        )
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.int8)
    weight = add_constant(build.model, f"{prefix}_integers", ones, build.anchor)
    dequantized = build.call(DEQUANTIZE_PER_TENSOR, weight, 1.0, 0, -127, 127, torch.int8)
    if (meta := weight.meta.get("val")) is not None:
        dequantized.meta["val"] = meta.to(torch.float32)
    return build.call(
        aten.conv2d.default, source, dequantized, None, list(stride), [0, 0], [1, 1], channels
    )


def _expands_to_cats(model: GraphModule) -> int:
    """Expanding an int8 tensor becomes repeated concatenation: XNNPACK has no expand."""
    count = 0
    for node in _calls(model, EXPAND.targets):
        source = node.args[0]
        if not isinstance(source, Node) or not is_dequantize(source):
            continue
        old, new = shape_of(source), shape_of(node)
        if not all(isinstance(s, int) for s in (*old, *new)) or len(old) > len(new):
            continue
        build = _Builder(model, node)
        value = source
        if len(old) < len(new):
            padded = [1] * (len(new) - len(old)) + list(old)
            viewed = build.call(aten.view.default, value, padded)
            old, value = tuple(padded), build.requantized(viewed, source)
        dims = [d for d in range(len(new)) if old[d] != new[d]]
        if not dims or any(new[d] > _MAX_REPEATS for d in dims):
            continue
        result = value
        for position, dim in enumerate(dims):
            result = build.call(aten.cat.default, [value] * int(new[dim]), dim)
            if position + 1 < len(dims):
                value = build.requantized(result, source)
        _replace(node, result)
        count += 1
    return count


_MAX_REPEATS = 64


def _means_keep_dims(model: GraphModule) -> int:
    """A spatial mean that drops its dims keeps them and is viewed without: XNNPACK wants so."""
    count = 0
    for node in _calls(model, frozenset({aten.mean.dim})):
        found = spatial_mean_dims(node)
        around = _quantized_neighbours(node)
        if found is None or (found[1] and list(cast(Any, node.args[1])) == [2, 3]):
            continue
        build = _Builder(model, node)
        mean = build.call(aten.mean.dim, node.args[0], [2, 3], True)
        if not found[1]:
            if around is not None:
                mean = build.requantized(mean, around[1])
            shape = [s if isinstance(s, int) else -1 for s in shape_of(node)]
            mean = build.call(aten.view.default, mean, shape)
        _replace(node, mean)
        count += 1
    return count


def _simplify_pools(model: GraphModule) -> int:
    """Adaptive pooling over equal windows is pooling; counted padding is an explicit pad."""
    count = 0
    for node in _calls(model, ADAPTIVE_AVG_POOL.targets):
        kernel = adaptive_kernel(node)
        if is_global_pool(node) or kernel is None:
            continue
        if kernel == (1, 1):
            _replace(node, cast(Node, node.args[0]))
        else:
            build = _Builder(model, node)
            pooled = build.call(aten.avg_pool2d.default, node.args[0], list(kernel), list(kernel))
            _replace(node, pooled)
        count += 1
    for node in _calls(model, AVG_POOL.targets):
        if not counts_padding(node):
            continue
        kernel, stride, (vertical, horizontal) = pool_window(node)
        build = _Builder(model, node)
        pads = [horizontal, horizontal, vertical, vertical]
        padded = build.call(aten.constant_pad_nd.default, node.args[0], pads, 0.0)
        pooled = build.call(aten.avg_pool2d.default, padded, list(kernel), list(stride))
        _replace(node, pooled)
        count += 1
    return count


def _split_sparse_max_pools(model: GraphModule) -> int:
    """A max pool that skips rows pools densely first, then takes a strided slice."""
    count = 0
    for node in _calls(model, MAX_POOL.targets):
        kernel, stride, padding = pool_window(node)
        around = _quantized_neighbours(node)
        if around is None or not any(s > k for s, k in zip(stride, kernel, strict=True)):
            continue
        if argument(node, 5, "ceil_mode", False):
            continue
        build = _Builder(model, node)
        dilation = argument(node, 4, "dilation", 1)
        value = cast(Node, node.args[0])
        if kernel != (1, 1):
            value = build.call(
                aten.max_pool2d.default, value, list(kernel), [1, 1], list(padding), dilation
            )
            value = build.requantized(value, around[0])
        for dim in (2, 3):
            step = stride[dim - 2]
            if step > 1:
                end = 9223372036854775807
                value = build.call(aten.slice.Tensor, value, dim, 0, end, step)
                value = build.requantized(value, around[0])
        # The last dequantize goes back to where the op's quantize node expects a real tensor.
        _replace(node, value)
        count += 1
    return count


def _split_activations(model: GraphModule) -> int:
    """An activation that XNNPACK cannot fuse clamps the quantized result instead.

    Rounding is monotone, so clamping before or after it gives the same integers.
    """
    count = 0
    fused_by_xnnpack = {(aten.add.Tensor, "relu")}
    for node in _calls(model, RELU.targets | CLAMP.targets):
        source = node.args[0]
        if not isinstance(source, Node) or source.target not in (
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
        ):
            continue
        family = "relu" if node.target in RELU.targets else "clamp"
        users = effective_users(node)
        integer = all(is_dequantize(arg) and not _is_wide(arg) for arg in source.all_input_nodes)
        if (source.target, family) in fused_by_xnnpack or not integer:
            continue
        if len(users) != 1 or not is_quantize(users[0]) or len(source.users) != 1:
            continue
        build = _Builder(model, node)
        node.replace_input_with(source, build.requantized(source, users[0]))
        count += 1
    return count


def _clamps_to_hardtanh(model: GraphModule) -> int:
    """Every clamp that follows a GEMM becomes hardtanh or relu, the two that XNNPACK fuses."""
    count = 0
    bounds_of = cast(Callable[[Node], tuple[float | None, float | None]], CLAMP.bounds)
    for node in _calls(model, CLAMP.targets - {aten.hardtanh.default}):
        low, high = bounds_of(node)
        build = _Builder(model, node)
        if low == 0.0 and high is None:
            new = build.call(aten.relu.default, node.args[0])
        else:
            # An open side is closed beyond what float32 activations reach.
            limit = float(torch.finfo(torch.float32).max)
            new = build.call(
                aten.hardtanh.default,
                node.args[0],
                -limit if low is None else low,
                limit if high is None else high,
            )
        _replace(node, new)
        count += 1
    return count


def _dedicate_dequantize(model: GraphModule) -> int:
    """Each use of a quantized tensor gets a dequantize node of its own.

    A shared one fails at load when an int8 and a float op read it, and can make partitions cyclic.
    """
    count = 0
    for node in list(model.graph.nodes):
        if not is_dequantize(node):
            continue
        for user in list(node.users)[1:]:
            with model.graph.inserting_before(user):
                copy = model.graph.node_copy(node)
            user.replace_input_with(node, copy)
            count += 1
    # The partitioner counts the distinct inputs of a cat, and refuses a single one.
    for node in _calls(model, CAT.targets):
        inputs = list(cast("Sequence[Node]", node.args[0]))
        for i, source in enumerate(inputs):
            if source in inputs[:i] and is_dequantize(source):
                with model.graph.inserting_before(node):
                    inputs[i] = model.graph.node_copy(source)
                count += 1
        node.args = (inputs, *node.args[1:])
    return count


def _quantize_pads(model: GraphModule) -> int:
    """A pad of a quantized tensor that float ops read is quantized at once, which is exact.

    ExecuTorch's InsertPadQDQPass (1.5.1) takes any pad behind a dequantize node for one before a
    convolution and writes a node with an int8 output and a float input, which fails at load.
    """
    count = 0
    for node in _calls(model, PAD.targets):
        source = node.args[0]
        if not isinstance(source, Node) or not is_dequantize(source):
            continue
        if isinstance(PAD.bind(PAD, node), str):
            continue  # it pads with a value that the integers need not hold
        users = list(node.users)
        if any(is_quantize(user) for user in users) or not users:
            continue
        build = _Builder(model, users[0])
        repeated = build.requantized(node, source)
        for user in users:
            user.replace_input_with(node, repeated)
        count += 1
    return count


def _float_fallbacks(model: GraphModule) -> int:
    """What XNNPACK would refuse halfway is withheld: its weight becomes a float constant."""
    count = 0
    for node in _calls(model, _GEMMS):
        weight = cast(Node, node.args[1])
        if not is_dequantize(weight) or not is_constant(weight.args[0]):
            continue
        grouped = False
        if node.target in CONV_TRANSPOSE.targets:
            bound = CONV_TRANSPOSE.bind(CONV_TRANSPOSE, node)
            grouped = not isinstance(bound, str) and bound.groups > 1
        per_channel = weight.target is DEQUANTIZE_PER_CHANNEL
        bias = argument(node, 2, "bias")
        computed = bias is not None and not is_constant(bias)
        if _is_wide_gemm(node) or (grouped and per_channel) or computed:
            node.replace_input_with(weight, _dequantized_constant(model, weight, node))
            count += 1
    return count


def _dequantized_constant(model: GraphModule, dequantize: Node, before: Node) -> Node:
    """A float32 constant with the values that a dequantize node of a constant gives."""
    source = cast(Node, dequantize.args[0])
    qparams = qparams_of(model, dequantize)
    integers = constant_of(model, source).to(torch.float32) - qparams.zero_point
    scale = torch.as_tensor(qparams.scale, dtype=torch.float32)
    if qparams.axis is not None:
        shape = [1] * integers.dim()
        shape[qparams.axis] = -1
        scale = scale.reshape(shape)
    return add_constant(model, f"{source.target}_float", integers * scale, before)


# ---------------------------------------------------------------------------------------------
# Widths other than 8
# ---------------------------------------------------------------------------------------------

_GEMMS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets


def _weight_containers(model: GraphModule) -> int:
    """Weights of 2 to 7 bits are declared int8, those of linear layers up to 4 bits packed int4.

    To XNNPACK the range [-8, 7] per channel means "packed 4-bit"; it must not see it on anything
    but a linear layer with an even number of input features.
    """
    count = 0
    for node in _calls(model, _GEMMS):
        weight = cast(Node, node.args[1])
        if weight.target is DEQUANTIZE_GROUPED:
            weight.args = (*weight.args[:5], -8, 7, *weight.args[7:])
            count += 1
            continue
        if not is_dequantize(weight) or not is_constant(weight.args[0]) or _is_wide(weight):
            continue
        bits = _stored_bits(weight)
        data = node.args[0]
        dynamic = isinstance(data, Node) and data.target is DEQUANTIZE_DYNAMIC
        spread = dynamic and weight.target is DEQUANTIZE_PER_TENSOR
        if bits == 8 and not spread:
            continue
        integers = constant_of(model, cast(Node, weight.args[0]))
        pack = node.target in LINEAR.targets and bits <= 4 and integers.shape[1] % 2 == 0
        low, high = (-8, 7) if pack else (-128, 127)
        args = (*weight.args[:-3], low, high, torch.int8)
        target: Any = weight.target
        if (pack or spread) and target is DEQUANTIZE_PER_TENSOR:
            # These kernels want one scale a channel: the same one for all.
            prefix = str(cast(Node, weight.args[0]).target)
            scales = torch.full((integers.shape[0],), cast(float, weight.args[1]))
            zeros = torch.zeros(integers.shape[0], dtype=torch.int64)
            target = DEQUANTIZE_PER_CHANNEL
            args = (
                weight.args[0],
                add_constant(model, f"{prefix}_scales", scales, node),
                add_constant(model, f"{prefix}_zeros", zeros, node),
                0,
                low,
                high,
                torch.int8,
            )
        with model.graph.inserting_before(node):
            declared = model.graph.call_function(target, args)
        declared.meta.update(weight.meta)
        node.replace_input_with(weight, declared)
        count += 1
    return count


def _narrow_activations(model: GraphModule) -> int:
    """Activations below 8 bits run on int8 kernels that clamp to the narrower range."""
    count = 0
    for node in list(model.graph.nodes):
        if node.target is not QUANTIZE_PER_TENSOR or node.args[-1] != torch.int8:
            continue
        low, high = cast(int, node.args[3]), cast(int, node.args[4])
        if (low, high) == (-128, 127):
            continue
        users = [user for user in node.users if is_dequantize(user)]
        if not _passes_on(node):
            _clamp_before(model, node, low, high)
        for declared in (node, *users):
            declared.args = (*declared.args[:3], -128, 127, torch.int8)
        count += 1
    for node in list(model.graph.nodes):
        # Constants need no clamp, only the declaration.
        if node.target is DEQUANTIZE_PER_TENSOR and is_constant(node.args[0]):
            users = list(node.users)
            if node.args[-1] == torch.int8 and not any(u.target in _GEMMS for u in users):
                node.args = (*node.args[:3], -128, 127, torch.int8)
    return count


def _passes_on(quantize: Node) -> bool:
    """Whether a quantize node repeats what is quantized already, moved but not changed."""
    mover = quantize.args[0]
    if not isinstance(mover, Node):
        return False
    rule = rule_of(mover)
    if rule is None or rule.sharing is not QParamSharing.SAME or mover.target in GETITEM.targets:
        return False
    sources = mover.all_input_nodes
    return bool(sources) and all(
        is_dequantize(source) and source.args[1:3] == quantize.args[1:3] for source in sources
    )


def _clamp_before(model: GraphModule, quantize: Node, low: int, high: int) -> None:
    source = cast(Node, quantize.args[0])
    scale, zero_point = cast(float, quantize.args[1]), cast(int, quantize.args[2])
    bottom, top = (low - zero_point) * scale, (high - zero_point) * scale
    build = _Builder(model, quantize, origin_of(source))
    rule = rule_of(source)
    if source.target in _GEMMS:
        clamped = build.call(aten.hardtanh.default, source, bottom, top)
    elif rule in (RELU, CLAMP) and cast(Node, source.args[0]).target in _GEMMS:
        bounds = cast(Callable[[Node], tuple[float | None, float | None]], cast(Any, rule).bounds)
        lower, upper = bounds(source)
        bottom = bottom if lower is None else max(bottom, lower)
        top = top if upper is None else min(top, upper)
        clamped = build.call(aten.hardtanh.default, source.args[0], bottom, top)
    else:
        params = (scale, zero_point, -128, 127, torch.int8)
        stored = build.call(QUANTIZE_PER_TENSOR, source, *params)
        wide = build.call(DEQUANTIZE_PER_TENSOR, stored, *params)
        clamped = build.call(aten.hardtanh.default, wide, bottom, top)
    quantize.args = (clamped, *quantize.args[1:])


def _emulate_wide(model: GraphModule) -> int:
    """Quantization above 8 bits becomes float ops that round to the same grid.

    ``clamp(floor(x * (1 / s) + 0.5), quant_min, quant_max) * s``: XNNPACK has kernels for each in
    float, so the op and its neighbours stay in one delegate. Ties round up instead of to even.
    """
    count = 0
    constants: dict[tuple[float, ...], Node] = {}
    for node in list(model.graph.nodes):
        if node.target is DEQUANTIZE_PER_TENSOR and _is_wide(node) and is_constant(node.args[0]):
            node.replace_all_uses_with(_dequantized_constant(model, node, node))
            count += 1
        if node.target is not QUANTIZE_PER_TENSOR or not _is_wide(node):
            continue
        value = cast(Node, node.args[0])
        if not _passes_on(node):
            value = _round_to_grid(model, node, value, constants)
        for user in list(node.users):
            user.replace_all_uses_with(value)
        count += 1
    model.graph.eliminate_dead_code()
    return count


def _round_to_grid(
    model: GraphModule, node: Node, value: Node, constants: dict[tuple[float, ...], Node]
) -> Node:
    scale = cast(float, node.args[1])
    low, high = cast(int, node.args[3]), cast(int, node.args[4])
    build = _Builder(model, node, origin_of(value))
    single = torch.tensor([scale], dtype=torch.float32)
    scaled = build.call(aten.mul.Tensor, value, _number(build, 1.0 / single, constants))
    shifted = build.call(aten.add.Tensor, scaled, _number(build, torch.tensor([0.5]), constants))
    floored = build.call(aten.floor.default, shifted)
    clamped = build.call(aten.hardtanh.default, floored, float(low), float(high))
    return build.call(aten.mul.Tensor, clamped, _number(build, single, constants))


def _number(build: _Builder, value: Tensor, constants: dict[tuple[float, ...], Node]) -> Node:
    key = tuple(value.tolist())
    if key not in constants:
        first = next(iter(build.model.graph.nodes))
        constants[key] = add_constant(build.model, "emulation_constant", value, first)
        if "val" not in constants[key].meta:
            constants[key].meta["val"] = _like(build.anchor, value)
    return constants[key]


def _like(node: Node, value: Tensor) -> Any:
    for other in node.graph.nodes:
        meta = tensor_meta(other)
        mode = getattr(meta, "fake_mode", None)
        if mode is not None:
            return mode.from_tensor(value, static_shapes=True)
    return None


PASSES: tuple[GraphPass, ...] = (
    GraphPass("drop_checks", "guards and assertions", "only tensor ops are left", _drop_checks),
    GraphPass(
        "fold_bias",
        "integer biases",
        "float constants that serialize to the same integers",
        _fold_bias,
    ),
    GraphPass(
        "float_fallbacks",
        "quantized ops without a kernel",
        "the same ops with float constants",
        _float_fallbacks,
    ),
    GraphPass(
        "weight_containers",
        "weights of 2 to 7 bits",
        "packed int4 for linear layers, int8 elsewhere",
        _weight_containers,
    ),
    GraphPass("simplify_pools", "adaptive and padded pools", "plain pools", _simplify_pools),
    GraphPass("drop_identities", "ops that change nothing", "none are left", _drop_identities),
    GraphPass("splits_to_slices", "splits", "slices", _splits_to_slices),
    GraphPass("selects_to_slices", "selects", "slices and reshapes", _selects_to_slices),
    GraphPass(
        "split_sparse_max_pools",
        "max pools with stride > kernel",
        "dense max pools and strided slices",
        _split_sparse_max_pools,
    ),
    GraphPass(
        "strided_slices_to_convs",
        "strided slices of images",
        "depthwise 1x1 convolutions",
        _strided_slices_to_convs,
    ),
    GraphPass("expands_to_cats", "expands", "concatenations", _expands_to_cats),
    GraphPass("means_keep_dims", "means that drop dims", "means that keep them", _means_keep_dims),
    GraphPass("reshapes_to_views", "reshapes", "view copies", _reshapes_to_views),
    GraphPass(
        "split_activations",
        "activations after add, sub, mul",
        "clamps of integers",
        _split_activations,
    ),
    GraphPass(
        "narrow_activations",
        "activations of 2 to 7 bits",
        "int8 with a clamp",
        _narrow_activations,
    ),
    GraphPass(
        "emulate_wide",
        "quantization above 8 bits",
        "float ops that round to the same grid, ties up instead of to even",
        _emulate_wide,
        exact=False,
    ),
    GraphPass("clamps_to_hardtanh", "clamps", "hardtanh or relu", _clamps_to_hardtanh),
    GraphPass("quantize_pads", "pads between int8 and float", "pads of integers", _quantize_pads),
    GraphPass(
        "dedicate_dequantize",
        "shared dequantize nodes",
        "one dequantize node a use",
        _dedicate_dequantize,
    ),
)
