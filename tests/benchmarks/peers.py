"""The same networks and images through other tools: AIMET, NNCF and ONNX Runtime.

    python tests/benchmarks/peers.py --work FOLDER               # all, hours on a busy machine
    python tests/benchmarks/peers.py --work FOLDER --only "ResNet-20, NNCF"

Each tool gets an environment of its own in ``FOLDER``, made by pip with the requirements below
(AIMET and NNCF some gigabytes each), and is run by ``peers_worker.py`` in it. An environment that
is complete is used as it is; where pip was stopped it goes on. A tool sees 512 unlabeled training
images and the test images without labels, and hands back logits. Every row is kept in
``peers.json`` when it is done; what is there is not measured again, unless it failed. ``peers.md``
is rendered from it, and has our own rows from ``improve.json``. Needs images and weights (see
``tests/support/cifar_models.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from improve import BATCH, CALIBRATION, NETWORKS
from support.cifar_models import cifar10_calibration, cifar10_test

import custom_quantizer as cq
from custom_quantizer.analysis.paired import PairedCounts, compare_counts
from custom_quantizer.backends.xnnpack.program import find_weighted
from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.ops import match_of
from custom_quantizer.ops.placement import Placement

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
        module: what is imported to see whether it is there.
        methods: of ``peers_worker.py``, the cheap ones first, with what a table calls them.
    """

    title: str
    requirements: tuple[str, ...]
    module: str
    methods: tuple[str, ...]

    @property
    def version(self) -> str:
        """Name and version of the package."""
        return self.requirements[0].replace("==", " ")


PEERS = {
    "onnxruntime": Peer(
        "ONNX Runtime",
        ("onnxruntime==1.31.1", "onnx==1.23.2", "sympy"),
        "onnxruntime",
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
        "nncf",
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
        "aimet_torch.quantsim",
        ("int8", "int4 weights, ranges", "int4 weights, SeqMSE", "int4 weights, AdaRound"),
    ),
}
LEARNED = "int4 weights, AdaRound"
ADAROUND = {"ResNet-20": (500, 2_000)}
"""Iterations a layer; for other networks the first number. AIMET's default is 15,000 for weights
below 8 bits: most of an hour for ResNet-20."""

Cell = tuple[str, str, str, int]
"""``(network, peer, method, iterations)``, 0 iterations where nothing is learned."""


def cells() -> Iterator[Cell]:
    """All rows; what is learned by gradients last."""
    every = [
        (network, name, method, iterations)
        for network in NETWORKS
        for name, peer in PEERS.items()
        for method in peer.methods
        for iterations in iterations_of(network, method)
    ]
    yield from sorted(every, key=lambda cell: cell[3])


def iterations_of(network: str, method: str) -> tuple[int, ...]:
    """That a method is measured with."""
    if method != LEARNED:
        return (0,)
    return ADAROUND.get(network, ADAROUND["ResNet-20"][:1])


def row_name(network: str, peer: str, method: str, iterations: int) -> str:
    return f"{network}, {PEERS[peer].title}, {described(method, iterations)}"


def described(method: str, iterations: int) -> str:
    """As names and tables have a method."""
    return f"{method}, {iterations:,} iterations" if iterations else method


def pending(rows: Mapping[str, Mapping[str, Any]], only: str) -> Iterator[Cell]:
    """Cells to measure: those asked for that have no row, or one with an error."""
    for cell in cells():
        name = row_name(*cell)
        if only in name and "error" in rows.get(name, {"error": ""}):
            yield cell


# -- measuring ------------------------------------------------------------------------------------


def environment(peer: Peer, folder: Path) -> Path:
    """The Python of a tool's environment, which is made where it is missing.

    One that is complete is left alone. One in which pip was stopped is gone on with, and one with
    other requirements made anew.

    Raises:
        RuntimeError: the folder is something else; pip failed, with what it said; or what it
            installed cannot be imported.
    """
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(peer.requirements)
    found = done.read_text(encoding="utf-8") if done.exists() else None
    if found == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise RuntimeError(f"{folder} is there and no virtual environment; name another --work")
    venv.create(folder, with_pip=True, clear=found is not None)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    variables = dict(os.environ)
    try:
        _checked([str(python), *install, *peer.requirements], variables, TIMEOUT)
    except RuntimeError as failed:
        raise RuntimeError(f"pip install {' '.join(peer.requirements)}: {failed}") from failed
    try:
        _checked([str(python), "-c", f"import {peer.module}"], variables, TIMEOUT)
    except RuntimeError as failed:
        raise RuntimeError(f"import {peer.module}, after pip install: {failed}") from failed
    done.write_text(wanted, encoding="utf-8")
    return python


class Environments:
    """The tools' environments, each made when it is first asked for, and not tried twice."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._known: dict[str, Path | RuntimeError] = {}

    def python(self, name: str) -> Path:
        """The Python of a tool; see :func:`environment`."""
        if name not in self._known:
            try:
                self._known[name] = environment(PEERS[name], self._work / name)
            except RuntimeError as failed:
                self._known[name] = failed
        found = self._known[name]
        if isinstance(found, RuntimeError):
            raise found
        return found


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


def measure(cell: Cell, environments: Environments, work: Path) -> dict[str, Any]:
    """One row; with ``error`` where the tool failed."""
    network, name, method, iterations = cell
    peer = PEERS[name]
    row: dict[str, Any] = {
        "network": network,
        "peer": peer.title,
        "version": peer.version,
        "method": method,
    }
    if iterations:
        row["iterations"] = iterations
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        result = Path(scratch) / "result.json"
        given = [name, method, str(iterations), network, str(work / "exchange"), str(result)]
        try:
            python = environments.python(name)
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
    """The last line that says something, or pip's errors; of at most 300 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return ("; ".join(errors) or (lines or [""])[-1])[:300]


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


OUR_SCHEMES = ("a8w8", "a8w4")


def our_grid(network: str, scheme: str) -> dict[str, Any]:
    """What this package rounds in a network, in the terms of the workers.

    Improving changes numbers only, so it is the same for any ``accuracy=``.
    """
    calibration = cifar10_calibration(BATCH)[0]
    result = cq.quantize(
        NETWORKS[network](),
        (calibration,),
        [calibration],
        config=scheme,
        accuracy="plain",
        progress=False,
    )
    assert result.lowered is not None
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    # Tensors that share a scale count each.
    activations = sum(node.target is quantize for node in result.converted.graph.nodes)
    return {"activations": activations, **program_grid(result.lowered)}


def program_grid(program: cq.LoweredProgram) -> dict[str, Any]:
    """Weights, biases and layers of a program, as the file has them.

    The lowering report says, from what the file's nodes read and write, which layers run on
    integers. A weight has the width that holds all of its integers.
    """
    weights, biases, execution = Counter[str](), set[str](), Counter[bool]()
    report = {op.node: op for op in program.report.ops}
    for op in program.graph:
        match = match_of(op.node)
        if match is None or match.weight is None:
            continue
        record = report[op.node.name]
        execution[record.placement is Placement.INTEGER] += 1
        found = find_weighted(program.contents, record)
        if found is None:
            weights["float32"] += 1  # for a kernel outside
            continue
        delegate, node = found
        stored = delegate.weight(node)
        kind = stored.dtype.name
        if stored.dtype.kind in "iu":
            kind = f"int{1 + int(np.maximum(stored, ~stored).max()).bit_length()}"
        weights[kind] += 1
        if match.bias is not None and node.bias is not None:
            biases.add(delegate.tensors[node.bias].dtype)
    return {
        "weights": dict(weights),
        "bias": " and ".join(sorted(biases)) or "none",
        "execution": {"integer": execution[True], "float": execution[False]},
    }


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
        for name in ("a8w8, fast", "a8w8, best", "a8w4, fast", "a8w4, best"):
            # "fast" is "plain" where nothing is narrow.
            found = ours["rows"].get(f"{network}, {name}".replace("a8w8, fast", "a8w8, plain"))
            grid = result["ours"].get(network, {}).get(name.partition(",")[0])
            if found is not None and grid is not None:
                method = name.replace(", ", ", `accuracy=") + "`"
                lines.append(_line(_cells({**found, "peer": OURS, "method": method, "grid": grid})))
    return "\n".join(lines) + "\n"


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as ``PEERS`` has them."""
    order = {(peer.title, method): (i, j) for i, peer in enumerate(PEERS.values())
             for j, method in enumerate(peer.methods)}  # fmt: skip
    return sorted(
        rows, key=lambda row: (*order[row["peer"], row["method"]], row.get("iterations", 0))
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    method = described(row["method"], row.get("iterations", 0))
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
    result: dict[str, Any] = {"version": 2, "ours": {}, "rows": {}}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    work = options.work.resolve()
    hand_over(work / "exchange")
    environments = Environments(work)
    for cell in pending(result["rows"], options.only):
        grids = result["ours"].setdefault(cell[0], {})
        for scheme in OUR_SCHEMES:
            if scheme not in grids:
                grids[scheme] = our_grid(cell[0], scheme)
        name = row_name(*cell)
        result["rows"][name] = measure(cell, environments, work)
        print(json.dumps(result["rows"][name]), flush=True)
        write_json_atomic(file, result)
        write_text_atomic(options.output / "peers.md", render(result))


if __name__ == "__main__":
    main()
