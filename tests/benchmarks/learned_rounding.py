"""What learned rounding buys, by its iterations: accuracy of the ``.pte``, and CPU seconds.

    python tests/benchmarks/learned_rounding.py

512 unlabeled training images in batches of 16, one thread. Every row is kept in
``learned_rounding.json`` when it is done, and what is there is not measured again;
``learned_rounding.md`` is rendered from it. Needs images and weights (see
``tests/support/cifar_models.py``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from improve import CALIBRATION, NETWORKS, against_float
from support.cifar_models import cifar10_calibration, cifar10_test

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

BATCH = 16
"""Images a step. The first learned layers see a thousand places of each."""

ITERATIONS = (500, 2000, 10_000)
SCHEMES = ("a4w4", "a8w3", "a8w4")
LEARNED = ("adaround+bias_correction", "gptq+brecq+bias_correction")
NETWORK = "ResNet-20"
BEST = "gptq+bias_correction"


def cells() -> Iterator[tuple[str, str, int]]:
    """``(scheme, algorithms, iterations)``, the cheap ones first; 0 for what does not learn."""
    for scheme in SCHEMES:
        yield scheme, BEST, 0
    every = itertools.product(SCHEMES, LEARNED, ITERATIONS)
    yield from sorted(every, key=lambda cell: ("brecq" in cell[1], cell[2]))


def measure(scheme: str, algorithms: str, iterations: int, work: Path | None) -> dict[str, Any]:
    """One row, the float model beside it.

    Args:
        scheme: its name.
        algorithms: names, with ``+`` between them.
        iterations: of learning.
        work: a folder that keeps the layers and blocks that are finished.
    """
    model = NETWORKS[NETWORK]()
    test, labels = cifar10_test(None)
    calibration, _ = cifar10_calibration(CALIBRATION)
    example, batches = (test[:BATCH],), list(calibration.split(BATCH))
    name = f"{scheme}, {algorithms}, {iterations}"
    begin = time.process_time()
    exported = torch.export.export(model, example)
    # The observer that quantize chooses below 8 bits.
    quantizer = cq.IntegerQuantizer().set_global(observed(scheme))
    prepared = prepare_pt2e(exported.module(), quantizer)
    cq.calibrate(prepared, batches, progress=False)
    improvement = cq.improve(
        prepared,
        batches,
        algorithms.split("+"),
        iterations=max(iterations, 1),
        checkpoint=None if work is None else work / f"{name}.safetensors",
        progress=False,
    )
    converted = convert_pt2e(prepared)
    seconds = time.process_time() - begin
    lowered = cq.lower(converted, example)
    full = len(test) // BATCH * BATCH
    pairs = list(zip(test[:full].split(BATCH), labels[:full].split(BATCH), strict=True))
    scores = cq.evaluate({"float": model, "pte": lowered}, pairs, progress=False)
    return {
        "network": NETWORK,
        "scheme": scheme,
        "how": algorithms,
        "iterations": iterations,
        "resumed": improvement.resumed,
        "held_back_sqnr": improvement.layers[-1].after,
        **against_float(scores),
        "cpu_seconds": round(seconds, 1),
    }


def observed(scheme: str) -> str:
    """The scheme with the observer that ``accuracy="best"`` chooses for its activations."""
    return f"{scheme}-histogram" if scheme.startswith("a4") else scheme


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = list(result["rows"].values())
    lines = [
        f"{NETWORK}, float {rows[0]['float_top1']:.2%}: accuracy of the `.pte` on "
        f"{rows[0]['samples']:,} test images, as above; batches of {BATCH}.",
        "",
        "| scheme | by | iterations | top-1 | against float (95 % interval) | agrees with float "
        "| CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = {cell: index for index, cell in enumerate(_table_order())}
    for row in sorted(rows, key=lambda r: order[r["scheme"], r["how"], r["iterations"]]):
        points = [f"{100 * row[key]:+.2f}" for key in ("difference", "low", "high")]
        cells_ = [
            row["scheme"],
            " + ".join(f"`{name}`" for name in row["how"].split("+")),
            f"{row['iterations']:,}" if row["iterations"] else "-",
            f"{row['top1']:.2%}",
            f"{points[0]} ({points[1]} to {points[2]})",
            f"{row['agreement']:.2%}",
            f"{row['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def _table_order() -> Iterator[tuple[str, str, int]]:
    for scheme in SCHEMES:
        yield scheme, BEST, 0
        yield from itertools.product((scheme,), LEARNED, ITERATIONS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=None, help="keep finished blocks here")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "learned_rounding.json"
    result: dict[str, Any] = {"version": 1, "rows": {}}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    for cell in cells():
        name = ", ".join(map(str, cell))
        if name in result["rows"] or options.only not in name:
            continue
        result["rows"][name] = measure(*cell, options.work)
        print(json.dumps(result["rows"][name]), flush=True)
        write_json_atomic(file, result)
        write_text_atomic(options.output / "learned_rounding.md", render(result))


if __name__ == "__main__":
    main()
