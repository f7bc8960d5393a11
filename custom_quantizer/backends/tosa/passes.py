"""What is done to a copy of a converted graph, so that ExecuTorch's arm backend keeps its integers.

Each pass cures one place where that backend (1.5.1) computes other integers than the graph says, or
refuses. They use nothing but quantize, dequantize and clamp nodes.

- **Activations.** ``FuseQuantizedActivationPass`` drops a relu behind a layer and leaves it to
  saturation, which is right only where 0 is the smallest stored integer (never for 16 bits); a sum
  with an activation is refused. So an activation stands alone between roundings to the same scale,
  unless all stored integers are within its limits: then nothing is left of it.
- **Scales of activations.** A clamp takes over the integers of its input as they are. Between two
  scales a rounding is put before it.
- **Wide sums.** ``FuseConsecutiveRescalesPass`` drops the rounding between two sums whose scales
  cancel, and ``RewriteConvPass`` hands the 48-bit accumulator of a layer to a sum. Either way what
  was to saturate does not. A clamp to the whole range, which changes nothing, keeps them apart.
- **Weights.** ``FoldAndAnnotateQParamsPass`` takes every weight in [-7, 7] for ``INT4``, for which
  there is no operator with 16-bit activations.
- **Biases.** Their integers are taken as they are, whatever their scale; a bias of few bits, which
  hardware shifts left first, is written with the shift done.
- **Products of matrices** have one batch dimension.
- **Parts of a split tensor** are cut out one by one.
- **Marks.** Only calls that are marked as quantized are folded: all integer ops, and no others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.tosa.kernels import packs_weights, rescales_around
from custom_quantizer.core.arithmetic import QParams, scale_of
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    are_static,
    argument,
    constant_of,
    effective_users,
    is_dequantize,
    is_quantize,
    recorded_value,
    shape_of,
)
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops._rule import as_limits
from custom_quantizer.reference.converted import ConvertedGraph

__all__ = ["ORIGIN", "PASSES", "Work", "run_passes"]

aten = torch.ops.aten

_MARK = "_arm_annotation_info"
"""``ArmAnnotationInfo.CUSTOM_META_KEY`` of ExecuTorch, which reads the mark of quantized calls."""

ORIGIN = "custom_quantizer_op"
"""Beside that mark: anchor of the op of the converted graph that a call belongs to."""


@dataclass
class Work:
    """A graph that is being rewritten.

    Attributes:
        model: a copy of the converted graph.
        graph: what was read from the original.
        ops: integer ops, with the nodes of the copy: anchor, last node, quantize node behind it.
    """

    model: GraphModule
    graph: ConvertedGraph
    ops: list[_Placed]


@dataclass
class _Placed:
    """An op and where it is in the copy, which passes change."""

    op: QuantizedOp
    anchor: Node
    last: Node
    stored: Node | None

    @property
    def clamps(self) -> bool:
        return self.op.match.rule.bounds is not None


def work_on(model: GraphModule, graph: ConvertedGraph) -> Work:
    """Find the ops of ``graph`` in a copy of its model."""
    by_name = {node.name: node for node in model.graph.nodes}

    def place(op: QuantizedOp) -> _Placed:
        last = by_name[op.output_node.name]
        behind = [user for user in effective_users(last) if is_quantize(user)]
        return _Placed(op, by_name[op.node.name], last, behind[0] if behind else None)

    return Work(model, graph, [place(op) for op in graph.integer])


# ---------------------------------------------------------------------------------------------
# Small pieces
# ---------------------------------------------------------------------------------------------


def _insert(model: GraphModule, source: Node, target: Any, args: tuple[Any, ...]) -> Node:
    with model.graph.inserting_after(source):
        return _call(model, source, target, args)


def _call(model: GraphModule, source: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """A call where the graph is at, of what ``source`` is of."""
    node = model.graph.call_function(target, args)
    for key in ("nn_module_stack", "stack_trace", "from_node"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    return node


def _storage(q: QParams) -> torch.dtype:
    return torch.int8 if q.fits_int8 else torch.int16


def _rounded(model: GraphModule, source: Node, q: QParams) -> Node:
    """A quantize and a dequantize node behind ``source``."""
    args = (scale_of(q), q.zero_point, q.quant_min, q.quant_max, _storage(q))
    stored = _insert(model, source, QUANTIZE_PER_TENSOR, (source, *args))
    return _insert(model, stored, DEQUANTIZE_PER_TENSOR, (stored, *args))


def _clamp(model: GraphModule, source: Node, low: float, high: float, name: str) -> Node:
    limits = [None if math.isinf(limit) else limit for limit in (low, high)]
    node = _insert(model, source, aten.clamp.default, (source, *limits))
    _mark(node, name)
    return node


def _mark(node: Node, name: str) -> None:
    mine = {_MARK: {"quantized": True}, ORIGIN: name}
    node.meta["custom"] = {**node.meta.get("custom", {}), **mine}


# ---------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------


def explicit_activations(work: Work) -> int:
    """Fused activations that limit anything stand alone, between two roundings to one scale."""
    count = 0
    for placed in work.ops:
        op = placed.op
        if placed.last is placed.anchor:
            continue
        bounds = op.stored_bounds(work.graph.backend.arithmetic)
        following = placed.anchor
        if bounds != (op.output.quant_min, op.output.quant_max):
            rounded = _rounded(work.model, placed.anchor, op.output)
            limits = as_limits(*cast("tuple[float | None, float | None]", op.bounds))
            following = _clamp(work.model, rounded, *limits, op.node.name)
        placed.last.replace_all_uses_with(following)
        work.model.graph.erase_node(placed.last)
        placed.last = following
        count += 1
    return count


def clamps_on_one_scale(work: Work) -> int:
    """An activation that is an op of its own: a rounding to its scale, then a clamp."""
    count = 0
    for placed in work.ops:
        if not placed.clamps:
            continue
        op = placed.op
        source = cast(Node, placed.anchor.args[0])
        if not op.inputs[0].same_grid(op.output):
            source = _rounded(work.model, source, op.output)
        limits = cast("tuple[float, float]", op.match.bounds)
        clamp = _clamp(work.model, source, *limits, op.node.name)
        placed.anchor.replace_all_uses_with(clamp)
        work.model.graph.erase_node(placed.anchor)
        placed.anchor = placed.last = clamp
        count += 1
    return count


def saturation_before_sums(work: Work) -> int:
    """A clamp to the whole range behind ops whose rounding ExecuTorch would drop before a sum."""
    count = 0
    readers = {placed.anchor: placed for placed in work.ops}
    for placed in work.ops:
        if placed.stored is None or placed.last.target is aten.clamp.default:
            continue
        if not any(_would_fuse(placed, reader) for reader in _readers(placed.stored, readers)):
            continue
        q = placed.op.output
        rounded = _rounded(work.model, placed.last, q)
        # One step beyond the ends, which is stored as the ends.
        ends = (q.quant_min - 1, q.quant_max + 1)
        low, high = ((end - q.zero_point) * scale_of(q) for end in ends)
        clamp = _clamp(work.model, rounded, low, high, placed.op.node.name)
        placed.stored.replace_input_with(placed.last, clamp)
        placed.last = clamp
        count += 1
    return count


def _readers(stored: Node, readers: Mapping[Node, _Placed]) -> Iterator[_Placed]:
    """Ops that read integers, through ops that move them."""
    for user in stored.users:
        if not is_dequantize(user):
            continue
        for reader in user.users:
            placed = readers.get(reader)
            if placed is None:
                continue
            yield placed
            moves = placed.op.match.rule.moves_values
            if moves and placed.stored is not None:
                yield from _readers(placed.stored, readers)


def _would_fuse(maker: _Placed, reader: _Placed) -> bool:
    made, read = maker.op, rescales_around(reader.op)
    if read is None:
        return False
    if made.weight is not None:
        return made.is_wide
    around = rescales_around(made)
    # ExecuTorch compares the product of both factors with 1, to within 1e-6.
    return around is not None and any(
        q.same_grid(made.output) and abs(around[1] * factor - 1.0) < 1e-5
        for factor, q in zip(read[0], reader.op.inputs, strict=True)
    )


def batched_products(work: Work) -> int:
    """Products of matrices have one batch dimension, or none; TOSA's MATMUL has one."""
    count = 0
    for placed in work.ops:
        if placed.anchor.target is not aten.matmul.default:
            continue
        model, op = work.model, placed.op
        operands = [cast(Node, arg) for arg in placed.anchor.args[:2]]
        shapes = [shape_of(source) for source in op.match.inputs]
        if len(shapes[0]) == 2:
            placed.anchor.target = aten.mm.default
        elif len(shapes[0]) == 3:
            placed.anchor.target = aten.bmm.default
        else:
            with model.graph.inserting_before(placed.anchor):
                sizes = [
                    _sizes(model, operand, shape)
                    for operand, shape in zip(operands, shapes, strict=True)
                ]
                flat = [
                    _call(model, operand, aten.reshape.default, (operand, [-1, *shape[-2:]]))
                    for operand, shape in zip(operands, sizes, strict=True)
                ]
            batched = []
            for node, q in zip(flat, op.inputs, strict=True):
                _mark(node, op.node.name)
                batched.append(_rounded(model, node, q))
            with model.graph.inserting_before(placed.anchor):
                product = model.graph.call_function(aten.bmm.default, tuple(batched))
            product.meta = dict(placed.anchor.meta)
            back = _rounded(model, product, op.output)
            shape = [*sizes[0][:-1], sizes[1][-1]]
            shaped = _insert(model, back, aten.reshape.default, (back, shape))
            placed.anchor.replace_all_uses_with(shaped)
            model.graph.erase_node(placed.anchor)
            placed.anchor, placed.last = product, shaped
        count += 1
    return count


def _sizes(model: GraphModule, source: Node, shape: Sequence[Any]) -> list[Any]:
    """Sizes of a tensor; what was dynamic at capture as a call, which export makes a number."""
    return [
        size if isinstance(size, int) else _call(model, source, aten.sym_size.int, (source, dim))
        for dim, size in enumerate(shape)
    ]


def parts_by_themselves(work: Work) -> int:
    """Each part of a split tensor is cut out by a call of its own, between its own roundings.

    Parts that are read on both sides of an op outside belong to several TOSA programs; ExecuTorch
    takes the split out of all of them, and leaves integers where float32 is wanted.
    """
    count = 0
    for placed in work.ops:
        if placed.anchor.target is not operator.getitem:
            continue
        split, index = cast(Node, placed.anchor.args[0]), cast(int, placed.anchor.args[1])
        data = split.args[0]
        if not isinstance(data, Node) or not is_dequantize(data):
            continue
        parts = recorded_value(split)
        dim = int(argument(split, 1 if split.target is aten.unbind.int else 2, "dim", 0))
        dim %= len(shape_of(data))
        target: Any = aten.select.int
        rest: tuple[Any, ...] = (dim, index)
        if split.target is not aten.unbind.int:
            sizes = [part.shape[dim] for part in parts]
            if not are_static(sizes):
                continue
            begin = sum(sizes[:index])
            target, rest = aten.slice.Tensor, (dim, begin, begin + sizes[index])
        with work.model.graph.inserting_before(placed.anchor):
            own = work.model.graph.call_function(cast(Any, data.target), data.args, data.kwargs)
            own.meta = dict(data.meta)
            part = work.model.graph.call_function(target, (own, *rest))
        part.meta = dict(placed.anchor.meta)
        placed.anchor.replace_all_uses_with(part)
        work.model.graph.erase_node(placed.anchor)
        if placed.last is placed.anchor:
            placed.last = part
        placed.anchor = part
        count += 1
    return count


def weights_in_bytes(work: Work) -> int:
    """Narrow weights of layers with 16-bit activations are bytes."""
    count = 0
    for placed in work.ops:
        weight = placed.op.weight_qparams
        if weight is None or packs_weights(placed.op):
            continue
        if (weight.quant_min, weight.quant_max) != (-7, 7):
            continue
        node = cast(Node, placed.anchor.args[1])
        limits = len(node.args) - 3
        args = list(node.args)
        args[limits], args[limits + 1] = -127, 127
        node.args = tuple(args)
        count += 1
    return count


def biases_in_units(work: Work) -> int:
    """Biases are integers in units of the accumulator."""
    count = 0
    for placed in work.ops:
        bias = placed.op.match.bias
        if bias is None or placed.op.bias is None:
            continue
        if torch.equal(constant_of(work.graph.model, cast(Node, bias.args[0])), placed.op.bias):
            continue
        node = cast(Node, argument(placed.anchor, 2, "bias"))
        whole = add_constant(work.model, f"{bias.name}_shifted", placed.op.bias, node)
        # Another layer may read the same constant, to be shifted otherwise.
        with work.model.graph.inserting_before(node):
            target = cast("Callable[..., Any]", node.target)
            own = work.model.graph.call_function(target, (whole, *node.args[1:]))
        own.meta = dict(node.meta)
        placed.anchor.replace_input_with(node, own)
        count += 1
    return count


def marks(work: Work) -> int:
    """Mark the calls that compute on integers."""
    for placed in work.ops:
        for node in (placed.anchor, placed.last):
            _mark(node, placed.op.node.name)
    return len(work.ops)


PASSES: Sequence[Callable[[Work], int]] = (
    explicit_activations,
    clamps_on_one_scale,
    saturation_before_sums,
    batched_products,
    parts_by_themselves,
    weights_in_bytes,
    biases_in_units,
    marks,
)
"""In the order in which they run."""


def run_passes(
    model: GraphModule, graph: ConvertedGraph, passes: Sequence[Callable[[Work], int]] = PASSES
) -> dict[str, int]:
    """Rewrite a copy of a converted graph in place.

    Args:
        model: the copy.
        graph: what was read from the original.
        passes: to run, in order.

    Returns:
        By name of a pass, how many places it changed.
    """
    work = work_on(model, graph)
    applied = {each.__name__: each(work) for each in passes}
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return applied
