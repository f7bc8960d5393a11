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
    learned = ["AdaRound" in method for _, _, method in every]
    assert learned == sorted(learned)  # last
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


def test_an_environment_is_made_for_its_requirements(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(peers.venv, "create", lambda folder, **_: Path(folder).mkdir(exist_ok=True))
    monkeypatch.setattr(peers, "_checked", lambda command, *_: made.append(command))
    one = peers.Peer("Tool", ("tool==1", "other==2"), ())
    for peer in (one, one, peers.Peer("Tool", ("tool==2",), ())):
        peers.environment(peer, tmp_path / "tool")
    assert [command[-2:] for command in made] == [["tool==1", "other==2"], ["-q", "tool==2"]]


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
    result = {
        "ours": {"ResNet-20": {"activations": 9, "layers": 4}},
        "rows": {
            "one": {**row, **numbers, "iterations": 2000, "grid": grid},
            "two": {**failed, "error": "No module named x"},
        },
    }
    table = [line for line in peers.render(result).splitlines() if line.startswith("| ")]
    first, second, third = table[2:]
    assert first == (
        "| ONNX Runtime | int8, u8s8, MinMax | failed: No module named x |  |  |  |  |  |  |  |"
    )
    assert second == (
        "| AIMET | int4 weights, AdaRound, 2,000 iterations | 79.00% | -1.00 (-2.00 to +0.50) "
        "| 90.00% | 12 | 7 | 3 int4 | float32 | 2 of 3 |"
    )
    assert third.startswith("| this package | a8w4, `accuracy=best` | 79.00% |")
    assert third.endswith("| 9 | 4 int4 | int32 | 4 of 4 |")


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
