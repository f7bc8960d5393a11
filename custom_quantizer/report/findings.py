"""What was measured of a network, as a report carries it beside what stands in the graph.

Analyses have records and versioned JSON of their own. A report takes that JSON, whichever of them
were computed, so that one document holds all that any view shows. What JSON has no number for is
``None`` here: an SQNR without any error, or without a signal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from custom_quantizer.errors import InputError

__all__ = ["FINDINGS_VERSION", "Findings"]

FINDINGS_VERSION = 1
"""Of :class:`Findings` in the JSON of a report; fields are only ever added to a version."""

_VERSIONS = {"activations": 1, "diagnosis": 1, "evaluation": 1, "search": 1, "sensitivity": 1}
"""Of the documents that are taken."""


# What JSON may hold and no analysis writes (NaN, a negative power) is refused when it is read.
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Power = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Levels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class TensorFinding:
    """A quantized activation on real data.

    The attributes are those of a ``TensorDiagnosis``, and ``None`` where there was no float model
    to compare with.
    """

    name: str
    bits: Levels
    clipped_low: Share
    clipped_high: Share
    levels: Levels
    path: str = ""
    family: str | None = None
    scale: Positive | None = None
    zero_point: int | None = None
    sqnr: Number | None = None
    inputs_sqnr: Number | None = None
    alone: Number | None = None
    used_levels: Count | None = None
    unused_low: Count | None = None
    unused_high: Count | None = None
    bias_headroom: int | None = None
    accumulator_bits: int | None = None
    raised_channels: int = 0
    low: Number | None = None
    high: Number | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    histogram: tuple[Count, ...] = ()


@dataclass(frozen=True)
class WeightFinding:
    """A quantized weight beside the float one: what a ``WeightDiagnosis`` has."""

    name: str
    path: str
    bits: int
    granularity: str
    sqnr: Number | None
    worst_channel: int
    worst_channel_sqnr: Number | None
    used_levels: Count
    levels: Levels


@dataclass(frozen=True)
class OutputFinding:
    """An output of the model beside the float model's.

    Attributes:
        index: position among the outputs.
        sqnr: in dB.
        name: of the op that computes it, where it is known.
        rounding_sqnr: what rounding alone would leave, where it is known.
    """

    index: int
    sqnr: Number | None
    name: str = ""
    rounding_sqnr: Number | None = None


@dataclass(frozen=True)
class TensorFindings:
    """Tensors on real data.

    Attributes:
        samples: that were computed.
        tensors: quantized activations.
        weights: quantized weights; empty where there was no float model to compare with.
        outputs: of the model, likewise.
    """

    samples: Count
    tensors: tuple[TensorFinding, ...]
    weights: tuple[WeightFinding, ...] = ()
    outputs: tuple[OutputFinding, ...] = ()


@dataclass(frozen=True)
class FidelityFinding:
    """Outputs on the first samples of the calibration.

    Attributes:
        samples: that were compared.
        outputs: of the model.
        warnings: what a person should look at.
    """

    samples: Count
    outputs: tuple[OutputFinding, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DifferenceFinding:
    """Of a model to the first: what a ``PairedDifference`` has."""

    difference: Number
    low: Number | None
    high: Number | None
    p_value: Number
    is_noise: bool


@dataclass(frozen=True)
class MetricFinding:
    """How a model did by a metric of the user's."""

    name: str
    value: Number
    against_first: DifferenceFinding | None = None


@dataclass(frozen=True)
class ScoreFinding:
    """How a model did: what a ``ModelScore`` has."""

    name: str
    samples: Count
    correct: Count | None
    agreeing: Count | None
    top1: Share | None = None
    top1_interval: tuple[Share, Share] | None = None
    top5: Share | None = None
    against_first: DifferenceFinding | None = None
    metrics: tuple[MetricFinding, ...] = ()


@dataclass(frozen=True)
class EvaluationFinding:
    """Accuracy of several forms of the model on the same samples, the one to compare with first."""

    models: Annotated[tuple[ScoreFinding, ...], Field(min_length=1)]
    conclusions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossFinding:
    """What one choice costs alone: what a ``Loss`` has."""

    name: str
    path: str
    kind: Literal["weight", "activation"]
    width: str
    noise: Power | None
    estimate: Power | None
    metric: Number | None = None


@dataclass(frozen=True)
class SensitivityFinding:
    """What each weight and activation loses at each width."""

    losses: tuple[LossFinding, ...]
    samples: Count
    metric: str | None
    correlation: dict[str, Number | None]


@dataclass(frozen=True)
class MeasuredFinding:
    """How a network did on the samples that a search held back."""

    noise: Power | None
    agreement: Share | None = None
    top1: Share | None = None
    metric: Number | None = None


@dataclass(frozen=True)
class PointFinding:
    """One choice of widths, its costs and what was measured of it."""

    name: str
    costs: dict[str, Number]
    predicted: Number | None
    measured: MeasuredFinding
    on_front: bool
    in_budget: bool


@dataclass(frozen=True)
class BaseFinding:
    """The most precise scheme everywhere, to which costs are compared."""

    scheme: str
    costs: dict[str, Number]


@dataclass(frozen=True)
class SearchFinding:
    """Choices of widths along one cost."""

    cost: str
    budget: dict[str, Number]
    base: BaseFinding
    best: str
    points: tuple[PointFinding, ...]
    held_back: Count


@dataclass(frozen=True)
class Findings:
    """All that was measured; ``None`` for what was not.

    Attributes:
        version: of this record.
        fidelity: outputs on calibration data.
        tensors: activations and weights on real data.
        evaluation: accuracy.
        sensitivity: losses of single choices of widths.
        search: choices of widths under a budget.
    """

    version: int = FINDINGS_VERSION
    fidelity: FidelityFinding | None = None
    tensors: TensorFindings | None = None
    evaluation: EvaluationFinding | None = None
    sensitivity: SensitivityFinding | None = None
    search: SearchFinding | None = None

    def including(self, found: object) -> Findings:
        """With one more analysis; one of the same kind is replaced.

        A search brings the sensitivity that it began with.

        Args:
            found: a ``Diagnosis``, ``Activations``, ``Evaluation``, ``Fidelity``, ``Sensitivity``
                or ``SearchResult``, or the parsed JSON of one.

        Raises:
            InputError: it is none of these, or of an unknown version, or damaged.
        """
        document = _document(found)
        kind = document.get("kind")
        if kind not in (*_VERSIONS, "fidelity"):
            raise InputError(
                f"a report cannot take what is {_named(found, kind)}; it takes the results of "
                "diagnose, evaluate, sensitivity and search"
            )
        version = document.get("schema_version", 1)
        if version != _VERSIONS.get(kind, 1):
            raise InputError(
                f"the {kind} has schema version {version!r}, this package reads "
                f"{_VERSIONS[kind]}; make it again"
            )
        if kind == "fidelity":
            return replace(self, fidelity=_read(FidelityFinding, document, kind))
        if kind in ("activations", "diagnosis"):
            return replace(self, tensors=_read(TensorFindings, document, kind))
        if kind == "evaluation":
            return replace(self, evaluation=_read(EvaluationFinding, document, kind))
        if kind == "sensitivity":
            return replace(self, sensitivity=_read(SensitivityFinding, document, kind))
        search = _read(SearchFinding, document, "search")
        inner = _read(SensitivityFinding, document.get("sensitivity", {}), "search")
        return replace(self, search=search, sensitivity=inner)

    def ops(self) -> Iterator[tuple[str, str]]:
        """Ops with a weight that something was measured of: what it was, and the op's name."""
        for weight in () if self.tensors is None else self.tensors.weights:
            yield "diagnosis", weight.name
        for loss in () if self.sensitivity is None else self.sensitivity.losses:
            if loss.kind == "weight":
                yield "sensitivity", loss.name

    def including_all(self, found: Iterable[object]) -> Findings:
        """:meth:`including`, one after the other."""
        findings = self
        for each in found:
            findings = findings.including(each)
        return findings


def _document(found: object) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return found
    to_json: Callable[[], str] | None = getattr(found, "to_json", None)
    document = json.loads(to_json()) if to_json is not None else {}
    return document if isinstance(document, dict) else {}


def _named(found: object, kind: object) -> str:
    return f"of kind {kind!r}" if kind is not None else f"a {type(found).__name__}"


def _read(cls: type[Any], document: Any, kind: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"the {kind} is damaged at {place}: {first['msg']}; make it again"
        ) from error
