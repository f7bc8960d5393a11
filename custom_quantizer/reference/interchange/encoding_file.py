"""Files of scales and zero points in the format of AIMET: reading and writing.

A file has ``activation_encodings`` and ``param_encodings``. In version 1.0.0 they are lists::

    {"name": "relu", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": false,
     "scale": [0.0235], "offset": [-13]}

In version 0.6.1 they are dicts from names to lists with an entry for each channel::

    {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "scale": 0.0235, "offset": -13,
     "min": -0.3055, "max": 5.687}

Integers are counted from 0 and an offset is added to them: ``real = (q + offset) * scale`` with
``0 <= q < 2**bw``. The signed integer of this package is ``q - 2**(bw - 1)``, so its zero point is
``-offset - 2**(bw - 1)``, and what is symmetric has the offset ``-2**(bw - 1)``.

References:
    https://quic.github.io/aimet-pages/releases/latest/userguide/encoding_spec.html, and
    ``AffineEncoding.to_qnn_encoding_dict`` of aimet-torch 2.42 (read, not copied)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from custom_quantizer.core.files import printable, read_bytes, write_bytes_atomic
from custom_quantizer.errors import InputError, some
from custom_quantizer.reference.graph_document import first_problem

__all__ = ["Encoding", "EncodingFile", "Version", "read_encodings", "write_encodings"]

Version: TypeAlias = Literal["1.0.0", "0.6.1"]

_MOST_BYTES = 256 << 20
_PRODUCER = "custom_quantizer"


@dataclass(frozen=True)
class Encoding:
    """Scales and zero points of one tensor.

    Attributes:
        name: of the tensor.
        bits: 2 to 32.
        symmetric: whether its zero points are 0.
        scales: one, or one for each channel, or for each block of each channel in that order.
        zero_points: of signed integers, one for each scale.
        block_size: input channels that share a scale, where they do.
        per_channel: whether there is one scale for each channel, even if it is one.
    """

    name: str
    bits: int
    symmetric: bool
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    block_size: int | None = None
    per_channel: bool = False


@dataclass(frozen=True)
class EncodingFile:
    """What a file says.

    Attributes:
        activations: by name.
        parameters: by name.
        floating: names of tensors that the file leaves in float.
    """

    activations: Mapping[str, Encoding]
    parameters: Mapping[str, Encoding]
    floating: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------
# The two versions
# ---------------------------------------------------------------------------------------------

_Name = Annotated[str, Field(min_length=1, max_length=1000)]
_Bits = Annotated[int, Field(ge=2, le=32)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Offset = Annotated[int, Field(ge=-(1 << 32), le=1 << 32)]


class _Model(BaseModel):
    # Other keys ("min", "max" of a newer version, ...) say nothing that is needed here.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Integers(_Model):
    """An entry of version 1.0.0."""

    name: _Name
    dtype: Literal["INT", "int"]
    enc_type: Literal["PER_TENSOR", "PER_CHANNEL", "PER_BLOCK"]
    bw: _Bits
    is_sym: bool
    scale: Annotated[list[_Scale], Field(min_length=1)]
    offset: Annotated[list[_Offset], Field(min_length=1)]
    block_size: Annotated[int, Field(ge=1)] | None = None


class _Floats(_Model):
    """An entry of version 1.0.0 that leaves a tensor in float."""

    name: _Name
    dtype: Literal["FLOAT", "float"]


class _Channel(_Model):
    """A channel in version 0.6.1."""

    dtype: Literal["INT", "int"]
    bitwidth: _Bits
    is_symmetric: Literal["True", "False", "true", "false"] | bool
    scale: _Scale
    offset: _Offset


class _FloatChannel(_Model):
    dtype: Literal["FLOAT", "float"]


class _List(_Model):
    version: Literal["1.0.0"]
    activation_encodings: list[Annotated[_Integers | _Floats, Field(discriminator="dtype")]]
    param_encodings: list[Annotated[_Integers | _Floats, Field(discriminator="dtype")]]


_Channels: TypeAlias = Annotated[
    list[Annotated[_Channel | _FloatChannel, Field(discriminator="dtype")]], Field(min_length=1)
]


class _Dict(_Model):
    version: Literal["0.6.1"]
    activation_encodings: dict[_Name, _Channels]
    param_encodings: dict[_Name, _Channels]


_FILE: TypeAdapter[_List | _Dict] = TypeAdapter(
    Annotated[_List | _Dict, Field(discriminator="version")]
)


def read_encodings(path: str | os.PathLike[str]) -> EncodingFile:
    """Read a file of version 1.0.0 or 0.6.1.

    Raises:
        InputError: it cannot be read, is larger than 256 MB, or says something else than what is
            described above; the entry is named.
    """
    data = read_bytes(path, _MOST_BYTES)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a file of encodings") from error
    if not isinstance(document, dict) or "activation_encodings" not in document:
        raise InputError(
            f"{path} has no activation_encodings: it is no file of encodings in AIMET's format"
        )
    _refuse_unknown(path, document)
    try:
        found = _FILE.validate_python(document)
    except ValidationError as error:
        raise InputError(f"{path}: {printable(first_problem(error))}") from error
    if isinstance(found, _List):
        return _of_list(path, found)
    return _of_dict(path, found)


def _refuse_unknown(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """What would end in a message about types alone."""
    version = document.get("version")
    if version not in ("1.0.0", "0.6.1"):
        raise InputError(
            f"{path} is of version {version!r:.40}; 1.0.0 and 0.6.1 are read "
            '(in AIMET: quantsim.encoding_version = "1.0.0")'
        )
    activations = document["activation_encodings"]
    if isinstance(activations, dict) and any(isinstance(v, dict) for v in activations.values()):
        raise InputError(
            f"{path} goes by inputs and outputs of modules (a _torch.encodings file); give the "
            "file by names of tensors that is written beside the ONNX model"
        )
    for part in ("activation_encodings", "param_encodings"):
        entries = document.get(part)
        for entry in entries if isinstance(entries, list) else ():
            kind = entry.get("enc_type") if isinstance(entry, dict) else None
            if kind in ("LPBQ", "VECTOR"):
                raise InputError(
                    f"{path}: {printable(str(entry.get('name'))[:200])} is of enc_type {kind}; "
                    "PER_TENSOR, PER_CHANNEL and PER_BLOCK are read"
                )
            if isinstance(entry, dict) and any(_numbers(entry.get("zero_point_shift"))):
                raise InputError(
                    f"{path}: {printable(str(entry.get('name'))[:200])} has a zero_point_shift; "
                    "zero points are integers here"
                )


def _numbers(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def _of_list(path: str | os.PathLike[str], found: _List) -> EncodingFile:
    floating: list[str] = []

    def encodings(entries: Iterable[_Integers | _Floats]) -> dict[str, Encoding]:
        made: dict[str, Encoding] = {}
        for entry in entries:
            if isinstance(entry, _Floats):
                floating.append(entry.name)
                continue
            if entry.name in made:
                raise InputError(f"{path}: {printable(entry.name)} occurs twice")
            if (entry.enc_type == "PER_BLOCK") != (entry.block_size is not None):
                raise InputError(
                    f"{path}: {printable(entry.name)}: a block_size goes with PER_BLOCK, only so"
                )
            if entry.enc_type == "PER_TENSOR" and len(entry.scale) > 1:
                raise InputError(
                    f"{path}: {printable(entry.name)} has {len(entry.scale)} scales, and "
                    "PER_TENSOR is one"
                )
            if len(entry.scale) != len(entry.offset):
                raise InputError(
                    f"{path}: {printable(entry.name)} has {len(entry.scale)} scales and "
                    f"{len(entry.offset)} offsets"
                )
            made[entry.name] = Encoding(
                entry.name,
                entry.bw,
                entry.is_sym,
                tuple(entry.scale),
                tuple(_zero_point(offset, entry.bw) for offset in entry.offset),
                entry.block_size,
                entry.enc_type == "PER_CHANNEL",
            )
        return made

    return EncodingFile(
        encodings(found.activation_encodings), encodings(found.param_encodings), tuple(floating)
    )


def _of_dict(path: str | os.PathLike[str], found: _Dict) -> EncodingFile:
    floating: list[str] = []

    def encodings(entries: Mapping[str, list[_Channel | _FloatChannel]]) -> dict[str, Encoding]:
        made: dict[str, Encoding] = {}
        for name, channels in entries.items():
            if any(isinstance(channel, _FloatChannel) for channel in channels):
                floating.append(name)
                continue
            whole = cast("list[_Channel]", channels)
            widths = {channel.bitwidth for channel in whole}
            if len(widths) > 1:
                raise InputError(
                    f"{path}: channels of {printable(name)} have {some(sorted(map(str, widths)))} "
                    "bits; a tensor has one format"
                )
            made[name] = Encoding(
                name,
                whole[0].bitwidth,
                all(str(channel.is_symmetric).lower() == "true" for channel in whole),
                tuple(channel.scale for channel in whole),
                tuple(_zero_point(channel.offset, channel.bitwidth) for channel in whole),
                None,
                len(whole) > 1,
            )
        return made

    return EncodingFile(
        encodings(found.activation_encodings), encodings(found.param_encodings), tuple(floating)
    )


def _zero_point(offset: int, bits: int) -> int:
    return -offset - (1 << (bits - 1))


def write_encodings(path: str | os.PathLike[str], file: EncodingFile, version: Version) -> None:
    """Write a file; equal encodings give equal files.

    Raises:
        InputError: the file cannot be written, or version 0.6.1 cannot say it: it knows no blocks.
    """
    whole = [*file.activations.values(), *file.parameters.values()]
    blocks = [entry.name for entry in whole if entry.block_size is not None]
    if version == "0.6.1" and blocks:
        raise InputError(
            f"version 0.6.1 of encodings knows no blocks, and {some(blocks)} have them; "
            'write version="1.0.0"'
        )
    as_list = version == "1.0.0"
    document: dict[str, object] = {"version": version, "producer": {"package": _PRODUCER}}
    for key, part in (
        ("activation_encodings", file.activations),
        ("param_encodings", file.parameters),
    ):
        entries = [part[name] for name in sorted(part)]
        document[key] = (
            [_as_entry(entry) for entry in entries]
            if as_list
            else {entry.name: _as_channels(entry) for entry in entries}
        )
    document["excluded_layers"] = []
    write_bytes_atomic(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def _as_entry(entry: Encoding) -> dict[str, object]:
    kind = "PER_BLOCK" if entry.block_size else "PER_CHANNEL" if entry.per_channel else "PER_TENSOR"
    return {
        "name": entry.name,
        "dtype": "INT",
        "enc_type": kind,
        "bw": entry.bits,
        "is_sym": entry.symmetric,
        "scale": list(entry.scales),
        "offset": [_offset(point, entry.bits) for point in entry.zero_points],
        **({"block_size": entry.block_size} if entry.block_size else {}),
    }


def _as_channels(entry: Encoding) -> list[dict[str, object]]:
    channels: list[dict[str, object]] = []
    for scale, point in zip(entry.scales, entry.zero_points, strict=True):
        offset = _offset(point, entry.bits)
        channels.append(
            {
                "bitwidth": entry.bits,
                "dtype": "int",
                "is_symmetric": str(entry.symmetric),
                "max": (offset + (1 << entry.bits) - 1) * scale,
                "min": offset * scale,
                "offset": offset,
                "scale": scale,
            }
        )
    return channels


def _offset(zero_point: int, bits: int) -> int:
    return -zero_point - (1 << (bits - 1))
