"""C code: what it computes is what NumPy computes from the same bundle, in every value."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.models import convert
from support.registry import Surrounded, cases_and_schemes
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.ops import Case, OpRule
from custom_quantizer.reference import c_code, numpy_runner
from custom_quantizer.reference.c.memory import Span, place
from custom_quantizer.reference.c.ops import EMITTERS
from custom_quantizer.reference.c.text import integers
from custom_quantizer.reference.c_code import CCode, save_c

if shutil.which("gcc") is None:
    pytest.skip("needs gcc, to compile what is written", allow_module_level=True)

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion")
CHECKED = (*STRICT, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FAST = (*STRICT, "-O2")
KERNELS = Path(c_code.__file__).parent / "c"
GCC = ("gcc",)


class Everything(nn.Module):
    """A network that has every op of the format."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, (3, 2), stride=(2, 1), groups=8, dilation=(1, 2))
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=2, dilation=2, bias=False)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.signal = nn.Conv1d(6, 6, 3, stride=2, padding=1)
        self.slopes = nn.PReLU(6)
        self.query = nn.Linear(6, 5)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.max_pool2d(F.relu(self.stem(x.clamp(-50.0, 50.0))), 3, 2, 1)
        y = self.pointwise(self.grouped(F.hardswish(self.depthwise(y))))
        y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) * 1.25
        y = F.interpolate(
            F.interpolate(y, scale_factor=2.0, mode="bilinear"),
            y.shape[2:],
            mode="bilinear",
            align_corners=True,
        )
        z = self.up(y)
        s = self.slopes(self.signal(z.flatten(2)))
        q = self.query(s.transpose(1, 2))
        scores = q[:, 1:4] @ q.transpose(1, 2)[:, :, ::3]
        both = torch.cat([y, y - y[:, :1] * y], 1)[:, 2:10]
        wide = torch.maximum(
            F.pad(both, (1, 2, 0, 1)), torch.minimum(z[:, :1, :1, :1], z[:, 1:2, 2:3, 1:2])
        )
        picked = wide[:, :, 1].expand(3, -1, -1, -1).select(0, 1).clamp(-0.5, 1.5)
        return self.head(both.mean((2, 3))), scores, picked.reshape(picked.shape[0], -1), s + 0.5


@functools.cache
def everything(scheme: str) -> GraphModule:
    torch.manual_seed(0)
    model = Everything().eval()
    mixed = cq.IntegerQuantizer(backend=None).set_global(scheme)
    mixed.set_module_name("grouped", "a8w4").set_module_name("head", "a16w8")
    return convert(model, (torch.randn(2, 3, 13, 12),), mixed).graph


def compiled(
    folders: Sequence[Path],
    flags: Sequence[str],
    *,
    gcc: Sequence[str] = GCC,
    run: Sequence[str] = (),
    kernels: Path | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Compile and run the test of each network; the kernels are compiled once."""
    own = kernels or folders[0] / "kernels.o"
    if kernels is None:
        subprocess.run([*gcc, *flags, "-c", KERNELS / "cq_kernels.c", "-o", own], check=True)
    done = []
    for folder in folders:
        sources = [*folder.glob("net*.c")]
        built = subprocess.run(
            [*gcc, *flags, "-I", folder, *sources, own, "-o", folder / "test"],
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stderr
        command = [*run, str(folder / "test")]
        done.append(subprocess.run(command, capture_output=True, text=True))
    return done


@pytest.fixture(scope="module")
def checked_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("kernels") / "checked.o"
    subprocess.run([*GCC, *CHECKED, "-c", KERNELS / "cq_kernels.c", "-o", built], check=True)
    return built


def compared(code: CCode) -> int:
    """Number of values that the test of a network compares."""
    text = (code.folder / "net_test.c").read_text()
    return int(text.partition("How many of the ")[2].partition(" values")[0])


def assert_equal(done: subprocess.CompletedProcess[str], code: CCode) -> None:
    assert done.stdout == f"0 of {compared(code)} values differ\n", done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("scheme", slow_but(["a8w8"], ["a8w8", "a16w8"]))
def test_a_network_of_every_op_equals_numpy(
    scheme: str, tmp_path: Path, checked_kernels: Path
) -> None:
    """Under the sanitizers, so that no behaviour of it is undefined."""
    code = save_c(everything(scheme), tmp_path)
    (done,) = compiled([tmp_path], CHECKED, kernels=checked_kernels)
    assert_equal(done, code)
    assert compared(code) > 500


def test_the_network_of_every_op_has_every_op() -> None:
    description, _ = c_code.integers_of(everything("a8w8"))
    present = {op["op"] for op in description["ops"]}
    assert EMITTERS.keys() - present <= {"identity"}


def test_what_is_written_needs_no_float_and_no_library(tmp_path: Path) -> None:
    """``make test`` builds it optimized; the objects of the network call memcpy at most."""
    code = save_c(everything("a8w8"), tmp_path / "new", name="net")
    flags = " ".join((*FAST, "-mgeneral-regs-only" if _is_x86() else ""))
    make = ["make", "-s", "test", f"CFLAGS={flags}"]
    done = subprocess.run(make, cwd=code.folder, capture_output=True, text=True)
    assert_equal(done, code)
    objects = [code.folder / f"{name}.o" for name in ("net", "net_constants", "cq_kernels")]
    listed = subprocess.run(["nm", "-u", *objects], capture_output=True, text=True, check=True)
    undefined = {line.split()[-1] for line in listed.stdout.splitlines() if " U " in line}
    foreign = {name for name in undefined if not name.startswith(("net_", "cq_"))}
    # Compilers make calls of these from loops and assignments too.
    assert foreign <= {"memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}
    built = {*(path.name for path in objects), "net_test.o", "net_test"}
    assert {path.name for path in code.folder.iterdir()} == {*code.files, *built}


def _is_x86() -> bool:
    machine = subprocess.run(["gcc", "-dumpmachine"], capture_output=True, text=True, check=True)
    return machine.stdout.startswith("x86_64")


def test_the_test_that_is_written_notices_one_unit(tmp_path: Path) -> None:
    code = save_c(everything("a8w8"), tmp_path)
    test = tmp_path / "net_test.c"
    head, mark, values = test.read_text().partition("vector1_output2[")
    start = values.index("{") + 1
    end = values.index(",", start)
    changed = int(values[start:end]) + 1
    test.write_text(f"{head}{mark}{values[:start]} {changed}{values[end:]}")
    (done,) = compiled([tmp_path], FAST)
    assert done.returncode == 1
    assert done.stdout == f"1 of {compared(code)} values differ\n"


def test_inputs_of_ones_own_and_another_batch(tmp_path: Path, checked_kernels: Path) -> None:
    graph, image = everything("a8w8"), torch.randn(1, 3, 13, 12)
    with pytest.raises(
        cq.InputError, match=r"shape \[2, 3, 13, 12\], got \[1, 3, 13, 12\]; give batch=1"
    ):
        save_c(graph, tmp_path, inputs=(image,))
    code = save_c(graph, tmp_path, inputs=(image,), batch=1, vectors=1)
    (done,) = compiled([tmp_path], CHECKED, kernels=checked_kernels)
    assert_equal(done, code)
    bundle = numpy_runner.NumpyReference(*c_code.integers_of(graph))
    (stored,) = bundle.quantize(image.numpy()).values()
    test = (tmp_path / "net_test.c").read_text()
    assert integers(stored.reshape(-1)) in test
    header = (tmp_path / "net.h").read_text()
    assert "#define NET_INPUT0_SIZE 468" in header
    scale = float(bundle.tensors[bundle.description["inputs"][0]["tensors"][0]].scale)
    assert f"#define NET_INPUT0_SCALE {np.float32(scale)!s}f" in header


@pytest.mark.slow
def test_networks_share_the_kernels(tmp_path: Path) -> None:
    """Two networks in one firmware: only names with their prefix, one copy of the kernels."""
    first = save_c(everything("a8w8"), tmp_path / "a", name="netA", vectors=1)
    second = save_c(everything("a16w8"), tmp_path / "b", name="netB", vectors=1)
    main = tmp_path / "main.c"
    main.write_text(
        "long netA_test(void);\nlong netB_test(void);\n"
        "int main(void) { return netA_test() + netB_test() != 0; }\n"
    )
    sources = [*first.folder.glob("net*.c"), *second.folder.glob("net*.c"), main]
    kernels = [first.folder / "cq_kernels.c", "-I", first.folder, "-I", second.folder]
    command = [*GCC, "-DCQ_NO_MAIN", "-O1", *sources, *kernels, "-o", tmp_path / "both"]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "both"]).returncode == 0


# Memory ------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 6)),
        min_size=1,
        max_size=12,
    )
)
def test_parts_of_the_arena_that_are_in_use_at_once_do_not_meet(
    wanted: list[tuple[int, int, int]],
) -> None:
    spans = [Span(4 * size, start, start + length) for size, start, length in wanted]
    total = place(spans)
    for index, span in enumerate(spans):
        assert 0 <= span.offset <= total - span.size
        for other in spans[:index]:
            apart = (
                span.offset + span.size <= other.offset or other.offset + other.size <= span.offset
            )
            assert apart or span.end < other.start or other.end < span.start
    assert total <= sum(span.size for span in spans)


def test_memory_is_used_again(tmp_path: Path) -> None:
    """A chain of ten layers needs two activations at a time, and relus need none of their own."""
    layers = [part for _ in range(10) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish())]
    quantizer = cq.IntegerQuantizer(backend=None).set_global("a8w8")
    graph = convert(nn.Sequential(*layers), (torch.randn(1, 4, 8, 8),), quantizer).graph
    code = save_c(graph, tmp_path)
    assert code.arena_bytes == code.peak_bytes == 2 * 4 * 8 * 8
    assert f"#define NET_ARENA_BYTES {code.arena_bytes}" in (tmp_path / "net.h").read_text()


# Arithmetic --------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    try:
        shared = folder / "kernels.so"
        command = [*GCC, *FAST, "-shared", "-fPIC", KERNELS / "cq_kernels.c", "-o", shared]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(shared))
    finally:
        shutil.rmtree(folder)
    loaded.cq_requantize_one.argtypes = [ctypes.c_int64, *[ctypes.c_int32] * 3]
    loaded.cq_requantize_one.restype = ctypes.c_int32
    return loaded


MULTIPLIERS = st.one_of(st.sampled_from([0, 1, 2**30, 2**31 - 1]), st.integers(0, 2**31 - 1))


@given(st.integers(-(2**33), 2**33), MULTIPLIERS, st.integers(-31, 30))
@example(-(2**31), 2**31 - 1, 0)
@example(2**31 - 1, 2**31 - 1, 30)
@example(-3, 2**30, -1)
@example(3, 2**30, -1)
@example(2**31, 2**30, 0)
def test_two_roundings_are_those_of_numpy(x: int, multiplier: int, shift: int) -> None:
    expected = numpy_runner.multiply_int32(np.int64(x), np.int64(multiplier), np.int64(shift))
    assert library().cq_requantize_one(x, 0, multiplier, shift) == expected


@given(st.integers(-(2**47), 2**47 - 1), MULTIPLIERS, st.integers(-31, 7))
@example(-(2**47), 2**31 - 1, 7)
@example(-1, 2**30, -10)
def test_one_rounding_is_that_of_numpy(x: int, multiplier: int, shift: int) -> None:
    expected = numpy_runner.multiply_int64(np.array([x]), np.int64(multiplier), np.int64(shift))
    assert library().cq_requantize_one(x, 1, multiplier, shift) == expected[0]


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "2net"}, "must be a C identifier"),
        ({"name": "while"}, "must be a C identifier"),
        ({"name": "cq_net"}, "choose another"),
        ({"batch": 0}, "batch=0 must be a positive whole number"),
        ({"vectors": 0}, "vectors=0 must be a positive whole number"),
        ({"inputs": ()}, "takes 1 inputs"),
        ({"inputs": (torch.zeros(2, 3, 13, 11),)}, "has shape"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(cq.InputError, match=message):
        save_c(everything("a8w8"), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_ops_in_float_are_named(tmp_path: Path) -> None:
    graph = convert(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), (torch.randn(2, 4),)).graph
    with pytest.raises(cq.ConversionError, match="softmax"):
        save_c(graph, tmp_path)


def test_an_image_of_any_size_is_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    sizes = {2: torch.export.Dim("height", min=4, max=64)}
    graph = convert(model, (x,), "a8w8", dynamic_shapes=(sizes,)).graph
    with pytest.raises(cq.ConversionError, match="C code needs fixed sizes"):
        save_c(graph, tmp_path)


# Everything that is registered -------------------------------------------------------------------

NOT_EXPRESSED = {("div", "tensors"), ("div", "broadcast")}
FAMILIES: dict[str, list[tuple[OpRule, Case, str]]] = {}
for found in cases_and_schemes("a8w8", "a16w8", "a4w4", "a16w16", of_weights="a8w4"):
    rule, case, scheme = found.values
    if (rule.family, case.name) not in NOT_EXPRESSED:
        FAMILIES.setdefault(rule.family, []).append((rule, case, scheme))


def written(cases: Sequence[tuple[OpRule, Case, str]], folder: Path) -> list[CCode]:
    codes = []
    for index, (rule, case, scheme) in enumerate(cases):
        torch.manual_seed(0)
        inputs = tuple(torch.randn(shape) for shape in case.shapes)
        quantizer = cq.IntegerQuantizer(backend=None).set_global(scheme)
        graph = convert(Surrounded(rule, case), inputs, quantizer).graph
        codes.append(save_c(graph, folder / f"{index}_{case.name}_{scheme}", vectors=1))
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("flags", [CHECKED, FAST], ids=["checked", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_registered_op_equals_numpy(
    family: str, flags: Sequence[str], tmp_path: Path
) -> None:
    codes = written(FAMILIES[family], tmp_path)
    for code, done in zip(codes, compiled([c.folder for c in codes], flags), strict=True):
        assert_equal(done, code)


OTHER_MACHINES = {
    "32-bit ARM": ("arm-linux-gnueabihf-gcc", "qemu-arm-static"),
    "big-endian": ("s390x-linux-gnu-gcc", "qemu-s390x-static"),
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", OTHER_MACHINES)
def test_other_machines_compute_the_same(machine: str, tmp_path: Path) -> None:
    gcc, qemu = OTHER_MACHINES[machine]
    if missing := [tool for tool in (gcc, qemu) if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    cases = [case for family in FAMILIES.values() for case in family[::3]]
    codes = written(cases, tmp_path)
    codes += [save_c(everything(s), tmp_path / s) for s in ("a8w8", "a16w8")]
    folders = [code.folder for code in codes]
    flags = ("-std=c99", "-O2", "-static")
    for code, done in zip(codes, compiled(folders, flags, gcc=[gcc], run=[qemu]), strict=True):
        assert_equal(done, code)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4", "a16w8"])
def test_resnet20_on_a_hundred_images(scheme: str, tmp_path: Path) -> None:
    images, prepared_with = cifar10_test(100)[0], cifar10_calibration(100)[0]
    quantizer = cq.IntegerQuantizer(backend=None).set_global(scheme)
    graph = convert(resnet20(), (images,), quantizer, [(prepared_with,)]).graph
    code = save_c(graph, tmp_path, inputs=(images,), vectors=1)
    (done,) = compiled([tmp_path], FAST)
    assert_equal(done, code)
    assert compared(code) == 1000
