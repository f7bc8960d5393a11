"""From what a user wrote to what it names: models, data, graphs; and whether it can be so.

What finds a mistake is called first, before seconds of imports and minutes of work.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from custom_quantizer.app.cli.options import InputShape, MakePreprocess
from custom_quantizer.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.fx import GraphModule

    from custom_quantizer.app.data import DataSource
    from custom_quantizer.planning.quantizer import IntegerQuantizer


def refuse_others(ctx: click.Context, option: str, besides: tuple[str, ...]) -> None:
    """Raise ``UsageError`` if an option was given that means nothing next to ``option``."""
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in (option, *besides):
            raise click.UsageError(
                f"{param.opts[0]} means nothing next to --{option.replace('_', '-')}: nothing is "
                "run then; leave one of them out"
            )


def refuse_given(ctx: click.Context, names: tuple[str, ...], beside: str) -> None:
    """Raise ``UsageError`` if one of these options was given."""
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and param.name in names:
            raise click.UsageError(f"{param.opts[0]} means nothing next to {beside}; leave it out")


def names_in(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def quantizer_for(asked: str | Path, integer_io: bool) -> IntegerQuantizer:
    """A quantizer with a scheme's name or a config file."""
    from custom_quantizer.app.configuration import as_quantizer

    quantizer = as_quantizer(asked)
    return quantizer.set_io(integer=True) if integer_io else quantizer


def load_samples(
    path: str, preprocess: MakePreprocess, limit: int | None, classes: list[str] | None = None
) -> DataSource:
    """Read data, and tell what is done to them: a wrong scale shows in nothing but the accuracy."""
    from custom_quantizer.app.data import load_data

    source = load_data(path, preprocess=preprocess(), limit=limit, classes=classes)
    count = f"{source.num_examples} sample" + "s" * (source.num_examples != 1)
    click.echo(f"{path}: {count} of {source.treatment}", err=True)
    return source


_MOST_CLASSES_BYTES = 2**24


def lines_of(file: Path) -> list[str]:
    """Lines of a text file, without the empty ones."""
    from custom_quantizer.core.files import read_bytes

    try:
        text = read_bytes(file, _MOST_CLASSES_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text ({error}); write one class a line, in UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def random_inputs(
    shapes: tuple[InputShape, ...], like: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """Normally distributed inputs, the same each time; integers are 0, which any table has.

    Args:
        shapes: of the inputs.
        like: samples, of whose types inputs are that name none.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    try:
        for (sizes, name), sample in zip_longest(shapes, like[: len(shapes)]):
            known = torch.float32 if sample is None else sample.dtype
            dtype = known if name is None else getattr(torch, name)
            if dtype.is_floating_point:
                found.append(torch.randn(sizes, generator=generator, dtype=dtype))
            else:
                found.append(torch.zeros(sizes, dtype=dtype))
        return tuple(found)
    except RuntimeError as error:
        needed = max(4 * math.prod(shape.sizes) for shape in shapes)
        raise InputError(
            f"--input-shape: an input of {needed:,} bytes does not fit into the memory; check it"
        ) from error


def example_inputs(
    data: DataSource | None, shapes: tuple[InputShape, ...]
) -> tuple[Tensor, ...] | Mapping[str, Tensor]:
    """Inputs to capture a model with: of these shapes, or else one sample."""
    samples = () if data is None else data.example_inputs(1)
    if not shapes and data is not None:
        return samples
    if isinstance(samples, tuple):
        return random_inputs(shapes, samples)
    if len(shapes) != len(samples):
        raise InputError(
            f"--input-shape is given {len(shapes)} times, and the data have {len(samples)} inputs: "
            f"{', '.join(samples)}; give one for each, in this order, or none"
        )
    return dict(zip(samples, random_inputs(shapes, tuple(samples.values())), strict=True))


def check_output(output: Path) -> None:
    """Refuse what is neither a program nor a directory for one."""
    if output.suffix not in ("", ".pte"):
        raise click.UsageError(f"--output {output}: name a .pte file or a directory")
    from custom_quantizer.core.files import check_utf8

    check_utf8(output)
    if output.suffix == ".pte":
        check_can_write(output)
    elif output.exists() and not output.is_dir():
        raise InputError(f"{output} is no directory; name one, or a .pte file")


def check_can_write(output: Path | None) -> None:
    """Find out before minutes of work, not after them, that a file cannot be written."""
    from custom_quantizer.core.files import check_writable

    if output is not None:
        check_writable(output)


def check_plot(plot: Path) -> None:
    """Find out before any work that a figure cannot be drawn or written."""
    from custom_quantizer.core.plot import check_figure_path

    check_figure_path(plot)
    check_can_write(plot)


def start_runtime() -> None:
    """Import ExecuTorch, whose greetings are kept from the user."""
    from custom_quantizer.backends.xnnpack.startup import start_quietly

    start_quietly()


def graph_beside(program: Path) -> Path:
    """Where ``quantize`` wrote the graph of a program."""
    from custom_quantizer.app.saved_graph import GRAPH_SUFFIX

    graph, old = program.with_suffix(GRAPH_SUFFIX), program.with_suffix(".pt2")
    # Naming it gives the message that says why it is not read.
    return old if old.is_file() and not graph.exists() else graph


def load_converted(graph: Path) -> GraphModule:
    """A saved graph by its own name, or by that of the program beside it."""
    from custom_quantizer.app.saved_graph import load_graph

    if graph.suffix == ".pte":
        graph = existing_graph(graph)
    return load_graph(graph)[0]


def existing_graph(program: Path) -> Path:
    """The graph beside a program; an error that says which of both is missing.

    Raises:
        InputError: one is.
    """
    graph = graph_beside(program)
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
