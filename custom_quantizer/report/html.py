"""A report as one HTML page: no external resources, readable without scripts.

Everything is in the markup: the script only sorts, filters and unfolds it, so the page can be
mailed, archived, printed and opened from a disk. Texts are escaped by the template engine, and a
policy lets the browser run this script and no other, whatever a module is called.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from custom_quantizer.ops.placement import Placement
from custom_quantizer.report.advice import findings_by_row, findings_of_inputs
from custom_quantizer.report.charts import (
    channel_chart,
    histogram,
    placement_bar,
    search_chart,
    sensitivity_chart,
    sqnr_chart,
)
from custom_quantizer.report.network import Picture, network_of, pictures_of
from custom_quantizer.report.views import WORST, View, tally_of

__all__ = ["render"]

Json = Mapping[str, Any]


def render(view: View, document: Json, title: str = "") -> str:
    """The page.

    Args:
        view: of the document.
        document: the parsed report.
        title: of the page, such as the name of a model; empty: what it is a report of.
    """
    style, script = _file("style.css"), _file("script.js")
    graph = document["kind"] == "graph"
    findings: Json = (document.get("findings") or {}) if graph else {}
    tensors, search, losses = (findings.get(k) for k in ("tensors", "search", "sensitivity"))
    return str(
        _template().render(
            title=title or view.title,
            view=view,
            worst_heading=WORST,
            style=Markup(style),  # our own files
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
            short=_channels_left_out(view),
            kinds=sorted({row.kind for row in view.rows}),
            placements=_placements(document),
            pictures=_pictures(document) if graph else (),
            inputs=_input_charts(document) if graph else (),
            charts=_op_charts(document) if graph else {},
            sqnr=sqnr_chart(tensors["tensors"]) if tensors else None,
            table_charts={
                "search": search_chart(search) if search else None,
                "sensitivity": sensitivity_chart(losses) if losses else None,
            },
        )
    )


_MOST_CHANNELS = 10_000
"""In tables of single channels: with more of them a page takes a phone seconds to open."""


def _channels_left_out(view: View) -> int:
    channels = sum(max(len(row.table) - 1, 0) for row in view.rows)
    return channels if channels > _MOST_CHANNELS else 0


@cache
def _template() -> Any:
    # A tenth of a second that only pages have to wait.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(_file("page.html"))


def _file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _placements(document: Json) -> Markup | None:
    counted = tally_of(document)
    if counted is None or not counted.total:
        return None
    return placement_bar([(where.value, counted.count(where)) for where in Placement])


def _pictures(document: Json) -> Sequence[Picture]:
    return pictures_of(network_of(document))


_CUT = "on a logarithmic scale; shaded: beyond its integers"


def _input_charts(document: Json) -> tuple[tuple[Markup, str], ...]:
    drawn = [(histogram(t), f"values of input {t['name']}") for t in findings_of_inputs(document)]
    return tuple((chart, f"{text}, {_CUT}") for chart, text in drawn if chart is not None)


def _op_charts(document: Json) -> dict[str, tuple[tuple[Markup, str], ...]]:
    """Pictures and captions of each op, by its row."""
    found = findings_by_row(document)
    charts = {}
    for row in document["rows"]:
        tensor, _ = found.get(row["node"], (None, None))
        drawn = []
        if tensor is not None:
            drawn.append((histogram(tensor), f"values of the result, {_CUT}"))
        if row["weight"] is not None:
            text = "weight of each channel; shaded: what its integers can hold"
            drawn.append((channel_chart(row["weight"]), text))
        charts[row["node"]] = tuple((chart, text) for chart, text in drawn if chart is not None)
    return charts
