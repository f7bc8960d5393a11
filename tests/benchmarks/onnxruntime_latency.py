"""Latency of our programs beside ONNX Runtime's, both in int8, on torchvision models.

    python tests/benchmarks/onnxruntime_latency.py --work FOLDER
    python tests/benchmarks/onnxruntime_latency.py --work FOLDER --models resnet18 mobilenet_v2

ONNX Runtime gets an environment of its own in ``FOLDER``. There a float ONNX model, with the same
weights, is quantized as its documentation says for x86 (QDQ, uint8 activations, int8 weights, one
scale a channel; 8 random images) and run by ``onnxruntime_worker.py``. The two runtimes take turns,
one thread each, in blocks; a ratio is that of neighbouring blocks, in CPU time, and the table has
their median. Our programs are profiled as well: what the kernels of convolutions and matrix
products take is the part that only other kernels would make faster. Every model is kept in
``onnxruntime_latency.json`` when it is done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS, environment, last_words
from support.models import torchvision_model
from torchvision_flow import decibels, images
from torchvision_models import TIMED, size_of

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.core.progress import track

WORKER = Path(__file__).with_name("onnxruntime_worker.py")
CALIBRATION, CHECKED = 8, 3
BLOCK = 3
"""Runs in a row: the first after the other runtime finds cold caches."""

MATRIX_KERNELS = ("GEMM", "DWConv", "Deconvolution", "Batch Matrix Multiply")
"""In XNNPACK's names of the operators that multiply and add (``src/operator-type-defs.inc``)."""

Record = dict[str, Any]


class OtherRuntime:
    """ONNX Runtime in its own process, which runs when it is told to."""

    def __init__(self, python: Path, folder: Path) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._log = (folder / "worker.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(WORKER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | one,
        )
        self.outputs = [torch.tensor(output) for output in self._answer()]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(last_words(self._log.read()))
        return json.loads(line)

    def run(self, count: int) -> list[float]:
        """CPU milliseconds of each of ``count`` runs."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        milliseconds: list[float] = self._answer()
        return milliseconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def measure(name: str, python: Path, work: Path, seconds: float) -> Record:
    """One model; with ``error`` where a runtime failed."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    size = size_of(name, None)
    record: Record = {"model": name, "size": size}
    try:
        model = torchvision_model(name)
        calibration = images(name, size, CALIBRATION, 2)
        checked = images(name, size, CHECKED, 3)
        export(model, calibration, checked, folder)
        program = cq.quantize(
            model, calibration[0], calibration, config="a8w8", accuracy="plain", progress=False
        ).lowered.buffer
        method = Runtime.get().load_program(program).load_method("forward")
        (example, *_) = checked
        wanted = [[first(model(*given))] for given in checked]
        mine = [[method.execute(list(given))[0].clone()] for given in checked]
        other = OtherRuntime(python, folder)
    except Exception as failed:  # what failed is a result, too
        return record | {"error": f"{type(failed).__name__}: {str(failed).strip()[:300]}"}
    try:
        theirs = [[output] for output in other.outputs]
        ours_ms, theirs_ms, ratios = [], [], []
        deadline = time.perf_counter() + seconds
        while len(ratios) < 5 or time.perf_counter() < deadline:
            mine_now = []
            for _ in range(BLOCK):
                start = time.process_time()
                method.execute(list(example))
                mine_now.append(1e3 * (time.process_time() - start))
            theirs_now = other.run(BLOCK)
            ours_ms.append(min(mine_now))
            theirs_ms.append(min(theirs_now))
            ratios.append(ours_ms[-1] / theirs_ms[-1])
    finally:
        other.close()
    return record | {
        "blocks": len(ratios),
        "milliseconds": {
            "ours": statistics.median(ours_ms),
            "onnxruntime": statistics.median(theirs_ms),
        },
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "matrix_share": matrix_share(program, example),
        "sqnr": {"ours": decibels(wanted, mine), "onnxruntime": decibels(wanted, theirs)},
    }


def matrix_share(program: bytes, example: tuple[torch.Tensor]) -> float:
    """The share of a run of our program that convolutions and matrix products take."""
    rows = cq.profile(program, example, threads=1).rows
    return sum(
        row.share
        for row in rows
        if any(name in kernel for kernel in row.kernels for name in MATRIX_KERNELS)
    )


def first(outputs: Any) -> torch.Tensor:
    """The first tensor of a model's result: a segmentation model returns a dictionary."""
    tensor = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
    assert isinstance(tensor, torch.Tensor)
    return tensor


def export(
    model: torch.nn.Module,
    calibration: list[tuple[torch.Tensor]],
    checked: list[tuple[torch.Tensor]],
    folder: Path,
) -> None:
    """Write the float model as ONNX, and images, for the worker."""
    torch.onnx.export(
        model,
        calibration[0],
        str(folder / "float.onnx"),
        input_names=["x"],
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    stacks = {"calibration": calibration, "checked": checked}
    np.savez(
        folder / "images.npz", **{k: torch.stack([x for (x,) in v]) for k, v in stacks.items()}
    )


def render(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        f"CPU time of one image, one thread, of one CPU ({result['cpu']}); ours at `a8w8` against "
        f"{PEERS['onnxruntime'].version}, QDQ, u8s8. A ratio below 1: ours is faster.",
        "",
        "| model | ours / ONNX Runtime | quartiles | of ours in matrix kernels | these alone / "
        "ONNX Runtime | SQNR to float in dB (ONNX Runtime) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ratios = []
    for name in TIMED:
        row = result["models"].get(name)
        if row is None:
            continue
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} | | | | |")
            continue
        ratios.append(row["ratio"])
        low, high = row["quartiles"]
        sqnr, share = row["sqnr"], row["matrix_share"]
        lines.append(
            f"| {name} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {share:.0%} | "
            f"{share * row['ratio']:.2f} | "
            f"{sqnr['ours']:.1f} ({sqnr['onnxruntime']:.1f}) |"
        )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        below = sum(ratio <= 0.9 for ratio in ratios)
        lines += [
            "",
            f"Geometric mean {mean:.2f} over {len(ratios)} models, from {min(ratios):.2f} to "
            f"{max(ratios):.2f}; {below} at or below 0.9.",
        ]
    return "\n".join(lines) + "\n"


def cpu() -> str:
    """What Linux calls the processor."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line for line in text.splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else "unknown"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the environment")
    parser.add_argument("--models", nargs="+", default=TIMED, choices=TIMED)
    parser.add_argument("--seconds", type=float, default=15.0, help="of running, per model")
    parser.add_argument("--again", action="store_true", help="measure also what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    portable_lib._unsafe_reset_threadpool(1)
    file = options.output / "onnxruntime_latency.json"
    result: Record = {"version": 1, "cpu": cpu(), "models": {}}
    if file.exists():
        result |= {"models": json.loads(file.read_text(encoding="utf-8"))["models"]}
    python = environment(PEERS["onnxruntime"], options.work / "onnxruntime")
    missing = [
        name
        for name in options.models
        if options.again or "error" in result["models"].get(name, {"error": ""})
    ]
    for name in track(missing, "models"):
        with torch.no_grad():
            row = measure(name, python, options.work / "latency", options.seconds)
        result["models"][name] = row
        write_json_atomic(file, result)
        print(json.dumps(row), flush=True)
    write_text_atomic(file.with_suffix(".md"), render(result))


if __name__ == "__main__":
    main()
