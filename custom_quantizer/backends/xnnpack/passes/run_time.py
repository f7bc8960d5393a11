"""What lies before a quantization at run time, as ExecuTorch's passes want it.

XNNPACK's images are stored with their channels last. ExecuTorch (1.5.1,
``ChannelsLastTaggedReshapePass``) inserts the copies between that order and the model's, and does
so wrongly in two places if the scale is chosen at run time:

- Before a convolution it looks for the tensor to copy along the first argument of whatever it
  finds, past the float ops that made the image, up to an input of the delegate, and gives the copy
  to all who read that. The program then fails to load, or computes with a transposed image.
- Before a linear layer it puts the copy between the quantization and the layer, which then no
  longer is a quantized one.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import Builder, calls, graph_pass
from custom_quantizer.core.graph import (
    DEQUANTIZE_DYNAMIC,
    add_constant,
    is_dequantize,
    is_quantize,
    shape_of,
    view_sizes,
)
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, symmetric_padding
from custom_quantizer.ops.movement import CAT
from custom_quantizer.ops.pool import AVG_POOL, MAX_POOL

aten = torch.ops.aten


@graph_pass(
    "layers over the last of four dims whose input is quantized at run time",
    "layers of a matrix",
    requires={"dedicate_run_time"},
)
def flatten_rows(model: GraphModule) -> int:
    """A linear layer reads a matrix, so that what is copied to the model's order is in float.

    Each row has a scale of its own, which it keeps.
    """
    count = 0
    for node in calls(model, LINEAR.targets):
        data = cast(Node, node.args[0])
        if data.target is not DEQUANTIZE_DYNAMIC:
            continue
        source = source_of_rows(data)
        shape = shape_of(source)
        back = view_sizes(shape_of(node))
        if len(shape) != 4 or not isinstance(shape[3], int) or back.count(-1) > 1:
            continue
        build = Builder(model, node)
        rows = build.call(aten.view_copy.default, source, [-1, shape[3]])
        layer = build.call(node.target, quantized_again(build, data, rows), *node.args[1:])
        result = build.call(aten.view_copy.default, layer, back)
        node.replace_all_uses_with(result)
        model.graph.erase_node(node)
        count += 1
    return count


@graph_pass(
    "convolutions with unequal padding whose input is quantized at run time",
    "pads in float before what is quantized",
    requires={"dedicate_run_time"},
)
def pad_images(model: GraphModule) -> int:
    """An image is padded before its scale is chosen, which zeros do not change.

    ExecuTorch (1.5.1, ``InsertPadQDQPass``) would put the pad behind the quantization, and the
    convolution would no longer be a quantized one.
    """
    count = 0
    for node in calls(model, CONV.targets):
        data = cast(Node, node.args[0])
        if data.target is not DEQUANTIZE_DYNAMIC:
            continue
        before, after = symmetric_padding(node)
        if before == after:
            continue
        source = source_of_rows(data)
        # Of the last dim first.
        sides = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
        build = Builder(model, node)
        image = build.call(aten.constant_pad_nd.default, source, sides)
        node.target = aten.conv2d.default
        node.replace_input_with(data, quantized_again(build, data, image))
        node.update_arg(4, [0] * len(before))
        count += 1
    return count


@graph_pass(
    "images of another order that are quantized at run time",
    "images behind a prelu with slopes of one",
    requires={"dedicate_run_time", "pad_images"},
)
def order_images(model: GraphModule) -> int:
    """A prelu with slopes of one, which changes no bit, makes an image channels last in float."""
    count = 0
    for node in calls(model, CONV.targets):
        data = cast(Node, node.args[0])
        if data.target is not DEQUANTIZE_DYNAMIC or len(shape_of(data)) != 4:
            continue
        source = source_of_rows(data)
        own = set(_quantization(data))
        given = source.op == "placeholder" and own.issuperset(source.users)
        channels = shape_of(source)[1]
        if given or _is_channels_last(source) or not isinstance(channels, int):
            continue
        build = Builder(model, node)
        slopes = add_constant(model, f"{node.name}_slopes", torch.ones(channels), _first(model))
        image = build.call(aten.prelu.default, source, slopes)
        node.replace_input_with(data, quantized_again(build, data, image))
        count += 1
    return count


def source_of_rows(data: Node) -> Node:
    """The floats that a dequantize node stands for."""
    return cast(Node, cast(Node, data.args[0]).args[0])


def _quantization(data: Node) -> tuple[Node, Node]:
    """What chooses the scale of a dequantize node, and what quantizes with it."""
    quantize = cast(Node, data.args[0])
    return cast(Node, cast(Node, quantize.args[1]).args[0]), quantize


def quantized_again(build: Builder, data: Node, source: Node) -> Node:
    """Quantize ``source`` as it was done for ``data``, and dequantize it."""
    choose, quantize = _quantization(data)
    chosen = build.call(choose.target, source, *choose.args[1:])
    scale, zero_point = (build.call(operator.getitem, chosen, i) for i in range(2))
    integers = build.call(quantize.target, source, scale, zero_point, *quantize.args[3:])
    return build.call(data.target, integers, scale, zero_point, *data.args[3:])


_ALWAYS_LAST = (
    CONV.targets
    | CONV_TRANSPOSE.targets
    | MAX_POOL.targets
    | AVG_POOL.targets
    | {aten.upsample_bilinear2d.vec, aten.prelu.default}
)
"""Ops whose four-dim results have their channels last."""

KEEP_ORDER = (
    RELU.targets | CLAMP.targets | ADD.targets | SUB.targets | MUL.targets | CAT.targets
) | {aten.hardswish.default, aten.sigmoid.default, aten.tanh.default, aten.gelu.default}
"""Ops inside the delegate whose results are in the order of their inputs, if these have one."""


def _is_channels_last(node: Node) -> bool:
    """Whether an image surely has its channels last where it is computed."""
    waiting, seen = [node], set[Node]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if len(shape_of(source)) != 4:
            return False
        if source.target in _ALWAYS_LAST:
            continue
        if (
            source.target not in KEEP_ORDER
            and not is_quantize(source)
            and not is_dequantize(source)
        ):
            return False
        waiting += source.all_input_nodes
    return True


def _first(model: GraphModule) -> Node:
    first: Node = next(iter(model.graph.nodes))
    return first
