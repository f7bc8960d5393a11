"""Decisions that an op's neighbors change: what stays in float after all, what moves integers."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_empty,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.core.schemes import OpScheme, TensorScheme
from custom_quantizer.ops import Formats, PatternMatch, Trait, rule_of
from custom_quantizer.ops.backend import Backend, Support
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
from custom_quantizer.ops.functions import DIV, RECIPROCAL, RSQRT, SQRT
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.pool import AVG_POOL, MEAN
from custom_quantizer.planning.decisions import to_float
from custom_quantizer.planning.drafts import DraftOp, is_float32, same_format
from custom_quantizer.planning.model_io import ModelIO
from custom_quantizer.planning.profitability import Kind, Step, unprofitable


def leave_sums(ops: list[DraftOp], anchors: dict[Node, DraftOp]) -> set[Node]:
    """Sums and products that only float ops read are computed in float.

    On the way into a softmax these are scales, biases and masks: a mask (a large negative number)
    would take the whole range of an int8 sum for itself. Between layer norms it is the residual
    stream of a transformer, whose parts differ by orders of magnitude. Either way the reader
    dequantizes what an int8 kernel has just rounded. So are clamps of an input of the model, as
    that of a mask in which minus infinity stands.

    Returns:
        All ops, of whatever kind, that only float ops read.
    """
    floats: set[Node] = set()
    only_floats: set[Node] = set()
    sums: list[tuple[DraftOp, OpScheme]] = []
    for op in reversed(ops):
        users = effective_users(op.output)
        into = [user in floats or _computes_in_float(anchors.get(user)) for user in users]
        if not users or not all(into):
            continue
        only_floats.add(op.node)
        computes = op.has(Trait.SUM) or _clamps_input(op, anchors)
        if not (computes or op.has(Trait.VIEW)):
            continue
        if computes and op.scheme is not None:
            if op.decision.explicit:
                continue
            scheme, op.scheme = op.scheme, None
            op.reason = "only float ops read its result: quantizing it would just round once more"
            sums.append((op, scheme))
        floats.add(op.node)
    _store_operands(sums)
    return only_floats


def _clamps_input(op: DraftOp, anchors: dict[Node, DraftOp]) -> bool:
    """Whether an op clamps an input of the model, which may be moved before."""
    if op.match is None or op.match.rule is not CLAMP:
        return False
    (source,) = op.match.inputs
    while (move := anchors.get(source)) is not None and move.moves_values and move.match:
        source = move.match.inputs[0]
    return source.op == "placeholder"


_LARGE = 1024
"""Elements of a constant operand from which on it is worth a conversion at run time."""

_LOST = 0.03
"""Root mean square of what rounding may take from a constant, as a part of how far its values lie
apart: nothing next to what is lost of the other operand, which was made of integers."""

_NOTHING = 2.0**-20
"""The same of a constant that is integers times a scale, as a part of its largest value."""


_PART = 0.02
"""Of the bytes of a program that large constants have to take as floats to be rounded."""


def _store_operands(sums: list[tuple[DraftOp, OpScheme]]) -> None:
    """Large constants that float sums add are stored as integers, as weights are.

    They are tables of relative positions, position embeddings and masks. What rounding changes is
    rounded only where the file is notably smaller for it, and where the scheme of the op has no
    more bits, which say how little may be lost.
    """
    rounded: list[tuple[DraftOp, Node, TensorScheme]] = []
    for op, scheme in sums:
        stored = None if op.support is None else op.support.operand
        constants = [t for t in op.match.inputs if is_constant(t)] if op.match is not None else []
        if stored is None or len(constants) != 1 or not is_float32(constants[0]):
            continue
        (constant,) = constants
        model = cast(GraphModule, op.node.graph.owning_module)
        lost, spread, largest = _rounding(constant_of(model, constant).flatten(), stored)
        if lost <= _NOTHING * largest:
            _store_operand(op, constant, stored)
        elif lost <= _LOST * spread and _widest(scheme) <= stored.format.bits:
            rounded.append((op, constant, stored))
    if not rounded:
        return
    model = cast(GraphModule, rounded[0][0].node.graph.owning_module)
    all_bytes = sum(value.numel() for value in model.state_dict().values())
    constant_bytes = 4 * sum(math.prod(shape_of(constant)) for _, constant, _ in rounded)
    if constant_bytes >= _PART * all_bytes:
        for op, constant, stored in rounded:
            _store_operand(op, constant, stored)


def _widest(scheme: OpScheme) -> int:
    return max(scheme.activation.format.bits, scheme.weight.format.bits)


def _rounding(values: Tensor, stored: TensorScheme) -> tuple[float, float, float]:
    """Root mean square of what rounding takes from values, how far these lie apart, the largest.

    The first is infinite if they are few, or not all finite. How far they lie apart is no mean:
    bunches of them, as of a mask that was added to a table, would be rounded away by one scale.
    """
    if values.numel() < _LARGE or not bool(values.isfinite().all()):
        return math.inf, 0.0, 0.0
    largest = values.abs().max()
    scale = largest / stored.format.quant_max
    lost = (values - scale * (values / scale).round()).square().mean().sqrt()
    spread = (values - values.median()).abs().median()
    return float(lost), float(spread), float(largest)


def _store_operand(op: DraftOp, constant: Node, stored: TensorScheme) -> None:
    op.operand = constant, stored
    op.reason += f"; its constant is stored as {stored.format}"


def leave_joins(ops: list[DraftOp], producer: dict[Node, DraftOp], only_floats: set[Node]) -> None:
    """Tensors that are joined for float ops alone keep scales of their own.

    As integers they would need one scale: a class token that is joined to the patches of an image
    before a norm has a few levels of theirs. Pieces of one tensor have one scale anyway.
    """
    for op in ops:
        joined = op.match.inputs if op.match is not None and op.moves_values else ()
        if len(joined) < 2 or op.node not in only_floats or op.decision.explicit:
            continue
        if len({_source(tensor, producer) for tensor in joined}) > 1:
            op.match, op.reason = (
                None,
                "it joins tensors of different scales, and float ops read it",
            )


def _source(tensor: Node, producer: dict[Node, DraftOp]) -> Node:
    """The tensor that ``tensor`` shows values of, in another order or shape."""
    op = producer.get(tensor)
    while op is not None and op.moves_values and op.match is not None:
        tensor = op.match.inputs[0]
        op = producer.get(tensor)
    return tensor


def leave_divisors(ops: list[DraftOp], producer: dict[Node, DraftOp]) -> None:
    """What keeps a divisor away from zero is kept: rounded to a grid it would be zero.

    ``F.normalize`` of a row of zeros is zero, and not 0 / 0. It is a bound, or a small number that
    is added (``x / (x.sum() + 1e-6)``).
    """
    for op in ops:
        if not op.has(Trait.DIVISION) or op.match is None:
            continue
        source = producer.get(op.match.inputs[-1])
        while source is not None and source.moves_values and source.match is not None:
            source = producer.get(source.match.inputs[0])
        if source is not None and _keeps_from_zero(source):
            _leave(source, "a divisor")


def leave_poles(ops: list[DraftOp], producer: dict[Node, DraftOp], backend: Backend) -> None:
    """So is what keeps the argument of a float op away from zero, where that op is infinite.

    A table of integers takes its own smallest or largest integer there. A float op makes an
    infinity, or what is no number, of it. A square root or a quotient between the two would be
    rounded to zero as well: ``x / torch.sqrt(variance + 1e-5)``,
    ``torch.log(p.clamp(min=1e-5) / (1 - p).clamp(min=1e-5))``.
    """
    for op in ops:
        argument, what = _pole(op)
        if argument is None or not _runs_in_float(op, backend):
            continue
        between: list[DraftOp] = []
        source = producer.get(argument)
        while source is not None and source.match is not None:
            if source.match.rule in (DIV, SQRT) and not source.decision.explicit:
                between.append(source)
            elif not source.moves_values:
                break
            source = producer.get(source.match.inputs[0])
        if source is None or not (_keeps_from_zero(source) or (between and _guards(source))):
            continue
        for each in (source, *between):
            _leave(each, what)


def leave_powers(ops: list[DraftOp], producer: dict[Node, DraftOp], backend: Backend) -> None:
    """Powers under a root, and what is between, stay in float where no integer kernel has the root.

    A power has a wider range than the root of its mean, sum or multiple: integers of one scale
    round to zero what the root makes large again (norms that are written out, generalized means).
    """
    parts: dict[str, list[DraftOp]] = {}
    powers: set[Node] = set()
    for op in ops:
        parts.setdefault(original_name(op.node), []).append(op)
        inputs = () if op.match is None else op.match.inputs
        if _is_power(op) or (_adds_up(op) and not powers.isdisjoint(inputs)):
            powers.add(op.output)
    for root in ops:
        if not _is_root(root) or _has_integer_kernel(root, backend):
            continue
        found, waiting = {original_name(root.node): root}, [root]
        while waiting:
            for tensor in waiting.pop().node.all_input_nodes:
                source = producer.get(tensor) if tensor in powers else None
                if source is not None and original_name(source.node) not in found:
                    found[original_name(source.node)] = source
                    waiting += parts[original_name(source.node)]
        chain = [op for name in found for op in parts[name]]
        kept = any(op.decision.explicit for op in chain)
        if len(found) > 1 and not kept and all(_can_be_float(op, backend) for op in chain):
            for op in chain:
                if op.scheme is not None:
                    op.scheme, op.abstains = None, True
                    op.reason = "a power and its root: integers of one scale lack the range between"


def _is_power(op: DraftOp) -> bool:
    """Whether an op multiplies a tensor by itself, or is a part of a power."""
    target = op.node.meta.get("original_target", op.node.target)
    both = op.node.args[:2]
    return op.rule is MUL and (target in _POWERS or both[0] is both[1])


def _adds_up(op: DraftOp) -> bool:
    """Whether an op hands powers on: moved, summed up, or scaled."""
    target = op.node.meta.get("original_target", op.node.target)
    if op.moves_values or target in _SUMS or op.rule in (MEAN, AVG_POOL, ADD, SUB, CLAMP, RELU):
        return True
    return op.rule in (MUL, DIV) and any(not _is_activation(arg) for arg in op.node.args[:2])


def _is_activation(arg: object) -> bool:
    return isinstance(arg, Node) and not is_constant(arg)


def _is_root(op: DraftOp) -> bool:
    if op.rule in (SQRT, RSQRT):
        return True
    is_pow = op.node.target is torch.ops.aten.pow.Tensor_Scalar
    return is_pow and 0 < abs(cast(float, op.node.args[1])) < 1


def _can_be_float(op: DraftOp, backend: Backend) -> bool:
    return op.moves_values or backend.in_float(op.node).placement is Placement.FLOAT


_POWERS = frozenset({torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.square.default})

_SUMS = frozenset(
    {
        torch.ops.aten.adaptive_avg_pool1d.default,
        torch.ops.aten.adaptive_avg_pool2d.default,
        torch.ops.aten.mean.dim,
        torch.ops.aten.sum.dim_IntList,
    }
)

_LOGARITHMS = frozenset(
    {torch.ops.aten.log.default, torch.ops.aten.log2.default, torch.ops.aten.log10.default}
)


def _pole(op: DraftOp) -> tuple[Node | None, str]:
    """The argument at whose zero an op is infinite, and what it is called."""
    node = op.node
    if node.target in _LOGARITHMS:
        return cast(Node, node.args[0]), "the argument of a logarithm"
    if op.rule in (RECIPROCAL, RSQRT):
        return cast(Node, node.args[0]), "a divisor"
    if node.target is torch.ops.aten.pow.Tensor_Scalar and cast(float, node.args[1]) < 0:
        return cast(Node, node.args[0]), "a divisor"
    if op.rule is DIV and op.match is not None and len(op.match.inputs) == 2:
        return op.match.inputs[1], "a divisor"
    return None, ""


def _has_integer_kernel(op: DraftOp, backend: Backend) -> bool:
    """Whether an op is one on integers wherever it stands."""
    if op.scheme is None or op.match is None:
        return False
    return not backend.predict(op.match, Formats(8)).kernel.needs_integers


def _runs_in_float(op: DraftOp, backend: Backend) -> bool:
    if op.scheme is None or op.match is None:
        return True
    placement = backend.predict(op.match, Formats(8)).kernel.placement
    return placement not in (Placement.INTEGER, Placement.TABLE)


def _keeps_from_zero(op: DraftOp) -> bool:
    """Whether integers would round away what an op keeps away from zero."""
    return op.scheme is not None and _guards(op)


def _guards(op: DraftOp) -> bool:
    """Whether an op keeps its result away from zero."""
    if op.decision.explicit:
        return False
    last = rule_of(op.output)  # a clamp of its own, or one that is fused
    low = None if last is None or last.bounds is None else last.bounds(op.output)[0]
    return (low is not None and low > 0) or _adds_epsilon(op)


def _leave(op: DraftOp, what: str) -> None:
    if op.scheme is not None:
        op.scheme = None
        op.reason = f"it keeps {what} away from zero, to which integers would round it"


_LARGEST_EPSILON = 1e-3
"""Of numbers that are added to keep a divisor away from zero, as norms do it."""


def _adds_epsilon(op: DraftOp) -> bool:
    if op.node.target is not torch.ops.aten.add.Tensor or op.match is None:
        return False
    graph = cast(GraphModule, op.node.graph.owning_module)
    constants = [constant_of(graph, n) for n in op.match.inputs if n.op == "get_attr"]
    return any(c.numel() == 1 and bool((c > 0) & (c <= _LARGEST_EPSILON)) for c in constants)


def _computes_in_float(op: DraftOp | None) -> bool:
    return op is not None and op.support is not None and bool(op.support.float_reason)


def leave_readers_of_integers(ops: list[DraftOp], io: ModelIO, backend: Backend) -> None:
    """Not every kernel reads an input that the program takes as integers."""
    placeholders = [node for node in io.node.graph.nodes if node.op == "placeholder"]
    integers = {placeholders[position] for position in io.integer_inputs}
    for op in ops:
        if op.match is None or op.scheme is None or integers.isdisjoint(op.match.inputs):
            continue
        if why := backend.refuses_integers(op.match, op.scheme):
            op.scheme, op.reason = None, why


def leave_unprofitable(ops: list[DraftOp], io: ModelIO, backend: Backend) -> None:
    """Ops without an integer kernel stay in float where quantizing them would only cost."""
    kinds = {op.node: _kind(op, backend) for op in ops}
    steps = [
        Step(
            kinds[op.node],
            () if op.match is None else tuple(t for t in op.match.inputs if not is_constant(t)),
            op.output,
            tuple(effective_users(op.output)),
            op.node,
        )
        for op in ops
    ]
    refused = unprofitable(steps, io.inputs, io.wanted)
    for op in ops:
        if op.node in refused:
            op.scheme = None
            op.reason = (
                f"{backend.title} has no integer kernel for it, and {refused[op.node]}: quantizing "
                "it would only cost"
            )


def _kind(op: DraftOp, backend: Backend) -> Kind:
    """What an op does with integers, now that it is settled."""
    if op.moves_values:
        return Kind.FLOAT if left_in_float(op, backend) else Kind.MOVEMENT
    if op.scheme is None or op.match is None or op.scheme.dynamic:
        return Kind.FLOAT
    # A rule that names the op or its type is an order.
    if op.decision.aimed:
        return Kind.INTEGER
    kernel = backend.predict(op.match, Formats(8)).kernel
    return Kind.OPTIONAL if kernel.needs_integers else Kind.INTEGER


def center(ops: list[DraftOp], producer: dict[Node, DraftOp]) -> None:
    """Where an op needs zero point 0, make the producer of that operand quantize symmetrically.

    Only if its range has both signs: of one sign, half of a symmetric range would be unused.
    """
    for op in ops:
        if op.support is None or op.scheme is None or op.match is None:
            continue
        for position in op.support.requires_symmetric:
            source = producer.get(op.match.inputs[position])
            while source is not None and source.moves_values and source.match is not None:
                source = producer.get(source.match.inputs[0])
            if source is None or source.scheme is None or source.is_dynamic or source.fused:
                continue
            if source.match is not None and source.match.weight is None:
                signed = source.has(Trait.SUM)
            else:
                signed = True
            source.centered = signed


def returned_in_float(
    ops: list[DraftOp], anchors: dict[Node, DraftOp], io: ModelIO
) -> frozenset[Node]:
    """Ops whose results nobody sees but the caller of the model, who gets float32 of them."""
    integers, found = set(io.wanted), set[Node]()
    shown: set[Node] = {io.node}  # where what is read there is what the caller gets
    for op in reversed(ops):
        users = effective_users(op.output)
        if not users or op.output in integers:
            continue
        readers = (anchors[user].node if user in anchors else user for user in users)
        if all(reader in shown for reader in readers):
            found.add(op.node)
            if _hands_on(op):
                shown.add(op.node)
    return frozenset(found)


def _hands_on(op: DraftOp) -> bool:
    """Whether an op hands on tensors as they are, and no rule wants it on integers.

    Those that it joins are seen on one scale, unless it joins them as floats.
    """
    if not op.moves_values or op.match is None or _has_rule(op):
        return False
    return len(op.match.inputs) == 1 or bool(cast(Support, op.support).float_output(op.match))


def _has_rule(op: DraftOp) -> bool:
    return op.decision.explicit and op.decision.scheme is not None


def follow_producers(
    ops: list[DraftOp],
    producer: dict[Node, DraftOp],
    io: ModelIO,
    returned: Set[Node],
    backend: Backend,
) -> None:
    """A data-movement op passes on the integers it is given, if that is worth it.

    Args:
        ops: all, in graph order.
        producer: by output.
        io: what the config asks of inputs and outputs.
        returned: those that only float outputs of the model show.
        backend: may compute these better in float, where no rule names them.
    """
    for op in ops:
        if not op.moves_values or left_in_float(op, backend):
            continue
        match = cast(PatternMatch, op.match)
        sources = [
            source
            for tensor in match.inputs
            if (source := producer.get(tensor)) is not None and not source.is_dynamic
        ]
        op.centered = any(source.centered for source in sources)
        given = [source.made for source in sources]
        given += [io.inputs.get(tensor) for tensor in match.inputs]
        formats = [fmt for fmt in given if fmt is not None]
        shown = bool(formats) and op.node in returned and not _has_rule(op)
        why = cast(Support, op.support).float_output(match) if shown else ""
        if why:
            op.centered = False
            op.reason = f"only float outputs of the model show it: {why}"
        elif formats:
            # Tensors that are joined must agree: on the widest format among them.
            op.follows = max(formats, key=lambda fmt: fmt.format.bits)
            op.reason = "moves values: keeps the integers it is given"


def left_in_float(op: DraftOp, backend: Backend) -> bool:
    """Of a data-movement op: whether something forbids passing integers on."""
    if op.match is None:
        return True
    if op.decision.explicit and op.decision.scheme is None:
        op.reason = op.decision.reason
        return True
    for tensor in (op.node, *op.match.inputs):
        meta = tensor_meta(tensor)
        if meta is not None and meta.dtype != torch.float32:
            op.reason = f"{describe(tensor)} is {meta.dtype}; only float32 tensors are quantized"
            op.reason += to_float(meta)
            return True
    refusal = backend.refuses_tensor(op.node) if is_empty(op.node) else ""
    if refusal:
        op.reason = f"its result {refusal}"
        return True
    return False


def follow_consumers(ops: list[DraftOp], anchors: dict[Node, DraftOp]) -> None:
    """Data movement of a float tensor moves integers if all users of the result want the same."""
    for op in reversed(ops):
        if not op.moves_values or op.follows is not None or op.match is None or op.reason:
            continue
        wanted: list[TensorScheme | None] = []
        for user in effective_users(op.node):
            consumer = anchors.get(user)
            if consumer is not None and consumer.abstains:
                continue
            takes = (
                consumer is not None
                and consumer.match is not None
                and op.node in consumer.match.inputs
                and not consumer.is_dynamic
            )
            wanted.append(_wanted_by(consumer, op.node) if takes else None)
        first = wanted[0] if wanted else None
        if first is not None and all(same_format(first, other) for other in wanted):
            op.follows = first
            op.reason = "moves values: quantized before it, as its consumers want integers"
        else:
            op.reason = "moves values of a float tensor"


def _wanted_by(consumer: DraftOp | None, tensor: Node) -> TensorScheme | None:
    """Format in which an op takes ``tensor``."""
    if consumer is None or consumer.activation is None:
        return None
    return consumer.wanted(cast(PatternMatch, consumer.match).inputs.index(tensor))
