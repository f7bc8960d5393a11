"""Tensors that are made on the way are where their operands are, so that all of it runs on CUDA."""

from __future__ import annotations

import pytest
import torch
from support.improvement import prepared_every_layer, smooth_images
from support.training import images, prepared_for
from support.two_devices import TwoDevices
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.config.improvement import ALGORITHMS
from custom_quantizer.training import qat

DATA = list(smooth_images(24).split(8))


@pytest.mark.slow
def test_every_algorithm_works_on_one_device() -> None:
    prepared = prepared_every_layer()
    with TwoDevices([*prepared.state_dict().values(), *DATA]) as mode:
        result = cq.improve(prepared, DATA, ALGORITHMS, iterations=2)
    assert mode.operations > 10_000
    assert {name for layer in result.layers for name in layer.algorithms} >= {
        "gptq",
        "bias_correction",
    }


def test_smoothquant_works_on_one_device() -> None:
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.LayerNorm(16), nn.Linear(16, 8))

    data = list(torch.randn(96, 16, generator=torch.Generator().manual_seed(0)).split(8))
    exported = torch.export.export(Normed().eval(), (data[0],)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global("a8w4"))
    cq.calibrate(prepared, data)
    with TwoDevices([*prepared.state_dict().values(), *data]):
        result = cq.improve(prepared, data, ["smoothquant", "gptq"])
    assert result.layers[-1].algorithms == ("smoothquant", "gptq")


def test_training_works_on_one_device() -> None:
    prepared, x, labels = prepared_for("a4w4-lsq"), images(16), torch.arange(16).remainder(4)
    with TwoDevices([*prepared.state_dict().values(), x, labels]) as mode:
        qat.finetune(prepared, [(x, labels)])
    assert mode.operations > 500


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.where(torch.zeros(3) > 0, x, x),
        lambda x: torch.zeros(3).add_(x),
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    ],
)
def test_mixing_is_noticed(wrong: object) -> None:
    x = torch.arange(3.0)
    with TwoDevices([x]), pytest.raises(AssertionError, match="CPU"):
        wrong(x)  # type: ignore[operator]
    with TwoDevices([x]) as mode:
        assert mode.is_there((x + torch.ones(3).to(x.device)) * torch.tensor(2.0))
        assert mode.is_there(x[torch.tensor([1])])
        assert not mode.is_there(x.cpu())
        assert not mode.is_there(x.to("cpu", torch.float64))
