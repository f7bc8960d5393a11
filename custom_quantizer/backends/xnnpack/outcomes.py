"""What became of each op of a graph in the program that was written of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from executorch.exir import EdgeProgramManager, memory
from torch.fx import Graph, Node

from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.contents import MethodContents
from custom_quantizer.backends.xnnpack.passes import origin_of
from custom_quantizer.backends.xnnpack.program import (
    OpBackend,
    computes_in_integers,
    quantizes_at_run_time,
)
from custom_quantizer.core.graph import module_path
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.errors import LoweringError
from custom_quantizer.ops import QuantizedOp, match_of
from custom_quantizer.ops.backend import Backend, Kernel
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp

__all__ = ["called", "outcomes"]


def outcomes(
    graph: ConvertedGraph, edge: EdgeProgramManager, contents: MethodContents
) -> tuple[OpBackend, ...]:
    """One row for each op of the graph that a method was made from, in its order.

    Raises:
        LoweringError: a delegate has no ops.
    """
    traced, empty = _trace(edge, contents.name)
    if empty:
        raise LoweringError("the partitioner made a delegate without ops; the program is not safe")
    calls = _positions(traced, edge.exported_program(contents.name).graph, contents)
    return tuple(_row(op, graph.backend, traced, contents, calls) for op in graph)


def called(node: Node) -> str:
    """Name of the op a node calls, without its overload: ``aten::sort``."""
    return str(getattr(getattr(node.target, "_schema", None), "name", node.target))


@dataclass
class _Traced:
    """Edge nodes that stand for one converted op."""

    delegated: list[Node]
    outside: list[Node]


def _positions(
    traced: Mapping[str, _Traced], graph: Graph, contents: MethodContents
) -> dict[Node, int]:
    """Where the program calls the nodes outside delegates: in their order, kernel by kernel.

    A kernel that the program does not call as often as the graph has it is left out: writing may
    add calls, and drop those that do nothing.
    """
    outside = {node for found in traced.values() for node in found.outside}
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if _is_kernel(node):
            nodes.setdefault(called(node), []).append(node)
    positions: dict[str, list[int]] = {}
    for position, kernel in enumerate(contents.kernels):
        positions.setdefault(kernel.partition(".")[0], []).append(position)
    return {
        node: position
        for kernel, found in nodes.items()
        if len(found) == len(positions.get(kernel, ()))
        for node, position in zip(found, positions[kernel], strict=True)
        if node in outside
    }


_NAMELESS = ""
"""What export writes out of a graph that an op runs (``torch.autocast``) has the name of none."""


def _trace(edge: EdgeProgramManager, method: str) -> tuple[dict[str, _Traced], bool]:
    traced: dict[str, _Traced] = {}
    empty = False
    module = edge.exported_program(method).graph_module

    def entries(node: Node) -> list[_Traced]:
        names = origin_of(node) or _NAMELESS
        return [traced.setdefault(name, _Traced([], [])) for name in names.split(",")]

    for node in module.graph.nodes:
        lowered = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        inner = getattr(lowered, "original_module", None)
        if inner is not None:
            calls = [n for n in inner.graph.nodes if n.op == "call_function"]
            empty = empty or not calls
            for call in calls:
                for found in entries(call):
                    found.delegated.append(call)
        elif _is_kernel(node):
            for found in entries(node):
                found.outside.append(node)
    return traced, empty


def _is_kernel(node: Node) -> bool:
    """Whether a node calls a kernel outside the delegates; memory is planned, not allocated."""
    if node.op != "call_function" or node.target is memory.alloc:
        return False
    return not _reads_delegate(node)


def _reads_delegate(node: Node) -> bool:
    """Whether a node only calls a delegate or takes one of its results."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and "executorch_call_delegate" in str(source.target)


def _delegated_backend(
    op: QuantizedOp | FloatOp, handles: set[int], contents: MethodContents
) -> Kernel:
    """How the delegate runs the nodes with these handles, as the program's tensors say."""
    # Boundaries between float and int8 carry the handle of the op next to them.
    nodes = [found for found in contents.nodes_of(handles) if found[1].kind != "convert"]
    if not nodes:
        return kernels.FOLDED  # an activation fused into the op before it
    weighted = [(delegate, node) for delegate, node in nodes if node.weight is not None]
    for delegate, node in weighted:
        if quantizes_at_run_time(delegate, node):
            packed = delegate.tensors[cast(int, node.weight)].dtype == "int4"
            return kernels.PACKED_INT4 if packed else kernels.DYNAMIC_INT8
    # One step in float makes the op float, whatever clamps its result in int8 afterwards.
    if not all(computes_in_integers(delegate, node) for delegate, node in nodes):
        return kernels.FLOAT
    if isinstance(op, QuantizedOp) and op.weight is not None and weighted:
        delegate, node = weighted[-1]  # what comes before it only takes pixels
        if delegate.tensors[cast(int, node.weight)].dtype == "int4":
            return kernels.PACKED_INT4
        return kernels.INT8 if op.formats.weight_bits == 8 else kernels.INT8_CONTAINER
    return kernels.INT8


def _row(
    op: QuantizedOp | FloatOp,
    planned: Backend,
    traced: dict[str, _Traced],
    contents: MethodContents,
    calls: Mapping[Node, int],
) -> OpBackend:
    names = [op.node.name]
    if isinstance(op, QuantizedOp) and op.output_node is not op.node:
        names.append(op.output_node.name)
    found = [traced[name] for name in names if name in traced]
    if not found and isinstance(op.node.target, torch._ops.HigherOrderOperator):
        found = [_Traced([], traced[_NAMELESS].outside)] if _NAMELESS in traced else []
    delegated = [node for trace in found for node in trace.delegated]
    outside = [node for trace in found for node in trace.outside]
    handles = {cast(int, node.meta.get("debug_handle", -1)) for node in delegated}
    reason = op.reason if isinstance(op, FloatOp) else ""
    if outside:
        backend = kernels.PORTABLE
        if isinstance(op, QuantizedOp):
            predicted = planned.predict(op.match, op.formats)
            reason = predicted.reason if predicted.kernel is backend else reason
        reason = reason or "XNNPACK has no kernel for it as it stands here"
    elif not delegated:
        backend, reason = kernels.FOLDED, reason or "nothing is left of it after lowering"
    elif isinstance(op, QuantizedOp) and op.is_wide:
        backend = kernels.EMULATED
    else:
        backend = _delegated_backend(op, handles, contents)
        if isinstance(op, FloatOp) and backend is kernels.FOLDED:
            reason = "fused into the op before it"
        elif isinstance(op, FloatOp) and backend is kernels.INT8:
            reason += "; the backend quantizes what is float here when it writes the program"
    if isinstance(op, QuantizedOp):
        predicted = planned.predict(op.match, op.formats)
        reason = reason or predicted.reason
        if (backend, predicted.kernel) == (kernels.FLOAT, kernels.TABLE):
            backend = kernels.TABLE  # its three steps become one when the program is loaded
        if backend is kernels.FLOAT and not reason:
            reason = "XNNPACK runs it in float between quantize steps"
    return OpBackend(
        node=op.node.name,
        path=module_path(op.node),
        family=op.match.rule.family if isinstance(op, QuantizedOp) else str(op.node.target),
        backend=backend,
        placement=backend.placement,
        kernel=backend.label,
        reason=reason,
        written=original_name(op.node),
        handles=tuple(sorted(handle for handle in handles if handle >= 0)),
        outside=tuple(dict.fromkeys(map(called, outside))),
        calls=tuple(calls[node] for node in outside if node in calls),
        has_bias=_has_bias(op),
    )


def _has_bias(op: QuantizedOp | FloatOp) -> bool:
    """Whether a layer adds a bias, integer or not."""
    if isinstance(op, QuantizedOp):
        return op.bias is not None
    match = match_of(op.node)
    return match is not None and match.weight is not None and match.bias is not None
