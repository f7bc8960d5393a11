"""Making a graph annotatable must not change what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import (
    Function,
    calls,
    canonicalize,
    capture,
    differences,
    lowered_exactly,
    quantized,
)
from support.models import conv
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.core.memory import overwritten_by

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)


# ---------------------------------------------------------------------------------------------
# Random programs: a few registers, overwritten, viewed and reused
# ---------------------------------------------------------------------------------------------

Registers = list[Tensor]
Step = Callable[[Registers], None]


def _unary(apply: Callable[[Tensor], Any], i: int, j: int) -> Step:
    """Register ``j`` becomes a function of register ``i`` (for in-place ops, the same tensor)."""

    def step(registers: Registers) -> None:
        registers[j % len(registers)] = apply(registers[i % len(registers)])

    return step


def _binary(apply: Callable[[Tensor, Tensor], Any], i: int, j: int) -> Step:
    """In-place or not, on two registers of which the second is brought to the first's shape."""

    def step(registers: Registers) -> None:
        a, b = registers[i % len(registers)], registers[j % len(registers)]
        registers[i % len(registers)] = apply(a, b.reshape(a.shape))

    return step


def _discard(apply: Callable[[Tensor], Any], i: int) -> Step:
    """Write and throw the result away: only the memory remembers."""

    def step(registers: Registers) -> None:
        apply(registers[i % len(registers)])

    return step


def _assign(view: Tensor, value: float) -> None:
    view[...] = value


def _through_both(whole: Tensor, part: Tensor) -> Tensor:
    """Each sees what was written through the other."""
    part.add_(1.0)
    whole.mul_(0.5)
    return part.sub_(0.2)


OVERWRITE: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda t: t.add_(0.5),
    "mul_": lambda t: t.mul_(-0.75),
    "sub_": lambda t: t.sub_(0.25),
    "relu_": lambda t: F.relu(t, inplace=True),
    "hardtanh_": lambda t: F.hardtanh(t, -0.7, 0.9, inplace=True),
    "relu6_": lambda t: F.relu6(t, inplace=True),
    "clamp_": lambda t: t.clamp_(-0.6, 0.8),
    "dropout_": lambda t: F.dropout(t, 0.5, training=False, inplace=True),
    "neg_": lambda t: t.neg_(),
    "zero_": lambda t: t.zero_(),
    "fill_": lambda t: t.fill_(0.125),
    "add_to_itself_": lambda t: t.add_(t),
    "row_": lambda t: t[0].add_(1.0),
    "rows_": lambda t: t[1:].mul_(2.0),
    "rows_, twice": lambda t: t[1:].add_(1.0).mul_(2.0),
    "row of rows_": lambda t: t[:, 1:].relu_()[1].sub_(0.3),
    "row_, whole_": lambda t: _through_both(t, t[0]),
    "row = ": lambda t: _assign(t[0], 0.5),
    "chunk_": lambda t: t.chunk(2, 0)[0].add_(3.0),
    "view_": lambda t: t.view(-1).mul_(0.5),
    "transposed_": lambda t: t.transpose(0, 1).add_(0.1),
    "detached_": lambda t: t.detach().add_(0.3),
    "same dtype_": lambda t: t.to(torch.float32).add_(0.4),
}
DERIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda t: t + 1.5,
    "rsub": lambda t: 1.0 - t,
    "relu": torch.relu,
    "alias": lambda t: t,
    "view": lambda t: t.view(t.shape),
    "view_as": lambda t: t.view_as(t),
    "expand_as": lambda t: t.expand_as(t),
    "clone": torch.clone,
    "contiguous": lambda t: t.contiguous(),
    "dropout": lambda t: F.dropout(t, 0.5, training=False),
    "movedim": lambda t: t.movedim(0, 1).movedim(1, 0),
    "half": lambda t: torch.cat([t[:1], t[1:]]),
    "joined": lambda t: torch.cat([t]),
    "picked": lambda t: t[:, list(range(t.shape[1]))],
    "repeated": lambda t: t.repeat(1, 1),
    "cut out": lambda t: torch.cat([t, t])[: len(t)],
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a.add_(b)": lambda a, b: a.add_(b),
    "a.mul_(b)": lambda a, b: a.mul_(b),
    "a.copy_(b)": lambda a, b: a.copy_(b),
    "a + b": torch.add,
    "a * b": torch.mul,
}
INDEX = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.just("overwrite"), st.sampled_from(sorted(OVERWRITE)), INDEX, INDEX),
    st.tuples(st.just("discard"), st.sampled_from(sorted(OVERWRITE)), INDEX, INDEX),
    st.tuples(st.just("derive"), st.sampled_from(sorted(DERIVE)), INDEX, INDEX),
    st.tuples(st.just("combine"), st.sampled_from(sorted(COMBINE)), INDEX, INDEX),
)
Program = list[tuple[str, str, int, int]]


def _compile(program: Program) -> list[Step]:
    steps: list[Step] = []
    for kind, name, i, j in program:
        if kind == "overwrite":
            steps.append(_unary(OVERWRITE[name], i, i if name.endswith(("row_", "= ")) else j))
        elif kind == "discard":
            steps.append(_discard(OVERWRITE[name], i))
        elif kind == "derive":
            steps.append(_unary(DERIVE[name], i, j))
        else:
            steps.append(_binary(COMBINE[name], i, j))
    return steps


class Registered(nn.Module):
    """Runs a program on three registers that start from one input, and returns all of them."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps = _compile(program)

    def forward(self, x: Tensor) -> Registers:
        registers = [x * 1.0, x + 0.5, x * 2.0]
        for step in self.steps:
            # A step that only makes a smaller view, or nothing, leaves the register as it was.
            before = list(registers)
            step(registers)
            for i, tensor in enumerate(registers):
                if not isinstance(tensor, Tensor) or tensor.shape != x.shape:
                    registers[i] = before[i]
        return [*registers, x + x]  # the last one can be quantized whatever the program does


@settings(max_examples=100)
@given(st.lists(STEPS, min_size=1, max_size=8))
def test_canonical_programs_compute_what_the_captured_ones_do(program: Program) -> None:
    model, x = Registered(program), torch.randn(2, 3)
    with torch.no_grad():
        wanted = model(x.clone())
        captured = capture(model, (x,))
        canonical = canonicalize(copy.deepcopy(captured))
        canonical.graph.lint()
        assert differences(captured(x.clone()), wanted) == []
        assert differences(canonical(x.clone()), wanted) == []


@settings(max_examples=40)
@given(st.lists(STEPS, min_size=1, max_size=7))
def test_quantized_programs_lose_no_write(program: Program) -> None:
    """A lost write is off by a tenth or more; sixteen bits are off by less than a hundredth."""
    model, x = Registered(program), torch.linspace(-1, 1, 6).reshape(2, 3)
    with torch.no_grad():
        wanted = model(x.clone())
        converted = quantized(model, (x,), "a16w8")
        got = converted(x.clone())
        largest = max(1.0, *(float(t.abs().max()) for t in wanted))
        for a, b in zip(got, wanted, strict=True):
            # Ranges grow at most with the values; every step adds half a unit of 2**-15.
            assert float((a - b).abs().max()) <= 0.01 * largest


# ---------------------------------------------------------------------------------------------
# Which ops become functional, and which must not
# ---------------------------------------------------------------------------------------------


def _canonical(function: Callable[..., Any], **children: nn.Module) -> GraphModule:
    return canonicalize(capture(Function(function, **children), (torch.randn(IMAGE),)))


def _in_place(graph: GraphModule) -> list[str]:
    return [
        node.name
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


@pytest.mark.parametrize(
    ("function", "functional"),
    [
        (lambda s, x: F.relu(s.conv(x), inplace=True), aten.relu.default),
        (lambda s, x: F.relu6(s.conv(x), inplace=True), aten.relu6.default),
        (lambda s, x: F.hardtanh(s.conv(x), inplace=True), aten.hardtanh.default),
        (lambda s, x: s.conv(x).clamp_(0, 1), aten.clamp.default),
        (lambda s, x: s.conv(x).add_(x), aten.add.Tensor),
        (lambda s, x: s.conv(x).sub_(x), aten.sub.Tensor),
        (lambda s, x: s.conv(x).mul_(2.0), aten.mul.Tensor),
        (lambda s, x: F.dropout(s.conv(x), 0.5, False, inplace=True), aten.dropout.default),
        (lambda s, x: s.conv(x).unsqueeze_(1), aten.unsqueeze.default),
        # What was written is never read under another name.
        (lambda s, x: s.conv(x).flatten(1).add_(1.0), aten.add.Tensor),
        (lambda s, x: F.relu(F.dropout(s.conv(x), 0.5, False), inplace=True), aten.relu.default),
        (lambda s, x: F.relu(s.conv(x), inplace=True).add_(1.0), aten.relu.default),
    ],
)
def test_in_place_ops_become_functional(function: Callable[..., Any], functional: Any) -> None:
    graph = _canonical(function, conv=conv())
    assert _in_place(graph) == []
    assert len(calls(graph, functional)) == 1


def _relu_after_view(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    flat = h.flatten(1)
    return F.relu(h, inplace=True), flat


def _write_row(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h[:, 0] = 0.0
    return s.head(h)


def _add_to_row(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h[:, 0] += 1.0
    return s.head(h)


def _add_to_chunk(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h.chunk(2, 1)[1].mul_(2.0)
    return s.head(h)


def _through_detach(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h.detach().add_(1.0)
    return s.head(h)


def _through_view_as(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h.view_as(x).add_(1.0)
    return s.head(h)


def _float64(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h.mul_(torch.full((6,), 2.0, dtype=torch.float64))
    return s.head(h)


def _other_views(s: Any, x: Tensor) -> Any:
    """Views from before the write, of all kinds, see it."""
    h = s.conv(x)
    first, rows = h[:, :1], h.transpose(1, 2)
    last = rows.unbind(2)[-1]
    h[:, 1:, 2:4].mul_(0.5)
    return first, rows, last, s.head(h)


def _several(s: Any, x: Tensor) -> Any:
    h, other = s.conv(x), s.head(x)
    h[:, 1:] += other[:, 1:]
    h[:, 1:] = torch.relu(other[:, :-1])
    h.permute(0, 2, 3, 1)[..., 0].sub_(1.0)
    return h


def _write_tensor(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h[:, 0] = s.head(h)[:, 1]
    h[..., -1:] = h[..., :1]
    return h


def _twice(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    h[:, 1:].add_(1.0).mul_(2.0)
    return s.head(h)


def _through_all_names(s: Any, x: Tensor) -> Any:
    """The memory has four names, each written after another."""
    h = s.conv(x)
    rows = h[:, 1:]
    corner = rows[:, :, 2:]
    same = rows.add_(1.0)
    corner.mul_(3.0)
    h[:, 2].sub_(1.0)
    same[:, :, 1:].add_(0.5)
    return h, rows, corner, same


THROUGH_VIEWS = {
    "twice in a row": _twice,
    "through all names": _through_all_names,
    "assignment to a slice": _write_row,
    "assignment of a tensor": _write_tensor,
    "addition to a slice": _add_to_row,
    "addition through detach": _through_detach,
    "other views": _other_views,
    "one write after the other": _several,
}


@pytest.mark.parametrize("name", THROUGH_VIEWS)
def test_writes_through_views_become_values_of_the_whole(name: str) -> None:
    model = Function(THROUGH_VIEWS[name], conv=conv(), head=conv())
    x = torch.randn(IMAGE)
    with torch.no_grad():
        plan, converted, _ = _quantized_closely(model, x)
        assert plan.floating == ()
        lowered = cq.lower(converted, (x,))
        assert (lowered.report.delegates, lowered.report.outside) == (1, ())
        assert differences(lowered.run(x), cq.integer_reference(converted)(x)) == []


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "cat of one": lambda t: torch.cat([t], 1),
    "stack of one": lambda t: torch.stack([t], 1),
    "cut out of what was joined": lambda t: torch.cat([t, t], 1)[:, :4],
    "all rows": lambda t: t[:, [0, 1, 2, 3]],
    "repeated once": lambda t: t.repeat(1, 1, 1, 1),
    "flip of one row": lambda t: t[:, :1].flip(1),
    "roll by nothing": lambda t: t.roll(0, 1),
    "pad by nothing": lambda t: F.pad(t, (0, 0)),
    "resized to its size": lambda t: F.interpolate(t, scale_factor=1.0),
}


@pytest.mark.parametrize("of", ["the copy", "what was copied"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_with_nothing_to_move_stays_one_where_memory_is_written_later(
    name: str, of: str
) -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = s.conv(x)
        copied = COPIES[name](h)
        written = copied if of == "the copy" else h
        written.flatten(1)[:, ::2].add_(1.0)  # stays in place
        return h, copied

    model, x = Function(forward, conv=nn.Conv2d(4, 4, 1)).eval(), torch.randn(IMAGE)
    with torch.no_grad():
        wanted = model(x.clone())
        graph = canonicalize(capture(model, (x,)))
        assert _in_place(graph) == ["add_"]
        assert differences(graph(x), wanted) == []


WRITES = {
    "relu of a tensor viewed before": _relu_after_view,
    "multiplication of a chunk": _add_to_chunk,
    "addition through view_as": _through_view_as,
    "product with a wider dtype": _float64,
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_that_are_seen_elsewhere_stay_in_float_and_say_so(name: str) -> None:
    model = Function(WRITES[name], conv=conv(), head=conv(), stem=conv())
    inner = model.function
    model.function = lambda s, x: inner(s, s.stem(x))
    x = torch.randn(IMAGE)
    with torch.no_grad():
        plan, converted, got = _quantized_closely(model, x)
        assert plan.op("conv2d").scheme == "a8w8"
        reasons = [op.reason for op in plan.floating if "writes into the memory of" in op.reason]
        assert reasons
        writers = [op.reason for op in plan.floating if "writes in place into memory" in op.reason]
        assert writers
        lowered = cq.lower(converted, (x,))
        for a, b in zip(_leaves(lowered.run(x)), _leaves(got), strict=True):
            assert float((a - b).abs().max()) < 0.1


def _quantized_closely(model: nn.Module, x: Tensor) -> tuple[cq.Plan, GraphModule, Any]:
    """A lost write is off by half a unit and more, a rounding by a hundredth."""
    wanted = model(x.clone())
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    converted = quantized(model, (x,), quantizer)
    got = converted(x)
    for a, b in zip(_leaves(got), _leaves(wanted), strict=True):
        assert float((a - b).abs().max()) < 0.1
    return quantizer.last_plan, converted, got


def _leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def test_a_marked_tensor_names_the_op_that_writes() -> None:
    with torch.no_grad():
        graph = _canonical(_add_to_chunk, conv=conv(), head=conv())
    (node,) = (n for n in graph.graph.nodes if n.name == "conv2d")
    assert overwritten_by(node) == "mul_"
    (clean,) = (n for n in graph.graph.nodes if n.name == "conv2d_1")
    assert overwritten_by(clean) is None


def test_state_that_is_written_is_not_made_functional() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count.add_(1.0)
            return x + 1.0, self.count * 1.0

    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Counter(), (x,)))
    assert [float(graph(x)[1]) for _ in range(3)] == [1.0, 2.0, 3.0]


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x + 2,
        lambda s, x: 2 - x,
        lambda s, x: x - 0.1,
        lambda s, x: x * 3,
        lambda s, x: 0.3 * x,
        lambda s, x: torch.rsub(x, 1.5),
        lambda s, x: torch.rsub(x, 1.5, alpha=2),
        lambda s, x: torch.add(x, 2.0, alpha=3),
        lambda s, x: torch.sub(x, 2, alpha=0.5),
        lambda s, x: x + True,
        lambda s, x: (x > 0) * 2 + x,
        lambda s, x: x.to(torch.float64) + 0.1,
        lambda s, x: (x * 10).to(torch.int32) + 3,
        lambda s, x: 1e-45 + x,
    ],
)
def test_numbers_become_tensors_without_a_change(function: Callable[..., Any]) -> None:
    x = torch.randn(2, 3)
    captured = capture(Function(function), (x,))
    canonical = canonicalize(copy.deepcopy(captured))
    assert differences(canonical(x), captured(x)) == []


@pytest.mark.parametrize(
    "function",
    [lambda s, x: s.conv(x) + 0.5, lambda s, x: 1 - s.conv(x), lambda s, x: s.conv(x) * 2],
)
def test_numbers_are_quantized_like_tensors(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    lowered = lowered_exactly(quantized(Function(function, conv=conv()), (x,)), (x,))
    assert lowered.report.fully_delegated
    assert lowered.report.not_integer() == ()


def test_canonicalizing_twice_changes_nothing() -> None:
    once = _canonical(lambda s, x: 1 - F.relu(s.conv(x) + 2, inplace=True), conv=conv())
    code = once.code
    assert canonicalize(once).code == code


def test_whole_numbers_that_divide_are_floats() -> None:
    """As an int64 tensor, which ExecuTorch would make of it, it would leave the delegate."""
    x = torch.randn(2, 3)
    graph = capture(Function(lambda s, x: torch.softmax(x / 3, -1)), (x,))
    want = graph(x)
    canonicalize(graph)
    (division,) = calls(graph, aten.div.Tensor)
    assert type(division.args[1]) is float
    assert torch.equal(graph(x), want)
