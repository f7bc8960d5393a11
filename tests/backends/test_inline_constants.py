"""Where the constants of a program stand, and that its file holds little else."""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.extension.pybindings import portable_lib
from support.graphs import Function, quantized
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import flatbuffer, inline_constants
from custom_quantizer.backends.xnnpack.contents import DelegateContents, DelegateOp
from custom_quantizer.backends.xnnpack.inline_constants import ALIGNMENT, LARGE

WIDE = LARGE // 64 + 1
"""Outputs of a layer of 64 inputs, whose weight is large."""


class Net(nn.Module):
    """Small layers and a large one, a weight that is read twice, and a constant of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.slope = nn.PReLU(8)
        self.head = nn.Linear(8, 64)
        self.twice = nn.Linear(64, 64)
        self.wide = nn.Linear(64, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.slope(self.conv(x)).mean((2, 3)))
        return cast(Tensor, self.wide(self.twice(self.twice(y))))


IMAGE = (2, 3, 6, 6)


@cache
def net() -> tuple[cq.LoweredProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    quantizer = (
        cq.IntegerQuantizer()
        .set_global("a8w8")
        .set_operator_type(torch.ops.aten.prelu.default, None)
    )
    return cq.lower(quantized(Net(), (x,), quantizer), (x,)), x


def layers(program: cq.LoweredProgram) -> list[tuple[DelegateContents, DelegateOp]]:
    found = [(d, op) for d in program.contents.delegates for op in d.ops]
    return [(d, op) for d, op in found if op.weight is not None]


def keys(program: cq.LoweredProgram) -> list[tuple[str | None, ...]]:
    """Names of weight and bias of each layer."""
    return [
        tuple(d.tensors[cast(int, i)].constant_key for i in (op.weight, op.bias))
        for d, op in layers(program)
    ]


def test_what_is_known_of_upstream() -> None:
    """Delegates and their constants have no seam: ``inline_constants`` sets private fields."""
    assert version("executorch").partition("+")[0] == "1.5.1"
    assert isinstance(LoweredBackendModule.processed_bytes, property)
    assert isinstance(LoweredBackendModule.named_data_store_output, property)
    fields = inspect.getsource(LoweredBackendModule) + inspect.getsource(EdgeProgramManager)
    for name in ("_processed_bytes", "_named_data_store_output", "_named_data_store"):
        assert f"self.{name}" in fields


def test_small_constants_stand_in_the_delegate_and_others_have_names() -> None:
    program, _ = net()
    conv, head, first, second, wide = keys(program)
    assert conv == head == first == second == (None, None)
    assert all(wide)
    (delegate,) = program.contents.delegates
    read = {i for op in delegate.ops if op.weight is None for i in op.inputs}
    for tensor in delegate.tensors:
        if tensor.is_constant:
            assert tensor.name == hashlib.sha256(tensor.array().tobytes()).hexdigest()
    operands = [t for t in delegate.tensors if t.is_constant and t.id in read]
    assert operands
    assert all(t.constant_key for t in operands)


def test_the_scale_of_a_bias_in_the_file_is_that_of_input_times_weight() -> None:
    for delegate, op in layers(net()[0]):
        given, weight, bias = (
            delegate.tensors[cast(int, i)].scale for i in (op.inputs[0], op.weight, op.bias)
        )
        assert isinstance(bias, np.ndarray)
        assert bias.tobytes() == (cast(Any, weight) * np.float32(cast(float, given))).tobytes()


def test_a_delegate_is_not_read_once_it_is_loaded(tmp_path: Path) -> None:
    """A file is mapped segment by segment, and that of a delegate is let go of."""
    program, x = net()
    path = program.save(tmp_path / "net.pte")
    (outputs,) = portable_lib._load_for_executorch(str(path)).run_method("forward", (x,))
    assert torch.equal(outputs, program.run(x))


def test_layers_with_a_large_weight_are_told_apart_by_their_biases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the runtime's cache of packed weights they are the names of weight and bias."""
    monkeypatch.setattr(inline_constants, "LARGE", 64 * 64 - 1)
    program = cq.lower(net()[0].graph.model, (net()[1],))
    conv, _, first, second, wide = keys(program)
    assert conv == (None, None)
    assert all((*first, *second, *wide))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_what_two_delegates_read_is_stored_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = Function(lambda m, x: m.layer(m.layer(x).sort(0).values), layer=nn.Linear(8, 8))
    program = cq.lower(quantized(model, (x,)), (x,))
    assert len(program.contents.delegates) == 2
    (weight, bias), (same, other) = keys(program)
    assert weight is not None
    assert weight == same
    # And with it what tells the two layers apart.
    assert None not in (bias, other)
    assert bias != other
    delegate, op = layers(program)[0]
    assert program.buffer.count(delegate.tensors[cast(int, op.weight)].array().tobytes()) == 1


# ---------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------


def mobile() -> tuple[nn.Module, Tensor]:
    """Pointwise and depthwise convolutions, a residual sum."""

    def block(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1),
            nn.ReLU6(),
            nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels),
            nn.ReLU6(),
            nn.Conv2d(4 * channels, channels, 1),
        )

    model = Function(
        lambda m, x: m.b(m.a(m.stem(x)) + m.stem(x)).mean((2, 3)),
        stem=nn.Conv2d(3, 16, 3, stride=2),
        a=block(16),
        b=block(16),
    )
    return model, torch.randn(1, 3, 16, 16)


class Attention(nn.Module):
    """A table of positions in the scores, which are computed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(2, 121))
        self.register_buffer("index", torch.randint(0, 121, (36, 36)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(1, 36, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + self.table[:, cast(Tensor, self.index)]
        return cast(Tensor, x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def attention() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Attention(), Attention()), torch.randn(1, 36, 32)


def grouped() -> tuple[nn.Module, Tensor]:
    """Groups that are joined, and a convolution that is transposed."""
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, stride=2, padding=1),
        nn.Conv2d(32, 32, 7, padding=3, groups=32),
        nn.ConvTranspose2d(32, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    return model, torch.randn(1, 4, 8, 8)


@pytest.mark.parametrize("kind", [mobile, attention, grouped])
def test_a_file_holds_its_constants_once_and_little_else(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind()
    program = cq.lower(quantized(model, (x,)), (x,))
    (delegate,) = program.contents.delegates
    for tensor in delegate.tensors:
        stored = [tensor.array()] if tensor.is_constant else []
        stored += [tensor.scale] if isinstance(tensor.scale, np.ndarray) else []
        for values in stored:
            if np.unique(values).size > 8:
                assert program.buffer.count(values.tobytes()) == 1
    # A table of positions is integers as well: of float32 only numbers and rows are left.
    floats = [t for t in delegate.tensors if t.dtype == "float32" and (t.is_constant or t.is_input)]
    assert sum(np.prod(t.shape) for t in floats) <= 1024 + x.numel()
    parts = len(delegate.tensors) + len(delegate.ops)
    assert len(program.buffer) - program.contents.constant_bytes <= 70 * parts + 4096


# ---------------------------------------------------------------------------------------------
# The writer
# ---------------------------------------------------------------------------------------------


def test_what_is_written_reads_as_what_was_read() -> None:
    program, _ = net()
    at = program.buffer.index(b"XN01") - 4
    assert at % ALIGNMENT == 0
    schema = flatbuffer.xnnpack_schema()

    def read(data: memoryview) -> flatbuffer.Contents:
        return flatbuffer.Buffer(data, schema, "a graph").root().contents()

    once = read(memoryview(program.buffer)[at:])
    inline = [c for c in once["constant_data"][1:] if c["named_key"] is None]
    assert len(inline) == 7  # of three small layers, of which one is called with two biases
    assert all(constant["offset"] % ALIGNMENT == 0 for constant in inline)
    again = flatbuffer.write(once, schema)
    assert repr(read(memoryview(again))) == repr(once)
    # Nothing is lost of a number: not its last bit, not the sign of a zero.
    bounds = flatbuffer.Contents("OutputMinMax", {"output_min": -0.0, "output_max": 0.1})
    node = flatbuffer.Contents("XNode", {"output_min_max": bounds, "debug_handle": 2**32 - 1})
    graph = flatbuffer.Contents("XNNGraph", {"xnodes": [node, node], "version": "0"})
    (first, second) = read(memoryview(flatbuffer.write(graph, schema)))["xnodes"]
    assert repr(first) == repr(second)
    assert first["debug_handle"] == 2**32 - 1
    assert first["output_min_max"].fields == {
        "output_min": -0.0,
        "output_max": float(np.float32(0.1)),
    }
    assert np.signbit(first["output_min_max"]["output_min"])
