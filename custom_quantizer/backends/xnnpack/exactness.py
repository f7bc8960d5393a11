"""Which outputs of a program are those of the reference bit for bit, and how far others may be."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Set
from dataclasses import replace
from typing import cast

import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.arithmetic import (
    XNNPACK_NEON,
    float_resize_error,
    float_sum_error,
)
from custom_quantizer.backends.xnnpack.program import INTEGER_BACKENDS, LoweredProgram
from custom_quantizer.backends.xnnpack.run_time import is_exact_here
from custom_quantizer.core.graph import (
    constant_of,
    effective_users,
    is_constant,
    is_dequantize,
    qparams_of,
)
from custom_quantizer.ops import PatternMatch, match_of
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
from custom_quantizer.ops.gemm import LINEAR
from custom_quantizer.ops.resize import LAYERED, UPSAMPLE_BILINEAR, resizings_of
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp

__all__ = ["here", "inexact_ops", "is_exact", "output_bounds"]

_EXACT = INTEGER_BACKENDS | {
    kernels.FOLDED,
    kernels.TABLE,
    kernels.FLOAT,
    kernels.DYNAMIC_INT8,
}
"""Of integer ops: average pooling and padding run in float as the reference knows exactly."""

_ONE_ROUNDING = (RELU, CLAMP, ADD, SUB, MUL)
"""Computed in float, each result is rounded once at most: by any kernel to the same bits."""


def is_exact(program: LoweredProgram, graph: ConvertedGraph, *, everywhere: bool = False) -> bool:
    """Whether the reference gives every output bit for bit.

    It does so for integer ops that are not emulated, for layers quantized at run time where all
    kernels agree, and for float ops that round at most once.

    Args:
        program: of the graph.
        graph: what it was made from.
        everywhere: on all machines, and not on this one alone.
    """
    exact = all(op.backend in _EXACT for op in program.report.ops)
    return exact and all(_has_one_result(op, everywhere) for op in graph.floating)


def _has_one_result(op: FloatOp, everywhere: bool) -> bool:
    """Whether every kernel gives the same bits for an op that is float in the graph."""
    if op.run_time is not None:
        return not everywhere and is_exact_here(op.run_time)
    match = match_of(op.node)
    if match is None or op.float_fallback:
        return False
    rule = match.rule
    moves = rule.moves_values and rule is not UPSAMPLE_BILINEAR
    return moves or rule in _ONE_ROUNDING


def output_bounds(program: LoweredProgram, graph: ConvertedGraph) -> tuple[float | None, ...]:
    """How far each output may be from that of the reference, in absolute value.

    That is 0 where integers come out. Where the only float ops of a graph are resizes, moves and
    joins behind its last integers, these integers are exact, and the bound is that of
    :func:`~custom_quantizer.backends.xnnpack.arithmetic.float_resize_error`, or of
    :func:`~custom_quantizer.backends.xnnpack.arithmetic.float_sum_error` for resizes that became
    layers. ``None``: other float ops take part, whose last bits may become units of integers.
    """
    (output,) = (node for node in graph.model.graph.nodes if node.op == "output")
    if is_exact(program, graph):
        return (0.0,) * len(pytree.tree_leaves(output.args[0]))
    floating = {op.node for op in graph.floating}
    ends = [_float_end(graph.model, x, floating) for x in pytree.tree_leaves(output.args[0])]
    nodes = frozenset[Node]().union(*(found for found, _ in ends))
    readers = {user for node in nodes for user in effective_users(node)}
    exact = floating <= nodes and readers <= nodes | {output}
    if not exact or any(op.backend not in _EXACT for op in program.report.ops):
        return (None,) * len(ends)
    return tuple(bound for _, bound in ends)


def _float_end(
    model: GraphModule, value: object, floating: Set[Node]
) -> tuple[frozenset[Node], float | None]:
    """The float ops between the last integers and an output, and how far off they may be."""
    nodes: set[Node] = set()
    error = 0.0
    waiting: list[tuple[object, tuple[Node, ...]]] = [(value, ())]  # and the resizes behind it
    seen: set[tuple[object, tuple[Node, ...]]] = set()
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        value, resizes = found
        if value in floating:
            node = cast(Node, value)
            match = match_of(node)
            interpolates = match is not None and _layer_of_resize(model, match) is not None
            if match is None or not (interpolates or match.rule.moves_values):
                return frozenset(), None
            nodes.add(node)
            if interpolates or match.rule is UPSAMPLE_BILINEAR:
                resizes = (*resizes, node)
            waiting.extend((source, resizes) for source in match.inputs)
        elif resizes:
            source = cast(Node, value)
            if not is_dequantize(source):
                return frozenset(), None
            qparams = qparams_of(model, source)
            most = max(
                qparams.quant_max - qparams.zero_point, qparams.zero_point - qparams.quant_min
            )
            largest = most * cast(float, qparams.scale)
            error = max(error, _resizes_error(model, reversed(resizes), largest))
    return frozenset(nodes), error


def _resizes_error(model: GraphModule, resizes: Iterable[Node], largest: float) -> float:
    """How far off resizes one after another may be, of values up to ``largest``."""
    error = 0.0
    for node in resizes:
        weight = _layer_of_resize(model, cast(PatternMatch, match_of(node)))
        if weight is None:
            error += float_resize_error(*resizings_of(node), largest)
            continue
        gain = float(weight.double().abs().sum(1).max())
        error = gain * error + float_sum_error(weight.shape[1], gain * largest)
        largest *= gain
    return error


def _layer_of_resize(model: GraphModule, match: PatternMatch) -> Tensor | None:
    """Weight of a layer that interpolates along one dim; ``None``: it is something else."""
    if match.rule is not LINEAR or match.node.meta.get("original_target") not in LAYERED:
        return None
    weight = match.weight
    return constant_of(model, weight) if weight is not None and is_constant(weight) else None


def here(graph: ConvertedGraph) -> ConvertedGraph:
    """The graph, computed as XNNPACK rounds on this machine."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return graph
    return replace(graph, backend=replace(graph.backend, arithmetic=XNNPACK_NEON))


def inexact_ops(
    program: LoweredProgram, graph: ConvertedGraph, *, everywhere: bool = False
) -> tuple[str, ...]:
    """Ops that are float or emulated, so that equality is not expected, and why.

    Args:
        program: of the graph.
        graph: what it was made from.
        everywhere: on all machines, and not on this one alone.
    """
    if is_exact(program, graph, everywhere=everywhere):
        return ()
    reasons = {op.node.name: _why_inexact(op) for op in graph.floating}
    reasons.update({row.node: row.reason for row in program.report.not_integer()})
    for op in graph.floating:
        if _has_one_result(op, everywhere):
            del reasons[op.node.name]
    return tuple(f"{node}: {reason}" for node, reason in reasons.items())


def _why_inexact(op: FloatOp) -> str:
    if op.run_time is None:
        return op.reason
    if op.run_time.is_grouped:
        return "its groups of weights are summed in float, in an order that depends on the kernel"
    return "its scales are multiplied and its bias is added in float, in a way of each kernel"
