"""An ExecuTorch export recipe that quantizes with our schemes and lowers as ``lower`` does.

Importing this module registers the provider, so that

    session = executorch.export.export(
        model, [example], ExportRecipe.get_recipe(IntegerRecipe.A8W8, calibration=batches)
    )

quantizes, lowers and checks a model; :func:`session_program` then gives the same
:class:`~custom_quantizer.backends.xnnpack.program.LoweredProgram` that ``lower`` would. What makes
the stock stages run our rewrites are three of a recipe's own hooks:

- ``aten_transform_passes`` get the converted graph as ExecuTorch exported it, and return the
  rewritten one. The artifact of the quantize stage stays what ``convert_pt2e`` returned;
- ``partitioners``: XNNPACK's;
- ``edge_manager_transform_passes`` run between partitioning and writing. They change nothing: the
  program is written once more, read back and compared with the graph.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from executorch.exir import EdgeProgramManager
from executorch.export import (
    BackendRecipeProvider,
    ExportRecipe,
    ExportSession,
    LoweringRecipe,
    QuantizationRecipe,
    RecipeType,
    recipe_registry,
)

from custom_quantizer.backends.xnnpack.border_constants import border_constants
from custom_quantizer.backends.xnnpack.checks import check_program
from custom_quantizer.backends.xnnpack.inline_constants import inline_constants
from custom_quantizer.backends.xnnpack.lowering import (
    Rewritten,
    backend_config,
    describe_program,
    rewrite_exported,
    to_bytes,
)
from custom_quantizer.backends.xnnpack.partition_configs import partitioner
from custom_quantizer.backends.xnnpack.program import LoweredProgram
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import (
    CalibrationError,
    ConfigError,
    InputError,
    LoweringError,
    nearest,
)
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX

__all__ = ["IntegerRecipe", "IntegerRecipeProvider", "session_program"]

BACKEND_NAME = "custom_quantizer"

Batches: TypeAlias = Iterable[tuple[Any, ...]]
Calibration: TypeAlias = Batches | Callable[[], Batches]


class IntegerRecipe(RecipeType):  # type: ignore[misc]  # executorch is untyped
    """Recipes for ``ExportRecipe.get_recipe``; the value is the scheme of all ops.

    ``CUSTOM`` has none of its own: it takes exactly one of ``scheme`` (a name or an ``OpScheme``),
    ``config`` (the path of a YAML or JSON file, or what it holds) and ``quantizer`` (an
    ``IntegerQuantizer``).

    All take these keyword arguments:

    - ``calibration``: input tuples, or a function that returns some; default: the session's
      example inputs.
    - ``train``: a function that trains the prepared graph, which it is handed: quantization-aware
      training instead of calibration. The model is captured in training mode.
    - ``dynamic_batch``: calibrate or train with any number of samples. For a program whose batch is
      dynamic, ``executorch.export.export`` must be told ``dynamic_shapes`` as well.
    - ``dynamic_max``: upper bound of dynamic sizes that have none; default 64.
    - ``check``: compare the program with the graph, as ``lower`` does; default true.

    Wrong arguments raise ``ConfigError``.
    """

    A8W8 = "a8w8"
    A8W8_PER_TENSOR = "a8w8-per_tensor"
    A8W4 = "a8w4"
    A16W8 = "a16w8"
    DYN8W8 = "dyn8w8"
    DYN8W4 = "dyn8w4"
    CUSTOM = "custom"

    @classmethod
    def get_backend_name(cls) -> str:
        """Name of our provider in ExecuTorch's registry."""
        return BACKEND_NAME


class IntegerRecipeProvider(BackendRecipeProvider):  # type: ignore[misc]
    """Makes the recipes of :class:`IntegerRecipe`."""

    @property
    def backend_name(self) -> str:
        """Name in ExecuTorch's registry."""
        return BACKEND_NAME

    def get_supported_recipes(self) -> list[IntegerRecipe]:
        """All of :class:`IntegerRecipe`."""
        return list(IntegerRecipe)

    def create_recipe(self, recipe_type: RecipeType, **kwargs: Any) -> ExportRecipe | None:
        """Make a recipe; ``None`` if it is not one of ours.

        Raises:
            ConfigError: an argument is unknown, missing or of the wrong kind.
            InputError: a config file cannot be read.
        """
        if not isinstance(recipe_type, IntegerRecipe):
            return None
        quantizer = _quantizer(recipe_type, kwargs)
        train = kwargs.pop("train", None)
        if train is not None and not callable(train):
            raise ConfigError(f"train is called with the prepared graph; got {train!r}")
        calibration = _calibration(kwargs.pop("calibration", None))
        if train is not None and calibration is not None:
            raise ConfigError("a graph is calibrated or trained: give calibration or train")
        dynamic_batch = _flag("dynamic_batch", kwargs.pop("dynamic_batch", False))
        check = _flag("check", kwargs.pop("check", True))
        dynamic_max = kwargs.pop("dynamic_max", DEFAULT_DYNAMIC_MAX)
        if isinstance(dynamic_max, bool) or not isinstance(dynamic_max, int) or dynamic_max < 1:
            raise ConfigError(f"dynamic_max is a size of at least 1, got {dynamic_max!r}")
        if kwargs:
            _refuse_unknown(recipe_type, kwargs)
        lowering = _Lowering(dynamic_max, check)
        return ExportRecipe(
            name=f"{BACKEND_NAME}_{recipe_type.value}",
            quantization_recipe=QuantizationRecipe(
                quantizers=[quantizer],
                is_qat=train is not None,
                train_fn=train,
                dynamic_batch_size=dynamic_batch,
                calibration_inputs_fn=calibration,
            ),
            aten_transform_passes=[lowering.rewrite],
            lowering_recipe=LoweringRecipe(
                partitioners=[partitioner()],
                edge_manager_transform_passes=[lowering.finish],
            ),
            executorch_backend_config=backend_config(),
            strict=False,
        )


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------

_CHOICES = ("scheme", "config", "quantizer")
_COMMON = ("calibration", "check", "dynamic_batch", "dynamic_max", "train")


def _refuse_unknown(recipe: IntegerRecipe, given: Mapping[str, Any]) -> None:
    name = next(iter(given))
    legal = (*_COMMON, *(_CHOICES if recipe is IntegerRecipe.CUSTOM else ()))
    what = f"IntegerRecipe.{recipe.name} takes no argument {name!r}"
    if name in _CHOICES:
        raise ConfigError(f"{what}: its scheme is {recipe.value}; use IntegerRecipe.CUSTOM")
    raise ConfigError(f"{what}; it takes {', '.join(legal)}{nearest(name, legal)}")


def _quantizer(recipe: IntegerRecipe, kwargs: dict[str, Any]) -> IntegerQuantizer:
    """The quantizer that a recipe and its arguments ask for, which are taken out."""
    if recipe is not IntegerRecipe.CUSTOM:
        return IntegerQuantizer().set_global(recipe.value)
    given = {name: kwargs.pop(name) for name in _CHOICES if name in kwargs}
    if len(given) != 1:
        what = ", ".join(given) or "none of them"
        raise ConfigError(
            f"IntegerRecipe.CUSTOM takes exactly one of {', '.join(_CHOICES)}; got {what}"
        )
    ((name, value),) = given.items()
    if name == "scheme":
        if not isinstance(value, (str, OpScheme)):
            raise ConfigError(f"scheme is a name or an OpScheme, got {type(value).__name__}")
        return IntegerQuantizer().set_global(value)
    if name == "config":
        if not isinstance(value, (str, os.PathLike, Mapping)):
            raise ConfigError(f"config is a path or a mapping, got {type(value).__name__}")
        return IntegerQuantizer.from_config(value)
    if not isinstance(value, IntegerQuantizer):
        raise ConfigError(
            f"quantizer is an IntegerQuantizer, got {type(value).__name__}; to compose it with "
            "another one, append that to recipe.quantization_recipe.quantizers"
        )
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false, got {value!r}")
    return value


def _calibration(given: Calibration | None) -> Callable[[], Batches] | None:
    """A function that yields checked batches; ``None``: the session's example inputs."""
    if given is None:
        return None
    if isinstance(given, (torch.Tensor, str, Mapping)) or not (
        callable(given) or isinstance(given, Iterable)
    ):
        raise ConfigError(
            "calibration is a list of input tuples, or a function that returns them; got "
            f"{type(given).__name__}"
        )

    def batches() -> Iterator[tuple[Any, ...]]:
        count = 0
        for batch in given() if callable(given) else given:
            if not isinstance(batch, (tuple, list)):
                raise CalibrationError(
                    f"calibration batch {count} is no tuple of inputs but {type(batch).__name__}; "
                    "for one tensor x write (x,)"
                )
            count += 1
            yield tuple(batch)
        if not count:
            raise CalibrationError(
                "calibration has no batches; a generator can be read only once, so give a list or "
                "a function that returns one"
            )

    return batches


# ---------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------

# What each program that one of our recipes partitioned was made from, method by method.
_REWRITTEN: weakref.WeakKeyDictionary[EdgeProgramManager, dict[str, Rewritten]] = (
    weakref.WeakKeyDictionary()
)


class _Lowering:
    """The hooks of one recipe, which its stages call in this order: rewrite, finish."""

    def __init__(self, dynamic_max: int, check: bool) -> None:
        self._dynamic_max = dynamic_max
        self._check = check
        self._methods: dict[str, Rewritten] = {}

    @tools()
    def rewrite(
        self, method: str, exported: torch.export.ExportedProgram
    ) -> torch.export.ExportedProgram:
        """Rewrite one method's converted graph, as ``lower`` does.

        Raises:
            ConversionError: the graph is not a converted one.
            LoweringError: it could not be rewritten.
        """
        self._methods[method] = rewrite_exported(exported, self._dynamic_max, tagged=False)
        return self._methods[method].exported

    @tools()
    def finish(self, edge: EdgeProgramManager) -> list[Any]:
        """Check the partitioned program; asks for no further pass.

        Raises:
            LoweringError: part of it is not lowered, or it was not rewritten before.
            VerificationError: it is not what the graph says.
        """
        missing = sorted(set(edge.methods) - set(self._methods))
        if missing:
            raise LoweringError(
                f"method {missing[0]!r} was partitioned without the rewrites it needs, since an "
                "ExportedProgram was handed in; hand in the float model, or the graph that "
                "convert_pt2e returns"
            )
        methods = {name: self._methods.pop(name) for name in sorted(edge.methods)}
        _REWRITTEN[edge] = methods
        for name, rewritten in methods.items():
            add_constants(edge, border_constants(rewritten.graph.borders, name))
        inline_constants(edge)
        # Writing leaves marks in the graph that fix dynamic sizes when it is written again.
        data = to_bytes(copy.deepcopy(edge))
        for name, rewritten in methods.items():
            program = describe_program(data, edge, methods, name)
            if self._check:
                check_program(program, rewritten.graph, rewritten.example)
        return []


def add_constants(edge: EdgeProgramManager, constants: Mapping[str, int | float]) -> None:
    """Add constant methods to a partitioned program.

    ExecuTorch (1.5.1) takes them when the program is partitioned, and that is not our call here;
    its own pass for integer inputs (``exir/passes/quantize_io_pass.py``) adds them in this way.
    """
    if constants:
        edge._config_methods = {**(edge._config_methods or {}), **constants}


def session_program(session: ExportSession, method: str = "forward") -> LoweredProgram:
    """The program of a finished session, with all that is known about it.

    Args:
        session: what ``executorch.export.export`` returned for a recipe of ours.
        method: which one, if the session exported several.

    Raises:
        InputError: the session ran with another recipe, did not finish, or has no such method.
    """
    if not isinstance(session, ExportSession):
        raise InputError(
            f"expected what executorch.export.export returns, got {type(session).__name__}"
        )
    try:
        edge, data = session.get_edge_program_manager(), bytes(session.get_pte_buffer())
    except RuntimeError as error:
        raise InputError(f"the session has not finished: {error}") from error
    methods = _REWRITTEN.get(edge)
    if methods is None:
        raise InputError(
            "the session did not run with one of our recipes; make it with "
            "ExportRecipe.get_recipe(cq.IntegerRecipe.A8W8)"
        )
    if method not in methods:
        raise InputError(f"the session has no method {method!r}; it has {', '.join(methods)}")
    return describe_program(data, edge, methods, method)


recipe_registry.register_backend_recipe_provider(IntegerRecipeProvider())
