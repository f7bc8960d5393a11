"""Writing a device test: a program, inputs, and what a device has to compute from them.

See :mod:`custom_quantizer.reference.device_manifest` for the folder, and
:mod:`custom_quantizer.analysis.device_outputs` for reading back what a device computed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch
import torch.utils._pytree as pytree
from executorch.devtools import BundledProgram
from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
from executorch.devtools.bundled_program.serialize import (
    serialize_from_bundled_program_to_flatbuffer,
)
from torch import Tensor

from custom_quantizer.backends.xnnpack.backend import BACKEND
from custom_quantizer.backends.xnnpack.checked_lowering import lower
from custom_quantizer.backends.xnnpack.checks import here, inexact_ops, is_exact
from custom_quantizer.backends.xnnpack.program import LoweredProgram
from custom_quantizer.core.file_hashes import sha256_of
from custom_quantizer.core.files import json_bytes, new_directory, write_files_atomic
from custom_quantizer.core.graph import module_path
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import InputError, VerificationError, first_line
from custom_quantizer.ops.backend import Backend, get_mode
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.device_manifest import (
    MANIFEST,
    DeviceManifest,
    FileEntry,
    NumericOutput,
    Sample,
    TensorEntry,
    tensor_bytes,
)
from custom_quantizer.reference.verifying import instrumented, output_scales

__all__ = ["bundled", "write_device_test"]

_RUNNER = resources.files(__package__) / "runner"

_Files = dict[str, bytes]
"""Path below the folder, with slashes -> content."""


def write_device_test(
    lowered: LoweredProgram,
    graph: ConvertedGraph,
    folder: str | os.PathLike[str],
    inputs: Iterable[Any],
    *,
    name: str,
    every_op: bool,
    mode: str,
) -> Path:
    """:meth:`LoweredProgram.save_device_test`, which says what is written.

    Args:
        lowered: the program.
        graph: what it was made from.
        folder: to make.
        inputs: as for :func:`custom_quantizer.verify`.
        name: of the program's file.
        every_op: make every quantized tensor an output.
        mode: of the reference.
    """
    backend = _backend(mode)
    _check_folder(folder)
    if not _is_file_name(f"{name}.pte"):
        raise InputError(
            f"name={name!r} is no name of a file: use letters, digits, '.', '_' and '-'"
        )
    batches = lowered.form.calls(inputs)
    if not batches:
        raise InputError("there are no inputs to test on; pass at least one tuple of inputs")
    with exclusive(), torch.no_grad():
        quantize = graph.backend.arithmetic.quantize
        feeds = [graph.borders.integers(batch, quantize) for batch in batches]
        expected = _expected(lowered, graph, batches, backend)
        program, outputs = lowered, [NumericOutput(scale=s) for s in output_scales(graph.model)]
        if every_op:
            program, outputs, expected = _with_every_op(graph, feeds, backend)
    files: _Files = {f"{name}.pte": program.buffer}
    samples = tuple(
        Sample(
            inputs=_add_tensors(files, "inputs", n, feed),
            outputs=_add_tensors(files, "expected", n, wanted),
        )
        for n, (feed, wanted) in enumerate(zip(feeds, expected, strict=True))
    )
    shapes = "".join(f"{_shapes(sample.inputs)}\n" for sample in samples)
    files["inputs/shapes.txt"] = shapes.encode()
    method = program.contents.methods[0].name
    bundle, why_not = bundled(program.buffer, method, feeds, expected)
    if bundle is not None:
        files[f"{name}.bpte"] = bundle
    exact = is_exact(lowered, graph, everywhere=True)
    manifest = DeviceManifest(
        program=_entry(files, f"{name}.pte"),
        method=method,
        verified_program=sha256_of(lowered.buffer),
        mode=mode,
        bundled=None if bundle is None else _entry(files, f"{name}.bpte"),
        exact=exact,
        inexact=inexact_ops(lowered, graph, everywhere=True),
        outputs=tuple(outputs),
        samples=samples,
    )
    files[MANIFEST] = json_bytes(manifest.model_dump(mode="json"))
    files["runner.cpp"] = (_RUNNER / "runner.cpp").read_bytes()
    files["README.md"] = _readme(manifest, name, why_not).encode()
    return _write(Path(folder), files)


def _readme(manifest: DeviceManifest, name: str, why_not: str) -> str:
    """The README.

    Args:
        manifest: of the test.
        name: of the program's file.
        why_not: why there is no bundled program, if there is none.
    """
    exact = "Every output has to be equal, bit for bit."
    if not manifest.exact:
        ops = "\n".join(f"- {op}" for op in manifest.inexact)
        exact = f"Some ops run in float, so outputs may differ in their last unit:\n\n{ops}"
    bundle = (
        f"`{name}.bpte` is the program with these inputs and outputs, for ExecuTorch's runners: "
        f"`example_runner --bundled_program_path={name}.bpte --output_verification`."
    )
    if manifest.bundled is None:
        bundle = f"There is no `{name}.bpte` for ExecuTorch's own runners: {why_not}."
    text = Template((_RUNNER / "README.md").read_text(encoding="utf-8"))
    return text.substitute(
        name=name,
        method=manifest.method,
        samples=len(manifest.samples),
        executorch=version("executorch").partition("+")[0],  # as the package index names it
        exact=exact,
        mode=manifest.mode,
        bundled=bundle,
    )


def _is_file_name(text: str) -> bool:
    try:
        FileEntry(file=text, sha256="0" * 64)
    except ValueError:
        return False
    return True


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ``InputError`` unless ``folder`` is free: old outputs would look like new ones."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InputError(
            f"{os.fspath(folder)} exists and is not an empty directory; outputs of an earlier test "
            "in it would be taken for those of this one; name a new directory"
        )


def _backend(mode: str) -> Backend:
    """XNNPACK with the arithmetic of a mode.

    Raises:
        InputError: that is another backend's, or no mode.
    """
    names = [arithmetic.name for arithmetic in (BACKEND.arithmetic, *BACKEND.others)]
    if mode not in names:
        raise InputError(f"mode={mode!r}: an XNNPACK program computes {' or '.join(names)}")
    return get_mode(mode)


def _expected(
    lowered: LoweredProgram,
    graph: ConvertedGraph,
    batches: Sequence[list[Any]],
    backend: Backend,
) -> list[list[Any]]:
    """What the integer reference returns, once the runtime of this machine agreed to it.

    Raises:
        VerificationError: it does not, although every op runs on integers.
    """
    reference = IntegerReference(here(graph))
    there = IntegerReference(read_converted(graph.model, backend))
    exact = is_exact(lowered, graph)
    expected = []
    lowered.reset()
    for n, batch in enumerate(batches):
        got = pytree.tree_leaves(lowered.run(*batch))
        want = pytree.tree_leaves(reference(*batch))
        for i, (mine, theirs) in enumerate(zip(want, got, strict=True)):
            if exact and isinstance(mine, Tensor) and not torch.equal(mine, theirs):
                raise VerificationError(
                    f"output {i} of sample {n} differs from the integer reference on this machine "
                    "already; custom_quantizer.verify names the op"
                )
        expected.append(pytree.tree_leaves(there(*batch)))
    lowered.reset()
    return expected


def _with_every_op(
    graph: ConvertedGraph, feeds: Sequence[list[Any]], backend: Backend
) -> tuple[LoweredProgram, list[NumericOutput], list[list[Any]]]:
    """The graph lowered with every quantized tensor as an output, in graph order."""
    tapped, taps = instrumented(graph.model)
    if not taps:
        raise InputError("the model has no quantized tensor, so every_op=True has none to return")
    nodes = {node.name: node for node in graph.model.graph.nodes}
    outputs = [
        NumericOutput(
            node=name, path=module_path(nodes[name]) if name in nodes else "", scale=scale
        )
        for name, scale in taps
    ]
    program = lower(tapped, tuple(feeds[0]), check=False)
    reference = IntegerReference(read_converted(tapped, backend))
    return program, outputs, [pytree.tree_leaves(reference(*feed)) for feed in feeds]


def _add_tensors(
    files: _Files, folder: str, n: int, values: Sequence[Any]
) -> tuple[TensorEntry, ...]:
    entries = []
    for i, value in enumerate(values):
        data, dtype, shape = tensor_bytes(value)
        name = f"{n}_{i}.bin"
        files[f"{folder}/{name}"] = data
        entries.append(TensorEntry(file=name, sha256=sha256_of(data), dtype=dtype, shape=shape))
    return tuple(entries)


def _shapes(entries: Sequence[TensorEntry]) -> str:
    """A line of ``shapes.txt``, as the runner reads it: ``[1,3,8,8] [2]``."""
    return " ".join(f"[{','.join(map(str, entry.shape))}]" for entry in entries)


def _entry(files: _Files, name: str) -> FileEntry:
    return FileEntry(file=name, sha256=sha256_of(files[name]))


def bundled(
    program: bytes, method: str, feeds: Sequence[list[Any]], expected: Sequence[list[Any]]
) -> tuple[bytes | None, str]:
    """The program as an ExecuTorch BundledProgram, or why there is none."""
    if any(value is None for values in (*feeds, *expected) for value in values):
        return None, "a bundled program holds tensors and numbers, and one of these is None"
    cases = [
        MethodTestCase([_contiguous(v) for v in feed], [_contiguous(v) for v in wanted])
        for feed, wanted in zip(feeds, expected, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.pte")
        Path(path).write_bytes(program)
        try:
            bundle = BundledProgram(None, [MethodTestSuite(method, cases)], pte_file_path=path)
            return bytes(serialize_from_bundled_program_to_flatbuffer(bundle)), ""
        except Exception as error:  # an assertion of upstream's: numbers, dtypes
            return None, first_line(error)


def _contiguous(value: Any) -> Any:
    """Upstream writes the whole storage of a tensor, in its order."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def _write(folder: Path, files: _Files) -> Path:
    """Write all files or none, and leave no new folder behind in that case."""
    with ExitStack() as stack:
        for name in ("", "inputs", "expected"):
            stack.enter_context(new_directory(folder / name))
        write_files_atomic({folder / name: data for name, data in files.items()})
    return folder
