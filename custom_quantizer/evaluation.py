"""Accuracy of several forms of one model on the same samples.

A float module, a converted graph, its integer reference and a ``.pte`` are all callables that
return scores. They are shown the same samples in the same order, each in batches of a size that
it takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer._progress import track
from custom_quantizer.calibration import GraphInputs
from custom_quantizer.errors import InputError
from custom_quantizer.integer import IntegerReference
from custom_quantizer.sources import Batch
from custom_quantizer.xnnpack import LoweredProgram, StoredProgram

__all__ = ["Evaluation", "ModelScore", "evaluate"]

Model = Callable[..., Any]


@dataclass(frozen=True)
class ModelScore:
    """How one model did.

    Attributes:
        name: as given to :func:`evaluate`.
        samples: samples it was shown.
        correct: samples whose highest score is the label's; ``None`` without labels.
        agreeing: samples whose highest score is that of the first model.
    """

    name: str
    samples: int
    correct: int | None
    agreeing: int

    @property
    def top1(self) -> float | None:
        """Share of correct samples, 0 to 1; ``None`` without labels."""
        return None if self.correct is None else self.correct / self.samples

    @property
    def agreement(self) -> float:
        """Share of samples on which it agrees with the first model, 0 to 1."""
        return self.agreeing / self.samples


@dataclass(frozen=True)
class Evaluation:
    """Scores of several models on the same samples.

    Attributes:
        scores: in the order of the models.
    """

    scores: tuple[ModelScore, ...]

    def __getitem__(self, name: str) -> ModelScore:
        for score in self.scores:
            if score.name == name:
                return score
        raise InputError(
            f"no model {name!r} was evaluated; there are {', '.join(s.name for s in self.scores)}"
        )

    def to_json(self) -> str:
        """The scores as JSON; shares are 0 to 1."""
        return json.dumps(
            {
                "models": [
                    {
                        "name": score.name,
                        "samples": score.samples,
                        "correct": score.correct,
                        "top1": score.top1,
                        "agreeing": score.agreeing,
                        "agreement": score.agreement,
                    }
                    for score in self.scores
                ]
            },
            indent=2,
        )

    def __str__(self) -> str:
        first = self.scores[0].name
        rows = [("model", "correct", "top-1", f"agrees with {first}")]
        for score in self.scores:
            share = "-" if score.top1 is None else f"{score.top1:.2%}"
            count = "-" if score.correct is None else f"{score.correct:,} / {score.samples:,}"
            rows.append((score.name, count, share, f"{score.agreeing:,} / {score.samples:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))]
            ).rstrip()
            for row in rows
        )


def evaluate(
    models: Mapping[str, Model], data: Iterable[Any], *, progress: bool | None = None
) -> Evaluation:
    """Count how often each model is right, and how often it agrees with the first.

    Args:
        models: by name: modules, converted graphs, integer references, ``LoweredProgram``,
            ``StoredProgram``, or any callable. The first tensor a model returns holds its scores,
            shape ``(batch, classes)``.
        data: batches: a :class:`~custom_quantizer.sources.DataSource`, or an iterable of input
            tensors, or of pairs of inputs (a tensor or a tuple of tensors) and integer labels of
            shape ``(batch,)``.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        InputError: no model or no sample; a batch or the scores have the wrong form; only some
            batches have labels.
    """
    if not models:
        raise InputError("there is no model to evaluate")
    samples = 0
    labelled: bool | None = None
    correct = dict.fromkeys(models, 0)
    agreeing = dict.fromkeys(models, 0)
    for batch in track(data, "evaluate", enabled=progress):
        inputs, labels = _inputs_and_labels(batch)
        if labelled is not None and labelled != (labels is not None):
            raise InputError("some batches have labels and others do not; give all or none")
        labelled = labels is not None
        if not len(inputs[0]):
            continue
        samples += len(inputs[0])
        first: Tensor | None = None
        for name, model in models.items():
            classes = _classes(name, model, inputs)
            first = classes if first is None else first
            agreeing[name] += int((classes == first).sum())
            if labels is not None:
                correct[name] += int((classes == labels).sum())
    if not samples:
        raise InputError("the data to evaluate on holds no sample")
    return Evaluation(
        tuple(
            ModelScore(name, samples, correct[name] if labelled else None, agreeing[name])
            for name in models
        )
    )


def _inputs_and_labels(batch: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and _are_labels(batch[1])
    inputs, labels = batch if isinstance(batch, Batch) or pair else (batch, None)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    tensors = [value for value in (*inputs, labels) if value is not None]
    if not inputs or not all(isinstance(value, Tensor) and value.dim() for value in tensors):
        raise InputError(
            "a batch is a tensor, a tuple of tensors, or a pair of these and integer labels of "
            f"shape (batch,), not {type(batch).__name__}"
        )
    if len({len(value) for value in tensors}) > 1:
        raise InputError(
            "the inputs and labels of a batch have different numbers of samples: "
            f"{', '.join(str(len(value)) for value in tensors)}"
        )
    return inputs, labels


def _are_labels(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 1
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )


def _classes(name: str, model: Model, inputs: tuple[Tensor, ...]) -> Tensor:
    """The class with the highest score of each sample, int64 ``(batch,)``."""
    classes = []
    for chunk, count in _chunks(inputs, *_batch_limits(model)):
        with torch.no_grad():
            leaves = pytree.tree_leaves(model(*chunk))
        scores = leaves[0] if leaves else None
        if not isinstance(scores, Tensor) or scores.shape[:1] != chunk[0].shape[:1]:
            raise InputError(f"{name} returns no tensor of scores with the batch first")
        if scores.dim() != 2:
            raise InputError(
                f"{name} returns scores of shape {tuple(scores.shape)}, not (batch, classes)"
            )
        classes.append(scores.argmax(dim=1)[:count])
    return torch.cat(classes)


def _chunks(
    inputs: tuple[Tensor, ...], smallest: int, largest: int | None
) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """Cut a batch to sizes the model takes; the last sample is repeated to fill the last."""
    total = len(inputs[0])
    step = largest or max(total, 1)
    for start in range(0, total, step):
        count = min(step, total - start)
        chunk = [value[start : start + count] for value in inputs]
        if count < smallest:
            filler = smallest - count
            chunk = [torch.cat((value, value[-1:].repeat_interleave(filler, 0))) for value in chunk]
        yield tuple(chunk), count


def _batch_limits(model: Model) -> tuple[int, int | None]:
    """Smallest and largest batch; a plain module takes any."""
    owner = getattr(model, "__self__", model)
    if isinstance(owner, (LoweredProgram, StoredProgram)):
        first = owner.contents.inputs[0]
        return (1 if first.dynamic else first.shape[0]), first.shape[0]
    if isinstance(owner, IntegerReference):
        owner = owner.graph.model
    if isinstance(owner, GraphModule):
        return GraphInputs.of(owner).batch or (1, None)
    return 1, None
