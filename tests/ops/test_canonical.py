"""Making a graph annotatable must not change what it computes."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
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
from support.models import conv, randomize_batch_norms
from support.selection import slow_but
from test_arrangements import overloads, takes_one
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.core.graph import constant_of, set_state, size_bounds
from custom_quantizer.core.memory import UNSAID, overwritten_by
from custom_quantizer.ops.rewrites.writes import functionalize

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


@pytest.mark.slow
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


@pytest.mark.slow
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
        (lambda s, x: torch.sin(s.conv(x)).mul_(2.0), aten.mul.Tensor),
        (lambda s, x: F.dropout(s.conv(x), 0.5, False, inplace=True), aten.dropout.default),
        (lambda s, x: s.conv(x).unsqueeze_(1), aten.unsqueeze.default),
        # Whose twins go by other names: `pow.Scalar` is a power of a number.
        (lambda s, x: s.conv(x).pow_(-0.7), aten.pow.Tensor_Scalar),
        (lambda s, x: s.conv(x).pow_(x), aten.pow.Tensor_Tensor),
        (lambda s, x: s.conv(x).transpose_(2, 3), aten.transpose.int),
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


def _read_in_another_shape(s: Any, x: Tensor) -> Any:
    """Who only reads after the last write may read a view or a copy."""
    h = torch.zeros(IMAGE)
    h[:, :2, 1:] = s.conv(x)[:, 2:4, :-1]
    h[:, 3:] = s.conv(x)[:, :1]
    return s.head(h), h.flatten(1), h.reshape(8, -1), h.transpose(2, 3).flatten(2)


def _every_second(s: Any, x: Tensor) -> Any:
    """Entries that lie apart, of one dim and of two, up to all there are."""
    h, out = s.conv(x), torch.zeros(IMAGE)
    out[:, ::2], out[:, 1::2] = h[:, 1::2], -h[:, ::2]
    out[:, 1:, ::3, 1::2] += h[:, 1:, ::3, ::2]
    return s.head(out)


THROUGH_VIEWS = {
    "every second": _every_second,
    "read in another shape": _read_in_another_shape,
    "twice in a row": _twice,
    "through all names": _through_all_names,
    "assignment to a slice": _write_row,
    "assignment of a tensor": _write_tensor,
    "addition to a slice": _add_to_row,
    "addition through detach": _through_detach,
    "other views": _other_views,
    "one write after the other": _several,
}


@pytest.mark.parametrize("name", slow_but(list(THROUGH_VIEWS)[::3], THROUGH_VIEWS))
def test_writes_through_views_become_values_of_the_whole(name: str) -> None:
    model = Function(THROUGH_VIEWS[name], conv=conv(), head=conv())
    x = torch.randn(IMAGE)
    with torch.no_grad():
        plan, converted, _ = _quantized_closely(model, x)
        assert plan.floating == ()
        lowered = cq.lower(converted, (x,))
        assert (lowered.report.delegates, lowered.report.outside) == (1, ())
        assert differences(lowered.run(x), cq.integer_reference(converted)(x)) == []


@pytest.mark.slow
def test_more_views_of_one_another_than_python_nests_calls() -> None:
    def turned(m: Function, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, 1:] = 0.5
        for _ in range(1000):
            y = y.transpose(2, 3)
        return y

    graph = torch.export.export(Function(turned, conv=conv()), (torch.randn(IMAGE),)).module()
    functionalize(graph)
    assert all(overwritten_by(node) is None for node in graph.graph.nodes)


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


SHARED: dict[str, set[str]] = {
    "relu of a tensor viewed before": {"flatten"},
    "multiplication of a chunk": {"conv2d_1", "chunk", "getitem_1"},
    "addition through view_as": set(),  # a copy is behind the layer before, too
    "product with a wider dtype": {"conv2d_1"},
}
"""What cannot be quantized, since something else is written where it is."""


@pytest.mark.parametrize("name", slow_but(["addition through view_as"], WRITES))
def test_writes_that_are_seen_elsewhere_stay_in_float_and_say_so(name: str) -> None:
    model = Function(WRITES[name], conv=conv(), head=conv(), stem=conv())
    inner = model.function
    model.function = lambda s, x: inner(s, s.stem(x))
    x = torch.randn(IMAGE)
    with torch.no_grad():
        plan, converted, got = _quantized_closely(model, x)
        assert plan.op("conv2d").scheme == "a8w8"
        shared = {op.node for op in plan.floating if "writes into the memory of" in op.reason}
        assert shared == SHARED[name]
        # What a layer reads of that memory is a copy.
        assert {op.scheme for op in plan.ops if op.node == "conv2d_2"} <= {"a8w8"}
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


Write = Callable[[Tensor], Any]


def _written_later(view: Callable[[Tensor], Tensor], write: Write, *, through: bool = False) -> Any:
    """A tensor, what ``view`` made of it before one of them was written, and both together."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = s.conv(x)
        other = view(h)
        write(other if through else h)
        return h * 1.0, other * 1.0, h.sum() + other.sum()

    return forward


def _in_place_still(t: Tensor) -> Tensor:
    return t.flatten(1)[:, ::2].add_(1.0)


WRITE: dict[str, Write] = {
    "all": lambda t: t.add_(1.0),
    "half": lambda t: t[1:].mul_(2.0),
    "in place": _in_place_still,
}
UNSAID_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda t: torch.einsum("abcd->abdc", t),
    "unsafe_split": lambda t: torch.unsafe_split(t, 2, 1)[0],
    "unsafe_chunk": lambda t: torch.unsafe_chunk(t, 2, 1)[1],
    "unsafe_view": lambda t: aten._unsafe_view(t, [2, -1]),
    "lift": lambda t: aten.lift(t),
    "meshgrid": lambda t: torch.meshgrid(t[0, 0, 0], t[1, 0, 0], indexing="ij")[0],
    "cartesian_prod": lambda t: torch.cartesian_prod(t.view(-1)),
    "broadcast_tensors": lambda t: torch.broadcast_tensors(t, t[:1])[1],
}


def _same(function: Callable[..., Any], *inputs: Tensor, **children: nn.Module) -> GraphModule:
    """The canonical graph, which computes what the captured one does."""
    model = Function(function, **children).eval()
    with torch.no_grad():
        captured = capture(model, inputs)
        wanted = captured(*(x.clone() for x in inputs))
        graph = canonicalize(copy.deepcopy(captured))
        graph.graph.lint()
        got = graph(*(x.clone() for x in inputs))
        for a, b in zip(_leaves(got), _leaves(wanted), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            # Folded factors and sums in another order change last bits of float32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    return graph


@pytest.mark.parametrize("write", WRITE)
@pytest.mark.parametrize("name", slow_but(list(UNSAID_VIEWS)[::3], UNSAID_VIEWS))
def test_views_that_no_schema_tells_see_what_is_written(name: str, write: str) -> None:
    shared = _written_later(UNSAID_VIEWS[name], WRITE[write])
    _same(shared, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("name", ["einsum", "unsafe_split", "unsafe_view", "lift"])
def test_what_is_written_through_views_that_no_schema_tells_is_seen(name: str) -> None:
    shared = _written_later(UNSAID_VIEWS[name], WRITE["all"], through=True)
    _same(shared, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


def _candidates(argument: Any, shape: tuple[int, ...]) -> list[Any]:
    kind = str(argument.type).replace("SymInt", "int")
    known = {"int": [1, 0], "bool": [False], "float": [1.0, 0.0], "List[int]": [list(shape), [1]]}
    if argument.has_default_value() or kind.startswith("Optional"):
        return [argument.default_value if argument.has_default_value() else None]
    return [torch.randn(shape)] if kind == "Tensor" else known.get(kind, [None])


@pytest.mark.filterwarnings("ignore")
def test_all_ops_that_return_views_and_do_not_say_so_are_known() -> None:
    """Every op of aten that takes a tensor, or a list of some, is run."""
    unsaid = set()
    for op in overloads():
        if any(result.alias_info is not None for result in op._schema.returns):
            continue
        if op is aten._chunk_cat.default:
            continue  # torch 2.15 crashes if it is given less than it needs
        for shape in ((4,), (2, 3)):
            arguments = op._schema.arguments[1:]
            choices = itertools.product(*(_candidates(a, shape) for a in arguments))
            for chosen in itertools.islice(choices, 4):
                x = torch.randn(shape)
                pairs = list(zip(arguments, chosen, strict=True))
                args = [value for a, value in pairs if not a.kwarg_only]
                named = {a.name: value for a, value in pairs if a.kwarg_only}
                try:
                    results = op(x if takes_one(op) else [x], *args, **named)
                except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
                    continue  # not what this op takes
                memory = x.untyped_storage().data_ptr()
                for t in pytree.tree_leaves(results):
                    if t.numel() and not t.is_sparse and t.untyped_storage().data_ptr() == memory:
                        unsaid.add(op)
    assert len(unsaid) >= 12
    assert unsaid <= UNSAID.keys(), unsaid - UNSAID.keys()


def _unsqueezed(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    first = h[:1]
    h.unsqueeze_(0)
    first.add_(1.0)
    return first * 1.0, h * 1.0


def _transposed(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    part = h[:, :2]
    part.transpose_(1, 2)
    part[:, 1].mul_(2.0)
    return part * 1.0, h * 1.0


def _reshaped_in_all_ways(s: Any, x: Tensor) -> Any:
    h = s.conv(x)[:1]
    h.squeeze_(0).swapaxes_(0, 1)
    h[1].add_(1.0)
    return h, h[1]


def _copied_by_flatten(s: Any, x: Tensor) -> Any:
    """A flatten of what is not contiguous is a copy: a view of that sees no write."""
    h = s.conv(x).transpose(1, 2)
    part = h.flatten(1)[:, :3]
    h.add_(1.0)
    return part * 1.0, h * 1.0


def _copied_of_a_part(s: Any, x: Tensor) -> Any:
    """What is written in place is contiguous as a function, and was a part of a tensor."""
    h = s.conv(x)[:, 1:]
    h.relu_()
    flat, ordered = h.flatten(), h.contiguous()
    last = h.contiguous(memory_format=torch.channels_last)
    shown = h.transpose(0, 1)
    flat.add_(1.5)
    ordered.mul_(3.0)
    last.sub_(1.0)
    h[0].mul_(2.0)
    return flat * 1.0, ordered * 1.0, last * 1.0, shown * 1.0, h * 2.0


def _out(s: Any, x: Tensor) -> Any:
    h = s.conv(x)
    result = torch.mul(x, 2.0, out=h)
    result.relu_()
    return h * 1.0, result


@pytest.mark.parametrize(
    "function",
    [
        _unsqueezed,
        _transposed,
        _reshaped_in_all_ways,
        _copied_by_flatten,
        _copied_of_a_part,
        _out,
    ],
)
def test_names_of_one_memory_keep_their_shapes(function: Callable[..., Any]) -> None:
    _same(function, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    "name", ["gt_", "eq_", "ne_", "logical_and_", "logical_xor_", "fmod_", "true_divide_"]
)
def test_ops_in_place_keep_the_dtype_of_what_they_write(name: str) -> None:
    _same(lambda s, x: getattr(s.conv(x), name)(x) + 1, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))
    _same(lambda s, x, i: ((i + 1).gt_(2), x + 1), torch.randn(2), torch.arange(5))


OWNERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # Results that are not contiguous: whether a flatten is a view depends on it.
    "gru": lambda s, x: s.gru(x[:, 0])[0],
    "conv3d": lambda s, x: s.conv3d(x.unsqueeze(0)),
    "roll": lambda s, x: s.conv(x).transpose(1, 2).roll(1, 1),
    "clamped conv3d": lambda s, x: F.relu(s.conv3d(x.unsqueeze(0))),
    "sum of a conv3d": lambda s, x: s.conv3d(x.unsqueeze(0)) + 1.0,
    # Results that are their input where there is nothing to do.
    "diff": lambda s, x: torch.diff(s.conv(x), n=0),
    "maximum of one": lambda s, x: s.conv(x).unsqueeze(0).max(0)[0],
    "batch norm": lambda s, x: s.norm(s.conv(x)),
    "factor": lambda s, x: s.conv(x) * s.norm.weight.reshape(-1, 1, 1),
}


@pytest.mark.parametrize("name", OWNERS)
def test_who_owns_memory_that_is_written_in_place_stays_as_it_is(name: str) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        h = OWNERS[name](s, x)
        before = h + 1.0
        _in_place_still(h)
        return before, h * 2.0, h

    layers = {
        "conv": nn.Conv2d(4, 4, 1),
        "conv3d": nn.Conv3d(2, 3, 3, padding=1),
        "gru": nn.GRU(6, 5, batch_first=True),
        "norm": randomize_batch_norms(nn.BatchNorm2d(4)),
    }
    _same(forward, torch.randn(IMAGE), **layers)


ROOM: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: torch.empty(x.shape[0], 3, 4),
    "empty_like": lambda x: torch.empty_like(torch.stack([x, x, x], 1)),
    "new_empty": lambda x: x.new_empty((x.shape[0], 3, 4)),
    "zeros": lambda x: torch.zeros(x.shape[0], 3, 4),
}


@pytest.mark.parametrize("name", ROOM)
def test_room_that_is_made_and_written_piece_by_piece(name: str) -> None:
    """What was in it before is no garbage to take ranges of, and no op of the program."""

    def forward(s: Any, x: Tensor) -> Tensor:
        room = ROOM[name](x)
        for i, layer in enumerate(s.layers):
            room[:, i, :] = layer(x)
        return room * 2.0

    model = Function(forward, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    x = torch.randn(3, 4)
    graph = canonicalize(capture(model, (x,)))
    assert torch.equal(graph(x), model(x))
    made = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert not {target for target in made if "empty" in target or "zeros" in target}
    lowered = lowered_exactly(quantized(model, (x,)), (x,))
    assert lowered.report.delegates == 1
    assert lowered.report.outside == ()


def test_memory_that_is_written_several_times_is_copied_once() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        h = s.conv(x)
        for _ in range(3):
            _in_place_still(h)
        return h

    graph = _same(forward, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))
    assert len(calls(graph, aten.add_.Tensor)) == 3
    assert len(calls(graph, aten.clone.default)) == 1


@pytest.mark.parametrize("name", ["diff", "maximum of one"])
def test_copies_stay_copies_of_what_is_written_later(name: str) -> None:
    """Also where the form of an op has nothing to compute."""

    def forward(s: Any, x: Tensor) -> Any:
        h = s.conv(x)
        copied = torch.diff(h, n=0) if name == "diff" else h.unsqueeze(0).max(0)[0]
        _in_place_still(h)
        return h, copied

    _same(forward, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


def test_memory_that_goes_to_a_device_by_name_is_written_there() -> None:
    """Whether that is a copy is asked of tensors without values, which are on no device."""

    def forward(s: Any, x: Tensor) -> Any:
        h = s.conv(x).to(x.device)
        h[h > 0] = h[h > 0] * 0.5
        return h

    _same(forward, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


def test_repeats_of_what_is_written_in_place_are_moves_and_a_copy() -> None:
    """As of a cache of keys with fewer heads than queries."""

    def forward(s: Any, x: Tensor) -> Any:
        h = s.conv(x)
        _in_place_still(h)
        repeated = h.repeat_interleave(2, 1)
        _in_place_still(h)
        return h, repeated

    graph = _same(forward, torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))
    assert not calls(graph, aten.repeat_interleave.self_int)


VIEWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "conv3d": lambda s, x: F.relu(s.conv3d(x.unsqueeze(0)))[0],
    "gru": lambda s, x: s.gru(x[:, 0])[0].transpose(0, 1),
    "matmul": lambda s, x: torch.matmul(s.gru.weight_hh_l0, s.conv(x).flatten(2)[:, :, :5].mT),
    "roll by all": lambda s, x: s.conv(x).transpose(1, 2).roll(6, 1),
    "joined": lambda s, x: torch.cat([s.conv(x).transpose(1, 2)], 1),
    "written through a transpose": lambda s, x: _first_column_raised(s.conv(x)),
    "overwritten": lambda s, x: s.conv(x).copy_(x.transpose(2, 3)),
}


def _first_column_raised(h: Tensor) -> Tensor:
    h.transpose(1, 2)[:, 0].add_(1.0)
    return h


@pytest.mark.parametrize("name", VIEWED)
def test_what_has_other_strides_than_in_the_model_can_still_be_viewed(name: str) -> None:
    layers = {
        "conv": nn.Conv2d(4, 4, 1),
        "conv3d": nn.Conv3d(2, 3, 3, padding=1),
        "gru": nn.GRU(6, 5, batch_first=True),
    }
    graph = _same(lambda s, x: VIEWED[name](s, x).view(-1), torch.randn(IMAGE), **layers)
    (view,) = (n for n in graph.graph.nodes if n.name == "view")
    assert view.meta["original_target"] is aten.view.default  # rules are for what was captured


def test_a_mask_that_is_written_between_two_readers_is_read_twice() -> None:
    def forward(s: Any, x: Tensor, y: Tensor) -> Any:
        mask = y > 0
        first = torch.where(mask, s.conv(x), 0.0)
        mask.flatten(1)[:, ::2].logical_not_()
        return first, torch.where(mask, s.conv(x), 0.0)

    _same(forward, torch.randn(IMAGE), torch.randn(IMAGE), conv=nn.Conv2d(4, 4, 1))


def test_a_marked_tensor_names_the_op_that_writes() -> None:
    with torch.no_grad():
        graph = _canonical(_add_to_chunk, conv=conv(), head=conv())
    (node,) = (n for n in graph.graph.nodes if n.name == "conv2d")
    assert overwritten_by(node) == "mul_"
    (clean,) = (n for n in graph.graph.nodes if n.name == "conv2d_1")
    assert overwritten_by(clean) is None


class Stateful(nn.Module):
    """Layers and the state they read and write."""

    def __init__(self, function: Callable[..., Any], **state: Tensor) -> None:
        super().__init__()
        self.function = function
        self.layer, self.gru, self.lstm = nn.Linear(4, 4), nn.GRU(4, 4), nn.LSTM(4, 4)
        self.cell, self.conv = nn.GRUCell(4, 4), nn.Conv2d(4, 4, 1)
        self.norm = randomize_batch_norms(nn.BatchNorm2d(4))
        for name, value in state.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _streamed_gru(s: Any, x: Tensor) -> Tensor:
    result, state = s.gru(x, s.h)
    s.h.copy_(state)
    return result


def _streamed_lstm(s: Any, x: Tensor) -> Tensor:
    result, (hidden, cell) = s.lstm(x, (s.h, s.c))
    s.h.copy_(hidden)
    s.c.copy_(cell)
    return result


def _streamed_cell(s: Any, x: Tensor) -> Tensor:
    s.h.copy_(s.cell(x, s.h))
    return s.h * 1.0


def _halved(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A buffer is half of what it was after each call."""

    def forward(s: Any, x: Tensor) -> Any:
        result = function(s, x)
        getattr(s, name).mul_(0.5)
        return result

    return forward


def _position(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x) + s.table[s.n]
    s.n.add_(1).remainder_(5)
    return y


def _inverted(s: Any, x: Tensor) -> Tensor:
    y = torch.where(s.mask, s.conv(x), 0.0)
    s.mask.logical_not_()
    return y


STEPS_OF_STATE: dict[str, tuple[Callable[..., Any], dict[str, Tensor], tuple[int, ...]]] = {
    "gru": (_streamed_gru, {"h": torch.zeros(1, 2, 4)}, (3, 2, 4)),
    "lstm": (_streamed_lstm, {n: torch.zeros(1, 2, 4) for n in "hc"}, (3, 2, 4)),
    "cell": (_streamed_cell, {"h": torch.zeros(2, 4)}, (2, 4)),
    "factor": (
        _halved("f", lambda s, x: s.conv(x) * s.f),
        {"f": torch.arange(1.0, 5.0).reshape(4, 1, 1)},
        IMAGE,
    ),
    "weight before a batch norm": (
        _halved("w", lambda s, x: s.norm(F.conv2d(x, s.w))),
        {"w": torch.eye(4).reshape(4, 4, 1, 1)},
        IMAGE,
    ),
    "weight of a recurrent layer": (
        _halved(
            "w",
            lambda s, x: torch.lstm(x, [s.h, s.h], [s.w, s.v], False, 1, 0.0, False, False, False)[
                0
            ],
        ),
        {
            "w": torch.linspace(-1, 1, 64).reshape(16, 4),
            "v": torch.linspace(1, -1, 64).reshape(16, 4),
            "h": torch.zeros(1, 2, 4),
        },
        (3, 2, 4),
    ),
    "mask": (_inverted, {"mask": torch.tensor([True, False] * 3)}, IMAGE),
    "number": (
        _halved("n", lambda s, x: torch.where(x > 0, s.n, s.conv(x))),
        {"n": torch.tensor(0.5)},
        IMAGE,
    ),
    "position": (
        _position,
        {"n": torch.tensor(0), "table": torch.linspace(-1, 1, 20).reshape(5, 4)},
        (2, 4),
    ),
    "computed weight": (
        _halved("w", lambda s, x: x @ (s.w * 0.5)),
        {"w": torch.linspace(-1, 1, 16).reshape(4, 4)},
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", slow_but(list(STEPS_OF_STATE)[::3], STEPS_OF_STATE))
def test_state_is_no_constant(name: str) -> None:
    """Not in the graph before rounding, and not for what ``convert_pt2e`` folds."""
    function, state, shape = STEPS_OF_STATE[name]
    model = Stateful(function, **{key: value.clone() for key, value in state.items()}).eval()
    inputs = [torch.randn(shape) for _ in range(3)]
    with torch.no_grad():
        captured = capture(model, (inputs[0],))
        wanted = [copy.deepcopy(value) for value in map(copy.deepcopy(captured), inputs)]
        canonical = canonicalize(copy.deepcopy(captured))
        for x, want in zip(inputs, wanted, strict=True):
            # As above: last bits.
            torch.testing.assert_close(canonical(x), want, rtol=1e-5, atol=1e-5)
        prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a16w8"))
        cq.calibrate(prepared, inputs)
        converted = convert_pt2e(prepared)
        set_state(converted, state)
        for x, want in zip(inputs, wanted, strict=True):
            got = converted(x)
            assert float((got - want).norm()) < 0.04 * float(want.norm())


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


WHOLE = torch.tensor([1, 2, 3, 2**24 + 1])[:, None, None]

OF_WHOLE: dict[str, Callable[..., Any]] = {
    "factors": lambda s, x: torch.sigmoid(s.conv(x)) * WHOLE.clamp(max=9),
    "on the left": lambda s, x: WHOLE.clamp(max=9) - s.conv(x),
    "a mask": lambda s, x: s.conv(x) * (WHOLE > 1),
    "in place": lambda s, x: torch.sigmoid(s.conv(x)).mul_(WHOLE.clamp(max=9)),
    "made in the call": lambda s, x: s.conv(x) + torch.arange(6),
    "divisors": lambda s, x: torch.sigmoid(s.conv(x)) / WHOLE,
    "exponents": lambda s, x: torch.sigmoid(s.conv(x)) ** WHOLE.clamp(max=3),
    "a bound": lambda s, x: torch.maximum(s.conv(x), -WHOLE),
}


@pytest.mark.parametrize("name", OF_WHOLE)
def test_constants_of_whole_numbers_are_floats(name: str) -> None:
    """A cast while the program runs would be a kernel outside the delegate."""
    model, x = Function(OF_WHOLE[name], conv=conv()), torch.randn(IMAGE)
    captured = capture(model, (x,))
    canonical = canonicalize(copy.deepcopy(captured))
    assert differences(canonical(x), captured(x)) == []
    constants = [node for node in canonical.graph.nodes if node.op == "get_attr"]
    assert {constant_of(canonical, node).dtype for node in constants} == {torch.float32}


def test_factors_of_whole_numbers_are_quantized() -> None:
    x = torch.randn(IMAGE)
    model = Function(lambda s, x: F.relu(s.conv(x) + torch.arange(6)) * (WHOLE > 1), conv=conv())
    lowered = lowered_exactly(quantized(model, (x,)), (x,))
    assert lowered.report.fully_delegated
    assert lowered.report.not_integer() == ()


def test_a_buffer_of_whole_numbers_that_is_written_is_no_constant() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(1, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.count
            self.count += 1
            return y

    x = torch.randn(2, 3)
    canonical = canonicalize(capture(Counting(), (x,)))
    assert torch.equal(canonical(x), x)
    assert torch.equal(canonical(x), 2 * x)


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


def test_rewriting_leaves_dynamic_sizes_as_wide_as_they_were() -> None:
    """A pad's kernel in C++ would fix the batch at that of the example."""
    model = Function(lambda s, x: F.pad(s.conv(x), (0, 0, 1, -1)), conv=nn.Conv2d(4, 4, 1)).eval()
    batch = torch.export.Dim("batch", min=1, max=6)
    captured = torch.export.export(
        model, (torch.randn(IMAGE),), dynamic_shapes={"inputs": ({0: batch},)}
    )
    graph = canonicalize(captured.module())
    (given,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    assert size_bounds(given.meta["val"].shape[0]) == (1, 6)
    assert graph(torch.randn(5, 4, 6, 6)).shape == (5, 4, 6, 6)


def test_tensors_that_are_made_of_dynamic_sizes_are_detached_without_a_write() -> None:
    """Capture writes ``torch.tensor(n)`` as a conversion to a device and ``detach_``."""
    model = Function(lambda _s, x: x * torch.tensor(x.shape[0]))
    x, batch = torch.randn(3, 2), torch.export.Dim("batch", min=2, max=6)
    captured = torch.export.export(model, (x,), dynamic_shapes={"inputs": ({0: batch},)})
    graph = canonicalize(captured.module())
    assert not calls(graph, aten.detach_.default)
    assert torch.equal(graph(x[:2]), x[:2] * 2)


@pytest.mark.parametrize(
    ("cut", "ends"),
    [
        (lambda x, n: x[:, -(n - 3) :], (3,)),
        (lambda x, n: x[:, n - 3 :], (-3,)),
        (lambda x, n: x[:, : n - 3], (None, -3)),
        (lambda x, n: x[:, 1 - n : n - 2], (1, -2)),
        (lambda x, n: x[:, 2 * n - 3 * n + 1 : n], (1, sys.maxsize)),
    ],
)
def test_ends_that_are_the_same_for_all_sizes(
    cut: Callable[[Tensor, Any], Tensor], ends: tuple[int | None, ...]
) -> None:
    model = Function(lambda _s, x: cut(x, x.shape[1]) * 2)
    length = torch.export.Dim("length", min=5, max=16)
    captured = torch.export.export(
        model, (torch.randn(2, 9, 3),), dynamic_shapes={"inputs": ({1: length},)}
    )
    graph = canonicalize(captured.module())
    (piece,) = calls(graph, aten.slice.Tensor)
    assert piece.args[2:] == ends
    for n in (5, 6, 9):
        x = torch.randn(2, n, 3)
        assert torch.equal(graph(x), cut(x, n) * 2)


def test_ends_that_other_inputs_tell_stay() -> None:
    model = Function(lambda _s, x, y: x[:, : y.shape[1]] + x[:, -y.shape[1] :])
    long, short = torch.export.Dim("long", min=9, max=16), torch.export.Dim("short", min=1, max=8)
    captured = torch.export.export(
        model,
        (torch.randn(2, 9, 3), torch.randn(2, 5)),
        dynamic_shapes={"inputs": ({1: long}, {1: short})},
    )
    graph = canonicalize(captured.module())
    x, y = torch.randn(2, 12, 3), torch.randn(2, 4)
    assert all(piece.all_input_nodes[1:] for piece in calls(graph, aten.slice.Tensor))
    assert torch.equal(graph(x, y), x[:, :4] + x[:, -4:])


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: torch.max(x, x.flip(1)), aten.maximum.default),
        (lambda x: torch.min(x, x.flip(1)), aten.minimum.default),
        (torch.arctan, aten.atan.default),
        (torch.fix, aten.trunc.default),
        (torch.special.exp2, aten.exp2.default),
        (torch.special.expit, aten.sigmoid.default),
        (torch.special.expm1, aten.expm1.default),
        (lambda x: torch.special.log1p(x.abs()), aten.log1p.default),
        (lambda x: torch.special.log_softmax(x, 1), aten.log_softmax.int),
        (lambda x: torch.special.softmax(x, 1), aten.softmax.int),
    ],
)
def test_other_names_of_an_op(function: Callable[[Tensor], Tensor], target: Any) -> None:
    x = torch.randn(2, 5)
    graph = canonicalize(capture(Function(lambda m, x: function(x)), (x,)))
    assert calls(graph, target)
    assert torch.equal(graph(x), function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, dtype: x.sum(1, dtype=dtype),
        lambda x, dtype: x.mean((0, 1), dtype=dtype),
        lambda x, dtype: x.cumsum(1, dtype=dtype),
        lambda x, dtype: x.prod(1, dtype=dtype),
        lambda x, dtype: torch.softmax(x, 1, dtype=dtype),
        lambda x, dtype: torch.linalg.vector_norm(x, dim=1, dtype=dtype),
    ],
    ids=["sum", "mean", "cumsum", "prod", "softmax", "vector_norm"],
)
def test_a_dtype_that_an_op_has_anyway_is_not_asked_for(
    function: Callable[[Tensor, torch.dtype | None], Tensor],
) -> None:
    x = torch.randn(2, 5)

    def graph(dtype: torch.dtype | None) -> GraphModule:
        return canonicalize(capture(Function(lambda m, x: function(x, dtype)), (x,)))

    assert [n.format_node() for n in graph(torch.float32).graph.nodes] == [
        n.format_node() for n in graph(None).graph.nodes
    ]
    assert torch.equal(graph(torch.float64)(x), function(x, torch.float64))


def _put_diagonal(t: Tensor) -> None:
    places = torch.arange(6)
    t[:, 0, places, places] = 1.0


PUTS: dict[str, Callable[[Tensor], Any]] = {
    "diagonal": _put_diagonal,
    "columns": lambda t: t.index_fill_(-1, torch.tensor([0, 4]), -2.5),
    "mask": lambda t: t.masked_fill_(torch.eye(6) > 0, 0.5).index_put_(
        (torch.tensor([0, 1]), torch.tensor([3, 1])), torch.tensor(0.25)
    ),
    "rows of a part": lambda t: t[:, 1:].__setitem__((slice(None), [0, 2], slice(1, 3)), 2.0),
}


def test_a_conversion_is_to_a_dtype_or_nothing() -> None:
    """Others would have the program traced op by op when it is lowered, which is slow."""

    def f(_self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        indices = x.argmax(1).to(x.device)
        above = (x > 0).to(device=x.device, dtype=torch.int32)
        return (x + 1).to(x.device, torch.float32), indices.long(), above, above.type_as(indices)

    x = torch.randn(3, 4)
    captured = capture(Function(f), (x,))
    others = (aten.to.device, aten.to.dtype_layout, aten.type_as.default)
    assert all(calls(captured, op) for op in others)
    graph = canonicalize(captured)
    assert not any(calls(graph, op) for op in others)
    assert len(calls(graph, aten.to.dtype)) == 3  # of floats, to int32, to int64
    for got, wanted in zip(graph(x), f(graph, x), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_what_is_filled_may_have_a_size_that_values_tell() -> None:
    def f(_self: nn.Module, x: Tensor, n: Tensor) -> Tensor:
        count: Any = n.item()  # "int" would ask for its value
        torch._check(count >= 1)
        torch._check(count <= 6)
        return x + torch.full((count, 4), 0.5)

    x = torch.randn(1, 4)
    graph = canonicalize(capture(Function(f), (x, torch.tensor(3))))
    assert torch.equal(graph(x, torch.tensor(5)), (x + 0.5).expand(5, 4))


def test_a_number_put_in_constant_places_fills_a_mask() -> None:
    def forward(s: Any, x: Tensor) -> list[Tensor]:
        tensors = [s.conv(x + i) for i in range(len(PUTS))]
        for put, tensor in zip(PUTS.values(), tensors, strict=True):
            put(tensor)
        return tensors

    x = torch.randn(IMAGE)
    graph = _same(forward, x, conv=nn.Conv2d(4, 4, 1))
    for target in (aten.index_put.default, aten.index_put_.default, aten.index_fill.int_Scalar):
        assert calls(graph, target) == []
    lowered = lowered_exactly(quantized(Function(forward, conv=nn.Conv2d(4, 4, 1)), (x,)), (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


OF_A_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "cumprod": lambda y: y.cumprod(0),
    "cumsum": lambda y: y.cumsum(-1),
    "flip": lambda y: y.flip(0),
    "log softmax": lambda y: y.log_softmax(0),
    "logcumsumexp": lambda y: y.logcumsumexp(0),
    "logsumexp": lambda y: y.logsumexp(0),
    "logsumexp that keeps the dim": lambda y: y.logsumexp(-1, keepdim=True),
    "softmax": lambda y: y.softmax(0) + y,
    "transpose": lambda y: y.transpose(0, -1),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_a_number_has_one_dim_where_pytorch_says_so(name: str) -> None:
    """Planning or lowering failed, or the runtime ended the process."""
    model = Function(lambda s, x: OF_A_NUMBER[name](s.conv(x)[0, 0, 0, 0]), conv=conv()).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        assert differences(canonicalize(capture(model, (x,)))(x), model(x)) == []
        converted = quantized(model, (x,), cq.IntegerQuantizer().set_global("a8w8"))
        lowered = cq.lower(converted, (x,))
        got = lowered.run(x)
    assert got.shape == ()
    torch.testing.assert_close(got, converted(x), atol=1e-6, rtol=1e-6)


NEUTRAL: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "times a mask of ones": (lambda x: x * torch.ones_like(x), 0),
    "ones times": (lambda x: torch.ones(IMAGE[-1]) * x, 0),
    "minus zeros": (lambda x: x - torch.zeros_like(x), 0),
    "divided by a count of one": (lambda x: x / torch.ones_like(x)[..., :1], 0),
    "not one everywhere": (lambda x: x * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), 1),
    "zeros minus": (lambda x: torch.zeros_like(x) - x, 1),
    "plus zeros, which makes 0.0 of -0.0": (lambda x: x + torch.zeros_like(x), 1),
    "spread by ones": (lambda x: x[..., :1] * torch.ones_like(x), 1),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_masks_of_ones_are_none(name: str) -> None:
    function, left = NEUTRAL[name]
    model = Function(lambda s, x: torch.sin(function(torch.cos(x)))).eval()
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(model, (x,)))
    assert differences(graph(x), model(x)) == []
    arithmetic = [
        n
        for n in graph.graph.nodes
        if n.name.split("_")[0] in ("mul", "sub", "div", "add", "neg", "rsub")
    ]
    assert len(arithmetic) == left, arithmetic


def test_a_parameter_of_ones_is_what_it_is_trained_to_be() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(IMAGE[-1]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(x) * self.scale)

    graph = canonicalize(capture(Scaled(), (torch.randn(IMAGE),)))
    assert "mul" in [node.name for node in graph.graph.nodes]
