"""What a backend does with ops: a value that planner, reference and lowering are handed.

An op family says what an op means (:class:`~custom_quantizer.ops.OpRule`); a :class:`Backend` says
what becomes of it on one runtime. ``None`` stands for :data:`INTEGERS`: no runtime, all that has a
meaning on integers is computed on integers.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.bias import WIDE_BIAS, BiasLimits
from custom_quantizer.core.exact import EXACT
from custom_quantizer.core.fixed_point import FIXED_POINT
from custom_quantizer.core.graph import describe, is_sized_by_data, tensor_meta
from custom_quantizer.core.schemes import OpScheme, TensorScheme
from custom_quantizer.errors import ConfigError, ConversionError, SchemeError
from custom_quantizer.ops import REGISTRY, match_of, rule_of
from custom_quantizer.ops._rule import (
    ACCEPTED,
    Formats,
    Integers,
    OpRule,
    PatternMatch,
    QuantizedOp,
    Verdict,
    refused,
)
from custom_quantizer.ops.functions import table_of
from custom_quantizer.ops.placement import Placement
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS, legalize_by
from custom_quantizer.ops.run_time import RunTime

__all__ = [
    "INTEGERS",
    "Backend",
    "BackendLike",
    "Delegation",
    "Kernel",
    "Support",
    "backend_names",
    "get_backend",
    "get_mode",
]


@dataclass(frozen=True)
class Kernel:
    """One way in which a backend runs ops.

    Attributes:
        label: as plans and reports show it, such as ``packed int4``.
        placement: where and on what it computes.
        weight_bytes: bytes of one weight in the program.
        needs_integers: computes in float whatever the plan says, so that quantizing an op pays
            between integer neighbours only.
    """

    label: str
    placement: Placement
    weight_bytes: float = 1.0
    needs_integers: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the reference gives its integers exactly (unless inputs are dynamic)."""
        return self.placement is Placement.INTEGER


@dataclass(frozen=True)
class Delegation:
    """How a backend runs an op, and why not on plain integers where it does not."""

    kernel: Kernel
    reason: str = ""


@dataclass(frozen=True)
class Support:
    """What a backend does with one op family.

    Attributes:
        delegation: how it runs an op at widths that its kernels take.
        refuses: why an op as it stands in the graph has no integer kernel; empty: it has one.
        accepts: whether an op can take a scheme; if not, why not.
        runs: whether the kernel takes the scales that calibration found. Where it does not, the op
            runs in float.
        requires_symmetric: positions of inputs that need zero point 0.
        fuses: whether a clamp that follows can be part of the op.
        weight: format of the weight under a scheme, where kernels take another one than asked for.
        weight_reason: why another one.
        integers: what the kernel computes, where that is not the family's own arithmetic; as in
            :class:`~custom_quantizer.ops.OpRule`.
        float_reason: why the family has no integer kernel; it then runs in float between exact
            boundaries.
        float_output: why an op that passes integers on is better computed in float where only float
            outputs of the model show its result; empty: it is not.
        table: of a family that reads rows of a table in float, the format in which the table may
            be stored, one scale a row; ``None``: as it is.
        operand: of a family that may be left in float for its readers, the format in which a large
            constant operand is stored then, with one scale; ``None``: as it is.
    """

    delegation: Callable[[PatternMatch, Formats], Delegation]
    refuses: Callable[[PatternMatch], str] = lambda _match: ""
    accepts: Callable[[PatternMatch, OpScheme], Verdict] = lambda _match, _scheme: ACCEPTED
    runs: Callable[[QuantizedOp], Verdict] = lambda _op: ACCEPTED
    requires_symmetric: frozenset[int] = frozenset()
    fuses: bool = True
    weight: Callable[[OpScheme, PatternMatch], TensorScheme] = lambda scheme, _match: scheme.weight
    weight_reason: str = ""
    integers: Callable[[QuantizedOp, Integers, Arithmetic], Tensor] | None = None
    float_reason: str = ""
    float_output: Callable[[PatternMatch], str] = lambda _match: ""
    table: TensorScheme | None = None
    operand: TensorScheme | None = None


_ANY_BIAS = BiasLimits(WIDE_BIAS, WIDE_BIAS)


@dataclass(frozen=True)
class Backend:
    """A runtime, as far as planning, reading, simulating and lowering depend on it.

    Attributes:
        name: by which :func:`get_backend` finds it, and which messages and labels carry.
        title: its name in a sentence.
        arithmetic: how it rounds.
        others: how it rounds on other machines; their names begin with its own and a hyphen.
        kernels: op family -> what it does with it. A family without an entry is float.
        missing: how it runs what has no entry.
        float_targets: overloads of no family that it computes in float.
        in_steps: ops of a graph that it computes in float because of who reads them: comparisons,
            where all read numbers.
        outside: how all others of no family run, if not as ``missing``.
        wide: how it runs what is wider than its kernels; ``None``: they take any width.
        limits: of biases.
        legalize: rewrites of a captured graph that this backend needs; told whether parameters
            are trained.
        refuses_tensor: why no kernel takes a tensor, whatever the op; empty: they do.
        refuses_integers: why an op cannot read an input that the program takes as integers; empty:
            it can.
        run_time: how it computes layers whose activations are quantized while they run; ``None``:
            it has none.
    """

    name: str
    title: str
    arithmetic: Arithmetic
    kernels: Mapping[str, Support]
    missing: Kernel
    others: tuple[Arithmetic, ...] = ()
    float_targets: frozenset[Any] = frozenset()
    in_steps: Callable[[Graph], AbstractSet[Node]] = lambda _graph: frozenset()
    outside: Kernel | None = None
    wide: Kernel | None = None
    limits: BiasLimits = _ANY_BIAS
    legalize: Callable[[GraphModule, bool], object] = lambda _model, _training: None
    refuses_tensor: Callable[[Node], str] = lambda _node: ""
    refuses_integers: Callable[[PatternMatch, OpScheme], str] = lambda _match, _scheme: ""
    run_time: RunTime | None = None

    def support(self, rule: OpRule) -> Support:
        """What becomes of a family; for one without an entry, that it is float."""
        found = self.kernels.get(rule.family)
        if found is not None:
            return found
        kernel, what = self.missing, rule.noun
        return Support(
            lambda _match, _formats: Delegation(kernel),
            float_reason=f"{self.title} has no integer {what}",
        )

    def in_float(self, node: Node, in_steps: AbstractSet[Node] = frozenset()) -> Kernel:
        """How an op that stays in float is expected to run.

        Of an op of a family that is as sure as :meth:`predict`; of another it is a guess by name.

        Args:
            node: the op.
            in_steps: what :attr:`in_steps` finds in its graph.
        """
        if node in in_steps:
            return self.missing
        tensors = (node, *node.all_input_nodes)
        if self.outside and any(is_sized_by_data(t) and self.refuses_tensor(t) for t in tensors):
            return self.outside
        match = match_of(node)
        if match is not None:
            kernel = self.support(match.rule).delegation(match, Formats(8)).kernel
            unmoved = kernel.placement in (Placement.FOLDED, Placement.OUTSIDE)
            return kernel if unmoved else self.missing
        known = rule_of(node) is not None or node.target in self.float_targets
        others = any(m.dtype != torch.float32 for t in tensors if (m := tensor_meta(t)) is not None)
        known = known and not others
        return self.missing if known or self.outside is None else self.outside

    def predict(self, match: PatternMatch, formats: Formats) -> Delegation:
        """Where and how an op will run.

        Args:
            match: the op.
            formats: its widths.
        """
        delegation = self.support(match.rule).delegation
        if self.wide is None or not formats.is_wide:
            found = delegation(match, formats)
            if self.wide is None or formats.activation_bits == 8 or found.reason:
                return found
            reason = f"int{formats.activation_bits} activations: clamped to their range"
            return Delegation(found.kernel, reason)
        found = delegation(match, formats)
        if found.kernel.placement is Placement.FOLDED:
            return found
        if match.rule.moves_values:
            if found.kernel.placement is Placement.OUTSIDE:
                return found
            return Delegation(self.wide, f"moves int{formats.bits} values as float")
        return Delegation(
            self.wide,
            f"int{formats.bits}: emulated in float, {self.title} has no kernel above 8 bits",
        )

    def compute(self, op: QuantizedOp, inputs: Integers) -> Any:
        """What an op of a converted graph computes: int32, or a list of tensors for a split.

        Args:
            op: one of its integer ops.
            inputs: integers of each activation, int32.

        Raises:
            ConversionError: the family has a meaning in float only.
        """
        rule = op.match.rule
        support = self.support(rule)
        integers = support.integers or rule.integers
        if integers is None:
            raise ConversionError(f"{describe(op.node)}: {support.float_reason}")
        return integers(op, inputs, self.arithmetic)


BackendLike: TypeAlias = "str | Backend | None"
"""A backend, its name, or ``None`` for pure integers."""


# ---------------------------------------------------------------------------------------------
# No backend: pure integers
# ---------------------------------------------------------------------------------------------

_INTEGER = Kernel("integer", Placement.INTEGER)
_TABLE = Kernel("integer table", Placement.TABLE)
_FLOAT = Kernel("float", Placement.FLOAT, 4.0)


def _pure(match: PatternMatch, _formats: Formats) -> Delegation:
    return Delegation(_TABLE if table_of(match) else _INTEGER)


def _static(_match: PatternMatch, scheme: OpScheme) -> Verdict:
    """Scales that are only known at run time are no integers that can be written down."""
    if scheme.dynamic:
        return refused(f"{scheme.name} quantizes at run time; choose a scheme such as a8w8")
    if scheme.weight.group_size is not None:
        return refused("weights per group belong to activations that are quantized at run time")
    return ACCEPTED


INTEGERS = Backend(
    name="integers",
    title="integer arithmetic",
    arithmetic=FIXED_POINT,
    kernels=MappingProxyType(
        {
            rule.family: Support(_pure, accepts=_static)
            for rule in REGISTRY
            if rule.integers is not None
        }
    ),
    missing=_FLOAT,
    legalize=lambda model, training: legalize_by(model, LEGALIZATIONS, training=training),
)
"""No runtime: every family that has a meaning on integers is computed on them, at any width."""


# ---------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------

_PACKAGE = "custom_quantizer.backends"


def backend_names() -> tuple[str, ...]:
    """The backends that are installed."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(_folder())))


def _folder() -> list[str]:
    return list(import_module(_PACKAGE).__path__)


def get_backend(backend: BackendLike) -> Backend:
    """Look up a backend; ``None`` gives :data:`INTEGERS`.

    This is the one place where something above the backends reaches them: by name, so that no
    runtime is imported before it is asked for.

    Raises:
        ConfigError: there is none of that name; those that are installed are named.
    """
    if backend is None:
        return INTEGERS
    if isinstance(backend, Backend):
        return backend
    names = backend_names()
    if backend not in names:
        raise ConfigError(
            f"there is no backend {backend!r}; choose one of {', '.join(names)}, or None for "
            "pure integers"
        )
    found = import_module(f"{_PACKAGE}.{backend}").BACKEND
    if not isinstance(found, Backend):
        raise ConfigError(f"{_PACKAGE}.{backend}.BACKEND is no Backend")
    return found


def get_mode(name: str) -> Backend:
    """The backend whose arithmetic a mode is.

    Args:
        name: ``fixed_point`` or ``exact``, which are pure integers; the name of a backend; or that
            of its arithmetic on other machines.

    Raises:
        SchemeError: no mode has that name.
    """
    modes = {FIXED_POINT.name: INTEGERS, EXACT.name: replace(INTEGERS, arithmetic=EXACT)}
    if name in modes:
        return modes[name]
    names = backend_names()
    if name in names:
        return get_backend(name)
    backends = [get_backend(known) for known in names]
    others = {other.name: (backend, other) for backend in backends for other in backend.others}
    if name not in others:
        legal = ", ".join((*names, *others, *modes))
        raise SchemeError(f"Unknown arithmetic {name!r}: choose one of {legal}")
    backend, arithmetic = others[name]
    return replace(backend, arithmetic=arithmetic)
