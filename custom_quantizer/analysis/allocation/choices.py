"""What can be chosen in a network, and what a choice becomes.

Two kinds of things have a width:

- the weight of a layer. Ops that share a weight take one scheme: they are one :class:`Unit`;
- an activation. Tensors that are the same integers (before and behind a pooling by maximum or a
  reshape, all that is concatenated) have one format: they are one :class:`TensorGroup`.

The scheme of an op says both the format of its weight and that of its inputs and output. So ops
whose outputs are in one group take one format of activations: they are one *block*. Where two
blocks with different formats meet, the tensor between them is requantized, and is as good as the
coarser of the two.

All of it is read off the plans of the network with each scheme everywhere; so are the costs, which
do not depend on neighbours. What a mixture becomes is planned once more, as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from custom_quantizer.accuracy.defaults import with_chosen_observer
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.graph import detached_copy, state_buffers, tensor_meta
from custom_quantizer.core.schemes import OpScheme, TensorScheme, coerce_scheme
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import ConfigError, InputError
from custom_quantizer.ops import PatternMatch, match_of
from custom_quantizer.ops.attention import MATMUL
from custom_quantizer.ops.backend import BackendLike
from custom_quantizer.ops.gemm import CONV_TRANSPOSE
from custom_quantizer.planning.plan import Edge, OpPlan, Plan
from custom_quantizer.planning.quantizer import IntegerQuantizer

__all__ = [
    "Choices",
    "TensorGroup",
    "Unit",
    "activation_label",
    "find_choices",
    "schemes_of",
    "weight_label",
]


@dataclass(frozen=True)
class Unit:
    """Ops that take one scheme together: one op, or all that share a weight.

    Attributes:
        name: of the first op.
        ops: nodes of the captured graph.
        path: module path of the first op.
        block: units of one block have one format of activations.
        schemes: names of those that every op of it can take.
        parameters: elements of the weight; 0 without one.
        macs: multiplications of a weight (or of a second activation) by an activation, per sample.
        observers: calls that hand on the weight in the prepared graph.
        axis: output-channel axis of the weight.
        formats: of the weight, by its label.
    """

    name: str
    ops: tuple[str, ...]
    path: str
    block: int
    schemes: tuple[str, ...]
    parameters: int = 0
    macs: int = 0
    observers: tuple[str, ...] = ()
    axis: int = 0
    formats: Mapping[str, TensorScheme] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorGroup:
    """Activations that are the same integers.

    Attributes:
        name: of the first tensor.
        path: module path of the op that makes it.
        observers: calls that hand them on in the prepared graph.
        blocks: that make or read one of them.
        formats: by label.
    """

    name: str
    path: str
    observers: tuple[str, ...]
    blocks: tuple[int, ...]
    formats: Mapping[str, TensorScheme]


@dataclass(frozen=True, eq=False)
class Choices:
    """All that can be chosen in one network.

    Attributes:
        schemes: the candidates, by name.
        base: name of the most precise one; ops that cannot be chosen have it.
        plans: with each scheme everywhere.
        prepared: the network with observers, ``base`` everywhere.
        units: in graph order.
        groups: in graph order.
        backend: what is planned for.
    """

    schemes: Mapping[str, OpScheme]
    base: str
    plans: Mapping[str, Plan]
    prepared: GraphModule
    units: tuple[Unit, ...]
    groups: tuple[TensorGroup, ...]
    backend: BackendLike

    @property
    def layers(self) -> tuple[Unit, ...]:
        """The units with a weight."""
        return tuple(unit for unit in self.units if unit.parameters)

    @property
    def activations(self) -> tuple[str, ...]:
        """Labels of the formats of activations, without repetition."""
        return tuple(dict.fromkeys(map(activation_label, self.schemes.values())))

    def quantizer(self, chosen: Mapping[str, str]) -> IntegerQuantizer:
        """The quantizer of a choice: ``base`` for all, and a rule for each op that differs.

        Args:
            chosen: name of a unit -> name of its scheme; ``base`` for units that are left out.
        """
        made = IntegerQuantizer(self.backend).set_global(self.schemes[self.base])
        wanted = {op: chosen.get(u.name, self.base) for u in self.units for op in u.ops}
        # A call that became several ops may have given its name to one of them, and a rule with
        # that name selects them all; so it comes first, and the others get rules of their own.
        spread = {
            op.written: op.parts
            for op in self.plans[self.base].ops
            if wanted.get(op.written, self.base) != self.base
        }
        for name, parts in spread.items():
            made.set_node_name(name, self.schemes[wanted.pop(name)])
            for part in parts:
                if part.node == name:
                    continue
                # Of what only moves values any rule but None lets it do so.
                scheme = None if part.scheme is None else wanted.pop(part.node, self.base)
                made.set_node_name(part.node, None if scheme is None else self.schemes[scheme])
        for name, scheme in wanted.items():
            if scheme != self.base:
                made.set_node_name(name, self.schemes[scheme])
        return made

    def differences(self, chosen: Mapping[str, str], plan: Plan) -> tuple[str, ...]:
        """Where ``plan`` does not do with a chosen op what the plan of its scheme alone does.

        Compared are the scheme, the backend's kernel and the bytes of every op that can be chosen.
        """
        found = []
        for unit in self.units:
            name = chosen.get(unit.name, self.base)
            for op in unit.ops:
                expected, planned = self.plans[name].op(op), plan.op(op)
                for what, a, b in _compared(expected, planned):
                    if a != b:
                        found.append(f"{op}: {what} {b}, predicted {a}")
        return tuple(found)


def _compared(expected: OpPlan, planned: OpPlan) -> Iterable[tuple[str, object, object]]:
    yield "scheme", expected.scheme, planned.scheme
    yield "backend", expected.backend, planned.backend
    yield "bytes", expected.size_bytes, planned.size_bytes


def schemes_of(names: Sequence[str | OpScheme]) -> dict[str, OpScheme]:
    """The candidates by name, in the order given.

    Raises:
        ConfigError: there are none, one stands twice, or one quantizes at run time.
        SchemeError: a name does not parse.
    """
    if isinstance(names, str):
        raise ConfigError(f"schemes={names!r}: give a list of schemes, such as ['a8w8', 'a8w4']")
    found: dict[str, OpScheme] = {}
    for given in names:
        scheme = coerce_scheme(given)
        if scheme is None:
            raise ConfigError("schemes: None leaves ops in float, which has no width to choose")
        if scheme.dynamic:
            raise ConfigError(
                f"schemes: {scheme.name} quantizes activations at run time, and is not compared "
                "with static schemes; choose among schemes such as a8w8 and a8w4"
            )
        if scheme.name in found:
            raise ConfigError(f"schemes: {scheme.name} stands twice")
        found[scheme.name] = scheme
    if not found:
        raise ConfigError("schemes: there is none to choose from, give at least one")
    return found


_PLAIN_WEIGHT = TensorScheme(IntFormat(8, narrow=True), True, "per_channel")
_PLAIN_ACTIVATION = TensorScheme(IntFormat(8))


def weight_label(scheme: OpScheme) -> str:
    """What a scheme says of the weight, such as ``w4`` or ``w4-per_tensor``."""
    return OpScheme(_PLAIN_ACTIVATION, scheme.weight).name.removeprefix("a8")


def activation_label(scheme: OpScheme) -> str:
    """What a scheme says of activations, such as ``a8`` or ``a4-percentile99.9``."""
    return OpScheme(scheme.activation, _PLAIN_WEIGHT).name.replace("w8", "", 1)


def find_choices(
    exported: GraphModule,
    schemes: Sequence[str | OpScheme],
    backend: BackendLike = "xnnpack",
    *,
    named_observers: bool = False,
) -> Choices:
    """Find out what can be chosen in a captured graph.

    Args:
        exported: what ``torch.export.export(...).module()`` returns; not changed.
        schemes: the candidates.
        backend: what to plan for.
        named_observers: let activations have the observer of their scheme, and not the one that
            ``quantize`` chooses below 8 bits where a scheme names none.

    Raises:
        ConfigError: the schemes are not usable, or no op takes the most precise of them.
        InputError: the model writes its own buffers, so that samples are not independent.
    """
    named = schemes_of(schemes)
    base = max(named, key=lambda name: _precision(named[name]))
    plans = {}
    prepared: GraphModule | None = None
    for name in (base, *(name for name in named if name != base)):
        quantizer = IntegerQuantizer(backend).set_global(named[name])
        with tools():
            model = prepare_pt2e(detached_copy(exported), quantizer)
        plans[name] = quantizer.last_plan
        prepared = prepared or cast(GraphModule, model)
    assert prepared is not None
    # Of the functional graph: before, ops in place look as if they wrote an input.
    if state_buffers(prepared):
        raise InputError(
            "the model writes its own buffers (a cache, a counter, a recurrent state), so what it "
            "gives for a sample depends on those before; widths are searched for other models"
        )
    finder = _Finder(named, base, plans, prepared, named_observers)
    if not finder.units:
        raise ConfigError(f"there is nothing to choose: no op of the graph takes {base}")
    return Choices(
        named,
        base,
        {name: plans[name] for name in named},
        prepared,
        tuple(finder.units),
        tuple(finder.groups),
        backend,
    )


def _precision(scheme: OpScheme) -> tuple[int, int]:
    return scheme.activation.format.bits, scheme.weight.format.bits


class _Sets:
    """Union-find over small numbers; the smallest names its set."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, items: Sequence[int]) -> None:
        for other in items[1:]:
            a, b = sorted((self.find(items[0]), self.find(other)))
            self._parent[b] = a


class _Finder:
    """Reads units, blocks and groups off the plans."""

    def __init__(
        self,
        schemes: Mapping[str, OpScheme],
        base: str,
        plans: Mapping[str, Plan],
        prepared: GraphModule,
        named_observers: bool,
    ) -> None:
        self._observed = (lambda fmt: fmt) if named_observers else with_chosen_observer
        self._schemes, self._base, self._plans = schemes, base, plans
        self._nodes: dict[str, Node] = {node.name: node for node in prepared.graph.nodes}
        self._plan = plans[base]
        self._ops = [op for op in self._plan.parts if self._is_choosable(op)]
        self._batch = _batch_of(prepared)
        sets = _Sets(len(self._ops))
        outputs: dict[int, list[int]] = {}
        weights: dict[int, list[int]] = {}
        for i, op in enumerate(self._ops):
            output = self._output(self._plan, op)
            if output is not None:
                outputs.setdefault(output.group, []).append(i)
            weight = self._weight(self._plan, op)
            weights.setdefault(-1 - i if weight is None else weight.group, []).append(i)
        for joined in (*outputs.values(), *weights.values(), *self._joins(outputs)):
            sets.join(joined)
        self._blocks = [sets.find(i) for i in range(len(self._ops))]
        self.units = [self._unit(indices) for indices in weights.values()]
        self.groups = list(self._groups())

    def _joins(self, outputs: Mapping[int, list[int]]) -> Iterable[list[int]]:
        """Of each op that joins tensors, the ops that make these: the parts have one format."""
        for name, annotation in self._plan.annotations.items():
            output = annotation.output
            if output is not None and self._is_moved(self._nodes[name]):
                edges = dict.fromkeys(edge.group for edge in (*annotation.inputs.values(), output))
                yield [i for group in edges for i in outputs.get(group, ())]

    def _is_choosable(self, op: OpPlan) -> bool:
        node = self._nodes[op.node]
        return op.scheme is not None and match_of(node) is not None and not self._is_moved(node)

    @staticmethod
    def _output(plan: Plan, op: OpPlan) -> Edge | None:
        annotation = plan.annotations.get(op.fused or op.node)
        return None if annotation is None else annotation.output

    @staticmethod
    def _weight(plan: Plan, op: OpPlan) -> Edge | None:
        annotation = plan.annotations.get(op.node)
        edges = () if annotation is None else annotation.inputs.values()
        return next((edge for edge in edges if edge.kind == "weight"), None)

    def _unit(self, indices: Sequence[int]) -> Unit:
        ops = [self._ops[i] for i in indices]
        first = ops[0]
        allowed = [
            name
            for name in self._schemes
            if all(self._plans[name].op(op.node).scheme == name for op in ops)
        ]
        macs = sum(_macs(cast(PatternMatch, match_of(self._nodes[op.node]))) for op in ops)
        unit = Unit(
            first.node,
            tuple(op.node for op in ops),
            first.path,
            self._blocks[indices[0]],
            tuple(allowed),
            macs=macs // self._batch,
        )
        edge = self._weight(self._plan, first)
        if edge is None:
            # Of schemes with one format of activations, which differ in the weight, one will do.
            labels = {activation_label(self._schemes[name]): name for name in reversed(allowed)}
            allowed = [name for name in allowed if name in labels.values()]
            return replace(unit, schemes=tuple(allowed))
        formats: dict[str, TensorScheme] = {}
        for name in allowed:
            found = cast(Edge, self._weight(self._plans[name], first))
            formats.setdefault(weight_label(self._schemes[name]), cast(TensorScheme, found.scheme))
        matches = [cast(PatternMatch, match_of(self._nodes[op.node])) for op in ops]
        observers = dict.fromkeys(cast(Node, match.weight) for match in matches)
        meta = tensor_meta(_origin(next(iter(observers))))
        return replace(
            unit,
            parameters=0 if meta is None else int(meta.numel()),
            observers=tuple(node.name for node in observers),
            axis=edge.axis,
            formats=formats,
        )

    def _groups(self) -> Iterable[TensorGroup]:
        """Observed tensors by the number of their group in the plan of ``base``."""
        observers: dict[int, dict[Node, None]] = {}
        for name, annotation in self._plan.annotations.items():
            node = self._nodes[name]
            for source in node.all_input_nodes:
                edge = annotation.inputs.get(_origin(source).name)
                if edge is not None and edge.kind == "activation" and source.op == "call_module":
                    observers.setdefault(edge.group, {})[source] = None
            if annotation.output is not None:
                calls = [user for user in node.users if user.op == "call_module"]
                observers.setdefault(annotation.output.group, {}).update(dict.fromkeys(calls[:1]))
        blocks: dict[int, dict[int, None]] = {}
        formats: dict[int, dict[str, TensorScheme]] = {}
        for i, op in enumerate(self._ops):
            for key in self._edges(op):
                edge = self._edge(self._plan, op, key)
                if edge is None or edge.kind != "activation":
                    continue
                blocks.setdefault(edge.group, {})[self._blocks[i]] = None
                known = formats.setdefault(edge.group, {})
                for name, scheme in self._schemes.items():
                    there = self._edge(self._plans[name], op, key)
                    if there is not None and there.kind == "activation":
                        fmt = self._observed(cast(TensorScheme, there.scheme))
                        known.setdefault(activation_label(scheme), fmt)
        order = {node: i for i, node in enumerate(self._nodes.values())}
        for group in sorted(
            blocks, key=lambda group: min(map(order.__getitem__, observers[group]))
        ):
            calls = sorted(observers[group], key=order.__getitem__)
            origin = _origin(calls[0])
            # What is moved was rounded before, and rounding it again changes nothing.
            made = [call for call in calls if not self._is_moved(_origin(call))]
            yield TensorGroup(
                origin.name,
                self._path(origin.name),
                tuple(call.name for call in made or calls),
                tuple(blocks[group]),
                formats[group],
            )

    @staticmethod
    def _is_moved(node: Node) -> bool:
        match = match_of(node)
        return match is not None and match.rule.moves_values

    def _edges(self, op: OpPlan) -> Iterable[str | None]:
        annotation = self._plan.annotations.get(op.node)
        return () if annotation is None else (*annotation.inputs, None)

    def _edge(self, plan: Plan, op: OpPlan, source: str | None) -> Edge | None:
        if source is None:
            return self._output(plan, op)
        annotation = plan.annotations.get(op.node)
        return None if annotation is None else annotation.inputs.get(source)

    def _path(self, tensor: str) -> str:
        for op in self._plan.parts:
            if tensor in (op.node, op.fused):
                return op.path
        return ""


def _origin(node: Node) -> Node:
    """What an observer observes."""
    while node.op == "call_module" and node.args:
        node = cast(Node, node.args[0])
    return node


def _batch_of(prepared: GraphModule) -> int:
    """Samples of the example that the graph was captured with."""
    for node in prepared.graph.nodes:
        meta = tensor_meta(node) if node.op == "placeholder" else None
        if meta is not None and meta.dim():
            return _hint(meta.shape[0])
    return 1


def _hint(size: int | torch.SymInt) -> int:
    """A size; of one that varies, that of the example."""
    return size if isinstance(size, int) else int(cast(int, size.node.hint))


def _shape(node: Node) -> list[int]:
    meta = tensor_meta(_origin(node))
    return [] if meta is None else [_hint(size) for size in meta.shape]


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _macs(match: PatternMatch) -> int:
    """Multiplications of an op, for the whole batch of the example."""
    if match.weight is not None:
        # Each value of the output reads a whole filter; of a transposed one, each of the input.
        spread = match.inputs[0] if match.rule is CONV_TRANSPOSE else match.node
        return _product(_shape(spread)) * _product(_shape(match.weight)[1:])
    if match.rule is MATMUL:
        return _product(_shape(match.node)) * _shape(match.inputs[0])[-1]
    return 0
