"""Tables of what was measured of a whole network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from custom_quantizer.report.views.cells import plural
from custom_quantizer.report.views.values import Json, Table


def measured_tables(document: Json) -> Iterator[Table]:
    """A table for each thing that was measured of the whole network."""
    findings = document.get("findings") or {}
    if findings.get("evaluation"):
        yield _accuracy(findings["evaluation"])
    if findings.get("sensitivity"):
        yield _sensitivity(findings["sensitivity"])
    if findings.get("search"):
        yield _search(findings["search"])


def _accuracy(found: Json) -> Table:
    first = found["models"][0]["name"]
    rows = [["model", "correct", "top-1", "95 % interval", f"less {first}", "95 % interval", "p"]]
    for model in found["models"]:
        cells = [model["name"]]
        if model["top1"] is None or model["correct"] is None:
            agreeing = model["agreeing"]
            agrees = "" if agreeing is None else f"{agreeing:,} of {model['samples']:,} agree"
            cells += [agrees, "", ""]
        else:
            correct = f"{model['correct']:,} of {model['samples']:,}"
            cells += [correct, f"{100 * model['top1']:.2f} %", interval_of(model)]
        change = model["against_first"]
        if change is None:
            cells += ["", "", ""]
        else:
            difference = f"{100 * change['difference']:+.2f}"
            cells += [difference, difference_ends(change), f"{change['p_value']:.2g}"]
        rows.append(cells)
    lines = (*found["conclusions"], *found["notes"])
    metrics = [
        f"{metric['name']} of {model['name']}: {metric['value']:.5g}"
        for model in found["models"]
        for metric in model["metrics"]
    ]
    return Table("accuracy", "Accuracy", tuple(map(tuple, rows)), (*lines, *metrics))


def interval_of(model: Json) -> str:
    """Of its top-1 accuracy; older evaluations have none."""
    interval: Sequence[float] | None = model["top1_interval"]
    return (
        "unknown" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"
    )


def difference_ends(change: Json) -> str:
    """Of the interval of a difference of shares, in points."""
    ends = (
        "open" if end is None else f"{100 * end:+.2f}" for end in (change["low"], change["high"])
    )
    return " to ".join(ends)


def _sensitivity(found: Json) -> Table:
    losses = found["losses"]
    widths: dict[str, list[str]] = {"weight": [], "activation": []}
    for loss in losses:
        if loss["width"] not in widths[loss["kind"]]:
            widths[loss["kind"]].append(loss["width"])
    columns = [(kind, width) for kind, found_widths in widths.items() for width in found_widths]
    cells = {(loss["name"], loss["kind"], loss["width"]): loss for loss in losses}
    rows = [("of", "module", *(width for _, width in columns))]
    for name, kind, path in dict.fromkeys((x["name"], x["kind"], x["path"]) for x in losses):
        texts = [
            _loss(cells.get((name, kind, width))) if of == kind else "" for of, width in columns
        ]
        rows.append((f"{kind} {name}", path, *texts))
    what = (
        "SQNR of the outputs in dB when one value alone is rounded; the lowest lose most"
        if found["metric"] is None
        else f"fall of {found['metric']} when one value alone is rounded"
    )
    ranks = [
        f"{name} {value:.2f}" for name, value in found["correlation"].items() if value is not None
    ]
    lines = [f"{what}. {plural(found['samples'], 'sample')}; ~ marks an estimate"]
    if ranks:
        lines.append(f"rank correlation of estimates and true losses: {', '.join(ranks)}")
    return Table("sensitivity", "Sensitivity", tuple(rows), tuple(lines))


def _loss(loss: Json | None) -> str:
    if loss is None:
        return ""
    if loss["metric"] is not None:
        return f"{loss['metric']:.4g}"
    noise, mark = (loss["noise"], "") if loss["noise"] is not None else (loss["estimate"], "~")
    return f"{mark}{-10 * math.log10(noise):.1f}" if noise else "exact"


def _search(found: Json) -> Table:
    cost, base = found["cost"], found["base"]
    rows = [("choice", cost, "SQNR", "predicted", "top-1", "")]
    whole = base["costs"].get(cost) or 1.0
    for point in found["points"]:
        measured = point["measured"]
        top1 = measured["top1"]
        mark = "taken" if point["name"] == found["best"] else ""
        if not point["in_budget"]:
            mark = "over the budget"
        rows.append(
            (
                point["name"],
                f"{point['costs'][cost] / whole:.3f}" if cost in point["costs"] else "-",
                _noise(measured["noise"]),
                _noise(point["predicted"]),
                "" if top1 is None else f"{100 * top1:.2f} %",
                mark,
            )
        )
    budget = ", ".join(f"{key} {value:g}" for key, value in found["budget"].items())
    return Table(
        "search",
        "Choices of widths",
        tuple(rows),
        (
            f"{cost} as a share of {base['scheme']} everywhere; measured on "
            f"{plural(found['held_back'], 'sample')} held back; budget: {budget}",
        ),
    )


def _noise(noise: float | None) -> str:
    return f"{-10 * math.log10(noise):.1f} dB" if noise is not None and noise > 0 else "-"
