"""What is known of an op family, in one frozen entry.

To add a family: write a module here with an :class:`OpRule` (or several), list it in
``ops/__init__.py``, and the planner, the quantizer, the integer reference, the lowering, the
report and the contract tests pick it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.arithmetic import Arithmetic, QParams
from custom_quantizer.schemes import OpScheme

__all__ = [
    "ACCEPTED",
    "Backend",
    "Binding",
    "Case",
    "Delegation",
    "OpRule",
    "QParamSharing",
    "QuantizedOp",
    "Verdict",
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


class Backend(Enum):
    """Where and how an op runs after lowering."""

    INT8 = "xnnpack int8"
    PACKED_INT4 = "xnnpack packed int4"
    INT8_CONTAINER = "xnnpack int8 container"
    DYNAMIC_INT8 = "xnnpack dynamic int8"
    EMULATED = "xnnpack float, int16 emulated"
    FLOAT = "xnnpack float"
    PORTABLE = "portable kernel, outside the delegate"
    FOLDED = "folded away"


@dataclass(frozen=True)
class Delegation:
    """What the backend does with an op, and why it is not plain int8 where it is not."""

    backend: Backend
    reason: str = ""


@dataclass(frozen=True)
class Binding:
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


@dataclass(frozen=True)
class QuantizedOp:
    """One op of a converted graph whose inputs and output are integers.

    Attributes:
        binding: the anchor and its roles; inputs are dequantize nodes.
        inputs: quantization parameters of each activation input.
        output: quantization parameters of the output.
        output_node: last node of the op, the fused activation if there is one.
        weight: integers of the weight, int8 or int16, in the layout of the aten op.
        weight_qparams: per tensor or per output channel (``axis`` is the weight's).
        bias: integers of the bias, int32 ``(out_channels,)``, or ``None``.
        bounds: ``(low, high)`` of the fused activation as real numbers, ``None``: unbounded.
    """

    binding: Binding
    inputs: tuple[QParams, ...]
    output: QParams
    output_node: Node
    weight: Tensor | None = None
    weight_qparams: QParams | None = None
    bias: Tensor | None = None
    bounds: tuple[float | None, float | None] | None = None

    @property
    def node(self) -> Node:
        """The anchor."""
        return self.binding.node

    def stored_bounds(self, arithmetic: Arithmetic) -> tuple[int, int] | None:
        """Limits of the fused activation as stored integers of the output."""
        if self.bounds is None:
            return None
        low, high = self.bounds
        return arithmetic.clamp_bounds(
            -math.inf if low is None else low, math.inf if high is None else high, self.output
        )


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


def _always(_binding: Binding, _scheme: OpScheme) -> Verdict:
    return ACCEPTED


def _int8(_op: QuantizedOp) -> Delegation:
    return Delegation(Backend.INT8)


@dataclass(frozen=True)
class OpRule:
    """All that is known of one op family.

    Attributes:
        family: name, as reports show it.
        targets: the aten overloads ``torch.export`` makes, in-place variants excluded (the
            quantizer makes those functional first).
        bind: sorts a node's arguments by role; returns the reason when it cannot.
        sharing: whether input and output must have the same quantization parameters.
        fuses: families of activations that may follow as part of the op.
        bounds: for activations, the real ``(low, high)`` they clamp to.
        accepts: can the op take the scheme; if not, why not.
        integers: integer semantics: the op, its input integers (int32), the arithmetic; returns
            int32.
        delegation: what XNNPACK does with the op once converted.
        cases: examples, for contract tests.
    """

    family: str
    targets: frozenset[Target]
    bind: Callable[[OpRule, Node], Binding | str]
    integers: Callable[[QuantizedOp, Integers, Arithmetic], Tensor]
    sharing: QParamSharing = QParamSharing.OWN
    fuses: frozenset[str] = frozenset()
    bounds: Callable[[Node], tuple[float | None, float | None]] | None = None
    accepts: Callable[[Binding, OpScheme], Verdict] = _always
    delegation: Callable[[QuantizedOp], Delegation] = _int8
    cases: tuple[Case, ...] = field(default=(), repr=False)
