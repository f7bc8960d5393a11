"""Runs a saved network on integers with NumPy alone: the specification, executable.

This file needs NumPy and safetensors, and nothing else of the package it comes with: copy it next
to your own code, or read it beside ``docs/integer_bundle.md`` while you write the hardware.

    reference = load_integers("model")           # model.json and model.safetensors
    logits = reference(images)                   # float32 in, float32 out
    logits, integers = reference.with_integers(images)   # every tensor, to compare with a device

Real numbers occur at the borders only: :func:`quantize` on the way in, :func:`dequantize` on the
way out. In between, a stored integer ``q`` stands for ``(q - zero_point) * scale``, and scales are
used no more: the file gives integer multipliers and shifts. Accumulators are int64 here and reduced
to the width that the file says.

A bundle may come from anywhere: all of it is checked before anything is computed. What is legal is
said by the fields of :data:`_OPS` (types and ranges) and by the functions behind them (sizes,
multipliers, accumulators).

References:
    gemmlowp, ``fixedpoint/fixedpoint.h``; TensorFlow Lite, ``kernels/internal/common.cc`` (both
    roundings of :func:`multiply_int32`, and :func:`multiply_int64`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

__all__ = [
    "FORMAT",
    "MOST_BYTES",
    "MOST_ELEMENTS",
    "MOST_TAPS",
    "MOST_TERMS",
    "VERSION",
    "BundleError",
    "NumpyReference",
    "bundle_files",
    "check_description",
    "checksum",
    "dequantize",
    "doubling_high_multiply",
    "load_integers",
    "multiply_int32",
    "multiply_int64",
    "position_bits",
    "quantize",
    "rounding_divide_by_pot",
    "wrap_int32",
]

FORMAT = "custom_quantizer.integers"
VERSION = 3
"""Version that is written. Read are version 2, in which all resizes have positions in 1/2048 of a
pixel, and version 1, which has no checksum."""

MOST_BYTES = 2**28
"""Size of the JSON file."""
MOST_ELEMENTS = 2**28
"""Elements of a tensor, padding included: an array of them takes 2 GiB while an op computes."""
MOST_TERMS = 2**40
"""Terms that an op adds up, over all elements of its result."""
MOST_TAPS = 2**20
"""Positions of a kernel."""

Array: TypeAlias = npt.NDArray[Any]
Op: TypeAlias = "Mapping[str, Any]"
"""Entry of an op in the file."""
Wide: TypeAlias = npt.NDArray[np.int64]

_Reference = TypeVar("_Reference", bound="NumpyReference")

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
# Past any stored integer, and small enough to convert to int64 and to add a zero point to.
_HUGE = 2.0**40
# Sums of integers stay exact in float64 below this, in any order of summation.
_EXACT_FLOAT64 = 2**53


class BundleError(ValueError):
    """A bundle that cannot be run, or inputs that do not fit it."""


# Rounding ----------------------------------------------------------------------------------------


def wrap_int32(x: Wide) -> Wide:
    """Keep the low 32 bits, as a 32-bit accumulator that overflows does."""
    return ((x - _INT32_MIN) & 0xFFFFFFFF) + _INT32_MIN


def doubling_high_multiply(a: Wide, b: Wide) -> Wide:
    """``a * b / 2**31`` rounded to nearest, ties upwards; both within int32, ``b >= 0``."""
    return (a * b + 2**30) >> 31


def rounding_divide_by_pot(x: Wide, exponent: Wide) -> Wide:
    """``x / 2**exponent`` rounded to nearest, ties away from zero; ``0 <= exponent <= 31``."""
    mask = (np.int64(1) << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    rounded: Wide = (x >> exponent) + ((x & mask) > threshold)
    return rounded


def multiply_int32(x: Wide, multiplier: Wide, shift: Wide) -> Wide:
    """``x * multiplier * 2**(shift - 31)``, rule ``int32_two_roundings``.

    Args:
        x: Accumulators, wrapped to int32.
        multiplier: In ``[0, 2**31)``, broadcast to ``x``.
        shift: In ``[-31, 30]``, positive to the left, broadcast to ``x``. A left shift comes
            first, and saturates to int32; a right shift comes last.
    """
    shifted = np.clip(wrap_int32(x) << np.maximum(shift, 0), _INT32_MIN, _INT32_MAX)
    return rounding_divide_by_pot(
        doubling_high_multiply(shifted, multiplier), np.maximum(-shift, 0)
    )


def multiply_int64(x: Wide, multiplier: Wide, shift: Wide) -> Wide:
    """``x * multiplier * 2**(shift - 31)``, rule ``int64_one_rounding``: ties upwards, saturating.

    Args:
        x: Accumulators of up to 48 bits.
        multiplier: In ``[0, 2**31)``; its upper 15 bits are used, rounded.
        shift: In ``[-31, 7]``, positive to the left.

    Raises:
        BundleError: An accumulator exceeds 48 bits.
    """
    if x.size and (int(x.min()) < -(2**47) or int(x.max()) >= 2**47):
        raise BundleError("an accumulator exceeds the 48 bits of 16-bit activations")
    reduced = np.minimum((multiplier + 2**15) >> 16, 0x7FFF)
    total_shift = 15 - shift
    rounded = (x * reduced + (np.int64(1) << (total_shift - 1))) >> total_shift
    saturated: Wide = np.clip(rounded, _INT32_MIN, _INT32_MAX)
    return saturated


_RULES: Mapping[str, Callable[[Wide, Wide, Wide], Wide]] = {
    "int32_two_roundings": multiply_int32,
    "int64_one_rounding": multiply_int64,
}
_MOST_SHIFT = {"int32_two_roundings": 30, "int64_one_rounding": 7}


def _divide_half_away(x: Wide, count: Wide) -> Wide:
    """``x / count`` rounded to nearest, ties away from zero: rule ``divide_half_away``."""
    magnitude = (np.abs(x) + count // 2) // count
    return np.where(x > 0, magnitude, -magnitude)


# Borders -----------------------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """What the file says of one tensor.

    Attributes:
        kind: ``activation``, ``constant``, ``weight`` or ``bias``.
        dtype: Storage of the integers, ``int8``, ``int16`` or ``int32``.
        shape: Sizes at capture; ``None`` where any size is legal.
        scale: float32, one number, or one per output channel (weights and biases).
        zero_point: The integer that stands for 0.0.
        quant_min: Smallest stored integer.
        quant_max: Largest stored integer.
    """

    kind: str
    dtype: npt.DTypeLike
    shape: tuple[int | None, ...]
    scale: npt.NDArray[np.float32]
    zero_point: int
    quant_min: int
    quant_max: int

    @property
    def offsets(self) -> tuple[int, int]:
        """Smallest and largest value of ``q - zero_point``."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    @property
    def reach(self) -> int:
        """Largest absolute value of ``q - zero_point``."""
        return max(map(abs, self.offsets))


def quantize(x: Array, info: TensorInfo) -> Array:
    """``x / scale`` in float32, rounded half away from zero, plus the zero point, saturated.

    Raises:
        BundleError: ``x`` is not float32, or holds NaN.
    """
    if x.dtype != np.float32:
        raise BundleError(f"inputs are float32 arrays, got {x.dtype}; convert it, for its rounding")
    if bool(np.isnan(x).any()):
        raise BundleError("an input holds NaN, which no integer stands for")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = x / info.scale
        whole = np.trunc(scaled)
        away = np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), np.float32(0))
    stored = np.clip(whole + away, -_HUGE, _HUGE).astype(np.int64) + info.zero_point
    saturated: Array = np.clip(stored, info.quant_min, info.quant_max).astype(info.dtype)
    return saturated


def dequantize(x: Array, info: TensorInfo) -> npt.NDArray[np.float32]:
    """``(q - zero_point) * scale`` in float64, rounded to float32."""
    offset = (x.astype(np.int64) - info.zero_point).astype(np.float64)
    return (offset * info.scale.astype(np.float64)).astype(np.float32)


# Ops ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One op with its operands.

    Attributes:
        op: Its entry in the file.
        inputs: Stored integers.
        infos: What the file says of each input.
        output: What the file says of the output.
        weight: Stored integers.
        bias: Stored integers, in units of the accumulator.
    """

    op: Op
    inputs: Sequence[Array]
    infos: Sequence[TensorInfo]
    output: TensorInfo
    weight: Array | None = None
    bias: Array | None = None

    def centered(self, index: int = 0) -> Wide:
        """``q - zero_point`` of an input."""
        return self.inputs[index].astype(np.int64) - self.infos[index].zero_point

    def store(self, value: Wide) -> Array:
        """Add the output's zero point and clamp: to its range, or to a fused activation's."""
        low, high = self.op["clamp"]
        return np.clip(value + self.output.zero_point, low, high).astype(self.output.dtype)

    def scale_by(self, value: Wide, key: str, channel_axis: int | None = None) -> Wide:
        """Apply the multiplier and shift that the op lists under ``key``."""
        entry = self.op[key]
        pair = (np.array(entry[name], dtype=np.int64) for name in ("multiplier", "shift"))
        multiplier, shift = (
            part if part.ndim == 0 or channel_axis is None else _along(part, channel_axis, value)
            for part in pair
        )
        return _RULES[entry["rule"]](value, multiplier, shift)


def _along(values: Wide, axis: int, like: Array) -> Wide:
    """Shape 1-D ``values`` to broadcast along an axis of ``like``."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _gemm(call: Call) -> tuple[Array, Array]:
    """Centered input and weight, in the fastest dtype in which their products sum exactly."""
    if call.weight is None:
        raise BundleError(f"{call.op['name']} has no weight")
    weight = call.weight.astype(np.int64)
    # A row of the weight is summed at most; the sum over all of it is bound enough.
    bound = call.infos[0].reach * int(np.abs(weight).sum())
    dtype = np.float64 if bound < _EXACT_FLOAT64 else np.int64
    return call.centered().astype(dtype), weight.astype(dtype)


def _requantize_accumulator(call: Call, acc: Array, channel_axis: int) -> Array:
    total = acc.astype(np.int64)
    if call.bias is not None:
        total = total + _along(call.bias.astype(np.int64), channel_axis, total)
    return call.store(call.scale_by(total, "requantization", channel_axis))


def _taps(kernel: Sequence[int]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in kernel))


def _view(
    tap: Sequence[int], sizes: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, ...]:
    """Index of the values that kernel tap ``tap`` meets: one per output position."""
    steps = (
        slice(t * d, t * d + (n - 1) * s + 1, s)
        for t, n, s, d in zip(tap, sizes, stride, dilation, strict=True)
    )
    return (..., *steps)


def _pad(x: Array, op: Op, value: int) -> Array:
    """Pad the last dimensions as ``op`` says."""
    before, after = op["padding"]["before"], op["padding"]["after"]
    rest = [(0, 0)] * (x.ndim - len(before))
    pads = [*rest, *zip(before, after, strict=True)]
    return np.pad(x, pads, constant_values=value)


def _output_sizes(
    padded: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True)
    ]


def _conv(call: Call) -> Array:
    """``acc[o, p] = bias[o] + sum over c, k of w[o, c, k] * (x[c, s * p + d * k - pad] - zp)``.

    The weight is ``(out, in / groups, *kernel)``; what lies outside of ``x`` is the zero point.
    """
    op = call.op
    x, weight = _gemm(call)
    x = _pad(x, op, 0)
    batch, groups, kernel = x.shape[0], op["groups"], weight.shape[2:]
    sizes = _output_sizes(x.shape[2:], kernel, op["stride"], op["dilation"])
    grouped = x.reshape(batch, groups, -1, *x.shape[2:])
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    acc = np.zeros((batch, groups, weight.shape[1], math.prod(sizes)), dtype=x.dtype)
    for tap in _taps(kernel):
        seen = grouped[_view(tap, sizes, op["stride"], op["dilation"])]
        of_tap: Any = (..., *tap)
        acc += weight[of_tap] @ seen.reshape(batch, groups, -1, acc.shape[-1])
    return _requantize_accumulator(call, acc.reshape(batch, -1, *sizes), channel_axis=1)


def _conv_transpose(call: Call) -> Array:
    """``acc[o, s * p + d * k - crop] += w[c, o, k] * (x[c, p] - zp)``, then ``+ bias[o]``.

    The weight is ``(in, out / groups, *kernel)``. ``crop`` is cut off the result; where it is
    negative, the result is longer by positions that no input reaches.
    """
    op = call.op
    x, weight = _gemm(call)
    batch, groups, kernel = x.shape[0], op["groups"], weight.shape[2:]
    sizes, stride, dilation = x.shape[2:], op["stride"], op["dilation"]
    grouped = x.reshape(batch, groups, -1, math.prod(sizes))
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    before, after = op["crop"]["before"], op["crop"]["after"]
    full = [
        (n - 1) * s + d * (k - 1) + 1 + max(-a, 0)
        for n, k, s, d, a in zip(sizes, kernel, stride, dilation, after, strict=True)
    ]
    acc = np.zeros((batch, groups, weight.shape[2], *full), dtype=x.dtype)
    for tap in _taps(kernel):
        of_tap: Any = (..., *tap)
        part = weight[of_tap].swapaxes(1, 2) @ grouped
        acc[_view(tap, sizes, stride, dilation)] += part.reshape(*acc.shape[:3], *sizes)
    kept: Any = (
        ...,
        *(slice(b, n - max(a, 0)) for b, a, n in zip(before, after, full, strict=True)),
    )
    acc = acc.reshape(batch, -1, *full)[kept]
    return _requantize_accumulator(call, acc, channel_axis=1)


def _linear(call: Call) -> Array:
    """``acc[..., o] = bias[o] + sum over c of w[o, c] * (x[..., c] - zp)``."""
    x, weight = _gemm(call)
    return _requantize_accumulator(call, x @ weight.T, channel_axis=x.ndim - 1)


def _add(call: Call) -> Array:
    """Bring both operands to one scale, add or subtract, bring the sum to the output's scale."""
    left_shift = call.op["left_shift"]
    a = call.scale_by(call.centered(0) << left_shift, "requantization_a")
    b = call.scale_by(call.centered(1) << left_shift, "requantization_b")
    total = a - b if call.op["op"] == "sub" else a + b
    return call.store(call.scale_by(total, "requantization"))


def _mul(call: Call) -> Array:
    return call.store(call.scale_by(call.centered(0) * call.centered(1), "requantization"))


def _matmul(call: Call) -> Array:
    """``acc[..., i, j] = sum over k of (a[..., i, k] - za) * (b[..., k, j] - zb)``."""
    a, b = call.centered(0), call.centered(1)
    bound = a.shape[-1] * call.infos[0].reach * call.infos[1].reach
    dtype: type[np.float64 | np.int64] = np.float64 if bound < _EXACT_FLOAT64 else np.int64
    acc = (a.astype(dtype) @ b.astype(dtype)).astype(np.int64)
    return call.store(call.scale_by(acc, "requantization"))


def _requantize(call: Call) -> Array:
    return call.store(call.scale_by(call.centered(), "requantization"))


def _clamp(call: Call) -> Array:
    low, high = call.op["clamp"]
    return np.clip(call.inputs[0], low, high).astype(call.output.dtype)


def _table(call: Call) -> Array:
    """One stored result for each stored integer of the input, from the smallest up.

    With an axis, each of its channels has a row of the table.
    """
    entries = np.array(call.op["table"], dtype=call.output.dtype)
    x, axis = call.inputs[0], call.op["axis"]
    index: Any = x.astype(np.int64) - call.infos[0].quant_min
    if axis is not None:
        index = (_along(np.arange(x.shape[axis]), axis, x), index)
    stored: Array = entries[index]
    return stored


def _extremum(call: Call) -> Array:
    """Bring both operands to the output's scale, which keeps their order, and compare."""
    compare = np.maximum if call.op["op"] == "maximum" else np.minimum
    a = call.scale_by(call.centered(0), "requantization_a")
    b = call.scale_by(call.centered(1), "requantization_b")
    return call.store(compare(a, b))


def _mean(call: Call) -> Array:
    """The sum of ``q - zero_point``; ``1 / count`` is in the multiplier."""
    op = call.op
    x = call.centered()
    total = x.sum(axis=tuple(op["axes"]), keepdims=op["keepdims"])
    return call.store(call.scale_by(total, "requantization"))


def _avg_pool2d(call: Call) -> Array:
    """The sum of a window; its division depends on how many values the window holds."""
    op = call.op
    kernel, stride = op["kernel"], op["stride"]
    x = call.centered()
    ones = np.ones(x.shape[-2:], dtype=np.int64)
    counts = _sum_windows(_pad(ones, op, int(op["count_padding"])), kernel, stride)
    total = _sum_windows(_pad(x, op, 0), kernel, stride)
    if op["rounding"] == "divide_half_away":
        zero_point = call.infos[0].zero_point
        mean = _divide_half_away(total + counts * zero_point, counts)
        return call.store(mean - call.output.zero_point)
    entry = op["requantization"]
    rows = {count: row for row, count in enumerate(entry["count"])}
    row = np.array([rows[count] for count in counts.reshape(-1).tolist()]).reshape(counts.shape)
    multiplier, shift = (np.array(entry[key])[row] for key in ("multiplier", "shift"))
    return call.store(_RULES[entry["rule"]](total, multiplier, shift))


def _sum_windows(x: Wide, kernel: Sequence[int], stride: Sequence[int]) -> Wide:
    one = [1] * len(kernel)
    sizes = _output_sizes(x.shape[-2:], kernel, stride, one)
    total = np.zeros((*x.shape[:-2], *sizes), dtype=np.int64)
    for tap in _taps(kernel):
        total += x[_view(tap, sizes, stride, one)]
    return total


def _max_pool2d(call: Call) -> Array:
    """The largest stored integer of each window; padding never wins."""
    op = call.op
    stride, dilation = op["stride"], op["dilation"]
    x = _pad(call.inputs[0].astype(np.int64), op, _INT32_MIN)
    sizes = _output_sizes(x.shape[-2:], op["kernel"], stride, dilation)
    views = (x[_view(tap, sizes, stride, dilation)] for tap in _taps(op["kernel"]))
    largest = next(views)
    for view in views:
        largest = np.maximum(largest, view)
    stored: Array = largest.astype(call.output.dtype)
    return stored


_POSITION_BITS = 11
"""What all positions had up to version 2, and those in int8 images have."""


def _resize_bilinear(call: Call) -> Array:
    """Weighted sums of four neighbours, with positions in fractions of a pixel; half goes up."""
    values, fraction = call.inputs[0].astype(np.int64), position_bits(call.op)
    for axis, positions in ((-2, call.op["rows"]), (-1, call.op["columns"])):
        place = np.array(positions, dtype=np.int64)
        lower = place >> fraction
        first = np.take(values, lower, axis)
        second = np.take(values, np.minimum(lower + 1, values.shape[axis] - 1), axis)
        weight = place - (lower << fraction)
        weight = weight[:, None] if axis == -2 else weight
        values = (first << fraction) + (second - first) * weight
    half = 1 << (2 * fraction - 1)
    resized: Array = ((values + half) >> 2 * fraction).astype(call.output.dtype)
    return resized


def position_bits(op: Op) -> int:
    """Bits of the fractions of a pixel in which a resize has its positions."""
    bits: int = op.get("position_bits", _POSITION_BITS)
    return bits


def _reshape(call: Call) -> Array:
    """0 takes the size of the same dimension of the input, -1 what is left over."""
    x = call.inputs[0]
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(call.op["shape"])])


def _expand(call: Call) -> Array:
    """-1 keeps the size; dimensions are aligned at the last one."""
    x, wanted = call.inputs[0], call.op["shape"]
    missing = len(wanted) - x.ndim
    return np.broadcast_to(x, [x.shape[i - missing] if n < 0 else n for i, n in enumerate(wanted)])


def _slice(call: Call) -> Array:
    op = call.op
    index = slice(op["start"], op["stop"], op["step"])
    where: Any = (*(slice(None),) * op["axis"], index)
    sliced: Array = call.inputs[0][where]
    return sliced


# Sizes -------------------------------------------------------------------------------------------

Sizes: TypeAlias = "tuple[int | None, ...]"
"""A shape; ``None`` is a size that is not known before the network runs."""


def _need(condition: object, message: str) -> None:
    if not condition:
        raise BundleError(message)


def _agree(a: int | None, b: int | None) -> bool:
    return a is None or b is None or a == b


def _count(sizes: Iterable[int | None]) -> int:
    """Number of elements; what is not known counts as 1."""
    return math.prod(1 if n is None else n for n in sizes)


def _bounded(sizes: Sequence[int | None], what: str = "result") -> None:
    count = _count(sizes)
    if count > MOST_ELEMENTS:
        raise BundleError(
            f"its {what} of shape {list(sizes)} would have {count:,} elements, {MOST_ELEMENTS:,} "
            "at most; use smaller batches"
        )


def _bounded_work(terms: int) -> None:
    if terms > MOST_TERMS:
        raise BundleError(f"it adds up {terms:,} terms, {MOST_TERMS:,} at most; use fewer at once")


def _spatial(op: Op, rank: int, *lists: Sequence[int]) -> None:
    """All lists of a window have one number per spatial dimension."""
    wrong = [values for values in lists if len(values) != rank]
    _need(not wrong, f"it has {rank} spatial dimensions, not {len(wrong[0]) if wrong else 0}")


def _windows(op: Op, x: Sizes, kernel: Sequence[int], dilation: Sequence[int]) -> Sizes:
    """Sizes of the last dimensions of ``x`` after a kernel went over them."""
    stride, before, after = op["stride"], op["padding"]["before"], op["padding"]["after"]
    rank = len(kernel)
    _spatial(op, rank, stride, before, after, dilation)
    _need(len(x) >= rank, f"its input has {len(x)} dimensions, its windows {rank}")
    _need(math.prod(kernel) <= MOST_TAPS, f"its kernel has more than {MOST_TAPS:,} positions")
    padded = tuple(
        None if n is None else n + b + a for n, b, a in zip(x[-rank:], before, after, strict=True)
    )
    _bounded((*x[:-rank], *padded), "padded input")
    sizes = tuple(
        None if n is None else (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True)
    )
    _need(
        all(n is None or n > 0 for n in sizes),
        f"its kernel {list(kernel)} with dilation {list(dilation)} is larger than its padded "
        f"input {list(padded)}",
    )
    return sizes


def _filled(op: Op, x: Sizes, sizes: Sizes, dilation: Sequence[int]) -> None:
    """Every window of a pool holds a value of the image."""
    for n, out, k, s, d, before in zip(
        x[-len(sizes) :],
        sizes,
        op["kernel"],
        op["stride"],
        dilation,
        op["padding"]["before"],
        strict=True,
    ):
        if n is None or out is None:
            continue
        start = np.arange(out, dtype=np.int64) * s - before
        # The first tap that is not before the image.
        first = start + d * np.maximum(-(start // d), 0)
        last = start + d * (k - 1)
        _need(bool(np.all((first < n) & (first <= last))), "one of its windows holds padding only")


def _conv_sizes(op: Op, inputs: Sequence[Sizes], weight: Sequence[int]) -> Sizes:
    (x,), (out, inner, *kernel), groups = inputs, weight, op["groups"]
    _need(
        len(x) == len(weight) and _agree(x[1], inner * groups) and out % groups == 0,
        f"its weight of shape {list(weight)} in {groups} groups does not fit its input of shape "
        f"{list(x)}",
    )
    sizes = (x[0], out, *_windows(op, x, kernel, op["dilation"]))
    _bounded_work(_count(sizes) * math.prod(weight[1:]))
    return sizes


def _conv_transpose_sizes(op: Op, inputs: Sequence[Sizes], weight: Sequence[int]) -> Sizes:
    (x,), (channels, outer, *kernel), groups = inputs, weight, op["groups"]
    stride, dilation = op["stride"], op["dilation"]
    before, after = op["crop"]["before"], op["crop"]["after"]
    _spatial(op, len(kernel), stride, dilation, before, after)
    _need(
        len(x) == len(weight) and _agree(x[1], channels) and channels % groups == 0,
        f"its weight of shape {list(weight)} in {groups} groups does not fit its input of shape "
        f"{list(x)}",
    )
    full = tuple(
        None if n is None else (n - 1) * s + d * (k - 1) + 1 + max(-a, 0)
        for n, k, s, d, a in zip(x[2:], kernel, stride, dilation, after, strict=True)
    )
    sizes = (x[0], outer * groups)
    _bounded((*sizes, *full), "result before it is cropped")
    _bounded_work(_count(x) * math.prod(weight[1:]))
    cropped = tuple(
        None if n is None else n - b - max(a, 0)
        for n, b, a in zip(full, before, after, strict=True)
    )
    _need(
        all(n is None or n > 0 for n in cropped),
        f"its crop {op['crop']} leaves nothing of {list(full)}",
    )
    return (*sizes, *cropped)


def _linear_sizes(_op: Op, inputs: Sequence[Sizes], weight: Sequence[int]) -> Sizes:
    (x,) = inputs
    _need(
        len(weight) == 2 and x and _agree(x[-1], weight[1]),
        f"its weight of shape {list(weight)} does not fit its input of shape {list(x)}",
    )
    _bounded_work(_count(x) * int(weight[0] or 0))
    return (*x[:-1], weight[0])


def _broadcast(a: Sizes, b: Sizes) -> Sizes:
    rank = max(len(a), len(b))
    longer = [(*(1,) * (rank - len(sizes)), *sizes) for sizes in (a, b)]
    result = []
    for n, m in zip(*longer, strict=True):
        _need(n == 1 or m == 1 or _agree(n, m), f"shapes {list(a)} and {list(b)} do not broadcast")
        # Of an unknown size and another than 1, the known one: the unknown is 1 or equal to it.
        result.append(m if n == 1 or (n is None and m != 1) else n)
    return tuple(result)


def _elementwise_sizes(_op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    return _broadcast(*inputs)


def _matmul_sizes(_op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    a, b = inputs
    _need(
        min(len(a), len(b)) >= 2 and _agree(a[-1], b[-2]),
        f"matrices of shapes {list(a)} and {list(b)} cannot be multiplied",
    )
    sizes = (*_broadcast(a[:-2], b[:-2]), a[-2], b[-1])
    _bounded_work(_count(sizes) * _count(a[-1:]))
    return sizes


def _same_sizes(_op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    return inputs[0]


def _table_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), axis = inputs, op["axis"]
    if axis is not None:
        _need_axis(axis, x)
        _need(
            _agree(x[axis], len(op["table"])),
            f"its table has {len(op['table'])} rows for {x[axis]} channels",
        )
    return x


def _mean_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), axes = inputs, op["axes"]
    for axis in axes:
        _need_axis(axis, x)
    _need(len(set(axes)) == len(axes), f"its axes {axes} are not different ones")
    averaged = [x[axis] for axis in axes]
    if None not in averaged:
        count = _count(averaged)
        _need(count == op["count"], f"it averages {op['count']} values of an image, not {count}")
    if op["keepdims"]:
        return tuple(1 if axis in axes else n for axis, n in enumerate(x))
    return tuple(n for axis, n in enumerate(x) if axis not in axes)


def _avg_pool_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), one = inputs, [1] * len(op["kernel"])
    sizes = _windows(op, x, op["kernel"], one)
    _filled(op, x, sizes, one)
    _bounded_work(_count((*x[:-2], *sizes)) * math.prod(op["kernel"]))
    if op["rounding"] == "multiply" and None not in x[-2:]:
        per_dim = [
            _held(n or 0, out or 0, k, s, b, a, op["count_padding"])
            for n, out, k, s, b, a in zip(
                x[-2:],
                sizes,
                op["kernel"],
                op["stride"],
                op["padding"]["before"],
                op["padding"]["after"],
                strict=True,
            )
        ]
        counts = {int(rows * columns) for rows in per_dim[0] for columns in per_dim[1]}
        missing = counts.difference(op["requantization"]["count"])
        _need(not missing, f"no multiplier is given for a window of {min(missing or [0])} values")
    return (*x[:-2], *sizes)


def _held(
    size: int, out: int, kernel: int, stride: int, before: int, after: int, padding: bool
) -> set[int]:
    """How many values of one dimension the windows of a pool hold."""
    start = np.arange(out, dtype=np.int64) * stride
    low, high = (0, before + size + after) if padding else (before, before + size)
    return set((np.minimum(start + kernel, high) - np.maximum(start, low)).tolist())


def _max_pool_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,) = inputs
    sizes = _windows(op, x, op["kernel"], op["dilation"])
    _filled(op, x, sizes, op["dilation"])
    _bounded_work(_count((*x[:-2], *sizes)) * math.prod(op["kernel"]))
    return (*x[:-2], *sizes)


def _resize_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), out = inputs, (op["rows"], op["columns"])
    _need(len(x) >= 2, f"it resizes images, not tensors of {len(x)} dimensions")
    for size, positions in zip(x[-2:], out, strict=True):
        _need(size is not None, "the size of its image is not known")
        last = ((size or 0) - 1) << position_bits(op)
        inside = max(positions) <= last
        _need(inside, f"a position of {max(positions)} lies beyond the last pixel, at {last}")
    return (*x[:-2], *map(len, out))


def _pad_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), before, after = inputs, op["padding"]["before"], op["padding"]["after"]
    kept = len(x) - len(before)
    _need(len(before) == len(after) and kept >= 0, "its padding has another number of dimensions")
    padded = zip(x[kept:], before, after, strict=True)
    return (*x[:kept], *(None if n is None else n + b + a for n, b, a in padded))


def _cat_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    first, axis = inputs[0], op["axis"]
    _need_axis(axis, first)
    for other in inputs[1:]:
        _need(
            len(other) == len(first)
            and all(
                _agree(n, m) for i, (n, m) in enumerate(zip(first, other, strict=True)) if i != axis
            ),
            f"shapes {list(first)} and {list(other)} cannot be joined along axis {axis}",
        )
    joined = [sizes[axis] for sizes in inputs]
    total = None if None in joined else _sum(joined)
    known = (
        next((sizes[i] for sizes in inputs if sizes[i] is not None), None)
        for i in range(len(first))
    )
    return tuple(total if i == axis else n for i, n in enumerate(known))


def _sum(sizes: Iterable[int | None]) -> int:
    return sum(n or 0 for n in sizes)


def _reshape_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), wanted = inputs, op["shape"]
    _need(
        wanted.count(-1) <= 1 and all(n != 0 or i < len(x) for i, n in enumerate(wanted)),
        f"its input of shape {list(x)} cannot take the shape {wanted}",
    )
    sizes: list[int | None] = [x[i] if n == 0 else n for i, n in enumerate(wanted)]
    open_at = wanted.index(-1) if -1 in wanted else None
    if open_at is not None:
        sizes[open_at] = None
    if None in x:  # one dimension that is as free on both sides says nothing
        return tuple(sizes)
    count, known = _count(x), _count(sizes)
    if open_at is not None and known and count % known == 0:
        sizes[open_at] = count // known
    _need(
        None not in sizes and _count(sizes) == count,
        f"its input of shape {list(x)} cannot take the shape {wanted}",
    )
    return tuple(sizes)


def _permute_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), axes = inputs, op["axes"]
    _need(
        sorted(axes) == list(range(len(x))),
        f"its axes {axes} are no order of the {len(x)} dimensions of its input",
    )
    return tuple(x[axis] for axis in axes)


def _slice_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), axis = inputs, op["axis"]
    _need_axis(axis, x)
    size = x[axis]
    if size is None:
        return (*x[:axis], None, *x[axis + 1 :])
    kept = len(range(*slice(op["start"], op["stop"], op["step"]).indices(size)))
    return (*x[:axis], kept, *x[axis + 1 :])


def _select_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), axis, index = inputs, op["axis"], op["index"]
    _need_axis(axis, x)
    size = x[axis]
    _need(
        size is None or -size <= index < size,
        f"it selects entry {index} of a dimension of size {size}",
    )
    return (*x[:axis], *x[axis + 1 :])


def _expand_sizes(op: Op, inputs: Sequence[Sizes], _weight: Sequence[int]) -> Sizes:
    (x,), wanted = inputs, op["shape"]
    missing = len(wanted) - len(x)
    fits = missing >= 0 and -1 not in wanted[:missing]
    fits = fits and all(
        n == -1 or old == 1 or _agree(old, n) for n, old in zip(wanted[missing:], x, strict=True)
    )
    _need(fits, f"its input of shape {list(x)} does not expand to {wanted}")
    return tuple(x[i - missing] if n < 0 else n for i, n in enumerate(wanted))


def _need_axis(axis: int, sizes: Sizes) -> None:
    _need(axis < len(sizes), f"it has no dimension {axis}: its input is of shape {list(sizes)}")


# Numbers -----------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    """What the file says of an op and of all it reads and writes, before anything is computed.

    Attributes:
        op: Its entry.
        infos: Of its inputs.
        output: Of its result.
        weight: Of its weight.
        bias: Of its bias.
        shapes: Of its inputs.
        stored: Integers of the weight.
        offset: Integers of the bias.
    """

    op: Op
    infos: Sequence[TensorInfo]
    output: TensorInfo
    shapes: Sequence[Sizes]
    weight: TensorInfo | None = None
    bias: TensorInfo | None = None
    stored: Array | None = None
    offset: Array | None = None

    def scale(self, index: int = 0) -> float:
        """Of an input."""
        return float(self.infos[index].scale)


Factors: TypeAlias = "Mapping[str, list[float]]"
"""Real numbers that multipliers and shifts stand for, by the key of the op's entry."""


def _gemm_factors(call: _Operands) -> Factors:
    if call.weight is None:
        return {}
    scales = call.weight.scale.astype(np.float64).reshape(-1).tolist()
    if call.op["op"] == "conv_transpose" and call.weight.scale.ndim:
        scales *= call.op["groups"]  # each group uses the same scales in turn
    return {"requantization": [call.scale() * s / float(call.output.scale) for s in scales]}


def _add_factors(call: _Operands) -> Factors:
    twice_max = 2.0 * max(call.scale(0), call.scale(1))
    return {
        "requantization_a": [call.scale(0) / twice_max],
        "requantization_b": [call.scale(1) / twice_max],
        "requantization": [twice_max / (2.0 ** call.op["left_shift"] * float(call.output.scale))],
    }


def _product_factors(call: _Operands) -> Factors:
    return {"requantization": [call.scale(0) * call.scale(1) / float(call.output.scale)]}


def _ratio_factors(call: _Operands) -> Factors:
    return {"requantization": [call.scale() / float(call.output.scale)]}


def _extremum_factors(call: _Operands) -> Factors:
    keys = ("requantization_a", "requantization_b")
    return {key: [call.scale(i) / float(call.output.scale)] for i, key in enumerate(keys)}


def _mean_factors(call: _Operands) -> Factors:
    return {"requantization": [call.scale() / float(call.output.scale) / call.op["count"]]}


def _window_factors(call: _Operands) -> Factors:
    if call.op["rounding"] == "divide_half_away":
        return {}
    counts = call.op["requantization"]["count"]
    return {"requantization": [call.scale() / float(call.output.scale) / n for n in counts]}


Extremes: TypeAlias = "tuple[int, int] | None"
"""Smallest and largest value an accumulator takes; ``None``: not known, or there is none."""


def _gemm_extremes(call: _Operands) -> Extremes:
    """The worst case over all inputs, padding and partial sums included."""
    if call.stored is None:
        return None
    low, high = call.infos[0].offsets
    ends: list[int] = []
    for weight in _weights_that_meet(call.op, call.stored):
        rows = weight.reshape(weight.shape[0], -1).astype(np.int64)
        positive = np.maximum(rows, 0).sum(axis=1).tolist()
        negative = np.minimum(rows, 0).sum(axis=1).tolist()
        start = [0] * len(rows) if call.offset is None else call.offset.tolist()
        # Python integers: products may exceed 64 bits.
        for p, n, b in zip(positive, negative, start, strict=True):
            ends += [b + p * high + n * low, b + p * low + n * high]
    return min(ends), max(ends)


def _weights_that_meet(op: Op, weight: Array) -> Iterator[Array]:
    """Weights that one sum can meet at once, output channels first.

    A transposed convolution of stride ``s`` gives neighbouring outputs different taps: those whose
    dilated position is the same modulo ``s``.
    """
    if op["op"] != "conv_transpose":
        yield weight
        return
    kernel = weight.shape[2:]
    split = weight.reshape(op["groups"], -1, *weight.shape[1:]).swapaxes(1, 2)
    weight = split.reshape(-1, split.shape[2], *kernel)
    phases: list[list[list[int]]] = []
    for k, s, d in zip(kernel, op["stride"], op["dilation"], strict=True):
        by_phase: dict[int, list[int]] = {}
        for tap in range(k):
            by_phase.setdefault(tap * d % s, []).append(tap)
        phases.append(list(by_phase.values()))
    for taps in itertools.product(*phases):
        met = weight
        for dim, chosen in enumerate(taps):
            met = met.take(chosen, axis=dim + 2)
        yield met


def _add_extremes(call: _Operands) -> Extremes:
    (low_a, high_a), (low_b, high_b) = (info.offsets for info in call.infos)
    ends = [low_a, high_a, low_b, high_b]
    # Multipliers are at most one half, so a sum stays between its shifted operands.
    if call.op["op"] == "sub":
        ends += [(low_a - high_b) // 2, -((low_b - high_a) // 2)]
    shift = call.op["left_shift"]
    return min(ends) << shift, max(ends) << shift


def _mul_extremes(call: _Operands) -> Extremes:
    a, b = (info.offsets for info in call.infos)
    products = [x * y for x in a for y in b]
    return min(products), max(products)


def _matmul_extremes(call: _Operands) -> Extremes:
    terms, products = call.shapes[0][-1], _mul_extremes(call)
    if terms is None or products is None:
        return None
    return terms * products[0], terms * products[1]


def _mean_extremes(call: _Operands) -> Extremes:
    low, high = call.infos[0].offsets
    return call.op["count"] * low, call.op["count"] * high


def _window_extremes(call: _Operands) -> Extremes:
    info, count = call.infos[0], math.prod(call.op["kernel"])
    low, high = info.offsets
    if call.op["rounding"] == "divide_half_away":  # summed and divided with their zero point
        low, high = info.quant_min, info.quant_max
    return count * low, count * high


def _signed_bits(low: int, high: int) -> int:
    return max((value if value >= 0 else ~value).bit_length() for value in (low, high)) + 1


# Fields ------------------------------------------------------------------------------------------


def _shown(value: object) -> str:
    """A value in a message: short, and printable whatever it holds."""
    if isinstance(value, (Mapping, list, tuple)):
        return "a mapping" if isinstance(value, Mapping) else f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(at: str, legal: str, value: object) -> NoReturn:
    raise BundleError(f"{at} must be {legal}, not {_shown(value)}")


def _inside(at: str, key: str) -> str:
    """``ops[3].clamp``, ``tensors["conv.weight"]``."""
    if key.isidentifier() and key.isascii():
        return f"{at}.{key}" if at else key
    return f"{at}[{_shown(key)}]"


class _Field(Protocol):
    """What a part of the file may be."""

    def check(self, value: Any, at: str) -> None:
        """Raise a :class:`BundleError` that says where the part stands and what is legal."""


class _Integer(NamedTuple):
    low: int
    high: int

    def check(self, value: Any, at: str) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            _wrong(at, f"a whole number from {self.low} to {self.high}", value)

    def holds_all(self, values: Sequence[Any]) -> bool:
        """Whether all of a list are legal."""
        return {*map(type, values)} <= {int} and all(
            self.low <= value <= self.high for value in values
        )


class _Scalar(NamedTuple):
    """What ``holds`` is true of."""

    legal: str
    holds: Callable[[Any], bool]

    def check(self, value: Any, at: str) -> None:
        if not self.holds(value):
            _wrong(at, self.legal, value)


def _text(least: int = 1, most: int = 4096) -> _Scalar:
    legal = f"text of {least} to {most} characters"
    return _Scalar(legal, lambda value: type(value) is str and least <= len(value) <= most)


def _digits(length: int) -> _Scalar:
    """Hexadecimal digits, in small letters."""
    found = re.compile(f"[0-9a-f]{{{length}}}")
    legal = f"{length} hexadecimal digits"
    return _Scalar(legal, lambda v: type(v) is str and found.fullmatch(v) is not None)


def _one_of(*values: str) -> _Scalar:
    legal = " or ".join(map(json.dumps, values))
    return _Scalar(legal, lambda value: type(value) is str and value in values)


_BOOLEAN = _Scalar("true or false", lambda value: type(value) is bool)
# Which float32 can express.
_POSITIVE = _Scalar("a number above 0", lambda v: type(v) in (int, float) and 0.0 < v < 2.0**128)


class _OrNull(NamedTuple):
    field: _Field

    def check(self, value: Any, at: str) -> None:
        if value is not None:
            self.field.check(value, at)


class _List(NamedTuple):
    field: _Field
    least: int = 0
    most: int = MOST_ELEMENTS

    def check(self, value: Any, at: str) -> None:
        if type(value) is not list or not self.least <= len(value) <= self.most:
            counts = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            _wrong(at, f"a list of {counts}", value)
        if isinstance(self.field, _Integer) and self.field.holds_all(value):
            return  # tables have millions of entries
        for index, item in enumerate(value):
            self.field.check(item, f"{at}[{index}]")


class _Table(NamedTuple):
    """A list, or one for each channel."""

    field: _Field

    def check(self, value: Any, at: str) -> None:
        rows = isinstance(value, list) and any(isinstance(row, list) for row in value)
        row = _List(self.field, 1)
        (_List(row, 1) if rows else row).check(value, at)


class _OneOrList(NamedTuple):
    field: _Field

    def check(self, value: Any, at: str) -> None:
        (_List(self.field, 1) if isinstance(value, list) else self.field).check(value, at)


class _Names(NamedTuple):
    """Anything by name."""

    field: _Field

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            _wrong(at, "a mapping", value)
        for key, item in value.items():
            _text().check(key, f"a name in {at}")
            self.field.check(item, _inside(at, key))


class _Record(NamedTuple):
    """These fields, all of them but the optional ones, and no others."""

    fields: Mapping[str, _Field]
    optional: frozenset[str] = frozenset()

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            _wrong(at or "the description", "a mapping", value)
        missing = self.fields.keys() - self.optional - value.keys()
        if missing:
            raise BundleError(f"{at or 'the description'} lacks {', '.join(sorted(missing))}")
        for key, item in value.items():
            if key not in self.fields:
                legal = ", ".join(self.fields)
                raise BundleError(
                    f"{_inside(at, str(key))} is no field of the format; there are {legal}"
                )
            self.fields[key].check(item, _inside(at, key))


class _Op:
    """One of the ops, each with fields of its own."""

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            _wrong(at, "a mapping", value)
        kind = value.get("op")
        if type(kind) is not str or kind not in _OPS:
            raise BundleError(f"{at}.op: no op {_shown(kind)} is known; use a newer reader")
        _OPS[kind].record.check(value, at)
        if kind == "avg_pool2d" and (value["rounding"] == "multiply") != (
            "requantization" in value
        ):
            raise BundleError(f"{at} has a requantization when its rounding is multiply, only then")


def _padding(before: _Field, after: _Field | None = None) -> _Record:
    return _Record({"before": before, "after": after or before})


_SIZE = _Integer(0, MOST_ELEMENTS)
_RANK = 16
_AXIS = _Integer(0, _RANK - 1)
_INT32_FIELD = _Integer(_INT32_MIN, _INT32_MAX)
_INT64 = _Integer(-(2**63), 2**63 - 1)
_SHAPE = _List(_OrNull(_SIZE), 0, _RANK)
_NAME = _text()
_FROM_ONE = _List(_Integer(1, _INT32_MAX), 1, 3)
_FROM_ZERO = _List(_SIZE, 1, 3)
_PAIR = _List(_Integer(1, _INT32_MAX), 2, 2)
_PAIR_PADDING = _padding(_List(_SIZE, 2, 2))
_RULE = _one_of(*_RULES)
# The rule int64_one_rounding takes left shifts of up to 7 only: see _check_factors.
_MULTIPLIER, _SHIFT = _Integer(0, _INT32_MAX), _Integer(-31, 30)
_FACTOR = _Record({"rule": _RULE, "multiplier": _MULTIPLIER, "shift": _SHIFT})
_FACTORS = _Record({"rule": _RULE, "multiplier": _List(_MULTIPLIER, 1), "shift": _List(_SHIFT, 1)})
_COUNTED = _Record({"count": _List(_Integer(1, MOST_TAPS), 1), **_FACTORS.fields})
_POSITIONS = _List(_Integer(0, _INT32_MAX), 1)
_FRACTION = _Integer(_POSITION_BITS, 19)
_CLAMP: dict[str, _Field] = {"clamp": _List(_INT32_FIELD, 2, 2)}
_SCALED: dict[str, _Field] = {"requantization": _FACTOR, **_CLAMP}
_WEIGHTED: dict[str, _Field] = {
    "weight": _NAME,
    "bias": _OrNull(_NAME),
    "requantization": _FACTORS,
    **_CLAMP,
}
_BOTH_SCALED: dict[str, _Field] = {"requantization_a": _FACTOR, "requantization_b": _FACTOR}
_EXTREMUM: dict[str, _Field] = {**_BOTH_SCALED, **_CLAMP}
_TO_SHAPE: dict[str, _Field] = {"shape": _List(_Integer(-1, MOST_ELEMENTS), 0, _RANK)}
_OF_EVERY_OP: dict[str, _Field] = {
    "name": _NAME,
    "module": _text(0),
    "source": _text(0),
    "family": _text(0),
    "op": _text(),
    "inputs": _List(_NAME, 1),
    "output": _NAME,
}
_ACCUMULATOR: dict[str, _Field] = {
    "accumulator": _Record({"bits": _Integer(1, 128), "width": _Integer(32, 64)})
}


class _Kind(NamedTuple):
    """An op of the format.

    Attributes:
        compute: From stored integers to stored integers.
        sizes: Of its result, from its entry, those of its inputs and that of its weight.
        fields: Of its entry, besides those of every op.
        inputs: How many there may be, at least and at most.
        moves: Whether its result holds integers of its inputs, and padding, in their scale.
        factors: What its multipliers and shifts stand for, if it has any.
        extremes: Of its accumulator, if it has one.
        optional: Fields that its entry may lack.
    """

    compute: Callable[[Call], Array]
    sizes: Callable[[Op, Sequence[Sizes], Sequence[int]], Sizes]
    fields: Mapping[str, _Field]
    inputs: tuple[int, int] = (1, 1)
    moves: bool = False
    factors: Callable[[_Operands], Factors] | None = None
    extremes: Callable[[_Operands], Extremes] | None = None
    optional: frozenset[str] = frozenset()

    @property
    def record(self) -> _Record:
        """All fields of its entry."""
        sums = {} if self.extremes is None else _ACCUMULATOR
        # Products over a size that is not known have no bound.
        optional = self.optional | {"accumulator"}
        return _Record({**_OF_EVERY_OP, **self.fields, **sums}, optional)


_OPS: Mapping[str, _Kind] = {
    "conv": _Kind(
        _conv,
        _conv_sizes,
        {
            "stride": _FROM_ONE,
            "padding": _padding(_FROM_ZERO),
            "dilation": _FROM_ONE,
            "groups": _Integer(1, MOST_ELEMENTS),
            **_WEIGHTED,
        },
        factors=_gemm_factors,
        extremes=_gemm_extremes,
    ),
    "conv_transpose": _Kind(
        _conv_transpose,
        _conv_transpose_sizes,
        {
            "stride": _FROM_ONE,
            "crop": _padding(_FROM_ZERO, _List(_Integer(-MOST_ELEMENTS, MOST_ELEMENTS), 1, 3)),
            "dilation": _FROM_ONE,
            "groups": _Integer(1, MOST_ELEMENTS),
            **_WEIGHTED,
        },
        factors=_gemm_factors,
        extremes=_gemm_extremes,
    ),
    "linear": _Kind(
        _linear, _linear_sizes, _WEIGHTED, factors=_gemm_factors, extremes=_gemm_extremes
    ),
    **dict.fromkeys(
        ("add", "sub"),
        _Kind(
            _add,
            _elementwise_sizes,
            {"left_shift": _Integer(0, 30), **_BOTH_SCALED, **_SCALED},
            (2, 2),
            factors=_add_factors,
            extremes=_add_extremes,
        ),
    ),
    "mul": _Kind(
        _mul, _elementwise_sizes, _SCALED, (2, 2), factors=_product_factors, extremes=_mul_extremes
    ),
    "matmul": _Kind(
        _matmul, _matmul_sizes, _SCALED, (2, 2), factors=_product_factors, extremes=_matmul_extremes
    ),
    "requantize": _Kind(_requantize, _same_sizes, _SCALED, factors=_ratio_factors),
    "clamp": _Kind(_clamp, _same_sizes, _CLAMP),
    "table": _Kind(_table, _table_sizes, {"axis": _OrNull(_AXIS), "table": _Table(_INT32_FIELD)}),
    **dict.fromkeys(
        ("maximum", "minimum"),
        _Kind(_extremum, _elementwise_sizes, _EXTREMUM, (2, 2), factors=_extremum_factors),
    ),
    "mean": _Kind(
        _mean,
        _mean_sizes,
        {
            "axes": _List(_AXIS, 1, _RANK),
            "keepdims": _BOOLEAN,
            "count": _Integer(1, MOST_ELEMENTS),
            **_SCALED,
        },
        factors=_mean_factors,
        extremes=_mean_extremes,
    ),
    "avg_pool2d": _Kind(
        _avg_pool2d,
        _avg_pool_sizes,
        {
            "kernel": _PAIR,
            "stride": _PAIR,
            "padding": _PAIR_PADDING,
            "count_padding": _BOOLEAN,
            "rounding": _one_of("divide_half_away", "multiply"),
            "requantization": _COUNTED,
            **_CLAMP,
        },
        factors=_window_factors,
        extremes=_window_extremes,
        optional=frozenset({"requantization"}),  # a pool on one grid divides
    ),
    "max_pool2d": _Kind(
        _max_pool2d,
        _max_pool_sizes,
        {"kernel": _PAIR, "stride": _PAIR, "padding": _PAIR_PADDING, "dilation": _PAIR},
        moves=True,
    ),
    "resize_bilinear": _Kind(
        _resize_bilinear,
        _resize_sizes,
        {"position_bits": _FRACTION, "rows": _POSITIONS, "columns": _POSITIONS},
        moves=True,
        optional=frozenset({"position_bits"}),  # which files of version 2 lack
    ),
    "pad": _Kind(
        lambda call: _pad(call.inputs[0], call.op, call.infos[0].zero_point),
        _pad_sizes,
        {"padding": _padding(_List(_SIZE, 0, _RANK))},
        moves=True,
    ),
    "cat": _Kind(
        lambda call: np.concatenate(call.inputs, axis=call.op["axis"]),
        _cat_sizes,
        {"axis": _AXIS},
        (1, MOST_ELEMENTS),
        moves=True,
    ),
    "identity": _Kind(lambda call: call.inputs[0], _same_sizes, {}, moves=True),
    "reshape": _Kind(_reshape, _reshape_sizes, _TO_SHAPE, moves=True),
    "permute": _Kind(
        lambda call: call.inputs[0].transpose(call.op["axes"]),
        _permute_sizes,
        {"axes": _List(_AXIS, 0, _RANK)},
        moves=True,
    ),
    "slice": _Kind(
        _slice,
        _slice_sizes,
        {
            "axis": _AXIS,
            "start": _INT64,
            "stop": _OrNull(_INT64),
            "step": _Integer(1, 2**63 - 1),
        },
        moves=True,
    ),
    "select": _Kind(
        lambda call: call.inputs[0].take(call.op["index"], axis=call.op["axis"]),
        _select_sizes,
        {"axis": _AXIS, "index": _Integer(-MOST_ELEMENTS, MOST_ELEMENTS)},
        moves=True,
    ),
    "expand": _Kind(_expand, _expand_sizes, _TO_SHAPE, moves=True),
}

_TENSOR = _Record(
    {
        "kind": _one_of("activation", "weight", "bias", "constant"),
        "dtype": _one_of("int8", "int16", "int32"),
        "bits": _Integer(1, 32),
        "shape": _SHAPE,
        "scale": _Record({"bits": _OneOrList(_digits(8)), "decimal": _OneOrList(_POSITIVE)}),
        "axis": _OrNull(_AXIS),
        "zero_point": _INT32_FIELD,
        "quant_min": _INT32_FIELD,
        "quant_max": _INT32_FIELD,
    }
)
_BORDER_DTYPES = ("int8", "uint8", "int16")
_BORDER_OFFSETS = {"stored": 0, "stored_plus_128": 128}
"""Rules of inputs and outputs that are integers: what is added to those of their tensor."""
_DOCUMENT = _Record(
    {
        "format": _one_of(FORMAT),
        "version": _Integer(1, VERSION),
        "checksum": _digits(64),
        "arithmetic": _one_of("fixed_point"),
        "weights": _Record({"file": _text(), "sha256": _digits(64)}),
        "inputs": _List(
            _Record(
                {
                    "name": _NAME,
                    "dtype": _one_of("float32", *_BORDER_DTYPES),
                    "rule": _one_of("divide_float32_half_away", *_BORDER_OFFSETS),
                    "shape": _SHAPE,
                    "tensors": _List(_NAME),
                }
            )
        ),
        "outputs": _List(
            _Record(
                {
                    "tensor": _NAME,
                    "dtype": _one_of("float32", *_BORDER_DTYPES),
                    "rule": _one_of("multiply_float64", *_BORDER_OFFSETS),
                    "shape": _SHAPE,
                }
            )
        ),
        "tensors": _Names(_TENSOR),
        "ops": _List(_Op()),
    },
    frozenset({"checksum"}),
)


# Checking ----------------------------------------------------------------------------------------


def check_description(
    description: Mapping[str, Any], constants: Mapping[str, Array]
) -> dict[str, TensorInfo]:
    """Check all that a description says, against itself and against the stored integers.

    Args:
        description: The JSON document.
        constants: Stored integers by tensor name.

    Returns:
        What the document says of each tensor.

    Raises:
        BundleError: It is not legal; with the place in the document and what would be.
    """
    _DOCUMENT.check(description, "")
    for position, op in enumerate(description["ops"]):
        if op["op"] == "resize_bilinear":
            stated = "position_bits" in op
            if stated != (description["version"] > 2):
                raise BundleError(
                    f"ops[{position}] has position_bits from version 3 on, and none before"
                )
    if ("checksum" in description) != (description["version"] > 1):
        raise BundleError("a description has a checksum from version 2 on, and none before")
    tensors = {
        name: _tensor_info(_inside("tensors", name), entry)
        for name, entry in description["tensors"].items()
    }
    _check_constants(tensors, constants)
    known: dict[str, Sizes] = {name: tensors[name].shape for name in constants}
    for index, entry in enumerate(description["inputs"]):
        for name in entry["tensors"]:
            at = f"inputs[{index}].tensors"
            _check_made(name, tensors, known, at)
            _same_shape(at, entry["shape"], tensors[name].shape)
            _check_border(f"inputs[{index}]", entry, tensors[name])
            known[name] = tensors[name].shape
    for index, op in enumerate(description["ops"]):
        at = f"ops[{index}]"
        call = _operands(op, tensors, constants, known, at)
        try:
            sizes = _result(op, call.shapes, () if call.stored is None else call.stored.shape)
            _check_numbers(call)
        except BundleError as exc:
            raise BundleError(f"{at} ({op['name']}): {exc}") from exc
        _same_shape(f"{at}.output", sizes, call.output.shape)
        known[op["output"]] = call.output.shape
    for index, entry in enumerate(description["outputs"]):
        at = f"outputs[{index}]"
        if entry["tensor"] not in known:
            raise BundleError(f"{at}.tensor: {_shown(entry['tensor'])} is not computed")
        if tensors[entry["tensor"]].kind in ("weight", "bias"):
            raise BundleError(f"{at}.tensor: {_shown(entry['tensor'])} is a parameter")
        _same_shape(f"{at}.shape", entry["shape"], tensors[entry["tensor"]].shape)
        _check_border(at, entry, tensors[entry["tensor"]])
    if absent := tensors.keys() - known.keys():
        raise BundleError(f"tensors: nothing computes {_listed(absent)}")
    return tensors


def _check_border(at: str, entry: Mapping[str, Any], info: TensorInfo) -> None:
    """Refuse a dtype and a rule of an input or output that do not go together."""
    offset = _BORDER_OFFSETS.get(entry["rule"])
    wanted = "float32" if offset is None else "uint8" if offset else info.dtype
    if entry["dtype"] != wanted or (offset and info.dtype != "int8"):
        raise BundleError(
            f"{at}.dtype: {entry['dtype']} does not go with the rule {entry['rule']} and a tensor "
            f"of {info.dtype}"
        )


def _listed(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(_shown, ordered[:most])) + more


def _same_shape(at: str, found: Sequence[int | None], described: Sequence[int | None]) -> None:
    same = len(found) == len(described) and all(map(_agree, found, described))
    if not same:
        raise BundleError(
            f"{at}: its shape is {list(found)}, but the tensor is described as {list(described)}"
        )


def _check_made(
    name: str, tensors: Mapping[str, TensorInfo], known: Mapping[str, Sizes], at: str
) -> None:
    """``name`` is an activation that nothing has computed yet."""
    if name not in tensors:
        raise BundleError(f"{at}: {_shown(name)} is not described in tensors")
    if tensors[name].kind != "activation" or name in known:
        raise BundleError(f"{at}: {_shown(name)} has its values already; name another tensor")


def _tensor_info(at: str, entry: Mapping[str, Any]) -> TensorInfo:
    low, high, zero_point = entry["quant_min"], entry["quant_max"], entry["zero_point"]
    if not low <= zero_point <= high:
        raise BundleError(
            f"{at}: quant_min <= zero_point <= quant_max must hold, not {low}, {zero_point}, {high}"
        )
    dtype, bits, kind = np.dtype(entry["dtype"]), _signed_bits(low, high), entry["kind"]
    if entry["bits"] != bits:
        raise BundleError(f"{at}.bits must be {bits}, what {low} to {high} needs: {entry['bits']}")
    if bits > 8 * dtype.itemsize or (bits > 16 and kind != "bias"):
        raise BundleError(f"{at}: {low} to {high} is too wide for {dtype} in a tensor of {kind}s")
    if kind in ("weight", "bias") and zero_point:
        raise BundleError(f"{at}.zero_point of a {kind} must be 0, not {zero_point}")
    scale, shape, axis = _scale(entry["scale"]["bits"]), tuple(entry["shape"]), entry["axis"]
    if kind != "activation" and None in shape:
        raise BundleError(f"{at}.shape of stored integers must have numbers only")
    _bounded(shape, f"tensor {at}")
    if not (np.isfinite(scale).all() and (scale >= np.finfo(np.float32).tiny).all()):
        raise BundleError(f"{at}.scale must be positive, finite and normal")
    if scale.tolist() != np.array(entry["scale"]["decimal"], dtype=np.float64).tolist():
        raise BundleError(f"{at}.scale: its bits and its decimal differ")
    if axis is None:
        fits = scale.ndim == 0
    else:
        fits = kind in ("weight", "bias") and axis < len(shape) and scale.shape == (shape[axis],)
    if not fits:
        raise BundleError(
            f"{at}.scale must be one number for each entry of its axis (weights and biases), or "
            "one number and no axis"
        )
    return TensorInfo(kind, dtype, shape, scale, zero_point, low, high)


def _scale(bits: str | Sequence[str]) -> npt.NDArray[np.float32]:
    """float32 numbers from their bits in hexadecimal, most significant digit first."""
    words = bits if isinstance(bits, str) else "".join(bits)
    values = np.frombuffer(bytes.fromhex(words), dtype=">f4").astype(np.float32)
    return values.reshape(()) if isinstance(bits, str) else values


def _check_constants(tensors: Mapping[str, TensorInfo], constants: Mapping[str, Array]) -> None:
    stored = {name for name, info in tensors.items() if info.kind != "activation"}
    if stored != constants.keys():
        odd = _listed(stored ^ constants.keys())
        raise BundleError(f"the two files disagree about which tensors are stored: {odd}")
    for name, array in constants.items():
        info, at = tensors[name], _inside("tensors", name)
        if array.dtype != info.dtype or array.shape != info.shape:
            raise BundleError(
                f"{at} is described as {info.dtype} of shape {list(info.shape)}, but stored as "
                f"{array.dtype} of shape {list(array.shape)}"
            )
        _check_range(at, array, info)


def _check_range(at: str, array: Array, info: TensorInfo) -> None:
    if array.size and not info.quant_min <= array.min() <= array.max() <= info.quant_max:
        raise BundleError(
            f"{at} holds {array.min()} to {array.max()}, outside of its range {info.quant_min} to "
            f"{info.quant_max}"
        )


def _operands(
    op: Op,
    tensors: Mapping[str, TensorInfo],
    constants: Mapping[str, Array],
    known: Mapping[str, Sizes],
    at: str,
) -> _Operands:
    """All that an op reads and writes, which must exist and be of the right kind."""
    least, most = _OPS[op["op"]].inputs
    if not least <= len(op["inputs"]) <= most:
        raise BundleError(f"{at}.inputs must be {least} tensors, not {len(op['inputs'])}")
    read: list[tuple[str, str, tuple[str, ...]]] = [
        (f"inputs[{i}]", name, ("activation", "constant")) for i, name in enumerate(op["inputs"])
    ]
    read += [(role, op[role], (role,)) for role in ("weight", "bias") if op.get(role) is not None]
    for role, name, kinds in read:
        if name not in known:
            raise BundleError(f"{at}.{role}: nothing before it computes {_shown(name)}")
        if tensors[name].kind not in kinds:
            raise BundleError(f"{at}.{role}: {_shown(name)} is a {tensors[name].kind}")
    _check_made(op["output"], tensors, known, f"{at}.output")
    weight, bias = op.get("weight"), op.get("bias")
    return _Operands(
        op,
        [tensors[name] for name in op["inputs"]],
        tensors[op["output"]],
        [known[name] for name in op["inputs"]],
        None if weight is None else tensors[weight],
        None if bias is None else tensors[bias],
        None if weight is None else constants[weight],
        None if bias is None else constants[bias],
    )


def _result(op: Op, inputs: Sequence[Sizes], weight: Sequence[int]) -> Sizes:
    """Sizes of the result of an op.

    Raises:
        BundleError: The op does not fit its inputs, or would need too much memory or time.
    """
    kind = _OPS[op["op"]]
    if "weight" in kind.fields:
        _need(
            0 not in weight and len(weight) - 2 in ((0,) if op["op"] == "linear" else (1, 2, 3)),
            f"its weight has the shape {list(weight)}",
        )
    sizes = kind.sizes(op, inputs, weight)
    _bounded(sizes)
    return sizes


def _check_numbers(call: _Operands) -> None:
    """Ranges, scales, multipliers and the accumulator of an op agree."""
    op, output, kind = call.op, call.output, _OPS[call.op["op"]]
    low, high = op.get("clamp", (output.quant_min, output.quant_max))
    _need(
        output.quant_min <= low <= high <= output.quant_max,
        f"clamp must lie within {output.quant_min} to {output.quant_max}, not {low} to {high}",
    )
    divides = op.get("rounding") == "divide_half_away"
    if kind.moves or divides or op["op"] == "clamp":
        for info in call.infos:
            same = info.scale == output.scale and info.zero_point == output.zero_point
            _need(same, "its inputs and its output must have one scale and zero point")
            inside = output.quant_min <= info.quant_min and info.quant_max <= output.quant_max
            if kind.moves:
                _need(inside and info.dtype == output.dtype, "its output must hold all its inputs")
    if op["op"] == "table":
        _check_table(call)
    if call.weight is not None:
        _check_weighted(call)
    for key, reals in (kind.factors(call) if kind.factors else {}).items():
        _check_factors(op[key], reals, key)
    extremes = kind.extremes(call) if kind.extremes else None
    if extremes is not None:
        bits = _signed_bits(*extremes)
        # Never above 64: factors have 16 and 17 bits, and there are 2**28 of them.
        said = op.get("accumulator", {}).get("bits", bits)
        _need(said == bits, f"accumulator.bits must be {bits}, not {said}")
    if "accumulator" in op:
        if "requantization" in op:
            wide = op["requantization"]["rule"] == "int64_one_rounding"
        else:
            wide = max(info.quant_max - info.quant_min for info in (*call.infos, output)) > 255
        width, said = 64 if wide else 32, op["accumulator"]["width"]
        _need(said == width, f"accumulator.width must be {width}, not {said}")


def _check_table(call: _Operands) -> None:
    (info,), output, axis = call.infos, call.output, call.op["axis"]
    rows = [call.op["table"]] if axis is None else call.op["table"]
    levels = info.quant_max - info.quant_min + 1
    for row in rows:
        _need(
            isinstance(row, list) and len(row) == levels,
            f"table must have an entry for each of the {levels} integers of the input"
            + ("" if axis is None else ", in a row for each channel"),
        )
        _need(
            output.quant_min <= min(row) and max(row) <= output.quant_max,
            f"table must hold numbers from {output.quant_min} to {output.quant_max}",
        )


def _check_weighted(call: _Operands) -> None:
    """Weight, bias and multipliers are as many as there are output channels."""
    op, weight, bias = call.op, call.weight, call.bias
    if weight is None:
        return
    shape, transposed = weight.shape, op["op"] == "conv_transpose"
    channels = _count(shape[1:2]) * op["groups"] if transposed else _count(shape[:1])
    axis = 1 if transposed else 0
    _need(
        weight.scale.ndim == 0 or weight.scale.shape == (shape[axis],),
        f"its weight must have one scale, or one for each entry of dimension {axis}",
    )
    scales = weight.scale.reshape(-1)
    if transposed and weight.scale.ndim:
        scales = np.tile(scales, op["groups"])
    if bias is None:
        return
    _need(bias.shape == (channels,), f"its bias must have the shape [{channels}]")
    unit = call.infos[0].scale * scales
    _need(
        np.array_equal(bias.scale.reshape(-1), unit),
        "the scale of its bias must be that of its input times that of its weight",
    )


def _check_factors(entry: Mapping[str, Any], reals: Sequence[float], key: str) -> None:
    """Multipliers and shifts are those of the scales, up to the rounding of 31 bits."""
    one = isinstance(entry["multiplier"], int)
    multipliers = [entry["multiplier"]] if one else entry["multiplier"]
    shifts = [entry["shift"]] if one else entry["shift"]
    _need(
        len(multipliers) == len(shifts) == len(reals),
        f"{key} must have {len(reals)} multipliers and shifts",
    )
    if "count" in entry:
        _need(len(entry["count"]) == len(set(entry["count"])), f"{key}.count has a number twice")
    most = _MOST_SHIFT[entry["rule"]]
    for index, (multiplier, shift, real) in enumerate(zip(multipliers, shifts, reals, strict=True)):
        at = "" if one else f"[{index}]"
        _need(
            shift <= most,
            f"{key}.shift{at} of the rule {entry['rule']} must be {most} or less, not {shift}",
        )
        # A multiplier has 31 bits, of a mean 29; what is below 2**-32 is rounded to 0.
        error = abs(multiplier * 2.0 ** (shift - 31) - real)
        _need(
            error <= max(real * 2.0**-28, 2.0**-32),
            f"{key}{at} is {multiplier * 2.0 ** (shift - 31):.9g}, but the scales give {real:.9g}",
        )


# The network -------------------------------------------------------------------------------------


class NumpyReference:
    """A network of integers, run with NumPy.

    Args:
        description: The JSON document.
        constants: Stored integers of weights, biases and constants, by name.

    Attributes:
        description: The JSON document.
        tensors: What it says of each tensor, by name.
        constants: Stored integers of weights, biases and constants, by name.

    Raises:
        BundleError: The description is not legal; see :func:`check_description`.
    """

    def __init__(self, description: Mapping[str, Any], constants: Mapping[str, Array]) -> None:
        self.description = description
        self.constants = dict(constants)
        self.tensors = check_description(description, self.constants)
        self._last_use = _last_uses(description)

    @classmethod
    def load(cls: type[_Reference], path: str | os.PathLike[str]) -> _Reference:
        """Read a bundle; all of it is checked.

        Args:
            path: Of both files, without a suffix or with that of either.

        Raises:
            BundleError: A file is missing, damaged or of a newer version; the two do not belong
                together; or the network they describe cannot be run.
        """
        json_file, weights_file = bundle_files(path)
        text = _read_file(json_file, MOST_BYTES)
        description = _parsed(json_file, text)
        digits = str(description.get("checksum"))
        if description["version"] > 1 and checksum(text, digits) != digits:
            raise BundleError(
                f"{json_file} was changed after it was written (its SHA-256 is not its checksum); "
                "save the bundle again"
            )
        try:
            _DOCUMENT.check(description, "")
        except BundleError as exc:
            raise BundleError(f"{json_file}: {exc}") from exc
        data = _read_file(weights_file, _weights_size(description))
        if hashlib.sha256(data).hexdigest() != description["weights"]["sha256"]:
            raise BundleError(
                f"{weights_file} is not the file that {json_file} was written with (their SHA-256 "
                "differ): one of the two was changed or replaced; save the bundle again"
            )
        try:
            constants = safetensors.numpy.load(data)
        # A dtype that NumPy has no name for is a KeyError there.
        except (safetensors.SafetensorError, KeyError, ValueError) as exc:
            raise BundleError(f"{weights_file} cannot be read: {exc}") from exc
        try:
            return cls(description, constants)
        except BundleError as exc:
            raise BundleError(f"{json_file}: {exc}") from exc

    def __call__(self, *inputs: Array) -> Array | tuple[Array, ...]:
        """Compute the network.

        Args:
            inputs: arrays of the dtypes of ``description["inputs"]``, in their order. Sizes are
                those of capture, except that the first dimension, the batch, may differ.

        Returns:
            One array, or a tuple where the network has several outputs, of the dtypes of
            ``description["outputs"]``.

        Raises:
            BundleError: Number, dtype or shape of the inputs do not fit, or they hold NaN.
        """
        return self._dequantized(self.run(self.quantize(*inputs)))

    def with_integers(self, *inputs: Array) -> tuple[Array | tuple[Array, ...], dict[str, Array]]:
        """Outputs as of a call, and the stored integers of every activation by tensor name."""
        values = self.run(self.quantize(*inputs), keep=True)
        return self._dequantized(values), values

    def quantize(self, *inputs: Array) -> dict[str, Array]:
        """Stored integers of the network's inputs, by tensor name."""
        entries = self.description["inputs"]
        if len(inputs) != len(entries):
            names = ", ".join(entry["name"] for entry in entries)
            raise BundleError(f"the network takes {len(entries)} inputs ({names}): {len(inputs)}")
        stored = {}
        for entry, value in zip(entries, inputs, strict=True):
            array = np.asarray(value)
            _check_shape(f"input {entry['name']}", entry["shape"], array)
            for name in entry["tensors"]:
                stored[name] = _taken(array, entry, self.tensors[name])
        return stored

    def run(self, stored: Mapping[str, Array], *, keep: bool = False) -> dict[str, Array]:
        """Compute on integers: from those of the inputs to those of the outputs.

        Args:
            stored: Stored integers of the inputs, by tensor name.
            keep: Return every activation, not only the outputs.

        Raises:
            BundleError: An input is missing, or its dtype, shape or range is not that of its
                tensor; a batch of this size does not fit an op, or needs too much memory.
        """
        wanted = {name for entry in self.description["inputs"] for name in entry["tensors"]}
        if wanted != stored.keys():
            raise BundleError(
                f"the network starts from the tensors {', '.join(sorted(wanted))}, not from "
                f"{', '.join(sorted(stored)) or 'none'}"
            )
        for name, array in stored.items():
            info = self.tensors[name]
            if array.dtype != info.dtype:
                raise BundleError(f"tensor {name} is of dtype {info.dtype}, got {array.dtype}")
            _check_shape(f"tensor {name}", info.shape, array)
            _check_range(f"tensor {name}", array, info)
        values = {**self.constants, **stored}
        self.sizes({name: array.shape for name, array in stored.items()})
        for index, op in enumerate(self.description["ops"]):
            values[op["output"]] = self._compute(op, values)
            if not keep:
                for name in self._last_use.get(index, ()):
                    del values[name]
        return {name: value for name, value in values.items() if name not in self.constants}

    def sizes(self, inputs: Mapping[str, Sizes]) -> dict[str, Sizes]:
        """Sizes of every tensor, from those of the inputs, by tensor name; nothing is computed.

        Raises:
            BundleError: An op does not fit its inputs, or needs too much memory.
        """
        sizes: dict[str, Sizes] = {name: value.shape for name, value in self.constants.items()}
        sizes |= inputs
        for op in self.description["ops"]:
            weight = () if "weight" not in op else self.constants[op["weight"]].shape
            read = [sizes[name] for name in op["inputs"]]
            try:
                sizes[op["output"]] = _result(op, read, weight)
            except BundleError as exc:
                raise BundleError(f"{op['name']} ({op['op']}): {exc}") from exc
        return sizes

    def _compute(self, op: Op, values: Mapping[str, Array]) -> Array:
        call = Call(
            op,
            [values[name] for name in op["inputs"]],
            [self.tensors[name] for name in op["inputs"]],
            self.tensors[op["output"]],
            *(None if op.get(role) is None else values[op[role]] for role in ("weight", "bias")),
        )
        try:
            return np.asarray(_OPS[op["op"]].compute(call))
        except (ValueError, MemoryError) as exc:
            shapes = ", ".join(str(x.shape) for x in call.inputs)
            raise BundleError(f"{op['name']} ({op['op']}) of shapes {shapes}: {exc}") from exc

    def _dequantized(self, values: Mapping[str, Array]) -> Array | tuple[Array, ...]:
        entries = self.description["outputs"]
        names = [entry["tensor"] for entry in entries]
        stored = (values[name] if name in values else self.constants[name] for name in names)
        results = tuple(
            _returned(x, entry, self.tensors[name])
            for x, entry, name in zip(stored, entries, names, strict=True)
        )
        return results[0] if len(results) == 1 else results


def _taken(x: Array, entry: Mapping[str, Any], info: TensorInfo) -> Array:
    """Stored integers of an input: of float32 by its scale, of integers as they are."""
    offset = _BORDER_OFFSETS.get(entry["rule"])
    if offset is None:
        return quantize(x, info)
    if x.dtype != entry["dtype"]:
        raise BundleError(f"input {entry['name']} is of dtype {entry['dtype']}, got {x.dtype}")
    stored: Array = (x.astype(np.int64) - offset).astype(info.dtype)
    return stored


def _returned(x: Array, entry: Mapping[str, Any], info: TensorInfo) -> Array:
    """What the network returns for stored integers of an output."""
    offset = _BORDER_OFFSETS.get(entry["rule"])
    if offset is None:
        return dequantize(x, info)
    result: Array = (x.astype(np.int64) + offset).astype(entry["dtype"])
    return result


def _check_shape(what: str, wanted: Sequence[int | None], array: Array) -> None:
    fits = array.ndim == len(wanted) and all(map(_agree, wanted[1:], array.shape[1:]))
    if not fits:
        raise BundleError(f"{what} has shape {list(wanted)}, got {list(array.shape)}")


def _last_uses(description: Mapping[str, Any]) -> dict[int, list[str]]:
    """By index of an op, the tensors that nothing reads after it."""
    produced = {name for entry in description["inputs"] for name in entry["tensors"]}
    last: dict[str, int] = {}
    for index, op in enumerate(description["ops"]):
        produced.add(op["output"])
        for name in (*op["inputs"], op["output"]):
            if name in produced:
                last[name] = index
    for entry in description["outputs"]:
        last.pop(entry["tensor"], None)
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        uses.setdefault(index, []).append(name)
    return uses


# Reading -----------------------------------------------------------------------------------------


def bundle_files(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Names of the two files: ``<path>.json`` and ``<path>.safetensors``.

    Args:
        path: Without a suffix, or with that of either file.
    """
    base = os.fspath(path)
    for suffix in (".json", ".safetensors"):
        base = base.removesuffix(suffix)
    return f"{base}.json", f"{base}.safetensors"


def load_integers(path: str | os.PathLike[str]) -> NumpyReference:
    """Read a bundle; see :meth:`NumpyReference.load`."""
    return NumpyReference.load(path)


def checksum(text: bytes, digits: str) -> str:
    """SHA-256 of the JSON file in which the 64 digits of its checksum are zeros.

    Args:
        text: Bytes of the file.
        digits: The checksum that stands in it; its first occurrence is replaced.
    """
    written = digits.encode("utf-8", "replace")
    return hashlib.sha256(text.replace(written, b"0" * 64, 1)).hexdigest()


def _read_file(file: str, most: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        BundleError: It cannot be read, is a directory, device or pipe, or has more bytes.
    """
    try:
        # Asked before it is opened: opening a pipe waits for somebody to write into it.
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{file} is no regular file; a bundle is two files")
        if found.st_size > most:
            raise BundleError(
                f"{file} has {found.st_size:,} bytes, {most:,} at most are read; it is not what "
                "was saved"
            )
        with open(file, "rb") as binary:
            return binary.read(most)
    except OSError as exc:
        raise BundleError(f"{file}: {exc.strerror}; a bundle is two files") from exc
    except ValueError as exc:  # a null character in the name
        raise BundleError(f"{file!r}: {exc}; a bundle is two files") from exc


def _weights_size(description: Mapping[str, Any]) -> int:
    """The most that the weights file can have: what is described, and a header."""
    stored = [t for t in description["tensors"].values() if t["kind"] != "activation"]
    sizes: list[int] = [_count(t["shape"]) * np.dtype(t["dtype"]).itemsize for t in stored]
    return 100_000_000 + sum(sizes)


def _parsed(file: str, text: bytes) -> Any:
    """What the JSON file holds, if it is of a version that is known."""
    try:
        description = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{file} is not JSON: {exc}; save the bundle again") from exc
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise BundleError(f"{file} is no description of a network of integers ({FORMAT})")
    version = description.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise BundleError(
            f"{file} has version {_shown(version)}, this reader knows 1 to {VERSION}; use the "
            "reader of the release that wrote it"
        )
    return description


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_shown(twice)} stands twice in one mapping")
    return result


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
