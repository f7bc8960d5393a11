"""Which scheme goes to which op: rules, their precedence, and why a rule won."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import module_stack
from custom_quantizer.core.rewriting import (
    IDLE_KEY,
    MERGED,
    ORIGINAL_NAME,
    original_name,
    original_target,
)
from custom_quantizer.core.schemes import OpScheme, TensorScheme
from custom_quantizer.errors import ConfigError, nearest
from custom_quantizer.ops.rewrites.canonical import KNOWN
from custom_quantizer.ops.rewrites.composites import is_composite

__all__ = [
    "BORDER_KINDS",
    "Config",
    "Decision",
    "Rule",
    "Scope",
    "border_kind",
    "operator_names",
]


class Scope(IntEnum):
    """What a rule selects by; a higher scope wins over a lower one."""

    GLOBAL = 0
    OPERATOR_TYPE = 1
    MODULE_TYPE = 2
    MODULE_NAME = 3
    NODE_NAME = 4

    @property
    def setter(self) -> str:
        """The setter that makes rules of this scope."""
        return f"set_{self.name.lower()}"


@dataclass(frozen=True)
class Rule:
    """Ops selected by ``scope`` and ``key`` take ``scheme`` (``None``: stay in float).

    Attributes:
        scope: what the key names.
        key: a node name, a module path (globs allowed), a module type, an aten overload.
        scheme: what the ops become.
        source: where a file says so (``mixed.yaml:7``); equal rules may differ in it.
    """

    scope: Scope
    key: str
    scheme: OpScheme | None
    source: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        scheme = "None" if self.scheme is None else f'"{self.scheme.name}"'
        key = "" if self.scope is Scope.GLOBAL else f'"{self.key}", '
        return f"{self.scope.setter}({key}{scheme})"

    @property
    def place(self) -> str:
        """The rule with the file and line it stands in, for messages."""
        return str(self) if self.source is None else f"{self.source}: {self}"

    @property
    def is_glob(self) -> bool:
        """Whether the key stands for any number of names."""
        names = self.scope in (Scope.NODE_NAME, Scope.MODULE_NAME)
        return names and any(sign in self.key for sign in "*?[")

    def matches(self, node: Node) -> bool:
        """Whether the rule selects ``node``."""
        return self.selects(_names(node, self.scope))

    def selects(self, names: Iterable[str]) -> bool:
        """Whether one of ``names`` is what the rule selects by."""
        if self.is_glob:
            return any(fnmatchcase(name, self.key) for name in names)
        return self.key in names


def _names(node: Node, scope: Scope) -> Iterable[str]:
    """What a rule of ``scope`` may call ``node``."""
    if scope is Scope.GLOBAL:
        return ("",)
    if scope is Scope.NODE_NAME:
        # What a captured call was rewritten to answers to its name.
        original = node.meta.get(ORIGINAL_NAME)
        return (node.name,) if original is None else (node.name, original)
    if scope is Scope.OPERATOR_TYPE:
        return (str(original_target(node)), str(node.target))
    stack = module_stack(node)
    if scope is Scope.MODULE_TYPE:
        return [name for _, kind in stack for name in _class_names(kind)]
    return [path for path, _ in stack if path]


def _class_names(kind: str) -> tuple[str, ...]:
    """What a class is called: ``torch.nn.modules.conv.Conv2d`` is ``torch.nn.Conv2d``, too."""
    folder, _, name = kind.rpartition(".")
    public = getattr(torch.nn, name, None) if folder.startswith("torch.nn.modules.") else None
    if public is None or f"{public.__module__}.{public.__qualname__}" != kind:
        return (kind,)
    return (kind, f"torch.nn.{name}")


class _Index:
    """Rules by what they name, so that a node is not compared with every one of thousands.

    Args:
        rules: in the order they were set.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        self._named: dict[tuple[Scope, str], int] = {}
        self._globs: dict[Scope, list[int]] = {}
        for position, rule in enumerate(self.rules):
            if rule.is_glob:
                self._globs.setdefault(rule.scope, []).append(position)
            else:
                self._named[rule.scope, rule.key] = position

    def best(self, node: Node) -> Rule | None:
        """The last matching rule of the highest scope that has one."""
        for scope in reversed(Scope):
            names = _names(node, scope)
            found = max((self._named.get((scope, name), -1) for name in names), default=-1)
            for position in reversed(self._globs.get(scope, ())):
                if position < found or self.rules[position].selects(names):
                    found = max(found, position)
                    break
            if found >= 0:
                return self.rules[found]
        return None


@dataclass(frozen=True)
class Decision:
    """The scheme of a node and the sentence that says why.

    Attributes:
        scheme: what the node becomes; ``None``: float.
        explicit: some rule or filter decided, rather than the absence of one.
        reason: for the report.
        aimed: the rule names the node or its operator type.
    """

    scheme: OpScheme | None
    explicit: bool
    reason: str
    aimed: bool = False


BORDER_KINDS = ("integer", "int8", "uint8", "int16", "float")
"""What an input or output of the program can be: ``integer`` is int8, or int16 above 8 bits."""


_MOST_HINTS = 20


def border_kind(value: object) -> str:
    """One of :data:`BORDER_KINDS`, for ``True``, ``False`` or the name of a dtype.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, bool):
        return "integer" if value else "float"
    if isinstance(value, str) and value in BORDER_KINDS[1:-1]:
        return value
    legal = ", ".join(BORDER_KINDS[1:-1])
    raise ConfigError(f"integer is true, false or the name of a dtype ({legal}), not {value!r}")


def operator_names(operator_type: Any) -> list[str]:
    """The overloads that ``operator_type`` (an overload, a packet, or an overload's name) means.

    Raises:
        ConfigError: no op family knows it; the nearest names are given.
    """
    # Families also claim Python functions (getitem), which have no name to write in a file.
    known = {str(t) for t in KNOWN if isinstance(t, torch._ops.OpOverload)}
    overloads = getattr(operator_type, "overloads", None)
    if overloads is not None:  # an OpOverloadPacket: all its overloads that are known
        names = [str(getattr(operator_type, o)) for o in overloads()]
    else:
        names = [str(operator_type).removeprefix("torch.ops.")]
    names = [n for n in names if _functional_name(n) in known or _is_composite(n)]
    if not names:
        word = str(operator_type)
        if not word.startswith("aten.") and hasattr(operator_type, "__name__"):
            word = operator_type.__name__  # a function or a class
        near = nearest(word if "." in word else f"aten.{word}.default", known)
        if isinstance(operator_type, type):
            near = "; for layers of a type there is set_module_type"
        raise ConfigError(f"{word} is not an operator this quantizer knows{near}")
    return names


def _is_composite(name: str) -> bool:
    """Whether an overload of this name is an op of which a graph may get the steps."""
    _, _, rest = name.partition("aten.")
    packet, _, overload = rest.partition(".")
    if not overload:  # a packet takes any name for an attribute, the empty one too
        return False
    return is_composite(getattr(getattr(torch.ops.aten, packet, None), overload, None))


def _functional_name(name: str) -> str:
    """``aten.relu.default`` for ``aten.relu_.default``."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    return f"{namespace}.{packet.removesuffix('_')}.{overload}"


@dataclass
class Config:
    """The rules of a quantizer, in the order they were set.

    Attributes:
        rules: later ones win within a scope.
        filter_function: if given, nodes for which it is false stay in float.
        inputs: formats of the model's inputs by name or position (``"0"``), ``"*"`` for all others;
            an input that is not named takes what the ops that read it want.
        outputs: formats of the model's outputs by position, ``"*"`` for all others; an output that
            is not named keeps what the op that makes it gives.
        integer_inputs: what the program takes for an input, one of :data:`BORDER_KINDS`, by name or
            position, ``"*"`` for all others; float32 where nothing is said.
        integer_outputs: likewise, what it returns.
        accuracy: what ``quantize`` does beyond rounding to nearest, where that was asked for.
        improve: the algorithms it does it with, likewise.
        io_sources: where a file says so, by the name of the field and of the input or output.
    """

    rules: list[Rule] = field(default_factory=list)
    filter_function: Callable[[Node], bool] | None = None
    inputs: dict[str, TensorScheme] = field(default_factory=dict)
    outputs: dict[str, TensorScheme] = field(default_factory=dict)
    integer_inputs: dict[str, str] = field(default_factory=dict)
    integer_outputs: dict[str, str] = field(default_factory=dict)
    accuracy: str | None = None
    improve: tuple[str, ...] | None = None
    io_sources: dict[tuple[str, str], str] = field(default_factory=dict, compare=False, repr=False)
    _index: _Index | None = field(default=None, init=False, compare=False, repr=False)

    def resolve(self, node: Node) -> Decision:
        """Decide the scheme of ``node``."""
        if self.filter_function is not None and not self.filter_function(node):
            return Decision(None, True, "the filter function left it out")
        if self._index is None or self._index.rules != self.rules:
            self._index = _Index(self.rules)
        best = self._index.best(node)
        if best is None:
            return Decision(None, False, "no rule selects it")
        aimed = best.scope in (Scope.OPERATOR_TYPE, Scope.NODE_NAME)
        return Decision(best.scheme, best.scope is not Scope.GLOBAL, str(best), aimed)

    def check(self, model: GraphModule) -> list[str]:
        """Find rules that select nothing in ``model``.

        Returns:
            Warnings for operator and module types that do not occur, with the nearest that do, and
            for nodes that were captured and are in no program.

        Raises:
            ConfigError: a node or module name that does not exist, with the nearest ones.
        """
        self._check_io(model)
        calls = [node for node in model.graph.nodes if node.op == "call_function"]
        present = {s: {name for node in calls for name in _names(node, s)} for s in Scope}
        idle: Mapping[str, str] = model.meta.get(IDLE_KEY, {})
        warnings: list[str] = []
        for rule in self.rules:
            if rule.scope is Scope.GLOBAL or rule.selects(present[rule.scope]):
                continue
            if rule.scope is Scope.NODE_NAME:
                why = next((why for name, why in idle.items() if rule.selects((name,))), None)
                if why is not None:
                    warnings.append(f"{rule.place} selects nothing that the program runs: {why}")
                    continue
                raise ConfigError(
                    f"{rule.place}: the graph has no node named {rule.key!r}"
                    f"{_where_it_went(rule.key, calls)}"
                )
            if rule.scope is Scope.MODULE_NAME:
                names = {path for node in calls for path, _ in module_stack(node) if path}
                # Modules that prepare_pt2e fused away (batch norms) still own their parameters.
                names |= {name for name, _ in model.named_modules() if name}
                if any(fnmatchcase(name, rule.key) for name in names):
                    continue
                hint = nearest(rule.key, names)
                raise ConfigError(f"{rule.place}: the model has no module {rule.key!r}{hint}")
            kind = "operator" if rule.scope is Scope.OPERATOR_TYPE else "module type"
            there = present[rule.scope]
            # A class of another module, or none at all: its name counts.
            last = rule.key.rpartition(".")[2]
            same = sorted(name for name in there if name.rpartition(".")[2] == last)
            if same:
                hint = f"; did you mean {' or '.join(same)}?"
            else:  # to look for the nearest takes a millisecond
                hint = nearest(rule.key, there) if len(warnings) < _MOST_HINTS else ""
            warnings.append(f"{rule.place} selects nothing: the graph has no such {kind}{hint}")
        return warnings

    def _check_io(self, model: GraphModule) -> None:
        inputs = [node.name for node in model.graph.nodes if node.op == "placeholder"]
        outputs = [str(i) for i in range(len(returned_nodes(model)))]
        positions = [str(i) for i in range(len(inputs))]
        for kind, field_name, legal, known in (
            ("input", "inputs", [*inputs, *positions], inputs),
            ("output", "outputs", outputs, outputs),
            ("input", "integer_inputs", [*inputs, *positions], inputs),
            ("output", "integer_outputs", outputs, outputs),
        ):
            for name in getattr(self, field_name):
                if name != "*" and name not in legal:
                    raise ConfigError(
                        f"{self.io_place(field_name, name)}: the model has no {kind} {name!r}; it "
                        f"has {', '.join(known)}"
                    )

    def io_place(self, field_name: str, name: str) -> str:
        """Where something was said about an input or output, for messages."""
        return self.io_sources.get((field_name, name), "set_io")

    def of_input(self, field_name: str, node: Node, position: int) -> tuple[str, Any] | None:
        """What ``inputs`` or ``integer_inputs`` says of an input, and under which name."""
        given = getattr(self, field_name)
        names = (node.name, str(position), "*")
        return next(((name, given[name]) for name in names if name in given), None)

    def of_output(self, field_name: str, position: int) -> tuple[str, Any] | None:
        """What ``outputs`` or ``integer_outputs`` says of an output, and under which name."""
        given = getattr(self, field_name)
        return next(((name, given[name]) for name in (str(position), "*") if name in given), None)


def _where_it_went(name: str, calls: Sequence[Node]) -> str:
    """What became of a node that the graph does not have: part of a layer, or it is misspelt."""
    for node in calls:
        if name in node.meta.get(MERGED, ()):
            return f": it is part of the weight and bias of {original_name(node)!r}; name that one"
    hint = nearest(name, (node.name for node in calls))
    if name.startswith("batch_norm"):
        hint += "; prepare_pt2e folds a batch norm into the convolution before it: name that one"
    return hint


def returned_nodes(model: GraphModule) -> list[Node]:
    """The nodes that a graph returns, in order."""
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    return [value for value in pytree.tree_leaves(output.args[0]) if isinstance(value, Node)]
