"""Rewrites of a converted graph that keep every op inside the delegate.

A pass is one small rewrite: what it looks for, what it puts there, and whether it changes
numerics. They run on a copy of the converted graph, in stages, and within a stage in
an order that follows from what they require (:func:`ordered`). Nodes that a
pass makes carry the name of the op they stand for (``node.meta["custom"]``), so that what the
backend did can be traced back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import GraphModule

from custom_quantizer.backends.xnnpack.passes import (
    activations,
    attention,
    boundaries,
    cleanup,
    float_fallback,
    functions,
    gemm,
    merging,
    movement,
    normalization,
    pool,
    widths,
)
from custom_quantizer.backends.xnnpack.passes._pass import (
    GEMMS,
    ORIGIN,
    GraphPass,
    origin_of,
    set_origin,
)
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.errors import CustomQuantizerError, LoweringError, first_line
from custom_quantizer.ops.rewrites.canonical import mark_overwritten
from custom_quantizer.reference.converted import ConvertedGraph, read_converted

__all__ = ["GEMMS", "ORIGIN", "PASSES", "STAGES", "GraphPass", "ordered", "origin_of", "run_passes"]

STAGES: Mapping[str, tuple[GraphPass, ...]] = {
    "constants": (
        cleanup.DROP_CHECKS,
        float_fallback.REFUSED_TO_FLOAT,
        gemm.FOLD_BIAS,
        gemm.FLOAT_FALLBACKS,
        gemm.WEIGHT_CONTAINERS,
        gemm.JOIN_NARROW_GROUPS,
    ),
    "ops": (
        pool.SIMPLIFY_POOLS,
        cleanup.DROP_IDENTITIES,
        attention.QUANTIZE_TABLES,
        attention.MATMULS_TO_BMMS,
        attention.SOFTMAXES_OVER_LAST_DIM,
        attention.SOFTMAXES_OF_ROWS,
        normalization.LAYER_NORMS_TO_LINEARS,
        normalization.GROUP_NORMS_TO_LINEARS,
        normalization.NORMS_TO_LINEARS,
        normalization.DROP_BROADCASTS,
        movement.SPLITS_TO_SLICES,
        movement.SELECTS_TO_SLICES,
        pool.SPLIT_SPARSE_MAX_POOLS,
        merging.STRIDED_SLICES_TO_VIEWS,
        movement.STRIDED_SLICES_TO_CONVS,
        movement.CHANNEL_SLICES_TO_CONVS,
        movement.STRIDED_SLICES_TO_GROUPS,
        movement.EXPANDS_TO_CATS,
        pool.MEANS_KEEP_DIMS,
        movement.RESHAPES_TO_VIEWS,
        merging.MERGE_MOVES,
        functions.TIE_BREAK_OFFSETS,
        functions.SILU_PRODUCTS,
        functions.WRITTEN_OUT,
        functions.PLAIN_ELUS,
        functions.TANH_GELUS,
    ),
    "widths": (
        activations.SPLIT_ACTIVATIONS,
        widths.NARROW_ACTIVATIONS,
        widths.EMULATE_WIDE,
        activations.CLAMPS_TO_HARDTANH,
        activations.KEEP_APART,
        activations.BREAK_CHAINS,
    ),
    "boundaries": (
        boundaries.QUANTIZE_SCALARS_AS_ROWS,
        boundaries.KEEP_CONVS_FLOAT,
        boundaries.SHIELD_COMPOSITES,
        boundaries.QUANTIZE_PADS,
        boundaries.TELL_COPIES_APART,
        boundaries.DEDICATE_DEQUANTIZE,
    ),
}
"""Constants first, then ops as kernels have them, then widths, then what stands between the two
kinds of numbers. Within a stage the order follows from what passes require (:func:`ordered`).
"""


def ordered(passes: Iterable[GraphPass]) -> tuple[GraphPass, ...]:
    """The passes of a stage, each behind those that it requires; else as they are listed.

    Raises:
        LoweringError: a pass requires one that is not there, or itself by way of others.
    """
    waiting = {graph_pass.name: graph_pass for graph_pass in passes}
    done: dict[str, GraphPass] = {}
    while waiting:
        ready = next((p for p in waiting.values() if p.requires <= done.keys()), None)
        if ready is None:
            stuck = next(iter(waiting.values()))
            missing = ", ".join(sorted(stuck.requires - done.keys()))
            raise LoweringError(f"pass {stuck.name} requires {missing}, which cannot run before it")
        done[ready.name] = waiting.pop(ready.name)
    return tuple(done.values())


PASSES = tuple(graph_pass for stage in STAGES.values() for graph_pass in ordered(stage))
"""All passes, in the order in which they run."""


def run_passes(model: GraphModule, graph: ConvertedGraph | None = None) -> dict[str, int]:
    """Apply all passes to ``model`` in place.

    Args:
        model: a copy of a converted graph.
        graph: what was read from the converted graph, if somebody did; else it is read here.

    Returns:
        Pass name -> number of places changed, for the passes that changed any.

    Raises:
        LoweringError: a pass met a graph it does not understand; the pass is named.
    """
    for node in model.graph.nodes:
        if node.op == "call_function" and not (is_quantize(node) or is_dequantize(node)):
            set_origin(node, node.name)
    mark_overwritten(model)
    float_fallback.mark_fallbacks(model, graph or read_converted(model))
    applied: dict[str, int] = {}
    for graph_pass in PASSES:
        try:
            changed = graph_pass.run(model)
        except CustomQuantizerError:
            raise
        except Exception as error:
            raise LoweringError(
                f"pass {graph_pass.name} ({graph_pass.before}) failed: {first_line(error)}"
            ) from error
        if changed:
            applied[graph_pass.name] = changed
    model.graph.eliminate_dead_code()
    cleanup.drop_unused_constants(model)
    model.graph.lint()
    model.recompile()
    return applied
