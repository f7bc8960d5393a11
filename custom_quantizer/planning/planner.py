"""Graph and config in, plan out: every decision, and its reason.

The planner reads the graph and writes nothing. Tensors that must share quantization parameters
are found as groups over the whole graph (a union-find), so that the result does not depend on the
order of the nodes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from custom_quantizer.config.rules import Config, Decision, returned_nodes
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.graph import (
    FOLDED_KEY,
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_empty,
    module_path,
    tensor_meta,
)
from custom_quantizer.core.rewriting import FULL_PRECISION, ORIGINAL_NAME, original_name
from custom_quantizer.core.schemes import OBSERVERS, OpScheme, TensorScheme, activation_scheme
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.errors import ConfigError, nearest
from custom_quantizer.ops import (
    OF_TARGET,
    Formats,
    OpRule,
    PatternMatch,
    QParamSharing,
    Trait,
    rule_of,
    unknown_op,
)
from custom_quantizer.ops.backend import Backend, Delegation, Support
from custom_quantizer.ops.placement import Placement, Tally, tally
from custom_quantizer.ops.rewrites.canonical import overwritten_by
from custom_quantizer.planning.insertion import ANNOTATION_KEY
from custom_quantizer.planning.profitability import Kind, Step, unprofitable

__all__ = ["Derivation", "Edge", "NodeAnnotation", "OpPlan", "Plan", "TensorPlan", "make_plan"]

Role = Literal["input", "weight", "bias", "output"]


@dataclass(frozen=True)
class TensorPlan:
    """What one tensor of an op becomes.

    Attributes:
        role: of the tensor in the op.
        tensor: name of the node that produces it.
        dtype: such as ``int8``; ``float32`` when it is not quantized.
        group: tensors of one group share scale and zero point.
        reason: why.
    """

    role: Role
    tensor: str
    dtype: str
    group: int | None
    reason: str


@dataclass(frozen=True)
class OpPlan:
    """What one op becomes.

    Attributes:
        node: the anchor.
        fused: activation that is part of the op, if any.
        path: module path.
        family: of the registry; ``None`` for unknown ops.
        target: the aten overload.
        scheme: name; ``None`` when the op stays in float.
        reason: the rule that decided, or why it could not be followed.
        placement: where it is expected to compute, a value of
            :class:`~custom_quantizer.ops.placement.Placement`.
        tensors: inputs, weight, bias, output.
        backend: the kernel it is expected to run on; ``None`` for ops in float.
        note: what the backend does with it, where that is not a plain int8 kernel.
        size_bytes: estimated bytes of its constants in the program.
        written: name of the captured call that it is a part of; its own, if it is all of it.
        parts: what a call becomes that runs as other ops than the one that was written.
    """

    node: str
    fused: str | None
    path: str
    family: str | None
    target: str
    scheme: str | None
    reason: str
    placement: str
    tensors: tuple[TensorPlan, ...] = ()
    backend: str | None = None
    note: str = ""
    size_bytes: int = 0
    written: str = ""
    parts: tuple[OpPlan, ...] = ()


@dataclass(frozen=True)
class Derivation:
    """What the scale of a derived bias follows from.

    Attributes:
        input_group: of the op's input.
        weight_group: of its weight.
        repeats: how often the channels of the weight's axis repeat in the op's output.
        input_bits: width of the input.
    """

    input_group: int
    weight_group: int
    repeats: int
    input_bits: int


@dataclass(frozen=True)
class Edge:
    """How one tensor is observed where one op uses or makes it.

    Attributes:
        kind: which observer.
        group: edges of one group share one observer.
        scheme: of an activation or weight.
        bias: format of a derived bias.
        axis: output-channel axis of a weight.
        name: for messages.
        dynamic: quantized at run time.
        derivation: of a bias.
    """

    kind: Literal["activation", "weight", "bias"]
    group: int
    name: str
    scheme: TensorScheme | None = None
    bias: IntFormat | None = None
    axis: int = 0
    dynamic: bool = False
    derivation: Derivation | None = None


@dataclass(frozen=True)
class NodeAnnotation:
    """The edges of one node: by name of the producing node, and the output."""

    inputs: dict[str, Edge]
    output: Edge | None


@dataclass(frozen=True)
class Plan:
    """Every op of a captured graph: what it becomes and why.

    Attributes:
        ops: as they were written, each once, in graph order; one that runs as several has parts.
        warnings: rules that select nothing, and the like.
        annotations: by node name, what the quantizer writes into the graph.
        integer_inputs: dtypes of the inputs that the program takes as integers, by position.
        integer_outputs: of the outputs that it returns as integers, likewise.
    """

    ops: tuple[OpPlan, ...]
    warnings: tuple[str, ...] = ()
    annotations: dict[str, NodeAnnotation] = field(default_factory=dict, repr=False)
    integer_inputs: Mapping[int, str] = field(default_factory=dict)
    integer_outputs: Mapping[int, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[OpPlan, ...]:
        """The ops that run, in graph order."""
        return tuple(part for op in self.ops for part in op.parts or (op,))

    @property
    def tally(self) -> Tally:
        """How many ops are expected to compute where."""
        return tally((op.node, Placement(op.placement)) for op in self.ops)

    @property
    def quantized(self) -> tuple[OpPlan, ...]:
        """Ops that become integer."""
        return tuple(op for op in self.ops if op.scheme is not None)

    @property
    def floating(self) -> tuple[OpPlan, ...]:
        """Ops that stay in float."""
        return tuple(op for op in self.ops if op.scheme is None)

    @property
    def borders(self) -> tuple[str, ...]:
        """One sentence each for what the program takes and returns as integers."""
        sides = (
            ("takes", "input", self.integer_inputs),
            ("returns", "output", self.integer_outputs),
        )
        return tuple(
            f"the program {verb} " + ", ".join(f"{side} {i} as {kind}" for i, kind in found.items())
            for verb, side, found in sides
            if found
        )

    @property
    def size_bytes(self) -> int:
        """Estimated bytes of all constants in the program."""
        return sum(op.size_bytes for op in self.ops)

    def op(self, node: str) -> OpPlan:
        """The plan of the op whose anchor or fused activation is ``node``.

        The name of a call that runs as several ops stands for the one that gives its result.

        Raises:
            ConfigError: there is none.
        """
        for op in self.parts:
            if node in (op.node, op.fused):
                return op
        raise ConfigError(
            f"the plan has no op {node!r}{nearest(node, (part.node for part in self.parts))}"
        )

    def to_json(self) -> str:
        """The ops and warnings as JSON."""
        return json.dumps(
            {
                "ops": [asdict(op) for op in self.ops],
                "integer_inputs": {str(i): dtype for i, dtype in self.integer_inputs.items()},
                "integer_outputs": {str(i): dtype for i, dtype in self.integer_outputs.items()},
                "warnings": list(self.warnings),
            },
            indent=2,
        )

    def __str__(self) -> str:
        rows = [
            (
                op.node,
                op.path,
                op.family or op.target,
                op.scheme or "float32",
                op.backend or op.placement,
                f"{op.size_bytes:,}" if op.size_bytes else "",
                "; ".join(filter(None, (op.reason, op.note))),
            )
            for op in self.ops
        ]
        header = ("node", "module", "op", "scheme", "runs as", "bytes", "why")
        lines = table_lines([header, *rows], left=range(len(header)))
        lines.append(f"{self.tally}; {self.size_bytes:,} bytes of constants (estimated)")
        lines += self.borders
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


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


@dataclass
class _Op:
    """Working state of one op while the plan is made."""

    node: Node
    decision: Decision
    rule: OpRule | None = None
    support: Support | None = None  # what the backend does with its family
    match: PatternMatch | None = None
    fused: Node | None = None
    scheme: OpScheme | None = None
    follows: TensorScheme | None = None  # data-movement ops: the format they pass on
    table: TensorScheme | None = None  # format of the table that it reads rows of, in float
    centered: bool = False  # its output has zero point 0, for a consumer that needs it so
    reason: str = ""

    @property
    def output(self) -> Node:
        return self.fused or self.node

    @property
    def moves_values(self) -> bool:
        return self.rule is not None and self.rule.sharing is QParamSharing.SAME

    def has(self, trait: Trait) -> bool:
        """Whether the family has a trait."""
        return self.rule is not None and trait in self.rule.traits

    @property
    def activation(self) -> TensorScheme | None:
        """Format of inputs and output; ``None`` when the op stays in float."""
        if self.moves_values:
            return self.follows
        return None if self.scheme is None else self.scheme.activation

    @property
    def made(self) -> TensorScheme | None:
        """Format of the output; ``None`` when the op stays in float."""
        given = self.activation
        return replace(given, symmetric=True) if self.centered and given is not None else given

    def wanted(self, position: int) -> TensorScheme:
        """Format of an input."""
        given = cast(TensorScheme, self.activation)
        centered = self.support is not None and position in self.support.requires_symmetric
        return replace(given, symmetric=True) if centered else given


ANNOTATED_BEFORE = "another quantizer annotated it before"


def is_annotated(node: Node) -> bool:
    """Whether a quantizer has annotated ``node``: in a ``ComposableQuantizer``, an earlier one."""
    return bool(getattr(node.meta.get(ANNOTATION_KEY), "_annotated", False))


def make_plan(model: GraphModule, config: Config, backend: Backend) -> Plan:
    """Decide what every op and tensor of ``model`` becomes.

    Args:
        model: what ``torch.export.export(...).module()`` returns, made functional.
        config: the rules.
        backend: what the program will run on.

    Raises:
        ConfigError: a rule names a node or module that does not exist.
    """
    warnings = config.check(model)
    ops = _collect(model, config, backend)
    producer = {op.output: op for op in ops}
    anchors = {op.node: op for op in ops}
    # Data movement has no format of its own: it follows once its neighbours are decided.
    for op in ops:
        if not op.moves_values:
            _settle(op, backend)
    floats = _leave_sums_in_float(ops, anchors)
    _leave_joins_in_float(ops, producer, floats)
    _leave_divisors_in_float(ops, producer)
    io = _model_io(model, config, ops)
    _leave_readers_of_integers_in_float(ops, io, backend)
    _leave_unprofitable_in_float(ops, io, backend)
    _center(ops, producer)
    # What integers it is given comes first; what its consumers want only where it is given none.
    _follow_producers(ops, producer, io.inputs, backend)
    _follow_consumers(ops, anchors)
    _return_integers(io, config, producer)
    return _Annotator(ops, producer, io, backend).plan(tuple(warnings))


_Asked = tuple[str, str]
"""The name under which a config says something of an input or output, and what it says."""


@dataclass
class _ModelIO:
    """What the config asks of the model's own inputs and outputs.

    Attributes:
        inputs: formats.
        outputs: formats.
        node: what returns them.
        returned: outputs that shall be integers, by position among all that the model returns.
        integer_inputs: dtypes of those that are integers, by position.
        integer_outputs: likewise, once the formats of all ops are known.
    """

    inputs: dict[Node, TensorScheme]
    outputs: list[tuple[Node, TensorScheme]]
    node: Node
    returned: dict[int, tuple[Node, _Asked]] = field(default_factory=dict)
    integer_inputs: dict[int, str] = field(default_factory=dict)
    integer_outputs: dict[int, str] = field(default_factory=dict)

    @property
    def wanted(self) -> list[Node]:
        """Tensors that the model returns as integers, or rounded to them."""
        return [node for node, _ in (*self.outputs, *self.returned.values())]


def _model_io(model: GraphModule, config: Config, ops: list[_Op]) -> _ModelIO:
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    io = _ModelIO({}, [], output)
    anchors = {op.node: op for op in ops}
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(placeholders):
        asked = _border(config, "integer_inputs", config.of_input("integer_inputs", node, i), node)
        if not _is_float32(node):
            continue
        found = config.of_input("inputs", node, i)
        fmt: TensorScheme | None = None if found is None else found[1]
        if asked is not None:
            fmt = fmt or _wanted_by_readers(node, anchors)
            io.integer_inputs[i] = _border_dtype(config, "integer_inputs", asked, node, fmt)
        if fmt is not None:
            io.inputs[node] = fmt
    positions = [i for i, v in enumerate(pytree.tree_leaves(output.args[0])) if isinstance(v, Node)]
    for i, node in enumerate(returned_nodes(model)):
        found = config.of_output("outputs", i)
        if found is not None and _is_float32(node):
            io.outputs.append((node, found[1]))
        asked = _border(config, "integer_outputs", config.of_output("integer_outputs", i), node)
        if asked is not None:
            io.returned[positions[i]] = (node, asked)
    return io


_DEFAULT_BORDER = activation_scheme("a8")
"""Format of integers at the border of a model for which nothing else decides."""


def _border(
    config: Config, field_name: str, found: tuple[str, Any] | None, node: Node
) -> _Asked | None:
    """What is asked of an input or output, if it shall be integers.

    Raises:
        ConfigError: it is named, and cannot be quantized.
    """
    if found is None or found[1] == "float":
        return None
    if not _is_float32(node):
        if found[0] == "*":
            return None  # indices, masks: they stay as they are
        meta = tensor_meta(node)
        kind = "no tensor" if meta is None else str(meta.dtype)
        raise ConfigError(
            f"{config.io_place(field_name, found[0])}: {describe(node)} is {kind}; only float32 "
            "inputs and outputs become integers"
        )
    return found


def _border_dtype(
    config: Config, field_name: str, asked: _Asked, node: Node, fmt: TensorScheme
) -> str:
    """The dtype of an input or output that is integers of a format.

    Raises:
        ConfigError: another one is asked for.
    """
    name, kind = asked
    wide = fmt.format.bits > 8
    if kind == "integer":
        return "int16" if wide else "int8"
    if wide != (kind == "int16"):
        other = "a8" if wide else "a16"
        side = field_name.removeprefix("integer_")
        raise ConfigError(
            f"{config.io_place(field_name, name)}: {describe(node)} has {fmt.format.bits} bits, so "
            f"it cannot be {kind}; give it another format, set_io({side}={{{name!r}: {other!r}}})"
        )
    return kind


def _wanted_by_readers(node: Node, anchors: dict[Node, _Op]) -> TensorScheme:
    """The widest format that the readers of an input want, through ops that move values."""
    wanted: list[TensorScheme] = []
    seen, waiting = {node}, [node]
    while waiting:
        tensor = waiting.pop()
        for user in effective_users(tensor):
            op = anchors.get(user)
            if op is None or op.match is None or tensor not in op.match.inputs:
                continue
            if op.moves_values and op.output not in seen:
                seen.add(op.output)
                waiting.append(op.output)
            elif not op.moves_values and op.activation is not None and not _is_dynamic(op):
                wanted.append(op.wanted(op.match.inputs.index(tensor)))
    # One with zero point 0 cannot become another one for free; the other way round it is the same.
    key = lambda fmt: (fmt.format.bits, not fmt.symmetric)  # noqa: E731
    return max(wanted, key=key, default=_DEFAULT_BORDER)


def _return_integers(io: _ModelIO, config: Config, producer: dict[Node, _Op]) -> None:
    """Settle the dtypes of integer outputs; those of a float op are quantized for it."""
    formats = dict(io.outputs)
    for position, (node, asked) in io.returned.items():
        source = producer.get(node)
        made = None if source is None or _is_dynamic(source) else source.made
        fmt = formats.get(node) or made or io.inputs.get(node)
        if fmt is None:
            fmt = formats[node] = _DEFAULT_BORDER
            io.outputs.append((node, fmt))
        io.integer_outputs[position] = _border_dtype(config, "integer_outputs", asked, node, fmt)


def _is_float32(node: Node) -> bool:
    meta = tensor_meta(node)
    return meta is not None and meta.dtype == torch.float32


def _collect(model: GraphModule, config: Config, backend: Backend) -> list[_Op]:
    """One entry per op; an activation that is fused belongs to the op before it."""
    ops: list[_Op] = []
    fused: set[Node] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or node in fused:
            continue
        if FOLDED_KEY in node.meta:
            continue  # computed from parameters: a constant once training is over
        if tensor_meta(node) is None and not isinstance(node.meta.get("val"), (list, tuple)):
            continue  # sizes, assertions: no tensor comes out
        op = _Op(node, config.resolve(node), rule_of(node))
        if is_annotated(node):
            op.reason = ANNOTATED_BEFORE
        elif op.rule is not None:
            op.support = backend.support(op.rule)
            bound = op.rule.match(op.rule, node)
            if isinstance(bound, str):
                op.reason = bound
            elif (refusal := op.support.refuses(bound)) != "":
                op.reason = refusal
            elif (reason := _overwritten(node, bound)) is not None:
                op.reason = reason
            else:
                op.match = bound
                op.fused = _fusable(op, config)
                if op.fused is not None:
                    fused.add(op.fused)
        ops.append(op)
    return ops


def _overwritten(node: Node, match: PatternMatch) -> str | None:
    """Why no quantize node may stand before or behind ``node``, if none may."""
    for tensor in (node, *match.inputs):
        writer = overwritten_by(tensor)
        if writer is not None:
            return f"{writer} writes into the memory of {describe(tensor)} in place"
    return None


def _fusable(op: _Op, config: Config) -> Node | None:
    rule = cast(OpRule, op.rule)
    users = effective_users(op.node)
    # A dynamic op gives float32, so there is nothing to clamp on integers.
    if len(users) != 1 or op.decision.scheme is None or op.decision.scheme.dynamic:
        return None
    follower = rule_of(users[0])
    fuses = op.support is not None and op.support.fuses
    if not fuses or follower is None or follower.family not in rule.fuses:
        return None
    if isinstance(follower.match(follower, users[0]), str) or overwritten_by(users[0]):
        return None
    if is_annotated(users[0]):
        return None
    decision = config.resolve(users[0])
    # A rule aimed at the activation itself says it is an op of its own.
    if decision.explicit and decision.scheme != op.decision.scheme:
        return None
    return users[0]


def _settle(op: _Op, backend: Backend) -> None:
    """Decide an op that is quantized for its own sake."""
    scheme = op.decision.scheme
    if op.reason:
        return
    if op.rule is None:
        op.reason = unknown_op(op.node)
        return
    if op.match is None or op.support is None:
        return
    if op.support.float_reason:
        op.reason = op.support.float_reason
        _store_table(op, scheme)
        return
    if scheme is None:
        op.reason = op.decision.reason
        return
    if scheme.dynamic and op.match.weight is None:
        op.reason = f"{scheme.name} quantizes layers with weights; everything else stays in float"
        return
    if op.has(Trait.PRODUCT) and FULL_PRECISION in op.node.meta and not op.decision.explicit:
        op.reason = "the model turns autocast off around it, which asks for full precision"
        return
    for tensor in (*op.match.inputs, op.output):
        meta = tensor_meta(tensor)
        if meta is None or meta.dtype != torch.float32:
            kind = "not a single tensor" if meta is None else str(meta.dtype)
            op.reason = f"{describe(tensor)} is {kind}; only float32 tensors are quantized"
            op.reason += _to_float(meta)
            return
        refusal = backend.refuses_tensor(tensor)
        if refusal:
            op.reason = f"{describe(tensor)} {refusal}"
            return
    for accepts in (op.rule.accepts, op.support.accepts):
        verdict = accepts(op.match, scheme)
        if not verdict.ok:
            op.reason = verdict.reason
            return
    op.scheme, op.reason = scheme, op.decision.reason


def _store_table(op: _Op, scheme: OpScheme | None) -> None:
    """A table whose rows are read in float is stored as integers where that is what is asked for.

    A dynamic scheme is about weights. In a static one a rule has to name the op or its type: what
    reads the rows may want integers, and then the table becomes those.
    """
    match, stored = cast(PatternMatch, op.match), cast(Support, op.support).table
    if stored is None or scheme is None or not (scheme.dynamic or op.decision.aimed):
        return
    (table,) = match.inputs
    if not is_constant(table) or not _is_float32(table):
        return
    op.table = stored
    op.reason = (
        f"its table is stored as {stored.format}, one scale a row ({op.decision.reason}), and its "
        "rows are read in float"
    )


def _leave_sums_in_float(ops: list[_Op], anchors: dict[Node, _Op]) -> set[Node]:
    """Sums and products that only float ops read are computed in float.

    On the way into a softmax these are scales, biases and masks: a mask (a large negative number)
    would take the whole range of an int8 sum for itself. Between layer norms it is the residual
    stream of a transformer, whose parts differ by orders of magnitude. Either way the reader
    dequantizes what an int8 kernel has just rounded.

    Returns:
        All ops, of whatever kind, that only float ops read.
    """
    floats: set[Node] = set()
    only_floats: set[Node] = set()
    for op in reversed(ops):
        users = effective_users(op.output)
        into = [user in floats or _computes_in_float(anchors.get(user)) for user in users]
        if not users or not all(into):
            continue
        only_floats.add(op.node)
        if not (op.has(Trait.SUM) or op.has(Trait.VIEW)):
            continue
        if op.has(Trait.SUM) and op.scheme is not None:
            if op.decision.explicit:
                continue
            op.scheme = None
            op.reason = "only float ops read its result: quantizing it would just round once more"
        floats.add(op.node)
    return only_floats


def _leave_joins_in_float(
    ops: list[_Op], producer: dict[Node, _Op], only_floats: set[Node]
) -> None:
    """Tensors that are joined for float ops alone keep scales of their own.

    As integers they would need one scale: a class token that is joined to the patches of an image
    before a norm has a few levels of theirs. Pieces of one tensor have one scale anyway.
    """
    for op in ops:
        joined = op.match.inputs if op.match is not None and op.moves_values else ()
        if len(joined) < 2 or op.node not in only_floats or op.decision.explicit:
            continue
        if len({_source(tensor, producer) for tensor in joined}) > 1:
            op.match, op.reason = (
                None,
                "it joins tensors of different scales, and float ops read it",
            )


def _source(tensor: Node, producer: dict[Node, _Op]) -> Node:
    """The tensor that ``tensor`` shows values of, in another order or shape."""
    op = producer.get(tensor)
    while op is not None and op.moves_values and op.match is not None:
        tensor = op.match.inputs[0]
        op = producer.get(tensor)
    return tensor


def _leave_divisors_in_float(ops: list[_Op], producer: dict[Node, _Op]) -> None:
    """What keeps a divisor away from zero is kept: rounded to a grid it would be zero.

    ``F.normalize`` of a row of zeros is zero, and not 0 / 0. It is a bound, or a small number that
    is added (``x / (x.sum() + 1e-6)``).
    """
    for op in ops:
        if not op.has(Trait.DIVISION) or op.match is None:
            continue
        source = producer.get(op.match.inputs[-1])
        while source is not None and source.moves_values and source.match is not None:
            source = producer.get(source.match.inputs[0])
        if source is None or source.scheme is None or source.decision.explicit:
            continue
        last = rule_of(source.output)  # a clamp of its own, or one that is fused
        low = None if last is None or last.bounds is None else last.bounds(source.output)[0]
        if (low is not None and low > 0) or _adds_epsilon(source):
            source.scheme = None
            source.reason = "it keeps a divisor away from zero, to which integers would round it"


_LARGEST_EPSILON = 1e-3
"""Of numbers that are added to keep a divisor away from zero, as norms do it."""


def _adds_epsilon(op: _Op) -> bool:
    if op.node.target is not torch.ops.aten.add.Tensor or op.match is None:
        return False
    graph = cast(GraphModule, op.node.graph.owning_module)
    constants = [constant_of(graph, n) for n in op.match.inputs if n.op == "get_attr"]
    return any(c.numel() == 1 and bool((c > 0) & (c <= _LARGEST_EPSILON)) for c in constants)


def _computes_in_float(op: _Op | None) -> bool:
    return op is not None and op.support is not None and bool(op.support.float_reason)


def _center(ops: list[_Op], producer: dict[Node, _Op]) -> None:
    """Where an op needs zero point 0, make the producer of that operand quantize symmetrically.

    Only if its range has both signs: of one sign, half of a symmetric range would be unused.
    """
    for op in ops:
        if op.support is None or op.scheme is None or op.match is None:
            continue
        for position in op.support.requires_symmetric:
            source = producer.get(op.match.inputs[position])
            while source is not None and source.moves_values and source.match is not None:
                source = producer.get(source.match.inputs[0])
            if source is None or source.scheme is None or _is_dynamic(source) or source.fused:
                continue
            if source.match is not None and source.match.weight is None:
                signed = source.has(Trait.SUM)
            else:
                signed = True
            source.centered = signed


def _leave_readers_of_integers_in_float(ops: list[_Op], io: _ModelIO, backend: Backend) -> None:
    """Not every kernel reads an input that the program takes as integers."""
    placeholders = [node for node in io.node.graph.nodes if node.op == "placeholder"]
    integers = {placeholders[position] for position in io.integer_inputs}
    for op in ops:
        if op.match is None or op.scheme is None or integers.isdisjoint(op.match.inputs):
            continue
        if why := backend.refuses_integers(op.match, op.scheme):
            op.scheme, op.reason = None, why


def _leave_unprofitable_in_float(ops: list[_Op], io: _ModelIO, backend: Backend) -> None:
    """Ops without an integer kernel stay in float where quantizing them would only cost."""
    kinds = {op.node: _kind(op, backend) for op in ops}
    steps = [
        Step(
            kinds[op.node],
            () if op.match is None else tuple(t for t in op.match.inputs if not is_constant(t)),
            op.output,
            tuple(effective_users(op.output)),
            op.node,
        )
        for op in ops
    ]
    refused = unprofitable(steps, io.inputs, io.wanted)
    for op in ops:
        if op.node in refused:
            op.scheme = None
            op.reason = (
                f"{backend.title} has no integer kernel for it, and {refused[op.node]}: quantizing "
                "it would only cost"
            )


def _kind(op: _Op, backend: Backend) -> Kind:
    """What an op does with integers, now that it is settled."""
    if op.moves_values:
        return Kind.FLOAT if _left_in_float(op, backend) else Kind.MOVEMENT
    if op.scheme is None or op.match is None or op.scheme.dynamic:
        return Kind.FLOAT
    # A rule that names the op or its type is an order.
    if op.decision.aimed:
        return Kind.INTEGER
    kernel = backend.predict(op.match, Formats(8)).kernel
    return Kind.OPTIONAL if kernel.needs_integers else Kind.INTEGER


def _to_float(meta: torch.Tensor | None) -> str:
    """What to do about a tensor of another floating-point type."""
    if meta is None or not meta.dtype.is_floating_point:
        return ""
    return "; call model.float() and hand in float32 inputs before torch.export.export"


def _left_in_float(op: _Op, backend: Backend) -> bool:
    """Of a data-movement op: whether something forbids passing integers on."""
    if op.match is None:
        return True
    if op.decision.explicit and op.decision.scheme is None:
        op.reason = op.decision.reason
        return True
    for tensor in (op.node, *op.match.inputs):
        meta = tensor_meta(tensor)
        if meta is not None and meta.dtype != torch.float32:
            op.reason = f"{describe(tensor)} is {meta.dtype}; only float32 tensors are quantized"
            op.reason += _to_float(meta)
            return True
    refusal = backend.refuses_tensor(op.node) if is_empty(op.node) else ""
    if refusal:
        op.reason = f"its result {refusal}"
        return True
    return False


def _follow_producers(
    ops: list[_Op],
    producer: dict[Node, _Op],
    inputs: dict[Node, TensorScheme],
    backend: Backend,
) -> None:
    """A data-movement op passes on the integers it is given."""
    for op in ops:
        if not op.moves_values or _left_in_float(op, backend):
            continue
        sources = [
            source
            for tensor in cast(PatternMatch, op.match).inputs
            if (source := producer.get(tensor)) is not None and not _is_dynamic(source)
        ]
        op.centered = any(source.centered for source in sources)
        given = [source.made for source in sources]
        given += [inputs.get(tensor) for tensor in cast(PatternMatch, op.match).inputs]
        formats = [fmt for fmt in given if fmt is not None]
        if formats:
            # Tensors that are joined must agree: on the widest format among them.
            op.follows = max(formats, key=lambda fmt: fmt.format.bits)
            op.reason = "moves values: keeps the integers it is given"


def _is_dynamic(op: _Op) -> bool:
    return op.scheme is not None and op.scheme.dynamic


def _follow_consumers(ops: list[_Op], anchors: dict[Node, _Op]) -> None:
    """Data movement of a float tensor moves integers if all users of the result want the same."""
    for op in reversed(ops):
        if not op.moves_values or op.follows is not None or op.match is None or op.reason:
            continue
        wanted: list[TensorScheme | None] = []
        for user in effective_users(op.node):
            consumer = anchors.get(user)
            takes = (
                consumer is not None
                and consumer.match is not None
                and op.node in consumer.match.inputs
                and not _is_dynamic(consumer)
            )
            wanted.append(_wanted_by(consumer, op.node) if takes else None)
        first = wanted[0] if wanted else None
        if first is not None and all(_same_format(first, other) for other in wanted):
            op.follows = first
            op.reason = "moves values: quantized before it, as its consumers want integers"
        else:
            op.reason = "moves values of a float tensor"


def _wanted_by(consumer: _Op | None, tensor: Node) -> TensorScheme | None:
    """Format in which an op takes ``tensor``."""
    if consumer is None or consumer.activation is None:
        return None
    return consumer.wanted(cast(PatternMatch, consumer.match).inputs.index(tensor))


def _same_format(a: TensorScheme | None, b: TensorScheme | None) -> bool:
    """Whether two activations can be the same integers; the observer is the producer's choice."""
    return a is not None and b is not None and (a.format, a.symmetric) == (b.format, b.symmetric)


class _Annotator:
    """Turns settled ops into groups, edges and the plan that is shown."""

    def __init__(
        self, ops: list[_Op], producer: dict[Node, _Op], io: _ModelIO, backend: Backend
    ) -> None:
        self._ops = ops
        self._producer = producer
        self._io = io
        self._backend = backend
        self._groups = _Groups()
        self._numbers: dict[_Key, int] = {}
        self._schemes: dict[_Key, TensorScheme] = {}

    def plan(self, warnings: tuple[str, ...]) -> Plan:
        for op in self._ops:
            if op.activation is None or op.match is None or _is_dynamic(op):
                continue
            keys = self._input_keys(op)
            if op.moves_values:
                for key in keys:
                    self._groups.union(key, ("out", op.output))
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

    def _input_keys(self, op: _Op) -> list[_Key]:
        inputs = cast(PatternMatch, op.match).inputs
        return [self._key(tensor, op.wanted(i)) for i, tensor in enumerate(inputs)]

    def _key(self, tensor: Node, wanted: TensorScheme) -> _Key:
        """The producer's own output where the formats agree, else a requantized copy of it."""
        source = self._producer.get(tensor)
        given = self._io.inputs.get(tensor)
        if source is not None and not _is_dynamic(source):
            given = source.made
        centered = source is not None and source.centered
        if centered and given is not None and given.format == wanted.format:
            return ("out", tensor)  # zero point 0 is one that affine consumers read as well
        if _same_format(given, wanted):
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
            if op.activation is None or op.match is None or _is_dynamic(op):
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

    def _op_plan(self, op: _Op, annotations: dict[str, NodeAnnotation]) -> OpPlan:
        tensors: list[TensorPlan] = []
        if op.activation is not None and op.match is not None:
            tensors = self._annotate(op, op.match, annotations)
        elif op.table is not None and op.match is not None:
            tensors = [self._annotate_table(op, op.match, op.table, annotations)]
        scheme = op.scheme.name if op.scheme is not None else None
        if op.moves_values and op.follows is not None:
            scheme = f"a{op.follows.format.bits}"
        delegation = _predict(op, self._backend) if op.activation is not None else None
        kernel = self._backend.in_float(op.node) if delegation is None else delegation.kernel
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
            size_bytes=_estimate_bytes(op, delegation),
            written=original_name(op.node),
        )

    def _annotate(
        self, op: _Op, match: PatternMatch, annotations: dict[str, NodeAnnotation]
    ) -> list[TensorPlan]:
        inputs: dict[str, Edge] = {}
        tensors: list[TensorPlan] = []
        dynamic = _is_dynamic(op)

        def record(role: Role, tensor: Node, edge: Edge, fmt: IntFormat, why: str) -> None:
            tensors.append(TensorPlan(role, tensor.name, str(fmt), edge.group, why))

        for i, tensor in enumerate(match.inputs):
            if tensor.name in inputs:
                continue
            if isinstance(tensor.meta.get("val"), (list, tuple)):
                continue  # the list a split returns: observed before it and after each getitem
            if dynamic:
                scheme = cast(TensorScheme, op.activation)
                key: _Key = ("dynamic", tensor, scheme)
                edge = Edge("activation", self._number(key), describe(tensor), scheme, dynamic=True)
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

    def _annotate_table(
        self,
        op: _Op,
        match: PatternMatch,
        stored: TensorScheme,
        annotations: dict[str, NodeAnnotation],
    ) -> TensorPlan:
        """Nothing but the table: its rows are read in float."""
        (table,) = match.inputs
        group = self._number(("weight", table, stored, 0))
        edge = Edge("weight", group, describe(op.node), stored)
        annotations[op.node.name] = NodeAnnotation({table.name: edge}, None)
        why = "table of constants"
        return TensorPlan("weight", table.name, str(stored.format), group, why)

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
    target = node.meta.get("original_target", node.target)
    if len(plans) == 1 and (ORIGINAL_NAME not in node.meta or target is node.target):
        return first
    rule = OF_TARGET.get(target)
    placed = tally((first.written, Placement(plan.placement)) for plan in plans)
    placement = placed.placements[first.written].value
    schemes = [plan.scheme for plan in plans if plan.scheme is not None]
    with_weight = [p.scheme for p in plans if any(t.role == "weight" for t in p.tensors)]
    scheme = next(filter(None, (*with_weight, *schemes)), None)
    # Of the ops that it becomes, one that keeps it furthest from integers says how it runs.
    decisive = min(plans, key=lambda plan: (plan.placement != placement, plan.scheme != scheme))
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


def _predict(op: _Op, backend: Backend) -> Delegation:
    """Where a quantized op will run."""
    match, activation = cast(PatternMatch, op.match), cast(TensorScheme, op.activation)
    weight = None
    if op.scheme is not None and match.weight is not None:
        weight = cast(Support, op.support).weight(op.scheme, match)
    return backend.predict(
        match,
        Formats(
            activation.format.bits,
            None if weight is None else weight.format.bits,
            "per_tensor" if weight is None else weight.granularity,
            _is_dynamic(op),
        ),
    )


def _estimate_bytes(op: _Op, delegation: Delegation | None) -> int:
    """Weights, biases and per-channel scales of an op, as the program stores them."""
    if op.table is not None and op.match is not None:
        meta = tensor_meta(op.match.inputs[0])
        return 0 if meta is None else int(meta.numel()) + 4 * int(meta.shape[0])
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
