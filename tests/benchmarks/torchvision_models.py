"""Torchvision models through the stock flow and through ours, side by side.

    python tests/benchmarks/torchvision_models.py                     # all, then the table
    python tests/benchmarks/torchvision_models.py --models resnet18 swin_t --flows ours
    python tests/benchmarks/torchvision_models.py --table-only

Each model goes through each flow in a process of its own, one after the other:

- ``stock``: ``XNNPACKQuantizer`` with one scale a channel, then ``XnnpackPartitioner``;
- ``ours``: ``IntegerQuantizer().set_global("a8w8")``, ``cq.lower`` with its checks;
- ``float``: no quantization, ``XnnpackPartitioner``.

Measured are seconds of each stage, the cost of calibration in float forwards, nodes, delegates and
what stays outside them, bytes of the program, how near its outputs are to float, to the converted
graph in PyTorch and (ours) to the integer reference. Then one more process runs the programs of all
flows and eager PyTorch in turn and stores their latency.

Results are kept in ``--work``, one JSON file per model and flow; what is there is not measured
again, so an interrupted run goes on where it was. What the results in ``--output`` say of other
models and flows stays. A flow that fails is a result: its error is stored. Weights and images are
random (seeded), batch-norm statistics randomized.

Costs are CPU seconds. A busy machine stretches even those (caches are shared), so both flows of a
model should run one after the other; ``--again`` measures what was stored under another load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torchvision_table import earlier, render

from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.core.progress import track

FLOWS = ("stock", "ours", "float")

TIMED = (
    "squeezenet1_1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "resnet18",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "densenet121",
    "googlenet",
    "inception_v3",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
    "vgg11_bn",
    "alexnet",
    "maxvit_t",
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "r3d_18",
)
"""Compared with the stock flow, at the size they were made for."""

OTHERS = ("fcn_resnet50", "ssdlite320_mobilenet_v3_large")
"""Beside the classification models, without a comparison."""

TIMED_SIZES = {"inception_v3": 299, "r3d_18": 112}
SIZES = {
    "alexnet": 224,
    "inception_v3": 299,
    "maxvit_t": 224,
    "r3d_18": 112,
    "ssdlite320_mobilenet_v3_large": 320,
    "vit_b_16": 224,
    "vit_b_32": 224,
}
"""Where the small size does not do: models that take one size, or whose last pool needs it."""
TIMED_SIZE, SMALL_SIZE = 224, 96
MAX_PARAMETERS = 100_000_000

Record = dict[str, Any]


def all_models() -> list[str]:
    """Timed models first, then every other classification model of up to 100 M parameters."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    small = [
        name
        for name in names
        if torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] <= MAX_PARAMETERS
    ]
    return [*TIMED, *(name for name in (*small, *OTHERS) if name not in TIMED)]


def size_of(name: str, asked: int | None) -> int:
    """Height and width of the images of a model."""
    if asked is not None:
        return asked
    if name in TIMED:
        return TIMED_SIZES.get(name, TIMED_SIZE)
    return SIZES.get(name, SMALL_SIZE)


def flows_of(name: str, asked: list[str] | None) -> list[str]:
    """Flows a model goes through: all for timed ones, ours for the others."""
    if asked is not None:
        return asked
    return list(FLOWS) if name in TIMED else ["ours"]


class Bench:
    """Results of models in flows, in a folder; what is missing is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, flow: str, size: int, kind: str = "json") -> Path:
        """Where a result or a program is kept."""
        return self.folder / f"{name}-{size}-{flow}.{kind}"

    def load(self, name: str, flow: str, size: int) -> Record | None:
        """A stored result."""
        path = self.path(name, flow, size)
        return json.loads(path.read_text()) if path.is_file() else None

    def wanted(self, name: str, flow: str, size: int) -> bool:
        """Whether a result is missing, or is to be measured again."""
        found = self.load(name, flow, size)
        if self.options.again:
            return True
        return found is None or ("error" in found and self.options.retry_failed)

    def measure(self, name: str, flow: str, size: int) -> Record:
        """Run one flow in a process of its own and return its result."""
        task = self._task(name, flow, size)
        return self._run(task, name, flow, size)

    def measure_latency(self, name: str, size: int) -> Record | None:
        """Run all programs of a model in turn, unless that was done with these programs."""
        programs = {
            flow: self.path(name, flow, size, "pte")
            for flow in FLOWS
            if self.path(name, flow, size, "pte").is_file()
        }
        stored = self.path(name, "latency", size)
        newest = max((path.stat().st_mtime for path in programs.values()), default=None)
        if newest is None or (stored.is_file() and stored.stat().st_mtime >= newest):
            return None
        task = self._task(name, "latency", size)
        task |= {
            "programs": {flow: str(path) for flow, path in programs.items()},
            "latency_s": self.options.latency_seconds,
        }
        return self._run(task, name, "latency", size)

    def _task(self, name: str, flow: str, size: int) -> Record:
        return {
            "model": name,
            "flow": flow,
            "size": size,
            "threads": self.options.threads,
            "record": str(self.path(name, flow, size)),
            "program": str(self.path(name, flow, size, "pte")),
        }

    def _run(self, task: Record, name: str, flow: str, size: int) -> Record:
        record = self.path(name, flow, size)
        record.unlink(missing_ok=True)
        if flow != "latency":
            self.path(name, flow, size, "pte").unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("torchvision_flow.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads)}
        log = self.path(name, flow, size, "log")
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    [*command, json.dumps(task)],
                    stdout=output,
                    stderr=output,
                    env=environment,
                    timeout=self.options.timeout,
                    check=False,
                ).returncode
                failure = f"the process ended with code {code}"
            except subprocess.TimeoutExpired:
                failure = f"not done after {self.options.timeout} s"
        found = self.load(name, flow, size)
        if found is None:
            found = {"model": name, "flow": flow, "size": size, "error": failure}
            write_json_atomic(record, found)
        return found


def line(record: Record) -> str:
    """One result in a few words."""
    what = f"{record['model']} {record['size']} {record['flow']}"
    if "error" in record:
        return f"{what}: FAILED in {record['error']}"
    if record["flow"] == "latency":
        times = record["milliseconds"].items()
        return f"{what}: " + ", ".join(f"{flow} {ms:.1f} ms" for flow, ms in times)
    seconds = ", ".join(f"{stage} {s:.1f} s" for stage, s in record["seconds"].items())
    outside = len(record["outside"])
    return f"{what}: {seconds}; {record['delegates']} delegates, {outside} kernels outside"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help="torchvision names (default: all)")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, help="default: what the table needs")
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/torchvision"), help="folder of the results"
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a process may take")
    parser.add_argument(
        "--latency-seconds", type=float, default=20.0, help="per model, all programs together"
    )
    parser.add_argument("--again", action="store_true", help="measure what is stored again")
    parser.add_argument("--retry-failed", action="store_true", help="measure failures again")
    parser.add_argument("--no-latency", action="store_true", help="leave out the runs in turn")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--output", type=Path, help="folder to write torchvision_models.json and .md to"
    )
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the table."""
    options = arguments()
    bench = Bench(options)
    names = options.models or all_models()
    if not options.table_only:
        for name in track(names, "models"):
            size = size_of(name, options.size)
            for flow in flows_of(name, options.flows):
                if bench.wanted(name, flow, size):
                    start = time.perf_counter()
                    record = bench.measure(name, flow, size)
                    took = time.perf_counter() - start
                    print(f"{line(record)} (took {took:.0f} s)", flush=True)
            if name in TIMED and not options.no_latency:
                measured = bench.measure_latency(name, size)
                if measured is not None:
                    print(line(measured), flush=True)
    models = earlier(options.output, "torchvision_models.json")
    for name in names:
        size = size_of(name, options.size)
        flows = {flow: bench.load(name, flow, size) for flow in (*FLOWS, "latency")}
        before = models.get(name, dict.fromkeys(flows))
        models[name] = {"size": size} | {flow: new or before[flow] for flow, new in flows.items()}
    results: Record = {"version": 1, "timed": list(TIMED), "models": models}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json_atomic(options.output / "torchvision_models.json", results)
        write_text_atomic(options.output / "torchvision_models.md", render(results))
    else:
        print(render(results))


if __name__ == "__main__":
    main()
