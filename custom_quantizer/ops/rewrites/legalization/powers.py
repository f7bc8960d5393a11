"""Powers with exponents that PyTorch computes as other ops, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.rewrites.legalization._common import float_input

__all__ = ["power", "power_of_tensor", "square"]

aten = torch.ops.aten


def square(insert: Insertion) -> Node | None:
    """``x * x``."""
    data = float_input(insert)
    return None if data is None else insert.call(aten.mul.Tensor, data, data)


def _cube(insert: Insertion) -> Node | None:
    data, squared = float_input(insert), square(insert)
    return None if squared is None else insert.call(aten.mul.Tensor, squared, data)


def _function(target: Any) -> Callable[[Insertion], Node | None]:
    def apply(insert: Insertion) -> Node | None:
        data = float_input(insert)
        return None if data is None else insert.call(target, data)

    return apply


_EXPONENTS: dict[float, Rewrite] = {
    1.0: float_input,
    2.0: square,
    3.0: _cube,
    0.5: _function(aten.sqrt.default),
    -0.5: _function(aten.rsqrt.default),
    -1.0: _function(aten.reciprocal.default),
}


def power_of_tensor(insert: Insertion) -> Node | None:
    """A base or exponent of one element is a number: once it is trained, it is always the same."""
    base, exponent = insert.node.args
    power = insert.number_beside(exponent, base)
    if power is not None:
        return insert.call(aten.pow.Tensor_Scalar, base, power)
    number = insert.number_beside(base, exponent)
    return None if number is None else insert.call(aten.pow.Scalar, number, exponent)


def power(insert: Insertion) -> Node | None:
    """What ``pow`` calls for an exponent (ATen, ``native/cpu/PowKernel.cpp``)."""
    exponent = insert.node.args[1]
    form = _EXPONENTS.get(float(exponent)) if isinstance(exponent, (int, float)) else None
    return None if form is None else form(insert)
