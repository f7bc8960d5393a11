"""Exponents that one scale of integers would make too coarse: what calibration saw decides.

A step of the argument of an exponential is a factor of its result. Scores of attention that no
factor makes smaller may span hundreds, of which 256 integers leave steps that are most of a
probability: such products are float in the delegate.
"""

from __future__ import annotations

from typing import cast

from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import META_KEY, ActivationObserver
from custom_quantizer.ops import rule_of

__all__ = ["COARSEST", "EXPONENT", "leave_coarse"]

EXPONENT = "custom_quantizer_exponent"
"""Key in ``node.meta`` of a product: what it is multiplied by on its way to an exponential, which
alone reads it."""

COARSEST = 0.2
"""Step of an exponent: half of it is 10% of the result."""


def leave_coarse(prepared: GraphModule) -> None:
    """Take the observers away from products whose steps are too coarse for exponents.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated; changed in place. Observers that saw
            nothing, or are frozen, stay.
    """
    for node in list(prepared.graph.nodes):
        if EXPONENT not in node.meta:
            continue
        calls, shown = _observed(prepared, node)
        observers = {prepared.get_submodule(str(call.target)) for call in calls}
        steps = [_scale(observer) * node.meta[EXPONENT] for observer in observers]
        if not steps or max(steps) <= COARSEST:
            continue
        for call in calls:
            call.replace_all_uses_with(cast(Node, call.args[0]))
            prepared.graph.erase_node(call)
        prepared.recompile()
        for each in shown:
            each.meta[META_KEY] = {
                "scheme": None,
                "reason": f"it is an exponent, and integers would have steps of {max(steps):.2g}",
            }


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


def _scale(observer: object) -> float:
    """Of an observer that saw data and may change; 0 of another one."""
    if not isinstance(observer, ActivationObserver) or observer.frozen or not observer.count > 0:
        return 0.0
    return float(observer.qparams().scale)
