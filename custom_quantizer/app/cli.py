"""The command line: thin commands over the library.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. A command
imports what it needs when it needs it: first what finds a user's mistakes, last the backend.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong use of the command, 130
interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import click

from custom_quantizer.config.improvement import ACCURACIES, ALGORITHMS
from custom_quantizer.errors import CustomQuantizerError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from custom_quantizer.app.data import DataSource, Preprocess
    from custom_quantizer.app.pipeline import QuantizationResult, SavedFiles
    from custom_quantizer.planning.quantizer import IntegerQuantizer
    from custom_quantizer.report.record import ProgramReport, Report

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])
_Preprocess: TypeAlias = "Callable[[], Preprocess]"

_DEBUG = "custom_quantizer.debug"
_CALIBRATION_SAMPLES = 512


def main() -> None:
    """Run the command line."""
    _open_closed_streams()
    if "--debug" not in sys.argv:
        _silence_upstream()
    from custom_quantizer.core.progress import print_lines

    print_lines(_SECONDS_PER_LINE)
    cli(prog_name="custom-quantizer")


def _open_closed_streams() -> None:
    """Put ``/dev/null`` where a standard stream is closed, as ``>&-`` does.

    Else the next file that is opened is standard output to ExecuTorch's C code, which prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _silence_upstream() -> None:
    """Let only this package speak: PyTorch and ExecuTorch warn of what no user here can change."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"custom_quantizer(\.|$)")
    warnings.showwarning = lambda message, *_rest, **_more: _say("warning", str(message))
    # PyTorch logs with a traceback what it then raises; ExecuTorch every op it leaves out.
    logging.disable(logging.ERROR)


_SECONDS_PER_LINE = 15.0
"""Of progress, where standard error is a file."""


def _colors() -> bool | None:
    """No colors where the user wants none (https://no-color.org); else as the terminal can."""
    return False if os.environ.get("NO_COLOR") else None


def _say(kind: str, text: str) -> None:
    click.secho(f"{kind}: ", fg="yellow", nl=False, err=True, color=_colors())
    click.echo(text, err=True)


class _Failure(click.ClickException):
    """One of our errors: the message, and no traceback."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.secho("error: ", fg="red", nl=False, err=True, color=_colors())
        click.echo(self.message, err=True)


_INTERRUPTED = 130
"""Exit code of a process that SIGINT ended, as shells count: 128 + 2."""


class _Cli(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CustomQuantizerError as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            raise _Failure(str(error)) from error
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            click.echo("interrupted", err=True)
            sys.exit(_INTERRUPTED)

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:  # a full disk behind ">"; click itself sees to "| head"
            if "--debug" in sys.argv:
                traceback.print_exc()
            _forget_output()
            what = error.filename or "the output cannot be written"
            _Failure(f"{what}: {error.strerror or error}").show()
            sys.exit(_Failure.exit_code)


def _forget_output() -> None:
    """Send to nowhere what standard output still holds: Python would try, and fail, once more."""
    with suppress(OSError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


def _numbers(kind: type[int] | type[float], *counts: int) -> Callable[..., Any]:
    """Callback that parses ``1,3,224,224`` or ``1x3x224x224``, ``counts`` numbers of them."""

    def parse(param: click.Parameter, text: str) -> tuple[int, ...] | tuple[float, ...]:
        try:
            numbers = tuple(kind(part) for part in text.lower().replace("x", ",").split(","))
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is not a list of numbers such as 1,3,224,224", param=param
            ) from None
        if counts and len(numbers) not in counts:
            wanted = " or ".join(map(str, counts))
            raise click.BadParameter(
                f"{text!r} has {len(numbers)} numbers, not {wanted}", param=param
            )
        if kind is int and min(numbers) < 1:
            raise click.BadParameter(f"{text!r} has a number below 1", param=param)
        return numbers

    def callback(_ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(parse(param, text) for text in value)
        return None if value is None else parse(param, value)

    return callback


def _model_argument(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", param=param)
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = bool(value) or bool(ctx.meta.get(_DEBUG))


_isolated_option = click.option(
    "--isolated",
    is_flag=True,
    help="Run every program in a process of its own, not only those without a checksum.",
)

_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show tracebacks and the messages of PyTorch and ExecuTorch.",
)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


_model_options = _options(
    click.option(
        "--weights",
        metavar="FILE|NAME",
        help="State dict (.safetensors, .pt, .pth), or published torchvision weights to download.",
    ),
    click.option(
        "--model-arg",
        "model_args",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_model_argument,
        help="Argument of the model function, such as num_classes=10. Repeatable.",
    ),
)

_scheme_options = _options(
    click.option(
        "--scheme",
        metavar="NAME",
        help="One scheme for all ops.  [default: a8w8]",
    ),
    click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        help="YAML or JSON file with a scheme per op.",
    ),
)

_io_option = click.option(
    "--integer-io",
    is_flag=True,
    help="Let the program take and return int8 (int16 above 8 bits) in place of float32.",
)

_accuracy_option = click.option(
    "--accuracy",
    type=click.Choice(ACCURACIES),
    help="What is done beyond rounding to nearest: nothing, what is free, or what seconds to "
    "minutes buy.  [default: fast]",
)

_improve_option = click.option(
    "--improve",
    multiple=True,
    type=click.Choice(ALGORITHMS),
    help="An algorithm, instead of those that --accuracy stands for. Repeatable.",
)

_image_options = _options(
    click.option(
        "--resize",
        callback=_numbers(int, 1, 2),
        metavar="N|H,W",
        help="Resize images: the shorter side, or height and width.",
    ),
    click.option(
        "--crop",
        callback=_numbers(int, 1, 2),
        metavar="N|H,W",
        help="Then cut this much from the center.",
    ),
    click.option(
        "--mean",
        callback=_numbers(float),
        default="0.485,0.456,0.406",
        show_default=True,
        help="Then subtract this from pixels in [0, 1], per channel.",
    ),
    click.option(
        "--std",
        callback=_numbers(float),
        default="0.229,0.224,0.225",
        show_default=True,
        help="Then divide by this, per channel.",
    ),
)


def _preprocess_options(command: F) -> F:
    """Four options, which reach the command as what makes a ``Preprocess`` of them, once needed."""

    @functools.wraps(command)
    def called(
        *args: Any,
        resize: tuple[int, ...] | None,
        crop: tuple[int, ...] | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        **others: Any,
    ) -> Any:
        preprocess = functools.partial(_preprocess, resize, crop, mean, std)
        return command(*args, preprocess=preprocess, **others)

    return _image_options(cast(F, called))


_classes_option = click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the model's classes, one a line, in the order of its scores: for folders of "
    "some of them.  [default: the folders in the order of their names]",
)

_output_option = click.option(
    "--output",
    "output_index",
    type=click.IntRange(min=0),
    metavar="N",
    help="Which output holds the scores, of a model with several.  [default: 0]",
)

_html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a page with pictures of the network and of every op.",
)

_shape_option = click.option(
    "--input-shape",
    "shapes",
    callback=_numbers(int),
    metavar="N,C,H,W",
    multiple=True,
    help="Shape of an input, batch first; once for each input of the model.",
)


_dynamic_option = click.option(
    "--dynamic-batch", is_flag=True, help="Let the program take batches of 1 to 64."
)


def _examples(*lines: str) -> str:
    # click keeps the lines of a paragraph as they are behind this mark.
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


@click.group(
    cls=_Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples(
        "custom-quantizer demo",
        "custom-quantizer plan resnet18",
        "custom-quantizer quantize resnet18 --weights w.pth --calibration images/ -o resnet18.pte",
        "custom-quantizer inspect resnet18.pte",
        "custom-quantizer verify resnet18.pte",
        "custom-quantizer evaluate resnet18.pte --data val/",
    ),
)
@click.version_option(package_name="custom-quantizer")
@_debug_option
def cli() -> None:
    """Quantize PyTorch models to integers, bias included, and check every one of them."""


@cli.command(
    "demo",
    epilog=_examples(
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
@_debug_option
def demo_command(output: Path, seed: int) -> None:
    """Train, quantize and run a small CNN on handwritten digits.

    Needs no download and less than a minute. It prints the accuracy before and after, one row
    per op, and one layer's bias from float to the int32 in the file.
    """
    from custom_quantizer.app.demo import run_demo

    _start_runtime()
    run_demo(output, seed=seed)


@cli.command(
    "plan",
    epilog=_examples(
        "custom-quantizer plan mobilenet_v2",
        "custom-quantizer plan net.py:make --input-shape 1,1,28,28 --config mixed.yaml",
    ),
)
@click.argument("model")
@_model_options
@_scheme_options
@_io_option
@_shape_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_debug_option
def plan_command(
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    scheme: str | None,
    config: Path | None,
    integer_io: bool,
    shapes: tuple[tuple[int, ...], ...],
    as_json: bool,
) -> None:
    """Show what would become of every op of MODEL, and why.

    Nothing is calibrated. MODEL is a torchvision model, package.module:function or
    file.py:function. Inputs are random, of shape 1,3,224,224 unless --input-shape says otherwise.
    """
    asked = _one_of(scheme, config)
    _check_model(model)
    quantizer = _quantizer(asked, integer_io)
    with warnings.catch_warnings():
        # The plan does not depend on the weights, so random ones need no warning.
        warnings.filterwarnings("ignore", message=".*random weights")
        module = _load_model(model, weights, model_args)
    from custom_quantizer.app.capture import capture
    from custom_quantizer.report.terminal import plan_table, print_table, size_text

    exported, _ = capture(module, _random_inputs(shapes or ((1, 3, 224, 224),)))
    plan = quantizer.plan(exported)
    if as_json:
        click.echo(plan.to_json())
        return
    print_table(plan_table(plan))
    tally = f"{plan.tally}; about {size_text(plan.size_bytes)} of constants"
    _echo(lambda: "\n".join((tally, *map(str, plan.borders))))
    for warning in plan.warnings:
        _say("warning", warning)


@cli.command(
    "calibrate",
    epilog=_examples(
        "custom-quantizer calibrate resnet18 --weights w.pth --data images/ \\",
        "    --resize 256 --crop 224 -o resnet18.stats.safetensors",
        "custom-quantizer quantize resnet18 --weights w.pth \\",
        "    --statistics resnet18.stats.safetensors -o resnet18.pte",
    ),
)
@click.argument("model")
@_model_options
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Folder or .zip of images, or tensors: .pt, .npy, .npz, .safetensors.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=_CALIBRATION_SAMPLES,
    show_default=True,
    help="Use at most that many, drawn evenly over the classes.",
)
@_preprocess_options
@_scheme_options
@_shape_option
@_dynamic_option
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep finished batches here; the same command goes on where it stopped.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="STATS",
    help="File to write; ends in .safetensors.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_debug_option
def calibrate_command(
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    data: str,
    samples: int,
    preprocess: _Preprocess,
    scheme: str | None,
    config: Path | None,
    shapes: tuple[tuple[int, ...], ...],
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
    _check_writable(output)
    asked = _one_of(scheme, config)
    _check_model(model)
    quantizer = _quantizer(asked, False)
    module = _load_model(model, weights, model_args)
    source = _load_data(data, preprocess, samples)
    from custom_quantizer.app.pipeline import record_calibration

    summary = record_calibration(
        module,
        _example(source, shapes),
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
    _echo(lambda: f"{summary}\n\n{summary.convergence()}\n")
    for warning in summary.warnings:
        _say("warning", warning)
    _echo(lambda: f"wrote {output}, which quantize --statistics takes")


@cli.command(
    "quantize",
    epilog=_examples(
        "custom-quantizer quantize resnet18 --weights DEFAULT --calibration images/ \\",
        "    --resize 256 --crop 224 -o resnet18.pte",
        "custom-quantizer quantize net.py:make --weights net.safetensors \\",
        "    --calibration calibration.npz --config mixed.yaml -o net.pte",
        "custom-quantizer quantize net.py:make --weights net.safetensors \\",
        "    --statistics net.stats.safetensors --scheme a16w8 -o net.pte",
    ),
)
@click.argument("model")
@_model_options
@click.option(
    "--calibration",
    metavar="DATA",
    help="Folder or .zip of images, or tensors: .pt, .npy, .npz, .safetensors.",
)
@click.option(
    "--statistics",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="STATS",
    help="What `calibrate` wrote, instead of --calibration. With both, the data are used by "
    "algorithms that improve accuracy alone.",
)
@click.option(
    "--calibration-samples",
    type=click.IntRange(min=1),
    default=_CALIBRATION_SAMPLES,
    show_default=True,
    help="Use at most that many, drawn evenly over the classes.",
)
@_preprocess_options
@_scheme_options
@_io_option
@_shape_option
@_dynamic_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.pte",
    help="Program to write; beside it go the report, OUT.json, and the graph, "
    "OUT.graph.safetensors.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_html_option
@_accuracy_option
@_improve_option
@_debug_option
@click.pass_context
def quantize_command(
    ctx: click.Context,
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    calibration: str | None,
    statistics: Path | None,
    calibration_samples: int,
    preprocess: _Preprocess,
    scheme: str | None,
    config: Path | None,
    integer_io: bool,
    shapes: tuple[tuple[int, ...], ...],
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
        _refuse_given(
            ctx,
            ("shapes", "dynamic_batch"),
            "--statistics, which says the shapes that were calibrated with",
        )
    elif calibration is None:
        raise click.UsageError(
            "Missing option '--calibration' or '--statistics': without one of them no range of an "
            "activation is known"
        )
    _check_output(output)
    _check_writable(html)
    asked = _one_of(scheme, config)
    _check_model(model)
    quantizer = _quantizer(asked, integer_io)
    recorded = None
    if statistics is not None:
        from custom_quantizer.app.recorded import read_calibration

        recorded = read_calibration(statistics)
    module = _load_model(model, weights, model_args)
    data = None
    if calibration is not None:
        data = _load_data(calibration, preprocess, calibration_samples)
    example = _example(data, shapes) if recorded is None else recorded.example
    batch = dynamic_batch if recorded is None else recorded.dynamic_batch
    from custom_quantizer.app.pipeline import quantize

    _start_runtime()
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
            _say("warning", f"the page lacks the errors of tensors: {error}")
    files = result.save(output)
    if html is not None:
        result.report.including(result.fidelity).save_html(html, title=output.stem)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(files.report.read_text())
    else:
        _summarize(model, result, files)


@cli.command(
    "inspect",
    epilog=_examples(
        "custom-quantizer inspect resnet18.pte",
        "custom-quantizer inspect resnet18.pte --op conv2d_3",
        "custom-quantizer inspect resnet18.json --html resnet18.html",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--op", metavar="NAME", help="Show all that is known of one op.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_html_option
@_debug_option
def inspect_command(file: Path, op: str | None, as_json: bool, html: Path | None) -> None:
    """Show dtype, scale and zero point of every tensor in FILE.

    And where each bias went. FILE is a .pte, read from its bytes alone, or a report that quantize
    wrote (OUT.json, or a directory with report.json).
    """
    _check_writable(html)
    report = _read_report(file)
    if html is not None:
        report.save_html(html)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(report.to_json())
    elif op is not None:
        _echo(lambda: report.detail(op))
    elif html is None:
        _show(report)


@cli.command(
    "report",
    epilog=_examples(
        "custom-quantizer report resnet18.pte --html resnet18.html",
        "custom-quantizer report resnet18.pte --html resnet18.html --data val/ \\",
        "    --resize 256 --crop 224 --model resnet18 --weights w.pth",
    ),
)
@click.argument("file", metavar="OUT.pte", type=click.Path(path_type=Path))
@_html_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--data",
    metavar="DATA",
    help="Measure on these: accuracy if they have labels, and the values of every activation.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Use at most that many, drawn evenly.")
@_classes_option
@_output_option
@click.option(
    "--model", metavar="MODEL", help="Float model: measure the error of every tensor, too."
)
@_model_options
@_preprocess_options
@click.option(
    "--sensitivity",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show this too: what `sensitivity --json` printed.",
)
@click.option(
    "--search",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show this too: what `search --json` printed.",
)
@_debug_option
def report_command(
    file: Path,
    html: Path | None,
    as_json: bool,
    data: str | None,
    samples: int | None,
    classes: Path | None,
    output_index: int | None,
    model: str | None,
    weights: str | None,
    model_args: dict[str, object],
    preprocess: _Preprocess,
    sensitivity: Path | None,
    search: Path | None,
) -> None:
    """Show all that is known of what `quantize` wrote, as text or as a page.

    OUT.pte is a program with its report (OUT.json) beside it, or the report itself. Without
    options, nothing is run: what quantize stored is shown. docs/reports.md says how to read it.
    """
    _check_writable(html)
    _check_float_model(model, weights, model_args)
    if model is not None and data is None:
        raise click.UsageError("--model is compared on --data, which is not given")
    from custom_quantizer.app.reporting import load_result, measured, read_findings

    stored = load_result(file)
    report = stored.report
    if data is not None:
        names = None if classes is None else _lines(classes)
        floating = None if model is None else _load_model(model, weights, model_args)
        source = _load_data(data, preprocess, samples, names)
        _start_runtime()
        report = measured(stored, source, floating, output=output_index)
    report = report.including(*map(read_findings, filter(None, (sensitivity, search))))
    if html is not None:
        report.save_html(html, title=stored.name)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(report.to_json())
    elif html is None:
        _show(report)


@cli.command(
    "evaluate",
    epilog=_examples(
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
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Folder or .zip of images by class, or tensors with labels.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Use at most that many, drawn evenly.")
@_classes_option
@_output_option
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    metavar="GRAPH",
    help="Converted graph that `quantize` wrote: evaluate it and its integer reference too.",
)
@_isolated_option
@click.option("--model", metavar="MODEL", help="Float model to compare with.")
@_model_options
@_preprocess_options
@click.option(
    "--slices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Also show the accuracy on that many disjoint slices of the samples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_debug_option
def evaluate_command(
    programs: tuple[Path, ...],
    data: str,
    samples: int | None,
    classes: Path | None,
    output_index: int | None,
    graph: Path | None,
    isolated: bool,
    model: str | None,
    weights: str | None,
    model_args: dict[str, object],
    preprocess: _Preprocess,
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
    _check_float_model(model, weights, model_args)
    names = None if classes is None else _lines(classes)
    source = _load_data(data, preprocess, samples, names)
    if source.labels is None and model is None and len(programs) == 1:
        raise InputError(
            f"{data} has no labels, so there is nothing to measure; name folders by class, save "
            "labels with the tensors, or pass a float --model to compare with"
        )
    from custom_quantizer.analysis.evaluation import evaluate
    from custom_quantizer.backends.xnnpack import load_program
    from custom_quantizer.report.terminal import accuracy_table, print_table

    _start_runtime()
    models: dict[str, Callable[..., Any]] = {}
    if model is not None:
        models["float model"] = _load_model(model, weights, model_args)
    if graph is not None:
        from custom_quantizer.app.saved_graph import load_graph
        from custom_quantizer.reference import integer_reference

        converted, _ = load_graph(graph)
        models["converted graph"] = converted
        models["integer reference"] = integer_reference(converted)
    for program in programs:
        # Two files of one name: only their paths tell them apart.
        unique = [path.name for path in programs].count(program.name) == 1
        models[program.name if unique else str(program)] = load_program(
            program, isolated=isolated or None
        ).run
    evaluation = evaluate(models, source, output=output_index, slices=slices)
    if as_json:
        click.echo(evaluation.to_json())
    else:
        print_table(accuracy_table(evaluation))
        notes = tuple(note.replace("output=N", "--output N") for note in evaluation.notes)
        _echo(lambda: "\n".join((*evaluation.slice_lines(), *evaluation.conclusions, *notes)))


@cli.command(
    "verify",
    epilog=_examples(
        "custom-quantizer verify resnet18.pte",
        "custom-quantizer verify resnet18.pte --data val/ --resize 256 --crop 224 --samples 100",
        "custom-quantizer verify resnet18.pte --device-outputs device-test/",
    ),
)
@click.argument("program", metavar="PROGRAM.pte", type=click.Path(path_type=Path))
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    metavar="GRAPH",
    help="Converted graph that `quantize` wrote.  [default: PROGRAM.graph.safetensors]",
)
@click.option("--data", metavar="DATA", help="Inputs to compare on.  [default: random ones]")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Samples of DATA, or batches of random inputs.",
)
@_isolated_option
@click.option("--model", metavar="MODEL", help="Float model, for the SQNR against it.")
@_model_options
@_preprocess_options
@click.option(
    "--device-outputs",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Compare what a device computed: a folder that LoweredProgram.save_device_test wrote, "
    "with the device's outputs in it, or one of several folders of outputs in that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_debug_option
@click.pass_context
def verify_command(
    ctx: click.Context,
    program: Path,
    graph: Path | None,
    data: str | None,
    samples: int,
    isolated: bool,
    model: str | None,
    weights: str | None,
    model_args: dict[str, object],
    preprocess: _Preprocess,
    device_outputs: Path | None,
    as_json: bool,
) -> None:
    """Prove that a program computes the integers of its graph.

    Reading the two files runs no code in them. A program that is damaged is refused by its
    checksum; one without a checksum runs in a process of its own, with limits of memory and time.
    A checksum says that a file is whole, not who wrote it: see docs/files.md.

    Compares every weight, bias, scale and clamp in the file with the graph's, then the outputs of
    the runtime with the integer reference. Names the first op that differs. Exits with 0 if the
    program is bit-exact, with 1 if it is not.

    With --device-outputs nothing is run: the outputs that a device computed are compared with those
    of the integer reference in the same folder.
    """
    if device_outputs is not None:
        _refuse_others(ctx, "device_outputs", ("program", "as_json"))
        from custom_quantizer.analysis.device_outputs import check_device_outputs

        device = check_device_outputs(program, device_outputs)
        _show(device, as_json)
        if not device.bit_exact:
            raise SystemExit(1)
        return
    _check_float_model(model, weights, model_args)
    floating = None if model is None else _load_model(model, weights, model_args)
    from custom_quantizer.analysis.verification import random_like, verify
    from custom_quantizer.app.saved_graph import load_lowered

    _start_runtime()
    converted, lowered = load_lowered(
        program, graph or _existing_graph(program), isolated=isolated or None
    )
    if data is None:
        inputs: list[Any] = [random_like(converted, seed) for seed in range(samples)]
    else:
        source = _load_data(data, preprocess, samples)
        inputs = list(source.with_batch_size(lowered.batch_size or 1).inputs)
    checked = verify(converted, lowered, inputs, float_model=floating)
    _show(checked, as_json)
    if not checked.bit_exact:
        raise SystemExit(1)


_graph_argument = click.argument("graph", metavar="GRAPH", type=click.Path(path_type=Path))


@cli.command(
    "diagnose",
    epilog=_examples(
        "custom-quantizer diagnose resnet18.pte --model resnet18 --weights w.pth \\",
        "    --data val/ --resize 256 --crop 224 --plot resnet18.svg",
    ),
)
@_graph_argument
@click.option("--model", metavar="MODEL", required=True, help="The float model it was made of.")
@_model_options
@click.option(
    "--data", metavar="DATA", required=True, help="Samples, rather not those of the calibration."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Use at most that many, drawn evenly. Each is computed about ten times.",
)
@_preprocess_options
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it, as .svg or .png."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_debug_option
def diagnose_command(
    graph: Path,
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    data: str,
    samples: int,
    preprocess: _Preprocess,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Find the ops that lose accuracy.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. Every quantized
    tensor and weight is compared with its float twin on the same samples: the error that an op adds
    itself, what it inherits, the values that are cut off. docs/accuracy.md says how to read it.
    """
    if plot is not None:
        _check_plot(plot)
    _check_model(model)
    floating = _load_model(model, weights, model_args)
    source = _load_data(data, preprocess, samples)
    converted = _load_converted(graph)
    from custom_quantizer.analysis.diagnosis import diagnose

    found = diagnose(floating, converted, source.inputs)
    if plot is not None:
        found.plot(plot)
        click.echo(f"wrote {plot}", err=True)
    _show(found, as_json)


def _budget(
    _ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    budget: dict[str, float] = {}
    for value in values:
        key, equals, text = value.partition("=")
        try:
            budget[key] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise click.BadParameter(f"{value!r} is not KEY=NUMBER, such as size=0.6", param=param)
    return budget


_widths_options = _options(
    click.option(
        "--data",
        metavar="DATA",
        required=True,
        help="Folder or .zip of images, or tensors: .pt, .npy, .npz, .safetensors. Folders of "
        "classes in the order of the model give labels.",
    ),
    click.option(
        "--schemes",
        default="a8w8,a8w4",
        show_default=True,
        metavar="NAME,NAME",
        help="What to choose from; the most precise is the one to compare with.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Samples that are computed at a time.",
    ),
    click.option(
        "--estimate-only", is_flag=True, help="Leave out the true losses: quicker, less exact."
    ),
    click.option(
        "--checkpoint",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Keep finished batches here; the same command goes on where it stopped.",
    ),
    _accuracy_option,
    _preprocess_options,
)


@cli.command(
    "sensitivity",
    epilog=_examples(
        "custom-quantizer sensitivity resnet18 --weights w.pth --data images/ \\",
        "    --resize 256 --crop 224 --schemes a8w8,a8w4,a4w4",
    ),
)
@click.argument("model")
@_model_options
@_widths_options
@click.option(
    "--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Use so many."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_debug_option
def sensitivity_command(
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    data: str,
    schemes: str,
    batch: int,
    estimate_only: bool,
    checkpoint: Path | None,
    accuracy: str | None,
    preprocess: _Preprocess,
    samples: int,
    as_json: bool,
) -> None:
    """Measure what each weight and activation of MODEL loses at each width, alone.

    MODEL is a torchvision model, package.module:function or file.py:function. Two numbers are
    given, in dB of the outputs: the true one, from computing the network with that one value
    rounded, and an estimate from a few backward passes. docs/search.md says how to read them.
    """
    _check_model(model)
    module = _load_model(model, weights, model_args)
    source = _load_data(data, preprocess, samples)
    from custom_quantizer.app.widths import sensitivity

    found = sensitivity(
        module,
        source.example_inputs(min(batch, source.num_examples)),
        source,
        schemes=_names(schemes),
        accuracy=accuracy,
        samples=samples,
        estimate_only=estimate_only,
        checkpoint=checkpoint,
    )
    _show(found, as_json)


@cli.command(
    "search",
    epilog=_examples(
        "custom-quantizer search resnet18 --weights w.pth --data images/ --validation val/ \\",
        "    --resize 256 --crop 224 --schemes a8w8,a8w4 --budget size=0.6 -o mixed.yaml",
        "custom-quantizer search net.py:make --weights net.safetensors --data train.npz \\",
        "    --budget accuracy=0.5 -o mixed.yaml",
    ),
)
@click.argument("model")
@_model_options
@_widths_options
@click.option(
    "--budget",
    multiple=True,
    required=True,
    callback=_budget,
    metavar="KEY=NUMBER",
    help="size, weight_bits, bit_operations or latency: a share of the most precise scheme's "
    "(up to 1) or the number itself; accuracy: points that may be lost. Repeatable.",
)
@click.option(
    "--validation",
    metavar="DATA",
    help="Samples to measure with.  [default: the last quarter of --data]",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=512, show_default=True, help="Of --data."
)
@click.option(
    "--validation-samples",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Of --validation.",
)
@click.option(
    "--latencies",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSON of times from your device, {op: {scheme: time}}, for --budget latency.  [default: "
    "measured on this machine]",
)
@click.option(
    "--points",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Budgets along the curve for which a choice is measured.",
)
@_improve_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT.yaml",
    help="Write the rules of the best choice, for quantize --config.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_debug_option
def search_command(
    model: str,
    weights: str | None,
    model_args: dict[str, object],
    data: str,
    schemes: str,
    batch: int,
    estimate_only: bool,
    checkpoint: Path | None,
    accuracy: str | None,
    preprocess: _Preprocess,
    budget: dict[str, float],
    validation: str | None,
    samples: int,
    validation_samples: int,
    latencies: Path | None,
    points: int,
    improve: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Find the widths of MODEL with the least loss under a budget.

    MODEL is a torchvision model, package.module:function or file.py:function. Every choice in the
    table is quantized and measured on samples held back; each scheme everywhere is among them, so
    that what is taken is never worse. docs/search.md says more.
    """
    if output is not None:
        from custom_quantizer.config.located import check_suffix

        check_suffix(output)
        _check_writable(output)
    _check_model(model)
    module = _load_model(model, weights, model_args)
    source = _load_data(data, preprocess, samples)
    held_back = None if validation is None else _load_data(validation, preprocess, None)
    from custom_quantizer.app.widths import search

    # A part is held back in whole batches.
    most = source.num_examples if validation is not None else max(1, source.num_examples // 4)
    found = search(
        module,
        source.example_inputs(min(batch, most)),
        source,
        budget,
        schemes=_names(schemes),
        validation=held_back,
        accuracy=accuracy,
        improve=improve or None,
        latencies=latencies,
        samples=samples,
        validation_samples=validation_samples,
        points=points,
        estimate_only=estimate_only,
        checkpoint=checkpoint,
    )
    _show(found, as_json)
    if output is not None:
        found.save(output)
        click.echo(f"wrote {output}, which quantize --config takes", err=True)


@cli.command(
    "export-integers",
    epilog=_examples(
        "custom-quantizer export-integers resnet18.pte integers/resnet18",
        "custom-quantizer export-integers resnet18.graph.safetensors integers/resnet18",
    ),
)
@_graph_argument
@click.argument("output", metavar="PATH", type=click.Path(path_type=Path))
@_debug_option
def export_integers_command(graph: Path, output: Path) -> None:
    """Write a network as integers for other hardware.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. PATH.json says
    what to compute with which multipliers and shifts, PATH.safetensors holds weights, biases and
    constants; docs/integer_bundle.md describes both, and runs them with NumPy alone.

    Every op has to be integer; an error names those that are not.
    """
    from custom_quantizer.reference.bundle import save_integers
    from custom_quantizer.reference.numpy_runner import bundle_files

    save_integers(_load_converted(graph), output)
    click.echo("\n".join(f"wrote {file}" for file in bundle_files(output)))


@cli.command(
    "export-c",
    epilog=_examples(
        "custom-quantizer export-c digits.pte firmware/digits --name digits",
        "make -C firmware/digits test",
    ),
)
@_graph_argument
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="net", show_default=True, help="Prefix of files and C names.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="First dimension of the inputs.  [default: the captured one]",
)
@click.option(
    "--vectors",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Test vectors: random inputs, and the integers that NumPy computes from them.",
)
@_debug_option
def export_c_command(graph: Path, folder: Path, name: str, batch: int | None, vectors: int) -> None:
    """Write a network as C99 that computes on integers alone, for a microcontroller.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. The code needs no
    float, no allocation and no library; its memory is static and its sizes are printed. A test with
    embedded inputs and outputs comes along: `make test` in FOLDER runs it.

    Every op has to be integer; an error names those that are not.
    """
    from custom_quantizer.reference.c_code import save_c

    code = save_c(_load_converted(graph), folder, name=name, batch=batch, vectors=vectors)
    _show(code)


@cli.command(
    "export-onnx",
    epilog=_examples(
        "custom-quantizer export-onnx resnet18.pte resnet18.onnx",
        "custom-quantizer export-onnx resnet18.pte resnet18.onnx --activations int8",
    ),
)
@_graph_argument
@click.argument("output", metavar="PATH", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8"]),
    default="uint8",
    show_default=True,
    help="Type of activations of up to 8 bits; uint8 is what ONNX Runtime computes with on x86.",
)
@_debug_option
def export_onnx_command(graph: Path, output: Path, activations: Literal["uint8", "int8"]) -> None:
    """Write a network as an ONNX model with QuantizeLinear and DequantizeLinear.

    GRAPH is the converted graph that `quantize` wrote, or the program beside it. The model has the
    integers of the graph's weights and biases, and its scales; what a runtime computes between them
    may differ by a step, see docs/interchange.md.

    Needs the extra: pip install 'custom-quantizer[onnx]'.
    """
    from custom_quantizer.reference.interchange.onnx_file import save_onnx

    _show(save_onnx(_load_converted(graph), output, activations=activations))


@cli.command(
    "profile",
    epilog=_examples(
        "custom-quantizer profile resnet18.pte",
        "custom-quantizer profile resnet18.pte --data val/ --resize 256 --crop 224 \\",
        "    --plot times.svg",
    ),
)
@click.argument("program", metavar="PROGRAM.pte", type=click.Path(path_type=Path))
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    metavar="GRAPH",
    help="Converted graph that `quantize` wrote.  [default: PROGRAM.graph.safetensors, if it is "
    "there]",
)
@click.option("--data", metavar="DATA", help="Inputs to run on.  [default: random ones]")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples of DATA to compare on; the first is timed.",
)
@_preprocess_options
@click.option(
    "--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Runs to measure."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the times: .svg, .png or .pdf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_debug_option
def profile_command(
    program: Path,
    graph: Path | None,
    data: str | None,
    samples: int,
    preprocess: _Preprocess,
    runs: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show how long each op of a program takes, and whether it computes its integers.

    Times are those that ExecuTorch and XNNPACK note themselves, on this machine, in a process of
    its own. With the graph beside the program, or with --graph, the output of each op is compared
    with the integer reference, too: in a second program that returns all of them.
    """
    if plot is not None:
        _check_plot(plot)
    from custom_quantizer.report.profiles import profile

    _start_runtime()
    beside = _graph_beside(program)
    if graph is None and beside.exists():
        graph = beside
    subject: Any = program
    if graph is not None:
        from custom_quantizer.app.saved_graph import load_lowered

        _, subject = load_lowered(program, graph)
    inputs: list[Any] | None = None
    if data is not None:
        source = _load_data(data, preprocess, samples)
        batch = (None if graph is None else subject.batch_size) or 1
        inputs = list(source.with_batch_size(batch).inputs)
    found = profile(subject, inputs, runs=runs)
    if plot is not None:
        found.plot(plot)
        click.echo(f"wrote {plot}", err=True)
    _show(found, as_json)


# ---------------------------------------------------------------------------------------------
# What commands share
# ---------------------------------------------------------------------------------------------


def _show(found: Any, as_json: bool = False) -> None:
    """Print a result, as JSON or as text that fits the terminal."""
    if as_json:
        click.echo(found.to_json())
    else:
        _echo(lambda: str(found))


def _echo(text: Callable[[], str]) -> None:
    """Print a text whose tables are made now, for the width of the terminal."""
    from custom_quantizer.core.text_table import within
    from custom_quantizer.report.terminal import fitted, terminal_width

    with within(terminal_width()):
        click.echo(fitted(text()))


def _start_runtime() -> None:
    from custom_quantizer.backends.xnnpack.startup import start_quietly

    start_quietly()


def _graph_beside(program: Path) -> Path:
    from custom_quantizer.app.saved_graph import GRAPH_SUFFIX

    graph, old = program.with_suffix(GRAPH_SUFFIX), program.with_suffix(".pt2")
    # Naming it gives the message that says why it is not read.
    return old if old.is_file() and not graph.exists() else graph


def _load_converted(graph: Path) -> GraphModule:
    """A saved graph by its own name, or by that of the program beside it."""
    from custom_quantizer.app.saved_graph import load_graph

    if graph.suffix == ".pte":
        graph = _existing_graph(graph)
    return load_graph(graph)[0]


def _existing_graph(program: Path) -> Path:
    """The graph beside a program; an error that says which of both is missing.

    Raises:
        InputError: one is.
    """
    graph = _graph_beside(program)
    if not program.is_file() and not graph.is_file():
        why = "is a directory" if program.is_dir() else "there is no such file"
        raise InputError(f"{program}: {why}; name the .pte that `custom-quantizer quantize` wrote")
    if not graph.is_file():
        from custom_quantizer.backends.xnnpack import read_program

        read_program(program)  # says so if it is no program at all
        raise InputError(
            f"{graph}: there is no such file beside {program.name}; `custom-quantizer quantize` "
            "writes both: copy it too, or name it"
        )
    return graph


def _refuse_others(ctx: click.Context, option: str, besides: tuple[str, ...]) -> None:
    """Raise ``UsageError`` if an option was given that means nothing next to ``option``."""
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in (option, *besides):
            raise click.UsageError(
                f"{param.opts[0]} means nothing next to --{option.replace('_', '-')}: nothing is "
                "run then; leave one of them out"
            )


def _refuse_given(ctx: click.Context, names: tuple[str, ...], beside: str) -> None:
    """Raise ``UsageError`` if one of these options was given."""
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and param.name in names:
            raise click.UsageError(f"{param.opts[0]} means nothing next to {beside}; leave it out")


def _one_of(scheme: str | None, config: Path | None) -> str | Path:
    if scheme is not None and config is not None:
        raise click.UsageError("--scheme and --config exclude each other: name one")
    if config is not None:
        return config
    return "a8w8" if scheme is None else scheme


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _quantizer(asked: str | Path, integer_io: bool) -> IntegerQuantizer:
    from custom_quantizer.app.configuration import as_quantizer

    quantizer = as_quantizer(asked)
    return quantizer.set_io(integer=True) if integer_io else quantizer


def _check_model(model: str) -> None:
    """Find out before seconds of imports that a name is misspelled."""
    from custom_quantizer.app.models import check_model_name

    check_model_name(model)


def _check_float_model(
    model: str | None, weights: str | None, model_args: dict[str, object]
) -> None:
    if model is not None:
        _check_model(model)
    elif weights is not None or model_args:
        raise click.UsageError("--weights and --model-arg are for --model, which is not given")


def _load_model(model: str, weights: str | None, model_args: dict[str, object]) -> nn.Module:
    from custom_quantizer.app.models import load_model

    return load_model(model, weights, **model_args)


def _load_data(
    path: str, preprocess: _Preprocess, limit: int | None, classes: list[str] | None = None
) -> DataSource:
    """Read data, and tell what is done to them: a wrong scale shows in nothing but the accuracy."""
    from custom_quantizer.app.data import load_data

    source = load_data(path, preprocess=preprocess(), limit=limit, classes=classes)
    count = f"{source.num_examples} sample" + "s" * (source.num_examples != 1)
    click.echo(f"{path}: {count} of {source.treatment}", err=True)
    return source


_MOST_CLASSES_BYTES = 2**24


def _lines(file: Path) -> list[str]:
    from custom_quantizer.core.files import read_bytes

    try:
        text = read_bytes(file, _MOST_CLASSES_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text ({error}); write one class a line, in UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _preprocess(
    resize: tuple[int, ...] | None,
    crop: tuple[int, ...] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Preprocess:
    from custom_quantizer.app.data import Preprocess

    def size(numbers: tuple[int, ...] | None) -> Any:
        return numbers[0] if numbers is not None and len(numbers) == 1 else numbers

    return Preprocess(size(resize), size(crop), mean, std)


def _random_inputs(shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)
    try:
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)
    except RuntimeError as error:
        needed = max(4 * math.prod(shape) for shape in shapes)
        raise InputError(
            f"--input-shape: an input of {needed:,} bytes does not fit into the memory; check it"
        ) from error


def _example(data: DataSource | None, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Inputs to capture a model with: of these shapes, or else one sample."""
    if shapes or data is None:
        return _random_inputs(shapes)
    return data.example_inputs(1)


def _check_output(output: Path) -> None:
    """Refuse what is neither a program nor a directory for one."""
    if output.suffix not in ("", ".pte"):
        raise click.UsageError(f"--output {output}: name a .pte file or a directory")
    from custom_quantizer.core.files import check_utf8

    check_utf8(output)
    if output.suffix == ".pte":
        _check_writable(output)
    elif output.exists() and not output.is_dir():
        raise InputError(f"{output} is no directory; name one, or a .pte file")


def _check_writable(output: Path | None) -> None:
    """Find out before minutes of work, not after them, that a file cannot be written."""
    from custom_quantizer.core.files import check_writable

    if output is not None:
        check_writable(output)


def _check_plot(plot: Path) -> None:
    from custom_quantizer.core.plot import check_figure_path

    check_figure_path(plot)
    _check_writable(plot)


def _read_report(file: Path) -> Report | ProgramReport:
    if file.suffix == ".json" or file.is_dir():
        from custom_quantizer.app.reporting import load_result

        return load_result(file).report
    from custom_quantizer.report.record import inspect_program

    return inspect_program(file)


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
        _say("warning", warning)
    click.echo(f"wrote {files.program} ({size_text(report.size_bytes)}) and {files.report}")
    if files.graph is not None:
        click.echo(f"wrote {files.graph}, which verify and the export commands read")


_SHOWN = 10
