"""What is known of an op family, in one frozen entry.

To add a family: write a module here with an :class:`OpRule` (or several), list it in
``ops/__init__.py``, and the planner, the quantizer, the integer reference, the lowering, the
report and the contract tests pick it up.
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
from custom_quantizer.core.graph import describe
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.errors import ConversionError, SchemeError

__all__ = [
    "ACCEPTED",
    "Backend",
    "Binding",
    "Case",
    "Delegation",
    "Formats",
    "OpRule",
    "QParamSharing",
    "QuantizedOp",
    "Verdict",
    "float_rule",
    "legal",
    "no_integers",
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
        constants: float tensors of the module that the anchor reads as they are, by node.
    """

    binding: Binding
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
        return self.binding.node

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
        formats = self.formats
        return formats.activation_bits > 8 or (formats.weight_bits or 0) > 8

    def stored_bounds(self, arithmetic: Arithmetic) -> tuple[int, int] | None:
        """Limits of the fused activation as stored integers of the output."""
        if self.bounds is None:
            return None
        low, high = self.bounds
        return arithmetic.clamp_bounds(
            -math.inf if low is None else low, math.inf if high is None else high, self.output
        )


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


def no_integers(op: QuantizedOp, _inputs: Integers, _arithmetic: Arithmetic) -> Tensor:
    """The integer semantics of a family that has none.

    Raises:
        ConversionError: always.
    """
    raise ConversionError(f"{describe(op.node)}: {op.binding.rule.float_reason}")


def _always(_binding: Binding, _scheme: OpScheme) -> Verdict:
    return ACCEPTED


def _any_scales(_op: QuantizedOp) -> Verdict:
    return ACCEPTED


def legal(parameters: Callable[[], object]) -> Verdict:
    """Whether the parameters of a kernel can be computed; if not, why not."""
    try:
        parameters()
    except SchemeError as error:
        return refused(f"XNNPACK has no integer kernel for its scales: {error}")
    return ACCEPTED


def _int8(_binding: Binding, _formats: Formats) -> Delegation:
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
        runs: whether the integer kernel takes the scales that calibration found. Where it does
            not, the op runs in float. Not asked above 8 bits, where everything is emulated.
        integers: integer semantics: the op, its input integers (int32), the arithmetic; returns
            int32.
        requires_symmetric: positions of inputs that need the zero point 0.
        float_reason: why the family has no integer form; it then runs in float between exact
            Q/DQ boundaries, and ``integers`` is :func:`no_integers`.
        delegation: what XNNPACK does with the op at widths up to 8 bits; wider ones are emulated
            (:func:`custom_quantizer.ops.predict_backend` knows both).
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
    runs: Callable[[QuantizedOp], Verdict] = _any_scales
    requires_symmetric: frozenset[int] = frozenset()
    float_reason: str = ""
    delegation: Callable[[Binding, Formats], Delegation] = _int8
    cases: tuple[Case, ...] = field(default=(), repr=False)


def float_rule(
    family: str,
    targets: frozenset[Target],
    bind: Callable[[OpRule, Node], Binding | str],
    cases: tuple[Case, ...],
    what: str | None = None,
) -> OpRule:
    """A family that XNNPACK runs in float only.

    Args:
        family: its name.
        targets: its aten overloads.
        bind: as in :class:`OpRule`.
        cases: examples, for contract tests.
        what: its name in a sentence, if not ``family``.
    """
    kernel = what or family
    return OpRule(
        family=family,
        targets=targets,
        bind=bind,
        integers=no_integers,
        float_reason=f"XNNPACK has no integer {kernel}: it runs in float inside the delegate",
        delegation=lambda _binding, _formats: Delegation(Backend.FLOAT),
        cases=cases,
    )
