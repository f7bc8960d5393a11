"""Running TOSA programs in tests: the tools, and cases of the registry in programs of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import cast

import torch
import torchvision
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.tosa import BACKEND
from custom_quantizer.backends.tosa.checked_lowering import lower_graph
from custom_quantizer.backends.tosa.tools import PACKAGES
from custom_quantizer.ops import Case, OpRule
from custom_quantizer.ops.backend import Backend
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.graphs import Inputs, differences, stress
from support.models import convert, randomize_batch_norms

CACHE = "CUSTOM_QUANTIZER_TOSA_TOOLS"
"""Names a folder to keep the tools in; without it they are installed anew for each run."""


@cache
def use_tools() -> None:
    """Make the TOSA tools importable, from the package index if need be (5 seconds).

    They are no requirement of the tests: they pin an older NumPy, and bring a package ``tests``.
    """
    if importlib.util.find_spec("tosa_serializer") is not None:
        return
    folder = Path(os.environ.get(CACHE) or tempfile.mkdtemp(prefix="tosa-tools-"))
    if not (folder / "tosa_serializer").is_dir():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
        subprocess.run([*pip, str(folder), *PACKAGES], check=True)
    sys.path.append(str(folder))


NETWORKS = ("ResNet-20", "mobilenet_v2", "resnet18")


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images to calibrate on, and images to compare on.

    ResNet-20 is trained; torchvision's have random weights, and statistics of random images: with
    any others their outputs hardly depend on the input, and compare equal whatever is wrong.
    """
    if name == "ResNet-20":
        return resnet20(), cifar10_calibration(100)[0], cifar10_test(100)[0]
    torch.manual_seed(0)
    model = randomize_batch_norms(getattr(torchvision.models, name)(weights=None))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # forget what it began with
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval(), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)


def planned(
    model: nn.Module, example: Inputs, scheme: str, backend: Backend = BACKEND
) -> ConvertedGraph:
    """Calibrate on the example and convert, as planned for TOSA."""
    quantizer = cq.IntegerQuantizer(backend).set_global(scheme)
    return read_converted(convert(model, example, quantizer).graph, backend)


class _Case(nn.Module):
    """A case; ops that only move values get integers to move."""

    def __init__(self, rule: OpRule, case: Case) -> None:
        super().__init__()
        self.moves = rule.moves_values
        self.case = case.build()

    def forward(self, *inputs: Tensor) -> Tensor:
        return cast(Tensor, self.case(*[x + x for x in inputs] if self.moves else inputs))


class Cases(nn.Module):
    """Cases side by side, an output each."""

    def __init__(self, rule: OpRule, cases: tuple[Case, ...]) -> None:
        super().__init__()
        self.arity = [len(case.shapes) for case in cases]
        self.cases = nn.ModuleList(_Case(rule, case) for case in cases)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        feed = iter(inputs)
        return [
            case(*[next(feed) for _ in range(count)])
            for count, case in zip(self.arity, self.cases, strict=True)
        ]


def run_cases(
    rule: OpRule, cases: tuple[Case, ...], scheme: str
) -> tuple[ConvertedGraph, cq.TosaProgram, list[str]]:
    """Lower the cases of a family; also returns each difference from the reference, by case."""
    torch.manual_seed(0)
    model = randomize_batch_norms(Cases(rule, cases)).eval()
    shapes = [shape for case in cases for shape in case.shapes]
    example = tuple(torch.randn(shape) for shape in shapes)
    graph = planned(model, example, scheme)
    program = lower_graph(graph, example)
    reference = cq.IntegerReference(graph)
    found = []
    for given in (example, *stress(shapes)):
        got, want = program.run(*given), reference(*given)
        for case, a, b in zip(cases, got, want, strict=True):
            found += [f"{case.name}: {line}" for line in differences(a, b)]
    return graph, program, found
