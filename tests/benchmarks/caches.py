"""A step of a decoder that keeps keys and values in buffers, against the stock flow.

    python tests/benchmarks/caches.py --output docs/results

Four attention layers of 256 features write a row of their caches at a position that is an input:
with ``cache.index_copy_(2, position, x)``, or with ``cache[:, :, position] = x``. int8 activations
and weights, one thread, medians of alternating steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import main_of

ROWS = ("64", "512", "2048")
LAYERS, FEATURES, HEADS, STEPS = 4, 256, 4, 60
FLOWS = ("copied", "assigned", "stock copied", "stock assigned")

Record = dict[str, Any]


def decoder(rows: int, *, copied: bool) -> Any:
    """Layers that attend to what they kept."""
    import torch
    from torch import Tensor, nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask, self.key = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
            self.value, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
            shape = (1, HEADS, rows, FEATURES // HEADS)
            self.register_buffer("keys", torch.zeros(shape))
            self.register_buffer("values", torch.zeros(shape))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            ask, key, value = (
                layer(x).view(1, 1, HEADS, FEATURES // HEADS).transpose(1, 2)
                for layer in (self.ask, self.key, self.value)
            )
            if copied:
                self.keys.index_copy_(2, at, key)
                self.values.index_copy_(2, at, value)
            else:
                self.keys[:, :, at] = key
                self.values[:, :, at] = value
            scores = ask @ self.keys.transpose(-1, -2) / (FEATURES // HEADS) ** 0.5
            hidden = torch.arange(rows) > at[:, None]
            weights = scores.masked_fill(hidden, -1e4).softmax(-1)
            return x + self.out((weights @ self.values).transpose(1, 2).reshape(1, 1, FEATURES))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, at)
            return x

    torch.manual_seed(0)
    return Decoder().eval()


def measure(case: str) -> Record:
    """Milliseconds, delegates and kernels outside of each way, for caches of some rows."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sys.path.insert(0, str(Path(__file__).parent))
    from torchvision_flow import Clock, lower_stock, stock_quantizer

    import custom_quantizer as cq

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    portable_lib._unsafe_reset_threadpool(1)
    calls = [(torch.randn(1, 1, FEATURES), torch.tensor([at])) for at in range(STEPS)]
    methods, found, programs = {}, {}, []
    for flow in FLOWS:
        model = decoder(int(case), copied="copied" in flow)
        if flow.startswith("stock"):
            captured = torch.export.export(model, calls[0]).module()
            prepared = prepare_pt2e(captured, stock_quantizer())
            for call in calls[:8]:
                prepared(*call)
            data = lower_stock(convert_pt2e(prepared), calls[0], Clock())
        else:
            data = cq.quantize(model, calls[0], calls[:8], progress=False).lowered.buffer
        contents = cq.read_program(data)
        found[flow] = {"delegates": len(contents.delegates), "outside": len(contents.kernels)}
        programs.append(data)  # the runtime reads them where they are
        methods[flow] = Runtime.get().load_program(data).load_method("forward")
    took: dict[str, list[float]] = {flow: [] for flow in FLOWS}
    for call in calls:
        for flow in FLOWS:
            start = time.perf_counter()
            methods[flow].execute(list(call))
            took[flow].append(time.perf_counter() - start)
    for flow in FLOWS:
        found[flow]["ms"] = 1e3 * statistics.median(took[flow])
    return {"flows": found}


def render(record: Record) -> str:
    """The table of docs/results/caches.md."""
    lines = [
        "A step of four attention layers of 256 features, one thread: time as a share of stock's "
        "for the same model, and in brackets delegates and kernels outside (stock's):",
        "",
    ]
    header = [
        "rows of a cache",
        "`index_copy_`",
        "`cache[:, :, position] = x`",
        "the first / the second",
    ]
    rows = [header, ["---"] * len(header)]
    for result in record["results"]:
        flows = result["flows"]
        cells = [f"{int(result['case']):,}"]
        for way in ("copied", "assigned"):
            ours, stock = flows[way], flows[f"stock {way}"]
            cells.append(
                f"{ours['ms'] / stock['ms']:.2f} ({ours['delegates']}, {ours['outside']}; "
                f"{stock['delegates']}, {stock['outside']})"
            )
        cells.append(f"{flows['copied']['ms'] / flows['assigned']['ms']:.2f}")
        rows.append(cells)
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def main() -> None:
    """Measure caches of each size."""
    main_of(__file__, __doc__, ROWS, measure, render)


if __name__ == "__main__":
    main()
