"""Accuracy and program size of ResNet-20 at different bit-widths, measured on the ``.pte``.

    python tests/benchmarks/bit_widths.py --output docs/results

Needs the CIFAR-10 images and the ResNet-20 weights (see ``tests/support/cifar_models.py``).
Writes ``bit_widths.json`` and, rendered from it, ``bit_widths.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

BATCH = 100


def everywhere(name: str) -> Callable[[], cq.IntegerQuantizer]:
    """All ops take one scheme."""
    return lambda: cq.IntegerQuantizer().set_global(name)


def except_first_and_last(name: str) -> Callable[[], cq.IntegerQuantizer]:
    """All ops but the first convolution and the classifier take a scheme."""

    def build() -> cq.IntegerQuantizer:
        quantizer = cq.IntegerQuantizer().set_global(name)
        return quantizer.set_module_name("conv1", "a8w8").set_module_name("linear", "a8w8")

    return build


ROWS: dict[str, Callable[[], cq.IntegerQuantizer]] = {
    "a8w8": everywhere("a8w8"),
    "a16w8": everywhere("a16w8"),
    "a8w4": everywhere("a8w4"),
    "a8w4, first and last a8w8": except_first_and_last("a8w4"),
    "a4w4": everywhere("a4w4"),
    "a8w8-bias16": everywhere("a8w8-bias16"),
    "a8w8-bias8": everywhere("a8w8-bias8"),
    "a8w8-bias4": everywhere("a8w8-bias4"),
    "a8w8-biasfloat": everywhere("a8w8-biasfloat"),
}


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of images whose label comes first."""
    correct = 0
    with torch.no_grad():
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            correct += int((model(x).argmax(1) == y).sum())
    return correct / len(labels)


def measure(limit: int | None) -> dict[str, Any]:
    """Quantize, lower and evaluate every row."""
    model = resnet20()
    images, labels = cifar10_test(limit)
    calibration, _ = cifar10_calibration(500)
    example = (images[:BATCH],)
    rows = []
    for name, build in ROWS.items():
        quantizer = build()
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
        for batch in calibration.split(BATCH):
            prepared(batch)
        converted = convert_pt2e(prepared)
        lowered = cq.lower(converted, example)
        rows.append(
            {
                "scheme": name,
                "pte_top1": accuracy(lowered.run, images, labels),
                "graph_top1": accuracy(converted, images, labels),
                "bytes": lowered.report.size_bytes,
                "estimated_bytes": quantizer.last_plan.size_bytes,
                "delegates": lowered.report.delegates,
                "outside": len(lowered.report.outside),
            }
        )
        print(rows[-1], flush=True)
    return {
        "version": 1,
        "model": "ResNet-20, CIFAR-10",
        "images": len(labels),
        "calibration_images": 500,
        "float_top1": accuracy(model, images, labels),
        "rows": rows,
    }


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    floating = result["float_top1"]
    lines = [
        f"{result['model']}, {result['images']:,} test images, calibrated on "
        f"{result['calibration_images']} training images; float: {floating:.2%}.",
        "",
        "| scheme | `.pte` top-1 | against float | converted graph top-1 | `.pte` bytes "
        "| delegates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        change = 100 * (row["pte_top1"] - floating)
        lines.append(
            f"| {row['scheme']} | {row['pte_top1']:.2%} | {change:+.2f} | {row['graph_top1']:.2%} "
            f"| {row['bytes']:,} | {row['delegates']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    result = measure(options.images)
    write_json_atomic(options.output / "bit_widths.json", result)
    write_text_atomic(options.output / "bit_widths.md", render(result))
    print(render(result))


if __name__ == "__main__":
    main()
