"""What XNNPACK does with each op family: its kernels, and the constraints they put on a plan.

To let XNNPACK run a family: add an entry to :data:`SUPPORT`. A family without one stays in float.
Nothing here imports executorch: plans are made without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.backends.xnnpack.arithmetic import (
    xnnpack_add_parameters,
    xnnpack_multiplier,
    xnnpack_positions,
)
from custom_quantizer.backends.xnnpack.run_time import each
from custom_quantizer.backends.xnnpack.tables import gelu_integers, silu_integers
from custom_quantizer.core.arithmetic import QParams, scale_of
from custom_quantizer.core.graph import (
    are_static,
    argument,
    dynamic_sizes,
    is_constant,
    is_dequantize,
    is_empty,
    is_float32,
    is_quantize,
    is_same_shape,
    is_sized_by_data,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.schemes import OpScheme, TensorScheme, scheme
from custom_quantizer.errors import SchemeError
from custom_quantizer.ops import (
    Formats,
    PatternMatch,
    QuantizedOp,
    Trait,
    Verdict,
    functions,
    match_of,
)
from custom_quantizer.ops._rule import ACCEPTED, refused
from custom_quantizer.ops.attention import LOG_SOFTMAX, MATMUL
from custom_quantizer.ops.backend import Delegation, Kernel, Support
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB, WHERE
from custom_quantizer.ops.embedding import EMBEDDING
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, per_dim, symmetric_padding
from custom_quantizer.ops.movement import (
    CAT,
    EXPAND,
    GETITEM,
    IDENTITY,
    PAD,
    PERMUTE,
    RESHAPE,
    SELECT,
    SLICE,
    SPLIT,
    slice_of,
)
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.pool import (
    ADAPTIVE_AVG_POOL,
    AVG_POOL,
    MAX_POOL,
    MEAN,
    adaptive_kernel,
    is_global_pool,
    pool_window,
)
from custom_quantizer.ops.resize import LAYERED, UPSAMPLE_BILINEAR, resizings_of
from custom_quantizer.ops.values import chooses_numbers

__all__ = [
    "CHAIN_LIMIT",
    "DYNAMIC_INT8",
    "EMULATED",
    "FLOAT",
    "FOLDED",
    "INT8",
    "INT8_CONTAINER",
    "LEAST_THRESHOLD",
    "MOST_DIMS",
    "PACKED_INT4",
    "PORTABLE",
    "SUPPORT",
    "TABLE",
    "WIDEST_PRODUCT",
    "are_rows",
    "can_be_batched",
    "chooses_in_steps",
    "is_pointwise",
    "matmul_batch",
    "packable_features",
    "pointwise_strides",
    "refuses_integers",
    "refuses_resize",
    "refuses_slice",
    "refuses_tensor",
]

aten = torch.ops.aten

INT8 = Kernel("xnnpack int8", Placement.INTEGER)
PACKED_INT4 = Kernel("xnnpack packed int4", Placement.INTEGER, 0.5)
INT8_CONTAINER = Kernel("xnnpack int8 container", Placement.INTEGER)
DYNAMIC_INT8 = Kernel("xnnpack dynamic int8", Placement.INTEGER)
TABLE = Kernel("xnnpack table", Placement.TABLE, 4.0, needs_integers=True)
EMULATED = Kernel("xnnpack float, int16 emulated", Placement.EMULATED, 4.0)
FLOAT = Kernel("xnnpack float", Placement.FLOAT, 4.0, needs_integers=True)
PORTABLE = Kernel(
    "portable kernel, outside the delegate", Placement.OUTSIDE, 4.0, needs_integers=True
)
FOLDED = Kernel("folded away", Placement.FOLDED, 4.0)


def _int8(_match: PatternMatch, _formats: Formats) -> Delegation:
    return Delegation(INT8)


def _always(kernel: Kernel, reason: str = "") -> Callable[[PatternMatch, Formats], Delegation]:
    return lambda _match, _formats: Delegation(kernel, reason)


def _legal(parameters: Callable[[], object]) -> Verdict:
    """Whether the parameters of a kernel can be computed; if not, why not."""
    try:
        parameters()
    except SchemeError as error:
        return refused(f"XNNPACK has no integer kernel for its scales: {error}")
    return ACCEPTED


def refuses_tensor(node: Node) -> str:
    """Why no kernel takes a tensor."""
    meta = tensor_meta(node)
    what = ""
    if is_empty(node):
        what = "elements"
    elif meta is not None and meta.dim() == 0 and not is_constant(node):
        what = "dimensions"
    elif is_sized_by_data(node):
        what = "size before its values are known"
    return f"has no {what}, and XNNPACK takes no such tensor" if what else ""


def refuses_integers(match: PatternMatch, scheme: OpScheme) -> str:
    """Why an op cannot read an input that the program takes as integers.

    Lowered by ExecuTorch 1.5.1, a convolution that quantizes such an image at run time computes
    something else, or does not load.
    """
    if match.rule is not CONV or not scheme.dynamic:
        return ""
    return (
        "its input is integers already, and convolutions choose scales at run time for float "
        "images only; a scheme with ranges from data (a8w8) takes it"
    )


# ---------------------------------------------------------------------------------------------
# Convolutions and linear layers
# ---------------------------------------------------------------------------------------------


def _accepts_gemm(match: PatternMatch, scheme: OpScheme) -> Verdict:
    meta = tensor_meta(cast(Node, match.weight))
    data = tensor_meta(match.inputs[0])
    unbatched = data is not None and meta is not None and data.dim() < meta.dim()
    if unbatched and match.rule is not LINEAR:
        return refused("its input has no batch dimension, which XNNPACK needs")
    if scheme.dynamic and match.rule is not LINEAR and (reason := _refuses_images(match)):
        return refused(f"{reason}; a scheme with ranges from data (a8w8) takes it")
    if scheme.dynamic and scheme.activation.symmetric:
        return refused(
            "XNNPACK quantizes activations at run time with a zero point only; leave out -symmetric"
        )
    group = scheme.weight.group_size
    if group is not None:
        features = int(meta.shape[1]) if meta is not None else group
        if match.rule is not LINEAR:
            return refused("weights are quantized per group in linear layers only")
        if not scheme.dynamic or scheme.weight.format.bits > 4 or group % 32:
            return refused(
                "XNNPACK runs grouped weights of up to 4 bits, in groups of a multiple of 32, with "
                "activations quantized at run time only (dyn8w4g32)"
            )
        if features % group:
            return refused(f"its {features} input features do not divide into groups of {group}")
    return ACCEPTED


def _refuses_images(match: PatternMatch) -> str:
    """Why XNNPACK does not quantize the images of a convolution itself; empty: it does."""
    meta = tensor_meta(cast(Node, match.weight))
    if match.rule is not CONV or match.groups != 1 or meta is None or meta.dim() != 4:
        return (
            "activations are quantized at run time for linear layers and for convolutions over two "
            "dims without groups only"
        )
    if meta.shape[1] == 1:
        return (
            "ExecuTorch's partitioner (1.5.1) takes a convolution of one input channel for a "
            "depthwise one, of which no activations are quantized at run time"
        )
    return ""


_LEAST_THINNED = 1 << 14
"""Weights of a strided pointwise layer from which on half a byte of each is more than copying
every other pixel takes: an op, and for each channel a weight, a scale and a bias."""


def _runs_gemm(op: QuantizedOp) -> Verdict:
    scale = cast(QParams, op.weight_qparams).scale
    given, out = scale_of(op.inputs[0]), scale_of(op.output)
    return _legal(lambda: xnnpack_multiplier(given, scale, out))


def _gemm(match: PatternMatch, formats: Formats) -> Delegation:
    bits = formats.weight_bits or 8
    if formats.dynamic:
        # The pixels of a strided one are not taken first, as they are of integers.
        layer = match.rule is LINEAR or pointwise_strides(match) == [1, 1]
        packed = bits <= 4 and layer and packable_features(match) is not None
        kernel = PACKED_INT4 if packed else DYNAMIC_INT8
        return Delegation(kernel, f"activations are quantized at run time, {each(match)}")
    per_channel = formats.granularity == "per_channel"
    if match.rule is CONV_TRANSPOSE and per_channel and match.groups > 1:
        return Delegation(
            FLOAT, "XNNPACK has no per-channel kernel for grouped transposed convolutions"
        )
    if bits == 8:
        return Delegation(INT8)
    if bits <= 4 and (match.rule is LINEAR or is_pointwise(match)):
        if packable_features(match) is not None:
            return Delegation(PACKED_INT4, f"int{bits} weights, two to a byte")
        return Delegation(
            INT8_CONTAINER,
            f"int{bits} weights stored as int8: packed 4-bit kernels are wrong on some CPUs for an "
            "odd number of input features",
        )
    return Delegation(INT8_CONTAINER, f"int{bits} weights stored as int8")


def is_pointwise(match: PatternMatch) -> bool:
    """Whether a convolution is a linear layer over channels: one tap, one group, all pixels.

    With a stride it is one over every other pixel. These are copied first, which a small weight
    does not pay for.
    """
    strides = pointwise_strides(match)
    if strides is None:
        return False
    if all(stride == 1 for stride in strides):
        return True
    sizes = shape_of(match.node)
    meta = tensor_meta(cast(Node, match.weight))
    static = len(sizes) == 4 and are_static(sizes[2:])
    return static and meta is not None and int(meta.numel()) >= _LEAST_THINNED


def pointwise_strides(match: PatternMatch) -> list[int] | None:
    """The strides of a convolution of one tap and one group without padding; ``None`` of others."""
    meta = tensor_meta(cast(Node, match.weight))
    if match.rule is not CONV or match.groups != 1 or meta is None:
        return None
    before, after = symmetric_padding(match.node)
    one_tap = all(int(size) == 1 for size in meta.shape[2:])
    # ExecuTorch's packing takes away all dims of size 1.
    if not one_tap or any(before + after) or int(meta.shape[0]) == 1:
        return None
    return per_dim(argument(match.node, 3, "stride", 1), meta.dim() - 2)


def packable_features(match: PatternMatch) -> int | None:
    """Input features of a layer if its 4-bit weights can be packed: an even number."""
    meta = tensor_meta(cast(Node, match.weight))
    features = None if meta is None else int(meta.shape[1])
    return features if features is not None and features % 2 == 0 else None


def _weight(scheme: OpScheme, match: PatternMatch) -> TensorScheme:
    """Per tensor where there is no per-channel kernel: grouped transposed convolutions."""
    weight = scheme.weight
    if weight.granularity == "per_channel" and match.weight_axis == 1 and match.groups > 1:
        return replace(weight, granularity="per_tensor")
    return weight


_GEMM = Support(
    _gemm,
    accepts=_accepts_gemm,
    runs=_runs_gemm,
    weight=_weight,
    weight_reason="one scale for all channels, since XNNPACK has no per-channel kernel for grouped "
    "transposed convolutions",
)

# ---------------------------------------------------------------------------------------------
# Sums and products of two tensors
# ---------------------------------------------------------------------------------------------


def _runs_add(op: QuantizedOp) -> Verdict:
    a, b = op.inputs
    return _legal(lambda: xnnpack_add_parameters(a, b, op.output))


def _runs_product(op: QuantizedOp) -> Verdict:
    a, b, out = (scale_of(qparams) for qparams in (*op.inputs, op.output))
    return _legal(lambda: xnnpack_multiplier(a, b, out))


def _runs_mul(op: QuantizedOp) -> Verdict:
    squared = op.match.inputs[0] is op.match.inputs[1]  # in float, at any scale
    return ACCEPTED if squared else _runs_product(op)


def _refuses_matmul(match: PatternMatch) -> str:
    left, right = match.inputs
    metas = (tensor_meta(left), tensor_meta(right))
    if any(meta is None or meta.dim() < 2 for meta in metas):
        return "one operand is a vector, which XNNPACK's batch matmul does not take"
    if left is right:
        return "both operands are the same tensor, which needs two different zero points"
    if is_constant(left):
        return "its first operand is a constant"
    if matmul_batch(match.node) is None:
        return "the batch dimensions of its operands differ"
    return ""


def matmul_batch(node: Node) -> tuple[int, ...] | None:
    """Batch dimensions that both operands of a product have; ``None``: broadcast, or a vector."""
    left, right = (shape_of(cast(Node, arg)) for arg in node.args[:2])
    batch = left[:-2]
    if min(len(left), len(right)) < 2 or not is_same_shape(batch, right[:-2]):
        return None
    return batch


def can_be_batched(node: Node) -> bool:
    """Whether views make a product of one batch dimension of it, which has at most one -1 each."""
    if len(cast("tuple[int, ...]", matmul_batch(node))) == 1:
        return True
    shapes = [shape_of(tensor) for tensor in (*cast("tuple[Node, Node]", node.args[:2]), node)]
    return all(dynamic_sizes(shape) <= 1 for shape in shapes)


MOST_DIMS = 6
"""Of a tensor (``XNN_MAX_TENSOR_DIMS``)."""

WIDEST_PRODUCT = 8
"""Columns of an int8 second factor that every CPU's kernel packs at once, as they lie in memory.

XNNPACK (92a7ad50) packs more columns wrongly where its gemm config keeps
``xnn_pack_qs8_weights_and_biases``, which ignores the distance between rows: on ARM CPUs but those
with dot products and no more. A factor that lies transposed is packed by another function.
"""


# ---------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------


def _max_pool(match: PatternMatch, _formats: Formats) -> Delegation:
    kernel, stride, _ = pool_window(match.node)
    skips = any(s > k for s, k in zip(stride, kernel, strict=True))
    if skips and argument(match.node, 5, "ceil_mode", False):
        return Delegation(
            PORTABLE, "XNNPACK's max_pool2d needs stride <= kernel size or ceil_mode off"
        )
    return Delegation(INT8)


def _accepts_mean(match: PatternMatch, _scheme: OpScheme) -> Verdict:
    """XNNPACK (92a7ad50) does not allocate a mean's accumulators again when the batch grows.

    With images of static size, a mean of a dynamic batch is a linear layer by now.
    """
    data = tensor_meta(match.inputs[0])
    if data is None or are_static(data.shape[:2]):
        return ACCEPTED
    if match.rule is ADAPTIVE_AVG_POOL and not is_global_pool(match.node):
        return ACCEPTED
    return refused(
        "XNNPACK's integer mean is wrong when the batch grows from one call to the next, and the "
        "image size is dynamic too; capture the model with a fixed image size"
    )


def _adaptive(match: PatternMatch, _formats: Formats) -> Delegation:
    if is_global_pool(match.node):
        return Delegation(INT8)
    if adaptive_kernel(match.node) == (1, 1):
        return Delegation(FOLDED, "an identity: only the scale changes")
    return Delegation(FLOAT, "XNNPACK averages windows in float")


def refuses_resize(node: Node) -> str:
    """Why a bilinear resize of static size has no integers that are the same on every CPU."""
    for resizing in resizings_of(node):
        made = {xnnpack_positions(resizing, fused=fused) for fused in (False, True)}
        if made != {resizing.positions()}:
            return (
                f"from {resizing.size} to {resizing.out} pixels XNNPACK rounds a position between "
                "pixels in float32, and CPUs differ in it"
            )
    return ""


def _enlarges(match: PatternMatch) -> str:
    """Why a resize whose result is wanted in float is better computed in float.

    Either way all pixels of the result are written as floats: by the float kernel, or by the
    conversion behind that of int8. On x86-64 that takes as long for 21 channels, and less in float
    for up to 3. An image that is made smaller has fewer integers to convert behind the resize.
    """
    rows, columns = resizings_of(match.node)
    if rows.out * columns.out < rows.size * columns.size:
        return ""
    return (
        "XNNPACK enlarges images of floats as fast as those of integers, which it would round once "
        "more"
    )


def _enlarges_by_layers(match: PatternMatch) -> str:
    """Why a layer that interpolates along a dim is better computed in float there.

    An image has one layer for its rows and one for its columns, and each would round its result.
    """
    if match.node.meta.get("original_target") not in LAYERED or match.weight is None:
        return ""
    after, before = shape_of(match.weight)
    return "" if after < before else "each of the layers that enlarge it would round once more"


# ---------------------------------------------------------------------------------------------
# Data movement
# ---------------------------------------------------------------------------------------------


def _joins_unlike(match: PatternMatch) -> str:
    """Why tensors that are joined for the caller of the model are better joined as floats.

    Probabilities beside boxes in pixels, as detectors return them, would be 0 or 1 on the scale of
    the boxes, and so would all else that is made of them. As floats they keep scales of their own,
    and as many values are dequantized.
    """
    kinds: set[bool] = set()
    seen, waiting = set[Node](), list(match.inputs)
    while waiting:
        tensor = waiting.pop()
        if tensor in seen or is_constant(tensor):
            continue
        seen.add(tensor)
        made = match_of(tensor)
        if is_quantize(tensor) or is_dequantize(tensor):
            waiting.append(cast(Node, tensor.args[0]))
        elif made is not None and made.rule.moves_values:
            waiting.extend(made.inputs)
        else:
            kinds.add(made is not None and Trait.BOUNDED in made.rule.traits)
    if len(kinds) < 2:
        return ""
    return "it joins values between -1 and 1 with others, on whose scale little is left of them"


def _reshape(match: PatternMatch, _formats: Formats) -> Delegation:
    if is_same_shape(shape_of(match.node), shape_of(match.inputs[0])):
        return Delegation(FOLDED, "it does not change the tensor")
    return Delegation(INT8)


def refuses_slice(node: Node) -> str:
    """Why XNNPACK cannot take a part of a dynamic size; others may be dynamic.

    Its slices (92a7ad50, ``reshape_slice_operator``) count from the beginning of a dim, and end
    with it at the latest, however long it is. A program holds no negative number there.
    """
    shape = shape_of(cast(Node, node.args[0]))
    bounds: list[Any]
    if node.target in SELECT.targets:
        dim, bounds = int(cast(int, node.args[1])) % len(shape), [node.args[2]]
    else:
        dim, *bounds = slice_of(node)[:3]
    if isinstance(shape[dim], int) or not any(isinstance(b, int) and b < 0 for b in bounds):
        return ""
    return "XNNPACK counts from the beginning, and its size is dynamic"


def _select(match: PatternMatch, _formats: Formats) -> Delegation:
    reason = refuses_slice(match.node)
    return Delegation(PORTABLE, reason) if reason else Delegation(INT8)


def _slice(match: PatternMatch, formats: Formats) -> Delegation:
    source = shape_of(match.inputs[0])
    dim, _, _, step = slice_of(match.node)
    dynamic = dynamic_sizes(source)
    of_image = len(source) == 4 and dim in (2, 3) and isinstance(source[1], int)
    if step > 1 and not of_image and (dynamic > 1 or not isinstance(source[dim], int)):
        return Delegation(PORTABLE, "XNNPACK has no strided slices, and its views one dynamic size")
    return _select(match, formats)


# ---------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------

_FILLED = "a table, which XNNPACK fills in float when it loads the program"


def _table(match: PatternMatch, _formats: Formats) -> Delegation:
    if functions.is_tanh_gelu(match.node):
        return Delegation(
            TABLE,
            "a table, which XNNPACK fills with the gelu that is approximated (up to 4.8e-4 away)",
        )
    return Delegation(TABLE, _FILLED)


def _of_two(what: str) -> Support:
    """A function of two tensors is computed in float; of a tensor and a number it is a table."""

    def delegation(match: PatternMatch, formats: Formats) -> Delegation:
        if len(match.inputs) == 1:
            return _table(match, formats)
        return Delegation(FLOAT, f"XNNPACK {what} in float")

    return Support(delegation)


_STEPS = "XNNPACK has no {}; steps of float, which it has, compute it"

CHAIN_LIMIT = 10
"""Functions of one tensor in a row of which XNNPACK makes one table, and fails: see
``passes.activations.break_chains``. Shorter chains fit, and longer ones are cut to it."""

LEAST_THRESHOLD = 15.0
"""Above it a softplus is its input in float32: ``log(1 + exp(-15)) / 15`` is 2.0e-8."""


def _softplus(match: PatternMatch, _formats: Formats) -> Delegation:
    if functions.softplus_factors(match.node)[1] < LEAST_THRESHOLD:
        return Delegation(PORTABLE, "its threshold is so low that it shows as a step")
    return Delegation(FLOAT)


def are_rows(shape: Sequence[Any], dims: Sequence[int]) -> bool:
    """Whether the values along some dims are rows of a matrix of which one size may be dynamic."""
    sizes = [shape[d] for d in dims]
    outer = [shape[d] for d in range(len(shape)) if d not in dims]
    static = are_static(sizes)
    return static and 0 not in shape and dynamic_sizes(outer) <= 1


def _log_softmax(match: PatternMatch, _formats: Formats) -> Delegation:
    shape = shape_of(match.node)
    dim = int(cast(int, match.node.args[1])) % max(len(shape), 1)
    return Delegation(FLOAT if shape and are_rows(shape, [dim]) else PORTABLE)


def chooses_in_steps(where: Node) -> bool:
    """Whether maxima and minima, which are float of the delegate, choose for a ``where``."""
    return all(map(is_float32, (where, *where.args[1:]))) and chooses_numbers(where)


def _where(match: PatternMatch, _formats: Formats) -> Delegation:
    return Delegation(FLOAT if chooses_in_steps(match.node) else PORTABLE)


def _functions() -> dict[str, Support]:
    special = {
        functions.GELU: Support(_table, integers=gelu_integers),
        functions.SILU: Support(
            _always(TABLE, f"{_FILLED}; its sigmoid in 8 bits"), integers=silu_integers
        ),
        functions.MISH: Support(_always(FLOAT), float_reason=_STEPS.format("mish")),
        functions.SOFTPLUS: Support(_softplus, float_reason=_STEPS.format("softplus")),
        functions.PRELU: Support(_always(FLOAT, "XNNPACK multiplies by the slopes in float")),
        functions.DIV: _of_two("divides"),
        functions.MAXIMUM: _of_two("compares"),
        functions.MINIMUM: _of_two("compares"),
    }
    return {rule.family: special.get(rule, Support(_table)) for rule in functions.RULES}


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


_STORED = scheme("a8w8-per_tensor").weight
"""Of constants that are dequantized while the program runs: it has one scale for a tensor there."""

SUPPORT: Mapping[str, Support] = MappingProxyType(
    {
        CONV.family: _GEMM,
        CONV_TRANSPOSE.family: _GEMM,
        LINEAR.family: replace(_GEMM, float_output=_enlarges_by_layers),
        MATMUL.family: Support(
            _int8,
            refuses=_refuses_matmul,
            runs=_runs_product,
            requires_symmetric=frozenset({1}),
        ),
        ADD.family: Support(_int8, runs=_runs_add, operand=_STORED),
        SUB.family: Support(_int8, runs=_runs_add, operand=_STORED),
        MUL.family: Support(_int8, runs=_runs_mul),
        RELU.family: Support(_int8),
        CLAMP.family: Support(_int8),
        MAX_POOL.family: Support(_max_pool),
        AVG_POOL.family: Support(_always(FLOAT, "XNNPACK averages windows in float")),
        ADAPTIVE_AVG_POOL.family: Support(_adaptive, accepts=_accepts_mean),
        MEAN.family: Support(_int8, accepts=_accepts_mean),
        UPSAMPLE_BILINEAR.family: Support(
            _int8, refuses=lambda match: refuses_resize(match.node), float_output=_enlarges
        ),
        CAT.family: Support(_int8, float_output=_joins_unlike),
        IDENTITY.family: Support(_always(FOLDED, "it does not change the tensor")),
        RESHAPE.family: Support(_reshape),
        PERMUTE.family: Support(_int8),
        SLICE.family: Support(_slice),
        SELECT.family: Support(_select),
        EXPAND.family: Support(_reshape),
        SPLIT.family: Support(_always(FOLDED, "each of its pieces is a slice")),
        GETITEM.family: Support(_int8),
        PAD.family: Support(_always(FLOAT, "XNNPACK pads in float; zeros stay exact")),
        **_functions(),
        LOG_SOFTMAX.family: Support(_log_softmax, float_reason=_STEPS.format("log softmax")),
        WHERE.family: Support(
            _where,
            float_reason="XNNPACK has no where; maxima and minima compute it if no operand may be "
            "NaN, which they lose",
        ),
        EMBEDDING.family: Support(
            _always(PORTABLE),
            float_reason="it reads rows of a table, which XNNPACK does not do; where what follows "
            "wants integers, the table is stored as those integers",
            table=scheme("a8w8").weight,  # no portable kernel reads two entries out of a byte
        ),
    }
)
"""By op family, what XNNPACK does with it; it computes softmax and norms, which have no entry, in
float."""
