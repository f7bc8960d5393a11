"""Losses of single choices: against what is computed by hand, and the same every time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.flow import small_images, small_model
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.analysis.allocation.choices import (
    activation_label,
    find_choices,
    weight_label,
)
from custom_quantizer.analysis.allocation.sensitivity import ALL_ACTIVATIONS
from custom_quantizer.app.capture import capture
from custom_quantizer.calibration.observers import WeightObserver
from custom_quantizer.calibration.ranges import Statistics, solve
from custom_quantizer.core.schemes import scheme

SCHEMES = ["a8w8", "a8w4", "a4w4"]


class Layers(nn.Module):
    """Two linear layers, and nothing that rewriting would touch."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def inputs(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def noise(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.double(), other.double()
    return float(((exact - other) ** 2).sum() / (exact**2).sum())


def test_the_true_loss_is_that_of_the_network_with_one_rounded_weight() -> None:
    model, x = Layers(), inputs(24)
    found = cq.sensitivity(model, (x[:8],), x, schemes=SCHEMES, progress=False)
    with torch.no_grad():
        exact = model(x)
        for name, layer in (("linear", model.first), ("linear_1", model.last)):
            for width in ("w8", "w4"):
                kept = layer.weight.clone()
                fmt = scheme(f"a8{width}").weight
                observer = WeightObserver(fmt, dtype=torch.int8)
                scale = observer.scale(kept)
                layer.weight.copy_(observer.integers(kept, scale) * scale[:, None])
                expected = noise(exact, model(x))
                layer.weight.copy_(kept)
                assert found[name, width].noise == pytest.approx(expected, rel=1e-6)


def test_the_true_loss_of_an_activation_is_that_of_its_rounding() -> None:
    model, x = Layers(), inputs(24)
    options: Any = {"schemes": SCHEMES, "progress": False}
    found = cq.sensitivity(model, (x[:8],), x, accuracy="plain", **options)
    chosen = cq.sensitivity(model, (x[:8],), x, **options)
    low, high = torch.aminmax(x)
    scale = float((high - low) / 15)
    zero = round(-8 - float(low) / scale)
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero, -8, 7)
    with torch.no_grad():
        expected = noise(model(x), model(rounded))
    assert found["x", "a4"].noise == pytest.approx(expected, rel=1e-5)
    # As quantize does it: the range with the least squared error, at 4 bits and not at 8.
    fmt = replace(scheme("a4w8").activation, observer="histogram")
    qparams = solve(Statistics.of(x), fmt)
    rounded = torch.fake_quantize_per_tensor_affine(
        x, float(qparams.scale), qparams.zero_point, qparams.quant_min, qparams.quant_max
    )
    with torch.no_grad():
        expected = noise(model(x), model(rounded))
    assert chosen["x", "a4"].noise == pytest.approx(expected, rel=1e-5)
    assert chosen["x", "a8"].noise == found["x", "a8"].noise


def test_the_estimate_is_exact_where_the_network_is_linear() -> None:
    """One sample at a time and one output: nothing is left to chance, but float32 rounds too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    x = inputs(4)
    found = cq.sensitivity(model, (x[:1],), x, schemes=SCHEMES, progress=False)
    for loss in found.losses:
        assert loss.estimate == pytest.approx(loss.noise, rel=1e-3), loss


def test_estimates_rank_as_true_losses_do() -> None:
    x = small_images(64)
    found = cq.sensitivity(
        small_model(), (x[:8],), x, schemes=["a8w8", "a8w4", "a8w2", "a4w4"], progress=False
    )
    assert found.correlation["weight"] > 0.9
    assert found.correlation["all"] > 0.8
    text = str(found)
    assert f"weight {found.correlation['weight']:.2f}" in text
    assert re.search(r"^conv2d_1 +wide +\d", text, re.MULTILINE)
    assert json.loads(found.to_json())["losses"][0]["width"] == "w8"


def test_only_an_estimate() -> None:
    x = inputs(16)
    whole = cq.sensitivity(Layers(), (x[:8],), x, schemes=SCHEMES, progress=False)
    found = cq.sensitivity(
        Layers(), (x[:8],), x, schemes=SCHEMES, estimate_only=True, progress=False
    )
    assert [loss.estimate for loss in found.losses] == [loss.estimate for loss in whole.losses]
    assert all(loss.noise is None and loss.loss == loss.estimate for loss in found.losses)
    assert found.forwards["for true losses"] == 0
    assert math.isnan(found.correlation["all"])


def test_one_format_of_activations_is_measured_all_together() -> None:
    x = inputs(16)
    found = cq.sensitivity(Layers(), (x[:8],), x, schemes=["a8w8", "a8w4"], progress=False)
    rows = [loss for loss in found.losses if loss.kind == "activation"]
    assert [(row.name, row.width) for row in rows] == [(ALL_ACTIVATIONS, "a8")]


# ---------------------------------------------------------------------------------------------
# The metric, and going on after an interruption
# ---------------------------------------------------------------------------------------------


class Correct:
    """Whether the highest score is the label's; stops at a call, if it is told to."""

    __name__ = "correct"

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self._stop_at = 0, stop_at

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.calls == self._stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return (outputs.argmax(1) == labels).double()


def batches(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """With what the float model says as labels."""
    x = inputs(count)
    with torch.no_grad():
        return [(part, Layers()(part).argmax(1)) for part in x.split(8)]


def measured(metric: Correct, **options: Any) -> cq.Sensitivity:
    return cq.sensitivity(
        Layers(),
        (inputs(8),),
        batches(),
        schemes=["a8w8", "a2w2"],
        metric=metric,
        progress=False,
        **options,
    )


def test_with_a_metric_the_loss_is_what_it_falls_by() -> None:
    found = measured(Correct())
    assert found.metric == "correct"
    assert found["linear", "w8"].metric == 0.0  # labels are what the float model says
    worst = found.ranked()[0]
    assert worst.metric is not None
    assert worst.metric > 0.1
    assert worst.loss == worst.metric


def test_a_resumed_measurement_is_what_it_would_have_been(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.safetensors"
    whole = Correct()
    expected = measured(whole)
    with pytest.raises(KeyboardInterrupt):
        measured(Correct(stop_at=whole.calls * 5 // 8), checkpoint=file)
    rest = Correct()
    assert measured(rest, checkpoint=file) == expected
    assert rest.calls == whole.calls // 2  # of four batches, two were finished
    again = Correct()
    assert measured(again, checkpoint=file) == expected
    assert again.calls == 0


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.safetensors"
    x = inputs(16)

    def run(model: nn.Module, data: Tensor, seed: int = 0) -> None:
        cq.sensitivity(
            model, (x[:8],), data, schemes=SCHEMES, seed=seed, checkpoint=file, progress=False
        )

    run(Layers(), x)
    other = Layers()
    nn.init.zeros_(other.first.weight)
    for arguments, what in (
        ((other, x), "another model, or other weights"),
        ((Layers(), inputs(16, seed=6)), "other data"),
        ((Layers(), x, 1), "other schemes, another metric, number of probes or seed"),
    ):
        with pytest.raises(cq.InputError, match=f"is a checkpoint of {what}"):
            run(*arguments)


# ---------------------------------------------------------------------------------------------
# What can be chosen
# ---------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer used twice, a residual sum, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        y = self.a(x)
        return self.b(torch.cat([y, x], 1).reshape(-1, 8))


def choices_of(model: nn.Module, *shape: int) -> Any:
    return find_choices(capture(model, (torch.randn(shape),))[0], SCHEMES)


def test_ops_that_share_a_weight_are_one_unit_and_a_concatenation_one_block() -> None:
    found = choices_of(Shared(), 3, 4)
    assert [unit.ops for unit in found.units] == [
        ("linear", "linear_1"),
        ("linear_2",),
        ("linear_3",),
    ]
    first, second, last = (unit.block for unit in found.units)
    assert first == second != last
    part, joined = (g for g in found.groups if g.name in ("linear_1", "linear_2"))
    assert part.blocks == (first,)
    # What the concatenation and the reshape hand on was rounded before.
    assert len(part.observers) == len(joined.observers) == 1
    assert joined.blocks == (first, last)


def test_a_choice_becomes_rules_and_the_plan_does_what_was_predicted() -> None:
    found = choices_of(Shared(), 3, 4)
    quantizer = found.quantizer({"linear": "a4w4", "linear_2": "a4w4", "linear_3": "a8w4"})
    rules = {rule["node_name"]: rule["scheme"] for rule in quantizer.to_config()["rules"]}
    assert rules == {
        "linear": "a4w4",
        "linear_1": "a4w4",
        "linear_2": "a4w4",
        "linear_3": "a8w4",
    }
    graph = capture(Shared(), (torch.randn(3, 4),))[0]
    chosen = {"linear": "a4w4", "linear_2": "a4w4", "linear_3": "a8w4"}
    plan = quantizer.plan(graph)
    assert found.differences(chosen, plan) == ()
    assert found.differences({**chosen, "linear_3": "a8w8"}, plan) == (
        "linear_3: scheme a8w4, predicted a8w8",
        "linear_3: backend xnnpack packed int4, predicted xnnpack int8",
        "linear_3: bytes 24, predicted 32",
    )


class Attention(nn.Module):
    """A call that becomes several ops, one of which has its name; and a mask that stays float."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x + 1, x * 2)


@pytest.mark.parametrize("name", ["a8w8", "a4w4"])
def test_ops_that_were_one_call_can_be_chosen_one_by_one(name: str) -> None:
    graph = capture(Attention(), (torch.randn(1, 2, 4, 8),))[0]
    found = find_choices(graph, ["a16w16", "a8w8", "a4w4"])
    parts = [unit.name for unit in found.units if unit.name.startswith("scaled_dot")]
    assert "scaled_dot_product_attention" in parts
    assert len(parts) > 1
    for part in parts:
        chosen = {part: name}
        assert found.differences(chosen, found.quantizer(chosen).plan(graph)) == ()


def test_plans_are_those_of_the_backend() -> None:
    graph = capture(nn.Conv2d(4, 4, 3), (torch.randn(1, 4, 5, 5),))[0]
    sizes = {
        backend: find_choices(graph, ["a8w8", "a8w4"], backend).plans["a8w4"].op("conv2d").backend
        for backend in ("xnnpack", None)
    }
    assert sizes == {"xnnpack": "xnnpack int8 container", None: "integer"}


class Multiplications(nn.Module):
    """Every kind of op that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.conv(x))).flatten(2)
        return self.linear(x @ x.transpose(1, 2) @ x)[:, :, :2]


def test_multiplications_are_counted_as_pytorch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Multiplications(), torch.randn(3, 4, 9, 9)
    model.linear = nn.Linear(36, 3)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = find_choices(capture(model, (x,))[0], ["a8w8"])
    assert 2 * 3 * sum(unit.macs for unit in found.units) == counter.get_total_flops()


def test_labels_say_what_a_scheme_says() -> None:
    mixed = scheme("a4w4-per_tensor-percentile99.9-bias16")
    assert weight_label(mixed) == "w4-per_tensor"
    assert activation_label(mixed) == "a4-percentile99.9"
    assert (weight_label(scheme("a16w8")), activation_label(scheme("a16w8"))) == ("w8", "a16")


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ([], "there is none to choose from"),
        ("a8w8", r"give a list of schemes"),
        (["a8w8", "a8w8"], "a8w8 stands twice"),
        (["a8w8", "int4"], "did you mean a8w4"),
        (["a8w8", None], "None leaves ops in float"),
        (["dyn8w8"], "quantizes activations at run time"),
    ],
)
def test_schemes_that_cannot_be_used_are_refused(schemes: Any, message: str) -> None:
    with pytest.raises(cq.ConfigError, match=message):
        cq.sensitivity(Layers(), (inputs(8),), inputs(8), schemes=schemes, progress=False)


def test_ops_in_place_are_no_state() -> None:
    found = choices_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU6(inplace=True)), 3, 4)
    assert [unit.name for unit in found.units] == ["linear"]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return self.linear(x) + self.seen


@pytest.mark.parametrize(
    ("model", "data", "metric", "message"),
    [
        (Layers, inputs(4), None, "holds 4 samples, but the graph takes batches of 8"),
        (Layers, [], None, "the data holds no sample"),
        (Counter, inputs(8), None, "writes its own buffers"),
        (Layers, inputs(8), lambda y, _: y, "returned shape"),
        (Layers, inputs(8), lambda y, _: y.sum() / 0, "is not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: type[nn.Module], data: Any, metric: Any, message: str
) -> None:
    with pytest.raises(cq.InputError, match=message):
        cq.sensitivity(model(), (inputs(8),), data, schemes=["a8w8"], metric=metric, progress=False)
