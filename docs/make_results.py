"""Write the measured tables into the pages, from what the benchmarks stored in ``results``.

    python docs/make_results.py

A block between ``<!-- results: NAME -->`` and ``<!-- results: end -->`` is one of ``TABLES``. A
test fails while a page, a ``results/*.md`` or a number in a sentence is not what is stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from custom_quantizer.core.files import write_text_atomic

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- results: end -->\n)", re.DOTALL)

Record = dict[str, Any]


def stored(name: str) -> Record:
    """What a benchmark wrote to ``results/NAME.json``."""
    result: Record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def as_stored(name: str) -> Callable[[], str]:
    """The table that the benchmark itself rendered."""
    return lambda: "\n" + (RESULTS / f"{name}.md").read_text(encoding="utf-8") + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with blank lines around it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def top1(rows: Record, *keys: str) -> list[str]:
    """Accuracies in percent, empty where there is no such row."""
    return [f"{100 * rows[key]['top1']:.2f}" if key in rows else "" for key in keys]


def qat_widths() -> str:
    """Widths side by side."""
    rows = stored("qat_widths")["rows"]
    columns = [f"{scheme}, {how}" for scheme in ("a8w8", "a6w6", "a4w4") for how in ("PTQ", "QAT")]
    return table(
        ["", "float", *(c.replace(", ", " ") if "PTQ" in c else "QAT" for c in columns)],
        [
            [label, *top1(rows, f"{model}, float", *(f"{model}, {c}" for c in columns))]
            for label, model in (("CNN", "CNN"), ("with batch norm", "CNN with batch norm"))
        ],
    )


def qat_bias() -> str:
    """Widths of the bias side by side."""
    rows, widths = stored("qat_bias")["rows"], ("32", "16", "8", "4", "float")
    floating = top1(stored("qat_widths")["rows"], "CNN with batch norm, float")[0]
    saturated = [
        f"a8w8, bias saturated to {width} bits of s_x s_w, PTQ" for width in ("16", "8", "4")
    ]
    return table(
        [f"a8w8, CNN with batch norm (float {floating})", "32 bits", *widths[1:]],
        [
            [
                "scale `s_x s_w 2^k`, leading bits kept (`-bias16`, ...), PTQ",
                *top1(rows, *(f"a8w8, bias {width}, PTQ" for width in widths)),
            ],
            ["the same, QAT", *top1(rows, *(f"a8w8, bias {width}, QAT" for width in widths))],
            [
                "scale `s_x s_w`, saturated, PTQ",
                *top1(rows, "a8w8, bias 32, PTQ", *saturated, "none"),
            ],
        ],
    )


def qat_rates() -> str:
    """Optimizers and learning rates side by side."""
    rows = stored("qat_rates")["rows"]
    columns = ["PTQ", "sgd, 0.001", "sgd, 0.01", "sgd, 0.1"]
    columns += ["adam, 0.0001", "adam, 0.001", "adam, 0.01"]
    return table(
        ["", "PTQ", "SGD 0.001", "0.01", "0.1", "Adam 0.0001", "0.001", "0.01"],
        [[s, *top1(rows, *(f"{s}, {column}" for column in columns))] for s in ("a8w8", "a4w4")],
    )


def qat_networks() -> str:
    """Networks side by side."""
    result = stored("qat_networks")
    rows, schemes = result["rows"], ("a8w8", "a8w4", "a4w4")
    lines = []
    for model, key in (("ResNet-20", "resnet20"), ("MobileNetV2", "mobilenet_v2")):
        more = f"{model}, float, {result['training_batches'][key]['a8w4']} more batches"
        columns = [f"{model}, {scheme}, {how}" for scheme in schemes for how in ("PTQ", "QAT")]
        lines.append([model, *top1(rows, f"{model}, float", more, *columns)])
    heads = [head for scheme in schemes for head in (f"{scheme} PTQ", "QAT")]
    return table(["", "float", "float, more batches", *heads], lines)


def qat_starts() -> str:
    """From plain and from improved weights side by side."""
    rows, lines = stored("qat_starts")["rows"], []
    for name, row in rows.items():
        if "against_plain" not in row:
            continue
        model, _, batches, *rate = name.split(", ")
        names = ("float", "PTQ", f"plain, {batches}", "improved")
        cells = top1(rows, *(f"{model}, {other}" for other in names), name)
        against = row["against_plain"]
        low, high = against["interval"]
        between = f"{100 * against['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        seeds = str(len(row.get("by_seed", [1])))
        lines.append(
            [", ".join([model, *rate]), batches.removesuffix(" batches"), seeds, *cells, between]
        )
    columns = ["float", "PTQ", "trained from there", "improved", "trained from there"]
    columns.append("improved start less plain (95 % interval)")
    return table(["", "batches of 128", "seeds", *columns], lines)


def qat_start_settings() -> str:
    """Settings of a start, on training images held out."""
    held_out = stored("qat_starts")["held_out"]
    lines = [[name, f"{100 * share:.2f}"] for name, share in held_out["top1"].items()]
    head = f"{held_out['model']}, {held_out['samples']:,} training images held out"
    return table([head, "top-1"], lines)


def scales_by_batch() -> str:
    """What batches of one image change, against all other batches."""
    rows = stored("calibration_batches")["rows"]
    lines = []
    for observer in ("minmax", "percentile", "histogram", "entropy"):
        found = [
            row
            for name, row in rows.items()
            if name.startswith(f"{observer}, ") and name.split(", ", 1)[1] not in FIRST_FEEDS
        ]
        differ = {row["qparams"] - row["equal_qparams"] for row in found}
        most = max(row["largest_relative_scale_difference"] for row in found)
        count = " or ".join(str(number) for number in sorted(differ))
        cells = [f"`{observer}`", f"{count} of {found[0]['qparams']}"]
        lines.append([*cells, f"{most:.2g}" if most else "0"])
    return table(["observer", "scales or zero points that differ", "of a scale, at most"], lines)


FIRST_FEEDS = ("float", "batches of 1")


def arm() -> str:
    """One row a CPU: how many values were compared, and how many differ."""
    result = stored("arm")
    lines = []
    for cpu in result["cpus"]:
        mine = [row for row in result["rows"] if row["cpu"] == cpu["name"]]
        exact = [row for row in mine if row["exact"]]
        other = [row for row in mine if not row["exact"]]
        lines.append(
            [
                *(cpu["name"], cpu["kernels"]),
                *(f"{sum(row[key] for row in exact):,}" for key in ("values", "different")),
                *(f"{sum(row[key] for row in other):,}" for key in ("values", "wrong")),
            ]
        )
    header = ["CPU", "XNNPACK's kernels", "integer programs: values", "differ"]
    header += ["float and emulated ops: values", "beyond their bound"]
    return table(header, lines)


TABLES: dict[str, Callable[[], str]] = {
    "arm": arm,
    "bit_widths": as_stored("bit_widths"),
    "c_code": as_stored("c_code"),
    "calibration_batches": as_stored("calibration_batches"),
    "calibration_cost": as_stored("calibration_cost"),
    "calibration_low_bits": as_stored("calibration_low_bits"),
    "calibration_networks": as_stored("calibration_networks"),
    "calibration_observers": as_stored("calibration_observers"),
    "calibration_samples": as_stored("calibration_samples"),
    "chains": as_stored("chains"),
    "file_sizes": as_stored("file_sizes"),
    "improve": as_stored("improve"),
    "learned_rounding": as_stored("learned_rounding"),
    "long_graphs": as_stored("long_graphs"),
    "memory": as_stored("memory"),
    "mutation_score": as_stored("mutation_score"),
    "packed_layers": as_stored("packed_layers"),
    "qat_bias": qat_bias,
    "qat_networks": qat_networks,
    "qat_rates": qat_rates,
    "qat_start_settings": qat_start_settings,
    "qat_starts": qat_starts,
    "qat_widths": qat_widths,
    "scales_by_batch": scales_by_batch,
    "tosa": as_stored("tosa"),
    "caches": as_stored("caches"),
    "second_scheme": as_stored("second_scheme"),
    "search": as_stored("search"),
}


def page_text(current: str) -> str:
    """A page with fresh tables in its blocks."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], current)


def main() -> None:
    """Write all pages."""
    for page in sorted(DOCS.glob("*.md")):
        current = page.read_text(encoding="utf-8")
        if (fresh := page_text(current)) != current:
            write_text_atomic(page, fresh)


if __name__ == "__main__":
    main()
