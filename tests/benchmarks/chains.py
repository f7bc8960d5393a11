"""CPU seconds and peak memory of every stage for ever longer chains of layers.

    python tests/benchmarks/chains.py --output docs/results

Each length has a process of its own, with one thread, which has lowered a short chain before, so
that libraries are loaded. Memory is what ``memory.py`` measures: the peak of each stage in MB above
what was resident with the model made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LENGTHS = (250, 500, 1_000, 2_000)
MB = 1 << 20

Record = dict[str, Any]


def measure(ops: int) -> Record:
    """Seconds and MB of each stage."""
    import torch

    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from memory import settle, status
    from support.chains import chain, run_stages

    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    base = 0

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        settle()
        start = time.process_time()
        yield
        seconds[name] = round(time.process_time() - start, 2)
        peaks[name] = round((status("VmHWM") - base) / MB, 1)

    with torch.no_grad():
        run_stages(*chain(8), stage)
        model, x = chain(ops)
        base = settle()
        program = run_stages(model, x, stage)
    return {
        "ops": ops,
        "delegates": program.report.delegates,
        "bytes": program.report.size_bytes,
        "seconds": seconds,
        "peaks": peaks,
    }


def render(record: Record) -> str:
    """The tables of docs/results/chains.md."""
    results = record["results"]
    header = ["", *(f"{result['ops']:,} ops" for result in results)]
    lines = ["CPU seconds by stage, `a8w8`, one thread, the whole chain one delegate:", "", header]
    lines += [["---"] * len(header)]
    for stage in results[0]["seconds"]:
        lines.append([stage, *(f"{result['seconds'][stage]:.2f}" for result in results)])
    totals = [sum(result["seconds"].values()) for result in results]
    lines.append(["all", *(f"{total:.1f}" for total in totals)])
    each = zip(totals, results, strict=True)
    lines.append(["ms per op", *(f"{1e3 * total / result['ops']:.0f}" for total, result in each)])
    peaks = [max(result["peaks"].values()) for result in results]
    lines.append(["peak memory, MB above the model", *(f"{peak:.0f}" for peak in peaks)])
    return "\n".join(x if isinstance(x, str) else f"| {' | '.join(x)} |" for x in lines) + "\n"


def main() -> None:
    """Measure all, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--one", type=int, metavar="OPS", help="in this process")
    parser.add_argument("--output", type=Path, help="folder to write chains.json and .md to")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    records = []
    for ops in options.lengths:
        command = [sys.executable, __file__, "--one", str(ops)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        records.append(json.loads(done.stdout.splitlines()[-1]))
        print(records[-1], flush=True)
    if options.output is not None:
        from custom_quantizer.core.files import write_json_atomic, write_text_atomic

        record = {"version": 1, "results": records}
        write_json_atomic(options.output / "chains.json", record)
        write_text_atomic(options.output / "chains.md", render(record))


if __name__ == "__main__":
    main()
