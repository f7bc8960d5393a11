"""Sums, products and clamps keep what the registry promises."""

from __future__ import annotations

from support.contracts import IntegerContract


class TestContract(IntegerContract):
    families = ("add", "sub", "mul", "relu", "clamp")
