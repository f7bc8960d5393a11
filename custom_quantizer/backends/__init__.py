"""Runtimes that programs are made for; the only packages that import executorch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from custom_quantizer.errors import ConfigError, InputError
from custom_quantizer.ops.backend import BackendLike, get_backend
from custom_quantizer.reference.converted import ConvertedGraph

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from custom_quantizer.backends.tosa import TosaProgram
    from custom_quantizer.backends.xnnpack import LoweredProgram
    from custom_quantizer.reference.verifying import Checks

__all__ = ["checks_of", "lower"]


@overload
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    backend: Literal["xnnpack"] = "xnnpack",
    dynamic_max: int = ...,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram: ...
@overload
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    backend: Literal["tosa"],
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TosaProgram: ...
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    backend: BackendLike = "xnnpack",
    **options: Any,
) -> LoweredProgram | TosaProgram:
    """Lower a converted graph to a program of a backend, and check it.

    See :func:`custom_quantizer.backends.xnnpack.checked_lowering.lower` and
    :func:`custom_quantizer.backends.tosa.checked_lowering.lower`.

    Args:
        converted: what ``convert_pt2e`` returns, planned for the same backend; it is not changed.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        backend: ``"xnnpack"`` (an ExecuTorch program) or ``"tosa"`` (a TOSA flatbuffer).
        options: of the backend's own function: ``check``, ``progress``; XNNPACK's ``dynamic_max``,
            the upper bound of dynamic sizes for which capture recorded none.

    Raises:
        ConfigError: there is no such backend, or it makes no programs.
        ConversionError: the graph is not a converted one.
        InputError: the example does not fit the graph.
        LoweringError: the backend refused the graph.
        VerificationError: the program is not what the graph says.
    """
    if backend is None:
        raise ConfigError(
            "backend=None stands for pure integers, which are no program; write them with "
            "save_integers or save_c"
        )
    package = import_module(f"{__name__}.{get_backend(backend).name}")
    program: LoweredProgram | TosaProgram = package.lower(converted, example_inputs, **options)
    return program


def checks_of(program: object) -> Checks:
    """What the backend of a program knows of it: its module ``checks``.

    Raises:
        InputError: it is no program of a backend.
    """
    graph = getattr(program, "graph", None)
    if not isinstance(graph, ConvertedGraph):
        raise InputError(
            f"verify compares a program with its graph, got {type(program).__name__}; pass what "
            "custom_quantizer.lower returned"
        )
    return cast("Checks", import_module(f"{__name__}.{graph.backend.name}.checks"))
