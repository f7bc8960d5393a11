"""What ``docs/calibration.md`` shows of the command line is what it prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from click.testing import CliRunner
from support.scripts import DOCS, without_numbers

from custom_quantizer.app.cli import cli

PAGE = DOCS / "calibration.md"


@pytest.mark.slow
def test_the_commands_print_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").split("### From the command line\n")[1]
    blocks = [part.split("```")[0] for part in section.split("\n##")[0].split("```")[1::2]]
    kinds = [block.split("\n", 1)[0] for block in blocks]
    assert kinds == ["python", *["sh", "text"] * 3]
    texts = [dedent(block.split("\n", 1)[1]) for block in blocks]
    names: dict[str, Any] = {}
    exec(compile(texts[0], str(PAGE), "exec"), names)
    for command, shown in zip(texts[1::2], texts[2::2], strict=True):
        program, *args = shlex.split(command.replace("\\\n", ""))
        assert program == "custom-quantizer"
        result = CliRunner().invoke(cli, args, prog_name=program)
        said = result.stdout or result.stderr
        # Which tensor converges last differs between machines.
        assert sorted(without_numbers(said)) == sorted(without_numbers(shown)), said
