"""``improve``: better integers for a calibrated network, before it is converted.

The network is walked through layer by layer, in two versions side by side: the float model, and
what conversion would make of it. Each layer is changed knowing what really arrives at it, since all
layers before it are rounded and improved already. Ranges of activations are frozen first, since
what is made up for depends on them.

A part of the data is held back. The result compares each layer's output on it with the float
model's, before and after.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.accuracy.checkpoint import ImprovementCheckpoint
from custom_quantizer.accuracy.compensation import (
    correct_bias,
    correct_bias_by_means,
    input_moments,
    round_by_error,
)
from custom_quantizer.accuracy.defaults import BEST
from custom_quantizer.accuracy.equalization import (
    absorb_bias,
    equalize,
    extremes,
    find_norms,
    find_pairs,
    parameters_of_norms,
    put_attribute,
    smooth,
)
from custom_quantizer.accuracy.layers import Layer, find_layers
from custom_quantizer.accuracy.learning import (
    EXACT,
    Block,
    correct_biases,
    learn_block,
    learn_layer,
    walk_blocks,
)
from custom_quantizer.accuracy.streams import Stream, values_of, walk
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.run import GraphInputs, graph_calls
from custom_quantizer.calibration.settling import settled_scales
from custom_quantizer.config.improvement import ALGORITHMS, RESCALING, check_algorithms
from custom_quantizer.core.checkpoint import fingerprint
from custom_quantizer.core.graph import RESCALED_KEY, module_path, some_state
from custom_quantizer.core.noise import Noise
from custom_quantizer.core.progress import track
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import CalibrationError, ConfigError

__all__ = ["FloatMeans", "Improvement", "LayerGain", "NotApplied", "improve", "improve_again"]

T = TypeVar("T")

_MOST_LAYERS = 12
"""Layers of a block: where a network has no narrow places, blocks become all of it."""

_HELD_BACK = 8
"""One in so many batches is held back."""

_LIMIT, _ITERATIONS, _SEED = 512, 2000, 0
"""What :func:`improve` does unless it is told."""

_LOST = 1.0
"""Decibels lost on what is held back, from which on a layer fits the samples and not the data."""

TOO_FEW = "its output on the batches held back lost {:.1f} dB: give more samples"
"""Why a layer was left as it was."""


@dataclass(frozen=True)
class LayerGain:
    """What became of the output of one layer, on data that were held back.

    Attributes:
        node: name of the call.
        module: path of its module.
        algorithms: that changed it, in their order.
        before: SQNR of its output in dB, against the float model's, with all layers up to it
            rounded to nearest.
        after: the same with all layers up to it improved.
    """

    node: str
    module: str
    algorithms: tuple[str, ...]
    before: float
    after: float

    @property
    def gain(self) -> float:
        """In dB."""
        return self.after - self.before


@dataclass(frozen=True)
class NotApplied:
    """An algorithm that left an op as it was.

    Attributes:
        node: name of the call.
        algorithm: its name.
        reason: why.
    """

    node: str
    algorithm: str
    reason: str


@dataclass(frozen=True)
class Improvement:
    """What :func:`improve` did.

    Attributes:
        algorithms: that were asked for, in the order in which they ran.
        layers: one entry for each layer with a rounded weight, in graph order.
        not_applied: what was left as it was, and why.
        samples: that were learned from.
        held_back: that were only measured on; 0 where there was one batch, which did both.
        seconds: wall time by algorithm; ``streams`` is running the network itself.
        resumed: layers that came from a checkpoint.
    """

    algorithms: tuple[str, ...]
    layers: tuple[LayerGain, ...]
    not_applied: tuple[NotApplied, ...]
    samples: int
    held_back: int
    seconds: Mapping[str, float]
    resumed: int = 0

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        last = self.layers[-1] if self.layers else None
        text = f"improved {len(self.layers)} layers on {self.samples:,} samples ({spent})"
        if last is not None:
            text += f"; {last.node}: {last.before:.1f} -> {last.after:.1f} dB"
        if self.not_applied:
            text += f"; {len(self.not_applied)} not applied"
        return text

    def table(self) -> str:
        """A table of layers, and below it what was not applied, and why."""
        rows = [("layer", "module", "before, dB", "after, dB", "gain, dB", "by")]
        for layer in self.layers:
            numbers = (layer.before, layer.after, layer.gain)
            before, after, gain = (f"{number:.2f}" for number in numbers)
            by = " + ".join(layer.algorithms) or "-"
            rows.append((layer.node, layer.module, before, after, gain, by))
        lines = list(table_lines(rows))
        lines += [f"{n.node}: no {n.algorithm}: {n.reason}" for n in self.not_applied]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class FloatMeans:
    """Means of each layer's outputs in the float model: all that a correction of biases asks of it.

    Attributes:
        data: fingerprint of the calls that they are of.
        of: name of a layer's call -> its means, float64, ``(out_channels,)``.
    """

    data: str = ""
    of: dict[str, Tensor] = field(default_factory=dict)

    def open(self, calls: Sequence[Sequence[Any]]) -> None:
        """Forget those of other calls."""
        data = fingerprint([v for call in calls for v in call if isinstance(v, Tensor)])
        if data != self.data:
            self.data, self.of = data, {}


def improve(
    prepared: GraphModule,
    data: object,
    algorithms: Sequence[str] = BEST,
    *,
    limit: int | None = _LIMIT,
    iterations: int = _ITERATIONS,
    seed: int = _SEED,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Improvement:
    """Change weights, scales and biases of a calibrated graph so that it loses less by rounding.

    ``prepared`` is changed in place; ``convert_pt2e`` then finds the improved integers. Ranges of
    activations are frozen. It runs where the graph is, on the CPU or on a GPU. Equal data and seeds
    give equal results on one machine. A graph that was improved before is compared with the float
    model that it was prepared from, all the same.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated.
        data: as for :func:`~custom_quantizer.calibration.run.calibrate`; no labels are needed. All
            of it is held in memory, with the activations of a few layers.
        algorithms: names, in any order; by default ``gptq`` and ``bias_correction``:

            - ``equalization``: what a layer divides a channel by, the next one multiplies it
              with, so that no channel is much smaller than others; ranges in between are measured
              again. The float network stays what it is.
            - ``bias_absorption``: what a channel always exceeds goes through the next layer's
              bias instead.
            - ``smoothquant``: the same as equalization between a layer norm and linear layers.
            - ``gptq``: weight scales and integers that change the layer's outputs least.
            - ``adaround``: which neighbour each weight is rounded to, learned layer by layer.
            - ``brecq``: the same, block by block, with activations rounded; in the end.
            - ``analytical_bias_correction``: whole units of the derived bias for what rounding the
              weight does to the float model's mean input.
            - ``bias_correction``: the same for the mean error that is measured, which takes in what
              rounding activations does, and the layers before.
        limit: use at most that many samples, the first ones.
        iterations: steps of learning for each layer (``adaround``) or block (``brecq``).
        seed: of what is drawn.
        checkpoint: a file that keeps the finished layers. If it exists, the work goes on where it
            stopped, with the result that it would have had; it stays when all is done.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        ConfigError: an algorithm is not known, or none is named.
        CalibrationError: the graph is not calibrated, is prepared for training, writes buffers,
            or has no layer with a rounded weight; it has improved integers, and an algorithm would
            change the float network that they were found for; there are no data or they do not fit;
            the checkpoint is of something else.
        InputError: the checkpoint cannot be read or written.
    """
    return _improved(
        prepared, data, algorithms, None, limit, iterations, seed, checkpoint, progress
    )


def improve_again(
    prepared: GraphModule,
    data: object,
    algorithms: Sequence[str],
    means: FloatMeans,
    *,
    progress: bool | None = None,
) -> Improvement:
    """:func:`improve`, with its defaults, for a float model of which something is known.

    Args:
        prepared: as there.
        data: likewise.
        algorithms: likewise.
        means: of the same float graph, in any scheme; those that are missing are added.
        progress: likewise.
    """
    return _improved(prepared, data, algorithms, means, _LIMIT, _ITERATIONS, _SEED, None, progress)


def _improved(
    prepared: GraphModule,
    data: object,
    algorithms: Sequence[str],
    means: FloatMeans | None,
    limit: int | None,
    iterations: int,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool | None,
) -> Improvement:
    chosen = check_algorithms(algorithms)
    if not chosen:
        raise ConfigError(f"algorithms is empty; choose from {', '.join(ALGORITHMS)}")
    calls = graph_calls(prepared, data, limit)
    if not calls:
        raise CalibrationError("the data hold no full batch of the graph; pass more of them")
    if state := some_state(prepared.graph):
        raise CalibrationError(
            f"the model writes its own buffers ({state}), so layers cannot be run apart from each "
            "other; improve it without them"
        )
    with settled_scales(prepared), exclusive(), torch.no_grad():
        layers, refused = _improvable(prepared, chosen)
        run = _Run(prepared, layers, refused, calls, chosen, means, iterations, seed, checkpoint)
        return run.run(progress)


def _improvable(
    prepared: GraphModule, algorithms: tuple[str, ...]
) -> tuple[list[Layer], dict[str, str]]:
    """Layers whose weights are rounded constants, and why others are none."""
    layers, refused = find_layers(prepared)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise CalibrationError(
            f"the graph has no layer whose weight is a rounded constant{reasons and ': '}{reasons}"
        )
    improved = [layer for layer in layers if layer.was_improved]
    if improved and (rescaling := [name for name in algorithms if name in RESCALING]):
        raise CalibrationError(
            f"{improved[0].where} was improved before, and {', '.join(rescaling)} would change the "
            "float network that its integers were found for; name all algorithms in one call"
        )
    return layers, refused


class _Run:
    """One call of :func:`improve`."""

    def __init__(
        self,
        prepared: GraphModule,
        layers: list[Layer],
        refused: dict[str, str],
        calls: list[list[Any]],
        algorithms: tuple[str, ...],
        means: FloatMeans | None,
        iterations: int,
        seed: int,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        self.prepared = prepared
        self.layers = layers
        self.algorithms = algorithms
        self.iterations = iterations
        self.seed = seed
        self.layer_of = {layer.node: layer for layer in layers}
        device = layers[0].weight.device
        self.calls = [[_moved(value, device) for value in call] for call in calls]
        held = max(1, len(calls) // _HELD_BACK) if len(calls) > 1 else 0
        self.learned = len(calls) - held
        self.held = self.calls[self.learned :] or self.calls
        # Rescaling makes another float network.
        known = None if set(algorithms) & set(RESCALING) else means
        self.means = known or FloatMeans()
        if known is not None:
            known.open(calls)
        self.rescaled: dict[Node, list[str]] = {}
        self.seconds = dict.fromkeys(("streams", *algorithms), 0.0)
        self.not_applied = [
            NotApplied(node, name, reason)
            for node, reason in refused.items()
            for name in algorithms
        ]
        self.file = (
            None
            if checkpoint is None
            else ImprovementCheckpoint(
                checkpoint, prepared, layers, calls, algorithms, iterations, seed
            )
        )

    def run(self, progress: bool | None) -> Improvement:
        """All of it; nothing, where it does not end."""
        observers = [m for m in self.prepared.modules() if isinstance(m, ActivationObserver)]
        thawed = {o: o.statistics for o in observers if not o.is_dynamic and not o.frozen}
        norms = parameters_of_norms(self.prepared)
        for layer in self.layers:
            layer.take_copies()
        states = [layer.state() for layer in self.layers]
        try:
            before = self._measured()
            self._rescale(thawed)
            for observer in thawed:
                observer.freeze()
            return self._run(before, progress)
        except BaseException:
            for observer, statistics in thawed.items():
                observer.unfreeze()
                observer.statistics = statistics
            for name, value in norms.items():
                put_attribute(self.prepared, name, value)
            for layer, state in zip(self.layers, states, strict=True):
                layer.load(state)
            raise

    def _rescale(self, thawed: Iterable[ActivationObserver]) -> None:
        """What changes the float network's numbers, and the ranges that follow from it."""
        model, changed = self.prepared, set[ActivationObserver]()
        pairs, alone = find_pairs(model, self.layers)
        if "equalization" in self.algorithms:
            with self._timing("equalization"):
                self._leave("equalization", alone)
                equalize(pairs)
            for pair in pairs:
                self._note("equalization", pair.first, pair.second)
                changed.update(pair.observers(model))
        if "bias_absorption" in self.algorithms:
            with self._timing("bias_absorption"):
                self._leave("bias_absorption", alone)
                ends = [pair.between[-1] if pair.between else pair.first.node for pair in pairs]
                inputs = {node: y[0] for node, y in values_of(model, self.calls[:1], ends)}
                lowest = extremes(model, self.calls, [pair.first.node for pair in pairs])
                for pair, end in zip(pairs, ends, strict=True):
                    reason = absorb_bias(pair, lowest[pair.first.node][0], inputs[end])
                    if reason is not None:
                        self._leave("bias_absorption", {pair.first.name: reason})
                        continue
                    self._note("bias_absorption", pair.first, pair.second)
                    changed.update(pair.observers(model))
        if "smoothquant" in self.algorithms:
            with self._timing("smoothquant"):
                norms, others = find_norms(model, self.layers)
                others = others if norms or others else {"graph": "it has no layer norm"}
                self._leave("smoothquant", others)
                reach = extremes(model, self.calls, [found.norm for found in norms])
                for found in norms:
                    low, high = reach[found.norm]
                    smooth(model, found, torch.maximum(high, -low))
                    self._note("smoothquant", *found.layers)
                    changed.update(found.observers(model))
        if changed:
            self._observe_again(changed, thawed)

    def _observe_again(
        self, changed: set[ActivationObserver], thawed: Iterable[ActivationObserver]
    ) -> None:
        """Measure the ranges of some activations again; the others stay as they are."""
        for observer in thawed:
            if observer in changed:
                observer.forget()
            else:
                observer.freeze()
        graph = GraphInputs.of(self.prepared)
        for call in self.calls:
            args, kwargs = graph.arguments(call)
            self.prepared(*args, **kwargs)

    def _note(self, algorithm: str, *layers: Layer) -> None:
        for layer in layers:
            names = self.rescaled.setdefault(layer.node, [])
            if algorithm not in names:
                names.append(algorithm)

    def _leave(self, algorithm: str, reasons: Mapping[str, str]) -> None:
        self.not_applied += [NotApplied(n, algorithm, reason) for n, reason in reasons.items()]

    def _run(self, before: Mapping[Node, float], progress: bool | None) -> Improvement:
        finished = 0 if self.file is None else self.file.resume()
        own = {name: value.detach().clone() for name, value in self._floats().items()}
        calls = self.held if self._knows_means() else self.calls
        floating = Stream(self.prepared, calls, rounded=False, constants=own)
        rounded = Stream(self.prepared, self.calls, rounded=True)
        walked = walk(self.prepared, (floating, rounded), self.layers)
        gains = []
        steps = track(walked, "improve", len(self.layers), progress)
        for index, layer in enumerate(self._timed(steps)):
            floating.run_layer(layer)
            if self.file is not None and index < finished:
                applied = self.file.restore(index, layer)
                rounded.run_layer(layer)
                after = self._sqnr(layer, floating, rounded)
            else:
                applied, after = self._improve(index, layer, floating, rounded)
                if self.file is not None:
                    self.file.save(index, applied, layer)
            by = (*self.rescaled.get(layer.node, ()), *applied)
            gains.append(
                LayerGain(layer.name, module_path(layer.node), by, before[layer.node], after)
            )
        if "brecq" in self.algorithms:
            del floating, rounded
            gains = self._reconstruct(own, gains, finished, progress)
        for layer in self.layers:
            layer.observer.float_constants = {name: own[name] for name in layer.constants()}
        if self.rescaled:
            names = {name for names in self.rescaled.values() for name in names}
            before_this = self.prepared.meta.get(RESCALED_KEY, ())
            self.prepared.meta[RESCALED_KEY] = tuple(sorted({*before_this, *names}))
        return Improvement(
            self.algorithms,
            tuple(gains),
            tuple(self.not_applied),
            *self._samples(),
            self.seconds,
            finished,
        )

    def _improve(
        self, index: int, layer: Layer, floating: Stream, rounded: Stream
    ) -> tuple[tuple[str, ...], float]:
        """Change one layer, unless it is the worse for what is held back.

        Returns:
            Who changed it, and the SQNR of its output then.
        """
        state, held = layer.state(), len(self.held)
        exact = floating.batches(layer.node)[-held:]
        judged = self.learned < len(self.calls)
        before = _sqnr(exact, rounded.outputs_of(layer, held)) if judged else -math.inf
        applied = self._change(index, layer, floating, rounded)
        if layer.node not in rounded.values:
            rounded.run_layer(layer)
        after = self._sqnr(layer, floating, rounded)
        lost = before - after
        if not lost > _LOST:
            return applied, after
        layer.load(state)
        rounded.run_layer(layer)
        for name in applied:
            self._leave(name, {layer.name: TOO_FEW.format(lost)})
        return (), self._sqnr(layer, floating, rounded)

    def _change(
        self, index: int, layer: Layer, floating: Stream, rounded: Stream
    ) -> tuple[str, ...]:
        """Change one layer; the names of the algorithms that did."""
        applied: list[str] = []
        learned = slice(self.learned)
        corrects = "bias_correction" in self.algorithms and layer.bias is not None
        by_moments = [name for name in ("gptq", "adaround") if name in self.algorithms]
        if by_moments and layer.loses_nothing():
            for name in by_moments:
                self._leave(name, {layer.name: EXACT})
        elif by_moments:
            weight = floating.values[layer.weight_node]
            with self._timing(by_moments[0]):
                generator = torch.Generator().manual_seed(self.seed + index)
                moments = input_moments(
                    layer,
                    rounded.batches(layer.input)[learned],
                    floating.batches(layer.input)[learned],
                    generator,
                )
            if "gptq" in by_moments:
                with self._timing("gptq"):
                    round_by_error(layer, moments, weight, centered=corrects)
                applied.append("gptq")
            if "adaround" in by_moments:
                with self._timing("adaround"):
                    reason = learn_layer(layer, moments, weight, self.iterations, centered=corrects)
                self._settle("adaround", layer, reason, applied)
        if "analytical_bias_correction" in self.algorithms:
            with self._timing("analytical_bias_correction"):
                weight = floating.values[layer.weight_node]
                inputs = floating.batches(layer.input)[learned]
                reason = correct_bias_by_means(layer, weight, inputs)
            self._settle("analytical_bias_correction", layer, reason, applied)
        if "bias_correction" in self.algorithms:
            with self._timing("bias_correction"):
                reason = correct_bias(layer, rounded, self._means_of(layer, floating), self.learned)
            self._settle("bias_correction", layer, reason, applied)
        return tuple(applied)

    def _knows_means(self) -> bool:
        """Whether nothing but outputs on what is held back is asked of the float model."""
        return self.algorithms == ("bias_correction",) and all(
            layer.node.name in self.means.of for layer in self.layers
        )

    def _means_of(self, layer: Layer, floating: Stream) -> Tensor:
        """Of its outputs in the float model, on what is learned from."""
        name, known = layer.node.name, self.means.of
        if name not in known:
            known[name] = layer.channel_means(floating.batches(layer.node)[: self.learned])
        return known[name]

    def _settle(self, algorithm: str, layer: Layer, reason: str | None, applied: list[str]) -> None:
        """Note that an algorithm changed a layer, or why it did not."""
        if reason is None:
            applied.append(algorithm)
        else:
            self._leave(algorithm, {layer.name: reason})

    def _reconstruct(
        self,
        own: Mapping[str, Tensor],
        gains: Sequence[LayerGain],
        finished: int,
        progress: bool | None,
    ) -> list[LayerGain]:
        """Go through the network once more, block by block."""
        floating = Stream(self.prepared, self.calls, rounded=False, constants=own)
        rounded = Stream(self.prepared, self.calls, rounded=True)
        by_layer = dict(zip((layer.node for layer in self.layers), gains, strict=True))
        parts = walk_blocks(self.prepared, (floating, rounded), self.layers)
        steps = track(parts, "improve, blocks", enabled=progress)
        for index, block in enumerate(self._timed(steps), start=len(self.layers)):
            if self.file is not None and index < finished:
                applied = self.file.restore(index, *block.layers)
            else:
                applied = self._learn_block(index, block, floating, rounded)
                if self.file is not None:
                    self.file.save(index, applied, *block.layers)
            for node in block.nodes:
                rounded.run_any(node, self.layer_of)
                if node in by_layer:
                    layer, gain = self.layer_of[node], by_layer[node]
                    after = self._sqnr(layer, floating, rounded)
                    by = (*gain.algorithms, *applied)
                    by_layer[node] = replace(gain, algorithms=by, after=after)
        return list(by_layer.values())

    def _learn_block(
        self, index: int, block: Block, floating: Stream, rounded: Stream
    ) -> tuple[str, ...]:
        corrects = "bias_correction" in self.algorithms
        if corrects:  # once more: what arrives here is what the blocks before make of it now
            with self._timing("bias_correction"):
                correct_biases(block, floating, rounded, self.learned)
        if len(block.layers) > _MOST_LAYERS:
            reason: str | None = f"its block has {len(block.layers)} layers, too many to learn"
        else:
            with self._timing("brecq"):
                generator = torch.Generator().manual_seed(self.seed + index)
                reason = learn_block(
                    self.prepared,
                    block,
                    floating,
                    rounded,
                    self.learned,
                    self.iterations,
                    generator,
                    corrects=corrects,
                )
        if reason is not None:
            self._leave("brecq", {layer.name: reason for layer in block.layers})
            return ()
        return ("brecq",)

    def _floats(self) -> dict[str, Tensor]:
        """Weights and biases of the float model by their names."""
        return {
            name: value for layer in self.layers for name, value in layer.float_constants().items()
        }

    def _measured(self) -> dict[Node, float]:
        """SQNR of each layer's output on what is held back, as the graph is now."""
        floating = Stream(self.prepared, self.held, rounded=False, constants=self._floats())
        rounded = Stream(self.prepared, self.held, rounded=True)
        ratios = {}
        for layer in self._timed(walk(self.prepared, (floating, rounded), self.layers)):
            floating.run_layer(layer)
            rounded.run_layer(layer)
            ratios[layer.node] = _sqnr(floating.batches(layer.node), rounded.batches(layer.node))
        return ratios

    def _sqnr(self, layer: Layer, floating: Stream, rounded: Stream) -> float:
        held = slice(-len(self.held), None)
        return _sqnr(floating.batches(layer.node)[held], rounded.batches(layer.node)[held])

    def _samples(self) -> tuple[int, int]:
        graph = GraphInputs.of(self.prepared)
        sizes = [graph.batch_size(call) for call in self.calls]
        return sum(sizes[: self.learned]), sum(sizes[self.learned :])

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] += spent
            self.seconds["streams"] -= spent

    def _timed(self, steps: Iterator[T]) -> Iterator[T]:
        """``steps``; the time until the last one ends counts as that of the streams."""
        begin = time.perf_counter()
        yield from steps
        self.seconds["streams"] += time.perf_counter() - begin


def _sqnr(exact: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    noise = Noise()
    for x, y in zip(exact, other, strict=True):
        noise.add(x, y)
    return noise.ratio


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
