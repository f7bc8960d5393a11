"""Programs that devices have to compute as the integer reference does, and how that is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import custom_quantizer as cq
from custom_quantizer.app.digits import DigitsNet
from custom_quantizer.backends.xnnpack.checks import instrumented, relative_error
from custom_quantizer.core.graph import (
    is_constant,
    is_quantize,
    is_static,
    qparams_of,
)
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.device_manifest import read_manifest, tensor_from_bytes
from support.cifar_models import resnet20
from support.fuzz import Compared
from support.graphs import Inputs
from support.models import Converted, convert, randomize_batch_norms, torchvision_model


class Elementwise(nn.Module):
    """What two integers become, and moves: add, sub, mul, cat, mean, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.left(x), self.right(x)
        joined = torch.cat([a + b, a * b], 1)
        return joined, a - b, joined.mean((2, 3)), F.max_pool2d(a, 2), F.avg_pool2d(b, 2)


class Tables(nn.Module):
    """Functions of one integer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.layer(x)
        return tuple(f(x) for f in (F.silu, F.gelu, torch.sigmoid, torch.tanh, F.hardswish, F.elu))


class Pairs(nn.Module):
    """Every pair of integers; with scales that are powers of two, so that many results are ties."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a * b, a + b, a - b


class Transformer(nn.Module):
    """A block with a head; norms and softmax run in float."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            32, 4, 64, norm_first=True, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.block(x).mean(1)))


def random_inputs(*shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    """Normal inputs by their seed; every fourth three times as large, so that much saturates."""

    def draw(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        size = 3.0 if seed % 4 == 3 else 1.0
        return tuple(size * torch.randn(shape, generator=generator) for shape in shapes)

    return draw


def pairs(seed: int) -> Inputs:
    """All pairs of 256 integers in units of 1/32.

    Calibration (seed 0) sees only pairs with 32/32, so that the scale of the product is 1/32 too.
    """
    grid = torch.arange(-128.0, 128) / 32
    a, b = grid.view(1, 1, 1, 256).expand(1, 1, 256, 256), grid.view(1, 1, 256, 1)
    b = b.expand(1, 1, 256, 256)
    if seed == 0:
        b = torch.where(b.abs() == 4, b, 1.0)
        a = torch.where(b == 1, a, 0.0)
        b = torch.where((a == 0) & (b == 1), 127 / 32, b)
    return a.contiguous(), b.contiguous()


@dataclass(frozen=True)
class Network:
    """A network and its inputs.

    Attributes:
        build: make it.
        inputs: by seed; 0 to 3 calibrate, the others are computed on the device.
        samples: how many are computed.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    samples: int = 2


NETWORKS = {
    "digits CNN": Network(DigitsNet, random_inputs((16, 1, 8, 8)), samples=4),
    "ResNet-20": Network(lambda: resnet20(pretrained=False), random_inputs((1, 3, 32, 32))),
    "transformer block": Network(Transformer, random_inputs((4, 12, 32)), samples=4),
    "elementwise": Network(Elementwise, random_inputs((2, 3, 12, 12)), samples=4),
    "tables": Network(Tables, random_inputs((2, 3, 12, 12)), samples=4),
    "all pairs": Network(Pairs, pairs, samples=1),
    "linear layers": Network(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        random_inputs((16, 64)),
        samples=4,
    ),
    "mobilenet_v2": Network(
        lambda: torchvision_model("mobilenet_v2"), random_inputs((1, 3, 96, 96))
    ),
    "mobilenet_v3_small": Network(
        lambda: torchvision_model("mobilenet_v3_small"), random_inputs((1, 3, 96, 96))
    ),
    "shufflenet_v2_x0_5": Network(
        lambda: torchvision_model("shufflenet_v2_x0_5"), random_inputs((1, 3, 96, 96))
    ),
}

PROGRAMS = (
    *(("digits CNN", scheme) for scheme in ("a8w8", "a8w4", "a4w4", "a16w8")),
    *(("ResNet-20", scheme) for scheme in ("a8w8", "a8w4")),
    *(("elementwise", scheme) for scheme in ("a8w8", "a4w4", "a16w8")),
    *(("linear layers", scheme) for scheme in ("a8w8", "a8w4", "dyn8w8")),
    *(("all pairs", "a8w8"), ("tables", "a8w8"), ("transformer block", "a8w8")),
    *((f"{name}", "a8w8") for name in ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5")),
)
"""Network and scheme."""


@dataclass(frozen=True)
class Judged:
    """What became of one program on one CPU.

    Attributes:
        values: outputs that were compared with those of the integer reference.
        different: how many are not equal.
        exact: whether all of them have to be equal.
        wrong: what is outside its bound; empty if all is well.
    """

    values: int
    different: int
    exact: bool
    wrong: tuple[str, ...]


class DeviceProgram:
    """A program on its way to a device.

    Args:
        name: of the network.
        scheme: of all ops.
    """

    def __init__(self, name: str, scheme: str) -> None:
        self.name, self.scheme = name, scheme
        network = NETWORKS[name]
        torch.manual_seed(0)
        self.model = randomize_batch_norms(network.build()).eval()
        example = network.inputs(0)
        calibration = [network.inputs(seed) for seed in range(4)]
        self.converted: Converted = convert(self.model, example, scheme, calibration)
        self.lowered = cq.lower(self.converted.graph, example)
        self.batches = [network.inputs(seed) for seed in range(4, 4 + network.samples)]

    def save(self, folder: Path) -> Path:
        """Write the device test: of every op, where ops that are not exact have bounds of their own."""
        dynamic = self.scheme.startswith("dyn")
        exact = not self.lowered.report.not_integer() or self._exact(folder / "plain")
        return self.lowered.save_device_test(
            folder / "kit", self.batches, every_op=not exact and not dynamic
        )

    def _exact(self, folder: Path) -> bool:
        return read_manifest(self.lowered.save_device_test(folder, self.batches[:1])).exact

    def judge(self, kit: Path) -> Judged:
        """Compare what a device computed."""
        manifest = read_manifest(kit)
        by_op = bool(manifest.outputs[0].node)
        values = different = 0
        wrong: list[str] = []
        for n, sample in enumerate(manifest.samples):
            got, want = (
                [
                    tensor_from_bytes((kit / folder / e.file).read_bytes(), e, e.file)
                    for e in sample.outputs
                ]
                for folder in ("outputs", "expected")
            )
            # The program's own outputs are the last tensors of a test of every op.
            for i, (mine, theirs) in enumerate(zip(want, got, strict=True)):
                count = int((mine != theirs).sum())
                values, different = values + mine.numel(), different + count
                if count and manifest.exact:
                    worst = float((mine - theirs).abs().max()) / (manifest.outputs[i].scale or 1)
                    wrong.append(f"sample {n}, output {i}: {count} differ, by up to {worst:g} units")
            if by_op:
                wrong += [f"sample {n}, {line}" for line in self._outside_bounds(n, got)]
            elif not manifest.exact:
                errors = map(relative_error, want, got)
                wrong += [f"sample {n}: relative error {e:.3g}" for e in errors if e > DYNAMIC_ERROR]
        return Judged(values, different, manifest.exact, tuple(wrong))

    def _outside_bounds(self, sample: int, outputs: list[Tensor]) -> list[str]:
        """Tensors that do not follow, within the bound of one op, from those before them."""
        return tensors_outside_bounds(self.converted, self.batches[sample], outputs)


DYNAMIC_ERROR = 0.02
"""Of a linear layer quantized at run time: the bound of ``test_xnnpack_ops.py``."""


def tensors_outside_bounds(done: Converted, inputs: Inputs, outputs: list[Any]) -> list[str]:
    """Compare all quantized tensors of a graph, as a program returned them, one op at a time."""
    tapped, _ = instrumented(done.graph)
    nodes = [n for n in tapped.graph.nodes if is_quantize(n) and not is_constant(n.args[0])]
    nodes = [n for n in nodes if is_static(n)]
    stored: dict[Node, Tensor] = {}
    for node, output in zip(nodes, outputs, strict=True):
        q = qparams_of(tapped, node)
        stored[node] = torch.round(output.double() / cast(float, q.scale)) + q.zero_point
    compared = Compared(read_converted(tapped), stored)
    compared.run(*inputs)
    return compared.wrong


@cache
def device_program(name: str, scheme: str) -> DeviceProgram:
    """Made once a process."""
    return DeviceProgram(name, scheme)
