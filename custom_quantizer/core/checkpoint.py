"""What the checkpoint files of calibration and training have in common.

Both are sealed safetensors files (:mod:`custom_quantizer.core.tensor_file`) whose metadata name
their format and version and hold fingerprints of what they were made of. Whatever is wrong with
one, its owner raises an error of its own class that says how to begin again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from custom_quantizer.core.tensor_file import (
    DamagedFileError,
    bytes_of,
    read_tensors,
    write_tensors,
)
from custom_quantizer.errors import CustomQuantizerError

__all__ = ["CheckpointFile", "fingerprint", "part_of"]

_VERSION = "2"
_UNSEALED_VERSION = "1"
"""Files of this version have no SHA-256."""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of one kind.

    Attributes:
        path: of the file.
        format: name of the kind, as in the metadata.
        of: what it is a checkpoint of, such as ``"a training"``.
        again: what is done from the beginning without it, such as ``"train"``.
        error: class of its errors.
    """

    path: str | os.PathLike[str]
    format: str
    of: str
    again: str
    error: type[CustomQuantizerError]

    def read(
        self, fingerprints: Mapping[str, tuple[str, str]]
    ) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata; ``None`` where there is no file.

        Args:
            fingerprints: key of the metadata -> the value that it must have, and what the file is
                of if it has another.

        Raises:
            CustomQuantizerError: of class ``error``: it is damaged, of another kind, version or
                fingerprint.
            InputError: it cannot be read.
        """
        if not os.path.exists(self.path):
            return None
        try:
            tensors, metadata, sealed = read_tensors(self.path)
        except DamagedFileError as error:
            raise self.error(
                f"{self.path} is no checkpoint of {self.of}, or is damaged ({error}); name another "
                f"file, or, if it was one, {self._remedy}"
            ) from error
        if metadata.get("format") != self.format:
            raise self.error(f"{self.path} is no checkpoint of {self.of}; name another file")
        version = metadata.get("version")
        if version not in (_UNSEALED_VERSION, _VERSION) or sealed != (version == _VERSION):
            raise self.error(
                f"{self.path} is a checkpoint of version {version}, and this package reads version "
                f"{_VERSION}; {self._remedy}"
            )
        for key, (mine, other) in fingerprints.items():
            if metadata.get(key) != mine:
                raise self.error(
                    f"{self.path} is a checkpoint of {other}; {self._remedy}, or name another file"
                )
        return tensors, metadata

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Raise what goes wrong with the content as an error about the file.

        A file without SHA-256 may hold anything; one with it is what :meth:`write` wrote.
        """
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self.error(
                f"{self.path} is a damaged checkpoint ({error}); {self._remedy}"
            ) from error

    def write(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write all in one step.

        Raises:
            InputError: the file cannot be written.
        """
        head = {"format": self.format, "version": _VERSION}
        write_tensors(self.path, tensors, {**head, **metadata})

    @property
    def _remedy(self) -> str:
        return f"remove it to {self.again} from the beginning"


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def fingerprint(tensors: Iterable[Tensor], *texts: str) -> str:
    """SHA-256 of tensors, in their order, and of texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
