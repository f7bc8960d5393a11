"""The widths with the least loss under a budget, and what any other budget would give.

The integer program chooses by losses of single choices, which only add up approximately. So what
it chooses, for the budget and for others along the way, is quantized and measured on samples held
back; and so is each scheme everywhere. The best that is measured and keeps the budget is taken: it
cannot be worse than the best scheme for all ops.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.analysis.allocation.choices import Choices, activation_label
from custom_quantizer.analysis.allocation.costs import (
    ACCURACY,
    Latencies,
    base_costs,
    limits_of,
    make_problem,
    picked,
)
from custom_quantizer.analysis.allocation.samples import Samples
from custom_quantizer.analysis.allocation.sensitivity import (
    Sensitivity,
    float_outputs,
    metric_total,
    output_errors,
    relative,
    to_db,
)
from custom_quantizer.analysis.allocation.solver import Problem, least_cost, solve_problem
from custom_quantizer.analysis.evaluation import Metric
from custom_quantizer.analysis.fidelity import finite
from custom_quantizer.calibration.run import GraphInputs
from custom_quantizer.config.file import load_config, save_config
from custom_quantizer.core.progress import stages
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import ConfigError
from custom_quantizer.planning.plan import Plan
from custom_quantizer.planning.quantizer import IntegerQuantizer

__all__ = ["Measured", "Quantized", "SearchPoint", "SearchResult", "Searcher"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Quantized:
    """A network quantized as chosen.

    Attributes:
        converted: the graph.
        plan: what became of each op.
        forwards: what it took, in float forwards of the samples it was calibrated with; 0 where
            what an earlier choice was calibrated with did.
    """

    converted: GraphModule
    plan: Plan
    forwards: float


Quantize = Callable[[IntegerQuantizer], Quantized]


@dataclass(frozen=True)
class Measured:
    """How a network does on the samples held back.

    Attributes:
        noise: of its outputs against the float model, relative to the signal.
        agreement: share of samples with the float model's class; ``None``: no classes.
        top1: share of samples with the label's class; ``None`` without labels.
        metric: mean of the user's metric; ``None`` without one.
    """

    noise: float
    agreement: float | None = None
    top1: float | None = None
    metric: float | None = None

    @property
    def sqnr(self) -> float:
        """``noise`` in dB."""
        return to_db(self.noise)


@dataclass(frozen=True)
class SearchPoint:
    """One choice and what it costs and loses.

    Attributes:
        name: ``a8w4 everywhere``, or ``searched``, with its share of the first cost.
        chosen: name of a unit -> name of its scheme.
        costs: by name.
        predicted: loss by the sum of the single ones.
        measured: on the samples held back.
        differences: where the plan of the whole does another thing than was predicted for an op.
        in_budget: whether it keeps all limits.
    """

    name: str
    chosen: Mapping[str, str]
    costs: Mapping[str, float]
    predicted: float
    measured: Measured
    differences: tuple[str, ...] = ()
    in_budget: bool = True


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What :func:`custom_quantizer.search` found.

    Attributes:
        best: the choice that was taken.
        points: all that were measured, uniform ones too, the most costly first.
        budget: as it was given.
        cost: name of the cost along which the curve goes.
        limits: most of each cost that the budget allows.
        base: costs of the most precise scheme everywhere.
        base_scheme: its name.
        sensitivity: of single choices.
        floating: the float model on the samples held back.
        held_back: number of these.
        forwards: cost of all, in float forwards of the samples; a calibration, which choices share,
            counts as one, without what accuracy algorithms take.
        config: the rules of ``best``, as a configuration file holds them.
        quantizer: with these rules, as ``quantize(config=...)`` takes it.
    """

    best: SearchPoint
    points: tuple[SearchPoint, ...]
    budget: Mapping[str, float]
    cost: str
    limits: Mapping[str, float]
    base: Mapping[str, float]
    base_scheme: str
    sensitivity: Sensitivity
    floating: Measured
    held_back: int
    forwards: float
    config: Mapping[str, Any]
    quantizer: IntegerQuantizer = field(repr=False)

    @property
    def front(self) -> tuple[SearchPoint, ...]:
        """The measured points that no other beats in both cost and noise, the cheapest first."""
        kept: list[SearchPoint] = []
        for point in sorted(self.points, key=lambda p: (p.costs[self.cost], _noise(p))):
            if not kept or _noise(point) < _noise(kept[-1]):
                kept.append(point)
        return tuple(kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules of the best choice, YAML or JSON by the suffix of ``path``.

        ``quantize(config=path)`` and ``custom-quantizer quantize --config`` take the file.

        Raises:
            InputError: another suffix, or the file cannot be written.
        """
        save_config(load_config(self.config), path)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        front = {point.name for point in self.front}
        return {
            "kind": "search",
            "schema_version": SCHEMA_VERSION,
            "budget": dict(self.budget),
            "cost": self.cost,
            "limits": dict(self.limits),
            "base": {"scheme": self.base_scheme, "costs": dict(self.base)},
            "best": self.best.name,
            "points": [
                {
                    **cast("dict[str, Any]", finite(asdict(point))),
                    "on_front": point.name in front,
                }
                for point in self.points
            ],
            "float": finite(asdict(self.floating)),
            "held_back": self.held_back,
            "forwards": self.forwards,
            "config": dict(self.config),
            "sensitivity": self.sensitivity.to_dict(),
        }

    def to_json(self) -> str:
        """As JSON; what is not finite is null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        scored = self._scored()
        header = ["", self.cost, *(name for name, _ in scored), "SQNR", "predicted", ""]
        rows = [header]
        for point in self.points:
            share = point.costs[self.cost] / (self.base[self.cost] or 1.0)
            predicted = (
                f"{to_db(point.predicted):.1f} dB"
                if self.sensitivity.metric is None
                else f"-{point.predicted:.4g}"
            )
            mark = "taken" if point is self.best else "" if point.in_budget else "over the budget"
            measured = point.measured
            scores = [_score_text(name, getattr(measured, name)) for name, _ in scored]
            rows.append(
                [point.name, f"{share:.3f}", *scores, f"{measured.sqnr:.1f} dB", predicted, mark]
            )
        lines = table_lines(rows)
        exact = ", ".join(
            f"{_score_text(name, value)} {name.replace('top1', 'top-1')}" for name, value in scored
        )
        lines += [
            "",
            f"{self.cost} as a share of {self.base_scheme} everywhere; measured on "
            f"{self.held_back:,} samples held back" + (f"; float: {exact}" if exact else ""),
            f"cost: {self.forwards:.0f} float forwards of the samples",
        ]
        lines += [f"not as predicted: {text}" for text in self.best.differences]
        return "\n".join(lines)

    def _scored(self) -> list[tuple[str, float]]:
        names = ("metric", "top1", "agreement")
        values = [(name, getattr(self.floating, name)) for name in names]
        return [(name, value) for name, value in values if value is not None]


def _score_text(name: str, value: float) -> str:
    return f"{value:.4g}" if name == "metric" else f"{value:.2%}"


def _noise(point: SearchPoint) -> float:
    return point.measured.noise


class Searcher:
    """One search.

    Args:
        choices: of the network.
        sensitivity: of it.
        budget: as it was given, and checked.
        quantize: makes a converted graph.
        floating: the float model: what its graph returns.
        held_back: to measure with.
        metric: more is better.
        latencies: of each op.
        accuracy: what choices are quantized with, and the result too.
        improve: likewise.
        points: least number of budgets along the curve, the user's own included.
        progress: True shows a bar, None does so at a terminal.
    """

    def __init__(
        self,
        choices: Choices,
        sensitivity: Sensitivity,
        budget: Mapping[str, float],
        quantize: Quantize,
        floating: GraphModule,
        held_back: Samples,
        *,
        metric: Metric | None = None,
        latencies: Latencies | None = None,
        accuracy: str | None = None,
        improve: Sequence[str] | None = None,
        points: int = 6,
        progress: bool | None = None,
    ) -> None:
        self._choices, self._sensitivity = choices, sensitivity
        self._budget, self._quantize = dict(budget), quantize
        self._samples, self._metric = held_back, metric
        self._count, self._progress = points, progress
        self._accuracy, self._improve = accuracy, improve
        self._problem: Problem = make_problem(choices, sensitivity.losses, latencies)
        self._cost = next((key for key in budget if key != ACCURACY), "weight_bits")
        self._base = base_costs(choices, latencies)
        self._limits = limits_of(self._budget, self._base)
        self._known: dict[tuple[int, ...], SearchPoint] = {}
        self._forwards = 0.0
        self._float_outputs = [self._run(floating, values) for values, _ in held_back.batches]
        self._signals = self._powers()
        self.floating = self._score(self._float_outputs)
        if ACCURACY in budget:
            self._lost(self.floating)  # or an error, before hours of work

    # -- choosing -----------------------------------------------------------------------------

    def run(self) -> SearchResult:
        """Choose, measure, and choose among what was measured.

        Raises:
            ConfigError: nothing that was measured has the accuracy that the budget asks for.
        """
        with stages("search", None, self._progress) as stage:
            for name in self._choices.schemes:
                chosen = self._uniform(name)
                if chosen is not None:
                    stage(f"measuring {name} everywhere")
                    self._measured(chosen, f"{name} everywhere")
            for limit in self._curve():
                stage(f"measuring at {limit / (self._base[self._cost] or 1.0):.2f}")
                self._solved({**self._limits, self._cost: limit})
            if ACCURACY in self._budget:
                self._bisect(stage)
        best = self._best()
        quantizer = self._quantizer(best.chosen)
        points = sorted(self._known.values(), key=lambda p: (-p.costs[self._cost], _noise(p)))
        return SearchResult(
            best,
            tuple(points),
            self._budget,
            self._cost,
            self._limits,
            self._base,
            self._choices.base,
            self._sensitivity,
            self.floating,
            self._samples.count,
            self._forwards + sum(self._sensitivity.forwards.values()),
            quantizer.to_config(),
            quantizer,
        )

    def _uniform(self, name: str) -> tuple[int, ...] | None:
        """A scheme everywhere; of ops without a weight, one with its format of activations."""
        chosen = []
        for unit, options in zip(self._choices.units, self._problem.options, strict=True):
            if name in unit.schemes:
                chosen.append(unit.schemes.index(name))
                continue
            if unit.parameters:
                return None
            formats = {option.activation: i for i, option in enumerate(options)}
            index = self._activation_of(name)
            if index not in formats:
                return None
            chosen.append(formats[index])
        return tuple(chosen)

    def _activation_of(self, name: str) -> int:
        return self._choices.activations.index(activation_label(self._choices.schemes[name]))

    def _curve(self) -> list[float]:
        """Limits of the first cost, from the least that is possible on, and the user's own."""
        low = least_cost(self._problem, self._cost)
        high = self._base[self._cost]
        steps = max(self._count - 1, 1)
        limits = [low + (high - low) * i / steps for i in range(steps)]
        own = self._limits.get(self._cost)
        if own is not None:
            limits = [own, *limits]
        return limits

    def _solved(self, limits: Mapping[str, float]) -> SearchPoint | None:
        chosen = solve_problem(self._problem, limits)
        if chosen is None:
            return None
        share = self._problem.cost(chosen, self._cost) / (self._base[self._cost] or 1.0)
        return self._measured(chosen, f"searched {share:.3f}")

    def _bisect(self, stage: Callable[[str], None]) -> None:
        """Look between the cheapest choice that is accurate enough and the next cheaper one."""
        for _ in range(_BISECTIONS):
            good = [p for p in self._known.values() if self._allowed(p)]
            if not good:
                return
            high = min(p.costs[self._cost] for p in good)
            below = [p.costs[self._cost] for p in self._known.values()]
            low = max((cost for cost in below if cost < high), default=None)
            if low is None or high - low <= _FINEST * self._base[self._cost]:
                return
            before = len(self._known)
            stage(f"measuring at {(low + high) / 2 / (self._base[self._cost] or 1.0):.2f}")
            self._solved({**self._limits, self._cost: (low + high) / 2})
            if len(self._known) == before:
                return

    def _best(self) -> SearchPoint:
        allowed = [point for point in self._known.values() if self._allowed(point)]
        if ACCURACY in self._budget:
            if not allowed:
                kept = (point for point in self._known.values() if point.in_budget)
                least, name = min((self._lost(point.measured), point.name) for point in kept)
                raise ConfigError(
                    f"budget: nothing that these schemes make loses at most "
                    f"{self._budget[ACCURACY]:g} {self._unit()}; {name} loses {least:.2f}: give "
                    "wider schemes, or accuracy algorithms"
                )
            return min(allowed, key=lambda p: (p.costs[self._cost], self._rank(p)))
        return min(allowed, key=lambda p: (self._rank(p), p.costs[self._cost]))

    def _allowed(self, point: SearchPoint) -> bool:
        limit = self._budget.get(ACCURACY)
        return point.in_budget and (limit is None or self._lost(point.measured) <= limit)

    def _rank(self, point: SearchPoint) -> float:
        """Less is better: the metric where there is one, else the noise of the outputs."""
        measured = point.measured
        return measured.noise if measured.metric is None else -measured.metric

    def _lost(self, measured: Measured) -> float:
        """What an accuracy budget limits.

        Raises:
            ConfigError: there is nothing to tell it by.
        """
        exact = self.floating
        if exact.metric is not None:
            return exact.metric - cast(float, measured.metric)
        if exact.top1 is not None:
            return 100 * (exact.top1 - cast(float, measured.top1))
        if measured.agreement is not None:
            return 100 * (1.0 - measured.agreement)
        raise ConfigError(
            "budget: accuracy needs labels or outputs that are scores of classes, and there are "
            "neither; give metric="
        )

    def _unit(self) -> str:
        if self.floating.metric is not None:
            return f"of {self._sensitivity.metric}"
        return "points" if self.floating.top1 is not None else "points of agreement with float"

    def _quantizer(self, chosen: Mapping[str, str]) -> IntegerQuantizer:
        return self._choices.quantizer(chosen).set_accuracy(self._accuracy, self._improve)

    # -- measuring ----------------------------------------------------------------------------

    def _measured(self, chosen: tuple[int, ...], name: str) -> SearchPoint:
        if chosen in self._known:
            return self._known[chosen]
        names = picked(self._choices, chosen)
        costs = {key: self._problem.cost(chosen, key) for key in self._base}
        made = self._quantize(self._quantizer(names))
        outputs = [self._run(made.converted, values) for values, _ in self._samples.batches]
        self._forwards += made.forwards + self._samples.count / self._sensitivity.samples
        point = SearchPoint(
            name,
            names,
            costs,
            self._problem.loss(chosen),
            self._score(outputs),
            self._choices.differences(names, made.plan),
            all(costs[key] <= limit for key, limit in self._limits.items()),
        )
        self._known[chosen] = point
        return point

    @staticmethod
    def _run(model: GraphModule, values: list[Any]) -> Any:
        args, kwargs = GraphInputs.of(model).arguments(values)
        with exclusive(), torch.no_grad():
            return model(*args, **kwargs)

    def _powers(self) -> list[float]:
        columns = zip(*(float_outputs(outputs) for outputs in self._float_outputs), strict=True)
        return [math.fsum(float((y.double() ** 2).sum()) for y in column) for column in columns]

    def _score(self, found: list[Any]) -> Measured:
        errors = torch.zeros(len(self._signals), dtype=torch.float64)
        agreeing = right = 0
        total = 0.0
        classes = self._has_scores()
        for exact, outputs, (_, labels) in zip(
            self._float_outputs, found, self._samples.batches, strict=True
        ):
            errors += output_errors(float_outputs(exact), float_outputs(outputs))
            if self._metric is not None:
                size = len(float_outputs(exact)[0])
                total += metric_total(self._metric, outputs, labels, size)
            if classes:
                answers = float_outputs(outputs)[0].argmax(1)
                agreeing += int((answers == float_outputs(exact)[0].argmax(1)).sum())
                if self._samples.has_classes:
                    right += int((answers == cast(Tensor, labels)).sum())
        count = self._samples.count
        return Measured(
            relative(errors.tolist(), self._signals),
            agreeing / count if classes else None,
            right / count if classes and self._samples.has_classes else None,
            None if self._metric is None else total / count,
        )

    def _has_scores(self) -> bool:
        """Whether the first output is one row of scores for each sample."""
        first = float_outputs(self._float_outputs[0])[0]
        return first.dim() == 2 and first.shape[1] > 1


_BISECTIONS = 4
_FINEST = 0.01
"""Share of the cost below which looking closer is not worth a quantization."""
