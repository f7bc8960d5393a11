"""What ``torch.vmap`` runs, as ops over the whole batch.

``torch.export`` captures a vmapped function as the ops of one sample, between calls that put
tensors into a batch and take them out. Such a tensor hides a dim: it has no range that an observer
could see, and no kernel. The region is traced once more, by which functorch writes the batch out.

The calls are functions of ``torch._functorch.predispatch`` (torch 2.15), which has no public seam;
``tests/ops/test_vmapped.py`` notices where another version captures others.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._functorch import predispatch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from custom_quantizer.core.graph import add_constant, recorded_value

__all__ = ["write_out_batches"]

_ENTER = predispatch._vmap_increment_nesting
_LEAVE = predispatch._vmap_decrement_nesting
_LOAD = predispatch.lazy_load_decompositions
"""Called before a region; what it loads is loaded when the region is traced."""


def write_out_batches(model: GraphModule) -> int:
    """Put ops over all samples in the place of what is vmapped, in place.

    Args:
        model: a captured graph.

    Returns:
        The number of regions that were traced.
    """
    count, depth = 0, 0
    region: list[Node] = []
    for node in list(model.graph.nodes):
        depth += node.target is _ENTER
        if depth and node.op != "get_attr":
            region.append(node)
        depth -= node.target is _LEAVE
        if region and not depth:
            _write_out(model, region)
            region = []
            count += 1
    if count:
        for node in model.graph.find_nodes(op="call_function", target=_LOAD):
            model.graph.erase_node(node)
        model.graph.eliminate_dead_code()
        model.recompile()
    return count


def _write_out(model: GraphModule, region: list[Node]) -> None:
    inside = set(region)
    inputs = [*dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside)]
    results = [node for node in region if not inside.issuperset(node.users)]

    def run(*values: Any) -> list[Any]:
        known = dict(zip(inputs, values, strict=True))
        for node in region:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = cast(Any, node.target)(*args, **kwargs)
        return [known[node] for node in results]

    predispatch.lazy_load_decompositions()
    traced = make_fx(run, tracing_mode="real")(*map(recorded_value, inputs))
    last = region[-1]
    with model.graph.inserting_before(last):
        values = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in traced.graph.find_nodes(op="get_attr"):
            constant = getattr(traced, str(node.target))
            values[node] = add_constant(model, str(node.target), constant, last)
        copied = cast("list[Node]", _copied(model.graph, traced.graph, values, last))
    for node, result in zip(results, copied, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        model.graph.erase_node(node)


def _copied(graph: Graph, traced: Graph, values: dict[Node, Node], last: Node) -> Any:
    """The ops of a traced region before its last call, with the module of that call."""
    before = set(graph.nodes)
    copied = graph.graph_copy(traced, cast(Any, values))
    for node in set(graph.nodes) - before:
        for key in ("nn_module_stack", "stack_trace"):
            if key in last.meta:
                node.meta[key] = last.meta[key]
    return copied
