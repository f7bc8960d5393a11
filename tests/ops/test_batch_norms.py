"""Batch norms are folded where that is right, and become convolutions where there is no layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from support.selection import slow_but
from support.shared_layers import SHARED, norm, shared_layer
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import custom_quantizer as cq
from custom_quantizer.core.graph import constant_of
from custom_quantizer.core.noise import Noise
from custom_quantizer.ops.rewrites.batch_norms import fold_into_layers, give_layers
from custom_quantizer.training import qat

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed
BATCH_NORM = aten.batch_norm.default


def batch_norms_to_convs(graph: GraphModule) -> int:
    given = give_layers(graph)
    assert fold_into_layers(graph) == given
    return given


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "target"), [((2, 3, 4, 5), "conv2d"), ((2, 3, 7), "conv1d")])
def test_the_convolution_computes_the_same(
    shape: tuple[int, ...], target: str, affine: bool
) -> None:
    model = nn.Sequential(nn.ReLU(), norm(3, len(shape), affine=affine))
    x = torch.randn(shape)
    graph = capture(model, (x,))
    assert batch_norms_to_convs(graph) == 1
    graph.graph.lint()
    graph.recompile()
    (conv,) = calls(graph, getattr(aten, target).default)
    assert conv.args[-1] == 3
    assert "1" in str(conv.meta["nn_module_stack"])
    torch.testing.assert_close(graph(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_batch_norm_of_its_own_runs_in_integers() -> None:
    """DenseNet's order: norm, relu, convolution."""
    model = nn.Sequential(norm(3, 4), nn.ReLU(), nn.Conv2d(3, 4, 3), norm(4, 4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    converted = quantized(model, (x,))
    lowered = lowered_exactly(converted, (x,))
    assert lowered.report.fully_delegated, str(lowered.report)
    assert not calls(converted, BATCH_NORM)
    first = lowered.report.ops[0]
    assert (first.family, first.path, first.backend.label) == ("conv", "0", "xnnpack int8")


def test_channels_that_are_switched_off() -> None:
    module = norm(4, 4)
    with torch.no_grad():
        module.weight[1] = 0.0
        module.weight[2] = -3.0
    x = torch.randn(1, 4, 6, 6)
    converted = quantized(nn.Sequential(module, nn.Conv2d(4, 2, 1)), (x,))
    lowered_exactly(converted, (x,))


def test_a_rule_selects_it_by_the_module() -> None:
    model = nn.Sequential(norm(3, 4), nn.ReLU(), nn.Conv2d(3, 4, 3))
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("0", None)
    plan = quantizer.plan(torch.export.export(model.eval(), (torch.randn(1, 3, 8, 8),)))
    assert plan.ops[0].scheme is None
    assert plan.ops[0].path == "0"
    assert plan.ops[-1].scheme == "a8w8"


@pytest.mark.parametrize("rank", [2, 5])
def test_other_ranks_stay(rank: int) -> None:
    x = torch.randn(2, 3, *[4] * (rank - 2))
    graph = capture(nn.Sequential(nn.Tanh(), norm(3, rank)), (x,))
    assert batch_norms_to_convs(graph) == 0
    assert len(calls(graph, BATCH_NORM)) == 1


def test_parameters_that_are_computed_stay() -> None:
    def forward(self: Function, x: Tensor, gamma: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, gamma, None)

    model = Function(forward)
    model.register_buffer("mean", torch.zeros(3))
    model.register_buffer("var", torch.ones(3))
    graph = capture(model, (torch.randn(1, 3, 4, 4), torch.randn(3)))
    assert batch_norms_to_convs(graph) == 0


class Standardized(nn.Conv2d):
    """A convolution whose weight is normalized for each output, as nfnets have it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(
            rows, None, None, weight=self.gain * 0.2, training=True, momentum=0.0, eps=1e-6
        )
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def own_statistics() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def test_a_weight_that_is_standardized_is_a_constant() -> None:
    model = nn.Sequential(Standardized(3, 4), nn.ReLU(), Standardized(4, 5))
    x = torch.randn(2, 3, 8, 8)
    graph = quantized(model, (x,))
    assert not calls(graph, BATCH_NORM)
    got, want = cq.integer_reference(graph)(x), model(x).detach()
    assert float((got - want).norm() / want.norm()) < 0.03
    assert len(cq.integer_reference(graph).float_ops) == 0


@pytest.mark.parametrize("build", [lambda: Standardized(3, 4), own_statistics])
def test_norms_without_statistics_are_trained_and_converted(
    build: Callable[[], nn.Module],
) -> None:
    """Training and evaluation do the same, so nothing moves between the two."""
    model = build().train()
    x = torch.randn(2, 3, 8, 8)
    captured = torch.export.export(copy.deepcopy(model), (x,)).module()
    prepared = prepare_qat_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    move_exported_model_to_train(prepared)
    prepared(x).square().mean().backward()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)
    move_exported_model_to_eval(prepared)
    want = prepared(x).detach()
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x).detach(), want)
    expected = model(x).detach()
    assert float((want - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("captured", [True, False])
def test_a_norm_of_the_batch_stays_apart_and_runs(captured: bool) -> None:
    """torchao would fold it into the convolution, with statistics that it does not have."""
    model, x = own_statistics().eval(), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    ops = [op.scheme for op in quantizer.plan(exported).parts]
    assert ops == ["a8w8", None, None]
    result = cq.quantize(exported if captured else model, (x,), [(x,)], progress=False)
    assert result.lowered is not None
    (row,) = result.lowered.report.not_integer()
    assert (row.path, row.backend.label) == ("1", "portable kernel, outside the delegate")
    for given in (x, -0.5 * x.flip(3)):
        want = model(given).detach()
        assert float((result.lowered.run(given) - want).norm() / want.norm()) < 0.1


def test_an_instance_norm_with_statistics_is_a_batch_norm() -> None:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval()
    with torch.no_grad():
        norm.running_mean += torch.tensor([1.0, -2.0, 0.5])
        norm.running_var *= torch.tensor([0.5, 4.0, 1.0])
        norm.weight *= torch.tensor([-1.0, 2.0, 0.3])
    model, x = nn.Sequential(nn.Tanh(), norm), torch.randn(2, 3, 4, 5)
    graph = canonicalize(capture(model, (x,)))
    assert len(calls(graph, aten.conv2d.default)) == 1
    assert not calls(graph, aten.instance_norm.default)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-6, atol=1e-6)


def test_an_instance_norm_with_statistics_answers_to_rules_for_its_type() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Tanh(), nn.InstanceNorm2d(3, track_running_stats=True)
    )
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(aten.instance_norm.default, None)
    prepare_pt2e(capture(model.eval(), (torch.randn(2, 3, 4, 5),)), quantizer)
    (norm,) = (op for op in quantizer.last_plan.ops if op.node == "instance_norm")
    assert norm.scheme is None


# ---------------------------------------------------------------------------------------------
# Layers whose weight or result somebody else reads
# ---------------------------------------------------------------------------------------------


def prepare(name: str, training: bool) -> tuple[GraphModule, GraphModule, Tensor]:
    """The captured and the prepared graph of a case, and an input."""
    model, x = shared_layer(name)
    captured = capture(model, (x,))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    if not training:
        return captured, prepare_pt2e(copy.deepcopy(captured), quantizer), x
    prepared = prepare_qat_pt2e(copy.deepcopy(captured), quantizer)
    return captured, qat.evaluation_mode(prepared), x


@pytest.mark.parametrize("name", slow_but(list(SHARED)[::3], SHARED))
def test_what_others_read_is_not_folded_into(name: str) -> None:
    captured, prepared, x = prepare(name, training=False)
    prepared(x)
    checked = cq.check_prepared(prepared, captured, [x])
    fidelity = checked.compare(convert_pt2e(prepared))
    # int8 in and int8 out of one or two layers.
    assert all(output.sqnr > 30 for output in fidelity.outputs), str(fidelity)
    assert not fidelity.warnings


# Of each kind of sharing one, and each kind of layer once: preparing for training takes a second.
IN_TRAINING = (
    "a norm a level, 1d",
    "norm(z) and z",
    "without and with",
    "tied weights",
    "transposed in groups",
    "linear over rows",
)


@pytest.mark.parametrize("name", slow_but(IN_TRAINING, SHARED))
def test_nor_in_training(name: str) -> None:
    captured, prepared, x = prepare(name, training=True)
    cq.check_prepared(prepared, captured, [x])


@pytest.mark.parametrize("name", ["a norm a level", "weight norm", "transposed in groups"])
def test_what_training_leaves_is_folded_the_same(name: str) -> None:
    captured, prepared, x = prepare(name, training=True)
    prepared(x)
    noise = Noise()
    for want, got in zip(_flat(captured(x)), _flat(convert_pt2e(prepared)(x)), strict=True):
        noise.add(want, got)
    assert noise.ratio > 30


def _flat(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_each_use_has_its_own_weight_and_bias() -> None:
    """The first use gets the weight times its norm's factors, the second that times its own."""
    captured, prepared, x = prepare("a norm a level", training=False)
    modules = dict(captured.named_parameters()) | dict(captured.named_buffers())
    prepared(x)
    convs = calls(prepared, aten.conv2d.default)
    assert len(convs) == 2
    for i, node in enumerate(convs, start=1):
        weight, bias = (
            constant_of(prepared, read.args[0] if read.op == "call_module" else read)
            for read in node.args[1:3]
        )
        gamma, beta, mean, var = (
            modules[f"norm{i}.{n}"].double()
            for n in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / (var + 1e-5).sqrt()
        want = modules["layer.weight"].double() * factor.reshape(-1, 1, 1, 1)
        assert torch.equal(weight, want.float())
        assert torch.equal(bias, (beta - mean * factor).float())


@pytest.mark.parametrize(
    "name", slow_but(["norm(z) + z"], ["a norm a level", "norm(z) + z", "tied weights"])
)
def test_the_program_computes_its_graph(name: str) -> None:
    model, x = shared_layer(name)
    lowered = lowered_exactly(quantized(model, (x,)), (x,), [])
    assert lowered.report.fully_delegated, str(lowered.report)


def test_in_a_composable_quantizer() -> None:
    model, x = shared_layer("with and without")
    captured = capture(model, (x,))
    ours = cq.IntegerQuantizer().set_module_name("layer", "a8w8")
    prepared = prepare_pt2e(
        copy.deepcopy(captured), ComposableQuantizer([ours, XNNPACKQuantizer()])
    )
    prepared(x)
    cq.check_prepared(prepared, captured, [x])


def left_alone(self: Function, x: Tensor) -> Tensor:
    """Signals and rows, in a graph as others convert it; each norm is there twice."""
    grid: tuple[Any, ...] = (0.125, 3, -128, 127, torch.int8)
    signals = torch.relu(self.signals(self.signals(x) * x))
    rows = self.rows(self.rows(x.reshape(2, -1)) - 1.0)
    result = torch.cat([signals.reshape(2, -1), rows], 1)
    return _q.dequantize_per_tensor(_q.quantize_per_tensor(result, *grid), *grid)


def test_what_another_quantizer_leaves_alone_is_written_out() -> None:
    """ExecuTorch's layers of signals do not load before a quantize, nor do two of one name."""
    model = Function(left_alone, signals=norm(3, 3), rows=norm(12, 2, affine=False))
    x = torch.randn(2, 3, 4)
    lowered = lowered_exactly(capture(model.eval(), (x,)), (x,), [])
    assert lowered.report.fully_delegated
    assert lowered.report.passes["batch_norms_to_layers"] == 4
