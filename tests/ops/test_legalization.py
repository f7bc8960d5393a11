"""Ops in the forms that have integer kernels: the same numbers, in one delegate, exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.graphs import (
    Function,
    calls,
    canonicalize,
    capture,
    differences,
    lowered_exactly,
    quantized,
    stress,
)
from support.models import randomize_batch_norms
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.ops.backend import Kernel
from custom_quantizer.ops.rewrites.legalization import sums
from custom_quantizer.ops.rewrites.masks import MASKED

aten = torch.ops.aten
IMAGE, SIGNAL, VOLUME = (2, 4, 6, 6), (2, 4, 12), (2, 4, 5, 6, 6)
Build = Callable[[], nn.Module]


def function(f: Callable[[Tensor], Any]) -> Build:
    return lambda: Function(lambda _self, x: f(x))


def module(*layers: Callable[[], nn.Module]) -> Build:
    return lambda: nn.Sequential(*(layer() for layer in layers))


# Name: what it is, the shape of its input, and the aten op that must be gone, if it does not
# stay in another shape.
MOVES: dict[str, tuple[Build, tuple[int, ...], Any]] = {
    "cat with nothing": (
        function(lambda x: torch.cat([x[:, 4:], x.transpose(2, 3), x[:, :0]], 1)),
        IMAGE,
        aten.cat.default,
    ),
    "cat of one": (function(lambda x: torch.cat([x], 1).flip(1)), IMAGE, aten.flip.default),
    "stack": (function(lambda x: torch.stack([x, x.flip(1)], 1)), IMAGE, aten.stack.default),
    "roll": (function(lambda x: torch.roll(x, (1, -2), (2, 3))), IMAGE, aten.roll.default),
    "roll by nothing": (function(lambda x: torch.roll(x, 6, 2)), IMAGE, aten.roll.default),
    "flip": (function(lambda x: x.flip((1, 3))), IMAGE, aten.flip.default),
    "channel shuffle": (
        function(lambda x: F.channel_shuffle(x, 2)),
        IMAGE,
        aten.channel_shuffle.default,
    ),
    "pixel shuffle": (module(lambda: nn.PixelShuffle(2)), IMAGE, aten.pixel_shuffle.default),
    "pixel unshuffle": (module(lambda: nn.PixelUnshuffle(3)), IMAGE, aten.pixel_unshuffle.default),
    "nearest": (
        function(lambda x: F.interpolate(x, scale_factor=2)),
        IMAGE,
        aten.upsample_nearest2d.vec,
    ),
    "nearest to a size": (
        function(lambda x: F.interpolate(x, size=(18, 9))),
        IMAGE,
        aten.upsample_nearest2d.vec,
    ),
    "nearest by an odd factor": (
        function(lambda x: F.interpolate(x, scale_factor=1.7)),
        IMAGE,
        aten.upsample_nearest2d.vec,
    ),
    "nearest to an odd size": (
        function(lambda x: F.interpolate(x, size=(11, 23))),
        IMAGE,
        aten.upsample_nearest2d.vec,
    ),
    "nearest of a volume": (
        function(lambda x: F.interpolate(x, size=(10, 6, 18))),
        VOLUME,
        aten.upsample_nearest3d.vec,
    ),
    "nearest down": (
        function(lambda x: F.interpolate(x, size=(4, 5))),
        IMAGE,
        aten.upsample_nearest2d.vec,
    ),
    "nearest of a signal": (
        function(lambda x: F.interpolate(x, scale_factor=3)),
        SIGNAL,
        aten.upsample_nearest1d.vec,
    ),
    "repeat": (function(lambda x: x.repeat(2, 1, 2, 1, 3)), IMAGE, aten.repeat.default),
    "max_pool1d": (module(lambda: nn.MaxPool1d(3, 2, 1)), SIGNAL, aten.max_pool1d.default),
    "max_pool3d": (module(lambda: nn.MaxPool3d(3, 2, 1)), VOLUME, aten.max_pool3d.default),
    "max_pool3d, rounding up": (
        module(lambda: nn.MaxPool3d((2, 3, 1), 2, ceil_mode=True)),
        VOLUME,
        aten.max_pool3d.default,
    ),
    "max_pool3d, dilated": (
        module(lambda: nn.MaxPool3d(2, 1, dilation=(2, 1, 3))),
        VOLUME,
        aten.max_pool3d.default,
    ),
    "adaptive max": (
        module(lambda: nn.AdaptiveMaxPool2d((4, 3))),
        IMAGE,
        aten.adaptive_max_pool2d.default,
    ),
    "adaptive max of signals": (
        module(lambda: nn.AdaptiveMaxPool1d(5)),
        SIGNAL,
        aten.adaptive_max_pool1d.default,
    ),
    "adaptive max of one signal": (
        module(lambda: nn.AdaptiveMaxPool1d(5)),
        SIGNAL[1:],
        aten.adaptive_max_pool1d.default,
    ),
    "adaptive max of one volume": (
        module(lambda: nn.AdaptiveMaxPool3d((2, 3, 4))),
        VOLUME[1:],
        aten.adaptive_max_pool3d.default,
    ),
    "adaptive max of volumes": (
        module(lambda: nn.AdaptiveMaxPool3d((2, 3, 4))),
        VOLUME,
        aten.adaptive_max_pool3d.default,
    ),
    "largest of images": (function(lambda x: x.amax((2, 3))), IMAGE, aten.amax.default),
    "largest of channels": (function(lambda x: x.amax(1, True)), IMAGE, aten.amax.default),
    "largest over far dims": (function(lambda x: x.amax((1, 3))), IMAGE, aten.amax.default),
    "largest of a batch": (function(lambda x: x.amax((0, 2))), IMAGE, aten.amax.default),
    "largest of rows": (function(lambda x: x.max(-1).values), IMAGE, aten.max.dim),
    "largest of points": (function(lambda x: x.max(2, True)[0]), SIGNAL, aten.max.dim),
    "max pool of one signal": (module(lambda: nn.MaxPool1d(3)), (4, 12), aten.max_pool1d.default),
    "max pool of one image": (module(lambda: nn.MaxPool2d(2)), (4, 6, 6), None),
}
# No integer kernel negates.
MINIMA: dict[str, tuple[Build, tuple[int, ...], Any]] = {
    "smallest of channels": (function(lambda x: x.amin(1, True)), IMAGE, aten.amin.default),
    "smallest of rows": (function(lambda x: x.min(-1).values), IMAGE, aten.min.dim),
}
SUMS: dict[str, tuple[Build, tuple[int, ...], Any]] = {
    "mean over the batch": (function(lambda x: x.mean(0)), IMAGE, aten.mean.dim),
    "mean over channels": (function(lambda x: x.mean(1, keepdim=True)), IMAGE, aten.mean.dim),
    "mean over rows": (function(lambda x: x.mean(-1)), IMAGE, aten.mean.dim),
    "mean over far dims": (function(lambda x: x.mean((1, 3), True)), IMAGE, aten.mean.dim),
    "mean of a signal": (function(lambda x: x.mean(1)), SIGNAL, aten.mean.dim),
    "sum": (function(lambda x: x.sum((2, 3))), IMAGE, aten.sum.dim_IntList),
    "sum over channels": (function(lambda x: x.sum(1)), IMAGE, aten.sum.dim_IntList),
    "sum of a stack": (
        function(lambda x: torch.stack([x, x.flip(1)], 2).sum(2)),
        SIGNAL,
        aten.sum.dim_IntList,
    ),
    "mean of three": (
        function(lambda x: torch.stack([x, x.flip(1), x.flip(2)], -1).mean(-1, keepdim=True)),
        IMAGE,
        aten.mean.dim,
    ),
    "adaptive": (
        module(lambda: nn.AdaptiveAvgPool2d((4, 5))),
        IMAGE,
        aten.adaptive_avg_pool2d.default,
    ),
    "adaptive, larger": (
        module(lambda: nn.AdaptiveAvgPool2d((7, 9))),
        IMAGE,
        aten.adaptive_avg_pool2d.default,
    ),
    "adaptive, signal": (
        module(lambda: nn.AdaptiveAvgPool1d(5)),
        SIGNAL,
        aten.adaptive_avg_pool1d.default,
    ),
    "adaptive, volume": (
        module(lambda: nn.AdaptiveAvgPool3d((2, 3, 1))),
        VOLUME,
        aten.adaptive_avg_pool3d.default,
    ),
    "counted padding": (
        module(lambda: nn.AvgPool2d(3, 1, 1)),
        IMAGE,
        aten.avg_pool2d.default,
    ),
    "own divisor": (
        module(lambda: nn.AvgPool2d(2, divisor_override=3)),
        IMAGE,
        aten.avg_pool2d.default,
    ),
    "average of a signal": (
        module(lambda: nn.AvgPool1d(3, 2, 1)),
        SIGNAL,
        aten.avg_pool1d.default,
    ),
    "average of volumes": (
        module(lambda: nn.AvgPool3d(2), lambda: nn.Conv3d(4, 4, 1)),
        VOLUME,
        aten.avg_pool3d.default,
    ),
    "average of volumes, padded": (
        module(lambda: nn.AvgPool3d((3, 2, 3), 2, 1)),
        VOLUME,
        aten.avg_pool3d.default,
    ),
    "average of volumes, padding not counted": (
        module(lambda: nn.AvgPool3d(3, 2, 1, count_include_pad=False), lambda: nn.Conv3d(4, 4, 1)),
        VOLUME,
        aten.avg_pool3d.default,
    ),
    "own divisor of volumes": (
        module(lambda: nn.AvgPool3d(2, divisor_override=3)),
        VOLUME,
        aten.avg_pool3d.default,
    ),
    "patches": (
        module(lambda: nn.Unfold((3, 2), dilation=(1, 2), padding=1, stride=(2, 1))),
        IMAGE,
        aten.im2col.default,
    ),
    "large patches that overlap": (
        module(lambda: nn.Unfold((9, 8), padding=(1, 0), stride=(3, 4))),
        (2, 1, 11, 12),
        aten.im2col.default,
    ),
    "patches of one image": (module(lambda: nn.Unfold(2)), (4, 6, 6), aten.im2col.default),
    "patches side by side": (
        module(lambda: nn.Unfold((2, 3), stride=(2, 3))),
        (2, 3, 5, 7),  # the last row and column are in none
        aten.im2col.default,
    ),
    "large patches side by side": (
        module(lambda: nn.Unfold(10, stride=10)),
        (1, 2, 20, 10),
        aten.im2col.default,
    ),
    "patches put back": (
        function(lambda x: F.fold(x, (6, 6), (3, 2), stride=(3, 2))),
        (2, 12, 6),
        aten.col2im.default,
    ),
    "sums of patches": (
        function(lambda x: F.fold(x, (6, 6), 3, padding=(0, 1), stride=(3, 1))),
        (2, 36, 12),
        aten.col2im.default,
    ),
    "norm of rows": (module(lambda: nn.BatchNorm1d(4)), (5, 4), aten.batch_norm.default),
    "norm of signals": (module(lambda: nn.BatchNorm1d(4)), SIGNAL, aten.batch_norm.default),
    "norm of images": (
        module(lambda: nn.BatchNorm2d(4), nn.ReLU),
        IMAGE,
        aten.batch_norm.default,
    ),
    "norm without affine": (
        module(lambda: nn.BatchNorm2d(4, affine=False)),
        IMAGE,
        aten.batch_norm.default,
    ),
    "norm of volumes": (module(lambda: nn.BatchNorm3d(4)), VOLUME, aten.batch_norm.default),
    "conv3d": (module(lambda: nn.Conv3d(4, 6, 3)), VOLUME, aten.conv3d.default),
    "conv3d with a norm and relu": (
        module(
            lambda: nn.Conv3d(4, 6, (3, 2, 2), (2, 2, 1), (1, 0, 1), bias=False),
            lambda: nn.BatchNorm3d(6),
            nn.ReLU,
        ),
        VOLUME,
        aten.conv3d.default,
    ),
    "conv3d in groups": (
        module(lambda: nn.Conv3d(4, 6, (3, 3, 2), groups=2), nn.ReLU6),
        VOLUME,
        aten.conv3d.default,
    ),
    "conv3d, dilated": (
        module(lambda: nn.Conv3d(4, 6, 2, dilation=(3, 2, 1))),
        VOLUME,
        aten.conv3d.default,
    ),
    "conv3d without padding": (
        module(lambda: nn.Conv3d(4, 6, 2, padding="valid")),
        VOLUME,
        aten.conv3d.padding,
    ),
    "conv3d of the same size": (
        module(lambda: nn.Conv3d(4, 6, (2, 3, 3), padding="same", dilation=(3, 1, 2)), nn.ReLU),
        VOLUME,
        aten.conv3d.padding,
    ),
    "conv3d of the same size, by unequal padding": (
        module(lambda: nn.Conv3d(4, 6, (2, 4, 3), padding="same"), nn.ReLU),
        VOLUME,
        aten.conv3d.padding,
    ),
    "conv3d of points": (
        module(lambda: nn.Conv3d(4, 6, 1, stride=2)),
        VOLUME,
        aten.conv3d.default,
    ),
    "transposed conv3d": (
        module(lambda: nn.ConvTranspose3d(4, 6, 3, 2, 1, output_padding=1)),
        VOLUME,
        aten.conv_transpose3d.input,
    ),
    "transposed conv3d of blocks, with a norm and relu": (
        module(
            lambda: nn.ConvTranspose3d(4, 6, 2, 2, bias=False),
            lambda: nn.BatchNorm3d(6),
            nn.ReLU,
        ),
        VOLUME,
        aten.conv_transpose3d.input,
    ),
    "transposed conv3d in groups": (
        module(
            lambda: nn.ConvTranspose3d(4, 6, (4, 3, 2), (3, 1, 2), (2, 1, 0), groups=2),
            lambda: nn.BatchNorm3d(6),
        ),
        VOLUME,
        aten.conv_transpose3d.input,
    ),
    "transposed conv3d, dilated": (
        module(lambda: nn.ConvTranspose3d(4, 6, 3, (2, 1, 1), 1, (2, 0, 0), dilation=(3, 2, 1))),
        VOLUME,
        aten.conv_transpose3d.input,
    ),
    "transposed conv3d of wide steps": (
        module(lambda: nn.ConvTranspose3d(4, 6, 2, 3, output_padding=(2, 0, 1))),
        VOLUME,
        aten.conv_transpose3d.input,
    ),
    "transposed conv3d of one volume": (
        module(lambda: nn.ConvTranspose3d(4, 6, 2)),
        (4, 3, 6, 6),
        aten.conv_transpose3d.input,
    ),
    "conv3d of one volume": (
        module(lambda: nn.Conv3d(4, 6, 2)),
        (4, 3, 6, 6),
        aten.conv3d.default,
    ),
    "conv2d of one image": (module(lambda: nn.Conv2d(4, 6, 3), nn.ReLU), (4, 6, 6), None),
    "conv_transpose1d of one signal": (
        module(lambda: nn.ConvTranspose1d(4, 6, 3)),
        (4, 12),
        None,
    ),
    "mean of one image": (
        module(lambda: nn.AdaptiveAvgPool2d(1)),
        (4, 6, 6),
        None,
    ),
    "counted padding of one image": (
        module(lambda: nn.AvgPool2d(3, 1, 1)),
        (4, 6, 6),
        aten.avg_pool2d.default,
    ),
}
CASES = MOVES | SUMS
EXACT = MOVES | MINIMA


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms((CASES | MINIMA)[name][0]()).eval()


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
def test_frames_are_joined_in_as_many_steps_for_any_number_of_groups(layer: type[Any]) -> None:
    """Depthwise, a slice for each channel made most of the ops of a network for videos."""

    def steps(groups: int) -> int:
        model = nn.Sequential(layer(16, 16, 3, padding=1, groups=groups)).eval()
        return len(canonicalize(capture(model, (torch.randn(1, 16, 4, 5, 6),))).graph.nodes)

    assert steps(16) == steps(2)


@pytest.mark.parametrize("name", slow_but(list(CASES | MINIMA)[::3], CASES | MINIMA))
def test_a_form_computes_what_the_op_does(name: str) -> None:
    _, shape, target = (CASES | MINIMA)[name]
    model, x = built(name), torch.randn(shape)
    graph = canonicalize(capture(model, (x,)))
    assert calls(graph, target) == []
    for given in (x, torch.full(shape, -3.0), torch.randn(shape) * 1e6):
        want, got = model(given), graph(given)
        if name in EXACT:
            assert differences(got, want) == []
        else:
            # Sums of up to 200 terms in another order.
            size = float(given.abs().max())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=200 * 2.0**-24 * size)


@pytest.mark.parametrize("exponent", [2, 3, 2.0, 0.5, -0.5, -1])
def test_powers_are_the_same_bits(exponent: float) -> None:
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-6, 7, 3)])
    graph = canonicalize(capture(Function(lambda s, x: x**exponent), (x,)))
    assert calls(graph, aten.pow.Tensor_Scalar) == []
    assert torch.equal(graph(x).view(torch.int32), (x**exponent).view(torch.int32))


def test_other_powers_stay() -> None:
    x = torch.rand(5)
    for function in (lambda x: x**2.5, lambda x: x**x, lambda x: (x * 3).to(torch.int64) ** 2):
        graph = canonicalize(capture(Function(lambda s, x, f=function: f(x)), (x,)))
        assert torch.equal(graph(x), function(x))


def test_a_square_is_an_integer_product() -> None:
    x = torch.randn(2, 8, 6)
    graph = quantized(Function(lambda s, x: torch.square(x) + (x + x) ** 3), (x,))
    program = cq.lower(graph, (x,))
    assert program.report.not_integer() == ()
    assert differences(program.run(x), cq.integer_reference(graph)(x)) == []


@pytest.mark.parametrize("dim", [1, -1])
def test_a_gated_half_is_integers(dim: int) -> None:
    """Also what a mask takes of it: as a sum and a product, nothing of it may be infinite."""
    x = torch.randn(2, 4, 6)

    def f(s: Any, x: Tensor) -> Tensor:
        half = F.glu(s.m(x), dim)
        return half.masked_fill(torch.arange(half.shape[-1]) > 1, 0.0)

    model = Function(f, m=nn.Linear(6, 6))
    graph = quantized(model, (x,))
    torch.testing.assert_close(canonicalize(capture(model, (x,)))(x), model(x))
    program = cq.lower(graph, (x,))
    assert program.report.fully_delegated
    assert [row.backend.label for row in program.report.not_integer()] == ["xnnpack table"]
    assert differences(program.run(x), cq.integer_reference(graph)(x)) == []


def test_maxima_whose_indices_are_used_stay() -> None:
    x = torch.randn(IMAGE)
    graph = canonicalize(capture(Function(lambda s, x: x.max(1)), (x,)))
    assert len(calls(graph, aten.max.dim)) == 1
    assert all(torch.equal(a, b) for a, b in zip(graph(x), x.max(1), strict=True))
    graph = canonicalize(capture(Function(lambda s, x: x.sum().amax(0)), (x,)))
    assert len(calls(graph, aten.amax.default)) == 1


# Another case of the same form takes the same path to the runtime, with other numbers or ranks.
LIKE_ANOTHER = {
    "adaptive max of signals",
    "adaptive max of volumes",
    "adaptive, larger",
    "adaptive, signal",
    "adaptive, volume",
    "average of volumes",
    "average of volumes, padded",
    "average of volumes, padding not counted",
    "cat of one",
    "channel shuffle",
    "conv3d",
    "conv3d in groups",
    "conv3d of one volume",
    "conv3d of points",
    "conv3d, dilated",
    "counted padding of one image",
    "flip",
    "largest of a batch",
    "largest of channels",
    "largest of points",
    "largest over far dims",
    "max pool of one image",
    "max pool of one signal",
    "max_pool3d, dilated",
    "max_pool3d, rounding up",
    "mean of a signal",
    "mean of three",
    "mean of one image",
    "mean over far dims",
    "mean over rows",
    "mean over the batch",
    "nearest by an odd factor",
    "nearest down",
    "nearest of a signal",
    "nearest to a size",
    "norm of rows",
    "norm of signals",
    "norm of volumes",
    "norm without affine",
    "own divisor of volumes",
    "patches of one image",
    "roll by nothing",
    "stack",
    "sum over channels",
    "transposed conv3d of one volume",
    "transposed conv3d of wide steps",
    "transposed conv3d, dilated",
}
GROUPS = [
    sorted(CASES.keys() - LIKE_ANOTHER),
    *(sorted(LIKE_ANOTHER)[i::2] for i in range(2)),
]
GROUP = pytest.mark.parametrize("group", slow_but([0], range(3)))


@cache
def lowered(group: int) -> tuple[GraphModule, cq.LoweredProgram, list[tuple[int, ...]]]:
    """Several cases in one program; each gets integers."""
    names = GROUPS[group]
    model = Function(
        lambda s, *xs: [getattr(s, f"m{i}")(x + x) for i, x in enumerate(xs)],
        **{f"m{i}": built(name) for i, name in enumerate(names)},
    )
    shapes = [CASES[name][1] for name in names]
    torch.manual_seed(1)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    graph = quantized(model, inputs, _with_totals())
    return graph, cq.lower(graph, inputs), shapes


def _with_totals() -> cq.IntegerQuantizer:
    """All on integers: totals that are returned, too, which are float where no rule names them."""
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    for name in ("aten.mean.dim", "aten.sum.dim_IntList"):
        quantizer.set_operator_type(name, "a8w8")
    return quantizer


@GROUP
def test_forms_are_integer_inside_one_delegate(group: int) -> None:
    _, program, _ = lowered(group)
    assert (program.report.delegates, program.report.outside) == (1, ())
    beside = {(row.node, row.family) for row in program.report.not_integer()}
    # Padding the depth of a convolution and plain averages run in float, and are exact.
    assert {family for _, family in beside} <= {"pad", "avg_pool2d"}, beside


@pytest.mark.parametrize("name", MINIMA)
def test_minima_run_in_float_inside_one_delegate(name: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1), built(name)).eval(), torch.randn(IMAGE)
    program = lowered_exactly(quantized(model, (x,)), (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())


@GROUP
def test_forms_run_as_the_integer_reference_says(group: int) -> None:
    graph, program, shapes = lowered(group)
    reference = cq.integer_reference(graph)
    for given in stress(shapes):
        got, want = program.run(*given), reference(*given)
        for name, a, b in zip(GROUPS[group], got, want, strict=True):
            assert differences(a, b) == [], name


@pytest.mark.parametrize(
    "name", ["sum", "adaptive", "norm of images", "conv3d with a norm and relu"]
)
@pytest.mark.parametrize("mode", ["xnnpack", "fixed_point", "exact"])
def test_integers_are_close_to_the_float_model(name: str, mode: str) -> None:
    """Against the module itself, within the steps of input, weight and output."""
    model = Function(lambda s, x: s.m(x + x), m=built(name))
    x = torch.randn(CASES[name][1])
    graph = quantized(model, (x,), _with_totals())
    want, got = model(x), cq.integer_reference(graph, mode)(x)
    noise = float((got - want).norm() / want.norm())
    assert noise < 0.03


# ---------------------------------------------------------------------------------------------
# What is left as it is, and says so
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "backend"),
    [
        (
            module(lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
            (1, 4, 8, 8),
            kernels.PORTABLE,
        ),
        (module(lambda: nn.Upsample(size=(223, 6), mode="bilinear")), (1, 4, 28, 3), kernels.FLOAT),
        (module(lambda: nn.GroupNorm(2, 4)), IMAGE, kernels.FLOAT),
        *(
            pytest.param(module(build), shape, kernel, marks=pytest.mark.slow)
            for build, shape, kernel in (
                (
                    lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2),
                    (1, 4, 8, 8),
                    kernels.PORTABLE,
                ),
                (lambda: nn.InstanceNorm2d(4), IMAGE, kernels.FLOAT),
            )
        ),
    ],
)
def test_what_has_no_integer_form_runs_in_float_and_is_reported(
    build: Build, shape: tuple[int, ...], backend: Kernel
) -> None:
    model = Function(
        lambda s, x: s.tail(s.m(s.head(x))), m=build(), head=pointwise(), tail=pointwise()
    )
    x = torch.randn(shape)
    program = cq.lower(quantized(model, (x,)), (x,))
    (row,) = program.report.not_integer()
    assert row.backend is backend
    assert row.reason


def pointwise() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


def test_large_windows_are_pooled_in_float() -> None:
    """A depthwise convolution is no faster there."""
    graph = canonicalize(capture(nn.AvgPool2d(5, 1, 2).eval(), (torch.randn(IMAGE),)))
    assert len(calls(graph, aten.avg_pool2d.default)) == 1


@pytest.mark.parametrize(
    ("pool", "height", "width"),
    [
        (nn.AvgPool2d(2, ceil_mode=True), 7, 6),
        (nn.AvgPool2d(3, 2, ceil_mode=True), 6, 8),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), 6, 7),
        (nn.AvgPool2d((20, 2), ceil_mode=True), 3, 5),
        (nn.AvgPool2d(20, ceil_mode=True), 2, 3),
    ],
)
def test_last_windows_that_are_cut_off_divide_by_what_is_in_them(
    pool: nn.Module, height: int, width: int
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), pool, nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 4, height, width)
    graph = canonicalize(capture(model, (x,)))
    pools = calls(graph, aten.avg_pool2d.default)
    assert not any(node.args[4:5] == (True,) for node in pools)
    assert torch.equal(graph(x), model(x))
    converted = quantized(model, (x,))
    program = cq.lower(converted, (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert differences(program.run(x), cq.integer_reference(converted)(x)) == []


def test_a_linear_layer_that_would_be_too_large_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sums, "MAX_WEIGHTS", 35)
    graph = canonicalize(capture(built("sum"), (torch.randn(IMAGE),)))
    assert len(calls(graph, aten.sum.dim_IntList)) == 1


# ---------------------------------------------------------------------------------------------
# Means of a dynamic batch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mean",
    [
        pytest.param(lambda x: x.mean((2, 3)), marks=pytest.mark.slow),
        pytest.param(lambda x: x.mean((2, 3), keepdim=True), marks=pytest.mark.slow),
        lambda x: F.adaptive_avg_pool2d(x, 1),
    ],
)
def test_a_mean_stays_right_when_the_batch_grows(mean: Callable[[Tensor], Tensor]) -> None:
    """XNNPACK's own integer mean does not: see ``forms/sums.py``."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = Function(lambda s, x: mean(torch.cat([x + x, x * x], 1)))
    x = torch.randn(IMAGE)
    captured = capture(model, (x,), dynamic_shapes=(({0: torch.export.Dim("n", max=8)},),))
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(outputs="a8")
    prepared = prepare_pt2e(captured, quantizer)
    prepared(x)
    graph = convert_pt2e(prepared)
    program = cq.lower(graph, (x,))
    assert program.report.fully_delegated
    reference = cq.integer_reference(graph)
    for size in (3, 8, 1, 7, 2, 8):
        given = torch.randn(size, *IMAGE[1:])
        assert differences(program.run(given), reference(given)) == [], size


# ---------------------------------------------------------------------------------------------
# Sums over branches
# ---------------------------------------------------------------------------------------------


def selective(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """Two branches of images, weighed by what both have at most (SKNet)."""
    both = torch.stack([a, b], 1)
    weights = both.sum(1).amax((2, 3))[:, :2].view(-1, 2, 1, 1, 1)
    return (both * weights).sum(1)


def split_attention(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """Two halves of the channels of one layer (ResNeSt)."""
    halves = torch.cat([a, b], 1).view(-1, 2, *a.shape[1:])
    return (b.amax((2, 3), keepdim=True)[:, None] * halves).sum(1)


def radix(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """The halves are those of one tensor."""
    halves = (a - b).view(-1, 2, a.shape[1] // 2, *a.shape[2:])
    return (halves * b.amax((2, 3)).view(-1, 2, 2, 1, 1)).sum(1)


def fused(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """Levels of a pyramid with a weight each (BiFPN)."""
    return (torch.stack([a, b], -1) * torch.tensor([0.25, 0.5])).sum(-1)


def magnitude(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """Both operands of the product are stacked."""
    both = torch.stack([a, b])
    return (both * both).sum(0, keepdim=True)


BRANCHES = (selective, split_attention, radix, fused, magnitude)


@pytest.mark.parametrize("branches", BRANCHES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_branches_are_weighed_and_added_one_by_one(
    branches: Callable[..., Tensor], dynamic: bool
) -> None:
    """No tensor joins them, no layer sums them up, and each has a scale of its own."""
    model = Function(branches)
    inputs = (torch.randn(IMAGE), 9 * torch.randn(IMAGE))
    dim = {0: torch.export.Dim("n", max=8)} if dynamic else {}
    graph = canonicalize(capture(model, inputs, dynamic_shapes=((dim, dim),)))
    for target in (aten.cat.default, aten.linear.default, aten.sum.dim_IntList):
        assert not calls(graph, target)
    assert len(calls(graph, aten.mul.Tensor)) == 2
    others = tuple(torch.randn(3, *IMAGE[1:]) for _ in inputs)
    for given in (inputs, others if dynamic else inputs):
        assert torch.equal(graph(*given), model(*given))  # a sum of two has one order


def test_weighed_branches_run_as_the_integer_reference_says() -> None:
    model = Function(lambda s, a, b: [f(s, a + a, b + b) for f in BRANCHES])
    inputs = (torch.randn(IMAGE), torch.randn(IMAGE))
    graph = quantized(model, inputs)
    program = cq.lower(graph, inputs)
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert not program.report.not_integer()
    reference = cq.integer_reference(graph)
    for given in stress([IMAGE, IMAGE]):
        for got, want in zip(program.run(*given), reference(*given), strict=True):
            assert differences(got, want) == []


def test_a_rule_for_products_holds_for_those_of_branches() -> None:
    captured = capture(Function(selective), (torch.randn(IMAGE), torch.randn(IMAGE)))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    plan = quantizer.set_operator_type(aten.mul.Tensor, None).plan(captured)
    (product,) = [op for op in plan.ops if op.family == "mul"]
    assert product.scheme is None
    assert [op.family for op in product.parts].count("mul") == 2
    assert all(op.scheme is None for op in product.parts)


@pytest.mark.parametrize("also", [lambda x: x, lambda x: x.sum(2), lambda x: x.sum((1, 2))])
def test_products_that_others_read_stay(also: Callable[[Tensor], Tensor]) -> None:
    def read(_self: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([a, b], 1) * a[:, None]
        return both.sum(1), also(both)

    graph = canonicalize(capture(Function(read), (torch.randn(IMAGE), torch.randn(IMAGE))))
    assert len(calls(graph, aten.mul.Tensor)) == 1


def unequal(_self: Any, a: Tensor, b: Tensor) -> Tensor:
    """Thirds of what was joined of other parts."""
    parts = torch.cat([a[:, :2], b[:, :1], b[:, :3]], 1)
    return parts.view(-1, 3, 2, *a.shape[2:]).sum(1)


@pytest.mark.parametrize(
    ("summed", "layers"),
    [
        (unequal, 0),
        (lambda _s, a, b: torch.stack([a, b, a], 1).sum(1), 0),
        (lambda _s, a, b: torch.stack([a, b, a, b], 1).sum(1), 1),  # too many roundings
        (lambda _s, a, b: (a - b).view(-1, 2, a.shape[1] // 2, *a.shape[2:]).sum(2), 0),
        (lambda _s, a, b: (a - b)[:, :2, 0].flatten(2).sum(1), 0),
        (lambda _s, a, b: (a - b)[:, :2, 0, :3].sum(1), 1),  # rows of three values
        (lambda _s, a, b: (a - b)[:, :2].sum(1), 1),  # channels of an image lie side by side
    ],
)
def test_which_sums_are_additions(summed: Callable[..., Tensor], layers: int) -> None:
    inputs = (torch.randn(IMAGE), torch.randn(IMAGE))
    graph = canonicalize(capture(Function(summed), inputs))
    found = [n for n in graph.graph.nodes if n.target in (aten.linear.default, aten.conv2d.default)]
    assert len(found) == layers
    torch.testing.assert_close(graph(*inputs), summed(None, *inputs))


# ---------------------------------------------------------------------------------------------
# Slices of what is joined
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "reads"),
    [
        (lambda y: y[:, :1], "x"),
        (lambda y: y[:, 1:], "x_1"),
        (lambda y: y[:, 2:4], "slice_1"),
        (lambda y: y[:, -1], "select"),
        (lambda y: y[:, 0], "select"),
        (lambda y: y.select(1, -6), "select"),
        (lambda y: y[:, :3], "cat"),  # some of both
        (lambda y: y[:, ::2], "cat"),
        (lambda y: y[:, :, :2], "cat"),
        (lambda y: y[:, 3:3], "cat"),
    ],
)
def test_what_is_cut_out_of_joined_tensors_is_cut_out_of_one(
    cut: Callable[[Tensor], Tensor], reads: str
) -> None:
    inputs = (torch.randn(2, 1, 4), torch.randn(2, 5, 4))
    model = Function(lambda _self, x, x_1: cut(torch.cat([x, x_1], 1)) + 0.0)
    graph = canonicalize(capture(model, inputs))
    assert torch.equal(graph(*inputs), model(*inputs))
    joined = calls(graph, aten.cat.default)
    assert bool(joined) == (reads == "cat")
    if reads.startswith("x"):  # the whole of a piece
        assert not calls(graph, aten.slice.Tensor)


FACTORS = {
    "nearest 1d, twice and a bit": ((1, 2, 10), 2.05, "nearest"),
    "nearest 1d, once and a bit": ((1, 2, 10), 1.05, "nearest"),
    "nearest 2d, three times and a bit": ((1, 2, 4, 4), 3.1, "nearest"),
    "nearest exact, three times and a bit": ((1, 2, 4, 4), 3.1, "nearest-exact"),
    "nearest 2d, half": ((1, 2, 6, 6), 0.52, "nearest"),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_that_is_not_the_ratio_of_the_sizes_is_followed(name: str) -> None:
    shape, factor, mode = FACTORS[name]
    model = Function(lambda _, x: F.interpolate(x, scale_factor=factor, mode=mode))
    x = torch.randn(shape)
    assert differences(canonicalize(capture(model, (x,)))(x), model(x)) == []


INFINITE = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0], [0.0, 3.0, 1.0]])
ODD: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "triangle of logarithms": (lambda x: torch.log(x).tril(), (INFINITE,)),
    "sums of logarithms": (lambda x: torch.log(x).cumsum(-1).exp(), (INFINITE,)),
    "what is no number": (
        lambda x: torch.where(torch.isnan(x), 0.0, x) * 2,
        (torch.log(INFINITE - 1),),
    ),
    "what is not finite": (
        lambda x: torch.where(x == -torch.inf, 0.0, x * 1.5),
        (torch.log(INFINITE),),
    ),
    "zero in any case": (lambda x: torch.where(x > 0, 0.0, 0.0) + x, (INFINITE,)),
    "masked scores that are read": (
        lambda x: (s := x + torch.full((3, 3), -torch.inf).triu(1), s.softmax(-1)),
        (INFINITE,),
    ),
    "einsum of a broadcast dim": (
        lambda x, y: torch.einsum("ijl,jlk->ik", x, y),
        (torch.randn(3, 4, 5), torch.randn(1, 5, 6)),
    ),
    "addcmul of integers": (
        lambda x, i: (torch.addcmul(i, i, i, value=2), x + 1),
        (INFINITE, torch.arange(4)),
    ),
    "slice of what was joined to integers": (
        lambda x, i: torch.cat([x, i], 1)[:, 3:],
        (INFINITE, torch.arange(6).reshape(3, 2)),
    ),
    "slice of what was joined to nothing": (
        lambda x: torch.cat([torch.empty(0), x * 2], 1)[:, :2],
        (INFINITE,),
    ),
    "products along a dim": (
        lambda x: (x.prod(1), x.prod(0, keepdim=True), x.prod(-1, dtype=torch.float64)),
        (INFINITE,),
    ),
    "sums with a factor": (
        lambda x, i: (
            torch.add(x, x.sin(), alpha=2) - torch.sub(x, i, alpha=0.5),
            torch.rsub(x, x.cos(), alpha=-1.5) + torch.rsub(x, 3.0, alpha=2),
            (torch.add(x, 3, alpha=2), torch.add(i, i, alpha=2)),
        ),
        (INFINITE, torch.arange(3)),
    ),
    "a product of nothing": (lambda x: (x[:, :0].prod(1), x + 1), (INFINITE,)),
    "logarithm of a sigmoid": (lambda x: F.logsigmoid(x * 30), (INFINITE,)),
    "infinities to numbers": (
        lambda x: (torch.nan_to_num(x.log()), torch.nan_to_num(x * 2, 1.0)),
        (INFINITE,),
    ),
    "variances": (
        lambda x: (x.var(1), x.var(), x.var((0, 1), correction=0), torch.var(x, 0, False)),
        (INFINITE,),
    ),
    "deviations": (
        lambda x: (x.std(-1, keepdim=True), x.std((0, 1)), torch.std(x, 0, False, True)),
        (INFINITE,),
    ),
    "variance of too few": (lambda x: (x.var(1, correction=3), x[:1].var(0)), (INFINITE,)),
    "mean of nothing": (lambda x: (x[:, :0].mean(1), x + 1), (INFINITE,)),
    "a whole tensor": (
        lambda x: (x.mean(), x.sum(), x.max(), x.min(), x.amax(), x.norm(), x.mean((0, 1))),
        (INFINITE,),
    ),
    "a whole row": (lambda x: (x[0].mean(), x[0].norm(), x[0].max(), x[0].sum(0)), (INFINITE,)),
    "the mean of one number": (lambda x: (x[0, 0].mean(), x.sum().max(), x + 1), (INFINITE,)),
    "a number along its dim": (
        lambda x: [
            reduced
            for number in (x.sum(), x.sum() * 2)
            for reduced in (number.sum(0), number.mean(-1, True), number.norm(2, 0), number.amax(0))
        ],
        (INFINITE,),
    ),
    "the variance of a number": (
        lambda x: (x[0, 0].var(0, correction=0), x[0, 0].std(-1), x + 1),
        (INFINITE,),
    ),
    "a norm along no dim": (lambda x: (torch.linalg.vector_norm(x, dim=[]), x + 1), (INFINITE,)),
    "pool to nothing": (
        lambda x: F.adaptive_avg_pool2d(x.reshape(1, 1, 3, 3), (0, 2)),
        (INFINITE,),
    ),
}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.unflatten(1, (2, 3)).prod(2),
        F.logsigmoid,
        torch.nan_to_num,
        lambda x: (x - x.mean()) * x.norm() / (x.max() - x.min()),
        lambda x: torch.add(x, torch.rsub(x.tanh(), 3.0, alpha=2), alpha=0.5),
    ],
)
def test_other_words_for_what_the_delegate_computes(function: Callable[[Tensor], Tensor]) -> None:
    model = Function(
        lambda s, x: s.second(function(s.first(x))),
        first=nn.Linear(4, 6),
        second=nn.LazyLinear(3),
    )
    x = torch.randn(5, 4)
    model(x)
    program = cq.lower(quantized(model, (x,)), (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())


@pytest.mark.parametrize("name", ODD)
def test_ops_with_odd_arguments_compute_what_they_did(name: str) -> None:
    function, inputs = ODD[name]
    model = Function(lambda _, *given: function(*given))
    want, got = model(*inputs), canonicalize(capture(model, inputs))(*inputs)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_mask_of_some_scores_is_still_finite_for_the_softmax() -> None:
    """Others read minus infinity."""
    function, inputs = ODD["masked scores that are read"]
    graph = canonicalize(capture(Function(lambda _, *given: function(*given)), inputs))
    (softmax,) = calls(graph, aten.softmax.int)
    mask = getattr(graph, softmax.args[0].args[1].target)
    assert float(mask.min()) == MASKED


def test_a_triangle_behind_a_division_by_a_number_is_a_product() -> None:
    model, x = Function(lambda _, x: (x / 3.0).tril()), torch.randn(2, 3, 3)
    graph = canonicalize(capture(model, (x,)))
    assert calls(graph, aten.tril.default) == []
    assert differences(graph(x), model(x)) == []


def test_a_box_is_pooled_over_the_channels_of_a_batch_of_any_size() -> None:
    """As LPRNet does: images go to a pool of boxes, which takes a batch of them for channels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool3d((2, 3, 3), stride=(2, 1, 2))).eval()
    sizes = torch.export.Dim("batch", min=1, max=8)
    two = torch.randn(2, 3, 6, 7)
    exported = torch.export.export(model, (two,), dynamic_shapes=({0: sizes},))
    result = cq.quantize(exported, (two,), [(two,)], progress=False)
    assert result.lowered is not None
    assert (result.lowered.report.delegates, result.lowered.report.outside) == (1, ())
    for batch in (1, 5):
        x = torch.randn(batch, 3, 6, 7)
        assert torch.equal(result.lowered.run(x), cq.integer_reference(result.converted)(x))


def test_the_sum_and_the_mean_of_a_number_are_the_number() -> None:
    model = Function(lambda _, x: x.sum().sum(0) * x.mean().mean(-1, True))
    graph = canonicalize(capture(model, (torch.randn(2, 3),)))
    # The runtime's kernels abort the process at a dim of a number.
    assert not [
        node for target in (aten.sum.dim_IntList, aten.mean.dim) for node in calls(graph, target)
    ]
