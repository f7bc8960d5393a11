"""The TOSA tools, which serialize and run TOSA programs: an optional package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from custom_quantizer.errors import LoweringError

__all__ = ["PACKAGES", "reference_model", "require"]

PACKAGES = ("tosa-tools==2026.5.0", "ml-dtypes==0.5.1")
"""What ExecuTorch 1.5 asks for (its extra ``vgf``), and what of its requirements is used here.

The others are older versions of packages that are installed anyway, so ``--no-deps`` is advised.
"""


def require() -> None:
    """Raise ``LoweringError`` unless the tools can be imported."""
    for name in ("ml_dtypes", "tosa_serializer", "tosa_reference_model"):
        _import(name)


def reference_model() -> Any:
    """The module ``tosa_reference_model``.

    Raises:
        LoweringError: it is not installed.
    """
    return _import("tosa_reference_model")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise LoweringError(
            f"lowering to TOSA needs the TOSA tools ({error}); install them with: "
            f"pip install --no-deps {' '.join(PACKAGES)}"
        ) from error
