"""What improving after training buys: accuracy of the ``.pte``, and CPU seconds, width by width.

    python tests/benchmarks/improve.py                       # all, hours on a busy machine
    python tests/benchmarks/improve.py --only "ResNet-20, a8w4"

At most 512 unlabeled training images, one thread. Every row is kept in ``improve.json`` when it is
done, and what is there is not measured again; ``improve.md`` is rendered from it. Needs images and
weights (see ``tests/support/cifar_models.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import (
    cifar10_calibration,
    cifar10_test,
    cifar_mobilenet_v2,
    resnet20,
    resnet32,
)

import custom_quantizer as cq
from custom_quantizer.analysis.evaluation import Evaluation
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

BATCH = 50
CALIBRATION = 512
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": resnet20,
    "ResNet-32": resnet32,
    "MobileNetV2 w0.5": cifar_mobilenet_v2,
}
SCHEMES = ("a8w8", "a8w6", "a8w4", "a8w3", "a4w4")
ABLATION = ("a8w4", "a8w3", "a4w4")
ALONE = ("gptq",)
"""Algorithms that are measured alone; ``bias_correction`` alone is what ``fast`` does."""

MORE = (
    "analytical_bias_correction",
    "equalization",
    "equalization+gptq+bias_correction",
)


def cells() -> Iterator[tuple[str, str, str]]:
    """``(network, scheme, how)``, the most important first."""
    for how in ("best", "fast", "plain"):
        for scheme in ("a8w4", "a4w4", "a8w3", "a8w6", "a8w8"):
            if how == "fast" and scheme == "a8w8":
                continue  # the same as plain
            for network in NETWORKS:
                yield network, scheme, how
    for network in NETWORKS:
        for scheme in ABLATION:
            for algorithm in ALONE:
                yield network, scheme, algorithm
    for network in ("ResNet-20", "MobileNetV2 w0.5"):
        for scheme in ("a8w4", "a4w4"):
            for algorithms in MORE:
                yield network, scheme, algorithms


def measure(network: str, scheme: str, how: str, images: int | None) -> dict[str, Any]:
    """One row, the float model beside it."""
    model = NETWORKS[network]()
    test, labels = cifar10_test(images)
    calibration, _ = cifar10_calibration(CALIBRATION)
    asked: dict[str, Any] = {"accuracy": how} if how in ("plain", "fast", "best") else {}
    if not asked:
        asked = {"accuracy": "best", "improve": how.split("+")}
    begin = time.process_time()
    result = cq.quantize(
        model,
        (test[:BATCH],),
        list(calibration.split(BATCH)),
        config=scheme,
        lower=False,
        progress=False,
        **asked,
    )
    seconds = time.process_time() - begin
    lowered = cq.lower(result.converted, (test[:BATCH],))
    batches = list(zip(test.split(BATCH), labels.split(BATCH), strict=True))
    scores = cq.evaluate({"float": model, "pte": lowered}, batches, progress=False)
    return {
        "network": network,
        "scheme": scheme,
        "how": how,
        "algorithms": [] if result.improvement is None else list(result.improvement.algorithms),
        **against_float(scores),
        "cpu_seconds": round(seconds, 1),
        "delegates": lowered.report.delegates,
    }


def against_float(scores: Evaluation) -> dict[str, Any]:
    """What a row keeps of the models ``float`` and ``pte``."""
    ours = scores["pte"]
    difference = ours.against_first
    assert difference is not None
    return {
        "samples": ours.samples,
        "float_top1": scores["float"].top1,
        "top1": ours.top1,
        "agreement": ours.agreement,
        "difference": difference.difference,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    rows = result["rows"]
    images = max(row["samples"] for row in rows.values())
    lines = [
        f"Accuracy of the `.pte` on {images:,} test images of CIFAR-10, against the float model on "
        f"the same images, with 95 % intervals; {result['calibration_images']} unlabeled training "
        "images, one thread. CPU seconds of capturing, calibrating, improving and converting.",
    ]
    for network in NETWORKS:
        mine = [row for row in rows.values() if row["network"] == network]
        if not mine:
            continue
        lines += [
            "",
            f"{network}, float {mine[0]['float_top1']:.2%}:",
            "",
            "| scheme | accuracy= | by | top-1 | against float (95 % interval) | agrees with float "
            "| CPU s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for scheme in SCHEMES:
            for how in ("plain", "fast", *MORE[:2], *ALONE, "best", MORE[2]):
                row = rows.get(f"{network}, {scheme}, {how}")
                if row is not None:
                    lines.append(_line(row))
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    points = [f"{100 * row[key]:+.2f}" for key in ("difference", "low", "high")]
    by = " + ".join(f"`{name}`" for name in row["algorithms"]) or "-"
    how = row["how"] if row["how"] in ("plain", "fast", "best") else ""
    cells_ = [
        row["scheme"],
        how,
        by,
        f"{row['top1']:.2%}",
        f"{points[0]} ({points[1]} to {points[2]})",
        f"{row['agreement']:.2%}",
        f"{row['cpu_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells_)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "improve.json"
    result: dict[str, Any] = {"version": 1, "calibration_images": CALIBRATION, "rows": {}}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    for network, scheme, how in cells():
        name = f"{network}, {scheme}, {how}"
        if name in result["rows"] or options.only not in name:
            continue
        result["rows"][name] = measure(network, scheme, how, options.images)
        print(json.dumps(result["rows"][name]), flush=True)
        write_json_atomic(file, result)
        write_text_atomic(options.output / "improve.md", render(result))


if __name__ == "__main__":
    main()
