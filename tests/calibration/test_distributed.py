"""Statistics over the ranks of a process group: the sum is what one process would have seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.ranks import SCHEMES, images, prepared_net
from torch import distributed

from custom_quantizer.calibration.statistics import (
    all_reduce_statistics,
    read_statistics,
    solved_qparams,
    statistics_of,
)
from custom_quantizer.errors import CalibrationError

SCRIPT = Path(__file__).parents[1] / "support" / "ranks.py"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """What the ranks left behind."""

    ranks: int
    folder: Path


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``support/ranks.py`` on ranks of this machine, at a port that is free."""
    shares: str = request.param
    ranks, folder = len(shares.split(",")), tmp_path_factory.mktemp("ranks")
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", str(SCRIPT), shares, str(folder)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return Run(ranks, folder)


TWO = pytest.param("11,9", id="two ranks")
# Slow: each rank is an interpreter of its own.
THREE = pytest.param("13,0,7", id="three ranks, one without data", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [TWO, THREE], indirect=True)
def test_ranks_have_the_parameters_of_one_process(finished: Run) -> None:
    for scheme in SCHEMES:
        alone = prepared_net(scheme)
        for image in images():
            alone(image[None])
        expected = {n: [float(q.scale), q.zero_point] for n, q in solved_qparams(alone).items()}
        for rank in range(finished.ranks):
            saved = json.loads((finished.folder / f"{scheme}.{rank}.json").read_text())
            assert saved == expected
            read = read_statistics(finished.folder / f"{scheme}.{rank}.safetensors")
            assert read == statistics_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [TWO], indirect=True)
def test_all_ranks_refuse_what_one_cannot_do(finished: Run) -> None:
    """Each rank wrote the errors it got: none waited for a rank that gave up."""
    for rank in range(finished.ranks):
        different, average, twice = json.loads(
            (finished.folder / f"errors.{rank}.json").read_text()
        )
        assert "rank 1 and rank 0 observe different tensors" in different
        assert "moving averages depend on the order" in average
        assert "already those of all ranks" in twice


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_rank_keeps_what_it_saw() -> None:
    prepared = prepared_net("a8w8-percentile99")
    prepared(images()[:1])
    before = statistics_of(prepared)
    all_reduce_statistics(prepared)
    assert statistics_of(prepared) == before
    for model, message in (
        (prepared, "already those of all ranks"),
        (prepared_net("a8w8-moving_average"), "moving averages depend on the order"),
    ):
        with pytest.raises(CalibrationError, match=message):
            all_reduce_statistics(model)


def test_without_a_process_group() -> None:
    with pytest.raises(CalibrationError, match=r"torchrun.*init_process_group"):
        all_reduce_statistics(prepared_net("a8w8"))
