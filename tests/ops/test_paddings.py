"""Pads in front of max pools and of patches, with what no integer stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.graphs import Function, calls, canonicalize, capture, lowered_exactly, quantized
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq

aten = torch.ops.aten
LOW = (-torch.inf, torch.finfo(torch.float32).min, -65504.0, -1e9)


def padded_pool(amounts: list[int], value: float, window: tuple[Any, ...]) -> nn.Module:
    def forward(_self: Any, x: Tensor) -> Tensor:
        pool = (F.max_pool1d, F.max_pool2d)[x.dim() - 3]
        return pool(F.pad(x, amounts, value=value), *window)

    return Function(forward)


def pads(graph: GraphModule) -> list[str]:
    """Modes of the pads of a graph; a number has none."""
    found = calls(graph, aten.pad.default) + calls(graph, aten.constant_pad_nd.default)
    return [str(node.args[2]) if len(node.args) > 2 else "constant" for node in found]


@pytest.mark.slow
@given(
    image=st.booleans(),
    sizes=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    amounts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=2),
    value=st.sampled_from(LOW),
    kernel=st.integers(2, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_windows_have_the_values_they_had(
    image: bool,
    sizes: tuple[int, int],
    amounts: list[tuple[int, int]],
    value: float,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
) -> None:
    dims = 2 if image else 1
    given_amounts = [p for pair in amounts[:dims] for p in pair]
    assume(2 * padding <= kernel)
    x = torch.randn(2, 3, *sizes[:dims])
    window = (kernel, stride, padding, dilation, ceil_mode)
    model = padded_pool(given_amounts, value, window)
    try:
        wanted = model(x)
    except RuntimeError:  # no window fits
        assume(False)
    graph = canonicalize(capture(model, (x,)))
    torch.testing.assert_close(graph(x), wanted, rtol=0, atol=0)
    reached = max(p + padding for p in given_amounts)
    if dilation == 1 and not ceil_mode and reached < kernel:
        assert "constant" not in pads(graph)


# Amounts, window, shape, and whether values are repeated: as TensorFlow pads for "same" sizes,
# evenly, and on one side alone.
FORMS: dict[str, tuple[list[int], tuple[Any, ...], tuple[int, ...], bool]] = {
    "same": ([0, 1, 0, 1], (3, 2), (2, 4, 8, 8), False),
    "same, odd": ([1, 1, 1, 1], (3, 2), (2, 4, 9, 9), False),
    "same, of a large window": ([1, 2, 1, 2], (5, 2), (2, 4, 8, 8), False),
    "beside its own": ([0, 1, 0, 1], (3, 2, 1), (2, 4, 8, 8), False),
    "one dim": ([0, 0, 1, 1], (3, 1), (2, 4, 8, 8), False),
    "before": ([1, 0, 1, 0], (2, 1), (2, 4, 8, 8), True),
    "causal": ([3, 0], (4, 1), (2, 4, 12), True),
}


@pytest.mark.parametrize("name", slow_but(list(FORMS)[::3], FORMS))
@pytest.mark.parametrize("value", slow_but([-torch.inf], [-torch.inf, -1e9]))
def test_pools_of_pads_are_integers_in_one_delegate(name: str, value: float) -> None:
    amounts, window, shape, repeats = FORMS[name]
    x = torch.randn(shape)
    layer = nn.Conv1d(4, 4, 1) if len(shape) == 3 else nn.Conv2d(4, 4, 1)
    model = nn.Sequential(layer, padded_pool(amounts, value, window), type(layer)(4, 4, 1))
    written = capture(model, (x,)).graph
    assert len([n for n in written.nodes if "pad" in str(n.target)]) == 1
    graph = canonicalize(capture(model[1], (x,)))
    assert pads(graph) == []
    assert (len(list(graph.graph.nodes)) > 5) == repeats
    program = lowered_exactly(quantized(model, (x,)), (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())


def test_a_pad_that_is_read_elsewhere_stays_there() -> None:
    def forward(_self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (0, 1, 0, 1), value=-torch.inf)
        return F.max_pool2d(padded, 3, 2), padded

    x = torch.randn(2, 4, 8, 8)
    graph = canonicalize(capture(Function(forward), (x,)))
    for got, wanted in zip(graph(x), forward(None, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert pads(graph) == ["constant"]


@pytest.mark.parametrize("value", [0.0, 1.0, -100.0])
def test_numbers_that_may_be_the_largest_are_padded(value: float) -> None:
    x = torch.randn(2, 4, 8, 8) - 200
    model = padded_pool([0, 1, 0, 1], value, (3, 2))
    graph = canonicalize(capture(model, (x,)))
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    assert pads(graph) == ["constant"]


def test_dynamic_sizes_stay_dynamic() -> None:
    size = torch.export.Dim("size", min=4, max=64)
    model = padded_pool([1, 1, 1, 1], -torch.inf, (3, 1))
    graph = canonicalize(
        capture(model, (torch.randn(2, 4, 8, 8),), dynamic_shapes=(({2: size, 3: size},),))
    )
    assert pads(graph) == []
    other = torch.randn(2, 4, 11, 11)
    torch.testing.assert_close(graph(other), model(other), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# Patches, and what else reads a pad
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-torch.inf, 1.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_of_a_pad_are_those_of_zeros_and_numbers(channels: int, value: float) -> None:
    """Minus infinity times the zeros of the products that pick a value would be no number."""

    def forward(_self: Any, x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, (1, 0, 2, 1), value=value), 3, padding=1, stride=2)

    x = torch.randn(2, channels, 7, 8)
    graph = canonicalize(capture(Function(forward), (x,)))
    assert torch.equal(graph(x), forward(None, x))
    assert [node.args[2:] for node in calls(graph, aten.constant_pad_nd.default)] == [(0,)]
    assert calls(graph, aten.pad.default) == []


ENDLESS = {
    "patches": lambda y: F.unfold(F.pad(y, (1, 1, 1, 1), value=-torch.inf), 3).softmax(1),
    "moved": lambda y: F.pad(y, (1, 1), value=-torch.inf).flatten(2).mT.softmax(1),
    "bounded": lambda y: F.pad(y, (2, 0), value=-65504.0).permute(0, 2, 3, 1).clamp(min=-3),
    "largest": lambda y: F.pad(y, (1, 1), value=torch.inf).unfold(3, 3, 1).amin(-1),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_is_padded_with_infinity_is_float_until_it_is_finite(name: str) -> None:
    model = Function(lambda s, x: ENDLESS[name](s.layer(x)), layer=nn.Conv2d(3, 3, 1)).eval()
    x = torch.randn(1, 3, 6, 6)
    program = cq.lower(quantized(model, (x,)), (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert program.run(x).isfinite().all()
