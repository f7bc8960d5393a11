"""Activations that are quantized at run time."""

from __future__ import annotations

import pytest
import torch
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels


class Images(nn.Module):
    """Convolutions of all kinds: dense, depthwise, over one dim, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wider = nn.Conv2d(8, 16, 2, 2)
        self.mix = nn.Conv2d(16, 15, 1)
        self.back = nn.Conv2d(15, 16, 1)
        self.signal = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = self.back(self.mix(torch.relu(self.wider(x))))
        return self.head(torch.relu(self.signal(x.flatten(2))).mean(2))


@pytest.mark.parametrize(("scheme", "decibels"), [("dyn8w8", 35.0), ("dyn8w4", 15.0)])
def test_dense_convolutions_and_linear_layers_in_one_delegate(scheme: str, decibels: float) -> None:
    torch.manual_seed(0)
    model = Images().eval()
    x = torch.randn(3, 3, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).reshape(3, 1, 1, 1)
    converted = convert(model, (x,), scheme)
    plan, program = converted.plan, cq.lower(converted.graph, (x,))
    assert program.report.delegates == 1
    assert program.report.outside == ()
    run = {op.node: op.backend for op in program.report.ops}
    packed = kernels.PACKED_INT4 if scheme == "dyn8w4" else kernels.DYNAMIC_INT8
    layers = {"conv2d": kernels.DYNAMIC_INT8, "conv2d_2": kernels.DYNAMIC_INT8}
    layers |= {"conv2d_3": packed, "conv2d_4": kernels.DYNAMIC_INT8, "linear": packed}
    assert {node: run[node] for node in layers} == layers
    assert {node: plan.op(node).backend for node in layers} == {
        node: kernel.label for node, kernel in layers.items()
    }
    assert run["conv2d_1"] is kernels.FLOAT
    assert "without groups" in plan.op("conv2d_1").reason
    want, got = model(x), program.run(x)
    for image in range(3):  # each has a scale of its own
        noise = (got[image] - want[image]).norm() / want[image].norm()
        assert -20 * float(torch.log10(noise)) > decibels


class Gated(nn.Module):
    """Two layers that read one tensor, as in the feed-forward part of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x) * x
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + x


def test_layers_that_share_an_input_are_one_delegate() -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 5, 8)
    program = cq.lower(convert(model, (x,), "dyn8w8").graph, (x,))
    assert program.report.delegates == 1
    noise = (program.run(x) - model(x)).norm() / model(x).norm()
    assert float(noise) < 0.02


class GroupedQueries(nn.Module):
    """Attention whose heads share keys in pairs, as language models repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(1, 6, 4, 8).transpose(1, 2)
        k = self.k(x).view(1, 6, 2, 1, 8).transpose(1, 2).expand(1, 2, 6, 2, 8)
        return torch.softmax(q @ k.transpose(2, 3).reshape(1, 4, 6, 8).transpose(2, 3), -1)


def test_keys_that_are_repeated_in_float_are_one_delegate() -> None:
    torch.manual_seed(0)
    model, x = GroupedQueries().eval(), torch.randn(1, 6, 32)
    program = cq.lower(convert(model, (x,), "dyn8w8").graph, (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert float((program.run(x) - model(x)).norm() / model(x).norm()) < 0.02


class Orders(nn.Module):
    """Layers that read images in the order of the model, and rows of images that lie otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.image = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.rows, self.last, self.other = nn.Linear(6, 6), nn.Linear(4, 4), nn.Conv2d(4, 8, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        image = self.stem(x)
        behind = self.rows(image)
        last = self.last(image.permute(0, 2, 3, 1))
        of_rows = self.image(self.rows(x) + behind)
        moved = self.image(
            nn.functional.pixel_shuffle(self.other(last.permute(0, 3, 1, 2)), 2)[:, :2].repeat(
                1, 2, 1, 1
            )
        )
        return behind, of_rows, moved, self.image(y.flatten(0, 1)), y * 2.0, self.rows(y)


@pytest.mark.parametrize("mixed", [False, True])
def test_layers_read_images_in_any_order(mixed: bool) -> None:
    """Copies between the orders of images belong in float, before the scales are chosen."""
    torch.manual_seed(0)
    model, example = Orders().eval(), (torch.randn(1, 4, 5, 6), torch.randn(1, 2, 4, 5, 6))
    quantizer = cq.IntegerQuantizer().set_global("dyn8w8")
    if mixed:  # integers with a scale from data become images whose scale is chosen again
        quantizer.set_operator_type(torch.ops.aten.add.Tensor, "a8w8").set_module_name(
            "rows", "a8w8"
        )
    program = cq.lower(convert(model, example, quantizer).graph, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    for want, got in zip(model(*example), program.run(*example), strict=True):
        assert float((got - want).norm() / want.norm()) < 0.02
