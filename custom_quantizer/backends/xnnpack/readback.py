"""Reading a ``.pte`` back without running it: every op, every tensor, every stored integer.

What a backend wrote into a file is the only evidence of what a device will compute with. This
module turns the file into immutable values, so that weights, biases, scales and zero points can
be compared with those of the graph, number by number.

::

    .pte   8 bytes | extended header | Program flatbuffer (ET12) | segments | ours
                                            |                        |
                              methods, calls, delegates       delegate blobs, named data
                                                                     |
    XNNPACK blob   header (XH00) | XNNGraph flatbuffer (XN01) | inline constants

``ours`` are the record of ops (:mod:`~custom_quantizer.backends.xnnpack.op_record`) and the
checksum, each if there is one.

Nothing of ExecuTorch is imported but the text of its schemas
(:mod:`~custom_quantizer.backends.xnnpack.flatbuffer`).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from custom_quantizer.backends.xnnpack.checksum import split_checksum
from custom_quantizer.backends.xnnpack.contents import (
    STORAGE,
    DelegateCall,
    DelegateContents,
    DelegateOp,
    DelegateTensor,
    KernelCall,
    MethodContents,
    ProgramContents,
    ValueInfo,
    frozen,
    stored_bytes,
    widen_bfloat16,
)
from custom_quantizer.backends.xnnpack.data_files import DataPath, read_data_files
from custom_quantizer.backends.xnnpack.flatbuffer import (
    Buffer,
    ParamValue,
    Table,
    Unreadable,
    corrupt,
    program_schema,
    xnnpack_schema,
)
from custom_quantizer.backends.xnnpack.op_record import (
    Damaged,
    OpsOfMethods,
    UnknownVersion,
    decode,
    split_record,
)
from custom_quantizer.core.file_hashes import recorded_hash, sha256_of
from custom_quantizer.core.file_kinds import kind_of_file
from custom_quantizer.errors import ProgramError

__all__ = [
    "XNNPACK_BACKEND",
    "read_file",
    "read_program",
]

XNNPACK_BACKEND = "XnnpackBackend"

_T = TypeVar("_T")

INVALID_ID = 2**32 - 1
"""``XNN_INVALID_VALUE_ID``: an operand that is not there."""
_NAMED = 2**64 - 1  # a constant with this offset is found by its name
_EXTERNAL_INPUT, _EXTERNAL_OUTPUT = 1, 2  # XNN_VALUE_FLAG_*

_XNN_DTYPES = {
    "xnn_datatype_fp32": "float32",
    "xnn_datatype_fp16": "float16",
    "xnn_datatype_bf16": "bfloat16",
    "xnn_datatype_pfp32": "float32",
    "xnn_datatype_qint8": "int8",
    "xnn_datatype_qcint8": "int8",
    "xnn_datatype_qdint8": "int8",
    "xnn_datatype_qpint8": "int8",
    "xnn_datatype_quint8": "uint8",
    "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qbint4": "int4",
    "xnn_datatype_qint32": "int32",
    "xnn_datatype_qcint32": "int32",
    "xnn_datatype_int32": "int32",
}
_PROGRAM_DTYPES = {
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
    "DOUBLE": "float64",
}


# --------------------------------------------------------------------------------------------
# Entry points
# --------------------------------------------------------------------------------------------


def read_program(
    source: bytes | str | os.PathLike[str],
    *,
    name: str = "the program",
    data_path: DataPath | None = None,
) -> ProgramContents:
    """Read a ``.pte``, given as its bytes or as a path.

    Args:
        source: bytes, or a path.
        name: what messages call bytes; a file goes by its path.
        data_path: of the ``.ptd`` with the weights that it keeps outside, or of several.

    The constants are not copied: the values returned keep the file's bytes alive. A constant
    that XNNPACK's serializer named by its SHA-256 is checked against that name, and the file
    against its own checksum and the one in the report beside it, where there are any.

    Raises:
        ProgramError: a file is missing or unreadable, is not what it should be, is truncated,
            changed or corrupt, or uses something that the installed schemas do not describe.
    """
    beside = read_data_files(data_path)
    if isinstance(source, bytes):
        data, where = source, name
        recorded = False
    else:
        where = os.fspath(source)
        data, recorded = read_file(source)
    whole, sealed = split_checksum(memoryview(data), where)
    program, record = split_record(whole)
    try:
        contents = _read_container(program, {} if beside is None else beside.named)
        ops, note = (None, "") if record is None else _read_ops(record)
    except Unreadable as error:
        raise ProgramError(f"{where}: {error}") from error
    return replace(
        contents,
        size_bytes=len(data),
        has_checksum=sealed or recorded,
        ops=ops,
        ops_note=note,
    )


def _read_ops(record: memoryview) -> tuple[OpsOfMethods | None, str]:
    """The record of ops, or why it cannot be read."""
    try:
        return MappingProxyType(decode(record)), ""
    except UnknownVersion as error:
        return None, f"its record of ops has {error}"
    except Damaged as error:
        raise corrupt(f"the record of ops behind the program is damaged: {error}") from error


def read_file(path: str | os.PathLike[str]) -> tuple[bytes, bool]:
    """The bytes of a ``.pte``, and whether a report beside it confirms them.

    Raises:
        ProgramError: it cannot be read, or the report has another checksum.
    """
    where = os.fspath(path)
    try:
        if os.path.exists(where) and not os.path.isdir(where) and not os.path.isfile(where):
            raise ProgramError(f"{where}: is no regular file; give the path of a .pte")
        data = Path(where).read_bytes()
    except OSError as error:
        raise ProgramError(
            f"{where}: cannot be read ({error.strerror or error}); give the path of a .pte"
        ) from error
    except ValueError as error:  # a path with a NUL character
        raise ProgramError(f"{where!r} is not a path; give the path of a .pte") from error
    recorded = recorded_hash(where, "program")
    if recorded is None:
        return data, False
    report, digest = recorded
    if sha256_of(data) != digest:
        raise ProgramError(
            f"{where}: the file is damaged or was changed: {report.name} beside it has another "
            "SHA-256; copy both again, quantize the model again, or remove the report if it is of "
            "another program"
        )
    return data, True


# --------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------

_EXTENDED_HEADER = struct.Struct("<4sIQQ")  # magic, header size, program size, segment base
XNN_HEADER = struct.Struct("<4sHIIIQ")  # magic, size, graph offset, size, data offset, size


def _check_is_program(data: memoryview, identifier: bytes) -> None:
    if not data:
        raise Unreadable("is empty; lower the model again")
    if bytes(data[4:8]) == identifier:
        return
    if bytes(data[4:6]) == identifier[:2]:
        raise Unreadable(
            f"is a .pte of another version: bytes 4 to 8 are {bytes(data[4:8])!r}, not "
            f"{identifier!r}; lower the model again"
        )
    kind = kind_of_file(data)
    what = f"{kind}, not a .pte" if kind else "not a .pte of ExecuTorch"
    raise Unreadable(f"is {what}; name the .pte, a file written by to_executorch()")


def _read_container(data: memoryview, beside: Mapping[str, bytes]) -> ProgramContents:
    """Read a program.

    Args:
        data: of the ``.pte``.
        beside: constants in other files, by name.
    """
    schema = program_schema()
    _check_is_program(data, schema.identifier)
    graph_bytes, segment_bytes = _split_segments(data)
    program = Buffer(graph_bytes, schema, "the program").root()

    segments = tuple(
        _slice(segment_bytes, entry.integer("offset"), entry.integer("size"), f"segment {index}")
        for index, entry in enumerate(program.children("segments"))
    )
    # Those of a sound file do not overlap, so that reading each once takes no longer than the file.
    if sum(map(len, segments)) > len(data):
        raise corrupt("the segments are larger than the file")
    stored: dict[str, memoryview] = {key: memoryview(value) for key, value in beside.items()}
    named_segments: dict[str, int] = {}
    for entry in program.children("named_data"):
        index = entry.integer("segment_index")
        name = entry.text("key")
        stored[name], named_segments[name] = _item(segments, index, "segment"), index
    named = _Named(stored)

    constant_bytes = sum(len(segments[index]) for index in set(named_segments.values()))
    kernel_constants = program.child("constant_segment")
    if kernel_constants is not None and kernel_constants.vector("offsets").size:
        segment = _item(segments, kernel_constants.integer("segment_index"), "segment")
        constant_bytes += len(segment)

    inline = program.children("backend_delegate_data")
    known: dict[tuple[str, str, int], tuple[DelegateContents, int]] = {}
    methods = []
    constants: dict[str, int | float] = {}
    for plan in program.children("execution_plan"):
        number = _constant_number(plan)
        if number is not None:
            constants[plan.text("name")] = number
            continue
        delegates = []
        for entry in plan.children("delegates"):
            place = entry.required("processed")
            index, location = place.integer("index"), place.enum("location")
            key = (entry.text("id"), location, index)
            if key not in known:
                blob = (
                    _item(segments, index, "segment")
                    if location == "SEGMENT"
                    else _item(inline, index, "inline delegate").raw("data")
                )
                known[key] = _read_delegate(key[0], blob, named)
            contents, inline_constants = known[key]
            delegates.append(contents)
            constant_bytes += inline_constants
        _check_kernel_constants(plan, named)
        methods.append(_read_method(plan, tuple(delegates)))
    return ProgramContents(
        tuple(methods), len(data), constant_bytes, constants=MappingProxyType(constants)
    )


def _check_kernel_constants(plan: Table, named: _Named) -> None:
    """Look for what kernels outside delegates read from data files."""
    for entry in plan.children("values"):
        kind, value = entry.member("val")
        extra = value.child("extra_tensor_info") if kind == "Tensor" else None
        if extra is not None and extra.enum("location") == "EXTERNAL":
            named[extra.text("fully_qualified_name")]


def _split_segments(data: memoryview) -> tuple[memoryview, memoryview]:
    """Return the program's flatbuffer and the bytes that segment offsets count from.

    References:
        ``_ExtendedHeader`` in ``executorch/exir/_serialize/_program.py``.
    """
    start = 8  # after the root offset and the identifier
    if len(data) < start + _EXTENDED_HEADER.size or bytes(data[start : start + 4]) != b"eh00":
        return data, memoryview(b"")
    _, header_size, program_size, base = _EXTENDED_HEADER.unpack_from(data, start)
    if header_size < _EXTENDED_HEADER.size:
        raise corrupt(f"the extended header claims {header_size} bytes")
    if header_size >= _EXTENDED_HEADER.size + 8:
        _slice(data, start + _EXTENDED_HEADER.size, 8, "the extended header")
        (size,) = struct.unpack_from("<Q", data, start + _EXTENDED_HEADER.size)
        end = base + size if size else program_size
        if end != len(data):
            raise corrupt(f"the program ends at byte {end} of {len(data)}")
    return _slice(data, 0, program_size, "the program"), data[min(base, len(data)) :]


def _constant_number(plan: Table) -> int | float | None:
    """What a method returns that takes nothing, calls nothing and returns one number."""
    values, outputs = plan.children("values"), plan.integers("outputs")
    if plan.integers("inputs") or len(outputs) != 1:
        return None
    if any(chain.children("instructions") for chain in plan.children("chains")):
        return None
    kind, value = _item(values, outputs[0], "value").member("val")
    if kind == "Int":
        return value.integer("int_val")
    return value.real("double_val") if kind == "Double" else None


def _read_method(plan: Table, delegates: tuple[DelegateContents, ...]) -> MethodContents:
    values = tuple(_value_info(entry) for entry in plan.children("values"))
    operators = []
    for entry in plan.children("operators"):
        name, overload = entry.text("name"), entry.text("overload")
        operators.append(f"{name}.{overload}" if overload else name)

    def infos(table: Table, name: str) -> tuple[ValueInfo, ...]:
        return tuple(_item(values, index, "value") for index in table.integers(name))

    calls: list[KernelCall | DelegateCall] = []
    for chain in plan.children("chains"):
        for instruction in chain.children("instructions"):
            kind, call = instruction.member("instr_args")
            if kind == "KernelCall":
                name = _item(operators, call.integer("op_index"), "operator")
                calls.append(KernelCall(name, infos(call, "args")))
            elif kind == "DelegateCall":
                index = call.integer("delegate_index")
                _item(delegates, index, "delegate")
                calls.append(DelegateCall(index))
    return MethodContents(
        plan.text("name"),
        infos(plan, "inputs"),
        infos(plan, "outputs"),
        tuple(calls),
        delegates,
    )


def _value_info(entry: Table) -> ValueInfo:
    kind, value = entry.member("val")
    if kind != "Tensor":
        return ValueInfo(_snake_case(kind))
    scalar_type = value.enum("scalar_type")
    return ValueInfo(
        _PROGRAM_DTYPES.get(scalar_type, scalar_type.lower()),
        value.integers("sizes"),
        value.enum("shape_dynamism") != "STATIC",
    )


# --------------------------------------------------------------------------------------------
# XNNPACK
# --------------------------------------------------------------------------------------------


def _read_delegate(
    backend_id: str, blob: memoryview, named: _Named
) -> tuple[DelegateContents, int]:
    """Return the contents of a delegate's blob, and how many bytes of it are constants."""
    if backend_id != XNNPACK_BACKEND:
        return DelegateContents(backend_id, (), (), (), (), len(blob)), 0
    if bytes(blob[4:8]) != b"XH00":
        raise Unreadable(
            f"holds an XNNPACK delegate that starts with {bytes(blob[4:8])!r}, not b'XH00'; "
            "the file is corrupt or its version is unknown: lower the model again"
        )
    if len(blob) < 4 + XNN_HEADER.size:
        raise corrupt("the header of an XNNPACK delegate is incomplete")
    _, _, offset, size, data_offset, data_size = XNN_HEADER.unpack_from(blob, 4)
    schema = xnnpack_schema()
    flatbuffer = _slice(blob, offset, size, "an XNNPACK graph")
    if bytes(flatbuffer[4:8]) != schema.identifier:
        raise Unreadable(
            f"holds an XNNPACK graph of schema {bytes(flatbuffer[4:8])!r}, and the installed "
            f"ExecuTorch has {schema.identifier!r}; lower the model again"
        )
    graph = Buffer(flatbuffer, schema, "an XNNPACK graph").root()
    inline = _slice(blob, data_offset, data_size, "constants of an XNNPACK delegate")
    constants = _Constants(graph.children("constant_data"), inline, named)
    tensors = tuple(
        _read_tensor(position, entry, constants)
        for position, entry in enumerate(graph.children("xvalues"))
    )
    ops = tuple(_read_op(entry, tensors) for entry in graph.children("xnodes"))

    def externals(name: str) -> tuple[int, ...]:
        found = [_item(tensors, index, "tensor") for index in graph.integers(name)]
        return tuple(t.id for t in sorted(found, key=lambda t: t.external_id or 0))

    contents = DelegateContents(
        backend_id, ops, tensors, externals("input_ids"), externals("output_ids"), len(blob)
    )
    return contents, sum(size for _, size in constants.unnamed) + sum(constants.scales.values())


class _Named:
    """Constants by name; whether one has the hash that it is named by is found out once."""

    def __init__(self, stored: Mapping[str, memoryview]) -> None:
        self._stored = stored
        self._sound: set[str] = set()

    def __getitem__(self, key: str) -> memoryview:
        data = self._stored.get(key)
        if data is None:
            raise Unreadable(
                f"its constant {key!r} is in a data file (.ptd) that was not named, or changed "
                "since: name those written with this program, as cq.inspect_program(path, "
                "data_path=...) does, and cq.load_program, cq.check"
            )
        if key in self._sound:
            return data
        # The serializer names constants by their SHA-256, scales with a prefix before it.
        digest = key.removeprefix("scale_")
        if re.fullmatch("[0-9a-f]{64}", digest) and sha256_of(data) != digest:
            raise corrupt(
                f"the bytes of constant {key!r} do not have the SHA-256 they are named by"
            )
        self._sound.add(key)
        return data


@dataclass(frozen=True)
class _Constant:
    key: str | None
    data: memoryview


class _Constants:
    """The constants that tensors of a graph refer to.

    Attributes:
        unnamed: where those in the delegate itself are, and how many bytes they take.
        scales: likewise of scales in the graph.
    """

    def __init__(self, entries: Iterable[Table], inline: memoryview, named: _Named) -> None:
        self.unnamed: set[tuple[int, int]] = set()
        self.scales: dict[int, int] = {}
        self._list = []
        for entry in entries:
            offset, size = entry.integer("offset"), entry.integer("size")
            if offset == _NAMED:
                key = entry.text("named_key")
                self._list.append(_Constant(key, named[key]))
            else:
                self.unnamed.add((offset, size))
                self._list.append(_Constant(None, _slice(inline, offset, size, "a constant")))

    def __getitem__(self, index: int) -> _Constant:
        return _item(self._list, index, "constant")


def _read_tensor(position: int, entry: Table, constants: _Constants) -> DelegateTensor:
    kind, table = entry.member("xvalue_union")
    quantization, params = "None", None
    if kind == "XNNQuantizedTensorValue":
        quantization, params = table.member("quant_params")
        table = table.required("tensor_value")
    if table.integer("id_out") != position:
        raise corrupt(f"tensor {position} has the id {table.integer('id_out')}")

    datatype = table.enum("datatype")
    dtype = _XNN_DTYPES.get(datatype)
    if dtype is None:
        raise corrupt(f"tensor {position} has the type {datatype}")
    shape = table.integers("dims")
    if dtype == "int4" and len(shape) < 2:
        raise corrupt(f"tensor {position} is int4 and has the shape {list(shape)}")

    scale: npt.NDArray[np.float32] | float | None = None
    zero_point = channel_axis = group_size = None
    if params is not None and quantization == "PerTensorQuant":
        scale, zero_point = params.real("scale"), params.integer("zero_point")
    elif params is not None and quantization in ("PerChannelQuant", "PerChannelGroupQuant"):
        grouped = quantization == "PerChannelGroupQuant"
        channel_axis = params.integer("channel_dim")
        group_size = params.integer("group_size") if grouped else None
        scale = _read_scales(params, shape, channel_axis, grouped, constants, position)
        zero_point = 0

    flags, external_id = table.integer("flags"), table.integer("external_id")
    index = table.integer("constant_buffer_idx")
    constant = constants[index] if index else None
    if constant is not None and len(constant.data) < stored_bytes(dtype, shape):
        raise corrupt(
            f"tensor {position} ({dtype}{list(shape)}) needs {stored_bytes(dtype, shape)} bytes "
            f"and has {len(constant.data)}"
        )
    return DelegateTensor(
        id=position,
        dtype=dtype,
        shape=shape,
        quantization=None if params is None else _snake_case(quantization.removesuffix("Quant")),
        scale=scale,
        zero_point=zero_point,
        channel_axis=channel_axis,
        group_size=group_size,
        is_constant=index != 0,
        is_input=bool(flags & _EXTERNAL_INPUT),
        is_output=bool(flags & _EXTERNAL_OUTPUT),
        external_id=None if external_id == INVALID_ID else external_id,
        constant_key=None if constant is None else constant.key,
        _data=None if constant is None else constant.data,
    )


def _read_scales(
    params: Table,
    shape: tuple[int, ...],
    axis: int,
    grouped: bool,
    constants: _Constants,
    position: int,
) -> npt.NDArray[np.float32]:
    """Return the scales, shape (channels,) or (channels, groups)."""
    count = params.integer("num_scales")
    channels = shape[axis] if 0 <= axis < len(shape) else 0
    if not channels or count % channels or not (grouped or count == channels):
        raise corrupt(f"tensor {position} {list(shape)} has {count} scales along axis {axis}")
    index = params.integer("scale_buffer_idx")
    if index == 0 and not grouped:
        stored = params.vector("scale")
        if len(stored) != count:
            raise corrupt(f"tensor {position} has {len(stored)} scales, not {count}")
        constants.scales[stored.__array_interface__["data"][0]] = stored.nbytes
        return frozen(stored)
    if index == 0:
        raise corrupt(f"tensor {position} has no scales")
    data = constants[index].data
    storage = STORAGE["bfloat16" if grouped else "float32"]
    if len(data) < count * storage.itemsize:
        raise corrupt(f"tensor {position} needs {count} scales and has {len(data)} bytes of them")
    stored = np.frombuffer(data, storage, count)
    return frozen(widen_bfloat16(stored).reshape(channels, -1)) if grouped else stored


_PAIRS = {
    "subsampling": "stride",
    "stride": "stride",
    "pooling": "kernel_size",
    "kernel": "kernel_size",
    "dilation": "dilation",
    "adjustment": "output_padding",
    "new": "size",
}
_SIDES = ("padding_top", "padding_right", "padding_bottom", "padding_left")


def _read_op(entry: Table, tensors: tuple[DelegateTensor, ...]) -> DelegateOp:
    union_name, node = entry.member("xnode_union")
    kind = _snake_case(union_name.removeprefix("XNN"))
    ids: dict[str, int] = {}
    raw: dict[str, ParamValue] = {}
    for name, value in node.plain_fields():
        if name.endswith("_id") and isinstance(value, int):
            if value != INVALID_ID:
                ids[name.removesuffix("_id")] = value
        else:
            raw[name] = value

    # All arities share one table, in which older files leave the later operands at 0.
    if kind.startswith("concatenate"):
        count = int(kind.removeprefix("concatenate"))
        ids = {k: v for k, v in ids.items() if not k.startswith("input") or int(k[5:]) <= count}
    for name, index in ids.items():
        _item(tensors, index, f"{kind} {name} tensor")

    params = _join_params(raw)
    bounds = entry.child("output_min_max")
    if bounds is not None:
        params["output_min"] = bounds.real("output_min")
        params["output_max"] = bounds.real("output_max")
    return DelegateOp(
        kind=kind,
        inputs=tuple(
            index
            for name, index in ids.items()
            if name not in ("filter", "bias") and not name.startswith("output")
        ),
        outputs=tuple(index for name, index in ids.items() if name.startswith("output")),
        weight=ids.get("filter"),
        bias=ids.get("bias"),
        params=MappingProxyType(params),
        debug_handle=entry.integer("debug_handle"),
    )


def _join_params(raw: Mapping[str, ParamValue]) -> dict[str, ParamValue]:
    """Join heights with widths and the four sides of a padding; see ``DelegateOp.params``."""
    params: dict[str, ParamValue] = {}
    for name, value in raw.items():
        stem, _, side = name.rpartition("_")
        if stem in _PAIRS and side in ("height", "width"):
            params[_PAIRS[stem]] = _integers(raw, f"{stem}_height", f"{stem}_width")
        elif name in _SIDES:
            params["padding"] = _integers(raw, *_SIDES)
        else:
            params[name] = value
    return params


def _integers(raw: Mapping[str, ParamValue], *names: str) -> tuple[int, ...]:
    values = (raw[name] for name in names)
    return tuple(value for value in values if isinstance(value, int))


# --------------------------------------------------------------------------------------------
# Small things
# --------------------------------------------------------------------------------------------


def _slice(data: memoryview, offset: int, size: int, what: str) -> memoryview:
    if offset + size > len(data):
        raise corrupt(f"{what} should end at byte {offset + size} of {len(data)}")
    return data[offset : offset + size]


def _item(items: Sequence[_T], index: int, what: str) -> _T:
    if not 0 <= index < len(items):
        raise corrupt(f"{what} {index} is referred to, and there are {len(items)}")
    return items[index]


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name.replace("ReLU", "Relu")).lower()
