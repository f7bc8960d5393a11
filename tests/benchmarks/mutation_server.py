"""Runs tests against changed sources, each in a fork of a process that has imported the libraries.

Importing torch, torchao and ExecuTorch takes ten seconds; a fork has them in no time. The package
itself is imported in the fork only, from a folder of links in which one file is another one. That
folder stands first in ``PYTHONPATH``, so processes that tests start see the change, too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "custom_quantizer"
WALL = 12
"""Wall time that is allowed for a second of CPU time, on a machine that others use as well."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run of tests."""

    code: int | None
    """pytest's exit code, ``None`` if the process was ended for its time or died."""
    failed: str | None
    """The first test that failed."""
    seconds: float
    missing: bool = False
    """A test that was asked for does not exist any more."""

    @property
    def noticed(self) -> bool:
        """A test failed, a module could not be imported, or it ran far too long."""
        return not self.missing and self.code not in (0, 5)


@dataclass(eq=False)
class Watch:
    """A pytest plugin: the first failure, and the CPU time of each test."""

    failed: str | None = None
    on_test: Callable[[str], None] = lambda node: None
    seconds: dict[str, float] | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.on_test(item.nodeid)
        start = time.process_time()
        try:
            return (yield)
        finally:
            if self.seconds is not None:
                self.seconds[item.nodeid] = time.process_time() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def preload(work: Path) -> None:
    """Import all that the package and its tests import from others, and nothing of our own."""
    names = work / "imports.json"

    def look() -> int:
        sys.path.insert(0, str(ROOT))
        package = importlib.import_module(PACKAGE)
        for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        sys.path.insert(0, str(ROOT / "tests"))
        for file in sorted((ROOT / "tests").glob("support/*.py")):
            importlib.import_module(f"support.{file.stem}")
        own = (PACKAGE, "support")
        names.write_text(json.dumps([name for name in sys.modules if not name.startswith(own)]))
        return 0

    process = fork(look, work / "imports.log")
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"the package cannot be imported: {work / 'imports.log'}")
    for name in json.loads(names.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def fork(body: Callable[[], int], log: Path, cpu_seconds: float | None = None) -> int:
    """Run ``body`` in a child of its own process group; its return value is the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 120
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if cpu_seconds is not None:
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = body()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def use(folder: Path) -> None:
    """Import the package from ``folder``, here and in processes that are started here."""
    # Compiled files of the links are shared: reading them is right, writing them is not.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", HYPOTHESIS_PROFILE="mutation")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


@contextlib.contextmanager
def overlay(path: str, source: str) -> Iterator[Path]:
    """A folder with the package in which the file ``path`` (from the root) has another text."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        here, there = ROOT, Path(folder)
        for part in Path(path).parts:
            for entry in here.iterdir():
                if entry.name != part and here != ROOT:
                    (there / entry.name).symlink_to(entry)
            here, there = here / part, there / part
            if here.is_dir():
                there.mkdir()
        there.write_text(source, encoding="utf-8")
        yield Path(folder)


class Runs:
    """Test runs in forks; several may go on at a time."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.going: dict[int, _Run] = {}

    def start(
        self, tests: list[str], changed: tuple[str, str], cpu_seconds: float, token: Any
    ) -> None:
        """Begin one with a changed file: its path from the root and its text.

        ``token`` comes back with the outcome.
        """
        files = contextlib.ExitStack()
        folder = files.enter_context(overlay(*changed))
        result = Path(tempfile.mkstemp(prefix="run-", suffix=".json", dir=self.work)[1])

        def body() -> int:
            use(folder)
            os.chdir(ROOT)
            watch = Watch()
            code = pytest.main(
                ["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests], plugins=[watch]
            )
            result.write_text(json.dumps(watch.failed))
            return int(code)

        process = fork(body, result.with_suffix(".log"), cpu_seconds)
        now = time.monotonic()
        self.going[process] = _Run(now, now + WALL * cpu_seconds, result, files, token)

    def wait(self) -> tuple[Any, Outcome]:
        """The next run that ends, by itself or for its time."""
        while True:
            for process, run in self.going.items():
                ended, status = os.waitpid(process, os.WNOHANG)
                now = time.monotonic()
                if not ended and now < run.limit:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                if not ended:
                    os.waitpid(process, 0)
                del self.going[process]
                run.files.close()
                code = os.waitstatus_to_exitcode(status) if ended else None
                return run.token, _outcome(code, run.result, now - run.start)
            time.sleep(0.05)


@dataclass(frozen=True)
class _Run:
    start: float
    limit: float
    result: Path
    files: contextlib.ExitStack
    token: Any


def _outcome(code: int | None, result: Path, seconds: float) -> Outcome:
    text, log = result.read_text(), result.with_suffix(".log")
    output = log.read_text(errors="replace")
    result.unlink()
    log.unlink()
    failed = json.loads(text) if text else None
    missing = code == pytest.ExitCode.USAGE_ERROR and "not found:" in output
    return Outcome(code, failed, seconds, missing)


def record_coverage(work: Path, file: str, cpu_seconds: float) -> bool:
    """Which lines each fast test of a file executes, in ``work``; false if it had to be stopped."""
    target = work / f"{Path(file).stem}.coverage"

    def body() -> int:
        import coverage

        os.environ["HYPOTHESIS_PROFILE"] = "mutation"
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        measured = coverage.Coverage(data_file=str(partial), source=[PACKAGE], config_file=False)
        seconds: dict[str, float] = {}
        measured.start()
        watch = Watch(on_test=measured.switch_context, seconds=seconds)
        code = pytest.main(["-q", "-p", "no:cacheprovider", "--durations=5", file], plugins=[watch])
        measured.stop()
        measured.save()
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            target.with_suffix(".json").write_text(json.dumps(seconds))
            partial.replace(target)
        return int(code)

    process = fork(body, target.with_suffix(".log"), cpu_seconds)
    os.waitpid(process, 0)
    return target.exists()
