"""Which bits where: ResNet-20 and MobileNetV2 at 0.6 of the bits that a8w8 has for weights.

    python tests/benchmarks/search.py --output docs/results

The search is shown training images only: some to calibrate and to measure losses with, others to
choose by. What it takes, and the best scheme everywhere of at most that size, are then compared on
the test images. Needs the CIFAR-10 images and weights (see ``tests/support/cifar_models.py``).
What is finished is kept in ``--work``: run the same command again after an interruption.

Writes ``search.json`` and, rendered from it, ``search.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import (
    cifar10_calibration,
    cifar10_test,
    cifar_mobilenet_v2,
    resnet20,
)

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

BATCH = 64
SAMPLES = 128
VALIDATION = 256
SHARES = {"weight_bits": 0.6, "size": 0.6, "bit_operations": 0.4}
SCHEMES = [f"a8w{bits}" for bits in (8, 6, 5, 4, 3, 2)]
ACTIVATIONS = ["a8w8", "a8w6", "a8w4", "a6w6", "a6w4", "a4w4"]
"""Where multiplications are paid for, bits of activations are worth as much as of weights."""
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": resnet20,
    "MobileNetV2": cifar_mobilenet_v2,
}
CASES = (
    ("ResNet-20", "weight_bits", "fast"),
    ("ResNet-20", "weight_bits", "best"),
    ("MobileNetV2", "weight_bits", "fast"),
    ("MobileNetV2", "size", "fast"),
    ("MobileNetV2", "weight_bits", "best"),
    ("ResNet-20", "bit_operations", "fast"),
)
"""XNNPACK packs weights of up to 4 bits in pointwise convolutions, of which ResNet-20 has none."""


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs as a search takes them."""
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def measure(name: str, cost: str, accuracy: str, work: Path, limit: int | None) -> dict[str, Any]:
    """Search, then compare on the test images what was found."""
    model = NETWORKS[name]()
    images, labels = cifar10_calibration(SAMPLES + VALIDATION)
    used = batches(images[:SAMPLES], labels[:SAMPLES])
    held_back = batches(images[SAMPLES:], labels[SAMPLES:])
    example = (images[:BATCH],)
    exported = torch.export.export(model.eval(), example)
    found = cq.search(
        exported,
        example,
        used,
        {cost: SHARES[cost]},
        schemes=schemes_of(cost),
        validation=held_back,
        accuracy=accuracy,
        points=4,
        checkpoint=work / f"{name}, {len(schemes_of(cost))} of {schemes_of(cost)[-1]}.safetensors",
        progress=True,
    )
    print(found, flush=True)
    uniform = max(
        (p for p in found.points if p.in_budget and p.name.endswith("everywhere")),
        key=lambda point: point.costs[cost],
    )
    models: dict[str, Any] = {
        uniform.name: quantized(exported, example, used, uniform.name.split()[0], accuracy),
        "taken": quantized(exported, example, used, found.quantizer, accuracy),
        "float": model,
    }
    compared = cq.evaluate(models, batches(*cifar10_test(limit)))
    print(compared, flush=True)
    document = found.to_dict()
    del document["sensitivity"]["losses"]
    return {
        **document,
        "uniform": uniform.name,
        "test_images": compared.scores[0].samples,
        "test": {score.name: score.top1 for score in compared.scores},
        "against_uniform": json.loads(compared.to_json())["models"][1]["against_first"],
    }


def schemes_of(cost: str) -> list[str]:
    """What is chosen from."""
    return ACTIVATIONS if cost == "bit_operations" else SCHEMES


def quantized(
    exported: torch.export.ExportedProgram, example: Any, used: Any, config: Any, accuracy: str
) -> torch.fx.GraphModule:
    """The converted graph of a scheme or a quantizer."""
    data = [images for images, _ in used]
    return cq.quantize(
        exported, example, data, config=config, accuracy=accuracy, lower=False
    ).converted


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"CIFAR-10; activations of 8 bits, weights of {SCHEMES[-1][3:]} to 8; at most "
        f"{SHARES['size']} of what a8w8 costs. For `bit_operations` a choice from "
        f"{', '.join(ACTIVATIONS)}, and at most {SHARES['bit_operations']}. Losses from {SAMPLES} "
        f"training images, choices measured on {VALIDATION} others; top-1 of the "
        f"converted graphs on {result['test_images']:,} test images.",
        "",
        "| network, accuracy | share of a8w8 | float | best scheme everywhere | searched | "
        "gain (95 % interval) | rank correlation | float forwards |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        uniform, gain = row["uniform"], row["against_uniform"]
        network, cost, accuracy = name.split(", ")
        low, high = 100 * gain["low"], 100 * gain["high"]
        lines.append(
            f"| {network}, `{accuracy}` | {share(row, row['best']):.3f} of `{cost}` | "
            f"{row['test']['float']:.2%} | {row['test'][uniform]:.2%} ({uniform.split()[0]}, "
            f"{share(row, uniform):.3f}) | {row['test']['taken']:.2%} | "
            f"{100 * gain['difference']:+.2f} ({low:+.2f} to {high:+.2f}) | "
            f"{row['sensitivity']['correlation']['weight']:.2f} | {row['forwards']:.0f} |"
        )
    for name, row in result["rows"].items():
        network, cost, accuracy = name.split(", ")
        lines += ["", f"{network} along `{cost}`, accuracy `{accuracy}`:", "", *curve(row, cost)]
    return "\n".join(lines) + "\n"


def share(row: dict[str, Any], name: str) -> float:
    """What a point costs, as a share of the most precise scheme."""
    (point,) = (point for point in row["points"] if point["name"] == name)
    cost: float = point["costs"][row["cost"]] / row["base"]["costs"][row["cost"]]
    return cost


def curve(row: dict[str, Any], cost: str) -> list[str]:
    """The points of one network as Markdown."""
    lines = [
        f"| | `{cost}` | SQNR | predicted | top-1 of the {row['held_back']} images |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in row["points"]:
        mark = " (taken)" if point["name"] == row["best"] else ""
        measured = point["measured"]
        lines.append(
            f"| {point['name'].split()[0]}{mark} | {share(row, point['name']):.3f} | "
            f"{decibels(measured['noise'])} | {decibels(point['predicted'])} | "
            f"{measured['top1']:.2%} |"
        )
    return lines


def decibels(noise: float) -> str:
    """Relative noise as SQNR."""
    return f"{-10 * math.log10(noise):.1f} dB"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/search-benchmark"))
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for case in CASES:
        kept = options.work / f"{', '.join(case)}.json"
        if not kept.exists():
            write_json_atomic(kept, measure(*case, options.work, options.images))
        rows[", ".join(case)] = json.loads(kept.read_text(encoding="utf-8"))
    images = min(row["test_images"] for row in rows.values())
    result = {"version": 1, "test_images": images, "rows": rows}
    write_json_atomic(options.output / "search.json", result)
    write_text_atomic(options.output / "search.md", render(result))
    print(render(result))


if __name__ == "__main__":
    main()
