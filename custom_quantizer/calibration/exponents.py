"""Exponents that one scale of integers would make too coarse: what calibration saw decides.

A step of the argument of an exponential is a factor of its result. Scores of attention that no
factor makes smaller may span hundreds, of which 256 integers leave steps that are most of a
probability: such products are float in the delegate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import (
    META_KEY,
    ActivationObserver,
    activation_observer,
)
from custom_quantizer.ops import rule_of

__all__ = ["COARSEST", "EXPONENT", "forget_unread", "leave_coarse"]

EXPONENT = "custom_quantizer_exponent"
"""Key in ``node.meta`` of a product: what it is multiplied by on its way to an exponential, which
alone reads it."""

COARSEST = 0.2
"""Step of an exponent: half of it is 10% of the result."""


def leave_coarse(prepared: GraphModule) -> Callable[[], None]:
    """Let nobody read what is observed of products whose steps are too coarse for exponents.

    Their observers go on watching, for statistics that are saved.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated; changed in place. Observers that saw
            nothing, or are frozen, stay.

    Returns:
        What undoes it.
    """
    told: list[tuple[Node, Any]] = []
    read: list[tuple[Node, list[Node]]] = []
    for node in prepared.graph.nodes:
        if EXPONENT not in node.meta:
            continue
        calls, shown = _observed(prepared, node)
        observers = {activation_observer(prepared, call) for call in calls}
        step = max((_scale(observer) * node.meta[EXPONENT] for observer in observers), default=0.0)
        if step <= COARSEST:
            continue
        reason = f"it is an exponent, and integers would have steps of {step:.2g}"
        for each in shown:
            told.append((each, each.meta.get(META_KEY)))
            each.meta[META_KEY] = {"scheme": None, "reason": reason}
        for call in calls:
            read.append((call, list(call.users)))
            call.replace_all_uses_with(cast(Node, call.args[0]))
    if read:
        prepared.recompile()

    def undo() -> None:
        for each, before in told:
            each.meta[META_KEY] = before
        for call, users in reversed(read):
            for user in users:
                user.replace_input_with(cast(Node, call.args[0]), call)
        if read:
            prepared.recompile()

    return undo


def forget_unread(prepared: GraphModule) -> None:
    """Erase calls of observers that nobody reads, which ``convert_pt2e`` would make integers of."""
    for node in prepared.graph.find_nodes(op="call_module"):
        if not node.users and activation_observer(prepared, node) is not None:
            prepared.graph.erase_node(node)


def _observed(prepared: GraphModule, node: Node) -> tuple[list[Node], list[Node]]:
    """The calls that observe a tensor, moved or not, and the ops whose result it is."""
    calls, shown = list[Node](), [node]
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            rule = rule_of(user)
            if user.op == "call_module":
                calls.append(user)
            elif rule is not None and rule.moves_values:
                shown.append(user)
            else:
                continue
            waiting.append(user)
    return calls, shown


def _scale(observer: ActivationObserver | None) -> float:
    """Of an observer that saw data and may change; 0 of another one."""
    if observer is None or observer.frozen or not observer.count > 0:
        return 0.0
    return float(observer.qparams().scale)
