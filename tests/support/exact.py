"""Models and data of which float32 computes every sum exactly, whatever the order.

Kernels of PyTorch add products in an order that depends on the CPU, its number of threads and the
sizes of the tensors. Where all terms of a sum are multiples of one power of two (the unit) and
their absolute values add up to less than 2**24 units, no partial sum is rounded, with or without
fused multiply-add, so that every order gives the same bits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["assert_sums_are_exact", "on_grid", "put_on_grid"]

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
