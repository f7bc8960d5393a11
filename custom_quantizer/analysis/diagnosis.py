"""Where a quantized model loses its precision: tensor by tensor, op by op, weight by weight.

The converted graph and the float graph it was made from run side by side on the same samples, one
batch at a time. Three questions are asked:

- how far is each quantized tensor from its float twin (``sqnr``), all quantization before it
  included;
- how far is it when its op alone is quantized and gets exact float inputs (``alone``). An op with
  a low value here loses precision itself, others only pass on what they were given;
- does its range fit: are values cut off at the ends, are levels never used.

The signal-to-quantization-noise ratio of a tensor ``x`` and its quantized form ``y`` is
``10 log10(sum(x^2) / sum((x - y)^2))`` dB, both sums over all samples: 6.02 dB are one bit.

References:
    W. R. Bennett. Spectra of quantized signals. Bell System Technical Journal 27, 1948.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from custom_quantizer.analysis.activations import ActivationCounter, quantized_activations
from custom_quantizer.analysis.fidelity import finite, output_record
from custom_quantizer.analysis.rerun import capture_like, is_float
from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.calibration.run import GraphInputs, SampleQueue
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.formats import range_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    constant_of,
    describe,
    is_constant,
    is_dequantize,
    is_run_time_quantization,
    module_path,
    qparams_of,
    source_of,
    state_kept,
)
from custom_quantizer.core.noise import Noise, ratio_db
from custom_quantizer.core.plot import new_figure, save_figure
from custom_quantizer.core.progress import track
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.core.threads import exclusive, tools
from custom_quantizer.errors import ConversionError, InputError
from custom_quantizer.ops import PatternMatch, QuantizedOp, match_of, rule_of
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference.accumulators import accumulator_of
from custom_quantizer.reference.converted import ConvertedGraph, read_converted

__all__ = [
    "Diagnosis",
    "OutputDiagnosis",
    "TensorDiagnosis",
    "WeightDiagnosis",
    "diagnose",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorDiagnosis:
    """A quantized activation.

    Attributes:
        name: of the node whose result it is.
        path: of the module.
        family: of the op that computes it; ``None`` for inputs of the model and results of ops
            that are float.
        bits: width of its integers.
        scale: of its integers.
        zero_point: of its integers.
        sqnr: in dB, with everything before it quantized; infinite where there is no error at all.
        inputs_sqnr: the lowest ``sqnr`` of the op's inputs; ``None`` without an op, and where an
            input is not quantized.
        alone: in dB, with exact float inputs and only this op quantized: its weight, its bias and
            its result. ``None`` without an op, and for ops that only move values.
        clipped_low: share of values below the smallest integer, 0 to 1. What a fused ReLU or
            clamp cuts off does not count.
        clipped_high: share of values above the largest integer.
        used_levels: integers that occurred; ``None`` above 16 bits.
        unused_low: integers below the smallest that occurred.
        unused_high: integers above the largest that occurred.
        levels: integers that the format has.
        bias_headroom: bits between the largest bias and the end of int32; ``None`` without bias.
        accumulator_bits: signed bits that the op needs in the worst case, as
            :func:`custom_quantizer.accumulators` says; ``None`` where it has none.
        raised_channels: output channels whose weight scale was raised for the bias to fit.
        low: smallest value; ``None`` without values.
        high: largest value.
        quant_min: smallest integer that the format has.
        quant_max: largest.
        histogram: number of values in each bin; see
            :class:`~custom_quantizer.analysis.activations.ActivationValues`.
    """

    name: str
    path: str
    family: str | None
    bits: int
    scale: float
    zero_point: int
    sqnr: float
    inputs_sqnr: float | None
    alone: float | None
    clipped_low: float
    clipped_high: float
    used_levels: int | None
    unused_low: int | None
    unused_high: int | None
    levels: int
    bias_headroom: int | None = None
    accumulator_bits: int | None = None
    raised_channels: int = 0
    low: float | None = None
    high: float | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    histogram: tuple[int, ...] = ()

    @property
    def clipped(self) -> float:
        """Share of values cut off at either end, 0 to 1."""
        return self.clipped_low + self.clipped_high

    @property
    def dead(self) -> float | None:
        """Share of the integers at both ends of the range that never occurred, 0 to 1."""
        if self.unused_low is None or self.unused_high is None:
            return None
        return (self.unused_low + self.unused_high) / self.levels

    @property
    def drop(self) -> float | None:
        """How many dB of SQNR are lost from the op's inputs to its result."""
        if self.inputs_sqnr is None or not math.isfinite(self.inputs_sqnr):
            return None
        return self.inputs_sqnr - self.sqnr


@dataclass(frozen=True)
class WeightDiagnosis:
    """A quantized weight.

    Attributes:
        name: of the op that uses it.
        path: of the module.
        bits: width of its integers.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        sqnr: in dB.
        worst_channel: the output channel with the lowest SQNR.
        worst_channel_sqnr: of that channel, in dB.
        used_levels: integers that occur.
        levels: integers that the format has.
    """

    name: str
    path: str
    bits: int
    granularity: str
    sqnr: float
    worst_channel: int
    worst_channel_sqnr: float
    used_levels: int
    levels: int


@dataclass(frozen=True)
class OutputDiagnosis:
    """An output of the model.

    Attributes:
        index: position among the outputs.
        sqnr: in dB, against the float model.
    """

    index: int
    sqnr: float


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        samples: samples that both graphs were shown.
        tensors: quantized activations, in graph order.
        weights: quantized weights, in graph order.
        outputs: outputs of the model.
    """

    samples: int
    tensors: tuple[TensorDiagnosis, ...]
    weights: tuple[WeightDiagnosis, ...]
    outputs: tuple[OutputDiagnosis, ...]

    def __getitem__(self, name: str) -> TensorDiagnosis:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise InputError(
            f"no quantized tensor {name!r}; there are {', '.join(t.name for t in self.tensors)}"
        )

    @property
    def worst(self) -> TensorDiagnosis | None:
        """The op that loses most by itself; ``None`` where no op is quantized."""
        ops = [tensor for tensor in self.tensors if tensor.alone is not None]
        return min(ops, key=lambda tensor: cast(float, tensor.alone), default=None)

    def ranked(self) -> tuple[TensorDiagnosis, ...]:
        """Ops by what they lose themselves, the worst first."""
        ops = [tensor for tensor in self.tensors if tensor.alone is not None]
        return tuple(sorted(ops, key=lambda tensor: cast(float, tensor.alone)))

    def to_json(self) -> str:
        """All fields as JSON, ratios in dB; null where there is no error at all, or no value."""
        document = {
            "kind": "diagnosis",
            "schema_version": SCHEMA_VERSION,
            "samples": self.samples,
            "worst": None if self.worst is None else self.worst.name,
            "tensors": [_record(tensor) for tensor in self.tensors],
            "weights": [_record(weight) for weight in self.weights],
            "outputs": [output_record(output) for output in self.outputs],
        }
        return json.dumps(document, indent=2, allow_nan=False)

    def __str__(self) -> str:
        tensors = [_TENSOR_HEADER, *(_tensor_cells(tensor) for tensor in self.tensors)]
        weights = [_WEIGHT_HEADER, *(_weight_cells(weight) for weight in self.weights)]
        lines = [f"{self.samples:,} samples; SQNR in dB", "", *table_lines(tensors)]
        if self.weights:
            lines += ["", *table_lines(weights)]
        lines += [""]
        lines += [f"output {output.index}: {_db(output.sqnr)} dB" for output in self.outputs]
        if self.worst is not None:
            lines += [
                f"{_where(self.worst)} loses most: {_db(self.worst.alone)} dB when it alone is "
                "quantized"
            ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw SQNR, clipped values and unused levels over the tensors; needs matplotlib.

        Args:
            path: of the picture; its suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.

        Raises:
            InputError: matplotlib is missing, or the file cannot be written.
        """
        count = len(self.tensors)
        figure = new_figure(max(7.0, 2.0 + 0.28 * count), 7.0)
        quality, range_ = cast(Any, figure.subplots(2, 1, sharex=True))
        places = range(count)

        def heights(values: Iterable[float | None]) -> list[float]:
            return [v if v is not None and math.isfinite(v) else math.nan for v in values]

        quality.plot(places, heights(t.sqnr for t in self.tensors), "o-", label="all before it")
        quality.plot(places, heights(t.alone for t in self.tensors), "s", label="this op alone")
        quality.set_ylabel("SQNR, dB")
        quality.legend()
        quality.grid(axis="y", alpha=0.3)
        range_.bar(places, [100 * t.clipped for t in self.tensors], label="values cut off")
        range_.plot(
            places, [100 * (t.dead or 0.0) for t in self.tensors], "k_", label="levels unused"
        )
        range_.set_ylabel("percent")
        range_.legend()
        range_.set_xticks(list(places), [t.path or t.name for t in self.tensors], rotation=90)
        save_figure(figure, path)


def diagnose(
    model: nn.Module | torch.export.ExportedProgram,
    converted: GraphModule,
    data: object,
    *,
    limit: int | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Compare every quantized tensor and weight with its float twin.

    Takes about ten float forwards of the data, and the memory of one batch of activations.

    Args:
        model: the float model that was quantized: a module, an ``ExportedProgram`` or the captured
            graph (``QuantizationResult.exported``). It is not changed.
        converted: what ``convert_pt2e`` returns.
        data: as :func:`~custom_quantizer.calibration.run.calibrate` takes it; preferably other
            samples than those of the calibration.
        limit: use at most that many samples, the first ones.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model.
        CalibrationError: a batch does not hold what the graph takes.
        ConversionError: ``converted`` is no converted graph, or of another model.
        InputError: there are no samples, or fewer than one batch of a static graph.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: a diagnosis needs at least one sample")
    graph = GraphInputs.of(converted)
    queue = SampleQueue(graph)
    walk: _Walk | None = None
    samples = 0
    batches = [data] if isinstance(data, (Tensor, dict)) else cast(Iterable[Any], data)
    with state_kept(converted):
        for call in queue.calls(track(batches, "diagnose", enabled=progress), limit):
            walk = walk or _Walk(_float_twin(model, converted, call), converted)
            walk.add(call)
            samples += graph.batch_size(call)
    if walk is None:
        given = queue.passed
        raise InputError(
            f"the data holds {given} samples, but the graph takes batches of {queue.smallest}"
            if given
            else "the data to diagnose with holds no sample"
        )
    return Diagnosis(samples, walk.tensors(), walk.weights(), walk.outputs())


# ---------------------------------------------------------------------------------------------
# The float twin
# ---------------------------------------------------------------------------------------------


class _Nothing(IntegerQuantizer):
    """Lets ``prepare_pt2e`` fold batch norms and rewrite the graph, and quantizes nothing."""

    def annotate(self, model: GraphModule) -> GraphModule:
        return model


@tools()
def _float_twin(
    model: nn.Module | torch.export.ExportedProgram, converted: GraphModule, values: list[Any]
) -> GraphModule:
    """The float graph with the nodes, by name, that ``converted`` was made from."""
    captured = capture_like(model, converted, values)
    return cast(GraphModule, prepare_pt2e(captured, _Nothing()))


# ---------------------------------------------------------------------------------------------
# Running both
# ---------------------------------------------------------------------------------------------


class _Tensor:
    """What is counted of one quantized tensor."""

    def __init__(self, qparams: QParams, op: QuantizedOp | None) -> None:
        self.qparams = qparams
        self.op = op
        self.noise, self.alone = Noise(), Noise()
        self.counter = ActivationCounter(qparams)


class _Walk:
    """Runs float and converted graph side by side and counts."""

    def __init__(self, twin: GraphModule, converted: GraphModule) -> None:
        self._twin, self._converted = twin, converted
        self._by_name: dict[str, Node] = {node.name: node for node in twin.graph.nodes}
        graph = read_converted(converted, integer_io=False)
        self._graph = graph
        producers = {op.output_node: op for op in graph.integer}
        self._tensors: dict[Node, _Tensor] = {}
        self._twin_of: dict[Node, Node] = {}
        for node in quantized_activations(converted):
            source = cast(Node, node.args[0])
            self._tensors[node] = _Tensor(qparams_of(converted, node), producers.get(source))
            self._twin_of[node] = self._find(source_of(node))
        for op in graph.integer:
            for source in op.match.inputs:
                if not is_constant(source_of(source)):
                    self._twin_of[source] = self._find(source_of(source))
        for node in converted.graph.nodes:
            if rule_of(node) is not None and not is_run_time_quantization(node):
                self._find(node)
        self._weights = dict(self._find_weights())
        self._outputs: dict[int, Noise] = {}

    def _find(self, node: Node) -> Node:
        twin: Node | None = self._by_name.get(node.name)
        if twin is None or _signature(twin) != _signature(node):
            raise ConversionError(
                f"{describe(node)} of the converted graph is not in the float model: pass the "
                "model that was quantized, best as the captured graph"
            )
        return twin

    def _find_weights(self) -> Iterable[tuple[Node, tuple[PatternMatch, Tensor]]]:
        """Each dequantized weight with its first op and its float values."""
        found = set()
        for node in self._converted.graph.nodes:
            match = match_of(node)
            if match is None or match.weight is None:
                continue
            weight = match.weight
            if not (is_dequantize(weight) or weight.target is DEQUANTIZE_GROUPED):
                continue
            if weight in found or not is_constant(weight.args[0]):
                continue
            original = match_of(self._find(node))
            if original is not None and is_constant(original.weight):
                found.add(weight)
                exact = constant_of(self._twin, cast(Node, original.weight))
                yield weight, (match, exact)

    def add(self, values: list[Any]) -> None:
        """Run one batch through both graphs."""
        wanted = set(self._twin_of.values())
        with exclusive(), torch.no_grad():
            exact = _Recorder(self._twin, wanted)
            exact_outputs = _leaves(exact.run(*values, enable_io_processing=False))
            quantized = _Comparer(
                self._converted, self._graph, self._tensors, self._twin_of, exact.seen
            )
            outputs = _leaves(quantized.run(*values, enable_io_processing=False))
        if [(i, a.shape) for i, a in exact_outputs] != [(i, b.shape) for i, b in outputs]:
            raise ConversionError(
                "the float model returns something else than the converted graph: pass the model "
                "that was quantized, best as the captured graph"
            )
        for (index, a), (_, b) in zip(exact_outputs, outputs, strict=True):
            self._outputs.setdefault(index, Noise()).add(a, b)

    def outputs(self) -> tuple[OutputDiagnosis, ...]:
        return tuple(OutputDiagnosis(i, noise.ratio) for i, noise in self._outputs.items())

    def tensors(self) -> tuple[TensorDiagnosis, ...]:
        ratios: dict[Node, float] = {}
        rows: dict[tuple[str, float, int, int], TensorDiagnosis] = {}
        for node, tensor in self._tensors.items():
            ratios[node] = tensor.noise.ratio
            row = self._row(node, tensor, ratios)
            # The same tensor in the same format for several users is one tensor.
            rows.setdefault((row.name, row.scale, row.zero_point, row.bits), row)
        return tuple(rows.values())

    def _row(self, node: Node, tensor: _Tensor, ratios: dict[Node, float]) -> TensorDiagnosis:
        source = source_of(node)
        op = tensor.op
        accumulator = None if op is None else accumulator_of(op)
        inputs = None
        if op is not None:
            known = [ratios.get(cast(Node, dq.args[0])) for dq in op.match.inputs]
            inputs = min((r for r in known if r is not None), default=None)
        return TensorDiagnosis(
            name=source.name,
            path=module_path(source),
            family=None if op is None else op.match.rule.family,
            sqnr=tensor.noise.ratio,
            inputs_sqnr=inputs,
            alone=tensor.alone.ratio if _computes(op) else None,
            bias_headroom=_bias_headroom(op),
            accumulator_bits=None if accumulator is None else accumulator.bits,
            raised_channels=_raised_channels(op),
            **tensor.counter.values(),
        )

    def weights(self) -> tuple[WeightDiagnosis, ...]:
        return tuple(
            self._weight_row(weight, match, exact)
            for weight, (match, exact) in self._weights.items()
        )

    def _weight_row(self, weight: Node, match: PatternMatch, exact: Tensor) -> WeightDiagnosis:
        integers = constant_of(self._converted, cast(Node, weight.args[0]))
        if weight.target is DEQUANTIZE_GROUPED:
            low, high = (int(cast(int, value)) for value in weight.args[5:7])
            granularity = "per_group"
        else:
            # Not by qparams_of: another quantizer's weights may have zero points.
            each = weight.target is DEQUANTIZE_PER_CHANNEL
            low, high = (int(cast(int, value)) for value in weight.args[3 + each : 5 + each])
            granularity = "per_channel" if each else "per_tensor"

        def constant(node: Node) -> Any:
            return constant_of(self._converted, node)

        call = cast(Callable[..., Tensor], weight.target)
        value = call(*map_arg(weight.args, constant), **map_arg(weight.kwargs, constant))
        by_channel = exact.detach().double().movedim(match.weight_axis, 0).flatten(1)
        error = (exact.detach().double() - value.double()).movedim(match.weight_axis, 0)
        signals = (by_channel**2).sum(dim=1).tolist()
        errors = (error.flatten(1) ** 2).sum(dim=1).tolist()
        ratios = [ratio_db(s, e) for s, e in zip(signals, errors, strict=True)]
        worst = min(range(len(ratios)), key=ratios.__getitem__)
        levels = high - low + 1
        return WeightDiagnosis(
            match.node.name,
            module_path(match.node),
            range_bits(low, high),
            granularity,
            ratio_db(math.fsum(signals), math.fsum(errors)),
            worst,
            ratios[worst],
            int((torch.bincount((integers.long() - low).reshape(-1)) > 0).sum()),
            levels,
        )


def _signature(node: Node) -> tuple[Any, ...]:
    """What a node computes from which others, however they are quantized."""
    sources = []
    for source in map(source_of, node.all_input_nodes):
        grouped = source.target is DEQUANTIZE_GROUPED
        origin = cast(Node, source.args[0]) if grouped else source
        if not is_constant(origin):
            sources.append(origin.name)
    return node.op, node.target, sources


class _Recorder(Interpreter):
    """Keeps the tensors of some nodes for one batch."""

    def __init__(self, model: GraphModule, wanted: set[Node]) -> None:
        super().__init__(model)
        self._wanted = wanted
        self.seen: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._wanted:
            self.seen[n] = result
        return result


class _Comparer(Interpreter):
    """Runs the converted graph; compares each quantized tensor with the float one on the way."""

    def __init__(
        self,
        model: GraphModule,
        graph: ConvertedGraph,
        tensors: dict[Node, _Tensor],
        twin_of: dict[Node, Node],
        exact: dict[Node, Tensor],
    ) -> None:
        super().__init__(model)
        self._ops, self._tensors = {op.node: op for op in graph.integer}, tensors
        self._twin_of, self._exact = twin_of, exact
        self._activations = {op.output_node: op.node for op in graph.integer}
        self._run_time = graph.backend.run_time
        self._layers = {op.node: op.run_time for op in graph.floating if op.run_time is not None}
        self._sources: dict[Node, Tensor | None] = {
            layer.source: None for layer in self._layers.values()
        }
        self._alone: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if self._run_time is not None and n in self._layers:
            # With the scales of the backend, not one for the whole batch.
            layer = self._layers[n]
            result = self._run_time.compute(layer, cast(Tensor, self._sources[layer.source]))
        if n in self._sources:
            self._sources[n] = result
        op = self._ops.get(n)
        if op is not None and _computes(op):
            inputs = {s: self._twin_of[s] for s in op.match.inputs if s in self._twin_of}
            self._alone[n] = self._call(n, {s: self._exact[twin] for s, twin in inputs.items()})
        anchor = self._activations.get(n)
        if anchor is not None and anchor is not n and anchor in self._alone:
            self._alone[n] = self._call(n, {anchor: self._alone.pop(anchor)})
        tensor = self._tensors.get(n)
        if tensor is not None:
            self._compare(n, tensor, result)
        return result

    def _call(self, node: Node, given: dict[Node, Tensor]) -> Tensor:
        """The op once more, with some of its inputs replaced."""

        def value(source: Node) -> Any:
            return given[source] if source in given else self.env[source]

        call = cast(Callable[..., Tensor], node.target)
        return call(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def _compare(self, node: Node, tensor: _Tensor, integers: Tensor) -> None:
        source = cast(Node, node.args[0])
        exact = self._exact[self._twin_of[node]]
        tensor.counter.add(self.env[source], integers)
        tensor.noise.add(exact, _dequantize(integers, tensor.qparams))
        alone = self._alone.get(source)
        if alone is not None:
            integers = self._call(node, {source: alone})
            tensor.alone.add(exact, _dequantize(integers, tensor.qparams))


def _dequantize(integers: Tensor, qparams: QParams) -> Tensor:
    return (integers.to(torch.float64) - qparams.zero_point) * qparams.scale


def _computes(op: QuantizedOp | None) -> bool:
    """Whether the op makes new values, and does not only move them."""
    return op is not None and not op.match.rule.moves_values


def _leaves(outputs: Any) -> list[tuple[int, Tensor]]:
    """Real outputs, each with its position among all."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [(i, value) for i, value in enumerate(outputs) if is_float(value)]


def _bias_headroom(op: QuantizedOp | None) -> int | None:
    if op is None or op.bias is None:
        return None
    return 31 - int(op.bias.to(torch.int64).abs().max()).bit_length()


def _raised_channels(op: QuantizedOp | None) -> int:
    if op is None or op.match.weight is None:
        return 0
    return len(op.match.weight.meta.get(META_KEY, {}).get("raised", {}))


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------

_TENSOR_HEADER = (
    "tensor",
    "op",
    "bits",
    "SQNR",
    "inputs",
    "alone",
    "clipped",
    "levels used",
    "dead",
    "bias headroom",
)
_WEIGHT_HEADER = ("weight", "format", "SQNR", "worst channel", "its SQNR", "levels used")


def _record(row: TensorDiagnosis | WeightDiagnosis) -> dict[str, Any]:
    return cast("dict[str, Any]", finite(asdict(row)))


def _tensor_cells(tensor: TensorDiagnosis) -> tuple[str, ...]:
    used = "-" if tensor.used_levels is None else f"{tensor.used_levels:,} / {tensor.levels:,}"
    return (
        _where(tensor),
        tensor.family or "-",
        str(tensor.bits),
        _db(tensor.sqnr),
        _db(tensor.inputs_sqnr),
        _db(tensor.alone),
        f"{100 * tensor.clipped:.2g} %" if tensor.clipped else "-",
        used,
        "-" if not tensor.dead else f"{100 * tensor.dead:.2g} %",
        "-" if tensor.bias_headroom is None else f"{tensor.bias_headroom} bits",
    )


def _weight_cells(weight: WeightDiagnosis) -> tuple[str, ...]:
    return (
        _where(weight),
        f"int{weight.bits} {weight.granularity.replace('_', ' ')}",
        _db(weight.sqnr),
        str(weight.worst_channel),
        _db(weight.worst_channel_sqnr),
        f"{weight.used_levels:,} / {weight.levels:,}",
    )


def _where(row: TensorDiagnosis | WeightDiagnosis) -> str:
    return f"{row.name} ({row.path})" if row.path else row.name


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else ("exact" if value > 0 else "lost")
