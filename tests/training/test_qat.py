"""Quantization-aware training: what is trained is what ships."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.selection import slow_but
from support.training import (
    Everything,
    Grouped,
    Layered,
    captured,
    images,
    made,
    prepared_for,
    some_steps,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import (
    disable_observer,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_qat_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.core.bias import quantize_bias
from custom_quantizer.errors import (
    ConversionError,
)
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
    BiasFakeQuantize,
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
# Of each: scales per channel and per tensor, observed and learned, narrow, wide; biases, too.
QUICK = ("a8w4-bias8", "a8w8-per_tensor-lsq", "a16w8")


@pytest.mark.parametrize(
    ("scheme", "train"),
    [
        *(
            pytest.param(
                *(scheme, True),
                id=f"captured in train-{scheme}",
                marks=() if scheme in QUICK else pytest.mark.slow,
            )
            for scheme in SCHEMES
        ),
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
        # Every network once, and a narrow bias; all pairs are slow.
        pytest.param(
            *(scheme, build),
            id=f"{scheme}-{build.__name__}",
            marks=()
            if (build is Everything) == (scheme == "a8w6-bias16")
            and scheme in ("a8w8", "a8w6-bias16")
            else pytest.mark.slow,
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
    slow_but(["a8w8"], ["a8w8", "a4w4-lsq", "a8w8-per_tensor-histogram"]),
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


class BiasFirst(nn.Module):
    """Biases that are computed before the weights and inputs that their scales come from."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(3, 4, batch_first=True)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.second.bias * 2.0
        y = torch.tanh(self.first(self.steps(x)[0]))
        return torch.nn.functional.linear(y, self.second.weight * 0.5, bias)


def test_a_bias_that_is_computed_early_follows_the_scales_of_its_step() -> None:
    """The first step rounds it as any other does, and so does the first one behind a checkpoint."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3)
    graph = torch.export.export(BiasFirst(), (x,)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    rounded: dict[str, float] = {}

    def note(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        name = cast(BiasFakeQuantize, module).name
        rounded.setdefault(name, float((given[0] - out).detach().abs().max()))

    for module in prepared.modules():
        if isinstance(module, BiasFakeQuantize):
            module.register_forward_hook(note)
    prepared(x).sum().backward()
    assert len(rounded) == 3
    assert max(rounded.values()) < 1e-3
    prepared(2.0 * x).sum().backward()
    again = torch.export.export(BiasFirst(), (x,)).module()
    resumed = prepare_qat_pt2e(again, cq.IntegerQuantizer().set_global("a8w8"))
    resumed.load_state_dict(prepared.state_dict())
    assert torch.equal(resumed(x), prepared(x))


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
    """A dropout and a batch norm that is not folded, with numbers that are no defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=0.25, momentum=0.01)
        self.conv = nn.Conv2d(3, 4, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        # The factors of the norm are those of the input, too, so that no layer can take them in.
        gamma = self.norm.weight * x.mean((0, 2, 3))
        mean, var = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)
        args = (mean, var, gamma, self.norm.bias, self.norm.training, 0.01, 0.25)
        return cast(Tensor, self.drop(self.conv(F.batch_norm(x, *args))))


def _literals(prepared: GraphModule) -> list[Any]:
    aten = torch.ops.aten
    found = []
    for node in prepared.graph.nodes:
        if node.target is aten.batch_norm.default:
            found.append((node.args[5], node.args[6], node.args[7]))
        if node.target is aten.dropout.default and node.args[1] != 0.5:
            found.append((node.args[2], node.args[1]))
    return found


@pytest.mark.slow
def test_modes_keep_the_numbers_of_the_model() -> None:
    """torchao 0.18 forgets them, which is pinned here; ``training_mode`` does not."""
    prepared = prepared_for(build=Literal, train=False)
    assert _literals(prepared) == [(False, 0.01, 0.25), (False, 0.1)]
    assert _literals(qat.training_mode(prepared)) == [(True, 0.01, 0.25), (True, 0.1)]
    assert _literals(qat.evaluation_mode(prepared)) == [(False, 0.01, 0.25), (False, 0.1)]
    move_exported_model_to_train(prepared)
    assert _literals(prepared) == [(True, 0.1, 1e-5)]  # and the dropout has p=0.5 now


class Drops(nn.Module):
    """What drops in training, and torchao does not switch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 4, 1), nn.Dropout2d(0.3)
        self.rows = nn.LSTM(4, 4, num_layers=2, dropout=0.4, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.2, batch_first=True)
        self.self_normalizing = nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.drop(self.conv(x))[:, :, :2, :2].flatten(2).transpose(1, 2)
        return cast(Tensor, self.self_normalizing(self.attention(self.rows(rows)[0])))


DROPPED = {"feature_dropout.default": 2, "alpha_dropout.default": 2}
"""Position of what says so. Layers that drop inside are written out with dropouts of their own."""


@pytest.mark.slow
def test_modes_switch_what_torchao_leaves() -> None:
    prepared = prepared_for(build=Drops, train=True)

    def switches() -> list[Any]:
        names = [str(node.target).removeprefix("aten.") for node in prepared.graph.nodes]
        nodes = dict(zip(names, prepared.graph.nodes, strict=True))
        return [nodes[name].args[position] for name, position in DROPPED.items()]

    assert switches() == [True, True]
    some_steps(prepared, 1)
    move_exported_model_to_eval(prepared)
    assert switches() == [True, True]
    with pytest.raises(ConversionError, match=r"training mode; call .*qat.evaluation_mode\(prep"):
        convert_pt2e(copy.deepcopy(prepared))
    qat.evaluation_mode(prepared)
    assert switches() == [False, False]
    qat.evaluation_mode(prepared)
    assert switches() == [False, False]
    qat.training_mode(prepared)
    assert switches() == [True, True]
    qat.evaluation_mode(prepared)
    qat.freeze_observers(prepared)
    x = images()
    want = prepared(x)
    assert torch.equal(prepared(x), want)
    assert torch.equal(convert_pt2e(prepared)(x), want)


class StandingStill(nn.Module):
    """Batch norms that take the mean over all batches, one that is folded and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)
        self.last = nn.BatchNorm2d(4, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(F.relu(self.norm(self.conv(x)))))


def test_statistics_that_no_training_moves_are_told(caplog: pytest.LogCaptureFixture) -> None:
    prepared_for(build=StandingStill, train=False)
    (message,) = (r.getMessage() for r in caplog.records if "momentum" in r.getMessage())
    assert message.startswith("batch_norm (norm) was captured with momentum 0")


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
