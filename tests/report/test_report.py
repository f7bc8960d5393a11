"""The report says what is in the graph and in the file, number by number."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import OUTSIDE, outside
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.analysis.diagnosis import diagnose
from custom_quantizer.backends.xnnpack import LoweredProgram, lower, read_program
from custom_quantizer.errors import ConversionError, InputError, ProgramError
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference import accumulators
from custom_quantizer.report import program_record
from custom_quantizer.report.graph_record import inspect
from custom_quantizer.report.program_record import inspect_program
from custom_quantizer.report.record import (
    LoweringRecord,
    OpRow,
    ProgramReport,
    ProgramRow,
    Report,
    TensorRecord,
)

EXAMPLE = (torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(7)),)


class Residual(nn.Module):
    """Conv-bn-relu, depthwise, residual add, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x)
        return self.head(self.pool(x).flatten(1))


class Mixed(nn.Module):
    """A float op between integer ones, and a head that is left in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.sin(self.first(x)))
        return self.head(x.mean((2, 3), keepdim=True).flatten(1))


def convert(
    model: nn.Module, quantizer: Any, example: tuple[torch.Tensor, ...] = EXAMPLE
) -> GraphModule:
    exported = torch.export.export(model.eval(), example).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(*example)
    return convert_pt2e(prepared)


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    model.stem[1].running_mean.normal_()
    model.stem[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(model.stem[1].bias)
    return model


def residual_quantizer() -> IntegerQuantizer:
    return IntegerQuantizer().set_global("a8w8").set_module_name("head", "a8w4")


@pytest.fixture(scope="module")
def converted() -> GraphModule:
    return convert(residual(), residual_quantizer())


@pytest.fixture(scope="module")
def lowered(converted: GraphModule) -> LoweredProgram:
    return lower(converted, EXAMPLE)


@pytest.fixture(scope="module")
def report(converted: GraphModule, lowered: LoweredProgram) -> Report:
    return inspect(converted, lowered)


@pytest.fixture(scope="module")
def program(lowered: LoweredProgram) -> ProgramReport:
    return inspect_program(lowered.buffer)


@pytest.fixture(scope="module")
def mixed() -> tuple[Report, ProgramReport]:
    torch.manual_seed(1)
    quantizer = IntegerQuantizer().set_global("a8w8").set_module_name("head", None)
    graph = convert(Mixed(), quantizer)
    program = lower(graph, EXAMPLE)
    return inspect(graph, program), inspect_program(program.buffer)


def row_of(report: Report, node: str) -> OpRow:
    (row,) = (row for row in report.rows if row.node == node)
    return row


def kind_of(report: ProgramReport, kind: str) -> ProgramRow:
    (row,) = (row for row in report.rows if row.kind == kind)
    return row


def float32(value: Fraction | float) -> Fraction:
    """The float32 of the nearest float64, which is how the observers compute in Python floats."""
    return Fraction(float(np.float32(float(value))))


def width(low: int, high: int) -> int:
    """Signed bits that hold both, by search."""
    return next(n for n in range(1, 64) if -(2 ** (n - 1)) <= low and high < 2 ** (n - 1))


# ---------------------------------------------------------------------------------------------
# The rows of a graph
# ---------------------------------------------------------------------------------------------


def test_one_row_per_op_in_graph_order(report: Report) -> None:
    shown = [(r.node, r.path, r.family, r.fused, r.scheme, r.compute) for r in report.rows]
    assert shown == [
        ("conv2d", "stem.0", "conv", "relu", "a8w8", "integer"),
        ("conv2d_1", "depthwise", "conv", None, "a8w8", "integer"),
        ("add", "", "add", None, "a8w8", "integer"),
        ("adaptive_avg_pool2d", "pool", "adaptive_avg_pool2d", None, "a8w8", "integer"),
        ("flatten", "", "reshape", None, "a8", "integer"),
        ("linear", "head", "linear", None, "a8w4", "integer"),
    ]
    assert row_of(report, "linear").reason == 'set_module_name("head", "a8w4")'
    assert row_of(report, "conv2d").target == "aten.conv2d.default"
    assert (row_of(report, "conv2d").low, row_of(report, "conv2d").high) == (0.0, None)


def test_model_input_has_the_scale_of_its_range(report: Report) -> None:
    low, high = (Fraction(float(v)) for v in torch.aminmax(EXAMPLE[0]))
    scale = float32((high - low) / 255)
    zero_point = round(-128 - low / scale)
    (record,) = report.inputs
    assert record == dataclasses.replace(row_of(report, "conv2d").inputs[0], source="x")
    assert (record.dtype, record.bits, record.granularity) == ("int8", 8, "per_tensor")
    assert (Fraction(record.scale_max), record.zero_point) == (scale, zero_point)
    assert (record.quant_min, record.quant_max) == (-128, 127)
    assert record.shape == (2, 3, 10, 10)
    assert Fraction(record.real_max) == (127 - zero_point) * scale
    assert Fraction(record.real_min) == (-128 - zero_point) * scale


@pytest.mark.parametrize(
    ("node", "module", "levels"), [("conv2d_1", "depthwise", 127), ("linear", "head", 7)]
)
def test_weight_has_one_scale_per_output_channel(
    report: Report, node: str, module: str, levels: int
) -> None:
    weight = getattr(residual(), module).weight.detach()
    expected = [
        float32(Fraction(float(channel.abs().max())) / levels) for channel in weight.flatten(1)
    ]
    record = row_of(report, node).weight
    assert record is not None
    assert [Fraction(scale) for scale in record.scales] == expected
    assert (record.scale_min, record.scale_max) == (min(record.scales), max(record.scales))
    assert (record.dtype, record.bits) == ("int8", 8 if levels == 127 else 4)
    assert (record.quant_min, record.quant_max) == (-levels, levels)
    assert (record.granularity, record.axis, record.channels) == ("per_channel", 0, len(expected))
    assert record.shape == tuple(weight.shape)
    assert record.raised == ()


@pytest.mark.parametrize(("node", "module"), [("conv2d_1", "depthwise"), ("linear", "head")])
def test_bias_integers_are_rounded_once(report: Report, node: str, module: str) -> None:
    row = row_of(report, node)
    bias, weight = row.bias, row.weight
    assert bias is not None
    assert weight is not None
    data_scale = Fraction(row.inputs[0].scales[0])
    real = getattr(residual(), module).bias.detach().tolist()
    units = [data_scale * Fraction(scale) for scale in weight.scales]
    expected = [round(Fraction(b) / unit) for b, unit in zip(real, units, strict=True)]
    assert list(bias.integers) == expected
    assert [Fraction(scale) for scale in bias.scales] == [float32(unit) for unit in units]
    assert bias.derived is True
    assert (bias.dtype, bias.bits, bias.channels, bias.shift) == ("int32", 32, len(real), 0)
    assert (bias.minimum, bias.maximum) == (min(expected), max(expected))
    assert bias.bits_used == width(-max(map(abs, expected)), max(map(abs, expected)))
    assert bias.limit == 2**21
    assert bias.reason == ""


def test_a_folded_batch_norm_leaves_an_integer_bias(
    report: Report, lowered: LoweredProgram
) -> None:
    assert residual().stem[0].bias is None
    stored = lowered.integer_biases()
    assert set(stored) == {"conv2d", "conv2d_1", "linear"}
    for node, integers in stored.items():
        bias = row_of(report, node).bias
        assert bias is not None
        assert list(bias.integers) == integers.tolist()
    assert np.any(stored["conv2d"])


def test_accumulator_bits_are_those_of_the_worst_input(
    converted: GraphModule, report: Report
) -> None:
    row = row_of(report, "linear")
    assert row.bias is not None
    (data,) = row.inputs
    assert data.quant_min is not None
    assert data.quant_max is not None
    assert data.zero_point is not None
    low, high = data.quant_min - data.zero_point, data.quant_max - data.zero_point
    weight = converted.head_weight_integers.tolist()
    tops = [
        sum(max(w * low, w * high) for w in channel) + b
        for channel, b in zip(weight, row.bias.integers, strict=True)
    ]
    bottoms = [
        sum(min(w * low, w * high) for w in channel) + b
        for channel, b in zip(weight, row.bias.integers, strict=True)
    ]
    assert row.accumulator_bits == width(min(bottoms), max(tops))
    found = {row.op: row.bits for row in accumulators(converted)}
    assert {"linear", "add"} <= set(found)
    for one in report.rows:
        assert one.accumulator_bits == found.get(one.node)


def test_residual_add_has_two_inputs_with_their_own_scales(report: Report) -> None:
    add = row_of(report, "add")
    assert [record.source for record in add.inputs] == ["relu", "conv2d_1"]
    relu, depthwise = row_of(report, "conv2d").output, row_of(report, "conv2d_1").output
    assert add.inputs == (relu, depthwise)
    assert relu.zero_point == -128
    assert add.weight is None
    assert add.bias is None


def test_backend_of_every_op(report: Report) -> None:
    assert {row.node: row.backend for row in report.rows} == {
        "conv2d": "xnnpack int8",
        "conv2d_1": "xnnpack int8",
        "add": "xnnpack int8",
        "adaptive_avg_pool2d": "xnnpack int8",
        "flatten": "xnnpack int8",
        "linear": "xnnpack packed int4",
    }
    assert row_of(report, "linear").backend_reason == "int4 weights, two to a byte"


def test_without_a_program_nothing_is_said_of_the_backend(
    converted: GraphModule, report: Report
) -> None:
    alone = inspect(converted)
    assert alone.lowering is None
    assert {(row.backend, row.backend_reason) for row in alone.rows} == {(None, None)}
    assert [dataclasses.replace(r, backend=None, backend_reason=None) for r in report.rows] == list(
        alone.rows
    )


def test_float_ops_have_a_row_with_the_reason(mixed: tuple[Report, ProgramReport]) -> None:
    report, _ = mixed
    shown = [(row.node, row.compute, row.reason) for row in report.rows]
    assert shown == [
        ("conv2d", "integer", 'set_global("a8w8")'),
        ("sin", "float", "no integer form of aten.sin.default is known"),
        ("conv2d_1", "integer", 'set_global("a8w8")'),
        ("mean", "integer", 'set_global("a8w8")'),
        ("flatten", "integer", "moves values: keeps the integers it is given"),
        ("linear", "float", 'set_module_name("head", None)'),
    ]
    head = row_of(report, "linear")
    assert head.weight == TensorRecord("head_weight", (3, 6), "float32")
    assert head.bias is not None
    assert (head.bias.dtype, head.bias.bits, head.bias.channels) == ("float32", None, 3)
    assert head.bias.reason == "the op is in float"
    assert head.output == TensorRecord("linear", (2, 3), "float32")
    assert report.outputs == (head.output,)
    # The float op is handed integers and hands integers on.
    sin = row_of(report, "sin")
    assert sin.inputs == (row_of(report, "conv2d").output,)
    assert sin.output == row_of(report, "conv2d_1").inputs[0]


# ---------------------------------------------------------------------------------------------
# What other schemes leave in the graph
# ---------------------------------------------------------------------------------------------


def conv_pair() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))


def test_raised_weight_scales_are_told() -> None:
    torch.manual_seed(3)
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.bias[2] = 3e5
    plain = float32(Fraction(float(model.weight[2].detach().abs().max())) / 127)
    example = (torch.randn(5, 6),)
    (row,) = inspect(convert(model, IntegerQuantizer().set_global("a8w8"), example)).rows
    assert row.weight is not None
    assert row.bias is not None
    ((channel, factor),) = row.weight.raised
    scale = Fraction(row.weight.scales[2])
    assert channel == 2
    assert Fraction(factor) == float32(scale / plain)
    # The smallest float32 with which the integer stays within 2**21, and no smaller one.
    least = Fraction(3e5) / (Fraction(row.inputs[0].scales[0]) * (Fraction(2**21) - Fraction(1, 2)))
    assert float(least) <= scale < float(least) * (1 + 2**-22)
    assert row.bias.integers[2] in (2**21, 2**21 - 1)
    assert row.bias.derived is True
    text = str(inspect(convert(model, IntegerQuantizer().set_global("a8w8"), example)))
    assert "Weight scales raised so that the bias fits:\n  linear: 1 of 4 weight scales" in text


def test_a_narrow_bias_shows_its_shift() -> None:
    graph = convert(conv_pair(), IntegerQuantizer().set_global("a8w8-bias8"))
    bias = inspect(graph).rows[0].bias
    assert bias is not None
    assert bias.bits == 8
    assert bias.limit == 127
    assert max(map(abs, bias.integers)) <= 127
    assert bias.derived is True
    units = [
        np.float32(inspect(graph).rows[0].inputs[0].scales[0]) * np.float32(scale)
        for scale in inspect(graph).rows[0].weight.scales  # type: ignore[union-attr]
    ]
    ratios = [scale / float(unit) for scale, unit in zip(bias.scales, units, strict=True)]
    assert max(ratios) == 2**bias.shift
    assert bias.shift > 0


def test_a_bias_left_in_float_is_told() -> None:
    graph = convert(conv_pair(), IntegerQuantizer().set_global("a8w8-biasfloat"))
    row = row_of(inspect(graph), "conv2d_1")
    assert row.compute == "float"
    assert row.reason == (
        'its bias is in float, as set_global("a8w8-biasfloat") asks for a8w8-biasfloat'
    )
    assert row.weight is not None
    assert row.weight.bits == 8
    assert row.bias is not None
    assert row.bias.bits is None
    assert row.bias.reason.startswith("a8w8-biasfloat leaves it so; XNNPACK's serializer")


def test_the_stock_flow_quantizes_the_bias_out_of_sight() -> None:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    model = conv_pair()
    graph = convert(model, quantizer)
    report = inspect(graph)
    row = row_of(report, "conv2d_1")
    assert (row.scheme, row.compute, row.reason) == (None, "float", "its bias is in float")
    assert row.bias is not None
    assert row.bias.dtype == "float32"
    assert row.bias.reason.startswith("the quantizer left it so; XNNPACK's serializer")
    assert row.weight is not None
    assert row.weight.shape == (4, 4, 1, 1)
    stored = [r.bias for r in inspect_program(lower(graph, EXAMPLE).buffer).rows if r.bias]
    assert [(bias.dtype, bias.derived) for bias in stored] == [("int32", True)] * 2


def test_weights_in_groups_and_scales_of_run_time() -> None:
    torch.manual_seed(4)
    example = (torch.randn(3, 64),)
    graph = convert(nn.Linear(64, 5), IntegerQuantizer().set_global("dyn8w4g32"), example)
    (row,) = inspect(graph).rows
    assert (row.compute, row.scheme, row.integer) == ("dynamic", "dyn8w4g32", False)
    (data,) = row.inputs
    assert (data.dynamic, data.bits, data.scales, data.zero_point) == (True, 8, (), None)
    weight = row.weight
    assert weight is not None
    assert (weight.granularity, weight.group_size, weight.channels) == ("per_group", 32, 5)
    assert (weight.dtype, weight.bits, weight.quant_min) == ("int8", 4, -7)
    scales = graph.weight_scale
    assert scales.shape == (5, 2)
    assert (weight.scale_min, weight.scale_max) == (float(scales.min()), float(scales.max()))
    assert row.bias is not None
    assert row.bias.reason.startswith("the input scale is only known at run time")


def test_requantizing_has_a_row_of_its_own() -> None:
    quantizer = IntegerQuantizer().set_global("a8w8").set_module_name("2", "a16w8")
    graph = convert(conv_pair(), quantizer)
    report = inspect(graph)
    assert [row.family for row in report.rows] == ["conv", "requantize", "conv"]
    first, between, second = report.rows
    assert between.inputs == (first.output,)
    assert between.output.bits == 16
    assert (between.output.scales, between.output.zero_point) == (
        second.inputs[0].scales,
        second.inputs[0].zero_point,
    )
    assert second.bias is not None
    assert second.bias.limit == 2**30
    # Its row is no op of the lowering report, which must not be taken for another graph's.
    assert inspect(graph, lower(graph, EXAMPLE)).rows[1].backend is None


def test_grouped_transposed_convolutions_repeat_no_channel() -> None:
    torch.manual_seed(5)
    model = nn.ConvTranspose2d(4, 6, 2, groups=2)
    example = (torch.randn(1, 4, 5, 5),)
    graph = convert(model, IntegerQuantizer().set_global("a8w8"), example)
    (row,) = inspect(graph).rows
    assert row.bias is not None
    assert len(row.bias.integers) == 6
    (data,) = row.inputs
    weight = graph.weight_integers.tolist()  # (in, out / groups, height, width)
    tops, bottoms = [], []
    for out in range(6):
        group, column = divmod(out, 3)
        taps = [
            tap
            for channel in range(2 * group, 2 * group + 2)
            for line in weight[channel][column]
            for tap in line
        ]
        ends = [[tap * (q - data.zero_point) for q in (-128, 127)] for tap in taps]
        tops.append(sum(map(max, ends)) + row.bias.integers[out])
        bottoms.append(sum(map(min, ends)) + row.bias.integers[out])
    assert row.accumulator_bits == width(min(bottoms), max(tops))


def test_one_accumulator_width_of_a_strided_transposed_convolution() -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(8, 12, 3, stride=2)
    example = (torch.randn(1, 8, 5, 5),)
    graph = convert(model, IntegerQuantizer().set_global("a8w8"), example)
    (told,) = accumulators(graph)
    (row,) = inspect(graph).rows
    diagnosed = diagnose(model, graph, [example])[row.node]
    (stored,) = (r for r in inspect_program(lower(graph, example).buffer).rows if r.weight)
    widths = (told.bits, row.accumulator_bits, diagnosed.accumulator_bits, stored.accumulator_bits)
    assert widths == (told.bits,) * 4
    # Wide enough for the largest of all sums, and by no bit too wide: of the taps of one phase.
    (data,) = row.inputs
    assert row.bias is not None
    assert data.zero_point is not None
    sums = []
    for out, bias in enumerate(row.bias.integers):
        for y, x in itertools.product(range(2), range(2)):
            taps = graph.weight_integers[:, out, y::2, x::2].flatten().tolist()
            ends = [[tap * (q - data.zero_point) for q in (-128, 127)] for tap in taps]
            sums += [sum(map(max, ends)) + bias, sum(map(min, ends)) + bias]
    assert told.bits == width(min(sums), max(sums))


# ---------------------------------------------------------------------------------------------
# The .pte alone
# ---------------------------------------------------------------------------------------------


def test_every_node_of_the_delegate_has_a_row(
    program: ProgramReport, lowered: LoweredProgram
) -> None:
    (delegate,) = read_program(lowered.buffer).delegates
    assert [row.kind for row in program.rows] == [op.kind for op in delegate.ops]
    assert len({row.name for row in program.rows}) == len(program.rows)
    assert program.size_bytes == len(lowered.buffer)
    assert 0 < program.constant_bytes < program.size_bytes
    assert program.kernels == ()
    assert program.backends == ("XnnpackBackend",)
    computes = [row.compute for row in program.rows]
    # The image is put channels last, quantized, and the output dequantized.
    assert [*computes[:2], computes[-1]] == ["convert"] * 3
    assert set(computes[2:-1]) == {"integer"}


@pytest.mark.parametrize(
    ("node", "kind"),
    [("conv2d", "conv2d"), ("conv2d_1", "depthwise_conv2d"), ("linear", "fully_connected")],
)
def test_file_and_graph_agree(report: Report, program: ProgramReport, node: str, kind: str) -> None:
    graph, file = row_of(report, node), kind_of(program, kind)
    for mine, stored in ((graph.inputs[0], file.inputs[0]), (graph.output, file.outputs[0])):
        assert (mine.scales, mine.zero_point, mine.bits) == (
            stored.scales,
            stored.zero_point,
            stored.bits,
        )
    assert graph.weight is not None
    assert graph.bias is not None
    assert file.weight is not None
    assert file.bias is not None
    assert graph.weight.scales == file.weight.scales
    assert graph.weight.bits == file.weight.bits
    assert graph.bias.integers == file.bias.integers
    assert graph.bias.scales == file.bias.scales
    assert (file.bias.dtype, file.bias.derived, file.bias.limit) == ("int32", True, None)
    assert re.fullmatch(r"tensor \d+, constant [0-9a-f]{12}", file.bias.source)
    assert graph.accumulator_bits == file.accumulator_bits


def test_a_bias_of_another_scale_is_seen(lowered: LoweredProgram) -> None:
    (delegate,) = read_program(lowered.buffer).delegates
    op = next(op for op in delegate.ops if op.kind == "fully_connected")
    assert op.bias is not None
    tensor = delegate.tensors[op.bias]
    scale = np.array(tensor.scale)
    scale[3] = np.nextafter(scale[3], np.float32(1))
    tensors = list(delegate.tensors)
    tensors[op.bias] = dataclasses.replace(tensor, scale=scale)
    changed = dataclasses.replace(delegate, tensors=tuple(tensors))
    for contents, derived in ((delegate, True), (changed, False)):
        row = program_record._delegate_row("forward", 0, contents, op)
        assert row.bias is not None
        assert row.bias.derived is derived


def test_float_parts_of_a_program_are_told(mixed: tuple[Report, ProgramReport]) -> None:
    report, program = mixed
    assert row_of(report, "linear").backend == "xnnpack float"
    floats = {row.kind: row for row in program.rows if row.compute == "float"}
    assert "fully_connected" in floats
    assert floats["fully_connected"].reason == "its tensors are float in the file"
    bias = floats["fully_connected"].bias
    assert bias is not None
    assert (bias.dtype, bias.channels, bias.derived) == ("float32", 3, None)
    assert [row.bias.derived for row in program.rows if row.kind == "conv2d" and row.bias] == [
        True,
        True,
    ]


def test_kernels_outside_are_rows_in_execution_order() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return outside(self.linear(x))

    torch.manual_seed(6)
    example = (torch.randn(2, 4),)
    program = lower(convert(Sums(), IntegerQuantizer().set_global("a8w8"), example), example)
    report = inspect_program(program.buffer)
    row = kind_of(report, OUTSIDE)
    assert report.kernels == (OUTSIDE,)
    assert (row.delegate, row.compute) == (None, "float")
    assert row.inputs == (TensorRecord("", (2, 3), "float32"),) * 2  # bases and exponents
    assert row.outputs == (TensorRecord("", (2, 3), "float32"),)
    kinds = [each.kind for each in report.rows]
    assert kinds.index("fully_connected") < kinds.index(OUTSIDE)
    assert "1 kernel call outside" in str(report)
    assert (row.name, row.op) == ("pow_1", "pow_1")


def test_kernels_outside_have_the_names_of_their_ops() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = outside(self.linear(outside(x)))
            return tuple(y.topk(2, 1))

    torch.manual_seed(6)
    example = (torch.randn(2, 4),)
    graph = convert(Sums(), IntegerQuantizer().set_global("a8w8"), example)
    report = inspect_program(lower(graph, example).buffer)
    rows = {row.name: row for row in report.rows if row.delegate is None}
    assert {name: (row.op, row.inputs[0].shape[1]) for name, row in rows.items()} == {
        "pow_1": ("pow_1", 4),
        "pow_2": ("pow_2", 3),
        "topk": ("topk", 3),
    }
    assert str(report.tally) == "6 ops: 1 integer kernel, 3 outside, 2 folded away"
    assert "getitem: folded away: " in str(report)
    lines = report.detail("getitem").splitlines()
    assert lines[0] == "getitem"
    assert lines[-1] == "  nodes    none: nothing in the program stands for it alone"


def test_path_and_bytes_give_the_same_report(
    program: ProgramReport, lowered: LoweredProgram, tmp_path: Path
) -> None:
    path = lowered.save(tmp_path / "model.pte")
    assert inspect_program(path) == program
    assert inspect_program(str(path)) == program


# ---------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def unsorted_objects(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        if list(value) != sorted(value):
            yield list(value)
        for item in value.values():
            yield from unsorted_objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from unsorted_objects(item)


@pytest.fixture(params=["graph", "program", "mixed graph", "mixed program"])
def either(
    request: pytest.FixtureRequest,
    report: Report,
    program: ProgramReport,
    mixed: tuple[Report, ProgramReport],
) -> Report | ProgramReport:
    return dict(
        zip(
            ("graph", "program", "mixed graph", "mixed program"),
            (report, program, *mixed),
            strict=True,
        )
    )[request.param]


def test_json_round_trip(either: Report | ProgramReport, tmp_path: Path) -> None:
    text = either.to_json()
    document = json.loads(text, parse_constant=refuse)
    assert document["schema_version"] == 2
    assert document["kind"] == either.kind
    assert list(unsorted_objects(document)) == []
    again = type(either).from_json(text)
    assert again == either
    assert again.to_json() == text
    # The views of what was read are those of what was written.
    assert str(again) == str(either)
    assert again.to_html() == either.to_html()
    path = either.save_json(tmp_path / "report.json")
    assert path.read_text() == text + "\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-5], "is not JSON"),
        (lambda text: "[]", "is not a 'graph' report"),
        (damaged(lambda d: d.update(kind="program")), "is not a 'graph' report"),
        (
            damaged(lambda d: d.update(schema_version=3)),
            "schema version 3, this package reads 1 to 2",
        ),
        (damaged(lambda d: d.pop("schema_version")), "schema version None"),
        (damaged(lambda d: d["rows"][0].pop("node")), "damaged at rows.0.node"),
        (damaged(lambda d: d["rows"][1].update(compute="magic")), "damaged at rows.1.compute"),
        (
            damaged(lambda d: d["rows"][0]["inputs"][0].update(zero_point="0")),
            "damaged at rows.0.inputs.0.zero_point",
        ),
    ],
)
def test_damaged_json_is_refused(
    report: Report, damage: Callable[[str], str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Report.from_json(damage(report.to_json()))


def test_equal_models_give_equal_reports(report: Report) -> None:
    graph = convert(residual(), residual_quantizer())
    again = inspect(graph, lower(graph, EXAMPLE))
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)
    assert again.to_html() == report.to_html()


def test_a_broken_path_is_an_input_error(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        report.save_json(tmp_path / "nowhere" / "report.json")


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


def columns_of(text: str) -> list[str]:
    """What stands in each column of a table, line by line."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line and set(line) == {"-", " "})
    start, columns = 0, []
    for part in lines[rule].split("  "):
        columns.append((start, start + len(part)))
        start += len(part) + 2
    body = lines[rule + 1 : lines.index("", rule)]
    return ["".join(line[a:b] for line in body) for a, b in columns]


def test_text_names_every_op_and_fits_the_terminal(either: Report | ProgramReport) -> None:
    text = str(either)
    assert max(map(len, text.splitlines())) <= 120
    flat = re.sub(r"\n *", " ", text)
    names, *_ = columns_of(text)
    for row in either.rows:
        name = row.node if isinstance(row, OpRow) else row.name
        assert name in re.sub(r"\s", "", names)
        if row.compute == "float" and isinstance(row, OpRow):
            assert f"{name}: {row.reason}" in flat
    if isinstance(either, ProgramReport):
        assert either.ops is not None
        for op in either.ops:
            where = f"{op.name} ({op.path})" if op.path else op.name
            why = f" {where}: {op.placement}: {op.reason}"
            assert (why in flat) == (op.placement != "integer kernel")


def test_text_of_a_row(report: Report) -> None:
    row = row_of(report, "linear")
    assert row.bias is not None
    (line,) = (line for line in str(report).splitlines() if line.startswith("linear "))
    data, output = row.inputs[0], row.output
    assert line.split() == [
        *("linear", "head", "int8", f"{data.scale_max:.4g}", f"z{data.zero_point}", "int4", "5ch"),
        *("int32", f"{row.bias.bits_used}b", "int8", f"{output.scale_max:.4g}"),
        *(f"z{output.zero_point}", f"{row.accumulator_bits}", "integer", "packed", "int4"),
    ]


NAMES = st.text(st.sampled_from("abc019_.:[]<>&é "), min_size=1, max_size=90)


@settings(max_examples=40, deadline=None)
@given(node=NAMES, path=NAMES, backend=NAMES, inputs=st.integers(1, 9))
def test_any_text_fits_and_loses_nothing(node: str, path: str, backend: str, inputs: int) -> None:
    record = TensorRecord("x", (), "int8", bits=8, granularity="per_tensor")
    record = dataclasses.replace(record, scale_min=1e-30, scale_max=1e-30, zero_point=-128)
    record = dataclasses.replace(record, real_min=0.0, real_max=2.55e-28)
    row = OpRow(
        node=node,
        path=path,
        family="f",
        target="t",
        fused=None,
        fused_family=None,
        low=None,
        high=None,
        scheme=None,
        compute="float",
        reason="r" * 300,
        inputs=(record,) * inputs,
        weight=None,
        bias=None,
        output=record,
        accumulator_bits=None,
        backend=backend,
        backend_reason="",
    )
    lowering = LoweringRecord(1, (), 1)
    report = Report((row,), (), (), lowering)
    text = str(report)
    assert all(len(line) <= 120 for line in text.splitlines())
    cells = columns_of(text)
    for value, cell in ((node, cells[0]), (path, cells[1])):
        if value.strip():
            assert re.sub(r"\s", "", cell) == re.sub(r"\s", "", value)
    assert Report.from_json(report.to_json()) == report


def test_detail_shows_the_integers(report: Report) -> None:
    row = row_of(report, "linear")
    assert row.bias is not None
    assert row.weight is not None
    lines = report.detail("linear").splitlines()
    assert lines[0] == "linear (head)"
    assert max(map(len, lines)) <= 120
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["channel"])
    for channel, line in enumerate(lines[header + 1 :]):
        shown = line.split()
        assert int(shown[0]) == channel
        assert float(np.float32(shown[1])) == row.weight.scales[channel]
        assert float(np.float32(shown[2])) == row.bias.scales[channel]
        assert int(shown[3]) == row.bias.integers[channel]
        real = float(residual().head.bias.detach()[channel])
        # Half a unit of the integer, and the six digits that are printed.
        assert abs(float(shown[4]) - real) <= 0.5001 * row.bias.scales[channel] + 1e-5 * abs(real)
    assert len(lines) - header - 1 == 5
    assert "scale = input scale x weight scale, bit for bit" in " ".join(
        report.detail("linear").split()
    )


def test_detail_knows_the_fused_activation_and_the_nodes_of_a_program(
    report: Report, program: ProgramReport
) -> None:
    assert report.detail("relu") == report.detail("conv2d")
    assert "fused        relu, real values in [0, inf)" in report.detail("relu")
    assert "tensor" in program.detail("depthwise_conv2d")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("liner", "the report has no op 'liner'; did you mean linear?"),
        ("conv2d_9", "the report has no op 'conv2d_9'; did you mean conv2d_1 or conv2d?"),
        (
            "zzz",
            "the report has no op 'zzz'; it has conv2d, relu, conv2d_1, add, adaptive_avg_pool2d, "
            "flatten and 1 more",
        ),
    ],
)
def test_unknown_names_get_the_nearest(report: Report, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        report.detail(name)
    assert str(caught.value) == message


class Page(HTMLParser):
    """Texts, attributes and balance of a page."""

    void = frozenset({"meta", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_one_page_without_resources(either: Report | ProgramReport) -> None:
    text = either.to_html()
    page = Page(text)
    assert page.open == []
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert page.tags.count("details") == len(either.rows)
    joined = "\n".join(page.texts)
    for row in either.rows:
        assert (row.node if isinstance(row, OpRow) else row.name) in joined
        if row.bias is not None:
            assert all(str(integer) in page.texts for integer in row.bias.integers)


def test_html_escapes_what_it_is_given(report: Report, program: ProgramReport) -> None:
    evil = "</script><script>alert('x')</script><b title=\"&amp;\">"
    first = report.rows[0]
    bias = dataclasses.replace(first.bias, source=evil, reason=evil)  # type: ignore[type-var]
    row = dataclasses.replace(
        first, node=evil, path=evil, reason=evil, scheme=evil, backend=evil, bias=bias
    )
    changed = dataclasses.replace(report, rows=(row,))
    kernel = dataclasses.replace(program.rows[0], name=evil, kind=evil, method=evil)
    for document in (changed, dataclasses.replace(program, rows=(kernel,))):
        text = document.to_html()
        assert evil not in text
        assert str(markupsafe.escape(evil)) in text
        page = Page(text)
        assert page.open == []
        assert page.tags.count("script") == 1
        assert "b" not in page.tags
        assert any(evil in each for each in page.texts)
    assert Report.from_json(changed.to_json()) == changed


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def test_a_graph_with_observers_is_refused() -> None:
    exported = torch.export.export(conv_pair().eval(), EXAMPLE).module()
    prepared = prepare_pt2e(exported, IntegerQuantizer().set_global("a8w8"))
    with pytest.raises(ConversionError, match="call convert_pt2e"):
        inspect(prepared)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), None, "model.pte"])
def test_anything_but_a_graph_is_refused(wrong: Any) -> None:
    with pytest.raises(ConversionError, match="expected what convert_pt2e returns"):
        inspect(wrong)


def test_a_float_graph_is_refused() -> None:
    exported = torch.export.export(conv_pair().eval(), EXAMPLE).module()
    with pytest.raises(ConversionError, match="no quantized tensor"):
        inspect(exported)


def test_a_bias_scale_that_is_no_product_is_refused() -> None:
    graph = convert(conv_pair(), IntegerQuantizer().set_global("a8w8"))
    (scale,) = (b for name, b in graph.named_buffers() if name.endswith("0_bias_scale"))
    scale.copy_(torch.nextafter(scale, torch.tensor(1.0)))
    with pytest.raises(ConversionError, match="is not input scale x weight scale"):
        inspect(graph)


def test_a_program_of_another_graph_is_refused(lowered: LoweredProgram) -> None:
    graph = convert(conv_pair(), IntegerQuantizer().set_global("a8w8"))
    with pytest.raises(
        InputError, match="lowered from another graph: only one of them has 'adaptive"
    ):
        inspect(graph, lowered)


@pytest.mark.parametrize("data", [b"", b"not a program", b"\0" * 64])
def test_broken_programs_are_refused(data: bytes) -> None:
    with pytest.raises(ProgramError):
        inspect_program(data)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"give the path of a \.pte"):
        inspect_program(tmp_path / "none.pte")
