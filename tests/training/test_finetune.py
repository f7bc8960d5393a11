"""The loop that fine-tunes: its schedule, its checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.training import (
    captured,
    images,
    made,
    prepared_for,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.core.graph import is_quantize, qparams_of
from custom_quantizer.errors import (
    CalibrationError,
    InputError,
    TrainingError,
)
from custom_quantizer.ops.rewrites.training_graph import training_mode_of
from custom_quantizer.training import qat
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
)


def task(count: int = 96) -> tuple[Tensor, Tensor]:
    x = images(count, seed=11)
    x[:, 0] += torch.arange(count).remainder(4).sub(1.5).reshape(-1, 1, 1)
    return x, torch.arange(count).remainder(4)


def loader(shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*task()), batch_size=16, shuffle=shuffle)


@pytest.mark.slow
def test_finetune_learns() -> None:
    prepared = prepared_for("a8w8")
    seen: list[qat.EpochMetrics] = []
    summary = qat.finetune(
        prepared,
        loader(),
        epochs=8,
        recipe=qat.Recipe(learning_rate=0.05),
        validation=loader(shuffle=False),
        on_epoch=seen.append,
    )
    assert tuple(seen) == summary.epochs
    assert summary.steps == 48
    assert cast(float, summary.epochs[-1].validation_accuracy) > 0.9
    assert summary.epochs[-1].loss < 0.9 * summary.epochs[0].loss
    assert "validation loss" in str(summary)
    x, labels = task()
    converted = convert_pt2e(prepared)
    accuracy = float((converted(x).argmax(1) == labels).float().mean())
    assert accuracy == summary.epochs[-1].validation_accuracy


class Flat(nn.Sequential):
    """One layer."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 4))


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples() -> None:
    """Of batches of unequal sizes; in training and in validation."""
    seen: list[tuple[float, int]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, labels) * len(labels)  # far from equal
        seen.append((float(value.detach()), len(labels)))
        return value

    x, labels = task(40)
    batches = [(x[:32], labels[:32]), (x[32:], labels[32:])]
    (metrics,) = qat.finetune(
        prepared_for(build=Flat), batches, epochs=1, loss=loss, validation=batches
    ).epochs
    means = [
        sum(value * size for value, size in part) / sum(size for _, size in part)
        for part in (seen[:2], seen[2:])
    ]
    assert [size for _, size in seen] == [32, 8, 32, 8]
    assert [metrics.loss, metrics.validation_loss] == means


@pytest.mark.parametrize(("warmup", "rise"), [(0.0, [1.0] * 6), (0.5, [1 / 3, 2 / 3, 1, 1, 1, 1])])
def test_the_learning_rate_falls_along_a_cosine(
    warmup: float, rise: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the full rate, at the first of 6 steps, towards 0, which would be at a seventh."""
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Recording)
    recipe = qat.Recipe(learning_rate=0.01, warmup=warmup)
    summary = qat.finetune(prepared_for(build=Flat), loader(), epochs=1, recipe=recipe)
    wanted = [0.005 * (1 + math.cos(math.pi * i / 6)) * r for i, r in enumerate(rise)]
    assert rates == pytest.approx(wanted, rel=1e-12)
    assert summary.epochs[-1].learning_rate == rates[-1]


def test_phases_of_the_recipe() -> None:
    """Batch norms freeze first, observers later; both are where the recipe says."""
    prepared = prepared_for()
    mode = training_mode_of(prepared)
    (watched, *_) = [m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize)]
    seen: list[tuple[bool, bool]] = []

    def data(_epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in loader():
            yield batch
            assert mode is not None
            seen.append((bool(mode.frozen), bool(watched.observer_enabled)))

    recipe = qat.Recipe(freeze_batch_norms=0.5, freeze_observers=0.75, calibration_batches=1)
    qat.finetune(prepared, data, epochs=2, recipe=recipe)
    steps = seen[-12:]
    assert [frozen for frozen, _ in steps] == [i >= 6 for i in range(12)]
    assert [observed for _, observed in steps] == [i < 9 for i in range(12)]


class Interrupted(Exception):
    pass


class Breaking:
    """A loader that breaks once, after a number of batches."""

    def __init__(self, after: int | None) -> None:
        self.left = math.inf if after is None else after

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x, labels in loader():
            if not self.left:
                raise Interrupted
            self.left -= 1
            yield x + 0.1 * torch.randn(x.shape), labels  # an augmentation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "optimizer"),
    [
        ("a8w8", "sgd"),
        ("a4w4-lsq", "adam"),
        ("a8w8", "adam"),
        ("a4w4-lsq", "sgd"),
        ("a4w4-percentile", "sgd"),
        ("a4w4-percentile", "adam"),
    ],
)
def test_a_killed_training_resumes_to_the_same_result(
    scheme: str, optimizer: Any, tmp_path: Path
) -> None:
    recipe = qat.Recipe(optimizer=optimizer, learning_rate=1e-2)
    whole = prepared_for(scheme)
    expected = qat.finetune(whole, Breaking(None), epochs=3, recipe=recipe, validation=loader())
    resumed = 0
    path = tmp_path / "training.safetensors"
    for after in itertools.chain((8 + 7, 5), itertools.repeat(None)):
        prepared = prepared_for(scheme)
        try:
            got = qat.finetune(
                prepared, Breaking(after), epochs=3, recipe=recipe, validation=loader(),
                checkpoint=path, checkpoint_every=2,
            )  # fmt: skip
            break
        except Interrupted:
            resumed += 1
    assert resumed == 2
    assert got.resumed > 0
    assert got == expected
    state = prepared.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    whole_x, prepared_x = (convert_pt2e(m)(images(8, 1)) for m in (whole, prepared))
    assert torch.equal(whole_x, prepared_x)


@pytest.mark.slow
def test_another_process_resumes(tmp_path: Path) -> None:
    """What tells one training from another says nothing of the process it ran in."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_finetune as t\n"
        "prepared = t.prepared_for('a4w4-lsq', t.Flat)\n"
        "t.qat.finetune(prepared, t.loader(), checkpoint=sys.argv[2])"
    )
    path = tmp_path / "training.safetensors"
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run(arguments, check=True, capture_output=True, env=environment)
    before = path.read_bytes()
    summary = qat.finetune(prepared_for("a4w4-lsq", Flat), loader(), checkpoint=path)
    assert summary.resumed == summary.steps == 6
    assert path.read_bytes() == before


@pytest.mark.slow
def test_starting_from_calibrated_statistics(tmp_path: Path) -> None:
    observed = prepare_pt2e(
        captured(made(train=False)), cq.IntegerQuantizer().set_global("a8w8-histogram")
    )
    cq.calibrate(observed, [images(64, 5)])
    cq.save_statistics(observed, tmp_path / "statistics.safetensors")
    recipe = qat.Recipe(learning_rate=1e-12, freeze_observers=0.0, freeze_batch_norms=0.0)
    starts: list[Any] = [tmp_path / "statistics.safetensors", observed]
    for start in starts:
        prepared = prepared_for("a8w8-histogram", train=False)
        qat.finetune(prepared, loader(), recipe=recipe, start=start)
        trained = convert_pt2e(prepared)
        calibrated = convert_pt2e(copy.deepcopy(observed))
        scales = [
            {qparams_of(g, n).scale for n in g.graph.nodes if is_quantize(n)}
            for g in (trained, calibrated)
        ]
        assert scales[0] == scales[1]


def test_ranges_start_from_the_first_batches() -> None:
    prepared = prepared_for("a8w8")
    qat.finetune(prepared, [task()], recipe=qat.Recipe(learning_rate=1e-12, freeze_observers=0.0))
    first = next(m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize))
    x, _ = task()
    assert (float(first.min_val), float(first.max_val)) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (iter([task()]), "generator"),
        ([images(4)], "pair of inputs and labels, not Tensor"),
        ([(images(4), torch.full((4,), 4))], "epoch 1, batch 0: the loss failed with .*classes"),
        ([(images(4)[:, :2], torch.zeros(4, dtype=torch.int64))], "the graph takes"),
        ([(images(300), torch.zeros(300, dtype=torch.int64))], "no batch that the graph takes"),
        ([(images(1), torch.zeros(1, dtype=torch.int64))], "batch 0: the graph failed"),
        ([(images(4) * torch.inf, torch.zeros(4, dtype=torch.int64))], "not finite"),
    ],
)
def test_bad_data_is_named(data: Any, message: str) -> None:
    prepared = prepared_for()
    prepared(images())
    with pytest.raises((TrainingError, CalibrationError), match=message):
        qat.finetune(prepared, data)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    with pytest.raises(TrainingError, match=r"epoch 1, batch 0: the loss is nan.*learning rate"):
        qat.finetune(prepared_for(), loader(), loss=lambda y, _: y.sum() * math.nan)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "lion"},
        {"learning_rate": -1.0},
        {"warmup": 2.0},
        {"freeze_observers": -0.1},
        {"calibration_batches": 0},
        {"clip_norm": 0.0},
    ],
)
def test_bad_recipes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(options))):
        qat.Recipe(**options)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    qat.finetune(prepared_for(build=Flat), loader(), checkpoint=path)
    for scheme, epochs, message in (("a8w8", 2, "another recipe"), ("a4w4", 1, "another graph")):
        with pytest.raises(TrainingError, match=message):
            qat.finetune(prepared_for(scheme, Flat), loader(), epochs=epochs, checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="damaged"):
        qat.finetune(prepared_for(build=Flat), loader(), checkpoint=path)
    with pytest.raises(InputError, match="Cannot read"):
        qat.finetune(prepared_for(build=Flat), loader(), checkpoint=tmp_path)


@pytest.mark.parametrize("function", [qat.training_mode, qat.evaluation_mode, qat.freeze_observers])
def test_only_prepared_graphs_are_trained(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TrainingError, match="got Everything"):
        function(made())
    observed = prepare_pt2e(captured(made(train=False)), cq.IntegerQuantizer().set_global("a8w8"))
    with pytest.raises(TrainingError, match="no fake quantizers"):
        function(observed)


def test_weights_decay_and_nothing_else() -> None:
    prepared = prepared_for("a4w4-lsq")
    decayed, plain = qat.parameter_groups(prepared, 0.1)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() <= 1 for p in plain["params"])
    assert plain["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(prepared.parameters()))
