"""What a user is told: results, warnings, and errors with their exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from custom_quantizer.errors import CustomQuantizerError


def open_closed_streams() -> None:
    """Put ``/dev/null`` where a standard stream is closed, as ``>&-`` does.

    Else the next file that is opened is standard output to ExecuTorch's C code, which prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def silence_upstream() -> None:
    """Let only this package speak: PyTorch and ExecuTorch warn of what no user here can change."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"custom_quantizer(\.|$)")
    warnings.showwarning = lambda message, *_rest, **_more: say("warning", str(message))
    # PyTorch logs with a traceback what it then raises; ExecuTorch every op it leaves out.
    logging.disable(logging.ERROR)


def _colors() -> bool | None:
    """No colors where the user wants none (https://no-color.org); else as the terminal can."""
    return False if os.environ.get("NO_COLOR") else None


def say(kind: str, text: str) -> None:
    """Tell on standard error, such as ``warning: ...``."""
    click.secho(f"{kind}: ", fg="yellow", nl=False, err=True, color=_colors())
    click.echo(text, err=True)


DEBUG = "custom_quantizer.debug"
"""Key in click's ``Context.meta``: whether tracebacks are shown."""


class _Failure(click.ClickException):
    """One of our errors: the message, and no traceback."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.secho("error: ", fg="red", nl=False, err=True, color=_colors())
        click.echo(self.message, err=True)


_INTERRUPTED = 130
"""Exit code of a process that SIGINT ended, as shells count: 128 + 2."""


class Group(click.Group):
    """Commands whose errors become messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; our errors end it with 1, Ctrl-C with 130."""
        try:
            return super().invoke(ctx)
        except CustomQuantizerError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            raise _Failure(str(error)) from error
        except KeyboardInterrupt:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            click.echo("interrupted", err=True)
            sys.exit(_INTERRUPTED)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; output that cannot be written ends it with 1."""
        try:
            return super().main(*args, **options)
        except OSError as error:  # a full disk behind ">"; click itself sees to "| head"
            if "--debug" in sys.argv:
                traceback.print_exc()
            _forget_output()
            what = error.filename or "the output cannot be written"
            _Failure(f"{what}: {error.strerror or error}").show()
            sys.exit(_Failure.exit_code)


def _forget_output() -> None:
    """Send to nowhere what standard output still holds: Python would try, and fail, once more."""
    with suppress(OSError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def show(found: Any, as_json: bool = False) -> None:
    """Print a result, as JSON or as text that fits the terminal."""
    if as_json:
        click.echo(found.to_json())
    else:
        echo(lambda: str(found))


def echo(text: Callable[[], str]) -> None:
    """Print a text whose tables are made now, for the width of the terminal."""
    from custom_quantizer.core.text_table import within
    from custom_quantizer.report.terminal import fitted, terminal_width

    with within(terminal_width()):
        click.echo(fitted(text()))
