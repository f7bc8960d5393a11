from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from custom_quantizer._io import (
    open_atomic,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from custom_quantizer._progress import stages, track
from custom_quantizer.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic writes ---


@pytest.mark.parametrize("data", [b"", b"\x00\r\n\xff", bytearray(b"ab"), memoryview(b"abc")[1:]])
def test_bytes_are_written_as_they_are(
    tmp_path: Path, data: bytes | bytearray | memoryview
) -> None:
    write_bytes_atomic(tmp_path / "a.bin", data)
    assert (tmp_path / "a.bin").read_bytes() == bytes(data)
    assert names(tmp_path) == ["a.bin"]


def test_text_is_utf8_and_keeps_its_line_ends(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "é\r\n→\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\xe2\x86\x92\n"


def test_json_keeps_key_order_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"z": 1, "a": ["é", None, 0.1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": 1, "a": ["é", None, 0.1]}
    assert text.index('"z"') < text.index('"a"')
    assert "é" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("value", "error"),
    [(math.nan, ValueError), (math.inf, ValueError), (object(), TypeError)],
)
def test_what_json_cannot_say_leaves_the_old_file(
    tmp_path: Path, value: object, error: type[Exception]
) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(error):
        write_json_atomic(tmp_path / "a.json", [value])
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a").write_text("old")

    def write_half() -> None:
        with open_atomic(tmp_path / "a") as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with open_atomic(tmp_path / "a") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    payloads = [bytes([index]) * 100_000 for index in range(8)]
    threads = [
        threading.Thread(target=write_bytes_atomic, args=(tmp_path / "a", payload))
        for payload in payloads
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in payloads
    assert names(tmp_path) == ["a"]


def test_a_new_file_has_the_mode_that_open_gives_and_an_old_one_keeps_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes_atomic(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    write_bytes_atomic(tmp_path / "plain", b"2")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == "new"
    assert names(tmp_path / "folder") == ["real"]


def test_a_missing_directory_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.pte.*directory .*missing does not exist. Create it"):
        write_bytes_atomic(tmp_path / "missing" / "a.pte", b"")
    assert names(tmp_path) == []


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it is a directory\. Name a file inside it"):
        write_bytes_atomic(tmp_path, b"")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(InputError, match="a is a file, not a directory"):
        write_bytes_atomic(tmp_path / "a" / "b", b"")


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: it is not a regular file"):
        write_bytes_atomic(tmp_path / "pipe", b"")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_the_system_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"[Nn]ame too long"):
        write_bytes_atomic(tmp_path / ("n" * 300) / "a", b"")


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "unwritable"
    folder.mkdir(mode=0o555)
    superuser = os.geteuid() == 0  # to whom modes mean nothing
    if superuser:
        os.chown(folder, 65534, 65534)
        parents = [p for p in folder.parents if p.stat().st_mode & 0o11 != 0o11]
        modes = [p.stat().st_mode for p in parents]
        for parent, mode in zip(parents, modes, strict=True):
            parent.chmod(mode | 0o11)
        os.seteuid(65534)
    yield folder
    if superuser:
        os.seteuid(0)
        for parent, mode in zip(parents, modes, strict=True):
            parent.chmod(mode)


def test_a_directory_that_is_not_writable_is_named(unwritable: Path) -> None:
    with pytest.raises(InputError, match="unwritable is not writable"):
        write_bytes_atomic(unwritable / "a", b"")


# --- progress ---


def test_track_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "count")) == [1, 2]
    with stages("work") as stage:
        stage("first")
    assert capsys.readouterr() == ("", "")


def test_track_shows_count_and_total_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([5, 6, 7], "count", enabled=True)) == [5, 6, 7]
    out, err = capsys.readouterr()
    assert out == ""
    assert "count" in err
    assert "3/3" in err


def test_track_takes_the_total_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(iter("ab"), "count", total=7, enabled=True))
    list(track((c for c in "ab"), "unknown", enabled=True))
    err = capsys.readouterr().err
    assert "2/7" in err
    assert "2/?" in err


def test_names_with_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    list(track([1], "layer[0] [red]", enabled=True))
    assert "layer[0] [red]" in capsys.readouterr().err


def test_nested_bars_share_one_display_and_leave_only_the_outer_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stages("outer", total=2, enabled=True) as stage:
        stage("one")
        for _ in track(range(2), "middle", enabled=True):
            for _ in track(range(3), "inner", enabled=True):
                break
        stage("two")
    err = capsys.readouterr().err
    assert "outer" in err
    assert "2/2" in err
    assert "inner" not in err


def test_an_error_ends_the_display(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with stages("outer", total=3, enabled=True) as stage:
            stage("one")
            stage("two")
            for value in track([1, 0], "inner", enabled=True):
                assert 1 // value

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "outer: two" in capsys.readouterr().err
    list(track([1], "after", enabled=True))
    err = capsys.readouterr().err
    assert "after" in err
    assert "outer" not in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_bar_and_a_pipe_what_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("TERM", "xterm")
    for _ in track([1], "count"):
        print("result")
    assert "count" in terminal.getvalue()
    assert pipe.getvalue() == "result\n"
