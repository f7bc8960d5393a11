"""Commands that ask which bits where: ``sensitivity``, ``search``."""

from __future__ import annotations

from pathlib import Path

import click

from custom_quantizer.app.cli.arguments import (
    check_can_write,
    load_samples,
    names_in,
)
from custom_quantizer.app.cli.console import show
from custom_quantizer.app.cli.options import (
    DATA_FORMS,
    MakePreprocess,
    NamedModel,
    accuracy_option,
    checkpoint_option,
    count_option,
    data_option,
    debug_option,
    examples,
    file_option,
    improve_option,
    json_option,
    model_argument,
    preprocess_options,
    samples_option,
    together,
)


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


_widths_options = together(
    data_option(
        f"{DATA_FORMS} Folders of classes in the order of the model give labels.",
        required=True,
    ),
    click.option(
        "--schemes",
        default="a8w8,a8w4",
        show_default=True,
        metavar="NAME,NAME",
        help="What to choose from; the most precise is the one to compare with.",
    ),
    count_option("--batch", "Samples that are computed at a time.", default=32),
    click.option(
        "--estimate-only", is_flag=True, help="Leave out the true losses: quicker, less exact."
    ),
    checkpoint_option,
    accuracy_option,
    preprocess_options,
)


@click.command(
    "sensitivity",
    epilog=examples(
        "custom-quantizer sensitivity resnet18 --weights w.pth --data images/ \\",
        "    --resize 256 --crop 224 --schemes a8w8,a8w4,a4w4",
    ),
)
@model_argument
@_widths_options
@samples_option("Use so many.", default=256)
@json_option()
@debug_option
def sensitivity_command(
    model: NamedModel,
    data: str,
    schemes: str,
    batch: int,
    estimate_only: bool,
    checkpoint: Path | None,
    accuracy: str | None,
    preprocess: MakePreprocess,
    samples: int,
    as_json: bool,
) -> None:
    """Measure what each weight and activation of MODEL loses at each width, alone.

    MODEL is a torchvision model, package.module:function or file.py:function. Two numbers are
    given, in dB of the outputs: the true one, from computing the network with that one value
    rounded, and an estimate from a few backward passes. docs/search.md says how to read them.
    """
    module = model.load()
    source = load_samples(data, preprocess, samples)
    from custom_quantizer.app.widths import sensitivity

    found = sensitivity(
        module,
        source.example_inputs(min(batch, source.num_examples)),
        source,
        schemes=names_in(schemes),
        accuracy=accuracy,
        samples=samples,
        estimate_only=estimate_only,
        checkpoint=checkpoint,
    )
    show(found, as_json)


@click.command(
    "search",
    epilog=examples(
        "custom-quantizer search resnet18 --weights w.pth --data images/ --validation val/ \\",
        "    --resize 256 --crop 224 --schemes a8w8,a8w4 --budget size=0.6 -o mixed.yaml",
        "custom-quantizer search net.py:make --weights net.safetensors --data train.npz \\",
        "    --budget accuracy=0.5 -o mixed.yaml",
    ),
)
@model_argument
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
@data_option("Samples to measure with.  [default: the last quarter of --data]", name="--validation")
@samples_option("Of --data.", default=512)
@count_option("--validation-samples", "Of --validation.", default=10_000)
@file_option(
    "--latencies",
    help="JSON of times from your device, {op: {scheme: time}}, for --budget latency.  [default: "
    "measured on this machine]",
)
@count_option("--points", "Budgets along the curve for which a choice is measured.", default=6)
@improve_option
@file_option(
    "-o",
    "--output",
    metavar="OUT.yaml",
    help="Write the rules of the best choice, for quantize --config.",
)
@json_option()
@debug_option
def search_command(
    model: NamedModel,
    data: str,
    schemes: str,
    batch: int,
    estimate_only: bool,
    checkpoint: Path | None,
    accuracy: str | None,
    preprocess: MakePreprocess,
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
        check_can_write(output)
    module = model.load()
    source = load_samples(data, preprocess, samples)
    held_back = None if validation is None else load_samples(validation, preprocess, None)
    from custom_quantizer.app.widths import search

    # A part is held back in whole batches.
    most = source.num_examples if validation is not None else max(1, source.num_examples // 4)
    found = search(
        module,
        source.example_inputs(min(batch, most)),
        source,
        budget,
        schemes=names_in(schemes),
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
    show(found, as_json)
    if output is not None:
        found.save(output)
        click.echo(f"wrote {output}, which quantize --config takes", err=True)
