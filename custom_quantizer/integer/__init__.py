"""The integer-only reference of a converted graph."""

from custom_quantizer.integer.reference import IntegerReference, integer_reference

__all__ = ["IntegerReference", "integer_reference"]
