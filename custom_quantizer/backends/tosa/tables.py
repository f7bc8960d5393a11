"""Functions of one tensor as TOSA's TABLE operator, entry by entry as ExecuTorch fills it.

An 8-bit table has an entry for each of 256 integers. A 16-bit one has 513, for every 128th integer,
and interpolates: its result has 7 more bits, which a RESCALE by ``2**-7`` rounds off. Entries are
filled with PyTorch's float32 kernels when the network is lowered, on that machine, and shipped.

References:
    ``backends/arm/_passes/insert_table_ops.py`` of ExecuTorch 1.5.1; TOSA 1.0, ``TABLE``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import INT16, Arithmetic, QParams, scale_of, store
from custom_quantizer.core.graph import argument
from custom_quantizer.errors import SchemeError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops._rule import Integers

__all__ = ["TARGETS", "integers"]

aten = torch.ops.aten

_STEP = 128


def _gelu(node: Node) -> Callable[[Tensor], Tensor]:
    approximate = str(argument(node, 1, "approximate", "none"))
    return lambda x: F.gelu(x, approximate=approximate)


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[Node], Callable[[Tensor], Tensor]]:
    return lambda _node: function


_FUNCTIONS: dict[Any, Callable[[Node], Callable[[Tensor], Tensor]]] = {
    aten.ceil.default: _plain(torch.ceil),
    aten.exp.default: _plain(torch.exp),
    aten.floor.default: _plain(torch.floor),
    aten.gelu.default: _gelu,
    aten.hardsigmoid.default: _plain(F.hardsigmoid),
    aten.hardswish.default: _plain(F.hardswish),
    aten.log.default: _plain(torch.log),
    aten.reciprocal.default: _plain(torch.reciprocal),
    aten.rsqrt.default: _plain(torch.rsqrt),
    aten.sigmoid.default: _plain(torch.sigmoid),
    aten.silu.default: _plain(F.silu),
    aten.tanh.default: _plain(torch.tanh),
}

TARGETS = frozenset(_FUNCTIONS)
"""Overloads that become a TABLE."""


def integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    """What the operator computes, int32."""
    function, src, dst = _FUNCTIONS[op.node.target](op.node), op.inputs[0], op.output
    if src.fits_int8:
        stored = torch.arange(src.quant_min, src.quant_max + 1)
        entries = _entries(function(arithmetic.dequantize(stored, src)), dst, arithmetic)
        return entries[inputs[0].to(torch.int64) - src.quant_min]
    return _interpolated(inputs[0].to(torch.int64), _knots(function, src, dst, arithmetic), dst)


def _knots(
    function: Callable[[Tensor], Tensor], src: QParams, dst: QParams, arithmetic: Arithmetic
) -> Tensor:
    """Values at every 128th integer, int64, 513 of them; the last one lies beyond the range."""
    at = torch.arange(INT16[0], INT16[1] + 2, _STEP)
    real = arithmetic.dequantize(at[:-1], src)
    beyond = torch.tensor([float(at[-1]) * scale_of(src)], dtype=torch.float32)
    return _entries(function(torch.cat([real, beyond])), dst, arithmetic).to(torch.int64)


def _entries(values: Tensor, dst: QParams, arithmetic: Arithmetic) -> Tensor:
    limit = torch.finfo(torch.float32).max
    return arithmetic.quantize(values.nan_to_num(nan=limit).clamp(-limit, limit), dst)


def _interpolated(x: Tensor, knots: Tensor, dst: QParams) -> Tensor:
    position = x - INT16[0]
    index, fraction = position // _STEP, position % _STEP
    slope = knots[index + 1] - knots[index]
    if bool((slope < INT16[0]).any()) or bool((slope > INT16[1]).any()):
        raise SchemeError(
            "its 16-bit table is too steep between two entries for TOSA to interpolate; quantize "
            "it to 8 bits"
        )
    # RESCALE by 2**-7: ties upwards.
    return store(((knots[index] * _STEP + slope * fraction) + _STEP // 2) >> 7, dst)
