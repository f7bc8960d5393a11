"""A report from what ``quantize`` wrote, and what more can be measured where data are given.

Nothing heavy is imported before the files were found to be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_quantizer.core.file_hashes import GRAPH_SUFFIX, sha256_of
from custom_quantizer.core.files import read_bytes
from custom_quantizer.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from custom_quantizer.app.data import DataSource
    from custom_quantizer.app.pipeline import QuantizationResult
    from custom_quantizer.report.record import Report

__all__ = [
    "MEASURED_SAMPLES",
    "StoredResult",
    "load_result",
    "measured",
    "read_findings",
    "with_tensors",
]

MEASURED_SAMPLES = 64
"""Samples on which tensors are compared: each is computed about ten times."""

_MOST_REPORT_BYTES = 2**28


@dataclass(frozen=True)
class StoredResult:
    """What ``quantize`` wrote, as far as it is there.

    Attributes:
        name: of its files, without a suffix.
        report: of the converted graph.
        program: the ``.pte``.
        graph: the converted graph.
    """

    name: str
    report: Report
    program: Path | None
    graph: Path | None


def load_result(file: str | os.PathLike[str]) -> StoredResult:
    """Read a report, or the report beside a program; without one, make it of the graph beside it.

    Args:
        file: a ``.pte``, the ``.json`` or ``.graph.safetensors`` beside it, or the directory that
            ``save`` wrote.

    Raises:
        InputError: it is missing; the report is damaged, or of another program; or neither report
            nor graph is there.
    """
    path = Path(file)
    if path.name.endswith(GRAPH_SUFFIX):
        path = path.with_name(path.name.removesuffix(GRAPH_SUFFIX) + ".pte")
    if path.is_dir():
        if not (path / "report.json").is_file():
            raise InputError(
                f"{path}: is a directory without a report.json; name a .pte, or a directory that "
                "quantize wrote"
            )
        path = path / "report.json"
    if path.suffix == ".json":
        return _of_document(path, _document(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a .pte or the .json beside it")
    for beside in (path.with_suffix(".json"), path.with_name("report.json")):
        if not beside.is_file():
            continue
        document = _document(beside)
        recorded = (document.get("files") or {}).get("program") or {}
        if recorded.get("file") != path.name and beside.name == "report.json":
            continue  # of another program in the same folder
        if recorded.get("sha256") != sha256_of(path.read_bytes()):
            raise InputError(
                f"{beside} is the report of another program than {path}, or one of the two was "
                "changed; quantize the model again, or remove the report"
            )
        return _of_document(beside, document, path)
    graph = path.with_name(path.stem + GRAPH_SUFFIX)
    if not graph.is_file():
        raise InputError(
            f"there is no {path.with_suffix('.json').name} beside {path}, and no {graph.name}: "
            "`custom-quantizer quantize` writes both; `custom-quantizer inspect` shows what the "
            "program alone tells"
        )
    from custom_quantizer.app.saved_graph import load_lowered
    from custom_quantizer.report.graph_record import inspect

    converted, lowered, _ = load_lowered(path, graph)
    return StoredResult(path.stem, inspect(converted, lowered), path, graph)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_bytes(path, _MOST_REPORT_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a report of this package") from error
    if not isinstance(document, dict):
        raise InputError(
            f"{path} is not a 'graph' report: it holds no JSON object; name a .pte or the .json "
            "beside it"
        )
    return document


def _of_document(path: Path, document: dict[str, Any], program: Path | None = None) -> StoredResult:
    """A report alone, or with all else that ``QuantizationResult.save`` writes around it."""
    from custom_quantizer.report.record import Report

    try:
        if "report" not in document:
            report = Report.from_json(json.dumps(document))
            return StoredResult(path.stem, report, None, None)
        report = Report.from_json(json.dumps(document["report"]))
        if document.get("fidelity"):
            report = report.including({**document["fidelity"], "kind": "fidelity"})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    files = document.get("files") or {}

    def beside(kind: str) -> Path | None:
        name = (files.get(kind) or {}).get("file")
        # A name, not a path that leads out of the folder.
        found = path.parent / Path(str(name)).name if name else None
        return found if found is not None and found.is_file() else None

    found = program or beside("program")
    return StoredResult((found or path).stem, report, found, beside("graph"))


def read_findings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed JSON that an analysis printed, for :meth:`Report.including`.

    Raises:
        InputError: the file cannot be read, or is no JSON object.
    """
    return _document(Path(path))


def with_tensors(result: QuantizationResult, data: DataSource) -> QuantizationResult:
    """A result whose report knows the error of every tensor, on :data:`MEASURED_SAMPLES` of data.

    Raises:
        CalibrationError: a batch does not hold what the graph takes.
        InputError: there are fewer samples than one batch of a static graph.
    """
    from custom_quantizer.analysis.diagnosis import diagnose

    few = data.subset(min(MEASURED_SAMPLES, data.num_examples)).inputs
    found = diagnose(result.exported, result.converted, few)
    return replace(result, report=result.report.including(found))


def measured(
    stored: StoredResult,
    data: DataSource,
    model: nn.Module | None = None,
    *,
    output: int | None = None,
    progress: bool | None = None,
) -> Report:
    """The report together with what ``data`` tell of its program and graph.

    Accuracy, where there are labels or a float model to agree with; the values of every activation;
    and with a float model the error of every tensor, on :data:`MEASURED_SAMPLES` of the samples.

    Args:
        stored: what :func:`load_result` read.
        data: samples, rather not those of the calibration.
        model: the float model that was quantized.
        output: which output holds the scores, as :func:`~custom_quantizer.evaluate` takes it.
        progress: True shows bars, None does so at a terminal.

    Raises:
        InputError: program and graph are not there; or the data do not fit.
        ConversionError: the graph was made of another model.
    """
    if stored.graph is None and stored.program is None:
        raise InputError(
            f"there is nothing to run: neither program nor graph of {stored.name} is beside its "
            "report; name the .pte"
        )
    report = stored.report
    if stored.program is not None and (data.labels is not None or model is not None):
        from custom_quantizer.analysis.evaluation import evaluate
        from custom_quantizer.app.saved_graph import load_program_of

        models: dict[str, Callable[..., Any]] = {} if model is None else {"float model": model}
        graph = stored.graph if data.input_names else None
        models[stored.program.name] = load_program_of(stored.program, graph).run
        report = report.including(evaluate(models, data, output=output, progress=progress))
    if stored.graph is not None:
        from custom_quantizer.analysis.activations import observe_activations
        from custom_quantizer.analysis.diagnosis import diagnose
        from custom_quantizer.app.saved_graph import load_graph

        converted, _ = load_graph(stored.graph)
        few = data.subset(min(MEASURED_SAMPLES, data.num_examples)).inputs
        if model is None:
            report = report.including(observe_activations(converted, few, progress=progress))
        else:
            report = report.including(diagnose(model, converted, few, progress=progress))
    return report
