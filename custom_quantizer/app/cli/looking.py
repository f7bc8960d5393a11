"""Commands that show what a program holds: ``inspect``, ``report``, ``profile``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from custom_quantizer.app.cli.arguments import (
    check_can_write,
    check_plot,
    graph_beside,
    lines_of,
    load_samples,
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
    file_option,
    graph_option,
    html_option,
    json_option,
    model_option,
    output_option,
    path_argument,
    plot_option,
    preprocess_options,
    samples_option,
)
from custom_quantizer.errors import InputError

if TYPE_CHECKING:
    from custom_quantizer.report.record import ProgramReport, Report


@click.command(
    "inspect",
    epilog=examples(
        "custom-quantizer inspect resnet18.pte",
        "custom-quantizer inspect resnet18.pte --op conv2d_3",
        "custom-quantizer inspect resnet18.json --html resnet18.html",
        "custom-quantizer inspect net.pte --data-path weights.ptd",
    ),
)
@path_argument("file")
@click.option("--op", metavar="NAME", help="Show all that is known of one op.")
@json_option("Print JSON instead of a table.")
@html_option
@click.option(
    "--data-path",
    "data_path",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE.ptd",
    help="Weights that the .pte keeps outside; may be given several times.",
)
@debug_option
def inspect_command(
    file: Path, op: str | None, as_json: bool, html: Path | None, data_path: tuple[Path, ...]
) -> None:
    """Show dtype, scale and zero point of every tensor in FILE.

    And where each bias went. FILE is a .pte, read from its bytes alone, or a report that quantize
    wrote (OUT.json, or a directory with report.json).
    """
    check_can_write(html)
    report = _read_report(file, data_path)
    if html is not None:
        report.save_html(html)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(report.to_json())
    elif op is not None:
        echo(lambda: report.detail(op))
    elif html is None:
        show(report)


def _read_report(file: Path, data_path: tuple[Path, ...]) -> Report | ProgramReport:
    if file.suffix == ".json" or file.is_dir():
        if data_path:
            raise InputError(
                f"{file}: is a report, which needs no --data-path; leave it out, or name the .pte"
            )
        from custom_quantizer.app.reporting import load_result

        return load_result(file).report
    from custom_quantizer.report.program_record import inspect_program

    return inspect_program(file, data_path=data_path or None)


@click.command(
    "report",
    epilog=examples(
        "custom-quantizer report resnet18.pte --html resnet18.html",
        "custom-quantizer report resnet18.pte --html resnet18.html --data val/ \\",
        "    --resize 256 --crop 224 --model resnet18 --weights w.pth",
    ),
)
@path_argument("file", "OUT.pte")
@html_option
@json_option()
@data_option("Measure on these: accuracy if they have labels, and the values of every activation.")
@samples_option()
@classes_option
@output_option
@model_option("Float model: measure the error of every tensor, too.")
@preprocess_options
@file_option("--sensitivity", help="Show this too: what `sensitivity --json` printed.")
@file_option("--search", help="Show this too: what `search --json` printed.")
@debug_option
def report_command(
    file: Path,
    html: Path | None,
    as_json: bool,
    data: str | None,
    samples: int | None,
    classes: Path | None,
    output_index: int | None,
    model: NamedModel | None,
    preprocess: MakePreprocess,
    sensitivity: Path | None,
    search: Path | None,
) -> None:
    """Show all that is known of what `quantize` wrote, as text or as a page.

    OUT.pte is a program with its report (OUT.json) beside it, or the report itself. Without
    options, nothing is run: what quantize stored is shown. docs/reports.md says how to read it.
    """
    check_can_write(html)
    if model is not None:
        model.check()
    if model is not None and data is None:
        raise click.UsageError("--model is compared on --data, which is not given")
    from custom_quantizer.app.reporting import load_result, measured, read_findings

    stored = load_result(file)
    report = stored.report
    if data is not None:
        names = None if classes is None else lines_of(classes)
        floating = None if model is None else model.load()
        source = load_samples(data, preprocess, samples, names)
        start_runtime()
        report = measured(stored, source, floating, output=output_index)
    report = report.including(*map(read_findings, filter(None, (sensitivity, search))))
    if html is not None:
        report.save_html(html, title=stored.name)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(report.to_json())
    elif html is None:
        show(report)


@click.command(
    "profile",
    epilog=examples(
        "custom-quantizer profile resnet18.pte",
        "custom-quantizer profile resnet18.pte --data val/ --resize 256 --crop 224 \\",
        "    --plot times.svg",
    ),
)
@path_argument("program", "PROGRAM.pte")
@graph_option(".  [default: PROGRAM.graph.safetensors, if it is there]")
@data_option("Inputs to run on.  [default: random ones]")
@samples_option("Samples of DATA to compare on; the first is timed.", default=1)
@preprocess_options
@count_option("--runs", "Runs to measure.", default=50)
@count_option("--threads", "Threads to compute with.  [default: as many as ExecuTorch takes]")
@plot_option("Draw the times: .svg, .png or .pdf.")
@json_option("Print JSON instead of a table.")
@debug_option
def profile_command(
    program: Path,
    graph: Path | None,
    data: str | None,
    samples: int,
    preprocess: MakePreprocess,
    runs: int,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show how long each op of a program takes, and whether it computes its integers.

    Times are those that ExecuTorch and XNNPACK note themselves, on this machine, in a process of
    its own. With the graph beside the program, or with --graph, the output of each op is compared
    with the integer reference, too: in a second program that returns all of them.
    """
    if plot is not None:
        check_plot(plot)
    from custom_quantizer.report.profiles import profile

    start_runtime()
    beside = graph_beside(program)
    if graph is None and beside.exists():
        graph = beside
    subject: Any = program
    inputs: list[Any] | None = None
    if graph is not None:
        from custom_quantizer.analysis.verification import has_integers, random_like
        from custom_quantizer.app.saved_graph import load_lowered

        converted, subject, example = load_lowered(program, graph)
        if has_integers(example):
            inputs = [random_like(converted, example, 0)]
    if data is not None:
        source = load_samples(data, preprocess, samples)
        batch = (None if graph is None else subject.batch_size) or 1
        inputs = list(source.with_batch_size(batch).inputs)
    found = profile(subject, inputs, runs=runs, threads=threads)
    if plot is not None:
        found.plot(plot)
        click.echo(f"wrote {plot}", err=True)
    show(found, as_json)
