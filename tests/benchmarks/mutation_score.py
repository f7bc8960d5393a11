"""How many small wrong changes of the source do the tests notice?

    python tests/benchmarks/mutation_score.py --work build/mutation --output docs/results

Takes a sample of mutants (``tests/support/mutants.py``) of the modules that decide integers, spread
over modules and kinds of change, and runs for each the tests that execute its line, the fastest
first. A mutant that they all pass gets a second chance: the whole files of these tests, since tests
of a file share what one of them has made. What is still not noticed is a hole in the tests, or a
change that does not matter; ``mutation_explained.json`` beside this file lists the latter, with
their reasons.

The first run finds out which test executes which lines (``coverage``; as long as the test suite,
kept in ``--work`` per test file until that file is newer). A run that is stopped goes on where it
was; ``--again`` runs those that nothing noticed another time, after tests were added.

Why not a tool? cosmic-ray starts a process for each mutant (ten seconds of imports) and all tests
in it. mutmut 3 forks, too, but it changes functions without decorators only, no tables at module
level, and puts trampolines in their place, whose names end up in graphs and messages; it has no
sample. mutatest is not maintained. None selects tests by line.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutation_server as server

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.mutants import Mutant, compiles, mutants

ROOT = server.ROOT
EXPLAINED = Path(__file__).with_name("mutation_explained.json")
MODULES = (
    "core/arithmetic.py",
    "core/bias.py",
    "core/exact.py",
    "core/fixed_point.py",
    "calibration/observers.py",
    "calibration/ranges.py",
    "planning/decisions.py",
    "planning/edges.py",
    "planning/model_io.py",
    "planning/neighbors.py",
    "planning/wide_ranges.py",
    "reference/accumulators.py",
    "reference/bundle.py",
    "reference/interpreter.py",
    "reference/numpy_runner.py",
    "ops/*.py",
    "backends/xnnpack/arithmetic.py",
    "backends/xnnpack/checks.py",
    "backends/xnnpack/exactness.py",
    "backends/xnnpack/kernels.py",
    "backends/xnnpack/stored_integers.py",
    "backends/xnnpack/tables.py",
    "backends/xnnpack/passes/*.py",
)
"""What is mutated, below the package."""

TESTS = [
    f"test_{name}"
    for name in (
        *("arithmetic", "bias", "constants", "planner", "registry", "functions", "activations"),
        *("conv", "conv_transpose", "linear", "elementwise", "pool", "movement", "attention"),
        *("normalization", "embedding", "lowering_checks", "lowering_combinations"),
        *("qat_setups", "finetune"),
        *("reference", "every_op", "bundle", "passes", "lowering"),
        *("observers_activation", "statistics"),
        *(
            "bit_widths",
            "legalization",
            "factors",
            "canonical",
            "quantizer",
            "profitability",
            "xnnpack_ops",
        ),
        *("networks", "fuzz", "batch_norms", "export_features", "verification", "composable"),
        *("drop_in", "config", "calibration", "diagnosis", "readback", "report", "qat"),
        *("checks", "fidelity"),
    )
]
"""The test files that may notice; each is found by its name, in whatever folder it is."""

AT_IMPORT = ""
"""The context in which ``coverage`` puts what runs before the first test."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One mutant of one file."""

    path: str
    """From the root, with slashes."""
    mutant: Mutant
    before: str
    after: str

    @property
    def key(self) -> str:
        """What stays the same when other lines of the file change."""
        return " | ".join([self.path, self.mutant.place, self.before, self.after])


class CoverageMap:
    """Which tests execute a line, and how long they take."""

    def __init__(self, work: Path, files: list[str]) -> None:
        self.work = work
        self.names = files
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))

    def collect(self) -> None:
        """Measure the test files that are not known yet or newer than what is known."""
        for name in self.names:
            (file,) = (ROOT / "tests").rglob(f"{name}.py")
            known = self.work / f"{file.stem}.coverage"
            if not known.exists() or known.stat().st_mtime < file.stat().st_mtime:
                start = time.monotonic()
                done = server.record_coverage(self.work, str(file.relative_to(ROOT)), 3600)
                word = "done" if done else "STOPPED"
                print(f"{name}: {word} after {time.monotonic() - start:.0f} s", flush=True)

    def load(self, paths: set[str]) -> None:
        """Read what was measured about some files of the package."""
        from coverage import CoverageData

        for name in self.names:
            file = self.work / f"{name}.coverage"
            if not file.exists():
                continue  # its tests were stopped, or could not be collected
            self.seconds.update(json.loads(file.with_suffix(".json").read_text()))
            data = CoverageData(str(file))
            data.read()
            for path in paths:
                for line, tests in data.contexts_by_lineno(str(ROOT / path)).items():
                    self.lines[path][line].update(tests)

    def of(self, place: Place) -> list[str]:
        """The tests that execute a mutant; none if nothing does.

        What runs at import only, such as a table or a signature, is as good as tested by those
        tests that execute most of its file.
        """
        lines = self.lines[place.path]
        source = (ROOT / place.path).read_text(encoding="utf-8")
        # A statement of several lines is recorded by some of them.
        here: set[str] = set()
        for line in statement_lines(source, place.mutant.line):
            here |= lines.get(line, set())
        if here != {AT_IMPORT}:
            return sorted(here - {AT_IMPORT})
        counts = Counter(test for tests in lines.values() for test in tests if test != AT_IMPORT)
        return sorted(test for test, _ in counts.most_common(40))

    def choose(self, tests: list[str], budget: float) -> list[str]:
        """The fastest of each test function first, then their second fastest, and so on."""
        functions: dict[str, list[str]] = defaultdict(list)
        for test in sorted(tests, key=self.cost):
            functions[test.split("[")[0]].append(test)
        rounds = sorted(
            (index, self.cost(test), test)
            for group in functions.values()
            for index, test in enumerate(group)
        )
        chosen, spent = [], 0.0
        for _, cost, test in rounds:
            if spent + cost <= budget and len(chosen) < 120:
                chosen.append(test)
                spent += cost
        return sorted(chosen, key=self.cost)

    def files(self, tests: list[str], budget: float) -> list[str]:
        """Whole test files, those with most of the tests first."""
        counts = Counter(test.split("::")[0] for test in tests)
        costs: Counter[str] = Counter()
        for test, seconds in self.seconds.items():
            costs[test.split("::")[0]] += seconds
        chosen, spent = [], 0.0
        for file, _ in counts.most_common():
            if spent + costs[file] <= budget:
                chosen.append(file)
                spent += costs[file]
        return sorted(chosen, key=lambda file: costs[file])

    def cost(self, test: str) -> float:
        return self.seconds.get(test, 0.0)

    def total(self, tests: list[str]) -> float:
        """CPU seconds of tests or files."""
        return sum(
            seconds
            for test, seconds in self.seconds.items()
            if test in tests or test.split("::")[0] in tests
        )


def statement_lines(source: str, line: int) -> range:
    """The lines of the innermost simple statement, or head of a compound one, around a line."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            last = node.end_lineno
            if body := getattr(node, "body", None):
                last = min(last, body[0].lineno - 1)
            if node.lineno <= line <= last:
                best = range(node.lineno, last + 1)
    return best


def by_turns(source: str, order: random.Random) -> list[Mutant]:
    """The mutants of a file in random order, one of each kind after the other."""
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants(source):
        kinds[mutant.operator].append(mutant)
    for group in kinds.values():
        order.shuffle(group)
    turns = [(i, order.random(), m) for group in kinds.values() for i, m in enumerate(group)]
    return [mutant for _, _, mutant in sorted(turns, key=lambda turn: turn[:2])]


def sample(paths: list[str], count: int, seed: int) -> list[Place]:
    """``count`` mutants, from each file by the root of what it has, evenly over kinds of change.

    A larger count begins with what a smaller one has.
    """
    drawn: list[tuple[float, Place]] = []
    for path in paths:
        source = (ROOT / path).read_text(encoding="utf-8")
        ranked = by_turns(source, random.Random(f"{seed} {path}"))
        for index, mutant in enumerate(ranked):
            place = Place(path, mutant, *mutant.lines(source))
            drawn.append(((index + 0.5) / math.sqrt(len(ranked)), place))
    chosen: dict[str, Place] = {}
    for _, place in sorted(drawn, key=lambda pair: pair[0]):
        if len(chosen) == count:
            break
        source = (ROOT / place.path).read_text(encoding="utf-8")
        if place.key not in chosen and compiles(place.mutant.applied(source)):
            chosen[place.key] = place
    return list(chosen.values())


class Score:
    """The runs of a sample, and the record of them."""

    def __init__(self, options: argparse.Namespace, places: list[Place]) -> None:
        self.places = places
        self.record = options.work / "mutants.jsonl"
        self.jobs = options.jobs
        self.known = known_outcomes(self.record)
        self.again = options.again
        self.budgets = options.first, options.second
        self.map = CoverageMap(options.work, options.tests)
        self.work = options.work

    def todo(self) -> list[Place]:
        """Mutants without an outcome, and with ``again`` those that nothing noticed."""
        explained = explanations()
        return [
            place
            for place in self.places
            if place.key not in self.known
            or (self.again and not self.known[place.key]["noticed"] and place.key not in explained)
        ]

    def run(self) -> None:
        """Run what is left to do."""
        todo = self.todo()
        if not todo:
            return
        self.map.collect()
        self.map.load({place.path for place in todo})
        runs = server.Runs(self.work)
        waiting, done, start = list(reversed(todo)), 0, time.monotonic()
        while waiting or runs.going:
            while waiting and len(runs.going) < self.jobs:
                self.begin(runs, waiting.pop())
            if not runs.going:
                continue
            (place, stage, earlier), outcome = runs.wait()
            seconds = earlier + outcome.seconds
            if not outcome.noticed and stage == 1 and self.second(runs, place, seconds):
                continue
            self.write(place, outcome, seconds)
            done += 1
            left = (time.monotonic() - start) / done * (len(todo) - done) / 60
            word = "noticed" if outcome.noticed else "NOT NOTICED"
            print(f"{done} of {len(todo)}, {left:.0f} min left: {word}: {place.key}", flush=True)

    def begin(self, runs: server.Runs, place: Place) -> None:
        """Start the fastest tests of a mutant, or record that there are none."""
        chosen = self.map.choose(self.map.of(place), self.budgets[0])
        if chosen:
            self.start(runs, place, chosen, (place, 1, 0.0))
        elif not self.second(runs, place, 0.0):
            self.write(place, server.Outcome(0, "no test executes it", 0.0), 0.0)

    def second(self, runs: server.Runs, place: Place, seconds: float) -> bool:
        """Start the whole files of the tests; false if there is none that is short enough."""
        files = self.map.files(self.map.of(place), self.budgets[1])
        if files:
            self.start(runs, place, files, (place, 2, seconds))
        return bool(files)

    def start(
        self, runs: server.Runs, place: Place, tests: list[str], token: tuple[Place, int, float]
    ) -> None:
        """Start tests with the mutant in place."""
        source = (ROOT / place.path).read_text(encoding="utf-8")
        changed = place.path, place.mutant.applied(source)
        runs.start(tests, changed, 40 + 4 * self.map.total(tests), token)

    def write(self, place: Place, outcome: server.Outcome, seconds: float) -> None:
        record = {
            "key": place.key,
            "path": place.path,
            "operator": place.mutant.operator,
            "before": place.before,
            "after": place.after,
            "noticed": outcome.noticed,
            "by": outcome.failed or ("time or crash" if outcome.noticed else None),
            "seconds": round(seconds, 1),
        }
        self.known[place.key] = record
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def result(self) -> Record:
        """What is stored: all outcomes of the sample."""
        rows = [self.known[place.key] for place in self.places if place.key in self.known]
        reasons = explanations()
        for row in rows:
            row["explained"] = None if row["noticed"] else reasons.get(row["key"])
        return {"version": 1, "rows": rows}


def known_outcomes(record: Path) -> dict[str, Record]:
    """The last outcome of each mutant in the record."""
    if not record.exists():
        return {}
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


def explanations() -> dict[str, str]:
    """Why some mutants need not be noticed, by their key."""
    return json.loads(EXPLAINED.read_text(encoding="utf-8")) if EXPLAINED.exists() else {}


def render(result: Record) -> str:
    """The result as Markdown: a table by folder and file, and what was not noticed."""
    rows = result["rows"]
    lines = ["| module | mutants | noticed | explained | not noticed |", "| --- " * 5 + "|"]
    groups: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        groups[row["path"].removeprefix(f"{server.PACKAGE}/")].append(row)
    for name, group in [*sorted(groups.items()), ("all", rows)]:
        noticed = sum(row["noticed"] for row in group)
        explained = sum(row["explained"] is not None for row in group)
        left = len(group) - noticed - explained
        lines.append(f"| {name} | {len(group)} | {noticed} | {explained} | {left} |")
    for title, wanted in (("Not noticed", False), ("Explained", True)):
        found = [r for r in rows if not r["noticed"] and (r["explained"] is not None) is wanted]
        if found:
            lines += ["", f"{title}:", ""]
        for row in found:
            reason = f": {row['explained']}" if wanted else ""
            lines.append(f"- {row['path']}: `{row['before']}` to `{row['after']}`{reason}")
    return "\n".join(lines) + "\n"


def paths_of(modules: list[str]) -> list[str]:
    """Files of the package, relative to the root, that match any of the patterns."""
    package = ROOT / server.PACKAGE
    files = sorted({file for pattern in modules for file in package.glob(pattern)})
    return [file.relative_to(ROOT).as_posix() for file in files]


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=320, help="mutants to run")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--module", nargs="+", default=list(MODULES), help="files below the package, or globs"
    )
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files, by name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--first", type=float, default=20.0, help="CPU seconds for the tests of a line"
    )
    parser.add_argument(
        "--second", type=float, default=200.0, help="CPU seconds for whole files after that"
    )
    parser.add_argument("--work", type=Path, default=Path("build/mutation"), help="its records")
    parser.add_argument("--again", action="store_true", help="run what was not noticed again")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    parser.add_argument("--map-only", action="store_true", help="measure the tests, run nothing")
    parser.add_argument("--output", type=Path, help="folder for mutation_score.json and .md")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then say or store the score."""
    options = arguments()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    places = sample(paths_of(options.module), options.count, options.seed)
    score = Score(options, places)
    if options.list:
        for place in places:
            print(place.key)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server.preload(options.work)
    if options.map_only:
        score.map.collect()
        return
    score.run()
    result = score.result()
    print(render(result))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2) + "\n"
        (options.output / "mutation_score.json").write_text(text, encoding="utf-8")
        (options.output / "mutation_score.md").write_text(render(result), encoding="utf-8")


if __name__ == "__main__":
    main()
