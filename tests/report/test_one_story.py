"""Plan, summary of ``quantize``, report and program say the same of one network, word by word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.two_heads import SHAPE, TwoHeads, two_heads_quantizer
from torch.fx import GraphModule

from custom_quantizer.app.cli import cli
from custom_quantizer.app.pipeline import capture
from custom_quantizer.app.saved_graph import load_lowered
from custom_quantizer.backends.xnnpack import LoweredProgram
from custom_quantizer.backends.xnnpack.checksum import seal, split_checksum
from custom_quantizer.backends.xnnpack.op_record import split_record
from custom_quantizer.core.graph import module_path
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.report.graph_record import inspect
from custom_quantizer.report.program_record import inspect_program
from custom_quantizer.report.record import ProgramReport, Report

TALLY = "14 ops: 9 integer kernel, 1 table, 3 emulated, 1 float inside"
Lowered = tuple[GraphModule, LoweredProgram]

BIASES = "biases: 52 int32 in 4 layers; 17 emulated in float above 8 bits in 3 layers"


@dataclass(frozen=True)
class Story:
    """What the four commands print, and the program of which they speak."""

    program: Path
    plan: str
    quantize: str
    of_report: str
    of_program: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    (folder / "net.py").write_text("from support.two_heads import TwoHeads\n")
    torch.save(TwoHeads().state_dict(), folder / "net.pt")
    images = torch.randn((8, *SHAPE[1:]), generator=torch.Generator().manual_seed(1))
    np.save(folder / "images.npy", images.numpy())
    (folder / "widths.json").write_text(json.dumps(two_heads_quantizer().to_config()))
    program = folder / "net.pte"

    def printed(*args: object) -> str:
        result = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="custom-quantizer")
        assert result.exit_code == 0, result.output
        return result.stdout

    model = (f"{folder}/net.py:TwoHeads", "--config", folder / "widths.json")
    weights = ("--weights", folder / "net.pt", "--calibration", folder / "images.npy")
    return Story(
        program,
        printed("plan", *model, "--input-shape", ",".join(map(str, SHAPE))),
        printed("quantize", *model, *weights, "-o", program),
        printed("inspect", program.with_suffix(".json")),
        printed("inspect", program),
    )


@pytest.fixture(scope="module")
def report(story: Story) -> ProgramReport:
    return inspect_program(story.program)


@pytest.fixture(scope="module")
def again(story: Story) -> Lowered:
    """The converted graph that was saved, lowered once more."""
    return load_lowered(story.program, story.program.with_suffix(".graph.safetensors"))[:2]


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    return capture(TwoHeads(), (torch.zeros(SHAPE),))[0]


def test_all_views_count_the_ops_alike(story: Story, captured: GraphModule) -> None:
    assert f"\n{TALLY}; about " in story.plan
    assert story.quantize.splitlines()[0] == f"{story.program.parent}/net.py:TwoHeads: {TALLY}"
    assert "the plan expected" not in story.quantize
    assert story.of_report.splitlines()[0] == TALLY
    assert story.of_program.splitlines()[0] == TALLY
    plan = two_heads_quantizer().plan(captured)
    assert str(plan.tally) == TALLY
    assert TALLY in str(plan)


def test_all_views_count_the_biases_alike(story: Story) -> None:
    read = "; the int32 ones are read back from the file and equal"
    assert f"\n{BIASES}{read}\n" in story.quantize
    assert story.of_report.splitlines()[1] == BIASES
    assert story.of_program.splitlines()[1] == BIASES
    scales = "4 integer biases, with scale = input scale x weight scale bit for bit; "
    assert story.of_report.splitlines()[2].startswith(scales)
    assert story.of_program.splitlines()[2] == story.of_report.splitlines()[2]


@pytest.mark.slow
def test_it_is_one_record_in_python_too(
    story: Story, report: ProgramReport, captured: GraphModule, again: Lowered
) -> None:
    plan = two_heads_quantizer().plan(captured)
    converted, lowered = again
    of_graph = inspect(converted, lowered)
    saved = json.loads(story.program.with_suffix(".json").read_text())
    of_file = Report.from_json(json.dumps(saved["report"]))
    counted = (plan, lowered.report, of_graph, of_file, report)
    tallies = [each.tally for each in counted]
    # In the program they are told apart by method as well.
    assert report.tally is not None
    by_name = {name.removeprefix("forward."): p for name, p in report.tally.placements.items()}
    assert [dict(tally.placements) for tally in tallies[:-1] if tally is not None] == [by_name] * 4
    assert {str(tally) for tally in tallies} == {TALLY}
    assert str(lowered.report).splitlines()[0] == TALLY
    assert [op["placement"] for op in saved["lowering"]["ops"]] == [
        op.backend.placement.value for op in lowered.report.ops
    ]
    # Before it is lowered, the graph says what is expected.
    assert inspect(converted).tally == of_graph.tally
    assert {each.biases for each in (of_graph, of_file, report, inspect(converted))} == {BIASES}


def test_names_of_a_program_are_those_of_the_captured_graph(
    story: Story, report: ProgramReport, captured: GraphModule
) -> None:
    assert report.ops is not None
    nodes = {node.name: node for node in captured.graph.nodes}
    for op in report.ops:
        assert op.path == module_path(nodes[op.name])
    modules = {op.name: op.path for op in report.ops}
    assert modules["conv2d_5"] == "boxes"
    assert modules["conv2d_3"] == "down2.1"
    for row in report.rows:
        # The input's and the output's own quantization belongs to no op.
        assert row.name.split("/")[0] == (row.op or "delegate")
        assert row.path == modules.get(row.op, "")
        if row.weight is not None:
            assert row.name == row.op
    # Each op is there under its own name, even if several nodes stand for it.
    assert {row.name for row in report.rows if "/" not in row.name} == set(modules)
    assert "conv2d_5 (boxes)" in story.of_program


def test_a_name_in_a_rule_selects_that_layer(report: ProgramReport, captured: GraphModule) -> None:
    assert report.ops is not None
    for op in report.ops:
        quantizer = IntegerQuantizer().set_global("a8w8").set_node_name(op.name, None)
        chosen = [p for p in quantizer.plan(captured).ops if "set_node_name" in p.reason]
        assert [(p.node, p.path) for p in chosen] == [(op.name, op.path)]


@pytest.mark.slow
def test_the_integers_under_a_name_are_those_of_the_layer(
    report: ProgramReport, again: Lowered
) -> None:
    converted, lowered = again
    graph = {row.node: row for row in inspect(converted, lowered).rows}
    integer = [row for row in report.rows if row.bias is not None and row.bias.bits is not None]
    assert len(integer) == 4
    for row in integer:
        bias = graph[row.name].bias
        assert row.bias is not None
        assert bias is not None
        assert row.bias.integers == bias.integers
        assert row.path == graph[row.name].path


def test_detail_of_an_op_of_several_nodes(report: ProgramReport) -> None:
    lines = report.detail("conv2d_5").splitlines()
    assert lines[0] == "conv2d_5 (boxes)"
    assert lines[1].split() == ["op", "conv"]
    assert lines[2].startswith("  runs as      emulated, xnnpack float, int16 emulated: int16: ")
    assert lines[3].startswith("  nodes        conv2d_5, conv2d_5/multiply, conv2d_5/add, ")
    assert "kind         multiply" in report.detail("conv2d_5/multiply_1")


def test_a_file_without_a_record_says_so(story: Story) -> None:
    whole, _ = split_checksum(memoryview(story.program.read_bytes()), "net.pte")
    bare, record = split_record(whole)
    assert record is not None
    # As versions of this package wrote it that knew a checksum only, and as others do.
    for data in (seal(bytes(bare)), bytes(bare)):
        report = inspect_program(data)
        assert report.ops is None
        assert report.tally is None
        lines = str(report).splitlines()
        assert lines[0] == "biases: 52 int32 in 4 layers; 17 float in 3 layers"
        assert (
            "the file does not say of which ops it was made: names below are the delegate's own, "
            "not those of a graph"
        ) in lines
        assert {row.op for row in report.rows} == {""}
        assert {row.kind for row in report.rows} <= {row.name for row in report.rows}
    assert len(record) < 4096


def test_a_report_of_version_1_is_read(story: Story) -> None:
    new = json.loads(story.program.with_suffix(".json").read_text())["report"]
    old = json.loads(json.dumps(new))
    old["schema_version"] = 1
    for row in old["rows"]:
        del row["written"], row["placement"]
    del old["lowering"]["integer_biases"]
    report = Report.from_json(json.dumps(old))
    assert report.biases == BIASES
    # It knew the parts of a call only: upsampling is eight ops.
    assert str(report.tally) == (
        "21 ops: 14 integer kernel, 1 table, 3 emulated, 1 float inside, 2 folded away"
    )
    assert json.loads(report.to_json())["schema_version"] == 2
    assert Report.from_json(report.to_json()) == report
