"""What XNNPACK computes where it chooses scales while it runs.

A linear layer has a scale for each row of its input, a convolution for each image, and a pointwise
convolution, which XNNPACK turns into a linear layer, for each pixel. The integers are those of
:func:`~custom_quantizer.core.rows.quantize_rows`. With ``fl()`` one float32 rounding::

    acc = sum((q - zero_point) * w)                exact; padding is the zero point
    y   = fl(fl(fl(acc) * scale) * s_w + bias)     the last two at once: a fused multiply-add

Subnormal numbers are 0, as there.

Weights in groups sum ``acc`` of each group times its scale in float32, in an order that differs
from kernel to kernel: see :func:`grouped_error`.

References:
    XNNPACK at commit 92a7ad50: ``src/qd8-f32-qc8w-gemm``, ``src/qd8-f32-qc8w-igemm``,
    ``src/qd8-f32-qc4w-gemm``, ``src/qd8-f32-qb4w-gemm``, ``src/operator-run.c``
    (``xnn_compute_dq_zero_buffer_igemm``: padding), ``src/subgraph/convolution-2d.c`` (pointwise),
    ``src/reference/packing.cc`` (groups) and ``src/configs/gemm-config.c`` (which CPU has which
    kernel).
"""

from __future__ import annotations

import platform
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import INT8, ROUNDOFF, SMALLEST_NORMAL, along
from custom_quantizer.core.graph import argument, describe, shape_of
from custom_quantizer.core.rows import RowIntegers, quantize_rows, without_subnormal
from custom_quantizer.errors import InputError
from custom_quantizer.ops import PatternMatch
from custom_quantizer.ops.gemm import (
    CONV,
    LINEAR,
    channel_axis,
    per_dim,
    sums_of_products,
    symmetric_padding,
)
from custom_quantizer.ops.run_time import RunTime, RunTimeOp

__all__ = [
    "RUN_TIME",
    "each",
    "fused_multiply_add",
    "is_exact_here",
    "shared_dims",
]


_REACH = INT8[1] - INT8[0]
"""Largest absolute value of ``q - zp``."""


def shared_dims(match: PatternMatch) -> tuple[int, ...]:
    """Dims of a layer's input whose values share one scale; empty: it has no kernel for that."""
    if match.rule is LINEAR:
        return (-1,)
    if match.rule is not CONV or match.groups != 1 or len(shape_of(match.node)) != 4:
        return ()
    return (1,) if _is_linear(match) else (1, 2, 3)


def each(match: PatternMatch) -> str:
    """What has a scale of its own, for sentences."""
    if match.rule is LINEAR:
        return "row by row"
    return "pixel by pixel" if _is_linear(match) else "image by image"


def _is_linear(match: PatternMatch) -> bool:
    """Whether XNNPACK makes a linear layer over channels of a convolution (of one group)."""
    out, channels, *taps = shape_of(cast(Node, match.weight))
    before, after = symmetric_padding(match.node)
    strides = per_dim(argument(match.node, 3, "stride", 1), len(taps))
    return not any(before + after) and {*taps, *strides} == {1} and out + channels > 2


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``fl(a * b + c)`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded there to odd, which leaves the next rounding
    what it needs to know (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    product = a.to(torch.float64) * b.to(torch.float64)
    addend = c.to(torch.float64)
    total = product + addend
    # What was rounded off the sum, exactly (Knuth's TwoSum).
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact = torch.isfinite(total) & (rest != 0) & (bits % 2 == 0)
    outward = (rest > 0) == (total > 0)
    bits = torch.where(inexact, torch.where(outward, bits + 1, bits - 1), bits)
    return bits.view(torch.float64).to(torch.float32)


def _rows(op: RunTimeOp, x: Tensor) -> RowIntegers:
    try:
        return quantize_rows(x, shared_dims(op.match))
    except InputError as error:
        raise InputError(f"the input of {describe(op.node)}: {error}") from error


def _bias(op: RunTimeOp, like: Tensor) -> Tensor:
    bias = op.weight_scale.new_zeros(len(op.weight)) if op.bias is None else op.bias
    return along(bias, channel_axis(op.match), like)


def compute(op: RunTimeOp, x: Tensor) -> Tensor:
    """What the layer gives: float32.

    With weights in groups, the float32 number next to the real one.
    """
    rows = _rows(op, x)
    if op.is_grouped:
        total = torch.zeros(())
        for part, weight, scale in _groups(op, rows.offsets):
            acc = sums_of_products(op.match, part, weight, _REACH).to(torch.float64)
            total = total + acc * scale.to(torch.float64)
        real = total * rows.scale.to(torch.float64)
        return without_subnormal((real + _bias(op, real)).to(torch.float32))
    acc = sums_of_products(op.match, rows.offsets, op.weight, _REACH).to(torch.float32)
    scale = along(op.weight_scale, channel_axis(op.match), acc)
    product = without_subnormal(acc * rows.scale)
    return without_subnormal(fused_multiply_add(product, scale, _bias(op, acc)))


def _groups(op: RunTimeOp, offsets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Input features, weights ``(out, features)`` and scales ``(out,)`` of each group."""
    size = op.weight.shape[1] // op.weight_scale.shape[1]
    columns = op.weight_scale.unbind(1)
    parts, weights = torch.split(offsets, size, -1), torch.split(op.weight, size, 1)
    return list(zip(parts, weights, columns, strict=True))


def error(op: RunTimeOp, x: Tensor) -> Tensor:
    """How far :func:`compute` may be from what a kernel gives, whatever the CPU; float64.

    Without groups all kernels agree up to the accumulator. Then some round the last product before
    they add the bias (x86-64 without FMA), and some multiply the two scales first (dot products of
    ARM, ``4x16c4-asm-aarch64-neondot``). Let ``u = 2**-24`` and ``p = acc scale s_w``. Before the
    last rounding ``p`` is off by one rounding here and by two at most elsewhere; the last ones are
    of two numbers that far apart::

        |error| <= 3 u |p| + u (|y| + |y'|)

    A product of scales that is subnormal is 0, which takes ``2**-126`` from each unit of ``acc``.
    """
    y = compute(op, x).to(torch.float64)
    if op.is_grouped:
        return grouped_error(op, x, y)
    product = y - _bias(op, y)
    largest = _REACH * op.weight.to(torch.float64).abs().flatten(1).sum(1)
    lost = SMALLEST_NORMAL * (1 + along(largest, channel_axis(op.match), y))
    return ROUNDOFF * (3 * product.abs() + 2 * y.abs()) * _SECOND_ORDER + lost


def is_exact_here(op: RunTimeOp) -> bool:
    """Whether the kernels of this machine give every bit of :func:`compute`.

    Those of x86-64 do without a bias; with one those that have FMA, from AVX2 on. On ARM it depends
    on the CPU and on the number of rows.
    """
    if op.is_grouped or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    biased = op.bias is not None and bool(op.bias.any())
    return not biased or torch.backends.cpu.get_cpu_capability() != "DEFAULT"


_SECOND_ORDER = 1.001
"""For products of roundings, and the rounding of ``y`` itself. What is too small for a normal
number is left out of it, and added as one."""


def grouped_error(op: RunTimeOp, x: Tensor, y: Tensor) -> Tensor:
    """How far the sum over groups may be off in float32, in any kernel's order.

    Let ``S = sum(s_g |w|)`` over the ``k`` features of a channel, of ``G`` groups. When a program
    is loaded, ``sum(s_g w)`` is added up in at most ``k / 2`` parts (one error ``u S`` each), and
    multiplied by the zero point, at most 255. To that, sums of each group (converted, multiplied,
    added) are added, in up to 8 lanes that come together in 3 more additions; ``q`` is at most 255,
    so no partial sum exceeds ``510 S``. Then come the row's scale and the bias::

        |error| <= u inv S (255 k / 2 + 510 (G + 7)) + 3 u (|y| + |bias|)
    """
    rows = _rows(op, x)
    features, groups = op.weight.shape[1], op.weight_scale.shape[1]
    scales = op.weight_scale.repeat_interleave(features // groups, 1).to(torch.float64)
    most = (op.weight.to(torch.float64).abs() * scales).sum(1)
    roundings = 255 * features / 2 + 510 * (groups + 7)
    bias = _bias(op, y).abs()
    last = 3 * (y.abs() + bias)
    most_off = ROUNDOFF * (rows.scale.to(torch.float64) * most * roundings + last) * _SECOND_ORDER
    return most_off + SMALLEST_NORMAL


RUN_TIME = RunTime(shared_dims, compute, error)
