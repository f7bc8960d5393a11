"""Graph and config in, plan out: every decision, and its reason.

The planner reads the graph and writes nothing. :func:`make_plan` is its list of steps.
"""

from __future__ import annotations

from torch.fx import GraphModule

from custom_quantizer.config.rules import Config
from custom_quantizer.ops.backend import Backend
from custom_quantizer.planning.decisions import collect, settle
from custom_quantizer.planning.edges import Annotator
from custom_quantizer.planning.model_io import model_io, return_integers
from custom_quantizer.planning.neighbors import (
    center,
    follow_consumers,
    follow_producers,
    leave_joins,
    leave_layered,
    leave_readers_of_integers,
    leave_sums,
    leave_unprofitable,
    returned_in_float,
)
from custom_quantizer.planning.plan import Plan
from custom_quantizer.planning.poles import leave_divisors, leave_poles, leave_powers


def make_plan(model: GraphModule, config: Config, backend: Backend) -> Plan:
    """Decide what every op and tensor of ``model`` becomes.

    Args:
        model: what ``torch.export.export(...).module()`` returns, made functional.
        config: the rules.
        backend: what the program will run on.

    Raises:
        ConfigError: a rule names a node or module that does not exist.
    """
    warnings = config.check(model)
    ops = collect(model, config, backend)
    producer = {op.output: op for op in ops}
    anchors = {op.node: op for op in ops}
    # Data movement has no format of its own: it follows once its neighbours are decided.
    for op in ops:
        if not op.moves_values:
            settle(op, backend)
    floats = leave_sums(ops, anchors)
    leave_joins(ops, producer, floats)
    leave_divisors(ops, producer)
    io = model_io(model, config, ops)
    leave_readers_of_integers(ops, io, backend)
    leave_unprofitable(ops, io, backend)
    leave_poles(ops, producer, backend)
    leave_powers(ops, producer, backend)
    returned = returned_in_float(ops, anchors, io)
    leave_layered(ops, returned)
    leave_unprofitable(ops, io, backend)  # next to what stays in float now
    center(ops, producer)
    # What integers it is given comes first; what its consumers want only where it is given none.
    follow_producers(ops, producer, io, returned, backend)
    follow_consumers(ops, anchors)
    return_integers(io, config, producer)
    return Annotator(ops, producer, io, backend).plan(tuple(warnings))
