"""Progress on standard error: bars at a terminal; elsewhere nothing, or a line now and then.

All bars of the process share one display, because two of them on one terminal overwrite each
other: a loop inside a stage adds its bar below and takes it away when it ends.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["print_lines", "stages", "track"]

T = TypeVar("T")


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    enabled: bool | None = None,
) -> Iterator[T]:
    """Yield from ``iterable`` and show how far it is.

    Args:
        iterable: What to walk through.
        description: A few words shown beside the bar.
        total: Number of items; None asks ``iterable``, and where it does not know, only a count
            is shown.
        enabled: True shows the bar, False does not, None shows it when standard error is a
            terminal.

    Yields:
        The items, unchanged.
    """
    if not _is_enabled(enabled):
        count = length_hint(iterable) if total is None else total
        for done, item in enumerate(iterable, 1):
            yield item
            if enabled is None:
                _LINES.say(f"{description}: {done:,}" + (f" of {count:,}" if count else ""))
        return
    with _DISPLAY.task(description, total or length_hint(iterable) or None) as (progress, task):
        for item in iterable:
            yield item
            progress.advance(task)


@contextmanager
def stages(
    description: str, total: int | None = None, enabled: bool | None = None
) -> Iterator[Callable[[str], None]]:
    """Show a piece of work that passes through named stages.

    ::

        with stages("quantize", total=2) as stage:
            stage("capture")
            ...
            stage("calibrate")
            ...

    Args:
        description: A few words for the whole.
        total: Number of stages, when known.
        enabled: As for :func:`track`.

    Yields:
        A function to call with a stage's name when it begins; the one before then counts as done.
    """
    if not _is_enabled(enabled):
        yield lambda name: _LINES.say(f"{description}: {name}") if enabled is None else None
        return
    with _DISPLAY.task(description, total) as (progress, task):
        begun = 0

        def stage(name: str) -> None:
            nonlocal begun
            progress.update(task, description=f"{description}: {name}", completed=begun)
            begun += 1

        yield stage
        progress.update(task, description=description, completed=begun)


def print_lines(seconds: float) -> None:
    """Where standard error is no terminal, tell of progress in lines, one in so many seconds.

    For commands, whose output ends up in the log of a job; a library says nothing there.
    """
    _LINES.every = seconds


class _Lines:
    every: float | None = None
    _last = time.monotonic()

    def say(self, text: str) -> None:
        now = time.monotonic()
        if self.every is not None and sys.stderr and now - self._last >= self.every:
            self._last = now
            print(text, file=sys.stderr, flush=True)


_LINES = _Lines()


def _is_enabled(enabled: bool | None) -> bool:
    # Under pythonw and some services there is no standard error at all.
    return enabled if enabled is not None else bool(sys.stderr and sys.stderr.isatty())


class _Display:
    """One ``rich`` display, alive while any task is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._tasks = 0

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
        progress = self._enter()
        # Brackets in a name ("layer[0]") are text, not rich markup: see the column below.
        task = progress.add_task(description, total=total)
        try:
            yield progress, task
        finally:
            self._leave(progress, task)

    def _enter(self) -> Progress:
        with self._lock:
            if self._progress is None:
                self._progress = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                    # Else rich would send what is printed to a pipe to the terminal instead.
                    redirect_stdout=bool(sys.stdout and sys.stdout.isatty()),
                )
                self._progress.start()
            self._tasks += 1
            return self._progress

    def _leave(self, progress: Progress, task: TaskID) -> None:
        with self._lock:
            self._tasks -= 1
            if self._tasks:
                progress.remove_task(task)
            else:
                self._progress = None
                progress.stop()


_DISPLAY = _Display()
