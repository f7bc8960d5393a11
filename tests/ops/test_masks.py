"""Masks as sums and products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.graphs import (
    Function,
    calls,
    canonicalize,
    capture,
    differences,
    lowered_exactly,
    quantized,
)
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.ops import match_of

aten = torch.ops.aten

SCORES = (2, 3, 4, 4)
CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
ENDS = torch.tensor([-1e-6, 0.0, 2.0, 3.0])
KEPT = torch.tensor([True, False, True, True])


BEFORE = torch.zeros(CAUSAL.shape).masked_fill(CAUSAL, -math.inf)


def zeros(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores)


def soft(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


# What the mask does, how many of its ops have no family: a condition that is an input.
CASES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "causal": (lambda x, m: soft(x.masked_fill(CAUSAL, float("-inf"))), 0),
    "causal, by where": (lambda x, m: soft(torch.where(~CAUSAL, x, torch.tensor(-1e9))), 0),
    "causal, smallest number": (
        lambda x, m: soft(x.masked_fill(CAUSAL, torch.finfo(torch.float32).min)),
        0,
    ),
    "causal, as float32": (
        lambda x, m: soft(x.masked_fill(CAUSAL, -math.inf).float()),
        1,
    ),  # a check
    "causal, dropped out": (
        lambda x, m: soft(F.dropout(x.masked_fill(CAUSAL, -math.inf), 0.1, training=False)),
        0,
    ),
    "causal, whose dtype is asked for": (
        lambda x, m: soft(y := x.masked_fill(CAUSAL, -math.inf)).type_as(y).view_as(y),
        0,
    ),
    "causal, exponential": (lambda x, m: x.masked_fill(CAUSAL, -math.inf).exp(), 0),
    "given, exponential": (lambda x, m: x.masked_fill(m, -math.inf).exp(), 1),
    "given": (lambda x, m: soft(x.masked_fill(m, float("-inf"))), 1),
    "given, kept": (lambda x, m: soft(torch.where(m, x, -1e9)), 1),
    "given, added to scores": (lambda x, m: soft(x + zeros(x).masked_fill(m, -math.inf)), 1),
    "given, moved and added": (
        lambda x, m: soft((x + zeros(x).masked_fill(m, -math.inf).transpose(2, 3)).mT),
        1,
    ),
    "given, and captured": (
        lambda x, m: soft(x + (zeros(x).masked_fill(m, -math.inf) + BEFORE)),
        1,
    ),
    "zeros": (lambda x, m: x.masked_fill(~KEPT, 0.0), 0),
    "a number": (lambda x, m: x.masked_fill(~KEPT, 1.5), 0),
    "a number first": (lambda x, m: torch.where(KEPT, 0.25, x), 0),
    "of two": (lambda x, m: torch.where(KEPT, x, x * 2), 0),
    "of two, one of them a bounded exponential": (
        lambda x, m: torch.where(KEPT, x, x.clamp(max=0).exp() + torch.min(x, ENDS).exp()),
        0,
    ),
    "of two, given": (lambda x, m: torch.where(m, x, x * 2), 1),
    "tril": (lambda x, m: x.tril(), 0),
    "triu": (lambda x, m: x.triu(1), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_numbers(name: str) -> None:
    function, outside = CASES[name]
    model = Function(lambda s, x, m: function(x, m))
    x, given = torch.randn(SCORES) * 10, torch.rand(SCORES) > 0.6
    given[..., 0] = "kept" in name  # no row is left out completely
    graph = canonicalize(capture(model, (x, given)))
    left = [n for n in graph.graph.nodes if n.op == "call_function"]
    unknown = [n for n in left if match_of(n) is None]
    assert len(unknown) == outside
    assert torch.equal(graph(x, given), model(x, given))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(KEPT, torch.log(x), 0.0),  # no number where it is not wanted
        lambda x: torch.where(KEPT, 1 / x, x),
        lambda x: torch.where(KEPT, x, torch.exp(x.clamp(max=100) * 10)),
        lambda x: torch.where(KEPT, x, torch.exp(torch.min(x, 1e3 * ENDS))),
        lambda x: torch.exp((1 / x).masked_fill(~KEPT, -math.inf)),
        lambda x: torch.exp(x.masked_fill(~KEPT, -50.0)),  # exp of it is no zero
        lambda x: x.masked_fill(~KEPT, -1e9),  # no softmax reads it
        lambda x: x.masked_fill(~KEPT, float("inf")),
        lambda x: (soft(y := x.masked_fill(~KEPT, -math.inf)), y)[1],  # others read it too
        lambda x: soft(x.masked_fill(~KEPT, -math.inf) * KEPT),  # minus infinity times 0
        lambda x: soft(2.0 - x.masked_fill(~KEPT, -math.inf)),
    ],
)
def test_what_cannot_be_numbers_stays(function: Callable[[Tensor], Tensor]) -> None:
    model = Function(lambda s, x: function(x))
    x = torch.randn(SCORES)
    x[0, 0, 0, 1] = 0.0
    graph = canonicalize(capture(model, (x,)))
    got, want = graph(x), model(x)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_zeros_that_are_written_in_place_are_not_zeros() -> None:
    def masked(_self: Function, x: Tensor, given: Tensor) -> Tensor:
        bias = torch.zeros_like(x)
        bias.view(-1).gt_(x.flatten())  # stays in place, as its function gives booleans
        return soft(x + bias.masked_fill(given, -math.inf))

    x, given = torch.randn(SCORES), torch.rand(SCORES) > 0.6
    given[..., 0] = False
    model, batch = Function(masked), {0: torch.export.Dim("batch")}
    graph = canonicalize(capture(model, (x, given), dynamic_shapes=((batch, batch),)))
    assert any(n.target is aten.gt_.Tensor for n in graph.graph.nodes)
    assert torch.equal(graph(x, given), model(x, given))


class Layers(nn.Module):
    """Two layers of attention that share a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor, kept: Tensor) -> Any:
        for query in self.queries:
            x = x + F.scaled_dot_product_attention(query(x), x * 0.5, x + 1, attn_mask=kept)
        return x


def test_layers_share_what_a_mask_becomes() -> None:
    x, kept = torch.randn(2, 4, 8), torch.rand(2, 4, 4) > 0.4
    kept[..., 0] = True
    model = Layers().eval()
    graph = canonicalize(capture(model, (x, kept)))
    assert len(calls(graph, aten.to.dtype)) == 1
    torch.testing.assert_close(graph(x, kept), model(x, kept), rtol=1e-5, atol=1e-5)


LEAST = torch.finfo(torch.float32).min
SHOWN = torch.tensor([[[True] * 4], [[False, False, True, True]]])
"""Of two sentences, the second with padding on its left: no row above attends to anything."""

# A mask, and what it is made of.
GIVEN: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "bools": (lambda m: m, SHOWN & ~CAUSAL),
    "bools and a triangle": (lambda m: m & ~CAUSAL, SHOWN),
    "floats": (lambda m: m, torch.where(SHOWN & ~CAUSAL, 0.0, -math.inf)),
    "floats, moved": (
        lambda m: m[:, :, 0].mT,
        torch.where(SHOWN & ~CAUSAL, 0.0, -math.inf).mT[:, :, None],
    ),
    "large floats": (lambda m: m, torch.where(SHOWN & ~CAUSAL, 0.0, LEAST)),
    "rows of either": (
        lambda m: m,
        torch.where(SHOWN & ~CAUSAL, 1.5, torch.tensor([[[-math.inf]], [[LEAST]]])),
    ),
    "floats and a triangle": (lambda m: m + BEFORE, torch.where(SHOWN, 0.0, -math.inf)),
    "large floats and a triangle": (lambda m: m + BEFORE, torch.where(SHOWN, 0.5, LEAST)),
    "filled": (lambda m: torch.zeros(2, 4, 4).masked_fill(~(m & ~CAUSAL), -math.inf), SHOWN),
    "filled, large": (lambda m: torch.zeros(2, 4, 4).masked_fill(~(m & ~CAUSAL), LEAST), SHOWN),
    "filled and a triangle": (
        lambda m: torch.zeros(2, 1, 4).masked_fill(~m, -math.inf) + BEFORE,
        SHOWN,
    ),
    "chosen": (lambda m: torch.where(m & ~CAUSAL, 0.0, -math.inf), SHOWN),
    "products": (lambda m: (1 - m.float()) * LEAST, SHOWN & False),
    "of another": (lambda m: (m & ~CAUSAL) | (m.sum() > 0), SHOWN & False),
}


@pytest.mark.parametrize("name", GIVEN)
def test_rows_that_attend_to_nothing_are_what_they_were(name: str) -> None:
    """0 where a mask leaves all out, equal weights where it only adds large numbers."""
    make, mask = GIVEN[name]
    torch.manual_seed(0)
    model = Function(lambda _, x, m: F.scaled_dot_product_attention(x, x * 2, x + 1, make(m)))
    x = torch.randn(2, 4, 8)
    graph = canonicalize(capture(model, (x, mask)))
    torch.testing.assert_close(graph(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)
    assert not calls(graph, aten.scaled_dot_product_attention.default)


@pytest.mark.parametrize("number", [-math.inf, -1e9, LEAST])
def test_rows_of_a_constant_mask_that_attend_to_nothing_are_what_they_were(number: float) -> None:
    mask = torch.where(SHOWN & ~CAUSAL, 0.0, number)
    model = Function(lambda _, x: F.scaled_dot_product_attention(x, x * 2, x + 1, mask))
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(canonicalize(capture(model, (x,)))(x), model(x))


def test_a_mask_that_leaves_something_in_each_row_costs_nothing_behind_the_softmax() -> None:
    model = Function(
        lambda _, x, m: F.scaled_dot_product_attention(x, x * 2, x + 1, BEFORE + m @ x.mT)
    )
    graph = canonicalize(capture(model, (torch.randn(2, 4, 8), torch.randn(2, 4, 8))))
    (softmax,) = calls(graph, aten.softmax.int)
    assert [user.target for user in softmax.users] == [aten.matmul.default]


class LeftPadded(nn.Module):
    """Attention to what stands before, of sentences with padding on their left."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), x * 0.5, x * 2, mask)


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    slow_but(
        [(torch.float32, False)],
        [(kind, dynamic) for kind in (torch.bool, torch.float32) for dynamic in (False, True)],
    ),
)
def test_rows_that_attend_to_nothing_are_zero_in_one_delegate(
    kind: torch.dtype, dynamic: bool
) -> None:
    torch.manual_seed(0)
    mask = SHOWN & ~CAUSAL
    if kind == torch.float32:
        mask = torch.where(mask, 0.0, -math.inf)
    inputs = (torch.randn(2, 4, 8), mask)
    size = torch.export.Dim("size", min=2, max=8)
    dims = ({1: size}, {1: size, 2: size}) if dynamic else None
    converted = convert(LeftPadded().eval(), inputs, dynamic_shapes=dims).graph
    program = cq.lower(converted, inputs)
    assert program.report.delegates == 1
    result = program.run(*inputs)
    assert torch.equal(result, cq.integer_reference(converted)(*inputs))
    assert result.any(-1).tolist() == [[True] * 4, [False, False, True, True]]


class Padded(nn.Module):
    """PyTorch's own attention, given what of the inputs is padding."""

    causal: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.name == "layer":
            return cast(Tensor, self.layer(x, src_key_padding_mask=padding))
        if self.name == "causal layer":
            return cast(Tensor, self.layer(x, self.causal, src_key_padding_mask=padding))
        weights = self.name == "attention and weights"
        attention = self.layer.self_attn
        return cast(Tensor, attention(x, x, x, padding, need_weights=weights)[0])


@pytest.mark.parametrize("kind", slow_but([torch.bool], [torch.bool, torch.float32]))
@pytest.mark.parametrize(
    "name",
    slow_but(["causal layer"], ["layer", "causal layer", "attention", "attention and weights"]),
)
def test_padding_is_a_mask_in_one_delegate(name: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Padded(name).eval(), torch.randn(2, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    if kind == torch.float32:
        padding = torch.zeros(2, 6).masked_fill(padding, -math.inf)
    converted = quantized(model, (x, padding))
    program = cq.lower(converted, (x, padding))
    assert program.report.delegates == 1
    assert len(program.report.outside) <= 1  # that makes numbers of conditions
    with torch.no_grad():
        want, got = model(x, padding), program.run(x, padding)
        noise = (got - want).norm() / want.norm()
        assert float(noise) < 0.03
        other = x.clone()
        other[0, 4:] = 3.0  # what is left out changes nothing
        again = program.run(other, padding)
    assert torch.equal(again[0, :4], got[0, :4])


def test_constant_masks_run_as_integers_in_one_delegate() -> None:
    model = Function(
        lambda s, x: (
            torch.where(KEPT, x * 1.5, x + 0.5).masked_fill(~KEPT, 0.75),
            (x * 3).tril(),
        )
    )
    x = torch.randn(SCORES)
    program = lowered_exactly(quantized(model, (x,)), (x,))
    assert program.report.delegates == 1
    assert program.report.not_integer() == ()
    for got, want in zip(program.run(x), model(x), strict=True):
        assert float((got - want).abs().max()) < 0.03 * float(want.abs().max())


def test_comparisons_of_floats_become_numbers_in_one_delegate() -> None:
    def compared(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = m.linear(x)
        conditions = [z > 0.25, z >= x, z < 0.25, z <= x, x == y, x != 1.0, y > x]
        conditions += [~(x > y) & (z < 1.0), torch.logical_or(z > y, x == 0.0)]
        spikes = torch.where(z > 0.25, 1.0, 0.0)
        return *(c.float() for c in conditions), m.linear(spikes + (y >= 0.5)), z * (z > x)

    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 8)
    y[0] = x[0]
    x[1, :6] = torch.tensor([1.0, 0.0, math.inf, -math.inf, math.inf, 1.0])
    y[1, :6] = torch.tensor([1.0, -0.0, math.inf, math.inf, 3.0, 1.0 - 2**-24])
    finite = x.clamp(-3, 3)
    graph = quantized(Function(compared, linear=nn.Linear(8, 8)), (finite, y.clamp(-3, 3)))
    lowered = lowered_exactly(graph, (finite, y), [(x, y), (y, x)])
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


def test_choices_of_what_may_be_infinite_are_made_in_one_delegate() -> None:
    def chosen(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        z = m.linear(x)
        curve = torch.where(z > 0, z, 0.1 * (torch.exp(z) - 1))
        left = (x @ x.mT).masked_fill(CAUSAL, -math.inf)  # the weights of an xLSTM
        shares = torch.exp(left - left.amax(-1, keepdim=True))
        counts = (z > 0).float().sum(1, keepdim=True)
        mean = torch.where(counts > 2, z.sum(1, keepdim=True) / counts.clamp(min=1), z.sum() / 3)
        return tuple(map(m.linear, (curve, shares @ x, mean)))

    torch.manual_seed(0)
    x = torch.randn(2, 4, 8)
    graph = quantized(Function(chosen, linear=nn.Linear(8, 8)), (x,))
    lowered = lowered_exactly(graph, (x,), [(x * 1e3,), (x * 1e-3,)])
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


def safely(x: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Choices of sides that are no number where they are not chosen."""
    logs = torch.log(x)
    return (
        torch.where(d != 0, x / d, 0.0),
        torch.where(d == 0, torch.zeros_like(d), x / d),
        torch.where(d.abs() > 1e-6, x / d, x),
        x / torch.where(d == 0, torch.ones_like(d), d),
        torch.where(x >= 0, torch.sqrt(x), -torch.sqrt(-x)),
        torch.where(x == 0, 1.0, torch.sin(x) / x),
        torch.where(x > 0, logs, 0.0),
        torch.log2(x).masked_fill(~(x > 0), -5.0),
        torch.where((x > 0) & (d > 0), x * torch.log(x) + torch.log(d), d),
        torch.where(x > 0, -x * torch.log(x), 0.0),
        torch.where(x <= 0.04, x / 12.92, ((x + 0.055) / 1.055) ** 2.4),
        torch.where(x.abs() <= 1, torch.asin(x), 0.0),
    )


def test_safe_quotients_logarithms_and_roots_are_chosen_in_one_delegate() -> None:
    """What is not chosen may be computed of another number; what is keeps its bits."""
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-6, -1e-6, 1e-30, 300.0, -300.0, 2.0, 0.04, -0.5])
    x, d = ends.repeat_interleave(12).reshape(12, 12), ends.repeat(12).reshape(12, 12)
    x[5] = 0.0

    def function(self: Function, x: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rows = self.first(y)
        size = rows.norm(dim=-1, keepdim=True)
        return *safely(x, d), torch.where(size > 0, rows / size, rows)

    model = Function(function, first=nn.Linear(12, 12)).eval()
    # In float where there is no layer before.
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(inputs=None)
    inputs = torch.rand_like(x), torch.randn_like(d), torch.randn(12, 12)
    prepared = prepare_pt2e(capture(model, inputs), quantizer)
    prepared(*inputs)
    lowered = cq.lower(convert_pt2e(prepared), inputs)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    got, want = lowered.run(x, d, inputs[2])[:-1], safely(x, d)
    for result, exact in zip(got[:4], want[:4], strict=True):
        assert torch.equal(result, exact)
    for result, exact in zip(got[4:], want[4:], strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-6)


def test_what_a_choice_makes_positive_is_no_sum() -> None:
    """``log(where(x > 0, x, 1))``: nobody would know that sums and products are positive."""

    def chosen(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.linear(x)
        kept = torch.where(x > 0, x, 1.0)
        safe = torch.where(x < 0.5, 2.0, x)
        return torch.where(x > 0, torch.log(kept), 0.0), torch.where(x < 0.5, x, torch.rsqrt(safe))

    x = torch.randn(4, 8)
    lowered = cq.lower(quantized(Function(chosen, linear=nn.Linear(8, 8)), (x,)), (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


BETWEEN: dict[str, Callable[..., Tensor]] = {
    "both": lambda x, a: (x >= a[:-1]) * (x < a[1:]),
    "any": lambda x, a: ((x < a[:-1]) + (x >= a[1:])).logical_not(),
    "both, or a third": lambda x, a: ((x >= a[:-1]) * (x < a[1:]) + (x > 1)) * (x < 2),
}


@pytest.mark.parametrize("name", slow_but(["any"], BETWEEN))
def test_products_and_sums_of_conditions_are_conditions(name: str) -> None:
    """As the splines of a Kolmogorov-Arnold network have them."""

    def spline(m: Any, x: Tensor) -> Tensor:
        x = m.linear(x).unsqueeze(-1)
        return torch.nan_to_num(BETWEEN[name](x, torch.linspace(-2, 2, 9))) * x

    x = torch.randn(4, 6)
    model = Function(spline, linear=nn.Linear(6, 6))
    graph = canonicalize(capture(model, (x,)))
    assert differences(graph(x), model(x)) == []
    lowered = cq.lower(quantized(model, (x,)), (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


def test_what_a_condition_says_nothing_of_may_be_no_number() -> None:
    x = torch.rand(2, 6)
    unknown = lambda s, x: (  # noqa: E731
        torch.where(torch.arange(6) > 2, torch.log(x), x),
        torch.where(x > -1, torch.log(x), x),  # which is chosen
        (lambda y: torch.where(x > 0, y, x) + y)(torch.log(x)),  # others read it
    )
    graph = canonicalize(capture(Function(unknown), (x,)))
    assert [len(w.all_input_nodes) for w in calls(graph, aten.where.self)] == [3, 3, 3]


def test_comparisons_with_what_is_no_number_are_none() -> None:
    """PyTorch takes them for false; who computes with them gets NaN here, and not a number."""

    def compared(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        conditions = [y > 0.25, y < x, y <= 0.25, y >= x, y == x, y != x]
        chosen = torch.where(y > 0.25, x.exp(), x)
        return m.linear(x), chosen, *(c.float() for c in conditions)

    x, y = torch.ones(2, 1, 8)
    graph = quantized(Function(compared, linear=nn.Linear(8, 8)), (x, y))
    lowered = cq.lower(graph, (x, y))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())
    y = torch.tensor([[math.nan, 1.0] * 4])
    for result in lowered.run(x, y)[1:]:
        assert torch.equal(result.isnan(), y.isnan())


class Tokens(nn.Module):
    """Rows of which some are padding, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x, kept = self.linear(self.table(ids)), ids != 0
        first = torch.where((ids == 3)[..., None], x, x.exp())
        mean = (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
        return self.linear(x * ((ids > 0) & (ids < 7))[..., None]), first, mean


def test_conditions_of_integers_become_numbers_before_the_delegate() -> None:
    torch.manual_seed(0)
    ids, model = torch.randint(0, 9, (2, 6)), Tokens().eval()
    lowered = cq.lower(quantized(model, (ids,)), (ids,))
    report = lowered.report
    # The mean counts integers.
    counted = {"aten::ne.Scalar_out", "aten::sum.IntList_out", "aten::clamp.out"}
    conversion = "dim_order_ops::_to_dim_order_copy.out"
    assert report.delegates == 1
    assert {*report.outside} == {"aten::embedding.out", conversion, *counted}
    ids[0] = 0
    for got, want in zip(lowered.run(ids), model(ids), strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("where", "inside"),
    [
        (lambda x: torch.where((x > 0.2) & ~(x > 1.0), x.exp(), x), {"gt", "gt_1", "where"}),
        (lambda x: torch.where(x > 0.2, x.log(), x), {"gt", "where"}),
        (lambda x: torch.where(x > -1.0, x.log(), x), set()),
        (lambda x: x * (x > 0.2), {"gt"}),
        (lambda x: (x * (x > 0.2), x < 1.0), {"gt"}),
        (lambda x: x.masked_fill(KEPT.tile(2), -math.inf).amax(), {"masked_fill", "amax"}),
        (lambda x: (x > 0.2).any(), set()),
    ],
)
def test_a_plan_knows_what_is_compared_in_the_delegate(
    where: Callable[[Tensor], Any], inside: set[str]
) -> None:
    model = Function(lambda s, x: where(s.linear(x)), linear=nn.Linear(8, 8))
    exported = torch.export.export(model.eval(), (torch.randn(2, 8),))
    plan = cq.IntegerQuantizer().set_global("a8w8").plan(exported)
    asked = [
        op for op in plan.ops if op.written.split("_")[0] in ("amax", "gt", "lt", "masked", "where")
    ]
    assert {op.written for op in asked if op.placement == "float inside"} == inside
    assert {op.placement for op in asked if op.written not in inside} <= {"outside"}
