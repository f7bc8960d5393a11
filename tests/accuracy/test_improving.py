"""``improve``, and what conversion makes of its integers."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from support.improvement import (
    DATA,
    FRESH,
    every_layer,
    fresh_error,
    layer_states,
    prepared_every_layer,
    smooth_images,
)
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.accuracy import improving
from custom_quantizer.accuracy.defaults import BEST
from custom_quantizer.accuracy.layers import find_layers
from custom_quantizer.accuracy.streams import values_of
from custom_quantizer.calibration.statistics import (
    activation_observers,
    reset_statistics,
    solved_qparams,
)
from custom_quantizer.core.bias import derived_scale
from custom_quantizer.errors import CalibrationError, ConfigError
from custom_quantizer.reference.converted import read_converted


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_layer_is_better_than_rounded_to_nearest() -> None:
    prepared = prepared_every_layer()
    nearest = fresh_error(prepared)
    ranges = solved_qparams(prepared)
    result = cq.improve(prepared, DATA)
    assert [layer.module for layer in result.layers if layer.algorithms] == [
        "stem", "depthwise", "grouped", "up", "pointwise", "linear",
    ]  # fmt: skip
    assert all(layer.gain > 3 for layer in result.layers if layer.algorithms), result.table()
    assert all(observed.observer.frozen for observed in activation_observers(prepared))
    assert solved_qparams(prepared) == ranges
    assert fresh_error(prepared) < nearest / 4
    assert (result.samples, result.held_back) == (56, 8)


def test_a_layer_that_too_few_samples_make_worse_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(48, 8), torch.randn(200, 48)
    captured = torch.export.export(model, (rows[:1],)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w4"))
    few = rows[:10].split(1)
    cq.calibrate(prepared, few)
    states = layer_states(prepared)
    result = cq.improve(prepared, few)
    assert [layer.algorithms for layer in result.layers] == [()]
    assert result.layers[0].gain == 0.0
    assert [entry.algorithm for entry in result.not_applied] == ["gptq", "bias_correction"]
    assert re.search(r"batches held back lost \d+\.\d dB", result.not_applied[0].reason)
    assert _equal(layer_states(prepared), states)
    result = cq.improve(prepared, rows.split(1))
    assert result.layers[0].algorithms == ("gptq", "bias_correction")


def test_a_graph_that_was_improved_before_is_still_compared_with_the_float_model() -> None:
    prepared = prepared_every_layer()
    first = cq.improve(prepared, DATA)
    states = layer_states(prepared)
    again = copy.deepcopy(prepared)
    second = cq.improve(again, DATA)
    assert [layer.before for layer in second.layers] == [layer.after for layer in first.layers]
    assert [layer.after for layer in second.layers] == [layer.after for layer in first.layers]
    assert _equal(layer_states(again), states)  # what is best for float weights is so once more
    with pytest.raises(CalibrationError, match=r"improved before, and equalization would change"):
        cq.improve(prepared, DATA, ["gptq", "equalization"])
    assert _equal(layer_states(prepared), states)


@pytest.mark.parametrize("algorithm", [*BEST, "analytical_bias_correction"])
def test_each_algorithm_alone_helps(algorithm: str) -> None:
    prepared = prepared_every_layer()
    nearest = fresh_error(prepared)
    result = cq.improve(prepared, DATA, [algorithm])
    assert result.algorithms == (algorithm,)
    assert result.seconds.keys() == {"streams", algorithm}
    assert fresh_error(prepared) < nearest


def test_the_analytical_correction_is_what_the_mean_input_loses() -> None:
    """By the outputs themselves, border pixels included; to half a unit of the derived bias."""
    prepared, plain = prepared_every_layer(), prepared_every_layer()
    calls = [[x] for x in DATA[:7]]
    cq.improve(prepared, DATA, ["analytical_bias_correction"])
    before, after = ({x.name: x for x in find_layers(p)[0]} for p in (plain, prepared))
    inputs = dict(values_of(plain, calls, [layer.input for layer in before.values()]))
    corrected = 0
    for name, layer in before.items():
        if layer.bias is None or layer.loses_nothing():
            continue
        rounded = layer.rounded_weight()
        means = [
            layer.channel_means([layer.compute(x, w, None) for x in inputs[layer.input]])
            for w in (layer.weight.detach(), rounded)
        ]
        moved = after[name].bias.detach().double() - layer.rounded_bias().double()
        unit = layer.final_scale().double() * float(layer.input_observer.qparams().scale)
        unit = unit.reshape(-1).repeat(len(moved) // unit.numel())
        assert bool(((moved - (means[0] - means[1])).abs() <= 0.501 * unit).all()), name
        corrected += int((moved.abs() > 2 * unit).sum())
    assert corrected > 20


def test_biases_and_weights_are_integers_of_the_derived_scales() -> None:
    prepared = prepared_every_layer()
    cq.improve(prepared, DATA)
    layers = {layer.node.name: layer for layer in find_layers(prepared)[0]}
    expected = {}
    for name, layer in layers.items():
        scale = layer.observer.supplied_scale
        bias = layer.bias
        assert bias is None or torch.equal(bias, layer.rounded_bias())
        expected[name] = (None if bias is None else bias.clone(), layer.weight.clone(), scale)
    ops = {op.node.name: op for op in read_converted(convert_pt2e(prepared)).integer}
    for name, (bias, weight, scale) in expected.items():
        op = ops[name]
        assert op.weight is not None
        if scale is not None:
            spread = layers[name].observer.dequantized(op.weight, scale)
            assert torch.equal(spread, weight)
        if bias is not None and scale is not None and name != "conv_transpose2d":
            unit = derived_scale(float(op.inputs[0].scale), scale)
            assert torch.equal(op.bias.to(torch.float32) * unit, bias)


@pytest.mark.slow
def test_the_program_computes_what_the_reference_does() -> None:
    prepared = prepared_every_layer()
    cq.improve(prepared, DATA)
    layers = find_layers(prepared)[0]
    biases = {layer.node.name: layer.rounded_bias() for layer in layers}
    converted = convert_pt2e(prepared)
    # Lowering reads the biases of the file back and compares them with the graph's.
    lowered = cq.lower(converted, (FRESH[:8],))
    reference = cq.integer_reference(converted, "xnnpack")
    outputs = [lowered.run(x) for x in FRESH.split(8)]
    assert torch.equal(torch.cat(outputs), torch.cat([reference(x) for x in FRESH.split(8)]))
    for op in read_converted(converted).integer:
        if op.bias is not None and op.node.name != "conv_transpose2d":
            unit = derived_scale(float(op.inputs[0].scale), op.weight_qparams.scale)
            assert torch.equal(op.bias.to(torch.float32) * unit, biases[op.node.name])


def test_the_captured_model_keeps_its_weights() -> None:
    model = every_layer()
    exported = torch.export.export(model, (smooth_images(8),)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global("a8w4"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared(smooth_images(8))
    cq.improve(prepared, DATA)
    assert _equal(model.state_dict(), before)


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared_every_layer()
    expected = cq.improve(whole, DATA)
    path = tmp_path / "improvement.safetensors"
    prepared = prepared_every_layer()
    before = layer_states(prepared)
    improve_layer = improving._Run._improve

    def interrupted(run: improving._Run, index: int, *rest: object) -> tuple[str, ...]:
        if index == 3:
            raise KeyboardInterrupt
        return improve_layer(run, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(improving._Run, "_improve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cq.improve(prepared, DATA, checkpoint=path)
    assert _equal(layer_states(prepared), before)
    assert not any(observed.observer.frozen for observed in activation_observers(prepared))
    result = cq.improve(prepared, DATA, checkpoint=path)
    assert result.resumed == 3
    assert result.layers == expected.layers
    assert _equal(layer_states(prepared), layer_states(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "improvement.safetensors"
    cq.improve(prepared_every_layer(), DATA, checkpoint=path)
    again = cq.improve(prepared_every_layer(), DATA, checkpoint=path)
    assert again.resumed == len(again.layers)
    with pytest.raises(CalibrationError, match="another seed"):
        cq.improve(prepared_every_layer(), DATA, seed=1, checkpoint=path)
    with pytest.raises(CalibrationError, match="other data"):
        cq.improve(prepared_every_layer(), DATA[1:], checkpoint=path)
    with pytest.raises(CalibrationError, match="another model"):
        cq.improve(prepared_every_layer("a8w4"), DATA, checkpoint=path)


def test_what_is_not_applied_has_a_reason() -> None:
    result = cq.improve(prepared_every_layer(), DATA)
    reasons = {(n.node, n.algorithm): n.reason for n in result.not_applied}
    assert reasons == {
        ("mean", "gptq"): "its weight is exact when rounded to nearest",
        ("mean", "bias_correction"): "it has no bias",
    }
    assert "mean: no gptq: its weight is exact" in result.table()


def test_shared_weights_are_left_alone() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.linear(torch.relu(self.linear(x))))

    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(Twice().eval(), (x,)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global("a8w4"))
    prepared(x)
    result = cq.improve(prepared, x)
    assert [layer.module for layer in result.layers] == ["head"]
    assert {n.reason for n in result.not_applied} == {
        "its weight is used more than once, so one layer cannot have it changed"
    }


@pytest.mark.parametrize("scheme", ["dyn8w4g32", "a8w4-biasfloat", "a8w4-bias8", "a8w4-per_tensor"])
def test_other_schemes(scheme: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)
        ).eval()
        x = torch.randn(256, 64) @ torch.randn(64, 64)
    error = []
    for improved in (False, True):
        exported = torch.export.export(model, (x,)).module()
        prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global(scheme))
        prepared(x)
        if improved:
            cq.improve(prepared, x)
        converted = convert_pt2e(prepared)
        with torch.no_grad():
            error.append(float((converted(x) - model(x)).square().mean()))
    assert error[1] < error[0] / 2


def test_what_cannot_be_improved_is_refused() -> None:
    prepared = prepared_every_layer()
    with pytest.raises(ConfigError, match="no algorithm 'gptk'; did you mean gptq"):
        cq.improve(prepared, DATA, ["bias_correction", "gptk"])
    with pytest.raises(ConfigError, match="a list of algorithms"):
        cq.improve(prepared, DATA, "gptq")
    with pytest.raises(ConfigError, match="choose from equalization"):
        cq.improve(prepared, DATA, [])
    with pytest.raises(CalibrationError, match="no full batch"):
        cq.improve(prepared, [])
    unseen = prepared_every_layer()
    reset_statistics(unseen)
    with pytest.raises(CalibrationError, match="never saw data"):
        cq.improve(unseen, DATA)
