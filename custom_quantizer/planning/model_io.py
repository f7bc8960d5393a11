"""What a config asks of a model's own inputs and outputs: their formats, and integers there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from custom_quantizer.config.rules import Config, returned_nodes
from custom_quantizer.core.graph import describe, effective_users, is_float32, tensor_meta
from custom_quantizer.core.schemes import TensorScheme, activation_scheme
from custom_quantizer.errors import ConfigError
from custom_quantizer.planning.drafts import Drafts

_Asked = tuple[str, str]
"""The name under which a config says something of an input or output, and what it says."""


@dataclass
class ModelIO:
    """What the config asks of the model's own inputs and outputs.

    Attributes:
        inputs: formats.
        outputs: formats.
        node: what returns them.
        returned: outputs that shall be integers, by position among all that the model returns.
        integer_inputs: dtypes of those that are integers, by position.
        integer_outputs: likewise, once the formats of all ops are known.
    """

    inputs: dict[Node, TensorScheme]
    outputs: list[tuple[Node, TensorScheme]]
    node: Node
    returned: dict[int, tuple[Node, _Asked]] = field(default_factory=dict)
    integer_inputs: dict[int, str] = field(default_factory=dict)
    integer_outputs: dict[int, str] = field(default_factory=dict)

    @property
    def wanted(self) -> list[Node]:
        """Tensors that the model returns as integers, or rounded to them."""
        return [node for node, _ in (*self.outputs, *self.returned.values())]


def model_io(model: GraphModule, config: Config, ops: Drafts) -> ModelIO:
    """Read off the config what it says of each input and output.

    Raises:
        ConfigError: an input or output cannot be what is asked of it.
    """
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    io = ModelIO({}, [], output)
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(placeholders):
        asked = _border(config, "integer_inputs", config.of_input("integer_inputs", node, i), node)
        if not is_float32(node):
            continue
        found = config.of_input("inputs", node, i)
        fmt: TensorScheme | None = None if found is None else found[1]
        if asked is not None:
            fmt = fmt or _wanted_by_readers(node, ops)
            io.integer_inputs[i] = _border_dtype(config, "integer_inputs", asked, node, fmt)
        if fmt is not None:
            io.inputs[node] = fmt
    positions = [i for i, v in enumerate(pytree.tree_leaves(output.args[0])) if isinstance(v, Node)]
    for i, node in enumerate(returned_nodes(model)):
        found = config.of_output("outputs", i)
        if found is not None and is_float32(node):
            io.outputs.append((node, found[1]))
        asked = _border(config, "integer_outputs", config.of_output("integer_outputs", i), node)
        if asked is not None:
            io.returned[positions[i]] = (node, asked)
    return io


_DEFAULT_BORDER = activation_scheme("a8")
"""Format of integers at the border of a model for which nothing else decides."""


def _border(
    config: Config, field_name: str, found: tuple[str, Any] | None, node: Node
) -> _Asked | None:
    """What is asked of an input or output, if it shall be integers.

    Raises:
        ConfigError: it is named, and cannot be quantized.
    """
    if found is None or found[1] == "float":
        return None
    if not is_float32(node):
        if found[0] == "*":
            return None  # indices, masks: they stay as they are
        meta = tensor_meta(node)
        kind = "no tensor" if meta is None else str(meta.dtype)
        raise ConfigError(
            f"{config.io_place(field_name, found[0])}: {describe(node)} is {kind}; only float32 "
            "inputs and outputs become integers"
        )
    return found


def _border_dtype(
    config: Config, field_name: str, asked: _Asked, node: Node, fmt: TensorScheme
) -> str:
    """The dtype of an input or output that is integers of a format.

    Raises:
        ConfigError: another one is asked for.
    """
    name, kind = asked
    wide = fmt.format.bits > 8
    if kind == "integer":
        return "int16" if wide else "int8"
    if wide != (kind == "int16"):
        other = "a8" if wide else "a16"
        side = field_name.removeprefix("integer_")
        raise ConfigError(
            f"{config.io_place(field_name, name)}: {describe(node)} has {fmt.format.bits} bits, so "
            f"it cannot be {kind}; give it another format, set_io({side}={{{name!r}: {other!r}}})"
        )
    return kind


def _wanted_by_readers(node: Node, ops: Drafts) -> TensorScheme:
    """The widest format that the readers of an input want, through ops that move values."""
    wanted: list[TensorScheme] = []
    seen, waiting = {node}, [node]
    while waiting:
        tensor = waiting.pop()
        for user in effective_users(tensor):
            op = ops.anchors.get(user)
            if op is None or op.match is None or tensor not in op.match.inputs:
                continue
            if op.moves_values and op.output not in seen:
                seen.add(op.output)
                waiting.append(op.output)
            elif not op.moves_values and op.activation is not None and not op.is_dynamic:
                wanted.append(op.wanted(op.match.inputs.index(tensor)))
    # One with zero point 0 cannot become another one for free; the other way round it is the same.
    return max(
        wanted,
        key=lambda fmt: (fmt.format.bits, not fmt.symmetric),
        default=_DEFAULT_BORDER,
    )


def return_integers(io: ModelIO, config: Config, ops: Drafts) -> None:
    """Settle the dtypes of integer outputs; those of a float op are quantized for it."""
    formats = dict(io.outputs)
    for position, (node, asked) in io.returned.items():
        source = ops.producer.get(node)
        made = None if source is None or source.is_dynamic else source.made
        fmt = formats.get(node) or made or io.inputs.get(node)
        if fmt is None:
            fmt = formats[node] = _DEFAULT_BORDER
            io.outputs.append((node, fmt))
        io.integer_outputs[position] = _border_dtype(config, "integer_outputs", asked, node, fmt)
