"""Composite ops as the core ops they are, one call at a time.

Upstream decomposes by tracing the whole graph, and then has every pass trace it again. Of most
graphs only a few calls need it: a ``silu`` between floats, an ``einsum`` of two activations, a
cast. Each is traced alone, with upstream's own table, and what comes out is put in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from custom_quantizer.core.tracing import parts_of

__all__ = ["write_out"]

_OF_THE_VALUE = frozenset({"tensor_meta", "val"})
"""Keys of ``node.meta`` that belong to one result."""


def write_out(
    exported: ExportedProgram, calls: Collection[Node], table: Mapping[Any, Any]
) -> list[Node]:
    """Put in the place of calls what they are made of, in place.

    Args:
        exported: the graph.
        calls: of it.
        table: upstream's decompositions, without those of ops that stay whole.

    Returns:
        The calls that are still there, since what they are made of is not a few plain calls.
    """
    table = dict(table)
    left = [call for call in calls if not _write_out(call, table)]
    exported.graph_module.recompile()
    return left


def _write_out(call: Node, table: Mapping[Any, Any]) -> bool:
    traced = parts_of(call, table)
    if traced is None:
        return False
    nodes, sources = list(traced.graph.nodes), call.all_input_nodes
    (result,) = nodes[-1].all_input_nodes
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    kept = {key: value for key, value in call.meta.items() if key not in _OF_THE_VALUE}
    with call.graph.inserting_before(call):
        for node in nodes[len(sources) : -1]:
            copies[node] = copy = call.graph.node_copy(node, copies.__getitem__)
            copy.meta = {"val": node.meta["val"], **kept}
    name = call.name
    call.replace_all_uses_with(copies[result])
    call.graph.erase_node(call)
    copies[result].name = name  # by which a signature knows outputs
    return True
