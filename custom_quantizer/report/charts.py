"""Small pictures of numbers as inline SVG: histograms, ranges of channels, SQNR, a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from custom_quantizer.analysis.activations import BINS_OUTSIDE
from custom_quantizer.report.markup import element, number

__all__ = [
    "channel_chart",
    "histogram",
    "placement_bar",
    "search_chart",
    "sensitivity_chart",
    "sqnr_chart",
]

Json = Mapping[str, Any]

_WIDTH, _HEIGHT = 300.0, 84.0
"""Of what is drawn in the small ones; lines of text stand below."""


def histogram(finding: Json) -> Markup | None:
    """How often values of an activation occur, over its range; on a logarithmic scale.

    Args:
        finding: a tensor of the report's findings.
    """
    bins: Sequence[int] = finding["histogram"]
    known = ("scale", "zero_point", "quant_min", "quant_max")
    if not any(bins) or any(finding[key] is None for key in known):
        return None
    step = _WIDTH / len(bins)
    inside = (BINS_OUTSIDE * step, (len(bins) - BINS_OUTSIDE) * step)
    top = math.log1p(max(bins))
    bars: dict[str, list[str]] = {"bar": [], "cut": []}
    for i, count in enumerate(bins):
        if count:
            # One value is still to be seen.
            height = max(math.log1p(count) / top * (_HEIGHT - 4), 1.5)
            beyond = i < BINS_OUTSIDE or i >= len(bins) - BINS_OUTSIDE
            bar = f"M{number((i + 0.5) * step)} {number(_HEIGHT)}v{number(-height)}"
            bars["cut" if beyond else "bar"].append(bar)
    low, high = ends(finding)
    parts = [
        element("rect", x=0, y=0, width=inside[0], height=_HEIGHT, class_="beyond"),
        element("rect", x=inside[1], y=0, width=inside[0], height=_HEIGHT, class_="beyond"),
        [
            element("path", d="".join(d), stroke_width=step - 1, class_=kind)
            for kind, d in bars.items()
            if d
        ],
        [_line(x, 0, x, _HEIGHT, "limit") for x in inside],
        _line(0, _HEIGHT, _WIDTH, _HEIGHT, "axis"),
        _text(f"{low:.4g}", inside[0], _HEIGHT + 12, "middle"),
        _text(f"{high:.4g}", inside[1], _HEIGHT + 12, "middle"),
    ]
    if low < 0 < high:
        zero = inside[0] - low / (high - low) * (inside[1] - inside[0])
        if min(zero - inside[0], inside[1] - zero) > _WIDTH / 8:
            parts.append(_text("0", zero, _HEIGHT + 12, "middle"))
    return _svg(parts, _WIDTH, _HEIGHT + 16, "Histogram of the values over the range")


def ends(finding: Json) -> tuple[float, float]:
    """The real numbers that the smallest and the largest integer of an activation stand for."""
    scale, zero_point = finding["scale"], finding["zero_point"]
    low, high = ((finding[key] - zero_point) * scale for key in ("quant_min", "quant_max"))
    return low, high


def channel_chart(weight: Json) -> Markup | None:
    """The range of each output channel of a weight, within what its integers could hold."""
    if not weight["minima"]:
        return None
    # With a scale for each group of a channel, the integers themselves are shown.
    scales, unit = (weight["scales"], "") if weight["scales"] else ((1.0,), " as integers")
    channels = range(len(weight["minima"]))
    each = [scales[i % len(scales)] for i in channels]
    ranges = [(weight["minima"][i] * each[i], weight["maxima"][i] * each[i]) for i in channels]
    limits = [weight["quant_max"] * scale for scale in each]
    reach = max(limits) or 1.0
    middle = _HEIGHT / 2

    def y(value: float) -> str:
        return number(middle - value / reach * (middle - 2))

    step = _WIDTH / len(ranges)
    room = "".join(
        f"M{number((i + 0.5) * step)} {y(limit)}V{y(-limit)}" for i, limit in enumerate(limits)
    )
    bars = "".join(
        f"M{number((i + 0.5) * step)} {y(max(b, 0.0))}V{y(min(a, 0.0))}"
        for i, (a, b) in enumerate(ranges)
    )
    parts = [
        element("path", d=room, stroke_width=step, class_="room"),
        element("path", d=bars, stroke_width=max(step * 0.6, 0.4), class_="bar"),
        _line(0, middle, _WIDTH, middle, "axis"),
        _text(f"channels 0 to {len(ranges) - 1}", 0, _HEIGHT + 12),
        _text(f"±{reach:.4g}{unit}", _WIDTH, _HEIGHT + 12, "end"),
    ]
    return _svg(parts, _WIDTH, _HEIGHT + 16, "Range of the weight of each output channel")


def sqnr_chart(tensors: Sequence[Json]) -> Markup | None:
    """SQNR of each quantized activation, in graph order: accumulated, and of the op alone."""
    shown = [tensor for tensor in tensors if tensor["sqnr"] is not None]
    if len(shown) < 2:
        return None
    values = [t[key] for t in shown for key in ("sqnr", "alone") if t[key] is not None]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    high = max(high, low + 10)
    step = max(14.0, 560.0 / len(shown))
    left, height = 44.0, 190.0
    width = left + step * len(shown) + 6

    def at(i: int, value: float) -> tuple[float, float]:
        return left + (i + 0.5) * step, 8 + (high - value) / (high - low) * (height - 16)

    lines = []
    for value in range(low, high + 1, 10):
        y = at(0, value)[1]
        lines += [_line(left, y, width, y, "grid"), _text(_db(value, high), left - 6, y + 4, "end")]
    path = "M" + "L".join(
        f"{number(x)} {number(y)}" for x, y in (at(i, t["sqnr"]) for i, t in enumerate(shown))
    )
    dots = []
    for i, tensor in enumerate(shown):
        title = element("title", _sqnr_text(tensor))
        x, y = at(i, tensor["sqnr"])
        dots.append(element("circle", title, cx=x, cy=y, r=3.0, class_="with"))
        if tensor["alone"] is not None:
            x, y = at(i, tensor["alone"])
            square = {"x": x - 3, "y": y - 3, "width": 6.0, "height": 6.0}
            dots.append(
                element("rect", element("title", _sqnr_text(tensor)), **square, class_="alone")
            )
    parts = [
        lines,
        element("path", d=path, class_="with"),
        dots,
        [
            element(
                "text",
                _clipped(tensor["name"]),
                transform=f"translate({number(left + (i + 0.5) * step + 3)} {number(height + 6)})"
                " rotate(90)",
            )
            for i, tensor in enumerate(shown)
        ],
    ]
    below = 12 + 6.5 * max(len(_clipped(tensor["name"])) for tensor in shown)
    return _svg(parts, width, height + below, "SQNR of each quantized activation", fixed=True)


def _sqnr_text(tensor: Json) -> str:
    alone = "" if tensor["alone"] is None else f", {tensor['alone']:.1f} dB alone"
    return f"{tensor['name']}: {tensor['sqnr']:.1f} dB{alone}"


def _db(value: int, top: int) -> str:
    return f"{value} dB" if value == top else str(value)


def _clipped(text: str) -> str:
    return text if len(text) <= 17 else f"…{text[-16:]}"


_MOST_ROWS = 60


def sensitivity_chart(sensitivity: Json) -> Markup | None:
    """What each width leaves of the outputs: a row for a weight or activation, the worst first."""
    rows: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for loss in sensitivity["losses"]:
        noise = loss["noise"] if loss["noise"] is not None else loss["estimate"]
        if noise:
            key = (loss["kind"], loss["name"])
            rows.setdefault(key, []).append((-10 * math.log10(noise), loss["width"]))
    if len(rows) < 2:
        return None
    shown = sorted(rows.items(), key=lambda row: min(row[1]))[:_MOST_ROWS]
    values = [value for _, found in shown for value, _ in found]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    high = max(high, low + 10)
    left, across, step = 124.0, 300.0, 17.0
    height = step * len(shown)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * across

    parts: list[Markup] = []
    for mark in range(low, high + 1, 10):
        parts.append(_line(x(mark), 0, x(mark), height, "grid"))
        parts.append(_text(_db(mark, high), x(mark), height + 13, "middle"))
    for i, ((kind, name), found) in enumerate(shown):
        y = (i + 0.5) * step
        parts.append(_text(_clipped(name), left - 14, y + 4, "end"))
        parts.append(_line(x(min(found)[0]), y, x(max(found)[0]), y, "grid"))
        for value, width in found:
            title = element("title", f"{kind} {name} at {width}: {value:.1f} dB")
            parts.append(element("text", title, width, x=x(value), y=y + 4, class_="middle mark"))
    about = "SQNR of the outputs for each width of each weight and activation alone"
    return _svg(parts, left + across + 24, height + 18, about, fixed=True)


def search_chart(search: Json) -> Markup | None:
    """The choices that a search measured: SQNR of the outputs over what they cost."""
    points = [
        (point["costs"][search["cost"]], -10 * math.log10(point["measured"]["noise"]), point)
        for point in search["points"]
        if point["measured"]["noise"] and search["cost"] in point["costs"]
    ]
    base = search["base"]["costs"].get(search["cost"])
    if not points or not base:
        return None
    left, width, height = 44.0, 430.0, 220.0
    xs, ys = [p[0] / base for p in points], [p[1] for p in points]
    low_x, high_x = min(xs) * 0.95, max(xs) * 1.02
    low, high = 10 * math.floor(min(ys) / 10), 10 * math.ceil(max(ys) / 10)
    high = max(high, low + 10)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x or 1.0)
        return left + across * (width - left - 8), 8 + (high - y) / (high - low) * (height - 16)

    parts: list[Markup] = []
    for value in range(low, high + 1, 10):
        y = at(low_x, value)[1]
        parts += [_line(left, y, width, y, "grid"), _text(_db(value, high), left - 6, y + 4, "end")]
    front = sorted((x, y) for x, y, (*_, p) in zip(xs, ys, points, strict=True) if p["on_front"])
    corners = "L".join(f"{number(a)} {number(b)}" for a, b in (at(*xy) for xy in front))
    if len(front) > 1:
        parts.append(element("path", d=f"M{corners}", class_="with"))
    for x, y, (*_, point) in zip(xs, ys, points, strict=True):
        a, b = at(x, y)
        taken = point["name"] == search["best"]
        about = f"{point['name']}: {x:.3f} of {search['cost']}, {y:.1f} dB"
        kind = "taken" if taken else "with" if point["on_front"] else "other"
        title = element("title", about)
        parts.append(element("circle", title, cx=a, cy=b, r=6.0 if taken else 4.0, class_=kind))
    parts += [
        _text(f"{low_x:.2f}", left, height + 12),
        _text(f"{high_x:.2f}", width, height + 12, "end"),
        _text(f"share of {search['cost']}", (left + width) / 2, height + 12, "middle"),
    ]
    return _svg(parts, width, height + 16, "Choices of widths: SQNR over cost", fixed=True)


def placement_bar(counts: Sequence[tuple[str, int]]) -> Markup:
    """How many ops compute where: a bar, and a legend that the picture of the network shares.

    Args:
        counts: word for a place, and how many ops compute there.
    """
    shown = [(where, count) for where, count in counts if count]
    total = sum(count for _, count in shown)
    width = 330.0
    parts, x = [], 0.0
    for where, count in shown:
        size = count / total * width
        shape = {"x": x, "y": 0.0, "width": max(size - 1, 1.0), "height": 18.0}
        kind = f"box swatch {where.replace(' ', '-')}"
        title = element("title", f"{count} {where}")
        parts.append(element("g", title, element("rect", **shape), class_=kind))
        x += size
    for i, (where, count) in enumerate(shown):
        y = 30.0 + 22 * i
        shape = {"x": 1.0, "y": y, "rx": 3.0, "width": 24.0, "height": 15.0}
        parts.append(
            element("g", element("rect", **shape), class_=f"box {where.replace(' ', '-')}")
        )
        parts.append(_text(f"{count} {where}", 34, y + 12))
    height = 30.0 + 22 * len(shown)
    return _svg(parts, width, height, "How many ops compute where", kind="placements")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=kind)


def _text(text: str, x: float, y: float, anchor: str = "") -> Markup:
    return element("text", text, x=x, y=y, class_=anchor or None)


def _svg(
    parts: Iterable[object],
    width: float,
    height: float,
    about: str,
    fixed: bool = False,
    kind: str = "",
) -> Markup:
    """A picture; a ``fixed`` one is scrolled where there is less room, not made smaller."""
    return element(
        "svg",
        parts,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=number(width),
        height=number(height),
        role="img",
        class_=f"chart{' fixed' if fixed else ''} {kind}".strip(),
        aria_label=about,
    )
