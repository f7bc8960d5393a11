"""Weights in data files (``.ptd``) beside the program."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes.external_constants_pass import (
    delegate_external_constants_pass_unlifted,
)
from support.graphs import differences
from support.models import convert
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.app.cli import cli


class Net(nn.Module):
    """Layers in a delegate, one of them called on two scales, and an embedding outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 6)
        self.rows = nn.Embedding(10, 6)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(x) + self.head(x * 0.1) + self.rows(i)


class Made(NamedTuple):
    converted: GraphModule
    example: tuple[Any, ...]
    edge: EdgeProgramManager
    program: ExecutorchProgramManager


def make(scheme: str, tag: Any, *, kernels: Any = False) -> Made:
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 6, 6), torch.tensor([1, 7]))
    converted = convert(Net(), example, scheme).graph
    delegate_external_constants_pass_unlifted(converted, tag)
    exported = torch.export.export(converted, example)
    edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
    program = edge.to_executorch(ExecutorchBackendConfig(external_constants=kernels))
    return Made(converted, example, edge, program)


def write(program: ExecutorchProgramManager, folder: Path) -> tuple[Path, list[Path]]:
    path = folder / "net.pte"
    path.write_bytes(program.buffer)
    program.write_tensor_data_to_file(str(folder))
    return path, sorted(folder.glob("*.ptd"))


def by_layer(node: Node) -> str:
    return str(node.target).split("_")[0]


def test_tagged_weights_leave_the_program_and_are_checked_where_they_are(tmp_path: Path) -> None:
    made = make("a8w8", lambda _: "weights", kernels=lambda _: "weights")
    whole = cq.lower(made.converted, made.example)
    path, files = write(made.program, tmp_path)
    assert [file.name for file in files] == ["weights.ptd"]
    stored = made.converted.get_buffer("head_weight_integers").numpy().tobytes()
    assert stored in whole.buffer
    assert stored in files[0].read_bytes()
    assert stored not in path.read_bytes()
    for program in (made.edge, made.program):
        cq.check(program, made.converted, made.example)
    want = whole.run(*made.example)
    for isolated in (True, False):
        loaded = cq.load_program(path, data_path=files[0], isolated=isolated)
        assert differences(loaded.run(*made.example), (want,)) == []
    report = cq.inspect_program(path, data_path=files)
    biases = [row.bias for row in report.rows if row.bias is not None]
    assert [bias.dtype for bias in biases] == ["int32"] * 3
    assert all(bias.derived and bias.integers for bias in biases)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w4", "dyn8w8", "a8w8-biasfloat"])
def test_a_file_for_each_layer(scheme: str, tmp_path: Path) -> None:
    made = make(scheme, by_layer, kernels=lambda _: "kernels")
    path, files = write(made.program, tmp_path)
    assert {file.stem for file in files} >= {"conv", "head"}
    cq.check(made.program, made.converted, made.example)
    for written in (path, path.read_bytes()):
        cq.check(written, made.converted, made.example, data_path=files)
    want = cq.lower(made.converted, made.example).run(*made.example)
    assert differences(cq.load_program(path, data_path=files).run(*made.example), (want,)) == []
    for missing in files:
        others = [file for file in files if file is not missing]
        with pytest.raises(
            cq.ProgramError, match=r"is in a data file \(\.ptd\) that was not named"
        ):
            cq.load_program(path, data_path=others)


def test_one_unit_of_one_weight_in_a_data_file_is_noticed(tmp_path: Path) -> None:
    made = make("a8w8", lambda _: "weights")
    path, (file,) = write(made.program, tmp_path)
    weights = made.converted.get_buffer("head_weight_integers").numpy().tobytes()
    data = bytearray(file.read_bytes())
    place = data.index(weights)
    data[place] = (data[place] + 1) % 256
    file.write_bytes(data)
    with pytest.raises(cq.ProgramError, match="do not have the SHA-256 they are named by"):
        cq.check(path, made.converted, made.example, data_path=file)


@pytest.mark.parametrize("strict", [False, True])
def test_export_loses_tags_of_names_that_begin_with_a_digit(strict: bool) -> None:
    """Unless it is strict (torch 2.15), as docs/flows.md says."""
    example = (torch.randn(2, 4),)
    converted = convert(nn.Sequential(nn.Linear(4, 4)), example).graph
    delegate_external_constants_pass_unlifted(converted, lambda _: "weights")
    exported = torch.export.export(converted, example, strict=strict)
    edge = to_edge_transform_and_lower(exported, partitioner=[cq.XnnpackPartitioner()])
    (module,) = (
        module
        for module in edge.exported_program().graph_module.modules()
        if isinstance(module, LoweredBackendModule)
    )
    files = module.named_data_store_output.external_data
    assert list(files) == (["weights"] if strict else [])


def test_lower_writes_one_file_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = make("a8w8", by_layer)
    caplog.clear()
    lowered = cq.lower(made.converted, made.example)
    assert "tagged with data files (" in caplog.text
    assert "XnnpackPartitioner" in caplog.text
    lowered.run(*made.example)


def test_lower_writes_one_file_of_a_dynamic_graph() -> None:
    """Which is exported again, with the tags."""
    model, example = nn.Sequential(OrderedDict(layer=nn.Linear(4, 4))), (torch.randn(2, 4),)
    batch = {0: torch.export.Dim("batch", max=8)}
    converted = convert(model, example, dynamic_shapes=(batch,)).graph
    delegate_external_constants_pass_unlifted(converted, lambda _: "weights")
    lowered = cq.lower(converted, example)
    assert lowered.run(torch.randn(5, 4)).shape == (5, 4)


def test_wrong_data_files(tmp_path: Path) -> None:
    made = make("a8w8", lambda _: "weights")
    path, (file,) = write(made.program, tmp_path)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (None, cq.ProgramError, r"net\.pte: its constant .* data_path"),
        ([], cq.InputError, "path of a .ptd, or a list"),
        (3, cq.InputError, "path of a .ptd, or a list"),
        (tmp_path / "none.ptd", cq.ProgramError, r"none\.ptd: cannot be read"),
        (path, cq.ProgramError, r"net\.pte: is no data file"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=message):
            cq.load_program(path, data_path=given)
    cut = tmp_path / "cut.ptd"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(cq.ProgramError, match=r"cut\.ptd|SHA-256"):
        cq.load_program(path, data_path=cut)
    other = tmp_path / "other"
    other.mkdir()
    _, (another,) = write(make("a8w4", lambda _: "weights").program, other)
    with pytest.raises(cq.ProgramError, match="was not named, or changed"):
        cq.load_program(path, data_path=another)


def test_inspect_on_the_command_line(tmp_path: Path) -> None:
    path, (file,) = write(make("a8w8", lambda _: "weights").program, tmp_path)
    run = CliRunner()
    name = "custom-quantizer"
    without = run.invoke(cli, ["inspect", str(path)], prog_name=name)
    assert without.exit_code == 1
    assert "data file" in without.output
    args = ["inspect", str(path), "--data-path", str(file), "--op", "conv2d"]
    given = run.invoke(cli, args, prog_name=name)
    assert given.exit_code == 0
    assert "scale = input scale x weight scale" in given.output
