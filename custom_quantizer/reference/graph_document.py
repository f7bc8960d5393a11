"""The file of a saved graph: JSON and tensors, nothing that could run.

A safetensors file. Its metadata hold the graph as JSON, which the models below describe, and the
SHA-256 of the whole file with the digits of that hash read as zeros. Tensors are the constants and
the example inputs; no shape can claim more than the file holds.

References:
    The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from custom_quantizer.core.file_kinds import PT2_FILE, kind_of_file

__all__ = [
    "ConstantEntry",
    "DimEntry",
    "Document",
    "FormatError",
    "GraphEntry",
    "NodeEntry",
    "Record",
    "SizeEntry",
    "TensorEntry",
    "first_problem",
    "is_number",
    "pack",
    "unpack",
]

FORMAT = "custom_quantizer.graph"
VERSION = 1

_LARGEST_DOCUMENT = 64 << 20
_NO_HASH = "0" * 64
_TEXT = re.compile('\\{"sha256":"([0-9a-f]{64})","document":(.*)\\}', re.DOTALL)

# Names become attributes and parts of the Python code that fx writes for a graph.
Name = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]{0,255}$")]
Path = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,255}(\.[A-Za-z0-9_]{1,255}){0,31}$")]
Key = Annotated[str, Field(pattern="^[a-z]{1,16}[0-9]{0,9}$")]
# Shown in tables and messages: no control characters, which a terminal would obey.
Text = Annotated[str, Field(max_length=4000, pattern=r"^[^\p{Cc}\p{Cf}\u2028\u2029]*$")]
Size = Annotated[int, Field(ge=0, le=1 << 40)]


class FormatError(Exception):
    """Why a file is no saved graph; whoever names the file turns it into an error for users."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DimEntry(_Model):
    """A size that may vary.

    Attributes:
        low: smallest value.
        high: largest value.
        hint: what it was at capture.
    """

    low: Annotated[int, Field(ge=0, le=1 << 24)]
    high: Annotated[int, Field(ge=2, le=1 << 24)]
    hint: Annotated[int, Field(ge=2, le=1 << 24)]


class SizeEntry(_Model):
    """``times * dim + plus``."""

    dim: Name
    times: Annotated[int, Field(ge=1, le=1 << 24)] = 1
    plus: Annotated[int, Field(ge=-(1 << 24), le=1 << 24)] = 0


class TensorEntry(_Model):
    """What an input is."""

    dtype: Name
    shape: Annotated[list[Size | SizeEntry], Field(max_length=16)]


class Record(_Model):
    """What the quantizer left at a node, for reports."""

    scheme: Text | None = None
    reason: Text | None = None
    raised: (
        dict[
            Annotated[str, Field(pattern="^[0-9]{1,9}$")],
            Annotated[float, Field(allow_inf_nan=False)],
        ]
        | None
    ) = None


class NodeEntry(_Model):
    """A node of a graph; nodes come after what they read.

    Attributes:
        op: of fx.
        name: unique in its graph.
        target: of a call, a name of :mod:`custom_quantizer.reference.graph_targets`; else an
        attribute.
        args: a value is JSON, or an object of one key that says what it is: ``node``, ``tuple``,
            ``dtype``, ``device``, ``layout``, ``memory_format``, ``string`` or ``float``.
        kwargs: likewise.
        value: of an input that is a tensor.
        modules: ``(key, path, type)`` of the modules around the call, outermost first.
        record: see there.
        source: which node of an earlier graph it goes back to; ExecuTorch gives one debug handle to
            all that have the same.
        original: name of the captured call that this one is a part of.
        overwritten: name of the call that writes into this tensor's memory.
    """

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    name: Name
    target: Path
    args: Annotated[list[Any], Field(max_length=4096)] = []
    kwargs: Annotated[dict[Name, Any], Field(max_length=64)] = {}
    value: TensorEntry | None = None
    modules: Annotated[list[tuple[Text, Text, Text]], Field(max_length=64)] = []
    record: Record | None = None
    source: Text | None = None
    original: Text | None = None
    overwritten: Text | None = None


_Borders = Annotated[
    dict[
        Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,5})$")],
        Literal["int8", "uint8", "int16"],
    ],
    Field(max_length=4096),
]


class GraphEntry(_Model):
    """Nodes, and the graphs that control flow among them runs."""

    nodes: Annotated[list[NodeEntry], Field(min_length=1, max_length=100_000)]
    graphs: Annotated[dict[Name, GraphEntry], Field(max_length=256)] = {}


class ConstantEntry(_Model):
    """An attribute of the graph: which tensor, and whether it is a parameter."""

    tensor: Key
    parameter: bool = False


class Document(_Model):
    """A graph, without the numbers of its tensors.

    Attributes:
        graph: the nodes.
        dims: sizes that may vary.
        arguments: names of the parameters of ``forward``.
        inputs: how ``(args, kwargs)`` nests: ``"*"`` is a leaf, ``null`` nothing, an object of one
            key a container (``tuple``, ``list``: of entries; ``dict``: of ``[name, entry]``).
        outputs: how what is returned nests.
        constants: attribute -> tensor.
        example: one entry per input: the name of a tensor, or a value.
        integer_inputs: dtypes of the inputs that a program takes as integers, by position.
        integer_outputs: of the outputs that it returns as integers, likewise.
    """

    graph: GraphEntry
    dims: Annotated[dict[Name, DimEntry], Field(max_length=64)] = {}
    arguments: Annotated[list[Name], Field(max_length=4096)]
    inputs: Any
    outputs: Any
    constants: dict[Path, ConstantEntry]
    example: Annotated[list[dict[str, Any]], Field(max_length=4096)]
    integer_inputs: _Borders = {}
    integer_outputs: _Borders = {}


def pack(document: Document, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a file.

    Args:
        document: the graph.
        tensors: by the names it gives them; dense ones.

    Raises:
        FormatError: a tensor is of a kind that the file cannot hold, or the graph is too large.
    """
    text = document.model_dump_json(exclude_defaults=True)
    if len(text) > _LARGEST_DOCUMENT:
        raise FormatError(f"it takes {len(text):,} characters, more than {_LARGEST_DOCUMENT:,}")
    # One entry, since safetensors keeps them in no order: the same graph gives the same bytes.
    metadata = {f"{FORMAT}.{VERSION}": f'{{"sha256":"{_NO_HASH}","document":{text}}}'}
    # safetensors writes memory as it lies, and refuses tensors that share some.
    dense = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    try:
        data = safetensors.torch.save(dense, metadata)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise FormatError(f"a constant cannot be stored: {error}") from error
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(_field(_NO_HASH.encode()), _field(digest), 1)


def unpack(data: bytes) -> tuple[Document, dict[str, Tensor]]:
    """Read and check what :func:`pack` wrote; nothing is built of it.

    Raises:
        FormatError: it is something else, damaged, or of another version.
    """
    if data[:2] == b"PK" and kind_of_file(data) == PT2_FILE:
        raise FormatError(
            "a .pt2 file of torch.export or of an earlier version, which can run code when it is "
            "read, so it is not read; quantize the model again, or see docs/files.md for the two "
            "lines that convert a file you trust"
        )
    text = _text(data)
    found = _TEXT.fullmatch(text)
    if found is None:
        raise FormatError("damaged or changed: it carries no SHA-256")
    digest = found[1]
    hashed = data.replace(_field(digest.encode()), _field(_NO_HASH.encode()), 1)
    if hashlib.sha256(hashed).hexdigest() != digest:
        raise FormatError("damaged or changed: its SHA-256 is not the one it carries")
    try:
        document = Document.model_validate_json(found[2])
    except ValidationError as error:
        raise FormatError(f"not a valid graph: {first_problem(error)}") from error
    try:
        return document, safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise FormatError(f"broken: {error}") from error


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found, on one line; with the text it is about."""
    first = error.errors(include_url=False)[0]
    given = first["input"]
    quoted = f", not {given[:60]!r}" if isinstance(given, str) else ""
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{quoted}"


def _field(digest: bytes) -> bytes:
    """The hash where it stands in the header: JSON in a string of JSON."""
    return rb"{\"sha256\":\"" + digest + rb"\","


def _text(data: bytes) -> str:
    """The entry of the header that only our files have."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, 2 * _LARGEST_DOCUMENT):
        raise _other(data)
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        ((name, text),) = metadata.items()
        kind, _, version = name.rpartition(".")
        if kind != FORMAT or not isinstance(text, str):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _other(data) from None
    if version != str(VERSION):
        raise FormatError(
            f"of version {version[:20]}, and this package reads {VERSION}; quantize the model again"
        )
    return text


def _other(data: bytes) -> FormatError:
    kind = kind_of_file(data)
    return FormatError(f"not a graph that save_graph wrote{kind and f', but {kind}'}")


def is_number(value: object) -> bool:
    """Whether a value of the JSON is a number that a graph may hold."""
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, float) and math.isfinite(value)
