"""Files of encodings: what AIMET's numbers mean, and that a round trip loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.flow import small_images, small_model
from support.graphs import capture
from support.widths import example_of_widths, prepared_widths, widths
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.core.graph import is_quantize, is_static, qparams_of
from custom_quantizer.reference.interchange.encoding_file import read_encodings
from custom_quantizer.reference.interchange.names import tensor_name


def integers(graph: GraphModule) -> tuple[dict[str, Any], list[Any]]:
    """All constants, and all numbers that stand in the graph itself."""
    numbers = [
        (node.name, [arg for arg in node.args if not isinstance(arg, torch.fx.Node)])
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]
    return {name: value.tolist() for name, value in graph.state_dict().items()}, numbers


@cache
def calibrated() -> GraphModule:
    prepared = prepared_widths()
    prepared(*example_of_widths())
    return prepared


def test_a_round_trip_gives_the_same_graph(tmp_path: Path) -> None:
    """Without any data: every integer, scale and zero point."""
    path = tmp_path / "net.encodings"
    written = cq.save_encodings(calibrated(), path)
    fresh = prepared_widths()
    loaded = cq.load_encodings(fresh, path)
    assert (loaded.missing, loaded.ignored) == ((), ())
    assert sorted(loaded.weights) == list(written.weights)
    assert integers(convert_pt2e(fresh)) == integers(widths()[0])
    cq.save_encodings(calibrated(), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_converted_graph_says_the_same_but_for_its_constants(tmp_path: Path) -> None:
    cq.save_encodings(calibrated(), tmp_path / "prepared")
    summary = cq.save_encodings(widths()[0], tmp_path / "converted")
    prepared, converted = (read_encodings(tmp_path / name) for name in ("prepared", "converted"))
    assert summary.missing == ("_frozen_param0",)
    assert prepared.parameters == converted.parameters
    known = dict(prepared.activations)
    del known["token"]
    assert known == converted.activations
    fresh = prepared_widths()
    assert cq.load_encodings(fresh, tmp_path / "converted").missing == ("token",)
    fresh(*(3 * value for value in example_of_widths()))  # frozen ranges do not follow these
    assert integers(convert_pt2e(fresh)) == integers(widths()[0])


@pytest.mark.parametrize("version", ["1.0.0", "0.6.1"])
def test_both_versions_through_a_folded_batch_norm(version: Any, tmp_path: Path) -> None:
    def prepared() -> GraphModule:
        captured = capture(small_model(), (small_images(4),))
        return prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w4"))

    first, second, path = prepared(), prepared(), tmp_path / "net.json"
    first(small_images(4))
    graph = convert_pt2e(first)
    summary = cq.save_encodings(graph, path, version=version)
    assert summary.weights == ("conv.weight", "linear.weight", "wide.weight")
    assert json.loads(path.read_text())["version"] == version
    assert cq.load_encodings(second, path).missing == ()
    assert integers(convert_pt2e(second)) == integers(graph)


def test_an_offset_means_what_the_format_says(tmp_path: Path) -> None:
    """``real = (q + offset) * scale``, ``q`` counted from 0; in both versions."""
    graph, _ = widths()
    cq.save_encodings(graph, tmp_path / "list")
    written = json.loads((tmp_path / "list").read_text())["activation_encodings"]
    entries = {entry["name"]: entry for entry in written}
    compared = 0
    for node in graph.graph.nodes:
        if not (is_quantize(node) and is_static(node)):
            continue
        own = qparams_of(graph, node)
        for name in (tensor_name(node), f"{tensor_name(node)}#2"):
            entry = entries.get(name)
            if entry is None or entry["scale"] != [own.scale]:
                continue
            q = np.arange(1 << entry["bw"])
            reals = (q + entry["offset"][0]) * entry["scale"][0]
            signed = q - (1 << (entry["bw"] - 1))
            np.testing.assert_array_equal(reals, (signed - own.zero_point) * own.scale)
            compared += 1
    assert compared == len(entries)


def test_what_aimet_wrote_means_what_aimet_computed(tmp_path: Path) -> None:
    """``to_qnn_encoding_dict`` of aimet-torch 2.42, and what its quantizer made of some numbers."""
    affine = {"scale": 0.10000000149011612, "offset": -3, "dtype": "int"}
    weight = {"offset": -128, "bitwidth": 8, "dtype": "int", "is_symmetric": "True"}
    scales = [0.0078125, 0.0019685039296746254]
    by_name = {
        "version": "0.6.1",
        "activation_encodings": {"x": [{**affine, "bitwidth": 4, "is_symmetric": "False"}]},
        "param_encodings": {"w": [{**weight, "scale": scale} for scale in scales]},
    }
    affine = {"name": "x", "dtype": "INT", "bw": 4, "is_sym": False, "enc_type": "PER_TENSOR"}
    weight = {"name": "w", "dtype": "INT", "bw": 8, "is_sym": True, "enc_type": "PER_CHANNEL"}
    listed = {
        "version": "1.0.0",
        "activation_encodings": [{**affine, "scale": [0.10000000149011612], "offset": [-3]}],
        "param_encodings": [{**weight, "scale": scales, "offset": [-128, -128]}],
    }
    files = []
    for document in (by_name, listed):
        (tmp_path / "aimet").write_text(json.dumps(document))
        files.append(read_encodings(tmp_path / "aimet"))
    assert files[0] == files[1]
    assert files[0].parameters["w"].zero_points == (0, 0)
    (x,) = files[0].activations.values()
    rounded = torch.fake_quantize_per_tensor_affine(
        torch.linspace(-0.5, 1.5, 9), x.scales[0], x.zero_points[0], -8, 7
    )
    theirs = [-0.3, -0.2, 0.0, 0.2, 0.5, 0.8, 1.0, 1.2, 1.2]
    torch.testing.assert_close(rounded, torch.tensor(theirs), rtol=2**-23, atol=0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(x)).abs()


def linear() -> GraphModule:
    torch.manual_seed(0)
    captured = capture(Layer(), (torch.randn(4, 3),))
    return prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))


def document() -> dict[str, Any]:
    return {
        "version": "1.0.0",
        "activation_encodings": [
            {"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": False,
             "scale": [0.1], "offset": [-3]},
            {"name": "head", "dtype": "FLOAT", "enc_type": "PER_TENSOR", "bw": 16},
        ],
        "param_encodings": [
            {"name": "head.weight", "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 8,
             "is_sym": True, "scale": [0.01, 0.02], "offset": [-128, -128]},
            {"name": "head.bias", "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 32,
             "is_sym": True, "scale": [0.001, 0.002], "offset": [-2147483648, -2147483648]},
        ],
    }  # fmt: skip


def test_a_file_from_elsewhere(tmp_path: Path) -> None:
    path, prepared = tmp_path / "net.json", linear()
    theirs = document()
    theirs["activation_encodings"][0]["name"] = "input.1"
    path.write_text(json.dumps(theirs))
    loaded = cq.load_encodings(prepared, path, names={"input.1": "x"})
    assert (loaded.activations, loaded.weights) == (("x",), ("head.weight",))
    assert loaded.ignored == ("head.bias",)
    assert loaded.missing == ("linear",)
    prepared(torch.randn(4, 3))
    graph = convert_pt2e(prepared)
    own = next(qparams_of(graph, n) for n in graph.graph.nodes if is_quantize(n))
    assert (own.scale, own.zero_point) == (float(np.float32(0.1)), 3 - 128)
    scale = graph.get_buffer("head_weight_scale")
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.02]), rtol=0, atol=0)
    bias = graph.get_buffer("head_bias_scale")
    torch.testing.assert_close(bias, torch.tensor(own.scale) * scale, rtol=0, atol=0)


def edit(part: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(file: dict[str, Any]) -> None:
        file[f"{part}_encodings"][index].update(values)

    return change


X, W = ("activation", 0), ("param", 0)

WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no such tensor": (edit(*X, name="y.1"), r"1 tensors that the graph does not have: y\.1"),
    "a near name": (edit(*W, name="haed.weight"), r"did you mean head\.weight"),
    "another width": (edit(*X, bw=4, offset=[-3]), "x has 4 bits in the file and 8 in the graph"),
    "another width of a weight": (edit(*W, bw=4, offset=[-8, -8]), "4 bits in the file and 8"),
    "an affine weight": (edit(*W, offset=[-128, -127]), "weights are symmetric"),
    "one scale for a weight": (
        edit(*W, enc_type="PER_TENSOR", scale=[0.1], offset=[-128]),
        "1 scales in the file and 2 in the graph",
    ),
    "channels of an activation": (
        edit(*X, enc_type="PER_CHANNEL", scale=[0.1, 0.2], offset=[-3, -3]),
        "an activation has one",
    ),
    "blocks": (edit(*W, enc_type="PER_BLOCK", block_size=1), "a scale for 1 input channels"),
    "a scale of 0": (edit(*X, scale=[0.0]), r"scale\.0: Input should be greater than 0"),
    "NaN": (edit(*X, scale=[float("nan")]), r"scale\.0"),
    "a scale that float32 has not": (edit(*X, scale=[1e-50]), "QParams.scale"),
    "an offset beyond the integers": (edit(*X, offset=[5]), "zero point -133"),
    "a fraction of an offset": (edit(*X, offset=[0.5]), "offset"),
    "too few offsets": (edit(*W, offset=[-128]), "2 scales and 1 offsets"),
    "twice": (lambda f: f["param_encodings"].append(f["param_encodings"][0]), "occurs twice"),
    "a vector": (edit(*W, enc_type="VECTOR"), "is of enc_type VECTOR"),
    "half steps": (edit(*X, zero_point_shift=[0.5]), "has a zero_point_shift"),
    "a version of later": (lambda f: f.update(version="2.0.0"), r"of version '2\.0\.0'"),
    "by modules": (
        lambda f: f.update(activation_encodings={"head": {"output": {"0": {}}}}),
        "by inputs and outputs of modules",
    ),
    "something else": (dict.clear, "no activation_encodings"),
}  # fmt: skip


@pytest.mark.parametrize("problem", WRONG)
def test_what_does_not_fit_is_said_and_changes_nothing(problem: str, tmp_path: Path) -> None:
    change, message = WRONG[problem]
    file = document()
    change(file)
    path, prepared = tmp_path / "net.json", one_linear()
    path.write_text(json.dumps(file))
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    with pytest.raises(cq.CustomQuantizerError, match=message):
        cq.load_encodings(prepared, path)
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@cache
def one_linear() -> GraphModule:
    """Which none of the files above changes."""
    return linear()


def test_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    for text in ("[" * 100_000, "{", "3", '{"version": "1.0.0"}'):
        path.write_text(text)
        with pytest.raises(cq.InputError, match=r"net\.json (is not JSON|has no activation)"):
            cq.load_encodings(one_linear(), path)
    path.write_text(json.dumps(document()))
    with pytest.raises(cq.InputError, match="has no tensor x1; did you mean x"):
        cq.load_encodings(one_linear(), path, names={"x1": "x"})
    with pytest.raises(cq.CalibrationError, match="prepare_pt2e"):
        cq.load_encodings(cast(Any, nn.Linear(1, 1)), path)
    with pytest.raises(cq.CalibrationError, match="never saw data"):
        cq.save_encodings(one_linear(), path)
    with pytest.raises(cq.InputError, match=r"1\.0\.0 or 0\.6\.1, not '2\.0\.0'"):
        cq.save_encodings(widths()[0], path, version=cast(Any, "2.0.0"))
    with pytest.raises(cq.InputError, match=r"knows no blocks, and grouped\.weight"):
        cq.save_encodings(widths()[0], path, version="0.6.1")
