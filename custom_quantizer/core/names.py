"""Names of ops that outlast ``torch.export``.

Exporting a converted graph again, as ExecuTorch's lowering call asks for, numbers its calls anew:
what was ``conv2d_5`` may become ``conv2d_6``. So that plans, rules, reports and errors go on saying
the same of the same op, the quantizer writes its name into ``node.meta["custom"]``, which export
passes on, and whoever takes an exported graph puts it back.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, cast

from torch.fx import Graph, GraphModule, Node

from custom_quantizer.core.rewriting import ORIGINAL_NAME

__all__ = ["record_names", "recorded_name", "restore_names"]

_NAME = "custom_quantizer_name"
_RESULTS = "custom_quantizer_results"
"""Names of the ``getitem`` calls of an op of several results, by index: export gives these calls
what the op has in ``node.meta["custom"]``."""
_WRITTEN = "custom_quantizer_written"


def record_names(graph: Graph) -> None:
    """Write the name of each call, and of the call it is a part of, where export keeps it."""
    for node in graph.nodes:
        if node.op == "call_function":
            recorded: dict[str, Any] = {_NAME: node.name}
            results = [user for user in node.users if user.target is operator.getitem]
            if results:
                recorded[_RESULTS] = {str(user.args[1]): user.name for user in results}
            if ORIGINAL_NAME in node.meta:
                recorded[_WRITTEN] = node.meta[ORIGINAL_NAME]
            node.meta["custom"] = {**(node.meta.get("custom") or {}), **recorded}


def recorded_name(node: Node) -> str | None:
    """The name that :func:`record_names` wrote, on a call of a graph that was exported again."""
    custom = node.meta.get("custom")
    if not isinstance(custom, dict):
        return None
    name = custom.get(_NAME)
    if node.target is operator.getitem and _RESULTS in custom:
        name = custom[_RESULTS].get(str(node.args[1]))
    return cast("str | None", name)


def restore_names(model: GraphModule) -> None:
    """Give calls of a graph that was exported again the names they had, in place.

    A call without a record keeps its name, unless another one gets it. So do calls that were
    copied, or became several, of which each has the record.
    """
    calls = [node for node in model.graph.nodes if node.op == "call_function"]
    known = Counter(map(recorded_name, calls))
    wanted = {}
    for node in calls:
        name = recorded_name(node)
        if name is None or known[name] > 1:
            continue
        wanted[node], custom = name, node.meta["custom"]
        if _WRITTEN in custom and custom[_NAME] == name:
            node.meta[ORIGINAL_NAME] = custom[_WRITTEN]
    taken = set(wanted.values())
    for node in model.graph.nodes:
        if node not in wanted and node.op != "output":
            wanted[node] = node.name
            while wanted[node] in taken:
                wanted[node] += "_again"
            taken.add(wanted[node])
    for node, name in wanted.items():
        node.name = name
    model.recompile()
