"""Running a program that may be damaged, in a process of its own.

A ``.pte`` is trusted by the runtime: one wrong byte in it can crash, hang or fill the memory of the
process that loads it. A program without a checksum therefore runs in a child process with limits of
memory and time, and what happens to that process becomes an error. The limits are for accidents;
they are no jail for a program that was made to attack.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from custom_quantizer.backends.xnnpack import _child
from custom_quantizer.backends.xnnpack.data_files import DataFile
from custom_quantizer.errors import ProgramError

__all__ = ["IsolatedMethod"]

START_LIMIT_S = 300.0
"""For starting Python and importing the runtime, which has nothing to do with the program."""

TIME_LIMIT_S = 300.0
"""For loading a program, and for each run of it."""

_LEAST_MEMORY = 2 << 30
_MEMORY_PER_BYTE = 16
_LARGEST_REPLY = 4 << 30


class IsolatedMethod:
    """A method of a program, loaded in a child process; stands in for the runtime's own.

    Args:
        data: the program.
        what: what messages call it.
        method: its name.
        data_file: what it keeps outside its ``.pte``.
        traced: let the runtime note how long each call takes, for :meth:`dump`.
        threads: that the runtime is to compute with; ``None``: as many as it takes by itself.

    Attributes:
        threads: that the runtime computes with.

    Raises:
        ProgramError: it does not load, or takes the process down.
    """

    def __init__(
        self,
        data: bytes,
        what: str,
        method: str,
        *,
        data_file: DataFile | None = None,
        traced: bool = False,
        threads: int | None = None,
    ) -> None:
        self._what = what
        self._failure: str | None = None
        self._memory = memory_limit(len(data) + (data_file.size_bytes if data_file else 0))
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # each reserves 64 MiB
        settings = [str(self._memory), str(threads or 0)]
        command = [sys.executable, str(Path(_child.__file__)), *settings, *sys.path]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise ProgramError(
                f"{what}: has no checksum, and the process to run it in cannot be started "
                f"({error.strerror or error}); load it with isolated=False if you trust it"
            ) from error
        self._requests = cast("IO[bytes]", self._process.stdin)
        self._replies = cast("IO[bytes]", self._process.stdout)
        weakref.finalize(self, _end, self._process)
        with self._limited(START_LIMIT_S, "while its process started"):
            ready, _ = _child.receive(self._replies, _LARGEST_REPLY)
            self.threads = int(ready["threads"])
        program = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
        data_path = None if data_file is None else str(data_file.path)
        message = {"method": method, "traced": traced, "data_path": data_path}
        self._ask(message, [program], "while it was loaded")

    def execute(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the method.

        Raises:
            ProgramError: the runtime failed, or the process ended or had to be ended.
        """
        return self._ask({}, list(inputs), "while it ran")

    def dump(self) -> bytes:
        """What the runtime noted of all runs so far, as ExecuTorch's ETDump.

        Raises:
            ProgramError: the process ended or had to be ended.
        """
        (dump,) = self._ask({"dump": True}, [], "while it wrote its times")
        return bytes(dump.numpy())

    def _ask(self, message: dict[str, Any], values: list[Any], when: str) -> list[Any]:
        if self._failure is not None:
            raise ProgramError(self._failure)
        with self._limited(TIME_LIMIT_S, when):
            _child.send(self._requests, message, values)
            reply, outputs = _child.receive(self._replies, _LARGEST_REPLY)
        if reply.get("error") is not None:
            raise ProgramError(f"{self._what}: the runtime refused it {when}: {reply['error']}")
        return outputs

    @contextmanager
    def _limited(self, seconds: float, when: str) -> Iterator[None]:
        """End the process when it takes too long, and say what became of it."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            timer.cancel()
            _end(self._process)
            if late.is_set():
                how = f"did not answer within {seconds:.0f} s"
            elif isinstance(error, (OSError, EOFError)):
                how = f"ended ({_how_it_ended(self._process.returncode)})"
            else:
                how = "answered with something else than tensors"
            self._failure = (
                f"{self._what}: the process that the program runs in {how} {when}; it may take "
                f"{self._memory / 2**30:.1f} GiB of memory; the file has no checksum and is most "
                "likely damaged: copy it again, or quantize the model again"
            )
            raise ProgramError(self._failure) from error
        finally:
            timer.cancel()


def memory_limit(size: int) -> int:
    """Bytes that the runtime may take for a program of ``size`` bytes: at most half of all."""
    wanted = max(_LEAST_MEMORY, _MEMORY_PER_BYTE * size)
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return wanted
    return min(wanted, max(physical // 2, 1 << 29))


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "for no known reason"
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except OSError:
            pass
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
