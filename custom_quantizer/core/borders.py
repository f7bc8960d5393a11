"""Inputs and outputs of a network that are integers at its border.

A converted graph takes and returns float32: its first nodes quantize, its last ones dequantize.
``IntegerQuantizer.set_io(integer=True)`` marks some of these in the graph's ``meta``; what reads
the graph (:func:`custom_quantizer.reference.converted.read_converted`) then leaves these nodes out,
so that reference and program take the integers themselves::

    x float32 -> quantize -> dequantize -> op        becomes    x int8 -> dequantize -> op
    op -> quantize -> dequantize -> output float32   becomes    op -> quantize -> output int8

Kernels know int8. An image of uint8 is the same integers with 128 added, so a uint8 border is two
calls more: the top bit is flipped, and the byte taken for a signed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.formats import dtype_name
from custom_quantizer.core.graph import (
    QUANTIZE_PER_TENSOR,
    describe,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    qparams_of,
    tensor_meta,
)
from custom_quantizer.errors import ConversionError, InputError

__all__ = [
    "DTYPES",
    "Border",
    "Borders",
    "Role",
    "borders_of",
    "is_border_call",
    "mark",
    "marks_of",
    "output_of",
    "with_integer_borders",
]

aten = torch.ops.aten

Role = Literal["input", "output"]
Marks = Mapping[int, str]
"""Position of an input or output -> the dtype that it shall have."""

DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
}
"""What a border can be."""

_MARKS = "custom_quantizer_borders"
"""In the ``meta`` of a prepared or converted graph: which inputs and outputs shall be integers."""

_BORDER = "custom_quantizer_border"
"""In the ``meta`` of a node: the borders that it is, by role and position."""

_CALL = "custom_quantizer_border_call"
"""In the ``meta`` of a node: it turns uint8 into int8, or back."""

_TOP_BIT = 128


@dataclass(frozen=True)
class Border:
    """An input or output that is integers.

    A stored ``q`` stands for ``(q - zero_point) * scale``.

    Attributes:
        role: which of the two.
        index: position among the inputs, or outputs.
        name: of the input; of the node that computes an output; empty: nothing says it.
        dtype: of the integers.
        scale: a float32.
        zero_point: of integers of that dtype.
        quant_min: smallest integer.
        quant_max: largest.
    """

    role: Role
    index: int
    name: str
    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    @property
    def offset(self) -> int:
        """What was added to the integers that the network computes with."""
        return _TOP_BIT if self.dtype == torch.uint8 else 0

    @property
    def meaning(self) -> str:
        """Dtype, scale and zero point, in words."""
        dtype = dtype_name(self.dtype)
        return (
            f"{dtype} in [{self.quant_min}, {self.quant_max}], scale {self.scale:.9g}, zero point "
            f"{self.zero_point}"
        )

    @property
    def qparams(self) -> QParams:
        """Of the integers that the network computes with: those of uint8 less 128."""
        return QParams(
            self.scale,
            self.zero_point - self.offset,
            self.quant_min - self.offset,
            self.quant_max - self.offset,
        )

    def integers(self, value: Any, quantize: Callable[[Tensor, QParams], Tensor]) -> Any:
        """The integers of an input: those given, or those of a float32 tensor.

        Args:
            value: integers of ``dtype``, or float32, which are quantized.
            quantize: to the stored integers of some parameters.

        Raises:
            InputError: it is neither, or an integer is outside ``[quant_min, quant_max]``.
        """
        if not isinstance(value, Tensor):
            raise InputError(f"{self} must be a tensor, got {type(value).__name__}")
        if value.dtype == torch.float32:
            return (quantize(value, self.qparams) + self.offset).to(self.dtype)
        if value.dtype != self.dtype:
            raise InputError(
                f"{self} must be {self.dtype}, or torch.float32 to be quantized to it, got "
                f"{value.dtype}"
            )
        info = torch.iinfo(self.dtype)
        if (info.min, info.max) != (self.quant_min, self.quant_max) and value.numel():
            low, high = (int(end) for end in torch.aminmax(value))
            if low < self.quant_min or high > self.quant_max:
                raise InputError(
                    f"{self} takes the integers {self.quant_min} to {self.quant_max}, got {low} "
                    f"to {high}"
                )
        return value

    def real(self, value: Tensor, dequantize: Callable[[Tensor, QParams], Tensor]) -> Tensor:
        """The float32 values of integers of this border."""
        return dequantize(value.to(torch.int32) - self.offset, self.qparams)

    def __str__(self) -> str:
        return (
            f"{self.role} {self.index} ({self.name})" if self.name else f"{self.role} {self.index}"
        )


@dataclass(frozen=True)
class Borders:
    """The inputs and outputs of a network that are integers; ``None`` stands for all others."""

    inputs: tuple[Border | None, ...]
    outputs: tuple[Border | None, ...]

    def __iter__(self) -> Iterator[Border]:
        """Those that are integers, inputs first."""
        return (border for border in (*self.inputs, *self.outputs) if border is not None)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def integers(
        self, values: Sequence[Any], quantize: Callable[[Tensor, QParams], Tensor]
    ) -> list[Any]:
        """Inputs with integers where there is a border, as :meth:`Border.integers` makes them.

        Raises:
            InputError: an input of a border is neither float32 nor integers that it takes, or there
                are more or fewer inputs.
        """
        if len(values) != len(self.inputs):
            raise InputError(f"the network takes {len(self.inputs)} inputs, got {len(values)}")
        return [
            value if border is None else border.integers(value, quantize)
            for value, border in zip(values, self.inputs, strict=True)
        ]

    def reals(self, outputs: Any, dequantize: Callable[[Tensor, QParams], Tensor]) -> Any:
        """Outputs, in their structure, with float32 values in the place of a border's integers."""
        values, structure = pytree.tree_flatten(outputs)
        reals = (
            value if border is None else border.real(value, dequantize)
            for value, border in zip(values, self.outputs, strict=True)
        )
        return pytree.tree_unflatten(reals, structure)


def mark(model: GraphModule, inputs: Marks, outputs: Marks) -> None:
    """Say which inputs and outputs of a prepared graph shall be integers; those before remain."""
    if inputs or outputs:
        before = model.meta.get(_MARKS, {"inputs": {}, "outputs": {}})
        model.meta[_MARKS] = {
            "inputs": {**before["inputs"], **inputs},
            "outputs": {**before["outputs"], **outputs},
        }


def marks_of(model: GraphModule) -> tuple[Marks, Marks]:
    """Which inputs and outputs of a converted graph shall be integers."""
    marks = model.meta.get(_MARKS, {"inputs": {}, "outputs": {}})
    return marks["inputs"], marks["outputs"]


def borders_of(model: GraphModule) -> Borders:
    """The integer borders of a graph that :func:`with_integer_borders` returned."""
    inputs = (node for node in model.graph.nodes if node.op == "placeholder")
    outputs = pytree.tree_leaves(output_of(model).args[0])
    return Borders(
        tuple(_border_of(node, "input", i) for i, node in enumerate(inputs)),
        tuple(_border_of(value, "output", i) for i, value in enumerate(outputs)),
    )


def _border_of(value: Any, role: Role, index: int) -> Border | None:
    borders = value.meta.get(_BORDER, {}) if isinstance(value, Node) else {}
    return cast("Border | None", borders.get((role, index)))


def is_border_call(node: Node) -> bool:
    """Whether a call only turns the uint8 of a border into int8, or back."""
    return _CALL in node.meta


def with_integer_borders(model: GraphModule) -> GraphModule:
    """A copy of a converted graph with integers at its border, where it is marked so.

    Tensors are shared with ``model``, and nodes keep their names. A graph without a mark is
    returned as it is.

    Raises:
        ConversionError: what is marked is not quantized, or is needed in float32 as well.
    """
    inputs, outputs = marks_of(model)
    if not inputs and not outputs:
        return model
    copy = GraphModule(model, _copied(model))
    copy.meta = {key: value for key, value in model.meta.items() if key != _MARKS}
    placeholders = [node for node in copy.graph.nodes if node.op == "placeholder"]
    for index, dtype in inputs.items():
        _take_integers(copy, placeholders[index], index, DTYPES[dtype])
    values, structure = pytree.tree_flatten(output_of(copy).args[0])
    for index, dtype in outputs.items():
        values[index] = _returned(copy, values[index], index, DTYPES[dtype])
    output_of(copy).args = (pytree.tree_unflatten(values, structure),)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def _copied(model: GraphModule) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    result = graph.graph_copy(model.graph, {})
    graph.output(result).meta = dict(output_of(model).meta)
    graph.set_codegen(model.graph._codegen)
    return graph


def output_of(model: GraphModule) -> Node:
    """The node that a graph returns its results with."""
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    return cast(Node, output)


def _take_integers(model: GraphModule, node: Node, index: int, dtype: torch.dtype) -> None:
    """Let an input be the integers that it is quantized to first."""
    for user in list(node.users):
        if user.target is aten._assert_tensor_metadata.default:
            model.graph.erase_node(user)  # that it is float32
    # Sizes, and the guards of torch.export, are the same for integers.
    users = [
        user
        for user in node.users
        if user.op != "call_module" and user.target is not aten.sym_size.int
    ]
    quantize = users[0] if len(users) == 1 else None
    if quantize is None or not _is_static_quantize(quantize):
        names = ", ".join(user.name for user in users)
        raise ConversionError(
            f"input {index} ({node.name}) cannot be integers: it is not quantized before anything "
            f"else reads it (read by {names or 'nothing'}); quantize it with set_io"
        )
    border = _border(model, quantize, "input", index, node.name, dtype)
    meta = tensor_meta(node)
    dequantizes = [user for user in quantize.users if is_dequantize(user)]
    for user in dequantizes:
        # Behind a float input this was found by way of the quantize node.
        user.meta["val"] = meta
    node.meta["val"] = None if meta is None else _typed(meta, dtype)
    node.meta[_BORDER] = {("input", index): border}
    stored = node
    if dtype == torch.uint8:
        stored = _flipped(model, node, quantize, torch.int8)
    quantize.replace_all_uses_with(stored)
    model.graph.erase_node(quantize)


def _returned(model: GraphModule, value: Any, index: int, dtype: torch.dtype) -> Node:
    """The integers of an output."""
    stored = value.args[0] if isinstance(value, Node) and is_dequantize(value) else None
    if not isinstance(stored, Node) or not is_static(value) or is_constant(stored):
        what = describe(value) if isinstance(value, Node) else repr(value)
        raise ConversionError(
            f"output {index} ({what}) cannot be integers: it is not quantized; quantize it with "
            "set_io"
        )
    source = stored.args[0] if is_quantize(stored) else stored
    border = _border(model, value, "output", index, cast(Node, source).name, dtype)
    output = output_of(model)
    if dtype == torch.uint8:
        stored = _flipped(model, stored, output, torch.uint8)
    stored.meta[_BORDER] = {**stored.meta.get(_BORDER, {}), ("output", index): border}
    return stored


def _border(
    model: GraphModule, node: Node, role: Role, index: int, name: str, dtype: torch.dtype
) -> Border:
    """The border with the parameters of a quantize or dequantize node."""
    qparams = qparams_of(model, node)
    offset = _TOP_BIT if dtype == torch.uint8 else 0
    return Border(
        role,
        index,
        name,
        dtype,
        cast(float, qparams.scale),
        qparams.zero_point + offset,
        qparams.quant_min + offset,
        qparams.quant_max + offset,
    )


def _is_static_quantize(node: Node) -> bool:
    return node.target is QUANTIZE_PER_TENSOR and is_static(node)


def _flipped(model: GraphModule, node: Node, before: Node, dtype: torch.dtype) -> Node:
    """Integers of one byte with 128 added modulo 256, as another dtype of one byte."""
    with model.graph.inserting_before(before):
        if dtype == torch.int8:  # from uint8
            first = model.graph.call_function(aten.bitwise_xor.Scalar, (node, _TOP_BIT))
            last = model.graph.call_function(aten.to.dtype, (first, dtype))
        else:
            first = model.graph.call_function(aten.to.dtype, (node, dtype))
            last = model.graph.call_function(aten.bitwise_xor.Scalar, (first, _TOP_BIT))
    meta = tensor_meta(node)
    for call, its in ((first, torch.uint8), (last, dtype)):
        call.meta[_CALL] = True
        if meta is not None:
            call.meta["val"] = _typed(meta, its)
    return last


def _typed(meta: Tensor, dtype: torch.dtype) -> Tensor:
    mode = getattr(meta, "fake_mode", None)
    if mode is None:
        return meta.to(dtype)
    with mode:
        return meta.to(dtype)
