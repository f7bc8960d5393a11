"""Mutants are single, small changes, and none of what no test should notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.mutants import compiles, mutants

PACKAGE = Path(__file__).parents[1] / "custom_quantizer"


def changed(source: str) -> set[str]:
    """Every mutant of one statement, as the line it becomes."""
    return {mutant.lines(source)[1] for mutant in mutants(source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {"x = a <= b", "x = a >= b"}),
        ("x = a == b", {"x = a != b"}),
        ("x = a is not b", {"x = a is b"}),
        ("x = (a) not in (b)", {"x = (a) in (b)"}),
        ("x = a < b > c", {"x = a <= b > c", "x = a >= b > c", "x = a < b >= c", "x = a < b <= c"}),
        ("x = a - b", {"x = a + b"}),
        ("x = a // b", {"x = a * b"}),
        ("x = a and b or c", {"x = a or b or c", "x = a and b and c"}),
        ("x = not a", {"x = (a)"}),
        ("x = -a", {"x = (a)"}),
        ("x = 3", {"x = 4"}),
        ("x = True", {"x = False"}),
        ("x = t.amin(d)", {"x = t.amax(d)"}),
        ("x = min(a, b)", {"x = max(a, b)", "x = min(b, a)"}),
        ("f(a)", {"pass"}),
        ("raise E(1 + 2)", {"pass"}),
        ("x.y = a", {"pass"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if (not (c))]"}),
        ("def f():\n    return a", {"return None"}),
        ("def f():\n    'Text.'\n    a(b)", {"return; a(b)", "pass"}),
    ],
)
def test_what_a_line_becomes(source: str, expected: set[str]) -> None:
    assert changed(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""One of 2."""',
        "x: Literal[1]",
        "def f(x: Literal[1]) -> Literal[2]: ...",
        "@cache(1)\ndef f(): ...",
        '__all__ = ["a" * 2]',
        'x = f"{a + 1}"',
        "assert a < b",
        "x = cast(a, b)",
        "x = isinstance(a, b)",
        'Case("plain", 1)',
    ],
)
def test_what_stays_as_it_is(source: str) -> None:
    assert changed(source) - {"pass"} == set()


def test_a_file_with_other_letters_and_long_statements() -> None:
    source = "x = 'ä'  # ö\ny = f(\n    a,\n    'ü', b + c\n)\n"
    places = {(m.line, m.applied(source)) for m in mutants(source) if m.operator == "arithmetic"}
    assert places == {(4, source.replace("b + c", "b - c"))}


@pytest.mark.parametrize("path", ["core/bias.py", "backends/xnnpack/stored_integers.py"])
def test_real_mutants_are_python_and_differ(path: str) -> None:
    source = (PACKAGE / path).read_text(encoding="utf-8")
    found = mutants(source)
    assert len(found) > 40
    assert len({mutant.applied(source) for mutant in found} - {source}) == len(found)
    working = sum(compiles(mutant.applied(source)) for mutant in found)
    assert working >= 0.95 * len(found)
