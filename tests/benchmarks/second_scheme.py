"""Time to another scheme of a model that is quantized already, as a share of that from the start.

    python tests/benchmarks/second_scheme.py --output docs/results

CPU seconds of one thread, the least of three rounds, from the float model to a checked program:
``quantize(..., config=SCHEME)``, and ``result.with_config(SCHEME, ...)`` of a result in another
scheme. Random weights and random images. The first call of a process, which imports what lowering
needs, is that of a small network, and not counted.
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
SIZE, ROUNDS = 224, 3
IMAGES = (8, 32)
"""To calibrate on."""
BEFORE, SCHEMES = "a8w6", ("a8w8", "a8w4")

Record = dict[str, Any]


def compare(name: str) -> Record:
    """Seconds to each scheme from the start and from another one, for each number of images."""
    import torch
    from support.models import torchvision_model

    import custom_quantizer as cq

    torch.set_num_threads(1)
    rounds: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        start = time.process_time()
        function(*args, **options)
        rounds.setdefault(what, []).append(time.process_time() - start)

    def both_ways(model: torch.nn.Module, data: list[Any]) -> None:
        given, options = (model, data[0], data), {"progress": False}
        before = cq.quantize(*given, config=BEFORE, **options)
        for scheme in SCHEMES:
            start, other = (_key(scheme, way, len(data)) for way in ("start", "other"))
            timed(start, cq.quantize, *given, config=scheme, **options)
            timed(other, before.with_config, scheme, data, **options)

    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    both_ways(small, [(torch.randn(1, 3, 8, 8),)])
    rounds.clear()
    model = torchvision_model(name).eval()
    data = [(torch.randn(1, 3, SIZE, SIZE),) for _ in range(max(IMAGES))]
    for _ in range(ROUNDS):
        for images in IMAGES:
            both_ways(model, data[:images])
    return {"model": name, "seconds": {what: min(each) for what, each in rounds.items()}}


def _key(scheme: str, way: str, images: int) -> str:
    return f"{scheme} {way} {images}"


def render(record: Record) -> str:
    """The table of docs/results/second_scheme.md."""
    columns = [(scheme, images) for scheme in SCHEMES for images in IMAGES]
    header = ["network", *(f"`{scheme}`, {images} images" for scheme, images in columns)]
    lines = [
        f"CPU seconds to a scheme of a model that was quantized to `{BEFORE}` before, those from "
        f"the start = 1 (images of {SIZE}x{SIZE} to calibrate on):",
        "",
    ]
    rows = [header, ["---"] * len(header)]
    for result in record["results"]:
        took = result["seconds"]
        ratios = (took[_key(s, "other", n)] / took[_key(s, "start", n)] for s, n in columns)
        rows.append([result["model"], *(f"{ratio:.2f}" for ratio in ratios)])
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def main() -> None:
    """Quantize each network in all ways."""
    main_of(__file__, __doc__, MODELS, compare, render)


if __name__ == "__main__":
    main()
