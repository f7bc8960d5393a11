"""Commands that write a network for something else: ``export-integers``, ``-c``, ``-onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from custom_quantizer.app.cli.arguments import load_converted
from custom_quantizer.app.cli.console import show
from custom_quantizer.app.cli.options import (
    count_option,
    debug_option,
    examples,
    graph_argument,
    path_argument,
)


@click.command(
    "export-integers",
    epilog=examples(
        "custom-quantizer export-integers resnet18.pte integers/resnet18",
        "custom-quantizer export-integers resnet18.graph.safetensors integers/resnet18",
    ),
)
@graph_argument
@path_argument("output", "PATH")
@debug_option
def export_integers_command(graph: Path, output: Path) -> None:
    """Write a network as integers for other hardware.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. PATH.json says
    what to compute with which multipliers and shifts, PATH.safetensors holds weights, biases and
    constants; docs/integer_bundle.md describes both, and runs them with NumPy alone.

    Every op has to be integer; an error names those that are not.
    """
    from custom_quantizer.reference.bundle import save_integers
    from custom_quantizer.reference.numpy_runner import bundle_files

    save_integers(load_converted(graph), output)
    click.echo("\n".join(f"wrote {file}" for file in bundle_files(output)))


@click.command(
    "export-c",
    epilog=examples(
        "custom-quantizer export-c digits.pte firmware/digits --name digits",
        "make -C firmware/digits test",
    ),
)
@graph_argument
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="net", show_default=True, help="Prefix of files and C names.")
@count_option("--batch", "First dimension of the inputs.  [default: the captured one]")
@count_option(
    "--vectors",
    "Test vectors: random inputs, and the integers that NumPy computes from them.",
    default=2,
)
@debug_option
def export_c_command(graph: Path, folder: Path, name: str, batch: int | None, vectors: int) -> None:
    """Write a network as C99 that computes on integers alone, for a microcontroller.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. The code needs no
    float, no allocation and no library; its memory is static and its sizes are printed. A test with
    embedded inputs and outputs comes along: `make test` in FOLDER runs it.

    Every op has to be integer; an error names those that are not.
    """
    from custom_quantizer.reference.c_code import save_c

    code = save_c(load_converted(graph), folder, name=name, batch=batch, vectors=vectors)
    show(code)


@click.command(
    "export-onnx",
    epilog=examples(
        "custom-quantizer export-onnx resnet18.pte resnet18.onnx",
        "custom-quantizer export-onnx resnet18.pte resnet18.onnx --activations int8",
    ),
)
@graph_argument
@click.argument("output", metavar="PATH", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8"]),
    default="uint8",
    show_default=True,
    help="Type of activations of up to 8 bits; uint8 is what ONNX Runtime computes with on x86.",
)
@debug_option
def export_onnx_command(graph: Path, output: Path, activations: Literal["uint8", "int8"]) -> None:
    """Write a network as an ONNX model with QuantizeLinear and DequantizeLinear.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. The model has the
    integers of the graph's weights and biases, and its scales; what a runtime computes between them
    may differ by a step, see docs/interchange.md.

    Needs the extra: pip install 'custom-quantizer[onnx]'.
    """
    from custom_quantizer.reference.interchange.onnx_file import save_onnx

    show(save_onnx(load_converted(graph), output, activations=activations))
