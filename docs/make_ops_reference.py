"""Write the table of op families in ops.md, from the registry.

Run it after a change of the registry: ``python docs/make_ops_reference.py``. A test fails while
the table is out of date.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.fx import GraphModule

from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.core.files import write_text_atomic
from custom_quantizer.ops import REGISTRY, Formats, OpRule, rule_of
from custom_quantizer.ops.rewrites.canonical import canonicalize

REFERENCE_FILE = Path(__file__).resolve().parent / "ops.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"
HEADER = "| family | aten ops | a8w8 | a8w4 | a16w8 |\n| --- | --- | --- | --- | --- |\n"


def reference_text(current: str) -> str:
    """``current`` with a fresh table between the markers."""
    before, rest = current.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + HEADER + "".join(map(row, REGISTRY)) + END + after


def row(rule: OpRule) -> str:
    """One line of the table."""
    names = sorted({str(target).split(".")[1] for target in rule.targets if "." in str(target)})
    ops = ", ".join(f"`{name}`" for name in names) or "pieces of a split"
    return f"| {rule.family} | {ops} | {' | '.join(backends(rule, w) for w in WIDTHS)} |\n"


WIDTHS = ((8, 8), (8, 4), (16, 8))
"""Bits of activations and weights."""


def backends(rule: OpRule, bits: tuple[int, int]) -> str:
    """Where the calls of all examples of a family run, the most frequent place first."""
    in_float = bool(BACKEND.support(rule).float_reason)
    if in_float and bits != WIDTHS[0]:
        return ""
    found: list[str] = []
    for graph in graphs(rule):
        for node in graph.graph.nodes:
            bound = rule.match(rule, node) if rule_of(node) is rule else "another family"
            if isinstance(bound, str):
                continue
            if in_float:
                found.append(BACKEND.in_float(node).placement.value)
                continue
            if bound.weight is None and bits == WIDTHS[1]:
                continue  # as with a8w8
            formats = Formats(bits[0], bits[1] if bound.weight is not None else None)
            found.append(BACKEND.predict(bound, formats).kernel.label.removeprefix("xnnpack "))
    return "; ".join(sorted(dict.fromkeys(found), key=lambda place: -found.count(place)))


def graphs(rule: OpRule) -> list[GraphModule]:
    """The examples of a family, as the planner sees them."""
    captured = []
    for case in rule.cases:
        torch.manual_seed(0)
        example = tuple(torch.randn(shape) for shape in case.shapes)
        graph = torch.export.export(case.build().eval(), example).module()
        captured.append(canonicalize(graph, BACKEND.legalize))
    return captured


def main() -> None:
    """Write the table."""
    current = REFERENCE_FILE.read_text(encoding="utf-8")
    write_text_atomic(REFERENCE_FILE, reference_text(current))


if __name__ == "__main__":
    main()
