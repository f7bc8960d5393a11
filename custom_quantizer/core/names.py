"""Names of ops that outlast ``torch.export``.

Exporting a converted graph again, as ExecuTorch's lowering call asks for, numbers its calls anew:
what was ``conv2d_5`` may become ``conv2d_6``. So that plans, rules, reports and errors go on saying
the same of the same op, the quantizer writes its name into ``node.meta["custom"]``, which export
passes on, and whoever takes an exported graph puts it back.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from custom_quantizer.core.rewriting import ORIGINAL_NAME

__all__ = ["record_names", "recorded_name", "restore_names"]

_NAME = "custom_quantizer_name"
_WRITTEN = "custom_quantizer_written"


def record_names(graph: Graph) -> None:
    """Write the name of each call, and of the call it is a part of, where export keeps it."""
    for node in graph.nodes:
        if node.op == "call_function":
            recorded = {_NAME: node.name}
            if ORIGINAL_NAME in node.meta:
                recorded[_WRITTEN] = node.meta[ORIGINAL_NAME]
            node.meta["custom"] = {**(node.meta.get("custom") or {}), **recorded}


def recorded_name(node: Node) -> str | None:
    """The name that :func:`record_names` wrote, on a call of a graph that was exported again."""
    custom = node.meta.get("custom")
    return custom.get(_NAME) if isinstance(custom, dict) else None


def restore_names(model: GraphModule) -> None:
    """Give calls of a graph that was exported again the names they had, in place.

    A call without a record keeps its name, unless another one gets it.
    """
    wanted = {}
    for node in model.graph.nodes:
        name = recorded_name(node)
        if node.op == "call_function" and name is not None:
            wanted[node] = name
            custom = node.meta["custom"]
            if _WRITTEN in custom:
                node.meta[ORIGINAL_NAME] = custom[_WRITTEN]
    if len(set(wanted.values())) < len(wanted):
        return  # a call was copied: the names tell nothing apart
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
