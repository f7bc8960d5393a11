"""Lowering to XNNPACK through ExecuTorch, reading a ``.pte`` back, running it.

The only package that imports executorch.
"""

from custom_quantizer.backends.xnnpack.lowering import lower
from custom_quantizer.backends.xnnpack.program import (
    LoweredProgram,
    LoweringReport,
    OpBackend,
    StoredProgram,
    load_program,
)
from custom_quantizer.backends.xnnpack.readback import ProgramContents, read_program

__all__ = [
    "LoweredProgram",
    "LoweringReport",
    "OpBackend",
    "ProgramContents",
    "StoredProgram",
    "load_program",
    "lower",
    "read_program",
]
