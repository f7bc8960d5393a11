"""Convolutions that quantize at run time stay in the delegate that makes their image.

Each delegate takes and returns images in the model's order. The copy to XNNPACK's order that
ExecuTorch (1.5.1, ``ChannelsLastTaggedReshapePass``) inserts before such a convolution is given to
everybody who reads the image in that delegate
(:mod:`custom_quantizer.backends.xnnpack.passes.run_time`); views that come earlier then read
another order. Which images cross from one delegate to another is known only once ops are shared
out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import Partition

from custom_quantizer.backends.xnnpack.passes.run_time import KEEP_ORDER
from custom_quantizer.core.graph import DEQUANTIZE_DYNAMIC, shape_of

__all__ = ["convolve_where_images_are_made"]

aten = torch.ops.aten


def convolve_where_images_are_made(
    graph: Graph, groups: Sequence[Sequence[Node]], partitions: Iterable[Partition]
) -> None:
    """Move such convolutions, and what is computed for them op by op, into another partition.

    They move only if all they read is made in that one, so no path leaves a partition and comes
    back that did not before.

    Args:
        graph: edge graph.
        groups: nodes that have to be in one delegate.
        partitions: groups that were merged, each a delegate; changed in place.
    """
    belongs = {node: group for group in groups for node in group}
    assigned = {node: partition for partition in partitions for node in partition.nodes}
    for node in graph.nodes:
        if _aten(node) is not aten.convolution.default or node not in assigned:
            continue
        data = node.args[0]
        if _aten(data) is not DEQUANTIZE_DYNAMIC or len(shape_of(data)) != 4:
            continue
        moved, origins = _computed_for(node, belongs, assigned)
        here, homes = assigned[node], {assigned.get(origin) for origin in origins}
        beside = {
            reader
            for value in (*moved, *origins)
            for reader in value.users
            if value is not node and assigned.get(reader) is here and reader not in moved
        }
        home = homes.pop() if len(homes) == 1 else None
        if home is None or home is here or not beside:
            continue
        for part in moved:
            here.remove_node(part)
            home.add_node(part)
            assigned[part] = home


def _computed_for(
    node: Node, belongs: Mapping[Node, Sequence[Node]], assigned: Mapping[Node, Partition]
) -> tuple[dict[Node, None], set[Node]]:
    """What is computed op by op before a convolution in its delegate, and what that is made of."""
    moved: dict[Node, None] = dict.fromkeys(belongs[node])
    origins: set[Node] = set()
    waiting = list(moved)
    while waiting:
        for value in waiting.pop().all_input_nodes:
            if value in moved or value.op == "placeholder":
                continue
            kept = value.target is operator.getitem or _aten(value) in KEEP_ORDER
            if kept and assigned.get(value) is assigned[node]:
                group = dict.fromkeys((value, *belongs.get(value, ())))
                waiting += [part for part in group if part not in moved]
                moved |= group
            else:
                origins.add(value)
    return moved, origins


def _aten(node: Node) -> object:
    """The ATen overload that an edge op stands for."""
    return getattr(node.target, "_op", node.target)
