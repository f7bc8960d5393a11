"""Another scheme of the same model: what ``quantize`` makes of the data, without running any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.flow import Small, small_images, small_model, small_result
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.accuracy import improving
from custom_quantizer.analysis import fidelity
from custom_quantizer.app import pipeline
from custom_quantizer.core.graph import is_dequantize

EXAMPLE, DATA = (small_images(4),), small_images(32)


def document(result: Any) -> dict[str, Any]:
    """What a result says of itself, without the time it took."""
    found: dict[str, Any] = json.loads(result.to_json())
    found.get("improvement", {}).pop("seconds", None)
    return found


def anew(config: str, **options: Any) -> Any:
    return cq.quantize(small_model(), EXAMPLE, DATA, config=config, progress=False, **options)


@contextmanager
def nothing_measured() -> Iterator[None]:
    """Nothing is captured or calibrated."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", refuse)
        patch.setattr(pipeline, "calibrate", refuse)
        yield


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("a8w4", {"accuracy": "plain"}),
        ("a16w8", {}),
        ("dyn8w8", {}),
        ("a8w4", {"improve": ["bias_correction"]}),
    ],
)
def test_it_is_what_the_data_give(config: str, options: dict[str, Any]) -> None:
    first = small_result()
    lower = config == "a8w4" and "accuracy" in options
    data = DATA if "improve" in options else None
    with nothing_measured():
        second = first.with_config(config, data, lower=lower, progress=False, **options)
    direct = anew(config, lower=lower, **options)
    mine, theirs = document(second), document(direct)
    # Of tensors that this scheme does not observe as well, when their ranges last moved.
    assert mine.pop("calibration")["samples"] == theirs.pop("calibration")["samples"]
    assert mine == theirs
    if lower:
        assert second.lowered.buffer == direct.lowered.buffer
    wanted = direct.converted.state_dict()
    assert second.converted.state_dict().keys() == wanted.keys()
    for name, value in second.converted.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_no_float_forward_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs run on their grids alone, once for each call."""
    runs: list[bool] = []

    class Counted(fidelity.Rerun):
        def __init__(self, model: Any, *args: Any, **options: Any) -> None:
            converted = any(map(is_dequantize, model.graph.nodes))
            runs.append(converted or bool(options.get("rounding")))
            super().__init__(model, *args, **options)

    first = small_result()
    monkeypatch.setattr(fidelity, "Rerun", Counted)
    second = first.with_config("a16w8", lower=False, progress=False)
    calls = len(first._measured.calls)
    assert runs == [True] * 2 * calls
    # A third one finds the same.
    runs.clear()
    second.with_config("a8w8", lower=False, progress=False)
    assert runs == [True] * 2 * calls


def test_means_of_the_float_model_are_kept_for_the_data_they_are_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floating: list[int] = []

    class Counted(improving.Stream):
        def __init__(self, model: Any, calls: Any, rounded: bool, constants: Any = None) -> None:
            if not rounded:
                floating.append(len(calls))
            super().__init__(model, calls, rounded, constants)

    options: dict[str, Any] = {"improve": ["bias_correction"], "lower": False, "progress": False}
    other = small_images(32, seed=7)
    first = small_result()
    second = first.with_config("a8w4", DATA, **options)
    monkeypatch.setattr(improving, "Stream", Counted)
    for data, known in ((DATA, True), (other, False), (other, True)):
        floating.clear()
        third = second.with_config("a8w3", data, **options)
        # What is held back, twice; and all of it where the means are not known.
        assert len(floating) == 2
        assert (floating[0] == floating[1]) == known
        fresh = cq.quantize(small_model(), EXAMPLE, DATA, config="a8w8", lower=False).with_config(
            "a8w3", data, **options
        )
        assert document(third)["improvement"] == document(fresh)["improvement"]
        for name, value in fresh.converted.state_dict().items():
            assert torch.equal(third.converted.state_dict()[name], value), name


def test_a_model_that_was_changed_since_is_refused() -> None:
    first = anew("a8w8", lower=False)
    with torch.no_grad():
        first.exported.get_parameter("linear.weight")[0, 0] += 1e-6
    with pytest.raises(cq.VerificationError, match="weights or buffers were changed since"):
        first.with_config("a8w4", accuracy="plain", lower=False, progress=False)


def test_a_scheme_that_needs_more_is_refused() -> None:
    """Extremes say nothing of how often values occur; counts say all."""
    narrow = anew("a8w8-histogram", lower=False)
    again = narrow.with_config("a8w8", lower=False, progress=False)
    assert document(again)["report"] == document(anew("a8w8", lower=False))["report"]
    with pytest.raises(cq.CalibrationError, match=r"not enough for this one.*call quantize"):
        small_result().with_config("a8w8-histogram", lower=False, progress=False)
    with pytest.raises(cq.CalibrationError, match=r"not enough for this one.*call quantize"):
        anew("dyn8w8", lower=False).with_config("a8w8", lower=False, progress=False)
    with pytest.raises(cq.InputError, match=r"first scheme.*bias_correction needs samples"):
        small_result().with_config("a8w4", progress=False)


@pytest.mark.slow
def test_a_batch_that_varies_goes_on_varying() -> None:
    asked: dict[str, Any] = {"dynamic_batch": True, "progress": False}
    first = cq.quantize(Small().eval(), (small_images(1),), DATA, config="a8w8", **asked)
    second = first.with_config("a8w4", accuracy="plain", progress=False)
    assert second.lowered is not None
    assert second.lowered.run(small_images(3)).shape == (3, 3)


class Remembers(nn.Module):
    """Each call finds what the one before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + self.last)
        self.last.copy_(y)
        return y


def test_a_model_with_state_begins_as_it_was_captured() -> None:
    model = Remembers().eval()
    data = list(torch.randn(6, 2, 4))
    first, direct = (
        cq.quantize(model, (data[0],), data, config=config, lower=False, progress=False)
        for config in ("a8w8", "a16w8")
    )
    second = first.with_config("a16w8", lower=False, progress=False)
    assert document(second)["report"] == document(direct)["report"]
    assert second.fidelity == direct.fidelity
    assert torch.equal(second.converted.state_dict()["last"], torch.ones(2, 4))
