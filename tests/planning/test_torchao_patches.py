"""What is worked around in torchao 0.18, and that it is still needed."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    get_symmetric_quantization_config,
)
from support.graphs import Function, capture
from support.models import randomize_batch_norms
from torch import Tensor, nn
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.constant_fold import ConstantFolder
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer, Quantizer

import custom_quantizer as cq
from custom_quantizer.ops.rewrites.batch_norms import fold_in_place
from custom_quantizer.planning.torchao_patches import prepares_for_training


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
    """If this fails, torchao was mended, and ``fold_rightly`` can go."""
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


class Layers(nn.Module):
    """A batch norm behind each layer with a rule that torchao folds one into."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False)),
            *(nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6, eps=1e-2)),
        )
        self.row = nn.Sequential(
            *(nn.Conv1d(6, 6, 3, groups=2), nn.BatchNorm1d(6)),
            *(nn.Conv1d(6, 4, 3, padding="valid", bias=False), nn.BatchNorm1d(4)),
        )
        self.head = nn.Sequential(
            *(nn.Linear(4, 5), nn.BatchNorm1d(5)),
            *(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.row(self.image(x).flatten(2)).mean(2))


def test_what_torchao_folds_rightly_is_folded_to_the_same_bits() -> None:
    torch.manual_seed(1)
    model, x = randomize_batch_norms(Layers()).eval(), torch.randn(2, 3, 8, 8)
    mine, theirs = (capture(model, (x,)) for _ in range(2))
    assert fold_in_place(mine) == 7
    quantize_pt2e._fuse_conv_bn_.__wrapped__(theirs)
    quantize_pt2e._fuse_linear_bn_.__wrapped__(theirs)
    assert mine.code == theirs.code
    assert [node.name for node in mine.graph.nodes] == [node.name for node in theirs.graph.nodes]
    pairs = zip(mine.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, a), (other, b) in pairs:
        assert (name, a.requires_grad) == (other, b.requires_grad)
        assert torch.equal(a, b), name


def test_constant_integers_are_not_dequantized_to_be_thrown_away(
    shared: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the count for the stock quantizer fails, ``leave_weights_packed`` may not be needed."""
    model, x = shared
    computed: list[str] = []
    run = ConstantFolder.call_function

    def noted(self: ConstantFolder, target: Any, *args: Any) -> Any:
        computed.append(str(target))
        return run(self, target, *args)

    monkeypatch.setattr(ConstantFolder, "call_function", noted)
    config = get_symmetric_quantization_config(is_per_channel=True)
    for quantizer in (Stock().set_global(config), cq.IntegerQuantizer().set_global("a8w8")):
        prepared = prepare_pt2e(capture(model, (x,)), quantizer)
        prepared(x)
        computed.clear()
        converted = convert_pt2e(prepared)
        dequantized = [name for name in computed if "dequantize_per_channel" in name]
        assert bool(dequantized) == isinstance(quantizer, Stock)
        weights = [n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target)]
        assert {node.args[0].op for node in weights} == {"get_attr"}


class Counted(nn.Module):
    """Adds another row of a table in each call."""

    table: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.eye(4) * 3)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.table[self.count]
        self.count.add_(1)
        return y


def test_what_a_written_buffer_selects_is_no_constant() -> None:
    """If the stock quantizer's graph counts, ``leave_state_alone`` may not be needed."""
    x = torch.randn(2, 4)
    config = get_symmetric_quantization_config(is_per_channel=True)
    for quantizer in (Stock().set_global(config), cq.IntegerQuantizer().set_global("a8w8")):
        with torch.no_grad():
            prepared = prepare_pt2e(capture(Counted(), (x,)), quantizer)
            prepared(x)
            converted = convert_pt2e(prepared)
            rows = [converted(x) for _ in range(2)]
        assert torch.equal(*rows) == isinstance(quantizer, Stock)


@pytest.mark.parametrize("fold", [True, False])
def test_a_converted_graph_is_compiled_once(
    shared: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch, fold: bool
) -> None:
    """If the count for the stock quantizer fails, ``compile_converted_once`` may not be needed."""
    model, x = shared
    compiled: list[torch.fx.GraphModule] = []
    compile_code = torch.fx.GraphModule.recompile

    def noted(self: torch.fx.GraphModule) -> Any:
        compiled.append(self)
        return compile_code(self)

    config = get_symmetric_quantization_config(is_per_channel=True)
    for quantizer in (Stock().set_global(config), cq.IntegerQuantizer().set_global("a8w8")):
        prepared = prepare_pt2e(capture(model, (x,)), quantizer)
        prepared(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.fx.GraphModule, "recompile", noted)
            compiled.clear()
            converted = convert_pt2e(prepared, fold_quantize=fold)
        # Once more when it is made of the prepared graph.
        again = 4 + fold if isinstance(quantizer, Stock) else 2
        assert len([graph for graph in compiled if graph is converted]) == again
        code, outputs = converted.code, converted(x)
        converted.recompile()
        assert "recompile" not in vars(converted)
        assert converted.code == code
        for value, wanted in zip(converted(x), outputs, strict=True):
            assert torch.equal(value, wanted)


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
