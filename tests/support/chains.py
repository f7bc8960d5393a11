"""A long chain of layers, and what each stage of quantizing and lowering it takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
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


def convert_in_stages(model: nn.Module, x: Tensor, quantizer: Any, stage: Meter) -> GraphModule:
    """From the model to a converted graph; no stage leaves its input in memory."""
    with stage("capture"):
        captured = torch.export.export(model, (x,)).module()
    with stage("prepare"):
        prepared = prepare_pt2e(captured, quantizer)
        del captured
    with stage("calibrate"):
        prepared(x)
    with stage("convert"):
        converted: GraphModule = convert_pt2e(prepared)
        del prepared
    return converted


def run_stages(model: nn.Module, x: Tensor, stage: Meter) -> cq.LoweredProgram:
    """From the model to a program that was checked: each stage of this package inside of a meter.

    The last one, ``lower``, has stages of its own that ``progress`` tells of; the names of those
    say what they do.
    """
    converted = convert_in_stages(model, x, cq.IntegerQuantizer().set_global("a8w8"), stage)
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
