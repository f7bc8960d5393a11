"""Files of tensors from anywhere, read without running code they may contain."""

from __future__ import annotations

import io
import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from custom_quantizer.core.files import check_regular, memory_limit, printable
from custom_quantizer.errors import InputError

__all__ = ["WEIGHT_SUFFIXES", "described", "read_tensor_file"]

WEIGHT_SUFFIXES = frozenset({".safetensors", ".pt", ".pth"})
"""Endings of files that hold a state dict."""


def read_tensor_file(path: Path, kind: str, suffixes: frozenset[str]) -> object:
    """Read a file of tensors, running no code it may contain.

    Returns:
        What the file holds: a tensor, or a container of tensors; anything, for ``.pt``.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"No {kind} file {path}")
    if suffix not in suffixes:
        raise InputError(f"{path}: {kind} files end in {', '.join(sorted(suffixes))}")
    limit = memory_limit()
    check_regular(path, limit)
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if suffix == ".npy":
            with path.open("rb") as file:
                return _from_numpy(_read_npy(file, path.stat().st_size))
        if suffix == ".npz":
            return _read_npz(path, limit)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(archive, limit)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
    except Exception as exc:  # Each of the four readers has its own kinds of errors.
        if refused := _REFUSED_CLASS.search(str(exc)):
            raise InputError(
                f"{path} holds a {printable(refused[1])}, which would have to be unpickled and "
                "could run code; save tensors alone: torch.save(model.state_dict(), path)"
            ) from exc
        if suffix in (".pt", ".pth") and isinstance(exc, (EOFError, IndexError, KeyError)):
            # What the reader of old files stumbles over in bytes that are none.
            raise InputError(
                f"{path} cannot be read: no file of torch.save, or a damaged one; save it again"
            ) from exc
        raise InputError(
            f"{path} cannot be read as {suffix}: {described(exc, 200)}; save tensors alone, not a "
            "pickled module or object arrays"
        ) from exc


_REFUSED_CLASS = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")
"""How torch 2.15 refuses to unpickle an object."""


def _read_npz(path: Path, limit: int) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        _check_unpacked(archive, limit)
        arrays = {}
        for info in archive.infolist():
            with archive.open(info) as file:
                arrays[info.filename.removesuffix(".npy")] = _from_numpy(
                    _read_npy(file, info.file_size)
                )
        return arrays


def _check_unpacked(archive: zipfile.ZipFile, limit: int) -> None:
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > limit:
        raise InputError(
            f"It takes {unpacked:,} bytes unpacked, more than half of the memory ({limit:,}); "
            "split it, or read it yourself and pass parts to DataSource.from_tensors"
        )


def _read_npy(file: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """An array whose header fits the ``size`` bytes of its file: NumPy would believe any."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise InputError(f"It is of version {version} of the .npy format, which is not read")
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise InputError(
            "It holds Python objects, which are pickled and could run code; they are not read; "
            "save arrays of numbers"
        )
    if dtype.kind not in "biufc":
        raise InputError(f"It holds {dtype}, which are no numbers; save arrays of numbers")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize > size:
        raise InputError(
            f"Its header promises {count:,} elements of {dtype}, but the file has {size:,} bytes: "
            "it is damaged; save it again"
        )
    array = np.empty(count, dtype)
    data: Any = array.view(np.uint8)
    found = cast(io.BufferedIOBase, file).readinto(data) if count else 0
    if found < array.nbytes:
        raise InputError("It ends before its last element: it is damaged; save it again")
    return array.reshape(shape, order="F" if fortran_order else "C")


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    # torch wants the byte order of this machine.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def described(exc: BaseException, limit: int = 500) -> str:
    """What an exception says, in one printable line of at most ``limit`` characters."""
    text = " ".join(str(exc).split()).rstrip(".")
    # torch first explains, in bold, how to run the code of a file that was refused.
    text = text.rpartition("WeightsUnpickler error: ")[2]
    text = "".join(filter(str.isprintable, text))
    return f"{type(exc).__name__}: {text[:limit]}"
