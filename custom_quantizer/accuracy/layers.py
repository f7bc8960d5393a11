"""Convolutions and linear layers of a prepared graph as matrices.

Every layer computes ``rows @ patches + bias`` in each of its groups: ``rows`` is its weight as
``(groups, outputs, inputs)``, ``patches`` are the inputs that meet it, ``(groups, inputs,
positions)``. For a convolution these are the columns of im2col; a transposed convolution is one of
stride 1 over its input with zeros in between, with the kernel turned around.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.channel_factors import ChannelFactors
from custom_quantizer.calibration.observers import ActivationObserver, BiasObserver, WeightObserver
from custom_quantizer.core.graph import argument, describe, is_constant
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.ops import PatternMatch, rule_of
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR, per_dim, symmetric_padding
from custom_quantizer.ops.rewrites.batch_norms import scale_channels

__all__ = ["Layer", "find_layers"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight is rounded.

    Attributes:
        model: the prepared graph.
        match: the call, its arguments sorted by role.
        weight_node: call of the weight's observer.
        observer: of the weight.
        bias_node: call of the bias's observer, or what reads a bias that stays in float; ``None``
            without a bias.
        input_observer: of the activation that it reads; ``None`` where that is in float.
    """

    model: GraphModule
    match: PatternMatch
    weight_node: Node
    observer: WeightObserver
    bias_node: Node | None
    input_observer: ActivationObserver | None

    @property
    def node(self) -> Node:
        """The call."""
        return self.match.node

    @property
    def name(self) -> str:
        """Name of the captured call, as plans and reports have it."""
        return original_name(self.node)

    @property
    def where(self) -> str:
        """Name and module path, for messages."""
        return describe(self.node)

    @property
    def input(self) -> Node:
        """The activation."""
        return self.match.inputs[0]

    @property
    def groups(self) -> int:
        """Channel groups; 1 for linear layers."""
        return self.match.groups

    @property
    def bias_observer(self) -> BiasObserver | None:
        """Of the derived bias; ``None`` where there is no bias, or one in float."""
        node = self.bias_node
        module = _module(self.model, node) if node is not None else None
        return module if isinstance(module, BiasObserver) else None

    # -- parameters -------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight itself, to be read or written in place."""
        return cast(Tensor, _attribute(self.model, _constant(self.weight_node)))

    @property
    def bias(self) -> Tensor | None:
        """The bias itself, ``(out_channels,)``; ``None`` without one."""
        if self.bias_node is None:
            return None
        return cast(Tensor, _attribute(self.model, _constant(self.bias_node)))

    def final_scale(self) -> Tensor:
        """The weight's scale as conversion will have it, raised where a bias needs it."""
        return self.observer.final_scale(self.model, self.weight_node)

    def rounded_weight(self) -> Tensor:
        """The weight as conversion will have it, dequantized, float32."""
        scale = self.final_scale()
        return self.observer.dequantized(self.observer.integers(self.weight, scale), scale)

    def rounded_bias(self) -> Tensor | None:
        """The bias as conversion will have it, dequantized; as it is where it stays in float."""
        bias, observer = self.bias, self.bias_observer
        if bias is None or observer is None:
            return None if bias is None else bias.detach()
        integers, unit = observer.derived(self.model, cast(Node, self.bias_node), bias)
        return integers.to(torch.float32) * unit

    def constants(self) -> dict[str, Tensor]:
        """Weight and bias by their names in the graph."""
        nodes = [self.weight_node, *([] if self.bias_node is None else [self.bias_node])]
        names = [str(_constant(node).target) for node in nodes]
        return {name: operator.attrgetter(name)(self.model) for name in names}

    def float_constants(self) -> dict[str, Tensor]:
        """As :meth:`constants`, of the float model: what they were before they were improved."""
        kept = self.observer.float_constants
        return self.constants() if kept is None else kept

    @property
    def was_improved(self) -> bool:
        """Whether weight or bias are not those of the float model any more."""
        kept = self.float_constants()
        return any(not torch.equal(value, kept[name]) for name, value in self.constants().items())

    def take_copies(self) -> None:
        """Give the graph a weight and a bias of its own: a captured model shares them with it."""
        for name, value in self.constants().items():
            path, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(path)
            copied = value.detach().clone()
            if isinstance(value, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=value.requires_grad)
            setattr(owner, attribute, copied)

    def scale_outputs(self, factor: Tensor) -> None:
        """Multiply each output channel, bias included, by its factor ``(out_channels,)``."""
        match = self.match
        wide = factor.to(torch.float64)
        scaled = scale_channels(self.weight.double(), wide, match.weight_axis, match.groups)
        with torch.no_grad():
            self.weight.copy_(scaled)
            if self.bias is not None:
                self.bias.mul_(factor)

    def scale_inputs(self, factor: Tensor) -> None:
        """Multiply the weight by the factor of the input channel, ``(in_channels,)``."""
        weight = self.weight.detach().double()
        tail = [1] * max(weight.dim() - 2, 0)
        if self.match.rule is CONV_TRANSPOSE:
            spread = factor.reshape(-1, 1, *tail)
        else:
            spread = factor.reshape(self.groups, 1, -1, *tail)
            spread = spread.expand(-1, len(weight) // self.groups, -1, *tail).flatten(0, 1)
        with torch.no_grad():
            self.weight.copy_(weight * spread.double())

    def reach_of_outputs(self) -> Tensor:
        """Largest magnitude of the weights of each output channel, ``(out_channels,)``."""
        return self.to_rows(self.weight.detach()).abs().amax(2).flatten()

    def reach_of_inputs(self) -> Tensor:
        """Largest magnitude of the weights of each input channel, ``(in_channels,)``."""
        kernel = self.weight[0, 0].numel() if self.weight.dim() > 2 else 1
        rows = self.to_rows(self.weight.detach()).abs().amax(1)
        return rows.reshape(self.groups, -1, kernel).amax(2).flatten()

    def state(self) -> dict[str, Tensor]:
        """Copies of ``weight``, ``bias`` and supplied ``scale``, as far as there are any."""
        held = {"weight": self.weight, "bias": self.bias, "scale": self.observer.supplied_scale}
        return {key: v.detach().clone() for key, v in held.items() if v is not None}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take on what :meth:`state` returned."""
        scale = state.get("scale")
        self.observer.set_scale(None if scale is None else scale.to(self.weight.device))
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            if self.bias is not None:
                self.bias.copy_(state["bias"])

    def loses_nothing(self) -> bool:
        """Whether rounding to nearest keeps the weight: beside zeros it has one magnitude a scale.

        So have averages, sums and patches that were written as convolutions.
        """
        magnitudes = self.to_rows(self.weight.detach()).abs()
        scale = self.observer.largest_scale(self.weight) * self.observer.scheme.format.quant_max
        largest = self.scale_of_rows(scale).expand_as(magnitudes)
        # The scale is a quotient, rounded: its multiple is the magnitude up to that.
        q = (magnitudes / largest * 2.0**20).round()
        return bool(((q == 0) | (q == 2.0**20)).all())

    # -- as matrices ------------------------------------------------------------------------------

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another input, weight and bias."""
        args = [x, ChannelFactors.of(weight), bias, *self.node.args[3:]]
        kwargs = {k: v for k, v in self.node.kwargs.items() if k not in ("weight", "bias")}
        if len(self.node.args) < 3 and bias is None:
            args = args[:2]
        return cast(Tensor, cast(Any, self.node.target)(*args, **kwargs))

    def to_rows(self, weight: Tensor) -> Tensor:
        """``(groups, outputs per group, inputs)`` of a tensor in the weight's layout."""
        if self.match.rule is CONV_TRANSPOSE:
            split = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
            return split.flip(tuple(range(3, split.dim()))).flatten(2)
        return weight.reshape(self.groups, len(weight) // self.groups, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The opposite of :meth:`to_rows`."""
        shape = self.weight.shape
        if self.match.rule is CONV_TRANSPOSE:
            split = rows.reshape(*rows.shape[:2], shape[0] // self.groups, *shape[2:])
            return split.flip(tuple(range(3, split.dim()))).transpose(1, 2).reshape(shape)
        return rows.reshape(shape)

    def scale_of_rows(self, scale: Tensor) -> Tensor:
        """A scale of the weight, in a shape that multiplies rows.

        Args:
            scale: as the observer has it.

        Returns:
            ``(1 or groups, 1 or outputs, 1 or inputs)``.
        """
        group_size = self.observer.scheme.group_size
        if group_size is not None:
            return scale.repeat_interleave(group_size, dim=1).unsqueeze(0)
        if scale.dim() == 0:
            return scale.reshape(1, 1, 1)
        groups = 1 if self.match.rule is CONV_TRANSPOSE else self.groups
        return scale.reshape(groups, -1, 1)

    def sum_by_scale(self, values: Tensor) -> Tensor:
        """Sums over the rows that share a scale: ``(n, groups, outputs)`` to ``(n, *scale)``."""
        if self.observer.scheme.group_size is not None:
            sizes = self.weight.shape[1] // self.observer.scheme.group_size
            return values[:, 0].unsqueeze(2).expand(-1, -1, sizes)
        if self.observer.scheme.granularity == "per_tensor":
            return values.flatten(1).sum(1)
        return values.sum(1) if self.match.rule is CONV_TRANSPOSE else values.flatten(1)

    def fitting_scale(self, scale: Tensor) -> Tensor:
        """``scale`` as a caller may supply it, raised where the bias needs it."""
        if self.observer.scheme.group_size is not None:
            return scale.to(torch.bfloat16).to(torch.float32)
        return self.observer.raised(self.model, self.weight_node, scale)

    def channel_means(self, outputs: Sequence[Tensor]) -> Tensor:
        """Mean of each output channel over all batches, float64."""
        axis = self._channel_axis
        total, count = torch.zeros((), dtype=torch.float64), 0
        for y in outputs:
            flat = y.movedim(axis, 0).flatten(1)
            total = total.to(flat.device) + flat.sum(1, dtype=torch.float64)
            count += flat.shape[1]
        return total / count

    def by_channel(self, values: Tensor) -> Tensor:
        """``(out_channels,)`` in a shape that is added to outputs."""
        return values.reshape(-1, *[1] * (0 if self._channel_axis < 0 else self.weight.dim() - 2))

    @property
    def _channel_axis(self) -> int:
        """Of the outputs."""
        return -1 if self.match.rule is LINEAR else 1

    def takes_samples(self, x: Tensor) -> bool:
        """Whether the first dimension of an input is one of samples: not in one image alone."""
        return x.dim() > 1 if self.match.rule is LINEAR else x.dim() == self.weight.dim()

    def patches(self, x: Tensor, places: Callable[[int], Tensor | None] | None = None) -> Tensor:
        """What meets the weight: ``(groups, inputs, positions)``.

        Args:
            x: an input of the layer.
            places: chooses positions, given how many there are: their indices, or ``None`` for all.
        """
        if self.match.rule is LINEAR:
            rows = x.reshape(-1, x.shape[-1])
            chosen = places(len(rows)) if places is not None else None
            return (rows if chosen is None else rows[chosen.to(x.device)]).T.unsqueeze(0)
        windows = self._windows(x)
        length, height, width = windows.shape[:3]
        chosen = places(length * height * width) if places is not None else None
        if chosen is not None:
            chosen = chosen.to(x.device)
            row = chosen.div(width, rounding_mode="floor")
            windows = windows[row.div(height, rounding_mode="floor"), row % height, chosen % width]
        return windows.reshape(-1, self.groups, self.weight_inputs).permute(1, 2, 0)

    @property
    def weight_inputs(self) -> int:
        """Inputs that an output of a group is a sum over."""
        return self.to_rows(self.weight.detach()).shape[2]

    def _windows(self, x: Tensor) -> Tensor:
        """Views of what a convolution's kernel sees: ``(N, height, width, channels, *kernel)``."""
        x, kernel, stride, dilation = self._as_convolution(x)
        samples, channels, *sizes = x.shape
        out = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        by_sample, by_channel, *by_dim = x.stride()
        moved = [b * s for b, s in zip(by_dim, stride, strict=True)]
        spread = [b * d for b, d in zip(by_dim, dilation, strict=True)]
        return x.as_strided(
            (samples, *out, channels, *kernel), (by_sample, *moved, by_channel, *spread)
        )

    def _as_convolution(self, x: Tensor) -> tuple[Tensor, list[int], list[int], list[int]]:
        """``(padded input, kernel, stride, dilation)`` of a convolution in two dimensions."""
        node, shape = self.node, self.weight.shape
        dims = len(shape) - 2
        kernel = list(shape[2:])
        stride = per_dim(argument(node, 3, "stride", 1), dims)
        if self.match.rule is CONV:
            dilation = per_dim(argument(node, 5, "dilation", 1), dims)
            before, after = symmetric_padding(node, kernel)
        else:
            dilation = per_dim(argument(node, 7, "dilation", 1), dims)
            padding = per_dim(argument(node, 4, "padding", 0), dims)
            extra = per_dim(argument(node, 5, "output_padding", 0), dims)
            x = _with_zeros_between(x, stride)
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before = [r - p for r, p in zip(reach, padding, strict=True)]
            after = [b + e for b, e in zip(before, extra, strict=True)]
            stride = [1] * dims
        pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        x = F.pad(x, pads)
        if dims == 1:
            return x.unsqueeze(2), [1, *kernel], [1, *stride], [1, *dilation]
        return x, kernel, stride, dilation


def _with_zeros_between(x: Tensor, stride: list[int]) -> Tensor:
    """``x`` with ``stride - 1`` zeros between its values in each spatial dimension."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    places = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    wide[places] = x
    return wide


def find_layers(prepared: GraphModule) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose weights are rounded, in graph order, and why others are left as they are.

    Returns:
        Layers, and by the name of a call with a weight the reason why it is none.
    """
    layers: list[Layer] = []
    refused: dict[str, str] = {}
    uses = _uses(prepared)
    for node in prepared.graph.nodes:
        rule = rule_of(node)
        if rule not in (CONV, CONV_TRANSPOSE, LINEAR) or rule is None:
            continue
        match = rule.match(rule, node)
        if isinstance(match, str):
            refused[original_name(node)] = match
            continue
        found = _layer(prepared, match, uses)
        if isinstance(found, str):
            refused[original_name(node)] = found
        else:
            layers.append(found)
    return layers, refused


def _layer(model: GraphModule, match: PatternMatch, uses: Mapping[int, int]) -> Layer | str:
    """The layer of a call, or why it is none; ``uses`` as :func:`_uses` counts them."""
    weight = cast(Node, match.weight)
    observer = _module(model, weight)
    if not isinstance(observer, WeightObserver):
        return "it stays in float"
    if not is_constant(weight.args[0]) or cast(Node, weight.args[0]).op != "get_attr":
        return "its weight is computed in the graph"
    if uses[_memory(model, _constant(weight))] > 1:
        return "its weight is used more than once, so one layer cannot have it changed"
    bias = match.bias
    if bias is not None:
        source = (
            cast(Node, bias.args[0]) if isinstance(_module(model, bias), BiasObserver) else bias
        )
        if source.op != "get_attr":
            return "its bias is computed in the graph"
        if uses[_memory(model, source)] > 1:
            return "its bias is used more than once, so one layer cannot have it changed"
    given = _module(model, match.inputs[0])
    return Layer(
        model,
        match,
        weight,
        observer,
        bias,
        given if isinstance(given, ActivationObserver) else None,
    )


def _uses(model: GraphModule) -> Counter[int]:
    """By its memory, how often each constant is used, under whatever names."""
    uses = Counter[int]()
    for node in model.graph.nodes:
        if node.op == "get_attr":
            memory = _memory(model, node)
            for user in node.users:
                uses[memory] += len(user.users) if _module(model, user) is not None else 1
    return uses


def _memory(model: GraphModule, node: Node) -> int:
    """Where the constant is that a node reads; of one without memory, which object it is."""
    value = _attribute(model, node)
    held = isinstance(value, Tensor) and value.numel()
    return int(value.data_ptr()) if held else id(value)


def _constant(node: Node) -> Node:
    """The node that reads the constant behind an observer, or is it."""
    return node if node.op == "get_attr" else cast(Node, node.args[0])


def _attribute(model: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(model)


def _module(model: GraphModule, node: Node | None) -> Any:
    return (
        model.get_submodule(str(node.target))
        if node is not None and node.op == "call_module"
        else None
    )
