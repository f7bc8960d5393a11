"""Starting the runtime once, without what it writes to standard error on the way."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from executorch.extension.pybindings import portable_lib

from custom_quantizer.core.threads import exclusive

__all__ = ["start_quietly"]


@exclusive()
def start_quietly() -> None:
    """Start the runtime's thread pool, which the first program would start otherwise.

    On x86 its look at the CPU prints lines that read like errors and mean nothing. Native code
    writes them, so only the file descriptor itself can be turned away, and only for this moment.
    """
    count = getattr(portable_lib, "_threadpool_get_thread_count", None)
    if count is not None:
        with _native_stderr_discarded():
            count()


@contextmanager
def _native_stderr_discarded() -> Iterator[None]:
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
