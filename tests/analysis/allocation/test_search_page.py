"""``docs/search.md``: its code runs, and prints what is written."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.scripts import DOCS, shown, without_numbers

PAGE = DOCS / "search.md"


def lines(text: str) -> list[str]:
    """Without numbers, and without which point of the curve was taken: CPUs differ in both."""
    marks = ("taken", "over the budget")
    found = without_numbers(text)
    for mark in marks:
        found = [line.removesuffix(mark).strip() for line in found]
    return sorted(found)


@pytest.mark.slow
def test_the_code_prints_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed = []
    for block in shown(PAGE, "python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, str(PAGE), "exec"), names)
        printed.append(out.getvalue())
    assert list(map(lines, printed)) == list(map(lines, shown(PAGE, "text")))
    (config,) = shown(PAGE, "yaml")
    written = yaml.safe_load((tmp_path / "mixed.yaml").read_text())
    assert written == names["found"].config
    assert yaml.safe_load(config).keys() == written.keys()
