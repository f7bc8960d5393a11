"""One torchvision model through one flow, measured: run as a process of its own.

``torchvision_models.py`` starts these processes; see there for what is measured. Seconds are CPU
seconds of the process, which other load on the machine changes least.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import torchvision_model

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import read_program
from custom_quantizer.backends.xnnpack.checks import is_exact
from custom_quantizer.core.files import write_bytes_atomic, write_json_atomic
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.verifying import output_scales

CALIBRATION_IMAGES = 8
CHECKED_IMAGES = 3

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------
# Models and images
# ---------------------------------------------------------------------------------------------


def images(name: str, size: int, count: int, seed: int) -> list[tuple[Tensor]]:
    """Random inputs: ``(1, 3, size, size)``, of eight frames for a video model."""
    frames = (8,) if name.startswith("r3d") else ()
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, 3, *frames, size, size, generator=generator),) for _ in range(count)]


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """CPU seconds of each stage, and which one is running, for error messages."""

    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = ""

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time a block as ``stage``."""
        self.stage = stage
        start = time.process_time()
        yield
        self.seconds[stage] = time.process_time() - start


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a model's result, whatever holds them."""
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def decibels(wanted: list[list[Tensor]], got: list[list[Tensor]]) -> float | None:
    """Signal to noise ratio over all outputs of all images; ``None`` if they are equal."""
    signal = noise = 0.0
    for want, have in zip(wanted, got, strict=True):
        for a, b in zip(want, have, strict=True):
            signal += float(a.double().square().sum())
            noise += float((a.double() - b.double()).square().sum())
    if noise == 0.0:
        return None
    return 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def calibrate(
    model: nn.Module, prepared: Callable[..., Any], batches: list[tuple[Tensor]]
) -> Record:
    """Run ``prepared`` on all images; float forwards run between them, to compare with."""
    model(*batches[0])
    ratios, total = [], 0.0
    for batch in batches:
        start = time.process_time()
        prepared(*batch)
        middle = time.process_time()
        model(*batch)
        end = time.process_time()
        ratios.append((middle - start) / (end - middle))
        total += middle - start
    return {
        "calibration_forwards": statistics.median(ratios),
        "calibration_images": len(batches),
        "calibration_s": total,
    }


def agreement(
    converted: GraphModule, wanted: list[list[Tensor]], got: list[list[Tensor]]
) -> Record:
    """How far outputs of the program are from those of the integer reference."""
    scales = output_scales(converted)
    values = different = 0
    most_units: float | None = None
    relative = 0.0
    for want, have in zip(wanted, got, strict=True):
        for a, b, scale in zip(want, have, scales, strict=True):
            values += a.numel()
            different += int((a != b).sum())
            noise, signal = float((a - b).norm()), float(a.norm())
            relative = max(relative, noise / signal if signal else noise)
            if scale is not None:
                most_units = max(most_units or 0.0, float(((a - b) / scale).abs().max()))
    return {
        "values": values,
        "different": different,
        "max_units": most_units,
        "relative": relative,
    }


def needed_bytes(converted: GraphModule) -> int:
    """Bytes of all integers of weights and biases, packed without padding."""
    total = 0
    for op in read_converted(converted).integer:
        if op.weight is not None:
            total += op.weight.numel() * (op.formats.weight_bits or 8) // 8
        if op.bias is not None:
            total += 4 * op.bias.numel()
    return total


def call_functions(model: GraphModule) -> int:
    """Number of calls in a graph."""
    return sum(node.op == "call_function" for node in model.graph.nodes)


# ---------------------------------------------------------------------------------------------
# The flows
# ---------------------------------------------------------------------------------------------


def stock_quantizer() -> Quantizer:
    """The stock quantizer with one scale a channel."""
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def lower_stock(model: Any, example: tuple[Tensor], clock: Clock) -> bytes:
    """Export, partition and write as ExecuTorch's documentation does it."""
    with clock.measure("export"):
        exported = torch.export.export(model, example)
    with clock.measure("partition"):
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    with clock.measure("write"):
        return bytes(edge.to_executorch().buffer)


def lower_ours(converted: GraphModule, example: tuple[Tensor], clock: Clock) -> cq.LoweredProgram:
    """Lower and check; each stage that :func:`cq.lower` announces is timed."""
    names = {
        "rewriting the graph": "rewrite",
        "exporting": "export",
        "partitioning for XNNPACK": "partition",
        "writing the program": "write",
        "checking the program": "check",
    }
    start, stage = time.process_time(), "read"

    def announce(text: str) -> None:
        nonlocal start, stage
        now = time.process_time()
        clock.seconds[stage] = now - start
        start, stage = now, names.get(text, text)
        clock.stage = stage

    lowered = cq.lower(converted, example, progress=announce)
    announce("done")
    return lowered


def run_flow(
    model: nn.Module,
    inputs: Callable[[int, int], list[tuple[Tensor]]],
    flow: str,
    clock: Clock,
    record: Record,
) -> bytes:
    """Measure one model in one flow; ``record`` holds what was done, also after an error.

    Args:
        model: in eval mode.
        inputs: gives a number of inputs for a seed.
        flow: ``stock``, ``ours`` or ``float``.
        clock: gets the seconds of each stage.
        record: gets everything else.

    Returns:
        The program, which runs.
    """
    (example,) = inputs(1, 1)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["seconds"] = clock.seconds
    clock.stage = "capture"
    with torch.enable_grad():  # as users capture: regions without gradients become calls
        captured = torch.export.export(model, example).module()
    record["captured_nodes"] = call_functions(captured)
    converted: Any = model
    if flow != "float":
        quantizer: Any = stock_quantizer() if flow == "stock" else cq.IntegerQuantizer()
        if flow == "ours":
            quantizer.set_global("a8w8")
        with clock.measure("prepare"):
            prepared = prepare_pt2e(captured, quantizer)
        clock.stage = "calibrate"
        record |= calibrate(model, prepared, inputs(CALIBRATION_IMAGES, 2))
        with clock.measure("convert"):
            converted = convert_pt2e(prepared)
        record["converted_nodes"] = call_functions(converted)
    reference: Callable[..., Any] | None = None
    run: Callable[..., Any]
    if flow == "ours":
        graph = read_converted(converted)
        record |= {
            "integer_ops": len(graph.integer),
            "float_ops": [[op.node.name, str(op.node.target), op.reason] for op in graph.floating],
            "needed_bytes": needed_bytes(converted),
        }
        lowered = lower_ours(converted, example, clock)
        data, run = lowered.buffer, lowered.run
        record["passes"] = dict(lowered.report.passes)
        record["outside_reasons"] = [
            [op.family, op.reason] for op in lowered.report.ops if "portable" in op.backend.label
        ]
        record["exact_expected"] = is_exact(lowered, graph)
        reference = cq.integer_reference(converted)
    else:
        data = lower_stock(converted, example, clock)
    record["bytes"] = len(data)
    clock.stage = "read back"
    contents = read_program(data)
    record["delegates"] = len(contents.delegates)
    record["outside"] = [str(kernel) for kernel in contents.kernels]
    if flow != "ours":
        clock.stage = "load"
        method = Runtime.get().load_program(data).load_method("forward")

        def run(*inputs: Tensor) -> Any:
            return [value.clone() for value in method.execute(list(inputs))]

    clock.stage = "run"
    held_out = inputs(CHECKED_IMAGES, 3)
    program = [flat(run(*given)) for given in held_out]
    clock.stage = "compare"
    record["sqnr_float"] = decibels([flat(model(*given)) for given in held_out], program)
    if flow != "float":
        in_pytorch = [flat(converted(*given)) for given in held_out]
        record["sqnr_graph"] = decibels(in_pytorch, program)
    if reference is not None:
        wanted = [flat(reference(*given)) for given in held_out]
        record["agreement"] = agreement(converted, wanted, program)
    return data


def latency(
    model: nn.Module, example: tuple[Tensor], programs: Mapping[str, Path], seconds: float
) -> Record:
    """Medians over interleaved runs, in CPU milliseconds, and ratios of neighbouring runs."""
    runs: dict[str, Callable[[], Any]] = {"eager": lambda: model(*example)}
    loaded = []  # the runtime reads the bytes where they are
    for flow, path in programs.items():
        data = path.read_bytes()
        method = Runtime.get().load_program(data).load_method("forward")
        loaded.append(data)
        runs[flow] = lambda m=method: m.execute(list(example))
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {flow: [] for flow in runs}
    deadline = time.perf_counter() + seconds
    while len(samples["eager"]) < 9 or time.perf_counter() < deadline:
        for flow, run in runs.items():
            start = time.process_time()
            run()
            samples[flow].append(1e3 * (time.process_time() - start))
    rounds = len(samples["eager"])
    return {
        "rounds": rounds,
        "milliseconds": {flow: statistics.median(times) for flow, times in samples.items()},
        "ours_over": {
            flow: statistics.median(
                ours / other for ours, other in zip(samples["ours"], times, strict=True)
            )
            for flow, times in samples.items()
            if "ours" in samples and flow != "ours"
        },
    }


def main() -> None:
    """Measure what the JSON object on the command line asks for; write one JSON file."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    portable_lib._unsafe_reset_threadpool(task["threads"])
    clock = Clock()
    record: Record = {"model": task["model"], "flow": task["flow"], "size": task["size"]}
    record["measured"] = date.today().isoformat()
    data: bytes | None = None
    try:
        with torch.no_grad():
            model = torchvision_model(task["model"])
            inputs = partial(images, task["model"], task["size"])
            if task["flow"] == "latency":
                programs = {flow: Path(path) for flow, path in task["programs"].items()}
                record |= latency(model, inputs(1, 4)[0], programs, task["latency_s"])
            else:
                data = run_flow(model, inputs, task["flow"], clock, record)
    except Exception as error:  # what failed is a result, too
        text = str(error).strip()
        record["error"] = f"{clock.stage}: {type(error).__name__}: {text[:400]}"
    if data is not None:
        write_bytes_atomic(task["program"], data)
    write_json_atomic(task["record"], record)


if __name__ == "__main__":
    main()
