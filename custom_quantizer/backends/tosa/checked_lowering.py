"""Converted graph in, checked TOSA program out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from custom_quantizer.backends.tosa.backend import BACKEND
from custom_quantizer.backends.tosa.checks import check_program
from custom_quantizer.backends.tosa.lowering import make_program
from custom_quantizer.backends.tosa.passes import PASSES, Work
from custom_quantizer.backends.tosa.program import TosaProgram
from custom_quantizer.backends.tosa.tools import require
from custom_quantizer.core.threads import begin, tools
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.inputs import check_example

__all__ = ["lower", "lower_graph"]


@tools()
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TosaProgram:
    """Lower a converted graph to TOSA through ExecuTorch's arm backend.

    The program is for the sizes of the example: TOSA has no dynamic ones here. Then it is run on
    Arm's reference model, and its outputs on the example must be those of the integer reference in
    mode ``tosa``, bit for bit.

    Args:
        converted: what ``convert_pt2e`` returns, planned for TOSA; it is not changed.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        check: run and compare. Without it a wrong program would go unnoticed.
        progress: called with the name of each stage.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the example does not fit the graph.
        LoweringError: the TOSA tools are not installed; ExecuTorch refused the graph; or nothing of
            it is integer.
        VerificationError: the program computes other integers; names the first op that does.
    """
    require()
    return lower_graph(
        read_converted(converted, BACKEND), example_inputs, check=check, progress=progress
    )


@tools()
def lower_graph(
    graph: ConvertedGraph,
    example_inputs: tuple[Any, ...],
    *,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
    passes: Sequence[Callable[[Work], int]] = PASSES,
) -> TosaProgram:
    """:func:`lower`, for whom the graph was read already.

    Args:
        graph: the graph.
        example_inputs: as of :func:`lower`.
        check: likewise.
        progress: likewise.
        passes: of :data:`~custom_quantizer.backends.tosa.passes.PASSES`, those to run.
    """
    program = make_program(graph, example_inputs, progress=progress, passes=passes)
    if check:
        begin(progress, "checking the program")
        check_program(program, graph, check_example(graph, example_inputs))
    return program
