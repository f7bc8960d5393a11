"""Writes a converted graph as an ONNX file with QuantizeLinear and DequantizeLinear.

``torch.onnx`` translates the ops; this module translates the quantization around them
(:mod:`custom_quantizer.reference.interchange.onnx_ops`), stores 4-bit weights as INT4, and calls
everything by the names that it has in plans and reports.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from custom_quantizer.core.borders import output_of
from custom_quantizer.core.files import write_bytes_atomic
from custom_quantizer.core.formats import range_bits
from custom_quantizer.core.graph import (
    CHOOSE_QPARAMS,
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    constant_of,
    describe,
    detached_copy,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    qparams_of,
    state_of,
)
from custom_quantizer.core.names import record_names, recorded_name
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import ConversionError, InputError, first_line
from custom_quantizer.ops.gemm import CONV
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX, export_again
from custom_quantizer.reference.inputs import placeholder_metas
from custom_quantizer.reference.interchange.names import tensor_name
from custom_quantizer.reference.interchange.onnx_ops import OPSET, translations

__all__ = ["OnnxSummary", "save_onnx"]

_MOST_BYTES = (1 << 31) - 1
_LISTED = 5
_EXPORTER = "pkg.torch.onnx."
_SCOPES = f"{_EXPORTER}name_scopes"
_BORDERS = "inputs and outputs are float32, also those that programs take and return as integers"

Activations: TypeAlias = Literal["uint8", "int8"]
"""Type of activations of up to 8 bits."""


@dataclass(frozen=True)
class OnnxSummary:
    """What an ONNX file holds.

    Attributes:
        path: the file.
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        integer_ops: how many ops have integers before and behind them.
        float_ops: the others, by name.
        size_bytes: of the file.
        notes: where a type of ONNX is wider than the integers in it, and what else a reader of the
            file may not expect.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integer_ops: int
    float_ops: tuple[str, ...]
    size_bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: opset {OPSET}, {self.size_bytes:,} bytes",
            f"inputs {', '.join(self.inputs)}; outputs {', '.join(self.outputs)}",
            f"{self.integer_ops} ops between integers, {len(self.float_ops)} in float"
            + (f" ({_listed(self.float_ops)})" if self.float_ops else ""),
        ]
        return "\n".join([*lines, *self.notes])


@tools()
def save_onnx(
    converted: GraphModule, path: str | os.PathLike[str], *, activations: Activations = "uint8"
) -> OnnxSummary:
    """Write a converted graph as a QDQ model in ONNX (opset 21).

    Activations become ``QuantizeLinear`` and ``DequantizeLinear``, weights INT8, INT16 or INT4 with
    a ``DequantizeLinear`` behind them, biases INT32 with scale input scale x weight scale and no
    zero point. Sizes that were dynamic at capture are dynamic in the file. A runtime computes the
    ops between them in float or with integer kernels of its own, so that outputs may differ from
    those of the graph by a step; the file is not the reference of a device.

    Args:
        converted: what ``convert_pt2e`` returns; it is not changed.
        path: usually ends in ``.onnx``.
        activations: type of activations of up to 8 bits. ``uint8``, what ONNX Runtime computes with
            on x86: integers and zero points are 128 higher than the graph's. ``int8``: the graph's
            own; on x86, ONNX Runtime 1.32 then refuses some graphs in which a float op reads what a
            view or pool made of integers, unless the session option ``session.qdqisint8allowed``
            is ``"1"``.

    Returns:
        What the file holds.

    Raises:
        ConversionError: the graph is not a converted one, or has what ONNX cannot express: an op
            without a translation (named), buffers that change, more than 2 GB.
        InputError: the packages ``onnx`` and ``onnxscript`` are not installed, there is no such
            type of activations, or the file cannot be written.
    """
    if activations not in get_args(Activations):
        raise InputError(
            f"activations are stored as {' or '.join(get_args(Activations))}, not {activations!r}"
        )
    onnx = _require_onnx()
    graph = read_converted(converted, None)
    _check(converted)
    model = detached_copy(converted)
    record_names(model.graph)
    program = _translate(model)
    nodes = {node.name: node for node in model.graph.nodes}
    names = {
        node.name: nodes[name]
        for node in program.exported_program.graph.nodes
        if (name := recorded_name(node)) in nodes
    }
    _store_int4(program.model, names)
    if activations == "uint8":
        _store_unsigned(program.model)
    _Names(program.model, names).apply()
    proto = program.model_proto
    data = _serialized(onnx, proto)
    write_bytes_atomic(path, data)
    return OnnxSummary(
        Path(path),
        tuple(value.name for value in proto.graph.input),
        tuple(value.name for value in proto.graph.output),
        len(graph.integer),
        tuple(op.node.name for op in graph.floating if not _is_size(op.node)),
        len(data),
        (*_notes(model, activations), *([_BORDERS] if graph.borders else ())),
    )


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  the exporter of PyTorch imports it
    except ImportError as error:
        raise InputError(
            f"ONNX files need {error.name}, which is not installed: "
            "pip install 'custom-quantizer[onnx]'"
        ) from error
    return onnx


def _check(model: GraphModule) -> None:
    """Refuse what a file would not hold, before the exporter leaves it out.

    Raises:
        ConversionError: see :func:`save_onnx`.
    """
    if written := state_of(model.graph):
        raise ConversionError(
            f"the model writes into {_listed(str(node.target) for node in written)}, and an ONNX "
            "graph has no state; make it an input and an output of the model"
        )
    for index, meta in enumerate(placeholder_metas(model)):
        if meta is None:
            raise ConversionError(
                f"input {index} of the model is no tensor; capture a module whose forward sets it"
            )
    for index, value in enumerate(pytree.tree_leaves(output_of(model).args[0])):
        if value is not None and (not isinstance(value, Node) or value.op == "get_attr"):
            raise ConversionError(
                f"output {index} of the model is {value}, whatever its inputs are; leave it out of "
                "what the model returns"
            )
    for node in model.graph.nodes:
        if not _is_symmetric(model, node):
            raise ConversionError(
                f"{describe(node)} has zero points other than 0; quantize its weight symmetrically"
            )


def _is_symmetric(model: GraphModule, node: Node) -> bool:
    """Whether zero points are 0 wherever the file has none: of channels, of groups, of biases."""
    if node.target is DEQUANTIZE_PER_CHANNEL:
        points = node.args[2]
    elif node.target is DEQUANTIZE_GROUPED:
        points = node.args[3]
    elif node.target is DEQUANTIZE_PER_TENSOR and node.args[5] is torch.int32:
        points = node.args[2]
    else:
        return True
    return not (constant_of(model, points).any() if isinstance(points, Node) else points)


def _example(model: GraphModule) -> tuple[torch.Tensor, ...]:
    """Inputs of the recorded shapes: exporting again does not look at their values."""
    shapes = [
        ([s if isinstance(s, int) else s.node.hint for s in meta.shape], meta.dtype)
        for meta in placeholder_metas(model)
        if meta is not None
    ]
    return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)


def _translate(model: GraphModule) -> Any:
    """The ``torch.onnx.ONNXProgram`` of a graph.

    Raises:
        ConversionError: it cannot be translated.
        LoweringError: ``torch.export`` refused it.
    """
    exported = export_again(model, _example(model), DEFAULT_DYNAMIC_MAX)
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        return torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(),
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise _refusal(model, error) from error
    finally:
        noisy.setLevel(level)


def _refusal(model: GraphModule, error: BaseException) -> ConversionError:
    """Name the op that the exporter stopped at."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    text = "\n".join(map(str, causes))
    name = re.search(r"translating node %(\w+)", text)
    target = re.search(r"target=(?:torch\.ops\.)?([\w.]+)", text)
    kind = target[1] if target else ""
    callers = [node for node in model.graph.nodes if kind and str(node.target) == kind]
    where = describe(callers[0]) if callers else name[1] if name else "the graph"
    return ConversionError(
        f"{where}: torch.onnx cannot translate {kind or 'it'} ({first_line(causes[-1])}); write it "
        "with other ops, or leave it out of the model"
    )


# ---------------------------------------------------------------------------------------------
# Types and names
# ---------------------------------------------------------------------------------------------


def _traced(ir_node: Any) -> str | None:
    """Name of the exported call that an ONNX node was translated from."""
    scopes = ir_node.metadata_props.get(_SCOPES)
    return str(ast.literal_eval(scopes)[-1]) if scopes else None


def _origin(ir_node: Any, names: Mapping[str, Node]) -> Node | None:
    """The node of the converted graph that an ONNX node was translated from."""
    name = _traced(ir_node)
    return None if name is None else names.get(name)


def _weight_range(node: Node) -> tuple[int, int] | None:
    """Smallest and largest integer of a constant that ``node`` dequantizes."""
    if node.target is DEQUANTIZE_GROUPED:
        return cast("tuple[int, int]", tuple(node.args[5:7]))
    if is_dequantize(node) and is_constant(node.args[0]):
        low, high = node.args[4:6] if node.target is DEQUANTIZE_PER_CHANNEL else node.args[3:5]
        return cast(int, low), cast(int, high)
    return None


def _bits_of_weight(node: Node) -> int | None:
    found = _weight_range(node)
    return None if found is None else range_bits(*found)


def _store_int4(model: Any, names: Mapping[str, Node]) -> None:
    """Store constants of at most 4 bits in the type that ONNX has for them: half the bytes."""
    from onnxscript import ir

    for ir_node in model.graph:
        origin = _origin(ir_node, names)
        bits = None if origin is None else _bits_of_weight(origin)
        if ir_node.op_type != "DequantizeLinear" or bits is None or bits > 4:
            continue
        value, zero_point = ir_node.inputs[0], (*ir_node.inputs, None, None)[2]
        if zero_point is not None:
            if zero_point.const_value.numpy().any():
                continue
            ir_node.replace_input_with(2, None)  # 0, in a type that is no longer the right one
        if value.dtype != ir.DataType.INT4:
            numbers = value.const_value.numpy().astype(ir.DataType.INT4.numpy())
            value.const_value = ir.Tensor(numbers, dtype=ir.DataType.INT4, name=value.name)
            value.dtype = ir.DataType.INT4


def _store_unsigned(model: Any) -> None:
    """Store 8-bit activations as unsigned integers: zero points and integers are 128 higher."""
    from onnxscript import ir

    @cache
    def shifted(value: Any) -> Any:
        numbers = value.const_value.numpy().astype(np.int16) + 128
        return _initializer(model, numbers.astype(np.uint8), value.name)

    for ir_node in list(model.graph):
        signed = ir_node.outputs[0].dtype == ir.DataType.INT8
        if ir_node.op_type != "QuantizeLinear" or not signed:
            continue
        users = [user for user, _ in ir_node.outputs[0].uses()]
        steps = [ir_node, *users]
        points = [(*step.inputs, None, None)[2] for step in steps]
        fixed = all(point is not None and point.const_value is not None for point in points)
        if not fixed or any(user.op_type != "DequantizeLinear" for user in users):
            continue
        for step, point in zip(steps, points, strict=True):
            step.replace_input_with(2, shifted(point))
        ir_node.outputs[0].dtype = ir.DataType.UINT8


def _initializer(model: Any, numbers: Any, name: str) -> Any:
    """A constant of the graph; its name is free to be changed."""
    from onnxscript import ir

    free = _free(name, set(model.graph.initializers))
    value = ir.val(free, const_value=ir.tensor(numbers, name=free))
    model.graph.register_initializer(value)
    return value


class _Names:
    """Gives values of an ONNX graph the names that tensors have in plans and encodings."""

    def __init__(self, model: Any, names: Mapping[str, Node]) -> None:
        self._model, self._names = model, names
        self._taken = {value.name for value in model.graph.inputs}
        self._final = {id(value): value.name for value in model.graph.inputs}
        self._own: dict[tuple[str, str, int], Any] = {}

    def apply(self) -> None:
        """Rename all of the graph, and drop what tells of this machine."""
        graph = self._model.graph
        several = len(graph.outputs) > 1
        for index, value in enumerate(graph.outputs):
            self._call(value, f"output_{index}" if several else "output")
        ops: set[str] = set()
        for ir_node in list(graph):
            origin, traced = _origin(ir_node, self._names), _traced(ir_node)
            if origin is None:
                continue
            if is_quantize(origin) or is_dequantize(origin) or origin.target is DEQUANTIZE_GROUPED:
                tensor = tensor_name(origin)
                self._quantization(ir_node, tensor)
                ir_node.name = _free(f"{tensor}/{ir_node.op_type}", ops)
            else:
                whole = any(value.name == traced for value in ir_node.outputs)
                name = origin.name if whole else f"{origin.name}/{ir_node.op_type}"
                ir_node.name = _free(name, ops)
                if whole and len(ir_node.outputs) == 1:
                    self._call(ir_node.outputs[0], origin.name)
        self._sizes()
        self._forget()

    def _call(self, value: Any, name: str) -> None:
        if value is None or id(value) in self._final:
            return
        final = _free(name, self._taken)
        constants = self._model.graph.initializers
        # A parameter that is used in float, too, keeps the name of the exporter, and gives way.
        if final in constants and constants[final] is not value:
            constants[final].name = _free(final, {*constants, *self._taken})
        value.name = self._final[id(value)] = final

    def _quantization(self, ir_node: Any, tensor: str) -> None:
        kind = ir_node.op_type
        if kind == "QuantizeLinear":
            self._call(ir_node.outputs[0], f"{tensor}.integers")
        elif kind == "DequantizeLinear":
            self._call(ir_node.outputs[0], f"{tensor}.dequantized")
            if ir_node.inputs[0].is_initializer():
                self._call(ir_node.inputs[0], tensor)
        else:
            return
        for index, what in enumerate(("scale", "zero_point"), start=1):
            value = (*ir_node.inputs, None, None)[index]
            if value is None or not value.is_initializer():
                continue
            # Equal numbers of several tensors are one constant; here each has its own.
            key = (tensor, what, id(value))
            if key not in self._own:
                named = id(value) in self._final
                self._own[key] = (
                    _initializer(self._model, value.const_value.numpy(), value.name)
                    if named
                    else value
                )
                self._call(self._own[key], f"{tensor}.{what}")
            ir_node.replace_input_with(index, self._own[key])

    def _sizes(self) -> None:
        """Call dynamic sizes by the input and dimension where they are first met."""
        from onnxscript import ir

        graph, known = self._model.graph, dict[str, str]()
        for value in graph.inputs:
            for dim, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    name = "batch" if dim == 0 else f"{value.name}_dim_{dim}"
                    known.setdefault(size.value, _free(name, set(known.values())))
        if not known:
            return
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, known)) + r")\b")
        values = [*graph.inputs, *(value for ir_node in graph for value in ir_node.outputs)]
        for value in values:
            if value.shape is None:
                continue
            value.shape = ir.Shape(
                pattern.sub(lambda found: known[found[0]], size.value)
                if isinstance(size, ir.SymbolicDim) and size.value is not None
                else size
                for size in value.shape
            )

    def _forget(self) -> None:
        graph = self._model.graph
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for ir_node in graph:
            for key in [key for key in ir_node.metadata_props if key != "namespace"]:
                del ir_node.metadata_props[key]
            for value in ir_node.outputs:
                value.metadata_props.clear()


def _free(name: str, taken: set[str]) -> str:
    count, free = 0, name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free


def _serialized(onnx: Any, proto: Any) -> bytes:
    """The bytes of a model that ONNX's own checker takes.

    Raises:
        ConversionError: it is too large, or the checker refuses it.
    """
    if proto.ByteSize() > _MOST_BYTES:
        raise ConversionError(
            f"the model takes {proto.ByteSize():,} bytes, and an ONNX file holds {_MOST_BYTES:,}; "
            "split the model"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(
            f"what torch.onnx wrote is no valid ONNX model: {first_line(error)}; report it with "
            "the op that it names"
        ) from error
    return cast(bytes, proto.SerializeToString(deterministic=True))


# ---------------------------------------------------------------------------------------------
# What a reader may not expect
# ---------------------------------------------------------------------------------------------


def _notes(model: GraphModule, narrow: Activations) -> Iterable[str]:
    constants: dict[int, list[str]] = {}
    activations: dict[int, list[str]] = {}
    run_time: list[str] = []
    rounded = [node for node in model.graph.nodes if is_quantize(node)]
    for node in model.graph.nodes:
        bits = _bits_of_weight(node)
        if bits is not None and bits not in (4, 8, 16, 32):
            constants.setdefault(bits, []).append(tensor_name(node))
        if is_quantize(node) and is_static(node):
            bits = qparams_of(model, node).bits
            if bits not in (8, 16):
                activations.setdefault(bits, []).append(tensor_name(node))
        if node.target is CHOOSE_QPARAMS:
            run_time.append(tensor_name(cast(Node, node.args[0])))
    for bits, names in sorted(constants.items()):
        kind = "INT4" if bits < 4 else "INT8" if bits < 8 else "INT16"
        yield f"{len(names)} constants of {bits} bits are stored as {kind}: {_listed(names)}"
    if narrow == "uint8" and any(is_static(n) and qparams_of(model, n).bits <= 8 for n in rounded):
        yield "activations of up to 8 bits are UINT8: integers and zero points 128 higher"
        if saturating := [node for node in model.graph.nodes if _may_saturate(model, node)]:
            yield (
                f"{len(saturating)} convolutions of UINT8 and INT8 saturate in ONNX Runtime's own "
                "kernels on x86 without VNNI; activations='int8' does not: "
                f"{_listed(recorded_name(node) or node.name for node in saturating)}"
            )
    for bits, names in sorted(activations.items()):
        kind = narrow.upper() if bits < 8 else "INT16"
        yield (
            f"{len(names)} activations of {bits} bits are {kind} behind a Clip to their range: "
            f"{_listed(names)}"
        )
    if run_time:
        yield (
            f"{len(run_time)} tensors get their scale at run time, by ops in float: "
            f"{_listed(run_time)}"
        )


def _may_saturate(model: GraphModule, node: Node) -> bool:
    """Whether an op is a convolution that ONNX Runtime fuses, of 8-bit integers.

    Without VNNI its kernel (1.32) adds two products of unsigned and signed bytes in 16 bits
    (``vpmaddubsw``): up to ``2 * 255 * 127``. With weights of 7 bits they fit. Matrix products have
    both operands made unsigned there.
    """
    if node.target not in CONV.targets:
        return False
    data, weight = cast("tuple[Node, Node]", node.args[:2])
    static = is_dequantize(data) and is_static(data) and qparams_of(model, data).bits <= 8
    return static and _bits_of_weight(weight) == 8


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = len(unique) - _LISTED
    return ", ".join(unique[:_LISTED]) + (f" and {more} more" if more > 0 else "")
