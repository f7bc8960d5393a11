"""What a reader sees of a converted graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from custom_quantizer.ops.placement import Placement
from custom_quantizer.report.advice import findings_by_row, findings_of_inputs, worst_ops
from custom_quantizer.report.views.cells import (
    COMPUTES,
    TENSOR_COLUMNS,
    bias_scales,
    border_text,
    channel_rows,
    float_biases,
    interval_text,
    notes_of,
    plural,
    raised_text,
    reasons,
    tensor_cells,
    tensor_details,
    where_computed,
    widths_of,
)
from custom_quantizer.report.views.counts import bias_sentence, tally_of
from custom_quantizer.report.views.measured import difference_ends, interval_of, measured_tables
from custom_quantizer.report.views.values import Column, Json, Row, View


def graph_view(document: Json) -> View:
    """The view of the report of a converted graph."""
    rows: Sequence[Json] = document["rows"]
    lowering = document["lowering"]
    columns = [Column("node", name=True), Column("module", name=True)]
    columns += [Column("op", name=True, extra=True), Column("scheme", extra=True)]
    columns += [*TENSOR_COLUMNS, Column("computes")]
    if lowering is not None:
        columns.append(Column("runs as", name=True))
    summary = [str(tally_of(document)), bias_sentence(document), *bias_scales(rows)]
    if lowering is not None:
        summary.append(
            f"{plural(lowering['delegates'], 'delegate call')}, "
            f"{plural(len(lowering['outside']), 'kernel')} outside, "
            f"{lowering['size_bytes']:,} bytes"
        )
    for role in ("inputs", "outputs"):
        summary += [border_text(role, record) for record in document[role]]
    for tensor in findings_of_inputs(document):
        said = "; ".join(f"{label} {value}" for label, value in _measured_details(tensor, None))
        summary.append(f"input {tensor['name']}: {said}")
    summary += _outputs_measured(document)
    found = findings_by_row(document)
    return View(
        "Converted graph",
        tuple(summary),
        tuple(columns),
        tuple(_graph_row(row, lowering is not None, found) for row in rows),
        _graph_notes(rows),
        facts=tuple(_facts(document)),
        tables=tuple(measured_tables(document)),
        worst=worst_ops(document),
        elsewhere=_elsewhere(document),
    )


def _elsewhere(document: Json) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in document["rows"]:
        if row["placement"] not in (None, Placement.INTEGER.value, Placement.FOLDED.value):
            # The reason of an op that is integers in the graph is the rule that made it so.
            own = row["reason"] if row["compute"] == "float" else ""
            why = row["backend_reason"] or own or "expected; it was not lowered"
            found.setdefault((row["placement"], why), []).append(row["node"])
    return tuple((place, why, tuple(names)) for (place, why), names in found.items())


def _graph_row(
    row: Json, lowered: bool, found: Mapping[str, tuple[Json | None, Json | None]]
) -> Row:
    op = row["family"] + (f" + {row['fused_family']}" if row["fused_family"] else "")
    node = row["node"] + (f" + {row['fused']}" if row["fused"] else "")
    cells: list[tuple[str, ...]] = [(node,), (row["path"],), (op,), (row["scheme"] or "",)]
    cells += tensor_cells(row, (row["output"],))
    cells.append((where_computed(row),))
    if lowered:
        cells.append(((row["backend"] or "").removeprefix("xnnpack "),))
    details = [("op", f"{op} ({row['target']})" if op != row["target"] else op)]
    if row["fused"]:
        details.append(("fused", f"{row['fused']}, {interval_text(row['low'], row['high'])}"))
    why = f": {row['reason']}" if row["reason"] else ""
    scheme = f", scheme {row['scheme']}" if row["scheme"] else ""
    details.append(("computes on", f"{COMPUTES[row['compute']]}{scheme}{why}"))
    if row["written"] not in ("", row["node"]):
        details.append(("part of", row["written"]))
    if row["backend"]:
        reason = f": {row['backend_reason']}" if row["backend_reason"] else ""
        details.append(("runs as", f"{row['backend']}{reason}"))
    details += tensor_details(row, (row["output"],))
    details += _measured_details(*found.get(row["node"], (None, None)))
    names = (row["node"], row["fused"]) if row["fused"] else (row["node"],)
    headline = f"{row['node']} ({row['path']})" if row["path"] else row["node"]
    return Row(
        names,
        where_computed(row),
        tuple(cells),
        headline,
        tuple(details),
        channel_rows(row),
        widths_of(row, (row["output"],)),
    )


def _measured_details(tensor: Json | None, weight: Json | None) -> Iterator[tuple[str, str]]:
    if tensor is not None:
        if tensor["low"] is not None and tensor["high"] is not None:
            cut = [tensor["clipped_low"], tensor["clipped_high"]]
            text = f"{tensor['low']:.5g} to {tensor['high']:.5g}"
            if any(cut):
                text += f", cut off {_percent(cut[0])} below and {_percent(cut[1])} above"
            if tensor["used_levels"] is not None:
                text += f", {tensor['used_levels']:,} of {tensor['levels']:,} integers occur"
            yield "values", text
        if tensor["sqnr"] is not None:
            alone = "" if tensor["alone"] is None else f", {tensor['alone']:.1f} dB alone"
            yield "SQNR", f"{tensor['sqnr']:.1f} dB with all before it{alone}"
        if tensor["bias_headroom"] is not None:
            room = plural(tensor["bias_headroom"], "bit")
            yield "headroom", f"{room} between the largest bias and the end of int32"
    if weight is not None and weight["sqnr"] is not None:
        worst = weight["worst_channel_sqnr"]
        text = "" if worst is None else f", {worst:.1f} dB in channel {weight['worst_channel']}"
        yield "weight SQNR", f"{weight['sqnr']:.1f} dB{text}"


def _percent(share: float) -> str:
    """Two digits, and zero only where there is nothing."""
    return f"{100 * share:.2g} %"


_NO_OUTPUTS: Json = {"outputs": (), "samples": 0}


def _outputs_measured(document: Json) -> Iterator[str]:
    findings = document.get("findings") or {}
    tensors, fidelity = findings.get("tensors"), findings.get("fidelity")
    found: Json = (tensors if tensors and tensors["outputs"] else fidelity) or _NO_OUTPUTS
    names = {} if fidelity is None else {o["index"]: o["name"] for o in fidelity["outputs"]}
    for output in found["outputs"]:
        known = output["name"] or names.get(output["index"])
        name = f" ({known})" if known else ""
        ratio = "no error" if output["sqnr"] is None else f"SQNR {output['sqnr']:.1f} dB"
        rounding = output["rounding_sqnr"]
        more = "" if rounding is None else f", {rounding:.1f} dB by rounding alone"
        yield (
            f"output {output['index']}{name}: {ratio} against the float model{more}, on "
            f"{plural(found['samples'], 'sample')}"
        )
    if fidelity is not None:
        yield from (f"warning: {warning}" for warning in fidelity["warnings"])


def _facts(document: Json) -> Iterator[tuple[str, str, str]]:
    """What stands first: accuracy, error, size, integers."""
    findings = document.get("findings") or {}
    evaluation = findings.get("evaluation")
    if evaluation is None or evaluation["models"][-1]["top1"] is None:
        yield "accuracy", "not measured", "report OUT.pte --data DATA with labels measures it"
    else:
        model = evaluation["models"][-1]
        interval = interval_of(model)
        samples = f"95 % interval {interval}, {plural(model['samples'], 'sample')}"
        yield "top-1 accuracy", f"{100 * model['top1']:.2f} %", samples
        change = model["against_first"]
        if change is not None:
            first = evaluation["models"][0]["name"]
            yield (
                f"against {first}",
                f"{100 * change['difference']:+.2f} points",
                f"95 % interval {difference_ends(change)}; "
                + ("cannot be told from noise" if change["is_noise"] else "more than noise"),
            )
    tensors, fidelity = findings.get("tensors"), findings.get("fidelity")
    found: Json = (tensors if tensors and tensors["outputs"] else fidelity) or _NO_OUTPUTS
    ratios = [output["sqnr"] for output in found["outputs"] if output["sqnr"] is not None]
    if ratios:
        which = "the worst output" if len(ratios) > 1 else "the output"
        about = f"{which} against float, {plural(found['samples'], 'sample')}"
        yield "SQNR", f"{min(ratios):.1f} dB", about
    counted = tally_of(document)
    if counted is not None:
        integer = counted.count(Placement.INTEGER) + counted.count(Placement.TABLE)
        run = counted.total - counted.count(Placement.FOLDED)
        yield "ops on integers", f"{integer} of {run}", str(counted)
    lowering = document["lowering"]
    if lowering is not None:
        delegates = plural(lowering["delegates"], "delegate call")
        outside = plural(len(lowering["outside"]), "kernel")
        yield "size", f"{lowering['size_bytes']:,} bytes", f"{delegates}, {outside} outside"


def _graph_notes(rows: Sequence[Json]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    raised = [
        f"{row['node']}: {raised_text(row['weight'])}"
        for row in rows
        if row["weight"] is not None and row["weight"]["raised"]
    ]
    backend = [
        f"{row['node']}: {row['backend']}: {row['backend_reason']}"
        for row in rows
        if row["backend_reason"] and row["compute"] != "float"
    ]
    return notes_of(
        ("In float, and why", reasons(rows, "float", "node")),
        ("Quantized at run time", reasons(rows, "dynamic", "node")),
        ("Biases left in float, and why", float_biases(rows, "node")),
        ("Weight scales raised so that the bias fits", raised),
        ("What the backend does", backend),
    )
