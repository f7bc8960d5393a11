"""The samples that losses are measured on, in batches of the size that the graph takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.analysis.evaluation import inputs_and_labels
from custom_quantizer.calibration.run import GraphInputs
from custom_quantizer.errors import InputError

__all__ = ["Samples"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in memory.

    Attributes:
        batches: one value for each placeholder of the graph, and the labels, if there are any.
        unused: samples left over, too few for a batch.
    """

    batches: tuple[tuple[list[Any], Tensor | None], ...] = field(repr=False)
    count: int
    unused: int = 0

    @classmethod
    def collect(
        cls, model: GraphModule, data: object, limit: int, any_labels: bool = False
    ) -> Samples:
        """Take the first ``limit`` samples of ``data``.

        Args:
            model: captured or prepared.
            data: as :func:`~custom_quantizer.calibration.run.calibrate` takes it.
            limit: at least 1.
            any_labels: labels may be any tensor with the batch first.

        Raises:
            CalibrationError: a batch does not hold what the graph takes.
            InputError: there are fewer samples than a batch of the graph.
        """
        if limit < 1:
            raise InputError(f"samples={limit}: at least one is needed")
        graph = GraphInputs.of(model)
        whole: list[Any] | None = None
        labels: list[Tensor | None] = []
        single = isinstance(data, (Tensor, Mapping))
        for index, batch in enumerate([data] if single else cast("Iterable[Any]", data)):
            given, answers = inputs_and_labels(batch, any_labels=any_labels, form=graph.form)
            values = graph.fit(given, f"batch {index}")
            whole = values if whole is None else graph.join(whole, values)
            labels.append(answers)
            if graph.batch_size(whole) >= limit:
                break
        if whole is None:
            raise InputError("the data holds no sample; a generator that was used up is empty")
        return cls._cut(graph, whole, labels, limit)

    @classmethod
    def _cut(
        cls, graph: GraphInputs, whole: list[Any], labels: list[Tensor | None], limit: int
    ) -> Samples:

        known = [found for found in labels if found is not None]
        if known and len(known) < len(labels):
            raise InputError("some batches have labels and others do not; give all or none")
        answers = torch.cat(known) if known else None
        low, high = graph.batch or (1, None)
        total = min(graph.batch_size(whole), limit)
        size = min(high or _BATCH, _BATCH) if low != high else low
        if total < low:
            raise InputError(
                f"the data holds {total} samples, but the graph takes batches of {low}"
            )
        batches = []
        used = 0
        while total - used >= max(low, 1):
            stop = min(used + size, total)
            part = None if answers is None else answers[used:stop]
            batches.append((graph.take(whole, used, stop), part))
            used = stop
        return cls(tuple(batches), used, total - used)

    def split(self, held_back: float) -> tuple[Samples, Samples]:
        """The first batches, and the last share of them, at least one each.

        Raises:
            InputError: there is one batch only.
        """
        if len(self.batches) < 2:
            raise InputError(
                f"the data make one batch of {self.count} samples, and a part of them has to be "
                "held back to measure with: give more data, validation=, or an example with a "
                "smaller batch"
            )
        last = max(1, round(len(self.batches) * held_back))
        return self._of(self.batches[:-last]), self._of(self.batches[-last:])

    @staticmethod
    def _of(batches: tuple[tuple[list[Any], Tensor | None], ...]) -> Samples:
        def size(values: list[Any]) -> int:
            return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1)

        return Samples(batches, sum(size(values) for values, _ in batches))

    def inputs(self) -> Iterator[tuple[Any, ...]]:
        """What a calibration takes."""
        for values, _ in self.batches:
            yield tuple(values)

    @property
    def has_classes(self) -> bool:
        """Whether there are labels that are numbers of classes."""
        labels = self.batches[0][1]
        return labels is not None and labels.dim() == 1 and not labels.is_floating_point()

    def tensors(self) -> Iterator[Tensor]:
        """All of it, for a fingerprint."""
        for values, labels in self.batches:
            for value in (*values, labels):
                if isinstance(value, Tensor):
                    yield value


_BATCH = 64
"""Samples at a time where the graph takes any number: bounds the memory of activations."""
