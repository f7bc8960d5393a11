"""What is worked around in torchao 0.18, and that it is still needed."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from support.graphs import Function, capture
from support.models import randomize_batch_norms
from torch import Tensor, nn
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer, Quantizer

import custom_quantizer as cq
from custom_quantizer.planning.torchao_folding import prepares_for_training


def test_the_version_that_it_is_for() -> None:
    """With another one, see whether each function of _torchao.py is still needed."""
    assert version("torchao").startswith("0.18.")


class Plain(Quantizer):
    """Anybody else's quantizer."""

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


def twice(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.norm(self.conv(x)), self.conv(x)


@pytest.fixture(scope="module")
def shared() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Function(twice, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    return randomize_batch_norms(model).eval(), torch.randn(2, 3, 6, 6)


def error_of(shared: tuple[nn.Module, Tensor], quantizer: Quantizer) -> float:
    """Largest relative error of the prepared graph's outputs, before any rounding."""
    model, x = shared
    prepared = prepare_pt2e(capture(model, (x,)), quantizer)
    pairs = zip(model(x), prepared(x), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def test_folding_is_still_wrong_where_a_weight_is_shared(
    shared: tuple[nn.Module, Tensor],
) -> None:
    """If this fails, torchao was mended, and ``keep_from_folding`` can go."""
    assert cq.IntegerQuantizer  # the folding is guarded from here on
    assert error_of(shared, Plain()) > 0.1


def test_other_quantizers_are_served_as_ever(shared: tuple[nn.Module, Tensor]) -> None:
    model, x = shared
    guarded = quantize_pt2e._fuse_conv_bn_
    graphs = []
    for fold in (guarded, guarded.__wrapped__):
        quantize_pt2e._fuse_conv_bn_ = fold
        try:
            graphs.append(prepare_pt2e(capture(model, (x,)), Stock()))
        finally:
            quantize_pt2e._fuse_conv_bn_ = guarded
    mine, theirs = graphs
    assert mine.code == theirs.code
    for (name, a), (other, b) in zip(
        mine.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("composed", [False, True])
def test_ours_are_folded_rightly(shared: tuple[nn.Module, Tensor], composed: bool) -> None:
    quantizer: Quantizer = cq.IntegerQuantizer().set_global("a8w8")
    if composed:
        quantizer = ComposableQuantizer([Plain(), ComposableQuantizer([quantizer])])
    assert error_of(shared, quantizer) < 1e-6


def test_a_batch_norm_without_statistics_does_not_stop_the_folding() -> None:
    """torchao 0.18 ends in ``unsupported operand type(s) for +: 'NoneType' and 'float'``."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(TypeError):
        prepare_pt2e(capture(model, (x,)), Plain())
    seen: list[bool] = []

    class Ours(cq.IntegerQuantizer):
        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            seen.append(any("batch_norm" in str(node.target) for node in model.graph.nodes))
            raise StopIteration

    with pytest.raises(StopIteration):
        prepare_pt2e(capture(model, (x,)), Ours())
    assert seen == [True]


def test_who_prepares(shared: tuple[nn.Module, Tensor]) -> None:
    model, x = shared
    told: list[bool] = []

    class Asks(Plain):
        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            told.append(prepares_for_training())
            return model

    prepare_pt2e(capture(model, (x,)), Asks())
    prepare_qat_pt2e(capture(model, (x,)), ComposableQuantizer([Asks()]))
    assert told == [False, True]
    assert not prepares_for_training()


def test_the_graph_does_not_tell_who_prepares() -> None:
    """If this fails, torchao tells the quantizer, and it need not look who called."""
    seen = []

    class Noting(Plain):
        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            nodes = [(node.name, node.target, sorted(node.meta)) for node in model.graph.nodes]
            seen.append((nodes, sorted(model.meta), sorted(vars(model)), model.training))
            return model

    for prepare in (prepare_pt2e, prepare_qat_pt2e):
        prepare(capture(nn.Linear(3, 4).eval(), (torch.randn(2, 3),)), Noting())
    assert seen[0] == seen[1]
