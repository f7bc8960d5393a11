"""Versions of a network walked through side by side, op by op, over all data at once.

One version is the float model, another what the quantized one will compute. Before a layer runs it
can be changed, knowing what really arrives at it; what follows sees the changed layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.accuracy.layers import Layer
from custom_quantizer.calibration.observers import ActivationObserver, BiasObserver, WeightObserver
from custom_quantizer.core.grid import fake_quantize

__all__ = ["Batches", "Stream", "on_grid", "values_of", "walk"]


class Batches(list[Any]):
    """Values of one node, one for each batch."""


class Stream:
    """One version of a network: what its nodes hold for all batches.

    Args:
        model: the prepared graph.
        calls: one value per placeholder, for each batch.
        rounded: compute what the integers stand for, instead of floats.
        constants: instead of what ``get_attr`` nodes of these names hold.
    """

    def __init__(
        self,
        model: GraphModule,
        calls: Sequence[list[Any]],
        rounded: bool,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._calls = len(calls)
        self._rounded = rounded
        self._constants = constants or {}
        self.values: dict[Node, Any] = {}
        placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            self.values[node] = Batches(call[index] for call in calls)

    def run(self, node: Node) -> None:
        """Compute a node from those before it."""
        if node.op == "get_attr":
            name = str(node.target)
            value = self._constants.get(name)
            self.values[node] = operator.attrgetter(name)(self._model) if value is None else value
        elif node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.op == "call_function":
            self.values[node] = self.mapped(
                lambda args, kwargs: cast(Any, node.target)(*args, **kwargs), node.args, node.kwargs
            )
        elif node.op == "output":
            self.values[node] = self.mapped(lambda args, _: args, node.args[0], {})

    def run_layer(self, layer: Layer) -> None:
        """Compute a layer: rounded as conversion would round it now, or with its float weights."""
        if self._rounded:
            self.run_products(layer)
            self.add_bias(layer)
            return
        weight = self.values[layer.weight_node]
        bias = None if layer.bias_node is None else self.values[layer.bias_node]
        self.values[layer.node] = self.mapped(
            lambda args, _: layer.compute(args[0], weight, bias), (layer.input,), {}
        )

    def run_products(self, layer: Layer) -> None:
        """Compute a rounded layer up to its bias, which :meth:`add_bias` adds."""
        weight = layer.rounded_weight()
        self.values[layer.node] = self.mapped(
            lambda args, _: layer.compute(args[0], weight, None), (layer.input,), {}
        )

    def add_bias(self, layer: Layer) -> None:
        """Add the rounded bias, if there is one, to what :meth:`run_products` computed."""
        bias = layer.rounded_bias()
        if bias is not None:
            added = layer.by_channel(bias)
            self.values[layer.node] = self.mapped(
                lambda args, _: args[0].add_(added), (layer.node,), {}
            )

    def outputs_of(self, layer: Layer, last: int) -> list[Tensor]:
        """Outputs of a rounded layer for the last batches, which nothing is to read."""
        weight, bias = layer.rounded_weight(), layer.rounded_bias()
        return [layer.compute(x, weight, bias) for x in self.batches(layer.input)[-last:]]

    def run_any(self, node: Node, layers: Mapping[Node, Layer]) -> None:
        """Compute a node, which may be a layer."""
        if node in layers:
            self.run_layer(layers[node])
        elif node.op != "placeholder":
            self.run(node)

    def batches(self, node: Node) -> list[Tensor]:
        """The values of a node, one for each batch."""
        held = self.values[node]
        return held if isinstance(held, Batches) else [held] * self._calls

    def mapped(self, call: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
        """The results of ``call`` for each batch; only one if nothing in it varies."""
        sources: list[Node] = []
        torch.fx.node.map_arg((args, kwargs), sources.append)
        if not any(isinstance(self.values[node], Batches) for node in sources):
            return call(*self._bound(args, kwargs, 0))
        return Batches(call(*self._bound(args, kwargs, i)) for i in range(self._calls))

    def _bound(self, args: Any, kwargs: Any, index: int) -> Any:
        def value(n: Node) -> Any:
            held = self.values[n]
            return held[index] if isinstance(held, Batches) else held

        return torch.fx.node.map_arg((args, kwargs), value)

    def _module(self, node: Node) -> Any:
        module = self._model.get_submodule(str(node.target))
        if not isinstance(module, (ActivationObserver, WeightObserver, BiasObserver)):
            return None  # what checks the inputs
        source = cast(Node, node.args[0])
        held = self.values[source]
        if not self._rounded:
            return held
        if isinstance(module, WeightObserver):
            return rounded_weight(self._model, node, module, held)
        if isinstance(module, BiasObserver):
            integers, unit = module.derived(self._model, node, held)
            return integers.to(torch.float32) * unit
        return self.mapped(lambda args, _: on_grid(module, args[0]), node.args, {})


def rounded_weight(
    model: GraphModule, node: Node, observer: WeightObserver, held: Tensor
) -> Tensor:
    """The weight behind an observer as conversion will have it, dequantized."""
    constant = cast(Node, node.args[0]).op == "get_attr"
    scale = observer.final_scale(model, node) if constant else observer.scale(held)
    return observer.dequantized(observer.integers(held, scale), scale)


def on_grid(observer: ActivationObserver, x: Tensor) -> Tensor:
    """``x`` as the integers of an observed activation stand for it."""
    if not x.is_floating_point() or x.numel() == 0:
        return x
    if observer.is_dynamic:
        return observer.round_at_run_time(x)
    return fake_quantize(x, observer.qparams())


def walk(model: GraphModule, streams: Sequence[Stream], layers: Sequence[Layer]) -> Iterator[Layer]:
    """Run all streams through the graph; stop before each layer, so that it can be changed.

    A stream that has not computed the layer when the walk goes on does so then. Values that nobody
    needs any more are dropped.

    Yields:
        Each layer whose inputs all streams have computed.
    """
    of_node = {layer.node: layer for layer in layers}
    last_use = _last_uses(model)
    for node in model.graph.nodes:
        if node in of_node:
            yield of_node[node]
        for stream in streams:
            if node not in stream.values:
                stream.run_any(node, of_node)
        for done in last_use.get(node, ()):
            for stream in streams:
                stream.values.pop(done, None)


def values_of(
    model: GraphModule, calls: Sequence[list[Any]], nodes: Iterable[Node]
) -> Iterator[tuple[Node, list[Tensor]]]:
    """What nodes hold in the float model, one tensor for each batch, in graph order."""
    wanted = set(nodes)
    stream = Stream(model, calls, rounded=False)
    last_use = _last_uses(model)
    for node in model.graph.nodes:
        if node.op != "placeholder":
            stream.run(node)
        if node in wanted:
            yield node, stream.batches(node)
        for done in last_use.get(node, ()):
            stream.values.pop(done, None)


def _last_uses(model: GraphModule) -> dict[Node, list[Node]]:
    """By node, the values that nobody needs after it."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(model.graph.nodes):
        for value in (node, *node.all_input_nodes):
            if value not in seen and value.op != "output":
                seen.add(value)
                last.setdefault(node, []).append(value)
    return last
