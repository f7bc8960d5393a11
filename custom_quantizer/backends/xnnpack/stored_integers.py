"""Does a program hold the integers of its graph?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK
from custom_quantizer.backends.xnnpack.columns import columns_of
from custom_quantizer.backends.xnnpack.contents import (
    DelegateContents,
    DelegateNode,
    DelegateOp,
    ProgramContents,
)
from custom_quantizer.backends.xnnpack.grouped_convs import joined
from custom_quantizer.backends.xnnpack.program import (
    INTEGER_BACKENDS,
    LoweredProgram,
    OpBackend,
    find_weighted,
    quantizes_at_run_time,
)
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.graph import describe
from custom_quantizer.errors import VerificationError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops._rule import as_limits
from custom_quantizer.ops.gemm import CONV, expand_channels
from custom_quantizer.ops.run_time import RunTimeOp
from custom_quantizer.reference.converted import ConvertedGraph
from custom_quantizer.reference.verifying import Difference

__all__ = ["differences"]


def differences(program: LoweredProgram, graph: ConvertedGraph) -> Iterator[Difference]:
    """Compare every integer op with what stands for it in the file, in graph order.

    Compared are the integers of weight and bias, scales and zero points of weight, inputs and
    output, and the smallest and largest integer that clamps leave.

    Raises:
        VerificationError: the program was not made from this graph.
    """
    rows = {row.node: row for row in program.report.ops}
    for op in graph.integer:
        row = rows.get(op.node.name)
        if row is None:
            raise VerificationError(
                f"the program knows no op {describe(op.node)}: it was lowered from another graph, "
                "or from this one after it was exported again under other names; verify with the "
                "graph that was lowered"
            )
        if row.backend not in INTEGER_BACKENDS:
            continue
        if op.weight is not None:
            yield from _weight_and_bias(program.contents, op, row)
        yield from _parameters(program.contents, op, row)
    for layer in (op.run_time for op in graph.floating if op.run_time is not None):
        yield from _run_time_constants(program.contents, layer, rows[layer.node.name])


def _run_time_constants(
    contents: ProgramContents, op: RunTimeOp, row: OpBackend
) -> Iterator[Difference]:
    """Integers and scales of the weight, and the float bias."""
    found = find_weighted(contents, row)
    if found is None or not quantizes_at_run_time(*found):
        yield _difference(op, "missing", "no node of the program quantizes its input at run time")
        return
    delegate, node = found
    stored = delegate.weight(node)
    weight = op.weight.reshape(stored.shape) if stored.size == op.weight.numel() else op.weight
    yield from _arrays(op, "weight", weight.numpy(), stored)
    scale = np.asarray(delegate.tensors[cast(int, node.weight)].scale, np.float32)
    yield from _arrays(op, "weight scale", op.weight_scale.numpy(), scale)
    bias = np.zeros(len(op.weight), np.float32) if op.bias is None else op.bias.numpy()
    if node.bias is not None:
        yield from _arrays(op, "bias", bias, delegate.tensors[node.bias].array())
    elif bias.any():
        yield _difference(op, "bias", "the program dropped it")


def _difference(op: QuantizedOp | RunTimeOp, what: str, detail: str) -> Difference:
    return Difference(op.node.name, describe(op.node), what, detail)


def _weight_and_bias(
    contents: ProgramContents, op: QuantizedOp, row: OpBackend
) -> Iterator[Difference]:
    found = find_weighted(contents, row)
    if found is None:
        yield _difference(op, "missing", "no node of the program stands for it")
        return
    delegate, node = found
    stored = delegate.weight(node)
    weight = cast(Tensor, op.weight)
    factor = stored.shape[1] // weight.shape[1] if op.match.rule is CONV else 1
    groups = op.match.groups
    if factor > 1 and groups % factor == 0:
        weight = joined(weight, groups, factor)
        groups //= factor
    columns = columns_of(op.match, groups)
    if columns is not None and columns.kernel(weight).numel() == stored.size:
        weight = columns.kernel(weight)
    if stored.size == weight.numel():
        weight = weight.reshape(stored.shape)
    yield from _arrays(op, "weight", weight.numpy(), stored)
    yield from _weight_scale(op, delegate, node)
    bias = delegate.bias(node)
    if op.bias is None:
        if bias is not None and bool(np.any(bias)):
            yield _difference(op, "bias", "the program has one, the graph has none")
    elif bias is None:
        yield _difference(op, "bias", "the program dropped it")
    else:
        yield from _arrays(op, "bias", op.bias.numpy(), bias)


def _weight_scale(
    op: QuantizedOp, delegate: DelegateContents, node: DelegateOp
) -> Iterator[Difference]:
    graph = torch.as_tensor(cast(QParams, op.weight_qparams).scale)
    if graph.dim():
        graph = expand_channels(graph, op.match)
    stored = np.asarray(delegate.tensors[cast(int, node.weight)].scale, np.float32)
    # One scale for all channels may be stored once a channel.
    wide = np.broadcast_to(graph.numpy(), stored.shape) if graph.numel() == 1 else graph.numpy()
    yield from _arrays(op, "weight scale", wide, stored)


def _arrays(
    op: QuantizedOp | RunTimeOp,
    what: str,
    graph: np.ndarray[Any, Any],
    program: np.ndarray[Any, Any],
) -> Iterator[Difference]:
    if graph.shape != program.shape:
        yield _difference(
            op, what, f"shape {graph.shape} in the graph, {program.shape} in the file"
        )
        return
    if not np.array_equal(graph, program):
        wrong = np.argwhere(graph != program)
        at = tuple(int(i) for i in wrong[0])
        noun = "integers" if graph.dtype.kind == "i" else "scales"
        yield _difference(
            op,
            what,
            f"{len(wrong)} of {graph.size} {noun} differ; at {at} the graph has {graph[at]}, the "
            f"program {program[at]}",
        )


def _parameters(contents: ProgramContents, op: QuantizedOp, row: OpBackend) -> Iterator[Difference]:
    nodes = contents.nodes_of(row.handles)
    if not nodes:
        yield _difference(op, "missing", "no node of the program stands for it")
        return
    yield from _grids(op, nodes)
    yield from _clamps(op, nodes)
    yield from _second_factors(op, nodes)


_Grid = tuple[float | None, int | None]


def _grids(op: QuantizedOp, nodes: list[DelegateNode]) -> Iterator[Difference]:
    """Scale and zero point of inputs and output.

    One node has those of the op, in order. Several also have some of their own between them.
    """
    steps = [(delegate, node) for delegate, node in nodes if node.kind != "convert"] or nodes
    inputs = [_key(qparams) for qparams in op.inputs]
    read = [_grid(delegate, i) for delegate, node in steps for i in node.inputs]
    if len(steps) == 1 and len(read) == len(inputs):
        for i, (wanted, found) in enumerate(zip(inputs, read, strict=True)):
            if wanted != found:
                yield _difference(
                    op, "input scale", f"input {i}: the graph has {wanted}, the program {found}"
                )
    else:
        known = {_grid(delegate, i) for delegate, node in nodes for i in node.inputs}
        yield from _missing(op, "input scale", inputs, known)
    known = {_grid(delegate, i) for delegate, node in nodes for i in node.outputs}
    yield from _missing(op, "output scale", [_key(op.output)], known)


def _missing(
    op: QuantizedOp, what: str, wanted: list[_Grid], known: set[_Grid]
) -> Iterator[Difference]:
    for grid in wanted:
        if grid not in known:
            yield _difference(op, what, f"the graph has {grid}, the program {_listed(known)}")


def _listed(grids: set[_Grid]) -> list[_Grid]:
    return sorted(grids, key=str)


def _grid(delegate: DelegateContents, tensor: int) -> _Grid:
    found = delegate.tensors[tensor]
    scale = found.scale if isinstance(found.scale, float) else None
    return scale, found.zero_point


def _key(qparams: QParams) -> _Grid:
    return cast(float, qparams.scale), qparams.zero_point


def _clamps(op: QuantizedOp, nodes: list[DelegateNode]) -> Iterator[Difference]:
    """All clamps of an op together leave the integers that the graph says, no more and no less.

    An activation must be there even where the range of the integers makes it needless. Integers
    that are moved, and not changed, need no clamp: they were in the range before.
    """
    real = _real_bounds(op)
    if real is not None and not any(_holds(node, *real) for _, node in nodes):
        yield _difference(op, "clamp", f"no node of the program clamps to {real}")
        return
    wanted = (op.output.quant_min, op.output.quant_max)
    if real is not None:
        wanted = XNNPACK.clamp_bounds(*real, op.output)
    low, high = _INT8
    for delegate, node in nodes:
        for output in node.outputs:
            if _grid(delegate, output) == _key(op.output):
                least, most = _stored_bounds(node, op.output)
                low, high = max(low, least), min(high, most)
    moved = op.match.rule.moves_values and real is None
    if (low, high) != wanted and not (moved and (low, high) == _INT8):
        yield _difference(
            op, "clamp", f"the graph clamps to the integers {wanted}, the program to {low, high}"
        )


def _second_factors(op: QuantizedOp, nodes: list[DelegateNode]) -> Iterator[Difference]:
    """Products that this machine may compute rightly, and many ARM CPUs do not."""
    for delegate, node in nodes:
        if node.kind != "batch_matrix_multiply" or _stays_transposed(delegate, node):
            continue
        columns = delegate.tensors[node.outputs[0]].shape[-1]
        if columns > kernels.WIDEST_PRODUCT:
            yield _difference(
                op,
                "second factor",
                f"its {columns} columns are not stored transposed, so that XNNPACK multiplies them "
                "wrongly on many ARM CPUs; the program was written without the visitors of "
                "custom_quantizer.backends.xnnpack.visitors",
            )


def _stays_transposed(delegate: DelegateContents, product: DelegateOp) -> bool:
    """Whether the second factor lies transposed, and XNNPACK does not undo that.

    It does (92a7ad50, ``optimize_common_subgraphs_gemm_rhs_transpose``) where a transpose of the
    last two dims alone computes the factor.
    """
    maker = delegate.makers.get(product.inputs[1])
    perm = maker.params.get("perm") if maker is not None else None
    same = tuple(range(len(perm))) if isinstance(perm, tuple) else ()
    undone = bool(same) and perm == (*same[:-2], same[-1], same[-2])
    return product.is_transposed and not undone


_INT8 = (-128, 127)


def _real_bounds(op: QuantizedOp) -> tuple[float, float] | None:
    """Bounds of the op's activation, or of the op if it is one, in units of the float output."""
    return op.match.bounds if op.bounds is None else as_limits(*op.bounds)


def _holds(node: DelegateOp, low: float, high: float) -> bool:
    """Whether a node clamps at least as tightly; bounds beyond float32 are none."""
    least, most = node.params.get("output_min"), node.params.get("output_max")
    if not isinstance(least, float) or not isinstance(most, float):
        return False
    return least >= float(np.float32(low)) and most <= float(np.float32(high))


def _stored_bounds(node: DelegateOp, output: QParams) -> tuple[int, int]:
    """The integers that a node clamps to: what XNNPACK computes when it loads the program."""
    least, most = node.params.get("output_min"), node.params.get("output_max")
    if not isinstance(least, float) or not isinstance(most, float):
        return _INT8
    if not least <= most:  # not a number, or empty: nothing that a graph says
        return _INT8[1], _INT8[0]
    int8 = replace(output, quant_min=_INT8[0], quant_max=_INT8[1])
    return XNNPACK.clamp_bounds(least, most, int8)
