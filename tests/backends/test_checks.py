"""What ``lower()`` and ``verify()`` compare: a program that is wrong by one unit is noticed."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, lower_sabotaged, quantized
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import checks
from custom_quantizer.backends.xnnpack.checksum import seal, split_checksum
from custom_quantizer.backends.xnnpack.contents import DelegateContents, DelegateOp
from custom_quantizer.core.graph import add_constant, is_quantize
from custom_quantizer.errors import VerificationError
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.verifying import Difference, apart, beyond

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
        z = F.hardtanh(F.max_pool2d(z, 2), -0.1875, 0.375)
        return cast(Tensor, self.head(self.narrow(z).flatten(1)))


@cache
def net() -> tuple[GraphModule, cq.LoweredProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("narrow", "a4w4")
    quantizer.set_node_name("hardtanh_1", "a8w8-histogram")  # an op of its own
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


def _params(name: str, **units: int) -> Callable[[DelegateContents], DelegateContents]:
    """Move ends of a clamp by units of the output's scale."""

    def change(delegate: DelegateContents) -> DelegateContents:
        op = op_of(name)
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


def _operand_lost(delegate: DelegateContents) -> DelegateContents:
    op = op_of("sub")
    return with_op(delegate, op, inputs=op.inputs[:1])


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
        "14.*15",
    ),
    "an operand's zero point": (
        _zero_point(lambda: op_of("sub").inputs[1]),
        "sub",
        "input scale",
        "input 1: ",
    ),
    "operands swapped": (_swapped_operands, "sub", "input scale", "input 0: "),
    "one operand twice": (_one_operand_twice, "sub", "input scale", "input 0: "),
    "an operand lost": (_operand_lost, "sub", "input scale", "the graph has .*, the program "),
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
    "a clamp more": (_clamped, "linear", "clamp", r"127\), the program to \(-128, 126\)"),
    "a clamp to nothing": (_nan_clamp, "conv2d", "clamp", "no node"),
    "a convolution lost": (_missing("conv2d_1"), "conv2d_1", "missing", "no node"),
    "a difference lost": (_missing("sub"), "sub", "missing", "no node"),
}


def test_an_honest_program_has_no_differences() -> None:
    assert differences(lambda delegate: delegate) == []


def test_one_scale_of_a_layer_may_be_stored_once_a_channel() -> None:
    """XNNPACK's packed kernels take one a channel."""
    x = torch.randn(2, 6)
    graph = quantized(nn.Linear(6, 3), (x,), "a8w4-per_tensor")
    lowered = cq.lower(graph, (x,))
    (delegate,) = lowered.contents.delegates
    (scale,) = (
        delegate.tensors[cast(int, op.weight)].scale for op in delegate.ops if op.weight is not None
    )
    assert np.asarray(scale).shape == (3,)
    assert list(checks.differences(lowered, read_converted(graph))) == []


@pytest.mark.parametrize("name", ONE_UNIT)
def test_a_program_that_is_wrong_by_one_unit(name: str) -> None:
    change, node, what, detail = ONE_UNIT[name]
    found = differences(change)
    matching = [d for d in found if (d.node, d.what) == (node, what)]
    assert matching, found
    assert re.search(detail, matching[0].detail), matching[0]


# ---------------------------------------------------------------------------------------------
# The bytes of a file
# ---------------------------------------------------------------------------------------------


def _float_bytes(value: float) -> bytes:
    return struct.pack("<f", value)


def _next_float(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(1)))


def _exchanged(data: bytes, old: bytes, new: bytes) -> bytes:
    """Exchange a constant that the file holds once."""
    assert data.count(old) == 1
    return data.replace(old, new)


def _byte_edits() -> dict[str, tuple[bytes, str, str]]:
    _, lowered, _ = net()
    data = bytes(split_checksum(memoryview(lowered.buffer), "net")[0])
    (delegate,) = lowered.contents.delegates
    edits: dict[str, tuple[bytes, str, str]] = {}
    scale = cast(float, delegate.tensors[op_of("linear").outputs[0]].scale)
    assert data.count(_float_bytes(scale)) == 1
    changed = data.replace(_float_bytes(scale), _float_bytes(_next_float(scale)))
    edits["scale"] = changed, "linear", "output scale"
    for node, ends in (("conv2d", (-0.25, 0.5)), ("hardtanh_1", (-0.1875, 0.375))):
        for end, value in zip(("lower", "upper"), ends, strict=True):
            changed = _exchanged(data, _float_bytes(value), _float_bytes(value / 2))
            edits[f"{end} end of {node}"] = changed, node, "clamp"
    for what in ("weight", "bias"):
        index = cast(int, getattr(op_of("linear"), what))
        values = delegate.tensors[index].array().copy()
        old = values.tobytes()
        values.flat[-1] += 1 if values.flat[-1] < 127 else -1
        edits[what] = _exchanged(data, old, values.tobytes()), "linear", what
    return edits


def _differences_of(data: bytes) -> list[Difference]:
    graph, lowered, _ = net()
    return list(checks.differences(lowered.with_bytes(seal(data)), read_converted(graph)))


def test_files_that_are_wrong_by_one_number() -> None:
    graph, lowered, x = net()
    edits = _byte_edits()
    ends = {
        f"{end} end of {node}" for end in ("lower", "upper") for node in ("conv2d", "hardtanh_1")
    }
    assert edits.keys() == ends | {"scale", "weight", "bias"}
    for name, (data, node, what) in edits.items():
        assert [(d.node, d.what) for d in _differences_of(data)] == [(node, what)], name
        checked = cq.verify(graph, lowered.with_bytes(seal(data)), (x,))
        assert checked.first is not None
        assert (checked.first.node, checked.first.what) == (node, what), name
        assert not checked.bit_exact


# ---------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------


def test_one_unit_of_some_outputs_is_noticed_where_all_ops_are_integer() -> None:
    """No constant that is compared is wrong, and the error is small beside the output."""
    x = torch.randn(IMAGE)
    graph = quantized(Function(lambda s, x: F.pad(x + x, (0, 1))), (x,))
    reference = cq.integer_reference(graph)(x)

    def change(pad: Node) -> None:
        (quantize,) = (user for user in pad.users if is_quantize(user))
        scale = cast(float, quantize.args[1])
        assert pad.target is aten.pad.default
        pad.args = (*pad.args[:2], "constant", scale)
        assert checks.relative_error(reference, reference + scale) < checks.FLOAT_TOLERANCE / 3

    with pytest.raises(
        VerificationError, match=r"output 0: 24 of 168 values differ .* by up to 0\.0"
    ):
        lower_sabotaged(graph, x, change, "pad")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_far_from_all_else(value: float) -> None:
    want = torch.tensor([1.0, -torch.inf, torch.nan, 2.0])
    assert checks.relative_error(want, want.clone()) == 0.0
    got = want.clone()
    got[0] = value
    assert checks.relative_error(want, got) == math.inf
    assert checks.relative_error(got, want) == math.inf


def test_an_output_that_is_no_number_is_noticed() -> None:
    """XNNPACK's reciprocal root of zero is no number, that of the graph is infinite."""
    x = torch.tensor([[0.0, 1.0, 4.0, 9.0]])
    graph = quantized(Function(lambda s, x: torch.rsqrt(x + x)), (x,))
    assert cq.integer_reference(graph)(x)[0, 0] == torch.inf
    with pytest.raises(VerificationError, match=r"output 0: \d of 4 values differ"):
        cq.lower(graph, (x,))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: ((y := x + x) > 0, y),
        lambda s, x: (x + x > 0) & (x - x >= 0),
        lambda s, x: ((x + x) * 10 + 100).to(torch.uint8),
        lambda s, x: (x + x).argmax(-1),
    ],
)
def test_outputs_that_are_no_floats_are_compared(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = quantized(Function(function), (x,))
    program = cq.lower(graph, (x,))
    checked = cq.verify(graph, program, [(x,)])
    assert all(output.mismatches == 0 for output in checked.outputs)
    other = (-x,)
    moved = [o.mismatches for o in cq.verify(graph, program, [other]).outputs]
    assert moved == [0] * len(moved)


@pytest.mark.parametrize(
    ("got", "want", "far"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True]), [0, 1]),
        (torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([255, 255]).byte(), [255, 0]),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, torch.inf]), [0.0, torch.inf]),
    ],
)
def test_how_far_values_are_apart(got: Tensor, want: Tensor, far: list[float]) -> None:
    assert apart(got, want).tolist() == far
    assert beyond(got, want, 0.5).tolist() == [distance > 0 for distance in far]


@pytest.mark.parametrize(("factor", "noticed"), [(1.09, False), (1.11, True)])
def test_outputs_of_float_ops_are_within_a_tenth(factor: float, noticed: bool) -> None:
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_operator_type(aten.mul.Tensor, None)
    graph = quantized(Function(lambda s, x: torch.sin(x + x) * 1.5), (x,), quantizer)

    def change(product: Node) -> None:
        name, model = str(cast(Node, product.args[1]).target), product.graph.owning_module
        setattr(model, name, cast(GraphModule, model).get_buffer(name) * factor)

    if not noticed:
        assert lower_sabotaged(graph, x, change, "mul.Tensor").report.not_integer()
        return
    with pytest.raises(VerificationError, match=r"output 0: \d+ of 144 values differ"):
        lower_sabotaged(graph, x, change, "mul.Tensor")


def test_a_bias_that_the_graph_does_not_have_is_noticed_when_lowering() -> None:
    x = torch.randn(IMAGE)
    graph = quantized(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)), (x,))

    def change(conv: Node) -> None:
        model = cast(GraphModule, conv.graph.owning_module)
        weight, data = cast(Node, conv.args[1]), cast(Node, conv.args[0])
        unit = model.get_buffer(str(cast(Node, weight.args[1]).target)) * data.args[1]
        more = unit * torch.tensor([0.0, 0.0, 1.0, 0.0])
        bias = add_constant(model, "more", more, conv)
        conv.args = (data, weight, bias, *conv.args[3:])

    with pytest.raises(VerificationError, match="bias: the program has one, the graph has none"):
        lower_sabotaged(graph, x, change, "conv2d")


class Mixed(nn.Module):
    """Integers, float ops, integers, and a float output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(F.pad(x + x, (0, 1)) * 1.5, -1)
        return torch.softmax(self.layer(x), -1)


@cache
def mixed() -> tuple[GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_operator_type(aten.mul.Tensor, None)
    return quantized(Mixed(), (x,), quantizer), x


def _pad_by_one_unit(pad: Node) -> None:
    (quantize,) = (user for user in pad.users if is_quantize(user))
    pad.args = (*pad.args[:2], "constant", quantize.args[1])


def _multiply_by_more(product: Node) -> None:
    name, model = str(cast(Node, product.args[1]).target), product.graph.owning_module
    setattr(model, name, cast(GraphModule, model).get_buffer(name) * 1.005)


def _multiply_by_more_in_one(product: Node) -> None:
    """Only in the program that does not return all of its tensors."""
    (output,) = (node for node in product.graph.nodes if node.op == "output")
    if len(cast("tuple[Node, ...]", output.args[0])) == 1:
        _multiply_by_more(product)


def test_last_bits_that_a_network_magnifies_do_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its last layers magnified them: any difference of the outputs is too large."""
    graph, x = mixed()
    asked: list[Any] = []
    follow = checks.follow_program
    monkeypatch.setattr(checks, "FLOAT_TOLERANCE", 0.0)
    monkeypatch.setattr(checks, "follow_program", lambda *args: asked.append(args) or follow(*args))
    program = cq.lower(graph, (x,))
    assert len(asked) == 1
    assert not torch.equal(program.run(x), cq.integer_reference(graph)(x))


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (_pad_by_one_unit, "pad", "24 of 168 values of pad do not follow .* by up to 1 units"),
        (_multiply_by_more, "mul.Tensor", r"\d+ of 168 values of softmax do not follow"),
        (_multiply_by_more_in_one, "mul.Tensor", "output 0 is another in the program that"),
    ],
)
def test_what_is_wrong_by_one_unit_between_float_ops_is_named(
    change: Callable[[Node], None], name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, x = mixed()
    monkeypatch.setattr(checks, "FLOAT_TOLERANCE", 0.0)
    with pytest.raises(VerificationError, match=rf"output 0: \d+ of 120 values differ.*{says}"):
        lower_sabotaged(graph, x, change, name)


class Centered(nn.Module):
    """A mean that is large next to what is left of it: last bits of float32 are fine units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return cast(Tensor, self.norm(torch.cat(pair, -1)))


@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
def test_last_bits_are_a_part_of_the_range_and_no_number_of_units(scheme: str) -> None:
    pair = tuple(torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)) + 300.0)
    model = Function(lambda s, pair: s.inner(pair) * 0.5, inner=Centered())
    graph = quantized(model, (pair,), scheme)  # type: ignore[arg-type]
    found = checks.each_tensor(read_converted(graph), (pair,))
    assert found is not None
    assert found.first is None
