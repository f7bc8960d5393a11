"""The record of ops behind a program: what is written is read, and nothing else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.flow import small_result

from custom_quantizer.backends.xnnpack import op_record
from custom_quantizer.backends.xnnpack.checksum import seal, split_checksum
from custom_quantizer.backends.xnnpack.op_record import (
    Damaged,
    RecordedOp,
    UnknownVersion,
    decode,
    encode,
    split_record,
)
from custom_quantizer.backends.xnnpack.readback import read_program
from custom_quantizer.errors import ProgramError
from custom_quantizer.ops.placement import Placement

_INT8 = (Placement.INTEGER, "int8", "")
_PORTABLE = (Placement.OUTSIDE, "portable", "why")
OPS = (
    RecordedOp("conv2d", "stem.0", "conv", "conv2d", *_INT8, (3, 4), (), True),
    RecordedOp("mean_sum", "pool", "sum", "mean", *_PORTABLE, (), (0, 2)),
)
MANY = 10**9

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)
NUMBERS = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)
RECORDED = st.builds(
    RecordedOp,
    node=TEXT.filter(bool),
    path=TEXT,
    family=TEXT,
    written=TEXT.filter(bool),
    placement=st.sampled_from(Placement),
    kernel=TEXT,
    reason=TEXT,
    handles=NUMBERS,
    calls=NUMBERS,
    has_bias=st.booleans(),
)


def packed(text: bytes) -> bytes:
    packer = zlib.compressobj(9, zdict=op_record._DICTIONARY)
    return packer.compress(text) + packer.flush()


def record(document: Any) -> memoryview:
    """A record that holds any JSON."""
    stored = packed(json.dumps(document).encode())
    return memoryview(stored + op_record._FOOTER.pack(op_record._MARK, 1, len(stored)))


def document() -> dict[str, Any]:
    unpacker = zlib.decompressobj(zdict=op_record._DICTIONARY)
    found: dict[str, Any] = json.loads(unpacker.decompress(encode({"forward": OPS}, MANY)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(TEXT, st.lists(RECORDED, max_size=6).map(tuple), max_size=3))
def test_what_is_written_is_read(methods: dict[str, tuple[RecordedOp, ...]]) -> None:
    written = encode(methods, MANY)
    program, found = split_record(memoryview(b"program" + written))
    assert (program, found) == (b"program", written)
    assert found is not None
    assert decode(found) == methods


def test_a_record_is_small() -> None:
    """Less than 20 bytes for an op, where there are a few."""
    layer = ("conv", Placement.INTEGER, "xnnpack int8", "", (), True)

    def op(number: int) -> RecordedOp:
        family, placement, kernel, reason, calls, bias = layer
        name, path = f"conv2d_{number}", f"blocks.{number}.conv"
        handles = (3 * number, 3 * number + 1)
        return RecordedOp(name, path, family, name, placement, kernel, reason, handles, calls, bias)

    sizes = {n: len(encode({"forward": tuple(map(op, range(n)))}, 0)) for n in (10, 100)}
    assert sizes[10] < 200
    assert sizes[100] < 1000


def test_names_that_a_terminal_would_obey_are_written_as_questions() -> None:
    op = replace(OPS[0], node="a\x1b[2J", path="b\n c")
    (read,) = decode(memoryview(encode({"m": (op,)}, MANY)))["m"]
    assert (read.node, read.path) == ("a?[2J", "b c")


@pytest.mark.parametrize(("free", "reasons"), [(4096, True), (4095, False)])
def test_reasons_give_way_where_the_file_is_small(
    free: int, reasons: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(encode({"forward": OPS}, MANY))
    monkeypatch.setattr(op_record, "_FREE_BYTES", size - (4096 - free))
    found = decode(memoryview(encode({"forward": OPS}, 0)))["forward"]
    assert [op.reason for op in found] == ["", "why" if reasons else ""]
    assert [op.handles for op in found] == [op.handles for op in OPS]
    # One hundredth of a large file is more.
    found = decode(memoryview(encode({"forward": OPS}, 100 * size)))["forward"]
    assert found == OPS


def test_no_record_is_larger_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_record, "_FREE_BYTES", 40)
    assert encode({"forward": OPS}, 3999) == b""
    assert encode({"forward": OPS}, 100 * len(encode({"forward": OPS}, MANY))) != b""


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({key: value})


@pytest.mark.parametrize(
    "damage",
    [
        lambda columns: columns.pop("node"),
        lambda columns: columns["node"].pop(),
        lambda columns: columns["path"].append(""),
        lambda columns: columns["calls"].append([]),
        change("node", "ab"),
        change("node", ["a", 1]),
        change("node", ["a", None]),
        change("node", ["a", "b\x1b[2J"]),
        change("node", ["a", "b\n"]),
        change("node", ["a", "b\u202e"]),
        change("node", ["a", "b" * 4097]),
        change("kernel", [0, 2]),
        change("kernel", [0, -1]),
        change("kernel", [0, True]),
        change("kernel", [0, 1.0]),
        change("reason", [0, 2]),
        change("bias", [0, 2]),
        change("bias", [0, False]),
        change("kernels", [["int8", "INTEGER"], ["int8", "EVERYWHERE"]]),
        change("kernels", [["int8", "INTEGER"], ["int8"]]),
        change("kernels", {"int8": "INTEGER"}),
        change("handles", [[3], [2**32 - 3]]),
        change("handles", [[3], [-4]]),
        change("handles", [[3], [True]]),
        change("handles", [[3], 3]),
        change("handles", [[3], [[3]]]),
    ],
)
def test_other_columns_are_refused(damage: Callable[[dict[str, Any]], None]) -> None:
    columns = document()["forward"]
    decode(record({"forward": columns}))
    damage(columns)
    with pytest.raises(Damaged):
        decode(record({"forward": columns}))


@pytest.mark.parametrize("content", [None, [], 3, "forward", {"forward": []}, {"f\n": {}}])
def test_other_documents_are_refused(content: Any) -> None:
    with pytest.raises(Damaged):
        decode(record(content))


def test_what_unpacks_to_more_than_a_record_is_refused() -> None:
    bomb = packed(b" " * (1 << 22) + json.dumps(document()).encode())
    assert len(bomb) < 10_000
    footer = op_record._FOOTER.pack(op_record._MARK, 1, len(bomb))
    with pytest.raises(Damaged):
        decode(memoryview(bomb + footer))
    deep = packed(b"[" * 100_000)
    with pytest.raises(Damaged):
        decode(memoryview(deep + op_record._FOOTER.pack(op_record._MARK, 1, len(deep))))
    large = bytes((1 << 20) + 1)
    with pytest.raises(Damaged, match="it takes 1,048,577 bytes"):
        decode(memoryview(large + op_record._FOOTER.pack(op_record._MARK, 1, len(large))))


def test_a_footer_that_claims_more_than_the_file_is_none() -> None:
    stored = b"1234" + op_record._FOOTER.pack(op_record._MARK, 1, 5)
    assert split_record(memoryview(stored)) == (stored, None)
    assert split_record(memoryview(b"")) == (b"", None)


def test_an_unknown_version_is_left_alone() -> None:
    written = encode({"forward": OPS}, MANY)
    size = op_record._FOOTER.size
    newer = written[:-size] + op_record._FOOTER.pack(op_record._MARK, 2, len(written) - size)
    with pytest.raises(UnknownVersion, match="version 2, and this package reads 1"):
        decode(memoryview(newer))
    buffer = _program()
    for data in (seal(buffer + newer), buffer + newer):
        contents = read_program(data)
        assert contents.ops is None
        assert contents.ops_note == "its record of ops has version 2, and this package reads 1"
        assert contents.delegates[0].ops


def test_a_damaged_record_in_a_file_is_refused() -> None:
    buffer = _program()
    assert read_program(buffer).ops is None
    columns = document()["forward"]
    contents = read_program(seal(buffer + bytes(record({"forward": columns}))))
    assert contents.ops == {"forward": OPS}
    assert contents.size_bytes == len(seal(buffer + bytes(record({"forward": columns}))))
    columns["node"].pop()
    broken = buffer + bytes(record({"forward": columns}))
    for data in (seal(broken), broken):
        with pytest.raises(ProgramError, match=r"net: the record of ops .* damaged: its columns"):
            read_program(data, name="net")


def _program() -> bytes:
    """A program as ExecuTorch wrote it."""
    lowered = small_result().lowered
    assert lowered is not None
    whole, _ = split_checksum(memoryview(lowered.buffer), "net")
    return bytes(split_record(whole)[0])
