"""Models named by a string, as the command line gets them.

Nothing here knows about quantization: :func:`load_model` hands on an eval-mode module. What a user
can get wrong (a name, a path, a file's content) raises
:class:`~custom_quantizer.errors.InputError`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from custom_quantizer.app.tensor_files import WEIGHT_SUFFIXES, described, read_tensor_file
from custom_quantizer.core.files import AnyPath
from custom_quantizer.errors import InputError, first_line, some, where_raised

__all__ = ["check_model_name", "load_model", "load_weights"]


_TORCHVISION = "torchvision"
"""Where a model comes from that has a name alone."""

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")

# torchvision is imported inside the functions that use it: it costs a second, and most commands
# do without.


def load_model(spec: str, weights: AnyPath | None = None, **kwargs: object) -> nn.Module:
    """Build a model from its name, load its weights and set it to eval mode.

    Args:
        spec: One of

            - a torchvision model: ``"resnet18"`` or ``"torchvision:resnet18"``;
            - ``"package.module:name"``, imported with the current directory on the path;
            - ``"path/to/file.py:name"``, run with the file's directory on the path. This
              executes the file.

            ``name`` is a function that returns an ``nn.Module``, a subclass of it, or a module
            instance (a copy of which is returned).
        weights: A file for :func:`load_weights`, or, for a torchvision model, the name of
            published weights (``"DEFAULT"``, ``"IMAGENET1K_V1"``), which torchvision downloads.
            None keeps the weights the model was built with.
        **kwargs: Arguments of the function or class.

    Returns:
        The model in eval mode.

    Raises:
        InputError: No such model, module, name or weights; the user's code failed or returned
            something else; the download failed; the file does not fit the model.

    Warns:
        UserWarning: A torchvision model without ``weights`` has random ones.
    """
    left, name = _split(spec)
    published = weights is not None and not _is_weight_file(weights)
    if left == _TORCHVISION:
        model = _torchvision_model(name, str(weights) if published else None, kwargs)
        if weights is None:
            warnings.warn(
                f"{spec} has random weights: its accuracy means nothing; pass weights= with a "
                "file, or with a name such as 'DEFAULT' to download published ones",
                stacklevel=2,
            )
    elif published:
        raise InputError(
            f"No weights file {weights}; names such as 'DEFAULT' exist for torchvision models "
            f"only; for {spec} pass a .safetensors, .pt or .pth file"
        )
    else:
        model = _user_model(spec, left, name, kwargs)
    if weights is not None and not published:
        load_weights(model, weights)
    return model.eval()


def check_model_name(spec: str) -> None:
    """Find a misspelled name without building anything or running code of the user's.

    Args:
        spec: As for :func:`load_model`. Of ``"package.module:name"`` nothing is checked: to find
            a module Python runs the packages around it.

    Raises:
        InputError: No such torchvision model, or no such file.
    """
    left, name = _split(spec)
    if left == _TORCHVISION:
        _check_torchvision_name(name)
    elif _is_python_file(left):
        _check_python_file(Path(left))


def load_weights(model: nn.Module, path: AnyPath) -> None:
    """Load a state dict from a file into ``model``, in place; every key must match.

    Args:
        model: The module to fill.
        path: A ``.safetensors`` file, or a ``.pt`` or ``.pth`` file of tensors (read with
            ``weights_only=True``, so that no code in it runs). The state dict may be wrapped as
            ``{"state_dict": ...}``, ``{"model_state_dict": ...}`` or ``{"model": ...}``, and its
            keys may all begin with ``"module."``, as ``DataParallel`` writes them.

    Raises:
        InputError: The file is missing, unreadable or no state dict, or its keys or shapes are
            not those of ``model``. The model may then be partly filled.
    """
    own = model.state_dict()
    state = _unprefixed(_read_state_dict(Path(path)), own)
    shapes = [
        f"{key} {list(value.shape)} (model: {list(own[key].shape)})"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if shapes:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: other shapes: {some(shapes)}; "
            "build the model as it was when the file was written"
        )
    # Not strict=True: its message lists hundreds of keys when a file is of another network.
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as exc:
        raise InputError(f"{path} does not fit {type(model).__name__}: {exc}") from exc
    problems = [
        f"{len(keys)} {kind}: {some(keys)}"
        for kind, keys in (
            ("missing keys", result.missing_keys),
            ("unexpected keys", result.unexpected_keys),
        )
        if keys
    ]
    if problems:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}; "
            "pass the weights of this architecture, or build the model as they need it"
        )


def _is_weight_file(weights: AnyPath) -> bool:
    return Path(weights).suffix.lower() in WEIGHT_SUFFIXES or Path(weights).is_file()


def _split(spec: str) -> tuple[str, str]:
    """Where a model comes from, and its name there."""
    left, colon, name = spec.rpartition(":")
    if not name or (colon and not left):
        raise InputError(
            f"{spec!r} names no model; write 'resnet18', 'package.module:function' or "
            "'file.py:function'"
        )
    return left or _TORCHVISION, name


def _check_torchvision_name(name: str) -> None:
    from torchvision import models

    names: list[str] = models.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(
            f"torchvision has no model {name!r}{hint}; "
            "for a model of your own write 'package.module:function' or 'file.py:function'"
        )


def _torchvision_model(name: str, weights: str | None, kwargs: Mapping[str, object]) -> nn.Module:
    from torchvision import models

    _check_torchvision_name(name)
    chosen: Any = None
    if weights is not None:
        known: Any = models.get_model_weights(name)
        if weights not in known.__members__:
            raise InputError(
                f"No weights file or published weights {weights!r} for {name}; pass a "
                f".safetensors, .pt or .pth file, or one of: {', '.join(known.__members__)}"
            )
        chosen = known[weights]
    arguments: dict[str, object] = {"weights": chosen, **kwargs}
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    # Detection and segmentation models else download a backbone when they have no weights.
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments.setdefault("weights_backbone", None)
    try:
        return builder(**arguments)
    except OSError as exc:  # URLError, timeouts and a cache that cannot be written
        if chosen is None:
            raise InputError(f"Cannot build {name}: {first_line(exc)}") from exc
        raise InputError(
            f"Cannot download the weights {weights} of {name} from {chosen.url}: "
            f"{first_line(exc)}; without a "
            "network, get that file elsewhere and pass its path as weights"
        ) from exc
    except (RuntimeError, TypeError, ValueError) as exc:
        raise InputError(f"Cannot build {name} with {arguments}: {first_line(exc)}") from exc


def _user_model(spec: str, left: str, name: str, kwargs: Mapping[str, object]) -> nn.Module:
    is_file = _is_python_file(left)
    folder = Path(left).resolve().parent if is_file else Path.cwd()
    # While the function runs too: it may import what lies beside it.
    with _import_path(folder):
        module = _import_file(Path(left)) if is_file else _import_module(left)
        target: object = module
        for part in name.split("."):
            if not hasattr(target, part):
                near = difflib.get_close_matches(part, dir(target), n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise InputError(f"{left} has no {name!r}, asked for by {spec!r}{hint}")
            target = getattr(target, part)
        if isinstance(target, nn.Module):
            if kwargs:
                raise InputError(
                    f"{spec} is a module, not a function: it takes no arguments, but got "
                    f"{', '.join(kwargs)}"
                )
            return copy.deepcopy(target)
        if not callable(target):
            raise InputError(
                f"{spec} is of type {type(target).__name__}; name a function that returns an "
                "nn.Module, a module class or a module"
            )
        if missing := _missing_arguments(target, kwargs):
            given = " ".join(f"--model-arg {name}=..." for name in missing)
            raise InputError(
                f"{spec} needs arguments that were not given: {', '.join(missing)}; give them "
                f"({given}), or name a function without any"
            )
        try:
            model = target(**kwargs)
        except (Exception, SystemExit) as exc:
            raise InputError(f"Calling {spec} failed: {described(exc)}{where_raised(exc)}") from exc
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__}, not an nn.Module")
    return model


def _missing_arguments(target: Callable[..., object], given: Mapping[str, object]) -> list[str]:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # something of C, of which nothing is known
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in given
    ]


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            raise InputError(
                f"There is no Python module {name!r}, neither installed nor below "
                f"{Path.cwd()}; for a file write 'path/to/file.py:function'"
            ) from exc
        raise InputError(f"Importing {name} failed: {described(exc)}{_line_of(exc)}") from exc
    except (Exception, SystemExit) as exc:
        raise InputError(f"Importing {name} failed: {described(exc)}{_line_of(exc)}") from exc


def _line_of(exc: BaseException) -> str:
    return "" if isinstance(exc, SyntaxError) else where_raised(exc)  # which names it itself


def _is_python_file(left: str) -> bool:
    return left.endswith(".py") or os.sep in left


def _check_python_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"No Python file {path}; check the path before the colon")


def _import_file(path: Path) -> ModuleType:
    _check_python_file(path)
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"_custom_quantizer_model_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up while it is being run.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        raise InputError(f"Running {path} failed: {described(exc)}{_line_of(exc)}") from exc
    return module


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    content = read_tensor_file(path, "weights", WEIGHT_SUFFIXES)
    for key in _STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds no state dict; write one with model.state_dict()")
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise InputError(
            f"{path} is no state dict: {some(other)} are not tensors; save model.state_dict() "
            f"alone, or under one of the keys {', '.join(_STATE_DICT_KEYS)}"
        )
    return dict(cast("Mapping[str, Tensor]", content))


def _unprefixed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of ``DataParallel``, unless the model has a layer of this name itself."""
    wrapped = all(key.startswith("module.") for key in state)
    if not wrapped or state.keys() == own.keys():
        return state
    return {key.removeprefix("module."): value for key, value in state.items()}
