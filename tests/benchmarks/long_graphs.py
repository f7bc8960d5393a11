"""How CPU seconds and peak memory of the whole flow grow with a network, for networks of all kinds.

    python tests/benchmarks/long_graphs.py --output docs/results
    python tests/benchmarks/long_graphs.py all "2000: movement; residual" --output docs/results

All kinds (``tests/support/long_graphs.py``) are measured in one process with one thread; a short
network of the kind is quantized before, so that libraries are loaded. A case with a number in front
measures kinds at that length, to stand next to those of 500 ops. ``quantize`` says which of
its stages it is in; capturing the network before and saving the result behind it are stages, too.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.long_graphs import KINDS
from support.processes import main_of

LENGTHS = (250, 500)
MB = 1 << 20
SHORT = 0.2
"""Seconds of a stage below which its growth says nothing."""

Record = dict[str, Any]


class Meter:
    """CPU seconds of each stage, and those of Python's collector of garbage in all of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.collecting = 0.0
        self._name, self._start, self._collected = "", 0.0, 0.0

    def stage(self, name: str) -> None:
        """End the stage before, and begin the next one."""
        now = time.process_time()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._start
        self._name, self._start = name, time.process_time()

    def note_collection(self, phase: str, _about: dict[str, int]) -> None:
        """What the collector calls before and after its work."""
        if phase == "start":
            self._collected = time.process_time()
        else:
            self.collecting += time.process_time() - self._collected

    @contextmanager
    def stages(self, *_: object) -> Iterator[Callable[[str], None]]:
        """In the place of the flow's own report of its stages."""
        yield self.stage


def flow(kind: str, ops: int) -> Record:
    """The whole flow of one network."""
    import torch
    from memory import settle, status

    import custom_quantizer as cq
    from custom_quantizer.app import pipeline

    torch.manual_seed(0)
    model, inputs = KINDS[kind](ops)
    data = [inputs if len(inputs) > 1 else inputs[0]]
    meter = Meter()
    base = settle()
    with torch.no_grad(), patch.object(pipeline, "stages", meter.stages):
        gc.callbacks.append(meter.note_collection)
        meter.stage("capture")
        captured = torch.export.export(model, inputs).module()
        result = cq.quantize(captured, inputs, data, progress=False)
        meter.stage("saving")
        with TemporaryDirectory() as folder:
            result.save(folder)
        meter.stage("")
        gc.callbacks.remove(meter.note_collection)
    assert result.lowered is not None
    return {
        "nodes": len(captured.graph.nodes),
        "delegates": result.lowered.report.delegates,
        "seconds": {stage: round(spent, 3) for stage, spent in meter.seconds.items()},
        "collecting": round(meter.collecting, 2),
        "peak": round((status("VmHWM") - base) / MB, 1),
    }


def measure(case: str) -> Record:
    """The networks of some kinds, or of ``all``; at one length, if that stands before a colon."""
    import torch

    length, _, kinds = case.rpartition(":")
    lengths = (int(length),) if length else LENGTHS

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    found: dict[str, list[Record]] = {}
    for kind in KINDS if kinds == "all" else kinds.strip().split("; "):
        flow(kind, 12)
        found[kind] = [flow(kind, ops) for ops in lengths]
        print(kind, found[kind], file=sys.stderr, flush=True)
    return {"ops": lengths, "kinds": found}


def steepest(short: Record, long: Record) -> tuple[str, float]:
    """The stage that grows most, and how many times it takes as long."""
    ratios = {
        stage: spent / max(short["seconds"].get(stage, 0.0), 0.01)
        for stage, spent in long["seconds"].items()
        if spent > SHORT
    }
    stage = max(ratios, key=ratios.__getitem__)
    return stage, ratios[stage]


def render(record: Record) -> str:
    """The table of docs/results/long_graphs.md."""
    short, long = (f"{ops:,} ops" for ops in LENGTHS)
    header = ["", "delegates", f"{short}, s", f"{long}, s", "ratio", "ms per op"]
    header += ["of it collecting garbage", f"{long}, MB", "ratio", "the stage that grows most"]
    rows = [header, ["---"] * len(header)]
    pairs = [part for part in record["results"] if len(part["ops"]) == len(LENGTHS)]
    kinds = {kind: flows for part in pairs for kind, flows in part["kinds"].items()}
    for kind, (a, b) in kinds.items():
        totals = [sum(part["seconds"].values()) for part in (a, b)]
        stage, growth = steepest(a, b)
        cells = [kind, f"{b['delegates']:,}", *(f"{total:.1f}" for total in totals)]
        cells += [f"{totals[1] / totals[0]:.1f}", f"{1e3 * totals[1] / LENGTHS[1]:.0f}"]
        cells += [f"{b['collecting'] / totals[1]:.0%}", f"{b['peak']:.0f}"]
        cells += [f"{b['peak'] / a['peak']:.1f}", f"{stage} ({growth:.1f})"]
        rows.append(cells)
    lines = ["CPU seconds and peak memory of the whole flow, `a8w8`, one thread:", "", *table(rows)]
    longer = [part for part in record["results"] if len(part["ops"]) == 1]
    rows = [LONGER, ["---"] * len(LONGER)]
    rows += [
        longer_row(kind, part["ops"][0], found, kinds[kind][1])
        for part in longer
        for kind, (found,) in part["kinds"].items()
    ]
    if longer:
        lines += ["", f"Longer ones, each next to that of {LENGTHS[1]} ops:", "", *table(rows)]
    return "\n".join(lines) + "\n"


LONGER = [
    *("", "ops", "delegates", "s", "ms per op", f"of that at {LENGTHS[1]}"),
    *("MB", f"per op, of that at {LENGTHS[1]}", "the stage that grows most per op"),
]


def longer_row(kind: str, ops: int, long: Record, short: Record) -> list[str]:
    """One network of the second table."""
    times = ops / LENGTHS[1]
    totals = [sum(part["seconds"].values()) for part in (long, short)]
    stage, growth = steepest(short, long)
    return [
        *(kind, f"{ops:,}", f"{long['delegates']:,}", f"{totals[0]:.1f}"),
        *(f"{1e3 * totals[0] / ops:.0f}", f"{totals[0] / totals[1] / times:.1f}"),
        *(f"{long['peak']:.0f}", f"{long['peak'] / short['peak'] / times:.1f}"),
        f"{stage} ({growth / times:.1f})",
    ]


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    """Measure all kinds."""
    main_of(__file__, __doc__, ["all"], measure, render)


if __name__ == "__main__":
    main()
