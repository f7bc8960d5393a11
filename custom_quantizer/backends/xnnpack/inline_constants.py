"""Small constants of a delegate inside it, without a name.

ExecuTorch (1.5.1) gives every weight, bias and array of scales a segment of its own in the program,
which delegates find by its SHA-256. That costs some 280 bytes each, the name twice among them, and
four times that for each layer: of a small layer more than its biases. What only one delegate reads
can stand in it: weights and biases behind its graph, scales in the graph. Its runtime reads both
forms (``getConstantDataPtr`` and ``defineTensor`` in ``XNNCompiler.cpp``).

What stays outside, by name:

- what several delegates read: it is stored once;
- what XNNPACK reads while it runs, as a constant operand of a sum: a delegate is freed when it is
  loaded, and only weights and biases are copied before that (``getPackedValueIds``);
- large weights (:data:`LARGE`), for which a name is nothing next to their bytes. The runtime's
  cache of packed weights, which is off by default, tells weights by their names. To it a layer is
  the name of its weight and that of its bias, so the bias of a weight with a name keeps its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from executorch.exir import EdgeProgramManager
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.program._program import collect_named_data_store_from_exported_program

from custom_quantizer.backends.xnnpack.flatbuffer import (
    Buffer,
    Contents,
    Schema,
    write,
    xnnpack_schema,
)
from custom_quantizer.backends.xnnpack.layouts import simplify
from custom_quantizer.backends.xnnpack.readback import INVALID_ID, XNN_HEADER, XNNPACK_BACKEND

__all__ = ["ALIGNMENT", "LARGE", "bring_inside", "inline_constants"]

LARGE = 1 << 16
"""Bytes of a weight above which it keeps its name, half a percent of it."""

ALIGNMENT = 16
"""Of constants and of the graph in a delegate, and of the segments of a program: that of upstream's
constants (``CONSTANT_TENSOR_ALIGNMENT``), enough for every number in them. Upstream starts each
segment at 128 bytes."""

_HEADER = 4 + XNN_HEADER.size


def inline_constants(edge: EdgeProgramManager) -> None:
    """Move constants of the delegates of a partitioned program into them."""
    modules = list(_delegates(edge))
    uses = Counter(key for module in modules for key in module.named_data_store_output.pte_data)
    for module in modules:
        store = module.named_data_store_output
        if module.backend_id != XNNPACK_BACKEND or not store.pte_data:
            continue
        own = {
            key: store.buffers[entry.buffer_index]
            for key, entry in store.pte_data.items()
            if uses[key] == 1
        }
        module._processed_bytes, moved = _with_constants(module.processed_bytes, own)
        left = NamedDataStore()
        kept = {key: entry for key, entry in store.pte_data.items() if key not in moved}
        left.merge_named_data_store(replace(store, pte_data=kept))
        module._named_data_store_output = left.get_named_data_store_output()
    _collect_named_data(edge)


def bring_inside(edge: EdgeProgramManager) -> None:
    """Put what a partitioned program keeps in data files into it.

    Kernels outside delegates read constants from there if it was written so before.
    """
    for method in edge.methods:
        for node in edge.exported_program(method).graph.nodes:
            node.meta.pop("constant_tag", None)
    for module in _delegates(edge):
        store = module.named_data_store_output
        outside = {key: x for file in store.external_data.values() for key, x in file.items()}
        module._named_data_store_output = replace(
            store, pte_data={**store.pte_data, **outside}, external_data={}
        )
    _collect_named_data(edge)


def _collect_named_data(edge: EdgeProgramManager) -> None:
    """Let a program hold the named data of its delegates, as when it was partitioned."""
    edge._named_data_store = NamedDataStore()
    for method in edge.methods:
        collect_named_data_store_from_exported_program(
            edge.exported_program(method), edge._named_data_store
        )


def _delegates(edge: EdgeProgramManager) -> Iterator[LoweredBackendModule]:
    """The delegates of all methods that have named data."""
    for method in edge.methods:
        for module in edge.exported_program(method).graph_module.modules():
            named = isinstance(module, LoweredBackendModule) and module.named_data_store_output
            if named:
                yield module


def _with_constants(blob: bytes, own: Mapping[str, bytes]) -> tuple[bytes, set[str]]:
    """A delegate of XNNPACK with the constants in it that may be, and their names.

    Args:
        blob: as ExecuTorch wrote it.
        own: constants that no other delegate reads, by name.
    """
    _, _, start, size, _, inline_size = XNN_HEADER.unpack_from(blob, 4)
    if inline_size:
        return blob, set()  # not as the version that is known here writes it
    schema = xnnpack_schema()
    read = Buffer(memoryview(blob)[start : start + size], schema, "an XNNPACK graph")
    contents = read.root().contents()
    if not simplify(contents, schema):
        contents = read.root().contents()
    graph = _Graph(contents, schema)
    moved = graph.movable(own)
    constants = graph.move({key: data for key, data in own.items() if key in moved})
    written = write(graph.contents, schema)
    head, body = aligned(_HEADER), aligned(len(written))
    header = XNN_HEADER.pack(b"XH00", _HEADER, head, len(written), head + body, len(constants))
    parts = (bytes(4), header, bytes(head - _HEADER), written, bytes(body - len(written)))
    return b"".join((*parts, constants)), moved


def aligned(size: int) -> int:
    """The first place that is not before ``size``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Graph:
    """A graph of XNNPACK: which constants it reads, and for what.

    Attributes:
        contents: the graph, which :meth:`move` changes.
    """

    def __init__(self, contents: Contents, schema: Schema) -> None:
        self.contents = contents
        self._constants: list[Contents] = contents["constant_data"]
        self._values = [_tensor(value) for value in contents["xvalues"]]
        nodes = [node["xnode_union"].value for node in contents["xnodes"]]
        self._layers, others = _operands(nodes, schema)
        # What XNNPACK copies when it is loaded: weights and biases that nothing else reads.
        self._copied = {i for layer in self._layers for i in layer} - others

    def _name(self, table: Contents | None, index: str) -> str:
        """The name of the constant that a table refers to; empty if there is none."""
        constant = self._constants[0 if table is None else table.number(index)]
        return constant["named_key"] or ""

    def movable(self, own: Mapping[str, bytes]) -> set[str]:
        """Names of what may stand in the delegate, of the constants that no other reads."""
        stored: defaultdict[str, set[int]] = defaultdict(set)
        for i, (tensor, quantization) in enumerate(self._values):
            stored[self._name(tensor, _DATA)].add(i)
            stored[self._name(quantization, _SCALES)].add(i)
        may = {key for key, values in stored.items() if key in own and values <= self._copied}
        named = [[self._name(self._values[i][0], _DATA) for i in layer] for layer in self._layers]
        weights = {layer[0] for layer in named}
        stay = {key for key in weights if key not in may or len(own[key]) > LARGE}
        return may - stay - {bias for weight, *biases in named if weight in stay for bias in biases}

    def move(self, moved: Mapping[str, bytes]) -> bytes:
        """Put scales into the graph, and return what is to stand behind it."""
        inline = bytearray()
        constants, places = self._constants[:1], dict[int | str, int]()

        def place(table: Contents, index: str) -> None:
            """Let a table refer to the constant in the new list."""
            if not (old := table.number(index)):
                return
            name = self._name(table, index)
            key = name if name in moved else old
            if key not in places:
                places[key] = len(constants)
                if name in moved:
                    inline.extend(bytes(aligned(len(inline)) - len(inline)))
                    data = moved[name]
                    fields = {"offset": len(inline), "size": len(data)}
                    constants.append(Contents("ConstantDataOffset", fields))
                    inline.extend(data)
                else:
                    constants.append(self._constants[old])
            table.fields[index] = places[key]

        for tensor, quantization in self._values:
            place(tensor, _DATA)
            scales = moved.get(self._name(quantization, _SCALES))
            if quantization is None:
                continue
            if scales is not None and quantization.table == "PerChannelQuant":
                quantization.fields["scale"] = np.frombuffer(scales, "<f4")
                del quantization.fields[_SCALES]
            else:
                place(quantization, _SCALES)
        self.contents.fields["constant_data"] = constants
        return bytes(inline)


_DATA, _SCALES = "constant_buffer_idx", "scale_buffer_idx"
"""Fields that refer to constants, of a tensor and of how it is quantized."""


def _tensor(value: Contents) -> tuple[Contents, Contents | None]:
    """The tensor that a value is, and how it is quantized."""
    union: Contents = value["xvalue_union"].value
    if union.table != "XNNQuantizedTensorValue":
        return union, None
    return union["tensor_value"], union["quant_params"].value


def _operands(nodes: Iterable[Contents], schema: Schema) -> tuple[list[tuple[int, ...]], set[int]]:
    """The weight of each layer, with its bias if it has one; and all other values of nodes."""
    layers: list[tuple[int, ...]] = []
    others: set[int] = set()
    for node in nodes:
        ids = {name: node.number(name) for name in schema.tables[node.table] if name[-3:] == "_id"}
        if "filter_id" in ids:
            weight, bias = ids.pop("filter_id"), ids.pop("bias_id")
            layers.append((weight,) if bias == INVALID_ID else (weight, bias))
        others.update(ids.values())
    return layers, others
