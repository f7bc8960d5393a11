"""Which groups of nodes become one delegate, from one walk over the graph.

XNNPACK's partitioner finds for every op the nodes that belong to it (its quantize and dequantize
nodes, its constants) and hands these groups to ExecuTorch, which merges what it can. To know
whether two of them can be merged, ExecuTorch (1.5.1, ``GroupBasedPartitioner``) looks at all nodes
of both and at all nodes behind them: its time grows with the square of the graph, with the cube
where there are many delegates, and its tables with the square. Here the same question, about the
same pairs in the same order, is answered from what a walk over the graph has noted.

Nodes can be computed in one go if no path leaves them and comes back. So each group knows which
groups are reached by those who read it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import Partition

__all__ = ["merge_groups"]

Mask = int
"""A set of groups: bit ``i`` is group ``i``."""


class _Group:
    """Groups that are computed in one go.

    Attributes:
        number: of the first of them.
        nodes: of all of them.
        mask: which they are.
        outside: groups that are reached from readers that are in no group.
        readers: by reader in another group, the groups that are reached from it, its own included.
        beyond: all of these groups, and maybe some that were reached once.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.nodes: list[Node] = []
        self.mask: Mask = 1 << number
        self.outside: Mask = 0
        self.readers: dict[Node, Mask] = {}
        self.beyond: Mask = 0

    def merge(self, other: _Group, numbers: dict[Node, int]) -> bool:
        """Take another group in, unless a path leaves both and comes back.

        Args:
            other: which is used up, if it is taken.
            numbers: of groups, by node.

        Returns:
            Whether it was.
        """
        mask = self.mask | other.mask
        if (self.outside | other.outside) & mask:
            return False
        for group in (self, other):
            if group.beyond & mask and any(
                reached & mask and not mask >> numbers[reader] & 1
                for reader, reached in group.readers.items()
            ):
                return False
        for node in other.nodes:
            self.readers.pop(node, None)
        for reader, reached in other.readers.items():
            if not mask >> numbers[reader] & 1:
                self.readers[reader] = reached
                self.beyond |= reached
        self.nodes += other.nodes
        self.mask = mask
        self.outside |= other.outside
        return True


def merge_groups(graph: Graph, groups: Iterable[Iterable[Node]]) -> list[Partition]:
    """What ExecuTorch's ``GroupBasedPartitioner`` proposes for groups, with the same numbers.

    Args:
        graph: of all nodes.
        groups: nodes that have to be in one delegate; no node is in two of them.
    """
    numbers, found = _numbered(graph, groups)
    _note_readers(graph, numbers, found)
    merged: list[_Group] = []
    while found:
        first, *others = found
        found = [other for other in others if not first.merge(other, numbers)]
        merged.append(first)
    partitions = {group.number: Partition(group.number, group.nodes) for group in merged}
    assigned = {node: group.number for group in merged for node in group.nodes}
    _keep_results_together(graph, assigned, partitions)
    return [partition for partition in partitions.values() if partition.size()]


def _numbered(
    graph: Graph, groups: Iterable[Iterable[Node]]
) -> tuple[dict[Node, int], list[_Group]]:
    """Groups in the order of their last nodes, the last group first."""
    members = {node: group for group in map(list, groups) for node in group}
    numbers: dict[Node, int] = {}
    found: list[_Group] = []
    for node in reversed(graph.nodes):
        if node in members and node not in numbers:
            group = _Group(len(found))
            group.nodes = members[node]
            numbers.update(dict.fromkeys(group.nodes, group.number))
            found.append(group)
    return numbers, found


def _note_readers(graph: Graph, numbers: dict[Node, int], groups: list[_Group]) -> None:
    """Note for each group who reads it, and which groups are reached from there."""
    reached: dict[Node, Mask] = {}
    unread = {node: len(node.all_input_nodes) for node in graph.nodes}
    for node in reversed(graph.nodes):
        number = numbers.get(node)
        mask = 0 if number is None else 1 << number
        for user in node.users:
            beyond = reached[user]
            mask |= beyond
            if number is not None and user not in numbers:
                groups[number].outside |= beyond
            elif number is not None and numbers[user] != number:
                groups[number].readers[user] = beyond
                groups[number].beyond |= beyond
            unread[user] -= 1
            if not unread[user]:
                del reached[user]  # of a long graph all of these would be its square
        reached[node] = mask


def _keep_results_together(
    graph: Graph, assigned: dict[Node, int], partitions: dict[int, Partition]
) -> None:
    """Let the results of an op be taken apart where it is computed."""
    moved = {
        user: assigned[node]
        for node in graph.nodes
        if node in assigned and all(user.target is operator.getitem for user in node.users)
        for user in node.users
        if assigned.get(user, assigned[node]) != assigned[node]
    }
    for node, number in moved.items():
        partitions[assigned[node]].remove_node(node)
        partitions[number].add_node(node)
