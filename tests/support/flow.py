"""A small classifier and what the one-call flow makes of it, lowered once per process."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from custom_quantizer.app.pipeline import QuantizationResult, quantize


class Small(nn.Module):
    """Images ``(N, 1, 8, 8)`` to three scores; every kind of bias: folded, own, none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(4, 6, 3)
        self.linear = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return cast(Tensor, self.linear(torch.flatten(torch.relu(self.wide(x)), 1)))


def small_model() -> Small:
    """The same weights and statistics every time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Small()
        nn.init.uniform_(model.norm.running_mean, -1, 1)
        nn.init.uniform_(model.norm.running_var, 0.5, 2)
        nn.init.uniform_(model.norm.bias, -1, 1)
    return model.eval()


def small_images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def small_labels(count: int) -> Tensor:
    """What the float model says, so that it is right by definition."""
    with torch.no_grad():
        return cast(Tensor, small_model()(small_images(count)).argmax(1))


@cache
def small_result() -> QuantizationResult:
    """``a8w8``, lowered with a static batch of 4."""
    return quantize(small_model(), (small_images(4),), small_images(32), progress=False)
