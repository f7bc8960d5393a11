"""Converted graph in, checked ExecuTorch program out."""

from __future__ import annotations

import gc
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
)
from executorch.exir.debug_handle_utils import get_greatest_ancestor_node_identifier
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e import FROM_NODE_KEY

from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.backends.xnnpack.border_constants import border_constants
from custom_quantizer.backends.xnnpack.checksum import seal
from custom_quantizer.backends.xnnpack.edge import to_edge
from custom_quantizer.backends.xnnpack.inline_constants import ALIGNMENT, inline_constants
from custom_quantizer.backends.xnnpack.op_record import encode
from custom_quantizer.backends.xnnpack.partition import partitioner
from custom_quantizer.backends.xnnpack.passes import (
    FOR_UPSTREAMS_PARTITIONER,
    origin_of,
    run_passes,
)
from custom_quantizer.backends.xnnpack.program import (
    WAYS,
    LoweredProgram,
    LoweringReport,
    OpBackend,
    computes_in_integers,
    no_kernel,
    quantizes_at_run_time,
)
from custom_quantizer.backends.xnnpack.quick_passes import outputs_known
from custom_quantizer.backends.xnnpack.readback import MethodContents, read_program
from custom_quantizer.core.graph import (
    STATE_KEY,
    describe,
    detached_copy,
    module_path,
    set_state,
    state_buffers,
    state_of,
    tensor_meta,
)
from custom_quantizer.core.lazy_code import lazy_code
from custom_quantizer.core.names import restore_names
from custom_quantizer.core.rewriting import original_name
from custom_quantizer.core.threads import exclusive, interruption_point, tools
from custom_quantizer.errors import InputError, LoweringError, first_line
from custom_quantizer.ops import QuantizedOp, match_of, rule_of
from custom_quantizer.ops.backend import Backend, Kernel
from custom_quantizer.ops.rewrites.constants import draws_numbers, training_switches
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX, export_again
from custom_quantizer.reference.inputs import check_example, placeholder_metas, specs_of
from custom_quantizer.reference.untraced import export_untraced

__all__ = ["lower"]

logger = logging.getLogger(__name__)


@tools()
def lower(
    converted: GraphModule,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram:
    """Lower a converted graph to an ExecuTorch program that runs on XNNPACK.

    The graph is rewritten so that the delegate keeps every op it can, partitioned and written.
    Then the program is read back and run: weights and biases in the file must be the graph's,
    integer for integer, and the outputs on the example must be those of the integer reference.

    Args:
        converted: what ``convert_pt2e`` returns; it is not changed.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        check: run the checks. Without them a wrong program would go unnoticed, so ExecuTorch then
            validates the graph after each of its passes, which the checks make needless.
        progress: called with the name of each stage.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: the example does not fit the graph.
        LoweringError: the backend refused the graph.
        VerificationError: the program is not what the graph says.
    """
    return lower_graph(
        read_converted(converted, BACKEND),
        example_inputs,
        dynamic_max=dynamic_max,
        check=check,
        progress=progress,
    )


@tools()
def lower_graph(
    graph: ConvertedGraph,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
    check: bool = True,
    validate: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram:
    """:func:`lower`, for whom the graph was read already.

    ``validate`` is for those who check a program themselves: see :func:`_to_edge`. By default a
    program is validated that is not checked.
    """

    def say(stage: str) -> None:
        interruption_point()
        if progress is not None:
            progress(stage)

    if check:
        _check_repeats(graph.model)
    _warn_of_state(graph.model)
    example = check_example(graph, example_inputs)
    with lazy_code():
        rewritten = rewrite(graph, example, dynamic_max, say)
        say("partitioning for XNNPACK")
        constants = border_constants(graph.borders, "forward")
        validate = not check if validate is None else validate
        edge = _to_edge(rewritten.exported, constants, validate=validate)
        _collect(graph)
        say("writing the program")
        data = to_bytes(edge, graph)
        program = describe_program(data, edge, {"forward": rewritten})
        del edge, rewritten, data
    _collect(graph)
    if check:
        from custom_quantizer.backends.xnnpack.checks import check_program

        say("checking the program")
        check_program(program, graph, example)
    return program


def _check_repeats(converted: GraphModule) -> None:
    """Refuse a graph of which two runs differ: there is nothing to compare a program with."""
    graphs = [module for module in converted.modules() if isinstance(module, GraphModule)]
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if draws_numbers(node):
            if training_switches(node):
                raise LoweringError(
                    f"{describe(node)} is in training mode ({node.target}), so that no two runs "
                    "agree; capture model.eval(), and leave the graph in evaluation"
                )
            raise LoweringError(
                f"{describe(node)} draws random numbers ({node.target}), so that no output can be "
                "compared with the integer reference; make the numbers an input of the model"
            )


def _collect(graph: ConvertedGraph) -> None:
    """Free what a stage leaves in cycles, which Python would do when it has made more objects.

    Graphs refer to their nodes, which refer to them, so what was exported, partitioned and written
    stays until then, with copies of the weights. It takes a tenth of a second or more, for which
    small networks do not wait.
    """
    values = (*graph.model.parameters(), *graph.model.buffers())
    if sum(value.numel() * value.element_size() for value in values) >= _LARGE:
        gc.collect()


_LARGE = 16 << 20
"""Bytes of constants from which on they are not left to Python's collector."""


def _warn_of_state(converted: GraphModule) -> None:
    """Say so, if buffers hold what a loop over calibration data left in them."""
    held = converted.meta.get(STATE_KEY, {})
    now = state_buffers(converted)
    moved = [name for name, value in held.items() if not torch.equal(now.get(name, value), value)]
    if moved:
        logger.warning(
            "the program starts with what calibration or convert_pt2e left in %s, not with what "
            "the model held when it was captured; for that call "
            "custom_quantizer.calibration.run.restore_state(converted) before lowering",
            ", ".join(moved),
        )


@dataclass(frozen=True)
class Rewritten:
    """A converted graph on its way to the partitioner.

    Attributes:
        graph: the converted graph.
        example: inputs of the model.
        exported: what the partitioner gets.
        applied: pass -> number of places it changed.
    """

    graph: ConvertedGraph
    example: tuple[Any, ...]
    exported: torch.export.ExportedProgram
    applied: Mapping[str, int]


def rewrite(
    graph: ConvertedGraph,
    example: tuple[Any, ...],
    dynamic_max: int,
    say: Callable[[str], None] = lambda _stage: None,
    *,
    widest: bool = False,
    skip: frozenset[str] = FOR_UPSTREAMS_PARTITIONER,
) -> Rewritten:
    """Apply all passes to a copy of a converted graph and export that.

    Args:
        graph: the converted graph.
        example: inputs of the model.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        say: called with the name of each stage.
        widest: trace dynamic sizes at their upper bounds, for a caller that cannot keep upstream
            from making limits of the example's sizes (see :func:`_no_size_guards`): a limit that
            holds at the upper bound is a lower one, which no runtime looks at.
        skip: names of passes to leave out: those that are for another partitioner.

    Raises:
        LoweringError: a pass failed, or ``torch.export`` refused the result.
    """
    say("rewriting the graph")
    _check_writable(graph.model)
    written = _versions(graph.model)
    model = detached_copy(graph.model, share_constants=True)
    _tell_apart(model, (op.node.name for op in graph))
    applied = run_passes(model, graph, skip=skip)
    for node in model.graph.nodes:
        if node.op == "call_function":
            # Of a node without any meta export keeps no trace, and ExecuTorch asks for one.
            node.meta.setdefault("nn_module_stack", {})
    say("exporting")
    exported = export_untraced(model, example)
    if exported is None:
        exported = export_again(model, example, dynamic_max, widest=widest)
    for name, version in _versions(graph.model).items():
        if version != written[name]:
            # Else the program would be compared with a graph that was changed alike.
            raise LoweringError(
                f"constant {name} of the converted graph was written into while it was lowered; "
                "convert the model again, and please report it"
            )
    for node in state_of(exported.graph):
        if node.name in exported.graph_signature.inputs_to_buffers:
            # Without this ExecuTorch does not write what a buffer that changes holds at first.
            node.meta["et_init_buffer"] = True
    return Rewritten(graph, example, exported, applied)


def _tell_apart(model: GraphModule, ops: Iterable[str]) -> None:
    """Let ops that were captured as one call have debug handles of their own.

    ExecuTorch gives all that goes back to one node of an earlier graph one handle, by which ops are
    found in the program. ``torch.export.export(..., strict=True)`` has one node for the whole of an
    attention, ``run_decompositions`` for an LSTM.

    Args:
        model: copy of a converted graph, in place.
        ops: names of their nodes.
    """
    known = frozenset(ops)
    nodes = [n for n in model.graph.nodes if n.op == "call_function" and n.meta.get(FROM_NODE_KEY)]
    origins = {node: get_greatest_ancestor_node_identifier(node) for node in nodes}
    count = Counter(origin for node, origin in origins.items() if node.name in known)
    for node, origin in origins.items():
        if count[origin] > 1:
            del node.meta[FROM_NODE_KEY]


def _versions(model: torch.nn.Module) -> dict[str, int]:
    """How often each constant was written in place; inference tensors do not count that."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value._version for name, value in named if not value.is_inference()}


def rewrite_exported(exported: torch.export.ExportedProgram, dynamic_max: int) -> Rewritten:
    """Rewrite a converted graph that ``torch.export`` was given, in somebody else's lowering call.

    Calls get the names back that they had in the converted graph, buffers what they held when the
    model was captured, and the program takes contiguous inputs, as that of ``lower`` does, whatever
    the layout of the example.

    Args:
        exported: the converted graph.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.

    Raises:
        ConversionError: the graph is not a converted one.
        InputError: it was exported without example inputs.
        LoweringError: it could not be rewritten.
    """
    if exported.example_inputs is None:
        raise InputError(
            "the exported program has no example inputs; export it with "
            "torch.export.export(converted, example_inputs)"
        )
    model = exported.module()
    restore_names(model)
    if (held := model.meta.get(STATE_KEY)) is not None:
        # ExecuTorch calibrates and converts in loops of its own. The buffers are those of the
        # converted graph, too.
        set_state(model, held)
    args, kwargs = exported.example_inputs
    graph = read_converted(model, BACKEND)
    example = check_example(graph, (*args, *kwargs.values()))
    return rewrite(graph, example, dynamic_max, widest=True)


def _check_writable(model: GraphModule) -> None:
    """Raise ``LoweringError`` for what no program can hold.

    Raises:
        LoweringError: complex numbers, or an output that is neither tensor nor number.
    """
    for node in model.graph.nodes:
        meta = tensor_meta(node)
        if node.op == "call_function" and meta is not None and meta.is_complex() and node.users:
            raise LoweringError(
                f"{describe(node)} is {meta.dtype}, and ExecuTorch's programs hold no complex "
                "numbers; compute with real and imaginary parts as two tensors"
            )
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    for i, value in enumerate(pytree.tree_leaves(output.args[0])):
        if not isinstance(value, (Node, int, float, type(None))):
            raise LoweringError(
                f"output {i} is {value!r}; a program returns tensors and numbers; return it from a "
                "wrapper around the program instead"
            )


def describe_program(
    data: bytes,
    edge: EdgeProgramManager,
    methods: Mapping[str, Rewritten],
    method: str = "forward",
) -> LoweredProgram:
    """Read one method of a program back and pair it with the graph it was made from.

    Args:
        data: what ExecuTorch wrote; the program also gets a record of its ops and a checksum.
        edge: what it was written from.
        methods: the graph of each of its methods.
        method: which one.

    Raises:
        LoweringError: a delegate has no ops.
    """
    bare = read_program(data)
    rows = {
        name: _rows(rewritten.graph, edge, bare.method(name)) for name, rewritten in methods.items()
    }
    data = seal(data, encode(rows, len(data)))
    contents = read_program(data)
    contents = replace(contents, methods=(contents.method(method),))
    graph = methods[method].graph
    report = LoweringReport(
        rows[method],
        len(contents.delegates),
        contents.kernels,
        contents.size_bytes,
        methods[method].applied,
    )
    metas = tuple(placeholder_metas(graph.model))
    return LoweredProgram(data, report, contents, graph, specs_of(graph.model), metas)


@contextmanager
def _no_size_guards() -> Iterator[None]:
    """Keep dynamic sizes as wide as they were captured while graphs are traced again.

    Shape propagation asks which kernel PyTorch itself would choose for a convolution. For NNPACK
    and oneDNN that depends on whether the batch is below 16, and the answer for the example
    becomes a limit of the program.
    """
    # Under the lock: of two threads the second would take "off" for what was set before.
    with exclusive():
        nnpack, onednn = torch._C._get_nnpack_enabled(), torch._C._get_mkldnn_enabled()
        try:
            torch._C._set_nnpack_enabled(False)
            torch._C._set_mkldnn_enabled(False)
            yield
        finally:
            try:
                torch._C._set_nnpack_enabled(nnpack)
            finally:  # also when Ctrl-C comes here
                torch._C._set_mkldnn_enabled(onednn)


def _to_edge(
    exported: torch.export.ExportedProgram, constants: dict[str, int | float], *, validate: bool
) -> EdgeProgramManager:
    """Partition a graph.

    Args:
        exported: what is left of the converted graph after all passes.
        constants: numbers that the program returns when it is asked for them by name.
        validate: have ExecuTorch validate the graph after each of its passes: a seventh of the
            time, for nothing if the finished program is compared with the reference. ExecuTorch's
            own examples for quantized models leave it out (examples/xnnpack/aot_compiler.py).
    """
    config = EdgeCompileConfig(_check_ir_validity=validate)
    # The partitioner logs an ERROR for each op it leaves to another backend; the report says it.
    try:
        with _no_size_guards():
            edge = to_edge(exported, partitioner(), config, constants or None)
    except Exception as error:
        raise LoweringError(
            f"ExecuTorch could not partition the graph: {first_line(error)}"
            f"{_control_flow(exported)}"
        ) from error
    inline_constants(edge)
    return edge


def _control_flow(exported: torch.export.ExportedProgram) -> str:
    """A hint, if the graph has control flow that may be the reason."""
    kinds = {
        str(node.target): None
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator)
    }
    if not kinds:
        return ""
    return (
        f"; the graph has control flow ({', '.join(kinds)}), which ExecuTorch may not know how to "
        "lower: unroll it, or lower what is before and behind it on its own"
    )


def backend_config() -> ExecutorchBackendConfig:
    """How programs are written: memory is planned for the upper bounds of dynamic sizes."""
    return ExecutorchBackendConfig(
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(), segment_alignment=ALIGNMENT
    )


_DECOMPOSED_LAYERS = frozenset(
    {torch.ops.aten.addmm.default, torch.ops.aten.convolution.default, torch.ops.aten.mm.default}
)


def _is_decomposed(graph: ConvertedGraph) -> bool:
    """Whether layers are written as ``run_decompositions`` writes them."""
    return any(node.target in _DECOMPOSED_LAYERS for node in graph.model.graph.nodes)


def to_bytes(
    edge: EdgeProgramManager, graph: ConvertedGraph | None = None, *, lowered_here: bool = True
) -> bytes:
    """Write a partitioned program.

    Args:
        edge: the program.
        graph: what it was made from, for the ops in messages.
        lowered_here: whether this package lowered it, for the advice in messages.

    Raises:
        LoweringError: integers stayed outside the delegates, or ExecuTorch refused.
    """
    leftover = [
        node
        for method in edge.methods
        for node in edge.exported_program(method).graph.nodes
        if node.op == "call_function" and "quantized_decomposed" in str(node.target)
    ]
    if leftover:
        names = ", ".join(origin_of(node) or node.name for node in leftover[:5])
        advice = "leave the ops around them in float with set_node_name(name, None)"
        if not lowered_here:
            advice = f"{WAYS}; if it was lowered so, {advice}"
        if graph is not None and _is_decomposed(graph):
            advice = (
                "the graph was decomposed after convert_pt2e, so that its layers are no longer "
                "seen; lower what convert_pt2e returned, without run_decompositions"
            )
        raise LoweringError(
            f"{len(leftover)} quantize or dequantize ops stayed outside the delegate ({names}): "
            f"the bare runtime has no kernel for them; {advice}"
        )
    try:
        with _no_size_guards(), outputs_known(edge):
            return bytes(edge.to_executorch(backend_config()).buffer)
    except Exception as error:
        missing = re.search(r"Missing out variants: \{(.*)\}", str(error))
        if missing is not None:
            kernels = re.findall(r"'([^']+)'", missing.group(1))
            raise LoweringError(no_kernel(_callers(edge, kernels), kernels)) from error
        if "finite upper bound" in str(error):
            raise LoweringError(
                f"{_of_unknown_size(edge) or 'a tensor'}: the size of its result depends on values "
                "and has no bound, and memory is planned ahead; keep a fixed size (a mask, topk), "
                "or let the model end before it"
            ) from error
        raise LoweringError(
            f"ExecuTorch could not write the program: {first_line(error)}{_unknown(graph)}"
        ) from error


def _unknown(graph: ConvertedGraph | None) -> str:
    """A hint: ops that nothing here knows may be the reason."""
    ops = () if graph is None else graph.floating
    names = [describe(op.node) for op in ops if rule_of(op.node) is None]
    return f"; of its ops, these are not known here: {', '.join(names[:5])}" if names else ""


def _callers(edge: EdgeProgramManager, kernels: Sequence[str]) -> list[str]:
    """Ops of the converted graph that stand behind the calls of some kernels."""
    nodes = (node for m in edge.methods for node in edge.exported_program(m).graph.nodes)
    return [origin_of(node) or node.name for node in nodes if called(node) in kernels]


def _of_unknown_size(edge: EdgeProgramManager) -> str:
    """The first op whose result has a size that only its values tell."""
    for method in edge.methods:
        for node in edge.exported_program(method).graph.nodes:
            meta = tensor_meta(node)
            sizes: tuple[Any, ...] = () if meta is None else tuple(meta.shape)
            if any(not isinstance(s, int) and s.node.hint is None for s in sizes):
                return origin_of(node) or node.name
    return ""


def called(node: Node) -> str:
    """Name of the op a node calls, without its overload: ``aten::sort``."""
    return str(getattr(getattr(node.target, "_schema", None), "name", node.target))


# ---------------------------------------------------------------------------------------------
# What became of each op
# ---------------------------------------------------------------------------------------------


@dataclass
class _Traced:
    """Edge nodes that stand for one converted op."""

    delegated: list[Node]
    outside: list[Node]


def _rows(
    graph: ConvertedGraph, edge: EdgeProgramManager, contents: MethodContents
) -> tuple[OpBackend, ...]:
    """What became of each op of the graph that a method was made from."""
    traced, empty = _trace(edge, contents.name)
    if empty:
        raise LoweringError("the partitioner made a delegate without ops; the program is not safe")
    calls = _positions(traced, edge.exported_program(contents.name).graph, contents)
    return tuple(_row(op, graph.backend, traced, contents, calls) for op in graph)


def _positions(
    traced: Mapping[str, _Traced], graph: Graph, contents: MethodContents
) -> dict[Node, int]:
    """Where the program calls the nodes outside delegates: in their order, kernel by kernel.

    A kernel that the program does not call as often as the graph has it is left out: writing may
    add calls, and drop those that do nothing.
    """
    outside = {node for found in traced.values() for node in found.outside}
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _reads_delegate(node):
            nodes.setdefault(called(node), []).append(node)
    positions: dict[str, list[int]] = {}
    for position, kernel in enumerate(contents.kernels):
        positions.setdefault(kernel.partition(".")[0], []).append(position)
    return {
        node: position
        for kernel, found in nodes.items()
        if len(found) == len(positions.get(kernel, ()))
        for node, position in zip(found, positions[kernel], strict=True)
        if node in outside
    }


def _trace(edge: EdgeProgramManager, method: str) -> tuple[dict[str, _Traced], bool]:
    traced: dict[str, _Traced] = {}
    empty = False
    module = edge.exported_program(method).graph_module

    def entries(node: Node) -> list[_Traced]:
        names = origin_of(node)
        if names is None:
            return []
        return [traced.setdefault(name, _Traced([], [])) for name in names.split(",")]

    for node in module.graph.nodes:
        lowered = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        inner = getattr(lowered, "original_module", None)
        if inner is not None:
            calls = [n for n in inner.graph.nodes if n.op == "call_function"]
            empty = empty or not calls
            for call in calls:
                for found in entries(call):
                    found.delegated.append(call)
        elif node.op == "call_function" and not _reads_delegate(node):
            for found in entries(node):
                found.outside.append(node)
    return traced, empty


def _reads_delegate(node: Node) -> bool:
    """Whether a node only calls a delegate or takes one of its results."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and "executorch_call_delegate" in str(source.target)


def _delegated_backend(
    op: QuantizedOp | FloatOp, handles: set[int], contents: MethodContents
) -> Kernel:
    """How the delegate runs the nodes with these handles, as the program's tensors say."""
    nodes = [
        (delegate, node)
        for delegate in contents.delegates
        for node in delegate.ops
        # Boundaries between float and int8 carry the handle of the op next to them.
        if node.debug_handle in handles and node.kind != "convert"
    ]
    if not nodes:
        return kernels.FOLDED  # an activation fused into the op before it
    weighted = [(delegate, node) for delegate, node in nodes if node.weight is not None]
    for delegate, node in weighted:
        if quantizes_at_run_time(delegate, node):
            packed = delegate.tensors[cast(int, node.weight)].dtype == "int4"
            return kernels.PACKED_INT4 if packed else kernels.DYNAMIC_INT8
    # One step in float makes the op float, whatever clamps its result in int8 afterwards.
    if not all(computes_in_integers(delegate, node) for delegate, node in nodes):
        return kernels.FLOAT
    if isinstance(op, QuantizedOp) and op.weight is not None and weighted:
        delegate, node = weighted[-1]  # what comes before it only takes pixels
        if delegate.tensors[cast(int, node.weight)].dtype == "int4":
            return kernels.PACKED_INT4
        return kernels.INT8 if op.formats.weight_bits == 8 else kernels.INT8_CONTAINER
    return kernels.INT8


def _row(
    op: QuantizedOp | FloatOp,
    planned: Backend,
    traced: dict[str, _Traced],
    contents: MethodContents,
    calls: Mapping[Node, int],
) -> OpBackend:
    names = [op.node.name]
    if isinstance(op, QuantizedOp) and op.output_node is not op.node:
        names.append(op.output_node.name)
    found = [traced[name] for name in names if name in traced]
    delegated = [node for trace in found for node in trace.delegated]
    outside = [node for trace in found for node in trace.outside]
    handles = {cast(int, node.meta.get("debug_handle", -1)) for node in delegated}
    reason = op.reason if isinstance(op, FloatOp) else ""
    if outside:
        backend = kernels.PORTABLE
        if isinstance(op, QuantizedOp):
            predicted = planned.predict(op.match, op.formats)
            reason = predicted.reason if predicted.kernel is backend else reason
        reason = reason or "XNNPACK has no kernel for it as it stands here"
    elif not delegated:
        backend, reason = kernels.FOLDED, reason or "nothing is left of it after lowering"
    elif isinstance(op, QuantizedOp) and op.is_wide:
        backend = kernels.EMULATED
    else:
        backend = _delegated_backend(op, handles, contents)
        if isinstance(op, FloatOp) and backend is kernels.FOLDED:
            reason = "fused into the op before it"
        elif isinstance(op, FloatOp) and backend is kernels.INT8:
            reason += "; the backend quantizes what is float here when it writes the program"
    if isinstance(op, QuantizedOp):
        predicted = planned.predict(op.match, op.formats)
        reason = reason or predicted.reason
        if (backend, predicted.kernel) == (kernels.FLOAT, kernels.TABLE):
            backend = kernels.TABLE  # its three steps become one when the program is loaded
        if backend is kernels.FLOAT and not reason:
            reason = "XNNPACK runs it in float between quantize steps"
    return OpBackend(
        node=op.node.name,
        path=module_path(op.node),
        family=op.match.rule.family if isinstance(op, QuantizedOp) else str(op.node.target),
        backend=backend,
        placement=backend.placement,
        kernel=backend.label,
        reason=reason,
        written=original_name(op.node),
        handles=tuple(sorted(handle for handle in handles if handle >= 0)),
        outside=tuple(dict.fromkeys(map(called, outside))),
        calls=tuple(calls[node] for node in outside if node in calls),
        has_bias=_has_bias(op),
    )


def _has_bias(op: QuantizedOp | FloatOp) -> bool:
    """Whether a layer adds a bias, integer or not."""
    if isinstance(op, QuantizedOp):
        return op.bias is not None
    match = match_of(op.node)
    return match is not None and match.weight is not None and match.bias is not None
