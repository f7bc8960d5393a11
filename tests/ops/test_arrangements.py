"""Ops that only move values: all of aten is searched for them, so that none is unknown."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.graphs import (
    Function,
    calls,
    canonicalize,
    capture,
    differences,
    lowered_exactly,
    quantized,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from custom_quantizer.ops import OF_TARGET, match_of
from custom_quantizer.ops.rewrites import decompositions
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS
from custom_quantizer.ops.rewrites.legalization.arrangements import ARRANGEMENTS

aten = torch.ops.aten

SHAPES = ((2, 3, 4), (1, 4, 2, 2), (3, 3), (6,))

# What is not called with any arguments: it crashes with wrong ones, or is another library's.
UNCALLED = re.compile(
    "backward|nested|cudnn|miopen|mkldnn|fbgemm|sparse|quantize|jagged|fft_|rnn|fake_quant|special_"
    "|embedding|_test_"
)
# Of the private ops those that torch.export makes of public ones.
PRIVATE = re.compile("unsafe|view|reshape|copy|upsample|alias|pad|index|chunk|stack|cat$")

COMPUTES = frozenset(
    {
        "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa",
        "_upsample_lanczos2d_aa",
        "addr",
        "aminmax",
        "chain_matmul",
        "choose_qparams_optimized",
        "cumprod",
        "ger",
        "index_add",
        "kron",
        "ldexp",
        "linalg_matrix_power",
        "logcumsumexp",
        "matrix_power",
        "max",
        "median",
        "msort",
        "nan_to_num",
        "nanmedian",
        "nanquantile",
        "outer",
        "pow",
        "prod",
        "quantile",
        "scatter_add",
        "upsample_bicubic2d",
        "upsample_bilinear2d",
        "upsample_linear1d",
    }
)
"""Ops that compute: a product with ones, the largest of one value."""

NOT_OF_NETWORKS = frozenset(
    {
        "_chunk_cat",
        "_pad_enum",
        "_stack",
        "_unsafe_masked_index",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "block_diag",
        "cartesian_prod",
        "combinations",
        "flatten_dense_tensors",
        "masked_select",
        "meshgrid",
        "pad_sequence",
        "resize",
        "resize_as",
        "slice_inverse",
        "sum_to_size",
        "to_dense",
    }
)
"""Moves of lists of tensors, of memory, and of what an argument's values choose: left in float."""


@dataclass(frozen=True)
class Move:
    """A call that only moves values.

    Attributes:
        op: what is called.
        shape: of its input.
        args: behind the input.
        kwargs: by keyword.
    """

    op: Any
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Any:
        return self.op(x if takes_one(self.op) else [x], *self.args, **self.kwargs)


def takes_one(op: Any) -> bool:
    return str(op._schema.arguments[0].type) == "Tensor"


def overloads() -> Iterator[Any]:
    """All of aten that makes tensors of a tensor, or of a list of them, and always the same."""
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name = full.removeprefix("aten::")
        base, _, overload = name.partition(".")
        if name == full or UNCALLED.search(base) or f"_{overload}".endswith("_out"):
            continue
        if base.startswith("_") and not PRIVATE.search(base):
            continue
        op = getattr(getattr(aten, base, None), overload or "default", None)
        if op is None or op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
            continue
        tensors = ("Tensor", "List[Tensor]")
        arguments, returns = op._schema.arguments, op._schema.returns
        if not arguments or str(arguments[0].type) not in tensors or not returns:
            continue
        if all(str(result.type) in tensors for result in returns):
            yield op


def candidates(argument: Any, shape: Sequence[int]) -> list[Any]:
    """Values that an argument may have."""
    kind = str(argument.type).removeprefix("Optional[")
    optional = kind != str(argument.type)
    kind = kind.removesuffix("]") if optional else kind
    default = [None] if optional else []
    if argument.has_default_value():
        default = [argument.default_value]
    rank = len(shape)
    known: dict[str, list[Any]] = {
        "int": [*default, 1, 0, 2],
        "bool": default or [False, True],
        "float": default or [1.0, 0.0],
        "number": default or [1.0, 0.0],
        "str": [*default, "reflect"] if argument.name == "mode" else default or ["constant"],
        "List[int]": [
            *default,
            [1],
            [1, 0],
            list(range(rank))[::-1],
            list(shape),
            [2] * rank,
            [1] * 4,
            [1] * 6,
            [0, 1],
            [2, 2],
            [-1],
        ],
        "List[Optional[Tensor]]": [[torch.tensor([1, 0])], [None, torch.tensor([1, 0])]],
        "Tensor": default
        or [
            torch.tensor([1, 0]),
            torch.zeros(tuple(shape)).flatten(),
            torch.zeros(tuple(shape), dtype=torch.int64),
            torch.ones(tuple(shape), dtype=torch.bool),
        ],
    }
    return known.get(kind.replace("SymInt", "int"), default)


def results(value: Any) -> list[Tensor]:
    return cast("list[Tensor]", pytree.tree_leaves(value))


def moves(move: Move) -> bool:
    """Whether every value of the result stands at one place of the input, whatever the values."""
    found: list[Tensor] | None = None
    for seed in range(4):
        x = torch.randn(move.shape, generator=torch.Generator().manual_seed(seed))
        out = results(move(x))
        if not out or any(
            t.dtype != x.dtype or t.numel() == 0 or t.layout != torch.strided for t in out
        ):
            return False
        equal = [t.reshape(-1, 1) == x.reshape(1, -1) for t in out]
        if not all(bool(e.any(1).all()) for e in equal):
            return False
        places = [e.int().argmax(1) for e in equal]
        if found is not None and not all(map(torch.equal, places, found)):
            return False
        found = places
    return True


def found_moves(op: Any, most: int) -> Iterator[Move]:
    """Calls of an op that only move values: some for each shape."""
    for shape in SHAPES:
        arguments = op._schema.arguments[1:]
        choices = itertools.product(*(candidates(argument, shape) for argument in arguments))
        count = 0
        for chosen in itertools.islice(choices, 150):
            pairs = list(zip(arguments, chosen, strict=True))
            args = tuple(value for argument, value in pairs if not argument.kwarg_only)
            kwargs = {argument.name: value for argument, value in pairs if argument.kwarg_only}
            move = Move(op, shape, args, kwargs)
            try:
                moved = moves(move)
            except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
                continue  # it does not take these
            if moved:
                yield move
                count += 1
            if count == most:
                break


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_op_of_aten_that_only_moves_values_is_unknown() -> None:
    # Of the tensors that broadcast_tensors returns each is an expand.
    rewritten = {*decompositions.REWRITTEN, *LEGALIZATIONS, aten.broadcast_tensors.default}
    known = {*OF_TARGET, *rewritten}
    unknown = {
        name
        for op in overloads()
        if op not in known
        and (name := op._schema.name.removeprefix("aten::")) not in COMPUTES | NOT_OF_NETWORKS
        and any(True for _ in found_moves(op, 1))
    }
    assert unknown == set()


def graph_of(move: Move) -> GraphModule | None:
    """The call as capture writes it, with fake values; ``None``: it refuses these arguments."""
    graph, mode = Graph(), FakeTensorMode()
    module = GraphModule(torch.nn.Module(), graph)

    def node(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [node(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(list(module.buffers()))}"
        module.register_buffer(name, value)
        constant = graph.get_attr(name)
        constant.meta["val"] = mode.from_tensor(value)
        return constant

    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(move.shape))
    args, kwargs = node(list(move.args)), {k: node(v) for k, v in move.kwargs.items()}
    call = graph.call_function(move.op, (x if takes_one(move.op) else [x], *args), kwargs)
    mapped = torch.fx.node.map_arg((call.args, call.kwargs), lambda n: n.meta["val"])
    try:
        with mode:
            call.meta["val"] = move.op(*mapped[0], **mapped[1])
    except RuntimeError:
        return None
    outputs: list[Node] = [call]
    if not isinstance(call.meta["val"], Tensor):
        outputs = []
        for i, value in enumerate(call.meta["val"]):
            outputs.append(graph.call_function(operator.getitem, (call, i)))
            outputs[-1].meta["val"] = value
    graph.output(tuple(outputs))
    module.recompile()
    return module


@cache
def walked() -> tuple[Move, ...]:
    # A product with ones moves nothing, nor does a power of 1, nor zeros that are added.
    arithmetic = (aten.mul.Tensor, aten.pow.Tensor_Tensor, aten.scatter_add.default)
    known = [op for op in overloads() if op in LEGALIZATIONS and op not in arithmetic]
    return tuple(move for op in known for move in found_moves(op, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_move_of_aten_becomes_ops_that_have_integers() -> None:
    assert len(walked()) > 300
    assert {move.op for move in walked()} >= ARRANGEMENTS.keys()
    wrong = []
    for move in walked():
        captured = graph_of(move)
        if captured is None:
            continue
        graph = canonicalize(captured)
        left = [n for n in graph.graph.nodes if n.op == "call_function"]
        x = torch.randn(move.shape)
        floats = [n for n in left if (match := match_of(n)) is None or match.rule.integers is None]
        if floats or differences(list(graph(x)), results(move(x))):
            wrong.append((str(move.op), move.shape, move.args, floats))
    assert wrong == []


PAIRS = torch.tensor([[0, 2], [1, 1]])
FAR = torch.randperm(130, generator=torch.Generator().manual_seed(0))

# What only one kind of program has: gathers of several dims, moves too many for slices, copies
# between two views of other shapes.
RUN: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "index of rows": (lambda x: x[:, [0, 2, 1]], (2, 4, 6)),
    "index of points": (lambda x: x[:, PAIRS, PAIRS.T], (2, 4, 6)),
    "gather": (lambda x: torch.gather(x, 2, PAIRS.expand(2, 2, 2)), (2, 2, 6)),
    "take": (lambda x: torch.take(x, PAIRS), (2, 4, 6)),
    "many rows": (lambda x: x[:, FAR], (2, 130, 3)),
    "many reversed": (lambda x: x.flip(1), (2, 130, 3)),
    "every second, twice": (lambda x: x[:, [0, 0, 2, 2]], (2, 4, 6)),
    "diagonal": (lambda x: x.diagonal(1, 1, 2), (2, 4, 6)),
    "as_strided": (lambda x: x.as_strided((2, 3, 4), (24, 6, 2), 1), (2, 4, 6)),
    "windows": (lambda x: x.unfold(1, 3, 2), (2, 7, 3)),
    "windows of an image": (lambda x: x.unfold(2, 5, 3).unfold(3, 4, 4), (2, 6, 11, 8)),
    "windows side by side": (lambda x: x.unfold(3, 2, 2), (2, 3, 4, 6)),
    "rot90": (lambda x: x.rot90(3, (1, 2)), (2, 4, 6)),
    "reflected": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (2, 3, 4, 6)),
    "replicated": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), (2, 3, 4, 6)),
    "circular": (lambda x: F.pad(x, (3, 3), mode="circular"), (2, 3, 4)),
    "hsplit": (lambda x: torch.hsplit(x, 2)[1], (2, 4, 6)),
    "tensor_split": (lambda x: x.tensor_split((1, 3), 2)[1], (2, 4, 6)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (2, 4, 6)),
    "tile": (lambda x: x.tile(2, 1, 2), (2, 4, 6)),
    "roll of all": (lambda x: x.roll(5), (2, 4, 6)),
    "dstack": (lambda x: torch.dstack([x[0], x[1]]), (2, 4, 6)),
    "broadcast": (lambda x: torch.broadcast_tensors(x[:, :1], x)[0], (2, 4, 6)),
    "view_copy": (lambda x: torch.view_copy(torch.permute_copy(x, (2, 0, 1)), (6, 8)), (2, 4, 6)),
}


SOME = ("many rows", "diagonal", "dstack", "view_copy")


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(RUN), marks=pytest.mark.slow)])
def test_moves_run_as_integers_in_one_delegate(names: Sequence[str]) -> None:
    cases = [RUN[name] for name in names]
    model = Function(lambda s, *xs: tuple(f(x + x) for (f, _), x in zip(cases, xs, strict=True)))
    inputs = tuple(torch.randn(shape) for _, shape in cases)
    graph = quantized(model, inputs)
    program = lowered_exactly(graph, inputs, [tuple(x * 1e30 for x in inputs)])
    assert program.report.delegates == 1
    assert program.report.not_integer() == ()
    for name, got, want in zip(names, program.run(*inputs), model(*inputs), strict=True):
        # Every value is at most half a step of the product away, whatever moved it.
        step = float(want.abs().max()) / 100
        assert float((got - want).abs().max()) < step, name


@pytest.mark.parametrize("entries", [[0, 4, 1, 5, 2, 6, 3, 7], [1, 0, 8, 3, 2, 9, 5, 4, 10]])
def test_entries_that_take_turns_are_one_slice_for_each_turn(entries: list[int]) -> None:
    model, x = Function(lambda _, x: x[:, entries]), torch.randn(2, 11, 3)
    graph = canonicalize(capture(model, (x,)))
    assert len(calls(graph, aten.slice.Tensor)) == (3 if 8 in entries else 2)
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("entries", [[0, 3, 1, 4, 2, 5], [0, 0, 2, 2, 5, 5]])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_entries_of_tensors_of_dynamic_sizes(entries: list[int], dims: tuple[int, ...]) -> None:
    """A reshape takes one of these."""
    shapes = {dim: torch.export.Dim(f"size_{dim}", min=2, max=9) for dim in dims}
    model, x = Function(lambda _, x: x[..., entries] * 2), torch.randn(2, 4, 6)
    graph = canonicalize(capture(model, (x,), dynamic_shapes={"inputs": (shapes,)}))
    for size in (2, 7):
        shape = [size if dim in dims else known for dim, known in enumerate(x.shape)]
        other = torch.randn(shape)
        assert torch.equal(graph(other), model(other))


def test_entries_are_repeated_before_a_dim_of_any_size() -> None:
    model, x = Function(lambda _, x: x.repeat_interleave(3, 1)), torch.randn(2, 4, 6, 5)
    sizes = (({2: torch.export.Dim("n", min=2, max=8)},),)
    graph = canonicalize(capture(model, (x,), dynamic_shapes=sizes))
    assert not calls(graph, aten.repeat_interleave.self_int)
    for n in (2, 7):
        x = torch.randn(2, 4, n, 5)
        assert torch.equal(graph(x), model(x))


def assert_moves_of_any_batch(model: nn.Module, x: Tensor) -> None:
    """Nothing but moves and sizes is left of a model whose first size is dynamic."""
    sizes = (({0: torch.export.Dim("n", min=2, max=8)},),)
    graph = canonicalize(capture(model, (x,), dynamic_shapes=sizes))
    left = [n for n in graph.graph.nodes if n.op == "call_function"]
    names = {str(n.target) for n in left if match_of(n) is None}
    assert names <= {"aten.sym_size.int", "<built-in function mul>"}
    for n in (2, 5):
        x = torch.randn(n, 3, 3)
        assert differences(graph(x), model(x)) == []


def test_a_dynamic_batch_is_no_obstacle() -> None:
    def function(_: Any, x: Tensor) -> Tensor:
        pairs = x[:, [2, 0, 1]].movedim(1, 2).ravel().view_as(x) + x.diagonal(0, 1, 2).unsqueeze(1)
        return F.pad(pairs, (1, 1), mode="reflect")

    assert_moves_of_any_batch(Function(function), torch.randn(2, 3, 3))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: aten._unsafe_view(x, [x.shape[0], 9]),
        lambda x: aten._unsafe_view(x.movedim(0, 1).contiguous(), [3, x.shape[0] * 3]),
        lambda x: torch.narrow_copy(x, 0, 0, x.shape[0]).flip(1),
        lambda x: x.expand(4, x.shape[0], 3, 3),
        lambda x: x[:, :1].expand(x.shape[0], 5, 3),
    ],
)
def test_a_move_may_be_told_by_dynamic_sizes(move: Callable[[Tensor], Tensor]) -> None:
    assert_moves_of_any_batch(Function(lambda _, x: move(x * 1.0)), torch.randn(3, 3, 3))


def test_a_size_of_another_tensor_tells_no_move() -> None:
    model = Function(lambda _, x, y: torch.narrow_copy(x * 1.0, 1, y.shape[0] - 2, 2) + y.sum())
    dims = ({0: torch.export.Dim("n", min=2, max=8)}, {0: torch.export.Dim("m", min=2, max=8)})
    example = (torch.randn(3, 9), torch.randn(4, 2))
    graph = canonicalize(capture(model, example, dynamic_shapes=(dims,)))
    for n, m in ((2, 3), (5, 8)):
        inputs = (torch.randn(n, 9), torch.randn(m, 2))
        assert differences(graph(*inputs), model(*inputs)) == []


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[[0, 1, 2]],
        lambda x: x.index_select(0, torch.arange(3)),
        lambda x: x.roll(3, 0),
        lambda x: x.roll((-3, 1), (0, 1)),
        lambda x: x.flatten(1).gather(0, torch.arange(3).unsqueeze(1).expand(3, 9)),
        lambda x: x.as_strided((3, 9), (9, 1)),
        lambda x: x.roll(x.shape[0], 1),
        lambda x: x.tile(1, x.shape[0] // 3, 1),
    ],
)
def test_what_is_no_move_for_other_sizes_than_the_example_stays(
    move: Callable[[Tensor], Tensor],
) -> None:
    """Rolled by as many as the example has, a batch is what it was."""
    model, x = Function(lambda _, x: move(x * 1.0)), torch.randn(3, 3, 3)
    sizes = (({0: torch.export.Dim("n", min=3, max=8)},),)
    graph = canonicalize(capture(model, (x,), dynamic_shapes=sizes))
    for n in (3, 5):
        x = torch.randn(n, 3, 3)
        assert differences(graph(x), model(x)) == []


def test_what_computes_is_no_move() -> None:
    """Values that choose where others stand are no constants, and other dtypes no copies."""
    x, index = torch.randn(2, 4), torch.tensor([[1, 0], [2, 2]])
    for function, inputs in (
        (lambda x, i: torch.gather(x, 1, i), (x, index)),
        (lambda x: x.to(torch.int64), (x,)),
        (torch.diag, (torch.randn(3),)),  # zeros beside the diagonal
        (lambda x, y: x.type_as(y), (x, torch.zeros(2, dtype=torch.int32))),
    ):
        model = Function(lambda s, *given, f=function: f(*given))
        graph = canonicalize(capture(model, inputs))
        assert differences(graph(*inputs), model(*inputs)) == []
        assert any(n.op == "call_function" for n in graph.graph.nodes)
