"""Runs a converted graph on integers, as the device does.

Between a quantize node and the dequantize nodes behind it only integer tensors exist. Ops that
are float in the graph run in float, with exact Q/DQ boundaries, and are listed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.borders import is_border_call
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.graph import (
    CHOOSE_QPARAMS,
    check_inputs,
    constant_of,
    describe,
    has_zero_points,
    is_dequantize,
    is_quantize,
    is_run_time_quantization,
    is_static,
    qparams_of,
    reads_sizes,
    state_of,
    tensor_meta,
)
from custom_quantizer.errors import CustomQuantizerError, InputError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.ops.backend import get_mode
from custom_quantizer.ops.movement import RESHAPE
from custom_quantizer.ops.run_time import RunTimeOp
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted

__all__ = ["IntegerReference", "integer_reference", "with_run_time_scales"]

aten = torch.ops.aten


def integer_reference(converted: GraphModule, mode: str = "xnnpack") -> IntegerReference:
    """Make a callable that computes ``converted`` on integers.

    Args:
        converted: what ``convert_pt2e`` returns.
        mode: the arithmetic: the name of a backend (``xnnpack``: what its delegate computes on
            x86-64; ``xnnpack-neon``: on ARM, where products of two tensors round half up),
            ``fixed_point`` (integer multiplier and shift) or ``exact`` (rational numbers). The last
            two are pure integers: no backend's limits apply. Scales that are chosen at run time
            are the backend's, and in the last two modes those of PyTorch, one for a whole batch.

    Raises:
        ConversionError: the graph is not a converted one.
        SchemeError: there is no such mode.
    """
    return IntegerReference(read_converted(converted, get_mode(mode)))


def with_run_time_scales(model: Callable[..., Any]) -> Callable[..., Any]:
    """What computes scales at run time as the device does.

    Of a converted graph that quantizes at run time, its integer reference: PyTorch's own call of
    the graph has one scale for a whole batch, the device one for each row, pixel or image. Anything
    else is returned as it is, as are graphs whose layers no backend computes so.
    """
    if not isinstance(model, GraphModule):
        return model
    if not any(node.target is CHOOSE_QPARAMS for node in model.graph.nodes):
        return model
    graph = read_converted(model, integer_io=False)
    return IntegerReference(graph) if any(op.run_time for op in graph.floating) else model


class IntegerReference:
    """A converted graph, evaluated on integers.

    Buffers that the model writes are the reference's own: the graph keeps what it holds.

    Attributes:
        graph: its ops, and the backend they are read for.
        borders: which inputs and outputs are integers.
    """

    def __init__(self, graph: ConvertedGraph) -> None:
        self.graph = graph
        self.borders = graph.borders
        placeholders = [node for node in graph.model.graph.nodes if node.op == "placeholder"]
        pairs = zip(placeholders, self.borders.inputs, strict=True)
        self._inputs = {node: border for node, border in pairs if border is not None}
        self._state: dict[Node, Tensor] = {}
        self.reset()
        self._ops = {op.node: op for op in graph.integer}
        self._outputs = {op.output_node: op for op in graph.integer}
        self._read = {source for op in graph.integer for source in op.match.inputs}
        self._run_time = {op.node: op.run_time for op in graph.floating if op.run_time is not None}
        self._replaced = _replaced(graph.model, self._run_time)
        self._qparams = {
            node: qparams_of(graph.model, node)
            for node in graph.model.graph.nodes
            if (is_quantize(node) or is_dequantize(node))
            and is_static(node)
            and not has_zero_points(graph.model, node)
        }

    @property
    def arithmetic(self) -> Arithmetic:
        """How integers are rounded."""
        return self.graph.backend.arithmetic

    @property
    def float_ops(self) -> tuple[FloatOp, ...]:
        """Ops that are float in the graph and run in float here."""
        return self.graph.floating

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Outputs as the device returns them: float32, dequantized, or the integers of a border.

        An input that is integers takes these, or float32, which is quantized to them.
        """
        return self._run(inputs, named, None)

    def dequantized(self, outputs: Any) -> Any:
        """What it returned, with float32 values in the place of integers of a border."""
        return self.borders.reals(outputs, self.arithmetic.dequantize)

    def reset(self) -> None:
        """Give buffers that the model writes what the graph holds now, as a program just loaded."""
        model = self.graph.model
        state = {
            node.target: constant_of(model, node).clone()
            for node in state_of(model.graph)
            if node.op == "get_attr"
        }
        self._state = {
            node: state[node.target]
            for node in model.graph.nodes
            if node.op == "get_attr" and node.target in state
        }

    def with_integers(self, *inputs: Any, **named: Any) -> tuple[Any, dict[str, Tensor]]:
        """Outputs, and the integers of every quantized tensor by the name of its producer."""
        record: dict[str, Tensor] = {}
        return self._run(inputs, named, record), record

    def _run(
        self, inputs: tuple[Any, ...], named: dict[str, Any], record: dict[str, Tensor] | None
    ) -> Any:
        model = self.graph.model
        flat = _flatten_inputs(self.graph, inputs, named)
        values: dict[Node, Any] = {}
        last_use = self._last_uses()
        feed = iter(flat)
        result: Any = None
        with torch.no_grad():
            for node in model.graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(feed)
                    border = self._inputs.get(node)
                    if record is not None and border is not None:
                        record[node.name] = values[node].to(torch.int32) - border.offset
                elif node in self._state:
                    values[node] = self._state[node]
                elif node.op == "get_attr":
                    values[node] = operator.attrgetter(str(node.target))(model)
                elif node.op == "call_function":
                    values[node] = self._evaluate(node, values, record)
                elif node.op == "output":
                    result = self._results(node, values)
                for done in last_use.get(node, ()):
                    values.pop(done, None)
        if self._state:  # what is returned does not change with the next call
            result = pytree.tree_map_only(Tensor, torch.clone, pytree.tree_map(_real, result))
        return _unflatten_outputs(model, result)

    def _results(self, output: Node, values: dict[Node, Any]) -> Any:
        """What the graph returns, integers of a border in their dtype."""
        leaves, structure = pytree.tree_flatten(output.args[0])
        leaves = [values[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves]
        for i, border in enumerate(self.borders.outputs):
            if border is not None:
                leaves[i] = leaves[i].to(border.dtype)
        return pytree.tree_unflatten(leaves, structure)

    def _evaluate(
        self, node: Node, values: dict[Node, Any], record: dict[str, Tensor] | None
    ) -> Any:
        if is_quantize(node) and node in self._qparams:
            source = cast(Node, node.args[0])
            if source in self._outputs:
                return values[source]  # already integers in this scale
            value = values[source]
            if isinstance(value, _Boundary):
                stored = self.arithmetic.requantize(
                    value.stored, value.qparams, self._qparams[node]
                )
            else:
                stored = self.arithmetic.quantize(value, self._qparams[node])
            if record is not None:
                record[source.name] = stored
            return stored
        if is_dequantize(node) and node in self._qparams:
            users = [user for user in node.users if user not in self._ops]
            source = cast(Node, node.args[0])
            stored = values[source]
            if not users and node not in self._read:
                return None  # a weight or a bias, whose integers its op has
            if source in self._inputs or is_border_call(source) or source.op == "get_attr":
                stored = stored.to(torch.int32)  # as all integers in between
            # Integer ops read the integers; only float ops and outputs need real numbers.
            if not users:
                return stored
            return _Boundary(stored, self._qparams[node], self.arithmetic)
        if node in self._replaced:
            return None
        layer = self._run_time.get(node)
        run_time = self.graph.backend.run_time
        if layer is not None and run_time is not None:
            return run_time.compute(layer, _real(values[layer.source]))
        op = self._ops.get(node)
        if op is not None:
            stored = self._compute(op, values)
            if op.output_node is not node:
                values[op.output_node] = stored
            if record is not None and isinstance(stored, Tensor):
                record[op.output_node.name] = stored
            return stored
        if node in self._outputs:
            return values[node]  # a fused activation: computed with its anchor
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: _real(values[n]))
        return cast(Callable[..., Any], node.target)(*_bind(node.args, values), **kwargs)

    def _compute(self, op: QuantizedOp, values: dict[Node, Any]) -> Any:
        inputs = [_integers(values[source]) for source in op.match.inputs]
        if op.match.rule is RESHAPE and reads_sizes(op.node):
            # Views are reshapes: integers may have other strides than floats.
            move = aten.reshape.default if op.node.target is aten.view.default else op.node.target
            return cast(Callable[..., Any], move)(inputs[0], *_bind(op.node.args[1:], values))
        try:
            return self.graph.backend.compute(op, inputs)
        except CustomQuantizerError as error:
            where = describe(op.node)
            if where in str(error):
                raise
            raise type(error)(f"{where}: {error}") from error

    def _last_uses(self) -> dict[Node, list[Node]]:
        last: dict[Node, Node] = {}
        for node in self.graph.model.graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
            if node in self._run_time:
                last[self._run_time[node].source] = node
        uses: dict[Node, list[Node]] = {}
        for source, user in last.items():
            uses.setdefault(user, []).append(source)
        return uses


def _replaced(model: GraphModule, layers: Mapping[Node, RunTimeOp]) -> set[Node]:
    """What only serves layers that the backend quantizes for in another way than the graph."""
    found: set[Node] = set()
    for node in reversed(model.graph.nodes):
        if not (is_quantize(node) or is_dequantize(node) or is_run_time_quantization(node)):
            continue
        if node.users and all(
            user in found or (user in layers and node in user.args[:2]) for user in node.users
        ):
            found.add(node)
    return found


class _Boundary:
    """Integers that somebody may want as real numbers."""

    def __init__(self, stored: Tensor, qparams: Any, arithmetic: Arithmetic) -> None:
        self.stored = stored
        self.qparams = qparams
        self._arithmetic = arithmetic
        self._real: Tensor | None = None

    @property
    def real(self) -> Tensor:
        if self._real is None:
            self._real = self._arithmetic.dequantize(self.stored, self.qparams)
        return self._real


def _real(value: Any) -> Any:
    return value.real if isinstance(value, _Boundary) else value


def _integers(value: Any) -> Any:
    return value.stored if isinstance(value, _Boundary) else value


def _bind(args: Any, values: dict[Node, Any]) -> Any:
    return torch.fx.node.map_arg(args, lambda n: _real(values[n]))


def _flatten_inputs(
    graph: ConvertedGraph, inputs: tuple[Any, ...], named: dict[str, Any]
) -> list[Any]:
    """Inputs as the placeholders take them.

    Raises:
        InputError: number, dtype or shape of the inputs is wrong.
    """
    model = graph.model
    flat = CallForm.of(model).flat(inputs, named)
    wanted = [node for node in model.graph.nodes if node.op == "placeholder"]
    if len(flat) != len(wanted):
        raise InputError(
            f"the model takes {len(wanted)} input tensors ({', '.join(n.name for n in wanted)}), "
            f"got {len(flat)}"
        )
    flat = graph.borders.integers(flat, graph.backend.arithmetic.quantize)
    check_inputs(flat, [tensor_meta(node) for node in wanted])
    return flat


def _unflatten_outputs(model: GraphModule, result: Any) -> Any:
    flat = pytree.tree_map(_real, result)
    codegen = model.graph._codegen
    info = getattr(codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        return flat
    return pytree.tree_unflatten(list(flat), info.out_spec)
