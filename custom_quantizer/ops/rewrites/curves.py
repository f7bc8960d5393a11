"""Functions of one tensor that a model writes out, as the op that computes them.

``0.5 * x * (1 + erf(x / sqrt(2)))`` is a gelu, however its products are ordered: one table on
integers, where its seven ops would round seven times; ``where(x > 0, x, 0)`` is a relu, which is
part of the layer before it. Whether a call is one is asked of numbers, not of spellings: the ops
between it and one tensor are run in float64 on a grid, and compared with the functions that have an
op. Last bits of float32 differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.movement import passes_on
from custom_quantizer.ops.rewrites.arithmetic import ARITHMETIC

__all__ = ["CURVES"]

aten = torch.ops.aten

_MOST_STEPS = 16
"""Calls that a function may be written with; known spellings have three to nine."""

_FAR = 2.0**120

_POWERS = 2.0 ** torch.arange(-20.0, 121.0, dtype=torch.float64)

_GRID = torch.cat([torch.linspace(-12.0, 12.0, 97, dtype=torch.float64), _POWERS, -_POWERS])
"""Where functions are compared: where they bend, close to 0, and far out."""

_NEAR = 1e-7
"""How far off: constants such as the root of 2 / pi are written with ten digits, or in float32."""

_BENDS = frozenset(
    {
        *(aten.abs.default, aten.clamp.default, aten.elu.default, aten.erf.default),
        *(aten.exp.default, aten.expm1.default, aten.hardsigmoid.default, aten.hardtanh.default),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.max.other, aten.maximum.default),
        *(aten.min.other, aten.minimum.default, aten.relu.default, aten.relu6.default),
        *(aten.ge.Scalar, aten.ge.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.le.Scalar),
        *(aten.le.Tensor, aten.lt.Scalar, aten.lt.Tensor, aten.sigmoid.default, aten.tanh.default),
    }
)
"""Each spelling of a function has one of these."""

_STEPS = _BENDS | {
    *(aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.neg.default),
    *(aten.log.default, aten.log1p.default, aten.softplus.default, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.rsub.Scalar, aten.square.default, aten.where.self),
    *(aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.zeros_like.default),
    *(aten.to.dtype, aten.logical_not.default, aten.bitwise_not.default),
}
"""Ops that a function may consist of."""

_Build = Callable[[Insertion, Node], Node]
"""Inserts the op of a function, called on a tensor."""


def _op(target: Any, *args: Any, **kwargs: Any) -> _Build:
    return lambda insert, x: insert.call(target, x, *args, **kwargs)


def _log_sigmoid(insert: Insertion, x: Node) -> Node:
    return insert.formed(ARITHMETIC[aten.log_sigmoid.default], aten.log_sigmoid.default, x)


_FUNCTIONS: tuple[tuple[Callable[[Tensor], Tensor], _Build], ...] = (
    (F.relu, _op(aten.relu.default)),
    (F.gelu, _op(aten.gelu.default)),
    (lambda x: F.gelu(x, approximate="tanh"), _op(aten.gelu.default, approximate="tanh")),
    (F.hardswish, _op(aten.hardswish.default)),
    (F.hardsigmoid, _op(aten.hardsigmoid.default)),
    (F.silu, _op(aten.silu.default)),
    (F.mish, _op(aten.mish.default)),
    (torch.sigmoid, _op(aten.sigmoid.default)),
    (torch.tanh, _op(aten.tanh.default)),
    (torch.abs, _op(aten.abs.default)),
    (F.softplus, _op(aten.softplus.default)),
    (F.logsigmoid, _log_sigmoid),
)

_KNOWN = tuple((function(_GRID), build) for function, build in _FUNCTIONS)
"""Their values on the grid, and the ops."""


def _fitted(values: Tensor) -> Iterator[tuple[Tensor, _Build]]:
    """Functions with a number, which is read off what is compared: their values, and their ops."""

    def at(x: float) -> float:
        return float(values[x == _GRID][0])

    lowest, below, above, highest = at(-_FAR), at(-1.0), at(1.0), at(_FAR)
    if lowest < highest and (lowest, highest) != (-_FAR, _FAR):
        low, high = (None if abs(end) == _FAR else end for end in (lowest, highest))
        yield _GRID.clamp(low, high), _op(aten.clamp.default, low, high)
    if 0 < -below < 1:
        yield F.leaky_relu(_GRID, -below), _op(aten.leaky_relu.default, -below)
    if above > 0 > lowest:
        factors = -lowest / above, above
        yield aten.elu.default(_GRID, *factors), _op(aten.elu.default, *factors)
    if 0.5 < above < 1:
        # A silu on another scale, such as the quick gelu of CLIP.
        beta = math.log(above / (1 - above))

        def scaled_silu(insert: Insertion, x: Node) -> Node:
            gated = insert.call(aten.silu.default, insert.call(aten.mul.Tensor, x, beta))
            return insert.call(aten.mul.Tensor, gated, 1 / beta)

        yield _GRID * torch.sigmoid(beta * _GRID), scaled_silu


def _curve(insert: Insertion) -> Node | None:
    """The op that a call is, if there is one."""
    node = insert.node
    steps = _steps_to(node)
    if not any(step.target in _BENDS for step in steps):
        return None
    for source in _sources(node, steps):
        values = _values(insert, node, source)
        if values is None:
            continue
        for wanted, build in chain(_KNOWN, _fitted(values)):
            near = (values - wanted).abs() <= _NEAR * (1 + wanted.abs())
            near &= (wanted != 0) | (values == 0)  # 1e-12 keeps a divisor away from zero
            if bool((near | _overflows(values, wanted)).all()):
                _drop_checks(steps)
                return build(insert, source)
    return None


def _overflows(values: Tensor, wanted: Tensor) -> Tensor:
    """Where exp is too large: a tanh that is written out is no number, a softplus infinite."""
    infinite = values.isinf() & (wanted.sign() == values.sign()) & (wanted.abs() >= 64)
    return (_GRID.abs() >= 64) & (values.isnan() | infinite)


def _drop_checks(steps: Iterable[Node]) -> None:
    """Drop what asks for a step's dtype, as ``.float()`` does: it would keep the step alive."""
    for step in steps:
        for user in list(step.users):
            if user.target is aten._assert_tensor_metadata.default:
                user.graph.erase_node(user)


def _steps_to(node: Node) -> dict[Node, None]:
    """The node and the steps before it, nearest first."""
    found, waiting = {node: None}, [node]
    for step in waiting:
        for source in step.all_input_nodes:
            if source not in found and len(found) < _MOST_STEPS and _is_step(source):
                found[source] = None
                waiting.append(source)
    return found


def _is_step(node: Node) -> bool:
    return (node.target in _STEPS or passes_on(node)) and overwritten_by(node) is None


def _sources(node: Node, steps: Mapping[Node, None]) -> Iterator[Node]:
    """Float32 tensors of the shape of the result that steps read."""
    for source in dict.fromkeys(part for step in steps for part in step.all_input_nodes):
        if not is_float32(source) or is_constant(source):
            continue
        if is_same_shape(shape_of(source), shape_of(node)):
            yield source


def _values(insert: Insertion, node: Node, source: Node) -> Tensor | None:
    """What ``node`` is on the grid if several steps make a function of ``source`` and numbers."""
    known: dict[Node, Tensor | None] = {source: _GRID}

    def value(step: Node, depth: int) -> Tensor | None:
        if step not in known:
            known[step] = compute(step, depth)
        return known[step]

    def compute(step: Node, depth: int) -> Tensor | None:
        if is_constant(step):
            meta = tensor_meta(step)
            floats = meta is not None and meta.is_floating_point()
            number = insert.number_beside(step, node) if floats else None
            return None if number is None else torch.tensor(number, dtype=torch.float64)
        if depth == _MOST_STEPS or not _is_step(step):
            return None
        made = {part: value(part, depth + 1) for part in step.all_input_nodes}
        if any(part is None for part in made.values()):
            return None
        if passes_on(step):
            return made[cast(Node, step.args[0])]
        args, kwargs = cast(
            "tuple[Any, dict[str, Any]]",
            torch.fx.node.map_arg((step.args, step.kwargs), made.__getitem__),
        )
        return cast("Callable[..., Tensor]", step.target)(*args, **kwargs)

    result = value(node, 0)
    steps = [s for s in known if s is not source and s.op == "call_function" and not passes_on(s)]
    return result if len(steps) > 1 else None


CURVES: Mapping[Any, Rewrite] = MappingProxyType(
    dict.fromkeys(
        (
            *(aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor),
            *(aten.log.default, aten.log1p.default, aten.neg.default, aten.reciprocal.default),
            *(aten.clamp.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
            *(aten.max.other, aten.maximum.default, aten.min.other, aten.minimum.default),
            *(aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf),
        ),
        _curve,
    )
)
"""By overload."""
