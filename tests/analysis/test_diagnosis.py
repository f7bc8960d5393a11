from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.flow import Small, small_images, small_model, small_result
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.analysis.diagnosis import Diagnosis, diagnose
from custom_quantizer.calibration.run import calibrate
from custom_quantizer.core.graph import qparams_of
from custom_quantizer.errors import CalibrationError, CaptureError, ConversionError, InputError
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference import integer_reference
from custom_quantizer.reference.converted import read_converted

# The graph dequantizes in float32, a diagnosis in float64: a value differs by 2**-24 of its
# magnitude, which at these ratios is far below a thousandth of a dB.
DECIBELS = 1e-3

BATCH = torch.export.Dim("batch", min=1, max=64)


def ratio(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.detach().double(), other.detach().double()
    return 10 * math.log10(float((exact**2).sum() / ((exact - other) ** 2).sum()))


def converted_of(
    model: nn.Module, calibration: Tensor, quantizer: IntegerQuantizer | None = None
) -> GraphModule:
    """Converted with a dynamic batch."""
    program = torch.export.export(model.eval(), (calibration[:2],), dynamic_shapes=({0: BATCH},))
    quantizer = quantizer or IntegerQuantizer().set_global("a8w8")
    prepared = prepare_pt2e(program.module(), quantizer)
    calibrate(prepared, calibration)
    return cast(GraphModule, convert_pt2e(prepared))


class Sums(nn.Module):
    """Two tensors of unequal ratios, added in both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        return a + b, b + a


def test_the_worst_of_two_inputs_counts() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    model = Sums()
    diagnosis = diagnose(model, converted_of(model, x), x)
    ratios = [diagnosis[name].sqnr for name in ("linear", "linear_1")]
    assert abs(ratios[0] - ratios[1]) > 0.1
    assert diagnosis["add"].inputs_sqnr == min(ratios)
    assert diagnosis["add_1"].inputs_sqnr == min(ratios)


def test_one_layer_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x = torch.randn(40, 5)
    converted = converted_of(model, x)
    diagnosis = diagnose(model, converted, x)
    assert [tensor.name for tensor in diagnosis.tensors] == ["input_1", "linear"]
    with torch.no_grad():
        expected = ratio(model(x), converted(x))
    assert diagnosis["linear"].sqnr == pytest.approx(expected, abs=DECIBELS)
    assert diagnosis.outputs[0].sqnr == pytest.approx(expected, abs=DECIBELS)
    # Alone: its own weight, bias and output, but the input as it is.
    (op,) = read_converted(converted).integer
    assert op.weight is not None
    assert op.weight_qparams is not None
    assert op.bias is not None
    scale = cast(Tensor, op.weight_qparams.scale)
    weight = op.weight * scale[:, None]
    bias = op.bias.double() * op.inputs[0].scale * scale.double()
    y = nn.functional.linear(x.double(), weight.double(), bias)
    q = op.output
    integers = torch.round(y / q.scale + q.zero_point).clamp(q.quant_min, q.quant_max)
    expected = ratio(model(x), (integers - q.zero_point) * q.scale)
    assert diagnosis["linear"].alone == pytest.approx(expected, abs=0.05)  # ties may round apart
    assert diagnosis["linear"].inputs_sqnr == diagnosis["input_1"].sqnr
    assert diagnosis["linear"].drop == diagnosis["input_1"].sqnr - diagnosis["linear"].sqnr
    (row,) = diagnosis.weights
    assert row.sqnr == pytest.approx(ratio(model.weight.detach(), weight), abs=DECIBELS)
    by_channel = [ratio(model.weight.detach()[c], weight[c]) for c in range(3)]
    assert row.worst_channel_sqnr == pytest.approx(min(by_channel), abs=DECIBELS)
    assert row.worst_channel == by_channel.index(min(by_channel))
    assert (row.bits, row.levels, row.granularity) == (8, 255, "per_channel")
    assert row.used_levels == len(set(op.weight.flatten().tolist()))


class Indices(nn.Module):
    """Returns the place of the largest before the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y.argmax(1), y


def test_outputs_are_counted_from_the_first_of_any_kind() -> None:
    torch.manual_seed(0)
    model, x = Indices(), torch.randn(16, 5)
    (output,) = diagnose(model, converted_of(model, x), x).outputs
    assert output.index == 1


def test_headroom_and_accumulators() -> None:
    result = small_result()
    diagnosis = diagnose(result.exported, result.converted, small_images(8))
    ops = read_converted(result.converted).integer
    assert [op.bias is not None for op in ops].count(True) == 3
    for op in ops:
        row = diagnosis[op.output_node.name]
        assert row.family == op.match.rule.family
        if op.bias is None:
            assert row.bias_headroom is None
            continue
        largest = int(op.bias.abs().max())
        assert row.bias_headroom is not None
        assert 2 ** (31 - row.bias_headroom) > largest >= 2 ** (30 - row.bias_headroom)
        assert row.accumulator_bits is not None
        assert row.accumulator_bits > largest.bit_length()


def test_raised_channels_are_counted() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.fill_(1e-6)
        model.bias.fill_(1.0)
        model.weight[0] = 1.0
    x = torch.randn(32, 4)
    assert diagnose(model, converted_of(model, x), x)["linear"].raised_channels == 2


@pytest.mark.parametrize("size", [1, 4, 7, 32])
def test_batches_do_not_matter(size: int) -> None:
    """The graph takes 4 at a time; counts are equal, ratios up to the order of float sums."""
    result = small_result()
    images = small_images(32)
    whole = diagnose(result.exported, result.converted, images)
    parts = diagnose(result.exported, result.converted, images.split(size))
    assert parts.samples == whole.samples == 32
    for one, other in zip(parts.tensors, whole.tensors, strict=True):
        assert one.sqnr == pytest.approx(other.sqnr, rel=1e-9)
        assert one.used_levels == other.used_levels
        assert (one.clipped_low, one.clipped_high) == (other.clipped_low, other.clipped_high)
    assert parts.weights == whole.weights


def test_every_form_of_the_model_is_the_same_model() -> None:
    result = small_result()
    images = small_images(8)
    program = torch.export.export(small_model(), (small_images(4),))
    graph_before = str(result.exported.graph)
    forms = (result.exported, program, small_model())
    first, *others = (diagnose(form, result.converted, images) for form in forms)
    assert all(other == first for other in others)
    # Batch norm is folded for the comparison, not in what was handed in.
    assert str(result.exported.graph) == graph_before
    assert first["relu"].family == "conv"


def test_clipped_values_and_unused_levels() -> None:
    # Calibrated on [-1, 1]: 256 levels, the zero of which is exact.
    calibration = torch.linspace(-1, 1, 64).reshape(16, 4)
    model = nn.Linear(4, 2)
    converted = converted_of(model, calibration)
    quantize = next(n for n in converted.graph.nodes if "quantize_per_tensor" in str(n.target))
    q = qparams_of(converted, quantize)
    levels = torch.tensor([-128, -100, 0, 50])
    inside = ((levels - q.zero_point) * q.scale).repeat(10, 1)
    inside[:3, 0], inside[0, 3] = -5.0, 7.0
    row = diagnose(model, converted, inside.float()).tensors[0]
    assert (row.clipped_low, row.clipped_high) == (3 / 40, 1 / 40)
    assert row.clipped == 4 / 40
    # -128, -100, 0, 50 and, cut off, 127.
    assert (row.used_levels, row.levels, row.unused_low, row.unused_high) == (5, 256, 0, 0)
    row = diagnose(model, converted, inside.float()[3:]).tensors[0]
    assert (row.used_levels, row.unused_low, row.unused_high) == (4, 0, 77)
    assert row.dead == 77 / 256


def test_a_fused_relu_is_no_clipping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(64, 8)
    row = diagnose(model, converted_of(model, x), x)["relu"]
    assert (row.clipped_low, row.unused_low) == (0.0, 0)


def test_the_coarsest_op_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(64, 8)
    quantizer = IntegerQuantizer().set_global("a8w8").set_module_name("2", "a8w4")
    diagnosis = diagnose(model, converted_of(model, x, quantizer), x)
    assert diagnosis.worst is not None
    assert diagnosis.worst.path == "3"  # the ReLU of the second layer
    assert diagnosis.ranked()[0] is diagnosis.worst
    assert "relu_1 (3) loses most" in str(diagnosis)
    # Every later op has the noise of that one, but adds little itself.
    last = diagnosis["linear_2"]
    assert last.alone is not None
    assert diagnosis.worst.alone is not None
    assert last.alone > diagnosis.worst.alone + 10
    assert last.sqnr < diagnosis.worst.alone + 6


@pytest.mark.parametrize("scheme", ["a16w8", "a8w4", "a4w4"])
def test_other_widths(scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Small(), small_images(32)
    diagnosis = diagnose(model, converted_of(model, x, IntegerQuantizer().set_global(scheme)), x)
    bits = int(scheme[1:].split("w")[0])
    assert {row.bits for row in diagnosis.tensors} == {bits}
    assert all(row.used_levels is not None for row in diagnosis.tensors)
    assert all(row.levels == 2**bits for row in diagnosis.tensors if bits < 16)
    json.loads(diagnosis.to_json())


@pytest.mark.parametrize(
    ("scheme", "granularity", "levels"),
    [("dyn8w8", "per_channel", 255), ("dyn8w4g32", "per_group", 15)],
)
def test_activations_quantized_at_run_time_have_weights_only(
    scheme: str, granularity: str, levels: int
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 8), torch.randn(16, 64)
    program = torch.export.export(model, (x,))
    prepared = prepare_pt2e(program.module(), IntegerQuantizer().set_global(scheme))
    prepared(x)
    converted = cast(GraphModule, convert_pt2e(prepared))
    diagnosis = diagnose(model, converted, x)
    assert diagnosis.tensors == ()
    (row,) = diagnosis.weights
    assert row.granularity == granularity
    assert row.levels == levels
    assert 10 < row.sqnr < 50
    with torch.no_grad():
        expected = ratio(model(x), integer_reference(converted)(x))
    assert diagnosis.outputs[0].sqnr == pytest.approx(expected, abs=DECIBELS)


def test_an_exact_weight_has_no_ratio() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[127.0, 1.0], [-127.0, 64.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    diagnosis = diagnose(model, converted_of(model, x), x)
    assert diagnosis.weights[0].sqnr == math.inf
    assert json.loads(diagnosis.to_json())["weights"][0]["sqnr"] is None
    assert "exact" in str(diagnosis)


class Residual(nn.Module):
    """One tensor with two users, an input used twice, a float op in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        y = y + self.b(y)
        return y + y, torch.exp(self.b(x))


def test_branches_shared_weights_and_float_ops() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(32, 4)
    converted = converted_of(model, x)
    diagnosis = diagnose(model, converted, x)
    names = [row.name for row in diagnosis.tensors]
    assert len(names) == len(set(names))
    assert {"add", "add_1", "linear_1"} <= set(names)
    with torch.no_grad():
        for i, (exact, other) in enumerate(zip(model(x), converted(x), strict=True)):
            expected = ratio(exact, other)
            assert diagnosis.outputs[i].sqnr == pytest.approx(expected, abs=DECIBELS)


class Chain(nn.Module):
    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.b(x if self.parallel else y)


def test_equal_names_are_not_enough() -> None:
    x = torch.randn(8, 4)
    converted = converted_of(Chain(parallel=True), x)
    with pytest.raises(ConversionError, match=r"linear_1 \(b\) .* is not in the float model"):
        diagnose(Chain(parallel=False), converted, x)


def test_json_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = small_result()
    diagnosis = diagnose(result.exported, result.converted, small_images(8))
    document = json.loads(diagnosis.to_json())
    assert (document["kind"], document["schema_version"]) == ("diagnosis", 1)
    assert document["samples"] == 8
    assert [row["name"] for row in document["tensors"]] == [row.name for row in diagnosis.tensors]
    assert document["worst"] == cast(Any, diagnosis.worst).name
    lines = str(diagnosis).splitlines()
    assert lines[0] == "8 samples; SQNR in dB"
    assert lines[2].split()[:4] == ["tensor", "op", "bits", "SQNR"]
    diagnosis.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"custom-quantizer\[plot\]"):
        diagnosis.plot(tmp_path / "other.png")
    with pytest.raises(InputError, match="no quantized tensor 'x2'; there are x, "):
        diagnosis["x2"]


def test_limit() -> None:
    result = small_result()
    assert diagnose(result.exported, result.converted, small_images(32), limit=12).samples == 12
    with pytest.raises(InputError, match="at least one sample"):
        diagnose(result.exported, result.converted, small_images(4), limit=0)


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).flatten(1)[:, :3]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (Other(), small_images(4), ConversionError, "is not in the float model"),
        (Branch(), small_images(4), CaptureError, "cannot capture Branch"),
        (small_model(), [], InputError, "holds no sample"),
        (small_model(), small_images(3), InputError, "3 samples, but .* batches of 4"),
        (small_model(), [torch.zeros(4, 2, 8, 8)], CalibrationError, "batch 0: input x"),
    ],
)
def test_errors(model: nn.Module, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose(model, small_result().converted, data)


def test_a_float_graph_is_refused() -> None:
    result = small_result()
    with pytest.raises(ConversionError, match="no quantized tensor"):
        diagnose(result.exported, result.exported, small_images(4))


def test_an_empty_diagnosis_has_no_worst_op() -> None:
    assert Diagnosis(1, (), (), ()).worst is None


def test_layers_quantized_at_run_time_have_the_scales_of_the_device() -> None:
    """PyTorch's own call of the graph has one scale for rows that differ by a factor of 1,000."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(8, 16)
    x[::2] *= 1000.0
    graph = converted_of(model, x, IntegerQuantizer().set_global("dyn8w8"))
    (output,) = diagnose(model, graph, [x]).outputs
    found = integer_reference(graph)(x)
    assert output.sqnr == pytest.approx(ratio(model(x), found), abs=DECIBELS)
    assert abs(output.sqnr - ratio(model(x), graph(x))) > 0.1
