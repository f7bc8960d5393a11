"""Records of what became of every op, their versioned JSON, and two views of that JSON.

:func:`~custom_quantizer.report.graph_record.inspect` makes them of a converted graph,
:func:`~custom_quantizer.report.program_record.inspect_program` of a ``.pte`` and nothing else.
:meth:`Report.to_json` writes them down, and the terminal and HTML views render that document
without looking at anything else, so a saved report shows the same page.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from custom_quantizer.core.files import write_text_atomic
from custom_quantizer.core.schemes import Granularity
from custom_quantizer.errors import InputError, nearest, some
from custom_quantizer.ops.placement import Placement, Tally
from custom_quantizer.report import html as _html
from custom_quantizer.report import views as _views
from custom_quantizer.report.findings import Findings

__all__ = [
    "SCHEMA_VERSION",
    "BiasRecord",
    "LoweringRecord",
    "OpRow",
    "ProgramOp",
    "ProgramReport",
    "ProgramRow",
    "Report",
    "TensorRecord",
]

SCHEMA_VERSION = 2
"""Of the JSON. Version 1 is read as well; a reader refuses every other."""

Compute = Literal["integer", "dynamic", "float", "convert"]

_DocumentT = TypeVar("_DocumentT", bound="_Document")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as an op takes it or hands it on.

    Attributes:
        source: node that computes or holds it; of a ``.pte``, the tensor's number.
        shape: symbolic sizes as text.
        dtype: in which it is stored.
        bits: of its integers, from their range: 4 for ``[-7, 7]`` in int8; ``None``: float.
        granularity: what one scale is for; ``None``: float, or known at run time only.
        scales: float32 values, one, or one per channel; empty with ``per_group``.
        scale_min: smallest scale.
        scale_max: largest scale.
        zero_point: of all channels.
        quant_min: smallest integer it may hold.
        quant_max: largest.
        real_min: the real number ``quant_min`` stands for, at the largest scale.
        real_max: likewise.
        axis: channel axis of a scale per channel.
        channels: number of scales along it.
        group_size: input channels that share a scale, with ``per_group``.
        dynamic: scale and zero point are chosen while the program runs.
        raised: of a weight, ``(channel, factor)`` where its scale was raised so that a bias fits.
        border: of an input or output of the program: it is handed over as integers, not as float32.
        minima: of a weight in a converted graph: the smallest integer of each output channel;
            empty for a table of thousands of rows with one scale.
        maxima: likewise the largest.
    """

    source: str
    shape: tuple[int | str, ...]
    dtype: str
    bits: int | None = None
    granularity: Granularity | None = None
    scales: tuple[float, ...] = ()
    scale_min: float | None = None
    scale_max: float | None = None
    zero_point: int | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    real_min: float | None = None
    real_max: float | None = None
    axis: int | None = None
    channels: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    raised: tuple[tuple[int, float], ...] = ()
    border: bool = False
    minima: tuple[int, ...] = ()
    maxima: tuple[int, ...] = ()


@dataclass(frozen=True)
class BiasRecord:
    """The bias of a convolution or linear layer.

    Attributes:
        source: constant that holds it; of a ``.pte``, the tensor's number and constant.
        dtype: in which it is stored.
        channels: output channels.
        bits: of the format, 32 unless the scheme asks for fewer; ``None``: float.
        integers: as stored; empty for a float bias.
        scales: float32, one, or one per channel.
        minimum: smallest integer.
        maximum: largest.
        bits_used: signed bits the largest of them needs.
        limit: largest absolute integer a derived bias may have; beyond it the weight scale is
            raised. ``None`` where nothing is known of it, as in a ``.pte``.
        shift: largest left shift that joins a bias of fewer than 32 bits to the accumulator.
        derived: its scale is ``s_x * s_w`` (times ``2**shift``), compared bit for bit as float32;
            ``None``: there is no such scale.
        reason: why it stays float.
    """

    source: str
    dtype: str
    channels: int
    bits: int | None = None
    integers: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    bits_used: int | None = None
    limit: int | None = None
    shift: int = 0
    derived: bool | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What the rows of both reports say of an op.

    Attributes:
        compute: ``"integer"``; ``"dynamic"``: integer, with scales chosen at run time; ``"float"``;
            ``"convert"``: between float and integers, and the order of floats before that.
        reason: the rule that decided, or why the op is float.
        inputs: activations, in argument order.
        weight: of convolutions and linear layers.
        bias: likewise; ``None``: the op has none.
        low: bound of the fused activation, a real number; ``None``: unbounded.
        high: likewise.
        accumulator_bits: signed bits its accumulator needs in the worst case.
    """

    compute: Compute
    reason: str
    inputs: tuple[TensorRecord, ...]
    weight: TensorRecord | None
    bias: BiasRecord | None
    low: float | None
    high: float | None
    accumulator_bits: int | None

    @property
    def integer(self) -> bool:
        """Whether it computes on integers whose scales are known before it runs."""
        return self.compute == "integer"


@dataclass(frozen=True, kw_only=True)
class OpRow(_Row):
    """One op of a converted graph.

    Attributes:
        node: its anchor.
        path: module path.
        family: of the registry, ``"requantize"``, or the aten overload of an unknown op.
        target: the aten overload.
        fused: node of the activation that is part of the op.
        fused_family: what that activation is.
        scheme: name, where the quantizer recorded one.
        output: what it hands on.
        backend: where it runs, if the graph was lowered.
        backend_reason: why it is not a plain int8 kernel.
        written: name of the captured call that it is a part of; its own, if it is all of it.
        placement: where it computes, a value of
            :class:`~custom_quantizer.ops.placement.Placement`: what is expected, until the graph
            is lowered. ``None``: it is no op of the captured graph, but a requantization.
        needs: nodes whose results it takes too, and that ``inputs`` has no record of: indices, or
            an op with several results.
    """

    node: str
    path: str
    family: str
    target: str
    fused: str | None
    fused_family: str | None
    scheme: str | None
    output: TensorRecord
    backend: str | None = None
    backend_reason: str | None = None
    written: str = ""
    placement: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProgramRow(_Row):
    """One call of a ``.pte``: a node inside a delegate, or a kernel outside.

    Attributes:
        name: unique in the program. Where the file says which op it belongs to: the name of that op
            for its main node, such as ``conv2d_5``, and ``conv2d_5/multiply`` for the others.
            Otherwise the delegate's kind and a number.
        method: entry point it belongs to.
        delegate: position among the delegates of the method; ``None``: outside.
        kind: of the delegate's node, or operator and overload of the kernel.
        outputs: what it computes.
        op: name of the captured call that it is a part of; empty: the file does not say.
        path: module path of that.
    """

    name: str
    method: str
    delegate: int | None
    kind: str
    outputs: tuple[TensorRecord, ...]
    op: str = ""
    path: str = ""


@dataclass(frozen=True)
class ProgramOp:
    """One op as the user wrote it, of the graph that a ``.pte`` was made of.

    Attributes:
        name: of the call in the captured graph.
        method: entry point it belongs to.
        path: module path.
        family: of the registry, or the aten overload; of each op that it became.
        placement: where it computes, a value of
            :class:`~custom_quantizer.ops.placement.Placement`.
        backend: the kernel it runs on.
        reason: why it is not a plain int8 kernel.
        has_bias: whether it adds one in the graph; a delegate adds zeros to some others.
    """

    name: str
    method: str
    path: str
    family: str
    placement: str
    backend: str
    reason: str
    has_bias: bool


@dataclass(frozen=True)
class LoweringRecord:
    """The program that a graph was lowered to.

    Attributes:
        delegates: delegate calls.
        outside: kernels called outside them.
        size_bytes: of the file.
        integer_biases: nodes of the graph whose bias is int32 in the file.
    """

    delegates: int
    outside: tuple[str, ...]
    size_bytes: int
    integer_biases: tuple[str, ...] = ()


class _Document:
    """What both reports can do: JSON there and back, and views of it."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        """The report as JSON: keys sorted, no NaN, the same text for equal reports."""
        return json.dumps(self._document(), indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls: type[_DocumentT], text: str) -> _DocumentT:
        """Read what :meth:`to_json` wrote; the result equals the report it came from.

        Raises:
            InputError: it is not JSON, not this kind of report, or of an unknown schema version.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the report is not JSON: {error}") from error
        header = document if isinstance(document, dict) else {}
        if header.get("kind") != cls.kind:
            raise InputError(
                f"the JSON is not a {cls.kind!r} report (its kind is {header.get('kind')!r}); give "
                f"what {cls.__name__}.to_json wrote"
            )
        if header.get("schema_version") not in (1, SCHEMA_VERSION):
            raise InputError(
                f"the report has schema version {header.get('schema_version')!r}, this package "
                f"reads 1 to {SCHEMA_VERSION}; inspect the model again"
            )
        try:
            report = TypeAdapter(cls).validate_json(text, strict=True)
            return report if header["schema_version"] == SCHEMA_VERSION else report._upgraded()
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"the report is damaged at {place}: {first['msg']}; inspect the model again"
            ) from error

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON; either all of it or nothing.

        Raises:
            InputError: the path cannot be written.
        """
        write_text_atomic(path, self.to_json() + "\n")
        return Path(path)

    def to_html(self, title: str = "") -> str:
        """One page without external resources: pictures and a table to search, with details.

        Args:
            title: such as the name of the model; empty: what it is a report of.
        """
        document = self._document()
        return _html.render(_views.view_of(document), document, title)

    def save_html(self, path: str | os.PathLike[str], title: str = "") -> Path:
        """Write the page; either all of it or nothing.

        Args:
            path: of the file.
            title: as for :meth:`to_html`.

        Raises:
            InputError: the path cannot be written.
        """
        write_text_atomic(path, self.to_html(title))
        return Path(path)

    def detail(self, name: str) -> str:
        """All that is known of one op, with the integers of its bias channel by channel.

        Args:
            name: of a row.

        Raises:
            InputError: no row has that name; the nearest are given.
        """
        view = _views.view_of(self._document())
        rows = (*view.rows, *view.unseen)
        for row in rows:
            if name in row.names:
                return _views.detail_text(row)
        known = [known for row in rows for known in row.names]
        near = nearest(str(name), known) or f"; it has {some(list(dict.fromkeys(known)))}"
        raise InputError(f"the report has no op {name!r}{near}")

    def __str__(self) -> str:
        return _views.text(_views.view_of(self._document()))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(cast(Any, self).rows)} rows>"

    def _upgraded(self: _DocumentT) -> _DocumentT:
        """What version 1 of the JSON says, in the words of today."""
        return self

    @property
    def tally(self) -> Tally | None:
        """How many ops compute where; ``None``: nothing says which ops there were."""
        return _views.tally_of(self._document())

    @property
    def biases(self) -> str:
        """How many biases are int32, and how many are not: one sentence."""
        return _views.bias_sentence(self._document())

    def _document(self) -> dict[str, Any]:
        header = {"kind": self.kind, "schema_version": SCHEMA_VERSION}
        return {**header, **asdict(cast(Any, self))}


@dataclass(frozen=True, repr=False)
class Report(_Document):
    """Every op of a converted graph; ``print(report)`` shows the table.

    Attributes:
        rows: in graph order.
        inputs: of the model.
        outputs: of the model.
        lowering: the program, if there is one.
        findings: what was measured of it; ``None``: nothing.
    """

    kind: ClassVar[str] = "graph"

    rows: tuple[OpRow, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    lowering: LoweringRecord | None = None
    findings: Findings | None = None

    def including(self, *found: object) -> Report:
        """The report together with what was measured; what is new replaces what was there.

        Args:
            found: results of :func:`~custom_quantizer.diagnose`,
                :func:`~custom_quantizer.evaluate`, :func:`~custom_quantizer.sensitivity` or
                :func:`~custom_quantizer.search`, a ``Fidelity``, or the parsed JSON of these.

        Raises:
            InputError: it is none of these, of an unknown version, damaged, or of another network.
        """
        if not found:
            return self
        findings = (self.findings or Findings()).including_all(found)
        known = {row.node for row in self.rows}
        for what, name in findings.ops():
            if name not in known:
                raise InputError(
                    f"the {what} is of another network than the report: it has {name!r}, which "
                    f"the report does not{nearest(name, known)}; make both of one model"
                )
        return replace(self, findings=findings)

    def _upgraded(self) -> Report:
        rows = tuple(map(_placed, self.rows))
        if self.lowering is None:
            return replace(self, rows=rows)
        stored = tuple(
            row.node
            for row in rows
            if row.bias is not None
            and row.bias.bits is not None
            and row.placement == Placement.INTEGER.value
        )
        return replace(self, rows=rows, lowering=replace(self.lowering, integer_biases=stored))


_LABELS_OF_1 = {
    "xnnpack int8": Placement.INTEGER,
    "xnnpack packed int4": Placement.INTEGER,
    "xnnpack int8 container": Placement.INTEGER,
    "xnnpack dynamic int8": Placement.INTEGER,
    "xnnpack table": Placement.TABLE,
    "xnnpack float, int16 emulated": Placement.EMULATED,
    "xnnpack float": Placement.FLOAT,
    "portable kernel, outside the delegate": Placement.OUTSIDE,
    "folded away": Placement.FOLDED,
}
"""Where ops computed, by the labels that version 1 of the JSON has in place of it."""


def _placed(row: OpRow) -> OpRow:
    """A row of version 1, which counts every op that runs for itself."""
    if row.family == "requantize":
        return row
    expected = Placement.FLOAT if row.compute == "float" else Placement.INTEGER
    placement = _LABELS_OF_1.get(row.backend or "", expected)
    return replace(row, written=row.node, placement=placement.value)


@dataclass(frozen=True, repr=False)
class ProgramReport(_Document):
    """Every call of a ``.pte``; ``print(report)`` shows the table.

    Attributes:
        rows: in execution order, method by method.
        kernels: operators called outside the delegates, in execution order.
        backends: of the delegates, in file order.
        size_bytes: of the file.
        constant_bytes: of the constants in it.
        ops: of the graph it was made of, in graph order; ``None``: the file does not say.
        note: why it does not, where more is known than that there is no record.
        inputs: of the program, method by method, quantized where it says what its integers stand
            for.
        outputs: likewise.
    """

    kind: ClassVar[str] = "program"

    rows: tuple[ProgramRow, ...]
    kernels: tuple[str, ...]
    backends: tuple[str, ...]
    size_bytes: int
    constant_bytes: int
    ops: tuple[ProgramOp, ...] | None = None
    note: str = ""
    inputs: tuple[TensorRecord, ...] = ()
    outputs: tuple[TensorRecord, ...] = ()
