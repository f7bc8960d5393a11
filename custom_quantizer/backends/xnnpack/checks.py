"""Does a program hold the graph's integers, and does it compute what they say?"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.backends.xnnpack.arithmetic import (
    XNNPACK,
    XNNPACK_NEON,
    float_resize_error,
    float_sum_error,
)
from custom_quantizer.backends.xnnpack.border_constants import borders_in
from custom_quantizer.backends.xnnpack.columns import columns_of
from custom_quantizer.backends.xnnpack.grouped_convs import joined
from custom_quantizer.backends.xnnpack.lowering import make_program
from custom_quantizer.backends.xnnpack.program import (
    INTEGER_BACKENDS,
    WAYS,
    LoweredProgram,
    OpBackend,
    find_weighted,
    missing_kernels,
    no_kernel,
    quantizes_at_run_time,
)
from custom_quantizer.backends.xnnpack.readback import DelegateContents, DelegateOp, ProgramContents
from custom_quantizer.backends.xnnpack.refused import first_refused
from custom_quantizer.backends.xnnpack.run_time import is_exact_here
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.graph import (
    CHOOSE_QPARAMS,
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_dequantize,
    module_path,
    qparams_of,
    tensor_meta,
)
from custom_quantizer.errors import LoweringError, ProgramError, VerificationError
from custom_quantizer.ops import PatternMatch, QParamSharing, QuantizedOp, match_of
from custom_quantizer.ops._rule import as_limits
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
from custom_quantizer.ops.gemm import CONV, LINEAR, expand_channels
from custom_quantizer.ops.movement import PERMUTE, RESHAPE
from custom_quantizer.ops.resize import LAYERED, UPSAMPLE_BILINEAR, resizings_of
from custom_quantizer.ops.run_time import RunTimeOp
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted
from custom_quantizer.reference.following import TensorChecks, follow
from custom_quantizer.reference.verifying import (
    Difference,
    LayerCheck,
    apart,
    beyond,
    instrumented,
    showing,
    tapped_integers,
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

_MADE_SMALLER = RESHAPE.targets | PERMUTE.targets

FLOAT_TOLERANCE = 0.1
"""Largest relative error of outputs when float ops take part; a broken program is near 1."""

RUN_TIME_TOLERANCE = 1e-4
"""Relative error of outputs from which on layers that quantize at run time are checked one by one.

Last bits of float ops in between leave outputs near 1e-7, unless they turn one of a layer's
integers into its neighbour.
"""

LAST_BITS = 1e-3
"""Largest relative error of an output behind one group of float ops, given the tensors before."""


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
        # Views and permutes of many dims may have become some of fewer.
        if wide:
            node, dims = min(wide, key=lambda op: op[0].target in _MADE_SMALLER)
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
    nodes = [
        (delegate, node)
        for delegate in contents.delegates
        for node in delegate.ops
        if node.debug_handle in row.handles
    ]
    if not nodes:
        yield _difference(op, "missing", "no node of the program stands for it")
        return
    yield from _grids(op, nodes)
    yield from _clamps(op, nodes)
    yield from _second_factors(op, nodes)


_Nodes = list[tuple[DelegateContents, DelegateOp]]
_Grid = tuple[float | None, int | None]


def _grids(op: QuantizedOp, nodes: _Nodes) -> Iterator[Difference]:
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


def _clamps(op: QuantizedOp, nodes: _Nodes) -> Iterator[Difference]:
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
    moved = op.match.rule.sharing is QParamSharing.SAME and real is None
    if (low, high) != wanted and not (moved and (low, high) == _INT8):
        yield _difference(
            op, "clamp", f"the graph clamps to the integers {wanted}, the program to {low, high}"
        )


def _second_factors(op: QuantizedOp, nodes: _Nodes) -> Iterator[Difference]:
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
    factor = product.inputs[1]
    maker = next((op for op in delegate.ops if factor in op.outputs), None)
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
    found, following, results = _followed(graph, example)
    if found.first is not None:
        raise VerificationError(f"{difference}; {found.first}")
    rows = zip(outputs, following, results, strict=True)
    for i, (mine, want, got) in enumerate(rows):
        if not isinstance(want, Tensor):
            continue
        if relative_error(want, got) > LAST_BITS:
            raise VerificationError(f"{difference}; it does not follow from the tensors before it")
        if relative_error(got, mine) > FLOAT_TOLERANCE:
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
    found, _, _ = _followed(graph, example)
    return found if found.tensors else None


def _followed(
    graph: ConvertedGraph, example: tuple[Any, ...]
) -> tuple[TensorChecks, list[Any], list[Any]]:
    """Lower the graph with all quantized tensors as outputs, and follow these.

    Returns:
        What was found, the outputs of the graph that follow from the tensors, and those of the
        program.
    """
    tapped, taps = instrumented(graph.model, outputs=True)
    other = read_converted(tapped, here(graph).backend)
    asked = read_converted(tapped, graph.backend)
    flat = tuple(pytree.tree_leaves(example))
    program = make_program(asked, flat, validate=False)
    results = pytree.tree_leaves(program.run(*flat))
    found, following = follow(other, tapped_integers(tapped, results), flat)
    return found, following[len(taps) :], results[len(taps) :]


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
    moves = rule.sharing is QParamSharing.SAME and rule is not UPSAMPLE_BILINEAR
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
            if match is None or not (interpolates or match.rule.sharing is QParamSharing.SAME):
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


def lower_again(
    program: LoweredProgram, converted: GraphModule, example: tuple[Any, ...]
) -> LoweredProgram:
    """Lower another graph as this program was lowered, without checks."""
    return make_program(read_converted(converted, BACKEND), example, validate=True)


def relative_error(want: Tensor, got: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square of ``want``, of what is finite.

    Infinite where one of the two is not, and the other is another value.
    """
    reference, value = want.to(torch.float64), got.to(torch.float64)
    finite = torch.isfinite(reference) & torch.isfinite(value)
    same = (reference == value) | (torch.isnan(reference) & torch.isnan(value))
    if not bool((finite | same).all()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    noise = (value - reference)[finite].square().mean().sqrt()
    signal = reference[finite].square().mean().sqrt()
    return float(noise / signal) if signal > 0 else float(noise)
