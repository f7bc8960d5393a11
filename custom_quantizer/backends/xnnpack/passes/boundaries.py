"""Quantize and dequantize nodes as the partitioner wants them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    GEMMS,
    Builder,
    Mark,
    calls,
    graph_pass,
    only_moves,
    origin_of,
)
from custom_quantizer.core.graph import (
    CHOOSE_QPARAMS,
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_TENSOR,
    add_constant,
    constant_of,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.attention import MATMUL
from custom_quantizer.ops.elementwise import ADD, CLAMP, RELU, SUB
from custom_quantizer.ops.functions import SOFTPLUS
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, symmetric_padding
from custom_quantizer.ops.movement import CAT, PAD

aten = torch.ops.aten

_FEW_CHANNELS = 8
"""XNNPACK moves blocks of 32x32 or 16x16 bytes, and of 8x8 or 4x4 floats: of an image of three
channels a byte takes three times as long as a float (``src/configs/transpose-config.c``)."""


@graph_pass("shared dequantize nodes", "one dequantize node a use")
def dedicate_dequantize(model: GraphModule) -> int:
    """Each use of a quantized tensor gets a dequantize node of its own.

    A shared one fails at load when an int8 and a float op read it, and can make partitions cyclic.
    """
    count = 0
    for node in list(model.graph.nodes):
        if not (is_dequantize(node) or node.target is DEQUANTIZE_GROUPED):
            continue
        for user in list(node.users)[1:]:
            with model.graph.inserting_before(user):
                copy = model.graph.node_copy(node)
            user.replace_input_with(node, copy)
            count += 1
    # The partitioner counts the distinct inputs of a cat, and refuses a single one.
    for node in calls(model, CAT.targets):
        inputs = list(cast("Sequence[Node]", node.args[0]))
        for i, source in enumerate(inputs):
            if source in inputs[:i] and is_dequantize(source):
                with model.graph.inserting_before(node):
                    inputs[i] = model.graph.node_copy(source)
                count += 1
        node.args = (inputs, *node.args[1:])
    return count


@graph_pass(
    "weights that convolutions of signals share",
    "weights of each",
    requires={"dedicate_dequantize"},
)
def dedicate_signal_weights(model: GraphModule) -> int:
    """Each convolution of signals reads weights that nothing else reads.

    ExecuTorch (1.5.1) makes it one of images and gives its weights a dim, in place: the next one
    with these weights looks like one of images already. A file holds equal bytes once.
    """
    count = 0
    for node in calls(model, _OF_SIGNALS):
        weight = cast(Node, node.args[1])
        stored = cast(Node, weight.args[0]) if is_dequantize(weight) else weight
        if not is_constant(stored) or len(stored.users) == 1:
            continue
        reader = node if weight is stored else weight
        own = add_constant(
            model, f"{stored.target}_of_{node.name}", constant_of(model, stored), reader
        )
        reader.replace_input_with(stored, own)
        count += 1
    return count


_OF_SIGNALS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default})


@graph_pass("cats of one float tensor with itself", "cats of the tensor and a view of it")
def tell_copies_apart(model: GraphModule) -> int:
    """A cat of one float tensor with itself reads a view of it too.

    The partitioner counts the distinct inputs of a cat, and refuses a single one.
    """
    count = 0
    for node in calls(model, CAT.targets):
        first, *others = cast("Sequence[Node]", node.args[0])
        meta = tensor_meta(first)
        if not others or any(other is not first for other in others) or is_dequantize(first):
            continue
        if meta is None or meta.dtype != torch.float32:
            continue
        shape = view_sizes(meta.shape)
        if shape.count(-1) > 1:
            continue
        view = Builder(model, node).call(aten.view_copy.default, first, shape)
        node.args = ([first, *(view for _ in others)], *node.args[1:])
        count += 1
    return count


@graph_pass(
    "quantizations at run time that several layers read",
    "one for each",
    requires={"dedicate_dequantize"},
)
def dedicate_run_time(model: GraphModule) -> int:
    """Each layer whose input is quantized at run time has the whole of that for itself.

    ExecuTorch's partitioner (1.5.1) makes one atom of all layers that share a scale chosen at run
    time, and begins a new delegate behind it.
    """
    count = 0
    for node in list(model.graph.nodes):
        if not is_dequantize(node) or is_static(node):
            continue
        quantize = cast(Node, node.args[0])
        chosen = cast(Node, cast(Node, quantize.args[1]).args[0])
        if not is_quantize(quantize) or len(quantize.users) == 1:
            continue
        build = Builder(model, node, origin_of(node))
        again = build.call(chosen.target, *chosen.args)
        scale, zero_point = (build.call(operator.getitem, again, i) for i in range(2))
        limits = quantize.args[3:]
        value = build.call(quantize.target, quantize.args[0], scale, zero_point, *limits)
        node.args = (value, scale, zero_point, *node.args[3:])
        count += 1
    return count


@graph_pass("moves from one scale to another", "the same integers moved, and then rescaled")
def rescale_behind_moves(model: GraphModule) -> int:
    """What moves values between integers of different scales moves those that it is given.

    The partitioner takes it for an op on integers, whatever their scales, and XNNPACK refuses to
    load that. Where tensors of different scales are joined, a product with one, which changes no
    bit, keeps the op in float.
    """
    count = 0
    one: Node | None = None
    for node in list(model.graph.nodes):
        sources = node.all_input_nodes
        if not only_moves(node) or not sources or not all(map(is_dequantize, sources)):
            continue
        grids = {source.args[1:3] for source in sources}
        for quantize in [user for user in node.users if is_quantize(user) and is_static(user)]:
            if grids == {quantize.args[1:3]}:
                continue
            build = Builder(model, quantize, origin_of(node) or node.name)
            if len(grids) == 1:
                value = build.requantized(node, sources[0])
            else:
                if one is None:
                    one = _one(model)
                value = build.call(aten.mul.Tensor, node, one)
            quantize.replace_input_with(node, value)
            count += 1
    return count


def _one(model: GraphModule) -> Node:
    return add_constant(model, "one", torch.ones(1), next(iter(model.graph.nodes)))


@graph_pass("constants that are dequantized far ahead of a sum", "dequantized before it")
def dequantize_late(model: GraphModule) -> int:
    """A constant takes memory as floats from where it is dequantized."""
    count = 0
    for node in calls(model, ADD.targets | SUB.targets):
        constants = [
            source
            for source in node.all_input_nodes
            if source.target is DEQUANTIZE_PER_TENSOR and is_constant(cast(Node, source.args[0]))
        ]
        for constant in constants[:1]:
            if constant.next is not node:
                node.prepend(constant)
                count += 1
    return count


@graph_pass("pads between int8 and float", "pads of integers")
def quantize_pads(model: GraphModule) -> int:
    """A pad of a quantized tensor that float ops read is quantized at once, which is exact.

    ExecuTorch's InsertPadQDQPass (1.5.1) takes any pad behind a dequantize node for one before a
    convolution and writes a node with an int8 output and a float input, which fails at load.
    """
    count = 0
    for node in calls(model, PAD.targets):
        source = node.args[0]
        if not isinstance(source, Node) or not is_dequantize(source):
            continue
        if isinstance(PAD.match(PAD, node), str):
            continue  # it pads with a value that the integers need not hold
        users = list(node.users)
        if any(is_quantize(user) for user in users) or not users:
            continue
        build = Builder(model, users[0])
        repeated = build.requantized(node, source)
        for user in users:
            user.replace_input_with(node, repeated)
        count += 1
    return count


@graph_pass("float convolutions next to integers", "products with one between them")
def keep_convs_float(model: GraphModule) -> int:
    """Products with one, which change no bit, between float convolutions and integers.

    ExecuTorch (1.5.1) inserts pads before convolutions with unequal padding, and moves before and
    behind those of one dimension. It takes what it inserts next to a quantize or dequantize node
    for an integer op (InsertPadQDQPass, Conv1dUnsqueezePass), and then fails on the float weight,
    or writes a program that does not load.
    """
    count = 0
    one: Node | None = None
    for node in calls(model, CONV.targets | CONV_TRANSPOSE.targets):
        if is_dequantize(node.args[1]):
            continue
        flat = len(shape_of(node)) == 3
        data = cast(Node, node.args[0])
        edges = []
        if is_dequantize(data) and (flat or _pads_unequally(node)):
            edges.append((node, data))
        if flat:
            # A clamp behind it becomes part of it.
            clamps = [u for u in node.users if u.target in RELU.targets | CLAMP.targets]
            edges += [(u, made) for made in (node, *clamps) for u in made.users if is_quantize(u)]
        if one is None and edges:
            one = _one(model)
        for reader, source in edges:
            if is_quantize(reader) and not is_static(reader):
                count += _view_for_run_time(model, source)
                continue
            build = Builder(model, reader, origin_of(node) or node.name)
            reader.replace_input_with(source, build.call(aten.mul.Tensor, source, one))
            count += 1
    return count


def _view_for_run_time(model: GraphModule, source: Node) -> int:
    """A view between a float tensor and its quantization at run time.

    XNNPACK takes a product there for one whose result is quantized, and refuses it.
    """
    readers = [
        user
        for user in source.users
        if user.target is CHOOSE_QPARAMS or (is_quantize(user) and not is_static(user))
    ]
    shape = view_sizes(shape_of(source))
    if not readers or shape.count(-1) > 1:
        return 0
    first = next(node for node in model.graph.nodes if node in readers)
    build = Builder(model, first, origin_of(source) or source.name)
    view = build.call(aten.view_copy.default, source, shape)
    for reader in readers:
        reader.replace_input_with(source, view)
    return 1


@graph_pass(
    "integers that products of activations and ops without a kernel of their own read",
    "products with one between them",
)
def shield_composites(model: GraphModule) -> int:
    """Products with one, which change no bit, between integers and ops that stay outside.

    An op that is made of ops may read its input twice once it is decomposed, inside the delegate
    and outside. What leaves the delegate is copied to the order of the model, and where that is a
    dequantize node ExecuTorch's ChannelsLastTaggedReshapePass (1.5.1) gives the copy to all who
    read it: those inside take it for channels last. A pad in it would meet InsertPadQDQPass, as
    above. And the partitioner takes the dequantize nodes before products of matrices for part of
    an int8 product before it refuses that; they are then missing among the delegate's results.
    """
    count = 0
    one: Node | None = None
    for node in list(model.graph.nodes):
        product = _is_dynamic_product(node)
        if not product and not _is_composite(node):
            continue
        for source in [s for s in node.all_input_nodes if is_dequantize(s)]:
            if is_constant(source.args[0]) or not (product or len(shape_of(source)) == 4):
                continue
            if one is None:
                one = _one(model)
            build = Builder(model, node, origin_of(node) or node.name)
            node.replace_input_with(source, build.call(aten.mul.Tensor, source, one))
            count += 1
    return count


_SUMMED_PRODUCTS = frozenset({aten.addmm.default, aten.baddbmm.default, aten.mv.default})


def _is_dynamic_product(node: Node) -> bool:
    """Whether a call multiplies activations and is not written as such a product."""
    if Mark.WHOLE.on(node):
        return False
    if node.target in MATMUL.targets | _SUMMED_PRODUCTS:
        return True
    if node.target not in GEMMS:
        return False
    weight = cast(Node, node.args[1])
    dequantized = is_dequantize(weight) or weight.target is DEQUANTIZE_GROUPED
    return not is_constant(weight.args[0] if dequantized else weight)


def _is_composite(node: Node) -> bool:
    """Whether a call is unknown here and no core op, so that ExecuTorch decomposes it.

    What passes have written, under names of its own, has a kernel; a view reads its input once.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if any(result.alias_info is not None for result in target._schema.returns):
        return False
    # A softplus that was not written out is left to ExecuTorch.
    ours = rule_of(node) is not None and target not in SOFTPLUS.targets
    return not (ours or torch.Tag.core in target.tags) and origin_of(node) == node.name


def _pads_unequally(node: Node) -> bool:
    if node.target not in CONV.targets:
        return False
    before, after = symmetric_padding(node)
    return before != after


@graph_pass("quantized tensors without dims", "the same integers by way of a row of one")
def quantize_scalars_as_rows(model: GraphModule) -> int:
    """A tensor without dims is quantized as a row of one.

    ExecuTorch's ChannelsLastTaggedReshapePass (1.5.1) looks for the memory format of the first
    entry of what a delegate quantizes, which such a tensor does not have.
    """
    count = 0
    for node in list(model.graph.nodes):
        if not is_quantize(node) or is_constant(node.args[0]) or not is_static(node):
            continue
        source = cast(Node, node.args[0])
        if tuple(shape_of(source)) or source.target is aten.view_copy.default:
            continue
        build = Builder(model, node, origin_of(source) or source.name)
        row = build.requantized(build.call(aten.view_copy.default, source, [1]), node)
        node.replace_input_with(source, build.call(aten.view_copy.default, row, []))
        count += 1
    return count


@graph_pass(
    "inputs of few channels that are quantized, and then put channels last",
    "the same, the other way round",
    requires={"dedicate_dequantize"},
)
def move_images_first(model: GraphModule) -> int:
    """Mark the quantize nodes of inputs that are images with few channels.

    The layout is not in the graph yet:
    :class:`~custom_quantizer.backends.xnnpack.visitors.LayoutVisitor` writes the two in this order.
    """
    count = 0
    for node in model.graph.nodes:
        if not is_quantize(node) or Mark.MOVED_FIRST.on(node):
            continue
        image = cast(Node, node.args[0])
        meta = tensor_meta(image) if image.op == "placeholder" else None
        if meta is not None and meta.dim() == 4 and 1 < meta.shape[1] <= _FEW_CHANNELS:
            Mark.MOVED_FIRST.put(node)
            count += 1
    return count
