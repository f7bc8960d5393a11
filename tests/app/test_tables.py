"""Tables at narrow terminals and without one: no name is cut, no line is longer than it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.flow import small_images, small_labels, small_model

from custom_quantizer.app.cli import cli
from custom_quantizer.core.text_table import table_lines, within

ROWS = [
    ("node", "module", "bytes", "why"),
    ("conv2d_10", "features.denseblock1.norm", "1,024", "moves values: keeps the integers"),
    ("relu", "", "", "rule"),
]


def test_a_table_takes_what_room_there_is() -> None:
    assert table_lines(ROWS, left=(0, 1, 3)) == [
        "node       module                     bytes  why",
        "conv2d_10  features.denseblock1.norm  1,024  moves values: keeps the integers",
        "relu                                         rule",
    ]
    with within(60):
        assert table_lines(ROWS, left=(0, 1, 3)) == [
            "node       module                     bytes  why",
            "conv2d_10  features.denseblock1.norm  1,024  moves values:",
            "                                             keeps the",
            "                                             integers",
            "relu                                         rule",
        ]
    with within(30):
        assert table_lines(ROWS, left=(0, 1, 3)) == [
            "conv2d_10",
            "  module",
            "    features.denseblock1.norm",
            "  bytes   1,024",
            "  why     moves values: keeps",
            "          the integers",
            "",
            "relu",
            "  why     rule",
        ]
        assert table_lines([("net.pte", *["100.00%"] * 4)], headers=False) == [
            "net.pte",
            *["  100.00%"] * 4,
        ]
    with within(20):  # a name that is longer than the terminal stays whole
        assert "    features.denseblock1.norm" in table_lines(ROWS, left=(0, 1, 3))
    assert table_lines([("", "a"), ("x", "1")]) == ["   a", "x  1"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "net.py").write_text("from support.flow import Small\n")
    torch.save(small_model().state_dict(), folder / "net.pt")
    torch.save(
        {"images": small_images(32), "labels": small_labels(32)},
        folder / "data.pt",
    )
    model = [f"{folder}/net.py:Small", "--weights", f"{folder}/net.pt"]
    data, out = f"{folder}/data.pt", f"{folder}/net.pte"
    made = run(["quantize", *model, "--calibration", data, "-o", out])
    assert made, "nothing was printed"
    widths = ["--data", data, "--batch", "8", "--samples", "16", "--schemes", "a8w8,a8w4,a4w4"]
    return {
        "plan": ["plan", *model, "--input-shape", "1,1,8,8"],
        "inspect": ["inspect", out],
        "inspect report": ["inspect", f"{folder}/net.json"],
        "inspect op": ["inspect", f"{folder}/net.json", "--op", "linear"],
        "report": ["report", out, "--data", data, "--model", *model],
        "diagnose": ["diagnose", out, "--model", model[0], *model[1:], "--data", data],
        "sensitivity": ["sensitivity", *model, *widths, "--estimate-only"],
        "search": ["search", *model, *widths, "--budget", "weight_bits=0.7", "--points", "1"],
        "profile": ["profile", out, "--runs", "1"],
        "evaluate": ["evaluate", out, "--data", data, "--slices", "4", "--model", *model],
        "calibrate": ["calibrate", *model, "--data", data, "-o", f"{folder}/s.safetensors"],
    }


def run(args: list[str], columns: int | None = None) -> str:
    env = {"COLUMNS": None if columns is None else str(columns)}
    result = CliRunner().invoke(cli, args, prog_name="custom-quantizer", env=env)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def words(text: str) -> set[str]:
    """Names, headers and words of sentences; rules and numbers differ from run to run."""
    found = (word.strip(",") for word in text.replace("─", " ").split())
    return {word for word in found if any(c.isalpha() for c in word)}


HEADERS = {"activation", "model", "node", "of", "op", "tensor", "weight"}
"""Of first columns: a row that has become a paragraph begins with what stands there."""

TABLES = [
    *("plan", "inspect", "inspect report", "inspect op", "evaluate", "diagnose", "sensitivity"),
    *("calibrate", "report"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("search", "profile")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_no_table_cuts_a_name(commands: dict[str, list[str]], name: str) -> None:
    args = commands[name]
    whole = run(args)
    every = words(run(args, 1000))
    assert every - words(whole) == set()
    # What takes seconds or shows other times again is asked once.
    for columns in (40,) if name in ("search", "profile") else (40, 60, 80):
        narrow = run(args, columns)
        left = every - words(narrow) - HEADERS
        # Without a terminal a report folds long names behind an underscore.
        assert [part for part in left if not any(part in w for w in words(narrow))] == [], columns
        for line in narrow.splitlines():
            indent = len(line) - len(line.lstrip())
            assert len(line) <= columns or " " not in line[indent:], (columns, line)


def test_a_terminal_is_asked_for_its_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from custom_quantizer.report.terminal import terminal_width

    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width((tmp_path / "file").open("w")) is None
    for text, width in (("40", 40), ("3", 20), ("x", None), ("0", None), ("9999999", None)):
        monkeypatch.setenv("COLUMNS", text)
        assert terminal_width((tmp_path / "file").open("w")) == width
