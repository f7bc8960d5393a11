"""Every op of the registry: the integer reference in its modes, and NumPy from saved integers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from support.bundles import assert_bundle_equals_fixed_point
from support.models import Converted, convert, randomize_batch_norms
from support.registry import LEFT_IN_FLOAT, Surrounded, cases_and_schemes
from torch import Tensor

import custom_quantizer as cq
from custom_quantizer.ops import REGISTRY, Case, OpRule

MODES = ("xnnpack", "fixed_point", "exact")
CASES = [
    pytest.param(rule, case, id=f"{rule.family}-{case.name}")
    for rule in REGISTRY
    for case in rule.cases
    if rule.integers is not None and rule not in LEFT_IN_FLOAT
]
OF_SCHEMES = cases_and_schemes("a8w8", "a16w8", of_weights="a8w4-per_tensor")
FIRST_OF_FAMILIES = [
    pytest.param(
        *found.values,
        id=found.id,
        marks=found.marks if found.values[1] is found.values[0].cases[0] else pytest.mark.slow,
    )
    for found in OF_SCHEMES
]
"""Slow is, too, what is not the first case of its family."""

NOT_EXPRESSED = {("div", "tensors"), ("div", "broadcast")}
"""Families and cases of which saved integers say nothing."""


@cache
def converted_case(rule: OpRule, case: Case, scheme: str) -> Converted:
    torch.manual_seed(0)
    model = randomize_batch_norms(Surrounded(rule, case)).eval()
    return convert(model, random_inputs(case, 1), scheme)


def random_inputs(case: Case, seed: int, amplitude: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) * amplitude for shape in case.shapes)


def integers_of(converted: Converted, mode: str, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    reference = cq.integer_reference(converted.graph, mode)
    assert not reference.float_ops
    _, integers = reference.with_integers(*inputs)
    return integers


@pytest.mark.parametrize(("rule", "case", "scheme"), FIRST_OF_FAMILIES)
def test_fixed_point_is_within_one_unit_of_exact(rule: OpRule, case: Case, scheme: str) -> None:
    converted = converted_case(rule, case, scheme)
    for amplitude in (1.0, 20.0):
        inputs = random_inputs(case, 3, amplitude)
        fixed = integers_of(converted, "fixed_point", inputs)
        exact = integers_of(converted, "exact", inputs)
        assert fixed.keys() == exact.keys()
        # An op whose inputs already differ by a unit may differ by more; the first never does.
        for name, values in fixed.items():
            difference = int((values.long() - exact[name].long()).abs().max())
            inputs_equal = _inputs_equal(converted, name, fixed, exact)
            assert difference <= 1 or not inputs_equal, name


def _inputs_equal(
    converted: Converted, name: str, a: dict[str, Tensor], b: dict[str, Tensor]
) -> bool:
    """Whether all quantized tensors before ``name`` in the graph are the same in both runs."""
    order = [node.name for node in converted.graph.graph.nodes]
    earlier = [key for key in a if order.index(key) < order.index(name)]
    return all(torch.equal(a[key], b[key]) for key in earlier)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_only_integers_between_quantize_and_dequantize(rule: OpRule, case: Case, mode: str) -> None:
    converted = converted_case(rule, case, "a8w8")
    for name, values in integers_of(converted, mode, converted.example).items():
        assert not values.dtype.is_floating_point, name
        assert int(values.min()) >= -128
        assert int(values.max()) <= 127


@pytest.mark.parametrize(
    ("rule", "case", "scheme"),
    [
        found
        for found in OF_SCHEMES
        if (found.values[0].family, found.values[1].name) not in NOT_EXPRESSED
    ],
)
def test_every_registered_op_runs_with_numpy_bit_for_bit(
    rule: OpRule, case: Case, scheme: str, tmp_path: Path
) -> None:
    # Beyond the range seen in calibration, so that something saturates.
    wide = random_inputs(case, 2, 2.5)
    graph = converted_case(rule, case, scheme).graph
    assert_bundle_equals_fixed_point(graph, tmp_path / "case", *wide)
