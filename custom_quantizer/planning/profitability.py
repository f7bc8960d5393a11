"""Which ops without an int8 kernel are worth quantizing.

Such an op computes in float whatever the plan says; quantizing it puts a quantize and a dequantize
node around it. Between int8 neighbours these stand there anyway: the op before it gives integers
and the op behind it takes them. Next to a float neighbour they are a conversion more and a rounding
more, and buy nothing. So an op without an int8 kernel is quantized if and only if all its inputs
are integers already and something behind it takes integers.

Everything here is a function of a list of :class:`Step`, which knows no op family.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from torch.fx import Node

__all__ = ["Kind", "Step", "unprofitable"]


class Kind(Enum):
    """What a step does with integers."""

    INTEGER = "takes and gives integers"
    OPTIONAL = "takes and gives integers if that costs nothing"
    MOVEMENT = "passes on what it is given"
    FLOAT = "takes and gives float"


@dataclass(frozen=True)
class Step:
    """One op, as far as profitability is concerned.

    Attributes:
        kind: what it does with integers.
        inputs: the activations it reads; constants are left out, they are quantized for free.
        output: its last node.
        users: nodes that read the output.
        anchor: its first node, which the ops before it list among their users.
    """

    kind: Kind
    inputs: tuple[Node, ...]
    output: Node
    users: tuple[Node, ...]
    anchor: Node


def unprofitable(
    steps: Sequence[Step], given: Iterable[Node], wanted: Iterable[Node]
) -> dict[Node, str]:
    """Find the optional steps that stay in float.

    Args:
        steps: in graph order.
        given: model inputs that are quantized before anything else.
        wanted: tensors that the model returns as integers.

    Returns:
        By anchor, why quantizing it would only cost.
    """
    by_anchor = {step.anchor: step for step in steps}
    given, wanted = frozenset(given), frozenset(wanted)
    firm = _integers(steps, given)
    refused: dict[Node, str] = {}
    while True:
        before = len(refused)
        _refuse_float_inputs(steps, given, refused)
        _refuse_float_users(steps, by_anchor, firm, wanted, refused)
        if len(refused) == before:
            return refused


def _integers(steps: Sequence[Step], given: frozenset[Node]) -> frozenset[Node]:
    """Tensors that are integers whatever becomes of the optional steps."""
    found = set(given)
    for step in steps:
        moved = step.kind is Kind.MOVEMENT and any(tensor in found for tensor in step.inputs)
        if step.kind is Kind.INTEGER or moved:
            found.add(step.output)
    return frozenset(found)


def _refuse_float_inputs(
    steps: Sequence[Step], given: frozenset[Node], refused: dict[Node, str]
) -> None:
    integers = set(given)
    for step in steps:
        if step.kind is Kind.OPTIONAL and step.anchor not in refused:
            real = [tensor for tensor in step.inputs if tensor not in integers]
            if real:
                refused[step.anchor] = f"{real[0].name} is float"
        quantized = step.kind is Kind.INTEGER or (
            step.kind is Kind.OPTIONAL and step.anchor not in refused
        )
        moved = step.kind is Kind.MOVEMENT and any(tensor in integers for tensor in step.inputs)
        if quantized or moved:
            integers.add(step.output)


def _refuse_float_users(
    steps: Sequence[Step],
    by_anchor: dict[Node, Step],
    firm: frozenset[Node],
    returned: frozenset[Node],
    refused: dict[Node, str],
) -> None:
    wanted = set(returned)
    for step in reversed(steps):
        for user in step.users:
            reader = by_anchor.get(user)
            if reader is None or step.output not in reader.inputs:
                continue
            if reader.kind is Kind.MOVEMENT:
                # It takes integers if its own users do, or if it joins this tensor to integers.
                joins = any(t in firm for t in reader.inputs if t is not step.output)
                takes = reader.output in wanted or joins
            else:
                takes = reader.kind is not Kind.FLOAT and reader.anchor not in refused
            if takes:
                wanted.add(step.output)
        if step.kind is Kind.OPTIONAL and step.output not in wanted:
            refused.setdefault(step.anchor, "nothing behind it takes integers")
