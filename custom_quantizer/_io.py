"""Files: written whole or not at all, and read within limits.

Whoever reads a file that a user named reads it by :func:`open_regular`, :func:`read_bytes` or after
:func:`check_regular`: a named pipe would block for ever, a device never end.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from custom_quantizer.errors import InputError

__all__ = [
    "check_regular",
    "memory_limit",
    "open_atomic",
    "open_regular",
    "printable",
    "read_bytes",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]


# -- reading ------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike[str], most: int) -> int:
    """Refuse what is no regular file of a bounded size, before it is opened.

    Args:
        path: of the file. Symbolic links are followed.
        most: bytes it may have.

    Returns:
        Its size in bytes.

    Raises:
        InputError: there is no such file; it is a directory, a named pipe, a device or a socket;
            it has more bytes.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as exc:
        raise InputError(f"Cannot read {path}: there is no such file") from exc
    except OSError as exc:
        raise InputError(f"Cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:  # a null character
        raise InputError(f"Cannot read {os.fspath(path)!r}: {exc}") from exc
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no regular file")
        raise InputError(f"Cannot read {path}: it is {kind}. Name a file")
    if found.st_size > most:
        raise InputError(
            f"Cannot read {path}: it has {found.st_size:,} bytes, and at most {most:,} are read. "
            "Check that it is the right file"
        )
    return found.st_size


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: str | os.PathLike[str], most: int) -> BinaryIO:
    """Open a regular file for binary reading.

    Raises:
        InputError: as :func:`check_regular`; or it may not be read.
    """
    check_regular(path, most)
    try:
        return open(path, "rb")
    except OSError as exc:
        raise InputError(f"Cannot read {path}: {exc.strerror or exc}") from exc


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        InputError: as :func:`open_regular`.
    """
    with open_regular(path, most) as file:
        try:
            return file.read(most)
        except OSError as exc:
            raise InputError(f"Cannot read {path}: {exc.strerror or exc}") from exc


def memory_limit() -> int:
    """Bytes that a file of data may take: half of the memory that this process can have."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    # Of a container (cgroup v2); "max" where there is no limit.
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
        sizes.append(int(file.read()))
    return min(sizes) // 2


def printable(text: str) -> str:
    """``text`` for a message: what a terminal would obey stands there as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -- writing ------------------------------------------------------------------------------------


@contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for binary writing; the file appears when the block ends without an error.

    The bytes go to a temporary file in the same directory, are flushed to the disk and renamed
    over ``path``. When the block raises, the temporary file is removed and ``path`` is as it was.
    A symbolic link is followed, an existing file keeps its permissions, and a new one gets those
    of the umask.

    Args:
        path: The file to write. Its directory must exist.

    Yields:
        A binary file to write to.

    Raises:
        InputError: The directory does not exist or cannot be written, ``path`` is a directory or
            another thing than a regular file, or the disk refused the bytes.
    """
    # os.path, not Path: asking must not raise where the answer may not be known.
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    if os.path.isdir(target):
        raise InputError(f"Cannot write {path}: it is a directory. Name a file inside it.")
    # os.replace would put a plain file in the place of /dev/null or of a named pipe.
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"Cannot write {path}: it is not a regular file. Name another path.")
    try:
        # Not tempfile: it would leave the result readable by its owner only.
        file = open(temporary, "xb")  # noqa: SIM115 (closed before the rename)
    except OSError as exc:
        raise _cannot_write(path, exc) from exc
    try:
        with file:
            yield file
            _flush(path, file)
        _replace(path, target, temporary)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` to ``path`` in one step.

    Raises:
        InputError: As :func:`open_atomic`.
    """
    with open_atomic(path) as file:
        try:
            file.write(data)
        except OSError as exc:
            raise _cannot_write(path, exc) from exc


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, line ends as they are, in one step.

    Raises:
        InputError: As :func:`open_atomic`.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike[str], value: object, *, indent: int = 2) -> None:
    """Write ``value`` to ``path`` as JSON with a final newline, keys in their order, in one step.

    Raises:
        InputError: As :func:`open_atomic`.
        TypeError: ``value`` holds something JSON cannot express.
        ValueError: ``value`` holds NaN or an infinity, which are not JSON.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def _flush(path: str | os.PathLike[str], file: BinaryIO) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as exc:
        raise _cannot_write(path, exc) from exc


def _replace(path: str | os.PathLike[str], target: str, temporary: str) -> None:
    try:
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as exc:
        raise _cannot_write(path, exc) from exc


def _cannot_write(path: str | os.PathLike[str], exc: OSError) -> InputError:
    folder = os.path.dirname(os.path.realpath(path))
    if isinstance(exc, NotADirectoryError) or os.path.isfile(folder):
        why, fix = f"{folder} is a file, not a directory", "Name a file in a directory"
    elif isinstance(exc, FileNotFoundError):
        why, fix = f"the directory {folder} does not exist", "Create it first"
    elif isinstance(exc, PermissionError):
        why, fix = f"the directory {folder} is not writable", "Choose another or change its mode"
    else:
        why, fix = exc.strerror or str(exc), "Choose another place or name, or free space there"
    return InputError(f"Cannot write {path}: {why}. {fix}.")
