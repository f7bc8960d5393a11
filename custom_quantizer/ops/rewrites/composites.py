"""Composite ops that nothing here knows, as what PyTorch makes of them, before annotation.

``torch.inner`` is a product, ``F.cosine_similarity`` three sums and a quotient: PyTorch's
dispatcher has no kernels of theirs but functions that call other ops. Others have kernels, and are
decomposed while a program is made (``F.smooth_l1_loss``, ``torch.trace``). Either way a program
gets the steps while it is lowered, which is too late for integers. So they are traced here, call by
call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import is_float32, tensor_meta
from custom_quantizer.core.rewriting import STEP, Insertion, rewrite_calls
from custom_quantizer.core.tracing import parts_of
from custom_quantizer.ops.rewrites.writes import functional_overload
from custom_quantizer.ops.values import COMPARISONS

__all__ = ["inline_composites", "is_composite"]

aten = torch.ops.aten

IsKnown = Callable[[Any], bool]
"""Whether a family, a rewrite or the backend has something of its own for an op."""


def inline_composites(model: GraphModule, is_known: IsKnown, *, training: bool = False) -> int:
    """Put the steps of composite ops in the place of their calls, in place.

    An op is left alone unless all its steps are known, and all tensors of the call are float32.

    Args:
        model: a captured graph.
        is_known: ops that stay, and that steps may be.
        training: parameters change.

    Returns:
        The number of calls that were replaced.
    """
    found = {node.target for node in model.graph.nodes if is_composite(node.target)}
    unknown = {target for target in found if not is_known(target)}
    if not unknown:
        return 0
    steps = _Steps(is_known)
    rewrites = dict.fromkeys(unknown, lambda insert: _inlined(insert, steps))
    return rewrite_calls(model, rewrites, training=training)


def is_composite(target: Any) -> bool:
    """Whether PyTorch computes an op by calling others, in evaluation as in training."""
    return _parts_of(target) is not None


@cache
def _parts_of(target: Any) -> Callable[..., Any] | None:
    """The function that calls what an op is made of, if it is made of others."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return target.decompose
    return _decompositions().get(target)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return dict(core_aten_decompositions())  # of the table itself, get() knows nothing


def _inlined(insert: Insertion, steps: _Steps) -> Node | None:
    call = insert.node
    if not all(map(is_float32, (call, *call.all_input_nodes))):
        return None
    traced = steps.of(call)
    if traced is None:
        return None
    placeholders = traced.graph.find_nodes(op="placeholder")
    copies: dict[Node, Node] = dict(zip(placeholders, call.all_input_nodes, strict=True))
    for step in traced.graph.nodes:
        if step.op == "call_function":
            given = cast(Any, torch.fx.node.map_arg((step.args, step.kwargs), copies.__getitem__))
            copies[step] = insert.call(step.target, *given[0], **given[1])
            copies[step].meta[STEP] = step.target
    (result,) = traced.graph.output_node().all_input_nodes
    return copies[result]


class _Steps:
    """What calls are made of. Calls alike are traced once."""

    def __init__(self, is_known: IsKnown) -> None:
        self._is_known = is_known
        self._table: dict[Any, Any] = {}
        self._traced: dict[str, GraphModule | None] = {}

    def of(self, call: Node) -> GraphModule | None:
        """A graph of known steps; ``None``: there is none."""
        alike = _signature(call)
        if alike not in self._traced:
            self._traced[alike] = self._trace(call)
        return self._traced[alike]

    def _trace(self, call: Node) -> GraphModule | None:
        self._table[call.target] = _parts_of(call.target)
        while True:
            traced = parts_of(call, self._table, pre_dispatch=True)
            if traced is None:
                return None
            called = {
                functional_overload(node.target) or node.target
                for node in traced.graph.nodes
                if node.op == "call_function" and node.all_input_nodes
            }
            # Comparisons are no numbers: no entry of a table says what they become.
            steps = called - COMPARISONS.keys()
            unknown = {target for target in steps if not self._is_known(target)}
            if not unknown:
                return traced
            if not all(map(is_composite, unknown)) or unknown <= self._table.keys():
                return None
            self._table |= {target: _parts_of(target) for target in unknown}


def _signature(call: Node) -> str:
    """All that what a call is made of depends on."""
    sources = call.all_input_nodes
    places = {source: f"input {i}" for i, source in enumerate(sources)}
    args = torch.fx.node.map_arg((call.args, call.kwargs), places.__getitem__)
    layouts = [(t.shape, t.stride()) for t in map(tensor_meta, sources) if t is not None]
    return str((call.target, args, layouts))
