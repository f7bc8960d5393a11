"""Layers that several batch norms, or others beside a batch norm, read: SQNR of ours and of stock.

``prepare_pt2e`` folds a batch norm into the weight where it is stored, whoever else reads it. Every
model of ``tests/support/shared_layers.py`` goes through ``prepare_pt2e`` and ``convert_pt2e`` at
int8 with XNNPACK's quantizer and with ours::

    python tests/benchmarks/shared_layers.py --output docs/results
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.graphs import capture
from support.shared_layers import SHARED, shared_layer

import custom_quantizer as cq
from custom_quantizer.core.noise import Noise


def sqnr(name: str, quantizer: Quantizer) -> list[float] | str:
    """Of each output in dB, or why there is none."""
    model, x = shared_layer(name)
    captured = capture(model, (x,))
    try:
        prepared = prepare_pt2e(copy.deepcopy(captured), quantizer)
        prepared(x)
        outputs = pytree.tree_leaves(convert_pt2e(prepared)(x))
    except Exception as error:  # the stock flow raises whatever it raises
        return type(error).__name__
    ratios = []
    for want, got in zip(pytree.tree_leaves(captured(x)), outputs, strict=True):
        noise = Noise()
        noise.add(want, got)
        ratios.append(round(noise.ratio, 1))
    return ratios


def measure() -> dict[str, Any]:
    """``case -> {"stock": ..., "ours": ...}``."""
    config = get_symmetric_quantization_config(is_per_channel=True)
    cases = {}
    for name in SHARED:
        stock = sqnr(name, XNNPACKQuantizer().set_global(config))
        cases[name] = {"stock": stock, "ours": sqnr(name, cq.IntegerQuantizer().set_global("a8w8"))}
        print(f"{name}: {cases[name]}", flush=True)
    return {"version": 1, "torch": torch.__version__, "cases": cases}


def render(record: dict[str, Any]) -> str:
    """The table of docs/results/shared_layers.md."""
    lines = [
        "# Layers that more than one batch norm reads",
        "",
        "SQNR against the float model in dB, of each output, int8 activations and weights. Made by",
        "`python tests/benchmarks/shared_layers.py --output docs/results`.",
        "",
        "| model | XNNPACKQuantizer | IntegerQuantizer |",
        "| --- | --- | --- |",
    ]
    for name, case in record["cases"].items():
        cells = [_cell(case[who]) for who in ("stock", "ours")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _cell(value: list[float] | str) -> str:
    if isinstance(value, str):
        return value
    return " / ".join("inf" if math.isinf(v) else f"{v:.1f}" for v in value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    record = measure()
    (output / "shared_layers.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / "shared_layers.md").write_text(render(record))


if __name__ == "__main__":
    main()
