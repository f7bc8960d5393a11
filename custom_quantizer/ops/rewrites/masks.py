"""Masks in sums and products: what is left out by a condition is computed with numbers.

No integer kernel chooses between two values. A mask that is known when the model is captured is a
constant to multiply with or to add; one that is an input becomes numbers once, for all layers that
share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    argument,
    constant_of,
    effective_users,
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by, reached
from custom_quantizer.core.rewriting import IN_FLOAT, Insertion, Rewrite
from custom_quantizer.ops import match_of, rule_of
from custom_quantizer.ops.functions import DIV
from custom_quantizer.ops.movement import EXPAND, IDENTITY, PERMUTE, RESHAPE, SLICE
from custom_quantizer.ops.rewrites.constants import reads_values
from custom_quantizer.ops.values import (
    SUMS,
    Holds,
    asks_what_is_finite,
    values_of,
    where_held,
)

__all__ = ["CONDITIONS", "MASKED", "MASKS", "added_mask", "attended", "is_finite"]

aten = torch.ops.aten

MASKED = -1e9
"""Added to scores that a mask leaves out, in place of minus infinity.

``exp`` of it is 0 in float32, as that of minus infinity is, but ``-inf - (-inf)`` is no number: the
softmax kernels subtract the largest score first. A row that is masked out completely
becomes uniform instead of NaN; :func:`attended` finds those of attention.
"""

_LARGE = -6e8
"""The same for large finite numbers: a row of them is uniform, in float and here.

Float32 numbers are as far apart here as at :data:`MASKED`.
"""

_NOTHING = -8e8
"""A row of a mask that has no number above attends to nothing."""

_LEFT_OUT = -1e4
"""From here on a score is taken to be masked out: exp of it is 0 next to any score of a network."""

_OF_POSITIVE = frozenset(
    {
        aten.log.default,
        aten.log10.default,
        aten.log2.default,
        aten.rsqrt.default,
        aten.sqrt.default,
    }
)
"""Functions of numbers that are not negative."""

_SHARED = "custom_quantizer_mask"
"""Marks, in ``meta``, what was made of a mask: it stands before all others who read that mask."""

_ENDLESS = "custom_quantizer_endless_mask"
"""Marks, in ``meta``, what holds :data:`MASKED` where a mask leaves something out."""


def added_mask(insert: Insertion, mask: Node) -> Node:
    """A mask of attention as numbers to add to scores; minus infinity becomes :data:`MASKED`."""
    if is_constant(mask):
        value = constant_of(insert.model, mask)
        if value.dtype == torch.bool:
            value = torch.zeros(value.shape).masked_fill(~value, -math.inf)
        elif bool((value > _NOTHING).all()):
            return mask
        return insert.constant("mask", _finite(value))
    if cast(Tensor, tensor_meta(mask)).dtype == torch.bool:
        return _left_out(insert, mask, MASKED, where=False)
    if _is_finite_mask(insert, mask):
        return mask
    large = _in_float(_once(insert, mask, aten.clamp_min.default, mask, _LARGE))
    # Below 0 if it was minus infinity: no other number and the largest make less.
    rest = _once(insert, mask, aten.add.Tensor, mask, torch.finfo(torch.float32).max)
    rest = _once(insert, _in_float(rest), aten.clamp.default, rest, MASKED - _LARGE, 0.0)
    return _endless(_once(insert, large, aten.add.Tensor, large, _in_float(rest)))


def attended(insert: Insertion, mask: Node) -> Node | None:
    """1 for what rows attend to, 0 for the others of rows that attend to nothing, if there may be.

    ``scaled_dot_product_attention`` gives 0 for such a row, of which a softmax makes equal weights.
    What other rows leave out has weights of 0 already.

    Args:
        insert: where calls are made.
        mask: what :func:`added_mask` gave.
    """
    nodes = reached(mask, _terms)
    terms = [node for node in nodes if _leaves_out(insert, node)]
    if not terms:
        return None
    moved = any(node.target in _MOVES for node in nodes)
    if len(terms) == 1 and is_constant(terms[0]) and not moved:
        rows = (constant_of(insert.model, terms[0]) > _NOTHING).any(-1, keepdim=True)
        if bool(rows.all()):
            return None
        if mask is terms[0]:
            return insert.constant("attended", rows.float())
    above = _in_float(_once(insert, mask, aten.sub.Tensor, mask, _NOTHING))
    return _in_float(_once(insert, above, aten.clamp.default, above, 0.0, 1.0))


def _leaves_out(insert: Insertion, term: Node) -> bool:
    """Whether a term of a mask holds :data:`MASKED`."""
    if is_constant(term):
        return bool((constant_of(insert.model, term) <= _NOTHING).any())
    return _ENDLESS in term.meta


def _terms(node: Node) -> list[Node]:
    """What a mask is a sum of."""
    return node.all_input_nodes if node.target in _MOVES | {aten.add.Tensor} else []


def _finite(mask: Tensor) -> Tensor:
    """A mask without infinities."""
    return torch.where(mask == -math.inf, MASKED, mask.clamp(min=_LARGE))


def _is_finite_mask(insert: Insertion, mask: Node) -> bool:
    """Whether a mask is a sum of numbers, layers, clamps, and what was made of masks here."""

    def finite(node: Node) -> bool:
        if is_constant(node):
            return bool(torch.isfinite(constant_of(insert.model, node)).all())
        known = _SHARED in node.meta or node.target is aten.clamp_min.default
        return known or rule_of(node) in SUMS or bool(_terms(node))

    return all(map(finite, reached(mask, _terms)))


def _left_out(insert: Insertion, condition: Node, number: float, *, where: bool) -> Node:
    """A number where a condition is ``where``, else 0."""
    numbers = _numbers(insert, condition, where=where)
    left_out = _in_float(_once(insert, numbers, aten.mul.Tensor, numbers, number))
    return _endless(left_out) if number == MASKED else left_out


def _endless(mask: Node) -> Node:
    mask.meta[_ENDLESS] = True
    return _in_float(mask)


def _in_float(part: Node) -> Node:
    part.meta[IN_FLOAT] = "it makes a mask, in which no scale can show both terms"
    return part


def _numbers(insert: Insertion, condition: Node, *, where: bool) -> Node:
    """1 where a condition is ``where``, else 0."""
    numbers = _once(insert, condition, aten.to.dtype, condition, torch.float32)
    return numbers if where else _once(insert, numbers, aten.rsub.Scalar, numbers, 1)


def _once(insert: Insertion, source: Node, target: Any, *args: Any) -> Node:
    """A call that all layers that share a mask share."""
    shared = source.users if overwritten_by(source) is None else ()
    for user in shared:
        if _SHARED in user.meta and user.target is target and user.args == args:
            return user
    call = insert.call(target, *args)
    call.meta[_SHARED] = True
    return call


def _softmax(insert: Insertion) -> Node | None:
    """Constant minus infinity before a softmax becomes :data:`MASKED`: see there."""
    added = insert.node.args[0]
    if not isinstance(added, Node) or added.target is not aten.add.Tensor:
        return None
    terms = list(added.args[:2])
    for position, term in enumerate(terms):
        if isinstance(term, Node) and is_constant(term):
            value = constant_of(insert.model, term)
            if value.is_floating_point() and bool((value == -math.inf).any()):
                finite = Insertion(insert.model, added).constant("mask", _finite(value))
                terms[position] = finite
    if terms == list(added.args[:2]):
        return None
    if effective_users(added) == [insert.node]:
        added.args = tuple(terms)
        return None
    # Others read minus infinity.
    scores = insert.call(aten.add.Tensor, *terms, **added.kwargs)
    return insert.call(insert.node.target, scores, *insert.node.args[1:], **insert.node.kwargs)


def _masked_sum(insert: Insertion) -> Node | None:
    """A mask that is captured and one that is given, added before attention adds both to scores.

    Minus infinity becomes :data:`MASKED` in each of them: a clamp of their sum would have it taken
    for integers, of which one scale cannot show biases beside it.
    """
    node = insert.node
    terms = [term for term in node.args[:2] if isinstance(term, Node)]
    if node.kwargs or len(terms) < 2 or not any(map(is_constant, terms)):
        return None
    endless = [_may_be_endless(insert, term) for term in terms]
    if not any(endless) or not _only_softmax_reads(node):
        return None
    finite = [
        added_mask(insert, term) if be else term for term, be in zip(terms, endless, strict=True)
    ]
    return insert.call(aten.add.Tensor, *finite)


def _of_truths(insert: Insertion) -> Node | None:
    """A product of truth values is true where both are, a sum where any is."""
    sides, to_logic = insert.node.args[:2], _LOGIC[cast(Any, insert.node.target)]
    kinds = [tensor_meta(side) if isinstance(side, Node) else None for side in sides]
    if insert.node.kwargs or any(kind is None or kind.dtype != torch.bool for kind in kinds):
        return None
    return insert.call(to_logic, *sides)


_LOGIC = {
    aten.add.Tensor: aten.logical_or.default,
    aten.mul.Tensor: aten.logical_and.default,
}


def _may_be_endless(insert: Insertion, term: Node) -> bool:
    """Whether a mask has minus infinity, or is given and may have it."""
    meta = tensor_meta(term)
    if meta is None or not meta.is_floating_point():
        return False
    if is_constant(term):
        return bool((constant_of(insert.model, term) == -math.inf).any())
    while term.target in _MOVES:
        term = cast(Node, term.args[0])
    return term.op == "placeholder"


def _masked_fill(insert: Insertion) -> Node | None:
    data, condition, value = cast("tuple[Node, Node, Any]", insert.node.args[:3])
    return _chosen(insert, condition, value, data)


def _where(insert: Insertion) -> Node | None:
    condition, left, right = insert.node.args[:3]
    return _chosen(insert, cast(Node, condition), left, right)


def _chosen(insert: Insertion, condition: Node, left: Any, right: Any) -> Node | None:
    """``left`` where a condition holds, else ``right``, by sums and products.

    Both are multiplied by 0 where they are not wanted, so they must be finite there; what need not
    be is a ``where`` of tensors.
    """
    kind = tensor_meta(condition)
    if not is_float32(insert.node) or kind is None or kind.dtype != torch.bool:
        return None
    left, right = (_number(insert, side) for side in (left, right))
    for data, number, where in ((right, left, True), (left, right, False)):
        if isinstance(data, Node) and isinstance(number, float) and number <= _LEFT_OUT:
            masked = MASKED if number == -math.inf else _LARGE
            scores = _without(insert, data, condition, masked, where=where)
            return scores or _of_tensors(insert, condition, left, right)
    sides = (left, right)
    if _keeps_finite(insert, condition, sides):
        return _of_tensors(insert, condition, left, right)
    given = insert.training and not is_constant(condition)
    if given or asks_what_is_finite(condition) or not all(_is_small(insert, s) for s in sides):
        return _of_tensors(insert, condition, left, right)
    wanted = [_part(insert, condition, left, where=True)]
    wanted.append(_part(insert, condition, right, where=False))
    parts = [part for part in wanted if part is not None]
    if not parts:
        return None
    total = parts[0] if len(parts) == 1 else insert.call(aten.add.Tensor, *parts)
    return total if is_same_shape(shape_of(total), shape_of(insert.node)) else None


def _keeps_finite(insert: Insertion, condition: Node, sides: tuple[Any, ...]) -> bool:
    """Whether a choice keeps a divisor from zero, or an argument from being negative.

    ``n / where(d != 0, d, 1)``, ``log(where(x > 0, x, 1))``. Integers of it could be zero, and of
    its sums and products nobody would know that they are positive.
    """
    readers = effective_users(insert.node)
    divides = any(rule_of(user) is DIV and user.args[1] is insert.node for user in readers)
    roots = any(user.target in _OF_POSITIVE for user in readers)
    held_sides = [
        where_held(values_of(insert.model, side), condition, side, held=held)
        for side, held in zip(sides, (True, False), strict=True)
        if isinstance(side, Node)
    ]
    return any(
        (divides and values.is_never_zero) or (roots and values.low >= 0) for values in held_sides
    )


def _is_small(insert: Insertion, side: Any) -> bool:
    """Whether 0 times a side is 0, and the integers of others still show beside a number."""
    return is_finite(insert, side) if isinstance(side, Node) else abs(side) < -_LEFT_OUT


def _of_tensors(insert: Insertion, condition: Node, left: Any, right: Any) -> Node | None:
    """The family's form of a choice, as the graph has one op for all of them then."""
    numbers = {"left": left, "right": right}
    if insert.node.target is aten.where.self and (left, right) == insert.node.args[1:]:
        return None
    tensors = [
        side if isinstance(side, Node) else insert.constant(name, torch.tensor(side))
        for name, side in numbers.items()
    ]
    return insert.call(aten.where.self, condition, *tensors)


def _masked_exp(insert: Insertion) -> Node | None:
    """What a mask leaves out before an exponential is 0 behind it, and 0 times anything before."""
    where = insert.node.args[0]
    if not isinstance(where, Node) or where.target is not aten.where.self or overwritten_by(where):
        return None
    condition, filled, data = cast("tuple[Node, Node, Node]", where.args)
    number = _number(insert, filled)
    if not is_float32(data) or not isinstance(number, float):
        return None
    if not number <= _LEFT_OUT or not is_finite(insert, data) or asks_what_is_finite(condition):
        return None
    if insert.training and not is_constant(condition):
        return None
    kept = cast(Node, _part(insert, condition, data, where=False))
    result = insert.call(aten.exp.default, kept)
    return _part(insert, condition, result, where=False)


def _without(
    insert: Insertion, data: Node, condition: Node, number: float, *, where: bool
) -> Node | None:
    """Scores before a softmax, a number added to those that a condition names."""
    if not _only_softmax_reads(insert.node):
        return None
    if not is_constant(condition):
        mask = _left_out(insert, condition, number, where=where)
    else:
        value = constant_of(insert.model, condition)
        out = value if where else ~value
        mask = insert.constant("mask", torch.zeros(out.shape).masked_fill(out, number))
    zeros = data.target in _ZEROS and overwritten_by(data) is None
    if zeros and is_same_shape(shape_of(mask), shape_of(insert.node)):
        return mask
    total = insert.call(aten.add.Tensor, data, mask)
    return total if is_same_shape(shape_of(total), shape_of(insert.node)) else None


_ZEROS = frozenset({aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default})

_MOVES = frozenset(
    {
        *RESHAPE.targets,
        *PERMUTE.targets,
        *SLICE.targets,
        *EXPAND.targets,
        *(aten.clone.default, aten.contiguous.default, aten.mT.default),
    }
)


def _only_softmax_reads(node: Node) -> bool:
    """Whether a tensor ends in scores that a softmax reads, or is moved and added on the way."""
    if not effective_users(node):
        return False
    waiting, seen = [node], {node}
    while waiting:
        source = waiting.pop()
        for user in effective_users(source):
            if not reads_values(user, source):
                continue
            if user.target in (aten.softmax.int, aten._softmax.default):
                continue
            if user.target is aten.scaled_dot_product_attention.default:
                if argument(user, 3, "attn_mask") is not source or source in user.args[:3]:
                    return False
            elif not _hands_on(user, source) or not effective_users(user):
                return False
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return True


def _hands_on(user: Node, source: Node) -> bool:
    """Whether a call moves a tensor, or adds another one to it."""
    if user.target is aten.baddbmm.default:
        return user.args[0] is source and source not in user.args[1:3] and not user.kwargs
    if user.target in _MOVES or (user.target is aten.add.Tensor and not user.kwargs):
        return True
    match = match_of(user)  # ``.float()`` of what is float32, a dropout in evaluation
    return match is not None and match.rule is IDENTITY


def _number(insert: Insertion, side: Any) -> Any:
    """A number, also if it was written as a tensor."""
    if isinstance(side, Node) and is_constant(side) and side.op == "get_attr":
        value = constant_of(insert.model, side)
        return float(value) if value.numel() == 1 and value.is_floating_point() else side
    return side if isinstance(side, Node) else float(side)


def _part(insert: Insertion, condition: Node, side: Any, *, where: bool) -> Node | None:
    """One side where it is wanted, else 0; ``None``: it is 0 everywhere."""
    if side == 0.0:
        return None
    if is_constant(condition):
        value = constant_of(insert.model, condition)
        numbers = (value if where else ~value).to(torch.float32)
        if isinstance(side, float):
            return insert.constant("filled" if where else "filled_else", numbers * side)
        kept = insert.constant("kept" if where else "kept_else", numbers)
        return insert.call(aten.mul.Tensor, side, kept)
    ones = _numbers(insert, condition, where=where)
    factors = (ones, side) if isinstance(side, float) else (side, ones)
    return insert.call(aten.mul.Tensor, *factors)


def is_finite(insert: Insertion, side: Node) -> bool:
    """Whether a tensor holds nothing but finite numbers."""
    return values_of(insert.model, side).holds is Holds.FINITE


MASKS: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten.add.Tensor: _masked_sum,
        aten.exp.default: _masked_exp,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.softmax.int: _softmax,
        aten.where.Scalar: _where,
        aten.where.ScalarOther: _where,
        aten.where.ScalarSelf: _where,
        aten.where.self: _where,
    }
)
"""By overload."""

CONDITIONS: Mapping[Any, Rewrite] = MappingProxyType(dict.fromkeys(_LOGIC, _of_truths))
"""By overload, of truth values."""
