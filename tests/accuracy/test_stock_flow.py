"""Nothing loses SQNR against the stock flow, in which what has no pattern is float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.graphs import Function
from support.selection import slow_but
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

import custom_quantizer as cq
from custom_quantizer.core.noise import Noise


def basis(values: Tensor) -> Tensor:
    """Gaussians of a few widths around a few centers, as of a spline."""
    return torch.exp(-(((values.unsqueeze(-1) - torch.linspace(-2, 2, 8)) / 0.57) ** 2)).flatten(1)


def waves(phases: Tensor) -> Tensor:
    return torch.cat([phases.sin(), phases.cos()], -1)


FEATURES = (64, 4)
MODELS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[int, ...]]] = {
    "spline": (
        lambda s, x: s.last(basis(s.first(basis(x)))),
        {"first": nn.Linear(32, 16), "last": nn.Linear(128, 8)},
        FEATURES,
    ),
    "radial basis functions": (
        lambda s, x: s.last(
            torch.exp(-((x.unsqueeze(1) - s.first.weight) ** 2).sum(-1)),
        ),
        {"first": nn.Linear(4, 16), "last": nn.Linear(16, 8)},
        FEATURES,
    ),
    "Fourier features": (
        lambda s, x: s.last(waves(2 * torch.pi * x @ s.first.weight)),
        {"first": nn.Linear(32, 4), "last": nn.Linear(64, 8)},
        FEATURES,
    ),
    "opacities": (
        lambda s, x: s.last(1 - torch.exp(-0.05 * torch.relu(s.first(x)))),
        {"first": nn.Linear(4, 16), "last": nn.Linear(16, 8)},
        FEATURES,
    ),
    "logarithm of a sum of exponentials": (
        lambda s, x: torch.log(torch.exp(s.first(x)).sum(-1)),
        {"first": nn.Linear(4, 16)},
        FEATURES,
    ),
}
MODELS |= {
    name: (
        lambda s, x, options=options: F.interpolate(s.layer(x), **options),
        {"layer": nn.Conv2d(3, 3, 3, padding=1)},
        (1, 3, 12, 12),
    )
    for name, options in {
        "bicubic": {"size": (29, 24), "mode": "bicubic", "align_corners": True},
        "antialiased": {"size": (24, 29), "mode": "bilinear", "antialias": True},
    }.items()
}
LOST_DB = 0.5
"""At most. Without the rule of its own, each model loses more than twice as much."""


def sqnr(name: str, quantizer: Quantizer) -> tuple[float, torch.fx.GraphModule, Tensor]:
    """In dB over other inputs than the model was calibrated on; what was converted; an input."""
    torch.manual_seed(0)
    function, modules, shape = MODELS[name]
    model = Function(function, **modules).eval()
    for module in model.children():
        module.reset_parameters()  # type: ignore[operator]  # all have it
    batches = [torch.randn(shape) for _ in range(8)]
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
    for batch in batches[:4]:
        prepared(batch)
    converted = convert_pt2e(prepared)
    noise = Noise()
    for batch in batches[4:]:
        noise.add(model(batch), converted(batch))
    return noise.ratio, converted, batches[0]


@pytest.mark.parametrize("name", slow_but(["bicubic"], MODELS))
def test_no_more_is_lost_than_in_the_stock_flow(name: str) -> None:
    config = get_symmetric_quantization_config(is_per_channel=True)
    stock, _, _ = sqnr(name, XNNPACKQuantizer().set_global(config))
    ours, converted, x = sqnr(name, cq.IntegerQuantizer().set_global("a8w8"))
    assert ours >= stock - LOST_DB, (ours, stock)
    report = cq.lower(converted, (x,)).report
    assert (report.delegates, report.outside) == (1, ())


@pytest.mark.parametrize("name", ["bicubic", "antialiased"])
def test_resizes_by_layers_are_as_derived(name: str) -> None:
    """Their sums are those of the reference but for the last bits, of which there is a bound."""
    _, converted, x = sqnr(name, cq.IntegerQuantizer().set_global("a8w8"))
    verification = cq.verify(converted, cq.lower(converted, (x,)), (x,))
    (output,) = verification.outputs
    assert verification.as_derived
    assert output.bound is not None
    assert output.max_abs <= output.bound < 1e-4
