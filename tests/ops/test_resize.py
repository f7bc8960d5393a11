"""Resizing by interpolation: integers that are the same on every CPU, or float."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.contracts import IntegerContract
from support.graphs import Function, Inputs, differences, lower_sabotaged, quantized, stress
from support.models import convert
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import checks, kernels, read_program
from custom_quantizer.backends.xnnpack.arithmetic import (
    XNNPACK,
    float_resize_error,
    xnnpack_positions,
)
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.exact import EXACT
from custom_quantizer.core.fixed_point import FIXED_POINT
from custom_quantizer.core.graph import is_quantize
from custom_quantizer.core.resizing import Resizing
from custom_quantizer.errors import ConversionError, InputError, SchemeError, VerificationError
from custom_quantizer.planning.plan import OpPlan
from custom_quantizer.reference.converted import read_converted

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
    assert xnnpack_positions(aligned, fused=False) != aligned.positions()
    for size in (1, 7, 14, 28, 56, 112, 224):
        for factor in (1, 2, 4, 8, 16, 32):
            for resizing in (Resizing(size, size * factor), Resizing(size * factor, size)):
                for f in (True, False):
                    assert xnnpack_positions(resizing, fused=f) == resizing.positions()


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
        assert int((FIXED_POINT.interpolate(x, q, rows, columns) - exact).abs().max()) <= 1
        assert int((XNNPACK.interpolate(x, q, rows, columns) - exact).abs().max()) <= 1
        assert exact.shape == (2, out, size)


def test_an_image_of_another_size_is_refused() -> None:
    x = torch.zeros(2, 4, 5, dtype=torch.int8)
    with pytest.raises(InputError, match=r"4 x 4 pixels is to be resized.*\(2, 4, 5\)"):
        XNNPACK.interpolate(x, INT8, Resizing(4, 8), Resizing(4, 8))


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


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


@pytest.mark.slow
def test_a_dynamic_batch_is_one_delegate() -> None:
    """Upstream's partitioner leaves such a resize out; its sizes are static, and that will do."""
    model = Function(
        lambda s, x: [twice(s.layer(x)), twice(s.layer(x)) + 1.0], layer=nn.Conv2d(3, 4, 1)
    )
    example = (torch.randn(2, 3, 6, 5),)
    batch = torch.export.Dim("batch", min=1, max=5)
    graph = convert(model, example, dynamic_shapes=(({0: batch},),)).graph
    program = cq.lower(graph, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    checked = cq.verify(graph, program, [(torch.randn(n, 3, 6, 5),) for n in (1, 5, 3)])
    assert checked.as_derived, str(checked)
    assert checked.outputs[1].mismatches == 0


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


# ---------------------------------------------------------------------------------------------
# What only float outputs of a model show
# ---------------------------------------------------------------------------------------------

SHOWN = "only float outputs of the model show it"
RULE = "upsample_bilinear2d.vec"


def planned(
    function: Callable[..., Any], quantizer: cq.IntegerQuantizer | None = None
) -> list[OpPlan]:
    """What the plan says of the resizes of a layer's result."""
    model = Function(function, layer=nn.Conv2d(3, 4, 1), other=nn.Conv2d(4, 2, 1))
    quantizer = (quantizer or cq.IntegerQuantizer()).set_global("a8w8")
    plan = quantizer.plan(torch.export.export(model.eval(), (torch.randn(1, 3, 6, 5),)).module())
    return [op for op in plan.ops if op.family == "upsample_bilinear2d"]


FLOAT_ENDS: dict[str, Callable[..., Any]] = {
    "returned": lambda s, x: twice(s.layer(x)),
    "moved": lambda s, x: twice(s.layer(x)).permute(0, 2, 3, 1).flatten(1, 2)[:, 1:],
    "split": lambda s, x: twice(s.layer(x)).split([1, 3], 1),
    "pooled": lambda s, x: F.max_pool2d(twice(s.layer(x)), 2),
    "returned twice": lambda s, x: (twice(s.layer(x)),) * 2,
    "beside integers": lambda s, x: (lambda y: [twice(y), s.other(y)])(s.layer(x)),
}
INTEGER_ENDS: dict[str, Callable[..., Any]] = {
    "read by a layer": lambda s, x: s.other(twice(s.layer(x))),
    "returned and read": lambda s, x: (lambda y: [y, s.other(y)])(twice(s.layer(x))),
    "joined": lambda s, x: torch.cat([twice(s.layer(x)), s.layer(twice(x))], 1),
    "made smaller": lambda s, x: F.interpolate(s.layer(x), size=(5, 5), mode="bilinear"),
    "read by a float op": lambda s, x: torch.sin(twice(s.layer(x))),
}


@pytest.mark.parametrize("name", FLOAT_ENDS)
def test_what_only_float_outputs_show_is_enlarged_in_float(name: str) -> None:
    (op,) = planned(FLOAT_ENDS[name])
    assert (op.scheme, op.placement) == (None, "float inside")
    assert op.reason.startswith(f"{SHOWN}: XNNPACK enlarges"), op.reason


@pytest.mark.parametrize("name", INTEGER_ENDS)
def test_what_others_read_stays_integers(name: str) -> None:
    op = planned(INTEGER_ENDS[name])[0]
    assert (op.scheme, op.placement) == ("a8", "integer kernel")


@pytest.mark.parametrize("options", [{"mode": "bicubic"}, {"mode": "bilinear", "antialias": True}])
def test_what_became_layers_is_enlarged_in_float(options: dict[str, Any]) -> None:
    """All of its layers, or none: where others read it, it is made smaller, or a rule names it."""

    def schemes(function: Callable[..., Any], rule: bool = False, backend: Any = "xnnpack") -> Any:
        quantizer = cq.IntegerQuantizer(backend=backend).set_global("a8w8")
        model = Function(function, layer=nn.Conv2d(3, 4, 1), other=nn.Conv2d(4, 2, 1))
        graph = torch.export.export(model.eval(), (torch.randn(1, 3, 6, 5),)).module()
        (name,) = (node.name for node in graph.graph.nodes if "upsample" in node.name)
        if rule:
            quantizer.set_node_name(name, "a8w8")
        op = quantizer.plan(graph).op(name)
        return op.scheme, op.reason.startswith(f"{SHOWN}: each of the layers")

    def resized(s: Any, x: Tensor, size: tuple[int, int] = (9, 10)) -> Tensor:
        return F.interpolate(s.layer(x), size=size, **options)

    assert schemes(resized) == (None, True)
    assert schemes(resized, rule=True) == ("a8w8", False)
    assert schemes(resized, backend=None) == ("a8w8", False)
    assert schemes(resized, backend="tosa") == ("a8w8", False)
    assert schemes(lambda s, x: s.other(resized(s, x))) == ("a8w8", False)
    assert schemes(lambda s, x: resized(s, x, (9, 4))) == ("a8w8", False)


@pytest.mark.parametrize("size", [(12, 10), (9, 10)])
def test_details_are_added_to_an_enlarged_image_in_float(size: tuple[int, int]) -> None:
    """Where only float outputs show the sum: networks that add details to a bicubic image."""

    def plan(function: Callable[..., Any], ask: Any = lambda q: q) -> dict[str, str | None]:
        model = Function(function, layer=nn.Conv2d(3, 3, 1), other=nn.Conv2d(3, 2, 1))
        exported = torch.export.export(model.eval(), (torch.randn(1, 3, 6, 5),))
        quantizer = cq.IntegerQuantizer().set_global("a8w8")
        ask(quantizer)
        ops = quantizer.plan(exported).ops
        return {op.node: op.scheme for op in ops if op.node in ("add", "sub", "upsample_bicubic2d")}

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, size=size, mode="bicubic")

    def detailed(s: Any, x: Tensor) -> Tensor:
        details = F.interpolate(s.layer(x), size=size)
        return cast(Tensor, details + enlarged(x))

    in_float = {"add": None, "upsample_bicubic2d": None}
    integers = dict.fromkeys(in_float, "a8w8")
    assert plan(detailed) == in_float
    assert plan(lambda s, x: detailed(s, x).clamp(0, 1)) == in_float
    assert plan(lambda s, x: s.other(detailed(s, x))) == integers
    assert plan(lambda s, x: (lambda y: (y + 1, s.other(y)))(enlarged(x))) == integers
    assert plan(detailed, lambda q: q.set_node_name("add", "a8w8")) == integers
    assert plan(detailed, lambda q: q.set_node_name("upsample_bicubic2d", "a8w8")) == integers
    assert plan(detailed, lambda q: q.set_io(outputs="a8")) == integers


def test_a_second_resize_moves_floats() -> None:
    first, second = planned(lambda s, x: twice(twice(s.layer(x))))
    assert first.reason.startswith(SHOWN)
    assert second.reason == "moves values of a float tensor"


ASKED: dict[str, Callable[[cq.IntegerQuantizer], object]] = {
    "its name": lambda q: q.set_node_name("upsample_bilinear2d", "a8w8"),
    "its type": lambda q: q.set_operator_type(aten.upsample_bilinear2d.vec, "a8w8"),
    "the type of its module": lambda q: q.set_module_type(Function, "a8w8"),
    "what moves it": lambda q: q.set_node_name("permute", "a8w8"),
    "rounded outputs": lambda q: q.set_io(outputs="a8"),
    "integer outputs": lambda q: q.set_io(integer=True),
}


@pytest.mark.parametrize("name", ASKED)
def test_rules_and_integer_outputs_win(name: str) -> None:
    quantizer = cq.IntegerQuantizer()
    ASKED[name](quantizer)
    (op,) = planned(lambda s, x: twice(s.layer(x)).permute(0, 2, 3, 1), quantizer)
    assert (op.scheme, op.placement) == ("a8", "integer kernel")


def test_a_rule_for_float_gives_its_own_reason() -> None:
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.upsample_bilinear2d.vec, None)
    (op,) = planned(FLOAT_ENDS["returned"], quantizer)
    assert (op.scheme, op.reason) == (None, f'set_operator_type("aten.{RULE}", None)')


@pytest.mark.parametrize(("backend", "kernel"), [(None, "integer"), ("tosa", "integer")])
def test_backends_without_a_say_keep_integers(backend: str | None, kernel: str) -> None:
    (op,) = planned(FLOAT_ENDS["returned"], cq.IntegerQuantizer(backend))
    assert op.scheme is not None
    assert op.placement == "integer kernel"


ENDS = (
    lambda x: twice(x),
    lambda x: F.interpolate(x, size=(31, 17), mode="bilinear", align_corners=True).mT,
    lambda x: twice(twice(x)).flatten(2)[..., 3:],
    lambda x: F.interpolate(x, size=(223, 4), mode="bilinear"),
    lambda x: F.pad(twice(x), (1, 2)),
    lambda x: F.interpolate(x.flatten(2), scale_factor=4.0, mode="linear"),
)


@cache
def ends() -> tuple[GraphModule, cq.LoweredProgram, Inputs]:
    """A layer's result, enlarged in several ways, and another layer behind it."""
    torch.manual_seed(0)
    model = Function(
        lambda s, x: (lambda y: [*(end(y) for end in ENDS), s.other(y)])(s.layer(x)),
        layer=nn.Conv2d(3, 5, 1),
        other=nn.Conv2d(5, 2, 1),
    )
    example = (torch.randn(1, 3, 28, 3),)
    graph = quantized(model, example)
    return graph, cq.lower(graph, example), example


def test_floats_at_the_end_are_one_delegate_and_say_why() -> None:
    _, program, _ = ends()
    assert (program.report.delegates, program.report.outside) == (1, ())
    (first, *_) = program.report.not_integer()
    assert first.backend is kernels.FLOAT
    assert first.reason.startswith("its result is used in float: XNNPACK enlarges"), first.reason


def test_they_are_as_near_to_the_reference_as_derived() -> None:
    graph, program, (x,) = ends()
    checked = cq.verify(graph, program, stress([tuple(x.shape)]))
    assert not checked.exact_expected
    assert not checked.bit_exact
    assert checked.as_derived
    assert checked.first is None
    assert "; 0 by more than" in str(checked)
    *shown, layer = checked.outputs
    for output in shown:
        assert output.bound is not None
        assert 0 < output.max_abs <= output.bound, output
    assert (layer.bound, layer.mismatches) == (0.0, 0)
    # A tenth of a step: an integer that is off by one is far beyond it.
    step = float(next(n for n in graph.graph.nodes if is_quantize(n.prev)).args[1])
    assert max(cast(float, output.bound) for output in shown[:3]) < step / 10


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "out"),
    [((1, 1), (4, 3)), ((28, 4), (223, 5)), ((7, 131), (60, 500)), ((9, 9), (9, 70))],
)
def test_a_resize_in_float32_is_within_its_share_of_the_bound(
    size: tuple[int, int], out: tuple[int, int], align_corners: bool
) -> None:
    """Both resizes of the bound, PyTorch's and XNNPACK's formulas, against float64."""
    rows, columns = (Resizing(s, o, align_corners) for s, o in zip(size, out, strict=True))
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).sign()
    real = F.interpolate(x.double(), size=out, mode="bilinear", align_corners=align_corners)
    rounded = F.interpolate(x, size=out, mode="bilinear", align_corners=align_corners)
    bound = float_resize_error(rows, columns, 1.0)
    assert float((rounded.double() - real).abs().max()) <= bound / 2
    assert bound == (14 * sum(size) + 19) * 2.0**-24


def test_another_resize_than_the_graph_says_is_noticed() -> None:
    """A smooth image, off by less than what other float ops are allowed."""
    x = torch.linspace(1.0, 2.0, 48).reshape(1, 1, 48, 1).expand(1, 3, 48, 4).contiguous()
    graph = quantized(Function(lambda s, x: twice(s.layer(x)), layer=nn.Conv2d(3, 4, 1)), (x,))
    want = cq.integer_reference(graph)(x)

    def change(resize: Node) -> None:
        resize.args = (resize.args[0], [96, 8], True, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "output_bounds", lambda _program, _graph: (None,))
        wrong = lower_sabotaged(graph, x, change, RULE)
    assert 0 < checks.relative_error(want, wrong.run(x)) < checks.FLOAT_TOLERANCE
    with pytest.raises(
        VerificationError, match=r"output 0: \d+ of 3072 values .* the float ops at its end account"
    ):
        lower_sabotaged(graph, x, change, RULE)
    checked = cq.verify(graph, wrong, [(x,)])
    assert not checked.as_derived
    assert checked.outputs[0].beyond > 0
    assert checked.first is not None


def test_what_is_joined_in_float_is_bounded_by_its_pieces() -> None:
    """Moves alone are exact; a resize among them is as far off as it would be alone."""
    torch.manual_seed(0)
    x, layer = torch.randn(1, 3, 6, 5), nn.Conv2d(3, 4, 1)

    def bounds(function: Callable[..., Any]) -> tuple[float | None, ...]:
        graph = quantized(Function(function, layer=layer), (x,))
        return checks.output_bounds(cq.lower(graph, (x,)), read_converted(graph))

    def joined(resize: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def function(s: Any, x: Tensor) -> Tensor:
            p = s.layer(x).sigmoid()
            return torch.cat(
                [resize(s.layer(x)).flatten(1), (p * 640.0).flatten(1), p.flatten(1)], 1
            )

        return function

    assert bounds(joined(lambda y: y)) == (0.0,)
    alone = bounds(lambda s, x: twice(s.layer(x)))
    assert bounds(joined(twice)) == alone != (0.0,)


NO_ENDS: dict[str, Callable[..., Any]] = {
    "before": lambda s, x: twice(s.layer(torch.sin(x))),
    "of another kind": lambda s, x: torch.sin(s.layer(x)),
    "before integers": lambda s, x: (lambda y: [y, s.other(y)])(twice(s.layer(x))),
}


@pytest.mark.parametrize("name", NO_ENDS)
def test_other_float_ops_leave_no_bound(name: str) -> None:
    x = torch.randn(1, 3, 6, 5)
    model = Function(NO_ENDS[name], layer=nn.Conv2d(3, 4, 1), other=nn.Conv2d(4, 2, 1))
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    graph = quantized(model, (x,), quantizer.set_operator_type(aten.upsample_bilinear2d.vec, None))
    program = cq.lower(graph, (x,))
    assert set(checks.output_bounds(program, read_converted(graph))) == {None}


def test_integers_alone_refuse_it_and_say_what_to_do(tmp_path: Path) -> None:
    graph, *_ = ends()
    with pytest.raises(ConversionError, match=r"backend=None.*upsample_bilinear2d: its result is"):
        cq.save_integers(graph, tmp_path / "net")
