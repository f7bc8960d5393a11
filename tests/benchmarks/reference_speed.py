"""How much slower the integer reference is than the converted graph, as ratios of one run.

    python tests/benchmarks/reference_speed.py

ResNet-20 with random weights at batch 100; the runs of both alternate, and medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import resnet20
from support.models import convert

import custom_quantizer as cq

RUNS = 7


def seconds(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    with torch.no_grad():
        function(x)
    return time.perf_counter() - start


def main() -> None:
    """Print one ratio per mode."""
    torch.manual_seed(0)
    x = torch.randn(100, 3, 32, 32)
    converted = convert(resnet20(pretrained=False), (x,)).graph
    for mode in ("xnnpack", "fixed_point"):
        reference = cq.integer_reference(converted, mode)
        seconds(reference, x)
        pairs = [(seconds(reference, x), seconds(converted, x)) for _ in range(RUNS)]
        ratio = statistics.median(slow / fast for slow, fast in pairs)
        print(f"{mode}: {ratio:.2f} x the converted graph (median of {RUNS} pairs)")


if __name__ == "__main__":
    main()
