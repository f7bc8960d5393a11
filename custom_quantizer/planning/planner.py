"""Graph and config in, plan out: every decision, and its reason.

The planner reads the graph and writes nothing. :func:`make_plan` is its list of steps.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from custom_quantizer.config.rules import Config
from custom_quantizer.ops.backend import Backend
from custom_quantizer.planning.decisions import collect, settle
from custom_quantizer.planning.drafts import Drafts
from custom_quantizer.planning.edges import Annotator
from custom_quantizer.planning.model_io import model_io, return_integers
from custom_quantizer.planning.neighbors import (
    center,
    follow_consumers,
    follow_producers,
    leave_joins,
    leave_layers_of_calls,
    leave_prepared,
    leave_readers_of_integers,
    leave_sums,
    leave_sums_between_floats,
    leave_unprofitable,
    returned_in_float,
)
from custom_quantizer.planning.plan import Plan
from custom_quantizer.planning.wide_ranges import (
    exponents,
    leave_compared,
    leave_divisor_guards,
    leave_endless,
    leave_hidden_quotients,
    leave_pole_guards,
    leave_quotients_of_parts,
    leave_shown_totals,
    leave_whole_numbers,
    leave_wide_ranges,
    store_factors,
)


def make_plan(
    model: GraphModule, config: Config, backend: Backend, *, training: bool = False
) -> Plan:
    """Decide what every op and tensor of ``model`` becomes.

    Args:
        model: what ``torch.export.export(...).module()`` returns, made functional.
        config: the rules.
        backend: what the program will run on.
        training: the graph is trained, with one fake quantizer for all that may share a scale.

    Raises:
        ConfigError: a rule names a node or module that does not exist.
    """
    warnings = config.check(model)
    ops = Drafts(collect(model, config, backend))
    # Data movement has no format of its own: it follows once its neighbours are decided.
    for op in ops:
        if not op.moves_values:
            settle(op, backend)
    floats = leave_sums(ops)
    leave_endless(ops, backend)
    leave_joins(ops, floats, backend)
    leave_sums(ops)  # again: those that are joined in float
    leave_divisor_guards(ops)
    leave_quotients_of_parts(ops, backend)
    io = model_io(model, config, ops)
    leave_readers_of_integers(ops, io, backend)
    leave_shown_totals(ops, io, backend)
    leave_compared(ops, backend)
    leave_whole_numbers(ops, backend)
    before = -1
    while before != (before := sum(op.scheme is None for op in ops)):
        # What becomes float has consequences for what is next to it.
        leave_unprofitable(ops, io, backend)
        leave_pole_guards(ops, backend)
        leave_wide_ranges(ops, backend)
        leave_hidden_quotients(ops, backend)
        leave_prepared(ops, io, backend)
        leave_sums_between_floats(ops, backend)
    store_factors(ops, backend)
    returned = returned_in_float(ops, io)
    leave_layers_of_calls(ops, returned)
    leave_unprofitable(ops, io, backend)  # again: those next to what has become float
    center(ops)
    # What integers it is given comes first; what its consumers want only where it is given none.
    follow_producers(ops, io, returned, backend)
    follow_consumers(ops)
    return_integers(io, config, ops)
    plan = Annotator(ops, io, backend, training).plan(tuple(warnings))
    return plan if training else replace(plan, exponents=exponents(ops, io, backend))
