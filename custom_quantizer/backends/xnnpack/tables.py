"""How XNNPACK makes tables of functions, and what they hold.

Between int8 boundaries a function costs one pass over bytes, whatever it computes; between float
ops, where there are none, quantizing it would only cost
(:mod:`custom_quantizer.planning.profitability`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK, tie_break_offset
from custom_quantizer.core.arithmetic import Arithmetic, QParams, round_to_float32, scale_of
from custom_quantizer.errors import ConversionError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops._rule import Integers
from custom_quantizer.ops.functions import (
    EXACT_GELU,
    SIGMOID_FUNCTION,
    SILU_FUNCTION,
    Function,
    function_of,
    is_tanh_gelu,
    levels,
    look_up,
    real,
    saturated,
    table,
)

__all__ = [
    "delegated_function",
    "function_offset",
    "gelu_integers",
    "product_table",
    "sigmoid_qparams",
    "silu_integers",
]


def delegated_function(node: Node) -> Function | None:
    """The function that XNNPACK computes for a node: every gelu is the one without approximation.

    The approximation by tanh is up to 4.8e-4 away from it.
    """
    return EXACT_GELU if is_tanh_gelu(node) else function_of(node)


def function_offset(function: Function, src: QParams, dst: QParams) -> float:
    """What is added to a function's value before it is quantized: see ``tie_break_offset``.

    Returns:
        A float32 number, in units of the function's value.
    """
    if function.ulps == 0.0:
        return 0.0
    return tie_break_offset(real(function, levels(src), src, XNNPACK), function.ulps, dst)


def gelu_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    """A gelu, without the approximation up to 8 bits; wider ones are emulated with it."""
    function = function_of(op.node) if op.is_wide else delegated_function(op.node)
    return _function_integers(function, op, inputs, arithmetic)


def _function_integers(
    function: Function | None, op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic
) -> Tensor:
    general = op.match.rule.integers
    if function is None or general is None:
        raise ConversionError(f"{op.node.name} is no function of one tensor")
    if op.is_wide:
        return general(op, inputs, arithmetic)
    return look_up(op, inputs[0], table(function, op.inputs[0], op.output, arithmetic))


@lru_cache(maxsize=4096)
def sigmoid_qparams(src: QParams, dst: QParams) -> QParams:
    """Quantization of the sigmoid in ``x * sigmoid(x)``, int8.

    XNNPACK fuses steps into a table only if no float tensor among them is read twice. So silu runs
    as the integer product of its input with a quantized sigmoid: a table in all, filled through
    two roundings. The scale is that of the largest value, ``sigmoid(x_max) / 255``, or up to 2 %
    above it: the one for which most entries are those of silu rounded once (the first of several).
    With it the sigmoid's own table needs no tie-break offset, and so silu needs none.

    Args:
        src: of the input; an int8 range.
        dst: of the result.
    """
    largest = float(torch.sigmoid(torch.tensor(_largest(src), dtype=torch.float64)))
    stored = levels(src)
    ideal = saturated(real(SILU_FUNCTION, stored, src, XNNPACK), dst, XNNPACK)
    sigmoid = real(SIGMOID_FUNCTION, stored, src, XNNPACK)
    best: tuple[int, QParams] | None = None
    for step in range(_SIGMOID_SCALES):
        scale = round_to_float32(largest / 255 * (1 + 0.02 * step / _SIGMOID_SCALES))
        qparams = QParams(scale, -128, -128, 127)
        if tie_break_offset(sigmoid, SIGMOID_FUNCTION.ulps, qparams) != 0.0:
            continue
        entries = saturated(sigmoid, qparams, XNNPACK)
        wrong = int((XNNPACK.mul(stored, entries, src, qparams, dst) != ideal).sum())
        if best is None or wrong < best[0]:
            best = (wrong, qparams)
    if best is None:
        return QParams(round_to_float32(largest / 255), -128, -128, 127)
    return best[1]


_SIGMOID_SCALES = 32


def _largest(q: QParams) -> float:
    return (q.quant_max - q.zero_point) * scale_of(q)


def product_table(
    src: QParams, sigmoid: QParams, dst: QParams, arithmetic: Arithmetic = XNNPACK
) -> Tensor:
    """The entries of ``x * sigmoid(x)`` with an int8 sigmoid, as the delegate multiplies."""
    entries = table(SIGMOID_FUNCTION, src, sigmoid, XNNPACK)
    return arithmetic.mul(levels(src), entries, src, sigmoid, dst)


def silu_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    """``x * sigmoid(x)`` with an int8 sigmoid up to 8 bits; wider ones are emulated as they are."""
    if op.is_wide:
        return _function_integers(SILU_FUNCTION, op, inputs, arithmetic)
    src = op.inputs[0]
    entries = product_table(src, sigmoid_qparams(src, op.output), op.output, arithmetic)
    return look_up(op, inputs[0], entries)
