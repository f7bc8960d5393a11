"""Numbers made of dynamic sizes by functions that ExecuTorch's runtime has for tensors only."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import Builder, graph_pass, replace
from custom_quantizer.core.graph import (
    add_constant,
    argument,
    is_float32,
    is_number,
    shape_of,
)
from custom_quantizer.errors import LoweringError
from custom_quantizer.ops.elementwise import ADD, MUL, SUB
from custom_quantizer.ops.functions import DIV

aten = torch.ops.aten


@graph_pass(
    "powers and roots of dynamic sizes",
    "products of sizes, and float64 tensors of one number that sums and products read",
    requires={"functions_of_sizes"},
)
def powers_of_sizes(model: GraphModule) -> int:
    """What is a float in Python is a float64 number in the program, computed outside.

    Raises:
        LoweringError: something else reads such a number.
    """
    count = _whole_powers(model)
    found: dict[Node, Node | None] = {}
    for node in list(model.graph.nodes):
        if node.target not in _READERS or not is_float32(node):
            continue
        if node.target is aten.rsub.Scalar and argument(node, 2, "alpha", 1) != 1:
            continue
        read = [arg for arg in node.args[:2] if isinstance(arg, Node) and _is_foreign(arg)]
        for number in dict.fromkeys(read):
            tensor = _tensor(model, number, found)
            if tensor is not None:
                build = Builder(model, node, number.name)
                value = build.call(aten.to.dtype, tensor, torch.float32)
                if not shape_of(node):
                    value = build.call(aten.view_copy.default, value, [])
                node.args = tuple(value if arg is number else arg for arg in node.args)
                _read_tensor(node)
                count += 1
    if found or any(node.target in _FOREIGN for node in model.graph.nodes):
        model.graph.eliminate_dead_code()
    _refuse_others(model)
    return count


def _whole_powers(model: GraphModule) -> int:
    count = 0
    for node in list(model.graph.nodes):
        if node.target is not operator.pow:
            continue
        base, exponent = node.args
        if not (isinstance(base, Node) and isinstance(exponent, int) and 0 < exponent <= _MOST):
            continue
        power = base
        for _ in range(exponent - 1):
            value = power.meta["val"] * base.meta["val"]
            with model.graph.inserting_before(node):
                power = model.graph.call_function(operator.mul, (power, base))
            power.meta["val"] = value
        replace(node, power)
        count += 1
    return count


_MOST = 4
"""Largest power that is written as a product."""


def _is_foreign(number: Node) -> bool:
    """Whether a number is made by a function that the runtime lacks, or of such numbers."""
    waiting, seen = [number], {number}
    while waiting:
        node = waiting.pop()
        if node.target in _FOREIGN and is_number(node):
            return True
        near = [source for source in node.all_input_nodes if is_number(source)]
        waiting += [source for source in near if source not in seen]
        seen.update(near)
    return False


def _tensor(model: GraphModule, number: Node, found: dict[Node, Node | None]) -> Node | None:
    """A number as a tensor of float64; ``None``: there is no such op of tensors."""
    if number not in found:
        found[number] = _made(model, number, found)
    return found[number]


def _made(model: GraphModule, number: Node, found: dict[Node, Node | None]) -> Node | None:
    build = Builder(model, number)

    def constant(value: float) -> Node:
        tensor = torch.tensor([value], dtype=torch.float64)
        return add_constant(model, f"{number.name}_constant", tensor, number)

    if isinstance(number.meta.get("val"), (int, torch.SymInt)) and not _is_foreign(number):
        behind = Builder(model, number.next, number.name)
        return behind.call(aten.mul.Tensor, constant(1.0), number)
    steps = _AS_TENSORS.get(number.target)
    if steps is None or number.kwargs:
        return None
    parts = [
        _tensor(model, arg, found) if isinstance(arg, Node) else constant(float(cast(float, arg)))
        for arg in number.args
    ]
    return None if None in parts else steps(build, *parts)


def _refuse_others(model: GraphModule) -> None:
    for node in model.graph.nodes:
        if node.target in _FOREIGN and is_number(node):
            readers = ", ".join(user.name for user in node.users)
            raise LoweringError(
                f"{node.name} is a number made of a dynamic size, by {node.target.__name__}, which "
                f"ExecuTorch's runtime lacks where {readers} reads it; sums, products, quotients "
                "and powers of float32 tensors may have it; or keep the size fixed"
            )


_FOREIGN = frozenset({operator.abs, operator.pow, math.floor, torch.sym_sqrt})
"""Functions of numbers that programs do not have."""


def _call(target: Any) -> Callable[..., Node]:
    return lambda build, *parts: build.call(target, *parts)


_AS_TENSORS: Mapping[Any, Callable[..., Node]] = {
    operator.abs: _call(aten.abs.default),
    operator.add: _call(aten.add.Tensor),
    operator.mul: _call(aten.mul.Tensor),
    operator.neg: _call(aten.neg.default),
    operator.pow: _call(aten.pow.Tensor_Tensor),
    operator.sub: _call(aten.sub.Tensor),
    operator.truediv: _call(aten.div.Tensor),
    math.ceil: _call(aten.ceil.default),
    math.floor: _call(aten.floor.default),
    torch.sym_sqrt: _call(aten.sqrt.default),
    torch.sym_float: lambda _build, part: part,
    torch.sym_max: _call(aten.maximum.default),
    torch.sym_min: _call(aten.minimum.default),
}


def _read_tensor(node: Node) -> None:
    if node.target is aten.rsub.Scalar:
        node.target, node.args = aten.sub.Tensor, (node.args[1], node.args[0], *node.args[2:])
    elif node.target is aten.pow.Tensor_Scalar:
        node.target = aten.pow.Tensor_Tensor


_READERS = (
    ADD.targets
    | SUB.targets
    | MUL.targets
    | DIV.targets
    | {aten.pow.Tensor_Scalar, aten.rsub.Scalar}
)
