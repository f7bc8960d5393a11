"""A graph that is not traced again on its way to the edge dialect gives the same program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.exir.passes import base_post_op_replace_passes, base_pre_op_replace_passes
from support.models import convert
from torch import Tensor, nn
from torchvision.models import VisionTransformer, mobilenet_v3_small
from torchvision.models.densenet import _DenseBlock
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import edge, quick_passes


class Mixed(nn.Module):
    """Every core form, numbers beside tensors, and an output that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.grow = nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.signal, self.head = nn.Conv1d(3, 4, 3), nn.Linear(8, 4)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x = self.grow(nn.functional.hardswish(self.image(input))) * 0.5
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        y = torch.softmax(self.signal(nn.functional.pad(x, (1, 1)).flatten(2)), -1)
        return self.head(y[..., :8]).clamp(0, 6), torch.cat([x] * 7, 1).view(1, -1)


class Turned(nn.Module):
    """Views of another layout, inside of the delegate, outside of it, and as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.image(x).permute(0, 2, 3, 1)
        outside = torch.sort(x.transpose(2, 3))[0]
        return y, y.relu() * 2.0, outside, torch.sign(outside).transpose(1, 3)


class Summed(nn.Module):
    """An op outside of the delegate behind a view: its result is laid out as behind a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x).permute(0, 3, 1, 2).cumsum(1)


class Scored(nn.Module):
    """Functions in float that no kernel takes as they are written, and truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.hidden(x)
        gate, scores = nn.functional.silu(torch.sin(y)), self.head(y)
        shares = torch.softmax(scores, -1, dtype=torch.float32)  # as it is in any case
        return torch.where(scores > 0, scores, -scores), scores.log_softmax(-1), shares, gate


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Composite(nn.Module):
    """Ops that are several core ops each: between floats, of two activations, as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(self.layer(x))
        z = torch.einsum("bnc,bmc->bnm", y, nn.functional.silu(y).sin())
        return nn.functional.silu(torch.sin(y)), self.layer(z), (x > 0).to(torch.float32) * y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "composite": (Composite, (2, 6, 6)),
    "mixed": (Mixed, (1, 3, 8, 8)),
    "recurrent": (Recurrent, (3, 1, 4)),
    "scored": (Scored, (5, 8)),
    "summed": (Summed, (1, 3, 4, 6)),
    "turned": (Turned, (1, 3, 4, 6)),
}
LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense block": (lambda: _DenseBlock(7, 8, 2, 4, 0.0), (1, 8, 8, 8)),
    "mobile": (lambda: mobilenet_v3_small().features[:5], (1, 3, 32, 32)),
    "swin": (
        lambda: SwinTransformer(
            [4, 4],
            16,
            [2],
            [2],
            [4, 4],
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        (1, 3, 32, 32),
    ),
    "video": (lambda: BasicBlock(4, 4, Conv3DSimple), (1, 4, 4, 8, 8)),
    "vision transformer": (lambda: VisionTransformer(32, 8, 2, 4, 32, 64), (1, 3, 32, 32)),
}


def programs(
    model: nn.Module, shape: tuple[int, ...], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, bytes, int]:
    """The program, what upstream's tracing makes of the same graph, and how often it was asked."""
    example = (torch.randn(shape),)
    graph = convert(model.eval(), example, scheme).graph
    asked: list[Any] = []
    upstream = edge.to_edge_transform_and_lower

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return upstream(*args, **kwargs)

    monkeypatch.setattr(edge, "to_edge_transform_and_lower", counted)
    quick = cq.lower(graph, example).buffer
    times = len(asked)
    monkeypatch.setattr(edge, "core_forms", lambda *_: None)
    return quick, cq.lower(graph, example).buffer, times


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param("composite", "a8w8", marks=pytest.mark.slow),
        ("mixed", "a8w8"),
        pytest.param("mixed", "dyn8w8", marks=pytest.mark.slow),
        pytest.param("recurrent", "a8w8", marks=pytest.mark.slow),
        pytest.param("scored", "a8w8", marks=pytest.mark.slow),
        pytest.param("summed", "a8w8", marks=pytest.mark.slow),
    ],
)
def test_the_same_program(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``dyn8w8`` an output of the delegate is one that a pass puts another in the place of."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    quick, traced, asked = programs(make(), shape, scheme, monkeypatch)
    assert asked == 0
    assert quick == traced


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4", "a16w8", "dyn8w8"])
@pytest.mark.parametrize("name", LARGE | MODELS)
def test_the_same_program_of_larger_networks(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, shape = (LARGE | MODELS)[name]
    quick, traced, _ = programs(make(), shape, scheme, monkeypatch)
    assert quick == traced


class Counting(nn.Module):
    """Writes a buffer, which only upstream makes functional."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.layer(x) + self.count


def test_what_is_not_functional_goes_upstreams_way(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, traced, asked = programs(Counting(), (1, 4), "a8w8", monkeypatch)
    assert asked == 1
    assert quick == traced


@pytest.mark.slow
def test_another_executorch_runs_all_of_its_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = xnnpack_preprocess.XNNPACKPassManager
    with quick_passes.quick_passes():
        assert xnnpack_preprocess.XNNPACKPassManager is quick_passes.QuickPassManager
    monkeypatch.setattr(quick_passes, "version", lambda _package: "1.5.2+cpu")
    with quick_passes.quick_passes():
        assert xnnpack_preprocess.XNNPACKPassManager is upstream
    quick, traced, asked = programs(nn.Linear(4, 4), (1, 4), "a8w8", monkeypatch)
    assert asked == 1
    assert quick == traced


def test_the_passes_of_executorch_1_5_1() -> None:
    """Others would have to be read first: what a new one changes is not known here."""
    names = [step.__name__ for step in base_pre_op_replace_passes]
    assert set(names) >= edge.NEVER
    assert set(names) - edge.NEVER - set(edge.WORK) == {
        "FoldRedundantDequantizeQuantizePass",
        "PruneEmptyTensorsPass",
        "RemoveNoopPass",
        "RemoveToCopyPass",
    }
    last = [getattr(step, "__name__", type(step).__name__) for step in base_post_op_replace_passes]
    assert last == ["dead_code_elimination_pass", "DebugHandleGeneratorPass"]
