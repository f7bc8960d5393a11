"""Masks and positions that each layer computes anew.

What compares positions or makes a mask of lengths is written in the layer that needs it, and no
delegate computes with integers: a model of twelve layers would call each such kernel twelve times.
Ops of floats stay as they are: each may have integers of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from custom_quantizer.core.checkpoint import fingerprint
from custom_quantizer.core.graph import constant_of, is_constant, is_whole, tensor_meta
from custom_quantizer.core.memory import overwritten_by, written_inputs

__all__ = ["compute_once"]


def compute_once(model: GraphModule) -> None:
    """Let calls that compute the same of integers or booleans be one call, which others read."""
    first: dict[object, Node] = {}
    for node in list(model.graph.nodes):
        key = _key(model, node)
        if key is None:
            continue
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            model.graph.erase_node(node)


def _key(model: GraphModule, node: Node) -> object | None:
    """What all nodes have that give the same; ``None``: of this one it is not known."""
    if tensor_meta(node) is None or overwritten_by(node) is not None:
        return None
    if node.op == "get_attr":
        is_table = is_constant(node) and not _is_float(node)
        return fingerprint([constant_of(model, node)]) if is_table else None
    is_call = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    if not is_call or node.is_impure() or written_inputs(node):
        return None
    sources = node.all_input_nodes
    if not sources or any(_is_float(each) or overwritten_by(each) for each in sources):
        return None
    return str(node.target), repr(map_arg((node.args, node.kwargs), lambda n: f"%{n.name}"))


def _is_float(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and not is_whole(node)
