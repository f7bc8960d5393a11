"""Does a TOSA program compute what its graph says?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.fx import GraphModule

from custom_quantizer.backends.tosa import kernels
from custom_quantizer.backends.tosa.lowering import make_program
from custom_quantizer.backends.tosa.program import TosaProgram
from custom_quantizer.core.graph import describe
from custom_quantizer.errors import CustomQuantizerError, LoweringError, VerificationError
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.following import TensorChecks
from custom_quantizer.reference.verifying import (
    Difference,
    LayerCheck,
    follow_program,
    output_scales,
    tensor_differences,
)

__all__ = [
    "check_program",
    "differences",
    "each_tensor",
    "here",
    "inexact_ops",
    "is_exact",
    "lower_again",
    "output_bounds",
    "run_time_layers",
]


def check_program(program: TosaProgram, graph: ConvertedGraph, example: tuple[Any, ...]) -> None:
    """Every integer op is in the program, and the outputs are the reference's, bit for bit.

    What float ops outside compute may differ in last bits. Then each integer tensor has to follow
    from those before it, and the outputs from these.

    Raises:
        LoweringError: ExecuTorch's partitioner left an integer op out.
        VerificationError: names the first op that computes other integers.
    """
    left = [op for op in program.report.ops if op.backend is kernels.OUTSIDE]
    integer = {op.node.name for op in graph.integer}
    refused = [op.node for op in left if op.node in integer]
    if refused:
        raise LoweringError(
            f"{', '.join(refused[:5])}: planned on integers, but ExecuTorch's partitioner left it "
            "out of the TOSA program; leave it in float with set_node_name(name, None)"
        )
    differ, total = program.differing([example])
    if differ and not (inexact_ops(program, graph) and _follows(graph, example)):
        where = _first_wrong(program, graph, example)
        raise VerificationError(
            f"{where}: the TOSA program computes other integers than the graph says; {differ:,} of "
            f"{total:,} outputs differ on the example; leave the op in float with "
            "set_node_name(name, None), and please report the model"
        )


def differences(program: TosaProgram, graph: ConvertedGraph) -> Iterator[Difference] | None:
    """``None``: weights and factors are not read out of the flatbuffer, only what it computes."""
    return None


def here(graph: ConvertedGraph) -> ConvertedGraph:
    """The graph: Arm's reference model computes alike on all machines."""
    return graph


def is_exact(program: TosaProgram, graph: ConvertedGraph) -> bool:
    """Whether nothing is outside, where it runs in float, and PyTorch's kernels may differ."""
    return not inexact_ops(program, graph)


def output_bounds(program: TosaProgram, graph: ConvertedGraph) -> tuple[float | None, ...]:
    """0 for each output where nothing is outside; otherwise not known."""
    return (0.0 if is_exact(program, graph) else None,) * len(output_scales(graph.model))


def run_time_layers(graph: ConvertedGraph, example: tuple[Any, ...]) -> tuple[LayerCheck, ...]:
    """None: nothing is quantized at run time."""
    return ()


def each_tensor(graph: ConvertedGraph, example: tuple[Any, ...]) -> TensorChecks | None:
    """Compare each quantized tensor with what follows from those before it."""
    found = follow_program(graph, example, make_program, graph.backend).checks
    return found if found.tensors else None


def inexact_ops(program: TosaProgram, graph: ConvertedGraph) -> tuple[str, ...]:
    """Ops in float, outside, and why."""
    outside = (op for op in program.report.ops if op.backend is kernels.OUTSIDE)
    return tuple(f"{op.node}: {op.reason}" for op in outside)


def lower_again(
    program: TosaProgram, converted: GraphModule, example: tuple[Any, ...]
) -> TosaProgram:
    """Lower another graph as this program was lowered, without checks."""
    graph = read_converted(converted, program.graph.backend)
    return make_program(graph, example, passes=program.passes)


def _follows(graph: ConvertedGraph, example: tuple[Any, ...]) -> bool:
    try:
        found = follow_program(graph, example, make_program, graph.backend)
    except CustomQuantizerError:
        return False
    return found.checks.first is None and found.outputs_follow


def _first_wrong(program: TosaProgram, graph: ConvertedGraph, example: tuple[Any, ...]) -> str:
    """The first op whose integers differ, when the program returns those of every op."""
    makers = {op.output_node.name: op.node for op in graph.integer}
    try:
        tensors = tensor_differences(graph, [example], partial(lower_again, program))
    except CustomQuantizerError as error:
        return f"the program as a whole (with more outputs it is refused: {error})"
    for tensor in tensors:
        if tensor.mismatches:
            return describe(makers[tensor.node]) if tensor.node in makers else tensor.node
    return "the program as a whole (each op by itself is right)"
