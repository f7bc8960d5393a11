"""Learned rounding: which of its two neighbours each weight is rounded to, found by gradients.

A weight between the integers ``n`` and ``n + 1`` becomes ``n + h(v)``, ``h`` a sigmoid stretched
beyond 0 and 1 and clipped; a penalty that grows while it runs drives ``h`` to 0 or 1. What is made
small is the squared error of the output of one layer (AdaRound) or of a whole block, a part of the
network that one tensor enters and one tensor leaves, with its activations rounded (BRECQ). Half of
these are left in float at random in each step, so that the block does not learn one pattern of
rounding by heart (QDrop).

It starts from the integers that the layers have, and they stay where it finds no better ones.

References:
    M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort. Up or down? Adaptive rounding
    for post-training quantization. ICML 2020. https://arxiv.org/abs/2004.10568
    Y. Li et al. BRECQ: pushing the limit of post-training quantization by block reconstruction.
    ICLR 2021. https://arxiv.org/abs/2102.05426
    X. Wei et al. QDrop: randomly dropping quantization for extremely low-bit post-training
    quantization. ICLR 2022. https://arxiv.org/abs/2203.05740
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.accuracy.compensation import correct_bias, fitted_rows, set_integers
from custom_quantizer.accuracy.layers import Layer
from custom_quantizer.accuracy.rounding import Moments, output_error
from custom_quantizer.accuracy.streams import Stream, on_grid
from custom_quantizer.calibration.observers import ActivationObserver

__all__ = [
    "EXACT",
    "Block",
    "correct_biases",
    "find_blocks",
    "learn_block",
    "learn_layer",
    "walk_blocks",
]

_LOW, _HIGH = -0.1, 1.1
"""Ends of the stretched sigmoid."""

_WAY = 20.0
"""How far Adam can move a parameter in all steps together; its learning rate follows from that."""

_PENALTY = 5.0
"""Weight of the penalty beside an error that starts at 1. With 1, every seventh weight was still
between two integers in the end."""

_BLOCK_PENALTY = 0.01
"""The same for each weight of a layer in a block, if that is more, as published. A step there sees
one batch, and the noise of its gradients does not shrink with the share that a weight has of the
error: with 5 for all, every fifth of 9,216 weights was still between two integers, and settling
them made the block worse than it had been."""

_JUDGED_ON = 8
"""One in so many batches says whether a block became better, and is not learned from."""

_WARM_UP = 0.2
_SHARPNESS = (20.0, 2.0)
"""Exponent of the penalty, at the end of the warm-up and at the end."""

_INSIDE = 0.49
"""How far from its integer a weight may start, in steps."""

EXACT = "its weight is exact when rounded to nearest"
_NOTHING_BETTER = "no better integers were found"


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the graph that one activation enters and one leaves.

    Attributes:
        source: the activation that enters.
        target: the one that leaves.
        nodes: the calls in between, and the target, in graph order.
        layers: of these, those whose weights are rounded.
    """

    source: Node
    target: Node
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]


def find_blocks(model: GraphModule, layers: Sequence[Layer]) -> list[Block]:
    """Cut a graph wherever only one activation is alive, and no more often than once a layer.

    Calls before the first activation that layers depend on belong to no block.
    """
    by_node = {layer.node: layer for layer in layers}
    order = list(model.graph.nodes)
    places = {node: place for place, node in enumerate(order)}
    last = {node: max((places[u] for u in node.users), default=-1) for node in order}
    varies: set[Node] = set()
    alive: set[Node] = set()
    blocks: list[Block] = []
    source: Node | None = None
    nodes: list[Node] = []
    for place, node in enumerate(order):
        if node.op == "output":
            break
        if node.op == "placeholder" or any(n in varies for n in node.all_input_nodes):
            varies.add(node)
            alive.add(node)
            nodes.append(node)
        alive = {n for n in alive if last[n] > place}
        if alive != {node}:
            continue
        inside = tuple(by_node[n] for n in nodes if n in by_node)
        if source is not None and inside:
            blocks.append(Block(source, node, tuple(nodes), inside))
        elif blocks and source is not None:  # what follows a layer, up to the next one
            previous = blocks.pop()
            joined = (*previous.nodes, *nodes)
            blocks.append(Block(previous.source, node, joined, previous.layers))
        source, nodes = node, []
    inside = tuple(by_node[n] for n in nodes if n in by_node)
    if source is not None and inside:
        blocks.append(Block(source, nodes[-1], tuple(nodes), inside))
    return blocks


def walk_blocks(
    model: GraphModule, streams: tuple[Stream, Stream], layers: Sequence[Layer]
) -> Iterator[Block]:
    """Run the float and the rounded version; stop before each block, so that it can be changed.

    The first version has run through the block then. Of the second one the caller runs it.
    """
    floating = streams[0]
    by_node = {layer.node: layer for layer in layers}
    blocks = {block.nodes[0]: block for block in find_blocks(model, layers)}
    inside = {node for block in blocks.values() for node in block.nodes}
    for node in model.graph.nodes:  # constants stand anywhere in the graph
        if node.op != "output" and node not in inside:
            for stream in streams:
                if node not in stream.values:
                    stream.run_any(node, by_node)
    for block in blocks.values():
        for node in block.nodes:
            floating.run_any(node, by_node)
        yield block
        for node in (block.source, *block.nodes):
            if node is not block.target:
                for stream in streams:
                    stream.values.pop(node, None)


class _SoftWeight:
    """A weight of a layer whose rounding is being learned."""

    def __init__(self, layer: Layer, floating: Tensor) -> None:
        self.layer = layer
        self.scale = layer.final_scale()
        fmt = layer.observer.scheme.format
        self.limits = fmt.quant_min, fmt.quant_max
        integers = layer.observer.integers(layer.weight, self.scale).to(torch.float32)
        step = layer.observer.dequantized(torch.ones_like(integers), self.scale)
        # The float weight says which neighbour is next, as far as it rounds to the same integer.
        start = (floating / step).clamp(integers - _INSIDE, integers + _INSIDE)
        self.step = step
        self.lower = start.floor().clamp(fmt.quant_min, fmt.quant_max - 1)
        share = ((start - self.lower).clamp(0.01, 0.99) - _LOW) / (_HIGH - _LOW)
        self.logit = torch.logit(share).requires_grad_()

    def raised(self) -> Tensor:
        """How much of a step each weight is above its lower neighbour, 0 to 1."""
        return (torch.sigmoid(self.logit) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self) -> Tensor:
        """The weight as it is now."""
        return (self.lower + self.raised()) * self.step

    def penalty(self, sharpness: float) -> Tensor:
        """Mean distance of the shares from 0 and 1."""
        return (1 - (2 * self.raised() - 1).abs().pow(sharpness)).mean()

    def settle(self) -> None:
        """Give the layer the integers."""
        integers = (self.lower + (self.raised() >= 0.5)).clamp(*self.limits)
        set_integers(self.layer, integers.to(torch.float32), self.scale)


def learn_layer(
    layer: Layer, moments: Moments, weight: Tensor, iterations: int, *, centered: bool
) -> str | None:
    """Learn the rounding of one layer: AdaRound.

    The squared error of its outputs is a quadratic form of the weight, with the moments of its
    inputs as coefficients. So a step costs a product of matrices and is one on all data, instead of
    running some of them through the layer. (Published, the activation function behind the layer is
    in the error, too.)

    Args:
        layer: the layer; its weight is changed.
        moments: of its inputs.
        weight: of the float model.
        iterations: steps.
        centered: see :func:`~custom_quantizer.accuracy.compensation.fitted_rows`.

    Returns:
        Why nothing was changed, or ``None``.
    """
    rows, square = fitted_rows(layer, moments, weight, centered=centered)
    rows, square = rows.to(torch.float32), square.to(torch.float32)

    def error(made: Tensor) -> Tensor:
        return output_error(rows, layer.to_rows(made), square).sum()

    before, state = float(error(layer.rounded_weight())), layer.state()
    if before == 0:
        return "its outputs are exact"
    soft = _SoftWeight(layer, weight)

    def loss() -> Tensor:
        # Twice the error, with the error's gradient: one product of matrices instead of three.
        missed = rows - layer.to_rows(soft.weight())
        return 2 * ((missed.detach() @ square) * missed).sum() / before

    _learn([soft], loss, iterations, lambda _: _PENALTY)
    if float(error(layer.rounded_weight())) < before:
        return None
    layer.load(state)
    return _NOTHING_BETTER


def learn_block(
    model: GraphModule,
    block: Block,
    floating: Stream,
    rounded: Stream,
    batches: int,
    iterations: int,
    generator: torch.Generator,
    drop: float = 0.5,
    *,
    corrects: bool,
) -> str | None:
    """Learn the rounding of the layers of a block.

    Args:
        model: the prepared graph.
        block: the part; its layers are changed.
        floating: holds the target, what the layers compute, and the float weights.
        rounded: holds the source.
        batches: use that many, the first ones; the last eighth of them judges.
        iterations: steps.
        generator: chooses samples, on the CPU.
        drop: share of roundings of activations that are left out in a step.
        corrects: the biases that were corrected for the integers before are corrected for these.

    Returns:
        Why nothing was changed, or ``None``.
    """
    sources = rounded.batches(block.source)[:batches]
    targets = floating.batches(block.target)[:batches]
    learned = batches - batches // _JUDGED_ON

    def judged() -> float:
        judges = slice(learned if learned < batches else 0, None)
        return _loss(_Forward(model, block, rounded), sources[judges], targets[judges])

    run, better_than = _Forward(model, block, rounded), judged()
    before = _loss(run, sources[:learned], targets[:learned])
    if before == 0:
        return "its outputs are exact"
    states = [layer.state() for layer in block.layers]
    weights = {
        layer.node: _SoftWeight(layer, floating.values[layer.weight_node].detach())
        for layer in block.layers
        if not layer.loses_nothing()
    }
    if not weights:
        return EXACT

    def loss() -> Tensor:
        chosen = int(torch.randint(learned, (1,), generator=generator))
        soft = {node: weight.weight() for node, weight in weights.items()}
        y = run(sources[chosen], soft, drop, generator)
        return (y - targets[chosen]).square().mean() / before

    _learn(
        list(weights.values()),
        loss,
        iterations,
        lambda weight: max(_PENALTY, _BLOCK_PENALTY * weight.logit.numel()),
    )
    if corrects:
        correct_biases(block, floating, rounded, batches)
    if judged() < better_than:
        return None
    for layer, state in zip(block.layers, states, strict=True):
        layer.load(state)
    return _NOTHING_BETTER


def correct_biases(block: Block, floating: Stream, rounded: Stream, batches: int) -> None:
    """Make up for the mean errors of the layers of a block, one after the other.

    Args:
        block: the part; the biases of its layers are changed.
        floating: holds what its nodes compute.
        rounded: holds the source, and is run through the block.
        batches: use that many, the first ones.
    """
    layers = {layer.node: layer for layer in block.layers}
    for node in block.nodes:
        if node not in layers:
            rounded.run(node)
        else:
            layer = layers[node]
            means = layer.channel_means(floating.batches(node)[:batches])
            correct_bias(layer, rounded, means, batches)


def _learn(
    weights: Sequence[_SoftWeight],
    loss: Callable[[], Tensor],
    iterations: int,
    penalty: Callable[[_SoftWeight], float],
) -> None:
    """Make ``loss`` small, a share of what it was, by the rounding of weights; then settle it."""
    parameters = [weight.logit for weight in weights]
    optimizer = torch.optim.Adam(parameters, lr=_WAY / max(iterations, 1))
    warm = int(_WARM_UP * iterations)
    with torch.enable_grad():
        for step in range(iterations):
            value = loss()
            if step >= warm:
                done = (step - warm) / max(1, iterations - 1 - warm)
                sharpness = _SHARPNESS[0] + (_SHARPNESS[1] - _SHARPNESS[0]) * done
                for weight in weights:
                    value = value + penalty(weight) * weight.penalty(sharpness)
            gradients = torch.autograd.grad(value, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for weight in weights:
        weight.settle()


def _loss(run: _Forward, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Mean squared error of the block as conversion would have it now."""
    total, count = 0.0, 0
    for x, target in zip(sources, targets, strict=True):
        total += float((run(x, {}) - target).square().sum(dtype=torch.float64))
        count += target.numel()
    return total / max(count, 1)


class _Forward:
    """Runs a block with other weights."""

    def __init__(self, model: GraphModule, block: Block, rounded: Stream) -> None:
        self._model = model
        self._block = block
        self._held = rounded
        self._layers = {layer.node: layer for layer in block.layers}
        # A layer keeps its scale while it learns, and so do the units of its bias.
        self._biases = {layer.node: layer.rounded_bias() for layer in block.layers}

    def __call__(
        self,
        x: Tensor,
        weights: dict[Node, Tensor],
        drop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        values: dict[Node, Any] = {self._block.source: x}

        def value(node: Node) -> Any:
            return values[node] if node in values else self._held.values[node]

        for node in self._block.nodes:
            layer = self._layers.get(node)
            if layer is not None:
                weight = weights.get(node)
                weight = layer.rounded_weight() if weight is None else weight
                values[node] = layer.compute(value(layer.input), weight, self._biases[node])
            elif node.op == "call_module":
                module = self._model.get_submodule(str(node.target))
                held = value(cast(Node, node.args[0]))
                values[node] = held
                if isinstance(module, ActivationObserver):
                    values[node] = _dropped(module, held, drop, generator)
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
                values[node] = cast(Any, node.target)(*args, **kwargs)
        return cast(Tensor, values[self._block.target])


def _dropped(
    observer: ActivationObserver, x: Tensor, drop: float, generator: torch.Generator | None
) -> Tensor:
    """``x`` rounded, but for a share of its values."""
    kept = None
    if drop and generator is not None:
        kept = _drawn(x.shape, 1 - drop, generator).to(x.device)
    if observer.is_dynamic or not x.requires_grad:
        rounded = on_grid(observer, x)
        return rounded if kept is None else _chosen(kept, rounded, x)
    return cast(Tensor, _OnGrid.apply(x, observer, kept))


def _drawn(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """A mask, true for a share of its entries, in 1 to 255 of 256: eight of each random number."""
    count = shape.numel()
    drawn = torch.empty(-(-count // 8), dtype=torch.int64)
    drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    bound = min(max(round(256 * share), 1), 255)
    return (drawn.view(torch.uint8)[:count] < bound).view(shape)


def _chosen(mask: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """``torch.where`` of finite values: at weights of 0 and 1, this is exact, and has vectors."""
    return torch.lerp(other, x, mask.to(x.dtype))


class _OnGrid(torch.autograd.Function):
    """:func:`on_grid` with gradients; several times as fast as PyTorch's, which has no vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, observer: ActivationObserver, kept: Tensor | None) -> Tensor:
        qparams = observer.qparams()
        scale, zero_point = cast(float, qparams.scale), qparams.zero_point
        multiples = (x * (1 / torch.tensor(scale, dtype=torch.float32))).round_()
        y = multiples.clamp(observer.quant_min - zero_point, observer.quant_max - zero_point)
        passes = y == multiples  # where nothing is clipped
        y.mul_(scale)
        if kept is not None:
            y = _chosen(kept, y, x)
            passes |= ~kept
        ctx.save_for_backward(passes)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None
