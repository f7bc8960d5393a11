"""Folding of what does not depend on the inputs: position biases, masks, computed weights.

Transformers compute tables of relative positions, attention masks (written piece by piece into
fresh memory) and scaled parameters anew in every call. Their values are always the same; as one
constant they are quantized like any other, and the ops that made them need no kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import add_constant, argument, is_sized_by_data, tensor_meta
from custom_quantizer.core.memory import written_inputs

__all__ = [
    "LIKE_ANOTHER",
    "MAX_GROWTH",
    "ZEROED",
    "draws_numbers",
    "fold_constants",
    "reads_values",
    "restated",
    "training_switches",
    "zero_new_memory",
]

aten = torch.ops.aten

MAX_GROWTH = 1 << 20
"""How many more values a folded constant may have than all it is computed from."""

_RESTATEMENTS = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default})
"""They hand on what they are given. To fold them would copy constants."""
# Their first argument gives a shape or a dtype, and no values.
_LIKE_FIRST = frozenset(
    {
        *(aten.full_like.default, aten.ones_like.default, aten.zeros_like.default),
        *(aten.new_full.default, aten.new_ones.default, aten.new_zeros.default),
    }
)
LIKE_ANOTHER = frozenset(
    {
        aten.expand_as.default,
        aten.reshape_as.default,
        aten.to.other,
        aten.type_as.default,
        aten.view_as.default,
    }
)
"""Their second argument gives a shape or a dtype, and no values."""
# Of which some take only the dtype.
_DTYPE_ONLY = frozenset(
    {
        *(aten.new_full.default, aten.new_ones.default, aten.new_zeros.default),
        *(aten.to.other, aten.type_as.default),
    }
)
# Random if one of these arguments is neither 0 nor False, as in training.
_RANDOM_IF = frozenset({"dropout_p", "train", "training"})
# Memory that nobody has written yet, of given strides.
_UNINITIALIZED = frozenset({"empty_permuted", "empty_strided", "new_empty_strided"})
ZEROED: dict[Any, Any] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
"""Memory that is not written yet, and what has the same memory with zeros in it."""


def restated(node: Node) -> Node:
    """The tensor behind calls that hand on what they are given, of the same values and gradient."""
    while node.target in _RESTATEMENTS:
        (node,) = node.all_input_nodes
    return node


def reads_values(user: Node, source: Node) -> bool:
    """Whether a call reads what is in a tensor, and not its shape and dtype alone."""
    if user.target in _LIKE_FIRST:
        return source in user.args[1:]
    return user.target not in LIKE_ANOTHER or user.args[0] is source


def zero_new_memory(model: GraphModule) -> None:
    """Let memory that nobody has written yet hold zeros, in place.

    Models make room with ``torch.empty`` and write into all of it, piece by piece. What is in the
    pieces not written yet is any number, of which calibration would take ranges.
    """
    for node in model.graph.nodes:
        zeroed = ZEROED.get(node.target)
        if zeroed is None:
            continue
        node.target = zeroed
        if zeroed is not aten.zeros_like.default:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}


def fold_constants(model: GraphModule, *, parameters: bool = True) -> int:
    """Replace every tensor that is the same in all calls by a constant, in place.

    Values are those PyTorch computes, bit for bit: the ops are run in graph order, writes into
    fresh memory included. Buffers that the graph writes, random numbers, and whatever depends on
    an input or on a symbolic size are left alone.

    Args:
        model: a captured graph.
        parameters: fold what is computed from parameters too. Not while they are trained.

    Returns:
        The number of constants made, and of arguments that became numbers.
    """
    excluded: set[Node] = set()
    while True:
        run = _Run(model, parameters, excluded)
        found = run.evaluate()
        if not found - excluded:
            break
        excluded |= found
    made = _replace_uses(model, run)
    if made:
        for node in reversed(list(model.graph.nodes)):
            if node in run.values and node.op == "call_function" and not node.users:
                model.graph.erase_node(node)
        model.graph.eliminate_dead_code()
    return made


class _Run:
    """One attempt to evaluate all constant nodes, in graph order.

    Args:
        model: the graph.
        parameters: whether parameters count as constants.
        excluded: nodes known not to be constant.

    Attributes:
        values: of each constant node, as they are at the end.
        seen: of each computed constant, what its users that are not constant see: a copy, made
            when it is their turn.
    """

    def __init__(self, model: GraphModule, parameters: bool, excluded: set[Node]) -> None:
        self._model = model
        self._parameters = parameters
        self._excluded = excluded
        self._owner: dict[int, Node] = {}  # storage -> the attribute or op whose memory it is
        self._changing: set[int] = set()  # storage that changes from call to call
        self.values: dict[Node, Any] = {}
        self.seen: dict[Node, dict[Node, Tensor]] = {}

    def evaluate(self) -> set[Node]:
        """Run the graph; returns nodes that turned out not to be constant."""
        not_constant: set[Node] = set()
        for node in self._model.graph.nodes:
            if node in self._excluded:
                pass
            elif _is_attribute(node):
                self._read(node)
            elif node.op == "call_function":
                not_constant |= self._call(node)
            if node not in self.values:
                for source in node.all_input_nodes:
                    value = self.values.get(source)
                    if isinstance(value, Tensor) and source.op == "call_function":
                        self.seen.setdefault(source, {})[node] = value.clone()
        return not_constant

    def _read(self, node: Node) -> None:
        value = _attribute(self._model, node)
        if value is None or (isinstance(value, nn.Parameter) and not self._parameters):
            return
        self.values[node] = value
        self._owner.setdefault(_storage(value), node)

    def _call(self, node: Node) -> set[Node]:
        written = [self.values[source] for source in written_inputs(node) if source in self.values]
        memory = {_storage(value) for value in written if isinstance(value, Tensor)}
        arguments = self._arguments(node)
        stateful = any(_is_attribute(self._owner[storage]) for storage in memory)
        if memory and (stateful or arguments is None):
            # Memory that changes from call to call, or with the inputs: nothing in it is constant.
            # What is computed of it later on in this run is not, either, in the next one.
            new = memory - self._changing
            self._changing |= new
            return self._in(new) if new else set()
        if arguments is None:
            return set()
        args, kwargs = arguments
        with torch.no_grad():
            value = cast("Callable[..., Any]", node.target)(*args, **kwargs)
        self.values[node] = value
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                self._owner.setdefault(_storage(tensor), node)
        return set()

    def _arguments(self, node: Node) -> tuple[Any, dict[str, Any]] | None:
        """Arguments of a call, all constant; ``None`` where the call is not constant."""
        if not _is_deterministic(node):
            return None
        args = list(node.args)
        position = int(node.target in LIKE_ANOTHER)
        if node.target in _LIKE_FIRST | LIKE_ANOTHER and position < len(args):
            args[position] = _without_values(node, cast(Node, args[position]))
        sources: list[Node] = []
        torch.fx.node.map_arg((args, node.kwargs), sources.append)
        if not all(source in self.values for source in sources):
            return None
        mapped = torch.fx.node.map_arg((args, node.kwargs), lambda n: self.values[n])
        return cast("tuple[Any, dict[str, Any]]", mapped)

    def _in(self, memory: set[int]) -> set[Node]:
        """All nodes that read some memory, wherever in the graph they stand."""
        found = {
            node
            for node, value in self.values.items()
            if isinstance(value, Tensor) and _storage(value) in memory
        }
        for node in self._model.graph.nodes:
            attribute = _attribute(self._model, node) if _is_attribute(node) else None
            if attribute is not None and _storage(attribute) in memory:
                found.add(node)
        return found


def _without_values(node: Node, source: Node) -> Node | Tensor:
    """A tensor that gives a call what it takes of ``source``, if that is the same in all calls."""
    meta = tensor_meta(source)
    if meta is None:
        return source
    given = () if node.target in _DTYPE_ONLY else meta.shape
    shape = [size for size in given if isinstance(size, int)]
    return torch.empty(shape, dtype=meta.dtype) if len(shape) == len(given) else source


def _is_attribute(node: Node) -> bool:
    """Whether ``node`` reads a parameter or buffer; not what is computed from one in training."""
    return node.op == "get_attr"


def _attribute(model: GraphModule, node: Node) -> Tensor | None:
    value = operator.attrgetter(str(node.target))(model)
    return value if isinstance(value, Tensor) else None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _is_deterministic(node: Node) -> bool:
    """Whether a call gives the same tensors each time, if its inputs are the same."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return (
        target.namespace == "aten"
        and not draws_numbers(node)
        and target._schema.name.removeprefix("aten::") not in _UNINITIALIZED
    )


def draws_numbers(node: Node) -> bool:
    """Whether a call draws random numbers, so that no two runs agree."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    switches = training_switches(node)
    return not switches or any(value for _, _, value in switches)


def training_switches(node: Node) -> list[tuple[int, str, Any]]:
    """Arguments of a call that are neither 0 nor False in training: position, name and value."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        (i, parameter.name, argument(node, i, parameter.name, 0))
        for i, parameter in enumerate(node.target._schema.arguments)
        if parameter.name in _RANDOM_IF
    ]


def _replace_uses(model: GraphModule, run: _Run) -> int:
    """Let every op that is not constant read a stored constant."""
    count = 0
    for node, seen in run.seen.items():
        stored: list[tuple[Tensor, Node]] = []
        for user, value in seen.items():
            if _restates(run, node, value) or not _worth(node, value):
                continue
            constant = next((n for other, n in stored if torch.equal(other, value)), None)
            if constant is None:
                constant = add_constant(model, f"{node.name}_folded", value, user)
                constant.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                stored.append((value, constant))
                count += 1
            user.replace_input_with(node, constant)
    return count + _replace_numbers(model, run)


def _replace_numbers(model: GraphModule, run: _Run) -> int:
    """Let every op that is not constant be told a constant number (``scale.item()``).

    Whole numbers stay where any tensor has such a size: shapes are recorded with its symbol.
    """
    kinds = (torch.SymFloat, torch.SymInt)
    numbers = {
        node: value
        for node, value in run.values.items()
        if node.op == "call_function" and isinstance(node.meta.get("val"), kinds)
    }
    sized = bool(numbers) and any(map(is_sized_by_data, model.graph.nodes))
    count = 0
    for node, value in numbers.items():
        if sized and isinstance(node.meta["val"], torch.SymInt):
            continue
        for user in [user for user in node.users if user not in run.values]:
            _tell(user, node, value)
            count += 1
    return count


def _tell(user: Node, source: Node, number: float) -> None:
    """Put a number in the place of what gives it."""
    given = (user.args, user.kwargs)
    user.args, user.kwargs = torch.fx.node.map_arg(given, lambda n: number if n is source else n)


def _restates(run: _Run, node: Node, value: Tensor) -> bool:
    """Whether a node only hands on a stored constant."""
    if node.target not in _RESTATEMENTS:
        return False
    (source,) = node.all_input_nodes
    return _is_attribute(source) and torch.equal(run.values[source], value)


def _worth(node: Node, value: Tensor) -> bool:
    """Whether a constant is not much larger than what it is computed from."""
    sources: set[Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in sources:
                sources.add(source)
                stack.append(source)
    metas = [tensor_meta(source) for source in sources if _is_attribute(source)]
    return value.numel() <= MAX_GROWTH + sum(m.numel() for m in metas if m is not None)
