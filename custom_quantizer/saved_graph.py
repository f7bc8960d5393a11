"""A converted graph as a file, so that a program can be verified long after it was written.

The file is what ``torch.export.save`` writes (``.pt2``): quantize and dequantize nodes, integer
weights and biases. Node names may differ from the graph's in memory; every integer is the same, and
lowering it again gives the same bytes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from custom_quantizer._io import write_bytes_atomic
from custom_quantizer.converted import read_converted
from custom_quantizer.errors import ConversionError, InputError
from custom_quantizer.threads import tools
from custom_quantizer.xnnpack import LoweredProgram, lower
from custom_quantizer.xnnpack.lowering import DEFAULT_DYNAMIC_MAX, export_again

__all__ = ["graph_bytes", "load_graph", "load_lowered", "save_graph"]


def save_graph(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
) -> Path:
    """Write a converted graph; all of it or nothing.

    Args:
        converted: what ``convert_pt2e`` returns.
        example_inputs: as for lowering.
        path: usually ends in ``.pt2``.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the file cannot be written.
    """
    write_bytes_atomic(path, graph_bytes(converted, example_inputs, dynamic_max=dynamic_max))
    return Path(path)


@tools()
def graph_bytes(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
) -> bytes:
    """What :func:`save_graph` writes.

    Raises:
        ConversionError: the graph is not a converted one.
    """
    read_converted(converted)
    exported = export_again(converted, example_inputs, dynamic_max)
    # Not into the file: torch's zip writer ends the process when a disk is full.
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


@tools()
def load_graph(path: str | os.PathLike[str]) -> tuple[GraphModule, tuple[Any, ...]]:
    """Read what :func:`save_graph` wrote.

    Returns:
        The converted graph and the example inputs it was saved with.

    Raises:
        InputError: the file is missing, or not a saved graph.
        ConversionError: it holds a graph that is not converted.
    """
    where = os.fspath(path)
    if not Path(path).is_file():
        raise InputError(f"{where}: no such file; `custom-quantizer quantize` writes it (.pt2)")
    try:
        exported = torch.export.load(where)
    except Exception as error:
        raise InputError(
            f"{where}: not a graph that torch.export.save wrote ({type(error).__name__}); "
            "`custom-quantizer quantize` writes one beside the program"
        ) from error
    if exported.example_inputs is None:
        raise InputError(f"{where}: it was saved without example inputs; save it with save_graph")
    model = exported.module()
    if not isinstance(model, GraphModule):
        raise ConversionError(f"{where}: it does not hold a graph")
    read_converted(model)
    return model, tuple(exported.example_inputs[0])


def load_lowered(
    program: str | os.PathLike[str], graph: str | os.PathLike[str]
) -> tuple[GraphModule, LoweredProgram]:
    """Read a program together with its graph, so that every op can be traced into the file.

    The graph is lowered once more; what that says about each op is paired with the bytes of the
    file, whatever they hold.

    Raises:
        InputError: a file is missing or not what it should be.
        ProgramError: the program cannot be read.
    """
    converted, example = load_graph(graph)
    try:
        data = Path(program).read_bytes()
    except OSError as error:
        raise InputError(
            f"{os.fspath(program)}: cannot be read ({error.strerror}); give the path of a .pte"
        ) from error
    return converted, lower(converted, example, check=False).with_bytes(data)
