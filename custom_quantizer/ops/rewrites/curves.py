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
    for source, steps in _sources(insert.node):
        if not any(step.target in _BENDS for step in steps):
            continue
        values = _values(insert, source, steps)
        if values is None:
            return None
        for wanted, build in chain(_KNOWN, _fitted(values)):
            near = (values - wanted).abs() <= _NEAR * (1 + wanted.abs())
            near &= (wanted != 0) | (values == 0)  # 1e-12 keeps a divisor away from zero
            if bool((near | _overflows(values, wanted)).all()):
                _drop_checks(steps)
                return build(insert, source)
    return None


def _sources(node: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Each tensor that ``node`` is a function of, and of constants, nearest first.

    With it the steps between, the last one first; at least two of them compute something.
    """
    steps, ahead = list[Node](), {node}
    while ahead:
        last = max(ahead)
        if len(ahead) == 1 and _several(steps) and _is_alike(last, node):
            yield last, steps
        if len(steps) == _MOST_STEPS or not _is_step(last):
            return
        ahead.remove(last)
        ahead.update(part for part in last.all_input_nodes if not is_constant(part))
        steps.append(last)


def _several(steps: list[Node]) -> bool:
    return sum(not passes_on(step) for step in steps) > 1


def _is_alike(source: Node, node: Node) -> bool:
    return is_float32(source) and is_same_shape(shape_of(source), shape_of(node))


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


def _is_step(node: Node) -> bool:
    return (node.target in _STEPS or passes_on(node)) and overwritten_by(node) is None


def _values(insert: Insertion, source: Node, steps: list[Node]) -> Tensor | None:
    """What the last step is on the grid; ``None``: some constant is more than a number."""
    known: dict[Node, Tensor] = {source: _GRID}
    for step in reversed(steps):
        for part in step.all_input_nodes:
            if part not in known:
                meta = tensor_meta(part)
                floats = meta is not None and meta.is_floating_point()
                number = insert.number_beside(part, insert.node) if floats else None
                if number is None:
                    return None
                known[part] = torch.tensor(number, dtype=torch.float64)
        if passes_on(step):
            known[step] = known[cast(Node, step.args[0])]
            continue
        args, kwargs = cast(
            "tuple[Any, dict[str, Any]]",
            torch.fx.node.map_arg((step.args, step.kwargs), known.__getitem__),
        )
        known[step] = cast("Callable[..., Tensor]", step.target)(*args, **kwargs)
    return known[insert.node]


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
