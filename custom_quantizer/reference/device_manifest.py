"""What a device test holds: the manifest beside a program, its inputs and its expected outputs.

A device test is a folder that is carried to a device and back::

    manifest.json     this
    program.pte       what the device runs; program.bpte is the same for ExecuTorch's own runners
    inputs/n_i.bin    input i of sample n
    expected/n_i.bin  output i of sample n, by the integer reference
    outputs/n_i.bin   what the device computed: written there

Tensors are raw bytes: contiguous, little-endian.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from custom_quantizer.core.files import read_bytes
from custom_quantizer.core.formats import dtype_name
from custom_quantizer.errors import InputError

__all__ = [
    "MANIFEST",
    "DeviceManifest",
    "FileEntry",
    "NumericOutput",
    "Sample",
    "TensorEntry",
    "read_manifest",
    "tensor_bytes",
    "tensor_from_bytes",
]

MANIFEST = "manifest.json"

_LARGEST_MANIFEST = 64 << 20

DTYPES: dict[str, torch.dtype] = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.float32, torch.float64),
    )
}
"""What files of a device test can hold."""

NONE = "none"
"""Dtype of an input or output that is ``None``: its file is empty."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Name = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)
_Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class FileEntry(_Entry):
    """A file and its SHA-256, in hexadecimal digits."""

    file: str = _Name
    sha256: str = _Sha256


class TensorEntry(FileEntry):
    """A file with one tensor; or with a number, which has no dimensions; or with ``None``."""

    dtype: str
    shape: tuple[int, ...]


class Sample(_Entry):
    """What the program takes and has to return once, in the order of the program."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


class NumericOutput(_Entry):
    """What is known of an output.

    Attributes:
        node: the op of the converted graph that computes it, if the test is of every op.
        path: module path of that op.
        scale: of its integers; ``None`` for real numbers.
    """

    node: str = ""
    path: str = ""
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class DeviceManifest(_Entry):
    """The manifest of a device test.

    Attributes:
        kind: says what the file is.
        version: of the format.
        program: what the device runs.
        method: of the program.
        verified_program: SHA-256 of the program that the test is for: the same, or, if the test is
            of every op, the one without the additional outputs.
        mode: arithmetic of the reference that gave the outputs.
        bundled: the same program for ExecuTorch's own runners.
        exact: whether every output has to be equal, bit for bit.
        inexact: ops that are float or emulated, and why; empty if ``exact``.
        outputs: one entry an output.
        samples: in the order in which the program takes them.
    """

    kind: Literal["custom_quantizer device test"] = "custom_quantizer device test"
    version: Literal[1] = 1
    program: FileEntry
    method: str
    verified_program: str = _Sha256
    mode: str = "xnnpack"
    bundled: FileEntry | None
    exact: bool
    inexact: tuple[str, ...]
    outputs: tuple[NumericOutput, ...]
    samples: tuple[Sample, ...]


def read_manifest(folder: Path) -> DeviceManifest:
    """Read the manifest of a device test.

    Raises:
        InputError: it is missing, or no manifest.
    """
    path = folder / MANIFEST
    data = read_bytes(path, _LARGEST_MANIFEST)
    try:
        manifest = DeviceManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is not the manifest of a device test ({where}: {first['msg']}); "
            "LoweredProgram.save_device_test writes one"
        ) from error
    for sample in manifest.samples:
        if len(sample.outputs) != len(manifest.outputs):
            raise InputError(f"{path}: a sample has not as many outputs as the program")
        for entry in (*sample.inputs, *sample.outputs):
            if entry.dtype not in (*DTYPES, NONE) or any(size < 0 for size in entry.shape):
                raise InputError(f"{path}: {entry.file}: no such dtype, or a negative size")
    return manifest


def tensor_bytes(value: Any) -> tuple[bytes, str, tuple[int, ...]]:
    """A tensor or number as raw bytes, its dtype and its shape.

    ``None`` takes none, an ``int`` takes 8 bytes, a ``float`` as well, a ``bool`` takes one.

    Raises:
        InputError: no file can hold it.
    """
    if value is None:
        return b"", NONE, (0,)
    if isinstance(value, (bool, int, float)):
        wide = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
        value = torch.tensor(value, dtype=wide)
    if not isinstance(value, Tensor) or value.dtype not in DTYPES.values():
        what = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"a device test holds tensors and numbers of {', '.join(DTYPES)}, not {what}; give the "
            "program other inputs and outputs"
        )
    array = value.detach().cpu().contiguous().numpy()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.tobytes(), dtype_name(value.dtype), tuple(value.shape)


def tensor_from_bytes(data: bytes, entry: TensorEntry, where: str) -> Tensor:
    """The tensor in a file.

    Raises:
        InputError: the file has not as many bytes as a tensor of that dtype and shape.
    """
    stored = torch.uint8 if entry.dtype == NONE else DTYPES[entry.dtype]
    dtype = np.dtype(dtype_name(stored)).newbyteorder("<")
    wanted = dtype.itemsize * math.prod(entry.shape)
    if len(data) != wanted:
        raise InputError(
            f"{where} has {len(data):,} bytes; {entry.dtype} of shape {entry.shape} takes "
            f"{wanted:,}: it is the output of another program, or was not copied to its end"
        )
    array = np.frombuffer(data, dtype).reshape(entry.shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))
