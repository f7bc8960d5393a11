"""Programs on CPUs of other kinds, emulated by QEMU: the integers of the reference, bit for bit.

Needs QEMU's user emulation, g++ for aarch64 and ExecuTorch's wheel for aarch64, which is downloaded
to the folder that ``CUSTOM_QUANTIZER_ARM_CACHE`` names::

    apt-get install qemu-user-static g++-aarch64-linux-gnu
    CUSTOM_QUANTIZER_ARM_CACHE=/some/folder python -m pytest -m slow tests/backends/test_arm.py
"""

from __future__ import annotations

import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from support.device import CPUS, Cpu, missing, run_on
from support.device_programs import MODES, PROGRAMS, DeviceProgram
from support.models import convert
from support.run_time import Layers, inputs_of

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import run_time
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.device_manifest import read_manifest, tensor_from_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@cache
def lowered(name: str, scheme: str) -> DeviceProgram:
    return DeviceProgram(name, scheme)


@cache
def written(folder: Path, name: str, scheme: str, machine: str) -> Path:
    return lowered(name, scheme).save(folder / f"{name} {scheme} {machine}", machine)


@pytest.mark.parametrize(("name", "scheme"), PROGRAMS, ids=str)
@pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: cpu.name)
def test_a_program_computes_the_integers_of_the_reference(
    folder: Path, cpu: Cpu, name: str, scheme: str
) -> None:
    if why := missing(cpu):
        pytest.skip(why)
    kit = written(folder, name, scheme, cpu.machine)
    run_on(cpu, kit, "program.pte", folder)
    judged = lowered(name, scheme).judge(kit)
    assert judged.wrong == ()
    assert not judged.exact or judged.different == 0


@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4", "dyn8w4g32"])
@pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: cpu.name)
def test_layers_quantized_at_run_time(
    tmp_path_factory: pytest.TempPathFactory, cpu: Cpu, scheme: str
) -> None:
    """Equal on CPUs whose kernels fuse the last product and the bias, within the bound on all."""
    if why := missing(cpu):
        pytest.skip(why)
    torch.manual_seed(0)
    model = Layers(grouped="g" in scheme)
    graph = convert(model, inputs_of(model, 11, 0), scheme).graph
    inputs = inputs_of(model, 11, 1)
    kit = tmp_path_factory.mktemp("layers") / "kit"
    program = cq.lower(graph, inputs)
    program.save_device_test(kit, [inputs], mode=MODES[cpu.machine])
    run_on(cpu, kit, "program.pte", kit.parent)
    manifest = read_manifest(kit)
    assert not manifest.exact
    layers = [op.run_time for op in read_converted(graph).floating if op.run_time is not None]
    want = cq.integer_reference(graph)(*inputs)
    entries = manifest.samples[0].outputs
    for layer, x, mine, entry in zip(layers, inputs, want, entries, strict=True):
        data = (kit / "outputs" / entry.file).read_bytes()
        got = tensor_from_bytes(data, entry, entry.file)
        off = (got.double() - mine.double()).abs()
        assert bool((off <= run_time.error(layer, x)).all()), layer.match.node
        if cpu.kernels in ("AVX2", "NEON", "NEON, SVE") and not layer.is_grouped:
            assert torch.equal(got, mine), layer.match.node


def test_one_unit_is_too_much_for_integers_and_two_for_emulated_ops(folder: Path) -> None:
    for scheme, allowed in (("a8w8", 0), ("a16w8", 1)):
        program = lowered("elementwise", scheme)
        kit = written(folder, "elementwise", scheme, "x86_64")
        manifest = read_manifest(kit)
        for units in (allowed, allowed + 1):
            shutil.rmtree(kit / "outputs", ignore_errors=True)
            shutil.copytree(kit / "expected", kit / "outputs")
            path = kit / "outputs" / manifest.samples[1].outputs[-1].file
            scale = manifest.outputs[-1].scale
            assert scale is not None
            data = bytearray(path.read_bytes())
            (value,) = struct.unpack_from("<f", data, 8)
            struct.pack_into("<f", data, 8, value + units * scale)
            path.write_bytes(data)
            wrong = program.judge(kit).wrong
            assert [line.split(",")[0] for line in wrong] == ["sample 1"] * (units > allowed)
