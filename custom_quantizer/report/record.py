"""What became of every op: records, their versioned JSON, and two views of that JSON.

:func:`inspect` reads a converted graph, :func:`inspect_program` a ``.pte`` and nothing else. Both
make frozen records; :meth:`Report.to_json` writes them down, and the terminal and HTML views
render that document without looking at anything else, so a saved report shows the same page.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.bias import MAX_EXACT_BIAS, WIDE_BIAS, derived_scale
from custom_quantizer.core.borders import Border, output_of
from custom_quantizer.core.files import write_text_atomic
from custom_quantizer.core.formats import range_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    module_path,
    qparams_of,
    source_of,
    tensor_args,
    tensor_meta,
)
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import InputError, ProgramError, nearest, some
from custom_quantizer.ops import PatternMatch, QuantizedOp, match_of, rule_of
from custom_quantizer.ops.backend import Backend
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.ops.placement import Placement, Tally, tally
from custom_quantizer.reference.accumulators import (
    accumulator_of,
    phases_of,
    weight_accumulator_bits,
)
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted
from custom_quantizer.report import html as _html
from custom_quantizer.report import views as _views
from custom_quantizer.report.findings import Findings

if TYPE_CHECKING:
    from custom_quantizer.backends.xnnpack import LoweredProgram
    from custom_quantizer.backends.xnnpack.op_record import RecordedOp
    from custom_quantizer.backends.xnnpack.readback import (
        DelegateContents,
        DelegateOp,
        DelegateTensor,
        KernelCall,
        ValueInfo,
    )

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
    "inspect",
    "inspect_program",
]

SCHEMA_VERSION = 2
"""Of the JSON. Version 1 is read as well; a reader refuses every other."""

Compute = Literal["integer", "dynamic", "float", "convert"]
Granularity = Literal["per_tensor", "per_channel", "per_group"]

_DocumentT = TypeVar("_DocumentT", bound="_Document")


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


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
            ``"convert"``: between float and integers.
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


# ---------------------------------------------------------------------------------------------
# Of a converted graph
# ---------------------------------------------------------------------------------------------


def inspect(converted: GraphModule, lowered: LoweredProgram | None = None) -> Report:
    """Say of every op of a converted graph what it computes on, and why.

    Ops in float have a row with the reason, like all others; so have the places where a tensor is
    requantized. The graph may come from another quantizer: then there are no schemes to show.

    Args:
        converted: what ``convert_pt2e`` returns.
        lowered: the program made of it; adds where each op runs.

    Raises:
        ConversionError: the graph was prepared but not converted, or quantizes nothing.
        InputError: ``lowered`` was made of another graph.
    """
    return report_of(read_converted(converted), lowered)


def report_of(graph: ConvertedGraph, lowered: LoweredProgram | None = None) -> Report:
    """:func:`inspect`, for whom the graph was read already."""
    converted = graph.model
    ops: dict[Node, QuantizedOp | FloatOp] = {op.node: op for op in graph}
    rows = []
    for node in converted.graph.nodes:
        found = ops.get(node)
        if isinstance(found, QuantizedOp):
            row = _integer_row(converted, found, graph.backend)
            rows.append(replace(row, needs=_needs(node, row)))
        elif found is not None:
            row = _float_row(converted, found, graph.backend)
            rows.append(replace(row, needs=_needs(node, row)))
        elif is_quantize(node) and is_dequantize(node.args[0]) and is_static(node):
            rows.append(_requantize_row(converted, node))
    borders = graph.borders
    placeholders = [node for node in converted.graph.nodes if node.op == "placeholder"]
    leaves = pytree.tree_leaves(output_of(converted).args[0])
    report = Report(
        tuple(rows),
        tuple(
            _model_input(converted, node) if border is None else _border(converted, node, border)
            for node, border in zip(placeholders, borders.inputs, strict=True)
            if tensor_meta(node) is not None
        ),
        tuple(
            _tensor(converted, value) if border is None else _border(converted, value, border)
            for value, border in zip(leaves, borders.outputs, strict=True)
            if isinstance(value, Node)
        ),
    )
    return report if lowered is None else _with_lowering(report, lowered)


def _integer_row(model: GraphModule, op: QuantizedOp, backend: Backend) -> OpRow:
    node, match = op.node, op.match
    chosen, reason = _recorded(node)
    accumulator = accumulator_of(op)
    sources = zip(match.inputs, op.inputs, strict=True)
    weight = None if match.weight is None else _weight(model, match)
    low, high = op.bounds or (None, None)
    fused = None if op.output_node is node else op.output_node
    return OpRow(
        node=node.name,
        path=module_path(node),
        family=match.rule.family,
        target=str(node.target),
        fused=None if fused is None else fused.name,
        fused_family=None if fused is None else _family(fused),
        low=low,
        high=high,
        scheme=chosen,
        compute="integer",
        reason=reason,
        inputs=tuple(
            _quantized(model, source, qparams, _dtype(source)) for source, qparams in sources
        ),
        weight=weight,
        bias=_integer_bias(model, match),
        output=_quantized(model, op.output_node, op.output, _dtype(*op.output_node.users)),
        accumulator_bits=None if accumulator is None else accumulator.bits,
        written=original_name(node),
        placement=backend.predict(match, op.formats).kernel.placement.value,
    )


def _float_row(model: GraphModule, op: FloatOp, backend: Backend) -> OpRow:
    node = op.node
    match = match_of(node)
    chosen, reason = _recorded(node)
    if match is not None:
        inputs = tuple(_tensor(model, source) for source in match.inputs)
        weight = None if match.weight is None else _weight(model, match)
    else:
        inputs, weight = tuple(_tensor(model, source) for source in tensor_args(node)), None
    dynamic = any(record.dynamic for record in inputs)
    if chosen is not None and not dynamic:
        asked = weight is not None and scheme(chosen).bias is None
        reason = f"{op.reason}, {'as' if asked else 'although'} {reason} asks for {chosen}"
    users = effective_users(node)
    placement = Placement.INTEGER if dynamic else backend.in_float(node).placement
    return OpRow(
        node=node.name,
        path=module_path(node),
        family=_family(node),
        target=str(node.target),
        fused=None,
        fused_family=None,
        low=None,
        high=None,
        scheme=chosen,
        compute="dynamic" if dynamic else "float",
        reason=reason or op.reason,
        inputs=inputs,
        weight=weight,
        bias=None if match is None else _any_bias(model, match, inputs, weight),
        output=_tensor(model, users[0] if len(users) == 1 and is_quantize(users[0]) else node),
        accumulator_bits=None,
        written=original_name(node),
        placement=placement.value,
    )


def _requantize_row(model: GraphModule, node: Node) -> OpRow:
    return OpRow(
        node=node.name,
        path="",
        family="requantize",
        target=str(node.target),
        fused=None,
        fused_family=None,
        low=None,
        high=None,
        scheme=None,
        compute="integer",
        reason="the tensor is wanted with another scale, zero point or width",
        inputs=(_tensor(model, cast(Node, node.args[0])),),
        weight=None,
        bias=None,
        output=_tensor(model, node),
        accumulator_bits=None,
    )


def _needs(node: Node, row: OpRow) -> tuple[str, ...]:
    known = {record.source for record in row.inputs}
    sources = (source_of(source) for source in node.all_input_nodes)
    names = [s.name for s in sources if s.op in ("placeholder", "call_function")]
    return tuple(name for name in dict.fromkeys(names) if name not in known)


def _recorded(node: Node) -> tuple[str | None, str]:
    """Scheme and reason that the quantizer left at the node."""
    record = cast("Mapping[str, Any]", node.meta.get(META_KEY) or {})
    return record.get("scheme"), str(record.get("reason") or "")


def _family(node: Node) -> str:
    rule = rule_of(node)
    return str(node.target) if rule is None else rule.family


def _model_input(model: GraphModule, node: Node) -> TensorRecord:
    """An input of the model, quantized if all who use it agree on how."""
    records = [_tensor(model, user) for user in effective_users(node) if user.op == "call_function"]
    same = len(set(records)) == 1 and records[0].bits is not None
    return replace(records[0] if same else _tensor(model, node), source=node.name)


def _border(model: GraphModule, node: Node, border: Border) -> TensorRecord:
    """An input or output that is handed over as integers."""
    return _border_record(border.name, _shape(model, node), border)


def _border_record(source: str, shape: tuple[int | str, ...], border: Border) -> TensorRecord:
    record = TensorRecord(source, shape, _dtype_name(border.dtype), border=True)
    ends = (border.quant_min, border.quant_max)
    return _with_scales(record, (border.scale,), border.zero_point, *ends, None)


def _tensor(model: GraphModule, node: Node) -> TensorRecord:
    """The record of what ``node`` computes, reading through quantize and dequantize nodes."""
    dtype = _dtype(node)
    if node.target is DEQUANTIZE_GROUPED:
        values, block, scale = node.args[:3]
        low, high = (int(cast(int, bound)) for bound in node.args[5:7])
        stored = _dtype_name(dtype or torch.int8)
        record = TensorRecord(cast(Node, values).name, _shape(model, node), stored)
        scales, size = constant_of(model, cast(Node, scale)), int(cast("list[int]", block)[-1])
        return _with_group_scales(record, scales, low, high, 0, size)
    if not (is_quantize(node) or is_dequantize(node)):
        meta = tensor_meta(node)
        real = torch.float32 if meta is None else meta.dtype
        return TensorRecord(node.name, _shape(model, node), _dtype_name(real))
    if is_static(node):
        return _quantized(model, node, qparams_of(model, node), dtype)
    low, high = (int(cast(int, bound)) for bound in node.args[3:5])
    return TensorRecord(
        source_of(node).name,
        _shape(model, node),
        _dtype_name(dtype or torch.int8),
        bits=range_bits(low, high),
        quant_min=low,
        quant_max=high,
        dynamic=True,
    )


_MOST_CHANNELS = 4096
"""Of a weight with one scale, for which extremes are kept: embeddings have more."""


def _weight(model: GraphModule, match: PatternMatch) -> TensorRecord:
    """The record of a weight, with the extremes of each output channel if it is integers."""
    node = cast(Node, match.weight)
    record = _tensor(model, node)
    if record.bits is None or not node.args or not is_constant(node.args[0]):
        return record
    integers = constant_of(model, cast(Node, node.args[0]))
    many = record.axis is None and integers.shape[match.weight_axis] > _MOST_CHANNELS
    if not integers.numel() or many:
        return record
    low, high = torch.aminmax(integers.movedim(match.weight_axis, 0).flatten(1), dim=1)
    return replace(record, minima=tuple(low.tolist()), maxima=tuple(high.tolist()))


def _quantized(
    model: GraphModule, node: Node, qparams: QParams, dtype: torch.dtype | None
) -> TensorRecord:
    """The record of integers; a weight carries where its scale was raised."""
    scale = qparams.scale
    scales = tuple(scale.tolist()) if isinstance(scale, Tensor) else (scale,)
    bits = range_bits(qparams.quant_min, qparams.quant_max)
    raised = cast("dict[int, float]", (node.meta.get(META_KEY) or {}).get("raised") or {})
    record = TensorRecord(
        source_of(node).name,
        _shape(model, node),
        _dtype_name(dtype) if dtype is not None else f"int{8 if bits <= 8 else 16}",
        raised=tuple(sorted(raised.items())),
    )
    return _with_scales(
        record, scales, qparams.zero_point, qparams.quant_min, qparams.quant_max, qparams.axis
    )


def _with_scales(
    record: TensorRecord,
    scales: tuple[float, ...],
    zero_point: int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> TensorRecord:
    largest = max(scales)
    return replace(
        record,
        bits=range_bits(quant_min, quant_max),
        granularity="per_tensor" if axis is None else "per_channel",
        scales=scales,
        scale_min=min(scales),
        scale_max=largest,
        zero_point=zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        real_min=(quant_min - zero_point) * largest,
        real_max=(quant_max - zero_point) * largest,
        axis=axis,
        channels=None if axis is None else len(scales),
    )


def _with_group_scales(
    record: TensorRecord,
    scales: Tensor | np.ndarray[Any, Any],
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> TensorRecord:
    """The record of a weight with one scale for each group of input channels, zero point 0."""
    smallest, largest = float(scales.min()), float(scales.max())
    return replace(
        record,
        bits=range_bits(quant_min, quant_max),
        granularity="per_group",
        scale_min=smallest,
        scale_max=largest,
        zero_point=0,
        quant_min=quant_min,
        quant_max=quant_max,
        real_min=quant_min * largest,
        real_max=quant_max * largest,
        axis=axis,
        channels=int(scales.shape[0]),
        group_size=group_size,
    )


def _integer_bias(model: GraphModule, match: PatternMatch) -> BiasRecord | None:
    """The derived bias, its scale compared with the product that it has to be."""
    node = match.bias
    if node is None:
        return None
    constant = cast(Node, node.args[0])
    qparams = qparams_of(model, node)
    weight = qparams_of(model, cast(Node, match.weight))
    data = qparams_of(model, match.inputs[0])
    unit = derived_scale(
        cast(float, data.scale), expand_channels(torch.as_tensor(weight.scale), match)
    )
    stored = torch.as_tensor(qparams.scale)
    _, exponent = torch.frexp(stored / unit)
    shift = exponent - 1
    wide = max(q.bits for q in (weight, data)) > 8
    return replace(
        _bias_integers(
            constant.name,
            constant_of(model, constant).numpy(),
            stored.reshape(-1).numpy(),
            range_bits(qparams.quant_min, qparams.quant_max),
        ),
        limit=min(WIDE_BIAS if wide else MAX_EXACT_BIAS, qparams.quant_max),
        shift=int(shift.max()),
        # Doubling is exact, so equal floats here are equal bits.
        derived=bool((shift >= 0).all()) and torch.equal(torch.ldexp(unit, shift), stored),
    )


def _any_bias(
    model: GraphModule,
    match: PatternMatch,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
) -> BiasRecord | None:
    """The bias of an op that is not an integer op, and why it is float if it is."""
    node = match.bias
    if node is None or weight is None:
        return None
    if is_dequantize(node) and is_constant(node.args[0]) and all(t.scales for t in inputs):
        return _integer_bias(model, match)
    channels = _shape(model, node)[-1:]
    chosen, _ = _recorded(match.node)
    if any(record.dynamic for record in inputs):
        reason = "the input scale is only known at run time, so no bias scale follows from it"
    elif weight.bits is None or any(record.bits is None for record in inputs):
        reason = "the op is in float"
    elif not is_constant(node):
        reason = f"it is computed by {describe(node)}, so it cannot be folded into the accumulator"
    else:
        asked = chosen is not None and scheme(chosen).bias is None
        reason = (
            f"{f'{chosen} leaves it so' if asked else 'the quantizer left it so'}; XNNPACK's "
            "serializer quantizes it again when the graph is lowered"
        )
    return BiasRecord(
        node.name,
        _tensor(model, node).dtype,
        int(channels[0]) if channels and isinstance(channels[0], int) else 1,
        reason=reason,
    )


def _bias_integers(
    source: str, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], bits: int
) -> BiasRecord:
    integers = tuple(int(value) for value in values.reshape(-1))
    largest = max((abs(value) for value in integers), default=0)
    return BiasRecord(
        source,
        str(values.dtype),
        len(integers),
        bits=bits,
        integers=integers,
        scales=tuple(float(scale) for scale in scales.reshape(-1)),
        minimum=min(integers, default=0),
        maximum=max(integers, default=0),
        bits_used=largest.bit_length() + 1,
    )


def _dtype(*nodes: Node) -> torch.dtype | None:
    """The dtype in which the first quantize or dequantize node of ``nodes`` stores."""
    for node in nodes:
        if is_quantize(node) or is_dequantize(node) or node.target is DEQUANTIZE_GROUPED:
            for arg in node.args:
                if isinstance(arg, torch.dtype):
                    return arg
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(model: GraphModule, node: Node) -> tuple[int | str, ...]:
    source = source_of(node)
    meta = constant_of(model, source) if is_constant(source) else tensor_meta(node)
    if meta is None:
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in meta.shape)


def _with_lowering(report: Report, lowered: LoweredProgram) -> Report:
    found = {op.node: op for op in lowered.report.ops}
    expected = {row.node for row in report.rows if row.family != "requantize"}
    if set(found) != expected:
        (first, *_) = sorted(set(found) ^ expected)
        raise InputError(
            f"the program was lowered from another graph: only one of them has {first!r}; give "
            "what lower(converted, example) returned for this one"
        )
    rows = tuple(
        replace(
            row,
            backend=op.backend.label,
            backend_reason=op.reason,
            written=op.written,
            placement=op.backend.placement.value,
        )
        if (op := found.get(row.node)) is not None
        else row
        for row in report.rows
    )
    program = lowered.report
    summary = LoweringRecord(
        program.delegates, tuple(program.outside), program.size_bytes, _integer_biases(lowered)
    )
    return replace(report, rows=rows, lowering=summary)


def _integer_biases(lowered: LoweredProgram) -> tuple[str, ...]:
    from custom_quantizer.backends.xnnpack.program import find_weighted

    pairs = ((op.node, find_weighted(lowered.contents, op)) for op in lowered.report.ops)
    return tuple(
        name
        for name, found in pairs
        if found is not None
        and found[1].bias is not None
        and found[0].tensors[found[1].bias].dtype == "int32"
    )


# ---------------------------------------------------------------------------------------------
# Of a .pte
# ---------------------------------------------------------------------------------------------


def inspect_program(source: str | os.PathLike[str] | bytes) -> ProgramReport:
    """Say of every call in a ``.pte`` what it computes on, from the file alone.

    Args:
        source: path of the file, or its bytes.

    Raises:
        ProgramError: it cannot be read.
    """
    # Reading a file needs the package that knows executorch; inspecting a graph does not.
    from custom_quantizer.backends.xnnpack.border_constants import borders_in
    from custom_quantizer.backends.xnnpack.readback import DelegateCall, read_program

    contents = read_program(source)
    inputs: list[TensorRecord] = []
    outputs: list[TensorRecord] = []
    names: Counter[str] = Counter()
    rows: list[ProgramRow] = []
    ops: list[ProgramOp] = []
    for method in contents.methods:
        recorded = (contents.ops or {}).get(method.name, ())
        # What is folded into another op may share the nodes of that one; of others, the first has
        # the name.
        kept = [op for op in reversed(recorded) if op.placement is not Placement.FOLDED]
        by_handle = {handle: op for op in kept for handle in op.handles}
        by_call = {position: op for op in kept for position in op.calls}
        outside = itertools.count()
        found: list[ProgramRow] = []
        for call in method.calls:
            if isinstance(call, DelegateCall):
                delegate = method.delegates[call.delegate]
                for node in delegate.ops:
                    row = _delegate_row(method.name, call.delegate, delegate, node)
                    found.append(_part_of(row, by_handle.get(node.debug_handle)))
            else:
                row = _kernel_row(method.name, call)
                found.append(_part_of(row, by_call.get(next(outside))))
        prefix = f"{method.name}: " if len(contents.methods) > 1 and recorded else ""
        borders = borders_in(method, contents.constants)
        for records, values, found_borders in (
            (inputs, method.inputs, borders.inputs),
            (outputs, method.outputs, borders.outputs),
        ):
            records += starmap(_program_border, zip(values, found_borders, strict=True))
        rows += _with_names(found, names, prefix, bool(recorded))
        ops += _program_ops(method.name, recorded)
    return ProgramReport(
        tuple(rows),
        contents.kernels,
        tuple(delegate.backend_id for delegate in contents.delegates),
        contents.size_bytes,
        contents.constant_bytes,
        None if contents.ops is None else tuple(ops),
        contents.ops_note,
        tuple(inputs),
        tuple(outputs),
    )


def _program_border(value: ValueInfo, border: Border | None) -> TensorRecord:
    """An input or output of a program."""
    if border is None:
        return TensorRecord("", value.shape, value.dtype)
    return _border_record("", value.shape, border)


def _part_of(row: ProgramRow, op: RecordedOp | None) -> ProgramRow:
    """The row with the op of the converted graph that stands behind it, if the file says which."""
    return row if op is None else replace(row, op=op.written, path=op.path)


def _with_names(
    rows: Sequence[ProgramRow], names: Counter[str], prefix: str, recorded: bool
) -> Iterator[ProgramRow]:
    """Give each row a name: the main one of an op that of the op.

    That is the one with the weight, else the last, which gives the result.
    """
    main: dict[str, ProgramRow] = {}
    for row in rows:
        if row.op and (row.op not in main or main[row.op].weight is None or row.weight is not None):
            main[row.op] = row
    for row in rows:
        if not recorded:
            yield replace(row, name=_numbered(row.kind, names))
        elif main.get(row.op) is row:
            yield replace(row, name=prefix + row.op)
        else:
            where = row.op or ("kernel" if row.delegate is None else "delegate")
            yield replace(row, name=_numbered(f"{prefix}{where}/{row.kind}", names))


def _program_ops(method: str, recorded: Sequence[RecordedOp]) -> Iterator[ProgramOp]:
    """The ops as they were written: of several parts, one that decides says how it runs."""
    placements = tally((op.written, op.placement) for op in recorded).placements
    parts: dict[str, list[RecordedOp]] = {}
    for op in recorded:
        parts.setdefault(op.written, []).append(op)
    for name, found in parts.items():
        decisive = next(op for op in found if op.placement is placements[name])
        yield ProgramOp(
            name=name,
            method=method,
            path=found[0].path,
            family=", ".join(dict.fromkeys(op.family for op in found)),
            placement=decisive.placement.value,
            backend=decisive.kernel,
            reason=decisive.reason,
            has_bias=any(op.has_bias for op in found),
        )


def _numbered(kind: str, names: Counter[str]) -> str:
    """A unique name: ``conv2d``, ``conv2d_1``, of each kind in execution order."""
    count = names[kind]
    names[kind] += 1
    return f"{kind}_{count}" if count else kind


_NO_TENSORS = frozenset({"int", "double", "bool", "string", "null"})


def _kernel_row(method: str, call: KernelCall) -> ProgramRow:
    tensors = tuple(
        TensorRecord("", argument.shape, argument.dtype)
        for argument in call.arguments
        if argument.dtype not in _NO_TENSORS
        and (argument.dtype == "tensor_list" or not argument.dtype.endswith("_list"))
    )
    # What an out variant returns are its out arguments, named once more.
    outputs = 1
    for count in range(1, len(tensors) // 2 + 1):
        if tensors[-count:] == tensors[-2 * count : -count]:
            outputs, tensors = count, tensors[:-count]
            break
    return ProgramRow(
        name=call.name,
        method=method,
        delegate=None,
        kind=call.name,
        compute="float",
        reason="a portable kernel outside the delegates",
        inputs=tensors[:-outputs],
        weight=None,
        bias=None,
        outputs=tensors[-outputs:],
        low=None,
        high=None,
        accumulator_bits=None,
    )


def _delegate_row(
    method: str, index: int, delegate: DelegateContents, op: DelegateOp
) -> ProgramRow:
    inputs = tuple(_stored(delegate.tensors[i]) for i in op.inputs)
    outputs = tuple(_stored(delegate.tensors[i]) for i in op.outputs)
    weight = None if op.weight is None else _stored(delegate.tensors[op.weight])
    compute = _compute(inputs, outputs, weight)
    bias = None
    if op.bias is not None:
        bias = _stored_bias(delegate, op, inputs, weight, compute)
    return ProgramRow(
        name=op.kind,
        method=method,
        delegate=index,
        kind=op.kind,
        compute=compute,
        reason="its tensors are float in the file" if compute == "float" else "",
        inputs=inputs,
        weight=weight,
        bias=bias,
        outputs=outputs,
        low=_bound(op.params.get("output_min")),
        high=_bound(op.params.get("output_max")),
        accumulator_bits=_stored_accumulator_bits(delegate, op, inputs, weight, bias),
    )


def _compute(
    inputs: tuple[TensorRecord, ...],
    outputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
) -> Compute:
    data = (*inputs, *outputs)
    if any(record.dynamic for record in data):
        return "dynamic"
    if all(record.bits is None for record in data):
        return "float"
    if any(record.bits is None for record in (*data, *([] if weight is None else [weight]))):
        return "convert"
    return "integer"


def _bound(value: object) -> float | None:
    """A finite bound; JSON knows no infinity, and an infinite bound bounds nothing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


_PROGRAM_BITS = {"int4": 4, "int8": 8, "uint8": 8, "int32": 32}


def _stored(tensor: DelegateTensor) -> TensorRecord:
    record = TensorRecord(f"tensor {tensor.id}", tensor.shape, tensor.dtype)
    bits = _PROGRAM_BITS.get(tensor.dtype)
    if bits is None or tensor.quantization is None:
        return record
    low = 0 if tensor.dtype.startswith("u") else -(1 << (bits - 1))
    high = low + (1 << bits) - 1
    dynamic = tensor.quantization == "per_token_dynamic"
    if dynamic or tensor.scale is None:
        return replace(record, bits=bits, quant_min=low, quant_max=high, dynamic=dynamic)
    scales = np.asarray(tensor.scale, dtype=np.float32)
    if tensor.quantization != "per_channel_group":
        values = tuple(float(scale) for scale in scales.reshape(-1))
        return _with_scales(record, values, tensor.zero_point or 0, low, high, tensor.channel_axis)
    return _with_group_scales(record, scales, low, high, tensor.channel_axis, tensor.group_size)


def _stored_bias(
    delegate: DelegateContents,
    op: DelegateOp,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
    compute: Compute,
) -> BiasRecord:
    tensor = delegate.tensors[cast(int, op.bias)]
    where = f"tensor {tensor.id}"
    if tensor.constant_key is not None:
        where += f", constant {tensor.constant_key[:12]}"
    if tensor.dtype != "int32" or tensor.scale is None:
        reason = (
            "the input scale is only known at run time, so no bias scale follows from it"
            if compute == "dynamic"
            else "the op is in float"
        )
        return BiasRecord(where, tensor.dtype, math.prod(tensor.shape), reason=reason)
    scales = np.asarray(tensor.scale, dtype=np.float32).reshape(-1)
    derived = None
    if weight is not None and weight.scales and inputs[0].scales:
        unit = np.float32(inputs[0].scales[0]) * np.array(weight.scales, dtype=np.float32)
        derived = bool(np.array_equal(np.broadcast_to(unit, scales.shape), scales))
    return replace(_bias_integers(where, tensor.array(), scales, 32), derived=derived)


def _stored_accumulator_bits(
    delegate: DelegateContents,
    op: DelegateOp,
    inputs: tuple[TensorRecord, ...],
    weight: TensorRecord | None,
    bias: BiasRecord | None,
) -> int | None:
    data = inputs[0] if inputs else None
    if weight is None or not weight.scales or data is None or not data.scales:
        return None
    stored = torch.tensor(delegate.weight(op))
    weights: Iterable[Tensor] = (stored,)
    if op.kind == "conv_transpose2d":
        groups = cast(int, op.params.get("groups", 1))
        weights = phases_of(stored, groups, _pair(op, "stride"), _pair(op, "dilation"))
    return weight_accumulator_bits(
        weights,
        quant_min=cast(int, data.quant_min),
        quant_max=cast(int, data.quant_max),
        zero_point=cast(int, data.zero_point),
        bias=None if bias is None or bias.bits is None else torch.tensor(bias.integers),
    )


def _pair(op: DelegateOp, name: str) -> tuple[int, int]:
    """Height and width of a parameter that divides positions, as no damaged file may give it."""
    value = op.params.get(name)
    if isinstance(value, tuple) and len(value) == 2 and min(value) >= 1:
        return value
    raise ProgramError(
        f"the {name} of a {op.kind} node is {value}, not two positive numbers; the file was not "
        "written by a known version"
    )
