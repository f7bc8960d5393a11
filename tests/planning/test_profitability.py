"""Which ops without an int8 kernel are quantized, and which would only cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, canonicalize, capture, lowered_exactly, quantized
from support.models import conv
from support.selection import slow_but
from torch import Tensor, fx, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.config.rules import Config, Rule, Scope
from custom_quantizer.core.schemes import activation_scheme, scheme
from custom_quantizer.planning.plan import Plan
from custom_quantizer.planning.planner import make_plan
from custom_quantizer.planning.profitability import Kind, Step, unprofitable

IMAGE = (2, 4, 6, 6)
INTEGER, OPTIONAL, MOVEMENT, FLOAT = Kind.INTEGER, Kind.OPTIONAL, Kind.MOVEMENT, Kind.FLOAT


def plan_of(
    function: Callable[..., Any], *rules: Rule, outputs: str | None = None, **children: nn.Module
) -> Plan:
    graph = canonicalize(capture(Function(function, **children), (torch.randn(IMAGE),)))
    config = Config([Rule(Scope.GLOBAL, "", scheme("a8w8")), *rules])
    if outputs is not None:
        config.outputs["*"] = activation_scheme(outputs)
    return make_plan(graph, config, BACKEND)


# ---------------------------------------------------------------------------------------------
# The rule, on graphs of nothing but kinds
# ---------------------------------------------------------------------------------------------


def refused(
    ops: list[tuple[str, Kind, str]], given: str = "", returned: str = ""
) -> dict[str, str]:
    """Ops written as ``(name, kind, names of its inputs)``; ``x`` and ``y`` are inputs."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xy"}
    for name, _, inputs in ops:
        nodes[name] = graph.create_node(
            "call_function", torch.add, tuple(nodes[i] for i in inputs.split()), name=name
        )
    steps = [
        Step(kind, tuple(nodes[i] for i in inputs.split()), nodes[name], (), nodes[name])
        for name, kind, inputs in ops
    ]
    steps = [Step(s.kind, s.inputs, s.output, tuple(s.output.users), s.anchor) for s in steps]
    found = unprofitable(
        steps, [nodes[n] for n in given.split()], [nodes[n] for n in returned.split()]
    )
    return {node.name: why for node, why in found.items()}


IN_FLOAT = "x is float"
OUT_FLOAT = "nothing behind it takes integers"


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        # Between integers.
        ([("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("b", INTEGER, "f")], {}),
        # A float neighbour on either side, or on both.
        ([("f", OPTIONAL, "x"), ("b", INTEGER, "f")], {"f": IN_FLOAT}),
        ([("a", INTEGER, "x"), ("f", OPTIONAL, "a")], {"f": OUT_FLOAT}),
        ([("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("g", FLOAT, "f")], {"f": OUT_FLOAT}),
        ([("a", FLOAT, "x"), ("f", OPTIONAL, "a"), ("b", INTEGER, "f")], {"f": "a is float"}),
        # One user of several wants integers.
        (
            [("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("b", INTEGER, "f"), ("g", FLOAT, "f")],
            {},
        ),
        # A chain stands or falls together.
        (
            [
                ("a", INTEGER, "x"),
                *((f"f{i}", OPTIONAL, f"f{i - 1}" if i else "a") for i in range(4)),
                ("b", INTEGER, "f3"),
            ],
            {},
        ),
        (
            [("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("g", OPTIONAL, "f"), ("h", FLOAT, "g")],
            {"f": OUT_FLOAT, "g": OUT_FLOAT},
        ),
        (
            [("f", OPTIONAL, "x"), ("g", OPTIONAL, "f"), ("b", INTEGER, "g")],
            {"f": IN_FLOAT, "g": "f is float"},
        ),
        # All inputs must be integers.
        (
            [("a", INTEGER, "x"), ("f", OPTIONAL, "a y"), ("b", INTEGER, "f")],
            {"f": "y is float"},
        ),
        # Data movement passes both sides on.
        (
            [
                ("a", INTEGER, "x"),
                ("m", MOVEMENT, "a"),
                ("f", OPTIONAL, "m"),
                ("n", MOVEMENT, "f"),
                ("b", INTEGER, "n"),
            ],
            {},
        ),
        ([("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("m", MOVEMENT, "f")], {"f": OUT_FLOAT}),
        # A cat with integers wants integers; two optional ops do not justify each other.
        ([("a", INTEGER, "x"), ("f", OPTIONAL, "a"), ("c", MOVEMENT, "f a")], {}),
        (
            [
                ("a", INTEGER, "x"),
                ("f", OPTIONAL, "a"),
                ("g", OPTIONAL, "a"),
                ("c", MOVEMENT, "f g"),
            ],
            {"f": OUT_FLOAT, "g": OUT_FLOAT},
        ),
        # What fails on one side of a join takes the integers of the other side with it.
        (
            [
                ("a", INTEGER, "x"),
                ("f", OPTIONAL, "a"),
                ("g", OPTIONAL, "f y"),
                ("b", INTEGER, "g"),
            ],
            {"f": OUT_FLOAT, "g": "y is float"},
        ),
    ],
)
def test_an_op_without_a_kernel_is_quantized_between_integers_only(
    ops: list[tuple[str, Kind, str]], expected: dict[str, str]
) -> None:
    assert refused(ops) == expected


def test_inputs_and_outputs_of_the_model_that_are_integers_count() -> None:
    ops = [("f", OPTIONAL, "x")]
    assert refused(ops) == {"f": IN_FLOAT}
    assert refused(ops, given="x") == {"f": OUT_FLOAT}
    assert refused(ops, given="x", returned="f") == {}


class Counted(list[Step]):
    """Steps that know how often they were walked through."""

    walks = 0

    def __iter__(self) -> Iterator[Step]:
        self.walks += 1
        return super().__iter__()

    def __reversed__(self) -> Iterator[Step]:
        self.walks += 1
        return super().__reversed__()


@pytest.mark.parametrize("length", [10, 1000])
@pytest.mark.parametrize("first", [INTEGER, FLOAT])
def test_the_steps_are_walked_through_as_often_whatever_their_number(
    length: int, first: Kind
) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(length):
        nodes.append(graph.call_function(torch.neg, (nodes[-1],)))
    steps = Counted(
        Step(first if i == 0 else OPTIONAL, (a,), b, tuple(b.users), b)
        for i, (a, b) in enumerate(pairwise(nodes))
    )
    assert len(unprofitable(steps, (), ())) == length - 1
    assert steps.walks <= 8


# ---------------------------------------------------------------------------------------------
# In plans
# ---------------------------------------------------------------------------------------------

FLOAT_KERNELS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("node", FLOAT_KERNELS)
def test_float_kernels_between_convolutions_are_quantized(node: str) -> None:
    plan = plan_of(lambda s, x: s.b(FLOAT_KERNELS[node](s.a(x))), a=conv(), b=conv())
    op = plan.op(node)
    assert (op.scheme, op.backend, op.reason) == ("a8w8", "xnnpack table", 'set_global("a8w8")')
    assert [t.dtype for t in op.tensors] == ["int8", "int8"]


@pytest.mark.parametrize("node", slow_but(["silu", "elu"], FLOAT_KERNELS))
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda f, s, x: s.a(f(x)), "x is float"),
        (lambda f, s, x: f(s.a(x)), "nothing behind it takes integers"),
        (lambda f, s, x: (s.a(x), f(torch.sin(x))), "sin is float"),
        (lambda f, s, x: torch.sin(f(s.a(x))), "nothing behind it takes integers"),
    ],
)
def test_float_kernels_next_to_float_stay_in_float_and_say_why(
    node: str, function: Callable[..., Any], why: str
) -> None:
    plan = plan_of(lambda s, x: function(FLOAT_KERNELS[node], s, x), a=conv())
    op = plan.op(node)
    assert (op.scheme, op.tensors) == (None, ())
    # Inputs of the test's models are called inputs_0.
    assert why.replace("x is", "inputs_0 is") in op.reason
    assert op.reason.endswith("quantizing it would only cost")


def test_an_order_for_the_op_or_its_type_is_followed() -> None:
    def function(s: Any, x: Tensor) -> Any:
        return s.a(x), torch.sigmoid(x)

    for rule in (
        Rule(Scope.NODE_NAME, "sigmoid", scheme("a8w8")),
        Rule(Scope.OPERATOR_TYPE, "aten.sigmoid.default", scheme("a8w8")),
    ):
        op = plan_of(function, rule, a=conv()).op("sigmoid")
        assert (op.scheme, op.reason) == ("a8w8", str(rule))
    assert plan_of(function, a=conv()).op("sigmoid").scheme is None


def test_an_output_that_is_asked_for_as_integers_counts() -> None:
    def function(s: Any, x: Tensor) -> Any:
        return torch.sigmoid(s.a(x))

    assert plan_of(function, a=conv()).op("sigmoid").scheme is None
    assert plan_of(function, outputs="a8", a=conv()).op("sigmoid").scheme == "a8w8"


def test_a_squeeze_and_excitation_block_is_all_integers() -> None:
    """Its sigmoid works on one pixel; the product with the image has an int8 kernel."""

    def block(s: Any, x: Tensor) -> Any:
        image = F.silu(s.a(x))
        factor = torch.sigmoid(s.c(F.silu(s.b(image.mean((2, 3), keepdim=True)))))
        return s.d(factor * image)

    children = {name: conv() for name in "ad"} | {name: nn.Conv2d(4, 4, 1) for name in "bc"}
    plan = plan_of(block, **children)
    assert [op.node for op in plan.floating] == []
    inputs = (torch.randn(IMAGE),)
    lowered = lowered_exactly(quantized(Function(block, **children), inputs), inputs)
    assert lowered.report.fully_delegated


def test_a_float_kernel_that_is_not_quantized_costs_no_conversion() -> None:
    """One dequantize before it, none behind it: the number of conversions is the smallest."""
    model = Function(lambda s, x: torch.tanh(torch.sigmoid(s.a(x))), a=conv())
    inputs = (torch.randn(IMAGE),)
    lowered = cq.lower(quantized(model, inputs), inputs)
    (delegate,) = lowered.contents.delegates
    kinds = [op.kind for op in delegate.ops]
    assert kinds.count("convert") == 2
    assert kinds.index("sigmoid") + 1 == kinds.index("tanh")
