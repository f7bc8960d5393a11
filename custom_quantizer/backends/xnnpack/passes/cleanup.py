"""What is not part of the computation, and ops that do nothing."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.backends.xnnpack.passes._pass import graph_pass, quantized_neighbours, replace
from custom_quantizer.core.graph import is_dequantize, is_quantize, is_same_shape, tensor_meta
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.ops.movement import EXPAND, RESHAPE, SLICE, is_identity
from custom_quantizer.ops.pool import ADAPTIVE_AVG_POOL, adaptive_kernel

aten = torch.ops.aten

# These do nothing where they keep the shape.
_SHAPERS = EXPAND.targets | RESHAPE.targets | SLICE.targets | ADAPTIVE_AVG_POOL.targets


@graph_pass("guards and assertions", "only tensor ops are left")
def drop_checks(model: GraphModule) -> int:
    """Input guards and metadata assertions: shapes are fixed by export again."""
    doomed = [
        node
        for node in model.graph.nodes
        if node.target == "_guards_fn"
        or node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
    ]
    for node in reversed(doomed):
        model.graph.erase_node(node)
    return len(doomed)


@graph_pass("ops that change nothing", "none are left")
def drop_identities(model: GraphModule) -> int:
    """Dropout, clone, contiguous and the like: their users read their input."""
    count = _drop_repeats(model)
    for node in list(model.graph.nodes):
        noop = node.op == "call_function" and is_identity(node)
        noop = noop or (
            node.op == "call_function" and node.target in _SHAPERS and _same_shape(node)
        )
        if not noop or not isinstance(node.args[0], Node):
            continue
        # A copy of what is written later is no identity.
        if overwritten_by(node) is not None or overwritten_by(node.args[0]) is not None:
            continue
        around = quantized_neighbours(node)
        if around is not None and around[0].args[1:] == around[1].args[1:]:
            before, after = around
            after.replace_all_uses_with(cast(Node, before.args[0]))
            model.graph.erase_node(after)
            model.graph.erase_node(node)
            count += 1
        elif not is_dequantize(node.args[0]) or around is None or is_identity(node):
            meta, source = tensor_meta(node), tensor_meta(node.args[0])
            if meta is not None and source is not None and meta.dtype != source.dtype:
                continue
            replace(node, node.args[0])
            count += 1
    return count


def _drop_repeats(model: GraphModule) -> int:
    """What is quantized on a grid and was on it before, as two quantizers may ask, is not again."""
    count = 0
    for node in list(model.graph.nodes):
        if not is_quantize(node) or not is_dequantize(node.args[0]):
            continue
        source = cast(Node, node.args[0])
        if source.args[1:] == node.args[1:]:
            replace(node, cast(Node, source.args[0]))
            count += 1
    return count


def drop_unused_constants(model: GraphModule) -> None:
    """Forget constants that no node reads; ``torch.export`` would write them into the program."""
    used = {
        str(node.target) for node in model.graph.nodes if node.op in ("get_attr", "call_module")
    }
    held = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name in [name for name, _ in held]:
        parts = name.split(".")
        # A used module keeps all that is below it: it may be the branch of a condition.
        if not any(".".join(parts[: i + 1]) in used for i in range(len(parts))):
            delattr(model.get_submodule(".".join(parts[:-1])), parts[-1])


def _same_shape(node: Node) -> bool:
    if not isinstance(node.args[0], Node):
        return False
    if node.target in ADAPTIVE_AVG_POOL.targets and adaptive_kernel(node) != (1, 1):
        return False
    meta, source = tensor_meta(node), tensor_meta(node.args[0])
    return meta is not None and source is not None and is_same_shape(meta.shape, source.shape)
