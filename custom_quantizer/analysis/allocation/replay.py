"""The float network on one batch, and once more from where something changes.

All values of a batch are kept, so that a change of one weight or activation costs only the ops
behind it: half the network on average. Observers of the prepared graph mark the places; they pass
on what they are given.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.analysis.rerun import Rerun
from custom_quantizer.core.threads import exclusive

__all__ = ["Change", "Replay"]

Change: TypeAlias = Callable[[Tensor], Tensor]
"""From the float value of a weight or an activation to the one to compute with."""


class Replay(Rerun):
    """One network, run again and again.

    Args:
        prepared: what ``prepare_pt2e`` returns; not changed.

    Attributes:
        calls: ops computed so far.
    """

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self._model = prepared
        self._nodes: list[Node] = list(prepared.graph.nodes)
        self._named = {node.name: node for node in self._nodes}
        self._output = self._nodes[-1]
        self._ops = sum(node.op == "call_function" for node in self._nodes)
        self._kept: dict[Node, Any] = {}
        self.calls = 0

    @property
    def ops(self) -> int:
        """Ops of one forward."""
        return max(self._ops, 1)

    def start(self, values: Sequence[Any]) -> Any:
        """Run a batch and keep all its values.

        Args:
            values: one for each placeholder.

        Returns:
            What the model returns.
        """
        self.env = {}
        self.args_iter = iter(values)
        with exclusive(), torch.no_grad():
            for node in self._nodes:
                self.env[node] = self._run(node)
        self._kept = self.env
        return self._result(self._kept[self._output])

    def changed(self, changes: Mapping[str, Change]) -> Any:
        """What the model returns for the batch with some values changed.

        Args:
            changes: by name of the observer's call that hands on the value.
        """
        fresh: dict[Node, Any] = {}
        self.env = ChainMap(fresh, self._kept)  # type: ignore[assignment]
        with exclusive(), torch.no_grad():
            for node in self._nodes:
                change = changes.get(node.name)
                if change is not None:
                    fresh[node] = change(self._given(node))
                elif any(source in fresh for source in node.all_input_nodes):
                    fresh[node] = self._run(node)
        return self._result(self.env[self._output])

    def value(self, observer: str) -> Tensor:
        """What an observer is given in the batch."""
        node = self._named[observer]
        source = node.args[0]
        assert isinstance(source, Node)
        kept: Tensor = self._kept[source]
        return kept

    def gradients(
        self, values: Sequence[Any], wanted: Sequence[str], weigh: Callable[[Any], list[Tensor]]
    ) -> tuple[Any, list[dict[str, Tensor]]]:
        """Run a batch; derive numbers made of its outputs by observed values.

        Args:
            values: as for :meth:`start`, which need not be called before.
            wanted: names of observers' calls.
            weigh: from what the model returns to the numbers.

        Returns:
            What the model returns; and for each number the derivatives by name, zero where it does
            not depend on the value.
        """
        marks: dict[str, Tensor] = {}
        names = set(wanted)
        self.env = {}
        self.args_iter = iter(values)
        with exclusive(), torch.enable_grad():
            for node in self._nodes:
                if node.name in names:
                    value = self._given(node)
                    marks[node.name] = torch.zeros_like(value, requires_grad=True)
                    self.env[node] = value + marks[node.name]
                else:
                    self.env[node] = self._run(node)
            outputs = self._result(self.env[self._output])
            found = []
            numbers = weigh(outputs)
            for number in numbers:
                last = number is numbers[-1]
                grads = torch.autograd.grad(
                    number, list(marks.values()), retain_graph=not last, allow_unused=True
                )
                found.append(
                    {
                        name: torch.zeros_like(mark) if grad is None else grad
                        for (name, mark), grad in zip(marks.items(), grads, strict=True)
                    }
                )
                # Backward costs twice what forward does.
                self.calls += 2 * self._ops
        self._kept = {node: pytree.tree_map(_detached, value) for node, value in self.env.items()}
        return pytree.tree_map(_detached, outputs), found

    def _run(self, node: Node) -> Any:
        self.calls += node.op == "call_function"
        return self.run_node(node)

    def _given(self, node: Node) -> Tensor:
        source = node.args[0]
        assert isinstance(source, Node)
        value: Tensor = self.env[source]
        return value

    def _result(self, flat: Any) -> Any:
        return self._model.graph.process_outputs(flat)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
