"""A plan: what becomes of every op and tensor, and why; what is shown, and what is applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.errors import ConfigError, nearest
from custom_quantizer.ops.placement import Placement, Tally, tally

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
        shared: of one that is, the dims whose values share a scale; empty: all of them.
        derivation: of a bias.
    """

    kind: Literal["activation", "weight", "bias"]
    group: int
    name: str
    scheme: TensorScheme | None = None
    bias: IntFormat | None = None
    axis: int = 0
    dynamic: bool = False
    shared: tuple[int, ...] = ()
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
        exponents: by node of a product that only a softmax or an exponential reads, what it is
            multiplied by before: too coarse a scale leaves it in float
            (:mod:`custom_quantizer.calibration.exponents`).
    """

    ops: tuple[OpPlan, ...]
    warnings: tuple[str, ...] = ()
    annotations: dict[str, NodeAnnotation] = field(default_factory=dict, repr=False)
    integer_inputs: Mapping[int, str] = field(default_factory=dict)
    integer_outputs: Mapping[int, str] = field(default_factory=dict)
    exponents: Mapping[str, float] = field(default_factory=dict, repr=False)

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
