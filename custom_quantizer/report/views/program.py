"""What a reader sees of a ``.pte``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from custom_quantizer.ops.placement import Placement
from custom_quantizer.report.views.cells import (
    COMPUTES,
    TENSOR_COLUMNS,
    bias_scales,
    border_text,
    channel_rows,
    float_biases,
    interval_text,
    node_counts,
    notes_of,
    plural,
    reasons,
    tensor_cells,
    tensor_details,
    widths_of,
)
from custom_quantizer.report.views.counts import bias_sentence, tally_of
from custom_quantizer.report.views.values import Column, Json, Row, View


def program_view(document: Json) -> View:
    """The view of the report of a program."""
    rows: Sequence[Json] = document["rows"]
    ops: Sequence[Json] | None = document["ops"]
    columns = [Column("op", name=True), Column("module", name=True), Column("where")]
    columns += [*TENSOR_COLUMNS, Column("computes"), Column("runs as", name=True)]
    backends: Sequence[str] = document["backends"]
    others = sorted(set(backends) - {"XnnpackBackend"})
    summary = [
        *([] if ops is None else [str(tally_of(document))]),
        bias_sentence(document),
        *bias_scales(rows),
        f"{plural(len(backends), 'delegate')}, "
        f"{plural(len(document['kernels']), 'kernel call')} outside",
        f"{document['size_bytes']:,} bytes, {document['constant_bytes']:,} of them constants",
        node_counts(rows),
    ]
    for role in ("inputs", "outputs"):
        summary += [border_text(role, record) for record in document[role] if record["border"]]
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
        notes = notes_of(
            ("In float, and why", reasons(rows, "float", "name")),
            ("Biases that are float in the file", float_biases(rows, "name")),
        )
    else:
        notes = notes_of(
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
        *tensor_cells(row, row["outputs"]),
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
        ("computes on", f"{COMPUTES[row['compute']]}{why}"),
    ]
    if row["low"] is not None or row["high"] is not None:
        details.append(("clamped to", interval_text(row["low"], row["high"])))
    details += tensor_details(row, row["outputs"])
    names = (row["name"], alias) if alias else (row["name"],)
    headline = f"{row['name']}{_in(row)}"
    return Row(
        names,
        row["compute"],
        tuple(cells),
        headline,
        tuple(details),
        channel_rows(row),
        widths_of(row, row["outputs"]),
    )


def _op_details(op: Json) -> list[tuple[str, str]]:
    why = f": {op['reason']}" if op["reason"] else ""
    return [("op", op["family"]), ("runs as", f"{op['placement']}, {op['backend']}{why}")]


def _unseen(op: Json) -> Row:
    details = (*_op_details(op), ("nodes", "none: nothing in the program stands for it alone"))
    return Row((op["name"],), op["placement"], (), f"{op['name']}{_in(op)}", details)
