"""From decided ops to observers and what is shown: groups that share a scale, edges, op plans.

Tensors that must share quantization parameters are found as groups over the whole graph (a
union-find), so that the result does not depend on the order of the nodes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch.fx import Node

from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.graph import (
    describe,
    effective_users,
    is_constant,
    module_path,
    tensor_meta,
)
from custom_quantizer.core.rewriting import ALIKE, ORIGINAL_NAME, original_name, original_target
from custom_quantizer.core.schemes import OBSERVERS, OpScheme, TensorScheme
from custom_quantizer.ops import OF_TARGET, Formats, PatternMatch, rule_of
from custom_quantizer.ops.backend import Backend, Delegation, Support
from custom_quantizer.ops.placement import Placement, tally
from custom_quantizer.planning.drafts import DraftOp, Drafts, same_format
from custom_quantizer.planning.model_io import ModelIO
from custom_quantizer.planning.plan import (
    Derivation,
    Edge,
    NodeAnnotation,
    OpPlan,
    Plan,
    Role,
    TensorPlan,
)

# Keys of values in the union-find: a node's own output, or a tensor requantized for consumers.
_Key = tuple[Any, ...]


class _Groups:
    """Union-find over values; the smallest-numbered member names the group."""

    def __init__(self) -> None:
        self._parent: dict[_Key, _Key] = {}

    def find(self, key: _Key) -> _Key:
        root = key
        while (parent := self._parent.setdefault(root, root)) != root:
            root = parent
        while self._parent[key] != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def union(self, a: _Key, b: _Key) -> None:
        self._parent[self.find(b)] = self.find(a)


class Annotator:
    """Turns settled ops into groups, edges and the plan that is shown."""

    def __init__(self, ops: Drafts, io: ModelIO, backend: Backend, training: bool) -> None:
        self._ops = ops
        self._training = training
        self._io = io
        self._backend = backend
        self._in_steps = backend.in_steps(io.node.graph)
        self._groups = _Groups()
        self._numbers: dict[_Key, int] = {}
        self._schemes: dict[_Key, TensorScheme] = {}

    def plan(self, warnings: tuple[str, ...]) -> Plan:
        """Join what shares a scale, number the groups, and write down every edge and op."""
        self._join()
        self._choose_schemes()
        annotations: dict[str, NodeAnnotation] = {}
        for node in self._io.inputs:
            annotations[node.name] = NodeAnnotation({}, self._activation(("out", node), node))
        plans = _as_written([(op.node, self._op_plan(op, annotations)) for op in self._ops])
        outputs = {
            node.name: self._activation(self._key(node, fmt), node)
            for node, fmt in self._io.outputs
        }
        if outputs:
            annotations[self._io.node.name] = NodeAnnotation(outputs, None)
        return Plan(
            plans,
            warnings,
            annotations,
            self._io.integer_inputs,
            self._io.integer_outputs,
        )

    def _join(self) -> None:
        """Put what is moved into the group of the tensor that it is moved from.

        And what each step of a recurrent layer computes into one, of which much more is seen.
        What is joined, too, but for parts that others compute with: these have an observer of
        their own until the data are known (:mod:`custom_quantizer.calibration.joins`).
        """
        read = {self._key(node, fmt) for node, fmt in self._io.outputs}
        joins: list[tuple[_Key, _Key]] = []
        alike: dict[tuple[object, TensorScheme | None], _Key] = {}
        for op in self._ops:
            if op.activation is None or op.match is None or op.is_dynamic:
                continue
            if ALIKE in op.node.meta:
                key = ("out", op.output)
                self._groups.union(alike.setdefault((op.node.meta[ALIKE], op.made), key), key)
            keys = dict.fromkeys(self._input_keys(op))
            if not op.moves_values:
                read.update(keys)
            elif len(keys) > 1:
                joins += [(key, ("out", op.output)) for key in keys]
            else:
                for key in keys:
                    self._groups.union(key, ("out", op.output))
        apart = set[_Key]() if self._training else {self._groups.find(key) for key in read}
        together = [(key, out) for key, out in joins if self._groups.find(key) not in apart]
        for key, out in together:
            self._groups.union(key, out)

    def _input_keys(self, op: DraftOp) -> list[_Key]:
        inputs = cast(PatternMatch, op.match).inputs
        return [self._key(tensor, op.wanted(i)) for i, tensor in enumerate(inputs)]

    def _key(self, tensor: Node, wanted: TensorScheme) -> _Key:
        """The producer's own output where the formats agree, else a requantized copy of it."""
        source = self._ops.producer.get(tensor)
        given = self._io.inputs.get(tensor)
        if source is not None and not source.is_dynamic:
            given = source.made
        centered = source is not None and source.centered
        if centered and given is not None and given.format == wanted.format:
            return ("out", tensor)  # zero point 0 is one that affine consumers read as well
        if same_format(given, wanted):
            return ("out", tensor)
        return ("requantized", tensor, wanted.format, wanted.symmetric)

    def _choose_schemes(self) -> None:
        """The ops that produce the tensors of a group choose its observer.

        Where they name several, the one wins that comes first in ``OBSERVERS``: it clips least.
        """
        members: dict[_Key, list[tuple[bool, int, str, TensorScheme]]] = defaultdict(list)

        def add(key: _Key, made: bool, scheme: TensorScheme) -> None:
            name = scheme.observer
            rank = next(i for i, kind in enumerate(OBSERVERS) if name.startswith(kind))
            members[self._groups.find(key)].append((not made, rank, name, scheme))

        for node, fmt in self._io.inputs.items():
            add(("out", node), True, fmt)
        for node, fmt in self._io.outputs:
            add(self._key(node, fmt), False, fmt)
        for op in self._ops:
            if op.activation is None or op.match is None or op.is_dynamic:
                continue
            for i, key in enumerate(self._input_keys(op)):
                add(key, False, op.wanted(i))
            add(("out", op.output), not op.moves_values, cast(TensorScheme, op.made))
        for root, found in members.items():
            self._schemes[root] = min(found, key=lambda member: member[:3])[3]

    def _number(self, key: _Key) -> int:
        return self._numbers.setdefault(self._groups.find(key), len(self._numbers))

    def _activation(self, key: _Key, tensor: Node) -> Edge:
        scheme = self._schemes[self._groups.find(key)]
        return Edge("activation", self._number(key), describe(tensor), scheme)

    def _op_plan(self, op: DraftOp, annotations: dict[str, NodeAnnotation]) -> OpPlan:
        tensors: list[TensorPlan] = []
        if op.activation is not None and op.match is not None:
            tensors = self._annotate(op, op.match, annotations)
        elif op.table is not None and op.match is not None:
            (table,) = op.match.inputs
            tensors = [self._annotate_constant(op, table, op.table, "table", annotations)]
        elif op.operand is not None:
            tensors = [self._annotate_constant(op, *op.operand, "operand", annotations)]
        elif op.abstains:
            self._read_rows(op, annotations)
        scheme = op.scheme.name if op.scheme is not None else None
        if op.moves_values and op.follows is not None:
            scheme = f"a{op.follows.format.bits}"
        delegation = _predict(op, self._backend) if op.activation is not None else None
        kernel = (
            self._backend.in_float(op.node, self._in_steps)
            if delegation is None
            else delegation.kernel
        )
        return OpPlan(
            node=op.node.name,
            fused=op.fused.name if op.fused is not None else None,
            path=module_path(op.node),
            family=op.rule.family if op.rule is not None else None,
            target=str(op.node.target),
            scheme=scheme,
            reason=op.reason,
            placement=kernel.placement.value,
            tensors=tuple(tensors),
            backend=delegation.kernel.label if delegation is not None else None,
            note=delegation.reason if delegation is not None else "",
            size_bytes=_estimate_bytes(op, delegation) or self._table_bytes(op),
            written=original_name(op.node),
        )

    def _read_rows(self, op: DraftOp, annotations: dict[str, NodeAnnotation]) -> None:
        """Rows of a table that others want as integers, in float: so that it can be stored so."""
        rows: dict[str, Edge] = {}
        for tensor in cast(PatternMatch, op.match).inputs:
            source = self._ops.producer.get(tensor)
            if source is not None and source.support is not None and source.support.table:
                wanted = set(self._wanted_by_readers(tensor).values())
                if len(wanted) == 1:
                    rows[tensor.name] = self._activation(wanted.pop(), tensor)
        if rows:
            annotations[op.node.name] = NodeAnnotation(rows, None)

    def _wanted_by_readers(self, tensor: Node) -> dict[Node, _Key]:
        """By op that reads a tensor on integers, as which."""
        wanted: dict[Node, _Key] = {}
        for reader in self._ops:
            if reader.activation is None or reader.match is None or reader.is_dynamic:
                continue
            for read, key in zip(reader.match.inputs, self._input_keys(reader), strict=True):
                if read is tensor:
                    wanted[reader.node] = self._groups.find(key)
        return wanted

    def _table_bytes(self, op: DraftOp) -> int:
        """Bytes of a table that has no format of its own; 0 for any other op.

        It is stored as the integers that what reads its rows wants, if all want the same.
        """
        if op.match is None or op.support is None or op.support.table is None:
            return 0
        meta = tensor_meta(op.match.inputs[0])
        if meta is None or not is_constant(op.match.inputs[0]):
            return 0
        wanted = self._wanted_by_readers(op.output)
        beside = {reader.node for reader in self._ops if reader.abstains}
        keys = set(wanted.values())
        integers = wanted.keys() | beside >= set(effective_users(op.output)) and len(keys) == 1
        narrow = integers and self._schemes[keys.pop()].format.bits <= 8
        return int(meta.numel()) * (1 if narrow else meta.element_size())

    def _annotate(
        self, op: DraftOp, match: PatternMatch, annotations: dict[str, NodeAnnotation]
    ) -> list[TensorPlan]:
        inputs: dict[str, Edge] = {}
        tensors: list[TensorPlan] = []
        dynamic = op.is_dynamic

        def record(role: Role, tensor: Node, edge: Edge, fmt: IntFormat, why: str) -> None:
            tensors.append(TensorPlan(role, tensor.name, str(fmt), edge.group, why))

        for i, tensor in enumerate(match.inputs):
            if tensor.name in inputs:
                continue
            if isinstance(tensor.meta.get("val"), (list, tuple)):
                continue  # the list a split returns: observed before it and after each getitem
            if dynamic:
                scheme = cast(TensorScheme, op.activation)
                run_time = self._backend.run_time
                shared = () if run_time is None else run_time.shared(match)
                group = self._number(("dynamic", tensor, scheme, shared))
                edge = Edge(
                    "activation", group, describe(tensor), scheme, dynamic=True, shared=shared
                )
            else:
                edge = self._activation(self._key(tensor, op.wanted(i)), tensor)
            inputs[tensor.name] = edge
            record("input", tensor, edge, cast(TensorScheme, edge.scheme).format, op.reason)
        if op.scheme is not None and match.weight is not None:
            support = cast(Support, op.support)
            tensors += self._weight_and_bias(op.scheme, match, support, inputs)
        output = None
        if isinstance(op.output.meta.get("val"), torch.Tensor) and not dynamic:
            output = self._activation(("out", op.output), op.output)
            record("output", op.output, output, cast(TensorScheme, output.scheme).format, op.reason)
        if op.fused is None:
            annotations[op.node.name] = NodeAnnotation(inputs, output)
        else:
            annotations[op.node.name] = NodeAnnotation(inputs, None)
            annotations[op.fused.name] = NodeAnnotation({}, output)
        return tensors

    def _annotate_constant(
        self,
        op: DraftOp,
        constant: Node,
        stored: TensorScheme,
        what: str,
        annotations: dict[str, NodeAnnotation],
    ) -> TensorPlan:
        """Nothing but a constant of an op in float, which is dequantized for it."""
        group = self._number(("weight", constant, stored, 0))
        edge = Edge("weight", group, describe(op.node), stored)
        annotations[op.node.name] = NodeAnnotation({constant.name: edge}, None)
        why = f"{what} of constants" if what == "table" else f"constant {what}"
        return TensorPlan("weight", constant.name, str(stored.format), group, why)

    def _weight_and_bias(
        self, scheme: OpScheme, match: PatternMatch, support: Support, inputs: dict[str, Edge]
    ) -> list[TensorPlan]:
        tensors: list[TensorPlan] = []
        weight = cast(Node, match.weight)
        weight_scheme = support.weight(scheme, match)
        why = "constant weight"
        if weight_scheme != scheme.weight:
            why += f"; {support.weight_reason}"
        key: _Key = ("weight", weight, weight_scheme, match.weight_axis)
        edge = Edge(
            "weight",
            self._number(key),
            describe(match.node),
            weight_scheme,
            axis=match.weight_axis,
        )
        inputs[weight.name] = edge
        tensors.append(
            TensorPlan("weight", weight.name, str(weight_scheme.format), edge.group, why)
        )
        bias = match.bias
        if bias is None:
            return tensors
        dtype, group = "float32", None
        if not is_constant(bias):
            why = f"computed by {describe(bias)}, so it cannot be folded into the accumulator"
        elif scheme.bias is None:
            why = (
                "the input scale is only known at run time"
                if scheme.dynamic
                else f"{scheme.name} leaves it in float"
            )
        else:
            group = self._number(("bias", match.node))
            source = inputs[match.inputs[0].name]
            derivation = Derivation(
                input_group=source.group,
                weight_group=edge.group,
                repeats=match.groups if match.weight_axis == 1 else 1,
                input_bits=cast(TensorScheme, source.scheme).format.bits,
            )
            inputs[bias.name] = Edge(
                "bias", group, describe(match.node), bias=scheme.bias, derivation=derivation
            )
            dtype, why = str(scheme.bias), "derived: input scale x weight scale"
        tensors.append(TensorPlan("bias", bias.name, dtype, group, why))
        return tensors


def _as_written(plans: list[tuple[Node, OpPlan]]) -> tuple[OpPlan, ...]:
    """Calls that were rewritten to others, each as one op again."""
    parts: dict[str, list[tuple[Node, OpPlan]]] = {}
    for node, plan in plans:
        parts.setdefault(plan.written, []).append((node, plan))
    return tuple(_joined(found) for found in parts.values())


def _joined(found: list[tuple[Node, OpPlan]]) -> OpPlan:
    (node, first), plans = found[0], tuple(plan for _, plan in found)
    target = original_target(node)
    if len(plans) == 1 and (ORIGINAL_NAME not in node.meta or target is node.target):
        return first
    rule = OF_TARGET.get(target)
    placed = tally((first.written, Placement(plan.placement)) for plan in plans)
    placement = placed.placements[first.written].value
    schemes = [plan.scheme for plan in plans if plan.scheme is not None]
    with_weight = [p.scheme for p in plans if any(t.role == "weight" for t in p.tensors)]
    scheme = next(filter(None, (*with_weight, *schemes)), None)
    # Of the ops that it becomes, one that keeps it furthest from integers says how it runs; one
    # that moves values only follows others.
    _, decisive = min(
        found,
        key=lambda part: (
            part[1].placement != placement,
            part[1].scheme != scheme,
            _moves(part[0]),
        ),
    )
    names = ", ".join(dict.fromkeys(plan.family or plan.target for plan in plans))
    return OpPlan(
        node=first.written,
        fused=plans[-1].fused,
        path=first.path,
        family=None if rule is None else rule.family,
        target=str(target),
        scheme=scheme,
        reason=decisive.reason,
        placement=placement,
        tensors=tuple(tensor for plan in plans for tensor in plan.tensors),
        backend=decisive.backend,
        note="; ".join(filter(None, (f"becomes {names}", decisive.note))),
        size_bytes=sum(plan.size_bytes for plan in plans),
        written=first.written,
        parts=plans,
    )


def _moves(node: Node) -> bool:
    rule = rule_of(node)
    return rule is not None and rule.moves_values


def _predict(op: DraftOp, backend: Backend) -> Delegation:
    """Where a quantized op will run."""
    match, activation = cast(PatternMatch, op.match), cast(TensorScheme, op.activation)
    weight = None
    if op.scheme is not None and match.weight is not None:
        weight = cast(Support, op.support).weight(op.scheme, match)
    formats = Formats(
        activation.format.bits,
        None if weight is None else weight.format.bits,
        "per_tensor" if weight is None else weight.granularity,
        op.is_dynamic,
    )
    found = backend.predict(match, formats)
    if found.kernel is backend.wide and match.bias is not None and _bias_in_float(op):
        return Delegation(
            backend.missing, f"int{formats.bits} and a bias in float: computed in float"
        )
    return found


def _bias_in_float(op: DraftOp) -> bool:
    return op.scheme is not None and op.scheme.bias is None


def _estimate_bytes(op: DraftOp, delegation: Delegation | None) -> int:
    """Weights, biases and per-channel scales of an op, as the program stores them."""
    if op.table is not None and op.match is not None:
        meta = tensor_meta(op.match.inputs[0])
        return 0 if meta is None else int(meta.numel()) + 4 * int(meta.shape[0])
    if op.operand is not None:
        meta = tensor_meta(op.operand[0])
        return 0 if meta is None else int(meta.numel())
    if op.match is None or op.match.weight is None:
        return 0
    meta = tensor_meta(op.match.weight)
    if meta is None:
        return 0
    each = 4.0 if delegation is None else delegation.kernel.weight_bytes
    channels = int(meta.shape[op.match.weight_axis]) * (
        op.match.groups if op.match.weight_axis == 1 else 1
    )
    per_channel = op.scheme is not None and op.scheme.weight.granularity != "per_tensor"
    extra = 4 * channels * ((op.match.bias is not None) + (per_channel and each != 4.0))
    return int(meta.numel() * each) + extra
