"""A long chain of layers, and what each stage of quantizing and lowering it takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq

OPS_PER_BLOCK = 4


class Block(nn.Module):
    """Convolution, relu, linear layer, and the addition of what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.relu(self.conv(x)))


def chain(ops: int) -> tuple[nn.Module, Tensor]:
    """A chain of so many ops, rounded down to whole blocks, and an input."""
    blocks = (Block() for _ in range(ops // OPS_PER_BLOCK))
    return nn.Sequential(*blocks).eval(), torch.randn(1, 4, 4, 4)


Meter = Callable[[str], AbstractContextManager[None]]
"""Measures what runs inside of it, by the name of a stage."""


def run_stages(model: nn.Module, x: Tensor, stage: Meter) -> cq.LoweredProgram:
    """From the model to a program that was checked: each stage of this package inside of a meter.

    The last one, ``lower``, has stages of its own that ``progress`` tells of; the names of those
    say what they do.
    """
    with stage("capture"):
        captured = torch.export.export(model, (x,)).module()
    with stage("prepare"):
        prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
        del captured
    with stage("calibrate"):
        prepared(x)
    with stage("convert"):
        converted = convert_pt2e(prepared)
        del prepared
    inner: list[AbstractContextManager[None]] = []

    def begin(name: str) -> None:
        if inner:
            inner.pop().__exit__(None, None, None)
        inner.append(stage(name))
        inner[0].__enter__()

    begin("reading the graph")
    program = cq.lower(converted, (x,), progress=begin)
    inner.pop().__exit__(None, None, None)
    return program
