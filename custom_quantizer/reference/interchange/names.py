"""What tensors of a graph are called in the files of other tools.

An activation goes by the node that makes it, as in plans, rules and statistics; a parameter by its
path in the module (``layer1.0.conv1.weight``).
"""

from __future__ import annotations

from torch.fx import Node

from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    is_constant,
    is_dequantize,
    is_quantize,
    module_path,
)
from custom_quantizer.ops.rewrites.training_graph import planned_tensor

__all__ = ["holds_integers", "parameter_name", "tensor_name"]

_INTEGERS = "_integers"  # what observers append to the name of a constant they replace


def tensor_name(node: Node) -> str:
    """Name of the tensor behind a quantize or dequantize node, or of any other node's result."""
    while (is_quantize(node) or _dequantizes(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    if is_constant(node):
        return parameter_name(node)
    return planned_tensor(node).name


def _dequantizes(node: Node) -> bool:
    return is_dequantize(node) or node.target is DEQUANTIZE_GROUPED


def holds_integers(constant: Node) -> bool:
    """Whether an observer of weights or biases wrote a constant, which has a name then."""
    return str(constant.target).endswith(_INTEGERS)


def parameter_name(constant: Node) -> str:
    """Path of a parameter: of the float tensor, also where a converted graph holds its integers.

    Conversion writes ``_`` for each ``.`` of a path. The module of an op that reads the constant
    tells which of them were dots; what cannot be told stays, as in ``_frozen_param0``, which is
    what torchao calls an operand such as a position embedding.
    """
    target = str(constant.target)
    if not holds_integers(constant):
        return target
    reader = constant
    while reader.users and (reader is constant or _dequantizes(reader)):
        reader = next(iter(reader.users))
    path = module_path(reader)
    flat = target.removesuffix(_INTEGERS)
    start = path.replace(".", "_") + "_"
    return f"{path}.{flat.removeprefix(start)}" if path and flat.startswith(start) else flat
