"""Comparisons whose results are read as numbers, in float ops that the delegate has.

``a > b`` is 1 where ``a - b``, cut at 0 and 1, is not 0: a difference of float32 numbers is 0 only
if they are equal, or if it is smaller than normal numbers are. ``and``, ``or`` and ``not`` are
products, maxima and what 1 has more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from custom_quantizer.backends.xnnpack.kernels import chooses_in_steps, refuses_tensor
from custom_quantizer.backends.xnnpack.passes._pass import (
    Numbers,
    Steps,
    calls,
    graph_pass,
    in_steps,
    replace,
)
from custom_quantizer.core.arithmetic import round_to_float32
from custom_quantizer.core.graph import (
    constant_of,
    effective_users,
    is_constant,
    is_dequantize,
    is_float32,
    is_number,
    is_whole,
    tensor_meta,
)
from custom_quantizer.ops.elementwise import WHERE
from custom_quantizer.ops.movement import EXPAND, PERMUTE, RESHAPE, SELECT, SLICE

aten = torch.ops.aten

_LEAST = 2.0**-100
"""Next to larger numbers, differences are 0 or normal numbers."""


@graph_pass(
    "comparisons that are read as numbers; softshrink, hardshrink, threshold",
    "steps of float with the same values",
)
def comparisons_in_steps(model: GraphModule) -> int:
    """Those of float32 with each other and with finite numbers, and masks made of them.

    Who reads them as what is true or false still does.
    """
    return _masks_to_numbers(model) + in_steps(model, SHRINKS)


def _masks_to_numbers(model: GraphModule) -> int:
    """Each mask is computed once, where it stands."""
    masks = calls(model, _MASKS)
    able = _able(masks)
    readers = [n for n in calls(model, _READERS) if _reads_number(n)]
    wanted = able.intersection(reader.args[0] for reader in readers)
    for mask in reversed(masks):
        if mask in wanted and mask.target not in _COMPARISONS:
            wanted.update(_sources(mask))
    numbers: dict[Any, Node] = {}
    for mask in masks:
        if mask in wanted:
            build, parts = Numbers(model, mask), [numbers.get(part) for part in _sources(mask)]
            if mask.target in _COMPARISONS:
                numbers[mask] = _COMPARISONS[mask.target](build, _difference(build, mask))
            elif mask.target in _LOGIC:
                numbers[mask] = _LOGIC[mask.target](build, *parts)
            else:
                numbers[mask] = build.call(mask.target, *parts, *mask.args[1:], **mask.kwargs)
    readers = [reader for reader in readers if reader.args[0] in numbers]
    for reader in readers:
        replace(reader, numbers[reader.args[0]])
    return len(readers)


def read_as_numbers(graph: Graph) -> set[Node]:
    """Comparisons, and what joins some, that are computed in steps for all who read them.

    So are conversions of them. Integers that are compared are converted outside.
    """
    masks = [node for node in graph.nodes if node.target in _MASKS and _is_mask(node)]
    able, found = _able(masks), set[Node]()
    for mask in reversed(masks):
        if mask in able and all(
            user in found
            or _reads_number(user)
            or (user.target in WHERE.targets and chooses_in_steps(user))
            for user in effective_users(mask)
        ):
            found.add(mask)
    found -= {m for m in masks if m.target in _COMPARISONS and _are_integers(m.args[0])}
    return found | {user for mask in able for user in mask.users if _reads_number(user)}


def _able(masks: Sequence[Node]) -> set[Any]:
    """Those that are made of comparisons that have steps."""
    able: set[Any] = set()
    for mask in masks:
        joins = mask.target not in _COMPARISONS and able.issuperset(_sources(mask))
        if joins or _is_comparison(mask):
            able.add(mask)
    return able


def _is_mask(value: Any) -> bool:
    meta = tensor_meta(value) if isinstance(value, Node) else None
    return meta is not None and meta.dtype == torch.bool


def _reads_number(user: Node) -> bool:
    return user.target in _READERS and is_float32(user)


def _sources(mask: Node) -> Sequence[Any]:
    """What a mask is made of."""
    return mask.args[:1] if mask.target in _MOVES else mask.args[:2]


def _is_comparison(node: Node) -> bool:
    """Of two tensors of the delegate, or of one and a number."""
    left, right = node.args[:2] if node.target in _COMPARISONS else (None, None)
    if _are_integers(left):
        return isinstance(right, int) and abs(right) < _MOST
    if left is right or not _is_in_delegate(left):
        return False  # compared with itself, it is asked whether it is a number
    if isinstance(right, Node):
        return is_number(right) or _is_in_delegate(right)
    return _comparable(right) is not None


def _are_integers(value: Any) -> bool:
    """Whether it is a tensor of integers or masks that becomes numbers before the delegate."""
    return is_whole(value) and not refuses_tensor(value)


_MOST = 2**24
"""Below it, rounding others to float32 leaves them above, below or equal as they were."""


def _is_in_delegate(value: Any) -> bool:
    """Whether it is a float32 tensor that XNNPACK takes; a constant has to be finite."""
    if not isinstance(value, Node) or not is_float32(value) or refuses_tensor(value):
        return False
    if not is_constant(value) or value.op != "get_attr":
        return True
    model = cast(GraphModule, value.graph.owning_module)
    return bool(constant_of(model, value).isfinite().all())


def _difference(build: Numbers, comparison: Node) -> Node:
    """``left - right`` of two tensors, or of one and a number."""
    left, right = cast(Node, comparison.args[0]), comparison.args[1]
    if _are_integers(left):
        left = build.call(aten.to.dtype, left, torch.float32)
    if not isinstance(right, Node):
        number = cast(float, _comparable(right))
        return build.call(aten.sub.Tensor, left, build.number(number)) if number else left
    if is_number(right):
        return build.call(aten.sub.Tensor, left, build.tensor(right))
    return build.call(aten.sub.Tensor, _finite(build, left), _finite(build, right))


def _comparable(number: Any) -> float | None:
    """A number in float32 from which others differ by normal numbers, if at all."""
    if isinstance(number, Node):
        return None
    rounded = round_to_float32(float(number))
    return rounded if rounded == 0.0 or _LEAST < abs(rounded) < math.inf else None


def _finite(build: Numbers, tensor: Node) -> Node:
    """Infinities are equal to themselves."""
    if is_constant(tensor) or is_dequantize(tensor):
        return tensor
    return build.finite(tensor)


def _below(build: Numbers, difference: Node) -> Node:
    return build.call(aten.neg.default, build.below_zero(difference))


def _unequal(build: Numbers, difference: Node) -> Node:
    return build.above_zero(build.call(aten.abs.default, difference))


def _not(build: Numbers, numbers: Node) -> Node:
    return build.call(aten.sub.Tensor, build.number(1.0), numbers)


def _xor(build: Numbers, left: Node, right: Node) -> Node:
    return build.call(aten.abs.default, build.call(aten.sub.Tensor, left, right))


def _of(target: Any) -> Callable[..., Node]:
    return lambda build, left, right: build.call(target, left, right)


_Comparison = Callable[[Numbers, Node], Node]


def _lacks(steps: _Comparison) -> _Comparison:
    return lambda build, difference: _not(build, steps(build, difference))


_COMPARISONS: Mapping[Any, _Comparison] = {
    overload: steps
    for packet, steps in (
        (aten.gt, Numbers.above_zero),
        (aten.lt, _below),
        (aten.ne, _unequal),
        (aten.le, _lacks(Numbers.above_zero)),
        (aten.ge, _lacks(_below)),
        (aten.eq, _lacks(_unequal)),
    )
    for overload in (packet.Scalar, packet.Tensor)
}

_LOGIC: Mapping[Any, Callable[..., Node]] = {
    **dict.fromkeys(
        (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor),
        _of(aten.mul.Tensor),
    ),
    **dict.fromkeys(
        (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor),
        _of(aten.maximum.default),
    ),
    **dict.fromkeys((aten.logical_xor.default, aten.bitwise_xor.Tensor, aten.__xor__.Tensor), _xor),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _not),
}

_MOVES = RESHAPE.targets | PERMUTE.targets | SLICE.targets | SELECT.targets | EXPAND.targets

_MASKS = frozenset({*_COMPARISONS, *_LOGIC, *_MOVES})

_READERS = frozenset({aten.to.dtype})
"""Ops to which what is true is 1: conversions, also those of masks that meet floats."""


def _bound(lambd: Any) -> float | None:
    bound = _comparable(lambd)
    return bound if bound is not None and bound > 0.0 else None


def _softshrink(build: Numbers, x: Node, lambd: Any = 0.5) -> Node | None:
    """``x`` without what lies between the bounds."""
    bound = _bound(lambd)
    if bound is None:
        return None
    return build.call(aten.sub.Tensor, x, build.call(aten.hardtanh.default, x, -bound, bound))


def _hardshrink(build: Numbers, x: Node, lambd: Any = 0.5) -> Node | None:
    bound = _bound(lambd)
    if bound is None:
        return None
    size = build.call(aten.abs.default, x)
    beyond = build.call(aten.sub.Tensor, size, build.number(bound))
    return build.call(aten.mul.Tensor, x, build.above_zero(beyond))


def _threshold(build: Numbers, x: Node, threshold: Any, value: Any) -> Node | None:
    bound = _comparable(threshold)
    if bound is None or isinstance(value, Node):
        return None
    value = round_to_float32(float(value))
    if not math.isfinite(value):
        return None
    above = build.above_zero(build.call(aten.sub.Tensor, x, build.number(bound)))
    # Zero times minus infinity is none.
    kept = build.call(aten.maximum.default, x, build.number(bound))
    kept = build.call(aten.mul.Tensor, kept, above)
    if value == 0.0:
        return kept
    return build.call(aten.add.Tensor, kept, build.times(_not(build, above), value))


SHRINKS: Steps = {
    aten.hardshrink.default: _hardshrink,
    aten.softshrink.default: _softshrink,
    aten.threshold.default: _threshold,
}
"""Ops that keep what is large."""
