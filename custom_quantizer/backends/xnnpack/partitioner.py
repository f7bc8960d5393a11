"""Converted graphs in ExecuTorch's own lowering call.

    edge = to_edge_transform_and_lower(
        torch.export.export(converted, example), partitioner=[cq.XnnpackPartitioner()]
    )

gives the program that :func:`~custom_quantizer.lower` gives. ExecuTorch asks a partitioner to
transform an ATen program before it decomposes it (``Partitioner.transform_for_pre_decomposition``,
since 1.5): that is where the rewrites of ``lower`` are applied.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from executorch.exir import EdgeProgramManager, ExecutorchProgramManager
from executorch.exir.backend.partitioner import PartitionResult
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.backend import BACKEND
from custom_quantizer.backends.xnnpack.border_constants import border_constants
from custom_quantizer.backends.xnnpack.checks import check_program
from custom_quantizer.backends.xnnpack.data_files import DataFile, DataPath, read_data_files
from custom_quantizer.backends.xnnpack.inline_constants import bring_inside
from custom_quantizer.backends.xnnpack.lowering import (
    Rewritten,
    describe_program,
    make_program,
    restore_exported_state,
    rewrite,
    rewrite_exported,
    to_bytes,
)
from custom_quantizer.backends.xnnpack.partition_configs import configurations
from custom_quantizer.backends.xnnpack.passes import FOR_OUR_PARTITIONER
from custom_quantizer.backends.xnnpack.quick_partitioner import QuickPartitioner
from custom_quantizer.backends.xnnpack.readback import read_file
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    detached_copy,
    is_dequantize,
    tensor_meta,
)
from custom_quantizer.core.names import restore_names
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import InputError
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX
from custom_quantizer.reference.inputs import check_example

__all__ = ["XnnpackPartitioner", "check", "export_converted", "io_constants"]

Program: TypeAlias = (
    "EdgeProgramManager | ExecutorchProgramManager | bytes | str | os.PathLike[str]"
)


class XnnpackPartitioner(QuickPartitioner):
    """ExecuTorch's ``XnnpackPartitioner`` for graphs that ``IntegerQuantizer`` converted.

    Takes the place of upstream's in ``to_edge_transform_and_lower``. A method without any quantized
    tensor is left as it is, with a warning, and partitioned as upstream does.

    Args:
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        upstream: nothing: its ``configs``, ``config_precisions`` and ``per_op_mode`` choose what
            the graph has decided.

    Raises:
        InputError: an argument is none of these.
    """

    def __init__(self, *, dynamic_max: int = DEFAULT_DYNAMIC_MAX, **upstream: object) -> None:
        if upstream:
            raise InputError(
                f"cq.XnnpackPartitioner takes no {' and no '.join(upstream)}: which ops are "
                "integers says the graph, and all that XNNPACK takes goes into the delegate; leave "
                "it out, and name what shall stay in float to the quantizer"
            )
        if isinstance(dynamic_max, bool) or not isinstance(dynamic_max, int) or dynamic_max < 1:
            raise InputError(f"dynamic_max is a size of at least 1, got {dynamic_max!r}")
        super().__init__(configs=configurations())
        self._dynamic_max = dynamic_max

    @tools()
    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Rewrite a converted graph, as ``lower`` does; ExecuTorch calls this.

        Raises:
            ConversionError: the graph was prepared and not converted.
            InputError: it was exported without example inputs.
            LoweringError: it could not be rewritten.
        """
        nodes = exported_program.graph.nodes
        if not any(is_dequantize(node) for node in nodes):
            warnings.warn(
                "XnnpackPartitioner was given a graph without a quantized tensor: it is lowered in "
                "float; to quantize it, export what convert_pt2e returns",
                stacklevel=2,
            )
            restore_exported_state(exported_program)
            return exported_program
        return rewrite_exported(exported_program, self._dynamic_max, tagged=True).exported

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Choose what XNNPACK computes; ExecuTorch calls this.

        Integer biases that are still there mean that nobody called
        :meth:`transform_for_pre_decomposition`: layers that add them cannot be in a delegate.
        """
        biases = sum(map(_is_integer_bias, exported_program.graph.nodes))
        if biases:
            warnings.warn(
                f"{biases} integer biases reached XnnpackPartitioner, and what adds them stays "
                "outside the delegate: to_backend() shows it a graph too late to rewrite it; call "
                "to_edge_transform_and_lower, or hand in what custom_quantizer.export_converted "
                "returns",
                stacklevel=2,
            )
        return super().partition(exported_program)


def _is_integer_bias(node: Node) -> bool:
    """Whether a node of an edge program dequantizes an int32 constant."""
    if getattr(node.target, "_op", None) not in (DEQUANTIZE_PER_TENSOR, DEQUANTIZE_PER_CHANNEL):
        return False
    (source, *_) = node.all_input_nodes
    meta = tensor_meta(source)
    return source.op == "placeholder" and meta is not None and meta.dtype is torch.int32


@tools()
def export_converted(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
) -> ExportedProgram:
    """Export a converted graph in the form that XNNPACK takes whole.

    For a lowering call of which nothing can be changed: upstream's own ``XnnpackPartitioner`` makes
    one delegate of the result, except where the graph multiplies activations by each other or has
    an ``elu``, which that one leaves in float or outside (:class:`XnnpackPartitioner` does not).

    Args:
        converted: what ``convert_pt2e`` returns; it is not changed.
        example_inputs: one set of inputs, as for the model.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the example does not fit the graph.
        LoweringError: it could not be rewritten or exported.
    """
    graph = read_converted(_with_names(converted), BACKEND)
    example = check_example(graph, example_inputs)
    rewritten = rewrite(
        graph, example, dynamic_max, widest=True, tagged=True, skip=FOR_OUR_PARTITIONER
    )
    return rewritten.exported


def _with_names(converted: Any) -> Any:
    """A graph with the names of ``convert_pt2e``, which exporting it again, or loading it, changed.

    ``XnnpackPartitioner`` restores them, too: by them ops are found in the program.
    """
    if not isinstance(converted, GraphModule):
        return converted  # whoever reads it says what is wrong
    named = detached_copy(converted, share_constants=True)
    restore_names(named)
    return named


def io_constants(converted: GraphModule, *, method: str = "forward") -> dict[str, int | float]:
    """What the integer inputs and outputs of a program stand for, for ``constant_methods``.

    ``to_edge_transform_and_lower(..., constant_methods=cq.io_constants(converted))`` adds methods
    that return these numbers, under the names that ExecuTorch's own pass for integer inputs gives
    them: ``forward_input0_scale``, ``_zp``, ``_quant_min``, ``_quant_max`` and ``_dtype``, and the
    same of outputs. :func:`~custom_quantizer.lower` and our recipes add them themselves.

    Args:
        converted: what ``convert_pt2e`` returned.
        method: which one of the program it becomes.

    Returns:
        The numbers by name; empty without an integer input or output.

    Raises:
        ConversionError: the graph is not a converted one.
    """
    return border_constants(read_converted(converted, BACKEND).borders, method)


@tools()
def check(
    program: Program,
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    method: str = "forward",
    data_path: DataPath | None = None,
) -> None:
    """Compare a program with the converted graph it was made from, as ``lower`` does.

    Every weight, bias, scale and clamp in the file is compared, op by op, and the outputs on the
    example. A finished program no longer says which of its ops stands for which of the graph's:
    the graph is lowered once more, and the file compared with what comes out.

    Args:
        program: what ``to_edge_transform_and_lower`` or ``to_executorch`` returned, a ``.pte`` file
            or its bytes.
        converted: what ``convert_pt2e`` returned.
        example_inputs: one set of inputs, as for the model.
        method: which one of the program.
        data_path: of the ``.ptd`` with the weights that a file keeps outside, or of several; what
            ``to_executorch`` returned knows its own.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the program or the example is not one, or there is no such method.
        LoweringError: the runtime does not take the program.
        ProgramError: the file is damaged.
        VerificationError: names the first op, or the output, that is not what the graph says.
    """
    converted = _with_names(converted)
    graph = read_converted(converted, BACKEND)
    example = check_example(graph, example_inputs)
    given = [id(v) for v in pytree.tree_leaves(example_inputs) if isinstance(v, torch.Tensor)]
    if len(set(given)) < len(given):
        raise InputError(
            "the example holds one tensor twice, which torch.export takes for one input: export "
            "with a tensor for each input, and check with these"
        )
    if isinstance(program, EdgeProgramManager):
        if method not in program.methods:
            names = ", ".join(sorted(program.methods))
            raise InputError(f"the program has no method {method!r}; it has {names}")
        # Writing leaves marks in the graph that fix dynamic sizes when it is written again.
        own = copy.deepcopy(program)
        bring_inside(own)
        data = to_bytes(own, graph, lowered_here=False)
        made = {method: Rewritten(graph, example, program.exported_program(method), {})}
        described = describe_program(data, program, made, method)
        check_program(described, graph, example, lowered_here=False)
        return
    if method != "forward":
        raise InputError(f"a finished program is checked by its method 'forward', not {method!r}")
    lowered = make_program(graph, example, validate=True)
    twin = lowered.with_bytes(_bytes(program), data_file=_data_file(program, data_path))
    twin.contents = replace(
        twin.contents, methods=(twin.contents.main.numbered_like(lowered.contents.main),)
    )
    check_program(twin, graph, example, lowered_here=False)


def _data_file(program: Program, data_path: DataPath | None) -> DataFile | None:
    """What a program keeps outside its ``.pte``."""
    if data_path is None and isinstance(program, ExecutorchProgramManager):
        with tempfile.TemporaryDirectory() as folder:
            program.write_tensor_data_to_file(folder)
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        return DataFile(files) if files else None
    return read_data_files(data_path)


def _bytes(program: Program) -> bytes:
    if isinstance(program, ExecutorchProgramManager):
        return bytes(program.buffer)
    if isinstance(program, bytes):
        return program
    if isinstance(program, (str, os.PathLike)):
        return read_file(program)[0]
    raise InputError(
        "expected what to_edge_transform_and_lower or to_executorch returns, a .pte file or its "
        f"bytes, got {type(program).__name__}"
    )
