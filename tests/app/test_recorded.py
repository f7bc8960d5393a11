"""Statistics in a file stand for the data: the same program, or an error that says what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.flow import Small, small_images, small_model
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.app.recorded import read_calibration
from custom_quantizer.calibration.statistics import read_statistics, solved_qparams
from custom_quantizer.core.tensor_file import read_tensors, write_tensors

EXAMPLE = (small_images(4),)
DATA = small_images(32)


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "net.stats.safetensors"
    summary = cq.record_calibration(small_model(), EXAMPLE, DATA, path)
    assert (summary.samples, summary.batches) == (32, 8)
    return path


def quantized(data: object = None, model: nn.Module | None = None, **options: Any) -> Any:
    made = cq.quantize(
        small_model() if model is None else model,
        options.pop("example", EXAMPLE),
        data,
        progress=False,
        lower=options.pop("lower", False),
        **options,
    )
    return json.loads(made.to_json()), made


class ByName(nn.Module):
    """Takes one dictionary of images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.inner(batch["left"] - batch["right"])
        return out


def test_the_file_says_what_the_inputs_are_called(tmp_path: Path) -> None:
    """So that the command line can capture the model again, which has no data then."""
    data = [{"right": 0.5 * small_images(4, seed), "left": small_images(4)} for seed in range(2)]
    path = tmp_path / "net.stats.safetensors"
    model = ByName().eval()
    cq.record_calibration(model, data[0], data, path)
    recorded = read_calibration(path)
    assert isinstance(recorded.example, dict)
    assert torch.equal(recorded.example["left"], data[0]["left"])
    known, _ = quantized(None, model, example=recorded.example, statistics=recorded)
    assert known == quantized(data, model, example=data[0])[0]


def test_inputs_that_are_nested_or_given_twice_have_no_names(tmp_path: Path) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, pair: tuple[Tensor, Tensor], other: Tensor) -> Tensor:
            out: Tensor = self.inner(pair[0] - pair[1] * other)
            return out

    x, y = small_images(4), small_images(4, 2)
    for number, given in enumerate([{"pair": (x, y), "other": y}, {"other": x, "pair": (x, x)}]):
        path = tmp_path / f"{number}.stats.safetensors"
        cq.record_calibration(Pairs().eval(), given, [given], path)
        assert isinstance(read_calibration(path).example, tuple)
        known, _ = quantized(None, Pairs().eval(), example=given, statistics=path)
        assert known == quantized([given], Pairs().eval(), example=given)[0]


@pytest.mark.parametrize(
    ("config", "data", "accuracy"),
    [
        ("a8w8", None, None),
        pytest.param("a16w8", None, None, marks=pytest.mark.slow),
        pytest.param("a8w8-entropy", None, None, marks=pytest.mark.slow),
        ("a4w4-percentile99.9", None, "plain"),
        pytest.param("a4w4", DATA, None, marks=pytest.mark.slow),
        ("a8w4", DATA, "best"),
    ],
)
def test_what_is_made_of_the_file_is_what_is_made_of_the_data(
    stats: Path, config: str, data: Tensor | None, accuracy: str | None
) -> None:
    lower = config == "a8w8"
    asked: dict[str, Any] = {"config": config, "accuracy": accuracy, "lower": lower}
    direct, made = quantized(DATA, **asked)
    loaded, again = quantized(data, statistics=stats, **asked)
    for document in (direct, loaded):
        if "improvement" in document:
            document["improvement"].pop("seconds")
    assert loaded == direct
    assert again.calibration == made.calibration
    if lower:
        assert again.lowered.buffer == made.lowered.buffer
    for name, value in made.converted.state_dict().items():
        assert torch.equal(again.converted.state_dict()[name], value), name


def test_batches_that_vary_are_recorded_as_such(tmp_path: Path) -> None:
    path = tmp_path / "s"
    cq.record_calibration(small_model(), EXAMPLE, DATA.split(7), path, dynamic_batch=True)
    loaded, _ = quantized(statistics=path, dynamic_batch=True)
    assert loaded == quantized(DATA.split(7), dynamic_batch=True)[0]
    with pytest.raises(cq.InputError, match="was calibrated for batches up to 64; give the same"):
        quantized(statistics=path)


def test_python_reads_the_file_as_any_other(stats: Path, tmp_path: Path) -> None:
    graph = torch.export.export(small_model(), EXAMPLE).module()
    direct, loaded = (
        prepare_pt2e(graph_, cq.IntegerQuantizer().set_global("a8w8"))
        for graph_ in (graph, torch.export.export(small_model(), EXAMPLE).module())
    )
    cq.calibrate(direct, DATA)
    cq.load_statistics(loaded, stats)
    assert solved_qparams(loaded) == solved_qparams(direct)
    # What save_statistics makes of it says nothing of a model any more.
    cq.save_statistics(read_statistics(stats), tmp_path / "plain")
    with pytest.raises(cq.InputError, match=r"not of which model.*custom-quantizer calibrate"):
        quantized(statistics=tmp_path / "plain")


def test_equal_calibrations_give_equal_files(stats: Path, tmp_path: Path) -> None:
    cq.record_calibration(small_model(), EXAMPLE, DATA, tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == stats.read_bytes()


class Stopped(Exception):
    pass


def test_a_calibration_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def data(stop: bool) -> Iterator[Tensor]:
        yield from DATA[:20].split(4)
        if stop:
            raise Stopped
        yield from DATA[20:].split(4)

    cq.record_calibration(small_model(), EXAMPLE, DATA.split(4), tmp_path / "whole")
    kept: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every": 2}
    target = tmp_path / "s"
    with pytest.raises(Stopped):
        cq.record_calibration(small_model(), EXAMPLE, data(True), target, **kept)
    assert not target.exists()
    summary = cq.record_calibration(small_model(), EXAMPLE, data(False), target, **kept)
    assert (summary.samples, summary.resumed) == (32, 16)
    assert target.read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(cq.CalibrationError, match="begun with other data"):
        cq.record_calibration(small_model(), EXAMPLE, DATA + 1, target, **kept)


# -- refused ---------------------------------------------------------------------------------------


class Gelu(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(nn.functional.gelu(self.norm(self.conv(x))))
        y: Tensor = self.linear(torch.flatten(torch.relu(self.wide(x)), 1))
        return y


class Wider(Small):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.other


def with_state(kind: type[nn.Module]) -> nn.Module:
    model = kind().eval()
    model.load_state_dict(small_model().state_dict(), strict=False)
    return model


def other_bias() -> nn.Module:
    model = small_model()
    with torch.no_grad():
        # One unit in the last place of one number.
        bias = model.linear.bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    return model


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": other_bias()}, cq.CalibrationError, "other weights .*: linear.bias has other"),
        ({"model": with_state(Wider)}, cq.CalibrationError, "other is only in the model"),
        ({"model": with_state(Gelu)}, cq.CalibrationError, "has 'relu = .* this one has 'gelu = "),
        ({"example": (small_images(2),)}, cq.InputError, r"of float32 \[4, 1, 8, 8\], and the "),
        ({"example": (small_images(4).double(),)}, cq.InputError, "the example is float64"),
        ({"dynamic_batch": True}, cq.InputError, "was calibrated for a static batch"),
        ({"config": "a8w4"}, cq.InputError, "bias_correction needs samples: give calibration"),
        ({"config": "a8w8-moving_average"}, cq.CalibrationError, "another configuration: .*averag"),
    ],
)
def test_what_does_not_fit_is_named(
    stats: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        quantized(statistics=stats, **options)
    assert str(stats) in str(raised.value)


def test_tensors_that_were_not_observed_are_named(tmp_path: Path) -> None:
    some = cq.IntegerQuantizer().set_global("a8w8").set_module_name("linear", None)
    cq.record_calibration(small_model(), EXAMPLE, DATA, tmp_path / "s", config=some)
    with pytest.raises(cq.CalibrationError, match=r"1 of its 6 observed tensors.*: linear;"):
        quantized(statistics=tmp_path / "s")
    again = cq.IntegerQuantizer().set_global("a4w8-histogram").set_module_name("linear", None)
    quantized(statistics=tmp_path / "s", config=again, accuracy="plain")


def test_a_file_that_was_changed_is_refused(stats: Path, tmp_path: Path) -> None:
    tensors, metadata, _ = read_tensors(stats)
    cut = tmp_path / "cut"
    cut.write_bytes(stats.read_bytes()[:-9])
    naive = load_file(stats)
    naive["#call0.0"][0] += 1
    save_file(naive, tmp_path / "changed", metadata)
    write_tensors(
        tmp_path / "lacks", {k: v for k, v in tensors.items() if k != "#call1.0"}, metadata
    )
    text = tensors["#about"].numpy().tobytes().replace(b'"samples":32', b'"samples":-2')
    write_tensors(
        tmp_path / "lies",
        {**tensors, "#about": torch.frombuffer(bytearray(text), dtype=torch.uint8)},
        metadata,
    )
    for name, words in (
        ("cut", "no .safetensors file, or a broken one"),
        ("changed", "its SHA-256 does not fit"),
        ("lacks", "what it says of its model cannot be read"),
        ("lies", "what it says of its model cannot be read"),
    ):
        with pytest.raises(cq.InputError, match=words):
            read_calibration(tmp_path / name)


def test_inputs_that_are_no_tensors_are_not_recorded(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, factor: int) -> Tensor:
            y: Tensor = self.linear(x) * factor
            return y

    with pytest.raises(cq.InputError, match="input 1 is int"):
        cq.record_calibration(
            Scaled(), (torch.ones(1, 3), 2), [(torch.ones(1, 3), 2)], tmp_path / "s"
        )
    assert list(tmp_path.iterdir()) == []
