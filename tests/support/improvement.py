"""A small network with every kind of layer that can be improved, calibrated."""

from __future__ import annotations

import copy
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.accuracy.layers import find_layers


class EveryLayer(nn.Module):
    """Images ``(N, 3, 8, 8)`` to five scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding="valid", groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.depthwise(x))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        x = torch.relu(self.pointwise(x))
        return cast(Tensor, self.linear(x.mean((2, 3))))


def every_layer() -> EveryLayer:
    """The same weights and statistics every time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = EveryLayer()
        nn.init.uniform_(model.norm.running_var, 0.5, 2)
        nn.init.uniform_(model.norm.bias, -1, 1)
    return model.eval()


def smooth_images(count: int, seed: int = 3) -> Tensor:
    """Neighbouring pixels go together, as in images."""
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return cast(Tensor, nn.functional.avg_pool2d(noise, 5, 1)[:, :, 2:10, 2:10] * 3)


@cache
def _captured() -> GraphModule:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(every_layer(), (smooth_images(4),), dynamic_shapes=({0: batch},))
    return cast(GraphModule, exported.module())


def prepared_every_layer(scheme: str = "a8w3") -> GraphModule:
    """The network prepared and calibrated on 64 images."""
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    prepared = cast(GraphModule, prepare_pt2e(copy.deepcopy(_captured()), quantizer))
    prepared(smooth_images(64))
    return prepared


DATA = list(smooth_images(64).split(8))
FRESH = smooth_images(64, seed=77)


def layer_states(prepared: GraphModule) -> dict[str, Tensor]:
    """What improvements change in each layer."""
    return {
        f"{layer.name}.{key}": value
        for layer in find_layers(prepared)[0]
        for key, value in layer.state().items()
    }


def fresh_error(prepared: GraphModule) -> float:
    """Mean squared error of the converted network on images that nothing has seen."""
    converted = convert_pt2e(copy.deepcopy(prepared))
    with torch.no_grad():
        return float((converted(FRESH) - every_layer()(FRESH)).square().mean())
