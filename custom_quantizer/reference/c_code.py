"""Writes a converted network as C99 that computes on integers alone.

The code is made from the integer bundle (:mod:`custom_quantizer.reference.bundle`), so there is one
description of what is computed, and NumPy runs the same one. What is written for each network are
its constants and straight-line calls of kernels; the kernels are the same files for every network
(``reference/c/cq_kernels.c``), so that several networks can share them in one firmware.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import GraphModule

from custom_quantizer.core.files import new_directory, write_files_atomic
from custom_quantizer.errors import InputError
from custom_quantizer.reference.bundle import integers_of
from custom_quantizer.reference.c.network import Network
from custom_quantizer.reference.c.ops import write_network
from custom_quantizer.reference.numpy_runner import Array, BundleError, NumpyReference

__all__ = ["CCode", "save_c"]

# fmt: off
_KEYWORDS = frozenset({
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum",
    "extern", "float", "for", "goto", "if", "inline", "int", "long", "main", "register", "restrict",
    "return", "short", "signed", "sizeof", "static", "struct", "switch", "typedef", "union",
    "unsigned", "void", "volatile", "while",
})
# fmt: on


@dataclass(frozen=True)
class CCode:
    """What :func:`save_c` wrote, and what it needs on the device.

    Attributes:
        folder: where the files are.
        files: their names.
        constant_bytes: weights, biases, tables, multipliers and shifts: read-only memory, besides
            the code itself.
        arena_bytes: activations: one static buffer whose parts are used again.
        scratch_bytes: accumulators of a row, or the values under a window, of one op at a time.
        peak_bytes: of the activations in the arena that are needed at one time, at most: no plan of
            an arena can be smaller.
    """

    folder: Path
    files: tuple[str, ...]
    constant_bytes: int
    arena_bytes: int
    scratch_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.files)} files; {self.constant_bytes:,} bytes of constants, "
            f"{self.arena_bytes:,} bytes of activations, {self.scratch_bytes:,} bytes of scratch"
        )


def save_c(
    converted: GraphModule,
    folder: str | os.PathLike[str],
    *,
    name: str = "net",
    batch: int | None = None,
    inputs: Sequence[Any] | None = None,
    vectors: int = 2,
) -> CCode:
    """Write a converted network as integer-only C99: mode ``fixed_point`` of the reference.

    ``<name>.h`` and ``<name>.c`` hold one function, ``<name>_run``; ``<name>_constants.c`` weights,
    biases and tables (4-bit weights two to a byte); ``cq_kernels.h`` and ``.c`` the kernels, the
    same for every network; ``<name>_test.c`` a test with inputs and the integers that
    :mod:`~custom_quantizer.reference.numpy_runner` computes from them; a ``Makefile``, of which
    ``make test`` builds and runs that test, and a ``CMakeLists.txt``.

    The code needs no float, no allocation and no C library but ``<stdint.h>`` and ``memcpy``.
    Activations lie in one static arena, so the function is not reentrant.

    Args:
        converted: what ``convert_pt2e`` returns; every op of it in integers.
        folder: a new directory, or an existing one, whose files of these names are replaced.
        name: prefix of files and names, a C identifier.
        batch: first dimension of the inputs; ``None``: the captured one, 1 if it was dynamic.
        inputs: of the first test vector, in the order of the model's: float32, or integers where
            the model takes these; the others, and all of them if ``None``, are random integers
            over the whole range of each input.
        vectors: number of test vectors.

    Raises:
        ConversionError: an op is left in float, or is out of reach of the format, see
            :func:`~custom_quantizer.reference.bundle.save_integers`; a size other than the batch
            was dynamic at capture; or an accumulator needs more than the 48 bits of its rounding.
        InputError: ``name`` is no identifier; ``batch`` or ``vectors`` is not positive; the inputs
            do not fit; or the files cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _KEYWORDS:
        raise InputError(f"name={name!r} must be a C identifier that starts with a letter")
    if name.startswith("cq_"):
        raise InputError(f"name={name!r}: the prefix cq_ is that of the kernels; choose another")
    for key, number in (("batch", batch), ("vectors", vectors)):
        if number is not None and (type(number) is not int or number < 1):
            raise InputError(f"{key}={number!r} must be a positive whole number")
    reference = NumpyReference(*integers_of(converted))
    code = write_network(reference, name, batch)
    cases = _test_vectors(reference, code, inputs, vectors)
    sources = {
        f"{name}.h": code.header(),
        f"{name}.c": code.source(),
        f"{name}_constants.c": code.constants_source(),
        f"{name}_test.c": code.test_source(cases),
        "Makefile": _filled_in("Makefile.in", name),
        "CMakeLists.txt": _filled_in("CMakeLists.txt.in", name),
        "cq_kernels.h": _packaged("cq_kernels.h"),
        "cq_kernels.c": _packaged("cq_kernels.c"),
    }
    target = Path(folder)
    files: dict[str | os.PathLike[str], bytes] = {
        target / file: text.encode("utf-8") for file, text in sources.items()
    }
    if target.is_dir():
        write_files_atomic(files)
    else:
        with new_directory(target):
            write_files_atomic(files)
    return CCode(
        target,
        tuple(sources),
        code.constants.total,
        code.arena_bytes,
        code.scratch_bytes,
        code.peak_bytes,
    )


def _packaged(file: str) -> str:
    source = importlib.resources.files("custom_quantizer.reference") / "c" / file
    return source.read_text(encoding="utf-8")


def _filled_in(file: str, name: str) -> str:
    return _packaged(file).replace("@NAME@", name)


def _test_vectors(
    reference: NumpyReference, code: Network, inputs: Sequence[Any] | None, count: int
) -> list[tuple[dict[str, Array], list[Array]]]:
    """Stored inputs by tensor name, and the stored outputs that NumPy computes from them."""
    rng = np.random.default_rng(0)
    cases: list[tuple[dict[str, Array], list[Array]]] = []
    for index in range(count):
        if index == 0 and inputs is not None:
            stored = _quantized(reference, code, inputs)
        else:
            stored = {
                name: rng.integers(
                    info.quant_min, info.quant_max + 1, code.shapes[name], dtype=np.int64
                ).astype(info.dtype)
                for name in code.inputs
                for info in [reference.tensors[name]]
            }
        try:
            values = {**reference.constants, **reference.run(stored)}
        except BundleError as exc:
            raise InputError(f"the test vectors cannot be computed: {exc}") from exc
        cases.append((stored, [values[name] for name in code.outputs]))
    return cases


def _quantized(reference: NumpyReference, code: Network, inputs: Sequence[Any]) -> dict[str, Array]:
    try:
        # What is an integer at the model's border stays one; too many or too few are refused there.
        real = [entry["dtype"] == "float32" for entry in reference.description["inputs"]]
        stored = reference.quantize(
            *(
                np.asarray(value, dtype=np.float32 if i >= len(real) or real[i] else None)
                for i, value in enumerate(inputs)
            )
        )
    except (BundleError, TypeError, ValueError) as exc:
        raise InputError(f"inputs: {exc}") from exc
    for name, value in stored.items():
        if value.shape != code.shapes[name]:
            raise InputError(
                f"inputs: the code is written for a {name} of shape {list(code.shapes[name])}, "
                f"got {list(value.shape)}; give batch={value.shape[0] if value.ndim else 1}"
            )
    return stored
