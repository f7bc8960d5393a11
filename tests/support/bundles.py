"""Bundles that were changed and signed again: what a reader sees who checks the SHA-256 only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from custom_quantizer.reference.numpy_runner import checksum

__all__ = ["signed", "write_signed"]


def signed(document: Any) -> bytes:
    """The text of a description with a checksum that fits, if it has one at all."""
    if isinstance(document, dict) and "checksum" in document:
        document["checksum"] = "0" * 64
    text = json.dumps(document).encode()
    zeros = "0" * 64
    return text.replace(zeros.encode(), checksum(text, zeros).encode(), 1)


def write_signed(document: Any, path: Path) -> None:
    """Replace the description of the bundle at ``path``."""
    path.with_suffix(".json").write_bytes(signed(document))
