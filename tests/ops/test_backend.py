"""Backends as values: ops know none of them, and pure integers need none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer import ops
from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.ops import REGISTRY, Case, OpRule, QParamSharing
from custom_quantizer.ops.backend import INTEGERS, backend_names, get_backend
from custom_quantizer.ops.placement import Placement, tally

FOLDER = Path(ops.__file__).parent


def test_ops_know_no_backend_by_name() -> None:
    words = (*backend_names(), "executorch")
    found = [
        f"{path.relative_to(FOLDER)}: {word}"
        for path in sorted(FOLDER.rglob("*.py"))
        for word in words
        if word in path.read_text(encoding="utf-8").lower()
    ]
    assert not found


def test_backends_are_found_by_name() -> None:
    assert backend_names() == ("tosa", "xnnpack")
    assert get_backend("xnnpack") is get_backend(BACKEND) is BACKEND
    assert get_backend(None) is INTEGERS


def test_an_unknown_backend() -> None:
    with pytest.raises(
        cq.ConfigError, match="no backend 'tflite'; choose one of tosa, xnnpack, or"
    ):
        cq.IntegerQuantizer(backend="tflite")


def test_overloads_that_a_backend_lists_are_of_no_family() -> None:
    """Of a family it says more: whether it is float depends on the call."""
    assert BACKEND.float_targets.isdisjoint(ops.known_targets())


def test_a_family_without_an_entry_is_float_and_says_so() -> None:
    without = replace(BACKEND, kernels={k: v for k, v in BACKEND.kernels.items() if k != "linear"})
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(6, 5))
    done = convert(model, (torch.randn(2, 3, 6),), cq.IntegerQuantizer(without).set_global("a8w8"))
    op = done.plan.op("linear")
    assert op.scheme is None
    assert op.reason == "XNNPACK has no integer linear"
    assert op.placement == "float inside"
    assert done.plan.op("conv1d").scheme == "a8w8"


# ---------------------------------------------------------------------------------------------
# Pure integers
# ---------------------------------------------------------------------------------------------


class FarApart(nn.Module):
    """A sum that nearly cancels: its scale is a thousand times smaller than its inputs'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.linear(a + b)
        return out


def far_apart() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    a = torch.randn(64, 8)
    return FarApart().eval(), (a, -a + 1e-3 * torch.randn(64, 8))


@pytest.mark.parametrize("backend", ["xnnpack", None])
def test_limits_of_a_backend_are_not_those_of_pure_integers(
    backend: str | None, tmp_path: Path
) -> None:
    model, inputs = far_apart()
    quantizer = cq.IntegerQuantizer(backend).set_global("a8w8")
    converted = convert(model, inputs, quantizer).graph
    # XNNPACK's kernel refuses the scales, so that its reference adds in float, and says so.
    (refused,) = cq.integer_reference(converted, "xnnpack").float_ops
    assert refused.node.name == "add"
    assert "XNNPACK has no integer kernel for its scales" in refused.reason
    for mode in ("fixed_point", "exact"):
        assert cq.integer_reference(converted, mode).float_ops == ()
    equal_bundle(converted, inputs, tmp_path)


def equal_bundle(converted: Any, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """The integers of the bundle are those of the reference, none of whose ops is float."""
    reference = cq.integer_reference(converted, "fixed_point")
    assert reference.float_ops == ()
    want, integers = reference.with_integers(*inputs)
    cq.save_integers(converted, folder / "bundle")
    got, stored = cq.load_integers(folder / "bundle").with_integers(*(x.numpy() for x in inputs))
    np.testing.assert_array_equal(got[0] if isinstance(got, tuple) else got, first(want).numpy())
    shared = stored.keys() & integers.keys()
    assert shared
    for name in shared:
        np.testing.assert_array_equal(stored[name], integers[name].numpy(), err_msg=name)


def first(outputs: Any) -> Tensor:
    tensor = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
    assert isinstance(tensor, Tensor)
    return tensor


CASES = [
    pytest.param(
        *(rule, case),
        id=f"{rule.family}-{case.name}",
        marks=() if case is rule.cases[0] else pytest.mark.slow,
    )
    for rule in REGISTRY
    for case in rule.cases
    if rule.integers is not None and rule.sharing is QParamSharing.OWN
]


@pytest.mark.parametrize(("rule", "case"), CASES)
def test_every_family_with_a_meaning_on_integers_is_planned_on_them(
    rule: OpRule, case: Case
) -> None:
    """Alone, between float tensors, where a backend would leave some in float."""
    torch.manual_seed(0)
    model = case.build().eval()
    example = tuple(torch.randn(shape) for shape in case.shapes)
    quantizer = cq.IntegerQuantizer(backend=None).set_global("a8w8")
    ops_ = quantizer.plan(torch.export.export(model, example)).ops
    found = [op for op in ops_ if op.scheme is None and "float tensor" not in op.reason]
    assert [f"{op.node}: {op.reason}" for op in found] == []
    wanted = {Placement.INTEGER.value, Placement.TABLE.value}
    assert {op.placement for op in ops_ if op.scheme is not None} <= wanted


@pytest.mark.parametrize("scheme", ["a8w8", "a16w8", "a4w4"])
def test_a_network_of_what_backends_constrain(scheme: str, tmp_path: Path) -> None:
    """Scales for each channel of a grouped transposed convolution, products with any zero point,
    averages of windows, at any width: all on integers, equal in the bundle.
    """
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.relu(m.up(x)), 3, 1, 1)
        y = F.silu(y).flatten(2)
        return y @ F.relu(y).transpose(1, 2)

    model = Function(forward, up=nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2))
    example = (torch.randn(2, 4, 5, 5),)
    quantizer = cq.IntegerQuantizer(backend=None).set_global(scheme)
    done = convert(model, example, quantizer)
    assert done.plan.floating == ()
    (weight,) = (t for t in done.plan.op("conv_transpose2d").tensors if t.role == "weight")
    assert weight.reason == "constant weight"
    equal_bundle(done.graph, (torch.randn(2, 4, 5, 5) * 2,), tmp_path)


def test_what_is_planned_for_no_backend_can_be_lowered() -> None:
    torch.manual_seed(0)
    model = Function(
        lambda s, x: (lambda y: y @ F.relu(y).transpose(1, 2))(s.up(x).flatten(2)),
        up=nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2),
    )
    done = convert(model, (torch.randn(2, 4, 5, 5),), cq.IntegerQuantizer(None).set_global("a8w8"))
    lowered = cq.lower(done.graph, done.example)
    reasons = {row.node: row.reason for row in lowered.report.not_integer()}
    assert lowered.report.fully_delegated
    assert "no per-channel kernel for grouped" in reasons["conv_transpose2d"]
    assert reasons["matmul"] == "the zero point of its second operand is not 0"


@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4g32"])
def test_scales_of_run_time_are_no_integers_to_write_down(scheme: str) -> None:
    quantizer = cq.IntegerQuantizer(backend=None).set_global(scheme)
    with pytest.raises(cq.ConfigError, match=f"{scheme} quantizes at run time; choose a scheme"):
        quantizer.plan(torch.export.export(nn.Linear(32, 4).eval(), (torch.randn(2, 32),)))


def test_biases_have_the_whole_accumulator_without_a_backend() -> None:
    """A serializer's limit raises the weight scale of a large bias; no serializer, no limit."""
    layer = nn.Linear(2, 1)
    layer.weight.data.fill_(1e-3)
    layer.bias.data.fill_(300.0)
    largest = []
    for backend in ("xnnpack", None):
        graph = convert(layer, (torch.rand(4, 2),), cq.IntegerQuantizer(backend).set_global("a8w8"))
        (op,) = cq.integer_reference(graph.graph, "fixed_point").graph.with_bias()
        assert op.bias is not None
        largest.append(int(op.bias.abs().max()))
    assert largest[0] <= BACKEND.limits.narrow < largest[1]


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


def test_a_tally_counts_what_was_written_by_its_least_integer_part() -> None:
    found = tally(
        [
            ("conv", Placement.INTEGER),
            ("attention", Placement.INTEGER),
            ("attention", Placement.FLOAT),
            ("attention", Placement.FOLDED),
            ("view", Placement.FOLDED),
        ]
    )
    assert str(found) == "3 ops: 1 integer kernel, 1 float inside, 1 folded away"
    assert found.total == 3
    assert found.count(Placement.FLOAT) == 1


def test_kernels_say_what_they_compute_on() -> None:
    assert kernels.INT8.placement is Placement.INTEGER
    assert kernels.TABLE.placement is Placement.TABLE
