"""What TOSA does with each op family: its operators, and the constraints they put on a plan.

To let TOSA run a family: add an entry to :data:`SUPPORT`. A family without one stays in float,
outside of the TOSA program. Nothing here imports executorch or the TOSA tools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.backends.tosa import tables
from custom_quantizer.backends.tosa.arithmetic import (
    Rescales,
    check_reach,
    compare_rescales,
    product_rescales,
    rescale_by,
    rescale_multiplier,
    sum_rescales,
)
from custom_quantizer.core.arithmetic import (
    INT8,
    INT16,
    INT32,
    Arithmetic,
    Bounds,
    QParams,
    scale_of,
    store,
)
from custom_quantizer.core.graph import argument, is_constant, is_empty, shape_of, tensor_meta
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.errors import SchemeError
from custom_quantizer.ops import Formats, PatternMatch, QuantizedOp, Verdict, functions
from custom_quantizer.ops._rule import ACCEPTED, Integers, refused
from custom_quantizer.ops.attention import MATMUL
from custom_quantizer.ops.backend import Delegation, Kernel, Support
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
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
)
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.pool import ADAPTIVE_AVG_POOL, AVG_POOL, MAX_POOL, MEAN, pool_window
from custom_quantizer.reference.accumulators import accumulator_of

__all__ = [
    "FOLDED",
    "INT4_WEIGHTS",
    "INTEGER",
    "OUTSIDE",
    "SUPPORT",
    "TABLE",
    "packs_weights",
    "refuses_tensor",
    "rescales_around",
]

INTEGER = Kernel("tosa int8", Placement.INTEGER)
INT16_KERNEL = Kernel("tosa int16", Placement.INTEGER)
INT4_WEIGHTS = Kernel("tosa int8, int4 weights", Placement.INTEGER, 0.5)
TABLE = Kernel("tosa table", Placement.TABLE)
FOLDED = Kernel("folded away", Placement.FOLDED)
OUTSIDE = Kernel("portable kernel, outside TOSA", Placement.OUTSIDE, 4.0, needs_integers=True)

_MAX_RANK = 6
"""ExecuTorch's limit (``backends/arm/constants.py``)."""


def refuses_tensor(node: Node) -> str:
    """Why no operator takes a tensor."""
    meta = tensor_meta(node)
    what = ""
    if is_empty(node):
        what = "has no elements"
    elif meta is not None and meta.dim() == 0 and not is_constant(node):
        what = "has no dimensions"
    elif meta is not None and meta.dim() > _MAX_RANK:
        what = f"has more than {_MAX_RANK} dimensions"
    return f"{what}, and TOSA takes no such tensor" if what else ""


# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


def _accepts(_match: PatternMatch, scheme: OpScheme) -> Verdict:
    """Activations of 8 or 16 bits, all of their integers: operators saturate at nothing narrower.

    Those of 16 bits have zero point 0 in every scheme, as TOSA wants it.
    """
    if scheme.dynamic:
        return refused(f"{scheme.name} quantizes at run time, which TOSA does not do")
    fmt = scheme.activation.format
    if fmt.bits not in (8, 16) or fmt.narrow:
        return refused(
            f"TOSA saturates at all of 8 or 16 bits, and activations of {scheme.name} end at "
            f"[{fmt.quant_min}, {fmt.quant_max}]; choose a8 or a16"
        )
    return ACCEPTED


def _accepts_weights(match: PatternMatch, scheme: OpScheme) -> Verdict:
    verdict = _accepts(match, scheme)
    if not verdict.ok:
        return verdict
    weight = scheme.weight
    if weight.format.bits > 8:
        return refused(f"TOSA has no operator for weights of {weight.format.bits} bits; at most 8")
    if weight.group_size is not None:
        return refused("TOSA has one weight scale for each output channel, not for groups")
    if match.bias is not None and scheme.bias is None:
        return refused("TOSA adds integer biases only; leave out -biasfloat")
    return ACCEPTED


def _integer(_match: PatternMatch, formats: Formats) -> Delegation:
    return Delegation(INT16_KERNEL if formats.activation_bits == 16 else INTEGER)


def _gemm(_match: PatternMatch, formats: Formats) -> Delegation:
    bits = formats.weight_bits or 8
    if formats.activation_bits == 16:
        reason = "" if bits == 8 else f"int{bits} weights stored as int8"
        return Delegation(INT16_KERNEL, reason)
    if bits == 4:
        return Delegation(INT4_WEIGHTS, "int4 weights, two to a byte")
    return Delegation(INTEGER, "" if bits == 8 else f"int{bits} weights stored as int8")


def packs_weights(op: QuantizedOp) -> bool:
    """Whether the weights of a layer are written as ``INT4``: [-7, 7], with 8-bit activations."""
    weight = op.weight_qparams
    if weight is None or op.inputs[0].bits != 8:
        return False
    return (weight.quant_min, weight.quant_max) == (-7, 7)


def _always(kernel: Kernel, reason: str = "") -> Callable[[PatternMatch, Formats], Delegation]:
    return lambda _match, _formats: Delegation(kernel, reason)


# ---------------------------------------------------------------------------------------------
# Scales that calibration found
# ---------------------------------------------------------------------------------------------


def _runs(parameters: Callable[[QuantizedOp], object]) -> Callable[[QuantizedOp], Verdict]:
    """A check of the ranges that every op needs, then of what its own RESCALE operators need."""

    def verdict(op: QuantizedOp) -> Verdict:
        widths = {_width(q) for q in (*op.inputs, op.output)}
        if None in widths:
            return refused("one of its tensors is neither int8 nor int16 with zero point 0")
        if len(widths) > 1:
            return refused("its tensors have 8 and 16 bits")
        try:
            parameters(op)
        except SchemeError as error:
            return refused(f"TOSA has no RESCALE for its scales: {error}")
        return ACCEPTED

    return verdict


def _width(q: QParams) -> int | None:
    limits = (q.quant_min, q.quant_max)
    if limits == INT8:
        return 8
    return 16 if limits == INT16 and q.zero_point == 0 else None


def _requantizes(op: QuantizedOp) -> None:
    for q in op.inputs:
        if not q.same_grid(op.output):
            check_reach(scale_of(q) / scale_of(op.output), 31, q.offsets)


def _layer(op: QuantizedOp) -> None:
    weights = op.inputs[1] if op.weight_qparams is None else op.weight_qparams
    scales = weights.scale
    given, out = scale_of(op.inputs[0]), scale_of(op.output)
    bits, widest = (15, 48) if op.is_wide else (31, 32)
    found = accumulator_of(op)
    if found is None:
        raise SchemeError("how many products its accumulator sums is not known")
    needed = found.bits
    if needed > widest:
        raise SchemeError(f"its accumulator may need {needed} bits; TOSA has {widest}")
    limits: Bounds = (-(1 << (needed - 1)), (1 << (needed - 1)) - 1)
    for scale in scales.tolist() if isinstance(scales, torch.Tensor) else [scales]:
        check_reach(given * scale / out, bits, limits)


_AROUND: Mapping[str, Callable[[Sequence[QParams], QParams], Rescales]] = MappingProxyType(
    {
        ADD.family: sum_rescales,
        SUB.family: sum_rescales,
        MUL.family: product_rescales,
        functions.MAXIMUM.family: compare_rescales,
        functions.MINIMUM.family: compare_rescales,
        functions.ABS.family: compare_rescales,
    }
)
"""Families that compute on int32, between RESCALE operators."""


def rescales_around(op: QuantizedOp) -> Rescales | None:
    """Factors of the RESCALE operators around an op that computes on int32; ``None``: another."""
    around = _AROUND.get(op.match.rule.family)
    return None if around is None else around(op.inputs, op.output)


def _in_int32(op: QuantizedOp) -> None:
    factors, factor = cast(Rescales, rescales_around(op))
    reaches = []
    for real, q in zip(factors, op.inputs, strict=True):
        check_reach(real, 31, q.offsets)
        multiplier, shift = rescale_multiplier(real)
        reaches.append((q.reach * multiplier >> shift) + 1)
    reach = math.prod(reaches) if op.match.rule is MUL else sum(reaches)
    if reach > INT32[1]:
        raise SchemeError("its result may need more than 32 bits")
    check_reach(factor, 31, (-reach, reach))


def _nothing(_op: QuantizedOp) -> None:
    """No RESCALE."""


# ---------------------------------------------------------------------------------------------
# What operators leave out
# ---------------------------------------------------------------------------------------------


def _refuses_conv(match: PatternMatch) -> str:
    before, after = symmetric_padding(match.node)
    if before != after:
        return "it is padded differently on two sides, which ExecuTorch does not write"
    return _refuses_unbatched(match)


def _refuses_unbatched(match: PatternMatch) -> str:
    weight, data = tensor_meta(cast(Node, match.weight)), tensor_meta(match.inputs[0])
    if weight is not None and data is not None and data.dim() < weight.dim():
        return "its input has no batch dimension"
    return ""


def _refuses_transposed(match: PatternMatch) -> str:
    node = match.node
    meta = tensor_meta(cast(Node, match.weight))
    dims = 2 if meta is None else meta.dim() - 2
    if dims != 2:
        return "TOSA transposes convolutions in two dims only"
    if any(d != 1 for d in per_dim(argument(node, 7, "dilation", 1), dims)):
        return "TOSA has no transposed convolution with dilation"
    if match.groups != 1:
        return "ExecuTorch writes no grouped transposed convolution with a scale per channel"
    return _refuses_unbatched(match)


def _refuses_max_pool(match: PatternMatch) -> str:
    node = match.node
    if len(shape_of(node)) != 4:
        return "its input has no batch dimension"
    if argument(node, 5, "ceil_mode", False):
        return "ceil_mode adds a window that lies partly outside"
    _, stride, _ = pool_window(node)
    dilation = per_dim(argument(node, 4, "dilation", 1), 2)
    if any(d > 1 and s > 1 for d, s in zip(dilation, stride, strict=True)):
        return "TOSA has no max pool with both dilation and stride"
    return ""


def _refuses_matmul(match: PatternMatch) -> str:
    left, right = match.inputs
    if is_constant(left) or is_constant(right):
        return "one of its operands is a constant"
    shapes = (shape_of(left), shape_of(right))
    if min(map(len, shapes)) < 2 or shapes[0][:-2] != shapes[1][:-2]:
        return "one operand is a vector, or repeated for a batch of the other"
    return ""


def _compared(
    function: Callable[..., Tensor],
) -> Callable[[QuantizedOp, Integers, Arithmetic], Tensor]:
    """A function of int32 operands that keeps their scale."""

    def integers(op: QuantizedOp, inputs: Integers, _arithmetic: Arithmetic) -> Tensor:
        factors, factor = compare_rescales(op.inputs, op.output)
        scaled = [
            rescale_by(x.to(torch.int64) - q.zero_point, real)
            for x, q, real in zip(inputs, op.inputs, factors, strict=True)
        ]
        return store(rescale_by(function(*scaled), factor) + op.output.zero_point, op.output)

    return integers


_COMPARISONS = (
    (functions.MAXIMUM, torch.maximum),
    (functions.MINIMUM, torch.minimum),
    (functions.ABS, torch.abs),
)

_UNEVEN = "TOSA averages by layers with constant weights, and its windows differ in size"

_AVERAGE = Support(_always(OUTSIDE), float_reason=_UNEVEN)

_MOVE = Support(_integer, accepts=_accepts, runs=_runs(_nothing))
_GEMM = Support(_gemm, accepts=_accepts_weights, runs=_runs(_layer))


def _layer_support(refuses: Callable[[PatternMatch], str]) -> Support:
    return Support(_gemm, accepts=_accepts_weights, runs=_runs(_layer), refuses=refuses)


def _tables() -> dict[str, Support]:
    return {
        rule.family: Support(
            _always(TABLE),
            accepts=_accepts,
            runs=_runs(_nothing),
            integers=tables.integers,
        )
        for rule in functions.RULES
        if rule.targets <= tables.TARGETS
    }


SUPPORT: Mapping[str, Support] = MappingProxyType(
    {
        CONV.family: _layer_support(_refuses_conv),
        CONV_TRANSPOSE.family: _layer_support(_refuses_transposed),
        LINEAR.family: _GEMM,
        MATMUL.family: Support(
            _integer, accepts=_accepts, runs=_runs(_layer), refuses=_refuses_matmul, fuses=False
        ),
        **{
            rule.family: Support(_integer, accepts=_accepts, runs=_runs(_in_int32))
            for rule in (ADD, SUB, MUL)
        },
        **{
            rule.family: Support(
                _integer, accepts=_accepts, runs=_runs(_in_int32), integers=_compared(function)
            )
            for rule, function in _COMPARISONS
        },
        RELU.family: Support(_integer, accepts=_accepts, runs=_runs(_requantizes)),
        CLAMP.family: Support(_integer, accepts=_accepts, runs=_runs(_requantizes)),
        MAX_POOL.family: Support(
            _integer, accepts=_accepts, runs=_runs(_nothing), refuses=_refuses_max_pool
        ),
        AVG_POOL.family: _AVERAGE,
        ADAPTIVE_AVG_POOL.family: _AVERAGE,
        MEAN.family: _AVERAGE,
        IDENTITY.family: Support(
            _always(FOLDED, "it does not change the tensor"), runs=_runs(_nothing)
        ),
        **{
            rule.family: _MOVE
            for rule in (CAT, RESHAPE, PERMUTE, SLICE, SELECT, EXPAND, SPLIT, GETITEM, PAD)
        },
        **_tables(),
    }
)
"""By op family, what TOSA does with it. A family without an entry has no integer operator here."""
