"""Files from strangers: refused in our words, within seconds and in bounded memory, or read."""

from __future__ import annotations

import io
import json
import os
import resource
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.bundles import signed
from support.mutations import mutated_bytes, mutated_json
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.app import data, tensor_files
from custom_quantizer.app.data import load_data
from custom_quantizer.app.models import load_weights
from custom_quantizer.calibration.checkpoint import Checkpoint, Position
from custom_quantizer.calibration.convergence import RangeConvergence, observed_tensors
from custom_quantizer.calibration.statistics import (
    read_statistics,
    record_counts,
    save_statistics,
    statistics_of,
)
from custom_quantizer.config.file import load_config
from custom_quantizer.config.rules import Config
from custom_quantizer.reference.bundle import load_integers, save_integers

SECONDS = 5.0
GIGABYTES = 3.0


class Network(nn.Module):
    """Every kind of window, a table, a residual, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        y = torch.max_pool2d(y, 2) + torch.nn.functional.avg_pool2d(y, 3, 2, 1)
        y = torch.sigmoid(self.up(y)) * y[:, :, :1, :1]
        return self.linear(y[:, :, 1:].mean((2, 3)))


def image(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@cache
def prepared() -> GraphModule:
    """Calibrated, with counts."""
    torch.manual_seed(0)
    captured = torch.export.export(Network().eval(), (image(),)).module()
    model = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    record_counts(model)
    model(image())
    return model


@cache
def bundle(folder: Path) -> tuple[bytes, bytes]:
    """Description and weights."""
    torch.manual_seed(0)
    captured = torch.export.export(Network().eval(), (image(),)).module()
    model = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    model(image())
    save_integers(convert_pt2e(model), folder / "saved")
    return (folder / "saved.json").read_bytes(), (folder / "saved.safetensors").read_bytes()


CONFIG = {
    "version": 1,
    "global": "a8w8",
    "inputs": {"*": "a16"},
    "outputs": "a8",
    "rules": [
        {"module_name": "layer1.*", "scheme": {"activations": 8, "weights": 4, "bias": 16}},
        {"operator_type": "aten.linear.default", "scheme": None},
        {"node_name": "conv2d", "scheme": "a8w8-per_tensor-percentile99.9"},
    ],
}


# Each writes a file, damaged by the seed, and reads it; raises what the reader raises. Returns
# whether what was read is as it was; None where a file cannot tell.


def bundle_bytes(folder: Path, seed: int | None) -> bool | None:
    description, weights = bundle(folder)
    changed = mutated_bytes(description, seed)
    (folder / "net.json").write_bytes(changed)
    (folder / "net.safetensors").write_bytes(weights)
    load_integers(folder / "net")
    return changed == description


def bundle_weights(folder: Path, seed: int | None) -> bool | None:
    description, weights = bundle(folder)
    changed = mutated_bytes(weights, seed)
    (folder / "net.json").write_bytes(description)
    (folder / "net.safetensors").write_bytes(changed)
    load_integers(folder / "net")
    return changed == weights


def bundle_json(folder: Path, seed: int | None) -> bool | None:
    """Signed again: what is left may be another network, but one that runs."""
    description, weights = bundle(folder)
    (folder / "net.json").write_bytes(signed(mutated_json(json.loads(description), seed)))
    (folder / "net.safetensors").write_bytes(weights)
    reference = load_integers(folder / "net")
    _, integers = reference.with_integers(image().numpy())
    for name, values in integers.items():  # every value is one of its tensor
        info = reference.tensors[name]
        assert values.dtype == info.dtype
        assert info.quant_min <= values.min() <= values.max() <= info.quant_max
        assert values.shape == info.shape
    return None


def bundle_json_unsigned(folder: Path, seed: int | None) -> bool | None:
    description, weights = bundle(folder)
    document = json.loads(description)
    changed = mutated_json(document, seed)
    text = description if seed is None else json.dumps(changed).encode()
    (folder / "net.json").write_bytes(text)
    (folder / "net.safetensors").write_bytes(weights)
    load_integers(folder / "net")
    return changed == document


@cache
def saved_statistics(folder: Path) -> bytes:
    save_statistics(prepared(), folder / "saved_statistics")
    return (folder / "saved_statistics").read_bytes()


def statistics(folder: Path, seed: int | None) -> bool | None:
    file = folder / "s.safetensors"
    file.write_bytes(mutated_bytes(saved_statistics(folder), seed))
    return read_statistics(file) == statistics_of(prepared())


def checkpoint(folder: Path, seed: int | None) -> bool | None:
    file = folder / "c.safetensors"
    convergence = RangeConvergence(observed_tensors(prepared()))
    reader = Checkpoint(file, prepared())
    if not file.exists():
        reader.check_data([image()])
        reader.save(Position(4, 2), convergence)
        (folder / "saved_checkpoint").write_bytes(file.read_bytes())
    before = {name: value.clone() for name, value in prepared().state_dict().items()}
    file.write_bytes(mutated_bytes((folder / "saved_checkpoint").read_bytes(), seed))
    try:
        position = reader.resume(convergence)
    finally:  # a refused file changes nothing
        after = prepared().state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    return position == Position(4, 2)


def config_yaml(folder: Path, seed: int | None) -> bool | None:
    file = folder / "c.yaml"
    file.write_bytes(mutated_bytes(yaml.safe_dump(CONFIG, sort_keys=False).encode(), seed))
    assert isinstance(load_config(file), Config)
    return None


def config_json_bytes(folder: Path, seed: int | None) -> bool | None:
    file = folder / "c.json"
    file.write_bytes(mutated_bytes(json.dumps(CONFIG, indent=2).encode(), seed))
    assert isinstance(load_config(file), Config)
    return None


def config_json(folder: Path, seed: int | None) -> bool | None:
    file = folder / "c.json"
    file.write_text(json.dumps(mutated_json(CONFIG, seed)))
    assert isinstance(load_config(file), Config)
    return None


def read_all(path: Path) -> None:
    for batch in load_data(path, batch_size=2):
        assert all(isinstance(tensor, Tensor) for tensor in batch.inputs)


Reader: TypeAlias = "Callable[[Path, int | None], bool | None]"


def data_file(suffix: str, write: Callable[[io.BytesIO], Any]) -> Reader:
    buffer = io.BytesIO()
    write(buffer)

    def make(folder: Path, seed: int | None) -> None:
        file = folder / f"d{suffix}"
        file.write_bytes(mutated_bytes(buffer.getvalue(), seed))
        read_all(file)

    return make


def image_file(suffix: str, **options: Any) -> Reader:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix, **options)

    def make(folder: Path, seed: int | None) -> None:
        (folder / suffix).mkdir(exist_ok=True)
        (folder / suffix / f"a.{suffix}").write_bytes(mutated_bytes(buffer.getvalue(), seed))
        read_all(folder / suffix)

    return make


def image_archive(folder: Path, seed: int | None) -> None:
    buffer, png = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(png, "png")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), png.getvalue())
    (folder / "a.zip").write_bytes(mutated_bytes(buffer.getvalue(), seed))
    read_all(folder / "a.zip")


ARRAYS = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)
TENSORS = {"images": torch.from_numpy(ARRAYS), "labels": torch.arange(4)}

READERS: dict[str, Reader] = {
    "bundle_bytes": bundle_bytes,
    "bundle_json": bundle_json,
    "bundle_json_unsigned": bundle_json_unsigned,
    "bundle_weights": bundle_weights,
    "statistics": statistics,
    "checkpoint": checkpoint,
    "config_yaml": config_yaml,
    "config_json_bytes": config_json_bytes,
    "config_json": config_json,
    "npy": data_file(".npy", lambda file: np.save(file, ARRAYS)),
    "npz": data_file(".npz", lambda file: np.savez_compressed(file, images=ARRAYS)),
    "pt": data_file(".pt", lambda file: torch.save(TENSORS, file)),
    "png": image_file("png"),
    "jpeg": image_file("jpeg"),
    "bmp": image_file("bmp"),
    "tiff": image_file("tiff"),
    "webp": image_file("webp"),
    "archive": image_archive,
}


def fuzz(name: str, folder: Path, seeds: range) -> int:
    """Read as many damaged files as there are seeds.

    Returns:
        How many could be read.
    """
    assert READERS[name](folder, None) is not False  # undamaged
    read = 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        begin = time.perf_counter()
        try:
            same = READERS[name](folder, seed)
        except cq.CustomQuantizerError as error:
            if not str(error).replace("\n", "").isprintable():
                raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        else:
            assert same is not False, f"{name}, seed {seed}: read, but not as it was"
            read += 1
        seconds = time.perf_counter() - begin
        assert seconds < SECONDS, f"{name}, seed {seed}: {seconds:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    assert grown < GIGABYTES, f"{name}: {grown:.1f} GiB"
    return read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_some_damaged_files_are_refused_or_read(name: str, folder: Path) -> None:
    fuzz(name, folder, range(40))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_damaged_files_are_refused_or_read(name: str, folder: Path) -> None:
    fuzz(name, folder, range(1000, 2000))


# What is no file, or far too large ---------------------------------------------------------------


def _checkpoint_at(path: Path) -> None:
    Checkpoint(path, prepared()).resume(RangeConvergence(observed_tensors(prepared())))


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bundle": ("json", load_integers),
    "statistics": ("safetensors", read_statistics),
    "checkpoint": ("safetensors", _checkpoint_at),
    "config": ("yaml", load_config),
    "npy": ("npy", load_data),
    "npz": ("npz", load_data),
    "pt": ("pt", load_data),
    "safetensors": ("safetensors", load_data),
    "archive": ("zip", load_data),
    "weights": ("pt", lambda path: load_weights(Network(), path)),
    "image": ("png", lambda path: read_all(path.parent)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "terabyte"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_a_bounded_size_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    suffix, read = FILES[name]
    path = tmp_path / f"x.{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    begin = time.perf_counter()
    with pytest.raises(cq.InputError, match=str(tmp_path)):
        read(path)
    assert time.perf_counter() - begin < SECONDS


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".zip.pt"])
def test_what_takes_more_than_half_of_the_memory_unpacked(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"d{suffix}"
    zeros = np.zeros((10, 3, 1000, 1000), np.uint8)
    np.savez_compressed(tmp_path / "d.npz", images=zeros)
    (tmp_path / "d.npz").rename(file)
    assert file.stat().st_size < 100_000
    monkeypatch.setattr(tensor_files, "memory_limit", lambda: 29_999_999)
    with pytest.raises(cq.InputError, match=r"30,000,\d+ bytes unpacked, more than half"):
        load_data(file)
    monkeypatch.setattr(tensor_files, "memory_limit", lambda: 30_001_000)
    if suffix == ".npz":
        assert load_data(file).num_examples == 10


@pytest.mark.parametrize("shape", ["(1000000, 3, 1000, 1000)", "(-1, -1, 3, 4)", "(2, 3, 4, 4)"])
def test_an_array_that_is_not_as_long_as_its_header_says(shape: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.ljust(117) + "\n"
    buffer.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"abc")
    (tmp_path / "d.npy").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue())
    for name in ("d.npy", "d.npz"):
        with pytest.raises(cq.InputError, match=rf"{name}: It(s header promises| ends before)"):
            load_data(tmp_path / name)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "|u1", "<i8"])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, order: Any, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4, 1)[..., 0].astype(dtype, order=order)
    np.save(tmp_path / "d.npy", array)
    np.savez(tmp_path / "d.npz", inputs=array)
    for name in ("d.npy", "d.npz"):
        content = tensor_files.read_tensor_file(
            tmp_path / name, "data", frozenset({".npy", ".npz"})
        )
        tensor = content["inputs"] if isinstance(content, dict) else content
        np.testing.assert_array_equal(tensor.numpy(), np.load(tmp_path / "d.npy"))


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    begin = time.perf_counter()
    with pytest.raises(cq.InputError, match=r"a\.png: It has 13,000x13,000 pixels, and at most"):
        read_all(tmp_path)
    assert time.perf_counter() - begin < SECONDS


def test_a_batch_of_images_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(data, "memory_limit", lambda: 2 * 3 * 100 * 100 * 9)
    read_all(tmp_path)
    monkeypatch.setattr(data, "memory_limit", lambda: 2 * 3 * 100 * 100 * 9 - 1)
    with pytest.raises(cq.InputError, match="a batch of 2 images of 100x100 pixels takes 540,000"):
        read_all(tmp_path)


def test_postscript_under_the_name_of_an_image_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(cq.InputError, match="no image of a kind that is read"):
        read_all(tmp_path)


def test_entries_of_statistics_are_counted_before_they_take_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_statistics(prepared(), tmp_path / "s")
    monkeypatch.setattr("custom_quantizer.calibration.statistics.MOST_COUNTED", 3)
    with pytest.raises(cq.InputError, match="entries with counts, and at most 3 are read"):
        read_statistics(tmp_path / "s")


RULE = "- {module_name: a.%d.b, scheme: a8w8}\n"
CONFIGS: dict[str, tuple[str, str]] = {
    "many_rules.yaml": (
        "version: 1\nrules:\n" + "".join(RULE % i for i in range(80_000)),
        "3,268,908 bytes, and at most 262,144",
    ),
    "long.yaml": ("version: 1\nglobal: " + "a" * 50_000_000, "50,000,019 bytes, and at most"),
    "longer_than_a_name.yaml": ("version: 1\nglobal: " + "a" * 1001, "1,001 characters, and at"),
    "unknown_keys.yaml": (
        "version: 1\n" + "".join(f"k{i}: 1\n" for i in range(4_000)),
        "4000 mistakes",
    ),
    "inputs.yaml": (
        "version: 1\ninputs:\n" + "".join(f" k{i}: a8\n" for i in range(4_000)),
        "inputs: at most 1,000 entries are read",
    ),
    "deep.yaml": ("version: 1\nrules: " + "[" * 100_000, "nested too deeply"),
    "deep.json": ('{"version": 1, "rules": ' + "[" * 100_000, "nested too deeply"),
    "digits.json": ('{"version": ' + "1" * 5000 + "}", "a number in it has thousands of digits"),
    "bool.yaml": ("version: !!bool maybe", "maybe is not a legal bool"),
    "int.yaml": ("version: !!int ''", "is not a legal int"),
    "timestamp.yaml": ("version: !!timestamp abc", "abc is not a legal timestamp"),
    "code.yaml": ("version: !!python/object/apply:os.getcwd []", "version: must be the number 1"),
    "laughs.yaml": (
        "version: 1\nrules: &a0 [x]\n"
        + "".join(f"inputs{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20)),
        "unknown key",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_ask_for_too_much(name: str, tmp_path: Path) -> None:
    text, message = CONFIGS[name]
    (tmp_path / name).write_text(text)
    begin = time.perf_counter()
    with pytest.raises((cq.ConfigError, cq.InputError), match=message):
        load_config(tmp_path / name)
    # Of 256 KB the pure Python parser of PyYAML takes most.
    assert time.perf_counter() - begin < 3 * SECONDS
