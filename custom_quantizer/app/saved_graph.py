"""A converted graph as a file, so that a program can be verified long after it was written.

The file (``.graph.safetensors``) holds quantize and dequantize nodes, integer weights and biases,
and the example inputs: JSON and tensors, nothing that could run. Reading one is safe whoever wrote
it; lowering what was read gives the same bytes as lowering what was saved. See ``docs/files.md``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from pydantic import ValidationError
from torch.fx import GraphModule

from custom_quantizer.backends.xnnpack import LoweredProgram, StoredProgram, load_program, lower
from custom_quantizer.backends.xnnpack.readback import read_file, read_program
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.file_hashes import GRAPH_SUFFIX, recorded_hash, sha256_of
from custom_quantizer.core.files import write_bytes_atomic
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import ConversionError, InputError
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX
from custom_quantizer.reference.graph_building import build, document_of
from custom_quantizer.reference.graph_document import FormatError, first_problem, pack, unpack
from custom_quantizer.reference.inputs import check_example

__all__ = [
    "GRAPH_SUFFIX",
    "load_graph",
    "load_lowered",
    "load_program_of",
    "save_graph",
    "serialize_graph",
]


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
        path: usually ends in ``.graph.safetensors``.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.

    Raises:
        ConversionError: the graph is not a converted one, or it holds what a file cannot: an op
            that none may ask for (``docs/files.md``), a module that is called, a tensor that is not
            dense, sizes that depend on values.
        InputError: the example does not fit the graph, or the file cannot be written.
    """
    write_bytes_atomic(path, serialize_graph(converted, example_inputs, dynamic_max=dynamic_max))
    return Path(path)


@tools()
def serialize_graph(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
) -> bytes:
    """The bytes that :func:`save_graph` writes; its arguments and errors."""
    # The file holds the graph as convert_pt2e returned it: float32 at its border.
    graph = replace(read_converted(converted), model=converted)
    example = pytree.tree_leaves(check_example(graph, example_inputs))
    try:
        data = pack(*document_of(converted, example, dynamic_max))
        # What cannot be read again must not be written.
        build(*unpack(data))
    except Exception as error:  # ours, pydantic's, or PyTorch's when the graph is run once
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise ConversionError(
            f"the graph cannot be saved in a file that holds no code: {why}; the program and its "
            "report do not need it; keep the graph in memory to verify the program"
        ) from error
    return data


@tools()
def load_graph(path: str | os.PathLike[str]) -> tuple[GraphModule, tuple[Any, ...]]:
    """Read what :func:`save_graph` wrote. No code in the file is run, since it can hold none.

    Returns:
        The converted graph and the example inputs it was saved with; those captured by keyword
        come last.

    Raises:
        InputError: the file is missing, damaged, or not a saved graph.
        ConversionError: it holds a graph that is not converted.
    """
    where = os.fspath(path)
    try:
        if not os.path.isfile(where):
            raise InputError(
                f"{where}: no such file; `custom-quantizer quantize` writes it ({GRAPH_SUFFIX})"
            )
        data = Path(where).read_bytes()
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); check the path") from error
    recorded = recorded_hash(where, "graph")
    if recorded is not None and sha256_of(data) != recorded[1]:
        raise InputError(
            f"{where}: the file is damaged or was changed: {recorded[0].name} beside it has "
            "another SHA-256; copy both again, quantize the model again, or remove the report if "
            "it is of another graph"
        )
    try:
        model, example = build(*unpack(data))
    except FormatError as error:
        raise InputError(
            f"{where}: {error}; `custom-quantizer quantize` writes a graph beside the program"
        ) from error
    except Exception as error:  # PyTorch's own checks, behind all of ours
        raise InputError(
            f"{where}: not a graph that can be built ({type(error).__name__}: {error}); "
            "`custom-quantizer quantize` writes one beside the program"
        ) from error
    try:
        read_converted(model)
    except ConversionError:
        raise
    except Exception as error:  # arguments that fit the schema, and mean nothing
        raise InputError(
            f"{where}: not a graph that can be quantized: {error}; `custom-quantizer quantize` "
            "writes one beside the program"
        ) from error
    return model, example


def load_program_of(
    program: str | os.PathLike[str],
    graph: str | os.PathLike[str] | None,
    *,
    isolated: bool | None = None,
) -> StoredProgram:
    """Read a program that also takes inputs by the names that its graph knows.

    Args:
        program: a ``.pte``.
        graph: what :func:`save_graph` wrote; ``None``: there is none, or no names are needed.
        isolated: as for :func:`load_lowered`.

    Raises:
        InputError: as for :func:`load_lowered`.
        ProgramError: likewise.
    """
    stored = load_program(program, isolated=isolated)
    if graph is not None:
        stored.form = CallForm.of(load_graph(graph)[0])
    return stored


def load_lowered(
    program: str | os.PathLike[str],
    graph: str | os.PathLike[str],
    *,
    isolated: bool | None = None,
) -> tuple[GraphModule, LoweredProgram, tuple[Any, ...]]:
    """Read a program together with its graph, so that every op can be traced into the file.

    The graph is lowered once more; what that says about each op is paired with the bytes of the
    file, whatever they hold. The third is the example that the graph was saved with.

    Args:
        program: a ``.pte``.
        graph: what :func:`save_graph` wrote.
        isolated: run the program in a process of its own; ``None``: if nothing has a checksum of
            it, neither the file nor a report beside it.

    Raises:
        InputError: the graph is missing, damaged or not what it should be.
        ProgramError: the program cannot be read, or is damaged.
    """
    data, recorded = read_file(program)
    converted, example = load_graph(graph)
    # Here, since seconds later only the bytes are known, not their name.
    read_program(data, name=os.fspath(program))
    if isolated is None and recorded:
        isolated = False
    lowered = lower(converted, example, check=False).with_bytes(data, isolated=isolated)
    return converted, lowered, example
