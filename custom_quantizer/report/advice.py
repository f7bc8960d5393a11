"""Which ops lose most, what they lose it by, and what to do about each.

Errors of independent sources add up in power. So the SQNR of an op that is quantized alone and that
of its weight tell which part of the op's error its weight makes; what is left is the rounding of
its result, and what is cut off there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from custom_quantizer.ops.placement import Placement

__all__ = ["Advice", "findings_by_row", "findings_of_inputs", "worst_ops"]

Json = Mapping[str, Any]

_CLIPPED = 1e-3
"""Share of values cut off that is worth a word."""

_DEAD = 0.25
"""Share of integers at the ends of a range that never occur, likewise: 0.4 bits."""

_UNEVEN_DB = 12.0
"""How far below the whole weight its worst channel may be: two bits."""


@dataclass(frozen=True)
class Advice:
    """One op that loses precision.

    Attributes:
        op: row of the report.
        where: name and module of the op.
        how_much: is lost.
        why: what the error is made of.
        what: what may help, one way an entry.
    """

    op: str
    where: str
    how_much: str
    why: str
    what: tuple[str, ...]


def findings_by_row(document: Json) -> dict[str, tuple[Json | None, Json | None]]:
    """What was measured of each row's result and of its weight, by the name of its node."""
    found = (document.get("findings") or {}).get("tensors")
    if not found:
        return {}
    tensors = _by_format(found)
    weights = {weight["name"]: weight for weight in found["weights"]}
    return {
        row["node"]: (tensors.get(_format(row["output"])), weights.get(row["node"]))
        for row in document["rows"]
    }


def findings_of_inputs(document: Json) -> list[Json]:
    """What was measured of the inputs of the model, which no row computes."""
    found = (document.get("findings") or {}).get("tensors")
    tensors = _by_format(found) if found else {}
    measured = [tensors.get(_format(record)) for record in document["inputs"]]
    return [tensor for tensor in measured if tensor is not None]


def _by_format(found: Json) -> dict[tuple[object, ...], Json]:
    """One tensor may be stored in several formats, which were measured apart."""
    return {(t["name"], t["bits"], t["scale"], t["zero_point"]): t for t in found["tensors"]}


def _format(record: Json) -> tuple[object, ...]:
    scale = record["scales"][0] if len(record["scales"]) == 1 else None
    return record["source"], record["bits"], scale, record["zero_point"]


def worst_ops(document: Json, count: int = 5) -> tuple[Advice, ...]:
    """The ops with the lowest SQNR when they alone are quantized, the worst first.

    Args:
        document: a report of a converted graph; nothing is known without a diagnosis in it.
        count: how many at most.
    """
    found = findings_by_row(document)
    measured = [
        (tensor["alone"], row, tensor, weight)
        for row in document["rows"]
        for tensor, weight in [found.get(row["node"], (None, None))]
        if row["placement"] is not None and tensor is not None and tensor["alone"] is not None
    ]
    measured.sort(key=lambda entry: entry[0])
    losses = _losses(document)
    return tuple(
        _advice(row, tensor, weight, losses.get((row["node"], weight["bits"])) if weight else None)
        for _, row, tensor, weight in measured[:count]
    )


def _losses(document: Json) -> dict[tuple[str, int], float]:
    """SQNR of the outputs with one weight alone rounded, by op and bits, as far as it is known."""
    found = (document.get("findings") or {}).get("sensitivity")
    return {
        (loss["name"], int(loss["width"][1:])): -10 * math.log10(loss["noise"])
        for loss in (found["losses"] if found else ())
        if loss["kind"] == "weight" and loss["noise"] and loss["width"][1:].isdigit()
    }


def _advice(row: Json, tensor: Json, weight: Json | None, outputs: float | None) -> Advice:
    """The advice for an op; ``outputs`` is what a sensitivity says of its weight."""
    alone = tensor["alone"]
    where = f"{row['node']} ({row['path']})" if row["path"] else row["node"]
    after = "" if tensor["sqnr"] is None else f", {tensor['sqnr']:.1f} dB with all before it"
    share = _share_of_weight(weight, alone)
    if weight is not None and share is not None and share >= 0.5:
        why = (
            f"most of that comes from its weight of {weight['bits']} bits, which by itself has "
            f"{weight['sqnr']:.1f} dB, {_db(weight['worst_channel_sqnr'])} in channel "
            f"{weight['worst_channel']}"
        )
        if outputs is not None:
            why += f"; the outputs keep {outputs:.1f} dB with this weight alone rounded"
        what = _for_weight(row, weight)
    else:
        why = f"most of that is its result, rounded to {_integers(tensor)}"
        what = _for_result(row, tensor)
    clipped = tensor["clipped_low"] + tensor["clipped_high"]
    if clipped >= _CLIPPED:
        why += f"; {100 * clipped:.2g} % of its values are cut off"
        what = (
            "values are cut off: calibrate with data like these, or choose an observer that keeps "
            "more (minmax keeps all)",
            *what,
        )
    if row["accumulator_bits"] is not None and row["accumulator_bits"] > 32:
        what = (*what, "its accumulator may need more than 32 bits: give it fewer")
    return Advice(row["node"], where, f"{alone:.1f} dB alone{after}", why, what)


def _share_of_weight(weight: Json | None, alone: float) -> float | None:
    """Which part of the power of an op's error its weight makes, about 0 to 1."""
    if weight is None or weight["sqnr"] is None:
        return None
    return float(min(10 ** ((alone - weight["sqnr"]) / 10), 1.0))


def _for_weight(row: Json, weight: Json) -> tuple[str, ...]:
    what = []
    if weight["bits"] < 8:
        scheme = f"a{row['output']['bits'] or 8}w8"
        what.append(f"more bits: {_rule(row, scheme)}")
        what.append("better rounding at the same width: --accuracy best")
    elif weight["granularity"] == "per_tensor":
        what.append("one scale for each channel, which schemes such as a8w8 have")
    worst = weight["worst_channel_sqnr"]
    if worst is not None and weight["sqnr"] - worst > _UNEVEN_DB:
        what.append("channels of one range: --improve equalization")
    return tuple(what) or ("keep it in float if nothing else helps: " + _rule(row, None),)


def _for_result(row: Json, tensor: Json) -> tuple[str, ...]:
    what = []
    unused = (tensor["unused_low"] or 0) + (tensor["unused_high"] or 0)
    if unused / tensor["levels"] >= _DEAD:
        what.append(
            f"{100 * unused / tensor['levels']:.0f} % of its integers never occur: an observer "
            "that cuts outliers off (histogram, percentile), or calibration data like these"
        )
    weight = row["weight"]
    width = f"w{weight['bits']}" if weight is not None and weight["bits"] else "w8"
    if tensor["bits"] < 8:
        what.append(f"more bits: {_rule(row, f'a8{width}')}")
    elif tensor["bits"] < 16:
        emulated = row["placement"] == Placement.INTEGER.value
        cost = ", which XNNPACK emulates in float" if emulated else ""
        what.append(f"more bits{cost}: {_rule(row, f'a16{width}')}")
    else:
        what.append(f"keep it in float: {_rule(row, None)}")
    return tuple(what)


def _rule(row: Json, scheme: str | None) -> str:
    name = row["written"] or row["node"]
    chosen = "null" if scheme is None else scheme
    return f"{{node_name: {name}, scheme: {chosen}}}"


def _integers(tensor: Json) -> str:
    used = tensor["used_levels"]
    if used is None:
        return f"{tensor['bits']} bits"
    return f"{used:,} of {tensor['levels']:,} integers"


def _db(value: float | None) -> str:
    return "without error" if value is None else f"{value:.1f} dB"
