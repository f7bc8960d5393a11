"""Quantization-aware training: what is trained is what ships."""

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
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.models import torchvision_model
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization.pt2e import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import custom_quantizer as cq
from custom_quantizer.core.bias import quantize_bias
from custom_quantizer.core.graph import is_quantize, qparams_of
from custom_quantizer.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ConversionError,
    InputError,
    TrainingError,
)
from custom_quantizer.ops.rewrites.training_graph import training_mode_of
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
    BiasFakeQuantize,
    WeightFakeQuantize,
)

SCHEMES = (
    "a8w8",
    "a8w8-per_tensor",
    "a8w4-bias8",
    "a4w4-lsq",
    "a6w6-lsq_weights-histogram",
    "a8w8-per_tensor-lsq",
    "a16w8",
    "a8w8-biasfloat",
    "a2w2",
)


class Everything(nn.Module):
    """Every kind of layer with a batch norm behind it, bias or not; a residual; a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)
        self.up_norm = nn.BatchNorm2d(6, affine=False)
        self.plain = nn.Conv2d(6, 6, 1)
        self.drop = nn.Dropout(0.2)
        self.hidden = nn.Linear(6, 16, bias=False)
        self.hidden_norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + F.relu6(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.plain(self.up_norm(self.up(x))))
        x = self.drop(x.mean((2, 3)))
        x = torch.relu(self.hidden_norm(self.hidden(x)))
        return cast(Tensor, self.head(x))


class Grouped(nn.Module):
    """Groups of channels in a transposed convolution, which torchao's own folding gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(3, 6, 2, 2, groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class Layered(nn.Module):
    """One dimension: convolution, transposed convolution, batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 4, 2, 2),
            nn.BatchNorm1d(4),
            nn.ReLU6(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x.flatten(2)))


def made(build: Callable[[], nn.Module] = Everything, train: bool = True) -> nn.Module:
    torch.manual_seed(3)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
    return model.train(train)


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module) -> GraphModule:
    shapes = ({0: torch.export.Dim("batch", min=2, max=256)},)
    return torch.export.export(model, (images(4),), dynamic_shapes=shapes).module()


def prepared_for(
    scheme: str = "a8w8", build: Callable[[], nn.Module] = Everything, train: bool = True
) -> GraphModule:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    return prepare_qat_pt2e(captured(made(build, train)), quantizer)


def some_steps(prepared: GraphModule, count: int = 6) -> None:
    """The usual loop of a user who ignores ``finetune``."""
    move_exported_model_to_train(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, momentum=0.9)
    for i in range(count):
        x = images(32, seed=i)
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("scheme", "train"),
    [
        *(pytest.param(scheme, True, id=f"captured in train-{scheme}") for scheme in SCHEMES),
        *(
            # How a model was captured is no matter of the scheme.
            pytest.param(
                *(scheme, False),
                id=f"captured in eval-{scheme}",
                marks=() if scheme == "a8w8" else pytest.mark.slow,
            )
            for scheme in SCHEMES
        ),
    ],
)
def test_what_is_evaluated_in_training_is_what_is_converted(scheme: str, train: bool) -> None:
    """Not a single value differs between the last fake-quantized forward and the integers' graph.

    Folding uses one function for both, so there is no rounding to explain.
    """
    prepared = prepared_for(scheme, train=train)
    some_steps(prepared)
    move_exported_model_to_eval(prepared)
    # An observer that stands in several places would move between them.
    qat.freeze_observers(prepared)
    with torch.no_grad():
        expected = prepared(images(64, seed=99))
        converted = convert_pt2e(prepared)
        got = converted(images(64, seed=99))
    assert torch.equal(expected, got)


@pytest.mark.parametrize(
    ("scheme", "build"),
    [
        # Every scheme and every network once; all pairs are slow.
        pytest.param(
            *(scheme, build),
            id=f"{scheme}-{build.__name__}",
            marks=() if build is Everything or scheme == "a8w8" else pytest.mark.slow,
        )
        for scheme in ("a8w8", "a8w8-per_tensor", "a4w4-lsq", "a8w6-bias16")
        for build in (Everything, Layered, Grouped)
    ],
)
def test_every_converted_bias_is_an_integer(scheme: str, build: Callable[[], nn.Module]) -> None:
    prepared = prepared_for(scheme, build)
    some_steps(prepared)
    move_exported_model_to_eval(prepared)
    graph = read_converted(convert_pt2e(prepared))
    layers = [op for op in graph.integer if op.weight is not None]
    # A mean over a dynamic batch is a layer with constant weights: no bias is invented for it.
    biases = [op.bias for op in layers if op.bias is not None]
    assert len(biases) == {Everything: 6, Layered: 2, Grouped: 1}[build]
    assert all(bias.dtype == torch.int32 for bias in biases)
    assert not graph.floating


def test_the_integers_of_a_folded_bias() -> None:
    """By hand: beta + (b - mean) gamma / sigma, divided by s_x s_w, rounded once."""
    model = made()
    prepared = prepare_qat_pt2e(captured(model), cq.IntegerQuantizer().set_global("a8w8"))
    some_steps(prepared)
    move_exported_model_to_eval(prepared)
    conv, norm = prepared.depthwise, prepared.depthwise_norm
    sigma = torch.sqrt(norm.running_var.double() + 1e-5)
    folded = norm.bias + (conv.bias - norm.running_mean) * norm.weight / sigma
    converted = convert_pt2e(prepared)
    (op,) = [op for op in read_converted(converted).integer if op.node.name == "conv2d_1"]
    assert op.bias is not None
    assert op.weight_qparams is not None
    by_hand = quantize_bias(
        folded.detach(), cast(float, op.inputs[0].scale), cast(Tensor, op.weight_qparams.scale)
    )
    # The graph folds in float32, so an integer may be off by its relative rounding error.
    error = (op.bias.double() - by_hand.double()).abs()
    assert bool((error <= 1 + by_hand.double().abs() * 2.0**-20).all())
    assert bool((op.bias != 0).any())


@pytest.mark.parametrize(
    "scheme",
    ["a8w8", "a4w4-lsq", pytest.param("a8w8-per_tensor-histogram", marks=pytest.mark.slow)],
)
def test_the_program_computes_what_the_reference_does(scheme: str) -> None:
    prepared = prepared_for(scheme)
    some_steps(prepared)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    lowered = cq.lower(converted, (images(4),))
    assert lowered.report.delegates == 1
    reference = cq.integer_reference(converted)
    assert not reference.float_ops
    assert torch.equal(lowered.run(images(16, 5)), reference(images(16, 5)))


# -- the derived bias is simulated --------------------------------------------------------------


class Biased(nn.Module):
    """A convolution whose input is zero: what comes out is its bias."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0.5, -0.7, 0.9]).reshape(4, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.31, -0.42, 0.77, 0.05]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(x)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 32])
def test_the_forward_pass_adds_the_integer_bias(norm: bool, bits: int) -> None:
    torch.manual_seed(0)
    quantizer = cq.IntegerQuantizer().set_global(f"a8w8-bias{bits}")
    example = (torch.randn(2, 1, 2, 2),)
    graph = torch.export.export(Biased(norm).eval(), example).module()
    prepared = prepare_qat_pt2e(graph, quantizer)
    prepared(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2))
    prepared.apply(disable_observer)
    biases = [m for m in prepared.modules() if isinstance(m, BiasFakeQuantize)]
    outputs = [m for m in prepared.modules() if isinstance(m, ActivationFakeQuantize)][-1:]
    for module in outputs:
        module.disable_fake_quant()
    zero = torch.zeros(2, 1, 2, 2)
    with torch.no_grad():
        simulated = prepared(zero)[0, :, 0, 0]
        for module in biases:
            module.disable_fake_quant()
        exact = prepared(zero)[0, :, 0, 0]
        for module in (*biases, *outputs):
            module.enable_fake_quant()
    assert not torch.equal(simulated, exact)
    converted = convert_pt2e(prepared)
    (op,) = [op for op in read_converted(converted).integer if op.bias is not None]
    assert op.bias is not None
    assert op.weight_qparams is not None
    unit = torch.tensor(op.inputs[0].scale) * cast(Tensor, op.weight_qparams.scale)
    assert torch.allclose(simulated, op.bias * unit, rtol=1e-6, atol=0)


def test_the_bias_follows_the_scales_of_its_step() -> None:
    """A wider input makes a coarser bias, in the same forward pass."""
    graph = torch.export.export(Biased(False), (torch.randn(2, 1, 2, 2),)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    (bias,) = [m for m in prepared.modules() if isinstance(m, BiasFakeQuantize)]
    seen: list[Tensor] = []
    bias.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    weight = prepared.conv.weight.detach().flatten()
    scale = weight.abs() / 127
    for reach in (1.0, 1000.0):
        for module in prepared.modules():
            if isinstance(module, ActivationFakeQuantize):
                module.count.zero_()
                module.min_val.fill_(torch.inf)
                module.max_val.fill_(-torch.inf)
        prepared(torch.full((2, 1, 2, 2), reach))
        unit = torch.tensor(reach / 255) * scale
        steps = seen[-1] / unit
        assert torch.allclose(steps, steps.round(), rtol=1e-5)
        assert bool(((seen[-1] - prepared.conv.bias.detach()).abs() <= 0.5001 * unit).all())
    assert not torch.equal(seen[0], seen[1])


def test_gradients_pass_straight_through_the_bias() -> None:
    graph = torch.export.export(Biased(False), (torch.randn(2, 1, 2, 2),)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8-bias4"))
    prepared(torch.randn(2, 1, 2, 2)).sum().backward()
    assert torch.equal(prepared.conv.bias.grad, torch.full((4,), 8.0))


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-lsq_weights"])
def test_a_bias_too_large_for_the_accumulator_raises_the_weight_scale(scheme: str) -> None:
    model = Biased(False)
    with torch.no_grad():
        cast(Tensor, model.conv.bias)[0] = 3000.0
    graph = torch.export.export(model, (torch.randn(2, 1, 2, 2),)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global(scheme))
    x = torch.randn(2, 1, 2, 2) * 1e-3
    prepared(x).sum().backward()  # the scale is raised from the second pass on
    prepared(x).sum().backward()
    prepared.apply(disable_observer)
    with torch.no_grad():
        expected = prepared(x)
        converted = convert_pt2e(prepared)
        assert torch.equal(converted(x), expected)
    (op,) = [op for op in read_converted(converted).integer if op.bias is not None]
    assert int(cast(Tensor, op.bias).abs().max()) <= 1 << 21


# -- batch norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Everything, Layered, Grouped])
def test_without_rounding_a_step_is_that_of_the_float_model(
    build: Callable[[], nn.Module],
) -> None:
    """Outputs, gradients and running statistics, with the model's own eps and momentum."""
    eager = made(build)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prepared = prepare_qat_pt2e(
        captured(copy.deepcopy(eager)), cq.IntegerQuantizer().set_global("a8w8")
    )
    qat.rounding(prepared, False)
    # In double precision, so that what is left is no rounding.
    eager, prepared = eager.double(), prepared.double()
    x = images(16).double()
    for _ in range(3):
        expected, got = eager(x), prepared(x)
        assert torch.allclose(expected, got, rtol=1e-5, atol=1e-6)
    expected.square().mean().backward()
    got.square().mean().backward()
    trained = dict(prepared.named_parameters())
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-9:
            assert torch.allclose(parameter.grad, trained[name].grad, rtol=1e-3, atol=1e-6), name
    buffers = dict(prepared.named_buffers())
    for name, buffer in eager.named_buffers():
        if "running" in name:
            assert torch.allclose(buffer, buffers[name], rtol=1e-5, atol=1e-6), name


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    prepared = prepared_for()
    qat.freeze_batch_norms(prepared)
    before = {n: b.clone() for n, b in prepared.named_buffers() if "running" in n}
    some_steps(prepared, 2)
    assert before
    assert all(torch.equal(before[n], b) for n, b in prepared.named_buffers() if n in before)
    qat.freeze_batch_norms(prepared, frozen=False)
    some_steps(prepared, 1)
    assert any(not torch.equal(before[n], b) for n, b in prepared.named_buffers() if n in before)


def test_modes_switch_the_way_pt2e_does() -> None:
    prepared = prepared_for(train=False)
    before = {n: b.clone() for n, b in prepared.named_buffers() if "running" in n}
    prepared(images())
    assert all(torch.equal(before[n], b) for n, b in prepared.named_buffers() if n in before)
    move_exported_model_to_train(prepared)
    prepared(images())
    moved = {n: b.clone() for n, b in prepared.named_buffers() if n in before}
    assert all(not torch.equal(before[n], b) for n, b in moved.items())
    move_exported_model_to_eval(prepared)
    prepared(images())
    assert all(torch.equal(moved[n], b) for n, b in prepared.named_buffers() if n in moved)


class Literal(nn.Module):
    """A dropout and a batch norm that cannot be folded, with numbers that are no defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=0.25, momentum=0.01)
        self.conv = nn.Conv2d(3, 4, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.drop(self.conv(self.norm(x))))


def _literals(prepared: GraphModule) -> list[Any]:
    aten = torch.ops.aten
    found = []
    for node in prepared.graph.nodes:
        if node.target is aten.batch_norm.default:
            found.append((node.args[5], node.args[6], node.args[7]))
        if node.target is aten.dropout.default and node.args[1] != 0.5:
            found.append((node.args[2], node.args[1]))
    return found


def test_modes_keep_the_numbers_of_the_model() -> None:
    """torchao 0.18 forgets them, which is pinned here; ``training_mode`` does not."""
    prepared = prepared_for(build=Literal, train=False)
    assert _literals(prepared) == [(False, 0.01, 0.25), (False, 0.1)]
    assert _literals(qat.training_mode(prepared)) == [(True, 0.01, 0.25), (True, 0.1)]
    assert _literals(qat.evaluation_mode(prepared)) == [(False, 0.01, 0.25), (False, 0.1)]
    move_exported_model_to_train(prepared)
    assert _literals(prepared) == [(True, 0.1, 1e-5)]  # and the dropout has p=0.5 now


def test_nothing_is_rounded_behind_a_dropout() -> None:
    """Else its scaling would widen the range that ships."""
    prepared = prepared_for()
    (drop,) = [
        n for n in prepared.graph.nodes
        if n.target is torch.ops.aten.dropout.default and n.args[1] != 0.5
    ]  # fmt: skip
    assert [user.target for user in drop.users] == [torch.ops.aten.linear.default]
    some_steps(prepared)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    assert not any(n.target is torch.ops.aten.dropout.default for n in converted.graph.nodes)


def test_converting_in_training_mode_is_refused() -> None:
    prepared = prepared_for()
    some_steps(prepared, 1)
    with pytest.raises(
        ConversionError, match=r"dropout.* training mode; call .*move_exported_model_to_eval"
    ):
        convert_pt2e(prepared)


# -- learned scales -----------------------------------------------------------------------------


def test_gradients_of_learned_scales() -> None:
    """Esser et al., equation 3, on numbers small enough to check by hand."""
    scheme = cq.scheme("a4w4-lsq", symmetric_activations=True).activation
    module = ActivationFakeQuantize(scheme, dtype=torch.int8)
    with torch.no_grad():
        module.scale.fill_(0.5)
        module.initialized.fill_(1)
    x = torch.tensor([0.6, -0.9, 7.0, -9.0], requires_grad=True)
    out = module(x)
    assert out.tolist() == [0.5, -1.0, 3.5, -4.0]
    out.sum().backward()
    # Inside: round(v) - v with v = 1.2 and -1.8; outside: 7 and -8.
    expected = ((1 - 1.2) + (-2 + 1.8) + 7 - 8) / math.sqrt(4 * 7)
    assert module.scale.grad is not None
    assert float(module.scale.grad) == pytest.approx(expected, rel=1e-5)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_gradients_of_learned_zero_points() -> None:
    """Bhalgat et al., equation 6: what is clipped moves the zero point."""
    module = ActivationFakeQuantize(cq.scheme("a4w4-lsq").activation, dtype=torch.int8)
    with torch.no_grad():
        module.scale.fill_(0.5)
        module.zero_point.fill_(-2.0)
        module.initialized.fill_(1)
    x = torch.tensor([0.6, 7.0, -9.0], requires_grad=True)
    out = module(x)
    assert out.tolist() == [0.5, 4.5, -3.0]
    (out * torch.tensor([1.0, 1.0, 3.0])).sum().backward()
    assert module.zero_point.grad is not None
    expected = -0.5 * (1 + 3) / math.sqrt(3 * 7)
    assert float(module.zero_point.grad) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("axis", [0, 1])
def test_learned_weight_scales_start_at_the_least_error(granularity: Any, axis: int) -> None:
    torch.manual_seed(0)
    scheme = cq.scheme("a4w4-lsq", weight_granularity=granularity).weight
    weight = torch.randn(6, 6, 3, 3) * torch.rand(6, 6, 1, 1)
    plain = WeightFakeQuantize(cq.scheme("a4w4", weight_granularity=granularity).weight, axis,
                               channels=6, dtype=torch.int8)  # fmt: skip
    learned = WeightFakeQuantize(scheme, axis, channels=6, dtype=torch.int8)
    error = [float((m(weight) - weight).square().sum()) for m in (learned, plain)]
    assert error[0] < 0.9 * error[1]
    learned(weight).square().sum().backward()
    assert learned.scale_parameter.grad is not None
    assert learned.scale_parameter.grad.shape == ((6,) if granularity == "per_channel" else ())


def test_learned_scales_learn_and_ship() -> None:
    prepared = prepared_for("a4w4-lsq")
    prepared(images())
    before = [
        float(m.scale) for m in prepared.modules()
        if isinstance(m, ActivationFakeQuantize)
    ]  # fmt: skip
    some_steps(prepared, 10)
    move_exported_model_to_eval(prepared)
    after = {
        float(m.scale.detach().abs()) for m in prepared.modules()
        if isinstance(m, ActivationFakeQuantize)
    }  # fmt: skip
    assert not after & set(before)
    converted = convert_pt2e(prepared)
    shipped = {
        cast(float, qparams_of(converted, n).scale) for n in converted.graph.nodes if is_quantize(n)
    }
    assert shipped == after


def test_after_training_lsq_is_what_histogram_finds() -> None:
    """Without a training the learned scale is where learning would start."""
    graphs = []
    for scheme in ("a4w4-histogram", "a4w4-lsq_activations"):
        quantizer = cq.IntegerQuantizer().set_global(scheme)
        prepared = prepare_pt2e(captured(made(train=False)), quantizer)
        prepared(images(64))
        graphs.append(convert_pt2e(prepared))
    assert torch.equal(graphs[0](images(8, 7)), graphs[1](images(8, 7)))


def test_scales_of_groups_are_not_learned() -> None:
    quantizer = cq.IntegerQuantizer().set_global("dyn8w4g32-lsq_weights")
    graph = torch.export.export(nn.Linear(64, 4), (torch.randn(2, 64),)).module()
    with pytest.raises(ConfigError, match="weight groups cannot be learned"):
        prepare_qat_pt2e(graph, quantizer)


@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4", "dyn8w4g32"])
def test_activations_quantized_at_run_time_are_trained_too(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(16, 64)
    graph = torch.export.export(model, (x,)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global(scheme))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    first = None
    for _ in range(20):
        loss = prepared(x).square().mean()
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * cast(float, first)
    expected = prepared(x)
    assert torch.equal(convert_pt2e(prepared)(x), expected)


# -- who prepares -------------------------------------------------------------------------------


def test_the_caller_decides_between_observers_and_fake_quantizers() -> None:
    """torchao 0.18 does not tell a quantizer; also through ComposableQuantizer."""
    for wrap in (lambda q: q, lambda q: ComposableQuantizer([q])):
        quantizer = cq.IntegerQuantizer().set_global("a8w8")
        observed = prepare_pt2e(captured(made(train=False)), wrap(quantizer))
        trained = prepare_qat_pt2e(captured(made()), wrap(quantizer))
        assert not any(isinstance(m, WeightFakeQuantize) for m in observed.modules())
        assert sum(isinstance(m, BiasFakeQuantize) for m in trained.modules()) == 6


def test_training_mode_is_for_training() -> None:
    with pytest.raises(CaptureError, match=r"model\.eval\(\).*prepare_qat_pt2e"):
        prepare_pt2e(captured(made()), cq.IntegerQuantizer().set_global("a8w8"))


def test_in_the_place_of_xnnpack_quantizer() -> None:
    """A QAT script changes one import; its config says moving averages, and no bias: derived."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    prepared = prepare_qat_pt2e(captured(made()), cq.IntegerQuantizer().set_global(config))
    some_steps(prepared, 2)
    move_exported_model_to_eval(prepared)
    assert len(read_converted(convert_pt2e(prepared)).with_bias()) == 6


def test_beside_another_quantizer() -> None:
    """Ours trains its part with derived biases; the other one's part is its own affair."""
    ours = cq.IntegerQuantizer().set_module_name("head", "a8w4").set_module_name("hidden", "a8w4")
    other = XNNPACKQuantizer().set_module_name(
        "plain", get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    )
    model = made()
    # torchao's own fusion wants a batch norm with weights.
    model.up_norm = nn.BatchNorm2d(6)
    prepared = prepare_qat_pt2e(captured(model), ComposableQuantizer([ours, other]))
    some_steps(prepared, 3)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    found = {op.node.name: op for op in read_converted(converted).with_bias()}
    assert set(found) == {"linear", "linear_1"}
    assert all(op.bias is not None and op.bias.dtype == torch.int32 for op in found.values())


def test_two_of_ours_side_by_side() -> None:
    first = cq.IntegerQuantizer().set_module_name("stem", "a8w4").set_module_name("plain", "a8w4")
    names = ("depthwise", "up", "hidden", "head")
    second = cq.IntegerQuantizer()
    for name in names:
        second.set_module_name(name, "a8w8-bias16")
    prepared = prepare_qat_pt2e(captured(made()), ComposableQuantizer([first, second]))
    some_steps(prepared, 3)
    qat.evaluation_mode(prepared)
    qat.freeze_observers(prepared)
    expected = prepared(images())
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(images()), expected)
    found = {op.node.name: op.formats.weight_bits for op in read_converted(converted).with_bias()}
    assert found == {
        "conv2d": 4,
        "conv2d_1": 8,
        "conv_transpose2d": 8,
        "conv2d_2": 4,
        "linear": 8,
        "linear_1": 8,
    }


def test_layers_left_in_float_keep_their_batch_norms() -> None:
    eager = made(train=False)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("up", None)
    prepared = prepare_qat_pt2e(captured(copy.deepcopy(eager)), quantizer)
    qat.rounding(prepared, False)
    with torch.no_grad():
        assert torch.allclose(prepared(images()), eager(images()), atol=1e-5)
    qat.rounding(prepared, True)
    prepared(images())
    floats = {op.node.name for op in read_converted(convert_pt2e(prepared)).floating}
    assert "conv_transpose2d" in floats


def test_a_copy_of_a_prepared_graph_stands_alone() -> None:
    prepared = prepared_for("a8w8-bias8")
    prepared(images())
    twin = copy.deepcopy(prepared)
    some_steps(prepared, 3)
    for module in twin.modules():
        if isinstance(module, BiasFakeQuantize):
            assert module._input.module in set(twin.modules())
            assert module._weight.module in set(twin.modules())
    move_exported_model_to_eval(twin)
    qat.freeze_observers(twin)
    expected = twin(images())
    assert torch.equal(convert_pt2e(twin)(images()), expected)


def test_torchao_helpers_switch_rounding_off() -> None:
    eager = made(train=False)
    prepared = prepare_qat_pt2e(
        captured(copy.deepcopy(eager)), cq.IntegerQuantizer().set_global("a4w4")
    )
    prepared.apply(disable_fake_quant)
    with torch.no_grad():
        assert torch.allclose(prepared(images()), eager(images()), atol=1e-5)
        prepared.apply(enable_fake_quant)
        assert not torch.allclose(prepared(images()), eager(images()), atol=1e-2)


def test_a_model_without_batch_norm_or_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    prepared = prepare_qat_pt2e(captured(model), cq.IntegerQuantizer().set_global("a8w8"))
    some_steps(prepared, 3)
    expected = prepared(images())
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(images()), expected)
    assert [op.bias is None for op in read_converted(converted).integer if op.weight is not None] \
        == [True, False]  # fmt: skip


class Token(nn.Module):
    """A weight and a token that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5, -0.5, 0.7, 2.0]))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        weight = self.linear.weight * self.gain[:, None]
        return F.linear(x, weight, self.linear.bias)


def test_what_is_computed_from_parameters_is_trained_and_ships() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 2, 2)
    graph = torch.export.export(Token(), (x,)).module()
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_qat_pt2e(graph, quantizer)
    assert quantizer.last_plan.op("linear").scheme == "a8w8"
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in prepared.named_parameters())
    prepared.apply(disable_observer)
    expected = prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), expected)
    found = read_converted(converted)
    assert not found.floating
    assert len(found.with_bias()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4-lsq"])
def test_torchvision_models(name: str, scheme: str) -> None:
    """Their batch norms have other eps and momentum; two steps, then all the way to the device."""
    model = torchvision_model(name)
    example = (torch.randn(2, 3, 64, 64),)
    graph = torch.export.export(model, example).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global(scheme))
    qat.training_mode(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    qat.evaluation_mode(prepared)
    qat.freeze_observers(prepared)
    with torch.no_grad():
        expected = prepared(*example)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(*example), expected)
    layers = [op for op in read_converted(converted).integer if op.weight is not None]
    assert layers
    assert all(op.bias is not None and op.bias.dtype == torch.int32 for op in layers)
    lowered = cq.lower(converted, example)
    assert lowered.report.delegates == 1
    reference = cq.integer_reference(converted)
    assert torch.equal(lowered.run(*example), reference(*example))


# -- finetune -----------------------------------------------------------------------------------


def task(count: int = 96) -> tuple[Tensor, Tensor]:
    x = images(count, seed=11)
    x[:, 0] += torch.arange(count).remainder(4).sub(1.5).reshape(-1, 1, 1)
    return x, torch.arange(count).remainder(4)


def loader(shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*task()), batch_size=16, shuffle=shuffle)


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


@pytest.mark.parametrize(
    ("scheme", "optimizer"),
    [
        ("a8w8", "sgd"),
        ("a4w4-lsq", "adam"),
        pytest.param("a8w8", "adam", marks=pytest.mark.slow),
        pytest.param("a4w4-lsq", "sgd", marks=pytest.mark.slow),
        pytest.param("a4w4-percentile", "sgd", marks=pytest.mark.slow),
        pytest.param("a4w4-percentile", "adam", marks=pytest.mark.slow),
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


def test_another_process_resumes(tmp_path: Path) -> None:
    """What tells one training from another says nothing of the process it ran in."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_qat as t\n"
        "t.qat.finetune(t.prepared_for('a4w4-lsq'), t.loader(), checkpoint=sys.argv[2])"
    )
    path = tmp_path / "training.safetensors"
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run(arguments, check=True, capture_output=True, env=environment)
    before = path.read_bytes()
    summary = qat.finetune(prepared_for("a4w4-lsq"), loader(), checkpoint=path)
    assert summary.resumed == summary.steps == 6
    assert path.read_bytes() == before


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
        ([(images(4)[:, :2], torch.zeros(4, dtype=torch.int64))], "The graph takes"),
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
    qat.finetune(prepared_for(), loader(), checkpoint=path)
    for scheme, epochs, message in (("a8w8", 2, "another recipe"), ("a4w4", 1, "another graph")):
        with pytest.raises(TrainingError, match=message):
            qat.finetune(prepared_for(scheme), loader(), epochs=epochs, checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="damaged"):
        qat.finetune(prepared_for(), loader(), checkpoint=path)
    with pytest.raises(InputError, match="Cannot read"):
        qat.finetune(prepared_for(), loader(), checkpoint=tmp_path)


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
