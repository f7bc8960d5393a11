"""Building the runner of device tests, and running it: here, and on emulated CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import executorch
import pytest

HOST_RUNTIME = Path(next(iter(executorch.__path__)))
"""ExecuTorch's wheel for this machine: its C++ headers and shared libraries."""

RUNNER_SOURCE = (
    Path(str(resources.files("custom_quantizer"))) / "backends/xnnpack/runner/runner.cpp"
)

CACHE = "CUSTOM_QUANTIZER_ARM_CACHE"
"""Environment variable: folder that ExecuTorch's wheel for aarch64 is downloaded to and kept in."""

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


def run_device_test(
    runner: Path, kit: Path, program: str, *, emulator: Sequence[str] = (), runs: int = 1
) -> str:
    """Let a machine compute a device test; returns what the runner prints."""
    command = [*emulator, runner, program, "inputs", "outputs", "forward", str(runs)]
    done = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# ---------------------------------------------------------------------------------------------
# Emulated CPUs
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cpu:
    """A CPU that QEMU emulates.

    Before version 10 QEMU's CPUs name no microarchitecture to XNNPACK, which then takes the kernels
    that it has for any CPU with these extensions.

    Attributes:
        name: as users know it.
        machine: its instruction set, as QEMU's programs are named.
        model: QEMU's ``-cpu``.
        kernels: the extension by which XNNPACK chooses its kernels there.
        since: first major version of QEMU that emulates it as it is. SME of version 7.2 is wrong:
            programs that are wrong there are right with version 10.0, by the same instructions.
    """

    name: str
    machine: str
    model: str
    kernels: str
    since: int = 7


CPUS = (
    Cpu("Cortex-A53", "aarch64", "cortex-a53", "NEON"),
    Cpu("Cortex-A76", "aarch64", "cortex-a76", "NEON, dot product"),
    Cpu("Neoverse N1", "aarch64", "neoverse-n1", "NEON, dot product"),
    Cpu("A64FX", "aarch64", "a64fx", "NEON, SVE"),
    Cpu("Cortex-A710", "aarch64", "cortex-a710", "NEON, dot product, i8mm", since=9),
    Cpu("Armv9 with SME", "aarch64", "max", "NEON, dot product, i8mm, SME", since=10),
    Cpu("Haswell", "x86_64", "Haswell", "AVX2"),
    Cpu("Sandy Bridge", "x86_64", "SandyBridge", "AVX"),
    Cpu("Penryn", "x86_64", "Penryn", "SSE4.1"),
)


def emulator_of(machine: str) -> str | None:
    """QEMU's user emulation, statically linked or not."""
    return shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")


@cache
def emulator_version(machine: str) -> str:
    """QEMU's version, such as ``10.0.13``."""
    command = [str(emulator_of(machine)), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.split("version ", 1)[1].split()[0]


def missing(cpu: Cpu) -> str | None:
    """What is missing to run a program on an emulated CPU; ``None`` if nothing is."""
    if emulator_of(cpu.machine) is None:
        return f"qemu-{cpu.machine} is not installed (Debian: qemu-user-static)"
    if int(emulator_version(cpu.machine).split(".")[0]) < cpu.since:
        return f"QEMU {emulator_version(cpu.machine)} is too old for {cpu.name}: {cpu.since} is not"
    if cpu.machine == "x86_64":
        return None if shutil.which("g++") else "g++ is not installed"
    if shutil.which("aarch64-linux-gnu-g++") is None:
        return "aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)"
    if CACHE not in os.environ:
        return f"{CACHE} names no folder for ExecuTorch's wheel for aarch64 (18 MB)"
    try:
        arm_runtime()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"ExecuTorch's wheel for aarch64 cannot be had: {error}"
    return None


@cache
def arm_runtime() -> Path:
    """ExecuTorch's wheel for aarch64, of the version that is installed here, unpacked."""
    number = version("executorch").partition("+")[0]
    name = f"executorch=={number}"
    folder = Path(os.environ[CACHE])
    runtime = folder / name / "executorch"
    if not runtime.is_dir():
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name),
            *("--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "--dest", folder),
        ]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = folder.glob(f"executorch-{number}-*aarch64.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder / name)
    return runtime


def runner_for(machine: str, folder: Path) -> tuple[Path, str]:
    """The runner for an emulated machine, built once per folder, and where its system lies."""
    runner = folder / f"runner-{machine}"
    if machine == "aarch64":
        runtime, compiler, system = arm_runtime(), "aarch64-linux-gnu-g++", "/usr/aarch64-linux-gnu"
    else:
        runtime, compiler, system = HOST_RUNTIME, "g++", "/"
    if not runner.exists():
        build_runner(RUNNER_SOURCE, runner, runtime, compiler)
    return runner, system


def run_on(cpu: Cpu, kit: Path, program: str, folder: Path) -> Path:
    """Compute a device test on an emulated CPU.

    Args:
        cpu: which one.
        kit: folder of the device test.
        program: its file.
        folder: for the runner.

    Returns:
        The folder with the outputs.
    """
    runner, system = runner_for(cpu.machine, folder)
    emulator = (str(emulator_of(cpu.machine)), "-L", system, "-cpu", cpu.model)
    shutil.rmtree(kit / "outputs", ignore_errors=True)
    run_device_test(runner, kit, program, emulator=emulator)
    return kit / "outputs"
