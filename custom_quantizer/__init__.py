"""PT2E quantization with per-op integer formats and an explicit int32 bias.

The public names; see ``README.md`` for a quick start and ``docs/`` for everything else.
"""

from __future__ import annotations

from custom_quantizer.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ConversionError,
    CustomQuantizerError,
    InputError,
    LoweringError,
    ProgramError,
    SchemeError,
    VerificationError,
)
from custom_quantizer.formats import IntFormat
from custom_quantizer.integer import IntegerReference, integer_reference
from custom_quantizer.planner import OpPlan, Plan, TensorPlan
from custom_quantizer.quantizer import IntegerQuantizer
from custom_quantizer.schemes import OpScheme, TensorScheme, scheme
from custom_quantizer.verify import Verification, verify
from custom_quantizer.xnnpack import (
    LoweredProgram,
    LoweringReport,
    load_program,
    lower,
    read_program,
)

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "ConversionError",
    "CustomQuantizerError",
    "InputError",
    "IntFormat",
    "IntegerQuantizer",
    "IntegerReference",
    "LoweredProgram",
    "LoweringError",
    "LoweringReport",
    "OpPlan",
    "OpScheme",
    "Plan",
    "ProgramError",
    "SchemeError",
    "TensorPlan",
    "TensorScheme",
    "Verification",
    "VerificationError",
    "integer_reference",
    "load_program",
    "lower",
    "read_program",
    "scheme",
    "verify",
]
