"""Models and data of which float32 computes every sum exactly, whatever the order.

Kernels of PyTorch add products in an order that depends on the CPU, its number of threads and the
sizes of the tensors. Where all terms of a sum are multiples of one power of two (the unit) and
their absolute values add up to less than 2**24 units, no partial sum is rounded, with or without
fused multiply-add, so that every order gives the same bits.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.core.bias import derived_scale
from custom_quantizer.core.graph import is_dequantize, is_quantize, qparams_of
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.reference.converted import read_converted

__all__ = ["assert_sums_are_exact", "on_grid", "put_on_grid", "with_dyadic_scales"]

_EXACT = 2.0**24
"""Multiples of the unit up to here are float32 values."""


def on_grid(values: Tensor, unit: float) -> Tensor:
    """Round to multiples of a power of two."""
    return torch.round(values / unit) * unit


def put_on_grid(model: nn.Module, **units: float) -> nn.Module:
    """Round the parameters of submodules, in place, to multiples of a power of two.

    Args:
        model: the model.
        units: by name of the submodule.
    """
    for name, unit in units.items():
        for parameter in model.get_submodule(name).parameters():
            parameter.data = on_grid(parameter.data, unit)
    return model


def assert_sums_are_exact(model: nn.Module, x: Tensor, unit: float) -> None:
    """Fail unless the bound above holds for everything the model computes.

    Args:
        model: of layers that add products, means over a power of two of values, and functions
            that are monotone and keep the sign.
        x: its input.
        unit: of the result, which is the least of all layers: units multiply from layer to layer.
    """
    bound = copy.deepcopy(model).double()
    for parameter in bound.parameters():
        parameter.data = parameter.data.abs()
    with torch.no_grad():
        assert float(bound(x.double().abs()).max()) < _EXACT * unit
        assert float(bound(x.double().abs()).min()) > 0
        exact = model.double()(x.double())
        assert torch.equal(model.float()(x).double(), exact)


def with_dyadic_scales(converted: GraphModule) -> GraphModule:
    """A copy of a converted graph with the powers of two next to its scales.

    Products and sums of its integers are exact in float32 then (asserted), and what they are
    divided by in means is applied once: no kernel may differ from another.
    """
    graph = copy.deepcopy(converted)
    nodes = {node.name: node for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            _set_scale(graph, node, _power_of_two(torch.as_tensor(qparams_of(graph, node).scale)))
    for op in read_converted(converted).integer:
        if op.weight is None:
            continue
        bias = 0
        if op.bias is not None:
            data, weight, to = (
                nodes[cast(Node, node).name]
                for node in (op.match.inputs[0], op.match.weight, op.match.bias)
            )
            of_weight = torch.as_tensor(qparams_of(graph, weight).scale)
            of_data = cast(float, qparams_of(graph, data).scale)
            _set_scale(graph, to, derived_scale(of_data, expand_channels(of_weight, op.match)))
            bias = int(op.bias.abs().max())
        terms = op.weight.abs().to(torch.int64).sum()  # of all outputs: more than those of one
        assert int(terms) * 256 + bias < _EXACT
    graph.recompile()
    return graph


def _power_of_two(scale: Tensor) -> Tensor:
    return torch.exp2(torch.round(torch.log2(scale.to(torch.float64)))).to(torch.float32)


def _set_scale(graph: GraphModule, node: Node, scale: Tensor) -> None:
    given: Any = node.args[1]
    if isinstance(given, Node):
        graph.get_buffer(str(given.target)).copy_(scale)
    else:
        node.args = (node.args[0], float(scale), *node.args[2:])
