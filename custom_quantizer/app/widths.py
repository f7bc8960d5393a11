"""``sensitivity`` and ``search``: from a model and its data to the widths of its ops."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from custom_quantizer.analysis.allocation.choices import find_choices
from custom_quantizer.analysis.allocation.costs import Latencies, check_budget, check_possible
from custom_quantizer.analysis.allocation.samples import Samples
from custom_quantizer.analysis.allocation.searching import Quantized, Searcher, SearchResult
from custom_quantizer.analysis.allocation.sensitivity import (
    Sensitivity,
    measure_sensitivity,
)
from custom_quantizer.analysis.evaluation import Metric
from custom_quantizer.app.capture import capture
from custom_quantizer.app.latency import latencies_here, read_latencies
from custom_quantizer.app.pipeline import QuantizationResult, quantize
from custom_quantizer.config.improvement import check_accuracy, check_algorithms
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.errors import CalibrationError
from custom_quantizer.ops.backend import BackendLike
from custom_quantizer.planning.quantizer import IntegerQuantizer

__all__ = ["SCHEMES", "search", "sensitivity"]

SCHEMES = ("a8w8", "a8w4")
"""What is chosen from where nothing else is asked for."""

HELD_BACK = 0.25
"""Share of the samples that a search measures with, where there are no others for that."""


def sensitivity(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    data: object,
    *,
    schemes: Sequence[str | OpScheme] = SCHEMES,
    metric: Metric | None = None,
    backend: BackendLike = "xnnpack",
    accuracy: str | None = None,
    samples: int = 256,
    estimate_only: bool = False,
    probes: int = 4,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure what each weight and each activation loses at each width, alone.

    Takes half a float forward of the samples for each choice, and ``2 * probes + 3`` for the
    estimate and the calibration; the memory of one batch of all activations. The same arguments
    give the same numbers.

    Args:
        model: as :func:`~custom_quantizer.quantize` takes it; not changed.
        example_inputs: one set of inputs. Its batch is the one that is computed with: 16 to 64
            samples are much faster than single ones.
        data: as :func:`~custom_quantizer.calibrate` takes it, with labels for the metric.
        schemes: the candidates. Their weights and their activations are measured apart; where all
            have one format of activations, all activations together.
        metric: a score where more is better, ``metric(outputs, labels)``, as
            :func:`~custom_quantizer.evaluate` takes it. ``None``: the error of the outputs.
        backend: what is planned for, as :class:`~custom_quantizer.IntegerQuantizer` takes it.
        accuracy: as for :func:`~custom_quantizer.quantize`, which chooses the observers of
            activations below 8 bits unless this is ``"plain"``. Weights are rounded to nearest.
        samples: use at most that many, the first ones.
        estimate_only: leave out the true losses.
        probes: backward passes per batch for the estimate.
        seed: of its random signs.
        checkpoint: a file that keeps finished batches; the same call goes on where it stopped, with
            the result that it would have had. It stays when all is done.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        ConfigError: the schemes cannot be used.
        CaptureError: ``torch.export`` cannot capture the model.
        CalibrationError: the data do not fit the model.
        InputError: there are too few samples; the model writes its own buffers; the metric does not
            return scores; the checkpoint is of another measurement.
    """
    exported, _ = capture(model, example_inputs)
    plain = check_accuracy(accuracy or "fast") == "plain"
    choices = find_choices(exported, schemes, backend, named_observers=plain)
    found = Samples.collect(exported, data, samples, any_labels=metric is not None)
    return measure_sensitivity(
        choices,
        found,
        metric=metric,
        estimate_only=estimate_only,
        probes=probes,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def search(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    data: object,
    budget: Mapping[str, float],
    *,
    schemes: Sequence[str | OpScheme] = SCHEMES,
    validation: object = None,
    metric: Metric | None = None,
    backend: BackendLike = "xnnpack",
    accuracy: str | None = None,
    improve: Sequence[str] | None = None,
    latencies: Latencies | str | os.PathLike[str] | None = None,
    samples: int = 512,
    validation_samples: int = 10_000,
    points: int = 6,
    estimate_only: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SearchResult:
    """Find the widths with the least loss under a budget.

    Args:
        model: as for :func:`sensitivity`.
        example_inputs: likewise.
        data: likewise; it also calibrates.
        budget: what is limited. ``size``: bytes of constants in the program; ``weight_bits``;
            ``bit_operations``; ``latency``. Up to 1 a number is a share of what the most precise
            scheme everywhere costs, above that the cost itself. ``accuracy``: the loss against
            float, in points of top-1 (of agreement with float where there are no labels) or in
            units of the metric; then the cheapest choice is taken that keeps it, by the other cost
            named, else by ``weight_bits``.
        schemes: the candidates.
        validation: samples to measure with; ``None``: the last quarter of ``data``, which then is
            not calibrated with.
        metric: as for :func:`sensitivity`; then it is what is maximized.
        backend: what is planned for; its kernels decide about ``size``.
        accuracy: as for :func:`~custom_quantizer.quantize`: what every choice is quantized with
            that is measured, and what the result says for ``quantize`` to do.
        improve: likewise.
        latencies: time of each op at each scheme, ``{op: {scheme: time}}``, or a JSON file of that.
            ``None``: where latency is limited, it is measured on this machine, for XNNPACK (see
            :mod:`custom_quantizer.app.latency`).
        samples: of ``data`` to use at most.
        validation_samples: likewise of ``validation``.
        points: budgets along the curve for which a choice is measured.
        estimate_only: choose by the estimate, which is quicker in large networks.
        checkpoint: as for :func:`sensitivity`, for the part of the search that takes longest.
        progress: True shows bars, None does so at a terminal.

    Raises:
        ConfigError: the budget has an unknown key, or nothing keeps it; latencies are limited,
            and missing for a backend that does not run here; the schemes cannot be used.
        InputError: as for :func:`sensitivity`; or the table of latencies cannot be read.
    """
    if isinstance(latencies, (str, os.PathLike)):
        latencies = read_latencies(Path(latencies))
    check_budget(budget)
    plain = check_accuracy(accuracy or "fast") == "plain"
    check_algorithms(improve or ())
    exported, example = capture(model, example_inputs)
    choices = find_choices(exported, schemes, backend, named_observers=plain)
    measuring = "latency" in budget and latencies is None
    known = {key: value for key, value in budget.items() if not (measuring and key == "latency")}
    check_possible(choices, known, latencies)
    any_labels = metric is not None
    found = Samples.collect(exported, data, samples, any_labels)
    if measuring:
        latencies = latencies_here(choices, exported, example, next(found.inputs()), progress)
        check_possible(choices, budget, latencies)
    if validation is None:
        found, held_back = found.split(HELD_BACK)
    else:
        held_back = Samples.collect(exported, validation, validation_samples, any_labels)
    losses = measure_sensitivity(
        choices,
        found,
        metric=metric,
        estimate_only=estimate_only,
        checkpoint=checkpoint,
        progress=progress,
    )

    calibrated: QuantizationResult | None = None

    def quantized(quantizer: IntegerQuantizer) -> Quantized:
        nonlocal calibrated
        if calibrated is not None:
            with suppress(CalibrationError):  # this choice counts values, and that one did not
                made = calibrated.with_config(
                    quantizer, found.inputs(), lower=False, progress=False
                )
                return Quantized(made.converted, made.plan, 0.0)
        calibrated = quantize(
            exported, example, found.inputs(), config=quantizer, lower=False, progress=False
        )
        return Quantized(calibrated.converted, calibrated.plan, 1.0)

    return Searcher(
        choices,
        losses,
        budget,
        quantized,
        exported,
        held_back,
        metric=metric,
        latencies=latencies,
        accuracy=accuracy,
        improve=improve,
        points=points,
        progress=progress,
    ).run()
