"""The captured graph in a form that can be annotated, numerics unchanged.

Rewrites, applied in ``transform_for_annotation``:

- what does not depend on the inputs becomes a constant
  (:mod:`custom_quantizer.ops.rewrites.constants`);
- in-place ops become functional: an observer cannot stand between an op and its own input.
  Where memory is written that is later read under another name (a write through a view), the op
  stays, and every tensor in that memory is marked: see :func:`overwritten_by`;
- composite ops become the ops they stand for (:mod:`custom_quantizer.ops.rewrites.decompositions`);
- ops that the backend computes in another form take that form (``Backend.legalize``);
- batch norms and factors of each channel become part of the weights before them
  (:mod:`custom_quantizer.ops.rewrites.batch_norms`, :mod:`custom_quantizer.ops.rewrites.factors`),
  and batch norms with no layer before them convolutions;
- numbers in add, sub, mul and ``1 - x`` become constant tensors, so that they are quantized too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    add_constant,
    argument,
    describe,
    tensor_meta,
    written_inputs,
)
from custom_quantizer.ops.rewrites.batch_norms import (
    batch_norms_to_convs,
    fold_into_layers,
    keep_own_statistics,
)
from custom_quantizer.ops.rewrites.constants import fold_constants
from custom_quantizer.ops.rewrites.decompositions import decompose
from custom_quantizer.ops.rewrites.factors import fold_factors
from custom_quantizer.ops.rewrites.regions import inline_regions

__all__ = ["OVERWRITTEN", "canonicalize", "mark_overwritten", "overwritten_by"]

aten = torch.ops.aten


Legalize = Callable[[GraphModule, bool], object]
"""Rewrites of one backend, in place; told whether parameters are trained."""


def canonicalize(model: GraphModule, legalize: Legalize, *, training: bool = False) -> GraphModule:
    """Apply all rewrites to ``model`` in place and return it.

    Args:
        model: a captured graph.
        legalize: what the backend rewrites.
        training: parameters change, so nothing that is computed from them is a constant.
    """
    inline_regions(model, training=training)
    fold_constants(model, parameters=not training)
    keep_own_statistics(model)
    _functionalize(model)
    decompose(model, training=training)
    if not training:
        fold_into_layers(model)
    legalize(model, training)
    if not training:
        fold_factors(model)
        batch_norms_to_convs(model)
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


def overwritten_by(node: Node) -> str | None:
    """Name of an op that writes into the memory of ``node``'s tensor, if one is left."""
    return cast("str | None", node.meta.get(OVERWRITTEN))


def mark_overwritten(model: GraphModule) -> None:
    """Let :func:`overwritten_by` know what the writes of a graph reach.

    What :func:`canonicalize` left in place it has marked; exporting a graph again loses that.
    """
    for node in model.graph.nodes:
        for written in written_inputs(node):
            for alias in (*_aliases(written), node):
                alias.meta[OVERWRITTEN] = describe(node)


OVERWRITTEN = "custom_quantizer_overwritten"
"""Key in ``node.meta`` of what :func:`overwritten_by` returns."""

# In eval mode these return their input itself, which their schema does not say.
_PASS_THROUGH = frozenset({operator.getitem, aten.dropout.default, aten.feature_dropout.default})


def _shares_memory(node: Node) -> bool:
    """Whether the result of ``node`` may be a view of its first argument.

    In-place ops that come later do not count: they see the new values once ``node`` is functional.
    """
    target = node.target
    if target in _PASS_THROUGH:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable:
        return overwritten_by(node) is not None
    return any(result.alias_info is not None for result in target._schema.returns)


def _aliases(written: Node) -> set[Node]:
    """All nodes whose tensors may share memory with ``written``, itself included."""
    base = written
    while _shares_memory(base) and base.args and isinstance(base.args[0], Node):
        base = base.args[0]
    aliases, stack = {base}, [base]
    while stack:
        for user in stack.pop().users:
            if user not in aliases and _shares_memory(user) and user.args[0] in aliases:
                aliases.add(user)
                stack.append(user)
    return aliases


def _keeps_dtype(node: Node) -> bool:
    """Whether the functional twin gives the dtype of the tensor that was written."""
    metas = [tensor_meta(arg) for arg in node.all_input_nodes]
    written = metas[0]
    return written is not None and all(
        meta is None or torch.result_type(written, meta) == written.dtype for meta in metas
    )


def _functionalize(model: GraphModule) -> None:
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in list(model.graph.nodes):
        for written in written_inputs(node):
            aliases = _aliases(written)
            functional = functional_overload(node.target)
            # A write through a view changes what is later read under another name.
            others = aliases - {written}
            seen = any(order[user] > order[node] for alias in others for user in alias.users)
            stateful = any(alias.op == "get_attr" for alias in aliases)
            if functional is None or seen or stateful or not _keeps_dtype(node):
                for alias in (*aliases, node):
                    alias.meta[OVERWRITTEN] = describe(node)
                continue
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
        elif node.target is aten.div.Tensor and type(node.args[1]) is int:
            # An int would become an int64 tensor on the way, by which no delegate divides.
            if _float32(node.args[0]):
                node.update_arg(1, float(node.args[1]))
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
