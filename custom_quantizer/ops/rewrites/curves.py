"""Functions of one tensor that a model writes out, as the op that computes them.

``0.5 * x * (1 + erf(x / sqrt(2)))`` is a gelu, however its products are ordered: one table on
integers, where its seven ops would round seven times. Whether a product is one is asked of numbers,
not of spellings: the ops between it and one tensor are run in float64 on a grid, and compared with
the functions that have an op. Last bits of float32 differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    constant_of,
    is_constant,
    is_float32,
    is_same_shape,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.movement import is_identity

__all__ = ["CURVES"]

aten = torch.ops.aten

_MOST_STEPS = 16
"""Calls that a function may be written with; known spellings have three to nine."""

_GRID = torch.linspace(-12.0, 12.0, 97, dtype=torch.float64)
"""Beyond it, the functions are constant or linear."""

_NEAR = 1e-7
"""How far off: constants such as the root of 2 / pi are written with ten digits, or in float32."""

_BENDS = frozenset(
    {
        *(aten.clamp.default, aten.erf.default, aten.hardsigmoid.default, aten.hardtanh.default),
        *(aten.exp.default, aten.relu6.default, aten.sigmoid.default, aten.tanh.default),
    }
)
"""Each spelling of a function has one of these."""

_STEPS = _BENDS | {
    *(aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.neg.default),
    *(aten.log.default, aten.log1p.default, aten.softplus.default, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.rsub.Scalar, aten.square.default),
}
"""Ops that a function may consist of."""

_KNOWN: tuple[tuple[Callable[[Tensor], Tensor], Any, Mapping[str, Any]], ...] = (
    (F.gelu, aten.gelu.default, {}),
    (lambda x: F.gelu(x, approximate="tanh"), aten.gelu.default, {"approximate": "tanh"}),
    (F.hardswish, aten.hardswish.default, {}),
    (F.hardsigmoid, aten.hardsigmoid.default, {}),
    (F.silu, aten.silu.default, {}),
    (F.mish, aten.mish.default, {}),
    (torch.sigmoid, aten.sigmoid.default, {}),
    (torch.tanh, aten.tanh.default, {}),
)


def _curve(insert: Insertion) -> Node | None:
    """The op that a product or quotient is, if there is one."""
    node = insert.node
    steps = _steps_to(node)
    if not any(step.target in _BENDS for step in steps):
        return None
    for source in _sources(node, steps):
        values = _values(insert, node, source)
        if values is None:
            continue
        for function, target, options in _KNOWN:
            wanted = function(_GRID)
            if bool(((values - wanted).abs() <= _NEAR * (1 + wanted.abs())).all()):
                _drop_checks(steps)
                return insert.call(target, source, **options)
    return None


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
    return (node.target in _STEPS or is_identity(node)) and overwritten_by(node) is None


def _sources(node: Node, steps: Mapping[Node, None]) -> Iterator[Node]:
    """Float32 tensors of the shape of the result that steps read."""
    for source in dict.fromkeys(part for step in steps for part in step.all_input_nodes):
        if not is_float32(source) or is_constant(source):
            continue
        if is_same_shape(shape_of(source), shape_of(node)):
            yield source


def _values(insert: Insertion, node: Node, source: Node) -> Tensor | None:
    """What ``node`` is on the grid if it is a function of ``source`` and numbers."""
    known: dict[Node, Tensor | None] = {source: _GRID}

    def value(step: Node, depth: int) -> Tensor | None:
        if step not in known:
            known[step] = compute(step, depth)
        return known[step]

    def compute(step: Node, depth: int) -> Tensor | None:
        if is_constant(step):
            meta = tensor_meta(step)
            one = meta is not None and meta.numel() == 1 and meta.is_floating_point()
            return constant_of(insert.model, step).double().reshape(()) if one else None
        if depth == _MOST_STEPS or not _is_step(step):
            return None
        made = {part: value(part, depth + 1) for part in step.all_input_nodes}
        if any(part is None for part in made.values()):
            return None
        if is_identity(step):
            return made[cast(Node, step.args[0])]
        args, kwargs = cast(
            "tuple[Any, dict[str, Any]]",
            torch.fx.node.map_arg((step.args, step.kwargs), made.__getitem__),
        )
        return cast("Callable[..., Tensor]", step.target)(*args, **kwargs)

    return value(node, 0)


CURVES: Mapping[Any, Rewrite] = MappingProxyType(
    dict.fromkeys((aten.div.Tensor, aten.mul.Tensor, aten.reciprocal.default), _curve)
)
"""By overload."""
