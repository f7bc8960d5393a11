"""The checksum at the end of a program: 8 bytes that say so, and the SHA-256 of all before them.

ExecuTorch knows how long a program is from its header and ignores what comes after it, on a device
as well.
"""

from __future__ import annotations

import hashlib

from custom_quantizer.errors import ProgramError

__all__ = ["SIZE", "seal", "split_checksum"]

_MARK = b"cqSHA256"
SIZE = len(_MARK) + hashlib.sha256().digest_size
"""Bytes that a checksum takes."""


def seal(data: bytes, record: bytes = b"") -> bytes:
    """A program with a record of its ops and the checksum of both; copied once."""
    digest = hashlib.sha256(data)
    digest.update(record)
    return b"".join((data, record, _MARK, digest.digest()))


def split_checksum(data: memoryview, where: str) -> tuple[memoryview, bool]:
    """All of a file but its checksum, and whether it had one.

    Raises:
        ProgramError: the program is not the one that its checksum was made of.
    """
    program, end = data[:-SIZE], bytes(data[-SIZE:])
    if not end.startswith(_MARK) or len(end) < SIZE:
        return data, False
    if hashlib.sha256(program).digest() != end[len(_MARK) :]:
        raise ProgramError(
            f"{where}: the file is damaged or was changed: its SHA-256 is not the one it carries; "
            "copy it again, or quantize the model again"
        )
    return program, True
