"""Resizing by interpolation: integers that are the same on every CPU, or float."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.contracts import IntegerContract
from support.graphs import Function, differences, quantized, stress
from torch import Tensor

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels, read_program
from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK, xnnpack_positions
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.exact import EXACT
from custom_quantizer.core.fixed_point import FIXED_POINT
from custom_quantizer.core.resizing import Resizing
from custom_quantizer.errors import InputError, SchemeError

aten = torch.ops.aten
INT8 = QParams(0.0625, 3, -128, 127)


class TestContract(IntegerContract):
    together = True
    families = ("upsample_bilinear2d",)


# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "out"), [(5, 13), (13, 5), (1, 4), (4, 1), (7, 7), (8, 16)])
def test_positions_are_those_of_pytorch(size: int, out: int, align_corners: bool) -> None:
    """A ramp, interpolated, tells where a pixel was taken from."""
    ramp = torch.arange(size, dtype=torch.float64).reshape(1, 1, size, 1)
    sizes = [out, 1]
    taken = F.interpolate(ramp, size=sizes, mode="bilinear", align_corners=align_corners)
    places = Resizing(size, out, align_corners).places
    assert all(isinstance(place, Fraction) for place in places)
    torch.testing.assert_close(
        torch.tensor([float(place) for place in places], dtype=torch.float64),
        taken.flatten(),
        rtol=0.0,
        atol=1e-12,
    )


def test_positions_that_cpus_differ_in_are_known() -> None:
    """Rounding once or twice matters from 28 to 223 pixels, and next to a tie from 42 to 96."""
    fused, rounded_twice = (xnnpack_positions(Resizing(28, 223), fused=f) for f in (True, False))
    assert fused != rounded_twice
    aligned = Resizing(42, 96, align_corners=True)
    assert xnnpack_positions(aligned, fused=False) != aligned.positions
    for size in (1, 7, 14, 28, 56, 112, 224):
        for factor in (1, 2, 4, 8, 16, 32):
            for resizing in (Resizing(size, size * factor), Resizing(size * factor, size)):
                for f in (True, False):
                    assert xnnpack_positions(resizing, fused=f) == resizing.positions


def test_a_size_is_one_at_least() -> None:
    with pytest.raises(SchemeError, match="sizes of at least 1, got 4 and 0"):
        Resizing(4, 0)


# ---------------------------------------------------------------------------------------------
# Integers
# ---------------------------------------------------------------------------------------------


def test_a_value_halfway_between_two_goes_up() -> None:
    x = torch.tensor([[0, 1], [0, 1]], dtype=torch.int8)
    rows, columns = Resizing(2, 1), Resizing(2, 1)
    assert FIXED_POINT.interpolate(x, INT8, rows, columns).tolist() == [[1]]
    assert FIXED_POINT.interpolate(-x, INT8, rows, columns).tolist() == [[0]]
    # Half to even counts from the zero point, which is 3.
    assert EXACT.interpolate(x, INT8, rows, columns).tolist() == [[1]]
    assert EXACT.interpolate(-x, INT8, rows, columns).tolist() == [[-1]]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_integers_are_within_one_of_the_exact_ones(bits: int) -> None:
    q = QParams(0.0625, 0 if bits > 8 else 3, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    generator = torch.Generator().manual_seed(0)
    for size, out, align_corners in ((5, 12, False), (9, 4, False), (6, 17, True)):
        rows, columns = Resizing(size, out, align_corners), Resizing(out, size, align_corners)
        x = torch.randint(q.quant_min, q.quant_max + 1, (2, size, out), generator=generator)
        exact = EXACT.interpolate(x, q, rows, columns)
        # 11 bits of a position leave 2**-12 of the distance between two neighbours.
        most = 1 if bits <= 8 else 1 + 2 ** (bits - 11)
        assert int((FIXED_POINT.interpolate(x, q, rows, columns) - exact).abs().max()) <= most
        assert int((XNNPACK.interpolate(x, q, rows, columns) - exact).abs().max()) <= 1
        assert exact.shape == (2, out, size)


def test_an_image_of_another_size_is_refused() -> None:
    x = torch.zeros(2, 4, 5, dtype=torch.int8)
    with pytest.raises(InputError, match=r"4 x 4 pixels is to be resized.*\(2, 4, 5\)"):
        XNNPACK.interpolate(x, INT8, Resizing(4, 8), Resizing(4, 8))


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------


def resized(cases: list[dict[str, Any]]) -> Any:
    """Sums of an image, resized in several ways side by side."""
    return Function(
        lambda _self, x: [F.interpolate(x + x, mode="bilinear", **case) + 1.0 for case in cases]
    )


def program_of(cases: list[dict[str, Any]], shape: tuple[int, ...]) -> tuple[Any, Any]:
    x = torch.randn(shape)
    graph = quantized(resized(cases), (x,))
    return graph, cq.lower(graph, (x,))


def random_sizes(count: int, seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(seed)
    return [
        {
            "size": (chosen.randint(1, 40), chosen.randint(1, 40)),
            "align_corners": chosen.random() < 0.5,
        }
        for _ in range(count)
    ]


def assert_equal(graph: Any, program: Any, shape: tuple[int, ...]) -> None:
    reference = cq.integer_reference(graph)
    for given in stress([shape]):
        for got, want in zip(program.run(*given), reference(*given), strict=True):
            assert differences(got, want) == []


@pytest.mark.parametrize(
    ("seed", "shape"),
    [
        (0, (2, 19, 9, 14)),
        *(
            pytest.param(seed, shape, marks=pytest.mark.slow)
            for seed, shape in enumerate(
                [(1, 1, 3, 3), (3, 7, 31, 2), (1, 16, 17, 23), (1, 35, 20, 20), (2, 8, 1, 37)], 1
            )
        ),
    ],
)
def test_random_sizes_run_as_the_reference_says(seed: int, shape: tuple[int, ...]) -> None:
    graph, program = program_of(random_sizes(12, seed), shape)
    assert program.report.fully_delegated
    resizes = [op for op in program.report.ops if op.family == "upsample_bilinear2d"]
    assert len(resizes) >= 10
    assert {op.backend for op in resizes} == {kernels.INT8}
    assert_equal(graph, program, shape)


def test_what_cpus_differ_in_is_float_inside_the_delegate() -> None:
    model = Function(lambda _self, x: F.interpolate(x + x, size=(223, 4), mode="bilinear") + 1.0)
    x = torch.randn(1, 3, 28, 2)
    program = cq.lower(quantized(model, (x,)), (x,))
    (row,) = program.report.not_integer()
    assert row.backend is kernels.FLOAT
    assert "from 28 to 223 pixels" in row.reason
    assert program.report.fully_delegated


def test_a_factor_that_is_not_the_ratio_of_the_sizes_is_followed() -> None:
    """XNNPACK steps by the ratio: 7 to 9 pixels here, where PyTorch steps by 1 / 1.3."""
    shape = (1, 3, 7, 7)
    graph, program = program_of([{"scale_factor": 1.3}], shape)
    assert program.report.fully_delegated
    assert_equal(graph, program, shape)
    x = torch.rand(shape)
    want = F.interpolate(x + x, scale_factor=1.3, mode="bilinear") + 1.0
    step = 4 / 255
    assert float((program.run(x)[0] - want).abs().max()) < 4 * step


RESIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "linear": ((2, 3, 7), {"mode": "linear", "scale_factor": 2.0}),
    "linear by a factor": ((2, 3, 7), {"mode": "linear", "scale_factor": 1.7}),
    "trilinear": ((1, 3, 4, 5, 3), {"mode": "trilinear", "size": (6, 3, 5)}),
    "bicubic": ((1, 3, 6, 5), {"mode": "bicubic", "scale_factor": 2.0}),
    "bicubic, corners": ((1, 3, 6, 5), {"mode": "bicubic", "size": (9, 4), "align_corners": True}),
    "antialiased": ((1, 3, 8, 9), {"mode": "bilinear", "size": (3, 4), "antialias": True}),
    "bicubic antialiased": ((1, 3, 8, 9), {"mode": "bicubic", "size": (3, 9), "antialias": True}),
}


def test_other_resizes_are_layers_in_one_delegate() -> None:
    cases = list(RESIZES.values())
    shapes = [shape for shape, _ in cases]
    model = Function(
        lambda _self, *images: [
            F.interpolate(x + x, **kwargs) + 1.0
            for x, (_, kwargs) in zip(images, cases, strict=True)
        ]
    )
    inputs = tuple(torch.rand(shape) for shape in shapes)
    graph = quantized(model, inputs)
    program = cq.lower(graph, inputs)
    assert program.report.not_integer() == ()
    assert len(read_program(program.buffer).delegates) == 1
    reference = cq.integer_reference(graph)
    for given in stress(shapes):
        for name, got, want in zip(RESIZES, program.run(*given), reference(*given), strict=True):
            assert differences(got, want) == [], name
    for name, got, want in zip(RESIZES, program.run(*inputs), model(*inputs), strict=True):
        assert float((got - want).norm() / want.norm()) < 0.01, name


def test_an_antialiased_image_of_width_1_is_left_to_pytorch() -> None:
    """PyTorch makes three equal pixels of it, whatever they were; that is not for us to mend."""
    x = torch.arange(6.0).reshape(1, 1, 6, 1)
    made: Tensor = F.interpolate(x, size=(3, 1), mode="bilinear", antialias=True)
    assert np.ptp(made.numpy()) == 0.0
