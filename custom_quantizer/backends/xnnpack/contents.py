"""What a ``.pte`` holds, as immutable values.

:mod:`~custom_quantizer.backends.xnnpack.readback` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from custom_quantizer.backends.xnnpack.flatbuffer import ParamValue
from custom_quantizer.backends.xnnpack.op_record import OpsOfMethods
from custom_quantizer.core.file_hashes import sha256_of
from custom_quantizer.errors import ProgramError

__all__ = [
    "STORAGE",
    "DelegateCall",
    "DelegateContents",
    "DelegateNode",
    "DelegateOp",
    "DelegateTensor",
    "KernelCall",
    "MethodContents",
    "ProgramContents",
    "ValueInfo",
    "frozen",
    "stored_bytes",
    "widen_bfloat16",
]

_TRANSPOSED = 1  # XNN_FLAG_TRANSPOSE_WEIGHTS of a fully connected node, XNN_FLAG_TRANSPOSE_B of bmm

STORAGE: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "int32": np.dtype("<i4"),
}
"""By dtype, how constants lie in a file."""


@dataclass(frozen=True)
class ValueInfo:
    """An argument of a method or kernel.

    Attributes:
        dtype: Of a tensor ("float32", "int8", ...); of anything else its kind ("int", "double",
            "bool", "string", "int_list", "tensor_list", "null", ...).
        shape: Of a tensor, in logical (NCHW) order; the upper bound where ``dynamic``.
        dynamic: Whether the shape may change between calls.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}{'?' if self.dynamic else ''}"


@dataclass(frozen=True)
class KernelCall:
    """A kernel called outside the delegates.

    Attributes:
        name: Operator and overload, "aten::slice_copy.Tensor_out".
        arguments: In the order of the operator's schema, outputs last.
    """

    name: str
    arguments: tuple[ValueInfo, ...]


@dataclass(frozen=True)
class DelegateCall:
    """A call of ``MethodContents.delegates[delegate]``."""

    delegate: int


@dataclass(frozen=True, eq=False)
class DelegateTensor:
    """A value of an XNNPACK graph; instances compare by identity.

    Attributes:
        id: Position in ``DelegateContents.tensors``.
        dtype: "float32", "float16", "bfloat16", "int8", "uint8", "int4" or "int32".
        shape: As stored: an activation next to a convolution is NHWC, weights are as told in
            ``DelegateContents.weight``.
        quantization: None, "per_tensor", "per_channel", "per_channel_group" (blocks of
            ``group_size`` along the input channels) or "per_token_dynamic" (chosen at run time).
        scale: The stored float32, exactly: a float where per tensor, a read-only float32 array
            of shape (channels,) or (channels, groups) where per channel (group), else None.
        zero_point: None where there is no scale. Per-channel tensors have none in the file and
            run with 0; the true integers of ``array`` of an int4 tensor have 0 as well.
        channel_axis: Axis of ``shape`` that ``scale`` runs along, or None.
        group_size: Input channels that share a scale, where per channel group.
        is_constant: Whether the value is stored rather than computed.
        is_input: Whether the delegate is handed this value.
        is_output: Whether the delegate hands this value back.
        external_id: Position among the delegate's arguments, inputs first, or None.
        constant_key: Name of the stored bytes in the program's named data; None if they stand in
            the delegate, or are computed.
    """

    id: int
    dtype: str
    shape: tuple[int, ...]
    quantization: str | None
    scale: npt.NDArray[np.float32] | float | None
    zero_point: int | None
    channel_axis: int | None
    group_size: int | None
    is_constant: bool
    is_input: bool
    is_output: bool
    external_id: int | None
    constant_key: str | None
    _data: memoryview | None = field(repr=False)

    @property
    def name(self) -> str | None:
        """Name of a constant, wherever it stands: ExecuTorch takes the SHA-256 of its bytes."""
        if self.constant_key is not None or self._data is None:
            return self.constant_key
        return sha256_of(self._data)

    def array(self) -> npt.NDArray[Any]:
        """Return the stored constant in its stored layout, as a read-only array of ``shape``.

        Integers are the true ones: int4 is unpacked (two to a byte, low nibble first, stored
        with 8 added, rows padded to whole bytes) to int8 values in [-8, 7]. bfloat16 is widened
        to float32, which is exact.

        Raises:
            ProgramError: the tensor is computed at run time.
        """
        if self._data is None:
            raise ProgramError(
                f"tensor {self.id} ({self.dtype}{list(self.shape)}) is computed when the program "
                "runs, so the file holds no data for it; ask for tensors with is_constant"
            )
        if self.dtype == "int4":
            rows, columns = self.shape[0], math.prod(self.shape[1:])
            packed = np.frombuffer(self._data, np.uint8, stored_bytes(self.dtype, self.shape))
            nibbles = np.stack((packed & 0xF, packed >> 4), axis=-1)
            padded = nibbles.reshape(rows, columns + columns % 2).astype(np.int8)
            values: npt.NDArray[Any] = padded[:, :columns] - np.int8(8)
        else:
            values = np.frombuffer(self._data, STORAGE[self.dtype], math.prod(self.shape))
            if self.dtype == "bfloat16":
                values = widen_bfloat16(values)
        return frozen(values.reshape(self.shape))


@dataclass(frozen=True)
class DelegateOp:
    """A node of an XNNPACK graph.

    Attributes:
        kind: The schema's name in snake case: "conv2d", "depthwise_conv2d", "conv_transpose2d",
            "fully_connected", "add", "convert", "static_transpose", "concatenate2", ...
        inputs: Tensor ids of the operands, without weight and bias of a convolution or linear.
        outputs: Tensor ids.
        weight: Tensor id of a convolution's or fully connected node's weight, else None.
        bias: Tensor id of the bias, or None.
        params: The other fields of the schema, with these joined or renamed: ``stride``,
            ``dilation``, ``kernel_size``, ``output_padding`` and ``size`` are (height, width);
            ``padding`` is (top, right, bottom, left). A fused activation adds ``output_min`` and
            ``output_max``, real numbers in units of the float output.
        debug_handle: Links the node to the exported graph's ``debug_handle`` metadata.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weight: int | None
    bias: int | None
    params: Mapping[str, ParamValue] = field(hash=False)
    debug_handle: int

    @property
    def is_transposed(self) -> bool:
        """Whether the second matrix lies transposed in memory.

        That is the weight of a fully connected node, then (I, O), or the second factor of a
        batch_matrix_multiply node, then (batch, columns, rows).
        """
        flags = self.params.get("flags", 0)
        kinds = ("fully_connected", "batch_matrix_multiply")
        return self.kind in kinds and isinstance(flags, int) and bool(flags & _TRANSPOSED)


@dataclass(frozen=True)
class DelegateContents:
    """What one delegate holds; for backends other than XNNPACK, only how large it is.

    Attributes:
        backend_id: "XnnpackBackend", ...
        ops: In execution order.
        tensors: ``tensors[i].id == i``.
        inputs: Tensor ids in the order of the delegate's arguments.
        outputs: Tensor ids, likewise.
        size_bytes: Of the delegate's own blob, without named data.
    """

    backend_id: str
    ops: tuple[DelegateOp, ...]
    tensors: tuple[DelegateTensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size_bytes: int

    def weight(self, op: DelegateOp) -> npt.NDArray[Any]:
        """Return the weight of ``op`` in PyTorch's layout, read-only.

        ================== ========================= ============================
        kind               stored                    returned
        ================== ========================= ============================
        conv2d             (O, kH, kW, I/groups)     (O, I/groups, kH, kW)
        depthwise_conv2d   (1, kH, kW, O)            (O, 1, kH, kW)
        conv_transpose2d   (O, kH, kW, I/groups)     (I, O/groups, kH, kW)
        fully_connected    (O, I), or (I, O) where   (O, I)
                           flags say transposed
        ================== ========================= ============================

        A 1-d convolution is stored, and returned, as a 2-d one with a kernel side of 1. One that
        reads joined columns (:mod:`~custom_quantizer.backends.xnnpack.columns`) is returned as one
        that reads single ones, with the zeros that its kernel got.

        Raises:
            ProgramError: ``op`` has no constant weight, or one of an impossible shape.
        """
        if op.weight is None:
            raise ProgramError(f"a {op.kind} node has no weight; ask for ops whose weight is set")
        stored = self.tensors[op.weight].array()
        dims = 2 if op.kind == "fully_connected" else 4
        groups = op.params.get("groups", 1)
        if stored.ndim != dims or not isinstance(groups, int) or groups < 1:
            raise ProgramError(
                f"the weight of a {op.kind} node has shape {list(stored.shape)} and groups "
                f"{groups}, not {dims} dimensions; the file was not written by a known version"
            )
        if op.kind == "fully_connected":
            return frozen(stored.T if op.is_transposed else stored)
        if op.kind == "depthwise_conv2d":
            return frozen(stored.transpose(3, 0, 1, 2))
        if op.kind == "conv_transpose2d":
            outputs, height, width, inputs = stored.shape
            if outputs % groups:
                raise ProgramError(
                    f"a conv_transpose2d node has {outputs} output channels in {groups} groups; "
                    "the file was not written by a known version"
                )
            grouped = stored.reshape(groups, outputs // groups, height, width, inputs)
            swapped = grouped.transpose(0, 4, 1, 2, 3)
            return frozen(swapped.reshape(groups * inputs, outputs // groups, height, width))
        axis, factor = self._joined_columns(op)
        outputs, *kernel, channels = stored.shape
        if factor > 1 and channels % factor == 0:
            kernel[axis - 1] *= factor
            stored = stored.reshape(outputs, *kernel, channels // factor)
        return frozen(stored.transpose(0, 3, 1, 2))

    def _joined_columns(self, op: DelegateOp) -> tuple[int, int]:
        """The dim of columns that a convolution reads as channels, and how many as one."""
        maker = self.makers.get(op.inputs[0])
        if maker is None or maker.kind != "static_reshape":
            return 2, 1
        single, joined = (self.tensors[i].shape for i in (maker.inputs[0], op.inputs[0]))
        if len(single) != 4 or len(joined) != 4 or not single[3] or joined[3] % single[3]:
            return 2, 1
        factor = joined[3] // single[3]
        for axis in (2, 1):
            wide = [*joined[:3], single[3]]
            wide[axis] *= factor
            if tuple(wide) == single and (axis == 2 or single[2] == 1):
                return axis, factor
        return 2, 1

    @cached_property
    def makers(self) -> Mapping[int, DelegateOp]:
        """Tensor id -> the op that makes it; of several the first."""
        return {made: op for op in reversed(self.ops) for made in op.outputs}

    @cached_property
    def readers(self) -> Mapping[int, list[DelegateOp]]:
        """Tensor id -> the ops that take it as an operand, in execution order."""
        found: dict[int, list[DelegateOp]] = {}
        for op in self.ops:
            for read in op.inputs:
                found.setdefault(read, []).append(op)
        return found

    def bias(self, op: DelegateOp) -> npt.NDArray[Any] | None:
        """Return the bias of ``op``, shape (O,), int32 where the op is quantized, or None."""
        return None if op.bias is None else self.tensors[op.bias].array()


DelegateNode = tuple[DelegateContents, DelegateOp]
"""A node, and the delegate that it is one of."""


@dataclass(frozen=True)
class MethodContents:
    """One entry point of a program.

    Attributes:
        name: "forward", ...
        inputs: What a caller passes.
        outputs: What a caller gets.
        calls: Kernels and delegates in execution order.
        delegates: The delegates that ``calls`` refers to.
    """

    name: str
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    calls: tuple[KernelCall | DelegateCall, ...]
    delegates: tuple[DelegateContents, ...]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the operators called outside the delegates, in execution order."""
        return tuple(call.name for call in self.calls if isinstance(call, KernelCall))

    def nodes_of(self, handles: Collection[int]) -> list[DelegateNode]:
        """The nodes of delegates with one of these debug handles, in file order."""
        places = sorted({place for handle in handles for place in self._places.get(handle, ())})
        return [
            (self.delegates[delegate], self.delegates[delegate].ops[op]) for delegate, op in places
        ]

    def numbered_like(self, other: MethodContents) -> MethodContents:
        """The same; delegates that have the ops of ``other``'s get the debug handles of these, too.

        Handles are counted by the passes that run, and another way to the same program has others.
        """
        if len(self.delegates) != len(other.delegates):
            return self
        pairs = zip(self.delegates, other.delegates, strict=True)
        delegates = tuple(
            replace(mine, ops=theirs.ops)
            if _without_handles(mine) == _without_handles(theirs)
            else mine
            for mine, theirs in pairs
        )
        return replace(self, delegates=delegates)

    @cached_property
    def _places(self) -> Mapping[int, list[tuple[int, int]]]:
        """Debug handle -> positions of delegates, and of ops in them."""
        found: dict[int, list[tuple[int, int]]] = {}
        for i, delegate in enumerate(self.delegates):
            for j, op in enumerate(delegate.ops):
                found.setdefault(op.debug_handle, []).append((i, j))
        return found


def _without_handles(delegate: DelegateContents) -> list[DelegateOp]:
    return [replace(op, debug_handle=0) for op in delegate.ops]


@dataclass(frozen=True)
class ProgramContents:
    """What a ``.pte`` holds.

    Attributes:
        methods: In file order, those that only return a constant number excepted.
        size_bytes: Of the whole file.
        constant_bytes: Of the constants in it: those of kernels, named data (each blob counted
            once) and those inside XNNPACK blobs; alignment padding excluded.
        has_checksum: whether the file carries a SHA-256, which fits then. It says that the file is
            what was written, not who wrote it.
        ops: what became of the ops of the graph that the file was made of, by method; ``None``:
            the file has no record of them that can be read.
        ops_note: why it cannot, where there is one.
        constants: methods that take nothing and return one constant number, and that number.
    """

    methods: tuple[MethodContents, ...]
    size_bytes: int
    constant_bytes: int
    has_checksum: bool = False
    ops: OpsOfMethods | None = field(default=None, repr=False)
    ops_note: str = ""
    constants: Mapping[str, int | float] = field(default_factory=dict, hash=False, repr=False)

    def method(self, name: str = "forward") -> MethodContents:
        """Return the method called ``name``.

        Raises:
            ProgramError: there is none; the message lists those there are.
        """
        for method in self.methods:
            if method.name == name:
                return method
        names = ", ".join(repr(method.name) for method in self.methods)
        raise ProgramError(f"the program has no method {name!r}; it has {names or 'none'}")

    @property
    def delegates(self) -> tuple[DelegateContents, ...]:
        """The delegates of all methods."""
        return tuple(delegate for method in self.methods for delegate in method.delegates)

    def nodes_of(self, handles: Collection[int]) -> list[DelegateNode]:
        """The nodes of delegates with one of these debug handles, of all methods."""
        return [node for method in self.methods for node in method.nodes_of(handles)]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the operators called outside delegates, over all methods."""
        return tuple(name for method in self.methods for name in method.kernels)

    @property
    def inputs(self) -> tuple[ValueInfo, ...]:
        """The inputs of the only method, else of ``forward``."""
        return self.main.inputs

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """The outputs of the only method, else of ``forward``."""
        return self.main.outputs

    @property
    def main(self) -> MethodContents:
        """The only method, else ``forward``."""
        return self.methods[0] if len(self.methods) == 1 else self.method()


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a constant takes."""
    if dtype == "int4":  # each row padded to whole bytes
        return shape[0] * -(-math.prod(shape[1:]) // 2)
    return math.prod(shape) * STORAGE[dtype].itemsize


def widen_bfloat16(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Values of 16 stored bits as float32, exactly."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def frozen(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array in C order that cannot be written to."""
    values = np.ascontiguousarray(values)
    values.setflags(write=False)
    return values
