"""A lock for what only one thread at a time can use: the tools of PyTorch and ExecuTorch.

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

For the same reason Ctrl-C does not stop these tools half-way: PyTorch 2.15 then keeps operators
whose decompositions were exchanged for a moment, and every later lowering in the process fails. It
waits until they are done; a second Ctrl-C does not.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

__all__ = ["begin", "exclusive", "interruption_point", "tools"]

logger = logging.getLogger(__name__)

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
    """:func:`exclusive`, without interruption and with a random generator of its own.

    The first Ctrl-C takes effect at the end of the block, or at an :func:`interruption_point`. The
    global random generator is afterwards as it was before: ``convert_pt2e`` of torchao 0.18 draws
    from it, to make examples for its patterns.
    """
    with exclusive(), _uninterrupted(), torch.random.fork_rng(devices=()):
        yield


class _Held:
    """A handler of SIGINT that keeps the first one for later.

    Attributes:
        handler: the one in whose place it is.
        came: a signal is kept.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self.came = False
            self.handler(number, frame)
            return
        self.came = True
        logger.warning(
            "Ctrl-C: stopping once this step of PyTorch or ExecuTorch is done; press it again to "
            "stop now, after which this process may be unable to lower models"
        )

    def deliver(self) -> None:
        """Do now what a signal that is kept should have done."""
        if self.came:
            self.came = False
            self.handler(signal.SIGINT, None)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back.

    An exception that a handler raises anywhere in the tools skips what they would restore, and is
    lost where it comes in the callback of a weak reference. Only in the main thread, where Python
    runs handlers, and only where the handler is a Python function: no others raise exceptions.
    """
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(handler) or isinstance(handler, _Held):
        yield
        return
    held = _Held(handler)
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is held:  # or somebody has set another one meanwhile
            signal.signal(signal.SIGINT, handler)
        held.deliver()


def interruption_point() -> None:
    """Let a Ctrl-C through that :func:`tools` holds back, where no tool is at work."""
    held = signal.getsignal(signal.SIGINT)
    if isinstance(held, _Held) and threading.current_thread() is threading.main_thread():
        held.deliver()


def begin(progress: Callable[[str], None] | None, stage: str) -> None:
    """Say that a stage begins; a Ctrl-C that was held back takes effect before it."""
    interruption_point()
    if progress is not None:
        progress(stage)


def _renew() -> None:
    """Give a forked process a lock that no thread holds: only the one that forked lives on."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
