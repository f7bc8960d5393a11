"""Which bits where: ResNet-20 and MobileNetV2 at 0.6 of the bits that a8w8 has for weights.

    python tests/benchmarks/search.py --output docs/results

The search is shown training images only: some to calibrate and to measure losses with, others to
choose by. What it takes, and the best scheme everywhere of at most that size, are then compared on
the test images. Needs the CIFAR-10 images and weights (see ``tests/support/cifar_models.py``).
Finished batches are kept in ``--work``: run the same command again after an interruption.

Writes ``search.json`` and, rendered from it, ``search.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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
SAMPLES = 256
VALIDATION = 512
SHARE = 0.6
SCHEMES = [f"a8w{bits}" for bits in (8, 7, 6, 5, 4, 3, 2)]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": resnet20,
    "MobileNetV2": cifar_mobilenet_v2,
}


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs as a search takes them."""
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def measure(name: str, work: Path, limit: int | None) -> dict[str, Any]:
    """Search, then compare on the test images what was found."""
    model = NETWORKS[name]()
    images, labels = cifar10_calibration(SAMPLES + VALIDATION)
    used = batches(images[:SAMPLES], labels[:SAMPLES])
    held_back = batches(images[SAMPLES:], labels[SAMPLES:])
    example = (images[:BATCH],)
    exported = torch.export.export(model.eval(), example)
    with torch.no_grad():
        began = time.perf_counter()
        for part, _ in used:
            model(part)
        forward = time.perf_counter() - began
    began = time.perf_counter()
    found = cq.search(
        exported,
        example,
        used,
        {"weight_bits": SHARE},
        schemes=SCHEMES,
        validation=held_back,
        points=7,
        checkpoint=work / f"{name}.safetensors",
        progress=True,
    )
    seconds = time.perf_counter() - began
    print(found, flush=True)
    uniform = [p for p in found.points if p.name.endswith("everywhere")]
    best_uniform = max((p for p in uniform if p.in_budget), key=lambda p: p.costs["weight_bits"])
    searched = [p for p in found.points if p.in_budget and p.name.startswith("searched")]
    # What the integer program gives for this very budget, whatever was taken.
    solved = max(searched, key=lambda p: p.costs["weight_bits"])
    compared = {"searched": solved, best_uniform.name: best_uniform, "taken": found.best}
    schemes_of = {
        label: {**dict.fromkeys(point.chosen, ""), **point.chosen}
        for label, point in compared.items()
    }
    models: dict[str, Any] = {"float": model}
    graphs: dict[str, Any] = {}
    for label, chosen in schemes_of.items():
        key = json.dumps(chosen, sort_keys=True)
        if key not in graphs:
            quantizer = cq.IntegerQuantizer().set_global(found.base_scheme)
            for op, scheme in chosen.items():
                if scheme != found.base_scheme:
                    quantizer.set_node_name(op, scheme)
            graphs[key] = cq.quantize(
                exported, example, [x for x, _ in used], config=quantizer, lower=False
            ).converted
        models[label] = graphs[key]
    evaluated = cq.evaluate(models, batches(*cifar10_test(limit)), progress=True)
    print(evaluated, flush=True)
    against = cq.evaluate(
        {best_uniform.name: models[best_uniform.name], "taken": models["taken"]},
        batches(*cifar10_test(limit)),
    )
    document = found.to_dict()
    del document["config"], document["sensitivity"]["losses"]
    return {
        **document,
        "best_uniform": best_uniform.name,
        "float_bits": sum(found.base.values()) and found.base["weight_bits"],
        "test_images": evaluated.scores[0].samples,
        "test": {score.name: score.top1 for score in evaluated.scores},
        "taken_against_uniform": json.loads(against.to_json())["models"][1]["against_first"],
        "seconds": seconds,
        "seconds_of_a_forward": forward,
        "config": dict(found.config),
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"CIFAR-10, weights of 2 to 8 bits and activations of 8, at most {SHARE} of the bits that "
        f"a8w8 has for weights; losses from {SAMPLES} training images, choices measured on "
        f"{VALIDATION} others, and this on the {result['test_images']:,} test images.",
        "",
        "| | float | best scheme everywhere | searched | gain (95 % interval) | rank correlation | "
        "float forwards |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        uniform = row["best_uniform"]
        gain = row["taken_against_uniform"]
        lines.append(
            f"| {name} | {row['test']['float']:.2%} | {row['test'][uniform]:.2%} "
            f"({uniform.split()[0]}) | {row['test']['taken']:.2%} | "
            f"{100 * gain['difference']:+.2f} ({100 * gain['low']:+.2f} to "
            f"{100 * gain['high']:+.2f}) | {row['sensitivity']['correlation']['weight']:.2f} | "
            f"{row['forwards']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def curve(row: dict[str, Any]) -> str:
    """The points of one network as Markdown."""
    lines = [
        "| | weight bits of a8w8 | SQNR | predicted | top-1, held back |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in row["points"]:
        share = point["costs"]["weight_bits"] / row["base"]["costs"]["weight_bits"]
        mark = " (taken)" if point["name"] == row["best"] else ""
        lines.append(
            f"| {point['name'].split()[0]}{mark} | {share:.3f} | "
            f"{decibels(point['measured']['noise'])} | {decibels(point['predicted'])} | "
            f"{point['measured']['top1']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def decibels(noise: float) -> str:
    """Relative noise as SQNR."""
    return f"{-10 * torch.tensor(noise).double().log10().item():.1f} dB"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/search-benchmark"))
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = {name: measure(name, options.work, options.images) for name in NETWORKS}
    images = next(iter(rows.values()))["test_images"]
    result = {"version": 1, "test_images": images, "rows": rows}
    write_json_atomic(options.output / "search.json", result)
    write_text_atomic(options.output / "search.md", render(result))
    print(render(result))


if __name__ == "__main__":
    main()
