"""A lowered program: its bytes, what became of each op, and running it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from executorch.runtime import Runtime
from torch import Tensor

from custom_quantizer.backends.xnnpack import kernels
from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK
from custom_quantizer.backends.xnnpack.border_constants import borders_in
from custom_quantizer.backends.xnnpack.contents import (
    DelegateContents,
    DelegateNode,
    DelegateOp,
    MethodContents,
    ProgramContents,
    ValueInfo,
)
from custom_quantizer.backends.xnnpack.data_files import DataFile, DataPath, read_data_files
from custom_quantizer.backends.xnnpack.isolation import IsolatedMethod
from custom_quantizer.backends.xnnpack.op_record import RecordedOp
from custom_quantizer.backends.xnnpack.readback import read_file, read_program
from custom_quantizer.core.borders import Borders
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.files import write_bytes_atomic
from custom_quantizer.core.graph import check_inputs, shape_hint
from custom_quantizer.errors import InputError, ProgramError
from custom_quantizer.ops.backend import Kernel
from custom_quantizer.ops.placement import Tally, tally
from custom_quantizer.reference.converted import ConvertedGraph

__all__ = ["LoweredProgram", "LoweringReport", "OpBackend", "load_program"]

WRONG_KERNELS = frozenset({"aten::nonzero.out"})
"""Kernels of ExecuTorch (1.5.1) whose results are wrong.

``nonzero`` writes pairs of indices into memory that is planned column by column.
"""

INTEGER_BACKENDS = frozenset({kernels.INT8, kernels.PACKED_INT4, kernels.INT8_CONTAINER})
"""Backends whose results the integer reference gives exactly (unless inputs are dynamic)."""


@dataclass(frozen=True, kw_only=True)
class OpBackend(RecordedOp):
    """Where and how one op of the converted graph runs: what the program records, and more.

    Attributes:
        backend: where it runs.
        outside: ops that it calls outside delegates, such as ``aten::sort``.
    """

    backend: Kernel
    outside: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class LoweringReport:
    """What the backend did with each op.

    Attributes:
        ops: in graph order.
        delegates: number of delegate calls.
        outside: kernels called outside delegates, in execution order.
        size_bytes: of the program.
        passes: rewrite -> number of places it changed.
    """

    ops: tuple[OpBackend, ...]
    delegates: int
    outside: tuple[str, ...]
    size_bytes: int
    passes: Mapping[str, int]

    @property
    def fully_delegated(self) -> bool:
        """One delegate call and nothing outside it."""
        return self.delegates == 1 and not self.outside

    @property
    def tally(self) -> Tally:
        """How many of the ops that were written compute where."""
        return tally((op.written, op.placement) for op in self.ops)

    def not_integer(self) -> tuple[OpBackend, ...]:
        """Ops that do not run as plain integer kernels, each with its reason."""
        kept = INTEGER_BACKENDS | {kernels.FOLDED}
        return tuple(op for op in self.ops if op.backend not in kept)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(
            {
                "delegates": self.delegates,
                "outside": list(self.outside),
                "size_bytes": self.size_bytes,
                "passes": dict(self.passes),
                "ops": [
                    {
                        "node": op.node,
                        "path": op.path,
                        "family": op.family,
                        "written": op.written,
                        "backend": op.backend.label,
                        "placement": op.backend.placement.value,
                        "reason": op.reason,
                    }
                    for op in self.ops
                ],
            },
            indent=2,
        )

    def __str__(self) -> str:
        lines = [
            str(self.tally),
            f"{self.delegates} delegate call{'s' if self.delegates != 1 else ''}, "
            f"{len(self.outside)} kernels outside, {self.size_bytes:,} bytes",
        ]
        return "\n".join([*lines, *(f"  {op}" for op in self.ops)])


class LoweredProgram:
    """An ExecuTorch program and all that is known about it.

    Attributes:
        report: what became of each op.
        contents: the program, read back from its bytes.
        borders: which of its inputs and outputs are integers.
        form: its arguments, and how they nest these.
    """

    def __init__(
        self,
        data: bytes,
        report: LoweringReport,
        contents: ProgramContents,
        graph: ConvertedGraph,
        out_spec: Any,
        metas: tuple[Tensor | None, ...],
    ) -> None:
        self._data = data
        self.report = report
        self.contents = contents
        self._graph = graph
        self.form = CallForm.of(graph.model)
        self._out_spec = out_spec
        self._metas = metas
        self.borders = graph.borders
        self._method: Any = None
        self._isolated = False
        self._data_file: DataFile | None = None

    @property
    def graph(self) -> ConvertedGraph:
        """The converted graph that it was made of."""
        return self._graph

    @property
    def buffer(self) -> bytes:
        """The bytes of the ``.pte``."""
        return self._data

    @property
    def batch_size(self) -> int | None:
        """Size of the first dimension of the first input; ``None`` if it is dynamic."""
        meta = self._metas[0] if self._metas else None
        size = meta.shape[0] if meta is not None and meta.dim() else None
        return size if isinstance(size, int) else None

    def with_bytes(
        self, data: bytes, *, isolated: bool | None = None, data_file: DataFile | None = None
    ) -> LoweredProgram:
        """The same report and graph paired with the bytes of another file, to verify those.

        Args:
            data: of the file.
            isolated: as for :func:`load_program`.
            data_file: what that program keeps outside it.

        Raises:
            ProgramError: ``data`` is not a program, or is one of another graph.
        """
        twin = copy.copy(self)
        twin._data, twin._data_file, twin._method = data, data_file, None
        twin.contents = read_program(data, data_path=data_file)
        twin._isolated = not twin.contents.has_checksum if isolated is None else isolated
        if len(twin.contents.methods) > 1:
            method = twin.contents.method(self.contents.methods[0].name)
            twin.contents = replace(twin.contents, methods=(method,))
        twin._check_graph(self)
        return twin

    def _check_graph(self, own: LoweredProgram) -> None:
        """Raise ``ProgramError`` if the file was made of another graph than ``own`` was."""
        recorded = (self.contents.ops or {}).get(self.contents.methods[0].name, ())
        there, here = (
            tuple((op.node, op.path) for op in ops) for ops in (recorded, own.report.ops)
        )
        sizes = [
            (len(program.contents.inputs), len(program.contents.outputs)) for program in (self, own)
        ]
        if there and there != here:
            first = next((a for a, b in zip_longest(there, here) if a != b), None)
            what = "it lacks ops" if first is None else f"its op {first[0]} is not there"
        elif sizes[0] != sizes[1]:
            what = "it has {} inputs and {} outputs, not {} and {}".format(*sizes[0], *sizes[1])
        else:
            pairs = zip(self.contents.inputs, own.contents.inputs, strict=True)
            others = (f"it takes {a}, not {b}" for a, b in pairs if not _may_be_one(a, b))
            what = next(others, "")
        if not what:
            return
        raise ProgramError(
            f"the program was not made of this graph: {what}; name the graph that was written "
            "beside it (--graph)"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ``.pte``; either all of it or nothing.

        Raises:
            InputError: the path cannot be written.
        """
        write_bytes_atomic(path, self._data)
        return Path(path)

    def save_device_test(
        self,
        folder: str | os.PathLike[str],
        inputs: Iterable[Any],
        *,
        name: str = "program",
        every_op: bool = False,
        mode: str = "xnnpack",
    ) -> Path:
        """Write all that it takes to check this program on a device, in a new folder.

        The folder holds the program, the inputs and the outputs of the integer reference as raw
        files (contiguous, little-endian), the same as one ``.bpte`` for ExecuTorch's own runners,
        the C++ source of a runner, a manifest with the SHA-256 of every file, and a README that
        says how to build and run it. ``custom-quantizer verify OUT.pte --device-outputs FOLDER``
        reads back what the device computed.

        Args:
            folder: to make; it may exist if it is empty.
            inputs: one tuple of inputs, or an iterable of such tuples (or of single tensors). They
                are one stream: a program that writes buffers takes them in order.
            name: of the program's file.
            every_op: give the device a program that also returns every quantized tensor, so that
                the first op that differs there can be named.
            mode: of the integer reference: ``xnnpack-neon`` for an ARM CPU, where a product of two
                tensors is rounded up if it lies at the middle between two integers. The manifest
                and the README say which.

        Returns:
            The folder.

        Raises:
            InputError: the folder is not empty or cannot be written; there are no inputs, or they
                do not fit the program; or ``mode`` is no arithmetic of XNNPACK.
            ProgramError: the program does not run on this machine.
            VerificationError: it is wrong on this machine already.
        """
        from custom_quantizer.backends.xnnpack.device_test import write_device_test

        return write_device_test(
            self,
            self._graph,
            folder,
            inputs,
            name=name,
            every_op=every_op,
            mode=mode,
        )

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Run the program; returns what the model returns.

        Inputs may have any memory layout; the runtime is given contiguous ones. An input that is
        integers takes these, or float32, which is quantized to them; an output that is integers is
        returned as such (``borders`` says what they stand for).

        Raises:
            InputError: number, dtype or shape of the inputs is wrong.
            ProgramError: the runtime failed.
        """
        flat = self.form.flat(inputs, named)
        if len(flat) != len(self._metas):
            raise InputError(f"the program takes {len(self._metas)} inputs, got {len(flat)}")
        flat = self.borders.integers(flat, self._graph.backend.arithmetic.quantize)
        check_inputs(flat, self._metas)
        _check_shapes(flat, self.contents.main)
        if self._method is None:
            name = self.contents.methods[0].name
            self._method = _load_method(
                self._data, "the program", name, isolated=self._isolated, data_file=self._data_file
            )
        outputs = _execute(self._method, flat)
        if self._out_spec is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return pytree.tree_unflatten(outputs, self._out_spec)

    __call__ = run

    def dequantized(self, outputs: Any) -> Any:
        """What it returned, with float32 values in the place of integers of a border."""
        return self.borders.reals(outputs, XNNPACK.dequantize)

    def reset(self) -> None:
        """Load the program anew for the next run: buffers that it writes are as they were."""
        self._method = None

    def integer_biases(self) -> dict[str, np.ndarray[Any, np.dtype[np.int32]]]:
        """Biases as the file holds them: converted node name -> int32 ``(out_channels,)``.

        Ops above 8 bits are emulated in float, so the file has no integers for them; the report
        lists them.

        Raises:
            ProgramError: another op with an integer bias has none in the file.
        """
        biases = {}
        by_name = {op.node: op for op in self.report.ops}
        for op in self._graph.with_bias():
            if by_name[op.node.name].backend is kernels.EMULATED:
                continue
            found = find_weighted(self.contents, by_name[op.node.name])
            bias = None if found is None else found[0].bias(found[1])
            if bias is None:
                raise ProgramError(
                    f"{op.node.name}: the program holds no integer bias for it; "
                    f"{by_name[op.node.name].reason or 'see the lowering report'}"
                )
            biases[op.node.name] = bias
        return biases


def find_weighted(contents: ProgramContents, op: OpBackend) -> DelegateNode | None:
    """The delegate's node with a weight that stands for ``op``, if there is one.

    The last one: what comes before it with a weight only takes pixels.
    """
    weighted = [found for found in contents.nodes_of(op.handles) if found[1].weight is not None]
    return weighted[-1] if weighted else None


def computes_in_integers(delegate: DelegateContents, op: DelegateOp) -> bool:
    """Whether a delegate's node reads and writes integers only."""
    tensors = [delegate.tensors[i] for i in (*op.inputs, *op.outputs)]
    return all(tensor.dtype in ("int8", "uint8") for tensor in tensors)


def quantizes_at_run_time(delegate: DelegateContents, op: DelegateOp) -> bool:
    """Whether a delegate's node takes activations whose scale is chosen while it runs."""
    return any(delegate.tensors[i].quantization == "per_token_dynamic" for i in op.inputs)


def fitting_inputs(method: MethodContents, borders: Borders, inputs: Sequence[Any]) -> list[Any]:
    """A flat list of inputs for a method, with integers where it takes these.

    Raises:
        InputError: number, dtype or shape of the inputs is wrong.
    """
    infos = method.inputs
    if len(inputs) != len(infos):
        raise InputError(f"the program takes {len(infos)} inputs, got {len(inputs)}")
    given = borders.integers(inputs, XNNPACK.quantize)
    for i, (value, info) in enumerate(zip(given, infos, strict=True)):
        dtype = getattr(value, "dtype", None)
        if isinstance(value, Tensor) and str(dtype) != f"torch.{info.dtype}":
            raise InputError(f"input {i} must be {info.dtype}, got {dtype}")
    _check_shapes(given, method)
    return given


def _check_shapes(inputs: list[Any], method: MethodContents) -> None:
    """Raise ``InputError`` for a shape the runtime would refuse, with a number only."""
    for i, (value, info) in enumerate(zip(inputs, method.inputs, strict=True)):
        if not isinstance(value, Tensor):
            continue
        given, most = tuple(value.shape), info.shape
        fits = len(given) == len(most) and all(
            size <= limit if info.dynamic else size == limit
            for size, limit in zip(given, most, strict=True)
        )
        if not fits:
            at_most = " at most" if info.dynamic else ""
            hint = "" if info.dynamic else shape_hint(most, given)
            raise InputError(f"input {i} must have shape{at_most} {most}, got {given}{hint}")


def missing_kernels(contents: ProgramContents) -> list[str]:
    """Kernels that a program calls outside delegates, and this process's runtime does not have.

    A wrong one counts as none.
    """
    known = Runtime.get().operator_registry.operator_names - WRONG_KERNELS
    return [kernel for kernel in dict.fromkeys(contents.kernels) if kernel not in known]


WAYS = (
    "lower what convert_pt2e returned with cq.lower or with cq.XnnpackPartitioner(), or hand "
    "ExecuTorch's own partitioner what cq.export_converted returns (docs/flows.md)"
)
"""What to say of a program that another hand lowered: the ways on which no integer gets lost."""


def no_kernel(ops: Sequence[str], kernels: Sequence[str]) -> str:
    """What to say of ops that need kernels which the runtime does not have."""
    return (
        f"{', '.join(dict.fromkeys(ops)) or 'the model'}: neither XNNPACK nor ExecuTorch's runtime "
        f"has a kernel for it ({', '.join(kernels)}); write it with other ops, or let the model "
        "end before it; for a runtime that has the kernel, call lower with check=False"
    )


def _may_be_one(a: ValueInfo, b: ValueInfo) -> bool:
    """Whether two inputs differ in nothing but dynamic sizes, whose bounds a caller chooses."""
    if (a.dtype, len(a.shape)) != (b.dtype, len(b.shape)):
        return False
    return a.dynamic or b.dynamic or a.shape == b.shape


def _load_method(
    data: bytes,
    what: str,
    method: str = "forward",
    *,
    isolated: bool,
    data_file: DataFile | None = None,
) -> Any:
    if isolated:
        return IsolatedMethod(data, what, method, data_file=data_file)
    path = None if data_file is None else data_file.path
    try:
        return Runtime.get().load_program(data, data_path=path).load_method(method)
    except Exception as error:
        raise ProgramError(
            f"{what} does not load in the ExecuTorch runtime ({error}): the delegate refused one "
            "of its ops, or the runtime lacks a kernel; its log on stderr says which"
        ) from error


def _execute(method: Any, flat: list[Any]) -> list[Tensor]:
    feed = [
        value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for value in flat
    ]
    try:
        outputs = method.execute(feed)
    except ProgramError:
        raise
    except Exception as error:
        raise ProgramError(f"the runtime failed to run the program: {error}") from error
    # Outputs live in the program's own memory, which the next call overwrites.
    return [value.clone() if isinstance(value, Tensor) else value for value in outputs]


class StoredProgram:
    """A ``.pte`` from a file: what it holds, and running it.

    Attributes:
        contents: the program, read back.
        borders: which of its inputs and outputs are integers, and what these stand for.
        isolated: whether it runs in a process of its own.
        form: its arguments, where somebody knows its graph: the file has no names of inputs.
    """

    def __init__(
        self,
        data: bytes,
        what: str,
        isolated: bool | None = None,
        data_file: DataFile | None = None,
    ) -> None:
        self.form: CallForm | None = None
        self.contents = read_program(data, name=what, data_path=data_file)
        self.borders = borders_in(self.contents.main, self.contents.constants)
        self.isolated = not self.contents.has_checksum if isolated is None else isolated
        self._data_file = data_file  # which may be removed with the last who needs it
        self._method = _load_method(data, what, isolated=self.isolated, data_file=data_file)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program on a flat list of inputs; returns the flat list of outputs.

        An input that is integers takes these, or float32, which is quantized to them; an output
        that is integers is returned as such (``borders`` says what they stand for).

        Raises:
            InputError: number, dtype or shape of the inputs is wrong.
            ProgramError: the runtime failed.
        """
        given = fitting_inputs(self.contents.main, self.borders, inputs)
        return tuple(_execute(self._method, given))

    def dequantized(self, outputs: Any) -> Any:
        """What it returned, with float32 values in the place of integers of a border."""
        return self.borders.reals(outputs, XNNPACK.dequantize)


def load_program(
    path: str | os.PathLike[str],
    *,
    isolated: bool | None = None,
    data_path: DataPath | None = None,
) -> StoredProgram:
    """Load a ``.pte`` file.

    Args:
        path: of the file.
        isolated: run it in a child process with limits of memory and time, so that a damaged
            program cannot take this one down. ``None``: if it carries no checksum and none is in
            the report beside it.
        data_path: of the ``.ptd`` with the weights that it keeps outside, or of several.

    Raises:
        InputError: ``data_path`` is something else than paths.
        ProgramError: a file cannot be read or loaded, is damaged, or took its process down.
    """
    data, recorded = read_file(path)
    if isolated is None and recorded:
        isolated = False
    return StoredProgram(data, os.fspath(path), isolated, read_data_files(data_path))
