"""Whole models against the runtime: one delegate, every bias, every output, every prediction."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.fuzz import check_each_tensor
from support.models import Converted, convert, torchvision_model
from torch import Tensor

import custom_quantizer as cq
from custom_quantizer.ops.gemm import CONV, CONV_TRANSPOSE, LINEAR

GEMMS = CONV.targets | CONV_TRANSPOSE.targets | LINEAR.targets
MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "squeezenet1_1",
    "googlenet",
    "mnasnet0_5",
    "vgg11_bn",
)
MODELS_WITH_FUNCTIONS = (
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
)


def biases_of(converted: Converted) -> dict[str, np.ndarray]:
    """Integers of every convolution's and linear layer's bias; fails where one is float."""
    biases = {}
    for node in converted.graph.graph.nodes:
        if node.target not in GEMMS:
            continue
        dequantize = node.args[2]
        assert "dequantize" in str(dequantize.target), f"{node.name} has a float bias"
        values = operator.attrgetter(dequantize.args[0].target)(converted.graph)
        assert values.dtype == torch.int32
        biases[node.name] = values.numpy()
    return biases


def float_biases(model: torch.nn.Module, example: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Biases after batch-norm folding, read from a graph prepared by upstream alone."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    folded = prepare_pt2e(torch.export.export(model, example).module(), XNNPACKQuantizer())
    return {
        node.name: operator.attrgetter(node.args[2].target)(folded).detach()
        for node in folded.graph.nodes
        if node.target in GEMMS
    }


def scales_of(converted: Converted, name: str) -> tuple[float, Tensor]:
    """Scales of an op's input and weight, as they stand in the graph."""
    (node,) = (n for n in converted.graph.graph.nodes if n.name == name)
    data, weight = node.args[:2]
    scale = weight.args[1]
    if not isinstance(scale, float):
        scale = operator.attrgetter(scale.target)(converted.graph)
    return float(data.args[1]), torch.as_tensor(scale, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-per_tensor", "a8w4", "a8w6"])
@pytest.mark.parametrize("name", MODELS)
def test_torchvision_model_is_one_exact_delegate(name: str, scheme: str) -> None:
    model = torchvision_model(name)
    example = (torch.randn(2, 3, 224, 224),)
    converted = convert(model, example, scheme)
    lowered = cq.lower(converted.graph, example)

    assert lowered.report.fully_delegated, str(lowered.report)
    integers, stored = biases_of(converted), lowered.integer_biases()
    real = float_biases(model, example)
    assert integers.keys() == stored.keys() == real.keys()
    for node, values in integers.items():
        input_scale, weight_scale = scales_of(converted, node)
        expected = torch.round(real[node].double() / (input_scale * weight_scale))
        assert np.array_equal(values, expected.numpy()), node
        assert np.array_equal(values, stored[node]), node

    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 224, 224, generator=generator),) for _ in range(10)]
    checked = cq.verify(converted.graph, lowered, batches)
    assert checked.bit_exact, str(checked)
    assert checked.exact_expected


IMAGE = (1, 3, 64, 64)
TABLES = {"hardsigmoid", "hardswish"}  # exact, although filled in float
# Models whose ops take other forms, at the smallest inputs they take; float families, if any.
OTHERS: dict[str, tuple[tuple[int, ...], set[str]]] = {
    "alexnet": (IMAGE, set()),
    "vgg11": (IMAGE, set()),
    "shufflenet_v2_x0_5": (IMAGE, set()),
    "shufflenet_v2_x1_0": (IMAGE, set()),
    "densenet121": (IMAGE, {"avg_pool2d"}),
    "inception_v3": ((1, 3, 75, 75), set()),
    "r3d_18": ((1, 3, 4, 32, 32), {"pad"}),
    "fcn_resnet50": (IMAGE, set()),
    "lraspp_mobilenet_v3_large": (IMAGE, {"sigmoid", *TABLES}),
    "deeplabv3_mobilenet_v3_large": (IMAGE, TABLES),
    "ssdlite320_mobilenet_v3_large": ((1, 3, 96, 96), TABLES),
}


SEGMENTING = ("fcn_resnet50", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
"""Models that end with a resize, which is computed in float unless a rule names it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_model_is_one_delegate(name: str) -> None:
    """Lowering compares its outputs with the integer reference; float kernels must be expected."""
    shape, floating = OTHERS[name]
    example = (torch.randn(shape),)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    if name in SEGMENTING:
        quantizer.set_operator_type(torch.ops.aten.upsample_bilinear2d.vec, "a8w8")
    converted = convert(torchvision_model(name), example, quantizer)
    lowered = cq.lower(converted.graph, example)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    assert {row.family for row in lowered.report.not_integer()} <= floating
    checked = cq.verify(converted.graph, lowered, [(torch.randn(shape),)])
    exact = not any(family.startswith("aten") for family in floating)
    assert checked.exact_expected is exact
    assert checked.bit_exact or not exact, str(checked)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTING)
def test_a_model_that_ends_with_a_resize_is_one_delegate_and_as_derived(name: str) -> None:
    example = (torch.randn(IMAGE),)
    converted = convert(torchvision_model(name), example)
    lowered = cq.lower(converted.graph, example)
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    (op,) = converted.plan.floating
    assert op.family == "upsample_bilinear2d"
    checked = cq.verify(converted.graph, lowered, [(torch.randn(IMAGE),)])
    assert checked.as_derived, str(checked)
    assert not checked.exact_expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS_WITH_FUNCTIONS)
def test_models_with_functions_are_one_exact_delegate(name: str) -> None:
    """silu, gelu, sigmoid, hardswish and hardsigmoid: tables, which no last bit decides."""
    model = torchvision_model(name)
    example = (torch.randn(2, 3, 64, 64),)
    converted = convert(model, example)
    assert [op.node for op in converted.plan.floating] == []
    lowered = cq.lower(converted.graph, example)
    assert lowered.report.fully_delegated, str(lowered.report)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 64, 64, generator=generator),) for _ in range(4)]
    checked = cq.verify(converted.graph, lowered, batches)
    assert checked.bit_exact, str(checked)
    assert checked.exact_expected


# Float kernels of the delegate and of PyTorch differ in their last bits, which add up from layer to
# layer: outputs have no bound worth the name, each tensor has one, given those before it.
TRANSFORMERS = {
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_32": 224,
    "maxvit_t": 224,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_with_float_ops_tensor_by_tensor(name: str) -> None:
    """Every quantized tensor is within the bound of docs/device_arithmetic.md."""
    size = TRANSFORMERS[name]
    check_each_tensor(convert(torchvision_model(name), (torch.randn(1, 3, size, size),)))


@pytest.mark.slow
def test_resnet20_on_all_shared_images() -> None:
    model = resnet20()
    images, labels = cifar10_test()
    calibration, _ = cifar10_calibration(512)
    batches = [(batch,) for batch in calibration.split(128)]
    example = (images[:100],)
    captured = torch.export.export(
        model, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=128)},)
    ).module()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_pt2e(captured, quantizer)
    for batch in batches:
        prepared(*batch)
    graph = convert_pt2e(prepared)
    lowered = cq.lower(graph, example)
    assert lowered.report.fully_delegated, str(lowered.report)

    reference = cq.integer_reference(graph)
    correct = {"float": 0, "pte": 0, "reference": 0}
    with torch.no_grad():
        for x, y in zip(images.split(100), labels.split(100), strict=True):
            device, exact = lowered.run(x), reference(x)
            assert torch.equal(device, exact)
            correct["float"] += int((model(x).argmax(1) == y).sum())
            correct["pte"] += int((device.argmax(1) == y).sum())
            correct["reference"] += int((exact.argmax(1) == y).sum())
    assert correct["pte"] == correct["reference"]
    assert abs(correct["pte"] - correct["float"]) <= 0.003 * len(labels), correct
