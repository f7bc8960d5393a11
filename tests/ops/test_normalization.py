"""Norms: as near as derived, in float inside the delegate, and why where they are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.contracts import FloatContract
from support.fuzz import check_each_tensor
from support.graphs import Function, calls, capture
from support.models import convert
from support.selection import slow_but
from torch import nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.passes import PASSES

aten = torch.ops.aten
PASS = {graph_pass.name: graph_pass for graph_pass in PASSES}


@pytest.mark.parametrize(("size", "shift", "spread"), [(16, 0, 1), (768, 0, 3), (384, 30, 0.5)])
def test_a_layer_norm_is_as_near_as_derived(size: int, shift: float, spread: float) -> None:
    """The bound in ``xnnpack/passes/normalization.py``, against float64."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(size, elementwise_affine=False)
    x = torch.randn(50, size) * spread + shift
    graph = capture(norm, (x,))
    assert PASS["layer_norms_to_linears"].run(graph) == 1
    graph.recompile()
    assert not calls(graph, aten.layer_norm.default)
    exact = F.layer_norm(x.double(), (size,))
    deviation = (x.double().var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    r = x.double().abs().amax(1, keepdim=True) / deviation
    bound = ((size + 1) * r * (1 + exact.abs()) + (size / 2 + 6) * exact.abs()) * 2.0**-24
    assert ((graph(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("groups", "shape", "terms"),
    [(2, (3, 8, 5, 6), 120), (1, (2, 24, 16, 16), 64 + 96 + 1), (4, (2, 8, 61, 41), 61 + 82 + 1)],
)
def test_a_group_norm_is_as_near_as_derived(
    groups: int, shape: tuple[int, ...], terms: int
) -> None:
    """As a layer norm; ``terms`` is ``n``, or ``a + b + 1`` of a mean of means."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, shape[1], affine=False)
    x = torch.randn(shape) * 3 + 1
    graph = capture(norm, (x,))
    assert PASS["group_norms_to_linears"].run(graph) == 1
    graph.recompile()
    assert not calls(graph, aten.group_norm.default)
    assert max(v.numel() for n, v in graph.named_buffers() if "norm_row" in n) <= terms
    exact = F.group_norm(x.double(), groups).flatten(1).reshape(shape[0], groups, -1)
    rows = x.double().reshape(exact.shape)
    deviation = (rows.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    r = rows.abs().amax(2, keepdim=True) / deviation
    bound = ((terms + 1) * r * (1 + exact.abs()) + (terms / 2 + 6) * exact.abs()) * 2.0**-24
    assert ((graph(x).double().reshape(exact.shape) - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "name",
    slow_but(["group_norm"], ["group_norm", "instance_norm", "rms_norm"]),
)
def test_norms_stay_in_the_delegate(name: str) -> None:
    """Between convolutions: float inside the delegate, each tensor within its bound."""
    torch.manual_seed(0)
    norm: nn.Module
    norm = {
        "group_norm": nn.GroupNorm(2, 8),
        "instance_norm": nn.InstanceNorm2d(8, affine=True),
        "rms_norm": nn.RMSNorm([9, 9]),
    }[name]
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 3))
    done = convert(model, (torch.randn(2, 3, 9, 9),))
    lowered = cq.lower(done.graph, done.example)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    (row,) = (row for row in lowered.report.ops if row.node == name)
    assert row.backend is kernels.FLOAT
    assert row.reason.startswith("XNNPACK has no integer ")
    check_each_tensor(done)


def test_norms_that_stay_outside_say_why() -> None:
    x = torch.randn(2, 8, 9, 9)
    conv = nn.Conv2d(8, 8, 3)
    model = Function(lambda s, x: F.group_norm(s.conv(x), 2, s.conv(x).mean((0, 2, 3))), conv=conv)
    (op,) = (op for op in convert(model, (x,)).plan.ops if op.node.startswith("group_norm"))
    assert op.reason == "its weight is computed"


class TestContract(FloatContract):
    families = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "vector_norm")
