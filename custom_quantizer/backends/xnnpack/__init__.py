"""XNNPACK: what becomes of ops there, lowering through ExecuTorch, reading a ``.pte`` back.

What plans need (:data:`BACKEND`) is here without executorch, which is imported by the names that
lower, load and read programs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from custom_quantizer.backends.xnnpack.backend import BACKEND

if TYPE_CHECKING:
    from custom_quantizer.backends.xnnpack.checked_lowering import lower
    from custom_quantizer.backends.xnnpack.contents import ProgramContents
    from custom_quantizer.backends.xnnpack.program import (
        LoweredProgram,
        LoweringReport,
        OpBackend,
        StoredProgram,
        load_program,
    )
    from custom_quantizer.backends.xnnpack.readback import read_program

__all__ = [
    "BACKEND",
    "LoweredProgram",
    "LoweringReport",
    "OpBackend",
    "ProgramContents",
    "StoredProgram",
    "load_program",
    "lower",
    "read_program",
]

_MODULE_OF = {
    "lower": "checked_lowering",
    "LoweredProgram": "program",
    "LoweringReport": "program",
    "OpBackend": "program",
    "StoredProgram": "program",
    "load_program": "program",
    "ProgramContents": "readback",
    "read_program": "readback",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
