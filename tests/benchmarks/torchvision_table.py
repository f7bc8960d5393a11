"""The Markdown page of ``torchvision_models.py``, from what it stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import starmap
from pathlib import Path
from typing import Any

__all__ = [
    "before_lowering",
    "earlier",
    "latency_ratio",
    "length",
    "lowering",
    "mean_line",
    "number",
    "ratio",
    "render",
    "table",
    "what_is_not_integer",
    "whole",
]

Record = dict[str, Any]

LOWERING = ("read", "rewrite", "export", "partition", "write", "check")


def earlier(folder: Path | None, file: str) -> Record:
    """Models of the results that a folder holds already."""
    path = None if folder is None else folder / file
    if path is None or not path.is_file():
        return {}
    models: Record = json.loads(path.read_text())["models"]
    return models


def render(results: Record) -> str:
    """The page: comparison with the stock flow, agreement of every model, what stays outside."""
    models: Record = results["models"]
    timed = {name: models[name] for name in results["timed"] if name in models}
    sections = [_HEADER, *_comparison(timed), *_coverage(models), *what_is_not_integer(models)]
    missing = [name for name, model in models.items() if model.get("ours") is None]
    if missing:
        sections += ["## Not run", "", ", ".join(missing), ""]
    return "\n".join(sections)


_HEADER = """# Torchvision models

Made by `python tests/benchmarks/torchvision_models.py --output docs/results`. Random weights,
randomized batch-norm statistics, random images; scheme `a8w8`, `minmax`. "Stock" is
`XNNPACKQuantizer` with one weight scale a channel and `XnnpackPartitioner`. Costs are CPU seconds
of one thread, as ratios, one image at a time; a dash stands for what failed or was not run. Our
lowering leaves out the validation of the graph after each of ExecuTorch's passes and checks the
finished program instead.
"""


# ---------------------------------------------------------------------------------------------
# Against the stock flow
# ---------------------------------------------------------------------------------------------


def _comparison(timed: Record) -> list[str]:
    pairs = {
        name: model
        for name, model in timed.items()
        if model.get("ours") is not None and model.get("stock") is not None
    }
    if not pairs:
        return []
    header = (
        "model",
        "prepare to convert, stock = 1",
        "lower and check, stock = 1",
        "calibration in float forwards (stock)",
        "latency, stock = 1",
        "float `.pte` = 1",
        "eager = 1",
        "delegates (stock)",
        "SQNR to float in dB (stock)",
        "`.pte` / its integers",
    )
    rows = []
    for name, model in pairs.items():
        ours, stock = model["ours"], model["stock"]
        rows.append(
            (
                name,
                ratio(before_lowering(ours), before_lowering(stock)),
                ratio(lowering(ours), lowering(stock)),
                f"{number(ours.get('calibration_forwards'))} "
                f"({number(stock.get('calibration_forwards'))})",
                *(_latency(model, flow) for flow in ("stock", "float", "eager")),
                f"{whole(ours.get('delegates'))} ({whole(stock.get('delegates'))})",
                f"{number(ours.get('sqnr_float'), 1)} ({number(stock.get('sqnr_float'), 1)})",
                ratio(ours.get("bytes"), ours.get("needed_bytes"), 3),
            )
        )
    lines = ["## Against the stock flow", "", *_dates(pairs), *table(header, rows), ""]
    lines += [*_summary(pairs), ""]
    failed = [
        f"- {name}, {flow}: {model[flow]['error']}"
        for name, model in pairs.items()
        for flow in ("stock", "ours")
        if "error" in model[flow]
    ]
    return lines + (["Failures:", "", *failed, ""] if failed else [])


def _dates(pairs: Record) -> list[str]:
    """What was measured on the last day, where not all was."""

    def day(model: Record, flow: str) -> str:
        return str((model.get(flow) or {}).get("measured", ""))

    last = max(day(model, flow) for model in pairs.values() for flow in ("ours", "stock"))
    new = [name for name, model in pairs.items() if day(model, "ours") == last]
    timed = [name for name, model in pairs.items() if day(model, "latency") == last]
    if not last or len(new) == len(timed) == len(pairs):
        return []
    what = f"{', '.join(new)} (latency: {', '.join(timed) or 'of none'})"
    return [
        f"Measured on {last}: {what}. All else in this table is older, and of other machines: "
        "those whose CPU has VNNI gain more by integers over float.",
        "",
    ]


def before_lowering(record: Record) -> float | None:
    """Seconds of planning, preparing, calibrating and converting; ``None`` if one failed."""
    rewriting, calibrating = _rewriting(record), record.get("calibration_s")
    return None if rewriting is None or calibrating is None else rewriting + calibrating


def _rewriting(record: Record) -> float | None:
    """Seconds of planning, preparing and converting; ``None`` if one failed."""
    seconds = record.get("seconds") or {}
    parts = [seconds.get("prepare"), seconds.get("convert")]
    return None if None in parts else sum(parts)


def _float_forwards(ours: Record, stock: Record) -> float | None:
    """Seconds of calibration, were its forwards those of the float model, over all of stock's."""
    calibrating, whole = ours.get("calibration_s"), before_lowering(stock)
    return (
        None if not calibrating or not whole else calibrating / ours["calibration_forwards"] / whole
    )


def lowering(record: Record) -> float | None:
    """Seconds from the converted graph to the program, our checks included."""
    seconds = record.get("seconds") or {}
    if "write" not in seconds or "error" in record:
        return None
    return sum(seconds.get(stage, 0.0) for stage in LOWERING)


def _summary(pairs: Record) -> list[str]:
    """Geometric means and counts over the models where both flows gave a number."""
    both = [(model["ours"], model["stock"]) for model in pairs.values()]

    def ratios(of: Callable[[Record], float | None]) -> list[float | None]:
        seconds = [(of(ours), of(stock)) for ours, stock in both]
        return [ours / stock if ours and stock else None for ours, stock in seconds]

    one, stock_one = (
        sum(flow.get("delegates") == 1 for flow in side) for side in zip(*both, strict=True)
    )
    return [
        *mean_line("prepare to convert", ratios(before_lowering)),
        *mean_line("the same without calibration", ratios(_rewriting)),
        *mean_line("only the forwards of calibration, in float", starmap(_float_forwards, both)),
        *mean_line("lower and check", ratios(lowering)),
        *mean_line("latency", (latency_ratio(model, "stock") for model in pairs.values())),
        f"- one delegate: {one} of {len(pairs)} models (stock: {stock_one})",
    ]


def mean_line(what: str, found: Iterable[float | None]) -> list[str]:
    """A line of the geometric mean and range of ratios to the stock flow, of those that are."""
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [
        f"- {what}: geometric mean {mean:.2f} of stock over {len(ratios)} models, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}"
    ]


def latency_ratio(model: Record, flow: str) -> float | None:
    """Our latency over that of another flow."""
    value = ((model.get("latency") or {}).get("ours_over") or {}).get(flow)
    return None if value is None else float(value)


def _latency(model: Record, flow: str) -> str:
    return number(latency_ratio(model, flow))


# ---------------------------------------------------------------------------------------------
# Every model
# ---------------------------------------------------------------------------------------------


def _coverage(models: Record) -> list[str]:
    header = (
        "model",
        "input",
        "integer ops",
        "float ops",
        "delegates",
        "outside",
        "values that differ from the integer reference",
        "SQNR to converted graph in dB",
    )
    rows = [
        (
            name,
            f"{ours['size']}x{ours['size']}",
            whole(ours.get("integer_ops")),
            whole(length(ours.get("float_ops"))),
            whole(ours.get("delegates")),
            whole(length(ours.get("outside"))),
            _agreement(ours),
            "equal" if _is_equal(ours) else number(ours.get("sqnr_graph"), 1),
        )
        for name, ours in ((name, model.get("ours")) for name, model in models.items())
        if ours is not None
    ]
    if not rows:
        return []
    failed = [
        f"- {name}: {model['ours']['error']}"
        for name, model in models.items()
        if "error" in (model.get("ours") or {})
    ]
    notes = ["Failures:", "", *failed, ""] if failed else []
    return ["## What was lowered and run", "", _FLOAT_OPS, "", *table(header, rows), "", *notes]


_FLOAT_OPS = """Where ops are in float, last bits differ between the delegate and PyTorch, become
units when they are quantized, and add up from layer to layer. Each quantized tensor is within the
bound of [the arithmetic](../device_arithmetic.md), given those before it: `tests/test_models.py`
checks that for convnext_tiny, swin_t, swin_v2_t, vit_b_32 and maxvit_t."""


def _is_equal(record: Record) -> bool:
    return "sqnr_graph" in record and record["sqnr_graph"] is None


def _agreement(record: Record) -> str:
    found = record.get("agreement")
    if found is None:
        return "-"
    text = f"{found['different']:,} of {found['values']:,}"
    if not found["different"]:
        return text
    units = found.get("max_units")
    far = "" if units is None else f", by up to {units:g} LSB"
    return f"{text}{far}; relative error {found['relative']:.1e}"


def what_is_not_integer(models: Record, *, floating: bool = True) -> list[str]:
    """What runs outside delegates and, if asked for, what is float, with reasons and counts."""
    lines = []
    for name, model in models.items():
        ours = model.get("ours") or {}
        portable = counted(tuple(pair) for pair in ours.get("outside_reasons") or ())
        inside = ours.get("float_ops") or () if floating else ()
        in_float = counted((kind, why) for _, kind, why in inside)
        for where, found in (("outside the delegate", portable), ("float", in_float)):
            lines += [
                f"- {name}, {where}: {count} x `{kind}`: {_shortened(why)}"
                for (kind, why), count in found.items()
            ]
    return ["## What is not integer, and why", "", *lines, ""] if lines else []


def counted(items: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How often each pair occurs; reasons that name other nodes count as one."""
    counts: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for kind, why in items:
        key = first.setdefault((kind, why.split(" ")[0] + why[-20:]), (kind, why))
        counts[key] = counts.get(key, 0) + 1
    return counts


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(form: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else form(value)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(ours: float | None, other: float | None, digits: int = 2) -> str:
    return "-" if ours is None or not other else f"{ours / other:.{digits}f}"


whole = _cell(lambda value: f"{value:,}")


def length(items: list[Any] | None) -> int | None:
    return None if items is None else len(items)
