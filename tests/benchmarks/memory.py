"""Peak memory of each stage, ours and the stock flow, over what a process holds before it.

    python tests/benchmarks/memory.py --output docs/results

Each flow and model has a process of its own, which has lowered a small network before, so that
libraries are loaded. Between two stages Linux's high-water mark (``VmHWM``) is set back to what is
resident. All numbers are MB above what was resident with the model made, and its parameters are
in ``parameters``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import main_of

MODELS = ("linear 8192", "resnet18", "vit_b_16")
FLOWS = ("ours", "stock")
MB = 1 << 20

Record = dict[str, Any]


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def settle() -> int:
    """Set the high-water mark back; returns what is resident."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peaks(name: str, flow: str) -> Record:
    """Peak of each stage in MB above the base."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from support.chains import convert_in_stages
    from support.models import torchvision_model
    from torch import nn
    from torchvision_flow import Clock, lower_stock, stock_quantizer

    import custom_quantizer as cq

    torch.set_num_threads(1)

    def run(model: nn.Module, x: Any, stage: Callable[[str], Any]) -> None:
        ours = cq.IntegerQuantizer().set_global("a8w8")
        quantizer = ours if flow == "ours" else stock_quantizer()
        converted = convert_in_stages(model, x, quantizer, stage)
        with stage("lower"):
            if flow == "ours":
                cq.lower(converted, (x,))
            else:
                lower_stock(converted, (x,), Clock())

    found: dict[str, float] = {}
    base = 0

    @contextmanager
    def measured(stage: str) -> Iterator[None]:
        settle()
        yield
        found[stage] = round((status("VmHWM") - base) / MB, 1)

    with torch.no_grad():
        run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8), measured)
        found.clear()
        if name.startswith("linear"):
            size = int(name.split()[1])
            model, x = nn.Linear(size, size).eval(), torch.randn(1, size)
        else:
            model, x = torchvision_model(name), torch.randn(1, 3, 224, 224)
        base = settle()
        run(model, x, measured)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "model": name,
        "flow": flow,
        "parameters": round(parameters / MB, 1),
        "peaks": found,
        "peak": max(found.values()),
    }


def render(record: Record) -> str:
    """The table of docs/results/memory.md."""
    results = record["results"]
    stages = list(results[0]["peaks"])
    rows = [["network", "flow", "parameters", *stages, "highest"], ["---"] * (len(stages) + 4)]
    for result in results:
        numbers = (*(result["peaks"][stage] for stage in stages), result["peak"])
        parameters = f"{result['parameters']:.0f}"
        cells = (result["model"], result["flow"], parameters, *(f"{mb:.0f}" for mb in numbers))
        rows.append(list(cells))
    lines = ["Peak of each stage in MB above what is resident with the model made, one thread:", ""]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def main() -> None:
    """Measure each network in both flows."""
    cases = [f"{name}, {flow}" for name in MODELS for flow in FLOWS]
    main_of(__file__, __doc__, cases, lambda case: peaks(*case.split(", ")), render)


if __name__ == "__main__":
    main()
