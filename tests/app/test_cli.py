from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from support.flow import small_images, small_labels, small_model, small_result
from torch import nn

import custom_quantizer as cq
from custom_quantizer.app.cli import cli
from custom_quantizer.app.saved_graph import load_graph
from custom_quantizer.backends.xnnpack import load_program
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference.bundle import load_integers
from custom_quantizer.reference.interpreter import integer_reference

COMMANDS = [
    *("calibrate", "demo", "diagnose", "evaluate", "export-c", "export-integers", "export-onnx"),
    *("inspect", "plan", "profile", "quantize", "report", "search", "sensitivity", "verify"),
]


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="custom-quantizer")


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _as_in_main() -> Iterator[None]:
    """PyTorch logs what it raises; ``main`` turns that off for the process."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file, its weights, and data, as a user would have them."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(
        "from support.flow import Small, small_model\n\ndef raises():\n    raise ValueError('no')\n"
        "class Heads(Small):\n    def forward(self, x):\n"
        "        y = super().forward(x)\n        return y[:, :2], y\n"
    )
    torch.save(small_model().state_dict(), folder / "net.pt")
    images, labels = small_images(40), small_labels(40)
    np.savez(folder / "data.npz", images=images.numpy(), labels=labels.numpy())
    np.save(folder / "unlabelled.npy", images.numpy())
    np.save(folder / "last.npy", images.movedim(1, -1).numpy())
    (folder / "all.txt").write_text("b\na\nc\n")
    (folder / "abc.txt").write_text("b\n\nc\n d\n")
    config = IntegerQuantizer().set_global("a8w8").set_module_name("linear", None).to_config()
    (folder / "mixed.yaml").write_text(json.dumps(config))
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((10, 9), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def program(work: Path) -> Path:
    """What ``quantize`` wrote."""
    output = work / "net.pte"
    text = ok(
        *("quantize", f"{work}/net.py:Small", "--weights", work / "net.pt"),
        *("--calibration", work / "data.npz", "--calibration-samples", 32, "-o", output),
        *("--html", work / "net.html"),
    )
    assert "net.py:Small: 5 ops: 5 integer kernel\n" in text
    assert "13 int32 in 3 layers, read back from the file and equal" in text
    assert "32 samples in 32 batches" in text
    assert "delegate calls: 1; kernels outside: 0" in text
    return output


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str) -> None:
    text = ok(command, "--help")
    assert f"Usage: custom-quantizer {command}" in text
    assert f"Examples:\n    custom-quantizer {command} " in text
    assert run(command, "-h").stdout == text


def test_all_commands_are_listed() -> None:
    text = ok("--help")
    assert [name for name in COMMANDS if f"\n  {name} " in text] == COMMANDS
    assert set(cli.commands) == set(COMMANDS)


# -- commands --------------------------------------------------------------------------------------


def test_quantize_writes_program_and_report(work: Path, program: Path) -> None:
    report = json.loads(program.with_suffix(".json").read_text())
    assert report["lowering"]["size_bytes"] == program.stat().st_size
    # The same model, data and scheme as in Python, one sample at a time.
    assert load_program(program).contents.inputs[0].shape == (1, 1, 8, 8)
    integers = [row["bias"]["integers"] for row in report["report"]["rows"] if row["bias"]]
    assert [len(bias) for bias in integers] == [4, 6, 3]


def test_quantize_images_with_a_config_and_a_dynamic_batch(work: Path, tmp_path: Path) -> None:
    text = ok(
        *("quantize", f"{work}/net.py:small_model", "--calibration", work / "images"),
        *("--resize", "8,8", "--mean", "0.5", "--std", "0.25", "--config", work / "mixed.yaml"),
        *("--dynamic-batch", "-o", tmp_path / "out"),
    )
    assert "6 samples in 1 batches" in text
    assert "linear (linear): xnnpack float" in text
    assert "10 int32 in 2 layers" in text
    contents = load_program(tmp_path / "out" / "model.pte").contents
    assert contents.inputs[0].shape == (64, 1, 8, 8)
    assert (tmp_path / "out" / "report.json").is_file()


def test_quantize_from_statistics(work: Path, program: Path, tmp_path: Path) -> None:
    model = (f"{work}/net.py:Small", "--weights", work / "net.pt")
    stats = tmp_path / "net.stats.safetensors"
    data = ("--data", work / "data.npz", "--samples", 32)
    text = ok("calibrate", *model, *data, "-o", stats, "--checkpoint", tmp_path / "done")
    assert text.startswith("32 samples in 32 batches")
    assert text.endswith(f"wrote {stats}, which quantize --statistics takes\n")
    shown = json.loads(ok("calibrate", *model, *data, "-o", stats, "--json"))
    assert [row["name"] for row in shown["tensors"]][-1] == "linear"
    output = tmp_path / "net.pte"
    ok("quantize", *model, "--statistics", stats, "-o", output)
    for suffix in (".pte", ".graph.safetensors"):
        assert output.with_suffix(suffix).read_bytes() == program.with_suffix(suffix).read_bytes()
    found, wanted = (
        json.loads(file.with_suffix(".json").read_text()) for file in (output, program)
    )
    assert found["report"].pop("findings") is None
    assert wanted["report"].pop("findings")["tensors"]  # of data, for the page
    assert found == wanted
    asked = ("--statistics", stats, "--scheme", "a8w4", "-o", tmp_path / "four.pte")
    result = run("quantize", *model, *asked)
    assert result.exit_code == 1
    assert "give calibration data as well, or ask for accuracy 'plain'" in result.stderr
    ok("quantize", *model, *asked, "--accuracy", "plain")
    other = run("quantize", f"{work}/net.py:Small", "--statistics", stats, "-o", output)
    assert (other.exit_code, other.stdout) == (1, "")
    assert "statistics of other weights than this model has: conv.weight" in other.stderr


def test_inspect_a_program(program: Path, tmp_path: Path) -> None:
    text = ok("inspect", program)
    assert "3 integer biases" in text
    assert json.loads(ok("inspect", program, "--json"))["kind"] == "program"
    page = tmp_path / "page.html"
    assert ok("inspect", program, "--html", page) == ""
    assert page.read_text().startswith("<!")


def test_quantize_writes_a_page_with_what_was_measured(program: Path) -> None:
    report = json.loads(program.with_suffix(".json").read_text())["report"]
    measured = report["findings"]["tensors"]
    assert measured["samples"] == 32
    page = program.with_suffix(".html").read_text()
    assert "<h1>net</h1>" in page
    for tensor in measured["tensors"]:
        assert f"{tensor['sqnr']:.1f} dB with all before it" in page
        assert sum(tensor["histogram"]) % 32 == 0


def test_report_shows_what_is_stored(program: Path, tmp_path: Path) -> None:
    text = ok("report", program)
    assert (
        text
        == ok("report", program.with_suffix(".json"))
        == ok("inspect", program.with_suffix(".json"))
    )
    assert "output 0 (linear): SQNR " in text
    assert "Ops that lose most, and what may help:" in text
    page = tmp_path / "page.html"
    assert ok("report", program, "--html", page) == ""
    assert page.read_text() == program.with_suffix(".html").read_text()
    # What it prints as JSON is a report by itself.
    (tmp_path / "all.json").write_text(ok("report", program, "--json"))
    assert ok("report", tmp_path / "all.json") == text


@pytest.mark.slow
def test_report_measures_on_data(work: Path, program: Path, tmp_path: Path) -> None:
    for suffix in (".pte", ".graph.safetensors"):
        shutil.copy(program.with_suffix(suffix), tmp_path / f"bare{suffix}")
    bare = tmp_path / "bare.pte"
    # Without its report, it is made of the graph.
    made = json.loads(ok("report", bare, "--json"))
    assert made["findings"] is None
    assert made["lowering"]["size_bytes"] == program.stat().st_size
    alone = json.loads(ok("report", bare, "--data", work / "data.npz", "--json"))["findings"]
    assert [model["name"] for model in alone["evaluation"]["models"]] == ["bare.pte"]
    assert {tensor["sqnr"] for tensor in alone["tensors"]["tensors"]} == {None}
    model = ("--model", f"{work}/net.py:Small", "--weights", work / "net.pt")
    text = ok("report", program, "--data", work / "data.npz", *model)
    assert "float model  40 of 40  100.00 %" in text
    both = json.loads(ok("report", program, "--data", work / "data.npz", *model, "--json"))
    low, high = both["findings"]["evaluation"]["models"][1]["top1_interval"]
    assert 0.8 < low < high <= 1
    shared = {t["name"]: t["histogram"] for t in both["findings"]["tensors"]["tensors"]}
    assert shared == {t["name"]: t["histogram"] for t in alone["tensors"]["tensors"]}


def test_report_takes_sensitivity_and_a_search(work: Path, program: Path, tmp_path: Path) -> None:
    data = ("--data", work / "data.npz", "--samples", 24, "--schemes", "a8w8,a8w4")
    model = (f"{work}/net.py:Small", "--weights", work / "net.pt")
    (tmp_path / "s.json").write_text(ok("sensitivity", *model, *data, "--json"))
    text = ok("report", program, "--sensitivity", tmp_path / "s.json")
    assert "Sensitivity:" in text
    assert "weight conv2d" in text
    refused = run("report", program, "--search", tmp_path / "no.json")
    assert refused.exit_code == 1
    assert "no.json" in refused.stderr


def test_reports_that_do_not_belong_to_the_program(program: Path, tmp_path: Path) -> None:
    def refused(*args: object) -> str:
        result = run("report", *args)
        assert result.exit_code == 1, result.output
        return result.stderr

    other = tmp_path / "net.pte"
    other.write_bytes(program.read_bytes() + b"x")
    assert "net.json beside " in refused(other)
    assert "and no net.graph.safetensors" in refused(other)
    shutil.copy(program.with_suffix(".json"), tmp_path / "net.json")
    assert "net.json is the report of another program than " in refused(other)
    (tmp_path / "net.json").write_text("{}")
    assert "report of another program" in refused(other)
    (tmp_path / "net.json").write_text("[")
    assert "net.json is not JSON" in refused(other)
    assert "none.pte: no such file; name a .pte or the .json beside it" in refused(
        tmp_path / "none.pte"
    )
    damaged = json.loads(program.with_suffix(".json").read_text())
    damaged["report"]["rows"][0]["compute"] = "magic"
    (tmp_path / "net.json").write_text(json.dumps(damaged))
    assert "net.json: the report is damaged at rows.0.compute" in refused(tmp_path / "net.json")
    shutil.copy(program.with_suffix(".json"), tmp_path / "far.json")
    (tmp_path / "data").mkdir()
    lonely = json.loads((tmp_path / "far.json").read_text())["report"]
    (tmp_path / "data" / "far.json").write_text(json.dumps(lonely))
    assert "nothing to run" in refused(
        tmp_path / "data" / "far.json", "--data", program.parent / "data.npz"
    )
    assert "is a directory without a report.json" in refused(tmp_path / "data")
    page = tmp_path / "nowhere" / "page.html"
    assert "nowhere does not exist; create it first" in refused(program, "--html", page)
    assert run("report", program, "--model", "resnet18").exit_code == 2


def test_inspect_a_saved_result(program: Path, tmp_path: Path) -> None:
    report = program.with_suffix(".json")
    assert json.loads(ok("inspect", report, "--json"))["kind"] == "graph"
    text = ok("inspect", report, "--op", "linear")
    expected = json.loads(report.read_text())["report"]["rows"][-1]["bias"]["integers"]
    assert all(str(value) in text for value in expected)
    small_result().save(tmp_path)
    assert ok("inspect", tmp_path) == ok("inspect", tmp_path / "report.json")
    assert ok("report", tmp_path) == ok("report", tmp_path / "model.pte")


def test_inspect_shows_the_scales_of_the_file(program: Path) -> None:
    document = json.loads(ok("inspect", program, "--json"))
    row = next(row for row in document["rows"] if row["kind"] == "fully_connected")
    delegate = load_program(program).contents.delegates[0]
    op = next(op for op in delegate.ops if op.kind == "fully_connected")
    source = delegate.tensors[op.inputs[0]]
    assert row["inputs"][0]["scales"] == [source.scale]
    assert row["inputs"][0]["zero_point"] == source.zero_point
    assert row["bias"]["integers"] == delegate.bias(op).tolist()
    assert row["bias"]["derived"] is True


def test_evaluate(work: Path, program: Path) -> None:
    args = ("evaluate", program, "--data", work / "data.npz")
    float_model = ("--model", f"{work}/net.py:Small", "--weights", work / "net.pt")
    document = json.loads(ok(*args, *float_model, "--json"))
    first, second = document["models"]
    assert (first["name"], first["correct"], first["agreement"]) == ("float model", 40, 1.0)
    assert (second["name"], second["samples"]) == ("net.pte", 40)
    assert second["correct"] == second["agreeing"]
    assert "net.pte" in ok(*args, "--samples", 5)
    text = ok("evaluate", program, "--data", work / "unlabelled.npy", *float_model)
    assert f"{second['agreeing']} / 40" in text


def test_verify(work: Path, program: Path, tmp_path: Path) -> None:
    text = ok("verify", program, "--samples", 3)
    assert text.startswith("bit-exact: yes\n")
    assert "0 of 9 values differ" in text
    document = json.loads(ok("verify", program, "--data", work / "data.npz", "--json"))
    assert document["bit_exact"] is True
    assert document["outputs"][0]["values"] == 20 * 3
    # One bit of one weight: the program still loads, and is not what the graph says.
    contents = load_program(program).contents.delegates[0]
    op = next(op for op in contents.ops if op.kind == "conv2d")
    weight = contents.tensors[op.weight if op.weight is not None else -1].array().tobytes()
    data = program.read_bytes()
    at = data.index(weight)
    broken = tmp_path / "broken.pte"
    broken.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    result = run("verify", broken, "--graph", program.with_suffix(".graph.safetensors"))
    assert result.exit_code == 1
    assert "error: " in result.stderr or "bit-exact: NO" in result.stdout


@pytest.mark.slow
def test_verify_takes_what_is_enlarged_in_float_at_the_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=4, mode="bilinear"))
    x = torch.randn(1, 3, 9, 8)
    cq.quantize(model.eval(), (x,), [x]).save(tmp_path / "net.pte")
    text = ok("verify", tmp_path / "net.pte")
    assert text.startswith("bit-exact: no, and within what is derived for the float ops at its end")
    document = json.loads(ok("verify", tmp_path / "net.pte", "--json"))
    assert (document["bit_exact"], document["as_derived"]) == (False, True)
    (output,) = document["outputs"]
    assert 0 < output["max_abs"] <= output["bound"]
    assert (output["beyond"], output["values"]) == (0, 20 * 4 * 28 * 24)


def test_a_model_with_two_heads(work: Path, program: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads.pte"
    quantized = ("quantize", f"{work}/net.py:Heads", "--weights", work / "net.pt")
    text = ok(*quantized, "--calibration", work / "data.npz", "-o", heads, "--json")
    assert json.loads(text) == json.loads(heads.with_suffix(".json").read_text())
    data = ("evaluate", heads, "--data", work / "data.npz")
    note = "scores are those of output 0, the first of 2; --output N chooses another"
    assert note in ok(*data)
    assert note not in ok(*data, "--output", 0)
    one, two = (
        json.loads(ok(*args, "--json"))["models"][0]
        for args in ((*data, "--output", 1), ("evaluate", program, "--data", work / "data.npz"))
    )
    assert one["correct"] == two["correct"]
    other = run("verify", program, "--graph", heads.with_suffix(".graph.safetensors"))
    assert other.exit_code == 1
    assert "error: the program was not made of this graph" in other.stderr


def test_what_is_done_to_data_is_said(work: Path, program: Path) -> None:
    said = run("evaluate", program, "--data", work / "images", *GRAY, "--classes", work / "all.txt")
    assert said.exit_code == 0, said.output
    assert said.stderr.startswith(
        f"{work}/images: 6 samples of 8-bit images, resized to 8x8, scaled to [0, 1], "
        "less mean 0.5, by std 0.5\n"
    )
    for dtype, words in (
        ("float64", "float64 values, converted to float32, not scaled"),
        ("float32", "float32 values, taken as they are"),
        ("uint8", "uint8 images, scaled to [0, 1], less mean 0.5, by std 0.5"),
    ):
        images = small_images(2).numpy().astype(dtype)
        np.savez(work / "typed.npz", images=images, labels=np.arange(2))
        said = run("evaluate", program, "--data", work / "typed.npz", *GRAY[:4])
        assert f"typed.npz: 2 samples of {words}\n" in said.stderr


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("custom_quantizer.app.models.check_model_name", interrupted)
    result = run("plan", "resnet18")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    result = CliRunner().invoke(cli, ["inspect", "no.pte"], color=True)
    assert ("\x1b[31m" in result.stderr) == (no_color == "")


def test_diagnose(work: Path, program: Path, tmp_path: Path) -> None:
    model = ("--model", f"{work}/net.py:Small", "--weights", work / "net.pt")
    data = ("--data", work / "data.npz", "--samples", 8)
    text = ok("diagnose", program, *model, *data, "--plot", tmp_path / "errors.svg")
    assert text.startswith("8 samples; SQNR in dB\n")
    assert "</svg>" in (tmp_path / "errors.svg").read_text()
    found = json.loads(ok("diagnose", program, *model, *data, "--json"))
    assert found["kind"] == "diagnosis"
    other = run("diagnose", program, "--model", f"{work}/net.py:Heads", *data)
    assert (other.exit_code, other.stdout) == (1, "")
    assert "error: " in other.stderr


def test_sensitivity_and_search(work: Path, tmp_path: Path) -> None:
    model = (f"{work}/net.py:Small", "--weights", work / "net.pt", "--data", work / "data.npz")
    options = ("--samples", 32, "--batch", 8, "--schemes", "a8w8,a8w4")
    text = ok("sensitivity", *model, *options)
    assert text.startswith("32 samples; SQNR of the outputs in dB")
    found = json.loads(ok("sensitivity", *model, *options, "--estimate-only", "--json"))
    assert found["kind"] == "sensitivity"
    file = tmp_path / "mixed.yaml"
    asked = (*options, "--budget", "weight_bits=0.7", "--points", 1)
    text = ok("search", *model, *asked, "-o", file)
    assert "a8w4 everywhere" in text
    assert "measured on 8 samples held back" in text
    validation = ("--validation", work / "data.npz", "--validation-samples", 16)
    found = json.loads(ok("search", *model, *asked, *validation, "--json"))
    assert (found["kind"], found["held_back"]) == ("search", 16)
    planned = ok("plan", model[0], "--input-shape", "1,1,8,8", "--config", file, "--json")
    schemes = {op["node"]: op["scheme"] for op in json.loads(planned)["ops"]}
    (best,) = (point for point in found["points"] if point["name"] == found["best"])
    assert {name: schemes[name] for name in best["chosen"]} == best["chosen"]


@pytest.mark.parametrize("suffix", [".pte", ".graph.safetensors"])
def test_export_integers(work: Path, program: Path, tmp_path: Path, suffix: str) -> None:
    text = ok("export-integers", program.with_suffix(suffix), tmp_path / "net")
    assert text.split() == [
        *("wrote", str(tmp_path / "net.json"), "wrote", str(tmp_path / "net.safetensors"))
    ]
    converted, _ = load_graph(program.with_suffix(".graph.safetensors"))
    images = small_images(1)
    (expected,) = integer_reference(converted, "fixed_point")(images)
    np.testing.assert_array_equal(load_integers(tmp_path / "net")(images.numpy())[0], expected)


def test_export_c(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "firmware"
    text = ok("export-c", program, folder, "--name", "small", "--vectors", 1, "--batch", 3)
    assert text.startswith(f"{folder}: 8 files; ")
    done = subprocess.run(["make", "-s", "-C", folder, "test"], capture_output=True, text=True)
    assert done.stdout == "0 of 9 values differ\n", done


@pytest.mark.slow
def test_export_onnx(program: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[dev]'")
    path = tmp_path / "net.onnx"
    text = ok("export-onnx", program, path, "--activations", "int8")
    assert text.startswith(f"{path}: opset 21, {path.stat().st_size:,} bytes\n")
    assert "5 ops between integers, 0 in float" in text
    converted, _ = load_graph(program.with_suffix(".graph.safetensors"))
    images = small_images(1)
    options = onnxruntime.SessionOptions()
    # What it fuses by default saturates on CPUs without VNNI.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (got,) = onnxruntime.InferenceSession(path, options).run(None, {"x": images.numpy()})
    np.testing.assert_array_equal(got, converted(images).numpy())


def test_evaluate_compares_programs(work: Path, program: Path, tmp_path: Path) -> None:
    copy = tmp_path / program.name
    copy.write_bytes(program.read_bytes())
    args = ("evaluate", program, copy, "--data", work / "data.npz", "--slices", 4)
    text = ok(*args)
    assert "top-1 on 4 disjoint slices" in text
    assert "are right on exactly the same of 40 samples" in text
    document = json.loads(ok(*args, "--json"))
    # Of one file name, so their paths tell them apart.
    assert [model["name"] for model in document["models"]] == [str(program), str(copy)]
    assert [len(model["slices"]) for model in document["models"]] == [4, 4]
    assert document["models"][1]["against_first"]["p_value"] == 1.0
    # Without labels they are still compared with each other.
    text = ok("evaluate", program, copy, "--data", work / "unlabelled.npy")
    assert "40 / 40" in text


def test_plan(work: Path) -> None:
    args = ("plan", f"{work}/net.py:Small", "--input-shape", "2,1,8,8")
    text = ok(*args)
    assert "5 ops: 5 integer kernel; about " in text
    document = json.loads(ok(*args, "--config", work / "mixed.yaml", "--json"))
    schemes = {op["node"]: op["scheme"] for op in document["ops"]}
    assert schemes["linear"] is None
    assert schemes["conv2d"] == "a8w8"
    assert "a8w4" in ok(*args, "--scheme", "a8w4")


@pytest.mark.parametrize(
    ("sizes", "values"),
    [
        ("--dynamic-batch", 60),
        pytest.param("--input-shape 5 --input-shape 5,2", 300, marks=pytest.mark.slow),
    ],
)
def test_models_that_read_indices(work: Path, sizes: str, values: int) -> None:
    (work / "tagger.py").write_text(
        "import torch\nclass Tagger(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.rows = torch.nn.Embedding(9, 4)\n"
        "        self.linear = torch.nn.Linear(6, 3)\n    def forward(self, ids, x):\n"
        "        return self.linear(torch.cat([self.rows(ids), x], 1))\n"
    )
    ids, x = np.arange(40, dtype=np.int64) % 9, np.zeros((40, 2), np.float32)
    np.savez(work / "tags.npz", **{"inputs.0": ids, "inputs.1": x + 1})
    model = f"{work}/tagger.py:Tagger"
    text = ok("plan", model, "--input-shape", "int64:1", "--input-shape", "1,2")
    assert "linear" in text
    output = work / "tags.pte"
    data = ("--calibration", work / "tags.npz", "-o", output)
    ok("quantize", model, *data, *sizes.split())
    # Nobody has to bring data: no random integers stand for indices, but the example's do.
    assert f"0 of {values} values differ" in ok("verify", output)
    assert f"0 of {values // 20}" in ok("profile", output, "--runs", 1)


def test_model_arguments(work: Path) -> None:
    (work / "wide.py").write_text(
        "import torch\ndef make(width, bias=True):\n    return torch.nn.Linear(4, width, bias)\n"
    )
    args = ("plan", f"{work}/wide.py:make", "--input-shape", "1x4", "--json")
    document = json.loads(ok(*args, "--model-arg", "width=3", "--model-arg", "bias=false"))
    assert [tensor["role"] for tensor in document["ops"][0]["tensors"]] == [
        "input",
        "weight",
        "output",
    ]


# -- errors ----------------------------------------------------------------------------------------

Args = Callable[[Path], list[object]]


def quantize(model: str = "net.py:Small", data: str = "data.npz", *more: object) -> Args:
    return lambda work: [
        *("quantize", f"{work}/{model}", "--calibration", work / data),
        *("-o", work / "bad.pte"),
        *more,
    ]


def plain(*args: object) -> Args:
    return lambda work: [str(arg).replace("WORK", str(work)) for arg in args]


GRAY = ("--mean", "0.5", "--std", "0.5", "--resize", "8,8")

OURS: dict[str, tuple[Args, list[str]]] = {
    "unknown model": (
        plain("quantize", "resnt18", "--calibration", "x", "-o", "WORK/x.pte"),
        ["no model 'resnt18'", "resnet18"],
    ),
    "unknown function": (quantize("net.py:Smal"), ["has no 'Smal'", "did you mean Small"]),
    "wrong model argument": (
        quantize("net.py:Small", "data.npz", "--model-arg", "width=3"),
        ["width"],
    ),
    "missing weights": (
        quantize("net.py:Small", "data.npz", "--weights", "no.pt"),
        ["no.pt"],
    ),
    "missing data": (quantize("net.py:Small", "no.npz"), ["no.npz"]),
    "images of another size": (
        quantize("net.py:Small", "images", "--mean", "0.5", "--std", "0.5", "--resize", "7"),
        ["does not run on the example inputs", "[1, 1, 7, 7]"],
    ),
    "colours for a gray model": (
        quantize("net.py:Small", "images", "--resize", "8,8"),
        ["does not run on the example inputs", "[1, 3, 8, 8]"],
    ),
    "data of another shape than asked for": (
        quantize("net.py:Small", "data.npz", "--input-shape", "2,1,9,9"),
        ["batch 0", "[40, 1, 8, 8]", "[2, 1, 9, 9]"],
    ),
    "unknown scheme": (quantize("net.py:Small", "data.npz", "--scheme", "int8"), ["'int8'"]),
    "missing config": (
        quantize("net.py:Small", "data.npz", "--config", "no.yaml"),
        ["no.yaml", "no such file"],
    ),
    "std of zero": (
        quantize("net.py:Small", "images", "--mean", "0.5", "--std", "0"),
        ["std above 0"],
    ),
    "no directory": (
        plain("quantize", "net", "--calibration", "x", "-o", "WORK/no/x.pte"),
        ["no does not exist", "create it first"],
    ),
    "a directory named .pte": (
        plain("quantize", "net", "--calibration", "x", "-o", "WORK/folder.pte"),
        ["folder.pte: it is a directory"],
    ),
    "truncated program": (plain("inspect", "WORK/short.pte"), ["short.pte", "truncated"]),
    "truncated program to run": (
        plain("evaluate", "WORK/short.pte", "--data", "WORK/data.npz"),
        ["short.pte", "truncated"],
    ),
    "missing program": (plain("inspect", "WORK/no.pte"), ["no.pte", "No such file"]),
    "missing report": (plain("inspect", "WORK/no.json"), ["no.json", "no such file"]),
    "directory without a report": (plain("inspect", "WORK/images"), ["report.json"]),
    "no JSON": (plain("inspect", "WORK/broken.json"), ["broken.json is not JSON"]),
    "other JSON": (plain("inspect", "WORK/other.json"), ["not a 'graph' report"]),
    "JSON list": (plain("inspect", "WORK/list.json"), ["not a 'graph' report"]),
    "a cost that is not known": (
        plain("search", "WORK/net.py:Small", "--data", "WORK/data.npz", "--budget", "sise=1"),
        ["unknown key 'sise'", "did you mean size?"],
    ),
    "a search into another format": (
        plain("search", "resnet18", "--data", "x", "--budget", "size=1", "-o", "x.txt"),
        ["x.txt"],
    ),
    "no graph to export": (
        plain("export-c", "WORK/no.pte", "WORK/c"),
        ["no.pte: there is no such file"],
    ),
    "no C name": (plain("export-c", "WORK/net.pte", "WORK/c", "--name", "1st"), ["'1st'"]),
    "integers in no directory": (
        plain("export-integers", "WORK/net.pte", "WORK/no/net"),
        ["no does not exist", "create it first"],
    ),
    "folders of some classes": (
        plain("evaluate", "WORK/net.pte", "--data", "WORK/images", *GRAY),
        ["2 classes (a, b)", "scores 3", "--classes FILE"],
    ),
    "a folder that is no class": (
        plain("evaluate", "WORK/net.pte", "--data", "WORK/images", "--classes", "WORK/abc.txt"),
        ["a is none of the 3 classes"],
    ),
    "an output that is not there": (
        plain("evaluate", "WORK/net.pte", "--data", "WORK/data.npz", "--output", 1),
        ["has no output 1", "returns 1, from 0"],
    ),
    "channels last": (
        quantize("net.py:Small", "last.npy"),
        ["looks channels-last", "permute(0, 3, 1, 2)"],
    ),
    "channels last to verify": (
        plain("verify", "WORK/net.pte", "--data", "WORK/last.npy"),
        ["looks channels-last", "movedim"],
    ),
    "images of another size to verify": (
        plain("verify", "WORK/net.pte", "--data", "WORK/images", *GRAY[:4]),
        ["must have shape (1, 1, 8, 8)", "--resize"],
    ),
    "a place for no files": (
        lambda work: [*quantize()(work)[:-2], "-o", "/proc/o.pte"],
        ["no file can be made in /proc"],
    ),
    "a model that raises": (quantize("net.py:raises"), ["ValueError: no", "net.py:4"]),
    "a graph to inspect": (
        plain("inspect", "WORK/net.graph.safetensors"),
        ["is a saved graph (.graph.safetensors), not a .pte", "name the .pte"],
    ),
    "no graph beside the program": (
        plain("verify", "WORK/net.pte", "--graph", "WORK/no.graph.safetensors"),
        ["no.graph.safetensors"],
    ),
    "unknown op": (plain("inspect", "WORK/net.json", "--op", "lineer"), ["did you mean linear"]),
    "unwritable page": (
        plain("inspect", "WORK/net.pte", "--html", "WORK/no/page.html"),
        ["no/page.html"],
    ),
    "nothing to measure": (
        plain("evaluate", "WORK/net.pte", "--data", "WORK/unlabelled.npy"),
        ["has no labels"],
    ),
    "demo without a place": (plain("demo", "--output", "WORK/net.py"), ["net.py"]),
}


@pytest.mark.parametrize("name", OURS)
def test_our_errors_exit_with_1(work: Path, program: Path, name: str) -> None:
    (work / "short.pte").write_bytes(program.read_bytes()[:-1000])
    (work / "folder.pte").mkdir(exist_ok=True)
    for file, text in (("broken", "{"), ("other", '{"a": 1}'), ("list", "[]")):
        (work / f"{file}.json").write_text(text)
    args, words = OURS[name]
    result = run(*args(work))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output
    assert not (work / "bad.pte").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (plain("quantise"), "No such command 'quantise'"),
        (plain("quantize"), "Missing argument 'MODEL'"),
        (plain("quantize", "net"), "Missing option"),
        (plain("quantize", "net", "--calibration", "x", "-o", "x.bin"), "name a .pte file"),
        (quantize("n", "d", "--calibration-samples", "0"), "0 is not in the range x>=1"),
        (quantize("n", "d", "--input-shape", "1,a"), "'1,a' is not a list of numbers"),
        (quantize("n", "d", "--input-shape", "int3:1,2"), "or int64, not 'int3'"),
        (quantize("n", "d", "--input-shape", "1,0"), "'1,0' has a number below 1"),
        (quantize("n", "d", "--resize", "1,2,3"), "'1,2,3' has 3 numbers, not 1 or 2"),
        (quantize("n", "d", "--model-arg", "width"), "'width' is not NAME=VALUE"),
        (quantize("n", "d", "--scheme", "a8w8", "--config", "c.yaml"), "exclude each other"),
        (plain("evaluate", "x.pte", "--data", "d", "--weights", "w"), "which is not given"),
        (plain("quantize", "n", "--statistics", "s", "-o", "x", "--dynamic-batch"), "leave it out"),
    ],
)
def test_wrong_use_exits_with_2(work: Path, args: Args, words: str) -> None:
    result = run(*args(work))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(tmp_path: Path, before: bool) -> None:
    command = ["inspect", str(tmp_path / "no.pte")]
    result = run(*(["--debug", *command] if before else [*command, "--debug"]))
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "FileNotFoundError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_random_weights_are_warned_of_in_a_real_process(work: Path) -> None:
    command = [sys.executable, "-m", "custom_quantizer", "quantize", "squeezenet1_1"]
    result = subprocess.run(
        [*command, "--calibration", str(work / "no"), "-o", str(work / "bad.pte")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["warning", "error"]
    assert "squeezenet1_1 has random weights" in result.stderr
    assert result.stdout == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_on_a_full_disk_is_one_error() -> None:
    command = [sys.executable, "-m", "custom_quantizer", "--help"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: the output cannot be written: No space left on device\n"
