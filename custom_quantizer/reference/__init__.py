"""The integer-only reference of a converted graph, and its integers for other hardware."""

from custom_quantizer.reference.accumulators import Accumulator, accumulators
from custom_quantizer.reference.bundle import IntegerBundle, load_integers, save_integers
from custom_quantizer.reference.interpreter import IntegerReference, integer_reference

__all__ = [
    "Accumulator",
    "IntegerBundle",
    "IntegerReference",
    "accumulators",
    "integer_reference",
    "load_integers",
    "save_integers",
]
