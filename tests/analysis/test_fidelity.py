"""The prepared graph is the float model, and the SQNR of outputs is what rounding explains."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.flow import small_images, small_model, small_result
from support.graphs import Function, calls, capture
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.analysis import fidelity
from custom_quantizer.analysis.fidelity import FirstCalls, _Tolerance, check_calls
from custom_quantizer.analysis.rerun import Rerun, _dequantized, float_fingerprint
from custom_quantizer.core.checkpoint import fingerprint
from custom_quantizer.core.graph import constant_of
from custom_quantizer.core.noise import Noise, ratio_db
from custom_quantizer.errors import CalibrationError, InputError, VerificationError

aten = torch.ops.aten
IMAGES = small_images(4)


def prepared_small() -> tuple[GraphModule, GraphModule]:
    """The captured graph of the small classifier, and that prepared and calibrated."""
    captured = capture(small_model(), (IMAGES,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    cq.calibrate(prepared, [IMAGES], progress=False)
    return captured, prepared


def prepared_function(function: Callable[..., Any], x: Tensor) -> tuple[GraphModule, GraphModule]:
    captured = capture(Function(function, layer=nn.Linear(x.shape[-1], 5)), (x,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    return captured, prepared


# -- before any rounding ---------------------------------------------------------------------


def parameter(prepared: GraphModule, target: Any, place: int, which: int = 0) -> Tensor:
    """Weight (1) or bias (2) of a call, behind its observer."""
    node = calls(prepared, target)[which].args[place]
    read = node.args[0] if node.op == "call_module" else node
    return constant_of(prepared, read)


def test_the_graph_is_the_model() -> None:
    captured, prepared = prepared_small()
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    code = prepared.code
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    assert checked.samples == 4
    # Nothing noticed: observers saw no value twice.
    assert prepared.code == code
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("model", ["module", "exported", "captured"])
def test_every_form_of_the_model(model: str) -> None:
    captured, prepared = prepared_small()
    forms: dict[str, Any] = {
        "module": small_model().train(),  # a copy in eval mode is compared
        "exported": torch.export.export(small_model(), (IMAGES,)),
        "captured": captured,
    }
    assert cq.check_prepared(prepared, forms[model], IMAGES).samples == 4


def wrong_weight(prepared: GraphModule) -> None:
    weight = parameter(prepared, aten.conv2d.default, 1)
    weight[1, 0, 1, 1] += 1e-3 * weight.abs().max()


def wrong_channel(prepared: GraphModule) -> None:
    parameter(prepared, aten.conv2d.default, 1, which=1)[0] *= 1.001


def wrong_bias(prepared: GraphModule) -> None:
    bias = parameter(prepared, aten.linear.default, 2)
    bias[0] += 1e-3 * bias.abs().max()


def no_relu(prepared: GraphModule) -> None:
    node = calls(prepared, aten.relu.default)[1]
    node.target = aten.neg.default
    prepared.recompile()


@pytest.mark.parametrize(
    ("sabotage", "where"),
    [
        (wrong_weight, r"conv2d \(conv\)"),
        (wrong_channel, r"conv2d_1 \(wide\)"),
        (wrong_bias, r"linear \(linear\)"),
        (no_relu, r"relu_1"),
    ],
)
def test_the_first_op_that_differs_is_named(
    sabotage: Callable[[GraphModule], None], where: str
) -> None:
    captured, prepared = prepared_small()
    with torch.no_grad():
        sabotage(prepared)
    with pytest.raises(VerificationError, match=where + ".*before any rounding"):
        cq.check_prepared(prepared, captured, [IMAGES])


def test_another_model_is_noticed() -> None:
    _, prepared = prepared_small()
    other = small_model()
    with torch.no_grad():
        other.norm.running_var *= 1.01
    with pytest.raises(VerificationError, match=r"conv2d \(conv\)"):
        cq.check_prepared(prepared, other, [IMAGES])


def test_quantize_refuses_a_graph_that_is_not_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from custom_quantizer.ops.rewrites import canonical

    monkeypatch.setattr(canonical, "fold_factors", wrong_first_constant)
    with pytest.raises(VerificationError, match="before any rounding"):
        cq.quantize(small_model(), (IMAGES,), IMAGES, lower=False, progress=False)


def wrong_first_constant(model: GraphModule, *, training: bool) -> int:
    """A rewrite that errs."""
    with torch.no_grad():
        parameter(model, aten.conv2d.default, 1)[0] *= 1.01
    return 0


def test_float_rounding_is_no_difference() -> None:
    """Sums in another order, of values that cancel: nearly all of the result is rounding error."""

    def forward(self: Function, x: Tensor) -> Tensor:
        big = self.layer(x) + 1e6
        return (big - 1e6).mean(-1, keepdim=True)

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    captured, prepared = prepared_function(forward, x)
    cq.check_prepared(prepared, captured, [x])


def test_ops_that_jump_may_take_another_step() -> None:
    def forward(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return torch.floor(y * 1e4) / 1e4, y.argmax(-1)

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    captured, prepared = prepared_function(forward, x)
    cq.check_prepared(prepared, captured, [x])
    with torch.no_grad():
        parameter(prepared, aten.linear.default, 1).mul_(-1)
    with pytest.raises(VerificationError, match="linear"):
        cq.check_prepared(prepared, captured, [x])


def test_random_numbers_are_the_same_in_both() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x[..., :5])

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    captured, prepared = prepared_function(forward, x)
    state = torch.random.get_rng_state()
    cq.check_prepared(prepared, captured, [x])
    assert torch.equal(torch.random.get_rng_state(), state)


class Counts(nn.Module):
    """Adds what it has seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.mean(0))
        result: Tensor = self.layer(x) + self.total
        return result


def test_state_begins_as_captured_and_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    captured = capture(Counts(), (x,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    for _ in range(3):
        prepared(x)  # a plain loop leaves its state in the buffer
    before = prepared.total.clone()
    cq.check_prepared(prepared, captured, [x])
    assert torch.equal(prepared.total, before)
    assert not captured.total.any()


def test_calls_are_compared_one_after_the_other_where_they_write_state() -> None:
    """A state that is taken for what it was at capture is right in the first call."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    captured = capture(Counts(), (x,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    cq.calibrate(prepared, [x], progress=False)
    cq.check_prepared(prepared, captured, [x])
    (write,) = calls(prepared, aten.add_.Tensor)
    with prepared.graph.inserting_before(write):
        fresh = prepared.graph.call_function(aten.mul.Tensor, (write.args[0], 0.0))
        lost = prepared.graph.call_function(aten.add.Tensor, (fresh, write.args[1]))
    write.replace_all_uses_with(lost)
    prepared.recompile()
    with pytest.raises(VerificationError, match=r"buffers that calls write.* in call 2"):
        cq.check_prepared(prepared, captured, [x])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_are_not_finite_are_left_out(value: float) -> None:
    def forward(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x.masked_fill(x > 1, value)

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    captured = capture(Function(forward, layer=nn.Linear(8, 5)), (x,))
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.linear.default, "a8w8")
    prepared = prepare_pt2e(copy.deepcopy(captured), quantizer)
    prepared(x)
    compared = cq.check_prepared(prepared, captured, [x]).compare(convert_pt2e(prepared))
    assert 30 < compared.outputs[0].sqnr < 80
    assert compared.outputs[1].sqnr == math.inf


def test_an_op_without_float64() -> None:
    """Where the exact result is not known, the bound is that of as many roundings."""

    def forward(self: Function, x: Tensor) -> Tensor:
        return self.layer(x) + x.view(torch.int32)[..., :5] * 0.0

    torch.manual_seed(0)
    x = torch.randn(3, 8)
    captured = capture(Function(forward, layer=nn.Linear(8, 5)), (x,))
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.linear.default, "a8w8")
    prepared = prepare_pt2e(copy.deepcopy(captured), quantizer)
    prepared(x)
    cq.check_prepared(prepared, captured, [x])
    with torch.no_grad():
        parameter(prepared, aten.linear.default, 1)[0, 0] += 1e-3
    with pytest.raises(VerificationError, match="linear"):
        cq.check_prepared(prepared, captured, [x])


def test_qat_before_it_is_trained() -> None:
    captured = capture(small_model(), (IMAGES,))
    prepared = prepare_qat_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a4w4"))
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    prepared(IMAGES)
    (output,) = checked.compare(convert_pt2e(prepared)).outputs
    assert output.rounding_sqnr is None
    assert output.sqnr < 30


# -- what a user may do wrong ----------------------------------------------------------------


def test_wrong_arguments() -> None:
    captured, prepared = prepared_small()
    with pytest.raises(InputError, match="samples=0"):
        cq.check_prepared(prepared, captured, [IMAGES], samples=0)
    with pytest.raises(InputError, match=r"fewer samples than a batch of the graph, which is 4"):
        cq.check_prepared(prepared, captured, [IMAGES[:2]])
    with pytest.raises(CalibrationError, match="not str"):
        cq.check_prepared(prepared, captured, "images")
    with pytest.raises(CalibrationError, match="float32 of shape"):
        cq.check_prepared(prepared, captured, [torch.zeros(4, 2)])
    with pytest.raises(InputError, match="the float graph has observers"):
        cq.check_prepared(prepared, copy.deepcopy(prepared), [IMAGES])
    training = torch.export.export(small_model().train(), (IMAGES,)).module()
    with pytest.raises(InputError, match="the float model is in training mode"):
        cq.check_prepared(prepared, training, [IMAGES])
    learns = prepare_qat_pt2e(copy.deepcopy(training), cq.IntegerQuantizer().set_global("a8w8"))
    with pytest.raises(InputError, match="the prepared graph is in training mode"):
        cq.check_prepared(learns, captured, [IMAGES])
    converted = small_result().converted
    two = capture(Function(lambda _self, x: (x, x)), (IMAGES,))
    with pytest.raises(VerificationError, match=r"outputs"):
        cq.check_prepared(prepared, two, [IMAGES])
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    checked.compare(converted)


# -- after conversion ------------------------------------------------------------------------


def test_rounding_explains_what_is_lost() -> None:
    found = small_result().fidelity
    (output,) = found.outputs
    assert (output.index, output.name, found.bits, found.warnings) == (0, "linear", 8, ())
    # The extremes of the calibration data are the ends of the ranges: nothing is cut off.
    assert output.rounding_sqnr is not None
    assert abs(output.sqnr - output.rounding_sqnr) < 1
    assert 30 < output.sqnr < 60


def test_the_ratio_is_that_of_the_outputs() -> None:
    captured, prepared = prepared_small()
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    converted = convert_pt2e(prepared)
    want, got = captured(IMAGES).double(), converted(IMAGES).double()
    exact = 10 * math.log10(float(want.square().sum() / (want - got).square().sum()))
    assert checked.compare(converted).outputs[0].sqnr == pytest.approx(exact, abs=1e-9)


def test_a_layer_on_its_grid_has_no_error() -> None:
    """Weights, inputs and outputs that are integers of the grid: rounding changes nothing."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([127.0, 127.0, 127.0, 127.0])) / 127)
    x = torch.tensor([[-128.0, 127.0, 3.0, -5.0], [0.0, 1.0, 2.0, 64.0]])
    captured = capture(layer, (x,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    (output,) = cq.check_prepared(prepared, captured, [x]).compare(convert_pt2e(prepared)).outputs
    assert (output.sqnr, output.rounding_sqnr) == (math.inf, math.inf)
    assert "without limit" in str(output)


def test_saturation_is_told_from_rounding() -> None:
    captured = capture(small_model(), (IMAGES,))
    prepared = prepare_pt2e(copy.deepcopy(captured), cq.IntegerQuantizer().set_global("a8w8"))
    prepared(IMAGES * 0.05)  # not what the model is used on
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    found = checked.compare(convert_pt2e(prepared))
    (warning,) = found.warnings
    assert "lost to something other than rounding" in warning
    assert "calibrate with data like that" in warning


def test_a_wrong_weight_in_the_converted_graph_is_not_rounding() -> None:
    captured, prepared = prepared_small()
    checked = cq.check_prepared(prepared, captured, [IMAGES])
    converted = convert_pt2e(prepared)
    name = next(n for n, b in converted.named_buffers() if "wide" in n and "weight_integers" in n)
    converted.get_buffer(name).neg_()
    assert len(checked.compare(converted).warnings) == 1


def test_a_signal_below_the_step_of_a_sum() -> None:
    """Around 1,000 the step is about 8, so rounding alone leaves nothing of the layer's result."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    captured, prepared = prepared_function(lambda self, x: self.layer(x) + 1e3 - 1e3, x)
    found = cq.check_prepared(prepared, captured, [x]).compare(convert_pt2e(prepared))
    assert found.outputs[0].sqnr < 6
    (warning,) = found.warnings
    assert "little is left of the signal, even for 8 bits" in warning


def test_the_record() -> None:
    found = small_result().fidelity
    document = json.loads(found.to_json())
    assert document == json.loads(small_result().to_json())["fidelity"]
    assert document["outputs"] == [
        {
            "index": 0,
            "name": "linear",
            "sqnr": found.outputs[0].sqnr,
            "rounding_sqnr": found.outputs[0].rounding_sqnr,
            "lost": 0,
        }
    ]
    assert str(found).startswith("output 0 (linear): SQNR ")


def test_outputs_that_are_integers_have_no_ratio() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    captured, prepared = prepared_function(
        lambda self, x: (self.layer(x).argmax(-1), self.layer(x)), x
    )
    found = cq.check_prepared(prepared, captured, [x]).compare(convert_pt2e(prepared))
    assert [output.index for output in found.outputs] == [1]


# -- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "samples", "kept"),
    [([3, 3, 3], 8, [3, 3, 2]), ([20], 8, [8]), ([2], 8, [2]), ([7, 9], 8, [7, 2])],
)
def test_the_first_calls_are_kept(sizes: list[int], samples: int, kept: list[int]) -> None:
    """Batches of one stay out: some graphs take a size of one for a constant."""
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 6)
    captured = torch.export.export(nn.Linear(6, 3), (x,), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    batches = [torch.randn(size, 6) for size in sizes]
    with FirstCalls(prepared, samples) as first:
        for given in batches:
            prepared(given)
    prepared(batches[0])
    assert [len(call[0]) for call in first.calls] == kept
    for given, (got,) in zip(batches, first.calls, strict=False):
        assert torch.equal(got, given[: len(got)])
    for given, (got,), outputs in zip(batches, first.calls, first.outputs, strict=False):
        if len(got) < len(given):  # other samples may be multiplied in another order
            assert outputs is None
        else:
            assert outputs is not None
            assert torch.equal(outputs[0], prepared(given))
    assert len(first.outputs) == len(first.calls)


def test_outputs_that_depend_on_calls_before_are_not_kept() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.layer(x) * self.calls

    x = torch.randn(2, 4)
    prepared = prepare_pt2e(capture(Counts(), (x,)), cq.IntegerQuantizer().set_global("a8w8"))
    with FirstCalls(prepared) as first:
        prepared(x)
    assert first.outputs == [None]


def test_what_calibration_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is not near enough, as with random numbers: then with those of the model."""
    captured, prepared = prepared_small()
    ran: list[GraphModule] = []

    class Counted(fidelity.Rerun):
        def outputs(self, values: list[Any]) -> list[Any]:
            ran.append(self.module)
            return super().outputs(values)

    monkeypatch.setattr(fidelity, "Rerun", Counted)
    known = [prepared(IMAGES)]
    checked = check_calls(prepared, captured, [[IMAGES]], [known])
    assert ran == [captured, prepared]  # the prepared graph on its grids
    for wrong in ([known[0] * 1.01], [known[0][:, :2]], [], None):
        ran.clear()
        again = check_calls(prepared, captured, [[IMAGES]], [wrong])
        assert ran == [captured, prepared, prepared]
        assert torch.equal(again.exact[0][0], checked.exact[0][0])


def test_the_fingerprint_is_of_what_is_computed() -> None:
    x = torch.randn(2, 4)

    def graph(factor: float = 2.0, op: Any = torch.relu, weight: float = 0.0) -> GraphModule:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight[0, 0] += weight
        return capture(Function(lambda m, x: op(m.layer(x)) * factor, layer=layer), (x,))

    plain = float_fingerprint(graph())
    assert plain == float_fingerprint(graph())
    others = {
        float_fingerprint(other)
        for other in (graph(factor=2.5), graph(op=torch.sigmoid), graph(weight=1e-3))
    }
    assert len({plain, *others}) == 4
    prepared = prepare_pt2e(graph(), cq.IntegerQuantizer().set_global("a8w8"))
    wide = prepare_pt2e(graph(), cq.IntegerQuantizer().set_global("a16w4"))
    assert float_fingerprint(prepared) == float_fingerprint(wide)
    with torch.no_grad():
        wide.get_parameter("layer.bias")[0] += 1e-6
    assert float_fingerprint(prepared) != float_fingerprint(wide)


def test_noise() -> None:
    noise = Noise()
    noise.add(torch.tensor([3.0, 4.0, torch.nan]), torch.tensor([3.0, 3.0, 1.0]))
    assert (noise.signal, noise.error) == (25.0, 1.0)
    noise.add(torch.tensor([5.0]), torch.tensor([5.0]))
    assert noise.ratio == pytest.approx(10 * math.log10(50))
    assert ratio_db(1.0, 0.0) == math.inf
    assert ratio_db(0.0, 1.0) == -math.inf
    noise.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, torch.inf, torch.nan]))
    assert (noise.lost, noise.ratio) == (2, -math.inf)
    assert ratio_db(1.0, math.nan) == -math.inf
    resized = Noise()
    resized.add(torch.tensor([[3.0, torch.nan]]), torch.tensor([[3.0]]))  # a size that was rounded
    assert (resized.signal, resized.lost, resized.ratio) == (9.0, 0, -math.inf)


def test_values_that_are_no_longer_finite_are_reported() -> None:
    """Small divisors are rounded to zero: infinite where the float model is not."""
    x = torch.linspace(-1.0, 1.0, 64).reshape(8, 8)
    captured, prepared = prepared_function(lambda self, x: torch.log((x * 2.0) * (x * 2.0)), x)
    found = cq.check_prepared(prepared, captured, [x]).compare(convert_pt2e(prepared))
    (output,) = found.outputs
    assert (output.sqnr, output.rounding_sqnr) == (-math.inf, None)
    assert output.lost > 0
    (warning,) = found.warnings
    assert f"{output.lost} of its values are not finite" in warning
    # Null would be an output without any error.
    assert json.loads(found.to_json())["outputs"][0]["sqnr"] == -999.0


def test_the_margins_are_those_of_the_docstring() -> None:
    """Thresholds, from both sides."""

    def warned(sqnr: float, rounding: float, bits: int = 8) -> bool:
        output = fidelity.OutputFidelity(0, "linear", sqnr, rounding)
        return bool(fidelity.Fidelity(1, (output,), bits).warnings)

    assert not warned(25.0, 35.0)
    assert warned(24.9, 35.0)
    assert not warned(12.0, 12.0)
    assert warned(11.9, 12.0)
    assert not warned(6.0, 6.0, bits=4)
    assert warned(5.9, 6.0, bits=4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_is_near_without_float64_is_near_with_it(scale: float) -> None:
    """The short way accepts nothing that the rule refuses, wherever float64 may be."""
    tolerance = _Tolerance(capture(nn.Linear(4, 4), (torch.zeros(1, 4),)))
    accepted = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)

        def noise(size: float, generator: torch.Generator = generator) -> Tensor:
            return size * torch.randn(50, dtype=torch.float64, generator=generator)

        exact = noise(scale)
        sizes = scale * 10.0 ** -torch.randint(2, 9, (2,), generator=generator).double()
        plain = (exact + noise(float(sizes[0]))).float()
        got = (plain.double() + noise(float(sizes[1]))).float()
        if tolerance.is_near(plain, got):
            accepted += 1
            assert tolerance.difference(plain, exact, got) is None
    assert 50 < accepted < 250


def test_float64_is_computed_only_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(fidelity, "rerun_in_float64", lambda *args: asked.append(args))
    x = torch.randn(2, 4)
    captured = capture(nn.Linear(4, 4), (x,))
    prepared = copy.deepcopy(captured)
    check_calls(prepared, captured, [[x]])
    assert not asked
    with torch.no_grad():
        prepared.get_parameter("weight").mul_(1.01)
    with pytest.raises(VerificationError, match="before any rounding"):
        check_calls(prepared, captured, [[x]])
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_a_fingerprint_of_one_number_that_was_expanded(dtype: torch.dtype) -> None:
    """Its stride is 0."""
    expanded = torch.ones((), dtype=dtype).expand(1)
    assert expanded.stride() == (0,)
    assert fingerprint([expanded]) == fingerprint([torch.ones(1, dtype=dtype)])
    assert fingerprint([expanded]) != fingerprint([torch.zeros(1, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 2, 2), 0), ((4, 3), 1), ((7,), 0)])
@pytest.mark.parametrize("zero_points", ["zeros", "none", "others"])
def test_weights_are_dequantized_to_the_bits_of_pytorch(
    dtype: torch.dtype, shape: tuple[int, ...], axis: int, zero_points: str
) -> None:
    info = torch.iinfo(dtype)
    stored = torch.randint(info.min, info.max, shape, dtype=dtype)
    scales = torch.rand(shape[axis]) + 1e-6
    zeros = torch.zeros(shape[axis], dtype=torch.int64)
    given = {"zeros": zeros, "none": None, "others": zeros + 3}[zero_points]
    args = (stored, scales, given, axis, info.min, info.max, dtype)
    quick = _dequantized(*args)
    if zero_points == "others":
        assert quick is None
    else:
        wanted = torch.ops.quantized_decomposed.dequantize_per_channel(*args)
        assert quick is not None
        assert quick.dtype is wanted.dtype
        assert torch.equal(quick, wanted)
        assert torch.equal(_dequantized(*args, out_dtype=torch.float32), wanted)
    assert _dequantized(*args, out_dtype=torch.bfloat16) is None
    assert _dequantized(stored, scales.double(), *args[2:]) is None


def test_a_converted_graph_computes_the_same_bits_when_it_is_run_again() -> None:
    _, prepared = prepared_small()
    converted = convert_pt2e(prepared)
    (again,) = Rerun(converted, weights={}).outputs([IMAGES])
    assert torch.equal(again, converted(IMAGES))
