"""What a file is that somebody named in the place of another: told by its first bytes."""

from __future__ import annotations

import io
import json
import zipfile

__all__ = ["PT2_FILE", "kind_of_file"]

PT2_FILE = "a .pt2 file of torch.export"


def kind_of_file(data: bytes | memoryview) -> str:
    """What a file is, as in "is a .npz file of NumPy arrays"; empty where nobody can tell."""
    head = bytes(data[:64])
    if head[:4] == b"PK\x03\x04":
        return _kind_of_archive(data)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < len(data):
        return _kind_of_safetensors(data)
    for kind, (begin, what) in _KINDS.items():
        if head[begin : begin + len(kind)] == kind:
            return what
    return ""


_KINDS = {
    b"ET": (4, "a .pte, a program of ExecuTorch"),
    b"BP": (4, "a .bpte, a program bundled with inputs"),
    b"FT": (4, "a .ptd, weights that a .pte keeps outside"),
    b"\x93NUMPY": (0, "a .npy file, an array of NumPy"),
    b"{": (0, "JSON, as a report of this package is"),
    b"<!": (0, "a page of HTML"),
    b"version:": (0, "a config file in YAML"),
}
"""How a file begins, and where."""


def _kind_of_archive(data: bytes | memoryview) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
            names = archive.namelist()
    except Exception:  # a damaged one, of which zipfile has many kinds of errors
        return "a damaged zip archive"
    last = {name.rpartition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return "a .npz file, arrays of NumPy"
    if last & {"archive_format", "serialized_exported_program.json"}:
        return PT2_FILE
    if "data.pkl" in last:
        return "a file of torch.save"
    return "a zip archive"


def _kind_of_safetensors(data: bytes | memoryview) -> str:
    length = int.from_bytes(bytes(data[:8]), "little")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        about = " ".join(header.get("__metadata__", {}))
    except (ValueError, AttributeError, RecursionError):
        return "a damaged .safetensors file"
    for kind, what in _OURS.items():
        if f"custom_quantizer.{kind}" in about:
            return what
    return "a .safetensors file of tensors"


_OURS = {
    "graph": "a saved graph (.graph.safetensors)",
    "statistics": "statistics of a calibration",
    "integers": "the tensors of an integer bundle",
}
