"""Does a program hold the graph's integers, and does it compute what they say?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.backends.xnnpack.border_constants import borders_in
from custom_quantizer.backends.xnnpack.exactness import here, inexact_ops, is_exact, output_bounds
from custom_quantizer.backends.xnnpack.lowering import make_program
from custom_quantizer.backends.xnnpack.passes.dims import blocks_of
from custom_quantizer.backends.xnnpack.program import (
    WAYS,
    LoweredProgram,
    OpBackend,
    missing_kernels,
    no_kernel,
)
from custom_quantizer.backends.xnnpack.refused import first_refused
from custom_quantizer.backends.xnnpack.run_time import is_exact_here
from custom_quantizer.backends.xnnpack.stored_integers import differences
from custom_quantizer.core.graph import CHOOSE_QPARAMS, describe, module_path, tensor_meta
from custom_quantizer.errors import LoweringError, ProgramError, VerificationError
from custom_quantizer.ops.movement import PERMUTE, RESHAPE
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted
from custom_quantizer.reference.following import TensorChecks, relative_error
from custom_quantizer.reference.verifying import (
    Followed,
    LayerCheck,
    apart,
    beyond,
    follow_program,
    showing,
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
    "relative_error",
    "run_time_layers",
]

logger = logging.getLogger(__name__)

FLOAT_TOLERANCE = 0.1
"""Largest relative error of outputs when float ops take part; a broken program is near 1."""

RUN_TIME_TOLERANCE = 1e-4
"""Relative error of outputs from which on layers that quantize at run time are checked one by one.

Last bits of float ops in between leave outputs near 1e-7, unless they turn one of a layer's
integers into its neighbour.
"""


def check_program(
    program: LoweredProgram,
    graph: ConvertedGraph,
    example: tuple[Any, ...],
    *,
    lowered_here: bool = True,
) -> None:
    """Compare all constants of the file with the graph's, then the outputs on the example.

    Where every op is integer the outputs are those of the integer reference, bit for bit.
    Otherwise float kernels of the backend and of PyTorch differ in their last bits, which quantize
    steps turn into whole units now and then; then the error must be small next to the output.

    Args:
        program: what was written.
        graph: what it was made from.
        example: one set of inputs.
        lowered_here: whether this package lowered it; a program from another hand may have gone a
            way on which the graph's integers get lost, and the message names those that keep them.

    Raises:
        LoweringError: the runtime does not take the program.
        VerificationError: names the first op that is not what the graph says.
    """
    _check_kernels(program)
    found = next(differences(program, graph), None)
    if found is not None:
        ways = "" if lowered_here else f"{WAYS}; if it was lowered so, "
        raise VerificationError(
            f"{found}; the program is not the graph; {ways}leave the op in float with "
            f"set_node_name({found.node!r}, None), and please report the model"
        )
    _check_borders(program, graph)
    _check_outputs(program, graph, example)


def _check_borders(program: LoweredProgram, graph: ConvertedGraph) -> None:
    """What the file says of its integer inputs and outputs, where it says anything."""
    known = {(border.role, border.index): border for border in graph.borders}
    for told in borders_in(program.contents.main, program.contents.constants):
        border = known.get((told.role, told.index))
        if border is None or replace(border, name=told.name) != told:
            meaning = "float32" if border is None else border.meaning
            raise VerificationError(
                f"{told.role} {told.index}: the program says {told.meaning}, the graph {meaning}; "
                "give constant_methods what io_constants returns for this graph"
            )


def _check_kernels(program: LoweredProgram) -> None:
    missing = missing_kernels(program.contents)
    if missing:
        names = {kernel.partition(".")[0] for kernel in missing}
        callers = [_where(op) for op in program.report.ops if names & set(op.outside)]
        raise LoweringError(no_kernel(callers, missing))


def _where(op: OpBackend) -> str:
    return f"{op.node} ({op.path})" if op.path else op.node


def _is_of_few_dims(node: Node) -> bool:
    """Whether a pass makes one or several ops over few dims of an op over many."""
    moves = RESHAPE.targets | PERMUTE.targets
    return node.target in moves or 0 < len(blocks_of(node)) <= kernels.MOST_DIMS


def _run(program: LoweredProgram, graph: ConvertedGraph, example: tuple[Any, ...]) -> list[Any]:
    """Outputs of the program, which may be one that the runtime refuses."""
    try:
        return pytree.tree_leaves(program.run(*example))
    except ProgramError as error:
        rows = [row for row in program.report.ops if row.outside]
        outside = "; ".join(f"{_where(row)}: {', '.join(row.outside)}" for row in rows)
        metas = [(op.node, tensor_meta(op.node)) for op in graph]
        wide = [
            (n, meta.dim())
            for n, meta in metas
            if meta is not None and meta.dim() > kernels.MOST_DIMS
        ]
        if wide:
            node, dims = min(wide, key=lambda op: _is_of_few_dims(op[0]))
            raise LoweringError(
                f"{describe(node)} has {dims} dims, and XNNPACK's tensors at most "
                f"{kernels.MOST_DIMS}; reshape it to fewer ({error})"
            ) from error
        raise LoweringError(
            f"{_refused(graph, example)}{error}"
            + (f" (outside the delegate run {outside})" if outside else "")
        ) from error


def _refused(graph: ConvertedGraph, example: tuple[Any, ...]) -> str:
    """Names the op that the runtime refuses, and says what to do about it."""
    op = first_refused(graph, example)
    if op is None:
        return "leave some ops in float, or write them with other ops: "
    if isinstance(op, FloatOp) and not op.float_fallback:
        cure = "write it with other ops, or let the model end before it"
    else:
        cure = f"leave it in float with set_node_name({op.node.name!r}, None)"
    return f"{describe(op.node)} is the first op that the runtime refuses; {cure}: "


def _check_outputs(
    program: LoweredProgram, graph: ConvertedGraph, example: tuple[Any, ...]
) -> None:
    reference = pytree.tree_leaves(IntegerReference(here(graph))(*example))
    outputs = _run(program, graph, example)
    program.reset()
    if len(reference) != len(outputs):
        raise VerificationError(
            f"the program returns {len(outputs)} tensors, the model {len(reference)}"
        )
    bounds = output_bounds(program, graph)
    # Of integers at the border the float32 values, which are equal if and only if these are.
    dequantize = graph.backend.arithmetic.dequantize
    reference = graph.borders.reals(reference, dequantize)
    outputs = graph.borders.reals(outputs, dequantize)
    doubtful = ""
    for i, (want, got, bound) in enumerate(zip(reference, outputs, bounds, strict=True)):
        if not isinstance(want, Tensor):
            continue
        if want.shape != got.shape:
            raise VerificationError(
                f"output {i} has shape {tuple(got.shape)}, the model returns {tuple(want.shape)}"
            )
        wrong = int(beyond(got, want, bound or 0.0).sum())
        error = relative_error(want, got) if wrong else 0.0
        if wrong and (bound is not None or error > min(RUN_TIME_TOLERANCE, FLOAT_TOLERANCE)):
            worst = float(apart(got, want).max())
            difference = (
                f"output {i}: {wrong} of {want.numel()} values differ from the integer reference, "
                f"by up to {worst:.6g}"
            )
            if bound is None and error <= FLOAT_TOLERANCE:
                doubtful = doubtful or difference
                continue
            if bound:
                difference += f", and the float ops at its end account for {bound:.6g}"
            if bound is not None:
                raise VerificationError(f"{difference}; custom_quantizer.verify names the op")
            _check_each_tensor(graph, example, outputs, difference)
            return
    if doubtful:
        try:
            layers = run_time_layers(graph, example)
        except (LoweringError, ProgramError) as error:
            logger.warning(
                "%s; layers that quantize at run time could not be checked one by one (%s)",
                doubtful,
                error,
            )
        else:
            _refuse_departing(layers, doubtful)


def _refuse_departing(layers: Sequence[LayerCheck], difference: str) -> None:
    """Raise ``VerificationError`` if a layer that quantizes at run time departs from its input."""
    wrong = next((layer for layer in layers if layer.beyond), None)
    if wrong is not None:
        raise VerificationError(f"{difference}; {wrong}")


def _check_each_tensor(
    graph: ConvertedGraph, example: tuple[Any, ...], outputs: list[Any], difference: str
) -> None:
    """Outputs may differ if the network magnifies last bits, which add up from layer to layer.

    The graph is lowered with all its quantized tensors as outputs. Each of them, and what the graph
    returns, has to follow from those before it. What the other program returns has to be that.

    Args:
        graph: of the program.
        example: its inputs.
        outputs: what the program returns.
        difference: what is wrong with these.

    Raises:
        VerificationError: names the first tensor that does not follow.
    """
    layers = run_time_layers(graph, example)
    _refuse_departing(layers, difference)
    if layers or any(node.target is CHOOSE_QPARAMS for node in graph.model.graph.nodes):
        # Each follows, and integers chosen at run time are no taps: there is nothing to name.
        raise VerificationError(f"{difference}; custom_quantizer.verify shows how far they are off")
    found = _followed(graph, example)
    if found.checks.first is not None:
        raise VerificationError(f"{difference}; {found.checks.first}")
    if not found.outputs_follow:
        raise VerificationError(f"{difference}; it does not follow from the tensors before it")
    for i, (mine, got) in enumerate(zip(outputs, found.results, strict=True)):
        if isinstance(got, Tensor) and relative_error(got, mine) > FLOAT_TOLERANCE:
            raise VerificationError(
                f"{difference}; each tensor follows from those before it, but output {i} is "
                "another in the program that returns them all"
            )


def each_tensor(graph: ConvertedGraph, example: tuple[Any, ...]) -> TensorChecks | None:
    """Compare each quantized tensor with what follows from those before it.

    Args:
        graph: a converted graph.
        example: inputs of it.

    Returns:
        ``None``: it has none, or integers that are chosen at run time.

    Raises:
        LoweringError: the graph cannot be lowered with all of them as outputs.
        ProgramError: the program does not run.
    """
    if any(node.target is CHOOSE_QPARAMS for node in graph.model.graph.nodes):
        return None
    found = _followed(graph, example).checks
    return found if found.tensors else None


def _followed(graph: ConvertedGraph, example: tuple[Any, ...]) -> Followed:
    lowered = partial(make_program, validate=False)
    return follow_program(graph, example, lowered, here(graph).backend)


def run_time_layers(graph: ConvertedGraph, example: tuple[Any, ...]) -> tuple[LayerCheck, ...]:
    """Compare each layer that quantizes at run time with what follows from its input.

    The graph is lowered once more, with inputs and results of these layers as outputs; the
    reference computes each from the input that the runtime shows. So last bits of float ops in
    between, which such a layer may turn into units, do not count.

    Args:
        graph: a converted graph.
        example: inputs of it.

    Raises:
        LoweringError: the graph cannot be lowered so.
        ProgramError: the program does not run.
    """
    run_time = graph.backend.run_time
    layers = [op.run_time for op in graph.floating if op.run_time is not None]
    if run_time is None or not layers:
        return ()
    shown = dict.fromkeys(node for layer in layers for node in (layer.source, layer.node))
    model = showing(graph.model, list(shown))
    flat = tuple(pytree.tree_leaves(example))
    program = make_program(read_converted(model, BACKEND), flat, validate=False)
    given = dict(zip(shown, pytree.tree_leaves(program.run(*flat)), strict=True))
    checks = []
    for layer in layers:
        x, got = given[layer.source], given[layer.node]
        want = run_time.compute(layer, x)
        exact = is_exact_here(layer)
        far = torch.zeros(()) if exact else run_time.error(layer, x)
        off = (got.to(torch.float64) - want.to(torch.float64)).abs()
        wrong = (got != want) & ~(off <= far)
        checks.append(
            LayerCheck(
                layer.node.name,
                module_path(layer.node),
                got.numel(),
                int((got != want).sum()),
                int(wrong.sum()),
                float(off.max()) if off.numel() else 0.0,
                exact,
            )
        )
    return tuple(checks)


def lower_again(
    program: LoweredProgram, converted: GraphModule, example: tuple[Any, ...]
) -> LoweredProgram:
    """Lower another graph as this program was lowered, without checks."""
    return make_program(read_converted(converted, BACKEND), example, validate=True)
