"""Cells, details and notes that views of graphs and of programs both have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from custom_quantizer.ops.placement import Placement
from custom_quantizer.report.views.values import Column, Json

COMPUTES = {
    "integer": "integers",
    "dynamic": "integers with scales chosen at run time",
    "float": "float",
    "convert": "float on one side and integers on the other",
}
TENSOR_COLUMNS = (
    Column("input"),
    Column("weight"),
    Column("bias"),
    Column("output"),
    Column("acc", numeric=True),
)
_MOST_LINES = 3


def node_counts(rows: Sequence[Json]) -> str:
    """``14 calls and nodes: 12 integer, 2 float``."""
    counts = [(kind, sum(row["compute"] == kind for row in rows)) for kind in COMPUTES]
    shown = ", ".join(f"{count} {kind}" for kind, count in counts if count)
    return f"{plural(len(rows), 'node')} of delegates and calls: {shown}" if rows else "no nodes"


def bias_scales(rows: Sequence[Json]) -> list[str]:
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
        f"{plural(len(integer), 'integer bias', 'integer biases')}, {which} scale = input scale x "
        f"weight scale bit for bit; the largest needs {plural(used, 'bit')}"
    ]


def tensor_cells(row: Json, outputs: Sequence[Json]) -> list[tuple[str, ...]]:
    """The cells of input, weight, bias, output and accumulator."""
    weight, bias, acc = row["weight"], row["bias"], row["accumulator_bits"]
    return [
        _activation_cell(row["inputs"]),
        () if weight is None else (_weight_cell(weight),),
        () if bias is None else (_bias_cell(bias),),
        _activation_cell(outputs),
        () if acc is None else (str(acc),),
    ]


def widths_of(row: Json, outputs: Sequence[Json]) -> tuple[str, ...]:
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


def tensor_details(row: Json, outputs: Sequence[Json]) -> list[tuple[str, str]]:
    """What is known of each tensor of an op, as pairs of its role and a text."""
    details = [("input", _tensor(record)) for record in row["inputs"]]
    if row["weight"] is not None:
        details.append(("weight", _tensor(row["weight"])))
        if row["weight"]["raised"]:
            details.append(("raised", raised_text(row["weight"])))
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
            f"one scale per {each}{size} ({plural(record['channels'], 'channel')}{axis}), "
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


def raised_text(weight: Json) -> str:
    """Which scales of a weight were raised, so that its bias fits."""
    raised = weight["raised"]
    shown = ", ".join(f"channel {channel} x {factor:.4g}" for channel, factor in raised[:4])
    more = f" and {len(raised) - 4} more" if len(raised) > 4 else ""
    total = weight["channels"] or 1
    return f"{len(raised)} of {plural(total, 'weight scale')} raised: {shown}{more}"


def channel_rows(row: Json) -> tuple[tuple[str, ...], ...]:
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


def interval_text(low: float | None, high: float | None) -> str:
    """Limits of a clamp; None: there is none."""
    left = "(-inf" if low is None else f"[{low:.6g}"
    right = "inf)" if high is None else f"{high:.6g}]"
    return f"real values in {left}, {right}"


def reasons(rows: Iterable[Json], compute: str, name: str) -> list[str]:
    """Nodes that compute so, each with its reason."""
    return [f"{row[name]}: {row['reason']}" for row in rows if row["compute"] == compute]


def float_biases(rows: Iterable[Json], name: str) -> list[str]:
    """Biases that are no integers, each with its reason."""
    return [
        f"{row[name]}: {row['bias']['reason']}"
        for row in rows
        if row["bias"] is not None and row["bias"]["bits"] is None
    ]


def notes_of(*notes: tuple[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Lists with their headings, without the empty ones."""
    return tuple((heading, tuple(lines)) for heading, lines in notes if lines)


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _float(value: float) -> str:
    """Nine digits: enough to tell any two float32 apart."""
    return f"{value:.9g}"


def border_text(role: str, record: Json) -> str:
    """An input or output of the model or program."""
    kind = "integer " if record["border"] else ""
    return f"{kind}{role[:-1]} {_tensor(record)}"


def where_computed(row: Json) -> str:
    """Where an op computes, in one or two words: ``integer`` for ``integer kernel``."""
    return str(row["placement"] or row["compute"]).removesuffix(" kernel")
