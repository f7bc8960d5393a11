"""What ExecuTorch's own XNNPACK op tests ask of the stock quantizer holds for ours.

The ops and shapes are those of ``executorch/backends/xnnpack/test/ops`` (1.5.1): one delegate and
nothing outside it. Where upstream allows a tolerance, here the outputs are those of the integer
reference, bit for bit. The cases of one file stand side by side in one model, since lowering costs
seconds; a case is a module of its own in it, so that what became of its ops is told apart.

The contract of each op family asks the same of its own cases by default, so most of these are slow.

Not here: half precision (``test_export_features.py``), and graphs that call quantize and
dequantize themselves, which are no float graphs (``test_quantizer.py`` refuses them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, differences, stress
from support.models import convert, randomize_batch_norms
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.checks import relative_error

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One model of one upstream test, and the shapes of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]


def case(name: str, function: Callable[..., Any], *shapes: Shape, **children: Any) -> Case:
    """``function(module, *inputs)``; children are made anew each time."""
    return Case(
        name, lambda: Function(function, **{k: make() for k, make in children.items()}), shapes
    )


def layer(name: str, make: Callable[[], nn.Module], *shapes: Shape) -> Case:
    return Case(name, make, shapes)


def conv(transposed: bool, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return lambda: kind(*args, **options)


def four_adds(_module: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    z = z + x
    z = z + x
    return z + z


def add_relu_twice(_module: Any, x: Tensor, y: Tensor) -> Tensor:
    z = F.relu(x + y)
    return F.relu(z + z)


class AddConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.randn(4, 4, 4)
        self.register_buffer("kept", torch.randn(4, 4, 4), persistent=False)
        self.learned = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.plain + torch.ones(1, 1, 1), x + self.kept + self.learned


def joined(_module: Any, *tensors: Tensor) -> Tensor:
    x = torch.cat(tensors)
    return x + x


class PatchTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.first = nn.Parameter(torch.full((1, 1, 8), 4.0))
        self.places = nn.Parameter(torch.full((1, 5, 8), 0.125))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat((self.first.expand(x.shape[0], -1, -1), tokens), 1) + self.places


def residual_norms(m: Any, x: Tensor) -> Tensor:
    y = m.norm1(m.conv1(x))
    return torch.add(y, m.norm2(m.conv2(y)))


def relu_users(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return y + m.conv2(F.relu(y))


def _shared_norm(m: Any, x: Tensor) -> Tensor:
    x = F.hardtanh(m.norm(m.conv1(x)))
    return F.hardtanh(m.norm(m.conv2(x)))


def _convs(transposed: bool) -> tuple[Case, ...]:
    t = transposed
    image = (1, 2, 8, 8)
    plain = {"stride": 2, "padding": 1}
    coarse = {"bias": False, "padding": 1, "stride": 4}
    seq = {"padding": 1, "bias": False}
    return (
        layer("bias", conv(t, 2, 1, 3, **plain), image),
        layer("no_bias", conv(t, 2, 1, 3, bias=False, **plain), image),
        case(
            "sequence",
            lambda m, x: m.b(m.a(x)),
            (1, 1, 3, 3),
            a=conv(t, 1, 3, 3, **seq),
            b=conv(t, 3, 2, 3, **seq),
        ),
        case(
            "norm",
            _shared_norm,
            (2, 2, 4, 4),
            conv1=conv(t, 2, 2, 2, **coarse),
            conv2=conv(t, 2, 2, 2, **coarse),
            norm=lambda: nn.BatchNorm2d(2),
        ),
        case("relu", lambda m, x: F.relu(m.a(x)), (2, 2, 4, 4), a=conv(t, 2, 2, 2, **coarse)),
        case(
            "relu_sequence",
            lambda m, x: F.relu(m.b(F.relu(m.a(x)))),
            (1, 1, 1, 1),
            a=conv(t, 1, 1, 1),
            b=conv(t, 1, 64, 1),
        ),
        case(
            "relu_users", relu_users, (1, 1, 1, 1), conv1=conv(t, 1, 1, 1), conv2=conv(t, 1, 64, 1)
        ),
    )


def _linears(*shape: int) -> tuple[Case, ...]:
    where = f"{len(shape)}d"
    size = shape[-1]
    return tuple(
        case(
            f"{'relu' if relu else 'linear'}_{where}{'_bias' if bias else ''}",
            (lambda m, x: F.relu(m.a(x))) if relu else (lambda m, x: m.a(x)),
            shape,
            a=lambda bias=bias: nn.Linear(size, 4, bias=bias),
        )
        for relu in (False, True)
        for bias in (False, True)
    )


def around(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The op between two integer ops, as it stands in networks."""
    return lambda m, x: m.b(function(m.a(x)))


def _functions(**functions: Callable[[Tensor], Tensor]) -> tuple[Case, ...]:
    pair = {"a": lambda: nn.Conv2d(3, 4, 1), "b": lambda: nn.Conv2d(4, 3, 1)}
    return tuple(
        case(name, around(function), (2, 3, 4, 5), **pair) for name, function in functions.items()
    )


GROUPS: dict[str, tuple[Case, ...]] = {
    "add": (
        layer("constant", AddConstant, (4, 4, 4)),
        case("add", four_adds, (1, 1, 4, 4), (1, 1, 4, 4)),
        case("itself", lambda m, x: x + x, (1, 1, 4, 4)),
        case("broadcast", four_adds, (1, 1, 4, 4), (1, 1, 4, 1)),
        case("relu", lambda m, x, y: F.relu(x + y), (1, 1, 4, 4), (1, 1, 4, 4)),
        case("relu_twice", add_relu_twice, (1, 1, 20, 20), (1, 1, 20, 20)),
        case("subtract", lambda m, x, y: x - y, (1, 1, 4, 4), (1, 1, 4, 1)),
    ),
    "multiply": (
        case("broadcast", lambda m, x, y: x * y, (1, 1, 4, 4), (1, 1, 4, 1)),
        case("itself", lambda m, x: x * x, (1, 1, 4, 4)),
        case("products", lambda m, x, y: torch.mul(x, y) * torch.mul(x, y), (1, 4, 4), (1, 4, 4)),
        case("relu", lambda m, x, y: F.relu(x * y), (1, 1, 4, 4), (1, 1, 4, 4)),
    ),
    "cat": (
        *(
            case(str(count), joined, *((size, 2, 3) for size in sizes))
            for count, sizes in [
                (2, (1, 3)),
                (3, (1, 3, 2)),
                (4, (1, 3, 2, 5)),
                (5, (1, 3, 2, 5, 5)),
                (6, (1,) * 6),
                (9, (1,) * 9),
            ]
        ),
        case("empty", joined, (0, 2, 3), (1, 2, 3), (3, 2, 3), (0, 2, 3)),
        case("negative", lambda m, x, y: torch.cat([x, y], -1) * 2, (3, 2, 3), (3, 2, 1)),
        layer("tokens", PatchTokens, (1, 3, 8, 8)),
    ),
    "clamp": (
        case("clamp", lambda m, x: (lambda z: z + z)(x.clamp(-1, 1)), (1, 4, 12, 12)),
        *(
            case(f"hardtanh_{i}", lambda m, x: (lambda z: z + z)(F.hardtanh(x)), shape)
            for i, shape in enumerate([(2, 3, 2), (2, 1, 2), (2, 3)])
        ),
    ),
    "conv1d": (
        layer("plain", lambda: nn.Conv1d(2, 1, 3, stride=2, padding=1), (2, 2, 4)),
        *(
            layer(
                f"same_{size}_{dilation}",
                lambda s=size, d=dilation: nn.Conv1d(2, 4, s, padding="same", dilation=d),
                (1, 2, 16),
            )
            for size, dilation in [(2, 1), (3, 1), (4, 1), (4, 2)]
        ),
        case(
            "norms",
            residual_norms,
            (2, 2, 4),
            conv1=lambda: nn.Conv1d(2, 2, 3, padding=1),
            conv2=lambda: nn.Conv1d(2, 2, 3, padding=1),
            norm1=lambda: nn.BatchNorm1d(2),
            norm2=lambda: nn.BatchNorm1d(2),
        ),
    ),
    "conv2d": (
        *_convs(False),
        layer("same", lambda: nn.Conv2d(2, 4, 4, padding="same"), (1, 2, 8, 8)),
        layer("same_depthwise", lambda: nn.Conv2d(4, 4, 4, groups=4, padding="same"), (1, 4, 8, 8)),
        case(
            "same_flatten",
            lambda m, x: m.a(x).flatten(1) * 2,
            (1, 1, 8, 5),
            a=lambda: nn.Conv2d(1, 16, (2, 1), padding="same"),
        ),
        layer("depthwise", lambda: nn.Conv2d(2, 6, 3, 2, 1, groups=2), (1, 2, 8, 8)),
        case(
            "depthwise_relu",
            lambda m, x: F.relu(m.a(x * 11)),
            (1, 2, 8, 8),
            a=lambda: nn.Conv2d(2, 6, 3, 2, 1, groups=2),
        ),
        case(
            "copy",
            lambda m, x: m.b(m.a(x).to(memory_format=torch.contiguous_format)),
            (1, 3, 9, 9),
            a=lambda: nn.Conv2d(3, 3, 3),
            b=lambda: nn.Conv2d(3, 3, 3),
        ),
    ),
    "conv_transpose2d": (
        *_convs(True),
        layer(
            "output_padding",
            lambda: nn.ConvTranspose2d(2, 1, 3, 2, 1, output_padding=1),
            (1, 2, 8, 8),
        ),
    ),
    "linear": (*_linears(2, 3), *_linears(1, 2, 3)),
    "pool": (
        *(
            case(
                f"max_{len(args)}",
                lambda m, x, args=args: F.max_pool2d(x + x, *args),
                (1, 2, 8, 8),
            )
            for args in [(4,), (4, 2), (4, 2, 2)]
        ),
        case("mean", lambda m, x: (x * 3).mean((-1, -2), keepdim=True) * 2, (1, 5, 4, 4)),
    ),
    "movers": (
        case("permute", lambda m, x: (x + x).permute(0, 2, 3, 1), (1, 1, 4, 4)),
        case("slice", lambda m, x: (x + x)[1:3, -2:, :-1], (5, 5, 5)),
        case("pad_2d", lambda m, x: (lambda z: z + z)(F.pad(x + x, (2, 1, 2, 3))), (5, 4, 3, 2)),
        case("pad_value", lambda m, x: (lambda z: z + z)(F.pad(x, (2, 1), value=2.3)), (1, 2)),
        case("view", lambda m, x: (x + x).reshape(4, 6) * 3, (2, 3, 4)),
        case("unsqueeze", lambda m, x: (x + x).unsqueeze(-1) * 3, (2, 3)),
    ),
    # Upstream asks these in float only: here they stand in the middle of an int8 network.
    "functions": _functions(
        abs=torch.abs,
        ceil=torch.ceil,
        elu=F.elu,
        exp=torch.exp,
        floor=torch.floor,
        gelu=F.gelu,
        gelu_tanh=lambda x: F.gelu(x, approximate="tanh"),
        hardswish=F.hardswish,
        leaky_relu=F.leaky_relu,
        negate=torch.neg,
        sigmoid=torch.sigmoid,
        silu=F.silu,
        square=torch.square,
        tanh=torch.tanh,
    ),
}

ALL = [(group, c.name) for group, cases in GROUPS.items() for c in cases]
SCHEMES = ["a8w8", pytest.param("a8w8-per_tensor", marks=pytest.mark.slow)]


class Side(nn.Module):
    """All cases of a group; each takes its inputs in turn."""

    def __init__(self, cases: tuple[Case, ...]) -> None:
        super().__init__()
        self.counts = [len(c.shapes) for c in cases]
        self.cases = nn.ModuleDict({f"case_{c.name}": c.build() for c in cases})

    def forward(self, *inputs: Tensor) -> list[Any]:
        feed = iter(inputs)
        return [
            module(*[next(feed) for _ in range(count)])
            for count, module in zip(self.counts, self.cases.values(), strict=True)
        ]


@dataclass(frozen=True)
class Made:
    graph: GraphModule
    lowered: cq.LoweredProgram
    inputs: list[tuple[Tensor, ...]]
    wanted: list[list[Any]]
    got: list[list[Any]]


@cache
def made(group: str, scheme: str) -> Made:
    cases = GROUPS[group]
    torch.manual_seed(0)
    model = randomize_batch_norms(Side(cases)).eval()
    shapes = [shape for c in cases for shape in c.shapes]
    example = tuple(torch.randn(shape) for shape in shapes)
    graph = convert(model, example, scheme).graph
    lowered = cq.lower(graph, example, check=False)
    reference = cq.integer_reference(graph)
    inputs = [example, *stress(shapes)]
    wanted, got = [reference(*i) for i in inputs], [lowered.run(*i) for i in inputs]
    return Made(graph, lowered, inputs, wanted, got)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", GROUPS)
def test_one_delegate(group: str, scheme: str) -> None:
    report = made(group, scheme).lowered.report
    assert (report.delegates, report.outside) == (1, ())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("group", "name"), ALL)
def test_outputs_are_those_of_the_reference(group: str, name: str, scheme: str) -> None:
    found = made(group, scheme)
    index = [c.name for c in GROUPS[group]].index(name)
    for wanted, got in zip(found.wanted, found.got, strict=True):
        assert differences(got[index], wanted[index]) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("group", "name"), ALL)
def test_ops_are_delegated(group: str, name: str, scheme: str) -> None:
    found = made(group, scheme)
    rows = [op for op in found.lowered.report.ops if f"case_{name}" in op.path.split(".")]
    assert rows
    outside = [f"{op.node}: {op.reason}" for op in rows if op.backend is kernels.PORTABLE]
    assert outside == []
    if group not in ("functions", "pool", "movers", "cat"):
        assert {op.backend for op in rows} <= {kernels.INT8, kernels.FOLDED}


# ---------------------------------------------------------------------------------------------
# Quantized while it runs, and dynamic sizes
# ---------------------------------------------------------------------------------------------


def chained(m: Any, x: Tensor, y: Tensor) -> Tensor:
    a = m.first(x) + m.second(y)
    return m.last(a)


DYNAMIC = {
    "linear": case("", lambda m, x: m.a(x), (1, 8, 13), a=lambda: nn.Linear(13, 17)),
    "no_bias": case("", lambda m, x: m.a(x), (1, 8, 13), a=lambda: nn.Linear(13, 17, bias=False)),
    "two_batches": case("", lambda m, x: m.a(x), (2, 2, 14), a=lambda: nn.Linear(14, 15)),
    "parallel": case(
        "",
        lambda m, x, y: m.a(x) + m.b(y),
        (2, 4),
        (2, 4),
        a=lambda: nn.Linear(4, 5),
        b=lambda: nn.Linear(4, 5),
    ),
    "sequence": case(
        "", lambda m, x: m.b(m.a(x)), (2, 4), a=lambda: nn.Linear(4, 5), b=lambda: nn.Linear(5, 3)
    ),
    "parallel_and_sequence": case(
        "",
        chained,
        (2, 4),
        (2, 4),
        first=lambda: nn.Linear(4, 5),
        second=lambda: nn.Linear(4, 5),
        last=lambda: nn.Linear(5, 3),
    ),
    "shared_input": case(
        "",
        lambda m, x: m.a(x) + m.b(x),
        (1, 2, 13),
        a=lambda: nn.Linear(13, 17),
        b=lambda: nn.Linear(13, 17),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4"])
def test_linear_layers_quantized_while_they_run(scheme: str) -> None:
    cases = tuple(DYNAMIC.values())
    torch.manual_seed(0)
    model = Function(
        lambda m, *x: Side.forward(m, *x),
        cases=nn.ModuleDict({f"case_{name}": c.build() for name, c in DYNAMIC.items()}),
    ).eval()
    model.counts = [len(c.shapes) for c in cases]
    example = tuple(torch.randn(shape) for c in cases for shape in c.shapes)
    lowered = cq.lower(convert(model, example, scheme).graph, example, check=False)
    assert lowered.report.fully_delegated
    linears = [op for op in lowered.report.ops if "linear" in op.family]
    odd = {"case_linear", "case_no_bias", "case_shared_input"}
    for op in linears:
        packed = scheme == "dyn8w4" and not odd & set(op.path.split("."))
        # Layers with an odd number of inputs are stored in int8: see the facts about packing.
        if packed and "last" not in op.path and not op.path.endswith("sequence.b"):
            assert op.backend is kernels.PACKED_INT4, op
        else:
            assert op.backend is kernels.DYNAMIC_INT8, op
    for wanted, got in zip(model(*example), lowered.run(*example), strict=True):
        assert relative_error(wanted, got) < (0.02 if scheme == "dyn8w8" else 0.2)


@pytest.mark.parametrize("name", slow_but(["norms"], ["plain", "norms"]))
def test_dynamic_batches(name: str) -> None:
    (found,) = (c for c in GROUPS["conv1d"] if c.name == name)
    torch.manual_seed(0)
    model = randomize_batch_norms(found.build()).eval()
    example = (torch.randn(found.shapes[0]),)
    inner = {0: torch.export.Dim("batch", min=2, max=10)}
    shapes = ((inner,),) if isinstance(model, Function) else (inner,)
    graph = convert(model, example, dynamic_shapes=shapes).graph
    lowered = cq.lower(graph, example)
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    for batch in (2, 5, 10):
        x = torch.randn(batch, *found.shapes[0][1:])
        assert differences(lowered.run(x), reference(x)) == []
