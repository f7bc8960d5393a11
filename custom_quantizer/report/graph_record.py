"""What a converted graph, and the program made of it, say of every op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.bias import MAX_EXACT_BIAS, WIDE_BIAS, derived_scale
from custom_quantizer.core.borders import Border, output_of
from custom_quantizer.core.formats import dtype_name, range_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    constant_of,
    describe,
    effective_users,
    has_zero_points,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    module_path,
    qparams_of,
    source_of,
    tensor_args,
    tensor_meta,
)
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import InputError
from custom_quantizer.ops import PatternMatch, QuantizedOp, match_of, rule_of
from custom_quantizer.ops.backend import Backend
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.ops.placement import Placement
from custom_quantizer.reference.accumulators import accumulator_of
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted
from custom_quantizer.report.record import BiasRecord, LoweringRecord, OpRow, Report, TensorRecord
from custom_quantizer.report.record_parts import (
    bias_integers,
    border_record,
    with_group_scales,
    with_scales,
)

if TYPE_CHECKING:
    from custom_quantizer.backends.xnnpack import LoweredProgram


__all__ = ["inspect", "report_of"]


def inspect(converted: GraphModule, lowered: LoweredProgram | None = None) -> Report:
    """Say of every op of a converted graph what it computes on, and why.

    Ops in float have a row with the reason, like all others; so have the places where a tensor is
    requantized. The graph may come from another quantizer: then there are no schemes to show.

    Args:
        converted: what ``convert_pt2e`` returns.
        lowered: the program made of it; adds where each op runs.

    Raises:
        ConversionError: the graph was prepared but not converted, or quantizes nothing.
        InputError: ``lowered`` was made of another graph.
    """
    return report_of(read_converted(converted), lowered)


def report_of(graph: ConvertedGraph, lowered: LoweredProgram | None = None) -> Report:
    """:func:`inspect`, for whom the graph was read already."""
    converted = graph.model
    ops: dict[Node, QuantizedOp | FloatOp] = {op.node: op for op in graph}
    rows = []
    for node in converted.graph.nodes:
        found = ops.get(node)
        if isinstance(found, QuantizedOp):
            row = _integer_row(converted, found, graph.backend)
            rows.append(replace(row, needs=_needs(node, row)))
        elif found is not None:
            row = _float_row(converted, found, graph.backend)
            rows.append(replace(row, needs=_needs(node, row)))
        elif is_quantize(node) and is_dequantize(node.args[0]) and is_static(node):
            rows.append(_requantize_row(converted, node))
    borders = graph.borders
    placeholders = [node for node in converted.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(output_of(converted).args[0])
    report = Report(
        tuple(rows),
        tuple(
            _model_input(converted, node) if border is None else _border(converted, node, border)
            for node, border in zip(placeholders, borders.inputs, strict=True)
            if tensor_meta(node) is not None
        ),
        tuple(
            _tensor(converted, value) if border is None else _border(converted, value, border)
            for value, border in zip(leaves, borders.outputs, strict=True)
            if isinstance(value, Node)
        ),
    )
    return report if lowered is None else _with_lowering(report, lowered)


def _integer_row(model: GraphModule, op: QuantizedOp, backend: Backend) -> OpRow:
    node, match = op.node, op.match
    chosen, reason = _recorded(node)
    accumulator = accumulator_of(op)
    sources = zip(match.inputs, op.inputs, strict=True)
    weight = None if match.weight is None else _weight(model, match)
    low, high = op.bounds or (None, None)
    fused = None if op.output_node is node else op.output_node
    return OpRow(
        node=node.name,
        path=module_path(node),
        family=match.rule.family,
        target=str(node.target),
        fused=None if fused is None else fused.name,
        fused_family=None if fused is None else _family(fused),
        low=low,
        high=high,
        scheme=chosen,
        compute="integer",
        reason=reason,
        inputs=tuple(
            _quantized(model, source, qparams, _dtype(source)) for source, qparams in sources
        ),
        weight=weight,
        bias=_integer_bias(model, match),
        output=_quantized(model, op.output_node, op.output, _dtype(*op.output_node.users)),
        accumulator_bits=None if accumulator is None else accumulator.bits,
        written=original_name(node),
        placement=backend.predict(match, op.formats).kernel.placement.value,
    )


def _float_row(model: GraphModule, op: FloatOp, backend: Backend) -> OpRow:
    node = op.node
    match = match_of(node)
    chosen, reason = _recorded(node)
    if match is not None:
        inputs = tuple(_tensor(model, source) for source in match.inputs)
        weight = None if match.weight is None else _weight(model, match)
    else:
        inputs, weight = tuple(_tensor(model, source) for source in tensor_args(node)), None
    dynamic = any(record.dynamic for record in inputs)
    if chosen is not None and not dynamic:
        asked = weight is not None and scheme(chosen).bias is None
        reason = f"{op.reason}, {'as' if asked else 'although'} {reason} asks for {chosen}"
    users = effective_users(node)
    placement = Placement.INTEGER if dynamic else backend.in_float(node).placement
    return OpRow(
        node=node.name,
        path=module_path(node),
        family=_family(node),
        target=str(node.target),
        fused=None,
        fused_family=None,
        low=None,
        high=None,
        scheme=chosen,
        compute="dynamic" if dynamic else "float",
        reason=reason or op.reason,
        inputs=inputs,
        weight=weight,
        bias=None if match is None else _any_bias(model, match, inputs, weight),
        output=_tensor(model, users[0] if len(users) == 1 and is_quantize(users[0]) else node),
        accumulator_bits=None,
        written=original_name(node),
        placement=placement.value,
    )


def _requantize_row(model: GraphModule, node: Node) -> OpRow:
    return OpRow(
        node=node.name,
        path="",
        family="requantize",
        target=str(node.target),
        fused=None,
        fused_family=None,
        low=None,
        high=None,
        scheme=None,
        compute="integer",
        reason="the tensor is wanted with another scale, zero point or width",
        inputs=(_tensor(model, cast(Node, node.args[0])),),
        weight=None,
        bias=None,
        output=_tensor(model, node),
        accumulator_bits=None,
    )


def _needs(node: Node, row: OpRow) -> tuple[str, ...]:
    known = {record.source for record in row.inputs}
    sources = (source_of(source) for source in node.all_input_nodes)
    names = [s.name for s in sources if s.op in ("placeholder", "call_function")]
    return tuple(name for name in dict.fromkeys(names) if name not in known)


def _recorded(node: Node) -> tuple[str | None, str]:
    """Scheme and reason that the quantizer left at the node."""
    record = cast("Mapping[str, Any]", node.meta.get(META_KEY) or {})
    return record.get("scheme"), str(record.get("reason") or "")


def _family(node: Node) -> str:
    rule = rule_of(node)
    return str(node.target) if rule is None else rule.family


def _model_input(model: GraphModule, node: Node) -> TensorRecord:
    """An input of the model, quantized if all who use it agree on how."""
    records = [_tensor(model, user) for user in effective_users(node) if user.op == "call_function"]
    same = len(set(records)) == 1 and records[0].bits is not None
    return replace(records[0] if same else _tensor(model, node), source=node.name)


def _border(model: GraphModule, node: Node, border: Border) -> TensorRecord:
    """An input or output that is handed over as integers."""
    return border_record(border.name, _shape(model, node), border)


def _tensor(model: GraphModule, node: Node) -> TensorRecord:
    """The record of what ``node`` computes, reading through quantize and dequantize nodes."""
    dtype = _dtype(node)
    if node.target is DEQUANTIZE_GROUPED:
        values, block, scale = node.args[:3]
        low, high = (int(cast(int, bound)) for bound in node.args[5:7])
        stored = dtype_name(dtype or torch.int8)
        record = TensorRecord(cast(Node, values).name, _shape(model, node), stored)
        scales, size = constant_of(model, cast(Node, scale)), int(cast("list[int]", block)[-1])
        return with_group_scales(record, scales, low, high, 0, size)
    if not (is_quantize(node) or is_dequantize(node)) or has_zero_points(model, node):
        meta = tensor_meta(node)
        real = torch.float32 if meta is None else meta.dtype
        return TensorRecord(node.name, _shape(model, node), dtype_name(real))
    if is_static(node):
        return _quantized(model, node, qparams_of(model, node), dtype)
    low, high = (int(cast(int, bound)) for bound in node.args[3:5])
    return TensorRecord(
        source_of(node).name,
        _shape(model, node),
        dtype_name(dtype or torch.int8),
        bits=range_bits(low, high),
        quant_min=low,
        quant_max=high,
        dynamic=True,
    )


_MOST_CHANNELS = 4096
"""Of a weight with one scale, for which extremes are kept: embeddings have more."""


def _weight(model: GraphModule, match: PatternMatch) -> TensorRecord:
    """The record of a weight, with the extremes of each output channel if it is integers."""
    node = cast(Node, match.weight)
    record = _tensor(model, node)
    if record.bits is None or not node.args or not is_constant(node.args[0]):
        return record
    integers = constant_of(model, cast(Node, node.args[0]))
    many = record.axis is None and integers.shape[match.weight_axis] > _MOST_CHANNELS
    if not integers.numel() or many:
        return record
    low, high = torch.aminmax(integers.movedim(match.weight_axis, 0).flatten(1), dim=1)
    return replace(record, minima=tuple(low.tolist()), maxima=tuple(high.tolist()))


def _quantized(
    model: GraphModule, node: Node, qparams: QParams, dtype: torch.dtype | None
) -> TensorRecord:
    """The record of integers; a weight carries where its scale was raised."""
    scale = qparams.scale
    scales = tuple(scale.tolist()) if isinstance(scale, Tensor) else (scale,)
    bits = range_bits(qparams.quant_min, qparams.quant_max)
    raised = cast("dict[int, float]", (node.meta.get(META_KEY) or {}).get("raised") or {})
    record = TensorRecord(
        source_of(node).name,
        _shape(model, node),
        dtype_name(dtype) if dtype is not None else f"int{8 if bits <= 8 else 16}",
        raised=tuple(sorted(raised.items())),
    )
    return with_scales(
        record, scales, qparams.zero_point, qparams.quant_min, qparams.quant_max, qparams.axis
    )


def _integer_bias(model: GraphModule, match: PatternMatch) -> BiasRecord | None:
    """The derived bias, its scale compared with the product that it has to be."""
    node = match.bias
    if node is None:
        return None
    constant = cast(Node, node.args[0])
    qparams = qparams_of(model, node)
    weight = qparams_of(model, cast(Node, match.weight))
    data = qparams_of(model, match.inputs[0])
    unit = derived_scale(
        cast(float, data.scale), expand_channels(torch.as_tensor(weight.scale), match)
    )
    stored = torch.as_tensor(qparams.scale)
    _, exponent = torch.frexp(stored / unit)
    shift = exponent - 1
    wide = max(q.bits for q in (weight, data)) > 8
    return replace(
        bias_integers(
            constant.name,
            constant_of(model, constant).numpy(),
            stored.reshape(-1).numpy(),
            range_bits(qparams.quant_min, qparams.quant_max),
        ),
        limit=min(WIDE_BIAS if wide else MAX_EXACT_BIAS, qparams.quant_max),
        shift=int(shift.max()),
        # Doubling is exact, so equal floats here are equal bits.
        derived=bool((shift >= 0).all()) and torch.equal(torch.ldexp(unit, shift), stored),
    )


def _any_bias(
    model: GraphModule,
    match: PatternMatch,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
) -> BiasRecord | None:
    """The bias of an op that is not an integer op, and why it is float if it is."""
    node = match.bias
    if node is None or weight is None:
        return None
    if is_dequantize(node) and is_constant(node.args[0]) and all(t.scales for t in inputs):
        return _integer_bias(model, match)
    channels = _shape(model, node)[-1:]
    chosen, _ = _recorded(match.node)
    if any(record.dynamic for record in inputs):
        reason = "the input scale is only known at run time, so no bias scale follows from it"
    elif weight.bits is None or any(record.bits is None for record in inputs):
        reason = "the op is in float"
    elif not is_constant(node):
        reason = f"it is computed by {describe(node)}, so it cannot be folded into the accumulator"
    else:
        asked = chosen is not None and scheme(chosen).bias is None
        reason = (
            f"{f'{chosen} leaves it so' if asked else 'the quantizer left it so'}; XNNPACK's "
            "serializer quantizes it again when the graph is lowered"
        )
    return BiasRecord(
        node.name,
        _tensor(model, node).dtype,
        int(channels[0]) if channels and isinstance(channels[0], int) else 1,
        reason=reason,
    )


def _dtype(*nodes: Node) -> torch.dtype | None:
    """The dtype in which the first quantize or dequantize node of ``nodes`` stores."""
    for node in nodes:
        if is_quantize(node) or is_dequantize(node) or node.target is DEQUANTIZE_GROUPED:
            for arg in node.args:
                if isinstance(arg, torch.dtype):
                    return arg
    return None


def _shape(model: GraphModule, node: Node) -> tuple[int | str, ...]:
    source = source_of(node)
    meta = constant_of(model, source) if is_constant(source) else tensor_meta(node)
    if meta is None:
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in meta.shape)


def _with_lowering(report: Report, lowered: LoweredProgram) -> Report:
    found = {op.node: op for op in lowered.report.ops}
    expected = {row.node for row in report.rows if row.family != "requantize"}
    if set(found) != expected:
        (first, *_) = sorted(set(found) ^ expected)
        raise InputError(
            f"the program was lowered from another graph: only one of them has {first!r}; give "
            "what lower(converted, example) returned for this one"
        )
    rows = tuple(
        replace(
            row,
            backend=op.backend.label,
            backend_reason=op.reason,
            written=op.written,
            placement=op.backend.placement.value,
        )
        if (op := found.get(row.node)) is not None
        else row
        for row in report.rows
    )
    program = lowered.report
    summary = LoweringRecord(
        program.delegates, tuple(program.outside), program.size_bytes, _integer_biases(lowered)
    )
    return replace(report, rows=rows, lowering=summary)


def _integer_biases(lowered: LoweredProgram) -> tuple[str, ...]:
    from custom_quantizer.backends.xnnpack.program import find_weighted

    pairs = ((op.node, find_weighted(lowered.contents, op)) for op in lowered.report.ops)
    return tuple(
        name
        for name, found in pairs
        if found is not None
        and found[1].bias is not None
        and found[0].tensors[found[1].bias].dtype == "int32"
    )
