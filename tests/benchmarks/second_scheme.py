"""Time to another scheme of a model that is quantized already, as a share of that from the start.

    python tests/benchmarks/second_scheme.py --output docs/results

CPU seconds of one thread, the least of three rounds, from the float model to a checked program:
``quantize(..., config=SCHEME)``, and ``result.with_config(SCHEME, ...)`` of a result in another
scheme; both without lowering, too. Random weights and eight random images. The first call of a
process, which imports what lowering needs, is that of a small network, and not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import main_of

MODELS = (
    "squeezenet1_1",
    "mobilenet_v3_small",
    "resnet18",
    "densenet121",
    "convnext_tiny",
)
SIZE, IMAGES, ROUNDS = 224, 8, 3
BEFORE, SCHEMES = "a8w6", ("a8w8", "a8w4")

Record = dict[str, Any]


def compare(name: str) -> Record:
    """Seconds to each scheme from the start and from another one, with and without lowering."""
    import torch
    from support.models import torchvision_model

    import custom_quantizer as cq

    torch.set_num_threads(1)
    rounds: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        start = time.process_time()
        function(*args, **options)
        rounds.setdefault(what, []).append(time.process_time() - start)

    def all_ways(model: torch.nn.Module, data: list[Any]) -> None:
        given = (model, data[0], data)
        for lower in (True, False):
            options: dict[str, Any] = {"lower": lower, "progress": False}
            end = "lowered" if lower else "converted"
            before = cq.quantize(*given, config=BEFORE, **options)
            for scheme in SCHEMES:
                start, other = (f"{scheme} {way} {end}" for way in ("start", "other"))
                timed(start, cq.quantize, *given, config=scheme, **options)
                timed(other, before.with_config, scheme, data, **options)

    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    all_ways(small, [(torch.randn(1, 3, 8, 8),)])
    rounds.clear()
    model = torchvision_model(name).eval()
    data = [(torch.randn(1, 3, SIZE, SIZE),) for _ in range(IMAGES)]
    for _ in range(ROUNDS):
        all_ways(model, data)
    return {"model": name, "seconds": {what: min(each) for what, each in rounds.items()}}


def render(record: Record) -> str:
    """The table of docs/results/second_scheme.md."""
    header = ["network"]
    for scheme in SCHEMES:
        header += [f"`{scheme}`", "without lowering", "share of lowering"]
    lines = [
        f"CPU seconds to a scheme of a model that was quantized to `{BEFORE}` before, those from "
        f"the start = 1 ({IMAGES} images of {SIZE}x{SIZE}):",
        "",
    ]
    rows = [header, ["---"] * len(header)]
    for result in record["results"]:
        took, cells = result["seconds"], []
        for scheme in SCHEMES:
            for end in ("lowered", "converted"):
                ratio = took[f"{scheme} other {end}"] / took[f"{scheme} start {end}"]
                cells.append(f"{ratio:.2f}")
            share = 1 - took[f"{scheme} other converted"] / took[f"{scheme} other lowered"]
            cells.append(f"{share:.0%}")
        rows.append([result["model"], *cells])
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def main() -> None:
    """Quantize each network in all ways."""
    main_of(__file__, __doc__, MODELS, compare, render)


if __name__ == "__main__":
    main()
