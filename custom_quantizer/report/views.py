"""From the JSON of a report to what a reader sees: cells, notes, details, plain text.

Everything here takes the parsed document, so a report that was saved a year ago renders as the
day it was made. :mod:`custom_quantizer.report.html` renders the same :class:`View` as a page.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from custom_quantizer.core.text_table import GAP, limit, table_lines, within
from custom_quantizer.ops.placement import Placement, Tally, tally
from custom_quantizer.report.advice import Advice, findings_by_row, findings_of_inputs, worst_ops

__all__ = [
    "WIDTH",
    "WORST",
    "Column",
    "Row",
    "Table",
    "View",
    "bias_sentence",
    "detail_text",
    "tally_of",
    "text",
    "view_of",
]

WIDTH = 120
"""Columns of a terminal that the text fits in."""

WORST = "Ops that lose most, and what may help"
"""Heading of the list of them."""

_NARROW_NAME, _NARROWEST = 16, 7
_LEGEND = (
    "input, output: type, scale, zero point (z). weight: number of scales (ch). bias: bits its "
    "largest integer needs (b). acc: bits the accumulator needs in the worst case."
)
_BREAK = re.compile(r" |(?<=[^\W_])[._](?=[^\W\d])")
"""Where a cell may be folded: at a space, or behind a separator, but never inside a number."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: heading.
        numeric: stands to the right.
        name: holds identifiers, which are folded before anything else.
        extra: left out of a terminal where the table would not fit; details tell it too.
    """

    title: str
    numeric: bool = False
    name: bool = False
    extra: bool = False


@dataclass(frozen=True)
class Row:
    """One op, ready to show.

    Attributes:
        names: under which a reader may ask for it; the first is its own.
        kind: what it computes on, to filter by.
        cells: of each column, the lines.
        headline: one line that says which op this is.
        details: label and text.
        table: header and rows of its channels; empty without a bias.
        bits: widths of its integers, to filter by: ``a8`` for activations, ``w4`` for the weight.
    """

    names: tuple[str, ...]
    kind: str
    cells: tuple[tuple[str, ...], ...]
    headline: str
    details: tuple[tuple[str, str], ...]
    table: tuple[tuple[str, ...], ...] = ()
    bits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Something that was measured, ready to show.

    Attributes:
        name: what it is: ``accuracy``, ``sensitivity`` or ``search``.
        title: heading.
        rows: headers first.
        lines: sentences below.
    """

    name: str
    title: str
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A whole report, ready to show.

    Attributes:
        title: what it is a report of.
        summary: lines above the table.
        columns: of the table.
        rows: of the table.
        notes: heading and lines below the table.
        unseen: ops that nothing in the table stands for; a reader may ask for them.
        facts: label, value and remark of what a reader wants to know first.
        tables: what was measured of the whole network.
        worst: ops that lose most.
        elsewhere: of ops that are not on integer kernels: where they compute, why, and which.
    """

    title: str
    summary: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    unseen: tuple[Row, ...] = field(default=())
    facts: tuple[tuple[str, str, str], ...] = field(default=())
    tables: tuple[Table, ...] = field(default=())
    worst: tuple[Advice, ...] = field(default=())
    elsewhere: tuple[tuple[str, str, tuple[str, ...]], ...] = field(default=())

    @property
    def bits(self) -> tuple[str, ...]:
        """Widths that occur in rows, activations first, the widest first."""
        found = {bits for row in self.rows for bits in row.bits}
        numbers = {bits: int(bits[1:]) if bits[1:].isdigit() else 99 for bits in found}
        return tuple(sorted(found, key=lambda bits: (bits[0], -numbers[bits])))


def view_of(document: Json) -> View:
    """The view of a parsed report of either kind."""
    return _program_view(document) if document["kind"] == "program" else _graph_view(document)


# ---------------------------------------------------------------------------------------------
# What is counted, and how: the same in all views
# ---------------------------------------------------------------------------------------------


def tally_of(document: Json) -> Tally | None:
    """How many ops of a report compute where; ``None``: it does not say which ops there were."""
    if document["kind"] == "program":
        ops: Sequence[Json] | None = document["ops"]
        if ops is None:
            return None
        return tally((f"{op['method']}.{op['name']}", Placement(op["placement"])) for op in ops)
    return tally(
        (row["written"], Placement(row["placement"]))
        for row in document["rows"]
        if row["placement"] is not None
    )


def bias_sentence(document: Json) -> str:
    """For instance ``biases: 52 int32 in 4 layers; 17 emulated in float above 8 bits in 3 layers``.

    What counts is what the program holds; until there is one, what the graph does.
    """
    layers: dict[str, list[int]] = {"int32": [], _EMULATED: [], "float": []}
    kinds = _kinds_in_program if document["kind"] == "program" else _kinds_in_graph
    for kind, channels in kinds(document):
        layers[kind].append(channels)
    parts = [
        f"{sum(counts):,} {kind} in {_plural(len(counts), 'layer')}"
        for kind, counts in layers.items()
        if counts
    ]
    return f"biases: {'; '.join(parts) or 'none'}"


_EMULATED = "emulated in float above 8 bits"


def _kinds_in_graph(document: Json) -> Iterator[tuple[str, int]]:
    """Of each bias of a converted graph, what becomes of it, and how many channels it has."""
    lowering = document["lowering"]
    for row in document["rows"]:
        bias = row["bias"]
        if bias is None:
            continue
        is_integer = bias["bits"] is not None
        if row["placement"] == Placement.EMULATED.value:
            kind = _EMULATED
        elif is_integer if lowering is None else row["node"] in lowering["integer_biases"]:
            kind = "int32"
        else:
            kind = "float"
        yield kind, bias["channels"]


def _kinds_in_program(document: Json) -> Iterator[tuple[str, int]]:
    """Likewise of a ``.pte``; a bias that only the delegate adds, of zeros, is none."""
    ops = None
    if document["ops"] is not None:
        ops = {(op["method"], op["name"]): op for op in document["ops"]}
    for row in document["rows"]:
        op = None if ops is None else ops.get((row["method"], row["op"]))
        if row["bias"] is None or (ops is not None and (op is None or not op["has_bias"])):
            continue
        if row["bias"]["bits"] is not None:
            kind = "int32"
        elif op is not None and op["placement"] == Placement.EMULATED.value:
            kind = _EMULATED
        else:
            kind = "float"
        yield kind, row["bias"]["channels"]


# ---------------------------------------------------------------------------------------------
# A converted graph
# ---------------------------------------------------------------------------------------------


def _graph_view(document: Json) -> View:
    rows: Sequence[Json] = document["rows"]
    lowering = document["lowering"]
    columns = [Column("node", name=True), Column("module", name=True)]
    columns += [Column("op", name=True, extra=True), Column("scheme", extra=True)]
    columns += [*_TENSOR_COLUMNS, Column("computes")]
    if lowering is not None:
        columns.append(Column("runs as", name=True))
    summary = [str(tally_of(document)), bias_sentence(document), *_bias_scales(rows)]
    if lowering is not None:
        summary.append(
            f"{_plural(lowering['delegates'], 'delegate call')}, "
            f"{_plural(len(lowering['outside']), 'kernel')} outside, "
            f"{lowering['size_bytes']:,} bytes"
        )
    for role in ("inputs", "outputs"):
        summary += [_border(role, record) for record in document[role]]
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
        tables=tuple(_tables(document)),
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


def _border(role: str, record: Json) -> str:
    """An input or output of the model or program."""
    kind = "integer " if record["border"] else ""
    return f"{kind}{role[:-1]} {_tensor(record)}"


def _graph_row(
    row: Json, lowered: bool, found: Mapping[str, tuple[Json | None, Json | None]]
) -> Row:
    op = row["family"] + (f" + {row['fused_family']}" if row["fused_family"] else "")
    node = row["node"] + (f" + {row['fused']}" if row["fused"] else "")
    cells: list[tuple[str, ...]] = [(node,), (row["path"],), (op,), (row["scheme"] or "",)]
    cells += _tensor_cells(row, (row["output"],))
    cells.append((_where(row),))
    if lowered:
        cells.append(((row["backend"] or "").removeprefix("xnnpack "),))
    details = [("op", f"{op} ({row['target']})" if op != row["target"] else op)]
    if row["fused"]:
        details.append(("fused", f"{row['fused']}, {_interval(row['low'], row['high'])}"))
    why = f": {row['reason']}" if row["reason"] else ""
    scheme = f", scheme {row['scheme']}" if row["scheme"] else ""
    details.append(("computes on", f"{_COMPUTES[row['compute']]}{scheme}{why}"))
    if row["written"] not in ("", row["node"]):
        details.append(("part of", row["written"]))
    if row["backend"]:
        reason = f": {row['backend_reason']}" if row["backend_reason"] else ""
        details.append(("runs as", f"{row['backend']}{reason}"))
    details += _tensor_details(row, (row["output"],))
    details += _measured_details(*found.get(row["node"], (None, None)))
    names = (row["node"], row["fused"]) if row["fused"] else (row["node"],)
    headline = f"{row['node']} ({row['path']})" if row["path"] else row["node"]
    return Row(
        names,
        _where(row),
        tuple(cells),
        headline,
        tuple(details),
        _channels(row),
        _bits(row, (row["output"],)),
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
            room = _plural(tensor["bias_headroom"], "bit")
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
            f"{_plural(found['samples'], 'sample')}"
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
        interval = _interval_of(model)
        samples = f"95 % interval {interval}, {_plural(model['samples'], 'sample')}"
        yield "top-1 accuracy", f"{100 * model['top1']:.2f} %", samples
        change = model["against_first"]
        if change is not None:
            first = evaluation["models"][0]["name"]
            yield (
                f"against {first}",
                f"{100 * change['difference']:+.2f} points",
                f"95 % interval {_ends(change)}; "
                + ("cannot be told from noise" if change["is_noise"] else "more than noise"),
            )
    tensors, fidelity = findings.get("tensors"), findings.get("fidelity")
    found: Json = (tensors if tensors and tensors["outputs"] else fidelity) or _NO_OUTPUTS
    ratios = [output["sqnr"] for output in found["outputs"] if output["sqnr"] is not None]
    if ratios:
        which = "the worst output" if len(ratios) > 1 else "the output"
        about = f"{which} against float, {_plural(found['samples'], 'sample')}"
        yield "SQNR", f"{min(ratios):.1f} dB", about
    counted = tally_of(document)
    if counted is not None:
        integer = counted.count(Placement.INTEGER) + counted.count(Placement.TABLE)
        run = counted.total - counted.count(Placement.FOLDED)
        yield "ops on integers", f"{integer} of {run}", str(counted)
    lowering = document["lowering"]
    if lowering is not None:
        delegates = _plural(lowering["delegates"], "delegate call")
        outside = _plural(len(lowering["outside"]), "kernel")
        yield "size", f"{lowering['size_bytes']:,} bytes", f"{delegates}, {outside} outside"


# ---------------------------------------------------------------------------------------------
# What was measured of the whole network
# ---------------------------------------------------------------------------------------------


def _tables(document: Json) -> Iterator[Table]:
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
            cells += [correct, f"{100 * model['top1']:.2f} %", _interval_of(model)]
        change = model["against_first"]
        if change is None:
            cells += ["", "", ""]
        else:
            difference = f"{100 * change['difference']:+.2f}"
            cells += [difference, _ends(change), f"{change['p_value']:.2g}"]
        rows.append(cells)
    lines = (*found["conclusions"], *found["notes"])
    metrics = [
        f"{metric['name']} of {model['name']}: {metric['value']:.5g}"
        for model in found["models"]
        for metric in model["metrics"]
    ]
    return Table("accuracy", "Accuracy", tuple(map(tuple, rows)), (*lines, *metrics))


def _interval_of(model: Json) -> str:
    """Of its top-1 accuracy; older evaluations have none."""
    interval: Sequence[float] | None = model["top1_interval"]
    return (
        "unknown" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"
    )


def _ends(change: Json) -> str:
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
    lines = [f"{what}. {_plural(found['samples'], 'sample')}; ~ marks an estimate"]
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
            f"{_plural(found['held_back'], 'sample')} held back; budget: {budget}",
        ),
    )


def _noise(noise: float | None) -> str:
    return f"{-10 * math.log10(noise):.1f} dB" if noise is not None and noise > 0 else "-"


def _where(row: Json) -> str:
    """Where an op computes, in one or two words: ``integer`` for ``integer kernel``."""
    return str(row["placement"] or row["compute"]).removesuffix(" kernel")


def _graph_notes(rows: Sequence[Json]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    raised = [
        f"{row['node']}: {_raised(row['weight'])}"
        for row in rows
        if row["weight"] is not None and row["weight"]["raised"]
    ]
    backend = [
        f"{row['node']}: {row['backend']}: {row['backend_reason']}"
        for row in rows
        if row["backend_reason"] and row["compute"] != "float"
    ]
    return _notes(
        ("In float, and why", _reasons(rows, "float", "node")),
        ("Quantized at run time", _reasons(rows, "dynamic", "node")),
        ("Biases left in float, and why", _float_biases(rows, "node")),
        ("Weight scales raised so that the bias fits", raised),
        ("What the backend does", backend),
    )


# ---------------------------------------------------------------------------------------------
# A .pte
# ---------------------------------------------------------------------------------------------


def _program_view(document: Json) -> View:
    rows: Sequence[Json] = document["rows"]
    ops: Sequence[Json] | None = document["ops"]
    columns = [Column("op", name=True), Column("module", name=True), Column("where")]
    columns += [*_TENSOR_COLUMNS, Column("computes"), Column("runs as", name=True)]
    backends: Sequence[str] = document["backends"]
    others = sorted(set(backends) - {"XnnpackBackend"})
    summary = [
        *([] if ops is None else [str(tally_of(document))]),
        bias_sentence(document),
        *_bias_scales(rows),
        f"{_plural(len(backends), 'delegate')}, "
        f"{_plural(len(document['kernels']), 'kernel call')} outside",
        f"{document['size_bytes']:,} bytes, {document['constant_bytes']:,} of them constants",
        _node_counts(rows),
    ]
    for role in ("inputs", "outputs"):
        summary += [_border(role, record) for record in document[role] if record["border"]]
    if ops is None:
        why = document["note"] or "the file does not say of which ops it was made"
        summary.append(f"{why}: names below are the delegate's own, not those of a graph")
    if others:
        summary.append(f"not shown: what is inside the delegates of {', '.join(others)}")
    places = {_place(row) for row in rows}
    known = {(op["method"], op["name"]): op for op in ops or ()}
    of_op: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        of_op.setdefault((row["method"], row["op"]), []).append(row)
    kinds = Counter(row["kind"] for row in rows)
    taken = {op["name"] for op in ops or ()}
    shown = [
        _program_row(
            row,
            known.get((row["method"], row["op"])),
            of_op[row["method"], row["op"]],
            len(places) > 1,
            row["kind"] if kinds[row["kind"]] == 1 and row["kind"] not in taken else "",
        )
        for row in rows
    ]
    if ops is None:
        notes = _notes(
            ("In float, and why", _reasons(rows, "float", "name")),
            ("Biases that are float in the file", _float_biases(rows, "name")),
        )
    else:
        notes = _notes(
            (
                "Not on integer kernels, and why",
                [
                    f"{op['name']}{_in(op)}: {op['placement']}: {op['reason']}"
                    for op in ops
                    if op["placement"] != Placement.INTEGER.value
                ],
            ),
        )
    return View(
        "ExecuTorch program",
        tuple(summary),
        tuple(columns),
        tuple(shown),
        notes,
        tuple(_unseen(op) for key, op in known.items() if key not in of_op),
    )


def _in(op: Json) -> str:
    return f" ({op['path']})" if op["path"] else ""


def _place(row: Json) -> str:
    where = "outside" if row["delegate"] is None else f"delegate {row['delegate']}"
    return where if row["method"] == "forward" else f"{row['method']}, {where}"


def _program_row(
    row: Json, op: Json | None, nodes: Sequence[Json], with_place: bool, alias: str
) -> Row:
    is_main = op is not None and "/" not in row["name"]
    cells: list[tuple[str, ...]] = [(row["name"],), (row["path"],)]
    cells += [
        (_place(row),) if with_place else (),
        *_tensor_cells(row, row["outputs"]),
        (row["compute"],),
    ]
    cells.append((op["backend"].removeprefix("xnnpack "),) if op is not None and is_main else ())
    why = f": {row['reason']}" if row["reason"] else ""
    details = [] if op is None else _op_details(op)
    if is_main and len(nodes) > 1:
        details.append(("nodes", ", ".join(node["name"] for node in nodes)))
    details += [
        ("kind", row["kind"]),
        ("where", f"method {row['method']}, {_place(row)}"),
        ("computes on", f"{_COMPUTES[row['compute']]}{why}"),
    ]
    if row["low"] is not None or row["high"] is not None:
        details.append(("clamped to", _interval(row["low"], row["high"])))
    details += _tensor_details(row, row["outputs"])
    names = (row["name"], alias) if alias else (row["name"],)
    headline = f"{row['name']}{_in(row)}"
    return Row(
        names,
        row["compute"],
        tuple(cells),
        headline,
        tuple(details),
        _channels(row),
        _bits(row, row["outputs"]),
    )


def _op_details(op: Json) -> list[tuple[str, str]]:
    why = f": {op['reason']}" if op["reason"] else ""
    return [("op", op["family"]), ("runs as", f"{op['placement']}, {op['backend']}{why}")]


def _unseen(op: Json) -> Row:
    details = (*_op_details(op), ("nodes", "none: nothing in the program stands for it alone"))
    return Row((op["name"],), op["placement"], (), f"{op['name']}{_in(op)}", details)


# ---------------------------------------------------------------------------------------------
# What both have
# ---------------------------------------------------------------------------------------------

_COMPUTES = {
    "integer": "integers",
    "dynamic": "integers with scales chosen at run time",
    "float": "float",
    "convert": "float on one side and integers on the other",
}
_TENSOR_COLUMNS = (
    Column("input"),
    Column("weight"),
    Column("bias"),
    Column("output"),
    Column("acc", numeric=True),
)
_MOST_LINES = 3


def _node_counts(rows: Sequence[Json]) -> str:
    """``14 calls and nodes: 12 integer, 2 float``."""
    counts = [(kind, sum(row["compute"] == kind for row in rows)) for kind in _COMPUTES]
    shown = ", ".join(f"{count} {kind}" for kind, count in counts if count)
    return f"{_plural(len(rows), 'node')} of delegates and calls: {shown}" if rows else "no nodes"


def _bias_scales(rows: Sequence[Json]) -> list[str]:
    """What is known of the scales of integer biases, of those that are no emulation."""
    integer = [
        row["bias"]
        for row in rows
        if row["bias"] is not None
        and row["bias"]["bits"] is not None
        and row.get("placement") != Placement.EMULATED.value
    ]
    if not integer:
        return []
    proven = sum(bias["derived"] is True for bias in integer)
    used = max(bias["bits_used"] for bias in integer)
    which = "with" if proven == len(integer) else f"{proven} with"
    return [
        f"{_plural(len(integer), 'integer bias', 'integer biases')}, {which} scale = input scale x "
        f"weight scale bit for bit; the largest needs {_plural(used, 'bit')}"
    ]


def _tensor_cells(row: Json, outputs: Sequence[Json]) -> list[tuple[str, ...]]:
    weight, bias, acc = row["weight"], row["bias"], row["accumulator_bits"]
    return [
        _activation_cell(row["inputs"]),
        () if weight is None else (_weight_cell(weight),),
        () if bias is None else (_bias_cell(bias),),
        _activation_cell(outputs),
        () if acc is None else (str(acc),),
    ]


def _bits(row: Json, outputs: Sequence[Json]) -> tuple[str, ...]:
    """Widths to filter by, the widest first; ``float`` where a tensor is no integers."""
    activations = {record["bits"] for record in (*row["inputs"], *outputs)}
    weight = set() if row["weight"] is None else {row["weight"]["bits"]}
    return tuple(
        f"{letter}{bits}" if bits is not None else f"{letter} float"
        for letter, widths in (("a", activations), ("w", weight))
        for bits in sorted(widths, key=lambda b: -math.inf if b is None else -b)
    )


def _activation_cell(records: Sequence[Json]) -> tuple[str, ...]:
    lines = [_brief(record) for record in records]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"and {len(lines) - _MOST_LINES + 1} more"]
    return tuple(lines)


def _brief(record: Json) -> str:
    if record["dynamic"]:
        return f"{_integers(record)} run time"
    if record["scale_max"] is None:
        return str(record["dtype"])
    return f"{_integers(record)} {record['scale_max']:.4g} z{record['zero_point']}"


def _weight_cell(record: Json) -> str:
    if record["granularity"] in (None, "per_tensor"):
        return _integers(record)
    group = f" g{record['group_size']}" if record["group_size"] else ""
    return f"{_integers(record)} {record['channels']}ch{group}"


def _bias_cell(record: Json) -> str:
    if record["bits"] is None:
        return str(record["dtype"])
    return f"int{record['bits']} {record['bits_used']}b"


def _integers(record: Json) -> str:
    """``int4`` for integers of 4 bits, wherever they are stored."""
    if record["bits"] is None:
        return str(record["dtype"])
    sign = "u" if str(record["dtype"]).startswith("u") else ""
    return f"{sign}int{record['bits']}"


def _tensor_details(row: Json, outputs: Sequence[Json]) -> list[tuple[str, str]]:
    details = [("input", _tensor(record)) for record in row["inputs"]]
    if row["weight"] is not None:
        details.append(("weight", _tensor(row["weight"])))
        if row["weight"]["raised"]:
            details.append(("raised", _raised(row["weight"])))
    if row["bias"] is not None:
        details.append(("bias", _bias(row["bias"])))
    details += [("output", _tensor(record)) for record in outputs]
    if row["accumulator_bits"] is not None:
        details.append(("accumulator", f"{row['accumulator_bits']} bits in the worst case"))
    return details


def _tensor(record: Json) -> str:
    """All of a tensor in one sentence."""
    shape = f"[{', '.join(str(size) for size in record['shape'])}]"
    name = f"{record['source']} " if record["source"] else ""
    if record["bits"] is None:
        return f"{name}{record['dtype']}{shape}"
    stored = _integers(record)
    if stored != record["dtype"]:
        stored += f" stored as {record['dtype']}"
    limits = f"integers in [{record['quant_min']}, {record['quant_max']}]"
    if record["dynamic"]:
        return f"{name}{stored}{shape}, scale and zero point chosen at run time, {limits}"
    if record["scale_max"] is None:
        return f"{name}{stored}{shape}"
    low, high = record["scale_min"], record["scale_max"]
    if record["granularity"] == "per_tensor":
        scale = f"scale {_float(high)}"
    else:
        each = "channel" if record["granularity"] == "per_channel" else "group"
        size = f" of {record['group_size']}" if record["group_size"] else ""
        axis = "" if record["axis"] is None else f" of axis {record['axis']}"
        scale = (
            f"one scale per {each}{size} ({_plural(record['channels'], 'channel')}{axis}), "
            f"{_float(low)} to {_float(high)}"
        )
    reals = f"[{record['real_min']:.6g}, {record['real_max']:.6g}]"
    return f"{name}{stored}{shape}, {scale}, zero point {record['zero_point']}, {limits} = {reals}"


def _bias(record: Json) -> str:
    where = f"{record['source']} {record['dtype']}[{record['channels']}]"
    if record["bits"] is None:
        return f"{where}: {record['reason']}" if record["reason"] else where
    stored = f" of {record['bits']} bits" if record["bits"] != 32 else ""
    shift = f" x 2**{record['shift']} at most" if record["shift"] else ""
    product = f"input scale x weight scale{shift}"
    scale = {
        True: f"scale = {product}, bit for bit",
        False: f"scale is NOT {product}",
        None: "no product of scales to compare with",
    }[record["derived"]]
    limit = f", limit {record['limit']:,}" if record["limit"] is not None else ""
    return (
        f"{where}{stored}, {scale}; integers from {record['minimum']:,} to "
        f"{record['maximum']:,}, {record['bits_used']} of {record['bits']} bits used{limit}"
    )


def _raised(weight: Json) -> str:
    raised = weight["raised"]
    shown = ", ".join(f"channel {channel} x {factor:.4g}" for channel, factor in raised[:4])
    more = f" and {len(raised) - 4} more" if len(raised) > 4 else ""
    total = weight["channels"] or 1
    return f"{len(raised)} of {_plural(total, 'weight scale')} raised: {shown}{more}"


def _channels(row: Json) -> tuple[tuple[str, ...], ...]:
    """The bias channel by channel: ``real = integer x scale``."""
    bias = row["bias"]
    if bias is None or bias["bits"] is None:
        return ()
    integers, scales = bias["integers"], bias["scales"]
    weight = () if row["weight"] is None else row["weight"]["scales"]
    factors = {} if row["weight"] is None else dict(row["weight"]["raised"])
    header = ["channel", "weight scale", "bias scale", f"int{bias['bits']}", "as float"]
    lines = [tuple([*header, "scale raised"] if factors else header)]
    for channel, integer in enumerate(integers):
        scale = scales[channel % len(scales)]
        # A grouped transposed convolution uses each weight scale once a group.
        of_weight = _float(weight[channel % len(weight)]) if weight else ""
        cells = [str(channel), of_weight, _float(scale), str(integer), f"{integer * scale:.6g}"]
        if factors:
            factor = factors.get(channel % len(weight))
            cells.append("" if factor is None else f"x {factor:.4g}")
        lines.append(tuple(cells))
    return tuple(lines)


def _interval(low: float | None, high: float | None) -> str:
    left = "(-inf" if low is None else f"[{low:.6g}"
    right = "inf)" if high is None else f"{high:.6g}]"
    return f"real values in {left}, {right}"


def _reasons(rows: Iterable[Json], compute: str, name: str) -> list[str]:
    return [f"{row[name]}: {row['reason']}" for row in rows if row["compute"] == compute]


def _float_biases(rows: Iterable[Json], name: str) -> list[str]:
    return [
        f"{row[name]}: {row['bias']['reason']}"
        for row in rows
        if row["bias"] is not None and row["bias"]["bits"] is None
    ]


def _notes(*notes: tuple[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((heading, tuple(lines)) for heading, lines in notes if lines)


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _float(value: float) -> str:
    """Nine digits: enough to tell any two float32 apart."""
    return f"{value:.9g}"


# ---------------------------------------------------------------------------------------------
# Plain text
# ---------------------------------------------------------------------------------------------


def text(view: View) -> str:
    """The view as plain text, no line longer than ``WIDTH`` and than the terminal."""
    lines = [line for entry in view.summary for line in _wrapped(entry)]
    lines += ["", *_table(view), "", *_wrapped(_LEGEND)]
    for table in view.tables:
        lines += ["", f"{table.title}:", *_indented(table.rows)]
        for entry in table.lines:
            lines += _wrapped(entry, "  ")
    if view.worst:
        lines += ["", f"{WORST}:"]
        for advice in view.worst:
            lines += _wrapped(f"{advice.where}: {advice.how_much}; {advice.why}", "  ")
            for way in advice.what:
                lines += _wrapped(way, "    - ")
    for heading, entries in view.notes:
        lines += ["", f"{heading}:"]
        for entry in entries:
            lines += _wrapped(entry, "  ")
    return "\n".join(lines)


def detail_text(row: Row) -> str:
    """One op as plain text, channel by channel."""
    lines = _wrapped(row.headline)
    label_width = max(len(label) for label, _ in row.details)
    for label, value in row.details:
        lines += _wrapped(value, f"  {label.ljust(label_width)}  ")
    if row.table:
        lines += ["", *_indented(row.table, left=())]
    return "\n".join(lines)


def _indented(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    room = limit()
    with within(None if room is None else room - len(GAP)):
        return [f"{GAP}{line}".rstrip() for line in table_lines(rows, left)]


def _wrapped(entry: str, prefix: str = "") -> list[str]:
    """The entry behind a prefix, further lines indented below it."""
    return textwrap.wrap(
        entry,
        min(WIDTH, limit() or WIDTH),
        initial_indent=prefix,
        subsequent_indent=" " * (len(prefix) or 2),
        break_long_words=limit() is None,
    ) or [prefix.rstrip()]


def _table(view: View) -> list[str]:
    # Columns that nothing stands in are left out.
    kept = [i for i in range(len(view.columns)) if any(any(row.cells[i]) for row in view.rows)]
    left = [i for i, k in enumerate(kept) if not view.columns[k].numeric]
    width = {i: _natural_width(view, i) for i in kept}
    if _total(width.values()) > (limit() or WIDTH) and limit() is not None:
        plain = [[view.columns[i].title for i in kept]]
        plain += [[", ".join(filter(None, row.cells[i])) for i in kept] for row in view.rows]
        return table_lines(plain, left)
    for i in list(kept):
        if view.columns[i].extra and _total(width[k] for k in kept) > WIDTH:
            kept.remove(i)
    columns = [view.columns[i] for i in kept]
    widths = [width[i] for i in kept]
    _narrow(widths, [i for i, column in enumerate(columns) if column.name], _NARROW_NAME)
    _narrow(widths, list(range(len(widths))), _NARROWEST)
    rows = _folded([(column.title,) for column in columns], widths)
    rows.append(["-" * width for width in widths])
    for row in view.rows:
        rows += _folded([row.cells[i] for i in kept], widths)
    return table_lines(rows, left=[i for i, column in enumerate(columns) if not column.numeric])


def _natural_width(view: View, column: int) -> int:
    lines = (line for row in view.rows for line in row.cells[column])
    return max([len(view.columns[column].title), *map(len, lines)])


def _total(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + len(GAP) * (len(each) - 1)


def _narrow(widths: list[int], columns: Sequence[int], least: int) -> None:
    """Take from the widest of ``columns`` until the table fits or all are down to ``least``."""
    while columns and _total(widths) > WIDTH:
        widest = max(columns, key=lambda i: widths[i])
        if widths[widest] <= least:
            return
        widths[widest] -= 1


def _folded(cells: Sequence[tuple[str, ...]], widths: Sequence[int]) -> list[list[str]]:
    """The lines that a row takes once its cells are folded to ``widths``, cell by cell."""
    columns = [
        [part for line in cell for part in _fold(line, width)]
        for cell, width in zip(cells, widths, strict=True)
    ]
    height = max([1, *map(len, columns)])
    padded = [[*column, *[""] * (height - len(column))] for column in columns]
    return [list(line) for line in zip(*padded, strict=True)]


def _fold(line: str, width: int) -> list[str]:
    """Cut a line into parts of at most ``width``, where a word or part of a name ends."""
    parts = []
    while len(line) > width:
        ends = [match.end() for match in _BREAK.finditer(line) if match.start() <= width]
        fitting = [end for end in ends if len(line[:end].rstrip()) <= width]
        at = fitting[-1] if fitting else width
        parts.append(line[:at].rstrip())
        line = line[at:]
    return [*parts, line]
