"""From a converted graph to an ExecuTorch program: rewritten, partitioned, written, read back."""

from __future__ import annotations

import gc
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torchao.quantization.pt2e import FROM_NODE_KEY

from custom_quantizer.backends.xnnpack import BACKEND
from custom_quantizer.backends.xnnpack.border_constants import border_constants
from custom_quantizer.backends.xnnpack.checksum import seal
from custom_quantizer.backends.xnnpack.edge import to_edge
from custom_quantizer.backends.xnnpack.inline_constants import ALIGNMENT, inline_constants
from custom_quantizer.backends.xnnpack.leftovers import programs_forgotten
from custom_quantizer.backends.xnnpack.op_record import encode
from custom_quantizer.backends.xnnpack.outcomes import called, outcomes
from custom_quantizer.backends.xnnpack.partition_configs import partitioner
from custom_quantizer.backends.xnnpack.passes import (
    FOR_UPSTREAMS_PARTITIONER,
    origin_of,
    run_passes,
)
from custom_quantizer.backends.xnnpack.program import (
    WAYS,
    LoweredProgram,
    LoweringReport,
    no_kernel,
)
from custom_quantizer.backends.xnnpack.quick_passes import outputs_known
from custom_quantizer.backends.xnnpack.readback import read_program
from custom_quantizer.backends.xnnpack.writes_in_place import write_rows_in_place
from custom_quantizer.core.graph import (
    STATE_KEY,
    describe,
    detached_copy,
    is_complex,
    is_constant,
    is_dequantize,
    is_sized_by_data,
    set_state,
    state_buffers,
    state_of,
)
from custom_quantizer.core.lazy_code import lazy_code
from custom_quantizer.core.names import restore_names
from custom_quantizer.core.threads import begin, exclusive, tools
from custom_quantizer.errors import InputError, LoweringError, first_line
from custom_quantizer.ops import rule_of
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.direct_export import export_directly
from custom_quantizer.reference.exporting import DEFAULT_DYNAMIC_MAX, export_again
from custom_quantizer.reference.inputs import check_example, placeholder_metas, specs_of

__all__ = [
    "Rewritten",
    "backend_config",
    "data_files",
    "describe_program",
    "make_program",
    "restore_exported_state",
    "rewrite",
    "rewrite_exported",
    "to_bytes",
]

logger = logging.getLogger(__name__)


@tools()
def make_program(
    graph: ConvertedGraph,
    example_inputs: tuple[Any, ...],
    *,
    validate: bool,
    dynamic_max: int = DEFAULT_DYNAMIC_MAX,
    progress: Callable[[str], None] | None = None,
) -> LoweredProgram:
    """Lower a graph to a program that nobody has compared with it yet.

    Args:
        graph: the converted graph.
        example_inputs: one set of inputs, as for the model; those captured by keyword come last.
        validate: see :func:`_to_edge`.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        progress: called with the name of each stage.

    Raises:
        InputError: the example does not fit the graph.
        LoweringError: the backend refused the graph.
    """
    say = partial(begin, progress)
    _warn_of_state(graph.model)
    example = check_example(graph, example_inputs)
    with programs_forgotten(), lazy_code(), _naming_sizes(graph.model):
        rewritten = rewrite(graph, example, dynamic_max, say)
        say("partitioning for XNNPACK")
        constants = border_constants(graph.borders, "forward")
        edge = _to_edge(rewritten.exported, constants, validate=validate)
        _collect(graph)
        say("writing the program")
        data = to_bytes(edge, graph)
        program = describe_program(data, edge, {"forward": rewritten})
        del edge, rewritten, data
    _collect(graph)
    return program


@contextmanager
def _naming_sizes(model: GraphModule) -> Iterator[None]:
    """Say which op's size is not known where a stage failed to ask for it.

    Raises:
        LoweringError: the one of the stage, which names no op, or that.
    """
    try:
        yield
    except LoweringError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GuardOnDataDependentSymNode):
            cause = cause.__cause__
        sized = next(filter(is_sized_by_data, model.graph.nodes), None)
        if cause is None or sized is None:
            raise
        raise LoweringError(
            f"{describe(sized)}: the size of its result depends on values, and an op behind it "
            f"needs to know it; {_FIXED_SIZE} ({error})"
        ) from error


_FIXED_SIZE = "keep a fixed size (a mask, topk), or let the model end before it"
"""Advice where a size depends on values."""


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
    tagged: bool = False,
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
        tagged: leave constants the names of the data files that they were tagged with.
        skip: names of passes to leave out: those that are for another partitioner.

    Raises:
        LoweringError: the graph is of other ops than ``convert_pt2e`` returned, a pass failed, or
            ``torch.export`` refused the result.
    """
    say("rewriting the graph")
    _check_writable(graph.model)
    _check_layers(graph.model)
    written = _versions(graph.model)
    model = detached_copy(graph.model, share_constants=True)
    _tell_apart(model, (op.node.name for op in graph))
    applied = run_passes(model, graph, skip=skip)
    for node in model.graph.nodes:
        if node.op == "call_function":
            # Of a node without any meta export keeps no trace, and ExecuTorch asks for one.
            node.meta.setdefault("nn_module_stack", {})
    say("exporting")
    exported = export_directly(model, example)
    if exported is None:
        exported = export_again(model, example, dynamic_max, widest=widest)
    for name, version in _versions(graph.model).items():
        if version != written[name]:
            # Else the program would be compared with a graph that was changed alike.
            raise LoweringError(
                f"constant {name} of the converted graph was written into while it was lowered; "
                "convert the model again, and please report it"
            )
    _tag(exported, data_files(model) if tagged else {})
    _start_with_state(exported)
    return Rewritten(graph, example, exported, applied)


def _start_with_state(exported: torch.export.ExportedProgram) -> None:
    """Let a program start with what its buffers hold: else ExecuTorch writes their shapes only."""
    for node in state_of(exported.graph):
        if node.name in exported.graph_signature.inputs_to_buffers:
            node.meta["et_init_buffer"] = True


def data_files(model: GraphModule) -> dict[str, str]:
    """The data file that each constant of a graph was tagged with, by name."""
    return {
        str(node.target): tag
        for node in model.graph.nodes
        if node.op == "get_attr" and (tag := (node.meta.get("custom") or {}).get(_DATA_FILE))
    }


def _tag(exported: torch.export.ExportedProgram, files: Mapping[str, str]) -> None:
    """Tag constants of a program with these data files; ``torch.export`` keeps some tags."""
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in exported.graph.nodes:
        if node.name in targets:
            custom = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != _DATA_FILE}
            file = files.get(targets[node.name])
            node.meta["custom"] = custom if file is None else {**custom, _DATA_FILE: file}


_DATA_FILE = "delegate_constant_tag"
"""Key in ``node.meta["custom"]``: the data file that a delegate's constant shall be in
(``delegate_external_constants_pass_unlifted`` in ExecuTorch 1.5.1)."""


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


def rewrite_exported(
    exported: torch.export.ExportedProgram, dynamic_max: int, *, tagged: bool
) -> Rewritten:
    """Rewrite a converted graph that ``torch.export`` was given, in somebody else's lowering call.

    Calls get the names back that they had in the converted graph, buffers what they held when the
    model was captured, and the program takes contiguous inputs, as that of ``lower`` does, whatever
    the layout of the example.

    Args:
        exported: the converted graph.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        tagged: as for :func:`rewrite`.

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
    _restore_state(model)
    args, kwargs = exported.example_inputs
    graph = read_converted(model, BACKEND)
    example = check_example(graph, (*args, *kwargs.values()))
    return rewrite(graph, example, dynamic_max, widest=True, tagged=tagged)


def _restore_state(model: GraphModule) -> None:
    """Let buffers hold what they held when the model was captured.

    ExecuTorch calibrates and converts in loops of its own. The buffers are those of the converted
    graph, too.
    """
    if (held := model.meta.get(STATE_KEY)) is not None:
        set_state(model, held)


def restore_exported_state(exported: torch.export.ExportedProgram) -> None:
    """Let a program of which nothing is rewritten start with what the captured model held."""
    _restore_state(exported.module())
    _start_with_state(exported)


_DECOMPOSED_LAYERS = frozenset(
    {torch.ops.aten.addmm.default, torch.ops.aten.convolution.default, torch.ops.aten.mm.default}
)
"""Layers as ``run_decompositions`` writes them; those with a weight in float may stay so."""


def _check_layers(model: GraphModule) -> None:
    """Refuse a graph whose layers are not those that the quantizer saw."""
    for node in model.graph.nodes:
        if node.target not in _DECOMPOSED_LAYERS:
            continue
        for source in node.all_input_nodes:
            if source.target is torch.ops.aten.permute.default:
                source = cast(Node, source.args[0])
            if is_dequantize(source) and is_constant(source.args[0]):
                raise LoweringError(
                    f"{describe(node)} is a layer of a graph that was decomposed after "
                    "convert_pt2e, so that it is no longer seen as one; lower what convert_pt2e "
                    "returned, without run_decompositions"
                )


def _check_writable(model: GraphModule) -> None:
    """Raise ``LoweringError`` for what no program can hold.

    Raises:
        LoweringError: complex numbers, or an output that is neither tensor nor number.
    """
    for node in model.graph.nodes:
        if node.op != "call_function" or not is_complex(node):
            continue
        # What was written for others and gives nothing real is not to be blamed.
        reader = next((user for user in node.users if not is_complex(user)), None)
        if reader is not None:
            to = "the caller" if reader.op == "output" else describe(reader)
            raise LoweringError(
                f"{describe(node)} gives complex numbers to {to}, and ExecuTorch's programs hold "
                "none; compute with real and imaginary parts as two tensors"
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
        name: outcomes(rewritten.graph, edge, bare.method(name))
        for name, rewritten in methods.items()
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
    return LoweredProgram(data, report, contents, graph, specs_of(graph.model)[1], metas)


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
        raise LoweringError(
            f"{len(leftover)} quantize or dequantize ops stayed outside the delegate ({names}): "
            f"the bare runtime has no kernel for them; {advice}"
        )
    try:
        with _no_size_guards(), outputs_known(edge):
            write_rows_in_place(edge)
            return bytes(edge.to_executorch(backend_config()).buffer)
    except Exception as error:
        missing = re.search(r"Missing out variants: \{(.*)\}", str(error))
        if missing is not None:
            kernels = re.findall(r"'([^']+)'", missing.group(1))
            raise LoweringError(no_kernel(_callers(edge, kernels), kernels)) from error
        if "finite upper bound" in str(error):
            raise LoweringError(
                f"{_of_unknown_size(edge) or 'a tensor'}: the size of its result depends on values "
                f"and has no bound, and memory is planned ahead; {_FIXED_SIZE}"
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
            if is_sized_by_data(node):
                return origin_of(node) or node.name
    return ""
