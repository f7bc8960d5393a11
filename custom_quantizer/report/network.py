"""The network as a picture: boxes for ops, arrows with the dtype of each tensor.

Layers follow from the longest path to each op, in one pass over the graph. A picture is cut into
columns of a dozen layers, where few tensors cross, so that it wraps like text: side by side on a
desk, one below the other on a phone or a sheet of paper. Large networks are drawn module by module.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from custom_quantizer.ops.placement import Placement, tally
from custom_quantizer.report.markup import element

__all__ = ["Arrow", "Box", "Network", "Picture", "draw", "network_of", "pictures_of"]

Json = Mapping[str, Any]

MOST_BOXES = 80
"""Of one picture; a network with more is drawn module by module."""

_MOST_GROUPS = 60
_LAYERS = 12
"""Layers of a column, give or take a few."""

_FLOAT = frozenset({Placement.EMULATED, Placement.FLOAT, Placement.OUTSIDE})
"""Where tensors are float32 numbers."""

INPUT = "input"
OUTPUT = "output"


@dataclass(frozen=True)
class Box:
    """An op, an input or output of the model, or all ops of a module.

    Attributes:
        key: unique in its network.
        title: first line.
        subtitle: second line.
        kind: a value of ``Placement``, ``"input"`` or ``"output"``.
        path: of the module.
        about: what a pointer resting on it shows.
        op: row of the table that it stands for; empty: none.
        ops: how many ops it stands for.
    """

    key: str
    title: str
    subtitle: str
    kind: str
    path: str = ""
    about: str = ""
    op: str = ""
    ops: int = 1

    @property
    def in_float(self) -> bool:
        """Whether it computes on float32 numbers."""
        return self.kind in {placement.value for placement in _FLOAT}


@dataclass(frozen=True)
class Arrow:
    """A tensor from one box to another.

    Attributes:
        source: key of the box that computes it.
        target: key of a box that takes it.
        label: its dtype, such as ``int4`` for integers of four bits.
        in_float: one of its ends computes in float32.
        border: how it changes on the way: ``"quantize"``, ``"dequantize"`` or ``"requantize"``;
            empty: it does not.
    """

    source: str
    target: str
    label: str
    in_float: bool = False
    border: str = ""


@dataclass(frozen=True)
class Network:
    """Boxes in an order in which each stands behind those it depends on, and arrows."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


@dataclass(frozen=True)
class Picture:
    """A drawn network.

    Attributes:
        key: of the box that stands for it in the whole; empty: it is the whole.
        title: of the module; empty: all of the network.
        columns: SVG, to be read one after the other.
    """

    key: str
    title: str
    columns: tuple[Markup, ...]


# ---------------------------------------------------------------------------------------------
# From a report
# ---------------------------------------------------------------------------------------------


def network_of(document: Json) -> Network:
    """The ops of a converted graph's report, each once, as it was written."""
    boxes: list[Box] = []
    arrows: dict[tuple[str, str, str, str], Arrow] = {}
    made: dict[str, tuple[Box, Json]] = {}
    """Name of a tensor -> the box that computes it, and its record."""
    for record in document["inputs"]:
        box = Box(f"in:{record['source']}", record["source"], f"input {dtype_of(record)}", INPUT)
        boxes.append(box)
        made[record["source"]] = (box, record)
    for rows in _written(document["rows"]):
        box = _box_of(rows, f"op:{len(boxes)}")
        own = {row["output"]["source"] for row in rows}
        for row in rows:
            for record in row["inputs"]:
                found = made.get(record["source"])
                if found is not None and record["source"] not in own:
                    arrow = _arrow(*found, box, record)
                    key = (arrow.source, arrow.target, arrow.label, arrow.border)
                    arrows.setdefault(key, arrow)
            for name in row["needs"]:
                found = made.get(name)
                if found is not None and name not in own:
                    arrow = Arrow(found[0].key, box.key, dtype_of(found[1]), box.in_float)
                    arrows.setdefault((arrow.source, arrow.target, arrow.label, ""), arrow)
            made[row["output"]["source"]] = (box, row["output"])
            made.setdefault(row["node"], (box, row["output"]))
        boxes.append(box)
    for i, record in enumerate(document["outputs"]):
        box = Box(f"out:{i}", f"output {i}", dtype_of(record), OUTPUT)
        boxes.append(box)
        found = made.get(record["source"])
        if found is not None:
            arrow = _arrow(*found, box, record)
            arrows.setdefault((arrow.source, arrow.target, arrow.label, arrow.border), arrow)
    return Network(tuple(boxes), tuple(arrows.values()))


def _written(rows: Iterable[Json]) -> Iterable[list[Json]]:
    """Rows of ops, those together that stand one after the other and are parts of one op."""
    found: list[Json] = []
    for row in rows:
        if row["placement"] is None:
            continue  # a requantization, which is drawn on an arrow
        if found and found[-1]["written"] != row["written"]:
            yield found
            found = []
        found.append(row)
    if found:
        yield found


def _box_of(rows: Sequence[Json], key: str) -> Box:
    last = rows[-1]
    name = last["written"] or last["node"]
    whole = tally((name, Placement(row["placement"])) for row in rows)
    place = whole.placements[name]
    if len(rows) == 1:
        family = last["family"] + (f" + {last['fused_family']}" if last["fused_family"] else "")
    else:
        family = f"{len(rows)} parts"
    weights = [row["weight"] for row in rows if row["weight"] is not None]
    weight = f", {dtype_of(weights[0])} weight" if weights else ""
    backend = f"{last['backend']}" if last["backend"] else place.value
    reason = next((row["backend_reason"] for row in rows if row["backend_reason"]), "")
    where = f"{name} ({last['path']})" if last["path"] else name
    about = f"{where}: {family}{weight}; {backend}"
    return Box(
        key,
        name,
        _short_family(family) + (f", w{weights[0]['bits'] or 32}" if weights else ""),
        place.value,
        last["path"],
        f"{about}: {reason}" if reason else about,
        last["node"],
    )


def _short_family(family: str) -> str:
    return family.removeprefix("aten.").replace(".default", "")


def dtype_of(record: Json) -> str:
    """``int4`` for integers of four bits, wherever they are stored."""
    if record["bits"] is None:
        return str(record["dtype"])
    return f"{'u' if str(record['dtype']).startswith('u') else ''}int{record['bits']}"


_FORMAT = ("bits", "scales", "zero_point", "quant_min", "quant_max")


def _arrow(source: Box, made: Json, target: Box, taken: Json) -> Arrow:
    inside = [box.in_float for box in (source, target)]
    differs = any(made[key] != taken[key] for key in _FORMAT)
    if taken["bits"] is None and made["bits"] is None:
        border = ""
    elif source.kind in (INPUT, OUTPUT) and not made["border"]:
        # The program is handed float32, and the first thing that happens is rounding.
        border = "quantize" if taken["bits"] is not None else ""
    elif target.kind == OUTPUT and not taken["border"]:
        border = "dequantize" if made["bits"] is not None else ""
    elif inside[0] != inside[1]:
        border = "quantize" if inside[0] else "dequantize"
    else:
        border = "requantize" if differs else ""
    return Arrow(source.key, target.key, dtype_of(taken), any(inside), border)


# ---------------------------------------------------------------------------------------------
# Module by module
# ---------------------------------------------------------------------------------------------


def pictures_of(network: Network) -> tuple[Picture, ...]:
    """All of a network: one picture, or one of its modules and one of each module."""
    if len(network.boxes) <= MOST_BOXES:
        return (draw(network),)
    groups = _groups(network)
    whole, inside = [], []
    where: dict[str, str] = {}
    for i, (title, boxes) in enumerate(groups):
        if len(boxes) == 1:
            whole.append(boxes[0])
            where[boxes[0].key] = boxes[0].key
            continue
        key = f"group:{i}"
        places = tally((box.key, Placement(box.kind)) for box in boxes)
        worst = max(places.placements.values(), key=list(Placement).index)
        about = f"{title}: {places}"
        subtitle = str(places).split(": ", 1)[1]
        whole.append(Box(key, title, subtitle, worst.value, title, about, ops=len(boxes)))
        where.update((box.key, key) for box in boxes)
        inside.append((title, boxes))
    arrows: dict[tuple[str, str], Arrow] = {}
    for arrow in network.arrows:
        source, target = where[arrow.source], where[arrow.target]
        if source != target:
            moved = replace(arrow, source=source, target=target)
            before = arrows.get((source, target))
            arrows[source, target] = moved if before is None else _joined(before, moved)
    pictures = [draw(Network(tuple(whole), tuple(arrows.values())))]
    touching: dict[str, list[Arrow]] = {key: [] for key in where.values()}
    for arrow in network.arrows:
        for key in {where[arrow.source], where[arrow.target]}:
            touching[key].append(arrow)
    names = {box.key: box.title for box in network.boxes}
    for title, boxes in inside:
        key = where[boxes[0].key]
        module = Network(tuple(boxes), tuple(touching[key]))
        pictures.append(draw(module, key, title, names))
    return tuple(pictures)


def _joined(one: Arrow, other: Arrow) -> Arrow:
    """What stands for both between two modules."""
    labels = one.label if other.label in one.label.split(", ") else f"{one.label}, {other.label}"
    return replace(
        one,
        label=labels,
        in_float=one.in_float or other.in_float,
        border=one.border or other.border,
    )


def _groups(network: Network) -> list[tuple[str, list[Box]]]:
    """Boxes in runs of one module: the finest modules of which there are not too many.

    Runs of an order that respects the arrows never depend on each other in a circle.
    """
    deepest = max((box.path.count(".") + 1 for box in network.boxes if box.path), default=0)
    best = _runs(network, 1)
    for depth in range(2, deepest + 1):
        finer = _runs(network, depth)
        if len(finer) > _MOST_GROUPS:
            break
        best = finer
    if len(best) <= _MOST_GROUPS:
        return best
    # No modules, or hundreds of them at the top: equal parts in order.
    size = -(-len(network.boxes) // (_MOST_GROUPS - 4))
    parts: list[tuple[str, list[Box]]] = []
    for box in network.boxes:
        if box.kind in (INPUT, OUTPUT):
            parts.append(("", [box]))
        elif parts and parts[-1][0] and len(parts[-1][1]) < size:
            parts[-1][1].append(box)
        else:
            parts.append((f"{box.title} and after", [box]))
    return parts


def _runs(network: Network, depth: int) -> list[tuple[str, list[Box]]]:
    runs: list[tuple[str, list[Box]]] = []
    for box in network.boxes:
        prefix = ".".join(box.path.split(".")[:depth])
        if box.kind in (INPUT, OUTPUT):
            runs.append(("", [box]))
        elif runs and runs[-1][0] == (prefix or "no module"):
            runs[-1][1].append(box)
        else:
            runs.append((prefix or "no module", [box]))
    return runs


# ---------------------------------------------------------------------------------------------
# Layers, columns, lanes
# ---------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _GAP, _BESIDE, _LANE, _MARGIN = 142.0, 36.0, 30.0, 12.0, 12.0, 6.0
_PITCH = _HEIGHT + _GAP
_TITLE, _SUBTITLE = 20, 24
"""Characters of the two lines of a box."""


def draw(
    network: Network, key: str = "", title: str = "", names: Mapping[str, str] | None = None
) -> Picture:
    """Draw a network; takes time in proportion to boxes and arrows.

    Args:
        network: arrows from or to boxes that are not in it are drawn to the edge.
        key: of the picture.
        title: of the picture.
        names: of boxes outside.
    """
    layer_of = _layers(network)
    known = {**(names or {}), **{box.key: box.title for box in network.boxes}}
    columns = [_Column(layer_of, known, first, last) for first, last in _columns(network, layer_of)]
    column_of = {layer: i for i, c in enumerate(columns) for layer in range(c.first, c.last + 1)}
    where = {box.key: column_of[layer_of[box.key]] for box in network.boxes}
    for box in network.boxes:
        columns[where[box.key]].boxes.append(box)
    for arrow in network.arrows:
        ends = [where[end] for end in (arrow.source, arrow.target) if end in where]
        for column in columns[min(ends) : max(ends) + 1] if ends else ():
            column.arrows.append(arrow)
    return Picture(key, title, tuple(column.svg() for column in columns))


def _layers(network: Network) -> dict[str, int]:
    """Length of the longest path to each box. Inputs stand right above the first who uses them."""
    layers: dict[str, int] = {box.key: 0 for box in network.boxes}
    incoming: dict[str, list[str]] = {}
    for arrow in network.arrows:
        if arrow.source in layers:
            incoming.setdefault(arrow.target, []).append(arrow.source)
    for box in network.boxes:
        above = incoming.get(box.key, ())
        layers[box.key] = 1 + max((layers[source] for source in above), default=-1)
    first: dict[str, int] = {}
    for arrow in network.arrows:
        if arrow.target in layers:
            below = layers[arrow.target] - 1
            first[arrow.source] = min(first.get(arrow.source, below), below)
    for box in network.boxes:
        if box.kind == INPUT:
            layers[box.key] = max(first.get(box.key, 0), 0)
    return layers


def _columns(network: Network, layer_of: Mapping[str, int]) -> list[tuple[int, int]]:
    """First and last layer of each column, cut where the fewest arrows cross."""
    depth = 1 + max(layer_of.values(), default=0)
    crossing = [0] * (depth + 1)
    for arrow in network.arrows:
        source, target = layer_of.get(arrow.source), layer_of.get(arrow.target)
        if source is not None and target is not None:
            crossing[source] += 1
            crossing[target] -= 1
    for i in range(depth):
        crossing[i + 1] += crossing[i]
    columns, start = [], 0
    while depth - start > _LAYERS + 3:
        ends = range(start + _LAYERS - 4, min(start + _LAYERS + 3, depth - 3))
        end = min(ends, key=lambda i: (crossing[i], abs(i - start - _LAYERS)))
        columns.append((start, end))
        start = end + 1
    return [*columns, (start, depth - 1)]


@dataclass
class _Column:
    """Some layers of a network, drawn."""

    layer_of: Mapping[str, int]
    names: Mapping[str, str]
    first: int
    last: int
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    place: dict[str, tuple[float, float]] = field(default_factory=dict)

    def svg(self) -> Markup:
        boxes, arrows = self.boxes, self.arrows
        self._put(boxes, arrows)
        lanes, count = self._lanes(arrows)
        right = max((x + _WIDTH for x, _ in self.place.values()), default=_WIDTH)
        # Boxes that are not in the picture stand outside of all columns.
        above = any(self.layer_of.get(a.source, -1) < self.first for a in arrows)
        below = any(self.layer_of.get(a.target, math.inf) > self.last for a in arrows)
        top = -(_GAP + 8) if above else -_MARGIN
        bottom = (self.last - self.first) * _PITCH + _HEIGHT + (_GAP + 8 if below else _MARGIN)
        entries = self._entries(arrows)
        drawn = [self._arrow(a, lanes.get(a), right, entries, top, bottom) for a in arrows]
        width = right + 2 * _MARGIN + (14 + (count - 1) * _LANE if count else 0)
        return element(
            "svg",
            drawn,
            self._away(arrows, lanes, right),
            [self._box(box) for box in boxes],
            viewBox=f"{-_MARGIN:g} {top:g} {width:g} {bottom - top:g}",
            width=f"{width:g}",
            height=f"{bottom - top:g}",
            role="group",
            class_="graph",
            aria_label=f"Part of the network with {len(boxes)} boxes",
        )

    def _put(self, boxes: Sequence[Box], arrows: Sequence[Arrow]) -> None:
        """Boxes of a layer in the order of what they take, layers centered on each other."""
        rows: dict[int, list[Box]] = {}
        for box in boxes:
            rows.setdefault(self.layer_of[box.key], []).append(box)
        sources: dict[str, list[str]] = {}
        for arrow in arrows:
            sources.setdefault(arrow.target, []).append(arrow.source)
        widest = max((len(row) for row in rows.values()), default=1)
        center = (widest * _WIDTH + (widest - 1) * _BESIDE) / 2
        for layer in sorted(rows):
            keyed = []
            for i, box in enumerate(rows[layer]):
                above = [
                    self.place[source][0]
                    for source in sources.get(box.key, ())
                    if source in self.place
                ]
                keyed.append((sum(above) / len(above) if above else center, i, box))
            keyed.sort(key=lambda entry: entry[:2])
            left = center - (len(keyed) * _WIDTH + (len(keyed) - 1) * _BESIDE) / 2
            for i, (_, _, box) in enumerate(keyed):
                spot = (left + i * (_WIDTH + _BESIDE), (layer - self.first) * _PITCH)
                self.place[box.key] = spot

    def _rows(self, arrow: Arrow) -> tuple[int, int]:
        """The first and the last gap it goes through, counted by the layer above a gap."""
        source, target = self.layer_of.get(arrow.source), self.layer_of.get(arrow.target)
        start = self.first - 1 if source is None else max(source, self.first - 1)
        end = self.last + 1 if target is None else min(target, self.last + 1)
        return start, end - 1

    def _lanes(self, arrows: Sequence[Arrow]) -> tuple[dict[Arrow, int], int]:
        """A lane beside the boxes for each tensor that passes some; lanes are used again."""
        tensors: dict[tuple[str, bool], list[Arrow]] = {}
        for arrow in arrows:
            if self._is_long(arrow):
                tensors.setdefault((arrow.source, arrow.in_float), []).append(arrow)
        spans = []
        for i, found in enumerate(tensors.values()):
            rows = [self._rows(arrow) for arrow in found]
            spans.append((min(row[0] for row in rows), max(row[1] for row in rows), i, found))
        lanes: dict[Arrow, int] = {}
        busy: list[tuple[int, int]] = []
        free: list[int] = []
        count = 0
        for start, end, _, found in sorted(spans, key=lambda span: span[:3]):
            while busy and busy[0][0] < start:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if free:
                lane = heapq.heappop(free)
            else:
                lane, count = count, count + 1
            lanes.update(dict.fromkeys(found, lane))
            heapq.heappush(busy, (end, lane))
        return lanes, count

    def _is_long(self, arrow: Arrow) -> bool:
        start, end = self._rows(arrow)
        return end > start

    def _entries(self, arrows: Sequence[Arrow]) -> dict[Arrow, float]:
        """Where along its upper side a box is entered, so that labels stand side by side."""
        into: dict[str, list[Arrow]] = {}
        for arrow in arrows:
            if arrow.target in self.place:
                into.setdefault(arrow.target, []).append(arrow)
        entries = {}
        for key, found in into.items():
            x = self.place[key][0] + _WIDTH / 2
            # From the left to the right as they come; what passes boxes comes from the right.
            found.sort(key=lambda a: (self._is_long(a), self.place.get(a.source, (0.0,))[0]))
            step = min(52.0, (_WIDTH - 24) / max(len(found) - 1, 1))
            for i, arrow in enumerate(found):
                entries[arrow] = x + (i - (len(found) - 1) / 2) * step
        return entries

    def _arrow(
        self,
        arrow: Arrow,
        lane: int | None,
        right: float,
        entries: Mapping[Arrow, float],
        top: float,
        bottom: float,
    ) -> Markup:
        source, target = self.place.get(arrow.source), self.place.get(arrow.target)
        if source is None:
            x = entries.get(arrow, right / 2)
            start = (x, top + 12 if lane is None else top)
        else:
            start = (source[0] + _WIDTH / 2, source[1] + _HEIGHT)
        if target is None:
            end = (start[0], bottom - 12 if lane is None else bottom)
        else:
            end = (entries[arrow], target[1] - 1)
        if lane is None:
            middle = (start[1] + end[1]) / 2
            path = f"M{_at(start)}C{_at((start[0], middle))} {_at((end[0], middle))} {_at(end)}"
        else:
            path = self._detour(start, end, right + 14 + lane * _LANE, source, target)
        kind = "float" if arrow.in_float else "integer"
        about = f"{arrow.label}{f', {arrow.border}' if arrow.border else ''}"
        whole = f"{self.names.get(arrow.source, '')} to {self.names.get(arrow.target, '')}: {about}"
        parts = [element("path", element("title", whole), d=path)]
        if target is not None:
            tip = f"M{_at((end[0] - 3.5, end[1] - 5))}L{_at(end)}L{_at((end[0] + 3.5, end[1] - 5))}"
            parts.append(element("path", d=tip, class_="tip"))
            x = end[0] + (8 if arrow.border else 5)
            parts.append(element("text", arrow.label, x=x, y=end[1] - 6, class_="dtype"))
            if arrow.border:
                spot = element("title", about)
                parts.append(
                    element("circle", spot, cx=end[0], cy=end[1] - 9, r=3.5, class_=arrow.border)
                )
        return element("g", parts, class_=f"arrow {kind}")

    def _away(self, arrows: Sequence[Arrow], lanes: Mapping[Arrow, int], right: float) -> Markup:
        """Where tensors come from that are computed in another column, and where they go."""
        above: dict[tuple[float, str], list[str]] = {}
        below: dict[tuple[float, str], list[str]] = {}
        passing = [arrow for arrow in arrows if arrow in lanes and arrow.source not in self.place]
        for arrow in arrows:
            source, target = self.place.get(arrow.source), self.place.get(arrow.target)
            if arrow in lanes:
                if source is None and len(passing) == 1:
                    above.setdefault((right + 14, "end"), []).append(arrow.source)
            elif source is None and target is not None:
                above.setdefault((target[0] + _WIDTH / 2, "middle"), []).append(arrow.source)
            elif target is None and source is not None:
                below.setdefault((source[0] + _WIDTH / 2, "middle"), []).append(arrow.target)
        texts = []
        for word, places, y in (
            ("from", above, 9 - _GAP - 8),
            ("to", below, (self.last - self.first) * _PITCH + _HEIGHT + _GAP + 6),
        ):
            for (x, anchor), keys in places.items():
                names = list(dict.fromkeys(self.names.get(key, "") for key in keys))
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                text = f"{word} {_shortened(names[0], 18)}{more}"
                # The name of what comes down beside the boxes stands a line lower.
                spot = (x - 4, y + 11) if anchor == "end" else (x, y)
                texts.append(element("text", text, x=spot[0], y=spot[1], class_=f"away {anchor}"))
        return element("g", texts)

    @staticmethod
    def _detour(
        start: tuple[float, float],
        end: tuple[float, float],
        x: float,
        source: tuple[float, float] | None,
        target: tuple[float, float] | None,
    ) -> str:
        """Through the gap below, down a lane beside the boxes, and back through the gap above."""
        if source is None:
            path = f"M{_at((x, start[1]))}"
        else:
            y = start[1] + 7
            path = f"M{_at(start)}Q{_at((start[0], y))} {_at((start[0] + 6, y))}"
            path += f"L{_at((x - 6, y))}Q{_at((x, y))} {_at((x, y + 6))}"
        if target is None:
            return f"{path}L{_at((x, end[1]))}"
        y = end[1] - 19
        path += f"L{_at((x, y - 6))}Q{_at((x, y))} {_at((x - 6, y))}"
        return f"{path}L{_at((end[0] + 6, y))}Q{_at((end[0], y))} {_at((end[0], y + 6))}L{_at(end)}"

    def _box(self, box: Box) -> Markup:
        x, y = self.place[box.key]
        shape = "input" if box.kind in (INPUT, OUTPUT) else box.kind.replace(" ", "-")
        radius = 18 if box.kind in (INPUT, OUTPUT) else 4
        size = {"width": _WIDTH, "height": _HEIGHT}
        parts = [
            element("title", box.about or box.title),
            element("rect", x=x, y=y, rx=radius, **size),
            element(
                "text",
                _shortened(box.title, _TITLE),
                x=x + _WIDTH / 2,
                y=y + 15,
                class_="name middle",
            ),
            element(
                "text",
                _shortened(box.subtitle, _SUBTITLE, start=True),
                x=x + _WIDTH / 2,
                y=y + 28,
                class_="middle",
            ),
        ]
        reached = {"data_op": box.op, "tabindex": 0} if box.op else {}
        if box.ops > 1:
            reached = {"data_module": box.key, "tabindex": 0}
        return element("g", parts, class_=f"box {shape}", **reached)


def _at(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}".replace(".0", "")


def _shortened(text: str, most: int, start: bool = False) -> str:
    """The end of a name says most about it, the start of a sentence."""
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if start else f"…{text[1 - most :]}"
