"""The process that loads and runs a program which may be damaged; :mod:`.isolation` starts it.

A script of its own: it imports the runtime and nothing of this package. Messages go over standard
input and output, each a JSON object and a safetensors file, each of these behind its length in 8
bytes. Neither side unpickles anything.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import IO, Any

if __name__ == "__main__":
    # Before anything else is imported: the path of the parent, not the folder of this file.
    sys.path[:] = sys.argv[3:]

import contextlib

import safetensors.torch
import torch


def send(stream: IO[bytes], message: dict[str, Any], values: list[Any] | None = None) -> None:
    """Write a message and values: tensors, numbers, ``None``."""
    given = values or []
    tensors = {
        str(i): value.detach().contiguous().clone()
        for i, value in enumerate(given)
        if isinstance(value, torch.Tensor)
    }
    plain = [None if isinstance(value, torch.Tensor) else value for value in given]
    head = json.dumps({**message, "values": plain}).encode()
    for part in (head, safetensors.torch.save(tensors)):
        stream.write(len(part).to_bytes(8, "little"))
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes], limit: int) -> tuple[dict[str, Any], list[Any]]:
    """Read what :func:`send` wrote.

    Args:
        stream: where from.
        limit: the most bytes that either part may have.

    Raises:
        EOFError: the other side is gone.
        ValueError: it sent something else.
    """
    parts = []
    for _ in range(2):
        size = int.from_bytes(_exactly(stream, 8), "little")
        if size > limit:
            raise ValueError(f"a message of {size:,} bytes")
        parts.append(_exactly(stream, size))
    message = json.loads(parts[0])
    tensors = safetensors.torch.load(parts[1])
    values = message.pop("values")
    return message, [tensors.get(str(i), value) for i, value in enumerate(values)]


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _limit_memory(headroom: int) -> None:
    """Let the process grow by so many bytes of address space, and leave no core dump."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + headroom, used + headroom))
    except (OSError, ValueError):  # no Linux
        return


def _bindings() -> Any:
    """The runtime's own module: its public wrapper imports the exporter, for seconds."""
    try:
        from executorch.extension.pybindings import _C as bindings
    except ImportError:  # it is private, and may move
        from executorch.extension.pybindings import portable_lib as bindings
    return bindings


def _dump(program: Any) -> torch.Tensor:
    """The bytes of the ETDump of all runs so far."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "etdump")
        program.write_etdump_result_to_file(path, "")
        with open(path, "rb") as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code prints
    bindings = _bindings()
    wanted = int(sys.argv[2])
    if wanted:
        bindings._unsafe_reset_threadpool(wanted)  # unsafe only beside a running program
    # Starts them, so that their stacks are no part of the program.
    threads = bindings._threadpool_get_thread_count()
    _limit_memory(int(sys.argv[1]))
    requests = sys.stdin.buffer
    send(replies, {"threads": threads})
    message, values = receive(requests, 1 << 62)
    data = values[0].numpy().tobytes()
    method: Any = None
    reply: dict[str, Any]
    while True:
        try:
            if method is None:
                program = bindings._load_program_from_buffer(
                    data,
                    enable_etdump=message["traced"],
                    debug_buffer_size=0,
                    program_verification=bindings.Verification.InternalConsistency,
                    data_path=message["data_path"],
                )
                method, outputs = program.load_method(message["method"]), []
            elif message.get("dump"):
                outputs = [_dump(program)]
            else:
                outputs = list(method(values))
            reply = {"error": None}
        except Exception as error:
            reply, outputs = {"error": str(error) or type(error).__name__}, []
        send(replies, reply, outputs)
        message, values = receive(requests, 1 << 62)


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        _serve()
