"""Building the runner of device tests, and running it: here, and on emulated CPUs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import executorch
import pytest

HOST_RUNTIME = Path(next(iter(executorch.__path__)))
"""ExecuTorch's wheel for this machine: its C++ headers and shared libraries."""

LIBRARIES = (
    *("executorch", "executorch_backend_xnnpack", "executorch_kernels_optimized"),
    *("executorch_kernels_quantized", "executorch_threadpool"),
)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: it builds the runner"
)


def build_runner(
    source: Path, runner: Path, runtime: Path = HOST_RUNTIME, compiler: str = "g++"
) -> Path:
    """Compile ``runner.cpp`` as the README of a device test says."""
    include = runtime / "include"
    command = [
        *(compiler, "-std=c++17", "-O1", "-w"),
        *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"),
        *("-I", include, "-I", include / "executorch/runtime/core/portable_type/c10"),
        *(source, "-o", runner),
        *("-L", runtime / "lib", f"-Wl,-rpath,{runtime / 'lib'}", "-Wl,--no-as-needed"),
        *(f"-l{name}" for name in LIBRARIES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return runner


def run_on_host(
    runner: Path, kit: Path, program: str, *, emulator: Sequence[str] = (), runs: int = 1
) -> str:
    """Let a machine compute a device test; returns what the runner prints."""
    command = [*emulator, runner, program, "inputs", "outputs", "forward", str(runs)]
    done = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
