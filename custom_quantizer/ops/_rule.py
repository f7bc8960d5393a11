"""What an op family means, in one frozen entry.

To add a family: write a module here with an :class:`OpRule` (or several) and list it in
``ops/__init__.py``; then say in each backend's ``kernels.py`` what becomes of it there. Planner,
quantizer, integer reference, lowering, report and contract tests pick it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic, QParams
from custom_quantizer.core.schemes import OpScheme

__all__ = [
    "ACCEPTED",
    "Case",
    "Formats",
    "OpRule",
    "PatternMatch",
    "QParamSharing",
    "QuantizedOp",
    "Trait",
    "Verdict",
    "as_limits",
    "refused",
]


@dataclass(frozen=True)
class Verdict:
    """Whether an op can take a scheme; if not, the sentence the user reads."""

    ok: bool
    reason: str = ""


ACCEPTED = Verdict(True)


def refused(reason: str) -> Verdict:
    """A verdict that says no, and why."""
    return Verdict(False, reason)


class QParamSharing(Enum):
    """How the quantization parameters of an op's output relate to those of its inputs."""

    OWN = "own"
    """The output has a range of its own."""
    SAME = "same"
    """Inputs and output are the same integers: they must share scale and zero point."""


@dataclass(frozen=True)
class PatternMatch:
    """One op of a captured graph, its arguments sorted by role.

    Attributes:
        rule: the family.
        node: the anchor, for instance the convolution of conv-relu.
        inputs: activation tensors in argument order; the same node twice for ``x + x``.
        weight: node of the constant weight.
        bias: node of the bias, constant or not.
        weight_axis: output-channel axis of the weight.
        groups: channel groups of a convolution.
    """

    rule: OpRule
    node: Node
    inputs: tuple[Node, ...]
    weight: Node | None = None
    bias: Node | None = None
    weight_axis: int = 0
    groups: int = 1

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The real limits of an op that clamps, infinite where there are none."""
        clamps = self.rule.bounds
        return None if clamps is None else as_limits(*clamps(self.node))


def as_limits(low: float | None, high: float | None) -> tuple[float, float]:
    """Bounds as real numbers: infinite where there are none."""
    return -math.inf if low is None else low, math.inf if high is None else high


@dataclass(frozen=True)
class QuantizedOp:
    """One op of a converted graph whose inputs and output are integers.

    Attributes:
        match: the anchor and its roles; inputs are dequantize nodes.
        inputs: quantization parameters of each activation input.
        output: quantization parameters of the output.
        output_node: last node of the op, the fused activation if there is one.
        weight: integers of the weight, int8 or int16, in the layout of the aten op.
        weight_qparams: per tensor or per output channel (``axis`` is the weight's).
        bias: integers of the bias, int32 ``(out_channels,)``, or ``None``.
        bounds: ``(low, high)`` of the fused activation as real numbers, ``None``: unbounded.
        constants: float tensors of the module that the anchor reads as they are, by node.
    """

    match: PatternMatch
    inputs: tuple[QParams, ...]
    output: QParams
    output_node: Node
    weight: Tensor | None = None
    weight_qparams: QParams | None = None
    bias: Tensor | None = None
    bounds: tuple[float | None, float | None] | None = None
    constants: Mapping[Node, Tensor] = field(default_factory=dict, repr=False)

    @property
    def node(self) -> Node:
        """The anchor."""
        return self.match.node

    @property
    def formats(self) -> Formats:
        """Widths of its integers."""
        bits = max(q.bits for q in (*self.inputs, self.output))
        weight = self.weight_qparams
        return Formats(
            bits,
            None if weight is None else weight.bits,
            "per_tensor" if weight is None or weight.axis is None else "per_channel",
        )

    @property
    def is_wide(self) -> bool:
        """Whether an integer of it has more than 8 bits, so that no int8 kernel takes it."""
        return self.formats.is_wide

    def stored_bounds(self, arithmetic: Arithmetic) -> tuple[int, int] | None:
        """Limits of the fused activation as stored integers of the output."""
        if self.bounds is None:
            return None
        return arithmetic.clamp_bounds(*as_limits(*self.bounds), self.output)


@dataclass(frozen=True)
class Formats:
    """Widths and granularity of one op: what its kernel depends on.

    Attributes:
        activation_bits: the widest of inputs and output.
        weight_bits: ``None`` for ops without a weight.
        granularity: of the weight.
        dynamic: activations are quantized at run time.
    """

    activation_bits: int
    weight_bits: int | None = None
    granularity: str = "per_tensor"
    dynamic: bool = False

    @property
    def bits(self) -> int:
        """The widest of all."""
        return max(self.activation_bits, self.weight_bits or 0)

    @property
    def is_wide(self) -> bool:
        """Whether an integer has more than 8 bits."""
        return self.bits > 8


@dataclass(frozen=True)
class Case:
    """A small model and input shapes from which contract tests of a family are made.

    Attributes:
        name: unique within the family.
        build: makes the module; seeded by the test.
        shapes: shapes of the float32 inputs.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    shapes: tuple[tuple[int, ...], ...]


Target = Any
"""An aten overload or ``operator.getitem``."""

Integers = Sequence[Tensor]


class Trait(Enum):
    """What planning has to know of a family beyond its integers."""

    SUM = "sum"
    """Adds or scales: between float ops it stays in float."""
    VIEW = "view"
    """Shows the same values in another shape or order."""
    DIVISION = "division"
    """Divides by its last input, which must not be rounded to zero."""
    PRODUCT = "product"
    """A product of activations: exact only where a model asks for it by leaving autocast."""
    TABLE = "table"
    """A function of one tensor, element by element: on integers, a table."""
    BOUNDED = "bounded"
    """Its results lie between -1 and 1, whatever it is given."""


@dataclass(frozen=True)
class OpRule:
    """What one op family means.

    What a runtime does with it is said by :class:`~custom_quantizer.ops.backend.Support`.

    Attributes:
        family: name, as reports show it.
        targets: the aten overloads ``torch.export`` makes, in-place variants excluded (the
            quantizer makes those functional first).
        match: sorts a node's arguments by role; returns the reason when it cannot.
        integers: integer semantics: the op, its input integers (int32), the arithmetic; returns
            int32. ``None``: the family has a meaning on real numbers only.
        sharing: whether input and output must have the same quantization parameters.
        fuses: families of activations that may follow as part of the op.
        bounds: for activations, the real ``(low, high)`` they clamp to.
        accepts: can the op take the scheme on any runtime; if not, why not.
        traits: what planning has to know.
        title: its name in a sentence, if not ``family``.
        cases: examples, for contract tests.
    """

    family: str
    targets: frozenset[Target]
    match: Callable[[OpRule, Node], PatternMatch | str]
    integers: Callable[[QuantizedOp, Integers, Arithmetic], Tensor] | None = None
    sharing: QParamSharing = QParamSharing.OWN
    fuses: frozenset[str] = frozenset()
    bounds: Callable[[Node], tuple[float | None, float | None]] | None = None
    accepts: Callable[[PatternMatch, OpScheme], Verdict] = lambda _match, _scheme: ACCEPTED
    traits: frozenset[Trait] = frozenset()
    title: str = ""
    cases: tuple[Case, ...] = field(default=(), repr=False)

    @property
    def noun(self) -> str:
        """Its name in a sentence."""
        return self.title or self.family

    @property
    def moves_values(self) -> bool:
        """Whether its results keep the scale of its inputs: moves, maxima and resizes."""
        return self.sharing is QParamSharing.SAME
