"""The script that runs other tools, without running any."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from support.scripts import DOCS

import custom_quantizer as cq

BENCHMARKS = DOCS.parent / "tests" / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers_worker")


def test_every_method_of_the_script_is_one_of_the_worker(peers: Any, worker: Any) -> None:
    assert {name: set(peer.methods) for name, peer in peers.PEERS.items()} == {
        name: set(methods) for name, methods in worker.METHODS.items()
    }


def test_rows_are_measured_once_and_failed_ones_again(peers: Any) -> None:
    every = list(peers.cells())
    assert list(peers.pending({}, "")) == every
    assert len({peers.row_name(*cell) for cell in every}) == len(every)
    learned = ["AdaRound" in method for _, _, method, _ in every]
    assert learned == [iterations > 0 for *_, iterations in every] == sorted(learned)  # last
    rows = {peers.row_name(*cell): {"top1": 0.5} for cell in every}
    assert list(peers.pending(rows, "")) == []
    rows[peers.row_name(*every[3])] = {"error": "no such package"}
    del rows[peers.row_name(*every[5])]
    assert list(peers.pending(rows, "")) == [every[3], every[5]]
    assert list(peers.pending(rows, peers.row_name(*every[5]))) == [every[5]]


def test_a_failed_command_says_its_last_line(peers: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: two words$"):
        peers._checked([sys.executable, "-c", "raise ValueError('two  words')"], {}, 60)
    with pytest.raises(RuntimeError, match=r"^exit status 3$"):
        peers._checked([sys.executable, "-c", "raise SystemExit(3)"], {}, 60)
    assert peers.last_words("first\n\n  last  line \n \n") == "last line"
    of_pip = "ERROR: Could not find a version\nERROR: No  match for x==1\n[notice] A new release\n"
    assert peers.last_words(of_pip) == "Could not find a version; No match for x==1"


class Pip:
    """Stands for ``venv`` and for what is run in an environment."""

    def __init__(self, peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cleared: list[bool] = []
        self.ran: list[list[str]] = []
        self.fails = ""
        monkeypatch.setattr(peers.venv, "create", self._create)
        monkeypatch.setattr(peers, "_checked", self._checked)

    def _create(self, folder: Path, *, with_pip: bool, clear: bool) -> None:
        assert with_pip
        self.cleared.append(clear)
        folder.mkdir(exist_ok=True)
        (folder / "pyvenv.cfg").touch()

    def _checked(self, command: list[str], *_: Any) -> None:
        self.ran.append(command[1:])
        if self.fails and self.fails in command:
            raise RuntimeError("No match for tool==1")


def test_an_environment_is_made_for_its_requirements(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, folder = Pip(peers, monkeypatch), tmp_path / "tool"
    one = peers.Peer("Tool", ("tool==1", "other==2"), "tool.part", ())
    assert peers.environment(one, folder) == folder / "bin" / "python"
    assert pip.ran[0][:3] == ["-m", "pip", "install"]
    assert pip.ran[0][-2:] == ["tool==1", "other==2"]
    assert pip.ran[1:] == [["-c", "import tool.part"]]
    peers.environment(one, folder)
    assert (len(pip.ran), pip.cleared) == (2, [False])  # complete: left alone
    peers.environment(peers.Peer("Tool", ("tool==2",), "tool", ()), folder)
    assert (pip.ran[2][-1], pip.cleared) == ("tool==2", [False, True])


def test_where_pip_was_stopped_it_goes_on(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, folder = Pip(peers, monkeypatch), tmp_path / "tool"
    peer = peers.Peer("Tool", ("tool==1",), "tool", ())
    pip.fails = "tool==1"
    with pytest.raises(RuntimeError, match=r"^pip install tool==1: No match for tool==1$"):
        peers.environment(peer, folder)
    pip.fails = "import tool"
    with pytest.raises(RuntimeError, match=r"^import tool, after pip install: No match"):
        peers.environment(peer, folder)
    pip.fails = ""
    peers.environment(peer, folder)
    assert pip.cleared == [False] * 3  # what pip had brought is still there
    assert len(pip.ran) == 1 + 2 + 2


def test_another_folder_is_no_environment(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, folder = Pip(peers, monkeypatch), tmp_path / "tool"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(RuntimeError, match="no virtual environment; name another --work"):
        peers.environment(peers.Peer("Tool", ("tool==1",), "tool", ()), folder)
    assert pip.cleared == pip.ran == []


def test_an_environment_that_fails_is_tried_once_and_every_row_says_so(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(peers, monkeypatch)
    monkeypatch.setattr(peers, "PEERS", {"tool": peers.Peer("Tool", ("tool==1",), "tool", ())})
    pip.fails = "tool==1"
    environments = peers.Environments(tmp_path)
    rows = [
        peers.measure(("net", "tool", "method", iterations), environments, tmp_path)
        for iterations in (0, 7)
    ]
    assert len(pip.ran) == 1
    assert [row.pop("error") for row in rows] == ["pip install tool==1: No match for tool==1"] * 2
    shared = {"network": "net", "peer": "Tool", "version": "tool 1", "method": "method"}
    assert rows == [shared, {**shared, "iterations": 7}]


def test_scores_are_paired_with_the_float_model(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    monkeypatch.setattr(peers, "cifar10_test", lambda _: (None, labels))
    floating = torch.tensor([0, 1, 2, 3, 0, 1, 0, 0])  # six are right
    monkeypatch.setattr(peers, "float_answers", lambda _: floating)
    found = torch.tensor([0, 1, 2, 0, 1, 0, 2, 0])  # three of them, and another one
    row = peers.scores("any", torch.nn.functional.one_hot(found, 4).float())
    assert (row["samples"], row["float_top1"], row["top1"]) == (8, 6 / 8, 4 / 8)
    assert row["agreement"] == 4 / 8
    assert row["difference"] == -2 / 8
    assert row["low"] < row["difference"] < row["high"]


def test_a_table_shows_errors_and_iterations(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"samples": 100, "float_top1": 0.8, "top1": 0.79, "agreement": 0.9}
    numbers |= {"difference": -0.01, "low": -0.02, "high": 0.005, "cpu_seconds": 12.4}
    grid = {"activations": 7, "weights": {"int4": 3}, "bias": "float32"}
    grid["execution"] = {"integer": 2, "float": 1}
    row = {"network": "ResNet-20", "peer": "AIMET", "method": "int4 weights, AdaRound"}
    failed = {"network": "ResNet-20", "peer": "ONNX Runtime", "method": "int8, u8s8, MinMax"}
    improve = tmp_path / "improve.json"
    ours = {**numbers, "network": "ResNet-20", "scheme": "a8w4", "how": "best"}
    improve.write_text(json.dumps({"rows": {"ResNet-20, a8w4, best": ours}}), encoding="utf-8")
    monkeypatch.setattr(peers, "IMPROVE", improve)
    counted = {"activations": 9, "weights": {"int4": 3, "float32": 1}, "bias": "int32"}
    counted["execution"] = {"integer": 3, "float": 1}
    result = {
        "ours": {"ResNet-20": {"a8w4": counted}},
        "rows": {
            "one": {**row, **numbers, "iterations": 2000, "grid": grid},
            "less": {**row, **numbers, "iterations": 500, "grid": grid},
            "two": {**failed, "error": "No module named x"},
        },
    }
    table = [line for line in peers.render(result).splitlines() if line.startswith("| ")]
    first, less, second, third = table[2:]
    assert first == (
        "| ONNX Runtime | int8, u8s8, MinMax | failed: No module named x |  |  |  |  |  |  |  |"
    )
    assert less == second.replace("2,000", "500")
    assert second == (
        "| AIMET | int4 weights, AdaRound, 2,000 iterations | 79.00% | -1.00 (-2.00 to +0.50) "
        "| 90.00% | 12 | 7 | 3 int4 | float32 | 2 of 3 |"
    )
    assert third.startswith("| this package | a8w4, `accuracy=best` | 79.00% |")
    assert third.endswith("| 9 | 3 int4, 1 float32 | int32 | 3 of 4 |")


def test_a_worker_writes_logits_and_grid(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.arange(100, dtype=np.float32).reshape(100, 1)
    np.savez(tmp_path / "images.npz", calibration=images[:70], test=images)
    seen: list[int] = []

    def method(task: Any, iterations: int) -> Any:
        seen.extend((iterations, *map(len, task.batches())))
        return lambda x: x * 2, {"activations": 1}

    monkeypatch.setitem(worker.METHODS, "tool", {"method": method})
    result = tmp_path / "result.json"
    worker.main("tool", "method", 5, "network", tmp_path, result)
    assert seen == [5, 50]  # full batches only
    assert np.array_equal(np.load(tmp_path / "result.npy"), images * 2)
    assert json.loads(result.read_text(encoding="utf-8"))["grid"] == {"activations": 1}


def test_what_a_qdq_model_quantizes_is_counted(worker: Any) -> None:
    constants = [
        helper.make_tensor("w", TensorProto.INT4, (1, 1, 1, 1), [3]),
        helper.make_tensor("b", TensorProto.INT32, (1,), [7]),
        helper.make_tensor("s", TensorProto.FLOAT, (), [0.1]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("DequantizeLinear", ["b", "s"], ["bd"]),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], constants)
    assert worker.onnx_grid(helper.make_model(graph)) == {
        "activations": 1,
        "weights": {"int4": 1},
        "bias": "int32",
        "ops": {"Conv": 1},
        "float_ops": {"Relu": 1},
    }


class Layers(torch.nn.Module):
    """Three layers, and a slice and a pool that are no layers but have nodes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(2, 4, 3)
        self.second = torch.nn.Conv2d(4, 4, 1)
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)[:, :, ::2].relu())
        return self.last(torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.parametrize(
    ("in_float", "weights", "execution"),
    [
        ([], {"int4": 3}, {"integer": 3, "float": 0}),
        (["second"], {"int4": 2, "float32": 1}, {"integer": 2, "float": 1}),
    ],
)
def test_what_runs_on_integers_is_counted_in_the_program(
    peers: Any, in_float: list[str], weights: dict[str, int], execution: dict[str, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 8, 8)
    quantizer = cq.IntegerQuantizer().set_global("a8w4")
    for name in in_float:
        quantizer.set_module_name(name, None)
    result = cq.quantize(
        Layers().eval(), (x,), [x], config=quantizer, accuracy="plain", progress=False
    )
    grid = peers.program_grid(result.lowered)
    assert grid == {
        "weights": weights,
        "bias": "float32 and int32" if in_float else "int32",
        "execution": execution,
    }
