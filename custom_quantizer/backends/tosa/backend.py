"""TOSA as a :class:`~custom_quantizer.ops.backend.Backend`, without importing its tools."""

from __future__ import annotations

from custom_quantizer.backends.tosa.arithmetic import TOSA
from custom_quantizer.backends.tosa.kernels import OUTSIDE, SUPPORT, refuses_tensor
from custom_quantizer.backends.tosa.legalize import FORMS
from custom_quantizer.ops.backend import Backend
from custom_quantizer.ops.rewrites.legalization import legalize_by

__all__ = ["BACKEND"]

BACKEND = Backend(
    name="tosa",
    title="TOSA",
    arithmetic=TOSA,
    kernels=SUPPORT,
    missing=OUTSIDE,
    legalize=lambda model, training: legalize_by(model, FORMS, training=training),
    refuses_tensor=refuses_tensor,
)
"""What becomes of ops in the integer profile of TOSA 1.0, with its extensions for int16 and int4.

Biases are int32, or 48 bits behind 16-bit activations, and written as they are, so that any size
will do. There is no float in that profile: what is not computed on integers stays outside.
"""
