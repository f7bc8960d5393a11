from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from support.scripts import shown, without_numbers

from custom_quantizer.app.cli import cli
from custom_quantizer.app.demo import DemoResult, run_demo
from custom_quantizer.app.digits import load_digits_data
from custom_quantizer.backends.xnnpack import load_program, read_program
from custom_quantizer.errors import InputError

PROGRESS = re.compile(r"[a-z]+: ([\d,]+( of [\d,]+)?|[a-z ]+)")


@dataclass(frozen=True)
class Run:
    """One run of the command."""

    folder: Path
    stdout: str
    stderr: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = CliRunner().invoke(
        cli, ["demo", "--output", str(folder)], prog_name="custom-quantizer", catch_exceptions=False
    )
    assert done.exit_code == 0, done.stderr
    document = json.loads((folder / "digits.json").read_text())
    return Run(folder, done.stdout, done.stderr, document)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """In a process of its own, as the README tells users to."""
    folder = tmp_path_factory.mktemp("process") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "custom_quantizer", "demo", "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "digits.json").read_text())
    return Run(folder, done.stdout, done.stderr, document)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """The same in this process."""
    console = Console(file=io.StringIO(), width=110)
    return run_demo(tmp_path_factory.mktemp("again"), console=console, progress=False)


@pytest.mark.slow
def test_it_says_nothing_but_its_results(process: Run) -> None:
    # On a loaded machine it takes long enough for lines of progress.
    told = [line for line in process.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert told == []
    lines = process.stdout.splitlines()
    files = {"program": "digits.pte", "graph": "digits.graph.safetensors", "report": "digits.json"}
    assert {path.name for path in process.folder.iterdir()} == set(files.values())
    for name, file in files.items():
        assert f"{name:<8} {process.folder}/{file}" in lines


def test_the_readme_shows_what_it_prints(demo: Run) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    output = demo.stdout.replace(str(demo.folder), "custom-quantizer-demo")
    assert without_numbers(shown(readme, "text")[-1]) == without_numbers(output)


def test_it_fits_a_terminal_of_80_columns(demo: Run) -> None:
    paths = ("program", "graph", "report", "next", "custom-quantizer verify")
    lines = [line.rstrip() for line in demo.stdout.splitlines()]
    wide = [line for line in lines if len(line) > 80 and not line.strip().startswith(paths)]
    assert wide == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(process: Run, again: DemoResult) -> None:
    assert again.files.program is not None
    assert again.files.program.read_bytes() == (process.folder / "digits.pte").read_bytes()
    assert json.loads(again.files.report.read_text()) == process.document
    assert again.biases == (5, 130, 130)
    assert asdict(again.layer) == {
        **process.document["demo"]["layer"],
        "channels": tuple(process.document["demo"]["layer"]["channels"]),
    }


def test_accuracy_is_that_of_the_program_it_left_behind(demo: Run) -> None:
    data = load_digits_data()
    program = load_program(demo.folder / "digits.pte")
    outputs = torch.cat([program.run(image)[0] for image in data.test_images[:, None]])
    correct = int((outputs.argmax(1) == data.test_labels).sum())
    scores = {score["name"]: score for score in demo.document["demo"]["evaluation"]["models"]}
    assert scores[".pte"]["correct"] == correct
    assert scores["integer reference"]["correct"] == correct
    # Above 97 % before, and at most one digit in a hundred lost.
    assert scores["float32"]["correct"] >= 350
    assert correct >= scores["float32"]["correct"] - 3
    for score in scores.values():
        assert f"{score['correct']} / 360" in demo.stdout
    assert f"{correct / 360:.2%}" in demo.stdout


def test_the_program_is_bit_exact(demo: Run) -> None:
    verification = demo.document["demo"]["verification"]
    assert verification["bit_exact"] is True
    assert verification["exact_expected"] is True
    assert [output["values"] for output in verification["outputs"]] == [3600]
    assert "3,600 of 3,600 outputs bit-identical" in demo.stdout


def test_the_bias_shown_is_the_one_in_the_file(demo: Run) -> None:
    layer = demo.document["demo"]["layer"]
    (delegate,) = read_program(demo.folder / "digits.pte").delegates
    (op,) = (op for op in delegate.ops if op.kind == "fully_connected")
    stored = delegate.bias(op)
    assert stored is not None
    assert stored.dtype == "int32"
    assert [channel["in_program"] for channel in layer["channels"]] == stored.tolist()
    assert [channel["in_graph"] for channel in layer["channels"]] == stored.tolist()
    for number, channel in enumerate(layer["channels"]):
        # Exactly, and half to even: Python rounds fractions so.
        unit = Fraction(layer["input_scale"]) * Fraction(channel["weight_scale"])
        assert round(Fraction(channel["real"]) / unit) == channel["in_program"]
        line = next(line for line in demo.stdout.splitlines() if line.split()[:1] == [str(number)])
        assert line.split()[1] == f"{channel['real']:+.7f}"
        assert line.split()[5:] == [f"{channel['in_program']:,}"] * 2 + ["yes"]


def test_all_biases_are_counted(demo: Run) -> None:
    (delegate,) = read_program(demo.folder / "digits.pte").delegates
    biases = [bias for op in delegate.ops if (bias := delegate.bias(op)) is not None]
    count = sum(bias.size for bias in biases)
    assert (len(biases), count) == (5, 130)
    assert "130 of 130 are the same" in demo.stdout


def test_one_row_per_op(demo: Run) -> None:
    rows = demo.document["report"]["rows"]
    assert len(rows) == 9
    for row in rows:
        line = next(
            line
            for line in demo.stdout.splitlines()
            if line.split()[:2] == [row["path"] or row["node"], row["family"]]
        )
        assert line.rstrip().endswith("  int8")
        assert row["backend"] == "xnnpack int8"
        assert ("int32" in line) == (row["bias"] is not None)
        assert row["compute"] == "integer"


def test_sizes(demo: Run) -> None:
    sizes = demo.document["demo"]["sizes"]
    assert sizes["program_file"] == (demo.folder / "digits.pte").stat().st_size
    assert f"{sizes['program_file']:,} bytes" in demo.stdout
    assert sizes["program_file"] < sizes["float_file"]
    # Weights shrink to a quarter; biases and scales do not.
    assert sizes["program_values"] < sizes["float_values"] / 3


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make this directory"):
        run_demo(tmp_path / "file", console=Console(file=io.StringIO()))
