"""What a ``.pte`` says of every op, read from its bytes alone."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from custom_quantizer.core.borders import Border
from custom_quantizer.errors import ProgramError
from custom_quantizer.ops.placement import Placement, tally
from custom_quantizer.reference.accumulators import phases_of, weight_accumulator_bits
from custom_quantizer.report.record import (
    BiasRecord,
    Compute,
    ProgramOp,
    ProgramReport,
    ProgramRow,
    TensorRecord,
)
from custom_quantizer.report.record_parts import (
    bias_integers,
    border_record,
    with_group_scales,
    with_scales,
)

if TYPE_CHECKING:
    from custom_quantizer.backends.xnnpack.contents import (
        DelegateContents,
        DelegateOp,
        DelegateTensor,
        KernelCall,
        ValueInfo,
    )
    from custom_quantizer.backends.xnnpack.data_files import DataPath
    from custom_quantizer.backends.xnnpack.op_record import RecordedOp

__all__ = ["inspect_program"]


def inspect_program(
    source: str | os.PathLike[str] | bytes, *, data_path: DataPath | None = None
) -> ProgramReport:
    """Say of every call in a ``.pte`` what it computes on, from the file alone.

    Args:
        source: path of the file, or its bytes.
        data_path: of the ``.ptd`` with the weights that it keeps outside, or of several.

    Raises:
        InputError: ``data_path`` is something else than paths.
        ProgramError: a file cannot be read.
    """
    # Reading a file needs the package that knows executorch; inspecting a graph does not.
    from custom_quantizer.backends.xnnpack.border_constants import borders_in
    from custom_quantizer.backends.xnnpack.contents import DelegateCall
    from custom_quantizer.backends.xnnpack.readback import read_program

    contents = read_program(source, data_path=data_path)
    inputs: list[TensorRecord] = []
    outputs: list[TensorRecord] = []
    names: Counter[str] = Counter()
    rows: list[ProgramRow] = []
    ops: list[ProgramOp] = []
    for method in contents.methods:
        recorded = (contents.ops or {}).get(method.name, ())
        # What is folded into another op may share the nodes of that one; of others, the first has
        # the name.
        kept = [op for op in reversed(recorded) if op.placement is not Placement.FOLDED]
        by_handle = {handle: op for op in kept for handle in op.handles}
        by_call = {position: op for op in kept for position in op.calls}
        outside = itertools.count()
        found: list[ProgramRow] = []
        for call in method.calls:
            if isinstance(call, DelegateCall):
                delegate = method.delegates[call.delegate]
                for node in delegate.ops:
                    row = _delegate_row(method.name, call.delegate, delegate, node)
                    found.append(_part_of(row, by_handle.get(node.debug_handle)))
            else:
                row = _kernel_row(method.name, call)
                found.append(_part_of(row, by_call.get(next(outside))))
        prefix = f"{method.name}: " if len(contents.methods) > 1 and recorded else ""
        borders = borders_in(method, contents.constants)
        for records, values, found_borders in (
            (inputs, method.inputs, borders.inputs),
            (outputs, method.outputs, borders.outputs),
        ):
            records += starmap(_program_border, zip(values, found_borders, strict=True))
        rows += _with_names(found, names, prefix, bool(recorded))
        ops += _program_ops(method.name, recorded)
    return ProgramReport(
        tuple(rows),
        contents.kernels,
        tuple(delegate.backend_id for delegate in contents.delegates),
        contents.size_bytes,
        contents.constant_bytes,
        None if contents.ops is None else tuple(ops),
        contents.ops_note,
        tuple(inputs),
        tuple(outputs),
    )


def _program_border(value: ValueInfo, border: Border | None) -> TensorRecord:
    """An input or output of a program."""
    if border is None:
        return TensorRecord("", value.shape, value.dtype)
    return border_record("", value.shape, border)


def _part_of(row: ProgramRow, op: RecordedOp | None) -> ProgramRow:
    """The row with the op of the converted graph that stands behind it, if the file says which."""
    return row if op is None else replace(row, op=op.written, path=op.path)


def _with_names(
    rows: Sequence[ProgramRow], names: Counter[str], prefix: str, recorded: bool
) -> Iterator[ProgramRow]:
    """Give each row a name: the main one of an op that of the op.

    That is the one with the weight, else the last, which gives the result.
    """
    main: dict[str, ProgramRow] = {}
    for row in rows:
        if row.op and (row.op not in main or main[row.op].weight is None or row.weight is not None):
            main[row.op] = row
    for row in rows:
        if not recorded:
            yield replace(row, name=_numbered(row.kind, names))
        elif main.get(row.op) is row:
            yield replace(row, name=prefix + row.op)
        else:
            where = row.op or ("kernel" if row.delegate is None else "delegate")
            yield replace(row, name=_numbered(f"{prefix}{where}/{row.kind}", names))


def _program_ops(method: str, recorded: Sequence[RecordedOp]) -> Iterator[ProgramOp]:
    """The ops as they were written: of several parts, one that decides says how it runs."""
    placements = tally((op.written, op.placement) for op in recorded).placements
    parts: dict[str, list[RecordedOp]] = {}
    for op in recorded:
        parts.setdefault(op.written, []).append(op)
    for name, found in parts.items():
        decisive = next(op for op in found if op.placement is placements[name])
        yield ProgramOp(
            name=name,
            method=method,
            path=found[0].path,
            family=", ".join(dict.fromkeys(op.family for op in found)),
            placement=decisive.placement.value,
            backend=decisive.kernel,
            reason=decisive.reason,
            has_bias=any(op.has_bias for op in found),
        )


def _numbered(kind: str, names: Counter[str]) -> str:
    """A unique name: ``conv2d``, ``conv2d_1``, of each kind in execution order."""
    count = names[kind]
    names[kind] += 1
    return f"{kind}_{count}" if count else kind


_NO_TENSORS = frozenset({"int", "double", "bool", "string", "null"})


def _kernel_row(method: str, call: KernelCall) -> ProgramRow:
    tensors = tuple(
        TensorRecord("", argument.shape, argument.dtype)
        for argument in call.arguments
        if argument.dtype not in _NO_TENSORS
        and (argument.dtype == "tensor_list" or not argument.dtype.endswith("_list"))
    )
    # What an out variant returns are its out arguments, named once more.
    outputs = 1
    for count in range(1, len(tensors) // 2 + 1):
        if tensors[-count:] == tensors[-2 * count : -count]:
            outputs, tensors = count, tensors[:-count]
            break
    return ProgramRow(
        name=call.name,
        method=method,
        delegate=None,
        kind=call.name,
        compute="float",
        reason="a portable kernel outside the delegates",
        inputs=tensors[:-outputs],
        weight=None,
        bias=None,
        outputs=tensors[-outputs:],
        low=None,
        high=None,
        accumulator_bits=None,
    )


def _delegate_row(
    method: str, index: int, delegate: DelegateContents, op: DelegateOp
) -> ProgramRow:
    inputs = tuple(_stored(delegate.tensors[i]) for i in op.inputs)
    outputs = tuple(_stored(delegate.tensors[i]) for i in op.outputs)
    weight = None if op.weight is None else _stored(delegate.tensors[op.weight])
    compute = _compute(inputs, outputs, weight)
    reason = "its tensors are float in the file" if compute == "float" else ""
    if compute == "float" and _precedes_quantization(delegate, op):
        compute, reason = "convert", "puts floats in order before they are quantized"
    bias = None
    if op.bias is not None:
        bias = _stored_bias(delegate, op, inputs, weight, compute)
    return ProgramRow(
        name=op.kind,
        method=method,
        delegate=index,
        kind=op.kind,
        compute=compute,
        reason=reason,
        inputs=inputs,
        weight=weight,
        bias=bias,
        outputs=outputs,
        low=_bound(op.params.get("output_min")),
        high=_bound(op.params.get("output_max")),
        accumulator_bits=_stored_accumulator_bits(delegate, op, inputs, weight, bias),
    )


def _precedes_quantization(delegate: DelegateContents, op: DelegateOp) -> bool:
    """Whether an op only changes the layout of what nothing but conversions read."""
    result = op.outputs[0] if op.kind == "static_transpose" else None
    if result is None or delegate.tensors[result].is_output:
        return False
    return {reader.kind for reader in delegate.readers.get(result, ())} == {"convert"}


def _compute(
    inputs: tuple[TensorRecord, ...],
    outputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
) -> Compute:
    data = (*inputs, *outputs)
    if any(record.dynamic for record in data):
        return "dynamic"
    if all(record.bits is None for record in data):
        return "float"
    if any(record.bits is None for record in (*data, *([] if weight is None else [weight]))):
        return "convert"
    return "integer"


def _bound(value: object) -> float | None:
    """A finite bound; JSON knows no infinity, and an infinite bound bounds nothing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


_PROGRAM_BITS = {"int4": 4, "int8": 8, "uint8": 8, "int32": 32}


def _stored(tensor: DelegateTensor) -> TensorRecord:
    record = TensorRecord(f"tensor {tensor.id}", tensor.shape, tensor.dtype)
    bits = _PROGRAM_BITS.get(tensor.dtype)
    if bits is None or tensor.quantization is None:
        return record
    low = 0 if tensor.dtype.startswith("u") else -(1 << (bits - 1))
    high = low + (1 << bits) - 1
    dynamic = tensor.quantization == "per_token_dynamic"
    if dynamic or tensor.scale is None:
        return replace(record, bits=bits, quant_min=low, quant_max=high, dynamic=dynamic)
    scales = np.asarray(tensor.scale, dtype=np.float32)
    if tensor.quantization != "per_channel_group":
        values = tuple(float(scale) for scale in scales.reshape(-1))
        return with_scales(record, values, tensor.zero_point or 0, low, high, tensor.channel_axis)
    return with_group_scales(record, scales, low, high, tensor.channel_axis, tensor.group_size)


def _stored_bias(
    delegate: DelegateContents,
    op: DelegateOp,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
    compute: Compute,
) -> BiasRecord:
    tensor = delegate.tensors[cast(int, op.bias)]
    where = f"tensor {tensor.id}"
    if tensor.name is not None:
        where += f", constant {tensor.name[:12]}"
    if tensor.dtype != "int32" or tensor.scale is None:
        reason = (
            "the input scale is only known at run time, so no bias scale follows from it"
            if compute == "dynamic"
            else "the op is in float"
        )
        return BiasRecord(where, tensor.dtype, math.prod(tensor.shape), reason=reason)
    scales = np.asarray(tensor.scale, dtype=np.float32).reshape(-1)
    derived = None
    if weight is not None and weight.scales and inputs[0].scales:
        unit = np.float32(inputs[0].scales[0]) * np.array(weight.scales, dtype=np.float32)
        derived = bool(np.array_equal(np.broadcast_to(unit, scales.shape), scales))
    return replace(bias_integers(where, tensor.array(), scales, 32), derived=derived)


def _stored_accumulator_bits(
    delegate: DelegateContents,
    op: DelegateOp,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
    bias: BiasRecord | None,
) -> int | None:
    data = inputs[0] if inputs else None
    if weight is None or not weight.scales or data is None or not data.scales:
        return None
    stored = torch.tensor(delegate.weight(op))
    weights: Iterable[Tensor] = (stored,)
    if op.kind == "conv_transpose2d":
        groups = cast(int, op.params.get("groups", 1))
        weights = phases_of(stored, groups, _pair(op, "stride"), _pair(op, "dilation"))
    return weight_accumulator_bits(
        weights,
        quant_min=cast(int, data.quant_min),
        quant_max=cast(int, data.quant_max),
        zero_point=cast(int, data.zero_point),
        bias=None if bias is None or bias.bits is None else torch.tensor(bias.integers),
    )


def _pair(op: DelegateOp, name: str) -> tuple[int, int]:
    """Height and width of a parameter that divides positions, as no damaged file may give it."""
    value = op.params.get(name)
    if isinstance(value, tuple) and len(value) == 2 and min(value) >= 1:
        return value
    raise ProgramError(
        f"the {name} of a {op.kind} node is {value}, not two positive numbers; the file was not "
        "written by a known version"
    )
