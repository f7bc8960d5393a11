"""What the bytes of a program are: integers, scales, zeros, other constants, and the rest.

    python tests/benchmarks/file_sizes.py --output docs/results

Random weights and one random image: sizes do not depend on them. ``needed`` are the integers of
weights and biases as the converted graph has them, packed without padding; ``zeros less shared`` is
what joined groups and columns add to them, less what layers share; ``constants`` are floats and
what else ops read. ``rest`` is no constant: the delegate's graph, ExecuTorch's own part, names,
padding, the record of ops and the checksum.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import main_of

MODELS = (
    "squeezenet1_1",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "resnet18",
    "densenet121",
    "convnext_tiny",
    "swin_t",
)
SIZE = 224
SCALES = ("scales of weights", "scales of biases")
PARTS = ("needed", "zeros less shared", *SCALES, "constants", "rest")

Record = dict[str, Any]


def parts(name: str) -> Record:
    """Bytes of one network's program."""
    import numpy as np
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from support.models import convert, torchvision_model
    from torchvision_flow import needed_bytes

    import custom_quantizer as cq

    torch.set_num_threads(1)
    with torch.no_grad():
        x = torch.randn(1, 3, SIZE, SIZE)
        converted = convert(torchvision_model(name), (x,)).graph
        program = cq.lower(converted, (x,))
    stored: dict[str, dict[bytes, int]] = {"integers": {}, "weight": {}, "bias": {}}
    for delegate in program.contents.delegates:
        for op in delegate.ops:
            for kind in ("weight", "bias"):
                index = getattr(op, kind)
                tensor = None if index is None else delegate.tensors[index]
                if tensor is None or not isinstance(tensor.scale, np.ndarray):
                    continue
                values = tensor.array()
                size = values.size // 2 if tensor.dtype == "int4" else values.nbytes
                stored["integers"][values.tobytes()] = size
                stored[kind][tensor.scale.tobytes()] = tensor.scale.nbytes
    sums = {kind: sum(found.values()) for kind, found in stored.items()}
    contents, needed = program.contents, needed_bytes(converted)
    found = {
        "needed": needed,
        "zeros less shared": sums["integers"] - needed,
        "scales of weights": sums["weight"],
        "scales of biases": sums["bias"],
        "constants": contents.constant_bytes - sum(sums.values()),
        "rest": contents.size_bytes - contents.constant_bytes,
    }
    return {"model": name, "bytes": contents.size_bytes, "parts": found}


def render(record: Record) -> str:
    """The table of docs/results/file_sizes.md."""
    header = ["network", "kB", *PARTS, "file / needed", "file / (needed + scales)"]
    lines = [f"Bytes of programs at a8w8, in kB ({SIZE}x{SIZE} images):", ""]
    rows = [header, ["---"] * len(header)]
    for result in record["results"]:
        found, size = result["parts"], result["bytes"]
        scales = sum(found[part] for part in SCALES)
        cells = [f"{found[part] / 1e3:.1f}" for part in PARTS]
        ratios = [size / found["needed"], size / (found["needed"] + scales)]
        rows.append([result["model"], f"{size / 1e3:.1f}", *cells, *(f"{r:.3f}" for r in ratios)])
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def main() -> None:
    """Lower each network and take its program apart."""
    main_of(__file__, __doc__, MODELS, parts, render)


if __name__ == "__main__":
    main()
