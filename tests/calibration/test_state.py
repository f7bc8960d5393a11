"""Models that write their own buffers: programs start with what these held at capture."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.graphs import differences
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.calibration.run import restore_state
from custom_quantizer.calibration.statistics import activation_observers
from custom_quantizer.core.graph import state_buffers


class Remembers(nn.Module):
    """A recurrent layer, the last four results, a running mean, a counter of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.back, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("hidden", torch.full((2, 6), 0.25))
        self.register_buffer("recent", torch.zeros(2, 4, 6))
        self.register_buffer("mean", torch.zeros(2, 6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x) + self.back(self.hidden)
        self.hidden.copy_(y * 0.9)
        self.recent[:, :3] = self.recent[:, 1:].clone()
        self.recent[:, 3].copy_(y)
        self.mean.mul_(0.5).add_(y)
        self.calls.add_(1)
        return self.last(y), self.recent.sum(1) + self.mean, self.calls * 2


def remembers() -> Remembers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Remembers().eval()


DATA = list(torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(1)))
EXAMPLE = (DATA[0],)


@cache
def result() -> cq.QuantizationResult:
    return cq.quantize(remembers(), EXAMPLE, DATA, progress=False)


def lowered() -> cq.LoweredProgram:
    program = result().lowered
    assert program is not None
    return program


def prepared(model: nn.Module | None = None) -> GraphModule:
    captured = torch.export.export(remembers() if model is None else model, EXAMPLE).module()
    return prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_buffers(model).items()}


FRESH = state(remembers())


def assert_fresh(model: nn.Module) -> None:
    held = state(model)
    assert held.keys() == FRESH.keys()
    assert all(torch.equal(held[name], value) for name, value in FRESH.items())


def ranges(model: GraphModule) -> list[tuple[str, float, float]]:
    return [
        (found.name, float(found.observer.min_val), float(found.observer.max_val))
        for found in activation_observers(model)
    ]


# -- programs --------------------------------------------------------------------------------------


def test_a_program_starts_as_the_model_does() -> None:
    assert_fresh(result().converted)
    assert_fresh(result().exported)
    program = lowered()
    for _ in range(2):
        model = remembers()
        for x in DATA[:3]:
            with torch.no_grad():
                want = model(x)
            got = program.run(x)
            assert torch.equal(got[2], want[2])
            for a, b in zip(got[:2], want[:2], strict=True):
                # Steps are 0.01 to 0.03 here; what calibration leaves is off by more than 1.
                assert (a - b).abs().max() < 0.15
        program.reset()
    first, second = program.run(DATA[0]), program.run(DATA[0])
    program.reset()
    assert differences(list(program.run(DATA[0])), list(first)) == []
    assert differences(list(second), list(first)) != []
    program.reset()


@pytest.mark.slow
def test_after_a_loop_of_ones_own_lowering_says_so(caplog: pytest.LogCaptureFixture) -> None:
    graph = prepared()
    for x in DATA:
        graph(x)
    converted = convert_pt2e(graph)
    left = state(converted)
    with caplog.at_level(logging.WARNING, "custom_quantizer"):
        program = cq.lower(converted, EXAMPLE)
    assert "what calibration or convert_pt2e left in hidden, recent, mean, calls," in caplog.text
    assert int(program.run(DATA[0])[2]) == 2 * (int(left["calls"]) + 1) > 2 * len(DATA)
    caplog.clear()
    restore_state(converted)
    assert_fresh(converted)
    with caplog.at_level(logging.WARNING, "custom_quantizer"):
        program = cq.lower(converted, EXAMPLE)
    assert caplog.text == ""
    assert program.buffer == lowered().buffer


def test_what_is_not_known_is_not_restored() -> None:
    captured = torch.export.export(remembers(), EXAMPLE).module()
    for graph in (captured, remembers()):
        with pytest.raises(cq.CalibrationError, match="what the buffers held is not known"):
            restore_state(graph)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_recipe_of_executorch_starts_as_the_model_does() -> None:
    """Its stages calibrate in a loop of their own, and export the converted graph once more."""
    from executorch.export import ExportRecipe, export

    recipe = ExportRecipe.get_recipe(cq.IntegerRecipe.A8W8, calibration=[(x,) for x in DATA])
    program = cq.session_program(export(remembers(), [EXAMPLE], recipe))
    lowered().reset()
    for x in DATA[:3]:
        assert differences(list(program.run(x)), list(lowered().run(x))) == []
    lowered().reset()


class HandsOnWhatItHeld(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("latest", torch.ones(2, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.latest.clone()
        y = self.linear(x)
        self.latest.copy_(y)
        return before * 2.0, y


def test_a_copy_of_what_is_written_later_stays_a_copy() -> None:
    quantized = cq.quantize(HandsOnWhatItHeld(), EXAMPLE, DATA, progress=False)
    assert quantized.lowered is not None
    (first, y), (second, _) = (quantized.lowered.run(x) for x in DATA[:2])
    # Rounded to a step of the product.
    assert torch.allclose(first, torch.full((2, 6), 2.0), rtol=0, atol=0.024)
    assert torch.allclose(second, y * 2.0, rtol=0, atol=0.024)


@pytest.mark.parametrize("capture", ["captured", "prepared"])
def test_state_is_what_a_write_reaches_through_views_alone(capture: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("scale", "viewed", "chained"):
                self.register_buffer(name, torch.ones(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.scale * x  # new memory
            y += x
            self.viewed.view(-1)[2:4].mul_(0.5)
            self.chained.add_(1.0).mul_(2.0)
            return y + self.viewed + self.chained

    graph = torch.export.export(Writes().eval(), EXAMPLE).module()
    if capture == "prepared":
        graph = prepared(Writes().eval())
    assert state_buffers(graph).keys() == {"viewed", "chained"}


def test_looking_at_a_model_does_not_change_it() -> None:
    model, graph = remembers(), result().converted
    reference = cq.integer_reference(graph)
    reference(*EXAMPLE)
    lowered().run(*EXAMPLE)
    for _ in range(2):
        found = cq.verify(graph, lowered(), [(x,) for x in DATA[:5]], float_model=model)
        assert found.bit_exact
        assert [output.graph_mismatches for output in found.outputs] == [0, 0, 0]
        assert_fresh(graph)
        assert_fresh(model)
    diagnosis = cq.diagnose(result().exported, graph, DATA[:3])
    assert str(cq.diagnose(result().exported, graph, DATA[:3])) == str(diagnosis)
    assert_fresh(graph)
    assert_fresh(result().exported)
    models = {"float": model, "graph": graph, "reference": reference, ".pte": lowered()}
    scores = [cq.evaluate(models, DATA[:5]).to_json() for _ in range(2)]
    assert scores[0] == scores[1]
    assert cq.evaluate(models, DATA[:5])[".pte"].agreeing == 10
    assert_fresh(graph)
    assert_fresh(model)


def test_a_model_that_ran_with_gradients_is_like_any_other() -> None:
    """What it wrote has a history, which PyTorch does not copy."""
    program = torch.export.export(remembers(), EXAMPLE)
    graph = program.module()
    graph(*EXAMPLE)
    assert not graph.get_buffer("hidden").is_leaf
    assert cq.IntegerQuantizer().set_global("a8w8").plan(graph).op("linear").scheme == "a8w8"
    later = cq.quantize(program, EXAMPLE, DATA, lower=False, progress=False)
    assert cq.diagnose(graph, later.converted, DATA[:2]).tensors
    assert not graph.get_buffer("hidden").is_leaf


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_is_one_stream_and_leaves_the_state_alone() -> None:
    graph, loop = prepared(), prepared()
    cq.calibrate(graph, DATA)
    assert_fresh(graph)
    for x in DATA:
        loop(x)
    assert ranges(graph) == ranges(loop)
    assert not torch.equal(state(loop)["hidden"], FRESH["hidden"])


def test_two_calls_are_two_streams() -> None:
    halves, loop = prepared(), prepared()
    for half in (DATA[:8], DATA[8:]):
        cq.calibrate(halves, half)
        for x in half:
            loop(x)
        restore_state(loop)
    assert ranges(halves) == ranges(loop)
    whole = prepared()
    cq.calibrate(whole, DATA)
    assert ranges(halves) != ranges(whole)


class Interrupted(Exception):
    pass


def stopping_after(count: int) -> Iterator[Tensor]:
    yield from DATA[:count]
    raise Interrupted


def test_an_interrupted_calibration_goes_on_with_its_state(tmp_path: Path) -> None:
    whole = prepared()
    cq.calibrate(whole, DATA)
    path = tmp_path / "calibration.safetensors"
    graph = prepared()
    for after in (3, 7):
        with pytest.raises(Interrupted):
            cq.calibrate(graph, stopping_after(after), checkpoint=path, checkpoint_every=1)
        assert_fresh(graph)
        graph = prepared() if after == 3 else graph  # in another process, or in this one
    cq.calibrate(graph, DATA, checkpoint=path)
    assert ranges(graph) == ranges(whole)
    assert_fresh(graph)


# -- training --------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls, and keeps running statistics of a kind that PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls.add_(1.0)
        self.mean.copy_(self.mean * 0.5 + y.mean(0))
        return y + self.calls


def test_training_keeps_what_it_wrote_and_nothing_else_writes() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 4), torch.tensor([0, 2])) for _ in range(5)]
    captured = torch.export.export(Counts().train(), (batches[0][0],)).module()
    graph = prepare_qat_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    random_state = torch.get_rng_state()
    seen: list[float] = []
    cq.qat.finetune(
        graph,
        batches,
        epochs=2,
        validation=batches[:3],
        on_epoch=lambda _metrics: seen.append(float(state(graph)["calls"])),
    )
    # Neither the first ranges nor validation count.
    assert seen == [5.0, 10.0]
    assert float(state(graph)["calls"]) == 10.0
    assert bool(state(graph)["mean"].any())
    assert torch.equal(torch.get_rng_state(), random_state)
    converted: Any = convert_pt2e(copy.deepcopy(graph))
    assert torch.equal(state(converted)["mean"], state(graph)["mean"])
