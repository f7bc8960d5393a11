"""The captured graph in a form that can be annotated, numerics unchanged.

Two rewrites, applied in ``transform_for_annotation``:

- in-place ops become functional: an observer cannot stand between an op and its own input;
- numbers in add, sub, mul and ``1 - x`` become constant tensors, so that they are quantized too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.graph import add_constant, argument, tensor_meta

__all__ = ["canonicalize"]

aten = torch.ops.aten


def canonicalize(model: GraphModule) -> GraphModule:
    """Apply both rewrites to ``model`` in place and return it."""
    _functionalize(model)
    _numbers_to_tensors(model)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


def functional_overload(target: Any) -> Any | None:
    """The out-of-place twin of an in-place overload, or ``None`` if it is not in-place."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.chunk.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.narrow.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)


def _aliases_later(node: Node, order: dict[Node, int]) -> bool:
    """Whether memory that ``node`` writes is read later under another name.

    Dropout in eval mode returns its input, so what it is applied to counts as the same tensor.
    """
    written = cast(Node, node.args[0])
    base = written
    while base.target in _VIEWS and isinstance(base.args[0], Node):
        base = base.args[0]
    aliases, stack = {base}, [base]
    while stack:
        for user in stack.pop().users:
            if user.target in _VIEWS and user not in aliases:
                aliases.add(user)
                stack.append(user)
    aliases.discard(written)
    return any(order[user] > order[node] for alias in aliases for user in alias.users)


def _functionalize(model: GraphModule) -> None:
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in list(model.graph.nodes):
        functional = functional_overload(node.target)
        if functional is None or not isinstance(node.args[0], Node):
            continue
        written = node.args[0]
        if written.op == "get_attr" or _aliases_later(node, order):
            continue  # the planner reports it as an op it does not know
        node.meta["original_target"] = node.target
        node.target = functional
        # Whoever reads the overwritten tensor later sees the new values.
        for user in list(written.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(written, node)


def _numbers_to_tensors(model: GraphModule) -> None:
    for node in list(model.graph.nodes):
        if node.target is aten.rsub.Scalar and argument(node, 2, "alpha", 1) == 1:
            data, number = node.args[:2]
            if _float32(data):
                node.meta.setdefault("original_target", node.target)
                node.target = aten.sub.Tensor
                node.args = (_constant(model, node, cast(float, number)), data)
                node.kwargs = {}
        elif node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
            if not any(_float32(arg) for arg in node.args[:2]):
                continue
            node.args = tuple(
                _constant(model, node, arg)
                if i < 2 and isinstance(arg, (int, float)) and not isinstance(arg, bool)
                else arg
                for i, arg in enumerate(node.args)
            )


def _float32(arg: Any) -> bool:
    meta = tensor_meta(arg) if isinstance(arg, Node) else None
    return meta is not None and meta.dtype == torch.float32


def _constant(model: GraphModule, node: Node, number: float) -> Node:
    value = torch.tensor(float(number), dtype=torch.float32)
    constant = add_constant(model, f"{node.name}_constant", value, node)
    constant.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return constant
