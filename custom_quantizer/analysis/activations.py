"""What values activations have, beside the range their integers stand for.

Counts over any number of batches, in memory that does not grow with them: extremes, what is cut
off, which integers occur, and a histogram whose bins are fixed by the format before any value is
seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from custom_quantizer.calibration.run import GraphInputs, SampleQueue
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.formats import range_bits
from custom_quantizer.core.graph import (
    is_constant,
    is_quantize,
    is_static,
    module_path,
    qparams_of,
    source_of,
    state_kept,
)
from custom_quantizer.core.progress import track
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import InputError
from custom_quantizer.reference.converted import read_converted

__all__ = [
    "BINS_INSIDE",
    "BINS_OUTSIDE",
    "ActivationCounter",
    "ActivationValues",
    "Activations",
    "observe_activations",
    "quantized_activations",
]

SCHEMA_VERSION = 1

BINS_INSIDE = 32
"""Bins of equal width between the ends of the range."""

BINS_OUTSIDE = 4
"""Bins beyond either end, as wide; the outermost of them hold all that is farther out."""

_MAX_LEVELS = 1 << 16
"""Formats with more levels than this are not searched for unused ones."""


@dataclass(frozen=True)
class ActivationValues:
    """The values of a quantized activation.

    Attributes:
        name: of the node whose result it is.
        path: of the module.
        bits: width of its integers.
        scale: of its integers.
        zero_point: of its integers.
        low: smallest value; ``None`` without values.
        high: largest.
        clipped_low: share of values below the smallest integer, 0 to 1.
        clipped_high: share of values above the largest integer.
        used_levels: integers that occurred; ``None`` above 16 bits.
        unused_low: integers below the smallest that occurred.
        unused_high: integers above the largest that occurred.
        levels: integers that the format has.
        quant_min: smallest of them.
        quant_max: largest.
        histogram: number of values in each bin. The range goes half a step beyond the smallest
            and the largest integer; it has ``BINS_INSIDE`` bins, and ``BINS_OUTSIDE`` more stand at
            either end of it.
    """

    name: str
    path: str
    bits: int
    scale: float
    zero_point: int
    low: float | None
    high: float | None
    clipped_low: float
    clipped_high: float
    used_levels: int | None
    unused_low: int | None
    unused_high: int | None
    levels: int
    quant_min: int
    quant_max: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Activations:
    """What :func:`observe_activations` saw.

    Attributes:
        samples: that were computed.
        tensors: quantized activations, in graph order.
    """

    samples: int
    tensors: tuple[ActivationValues, ...]

    def to_json(self) -> str:
        """All fields as JSON."""
        document = {"kind": "activations", "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(document, indent=2, allow_nan=False)


class ActivationCounter:
    """Counts the values of one activation.

    Args:
        qparams: of its integers, one scale.
    """

    def __init__(self, qparams: QParams) -> None:
        self.qparams = qparams
        self.total = self.low = self.high = 0
        self.smallest, self.largest = math.inf, -math.inf
        self.bins = torch.zeros(BINS_INSIDE + 2 * BINS_OUTSIDE, dtype=torch.int64)
        levels = qparams.levels
        self.used = torch.zeros(levels, dtype=torch.bool) if levels <= _MAX_LEVELS else None

    def add(self, value: Tensor, integers: Tensor) -> None:
        """Count a batch.

        Args:
            value: before it is rounded, any shape.
            integers: what it is rounded to, same shape.
        """
        q = self.qparams
        if not value.numel():
            return
        self.total += value.numel()
        place = value / q.scale + q.zero_point
        # A value is cut off where its nearest level does not exist.
        low, high = place < q.quant_min - 0.5, place > q.quant_max + 0.5
        self.low += int(low.sum())
        self.high += int(high.sum())
        if self.used is not None:
            self.used[(integers.to("cpu", torch.int64) - q.quant_min).reshape(-1)] = True
        ends = torch.aminmax(value)
        self.smallest = min(self.smallest, float(ends.min))
        self.largest = max(self.largest, float(ends.max))
        bins = ((place - (q.quant_min - 0.5)) * (BINS_INSIDE / q.levels)).floor()
        bins = bins.clamp(-BINS_OUTSIDE, BINS_INSIDE + BINS_OUTSIDE - 1)
        # What is cut off, and nothing else, stands beyond the ends, however the product rounds.
        inside = bins.clamp(0, BINS_INSIDE - 1)
        bins = torch.where(low, bins.clamp(max=-1), inside.where(~high, bins.clamp(BINS_INSIDE)))
        index = (bins + BINS_OUTSIDE).nan_to_num(0.0).to("cpu", torch.int64).reshape(-1)
        self.bins += torch.bincount(index, minlength=len(self.bins))

    def values(self) -> dict[str, Any]:
        """What was counted, by the names that :class:`ActivationValues` has for it."""
        used = None if self.used is None else torch.nonzero(self.used).flatten()
        levels, total = self.qparams.levels, max(self.total, 1)
        finite = math.isfinite(self.smallest) and math.isfinite(self.largest)
        return {
            "bits": range_bits(self.qparams.quant_min, self.qparams.quant_max),
            "scale": float(self.qparams.scale),
            "zero_point": self.qparams.zero_point,
            "low": self.smallest if finite else None,
            "high": self.largest if finite else None,
            "clipped_low": self.low / total,
            "clipped_high": self.high / total,
            "used_levels": None if used is None else len(used),
            "unused_low": None if used is None else (int(used[0]) if len(used) else levels),
            "unused_high": None
            if used is None
            else (levels - 1 - int(used[-1]) if len(used) else 0),
            "levels": levels,
            "quant_min": self.qparams.quant_min,
            "quant_max": self.qparams.quant_max,
            "histogram": tuple(self.bins.tolist()),
        }


def quantized_activations(converted: GraphModule) -> list[Node]:
    """The quantize nodes of activations whose scale is known before the graph runs."""
    return [
        node
        for node in converted.graph.nodes
        if is_quantize(node) and is_static(node) and not is_constant(source_of(node))
    ]


def observe_activations(
    converted: GraphModule,
    data: object,
    *,
    limit: int | None = None,
    progress: bool | None = None,
) -> Activations:
    """Count the values of every quantized activation, without a float model to compare with.

    Args:
        converted: what ``convert_pt2e`` returns; its inputs are float32.
        data: as :func:`~custom_quantizer.calibration.run.calibrate` takes it.
        limit: use at most that many samples, the first ones.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        CalibrationError: a batch does not hold what the graph takes.
        ConversionError: ``converted`` is no converted graph.
        InputError: there are no samples, or fewer than one batch of a static graph.
    """
    read_converted(converted, integer_io=False)
    graph = GraphInputs.of(converted)
    queue = SampleQueue(graph)
    counters = {
        node: ActivationCounter(qparams_of(converted, node))
        for node in quantized_activations(converted)
    }
    batches = [data] if isinstance(data, (Tensor, dict)) else cast(Iterable[Any], data)
    samples = 0
    with state_kept(converted), exclusive(), torch.no_grad():
        for call in queue.calls(track(batches, "observe", enabled=progress), limit):
            _Watcher(converted, counters).run(*call, enable_io_processing=False)
            samples += graph.batch_size(call)
    if not samples:
        raise InputError(
            f"the data holds {queue.passed} samples, but the graph takes batches of "
            f"{queue.smallest}"
            if queue.passed
            else "the data to look at holds no sample"
        )
    rows: dict[tuple[object, ...], ActivationValues] = {}
    for node, counter in counters.items():
        source = source_of(node)
        row = ActivationValues(source.name, module_path(source), **counter.values())
        # The same tensor in the same format for several users is one tensor.
        rows.setdefault((row.name, row.scale, row.zero_point, row.bits), row)
    return Activations(samples, tuple(rows.values()))


class _Watcher(Interpreter):
    """Runs the graph; counts what goes into each quantize node."""

    def __init__(self, model: GraphModule, counters: dict[Node, ActivationCounter]) -> None:
        super().__init__(model)
        self._counters = counters

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        counter = self._counters.get(n)
        if counter is not None:
            counter.add(self.env[cast(Node, n.args[0])], result)
        return result
