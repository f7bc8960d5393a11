"""Recurrent layers of static length, step by step: linear layers, gates, sums and products.

What the input adds to the gates of all steps is one linear layer. Each step then reads its row and
adds what the state gives, so that states are tensors of the graph like any other. The equations
are those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``; sums are added in another order, so that last
bits of float32 differ.

All steps of a cell have the ranges of one: of a single step, calibration sees few values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from torch.fx import Node

from custom_quantizer.core.graph import constant_of, is_constant, shape_of
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import ALIKE, Insertion, Rewrite

__all__ = ["RECURRENT"]

aten = torch.ops.aten

MAX_STEPS = 256
"""Most steps, of all layers and directions together, that a graph is made of."""

State: TypeAlias = "list[Node | None]"
"""Hidden state, and cell state of an LSTM, ``(batch, features)``; ``None``: zeros."""


@dataclass(frozen=True)
class _Layer:
    """One direction of one layer.

    Attributes:
        insert: where calls go.
        name: of its weights.
        of_input: weight and bias of what the input adds to the gates.
        of_state: weight and bias of what the hidden state adds.
        projection: weight from the cell's output to the hidden state, if there is one.
        size: features of the cell.
    """

    insert: Insertion
    name: str
    of_input: tuple[Node, Node | None]
    of_state: tuple[Node, Node | None]
    projection: Node | None
    size: int

    def call(self, what: str, target: Any, *args: Any) -> Node:
        """A call that each step has, and what it computes there."""
        call = self.insert.call(target, *args)
        call.meta[ALIKE] = self.name, what
        return call

    def gate(self, gates: Node, first: int, count: int = 1) -> Node:
        """Some of the gates, which stand one behind the other."""
        stop = (first + count) * self.size
        return self.insert.slice(gates, len(shape_of(gates)) - 1, first * self.size, stop)

    def plus_state(self, gates: Node, hidden: Node | None) -> Node:
        """Gates of the input plus those of the state."""
        if hidden is None:
            return gates
        added = self.call("of_state", aten.linear.default, hidden, *self.of_state)
        return self.call("gates", aten.add.Tensor, gates, added)


Step: TypeAlias = "Callable[[_Layer, Node, State], State]"


def _lstm_step(layer: _Layer, gates: Node, state: State) -> State:
    """``c = f * c + i * g`` and ``h = o * tanh(c)``; gates are in the order i, f, o, g."""
    call = layer.call
    hidden, cell = state
    gates = layer.plus_state(gates, hidden)
    opened = call("opened", aten.sigmoid.default, layer.gate(gates, 0, 3))
    wanted = call("wanted", aten.tanh.default, layer.gate(gates, 3))
    new = call("added", aten.mul.Tensor, layer.gate(opened, 0), wanted)
    if cell is not None:
        kept = call("cell", aten.mul.Tensor, layer.gate(opened, 1), cell)
        new = call("cell", aten.add.Tensor, kept, new)
    shown = call("shown", aten.tanh.default, new)
    hidden = call("hidden", aten.mul.Tensor, layer.gate(opened, 2), shown)
    if layer.projection is not None:
        hidden = call("projected", aten.linear.default, hidden, layer.projection)
    return [hidden, new]


def _gru_step(layer: _Layer, gates: Node, state: State) -> State:
    """``n = tanh(x_n + r * h_n)`` and ``h = n + z * (h - n)``; gates are in the order r, z, n."""
    call = layer.call
    (hidden,) = state
    opened, wanted = layer.gate(gates, 0, 2), layer.gate(gates, 2)
    memory = layer.of_state[1]
    if hidden is not None:
        of_state = call("of_state", aten.linear.default, hidden, *layer.of_state)
        opened = call("gates", aten.add.Tensor, opened, layer.gate(of_state, 0, 2))
        memory = layer.gate(of_state, 2)
    elif memory is not None:
        memory = layer.insert.settled(layer.gate(memory, 2), "memory")
    opened = call("opened", aten.sigmoid.default, opened)
    if memory is not None:
        recalled = call("recalled", aten.mul.Tensor, layer.gate(opened, 0), memory)
        wanted = call("gate", aten.add.Tensor, wanted, recalled)
    new = call("new", aten.tanh.default, wanted)
    keep = layer.gate(opened, 1)
    if hidden is None:
        return [call("hidden", aten.sub.Tensor, new, call("kept", aten.mul.Tensor, keep, new))]
    lost = call("lost", aten.sub.Tensor, hidden, new)
    kept = call("kept", aten.mul.Tensor, keep, lost)
    return [call("hidden", aten.add.Tensor, new, kept)]


def _plain_step(function: Any) -> Step:
    def step(layer: _Layer, gates: Node, state: State) -> State:
        return [layer.call("hidden", function, layer.plus_state(gates, state[0]))]

    return step


@dataclass(frozen=True)
class _Cell:
    """A kind of recurrent cell.

    Attributes:
        step: computes the next state.
        order: of the gates, as the step wants them.
        states: how many tensors a state is.
        own_bias: gates whose bias of the state stays with the state.
    """

    step: Step
    order: Sequence[int]
    states: int = 1
    own_bias: frozenset[int] = frozenset()


_LSTM = _Cell(_lstm_step, (0, 1, 3, 2), states=2)
_GRU = _Cell(_gru_step, (0, 1, 2), own_bias=frozenset({2}))
_TANH = _Cell(_plain_step(aten.tanh.default), (0,))
_RELU = _Cell(_plain_step(aten.relu.default), (0,))


def _layer(insert: Insertion, cell: _Cell, parameters: Sequence[Node]) -> _Layer:
    """Weights and biases of one direction of one layer, gates in the order of the step."""
    of_input, of_state, *rest = parameters
    gates = len(cell.order)
    size = int(shape_of(of_input)[0]) // gates
    biases, projection = rest[:2] if len(rest) > 1 else [], rest[-1] if len(rest) % 2 else None

    def ordered(value: Node, kept: Sequence[int] = range(gates)) -> Node:
        parts = []
        for gate in cell.order:
            part = insert.slice(value, 0, gate * size, (gate + 1) * size)
            parts.append(part if gate in kept else insert.call(aten.zeros_like.default, part))
        if all(part is value for part in parts):
            return value
        return insert.call(aten.cat.default, parts) if len(parts) > 1 else parts[0]

    def weight(value: Node, name: str) -> Node:
        in_order = list(cell.order) == list(range(gates))
        return value if in_order else insert.settled(ordered(value), name)

    bias = own = None
    if biases:
        shared = [gate for gate in range(gates) if gate not in cell.own_bias]
        both = insert.call(aten.add.Tensor, ordered(biases[0]), ordered(biases[1], shared))
        bias = insert.settled(both, "bias")
        if cell.own_bias:
            own = insert.settled(ordered(biases[1], list(cell.own_bias)), "state_bias")
    return _Layer(
        insert,
        f"{_name(of_input)}, {_name(of_state)}",
        (weight(of_input, "input_weight"), bias),
        (weight(of_state, "state_weight"), own),
        projection,
        size,
    )


def _name(weight: Node) -> str:
    return str(weight.target) if weight.op == "get_attr" else weight.name


def _initial(insert: Insertion, state: Node, index: int | None) -> Node | None:
    """The state that a layer starts with, ``(batch, features)``; ``None``: zeros."""
    if state.target is aten.zeros.default and overwritten_by(state) is None:
        return None
    fixed = is_constant(state) and not insert.is_trained(state)
    if fixed and not bool(constant_of(insert.model, state).any()):
        return None
    return state if index is None else insert.call(aten.select.int, state, 0, index)


def _layers(cell: _Cell) -> Rewrite:
    """``lstm``, ``gru`` and ``rnn_*``: one result for all steps, and the last states."""

    def rewrite(insert: Insertion) -> Node | None:
        node = insert.node
        data, given, parameters = cast("tuple[Node, Any, Sequence[Node]]", node.args[:3])
        biased, layers, dropout, training, both_ways, batch_first = cast(
            "tuple[Any, ...]", node.args[3:9]
        )
        directions = 2 if both_ways else 1
        shape = shape_of(data)
        steps: Any = shape[1 if batch_first else 0] if len(shape) == 3 else None
        if not isinstance(steps, int) or not 0 < steps * layers * directions <= MAX_STEPS:
            return None
        if (training and dropout and not insert.training) or not isinstance(shape[-1], int):
            return None
        each = len(parameters) // (layers * directions)
        if each < (4 if biased else 2):
            return None
        states = list(given) if cell.states > 1 else [given]
        time = 1 if batch_first else 0
        last: list[State] = []
        for number in range(layers):
            results = []
            for direction in range(directions):
                index = number * directions + direction
                layer = _layer(insert, cell, parameters[index * each : (index + 1) * each])
                state = [_initial(insert, value, index) for value in states]
                shown, state = _run(layer, cell, data, state, time, backwards=direction == 1)
                results.append(shown)
                last.append(state)
            data = results[0] if len(results) == 1 else insert.call(aten.cat.default, results, 2)
            if dropout and insert.training and number < layers - 1:
                data = insert.call(aten.dropout.default, data, dropout, training)
        _reroute(insert, 0, data)
        for position in range(cell.states):
            if _is_read(node, position + 1):
                ends = [cast(Node, state[position]) for state in last]
                _reroute(insert, position + 1, insert.call(aten.stack.default, ends))
        return data

    return rewrite


def _run(
    layer: _Layer, cell: _Cell, data: Node, state: State, time: int, *, backwards: bool
) -> tuple[Node, State]:
    """All steps of one direction: hidden states in the order of the input, and the last state."""
    insert = layer.insert
    gates = insert.call(aten.linear.default, data, *layer.of_input)
    steps = range(int(shape_of(data)[time]))
    hidden: dict[int, Node] = {}
    for step in reversed(steps) if backwards else steps:
        row = insert.call(aten.select.int, gates, time, step)
        state = cell.step(layer, row, state)
        hidden[step] = insert.call(aten.unsqueeze.default, cast(Node, state[0]), time)
    shown = [hidden[step] for step in steps]
    result = shown[0] if len(shown) == 1 else insert.call(aten.cat.default, shown, time)
    return result, state


def _cells(cell: _Cell) -> Rewrite:
    """``lstm_cell``, ``gru_cell`` and ``rnn_*_cell``: one step."""

    def rewrite(insert: Insertion) -> Node | None:
        node = insert.node
        data, given = cast("tuple[Node, Any]", node.args[:2])
        parameters = [value for value in node.args[2:6] if isinstance(value, Node)]
        if len(shape_of(data)) != 2 or len(parameters) not in (2, 4):
            return None
        states = list(given) if cell.states > 1 else [given]
        layer = _layer(insert, cell, parameters)
        gates = layer.call("of_input", aten.linear.default, data, *layer.of_input)
        state = cell.step(layer, gates, [_initial(insert, value, None) for value in states])
        if cell.states > 1:
            for position, value in enumerate(state):
                _reroute(insert, position, cast(Node, value))
        return state[0]

    return rewrite


def _is_read(node: Node, index: int) -> bool:
    return any(user.args[1] == index and user.users for user in node.users)


def _reroute(insert: Insertion, index: int, value: Node) -> None:
    """Let those who read one of several results read ``value``."""
    for user in insert.node.users:
        if user.target is operator.getitem and user.args[1] == index:
            user.replace_all_uses_with(value)


RECURRENT: Mapping[Any, Rewrite] = MappingProxyType(
    {
        aten.gru.input: _layers(_GRU),
        aten.gru_cell.default: _cells(_GRU),
        aten.lstm.input: _layers(_LSTM),
        aten.lstm_cell.default: _cells(_LSTM),
        aten.rnn_relu.input: _layers(_RELU),
        aten.rnn_relu_cell.default: _cells(_RELU),
        aten.rnn_tanh.input: _layers(_TANH),
        aten.rnn_tanh_cell.default: _cells(_TANH),
    }
)
"""By overload."""
