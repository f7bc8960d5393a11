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
    choices,
    cleanup,
    comparisons,
    dims,
    float_fallback,
    functions,
    gemm,
    merging,
    movement,
    normalization,
    pool,
    quotients,
    run_time,
    running,
    sizes,
    transcendental,
    widths,
)
from custom_quantizer.backends.xnnpack.passes._pass import (
    GEMMS,
    ORIGIN,
    GraphPass,
    Mark,
    origin_of,
    set_origin,
)
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.errors import CustomQuantizerError, LoweringError, first_line
from custom_quantizer.ops.rewrites.writes import mark_overwritten
from custom_quantizer.reference.converted import ConvertedGraph, read_converted

__all__ = [
    "FOR_OUR_PARTITIONER",
    "FOR_UPSTREAMS_PARTITIONER",
    "GEMMS",
    "IN_STEPS",
    "ORIGIN",
    "PASSES",
    "STAGES",
    "GraphPass",
    "Mark",
    "ordered",
    "origin_of",
    "run_passes",
]

STAGES: Mapping[str, tuple[GraphPass, ...]] = {
    "constants": (
        cleanup.drop_checks,
        float_fallback.refused_to_float,
        normalization.batch_norms_to_layers,
        gemm.fold_bias,
        gemm.biases_of_each,
        gemm.float_fallbacks,
        gemm.thin_strided_convs,
        gemm.weight_containers,
        gemm.join_narrow_groups,
        gemm.join_columns,
    ),
    "ops": (
        pool.simplify_pools,
        cleanup.drop_identities,
        choices.choices_by_extremes,
        comparisons.comparisons_in_steps,
        attention.constants_of_others,
        attention.quantize_tables,
        attention.gather_rows,
        attention.matmuls_to_bmms,
        attention.softmaxes_over_last_dim,
        attention.softmaxes_of_rows,
        normalization.layer_norms_to_linears,
        normalization.group_norms_to_linears,
        normalization.norms_to_linears,
        normalization.logsumexps_to_linears,
        running.running_sums_in_steps,
        normalization.drop_broadcasts,
        movement.splits_to_slices,
        movement.selects_to_slices,
        pool.split_sparse_max_pools,
        merging.strided_slices_to_views,
        movement.strided_slices_to_convs,
        movement.channel_slices_to_convs,
        movement.strided_slices_to_groups,
        movement.expands_to_biases,
        movement.expands_to_cats,
        pool.means_keep_dims,
        movement.reshapes_to_views,
        merging.transpose_second_factors,
        dims.ops_of_few_dims,
        merging.permutes_of_few_dims,
        merging.merge_moves,
        merging.continue_cats,
        movement.cats_of_five,
        functions.tie_break_offsets,
        functions.silu_products,
        functions.written_out,
        functions.plain_elus,
        functions.functions_of_sizes,
        sizes.powers_of_sizes,
        functions.tanh_gelus,
        functions.softplus_steps,
        functions.exponentials_and_logarithms,
        transcendental.transcendentals_in_steps,
        functions.powers_by_squares,
        functions.roundings_in_steps,
        quotients.quotients_in_steps,
    ),
    "widths": (
        activations.split_activations,
        widths.narrow_activations,
        widths.emulate_wide,
        activations.clamps_to_hardtanh,
        activations.merge_activations,
        activations.keep_apart,
    ),
    "boundaries": (
        boundaries.rescale_behind_moves,
        boundaries.quantize_scalars_as_rows,
        boundaries.keep_convs_float,
        boundaries.shield_composites,
        boundaries.quantize_pads,
        boundaries.tell_copies_apart,
        boundaries.dedicate_dequantize,
        boundaries.dedicate_signal_weights,
        boundaries.dedicate_run_time,
        boundaries.move_images_first,
        run_time.flatten_rows,
        run_time.pad_images,
        run_time.order_images,
        activations.break_chains,
    ),
    "order": (boundaries.dequantize_late,),
}
"""Constants first, then ops as kernels have them, then widths, then what stands between the two
kinds of numbers, then where it stands. Within a stage the order follows from what passes require
(:func:`ordered`).
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


IN_STEPS = frozenset(
    {
        *functions.BY_STEPS,
        *quotients.STEPS,
        *running.SUMS,
        *transcendental.STEPS,
        *comparisons.SHRINKS,
        *normalization.IN_STEPS,
    }
)
"""Ops of no family that passes write in steps of float."""

FOR_OUR_PARTITIONER = frozenset({merging.transpose_second_factors.name})
"""Passes that only cost time where upstream's partitioner follows: it has products in float."""

FOR_UPSTREAMS_PARTITIONER = frozenset({movement.channel_slices_to_convs.name})
"""Passes that only cost time where our partitioner follows: it has slices of dynamic sizes."""


def run_passes(
    model: GraphModule,
    graph: ConvertedGraph | None = None,
    *,
    skip: frozenset[str] = frozenset(),
) -> dict[str, int]:
    """Apply all passes to ``model`` in place.

    Args:
        model: a copy of a converted graph.
        graph: what was read from the converted graph, if somebody did; else it is read here.
        skip: names of passes to leave out.

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
        if graph_pass.name in skip:
            continue
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
