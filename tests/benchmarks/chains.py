"""CPU seconds and peak memory of every stage for ever longer chains of layers.

    python tests/benchmarks/chains.py --output docs/results

Each length has a process of its own, with one thread, which has lowered a short chain before, so
that libraries are loaded. Memory is what ``memory.py`` measures: the peak of each stage in MB above
what was resident with the model made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import main_of

LENGTHS = (250, 500, 1_000, 2_000)
MB = 1 << 20

Record = dict[str, Any]


def measure(ops: int) -> Record:
    """Seconds and MB of each stage."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
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
    """Measure each length."""
    main_of(__file__, __doc__, [str(ops) for ops in LENGTHS], lambda ops: measure(int(ops)), render)


if __name__ == "__main__":
    main()
