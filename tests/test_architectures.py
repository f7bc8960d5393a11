"""Small models of the kinds that users bring, whole: one delegate, and each tensor right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.fuzz import check_each_tensor, check_plan, check_reference
from support.graphs import differences
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.checks import is_exact

IMAGE = (1, 3, 32, 32)


class ChannelNorm(nn.Module):
    """A layer norm over channels, as models of images write it out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(1, keepdim=True)
        deviation = torch.sqrt(centered.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * (centered / deviation) + self.bias[:, None, None]


class UNet(nn.Module):
    """Two scales and one skip."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            return nn.Sequential(conv, norm(outputs), nn.SiLU())

        self.down, self.middle, self.up = block(3, 16), block(16, 32), block(32, 16)
        self.larger = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.larger(self.middle(F.max_pool2d(skip, 2)))
        return torch.sigmoid(self.head(self.up(torch.cat([up, skip], 1))))


class PointNet(nn.Module):
    """Layers over points, and the largest of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.ReLU()
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.points(x).max(2).values))


class Mixer(nn.Module):
    """Layers over tokens and over channels, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.tokens = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm(x))
        return cast(Tensor, self.head(x.mean(1)))


class Decoder(nn.Module):
    """One block of a language model: root-mean-square norms, causal attention, a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 32), nn.RMSNorm(32)
        self.qkv = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
        self.out = nn.Linear(32, 32, bias=False)
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down, self.head = nn.Linear(64, 32, bias=False), nn.Linear(32, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        normed = self.norm(x)
        q, k, v = (layer(normed).view(*tokens.shape, 4, 8).transpose(1, 2) for layer in self.qkv)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        normed = self.norm(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return cast(Tensor, self.head(self.norm(x)))


class TemporalNet(nn.Module):
    """Causal, dilated convolutions over a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 16, 3, dilation=2), nn.Conv1d(16, 16, 3, dilation=4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.pad(x, (4, 0))))
        x = F.relu(self.second(F.pad(x, (8, 0))))
        return cast(Tensor, self.head(F.adaptive_avg_pool1d(x, 1).squeeze(-1)))


class Detector(nn.Module):
    """Pools of several sizes side by side, and boxes from what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pools = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(64, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.silu(self.pools(F.silu(self.stem(x))))]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        out = self.head(torch.cat(parts, 1))
        batch, _, height, width = out.shape
        out = out.view(batch, 3, 6, height, width).permute(0, 1, 3, 4, 2)
        where = out[..., :2].sigmoid() * 2 - 0.5
        size = (out[..., 2:4].sigmoid() * 2) ** 2
        return torch.cat([where, size, out[..., 4:].sigmoid()], -1).view(batch, -1, 6)


class Recurrent(nn.Module):
    """The last output of a recurrent layer, and a linear layer."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(x)[0][:, -1]))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (lambda: UNet(nn.BatchNorm2d), IMAGE),
    "unet, group norm": (lambda: UNet(lambda channels: nn.GroupNorm(4, channels)), IMAGE),
    "unet, instance norm": (lambda: UNet(nn.InstanceNorm2d), IMAGE),
    "unet, channel norm": (lambda: UNet(ChannelNorm), IMAGE),
    "nearest": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(12, 3, 3, padding=1),
        ),
        IMAGE,
    ),
    "bilinear": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.PReLU(8),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(8, 1, 1),
        ),
        IMAGE,
    ),
    "sub-pixels": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 4, 3, padding=1),
            nn.PixelShuffle(2),
        ),
        IMAGE,
    ),
    "points": (PointNet, (2, 3, 40)),
    "mixer": (Mixer, IMAGE),
    "temporal": (TemporalNet, (2, 4, 50)),
    "detector": (Detector, IMAGE),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32)),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4", "a16w8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_delegate_and_every_tensor_right(name: str, scheme: str) -> None:
    build, shape = ARCHITECTURES[name]
    done = convert(built(build), (torch.randn(shape),), scheme)
    graph = check_plan(done)
    check_reference(done, graph)
    lowered = cq.lower(done.graph, done.example)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    if is_exact(lowered, graph):
        x = torch.randn(shape)
        assert differences(lowered.run(x), cq.integer_reference(done.graph)(x)) == []
    else:
        check_each_tensor(done)


def outside(build: Callable[[], nn.Module], example: tuple[Any, ...]) -> Sequence[str]:
    """Kernels outside of the delegates; lowering compares the outputs with the reference."""
    lowered = cq.lower(convert(built(build), example).graph, example)
    for row in lowered.report.not_integer():
        assert row.reason, row
    return lowered.report.outside


@pytest.mark.slow
def test_a_language_model_looks_rows_up_outside() -> None:
    assert outside(Decoder, (torch.randint(0, 50, (2, 9)),)) == ("aten::embedding.out",)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_a_known_length_leave_nothing_outside(
    layer: Callable[..., nn.Module],
) -> None:
    assert outside(lambda: Recurrent(layer), (torch.randn(2, 6, 16),)) == ()
