"""One thread at a time through what is made for one.

``torch.export``, torchao's prepare and convert and ExecuTorch's passes change the state of the
whole process while they work: they switch backends of PyTorch off and on, replace methods of
``nn.Module``, say "compiling". Two threads in them at once spoil each other's graphs, and may
leave a backend switched off for good. So whatever this package does with them it does under one
lock: threads wait for each other, and each gets what it would get alone.

Threads that call ``torch.export``, ``prepare_pt2e`` or ``convert_pt2e`` themselves, while others
do so or use this package, need the same lock::

    from custom_quantizer.core.threads import exclusive

    with exclusive():
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)

Processes share nothing of this: several of them are faster, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exclusive", "tools"]

_lock = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other thread is in such a block; as a decorator, in such a function.

    A thread that is in one may enter another.
    """
    with _lock:
        yield


@contextmanager
def tools() -> Iterator[None]:
    """:func:`exclusive`, and the global random generator is afterwards as it was before.

    ``convert_pt2e`` of torchao 0.18 draws from it, to make examples for its patterns.
    """
    with exclusive(), torch.random.fork_rng(devices=()):
        yield


def _renew() -> None:
    """Give a forked process a lock that no thread holds: only the one that forked lives on."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
