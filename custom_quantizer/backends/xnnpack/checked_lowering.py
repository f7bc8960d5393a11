"""Converted graph in, checked ExecuTorch program out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.backends.xnnpack.checks import check_program
from custom_quantizer.backends.xnnpack.lowering import data_files, make_program
from custom_quantizer.backends.xnnpack.program import LoweredProgram
from custom_quantizer.core.graph import describe
from custom_quantizer.core.threads import begin, tools
from custom_quantizer.errors import LoweringError
from custom_quantizer.ops.rewrites.constants import draws_numbers, training_switches
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX
from custom_quantizer.reference.inputs import check_example

__all__ = ["lower", "lower_graph"]

logger = logging.getLogger(__name__)


@tools()
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram:
    """Lower a converted graph to an ExecuTorch program that runs on XNNPACK.

    The graph is rewritten so that the delegate keeps every op it can, partitioned and written.
    Then the program is read back and run: weights and biases in the file must be the graph's,
    integer for integer, and the outputs on the example must be those of the integer reference.

    Args:
        converted: what ``convert_pt2e`` returns; it is not changed.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        check: run the checks. Without them a wrong program would go unnoticed, so ExecuTorch then
            validates the graph after each of its passes, which the checks make needless.
        progress: called with the name of each stage.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the example does not fit the graph.
        LoweringError: the backend refused the graph.
        VerificationError: the program is not what the graph says.
    """
    return lower_graph(
        read_converted(converted, BACKEND),
        example_inputs,
        dynamic_max=dynamic_max,
        check=check,
        progress=progress,
    )


@tools()
def lower_graph(
    graph: ConvertedGraph,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram:
    """:func:`lower`, for whom the graph was read already."""
    if check:
        _check_repeats(graph.model)
    if files := data_files(graph.model):
        logger.warning(
            "%d constants are tagged with data files (%s), and all are written into the program: "
            "call to_edge_transform_and_lower with custom_quantizer.XnnpackPartitioner() for "
            "weights in files of their own",
            len(files),
            ", ".join(dict.fromkeys(files.values())),
        )
    program = make_program(
        graph, example_inputs, validate=not check, dynamic_max=dynamic_max, progress=progress
    )
    if check:
        begin(progress, "checking the program")
        check_program(program, graph, check_example(graph, example_inputs))
    return program


def _check_repeats(converted: GraphModule) -> None:
    """Refuse a graph of which two runs differ: there is nothing to compare a program with."""
    graphs = [module for module in converted.modules() if isinstance(module, GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if draws_numbers(node):
            if training_switches(node):
                raise LoweringError(
                    f"{describe(node)} is in training mode ({node.target}), so that no two runs "
                    "agree; capture model.eval(), and leave the graph in evaluation"
                )
            raise LoweringError(
                f"{describe(node)} draws random numbers ({node.target}), so that no output can be "
                "compared with the integer reference; make the numbers an input of the model, or "
                "capture model.eval() if training alone draws them (stochastic depth)"
            )
