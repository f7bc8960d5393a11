"""Flatbuffers, read and written by the text of their schema.

ExecuTorch's wheel ships both of its schemas as text. The reader follows them: it is exact
(``flatc`` prints floats rounded, this reads the 32 bits of a scale), checks every offset, and needs
neither a subprocess nor generated code. The writer writes what was read, equal parts once.

References:
    Flatbuffers internals: https://flatbuffers.dev/internals/
    ``schema/program.fbs`` and ``backends/xnnpack/serialization/schema.fbs`` in ExecuTorch 1.5.1.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import flatbuffers
import numpy as np
import numpy.typing as npt

from custom_quantizer.errors import ProgramError

__all__ = [
    "Buffer",
    "Contents",
    "Member",
    "ParamValue",
    "Schema",
    "Table",
    "Unreadable",
    "corrupt",
    "program_schema",
    "write",
    "xnnpack_schema",
]

ParamValue: TypeAlias = int | float | tuple[int, ...]


class Unreadable(Exception):
    """Why a file cannot be read, without its name; ``read_program`` adds that."""


def corrupt(problem: str) -> Unreadable:
    """The exception for a file with this problem."""
    return Unreadable(
        f"{problem}, so the file is truncated or corrupt; copy it again or lower the model again"
    )


_MOST_TABLES = 1 << 21
"""Bounds the memory that reading a file takes; the largest networks have tens of thousands."""

SHORT = 64
"""Bytes of a vector, at most, that tables may share: shapes and the like."""

SCALARS: Mapping[str, np.dtype[Any]] = {
    "bool": np.dtype("u1"),
    "byte": np.dtype("i1"),
    "ubyte": np.dtype("u1"),
    "short": np.dtype("<i2"),
    "ushort": np.dtype("<u2"),
    "int": np.dtype("<i4"),
    "uint": np.dtype("<u4"),
    "uint32": np.dtype("<u4"),
    "long": np.dtype("<i8"),
    "int64": np.dtype("<i8"),
    "uint64": np.dtype("<u8"),
    "float": np.dtype("<f4"),
    "double": np.dtype("<f8"),
}


@dataclass(frozen=True)
class Field:
    slot: int
    type: str
    is_vector: bool


@dataclass(frozen=True)
class Schema:
    """A parsed ``.fbs``, as far as ExecuTorch's two use the language.

    Tables, enums with explicit values and unions; no structs, no explicit field ids, no default
    other than 0.
    """

    identifier: bytes
    root: str
    tables: Mapping[str, Mapping[str, Field]]
    enums: Mapping[str, tuple[str, Mapping[int, str]]]  # underlying type, names by value
    unions: Mapping[str, tuple[tuple[str, str], ...]]  # (name, table), the first has tag 1


@functools.cache
def program_schema() -> Schema:
    """Of a ``.pte``."""
    return _parse_schema("schema/scalar_type.fbs", "schema/program.fbs")


@functools.cache
def xnnpack_schema() -> Schema:
    """Of a graph of XNNPACK."""
    return _parse_schema("backends/xnnpack/serialization/schema.fbs")


def _parse_schema(*paths: str) -> Schema:
    """Parse schema files of the installed ExecuTorch, included ones first.

    Raises:
        ProgramError: the installed ExecuTorch does not have the file.
    """
    package = importlib.resources.files("executorch")
    try:
        text = "\n".join(package.joinpath(path).read_text("utf-8") for path in paths)
    except OSError as error:
        raise ProgramError(
            f"the installed ExecuTorch has no {' and '.join(paths)}; install executorch 1.5"
        ) from error
    text = re.sub(r"//[^\n]*", "", text)

    enums = {}
    for name, underlying, body in re.findall(r"\benum (\w+)\s*:\s*(\w+)\s*\{(.*?)\}", text, re.S):
        members = re.findall(r"(\w+)\s*=\s*(\d+)", body)
        enums[name] = (underlying, {int(value): member for member, value in members})
    unions = {}
    for name, body in re.findall(r"\bunion (\w+)\s*\{(.*?)\}", text, re.S):
        members = re.findall(r"(\w+)(?:\s*:\s*(\w+))?", body)
        unions[name] = tuple((alias, table or alias) for alias, table in members)
    tables = {}
    for name, body in re.findall(r"\btable (\w+)\s*\{(.*?)\}", text, re.S):
        fields, slot = {}, 0
        for field_name, bracket, type_name in re.findall(r"(\w+)\s*:\s*(\[?)\s*(\w+)", _bare(body)):
            # A union takes two slots: its tag, then its table.
            slot += type_name in unions
            fields[field_name] = Field(slot, type_name, bool(bracket))
            slot += 1
        tables[name] = fields
    (identifier,) = re.findall(r'file_identifier "(\w{4})"', text)
    (root,) = re.findall(r"root_type (\w+)", text)
    return Schema(identifier.encode(), root, tables, enums, unions)


def _bare(body: str) -> str:
    """Remove the attributes of a table's fields: ``(deprecated, force_align: 16)``."""
    return re.sub(r"\([^)]*\)", "", body)


class Buffer:
    """A flatbuffer whose every read is checked against its bounds."""

    def __init__(self, data: memoryview, schema: Schema, name: str) -> None:
        self.data = data
        self.schema = schema
        self.name = name
        # Offsets of a corrupt buffer may overlap, so that following all would take forever. Of a
        # sound one, no vector is visited twice but the short ones that the writer shares.
        self._bytes_left = len(data)
        self._tables_left = _MOST_TABLES

    def visit(self, size: int) -> None:
        """Count bytes that are read."""
        if size > SHORT:
            self._bytes_left -= size
        if self._bytes_left < 0:
            raise corrupt(f"{self.name} refers to more than fits in it")

    def array(self, dtype: np.dtype[Any], position: int, count: int) -> npt.NDArray[Any]:
        """Numbers in a row, which are not copied."""
        if position < 0 or position + count * dtype.itemsize > len(self.data):
            raise corrupt(f"{self.name} refers to bytes after its end ({len(self.data)})")
        return np.frombuffer(self.data, dtype, count, position)

    def scalar(self, type_name: str, position: int) -> int | float:
        """A number of the schema's type."""
        value: int | float = self.array(SCALARS[type_name], position, 1)[0].item()
        return value

    def integer(self, type_name: str, position: int) -> int:
        """An integer of the schema's type."""
        return int(self.scalar(type_name, position))

    def follow(self, position: int) -> int:
        """Where an offset leads."""
        return position + self.integer("uint", position)

    def table(self, name: str, position: int) -> Table:
        """A table of the schema."""
        # Nothing of a vector of offsets to one table is visited twice, and each takes memory here.
        self._tables_left -= 1
        if self._tables_left < 0:
            raise corrupt(f"{self.name} has more than {_MOST_TABLES:,} tables")
        return Table(self, name, position)

    def root(self) -> Table:
        """The table that holds all."""
        return self.table(self.schema.root, self.follow(0))


class Table:
    """A table in a buffer; reads a field when it is asked for, by the schema's name."""

    def __init__(self, buffer: Buffer, name: str, position: int) -> None:
        self._buffer = buffer
        self._name = name
        self._position = position
        self._vtable = position - buffer.integer("int", position)
        self._slots = buffer.integer("ushort", self._vtable) // 2 - 2

    def _field(self, name: str) -> Field:
        found = self._buffer.schema.tables[self._name].get(name)
        if found is None:
            raise Unreadable(
                f"cannot be read: the installed ExecuTorch has no field {name!r} in its table "
                f"{self._name!r}; install executorch 1.5"
            )
        return found

    def _at(self, slot: int) -> int | None:
        """Return the position of a field, or None where it is absent."""
        if slot >= self._slots:
            return None
        offset = self._buffer.integer("ushort", self._vtable + 4 + 2 * slot)
        return self._position + offset if offset else None

    def _scalar(self, name: str) -> int | float:
        found = self._field(name)
        position = self._at(found.slot)
        if position is None:
            return 0
        underlying, _ = self._buffer.schema.enums.get(found.type, (found.type, {}))
        return self._buffer.scalar(underlying, position)

    def integer(self, name: str) -> int:
        """An integer; 0 where it is absent."""
        return int(self._scalar(name))

    def real(self, name: str) -> float:
        """A number; 0 where it is absent."""
        return float(self._scalar(name))

    def enum(self, name: str) -> str:
        """The schema's name of a value of an enum."""
        type_name = self._field(name).type
        _, members = self._buffer.schema.enums[type_name]
        value = self.integer(name)
        if value not in members:
            raise corrupt(f"{self._name}.{name} is {value}, which is no {type_name}")
        return members[value]

    def vector(self, name: str) -> npt.NDArray[Any]:
        """A vector of numbers, or of offsets, which is not copied."""
        found = self._field(name)
        dtype = SCALARS.get(found.type, SCALARS["uint"])  # of anything else: offsets
        position = self._at(found.slot)
        if position is None:
            return np.empty(0, dtype)
        start = self._buffer.follow(position)
        return self._buffer.array(dtype, start + 4, self._buffer.integer("uint", start))

    def integers(self, name: str) -> tuple[int, ...]:
        """A vector of integers."""
        values = self.vector(name)
        self._buffer.visit(values.nbytes)
        return tuple(values.tolist())

    def raw(self, name: str) -> memoryview:
        """The bytes of a vector."""
        values = self.vector(name)
        self._buffer.visit(values.nbytes)
        return values.data

    def text(self, name: str) -> str:
        """A string; empty where it is absent."""
        position = self._at(self._field(name).slot)
        if position is None:
            return ""
        start = self._buffer.follow(position)
        length = self._buffer.integer("uint", start)
        self._buffer.visit(length)
        encoded = self._buffer.array(SCALARS["ubyte"], start + 4, length).tobytes()
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise corrupt(f"{self._name}.{name} is not text") from error

    def child(self, name: str) -> Table | None:
        """A table, if it is there."""
        found = self._field(name)
        position = self._at(found.slot)
        if position is None:
            return None
        return self._buffer.table(found.type, self._buffer.follow(position))

    def required(self, name: str) -> Table:
        """A table that has to be there."""
        table = self.child(name)
        if table is None:
            raise corrupt(f"{self._name}.{name} is missing")
        return table

    def children(self, name: str) -> tuple[Table, ...]:
        """A vector of tables."""
        found = self._field(name)
        position = self._at(found.slot)
        if position is None:
            return ()
        start = self._buffer.follow(position) + 4
        return tuple(
            self._buffer.table(found.type, start + 4 * index + offset)
            for index, offset in enumerate(self.integers(name))
        )

    def member(self, name: str) -> tuple[str, Table]:
        """Return which member a union holds, by the schema's alias, and its table."""
        found = self._field(name)
        members = self._buffer.schema.unions[found.type]
        tag_position, position = self._at(found.slot - 1), self._at(found.slot)
        tag = 0 if tag_position is None else self._buffer.integer("ubyte", tag_position)
        if position is None or not 1 <= tag <= len(members):
            raise corrupt(f"{self._name}.{name} holds member {tag} of {found.type}")
        alias, table_name = members[tag - 1]
        return alias, self._buffer.table(table_name, self._buffer.follow(position))

    def contents(self) -> Contents:
        """All that it holds, and what that holds."""
        schema, fields = self._buffer.schema, dict[str, Any]()
        for name, found in schema.tables[self._name].items():
            position = self._at(found.slot)
            if position is None:
                continue
            if found.type in schema.unions:
                members = [alias for alias, _ in schema.unions[found.type]]
                alias, table = self.member(name)
                fields[name] = Member(members.index(alias) + 1, table.contents())
            elif found.type == "string":
                fields[name] = self.text(name)
            elif found.type in schema.tables:
                if found.is_vector:
                    fields[name] = [table.contents() for table in self.children(name)]
                else:
                    fields[name] = self.required(name).contents()
            else:
                fields[name] = self.vector(name) if found.is_vector else self._scalar(name)
        return Contents(self._name, fields)

    def plain_fields(self) -> Iterator[tuple[str, ParamValue]]:
        """Yield all scalars and vectors of scalars, in the schema's order."""
        for name, found in self._buffer.schema.tables[self._name].items():
            if found.type not in SCALARS:
                continue
            yield name, self.integers(name) if found.is_vector else self._scalar(name)


# --------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """A table that can be changed and written.

    Attributes:
        table: the schema's name.
        fields: by name, those that are there: a number, a string, an array, a table, a list of
            tables or the member of a union.
    """

    table: str
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """What a field holds; ``None`` where it is absent."""
        return self.fields.get(name)

    def number(self, name: str) -> int:
        """An integer; 0 where it is absent."""
        return int(self.fields.get(name, 0))


@dataclass
class Member:
    """What a union holds.

    Attributes:
        tag: position of the member in the schema, from 1.
        value: its table.
    """

    tag: int
    value: Contents


def write(contents: Contents, schema: Schema) -> bytes:
    """A flatbuffer of a root table and all in it, in which equal parts are stored once.

    Readers cannot tell: they follow offsets, and two may lead to one place. No table of XNNPACK's
    graph has to start at more than 8 bytes, which is what a flatbuffer gives.
    """
    writer = _Writer(schema)
    writer.builder.Finish(writer.table(contents), file_identifier=schema.identifier)
    return bytes(writer.builder.Output())


class _Writer:
    """Writes from the end, as flatbuffers are: what a table refers to before the table."""

    def __init__(self, schema: Schema) -> None:
        self.builder = flatbuffers.Builder()
        # Only what was there is written, and that even if it is 0.
        self.builder.ForceDefaults(True)
        self._schema = schema
        self._written: dict[Any, int] = {}

    def table(self, contents: Contents) -> int:
        """Where a table is, from the end."""
        slots: list[tuple[int, int, str, Any]] = []  # size, slot, type, number or offset
        fields = self._schema.tables[contents.table]
        for name, value in contents.fields.items():
            found = fields[name]
            if isinstance(value, Member):
                slots.append((1, found.slot - 1, "ubyte", value.tag))
                slots.append((4, found.slot, "", self.table(value.value)))
            elif isinstance(value, (str, np.ndarray, Contents, list)):
                slots.append((4, found.slot, "", self._part(value)))
            else:
                kind, _ = self._schema.enums.get(found.type, (found.type, {}))
                slots.append((SCALARS[kind].itemsize, found.slot, kind, value))
        # The widest first, so that little is lost between them.
        slots.sort(key=lambda slot: (-slot[0], slot[1]))
        key = contents.table, *((slot, repr(value)) for _, slot, _, value in slots)
        if key not in self._written:
            used = (field.slot for field in fields.values())
            self.builder.StartObject(max(used, default=-1) + 1)
            for _, slot, kind, value in slots:
                if kind:
                    getattr(self.builder, f"Prepend{_BUILDER[kind]}Slot")(slot, value, 0)
                else:
                    self.builder.PrependUOffsetTRelativeSlot(slot, value, 0)
            self._written[key] = self.builder.EndObject()
        return self._written[key]

    def _part(self, value: str | npt.NDArray[Any] | Contents | list[Contents]) -> int:
        if isinstance(value, Contents):
            return self.table(value)
        key: Any
        if isinstance(value, list):
            places = [self.table(entry) for entry in value]
            self.builder.StartVector(4, len(places), 4)
            for place in reversed(places):
                self.builder.PrependUOffsetTRelative(place)
            return int(self.builder.EndVector())
        key = value if isinstance(value, str) else (value.dtype.str, value.tobytes())
        if key not in self._written:
            self._written[key] = int(
                self.builder.CreateString(value)
                if isinstance(value, str)
                else self.builder.CreateNumpyVector(value)
            )
        return self._written[key]


_BUILDER = {
    "bool": "Bool",
    "byte": "Int8",
    "ubyte": "Uint8",
    "short": "Int16",
    "ushort": "Uint16",
    "int": "Int32",
    "uint": "Uint32",
    "uint32": "Uint32",
    "long": "Int64",
    "int64": "Int64",
    "uint64": "Uint64",
    "float": "Float32",
    "double": "Float64",
}
"""By type of the schema, what the builder calls it."""
