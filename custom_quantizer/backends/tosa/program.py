"""A TOSA program: its bytes, what became of each op, and running it on Arm's reference model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from executorch.exir.lowered_backend_module import LoweredBackendModule, executorch_call_delegate
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.backends.tosa.tools import reference_model
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.files import write_bytes_atomic
from custom_quantizer.core.graph import check_inputs
from custom_quantizer.errors import InputError, LoweringError, ProgramError
from custom_quantizer.ops.backend import Kernel
from custom_quantizer.ops.placement import PlacedOp, Tally, tally
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.converted import ConvertedGraph

__all__ = ["TosaOp", "TosaProgram", "TosaReport"]


@dataclass(frozen=True, kw_only=True)
class TosaOp(PlacedOp):
    """What became of one op of the converted graph.

    Attributes:
        backend: where it runs.
    """

    backend: Kernel


@dataclass(frozen=True)
class TosaReport:
    """What became of each op.

    Attributes:
        ops: in graph order.
        programs: number of TOSA programs; one, unless ops outside come between.
        outside: calls outside of them, in order: roundings of inputs and outputs, and ops in float.
        size_bytes: of all TOSA programs.
        passes: rewrite -> number of places it changed.
    """

    ops: tuple[TosaOp, ...]
    programs: int
    outside: tuple[str, ...]
    size_bytes: int
    passes: dict[str, int]

    @property
    def tally(self) -> Tally:
        """How many of the ops that were written compute where."""
        return tally((op.written, op.placement) for op in self.ops)

    def __str__(self) -> str:
        roundings = sum("quantize" in call for call in self.outside)
        lines = [
            str(self.tally),
            f"{self.programs} TOSA program{'s' if self.programs != 1 else ''} "
            f"({self.size_bytes:,} bytes), {len(self.outside) - roundings} calls outside beside "
            f"{roundings} roundings of inputs and outputs",
        ]
        return "\n".join([*lines, *(f"  {op}" for op in self.ops)])


class TosaProgram:
    """One or more TOSA flatbuffers, and the calls between them.

    Inputs are rounded to integers before the first of them, outputs become float32 behind the last,
    by ExecuTorch's kernels on the CPU; :meth:`run` does that with PyTorch's.

    Attributes:
        report: what became of each op.
        passes: that rewrote the graph.
    """

    def __init__(
        self,
        module: GraphModule,
        report: TosaReport,
        graph: ConvertedGraph,
        out_spec: Any,
        metas: tuple[Tensor | None, ...],
        passes: Sequence[Callable[..., int]],
    ) -> None:
        self.report = report
        self.passes = passes
        self._module = module
        self._graph = graph
        self.form = CallForm.of(graph.model)
        self._out_spec = out_spec
        self._metas = metas

    @property
    def graph(self) -> ConvertedGraph:
        """The converted graph that it was made of."""
        return self._graph

    @property
    def buffers(self) -> tuple[bytes, ...]:
        """The bytes of each TOSA program, in execution order."""
        return tuple(bytes(module.processed_bytes) for module in delegates_of(self._module))

    @property
    def buffer(self) -> bytes:
        """The bytes of the TOSA program.

        Raises:
            LoweringError: there are several, because ops outside come between.
        """
        found = self.buffers
        if len(found) != 1:
            outside = ", ".join(dict.fromkeys(self.report.outside))
            raise LoweringError(
                f"the network became {len(found)} TOSA programs with calls between ({outside}); "
                "read .buffers, or keep the ops outside out of the model"
            )
        return found[0]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ``.tosa`` file; either all of it or nothing.

        Raises:
            InputError: the path cannot be written.
            LoweringError: there are several programs.
        """
        write_bytes_atomic(path, self.buffer)
        return Path(path)

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Run the program on the reference model; returns what the model returns.

        An input that ``set_io(integer=True)`` made integers takes these, or float32, which is
        quantized to them; such an output is returned as integers.

        Raises:
            InputError: number, dtype or shape of the inputs is wrong.
            ProgramError: the reference model refuses the program, or finds its result undefined.
        """
        flat = self.form.flat(inputs, named)
        if len(flat) != len(self._metas):
            raise InputError(f"the program takes {len(self._metas)} inputs, got {len(flat)}")
        flat = self._graph.borders.integers(flat, self._graph.backend.arithmetic.quantize)
        check_inputs(flat, self._metas)
        outputs = run_flat(self._module, flat)
        if self._out_spec is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return pytree.tree_unflatten(outputs, self._out_spec)

    __call__ = run

    def dequantized(self, outputs: Any) -> Any:
        """What it returned, with float32 values in the place of integers of a border."""
        return self._graph.borders.reals(outputs, self._graph.backend.arithmetic.dequantize)

    def reset(self) -> None:
        """Nothing: a TOSA program keeps nothing from one run to the next."""

    def differing(self, inputs: Iterable[Any]) -> tuple[int, int]:
        """Compare with the integer reference, bit for bit.

        Args:
            inputs: tuples of inputs, or single tensors.

        Returns:
            How many values differ, of how many.
        """
        reference = IntegerReference(self._graph)
        differ = total = 0
        for values in self.form.calls(inputs):
            wanted = pytree.tree_leaves(reference(*values))
            for made, given in zip(wanted, pytree.tree_leaves(self.run(*values)), strict=True):
                differ += unequal(made, given)
                total += made.numel()
        return differ, total


def unequal(a: Tensor, b: Tensor) -> int:
    """How many values differ; NaN equals NaN."""
    if a.shape != b.shape:
        return max(a.numel(), b.numel())
    same = (a == b) | ((a != a) & (b != b))
    return int((~same).sum())


def delegates_of(module: GraphModule) -> list[LoweredBackendModule]:
    """The delegates that a lowered graph calls, in order."""
    calls = [node for node in module.graph.nodes if node.target is executorch_call_delegate]
    return [getattr(module, str(call.args[0].target)) for call in calls]


def run_flat(module: GraphModule, inputs: list[Any]) -> list[Any]:
    """Run a lowered graph with its delegates on the reference model."""
    with torch.no_grad():
        return pytree.tree_leaves(_Runner(module).run(*inputs))


class _Runner(torch.fx.Interpreter):
    """Runs what is outside eagerly, and delegates on the reference model."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not executorch_call_delegate:
            return super().call_function(target, args, kwargs)
        delegate, *tensors = args
        return _run_delegate(delegate, tensors)


def _run_delegate(delegate: LoweredBackendModule, tensors: list[Tensor]) -> list[Tensor]:
    model = reference_model()
    feed = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in tensors]
    # What is left on stdout is a note that the tools know TOSA 1.1, too.
    outputs, status = model.run(
        bytes(delegate.processed_bytes),
        feed,
        verbosity="NONE",
        initialize_variable_tensor_from_numpy=True,
    )
    if status != model.GraphStatus.TOSA_VALID:
        raise ProgramError(
            f"the TOSA reference model does not take the program: {status}; a value may be out of "
            "the range for which an operator is defined"
        )
    return [torch.from_numpy(np.array(output)) for output in outputs]
