"""Saved integers: what NumPy computes from the two files is what ``fixed_point`` computes."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from support.bundles import assert_bundle_equals_fixed_point, write_signed
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.graphs import Function
from support.models import convert
from support.registry import LEFT_IN_FLOAT, Surrounded
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.core.arithmetic import QParams, wrap_int32
from custom_quantizer.core.fixed_point import (
    FIXED_POINT,
    multiply_by_quantized_multiplier,
    multiply_by_quantized_multiplier_int64,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)
from custom_quantizer.ops import Case, OpRule
from custom_quantizer.reference import numpy_runner
from custom_quantizer.reference.accumulators import accumulators
from custom_quantizer.reference.bundle import load_integers, save_integers

RUNNER = Path(numpy_runner.__file__)


class Network(nn.Module):
    """A function of tensors, and the modules it uses."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_children()))


def random_inputs(shapes: tuple[tuple[int, ...], ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def converted_network(
    build: Callable[[], nn.Module],
    shapes: tuple[tuple[int, ...], ...],
    quantizer: cq.IntegerQuantizer | str = "a8w8",
) -> GraphModule:
    torch.manual_seed(0)
    return convert(build(), random_inputs(shapes, 1), quantizer).graph


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, case) for rule in LEFT_IN_FLOAT for case in rule.cases]
)
def test_ops_that_xnnpack_leaves_in_float_run_where_no_backend_is_asked(
    rule: OpRule, case: Case, tmp_path: Path
) -> None:
    quantizer = cq.IntegerQuantizer(backend=None).set_global("a8w8")
    converted = converted_network(lambda: Surrounded(rule, case), case.shapes, quantizer)
    inputs = tuple(2 * x for x in random_inputs(case.shapes, 2))
    assert_bundle_equals_fixed_point(converted, tmp_path / "case", *inputs)


def split_parts(x: Tensor) -> Tensor:
    first, second, third = (x * 1.5).split([1, 2, 5], dim=-3)
    return torch.cat([third, first * 0.5, second], 1)


GRAPHS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "several_outputs": (lambda x, y: {"sum": x + y, "both": (x * y, x)[:1]}, ((2, 3), (2, 3))),
    "residual": (lambda x: F.relu(x * 2 + x) + x, ((2, 8, 5),)),
    "output_used_again": (lambda x: (y := x * 2.0, y + x), ((3, 4),)),
    "unused_part": (lambda x: (x * 2).chunk(3, 1)[1] + 1.0, ((2, 7, 3),)),
    "split_sizes": (split_parts, ((2, 8, 3, 3),)),
    "narrow": (lambda x: (x * 2).narrow(1, -3, 3) - (x * 2).narrow(1, 1, 3), ((2, 8),)),
    "negative_slice": (lambda x: (x * 2)[..., -4:-1, 1:], ((2, 8, 3),)),
    "open_slice": (lambda x: (x * 2)[1:, :, 100:], ((2, 8, 102),)),
    "movedim": (lambda x: (x * 2).movedim((0, 1), (2, -1)), ((2, 3, 4, 5),)),
    "negative_permute": (lambda x: (x * 2).permute(-1, 0, -2), ((2, 3, 4),)),
    "transposes": (lambda x: (x * 2).transpose(-1, 0).t(), ((2, 3),)),
    "unflatten": (lambda x: (x * 2).unflatten(1, (2, -1)), ((2, 8, 3),)),
    "squeeze_dims": (lambda x: (x * 2).squeeze((1, 3)), ((2, 1, 3, 1),)),
    "expand_new_dim": (lambda x: (x * 2).expand(4, 2, -1, 3), ((2, 5, 1),)),
    "asymmetric_pad": (lambda x: F.pad(x * 2, (1, 0, 0, 2, 3, 0)), ((2, 3, 4, 4),)),
    "standalone_relu": (lambda x: F.relu((x * 2).flatten(1)), ((2, 3, 4),)),
    "negative_select": (lambda x: (x * 2).select(-1, -2), ((2, 3, 4),)),
    "uneven_average": (
        lambda x: F.avg_pool2d(x * 2, (3, 2), (2, 1), (1, 1), count_include_pad=False) * 1.25,
        ((2, 3, 9, 7),),
    ),
    "average_padded_in_one_dimension": (
        lambda x: F.avg_pool2d(x * 2, (3, 2), 1, (1, 0), count_include_pad=False) * 1.25,
        ((2, 3, 5, 4),),
    ),
    "resized": (
        lambda x: F.interpolate(x * 2, size=(7, 4), mode="bilinear") + 1.0,
        ((2, 3, 3, 6),),
    ),
    "ceil_pool": (
        lambda x: F.max_pool2d(x * 2, (3, 2), (2, 3), 1, ceil_mode=True),
        ((1, 3, 12, 9),),
    ),
}


@pytest.mark.parametrize("scheme", slow_but(["a8w8"], ["a8w8", "a16w8"]))
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_several_ops_run_with_numpy_bit_for_bit(
    name: str, scheme: str, tmp_path: Path
) -> None:
    function, shapes = GRAPHS[name]
    converted = converted_network(lambda: Network(function), shapes, scheme)
    inputs = tuple(2 * x for x in random_inputs(shapes, 2))
    assert_bundle_equals_fixed_point(converted, tmp_path / "graph", *inputs)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "extended": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=3, output_padding=2),
        (2, 4, 5, 4),
    ),
    "extended_and_cropped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2),
        (2, 4, 5, 4),
    ),
    "strided_and_dilated": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), dilation=(3, 2), padding=(2, 1)),
        (2, 4, 5, 4),
    ),
    "many_groups": (lambda: nn.Conv1d(6, 12, 2, groups=3, dilation=3, padding=2), (2, 6, 9)),
    "same_even_dilated": (
        lambda: nn.Conv2d(4, 6, (2, 4), dilation=(3, 1), padding="same"),
        (2, 4, 9, 8),
    ),
}


@pytest.mark.parametrize("scheme", ["a8w8", "a8w4-per_tensor", "a8w8-bias8", "a16w16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_unusual_geometry_run_with_numpy_bit_for_bit(
    name: str, scheme: str, tmp_path: Path
) -> None:
    build, shape = LAYERS[name]
    converted = converted_network(build, (shape,), scheme)
    (x,) = random_inputs((shape,), 2)
    assert_bundle_equals_fixed_point(converted, tmp_path / "layer", 2 * x)


def test_a_depthwise_transposed_convolution_has_one_scale(tmp_path: Path) -> None:
    """Its weight has one channel a group, and so one scale, which all output channels have."""
    build = lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)  # noqa: E731
    quantizer = cq.IntegerQuantizer(backend=None).set_global("a8w8")
    converted = converted_network(build, ((2, 8, 5, 4),), quantizer)
    (x,) = random_inputs(((2, 8, 5, 4),), 2)
    description = assert_bundle_equals_fixed_point(converted, tmp_path / "depthwise", 2 * x)
    (bias,) = (t for t in description["tensors"].values() if t["kind"] == "bias")
    assert (bias["shape"], bias["axis"], len(set(bias["scale"]["bits"]))) == ([8], 0, 1)


@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.clamp(-0.7, 0.3), {"op": "clamp"}),
        (
            lambda x: F.avg_pool2d(x, (3, 2), 1, 1, count_include_pad=False),
            {"op": "avg_pool2d", "rounding": "divide_half_away"},
        ),
        (
            lambda x: F.avg_pool2d(x, (2, 3), (2, 1)),
            {"op": "avg_pool2d", "rounding": "divide_half_away"},
        ),
    ],
    ids=["clamp", "uncounted_padding", "windows"],
)
def test_ops_on_one_grid_need_no_multiplier(
    function: Callable[[Tensor], Tensor], expected: dict[str, str], scheme: str, tmp_path: Path
) -> None:
    (x,) = random_inputs(((2, 3, 9, 7),), 2)
    # Constant images within the limits: the op changes nothing, so its output has the same range.
    seen = torch.tensor([-0.5, 0.25]).reshape(2, 1, 1, 1).expand_as(x)
    # Pools alone are not worth quantizing, unless a rule of their own says so.
    pool = torch.ops.aten.avg_pool2d.default
    quantizer = cq.IntegerQuantizer().set_global(scheme).set_operator_type(pool, scheme)
    converted = convert(Network(function), (x,), quantizer, [(seen,)]).graph
    description = assert_bundle_equals_fixed_point(converted, tmp_path / "grid", x)
    (op,) = description["ops"]
    assert expected.items() <= op.items()
    assert "requantization" not in op
    description["tensors"][op["output"]]["zero_point"] += 1
    write_signed(description, tmp_path / "grid")
    with pytest.raises(cq.InputError, match="must have one scale and zero point"):
        load_integers(tmp_path / "grid")


def test_formats_of_inputs_and_outputs_are_requantized(tmp_path: Path) -> None:
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(inputs="a16", outputs="a16")
    build = lambda: Network(lambda x, layer: F.relu(layer(x)), layer=nn.Linear(8, 5))  # noqa: E731
    converted = converted_network(build, ((4, 8),), quantizer)
    description = assert_bundle_equals_fixed_point(
        converted, tmp_path / "io", *random_inputs(((4, 8),), 2)
    )
    assert "requantize" in [op["op"] for op in description["ops"]]
    tensors = description["tensors"]
    assert tensors[description["outputs"][0]["tensor"]]["dtype"] == "int16"


def test_an_input_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    net = Function(lambda s, x, factor: s.layer(x) * factor, layer=nn.Linear(4, 4))
    graph = convert(net, (torch.randn(1, 4), 3)).graph
    with pytest.raises(cq.ConversionError, match=r"^input 1 of the model is no tensor; capture a"):
        save_integers(graph, tmp_path / "net")


def test_a_layer_used_twice_is_stored_once(tmp_path: Path) -> None:
    build = lambda: Network(lambda x, layer: layer(F.relu(layer(x))), layer=nn.Linear(6, 6))  # noqa: E731
    converted = converted_network(build, ((4, 6),))
    description = assert_bundle_equals_fixed_point(
        converted, tmp_path / "twice", *random_inputs(((4, 6),), 2)
    )
    kinds = [tensor["kind"] for tensor in description["tensors"].values()]
    first, second = description["ops"]
    assert first["weight"] == second["weight"]
    assert first["bias"] != second["bias"]  # its unit holds the scale of the input
    assert kinds.count("weight") == 1


def test_another_batch_size_than_captured(tmp_path: Path) -> None:
    def head(x: Tensor, conv: nn.Module, linear: nn.Module) -> Any:
        return linear(F.max_pool2d(conv(x), 2).flatten(1))

    def build() -> nn.Module:
        return Network(head, conv=nn.Conv2d(3, 4, 3), linear=nn.Linear(36, 5))

    converted = converted_network(build, ((2, 3, 8, 8),))
    save_integers(converted, tmp_path / "batch")
    (images,) = random_inputs(((6, 3, 8, 8),), 2)
    reference = cq.integer_reference(converted, "fixed_point")
    expected = torch.cat([reference(pair) for pair in images.split(2)])
    actual = load_integers(tmp_path / "batch")(images.numpy())
    np.testing.assert_array_equal(actual, expected.numpy(), strict=True)


def test_a_dynamic_batch_is_the_size_that_is_left_over(tmp_path: Path) -> None:
    """What depends on the batch is resolved when the bundle is written, not when it runs."""

    def function(x: Tensor, conv: nn.Module, linear: nn.Module) -> Any:
        y = conv(x)
        return linear(y.view(y.size(0), -1)), y[:, 1:3].reshape(y.shape[0] * 2, 36)

    torch.manual_seed(0)
    model = Network(function, conv=nn.Conv2d(3, 4, 3), linear=nn.Linear(144, 5)).eval()
    (x,) = random_inputs(((4, 3, 8, 8),), 1)
    batch = torch.export.Dim("batch", min=1, max=64)
    # One entry for each input, of which the network takes any number.
    captured = torch.export.export(model, (x,), dynamic_shapes=(({0: batch},),)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    converted = convert_pt2e(prepared)
    description = assert_bundle_equals_fixed_point(
        converted, tmp_path / "dynamic", *random_inputs(((6, 3, 8, 8),), 2)
    )
    assert description["inputs"][0]["shape"] == [None, 3, 8, 8]
    view, reshape = (op for op in description["ops"] if op["op"] == "reshape")
    assert (view["shape"], reshape["shape"]) == ([0, 144], [-1, 36])


# Without PyTorch ---------------------------------------------------------------------------------

STANDALONE = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("runner", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
bundle = runner.load_integers(sys.argv[2])
np.save(sys.argv[4], bundle(np.load(sys.argv[3])))
foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(name for name in foreign if not name.startswith("_")))
"""


def test_a_bundle_runs_where_there_is_no_pytorch(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))

    converted = converted_network(build, ((2, 3, 6, 6),))
    (x,) = random_inputs(((2, 3, 6, 6),), 2)
    save_integers(converted, tmp_path / "net")
    shutil.copy(RUNNER, tmp_path / "copied.py")
    np.save(tmp_path / "x.npy", x.numpy())
    names = ("copied.py", "net", "x.npy", "y.npy")
    # -I: neither the package nor the tests are on the path.
    done = subprocess.run(
        [sys.executable, "-I", "-c", STANDALONE, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {"numpy", "safetensors"} <= imported
    assert not imported & {"torch", "torchao", "executorch", "custom_quantizer"}
    expected = cq.integer_reference(converted, "fixed_point")(x)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected.numpy(), strict=True)


# Two files that belong together ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network; copied by tests that damage it."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))

    path = tmp_path_factory.mktemp("saved") / "net"
    save_integers(converted_network(build, ((2, 3, 6, 6),)), path)
    return path


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(saved.with_suffix(suffix), tmp_path / f"net{suffix}")
    return tmp_path / "net"


def test_every_damaged_byte_of_the_weights_is_noticed(damaged: Path) -> None:
    file = damaged.with_suffix(".safetensors")
    data = file.read_bytes()
    for position in range(0, len(data), 101):
        broken = bytearray(data)
        broken[position] ^= 1
        file.write_bytes(broken)
        with pytest.raises(cq.InputError, match="SHA-256"):
            load_integers(damaged)
    file.write_bytes(data[:-1])
    with pytest.raises(cq.InputError, match="SHA-256"):
        load_integers(damaged)


@pytest.mark.parametrize("stale", [".json", ".safetensors"])
def test_half_of_another_bundle_is_noticed(damaged: Path, stale: str) -> None:
    old = damaged.with_suffix(stale).read_bytes()
    build = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))  # noqa: E731
    save_integers(converted_network(build, ((2, 3, 6, 6),)), damaged)
    load_integers(damaged)
    damaged.with_suffix(stale).write_bytes(old)
    with pytest.raises(cq.InputError, match="SHA-256"):
        load_integers(damaged)


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_a_bundle_goes_by_the_name_of_either_file(saved: Path, suffix: str) -> None:
    load_integers(saved.with_suffix(suffix))


@pytest.mark.parametrize("missing", [".json", ".safetensors"])
def test_a_missing_file_is_named(damaged: Path, missing: str) -> None:
    damaged.with_suffix(missing).unlink()
    with pytest.raises(cq.InputError, match=rf"net{missing}: No such file"):
        load_integers(damaged)


def test_text_that_is_not_json(damaged: Path) -> None:
    text = damaged.with_suffix(".json").read_text()
    damaged.with_suffix(".json").write_text(text[: len(text) // 2])
    with pytest.raises(cq.InputError, match="is not JSON"):
        load_integers(damaged)


def _weights_that_are_none(document: dict[str, Any], path: Path) -> None:
    data = b"nothing that safetensors writes"
    path.with_suffix(".safetensors").write_bytes(data)
    document["weights"]["sha256"] = hashlib.sha256(data).hexdigest()


def _weights_with(
    name: str, change: Callable[[Any], Any]
) -> Callable[[dict[str, Any], Path], None]:
    """Change a weight, with everything signed again."""

    def edit(document: dict[str, Any], path: Path) -> None:
        file = path.with_suffix(".safetensors")
        arrays = safetensors.numpy.load_file(file)
        arrays[name] = change(arrays[name])
        file.write_bytes(safetensors.numpy.save(arrays))
        document["weights"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    return edit


def _op(**fields: Any) -> Callable[[dict[str, Any], Path], object]:
    """Other fields of the convolution."""
    return lambda document, _: document["ops"][0].update(fields)


def _tensor(name: str, **fields: Any) -> Callable[[dict[str, Any], Path], object]:
    return lambda document, _: document["tensors"][name].update(fields)


def _factor(**fields: Any) -> Callable[[dict[str, Any], Path], object]:
    return lambda document, _: document["ops"][0]["requantization"].update(fields)


def _padding(before: list[int], after: list[int]) -> Callable[[dict[str, Any], Path], object]:
    return _op(padding={"before": before, "after": after})


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# What a reader says of a network of conv2d, relu (its output), view and linear.
EDITS: dict[str, tuple[Callable[[dict[str, Any], Path], object], str]] = {
    "format": (lambda d, _: d.update(format="onnx"), "no description of a network"),
    "version": (lambda d, _: d.update(version=4), "version 4, this reader knows 1 to 3"),
    "old_version": (lambda d, _: d.update(version=1), "checksum from version 2 on"),
    "no_checksum": (lambda d, _: d.pop("checksum"), "was changed after it was written"),
    "section": (lambda d, _: d.pop("tensors"), "lacks tensors"),
    "unknown_section": (lambda d, _: d.update(code="x"), "code is no field of the format"),
    "digest": (lambda d, _: d["weights"].pop("sha256"), r"weights lacks sha256"),
    "safetensors": (_weights_that_are_none, "cannot be read"),
    "ops": (lambda d, _: d.update(ops=None), "ops must be a list .*, not null"),
    "depth": (lambda d, _: d.update(ops=_nested(500)), r"ops\[0\] must be a mapping"),
    "op": (_op(op="softmax"), r"ops\[0\]\.op: no op 'softmax'"),
    "op_list": (_op(op=["conv"]), r"ops\[0\]\.op: no op a list of 1"),
    "field": (lambda d, _: d["ops"][0].pop("stride"), r"ops\[0\] lacks stride"),
    "unknown_field": (_op(strides=[1, 1]), r"ops\[0\]\.strides is no field"),
    "order": (lambda d, _: d["ops"].reverse(), "nothing before it computes"),
    "output": (lambda d, _: d["outputs"][0].update(tensor="logits"), "'logits' is not computed"),
    "undescribed": (lambda d, _: d["tensors"].pop("relu"), "'relu' is not described"),
    "stored": (lambda d, _: d["tensors"].pop("conv2d.bias"), r"disagree .*: 'conv2d\.bias'"),
    "dtype": (
        _tensor("conv2d.weight", dtype="int16"),
        r"\['conv2d\.weight'\] is described as int16",
    ),
    "weight_shape": (_tensor("conv2d.weight", shape=[4, 3, 9]), r"int8 of shape \[4, 3, 9\]"),
    "scale": (
        lambda d, _: d["tensors"]["relu"]["scale"].update(decimal=0.5),
        "relu.scale: its bits and its decimal differ",
    ),
    "negative_scale": (
        _tensor("relu", scale={"bits": "bf800000", "decimal": -1.0}),
        "a number above 0, not -1.0",
    ),
    "denormal_scale": (
        _tensor("relu", scale={"bits": "00000001", "decimal": float(np.float32(1e-45))}),
        "positive, finite and normal",
    ),
    "infinite_scale": (
        _tensor("relu", scale={"bits": "7f800000", "decimal": 1.0}),
        "positive, finite and normal",
    ),
    "other_scale": (
        _tensor("relu", scale={"bits": "3f800000", "decimal": 1.0}),
        "but the scales give",
    ),
    "incomplete": (lambda d, _: d["tensors"]["relu"].pop("zero_point"), "relu lacks zero_point"),
    "huge_zero_point": (_tensor("relu", zero_point=10**9), "<= quant_max must hold"),
    "another_zero_point": (
        lambda d, _: d["tensors"][d["ops"][1]["output"]].update(zero_point=0),
        "one scale and zero point",
    ),
    "weight_zero_point": (_tensor("conv2d.weight", zero_point=1), "of a weight must be 0, not 1"),
    "empty_range": (_tensor("relu", quant_min=5, quant_max=4), "<= quant_max must hold"),
    "bits": (_tensor("relu", bits=7), "bits must be 8"),
    "wide": (
        _tensor("relu", quant_max=128, bits=9),
        "too wide for int8 in a tensor of activations",
    ),
    "activation_shape": (_tensor("relu", shape=[2, 4, 4, 5]), r"its shape is \[2, 4, 4, 4\]"),
    "extra_tensor": (
        lambda d, _: d["tensors"].update(more=d["tensors"]["relu"]),
        "nothing computes 'more'",
    ),
    "computed_twice": (_op(output="input_1"), "has its values already"),
    "stored_value": (
        _weights_with("conv2d.weight", lambda w: np.full_like(w, -128)),
        "-128 to -128, outside of its range -127 to 127",
    ),
    "shift": (_factor(shift=[100] * 4), r"shift\[0\] must be a whole number .*, not 100"),
    "another_shift": (_factor(shift=[-5] * 4), "but the scales give"),
    "wide_rule": (_factor(rule="int64_one_rounding"), "accumulator.width must be 64"),
    "rule": (_factor(rule="float"), r"requantization\.rule must be .*, not 'float'"),
    "lengths": (_factor(shift=[-6] * 3), "must have 4 multipliers and shifts"),
    "negative_multiplier": (_factor(multiplier=[-1] * 4), r"multiplier\[0\] must be"),
    "boolean": (_op(groups=True), r"groups must be a whole number .*, not true"),
    "no_stride": (_op(stride=[0, 1]), r"stride\[0\] must be a whole number from 1"),
    "short_stride": (_op(stride=[1]), "2 spatial dimensions, not 1"),
    "groups": (_op(groups=2), "in 2 groups does not fit"),
    "padding": (_padding([2**18] * 2, [0, 0]), "padded input .* elements, .* at most"),
    "large_padding": (_padding([2**40] * 2, [0, 0]), r"padding\.before\[0\] must be"),
    "padding_shape": (_padding([1, 1], [0, 0]), r"its shape is \[2, 4, 5, 5\]"),
    "dilation": (_op(dilation=[9, 1]), "larger than its padded input"),
    "clamp": (_op(clamp=[-128, 300]), "clamp must lie within -128 to 127"),
    "clamp_order": (_op(clamp=[5, 4]), "clamp must lie within"),
    "accumulator": (_op(accumulator={"bits": 9, "width": 32}), "accumulator.bits must be"),
    "bias_shape": (
        lambda d, path: (
            _weights_with("conv2d.bias", lambda bias: bias[:1].copy())(d, path),
            d["tensors"]["conv2d.bias"].update(
                shape=[1],
                scale={
                    key: values[:1] for key, values in d["tensors"]["conv2d.bias"]["scale"].items()
                },
            ),
        ),
        r"its bias must have the shape \[4\]",
    ),
    "weight_rank": (
        lambda d, path: (
            _weights_with("conv2d.weight", lambda w: w.reshape(4, 27))(d, path),
            d["tensors"]["conv2d.weight"].update(shape=[4, 27]),
        ),
        r"its weight has the shape \[4, 27\]",
    ),
    "parameter_returned": (
        lambda d, _: d["outputs"][0].update(tensor="conv2d.bias"),
        "'conv2d.bias' is a parameter",
    ),
    "no_weight": (_op(weight="conv2d.bias"), "'conv2d.bias' is a bias"),
    "inputs": (_op(inputs=["input_1", "input_1"]), "inputs must be 1 tensors, not 2"),
    "surrogate": (_op(module="\ud800", clamp="\ud800"), r"not '\\ud800'"),
    "long_number": (_op(groups=10**100), "more than 40 digits"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_description_that_cannot_be_run_says_why(damaged: Path, name: str) -> None:
    edit, message = EDITS[name]
    document = json.loads(damaged.with_suffix(".json").read_text())
    edit(document, damaged)
    write_signed(document, damaged)
    with pytest.raises(cq.InputError, match=message) as raised:
        load_integers(damaged)
    assert str(damaged) in str(raised.value)


# The same of a network that has ops of every other kind: the first op of a kind, its fields.


def of_every_kind(x: Tensor, **layers: nn.Module) -> Any:
    y = F.max_pool2d(layers["up"](x), 2)
    y = F.avg_pool2d(y * 1.5, 3, 2, 1, count_include_pad=False) * 1.25
    y = layers["prelu"](y)
    joined = torch.cat([y, y + y * 0.5], 1)
    padded = F.pad(y, (1, 1)).permute(0, 2, 1, 3).reshape(2, 3, 20)
    part = padded[:, :, 3:15]
    wide = part.select(1, 0).unsqueeze(1).expand(2, 3, 12)
    product = torch.matmul(part, wide.transpose(1, 2))
    return joined, product, layers["linear"](joined.mean((2, 3)))


@functools.cache
def every_kind(folder: Path) -> Path:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {
            "up": nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
            "prelu": nn.PReLU(4),
            "linear": nn.Linear(8, 3),
        }
        layers["prelu"].weight.data = torch.linspace(0.1, 0.4, 4)
        return Network(of_every_kind, **layers)

    save_integers(converted_network(build, ((2, 4, 6, 6),)), folder / "every")
    return folder / "every"


def first(document: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(op for op in document["ops"] if op["op"] == kind)


def retabled(change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda document: change(first(document, "table")["table"])


def fields(kind: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: first(document, kind).update(changes)


def other_operand(kind: str) -> Callable[[dict[str, Any]], object]:
    """The first operand of an op twice, or its second in the place of its first."""

    def edit(document: dict[str, Any]) -> None:
        op = first(document, kind)
        op["inputs"][-1] = document["inputs"][0]["tensors"][0]

    return edit


def scaled(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    """Other scales of the parameter ``name`` of the transposed convolution."""

    def edit(document: dict[str, Any]) -> None:
        document["tensors"][first(document, "conv_transpose")[name]].update(changes)

    return edit


def one_scale(document: dict[str, Any]) -> None:
    """An activation with a scale for each channel."""
    scale = {"bits": ["3f800000"] * 4, "decimal": [1.0] * 4}
    document["tensors"][first(document, "max_pool2d")["output"]].update(scale=scale, axis=1)


def unknown_size(document: dict[str, Any]) -> None:
    document["tensors"][first(document, "linear")["weight"]].update(shape=[3, None])


def narrowed(kind: str) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["tensors"][first(document, kind)["output"]].update(
        quant_max=100
    )


def repeated_count(document: dict[str, Any]) -> None:
    entry = first(document, "avg_pool2d")["requantization"]
    for key in ("count", "multiplier", "shift"):
        entry[key].append(entry[key][0])


def lost_count(document: dict[str, Any]) -> None:
    entry = first(document, "avg_pool2d")["requantization"]
    position = entry["count"].index(4)
    for key in ("count", "multiplier", "shift"):
        del entry[key][position]


KINDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "crop": (
        fields("conv_transpose", crop={"before": [6, 6], "after": [6, 6]}),
        "leaves nothing of",
    ),
    "transposed_groups": (fields("conv_transpose", groups=3), "in 3 groups does not fit"),
    "transposed_scale": (scaled("weight", axis=0), "must be one number for each entry|axis"),
    "transposed_axis": (
        scaled("weight", axis=0, scale={"bits": ["3f800000"] * 4, "decimal": [1.0] * 4}),
        "must have one scale, or one for each entry of dimension 1",
    ),
    "bias_scale": (
        scaled("bias", scale={"bits": "3f800000", "decimal": 1.0}),
        "the scale of its bias must be",
    ),
    "activation_axis": (one_scale, "must be one number for each entry of its axis"),
    "stored_shape": (unknown_size, "shape of stored integers must have numbers only"),
    "pool_of_padding": (
        fields("max_pool2d", padding={"before": [2, 2], "after": [0, 0]}),
        "one of its windows holds padding only",
    ),
    "taps": (fields("max_pool2d", kernel=[2**11, 2**11]), "more than 1,048,576 positions"),
    "terms": (
        fields(
            "max_pool2d",
            kernel=[1000, 1000],
            stride=[1, 1],
            padding={"before": [999, 999], "after": [999, 999]},
        ),
        "it adds up .* terms, 1,099,511,627,776 at most",
    ),
    "pool_range": (narrowed("max_pool2d"), "its output must hold all its inputs"),
    "rounding": (
        fields("avg_pool2d", rounding="divide_half_away"),
        "has a requantization when its rounding is multiply",
    ),
    "count_twice": (repeated_count, "requantization.count has a number twice"),
    "count_lost": (lost_count, "no multiplier is given for a window of 4 values"),
    "boolean": (fields("avg_pool2d", count_padding=0), "count_padding must be true or false"),
    "row": (retabled(lambda table: table[0].pop()), "an entry for each of the 256 integers"),
    "rows": (retabled(lambda table: table.pop()), "its table has 3 rows for 4 channels"),
    "entry": (
        retabled(lambda table: table[0].__setitem__(0, 128)),
        "table must hold numbers from -128 to 127",
    ),
    "flat": (fields("table", axis=None), "an entry for each of the 256 integers"),
    "table_axis": (fields("table", axis=9), "it has no dimension 9"),
    "count": (fields("mean", count=10), "averages 10 values of an image, not 9"),
    "axes": (fields("mean", axes=[2, 2]), "are not different ones"),
    "mean_axis": (fields("mean", axes=[2, 4]), "it has no dimension 4"),
    "linear": (other_operand("linear"), "does not fit its input of shape"),
    "broadcast": (other_operand("add"), "do not broadcast"),
    "matmul": (other_operand("matmul"), "cannot be multiplied"),
    "cat": (other_operand("cat"), "cannot be joined along axis 1"),
    "pad": (fields("pad", padding={"before": [1], "after": [1, 1]}), "number of dimensions"),
    "reshape": (fields("reshape", shape=[0, 3, 21]), "cannot take the shape"),
    "reshape_twice": (fields("reshape", shape=[-1, 3, -1]), "cannot take the shape"),
    "permute": (fields("permute", axes=[0, 2, 2, 3]), "are no order of the 4 dimensions"),
    "slice": (fields("slice", start=4), r"its shape is \[2, 3, 11\]"),
    "slice_axis": (fields("slice", axis=5), "it has no dimension 5"),
    "step": (fields("slice", step=0), "step must be a whole number from 1"),
    "select": (fields("select", index=3), "selects entry 3 of a dimension of size 3"),
    "expand": (fields("expand", shape=[-1, 3, 13]), "does not expand to"),
    "left_shift": (fields("add", left_shift=19), "but the scales give"),
    "add_accumulator": (
        fields("add", accumulator={"bits": 29, "width": 64}),
        "accumulator.width must be 32, not 64",
    ),
    "name": (fields("pad", name=""), "name must be text of 1 to 4096 characters"),
    "long_name": (fields("pad", module="m" * 5000), "module must be text of 0 to 4096"),
    "digits": (
        scaled("weight", scale={"bits": "3F800000", "decimal": 1.0}),
        "bits must be 8 hexadecimal digits",
    ),
    "tensors": (lambda d: d.update(tensors=[]), "tensors must be a mapping, not a list of 0"),
    "entry_of_tensors": (
        lambda d: d["tensors"].update(more=3),
        "tensors.more must be a mapping, not 3",
    ),
    "wide_shift": (
        lambda d: first(d, "mul")["requantization"].update(rule="int64_one_rounding", shift=8),
        "shift of the rule int64_one_rounding must be 7 or less, not 8",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_op_is_checked(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    edit, message = KINDS[name]
    source = every_kind(tmp_path_factory.getbasetemp())
    document = json.loads(source.with_suffix(".json").read_text())
    edit(document)
    write_signed(document, tmp_path / "net")
    shutil.copy(source.with_suffix(".safetensors"), tmp_path / "net.safetensors")
    with pytest.raises(cq.InputError, match=message):
        load_integers(tmp_path / "net")


STORED: dict[str, tuple[Any, str]] = {
    "dtype": (np.zeros((2, 3, 6, 6), np.int16), "is of dtype int8, got int16"),
    "range": (np.full((2, 3, 6, 6), -128, np.int8), "holds -128 to -128, outside of its range"),
    "rank": (np.zeros((2, 3, 6), np.int8), r"has shape \[2, 3, 6, 6\], got \[2, 3, 6\]"),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_inputs_that_do_not_fit(name: str, damaged: Path) -> None:
    stored, message = STORED[name]
    document = json.loads(damaged.with_suffix(".json").read_text())
    reference = load_integers(damaged)
    (tensor,) = document["inputs"][0]["tensors"]
    if name == "range":  # a tensor that leaves -128 out
        reference.tensors[tensor] = reference.tensors[tensor]._replace(quant_min=-127)
    with pytest.raises(cq.InputError, match=message):
        reference.run({tensor: stored})


def test_a_batch_that_needs_too_much_memory_is_refused_before_it_is_computed(saved: Path) -> None:
    # No memory is taken by what has one value only.
    many = np.broadcast_to(np.zeros((), np.int8), (2**22, 3, 6, 6))
    reference = load_integers(saved)
    (tensor,) = reference.description["inputs"][0]["tensors"]
    with pytest.raises(cq.InputError, match=r"conv2d \(conv\): its padded input .* elements"):
        reference.run({tensor: many})


def test_one_digit_that_was_changed_is_noticed(damaged: Path) -> None:
    file = damaged.with_suffix(".json")
    text = file.read_bytes()
    for position in range(0, len(text), 37):
        broken = bytearray(text)
        broken[position] ^= 1
        file.write_bytes(broken)
        with pytest.raises(cq.InputError, match=r"was changed|not JSON|no description|version"):
            load_integers(damaged)


TEXTS = {
    "nan": (b"NaN", "NaN is no number of JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "is not JSON"),
    "digits": (b"9" * 10_000, "is not JSON"),
    "twice": (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "latin": (b'"\xe4"', "is not JSON"),
    "list": (b"[]", "no description"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_description(damaged: Path, name: str) -> None:
    text, message = TEXTS[name]
    damaged.with_suffix(".json").write_bytes(text)
    with pytest.raises(cq.InputError, match=message):
        load_integers(damaged)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_what_is_no_regular_file_is_not_opened(damaged: Path, suffix: str) -> None:
    file = damaged.with_suffix(suffix)
    file.unlink()
    os.mkfifo(file)  # opening it would wait for a writer
    with pytest.raises(cq.InputError, match=f"{suffix} is no regular file"):
        load_integers(damaged)
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(cq.InputError, match=r"1,099,511,627,776 bytes, .* at most are read"):
        load_integers(damaged)


def test_a_bundle_of_version_1_is_read(damaged: Path) -> None:
    expected = load_integers(damaged)(np.ones((2, 3, 6, 6), np.float32))
    document = json.loads(damaged.with_suffix(".json").read_text())
    del document["checksum"]
    document["version"] = 1
    damaged.with_suffix(".json").write_text(json.dumps(document))
    actual = load_integers(damaged)(np.ones((2, 3, 6, 6), np.float32))
    np.testing.assert_array_equal(actual, expected)


def test_positions_of_resizes_are_as_fine_as_the_integers(tmp_path: Path) -> None:
    """Since version 3; before, all had 11 bits of a pixel."""
    function, shapes = GRAPHS["resized"]
    x = np.random.default_rng(0).normal(size=shapes[0]).astype(np.float32)
    for scheme, bits in (("a8w8", 11), ("a16w8", 19)):
        path = tmp_path / scheme
        save_integers(converted_network(lambda: Network(function), shapes, scheme), path)
        document = json.loads(path.with_suffix(".json").read_text())
        (resize,) = (op for op in document["ops"] if op["op"] == "resize_bilinear")
        assert resize.pop("position_bits") == bits
        expected = load_integers(path)(x)
        write_signed(document, path)
        with pytest.raises(cq.InputError, match="position_bits from version 3 on"):
            load_integers(path)
        document["version"] = 2
        write_signed(document, path)
        if bits == 11:
            np.testing.assert_array_equal(load_integers(path)(x), expected)
        else:  # places beyond the image, at 11 bits
            with pytest.raises(cq.InputError, match="lies beyond the last pixel"):
                load_integers(path)


def test_a_failed_write_leaves_the_old_bundle(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in damaged.parent.iterdir()}
    other = converted_network(lambda: nn.Linear(3, 2), ((4, 3),))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(cq.InputError, match="no space left"):
            save_integers(other, damaged)
    assert {file.name: file.read_bytes() for file in damaged.parent.iterdir()} == before
    load_integers(damaged)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    converted = converted_network(lambda: nn.Linear(3, 2), ((4, 3),))
    with pytest.raises(cq.InputError, match="does not exist"):
        save_integers(converted, tmp_path / "nowhere" / "net")


INPUTS: dict[str, tuple[list[Any], str]] = {
    "number": ([], "takes 1 inputs"),
    "dtype": ([np.zeros((2, 3, 6, 6))], "float32 arrays, got float64"),
    "rank": ([np.zeros((3, 6, 6), np.float32)], r"got \[3, 6, 6\]"),
    "size": ([np.zeros((2, 3, 7, 6), np.float32)], r"got \[2, 3, 7, 6\]"),
    "nan": ([np.full((2, 3, 6, 6), np.nan, np.float32)], "NaN"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_do_not_fit(saved: Path, name: str) -> None:
    inputs, message = INPUTS[name]
    bundle = load_integers(saved)
    with pytest.raises(cq.InputError, match=message):
        bundle(*inputs)


def test_stored_inputs_under_another_name(saved: Path) -> None:
    bundle = load_integers(saved)
    with pytest.raises(cq.InputError, match="starts from the tensors input_1, not from x"):
        bundle.run({"x": np.zeros((2, 3, 6, 6), np.int8)})


# What integers cannot express --------------------------------------------------------------------


def test_ops_left_in_float_are_named(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3))

    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("2", None)
    converted = converted_network(build, ((4, 6),), quantizer)
    with pytest.raises(cq.ConversionError, match=r"sigmoid \(1\): .*; linear_1 \(2\): "):
        save_integers(converted, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("integer", [False, True])
def test_none_among_the_outputs_has_no_entry(integer: bool, tmp_path: Path) -> None:
    """The tensors stay in their order, and each has its own integers."""

    def build() -> nn.Module:
        def compute(net: nn.Module, x: Tensor) -> Any:
            return {"a": None, "b": net.b(x), "c": (None, net.c(x))}

        return Function(compute, b=nn.Linear(6, 4), c=nn.Linear(6, 3))

    quantizer = cq.IntegerQuantizer(backend=None).set_global("a8w8").set_io(integer=integer)
    converted = converted_network(build, ((4, 6),), quantizer)
    save_integers(converted, tmp_path / "net")
    (x,) = random_inputs(((4, 6),), 3)
    bundle = load_integers(tmp_path / "net")
    reference = cq.integer_reference(converted, mode="fixed_point")
    if integer:
        x = torch.round(x.clamp(-1, 1) * 100).to(torch.int8)
    wanted = reference(x)
    b, c = bundle(x.numpy())
    assert np.array_equal(b, wanted["b"].numpy())
    assert np.array_equal(c, wanted["c"][1].numpy())
    assert (wanted["a"], wanted["c"][0]) == (None, None)


def test_an_input_handed_through_is_no_integer(tmp_path: Path) -> None:
    converted = converted_network(lambda: Network(lambda x: (x * 2, x)), ((4, 6),))
    with pytest.raises(cq.ConversionError, match="output 1 of the model is"):
        save_integers(converted, tmp_path / "net")


# Rounding ----------------------------------------------------------------------------------------

INT32 = st.integers(-(2**31), 2**31 - 1)
EDGES = [0, 1, -1, 2**30, -(2**30), 2**31 - 1, -(2**31), -(2**31) + 1]
MULTIPLIERS = st.one_of(st.just(0), st.integers(2**30, 2**31 - 1))


def wide(value: int) -> np.ndarray[Any, Any]:
    return np.array(value, dtype=np.int64)


@given(INT32, st.integers(0, 2**31 - 1))
@example(-(2**31), 2**31 - 1)
@example(-(2**30), 1)
@example(2**30, 1)
def test_doubling_high_multiply_is_that_of_the_arithmetic(a: int, b: int) -> None:
    expected = saturating_rounding_doubling_high_mul(torch.tensor(a), b)
    assert int(numpy_runner.doubling_high_multiply(wide(a), wide(b))) == int(expected)


@given(INT32, st.integers(0, 31))
def test_rounding_divide_is_that_of_the_arithmetic(x: int, exponent: int) -> None:
    expected = rounding_divide_by_pot(torch.tensor(x), exponent)
    assert int(numpy_runner.rounding_divide_by_pot(wide(x), wide(exponent))) == int(expected)


@given(st.integers(-(2**62), 2**62), MULTIPLIERS, st.integers(-31, 30))
def test_int32_multiply_is_that_of_the_arithmetic(x: int, multiplier: int, shift: int) -> None:
    accumulator = wrap_int32(torch.tensor(x))
    expected = multiply_by_quantized_multiplier(accumulator, multiplier, shift)
    assert int(numpy_runner.multiply_int32(wide(x), wide(multiplier), wide(shift))) == int(expected)


@given(st.integers(-(2**47), 2**47 - 1), MULTIPLIERS, st.integers(-31, 7))
@example(2**47 - 1, 2**31 - 1, 7)
def test_int64_multiply_is_that_of_the_arithmetic(x: int, multiplier: int, shift: int) -> None:
    expected = multiply_by_quantized_multiplier_int64(torch.tensor(x), multiplier, shift)
    assert int(numpy_runner.multiply_int64(wide(x), wide(multiplier), wide(shift))) == int(expected)


@pytest.mark.parametrize("shift", range(-31, 31))
def test_edges_of_the_int32_multiply(shift: int) -> None:
    values = np.array([e + d for e in EDGES for d in (-2, 0, 1)], dtype=np.int64)
    for multiplier in (0, 2**30, 2**30 + 1, 2**31 - 1):
        expected = multiply_by_quantized_multiplier(
            wrap_int32(torch.from_numpy(values)), multiplier, shift
        )
        actual = numpy_runner.multiply_int32(values, wide(multiplier), wide(shift))
        np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("excess", [2**47, -(2**47) - 1])
def test_an_accumulator_of_more_than_48_bits(excess: int) -> None:
    with pytest.raises(numpy_runner.BundleError, match="48 bits"):
        numpy_runner.multiply_int64(wide(excess), wide(2**30), wide(0))


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.integers(-128, 127),
)
@example([0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, float("inf"), float("-inf")], 1.0, 3)
def test_borders_are_those_of_the_arithmetic(
    values: list[float], scale: float, zero_point: int
) -> None:
    qparams = QParams(scale, zero_point, -128, 127)
    info = numpy_runner.TensorInfo(
        "activation", np.int8, (len(values),), np.array(scale, np.float32), zero_point, -128, 127
    )
    x = np.array(values, dtype=np.float32)
    stored = FIXED_POINT.quantize(torch.from_numpy(x), qparams)
    np.testing.assert_array_equal(numpy_runner.quantize(x, info), stored.numpy())
    real = FIXED_POINT.dequantize(stored, qparams)
    np.testing.assert_array_equal(numpy_runner.dequantize(stored.numpy(), info), real.numpy())


# Accumulators ------------------------------------------------------------------------------------


def extremes_of_layer(converted: GraphModule, layer: nn.Module) -> tuple[int, int]:
    """Largest and smallest sum over every output position of a large image, by convolution."""
    (op,) = (op for op in cq.integer_reference(converted).graph.integer if op.weight is not None)
    weight, bias, qx = op.weight, op.bias, op.inputs[0]
    assert weight is not None
    assert bias is not None
    low, high = qx.quant_min - qx.zero_point, qx.quant_max - qx.zero_point
    exact = copy.deepcopy(layer).double()

    def summed(weight: Tensor, value: int) -> Tensor:
        exact.weight.data = weight.double()
        exact.bias.data = torch.zeros(bias.shape, dtype=torch.float64)
        dims = weight.dim() - 2
        channels = layer.in_channels if dims else layer.in_features
        with torch.no_grad():
            return exact(torch.full((1, channels, *(12,) * dims), value, dtype=torch.float64))

    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    start = bias.double().reshape(1, -1, *(1,) * (weight.dim() - 2))
    largest = summed(positive, high) + summed(negative, low) + start
    smallest = summed(positive, low) + summed(negative, high) + start
    return int(largest.max()), int(smallest.min())


WIDE_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 7), (4, 40)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 8, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 8, 8)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(6, 5, 3), (2, 6, 8, 8)),
    "conv_transpose_half": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2), (2, 8, 8, 8)),
    "conv_transpose_stride": (lambda: nn.ConvTranspose2d(6, 5, 4, stride=2), (2, 6, 8, 8)),
    "conv_transpose_dilated": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), dilation=(1, 2), groups=2),
        (2, 6, 8, 8),
    ),
}


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-symmetric", "a8w3", "a16w8"])
@pytest.mark.parametrize("name", WIDE_LAYERS)
def test_accumulator_bits_are_reached_by_some_input(name: str, scheme: str) -> None:
    build, shape = WIDE_LAYERS[name]
    converted = converted_network(build, (shape,), scheme)
    largest, smallest = extremes_of_layer(converted, build())
    row = accumulators(converted)[0]
    limit = 2 ** (row.bits - 1)
    assert -limit <= smallest
    assert largest < limit
    assert smallest < -limit // 2 or largest >= limit // 2
    assert row.width == (64 if scheme.startswith("a16") else 32)
    assert row.fits


def test_accumulator_bits_of_means_and_products() -> None:
    def function(x: Tensor) -> Any:
        return (x * (x + 0.5)).mean((2, 3))

    shape = (2, 3, 5, 7)
    converted = converted_network(lambda: Network(function), (shape,), "a8w8-symmetric")
    # Zero point 0: offsets reach -128, shifted left by 20 -2**27, 35 of them -4480, products 2**14.
    bits = {row.family: (row.bits, row.width) for row in accumulators(converted)}
    assert bits == {"add": (28, 32), "mul": (16, 32), "mean": (14, 32)}


def test_accumulator_bits_of_matrix_products() -> None:
    shapes = ((3, 5, 40), (3, 40, 7))
    converted = converted_network(lambda: Network(torch.bmm), shapes, "a8w8-symmetric")
    # 40 products of up to 2**14.
    (row,) = accumulators(converted)
    assert (row.family, row.bits, row.width) == ("matmul", 21, 32)


def test_movements_have_no_accumulator() -> None:
    converted = converted_network(
        lambda: Network(lambda x: F.max_pool2d(x * 2, 2).flatten(1)),
        ((2, 3, 4, 4),),
    )
    assert [row.family for row in accumulators(converted)] == ["mul"]


def test_accumulators_of_a_graph_with_float_ops() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1))

    (row,) = accumulators(converted_network(build, ((4, 6),)))
    assert (row.op, row.module, row.fits_int32) == ("linear", "0", True)


# The example of docs/integer_bundle.md -----------------------------------------------------------


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    """The numbers are those of the page; change both or neither."""
    conv = nn.Conv2d(1, 2, 2, padding=1)
    weight = [[[[0.5, -0.25], [0.125, 1.0]]], [[[-0.3, 0.1], [0.2, -0.4]]]]
    conv.weight.data = torch.tensor(weight)
    conv.bias.data = torch.tensor([0.3, -0.1])
    x = torch.tensor([[[[0.2, -0.7], [1.1, 0.4]]]])
    seen = torch.tensor([[[[-1.0, 1.5], [0.5, -0.5]]]])
    model = Network(lambda x, conv: F.relu(conv(x)), conv=conv)
    captured = torch.export.export(model.eval(), (x,)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(seen)
    prepared(x)
    save_integers(convert_pt2e(prepared), tmp_path / "example")
    bundle = load_integers(tmp_path / "example")
    (op,) = bundle.description["ops"]
    assert op["requantization"]["multiplier"] == [1615218689, 1292174951]
    assert op["requantization"]["shift"] == [-6, -7]
    assert op["accumulator"] == {"bits": 17, "width": 32}
    assert bundle.constants[op["weight"]][0].tolist() == [[[64, -32], [16, 127]]]
    assert bundle.constants[op["bias"]].tolist() == [3886, -3238]
    page = Path(__file__).parents[2] / "docs" / "integer_bundle.md"
    assert json.dumps(op["requantization"]["multiplier"]) in page.read_text()
    real, integers = bundle.with_integers(x.numpy())
    first, output = integers[op["inputs"][0]], integers[op["output"]]
    assert first.tolist() == [[[[-6, -97], [86, 15]]]]
    assert output[0, 0].tolist() == [[-52, -128, -96], [77, 42, -128], [-124, -14, -51]]
    assert isinstance(real, np.ndarray)
    assert real[0, 0, 1, 1] == np.float32(1.1166667)


# A trained network -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4", "a16w8"])
def test_resnet20_on_real_images(scheme: str, tmp_path: Path) -> None:
    images, _ = cifar10_test(20)
    calibration = [(batch,) for batch in cifar10_calibration(100)[0].split(20)]
    converted = convert(resnet20(), (images,), scheme, calibration).graph
    description = assert_bundle_equals_fixed_point(converted, tmp_path / "resnet20", images)
    kinds = Counter(op["op"] for op in description["ops"])
    # 19 convolutions and a linear layer; 9 blocks, of which two pad their shortcut.
    assert (kinds["conv"], kinds["linear"], kinds["add"], kinds["pad"]) == (19, 1, 9, 2)


@pytest.mark.parametrize(
    ("padding", "counted", "counts"),
    [(0, False, [6]), (0, True, [6]), (1, False, [1, 2, 3, 4, 6])],
)
def test_a_multiplier_is_written_for_each_number_of_values_in_a_window(
    padding: int, counted: bool, counts: list[int], tmp_path: Path
) -> None:
    def function(x: Tensor) -> Tensor:
        return F.avg_pool2d(x * 2, (3, 2), 1, padding, count_include_pad=counted) * 1.25

    shape = (1, 2, 5, 4)
    save_integers(converted_network(lambda: Network(function), (shape,)), tmp_path / "pool")
    description = load_integers(tmp_path / "pool").description
    (pool,) = (op for op in description["ops"] if op["op"] == "avg_pool2d")
    assert pool["requantization"]["count"] == counts


def test_a_size_that_is_rounded_up_has_to_be_known(tmp_path: Path) -> None:
    sizes = ({2: 2 * torch.export.Dim("half", min=2, max=8)},)
    (x,) = random_inputs(((1, 3, 6, 7),), 1)
    model = Network(lambda x: F.max_pool2d(x * 2, 3, 2, ceil_mode=True))
    prepared = prepare_pt2e(
        torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module(),
        cq.IntegerQuantizer().set_global("a8w8"),
    )
    prepared(x)
    with pytest.raises(cq.ConversionError, match="max_pool2d rounds its output size up"):
        save_integers(convert_pt2e(prepared), tmp_path / "net")


def test_two_sizes_that_are_not_known_cannot_be_written(tmp_path: Path) -> None:
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", max=16)}
    (x,) = random_inputs(((2, 3, 4, 4),), 1)
    model = Network(lambda x: (x + x).unsqueeze(0) * 2.0)
    captured = torch.export.export(model, (x,), dynamic_shapes=(({0: sizes[0], 2: sizes[2]},),))
    prepared = prepare_pt2e(captured.module(), cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    with pytest.raises(cq.ConversionError, match="unsqueeze: more than one size of its result"):
        save_integers(convert_pt2e(prepared), tmp_path / "net")


@pytest.mark.parametrize(("channels", "fits"), [(2**7, True), (2**7 + 1, False)])
def test_the_padded_signal_of_all_channels_is_bounded(channels: int, fits: bool) -> None:
    """At most as many elements as a tensor may have, 2**28."""
    op = {"stride": [1], "padding": {"before": [2**21 - 3], "after": [1]}}
    shape, kernel = (1, channels, 2), [1]
    if fits:
        assert numpy_runner._windows(op, shape, kernel, [1]) == (2**21,)
        return
    with pytest.raises(numpy_runner.BundleError, match="padded input"):
        numpy_runner._windows(op, shape, kernel, [1])


def test_sums_that_no_float_holds_are_integers() -> None:
    """A 32-bit accumulator that overflows keeps the low bits of the sum, which are exact."""
    ends = (-32768, 32767)
    x = np.full((1, 257), -32768, np.int16)
    x[0, -1] = 32766
    weight = np.full((1, 257), 2**30, np.int32)
    weight[0, -1] = 12345
    given = numpy_runner.TensorInfo("activation", "int16", x.shape, np.float32(1), 32767, *ends)
    output = given._replace(zero_point=0, shape=(1, 1))
    one = {"rule": "int32_two_roundings", "multiplier": [2**30], "shift": [1]}
    op = {"op": "linear", "name": "linear", "requantization": one, "clamp": list(ends)}
    total = sum(int(w) * (int(q) - 32767) for w, q in zip(weight[0], x[0], strict=True))
    assert total == -(2**54) + 2**38 - 12345
    assert int(float(total)) != total
    call = numpy_runner.Call(op, [x], [given], output, weight)
    assert numpy_runner._linear(call).tolist() == [[-12345]]
