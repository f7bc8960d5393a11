"""Programs that devices have to compute as the integer reference does, and how that is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import custom_quantizer as cq
from custom_quantizer.app.digits import DigitsNet
from custom_quantizer.backends.xnnpack.checks import is_exact, relative_error
from custom_quantizer.core.graph import (
    is_constant,
    is_quantize,
    is_static,
    qparams_of,
)
from custom_quantizer.ops.backend import Backend, get_mode
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.device_manifest import read_manifest, tensor_from_bytes
from custom_quantizer.reference.verifying import instrumented
from support.cifar_models import resnet20
from support.fuzz import Compared
from support.graphs import Function, Inputs, differences
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


class FirstLayers(nn.Module):
    """Convolutions that read joined columns: of images, of one channel, and of a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 20, 7, 2, 3)
        self.narrow = nn.Conv2d(3, 17, 3, 2, 1)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.grey = nn.Conv2d(1, 9, 5, (1, 3), 2)
        self.signal = nn.Conv1d(1, 16, 10, 5)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.wide(x), self.narrow(x), self.patches(x), self.grey(y), self.signal(z)


class Resizes(nn.Module):
    """Bilinear resizes to several sizes, of channels that fill registers and some more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 27, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.layer(x)
        resize = partial(F.interpolate, x, mode="bilinear")
        aligned = partial(resize, align_corners=True)
        return (
            *(resize(size=size) for size in ((24, 26), (5, 40), (13, 9))),
            *(aligned(size=size) for size in ((23, 25), (7, 31))),
        )


class Pairs(nn.Module):
    """Every pair of integers."""

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


def pairs(times: tuple[int, int]) -> Callable[[int], Inputs]:
    """All pairs of 256 integers.

    Calibration (seeds 0 to 3) sees negative numbers ``times[0]`` and others ``times[1]``, and all
    else by 0, which gives the scale of the product: equal powers of two make ties.
    """

    def draw(seed: int) -> Inputs:
        grid = torch.arange(-128.0, 128) / 32
        a = grid.view(1, 1, 1, 256).expand(1, 1, 256, 256)
        b = grid.view(1, 1, 256, 1).expand(1, 1, 256, 256)
        if seed < 4:
            a = torch.where(b * 32 == torch.where(a < 0, times[0], times[1]), a, 0.0)
        return a.contiguous(), b.contiguous()

    return draw


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
    **{
        f"transformer block, {tokens} tokens": Network(
            Transformer, random_inputs((4, tokens, 32)), samples=4
        )
        for tokens in (8, 24)
    },
    "products of matrices": Network(
        lambda: Function(lambda _self, a, b, c, d: (a @ b, c @ d, d.mT @ c.mT)),
        random_inputs((3, 5, 16), (3, 16, 40), (2, 3, 25, 16), (2, 3, 16, 40)),
        samples=4,
    ),
    "narrow products": Network(
        lambda: Function(lambda _self, a, b: a @ b),
        random_inputs((3, 5, 16), (3, 16, 8)),
        samples=4,
    ),
    "elementwise": Network(Elementwise, random_inputs((2, 3, 12, 12)), samples=4),
    "tables": Network(Tables, random_inputs((2, 3, 12, 12)), samples=4),
    "first layers": Network(
        FirstLayers, random_inputs((2, 3, 20, 24), (2, 1, 9, 18), (2, 1, 100)), samples=4
    ),
    "resizes": Network(Resizes, random_inputs((2, 3, 12, 13)), samples=4),
    "all pairs": Network(Pairs, pairs((29, 33)), samples=1),
    "all pairs, with ties": Network(Pairs, pairs((32, 32)), samples=1),
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
    *(("all pairs", "a8w8"), ("all pairs, with ties", "a8w8"), ("tables", "a8w8")),
    *(("first layers", scheme) for scheme in ("a8w8", "a4w4")),
    *(("resizes", scheme) for scheme in ("a8w8", "a16w8")),
    *(("narrow products", "a8w8"), ("products of matrices", "a8w8")),
    *((f"transformer block, {tokens} tokens", "a8w8") for tokens in (8, 24)),
    *((name, "a8w8") for name in ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5")),
    ("mobilenet_v2", "a8w4"),
)
"""Network and scheme."""


@dataclass(frozen=True)
class Judged:
    """What became of one program on one CPU.

    Attributes:
        values: how many were compared with the integer reference.
        different: how many are not equal to it.
        exact: whether all have to be equal; otherwise each has a bound, given those before it.
        wrong: what is outside its bound; empty if all is well.
    """

    values: int
    different: int
    exact: bool
    wrong: tuple[str, ...]


MODES = {"aarch64": "xnnpack-neon", "x86_64": "xnnpack"}
"""Arithmetic of a machine."""


class DeviceProgram:
    """A network that was quantized and lowered for a device.

    Args:
        name: of the network.
        scheme: of all ops.
    """

    def __init__(self, name: str, scheme: str) -> None:
        self.network = NETWORKS[name]
        self.dynamic = scheme.startswith("dyn")
        quantizer = cq.IntegerQuantizer().set_global(scheme)
        if not self.dynamic:
            quantizer.set_io(outputs=scheme.partition("w")[0])
        torch.manual_seed(0)
        model = randomize_batch_norms(self.network.build()).eval()
        inputs = self.network.inputs
        self.converted: Converted = convert(
            model, inputs(0), quantizer, [inputs(seed) for seed in range(4)]
        )
        self.lowered = cq.lower(self.converted.graph, inputs(0))
        graph = read_converted(self.converted.graph)
        self.exact = is_exact(self.lowered, graph, everywhere=True)
        self.batches = [inputs(seed) for seed in range(4, 4 + self.network.samples)]

    def save(self, folder: Path, machine: str) -> Path:
        """Write the device test: of every op, where each tensor has a bound of its own.

        Args:
            folder: to make.
            machine: ``aarch64`` or ``x86_64``.
        """
        by_op = not self.exact and not self.dynamic
        mode = MODES[machine]
        return self.lowered.save_device_test(folder, self.batches, every_op=by_op, mode=mode)

    def judge(self, kit: Path) -> Judged:
        """Compare what a device computed.

        Args:
            kit: folder of the device test.
        """
        manifest = read_manifest(kit)
        values = different = 0
        wrong: list[str] = []
        for n, sample in enumerate(manifest.samples):
            want, got = (
                [
                    tensor_from_bytes((kit / folder / entry.file).read_bytes(), entry, entry.file)
                    for entry in sample.outputs
                ]
                for folder in ("expected", "outputs")
            )
            values += sum(map(Tensor.numel, want))
            different += sum(int((a != b).sum()) for a, b in zip(want, got, strict=True))
            if self.exact:
                wrong += [f"sample {n}, {line}" for line in differences(got, want)]
            elif self.dynamic:
                errors = map(relative_error, want, got)
                wrong += [
                    f"sample {n}: relative error {e:.3g}" for e in errors if e > DYNAMIC_ERROR
                ]
            else:
                found = tensors_outside_bounds(
                    self.converted, self.batches[n], got, get_mode(manifest.mode)
                )
                wrong += [f"sample {n}, {line}" for line in found]
        return Judged(values, different, self.exact, tuple(wrong))


DYNAMIC_ERROR = 0.02
"""Of a linear layer quantized at run time: the bound of ``test_xnnpack_ops.py``."""


def tensors_outside_bounds(
    done: Converted, inputs: Inputs, outputs: list[Any], backend: Backend
) -> list[str]:
    """Compare all quantized tensors of a graph, as a program returned them, one op at a time."""
    tapped, _ = instrumented(done.graph)
    nodes = [n for n in tapped.graph.nodes if is_quantize(n) and not is_constant(n.args[0])]
    nodes = [n for n in nodes if is_static(n)]
    stored: dict[Node, Tensor] = {}
    for node, output in zip(nodes, outputs, strict=True):
        q = qparams_of(tapped, node)
        stored[node] = torch.round(output.double() / cast(float, q.scale)) + q.zero_point
    compared = Compared(read_converted(tapped, backend), stored)
    compared.run(*inputs)
    return compared.wrong
