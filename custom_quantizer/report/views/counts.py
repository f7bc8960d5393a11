"""What is counted, and how: the same in all views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from custom_quantizer.ops.placement import Placement, Tally, tally
from custom_quantizer.report.views.cells import plural
from custom_quantizer.report.views.values import Json


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
        f"{sum(counts):,} {kind} in {plural(len(counts), 'layer')}"
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
