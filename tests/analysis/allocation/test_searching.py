"""The search: it gives bits to who needs them, keeps the budget, and never loses to one scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.flow import small_images, small_labels, small_model
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.analysis.allocation.choices import Choices, find_choices
from custom_quantizer.analysis.allocation.samples import Samples
from custom_quantizer.analysis.allocation.searching import Quantized, Searcher
from custom_quantizer.analysis.allocation.sensitivity import measure_sensitivity
from custom_quantizer.app import pipeline
from custom_quantizer.app.capture import capture
from custom_quantizer.core.noise import Noise

WEIGHTS = ["a8w8", "a8w4", "a8w2"]


class Delicate(nn.Module):
    """Three layers of one size; the second has a weight in each row that makes others vanish."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))
            with torch.no_grad():
                # Column 0 reads a value that is always zero: only the scale suffers.
                self.first.weight[0], self.first.bias[0] = 0.0, 0.0
                self.middle.weight[:, 0] = 5.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.middle(x)))


def inputs(count: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(2))


@cache
def delicate() -> cq.SearchResult:
    """At two thirds of the bits, one layer keeps its 8."""
    x = inputs(64)
    return cq.search(
        Delicate(),
        (x[:8],),
        x,
        {"weight_bits": 2 / 3},
        schemes=["a8w8", "a8w4"],
        points=3,
        accuracy="plain",
        progress=False,
    )


def test_the_layer_that_needs_bits_gets_them() -> None:
    found = delicate()
    assert found.best.chosen == {"linear": "a8w4", "linear_1": "a8w8", "linear_2": "a8w4"}
    assert found.best.costs["weight_bits"] == 256 * (4 + 8 + 4)
    assert found.best.in_budget


def test_predicted_losses_are_near_the_measured_ones() -> None:
    for point in delicate().points:
        assert point.measured is not None
        assert point.predicted == pytest.approx(point.measured.noise, rel=0.5)
        assert point.differences == ()


def test_the_front_falls_and_every_point_is_listed() -> None:
    found = delicate()
    costs = [point.costs["weight_bits"] for point in found.front]
    noises = [point.measured.noise for point in found.front if point.measured]
    assert costs == sorted(costs)
    assert noises == sorted(noises, reverse=True)
    names = {point.name for point in found.points}
    assert {"a8w8 everywhere", "a8w4 everywhere", found.best.name} <= names
    text = str(found)
    assert all(point.name in text for point in found.points)
    assert json.loads(found.to_json())["best"] == found.best.name


def test_the_saved_config_becomes_the_plan_that_was_predicted(tmp_path: Path) -> None:
    """Planned from the file, lowered, and held against the prediction op by op."""
    found, file = delicate(), tmp_path / "mixed.yaml"
    found.save(file)
    assert found.config["accuracy"] == "plain"
    result = cq.quantize(Delicate(), (inputs(8),), inputs(64), config=file, progress=False)
    assert [(op.node, op.scheme) for op in result.plan.quantized] == list(found.best.chosen.items())
    assert sum(op.size_bytes for op in result.plan.ops) == found.best.costs["size"]
    assert result.lowered is not None
    placed = {op.node: op.backend.label for op in result.lowered.report.ops}
    for op in result.plan.quantized:
        assert placed[op.node] == op.backend
    assert {placed["linear"], placed["linear_1"]} == {"xnnpack packed int4", "xnnpack int8"}


# ---------------------------------------------------------------------------------------------
# Never worse than one scheme everywhere
# ---------------------------------------------------------------------------------------------


@cache
def prepared() -> tuple[Choices, Any, Samples]:
    """The same network, with what it says itself as labels."""
    exported, example = capture(Delicate(), (inputs(8),))
    x = inputs(96)
    with torch.no_grad():
        labelled = [(part, Delicate()(part).argmax(1)) for part in x.split(8)]
    choices = find_choices(exported, WEIGHTS)
    return choices, (exported, example), Samples.collect(exported, labelled, len(x))


def searcher(
    budget: dict[str, float], *, points: int = 2, told: dict[tuple[str, str], float] | None = None
) -> Searcher:
    """One search; ``told`` are losses that it is made to believe."""
    choices, (exported, example), samples = prepared()
    used, held_back = samples.split(1 / 3)
    found = measure_sensitivity(choices, used, progress=False)
    if told is not None:
        losses = [replace(row, noise=told.get((row.name, row.width), 0.0)) for row in found.losses]
        found = replace(found, losses=tuple(losses))

    def quantized(quantizer: cq.IntegerQuantizer) -> Quantized:
        made = cq.quantize(
            exported,
            example,
            used.inputs(),
            config=quantizer,
            accuracy="plain",
            lower=False,
            progress=False,
        )
        return Quantized(made.converted, made.plan, 1.0)

    return Searcher(
        choices, found, budget, quantized, exported, held_back, points=points, progress=False
    )


_WRONG = (("w8", 0.0), ("w4", 1.0), ("w2", 1.1))
"""As if half of the loss came with the first bit."""


def test_where_the_predictions_are_wrong_one_scheme_everywhere_is_taken() -> None:
    told = {(name, width): loss for name in ("linear", "linear_2") for width, loss in _WRONG}
    found = searcher({"weight_bits": 0.5}, told=told).run()
    assert found.best.name == "a8w4 everywhere"
    wrong = next(p for p in found.points if p.in_budget and p.name.startswith("searched"))
    assert sorted(wrong.chosen.values()) == ["a8w2", "a8w2", "a8w8"]
    assert wrong.costs["weight_bits"] == found.best.costs["weight_bits"]


def test_what_is_taken_is_the_best_that_keeps_the_budget() -> None:
    found = searcher({"weight_bits": 0.5}).run()
    assert found.best.costs["weight_bits"] <= found.limits["weight_bits"]
    noises = [p.measured.noise for p in found.points if p.in_budget and p.measured]
    assert found.best.measured is not None
    assert found.best.measured.noise == min(noises)


def test_a_number_above_one_is_the_cost_itself() -> None:
    choices, _, _ = prepared()
    parameters = sum(unit.parameters for unit in choices.layers)
    found = searcher({"weight_bits": 4 * parameters}).run()
    assert found.limits == {"weight_bits": 4 * parameters}
    assert found.best.costs["weight_bits"] <= 4 * parameters


def test_an_accuracy_budget_takes_the_cheapest_that_keeps_it() -> None:
    found = searcher({"accuracy": 5.0}, points=3).run()
    assert found.floating.top1 == 1.0  # labels are what the float model says
    kept = [p for p in found.points if p.measured and 1.0 - _top1(p) <= 0.05]
    assert len(kept) < len(found.points)
    assert found.best.costs["weight_bits"] == min(p.costs["weight_bits"] for p in kept)
    assert found.best.costs["weight_bits"] < found.base["weight_bits"]


def test_an_accuracy_that_nothing_has_is_an_error() -> None:
    search = searcher({"accuracy": 1.0, "weight_bits": 0.25})
    with pytest.raises(cq.ConfigError, match="loses at most 1 points; a8w2 everywhere loses"):
        search.run()


def _top1(point: cq.SearchPoint) -> float:
    assert point.measured is not None
    assert point.measured.top1 is not None
    return point.measured.top1


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "say what is limited"),
        ({"sise": 0.6}, "unknown key 'sise'; did you mean size?"),
        ({"size": 0}, "size must be a number above 0, not 0"),
        ({"size": "60%"}, "size must be a number above 0, not '60%'"),
        ({"weight_bits": 0.2}, r"weight_bits 0.200 of a8w8 everywhere is not possible: .* 0.250"),
        ({"size": 0.3}, "stores narrow weights of some ops in whole bytes"),
    ],
)
def test_a_budget_that_says_nothing_or_cannot_be_kept(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(cq.ConfigError, match=message):
        cq.search(
            small_model(),
            (small_images(8),),
            [(small_images(32), small_labels(32))],
            budget,
            schemes=WEIGHTS,
            points=1,
            progress=False,
        )


def test_latencies_of_a_table(tmp_path: Path) -> None:
    """The second layer is the slow one, and 4 bits help nobody else."""
    x, table = inputs(64), tmp_path / "times.json"
    times = {
        "linear": {"a8w8": 1.0, "a8w4": 1.0},
        "linear_1": {"a8w8": 8.0, "a8w4": 4.0},
        "linear_2": {"a8w8": 1.0, "a8w4": 1.0},
    }
    table.write_text(json.dumps(times))
    options: dict[str, Any] = {"schemes": ["a8w8", "a8w4"], "points": 1, "accuracy": "plain"}
    found = cq.search(Delicate(), (x[:8],), x, {"latency": 0.7}, latencies=table, **options)
    assert found.best.costs["latency"] == 6.0
    assert found.best.chosen == {"linear": "a8w8", "linear_1": "a8w4", "linear_2": "a8w8"}
    both = {"weight_bits": 0.5, "latency": 1.0}
    slow = {op: {"a8w8": 1.0, "a8w4": 2.0} for op in times}
    with pytest.raises(cq.ConfigError, match=r"no choice keeps all of it at once \(weight_bits"):
        cq.search(Delicate(), (x[:8],), x, both, latencies=slow, **options)
    quick = {op: {name: time / 100 for name, time in row.items()} for op, row in times.items()}
    with pytest.raises(cq.ConfigError, match=r"at least 0\.600 \(0\.06\); give more"):
        cq.search(Delicate(), (x[:8],), x, {"latency": 0.1}, latencies=quick, **options)
    del times["linear_2"]["a8w4"]
    with pytest.raises(cq.ConfigError, match="there is no time of linear_2 at a8w4"):
        cq.search(Delicate(), (x[:8],), x, {"latency": 0.7}, latencies=times, **options)
    table.write_text("[1]")
    with pytest.raises(cq.InputError, match="is no table of times"):
        cq.search(Delicate(), (x[:8],), x, {"latency": 0.7}, latencies=table, **options)


@pytest.mark.slow
def test_latencies_are_measured_here_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    schemes = ["a16w8", "a8w8"]
    args = (small_model(), (small_images(8),), [(small_images(32), small_labels(32))])
    options: dict[str, Any] = {"schemes": schemes, "points": 1, "estimate_only": True}
    found = cq.search(*args, {"latency": 1000.0}, progress=False, **options)
    (kept,) = (tmp_path / "cache" / "custom_quantizer").iterdir()
    times = json.loads(kept.read_text())
    for op in ("conv2d", "conv2d_1", "linear"):
        assert times[op].keys() == set(schemes)
        # The runtime counts microseconds: a small op may take none.
        assert 0 <= min(times[op].values()) <= max(times[op].values()) < 10
    assert min(times["conv2d"].values()) > 0
    assert found.base["latency"] == sum(row["a16w8"] for row in times.values())
    for point in found.points:
        chosen = sum(times[op][scheme] for op, scheme in point.chosen.items())
        assert point.costs["latency"] == pytest.approx(chosen, rel=1e-12)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured twice")

    # The second search reads the file: it finds the times that are written there.
    times["linear"] = {"a16w8": 5.0, "a8w8": 3.0}
    kept.write_text(json.dumps(times))
    with monkeypatch.context() as patch:
        patch.setattr("custom_quantizer.app.latency.profile", again)
        fast = cq.search(*args, {"latency": 4.0}, progress=False, **options)
        assert fast.best.chosen["linear"] == "a8w8"
        kept.write_text("{")
        with pytest.raises(AssertionError, match="measured twice"):
            cq.search(*args, {"latency": 4.0}, progress=False, **options)
    with pytest.raises(cq.ConfigError, match="measured on this machine for XNNPACK alone; bring"):
        cq.search(*args, {"latency": 4.0}, backend=None, progress=False, **options)


def test_an_accuracy_that_cannot_be_told_is_an_error_before_anything_is_quantized() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    x = torch.randn(8, 1, 6, 6)
    with pytest.raises(cq.ConfigError, match="accuracy needs labels or outputs that are scores"):
        cq.search(Image(), (x[:2],), x, {"accuracy": 1.0}, progress=False)


@pytest.mark.parametrize(("narrow", "calibrations"), [("a8w4", 1), ("a4w8", 2)])
def test_all_choices_share_a_calibration(
    narrow: str, calibrations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more, where a range of few bits is chosen by counts, which the first did not need."""
    calibrated: list[object] = []
    calibrate = pipeline.calibrate

    def noted(prepared: Any, *args: Any, **options: Any) -> Any:
        calibrated.append(prepared)
        return calibrate(prepared, *args, **options)

    monkeypatch.setattr(pipeline, "calibrate", noted)
    x = inputs(32)
    options: dict[str, Any] = {"schemes": ["a8w8", narrow], "points": 3, "estimate_only": True}
    budget = {"bit_operations": 0.8}
    found = cq.search(Delicate(), (x[:8],), x, budget, progress=False, **options)
    assert len(found.points) >= 3
    assert len(calibrated) == calibrations
    measured = len(found.points) * found.held_back / found.sensitivity.samples
    parts = calibrations + measured + sum(found.sensitivity.forwards.values())
    assert found.forwards == pytest.approx(parts)
    # Each is what it would be alone.
    best = cq.quantize(
        Delicate(), (x[:8],), x[:24].split(8), config=found.quantizer, lower=False, progress=False
    )
    noise = Noise()
    for part in x[24:].split(8):
        noise.add(Delicate()(part).detach(), best.converted(part).detach())
    assert found.best.measured.noise == pytest.approx(noise.error / noise.signal, rel=1e-6)


def test_one_batch_cannot_be_divided() -> None:
    x = inputs(8)
    with pytest.raises(cq.InputError, match="a part of them has to be held back"):
        cq.search(Delicate(), (x,), x, {"weight_bits": 0.7}, progress=False)
