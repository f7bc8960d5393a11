"""Which op the runtime refuses, where it only says that it refuses a program.

XNNPACK checks some parameters when it creates its operators, long after the program was written,
and names none then. So the ops of the graph up to one of them are lowered alone, and bisection
finds the first op with which the program no longer loads.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from custom_quantizer.backends.xnnpack.backend import BACKEND
from custom_quantizer.backends.xnnpack.lowering import make_program
from custom_quantizer.core.graph import (
    ASSERTIONS,
    DEQUANTIZE_PER_TENSOR,
    QUANTIZE_PER_TENSOR,
    detached_copy,
    tensor_meta,
)
from custom_quantizer.errors import CustomQuantizerError, ProgramError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.reference.converted import ConvertedGraph, FloatOp, read_converted

__all__ = ["first_refused"]


def first_refused(graph: ConvertedGraph, example: tuple[Any, ...]) -> QuantizedOp | FloatOp | None:
    """The first op with which the program of a graph does not load or run.

    Args:
        graph: whose program the runtime refuses.
        example: its inputs, flat.

    Returns:
        The op; ``None`` if it cannot be told, since a part of the graph cannot be lowered alone.
    """
    ops = list(graph)
    good, bad = 0, len(ops)  # how many ops load, and how many do not
    try:
        while bad - good > 1:
            count = (good + bad) // 2
            if _is_refused(_first(graph, ops[count].node), example):
                bad = count
            else:
                good = count
    except CustomQuantizerError:
        return None
    return ops[bad - 1]


def _is_refused(model: GraphModule | None, example: tuple[Any, ...]) -> bool:
    if model is None:
        return False
    program = make_program(read_converted(model, BACKEND), example, validate=True)
    try:
        program.run(*example)
    except ProgramError:
        return True
    return False


def _first(graph: ConvertedGraph, end: Node) -> GraphModule | None:
    """The graph up to a node, which returns all that was computed and is needed behind it."""
    model = detached_copy(graph.model)
    nodes = list(model.graph.nodes)
    (stop,) = (i for i, node in enumerate(nodes) if node.name == end.name)
    kept = dict.fromkeys(nodes[:stop])
    output = nodes[-1]
    results: list[Node] = []
    depends: set[Node] = set()
    for node in kept:
        if node.op == "placeholder" or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
        if node.op != "call_function" or node not in depends or node.target in ASSERTIONS:
            continue
        if tensor_meta(node) is not None and any(user not in kept for user in node.users):
            results.append(node)
    with model.graph.inserting_before(output):
        shown = [
            model.graph.call_function(DEQUANTIZE_PER_TENSOR, (node, *node.args[1:]))
            if node.target is QUANTIZE_PER_TENSOR
            else node
            for node in results
        ]
    output.args = (tuple(shown),)
    model.graph.set_codegen(CodeGen())
    model.graph.eliminate_dead_code()
    model.recompile()
    return model if shown else None
