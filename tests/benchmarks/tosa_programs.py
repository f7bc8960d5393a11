"""TOSA programs of networks: values against the integer reference, and bytes.

    python tests/benchmarks/tosa_programs.py --output docs/results

Installs the TOSA tools if they are missing, into the folder that CUSTOM_QUANTIZER_TOSA_TOOLS names;
ResNet-20 needs the shared weights.
Writes ``tosa.json`` and, rendered from it, ``tosa.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.utils._pytree as pytree
from support.models import convert
from support.tosa import NETWORKS, network, use_tools
from torch import Tensor

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.ops.placement import Placement

SCHEMES = ("a8w8", "a8w4", "a16w8")
OTHERS = ("fixed_point", "xnnpack")


def measure_one(name: str, scheme: str) -> dict[str, Any]:
    model, calibration, images = network(name)
    batches = images.split(len(images) // 2)
    quantizer = cq.IntegerQuantizer("tosa").set_global(scheme)
    calibrating = [(batch,) for batch in calibration.split(len(batches[0]))]
    graph = convert(model, (batches[0],), quantizer, calibrating).graph
    program = cq.lower(graph, (batches[0],), backend="tosa")
    outputs = [(batch, _flat(program.run(batch))) for batch in batches]

    def differing(mode: str) -> int:
        reference = cq.integer_reference(graph, mode)
        return sum(int((_flat(reference(batch)) != got).sum()) for batch, got in outputs)

    tally = program.report.tally
    return {
        "network": name,
        "scheme": scheme,
        "ops": tally.total,
        "outside": tally.count(Placement.OUTSIDE),
        "bytes": program.report.size_bytes,
        "values": sum(got.numel() for _, got in outputs),
        "differ": differing("tosa"),
        # Above 8 bits XNNPACK computes in float.
        "others": {
            mode: differing(mode) for mode in OTHERS if mode != "xnnpack" or "a16" not in scheme
        },
    }


def _flat(outputs: Any) -> Tensor:
    return torch.cat([value.flatten() for value in pytree.tree_leaves(outputs)])


def measure() -> dict[str, Any]:
    """Every network at every scheme."""
    torch.set_num_threads(1)
    use_tools()
    rows = []
    for name in NETWORKS:
        for scheme in SCHEMES:
            rows.append(measure_one(name, scheme))
            print(rows[-1], flush=True)
    return {"version": 1, "rows": rows}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| network | scheme | ops | of these, outside | bytes | values compared | differ "
        "| from mode `fixed_point` | from mode `xnnpack` |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        counts = [f"{row[key]:,}" for key in ("ops", "outside", "bytes", "values", "differ")]
        others = [f"{row['others'][mode]:,}" if mode in row["others"] else "" for mode in OTHERS]
        lines.append(f"| {' | '.join([row['network'], row['scheme'], *counts, *others])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args().output
    result = measure()
    write_json_atomic(folder / "tosa.json", result)
    write_text_atomic(folder / "tosa.md", render(result))


if __name__ == "__main__":
    main()
