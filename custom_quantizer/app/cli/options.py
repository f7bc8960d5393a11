"""Options that several commands have: each is said once, and parsed here."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast

import click

from custom_quantizer.app.cli.console import DEBUG
from custom_quantizer.config.improvement import ACCURACIES, ALGORITHMS

if TYPE_CHECKING:
    from torch import nn

    from custom_quantizer.app.data import Preprocess

F = TypeVar("F", bound=Callable[..., Any])

MakePreprocess: TypeAlias = "Callable[[], Preprocess]"
"""What ``preprocess_options`` hands to a command: torch is not imported until it is called."""

CALIBRATION_SAMPLES = 512


def examples(*lines: str) -> str:
    """The end of a command's ``--help``."""
    # click keeps the lines of a paragraph as they are behind this mark.
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


class InputShape(NamedTuple):
    """Sizes of an input, and of what type it is if the option says so."""

    sizes: tuple[int, ...]
    dtype: str | None


_DTYPES = ("bool", "float32", "int32", "int64")


def _input_shapes(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Callback that parses ``1,3,224,224`` or ``int64:1,12``, as often as it stands."""
    found = []
    for text in value:
        dtype, colon, sizes = text.rpartition(":")
        if colon and dtype not in _DTYPES:
            raise click.BadParameter(
                f"{text!r}: an input is {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, not {dtype!r}",
                param=param,
            )
        (numbers,) = _numbers(int)(ctx, param, (sizes,))
        found.append(InputShape(numbers, dtype or None))
    return tuple(found)


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
    ctx.meta[DEBUG] = bool(value) or bool(ctx.meta.get(DEBUG))


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show tracebacks and the messages of PyTorch and ExecuTorch.",
)

isolated_option = click.option(
    "--isolated",
    is_flag=True,
    help="Run every program in a process of its own, not only those without a checksum.",
)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator for several options, which ``--help`` shows in this order."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


def count_option(name: str, help: str, default: int | None = None) -> Callable[[F], F]:
    """A number from 1; without ``default`` it is None unless given."""
    kind = click.IntRange(min=1)
    return click.option(name, type=kind, default=default, show_default=True, help=help)


def samples_option(
    help: str = "Use at most that many, drawn evenly.", default: int | None = None
) -> Callable[[F], F]:
    """How many samples to use."""
    return count_option("--samples", help, default)


def file_option(
    *names: str, help: str, metavar: str = "FILE", required: bool = False
) -> Callable[[F], F]:
    """A file, which need not exist."""
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option(*names, type=kind, metavar=metavar, required=required, help=help)


def path_argument(name: str, metavar: str | None = None) -> Callable[[F], F]:
    """A file or folder, which need not exist."""
    return click.argument(name, metavar=metavar, type=click.Path(path_type=Path))


def json_option(help: str = "Print JSON instead of text.") -> Callable[[F], F]:
    """Whether to print JSON, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help=help)


DATA_FORMS = "Folder or .zip of images, or tensors: .pt, .npy, .npz, .safetensors."


def data_option(
    help: str = DATA_FORMS, *, name: str = "--data", required: bool = False
) -> Callable[[F], F]:
    """Where samples are."""
    return click.option(name, metavar="DATA", required=required, help=help)


def graph_option(help: str) -> Callable[[F], F]:
    """The converted graph of a program; ``help`` goes on after "that `quantize` wrote"."""
    kind = click.Path(path_type=Path)
    text = f"Converted graph that `quantize` wrote{help}"
    return click.option("--graph", type=kind, metavar="GRAPH", help=text)


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A float model as a user names it: nothing is imported until it is asked for."""

    name: str
    weights: str | None
    arguments: dict[str, object]

    def check(self) -> None:
        """Find out before seconds of imports that a name is misspelled."""
        from custom_quantizer.app.models import check_model_name

        check_model_name(self.name)

    def load(self) -> nn.Module:
        """The model itself."""
        from custom_quantizer.app.models import load_model

        return load_model(self.name, self.weights, **self.arguments)


_weights_options = together(
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


def _named_model(param: Callable[[F], F], command: F) -> F:
    """A parameter and two options, which reach the command as one ``NamedModel`` or None."""

    @functools.wraps(command)
    def called(
        *args: Any,
        model: str | None,
        weights: str | None,
        model_args: dict[str, object],
        **others: Any,
    ) -> Any:
        named = None if model is None else NamedModel(model, weights, model_args)
        if named is None and (weights is not None or model_args):
            raise click.UsageError("--weights and --model-arg are for --model, which is not given")
        return command(*args, model=named, **others)

    return param(_weights_options(cast(F, called)))


model_argument = functools.partial(_named_model, click.argument("model"))
"""MODEL and what goes with it; the command gets a ``NamedModel``."""


def model_option(help: str, *, required: bool = False) -> Callable[[F], F]:
    """``--model`` and what goes with it; the command gets a ``NamedModel``, or None."""
    option = click.option("--model", metavar="MODEL", required=required, help=help)
    return functools.partial(_named_model, option)


_scheme_options = together(
    click.option(
        "--scheme",
        metavar="NAME",
        help="One scheme for all ops.  [default: a8w8]",
    ),
    file_option("--config", help="YAML or JSON file with a scheme per op."),
)


def scheme_options(command: F) -> F:
    """Two options, which reach the command as ``asked``: a scheme's name or a config file."""

    @functools.wraps(command)
    def called(*args: Any, scheme: str | None, config: Path | None, **others: Any) -> Any:
        if scheme is not None and config is not None:
            raise click.UsageError("--scheme and --config exclude each other: name one")
        asked = config if config is not None else "a8w8" if scheme is None else scheme
        return command(*args, asked=asked, **others)

    return _scheme_options(cast(F, called))


io_option = click.option(
    "--integer-io",
    is_flag=True,
    help="Let the program take and return int8 (int16 above 8 bits) in place of float32.",
)

accuracy_option = click.option(
    "--accuracy",
    type=click.Choice(ACCURACIES),
    help="What is done beyond rounding to nearest: nothing, what is free, or what seconds to "
    "minutes buy.  [default: fast]",
)

improve_option = click.option(
    "--improve",
    multiple=True,
    type=click.Choice(ALGORITHMS),
    help="An algorithm, instead of those that --accuracy stands for. Repeatable.",
)

_image_options = together(
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


def preprocess_options(command: F) -> F:
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


classes_option = click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the model's classes, one a line, in the order of its scores: for folders of "
    "some of them.  [default: the folders in the order of their names]",
)

output_option = click.option(
    "--output",
    "output_index",
    type=click.IntRange(min=0),
    metavar="N",
    help="Which output holds the scores, of a model with several.  [default: 0]",
)


def plot_option(help: str) -> Callable[[F], F]:
    """A figure to draw."""
    return file_option("--plot", help=help)


html_option = file_option(
    "--html", help="Write a page with pictures of the network and of every op."
)

checkpoint_option = file_option(
    "--checkpoint",
    help="Keep finished batches here; the same command goes on where it stopped.",
)

shape_option = click.option(
    "--input-shape",
    "shapes",
    callback=_input_shapes,
    metavar="[TYPE:]N,C,H,W",
    multiple=True,
    help="Shape of an input, batch first, and its type, such as int64:1,16; once for each input "
    "of the model.  [default of TYPE: that of the data, else float32]",
)

dynamic_option = click.option(
    "--dynamic-batch", is_flag=True, help="Let the program take batches of 1 to 64."
)

graph_argument = path_argument("graph", "GRAPH")
