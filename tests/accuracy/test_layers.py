"""Layers as matrices."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from support.dispatched import Dispatched
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.accuracy.layers import Layer, find_layers

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (5, 3, 6)),
    "conv": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 6)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 1)), (2, 4, 7, 6)),
    "one dim": (nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (2, 4, 9)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
        (2, 4, 4, 5),
    ),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2),
        (2, 4, 4, 5),
    ),
    "transposed, one dim": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1), (2, 4, 5)),
    "without bias": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 5)),
}


def _layer(module: nn.Module, shape: tuple[int, ...], scheme: str = "a8w4") -> tuple[Layer, Tensor]:
    """The module as a layer whose weights are small integers, and an input of small integers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        values = torch.randint(-7, 8, parameter.shape, generator=generator)
        parameter.data.copy_(values.to(torch.float32))
    x = torch.randint(-9, 10, shape, generator=generator).to(torch.float32)
    exported = torch.export.export(nn.Sequential(module), (x,)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global(scheme))
    prepared(x)
    ((layer,), refused) = find_layers(cast(GraphModule, prepared))
    assert not refused
    return layer, x


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_patches_are_the_layer(name: str) -> None:
    module, shape = LAYERS[name]
    layer, x = _layer(module, shape)
    rows = layer.to_rows(layer.weight.detach())
    assert torch.equal(layer.from_rows(rows), layer.weight)
    bias = layer.bias
    products = rows @ layer.patches(x)  # small integers: exact in any order
    expected = layer.compute(x, layer.weight, bias)
    flat = products.flatten(0, 1) if bias is None else products.flatten(0, 1) + bias.unsqueeze(1)
    axis = expected.dim() - 1 if name == "linear" else 1
    assert torch.equal(flat, expected.movedim(axis, 0).flatten(1))
    assert torch.allclose(
        layer.channel_means([expected]), flat.mean(1, dtype=torch.float64), rtol=1e-12
    )


@pytest.mark.parametrize("scheme", ["a8w4", "a8w4-per_tensor"])
@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise", "transposed, grouped", "linear"])
def test_scales_of_rows_are_those_of_the_weight(name: str, scheme: str) -> None:
    layer, _ = _layer(*LAYERS[name], scheme)
    scale = layer.observer.largest_scale(layer.weight)
    integers = layer.observer.integers(layer.weight, scale)
    rows = layer.to_rows(integers.to(torch.float32)) * layer.scale_of_rows(scale)
    assert torch.equal(layer.from_rows(rows), layer.observer.dequantized(integers, scale))
    ones = torch.ones(3, *layer.to_rows(layer.weight).shape[:2])
    sums = layer.sum_by_scale(ones)
    assert sums.shape == (3, *scale.shape)
    assert float(sums[0].sum()) == ones[0].numel()


def test_scales_of_weight_groups() -> None:
    layer, _ = _layer(nn.Linear(64, 4), (5, 64), "dyn8w4g32")
    scale = layer.observer.largest_scale(layer.weight)
    assert scale.shape == (4, 2)
    integers = layer.observer.integers(layer.weight, scale)
    rows = layer.to_rows(integers.to(torch.float32)) * layer.scale_of_rows(scale)
    assert torch.equal(layer.from_rows(rows), layer.observer.dequantized(integers, scale))
    assert layer.sum_by_scale(torch.ones(3, 1, 4)).shape == (3, 4, 2)


def test_weights_of_one_magnitude_lose_nothing() -> None:
    layer, _ = _layer(nn.Conv2d(2, 2, 2), (1, 2, 4, 4))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0] = 1 / 9
        layer.weight[1] = -0.3
    assert layer.loses_nothing()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 1 / 10
    assert not layer.loses_nothing()


@torch.no_grad()
def test_factors_of_channels_are_multiplied() -> None:
    """PyTorch's convolution calls a matrix product for each channel; the bits are the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer, x = _layer(nn.Conv2d(5, 5, 1, groups=5), (1, 5, 6, 7))
        with Dispatched() as calls:
            got = layer.compute(x / 3, layer.weight, layer.bias)
    finally:
        torch.set_num_threads(before)
    assert "aten.convolution.default" not in calls.names
    assert torch.equal(got, torch.conv2d(x / 3, layer.weight, layer.bias, groups=5))
