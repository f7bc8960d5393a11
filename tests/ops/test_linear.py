"""Linear layers keep what the registry promises."""

from __future__ import annotations

from support.contracts import GemmContract


class TestContract(GemmContract):
    families = ("linear",)
