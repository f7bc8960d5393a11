"""Commands that measure on data: ``evaluate``, ``verify``, ``diagnose``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from custom_quantizer.app.cli.arguments import (
    check_plot,
    existing_graph,
    graph_beside,
    lines_of,
    load_converted,
    load_samples,
    refuse_others,
    start_runtime,
)
from custom_quantizer.app.cli.console import echo, show
from custom_quantizer.app.cli.options import (
    MakePreprocess,
    NamedModel,
    classes_option,
    count_option,
    data_option,
    debug_option,
    examples,
    graph_argument,
    graph_option,
    isolated_option,
    json_option,
    model_option,
    output_option,
    path_argument,
    plot_option,
    preprocess_options,
    samples_option,
)
from custom_quantizer.errors import InputError


@click.command(
    "evaluate",
    epilog=examples(
        "custom-quantizer evaluate resnet18.pte --data val/ --resize 256 --crop 224 \\",
        "    --model resnet18 --weights DEFAULT",
    ),
)
@click.argument(
    "programs",
    metavar="PROGRAM...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@data_option("Folder or .zip of images by class, or tensors with labels.", required=True)
@samples_option()
@classes_option
@output_option
@graph_option(": evaluate it and its integer reference too.")
@isolated_option
@model_option("Float model to compare with.")
@preprocess_options
@count_option(
    "--slices", "Also show the accuracy on that many disjoint slices of the samples.", default=1
)
@json_option("Print JSON instead of a table.")
@debug_option
def evaluate_command(
    programs: tuple[Path, ...],
    data: str,
    samples: int | None,
    classes: Path | None,
    output_index: int | None,
    graph: Path | None,
    isolated: bool,
    model: NamedModel | None,
    preprocess: MakePreprocess,
    slices: int,
    as_json: bool,
) -> None:
    """Measure the accuracy of .pte files in the ExecuTorch runtime.

    A file without a checksum runs in a process of its own, with limits of memory and time.

    Top-1 and top-5. Each file is compared with the first model, sample by sample, and a sentence
    says whether their difference can be told from noise. With --model the float model comes first;
    then labels are not needed: how often the others agree with it is counted. With --graph the
    graph as PyTorch computes it and the integer reference are shown the same samples.
    """
    if model is not None:
        model.check()
    names = None if classes is None else lines_of(classes)
    source = load_samples(data, preprocess, samples, names)
    if source.labels is None and model is None and len(programs) == 1:
        raise InputError(
            f"{data} has no labels, so there is nothing to measure; name folders by class, save "
            "labels with the tensors, or pass a float --model to compare with"
        )
    from custom_quantizer.analysis.evaluation import evaluate
    from custom_quantizer.app.saved_graph import load_program_of
    from custom_quantizer.report.terminal import accuracy_table, print_table

    start_runtime()
    models: dict[str, Callable[..., Any]] = {}
    if model is not None:
        models["float model"] = model.load()
    if graph is not None:
        from custom_quantizer.app.saved_graph import load_graph
        from custom_quantizer.reference import integer_reference

        converted, _ = load_graph(graph)
        models["converted graph"] = converted
        models["integer reference"] = integer_reference(converted)
    for program in programs:
        # Two files of one name: only their paths tell them apart.
        unique = [path.name for path in programs].count(program.name) == 1
        beside = graph_beside(program)
        models[program.name if unique else str(program)] = load_program_of(
            program,
            beside if source.input_names and beside.exists() else None,
            isolated=isolated or None,
        ).run
    evaluation = evaluate(models, source, output=output_index, slices=slices)
    if as_json:
        click.echo(evaluation.to_json())
    else:
        print_table(accuracy_table(evaluation))
        notes = tuple(note.replace("output=N", "--output N") for note in evaluation.notes)
        echo(lambda: "\n".join((*evaluation.slice_lines(), *evaluation.conclusions, *notes)))


@click.command(
    "verify",
    epilog=examples(
        "custom-quantizer verify resnet18.pte",
        "custom-quantizer verify resnet18.pte --data val/ --resize 256 --crop 224 --samples 100",
        "custom-quantizer verify resnet18.pte --device-outputs device-test/",
    ),
)
@path_argument("program", "PROGRAM.pte")
@graph_option(".  [default: PROGRAM.graph.safetensors]")
@data_option("Inputs to compare on.  [default: random ones, and the integers of GRAPH's example]")
@samples_option("Samples of DATA, or batches of random inputs.", default=20)
@isolated_option
@model_option("Float model, for the SQNR against it.")
@preprocess_options
@click.option(
    "--device-outputs",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Compare what a device computed: a folder that LoweredProgram.save_device_test wrote, "
    "with the device's outputs in it, or one of several folders of outputs in that.",
)
@json_option()
@debug_option
@click.pass_context
def verify_command(
    ctx: click.Context,
    program: Path,
    graph: Path | None,
    data: str | None,
    samples: int,
    isolated: bool,
    model: NamedModel | None,
    preprocess: MakePreprocess,
    device_outputs: Path | None,
    as_json: bool,
) -> None:
    """Prove that a program computes the integers of its graph.

    Reading the two files runs no code in them. A program that is damaged is refused by its
    checksum; one without a checksum runs in a process of its own, with limits of memory and time.
    A checksum says that a file is whole, not who wrote it: see docs/files.md.

    Compares every weight, bias, scale and clamp in the file with the graph's, then the outputs of
    the runtime with the integer reference. Names the first op that differs. Exits with 0 if the
    program is bit-exact, with 1 if it is not. Images that are enlarged in float behind the last
    integers may differ by what is derived for that.

    With --device-outputs nothing is run: the outputs that a device computed are compared with those
    of the integer reference in the same folder.
    """
    if device_outputs is not None:
        refuse_others(ctx, "device_outputs", ("program", "as_json"))
        from custom_quantizer.analysis.device_outputs import check_device_outputs

        device = check_device_outputs(program, device_outputs)
        show(device, as_json)
        if not device.bit_exact:
            raise SystemExit(1)
        return
    floating = None if model is None else model.load()
    from custom_quantizer.analysis.verification import random_like, verify
    from custom_quantizer.app.saved_graph import load_lowered

    start_runtime()
    converted, lowered, example = load_lowered(
        program, graph or existing_graph(program), isolated=isolated or None
    )
    if data is None:
        inputs: list[Any] = [random_like(converted, example, seed) for seed in range(samples)]
    else:
        source = load_samples(data, preprocess, samples)
        inputs = list(source.with_batch_size(lowered.batch_size or 1).inputs)
    checked = verify(converted, lowered, inputs, float_model=floating)
    show(checked, as_json)
    if not checked.as_derived:
        raise SystemExit(1)


@click.command(
    "diagnose",
    epilog=examples(
        "custom-quantizer diagnose resnet18.pte --model resnet18 --weights w.pth \\",
        "    --data val/ --resize 256 --crop 224 --plot resnet18.svg",
    ),
)
@graph_argument
@model_option("The float model it was made of.", required=True)
@data_option("Samples, rather not those of the calibration.", required=True)
@samples_option(
    "Use at most that many, drawn evenly. Each is computed about ten times.", default=64
)
@preprocess_options
@plot_option("Also draw it, as .svg or .png.")
@json_option()
@debug_option
def diagnose_command(
    graph: Path,
    model: NamedModel,
    data: str,
    samples: int,
    preprocess: MakePreprocess,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Find the ops that lose accuracy.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. Every quantized
    tensor and weight is compared with its float twin on the same samples: the error that an op adds
    itself, what it inherits, the values that are cut off. docs/accuracy.md says how to read it.
    """
    if plot is not None:
        check_plot(plot)
    floating = model.load()
    source = load_samples(data, preprocess, samples)
    converted = load_converted(graph)
    from custom_quantizer.analysis.diagnosis import diagnose

    found = diagnose(floating, converted, source.inputs)
    if plot is not None:
        found.plot(plot)
        click.echo(f"wrote {plot}", err=True)
    show(found, as_json)
