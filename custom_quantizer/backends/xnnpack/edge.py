"""From a rewritten graph to ExecuTorch's edge dialect, without tracing it again.

``to_edge_transform_and_lower`` (1.5.1) traces a graph ten times before it is partitioned: to make
it functional, to decompose its ops, and once for each of eight passes, whether they change anything
or not. That is most of the time of a lowering. What the passes of this package leave is functional
and made of core ops already, but for a few calls with one core form each (:data:`_CORE`), or with
several (:mod:`~custom_quantizer.backends.xnnpack.written_out`); so these are put where they stand,
and upstream's passes run where they have something to do.
A graph with anything else goes upstream's way, as all do with another ExecuTorch, and the program
is the same, byte for byte.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.passes import (
    MemoryFormatOpsPass,
    base_post_op_replace_passes,
    base_pre_op_replace_passes,
)
from executorch.exir.passes.convert_constant_dim_order_pass import (
    convert_constant_dim_order_pass,
)
from executorch.exir.passes.dim_order_ops_registry import DimOrderOpsMap
from executorch.exir.passes.legalize_portable_dim_order_pass import LegalizePortableDimOrderPass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.remove_unused_parameters_pass import remove_unused_parameters_pass
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
from executorch.exir.program import _program
from executorch.exir.program._program import lift_constant_tensor_pass
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch import Tensor
from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import get_view_copy_of_view_op
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.quick_partitioner import QuickPartitioner
from custom_quantizer.backends.xnnpack.quick_passes import passes_known, quick_passes, returned
from custom_quantizer.backends.xnnpack.written_out import write_out
from custom_quantizer.core.graph import are_static, argument, tensor_meta

__all__ = ["to_edge"]

aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Target and arguments."""


def to_edge(
    exported: ExportedProgram,
    partitioner: QuickPartitioner,
    config: EdgeCompileConfig,
    constants: dict[str, int | float] | None,
) -> EdgeProgramManager:
    """What ``to_edge_transform_and_lower`` returns.

    Args:
        exported: a graph of this package's passes; it is changed.
        partitioner: which ops go to the delegate, and which it wants whole.
        config: as upstream takes it.
        constants: numbers that the program returns when it is asked for them by name.

    Raises:
        Exception: what upstream raises.
    """
    whole, accepts = partitioner.ops_to_not_decompose(exported)
    traced = accepts is not None or config._check_ir_validity or not passes_known()
    forms = None if traced else core_forms(exported, whole)
    with quick_passes():
        if forms is None:
            return to_edge_transform_and_lower(
                exported,
                partitioner=[partitioner],
                compile_config=config,
                constant_methods=constants,
            )
        program = _edge_program(exported, forms, config, whole)
        manager = EdgeProgramManager(program, constants, config, whole)
        manager = manager.to_backend(partitioner)
    _refuse_whole(manager, whole)
    # Its pass traces all delegates, too, to make inputs of these few contiguous.
    manager.compile_config._skip_dim_order = not any(
        node.target in LegalizePortableDimOrderPass._target_ops
        for node in manager.exported_program().graph.nodes
    )
    return manager


def _refuse_whole(manager: EdgeProgramManager, whole: list[Any]) -> None:
    """Raise, as upstream does, if an op that was left whole for the delegate is not in it."""
    for name in manager.methods:
        _program._sanity_check_graph_for_non_decomp_ops(
            name,
            manager.exported_program(name),
            set(whole),
            None,
            generate_error=True,
            partitioner_name=QuickPartitioner.__name__,
        )


# ---------------------------------------------------------------------------------------------
# Core forms
# ---------------------------------------------------------------------------------------------


def core_forms(exported: ExportedProgram, whole: list[Any]) -> dict[Node, Call] | None:
    """By call that is no core op, the one core op it becomes; ``None`` if upstream has to do it.

    Args:
        exported: the graph; calls that become several core ops are written out in it.
        whole: ops that stay as they are.
    """
    mutates = any(
        spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
        for spec in exported.graph_signature.output_specs
    )
    if mutates or any(True for _ in exported.graph_module.children()):
        return None
    if not all(_is_static(node.meta.get("val")) for node in exported.graph.nodes):
        return None
    composite = [node for node in exported.graph.nodes if _is_composite(node, whole)]
    if composite:
        left = {op: form for op, form in _decompositions().items() if op not in whole}
        if write_out(exported, composite, left):
            return None
    forms: dict[Node, Call] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return None
        form = _CORE.get(target)
        if form is not None and target not in whole:
            call = form(node)
            if call is None:
                return None
            forms[node] = call
        elif _is_composite(node, whole):
            return None
    return forms


@functools.cache
def _decompositions() -> Mapping[Any, Any]:
    """By op, how upstream decomposes it; to make its table takes an eighth of a second."""
    return cast("Mapping[Any, Any]", _program._default_decomposition_table())


def _is_composite(node: Node, whole: Sequence[Any]) -> bool:
    """Whether tracing would put other ops in the place of a call."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in whole or target in _CORE:
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return target in _decompositions() or bool(target.has_kernel_for_dispatch_key(key))


def _is_static(value: Any) -> bool:
    """Whether no size of a fake value, which may be several tensors, is symbolic."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_static, value))
    if isinstance(value, Tensor):
        return are_static(value.shape)
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _convolution(dims: int, *, transposed: bool = False) -> Callable[[Node], Call | None]:
    """The one convolution that the core ops have, for a batch of images of ``dims`` dimensions."""

    def form(node: Node) -> Call | None:
        meta = tensor_meta(node)
        if meta is None or meta.dim() != dims + 2:
            return None

        def sizes(index: int, name: str, default: int) -> list[int]:
            value = argument(node, index, name, default)
            value = [value] if isinstance(value, int) else list(value)
            return value * dims if len(value) == 1 else value

        source, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        stride, padding = sizes(3, "stride", 1), sizes(4, "padding", 0)
        if transposed:
            grown, groups = sizes(5, "output_padding", 0), argument(node, 6, "groups", 1)
            dilation = sizes(7, "dilation", 1)
        else:
            grown, dilation = [0] * dims, sizes(5, "dilation", 1)
            groups = argument(node, 6, "groups", 1)
        args = (source, weight, bias, stride, padding, dilation, transposed, grown, groups)
        return aten.convolution.default, args, {}

    return form


def _softmax(target: Any) -> Callable[[Node], Call | None]:
    """A softmax, or its logarithm, of the dtype of its input."""

    def form(node: Node) -> Call | None:
        source = tensor_meta(cast(Node, node.args[0]))
        if source is None or argument(node, 2, "dtype") not in (None, source.dtype):
            return None
        return target, (*node.args[:2], False), {}

    return form


def _conversion(node: Node) -> Call | None:
    """A conversion of something else; tracing leaves no call for one that changes nothing."""
    source, meta = cast(Node, node.args[0]), tensor_meta(node)
    before = tensor_meta(source)
    if meta is None or before is None or before.dtype == meta.dtype:
        return None
    if len(node.args) > 2 or node.kwargs:
        return None
    return aten._to_copy.default, (source,), {"dtype": meta.dtype}


def _pad(node: Node) -> Call | None:
    if argument(node, 2, "mode", "constant") != "constant":
        return None
    return aten.constant_pad_nd.default, (*node.args[:2], argument(node, 3, "value") or 0.0), {}


_CORE: Mapping[Any, Callable[[Node], Call | None]] = {
    aten.conv1d.default: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv_transpose2d.input: _convolution(2, transposed=True),
    aten.log_softmax.int: _softmax(aten._log_softmax.default),
    aten.pad.default: _pad,
    aten.softmax.int: _softmax(aten._softmax.default),
    aten.to.dtype: _conversion,
}
"""By op, its core form; ``None`` where that takes more than one call."""


# ---------------------------------------------------------------------------------------------
# The edge dialect
# ---------------------------------------------------------------------------------------------


def _edge_program(
    exported: ExportedProgram,
    forms: Mapping[Node, Call],
    config: EdgeCompileConfig,
    whole: Sequence[Any],
) -> ExportedProgram:
    """Upstream's ``_generate_edge_program``; passes that would change nothing are left out."""
    program = remove_unused_parameters_pass(exported)
    module = program.graph_module
    for node, (core, args, named) in forms.items():
        node.target, node.args, node.kwargs = core, args, named
    for node in _calls(module):
        target = cast(torch._ops.OpOverload, node.target)
        node.target = _VIEWS.get(target) or get_view_copy_of_view_op(target._schema) or target
    _make_contiguous(module)
    for apply in (*base_pre_op_replace_passes, RemoveMixedTypeOperators()):
        name = getattr(apply, "__name__", type(apply).__name__)
        if name not in NEVER and any(map(WORK.get(name, _always), _calls(module))):
            module = apply(module).graph_module
    for node in _calls(module):
        if should_lower_to_edge(node.target):
            node.target = aten_to_edge(node.target)
    if any(node.target in DimOrderOpsMap for node in module.graph.nodes):
        module = MemoryFormatOpsPass()(module).graph_module
    # Copies rename what is called like a builtin; behind tracing, names are final.
    module = GraphModule(module, copy.deepcopy(module.graph))
    verifier = EXIREdgeDialectVerifier(
        edge_compile_config=config, class_only=True, preserve_ops=list(whole)
    )
    edge = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=_program._get_updated_graph_signature(program.graph_signature, module),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[verifier],
    )
    edge = convert_constant_dim_order_pass(lift_constant_tensor_pass(edge))
    return cast(ExportedProgram, _program._transform(edge, *base_post_op_replace_passes))


def _make_contiguous(module: GraphModule) -> None:
    """Fake values as copies leave them, where views of another layout stood, and behind these."""
    changed: set[Node] = set()
    for node in _calls(module):
        meta = tensor_meta(node)
        strided = meta is not None and not meta.is_contiguous()
        if strided or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
            node.meta["val"] = returned(node)


def _calls(module: GraphModule) -> list[Node]:
    """Calls of ops."""
    return [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def _always(_node: Node) -> bool:
    return True


def _takes_a_number_for_a_tensor(node: Node) -> bool:
    parameters = cast(torch._ops.OpOverload, node.target)._schema.arguments
    return any(
        isinstance(value, (bool, int, float)) and isinstance(parameter.type, torch.TensorType)
        for value, parameter in zip(node.args, parameters, strict=False)
    )


def _mixes_dtypes(node: Node) -> bool:
    """Whether the operands of an op may have to be converted to one dtype."""
    metas = [tensor_meta(source) for source in node.all_input_nodes]
    floats = all(meta is not None and meta.dtype == torch.float32 for meta in metas)
    return len(node.args) > 1 and node.target in _PROMOTING and not floats


_PROMOTING = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.div.Tensor_mode,
        aten.minimum.default,
    )
)
"""Ops that ``RemoveMixedTypeOperators`` looks at."""

_VIEWS: Mapping[Any, Any] = {aten._unsafe_view.default: aten.view_copy.default}
"""Views that do not say that they are."""

NEVER = frozenset(
    (
        "NormalizeTransposePass",
        "ReplaceBrokenOpsWithFunctionalOpsPass",
        "ReplaceSymSizeOpPass",
        "SymToTensorPass",
    )
)
"""Passes of the dialect that nothing is left for: views are copies, and sizes are static."""

WORK: Mapping[str, Callable[[Node], bool]] = {
    "RemoveMixedTypeOperators": _mixes_dtypes,
    "ScalarToTensorPass": _takes_a_number_for_a_tensor,
}
"""By pass, which calls it may change. Those that are neither here nor in :data:`NEVER` always run:
they trace nothing."""
