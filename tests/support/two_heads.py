"""A network whose ops run in every way there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_quantizer.planning.quantizer import IntegerQuantizer

SHAPE = (1, 3, 16, 16)


class TwoHeads(nn.Module):
    """Conv-bn-relu stem, a branch that is upsampled and joined again, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d
        self.stem = nn.Sequential(conv(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down1 = nn.Sequential(conv(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.down2 = nn.Sequential(conv(12, 12, 3, 1, 1, groups=12), conv(12, 16, 1), nn.SiLU())
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.fuse = nn.Sequential(conv(28, 12, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classes = nn.Linear(12, 5)
        self.boxes = conv(12, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.down1(self.stem(x))
        deep = self.down2(F.max_pool2d(wide, 2))
        joined = self.fuse(torch.cat([wide, self.up(deep)], 1))
        return self.classes(self.pool(joined).flatten(1)), torch.sigmoid(self.boxes(joined))


def two_heads_quantizer() -> IntegerQuantizer:
    """Stem and heads in 16 bits, the rest with weights of 4."""
    quantizer = IntegerQuantizer().set_global("a8w4")
    for name in ("stem", "classes", "boxes"):
        quantizer.set_module_name(name, "a16w8")
    return quantizer
