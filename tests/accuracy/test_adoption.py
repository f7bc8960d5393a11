"""Training starts from the integers that improving after calibration found."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.training import captured, images, made, prepared_for
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.errors import CalibrationError, TrainingError
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat
from custom_quantizer.training.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize

DATA = images(64, seed=5)


@cache
def _improved(scheme: str, *algorithms: str) -> GraphModule:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    prepared = prepare_pt2e(captured(made(train=False)), quantizer)
    cq.calibrate(prepared, DATA.split(32))
    cq.improve(prepared, DATA.split(32), algorithms or ("gptq", "bias_correction"))
    return prepared


def improved(scheme: str, *algorithms: str) -> GraphModule:
    return copy.deepcopy(_improved(scheme, *algorithms))


def integers(converted: GraphModule) -> dict[str, tuple[object, ...]]:
    """Weight, bias and ranges of each layer."""
    return {
        op.node.name: (
            op.weight,
            op.bias,
            tuple((q.scale, q.zero_point) for q in (*op.inputs, op.output)),
        )
        for op in read_converted(converted).integer
        if op.weight is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "trained", "train"),
    [
        ("a4w4-histogram", "a4w4-lsq", True),
        pytest.param("a8w3", "a8w3", True, marks=pytest.mark.slow),
        pytest.param(
            "a8w8-per_tensor", "a8w8-per_tensor-lsq_weights", False, marks=pytest.mark.slow
        ),
        pytest.param("a8w4-bias8", "a8w4-bias8", True, marks=pytest.mark.slow),
        pytest.param("a8w4-biasfloat", "a8w4-biasfloat", False, marks=pytest.mark.slow),
    ],
)
def test_the_first_integers_are_the_improved_ones(scheme: str, trained: str, train: bool) -> None:
    """Before the first step; and the whole network computes the same, bit for bit."""
    start = improved(scheme)
    prepared = prepared_for(trained, train=train)
    adoption = cq.adopt(prepared, start)
    assert not adoption.left
    assert not adoption.left_ranges
    assert len(adoption.layers) == 7  # the mean over an image is one, too
    qat.evaluation_mode(prepared)
    x = images(16, seed=9)
    with torch.no_grad():
        trained_now = prepared(x)
    before, after = convert_pt2e(start), convert_pt2e(prepared)
    wanted, got = integers(before), integers(after)
    assert [*wanted] == [*got]
    for name, (weight, bias, ranges) in wanted.items():
        assert ranges == got[name][2]
        for one, other in ((weight, got[name][0]), (bias, got[name][1])):
            assert one is other or torch.equal(one, other)
    assert torch.equal(before(x), after(x))
    assert torch.equal(before(x), trained_now)


def test_norms_between_layers_are_looked_at_as_well() -> None:
    """What a match of theirs asks for, a shape, no observer has recorded."""

    def captured_now() -> GraphModule:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
        return torch.export.export(model, (DATA[:2, :, :8, :8],)).module()

    start = prepare_pt2e(captured_now(), cq.IntegerQuantizer().set_global("a8w4"))
    cq.calibrate(start, [DATA[:2, :, :8, :8]])
    prepared = prepare_qat_pt2e(captured_now(), cq.IntegerQuantizer().set_global("a8w4"))
    adoption = cq.adopt(prepared, start)
    assert {"conv2d", "conv2d_1"} <= {*adoption.layers}


@pytest.mark.slow
def test_improved_weights_start_in_the_middle_of_their_integers() -> None:
    """At the edge, towards the float weight, the first steps would take the improvement back."""
    prepared = prepared_for("a4w4-lsq")
    cq.adopt(prepared, improved("a4w4-histogram"))
    assert max(offsets(prepared)) < 1e-4
    prepared = prepared_for("a4w4-lsq")
    cq.adopt(prepared, improved("a4w4-histogram", "bias_correction"))
    exact, *others = sorted(offsets(prepared))  # a mean over images, and the float weights
    assert exact < 1e-4
    assert min(others) > 0.4


def offsets(prepared: GraphModule) -> list[float]:
    """Of each weight, the largest distance from its integer, in steps."""
    found: list[float] = []

    def measure(module: WeightFakeQuantize, args: tuple[Tensor], _output: Tensor) -> None:
        (weight,) = args
        steps = weight / module.dequantized(torch.ones_like(weight), module.step_scale)
        integers = module.integers(weight, module.step_scale)
        found.append(float((steps - integers).detach().abs().max()))

    for module in prepared.modules():
        if isinstance(module, WeightFakeQuantize):
            module.register_forward_hook(measure)  # type: ignore[arg-type]
    qat.evaluation_mode(prepared)(DATA[:2])
    return found


@pytest.mark.slow
def test_finetune_knows_what_was_adopted(tmp_path: Path) -> None:
    """Batch norms are frozen from the first step, and the learning rate is a smaller one."""
    batches = [(images(32, seed=1), torch.arange(32).remainder(4))]
    start = improved("a4w4-histogram")
    path = tmp_path / "training.ckpt"

    def statistics(graph: GraphModule) -> dict[str, Tensor]:
        state = graph.state_dict().items()
        return {name: value.clone() for name, value in state if ".running_" in name}

    prepared = prepared_for("a4w4-lsq")
    cq.adopt(prepared, start)
    before = statistics(prepared)
    summary = qat.finetune(copy.deepcopy(prepared), batches, checkpoint=path)
    assert summary.learning_rate == qat.learning_rate_for(4, adopted_steps=1)
    plain = qat.learning_rate_for(4)
    by_steps = [qat.learning_rate_for(4, adopted_steps=n) / plain for n in (1, 30, 115, 200, 900)]
    assert by_steps == pytest.approx([0.1, 0.1, 0.55, 1.0, 1.0])
    twice = qat.finetune(copy.deepcopy(prepared), batches * 115, epochs=2)
    assert twice.learning_rate == plain
    qat.finetune(prepared, batches)
    assert before.keys() == statistics(prepared).keys()
    assert all(torch.equal(before[name], value) for name, value in statistics(prepared).items())
    qat.finetune(prepared, batches, recipe=qat.Recipe(freeze_batch_norms=1.0))
    assert not all(torch.equal(before[name], v) for name, v in statistics(prepared).items())
    with pytest.raises(TrainingError, match="a checkpoint of another graph"):
        qat.finetune(prepared_for("a4w4-lsq"), batches, checkpoint=path)


def test_a_corrected_bias_is_not_counted_twice() -> None:
    """Statistics of the batch replace the running mean, and nothing else of a batch norm."""
    original = made()
    prepared = prepared_for("a4w4-lsq")
    cq.adopt(prepared, improved("a4w4-histogram"))
    state, before = prepared.state_dict(), original.state_dict()
    for name in ("stem_norm", "depthwise_norm", "hidden_norm"):
        for part in ("weight", "bias", "running_var"):
            assert torch.equal(state[f"{name}.{part}"], before[f"{name}.{part}"])
        assert not torch.equal(state[f"{name}.running_mean"], before[f"{name}.running_mean"])


@pytest.mark.parametrize(("scheme", "trained"), [("a4w4-histogram", "a4w4-lsq"), ("a8w3", "a8w3")])
def test_training_starts_at_the_adopted_ranges(scheme: str, trained: str) -> None:
    """Without calibrating again; where they are not learned, they stay."""
    prepared = prepared_for(trained)
    cq.adopt(prepared, improved(scheme))
    ranges = solved(prepared)
    x = images(32, seed=1)
    batches = [(x, torch.arange(32).remainder(4))]
    qat.finetune(prepared, batches, recipe=qat.Recipe(learning_rate=1e-12))
    assert solved(prepared) == ranges
    qat.finetune(prepared, batches, recipe=qat.Recipe(learning_rate=1.0))
    assert (solved(prepared) == ranges) == (trained == "a8w3")


def solved(prepared: GraphModule) -> list[tuple[object, int]]:
    observers = (m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize))
    return [(o.qparams().scale, o.qparams().zero_point) for o in observers]


def test_what_does_not_fit_is_said() -> None:
    start = improved("a4w4-histogram")
    prepared = prepared_for("a4w3-lsq")
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    message = "no rounded layer in common: conv2d: its weight is int3 per_channel here and int4"
    with pytest.raises(TrainingError, match=message):
        cq.adopt(prepared, start)
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    quantizer = cq.IntegerQuantizer().set_global("a4w4").set_module_name("plain", "a8w4")
    mixed = prepare_qat_pt2e(captured(made()), quantizer)
    adoption = cq.adopt(mixed, start)
    assert len(adoption.layers) == 6
    assert adoption.left == {"conv2d_2": "its bias is rounded with another input scale"}
    assert adoption.left_ranges == dict.fromkeys(
        ("conv_transpose2d", "relu_1"), "it is not quantized to this format there"
    )
    assert "; range of relu_1: it is not quantized" in str(adoption)


def test_what_cannot_be_started_from_is_refused() -> None:
    prepared, start = prepared_for("a4w4-lsq"), improved("a4w4-histogram")
    with pytest.raises(TrainingError, match="pass what prepare_qat_pt2e returns first"):
        cq.adopt(start, prepared)
    with pytest.raises(CalibrationError, match="prepared for training, too"):
        cq.adopt(prepared, prepared)
    rescaled = improved("a8w8-per_tensor", "equalization")
    with pytest.raises(TrainingError, match="improved by equalization, whose factors"):
        cq.adopt(prepared_for("a8w8-per_tensor"), rescaled)


@pytest.mark.slow
def test_a_little_training_from_improved_weights_beats_as_much_from_plain_ones() -> None:
    """ResNet-20 at a4w4, five batches: accuracy on 1,000 test images; weights stay what they are.

    Started at the edges of their integers, 25 weights leave them.
    """
    train, labels = cifar10_calibration(512)
    test, wanted = cifar10_test(1000)
    batches = list(zip(train[:320].split(64), labels[:320].split(64), strict=True))
    shapes = ({0: torch.export.Dim("batch", min=1, max=512)},)

    def graph() -> GraphModule:
        return torch.export.export(resnet20(), (train[:2],), dynamic_shapes=shapes).module()

    def right(converted: GraphModule) -> int:
        with torch.no_grad():
            outputs = [converted(x).argmax(1) for x in test.split(250)]
        return int((torch.cat(outputs) == wanted).sum())

    def weights(converted: GraphModule) -> list[Tensor]:
        return [op.weight for op in read_converted(converted).integer if op.weight is not None]

    start = prepare_pt2e(graph(), cq.IntegerQuantizer().set_global("a4w4-histogram"))
    cq.calibrate(start, train.split(64))
    cq.improve(start, train.split(64))
    found = []
    for source in (None, start):
        quantizer = cq.IntegerQuantizer().set_global("a4w4-lsq")
        prepared = prepare_qat_pt2e(graph(), quantizer)
        if source is not None:
            assert not cq.adopt(prepared, source).left
        qat.finetune(prepared, batches)
        found.append(convert_pt2e(prepared))
    plain, improved = found
    assert right(improved) > right(plain)
    before = convert_pt2e(start)
    assert right(improved) >= right(before) - 5
    pairs = zip(weights(before), weights(improved), strict=True)
    assert sum(int((a != b).sum()) for a, b in pairs) == 0
