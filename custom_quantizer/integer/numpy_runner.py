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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

__all__ = [
    "FORMAT",
    "VERSION",
    "BundleError",
    "NumpyReference",
    "bundle_files",
    "dequantize",
    "doubling_high_multiply",
    "load_integers",
    "multiply_int32",
    "multiply_int64",
    "quantize",
    "rounding_divide_by_pot",
    "wrap_int32",
]

FORMAT = "custom_quantizer.integers"
VERSION = 1

Array: TypeAlias = npt.NDArray[Any]
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
    def reach(self) -> int:
        """Largest absolute value of ``q - zero_point``."""
        return max(self.quant_max - self.zero_point, self.zero_point - self.quant_min)


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

    op: Mapping[str, Any]
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


def _pad(x: Array, op: Mapping[str, Any], value: int) -> Array:
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
    axes = tuple(op["axes"])
    count = math.prod(x.shape[axis] for axis in axes)
    if count != op["count"]:
        raise BundleError(f"it averages {op['count']} values of an image, not {count}")
    total = x.sum(axis=axes, keepdims=op["keepdims"])
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
    try:
        row = np.array([rows[count] for count in counts.reshape(-1).tolist()]).reshape(counts.shape)
    except KeyError as exc:
        raise BundleError(f"no multiplier is given for a window of {exc} values") from None
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


_OPS: Mapping[str, Callable[[Call], Array]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "matmul": _matmul,
    "requantize": _requantize,
    "clamp": _clamp,
    "table": _table,
    "maximum": _extremum,
    "minimum": _extremum,
    "mean": _mean,
    "avg_pool2d": _avg_pool2d,
    "max_pool2d": _max_pool2d,
    "cat": lambda call: np.concatenate(call.inputs, axis=call.op["axis"]),
    "identity": lambda call: call.inputs[0],
    "reshape": _reshape,
    "permute": lambda call: call.inputs[0].transpose(call.op["axes"]),
    "slice": _slice,
    "select": lambda call: call.inputs[0].take(call.op["index"], axis=call.op["axis"]),
    "expand": _expand,
    "pad": lambda call: _pad(call.inputs[0], call.op, call.infos[0].zero_point),
}

_WINDOW = ("stride", "padding")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "conv": ("weight", *_WINDOW, "dilation", "groups", "requantization", "clamp"),
    "conv_transpose": ("weight", "stride", "crop", "dilation", "groups", "requantization", "clamp"),
    "linear": ("weight", "requantization", "clamp"),
    "add": ("left_shift", "requantization_a", "requantization_b", "requantization", "clamp"),
    "sub": ("left_shift", "requantization_a", "requantization_b", "requantization", "clamp"),
    "mul": ("requantization", "clamp"),
    "matmul": ("requantization", "clamp"),
    "requantize": ("requantization", "clamp"),
    "clamp": ("clamp",),
    "table": ("table", "axis"),
    "maximum": ("requantization_a", "requantization_b", "clamp"),
    "minimum": ("requantization_a", "requantization_b", "clamp"),
    "mean": ("axes", "keepdims", "count", "requantization", "clamp"),
    "avg_pool2d": ("kernel", *_WINDOW, "count_padding", "rounding", "clamp"),
    "max_pool2d": ("kernel", *_WINDOW, "dilation"),
    "cat": ("axis",),
    "identity": (),
    "reshape": ("shape",),
    "permute": ("axes",),
    "slice": ("axis", "start", "stop", "step"),
    "select": ("axis", "index"),
    "expand": ("shape",),
    "pad": ("padding",),
}


# The network -------------------------------------------------------------------------------------


class NumpyReference:
    """A network of integers, run with NumPy.

    Attributes:
        description: The JSON document.
        tensors: What it says of each tensor, by name.
        constants: Stored integers of weights, biases and constants, by name.
    """

    def __init__(self, description: Mapping[str, Any], constants: Mapping[str, Array]) -> None:
        self.description = description
        self.constants = dict(constants)
        self.tensors = {
            name: _tensor_info(name, entry) for name, entry in description["tensors"].items()
        }
        _check_constants(self.tensors, self.constants)
        _check_graph(description, self.tensors, self.constants)
        self._last_use = _last_uses(description)

    @classmethod
    def load(cls: type[_Reference], path: str | os.PathLike[str]) -> _Reference:
        """Read a bundle.

        Args:
            path: Of both files, without a suffix or with that of either.

        Raises:
            BundleError: A file is missing, damaged or of a newer version; or the two do not
                belong together.
        """
        json_file, weights_file = bundle_files(path)
        try:
            with open(json_file, encoding="utf-8") as file:
                description = json.load(file)
            with open(weights_file, "rb") as binary:
                data = binary.read()
        except OSError as exc:
            raise BundleError(f"{exc.filename}: {exc.strerror}; a bundle is two files") from exc
        except ValueError as exc:
            raise BundleError(f"{json_file} is not JSON: {exc}; save the bundle again") from exc
        _check_header(json_file, description)
        if hashlib.sha256(data).hexdigest() != description["weights"]["sha256"]:
            raise BundleError(
                f"{weights_file} is not the file that {json_file} was written with (their SHA-256 "
                "differ): one of the two was changed or replaced; save the bundle again"
            )
        try:
            constants = safetensors.numpy.load(data)
        except safetensors.SafetensorError as exc:
            raise BundleError(f"{weights_file} cannot be read: {exc}") from exc
        return cls(description, constants)

    def __call__(self, *inputs: Array) -> Array | tuple[Array, ...]:
        """Compute the network.

        Args:
            inputs: float32 arrays in the order of ``description["inputs"]``. Sizes are those of
                capture, except that the first dimension, the batch, may differ.

        Returns:
            float32: one array, or a tuple where the network has several outputs.

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
            _check_shape(entry, array)
            for name in entry["tensors"]:
                stored[name] = quantize(array, self.tensors[name])
        return stored

    def run(self, stored: Mapping[str, Array], *, keep: bool = False) -> dict[str, Array]:
        """Compute on integers: from those of the inputs to those of the outputs.

        Args:
            stored: Stored integers of the inputs, by tensor name.
            keep: Return every activation, not only the outputs.

        Raises:
            BundleError: An input is missing, or its shape does not fit an op.
        """
        wanted = {name for entry in self.description["inputs"] for name in entry["tensors"]}
        if wanted != stored.keys():
            raise BundleError(
                f"the network starts from the tensors {', '.join(sorted(wanted))}, not from "
                f"{', '.join(sorted(stored)) or 'none'}"
            )
        values = {**self.constants, **stored}
        for index, op in enumerate(self.description["ops"]):
            values[op["output"]] = self._compute(op, values)
            if not keep:
                for name in self._last_use.get(index, ()):
                    del values[name]
        return {name: value for name, value in values.items() if name not in self.constants}

    def _compute(self, op: Mapping[str, Any], values: Mapping[str, Array]) -> Array:
        call = Call(
            op,
            [values[name] for name in op["inputs"]],
            [self.tensors[name] for name in op["inputs"]],
            self.tensors[op["output"]],
            *(None if op.get(role) is None else values[op[role]] for role in ("weight", "bias")),
        )
        try:
            return np.asarray(_OPS[op["op"]](call))
        except ValueError as exc:
            shapes = ", ".join(str(x.shape) for x in call.inputs)
            raise BundleError(f"{op['name']} ({op['op']}) of shapes {shapes}: {exc}") from exc

    def _dequantized(self, values: Mapping[str, Array]) -> Array | tuple[Array, ...]:
        names = [entry["tensor"] for entry in self.description["outputs"]]
        stored = (values[name] if name in values else self.constants[name] for name in names)
        reals = tuple(
            dequantize(x, self.tensors[name]) for x, name in zip(stored, names, strict=True)
        )
        return reals[0] if len(reals) == 1 else reals


def _check_shape(entry: Mapping[str, Any], array: Array) -> None:
    wanted = entry["shape"]
    fits = array.ndim == len(wanted) and all(
        size is None or size == actual
        for size, actual in zip(wanted[1:], array.shape[1:], strict=True)
    )
    if not fits:
        raise BundleError(f"input {entry['name']} has shape {wanted}, got {list(array.shape)}")


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


def _check_header(file: str, description: Any) -> None:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise BundleError(f"{file} is no description of a network of integers ({FORMAT})")
    if description.get("version") != VERSION:
        raise BundleError(
            f"{file} has version {description.get('version')!r}, this reader knows {VERSION}; use "
            "the reader of the release that wrote it"
        )
    missing = {"weights", "inputs", "outputs", "tensors", "ops"} - description.keys()
    if missing or "sha256" not in description["weights"]:
        raise BundleError(f"{file} lacks {', '.join(sorted(missing)) or 'weights.sha256'}")


def _tensor_info(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    try:
        scale = _scale(entry["scale"]["bits"])
        decimal = np.array(entry["scale"]["decimal"], dtype=np.float32)
        info = TensorInfo(
            entry["kind"],
            np.dtype(entry["dtype"]),
            tuple(entry["shape"]),
            scale,
            entry["zero_point"],
            entry["quant_min"],
            entry["quant_max"],
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"the entry of tensor {name} is incomplete or damaged: {exc!r}") from exc
    if not np.array_equal(scale, decimal):
        raise BundleError(f"tensor {name}: the bits and the decimal of its scale differ")
    return info


def _scale(bits: str | Sequence[str]) -> npt.NDArray[np.float32]:
    """float32 numbers from their bits in hexadecimal, most significant digit first."""
    words = bits if isinstance(bits, str) else "".join(bits)
    values = np.frombuffer(bytes.fromhex(words), dtype=">f4").astype(np.float32)
    return values.reshape(()) if isinstance(bits, str) else values


def _check_constants(tensors: Mapping[str, TensorInfo], constants: Mapping[str, Array]) -> None:
    stored = {name for name, info in tensors.items() if info.kind != "activation"}
    if stored != constants.keys():
        odd = ", ".join(sorted(stored ^ constants.keys()))
        raise BundleError(f"the two files disagree about which tensors are stored: {odd}")
    for name, array in constants.items():
        info = tensors[name]
        if array.dtype != info.dtype or array.shape != info.shape:
            raise BundleError(
                f"tensor {name} is described as {info.dtype} of shape {info.shape}, but stored as "
                f"{array.dtype} of shape {array.shape}"
            )


def _check_graph(
    description: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    constants: Mapping[str, Array],
) -> None:
    """Every op is known and complete, and reads only what was computed before it."""
    known = {*constants, *(name for entry in description["inputs"] for name in entry["tensors"])}
    for index, op in enumerate(description["ops"]):
        where = f"op {index} ({op.get('name', 'without a name')})"
        kind = op.get("op")
        if kind not in _OPS:
            raise BundleError(f"{where}: no op {kind!r} is known; use a newer reader")
        missing = {"name", "inputs", "output", *_FIELDS[kind]} - op.keys()
        if missing:
            raise BundleError(f"{where} lacks {', '.join(sorted(missing))}")
        read = {*op["inputs"], *(op[role] for role in ("weight", "bias") if op.get(role))}
        if not read <= known:
            unknown = ", ".join(sorted(read - known))
            raise BundleError(f"{where} reads {unknown}, which nothing before it computes")
        known.add(op["output"])
    wanted = {entry["tensor"] for entry in description["outputs"]}
    absent = (wanted - known) | (known - tensors.keys())
    if absent:
        raise BundleError(f"not computed or not described: {', '.join(sorted(absent))}")
