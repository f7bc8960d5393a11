"""Buffers whose rows a program writes where they are.

A cache of keys and values takes one row a call. ExecuTorch makes a new tensor of all of it
(``index_put``) and copies that back into the buffer (``copy_``), unless its ``reinplace_pass`` is
run. That looks at who else reads a tensor and at nothing more, while the kernel
(``kernels/portable/cpu/op_index_put.cpp``) takes whole rows of one dim, at positions of one line
that are not negative. All else would fail when the program runs, so that the pass is run only where
all writes are such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes.reinplace import reinplace_pass
from torch.export import ExportedProgram
from torch.fx import Node

from custom_quantizer.core.graph import argument, is_same_shape, shape_of, tensor_meta

__all__ = ["write_rows_in_place"]

_WRITE = exir_ops.edge.aten.index_put.default


def write_rows_in_place(edge: EdgeProgramManager) -> None:
    """Let each method write in place if all of its writes are of rows of buffers."""
    for method in edge.methods:
        _write_rows_in_place(edge.exported_program(method))


def _write_rows_in_place(program: ExportedProgram) -> None:
    writes = program.graph.find_nodes(op="call_function", target=_WRITE)
    buffers = program.graph_signature.inputs_to_buffers
    returned = program.graph_signature.user_outputs
    rows = [_is_row_write(node, buffers) and node.name not in returned for node in writes]
    if not writes or not all(rows):
        return
    metas = {node.args[0]: node.meta for node in writes}
    reinplace_pass(program, [_WRITE])
    for data, meta in metas.items():
        for node in data.users:
            node.meta = meta  # by which the report finds the op that it stands for


def _is_row_write(node: Node, buffers: Mapping[str, str]) -> bool:
    """Whether the kernel takes a write, and no other name of the memory is read.

    Views are made names of the memory later, so that who reads the buffer through one would see
    what was written after it.
    """
    data, values = node.args[0], node.args[2]
    indices: Any = node.args[1]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or argument(node, 3, "accumulate", False):
        return False
    ((dim, index),) = given
    # This op takes no negative positions, ``x[index] = y`` does. Copied graphs hold copies of it.
    if str(node.meta.get("original_aten")) != str(torch.ops.aten.index_copy.default):
        return False
    if not isinstance(data, Node) or data.name not in buffers or len(data.users) != 1:
        return False
    meta = tensor_meta(index)
    if meta is None or meta.dim() != 1 or meta.dtype not in (torch.int64, torch.int32):
        return False
    shape: list[Any] = list(shape_of(data))
    shape[dim] = meta.shape[0]
    return isinstance(values, Node) and is_same_shape(shape_of(values), shape)
