"""Cost of calibrating and converting, ours and the stock flow's, as ratios of one run.

    python tests/benchmarks/calibration_cost.py --output docs/results

Calibration is measured in float forwards of the same batches (alternating, medians); prepare and
convert in seconds of the stock flow (``XNNPACKQuantizer``, per-channel weights, HistogramObserver).
All of it is CPU time, so that other work on the machine does not count.
Random weights and images: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import resnet20
from support.models import torchvision_model

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

ROUNDS = 5
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-20": (lambda: resnet20(pretrained=False), (100, 3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), (8, 3, 224, 224)),
    "densenet121": (lambda: torchvision_model("densenet121"), (4, 3, 224, 224)),
}
OBSERVERS = ("minmax", "percentile", "histogram", "entropy")


def quantizers() -> dict[str, Quantizer]:
    """The stock quantizer and ours with each observer."""
    stock = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    ours = {
        name: cq.IntegerQuantizer().set_global("a8w8" if name == "minmax" else f"a8w8-{name}")
        for name in OBSERVERS
    }
    return {"stock": stock, **ours}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of a call, and its result."""
    start = time.process_time()
    with torch.no_grad():
        result = function()
    return time.process_time() - start, result


def measure(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Seconds of prepare and convert, and calibration in float forwards, by quantizer."""
    model = build().eval()
    images = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    captured = torch.export.export(model, (images[0],))
    rows: dict[str, dict[str, float]] = {}
    prepared: dict[str, GraphModule] = {}
    for name, quantizer in quantizers().items():
        graph = captured.module()
        seconds, prepared[name] = timed(lambda g=graph, q=quantizer: prepare_pt2e(g, q))
        rows[name] = {"prepare_s": seconds}

    def forward(module: Callable[[Tensor], Any]) -> float:
        return timed(lambda: [module(image) for image in images])[0]

    ratios: dict[str, list[float]] = {name: [] for name in prepared}
    forward(model)
    for _ in range(ROUNDS):
        for name, module in prepared.items():
            ratios[name].append(forward(module) / forward(model))
    for name, module in prepared.items():
        rows[name]["calibration_forwards"] = statistics.median(ratios[name])
        rows[name]["convert_s"], _ = timed(lambda m=module: convert_pt2e(m))
    return rows


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| model | quantizer | calibration, in float forwards | prepare + convert, stock = 1 |",
        "| --- | --- | --- | --- |",
    ]
    for model, rows in result["models"].items():
        stock = rows["stock"]["prepare_s"] + rows["stock"]["convert_s"]
        for name, row in rows.items():
            share = (row["prepare_s"] + row["convert_s"]) / stock
            label = "XNNPACKQuantizer, HistogramObserver" if name == "stock" else f"a8w8, {name}"
            forwards = row["calibration_forwards"]
            lines.append(f"| {model} | {label} | {forwards:.2f} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {list(MODELS)}")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"version": 1, "rounds": ROUNDS, "models": {}}
    for name in options.models:
        result["models"][name] = measure(*MODELS[name])
        print(render(result), flush=True)
    write_json_atomic(options.output / "calibration_cost.json", result)
    write_text_atomic(options.output / "calibration_cost.md", render(result))


if __name__ == "__main__":
    main()
