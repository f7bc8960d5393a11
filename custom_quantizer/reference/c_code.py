"""Writes a converted network as C99 that computes on integers alone.

The code is made from the integer bundle (:mod:`custom_quantizer.reference.bundle`), so there is one
description of what is computed, and NumPy runs the same one. What is written for each network are
its constants and straight-line calls of kernels; the kernels are the same files for every network
(``reference/c/cq_kernels.c``), so that several networks can share them in one firmware.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch.fx import GraphModule

from custom_quantizer.core.files import new_directory, write_files_atomic
from custom_quantizer.errors import ConversionError, InputError
from custom_quantizer.reference.bundle import integers_of
from custom_quantizer.reference.numpy_runner import Array, BundleError, NumpyReference, Sizes

__all__ = ["CCode", "save_c"]

_TYPES = {"int8": "CQ_S8", "int16": "CQ_S16"}
_RULES = {"int32_two_roundings": "CQ_TWO_ROUNDINGS", "int64_one_rounding": "CQ_ONE_ROUNDING"}
_MOST_DIMENSIONS = 16
# fmt: off
_KEYWORDS = frozenset({
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum",
    "extern", "float", "for", "goto", "if", "inline", "int", "long", "main", "register", "restrict",
    "return", "short", "signed", "sizeof", "static", "struct", "switch", "typedef", "union",
    "unsigned", "void", "volatile", "while",
})
# fmt: on
_ALIGNMENT = 4
_MANY_CHANNELS = 4
"""From so many output channels (of a group) on it pays to bring together what a window sees."""
_SHORT = 16


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
    code = _Network(reference, name, batch)
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
    reference: NumpyReference, code: _Network, inputs: Sequence[Any] | None, count: int
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


def _quantized(
    reference: NumpyReference, code: _Network, inputs: Sequence[Any]
) -> dict[str, Array]:
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


# Memory ------------------------------------------------------------------------------------------


class _Buffer(NamedTuple):
    """Where a tensor lies.

    Attributes:
        kind: ``input``, ``output``, ``arena`` or ``constant``.
        number: of the input or output; offset in the arena in bytes; or 0.
        name: of the constant.
    """

    kind: str
    number: int = 0
    name: str = ""


@dataclass
class _Span:
    """A part of the arena and when it is in use, by index of ops, both ends included."""

    size: int
    start: int
    end: int
    offset: int = 0

    def meets(self, other: _Span) -> bool:
        """Whether both are in use at some op."""
        return self.start <= other.end and other.start <= self.end


def _place(spans: Sequence[_Span]) -> int:
    """Give every span an offset, the largest first, each as low as it fits; the size of all.

    References:
        Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020),
        "greedy by size", as TensorFlow Lite for Microcontrollers plans its arena.
    """
    placed: list[_Span] = []
    for span in sorted(spans, key=lambda s: (-s.size, s.start)):
        span.offset = 0
        for other in sorted((s for s in placed if s.meets(span)), key=lambda s: s.offset):
            if span.offset + span.size <= other.offset:
                break
            span.offset = max(span.offset, other.offset + other.size)
        placed.append(span)
    return max((span.offset + span.size for span in placed), default=0)


@dataclass
class _Constants:
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
            f"const {ctype} {name}[{array.size}] = {{\n{_numbers(array)}\n}};\n"
            for name, (ctype, array) in self._arrays.items()
        ]


def _numbers(array: Array) -> str:
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


def _packed_nibbles(weight: Array) -> Array:
    """Two 4-bit integers to a byte, the first in the lower half."""
    flat = weight.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
    packed: Array = flat[0::2] | (flat[1::2] << 4)
    return packed


# Loops -------------------------------------------------------------------------------------------


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a contiguous tensor, in elements."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _merged(sizes: Sequence[int], *steps: Sequence[int]) -> list[list[int]]:
    """The same loops with fewer dimensions: sizes of 1 go, and what lies in a row is one."""
    dims: list[list[int]] = []
    for size, *step in zip(sizes, *steps, strict=True):
        if size == 1:
            continue
        if dims and all(
            outer == inner * size for outer, inner in zip(dims[-1][1:], step, strict=True)
        ):
            dims[-1] = [dims[-1][0] * size, *step]
        else:
            dims.append([size, *step])
    return [list(column) for column in zip(*dims, strict=True)] or [[] for _ in (sizes, *steps)]


def _broadcast_steps(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Steps of an operand in a result of these sizes: 0 where it is repeated."""
    missing = len(sizes) - len(shape)
    strides = [0] * missing + _strides(shape)
    own = [1] * missing + list(shape)
    return [0 if n == 1 else stride for n, stride in zip(own, strides, strict=True)]


# The network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loop:
    """An array whose length differs from op to op: written beside the struct that points to it."""

    numbers: Sequence[int]


Fields: TypeAlias = "dict[str, int | str | Sequence[int] | _Loop | Fields]"
"""Members of a C struct in order: numbers, expressions, arrays of numbers, structs."""


class _Network:
    """C code of one network.

    Attributes:
        shapes: sizes of every tensor.
        inputs: names of the tensors that the network starts from.
        outputs: names of the tensors it returns.
        constants: arrays that the code reads.
        arena_bytes: of the activations.
        scratch_bytes: of the accumulators and of windows.
        peak_bytes: see :class:`CCode`.
    """

    def __init__(self, reference: NumpyReference, name: str, batch: int | None) -> None:
        self.name = name
        self.constants = _Constants()
        self._reference = reference
        self._description = reference.description
        self.inputs = [t for entry in self._description["inputs"] for t in entry["tensors"]]
        self.outputs = [str(entry["tensor"]) for entry in self._description["outputs"]]
        self.shapes = self._sizes(batch)
        self._roots = self._aliases()
        self._scratch: dict[str, int] = {}
        self._buffers = self._plan()
        self._structs: list[str] = []
        self._calls: list[str] = []
        for index, op in enumerate(self._description["ops"]):
            self._structs.append(f"/* {_label(op)} */")
            self._calls.append(f"    /* {_label(op)} */")
            _EMITTERS[op["op"]](self, _Op(index, op, self))
        self._copy_outputs()
        self.scratch_bytes = sum(np.dtype(t).itemsize * n for t, n in self._scratch.items())

    # -- sizes and memory ----------------------------------------------------------------------

    def _sizes(self, batch: int | None) -> dict[str, tuple[int, ...]]:
        starts: dict[str, Sizes] = {}
        for entry in self._description["inputs"]:
            first, *rest = entry["shape"] or [()]
            if None in rest:
                raise ConversionError(
                    f"input {entry['name']} has the shape {entry['shape']}: C code needs fixed "
                    "sizes, except for the batch; capture the model with them"
                )
            shape = (batch or first or 1, *rest) if entry["shape"] else ()
            starts |= dict.fromkeys(entry["tensors"], shape)
        try:
            sizes = self._reference.sizes(starts)
        except BundleError as exc:
            raise InputError(f"batch={batch}: {exc}") from exc
        if empty := sorted(name for name, shape in sizes.items() if 0 in shape):
            raise ConversionError(f"tensor {empty[0]} has no elements; C has no such arrays")
        return {name: tuple(n or 0 for n in shape) for name, shape in sizes.items()}

    def itemsize(self, name: str) -> int:
        """Bytes of an element."""
        return np.dtype(self._reference.tensors[name].dtype).itemsize

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.itemsize(name)

    def _aliases(self) -> dict[str, str]:
        """The tensor whose memory each tensor uses: its own, or that of what it is made from.

        A reshape moves nothing. Ops that compute an element from the same element work in place if
        nothing reads their input afterwards.
        """
        ops = self._description["ops"]
        roots = {name: name for name in self.shapes}
        fixed = {*self.inputs, *self._reference.constants}
        last_use = {name: len(ops) for name in self.outputs}
        for index, op in enumerate(ops):
            last_use |= {name: max(index, last_use.get(name, 0)) for name in op["inputs"]}
        # A view keeps what it looks at in use.
        for op in reversed(ops):
            if op["op"] in _VIEWS:
                (source,), output = op["inputs"], op["output"]
                last_use[source] = max(last_use[source], last_use.get(output, 0))
        end_of_root = dict(last_use)
        for index, op in enumerate(ops):
            source, output = op["inputs"][0], op["output"]
            root = roots[source]
            in_place = (
                op["op"] in _IN_PLACE
                and root not in fixed
                and end_of_root.get(root, 0) <= index
                and self.itemsize(source) == self.itemsize(output)
            )
            if op["op"] in _VIEWS or in_place:
                roots[output] = root
                ends = (end_of_root.get(root, 0), last_use.get(output, 0))
                end_of_root[root] = max(ends)
        return roots

    def _plan(self) -> dict[str, _Buffer]:
        """Where the memory of each root is."""
        ops = self._description["ops"]
        buffers = {name: _Buffer("input", i) for i, name in enumerate(self.inputs)}
        buffers |= {
            name: _Buffer("constant", name=f"{self.name}_{_identifier(name)}")
            for name in self._reference.constants
        }
        for index, name in enumerate(self.outputs):
            buffers.setdefault(self._roots[name], _Buffer("output", index))
        spans: dict[str, _Span] = {}
        for index, op in enumerate(ops):
            used = {self._roots[name] for name in (*op["inputs"], op["output"])}
            for root in used - buffers.keys():
                size = -(-self._bytes(root) // _ALIGNMENT) * _ALIGNMENT
                spans.setdefault(root, _Span(size, index, index)).end = index
        self.arena_bytes = _place(list(spans.values()))
        self.peak_bytes = max(
            (
                sum(span.size for span in spans.values() if span.start <= index <= span.end)
                for index in range(len(ops))
            ),
            default=0,
        )
        return buffers | {root: _Buffer("arena", span.offset) for root, span in spans.items()}

    def pointer(self, name: str) -> str:
        """C expression for the memory of a tensor."""
        root = self._roots[name]
        buffer = self._buffers[root]
        if buffer.kind == "arena":
            return f"AT({buffer.number})"
        if buffer.kind == "constant":
            info = self._reference.tensors[root]
            return self.constants.add(
                buffer.name, f"{np.dtype(info.dtype)}_t", self._reference.constants[root]
            )
        return f"{buffer.kind}{buffer.number}"

    def row(self, count: int, wide: bool) -> str:
        """Memory for so many accumulators."""
        return self.scratch(count, "int64" if wide else "int32")

    def scratch(self, count: int, dtype: str) -> str:
        """Memory for so many integers that an op needs while it runs."""
        self._scratch[dtype] = max(self._scratch.get(dtype, 0), count)
        return f"scratch_{dtype}"

    def call(self, text: str) -> None:
        """Append one call."""
        self._calls.append(f"    {text};")

    def struct(self, ctype: str, name: str, members: Fields) -> str:
        """Define a constant struct; a pointer to it."""
        arrays: list[str] = []
        body = _initializer(members, name, arrays)
        lines = textwrap.wrap(body[1:-1], 96, break_long_words=False, break_on_hyphens=False)
        inside = [f"    {line}" for line in lines]
        self._structs += [*arrays, f"static const {ctype} {name} = {{", *inside, "};"]
        return f"&{name}"

    def _copy_outputs(self) -> None:
        for index, name in enumerate(self.outputs):
            source = self.pointer(name)
            if source != f"output{index}":
                self.call(f"memcpy(output{index}, {source}, {self._bytes(name)})")

    # -- text ----------------------------------------------------------------------------------

    def _signature(self) -> str:
        parameters = [
            f"const {self._ctype(name)} *input{i}" for i, name in enumerate(self.inputs)
        ] + [f"{self._ctype(name)} *output{i}" for i, name in enumerate(self.outputs)]
        return f"void {self.name}_run({', '.join(parameters)})"

    def _ctype(self, name: str) -> str:
        return f"{np.dtype(self._reference.tensors[name].dtype)}_t"

    def header(self) -> str:
        """``<name>.h``."""
        upper = self.name.upper()
        lines = [
            f"/* {self.name}: a quantized network on integers. See docs/microcontroller.md. */",
            f"#ifndef {upper}_H",
            f"#define {upper}_H",
            "",
            "#include <stdint.h>",
            "",
            "/*",
            " * A stored integer q stands for (q - ZERO_POINT) * SCALE. The code uses no SCALE:",
            " * they are for those who have real numbers to store or to show. To store a number:",
            " * divide by SCALE, round halves away from zero, add ZERO_POINT, clamp to MIN, MAX.",
            " */",
        ]
        for role, names in (("input", self.inputs), ("output", self.outputs)):
            for index, name in enumerate(names):
                info = self._reference.tensors[name]
                prefix = f"{upper}_{role.upper()}{index}"
                shape = "x".join(map(str, self.shapes[name])) or "one number"
                lines += [
                    "",
                    f"/* {role}{index}: {_comment(name)}, {shape} */",
                    f"#define {prefix}_SIZE {math.prod(self.shapes[name])}",
                    f"#define {prefix}_SCALE {_real(float(info.scale))}",
                    f"#define {prefix}_ZERO_POINT ({info.zero_point})",
                    f"#define {prefix}_MIN ({info.quant_min})",
                    f"#define {prefix}_MAX ({info.quant_max})",
                ]
        lines += [
            "",
            f"#define {upper}_CONSTANT_BYTES {self.constants.total}",
            f"#define {upper}_ARENA_BYTES {self.arena_bytes}",
            f"#define {upper}_SCRATCH_BYTES {self.scratch_bytes}",
            "",
            "/*",
            " * Compute the network. Outputs may not overlap inputs. Not reentrant: activations",
            " * lie in static memory.",
            " */",
            f"{self._signature()};",
            "",
            "#endif",
        ]
        return _text(lines)

    def source(self) -> str:
        """``<name>.c``."""
        lines = [
            f'#include "{self.name}.h"',
            "",
            "#include <string.h>",
            "",
            '#include "cq_kernels.h"',
        ]
        lines += ["", *self.constants.declarations(), ""]
        if self.arena_bytes:
            sizes = {self.itemsize(name) for name, b in self._buffers.items() if b.kind == "arena"}
            width = max(sizes)
            lines += [
                "/* Activations. 8-bit ones lie in it as bytes, which may alias anything. */",
                f"static int{8 * width}_t arena[{self.arena_bytes // width}];",
                "#define AT(offset) ((void *)((unsigned char *)arena + (offset)))",
            ]
        for dtype, count in self._scratch.items():
            use = "accumulators" if dtype in ("int32", "int64") else "what a window sees"
            lines.append(f"static {dtype}_t scratch_{dtype}[{count}]; /* {use} */")
        lines += ["", *self._structs, "", self._signature(), "{", *self._calls, "}"]
        return _text(lines)

    def constants_source(self) -> str:
        """``<name>_constants.c``."""
        lines = ["#include <stdint.h>", "", *self.constants.declarations(), ""]
        return _text([*lines, *self.constants.definitions()])

    def test_source(self, cases: Sequence[tuple[Mapping[str, Array], Sequence[Array]]]) -> str:
        """``<name>_test.c``."""
        arrays: list[str] = []
        calls: list[str] = []
        for index, (stored, expected) in enumerate(cases):
            inputs = [f"vector{index}_input{i}" for i in range(len(self.inputs))]
            results = [f"vector{index}_output{i}" for i in range(len(self.outputs))]
            values = [*(stored[name] for name in self.inputs), *expected]
            for array, tensor, value in zip(
                [*inputs, *results], [*self.inputs, *self.outputs], values, strict=True
            ):
                arrays.append(
                    f"static const {self._ctype(tensor)} {array}[{value.size}] = "
                    f"{{\n{_numbers(value.reshape(-1))}\n}};"
                )
            outputs = [f"output{i}" for i in range(len(self.outputs))]
            calls.append(f"    {self.name}_run({', '.join([*inputs, *outputs])});")
            for i, name in enumerate(self.outputs):
                size = math.prod(self.shapes[name])
                calls += [
                    f"    for (long i = 0; i < {size}; i++) {{",
                    f"        differ += output{i}[i] != {results[i]}[i];",
                    "    }",
                ]
        compared = len(cases) * sum(math.prod(self.shapes[name]) for name in self.outputs)
        lines = [
            "/* Inputs, and the integers that NumPy computes from them: all must be equal. */",
            "#include <stdio.h>",
            "",
            f'#include "{self.name}.h"',
            "",
            *arrays,
            *(
                f"static {self._ctype(name)} output{i}[{math.prod(self.shapes[name])}];"
                for i, name in enumerate(self.outputs)
            ),
            "",
            f"/* How many of the {compared} values differ. */",
            f"long {self.name}_test(void);",
            f"long {self.name}_test(void)",
            "{",
            "    long differ = 0;",
            *calls,
            "    return differ;",
            "}",
            "",
            "#ifndef CQ_NO_MAIN",
            "int main(void)",
            "{",
            f"    const long differ = {self.name}_test();",
            f'    printf("%ld of {compared} values differ\\n", differ);',
            "    return differ != 0;",
            "}",
            "#endif",
        ]
        return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _comment(text: str) -> str:
    """Text that may stand in a C comment, in ASCII and on one line."""
    plain = ascii(text)[1:-1]
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("??/", "?? /")


def _label(op: Mapping[str, Any]) -> str:
    module = f" ({op['module']})" if op["module"] else ""
    return _comment(f"{op['name']}: {op['op']}{module}")


def _real(value: float) -> str:
    return f"{np.float32(value)!s}f"  # as few digits as give the same float


def _initializer(members: Fields, name: str, arrays: list[str]) -> str:
    """A C initializer; arrays of any length are definitions of their own."""
    parts: list[str] = []
    for key, value in members.items():
        if isinstance(value, dict):
            text = _initializer(value, f"{name}_{key}", arrays)
        elif isinstance(value, _Loop):
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


# Ops ---------------------------------------------------------------------------------------------


class _Op:
    """One op of the description, as the emitters below ask about it."""

    def __init__(self, index: int, entry: Mapping[str, Any], network: _Network) -> None:
        self.entry = entry
        self.name = f"op{index}_{_identifier(entry['name'])}"
        self.network = network
        tensors = network._reference.tensors
        self.inputs = [str(name) for name in entry["inputs"]]
        self.infos = [tensors[name] for name in self.inputs]
        self.shapes = [network.shapes[name] for name in self.inputs]
        self.output = str(entry["output"])
        self.shape = network.shapes[self.output]
        self._tensors = tensors

    def type_of(self, name: str) -> str:
        """C constant for the storage of a tensor."""
        return _TYPES[str(np.dtype(self._tensors[name].dtype))]

    def pointers(self) -> list[str]:
        """Of the inputs."""
        return [self.network.pointer(name) for name in self.inputs]

    @property
    def out(self) -> str:
        """Pointer to the result."""
        return self.network.pointer(self.output)

    def scale(self, key: str = "requantization") -> Fields:
        """The fields of a ``cq_scale``."""
        entry = self.entry[key]
        several = isinstance(entry["multiplier"], list) and len(entry["multiplier"]) > 1
        constants, prefix = self.network.constants, f"{self.network.name}_{self.name}_{key}"
        bits = self.entry.get("accumulator", {}).get("bits", 32)
        if entry["rule"] == "int64_one_rounding" and bits > 48:
            raise ConversionError(
                f"{self.entry['name']}: its accumulator needs {bits} bits, and the rounding of "
                "16-bit activations takes 48; narrow its weight or its input"
            )
        return {
            "rule": _RULES[entry["rule"]],
            "step": int(several),
            "multiplier": constants.add(
                f"{prefix}_multiplier", "int32_t", np.array(entry["multiplier"])
            ),
            "shift": constants.add(f"{prefix}_shift", "int8_t", np.array(entry["shift"])),
        }

    def store(self) -> Fields:
        """The fields of a ``cq_store``."""
        info = self._tensors[self.output]
        low, high = self.entry.get("clamp", (info.quant_min, info.quant_max))
        return {
            "type": self.type_of(self.output),
            "zero_point": info.zero_point,
            "low": low,
            "high": high,
        }

    def reads(self, index: int = 0, prefix: str = "in") -> Fields:
        """Type and zero point of an input."""
        return {
            f"{prefix}_type": self.type_of(self.inputs[index]),
            f"{prefix}_zero_point": self.infos[index].zero_point,
        }

    def weight(self) -> tuple[str, str]:
        """C constant for its storage, and its name."""
        name, reference = str(self.entry["weight"]), self.network._reference
        info, array = self._tensors[name], reference.constants[name]
        variable = f"{self.network.name}_{_identifier(name)}"
        if info.quant_min >= -8 and info.quant_max <= 7:
            packed = self.network.constants.add(variable, "uint8_t", _packed_nibbles(array))
            return "CQ_S4", packed
        ctype = str(array.dtype)
        return _TYPES[ctype], self.network.constants.add(variable, f"{ctype}_t", array)

    def bias(self) -> str:
        """Its name, or a null pointer."""
        name = self.entry["bias"]
        if name is None:
            return "0"
        variable = f"{self.network.name}_{_identifier(name)}"
        array = self.network._reference.constants[name]
        return self.network.constants.add(variable, "int32_t", array)

    def wide(self, bits: int | None = None) -> bool:
        """Whether its accumulators need more than 32 bits."""
        needed: int = self.entry["accumulator"]["bits"] if bits is None else bits
        return needed > 32


def _dims(values: Sequence[int], missing: int) -> list[int]:
    """Three numbers for depth, height, width, from one to three."""
    return [missing] * (3 - len(values)) + list(values)


def _conv(network: _Network, op: _Op) -> None:
    entry, (x,) = op.entry, op.shapes
    if entry["op"] == "conv" and _is_linear(op):
        _linear(network, op)
        return
    transposed = entry["op"] == "conv_transpose"
    weight_type, weight = op.weight()
    kernel = network._reference.constants[entry["weight"]].shape[2:]
    window = entry["crop"] if transposed else entry["padding"]
    lists = {
        "in": (x[2:], 1),
        "out": (op.shape[2:], 1),
        "kernel": (kernel, 1),
        "stride": (entry["stride"], 1),
        "dilation": (entry["dilation"], 1),
        "before": (window["before"], 0),
    }
    sizes: dict[str, list[int]] = {key: _dims(v, missing) for key, (v, missing) in lists.items()}
    groups = entry["groups"]
    by_windows = not transposed and op.shape[1] // groups >= _MANY_CHANNELS
    if not transposed and not by_windows and _is_pointwise(op):
        # An image of one line: its rows are long, which is what the kernel is good at.
        for key in ("in", "out"):
            sizes[key] = [1, 1, math.prod(sizes[key])]
    wide = op.wide()
    members: Fields = {
        "batch": x[0],
        "groups": groups,
        "in_channels": x[1] // groups,
        "out_channels": op.shape[1] // groups,
        **sizes,
        **op.reads(),
        "weight_type": weight_type,
        "wide": int(wide),
        "scale": op.scale(),
        "store": op.store(),
    }
    struct = network.struct("cq_conv_op", op.name, members)
    if by_windows:
        window = x[1] // groups * math.prod(kernel)
        kernel_name, memory = (
            "cq_conv_windows",
            network.scratch(window, str(np.dtype(op.infos[0].dtype))),
        )
    else:
        kernel_name, memory = f"cq_{entry['op']}", network.row(sizes["out"][2], wide)
    operands = f"{struct}, {op.pointers()[0]}, {weight}, {op.bias()}, {memory}, {op.out}"
    network.call(f"{kernel_name}({operands})")


def _is_pointwise(op: _Op) -> bool:
    entry = op.entry
    kernel = op.network._reference.constants[entry["weight"]].shape[2:]
    padding = [*entry["padding"]["before"], *entry["padding"]["after"]]
    return max(kernel) == max(entry["stride"]) == 1 and not any(padding)


def _is_linear(op: _Op) -> bool:
    """A pointwise convolution of one pixel is a linear layer."""
    one_pixel = math.prod(op.shapes[0][2:]) == 1
    return op.entry["groups"] == 1 and one_pixel and _is_pointwise(op)


def _linear(network: _Network, op: _Op) -> None:
    weight_type, weight = op.weight()
    out_features, in_features = network._reference.constants[op.entry["weight"]].shape[:2]
    members: Fields = {
        "rows": math.prod(op.shapes[0]) // in_features,
        "in_features": in_features,
        "out_features": out_features,
        **op.reads(),
        "weight_type": weight_type,
        "wide": int(op.wide()),
        "scale": op.scale(),
        "store": op.store(),
    }
    struct = network.struct("cq_linear_op", op.name, members)
    network.call(f"cq_linear({struct}, {op.pointers()[0]}, {weight}, {op.bias()}, {op.out})")


def _matmul(network: _Network, op: _Op) -> None:
    (a, b), out = op.shapes, op.shape
    batch = out[:-2]
    # Steps count matrices' elements: one matrix of the batch is a[-2] * a[-1] of them.
    steps = [
        [step * math.prod(shape[-2:]) for step in _broadcast_steps(shape[:-2], batch)]
        for shape in (a, b)
    ]
    size, a_step, b_step = _merged(batch, *steps)
    bits = (a[-1] * op.infos[0].reach * op.infos[1].reach).bit_length() + 1
    wide = op.wide(bits)
    members: Fields = {
        "rank": len(size),
        "size": _Loop(size),
        "a_step": _Loop(a_step),
        "b_step": _Loop(b_step),
        "rows": out[-2],
        "inner": a[-1],
        "columns": out[-1],
        **op.reads(0, "a"),
        **op.reads(1, "b"),
        "wide": int(wide),
        "scale": op.scale(),
        "store": op.store(),
    }
    struct = network.struct("cq_matmul_op", op.name, members)
    left, right = op.pointers()
    network.call(f"cq_matmul({struct}, {left}, {right}, {network.row(out[-1], wide)}, {op.out})")


def _binary(network: _Network, op: _Op) -> None:
    entry = op.entry
    steps = [_broadcast_steps(shape, op.shape) for shape in op.shapes]
    size, a_step, b_step = _merged(op.shape, *steps)
    members: Fields = {
        "kind": f"CQ_{entry['op'].upper()}",
        "rank": len(size),
        "size": _Loop(size),
        "a_step": _Loop(a_step),
        "b_step": _Loop(b_step),
        **op.reads(0, "a"),
        **op.reads(1, "b"),
        "left_shift": entry.get("left_shift", 0),
    }
    for key, name in (
        ("a_scale", "requantization_a"),
        ("b_scale", "requantization_b"),
        ("scale", "requantization"),
    ):
        if name in entry:
            members[key] = op.scale(name)
    members["store"] = op.store()
    left, right = op.pointers()
    struct = network.struct("cq_binary_op", op.name, members)
    network.call(f"cq_binary({struct}, {left}, {right}, {op.out})")


def _requantize(network: _Network, op: _Op) -> None:
    members: Fields = {
        "count": math.prod(op.shape),
        **op.reads(),
        "scale": op.scale(),
        "store": op.store(),
    }
    struct = network.struct("cq_requantize_op", op.name, members)
    network.call(f"cq_requantize({struct}, {op.pointers()[0]}, {op.out})")


def _clamp(network: _Network, op: _Op) -> None:
    low, high = op.entry["clamp"]
    if op.type_of(op.inputs[0]) != op.type_of(op.output):
        raise ConversionError(f"{op.entry['name']}: a clamp between types of different widths")
    members: Fields = {
        "count": math.prod(op.shape),
        "type": op.type_of(op.output),
        "low": low,
        "high": high,
    }
    struct = network.struct("cq_clamp_op", op.name, members)
    network.call(f"cq_clamp({struct}, {op.pointers()[0]}, {op.out})")


def _table(network: _Network, op: _Op) -> None:
    axis, info = op.entry["axis"], op.infos[0]
    table = np.array(op.entry["table"])
    ctype = f"{np.dtype(op._tensors[op.output].dtype)}_t"
    name = network.constants.add(f"{network.name}_{op.name}_table", ctype, table)
    members: Fields = {
        "outer": math.prod(op.shape[:axis] if axis is not None else ()),
        "channels": 1 if axis is None else op.shape[axis],
        "inner": math.prod(op.shape if axis is None else op.shape[axis + 1 :]),
        "levels": table.shape[-1],
        "quant_min": info.quant_min,
        "in_type": op.type_of(op.inputs[0]),
        "out_type": op.type_of(op.output),
    }
    struct = network.struct("cq_table_op", op.name, members)
    network.call(f"cq_table({struct}, {op.pointers()[0]}, {name}, {op.out})")


def _mean(network: _Network, op: _Op) -> None:
    (shape,), axes = op.shapes, op.entry["axes"]
    steps = _strides(shape)
    members: Fields = {}
    for prefix, chosen in (
        ("kept", [axis for axis in range(len(shape)) if axis not in axes]),
        ("summed", sorted(axes)),
    ):
        size, step = _merged([shape[a] for a in chosen], [steps[a] for a in chosen])
        members |= {
            f"{prefix}_rank": len(size),
            f"{prefix}_size": _Loop(size),
            f"{prefix}_step": _Loop(step),
        }
    members |= {**op.reads(), "scale": op.scale(), "store": op.store()}
    struct = network.struct("cq_mean_op", op.name, members)
    network.call(f"cq_mean({struct}, {op.pointers()[0]}, {op.out})")


def _pool(network: _Network, op: _Op) -> None:
    entry, (shape,) = op.entry, op.shapes
    members: Fields = {
        "images": math.prod(shape[:-2]),
        "in": shape[-2:],
        "out": op.shape[-2:],
        "kernel": entry["kernel"],
        "stride": entry["stride"],
        "dilation": entry.get("dilation", [1, 1]),
        "before": entry["padding"]["before"],
        "after": entry["padding"]["after"],
        **op.reads(),
    }
    if entry["op"] == "avg_pool2d":
        members["count_padding"] = int(entry["count_padding"])
        if "requantization" in entry:
            counts = entry["requantization"]["count"]
            members |= {"counts": len(counts), "count": _Loop(counts), "scale": op.scale()}
    members["store"] = op.store()
    struct = network.struct("cq_pool_op", op.name, members)
    network.call(f"cq_{entry['op']}({struct}, {op.pointers()[0]}, {op.out})")


def _resize(network: _Network, op: _Op) -> None:
    (shape,) = op.shapes
    members: Fields = {
        "images": math.prod(shape[:-2]),
        "in": shape[-2:],
        "out": op.shape[-2:],
        "type": op.type_of(op.output),
        "rows": _Loop(op.entry["rows"]),
        "columns": _Loop(op.entry["columns"]),
    }
    struct = network.struct("cq_resize_op", op.name, members)
    network.call(f"cq_resize_bilinear({struct}, {op.pointers()[0]}, {op.out})")


def _copy(
    network: _Network,
    op: _Op,
    sizes: Sequence[int],
    in_step: Sequence[int],
    out_step: Sequence[int],
    *,
    source: int = 0,
    in_offset: int = 0,
    out_offset: int = 0,
) -> None:
    size, from_step, to_step = _merged(sizes, in_step, out_step)
    members: Fields = {
        "bytes": network.itemsize(op.output),
        "rank": len(size),
        "size": _Loop(size),
        "in_step": _Loop(from_step),
        "out_step": _Loop(to_step),
        "in_offset": in_offset,
        "out_offset": out_offset,
    }
    struct = network.struct("cq_copy_op", f"{op.name}_{source}", members)
    network.call(f"cq_copy({struct}, {op.pointers()[source]}, {op.out})")


def _permute(network: _Network, op: _Op) -> None:
    steps = _strides(op.shapes[0])
    chosen = [steps[axis] for axis in op.entry["axes"]]
    _copy(network, op, op.shape, chosen, _strides(op.shape))


def _slice(network: _Network, op: _Op) -> None:
    (shape,), entry = op.shapes, op.entry
    axis, steps = entry["axis"], _strides(op.shapes[0])
    start, _, step = slice(entry["start"], entry["stop"], entry["step"]).indices(shape[axis])
    offset = start * steps[axis]
    steps[axis] *= step
    _copy(network, op, op.shape, steps, _strides(op.shape), in_offset=offset)


def _select(network: _Network, op: _Op) -> None:
    (shape,), axis, index = op.shapes, op.entry["axis"], op.entry["index"]
    steps = _strides(shape)
    offset = index % shape[axis] * steps.pop(axis)
    _copy(network, op, op.shape, steps, _strides(op.shape), in_offset=offset)


def _expand(network: _Network, op: _Op) -> None:
    steps = _broadcast_steps(op.shapes[0], op.shape)
    _copy(network, op, op.shape, steps, _strides(op.shape))


def _cat(network: _Network, op: _Op) -> None:
    axis, steps, offset = op.entry["axis"], _strides(op.shape), 0
    for source, shape in enumerate(op.shapes):
        _copy(network, op, shape, _strides(shape), steps, source=source, out_offset=offset)
        offset += shape[axis] * steps[axis]


def _pad(network: _Network, op: _Op) -> None:
    (shape,), steps, before = op.shapes, _strides(op.shape), op.entry["padding"]["before"]
    kept = len(shape) - len(before)
    offset = sum(b * step for b, step in zip(before, steps[kept:], strict=True))
    fill = f"{op.type_of(op.output)}, {math.prod(op.shape)}, {op.infos[0].zero_point}"
    network.call(f"cq_fill({op.out}, {fill})")
    _copy(network, op, shape, _strides(shape), steps, out_offset=offset)


def _view(network: _Network, op: _Op) -> None:
    """The same memory under another name: nothing to do."""


_VIEWS = frozenset({"reshape", "identity"})
_IN_PLACE = frozenset({"requantize", "clamp", "table"})

_EMITTERS: Mapping[str, Callable[[_Network, _Op], None]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "matmul": _matmul,
    **dict.fromkeys(("add", "sub", "mul", "maximum", "minimum"), _binary),
    "requantize": _requantize,
    "clamp": _clamp,
    "table": _table,
    "mean": _mean,
    "avg_pool2d": _pool,
    "max_pool2d": _pool,
    "resize_bilinear": _resize,
    "pad": _pad,
    "cat": _cat,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "expand": _expand,
    "reshape": _view,
    "identity": _view,
}
"""C code of each op of the bundle's format."""
