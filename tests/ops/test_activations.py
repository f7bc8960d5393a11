"""Activation functions keep what the registry promises; their tables: test_functions.py."""

from __future__ import annotations

from support.contracts import IntegerContract


class TestContract(IntegerContract):
    together = True
    families = (
        "elu",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "leaky_relu",
        "prelu",
        "sigmoid",
        "silu",
        "tanh",
    )
