"""ExecuTorch's passes over a delegate: what is left out would have changed nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import edge
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


@pytest.mark.parametrize("scheme", ["a8w8", pytest.param("dyn8w8", marks=pytest.mark.slow)])
def test_the_same_program(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 8, 8),)
    graph = convert(Everything(), example, scheme).graph
    quick = cq.lower(graph, example).buffer
    monkeypatch.setattr(edge, "quick_passes", nullcontext)
    assert cq.lower(graph, example).buffer == quick


def test_upstream_is_as_it_was_afterwards() -> None:
    with quick_passes():
        assert xnnpack_preprocess.XNNPACKPassManager is QuickPassManager
    assert xnnpack_preprocess.XNNPACKPassManager is XNNPACKPassManager
    with pytest.raises(KeyError):
        _interrupted()
    assert xnnpack_preprocess.XNNPACKPassManager is XNNPACKPassManager


def _interrupted() -> None:
    with quick_passes():
        raise KeyError
