"""What is read back from a .pte equals, integer by integer, what the graph said."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    XNNHeader,
    serialize_xnnpack_binary,
)
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir._serialize._flatbuffer import _get_flatc_path
from executorch.exir._serialize._program import (
    deserialize_pte_binary,
    serialize_pte_binary,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.graphs import Function
from support.program_text import describe
from support.selection import slow_but
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.backends.xnnpack import flatbuffer, readback
from custom_quantizer.backends.xnnpack.contents import (
    DelegateCall,
    DelegateContents,
    DelegateOp,
    DelegateTensor,
    KernelCall,
    ProgramContents,
    ValueInfo,
)
from custom_quantizer.backends.xnnpack.readback import read_program
from custom_quantizer.errors import ProgramError

INVALID = 2**32 - 1


class Net(nn.Module):
    """Every kind of weight layout, an add, and two ops that the delegate does not take.

    The transposed convolution is quantized with groups=1 and left in float with groups=2.
    """

    def __init__(self, transposed_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 2), groups=2)
        self.depthwise = nn.Conv2d(8, 16, (3, 2), groups=8)
        self.transposed = nn.ConvTranspose2d(
            16, 6, (2, 3), stride=2, output_padding=1, groups=transposed_groups
        )
        self.pointwise = nn.Conv2d(6, 6, 1, bias=False)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.conv(x)))
        x = self.transposed(x)
        x = x + self.pointwise(x)
        pooled: torch.Tensor = self.linear(x.mean((2, 3)))
        return pooled.cumsum(1)


def lower(model: torch.nn.Module, example: tuple[Any, ...]) -> bytes:
    exported = torch.export.export(model, example)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(edge.to_executorch().buffer)


def quantize(model: nn.Module, example: tuple[Any, ...], **config: Any) -> torch.fx.GraphModule:
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**config))
    prepared = prepare_pt2e(torch.export.export(model.eval(), example).module(), quantizer)
    prepared(*example)
    return cast(torch.fx.GraphModule, convert_pt2e(prepared))


@dataclass(frozen=True)
class Gemm:
    """A convolution or linear of the converted graph."""

    weight: np.ndarray
    weight_scale: np.ndarray | float | None
    input_scale: float | None
    bias: np.ndarray | None


def gemms_of(graph_module: torch.fx.GraphModule) -> list[Gemm]:
    """Read the graph's side of the comparison, from the nodes alone."""

    def tensor(node: Any) -> np.ndarray:
        value: Any = graph_module
        for part in node.target.split("."):
            value = getattr(value, part)
        return cast(np.ndarray, value.detach().numpy())

    found = []
    for node in graph_module.graph.nodes:
        if not re.match(r"aten\.(conv|linear)", str(node.target)):
            continue
        source, weight, *rest = node.args
        bias = tensor(rest[0]) if rest and rest[0] is not None else None
        if "dequantize" not in str(weight.target):
            found.append(Gemm(tensor(weight), None, None, bias))
            continue
        scale = weight.args[1]
        found.append(
            Gemm(
                tensor(weight.args[0]),
                scale if isinstance(scale, float) else tensor(scale),
                source.args[1],
                bias,
            )
        )
    return found


@dataclass(frozen=True)
class Lowered:
    graph: torch.fx.GraphModule
    pte: bytes
    contents: ProgramContents

    def pairs(self) -> list[tuple[Gemm, DelegateContents, DelegateOp]]:
        ops = [(d, op) for d in self.contents.delegates for op in d.ops if op.weight is not None]
        return [
            (gemm, delegate, op)
            for gemm, (delegate, op) in zip(gemms_of(self.graph), ops, strict=True)
        ]


def weight_of(delegate: DelegateContents, op: DelegateOp) -> DelegateTensor:
    assert op.weight is not None
    return delegate.tensors[op.weight]


@pytest.fixture(scope="session", params=slow_but(["per_channel"], ["per_channel", "per_tensor"]))
def lowered(request: pytest.FixtureRequest) -> Lowered:
    per_channel = request.param == "per_channel"
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 12, 12),)
    graph = quantize(Net(1 if per_channel else 2), example, is_per_channel=per_channel)
    pte = lower(graph, example)
    return Lowered(graph, pte, read_program(pte))


@pytest.fixture(scope="session")
def small_pte() -> bytes:
    """Return a program with one delegate and one int8 linear, a few kB long."""
    torch.manual_seed(1)
    example = (torch.randn(2, 7),)
    return lower(quantize(nn.Linear(7, 5), example, is_per_channel=True), example)


def around(pte: bytes, graph: xnn.XNNGraph, inline: bytes = b"") -> bytes:
    """Replace the delegate of ``pte`` by ``graph``, through ExecuTorch's own serializers."""
    file = deserialize_pte_binary(pte)
    (delegate,) = file.program.execution_plan[0].delegates
    blob = serialize_xnnpack_binary(graph, bytearray(inline))
    file.program.backend_delegate_data[delegate.processed.index].data = blob
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True))


def tensor_value(position: int, **changes: Any) -> xnn.XNNTensorValue:
    fields: dict[str, Any] = {
        "datatype": xnn.XNNDatatype.xnn_datatype_fp32,
        "num_dims": 1,
        "dims": [4],
        "constant_buffer_idx": 0,
        "external_id": INVALID,
        "flags": 0,
        "id_out": position,
    }
    return xnn.XNNTensorValue(**{**fields, **changes})


def graph_of(
    nodes: list[xnn.XNode], values: list[Any], constants: list[xnn.ConstantDataOffset]
) -> xnn.XNNGraph:
    return xnn.XNNGraph(
        version="0",
        xnodes=nodes,
        xvalues=[xnn.XValue(xvalue_union=value) for value in values],
        num_externs=0,
        input_ids=[],
        output_ids=[],
        constant_data=[xnn.ConstantDataOffset(0, 0), *constants],
    )


# --------------------------------------------------------------------------------------------
# Programs that ExecuTorch lowered
# --------------------------------------------------------------------------------------------


def test_structure(lowered: Lowered) -> None:
    contents = lowered.contents
    assert contents.inputs == (ValueInfo("float32", (2, 4, 12, 12)),)
    assert contents.outputs == (ValueInfo("float32", (2, 5)),)
    assert contents.kernels == ("aten::mean.out", "aten::cumsum.out")
    assert contents.size_bytes == len(lowered.pte)

    (method,) = contents.methods
    assert method is contents.method("forward")
    order = [call if isinstance(call, DelegateCall) else call.name for call in method.calls]
    assert order == [DelegateCall(0), "aten::mean.out", DelegateCall(1), "aten::cumsum.out"]
    kernel = method.calls[1]
    assert isinstance(kernel, KernelCall)
    assert [a.dtype for a in kernel.arguments] == [
        *("float32", "int_list", "bool", "null", "float32", "float32")
    ]
    assert kernel.arguments[0].shape == (2, 6, 9, 14)

    first, second = contents.delegates
    kinds = [op.kind for op in first.ops if op.kind != "convert"]
    assert kinds == [
        *("static_transpose", "conv2d", "depthwise_conv2d", "conv_transpose2d", "conv2d"),
        *("add", "static_transpose"),
    ]
    assert [op.kind for op in second.ops] == ["convert", "fully_connected", "convert"]
    for delegate in contents.delegates:
        assert [t.id for t in delegate.tensors] == list(range(len(delegate.tensors)))
        assert delegate.inputs == (0,)
        assert [t.id for t in delegate.tensors if t.is_input] == list(delegate.inputs)
        assert [t.id for t in delegate.tensors if t.is_output] == list(delegate.outputs)
        assert len(delegate.outputs) == 1


def test_ops_chain_from_input_to_output(lowered: Lowered) -> None:
    for delegate in lowered.contents.delegates:
        ready = set(delegate.inputs)
        for op in delegate.ops:
            assert set(op.inputs) <= ready
            ready.update(op.outputs)
        assert set(delegate.outputs) <= ready


def test_nodes_are_found_without_a_search(lowered: Lowered) -> None:
    """Where every op of a graph looked at all nodes, checking 8 times the ops took 23 times."""
    looked: list[int] = []

    class Ops(tuple[DelegateOp, ...]):
        def __iter__(self) -> Iterator[DelegateOp]:
            looked.append(len(self))
            return super().__iter__()

        def __reversed__(self) -> Iterator[DelegateOp]:
            looked.append(len(self))
            return iter(self[::-1])

    (method,) = lowered.contents.methods
    delegates = [dataclasses.replace(d, ops=Ops(d.ops)) for d in method.delegates]
    watched = dataclasses.replace(method, delegates=tuple(delegates))
    contents = dataclasses.replace(lowered.contents, methods=(watched,))
    nodes = [op for plain in method.delegates for op in plain.ops]
    for delegate, plain in zip(delegates, method.delegates, strict=True):
        for op in plain.ops:
            handles = {op.debug_handle, nodes[0].debug_handle}
            wanted = [node for node in nodes if node.debug_handle in handles]
            assert [node for _, node in contents.nodes_of(handles)] == wanted
            for tensor in (*op.inputs, *op.outputs):
                made = [other for other in plain.ops if tensor in other.outputs]
                assert delegate.makers.get(tensor) == next(iter(made), None)
                read = [other for other in plain.ops for taken in other.inputs if taken == tensor]
                assert delegate.readers.get(tensor, []) == read
    assert contents.nodes_of({-7}) == []
    assert sorted(looked) == sorted(3 * [len(plain.ops) for plain in method.delegates])


def test_parameters_are_those_of_the_modules(lowered: Lowered) -> None:
    ops = {op.kind: op for op in reversed(lowered.contents.delegates[0].ops)}
    conv, depthwise, transposed = (
        ops[kind].params for kind in ("conv2d", "depthwise_conv2d", "conv_transpose2d")
    )
    assert conv["stride"] == (2, 2)
    assert conv["padding"] == (1, 2, 1, 2)
    assert conv["kernel_size"] == (3, 3)
    assert conv["groups"] == 2
    assert (conv["output_min"], conv["output_max"]) == (0.0, math.inf)  # the fused relu
    assert depthwise["kernel_size"] == (3, 2)
    assert depthwise["groups"] == 8
    assert "output_min" not in depthwise
    assert transposed["output_padding"] == (1, 1)
    assert ops["static_transpose"].params["perm"] == (0, 2, 3, 1)


def test_weights_equal_the_graph(lowered: Lowered) -> None:
    for gemm, delegate, op in lowered.pairs():
        weight = delegate.weight(op)
        assert weight.dtype == gemm.weight.dtype
        assert weight.shape == gemm.weight.shape
        np.testing.assert_array_equal(weight, gemm.weight)
    # One of each layout, or the comparison above says little.
    kinds = {op.kind for _, _, op in lowered.pairs()}
    assert kinds == {"conv2d", "depthwise_conv2d", "conv_transpose2d", "fully_connected"}


def test_biases_equal_the_rounded_quotient(lowered: Lowered) -> None:
    checked = 0
    for gemm, delegate, op in lowered.pairs():
        bias = delegate.bias(op)
        if gemm.bias is None or bias is None:
            assert gemm.bias is None
            assert bias is None
            continue
        if gemm.input_scale is None:
            np.testing.assert_array_equal(bias, gemm.bias)
            continue
        product = np.asarray(gemm.weight_scale, np.float64) * gemm.input_scale
        assert bias.dtype == np.int32
        np.testing.assert_array_equal(bias, np.rint(gemm.bias.astype(np.float64) / product))
        assert np.abs(bias).max() > 100
        checked += 1
    assert checked >= 3


def test_scales_are_bit_equal(lowered: Lowered) -> None:
    for gemm, delegate, op in lowered.pairs():
        weight = weight_of(delegate, op)
        source = delegate.tensors[op.inputs[0]]
        if gemm.input_scale is None:
            assert (weight.dtype, weight.scale, weight.zero_point) == ("float32", None, None)
            continue
        assert weight.zero_point == 0
        assert isinstance(source.scale, float)
        assert source.scale == np.float32(gemm.input_scale)
        if isinstance(gemm.weight_scale, float):
            assert weight.quantization == "per_tensor"
            assert weight.scale == np.float32(gemm.weight_scale)
            assert weight.channel_axis is None
            continue
        assert weight.quantization == "per_channel"
        assert isinstance(weight.scale, np.ndarray)
        assert weight.scale.tobytes() == np.asarray(gemm.weight_scale, np.float32).tobytes()
        assert weight.channel_axis == (3 if op.kind == "depthwise_conv2d" else 0)
        if op.bias is not None:
            bias_scale = delegate.tensors[op.bias].scale
            assert isinstance(bias_scale, np.ndarray)
            expected = weight.scale * np.float32(gemm.input_scale)
            assert bias_scale.tobytes() == expected.tobytes()


def test_activations_have_the_graphs_scales_and_zero_points(lowered: Lowered) -> None:
    in_graph = {
        (np.float32(node.args[1]).item(), node.args[2])
        for node in lowered.graph.graph.nodes
        if "quantize_per_tensor" in str(node.target) and node.args[0].op != "get_attr"
    }
    in_file = {
        (tensor.scale, tensor.zero_point)
        for delegate in lowered.contents.delegates
        for tensor in delegate.tensors
        if tensor.dtype == "int8" and not tensor.is_constant
    }
    assert in_file == in_graph


def test_same_as_executorchs_own_deserializer(lowered: Lowered) -> None:
    file = deserialize_pte_binary(lowered.pte)
    plan = file.program.execution_plan[0]
    assert [d.id for d in plan.delegates] == [d.backend_id for d in lowered.contents.delegates]
    store = file.named_data
    assert store is not None
    for delegate in lowered.contents.delegates:
        for tensor in delegate.tensors:
            if tensor.is_constant:
                assert tensor.constant_key is not None
                expected = store.buffers[store.pte_data[tensor.constant_key].buffer_index]
                assert tensor.array().tobytes() == expected
    constants = sum(map(len, store.buffers))
    assert lowered.contents.constant_bytes == constants


def test_same_as_flatc(lowered: Lowered, tmp_path: Path) -> None:
    """An independent decoder agrees on the delegates; its floats are rounded, so not on those."""
    schema = Path(xnn.__file__).with_name("schema.fbs")
    file = deserialize_pte_binary(lowered.pte)
    for number, delegate in enumerate(lowered.contents.delegates):
        reference = file.program.execution_plan[0].delegates[number].processed
        blob = bytes(file.program.backend_delegate_data[reference.index].data)
        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        source = tmp_path / f"graph{number}.bin"
        source.write_bytes(blob[start : start + header.flatbuffer_size])
        command = [_get_flatc_path(), "--json", "--strict-json", "--defaults-json"]
        subprocess.run([*command, "-o", tmp_path, schema, "--", source], check=True)
        printed = source.with_suffix(".json").read_text()
        graph = json.loads(printed.replace(": inf", ": Infinity"))

        assert [op.debug_handle for op in delegate.ops] == [
            node["debug_handle"] for node in graph["xnodes"]
        ]
        for op, node in zip(delegate.ops, graph["xnodes"], strict=True):
            assert node["xnode_union_type"].lower() == "xnn" + op.kind.replace("_", "")
            fields = node["xnode_union"]
            assert op.outputs == (fields["output_id"],)
            assert op.inputs[0] == fields.get("input_id", fields.get("input1_id"))
        for tensor, value in zip(delegate.tensors, graph["xvalues"], strict=True):
            union = value["xvalue_union"]
            plain = union.get("tensor_value", union)
            assert list(tensor.shape) == plain["dims"]
            assert tensor.is_constant == (plain["constant_buffer_idx"] != 0)
            params = union.get("quant_params", {})
            assert tensor.zero_point == params.get("zero_point", 0 if params else None)
            if "scale" in params and isinstance(tensor.scale, float):
                assert tensor.scale == pytest.approx(params["scale"], abs=1e-6)


@pytest.mark.parametrize("dynamic", slow_but([False], [False, True]))
def test_packed_int4_weights_with_an_odd_row(dynamic: bool) -> None:
    torch.manual_seed(2)
    example = (torch.randn(2, 7),)
    graph = quantize(
        nn.Linear(7, 5),
        example,
        is_per_channel=True,
        is_dynamic=dynamic,
        weight_qmin=-8,
        weight_qmax=7,
    )
    (delegate,) = read_program(lower(graph, example)).delegates
    (op,) = (op for op in delegate.ops if op.weight is not None)
    weight = weight_of(delegate, op)
    (gemm,) = gemms_of(graph)
    assert (weight.dtype, weight.shape, weight.quantization) == ("int4", (5, 7), "per_channel")
    np.testing.assert_array_equal(delegate.weight(op), gemm.weight)
    assert delegate.weight(op).dtype == np.int8
    assert {gemm.weight.min(), gemm.weight.max()} == {-8, 7}
    source = delegate.tensors[op.inputs[0]]
    assert source.dtype == "int8"
    if dynamic:
        assert (source.quantization, source.scale) == ("per_token_dynamic", None)
        assert source.zero_point is None


@pytest.mark.slow
def test_grouped_int4_weights() -> None:
    torch.manual_seed(3)
    linear, example = nn.Linear(96, 5).eval(), (torch.randn(2, 96),)
    model = nn.Sequential(linear)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=cast(Any, torch).int4, weight_granularity=PerGroup(32)
    )
    quantize_(model, config)
    quantized: Any = linear.weight
    (delegate,) = read_program(lower(model, example)).delegates
    (op,) = (op for op in delegate.ops if op.weight is not None)
    weight = weight_of(delegate, op)
    assert (weight.dtype, weight.quantization) == ("int4", "per_channel_group")
    assert weight.group_size == 32
    np.testing.assert_array_equal(delegate.weight(op), quantized.qdata.numpy())
    # The backend stores these scales as bfloat16.
    expected = quantized.scale.to(torch.bfloat16).to(torch.float32).numpy()
    assert isinstance(weight.scale, np.ndarray)
    assert weight.scale.shape == (5, 3)
    assert weight.scale.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_linear_with_transposed_weight_flag(small_pte: bytes) -> None:
    stored = np.arange(12, dtype=np.float32).reshape(3, 4)  # (I, O)
    node = xnn.XNode(
        xnode_union=xnn.XNNFullyConnected(
            input1_id=0, filter_id=1, bias_id=INVALID, output_id=2, flags=1
        ),
        debug_handle=0,
    )
    values = [
        tensor_value(0, dims=[1, 3], num_dims=2),
        tensor_value(1, dims=[3, 4], num_dims=2, constant_buffer_idx=1),
        tensor_value(2, dims=[1, 4], num_dims=2),
    ]
    constants = [xnn.ConstantDataOffset(offset=0, size=48)]
    pte = around(small_pte, graph_of([node], values, constants), stored.tobytes())
    (delegate,) = read_program(pte).delegates
    (op,) = delegate.ops
    np.testing.assert_array_equal(delegate.weight(op), stored.T)
    assert delegate.bias(op) is None
    assert (op.inputs, op.weight, op.bias, op.outputs) == ((0,), 1, None, (2,))


LAYOUTS: dict[str, Any] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv_transpose2d": nn.ConvTranspose2d,
}


@pytest.mark.slow
def test_float_weight_layouts() -> None:
    """Groups times kinds, on float weights: the layout does not depend on the dtype."""
    torch.manual_seed(4)
    layers = nn.ModuleDict(
        {
            f"{kind}_{groups}": make(6, 12, 3, groups=groups, bias=False)
            for kind, make in LAYOUTS.items()
            for groups in (1, 2, 3)
        }
    )
    model = Function(
        lambda s, x: [layer(x[:, :, 0] if "1d" in name else x) for name, layer in s.layers.items()],
        layers=layers,
    )
    (delegate,) = read_program(lower(model.eval(), (torch.randn(1, 6, 9, 8),))).delegates
    found = [delegate.weight(op) for op in delegate.ops if op.weight is not None]
    assert len(found) == len(layers)
    for (name, layer), weight in zip(layers.items(), found, strict=True):
        expected = layer.weight.detach().numpy()
        np.testing.assert_array_equal(weight.reshape(expected.shape), expected, name)
        assert weight.ndim == 4, name


# --------------------------------------------------------------------------------------------
# Graphs written node by node
# --------------------------------------------------------------------------------------------

NODE_CLASSES = sorted(
    get_args(xnn.XNodeUnion),
    key=lambda cls: cls.__name__,
)
KINDS = {
    "XNNAdd": "add",
    "XNNArgMaxPooling2d": "arg_max_pooling2d",
    "XNNBatchMatrixMultiply": "batch_matrix_multiply",
    "XNNConvTranspose2d": "conv_transpose2d",
    "XNNELU": "elu",
    "XNNLeakyReLU": "leaky_relu",
    "XNNPReLU": "prelu",
    "XNNReciprocalSquareRoot": "reciprocal_square_root",
    "XNNStaticResizeBilinear2D": "static_resize_bilinear2d",
}


@pytest.mark.parametrize("unused", [INVALID, 0])  # 0: before the schema had the operand
@pytest.mark.parametrize("cls", NODE_CLASSES, ids=lambda cls: cls.__name__)
def test_every_node_the_schema_knows(cls: type, unused: int, small_pte: bytes) -> None:
    """Each field gets its own value, so that a field read from a neighbour's slot shows."""
    names = [f.name for f in dataclasses.fields(cls)]
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    arity = re.fullmatch(r"XNNConcatenate(\d)", cls.__name__)
    given_fields: dict[str, Any] = {}
    for number, name in enumerate(names, start=1):
        if name.endswith("_id"):
            given_fields[name] = number
        elif "List" in types[name]:
            given_fields[name] = [100 + number, 200 + number, 300 + number]
        elif "float" in types[name]:
            given_fields[name] = float(np.float32(0.1) * np.float32(number))
        else:
            given_fields[name] = 1000 + number
    if arity:
        for name in names:
            if re.fullmatch(r"input\d_id", name) and int(name[5]) > int(arity[1]):
                given_fields[name] = unused
    bounds = xnn.OutputMinMax(output_min=-0.1, output_max=math.inf)
    node = xnn.XNode(xnode_union=cls(**given_fields), debug_handle=2**32 - 2, output_min_max=bounds)
    values = [tensor_value(i) for i in range(len(names) + 1)]
    (delegate,) = read_program(around(small_pte, graph_of([node], values, []))).delegates
    (op,) = delegate.ops

    if cls.__name__ in KINDS:
        assert op.kind == KINDS[cls.__name__]
    assert "xnn" + op.kind.replace("_", "") == cls.__name__.lower()
    assert op.debug_handle == 2**32 - 2
    ids = {n: v for n, v in given_fields.items() if n.endswith("_id") and v != unused}
    assert op.weight == ids.pop("filter_id", None)
    assert op.bias == ids.pop("bias_id", None)
    assert op.outputs == tuple(v for n, v in ids.items() if n.startswith("output"))
    assert op.inputs == tuple(v for n, v in ids.items() if not n.startswith("output"))

    params = dict(op.params)
    assert params.pop("output_min") == float(np.float32(-0.1))
    assert params.pop("output_max") == math.inf
    numbers: list[Any] = []
    for value in params.values():
        numbers.extend(value if isinstance(value, tuple) else [value])
    expected: list[Any] = []
    for name, value in given_fields.items():
        if not name.endswith("_id"):
            expected.extend(value if isinstance(value, list) else [value])
    assert sorted(numbers) == sorted(expected)


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, exclude_min=True, min_value=0), min_size=1, max_size=8
    )
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_scales_survive_to_the_last_bit(small_pte: bytes, scales: list[float]) -> None:
    """Both ways a scale is stored: in the flatbuffer and as a blob; subnormals and inf too."""
    stored = np.asarray(scales, "<f4")
    per_channel = xnn.XNNQuantizedTensorValue(
        tensor_value=tensor_value(
            0, datatype=xnn.XNNDatatype.xnn_datatype_qcint8, dims=[len(scales)]
        ),
        quant_params=xnn.PerChannelQuant(
            scale=[], channel_dim=0, scale_buffer_idx=1, num_scales=len(scales)
        ),
    )
    per_tensor = [
        xnn.XNNQuantizedTensorValue(
            tensor_value=tensor_value(i, datatype=xnn.XNNDatatype.xnn_datatype_qint8),
            quant_params=xnn.PerTensorQuant(scale=float(scale), zero_point=-i),
        )
        for i, scale in enumerate(stored, start=1)
    ]
    constants = [xnn.ConstantDataOffset(offset=0, size=stored.nbytes)]
    pte = around(small_pte, graph_of([], [per_channel, *per_tensor], constants), stored.tobytes())
    (delegate,) = read_program(pte).delegates
    first, *others = delegate.tensors
    assert isinstance(first.scale, np.ndarray)
    assert first.scale.tobytes() == stored.tobytes()
    assert np.asarray([t.scale for t in others], "<f4").tobytes() == stored.tobytes()
    assert [t.zero_point for t in others] == [-i for i in range(1, len(scales) + 1)]


@pytest.mark.parametrize(
    ("datatype", "name", "stored"),
    [
        ("fp32", "float32", np.array([1.5, -math.inf, 1e-45, 3e38], "<f4")),
        ("fp16", "float16", np.array([1.5, -math.inf, 6e-8, 65504], "<f2")),
        ("qint8", "int8", np.array([-128, -1, 0, 127], "i1")),
        ("quint8", "uint8", np.array([0, 1, 128, 255], "u1")),
        ("qint32", "int32", np.array([-(2**31), -1, 2**24 + 1, 2**31 - 1], "<i4")),
    ],
)
def test_constants_by_dtype(datatype: str, name: str, stored: np.ndarray, small_pte: bytes) -> None:
    value = tensor_value(
        0,
        datatype=xnn.XNNDatatype[f"xnn_datatype_{datatype}"],
        dims=[2, 2],
        num_dims=2,
        constant_buffer_idx=1,
    )
    constants = [xnn.ConstantDataOffset(offset=3, size=stored.nbytes)]
    pte = around(small_pte, graph_of([], [value], constants), b"\xff" * 3 + stored.tobytes())
    (tensor,) = read_program(pte).delegates[0].tensors
    assert tensor.dtype == name
    assert tensor.array().dtype == stored.dtype
    np.testing.assert_array_equal(tensor.array(), stored.reshape(2, 2))


def test_bfloat16_constants_are_widened(small_pte: bytes) -> None:
    wide = torch.tensor([1.5, -math.inf, 1e-40, 3e38]).to(torch.bfloat16)
    stored = wide.view(torch.int16).numpy().tobytes()
    value = tensor_value(0, datatype=xnn.XNNDatatype.xnn_datatype_bf16, constant_buffer_idx=1)
    constants = [xnn.ConstantDataOffset(offset=0, size=len(stored))]
    pte = around(small_pte, graph_of([], [value], constants), stored)
    (tensor,) = read_program(pte).delegates[0].tensors
    assert tensor.dtype == "bfloat16"
    assert tensor.array().tobytes() == wide.to(torch.float32).numpy().tobytes()


def test_all_int4_pairs(small_pte: bytes) -> None:
    packed = np.arange(256, dtype=np.uint8)
    value = tensor_value(
        0,
        datatype=xnn.XNNDatatype.xnn_datatype_qcint4,
        dims=[16, 32],
        num_dims=2,
        constant_buffer_idx=1,
    )
    constants = [xnn.ConstantDataOffset(offset=0, size=256)]
    pte = around(small_pte, graph_of([], [value], constants), packed.tobytes())
    contents = read_program(pte)
    (tensor,) = contents.delegates[0].tensors
    assert contents.constant_bytes == read_program(small_pte).constant_bytes + 256
    expected = [[low - 8, high - 8] for high in range(16) for low in range(16)]
    assert tensor.array().reshape(-1, 2).tolist() == expected


def test_data_in_a_file_that_is_not_named(small_pte: bytes) -> None:
    value = tensor_value(0, constant_buffer_idx=1)
    constants = [xnn.ConstantDataOffset(offset=2**64 - 1, size=16, named_key="elsewhere")]
    with pytest.raises(ProgramError, match=r"'elsewhere' is in a data file \(\.ptd\).*data_path"):
        read_program(around(small_pte, graph_of([], [value], constants)))


def test_constants_under_two_names_are_counted_once(small_pte: bytes) -> None:
    stored = np.arange(4, dtype="<f4")
    graph = graph_of(
        [],
        [tensor_value(i, constant_buffer_idx=i + 1) for i in range(2)],
        [xnn.ConstantDataOffset(2**64 - 1, 16, named_key=name) for name in ("one", "two")],
    )
    file = deserialize_pte_binary(around(small_pte, graph))
    store = file.named_data
    assert store is not None
    entry = next(iter(store.pte_data.values()))
    store.buffers = [stored.tobytes()]
    store.pte_data = {name: dataclasses.replace(entry, buffer_index=0) for name in ("one", "two")}
    contents = read_program(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
    assert contents.constant_bytes == 16
    for tensor in contents.delegates[0].tensors:
        np.testing.assert_array_equal(tensor.array(), stored)


def test_external_order_is_by_external_id(small_pte: bytes) -> None:
    graph = graph_of([], [tensor_value(i, external_id=2 - i, flags=1) for i in range(3)], [])
    graph.input_ids = [0, 1, 2]
    (delegate,) = read_program(around(small_pte, graph)).delegates
    assert delegate.inputs == (2, 1, 0)


def test_description(small_pte: bytes) -> None:
    text = describe(read_program(small_pte)).splitlines()
    assert text[0] == f"{len(small_pte)} bytes, {35 + 2 * 5 * 4 + 5 * 4} of them constants"
    assert text[1] == "method forward(float32[2, 7]) -> float32[2, 5]"
    assert re.fullmatch(r"  delegate 0: XnnpackBackend, 3 ops, \d+ bytes", text[2])
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"    fully_connected\(%1 int8\[2, 7\] scale={number} zp=-?\d+, "
        rf"weight %2 int8\[5, 7\] scale={number}\.\.{number} per_channel zp=0, "
        rf"bias %3 int32\[5\] scale={number}\.\.{number} per_channel zp=0\) -> "
        rf"%4 int8\[2, 5\] scale={number} zp=-?\d+  flags=0",
        text[4],
    )


def test_description_names_every_op_and_tensor(lowered: Lowered) -> None:
    text = describe(lowered.contents)
    for delegate in lowered.contents.delegates:
        for op in delegate.ops:
            assert f"    {op.kind}(" in text
        for tensor in delegate.tensors:
            assert f"%{tensor.id} {tensor.dtype}{list(tensor.shape)}" in text
    for kernel in lowered.contents.kernels:
        assert f"  kernel {kernel}(" in text


# --------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------


def test_values_cannot_be_changed(lowered: Lowered) -> None:
    for _, delegate, op in lowered.pairs():
        weight, stored = weight_of(delegate, op), delegate.weight(op)
        arrays = [stored, weight.array()]
        if isinstance(weight.scale, np.ndarray):
            arrays.append(weight.scale)
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        with pytest.raises(TypeError):
            cast(Any, op.params)["groups"] = 3
        with pytest.raises(dataclasses.FrozenInstanceError):
            cast(Any, weight).id = 1
        assert isinstance(hash(op), int)


def test_activations_hold_no_data(lowered: Lowered) -> None:
    delegate = lowered.contents.delegates[0]
    with pytest.raises(ProgramError, match="computed when the program runs"):
        delegate.tensors[0].array()
    (add,) = (op for op in delegate.ops if op.kind == "add")
    assert delegate.bias(add) is None
    with pytest.raises(ProgramError, match="add node has no weight"):
        delegate.weight(add)


def test_unknown_method(lowered: Lowered) -> None:
    with pytest.raises(ProgramError, match="no method 'backward'; it has 'forward'"):
        lowered.contents.method("backward")


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------


def test_paths_and_bytes_read_alike(small_pte: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(small_pte)
    texts = {describe(read_program(source)) for source in (small_pte, path, str(path))}
    assert len(texts) == 1


def test_program_without_segments() -> None:
    """Nothing is delegated and there are no constants, so there is no extended header."""

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    exported = torch.export.export(Sum(), (torch.randn(2, 3),))
    pte = bytes(to_edge_transform_and_lower(exported).to_executorch().buffer)
    assert pte[8:12] != b"eh00"
    contents = read_program(pte)
    assert contents.kernels == ("aten::cumsum.out",)
    assert (contents.delegates, contents.constant_bytes) == ((), 0)
    whole = describe(contents).splitlines()[1:]
    for cut in range(len(pte)):
        # Such a file does not tell its length: a cut can go unnoticed only where nothing is read.
        try:
            assert describe(read_program(pte[:cut])).splitlines()[1:] == whole
        except ProgramError:
            continue


def test_constants_of_kernels_are_counted() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Buffer(torch.arange(6.0).reshape(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.table).cumsum(1)

    exported = torch.export.export(Table(), (torch.randn(2, 3),))
    pte = bytes(to_edge_transform_and_lower(exported).to_executorch().buffer)
    contents = read_program(pte)
    assert contents.constant_bytes == 24
    assert contents.kernels == ("aten::add.out", "aten::cumsum.out")


@pytest.mark.slow
def test_inline_delegates_are_read() -> None:
    torch.manual_seed(1)
    example = (torch.randn(2, 7),)
    exported = torch.export.export(quantize(nn.Linear(7, 5), example), example)
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    config = ExecutorchBackendConfig(extract_delegate_segments=False)
    pte = bytes(edge.to_executorch(config).buffer)
    (delegate,) = read_program(pte).delegates
    assert [op.kind for op in delegate.ops] == ["convert", "fully_connected", "convert"]


def test_other_backends_are_opaque(small_pte: bytes) -> None:
    file = deserialize_pte_binary(small_pte)
    file.program.execution_plan[0].delegates[0].id = "OtherBackend"
    pte = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
    (delegate,) = read_program(pte).delegates
    assert (delegate.backend_id, delegate.ops, delegate.tensors) == ("OtherBackend", (), ())
    assert delegate.size_bytes > 0


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"nowhere\.pte: cannot be read .*give the path"):
        read_program(tmp_path / "nowhere.pte")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="cannot be read"):
        read_program(tmp_path)


def test_string_that_is_no_path() -> None:
    with pytest.raises(ProgramError, match="is not a path"):
        read_program("a\0b.pte")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(100), r"is a damaged zip archive, not a \.pte; name the \.pte"),
        (b'{"kind": "graph"}', r"is JSON, as a report of this package is, not a \.pte"),
        (
            bytes([9, 0, 0, 0, 0, 0, 0, 0]) + b"{}",
            r"is a \.safetensors file of tensors, not a \.pte",
        ),
        (bytes(4) + b"BP08", r"is a \.bpte, a program bundled with inputs, not a \.pte"),
        (bytes(4) + b"FT01", r"is a \.ptd, weights that a \.pte keeps outside, not a \.pte"),
        (b"\x00" * 64, r"is not a \.pte of ExecuTorch; name the \.pte, .*to_executorch"),
    ],
)
def test_not_a_program(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=f"the program: {message}"):
        read_program(data)
    path = tmp_path / "bad.pte"
    path.write_bytes(data)
    with pytest.raises(ProgramError, match=rf"bad\.pte: {message}"):
        read_program(path)


def test_truncation_anywhere(small_pte: bytes) -> None:
    for cut in range(len(small_pte)):
        with pytest.raises(ProgramError):
            read_program(small_pte[:cut])


def test_truncation_of_a_larger_program(lowered: Lowered) -> None:
    size = len(lowered.pte)
    for cut in {*range(0, size, 97), *range(size - 64, size)}:
        with pytest.raises(ProgramError, match=r"truncated or corrupt|not a \.pte|is empty"):
            read_program(lowered.pte[:cut])


@pytest.mark.slow
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_one_wrong_byte_anywhere(small_pte: bytes, flip: int) -> None:
    """It reads, or says why not; describing and unpacking what was read never fails otherwise."""
    refused = 0
    for position in range(len(small_pte)):
        changed = bytearray(small_pte)
        changed[position] ^= flip
        pte = bytes(changed)
        try:
            contents = read_program(pte)
            describe(contents)
            for delegate in contents.delegates:
                for op in delegate.ops:
                    if op.weight is not None:
                        delegate.weight(op)
                        delegate.bias(op)
        except ProgramError:
            refused += 1
    assert refused > len(small_pte) / 3


@given(st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_words_in_the_header_and_graph(small_pte: bytes, data: st.DataObject) -> None:
    changed = bytearray(small_pte)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(small_pte) // 4 - 1)) * 4
        changed[position : position + 4] = data.draw(st.binary(min_size=4, max_size=4))
    try:
        describe(read_program(bytes(changed)))
    except ProgramError as error:
        assert str(error).startswith("the program: ")  # noqa: PT017


def test_short_extended_header(small_pte: bytes) -> None:
    assert small_pte[8:12] == b"eh00"
    with pytest.raises(ProgramError, match="the extended header claims 8 bytes"):
        read_program(small_pte[:12] + (8).to_bytes(4, "little") + small_pte[16:])


def test_overlapping_offsets_do_not_run_forever() -> None:
    """Every plan of a thousand is the same, with a thousand values that are the same."""
    count = 1000
    builder = importlib.import_module("flatbuffers").Builder()  # it has no stubs

    def repeated(offset: int) -> int:
        builder.StartVector(4, count, 4)
        for _ in range(count):
            builder.PrependUOffsetTRelative(offset)
        return cast(int, builder.EndVector())

    builder.StartObject(0)
    null = builder.EndObject()
    builder.StartObject(2)
    builder.PrependUint8Slot(0, 1, 0)
    builder.PrependUOffsetTRelativeSlot(1, null, 0)
    values = repeated(builder.EndObject())
    builder.StartObject(10)
    builder.PrependUOffsetTRelativeSlot(2, values, 0)
    plans = repeated(builder.EndObject())
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ET12")
    with pytest.raises(ProgramError, match="refers to more than fits in it"):
        read_program(bytes(builder.Output()))


def test_a_wrong_bit_in_a_constant_is_found(small_pte: bytes) -> None:
    for tensor in _constants(small_pte):
        start = small_pte.index(tensor.array().tobytes())
        changed = bytearray(small_pte)
        changed[start] ^= 1
        with pytest.raises(ProgramError, match="SHA-256"):
            read_program(bytes(changed))


def _constants(pte: bytes) -> list[DelegateTensor]:
    found = [t for t in read_program(pte).delegates[0].tensors if t.is_constant]
    assert len(found) == 2, "a weight and a bias"
    return found


def test_constants_are_named_by_their_hash(small_pte: bytes) -> None:
    """What the check above rests on."""
    for tensor in _constants(small_pte):
        digest = hashlib.sha256(tensor.array().tobytes()).hexdigest()
        assert tensor.constant_key == digest


def test_a_large_program_reads_fast() -> None:
    model, example = nn.Linear(1750, 1750).eval(), (torch.randn(1, 1750),)
    pte = lower(model, example)
    assert len(pte) > 12_000_000
    start = time.perf_counter()
    (delegate,) = read_program(pte).delegates
    assert time.perf_counter() - start < 1.0
    (op,) = delegate.ops
    np.testing.assert_array_equal(delegate.weight(op), model.weight.detach().numpy())


# --------------------------------------------------------------------------------------------
# Upstream's schemas, as far as the reader relies on them
# --------------------------------------------------------------------------------------------

SCHEMAS = (
    ["schema/scalar_type.fbs", "schema/program.fbs"],
    ["backends/xnnpack/serialization/schema.fbs"],
)


@pytest.mark.parametrize("paths", SCHEMAS)
def test_schemas_use_only_what_the_reader_knows(paths: list[str]) -> None:
    root = Path(xnn.__file__).parents[3]
    text = "\n".join((root / path).read_text() for path in paths)
    text = re.sub(r"//[^\n]*", "", text)
    assert "struct " not in text
    assert not re.search(r"\bid\s*:\s*\d", text)
    defaults = re.findall(r":\s*\[?\w+\]?\s*=\s*(\w+)", text)
    assert set(defaults) <= {"CPU", "0"}  # absent fields read as zero
    schema = flatbuffer._parse_schema(*paths)
    assert schema.root in schema.tables
    known = {*schema.tables, *schema.enums, *schema.unions, *flatbuffer.SCALARS, "string"}
    for fields in schema.tables.values():
        assert {found.type for found in fields.values()} <= known
    for members in schema.unions.values():
        assert {table for _, table in members} <= set(schema.tables)


def test_schema_identifiers_and_types() -> None:
    program, xnnpack = flatbuffer.program_schema(), flatbuffer.xnnpack_schema()
    assert (program.identifier, program.root) == (b"ET12", "Program")
    assert (xnnpack.identifier, xnnpack.root) == (b"XN01", "XNNGraph")
    _, datatypes = xnnpack.enums["XNNDatatype"]
    assert set(datatypes.values()) - {"xnn_datatype_invalid"} == set(readback._XNN_DTYPES)
    assert {alias for alias, _ in xnnpack.unions["XNodeUnion"]} == {
        cls.__name__ for cls in NODE_CLASSES
    }


def test_schema_from_another_release_is_an_error() -> None:
    with pytest.raises(ProgramError, match=r"no schema/gone\.fbs; install executorch"):
        flatbuffer._parse_schema("schema/gone.fbs")
