"""SHA-256 of the files that are written together, as the report beside them records it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

__all__ = ["GRAPH_SUFFIX", "Kind", "recorded_hash", "sha256_of"]

Kind = Literal["program", "graph"]

GRAPH_SUFFIX = ".graph.safetensors"
"""How names of graph files end."""

_LARGEST_REPORT = 64 << 20


def sha256_of(data: bytes | memoryview) -> str:
    """Hash of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def recorded_hash(path: str | os.PathLike[str], kind: Kind) -> tuple[Path, str] | None:
    """What a report beside a file says of it.

    Args:
        path: of the file.
        kind: which of the files of a result it is.

    Returns:
        The report and the SHA-256 in it; ``None`` where there is no report of this file.
    """
    file = Path(path)
    stem = file.name.removesuffix(GRAPH_SUFFIX if kind == "graph" else file.suffix)
    for report in (file.with_name(f"{stem}.json"), file.with_name("report.json")):
        try:
            if not report.is_file() or report.stat().st_size > _LARGEST_REPORT:
                continue
            entry = json.loads(report.read_bytes())["files"][kind]
            if entry["file"] == file.name and isinstance(entry["sha256"], str):
                return report, entry["sha256"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # no report of ours
    return None
