"""What comes behind a node, found when it is asked for.

Before ExecuTorch (1.5.1) merges groups of nodes to delegates, it makes three tables that name for
every node all nodes before or behind it: their size grows with the square of the graph, 4 GB for
2,000 ops. It reads one of them, and that only where there is more than one group. There is no seam,
so the classes that make the tables are exchanged while a graph is partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch.fx import GraphModule, Node
from torch.fx.passes.infra import partitioner

from custom_quantizer.backends.xnnpack.quick_passes import passes_known
from custom_quantizer.core.threads import exclusive

__all__ = ["Dependencies", "dependencies_on_demand"]

_KEPT = 128
"""Most nodes for which the answer is kept: upstream asks for the same few in a row."""


class Dependencies:
    """In the place of upstream's ``_DependencyViewer``: the same answers from the graph's edges."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.downstreams_of = lru_cache(_KEPT)(downstreams_of)


def downstreams_of(node: Node) -> set[Node]:
    """All nodes that a node's value reaches."""
    found: set[Node] = set()
    left = [node]
    while left:
        new = left.pop().users.keys() - found
        found |= new
        left.extend(new)
    return found


@contextmanager
def dependencies_on_demand() -> Iterator[None]:
    """Let graphs be partitioned with :class:`Dependencies`, with the ExecuTorch that was read."""
    if not passes_known():
        yield
        return
    modules: tuple[Any, ...] = (group_partitioner, partitioner)
    with exclusive():
        upstream = [module._DependencyViewer for module in modules]
        try:
            for module in modules:
                module._DependencyViewer = Dependencies
            yield
        finally:
            for module, viewer in zip(modules, upstream, strict=True):
                module._DependencyViewer = viewer
