"""The same float network with other numbers in it, which integers lose less of.

What one layer divides a channel by, the next one multiplies it with. Between them stands nothing,
or what commutes with positive factors: a relu, a maximum over windows. A relu6 does not (it clips
at 6, whatever the factor), and neither does a tensor that others read too, such as one that a
residual connection takes along: such pairs are left alone, with the reason.

References:
    M. Nagel, M. van Baalen, T. Blankevoort, M. Welling. Data-free quantization through weight
    equalization and bias correction. ICCV 2019, sections 4.1 and 4.1.3.
    https://arxiv.org/abs/1906.04721
    G. Xiao et al. SmoothQuant: accurate and efficient post-training quantization for large language
    models. ICML 2023, equation 4. https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.accuracy.layers import Layer
from custom_quantizer.accuracy.streams import values_of
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.core.graph import argument, is_constant
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, symmetric_padding

__all__ = [
    "Smoothed",
    "absorb_bias",
    "equalize",
    "extremes",
    "find_norms",
    "find_pairs",
    "parameters_of_norms",
    "put_attribute",
    "smooth",
]

aten = torch.ops.aten

T = TypeVar("T")

_COMMUTES = frozenset(
    {aten.relu.default, aten.max_pool2d.default, aten.max_pool1d.default, aten.dropout.default}
)
"""Calls that a positive factor of a channel can be taken through, both ways."""

_SWEEPS = 8
"""Rounds over all pairs: a layer in two pairs is changed by both."""

_LARGEST = 2.0**8
"""Largest factor, and its reciprocal the smallest: dead channels have none of their own."""


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but channelwise calls in between.

    Attributes:
        first: makes the channels.
        second: reads them, and is the only one.
        between: calls and observers in between, in order.
    """

    first: Layer
    second: Layer
    between: tuple[Node, ...]

    def observers(self, model: GraphModule) -> Iterator[ActivationObserver]:
        """Of what is between them."""
        return _observers(model, self.between)


def find_pairs(model: GraphModule, layers: Sequence[Layer]) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of a prepared graph, and by the name of a first layer why it is in none."""
    by_node = {layer.node: layer for layer in layers}
    return _sorted((layer.name, _pair(model, layer, by_node)) for layer in layers)


def _sorted(results: Iterable[tuple[str, T | str]]) -> tuple[list[T], dict[str, str]]:
    """What was found, and by name why something was not."""
    found: list[T] = []
    refused: dict[str, str] = {}
    for name, result in results:
        if isinstance(result, str):
            refused[name] = result
        else:
            found.append(result)
    return found, refused


def _pair(model: GraphModule, first: Layer, layers: Mapping[Node, Layer]) -> Pair | str:
    between: list[Node] = []
    node = first.node
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"{len(users)} ops read its output, so its channels cannot be scaled for one"
        (user,) = users
        if user in layers:
            if layers[user].input is not node:
                return f"{user.name} does not read it as an activation"
            break
        observer = user.op == "call_module"
        if not observer and user.target not in _COMMUTES:
            return _why_not(user)
        between.append(user)
        node = user
    pair = Pair(first, layers[user], tuple(between))
    if any(observer.frozen for observer in pair.observers(model)):
        return "the range between it and the next layer was frozen by the caller"
    if first.loses_nothing() or pair.second.loses_nothing():
        return "one of the two layers is a sum or an average"
    return pair


def _why_not(user: Node) -> str:
    if user.op == "output":
        return "its output is the network's"
    if user.target in (aten.hardtanh.default, aten.clamp.default, aten.relu6.default):
        return f"{user.name} clips at a number that a factor would move"
    rule = rule_of(user)
    return f"{user.name} ({rule.family if rule else user.target}) does not commute with factors"


def equalize(pairs: Sequence[Pair]) -> None:
    """Give both layers of each pair the same reach in every channel, sweep by sweep.

    With ``r1`` the reach of the first layer's weights for a channel and ``r2`` that of the second
    one's, the first is divided by ``sqrt(r1 / r2)`` and the second multiplied with it.
    """
    for _ in range(_SWEEPS):
        for pair in pairs:
            r1 = pair.first.reach_of_outputs().double()
            r2 = pair.second.reach_of_inputs().double()
            dead = (r1 == 0) | (r2 == 0)
            factor = torch.where(dead, torch.ones_like(r1), (r1 / r2.clamp_min(1e-30)).sqrt())
            # Powers of two lose nothing: the float network stays what it was, to the last bit.
            factor = torch.exp2(factor.clamp(1 / _LARGEST, _LARGEST).log2().round()).float()
            pair.first.scale_outputs(1 / factor)
            pair.second.scale_inputs(factor)


def absorb_bias(pair: Pair, lowest: Tensor, seen: Tensor) -> str | None:
    """Move what a channel always exceeds from the first layer's bias into the second one's.

    A relu lets through unchanged what is never negative, so ``c`` can be taken away before it and
    ``weight @ c`` added behind it, and the integers between have a smaller range to cover.

    Args:
        pair: the layers.
        lowest: of each channel of the first layer's output, over all data.
        seen: one input of the second layer.

    Returns:
        Why nothing was changed, or ``None``.
    """
    if pair.first.bias is None or pair.second.bias is None:
        return "one of the two layers has no bias"
    second = pair.second
    if second.match.rule is CONV_TRANSPOSE:
        return "the next layer is a transposed convolution, whose borders see less of it"
    if second.match.rule is CONV:
        before, after = symmetric_padding(second.node, list(second.weight.shape[2:]))
        if any(before) or any(after):
            return "the next layer pads with zeros, from which nothing can be taken"
    constant = lowest.clamp_min(0)
    if not bool((constant > 0).any()):
        return "no channel is always above zero"
    axis = -1 if second.match.rule is LINEAR else 1
    shape = [1] * seen.dim()
    shape[axis] = -1
    shifts = second.compute(constant.reshape(shape).expand_as(seen[:1]), second.weight, None)
    with torch.no_grad():
        pair.first.bias.sub_(constant)
        pair.second.bias.add_(second.channel_means([shifts]))
    return None


@dataclass(frozen=True)
class Smoothed:
    """A norm and the linear layers that read it.

    Attributes:
        norm: call of a layer norm.
        layers: all that read its output.
        between: observers.
    """

    norm: Node
    layers: tuple[Layer, ...]
    between: tuple[Node, ...]

    def observers(self, model: GraphModule) -> Iterator[ActivationObserver]:
        """Of what is between them."""
        return _observers(model, self.between)

    def parameters(self, model: GraphModule) -> dict[str, Tensor]:
        """Weight and bias of the norm, by their names."""
        return _parameters(model, self.norm)


def _observers(model: GraphModule, nodes: Sequence[Node]) -> Iterator[ActivationObserver]:
    for node in nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, ActivationObserver):
                yield module


def _parameters(model: GraphModule, norm: Node) -> dict[str, Tensor]:
    nodes = (argument(norm, 2, "weight"), argument(norm, 3, "bias"))
    names = [str(node.target) for node in nodes if isinstance(node, Node) and is_constant(node)]
    return {name: operator.attrgetter(name)(model) for name in names}


def parameters_of_norms(model: GraphModule) -> dict[str, Tensor]:
    """Weights and biases of all layer norms, by their names."""
    norms = [node for node in model.graph.nodes if node.target is aten.layer_norm.default]
    return {name: value for node in norms for name, value in _parameters(model, node).items()}


def find_norms(
    model: GraphModule, layers: Sequence[Layer]
) -> tuple[list[Smoothed], dict[str, str]]:
    """Layer norms before linear layers, and by the name of any other why it is none."""
    by_node = {layer.node: layer for layer in layers}
    norms = (node for node in model.graph.nodes if node.target is aten.layer_norm.default)
    return _sorted((norm.name, _smoothed(model, norm, by_node)) for norm in norms)


def _smoothed(model: GraphModule, norm: Node, layers: Mapping[Node, Layer]) -> Smoothed | str:
    readers: list[Layer] = []
    between: list[Node] = []
    waiting = [norm]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "call_module":
                between.append(user)
                waiting.append(user)
            elif user in layers and layers[user].match.rule is LINEAR:
                readers.append(layers[user])
            else:
                return f"{user.name} reads it too, and is no linear layer with a rounded weight"
    weight = argument(norm, 2, "weight")
    if not isinstance(weight, Node) or not is_constant(weight) or len(weight.users) > 1:
        return "it has no weight of its own to take up the factors"
    result = Smoothed(norm, tuple(readers), tuple(between))
    if any(observer.frozen for observer in result.observers(model)):
        return "the range behind it was frozen by the caller"
    return result if readers else "no layer reads it"


def smooth(model: GraphModule, found: Smoothed, reach: Tensor) -> None:
    """Divide channels behind a norm by ``sqrt(max|x| / max|w|)``; the layers make up for it.

    Args:
        model: the prepared graph.
        found: the norm and its layers.
        reach: largest magnitude of each channel behind the norm, over all data.
    """
    weights = torch.stack([layer.reach_of_inputs() for layer in found.layers]).amax(0).double()
    dead = (weights == 0) | (reach == 0)
    factor = reach.double() ** 0.5 / weights.clamp_min(1e-30) ** 0.5
    factor = torch.where(dead, torch.ones_like(factor), factor).clamp(1 / _LARGEST, _LARGEST)
    factor = torch.exp2(factor.log2().round()).float()
    with torch.no_grad():
        for name, value in found.parameters(model).items():
            put_attribute(model, name, value.detach() / factor)
    for layer in found.layers:
        layer.scale_inputs(factor)


def put_attribute(model: GraphModule, name: str, value: Tensor) -> None:
    """Replace a parameter, rather than write into it: the captured model shares it."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, attribute)
    setattr(owner, attribute, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)


def extremes(
    model: GraphModule, calls: Sequence[list[Any]], nodes: Sequence[Node]
) -> dict[Node, tuple[Tensor, Tensor]]:
    """Smallest and largest value of each channel of float tensors, over all data.

    The channel is the last axis of linear layers and layer norms, axis 1 of others.
    """
    found: dict[Node, tuple[Tensor, Tensor]] = {}
    for node, values in values_of(model, calls, nodes):
        last = rule_of(node) is LINEAR or node.target is aten.layer_norm.default
        lows, highs = zip(
            *(torch.aminmax(y.movedim(-1 if last else 1, 0).flatten(1), dim=1) for y in values),
            strict=True,
        )
        found[node] = (torch.stack(lows).amin(0), torch.stack(highs).amax(0))
    return found
