"""The same networks and images through other tools: AIMET, NNCF and ONNX Runtime.

    python tests/benchmarks/peers.py --work FOLDER               # all, hours on a busy machine
    python tests/benchmarks/peers.py --work FOLDER --only "ResNet-20, NNCF"

Each tool gets an environment of its own in ``FOLDER``, made by pip with the requirements below, and
is run by ``peers_worker.py`` in it. It sees 512 unlabeled training images and the test images
without labels, and hands back logits. Every row is kept in ``peers.json`` when it is done; what is
there is not measured again, unless it failed. ``peers.md`` is rendered from it, and has our own
rows from ``improve.json``. Needs images and weights (see ``tests/support/cifar_models.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from improve import BATCH, CALIBRATION, NETWORKS
from support.cifar_models import cifar10_calibration, cifar10_test

import custom_quantizer as cq
from custom_quantizer.analysis.paired import PairedCounts, compare_counts
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

WORKER = Path(__file__).with_name("peers_worker.py")
TIMEOUT = 6 * 3600.0
OURS = "this package"
IMPROVE = Path(__file__).parents[2] / "docs" / "results" / "improve.json"


@dataclass(frozen=True)
class Peer:
    """A tool.

    Attributes:
        title: as tables have it.
        requirements: for pip. The first one is the tool itself.
        methods: of ``peers_worker.py``, the cheap ones first, with what a table calls them.
    """

    title: str
    requirements: tuple[str, ...]
    methods: tuple[str, ...]

    @property
    def version(self) -> str:
        """Name and version of the package."""
        return self.requirements[0].replace("==", " ")


PEERS = {
    "onnxruntime": Peer(
        "ONNX Runtime",
        ("onnxruntime==1.31.1", "onnx==1.23.2", "sympy"),
        (
            "int8, u8s8, MinMax",
            "int8, s8s8, MinMax",
            "int8, u8s8, Percentile",
            "int4 weights, u8, MinMax",
        ),
    ),
    "nncf": Peer(
        "NNCF",
        ("nncf==3.4.0", "openvino==2026.4.1", "torch==2.15.0"),
        (
            "int8, FastBiasCorrection",
            "int8, BiasCorrection",
            "int4 weights, FastBiasCorrection",
            "int4 weights, BiasCorrection",
            "compress_weights, INT4_SYM",
        ),
    ),
    "aimet": Peer(
        "AIMET",
        ("aimet-torch==2.42.0", "torch==2.15.0", "torchvision==0.29.2"),
        ("int8", "int4 weights, ranges", "int4 weights, SeqMSE", "int4 weights, AdaRound"),
    ),
}
ADAROUND = dict.fromkeys(NETWORKS, 500)
"""Iterations a layer. AIMET's default is 15,000 for weights below 8 bits: hours on one core."""


def cells() -> Iterator[tuple[str, str, str]]:
    """``(network, peer, method)``, what is learned by gradients last."""
    every = [(n, p, m) for n in NETWORKS for p, peer in PEERS.items() for m in peer.methods]
    yield from sorted(every, key=lambda cell: "AdaRound" in cell[2])


def row_name(network: str, peer: str, method: str) -> str:
    return f"{network}, {PEERS[peer].title}, {method}"


def pending(rows: Mapping[str, Mapping[str, Any]], only: str) -> Iterator[tuple[str, str, str]]:
    """Cells to measure: those asked for that have no row, or one with an error."""
    for cell in cells():
        name = row_name(*cell)
        if only in name and "error" in rows.get(name, {"error": ""}):
            yield cell


# -- measuring ------------------------------------------------------------------------------------


def environment(peer: Peer, folder: Path) -> Path:
    """The Python of a tool's environment, which is made where it is missing.

    Raises:
        RuntimeError: pip failed; with the end of what it said.
    """
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(peer.requirements)
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", *peer.requirements]
        _checked(command, dict(os.environ), TIMEOUT)
        done.write_text(wanted, encoding="utf-8")
    return python


def hand_over(folder: Path) -> None:
    """Write images and networks, as ONNX and as weights, for the workers."""
    images = folder / "images.npz"
    if images.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    test, calibration = cifar10_test(None)[0], cifar10_calibration(CALIBRATION)[0]
    batch = torch.export.Dim("batch", min=1, max=1024)
    for name, build in NETWORKS.items():
        model = build()
        torch.save(model.state_dict(), folder / f"{name}.pt")
        torch.onnx.export(
            model,
            (test[:BATCH],),
            str(folder / f"{name}.onnx"),
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    np.savez(images, calibration=calibration.numpy(), test=test.numpy())


def measure(network: str, name: str, method: str, work: Path) -> dict[str, Any]:
    """One row; with ``error`` where the tool failed."""
    peer = PEERS[name]
    iterations = ADAROUND[network]
    row: dict[str, Any] = {
        "network": network,
        "peer": peer.title,
        "version": peer.version,
        "method": method,
    }
    if "AdaRound" in method:
        row["iterations"] = iterations
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        result = Path(scratch) / "result.json"
        given = [name, method, str(iterations), network, str(work / "exchange"), str(result)]
        try:
            python = environment(peer, work / name)
            _checked([str(python), str(WORKER), *given], {**os.environ, **one}, TIMEOUT)
        except RuntimeError as failed:
            return {**row, "error": str(failed)}
        answer = json.loads(result.read_text(encoding="utf-8"))
        logits = torch.from_numpy(np.load(result.with_suffix(".npy")))
    return {**row, **scores(network, logits), **answer}


def _checked(command: list[str], variables: dict[str, str], timeout: float) -> None:
    variables = {k: v for k, v in variables.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        ran = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"stopped after {timeout:.0f} s") from late
    if ran.returncode:
        raise RuntimeError(last_words(ran.stderr) or f"exit status {ran.returncode}")


def last_words(text: str) -> str:
    """The last line that says something, on one line of at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else ""


@cache
def float_answers(network: str) -> torch.Tensor:
    """The float model's classes for all test images."""
    model = NETWORKS[network]()
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) for x in cifar10_test(None)[0].split(BATCH)])


def scores(network: str, logits: torch.Tensor) -> dict[str, Any]:
    """Accuracy of logits of the test images, beside the float model's."""
    labels, floating = cifar10_test(None)[1], float_answers(network)
    found = logits.argmax(1)
    first, second = floating == labels, found == labels
    difference = compare_counts(
        PairedCounts(
            both=int((first & second).sum()),
            only_first=int((first & ~second).sum()),
            only_second=int((~first & second).sum()),
            neither=int((~first & ~second).sum()),
        )
    )
    return {
        "samples": len(labels),
        "float_top1": float(first.double().mean()),
        "top1": float(second.double().mean()),
        "agreement": float((found == floating).double().mean()),
        **{key: asdict(difference)[key] for key in ("difference", "low", "high", "p_value")},
    }


def our_grid(network: str) -> dict[str, Any]:
    """What this package rounds in a network, in the terms of the workers."""
    images, _ = cifar10_test(None)
    calibration, _ = cifar10_calibration(CALIBRATION)
    result = cq.quantize(
        NETWORKS[network](),
        (images[:BATCH],),
        [calibration[:BATCH]],
        config="a8w8",
        accuracy="plain",
        lower=False,
        progress=False,
    )
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    nodes = result.converted.graph.nodes
    weighted = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in NETWORKS[network]().modules())
    # Tensors that share a scale count each.
    return {"activations": sum(n.target is quantize for n in nodes), "layers": weighted}


# -- tables ---------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables, our own rows (of ``improve.json``) last."""
    ours = json.loads(IMPROVE.read_text(encoding="utf-8"))
    rows = list(result["rows"].values())
    images = max((row["samples"] for row in rows if "samples" in row), default=0)
    versions = ", ".join(peer.version for peer in PEERS.values())
    lines = [
        f"Top-1 accuracy on {images:,} test images of CIFAR-10, against the float model on the "
        f"same images, with 95 % intervals; {CALIBRATION} unlabeled training images, one thread. "
        f"CPU seconds of quantizing. {versions}; weights per channel."
    ]
    header = ["tool", "method", "top-1", "against float (95 % interval)", "agrees with float"]
    header += ["CPU s", "activations rounded", "weights rounded", "bias", "layers run on integers"]
    for network in NETWORKS:
        mine = [row for row in rows if row["network"] == network]
        if not mine:
            continue
        lines += ["", f"{network}:", "", _line(header), _line(["---"] * len(header))]
        lines += [_line(_cells(row)) for row in in_order(mine)]
        grid = result["ours"].get(network)
        for name in ("a8w8, fast", "a8w8, best", "a8w4, fast", "a8w4, best"):
            # "fast" is "plain" where nothing is narrow.
            found = ours["rows"].get(f"{network}, {name}".replace("a8w8, fast", "a8w8, plain"))
            if found is not None and grid is not None:
                method = name.replace(", ", ", `accuracy=") + "`"
                layers = grid["layers"]
                row = {**found, "peer": OURS, "method": method}
                row["grid"] = {
                    "activations": grid["activations"],
                    "weights": {name.partition(",")[0].replace("a8w", "int"): layers},
                    "bias": "int32",
                    "execution": {"integer": layers, "float": 0},
                }
                lines.append(_line(_cells(row)))
    return "\n".join(lines) + "\n"


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as ``PEERS`` has them."""
    order = {(peer.title, method): (i, j) for i, peer in enumerate(PEERS.values())
             for j, method in enumerate(peer.methods)}  # fmt: skip
    return sorted(rows, key=lambda row: order[row["peer"], row["method"]])


def _cells(row: Mapping[str, Any]) -> list[str]:
    method = row["method"]
    if "iterations" in row:
        method += f", {row['iterations']:,} iterations"
    if "error" in row:
        return [row["peer"], method, f"failed: {row['error']}", *[""] * 7]
    grid, points = row["grid"], [f"{100 * row[key]:+.2f}" for key in ("difference", "low", "high")]
    ran = grid["execution"]
    return [
        row["peer"],
        method,
        f"{row['top1']:.2%}",
        f"{points[0]} ({points[1]} to {points[2]})",
        f"{row['agreement']:.2%}",
        f"{row['cpu_seconds']:.0f}",
        str(grid["activations"]),
        ", ".join(f"{count} {kind}" for kind, count in grid["weights"].items()),
        grid["bias"],
        f"{ran['integer']} of {ran['integer'] + ran['float']}",
    ]


def _line(cells_: list[str]) -> str:
    return f"| {' | '.join(cells_)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the environments")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "peers.json"
    result: dict[str, Any] = {"version": 1, "ours": {}, "rows": {}}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    work = options.work.resolve()
    hand_over(work / "exchange")
    for network, peer, method in pending(result["rows"], options.only):
        if network not in result["ours"]:
            result["ours"][network] = our_grid(network)
        name = row_name(network, peer, method)
        result["rows"][name] = measure(network, peer, method, work)
        print(json.dumps(result["rows"][name]), flush=True)
        write_json_atomic(file, result)
        write_text_atomic(options.output / "peers.md", render(result))


if __name__ == "__main__":
    main()
