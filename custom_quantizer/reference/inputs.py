"""Inputs and outputs of a converted graph, as every backend takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.graph import check_inputs, tensor_meta
from custom_quantizer.errors import InputError
from custom_quantizer.reference.converted import ConvertedGraph

__all__ = ["check_example", "placeholder_metas", "specs_of"]


def check_example(graph: ConvertedGraph, example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The example with contiguous tensors, and integers where the program takes these.

    Returns:
        The arguments as capture nested them, those captured by keyword last.

    Raises:
        InputError: it does not fit the graph.
    """
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            f"example_inputs is a tuple of the model's inputs, got {type(example_inputs).__name__};"
            " for one tensor x write (x,)"
        )
    metas = placeholder_metas(graph.model)
    form = CallForm.of(graph.model)
    flat = form.flat(tuple(example_inputs))
    for i, (value, meta) in enumerate(zip(flat, metas, strict=False)):
        if meta is None and not isinstance(value, (int, float, type(None))):
            raise InputError(
                f"input {i} is a {type(value).__name__}; a program takes tensors and numbers; "
                "capture a module whose forward sets it"
            )
    if len(flat) != len(metas):
        raise InputError(f"the graph takes {len(metas)} inputs, the example has {len(flat)}")
    flat = graph.borders.integers(flat, graph.backend.arithmetic.quantize)
    check_inputs(flat, metas)
    args, kwargs = form.arguments([_contiguous(value) for value in flat])
    return (*args, *kwargs.values())


def _contiguous(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # contiguous() keeps ambiguous strides (a channel dim of 1); a fresh copy does not.
    return value.detach().clone(memory_format=torch.contiguous_format)


def placeholder_metas(model: GraphModule) -> list[torch.Tensor | None]:
    """The tensors that capture recorded for the inputs; ``None`` for what is no tensor."""
    return [tensor_meta(node) for node in model.graph.nodes if node.op == "placeholder"]


def specs_of(model: GraphModule) -> tuple[Any, Any]:
    """Structure of ``(args, kwargs)`` and of the result, if capture recorded them."""
    info = getattr(model.graph._codegen, "pytree_info", None)
    return (None, None) if info is None else (info.in_spec, info.out_spec)
