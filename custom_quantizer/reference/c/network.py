"""A network as C: sizes, memory, and the text of its files around the calls of kernels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from custom_quantizer.errors import ConversionError, InputError
from custom_quantizer.reference.c.memory import ALIGNMENT, Buffer, Span, place
from custom_quantizer.reference.c.text import (
    Constants,
    Fields,
    comment,
    identifier,
    initializer,
    integers,
    label,
    real,
    text_of,
)
from custom_quantizer.reference.numpy_runner import Array, BundleError, NumpyReference, Sizes

__all__ = ["Network"]

VIEWS = frozenset({"reshape", "identity"})
"""Ops that are the same memory under another name."""

IN_PLACE = frozenset({"requantize", "clamp", "table"})
"""Ops that compute an element from the same element."""


class Network:
    """C code of one network.

    Attributes:
        shapes: sizes of every tensor.
        inputs: names of the tensors that the network starts from.
        outputs: names of the tensors it returns.
        constants: arrays that the code reads.
        reference: what is written.
        arena_bytes: of the activations.
        peak_bytes: see :class:`~custom_quantizer.reference.c_code.CCode`.
    """

    def __init__(self, reference: NumpyReference, name: str, batch: int | None) -> None:
        self.name = name
        self.constants = Constants()
        self.reference = reference
        self._description = reference.description
        self.inputs = [t for entry in self._description["inputs"] for t in entry["tensors"]]
        self.outputs = [str(entry["tensor"]) for entry in self._description["outputs"]]
        self.shapes = self._sizes(batch)
        self._roots = self._aliases()
        self._scratch: dict[str, int] = {}
        self._buffers = self._plan()
        self._structs: list[str] = []
        self._calls: list[str] = []

    @property
    def scratch_bytes(self) -> int:
        """Memory of the accumulators and of windows."""
        return sum(np.dtype(t).itemsize * n for t, n in self._scratch.items())

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
            sizes = self.reference.sizes(starts)
        except BundleError as exc:
            raise InputError(f"batch={batch}: {exc}") from exc
        if empty := sorted(name for name, shape in sizes.items() if 0 in shape):
            raise ConversionError(f"tensor {empty[0]} has no elements; C has no such arrays")
        return {name: tuple(n or 0 for n in shape) for name, shape in sizes.items()}

    def itemsize(self, name: str) -> int:
        """Bytes of an element."""
        return np.dtype(self.reference.tensors[name].dtype).itemsize

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.itemsize(name)

    def _aliases(self) -> dict[str, str]:
        """The tensor whose memory each tensor uses: its own, or that of what it is made from.

        A reshape moves nothing. Ops that compute an element from the same element work in place if
        nothing reads their input afterwards.
        """
        ops = self._description["ops"]
        roots = {name: name for name in self.shapes}
        fixed = {*self.inputs, *self.reference.constants}
        last_use = {name: len(ops) for name in self.outputs}
        for index, op in enumerate(ops):
            last_use |= {name: max(index, last_use.get(name, 0)) for name in op["inputs"]}
        # A view keeps what it looks at in use.
        for op in reversed(ops):
            if op["op"] in VIEWS:
                (source,), output = op["inputs"], op["output"]
                last_use[source] = max(last_use[source], last_use.get(output, 0))
        end_of_root = dict(last_use)
        for index, op in enumerate(ops):
            source, output = op["inputs"][0], op["output"]
            root = roots[source]
            in_place = (
                op["op"] in IN_PLACE
                and root not in fixed
                and end_of_root.get(root, 0) <= index
                and self.itemsize(source) == self.itemsize(output)
            )
            if op["op"] in VIEWS or in_place:
                roots[output] = root
                ends = (end_of_root.get(root, 0), last_use.get(output, 0))
                end_of_root[root] = max(ends)
        return roots

    def _plan(self) -> dict[str, Buffer]:
        """Where the memory of each root is."""
        ops = self._description["ops"]
        buffers = {name: Buffer("input", i) for i, name in enumerate(self.inputs)}
        buffers |= {
            name: Buffer("constant", name=f"{self.name}_{identifier(name)}")
            for name in self.reference.constants
        }
        for index, name in enumerate(self.outputs):
            buffers.setdefault(self._roots[name], Buffer("output", index))
        spans: dict[str, Span] = {}
        for index, op in enumerate(ops):
            used = {self._roots[name] for name in (*op["inputs"], op["output"])}
            for root in used - buffers.keys():
                size = -(-self._bytes(root) // ALIGNMENT) * ALIGNMENT
                spans.setdefault(root, Span(size, index, index)).end = index
        self.arena_bytes = place(list(spans.values()))
        self.peak_bytes = max(
            (
                sum(span.size for span in spans.values() if span.start <= index <= span.end)
                for index in range(len(ops))
            ),
            default=0,
        )
        return buffers | {root: Buffer("arena", span.offset) for root, span in spans.items()}

    def pointer(self, name: str) -> str:
        """C expression for the memory of a tensor."""
        root = self._roots[name]
        buffer = self._buffers[root]
        if buffer.kind == "arena":
            return f"AT({buffer.number})"
        if buffer.kind == "constant":
            info = self.reference.tensors[root]
            return self.constants.add(
                buffer.name, f"{np.dtype(info.dtype)}_t", self.reference.constants[root]
            )
        return f"{buffer.kind}{buffer.number}"

    def row(self, count: int, wide: bool) -> str:
        """Memory for so many accumulators."""
        return self.scratch(count, "int64" if wide else "int32")

    def scratch(self, count: int, dtype: str) -> str:
        """Memory for so many integers that an op needs while it runs."""
        self._scratch[dtype] = max(self._scratch.get(dtype, 0), count)
        return f"scratch_{dtype}"

    def begin(self, op: Mapping[str, Any]) -> None:
        """Say which op of the description is written next."""
        self._structs.append(f"/* {label(op)} */")
        self._calls.append(f"    /* {label(op)} */")

    def call(self, text: str) -> None:
        """Append one call."""
        self._calls.append(f"    {text};")

    def struct(self, ctype: str, name: str, members: Fields) -> str:
        """Define a constant struct; a pointer to it."""
        arrays: list[str] = []
        body = initializer(members, name, arrays)
        lines = textwrap.wrap(body[1:-1], 96, break_long_words=False, break_on_hyphens=False)
        inside = [f"    {line}" for line in lines]
        self._structs += [*arrays, f"static const {ctype} {name} = {{", *inside, "};"]
        return f"&{name}"

    def copy_outputs(self) -> None:
        """Append copies of the outputs whose memory is not the caller's."""
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
        return f"{np.dtype(self.reference.tensors[name].dtype)}_t"

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
                info = self.reference.tensors[name]
                prefix = f"{upper}_{role.upper()}{index}"
                shape = "x".join(map(str, self.shapes[name])) or "one number"
                lines += [
                    "",
                    f"/* {role}{index}: {comment(name)}, {shape} */",
                    f"#define {prefix}_SIZE {math.prod(self.shapes[name])}",
                    f"#define {prefix}_SCALE {real(float(info.scale))}",
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
        return text_of(lines)

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
        return text_of(lines)

    def constants_source(self) -> str:
        """``<name>_constants.c``."""
        lines = ["#include <stdint.h>", "", *self.constants.declarations(), ""]
        return text_of([*lines, *self.constants.definitions()])

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
                    f"{{\n{integers(value.reshape(-1))}\n}};"
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
        return text_of(lines)
