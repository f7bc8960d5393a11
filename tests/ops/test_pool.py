"""Pooling and means keep what the registry promises."""

from __future__ import annotations

from support.contracts import IntegerContract


class TestContract(IntegerContract):
    together = True
    families = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean")
