"""Weights beside a program: ExecuTorch's data files (``.ptd``).

A script may tag constants of a graph with the name of a file
(``executorch.exir.passes.external_constants_pass``), so that programs can share them, or weights be
replaced without the program. What a delegate reads has the same name there as in a ``.pte``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from custom_quantizer.errors import InputError, ProgramError

if TYPE_CHECKING:
    from executorch.exir._serialize._cord import CordBuffer
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload

__all__ = ["DataFile", "DataPath", "read_data_files"]

DataPath: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | DataFile"
"""A ``.ptd``, or several, or what was read of them."""


class DataFile:
    """What a program keeps outside its ``.pte``.

    Attributes:
        named: the bytes of each constant.
        path: a file with all of them, since ExecuTorch's Python runtime takes one path.
        size_bytes: of all files.
    """

    def __init__(self, files: Mapping[str, bytes], path: Path | None = None) -> None:
        """Read data files.

        Args:
            files: what each is called in messages -> its bytes.
            path: of the file, if it is only one and on disk.

        Raises:
            ProgramError: one of them is no data file, or two have other bytes under one name.
        """
        payloads = {name: _payload(data, name) for name, data in files.items()}
        self.named: dict[str, bytes] = {}
        self.size_bytes = sum(map(len, files.values()))
        for name, payload in payloads.items():
            for key, entry in payload.named_data.items():
                value = bytes(payload.buffers[entry.buffer_index])
                if self.named.setdefault(key, value) != value:
                    raise ProgramError(
                        f"{name}: constant {key!r} has other bytes in another data file; name the "
                        "files of one program"
                    )
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="custom_quantizer_")
            path = Path(self._folder.name) / "weights.ptd"
            path.write_bytes(_merged(list(files.values()), list(payloads.values())))
        self.path = path


def _payload(data: bytes, name: str) -> DataPayload:
    """The contents of a data file."""
    # Imports the exporter, for seconds; few programs have such files.
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    try:
        return FlatTensorSerializer().deserialize(Cord(data))
    except Exception as error:
        raise ProgramError(
            f"{name}: is no data file of ExecuTorch (.ptd), or damaged: {error}; name what "
            "write_tensor_data_to_file wrote beside the program"
        ) from error


def _merged(files: Sequence[bytes], payloads: Sequence[DataPayload]) -> bytes:
    """One data file with the contents of all."""
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    if len(files) == 1:
        return files[0]
    named: dict[str, DataEntry] = {}
    buffers: list[CordBuffer] = []
    for payload in payloads:
        for key, entry in payload.named_data.items():
            named[key] = replace(entry, buffer_index=entry.buffer_index + len(buffers))
        buffers += payload.buffers
    return bytes(FlatTensorSerializer().serialize(DataPayload(buffers, named)))


def read_data_files(paths: DataPath | None) -> DataFile | None:
    """Read the data files of a program; ``None`` if it has none.

    Raises:
        InputError: ``paths`` is something else than paths.
        ProgramError: a file cannot be read, or is no data file.
    """
    if paths is None or isinstance(paths, DataFile):
        return paths
    several: list[Any] = list(paths) if isinstance(paths, (list, tuple)) else [paths]
    if not several or not all(isinstance(path, (str, os.PathLike)) for path in several):
        raise InputError(f"data_path is the path of a .ptd, or a list of such, got {paths!r}")
    files = {}
    for path in several:
        try:
            files[os.fspath(path)] = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise ProgramError(
                f"{os.fspath(path)}: cannot be read ({error}); give the path of a .ptd"
            ) from error
    return DataFile(files, Path(several[0]) if len(several) == 1 else None)
