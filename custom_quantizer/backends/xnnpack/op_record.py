"""The record of ops behind a program: the names that its delegates do not hold.

A delegate numbers its nodes anew. So that ``inspect`` of a ``.pte`` names ops as plans, reports and
rules do, and counts them alike, what became of each op stands between the program and its checksum,
where ExecuTorch does not look::

    program | compressed JSON | mark, version, size of the JSON | checksum

A reader without it sees the delegate's own nodes. The record is written by whoever wrote the file,
and is read like all of it: every type, size and name is checked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from custom_quantizer.ops.placement import PlacedOp, Placement

__all__ = [
    "Damaged",
    "OpsOfMethods",
    "RecordedOp",
    "UnknownVersion",
    "decode",
    "encode",
    "split_record",
]

_VERSION = 1
_FOOTER = struct.Struct("<8sII")  # mark, version, size of the JSON as it is stored
_MARK = b"cqOPSREC"

_FREE_BYTES, _SHARE = 4096, 100
"""A record takes so many bytes, or this part of the program, at most."""
_MOST_STORED, _MOST_JSON = 1 << 20, 1 << 22
_LONGEST_TEXT = 4096
_MOST_NUMBER = 1 << 32

_DICTIONARY = (
    b'"xnnpack float, int16 emulated""portable kernel, outside the delegate""folded away"'
    b'"xnnpack float""xnnpack table""xnnpack packed int4""xnnpack int8 container"'
    b'"EMULATED""OUTSIDE""FLOAT""TABLE""XNNPACK has no integer kernel for it'
    b"int16: emulated in float, XNNPACK has no kernel above 8 bits"
    b'"nothing is left of it after lowering""fused into the op before it"'
    b'"max_pool2d""adaptive_avg_pool2d""hardtanh""reshape""flatten""linear""relu""add""cat""mean"'
    b'"conv2d_1""FOLDED"]],"reasons":["","node":["","path":["","family":["","written":["",'
    b'"kernel":[0,"reason":[0,"handles":[[1,"calls":[[],"bias":[0,1,0,1]]}}'
    b'{"forward":{"kernels":[["xnnpack int8","INTEGER"],["'
)
"""What zlib takes as having gone before, so that a small network's record is small. It belongs to
the version, as the columns do."""


@dataclass(frozen=True)
class RecordedOp(PlacedOp):
    """What became of an op, and where in the program it is.

    Attributes:
        handles: debug handles of the delegates' nodes that stand for it.
        calls: positions of its kernels among those that the method calls outside delegates.
        has_bias: whether it adds one in the graph; a delegate adds zeros to some others.
    """

    handles: tuple[int, ...] = field(default=(), repr=False)
    calls: tuple[int, ...] = field(default=(), repr=False)
    has_bias: bool = field(default=False, repr=False)


OpsOfMethods: TypeAlias = Mapping[str, tuple[RecordedOp, ...]]
"""Ops in graph order, by the method that runs them."""


class Damaged(Exception):
    """What is wrong with a record."""


class UnknownVersion(Exception):
    """The record was written by a version of this package that this one does not know."""


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def encode(methods: OpsOfMethods, program_bytes: int) -> bytes:
    """The record, with its footer; empty if it would take too much of the file.

    Args:
        methods: what to write down.
        program_bytes: size of the program.
    """
    limit = min(_MOST_STORED, max(_FREE_BYTES, program_bytes // _SHARE))
    for with_reasons in (True, False):
        text = json.dumps(
            {method: _columns(ops, with_reasons) for method, ops in methods.items()},
            separators=(",", ":"),
        ).encode()
        packer = zlib.compressobj(9, zdict=_DICTIONARY)
        stored = packer.compress(text) + packer.flush()
        if len(stored) + _FOOTER.size <= limit and len(text) <= _MOST_JSON:
            return stored + _FOOTER.pack(_MARK, _VERSION, len(stored))
    return b""


def _columns(ops: Sequence[RecordedOp], with_reasons: bool) -> dict[str, list[Any]]:
    """One list for each attribute, which compresses better than one object for each op."""
    kernels = list(dict.fromkeys((op.kernel, op.placement) for op in ops))
    reasons = list(dict.fromkeys(op.reason if with_reasons else "" for op in ops))
    number = {reason: index for index, reason in enumerate(reasons)}
    return {
        "kernels": [[_line(label), placement.name] for label, placement in kernels],
        "reasons": [_line(reason) for reason in reasons],
        "node": [_line(op.node) for op in ops],
        "path": [_line(op.path) for op in ops],
        "family": [_line(op.family) for op in ops],
        # Few ops are parts of another call.
        "written": ["" if op.written == op.node else _line(op.written) for op in ops],
        "kernel": [kernels.index((op.kernel, op.placement)) for op in ops],
        "reason": [number[op.reason if with_reasons else ""] for op in ops],
        "handles": _differences(op.handles for op in ops),
        "calls": [list(op.calls) for op in ops],
        "bias": [int(op.has_bias) for op in ops],
    }


def _differences(handles: Iterable[Sequence[int]]) -> list[list[int]]:
    """Of each handle to the one before it: mostly 1."""
    found, last = [], 0
    for of_op in handles:
        found.append([handle - before for before, handle in pairwise((last, *of_op))])
        last = of_op[-1] if of_op else last
    return found


def _line(text: str) -> str:
    """Text that a terminal shows as it is."""
    shown = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return shown[:_LONGEST_TEXT]


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def split_record(data: memoryview) -> tuple[memoryview, memoryview | None]:
    """A program without its record, and the record, if it has one.

    Args:
        data: of the file, without the checksum.
    """
    start = len(data) - _FOOTER.size
    if start < 0:
        return data, None
    mark, _, size = _FOOTER.unpack_from(data, start)
    if mark != _MARK or size > start:
        return data, None
    return data[: start - size], data[start - size :]


def decode(record: memoryview) -> OpsOfMethods:
    """The ops of a record that :func:`split_record` found.

    Raises:
        UnknownVersion: it may be whole.
        Damaged: it is not what :func:`encode` writes.
    """
    _, version, size = _FOOTER.unpack_from(record, len(record) - _FOOTER.size)
    if version != _VERSION:
        raise UnknownVersion(f"version {version}, and this package reads {_VERSION}")
    if size > _MOST_STORED:
        raise Damaged(f"it takes {size:,} bytes")
    unpacker = zlib.decompressobj(zdict=_DICTIONARY)
    try:
        text = unpacker.decompress(record[:size], _MOST_JSON)
        document = json.loads(text) if unpacker.eof and not unpacker.unused_data else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise Damaged("it is not compressed JSON") from error
    if not isinstance(document, dict):
        raise Damaged("it is not compressed JSON")
    return {_text(method): _ops(columns) for method, columns in document.items()}


def _ops(columns: object) -> tuple[RecordedOp, ...]:
    if not isinstance(columns, dict):
        raise Damaged("the ops of a method are no columns")
    kernels = [_kernel(entry) for entry in _list(columns.get("kernels"))]
    reasons = _texts(columns.get("reasons"))
    nodes = _texts(columns.get("node"))
    texts = [_texts(columns.get(name), len(nodes)) for name in ("path", "family", "written")]
    indices = [
        _numbers(columns.get(name), len(bounds), len(nodes))
        for name, bounds in (("kernel", kernels), ("reason", reasons), ("bias", "01"))
    ]
    handles = _sums(_list(columns.get("handles"), len(nodes)))
    calls = [_numbers(entry, _MOST_NUMBER) for entry in _list(columns.get("calls"), len(nodes))]
    return tuple(
        RecordedOp(
            node=node,
            path=path,
            family=family,
            written=written or node,
            placement=kernels[kernel][1],
            kernel=kernels[kernel][0],
            reason=reasons[reason],
            handles=of_op,
            calls=outside,
            has_bias=bool(bias),
        )
        for node, path, family, written, kernel, reason, bias, of_op, outside in zip(
            nodes, *texts, *indices, handles, calls, strict=True
        )
    )


def _sums(differences: Iterable[object]) -> list[tuple[int, ...]]:
    """The handles that :func:`_differences` are of."""
    found, last = [], 0
    for of_op in differences:
        handles = []
        for difference in _list(of_op):
            if type(difference) is not int or not 0 <= last + difference < _MOST_NUMBER:
                raise Damaged("a number in it is out of range")
            last += difference
            handles.append(last)
        found.append(tuple(handles))
    return found


def _kernel(entry: object) -> tuple[str, Placement]:
    label, placement = _texts(entry, 2)
    if placement not in Placement.__members__:
        raise Damaged(f"{placement!r} is no placement")
    return label, Placement[placement]


def _list(value: object, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        raise Damaged("its columns differ in length")
    return value


def _texts(value: object, count: int | None = None) -> list[str]:
    return [_text(entry) for entry in _list(value, count)]


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise Damaged("a name in it is not one line of text")
    return value


def _numbers(value: object, limit: int, count: int | None = None) -> tuple[int, ...]:
    found: Iterable[object] = _list(value, count)
    numbers = tuple(number for number in found if type(number) is int and 0 <= number < limit)
    if len(numbers) != len(_list(value)):
        raise Damaged("a number in it is out of range")
    return numbers
