"""Captured, calibrated and converted models for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq

_NO_AUXILIARY = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def randomize_batch_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and an affine part that folding has to get right."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = module.running_mean.shape
            module.running_mean = torch.randn(shape, generator=generator) * 0.1
            module.running_var = torch.rand(shape, generator=generator) * 1.5 + 0.5
            if module.affine:
                module.weight.data = torch.rand(shape, generator=generator) + 0.5
                module.bias.data = torch.randn(shape, generator=generator) * 0.1
    return model


def randomize_zero_heads(model: nn.Module) -> nn.Module:
    """Give layers that start out as zeros (the head of a vision transformer) weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


class BackboneAndHead(nn.Module):
    """A detector without anchors and non-maximum suppression, which are no network."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", self.head(list(self.backbone(x).values())))


def torchvision_model(name: str) -> nn.Module:
    """A torchvision model with seeded random weights, in eval mode; detectors up to their head."""
    torch.manual_seed(0)
    options = dict(_NO_AUXILIARY.get(name, {}))
    if name.startswith(("ssd", "lraspp", "deeplab", "fcn")):
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("ssd"):
        model = BackboneAndHead(model)
    return randomize_batch_norms(randomize_zero_heads(model)).eval()


def conv(out: int = 4, **options: Any) -> nn.Conv2d:
    """A convolution of four channels that keeps the size of images."""
    return nn.Conv2d(4, out, 3, padding=1, **options)


@dataclass(frozen=True)
class Converted:
    """A model on its way to a program."""

    graph: GraphModule
    plan: cq.Plan
    example: tuple[Tensor, ...]


def convert(
    model: nn.Module,
    example: tuple[Tensor, ...],
    quantizer: cq.IntegerQuantizer | str = "a8w8",
    calibration: Any = None,
    **export: Any,
) -> Converted:
    """Capture, prepare, calibrate (on the example unless told otherwise) and convert.

    ``export`` goes to ``torch.export.export``.
    """
    if isinstance(quantizer, str):
        quantizer = cq.IntegerQuantizer().set_global(quantizer)
    captured = torch.export.export(model.eval(), example, **export).module()
    prepared = prepare_pt2e(captured, quantizer)
    for batch in calibration if calibration is not None else [example]:
        prepared(*batch)
    return Converted(convert_pt2e(prepared), quantizer.last_plan, example)
