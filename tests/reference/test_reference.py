"""The integer reference in its three modes, over every op of the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.dispatched import Dispatched
from support.graphs import Function, capture, quantized
from support.models import convert
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.arithmetic import XnnpackArithmetic
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.ops import gemm
from custom_quantizer.ops.backend import get_mode
from custom_quantizer.ops.gemm import _accumulate
from custom_quantizer.reference.accumulators import mul_width
from custom_quantizer.reference.converted import read_converted

MODES = ("xnnpack", "fixed_point", "exact")


@pytest.mark.parametrize("farther", [1, -1], ids=["above zero", "below zero"])
@pytest.mark.parametrize(
    ("beyond", "dtype"), [(-1, torch.float32), (0, torch.float64), (1, torch.float64)]
)
def test_sums_are_exact_on_both_sides_of_float32(
    beyond: int, dtype: torch.dtype, farther: int
) -> None:
    """The largest sum of an op is ``2**24 + beyond``; ``2**24 + 1`` is no float32 number.

    It comes of the end of the input's range that is farther from zero.
    """
    layer = nn.Linear(3, 1)
    converted = convert(layer, (torch.tensor([[-1.0, 0.5, 2.0]]) * farther,))
    (op,) = read_converted(converted.graph).integer
    (qx,) = op.inputs
    weight = torch.tensor([[127, 100, 3]], dtype=torch.int8)
    data = torch.full((1, 3), -128, dtype=torch.int32)
    if qx.quant_max - qx.zero_point > qx.zero_point - qx.quant_min:
        data = -1 - data
    products = int(((data - qx.zero_point) * weight).sum())
    bias = (2**24 + beyond - abs(products)) * (1 if products > 0 else -1)
    op = dataclasses.replace(op, weight=weight, bias=torch.tensor([bias], dtype=torch.int32))
    acc = _accumulate(op, data, lambda x, w: x @ w.to(x.dtype).T)
    assert acc.dtype == dtype
    assert abs(int(acc)) == 2**24 + beyond


@pytest.mark.parametrize("mode", MODES)
def test_both_operands_of_a_product_are_centered(mode: str) -> None:
    """The planner gives the second one zero point 0, another quantizer may not."""
    shapes = ((2, 3, 5), (2, 5, 4))
    graph = quantized(
        Function(lambda s, a, b: torch.bmm(a, b)), tuple(torch.randn(s) for s in shapes)
    )
    (op,) = read_converted(graph).integer
    zero_points, ends = (3, -5), (-128, 127)
    left, right = (QParams(0.5, zero, *ends) for zero in zero_points)
    op = dataclasses.replace(op, inputs=(left, right), output=QParams(32.0, 0, *ends))
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int32) for shape in shapes)
    got = get_mode(mode).compute(op, [a, b])
    # Sums of products of steps of 0.25, in steps of 32.
    real = (a.double() - 3) @ (b.double() + 5) * 0.25 / 32.0
    apart = (got.double() - real.clamp(*ends)).abs().max()
    assert float(apart) <= 0.5


@pytest.mark.parametrize("mode", MODES)
def test_an_adaptive_pool_of_equal_windows_is_a_pool(mode: str) -> None:
    """Over the whole height, but not the whole width: no mean of the image."""
    x = torch.randn(2, 3, 4, 9)
    model = Function(
        lambda s, x: [F.adaptive_avg_pool2d(x * 2, (1, 3)) * 1.5, F.avg_pool2d(x * 2, (4, 3)) * 1.5]
    )
    adaptive, pooled = cq.integer_reference(quantized(model, (x,)), mode)(x)
    assert adaptive.shape == (2, 3, 1, 3)
    assert torch.equal(adaptive, pooled)


def test_reshapes_to_several_sizes_that_are_not_known() -> None:
    """What their arguments do not tell, the graph computes: here the batch, behind a view."""
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", max=16)}
    x = torch.randn(2, 3, 4, 4)

    def function(_s: Any, x: Tensor) -> list[Tensor]:
        y = x + x
        rows = y.transpose(1, 2).reshape(-1, 12)
        moved = (y.unsqueeze(1), rows.view(x.shape[0], x.shape[2], 3, 4), y.unflatten(3, (2, 2)))
        return [part * 1.5 for part in (y, *moved)]

    captured = capture(Function(function), (x,), dynamic_shapes=((sizes,),))
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    reference = cq.integer_reference(convert_pt2e(prepared))
    for batch, height in ((2, 4), (5, 3), (7, 16)):
        plain, *moved = reference(torch.randn(batch, 3, height, 4))
        assert torch.equal(moved[0], plain.unsqueeze(1))
        assert torch.equal(moved[1], plain.transpose(1, 2))
        assert torch.equal(moved[2], plain.unflatten(3, (2, 2)))


def test_a_mean_multiplies_in_the_order_of_the_runtime() -> None:
    """Found by search: every other order of the products gives another integer."""
    scale_in, scale_out = 0.046816930174827576, 0.031560592353343964
    given, wanted = (scale_in, -116), (scale_out, 14)
    model = Function(lambda s, x: x.mean((2, 3), keepdim=True))
    graph = quantized(model, (torch.randn(1, 1, 7, 7),))
    for node in graph.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            behind = node.args[0] if is_quantize(node) else node.args[0].args[0]
            grid = wanted if "mean" in behind.name else given
            node.args = (node.args[0], *grid, *node.args[3:])
    graph.recompile()
    stored = torch.tensor([-64.0] * 37 + [-63.0] * 12).reshape(1, 1, 7, 7)
    total = int(stored.sum())
    x = (stored + 116) * scale_in
    lowered = cq.lower(graph, (x,))
    got, reference = lowered.run(x), cq.integer_reference(graph)(x)
    assert torch.equal(got, reference)
    level = round(float(got) / scale_out) + 14

    one = np.float32(1)
    scales: dict[str, _Product] = {
        "as it is": lambda i, o, n: (i / o) * (one / n),
        "a quotient": lambda i, o, n: (i / o) / n,
        "count first": lambda i, o, n: (i * (one / n)) / o,
        "output and count first": lambda i, o, n: i / (o * n),
    }
    offsets: dict[str, _Product] = {
        "as it is": lambda n, z, s: (n * z) * s,
        "zero point and scale first": lambda n, z, s: n * (z * s),
        "count and scale first": lambda n, z, s: (n * s) * z,
    }
    levels = {
        (first, second): _mean_in_float32(total, *given, *wanted, scale=scale, shift=shift)
        for first, scale in scales.items()
        for second, shift in offsets.items()
        if "as it is" in (first, second)
    }
    assert levels.pop(("as it is", "as it is")) == level
    assert level not in levels.values()
    i, zero_in, o, zero_out = (np.float32(value) for value in (*given, *wanted))
    factor = scales["as it is"](i, o, np.float32(49))
    centered = (np.float32(total) - np.float32(49) * zero_in) * factor + zero_out
    assert int(np.rint(centered)) != level


_Product = Callable[[np.float32, np.float32, np.float32], np.float32]


def _mean_in_float32(
    total: int, *grids: float, scale: _Product, shift: _Product, count: int = 49
) -> int:
    scale_in, zero_in, scale_out, zero_out = map(np.float32, grids)
    number = np.float32(count)
    factor = scale(scale_in, scale_out, number)
    offset = zero_out - shift(number, zero_in, factor)
    return int(np.rint(np.float32(total) * factor + offset))


def test_what_is_divided_by_zero_is_stored_as_by_the_runtime() -> None:
    """At the ends of the range, and 0 / 0 at the upper one."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5]])
    calibration = (x, x.abs() + 1.0)  # where it would be an error
    graph = quantized(Function(lambda s, x, y: (x + x) / F.relu(y) * 2.0), calibration)
    given = (x, torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    got, integers = cq.integer_reference(graph).with_integers(*given)
    assert integers["div"][0, :3].tolist() == [127, -128, 127]
    assert torch.equal(cq.lower(graph, calibration).run(*given), got)
    for mode in MODES:
        _, integers = cq.integer_reference(graph, mode).with_integers(*given)
        assert integers["div"][0, :3].tolist() == [127, -128, 127], mode
    # Found by search: multiplied by the reciprocal, -128 / 127 would be -54 steps.
    (op,) = (op for op in read_converted(graph).integer if op.match.rule.family == "div")
    scales = (0.046286679804325104, 0.04351605474948883, 0.020038213580846786)
    left, right, output = (QParams(scale, 0, -128, 127) for scale in scales)
    op = dataclasses.replace(op, inputs=(left, right), output=output)
    assert get_mode("xnnpack").compute(op, [torch.tensor([-128]), torch.tensor([127])]) == -53


def test_what_a_changing_state_returned_stays_as_it_was() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("latest", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            self.latest.copy_(y)
            return y, self.latest

    x = torch.randn(2, 4)
    reference = cq.integer_reference(convert(Returns(), (x,)).graph)
    _, first = reference(x)
    kept = first.clone()
    _, second = reference(-x)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_fixed_point_sees_only_integer_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the borders no op of the reference is handed a floating-point tensor."""
    import custom_quantizer.reference.interpreter as reference

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    )
    example = (torch.randn(2, 3, 8, 8),)
    converted = convert(model, example)
    seen: list[str] = []
    compute = reference.IntegerReference._compute

    def spy(self, op, values):  # type: ignore[no-untyped-def]
        result = compute(self, op, values)
        given = [reference._integers(values[source]) for source in op.match.inputs]
        seen.extend(str(tensor.dtype) for tensor in (*given, result))
        return result

    monkeypatch.setattr(reference.IntegerReference, "_compute", spy)
    cq.integer_reference(converted.graph, "fixed_point")(*example)
    assert set(seen) == {"torch.int32"}
    assert len(seen) == 8


def test_a_constant_that_a_layer_reads_has_all_its_integers() -> None:
    """Bytes less a zero point are no bytes: a learned token that a recurrent layer reads."""
    token = nn.ParameterList([nn.Parameter(torch.linspace(-1.0, 1.3, 16).view(2, 1, 8))])
    model = Function(
        lambda s, h: s.layer(s.token[0], h[None])[1],
        layer=nn.GRU(8, 4, batch_first=True),
        token=token,
    )
    inputs = (torch.randn(2, 4),)
    graph = quantized(model, inputs)
    given = torch.randn(2, 4)
    reference = cq.integer_reference(graph)
    assert torch.equal(cq.lower(graph, inputs).run(given), reference(given))
    torch.testing.assert_close(reference(given), graph(given), rtol=0, atol=0.05)


def test_float_ops_are_listed_and_run() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.erf(self.a(x)))

    torch.manual_seed(0)
    example = (torch.randn(1, 3, 4, 4),)
    converted = convert(Net(), example)
    reference = cq.integer_reference(converted.graph)
    assert [op.node.name for op in reference.float_ops] == ["erf"]
    assert "no integer form" in reference.float_ops[0].reason
    step = (reference(*example) - converted.graph(*example)).abs().max()
    scale = next(
        n.args[1] for n in reversed(converted.graph.graph.nodes) if n.op == "call_function"
    )
    assert float(step) <= scale * 1.001


def test_wrong_graphs_and_modes() -> None:
    model = nn.Conv2d(3, 4, 1)
    example = (torch.randn(1, 3, 4, 4),)
    captured = torch.export.export(model.eval(), example).module()
    with pytest.raises(cq.ConversionError, match="no quantized tensor"):
        cq.integer_reference(captured)
    from torchao.quantization.pt2e import prepare_for_propagation_comparison
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    lifted = torch.export.export(convert(model, example).graph, example).graph_module
    with pytest.raises(cq.ConversionError, match=r"weights are inputs .*exported\.module\(\)"):
        cq.integer_reference(lifted)
    with pytest.raises(cq.ConversionError, match="still has observers"):
        cq.integer_reference(prepared)
    converted = convert(model, example)
    with pytest.raises(cq.ConversionError, match=r"has loggers .* hand in what convert_pt2e"):
        cq.integer_reference(prepare_for_propagation_comparison(converted.graph))
    with pytest.raises(cq.SchemeError, match="fixed_point"):
        cq.integer_reference(converted.graph, "fixed")
    with pytest.raises(cq.InputError, match="takes 1 input"):
        cq.integer_reference(converted.graph)(*example, *example)


@pytest.mark.parametrize("heavy", [0, -1])
def test_a_layer_that_is_taken_in_parts(heavy: int) -> None:
    """Large weights are read some rows at a time; the row that counts may be in any part."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 2048)
    with torch.no_grad():
        layer.weight[heavy] = 1.0
    x = torch.randn(3, 1024)
    graph = convert(nn.Sequential(layer), (x,)).graph
    (op,) = read_converted(graph).integer
    weight = cast(Tensor, op.weight).to(torch.int64)
    assert len(gemm._parts(weight)) > 1
    assert gemm._largest_row(op.match, op.weight) == int(weight.abs().sum(1).max()) == 1024 * 127
    assert cq.integer_reference(graph)(x).shape == (3, 2048)
    q = op.inputs[0]
    integers = XnnpackArithmetic().quantize(x, q)
    sums = (integers - q.zero_point).to(torch.int64) @ weight.T + cast(Tensor, op.bias)
    steps = cast(QParams, op.weight_qparams).scale * q.scale
    real = sums * cast(Tensor, steps)
    # One rounding to the output's grid.
    error = (cq.integer_reference(graph)(x) - real).abs().max()
    assert float(error) <= 0.5001 * cast(float, op.output.scale)


@pytest.mark.parametrize(
    ("ends", "zero_points", "width"),
    [
        ((-128, 127), (0, 0), 32),
        ((-32768, 32767), (0, 0), 32),
        ((-32768, 32767), (32767, 32767), 64),
        ((-32768, 32767), (-32768, -32768), 64),
        ((-32768, 32767), (32767, 0), 32),  # 65,535 * 32,768
    ],
)
def test_the_width_of_a_product(
    ends: tuple[int, int], zero_points: tuple[int, int], width: int
) -> None:
    inputs = tuple(QParams(0.5, zero, *ends) for zero in zero_points)
    assert mul_width(cast(Any, SimpleNamespace(inputs=inputs))) == width


def test_weights_are_not_held_in_four_times_their_bytes() -> None:
    """A constant that an op reads as an operand is an int32 tensor, as all integers between ops."""
    constant, x = torch.randn(1, 700), torch.randn(1, 800)
    model = Function(lambda s, x: s.layer(x) + s.constant, layer=nn.Linear(800, 700))
    model.constant = nn.Parameter(constant)
    graph = quantized(model, (x,))
    reference = cq.integer_reference(graph)
    with Dispatched() as run:
        result = reference(x)
    widened = [shape for dtype, shape in run.results if dtype is torch.int32]
    assert (1, 700) in widened
    assert (700, 800) not in widened
    assert torch.equal(result, cq.lower(graph, (x,)).run(x))


@pytest.mark.parametrize("bits", range(2, 17))
def test_the_bits_of_a_format(bits: int) -> None:
    half = 1 << (bits - 1)
    assert QParams(0.5, 0, -half, half - 1).bits == bits
    assert QParams(0.5, 0, 1 - half, half - 1).bits == bits
