"""Putting observers into a graph, in time that grows with the graph's length.

torchao's ``prepare`` (0.18) looks for the name of each observer from ``activation_post_process_0``
on, which makes it quadratic in the number of observers: 10,000 ops take minutes. It hands the
observers to the quantizer before it inserts them, in a dict that may be changed; so here they are
inserted, as ``prepare`` does it, and taken out of the dict. The graph is the same, name for name;
only fake quantizers of biases stand directly before what reads them, behind those of input and
weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FROM_NODE_KEY
from torchao.quantization.pt2e.quantizer import EdgeOrNode

from custom_quantizer.training.fake_quantize import BiasFakeQuantize

__all__ = ["insert_observers"]

ANNOTATION_KEY = "quantization_annotation"
"""Where torchao's ``prepare_pt2e`` looks for annotations (``Q_ANNOTATION_KEY``)."""

Observers: TypeAlias = dict[EdgeOrNode, torch.nn.Module]


def insert_observers(model: GraphModule, observers: Observers) -> None:
    """Insert a call of each observer where its edge or node is; ``observers`` is empty afterwards.

    Args:
        model: an annotated graph; changed in place.
        observers: an edge ``(producer, consumer)`` or a node to the module that observes it. One
            module may stand for several; it is then called in several places.
    """
    inserter = _Inserter(model, observers)
    for node in list(model.graph.nodes):
        if node.meta.get(ANNOTATION_KEY) is not None:
            inserter.observe(node)
    observers.clear()


class _Inserter:
    def __init__(self, model: GraphModule, observers: Observers) -> None:
        self._model = model
        self._observers = observers
        self._calls: dict[Node, torch.nn.Module] = {}
        self._names = _free_names(model)
        self._device = _device_of(model)

    def observe(self, node: Node) -> None:
        """Insert the observers of a node's inputs and of its output."""
        node.args = tuple(self._observed(arg, node) for arg in node.args)
        if node in self._observers and isinstance(node.meta.get("val"), torch.Tensor):
            self._observe_output(node)

    def _observed(self, arg: Any, node: Node) -> Any:
        """An argument of ``node`` with an observer behind it where there is one for the edge."""
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._observed(item, node) for item in arg)
        if not isinstance(arg, Node):
            return arg
        origin = arg
        while origin in self._calls:
            origin = origin.all_input_nodes[0]
        observer = self._observers.get((origin, node))
        if observer is None or self._observers.get(origin) is observer:
            return arg
        for user in arg.users:
            if self._calls.get(user) is observer:
                return user
        # A bias is rounded with the scales that input and weight have by then.
        is_bias = isinstance(observer, BiasFakeQuantize)
        return self._insert(arg, observer, before=node if is_bias else None)

    def _observe_output(self, node: Node) -> None:
        call = self._insert(node, self._observers[node])
        if FROM_NODE_KEY in node.meta:
            call.meta[FROM_NODE_KEY] = node.meta[FROM_NODE_KEY]
        for user in list(node.users):
            if user is not call:
                user.replace_input_with(node, call)

    def _insert(self, node: Node, observer: torch.nn.Module, before: Node | None = None) -> Node:
        name = next(self._names)
        if self._device is not None:
            observer.to(self._device)
        setattr(self._model, name, observer)
        graph = self._model.graph
        with graph.inserting_after(node) if before is None else graph.inserting_before(before):
            call = self._model.graph.call_module(name, (node,))
        self._calls[call] = observer
        return call


def _free_names(model: GraphModule) -> Iterator[str]:
    """Names that ``model`` has no attribute of; each is given out once."""
    number = 0
    while True:
        name = f"activation_post_process_{number}"
        if not hasattr(model, name):
            yield name
        number += 1


def _device_of(model: GraphModule) -> torch.device | None:
    """The device of the parameters and buffers; ``None`` if there are none or several."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None
