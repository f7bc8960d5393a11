"""What ``lower()`` and ``verify()`` compare: a program that is wrong by one unit is noticed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graphs import quantized
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.converted import read_converted
from custom_quantizer.xnnpack import checks
from custom_quantizer.xnnpack.checks import Difference
from custom_quantizer.xnnpack.readback import DelegateContents, DelegateOp

aten = torch.ops.aten
IMAGE = (1, 4, 6, 6)


class Net(nn.Module):
    """A clamp at both ends, one at one end, one on its own; a bias, and none; 8 and 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(4, 4, 3, padding=1)
        self.plain = nn.Conv2d(4, 4, 1, bias=False)
        self.narrow = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.both(x), -0.25, 0.5)
        z = F.relu(self.plain(y)) - y
        z = F.hardtanh(F.max_pool2d(z, 2), -0.25, 0.5)
        return cast(Tensor, self.head(self.narrow(z).flatten(1)))


@cache
def net() -> tuple[GraphModule, cq.LoweredProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("narrow", "a4w4")
    graph = quantized(Net(), (x,), quantizer)
    return graph, cq.lower(graph, (x,)), x


def differences(change: Callable[[DelegateContents], DelegateContents]) -> list[Difference]:
    """What is found in a program of which the only delegate was changed."""
    graph, lowered, _ = net()
    twin = lowered.with_bytes(lowered.buffer)
    (method,) = twin.contents.methods
    (delegate,) = method.delegates
    method = replace(method, delegates=(change(delegate),))
    twin.contents = replace(twin.contents, methods=(method,))
    return list(checks.differences(twin, read_converted(graph)))


def with_op(delegate: DelegateContents, op: DelegateOp, **changes: Any) -> DelegateContents:
    ops = tuple(replace(o, **changes) if o.outputs == op.outputs else o for o in delegate.ops)
    return replace(delegate, ops=ops)


def with_tensor(delegate: DelegateContents, index: int, **changes: Any) -> DelegateContents:
    tensors = list(delegate.tensors)
    tensors[index] = replace(tensors[index], **changes)
    return replace(delegate, tensors=tuple(tensors))


def op_of(name: str, kind: str | None = None) -> DelegateOp:
    """The node that stands for an op of the graph."""
    _, lowered, _ = net()
    (row,) = (row for row in lowered.report.ops if row.node == name)
    (delegate,) = lowered.contents.delegates
    found = [op for op in delegate.ops if op.debug_handle in row.handles]
    (op,) = (op for op in found if op.kind != "convert" and kind in (None, op.kind))
    return op


def stored(delegate: DelegateContents, index: int, values: Any) -> DelegateContents:
    data = memoryview(np.ascontiguousarray(values).tobytes())
    return with_tensor(delegate, index, _data=data)


def _weight(delegate: DelegateContents) -> DelegateContents:
    index = cast(int, op_of("conv2d").weight)
    values = delegate.tensors[index].array().copy()
    values[3, 2, 1, 0] += 1 if values[3, 2, 1, 0] < 127 else -1
    return stored(delegate, index, values)


def _channels(delegate: DelegateContents) -> DelegateContents:
    index = cast(int, op_of("conv2d_1").weight)
    values = delegate.tensors[index].array().copy()
    values[[0, 1]] = values[[1, 0]]
    return stored(delegate, index, values)


def _weight_scale(delegate: DelegateContents) -> DelegateContents:
    index = cast(int, op_of("linear").weight)
    scale = np.array(delegate.tensors[index].scale)
    scale[2] = np.nextafter(scale[2], np.float32(1))
    return with_tensor(delegate, index, scale=scale)


def _bias(delegate: DelegateContents) -> DelegateContents:
    index = cast(int, op_of("linear").bias)
    values = delegate.tensors[index].array().copy()
    values[1] -= 1
    return stored(delegate, index, values)


def _no_bias(delegate: DelegateContents) -> DelegateContents:
    return with_op(delegate, op_of("conv2d"), bias=None)


def _added_bias(delegate: DelegateContents) -> DelegateContents:
    index = cast(int, op_of("conv2d").bias)
    one = np.array([0, 0, 0, 1], np.int32)
    delegate = replace(delegate, tensors=(*delegate.tensors, delegate.tensors[index]))
    delegate = stored(delegate, len(delegate.tensors) - 1, one)
    return with_op(delegate, op_of("conv2d_1"), bias=len(delegate.tensors) - 1)


def _scale(tensor: Callable[[], int]) -> Callable[[DelegateContents], DelegateContents]:
    def change(delegate: DelegateContents) -> DelegateContents:
        scale = np.float32(cast(float, delegate.tensors[tensor()].scale))
        return with_tensor(delegate, tensor(), scale=float(np.nextafter(scale, np.float32(1))))

    return change


def _zero_point(tensor: Callable[[], int]) -> Callable[[DelegateContents], DelegateContents]:
    def change(delegate: DelegateContents) -> DelegateContents:
        zero_point = cast(int, delegate.tensors[tensor()].zero_point)
        return with_tensor(delegate, tensor(), zero_point=zero_point + 1)

    return change


def _params(
    name: str, kind: str | None = None, **units: int
) -> Callable[[DelegateContents], DelegateContents]:
    """Move ends of a clamp by units of the output's scale."""

    def change(delegate: DelegateContents) -> DelegateContents:
        op = op_of(name, kind)
        scale = cast(float, delegate.tensors[op.outputs[0]].scale)
        moved = {end: cast(float, op.params[end]) + count * scale for end, count in units.items()}
        return with_op(delegate, op, params={**op.params, **moved})

    return change


def _unclamped(name: str, *ends: str) -> Callable[[DelegateContents], DelegateContents]:
    def change(delegate: DelegateContents) -> DelegateContents:
        op = op_of(name, None if name.startswith("conv") else "clamp")
        none = {"output_min": -math.inf, "output_max": math.inf}
        return with_op(delegate, op, params={**op.params, **{end: none[end] for end in ends}})

    return change


def _clamped(delegate: DelegateContents) -> DelegateContents:
    """A clamp that no op of the graph has, one unit from the end."""
    op = op_of("linear")
    tensor = delegate.tensors[op.outputs[0]]
    most = (126 - cast(int, tensor.zero_point)) * cast(float, tensor.scale)
    params = {**op.params, "output_min": -math.inf, "output_max": most}
    return with_op(delegate, op, params=params)


def _nan_clamp(delegate: DelegateContents) -> DelegateContents:
    op = op_of("conv2d")
    return with_op(delegate, op, params={**op.params, "output_min": math.nan})


def _swapped_operands(delegate: DelegateContents) -> DelegateContents:
    op = op_of("sub")
    return with_op(delegate, op, inputs=op.inputs[::-1])


def _one_operand_twice(delegate: DelegateContents) -> DelegateContents:
    op = op_of("sub")
    return with_op(delegate, op, inputs=(op.inputs[1], op.inputs[1]))


def _missing(name: str) -> Callable[[DelegateContents], DelegateContents]:
    def change(delegate: DelegateContents) -> DelegateContents:
        op = op_of(name)
        return replace(delegate, ops=tuple(o for o in delegate.ops if o.outputs != op.outputs))

    return change


ONE_UNIT: dict[str, tuple[Callable[[DelegateContents], DelegateContents], str, str, str]] = {
    "a weight": (_weight, "conv2d", "weight", r"1 of 144 integers differ; at \(3, 0, 2, 1\)"),
    "two channels": (_channels, "conv2d_1", "weight", r"of 16 integers differ; at \(0, "),
    "a weight's scale": (_weight_scale, "linear", "weight scale", r"1 of 3 scales .* \(2,\)"),
    "a bias": (_bias, "linear", "bias", r"1 of 3 integers differ; at \(1,\)"),
    "a bias lost": (_no_bias, "conv2d", "bias", "the program dropped it"),
    "a bias more": (_added_bias, "conv2d_1", "bias", "the program has one, the graph has none"),
    "a scale": (
        _scale(lambda: op_of("sub").outputs[0]),
        "sub",
        "output scale",
        "the graph has",
    ),
    "an operand's scale": (
        _scale(lambda: op_of("sub").inputs[0]),
        "sub",
        "input scale",
        "input 0: ",
    ),
    "a zero point": (
        _zero_point(lambda: op_of("linear").outputs[0]),
        "linear",
        "output scale",
        "13.*14",
    ),
    "an operand's zero point": (
        _zero_point(lambda: op_of("sub").inputs[1]),
        "sub",
        "input scale",
        "input 1: ",
    ),
    "operands swapped": (_swapped_operands, "sub", "input scale", "input 0: "),
    "one operand twice": (_one_operand_twice, "sub", "input scale", "input 0: "),
    "lower end, wider": (_params("conv2d", output_min=-1), "conv2d", "clamp", r"to \(-0.25, 0.5\)"),
    "lower end, tighter": (_params("conv2d", output_min=1), "conv2d", "clamp", r"\(-127, "),
    "upper end, wider": (_params("conv2d", output_max=1), "conv2d", "clamp", "no node"),
    "upper end, tighter": (_params("conv2d", output_max=-1), "conv2d", "clamp", r", 126\)"),
    "no lower end": (_unclamped("hardtanh_1", "output_min"), "hardtanh_1", "clamp", "no node"),
    "no upper end": (_unclamped("hardtanh_1", "output_max"), "hardtanh_1", "clamp", "no node"),
    "a relu higher": (_params("conv2d_1", output_min=1), "conv2d_1", "clamp", "-127, 127"),
    "no clamp to 4 bits": (
        _unclamped("conv2d_2", "output_min", "output_max"),
        "conv2d_2",
        "clamp",
        r"\(-8, 7\), the program to \(-128, 127\)",
    ),
    "4 bits and a level": (
        _params("conv2d_2", output_max=1),
        "conv2d_2",
        "clamp",
        r"the program to \(-8, 8\)",
    ),
    "moved and clamped": (_params("flatten", "clamp", output_min=1), "flatten", "clamp", "-7, 7"),
    "a clamp more": (_clamped, "linear", "clamp", r"127\), the program to \(-128, 126\)"),
    "a clamp to nothing": (_nan_clamp, "conv2d", "clamp", "no node"),
    "a convolution lost": (_missing("conv2d_1"), "conv2d_1", "missing", "no node"),
    "a difference lost": (_missing("sub"), "sub", "missing", "no node"),
}


def test_an_honest_program_has_no_differences() -> None:
    assert differences(lambda delegate: delegate) == []


@pytest.mark.parametrize("name", ONE_UNIT)
def test_a_program_that_is_wrong_by_one_unit(name: str) -> None:
    change, node, what, detail = ONE_UNIT[name]
    found = differences(change)
    matching = [d for d in found if (d.node, d.what) == (node, what)]
    assert matching, found
    assert re.search(detail, matching[0].detail), matching[0]
