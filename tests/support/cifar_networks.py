"""Architectures of the CIFAR-10 networks, without weights. Needs torch and torchvision only.

They stand apart so that other tools, in environments of their own, can build the same networks
(``tests/benchmarks/peers.py``).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Basic block with shortcut option A: strided slicing and zero channels, no weights."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.added = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for CIFAR: 3 stages of 16, 32 and 64 channels, ``6 * blocks + 2`` layers.

    References:
        K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016,
        section 4.2. https://arxiv.org/abs/1512.03385
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, 8)
        return cast(Tensor, self.linear(torch.flatten(x, 1)))


def half_width_mobilenet_v2() -> nn.Module:
    """torchvision's MobileNetV2 at half width, its first two strides taken out for 32x32."""
    from torchvision.models import mobilenet_v2

    model: nn.Module = mobilenet_v2(num_classes=10, width_mult=0.5)
    for name in ("features.0.0", "features.2.conv.1.0"):
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{name} is a {type(conv).__name__}: torchvision has changed.")
        conv.stride = (1, 1)
    return model
