"""Decisions that an op's neighbors change: what stays in float after all, what moves integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    describe,
    effective_users,
    is_constant,
    is_empty,
    is_float32,
    is_sized_by_data,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import IN_FLOAT
from custom_quantizer.core.schemes import OpScheme, TensorScheme
from custom_quantizer.ops import Formats, PatternMatch, Trait
from custom_quantizer.ops.backend import Backend, Support
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB
from custom_quantizer.ops.functions import DIV
from custom_quantizer.ops.movement import CAT, EXPAND, GETITEM, SELECT, SLICE, SPLIT
from custom_quantizer.ops.pool import ADAPTIVE_AVG_POOL, MEAN
from custom_quantizer.ops.rewrites.training_graph import folded_value
from custom_quantizer.planning.decisions import to_float
from custom_quantizer.planning.drafts import ANNOTATED_BEFORE, DraftOp, Drafts, same_format
from custom_quantizer.planning.model_io import ModelIO
from custom_quantizer.planning.profitability import Kind, Step, unprofitable


def leave_sums(ops: Drafts) -> set[Node]:
    """Sums and products that only float ops read are computed in float.

    On the way into a softmax these are scales, biases and masks: a mask (a large negative number)
    would take the whole range of an int8 sum for itself. Between layer norms it is the residual
    stream of a transformer, whose parts differ by orders of magnitude; there another sum may read
    it, too, whose own result a layer reads (a convolution between blocks). Either way the reader
    dequantizes what an int8 kernel has just rounded. So are means of tokens or of an image before a
    norm, of which calibration sees few, and whose range is soon left; and clamps of an input of the
    model, as that of a mask in which minus infinity stands.

    Returns:
        All ops, of whatever kind, that only float ops read.
    """
    only_floats, sums = _leave_read(ops, _reads_floats, lambda op: _adds(op, ops))
    _store_operands(sums)
    return only_floats


def leave_sums_between_floats(ops: Drafts, backend: Backend) -> None:
    """So are sums, products and bounds next to what has become float since, before or behind it.

    What reads the result of float ops may round it once. Rows of a table stay the integers that
    they are stored as, and a graph that has nothing else for integers keeps its sums.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    computed = (op for op in ops if op.scheme is not None and not op.moves_values)
    if all(_is_cheap(op, ops) for op in computed):
        return
    sums: list[tuple[DraftOp, OpScheme]] = []
    floats: set[Node] = set()
    for op in ops:
        read = op.activations
        of_floats = bool(read) and floats.issuperset(read)
        if of_floats and op.scheme is not None and _is_cheap(op, ops):
            sums.append((op, op.scheme))
            op.leave("float ops compute what it reads: quantizing that would just round once more")
        if _is_float(op) or (op.moves_values and of_floats):
            floats.add(op.output)
    sums += _leave_read(ops, _is_float, lambda op: _is_cheap(op, ops))[1]
    for op, _scheme in sums:
        op.abstains = True  # what is moved may be integers for others
    _store_operands(sums)


def _leave_read(
    ops: Drafts, in_float: Callable[[DraftOp], bool], may: Callable[[DraftOp], bool]
) -> tuple[set[Node], list[tuple[DraftOp, OpScheme]]]:
    """Leave ops in float that only float ops read, also as a view, in part, or repeated.

    Of sums other sums may be readers, too.

    Args:
        ops: all of the graph.
        in_float: whether an op is one of those.
        may: whether an op is one of these, if no rule says that it is not.

    Returns:
        All ops, of whatever kind, that only float ops read; those that were left, and how they
        would have been quantized.
    """
    floats: set[Node] = set()
    only_floats: set[Node] = set()
    left: list[tuple[DraftOp, OpScheme]] = []
    for op in reversed(ops):
        if IN_FLOAT in op.node.meta:
            floats.add(op.node)
            continue
        users = effective_users(op.output)
        readers = [ops.anchors.get(user) for user in users if user not in floats]
        others = [reader for reader in readers if reader is None or not in_float(reader)]
        alone = bool(users) and not others
        if alone:
            only_floats.add(op.node)
        elif len(others) == len(users) or not _is_stream(op, others):
            continue
        if may(op):
            if op.scheme is not None:
                if op.decision.explicit:
                    continue
                left.append((op, op.scheme))
                op.leave(_ALONE if alone else _STREAM)
        elif not (op.has(Trait.VIEW) or op.rule in _SHOWING):
            continue
        floats.add(op.node)
    return only_floats, left


def _is_stream(op: DraftOp, readers: list[DraftOp | None]) -> bool:
    """Whether an op is a sum of activations that goes on into sums."""
    sums = all(reader is not None and reader.rule is ADD for reader in readers)
    return sums and op.rule is ADD and len(op.activations) == 2


_ALONE = "only float ops read its result: quantizing it would just round once more"

_STREAM = "float ops read its result, and sums that go on with it: each would round once more"

_SHOWING = (EXPAND, SLICE, SELECT, SPLIT, GETITEM)
"""Families that show a tensor in part, or repeated: of what is float, that is read as well."""


def leave_prepared(ops: Drafts, io: ModelIO, backend: Backend) -> None:
    """Arithmetic with constants on a float input stays in float, up to the layers that read it.

    Of ``(x - mean) / std`` and ``x / 255 * 2 - 1`` each op would round what the first layer's input
    is rounded to anyway, and the input would be rounded before. An input that the config gives a
    format is integers from the beginning.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    given = set(io.node.graph.find_nodes(op="placeholder")) - io.inputs.keys()
    prepares: list[DraftOp] = []
    for op in ops:
        read = op.activations
        by_constants = op.has(Trait.SUM) or op.rule in (DIV, CLAMP)
        alone = by_constants and len(read) == 1 and not op.decision.explicit
        if read and given.issuperset(read) and (op.moves_values or alone):
            given.add(op.output)
            prepares.append(op)
    left: set[DraftOp] = set()
    for op in reversed(prepares):
        readers = [ops.anchors.get(user) for user in effective_users(op.output)]
        if readers and all(reader in left or _is_layer(reader) for reader in readers):
            left.add(op)
            if op.scheme is not None:
                op.leave("it prepares a float input, which is rounded once, for the first layer")


def _is_layer(op: DraftOp | None) -> bool:
    return (
        op is not None and op.scheme is not None and cast(PatternMatch, op.match).weight is not None
    )


def _adds(op: DraftOp, ops: Drafts) -> bool:
    """Whether an op is a sum, a product, a total, a mean of an image, or bounds an input."""
    averages = op.rule in (ADAPTIVE_AVG_POOL, MEAN)
    return op.has(Trait.SUM) or op.is_total or averages or _clamps_input(op, ops)


def _is_cheap(op: DraftOp, ops: Drafts) -> bool:
    """Whether an op is as well computed in float, if what it reads or gives is float."""
    if op.decision.explicit or _reads_table(op.activations, ops) or _has_array(op):
        return False
    return op.has(Trait.SUM) or op.is_total or op.rule in (CLAMP, RELU)


def _has_array(op: DraftOp) -> bool:
    """Whether an op has a constant of more than a vector: floats take four times the bytes."""
    inputs = () if op.match is None else op.match.inputs
    shapes = [shape_of(tensor) for tensor in inputs if is_constant(tensor)]
    return any(math.prod(shape) > max(shape, default=1) for shape in shapes)


def _reads_table(tensors: Iterable[Node], ops: Drafts) -> bool:
    """Whether one of some tensors shows rows of a table, which is stored as integers."""
    makers = map(ops.producer.get, _sources(tensors, ops))
    return any(op is not None and op.support is not None and op.support.table for op in makers)


def _sources(tensors: Iterable[Node], ops: Drafts) -> set[Node]:
    """The tensors whose values some tensors show."""
    return {source for tensor in tensors for source in ops.sources(tensor)}


def _clamps_input(op: DraftOp, ops: Drafts) -> bool:
    """Whether an op clamps an input of the model, which may be moved before."""
    if op.match is None or op.match.rule is not CLAMP:
        return False
    (source,) = op.match.inputs
    return ops.unmoved(source).op == "placeholder"


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
        lost, spread, largest = _rounding(folded_value(model, constant).flatten(), stored)
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


def leave_joins(ops: Drafts, only_floats: set[Node], backend: Backend) -> None:
    """Tensors of different scales that are joined keep those, where that is worth a conversion.

    As integers they would need one scale: a class token that is joined to the patches of an image
    before a norm has a few levels of theirs. Float ops take each as it is. What is joined to a
    product of it (the interactions of features, ``[u, v, u * v]``) would have the scale of its
    squares, here and wherever else it is read. Pieces of one tensor have one scale anyway.
    """
    unmoved: dict[Node, Node] = {}  # as Drafts.unmoved, of a graph with long chains of moves
    for op in ops:
        joined = op.match.inputs if op.match is not None and op.moves_values else ()
        sources = [unmoved.get(tensor, tensor) for tensor in joined]
        if len(set(sources)) > 1 and not op.decision.explicit:
            if op.node in only_floats:
                op.match = None
                op.reason = "it joins tensors of different scales, and float ops read it"
            elif backend.float_targets and _joins_product(joined, ops):
                op.match = None
                op.reason = (
                    "it joins a product to what it is a product of: one scale would be too wide"
                )
        if op.match is not None and op.moves_values:
            unmoved[op.output] = sources[0]


def _joins_product(joined: tuple[Node, ...], ops: Drafts) -> bool:
    """Whether one of some tensors is a product of others among them.

    Rows of a table are left out: for readers in float it would have to be stored as floats.
    """
    if _reads_table(joined, ops):
        return False
    sources = _sources(joined, ops)
    for op in map(ops.producer.get, sources):
        if op is None or op.match is None or op.scheme is None:
            continue
        factors = op.activations
        if len(factors) < 2 or not (op.rule is MUL or op.has(Trait.PRODUCT)):
            continue
        gates = [ops.computed_by(factor) for factor in factors]
        if any(gate is not None and gate.has(Trait.BOUNDED) for gate in gates):
            continue  # a gate, an average: no wider than what it is made of
        if any(not sources.isdisjoint(ops.sources(factor)) for factor in factors):
            return True
    return False


def _computes_in_float(op: DraftOp) -> bool:
    """Whether an op has no integer kernel, wherever it stands."""
    return op.support is not None and bool(op.support.float_reason)


def _reads_floats(op: DraftOp) -> bool:
    """Whether an op computes in float, or joins tensors as floats."""
    return _computes_in_float(op) or (op.rule is CAT and op.match is None)


def _is_float(op: DraftOp) -> bool:
    """Whether the plan has left an op in float so far: no rule did, nobody else annotated it."""
    named = op.decision.explicit or op.reason == ANNOTATED_BEFORE
    return op.scheme is None and not op.moves_values and not named


def leave_readers_of_integers(ops: Drafts, io: ModelIO, backend: Backend) -> None:
    """Not every kernel reads an input that the program takes as integers."""
    placeholders = [node for node in io.node.graph.nodes if node.op == "placeholder"]
    integers = {placeholders[position] for position in io.integer_inputs}
    for op in ops:
        if op.match is None or op.scheme is None or integers.isdisjoint(op.match.inputs):
            continue
        if why := backend.refuses_integers(op.match, op.scheme):
            op.leave(why)


def leave_unprofitable(ops: Drafts, io: ModelIO, backend: Backend) -> None:
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
            op.leave(
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


def center(ops: Drafts) -> None:
    """Where an op needs zero point 0, make the producer of that operand quantize symmetrically.

    Only if its range has both signs: of one sign, half of a symmetric range would be unused.
    """
    for op in ops:
        if op.support is None or op.scheme is None or op.match is None:
            continue
        for position in op.support.requires_symmetric:
            source = ops.computed_by(op.match.inputs[position])
            if source is None or source.scheme is None or source.is_dynamic or source.fused:
                continue
            if source.match is not None and source.match.weight is None:
                signed = source.has(Trait.SUM)
            else:
                signed = True
            source.centered = signed


def returned_in_float(ops: Drafts, io: ModelIO) -> frozenset[Node]:
    """Ops whose results nobody sees but the caller of the model, who gets float32 of them."""
    anchors, integers, found = ops.anchors, set(io.wanted), set[Node]()
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


def leave_layers_of_calls(ops: Drafts, returned: Set[Node]) -> None:
    """Calls that became layers stay in float where only float outputs show what the last one makes.

    Each layer would round once more: of an image that is interpolated along two dims, twice. Where
    the backend computes one of them better on integers, or a rule names the call, all are integers.
    Sums with others may be between (of an enlarged image and the details that a network adds): they
    are in float, too, which takes no more conversions than one of the result.
    """
    for op in ops:
        call = ops.same_call(op)
        if op is not call[-1]:
            continue
        sums = [] if op.node in returned else _shown_sums(op, ops, returned)
        if op.node not in returned and not sums:
            continue
        layers = [part for part in call if not part.moves_values]
        reasons = [
            ""
            if part.match is None or part.support is None
            else part.support.float_output(part.match)
            for part in layers
        ]
        if layers and all(reasons) and not any(part.decision.explicit for part in call):
            for part in layers:
                part.leave(f"only float outputs of the model show it: {reasons[0]}")
            for each in sums:
                each.leave("it adds what float ops make, for float outputs of the model alone")


def _shown_sums(op: DraftOp, ops: Drafts, returned: Set[Node]) -> list[DraftOp]:
    """The sums that read an op, of two activations, if only float outputs show what it makes."""
    readers = [ops.anchors.get(user) for user in effective_users(op.output)]
    sums = [
        reader
        for reader in readers
        if reader is not None and reader.rule in (ADD, SUB) and reader.node in returned
    ]
    free = all(
        each.scheme is not None and not each.decision.explicit and len(each.activations) == 2
        for each in sums
    )
    return sums if free and len(sums) == len(readers) else []


def follow_producers(ops: Drafts, io: ModelIO, returned: Set[Node], backend: Backend) -> None:
    """A data-movement op passes on the integers it is given, if that is worth it.

    Args:
        ops: all of the graph.
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
            if (source := ops.producer.get(tensor)) is not None and not source.is_dynamic
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
        refusal = backend.refuses_tensor(tensor) if is_sized_by_data(tensor) else ""
        if refusal:
            op.reason = f"{describe(tensor)} {refusal}"
            return True
    refusal = backend.refuses_tensor(op.node) if is_empty(op.node) else ""
    if refusal:
        op.reason = f"its result {refusal}"
        return True
    return False


def follow_consumers(ops: Drafts) -> None:
    """Data movement of a float tensor moves integers if all users of the result want the same."""
    for op in reversed(ops):
        if not op.moves_values or op.follows is not None or op.match is None or op.reason:
            continue
        wanted: list[TensorScheme | None] = []
        for user in effective_users(op.node):
            consumer = ops.anchors.get(user)
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
