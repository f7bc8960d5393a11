"""Depthwise 1x1 convolutions are multiplied: the same bits, of calls that are many times faster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.dispatched import Dispatched
from support.graphs import capture
from support.models import randomize_batch_norms
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.calibration.channel_factors import ChannelFactors
from custom_quantizer.calibration.statistics import solved_qparams

aten = torch.ops.aten


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (2, 3, 9, 1), (16, 4, 5, 5), (0, 2, 3, 3)])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_bits_are_those_of_the_convolution(
    shape: tuple[int, ...], biased: bool, threads: int
) -> None:
    torch.manual_seed(0)
    x, channels = torch.randn(shape), shape[1]
    weight = nn.Parameter(torch.randn(channels, 1, 1, 1))
    bias = torch.randn(channels) if biased else None
    quick = ChannelFactors.of(weight)
    assert isinstance(quick, ChannelFactors)
    for stride, padding in ((1, 0), (2, 0), (1, 1)):
        args = ([stride] * 2, [padding] * 2, [1, 1], channels)
        wanted = aten.conv2d.default(x, weight, bias, *args)
        with Dispatched() as calls:
            result = aten.conv2d.default(x, quick, bias, *args)
        assert type(result) is Tensor
        assert torch.equal(result, wanted)
        assert result.stride() == wanted.stride()
        multiplied = (threads, stride, padding) == (1, 1, 0) and 0 < len(x) < 16
        assert ("aten.mul.Tensor" in calls.names) == multiplied


def test_no_other_weight_is_one() -> None:
    channels = torch.randn(4, 1, 1, 1)
    assert ChannelFactors.of(channels) is channels  # a gradient may be wanted
    with torch.no_grad():
        for weight in (torch.randn(4, 2, 1, 1), torch.randn(4, 1, 3, 3), torch.randn(4, 1)):
            assert ChannelFactors.of(weight) is weight
        assert type(ChannelFactors.of(channels) * 2) is Tensor


def test_ranges_of_batch_norms_without_a_layer(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that the convolutions themselves give."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.ReLU())
    model, x = randomize_batch_norms(model).eval(), torch.randn(1, 6, 7, 7)
    found = []
    for convolved in (False, True):
        if convolved:
            monkeypatch.setattr(ChannelFactors, "of", lambda weight: weight)
        prepared = prepare_pt2e(capture(model, (x,)), cq.IntegerQuantizer().set_global("a8w8"))
        with torch.no_grad(), Dispatched() as calls:
            prepared(x)
        assert ("aten.mul.Tensor" in calls.names) == (threads == 1 and not convolved)
        found.append(solved_qparams(prepared))
    assert found[0] == found[1]
