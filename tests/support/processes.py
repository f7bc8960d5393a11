"""The command line of a benchmark whose cases each have a process of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def main_of(
    script: str,
    description: str | None,
    cases: Sequence[str],
    measure: Callable[[str], Record],
    render: Callable[[Record], str],
) -> None:
    """Measure each case in a process of its own, print what it found, and store all of it.

    What was stored of other cases stays.

    Args:
        script: path of the benchmark; ``STEM.json`` and ``STEM.md`` are written.
        description: of the benchmark.
        cases: what is measured by default.
        measure: one case, in this process.
        render: the page of all results.
    """
    path = Path(script)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=cases, help=f"of {', '.join(cases)}")
    parser.add_argument("--one", metavar="CASE", help="measure it in this process")
    parser.add_argument("--output", type=Path, help=f"folder to write {path.stem}.json and .md to")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    from custom_quantizer.core.files import write_json_atomic, write_text_atomic

    records = {}
    if options.output is not None and (stored := options.output / f"{path.stem}.json").exists():
        records = {record["case"]: record for record in json.loads(stored.read_text())["results"]}
    for case in options.cases:
        records[case] = {"case": case, **measured(script, case)}
        print(records[case], flush=True)
        if options.output is not None:
            record = {"version": 1, "results": list(records.values())}
            write_json_atomic(options.output / f"{path.stem}.json", record)
            write_text_atomic(options.output / f"{path.stem}.md", render(record))


def measured(script: str | Path, case: str) -> Record:
    """What a benchmark of this kind finds for one case, in a process of its own."""
    command = [sys.executable, str(script), "--one", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record
