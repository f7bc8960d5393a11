"""Batch norms with no layer to fold them into become convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from support.graphs import Function, calls, capture, lowered_exactly, quantized
from support.models import randomize_batch_norms
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.batch_norms import batch_norms_to_convs

aten = torch.ops.aten
BATCH_NORM = aten.batch_norm.default


def norm(channels: int, rank: int, **options: bool) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    torch.manual_seed(1)
    module = kinds[rank](channels, **options)
    return module if not module.affine else randomize_batch_norms(module)


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
    assert (first.family, first.path, first.backend.value) == ("conv", "0", "xnnpack int8")


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


def test_training_keeps_it() -> None:
    model = nn.Sequential(norm(3, 4), nn.Conv2d(3, 4, 3)).train()
    x = torch.randn(2, 3, 8, 8)
    captured = torch.export.export(copy.deepcopy(model), (x,)).module()
    prepared = prepare_qat_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    assert len(calls(prepared, BATCH_NORM)) == 1
