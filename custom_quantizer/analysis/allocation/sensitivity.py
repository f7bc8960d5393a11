"""How much of its outputs a network loses when one weight, or one activation, gets narrower.

Everything else stays in float, so that each number is the loss of one choice alone. It is measured
twice:

- *truly*: the network is computed with that one value rounded, and its outputs are compared;
- *by an estimate* that needs no such computation. With ``J`` the derivative of the outputs by the
  value and ``d`` its rounding error, the error of the outputs is ``J d`` to first order. For a
  vector ``r`` of independent random signs, ``E[(r^T J d)^2] = |J d|^2``; and ``r^T J`` is what one
  backward pass gives, for all values of the network at once. So a few backward passes tell about
  every width of every op.

**Loss** is the noise of the outputs relative to their signal, ``sum((x - y)^2) / sum(x^2)``, the
mean over the outputs of the model; -10 log10 of it is the SQNR in dB. It adds up: rounding errors
of different values are close to uncorrelated, so many choices make about the sum of their noise.
With a metric of the user's, it is what the metric falls by.

References:
    M. F. Hutchinson. A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines. Communications in Statistics 19(2), 1990.
    Z. Dong et al. HAWQ-V2: Hessian aware trace-weighted quantization of neural networks. NeurIPS
    2020. https://arxiv.org/abs/1911.03852 (the same, for the training loss).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.utils._pytree as pytree
from scipy.stats import spearmanr
from torch import Tensor

from custom_quantizer.analysis.allocation.choices import Choices, TensorGroup, Unit
from custom_quantizer.analysis.allocation.replay import Change, Replay
from custom_quantizer.analysis.allocation.samples import Samples
from custom_quantizer.analysis.evaluation import Metric
from custom_quantizer.analysis.fidelity import finite
from custom_quantizer.calibration.observers import ActivationObserver, WeightObserver
from custom_quantizer.calibration.ranges import kind_of_observer, solve
from custom_quantizer.calibration.run import calibrate
from custom_quantizer.core.arithmetic import along
from custom_quantizer.core.checkpoint import CheckpointFile, fingerprint
from custom_quantizer.core.grid import fake_quantize
from custom_quantizer.core.noise import inner_product, inner_products
from custom_quantizer.core.progress import track
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.errors import InputError

__all__ = ["Kind", "Loss", "Sensitivity", "measure_sensitivity", "metric_total"]

Kind = Literal["weight", "activation"]

SCHEMA_VERSION = 1

ALL_ACTIVATIONS = "all activations"
"""Name of the row where all activations have the only format there is to choose from."""

_FORMAT = "custom_quantizer.sensitivity"


@dataclass(frozen=True)
class Loss:
    """What one choice costs alone.

    Attributes:
        name: of the op whose weight it is, or of the tensor.
        path: of the module.
        kind: what is made narrower.
        width: such as ``w4`` or ``a8``.
        noise: of the outputs, relative to their signal; ``None`` where only estimated.
        estimate: of ``noise``; ``None`` where the graph could not be differentiated.
        metric: what the user's metric falls by; ``None`` without one.
    """

    name: str
    path: str
    kind: Kind
    width: str
    noise: float | None
    estimate: float | None
    metric: float | None = None

    @property
    def loss(self) -> float:
        """What is minimized: the metric's fall, else the noise, else its estimate."""
        known = (self.metric, self.noise, self.estimate)
        return next(value for value in known if value is not None)

    @property
    def sqnr(self) -> float | None:
        """``noise`` in dB; infinite where there is none."""
        return None if self.noise is None else to_db(self.noise)


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`custom_quantizer.sensitivity` found.

    Attributes:
        losses: weights first, both in graph order, the first scheme's width first.
        schemes: names of the candidates.
        samples: that were computed.
        metric: name of the user's metric, if there is one.
        correlation: by ``weight``, ``activation`` and ``all``: Spearman's rank correlation of
            estimates and true losses; ``nan`` where there are fewer than three.
        forwards: cost of each part, in float forwards of the samples.
        seconds: of this call; less after resuming.
        notes: what a reader has to know.
    """

    losses: tuple[Loss, ...]
    schemes: tuple[str, ...]
    samples: int
    metric: str | None
    correlation: Mapping[str, float]
    forwards: Mapping[str, float]
    seconds: float = field(compare=False)
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: tuple[str, str]) -> Loss:
        """The loss of an op's weight or of a tensor at a width: ``found["conv2d", "w4"]``."""
        for loss in self.losses:
            if (loss.name, loss.width) == key:
                return loss
        names = dict.fromkeys(f"{loss.name} {loss.width}" for loss in self.losses)
        raise InputError(f"nothing was measured of {key[0]} at {key[1]}; there is {list(names)}")

    def ranked(self) -> tuple[Loss, ...]:
        """The most costly first."""
        return tuple(sorted(self.losses, key=lambda loss: -loss.loss))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "kind": "sensitivity",
            "schema_version": SCHEMA_VERSION,
            **cast("dict[str, Any]", finite(asdict(self))),
        }

    def to_json(self) -> str:
        """As JSON; what is not finite is null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        what = "SQNR of the outputs in dB" if self.metric is None else f"fall of {self.metric}"
        lines = [f"{self.samples:,} samples; {what} when one value alone is rounded", ""]
        for kind, title in (("weight", "weight of"), ("activation", "activation")):
            rows = [loss for loss in self.losses if loss.kind == kind]
            if rows:
                lines += [*self._table(title, rows), ""]
        ranks = [
            f"{name} {value:.2f}" for name, value in self.correlation.items() if value == value
        ]
        if ranks:
            lines.append(f"rank correlation of estimates and true losses: {', '.join(ranks)}")
        cost = ", ".join(f"{value:.1f} {name}" for name, value in self.forwards.items())
        lines.append(f"cost in float forwards of the samples: {cost}")
        return "\n".join([*lines, *self.notes])

    def _table(self, title: str, rows: Sequence[Loss]) -> list[str]:
        widths = list(dict.fromkeys(loss.width for loss in rows))
        cells = {(loss.name, loss.width): loss for loss in rows}
        paths = {loss.name: loss.path for loss in rows}
        header = [title, "module"]
        for width in widths:
            header += [width, "est."]
        table = [header]
        for name, path in paths.items():
            row = [name, path]
            for width in widths:
                found = cells.get((name, width))
                row += ["", ""] if found is None else self._cells(found)
            table.append(row)
        return table_lines(table, left=(0, 1))

    def _cells(self, loss: Loss) -> list[str]:
        estimate = "-" if loss.estimate is None else f"{to_db(loss.estimate):.1f}"
        if self.metric is not None:
            return [f"{loss.metric:.4g}", estimate]
        return ["-" if loss.sqnr is None else f"{loss.sqnr:.1f}", estimate]


def to_db(noise: float) -> float:
    """Relative noise as SQNR in dB."""
    return math.inf if noise <= 0 else -10 * math.log10(noise)


# ---------------------------------------------------------------------------------------------
# What is tried
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """One choice: where values change, and how."""

    name: str
    path: str
    kind: Kind
    width: str
    changes: Mapping[str, Change]


def _trials(choices: Choices) -> list[_Trial]:
    trials = [
        _Trial(unit.name, unit.path, "weight", width, dict.fromkeys(unit.observers, change))
        for unit in choices.layers
        for width, change in _weight_changes(unit)
    ]
    changes = {
        (group.name, width): (group, _activation_change(choices, group, fmt))
        for group in choices.groups
        for width, fmt in group.formats.items()
    }
    if len(choices.activations) == 1:
        together = {name: change for group, change in changes.values() for name in group.observers}
        width = choices.activations[0]
        return [*trials, _Trial(ALL_ACTIVATIONS, "", "activation", width, together)]
    return trials + [
        _Trial(name, group.path, "activation", width, dict.fromkeys(group.observers, change))
        for (name, width), (group, change) in changes.items()
    ]


def _weight_changes(unit: Unit) -> Iterator[tuple[str, Change]]:
    for width, fmt in unit.formats.items():
        observer = WeightObserver(fmt, unit.axis, unit.name, dtype=fmt.format.storage_dtype)
        yield width, partial(_round_weight, observer)


def _round_weight(observer: WeightObserver, weight: Tensor) -> Tensor:
    """The weight as conversion would store it, in float again."""
    scale = observer.scale(weight)
    integers = observer.integers(weight, scale)
    spread = along(scale, observer.ch_axis, weight) if scale.dim() else scale
    return integers.to(weight.dtype) * spread


def _activation_change(choices: Choices, group: TensorGroup, fmt: TensorScheme) -> Change:
    observer = observer_of(choices, group)
    return partial(fake_quantize, qparams=solve(observer.statistics, fmt))


def observer_of(choices: Choices, group: TensorGroup) -> ActivationObserver:
    """The one observer of all tensors of a group."""
    target = next(n.target for n in choices.prepared.graph.nodes if n.name == group.observers[0])
    return cast(ActivationObserver, choices.prepared.get_submodule(str(target)))


def calibrate_choices(choices: Choices, samples: Samples) -> None:
    """Let the observers record what every candidate needs."""
    for group in choices.groups:
        if any(kind_of_observer(fmt.observer) == "counts" for fmt in group.formats.values()):
            observer_of(choices, group).record_counts()
    calibrate(choices.prepared, samples.inputs(), progress=False)


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


class _Sums:
    """What is added up over batches, in float64; all of it goes into the checkpoint."""

    def __init__(self, trials: int, outputs: int) -> None:
        self.errors = torch.zeros(trials, outputs, dtype=torch.float64)
        self.estimates = torch.zeros(trials, dtype=torch.float64)
        self.metrics = torch.zeros(trials + 1, dtype=torch.float64)
        self.calls = torch.zeros(2, dtype=torch.int64)
        self.done = torch.zeros(1, dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in vars(self).items():
            if tensors[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
            setattr(self, name, tensors[name])


def measure_sensitivity(
    choices: Choices,
    samples: Samples,
    *,
    metric: Metric | None = None,
    estimate_only: bool = False,
    probes: int = 4,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure what every choice costs alone; see :func:`custom_quantizer.sensitivity`.

    Args:
        choices: of one network; its observers are calibrated here.
        samples: to calibrate and to measure with.
        metric: more is better.
        estimate_only: leave out the true losses.
        probes: backward passes for each batch.
        seed: of the random signs.
        checkpoint: a file that keeps finished batches.
        progress: True shows a bar, None does so at a terminal.
    """
    began = time.perf_counter()
    calibrate_choices(choices, samples)
    trials = _trials(choices)
    replay = Replay(choices.prepared)
    signals = _signals(replay, samples)
    sums = _Sums(len(trials), len(signals))
    file = None
    if checkpoint is not None:
        file = _Checkpoint(
            checkpoint, choices, samples, (probes, seed, estimate_only, _named(metric))
        )
        file.resume(sums)
    measure = _Measure(replay, trials, signals, sums, metric, estimate_only, probes, seed)
    steps = len(samples.batches) * (1 if estimate_only else 1 + len(trials))
    with_progress = track(measure.steps(samples, file), "sensitivity", steps, progress)
    for _ in with_progress:
        pass
    return _result(
        choices,
        samples,
        trials,
        sums,
        measure.note,
        metric,
        estimate_only,
        replay.ops,
        began,
        signals,
    )


def _named(metric: Metric | None) -> str | None:
    return None if metric is None else getattr(metric, "__name__", "metric")


def _signals(replay: Replay, samples: Samples) -> list[float]:
    """Power of each floating-point output over all samples."""
    total: list[float] | None = None
    for values, _ in samples.batches:
        powers = [float((y.double() ** 2).sum()) for y in float_outputs(replay.start(values))]
        total = powers if total is None else [a + b for a, b in zip(total, powers, strict=True)]
    if not total:
        raise InputError("the model returns no floating-point tensor to measure the error of")
    return total


def float_outputs(outputs: Any) -> list[Tensor]:
    """The real tensors among what a model returns."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def output_errors(exact: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Power of the error of each output, float64; where the exact value is finite."""
    errors = []
    for a, b in zip(exact, other, strict=True):
        difference = (a.double() - b.double()).masked_fill(~torch.isfinite(a), 0.0)
        errors.append((difference**2).sum())
    return torch.stack(errors).cpu()


def relative(errors: Sequence[float], signals: Sequence[float]) -> float:
    """Error over signal, the mean over the outputs."""
    return math.fsum(e / (s or 1.0) for e, s in zip(errors, signals, strict=True)) / len(signals)


def metric_total(metric: Metric, outputs: Any, labels: Tensor | None, size: int) -> float:
    """Sum of a metric over the samples of a batch.

    Raises:
        InputError: it returns something else than a score per sample or a number, or not finite.
    """
    value = metric(outputs, labels)
    given = torch.as_tensor(value).detach().double()
    name = _named(metric)
    if given.shape != (size,) and given.numel() != 1:
        raise InputError(
            f"metric {name} returned shape {tuple(given.shape)} for {size} samples: return one "
            f"score per sample, ({size},), or one number"
        )
    total = math.fsum(given.reshape(-1).tolist()) * (1 if given.shape == (size,) else size)
    if not math.isfinite(total):
        raise InputError(f"metric {name} is not finite")
    return total


class _Measure:
    """The loop over batches."""

    def __init__(
        self,
        replay: Replay,
        trials: Sequence[_Trial],
        signals: Sequence[float],
        sums: _Sums,
        metric: Metric | None,
        estimate_only: bool,
        probes: int,
        seed: int,
    ) -> None:
        self._replay, self._trials, self._signals, self._sums = replay, trials, signals, sums
        self._metric, self._estimate_only = metric, estimate_only
        self._probes, self._seed = probes, seed
        self.note = ""

    def steps(self, samples: Samples, file: _Checkpoint | None) -> Iterator[None]:
        for index, (values, labels) in enumerate(samples.batches):
            if index < int(self._sums.done):
                continue
            before = self._replay.calls
            outputs = self._estimate(index, values)
            self._sums.calls[0] += self._replay.calls - before
            yield
            if not self._estimate_only:
                before = self._replay.calls
                yield from self._true(outputs, labels)
                self._sums.calls[1] += self._replay.calls - before
            self._sums.done += 1
            if file is not None:
                file.save(self._sums)

    def _estimate(self, index: int, values: Sequence[Any]) -> Any:
        """Add the estimates of a batch; afterwards its float values are kept."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)

        def weigh(outputs: Any) -> list[Tensor]:
            leaves = float_outputs(outputs)
            numbers = []
            for _ in range(self._probes):
                terms = []
                for leaf, signal in zip(leaves, self._signals, strict=True):
                    signs = torch.randint(0, 2, leaf.shape, generator=generator) * 2.0 - 1.0
                    share = math.sqrt((signal or 1.0) * len(leaves))
                    exact = torch.isfinite(leaf)
                    terms.append((leaf[exact] * signs.to(leaf)[exact]).sum() / share)
                numbers.append(torch.stack(terms).sum())
            return numbers

        wanted = list(dict.fromkeys(name for trial in self._trials for name in trial.changes))
        try:
            outputs, gradients = self._replay.gradients(values, wanted, weigh)
        except (RuntimeError, NotImplementedError) as error:
            first = (str(error).splitlines() or [""])[0]
            self.note = f"no estimate: the graph cannot be differentiated ({first})"
            return self._replay.start(values)
        for i, trial in enumerate(self._trials):
            self._sums.estimates[i] += self._noise(trial, gradients) / self._probes
        return outputs

    def _noise(self, trial: _Trial, gradients: Sequence[Mapping[str, Tensor]]) -> float:
        """Sum over the probes of ``(r^T J d)^2``.

        An activation's error in one sample has no effect on others, so samples are told apart.
        """
        errors = {}
        with torch.no_grad():
            for name, change in trial.changes.items():
                value = self._replay.value(name)
                errors[name] = change(value) - value
        sizes = {len(error) if error.dim() else 0 for error in errors.values()}
        apart = trial.kind == "activation" and len(sizes) == 1 and 0 not in sizes
        product = inner_products if apart else inner_product
        total = 0.0
        for probe in gradients:
            rows = sum(product(probe[name], error) for name, error in errors.items())
            total += float((torch.as_tensor(rows) ** 2).sum())
        return total

    def _true(self, outputs: Any, labels: Tensor | None) -> Iterator[None]:
        exact = float_outputs(outputs)
        size = len(exact[0]) if exact[0].dim() else 1
        if self._metric is not None:
            self._sums.metrics[-1] += metric_total(self._metric, outputs, labels, size)
        for i, trial in enumerate(self._trials):
            changed = self._replay.changed(trial.changes)
            self._sums.errors[i] += output_errors(exact, float_outputs(changed))
            if self._metric is not None:
                self._sums.metrics[i] += metric_total(self._metric, changed, labels, size)
            yield


class _Checkpoint:
    """The file of one measurement: what finished batches add up to."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        choices: Choices,
        samples: Samples,
        asked: tuple[object, ...],
    ) -> None:
        self._file = CheckpointFile(path, _FORMAT, "a sensitivity", "measure", InputError)
        prepared = choices.prepared
        weights = [
            value
            for name, value in prepared.state_dict().items()
            if isinstance(value, Tensor) and not name.startswith("activation_post_process")
        ]
        self._fingerprints = {
            "model": fingerprint(weights, prepared.code),
            "data": fingerprint(samples.tensors()),
            "asked": repr((*asked, tuple(choices.schemes), choices.units, choices.groups)),
        }
        self._fingerprints["asked"] = fingerprint((), self._fingerprints["asked"])

    def resume(self, sums: _Sums) -> None:
        what = {
            "model": "another model, or other weights",
            "data": "other data",
            "asked": "other schemes, another metric, number of probes or seed",
        }
        found = self._file.read({k: (v, what[k]) for k, v in self._fingerprints.items()})
        if found is not None:
            with self._file.loading():
                sums.load(found[0])

    def save(self, sums: _Sums) -> None:
        self._file.write(sums.tensors(), self._fingerprints)


def _result(
    choices: Choices,
    samples: Samples,
    trials: Sequence[_Trial],
    sums: _Sums,
    note: str,
    metric: Metric | None,
    estimate_only: bool,
    ops: int,
    began: float,
    signals: Sequence[float],
) -> Sensitivity:
    losses = []
    for i, trial in enumerate(trials):
        noise = None if estimate_only else relative(sums.errors[i].tolist(), signals)
        fall = None
        if metric is not None and not estimate_only:
            fall = float(sums.metrics[-1] - sums.metrics[i]) / samples.count
        estimate = None if note else float(sums.estimates[i])
        losses.append(Loss(trial.name, trial.path, trial.kind, trial.width, noise, estimate, fall))
    if estimate_only and note:
        raise InputError(f"{note}; leave out estimate_only")
    batches = len(samples.batches)
    notes = [note] if note else []
    if samples.unused:
        notes.append(f"{samples.unused} samples were left over, too few for a batch")
    if any(fmt.bias is not None and fmt.bias.bits < 32 for fmt in choices.schemes.values()):
        notes.append("the rounding of biases is not measured here")
    return Sensitivity(
        tuple(losses),
        tuple(choices.schemes),
        samples.count,
        _named(metric),
        _correlations(losses),
        {
            "for calibration": 2.0,  # the observers, and the power of the outputs
            "for the estimate": int(sums.calls[0]) / (batches * ops),
            "for true losses": int(sums.calls[1]) / (batches * ops),
        },
        time.perf_counter() - began,
        tuple(notes),
    )


def _correlations(losses: Sequence[Loss]) -> dict[str, float]:
    def correlation(rows: Sequence[Loss]) -> float:
        pairs = [
            (row.estimate, row.loss)
            for row in rows
            if row.estimate is not None and row.noise is not None
        ]
        if len(pairs) < 3 or len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
            return math.nan
        return float(spearmanr(*zip(*pairs, strict=True)).statistic)

    kinds = {kind: [row for row in losses if row.kind == kind] for kind in ("weight", "activation")}
    return {**{kind: correlation(rows) for kind, rows in kinds.items()}, "all": correlation(losses)}
