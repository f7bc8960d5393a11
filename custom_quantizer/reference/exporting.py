"""Exporting a converted graph once more, with the sizes it was captured with.

Whatever hands a converted graph to a tool that takes an ``ExportedProgram`` (ExecuTorch, the
exporter of ONNX) goes through here.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from custom_quantizer.core.graph import detached_copy, size_bounds
from custom_quantizer.core.memory import reached, viewed_by, written_inputs
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import CustomQuantizerError, LoweringError, first_line
from custom_quantizer.reference.inputs import placeholder_metas, specs_of

__all__ = [
    "DEFAULT_DYNAMIC_MAX",
    "dynamic_shapes_of",
    "export_again",
    "is_plain",
]

DEFAULT_DYNAMIC_MAX = 64
"""Largest size of a dynamic dimension when the captured graph gives none: memory is planned."""


_KERNEL_LIMIT = 16
"""From this batch on, and with one thread, PyTorch may choose another kernel for a convolution.

``_select_conv_backend`` asks (``use_mkldnn`` in aten/src/ATen/native/Convolution.cpp, torch 2.15).
"""


def dynamic_shapes_of(
    model: GraphModule, dynamic_max: int, *, shared: bool = False, widest: bool = False
) -> list[dict[int, Any] | None]:
    """Dynamic dims for exporting again, with the bounds that capture recorded.

    Args:
        model: the graph.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        shared: give sizes that are the same in all calls, such as the batch of several inputs, one
            dim; otherwise export finds out what the ops tell of them.
        widest: sizes are traced at their bounds. A bound of :data:`_KERNEL_LIMIT` is one more: as
            lower limit and upper bound it would be the only size.
    """
    shapes: list[dict[int, Any] | None] = []
    metas = placeholder_metas(model)
    count = Counter(size for meta in metas if meta is not None for size in map(_symbol, meta.shape))
    named: dict[Any, Any] = {}
    for meta in metas:
        if meta is None:
            shapes.append(None)  # a number, None: export takes no shape for it
            continue
        dims: dict[int, Any] = {}
        sizes: tuple[Any, ...] = tuple(meta.shape)
        for dim, size in enumerate(sizes):
            if isinstance(size, int):
                continue
            low, high = size_bounds(size)
            high = dynamic_max if high is None else high
            high += widest and high == _KERNEL_LIMIT
            symbol = _symbol(size)
            if shared and symbol is not None and count[symbol] > 1:
                name = f"size{len(named)}"
                dims[dim] = named.setdefault(symbol, torch.export.Dim(name, min=low, max=high))
            else:
                dims[dim] = torch.export.Dim.AUTO(min=low, max=high)
        shapes.append(dims)
    return shapes


def _symbol(size: Any) -> Any:
    """The symbol that a dynamic size is; ``None``: it is a number, or made of symbols."""
    return None if isinstance(size, int) or not size.node.expr.is_Symbol else size.node.expr


@tools()
def export_again(
    model: GraphModule, example: tuple[Any, ...], dynamic_max: int, *, widest: bool = False
) -> torch.export.ExportedProgram:
    """Export a converted graph with the dynamic sizes it was captured with.

    Args:
        model: the graph.
        example: its inputs.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.
        widest: trace at the upper bounds instead of at the sizes of the example.

    Raises:
        LoweringError: ``torch.export`` refused it, or a parameter is written.
    """
    if written := _written_parameters(model):
        raise LoweringError(
            f"the model writes into its parameter {written[0]} in every call, and a program keeps "
            "buffers from call to call, no parameters; if it does so in its first call only, call "
            "it once before it is captured, else register a buffer"
        )
    auto = dynamic_shapes_of(model, dynamic_max, widest=widest)
    if not all(map(is_plain, specs_of(model))):
        # No file names these types, so it takes and returns flat lists.
        model = detached_copy(model)
        model.graph.set_codegen(CodeGen())
        model.recompile()
        example = tuple(pytree.tree_leaves(example))
    in_spec, _ = specs_of(model)
    structure = pytree.tree_structure((example, {})) if in_spec is None else in_spec
    if any(auto):
        example = _widened(example, auto, widest)
    args, kwargs = pytree.tree_unflatten(pytree.tree_leaves(example), structure)

    def exported(flat: list[dict[int, Any] | None]) -> torch.export.ExportedProgram:
        shapes: Any = None
        if any(flat):
            positional, named = pytree.tree_unflatten(flat, structure)
            shapes = (*positional, *named.values())
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)

    shared = dynamic_shapes_of(model, dynamic_max, shared=True, widest=widest)
    if shared != auto:
        # A size of its own for each input is more memory in kernels outside the delegate.
        with suppress(Exception):  # where ops tell more of a size, only that is refused
            return exported(shared)
    try:
        return exported(auto)
    except CustomQuantizerError:
        raise
    except Exception as error:
        raise LoweringError(
            f"torch.export refused the rewritten graph: {first_line(error)}; check that the "
            "example inputs fit the dynamic sizes the model was captured with"
        ) from error


def _written_parameters(model: GraphModule) -> list[str]:
    """Names of parameters that the graph writes in place; export returns them as results."""
    written = [source for node in model.graph.nodes for source in written_inputs(node)]
    reads = {read for source in written for read in reached(source, viewed_by)}
    names = {str(read.target) for read in reads if read.op == "get_attr"}
    return sorted(n for n, _ in model.named_parameters(remove_duplicate=False) if n in names)


def _widened(
    example: tuple[Any, ...], dynamic: list[dict[int, Any] | None], widest: bool
) -> tuple[Any, ...]:
    """Repeat examples of size 1 along dynamic dimensions: export would fix the size at 1."""
    values, structure = pytree.tree_flatten(example)
    for i, dims in enumerate(dynamic):
        for dim, hint in (dims or {}).items():
            size = values[i].shape[dim]
            wanted = hint.max if widest else max(size, 2)
            if size != wanted:
                values[i] = values[i].index_select(dim, torch.arange(wanted) % size)
    return cast(tuple[Any, ...], pytree.tree_unflatten(values, structure))


def is_plain(spec: Any) -> bool:
    """Whether a structure is made of tuples, lists and dicts, which a file can name."""
    if spec is None or spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(is_plain, spec.children()))
