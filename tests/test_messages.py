"""Messages are one sentence without a period, so that they can be put into another message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import custom_quantizer
from custom_quantizer import errors
from custom_quantizer.errors import first_line

ROOT = Path(custom_quantizer.__file__).parent

TELLS = {
    *(name for name, kind in vars(errors).items() if isinstance(kind, type)),
    *("BundleError", "error", "fail", "warn", "warning", "Mistake"),
    *("Delegation", "FloatOp", "Verdict", "refused"),
    *("BadParameter", "ClickException", "UsageError"),
}
"""What is given messages: our exceptions, warnings, errors of click, reasons."""

REASONS = ("ops", "planning", "reference", "backends")
"""Rooms whose functions return reasons as text."""

SENTENCE = re.compile(r"(?<!\.)\.( [A-Z`]|\s*$)")


def literals(expression: ast.expr) -> Iterator[str]:
    """The literal texts of a message; a field of an f-string stands as ``x``."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        yield expression.value
    elif isinstance(expression, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else "x" for part in expression.values
        )
    elif isinstance(expression, ast.BinOp):
        yield from literals(expression.left)
        yield from literals(expression.right)
    elif isinstance(expression, ast.IfExp):
        yield from literals(expression.body)
        yield from literals(expression.orelse)


def with_periods(source: str) -> list[str]:
    """Messages of several sentences, and those that end with a period."""
    return [
        text
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in TELLS
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        for text in literals(argument)
        if SENTENCE.search(text)
    ]


def reasons_with_periods(source: str) -> list[str]:
    """Texts that a function returns, likewise."""
    return [
        text
        for statement in ast.walk(ast.parse(source))
        if isinstance(statement, ast.Return) and statement.value is not None
        for text in literals(statement.value)
        if SENTENCE.search(text)
    ]


def test_no_message_has_a_period() -> None:
    assert with_periods('raise InputError(f"{x} is none.")') == ["x is none."]
    assert with_periods('warnings.warn("a " + ("b." if c else "d"))') == ["b."]
    assert with_periods('raise self.error(f"{x}. Remove it")') == ["x. Remove it"]
    assert with_periods('raise InputError("a.pte has no file.py: 0.5, ...")') == []
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for path in ROOT.rglob("*.py")
        for text in with_periods(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_no_reason_has_a_period() -> None:
    assert reasons_with_periods('def f():\n    return f"{x} is none."') == ["x is none."]
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for room in REASONS
        for path in (ROOT / room).rglob("*.py")
        for text in reasons_with_periods(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No.\nReally."), "ValueError: No"),
        (OSError(), "OSError: "),
        (RuntimeError("  a.b "), "RuntimeError: a.b"),
    ],
)
def test_errors_of_others_lose_their_period(error: Exception, line: str) -> None:
    assert first_line(error) == line
