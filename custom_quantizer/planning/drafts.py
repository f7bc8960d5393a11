"""Ops while a plan is made, and which integers each of them wants and makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.config.rules import Decision
from custom_quantizer.core.graph import constant_of, is_constant, is_parameter, shape_of
from custom_quantizer.core.rewriting import original_name, step_target
from custom_quantizer.core.schemes import OpScheme, TensorScheme
from custom_quantizer.ops import OpRule, PatternMatch, Trait
from custom_quantizer.ops.backend import Support
from custom_quantizer.planning.insertion import ANNOTATION_KEY


@dataclass(eq=False)
class DraftOp:
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
    operand: tuple[Node, TensorScheme] | None = None  # a constant of a float op, and its format
    abstains: bool = False  # reads floats of what is before it, whatever others make of that
    centered: bool = False  # its output has zero point 0, for a consumer that needs it so
    reason: str = ""

    def leave(self, reason: str) -> None:
        """Leave it in float, whatever a rule or default gave it."""
        self.scheme, self.reason = None, reason

    @property
    def output(self) -> Node:
        """What others read: the result of the fused activation, if there is one."""
        return self.fused or self.node

    @property
    def moves_values(self) -> bool:
        """Whether it is data movement, whose output has the scale of its input."""
        return self.rule is not None and self.rule.moves_values

    def has(self, trait: Trait) -> bool:
        """Whether the family has a trait."""
        return self.rule is not None and trait in self.rule.traits

    @property
    def activations(self) -> list[Node]:
        """Inputs that are no constants."""
        inputs = () if self.match is None else self.match.inputs
        return [tensor for tensor in inputs if not is_constant(tensor)]

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

    @property
    def adds_up(self) -> bool:
        """Whether it is a layer by form only: it adds up all of a dim, and not a few branches.

        Also one that is written as ``einsum`` or as a product with equal numbers. A pool of an
        image is none, whatever form a dynamic batch gives it.
        """
        if self.match is None or self.match.weight is None:
            return False
        target = step_target(self.node)
        return target in _TOTALS or (target not in _POOLS and _is_one_number(self.match.weight))

    @property
    def is_total(self) -> bool:
        """Whether it adds up all of a dim, on integers so far."""
        return self.scheme is not None and self.adds_up

    @property
    def is_dynamic(self) -> bool:
        """Whether its activations are quantized at run time."""
        return self.scheme is not None and self.scheme.dynamic


_TOTALS = frozenset(
    {
        torch.ops.aten.mean.default,
        torch.ops.aten.mean.dim,
        torch.ops.aten.sum.default,
        torch.ops.aten.sum.dim_IntList,
    }
)

_POOLS = frozenset(
    {
        torch.ops.aten.adaptive_avg_pool2d.default,
        torch.ops.aten.avg_pool2d.default,
    }
)


def _is_one_number(weight: Node) -> bool:
    """Whether a weight that is no parameter is a row of equal numbers."""
    model = cast(GraphModule, weight.graph.owning_module)
    if len(shape_of(weight)) != 2 or shape_of(weight)[0] != 1 or not is_constant(weight):
        return False
    if weight.op != "get_attr" or is_parameter(model, weight):
        return False
    value = constant_of(model, weight)
    return value.numel() > 1 and bool((value == value[0, 0]).all())


_MOST_MOVES = 8
"""Data movements behind one another that are looked through: bounds the time for a graph."""


class Drafts:
    """All ops of a graph, in its order, and where to find them.

    Attributes:
        producer: by tensor, the op that makes it.
        anchors: by its first node, which the ops before it list among their users.
    """

    def __init__(self, ops: Iterable[DraftOp]) -> None:
        self._ops = tuple(ops)
        self.producer = {op.output: op for op in self._ops}
        self.anchors = {op.node: op for op in self._ops}
        self._calls: defaultdict[str, list[DraftOp]] = defaultdict(list)
        for op in self._ops:
            self._calls[original_name(op.node)].append(op)

    def __iter__(self) -> Iterator[DraftOp]:
        return iter(self._ops)

    def __reversed__(self) -> Iterator[DraftOp]:
        return reversed(self._ops)

    def same_call(self, op: DraftOp) -> tuple[DraftOp, ...]:
        """All ops that the captured call of ``op`` was rewritten to, in graph order."""
        return tuple(self._calls[original_name(op.node)])

    def unmoved(self, tensor: Node) -> Node:
        """The tensor that ``tensor`` shows values of, in another order or shape."""
        op = self.producer.get(tensor)
        while op is not None and op.moves_values and op.match is not None:
            tensor = op.match.inputs[0]
            op = self.producer.get(tensor)
        return tensor

    def sources(self, tensor: Node) -> set[Node]:
        """The tensors whose values ``tensor`` shows: of what is joined, each.

        Through no more than :data:`_MOST_MOVES` ops one behind the other.
        """
        found, shown = set[Node](), {tensor}
        for _ in range(_MOST_MOVES):
            before = set[Node]()
            for each in shown:
                op = self.producer.get(each)
                match = op.match if op is not None and op.moves_values else None
                if match is None:
                    found.add(each)
                else:
                    before.update(match.inputs)
            shown = before
        return found | shown

    def computed_by(self, tensor: Node) -> DraftOp | None:
        """The op that computes the values of ``tensor``, before any data movement."""
        return self.producer.get(self.unmoved(tensor))


ANNOTATED_BEFORE = "another quantizer annotated it before"


def is_annotated(node: Node) -> bool:
    """Whether a quantizer has annotated ``node``: in a ``ComposableQuantizer``, an earlier one."""
    return bool(getattr(node.meta.get(ANNOTATION_KEY), "_annotated", False))


def same_format(a: TensorScheme | None, b: TensorScheme | None) -> bool:
    """Whether two activations can be the same integers; the observer is the producer's choice."""
    return a is not None and b is not None and (a.format, a.symmetric) == (b.format, b.symmetric)
