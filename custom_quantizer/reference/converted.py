"""Reading a converted graph: its integer ops, and the float ops that are left.

What ``convert_pt2e`` returns is a float graph with quantize and dequantize nodes. An op is an
integer op when each of its inputs comes out of a dequantize node and its result (after a fused
activation) goes into exactly one quantize node; this module finds them, with their integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.bias import derived_scale
from custom_quantizer.core.borders import (
    Borders,
    borders_of,
    is_border_call,
    with_integer_borders,
)
from custom_quantizer.core.graph import (
    ASSERTIONS,
    DEQUANTIZE_DYNAMIC,
    DEQUANTIZE_GROUPED,
    FLOAT_KEY,
    constant_of,
    describe,
    effective_users,
    has_zero_points,
    is_constant,
    is_dequantize,
    is_number,
    is_observer,
    is_quantize,
    is_run_time_quantization,
    is_static,
    qparams_of,
    why_lifted,
)
from custom_quantizer.errors import ConversionError
from custom_quantizer.ops import (
    PatternMatch,
    QuantizedOp,
    match_of,
    rule_of,
    unknown_op,
)
from custom_quantizer.ops.backend import Backend, BackendLike, Support, get_backend
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.ops.movement import GETITEM, SPLIT
from custom_quantizer.ops.run_time import RunTimeOp

__all__ = ["ConvertedGraph", "FloatOp", "read_converted"]


@dataclass(frozen=True)
class FloatOp:
    """An op that stays in float, and why.

    Attributes:
        node: the call.
        reason: for the report.
        float_fallback: its scales are known, and the integer kernel refuses them.
        run_time: it reads activations that are quantized while it runs, as the backend does it.
    """

    node: Node
    reason: str
    float_fallback: bool = False
    run_time: RunTimeOp | None = None


@dataclass(frozen=True)
class ConvertedGraph:
    """The ops of a converted graph, in graph order.

    Attributes:
        model: the graph, with integers at its border where ``set_io(integer=True)`` asked for them.
        backend: whose kernels decide what can be integer.
        integer: ops that compute on integers.
        floating: all others.
    """

    model: GraphModule
    backend: Backend
    integer: tuple[QuantizedOp, ...]
    floating: tuple[FloatOp, ...]

    def __iter__(self) -> Iterator[QuantizedOp | FloatOp]:
        """All ops in graph order."""
        by_node: dict[Node, QuantizedOp | FloatOp] = {op.node: op for op in self.integer}
        by_node.update({op.node: op for op in self.floating})
        return (by_node[node] for node in self.model.graph.nodes if node in by_node)

    @property
    def borders(self) -> Borders:
        """Which inputs and outputs are integers."""
        return borders_of(self.model)

    def with_bias(self) -> tuple[QuantizedOp, ...]:
        """Integer ops that carry an integer bias."""
        return tuple(op for op in self.integer if op.bias is not None)


def read_converted(
    model: GraphModule, backend: BackendLike = "xnnpack", *, integer_io: bool = True
) -> ConvertedGraph:
    """Find the integer ops of a converted graph.

    Args:
        model: what ``convert_pt2e`` returns.
        backend: whose kernels they run on; ``None``: pure integers, which take any scales.
        integer_io: let inputs and outputs be integers where ``set_io(integer=True)`` asked for
            them; otherwise the nodes are those of ``model``, which takes and returns float32.

    Raises:
        ConversionError: the graph has observers, so it was prepared but not converted; or it has
            loggers of torchao's comparison of two graphs; or it quantizes
            nothing; or an input or output that shall be integers is not quantized.
    """
    _check_converted(model)
    if integer_io:
        model = with_integer_borders(model)
    backend = get_backend(backend)
    integer: dict[Node, QuantizedOp] = {}
    floating: list[FloatOp] = []
    consumed: set[Node] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target in ASSERTIONS or node in consumed:
            continue
        if is_quantize(node) or is_dequantize(node) or is_run_time_quantization(node):
            continue
        if is_border_call(node):
            continue
        if is_number(node):
            continue  # sizes, and what is asserted of them
        found = _integer_op(model, node, integer, backend)
        if isinstance(found, str):
            floating.append(FloatOp(node, found, run_time=_run_time_op(model, node, backend)))
            continue
        # What is wider than the kernels is emulated, at any scales.
        if backend.wide is None or not found.is_wide:
            runs = backend.support(found.match.rule).runs(found)
            if not runs.ok:
                floating.append(FloatOp(node, runs.reason, float_fallback=True))
                continue
        integer[node] = found
        if found.output_node is not node:
            consumed.add(found.output_node)
    return ConvertedGraph(model, backend, tuple(integer.values()), tuple(floating))


def _check_converted(model: GraphModule) -> None:
    if not isinstance(model, GraphModule):
        raise ConversionError(
            f"expected what convert_pt2e returns, got {type(model).__name__}: a converted graph "
            "is a torch.fx.GraphModule"
        )
    if lifted := why_lifted(model):
        raise ConversionError(lifted)
    for node in model.graph.nodes:
        if is_observer(node):
            raise ConversionError(
                "the graph still has observers: call convert_pt2e(prepared) after calibration"
            )
        if node.op == "call_module" and _is_logger(model.get_submodule(str(node.target))):
            raise ConversionError(
                f"the graph has loggers ({node.name}), behind which integers are no longer seen: "
                "hand in what convert_pt2e returned, not what prepare_for_propagation_comparison "
                "made of it"
            )
    if FLOAT_KEY not in model.meta and not any(map(is_dequantize, model.graph.nodes)):
        raise ConversionError(
            "the graph has no quantized tensor: convert a graph that was prepared with a quantizer "
            "by convert_pt2e(prepared), without use_reference_representation=True, which writes "
            "integers as float ops"
        )


def _is_logger(module: torch.nn.Module) -> bool:
    """Whether torchao's comparison of two graphs put it there; the class is in a private module."""
    return type(module).__name__ == "OutputLogger"


def _integer_op(
    model: GraphModule, node: Node, integer: dict[Node, QuantizedOp], backend: Backend
) -> QuantizedOp | str:
    """The op that ``node`` anchors, or why it is float."""
    rule = rule_of(node)
    if rule is None:
        return unknown_op(node)
    match = rule.match(rule, node)
    if isinstance(match, str):
        return match
    support = backend.support(rule)
    reason = support.float_reason or support.refuses(match)
    if reason:
        return reason
    if rule is GETITEM:
        split = integer.get(match.inputs[0])
        if split is None:
            return "the split before it is in float"
        inputs: tuple[QParams, ...] = (split.output,)
    else:
        for source in match.inputs:
            if not is_dequantize(source):
                return f"its input {describe(source)} is in float"
            if has_zero_points(model, source):
                return "its input has a zero point for each channel, which no kernel has"
            if not is_static(source):
                return "its input is quantized at run time"
        inputs = tuple(qparams_of(model, source) for source in match.inputs)
    if any(inputs[i].zero_point != 0 for i in support.requires_symmetric):
        return "the zero point of its second operand is not 0"
    return _with_output(model, match, inputs, support)


def _run_time_op(model: GraphModule, node: Node, backend: Backend) -> RunTimeOp | None:
    """A layer that the backend computes on integers chosen at run time, if ``node`` is one."""
    match = match_of(node)
    if backend.run_time is None or match is None or match.weight is None:
        return None
    (data,), weight, bias = match.inputs, match.weight, match.bias
    if not backend.run_time.shared(match):
        return None
    if data.target is not DEQUANTIZE_DYNAMIC or (bias is not None and not is_constant(bias)):
        return None
    grouped = weight.target is DEQUANTIZE_GROUPED
    if is_dequantize(weight) and (
        has_zero_points(model, weight) or qparams_of(model, weight).zero_point != 0
    ):
        return None
    if not (grouped or is_dequantize(weight)) or not is_constant(weight.args[0]):
        return None
    integers = constant_of(model, cast(Node, weight.args[0]))
    if integers.dtype != torch.int8:
        return None  # wider ones are emulated in float
    if grouped:
        scale = constant_of(model, cast(Node, weight.args[2]))
    else:
        scale = torch.as_tensor(qparams_of(model, weight).scale, dtype=torch.float32)
    return RunTimeOp(
        match,
        source=cast(Node, cast(Node, data.args[0]).args[0]),
        weight=integers,
        weight_scale=scale if scale.dim() else scale.expand(len(integers)),
        bias=None if bias is None else constant_of(model, bias),
    )


def _with_output(
    model: GraphModule, match: PatternMatch, inputs: tuple[QParams, ...], support: Support
) -> QuantizedOp | str:
    rule, node, bounds, output_node = match.rule, match.node, None, match.node
    if rule is SPLIT:
        return QuantizedOp(match, inputs, inputs[0], node)
    users = effective_users(node)
    clamp = match_of(users[0]) if len(users) == 1 and support.fuses else None
    if clamp is not None and clamp.rule.bounds is not None and clamp.rule.family in rule.fuses:
        output_node = clamp.node
        bounds = clamp.rule.bounds(output_node)
        users = effective_users(output_node)
    if len(users) != 1 or not is_quantize(users[0]):
        why = support.float_output(match)
        return f"its result is used in float: {why}" if why else "its result is used in float"
    if has_zero_points(model, users[0]):
        return "its result has a zero point for each channel, which no kernel has"
    output = qparams_of(model, users[0])
    if rule.moves_values and any(not output.same_grid(q) for q in inputs):
        return "it moves values between different scales"
    if match.weight is None:
        constants = {
            arg: constant_of(model, arg)
            for arg in node.args
            if isinstance(arg, Node) and is_constant(arg)
        }
        return QuantizedOp(match, inputs, output, output_node, bounds=bounds, constants=constants)
    if not is_dequantize(match.weight) or not is_constant(match.weight.args[0]):
        return "its weight is in float"
    if has_zero_points(model, match.weight) or qparams_of(model, match.weight).zero_point != 0:
        return "its weight has zero points, which no kernel has: another quantizer chose them"
    bias = _bias_integers(model, match)
    if isinstance(bias, str):
        return bias
    return QuantizedOp(
        match,
        inputs,
        output,
        output_node,
        weight=constant_of(model, cast(Node, match.weight.args[0])),
        weight_qparams=qparams_of(model, match.weight),
        bias=bias,
        bounds=bounds,
    )


def _bias_integers(model: GraphModule, match: PatternMatch) -> Tensor | str | None:
    """The bias in units of the accumulator: integers of a narrow bias are shifted left."""
    bias = match.bias
    if bias is None:
        return None
    if not (is_dequantize(bias) and is_constant(bias.args[0])):
        return "its bias is in float"
    integers = constant_of(model, cast(Node, bias.args[0]))
    weight_scale = torch.as_tensor(qparams_of(model, cast(Node, match.weight)).scale)
    unit = derived_scale(
        cast(float, qparams_of(model, match.inputs[0]).scale),
        expand_channels(weight_scale, match),
    )
    ratio = torch.as_tensor(qparams_of(model, bias).scale) / unit
    fraction, exponent = torch.frexp(ratio)
    if not bool(((fraction == 0.5) & (exponent >= 1)).all()):
        raise ConversionError(
            f"{describe(match.node)}: the scale of its bias is not input scale x weight scale; "
            "convert a graph that was prepared with IntegerQuantizer"
        )
    return integers << (exponent - 1).to(torch.int32)
