"""The page of a report says what its record says: numbers, picture, charts and advice."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import convert
from support.pages import Element, details_of, page_of
from support.scripts import DOCS, documentation_script
from support.selection import slow_but
from torch import Tensor, nn

from custom_quantizer.core.files import write_text_atomic
from custom_quantizer.errors import InputError
from custom_quantizer.ops.placement import Placement
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.report.advice import worst_ops
from custom_quantizer.report.charts import histogram
from custom_quantizer.report.findings import Findings
from custom_quantizer.report.graph_record import inspect
from custom_quantizer.report.markup import element
from custom_quantizer.report.network import (
    MOST_BOXES,
    Arrow,
    Box,
    Network,
    draw,
    network_of,
    pictures_of,
)
from custom_quantizer.report.record import Report
from custom_quantizer.report.views import view_of

NAMES = ("resnet20", "two_heads")


@cache
def stored(name: str) -> Report:
    return Report.from_json((DOCS / "reports" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stored(name).to_json())
    return found


@cache
def text_of(name: str) -> str:
    """The page as it is rendered now; a test says that it is the one in the docs."""
    text: str = documentation_script("make_reports.py").page(name)
    return text


@cache
def page(name: str) -> Element:
    return page_of(text_of(name))


def ops(root: Element) -> dict[str, Element]:
    table = next(t for t in root.all("table") if t.attributes.get("id") == "ops")
    found = [c for c in table.children if isinstance(c, Element) and c.tag == "tbody"]
    return {body.attributes["data-name"]: body for body in found}


# ---------------------------------------------------------------------------------------------
# The examples in docs/
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pages_in_the_docs_are_those_of_their_records(name: str) -> None:
    """If not: ``python docs/make_reports.py --pages``."""
    script = documentation_script("make_reports.py")
    file = DOCS / "reports" / f"{name}.html"
    assert file.read_text(encoding="utf-8") == text_of(name)
    assert file.stat().st_size < 300_000
    assert file.with_suffix(".json").stat().st_size < 300_000
    assert set(script.MAKERS) == set(NAMES)
    assert script.PICTURE.stat().st_size < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_each_op_are_those_of_the_record(name: str) -> None:
    bodies = ops(page(name))
    rows = document(name)["rows"]
    assert list(bodies) == [row["node"] for row in rows]
    findings = document(name)["findings"]["tensors"]
    measured = {(t["name"], t["bits"]): t for t in findings["tensors"]}
    weights = {weight["name"]: weight for weight in findings["weights"]}
    shown = 0
    for row in rows:
        details = details_of(bodies[row["node"]])
        output = row["output"]
        found = measured.get((output["source"], output["bits"]))
        assert ("values" in details) == (found is not None)
        if found is not None:
            (values,) = details["values"]
            low, high = (float(text) for text in re.findall(r"-?[\d.e-]+", values)[:2])
            assert low == pytest.approx(found["low"], rel=1e-4, abs=1e-12)
            assert high == pytest.approx(found["high"], rel=1e-4, abs=1e-12)
            if found["used_levels"] is not None:
                assert f"{found['used_levels']:,} of {found['levels']:,} integers" in values
            if found["clipped_low"] + found["clipped_high"]:
                cut = re.search(r"cut off (\S+) % below and (\S+) % above", values)
                assert cut is not None
                for text, key in zip(cut.groups(), ("clipped_low", "clipped_high"), strict=True):
                    assert float(text) / 100 == pytest.approx(found[key], rel=0.06)
            assert f"{found['sqnr']:.1f} dB with all before it" in details["SQNR"][0]
            alone = found["alone"]
            assert ("alone" in details["SQNR"][0]) == (alone is not None)
            if alone is not None:
                assert f", {alone:.1f} dB alone" in details["SQNR"][0]
            if found["bias_headroom"] is not None:
                assert details["headroom"][0].startswith(f"{found['bias_headroom']} bit")
        if row["accumulator_bits"] is not None:
            assert details["accumulator"] == [f"{row['accumulator_bits']} bits in the worst case"]
        if row["node"] in weights:
            assert details["weight SQNR"][0].startswith(f"{weights[row['node']]['sqnr']:.1f} dB")
            shown += 1
    assert shown == len(weights)


def test_first_facts_are_those_of_the_record() -> None:
    facts = {
        div.one("p", class_="label").text: (
            div.one("p", class_="value").text,
            div.one("p", class_="remark").text,
        )
        for div in page("resnet20").one("div", class_="facts").all("div")
    }
    record = document("resnet20")
    first, last = record["findings"]["evaluation"]["models"]
    low, high = last["top1_interval"]
    value, remark = facts["top-1 accuracy"]
    assert value == f"{100 * last['correct'] / last['samples']:.2f} %"
    assert remark == f"95 % interval {100 * low:.2f} to {100 * high:.2f} %, 2,000 samples"
    assert low < last["top1"] < high
    change = last["against_first"]["difference"]
    assert change == pytest.approx((last["correct"] - first["correct"]) / last["samples"])
    assert facts["against float model"][0] == f"{100 * change:+.2f} points"
    assert facts["size"][0] == f"{record['lowering']['size_bytes']:,} bytes"
    (output,) = record["findings"]["tensors"]["outputs"]
    assert facts["SQNR"][0] == f"{output['sqnr']:.1f} dB"
    counts = Counter(row["placement"] for row in record["rows"] if row["placement"])
    integer = counts["integer kernel"] + counts["table"]
    assert facts["ops on integers"][0] == f"{integer} of {sum(counts.values())}"
    assert "not measured" in page("two_heads").one("div", class_="facts").text


def test_tables_of_search_and_sensitivity_are_those_of_the_record() -> None:
    found = document("resnet20")["findings"]
    tables = {t.attributes.get("id"): t for t in page("resnet20").all("table")}
    rows = [[cell.text for cell in row.all("td")] for row in tables["measured-search"].all("tr")][
        1:
    ]
    base = found["search"]["base"]["costs"]["weight_bits"]
    assert rows == [
        [
            point["name"],
            f"{point['costs']['weight_bits'] / base:.3f}",
            f"{-10 * math.log10(point['measured']['noise']):.1f} dB",
            f"{-10 * math.log10(point['predicted']):.1f} dB",
            f"{100 * point['measured']['top1']:.2f} %",
            "taken"
            if point["name"] == found["search"]["best"]
            else ("" if point["in_budget"] else "over the budget"),
        ]
        for point in found["search"]["points"]
    ]
    assert [row[-1] for row in rows].count("taken") == 1
    header, *losses = [
        [cell.text for cell in (*row.all("th"), *row.all("td"))]
        for row in tables["measured-sensitivity"].all("tr")
    ]
    texts = {
        (row[0], width): text for row in losses for width, text in zip(header, row, strict=True)
    }
    for loss in found["sensitivity"]["losses"]:
        text = texts[f"{loss['kind']} {loss['name']}", loss["width"]]
        assert text == f"{-10 * math.log10(loss['noise']):.1f}"
    marks = Counter(mark.text for mark in page("resnet20").all("text", class_="mark"))
    assert marks == Counter(
        f"{loss['kind']} {loss['name']} at {loss['width']}: "
        f"{-10 * math.log10(loss['noise']):.1f} dB{loss['width']}"
        for loss in found["sensitivity"]["losses"]
    )
    circles = page("resnet20").all("circle", class_="taken")
    assert len(circles) == 1
    assert circles[0].text.startswith(found["search"]["best"])


@pytest.mark.parametrize("name", NAMES)
def test_terminal_and_page_tell_the_same(name: str) -> None:
    text = re.sub(r"\s+", " ", str(stored(name)))
    view = view_of(document(name))
    root = page(name)
    listed = [re.sub(r"\s+", " ", item.text) for item in root.all("li")]
    for line in view.summary:
        assert line in listed
        assert re.sub(r"\s+", " ", line) in text
    (worst,) = root.all("ol", class_="worst")
    assert len(view.worst) == 5
    for advice in view.worst:
        assert f"{advice.where}: {advice.how_much}; {advice.why}" in text
        assert f"{advice.where}: {advice.how_much}" in worst.text
        assert advice.why in worst.text
        for way in advice.what:
            assert f"- {way}" in text
            assert way in worst.text
    for row in (view.rows[0], view.rows[-1]):
        detail = re.sub(r"\s+", " ", stored(name).detail(row.names[0]))
        for label, value in row.details:
            assert re.sub(r"\s+", " ", f"{label} {value}") in detail


# ---------------------------------------------------------------------------------------------
# Nothing runs that is not ours
# ---------------------------------------------------------------------------------------------


def policy(root: Element) -> str:
    (found,) = [
        meta.attributes["content"]
        for meta in root.all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_lets_our_script_and_style_through_and_nothing_else(name: str) -> None:
    root = page(name)
    rules = policy(root)
    assert rules.startswith("default-src 'none';")
    assert "unsafe" not in rules
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(root.one(tag).text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in rules
    assert not [e for e in root.all("g") if "style" in e.attributes]
    text = text_of(name)
    assert not re.search(r"<[^>]+\s(style|src|href|on\w+)=", text)
    assert not re.search(r"https?:|url\(|@import", text)


EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;"


def renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


@pytest.mark.parametrize("what", ["conv2d_1", "down1.0", "relu_1", "a8w4"])
def test_names_are_text_wherever_they_stand(what: str) -> None:
    changed = renamed(document("two_heads"), what, EVIL)
    text = Report.from_json(json.dumps(changed)).to_html(title=EVIL)
    root = page_of(text)
    assert EVIL not in text
    assert EVIL in root.one("h1").text
    assert EVIL in root.text.replace("alert(1)", "alert(1)")
    assert len(root.all("script")) == 1
    assert not root.all("img")
    assert root.one("script").text == page("two_heads").one("script").text
    assert policy(root) == policy(page("two_heads"))


def test_elements_escape_texts_and_attributes() -> None:
    found = str(element("p", EVIL, [1.5, None], title=EVIL, data_x=0.5, class_="a"))
    root = page_of(found)
    assert root.one("p").text == EVIL + "1.5"
    assert root.one("p").attributes == {"title": EVIL, "data-x": "0.5", "class": "a"}


# ---------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_shows_every_op_once_and_every_tensor(name: str) -> None:
    root, record = page(name), document(name)
    boxes = [box for svg in root.all("svg", class_="graph") for box in svg.all("g", class_="box")]
    kinds = Counter(box.attributes["class"].removeprefix("box ") for box in boxes)
    tally = stored(name).tally
    assert tally is not None
    for placement in Placement:
        assert kinds[placement.value.replace(" ", "-")] == tally.count(placement)
    assert kinds["input"] == len(record["inputs"]) + len(record["outputs"])
    # A box leads to a row of the table.
    assert {box.attributes["data-op"] for box in boxes if "data-op" in box.attributes} <= set(
        ops(root)
    )
    network = network_of(record)
    drawn = Counter(path.text for path in root.all("path") if " to " in path.text)
    titles = {box.key: box.title for box in network.boxes}
    for arrow in network.arrows:
        about = f"{arrow.label}, {arrow.border}" if arrow.border else arrow.label
        # Where it crosses from one column into the next, it is drawn in both.
        assert drawn[f"{titles[arrow.source]} to {titles[arrow.target]}: {about}"] >= 1
    assert len(drawn) == len({(a.source, a.target, a.label, a.border) for a in network.arrows})


def test_dtypes_and_borders_of_two_heads() -> None:
    network = network_of(document("two_heads"))
    titles = {box.key: box.title for box in network.boxes}
    arrows = {
        (titles[a.source], titles[a.target]): (a.label, a.border, a.in_float)
        for a in network.arrows
    }
    assert arrows["x", "conv2d"] == ("int16", "quantize", True)
    assert arrows["conv2d", "conv2d_1"] == ("int8", "quantize", True)
    assert arrows["conv2d_1", "max_pool2d"] == ("int8", "", False)
    assert arrows["conv2d_4", "conv2d_5"] == ("int16", "dequantize", True)
    assert arrows["conv2d_5", "sigmoid"] == ("int16", "", True)
    assert arrows["sigmoid", "output 1"] == ("float32", "", True)
    assert arrows["conv2d_1", "cat"] == ("int8", "", False)
    # Six parts of one op, one box.
    upsampling = [box for box in network.boxes if box.title == "upsample_nearest2d"]
    assert [box.subtitle for box in upsampling] == ["6 parts"]


class Several(nn.Module):
    """An op that takes indices, one with two results, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.topk(self.table(indices) + x * self.factor, 2)
        return torch.relu(values), places


def test_arrows_that_are_no_activations() -> None:
    example = (torch.randn(3, 4), torch.tensor([1, 2, 3]))
    converted = convert(Several(), example, IntegerQuantizer().set_global("a8w8")).graph
    network = network_of(json.loads(inspect(converted).to_json()))
    titles = {box.key: box.title for box in network.boxes}
    arrows = {(titles[a.source], titles[a.target]): a.label for a in network.arrows}
    assert arrows["indices", "embedding"] == "int64"
    assert ("topk", "getitem") in arrows
    assert ("topk", "getitem_1") in arrows
    assert arrows["getitem_1", "output 1"] == "int64"
    inner = {box.title for box in network.boxes} - {"output 0", "output 1"}
    assert {source for source, _ in arrows} == inner


def rectangles(svg: Element) -> list[tuple[float, float, float, float]]:
    found = []
    for box in svg.all("g", class_="box"):
        rect = box.one("rect").attributes
        x, y, w, h = (float(rect[key]) for key in ("x", "y", "width", "height"))
        found.append((x, y, x + w, y + h))
    return found


@st.composite
def networks(draw_from: st.DrawFn) -> Network:
    size = draw_from(st.integers(1, 40))
    boxes = [Box(f"b{i}", f"op_{i}", "conv", "integer kernel", op=f"op_{i}") for i in range(size)]
    arrows = {
        (i, j): Arrow(f"b{i}", f"b{j}", "int8")
        for j in range(1, size)
        for i in draw_from(st.sets(st.integers(0, j - 1), max_size=3))
    }
    return Network(tuple(boxes), tuple(arrows.values()))


@given(networks())
@settings(max_examples=40, deadline=None)
def test_any_network_is_drawn_whole_and_nothing_overlaps(network: Network) -> None:
    columns = [page_of(str(column)) for column in draw(network).columns]
    drawn = [box.attributes["data-op"] for c in columns for box in c.all("g", class_="box")]
    assert sorted(drawn) == sorted(box.op for box in network.boxes)
    place: dict[str, tuple[int, float]] = {}
    for index, column in enumerate(columns):
        view = [float(n) for n in column.one("svg").attributes["viewbox"].split()]
        found = rectangles(column)
        for box, (x, y, _, _) in zip(column.all("g", class_="box"), found, strict=True):
            place[box.attributes["data-op"]] = (index, y)
            assert view[0] <= x
            assert view[1] <= y
        for i, (a, b, c, d) in enumerate(found):
            assert c <= view[0] + view[2]
            assert d <= view[1] + view[3]
            for e, f, g, h in found[:i]:
                assert c <= e or g <= a or d <= f or h <= b
    for arrow in network.arrows:
        # Down a column, or on to a later one.
        assert place[f"op_{arrow.source[1:]}"] < place[f"op_{arrow.target[1:]}"]


def large(count: int, depth: int) -> Network:
    """Blocks of ten ops with a shortcut, as modules nested ``depth`` deep; 0: no modules."""
    boxes = [Box("in:x", "x", "input int8", "input")]
    arrows = []
    for i in range(count):
        path = ".".join(["net", f"stage{i // 200}", f"block{i // 10}", f"conv{i % 10}"][:depth])
        boxes.append(Box(f"op:{i}", f"conv_{i}", "conv", "integer kernel", path, op=f"conv_{i}"))
        arrows.append(Arrow(boxes[-2].key, boxes[-1].key, "int8"))
        if i % 10 == 9:
            arrows.append(Arrow(f"op:{i - 9}", f"op:{i}", "int8"))
    return Network(tuple(boxes), tuple(arrows))


@pytest.mark.parametrize("depth", slow_but([1, 3], range(5)))
def test_a_thousand_ops_are_drawn_module_by_module(depth: int) -> None:
    network = large(1000, depth)
    whole, *modules = pictures_of(network)
    roots = [page_of("".join(picture.columns)) for picture in (whole, *modules)]
    first = roots[0].all("g", class_="box")
    assert 1 < len(first) <= MOST_BOXES
    drawn = [box.attributes.get("data-op") for root in roots for box in root.all("g", class_="box")]
    assert sorted(filter(None, drawn)) == sorted(f"conv_{i}" for i in range(1000))
    place: dict[str, tuple[int, float]] = {}
    for index, column in enumerate(whole.columns):
        for box in page_of(str(column)).all("g", class_="box"):
            title = box.one("title").text.split(":")[0]
            place[title] = (index, float(box.one("rect").attributes["y"]))
    arrows = [path.text.split(": ")[0] for path in roots[0].all("path") if " to " in path.text]
    assert len(arrows) >= len(first) - 1
    for source, target in (arrow.split(" to ") for arrow in arrows):
        assert place[source] < place[target]
    folded = {box.attributes["data-module"] for box in first if "data-module" in box.attributes}
    assert folded == {picture.key for picture in modules}
    assert "" not in folded


def test_modules_that_are_left_and_entered_again_make_no_circle() -> None:
    paths = ["a", "b", "a", "b"] * 25
    boxes = tuple(Box(f"op:{i}", f"n{i}", "add", "integer kernel", p) for i, p in enumerate(paths))
    arrows = tuple(Arrow(a.key, b.key, "int8") for a, b in pairwise(boxes))
    pictures = pictures_of(Network(boxes, arrows))
    assert sum(p.columns != () for p in pictures) == len(pictures) > 1


# ---------------------------------------------------------------------------------------------
# Charts and advice
# ---------------------------------------------------------------------------------------------


def test_a_histogram_has_a_bar_for_every_bin_with_values() -> None:
    for tensor in document("two_heads")["findings"]["tensors"]["tensors"]:
        svg = page_of(str(histogram(tensor)))
        bars = [path for kind in ("bar", "cut") for path in svg.all("path", class_=kind)]
        count = sum(path.attributes["d"].count("M") for path in bars)
        assert count == sum(1 for bin_ in tensor["histogram"] if bin_)
        beyond = [*tensor["histogram"][:4], *tensor["histogram"][-4:]]
        cut = sum(path.attributes["d"].count("M") for path in svg.all("path", class_="cut"))
        assert cut == sum(1 for bin_ in beyond if bin_)
        share = sum(beyond) / sum(tensor["histogram"])
        assert share == pytest.approx(tensor["clipped_low"] + tensor["clipped_high"])


def changed_tensor(name: str, **values: Any) -> dict[str, Any]:
    record = json.loads(json.dumps(document("two_heads")))
    for tensor in record["findings"]["tensors"]["tensors"]:
        if tensor["name"] == name:
            tensor.update(values)
    return record


def test_the_worst_are_those_with_the_lowest_ratio_alone() -> None:
    tensors = document("resnet20")["findings"]["tensors"]["tensors"]
    lowest = sorted(t["alone"] for t in tensors if t["alone"] is not None)[:5]
    shown = [advice.how_much for advice in worst_ops(document("resnet20"))]
    assert [text.split(" dB alone")[0] for text in shown] == [f"{v:.1f}" for v in lowest]
    assert worst_ops({**document("resnet20"), "findings": None}) == ()
    # What a weight does to the outputs may be little, however coarse it is.
    (first, *_) = worst_ops(document("resnet20"))
    losses = document("resnet20")["findings"]["sensitivity"]["losses"]
    (loss,) = (x for x in losses if (x["name"], x["width"]) == ("conv2d_18", "w3"))
    assert first.op == "conv2d_18"
    ratio = -10 * math.log10(loss["noise"])
    end = f"; the outputs keep {ratio:.1f} dB with this weight alone rounded"
    assert first.why.endswith(end)


def test_advice_follows_what_the_error_is_made_of() -> None:
    by_op = {advice.op: advice for advice in worst_ops(document("two_heads"), 20)}
    weight = by_op["conv2d_1"]
    assert weight.why.startswith("most of that comes from its weight of 4 bits")
    assert weight.what[0] == "more bits: {node_name: conv2d_1, scheme: a8w8}"
    # The same op, had its weight no part in it.
    record = changed_tensor("relu_1", alone=10.0, clipped_high=0.02, unused_low=100, unused_high=0)
    (first, *_) = worst_ops(record)
    assert first.op == "conv2d_1"
    assert "most of that is its result" in first.why
    assert "2 % of its values are cut off" in first.why
    assert first.what[0].startswith("values are cut off: calibrate with data like these")
    assert "39 % of its integers never occur" in first.what[1]
    assert first.what[2].endswith("{node_name: conv2d_1, scheme: a16w4}")


# ---------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_record_with_findings_is_read_as_it_was_written(name: str) -> None:
    report = stored(name)
    assert Report.from_json(report.to_json()) == report
    assert document(name)["findings"]["version"] == 1


def test_what_no_report_can_take_is_refused() -> None:
    report = stored("two_heads")
    with pytest.raises(InputError, match="a report cannot take what is a int; it takes"):
        report.including(3)
    with pytest.raises(InputError, match="of kind 'plan'"):
        report.including({"kind": "plan"})
    with pytest.raises(InputError, match="the diagnosis has schema version 9"):
        report.including({"kind": "diagnosis", "schema_version": 9})
    damaged = {"kind": "diagnosis", "schema_version": 1, "samples": "many", "tensors": []}
    with pytest.raises(InputError, match="the diagnosis is damaged at samples"):
        report.including(damaged)


def small_record() -> dict[str, Any]:
    """A few ops of ResNet-20 with all kinds of findings."""
    record = json.loads(json.dumps(document("resnet20")))
    record["rows"] = record["rows"][:3]
    names = {row["node"] for row in record["rows"]}
    findings = record["findings"]
    findings["tensors"]["tensors"] = findings["tensors"]["tensors"][:4]
    for kept in (findings["tensors"]["weights"], findings["sensitivity"]["losses"]):
        kept[:] = [entry for entry in kept if entry["name"] in names]
    findings["search"]["points"] = findings["search"]["points"][:3]
    return record


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in a record; of a list the first entry stands for all."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


def refusal(record: dict[str, Any]) -> str:
    """Why a record is not read; empty: it is, and shown."""
    try:
        report = Report.from_json(json.dumps(record))
    except InputError as error:
        return str(error)
    report.to_html()
    str(report)
    return ""


JUNK = (None, -1, 0, 1e999, "x", [], {})


@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_whatever_findings_hold_is_shown_or_refused(junk: Any) -> None:
    messages, text = [], json.dumps(small_record())
    for place in leaves(json.loads(text)["findings"]):
        record = json.loads(text)
        holder: Any = record
        *before, last = ("findings", *place)
        for key in before:
            holder = holder[key]
        holder[last] = junk
        messages.append(refusal(record))
    refused = [message for message in messages if message]
    assert len(refused) > 40
    assert all("damaged at findings" in message for message in refused)
    if junk in (None, 0):
        assert len(messages) - len(refused) > 5


def test_what_was_measured_of_another_network_is_refused() -> None:
    found = json.loads(json.dumps(document("resnet20")["findings"]["sensitivity"]))
    found |= {"kind": "sensitivity", "schema_version": 1}
    message = "the sensitivity is of another network than the report: it has 'conv2d_6'"
    with pytest.raises(InputError, match=message):
        stored("two_heads").including(found)
    assert stored("resnet20").including(found) == stored("resnet20")


@pytest.mark.slow
def test_a_page_of_a_thousand_ops() -> None:
    record = json.loads(json.dumps(document("two_heads")))
    rows, record["findings"] = record["rows"], None
    record["rows"] = []
    for block in range(50):
        copies = json.loads(json.dumps(rows))
        for row in copies:
            for key in ("node", "written"):
                row[key] = f"{row[key]}_{block}" if row[key] else ""
            row["path"] = f"block{block}.{row['path']}".rstrip(".")
            for tensor in (*row["inputs"], row["output"]):
                # What the first op of a block takes is the last result of the one before.
                if tensor["source"] != "x":
                    tensor["source"] += f"_{block}"
                elif block:
                    tensor["source"] = f"sigmoid_{block - 1}"
        record["rows"] += copies
    text = Report.from_json(json.dumps(record)).to_html()
    root = page_of(text)
    assert len(ops(root)) == 50 * len(rows) > 1000
    whole, *_ = root.all("div", class_="columns")
    assert len(whole.all("g", class_="box")) == 50 + 3
    assert len(root.all("details", class_="module")) == 50
    assert len(text) < 6_000_000


def test_what_is_new_replaces_what_was_there() -> None:
    fidelity = {"kind": "fidelity", "samples": 3, "outputs": [], "warnings": ["look"]}
    found = Findings().including(fidelity)
    assert found.including({**fidelity, "samples": 4}).fidelity != found.fidelity
    report = stored("two_heads").including(fidelity)
    assert report.findings is not None
    assert report.findings.tensors is not None
    assert "warning: look" in str(report)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_elements_have_one_id(name: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', text_of(name))
    assert len(ids) == len(set(ids)) > 5


def test_what_the_docs_quote_is_what_reports_say() -> None:
    section = (DOCS / "reports.md").read_text(encoding="utf-8").split("## The page\n")[1]
    quoted = re.findall(
        r"^```text\n(.*?)^```$", section.split("\n## ")[0], re.MULTILINE | re.DOTALL
    )
    assert len(quoted) == 1
    assert all(text in f"{stored('resnet20')}\n" for text in quoted)


def test_a_page_without_findings_still_opens(tmp_path: Any) -> None:
    record = {**document("two_heads"), "findings": None}
    text = Report.from_json(json.dumps(record)).to_html()
    root = page_of(text)
    assert "not measured" in root.text
    assert root.all("svg", class_="graph")
    write_text_atomic(tmp_path / "page.html", text)
