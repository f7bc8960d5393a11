"""Quantize and dequantize nodes in ONNX, and linear layers, for the exporter of PyTorch.

All other ops are translated by ``torch.onnx`` itself.

References:
    QuantizeLinear, DequantizeLinear: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.graph import (
    CHOOSE_QPARAMS,
    DEQUANTIZE_DYNAMIC,
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_DYNAMIC,
    QUANTIZE_PER_TENSOR,
)

__all__ = ["OPSET", "translations"]

LINEAR = torch.ops.aten.linear.default

OPSET = 21
"""The first opset with int16 and int4 in QuantizeLinear and DequantizeLinear, and with blocks."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Functions that write ONNX for the ops of quantization, as ``torch.onnx.export`` takes them.

    The exporter reads their signatures: what is annotated as a number arrives as a number, what
    is not is a tensor of the ONNX graph.
    """
    from onnxscript import ir
    from onnxscript import opset21 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype))

    def float32(value: float) -> Any:
        return constant(value, ir.DataType.FLOAT)

    def quantize(
        input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
    ) -> Any:
        rounded_again = _makes(input, "DequantizeLinear") is not None
        # ONNX saturates to the whole type. And ONNX Runtime makes one rounding, at a scale of its
        # own, of two in a row (DoubleQDQPairsRemover), which moves results by several steps: the
        # Clip, which changes nothing there, keeps them apart.
        if rounded_again or not _fills(dtype, quant_min, quant_max):
            # These are integers times the scale, rounded once: dividing gives the integers back.
            low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
            input = op.Clip(input, float32(low), float32(high))
        return op.QuantizeLinear(input, float32(scale), constant(zero_point, dtype))

    def dequantize(
        input: Any,
        scale: float,
        zero_point: int,
        quant_min: int,
        quant_max: int,
        dtype: int,
        out_dtype: int = -1,
    ) -> Any:
        if dtype == ir.DataType.INT32:  # which has none
            return op.DequantizeLinear(input, float32(scale))
        return op.DequantizeLinear(input, float32(scale), constant(zero_point, dtype))

    def dequantize_per_channel(
        input: Any,
        scales: Any,
        zero_points: Any,
        axis: int,
        quant_min: int,
        quant_max: int,
        dtype: int,
        out_dtype: int = -1,
    ) -> Any:
        return op.DequantizeLinear(input, scales, axis=axis)  # weights and biases are symmetric

    def dequantize_grouped(
        input: Any,
        block_size: Any,
        scale: Any,
        zero_point: Any,
        input_dtype: int,
        quant_min: int,
        quant_max: int,
        output_dtype: int = -1,
    ) -> Any:
        return op.DequantizeLinear(input, scale, axis=1, block_size=int(block_size[1]))

    def choose_qparams(
        input: Any, quant_min: int, quant_max: int, eps: float, dtype: int
    ) -> tuple[Any, Any]:
        # The order of torch.ao's determine_qparams, in float32 as there.
        zero = float32(0.0)
        low = op.Min(op.ReduceMin(input, keepdims=0), zero)
        high = op.Max(op.ReduceMax(input, keepdims=0), zero)
        scale = op.Max(op.Div(op.Sub(high, low), float32(quant_max - quant_min)), float32(eps))
        steps = op.Sub(float32(quant_min), op.Round(op.Div(low, scale)))
        point = op.Clip(steps, float32(quant_min), float32(quant_max))
        one = op.Constant(value_ints=[1])
        return (
            op.Cast(op.Reshape(scale, one), to=ir.DataType.DOUBLE),
            op.Cast(op.Reshape(point, one), to=ir.DataType.INT64),
        )

    def number(value: Any, dtype: Any) -> Any:
        return op.Squeeze(op.Cast(value, to=dtype))

    def quantize_dynamic(
        input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int
    ) -> Any:
        return op.QuantizeLinear(input, number(scale, ir.DataType.FLOAT), number(zero_point, dtype))

    def dequantize_dynamic(
        input: Any,
        scale: Any,
        zero_point: Any,
        quant_min: int,
        quant_max: int,
        dtype: int,
        out_dtype: int = -1,
    ) -> Any:
        return op.DequantizeLinear(
            input, number(scale, ir.DataType.FLOAT), number(zero_point, dtype)
        )

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        if len(input.shape) == 2:
            return op.Gemm(input, weight, bias, transB=1)
        if _makes(weight, "DequantizeLinear") is None or _from_int8(input, ir):
            product = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
            return product if bias is None else op.Add(product, bias)
        # A MatMul of floats by integer weights becomes a MatMulNBits in ONNX Runtime, which rounds
        # the floats to 8 bits if nobody sets session.qdq_matmulnbits_accuracy_level; a Gemm stays.
        rows, columns = (int(size) for size in weight.shape)
        flat = op.Reshape(input, op.Constant(value_ints=[-1, columns]))
        outer = op.Shape(input, end=-1)
        shape = op.Concat(outer, op.Constant(value_ints=[rows]), axis=0)
        return op.Reshape(op.Gemm(flat, weight, bias, transB=1), shape)

    return {
        LINEAR: linear,
        QUANTIZE_PER_TENSOR: quantize,
        DEQUANTIZE_PER_TENSOR: dequantize,
        DEQUANTIZE_PER_CHANNEL: dequantize_per_channel,
        DEQUANTIZE_GROUPED: dequantize_grouped,
        CHOOSE_QPARAMS: choose_qparams,
        QUANTIZE_DYNAMIC: quantize_dynamic,
        DEQUANTIZE_DYNAMIC: dequantize_dynamic,
    }


def _makes(value: Any, op_type: str) -> Any:
    """The ONNX node that a value comes from, if it is of a type."""
    ir_node = value.producer()
    return ir_node if ir_node is not None and ir_node.op_type == op_type else None


def _from_int8(value: Any, ir: Any) -> bool:
    """Whether a float tensor holds 8-bit integers of a scale that is known ahead."""
    ir_node = _makes(value, "DequantizeLinear")
    if ir_node is None or ir_node.inputs[0].dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    return _makes(ir_node.inputs[1], "Constant") is not None


def _fills(dtype: Any, quant_min: int, quant_max: int) -> bool:
    """Whether a range is all that an ONNX type (``INT8``, ``UINT8``, ...) holds."""
    bits, signed = dtype.bitwidth, dtype.is_signed()
    fmt = IntFormat(bits)
    low, high = (fmt.quant_min, fmt.quant_max) if signed else (0, (1 << bits) - 1)
    return (quant_min, quant_max) == (low, high)
