"""Quantization-aware training: learned scales, and who prepares what."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.models import torchvision_model
from support.training import (
    captured,
    images,
    made,
    prepared_for,
    some_steps,
)
from torch import Tensor, nn
from torchao.quantization.pt2e import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    move_exported_model_to_eval,
)
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import custom_quantizer as cq
from custom_quantizer.core.graph import is_quantize, qparams_of
from custom_quantizer.errors import (
    CaptureError,
    ConfigError,
)
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
    BiasFakeQuantize,
    WeightFakeQuantize,
)

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
    # Row by row, as on the device; but for the order of sums in float32 the same numbers.
    reference = cq.integer_reference(convert_pt2e(prepared))
    torch.testing.assert_close(reference(x), expected, rtol=1e-5, atol=1e-6)


# -- who prepares -------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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
