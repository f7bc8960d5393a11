"""The one-call flow, and the only module that knows the order of the stages.

::

    capture -> plan -> prepare -> calibrate -> compare -> improve -> convert -> lower -> check

:func:`record_calibration` stops after the calibration and writes it to a file, from which
:func:`quantize` goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.accuracy.defaults import Remembered, algorithms_for, choose_observers
from custom_quantizer.accuracy.improving import FloatMeans, Improvement, improve_again
from custom_quantizer.analysis.fidelity import (
    Fidelity,
    FirstCalls,
    FloatCheck,
    check_calls,
    first_calls,
)
from custom_quantizer.app.capture import DEFAULT_MAX_BATCH, arguments_of, capture
from custom_quantizer.app.configuration import Configuration, as_quantizer
from custom_quantizer.app.recorded import Recorded, read_calibration, write_calibration
from custom_quantizer.app.saved_graph import serialize_graph
from custom_quantizer.backends.xnnpack import LoweredProgram
from custom_quantizer.backends.xnnpack.checked_lowering import lower_graph
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.run import CalibrationSummary, GraphInputs, calibrate
from custom_quantizer.calibration.statistics import (
    ModelStatistics,
    activation_observers,
    load_statistics,
    statistics_of,
)
from custom_quantizer.config.improvement import check_accuracy, check_algorithms
from custom_quantizer.core.file_hashes import GRAPH_SUFFIX, sha256_of
from custom_quantizer.core.files import check_utf8, json_bytes, new_directory, write_files_atomic
from custom_quantizer.core.graph import detached_copy, state_kept
from custom_quantizer.core.progress import stages
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import CalibrationError, ConfigError, ConversionError, InputError
from custom_quantizer.planning.plan import Plan
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.report.graph_record import report_of
from custom_quantizer.report.record import Report

__all__ = [
    "RESULT_VERSION",
    "QuantizationResult",
    "SavedFiles",
    "quantize",
    "record_calibration",
    "save_result",
]

logger = logging.getLogger(__name__)

RESULT_VERSION = 1
"""Version of the JSON that :meth:`QuantizationResult.save` writes."""


@dataclass(frozen=True)
class SavedFiles:
    """Where a result was written.

    Attributes:
        program: the ``.pte``, or ``None`` where the result was not lowered.
        report: the JSON report.
        graph: the converted graph, from which the program can be verified; ``None`` where it holds
            what no such file can.
        graph_reason: why, then.
    """

    program: Path | None
    report: Path
    graph: Path | None
    graph_reason: str = ""


@dataclass(frozen=True, eq=False)
class _Measured:
    """What does not depend on the scheme, kept for the next one.

    Attributes:
        example: as the model was captured with it.
        summary: what the observers were shown.
        statistics: what they recorded.
        checked: what the float model computed of the first calls.
        means: what it computed of all that layers were improved on.
    """

    example: tuple[Any, ...]
    summary: CalibrationSummary
    statistics: ModelStatistics
    checked: FloatCheck
    means: FloatMeans

    path = "what was measured for the first scheme"

    @property
    def calls(self) -> tuple[list[Any], ...]:
        """Inputs of the first calls, one value per placeholder."""
        return self.checked.inputs

    def check_model(self, exported: GraphModule) -> None:
        """Nothing to do: ``check_calls`` compares the model with the one it saw before."""

    def load(self, prepared: GraphModule) -> None:
        """Give the statistics to the observers of a model prepared with another scheme.

        Raises:
            CalibrationError: they are not those that it needs.
        """
        if not _has_ranges(prepared):
            return
        try:
            load_statistics(prepared, self.statistics)
        except CalibrationError as error:
            raise CalibrationError(
                f"{self.path} is not enough for this one: {error}; call quantize, with data"
            ) from error


def _has_ranges(prepared: GraphModule) -> bool:
    """Whether any activation is quantized statically."""
    modules = prepared.modules()
    return any(isinstance(m, ActivationObserver) and not m.is_dynamic for m in modules)


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """Everything the flow made, each part finished.

    Attributes:
        exported: the captured float graph.
        plan: what was decided for every op, and why.
        calibration: what the observers were shown.
        improvement: what :func:`~custom_quantizer.improve` did; ``None`` where all was rounded to
            nearest.
        fidelity: how far the outputs are from the float model's, on calibration data.
        converted: the quantized graph: integer weights, int32 biases, quantize and dequantize.
        report: one row per op of the converted graph.
        lowered: the checked program; ``None`` with ``lower=False``.
        example_inputs: what the model was captured with.
    """

    exported: GraphModule = field(repr=False)
    plan: Plan = field(repr=False)
    calibration: CalibrationSummary
    improvement: Improvement | None
    fidelity: Fidelity
    converted: GraphModule = field(repr=False)
    report: Report = field(repr=False)
    lowered: LoweredProgram | None = field(repr=False)
    example_inputs: tuple[Any, ...] = field(repr=False)
    _measured: _Measured = field(repr=False)

    def with_config(
        self,
        config: Configuration | IntegerQuantizer,
        calibration_data: object = None,
        *,
        accuracy: str | None = None,
        improve: Sequence[str] | None = None,
        lower: bool = True,
        progress: bool | None = None,
    ) -> QuantizationResult:
        """Quantize the same model in another scheme; what was measured for this one is not again.

        The model is not captured again, no data are run through it, and what the float model and
        the prepared graph compute is known. The result is that of :func:`quantize` with the same
        data, bit for bit.

        Args:
            config: as :func:`quantize` takes it.
            calibration_data: for algorithms that improve accuracy; not needed where there are none.
            accuracy: as :func:`quantize` takes it.
            improve: likewise.
            lower: likewise.
            progress: likewise.

        Raises:
            ConfigError: as :func:`quantize`.
            InputError: an algorithm needs data.
            CalibrationError: this scheme observed less than the other needs: other tensors, or
                extremes where values are to be counted (counts serve both).
            VerificationError: as :func:`quantize`; or the weights of ``exported`` were changed.
            LoweringError: as :func:`quantize`.

        Example::

            eight = cq.quantize(model, example, data)
            four = eight.with_config("a8w4", data)  # bias correction needs samples
        """
        return _quantize(
            lambda: (self.exported, self._measured.example),
            self.example_inputs,
            calibration_data,
            self._measured,
            config=config,
            accuracy=accuracy,
            improve=improve,
            lower=lower,
            progress=progress,
        )

    def to_json(self) -> str:
        """Plan, calibration, report and lowering as one JSON object."""
        return json.dumps(self._to_dict(), indent=2)

    def _to_dict(self) -> dict[str, Any]:
        lowering = None if self.lowered is None else json.loads(self.lowered.report.to_json())
        improvement = (
            {} if self.improvement is None else {"improvement": self.improvement.to_dict()}
        )
        return {
            "version": RESULT_VERSION,
            "calibration": asdict(self.calibration),
            **improvement,
            "fidelity": self.fidelity.to_dict(),
            "plan": json.loads(self.plan.to_json()),
            "report": json.loads(self.report.to_json()),
            "lowering": lowering,
        }

    def save(self, path: str | os.PathLike[str]) -> SavedFiles:
        """Write program, graph and report: all of them, or nothing and old files stay.

        Args:
            path: a ``.pte`` file, beside which the report gets the suffix ``.json`` and the
                converted graph ``.graph.safetensors``; or a directory, made if it does not exist,
                for ``model.pte``, ``model.graph.safetensors`` and ``report.json``.

        The report holds the SHA-256 of the other files. A graph that cannot be written without
        code (``docs/files.md``) is left out with a warning; nothing of an earlier one stays.

        Raises:
            InputError: a file cannot be written, or ``path`` is a ``.pte`` and there is none.
        """
        return save_result(self, path)


def save_result(
    result: QuantizationResult,
    path: str | os.PathLike[str],
    more: Mapping[str, Any] | None = None,
) -> SavedFiles:
    """Write a result as :meth:`QuantizationResult.save` does, with ``more`` in its report.

    Raises:
        InputError: as there.
    """
    target = Path(path)
    check_utf8(target)
    program: Path | None
    if target.suffix == ".pte":
        program, report = target, target.with_suffix(".json")
        if result.lowered is None:
            raise InputError(
                f"{target}: there is no program to write, since quantize was called with "
                "lower=False; name a directory for the report alone, or lower the model"
            )
        folder: AbstractContextManager[None] = nullcontext()
    else:
        program = None if result.lowered is None else target / "model.pte"
        report = target / "report.json"
        folder = new_directory(target)
    graph, reason = (program or target / "model.pte").with_suffix(GRAPH_SUFFIX), ""
    files: dict[str | os.PathLike[str], bytes] = {}
    about: dict[str, Any] = {"program": None, "graph": None}
    if program is not None and result.lowered is not None:
        files[program] = result.lowered.buffer
        about["program"] = {"file": program.name, "sha256": sha256_of(files[program])}
    try:
        files[graph] = serialize_graph(result.converted, result.example_inputs)
        about["graph"] = {"file": graph.name, "sha256": sha256_of(files[graph])}
    except ConversionError as error:
        reason = str(error)
        logger.warning("%s", reason)
        about["graph"] = {"file": None, "reason": reason}
    files[report] = json_bytes({**result._to_dict(), "files": about, **(more or {})})
    with folder:
        write_files_atomic(files)
    if reason:
        _remove(graph)
    return SavedFiles(program, report, None if reason else graph, reason)


def _remove(path: Path) -> None:
    """Remove the graph of another result: its program and report were replaced just now."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: is of another result and cannot be removed ({error.strerror})"
        ) from error


def quantize(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    calibration_data: object,
    *,
    config: Configuration | IntegerQuantizer | None = None,
    statistics: str | os.PathLike[str] | Recorded | None = None,
    accuracy: str | None = None,
    improve: Sequence[str] | None = None,
    dynamic_batch: bool | int = False,
    lower: bool = True,
    progress: bool | None = None,
) -> QuantizationResult:
    """Quantize a float model and lower it to a checked XNNPACK program.

    Threads may call it: they wait for each other (see :mod:`custom_quantizer.core.threads`).

    Args:
        model: a module (a copy in eval mode is captured; the module itself is not changed), an
            ``ExportedProgram``, or what its ``.module()`` returns.
        example_inputs: one set of inputs, as a tuple, or by the names of the model's arguments;
            its batch is the program's, unless that is dynamic.
        calibration_data: see :func:`~custom_quantizer.calibration.run.calibrate`. Next to
            ``statistics`` it is used for algorithms that improve accuracy, and may be ``None``
            where there are none.
        config: a scheme or its name (``None``: ``"a8w8"``), the path of a configuration file or
            its content, or an ``IntegerQuantizer``.
        statistics: what :func:`record_calibration` wrote, of the same model, example and
            ``dynamic_batch``, instead of running data; the result is the same.
        accuracy: what is done beyond rounding to nearest (``None``: what ``config`` says, else
            ``"fast"``). At 8 bits and above, ``"plain"`` and ``"fast"`` are the same.

            - ``"plain"``: nothing.
            - ``"fast"``: what is free. Below 8 bits, activations whose scheme names no other
              observer get the range that histogram chooses, and biases are corrected.
            - ``"best"``: what seconds to minutes buy. Ranges as with ``"fast"``; scales, integers
              and biases are improved at any width.
        improve: names of algorithms (see :func:`~custom_quantizer.improve`), instead of those that
            ``accuracy`` stands for.
        dynamic_batch: let the first dimension of every input vary, up to a batch of 64, or of the
            given number. For modules only: captured graphs have decided already.
        lower: whether to make a program at all; for a quantizer that plans for another backend
            than XNNPACK it has to be ``False``.
        progress: True shows bars, None does so at a terminal.

    Raises:
        InputError: the model does not run on the example.
        CaptureError: ``torch.export`` cannot capture the model, or the graph is not one of an
            eval-mode float model.
        ConfigError: the configuration names something that does not exist, or selects nothing; or
            plans for another backend, and ``lower`` is true.
        CalibrationError: the data do not fit, are empty or not finite; the statistics are of
            another model, or not those that this configuration needs.
        VerificationError: the graph that is quantized does not compute what the model does (see
            :mod:`custom_quantizer.analysis.fidelity`).
        LoweringError: the backend refused the graph, or wrote something wrong.
    """
    example_inputs = arguments_of(model, example_inputs)
    return _quantize(
        lambda: capture(model, example_inputs, dynamic_batch=dynamic_batch),
        example_inputs,
        calibration_data,
        _recorded(statistics, example_inputs, dynamic_batch),
        config=config,
        accuracy=accuracy,
        improve=improve,
        lower=lower,
        progress=progress,
    )


def _quantize(
    captured: Callable[[], tuple[GraphModule, tuple[Any, ...]]],
    example_inputs: tuple[Any, ...],
    data: object,
    known: Recorded | _Measured | None,
    *,
    config: Configuration | IntegerQuantizer | None,
    accuracy: str | None,
    improve: Sequence[str] | None,
    lower: bool,
    progress: bool | None,
) -> QuantizationResult:
    """:func:`quantize` of what ``captured`` returns; ``known`` stands for data, if there is any."""
    quantizer = as_quantizer(config)
    if lower and quantizer.backend.name != "xnnpack":
        raise ConfigError(
            f"quantize lowers to XNNPACK, and the quantizer plans for {quantizer.backend.title}: "
            "call it with lower=False, and custom_quantizer.lower(result.converted, example, "
            "backend=...), save_integers or save_c with what it returns"
        )
    wanted = check_accuracy(accuracy or quantizer.accuracy or "fast")
    named = quantizer.improve if improve is None else check_algorithms(improve)
    with stages("quantize", 12 if lower else 7, progress) as stage:
        stage("capturing the model")
        exported, example = captured()
        if known is not None:
            known.check_model(exported)
        stage("planning")
        prepared, plan = _prepare(exported, quantizer)
        stage("calibrating")
        algorithms = algorithms_for(wanted, prepared) if named is None else named
        if wanted != "plain":
            choose_observers(prepared)
        if known is not None and algorithms and data is None:
            raise InputError(
                f"{known.path}: statistics are all that calibration needs, but "
                f"{' and '.join(algorithms)} need{'s' * (len(algorithms) == 1)} samples: give "
                "calibration data as well, or ask for accuracy 'plain'"
            )
        if known is None and algorithms and isinstance(data, Iterator):
            data = Remembered(data)
        summary, calls, outputs = _calibrated(prepared, data, known, progress)
        stage("comparing with the float model")
        earlier = known.checked if isinstance(known, _Measured) else None
        checked = check_calls(prepared, exported, calls, outputs, earlier)
        # Before anything improves them.
        if known is not None:
            observed = known.statistics
        else:
            observed = statistics_of(prepared) if _has_ranges(prepared) else ModelStatistics(())
        # A graph of its own may give its layers other names.
        same = earlier is not None and earlier.graph == checked.graph
        means = known.means if isinstance(known, _Measured) and same else FloatMeans()
        measured = _Measured(example, summary, observed, replace(checked, rounded=None), means)
        stage("improving")
        improvement = None
        if algorithms:
            improvement = improve_again(prepared, data, algorithms, means, progress=progress)
        stage("converting")
        # To fold constants convert_pt2e runs writes into buffers too (counters).
        with tools(), state_kept(prepared):
            converted = cast(GraphModule, convert_pt2e(prepared))
        fidelity = checked.compare(converted)
        for warning in fidelity.warnings:
            logger.warning("%s", warning)
        graph = read_converted(converted, quantizer.backend)
        lowered = lower_graph(graph, example, progress=stage) if lower else None
        stage("reporting")
        report = report_of(graph, lowered)
    return QuantizationResult(
        exported,
        plan,
        summary,
        improvement,
        fidelity,
        converted,
        report,
        lowered,
        example_inputs,
        measured,
    )


def _calibrated(
    prepared: GraphModule, data: object, known: Recorded | _Measured | None, progress: bool | None
) -> tuple[CalibrationSummary, Sequence[list[Any]], Sequence[list[Any] | None]]:
    """What calibration saw, its first calls of the graph, and what these returned if it ran."""
    if known is not None:
        known.load(prepared)
        return known.summary, list(known.calls), ()
    with FirstCalls(prepared) as first:
        summary = calibrate(prepared, data, progress=progress)
    return summary, first.calls, first.outputs


def record_calibration(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    calibration_data: object,
    path: str | os.PathLike[str],
    *,
    config: Configuration | IntegerQuantizer | None = None,
    dynamic_batch: bool | int = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool | None = None,
) -> CalibrationSummary:
    """Calibrate once, and write a file that ``quantize(statistics=path)`` takes instead of data.

    Values are counted whatever the observer of a scheme needs, so the file serves all schemes and
    observers that observe the same tensors (but ``moving_average``, which cannot be counted).
    It holds names, numbers and the first inputs, up to 8 samples; no code.

    Args:
        model: as :func:`quantize` takes it.
        example_inputs: likewise.
        calibration_data: likewise.
        path: of the file, usually ``.safetensors``; written in one step.
        config: likewise; which tensors are observed follows from it.
        dynamic_batch: likewise.
        checkpoint: a file that keeps what was measured; the same call goes on where it stopped. It
            stays when calibration is done.
        checkpoint_every: batches between two writes of it.
        progress: True shows a bar, None does so at a terminal.

    Returns:
        What was seen.

    Raises:
        InputError: as :func:`quantize`; an input is no tensor; a file cannot be written.
        CaptureError: as :func:`quantize`.
        ConfigError: likewise.
        CalibrationError: likewise; nothing is quantized statically; the checkpoint is of another
            calibration.
    """
    quantizer = as_quantizer(config)
    data = calibration_data
    if isinstance(data, Iterator):
        data = Remembered(data)
    given = example_inputs
    example_inputs = arguments_of(model, given)
    exported, _ = capture(model, example_inputs, dynamic_batch=dynamic_batch)
    prepared, _ = _prepare(exported, quantizer)
    for observed in activation_observers(prepared):
        if observed.observer.kind != "average":
            observed.observer.record_counts()
    summary = calibrate(
        prepared,
        data,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    # Not noted while they run: a resumed calibration does not run the first ones again.
    calls = first_calls(GraphInputs.of(prepared), data)
    most = _largest_batch(dynamic_batch)
    names = _names_of(given, example_inputs)
    write_calibration(path, exported, prepared, example_inputs, calls, summary, most, names)
    return summary


def _names_of(given: object, example: tuple[Any, ...]) -> list[str]:
    """The name of each input; none, where they were not given by name, or are nested."""
    named = given.items() if isinstance(given, Mapping) else ()
    by_value = {id(value): str(name) for name, value in named}
    names = [by_value.get(id(leaf)) for leaf in pytree.tree_leaves(example)]
    found = [name for name in names if name is not None]
    return found if len(set(found)) == len(names) else []


def _prepare(exported: GraphModule, quantizer: IntegerQuantizer) -> tuple[GraphModule, Plan]:
    # prepare_pt2e folds batch norms into the graph it is given.
    with tools():
        prepared = prepare_pt2e(detached_copy(exported), quantizer)
        quantizer.check_plan()
        return prepared, quantizer.last_plan


def _recorded(
    statistics: str | os.PathLike[str] | Recorded | None,
    example: tuple[Any, ...],
    dynamic_batch: bool | int,
) -> Recorded | None:
    """The file of :func:`record_calibration`, if it is of such inputs."""
    if statistics is None:
        return None
    found = statistics if isinstance(statistics, Recorded) else read_calibration(statistics)
    found.check_example(example)
    most = _largest_batch(dynamic_batch)
    if most != found.dynamic_batch:
        was = f"batches up to {found.dynamic_batch}" if found.dynamic_batch else "a static batch"
        raise InputError(
            f"{found.path}: was calibrated for {was}; give the same dynamic_batch, or calibrate "
            "again"
        )
    return found


def _largest_batch(dynamic_batch: bool | int) -> int:
    return DEFAULT_MAX_BATCH if dynamic_batch is True else int(dynamic_batch)
