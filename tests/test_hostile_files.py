"""Files from strangers: refused in our words, within seconds and in bounded memory, or read."""

from __future__ import annotations

import io
import json
import resource
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
from custom_quantizer._checkpoint import Checkpoint, Position
from custom_quantizer._settling import Settling, observed_tensors
from custom_quantizer.config import Config
from custom_quantizer.config_file import load_config
from custom_quantizer.integer.bundle import load_integers, save_integers
from custom_quantizer.sources import load_data
from custom_quantizer.statistics import read_statistics, record_counts, save_statistics

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
        y = torch.sigmoid(self.up(y)) * y.repeat_interleave(2, -1).repeat_interleave(2, -2)
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


@dataclass
class Target:
    """A kind of file and what to do with it.

    Attributes:
        make: writes the file with the number ``seed`` into a folder, and reads it; raises what the
            reader raises. Returns whether what was read is as it was before.
    """

    make: Callable[[Path, int], bool | None]


def bundle_bytes(folder: Path, seed: int) -> bool | None:
    description, weights = bundle(folder)
    changed = mutated_bytes(description, seed)
    (folder / "net.json").write_bytes(changed)
    (folder / "net.safetensors").write_bytes(weights)
    load_integers(folder / "net")
    return changed == description


def bundle_weights(folder: Path, seed: int) -> bool | None:
    description, weights = bundle(folder)
    changed = mutated_bytes(weights, seed)
    (folder / "net.json").write_bytes(description)
    (folder / "net.safetensors").write_bytes(changed)
    load_integers(folder / "net")
    return changed == weights


def bundle_json(folder: Path, seed: int) -> bool | None:
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


def bundle_json_unsigned(folder: Path, seed: int) -> bool | None:
    description, weights = bundle(folder)
    document = json.loads(description)
    changed = mutated_json(document, seed)
    (folder / "net.json").write_text(json.dumps(changed))
    (folder / "net.safetensors").write_bytes(weights)
    load_integers(folder / "net")
    return False


def statistics(folder: Path, seed: int) -> bool | None:
    file = folder / "s.safetensors"
    save_statistics(prepared(), file)
    before = read_statistics(file)
    file.write_bytes(mutated_bytes(file.read_bytes(), seed))
    return read_statistics(file) == before


def checkpoint(folder: Path, seed: int) -> bool | None:
    file = folder / "c.safetensors"
    settling = Settling(observed_tensors(prepared()))
    written = Checkpoint(file, prepared())
    written.check_data([image()])
    written.save(Position(4, 2), settling)
    before = {name: value.clone() for name, value in prepared().state_dict().items()}
    file.write_bytes(mutated_bytes(file.read_bytes(), seed))
    try:
        position = Checkpoint(file, prepared()).resume(settling)
    finally:  # a refused file changes nothing
        after = prepared().state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    return position == Position(4, 2)


def config_yaml(folder: Path, seed: int) -> bool | None:
    file = folder / "c.yaml"
    file.write_bytes(mutated_bytes(yaml.safe_dump(CONFIG, sort_keys=False).encode(), seed))
    assert isinstance(load_config(file), Config)
    return None


def config_json_bytes(folder: Path, seed: int) -> bool | None:
    file = folder / "c.json"
    file.write_bytes(mutated_bytes(json.dumps(CONFIG, indent=2).encode(), seed))
    assert isinstance(load_config(file), Config)
    return None


def config_json(folder: Path, seed: int) -> bool | None:
    file = folder / "c.json"
    file.write_text(json.dumps(mutated_json(CONFIG, seed)))
    assert isinstance(load_config(file), Config)
    return None


def read_all(path: Path) -> None:
    for batch in load_data(path, batch_size=2):
        assert all(isinstance(tensor, Tensor) for tensor in batch.inputs)


def data_file(suffix: str, write: Callable[[io.BytesIO], Any]) -> Callable[[Path, int], None]:
    buffer = io.BytesIO()
    write(buffer)

    def make(folder: Path, seed: int) -> None:
        file = folder / f"d{suffix}"
        file.write_bytes(mutated_bytes(buffer.getvalue(), seed))
        read_all(file)

    return make


def image_file(suffix: str, **options: Any) -> Callable[[Path, int], None]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix, **options)

    def make(folder: Path, seed: int) -> None:
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"a.{suffix}").write_bytes(mutated_bytes(buffer.getvalue(), seed))
        read_all(folder / "images")

    return make


def image_archive(folder: Path, seed: int) -> None:
    buffer, png = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(png, "png")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), png.getvalue())
    (folder / "a.zip").write_bytes(mutated_bytes(buffer.getvalue(), seed))
    read_all(folder / "a.zip")


ARRAYS = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)
TENSORS = {"images": torch.from_numpy(ARRAYS), "labels": torch.arange(4)}

READERS: dict[str, Callable[[Path, int], bool | None]] = {
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
