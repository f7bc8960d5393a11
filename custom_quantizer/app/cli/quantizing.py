"""Commands that quantize, and those before it: ``demo``, ``plan``, ``calibrate``, ``quantize``."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from custom_quantizer.app.cli.arguments import (
    check_can_write,
    check_output,
    example_inputs,
    load_samples,
    quantizer_for,
    random_inputs,
    refuse_given,
    start_runtime,
)
from custom_quantizer.app.cli.console import echo, say
from custom_quantizer.app.cli.options import (
    CALIBRATION_SAMPLES,
    InputShape,
    MakePreprocess,
    NamedModel,
    accuracy_option,
    checkpoint_option,
    count_option,
    data_option,
    debug_option,
    dynamic_option,
    examples,
    file_option,
    html_option,
    improve_option,
    io_option,
    json_option,
    model_argument,
    preprocess_options,
    samples_option,
    scheme_options,
    shape_option,
)
from custom_quantizer.errors import CustomQuantizerError, InputError

if TYPE_CHECKING:
    from custom_quantizer.app.pipeline import QuantizationResult, SavedFiles


@click.command(
    "demo",
    epilog=examples(
        "custom-quantizer demo --output /tmp/digits",
    ),
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("custom-quantizer-demo"),
    show_default=True,
    help="Directory for the program and the report.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the training.")
@debug_option
def demo_command(output: Path, seed: int) -> None:
    """Train, quantize and run a small CNN on handwritten digits.

    Needs no download and less than a minute. It prints the accuracy before and after, one row
    per op, and one layer's bias from float to the int32 in the file.
    """
    from custom_quantizer.app.demo import run_demo

    start_runtime()
    run_demo(output, seed=seed)


@click.command(
    "plan",
    epilog=examples(
        "custom-quantizer plan mobilenet_v2",
        "custom-quantizer plan net.py:make --input-shape 1,1,28,28 --config mixed.yaml",
    ),
)
@model_argument
@scheme_options
@io_option
@shape_option
@json_option("Print JSON instead of a table.")
@debug_option
def plan_command(
    model: NamedModel,
    asked: str | Path,
    integer_io: bool,
    shapes: tuple[InputShape, ...],
    as_json: bool,
) -> None:
    """Show what would become of every op of MODEL, and why.

    Nothing is calibrated. MODEL is a torchvision model, package.module:function or
    file.py:function. Inputs are random, float32 of shape 1,3,224,224 unless --input-shape says
    otherwise (int64:1,16 is one of 16 indices).
    """
    model.check()
    quantizer = quantizer_for(asked, integer_io)
    with warnings.catch_warnings():
        # The plan does not depend on the weights, so random ones need no warning.
        warnings.filterwarnings("ignore", message=".*random weights")
        module = model.load()
    from custom_quantizer.app.capture import capture
    from custom_quantizer.report.terminal import plan_table, print_table, size_text

    exported, _ = capture(module, random_inputs(shapes or (InputShape((1, 3, 224, 224), None),)))
    plan = quantizer.plan(exported)
    if as_json:
        click.echo(plan.to_json())
        return
    print_table(plan_table(plan))
    tally = f"{plan.tally}; about {size_text(plan.size_bytes)} of constants"
    echo(lambda: "\n".join((tally, *map(str, plan.borders))))
    for warning in plan.warnings:
        say("warning", warning)


@click.command(
    "calibrate",
    epilog=examples(
        "custom-quantizer calibrate resnet18 --weights w.pth --data images/ \\",
        "    --resize 256 --crop 224 -o resnet18.stats.safetensors",
        "custom-quantizer quantize resnet18 --weights w.pth \\",
        "    --statistics resnet18.stats.safetensors -o resnet18.pte",
    ),
)
@model_argument
@data_option(required=True)
@samples_option(
    "Use at most that many, drawn evenly over the classes.", default=CALIBRATION_SAMPLES
)
@preprocess_options
@scheme_options
@shape_option
@dynamic_option
@checkpoint_option
@file_option(
    "-o", "--output", required=True, metavar="STATS", help="File to write; ends in .safetensors."
)
@json_option()
@debug_option
def calibrate_command(
    model: NamedModel,
    data: str,
    samples: int,
    preprocess: MakePreprocess,
    asked: str | Path,
    shapes: tuple[InputShape, ...],
    dynamic_batch: bool,
    checkpoint: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """Record the ranges of MODEL's activations, for quantize --statistics.

    MODEL is a torchvision model, package.module:function or file.py:function. Values are counted,
    so one file serves all bit-widths and observers; the scheme or config says which tensors are
    quantized at all. The program is the one that quantize --calibration makes of the same data.
    """
    if output.suffix != ".safetensors":
        raise click.UsageError(f"--output {output}: name a file that ends in .safetensors")
    if checkpoint is not None and checkpoint.resolve() == output.resolve():
        raise click.UsageError(f"--checkpoint {checkpoint} is the --output, too; name two files")
    check_can_write(output)
    model.check()
    quantizer = quantizer_for(asked, False)
    module = model.load()
    source = load_samples(data, preprocess, samples)
    from custom_quantizer.app.pipeline import record_calibration

    summary = record_calibration(
        module,
        example_inputs(source, shapes),
        source,
        output,
        config=quantizer,
        dynamic_batch=dynamic_batch,
        checkpoint=checkpoint,
    )
    if as_json:
        from custom_quantizer.analysis.fidelity import finite

        click.echo(json.dumps(finite(dataclasses.asdict(summary)), indent=2))
        return
    echo(lambda: f"{summary}\n\n{summary.convergence()}\n")
    for warning in summary.warnings:
        say("warning", warning)
    echo(lambda: f"wrote {output}, which quantize --statistics takes")


@click.command(
    "quantize",
    epilog=examples(
        "custom-quantizer quantize resnet18 --weights DEFAULT --calibration images/ \\",
        "    --resize 256 --crop 224 -o resnet18.pte",
        "custom-quantizer quantize net.py:make --weights net.safetensors \\",
        "    --calibration calibration.npz --config mixed.yaml -o net.pte",
        "custom-quantizer quantize net.py:make --weights net.safetensors \\",
        "    --statistics net.stats.safetensors --scheme a16w8 -o net.pte",
    ),
)
@model_argument
@data_option(name="--calibration")
@file_option(
    "--statistics",
    metavar="STATS",
    help="What `calibrate` wrote, instead of --calibration. With both, the data are used by "
    "algorithms that improve accuracy alone.",
)
@count_option(
    "--calibration-samples",
    "Use at most that many, drawn evenly over the classes.",
    default=CALIBRATION_SAMPLES,
)
@preprocess_options
@scheme_options
@io_option
@shape_option
@dynamic_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.pte",
    help="Program to write; beside it go the report, OUT.json, and the graph, "
    "OUT.graph.safetensors.",
)
@json_option("Print the report as JSON.")
@html_option
@accuracy_option
@improve_option
@debug_option
@click.pass_context
def quantize_command(
    ctx: click.Context,
    model: NamedModel,
    calibration: str | None,
    statistics: Path | None,
    calibration_samples: int,
    preprocess: MakePreprocess,
    asked: str | Path,
    integer_io: bool,
    shapes: tuple[InputShape, ...],
    dynamic_batch: bool,
    output: Path,
    as_json: bool,
    html: Path | None,
    accuracy: str | None,
    improve: tuple[str, ...],
) -> None:
    """Quantize MODEL and write a checked ExecuTorch program.

    MODEL is a torchvision model, package.module:function or file.py:function. The program takes
    inputs of the shape of the calibration data, one at a time, unless --input-shape or
    --dynamic-batch says otherwise.

    With --html the error of every tensor is measured on some of the calibration data, too, where
    these are given.
    """
    if statistics is not None:
        refuse_given(
            ctx,
            ("shapes", "dynamic_batch"),
            "--statistics, which says the shapes that were calibrated with",
        )
    elif calibration is None:
        raise click.UsageError(
            "Missing option '--calibration' or '--statistics': without one of them no range of an "
            "activation is known"
        )
    check_output(output)
    check_can_write(html)
    model.check()
    quantizer = quantizer_for(asked, integer_io)
    recorded = None
    if statistics is not None:
        from custom_quantizer.app.recorded import read_calibration

        recorded = read_calibration(statistics)
    module = model.load()
    data = None
    if calibration is not None:
        data = load_samples(calibration, preprocess, calibration_samples)
    example = example_inputs(data, shapes) if recorded is None else recorded.example
    batch = dynamic_batch if recorded is None else recorded.dynamic_batch
    from custom_quantizer.app.pipeline import quantize

    start_runtime()
    result = quantize(
        module,
        example,
        data,
        config=quantizer,
        statistics=recorded,
        accuracy=accuracy,
        improve=improve or None,
        dynamic_batch=batch,
    )
    if html is not None and data is not None:
        from custom_quantizer.app.reporting import with_tensors

        # What took minutes is written, even if this cannot be.
        try:
            result = with_tensors(result, data)
        except CustomQuantizerError as error:
            say("warning", f"the page lacks the errors of tensors: {error}")
    files = result.save(output)
    if html is not None:
        result.report.including(result.fidelity).save_html(html, title=output.stem)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(files.report.read_text())
    else:
        _summarize(model.name, result, files)


_SHOWN = 10


def _summarize(model: str, result: QuantizationResult, files: SavedFiles) -> None:
    """What a user wants to know before running the program."""
    from custom_quantizer.report.terminal import size_text

    lowered = result.lowered
    if lowered is None or files.program is None:
        raise InputError("nothing was lowered")
    report = lowered.report
    click.echo(f"{model}: {report.tally}")
    # Of an op that became several, one says it for all.
    other = list({op.written: op for op in reversed(report.not_integer())}.values())[::-1]
    for op in other[:_SHOWN]:
        where = f" ({op.path})" if op.path else ""
        click.echo(f"  {op.written}{where}: {op.backend.label}; {op.reason}")
    if len(other) > _SHOWN:
        click.echo(f"  and {len(other) - _SHOWN} more, all in the report")
    if result.plan.tally != report.tally:
        click.echo(f"the plan expected {result.plan.tally}")
    click.echo(f"calibration: {result.calibration}")
    if result.improvement is not None:
        click.echo(f"{result.improvement}")
    checked = "read back from the file and equal"
    biases = result.report.biases
    if lowered.integer_biases():
        biases += f"; the int32 ones are {checked}" if ";" in biases else f", {checked}"
    click.echo(biases)
    click.echo(f"delegate calls: {report.delegates}; kernels outside: {len(report.outside)}")
    for border in lowered.borders:
        click.echo(f"{border}: {border.meaning}")
    for output in result.fidelity.outputs:
        click.echo(f"{output}")
    warnings = (
        *result.plan.warnings,
        *result.calibration.warnings,
        *result.fidelity.warnings,
        files.graph_reason,
    )
    for warning in filter(None, warnings):
        say("warning", warning)
    click.echo(f"wrote {files.program} ({size_text(report.size_bytes)}) and {files.report}")
    if files.graph is not None:
        click.echo(f"wrote {files.graph}, which verify and the export commands read")
