"""What 4-bit weights save in the file, and what they cost in time: networks, and single layers.

Networks at a8w8 and a8w4; layers that XNNPACK has no packed kernel for, next to the same layer
written by hand as one that has a packed kernel; and strided pointwise layers, of which every other
pixel is taken first, next to the same layers with weights in bytes::

    python tests/benchmarks/packed_layers.py --output docs/results

Times are those of one core, the programs of a row in turn, many times; a ratio is the median of the
ratios of all turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import convert, randomize_batch_norms, torchvision_model

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

NETWORKS = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")

SECONDS = 0.05
"""Of each program in each turn."""

TURNS = 25


class Gathered(nn.Module):
    """A 3x3 convolution without padding: its nine taps next to each other, and a pointwise one."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        taps = conv.weight.permute(0, 2, 3, 1).reshape(conv.out_channels, -1, 1, 1)
        self.layer = nn.Conv2d(taps.shape[1], conv.out_channels, 1)
        self.layer.weight, self.layer.bias = nn.Parameter(taps.detach().clone()), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] - 2, x.shape[3] - 2
        taps = [x[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        result: Tensor = self.layer(torch.cat(taps, 1))
        return result


LAYERS: tuple[tuple[str, nn.Conv2d, tuple[int, ...]], ...] = tuple(
    (name, nn.Conv2d(inputs, outputs, 3), (1, inputs, size, size))
    for name, inputs, outputs, size in (
        ("3x3, 64 to 64 channels, 56x56", 64, 64, 58),
        ("3x3, 256 to 256 channels, 14x14", 256, 256, 16),
        ("3x3, 512 to 512 channels, 7x7", 512, 512, 9),
    )
)
STRIDED: tuple[tuple[str, nn.Conv2d, tuple[int, ...]], ...] = tuple(
    (name, nn.Conv2d(inputs, outputs, 1, 2), (1, inputs, size, size))
    for name, inputs, outputs, size in (
        ("1x1, stride 2, 256 to 512 channels, 56x56", 256, 512, 56),
        ("1x1, stride 2, 1024 to 2048 channels, 14x14", 1024, 2048, 14),
    )
)


def lowered(model: nn.Module, scheme: str, x: Tensor) -> cq.LoweredProgram:
    """A program, of which `lower` has compared constants and outputs with the reference."""
    return cq.lower(convert(model.eval(), (x,), scheme).graph, (x,))


def ratios(programs: list[cq.LoweredProgram], x: Tensor) -> list[float]:
    """Time of each program over that of the first."""
    calls = []
    for program in programs:
        program.run(x)
        start = time.perf_counter()
        program.run(x)
        calls.append(max(1, int(SECONDS / (time.perf_counter() - start))))
    found: list[list[float]] = []
    for _ in range(TURNS):
        seconds = []
        for program, count in zip(programs, calls, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                program.run(x)
            seconds.append((time.perf_counter() - start) / count)
        found.append([one / seconds[0] for one in seconds])
    return [round(statistics.median(column), 2) for column in zip(*found, strict=True)]


def packed_share(program: cq.LoweredProgram) -> float:
    """Share of the weights of layers that lie two to a byte."""
    sizes = {"int4": 0, "int8": 0}
    for delegate in program.contents.delegates:
        for op in delegate.ops:
            if op.weight is not None:
                weight = delegate.tensors[op.weight]
                sizes[weight.dtype] += weight.array().size
    return round(sizes["int4"] / sum(sizes.values()), 3)


def compared(name: str, shape: tuple[int, ...], *versions: tuple[nn.Module, str]) -> dict[str, Any]:
    """Two versions of a layer, each with its scheme: their bytes, and the time of the second."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    programs = [lowered(model, scheme, x) for model, scheme in versions]
    row = {
        "layer": name,
        "bytes": [len(program.buffer) for program in programs],
        "packed": packed_share(programs[1]),
        "time": ratios(programs, x)[1],
    }
    print(row, flush=True)
    return row


def measure() -> dict[str, Any]:
    """Networks and layers."""
    torch.set_num_threads(1)
    networks, layers, strided = [], [], []
    for name in NETWORKS:
        torch.manual_seed(0)
        model = randomize_batch_norms(torchvision_model(name))
        x = torch.randn(1, 3, 224, 224)
        eight, four = (lowered(model, scheme, x) for scheme in ("a8w8", "a8w4"))
        networks.append(
            {
                "network": name,
                "a8w8": len(eight.buffer),
                "a8w4": len(four.buffer),
                "packed": packed_share(four),
                "time": ratios([eight, four], x)[1],
            }
        )
        print(networks[-1], flush=True)
    for name, conv, shape in LAYERS:
        layers.append(compared(name, shape, (conv, "a8w4"), (Gathered(conv), "a8w4")))
    for name, conv, shape in STRIDED:
        strided.append(compared(name, shape, (conv, "a8w5"), (conv, "a8w4")))
    return {
        "version": 1,
        "executorch": version("executorch"),
        "networks": networks,
        "layers": layers,
        "strided": strided,
    }


def render(result: dict[str, Any]) -> str:
    """The result as two Markdown tables."""
    lines = [
        f"One core of x86-64, images of 224x224, ExecuTorch {result['executorch']}.",
        "",
        "| network | weights packed at `a8w4` | `a8w8` bytes | `a8w4` bytes | of `a8w8` | time, of "
        "`a8w8` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["networks"]:
        lines.append(
            f"| {row['network']} | {row['packed']:.1%} | {row['a8w8']:,} | {row['a8w4']:,} "
            f"| {row['a8w4'] / row['a8w8']:.2f} | {row['time']:.2f} |"
        )
    lines += [
        "",
        "| layer at `a8w4` | by hand | bytes | by hand | time by hand, of the layer's |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_layer(row, "taps side by side, 1x1") for row in result["layers"]]
    lines += [
        "",
        "| layer | bytes at `a8w5` | at `a8w4` | time, of that at `a8w5` |",
        "| --- | --- | --- | --- |",
    ]
    lines += [_layer(row) for row in result["strided"]]
    return "\n".join(lines) + "\n"


def _layer(row: dict[str, Any], *form: str) -> str:
    one, other = row["bytes"]
    cells = [row["layer"], *form, f"{one:,}", f"{other:,}", f"{row['time']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    result = measure()
    write_json_atomic(output / "packed_layers.json", result)
    write_text_atomic(output / "packed_layers.md", render(result))
    print(render(result))


if __name__ == "__main__":
    main()
