"""What the README says is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.scripts import shown, without_numbers

from custom_quantizer.app.cli import cli
from custom_quantizer.backends.xnnpack import load_program

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return shown(ROOT / "README.md", language)


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints what stands below it, but for numbers: training differs between CPUs."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    code = blocks("python")
    assert len(code) == 4
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert re.match(r"\[ *-?\d+( +-?\d+){9}\]\n", printed)
    bias, report, _ = blocks("text")
    assert without_numbers(printed) == without_numbers(bias + report)
    assert "5 integer biases, with scale = input scale x weight scale bit for bit" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits.json",
        "digits.graph.safetensors",
        "digits.pte",
    }
    assert load_program(tmp_path / "digits.pte").contents.inputs[0].shape == (1, 1, 8, 8)


def test_the_two_commands() -> None:
    assert blocks("sh") == [
        "pip install . && custom-quantizer demo\n",
        'pip install ".[dev]" && pytest\n',
    ]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    install, tests = blocks("sh")[1].strip().split(" && ")
    assert install in script
    assert any(line.split()[:1] == [tests] for line in script)


def test_every_command_is_listed() -> None:
    assert set(re.findall(r"^\| `custom-quantizer ([\w-]+)", README, re.MULTILINE)) == set(
        cli.commands
    )


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.M)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).is_file(), target
