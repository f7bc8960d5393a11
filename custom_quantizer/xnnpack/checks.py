"""Does a program hold the graph's integers, and does it compute what they say?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from custom_quantizer.converted import ConvertedGraph
from custom_quantizer.errors import VerificationError
from custom_quantizer.graph import describe
from custom_quantizer.integer import integer_reference
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.xnnpack.program import LoweredProgram, find_weighted

__all__ = ["check_constants", "check_outputs", "check_program"]


def check_program(program: LoweredProgram, graph: ConvertedGraph, example: tuple[Any, ...]) -> None:
    """Check constants, then outputs on the example.

    Raises:
        VerificationError: something in the program is not what the graph says.
    """
    check_constants(program, graph)
    check_outputs(program, graph, example)


def check_constants(program: LoweredProgram, graph: ConvertedGraph) -> None:
    """Compare every integer weight and bias in the file with the graph's.

    Raises:
        VerificationError: names the op, the channel and both integers.
    """
    rows = {row.node: row for row in program.report.ops}
    for op in graph.integer:
        if op.weight is None:
            continue
        found = find_weighted(program.contents, rows[op.node.name])
        if found is None:
            raise VerificationError(
                f"{describe(op.node)}: no node of the program stands for it "
                f"({rows[op.node.name].backend.value}); leave it in float with "
                f"set_node_name({op.node.name!r}, None)"
            )
        delegate, node = found
        tensor = delegate.tensors[node.weight] if node.weight is not None else None
        if tensor is None or tensor.dtype not in ("int8", "int4"):
            continue  # a float fallback, reported as such
        stored = delegate.weight(node)
        _compare(op, "weight", op.weight.numpy().reshape(stored.shape), stored)
        bias = delegate.bias(node)
        if op.bias is not None:
            if bias is None:
                raise VerificationError(f"{describe(op.node)}: the program dropped its bias")
            _compare(op, "bias", op.bias.numpy(), bias)
        elif bias is not None and bool(np.any(bias)):
            raise VerificationError(f"{describe(op.node)}: the program added a bias to it")


def _compare(
    op: QuantizedOp, what: str, graph: np.ndarray[Any, Any], program: np.ndarray[Any, Any]
) -> None:
    if graph.shape != program.shape:
        raise VerificationError(
            f"{describe(op.node)}: its {what} has shape {graph.shape} in the graph and "
            f"{program.shape} in the program"
        )
    wrong = np.argwhere(graph != program)
    if len(wrong):
        where = tuple(int(i) for i in wrong[0])
        raise VerificationError(
            f"{describe(op.node)}: {len(wrong)} of {graph.size} integers of its {what} differ; at "
            f"{where} the graph has {graph[where]}, the program {program[where]}"
        )


def check_outputs(program: LoweredProgram, graph: ConvertedGraph, example: tuple[Any, ...]) -> None:
    """Run the program and the integer reference on the example and compare the outputs.

    Where every op is integer the outputs are equal. Otherwise float kernels of the backend and of
    PyTorch differ in their last bits, which quantize steps turn into whole units now and then;
    then the error must be small next to the output.

    Raises:
        VerificationError: they are not.
    """
    reference = pytree.tree_leaves(integer_reference(graph.model)(*example))
    outputs = pytree.tree_leaves(program.run(*example))
    if len(reference) != len(outputs):
        raise VerificationError(
            f"the program returns {len(outputs)} tensors, the model {len(reference)}"
        )
    exact = not graph.floating and not program.report.not_integer()
    for i, (want, got) in enumerate(zip(reference, outputs, strict=True)):
        if not isinstance(want, Tensor):
            continue
        if want.shape != got.shape:
            raise VerificationError(
                f"output {i} has shape {tuple(got.shape)}, the model returns {tuple(want.shape)}"
            )
        wrong = int((want != got).sum())
        if wrong and (exact or relative_error(want, got) > FLOAT_TOLERANCE):
            worst = float((want - got).abs().max())
            raise VerificationError(
                f"output {i}: {wrong} of {want.numel()} values differ from the integer reference, "
                f"by up to {worst:.6g}. The lowering is wrong; please report the model"
            )


FLOAT_TOLERANCE = 0.1
"""Largest relative error of outputs when float ops take part; a broken program is near 1."""


def relative_error(want: Tensor, got: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square of ``want``."""
    reference = want.to(torch.float64)
    noise = (got.to(torch.float64) - reference).square().mean().sqrt()
    signal = reference.square().mean().sqrt()
    return float(noise / signal) if signal > 0 else float(noise)
