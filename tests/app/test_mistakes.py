"""Mistakes that people make at the command line: what they read then says what, where and the fix.

Each is a command line, its exit code and what the message must say. None shows a traceback, and
none leaves a file behind.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from support.flow import small_images, small_labels, small_model

from custom_quantizer.app.cli import cli

pytestmark = pytest.mark.slow

NET = """
import sys
import torch
from torch import nn
from support.flow import Small, small_model

number = 3
def needs(width): return small_model()
def raises(): raise ValueError("no luck")
def nothing(): pass
def exits(): sys.exit(5)
class NoModule: pass
class Bad(nn.Module):
    def forward(self, x):
        raise RuntimeError("inside")
class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
class Diverged(Small):
    def __init__(self):
        super().__init__()
        self.linear.bias.data[0] = float("nan")
class Identity(nn.Module):
    def forward(self, x): return x
class Two(Small):
    def forward(self, x, y): return super().forward(x + y)
class Half(Small):
    def __init__(self):
        super().__init__()
        self.half()
class Training(Small):
    def __init__(self):
        super().__init__()
        self.train()
"""

YAML = {
    "tab": "version: 1\n\tglobal: a8w8\n",
    "twice": "version: 1\nglobal: a8w8\nglobal: a4w4\n",
    "typo": "version: 1\nglobl: a8w8\n",
    "types": "version: 1\nglobal: [1]\nrules: 3\n",
    "list": "- a\n",
    "empty": "",
    "other": "version: 1\nglobal: a8w8\nrules:\n- module_name: layer1.conv\n  scheme: a8w4\n",
    "newer": "version: 99\nglobal: a8w8\n",
}


def images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "net.py").write_text(NET)
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "imports.py").write_text("import not_there\n")
    torch.save(small_model().state_dict(), folder / "net.pt")
    torch.save(small_model(), folder / "whole.pt")
    (folder / "text.pt").write_text("hello")
    data, labels = small_images(16).numpy(), small_labels(16).numpy()
    np.savez(folder / "data.npz", images=data, labels=labels)
    holes = data.copy()
    holes[3, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", images=holes, labels=labels)
    np.save(folder / "inf.npy", np.full_like(data, np.inf))
    np.save(folder / "none.npy", data[:0])
    np.save(folder / "one.npy", np.float32(3))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(folder / "texts.npy", np.array(["a", "b"]))
    np.save(folder / "complex.npy", data.astype(np.complex64))
    np.savez(folder / "short.npz", images=data, labels=labels[:9])
    np.savez(folder / "scores.npz", images=data, labels=labels.astype(np.float32))
    np.savez(folder / "sevens.npz", images=data, labels=np.full(16, 7))
    (folder / "nothing").mkdir()
    images(folder / "mixed", {"a/0.png": (8, 8), "b/0.png": (9, 7)})
    images(folder / "cut", {"a/0.png": (8, 8)})
    picture = folder / "cut" / "a" / "0.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    images(folder / "text", {"a/0.png": (8, 8)})
    (folder / "text" / "a" / "0.png").write_text("no picture")
    (folder / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\0\x01")
    (folder / "broken.json").write_text("[1,2")
    (folder / "a.json").write_text('{"a": 1}')
    (folder / "times.json").write_text('{"conv2d": {"a8w8": 1}}')
    (folder / "folder.pte").mkdir()
    for command in (
        "quantize net.py:Small --weights net.pt --calibration data.npz -o net.pte",
        "calibrate net.py:Small --weights net.pt --data data.npz -o net.stats.safetensors",
    ):
        done = run(folder, command)
        assert done.exit_code == 0, done.output
    whole = (folder / "net.pte").read_bytes()
    (folder / "alone.pte").write_bytes(whole)
    (folder / "half.pte").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pte").write_text("hello")
    (folder / "cut.json").write_text((folder / "net.json").read_text()[:500])
    graph = (folder / "net.graph.safetensors").read_bytes()
    (folder / "cut.graph.safetensors").write_bytes(graph[:900])
    return folder


def run(folder: Path, command: str) -> Result:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(cli, shlex.split(command), prog_name="custom-quantizer")
    finally:
        os.chdir(before)


QUANTIZE = "quantize net.py:Small --calibration {} -o bad.pte"
OF = "quantize {} --calibration data.npz -o bad.pte"
PLAN = "plan net.py:Small --input-shape 1,1,8,8 {}"
SEARCH = "search net.py:Small --weights net.pt --data data.npz --batch 4 {}"
GRAY = "--mean 0.5 --std 0.5"


def cases() -> dict[str, tuple[int, str]]:
    """A command line -> its exit code, and what its message says, in this order."""
    data = {
        "nowhere": "No file or folder nowhere; check the path",
        "nothing": "no images in nothing; files count that end in .bmp",
        "nan.npz": "nan.npz: input 0 has NaN in example 3; mend or remove",
        "inf.npy": "batch 0: x: 64 of 64 values are not finite",
        "none.npy": "there is no example in it",
        "one.npy": "it must be dense, with the examples first",
        "objects.npy": "could run code",
        "texts.npy": "It holds <U1, which are no numbers; save arrays of numbers",
        "complex.npy": "no rule says how to scale that; pass images as uint8",
        "short.npz": "inputs and labels have different numbers of examples: 16, 9",
        "scores.npz": "labels are float32|must be integer class indices",
        "bad.zip": "bad.zip cannot be read as a .zip archive",
        "cut.safetensors": "cut.safetensors cannot be read",
        "text.pt": "text.pt cannot be read: no file of torch.save, or a damaged one",
        "whole.pt": "whole.pt holds a support.flow.Small|could run code; save tensors alone",
        "net.py": "net.py: unknown kind of data; name a folder or a .zip",
        "/dev/zero": "/dev/zero: unknown kind of data",
        f"mixed {GRAY}": "b/0.png has 9x7 pixels, a/0.png has 8x8|--resize 256 --crop 224",
        f"cut {GRAY}": "image a/0.png: it cannot be decoded|repair or remove it",
        f"text {GRAY}": "image a/0.png: it cannot be decoded: no image of a kind|PNG",
        f"mixed {GRAY} --crop 20": "8x8 pixels is smaller than the crop 20x20",
        "data.npz --mean nan --std 1": "both must be finite",
    }
    models = {
        "net.py:Smal": "has no 'Smal'|did you mean Small",
        "net.py:needs": "needs arguments that were not given: width|--model-arg width=...",
        "net.py:raises": "ValueError: no luck, at|net.py:9",
        "net.py:nothing": "net.py:nothing returned NoneType, not an nn.Module",
        "net.py:exits": "net.py:exits failed: SystemExit: 5, at|net.py:11",
        "net.py:NoModule": "returned NoModule, not an nn.Module",
        "net.py:number": "is of type int; name a function that returns an nn.Module",
        "net.py:Bad": "RuntimeError: inside, at|net.py:15; pass what its forward takes",
        "net.py:Branch": "it branches on the value of a tensor; use torch.where",
        "net.py:Diverged": "1 of the 3 values of linear.bias are NaN; take a checkpoint",
        "net.py:Identity": "there is nothing to quantize: the graph has no ops",
        "net.py:Two": "missing 1 required positional argument: 'y'",
        "net.py:Half": "its parameters are float16: convert it with model.float()",
        "net.py:Small.forward": "needs arguments that were not given: self, x",
        "syntax.py:f": "Running syntax.py failed: SyntaxError: invalid syntax (syntax.py, line 1)",
        "imports.py:f": "No module named 'not_there', at|imports.py:1",
        "no.py:f": "No Python file no.py; check the path before the colon",
        "no.module:f": "There is no Python module 'no.module'|'path/to/file.py:function'",
        "net.py": "for a model of your own write",
        "net.py:": "'net.py:' names no model; write 'resnet18'",
        "resnet-18": "did you mean resnet18",
        "net.py:Small --weights whole.pt": "holds a support.flow.Small",
        "net.py:Small --weights nothing": "No weights file nothing",
        "net.py:Small --weights DEFAULT": "exist for torchvision models only",
        "net.py:Small --weights data.npz": "weights files end in .pt, .pth, .safetensors",
    }
    plans = {
        "--config tab.yaml": "tab.yaml:2:1: not YAML|indent with spaces, not tabs",
        "--config twice.yaml": "twice.yaml:3:1: the key 'global' is already in line 2",
        "--config typo.yaml": "typo.yaml:2:1: globl: unknown key; did you mean global?",
        "--config types.yaml": "types.yaml has 2 mistakes|types.yaml:2:9|types.yaml:3:8: rules",
        "--config list.yaml": "list.yaml:1:1: must be a mapping, not a list",
        "--config empty.yaml": "the file is empty; begin with `version: 1`",
        "--config binary.yaml": "not UTF-8 text; save the file as UTF-8",
        "--config other.yaml": "other.yaml:4|no module 'layer1.conv'; did you mean conv?",
        "--config newer.yaml": "version: 99 is newer than what this",
        "--config broken.json": "broken.json:1:5: not JSON",
        "--config net.pte": "a config file is YAML or JSON",
        "--config no.yaml": "Cannot read no.yaml: there is no such file",
        "--scheme int8": "'int8' is no scheme name; did you mean a8w8?",
        "--scheme A8W8": "did you mean a8w8?",
        "--scheme a8w33": "weights have 2 to 16 bits, not 33; did you mean a8w8",
        "--scheme a8w8-foo": "'foo' says nothing about a scheme; did you mean",
        "--scheme ''": "'' is no scheme name; a name is a<bits>w<bits>",
    }
    searches = {
        "--budget size=0": "size must be a number above 0, not 0.0",
        "--budget size=nan": "size must be a number above 0, not nan",
        "--budget size=2": "is not possible|above 1 a number is the cost itself, not a share",
        "--budget sise=1": "unknown key 'sise'; did you mean size?",
        "--budget latency=1 --latencies times.json": "there is no time of conv2d at a8w4",
        "--budget latency=1 --latencies broken.json": "broken.json is no JSON",
        "--budget latency=1 --latencies a.json": "a.json is no table of times; write {op: {",
        "--budget size=1 --schemes a8w8,a8w8": "a8w8 stands twice",
        "--budget size=1 --schemes a8w8,dyn8w8": "dyn8w8 quantizes activations at run time|choose",
        "--budget size=1 --schemes ,": "there is none to choose from, give at least one",
        "--budget weight_bits=0.7 -o no/x.yaml": "no does not exist; create it first",
        "--budget weight_bits=0.7 --checkpoint net.pte": "no checkpoint of a sens|name another",
        "--budget weight_bits=0.7 --validation nothing": "no images in nothing",
    }
    others = {
        "inspect no.pte": "no.pte: cannot be read (No such file or directory)",
        "inspect half.pte": "half.pte|truncated",
        "inspect text.pte": "text.pte: is not a .pte of ExecuTorch; name the .pte, a file",
        "inspect folder.pte": "folder.pte: is a directory without a report.json; name a .pte",
        "inspect cut.json": "cut.json is not JSON|give a report of this package",
        "inspect a.json": "a.json: the JSON is not a 'graph' report",
        "inspect net.graph.safetensors": "is a saved graph (.graph.safetensors), not a .pte; name",
        "inspect /dev/null": "is no regular file",
        "inspect net.json --data-path net.ptd": "is a report, which needs no --data-path; leave it",
        "inspect net.pte --op nope": "the report has no op 'nope'; it has",
        "inspect net.pte --html no/x.html": "no does not exist; create it first",
        "inspect net.pte --html /dev/full": "Cannot write /dev/full: it is not a regular file",
        "report no.pte": "no.pte: no such file; name a .pte or the .json beside it",
        "report alone.pte": "there is no alone.json beside",
        "report cut.json": "cut.json is not JSON",
        "report nothing": "nothing: is a directory without a report.json",
        "report net.pte --html no/x.html": "no does not exist; create it first",
        "report net.pte --data nan.npz": "has NaN in example 3",
        "verify no.pte": "no.pte: there is no such file; name the .pte",
        "verify half.pte": "half.pte|truncated",
        "verify alone.pte": "alone.graph.safetensors: there is no such file beside alone.pte",
        "verify net.py --graph net.graph.safetensors": "net.py: is not a .pte of ExecuTorch",
        "verify net.graph.safetensors": "is a saved graph (.graph.safetensors), not a .pte",
        "verify net.json --graph net.graph.safetensors": "net.json: is JSON",
        "verify net.pte --graph cut.graph.safetensors": "cut.graph.safetensors: not a graph",
        "verify net.pte --graph nothing": "nothing: no such file",
        "verify net.pte --data nan.npz": "has NaN in example 3",
        "verify net.pte --device-outputs nothing": "there is no manifest.json in nothing",
        "evaluate net.pte --data nan.npz": "has NaN in example 3",
        "evaluate net.pte --data sevens.npz": "labels go from 7 to 7, but net.pte knows 3",
        "evaluate net.pte --data data.npz --classes net.pte": "write one class a line, in UTF-8",
        "evaluate net.pte --data data.npz --slices 100": "16 samples do not make 100 slices",
        "diagnose no.pte --model net.py:Small --data data.npz": "no.pte: there is no such file",
        "diagnose net.pte --model net.py:Small --data data.npz --plot p.xyz": "use .svg, .png",
        "profile net.pte --plot p": "cannot draw p: its suffix names no format",
        "profile no.pte": "no.pte: cannot be read",
        "export-integers alone.pte out": "there is no such file beside alone.pte",
        "export-integers net.pte no/x": "no does not exist; create it first",
        "export-c net.pte c --name 'a b'": "must be a C identifier",
        "export-onnx net.py out.onnx": "net.py: not a graph that save_graph wrote",
        "export-onnx data.npz out.onnx": "wrote, but a .npz file, arrays of NumPy",
        "export-onnx net.json out.onnx": "wrote, but JSON, as a report of this package is",
        "export-onnx net.stats.safetensors out.onnx": "wrote, but statistics of a calibration",
        "demo --output net.py": "net.py: cannot make this directory (it is a file)",
        "quantize net.py:Small --calibration data.npz -o /dev/full": "/dev/full is no directory",
        "quantize net.py:Small --calibration data.npz -o no/x.pte": "create it first",
        "quantize net.py:Small --calibration data.npz -o net.py/x.pte": "is a file, not a direct",
        "quantize net.py:Small --statistics net.pte -o bad.pte": "give what `custom-quantizer cal",
        "quantize net.py:Small --statistics no -o bad.pte": "Cannot read no: there is no such",
        "quantize net.py:Small --statistics net.stats.safetensors -o bad.pte": "other weights",
        "quantize net.py:Two --statistics net.stats.safetensors -o bad.pte": "does not run",
        "quantize net.py:Small --statistics net.graph.safetensors -o bad.pte": "holds no calibr",
        "plan net.py:Small --input-shape 1,1,8": "[1, 1, 8] has no batch: one image is",
        "plan net.py:Small --input-shape 1,1,99999999,99999999": "does not fit into the memory",
        "sensitivity net.py:Small --data data.npz --checkpoint net.stats.safetensors": (
            "net.stats.safetensors is no checkpoint of a sensitivity; name another file"
        ),
    }
    wrong = {
        "export-c net.pte net.py": "Directory 'net.py' is a file",
        PLAN.format("--config nothing"): "'nothing' is a directory",
        PLAN.format("--scheme a8w8 --config tab.yaml"): "exclude each other: name one",
        SEARCH.format("--budget size"): "'size' is not KEY=NUMBER, such as size=0.6",
        SEARCH.format("--budget size=x"): "'size=x' is not KEY=NUMBER",
        "evaluate net.pte --data data.npz --output -1": "-1 is not in the range x>=0",
        "profile net.pte --runs many": "'many' is not a valid integer",
        "export-c net.pte c --batch 0": "0 is not in the range x>=1",
        OF.format("net.py:Small --resize -3"): "'-3' has a number below 1",
        OF.format("net.py:Small --mean a"): "'a' is not a list of numbers",
        OF.format("net.py:Small --model-arg x"): "'x' is not NAME=VALUE",
        "quantize net.py:Small --calibration data.npz -o x.bin": "name a .pte file or a directory",
        "quantize net.py:Small -o x.pte": "Missing option '--calibration' or '--statistics'",
        "calibrate net.py:Small --data data.npz -o net.py": "name a file that ends in .safetensors",
        "calibrate net.py:Small --data data.npz -o a.safetensors --checkpoint a.safetensors": (
            "name two files"
        ),
        "inspct net.pte": "No such command 'inspct'",
    }
    ones = {
        **{QUANTIZE.format(name): words for name, words in data.items()},
        **{OF.format(name): words for name, words in models.items()},
        **{PLAN.format(options): words for options, words in plans.items()},
        **{SEARCH.format(options): words for options, words in searches.items()},
        **others,
    }
    found = {command: (1, words) for command, words in ones.items()}
    return {**found, **{command: (2, words) for command, words in wrong.items()}}


def files(folder: Path) -> dict[Path, bytes]:
    skipped = "__pycache__"
    paths = (path for path in folder.rglob("*") if path.is_file() and skipped not in path.parts)
    return {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize("command", cases())
def test_a_mistake_is_explained(work: Path, command: str) -> None:
    code, words = cases()[command]
    before = files(work)
    result = run(work, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    *_, last = result.stderr.rstrip("\n").split("error: " if code == 1 else "Error: ")
    at = 0
    for phrase in words.split("|"):
        at = last.find(phrase, at)
        assert at >= 0, f"no {phrase!r} in {last!r}"
    assert "Traceback" not in result.output
    assert files(work) == before


def test_what_looks_wrong_and_is_not(work: Path, tmp_path: Path) -> None:
    """A model in training mode is quantized in eval mode; zeros are warned of."""
    shutil.copy(work / "net.py", tmp_path)
    shutil.copy(work / "data.npz", tmp_path)
    done = run(tmp_path, OF.format("net.py:Training"))
    assert done.exit_code == 0, done.output
    np.save(tmp_path / "zeros.npy", np.zeros((4, 1, 8, 8), np.float32))
    done = run(tmp_path, QUANTIZE.format("zeros.npy"))
    assert done.exit_code == 0, done.output
    assert "warning: calibration: 3 of 6 tensors were 0 in all samples" in done.stderr
    report = json.loads((tmp_path / "bad.json").read_text())
    assert report["calibration"]["samples"] == 4


# -- real processes --------------------------------------------------------------------------------

PROGRAM = f"{shlex.quote(sys.executable)} -m custom_quantizer"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ("inspect net.pte | head -1", 0, ""),
        ("plan net.py:Small --input-shape 1,1,8,8 | head -1", 1, ""),
        ("inspect net.pte >&-", 0, ""),
        ("plan net.py:Small --input-shape 1,1,8,8 >&-", 0, ""),
        ("evaluate net.pte --data data.npz >&- 2>&-", 0, ""),
        ("inspect no.pte 2>&-", 1, ""),
        ("inspect no.pte >&- 2>&-", 1, ""),
        ("inspect net.pte <&-", 0, ""),
        ("inspect net.pte --json >/dev/full", 1, "error: the output cannot be written: No space"),
        ("plan net.py:Small --input-shape 1,1,8,8 >/dev/full", 1, "cannot be written: No space"),
        ("inspect no.pte 2>/dev/full", 1, ""),
        ("inspect $'no\\xff.pte'", 1, "cannot be read (No such file or directory)"),
        ("quantize net.py:Small --calibration data.npz -o $'q\\xff.pte'", 1, "choose another name"),
    ],
)
def test_broken_pipes_full_disks_and_odd_names(
    work: Path, shell: str, code: int, error: str
) -> None:
    before = files(work)
    done = subprocess.run(
        ["bash", "-c", f"{PROGRAM} {shell}; exit ${{PIPESTATUS[0]}}"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        errors="backslashreplace",
    )
    # "| head" may close the pipe before or after all was written.
    assert done.returncode == code or ("head" in shell and done.returncode in (0, 1)), done
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (done.stderr == "") or error
    assert files(work) == before
