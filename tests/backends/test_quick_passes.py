"""ExecuTorch's passes over a delegate: what is left out would have changed nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, get_type_hints

import pytest
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
from executorch.exir._serialize import _dataclass
from executorch.exir.dialects._ops import ops
from support.models import convert
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import edge, lowering
from custom_quantizer.backends.xnnpack.quick_passes import (
    CHANGES,
    IN_PLACE,
    QuickPassManager,
    quick_passes,
)

ALWAYS = {
    "ChannelsLastTaggedReshapePass",
    "FuseActivationPass",
    "InsertPadQDQPass",
    "PropagateCustomMetaPass",
    "XNNPACKRemoveCloneOpsTransform",
}


def test_the_passes_of_executorch_1_5_1() -> None:
    """Others would have to be read first: what a new one changes is not known here."""
    names = [kind.__name__ for kind in XNNPACKPassManager(None).passes]
    assert len(names) == 17
    assert set(names) == ALWAYS | set(CHANGES)
    assert set(names) >= IN_PLACE


class Everything(nn.Module):
    """What the passes are for: images, signals, pools, cats, resizing, slopes and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.signal = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(self.pool(x))], 1)
        x = self.signal(nn.functional.pad(x, (1, 1)).flatten(2)[:, :, ::3]).transpose(1, 2)
        return self.head(torch.softmax(x @ x.transpose(1, 2), -1) @ x)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "dyn8w8"])
def test_the_same_program(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 8, 8),)
    graph = convert(Everything(), example, scheme).graph
    quick = cq.lower(graph, example).buffer
    monkeypatch.setattr(edge, "quick_passes", nullcontext)
    assert cq.lower(graph, example).buffer == quick


def test_resizing_that_is_whole_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What upstream looks for it captures first, which takes seconds in each process."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
    example = (torch.randn(1, 3, 4, 4),)
    graph = convert(model, example, "a8w8").graph
    monkeypatch.setattr(bilinear_2d, "get_graphs_dict", lambda: pytest.fail("is looked for"))
    assert cq.lower(graph, example).report.fully_delegated


def test_attentions_that_upstream_would_replace() -> None:
    """All that its pass looks for is recognized, and a softmax without a scaled query is not."""
    change = CHANGES["ConvertToSDPAPass"]
    graphs = [pattern.graph for pattern in sdpa.get_graphs()]
    assert graphs
    for graph in graphs:
        assert any(map(change, graph.nodes))
        for node in graph.find_nodes(op="call_function", target=ops.edge.aten.mul.Scalar):
            node.target = ops.edge.aten.mul.Tensor
        assert not any(map(change, graph.nodes))
    sdpa.get_graphs.cache_clear()


def test_upstream_is_as_it_was_afterwards() -> None:
    with quick_passes():
        assert xnnpack_preprocess.XNNPACKPassManager is QuickPassManager
        assert _dataclass.get_type_hints is not get_type_hints
        assert _dataclass.get_type_hints(XNNGraph) == get_type_hints(XNNGraph)
    assert xnnpack_preprocess.XNNPACKPassManager is XNNPACKPassManager
    assert _dataclass.get_type_hints is get_type_hints
    with pytest.raises(KeyError):
        _interrupted()
    assert xnnpack_preprocess.XNNPACKPassManager is XNNPACKPassManager
    assert _dataclass.get_type_hints is get_type_hints


def _interrupted() -> None:
    with quick_passes():
        raise KeyError


class Several(nn.Module):
    """Two delegates: an output that is a view, and an input that requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.image(x).permute(0, 2, 3, 1)
        return y, torch.erf(y).relu(), self.head(torch.pow(self.scale, x[..., :4]))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """Programs of delegates that were computed, one entry for each time."""
    programs: list[ExportedProgram] = []
    module = ExportedProgram.module

    def noted(self: ExportedProgram, *args: Any, **options: Any) -> Any:
        if self.dialect == "EDGE":  # patterns that upstream looks for are not
            programs.append(self)
        return module(self, *args, **options)

    monkeypatch.setattr(ExportedProgram, "module", noted)
    return programs


@pytest.mark.parametrize(
    ("model", "scheme", "delegates", "shape"),
    [
        pytest.param(Everything, "a8w8", 1, (1, 3, 8, 8), marks=pytest.mark.slow),
        (Several, "a8w8", 2, (1, 3, 4, 6)),
        pytest.param(Several, "dyn8w8", 2, (1, 3, 4, 6), marks=pytest.mark.slow),
        pytest.param(Everything, "dyn8w8", 1, (1, 3, 8, 8), marks=pytest.mark.slow),
    ],
)
def test_outputs_of_delegates_are_not_computed(
    model: type[nn.Module],
    scheme: str,
    delegates: int,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    computed: list[ExportedProgram],
) -> None:
    """They are known, and the program is the same."""
    torch.manual_seed(0)
    example = (torch.randn(shape),)
    graph = convert(model(), example, scheme).graph
    computed.clear()
    program = cq.lower(graph, example)
    assert not computed
    monkeypatch.setattr(lowering, "outputs_known", nullcontext)
    assert cq.lower(graph, example).buffer == program.buffer
    assert len(computed) == program.report.delegates == delegates


def test_outputs_of_dynamic_sizes_are_computed(computed: list[ExportedProgram]) -> None:
    example = (torch.randn(2, 4),)
    shapes = ({0: Dim.AUTO(min=1, max=8)},)
    graph = convert(nn.Linear(4, 4).eval(), example, "a8w8", dynamic_shapes=shapes).graph
    computed.clear()
    cq.lower(graph, example)
    assert computed
