"""Progress where standard error is no terminal: nothing, or a line now and then."""

from __future__ import annotations

import pytest

from custom_quantizer.core import progress


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: what it says next."""
    clock = [0.0]
    monkeypatch.setattr(progress, "_LINES", progress._Lines())
    monkeypatch.setattr(progress._LINES, "_last", 0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def test_a_library_says_nothing(every: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.track(range(3), "calibrate"):
        every[0] += 100
    assert capsys.readouterr().err == ""


def test_a_command_says_a_line_in_so_many_seconds(
    every: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress.print_lines(10)
    assert list(progress.track(iter(range(3)), "read")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    for _ in progress.track(range(1000), "calibrate"):
        every[0] += 0.1
    said = capsys.readouterr().err.splitlines()
    assert len(said) in (9, 10)
    assert said[0].startswith("calibrate: 1")
    assert said[0].endswith(" of 1,000")
    with progress.stages("quantize", 2) as stage:
        stage("capture")
        every[0] += 10
        stage("lower")
    assert capsys.readouterr().err == "quantize: lower\n"
    for _ in progress.track(range(3), "calibrate", enabled=False):
        every[0] += 100
    assert capsys.readouterr().err == ""
