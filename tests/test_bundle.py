"""Saved integers: what NumPy computes from the two files is what ``fixed_point`` computes."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.models import convert
from support.registry import Surrounded
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.arithmetic import (
    FIXED_POINT,
    QParams,
    multiply_by_quantized_multiplier,
    multiply_by_quantized_multiplier_int64,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
    wrap_int32,
)
from custom_quantizer.integer import numpy_runner
from custom_quantizer.integer.accumulators import accumulators
from custom_quantizer.integer.bundle import load_integers, save_integers
from custom_quantizer.ops import REGISTRY, Case, OpRule

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


def assert_bundle_equals_fixed_point(
    converted: GraphModule, path: Path, *inputs: Tensor
) -> dict[str, Any]:
    """Every output and every integer in between; returns the description."""
    outputs, integers = cq.integer_reference(converted, "fixed_point").with_integers(*inputs)
    save_integers(converted, path)
    bundle = load_integers(path)
    actual, actual_integers = bundle.with_integers(*(x.numpy() for x in inputs))
    actual = actual if isinstance(actual, tuple) else (actual,)
    for real, expected in zip(actual, tree_leaves(outputs), strict=True):
        assert real.dtype == np.float32
        np.testing.assert_array_equal(real, expected.numpy(), strict=True)
    for name, stored in actual_integers.items():
        assert stored.dtype == bundle.description["tensors"][name]["dtype"]
        if name in integers:  # what is quantized a second time goes by another name there
            np.testing.assert_array_equal(stored, integers[name].numpy(), err_msg=name)
    again = bundle(*(x.numpy() for x in inputs))
    np.testing.assert_array_equal(again[0] if isinstance(again, tuple) else again, actual[0])
    return dict(bundle.description)


# Every op ----------------------------------------------------------------------------------------

NOT_EXPRESSED = {("div", "tensors"), ("div", "broadcast")}
CASES = [
    pytest.param(rule, case, id=f"{rule.family}-{case.name}")
    for rule in REGISTRY
    for case in rule.cases
    if not rule.float_reason and (rule.family, case.name) not in NOT_EXPRESSED
]


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-per_tensor", "a16w8"])
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_every_registered_op_runs_with_numpy_bit_for_bit(
    rule: OpRule, case: Case, scheme: str, tmp_path: Path
) -> None:
    converted = converted_network(lambda: Surrounded(rule, case), case.shapes, scheme)
    inputs = random_inputs(case.shapes, 2)
    # Beyond the range seen in calibration, so that something saturates.
    wide = tuple(2.5 * x for x in inputs)
    assert_bundle_equals_fixed_point(converted, tmp_path / "case", *wide)


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
    "ceil_pool": (
        lambda x: F.max_pool2d(x * 2, (3, 2), (2, 3), 1, ceil_mode=True),
        ((1, 3, 12, 9),),
    ),
}


@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
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


EDITS: dict[str, tuple[Callable[[dict[str, Any], Path], object], str]] = {
    "format": (lambda d, _: d.update(format="onnx"), "no description of a network"),
    "version": (lambda d, _: d.update(version=2), "version 2, this reader knows 1"),
    "section": (lambda d, _: d.pop("tensors"), "lacks tensors"),
    "digest": (lambda d, _: d["weights"].pop("sha256"), r"lacks weights\.sha256"),
    "safetensors": (_weights_that_are_none, "cannot be read"),
    "op": (lambda d, _: d["ops"][0].update(op="softmax"), r"op 0 \(conv2d\): no op 'softmax'"),
    "field": (lambda d, _: d["ops"][0].pop("stride"), r"op 0 \(conv2d\) lacks stride"),
    "order": (lambda d, _: d["ops"].reverse(), "which nothing before it computes"),
    "output": (
        lambda d, _: d["outputs"][0].update(tensor="logits"),
        "not computed or not described: logits",
    ),
    "undescribed": (lambda d, _: d["tensors"].pop("relu"), "not computed or not described: relu"),
    "stored": (lambda d, _: d["tensors"].pop("conv2d.bias"), r"disagree .*: conv2d\.bias"),
    "dtype": (
        lambda d, _: d["tensors"]["conv2d.weight"].update(dtype="int16"),
        r"conv2d\.weight is described as int16",
    ),
    "shape": (
        lambda d, _: d["tensors"]["conv2d.weight"].update(shape=[4, 3, 9]),
        r"conv2d\.weight is described as int8 of shape \(4, 3, 9\)",
    ),
    "scale": (
        lambda d, _: d["tensors"]["relu"]["scale"].update(decimal=0.5),
        "relu: the bits and the decimal of its scale differ",
    ),
    "incomplete": (lambda d, _: d["tensors"]["relu"].pop("zero_point"), "relu is incomplete"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_description_that_cannot_be_run_says_why(damaged: Path, name: str) -> None:
    edit, message = EDITS[name]
    file = damaged.with_suffix(".json")
    document = json.loads(file.read_text())
    edit(document, damaged)
    file.write_text(json.dumps(document))
    with pytest.raises(cq.InputError, match=message):
        load_integers(damaged)


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
    page = Path(__file__).parents[1] / "docs" / "integer_bundle.md"
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
