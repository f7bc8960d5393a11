"""The calls of kernels: C code of each op of the bundle's format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from custom_quantizer.errors import ConversionError
from custom_quantizer.reference.c.network import Network
from custom_quantizer.reference.c.text import Fields, Loop, identifier, packed_nibbles
from custom_quantizer.reference.numpy_runner import NumpyReference, position_bits

__all__ = ["EMITTERS", "write_network"]

_TYPES = {"int8": "CQ_S8", "int16": "CQ_S16"}
_RULES = {"int32_two_roundings": "CQ_TWO_ROUNDINGS", "int64_one_rounding": "CQ_ONE_ROUNDING"}
_MANY_CHANNELS = 4
"""From so many output channels (of a group) on it pays to bring together what a window sees."""


def write_network(reference: NumpyReference, name: str, batch: int | None) -> Network:
    """A network with a call for each of its ops.

    Args:
        reference: what is written.
        name: prefix of what the code defines.
        batch: first dimension of the inputs; ``None``: the captured one, 1 if it was dynamic.

    Raises:
        ConversionError: a size other than the batch is dynamic, a tensor is empty, or an
            accumulator needs more bits than its rounding takes.
        InputError: ``batch`` does not fit.
    """
    network = Network(reference, name, batch)
    for index, op in enumerate(reference.description["ops"]):
        network.begin(op)
        EMITTERS[op["op"]](network, _Op(index, op, network))
    network.copy_outputs()
    return network


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


# Ops ---------------------------------------------------------------------------------------------


class _Op:
    """One op of the description, as the emitters below ask about it."""

    def __init__(self, index: int, entry: Mapping[str, Any], network: Network) -> None:
        self.entry = entry
        self.name = f"op{index}_{identifier(entry['name'])}"
        self.network = network
        tensors = network.reference.tensors
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
        name, reference = str(self.entry["weight"]), self.network.reference
        info, array = self._tensors[name], reference.constants[name]
        variable = f"{self.network.name}_{identifier(name)}"
        if info.quant_min >= -8 and info.quant_max <= 7:
            packed = self.network.constants.add(variable, "uint8_t", packed_nibbles(array))
            return "CQ_S4", packed
        ctype = str(array.dtype)
        return _TYPES[ctype], self.network.constants.add(variable, f"{ctype}_t", array)

    def bias(self) -> str:
        """Its name, or a null pointer."""
        name = self.entry["bias"]
        if name is None:
            return "0"
        variable = f"{self.network.name}_{identifier(name)}"
        array = self.network.reference.constants[name]
        return self.network.constants.add(variable, "int32_t", array)

    def wide(self, bits: int | None = None) -> bool:
        """Whether its accumulators need more than 32 bits."""
        needed: int = self.entry["accumulator"]["bits"] if bits is None else bits
        return needed > 32


def _dims(values: Sequence[int], missing: int) -> list[int]:
    """Three numbers for depth, height, width, from one to three."""
    return [missing] * (3 - len(values)) + list(values)


def _conv(network: Network, op: _Op) -> None:
    entry, (x,) = op.entry, op.shapes
    if entry["op"] == "conv" and _is_linear(op):
        _linear(network, op)
        return
    transposed = entry["op"] == "conv_transpose"
    weight_type, weight = op.weight()
    kernel = network.reference.constants[entry["weight"]].shape[2:]
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
    kernel = op.network.reference.constants[entry["weight"]].shape[2:]
    padding = [*entry["padding"]["before"], *entry["padding"]["after"]]
    return max(kernel) == max(entry["stride"]) == 1 and not any(padding)


def _is_linear(op: _Op) -> bool:
    """A pointwise convolution of one pixel is a linear layer."""
    one_pixel = math.prod(op.shapes[0][2:]) == 1
    return op.entry["groups"] == 1 and one_pixel and _is_pointwise(op)


def _linear(network: Network, op: _Op) -> None:
    weight_type, weight = op.weight()
    out_features, in_features = network.reference.constants[op.entry["weight"]].shape[:2]
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


def _matmul(network: Network, op: _Op) -> None:
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
        "size": Loop(size),
        "a_step": Loop(a_step),
        "b_step": Loop(b_step),
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


def _binary(network: Network, op: _Op) -> None:
    entry = op.entry
    steps = [_broadcast_steps(shape, op.shape) for shape in op.shapes]
    size, a_step, b_step = _merged(op.shape, *steps)
    members: Fields = {
        "kind": f"CQ_{entry['op'].upper()}",
        "rank": len(size),
        "size": Loop(size),
        "a_step": Loop(a_step),
        "b_step": Loop(b_step),
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


def _requantize(network: Network, op: _Op) -> None:
    members: Fields = {
        "count": math.prod(op.shape),
        **op.reads(),
        "scale": op.scale(),
        "store": op.store(),
    }
    struct = network.struct("cq_requantize_op", op.name, members)
    network.call(f"cq_requantize({struct}, {op.pointers()[0]}, {op.out})")


def _clamp(network: Network, op: _Op) -> None:
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


def _table(network: Network, op: _Op) -> None:
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


def _mean(network: Network, op: _Op) -> None:
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
            f"{prefix}_size": Loop(size),
            f"{prefix}_step": Loop(step),
        }
    members |= {**op.reads(), "scale": op.scale(), "store": op.store()}
    struct = network.struct("cq_mean_op", op.name, members)
    network.call(f"cq_mean({struct}, {op.pointers()[0]}, {op.out})")


def _pool(network: Network, op: _Op) -> None:
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
            members |= {"counts": len(counts), "count": Loop(counts), "scale": op.scale()}
    members["store"] = op.store()
    struct = network.struct("cq_pool_op", op.name, members)
    network.call(f"cq_{entry['op']}({struct}, {op.pointers()[0]}, {op.out})")


def _resize(network: Network, op: _Op) -> None:
    (shape,) = op.shapes
    members: Fields = {
        "images": math.prod(shape[:-2]),
        "in": shape[-2:],
        "out": op.shape[-2:],
        "type": op.type_of(op.output),
        "fraction": position_bits(op.entry),
        "rows": Loop(op.entry["rows"]),
        "columns": Loop(op.entry["columns"]),
    }
    struct = network.struct("cq_resize_op", op.name, members)
    network.call(f"cq_resize_bilinear({struct}, {op.pointers()[0]}, {op.out})")


def _copy(
    network: Network,
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
        "size": Loop(size),
        "in_step": Loop(from_step),
        "out_step": Loop(to_step),
        "in_offset": in_offset,
        "out_offset": out_offset,
    }
    struct = network.struct("cq_copy_op", f"{op.name}_{source}", members)
    network.call(f"cq_copy({struct}, {op.pointers()[source]}, {op.out})")


def _permute(network: Network, op: _Op) -> None:
    steps = _strides(op.shapes[0])
    chosen = [steps[axis] for axis in op.entry["axes"]]
    _copy(network, op, op.shape, chosen, _strides(op.shape))


def _slice(network: Network, op: _Op) -> None:
    (shape,), entry = op.shapes, op.entry
    axis, steps = entry["axis"], _strides(op.shapes[0])
    start, _, step = slice(entry["start"], entry["stop"], entry["step"]).indices(shape[axis])
    offset = start * steps[axis]
    steps[axis] *= step
    _copy(network, op, op.shape, steps, _strides(op.shape), in_offset=offset)


def _select(network: Network, op: _Op) -> None:
    (shape,), axis, index = op.shapes, op.entry["axis"], op.entry["index"]
    steps = _strides(shape)
    offset = index % shape[axis] * steps.pop(axis)
    _copy(network, op, op.shape, steps, _strides(op.shape), in_offset=offset)


def _expand(network: Network, op: _Op) -> None:
    steps = _broadcast_steps(op.shapes[0], op.shape)
    _copy(network, op, op.shape, steps, _strides(op.shape))


def _cat(network: Network, op: _Op) -> None:
    axis, steps, offset = op.entry["axis"], _strides(op.shape), 0
    for source, shape in enumerate(op.shapes):
        _copy(network, op, shape, _strides(shape), steps, source=source, out_offset=offset)
        offset += shape[axis] * steps[axis]


def _pad(network: Network, op: _Op) -> None:
    (shape,), steps, before = op.shapes, _strides(op.shape), op.entry["padding"]["before"]
    kept = len(shape) - len(before)
    offset = sum(b * step for b, step in zip(before, steps[kept:], strict=True))
    fill = f"{op.type_of(op.output)}, {math.prod(op.shape)}, {op.infos[0].zero_point}"
    network.call(f"cq_fill({op.out}, {fill})")
    _copy(network, op, shape, _strides(shape), steps, out_offset=offset)


def _view(network: Network, op: _Op) -> None:
    """The same memory under another name: nothing to do."""


EMITTERS: Mapping[str, Callable[[Network, _Op], None]] = {
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
