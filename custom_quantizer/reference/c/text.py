"""C text: constants, initializers of structs, names and comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from custom_quantizer.reference.numpy_runner import Array

__all__ = [
    "Constants",
    "Fields",
    "Loop",
    "comment",
    "identifier",
    "initializer",
    "integers",
    "label",
    "packed_nibbles",
    "real",
    "text_of",
]

_SHORT = 16
"""Arrays of so many elements have names of their own, also where they are equal."""


@dataclass
class Constants:
    """Constant arrays of the network; long ones that are equal are written once.

    Attributes:
        total: bytes of all.
    """

    total: int = 0
    _arrays: dict[str, tuple[str, Array]] = field(default_factory=dict)
    _names: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def add(self, name: str, ctype: str, values: Array) -> str:
        """Name of an array of these values."""
        dtype = np.dtype(ctype.removesuffix("_t"))
        array = np.ascontiguousarray(values, dtype=dtype).reshape(-1)
        # What is as short as a name is not worth being read under another's.
        key = (ctype, (name.encode() if array.size <= _SHORT else b"") + array.tobytes())
        if key not in self._names:
            count, free = 1, name
            while free in self._arrays:  # a.b and a_b are different tensors
                free = f"{name}_{count}"
                count += 1
            self._names[key] = free
            self._arrays[free] = (ctype, array)
            self.total += array.nbytes
        return self._names[key]

    def declarations(self) -> list[str]:
        """One line for each array, for the code that reads it."""
        return [
            f"extern const {ctype} {name}[{array.size}];"
            for name, (ctype, array) in self._arrays.items()
        ]

    def definitions(self) -> list[str]:
        """All arrays with their values."""
        return [
            f"const {ctype} {name}[{array.size}] = {{\n{integers(array)}\n}};\n"
            for name, (ctype, array) in self._arrays.items()
        ]


def integers(array: Array) -> str:
    """Comma-separated integers in lines of at most 100 characters."""
    # INT32_MIN has no literal of its type.
    words = ["(-2147483647 - 1)" if v == -(2**31) else str(v) for v in array.tolist()]
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) + 2 > 100:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([*lines, line])


def packed_nibbles(weight: Array) -> Array:
    """Two 4-bit integers to a byte, the first in the lower half."""
    flat = weight.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
    packed: Array = flat[0::2] | (flat[1::2] << 4)
    return packed


@dataclass(frozen=True)
class Loop:
    """An array whose length differs from op to op: written beside the struct that points to it."""

    numbers: Sequence[int]


Fields: TypeAlias = "dict[str, int | str | Sequence[int] | Loop | Fields]"
"""Members of a C struct in order: numbers, expressions, arrays of numbers, structs."""


def text_of(lines: Iterable[str]) -> str:
    """A file of these lines."""
    return "\n".join(lines) + "\n"


def identifier(name: str) -> str:
    """A name as C takes it; different names may become the same."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def comment(text: str) -> str:
    """Text that may stand in a C comment, in ASCII and on one line."""
    plain = ascii(text)[1:-1]
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("??/", "?? /")


def label(op: Mapping[str, Any]) -> str:
    """Name, kind and module of an op, for a comment."""
    module = f" ({op['module']})" if op["module"] else ""
    return comment(f"{op['name']}: {op['op']}{module}")


def real(value: float) -> str:
    """A float literal with as few digits as give the same float."""
    return f"{np.float32(value)!s}f"


def initializer(members: Fields, name: str, arrays: list[str]) -> str:
    """A C initializer; arrays of any length are definitions of their own."""
    parts: list[str] = []
    for key, value in members.items():
        if isinstance(value, dict):
            text = initializer(value, f"{name}_{key}", arrays)
        elif isinstance(value, Loop):
            text = f"{name}_{key}" if value.numbers else "0"
            if value.numbers:
                listed = ", ".join(map(str, value.numbers))
                arrays.append(
                    f"static const int32_t {name}_{key}[{len(value.numbers)}] = {{{listed}}};"
                )
        elif isinstance(value, str):
            text = value
        elif isinstance(value, int):
            text = str(int(value)) if value != -(2**31) else "(-2147483647 - 1)"
        else:
            text = "{" + ", ".join(map(str, value)) + "}"
        parts.append(f".{key} = {text}")
    return "{" + ", ".join(parts) + "}"
