"""The registry itself: names, claims, and that every family has its tests."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contracts import RULES, Contract, cases_of
from support.graphs import canonicalize

from custom_quantizer.errors import CustomQuantizerError
from custom_quantizer.ops import REGISTRY, _index, known_targets


def test_names_of_families_and_cases_are_unique() -> None:
    assert len(RULES) == len(REGISTRY)
    for rule in REGISTRY:
        names = [case.name for case in cases_of(rule)]
        assert len(set(names)) == len(names), rule.family


@pytest.mark.slow
def test_every_claimed_overload_is_reached_by_a_case() -> None:
    reached: set[Any] = set()
    for rule in REGISTRY:
        for case in cases_of(rule):
            example = tuple(torch.randn(shape) for shape in case.shapes)
            exported = torch.export.export(case.build().eval(), example)
            reached |= {node.target for node in canonicalize(exported.module()).graph.nodes}
    assert set(known_targets()) == reached & set(known_targets())


def test_two_families_that_claim_one_op_are_an_error() -> None:
    with pytest.raises(CustomQuantizerError, match=r"claimed by two families, conv and conv"):
        _index((RULES["conv"], RULES["conv"]))


def test_every_family_is_covered_by_exactly_one_file() -> None:
    covered: list[str] = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, kind in vars(importlib.import_module(path.stem)).items():
            own = isinstance(kind, type) and kind.__module__ == path.stem
            if own and issubclass(kind, Contract):
                assert name.startswith("Test"), "pytest would not find it"
                covered.extend(kind.families)
    assert Counter(covered) == Counter(list(RULES))
