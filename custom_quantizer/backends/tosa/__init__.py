"""TOSA: what becomes of ops there, lowering through ExecuTorch's arm backend, running the result.

What plans need (:data:`BACKEND`) is here without executorch and without the TOSA tools, which are
imported by the names that lower and run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from custom_quantizer.backends.tosa.backend import BACKEND

if TYPE_CHECKING:
    from custom_quantizer.backends.tosa.checked_lowering import lower
    from custom_quantizer.backends.tosa.program import TosaProgram, TosaReport

__all__ = ["BACKEND", "TosaProgram", "TosaReport", "lower"]

_MODULE_OF = {"lower": "checked_lowering", "TosaProgram": "program", "TosaReport": "program"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
