"""A device test: written, run by its own runner on this machine, read back, and damaged."""

from __future__ import annotations

import json
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from click.testing import CliRunner
from executorch.extension.pybindings import portable_lib
from support.device import HOST_RUNTIME, needs_compiler, run_device_test
from support.device_programs import MODES, DeviceProgram
from support.graphs import quantized
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.analysis.device_outputs import check_device_outputs
from custom_quantizer.app.cli import cli
from custom_quantizer.backends.xnnpack import device_test
from custom_quantizer.backends.xnnpack.checks import check_program
from custom_quantizer.core.file_hashes import sha256_of
from custom_quantizer.errors import InputError, VerificationError
from custom_quantizer.reference.device_manifest import (
    TensorEntry,
    read_manifest,
    tensor_bytes,
    tensor_from_bytes,
)


class TwoHeads(nn.Module):
    """Two inputs; an integer output of its own scale, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        image = self.stem(image) + other
        return image, self.head(image.mean((2, 3)))


SAMPLES = 3
SHAPES = ((1, 3, 6, 6), (1, 4, 6, 6))


def inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in SHAPES)


@cache
def two_heads() -> tuple[GraphModule, cq.LoweredProgram]:
    torch.manual_seed(0)
    graph = quantized(TwoHeads(), inputs(0), calibration=[inputs(1), inputs(2)])
    return graph, cq.lower(graph, inputs(0))


BATCHES = [inputs(seed) for seed in range(10, 10 + SAMPLES)]


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    _, lowered = two_heads()
    lowered.save(tmp_path / "net.pte")
    return lowered.save_device_test(tmp_path / "kit", BATCHES)


def compute(kit: Path, folder: str = "outputs") -> Path:
    """What a device that is right would write."""
    shutil.copytree(kit / "expected", kit / folder)
    return kit / folder


def verify(kit: Path, *options: str | Path) -> tuple[int, str]:
    program = kit.parent / "net.pte"
    result = CliRunner().invoke(
        cli, ["verify", str(program), "--device-outputs", *map(str, options or (kit,))]
    )
    return result.exit_code, result.output


# ---------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------


def test_files_hold_inputs_and_outputs_of_the_reference(kit: Path) -> None:
    graph, lowered = two_heads()
    manifest = read_manifest(kit)
    assert (kit / "program.pte").read_bytes() == lowered.buffer
    assert manifest.exact
    assert manifest.inexact == ()
    assert manifest.method == "forward"
    assert len(manifest.samples) == SAMPLES
    reference = cq.integer_reference(graph)
    for sample, batch in zip(manifest.samples, BATCHES, strict=True):
        for folder, entries, values in (
            ("inputs", sample.inputs, batch),
            ("expected", sample.outputs, reference(*batch)),
        ):
            for entry, value in zip(entries, values, strict=True):
                data = (kit / folder / entry.file).read_bytes()
                assert data == struct.pack(f"<{value.numel()}f", *value.flatten().tolist())
                assert entry.sha256 == sha256_of(data)
                assert entry.shape == tuple(value.shape)
                assert entry.dtype == "float32"
    shapes = (kit / "inputs" / "shapes.txt").read_text()
    assert shapes == "[1,3,6,6] [1,4,6,6]\n" * SAMPLES


def test_a_test_for_arm_expects_ties_to_be_rounded_up(tmp_path: Path) -> None:
    program = DeviceProgram("all pairs, with ties", "a8w8")
    kits = {machine: program.save(tmp_path / machine, machine) for machine in MODES}
    found = {machine: read_manifest(kit) for machine, kit in kits.items()}
    assert {machine: manifest.mode for machine, manifest in found.items()} == MODES
    here, there = (
        [
            tensor_from_bytes((kits[machine] / "expected" / entry.file).read_bytes(), entry, "")
            for entry in found[machine].samples[0].outputs
        ]
        for machine in ("x86_64", "aarch64")
    )
    scale = found["x86_64"].outputs[0].scale
    up = (there[0] - here[0]) / scale
    assert up.unique().tolist() == [0.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(here[1:], there[1:], strict=True))
    assert "mode `xnnpack-neon`" in (kits["aarch64"] / "README.md").read_text()
    shutil.copytree(kits["aarch64"] / "expected", kits["x86_64"] / "outputs")
    wrong = program.judge(kits["x86_64"]).wrong
    assert [line.split(" of ")[0] for line in wrong] == [f"sample 0, output 0: {int(up.sum())}"]


@pytest.mark.slow
def test_checks_expect_what_the_machine_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one, taken for another, is found to round differently."""
    program = DeviceProgram("all pairs, with ties", "a8w8")
    graph, batches = program.converted.graph, program.batches
    assert cq.verify(graph, program.lowered, batches).bit_exact
    other = "x86_64" if platform.machine() in ("aarch64", "arm64") else "arm64"
    monkeypatch.setattr(platform, "machine", lambda: other)
    assert cq.verify(graph, program.lowered, batches).outputs[0].max_lsb == 1
    with pytest.raises(cq.VerificationError, match="values differ from the integer reference"):
        check_program(program.lowered, program.lowered.graph, batches[0])


def test_a_mode_that_no_cpu_computes_is_refused(tmp_path: Path) -> None:
    _, lowered = two_heads()
    with pytest.raises(InputError, match=r"'exact': an XNNPACK program computes xnnpack or"):
        lowered.save_device_test(tmp_path / "kit", BATCHES, mode="exact")
    assert not (tmp_path / "kit").exists()


def test_every_file_is_known(kit: Path) -> None:
    manifest = read_manifest(kit)
    known = {"README.md", "manifest.json", "runner.cpp", "inputs/shapes.txt"}
    assert manifest.bundled is not None
    for entry in (manifest.program, manifest.bundled):
        known.add(entry.file)
        assert sha256_of((kit / entry.file).read_bytes()) == entry.sha256
    for sample in manifest.samples:
        known |= {f"inputs/{entry.file}" for entry in sample.inputs}
        known |= {f"expected/{entry.file}" for entry in sample.outputs}
    assert {str(p.relative_to(kit)) for p in kit.rglob("*") if p.is_file()} == known


def test_inputs_of_any_layout_are_written_contiguous(tmp_path: Path) -> None:
    _, lowered = two_heads()
    image, other = BATCHES[0]
    strange = (image.to(memory_format=torch.channels_last), other)
    kit = lowered.save_device_test(tmp_path / "kit", strange)
    manifest = read_manifest(kit)
    (sample,) = manifest.samples
    data = (kit / "inputs" / sample.inputs[0].file).read_bytes()
    assert data == struct.pack(f"<{image.numel()}f", *image.flatten().tolist())
    check_bundle((kit / "program.bpte").read_bytes(), manifest.method, 1)


def check_bundle(data: bytes, method: str, samples: int) -> None:
    """ExecuTorch's own check of each sample, without any tolerance; it raises."""
    bundle = portable_lib._load_bundled_program_from_buffer(data)
    for n in range(samples):
        bundle.verify_result_with_bundled_expected_output(method, n, 0.0, 0.0)


def test_the_bundled_program_passes_upstreams_check_without_tolerance(kit: Path) -> None:
    manifest = read_manifest(kit)
    assert manifest.bundled is not None
    check_bundle((kit / manifest.bundled.file).read_bytes(), manifest.method, SAMPLES)


def test_upstreams_check_finds_one_unit(kit: Path) -> None:
    graph, lowered = two_heads()
    expected = [value.clone() for value in cq.integer_reference(graph)(*BATCHES[0])]
    scale = read_manifest(kit).outputs[1].scale
    assert scale is not None
    expected[1][0, 4] += scale
    data, _ = device_test.bundled(lowered.buffer, "forward", [list(BATCHES[0])], [expected])
    assert data is not None
    with pytest.raises(RuntimeError, match="verif"):
        check_bundle(data, "forward", 1)


def test_numbers_have_no_bundled_program() -> None:
    _, lowered = two_heads()
    data, why = device_test.bundled(lowered.buffer, "forward", [list(BATCHES[0])], [[1]])
    assert data is None
    assert "Only tensor outputs" in why


# ---------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------


def build_as_told(kit: Path) -> Path:
    """Build the runner by the line of the README, with this machine's wheel unpacked already."""
    (kit / "wheel").mkdir()
    (kit / "wheel" / "executorch").symlink_to(HOST_RUNTIME)
    block = re.findall(r"```sh\n(.*?)```", (kit / "README.md").read_text(), re.DOTALL)[0]
    line = block[block.index("g++") :]
    subprocess.run(line, shell=True, cwd=kit, check=True)
    return kit / "runner"


@needs_compiler
def test_the_runner_computes_the_outputs_of_the_reference(kit: Path) -> None:
    runner = build_as_told(kit)
    run_device_test(runner, kit, "program.pte", runs=2)
    assert check_device_outputs(kit.parent / "net.pte", kit).bit_exact
    code, text = verify(kit)
    assert code == 0
    values = SAMPLES * 4 * 36
    assert f"output 0: 0 of {values} values differ" in text

    def refused(*arguments: str) -> str:
        done = subprocess.run([runner, *arguments], cwd=kit, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "usage" in refused()
    assert "method nothing cannot be loaded" in refused("program.pte", "inputs", "o", "nothing")
    assert "RUNS" in refused("program.pte", "inputs", "o", "forward", "0")
    short = kit / "inputs" / "1_0.bin"
    short.write_bytes(short.read_bytes()[:-4])
    assert "1_0.bin has 428 bytes, the program takes 432" in refused("program.pte", "inputs", "o")
    short.unlink()
    assert "cannot read inputs/1_0.bin" in refused("program.pte", "inputs", "o")
    shapes = kit / "inputs" / "shapes.txt"
    shapes.write_text("[1,3,6,6]\n")
    assert "sample 0 lacks inputs" in refused("program.pte", "inputs", "o")
    shapes.write_text("[1,3,6,6] [1,4,6,6] [1]\n")
    assert "sample 0 has too many inputs" in refused("program.pte", "inputs", "o")


# ---------------------------------------------------------------------------------------------
# Reading back
# ---------------------------------------------------------------------------------------------


def damage(kit: Path, name: str, at: int, units: int, output: int) -> None:
    """Move one element of an output by some units of its scale."""
    scale = read_manifest(kit).outputs[output].scale
    assert scale is not None
    path = kit / "outputs" / name
    data = bytearray(path.read_bytes())
    (value,) = struct.unpack_from("<f", data, 4 * at)
    struct.pack_into("<f", data, 4 * at, value + units * scale)
    path.write_bytes(data)


def test_one_unit_in_one_element_is_found(kit: Path) -> None:
    compute(kit)
    assert verify(kit)[0] == 0
    damage(kit, "1_1.bin", at=3, units=1, output=1)
    code, text = verify(kit)
    assert code == 1
    assert "bit-exact on the device: NO (3 samples)" in text
    assert f"output 0: 0 of {SAMPLES * 144} values differ" in text
    assert f"output 1: 1 of {SAMPLES * 5} values differ, by up to 1 units" in text
    assert "first in sample 1 at [0, 3]" in text
    damage(kit, "2_1.bin", at=0, units=-7, output=1)
    found = check_device_outputs(kit.parent / "net.pte", kit)
    assert [output.mismatches for output in found.outputs] == [0, 2]
    assert found.outputs[1].max_units == 7
    assert found.outputs[1].first is not None
    assert found.outputs[1].first.sample == 1
    document = json.loads(found.to_json())
    assert document["bit_exact"] is False
    assert document["outputs"][1]["first"]["at"] == [0, 3]


def test_a_value_that_is_no_number_differs(kit: Path) -> None:
    compute(kit)
    path = kit / "outputs" / "0_1.bin"
    path.write_bytes(struct.pack("<f", float("nan")) + path.read_bytes()[4:])
    found = check_device_outputs(kit.parent / "net.pte", kit)
    assert [output.mismatches for output in found.outputs] == [0, 1]
    assert json.loads(found.to_json())["outputs"][1]["max_abs"] > 1e38


def test_outputs_of_several_devices_lie_side_by_side(kit: Path) -> None:
    compute(kit, "outputs-phone")
    assert verify(kit, kit / "outputs-phone")[0] == 0
    assert "does not exist: run the program on the device" in verify(kit)[1]


def test_the_first_op_that_differs_is_named(tmp_path: Path) -> None:
    graph, lowered = two_heads()
    lowered.save(tmp_path / "net.pte")
    kit = lowered.save_device_test(tmp_path / "kit", BATCHES, name="taps", every_op=True)
    manifest = read_manifest(kit)
    nodes = [output.node for output in manifest.outputs]
    assert manifest.program.file == "taps.pte"
    assert len(nodes) == len(set(nodes)) > 4
    reference = cq.integer_reference(graph)
    _, integers = reference.with_integers(*BATCHES[0])
    assert set(nodes) <= set(integers)
    check_bundle((kit / "taps.bpte").read_bytes(), "forward", SAMPLES)
    compute(kit)
    assert verify(kit)[0] == 0
    late, early = len(nodes) - 1, nodes.index("relu")
    damage(kit, f"0_{late}.bin", at=0, units=1, output=late)
    damage(kit, f"2_{early}.bin", at=5, units=1, output=early)
    code, text = verify(kit)
    assert code == 1
    assert "first op that differs: relu (stem.1): 1 of 432 values differ, by up to 1 units" in text
    assert f"2 of {len(nodes)} quantized tensors differ" in text


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kit: (kit / "outputs" / "1_0.bin").unlink(), r"lacks 1 of 6 outputs \(1_0.bin\)"),
        (
            lambda kit: spoil(kit / "outputs" / "1_0.bin", lambda data: data[:-1]),
            r"1_0.bin has 575 bytes; float32 of shape \(1, 4, 6, 6\) takes 576",
        ),
        (
            lambda kit: (kit / "outputs" / "3_0.bin").write_bytes(b""),
            r"holds 3_0.bin, which this test does not have",
        ),
        (
            lambda kit: spoil(kit / "expected" / "2_1.bin", lambda data: data[:-1] + b"?"),
            r"expected/2_1.bin was changed after it was written",
        ),
        (lambda kit: (kit / "expected" / "2_1.bin").unlink(), r"2_1.bin: there is no such file"),
        (lambda kit: (kit / "manifest.json").unlink(), r"there is no manifest.json in"),
        (
            lambda kit: (kit / "manifest.json").write_text("{}"),
            r"not the manifest of a device test \(program: Field required\)",
        ),
        (
            lambda kit: spoil(kit.parent / "net.pte", lambda data: data + b"\0"),
            r"is a test of another program than",
        ),
        (
            lambda kit: spoil(
                kit / "manifest.json", lambda data: data.replace(b'"0_0.bin"', b'"../0_0.bin"')
            ),
            r"not the manifest of a device test",
        ),
        (
            lambda kit: spoil(
                kit / "manifest.json", lambda data: data.replace(b'"float32"', b'"float31"', 1)
            ),
            r"0_0.bin: no such dtype, or a negative size",
        ),
    ],
)
def test_what_is_not_of_the_test_is_refused(
    kit: Path, change: Callable[[Path], Any], message: str
) -> None:
    compute(kit)
    change(kit)
    with pytest.raises(InputError, match=message):
        check_device_outputs(kit.parent / "net.pte", kit)


def test_other_options_mean_nothing_next_to_a_device(kit: Path) -> None:
    compute(kit)
    code, text = verify(kit, kit, "--samples", "3")
    assert code == 2
    assert "--samples means nothing next to --device-outputs" in text
    code, text = verify(kit, kit, "--json")
    assert code == 0
    assert json.loads(text)["bit_exact"] is True
    assert "is not a directory" in verify(kit, kit / "nowhere")[1]


class NoneBeside(nn.Module):
    """An output that is ``None``, between two that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        y = self.head(x)
        return {"y": y, "nothing": None, "z": torch.relu(y)}


def test_outputs_that_are_none(tmp_path: Path) -> None:
    """Their file is empty, and one that is not is told."""
    x = torch.randn(2, 4)
    result = cq.quantize(NoneBeside().eval(), (x,), [x], progress=False)
    assert result.lowered is not None
    program = result.save(tmp_path / "net.pte").program
    assert program is not None
    kit = result.lowered.save_device_test(tmp_path / "kit", [(x,)])
    assert (kit / "expected" / "0_1.bin").read_bytes() == b""
    assert read_manifest(kit).bundled is None
    shutil.copytree(kit / "expected", kit / "outputs")
    checked = check_device_outputs(program, kit)
    assert checked.bit_exact
    assert [output.values for output in checked.outputs] == [10, 0, 10]
    (kit / "outputs" / "0_1.bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"0_1\.bin has 1 bytes"):
        check_device_outputs(program, kit)


# ---------------------------------------------------------------------------------------------
# What cannot be written
# ---------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_test_that_cannot_be_written(tmp_path: Path) -> None:
    _, lowered = two_heads()
    for given, options, message in (
        ([], {}, "no inputs to test on"),
        (BATCHES, {"name": "a/b"}, "is no name of a file"),
        ([(torch.zeros(1, 3, 6, 6),)], {}, "takes 2 inputs, got 1"),
        ([(torch.zeros(1, 3, 6, 7), torch.zeros(1, 4, 6, 6))], {}, r"input 0 must have shape"),
    ):
        with pytest.raises(InputError, match=message):
            lowered.save_device_test(tmp_path / "kit", given, **options)
        assert not (tmp_path / "kit").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "outputs").mkdir()
    with pytest.raises(InputError, match="exists and is not an empty directory"):
        lowered.save_device_test(tmp_path / "full", BATCHES)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_program_that_is_wrong_here_goes_to_no_device(tmp_path: Path) -> None:
    _, lowered = two_heads()
    torch.manual_seed(1)
    other = cq.lower(quantized(TwoHeads(), inputs(0), calibration=[inputs(1)]), inputs(0))
    with pytest.raises(VerificationError, match="output 0 of sample 0 differs"):
        lowered.with_bytes(other.buffer).save_device_test(tmp_path / "kit", BATCHES)
    assert not (tmp_path / "kit").exists()


def test_numbers_and_dtypes_are_raw_bytes() -> None:
    for value, data, dtype in (
        (True, b"\1", "bool"),
        (-2, struct.pack("<q", -2), "int64"),
        (0.1, struct.pack("<d", 0.1), "float64"),
        (torch.tensor([[1, 2]], dtype=torch.int16), b"\1\0\2\0", "int16"),
        (torch.arange(6).view(2, 3).t(), struct.pack("<6q", 0, 3, 1, 4, 2, 5), "int64"),
    ):
        got, name, shape = tensor_bytes(value)
        assert (got, name) == (data, dtype)
        entry = TensorEntry(file="x", sha256="0" * 64, dtype=name, shape=shape)
        back = tensor_from_bytes(got, entry, "x")
        assert back.tolist() == (value.tolist() if isinstance(value, Tensor) else value)
        assert back.shape == shape
    with pytest.raises(InputError, match=r"not torch\.complex64"):
        tensor_bytes(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(InputError, match="not a str"):
        tensor_bytes("x")


def test_the_readme_names_the_files_of_its_folder(kit: Path) -> None:
    text = (kit / "README.md").read_text()
    assert "$" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in ("program.pte", "program.bpte", "runner.cpp", "manifest.json", "inputs/shapes.txt"):
        assert name in text
    assert "Every output has to be equal, bit for bit" in text
    assert f"executorch=={version('executorch').partition('+')[0]}\n" in text


def test_the_outputs_of_dicts_are_flat(tmp_path: Path) -> None:
    class Named(TwoHeads):
        def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            maps, scores = super().forward(image, other)
            return {"scores": scores, "maps": maps}

    torch.manual_seed(0)
    graph = quantized(Named(), inputs(0), calibration=[inputs(1)])
    kit = cq.lower(graph, inputs(0)).save_device_test(tmp_path / "kit", BATCHES[0])
    (sample,) = read_manifest(kit).samples
    want = pytree.tree_leaves(cq.integer_reference(graph)(*BATCHES[0]))
    assert [entry.shape for entry in sample.outputs] == [tuple(value.shape) for value in want]
