"""From a converted graph to a TOSA program: rewritten, exported, partitioned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.lowered_backend_module import executorch_call_delegate
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.tosa import kernels
from custom_quantizer.backends.tosa.passes import ORIGIN, PASSES, Work, run_passes
from custom_quantizer.backends.tosa.program import (
    TosaOp,
    TosaProgram,
    TosaReport,
    delegates_of,
)
from custom_quantizer.core.graph import (
    describe,
    detached_copy,
    module_path,
    state_of,
)
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.core.threads import begin, tools
from custom_quantizer.errors import (
    CustomQuantizerError,
    LoweringError,
    first_line,
)
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp
from custom_quantizer.reference.inputs import check_example, placeholder_metas, specs_of

__all__ = ["SPECIFICATION", "make_program"]

SPECIFICATION = "TOSA-1.0+INT+int16+int4"
"""The integer profile with 16-bit activations and 4-bit weights, as ExecuTorch names it."""


@tools()
def make_program(
    graph: ConvertedGraph,
    example_inputs: tuple[Any, ...],
    *,
    progress: Callable[[str], None] | None = None,
    passes: Sequence[Callable[[Work], int]] = PASSES,
) -> TosaProgram:
    """Lower a graph to a program that nobody has compared with it yet.

    Args:
        graph: the converted graph.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        progress: called with the name of each stage.
        passes: of :data:`~custom_quantizer.backends.tosa.passes.PASSES`, those to run.

    Raises:
        InputError: the example does not fit the graph.
        LoweringError: ExecuTorch refused the graph, or nothing of it is integer.
    """
    say = partial(begin, progress)
    example = check_example(graph, example_inputs)
    _check_writable(graph)
    say("rewriting the graph")
    model = detached_copy(graph.model)
    applied = run_passes(model, graph, passes)
    say("partitioning for TOSA")
    edge = _to_edge(_export(model, example))
    module = edge.exported_program().module()
    report = _report(graph, edge, module, applied)
    return TosaProgram(
        module, report, graph, specs_of(graph.model)[1], tuple(_sizes(graph.model, example)), passes
    )


def _sizes(model: GraphModule, example: tuple[Any, ...]) -> list[Tensor | None]:
    """Inputs that the program takes: those of the example."""
    metas = placeholder_metas(model)
    values = pytree.tree_leaves(example)
    return [
        value.to("meta") if meta is not None and isinstance(value, Tensor) else None
        for meta, value in zip(metas, values, strict=True)
    ]


def _check_writable(graph: ConvertedGraph) -> None:
    if not graph.integer:
        reasons = "; ".join(f"{describe(op.node)}: {op.reason}" for op in graph.floating[:5])
        raise LoweringError(
            f"no op of the graph is integer for TOSA, so there is no program ({reasons}); plan "
            "with IntegerQuantizer(backend='tosa')"
        )
    written = [describe(node) for node in state_of(graph.model.graph)]
    if written:
        raise LoweringError(
            f"the graph writes into {', '.join(written)}, and a TOSA program has no memory of its "
            "own; make them inputs and outputs"
        )


def _export(model: GraphModule, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    in_spec, _ = specs_of(model)
    structure = pytree.tree_structure((example, {})) if in_spec is None else in_spec
    args, kwargs = pytree.tree_unflatten(pytree.tree_leaves(example), structure)
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs)
    except CustomQuantizerError:
        raise
    except Exception as error:
        raise LoweringError(
            f"torch.export refused the rewritten graph: {first_line(error)}"
        ) from error


def _to_edge(exported: torch.export.ExportedProgram) -> EdgeProgramManager:
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    try:
        return to_edge_transform_and_lower(
            exported,
            partitioner=[TOSAPartitioner(TosaCompileSpec(SPECIFICATION))],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
    except Exception as error:
        raise LoweringError(
            f"ExecuTorch could not lower the graph to TOSA: {first_line(_origin(error))}"
        ) from error


def _origin(error: BaseException) -> BaseException:
    """What went wrong first: ExecuTorch's own message is a list of 120 passes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# ---------------------------------------------------------------------------------------------
# What became of each op
# ---------------------------------------------------------------------------------------------


def _report(
    graph: ConvertedGraph, edge: EdgeProgramManager, module: GraphModule, applied: dict[str, int]
) -> TosaReport:
    outside = [node for node in module.graph.nodes if _computes(node)]
    beside = {node.meta.get("custom", {}).get(ORIGIN) for node in outside}
    delegates = delegates_of(module)
    rows = tuple(_row(graph, op, beside) for op in graph)
    return TosaReport(
        rows,
        len(delegates),
        tuple(map(_called, outside)),
        sum(len(delegate.processed_bytes) for delegate in delegates),
        applied,
    )


def _called(node: Node) -> str:
    """Name of the op that a node calls, such as ``aten::softmax.int``."""
    return str(getattr(node.target, "_schema", node.target)).partition("(")[0]


def _computes(node: Node) -> bool:
    if node.op != "call_function" or node.target is executorch_call_delegate:
        return False
    return getattr(node.target, "__name__", "") != "getitem"


def _row(graph: ConvertedGraph, op: QuantizedOp | FloatOp, beside: set[str | None]) -> TosaOp:
    kernel, reason = kernels.OUTSIDE, op.reason if isinstance(op, FloatOp) else ""
    family = str(op.node.target)
    if isinstance(op, QuantizedOp):
        predicted = graph.backend.predict(op.match, op.formats)
        kernel, reason, family = predicted.kernel, predicted.reason, op.match.rule.family
        if op.node.name in beside:
            kernel, reason = kernels.OUTSIDE, "ExecuTorch's partitioner left it out"
    return TosaOp(
        node=op.node.name,
        path=module_path(op.node),
        family=family,
        written=original_name(op.node),
        placement=kernel.placement,
        kernel=kernel.label,
        reason=reason,
        backend=kernel,
    )
