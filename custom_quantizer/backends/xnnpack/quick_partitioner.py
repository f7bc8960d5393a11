"""Telling ExecuTorch which ops to leave whole, without tracing the graph twice more.

``to_edge_transform_and_lower`` (1.5.1) asks a partitioner which ops it wants whole, and for which
of their calls. To honour the second part it traces the graph two times more. Where the partitioner
takes every call of these ops, which is the rule, the second part says nothing, and leaving it out
gives the same program in about four fifths of the time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import (
    IS_IMPLICIT_Q_DQ_TAG,
    is_dequant,
    is_tagged_as_implicit_q_dq,
)
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.infra.partitioner import Partition

from custom_quantizer.backends.xnnpack.crossing import convolve_where_images_are_made
from custom_quantizer.backends.xnnpack.partition_merging import merge_groups
from custom_quantizer.backends.xnnpack.signature import remember_constants

__all__ = ["QuickPartitioner"]


class _WithoutCode(_LazyGraphModule):
    """A graph for which no Python code is written until it is called.

    ExecuTorch cuts one delegate after the other out of a partitioned graph, and each time code
    would be written for what is left and for all delegates before: half of the time of a graph
    with a hundred of them.
    """

    def __str__(self) -> str:
        """Without code, which a message that nobody sees (``logging.debug(f"...")``) asks for."""
        return f"graph of {len(self.graph.nodes)} nodes"


class QuickPartitioner(XnnpackPartitioner):  # type: ignore[misc]  # ExecuTorch is untyped
    """``XnnpackPartitioner``, without the filter of ops to leave whole where it keeps all."""

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """Ops to leave whole, and a filter for their calls where it would drop any.

        Upstream asks once more when delegates are made, with edge ops, whether one was left over.
        What control flow runs is outside the delegate, so nothing stays whole there.
        """
        ops, upstream = super().ops_to_not_decompose(ep)
        inner = [m.graph for m in ep.graph_module.modules() if isinstance(m, GraphModule)]
        inner.remove(ep.graph)

        def accepts(node: Node) -> bool:
            return node.graph not in inner and bool(upstream(node))

        nodes = [node for graph in (ep.graph, *inner) for node in graph.nodes]
        targets = {node: _aten_op(node.target) for node in nodes}
        calls = [node for node, target in targets.items() if target in ops]
        signature = ep.graph_signature  # of the caller's own program, in upstream's lowering call
        remember_constants(ep)
        try:
            product = torch.ops.aten.matmul.default
            if any(targets[call] is product and accepts(call) for call in calls):
                return ops, accepts  # other ops are decomposed to products that are not to stay
            ops = [op for op in ops if op is not product]
            calls = [call for call in calls if targets[call] is not product]
            keep = None if all(accepts(call) for call in calls) else accepts
        finally:
            ep._graph_signature = signature
        return ops, keep

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Choose what XNNPACK computes; upstream hands in a copy, which becomes the result."""
        remember_constants(exported_program)
        result = super().partition(exported_program)
        tagged = result.tagged_exported_program
        tagged._graph_module = _WithoutCode(tagged.graph_module, tagged.graph)
        return result

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Merge the groups of nodes that belong to one op each."""
        groups = self.get_matched_nodes_from_configs(ep)
        _untag_refused(groups)
        groups = _without_second_outputs(groups)
        partitions = merge_groups(ep.graph, groups)
        convolve_where_images_are_made(ep.graph, groups, partitions)
        return partitions

    def _check_if_called_from_to_backend(self) -> bool:
        """Whether ops were decomposed that the delegate wants whole: whoever lowers has asked.

        Upstream looks on the stack for the name of the function that does so.
        """
        return False


def _aten_op(target: Any) -> Any:
    return target._op if isinstance(target, EdgeOpOverload) else target


_CLONES = frozenset(
    {exir_ops.edge.aten.clone.default, exir_ops.edge.dim_order_ops._clone_dim_order.default}
)


def _without_second_outputs(groups: Sequence[list[Node]]) -> list[list[Node]]:
    """Leave copies outside that would be a second output of a delegate for one of its values.

    Such as what a model returns of a buffer that it has just written. Upstream takes the copy out
    of the delegate's graph, and fails on what is left: one node that is two outputs.
    """
    inside = set(chain.from_iterable(groups))
    values: defaultdict[Node, list[Node]] = defaultdict(list)
    for node in chain.from_iterable(groups):
        value = node
        while value.target in _CLONES and value.all_input_nodes[0] in inside:
            value = value.all_input_nodes[0]
        if any(user not in inside for user in node.users):
            values[value].append(node)
    second: set[Node] = set()
    for names in values.values():
        first = next((node for node in names if node.target not in _CLONES), names[0])
        second.update(node for node in names if node is not first)
    return [group for group in groups if second.isdisjoint(group)]


def _untag_refused(groups: Iterable[Iterable[Node]]) -> None:
    """Let quantize and dequantize nodes be computed whose product is in no delegate.

    Upstream marks them as part of the product, which the delegate's serializer then leaves out,
    before it decides against the product: values that others read would not be written.
    """
    for group in map(set, groups):
        for node in group:
            partners = node.users if is_dequant(node) else node.all_input_nodes
            if is_tagged_as_implicit_q_dq(node) and group.isdisjoint(partners):
                del node.meta[IS_IMPLICIT_Q_DQ_TAG]
