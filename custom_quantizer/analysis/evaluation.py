"""Accuracy of several forms of one model on the same samples, and whether it differs.

A float module, a converted graph, its integer reference and a ``.pte`` are all callables that
return scores. They are shown the same samples in the same order, each in batches of a size that
it takes, and each is compared with the first, sample by sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from custom_quantizer.analysis.fidelity import finite
from custom_quantizer.analysis.paired import (
    CONFIDENCE,
    PairedCounts,
    PairedDifference,
    compare_counts,
    compare_values,
    share_interval,
)
from custom_quantizer.backends.xnnpack import LoweredProgram, StoredProgram
from custom_quantizer.calibration.run import GraphInputs
from custom_quantizer.core.batch import Batch, label_key
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.graph import state_kept
from custom_quantizer.core.progress import track
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import InputError, some
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.interpreter import with_run_time_scales

__all__ = [
    "Evaluation",
    "MetricScore",
    "ModelScore",
    "PairedCounts",
    "PairedDifference",
    "evaluate",
    "inputs_and_labels",
]

Model = Callable[..., Any]

Metric = Callable[[Any, Any], Any]
"""``metric(outputs, labels)``: one score per sample, or one number for the batch."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MetricScore:
    """How one model did by a metric of the user's.

    Attributes:
        name: of the metric.
        value: mean over the samples; of a metric that gives one number per batch, the mean of
            these, weighted by the size of the batch.
        against_first: compared with the first model; ``None`` for the first model itself, and
            where there are no scores per sample.
    """

    name: str
    value: float
    against_first: PairedDifference | None = None


@dataclass(frozen=True)
class ModelScore:
    """How one model did.

    Attributes:
        name: as given to :func:`evaluate`.
        samples: samples it was shown.
        correct: samples whose highest score is the label's; ``None`` without labels or classes.
        agreeing: samples whose highest score is that of the first model; ``None`` where outputs
            are no scores of classes.
        correct5: samples whose label is among the five highest scores; ``None`` as ``correct``,
            and where there are no more than five classes.
        tied: samples whose highest score several classes share. The first of them counts as the
            answer; coarse output scales make ties, which move the accuracy either way.
        slices: top-1 accuracy on disjoint slices of the samples, each 0 to 1.
        against_first: top-1 compared with the first model's.
        metrics: scores by the user's metrics.
    """

    name: str
    samples: int
    correct: int | None
    agreeing: int | None
    correct5: int | None = None
    tied: int = 0
    slices: tuple[float, ...] = ()
    against_first: PairedDifference | None = None
    metrics: tuple[MetricScore, ...] = ()

    @property
    def top1(self) -> float | None:
        """Share of correct samples, 0 to 1; ``None`` without labels."""
        return None if self.correct is None else self.correct / self.samples

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of ``top1``; see :func:`share_interval`."""
        return None if self.correct is None else share_interval(self.correct, self.samples)

    @property
    def top5(self) -> float | None:
        """Share of samples with the label among the five highest scores, 0 to 1."""
        return None if self.correct5 is None else self.correct5 / self.samples

    @property
    def agreement(self) -> float | None:
        """Share of samples on which it agrees with the first model, 0 to 1."""
        return None if self.agreeing is None else self.agreeing / self.samples


@dataclass(frozen=True)
class Evaluation:
    """Scores of several models on the same samples.

    Attributes:
        scores: in the order of the models.
        notes: what a reader of the scores has to know.
    """

    scores: tuple[ModelScore, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelScore:
        for score in self.scores:
            if score.name == name:
                return score
        raise InputError(
            f"no model {name!r} was evaluated; there are {', '.join(s.name for s in self.scores)}"
        )

    @property
    def conclusions(self) -> tuple[str, ...]:
        """For each comparison with the first model, whether it can be told from noise."""
        first = self.scores[0].name
        sentences = []
        for score in self.scores[1:]:
            if score.against_first is not None:
                sentences.append(_conclusion(score.name, first, score.against_first))
            sentences.extend(
                _metric_conclusion(score.name, first, metric.name, metric.against_first)
                for metric in score.metrics
                if metric.against_first is not None
            )
        return tuple(sentences)

    def to_json(self) -> str:
        """The scores as JSON; shares are 0 to 1, an end of an interval that is open is null."""
        return json.dumps(
            {
                "kind": "evaluation",
                "schema_version": SCHEMA_VERSION,
                "confidence": CONFIDENCE,
                "models": [_record(score) for score in self.scores],
                "conclusions": list(self.conclusions),
                "notes": list(self.notes),
            },
            indent=2,
            allow_nan=False,
        )

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table as text: a row of headers, then one row per model."""
        first = self.scores[0].name
        agrees, minus = f"agrees with {first}", f"less {first}"
        table = [_cells(score, agrees, minus) for score in self.scores]
        metrics = [metric.name for metric in self.scores[0].metrics]
        shown = [
            column
            for column in ("model", "correct", "top-1", "top-5", agrees, *metrics, minus, *_TEST)
            if column in ("model", "correct", "top-1", agrees) or any(column in r for r in table)
        ]
        return (tuple(shown), *(tuple(row.get(c, "-") for c in shown) for row in table))

    def __str__(self) -> str:
        lines = table_lines(self.rows())
        if any(score.slices for score in self.scores):
            lines += ["", *self.slice_lines()]
        if self.conclusions or self.notes:
            lines += ["", *self.conclusions, *self.notes]
        return "\n".join(lines)

    def slice_lines(self) -> list[str]:
        """Top-1 on each disjoint slice, one line per model; empty without labels."""
        scores = [score for score in self.scores if score.slices]
        if not scores:
            return []
        rows = [(score.name, *(f"{share:7.2%}" for share in score.slices)) for score in scores]
        return [
            f"top-1 on {len(scores[0].slices)} disjoint slices of the samples",
            *table_lines(rows, headers=False),
        ]


def evaluate(
    models: Mapping[str, Model],
    data: Iterable[Any],
    *,
    metrics: Mapping[str, Metric] | Metric | None = None,
    output: int | None = None,
    slices: int = 1,
    progress: bool | None = None,
) -> Evaluation:
    """Count how often each model is right, and compare each with the first.

    The data are one stream: where models write their buffers, programs and references begin with
    what their graphs hold, modules with what they hold, and all hold the same afterwards.

    Args:
        models: by name: modules, converted graphs, integer references, ``LoweredProgram``,
            ``StoredProgram``, or any callable. One of the tensors that a model returns holds its
            scores, shape ``(batch, classes)``. Programs and references whose inputs and outputs are
            integers take the same float32 data, and what they return is dequantized. Converted
            graphs that quantize at run time are computed by their integer reference, since PyTorch
            would choose one scale for a whole batch; a note says so.
        data: batches: a :class:`~custom_quantizer.app.data.DataSource`, or an iterable of inputs
            (a tensor, a tuple, a dictionary, nested as the models take them, or by the names of
            arguments), or of pairs of inputs and integer labels of shape ``(batch,)``. A dictionary
            of inputs may hold the labels, too, as ``labels``, ``label``, ``targets``, ``target`` or
            ``y``, unless the models take an input of that name.
        metrics: functions of your own, one or several by name. Each gets all that a model returned
            for one batch, and the labels, and returns one score per sample (a tensor of shape
            ``(batch,)``) or one number. Scores per sample are compared between models; numbers
            are only averaged. With metrics every pair is inputs and labels, labels may be any
            tensor with the batch first, and outputs need not be scores of classes.
        output: which tensor holds the scores, from 0; ``None`` is the first, and a note says so
            where there are several.
        slices: into how many disjoint parts of equal size the samples are dealt, one after the
            other, for the accuracy on each.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        InputError: no model or no sample; a batch, the scores or what a metric returns have the
            wrong form; scores are NaN; labels are no class; the folders of ``data`` are other
            classes than the model's; only some batches have labels; there are more slices than
            samples; there is no such output.

    Example:
        >>> evaluate({"float": model, "int8": lowered.run}, source, slices=5)
    """
    if not models:
        raise InputError("there is no model to evaluate")
    if not isinstance(models, Mapping):
        raise InputError(
            f"models is a dictionary of models by name, not {type(models).__name__}: "
            "evaluate({'float': model}, data)"
        )
    if slices < 1:
        raise InputError(f"slices={slices}: the samples make at least one slice")
    if metrics is not None and not isinstance(metrics, Mapping):
        metrics = {getattr(metrics, "__name__", "metric"): metrics}
    metrics = metrics or {}
    for kind, functions in (("model", models), ("metric", metrics)):
        for name, function in functions.items():
            if not callable(function):
                raise InputError(f"{kind} {name} is a {type(function).__name__}, not a function")
    samples = 0
    labelled: bool | None = None
    tallies = {name: _Tally(name, metrics, output) for name in models}
    folders = tuple(getattr(data, "classes", ()))
    given, models = models, {name: with_run_time_scales(model) for name, model in models.items()}
    notes = [
        f"{name}: scales chosen at run time are those of the device, one for each row, pixel or "
        "image; PyTorch's own call of the graph has one for a whole batch"
        for name in models
        if models[name] is not given[name]
    ]
    form = next(filter(None, map(_form_of, models.values())), None)
    taken = frozenset() if form else _required_names(models.values())
    with _states_kept(models.values()):
        for batch in track(_batches(data), "evaluate", enabled=progress):
            inputs, labels = inputs_and_labels(batch, bool(metrics), form, taken)
            if labelled is not None and labelled != (labels is not None):
                raise InputError("some batches have labels and others do not; give all or none")
            labelled = labels is not None
            size = _batch_size(_leaves(inputs) if labels is None else (labels,))
            if not size:
                continue
            samples += size
            first: Tensor | None = None
            for name, model in models.items():
                classes = tallies[name].add(
                    _outputs(name, model, inputs, form, labels), labels, first
                )
                first = classes if first is None else first
                tallies[name].check_folders(folders)
    if not samples:
        raise InputError("the data to evaluate on holds no sample")
    if slices > samples:
        raise InputError(f"{samples} samples do not make {slices} slices")
    reference = next(iter(tallies.values()))
    scores = tuple(tally.score(reference, slices) for tally in tallies.values())
    several = max(tally.outputs for tally in tallies.values())
    if output is None and several > 1 and reference.is_classifier:
        first_of = f"scores are those of output 0, the first of {several}"
        notes.append(f"{first_of}; output=N chooses another")
    return Evaluation(scores, tuple(notes))


def _batches(data: Any) -> Iterable[Any]:
    """The batches; one tensor or dictionary is one, whose rows or keys nobody means."""
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        hint = "; read files with custom_quantizer.load_data" if isinstance(data, str) else ""
        raise InputError(f"data is an iterable of batches, not {type(data).__name__}{hint}")
    if isinstance(data, tuple) and len(data) == 2 and _are_labels(data[1]):
        raise InputError("one batch of inputs and labels is data in a list: [(inputs, labels)]")
    return data


class _Tally:
    """What is counted of one model: a few bytes per sample."""

    def __init__(self, name: str, metrics: Mapping[str, Metric], output: int | None) -> None:
        self.name = name
        self.outputs = 0
        self._metrics = metrics
        self._output = output or 0
        self._samples = self._agreeing = self._tied = 0
        self._classes = 0
        self.is_classifier = True
        self._ranks: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
        self._sums: dict[str, list[float]] = {}

    def add(self, outputs: Any, labels: Tensor | None, first: Tensor | None) -> Tensor | None:
        """Count a batch; returns the class of each sample, where there are classes."""
        leaves = pytree.tree_leaves(outputs)
        self.outputs = len(leaves)
        if not 0 <= self._output < len(leaves):
            raise InputError(
                f"{self.name} has no output {self._output}: it returns {len(leaves)}, from 0"
            )
        scores = leaves[self._output]
        size = len(scores)
        self._samples += size
        for metric, function in self._metrics.items():
            self._measure(metric, function(outputs, labels), size)
        if scores.dim() != 2:
            if not self._metrics:
                raise InputError(
                    f"{self.name} returns scores of shape {tuple(scores.shape)}, not "
                    "(batch, classes); pass metrics= for outputs of another kind"
                )
            self.is_classifier = False
            return None
        # Models may be on several devices; what is compared is in one place.
        scores = scores.detach().cpu()
        if scores.is_floating_point() and bool(scores.isnan().any()):
            bad = int(scores.isnan().any(dim=1).sum())
            raise InputError(f"{self.name} returns NaN for {bad} of {size} samples of a batch")
        classes: Tensor = scores.argmax(dim=1)
        self._classes = scores.shape[1]
        self._tied += int(((scores == scores.amax(dim=1, keepdim=True)).sum(dim=1) > 1).sum())
        self._agreeing += int((classes == (classes if first is None else first)).sum())
        if labels is not None and _are_labels(labels):
            self._ranks.append(self._rank(scores, labels.cpu()))
        return classes

    def check_folders(self, names: Sequence[str]) -> None:
        """Refuse folders that cannot be the model's classes: their numbers mean something else."""
        if names and self.is_classifier and self._ranks and len(names) != self._classes:
            raise InputError(
                f"the data has folders of {len(names)} classes ({some(names)}) and {self.name} "
                f"scores {self._classes}: folders in the order of their names are not its classes; "
                "say which are, in the order of the model: load_data(..., classes=names), or "
                "--classes FILE"
            )

    def _rank(self, scores: Tensor, labels: Tensor) -> Tensor:
        """How many classes come before the label's, equal scores in the order of the classes."""
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= scores.shape[1]:
            raise InputError(
                f"labels go from {low} to {high}, but {self.name} knows {scores.shape[1]} classes, "
                f"0 to {scores.shape[1] - 1}"
            )
        own = scores.gather(1, labels.long()[:, None])
        earlier = torch.arange(scores.shape[1]) < labels[:, None]
        return ((scores > own) | ((scores == own) & earlier)).sum(dim=1).to(torch.int32)

    def _measure(self, metric: str, value: Any, size: int) -> None:
        """Take what a metric returned: one score per sample, or one number."""
        given = torch.as_tensor(value).detach().to(torch.float64).cpu()
        if given.shape == (size,) and (isinstance(value, Tensor) or size > 1):
            self._values[metric].append(given)
        elif given.numel() == 1:
            self._sums.setdefault(metric, []).append(float(given) * size)
        else:
            raise InputError(
                f"metric {metric} returned shape {tuple(given.shape)} for {size} samples of "
                f"{self.name}: return one score per sample, ({size},), or one number"
            )
        if not bool(given.isfinite().all()):
            raise InputError(f"metric {metric} of {self.name} is not finite")

    def score(self, first: _Tally, slices: int) -> ModelScore:
        """All that was counted; ``first`` is the model to compare with."""
        compared = self is not first
        correct = correct5 = None
        shares: tuple[float, ...] = ()
        difference = None
        if self._ranks and self.is_classifier:
            ranks = torch.cat(self._ranks)
            right = ranks == 0
            correct = int(right.sum())
            correct5 = int((ranks < 5).sum()) if self._classes > 5 else None
            if slices > 1:
                shares = tuple(float(right[i::slices].double().mean()) for i in range(slices))
            if compared and first._ranks:
                difference = compare_counts(_paired(torch.cat(first._ranks) == 0, right))
        return ModelScore(
            self.name,
            self._samples,
            correct,
            self._agreeing if self.is_classifier and first.is_classifier else None,
            correct5,
            self._tied,
            shares,
            difference,
            tuple(self._metric(metric, first if compared else None) for metric in self._metrics),
        )

    def _metric(self, metric: str, first: _Tally | None) -> MetricScore:
        if metric in self._sums:
            if self._values[metric]:
                raise InputError(f"metric {metric} returned scores for some batches, numbers later")
            return MetricScore(metric, math.fsum(self._sums[metric]) / self._samples)
        values = torch.cat(self._values[metric])
        mean = math.fsum(values.tolist()) / len(values)
        if first is None or metric in first._sums:
            return MetricScore(metric, mean)
        others = torch.cat(first._values[metric])
        if bool((((values == 0) | (values == 1)) & ((others == 0) | (others == 1))).all()):
            return MetricScore(metric, mean, compare_counts(_paired(others == 1, values == 1)))
        return MetricScore(metric, mean, compare_values((values - others).tolist()))


def _paired(first: Tensor, second: Tensor) -> PairedCounts:
    return PairedCounts(
        both=int((first & second).sum()),
        only_first=int((first & ~second).sum()),
        only_second=int((~first & second).sum()),
        neither=int((~first & ~second).sum()),
    )


def inputs_and_labels(
    batch: Any,
    any_labels: bool = False,
    form: CallForm | None = None,
    taken: Collection[object] = (),
) -> tuple[Any, Tensor | None]:
    """The inputs of a batch, as the model nests them, and its labels, if it has any.

    Args:
        batch: as :func:`evaluate` takes it.
        any_labels: whether labels may be any tensor, and not only integers of shape ``(batch,)``.
        form: of the model's inputs; what they tell of a pair decides whether it holds labels.
        taken: names of inputs that are no labels, where there is no form.

    Raises:
        InputError: it is no batch, or its tensors have different numbers of samples.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    pair = pair and (_are_labels(batch[1]) or (any_labels and isinstance(batch[1], Tensor)))
    if pair and form is not None and isinstance(form.sort(batch[0]), str):
        pair = isinstance(form.sort(batch), str)
    inputs, labels = batch if isinstance(batch, Batch) or pair else (batch, None)
    key = label_key(inputs, taken if form is None else form.keys) if labels is None else None
    if key is not None and (_are_labels(inputs[key]) or any_labels):
        labels = inputs[key]
    values = _leaves(inputs) if form is None else form.sort(inputs)
    if isinstance(values, str):  # what is wrong, the model says
        values = _leaves(inputs)
    tensors = [value for value in (*values, labels) if isinstance(value, Tensor)]
    sizes = [len(value) for value in tensors if value.dim()]
    if not sizes or not all(map(_is_value, values)):
        raise InputError(
            "a batch is what the model takes (a tensor, a tuple of tensors, a dictionary, ...), or "
            "a pair of this and integer labels of shape (batch,), not "
            f"{type(batch).__name__}"
        )
    if len(set(sizes)) > 1:
        raise InputError(
            "the inputs and labels of a batch have different numbers of samples: "
            f"{', '.join(map(str, sizes))}"
        )
    return inputs, labels


def _leaves(inputs: Any) -> list[Any]:
    """All values in the inputs of a batch; mappings need not be known to PyTorch."""
    if isinstance(inputs, Mapping):
        return [leaf for value in inputs.values() for leaf in _leaves(value)]
    if isinstance(inputs, (tuple, list)):
        return [leaf for value in inputs for leaf in _leaves(value)]
    return pytree.tree_leaves(inputs)


def _is_value(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, (Tensor, int, float))


def _are_labels(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 1
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )


def _outputs(
    name: str, model: Model, inputs: Any, form: CallForm | None, labels: Tensor | None
) -> Any:
    """What ``model`` returns for all samples of a batch, put together again."""
    parts: list[list[Tensor]] = []
    structure: Any = None
    call, values = _call_of(model, inputs, form, labels)
    for chunk, size, count in _chunks(values, *_batch_limits(model)):
        with exclusive(), torch.no_grad():
            leaves, structure = pytree.tree_flatten(_dequantized(model, call(chunk)))
        scores = leaves[0] if leaves else None
        if not _has_batch(scores, size):
            raise InputError(f"{name} returns no tensor of scores with the batch first")
        # Only what has the batch first can be put together; anything else is the last chunk's.
        parts.append([leaf[:count] if _has_batch(leaf, size) else leaf for leaf in leaves])
    if len(parts) == 1:
        return pytree.tree_unflatten(parts[0], structure)
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[-1]
        for column in zip(*parts, strict=True)
    ]
    return pytree.tree_unflatten(joined, structure)


def _call_of(
    model: Model, inputs: Any, form: CallForm | None, labels: Tensor | None
) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """How ``model`` is called with a flat list of values, and the values of a batch.

    Args:
        model: to call.
        inputs: of a batch.
        form: of the first model that was captured; plain modules are called as it was.
        labels: which may be in a dictionary of inputs, and are no input by name.

    Raises:
        InputError: they are nested as the model does not take them.
    """
    owner = getattr(model, "__self__", model)
    own = _form_of(model)
    form = own or form
    if form is not None:
        values = form.sort(inputs)
        if not isinstance(values, str):
            if isinstance(owner, (LoweredProgram, StoredProgram, IntegerReference)):
                return lambda flat: model(*flat), values
            return lambda flat: _called(model, *form.arguments(flat)), values
        if not _is_flat(inputs):
            raise InputError(f"a batch {values}")
    if isinstance(owner, StoredProgram) and not _is_flat(inputs):
        raise InputError(
            "a .pte file does not say how its inputs are nested: give each batch as a tuple of "
            "them, in the order of the program, or evaluate it beside the graph it was made of"
        )
    if not isinstance(inputs, Mapping):
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        values, structure = pytree.tree_flatten((given, {}))
    elif _takes_names(owner, named := {k: v for k, v in inputs.items() if v is not labels}):
        values, structure = pytree.tree_flatten(((), named))
    else:
        values, structure = pytree.tree_flatten(((dict(inputs),), {}))
    return lambda flat: _called(model, *pytree.tree_unflatten(flat, structure)), values


def _called(model: Model, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _is_flat(inputs: Any) -> bool:
    values = (inputs,) if isinstance(inputs, Tensor) else inputs
    return isinstance(values, (tuple, list)) and all(isinstance(v, Tensor) for v in values)


def _takes_names(model: Any, names: Mapping[Any, Any]) -> bool:
    """Whether a model that was not captured has arguments of these names."""
    try:
        taken = signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):
        return False
    return all(name in taken for name in names)


def _required_names(models: Iterable[Any]) -> frozenset[str]:
    """Arguments that models which were not captured cannot be called without."""
    names: set[str] = set()
    for model in models:
        try:
            taken = signature(model.forward if isinstance(model, nn.Module) else model).parameters
        except (TypeError, ValueError):
            continue
        names.update(name for name, argument in taken.items() if argument.default is argument.empty)
    return frozenset(names)


def _form_of(model: Model) -> CallForm | None:
    """Arguments of what was captured; ``None`` for others."""
    owner = getattr(model, "__self__", model)
    if isinstance(owner, (LoweredProgram, StoredProgram)):
        return owner.form
    if isinstance(owner, IntegerReference):
        owner = owner.graph.model
    return CallForm.of(owner) if isinstance(owner, GraphModule) else None


def _dequantized(model: Model, outputs: Any) -> Any:
    """Outputs in float32, so that metrics see the same of all models."""
    owner = getattr(model, "__self__", model)
    if isinstance(owner, (LoweredProgram, StoredProgram, IntegerReference)):
        return owner.dequantized(outputs)
    return outputs


@contextmanager
def _states_kept(models: Iterable[Model]) -> Iterator[None]:
    """Let all begin with their first state, and leave it to them."""
    owners = [getattr(model, "__self__", model) for model in models]
    with ExitStack() as stack:
        for owner in owners:
            if isinstance(owner, (LoweredProgram, IntegerReference)):
                owner.reset()
                stack.callback(owner.reset)
            elif isinstance(owner, nn.Module):
                stack.enter_context(state_kept(owner))
        yield


def _has_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[:1] == (size,)


def _chunks(
    values: list[Any], smallest: int, largest: int | None
) -> Iterator[tuple[list[Any], int, int]]:
    """Cut a batch to sizes the model takes; the last sample is repeated to fill the last.

    Yields:
        Values of a call, their batch, and the samples in it that were not repeated. What has no
        dimension is the same in all.
    """
    total = _batch_size(values)
    step = largest or max(total, 1)
    for start in range(0, total, step):
        count = min(step, total - start)
        filler = max(smallest - count, 0)
        chunk = []
        for value in values:
            if isinstance(value, Tensor) and value.dim():
                value = value[start : start + count]
                if filler:
                    value = torch.cat((value, value[-1:].repeat_interleave(filler, 0)))
            chunk.append(value)
        yield chunk, count + filler, count


def _batch_size(values: Iterable[Any]) -> int:
    return next(len(value) for value in values if isinstance(value, Tensor) and value.dim())


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


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------


def _record(score: ModelScore) -> dict[str, Any]:
    return {
        **asdict(score),
        "top1": score.top1,
        "top1_interval": score.top1_interval,
        "top5": score.top5,
        "agreement": score.agreement,
        "against_first": _difference_record(score.against_first),
        "metrics": [
            {**asdict(metric), "against_first": _difference_record(metric.against_first)}
            for metric in score.metrics
        ],
    }


def _difference_record(difference: PairedDifference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {**finite(asdict(difference)), "is_noise": difference.is_noise}


_TEST = ("95 % interval", "p")


def _cells(score: ModelScore, agrees: str, minus: str) -> dict[str, str]:
    """The cells of a row that hold something, by column."""
    cells = {"model": score.name}
    if score.top1 is not None:
        cells["correct"] = f"{score.correct:,} / {score.samples:,}"
        cells["top-1"] = f"{score.top1:.2%}"
    if score.top5 is not None:
        cells["top-5"] = f"{score.top5:.2%}"
    if score.agreeing is not None:
        cells[agrees] = f"{score.agreeing:,} / {score.samples:,}"
    cells.update({metric.name: f"{metric.value:.5g}" for metric in score.metrics})
    found = score.against_first
    if found is not None:
        interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
        values = (f"{100 * found.difference:+.2f}", interval, f"{found.p_value:.2g}")
        cells.update(zip((minus, *_TEST), values, strict=True))
    return cells


def _conclusion(name: str, first: str, found: PairedDifference) -> str:
    counts = cast(PairedCounts, found.counts)
    interval = f"95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f} points"
    if counts.only_first == counts.only_second == 0:
        return (
            f"{name} and {first} are right on exactly the same of {counts.samples:,} samples, so "
            f"no difference can be told from noise ({interval})."
        )
    return (
        f"The difference of {name} to {first}, {100 * found.difference:+.2f} points, "
        f"{_verdict(found)}: {counts.only_second:,} "
        f"{'sample is' if counts.only_second == 1 else 'samples are'} right only in {name}, "
        f"{counts.only_first:,} only in {first} ({interval}, exact test p = {found.p_value:.2g})."
    )


def _metric_conclusion(name: str, first: str, metric: str, found: PairedDifference) -> str:
    return (
        f"{metric}: the difference of {name} to {first}, {found.difference:+.4g}, "
        f"{_verdict(found)} (95 % interval {found.low:+.4g} to {found.high:+.4g}, "
        f"p = {found.p_value:.2g})."
    )


def _verdict(found: PairedDifference) -> str:
    return "cannot be told from noise" if found.is_noise else "is larger than noise would explain"
