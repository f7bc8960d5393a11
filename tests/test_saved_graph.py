"""A program is verified from files alone, in the API and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.models import convert
from torch import nn

import custom_quantizer as cq
from custom_quantizer.cli import cli
from custom_quantizer.saved_graph import load_lowered

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    graph = convert(model, EXAMPLE).graph
    folder = tmp_path_factory.mktemp("saved")
    cq.lower(graph, EXAMPLE).save(folder / "net.pte")
    cq.save_graph(graph, EXAMPLE, folder / "net.graph.safetensors")
    return folder


def test_a_reloaded_graph_lowers_to_the_same_bytes(files: Path) -> None:
    graph, example = cq.load_graph(files / "net.graph.safetensors")
    assert torch.equal(example[0], EXAMPLE[0])
    assert cq.lower(graph, example).buffer == (files / "net.pte").read_bytes()


def test_verify_from_files(files: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--samples", "2"])
    assert result.exit_code == 0, result.output
    assert "bit-exact: yes" in result.output
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--samples", "1", "--json"])
    assert json.loads(result.output)["bit_exact"] is True
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--weights", "w.pth"])
    assert result.exit_code == 2
    assert "--model" in result.output


def test_evaluate_from_files(files: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(6) % 4)
    command = [
        "evaluate",
        str(files / "net.pte"),
        "--graph",
        str(files / "net.graph.safetensors"),
        "--json",
    ]
    result = CliRunner().invoke(cli, [*command, "--data", str(tmp_path / "data.npz")])
    assert result.exit_code == 0, result.output
    found = {model["name"]: model for model in json.loads(result.output)["models"]}
    assert list(found) == ["converted graph", "integer reference", "net.pte"]
    assert found["integer reference"]["correct"] == found["net.pte"]["correct"]


def test_another_network_of_the_same_shape_is_found_out(files: Path, tmp_path: Path) -> None:
    graph, _ = cq.load_graph(files / "net.graph.safetensors")
    graph.get_buffer("0_bias_integers")[3] += 1
    cq.lower(graph, EXAMPLE).save(tmp_path / "other.pte")
    converted, lowered = load_lowered(tmp_path / "other.pte", files / "net.graph.safetensors")
    checked = cq.verify(converted, lowered, EXAMPLE)
    assert checked.first is not None
    assert checked.first.what == "bias"
    command = [
        "verify",
        str(tmp_path / "other.pte"),
        "--graph",
        str(files / "net.graph.safetensors"),
    ]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert "bias: 1 of 8 integers differ; at (3,)" in result.output


def test_bad_files(files: Path, tmp_path: Path) -> None:
    with pytest.raises(cq.InputError, match="no such file"):
        cq.load_graph(tmp_path / "none.graph.safetensors")
    (tmp_path / "text.graph.safetensors").write_text("not a graph")
    with pytest.raises(cq.InputError, match="not a graph"):
        cq.load_graph(tmp_path / "text.graph.safetensors")
    truncated = tmp_path / "cut.pte"
    truncated.write_bytes((files / "net.pte").read_bytes()[:200])
    with pytest.raises(cq.ProgramError):
        load_lowered(truncated, files / "net.graph.safetensors")
    with pytest.raises(cq.ProgramError, match="cannot be read"):
        load_lowered(tmp_path / "none.pte", files / "net.graph.safetensors")
    captured = torch.export.export(nn.ReLU(), (torch.randn(2),)).module()
    with pytest.raises(cq.ConversionError, match="no quantized tensor"):
        cq.save_graph(captured, (torch.randn(2),), tmp_path / "x.graph.safetensors")
