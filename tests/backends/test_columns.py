"""Convolutions over joined columns, and images that are put channels last as floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from hypothesis import assume, given
from hypothesis import strategies as st
from support.graphs import Function, differences
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import visitors
from custom_quantizer.backends.xnnpack.columns import JoinedColumns, join_columns
from custom_quantizer.backends.xnnpack.contents import DelegateOp, ProgramContents


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """With values beyond the calibrated range, and a zero point that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((1 + seed) * torch.randn(shape, generator=generator) + 0.3 for shape in shapes)


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        ((3, 224, 7, 2, 3), JoinedColumns(2, (1, 0), 4, 1, (2, 1))),  # resnet18
        ((3, 224, 3, 2, 1), JoinedColumns(2, (1, 0), 2, 1, (1, 0))),  # mobilenet_v2
        ((3, 224, 3, 2, 0), JoinedColumns(2, (0, 1), 2, 1, (0, 0))),  # squeezenet1_1
        ((3, 224, 4, 4, 0), JoinedColumns(4, (0, 0), 1, 1, (0, 0))),  # convnext_tiny
        ((3, 224, 16, 16, 0), JoinedColumns(16, (0, 0), 1, 1, (0, 0))),  # vit_b_16
        ((3, 224, 11, 4, 2), JoinedColumns(2, (0, 1), 6, 2, (1, 1))),  # alexnet
        ((1, 16000, 10, 5, 0), JoinedColumns(5, (0, 0), 2, 1, (0, 0))),  # wav2vec2
        ((3, 299, 3, 2, 0), None),  # an odd number of columns
        ((3, 224, 3, 1, 1), None),  # every column is read
        ((3, 224, 1, 2, 0), None),  # one tap stays one
        ((8, 224, 3, 2, 1), None),  # nothing was padding
        ((6, 224, 3, 2, 1), None),  # two taps of 12 channels are as much as three of 6
    ],
)
def test_columns_are_joined_where_that_is_less_work(
    layer: tuple[int, int, int, int, int], joined: JoinedColumns | None
) -> None:
    assert join_columns(*layer) == joined


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(2, 8),
    st.integers(0, 12),
    st.integers(0, 999),
)
def test_joined_columns_give_the_same_sums(
    channels: int, columns: int, taps: int, stride: int, padding: int, seed: int
) -> None:
    assume(columns + 2 * padding >= taps)
    joined = join_columns(channels, columns, taps, stride, padding)
    assume(joined is not None)
    assert joined is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-255, 256, (2, channels, 3, columns), generator=generator).double()
    weight = torch.randint(-128, 128, (2, channels, 2, taps), generator=generator).double()
    want = F.conv2d(x, weight, stride=(1, stride), padding=(0, padding))
    # As memory has it with channels last.
    last = x.permute(0, 2, 3, 1).reshape(2, 3, columns // joined.factor, -1).permute(0, 3, 1, 2)
    got = F.conv2d(F.pad(last, joined.padding), joined.weight(weight), stride=(1, joined.stride))
    assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------


def ops(contents: ProgramContents, kind: str) -> list[DelegateOp]:
    return [op for delegate in contents.delegates for op in delegate.ops if op.kind == kind]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, int]] = {
    "7x7": (lambda: nn.Conv2d(3, 8, 7, 2, 3), (2, 3, 18, 16), "a8w8", 2),
    "clamped": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, 2, 1, bias=False), nn.ReLU6()),
        (1, 3, 9, 12),
        "a8w8",
        2,
    ),
    "patches": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 8, 12), "a8w8", 4),
    "valid padding": (
        lambda: nn.Conv2d(3, 8, 4, 4, padding="valid"),
        (1, 3, 8, 12),
        "a8w8",
        4,
    ),
    "columns that no tap reads": (lambda: nn.Conv2d(3, 8, 3, 4), (1, 3, 9, 16), "a8w8", 4),
    "a part of the stride": (lambda: nn.Conv2d(3, 5, 11, 4, 2), (1, 3, 20, 22), "a8w8", 2),
    "one channel": (lambda: nn.Conv2d(1, 8, 5, (1, 3), 2), (2, 1, 7, 18), "a8w8", 3),
    "signal": (lambda: nn.Conv1d(1, 8, 10, 5), (2, 1, 50), "a8w8", 5),
    "signal with padding": (lambda: nn.Conv1d(2, 8, 7, 4, 3), (2, 2, 32), "a8w8", 4),
    "signal with valid padding": (
        lambda: nn.Conv1d(1, 8, 10, 5, padding="valid"),
        (2, 1, 50),
        "a8w8",
        5,
    ),
    "rows with dilation": (
        lambda: nn.Conv2d(3, 8, 3, 2, (2, 1), (2, 1)),
        (1, 3, 12, 12),
        "a8w8",
        2,
    ),
    "one scale": (lambda: nn.Conv2d(3, 8, 7, 2, 3), (1, 3, 8, 16), "a8w8-per_tensor", 2),
    "4-bit weights": (lambda: nn.Conv2d(3, 8, 7, 2, 3), (1, 3, 8, 16), "a8w4", 2),
    "4 bits, 16-bit bias": (lambda: nn.Conv2d(4, 8, 3, 2, 1), (1, 4, 8, 16), "a4w4-bias16", 2),
    "odd width": (lambda: nn.Conv2d(3, 8, 7, 2, 3), (1, 3, 8, 17), "a8w8", 1),
    "columns with dilation": (
        lambda: nn.Conv2d(3, 8, 3, 2, (1, 2), (1, 2)),
        (1, 3, 12, 12),
        "a8w8",
        1,
    ),
    "groups that become one": (
        lambda: nn.Conv2d(4, 8, 5, 2, 2, groups=2),
        (1, 4, 8, 16),
        "a8w8",
        2,
    ),
    "groups": (lambda: nn.Conv2d(16, 8, 5, 2, 2, groups=2), (1, 16, 8, 16), "a8w8", 1),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 4, 2), (1, 3, 8, 16), "a8w8", 1),
}
"""A layer, the shape of its input, a scheme, and how many columns are one to it."""


FAST = ("7x7", "patches", "signal with padding", "4 bits, 16-bit bias", "odd width", "groups")


@pytest.mark.parametrize("name", slow_but(FAST, LAYERS))
def test_a_layer_over_joined_columns_is_exact(name: str) -> None:
    build, shape, scheme, factor = LAYERS[name]
    torch.manual_seed(0)
    done = convert(build().eval(), inputs(shape), scheme)
    program = cq.lower(done.graph, done.example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert program.report.passes.get("join_columns", 0) == (factor > 1)
    if factor > 1:
        (delegate,) = program.contents.delegates
        (conv,) = ops(program.contents, "conv2d")
        *_, reshape = ops(program.contents, "static_reshape")[: 2 if len(shape) == 3 else 1]
        assert reshape.outputs == conv.inputs
        assert delegate.tensors[conv.inputs[0]].shape[-1] == factor * shape[1]
        assert delegate.weight(conv).shape[1] == shape[1]
    reference = cq.integer_reference(done.graph)
    for seed in (1, 2):
        batch = inputs(shape, seed=seed)
        assert differences(program.run(*batch), reference(*batch)) == []


@pytest.mark.parametrize("scheme", ["a16w8", "dyn8w8"])
def test_layers_of_other_kernels_are_written_as_they_are(scheme: str) -> None:
    done = convert(nn.Conv2d(3, 8, 7, 2, 3).eval(), inputs((1, 3, 8, 16)), scheme)
    program = cq.lower(done.graph, done.example)
    assert program.report.passes.get("join_columns", 0) == 0
    assert ops(program.contents, "static_reshape") == []


def test_layers_that_share_weight_and_image() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            weight = self.conv.weight
            return self.conv(x), self.conv(y), torch.conv2d(x, weight), torch.conv2d(x, weight[:2])

    shapes = (1, 3, 8, 8), (1, 3, 6, 12)
    torch.manual_seed(0)
    done = convert(Shared().eval(), inputs(*shapes))
    program = cq.lower(done.graph, done.example)
    assert program.report.passes["join_columns"] == 2
    batch = inputs(*shapes, seed=1)
    assert differences(program.run(*batch), cq.integer_reference(done.graph)(*batch)) == []


@pytest.mark.parametrize("where", ["a weight", "a zero"])
def test_a_wrong_integer_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = JoinedColumns.weight

    def wrong(self: JoinedColumns, weight: Tensor) -> Tensor:
        wide = joined(self, weight)
        wide[1, 0 if where == "a zero" else 4, 0, 0] += 1
        return wide

    done = convert(nn.Conv2d(3, 8, 7, 2, 3).eval(), inputs((1, 3, 8, 16)))
    monkeypatch.setattr(JoinedColumns, "weight", wrong)
    with pytest.raises(cq.VerificationError, match="weight: 1 of 1344 integers differ"):
        cq.lower(done.graph, done.example)


def test_other_padding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no constant of the file, so only the outputs tell."""

    def wrong(node: Any) -> tuple[JoinedColumns, int]:
        columns, axis = found(node)
        left, right = columns.padding
        object.__setattr__(columns, "padding", (left - 1, right + 1))
        return columns, axis

    found = visitors._columns_of
    done = convert(nn.Conv2d(3, 8, 7, 2, 3).eval(), inputs((1, 3, 8, 16)))
    monkeypatch.setattr(visitors, "_columns_of", wrong)
    with pytest.raises(cq.VerificationError, match="values differ from the integer reference"):
        cq.lower(done.graph, done.example)


@pytest.mark.slow
def test_the_standard_lowering_call_joins_columns() -> None:
    done = convert(nn.Conv2d(3, 8, 7, 2, 3).eval(), inputs((1, 3, 8, 16)))
    exported = torch.export.export(done.graph, done.example)
    edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
    cq.check(edge, done.graph, done.example)
    contents = cq.read_program(bytes(edge.to_executorch().buffer))
    assert len(ops(contents, "static_reshape")) == 1
    assert moved(contents)[:2] == FIRST


# ---------------------------------------------------------------------------------------------
# Layout of images
# ---------------------------------------------------------------------------------------------


def moved(contents: ProgramContents) -> list[tuple[str, str]]:
    """Kind, and dtype of the input, of what stands before the first layer of a delegate."""
    (delegate,) = contents.delegates
    first = next(i for i, op in enumerate(delegate.ops) if op.weight is not None)
    return [(op.kind, delegate.tensors[op.inputs[0]].dtype) for op in delegate.ops[:first]]


FIRST = [("static_transpose", "float32"), ("convert", "float32")]
LAST = [("convert", "float32"), ("static_transpose", "int8")]


@pytest.mark.parametrize(
    ("layer", "shape", "order"),
    [
        (nn.Conv2d(3, 8, 3), (2, 3, 6, 5), FIRST),
        (nn.Conv2d(8, 8, 3), (1, 8, 6, 5), FIRST),
        (nn.Conv2d(9, 8, 3), (1, 9, 6, 5), LAST),
        (nn.Conv2d(1, 8, 3), (1, 1, 6, 5), LAST),
    ],
    ids=["3 channels", "8 channels", "9 channels", "1 channel"],
)
def test_images_of_few_channels_are_moved_as_floats(
    layer: nn.Module, shape: tuple[int, ...], order: list[tuple[str, str]]
) -> None:
    done = convert(layer.eval(), inputs(shape))
    program = cq.lower(done.graph, done.example)
    assert moved(program.contents) == order
    batch = inputs(shape, seed=1)
    assert differences(program.run(*batch), cq.integer_reference(done.graph)(*batch)) == []


def test_an_image_that_two_layers_read_is_quantized_once() -> None:
    model = Function(lambda s, x: (s.a(x), s.b(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3))
    done = convert(model.eval(), inputs((1, 3, 6, 5)))
    program = cq.lower(done.graph, done.example)
    assert moved(program.contents)[0] == ("convert", "float32")
    batch = inputs((1, 3, 6, 5), seed=1)
    assert differences(program.run(*batch), cq.integer_reference(done.graph)(*batch)) == []


def test_an_image_of_integers_is_moved_as_it_is() -> None:
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(integer=True)
    done = convert(nn.Conv2d(3, 8, 3).eval(), inputs((1, 3, 6, 5)), quantizer)
    program = cq.lower(done.graph, done.example)
    assert moved(program.contents) == [("static_transpose", "int8")]
