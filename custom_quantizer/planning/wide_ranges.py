"""What integers of one scale cannot hold stays in float: guards against zero, wide ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    constant_of,
    effective_users,
    is_constant,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.rewriting import step_target
from custom_quantizer.ops import Formats, Trait, rule_of
from custom_quantizer.ops.attention import LOG_SOFTMAX, MATMUL, SOFTMAX
from custom_quantizer.ops.backend import Backend
from custom_quantizer.ops.elementwise import ADD, CLAMP, MUL, RELU, SUB, WHERE
from custom_quantizer.ops.functions import (
    ABS,
    DIV,
    ELU,
    EXP,
    MAXIMUM,
    MINIMUM,
    NEG,
    RECIPROCAL,
    RSQRT,
    SIGMOID,
    SQRT,
    table_of,
)
from custom_quantizer.ops.gemm import LINEAR
from custom_quantizer.ops.movement import IDENTITY
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.pool import AVG_POOL, MEAN
from custom_quantizer.ops.rewrites.paddings import constant_pad
from custom_quantizer.ops.values import values_of
from custom_quantizer.planning.decisions import store_rows
from custom_quantizer.planning.drafts import DraftOp, Drafts
from custom_quantizer.planning.guards import adds_epsilon, bounds_of, leaves_little, numbers_of
from custom_quantizer.planning.model_io import ModelIO


def leave_divisor_guards(ops: Drafts) -> None:
    """What keeps a divisor away from zero stays in float: rounded to a grid it would be zero.

    ``F.normalize`` of a row of zeros is zero, and not 0 / 0. It is a bound, or a small number that
    is added (``x / (x.sum() + 1e-6)``), or what a bound leaves of a number (``1 - p``).
    """
    for op in ops:
        if not op.has(Trait.DIVISION) or op.match is None:
            continue
        source = ops.computed_by(op.match.inputs[-1])
        for guard in _guarding(source, ops):
            _leave_guard(guard, "a divisor")


def leave_pole_guards(ops: Drafts, backend: Backend) -> None:
    """So does what keeps the argument of a float op away from a zero at which it is infinite.

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
        source = ops.producer.get(argument)
        while source is not None and source.match is not None:
            if source.match.rule in (DIV, SQRT) and not source.decision.explicit:
                between.append(source)
            elif not source.moves_values:
                break
            source = ops.producer.get(source.match.inputs[0])
        guards = _guarding(source, ops)
        if source is not None and between and _guards(source):
            guards = guards or [source]
        for each in (*guards, *(between if guards else ())):
            _leave_guard(each, what)


def leave_quotients_of_parts(ops: Drafts, backend: Backend) -> None:
    """A product of activations stays in float where a part of it is divided by another part.

    It holds sums and, behind them, the sum of their weights (linear attention), or coordinates and
    their depth: one scale for both leaves few integers to the smaller.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    for op in ops:
        if op.rule is not DIV or op.match is None or len(op.match.inputs) != 2:
            continue
        above, below = op.match.inputs
        guard = ops.computed_by(below)
        while guard is not None and guard.match is not None and _keeps_away(guard):
            (below,) = guard.activations
            guard = ops.computed_by(below)
        for tensor in ops.sources(above) & ops.sources(below):
            whole = ops.producer.get(tensor)
            if whole is None or whole.scheme is None or not whole.has(Trait.PRODUCT):
                continue
            layer = whole.match is not None and whole.match.weight is not None
            if not layer and not whole.decision.explicit and _can_be_float(whole, backend):
                whole.leave("its parts are divided by one another: one scale is too wide for both")


def _keeps_away(op: DraftOp) -> bool:
    """Whether an op is of those that keep one tensor away from zero."""
    return op.rule in (ABS, ADD, CLAMP, RELU) and len(op.activations) == 1


def leave_endless(ops: Drafts, backend: Backend) -> None:
    """What a constant makes infinite has no scale: masks before maxima, sums of them, pads.

    On the scale of a number that stands for infinity all others are zero. A softmax, an
    exponential, a maximum or a bound makes numbers of it again.
    """
    endless: set[Node] = set()
    stands_for_infinity = _STANDS_FOR_INFINITY if backend.float_targets else math.inf
    for op in ops:
        pad = constant_pad(op.node)
        if pad is not None and abs(pad[1]) >= stands_for_infinity:
            endless.add(op.output)
            continue
        hands_on = op.moves_values or op.rule in _HAND_ON
        if op.match is None or not (hands_on or op.has(Trait.TABLE) or op.match.bounds):
            continue
        sizes = [*filter(None, map(_sizes_of_constant, op.node.all_input_nodes))]
        large = stands_for_infinity if _masks(op, sizes) else math.inf
        read = not endless.isdisjoint(op.node.all_input_nodes)
        if not read and not any(most >= large for _least, most in sizes):
            continue
        if op.scheme is not None or op.moves_values:
            op.leave("it reads what a constant makes infinite, for which there is no scale")
        if op.moves_values:
            op.match = None
        if hands_on:
            endless.add(op.output)


_HAND_ON = (ABS, ADD, DIV, MAXIMUM, MINIMUM, MUL, NEG, SUB, WHERE)
"""Families that make infinities of infinities."""


_STANDS_FOR_INFINITY = 1e4
"""Least number by which masks do: what fits half precision is up to 65,504."""


def _masks(op: DraftOp, sizes: list[tuple[float, float]]) -> bool:
    """Whether large numbers of a constant end up among those of an activation, one by one.

    They are chosen, or added where others of the constant are small; or a mask of ones and zeros is
    multiplied by the constant before it is added: what a layer gives is no such mask.

    Args:
        op: that may mask.
        sizes: of its constants.
    """
    if op.rule in (ADD, SUB):
        return any(least < _STANDS_FOR_INFINITY for least, _most in sizes)
    added = any(user.target in _ADDITIONS for user in effective_users(op.output))
    return op.rule is WHERE or (op.rule is MUL and added and _may_be_mask(op.node))


def _may_be_mask(product: Node) -> bool:
    """Whether what is multiplied lies between -1 and 1, or is made of inputs of the model alone."""
    waiting, seen = list(product.all_input_nodes), set[Node]()
    while waiting:
        tensor = waiting.pop()
        if tensor in seen or tensor.op == "placeholder" or is_constant(tensor):
            continue
        seen.add(tensor)
        values = values_of(cast(GraphModule, tensor.graph.owning_module), tensor)
        if values.low >= -1.0 and values.high <= 1.0:
            continue
        rule = rule_of(tensor)
        if rule is None or not (rule.moves_values or rule in _HAND_ON):
            return False
        waiting += tensor.all_input_nodes
    return True


def _sizes_of_constant(tensor: Node) -> tuple[float, float] | None:
    """Smallest and largest absolute value of a constant of floats; of others ``None``."""
    value = _constant_floats(tensor)
    if value is None:
        return None
    least, most = value.abs().aminmax()
    return float(least), float(most)


def _constant_floats(tensor: Node) -> torch.Tensor | None:
    """A constant of floats that is not computed; ``None`` if the tensor is none."""
    if not is_constant(tensor) or tensor.op != "get_attr":
        return None
    value = constant_of(cast(GraphModule, tensor.graph.owning_module), tensor)
    return value if value.is_floating_point() and value.numel() else None


def leave_shown_totals(ops: Drafts, io: ModelIO, backend: Backend) -> None:
    """A sum or mean over a dim stays in float where only float outputs show what is made of it.

    It adds up rounded numbers, and is cut off where calibration saw smaller ones: of a total there
    are few examples (one a sample: an energy, a log-likelihood, a coordinate). What is behind it is
    as small; so are the sums and products whose results are added up, if nothing else reads them.
    So is the product of two tensors of which one is a vector, as of a user and some items: it is
    what ``(items * user).sum(-1)`` is.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    shown: set[Node] = {io.node}
    for op in reversed(ops):
        users = effective_users(op.output)
        by_these = bool(users) and op.output not in io.wanted and shown.issuperset(users)
        if by_these and _is_free(op, backend):
            shown |= {op.node, op.output}
    left: set[Node] = set()
    for op in ops:
        total = op.is_total or _is_product_with_vector(op)
        behind = op.match is not None and not left.isdisjoint(op.match.inputs)
        if op.node not in shown or not (total or behind):
            continue
        left.add(op.output)
        summed = _read_by_these(ops.same_call(op), ops, backend) if total else ()
        for each in (op, *summed):
            if each.scheme is not None:
                each.leave(_SHOWN)
                each.abstains = True


def store_factors(ops: Drafts, backend: Backend) -> None:
    """Tables whose rows are factors of products that were left in float stay integers.

    They are, too, where other float ops read the rows, and nothing else does.
    """
    for op in ops if backend.float_targets else ():  # others are planned for integers alone
        if op.support is None or op.support.table is None or op.decision.explicit:
            continue
        readers = [ops.anchors.get(user) for user in effective_users(op.output)]
        floats = [reader for reader in readers if reader is not None and reader.scheme is None]
        factor = any(map(_multiplies_activations, floats))
        if factor and len(floats) == len(readers):
            store_rows(op, "a product in float reads its rows")


def _multiplies_activations(op: DraftOp) -> bool:
    return op.rule in (MATMUL, MUL) and len(op.activations) == 2


def leave_compared(ops: Drafts, backend: Backend) -> None:
    """Functions of what is compared for equality stay in float, back to the layer before.

    ``h * (F.max_pool2d(h, 3, 1, 1) == h)`` of scores ``h`` keeps the peaks of a map. A sigmoid on
    integers makes equal what its argument still held apart: two peaks of one.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    for op in ops:
        if op.node.target not in _EQUALITIES:
            continue
        chain: dict[DraftOp, None] = {}
        waiting = list(op.node.all_input_nodes)
        while waiting:
            each = ops.producer.get(waiting.pop())
            if each is None or each.match is None or each in chain or not _keeps_order(each):
                continue
            chain[each] = None
            waiting += each.match.inputs
        free = all(not each.decision.explicit and _can_be_float(each, backend) for each in chain)
        if free and any(table_of(each.match) for each in chain if each.match is not None):
            for each in chain:
                if each.scheme is not None:
                    each.leave(_COMPARED)


def leave_whole_numbers(ops: Drafts, backend: Backend) -> None:
    """What is converted to integers stays in float, back to the layer before.

    ``x.floor().long()`` is an index, of the pixel next to a position, or of a bin. A grid that has
    no 1.0, but 0.988, gives the one before it.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    seen: set[DraftOp] = set()
    waiting = [tensor for op in ops if _is_conversion(op.node) for tensor in op.node.args[:1]]
    while waiting:
        each = ops.producer.get(cast(Node, waiting.pop()))
        if each is None or each in seen or not (each.moves_values or _is_arithmetic(each)):
            continue
        seen.add(each)
        waiting += each.node.all_input_nodes if each.match is None else each.match.inputs
        if each.scheme is not None and _is_free(each, backend):
            each.leave("its values become integers, and a grid would change which")


def _is_conversion(node: Node) -> bool:
    """Whether a call makes integers of reals."""
    if rule_of(node) is not IDENTITY:
        return False
    given, made = tensor_meta(cast(Node, node.args[0])), tensor_meta(node)
    if given is None or made is None or made.dtype is torch.bool:
        return False
    return given.dtype.is_floating_point and not made.dtype.is_floating_point


def _is_arithmetic(op: DraftOp) -> bool:
    """Whether an op computes each of its values of one value of each of its inputs."""
    if op.match is None:
        return op.node.target in _ROUNDINGS
    return op.match.rule in _ELEMENTWISE or table_of(op.match) is not None


def _keeps_order(op: DraftOp) -> bool:
    """Whether an op gives values of one tensor, or a function of each."""
    if op.match is None:
        return False
    function = table_of(op.match) or op.rule in (CLAMP, RELU)
    return len(op.match.inputs) == 1 and (function or op.moves_values)


def _is_free(op: DraftOp, backend: Backend) -> bool:
    """Whether an op is no layer, and float wherever that is better."""
    if op.decision.explicit and op.decision.scheme is not None:
        return False
    if op.match is None or op.scheme is None:
        return True
    layer = op.match.weight is not None or op.has(Trait.PRODUCT)
    total = _is_sum(op) or _is_product_with_vector(op)
    return (not layer or total) and _can_be_float(op, backend)


def _is_product_with_vector(op: DraftOp) -> bool:
    """Whether an op multiplies two activations, of which one is a row or a column."""
    if op.rule is not MATMUL or op.match is None:
        return False
    rows, columns = map(shape_of, op.match.inputs)
    # A dynamic size is none: to ask what it is would make it one.
    counts = (rows[-2], columns[-1]) if min(len(rows), len(columns)) > 1 else ()
    return any(isinstance(count, int) and count == 1 for count in counts)


def leave_wide_ranges(ops: Drafts, backend: Backend) -> None:
    """Powers under a root or an exponential stay in float where no integer kernel has the latter.

    A power has a wider range than the root of its mean, sum or multiple: integers of one scale
    round to zero what the root makes large again (norms that are written out, generalized means).
    Of a square under an exponential (gaussians, radial basis functions, splines), all but the part
    next to zero becomes zero, and takes most of the integers. The logarithm of a sum is to
    exponentials and powers what the root is to powers, also where a constant matrix adds them up
    (mel filters). A sine or cosine makes little of wide phases, too: those that a constant matrix
    makes (Fourier features) have many periods on one scale. Of an exponential close to one, what it
    lacks of one is less than a step of its own scale. What exponentials and sigmoids make is never
    zero, but integers are: no divisor is made of these.
    """
    for kind in (_ROOTS, _EXPONENTIALS, _LOGS, _POLES, _WAVES, _REMAINDERS, _DIFFERENCES):
        _leave_chains(ops, backend, kind)


def leave_hidden_quotients(ops: Drafts, backend: Backend) -> None:
    """A product by the reciprocal of a root that is in float is in float, as a quotient would be.

    ``x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)`` is ``x / torch.sqrt(...)``: the norm
    of most language models. Of one row that is next to zero, such as a padding token, the factor is
    ``1 / sqrt(eps)``, and on its scale the factors of all other rows are zero.
    """
    if not backend.float_targets:
        return  # planned for integers alone
    reciprocals: set[Node] = set()
    for op in ops:
        read = op.activations
        divides = not reciprocals.isdisjoint(read)
        if op.moves_values:
            if op.match is not None and op.match.inputs[0] in reciprocals:
                reciprocals.add(op.output)
        elif op.scheme is None:
            is_one = op.rule in (RECIPROCAL, RSQRT) or _exponent(op.node) < 0
            if is_one or (divides and op.rule is MUL and len(read) == 1):
                reciprocals.add(op.output)
        elif divides and _multiplies_activations(op) and not op.decision.explicit:
            if not _can_be_float(op, backend):
                continue
            op.leave("it divides by a root in float: one scale is too wide for all factors")
            op.abstains = True


def exponents(ops: Drafts, io: ModelIO, backend: Backend) -> dict[str, float]:
    """Products of two activations that only a softmax or an exponential reads, of 8 bits or more.

    They are scores of attention. Some have no factor before the softmax, and ranges of hundreds.

    Returns:
        By name, the largest factor by which a product is multiplied before.
    """
    found: dict[str, float] = {}
    for op in ops if backend.float_targets else ():  # others are planned for integers alone
        product = op.has(Trait.PRODUCT) and op.match is not None and op.match.weight is None
        if not product or op.made is None or op.made.format.bits < 8 or op.is_dynamic:
            continue
        if op.decision.explicit or not _can_be_float(op, backend):
            continue
        factor = _factor_of_exponent(op, ops, io)
        if factor is not None:
            found[op.node.name] = factor
    return found


def _factor_of_exponent(op: DraftOp, ops: Drafts, io: ModelIO) -> float | None:
    """What a tensor is multiplied by before an exponential; ``None`` if others read it."""
    largest, waiting = 0.0, [(op.output, 1.0)]
    while waiting:
        tensor, factor = waiting.pop()
        users = effective_users(tensor)
        if not users or tensor in io.wanted:
            return None
        for user in users:
            reader = ops.anchors.get(user)
            if reader is None or (reader.activation is not None and not reader.moves_values):
                return None
            if reader.rule in (SOFTMAX, LOG_SOFTMAX, EXP):
                largest = max(largest, factor)
            elif reader.rule in (MUL, DIV):
                numbers = numbers_of(user)
                if len(numbers) != 1 or user.args[0] is not tensor:
                    return None
                by = abs(float(numbers[0]))
                waiting.append((reader.output, factor * by if reader.rule is MUL else factor / by))
            elif reader.moves_values or reader.rule in (ADD, SUB):
                waiting.append((reader.output, factor))
            else:
                return None
    return largest


@dataclass(frozen=True)
class _Chain:
    """Ops whose result has a wide range, up to one that makes a narrow range of it.

    Attributes:
        starts: whether an op makes the wide range.
        ends: whether an op makes it narrow again.
        reason: why both stay in float, and what is between.
        before: whether sums and products that nothing else reads are in float as well: those
            before a power that is next to nothing for most of its arguments.
        integers: whether an op that makes it narrow may have an integer kernel.
        hands_on: whether an op makes a wide range of one that it reads.
        reads: the tensors whose range an op makes narrow.
    """

    starts: Callable[[DraftOp], bool]
    ends: Callable[[DraftOp], bool]
    reason: str
    before: bool = False
    integers: bool = False
    hands_on: Callable[[DraftOp], bool] = lambda op: _adds_up(op)
    reads: Callable[[DraftOp], list[Node]] = lambda op: op.node.all_input_nodes


def _leave_chains(ops: Drafts, backend: Backend, kind: _Chain) -> None:
    if kind.integers and not backend.float_targets:
        return  # planned for integers alone
    wide: set[Node] = set()
    for op in ops:
        inputs = () if op.match is None else op.match.inputs
        if kind.starts(op) or (kind.hands_on(op) and not wide.isdisjoint(inputs)):
            wide.add(op.output)
    for end in ops:
        if not kind.ends(end) or (_has_integer_kernel(end, backend) and not kind.integers):
            continue
        if _is_wave(end) and end.node.target not in backend.float_targets:
            continue  # planned for integers alone, which have no form of it
        chain, waiting = dict.fromkeys(ops.same_call(end)), kind.reads(end)
        while waiting:
            tensor = waiting.pop()
            source = ops.producer.get(tensor) if tensor in wide else None
            if source is not None and source not in chain:
                call = ops.same_call(source)
                chain |= dict.fromkeys(call)
                waiting += [read for op in call for read in op.node.all_input_nodes]
        kept = any(op.decision.explicit for op in chain)
        under = all(tensor in wide for tensor in kind.reads(end) if not is_constant(tensor))
        if under and not kept and all(_can_be_float(op, backend) for op in chain):
            if kind.before:
                chain |= dict.fromkeys(_read_by_these(chain, ops, backend))
            for op in chain:
                if op.scheme is not None:
                    op.leave(kind.reason)
                    op.abstains = True


def _read_by_these(chain: Iterable[DraftOp], ops: Drafts, backend: Backend) -> list[DraftOp]:
    """Sums, products and quotients by constants that only ops of a chain read."""
    waiting = list(chain)
    inside, found = {op.node for op in waiting}, list[DraftOp]()
    while waiting:
        for tensor in waiting.pop().node.all_input_nodes:
            op = ops.producer.get(tensor)
            if op is None or op.node in inside or op.decision.explicit:
                continue
            scales = op.has(Trait.SUM) or (op.rule is DIV and not _is_activation(op.node.args[1]))
            whole = len(ops.same_call(op)) == 1
            if not (whole and (scales or op.moves_values) and _can_be_float(op, backend)):
                continue
            if inside.issuperset(effective_users(op.output)):
                inside.add(op.node)
                found.append(op)
                waiting.append(op)
    return found


def _is_power(op: DraftOp) -> bool:
    """Whether an op multiplies a tensor by itself, or is a part of a power."""
    both = op.node.args[:2]
    if abs(_exponent(op.node)) > 1:
        return True
    return op.rule is MUL and (step_target(op.node) in _POWERS or both[0] is both[1])


def _adds_up(op: DraftOp) -> bool:
    """Whether an op hands powers on: moved, summed up, or scaled."""
    if op.moves_values or _is_sum(op) or op.rule in _LINEAR:
        return True
    return op.rule in (MUL, DIV) and any(not _is_activation(arg) for arg in op.node.args[:2])


def _is_sum(op: DraftOp) -> bool:
    return step_target(op.node) in _SUMS or op.adds_up


def _is_activation(arg: object) -> bool:
    return isinstance(arg, Node) and not is_constant(arg)


def _is_root(op: DraftOp) -> bool:
    if op.rule in (SQRT, RSQRT):
        return True
    return 0 < abs(_exponent(op.node)) < 1


def _exponent(node: Node) -> float:
    """Of a power, if it is the same for all inputs; else 1."""
    exponent = node.args[1] if node.target is torch.ops.aten.pow.Tensor_Scalar else None
    return exponent if isinstance(exponent, (int, float)) else 1


def _is_exponential(op: DraftOp) -> bool:
    return op.rule is EXP


def _is_never_zero(op: DraftOp) -> bool:
    """Whether an op makes numbers above zero, or above -1, that come as close as they like."""
    return op.rule in (EXP, SIGMOID, ELU)


def _combines(op: DraftOp) -> bool:
    """Whether an op moves, adds up or multiplies, value by value.

    What adds a constant above zero to what is above zero, too, keeps away from it (``1 + exp(x)``),
    but for ``elu(x) + 1``.
    """
    if op.rule is ADD and all(rule_of(source) is not ELU for source in op.node.all_input_nodes):
        constants = map(_constant_floats, op.node.all_input_nodes)
        small = all(value is None or float(value.min()) <= 0 for value in constants)
        return small or adds_epsilon(op.node)
    return op.moves_values or op.rule in (ADD, MUL, NEG, SUB)


def _argument_at_pole(op: DraftOp) -> list[Node]:
    argument, _what = _pole(op)
    return [] if argument is None or is_constant(argument) else [argument]


def _is_less_a_number(op: DraftOp) -> bool:
    """Whether an op is the difference of a tensor and a number."""
    numbers = numbers_of(op.node) if op.rule in (ADD, SUB) else []
    return len(numbers) == 1 and (op.rule is SUB or bool(numbers[0] < 0))


def _is_difference(op: DraftOp) -> bool:
    """Whether an op is the difference of two activations."""
    return op.rule is SUB and all(_is_activation(arg) for arg in op.node.args[:2])


def _is_logarithm(op: DraftOp) -> bool:
    return op.node.target in _LOGARITHMS


def _is_projection(op: DraftOp) -> bool:
    """Whether an op is a product with a constant matrix, and not captured as a layer."""
    return op.rule is LINEAR and step_target(op.node) in _PRODUCTS


def _is_wave(op: DraftOp) -> bool:
    return op.node.target in (torch.ops.aten.sin.default, torch.ops.aten.cos.default)


def _can_be_float(op: DraftOp, backend: Backend) -> bool:
    return op.moves_values or backend.in_float(op.node).placement is Placement.FLOAT


_ROOTS = _Chain(
    _is_power, _is_root, "a power and its root: integers of one scale lack the range between"
)

_EXPONENTIALS = _Chain(
    _is_power,
    _is_exponential,
    "a power under an exponential: most integers of one scale would be of what becomes zero",
    before=True,
)

_LOGS = _Chain(
    lambda op: _is_exponential(op) or _is_power(op),
    _is_logarithm,
    "exponentials or powers and their logarithm: integers of one scale lack the range between",
    hands_on=lambda op: _adds_up(op) or _is_projection(op),
)

_POLES = _Chain(
    _is_never_zero,
    lambda op: bool(_argument_at_pole(op)),
    "a divisor, or the argument of a logarithm, that is never zero, as an integer would be",
    hands_on=_combines,
    reads=_argument_at_pole,
)

_WAVES = _Chain(
    _is_projection,
    _is_wave,
    "phases of a sine or cosine: integers of one scale for many periods",
    before=True,
)

_REMAINDERS = _Chain(
    _is_exponential,
    _is_less_a_number,
    "what an exponential lacks of a number: integers of one scale lose it where both are close",
    integers=True,
)

_DIFFERENCES = _Chain(
    _is_power,
    _is_difference,
    "a difference of powers: it is small where both are large, and of the scale of these",
    integers=True,
)

_SHOWN = (
    "only float outputs of the model show the total: as an integer it would be rounded, and cut "
    "off where calibration saw none as large"
)

_COMPARED = "it is compared for equality, and integers would make equal what is not"

_EQUALITIES = frozenset({torch.ops.aten.eq.Tensor, torch.ops.aten.ne.Tensor})

_ELEMENTWISE = frozenset({ABS, ADD, CLAMP, DIV, MAXIMUM, MINIMUM, MUL, NEG, RELU, SUB, WHERE})

_ROUNDINGS = frozenset(
    {
        *(torch.ops.aten.round.default, torch.ops.aten.round.decimals),
        *(torch.ops.aten.trunc.default, torch.ops.aten.frac.default),
        *(torch.ops.aten.remainder.Scalar, torch.ops.aten.remainder.Tensor),
        *(torch.ops.aten.fmod.Scalar, torch.ops.aten.fmod.Tensor),
        *(torch.ops.aten.floor_divide.default, torch.ops.aten.div.Tensor_mode),
    }
)
"""Ops of no family that stand before a conversion to integers."""

_ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor})

_PRODUCTS = frozenset({torch.ops.aten.matmul.default, torch.ops.aten.mm.default})

_POWERS = frozenset({torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.square.default})

_LINEAR = (MEAN, AVG_POOL, ADD, SUB, CLAMP, RELU, NEG)

_SUMS = frozenset(
    {
        torch.ops.aten.adaptive_avg_pool1d.default,
        torch.ops.aten.adaptive_avg_pool2d.default,
        torch.ops.aten.mean.default,
        torch.ops.aten.mean.dim,
        torch.ops.aten.std.correction,
        torch.ops.aten.std.dim,
        torch.ops.aten.sum.default,
        torch.ops.aten.sum.dim_IntList,
        torch.ops.aten.var.correction,
        torch.ops.aten.var.dim,
    }
)

_INFINITE_AT_ZERO = frozenset(
    {torch.ops.aten.log.default, torch.ops.aten.log2.default, torch.ops.aten.log10.default}
)

_LOGARITHMS = _INFINITE_AT_ZERO | {torch.ops.aten.log1p.default}


def _pole(op: DraftOp) -> tuple[Node | None, str]:
    """The argument at whose zero an op is infinite, and what it is called."""
    node = op.node
    if node.target in _INFINITE_AT_ZERO:
        return cast(Node, node.args[0]), "the argument of a logarithm"
    if op.rule in (RECIPROCAL, RSQRT):
        return cast(Node, node.args[0]), "a divisor"
    if _exponent(node) < 0:
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


def _guarding(op: DraftOp | None, ops: Drafts) -> list[DraftOp]:
    """An op, and one before it, if integers would round away what they keep away from zero."""
    if op is None or op.scheme is None:
        return []
    if _guards(op):
        return [op]
    bound = _bound_that_leaves_little(op, ops)
    return [] if bound is None else [op, bound]


def _bound_that_leaves_little(op: DraftOp, ops: Drafts) -> DraftOp | None:
    """The clamp of ``p`` whose end next to a number is all that keeps ``1 - p`` away from zero."""
    if op.match is None or op.decision.explicit:
        return None
    sources = [ops.computed_by(tensor) for tensor in op.match.inputs if not is_constant(tensor)]
    near = (source for source in sources if source and leaves_little(op.node, source.output))
    return next(near, None)


def _guards(op: DraftOp) -> bool:
    """Whether an op keeps its result away from zero."""
    if op.decision.explicit:
        return False
    # Of a clamp of its own, or of one that is fused.
    return bounds_of(op.output)[0] > 0 or adds_epsilon(op.node)


def _leave_guard(op: DraftOp, what: str) -> None:
    if op.scheme is not None:
        op.leave(f"it keeps {what} away from zero, to which integers would round it")
