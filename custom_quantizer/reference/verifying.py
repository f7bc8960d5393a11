"""What a backend reports of its own programs, for code that compares one with its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    detached_copy,
    is_constant,
    qparams_of,
)
from custom_quantizer.ops.backend import Backend
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.following import (
    LAST_BITS,
    TensorChecks,
    follow,
    relative_error,
)
from custom_quantizer.reference.interpreter import IntegerReference

__all__ = [
    "Checks",
    "Difference",
    "Followed",
    "LayerCheck",
    "Program",
    "TensorDifference",
    "apart",
    "beyond",
    "follow_program",
    "instrumented",
    "output_scales",
    "showing",
    "tapped_integers",
    "tensor_differences",
]


@dataclass(frozen=True)
class Difference:
    """Something a program holds that is not what the graph says.

    Attributes:
        node: anchor of the op in the converted graph.
        where: node and module path, for messages.
        what: ``weight``, ``weight scale``, ``bias``, ``input scale``, ``output scale``, ``clamp``,
            ``second factor``, ``missing``.
        detail: both values.
    """

    node: str
    where: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.detail}"


@dataclass(frozen=True)
class LayerCheck:
    """A layer that quantizes at run time, next to what follows from the input that it got.

    Attributes:
        node: its anchor in the converted graph.
        path: module path.
        values: how many results were compared.
        mismatches: how many differ in any bit.
        beyond: how many differ by more than kernels may: 0 allowed where ``exact``.
        max_abs: largest difference.
        exact: all kernels of this machine give the same bits.
    """

    node: str
    path: str
    values: int
    mismatches: int
    beyond: int
    max_abs: float
    exact: bool

    def __str__(self) -> str:
        where = f"{self.node} ({self.path})" if self.path else self.node
        return (
            f"{self.beyond} of {self.values} values of {where} do not follow from its input, by up "
            f"to {self.max_abs:.3g}"
        )


class Program(Protocol):
    """A program of a backend, made of a converted graph."""

    @property
    def graph(self) -> ConvertedGraph:
        """The converted graph that it was made of."""

    def run(self, *inputs: Any) -> Any:
        """Run it; returns what the model returns."""

    def dequantized(self, outputs: Any) -> Any:
        """What it returned, with float32 values in the place of integers of a border."""

    def reset(self) -> None:
        """Let buffers that it writes be as they were."""


class Checks(Protocol):
    """What a backend tells of its own programs: its module ``checks``."""

    def differences(self, program: Any, graph: ConvertedGraph) -> Iterator[Difference] | None:
        """Constants in the file that are not the graph's; ``None``: they are not read back."""

    def here(self, graph: ConvertedGraph) -> ConvertedGraph:
        """The graph, computed as the runtime does on this machine."""

    def is_exact(self, program: Any, graph: ConvertedGraph) -> bool:
        """Whether the reference gives every output bit for bit: no float op, none emulated."""

    def output_bounds(self, program: Any, graph: ConvertedGraph) -> Sequence[float | None]:
        """How far each output may be from the reference's; ``None``: that is not known."""

    def run_time_layers(
        self, graph: ConvertedGraph, example: tuple[Any, ...]
    ) -> tuple[LayerCheck, ...]:
        """Each layer that quantizes at run time, compared with what follows from its input."""

    def each_tensor(self, graph: ConvertedGraph, example: tuple[Any, ...]) -> TensorChecks | None:
        """Each quantized tensor, compared with what follows from those before it."""

    def inexact_ops(self, program: Any, graph: ConvertedGraph) -> tuple[str, ...]:
        """Ops that are float or emulated, so that equality is not expected, and why."""

    def lower_again(
        self, program: Any, converted: GraphModule, example: tuple[Any, ...]
    ) -> Program:
        """Lower another graph as this program was lowered, without checks."""


def apart(got: Tensor, want: Tensor) -> Tensor:
    """How far values are apart; equal ones not at all, of whatever type.

    Truth values have no difference, that of unsigned integers wraps around, and that of infinities
    is no number.
    """
    if not want.is_floating_point():
        got, want = got.to(torch.int64), want.to(torch.int64)
    return torch.where(got == want, 0, (got - want).abs())


def beyond(got: Tensor, want: Tensor, bound: float) -> Tensor:
    """Which values are further apart than ``bound``; NaN is far from everything."""
    return ~(apart(got, want) <= bound)


def output_scales(model: GraphModule) -> list[float | None]:
    """Scale of each tensor a converted graph returns; ``None`` where it is not quantized."""
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    scales: list[float | None] = []
    for value in pytree.tree_leaves(output.args[0]):
        quantized = isinstance(value, Node) and value.target is DEQUANTIZE_PER_TENSOR
        scales.append(cast(float, value.args[1]) if quantized else None)
    return scales


def instrumented(
    converted: GraphModule, *, outputs: bool = False
) -> tuple[GraphModule, list[tuple[str, float]]]:
    """A copy of a converted graph that returns every quantized tensor.

    Args:
        converted: the graph.
        outputs: return what it returns behind them.

    Returns:
        The copy, whose inputs and outputs are flat, and for each output the name of the node whose
        tensor it is and its scale.
    """
    model = detached_copy(converted)
    taps: list[tuple[str, float]] = []
    results: list[Node] = []
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    for node in _quantizations(model):
        with model.graph.inserting_before(output):
            results.append(model.graph.call_function(DEQUANTIZE_PER_TENSOR, (node, *node.args[1:])))
        taps.append((cast(Node, node.args[0]).name, cast(float, node.args[1])))
    if outputs:
        results += pytree.tree_leaves(output.args[0])
    output.args = (tuple(results),)
    model.graph.set_codegen(CodeGen())
    model.graph.eliminate_dead_code()
    model.recompile()
    return model, taps


def showing(converted: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """A copy of a converted graph, inputs and outputs flat, that returns some of its tensors."""
    model = detached_copy(converted)
    by_name = {node.name: node for node in model.graph.nodes}
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    output.args = (tuple(by_name[node.name] for node in nodes),)
    model.graph.set_codegen(CodeGen())
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def _quantizations(model: GraphModule) -> list[Node]:
    """What makes the quantized tensors of a converted graph, in execution order."""
    quantizes = (node for node in model.graph.nodes if node.target is QUANTIZE_PER_TENSOR)
    return [node for node in quantizes if not is_constant(node.args[0])]


def tapped_integers(tapped: GraphModule, results: Sequence[Any]) -> dict[Node, Tensor]:
    """The integers of each quantize node of an :func:`instrumented` graph, int64.

    Args:
        tapped: the graph.
        results: what a program of it returns, flat: a float32 tensor for each node comes first.
    """
    nodes = _quantizations(tapped)
    found: dict[Node, Tensor] = {}
    for node, real in zip(nodes, results[: len(nodes)], strict=True):
        qparams = qparams_of(tapped, node)
        units = real.to(torch.float64) / cast(float, qparams.scale)
        found[node] = (torch.round(units) + qparams.zero_point).to(torch.int64)
    return found


@dataclass(frozen=True)
class TensorDifference:
    """One quantized tensor: what the runtime computes, next to the integer reference.

    Attributes:
        node: that computes it.
        values: how many were compared.
        mismatches: how many differ.
        max_lsb: largest difference, in steps of its scale.
    """

    node: str
    values: int
    mismatches: int
    max_lsb: float

    def __str__(self) -> str:
        return f"{self.mismatches} of {self.values} values differ, by up to {self.max_lsb:.0f} LSB"


def tensor_differences(
    graph: ConvertedGraph,
    batches: Sequence[tuple[Any, ...]],
    lower: Callable[[GraphModule, tuple[Any, ...]], Program],
) -> tuple[TensorDifference, ...]:
    """Lower the graph with every quantized tensor as an output and compare these, in graph order.

    That is another program than the graph's own: a backend cannot merge ops across an output.

    Args:
        graph: to lower.
        batches: inputs.
        lower: makes a program of a converted graph, without checks.

    Raises:
        LoweringError: the graph cannot be lowered so.
        ProgramError: the program does not run.
    """
    tapped, taps = instrumented(graph.model)
    if not taps:
        return ()
    flat = [tuple(pytree.tree_leaves(batch)) for batch in batches]
    program = lower(tapped, flat[0])
    reference = IntegerReference(read_converted(tapped, graph.backend))
    counts = [(0, 0, 0.0)] * len(taps)
    for inputs in flat:
        got, want = (pytree.tree_leaves(run(*inputs)) for run in (program.run, reference))
        for i, ((_, scale), mine, theirs) in enumerate(zip(taps, want, got, strict=True)):
            values, wrong, most = counts[i]
            lsb = float((mine - theirs).abs().max()) / scale if mine.numel() else 0.0
            counts[i] = (
                values + mine.numel(),
                wrong + int((mine != theirs).sum()),
                max(most, lsb),
            )
    return tuple(
        TensorDifference(name, values, wrong, float(round(most)))
        for (name, _), (values, wrong, most) in zip(taps, counts, strict=True)
    )


@dataclass(frozen=True)
class Followed:
    """What a program that returns all its quantized tensors computes.

    Attributes:
        checks: of these tensors.
        following: outputs of the graph that follow from the tensors.
        results: those of the program.
    """

    checks: TensorChecks
    following: list[Any]
    results: list[Any]

    @property
    def outputs_follow(self) -> bool:
        """Whether the outputs are those that follow, but for last bits of float ops."""
        pairs = zip(self.following, self.results, strict=True)
        return all(
            relative_error(want, got) <= LAST_BITS
            for want, got in pairs
            if isinstance(want, Tensor)
        )


def follow_program(
    graph: ConvertedGraph,
    example: tuple[Any, ...],
    lower: Callable[[ConvertedGraph, tuple[Any, ...]], Program],
    backend: Backend,
) -> Followed:
    """Lower a graph with all quantized tensors as outputs, and follow these.

    Args:
        graph: a converted graph.
        example: inputs of it.
        lower: makes a program, without checks.
        backend: whose arithmetic they follow by.
    """
    tapped, taps = instrumented(graph.model, outputs=True)
    flat = tuple(pytree.tree_leaves(example))
    program = lower(read_converted(tapped, graph.backend), flat)
    results = pytree.tree_leaves(program.run(*flat))
    checks, following = follow(
        read_converted(tapped, backend), tapped_integers(tapped, results), flat
    )
    return Followed(checks, following[len(taps) :], results[len(taps) :])
