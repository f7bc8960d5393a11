"""Models of timm and transformers through the stock flow and through ours, side by side.

    pip install timm transformers
    python tests/benchmarks/zoo.py                                   # all, then the table
    python tests/benchmarks/zoo.py --models levit_128s BERT --again
    python tests/benchmarks/zoo.py --table-only --output docs/results

Neither library is needed by the package or its tests. Weights and inputs are random (seeded), the
statistics of batch norms those of random images; of blocks that repeat in a stage the first two are
kept (``zoo_models.py``). Flows and numbers are those of ``torchvision_models.py``.

Each model and flow runs in a process of its own, forked from this one, where everything is imported
already. Results are kept in ``--work``, one JSON file each; what is there is not measured again,
and what the results in ``--output`` say of others stays. A flow that fails is a result: its error
is stored.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from executorch.extension.pybindings import portable_lib
from torchvision_flow import Clock, latency, run_flow
from torchvision_table import earlier
from zoo_models import LIBRARIES, MODELS
from zoo_table import render

from custom_quantizer.core.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from custom_quantizer.core.progress import track

FLOWS = ("stock", "ours")

Record = dict[str, Any]


class Zoo:
    """Results of models in flows, in a folder; what is missing is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, flow: str, kind: str = "json") -> Path:
        """Where a result or a program is kept."""
        return self.folder / f"{name.replace(', ', '-').replace(' ', '_')}-{flow}.{kind}"

    def load(self, name: str, flow: str) -> Record | None:
        """A stored result."""
        path = self.path(name, flow)
        return json.loads(path.read_text()) if path.is_file() else None

    def measure(self, name: str, flow: str) -> Record:
        """Measure in a process of its own, unless there is a result."""
        found = self.load(name, flow)
        again = self.options.again and flow in (*self.options.flows, "latency")
        if found is not None and not again:
            return found
        self.path(name, flow).unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(name, flow))
        process.start()
        process.join(self.options.timeout)
        failure = f"the process ended with code {process.exitcode}"
        if process.exitcode is None:
            process.kill()
            process.join()
            failure = f"not done after {self.options.timeout} s"
        found = self.load(name, flow)
        if found is None:
            found = {"model": name, "flow": flow, "error": failure}
            write_json_atomic(self.path(name, flow), found)
        return found

    def _run(self, name: str, flow: str) -> None:
        """What the process does."""
        log = os.open(self.path(name, flow, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        portable_lib._unsafe_reset_threadpool(1)
        clock, subject = Clock(), MODELS[name]
        record: Record = {"model": name, "flow": flow}
        program = self.path(name, flow, "pte")
        try:
            with torch.no_grad():
                model = subject.build()
                if flow == "latency":
                    paths = {other: self.path(name, other, "pte") for other in FLOWS}
                    paths = {other: path for other, path in paths.items() if path.is_file()}
                    seconds = self.options.latency_seconds
                    record |= latency(model, subject.inputs(1, 4)[0], paths, seconds)
                else:
                    program.unlink(missing_ok=True)
                    data = run_flow(model, subject.inputs, flow, clock, record)
                    write_bytes_atomic(program, data)
        except Exception as error:  # what failed is a result, too
            traceback.print_exc()
            text = str(error).strip()
            record["error"] = f"{clock.stage}: {type(error).__name__}: {text[:400]}"
        write_json_atomic(self.path(name, flow), record)


def line(record: Record) -> str:
    """One result in a few words."""
    what = f"{record['model']}, {record['flow']}"
    if "error" in record:
        return f"{what}: FAILED in {record['error']}"
    if record["flow"] == "latency":
        times = record["milliseconds"].items()
        return f"{what}: " + ", ".join(f"{flow} {ms:.2f} ms" for flow, ms in times)
    sqnr = record["sqnr_float"]
    return (
        f"{what}: {sum(record['seconds'].values()):.0f} s, {record['delegates']} delegates, "
        f"{len(record['outside'])} outside, {'equal' if sqnr is None else f'{sqnr:.1f} dB'}, "
        f"{record['bytes'] / 1e3:.0f} kB"
    )


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", default=MODELS)
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=FLOWS)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="folder of results")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a process may take")
    parser.add_argument("--latency-seconds", type=float, default=3.0, help="per model; 0: none")
    parser.add_argument("--again", action="store_true", help="measure what is stored again")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help="folder to write zoo.json and zoo.md to")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the table."""
    options = arguments()
    zoo = Zoo(options)
    if not options.table_only:
        for library in LIBRARIES:  # before processes are forked
            __import__(library)
        for name in track(list(options.models), "models"):
            timed = ("latency",) if options.latency_seconds > 0 else ()
            for flow in (*options.flows, *timed):
                if options.again or zoo.load(name, flow) is None:
                    print(line(zoo.measure(name, flow)), flush=True)
    before, flows = earlier(options.output, "zoo.json"), (*FLOWS, "latency")
    results = {
        "version": 1,
        "libraries": {library: version(library) for library in LIBRARIES},
        "models": {
            name: {flow: zoo.load(name, flow) or before.get(name, {}).get(flow) for flow in flows}
            for name in MODELS
        },
    }
    if options.output is None:
        print(render(results))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.output / "zoo.json", results)
    write_text_atomic(options.output / "zoo.md", render(results))


if __name__ == "__main__":
    main()
