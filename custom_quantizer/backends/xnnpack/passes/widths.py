"""Activations of other widths than 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import (
    GEMMS,
    Builder,
    dequantized_constant,
    graph_pass,
    is_wide,
    only_moves,
    origin_of,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    add_constant,
    is_constant,
    is_dequantize,
    is_quantize,
    tensor_meta,
)
from custom_quantizer.ops import rule_of
from custom_quantizer.ops.elementwise import CLAMP, RELU

aten = torch.ops.aten


@graph_pass("activations of 2 to 7 bits", "int8 with a clamp", requires={"split_activations"})
def narrow_activations(model: GraphModule) -> int:
    """Activations below 8 bits run on int8 kernels that clamp to the narrower range."""
    count = 0
    for node in list(model.graph.nodes):
        if node.target is not QUANTIZE_PER_TENSOR or node.args[-1] != torch.int8:
            continue
        low, high = cast(int, node.args[3]), cast(int, node.args[4])
        if (low, high) == (-128, 127):
            continue
        users = [user for user in node.users if is_dequantize(user)]
        if not _passes_on(node):
            _clamp_before(model, node, low, high)
        for declared in (node, *users):
            declared.args = (*declared.args[:3], -128, 127, torch.int8)
        count += 1
    for node in list(model.graph.nodes):
        # Constants, and inputs that are integers, need no clamp, only the declaration.
        if node.target is not DEQUANTIZE_PER_TENSOR or node.args[-1] != torch.int8:
            continue
        source = cast(Node, node.args[0])
        weight = is_constant(source) and any(user.target in GEMMS for user in node.users)
        if not weight and not is_quantize(source):
            node.args = (*node.args[:3], -128, 127, torch.int8)
    return count


def _passes_on(quantize: Node) -> bool:
    """Whether a quantize node repeats what is quantized already, moved but not changed."""
    move = quantize.args[0]
    if not isinstance(move, Node) or not only_moves(move):
        return False
    sources = move.all_input_nodes
    return bool(sources) and all(
        is_dequantize(source) and source.args[1:3] == quantize.args[1:3] for source in sources
    )


def _clamp_before(model: GraphModule, quantize: Node, low: int, high: int) -> None:
    source = cast(Node, quantize.args[0])
    scale, zero_point = cast(float, quantize.args[1]), cast(int, quantize.args[2])
    bottom, top = (low - zero_point) * scale, (high - zero_point) * scale
    build = Builder(model, quantize, origin_of(source))
    rule = rule_of(source)
    if source.target in GEMMS:
        clamped = build.call(aten.hardtanh.default, source, bottom, top)
    elif rule in (RELU, CLAMP) and cast(Node, source.args[0]).target in GEMMS:
        bounds = cast(Callable[[Node], tuple[float | None, float | None]], cast(Any, rule).bounds)
        lower, upper = bounds(source)
        bottom = bottom if lower is None else max(bottom, lower)
        top = top if upper is None else min(top, upper)
        clamped = build.call(aten.hardtanh.default, source.args[0], bottom, top)
    else:
        params = (scale, zero_point, -128, 127, torch.int8)
        stored = build.call(QUANTIZE_PER_TENSOR, source, *params)
        wide = build.call(DEQUANTIZE_PER_TENSOR, stored, *params)
        clamped = build.call(aten.hardtanh.default, wide, bottom, top)
    quantize.args = (clamped, *quantize.args[1:])


@graph_pass(
    "quantization above 8 bits",
    "float ops that round to the same grid, ties up instead of to even",
    exact=False,
    requires={"narrow_activations"},
)
def emulate_wide(model: GraphModule) -> int:
    """Quantization above 8 bits becomes float ops that round to the same grid.

    ``clamp(floor(x * (1 / s) + 0.5), quant_min, quant_max) * s``: XNNPACK has kernels for each in
    float, so the op and its neighbours stay in one delegate. Ties round up instead of to even.
    """
    count = 0
    constants: dict[tuple[float, ...], Node] = {}
    # Before the dequantize nodes that tell it are gone.
    passing = {node for node in model.graph.nodes if is_quantize(node) and _passes_on(node)}
    for node in list(model.graph.nodes):
        if node.target is DEQUANTIZE_PER_TENSOR and is_wide(node):
            source = cast(Node, node.args[0])
            if is_constant(source):
                node.replace_all_uses_with(dequantized_constant(model, node, node))
                count += 1
            elif source.op == "placeholder":
                node.replace_all_uses_with(_dequantized_input(model, node, source, constants))
                count += 1
        if node.target is not QUANTIZE_PER_TENSOR or not is_wide(node):
            continue
        value = cast(Node, node.args[0])
        returned = [user for user in node.users if user.op == "output"]
        if returned or node not in passing:
            value, steps = _round_to_grid(model, node, value, constants)
            for user in returned:
                user.replace_input_with(node, _as_dtype(model, node, steps, node.args[-1]))
        for user in list(node.users):
            user.replace_all_uses_with(value)
        count += 1
    model.graph.eliminate_dead_code()
    return count


def _dequantized_input(
    model: GraphModule, node: Node, source: Node, constants: dict[tuple[float, ...], Node]
) -> Node:
    """The float32 values of an input of integers above 8 bits, whose zero point is 0."""
    build = Builder(model, node, node.name)
    single = torch.tensor([cast(float, node.args[1])], dtype=torch.float32)
    steps = _as_dtype(model, node, source, torch.float32)
    return build.call(aten.mul.Tensor, steps, _number(build, single, constants))


def _as_dtype(model: GraphModule, before: Node, value: Node, dtype: Any) -> Node:
    """The same numbers in another dtype: a kernel outside the delegate, and part of no op."""
    return Builder(model, before, before.name).call(aten.to.dtype, value, dtype)


def _round_to_grid(
    model: GraphModule, node: Node, value: Node, constants: dict[tuple[float, ...], Node]
) -> tuple[Node, Node]:
    """The value rounded to its grid, and the number of steps of the grid that it is."""
    scale = cast(float, node.args[1])
    low, high = cast(int, node.args[3]), cast(int, node.args[4])
    build = Builder(model, node, origin_of(value))
    single = torch.tensor([scale], dtype=torch.float32)
    scaled = build.call(aten.mul.Tensor, value, _number(build, 1.0 / single, constants))
    shifted = build.call(aten.add.Tensor, scaled, _number(build, torch.tensor([0.5]), constants))
    floored = build.call(aten.floor.default, shifted)
    clamped = build.call(aten.hardtanh.default, floored, float(low), float(high))
    return build.call(aten.mul.Tensor, clamped, _number(build, single, constants)), clamped


def _number(build: Builder, value: Tensor, constants: dict[tuple[float, ...], Node]) -> Node:
    key = tuple(value.tolist())
    if key not in constants:
        first = next(iter(build.model.graph.nodes))
        constants[key] = add_constant(build.model, "emulation_constant", value, first)
        if "val" not in constants[key].meta:
            constants[key].meta["val"] = _like(build.anchor, value)
    return constants[key]


def _like(node: Node, value: Tensor) -> Any:
    for other in node.graph.nodes:
        meta = tensor_meta(other)
        mode = getattr(meta, "fake_mode", None)
        if mode is not None:
            return mode.from_tensor(value, static_shapes=True)
    return None
