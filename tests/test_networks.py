"""A small network of each kind, whole: one delegate, and the reference's integers in every output.

The slow tests of ``test_models.py`` and ``test_architectures.py`` do this with networks of their
real size; these here take seconds each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from support.fuzz import check_each_tensor, check_plan
from support.graphs import lowered_exactly
from support.models import convert, randomize_batch_norms
from support.selection import slow_but
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.checks import is_exact

IMAGE = (1, 3, 12, 12)


def conv_norm(inputs: int, outputs: int, size: int = 1, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """ResNet: one block with a plain shortcut, one with a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, 3)
        self.first, self.second = conv_norm(8, 8, 3), conv_norm(8, 8, 3)
        self.down, self.shortcut = conv_norm(8, 12, 3, stride=2), conv_norm(8, 12, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.relu(self.down(x) + self.shortcut(x))
        return cast(Tensor, self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Inverted(nn.Module):
    """MobileNetV3: expand, depthwise, squeeze and excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_norm(3, 16), conv_norm(16, 16, 5, groups=16, stride=2)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.again = conv_norm(16, 8), conv_norm(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.relu6(self.expand(x))))
        weights = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = self.project(x * F.hardsigmoid(self.excite(weights)))
        x = x + self.again(x)
        return cast(Tensor, self.head(x.mean((2, 3))))


class Branches(nn.Module):
    """Inception and DenseNet: branches side by side, then layers that see all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = conv_norm(3, 6), conv_norm(3, 6, 3)
        self.pooled = nn.Conv2d(3, 4, 1)
        self.dense, self.denser = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(20, 4, 3, padding=1)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.one(x), self.three(x), self.pooled(F.max_pool2d(x, 3, 1, 1))]
        x = F.relu(torch.cat(branches, 1))
        x = torch.cat([x, F.relu(self.dense(x))], 1)
        x = torch.cat([x, F.relu(self.denser(x))], 1)
        return cast(Tensor, self.head(F.avg_pool2d(x, 2)).flatten(1))


class Skip(nn.Module):
    """U-Net: down, up by nearest neighbours, and what was there before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv_norm(3, 6, 3), conv_norm(6, 12, 3)
        self.up, self.larger = conv_norm(18, 6, 3), nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.down(x))
        below = F.relu(self.middle(F.max_pool2d(skip, 2)))
        joined = torch.cat([F.interpolate(below, scale_factor=2), skip], 1)
        return cast(Tensor, self.head(self.larger(F.relu(self.up(joined)))))


class Signal(nn.Module):
    """One dimension: causal, dilated and grouped convolutions over time, and the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, dilation=2)
        self.second = nn.Conv1d(8, 8, 3, groups=4, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(F.pad(x, (4, 0))))
        x = F.max_pool1d(F.relu(self.second(x)), 2)
        return cast(Tensor, self.head(x.mean(-1)))


class Heads(nn.Module):
    """Detectors: one body, a head for classes and one for places."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classes, self.places = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.classes(x), F.relu(self.places(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, one encoder layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 10, 16))
        self.encoder = nn.TransformerEncoderLayer(
            16, 2, 32, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return cast(Tensor, self.head(self.norm(self.encoder(x))[:, 0]))


def mixed() -> cq.IntegerQuantizer:
    """Three widths in one network; the wide head is emulated in float."""
    body = cq.IntegerQuantizer().set_global("a8w8").set_module_name("body", "a8w4")
    return body.set_module_name("classes", "a16w8").set_module_name("places", "a8w4-bias16")


Build = Callable[[], nn.Module]
EXACT: dict[str, tuple[Build, tuple[int, ...]]] = {
    "residual": (Residual, IMAGE),
    "inverted residual": (Inverted, IMAGE),
    "branches": (Branches, IMAGE),
    "u-net": (Skip, IMAGE),
    "signal": (Signal, (2, 3, 24)),
    "two heads": (Heads, IMAGE),
}
FLOATING: dict[str, tuple[Build, tuple[int, ...], str | Callable[[], cq.IntegerQuantizer]]] = {
    "two heads, a8w4 and a16w8": (Heads, IMAGE, mixed),
    "vision transformer": (VisionTransformer, IMAGE, "a8w8"),
}


def built(build: Build) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(build()).eval()


# Of the others tests/ops checks the parts.
QUICK = ("residual", "inverted residual", "u-net")


@pytest.mark.parametrize("name", slow_but(QUICK, EXACT))
def test_every_output_is_the_references(name: str) -> None:
    """Bit for bit, for inputs that saturate too; no op is in float, nothing runs outside."""
    build, shape = EXACT[name]
    batches = [(torch.randn(shape),) for _ in range(3)]
    done = convert(built(build), batches[0], calibration=batches)
    graph = check_plan(done)
    lowered = lowered_exactly(done.graph, done.example)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    assert is_exact(lowered, graph), [op.node.name for op in graph.floating]
    assert done.plan.tally == lowered.report.tally
    program = cq.inspect_program(lowered.buffer)
    assert str(program.tally) == str(done.plan.tally)
    assert program.biases == cq.inspect(done.graph, lowered).biases


@pytest.mark.parametrize(
    "name",
    [
        "two heads, a8w4 and a16w8",
        pytest.param("vision transformer", marks=pytest.mark.slow),
    ],
)
def test_every_tensor_follows_from_those_before(name: str) -> None:
    """Where ops run in float: each tensor within the bound of ``docs/device_arithmetic.md``."""
    build, shape, quantizer = FLOATING[name]
    chosen = quantizer if isinstance(quantizer, str) else quantizer()
    batches = [(torch.randn(shape),) for _ in range(3)]
    done = convert(built(build), batches[0], chosen, batches)
    check_plan(done)
    check_each_tensor(done)
