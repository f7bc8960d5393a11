"""ExecuTorch's own XNNPACK tests, unchanged, with our quantizer and partitioner in their place.

    python tests/benchmarks/upstream_ops.py --output docs/results

Runs the tests of :data:`FILES` in ``executorch/backends/xnnpack/test`` of the installed wheel that
quantize, with ``XNNPACKQuantizer`` and ``XnnpackPartitioner`` replaced, in the module from which
those tests take them, by :class:`~custom_quantizer.IntegerQuantizer` and
:class:`~custom_quantizer.XnnpackPartitioner`. A test that fails runs once more as it is: what
passes then is listed with what it says and, if that is as intended, with the reason. Tests named
after ``fp16`` or ``fp32`` quantize nothing and are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import unittest
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import executorch.backends.xnnpack.test as upstream
import torch
from executorch.backends.xnnpack.test.tester import tester

import custom_quantizer as cq

ROOT = Path(upstream.__path__[0])
FILES = ("ops/test_*.py", "passes/test_*.py", "fragments/test_*.py", "test_xnnpack_partitioner.py")
"""Those of models need weights from the network, or packages that are no dependencies."""

_DYNAMIC = (
    "transposed convolutions whose activations are quantized at run time: ours leaves these in "
    "float, and says so"
)
_OLD_CALL = (
    "runs the deprecated `to_backend` as well, which shows a partitioner the graph too late to "
    "rewrite it: a warning says so, and names the way out"
)
_PER_TENSOR = (
    "expects that a layer with one weight scale is left alone: ours writes that scale for every "
    "channel, which is the same layer"
)
_COPIES = "counts copies in between: ours are taken away before the test looks"
INTENDED: dict[str, str] = {
    **{
        f"test_conv2d.py::test_dq_conv2d_transpose{kind}": _DYNAMIC
        for kind in ("", "_parallel", "_seq")
    },
    **{
        f"test_linear.py::test_{name}": _OLD_CALL
        for name in ("qc8_linear", "qs8_linear", "qs8_linear_fused_relu")
    },
    **{
        f"test_linear.py::test_qd8_{dtype}_per_tensor_linear": _PER_TENSOR
        for dtype in ("f16", "f32")
    },
    "test_linear.py::test_qd8_per_channel_linear_sequential": (
        "compares random values with a tolerance of less than two units; PyTorch rounds all rows "
        "by one scale, the device each by its own. It passed in 9 of 9 runs by itself"
    ),
    "test_conv2d.py::test_qs8_conv_transpose_2d_quantize_per_channel_multi_axis": (
        "a graph written by hand, whose scale is no float32: the device would compute with another "
        "one than PyTorch"
    ),
    "test_permute.py::test_qs8_permute_copy": (
        "counts permute_copy nodes: ours writes the same move as permute"
    ),
    "test_hardtanh.py::test_qs8_hardtanh": (
        "counts quantize nodes: ours makes one op of a sum and its clamp, and needs one less"
    ),
    "test_batch_norm_fusion.py::test_q8_conv_batch_norm_fusion": (
        "looks for a batch norm before its pass: ours makes it part of the convolution, or one of "
        "its own, before integers are chosen"
    ),
    "test_channels_last_tagged_reshape.py::test_q_dq_nodes_around_copy_are_tagged": (
        "counts dequantize nodes: ours has one more, of the int32 bias"
    ),
    "test_remove_get_item_pass.py::test_q8_max_remove_getitem": (
        "looks for `amax`: ours writes the same maximum as a pool, which XNNPACK has in integers"
    ),
    **{
        f"test_remove_redundant_copy_pass.py::test_{name}redundant_copy_removal": _COPIES
        for name in ("quantized_", "complex_quantized_")
    },
}
"""``file::test`` -> why it is meant to go another way with ours."""


def record_of(error: str) -> str:
    """The last line of a traceback, short."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:200] if lines else ""


class Result(unittest.TestResult):
    """Outcome of each test by its name: empty if it passed."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def name(self, test: Any) -> str:
        parts = test.id().split(".")
        return f"{parts[-3]}.py::{parts[-1]}"

    def addSuccess(self, test: Any) -> None:
        self.outcomes[self.name(test)] = ""

    def addError(self, test: Any, err: Any) -> None:
        self.outcomes[self.name(test)] = record_of(self._exc_info_to_string(err, test))

    addFailure = addError

    def addSkip(self, test: Any, reason: str) -> None:
        self.outcomes[self.name(test)] = f"skipped: {reason}"


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """What the tests take by default is ours."""
    with (
        mock.patch.object(tester, "XNNPACKQuantizer", cq.IntegerQuantizer),
        mock.patch.object(tester, "XnnpackPartitioner", cq.XnnpackPartitioner),
    ):
        yield


def tests_of(suite: Any) -> Iterator[unittest.TestCase]:
    """All tests of a suite of suites that quantize."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        elif not any(word in test.id().rpartition(".")[2] for word in ("fp16", "fp32")):
            yield test


def outcomes(file: Path, only: set[str] | None = None) -> dict[str, str]:
    """Run the tests of one file, or those with these names."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    loaded = unittest.defaultTestLoader.loadTestsFromModule(
        import_module(f"{upstream.__name__}.{module}")
    )
    result = Result()
    suite = unittest.TestSuite(
        test for test in tests_of(loaded) if only is None or result.name(test) in only
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        suite.run(result)
    return result.outcomes


def measure(file: Path) -> dict[str, Any]:
    """``file::test -> {"ours": ..., "stock": ...}``; an empty string stands for passed."""
    torch.manual_seed(0)
    with ours():
        mine = outcomes(file)
    failed = {name for name, error in mine.items() if error}
    torch.manual_seed(0)
    stock = outcomes(file, failed) if failed else {}
    differ = [name for name in failed if not stock[name]]
    print(f"{file.name}: {len(mine)} tests, {len(differ)} differ", flush=True)
    return {name: {"ours": error, "stock": stock.get(name, "")} for name, error in mine.items()}


def render(record: dict[str, Any]) -> str:
    """The page of docs/results/upstream_ops.md."""
    tests = record["tests"]
    run = {name: found for name, found in tests.items() if not found["stock"]}
    differ = {name: found["ours"] for name, found in run.items() if found["ours"]}
    meant = [name for name in differ if name in INTENDED]
    lines = [
        "# ExecuTorch's XNNPACK tests with our quantizer and partitioner",
        "",
        "The tests of ops, passes, fragments and the partitioner in",
        "`executorch/backends/xnnpack/test`, unchanged. Made by",
        "`python tests/benchmarks/upstream_ops.py --output docs/results`.",
        "",
        f"{len(tests)} tests quantize; {len(tests) - len(run)} fail as they are; of the others "
        f"{len(run) - len(differ)} pass with ours, and {len(meant)} of {len(differ)} that do not "
        "are meant to differ.",
        "",
        "| test | with ours | why |",
        "| --- | --- | --- |",
    ]
    for name, error in sorted(differ.items()):
        text = error.replace("|", "\\|").replace("`", "'")
        lines.append(f"| `{name}` | {text} | {INTENDED.get(name, 'not intended')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", help="files, such as test_add.py")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    files = [file for pattern in FILES for file in sorted(ROOT.glob(pattern))]
    if options.only:
        files = [file for file in files if file.name in options.only]
    stored = options.output / "upstream_ops.json"
    # With --only, what is known of the other files stays.
    tests = json.loads(stored.read_text())["tests"] if options.only and stored.is_file() else {}
    for file in files:
        tests = {n: found for n, found in tests.items() if not n.startswith(f"{file.name}::")}
        tests.update(measure(file))
        record = {"tests": dict(sorted(tests.items()))}
        stored.write_text(json.dumps(record, indent=2) + "\n")
        (options.output / "upstream_ops.md").write_text(render(record))


if __name__ == "__main__":
    sys.exit(main())
