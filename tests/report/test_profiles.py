"""Times and differences of each op, and what of XNNPACK's trace they are made of."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.graphs import OUTSIDE, outside
from support.models import convert
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.app.cli import cli
from custom_quantizer.backends.xnnpack.profiling import aligned, measure
from custom_quantizer.reference import verifying
from custom_quantizer.reference.converted import ConvertedGraph
from custom_quantizer.report import profiles


class Net(nn.Module):
    """Concatenations, a table, a fused activation, a kernel outside, and an op folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(3, 8, 1)
        self.drop = nn.Dropout()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.relu(self.wide(x)), self.point(x)
        y = torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)], 1)[:, 4:20]
        y = self.drop(torch.sigmoid(y)).mean((2, 3))
        return self.head(y), outside(y)


X = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@cache
def program() -> tuple[GraphModule, cq.LoweredProgram]:
    torch.manual_seed(0)
    model = convert(Net(), (X,), cq.IntegerQuantizer().set_global("a8w8")).graph
    return model, cq.lower(model, (X,))


@cache
def profiled() -> cq.Profile:
    return cq.profile(program()[1], (X,), runs=20)


@pytest.mark.slow
def test_every_op_has_its_time_and_its_kernels() -> None:
    found = {row.op: row for row in profiled().rows}
    kernels = {
        "conv2d": "Convolution (NHWC, QC8) IGEMM",
        "conv2d_1": "Fully Connected (NC, QS8, QC8W) GEMM",
        "cat": "Copy (NC, X8)",
        "cat_1": "Copy (NC, X8)",
        "cat_2": "Copy (NC, X8)",
        "slice_1": "Slice (ND, X8)",
        "sigmoid": "Invalid Unary Op",
        "mean": "Mean (ND)",
        "linear": "Fully Connected (NC, QS8, QC8W) GEMM",
        "pow_1": OUTSIDE,
    }
    for op, kernel in kernels.items():
        assert kernel in found[op].kernels
    assert found["conv2d"].path == "wide"
    assert found["sigmoid"].placement == "table"
    assert found["pow_1"].placement == "outside"
    assert (found["dropout"].placement, found["dropout"].kernels) == ("folded away", ())
    # Nothing that XNNPACK ran is left over.
    assert not any(row.op.startswith("delegate/") and not row.kernels for row in profiled().rows)


def test_times_add_up() -> None:
    found = profiled()
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.seconds)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert all(row.seconds >= 0 for row in found.rows)
    assert 0 < found.seconds <= found.slowest < 1
    assert (found.runs, found.compared) == (20, True)


@pytest.mark.slow
def test_more_work_takes_more_time() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(self.small(x))

    x = torch.randn(1, 3, 48, 48)
    model = convert(Uneven(), (x,), cq.IntegerQuantizer().set_global("a8w8")).graph
    rows = {row.path: row for row in cq.profile(cq.lower(model, (x,)), (x,), runs=10).rows}
    # Some 500 times the work; other processes may take much of the machine meanwhile.
    assert rows["large"].seconds > 2 * rows["small"].seconds


def test_integer_ops_differ_nowhere() -> None:
    differences = {row.op: row.difference for row in profiled().rows}
    for op, values in (("conv2d", 8 * 24 * 24), ("sigmoid", 16 * 24 * 24), ("linear", 5)):
        found = differences[op]
        assert found is not None
        assert (found.values, found.mismatches, found.max_lsb) == (values, 0, 0)
    assert differences["pow_1"] is None


@pytest.mark.slow
def test_an_op_that_computes_something_else_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference whose linear layer is off in one value stands for a kernel that is."""
    exact = verifying.IntegerReference

    def spoiled(graph: ConvertedGraph) -> Any:
        reference = exact(graph)

        def run(*inputs: Any) -> Any:
            off = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
            return [out + off if out.shape == off.shape else out for out in reference(*inputs)]

        return run

    monkeypatch.setattr(verifying, "IntegerReference", spoiled)
    found = {row.op: row.difference for row in cq.profile(program()[1], (X,), runs=1).rows}
    assert found["linear"] is not None
    assert found["linear"].mismatches == 1
    assert found["conv2d"] is not None
    assert found["conv2d"].mismatches == 0


def test_what_a_reader_sees(tmp_path: Path) -> None:
    text = str(profiled())
    header = next(line for line in text.splitlines() if line.startswith("op "))
    assert header.split() == ["op", "module", "computes", "us", "share", "differs", "kernels"]
    assert "0 of 4,608" in text
    assert "mean over the faster half of 20 runs" in text
    document = json.loads(profiled().to_json())
    assert document["rows"][0]["op"] == profiled().rows[0].op
    profiled().plot(tmp_path / "times.svg")
    assert b"conv2d (wide)" in (tmp_path / "times.svg").read_bytes()


@pytest.mark.slow
def test_a_file_alone_has_times(tmp_path: Path) -> None:
    path = program()[1].save(tmp_path / "net.pte")
    done = CliRunner().invoke(cli, ["profile", str(path), "--runs", "3", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert not document["compared"]
    assert [row["op"] for row in document["rows"]] == [row.op for row in profiled().rows]


def test_what_cannot_be_profiled() -> None:
    with pytest.raises(cq.InputError, match="at least one run, not runs=0"):
        cq.profile(program()[1], (X,), runs=0)
    with pytest.raises(cq.InputError, match="at least one thread, not threads=0"):
        cq.profile(program()[1], (X,), threads=0)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_runs_with_as_many_threads_as_asked_for(threads: int) -> None:
    found = cq.profile(program()[1].buffer, (X,), runs=1, threads=threads)
    assert found.threads == threads
    with pytest.raises(cq.InputError, match="no inputs to profile on"):
        cq.profile(program()[1], [])
    with pytest.raises(cq.InputError, match="must have shape"):
        cq.profile(program()[1], (X[:, :2],))
    with pytest.raises(cq.ProgramError):
        cq.profile(program()[1].buffer, (X,), method="nothing")


@pytest.mark.parametrize(
    ("kinds", "names", "wanted"),
    [
        ("convert conv2d add", ("Convert (NC) #1", "Convolution (X) #1", "Add (ND) #1"), [0, 1, 2]),
        ("conv2d clamp add", ("Convolution (X) IGEMM #1", "Add (ND) #1"), [0, 2]),
        ("convert sigmoid convert add", ("Invalid Unary Op #1", "Add (ND) #1"), [1, 3]),
        ("concatenate2 concatenate3", ("Copy (NC, X8) #1", "Copy (NC, X8) #2"), [0, 1]),
        ("add", ("Transpose (ND, X8) #1", "Add (ND) #1"), [None, 0]),
        ("add multiply", ("Multiply (ND) #1", "Add (ND) #1"), [1, None]),
        ("static_reshape fully_connected", ("Fully Connected (NC, QS8, QC8W) GEMM #1",), [1]),
        ("avg_pooling2d static_resize_bilinear2d", ("Resize Bilinear (NHWC) #1",), [1]),
        ("div leaky_relu", ("Divide (ND) #1", "LeakyReLU (NC) #1"), [0, 1]),
    ],
)
def test_operators_find_their_nodes(
    kinds: str, names: tuple[str, ...], wanted: list[int | None]
) -> None:
    assert aligned(kinds.split(), names) == wanted


def test_a_program_that_does_not_run_becomes_an_error() -> None:
    lowered = program()[1]
    with pytest.raises(cq.ProgramError, match=r"runs in ended|refused"):
        measure(lowered.buffer[:-2000], "it", lowered.contents.main, [X], runs=1, warmup=0)


@pytest.mark.slow
def test_random_inputs_are_those_that_a_border_takes() -> None:
    model = convert(
        nn.Linear(4, 3),
        (torch.randn(2, 4),),
        cq.IntegerQuantizer().set_global("a4w8").set_io(integer=True),
    ).graph
    lowered = cq.lower(model, (torch.zeros(2, 4),))
    (inputs,) = profiles._random(lowered.contents.main, lowered.borders)
    assert inputs.dtype == torch.int8
    assert -8 <= int(inputs.min()) < int(inputs.max()) <= 7
    rows = cq.profile(lowered, runs=1).rows
    assert rows[0].difference is not None
    assert rows[0].difference.mismatches == 0
