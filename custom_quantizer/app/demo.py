"""``custom-quantizer demo``: the whole flow on real digits, with the integers laid open.

Nothing is downloaded. A small CNN is trained on scikit-learn's handwritten digits, quantized,
lowered and run; what is printed was measured in this run.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from custom_quantizer.analysis.evaluation import Evaluation, evaluate
from custom_quantizer.analysis.verification import Verification, verify
from custom_quantizer.app.digits import load_digits_data, train_digits
from custom_quantizer.app.pipeline import QuantizationResult, SavedFiles, quantize, save_result
from custom_quantizer.backends.xnnpack import LoweredProgram
from custom_quantizer.core.graph import module_path
from custom_quantizer.errors import InputError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.reference import integer_reference
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.report.terminal import (
    make_console,
    make_table,
    op_table,
    print_table,
    size_text,
)

__all__ = ["BiasChannel", "DemoResult", "LayerBias", "Sizes", "run_demo"]

CALIBRATION_SAMPLES = 512
LAYER = "classifier"
"""Its bias is shown number by number: a parameter of the model, not folded from a batch norm."""


@dataclass(frozen=True)
class BiasChannel:
    """One number of a bias on its way from the model to the file.

    Attributes:
        real: the model's float bias.
        weight_scale: of the channel.
        scale: of the bias, ``s_x * s_w`` rounded to float32, as the graph holds it.
        quotient: ``real / (s_x * s_w)`` in float64, not rounded.
        in_graph: the int32 of the converted graph.
        in_program: the int32 read back from the ``.pte``.
    """

    real: float
    weight_scale: float
    scale: float
    quotient: float
    in_graph: int
    in_program: int

    @property
    def agrees(self) -> bool:
        """Whether graph and file hold the quotient, rounded half to even."""
        return round(self.quotient) == self.in_graph == self.in_program


@dataclass(frozen=True)
class LayerBias:
    """The bias of one layer.

    Attributes:
        path: module path.
        input_scale: of the layer's activation.
        channels: one entry per output channel.
    """

    path: str
    input_scale: float
    channels: tuple[BiasChannel, ...]


@dataclass(frozen=True)
class Sizes:
    """Bytes, before and after.

    Attributes:
        float_file: the model's state dict as ``torch.save`` writes it.
        float_values: the numbers in it.
        program_file: the ``.pte``.
        program_values: the constants in it.
    """

    float_file: int
    float_values: int
    program_file: int
    program_values: int


@dataclass(frozen=True, eq=False)
class DemoResult:
    """All that the demo measured.

    Attributes:
        result: of the flow.
        evaluation: of the float model, the converted graph, the integer reference, the program.
        verification: program against integer reference, on all held-out digits.
        layer: one bias, number by number.
        biases: how many layers have an int32 bias, how many integers these are, and how many of
            them are the same in the graph and in the file.
        sizes: in bytes.
        files: where the program and its report are.
    """

    result: QuantizationResult = field(repr=False)
    evaluation: Evaluation
    verification: Verification
    layer: LayerBias
    biases: tuple[int, int, int]
    sizes: Sizes
    files: SavedFiles


def run_demo(
    output: Path, *, seed: int = 0, console: Console | None = None, progress: bool | None = None
) -> DemoResult:
    """Train, quantize, lower, run and explain.

    The same seed gives the same numbers on the same machine.

    Args:
        output: directory for the program and the report; made if it does not exist.
        seed: of the training.
        console: where to print; ``None``: standard output.
        progress: True shows bars, None does so at a terminal.

    Raises:
        InputError: ``output`` cannot be written.
    """
    console = console or make_console()
    started = time.perf_counter()
    _make_directory(output)
    console.print("[bold]custom-quantizer demo[/]: from a float network to verified integers\n")

    data = load_digits_data()
    model = train_digits(seed, progress=progress, data=data)
    _step(
        console,
        "train",
        f"a CNN of {sum(p.numel() for p in model.parameters()):,} parameters on "
        f"{len(data.train_images):,} handwritten digits",
        started,
    )

    lap = time.perf_counter()
    calibration = data.train_images[:CALIBRATION_SAMPLES]
    result = quantize(model, (data.train_images[:1],), calibration, progress=progress)
    program = cast(LoweredProgram, result.lowered)
    _step(
        console,
        "quantize",
        f"scheme a8w8, calibrated on {result.calibration.samples} of the training digits",
    )
    _step(
        console,
        "lower",
        f"{program.report.delegates} call of the XNNPACK delegate, "
        f"{len(program.report.outside)} kernels outside it",
        lap,
    )

    lap = time.perf_counter()
    tests = list(zip(data.test_images[:, None], data.test_labels[:, None], strict=True))
    evaluation = evaluate(
        {
            "float32": model,
            "converted graph": result.converted,
            "integer reference": integer_reference(result.converted),
            ".pte": program,
        },
        tests,
        progress=progress,
    )
    verification = verify(result.converted, program, [(image,) for image, _ in tests])
    _step(console, "run", f"{len(tests)} held-out digits, one by one", lap)

    layer, biases = _layer_bias(result, model, LAYER), _count_biases(result)
    sizes = _sizes(model, program)
    measured = {
        "evaluation": json.loads(evaluation.to_json()),
        "verification": json.loads(verification.to_json()),
        "layer": asdict(layer),
        "biases": dict(zip(("layers", "integers", "equal"), biases, strict=True)),
        "sizes": asdict(sizes),
    }
    files = save_result(result, output / "digits.pte", {"demo": measured})
    demo = DemoResult(result, evaluation, verification, layer, biases, sizes, files)
    _show(console, demo)
    return demo


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            f"{output}: cannot make this directory ({why}); choose another --output"
        ) from error


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def _with_bias(result: QuantizationResult) -> tuple[QuantizedOp, ...]:
    return read_converted(result.converted).with_bias()


def _layer_bias(result: QuantizationResult, model: nn.Module, path: str) -> LayerBias:
    """Follow the bias of one layer; the quotient is computed from the model, not the graph."""
    (op,) = (op for op in _with_bias(result) if module_path(op.node) == path)
    weight = op.weight_qparams
    if weight is None or op.bias is None or result.lowered is None:
        raise InputError(f"{path} has no integer bias that could be shown")
    real = cast(Tensor, model.get_submodule(path).bias).detach().to(torch.float64)
    input_scale = float(op.inputs[0].scale)
    weight_scale = torch.as_tensor(weight.scale).to(torch.float64).expand(len(real))
    (row,) = (row for row in result.report.rows if row.path == path)
    scales = row.bias.scales if row.bias is not None else ()
    stored = result.lowered.integer_biases()[op.node.name]
    channels = zip(
        real.tolist(),
        weight_scale.tolist(),
        np.broadcast_to(np.asarray(scales), len(real)).tolist(),
        (real / (input_scale * weight_scale)).tolist(),
        op.bias.tolist(),
        stored.tolist(),
        strict=True,
    )
    return LayerBias(path, input_scale, tuple(BiasChannel(*values) for values in channels))


def _count_biases(result: QuantizationResult) -> tuple[int, int, int]:
    layers = _with_bias(result)
    stored = result.lowered.integer_biases() if result.lowered is not None else {}
    pairs = [
        (mine, its)
        for op in layers
        if op.bias is not None
        for mine, its in zip(op.bias.tolist(), stored[op.node.name].tolist(), strict=True)
    ]
    return len(layers), len(pairs), sum(mine == its for mine, its in pairs)


def _sizes(model: nn.Module, program: LoweredProgram) -> Sizes:
    file = io.BytesIO()
    state = model.state_dict()
    torch.save(state, file)
    values = sum(value.numel() * value.element_size() for value in state.values())
    contents = program.contents
    return Sizes(file.tell(), values, contents.size_bytes, contents.constant_bytes)


# ---------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------


def _step(console: Console, name: str, text: str, since: float | None = None) -> None:
    took = "" if since is None else f"  [dim]{time.perf_counter() - since:.1f} s[/]"
    console.print(f"[green]done[/]  [bold]{name:<9}[/] {text}{took}")


def _show(console: Console, demo: DemoResult) -> None:
    tests = demo.evaluation.scores[0].samples
    console.print()
    print_table(_accuracy_table(demo.evaluation, f"Accuracy on {tests} held-out digits"), console)
    console.print(_exactness(demo.verification))
    console.print()
    print_table(_size_table(demo.sizes), console)
    report = demo.result.report
    print_table(op_table(report), console)
    console.print(f"In all {report.tally}; {report.biases}\n")
    console.print("[bold]Is the bias quantized?[/] " + _answer(demo))
    console.print()
    print_table(_bias_table(demo.layer), console)
    layers, integers, equal = demo.biases
    console.print(
        f"All {layers} biases, {integers} integers: {equal} of {integers} are the same in graph "
        f"and file.\nOnly {demo.layer.path} has one in the model; the others come from folding "
        "batch norm."
    )
    console.print()
    lines = (
        ("program", str(demo.files.program)),
        ("graph", str(demo.files.graph)),
        ("report", str(demo.files.report)),
        ("next", f"custom-quantizer inspect {demo.files.program}"),
        ("", f"custom-quantizer verify {demo.files.program}"),
    )
    for name, text in lines:
        # Paths can be longer than the line and must stay in one piece.
        console.print(f"{name:<8} {text}", soft_wrap=True, markup=False)


def _accuracy_table(evaluation: Evaluation, title: str) -> Table:
    first = evaluation.scores[0].name
    columns = ("model", "correct", "top-1", f"agrees with {first}")
    table = make_table(title, columns, right=columns[1:])
    for score in evaluation.scores:
        table.add_row(
            score.name,
            f"{score.correct} / {score.samples}",
            f"{score.top1:.2%}",
            f"{score.agreeing} / {score.samples}",
        )
    return table


def _exactness(verification: Verification) -> str:
    (output,) = verification.outputs
    return (
        f".pte against integer reference: {output.values - output.mismatches:,} of "
        f"{output.values:,} outputs bit-identical.\n"
        f".pte against the graph in PyTorch: {output.values - output.graph_mismatches:,} of "
        f"{output.values:,}; that one computes in float."
    )


def _size_table(sizes: Sizes) -> Table:
    table = make_table("Size", ("", "file", "numbers in it"), right=("file", "numbers in it"))
    table.add_row("float32 state dict", size_text(sizes.float_file), size_text(sizes.float_values))
    table.add_row(".pte", size_text(sizes.program_file), size_text(sizes.program_values))
    return table


def _answer(demo: DemoResult) -> str:
    layer = demo.layer
    if not all(channel.agrees for channel in layer.channels):
        return f"[red]No: {layer.path} has integers that are not round(b / s_b).[/]"
    return (
        f"Yes, to int32, and the file holds these integers.\nLayer [bold]{layer.path}[/]: "
        f"s_b = s_x * s_w, zero point 0, with s_x = {layer.input_scale:.9g}"
    )


def _bias_table(layer: LayerBias) -> Table:
    columns = ("", "float bias b", "s_w", "s_b", "b / s_b", "int32 in\ngraph", "int32 in\n.pte")
    table = make_table("", (*columns, "same"), right=columns)
    for number, channel in enumerate(layer.channels):
        table.add_row(
            str(number),
            f"{channel.real:+.7f}",
            f"{channel.weight_scale:.8f}",
            f"{channel.scale:.6e}",
            f"{channel.quotient:,.3f}",
            f"{channel.in_graph:,}",
            f"{channel.in_program:,}",
            "[green]yes[/]" if channel.agrees else "[red]NO[/]",
        )
    return table
