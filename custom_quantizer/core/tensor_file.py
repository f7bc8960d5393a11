"""Tensors in a safetensors file that notices when it was changed.

Statistics and checkpoints are numbers, any of which could be another without anybody seeing it. So
the file holds the SHA-256 of all its names, shapes and values, as one more tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from custom_quantizer.core.files import check_regular, memory_limit, write_bytes_atomic
from custom_quantizer.errors import InputError

__all__ = ["DamagedFileError", "bytes_of", "read_tensors", "write_tensors"]

_DIGEST = "sha256"


class DamagedFileError(InputError):
    """A file is no safetensors file, or was changed after it was written."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and their SHA-256 in one step.

    Raises:
        InputError: the file cannot be written.
    """
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    copies[_DIGEST] = _digest(copies, metadata)
    write_bytes_atomic(path, save(copies, dict(metadata)))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Read a safetensors file.

    Returns:
        Its tensors, copied; its metadata; and whether it had a SHA-256, which fits. Files of older
        versions have none.

    Raises:
        DamagedFileError: it is no safetensors file, or its SHA-256 does not fit.
        InputError: it cannot be read, is no regular file, or has more bytes than half of the
            memory.
    """
    check_regular(path, memory_limit())
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # Copies: what comes out are views, and some observers detach their buffers in place.
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
    except OSError as exc:
        raise InputError(f"Cannot read {path}: {exc.strerror or exc}") from exc
    # What becomes of a dtype that torch lacks, or of a shape that overflows, is not documented.
    except Exception as exc:
        raise DamagedFileError(f"{path} is no .safetensors file, or a broken one: {exc}") from exc
    digest = tensors.pop(_DIGEST, None)
    if digest is not None and not torch.equal(digest, _digest(tensors, metadata)):
        raise DamagedFileError(f"{path} was changed after it was written: its SHA-256 does not fit")
    return tensors, metadata, digest is not None


def bytes_of(tensor: Tensor) -> Any:
    """The numbers of a tensor, in order, as a NumPy array of uint8."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # Of one number any stride is contiguous, but 0 is not taken for another dtype.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tensor:
    """uint8 ``(32,)``."""
    digest = hashlib.sha256()
    for key in sorted(metadata):
        digest.update(repr((key, metadata[key])).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(bytes_of(value))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
