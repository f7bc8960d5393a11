"""Every width of activations and weights, on every kind of weighted op, in the real runtime."""

from __future__ import annotations

import operator
from functools import cache
from pathlib import Path

import pytest
import torch
from support.cifar_models import resnet20
from support.models import Converted, convert, randomize_batch_norms, torchvision_model
from support.registry import Surrounded
from support.selection import slow_but
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.ops import REGISTRY
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR
from custom_quantizer.reference.verifying import output_scales

GEMMS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets


class WeightedOps(nn.Module):
    """One layer of each kind, each with its own input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.transposed = nn.ConvTranspose2d(6, 10, 3, stride=2)
        self.linear = nn.Linear(24, 10)

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return self.conv(a), self.depthwise(b), self.transposed(c), self.linear(d)


def weighted_inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    image = (2, 6, 8, 7)
    return tuple(
        torch.randn(shape, generator=generator) for shape in (image, image, image, (5, 24))
    )


ACTIVATIONS, WEIGHTS = (4, 6, 8, 16), (2, 4, 6, 8, 16)
GRID = [
    f"a{a}w{w}{granularity}"
    for a in ACTIVATIONS
    for w in WEIGHTS
    for granularity in ("", "-per_tensor")
]
# By default int8 with narrow weights, both narrow, and both wide; a8w8 is in every other test.
QUICK = {"a8w4", "a6w2-per_tensor", "a16w16"}
SCHEMES = slow_but(QUICK, GRID)


@cache
def made(name: str) -> tuple[Converted, cq.LoweredProgram]:
    torch.manual_seed(0)
    example = weighted_inputs(0)
    converted = convert(WeightedOps(), example, name)
    return converted, cq.lower(converted.graph, example)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_width_lowers_and_agrees_with_the_converted_graph(name: str) -> None:
    converted, lowered = made(name)
    scheme = cq.scheme(name)

    assert lowered.report.fully_delegated, str(lowered.report)
    for node in converted.graph.graph.nodes:
        if node.target not in GEMMS:
            continue
        data, weight, bias = node.args[:3]
        integers = operator.attrgetter(bias.args[0].target)(converted.graph)
        assert integers.dtype == torch.int32
        scale_w, scale_b = weight.args[1], bias.args[1]
        if not isinstance(scale_w, float):
            scale_w = operator.attrgetter(scale_w.target)(converted.graph)
            scale_b = operator.attrgetter(scale_b.target)(converted.graph)
        expected = torch.tensor(data.args[1], dtype=torch.float32) * torch.as_tensor(scale_w)
        assert torch.equal(torch.as_tensor(scale_b, dtype=torch.float32), expected)
        stored = operator.attrgetter(weight.args[0].target)(converted.graph)
        assert int(stored.abs().max()) == scheme.weight.format.quant_max

    scales = output_scales(converted.graph)
    for seed in range(5):
        inputs = weighted_inputs(seed)
        for got, want, scale in zip(
            lowered.run(*inputs), converted.graph(*inputs), scales, strict=True
        ):
            # One op deep, both sides round the same real number, each with an error far below
            # half a unit (docs/device_arithmetic.md derives it): they meet or are neighbours.
            steps = torch.round((got - want).abs() / scale)
            assert int(steps.max()) <= 1
            limit = scheme.activation.format
            integers = torch.round(got / scale)
            assert int(integers.max() - integers.min()) <= limit.quant_max - limit.quant_min


@pytest.mark.parametrize("name", SCHEMES)
def test_plan_predicts_the_backend(name: str) -> None:
    converted, lowered = made(name)
    actual = {op.node: op.backend.label for op in lowered.report.ops}
    assert {op.node: op.backend for op in converted.plan.quantized} == actual


PREDICTED = [
    pytest.param(rule, case, name, id=f"{rule.family}-{case.name}-{name}", marks=pytest.mark.slow)
    for rule in REGISTRY
    for case in rule.cases
    for name in ("a8w8", "a8w4", "a4w8", "a16w8")
    if rule.integers is not None
]


@pytest.mark.parametrize(("rule", "case", "name"), PREDICTED)
def test_every_op_and_scheme_runs_where_the_plan_said(rule, case, name) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(Surrounded(rule, case)).eval()
    example = tuple(torch.randn(shape) for shape in case.shapes)
    converted = convert(model, example, name)
    lowered = cq.lower(converted.graph, example)
    # Of an op that runs as several the last one has its name; an einsum moves its operands first.
    actual = {op.written: op.backend for op in lowered.report.ops}
    quantized = {op.node: op.backend for op in converted.plan.quantized}
    assert quantized == {node: actual[node].label for node in quantized}
    # Functions without a table, and what only they read, are planned in float.
    planned = {op.node: op.placement for op in converted.plan.ops}
    assert planned == {node: backend.placement.value for node, backend in actual.items()}
    assert lowered.report.fully_delegated, str(lowered.report)


MIXED = {
    "resnet20": """
version: 1
global: a8w8
rules:
  - module_name: conv1
    scheme: a16w8
  - module_name: linear
    scheme: a16w8
  - module_name: layer2
    scheme: a8w4
""",
    "mobilenet_v2": """
version: 1
global: a8w8
rules:
  - module_name: features.0
    scheme: a16w8
  - module_name: classifier
    scheme: a16w8
  - module_name: features.[4-9]
    scheme: a8w4
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_mixed_widths_from_a_file_are_one_delegate(name: str, tmp_path: Path) -> None:
    if name == "resnet20":
        model, example = resnet20(), (torch.randn(4, 3, 32, 32),)
    else:
        model, example = torchvision_model(name), (torch.randn(1, 3, 224, 224),)
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED[name])
    quantizer = cq.IntegerQuantizer.from_config(path)
    converted = convert(model, example, quantizer)
    lowered = cq.lower(converted.graph, example)

    assert lowered.report.fully_delegated, str(lowered.report)
    actual = {op.node: op.backend.label for op in lowered.report.ops}
    assert {op.node: op.backend for op in converted.plan.quantized} == actual
    assert {"xnnpack int8", "xnnpack int8 container", "xnnpack float, int16 emulated"} <= set(
        actual.values()
    )
    checked = cq.verify(converted.graph, lowered, [example])
    assert checked.constants_equal
    assert all(output.max_lsb is not None for output in checked.outputs)


def test_packed_weights_halve_the_file() -> None:
    def size(name: str) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        example = (torch.randn(2, 512),)
        lowered = cq.lower(convert(model, example, name).graph, example)
        return lowered.report.size_bytes

    assert size("a8w4") <= 0.56 * size("a8w8")


@pytest.mark.parametrize("name", ["dyn8w8", "dyn8w4", "dyn8w4g32"])
def test_dynamic_linear(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    example = (torch.randn(4, 64),)
    converted = convert(model, example, name)
    lowered = cq.lower(converted.graph, example)
    assert lowered.report.fully_delegated, str(lowered.report)
    linear = [op for op in lowered.report.ops if op.node.startswith("linear")]
    wanted = "xnnpack dynamic int8" if name == "dyn8w8" else "xnnpack packed int4"
    assert [op.backend.label for op in linear] == [wanted, wanted]
    for op in converted.plan.quantized:
        bias = next(tensor for tensor in op.tensors if tensor.role == "bias")
        assert bias.dtype == "float32"
        assert "run time" in bias.reason


@pytest.mark.parametrize("name", ["a8w8", "a8w8-biasfloat", "a8w10", "a8w10-biasfloat"])
def test_plans_know_where_a_layer_with_its_bias_runs(name: str) -> None:
    example = (torch.randn(2, 8),)
    converted = convert(nn.Linear(8, 4).eval(), example, name)
    lowered = cq.lower(converted.graph, example)
    (planned,), (run,) = converted.plan.ops, lowered.report.ops
    assert planned.backend == run.backend.label
    assert ("bias in float" in planned.note) == (name == "a8w10-biasfloat")


def test_each_distinct_format_is_requantized_once() -> None:
    class Borders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)  # int16, read by two int8 ops, one int16 op and an int8 add
            return (self.b(y) + self.c(y)) + self.d(y) + y

    quantizer = (
        cq.IntegerQuantizer()
        .set_global("a8w8")
        .set_module_name("a", "a16w8")
        .set_module_name("d", "a16w8")
    )
    torch.manual_seed(0)
    example = (torch.randn(1, 4, 5, 5),)
    converted = convert(Borders(), example, quantizer)
    nodes = converted.graph.graph.nodes
    (conv,) = (n for n in nodes if n.name == "conv2d")
    (wide,) = conv.users
    assert wide.args[-1] == torch.int16
    narrow = {
        user
        for dequantize in wide.users
        for user in dequantize.users
        if "quantize_per_tensor" in str(user.target) and user.args[-1] == torch.int8
    }
    assert len(narrow) == 1
    lowered = cq.lower(converted.graph, example)
    assert lowered.report.fully_delegated, str(lowered.report)


def test_input_and_output_formats() -> None:
    torch.manual_seed(0)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(inputs="a16", outputs={"0": "a4"})
    example = (torch.randn(2, 3, 6, 6),)
    converted = convert(nn.Conv2d(3, 4, 3), example, quantizer)
    quantizes = [
        node.args[-3:]
        for node in converted.graph.graph.nodes
        if "ed.quantize_per_tensor" in str(node.target)
    ]
    assert quantizes == [
        (-32768, 32767, torch.int16),
        (-128, 127, torch.int8),
        (-128, 127, torch.int8),
        (-8, 7, torch.int8),
    ]
    lowered = cq.lower(converted.graph, example)
    assert lowered.report.fully_delegated
    assert len(torch.unique(lowered.run(*example))) <= 16
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(inputs={"y": "a8"})
    with pytest.raises(cq.ConfigError, match="no input 'y'; it has input"):
        convert(nn.Conv2d(3, 4, 3), example, quantizer)


@pytest.mark.parametrize("bits", slow_but([8], [4, 8, 16]))
def test_narrow_bias_keeps_its_leading_bits(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3)
    model.bias.data *= 40
    example = (torch.randn(2, 3, 6, 6),)
    converted = convert(model, example, f"a8w8-bias{bits}")
    lowered = cq.lower(converted.graph, example)
    (node,) = (n for n in converted.graph.graph.nodes if n.target in GEMMS)
    stored = operator.attrgetter(node.args[2].args[0].target)(converted.graph)
    scale = operator.attrgetter(node.args[2].args[1].target)(converted.graph)
    assert int(stored.abs().max()) <= 2 ** (bits - 1) - 1
    # Within half a unit of its own scale, and that scale is the derived one times 2**k.
    error = (stored.double() * scale.double() - model.bias.double()).abs()
    assert bool((error <= scale.double() * 0.5000001).all())
    weight = operator.attrgetter(node.args[1].args[1].target)(converted.graph)
    shift = torch.round(scale / (node.args[0].args[1] * weight)).long()
    assert bool(((shift & (shift - 1)) == 0).all())
    (device,) = lowered.integer_biases().values()
    assert torch.equal(torch.from_numpy(device.copy()).long(), stored.long() * shift)
    assert cq.verify(converted.graph, lowered, [example]).bit_exact
