"""A converted graph as an exported program, without tracing it.

``torch.export`` (2.15) runs a graph, op by op, to write down the same ops again: what a captured
graph is made of, a trace leaves as it is. That is a third of a lowering. Of a graph whose ops are
functional and whose sizes are numbers, the program is made directly instead: constants become
inputs, and the fake values that capture and the passes recorded are those of its calls.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._export.verifier import TrainingIRVerifier
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram, ExportGraphSignature
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.traceback import NodeSource, NodeSourceAction

from custom_quantizer.core.graph import (
    ASSERTIONS,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    are_static,
    fake_constant,
)
from custom_quantizer.reference.exporting import is_plain
from custom_quantizer.reference.inputs import specs_of

__all__ = ["export_directly"]


def export_directly(model: GraphModule, example: tuple[Any, ...]) -> ExportedProgram | None:
    """What ``torch.export`` makes of a converted graph; ``None`` if it has to be asked.

    Shapes, dtypes, layouts, ops and arguments are the same. Nodes keep their names.

    Args:
        model: the graph.
        example: its inputs.
    """
    nodes = list(model.graph.nodes)
    mode = _mode(nodes)
    in_spec, out_spec = specs_of(model)
    if mode is None or in_spec is None or not (is_plain(in_spec) and is_plain(out_spec)):
        return None
    inputs = [node for node in nodes if node.op == "placeholder"]
    results = pytree.tree_leaves(nodes[-1].args[0])
    constants = _constants(model, nodes)
    flat = pytree.tree_leaves(example)
    if constants is None or not all(map(_is_functional, nodes)) or not _fit(inputs, flat):
        return None
    if not all(isinstance(result, Node) and result.op == "call_function" for result in results):
        return None

    graph = Graph()
    specs: list[InputSpec] = []
    read: dict[str, Node] = {}
    for name, value in constants.items():
        read[name], spec = _constant(graph, name, value, mode)
        specs.append(spec)
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = copy = graph.placeholder(node.name)
        copy.target = copy.name
        copy.meta["val"] = node.meta["val"]
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copy.name), None))
    copies |= {node: read[str(node.target)] for node in nodes if node.op == "get_attr"}
    if not _copy_calls(graph, nodes, copies, mode):
        return None
    outputs = [copies[result] for result in results]
    graph.output(tuple(outputs))
    signature = ExportGraphSignature(
        specs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(x.name), None) for x in outputs]
    )
    call = ModuleCallSignature([], [], in_spec, out_spec)
    return ExportedProgram(
        torch.nn.Module(),
        graph,
        signature,
        constants,
        {},
        [ModuleCallEntry("", call)],
        pytree.tree_unflatten(flat, in_spec),
        verifiers=[TrainingIRVerifier],
    )


def _constant(graph: Graph, name: str, value: Tensor, mode: Any) -> tuple[Node, InputSpec]:
    """A parameter or buffer as an input of the program."""
    parameter = isinstance(value, torch.nn.Parameter)
    node = graph.placeholder(f"{'p' if parameter else 'b'}_{name}")
    node.target = node.name  # by which upstream looks for placeholders
    node.meta["val"] = fake_constant(value, mode).requires_grad_(value.requires_grad)
    kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
    return node, InputSpec(kind, TensorArgument(node.name), name, None if parameter else True)


def _copy_calls(graph: Graph, nodes: Sequence[Node], copies: dict[Node, Node], mode: Any) -> bool:
    """Add the calls to ``graph``, and to ``copies``; ``False`` if a recorded value is wrong."""
    parts: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        source = node.args[0]
        if node.target is operator.getitem and isinstance(source, Node):
            copies[node] = parts[copies[source]][cast(int, node.args[1])]
            continue
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        _drop_defaults(copy)
        copy.meta["from_node"] = [NodeSource(node, "export", NodeSourceAction.CREATE)]
        copy.meta["val"] = value = _value(copy, mode)
        if not _is_like(value, node.meta.get("val")):
            return False
        if isinstance(value, (tuple, list)):
            parts[copy] = [_part(copy, i) for i in range(len(value))]
    return True


def _mode(nodes: Sequence[Node]) -> Any:
    """The mode of all fake values in a graph; ``None`` if they are of several, or none."""
    modes = {
        id(mode): mode
        for node in nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
        if (mode := getattr(value, "fake_mode", None)) is not None
    }
    return next(iter(modes.values())) if len(modes) == 1 else None


def _constants(model: GraphModule, nodes: Sequence[Node]) -> dict[str, Tensor] | None:
    """The parameters and buffers that a graph reads; ``None`` if it reads anything else."""
    read = {str(node.target) for node in nodes if node.op == "get_attr"}
    saved = model.state_dict()
    held = (*model.named_parameters(), *model.named_buffers())
    constants = {name: value for name, value in held if name in read and name in saved}
    contiguous = all(map(_is_plain_tensor, constants.values()))
    return constants if contiguous and constants.keys() == read else None


def _is_functional(node: Node) -> bool:
    """Whether a node is no call, or one of an op that only returns something."""
    target: Any = node.target
    if node.op != "call_function" or target is operator.getitem:
        return node.op not in ("call_module", "call_method")
    is_op = isinstance(target, torch._ops.OpOverload)
    return is_op and not target._schema.is_mutable and target not in ASSERTIONS


def _fit(inputs: Sequence[Node], values: Sequence[Any]) -> bool:
    """Whether the graph was captured with tensors as these are."""
    if len(inputs) != len(values):
        return False
    recorded = [node.meta.get("val") for node in inputs]
    return all(
        isinstance(value, Tensor)
        and isinstance(meta, FakeTensor)
        and _is_plain_tensor(value)
        and _is_plain_tensor(meta)
        and _is_like(meta, value)
        for meta, value in zip(recorded, values, strict=True)
    )


def _is_plain_tensor(value: Tensor) -> bool:
    """Whether all sizes are numbers, and strides those of a tensor that was just made."""
    static = are_static(value.shape)
    return static and value.stride() == make_contiguous_strides_for(value.shape)


def _is_like(value: Any, recorded: Any) -> bool:
    """Whether a value is one or several static tensors, of which nothing else was recorded."""
    if isinstance(value, (tuple, list)):
        others = [None] * len(value) if recorded is None else recorded
        return len(others) == len(value) and all(map(_is_like, value, others))
    if not isinstance(value, Tensor) or not are_static(value.shape):
        return False
    return recorded is None or (value.shape, value.dtype) == (recorded.shape, recorded.dtype)


def _part(call: Node, index: int) -> Node:
    """One of several results, of which a trace takes each."""
    part = call.graph.call_function(operator.getitem, (call, index))
    part.meta = {**call.meta, "val": call.meta["val"][index]}
    return part


def _drop_defaults(node: Node) -> None:
    """Arguments as PyTorch's dispatcher hands them to a trace: without those that say nothing.

    Upstream tells some calls apart by how many arguments they have.
    """
    target: Any = node.target
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    given.update(node.kwargs)
    positional = [argument for argument in schema if not argument.kwarg_only]
    while positional and _is_default(given.get(positional[-1].name, _MISSING), positional[-1]):
        positional.pop()
    node.args = tuple(given.get(x.name, x.default_value) for x in positional)
    node.kwargs = {
        x.name: given[x.name]
        for x in schema
        if x.kwarg_only and x.name in given and not _is_default(given[x.name], x)
    }


_MISSING = object()


def _is_default(value: Any, argument: Any) -> bool:
    """Whether an argument is not given, or is what it would be then."""
    if value is _MISSING:
        return True
    if isinstance(value, Node) or not argument.has_default_value():
        return False
    default = argument.default_value
    if isinstance(default, (list, tuple)):
        default = list(default)
        value = [value] * len(default) if isinstance(value, int) else value
        return isinstance(value, (list, tuple)) and list(value) == default
    return type(value) is type(default) and bool(value == default)  # a number 1.0 is not 1


def _value(node: Node, mode: Any) -> Any:
    """The fake value of a call, computed where what was recorded does not tell its layout."""
    args: Any = map_arg(node.args, lambda source: source.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda source: source.meta["val"])
    sources = [source.meta["val"] for source in node.all_input_nodes]
    recorded = node.meta.get("val")
    target: Any = node.target
    if all(isinstance(source, Tensor) and _is_plain_tensor(source) for source in sources):
        if target in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR) and not kwargs:
            dtype = args[-1] if target is QUANTIZE_PER_TENSOR else torch.float32
            return FakeTensor(
                mode, torch.empty(args[0].shape, dtype=dtype, device="meta"), args[0].device
            )
        views = any(result.alias_info is not None for result in target._schema.returns)
        if isinstance(recorded, FakeTensor) and _is_plain_tensor(recorded) and not views:
            return recorded
    with mode, torch.no_grad():
        return target(*args, **kwargs)
