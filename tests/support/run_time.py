"""Layers that quantize their inputs at run time, and inputs with rows of all kinds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Layers", "inputs_of"]


class Layers(nn.Module):
    """Layers of all shapes, each with an input of its own."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 33), nn.Linear(64, 70, bias=False)])
        if not grouped:
            self.layers.extend(
                [
                    nn.Linear(7, 5),
                    nn.Conv2d(64, 9, 3, padding=1),
                    nn.Conv2d(64, 6, (3, 2), stride=(2, 1), padding=(0, 1), bias=False),
                    nn.Conv2d(64, 20, 1),
                    nn.Conv2d(64, 256, 1, stride=2),
                    nn.Conv2d(64, 20, 1, padding=1),
                    nn.Conv2d(64, 5, 2, dilation=2),
                    nn.Sequential(nn.Conv2d(64, 9, 3), nn.ReLU()),
                ]
            )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def inputs_of(model: Layers, rows: int, seed: int) -> tuple[Tensor, ...]:
    """Rows, or images, of all kinds, three dims or four of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {0: (rows, 64), 1: (rows, 2, 3, 64), 2: (rows, 3, 7)}
    inputs = []
    for i in range(len(model.layers)):
        x = torch.randn(shapes.get(i, (rows, 64, 5, 6)), generator=generator)
        x *= 10.0 ** torch.randint(-3, 4, (rows, *[1] * (x.dim() - 1)), generator=generator)
        x[0] = 0.0
        x[1], x[2] = x[1].abs(), -x[2].abs()
        x[3] *= 1e-37
        x[4] *= 1e30
        x[5] = 2.0**-149
        inputs.append(x)
    return tuple(inputs)
