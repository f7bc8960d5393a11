"""Training that starts where calibration and ``improve`` ended.

A graph that was prepared for training holds the weights and batch norms of the float model. Here
they become those whose folded form is what another graph of the same model has, with its scales
and ranges: the integers before the first step are the ones that the other graph converts to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.accuracy.layers import Layer, find_layers
from custom_quantizer.calibration.observers import ActivationObserver, BiasObserver
from custom_quantizer.calibration.settling import settle_scales
from custom_quantizer.calibration.statistics import activation_observers
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.graph import ADOPTED_KEY, RESCALED_KEY
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.errors import CalibrationError, TrainingError
from custom_quantizer.ops import PatternMatch, match_of
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.ops.rewrites.training_graph import (
    MODE_NAME,
    folded_value,
    is_foldable_parameter,
    put_folded,
)
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
    BiasFakeQuantize,
    WeightFakeQuantize,
)

__all__ = ["Adoption", "adopt"]


_INSIDE = 0.45
"""How far from its integer a weight may start, in steps, so that folding does not round it anew."""


@dataclass(frozen=True)
class Adoption:
    """What :func:`adopt` took over.

    Attributes:
        layers: names of the calls whose weight, scale and bias are the other graph's.
        ranges: names of the activations whose range is.
        left: why a layer is not, or not all of it, by the name of its call.
        left_ranges: why a range is not, by the name of its activation.
    """

    layers: tuple[str, ...]
    ranges: tuple[str, ...]
    left: Mapping[str, str]
    left_ranges: Mapping[str, str]

    def __str__(self) -> str:
        text = f"adopted {len(self.layers)} layers and {len(self.ranges)} ranges"
        text += "".join(f"; {name}: {reason}" for name, reason in self.left.items())
        reasons = self.left_ranges.items()
        return text + "".join(f"; range of {name}: {reason}" for name, reason in reasons)


def adopt(prepared: GraphModule, improved: GraphModule) -> Adoption:
    """Let training start from what another graph of the same model would convert to.

    Weights, biases and scales become those of ``improved``, in place: what was captured shares its
    parameters with the model, as in all training. Learned scales (``-lsq``) start from the adopted
    ones; other ranges, and weight scales that ``improved`` was supplied with, stay what they are.
    Of a folded batch norm the running mean takes up the bias, so that training with statistics of
    the batch, which finds the mean anew, does not count it twice.

    A weight starts where ``improved`` has it: an improved one in the middle of what rounds to its
    integer. As near to the float weight as the integer allows would be at the edge, where the two
    round differently. These differences make up for each other, and the first steps would take them
    back, many at a time.
    :func:`~custom_quantizer.training.qat.finetune` trains such a graph with defaults of its own.

    Args:
        prepared: what ``prepare_qat_pt2e`` returns, not trained yet.
        improved: the same model, prepared with ``prepare_pt2e`` in the same formats and calibrated;
            usually after :func:`~custom_quantizer.improve`.

    Raises:
        CalibrationError: ``improved`` is not that, or an observer of it saw no data.
        TrainingError: ``prepared`` is not what ``prepare_qat_pt2e`` returns, the two have no layer
            in common, or ``improved`` was rescaled (equalization, bias_absorption, smoothquant), so
            that its batch norms are others than the model's.
    """
    if not isinstance(prepared, GraphModule) or not any(
        isinstance(module, WeightFakeQuantize) for module in prepared.modules()
    ):
        raise TrainingError(
            "there is no fake-quantized weight to start with: pass what prepare_qat_pt2e returns "
            "first, and the improved graph of prepare_pt2e second"
        )
    found = activation_observers(improved)
    if any(isinstance(o.observer, ActivationFakeQuantize) for o in found):
        raise CalibrationError(
            "the second graph is prepared for training, too; pass what prepare_pt2e returns, "
            "calibrated"
        )
    if rescaled := improved.meta.get(RESCALED_KEY, ()):
        raise TrainingError(
            f"the graph was improved by {', '.join(rescaled)}, whose factors a batch norm would "
            "undo in training; improve it without, training finds such factors itself"
        )
    settle_scales(improved)
    sources, left = find_layers(improved)
    calls = {
        original_name(node): match
        for node in prepared.graph.nodes
        if (match := match_of(node)) is not None and match.weight is not None
    }
    pairs = []
    for source in sources:
        match = calls.get(source.name)
        target = None if match is None else _Target(prepared, match)
        reason = "the graph has no such call" if target is None else target.refusal(source)
        if target is None or reason is not None:
            left[source.name] = str(reason)
        else:
            pairs.append((source, target))
    if not pairs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise TrainingError(f"the two graphs have no rounded layer in common: {reasons}")
    ranges, left_ranges = _adopt_ranges(prepared, improved)
    for source, target in pairs:
        if (reason := target.take(source)) is not None:
            left[source.name] = reason
    prepared.meta[ADOPTED_KEY] = True
    layers = tuple(source.name for source, _ in pairs if source.name not in left)
    return Adoption(layers, tuple(ranges), left, left_ranges)


def _adopt_ranges(prepared: GraphModule, improved: GraphModule) -> tuple[list[str], dict[str, str]]:
    known: dict[tuple[str, int, int], set[tuple[float, int]]] = {}
    for observed in activation_observers(improved):
        found = observed.observer.qparams()
        for tensor in observed.tensors:
            key = (tensor, found.quant_min, found.quant_max)
            known.setdefault(key, set()).add((cast(float, found.scale), found.zero_point))
    taken: list[str] = []
    left: dict[str, str] = {}
    for observed in activation_observers(prepared):
        observer = cast(ActivationFakeQuantize, observed.observer)
        low, high = observer.quant_min, observer.quant_max
        there = [known.get((tensor, low, high), set()) for tensor in observed.tensors]
        choices = set[tuple[float, int]]().union(*there)
        if not choices or any(len(ranges) > 1 for ranges in there):
            several = "it is quantized with several ranges there"
            left[observed.name] = several if choices else "it is not quantized to this format there"
            continue
        # Parts of what is joined may have scales of their own there; here all have the join's.
        scale, zero_point = max(choices)
        if observer.scheme.symmetric and zero_point:
            left[observed.name] = "it is symmetric here, and has a zero point there"
            continue
        observer.start_at(QParams(scale, zero_point, low, high))
        taken.append(observed.name)
    return taken, left


class _Target:
    """A layer of a graph to be trained."""

    def __init__(self, model: GraphModule, match: PatternMatch) -> None:
        self.model = model
        self.match = match

    def refusal(self, source: Layer) -> str | None:
        """Why the layer cannot be that of another graph, or ``None``."""
        weight, bias = cast(Node, self.match.weight), self.match.bias
        observer = self._module(weight)
        if not isinstance(observer, WeightFakeQuantize):
            return "its weight is not rounded in training"
        mine, other = observer.scheme, source.observer.scheme
        if (mine.format, mine.granularity, mine.group_size) != (
            other.format,
            other.granularity,
            other.group_size,
        ):
            return (
                f"its weight is {mine.format} {mine.granularity} here and {other.format} "
                f"{other.granularity} there"
            )
        if (bias is None) != (source.bias is None):
            return "only one of the two has a bias"
        if not is_foldable_parameter(cast(Node, weight.args[0])):
            return "its weight is computed in the graph"
        if bias is not None and not is_foldable_parameter(self._bias_parameter()):
            return "its bias is computed in the graph"
        return None

    def take(self, source: Layer) -> str | None:
        """Take over weight, scale and bias; what is different after all, or ``None``."""
        weight = cast(Node, self.match.weight)
        observer = cast(WeightFakeQuantize, self._module(weight))
        parameter = cast(Node, weight.args[0])
        supplied = source.observer.supplied_scale is not None
        scale = source.final_scale()
        integers = source.observer.integers(source.weight, scale).to(torch.float32)
        step = source.observer.dequantized(torch.ones_like(integers), scale)
        steps = (source.weight / step).clamp(integers - _INSIDE, integers + _INSIDE)
        put_folded(self.model, parameter, steps * step)
        observer.set_scale(scale if supplied or observer.learned else None)
        observer.initialized.zero_()
        bias = source.rounded_bias()
        if bias is not None:
            put_folded(self.model, self._bias_parameter(), bias)
        return self._difference(source, scale)

    def _difference(self, source: Layer, scale: Tensor) -> str | None:
        """What of the integers is not the other graph's."""
        weight = cast(Node, self.match.weight)
        observer = cast(WeightFakeQuantize, self._module(weight))
        folded = folded_value(self.model, cast(Node, weight.args[0]))
        wanted = source.observer.integers(source.weight, scale)
        if not torch.equal(observer.integers(folded, scale), wanted):
            return "its folded weight rounds to other integers"
        theirs = source.bias_observer
        mine = None if self.match.bias is None else self._module(self.match.bias)
        if theirs is None or not isinstance(mine, BiasFakeQuantize):
            return None
        given, read = mine.source, cast(ActivationObserver, source.input_observer)
        if given is None or not given.has_range or given.qparams().scale != read.qparams().scale:
            return "its bias is rounded with another input scale"
        spread = expand_channels(scale, self.match)
        folded = folded_value(self.model, self._bias_parameter())
        got, _ = mine.derive(folded, cast(float, given.qparams().scale), spread)
        bias = cast(Tensor, source.bias)
        wanted, _ = theirs.derived(source.model, cast(Node, source.bias_node), bias)
        off = int((got.long() - wanted.long()).abs().max())
        return f"its bias is off by {off} units" if off else None

    def _bias_parameter(self) -> Node:
        bias = cast(Node, self.match.bias)
        return cast(Node, bias.args[0]) if isinstance(self._module(bias), BiasObserver) else bias

    def _module(self, node: Node) -> Any:
        if node.op != "call_module" or node.target == MODE_NAME:
            return None
        return self.model.get_submodule(str(node.target))
