"""One scale for tensors that are joined, or one for each: what calibration saw decides.

A concatenation moves integers, so its parts have to be of one scale. A part that others compute
with, too, has an observer of its own until the data were seen. It then takes the scale of what it
is joined to, so that nothing is computed at the join, unless that scale is so much coarser that
its other readers would lose bits: then it keeps its own, and is requantized for the join.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase

from custom_quantizer.calibration.observers import ActivationObserver, activation_observer
from custom_quantizer.calibration.ranges import Statistics
from custom_quantizer.ops import rule_of

__all__ = ["COARSER", "joined_observers", "requantize_parts", "share_scales", "shared_scales"]

COARSER = 2.0
"""How many times its own scale a part may be given.

A part with its own scale is rounded twice on its way through the join: with at most half of the
scale behind it, that adds at most ``10 log10(1 + 1/4) = 1`` dB to the error there, and its other
readers keep a bit or more, 6 dB.
"""


def share_scales(prepared: GraphModule) -> None:
    """Give parts of joins the observer of what they are joined to, where the two are near.

    What was seen counts for both. The last join comes first, so that the parts of one that is
    itself joined are compared with the scale that it ends up with.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated; changed in place. Observers that saw
            nothing, or are frozen, stay.
    """
    names: dict[ActivationObserver, list[str]] | None = None
    finest: dict[ActivationObserver, float] = {}
    for _, part, joint in reversed(list(_parts(prepared))):
        mine, other = _observers(prepared, part, joint)
        if mine is other or not _may_share(mine, other):
            continue
        scales = [cast(float, observer.qparams().scale) for observer in (mine, other)]
        own = min(map(finest.get, (mine, other), scales))  # of all that share one by now
        if max(scales) > COARSER * own:
            continue
        finest[other] = own
        if names is None:
            names = _names(prepared)
        other.statistics = _of_both(mine.statistics, other.statistics)
        for name in names[mine]:
            setattr(prepared, name, other)
        names[other] += names.pop(mine)


@contextmanager
def shared_scales(prepared: GraphModule) -> Iterator[None]:
    """:func:`share_scales`, undone where the body raises."""
    joined = joined_observers(prepared)  # no other observer is changed
    before = {
        name: (observer, observer.statistics)
        for observer, names in _names(prepared).items()
        if observer in joined
        for name in names
    }
    share_scales(prepared)
    try:
        yield
    except BaseException:
        for name, (observer, statistics) in before.items():
            setattr(prepared, name, observer)
            observer.statistics = statistics
        raise


def requantize_parts(prepared: GraphModule) -> None:
    """Observe parts of joins once more, as what they are joined to, where their integers differ.

    For ``convert_pt2e``, whose joins then are of one scale.
    """
    number = 0
    calls: dict[tuple[Node, ActivationObserver], Node] = {}
    for join, part, joint in list(_parts(prepared)):
        mine, other = _observers(prepared, part, joint)
        if mine is other or not (_known(mine) and _known(other)):
            continue
        if mine.qparams() == other.qparams():
            continue
        if (part, other) not in calls:
            while hasattr(prepared, name := f"joined_observer_{number}"):
                number += 1
            setattr(prepared, name, other)
            with prepared.graph.inserting_before(join):
                calls[part, other] = prepared.graph.call_module(name, (part,))
        join.replace_input_with(part, calls[part, other])


def joined_observers(
    prepared: GraphModule,
) -> dict[ActivationObserver, frozenset[ActivationObserver]]:
    """By observer of a part or a join, all that :func:`share_scales` may make one of with it."""
    found: dict[ActivationObserver, frozenset[ActivationObserver]] = {}
    for _, part, joint in _parts(prepared):
        mine, other = _observers(prepared, part, joint)
        if mine.scheme != other.scheme:
            continue
        together = found.get(mine, frozenset({mine})) | found.get(other, frozenset({other}))
        found.update(dict.fromkeys(together, together))
    return found


def _parts(prepared: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Joins of tensors that are observed, a part of each, and the call that observes its result."""
    for node in prepared.graph.nodes:
        rule = rule_of(node)
        parts = [part for part in node.all_input_nodes if part.op == "call_module"]
        if rule is None or not rule.moves_values or len(parts) < 2 or len(node.users) != 1:
            continue
        (joint,) = node.users
        if not _is_observed(prepared, joint):
            continue
        for part in parts:
            if _is_observed(prepared, part):
                yield node, part, joint


def _is_observed(prepared: GraphModule, call: Node) -> bool:
    """Whether a call is of an observer, and none that rounds in training."""
    observer = activation_observer(prepared, call)
    return observer is not None and not isinstance(observer, FakeQuantizeBase)


def _observers(
    prepared: GraphModule, part: Node, joint: Node
) -> tuple[ActivationObserver, ActivationObserver]:
    """What two calls are of, now."""
    mine, other = (activation_observer(prepared, call) for call in (part, joint))
    return cast(ActivationObserver, mine), cast(ActivationObserver, other)


def _known(observer: ActivationObserver) -> bool:
    return observer.frozen or bool(observer.count > 0)


def _may_share(a: ActivationObserver, b: ActivationObserver) -> bool:
    free = not (a.frozen or b.frozen or a.is_dynamic or b.is_dynamic)
    return free and a.scheme == b.scheme and a.kind == b.kind and _known(a) and _known(b)


def _of_both(a: Statistics, b: Statistics) -> Statistics:
    """Moving averages of two tensors, which cannot be added, become the range that holds both."""
    if a.kind != "average":
        return a + b
    return Statistics("average", a.count + b.count, min(a.low, b.low), max(a.high, b.high))


def _names(prepared: GraphModule) -> dict[ActivationObserver, list[str]]:
    names = defaultdict(list)
    for name, module in prepared.named_modules(remove_duplicate=False):
        if isinstance(module, ActivationObserver):
            names[module].append(name)
    return names
