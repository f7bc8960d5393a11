"""Writes a converted network as integers for other hardware, and reads it back.

Two files: ``<path>.safetensors`` holds weights, biases and constants; ``<path>.json`` says what to
compute with them, in integer multipliers and shifts (mode ``fixed_point`` of
:mod:`custom_quantizer.core.arithmetic`). ``docs/integer_bundle.md`` describes the format, and
:mod:`custom_quantizer.reference.numpy_runner` runs it.

An op of the file is simpler than an aten op: sizes and axes are resolved, a relu is a clamp to two
stored integers, a split is one slice for each of its parts.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import INT32, QParams
from custom_quantizer.core.bias import derived_scale
from custom_quantizer.core.borders import Border, is_border_call
from custom_quantizer.core.files import write_files_atomic
from custom_quantizer.core.fixed_point import FIXED_POINT, quantize_multiplier
from custom_quantizer.core.formats import IntFormat, dtype_name
from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    describe,
    is_constant,
    is_dequantize,
    is_quantize,
    module_path,
    qparams_of,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.resizing import position_bits
from custom_quantizer.errors import ConversionError, InputError, SchemeError
from custom_quantizer.ops import QuantizedOp, functions
from custom_quantizer.ops.backend import INTEGERS
from custom_quantizer.ops.functions import LARGEST_TABLE, levels
from custom_quantizer.ops.gemm import expand_channels, per_dim, symmetric_padding
from custom_quantizer.ops.movement import padding_of
from custom_quantizer.ops.pool import (
    adaptive_kernel,
    counts_padding,
    is_global_pool,
    max_pool_window,
    pool_window,
    spatial_mean_dims,
)
from custom_quantizer.ops.resize import resizings_of
from custom_quantizer.reference.accumulators import (
    accumulator_of,
    image_size,
    left_shift,
    mul_width,
)
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.numpy_runner import (
    FORMAT,
    MOST_BYTES,
    VERSION,
    Array,
    BundleError,
    NumpyReference,
    bundle_files,
    check_description,
    checksum,
)

__all__ = ["IntegerBundle", "integers_of", "load_integers", "save_integers"]

aten = torch.ops.aten

Entry: TypeAlias = dict[str, Any]

_INT32_RULE, _INT64_RULE = "int32_two_roundings", "int64_one_rounding"
_LARGEST_SHIFT = {_INT32_RULE: 30, _INT64_RULE: 7}
_LISTED = 10


# Files -------------------------------------------------------------------------------------------


def save_integers(converted: GraphModule, path: str | os.PathLike[str]) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``.

    Both files appear, or none. The JSON holds the SHA-256 of the other and of itself, so that a
    reader notices when one of them was changed or replaced.

    Args:
        converted: what ``convert_pt2e`` returns; every op of it in integers.
        path: of both files, without a suffix or with that of either.

    Raises:
        ConversionError: an op is left in float, or depends on a size that was dynamic at capture;
            or the ratio of its scales is out of reach of a multiplier and shift; or the network
            exceeds a limit of the format.
        InputError: the files cannot be written.
    """
    description, arrays = integers_of(converted)
    json_file, weights_file = bundle_files(path)
    data = safetensors.numpy.save(arrays)
    description["weights"] = {
        "file": os.path.basename(weights_file),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = (_dumps(description) + "\n").encode("utf-8")
    if len(text) > MOST_BYTES:
        raise ConversionError(
            f"the description of the network has {len(text):,} bytes, and readers take "
            f"{MOST_BYTES:,}: large tables for each channel need that much; leave their ops in "
            "float, and out of the model"
        )
    digits = description["checksum"]
    text = text.replace(digits.encode(), checksum(text, digits).encode(), 1)
    write_files_atomic({weights_file: data, json_file: text})


def integers_of(converted: GraphModule) -> tuple[Entry, dict[str, Array]]:
    """What :func:`save_integers` writes, checked: the document, and stored integers by tensor name.

    Args:
        converted: what ``convert_pt2e`` returns; every op of it in integers.

    Raises:
        ConversionError: as :func:`save_integers`.
    """
    description, arrays = _described(read_converted(converted, None))
    try:
        check_description(description, arrays)
    except BundleError as exc:
        raise ConversionError(f"the network is out of reach of the format: {exc}") from exc
    return description, arrays


def load_integers(path: str | os.PathLike[str]) -> IntegerBundle:
    """Read what :func:`save_integers` wrote, to run it with NumPy.

    Args:
        path: of both files, without a suffix or with that of either.

    Raises:
        InputError: a file is missing, damaged or of a newer version; the two do not belong
            together; or the network they describe cannot be run.
    """
    try:
        return IntegerBundle.load(path)
    except BundleError as exc:
        raise InputError(str(exc)) from exc


class IntegerBundle(NumpyReference):
    """A :class:`NumpyReference` that raises this package's errors: a call, ``InputError``."""

    def quantize(self, *inputs: Array) -> dict[str, Array]:
        """Stored integers of the network's inputs, by tensor name."""
        try:
            return super().quantize(*inputs)
        except BundleError as exc:
            raise InputError(str(exc)) from exc

    def run(self, stored: Mapping[str, Array], *, keep: bool = False) -> dict[str, Array]:
        """Compute on integers: from those of the inputs to those of the outputs."""
        try:
            return super().run(stored, keep=keep)
        except BundleError as exc:
            raise InputError(str(exc)) from exc


def _dumps(value: Any, indent: int = 0) -> str:
    """JSON with one line for each list of numbers or names, which may be long."""
    if isinstance(value, dict) and value:
        items: Sequence[str] = [
            f"{json.dumps(key)}: {_dumps(item, indent + 2)}" for key, item in value.items()
        ]
        brackets = "{}"
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items, brackets = [_dumps(item, indent + 2) for item in value], "[]"
    else:
        return json.dumps(value, allow_nan=False)
    margin = "\n" + " " * (indent + 2)
    return f"{brackets[0]}{margin}{(',' + margin).join(items)}\n{' ' * indent}{brackets[1]}"


# The graph ---------------------------------------------------------------------------------------


def _described(graph: ConvertedGraph) -> tuple[Entry, dict[str, Array]]:
    """The JSON document without its ``weights``, and the arrays of the other file.

    Raises:
        ConversionError: as :func:`save_integers`.
    """
    # Arithmetic on sizes is no op of the network: sizes are resolved here.
    floating = [
        op for op in graph.floating if not isinstance(op.node.meta.get("val"), torch.SymInt)
    ]
    if floating:
        listed = "; ".join(f"{describe(op.node)}: {op.reason}" for op in floating[:_LISTED])
        if len(floating) > _LISTED:
            listed += f"; and {len(floating) - _LISTED} more"
        raise ConversionError(
            f"integers alone cannot express a graph with ops in float; quantize these "
            f"(IntegerQuantizer(backend=None) does so wherever integers mean something), or move "
            f"them out of the model: {listed}"
        )
    writer = _Writer(graph)
    for node in graph.model.graph.nodes:
        writer.add(node)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": "0" * 64,
        "arithmetic": FIXED_POINT.name,
        "weights": {"file": "none", "sha256": "0" * 64},  # until they are written
        "inputs": list(writer.inputs.values()),
        "outputs": writer.outputs,
        "tensors": writer.tensors,
        "ops": writer.ops,
    }
    return document, writer.arrays


class _Writer:
    """Collects the entries of a document while walking the graph.

    Attributes:
        inputs: entries of the model's inputs.
        outputs: entries of its outputs.
        tensors: entries by tensor name.
        ops: entries in order of execution.
        arrays: stored integers of weights, biases and constants by tensor name.
    """

    def __init__(self, graph: ConvertedGraph) -> None:
        self.inputs: dict[Node, Entry] = {}
        self.outputs: list[Entry] = []
        self.tensors: dict[str, Entry] = {}
        self.ops: list[Entry] = []
        self.arrays: dict[str, Array] = {}
        self._model = graph.model
        self._borders = graph.borders
        self._by_node = {op.node: op for op in graph.integer}
        self._names: dict[Node, str] = {}
        self._weights: dict[Any, str] = {}

    def add(self, node: Node) -> None:
        """Describe one node of the graph."""
        if node.op == "placeholder":
            if tensor_meta(node) is None:
                raise ConversionError(
                    f"input {len(self.inputs)} of the model is no tensor; capture a module whose "
                    "forward sets it"
                )
            border = self._borders.inputs[len(self.inputs)]
            self.inputs[node] = {
                "name": str(node.target),
                **_border_fields(border, "divide_float32_half_away"),
                "shape": _sizes(shape_of(node)),
                "tensors": [],
            }
            if border is not None:
                self._names[node] = self._activation(node, border.qparams)
                self.inputs[node]["tensors"].append(self._names[node])
        elif is_border_call(node):
            self._names[node] = self._names[cast(Node, node.args[0])]
        elif node.op == "output":
            for index, value in enumerate(_leaves(node.args[0])):
                if value is not None:  # nothing is returned there, whatever runs it
                    self._output(index, value)
        elif is_quantize(node):
            self._quantize(node)
        elif node in self._by_node:
            self._op(self._by_node[node])

    # -- inputs and outputs --------------------------------------------------------------------

    def _quantize(self, node: Node) -> None:
        source = cast(Node, node.args[0])
        if source in self._names:  # the integers of an op, in this scale already
            self._names[node] = self._names[source]
            return
        qparams = qparams_of(self._model, node)
        if source in self.inputs:
            entry = self.inputs[source]
            name = self._activation(node if entry["tensors"] else source, qparams)
            entry["tensors"].append(name)
        elif is_dequantize(source):
            name = self._activation(node, qparams)
            src = qparams_of(self._model, source)
            fields = _requantize_fields(node, src, qparams, (qparams.quant_min, qparams.quant_max))
            operands = {"inputs": [self._read(source)], "output": name}
            self.ops.append(_entry(node, "requantize", operands, fields))
        elif is_constant(source):
            stored = FIXED_POINT.quantize(constant_of(self._model, source), qparams)
            name = self._constant(node, stored, qparams)
        else:
            raise ConversionError(f"{describe(node)} quantizes {describe(source)}, a float tensor")
        self._names[node] = name

    def _output(self, index: int, value: Any) -> None:
        border = self._borders.outputs[index]
        if border is None and not (isinstance(value, Node) and is_dequantize(value)):
            what = describe(value) if isinstance(value, Node) else repr(value)
            raise ConversionError(
                f"output {index} of the model is {what}, which is not the result of an integer op; "
                "leave it out of what the model returns"
            )
        self.outputs.append(
            {
                "tensor": self._read(value) if border is None else self._names[value],
                **_border_fields(border, "multiply_float64"),
                "shape": _sizes(shape_of(value)),
            }
        )

    # -- tensors ------------------------------------------------------------------------------

    def _read(self, node: Node) -> str:
        """Name of the stored integers that an op takes from ``node``."""
        if not is_dequantize(node):  # a part of a split
            return self._read(self._by_node[node].match.inputs[0])
        source = cast(Node, node.args[0])
        if source not in self._names:
            qparams = qparams_of(self._model, node)
            stored = constant_of(self._model, source)
            self._names[source] = self._constant(source, stored, qparams)
        return self._names[source]

    def _activation(self, node: Node, qparams: QParams) -> str:
        shape = _sizes(shape_of(node))
        return self._tensor(node.name, "activation", _storage(qparams), shape, qparams)

    def _constant(self, node: Node, stored: Tensor, qparams: QParams) -> str:
        array = stored.numpy().astype(_storage(qparams))
        return self._stored(node.name, "constant", array, qparams)

    def _stored(self, name: str, kind: str, array: Array, qparams: QParams) -> str:
        name = self._tensor(name, kind, str(array.dtype), list(array.shape), qparams)
        # A copy of its own: safetensors writes memory as it lies.
        self.arrays[name] = np.array(array, order="C")
        return name

    def _tensor(
        self, name: str, kind: str, dtype: str, shape: list[int | None], qparams: QParams
    ) -> str:
        count, free = 1, name
        while free in self.tensors:
            free = f"{name}_{count}"
            count += 1
        scale = np.array(torch.as_tensor(qparams.scale, dtype=torch.float32).numpy())
        self.tensors[free] = {
            "kind": kind,
            "dtype": dtype,
            "bits": qparams.bits,
            "shape": shape,
            "scale": {"bits": _hexadecimal(scale), "decimal": scale.tolist()},
            "axis": qparams.axis,
            "zero_point": qparams.zero_point,
            "quant_min": qparams.quant_min,
            "quant_max": qparams.quant_max,
        }
        return free

    # -- ops ----------------------------------------------------------------------------------

    def _op(self, op: QuantizedOp) -> None:
        family = op.match.rule.family
        if family == "split":
            return  # each of its parts is an op of its own
        fields_of = _FIELDS.get(family)
        if fields_of is None:
            raise ConversionError(
                f"{describe(op.node)}: the format has no op for the family {family!r}; leave it "
                "in float, and out of the model"
            )
        fields = fields_of(op)
        operands: Entry = {"inputs": [self._read(source) for source in op.match.inputs]}
        if op.weight is not None:
            operands.update(self._parameters(op))
        operands["output"] = self._activation(op.output_node, op.output)
        self._names[op.output_node] = operands["output"]
        accumulator = accumulator_of(op)
        if accumulator is not None:
            fields["accumulator"] = {"bits": accumulator.bits, "width": accumulator.width}
        self.ops.append(_entry(op.node, family, operands, fields))

    def _parameters(self, op: QuantizedOp) -> Entry:
        """Names of the weight and the bias; a weight that several ops use is stored once."""
        weight, qparams = cast(Tensor, op.weight), cast(QParams, op.weight_qparams)
        source = cast(Node, cast(Node, op.match.weight).args[0])
        key = (source.target, qparams)
        if key not in self._weights:
            name = f"{op.node.name}.weight"
            self._weights[key] = self._stored(name, "weight", weight.numpy(), qparams)
        names: Entry = {"weight": self._weights[key], "bias": None}
        if op.bias is not None:
            unit = derived_scale(cast(float, op.inputs[0].scale), _weight_scales(op))
            axis = None if unit.dim() == 0 else 0
            scale = float(unit) if axis is None else unit
            bias = QParams(scale, 0, *INT32, axis=axis)
            name = f"{op.node.name}.bias"
            names["bias"] = self._stored(name, "bias", op.bias.numpy().astype(np.int32), bias)
        return names


def _entry(node: Node, family: str, operands: Entry, fields: Entry) -> Entry:
    """An op's entry: where it comes from, what it reads and writes, what it computes."""
    source = "getitem" if node.target is operator.getitem else str(node.target)
    return {
        "name": node.name,
        "module": module_path(node),
        "source": source,
        "family": family,
        "op": fields["op"],
        **operands,
        **fields,
    }


def _border_fields(border: Border | None, rule: str) -> Entry:
    """Dtype and rule of an input or output; ``rule``: of float32."""
    if border is None:
        return {"dtype": "float32", "rule": rule}
    return {
        "dtype": dtype_name(border.dtype),
        "rule": f"stored_plus_{border.offset}" if border.offset else "stored",
    }


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _sizes(shape: Sequence[Any]) -> list[int | None]:
    """A shape with ``None`` for sizes that were dynamic at capture."""
    return [size if isinstance(size, int) else None for size in shape]


def _storage(qparams: QParams) -> str:
    """Name of the smallest dtype that holds an activation."""
    return dtype_name(IntFormat(qparams.bits).storage_dtype)


def _hexadecimal(scale: npt.NDArray[np.float32]) -> Any:
    words = [f"{word:08x}" for word in scale.reshape(-1).view(np.uint32).tolist()]
    return words[0] if scale.ndim == 0 else words


# Multipliers -------------------------------------------------------------------------------------


def _multipliers(node: Node, reals: Sequence[float], rule: str) -> Entry:
    """Multipliers and shifts of real factors, for one rounding rule."""
    try:
        pairs = [quantize_multiplier(real) for real in reals]
    except SchemeError as exc:
        raise ConversionError(f"{describe(node)}: {exc}") from exc
    return _checked(node, rule, *zip(*pairs, strict=True))


def _checked(node: Node, rule: str, multipliers: Sequence[int], shifts: Sequence[int]) -> Entry:
    if max(shifts) > _LARGEST_SHIFT[rule] or min(shifts) < -31:
        raise ConversionError(
            f"{describe(node)}: the ratio of its scales needs a shift of {max(shifts, key=abs)}, "
            f"and the rule {rule} takes -31 to {_LARGEST_SHIFT[rule]}; widen the output's range"
        )
    return {"rule": rule, "multiplier": list(multipliers), "shift": list(shifts)}


def _single(entry: Entry) -> Entry:
    """One multiplier and shift, not a list of one."""
    (multiplier,), (shift,) = entry["multiplier"], entry["shift"]
    return {"rule": entry["rule"], "multiplier": multiplier, "shift": shift}


def _factor(node: Node, real: float, rule: str = _INT32_RULE) -> Entry:
    """Multiplier and shift of one real factor."""
    return _single(_multipliers(node, [real], rule))


def _scale(qparams: QParams) -> float:
    return cast(float, qparams.scale)


def _clamp_of(op: QuantizedOp) -> list[int]:
    """Stored integers that the output is clamped to: a fused activation's, or its range."""
    bounds = op.stored_bounds(FIXED_POINT)
    return [op.output.quant_min, op.output.quant_max] if bounds is None else list(bounds)


def _requantize_fields(
    node: Node, src: QParams, dst: QParams, clamp: tuple[int, int] | list[int]
) -> Entry:
    return {
        "op": "requantize",
        "requantization": _factor(node, _scale(src) / _scale(dst)),
        "clamp": list(clamp),
    }


def _mean_multipliers(op: QuantizedOp, counts: Sequence[int]) -> Entry:
    """Multipliers of means of several numbers of values: ``1 / count`` is part of them.

    References:
        ``QuantizedMeanOrSum`` in TensorFlow Lite's ``internal/reference/reduce.h``.
    """
    (src,), dst = op.inputs, op.output
    rule = _INT32_RULE if max(src.levels, dst.levels) <= 256 else _INT64_RULE
    try:
        multiplier, shift = quantize_multiplier(_scale(src) / _scale(dst))
    except SchemeError as exc:
        raise ConversionError(f"{describe(op.node)}: {exc}") from exc
    extras = [min(count.bit_length() - 1, 32, 31 + shift) for count in counts]
    scaled = [(multiplier << e) // n for e, n in zip(extras, counts, strict=True)]
    return _checked(op.node, rule, scaled, [shift - extra for extra in extras])


# Op families -------------------------------------------------------------------------------------


def _weight_scales(op: QuantizedOp) -> Tensor:
    """float32 scales of the weight: one, or one per output channel of the op."""
    scale = torch.as_tensor(cast(QParams, op.weight_qparams).scale, dtype=torch.float32)
    return expand_channels(scale, op.match)


def _gemm_requantization(op: QuantizedOp) -> Entry:
    source, target = _scale(op.inputs[0]), _scale(op.output)
    weights: list[float] = _weight_scales(op).reshape(-1).tolist()
    rule = _INT64_RULE if op.is_wide else _INT32_RULE
    return {
        "requantization": _multipliers(op.node, [source * w / target for w in weights], rule),
        "clamp": _clamp_of(op),
    }


def _conv(op: QuantizedOp) -> Entry:
    node = op.node
    before, after = symmetric_padding(node)
    return {
        "op": "conv",
        "stride": per_dim(argument(node, 3, "stride", 1), len(before)),
        "padding": {"before": before, "after": after},
        "dilation": per_dim(argument(node, 5, "dilation", 1), len(before)),
        "groups": op.match.groups,
        **_gemm_requantization(op),
    }


def _conv_transpose(op: QuantizedOp) -> Entry:
    node, dims = op.node, cast(Tensor, op.weight).dim() - 2
    padding = per_dim(argument(node, 4, "padding", 0), dims)
    added = per_dim(argument(node, 5, "output_padding", 0), dims)
    return {
        "op": "conv_transpose",
        "stride": per_dim(argument(node, 3, "stride", 1), dims),
        "crop": {
            "before": padding,
            "after": [p - extra for p, extra in zip(padding, added, strict=True)],
        },
        "dilation": per_dim(argument(node, 7, "dilation", 1), dims),
        "groups": op.match.groups,
        **_gemm_requantization(op),
    }


def _add(op: QuantizedOp) -> Entry:
    scale_a, scale_b = (_scale(q) for q in op.inputs)
    twice_max = 2.0 * max(scale_a, scale_b)
    shift = left_shift(op)
    return {
        "op": op.match.rule.family,
        "left_shift": shift,
        "requantization_a": _factor(op.node, scale_a / twice_max),
        "requantization_b": _factor(op.node, scale_b / twice_max),
        "requantization": _factor(op.node, twice_max / (2.0**shift * _scale(op.output))),
        "clamp": _clamp_of(op),
    }


def _product(op: QuantizedOp) -> Entry:
    """An elementwise product, or one of matrices."""
    family = op.match.rule.family
    wide = mul_width(op) == 64 if family == "mul" else op.is_wide
    real = _scale(op.inputs[0]) * _scale(op.inputs[1]) / _scale(op.output)
    return {
        "op": family,
        "requantization": _factor(op.node, real, _INT64_RULE if wide else _INT32_RULE),
        "clamp": _clamp_of(op),
    }


def _activation(op: QuantizedOp) -> Entry:
    bounds = FIXED_POINT.clamp_bounds(*cast("tuple[float, float]", op.match.bounds), op.output)
    if op.inputs[0].same_grid(op.output):
        return {"op": "clamp", "clamp": list(bounds)}
    return _requantize_fields(op.node, op.inputs[0], op.output, bounds)


def _table(op: QuantizedOp) -> Entry:
    """What the op makes of each stored integer; a row for each channel where they differ."""
    src = op.inputs[0]
    if len(op.inputs) != 1:
        raise ConversionError(
            f"{describe(op.node)}: the format has no {op.match.rule.family} of two tensors; "
            "leave it in float, and out of the model"
        )
    if src.levels > LARGEST_TABLE:
        raise ConversionError(
            f"{describe(op.node)}: its table would have {src.levels:,} entries, at most "
            f"{LARGEST_TABLE:,} are written; quantize its input to 16 bits or less"
        )
    stored = levels(src)
    channels = max((constant.numel() for constant in op.constants.values()), default=1)
    if channels == 1:
        entries = INTEGERS.compute(op, [stored])
        return {"op": "table", "axis": None, "table": entries.tolist()}
    entries = INTEGERS.compute(op, [stored.expand(1, channels, -1)])
    return {"op": "table", "axis": 1, "table": entries[0].tolist()}


def _extremum(op: QuantizedOp) -> Entry:
    """Both operands in the scale of the result."""
    target = _scale(op.output)
    return {
        "op": op.match.rule.family,
        "requantization_a": _factor(op.node, _scale(op.inputs[0]) / target),
        "requantization_b": _factor(op.node, _scale(op.inputs[1]) / target),
        "clamp": _clamp_of(op),
    }


def _mean(op: QuantizedOp, keepdims: bool | None = None) -> Entry:
    if keepdims is None:
        _, keepdims = cast("tuple[tuple[int, ...], bool]", spatial_mean_dims(op.node))
    count = image_size(op)
    if count is None:
        raise ConversionError(
            f"{describe(op.node)} averages an image of dynamic size, so its divisor is not known; "
            "capture the model with a fixed image size"
        )
    return {
        "op": "mean",
        "axes": [2, 3],
        "keepdims": keepdims,
        "count": count,
        "requantization": _single(_mean_multipliers(op, [count])),
        "clamp": _clamp_of(op),
    }


def _adaptive_avg_pool(op: QuantizedOp) -> Entry:
    kernel = adaptive_kernel(op.node)
    if is_global_pool(op.node):
        return _mean(op, keepdims=True)
    if kernel == (1, 1):
        (src,), dst = op.inputs, op.output
        return _requantize_fields(op.node, src, dst, _clamp_of(op))
    if kernel is None:
        raise ConversionError(f"{describe(op.node)}: its windows overlap")
    return _window_mean(op, kernel, kernel, (0, 0), count_padding=True)


def _avg_pool(op: QuantizedOp) -> Entry:
    kernel, stride, padding = pool_window(op.node)
    return _window_mean(op, kernel, stride, padding, counts_padding(op.node))


def _window_mean(
    op: QuantizedOp,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_padding: bool,
) -> Entry:
    entry: Entry = {
        "op": "avg_pool2d",
        "kernel": list(kernel),
        "stride": list(stride),
        "padding": {"before": list(padding), "after": list(padding)},
        "count_padding": count_padding,
        "clamp": _clamp_of(op),
    }
    if op.inputs[0].same_grid(op.output):
        return {**entry, "rounding": "divide_half_away"}
    rows, columns = (range(1, size + 1) for size in kernel)
    counts = [math.prod(kernel)]
    if any(padding) and not count_padding:
        counts = sorted({row * column for row in rows for column in columns})
    multipliers = {"count": counts, **_mean_multipliers(op, counts)}
    return {**entry, "rounding": "multiply", "requantization": multipliers}


def _max_pool(op: QuantizedOp) -> Entry:
    node = op.node
    kernel, stride, padding, dilation = max_pool_window(node)
    after = padding
    if argument(node, 5, "ceil_mode", False):
        sizes, outputs = (shape_of(n)[-2:] for n in (op.match.inputs[0], node))
        if not are_static((*sizes, *outputs)):
            raise ConversionError(
                f"{describe(node)} rounds its output size up, and the image size was dynamic at "
                "capture; capture the model with a fixed image size"
            )
        # As much padding as the last window needs.
        needed = (
            (out - 1) * s + d * (k - 1) + 1 - size - p
            for out, size, k, s, d, p in zip(
                outputs, sizes, kernel, stride, dilation, padding, strict=True
            )
        )
        after = list(map(max, padding, needed))
    return {
        "op": "max_pool2d",
        "kernel": kernel,
        "stride": stride,
        "padding": {"before": padding, "after": after},
        "dilation": dilation,
    }


def _resize(op: QuantizedOp) -> Entry:
    rows, columns = resizings_of(op.node)
    fraction = position_bits(op.output.bits)
    return {
        "op": "resize_bilinear",
        "position_bits": fraction,
        "rows": list(rows.positions(fraction)),
        "columns": list(columns.positions(fraction)),
    }


def _reshape(op: QuantizedOp) -> Entry:
    shape: list[int] = []
    source = shape_of(op.match.inputs[0])
    for axis, size in enumerate(shape_of(op.node)):
        # Symbolic sizes are equal when they are written alike.
        same = axis < len(source) and str(size) == str(source[axis])
        if same and (axis == 0 or not isinstance(size, int)):
            shape.append(0)  # the batch is free even where capture fixed it
        else:
            shape.append(size if isinstance(size, int) else -1)
    if shape.count(-1) > 1:
        raise ConversionError(
            f"{describe(op.node)}: more than one size of its result {list(shape_of(op.node))} was "
            "dynamic at capture; capture the model with fixed sizes, except for the batch"
        )
    return {"op": "reshape", "shape": shape}


def _permute(op: QuantizedOp) -> Entry:
    node = op.node
    # Sizes 0, 1, 2, ... come out in the order in which the op puts the axes.
    numbered = torch.empty(tuple(range(len(shape_of(op.match.inputs[0])))), device="meta")
    permuted = cast("Callable[..., Tensor]", node.target)(numbered, *node.args[1:], **node.kwargs)
    return {"op": "permute", "axes": list(permuted.shape)}


def _slice(op: QuantizedOp) -> Entry:
    node, shape = op.node, shape_of(op.match.inputs[0])
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    start, stop = _fixed(op, argument(node, 2, "start")), _fixed(op, argument(node, 3, "end"))
    step = argument(node, 4, "step", 1)
    if node.target is aten.narrow.default:
        start, length = start or 0, _fixed(op, argument(node, 3, "length")) or 0
        # A negative start counts from the end, and a range that ends there has no stop.
        stop = None if start < 0 and start + length == 0 else start + length
    size: Any = shape[axis]
    if isinstance(size, int):
        start, stop, _ = slice(start, stop, step).indices(size)
        # To the end, however large the batch.
        stop = None if stop == size else stop
    elif stop == sys.maxsize:
        stop = None
    return {"op": "slice", "axis": axis, "start": start or 0, "stop": stop, "step": step}


def _fixed(op: QuantizedOp, value: Any) -> int | None:
    if value is not None and not isinstance(value, int):
        raise ConversionError(
            f"{describe(op.node)}: {value} was dynamic at capture; capture with fixed sizes"
        )
    return value


def _select(op: QuantizedOp) -> Entry:
    node, shape = op.node, shape_of(op.match.inputs[0])
    axis = int(argument(node, 1, "dim")) % len(shape)
    return {"op": "select", "axis": axis, "index": _fixed(op, argument(node, 2, "index"))}


def _part(op: QuantizedOp) -> Entry:
    """One part of a split: a slice, or, of an unbind, one entry of a dimension."""
    split, index = op.match.inputs[0], cast(int, op.node.args[1])
    rank = len(shape_of(cast(Node, split.args[0])))
    parts = cast("Sequence[Tensor]", split.meta["val"])
    index %= len(parts)
    if split.target is aten.unbind.int:
        axis = int(argument(split, 1, "dim", 0)) % rank
        return {"op": "select", "axis": axis, "index": index}
    axis = int(argument(split, 2, "dim", 0)) % rank
    sizes = [_fixed(op, part.shape[axis]) or 0 for part in parts[: index + 1]]
    start, stop = sum(sizes[:-1]), sum(sizes)
    return {"op": "slice", "axis": axis, "start": start, "stop": stop, "step": 1}


def _expand(op: QuantizedOp) -> Entry:
    source, target = shape_of(op.match.inputs[0]), shape_of(op.node)
    padded = (*(None,) * (len(target) - len(source)), *source)
    shape = [
        -1 if str(size) == str(old) else _fixed(op, size)
        for size, old in zip(target, padded, strict=True)
    ]
    return {"op": "expand", "shape": shape}


def _pad(op: QuantizedOp) -> Entry:
    pads = padding_of(op.node)
    # aten lists the last dimension first.
    return {"op": "pad", "padding": {"before": pads[-2::-2], "after": pads[::-2]}}


_FIELDS: Mapping[str, Callable[[QuantizedOp], Entry]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": lambda op: {"op": "linear", **_gemm_requantization(op)},
    "add": _add,
    "sub": _add,
    "mul": _product,
    "matmul": _product,
    "relu": _activation,
    "clamp": _activation,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "mean": _mean,
    "upsample_bilinear2d": _resize,
    "cat": lambda op: {
        "op": "cat",
        "axis": int(argument(op.node, 1, "dim", 0)) % len(shape_of(op.node)),
    },
    "identity": lambda _op: {"op": "identity"},
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "expand": _expand,
    "getitem": _part,
    "pad": _pad,
    **dict.fromkeys((rule.family for rule in functions.RULES), _table),
    "maximum": _extremum,
    "minimum": _extremum,
}
"""What to compute, by family; ``split`` is expressed by the parts taken of it."""
