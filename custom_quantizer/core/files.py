"""Files: all that one call writes appears whole or not at all, and reading has limits.

Whoever reads a file that a user named reads it by :func:`open_regular`, :func:`read_bytes` or after
:func:`check_regular`: a named pipe would block for ever, a device never end.

The bytes of a set of files first go to temporary files beside their places, and to the disk; then
all are renamed, back to back. A reader sees old files or new ones, never a part. When anything
fails, the old files are as they were and nothing new lies there.

- **Two writers.** Renaming happens under a lock (``flock``) of the directory, so two sets that
  are written to the same names do not mix. Where a file system has no locks (some network ones)
  and on Windows (between processes), sets could mix: what is written as a set carries check sums.
- **A writer that is killed** leaves temporary files. It held a lock on each of them, which ended
  with it; so the next writer to the directory knows them from those of live writers and removes
  them. Without locks it removes those that are a day old.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO, TypeAlias

from custom_quantizer.errors import InputError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "check_regular",
    "check_utf8",
    "check_writable",
    "json_bytes",
    "memory_limit",
    "new_directory",
    "open_regular",
    "printable",
    "read_bytes",
    "write_bytes_atomic",
    "write_files_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

AnyPath: TypeAlias = "str | os.PathLike[str]"

_PREFIX, _SUFFIX = ".custom_quantizer-", ".tmp"
_STALE_SECONDS = 24 * 3600.0
_PATIENCE_SECONDS = 60.0
_CHUNK = 1 << 26


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


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
        raise InputError(f"Cannot read {path}: it is {kind}; name a file")
    if found.st_size > most:
        raise InputError(
            f"Cannot read {path}: it has {found.st_size:,} bytes, and at most {most:,} are read; "
            "check that it is the right file"
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


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_files_atomic(files: Mapping[AnyPath, bytes | bytearray | memoryview]) -> None:
    """Write a set of files that belong together: all of them or none.

    A symbolic link is followed, an existing file keeps its permissions, and a new one gets those
    of the umask.

    Args:
        files: path -> content. The directories must exist.

    Raises:
        InputError: a directory does not exist or cannot be written, a path is a directory or
            another thing than a regular file, two paths are the same file, or the disk is full.
            Everything is as it was.
    """
    targets: dict[str, AnyPath] = {}
    for path in files:
        target = _target(path)
        if target in targets:
            raise InputError(f"Cannot write {path}: it is the same file as {targets[target]}")
        targets[target] = path
    folders = sorted({os.path.dirname(target) for target in targets})
    temporaries: list[_Temporary] = []
    try:
        # Under the lock: nobody takes a temporary for an orphan before its own lock is set.
        with _locked(folders) as exact:
            for folder in folders:
                _remove_orphans(folder, exact)
            for target, path in targets.items():
                temporaries.append(_Temporary(path, target))
        for temporary, data in zip(temporaries, files.values(), strict=True):
            temporary.write(data)
        with _locked(folders):
            _put_in_place(temporaries)
            for folder in folders:
                _flush_folder(folder)
    finally:
        for temporary in temporaries:
            temporary.discard()


def write_bytes_atomic(path: AnyPath, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` to ``path`` in one step.

    Raises:
        InputError: as :func:`write_files_atomic`.
    """
    write_files_atomic({path: data})


def write_text_atomic(path: AnyPath, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, line ends as they are, in one step.

    Raises:
        InputError: as :func:`write_files_atomic`.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: AnyPath, value: object) -> None:
    """Write ``value`` to ``path`` as :func:`json_bytes` gives it, in one step.

    Raises:
        InputError: as :func:`write_files_atomic`.
        TypeError: ``value`` holds something JSON cannot express.
        ValueError: ``value`` holds NaN or an infinity, which are not JSON.
    """
    write_bytes_atomic(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """JSON as UTF-8 with a final newline, keys in their order.

    Raises:
        TypeError: ``value`` holds something JSON cannot express.
        ValueError: ``value`` holds NaN or an infinity, which are not JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def check_utf8(path: AnyPath) -> None:
    """Refuse a name that JSON, which is UTF-8, cannot hold.

    Raises:
        InputError: it is one.
    """
    try:
        os.fsdecode(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Cannot write {os.fsdecode(path)!r}: a report names its files in UTF-8, which this "
            "name is not; choose another name"
        ) from error


def check_writable(path: AnyPath) -> None:
    """Find out, before there is anything to write, whether a file could be made.

    Raises:
        InputError: as :func:`write_files_atomic`.
    """
    folder = os.path.dirname(_target(path))
    try:
        # By doing it: the superuser has leave everywhere, also where there can be no file.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def new_directory(path: AnyPath) -> Iterator[None]:
    """Make a directory and its parents; when the block raises, those that were made go again.

    Raises:
        InputError: it cannot be made.
    """
    where = os.path.abspath(path)
    missing = []
    while not os.path.lexists(where):
        missing.append(where)
        where = os.path.dirname(where)
    made: list[str] = []
    try:
        try:
            for folder in reversed(missing):
                made.append(folder)
                os.makedirs(folder, exist_ok=True)  # another process may be as fast
            os.makedirs(path, exist_ok=True)  # says why, if it is no directory
        except (OSError, ValueError) as error:  # ValueError: a null byte
            why = getattr(error, "strerror", None) or error
            if isinstance(error, FileExistsError):
                why = "it is a file"
            raise InputError(
                f"{os.fspath(path)}: cannot make this directory ({why}); name one that can be "
                "written"
            ) from error
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError, ValueError):  # not empty: somebody else uses it
                os.rmdir(folder)
        raise


# ---------------------------------------------------------------------------------------------
# Temporary files
# ---------------------------------------------------------------------------------------------


class _Temporary:
    """A file on its way to its place, locked as long as this process lives.

    Args:
        path: as the caller named it.
        target: the regular file it stands for.
    """

    def __init__(self, path: AnyPath, target: str) -> None:
        self.path, self.target = path, target
        self.name = _free_name(target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            # Not tempfile: it would leave the result readable by its owner only.
            self._descriptor: int | None = os.open(self.name, flags, 0o666)
        except OSError as error:
            raise _cannot_write(path, error) from error
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` to the disk.

        Raises:
            InputError: the disk refused it.
        """
        descriptor, rest = self._descriptor, memoryview(data).cast("B")
        if descriptor is None:
            raise RuntimeError("the file is closed")
        try:
            while rest:
                rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
            os.fsync(descriptor)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file, as Windows wants it before it is renamed, and end the lock."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the file if it was not renamed."""
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            os.unlink(self.name)


def _free_name(target: str) -> str:
    """A name in the directory of ``target`` by which a later writer knows a file of ours."""
    return os.path.join(os.path.dirname(target), f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


def _put_in_place(temporaries: list[_Temporary]) -> None:
    """Rename all, or leave all old files as they were.

    Raises:
        InputError: one could not be renamed.
    """
    existing = [t.target for t in temporaries if os.path.exists(t.target)]
    # One rename is all or nothing by itself.
    old = {target: _free_name(target) for target in existing if len(temporaries) > 1}
    touched: list[str] = []
    current = temporaries[0].path if temporaries else ""
    try:
        for temporary in temporaries:
            current, target = temporary.path, temporary.target
            temporary.close()
            if target in existing:
                shutil.copymode(target, temporary.name)
            if target in old:
                _second_name(target, old[target])
        for temporary in temporaries:
            current = temporary.path
            touched.append(temporary.target)
            os.replace(temporary.name, temporary.target)
    except BaseException as error:
        for target in touched:
            with suppress(OSError):
                if target in old:
                    os.replace(old[target], target)
                elif target not in existing:
                    os.unlink(target)
        if isinstance(error, OSError):
            raise _cannot_write(current, error) from error
        raise
    finally:
        for name in old.values():
            with suppress(OSError):
                os.unlink(name)


def _second_name(file: str, name: str) -> None:
    """Keep a file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


def _remove_orphans(folder: str, exact: bool) -> None:
    """Remove temporary files of writers that are gone.

    Args:
        folder: where to look.
        exact: whether all writers hold locks on theirs; otherwise their age decides.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            path = os.path.join(folder, name)
            with suppress(OSError):
                if _is_unlocked(path) if exact else _is_stale(path):
                    os.unlink(path)


def _is_stale(path: str) -> bool:
    return time.time() - os.lstat(path).st_mtime > _STALE_SECONDS


# ---------------------------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------------------------

if sys.platform == "win32":
    _THREADS = threading.RLock()

    @contextmanager
    def _folder_lock(folder: str) -> Iterator[bool]:
        with _THREADS:  # other processes are not kept out
            yield False

    def _is_unlocked(path: str) -> bool:
        return False

    def _flush_folder(folder: str) -> None:
        """Windows has no such call."""

else:

    @contextmanager
    def _folder_lock(folder: str) -> Iterator[bool]:
        """Keep other writers out of a directory; tells whether that is possible there."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # without leave to read it; what is missing is noticed when it is written
            yield False
            return
        try:
            locked = _flock(descriptor, folder)
            yield locked
        finally:
            # Explicitly: a process that was forked meanwhile would hold it on.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _flock(descriptor: int, folder: str) -> bool:
        """Wait for a lock; False where the file system has none."""
        patience = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError as error:
                if time.monotonic() > patience:
                    raise InputError(
                        f"{folder}: another process has locked this directory for more than "
                        f"{_PATIENCE_SECONDS:.0f} seconds; end it, or name another directory"
                    ) from error
                time.sleep(0.005)
            except OSError:
                return False

    def _is_unlocked(path: str) -> bool:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _flush_folder(folder: str) -> None:
        """Bring the names of a directory to the disk, where that is possible."""
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _locked(folders: Iterable[str]) -> Iterator[bool]:
    """Keep other writers out of directories, always in the same order: no deadlocks.

    Yields:
        Whether all of them could be locked.
    """
    with ExitStack() as stack:
        locked = [stack.enter_context(_folder_lock(folder)) for folder in folders]
        yield all(locked)


# ---------------------------------------------------------------------------------------------
# What can be in the way
# ---------------------------------------------------------------------------------------------


def _target(path: AnyPath) -> str:
    """The regular file behind ``path``, which need not exist.

    Raises:
        InputError: it is no regular file.
    """
    try:
        # os.path, not Path: asking must not raise where the answer may not be known.
        target = os.path.realpath(path)
    except ValueError as error:  # a null byte
        raise InputError(f"Cannot write {path!r}: {error}") from error
    if os.path.isdir(target):
        raise InputError(f"Cannot write {path}: it is a directory; name a file inside it")
    # os.replace would put a plain file in the place of /dev/null or of a named pipe.
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"Cannot write {path}: it is not a regular file; name another path")
    return target


def _cannot_write(path: AnyPath, exc: OSError) -> InputError:
    folder = os.path.dirname(os.path.realpath(path))
    if isinstance(exc, NotADirectoryError) or os.path.isfile(folder):
        why, fix = f"{folder} is a file, not a directory", "name a file in a directory"
    elif isinstance(exc, FileNotFoundError) and os.path.isdir(folder):
        why, fix = f"no file can be made in {folder}", "name a file in another directory"
    elif isinstance(exc, FileNotFoundError):
        why, fix = f"the directory {folder} does not exist", "create it first"
    elif isinstance(exc, PermissionError) and _is_writable(folder):
        why, fix = f"the file may not be replaced ({exc.strerror})", "choose another name"
    elif isinstance(exc, PermissionError):
        why, fix = f"the directory {folder} is not writable", "choose another or change its mode"
    elif exc.errno in (errno.ENOSPC, errno.EDQUOT):
        why = f"no space left on the device or in the quota of {folder}"
        fix = "free space there, or choose another place"
    elif exc.errno == errno.EFBIG:
        why = "it would be larger than the file system or a limit of this process (ulimit -f) lets"
        fix = "raise the limit, or choose another place"
    else:
        why, fix = exc.strerror or str(exc), "choose another place or name"
    return InputError(f"Cannot write {path}: {why}; {fix}")


def _is_writable(folder: str) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK, effective_ids=effective)
