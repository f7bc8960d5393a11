"""One network with a weight of each width that files of other tools tell apart."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from support.graphs import Inputs


class Widths(nn.Module):
    """Weights of six formats, biases, a parameter as an operand, a tensor in two formats."""

    def __init__(self) -> None:
        super().__init__()
        self.eight = nn.Conv2d(3, 8, 3, padding=1)
        self.four = nn.Conv2d(8, 8, 3, groups=8)
        self.two = nn.Conv2d(8, 6, 1)
        self.six = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.sixteen = nn.Linear(4, 5)
        self.grouped = nn.Linear(32, 3)
        self.token = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
        y = self.two(F.relu(self.four(F.relu(self.eight(x)))))
        y = F.relu(self.six(y)) + self.token
        return self.sixteen(y.mean((2, 3))), self.grouped(late)


SCHEMES = {
    "eight": "a8w8-per_tensor",
    "four": "a8w4",
    "two": "a4w2",
    "six": "a8w6",
    "sixteen": "a16w16",
    "grouped": "dyn8w4g32",
}
BATCH = torch.export.Dim("batch", min=1, max=16)


def example_of_widths() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((2, 3, 6, 6), (2, 32)))


def prepared_widths() -> GraphModule:
    """With the same weights every time, and a dynamic batch; no data was seen."""
    torch.manual_seed(0)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    for name, own in SCHEMES.items():
        quantizer.set_module_name(name, own)
    captured = torch.export.export(
        Widths().eval(), example_of_widths(), dynamic_shapes=({0: BATCH}, {0: BATCH})
    )
    return prepare_pt2e(captured.module(), quantizer)


@cache
def widths() -> tuple[GraphModule, Inputs]:
    """Calibrated on the example, and converted."""
    prepared, example = prepared_widths(), example_of_widths()
    prepared(*example)
    return convert_pt2e(prepared), example
