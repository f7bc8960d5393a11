from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.disk import room_for

from custom_quantizer.calibration import checkpoint as calibration_checkpoint
from custom_quantizer.calibration import statistics
from custom_quantizer.core import files as _io
from custom_quantizer.core.checkpoint import CheckpointFile
from custom_quantizer.core.files import (
    new_directory,
    write_bytes_atomic,
    write_files_atomic,
    write_json_atomic,
    write_text_atomic,
)
from custom_quantizer.core.progress import stages, track
from custom_quantizer.core.tensor_file import write_tensors
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.errors import InputError, TrainingError
from custom_quantizer.reference import graph_document, numpy_runner
from custom_quantizer.training import checkpoint as training_checkpoint


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


def test_a_reader_sees_the_old_files_until_all_new_ones_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {tmp_path / "a": b"new a", tmp_path / "b": b"new b"}
    for path in files:
        path.write_text("old")
    seen = []
    fsync = os.fsync

    def flushed(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            seen.append([path.read_text() for path in files])

    monkeypatch.setattr(os, "fsync", flushed)
    write_files_atomic(files)
    assert seen == [["old", "old"]] * 2
    assert [path.read_bytes() for path in files] == [*files.values()]


# --- all or nothing ---


@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_changes_nothing(tmp_path: Path, old: bool) -> None:
    files = {tmp_path / "small": b"12345678", tmp_path / "large": b"123456789"}
    if old:
        for path in files:
            path.write_text("old")
    with room_for(8), pytest.raises(InputError, match=r"large: it would be larger than .*ulimit"):
        write_files_atomic(files)
    assert names(tmp_path) == (["large", "small"] if old else [])
    assert all(path.read_text() == "old" for path in tmp_path.iterdir())
    with room_for(9):
        write_files_atomic(files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("error", [PermissionError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("links", [True, False])
def test_a_set_of_which_one_cannot_be_renamed_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, links: bool
) -> None:
    (tmp_path / "first").write_text("old")
    (tmp_path / "third").write_text("old")
    before = {path: path.stat() for path in tmp_path.iterdir()}
    replace = os.replace

    def refuses(source: str, target: str) -> None:
        if target.endswith("third") and target not in source and (tmp_path / "second").exists():
            monkeypatch.setattr(os, "replace", replace)
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    wanted = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write_files_atomic({tmp_path / name: b"new" for name in ("first", "second", "third")})
    assert {path: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(before, "old")
    if links:
        assert all(path.stat().st_ino == before[path].st_ino for path in before)


def test_one_file_under_two_names_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match=r"link: it is the same file as .*a"):
        write_files_atomic({tmp_path / "a": b"1", tmp_path / "link": b"2"})
    assert names(tmp_path) == ["link"]


def test_a_directory_goes_again_when_nothing_came_into_it(tmp_path: Path) -> None:
    def fail(*parts: str) -> None:
        folder = tmp_path.joinpath(*parts)
        with pytest.raises(InputError, match=rf"stop: {True}"), new_directory(folder):
            raise InputError(f"stop: {folder.is_dir()}")

    fail("a", "b", "c")
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    fail("a", "b")
    assert names(tmp_path / "a") == []
    with new_directory(tmp_path / "a" / "b"):
        pass
    fail("a", "b")
    assert names(tmp_path / "a") == ["b"]


# --- other writers ---


def test_sets_do_not_mix(tmp_path: Path) -> None:
    """Five writers of the same three files; who looks under the lock sees one set."""
    paths = [tmp_path / name for name in "abc"]
    write_files_atomic(dict.fromkeys(paths, b"begin"))
    done = threading.Event()

    def write(index: int) -> None:
        for turn in range(25):
            write_files_atomic(dict.fromkeys(paths, f"{index} {turn}".encode()))

    mixed = []

    def look() -> None:
        while not done.is_set():
            with _io._locked([str(tmp_path)]):
                found = {path.read_text() for path in paths}
            if len(found) > 1:
                mixed.append(found)

    writers = [threading.Thread(target=write, args=(index,)) for index in range(5)]
    reader = threading.Thread(target=look)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert mixed == []
    assert len({path.read_text() for path in paths}) == 1
    assert names(tmp_path) == ["a", "b", "c"]


WRITER = """
import os, sys
from custom_quantizer.core.files import write_files_atomic

fsync, count = os.fsync, 0

def pause(descriptor):
    global count
    fsync(descriptor)
    count += 1
    if count == 2:  # both files are begun, one is on the disk
        print("writing", flush=True)
        sys.stdin.readline()

os.fsync = pause
write_files_atomic({name: name.encode() for name in sys.argv[1:]})
"""


def start_writer(*paths: Path) -> subprocess.Popen[str]:
    """A process that stops in the middle of writing until it is given a line."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def test_what_a_killed_writer_left_is_removed_and_a_live_one_is_not_disturbed(
    tmp_path: Path,
) -> None:
    killed = start_writer(tmp_path / "killed 1", tmp_path / "killed 2")
    alive = start_writer(tmp_path / "alive 1", tmp_path / "alive 2")
    foreign = tmp_path / ".0123456789abcdef.tmp"
    foreign.touch()
    assert len(names(tmp_path)) == 5
    killed.kill()
    killed.communicate()
    assert len(names(tmp_path)) == 5  # nobody cleaned up
    write_bytes_atomic(tmp_path / "mine", b"")
    assert len(names(tmp_path)) == 4
    alive.communicate("go on\n")
    assert alive.returncode == 0
    assert names(tmp_path) == [foreign.name, "alive 1", "alive 2", "mine"]
    assert (tmp_path / "alive 1").read_text() == str(tmp_path / "alive 1")


def test_without_locks_only_what_is_a_day_old_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unsupported(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    young, old = (tmp_path / f".custom_quantizer-{name}.tmp" for name in ("young", "old"))
    for path, age in ((young, 23), (old, 25)):
        path.touch()
        os.utime(path, (time.time() - age * 3600,) * 2)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_bytes_atomic(tmp_path / "a", b"")
    assert names(tmp_path) == [young.name, "a"]


def test_a_directory_that_somebody_else_keeps_locked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_io, "_PATIENCE_SECONDS", 0.05)
    with (
        _io._locked([str(tmp_path)]),
        pytest.raises(InputError, match="another process has locked this directory"),
    ):
        write_bytes_atomic(tmp_path / "a", b"")
    assert names(tmp_path) == []


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
    with pytest.raises(InputError, match=r"a\.pte.*directory .*missing does not exist; create it"):
        write_bytes_atomic(tmp_path / "missing" / "a.pte", b"")
    assert names(tmp_path) == []


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it is a directory; name a file inside it"):
        write_bytes_atomic(tmp_path, b"")
    with pytest.raises(InputError, match="null"):
        write_bytes_atomic("a\0b", b"")
    with pytest.raises(InputError, match="null"), new_directory("a\0b"):
        pass


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


# --- names of formats ---


def test_formats_keep_the_names_that_files_out_there_have() -> None:
    assert calibration_checkpoint._FORMAT == "custom_quantizer.calibration"
    assert training_checkpoint._FORMAT == "custom_quantizer.training"
    assert statistics.FORMAT == "custom_quantizer.statistics"
    assert graph_document.FORMAT == "custom_quantizer.graph"
    assert numpy_runner.FORMAT == "custom_quantizer.integers"


# --- checkpoints ---


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "c.safetensors", "a.format", "a test", "test", TrainingError)
    mine = {"graph": ("mine", "another graph")}
    assert file.read(mine) is None
    file.write({"x": torch.arange(3)}, {"graph": "mine"})
    found = file.read(mine)
    assert found is not None
    tensors, metadata = found
    assert metadata == {"format": "a.format", "version": "2", "graph": "mine"}
    assert tensors["x"].tolist() == [0, 1, 2]
    for version, message in (("1", "of version 1"), ("3", "of version 3")):
        # Version 1 has no SHA-256, so a sealed file is not of it.
        write_tensors(file.path, {}, {**metadata, "version": version})
        with pytest.raises(TrainingError, match=message):
            file.read(mine)
    file.write({}, {"graph": "yours"})
    with pytest.raises(TrainingError, match="is a checkpoint of another graph; remove it to test"):
        file.read(mine)
    write_tensors(file.path, {}, {"format": "other"})
    with pytest.raises(TrainingError, match="is no checkpoint of a test"):
        file.read(mine)
    with pytest.raises(TrainingError, match="is a damaged checkpoint"), file.loading():
        raise KeyError("x")


# --- tables ---


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "n", "last"), ("a", "12", ""), ("longer", "3", "x")]
    assert table_lines(rows) == ["name     n  last", "a       12", "longer   3     x"]
    assert table_lines(rows, left=(0, 1, 2)) == ["name    n   last", "a       12", "longer  3   x"]
