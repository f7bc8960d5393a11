"""Weights and biases of convolutions and linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.columns import columns_of
from custom_quantizer.backends.xnnpack.grouped_convs import join_factor, joined
from custom_quantizer.backends.xnnpack.kernels import (
    is_pointwise,
    packable_features,
    pointwise_strides,
)
from custom_quantizer.backends.xnnpack.passes._pass import (
    GEMMS,
    Builder,
    Mark,
    calls,
    dequantized_constant,
    graph_pass,
    is_wide,
    is_wide_gemm,
    stored_bits,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_DYNAMIC,
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    add_constant,
    argument,
    constant_of,
    describe,
    is_constant,
    is_dequantize,
    is_static,
    qparams_of,
    set_argument,
)
from custom_quantizer.errors import LoweringError
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, expand_channels

aten = torch.ops.aten

_END = 9223372036854775807
"""Where a slice ends that goes on to the end."""


@graph_pass(
    "integer biases",
    "float constants that serialize to the same integers",
    requires={"drop_checks"},
)
def fold_bias(model: GraphModule) -> int:
    """An integer bias becomes the float constant that the serializer turns into the same integers.

    The constant is ``q * s_b`` rounded once; up to ``MAX_EXACT_BIAS`` the serializer's float32
    quantization returns ``q``.
    """
    count = 0
    for node in calls(model, GEMMS):
        bias = argument(node, 2, "bias")
        if not (is_dequantize(bias) and is_constant(bias.args[0])):
            continue
        integers = constant_of(model, bias.args[0]).to(torch.float64)
        derived = torch.as_tensor(qparams_of(model, bias).scale)
        if not is_wide_gemm(node):
            # A narrow bias is shifted into place: its scale is the accumulator's times 2**k.
            unit = _serializer_scale(model, node)
            integers = integers * torch.round(derived.to(torch.float64) / unit)
            derived = unit
        value = (integers * derived.to(torch.float64)).to(torch.float32)
        constant = add_constant(model, f"{bias.args[0].target}_folded", value, node, bias.args[0])
        node.replace_input_with(bias, constant)
        count += 1
    return count


@graph_pass(
    "float biases that quantized layers share", "a constant of each layer", requires={"fold_bias"}
)
def biases_of_each(model: GraphModule) -> int:
    """Upstream's serializer writes a constant once, in the form that its first reader wants.

    That of a layer is integers, on a scale of its own.
    """
    readers = Counter(
        node.target for node in model.graph.nodes if is_constant(node) for _ in node.users
    )
    count = 0
    for node in calls(model, GEMMS):
        bias = cast("Node | None", argument(node, 2, "bias"))
        if bias is None or not is_constant(bias) or readers[bias.target] < 2:
            continue
        data = cast(Node, node.args[0])
        if is_dequantize(data) and is_static(data):  # else the bias stays float
            value = constant_of(model, bias)
            own = add_constant(model, f"{bias.target}_{node.name}", value, node, bias)
            node.replace_input_with(bias, own)
            count += 1
    return count


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
    bound = rule.match(rule, node)
    product = weight_scale.to(torch.float32) * torch.tensor(input_scale, dtype=torch.float32)
    if not isinstance(bound, str):
        product = expand_channels(product, bound)
    return product.to(torch.float64)


@graph_pass(
    "quantized ops without a kernel", "the same ops with float constants", requires={"fold_bias"}
)
def float_fallbacks(model: GraphModule) -> int:
    """Layers that XNNPACK would take and then refuse run in float: on a constant float weight."""
    count = 0
    for node in calls(model, GEMMS):
        weight = cast(Node, node.args[1])
        if not is_dequantize(weight) or not is_constant(weight.args[0]):
            continue
        grouped = False
        if node.target in CONV_TRANSPOSE.targets:
            bound = CONV_TRANSPOSE.match(CONV_TRANSPOSE, node)
            grouped = not isinstance(bound, str) and bound.groups > 1
        per_channel = weight.target is DEQUANTIZE_PER_CHANNEL
        bias = argument(node, 2, "bias")
        computed = bias is not None and not is_constant(bias)
        if is_wide_gemm(node) or (grouped and per_channel) or computed:
            node.replace_input_with(weight, dequantized_constant(model, weight, node))
            count += 1
    return count


@graph_pass(
    "strided pointwise convolutions with weights of up to 4 bits",
    "strided slices, and pointwise convolutions",
    requires={"float_fallbacks"},
)
def thin_strided_convs(model: GraphModule) -> int:
    """The pixels that a strided pointwise convolution reads are taken first.

    What is left is a linear layer over channels, whose weights can lie two to a byte.
    """
    count = 0
    for node in calls(model, CONV.targets):
        bound = CONV.match(CONV, node)
        if isinstance(bound, str) or not is_pointwise(bound):
            continue
        data, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        strides = cast("list[int]", pointwise_strides(bound))
        constant = is_dequantize(weight) and is_constant(weight.args[0])
        if all(stride == 1 for stride in strides) or not constant or not is_dequantize(data):
            continue
        narrow = stored_bits(weight) <= 4 and not is_wide(data)
        if not narrow or data.target is DEQUANTIZE_DYNAMIC or packable_features(bound) is None:
            continue
        build = Builder(model, node)
        value = data
        for dim, stride in enumerate(strides, start=2):
            if stride > 1:
                value = build.call(aten.slice.Tensor, value, dim, 0, _END, stride)
                value = build.requantized(value, data)
        node.update_arg(0, value)
        node.update_arg(3, [1] * len(strides))
        count += 1
    return count


@graph_pass(
    "weights of 2 to 7 bits",
    "packed int4 for linear layers and pointwise convolutions, int8 elsewhere",
    requires={"float_fallbacks", "thin_strided_convs"},
)
def weight_containers(model: GraphModule) -> int:
    """Weights of 2 to 7 bits are declared int8, those of linear layers up to 4 bits packed int4.

    To XNNPACK the range [-8, 7] per channel means "packed 4-bit"; it must not see it on anything
    but a linear layer with an even number of input features. A pointwise convolution is declared
    int8, which is right for any serializer, and marked for
    :class:`~custom_quantizer.backends.xnnpack.visitors.ConvolutionVisitor`.
    """
    count = 0
    for node in calls(model, GEMMS):
        weight = cast(Node, node.args[1])
        if weight.target is DEQUANTIZE_GROUPED:
            weight.args = (*weight.args[:5], -8, 7, *weight.args[7:])
            count += 1
            continue
        if not is_dequantize(weight) or not is_constant(weight.args[0]) or is_wide(weight):
            continue
        bits = stored_bits(weight)
        data = node.args[0]
        dynamic = isinstance(data, Node) and data.target is DEQUANTIZE_DYNAMIC
        spread = dynamic and weight.target is DEQUANTIZE_PER_TENSOR
        if bits == 8 and not spread:
            continue
        integers = constant_of(model, cast(Node, weight.args[0]))
        even = bits <= 4 and integers.shape[1] % 2 == 0
        linear = even and node.target in LINEAR.targets
        pointwise = even and _is_pointwise(node, strided=not dynamic)
        pack = linear or pointwise
        stored = weight.args[0]
        if pointwise:
            Mark.PACKED.put(node)
            # Not shared with a layer that reads them otherwise.
            name = f"{cast(Node, stored).target}_packed"
            stored = add_constant(model, name, integers, node, cast(Node, stored))
        low, high = (-8, 7) if linear else (-128, 127)
        args = (stored, *weight.args[1:-3], low, high, torch.int8)
        target: Any = weight.target
        if (pack or spread) and target is DEQUANTIZE_PER_TENSOR:
            # These kernels want one scale a channel: the same one for all.
            prefix = str(cast(Node, weight.args[0]).target)
            scales = torch.full((integers.shape[0],), cast(float, weight.args[1]))
            zeros = torch.zeros(integers.shape[0], dtype=torch.int64)
            target = DEQUANTIZE_PER_CHANNEL
            args = (
                stored,
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


def _is_pointwise(node: Node, *, strided: bool) -> bool:
    bound = CONV.match(CONV, node) if node.target in CONV.targets else ""
    if isinstance(bound, str) or not is_pointwise(bound):
        return False
    strides = cast("list[int]", pointwise_strides(bound))
    return strided or all(stride == 1 for stride in strides)


@graph_pass(
    "convolutions with few channels a group",
    "the same sums in wider groups, with zeros between channels that do not meet",
    requires={"weight_containers"},
)
def join_narrow_groups(model: GraphModule) -> int:
    """Groups of few channels are joined where XNNPACK would compute mostly padding."""
    count = 0
    for node in calls(model, CONV.targets):
        data, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        constant = is_dequantize(weight) and is_constant(weight.args[0])
        bound = CONV.match(CONV, node)
        if not constant or not is_dequantize(data) or isinstance(bound, str) or is_wide_gemm(node):
            continue
        integers = constant_of(model, cast(Node, weight.args[0]))
        factor = join_factor(bound.groups, tuple(integers.shape))
        if factor == 1:
            continue
        stored = cast(Node, weight.args[0])
        wider = joined(integers, bound.groups, factor)
        wide = add_constant(model, f"{stored.target}_joined", wider, node, stored)
        with model.graph.inserting_before(node):
            dequantize = model.graph.call_function(
                cast("Callable[..., Any]", weight.target), (wide, *weight.args[1:])
            )
        dequantize.meta["val"] = wide.meta["val"].to(torch.float32) if "val" in wide.meta else None
        node.update_arg(1, dequantize)
        set_argument(node, 6, "groups", bound.groups // factor)
        count += 1
    return count


@graph_pass(
    "convolutions that step over columns of few channels",
    "the same sums over neighbouring columns as channels, with zeros where a column is not read",
    requires={"join_narrow_groups"},
)
def join_columns(model: GraphModule) -> int:
    """Mark convolutions of which XNNPACK would compute mostly padding.

    The graph stays as it is:
    :class:`~custom_quantizer.backends.xnnpack.visitors.ConvolutionVisitor` writes them so.
    """
    count = 0
    for node in calls(model, CONV.targets):
        data, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        static = is_dequantize(data) and is_static(data)
        constant = is_dequantize(weight) and is_constant(weight.args[0])
        bound = CONV.match(CONV, node)
        if not (static and constant) or isinstance(bound, str):
            continue
        if Mark.PACKED.on(node) or Mark.JOINED_COLUMNS.on(node) or is_wide_gemm(node):
            continue
        if columns_of(bound, bound.groups) is None:
            continue
        Mark.JOINED_COLUMNS.put(node)
        count += 1
    return count
