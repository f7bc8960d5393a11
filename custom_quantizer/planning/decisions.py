"""Which ops are quantized, each for its own sake: rules, what can be, what a backend takes."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.config.rules import Config
from custom_quantizer.core.graph import (
    FOLDED_KEY,
    constant_of,
    describe,
    effective_users,
    is_constant,
    is_float32,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import FULL_PRECISION, IN_FLOAT, MADE_UP
from custom_quantizer.core.schemes import OpScheme
from custom_quantizer.ops import OpRule, PatternMatch, Trait, rule_of, unknown_op
from custom_quantizer.ops.backend import Backend
from custom_quantizer.planning.drafts import ANNOTATED_BEFORE, DraftOp, is_annotated
from custom_quantizer.planning.guards import may_guard


def collect(model: GraphModule, config: Config, backend: Backend) -> list[DraftOp]:
    """One entry per op; an activation that is fused belongs to the op before it."""
    ops: list[DraftOp] = []
    fused: set[Node] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or node in fused:
            continue
        if FOLDED_KEY in node.meta:
            continue  # computed from parameters: a constant once training is over
        if tensor_meta(node) is None and not isinstance(node.meta.get("val"), (list, tuple)):
            continue  # sizes, assertions: no tensor comes out
        op = DraftOp(node, config.resolve(node), rule_of(node))
        if is_annotated(node):
            op.reason = ANNOTATED_BEFORE
        elif op.rule is not None:
            op.support = backend.support(op.rule)
            bound = op.rule.match(op.rule, node)
            if isinstance(bound, str):
                op.reason = bound
            elif (refusal := op.support.refuses(bound)) != "":
                op.reason = refusal
            elif (reason := _overwritten(node, bound)) is not None:
                op.reason = reason
            else:
                op.match = bound
                op.fused = _fusable(op, config)
                if op.fused is not None:
                    fused.add(op.fused)
        ops.append(op)
    return ops


def _overwritten(node: Node, match: PatternMatch) -> str | None:
    """Why no quantize node may stand before or behind ``node``, if none may."""
    for tensor in (node, *match.inputs):
        writer = overwritten_by(tensor)
        if writer is not None:
            return f"{writer} writes into the memory of {describe(tensor)} in place"
    return None


def _fusable(op: DraftOp, config: Config) -> Node | None:
    rule = cast(OpRule, op.rule)
    users = effective_users(op.node)
    # A dynamic op gives float32, so there is nothing to clamp on integers.
    if len(users) != 1 or op.decision.scheme is None or op.decision.scheme.dynamic:
        return None
    follower = rule_of(users[0])
    fuses = op.support is not None and op.support.fuses
    if not fuses or follower is None or follower.family not in rule.fuses:
        return None
    if isinstance(follower.match(follower, users[0]), str) or overwritten_by(users[0]):
        return None
    if is_annotated(users[0]):
        return None
    if op.match is not None and op.match.weight is not None and may_guard(users[0]):
        return None  # it may have to be float, which the layer need not be
    decision = config.resolve(users[0])
    # A rule aimed at the activation itself says it is an op of its own.
    if decision.explicit and decision.scheme != op.decision.scheme:
        return None
    return users[0]


def settle(op: DraftOp, backend: Backend) -> None:
    """Decide an op that is quantized for its own sake."""
    scheme = op.decision.scheme
    if op.reason:
        return
    if op.rule is None:
        op.reason = unknown_op(op.node)
        return
    if op.match is None or op.support is None:
        return
    if op.support.float_reason:
        op.reason = op.support.float_reason
        _store_table(op, scheme)
        return
    if IN_FLOAT in op.node.meta:
        op.reason = op.node.meta[IN_FLOAT]
        return
    if scheme is None:
        op.reason = op.decision.reason
        return
    made_up = op.match.weight is not None and MADE_UP in op.match.weight.meta
    if scheme.dynamic and (op.match.weight is None or made_up):
        op.reason = f"{scheme.name} quantizes layers with weights; everything else stays in float"
        return
    if op.has(Trait.PRODUCT) and FULL_PRECISION in op.node.meta and not op.decision.explicit:
        op.reason = "the model turns autocast off around it, which asks for full precision"
        return
    for tensor in (*op.match.inputs, op.output):
        meta = tensor_meta(tensor)
        if meta is None or meta.dtype != torch.float32:
            kind = "not a single tensor" if meta is None else str(meta.dtype)
            op.reason = f"{describe(tensor)} is {kind}; only float32 tensors are quantized"
            op.reason += to_float(meta)
            return
        refusal = backend.refuses_tensor(tensor)
        if refusal:
            op.reason = f"{describe(tensor)} {refusal}"
            return
    reason = op.decision.reason
    if made_up and not op.decision.aimed and _is_too_narrow(scheme, cast(Node, op.match.weight)):
        scheme = _with_wide_weight(scheme)
        reason += f", and {_ENOUGH} bits for a weight that is not one of the model"
    for accepts in (op.rule.accepts, op.support.accepts):
        verdict = accepts(op.match, scheme)
        if not verdict.ok:
            op.reason = verdict.reason
            return
    op.scheme, op.reason = scheme, reason


_ENOUGH = 8
"""Bits of the weights that rewrites make up: fewer would not make a Fourier transform smaller by
much, only wrong by more than all layers of the model."""


def _is_too_narrow(scheme: OpScheme, weight: Node) -> bool:
    """Whether more bits help: not those of sums and means, which have one magnitude beside 0."""
    if scheme.weight.format.bits >= _ENOUGH:
        return False
    size = constant_of(cast(GraphModule, weight.graph.owning_module), weight).abs()
    return not bool(((size == 0) | (size == size.max())).all())


def _with_wide_weight(scheme: OpScheme) -> OpScheme:
    """The scheme with a weight of as many bits, and without groups of them."""
    weight = replace(scheme.weight, format=replace(scheme.weight.format, bits=_ENOUGH))
    if weight.group_size is not None:
        weight = replace(weight, granularity="per_channel", group_size=None)
    return replace(scheme, weight=weight)


def _store_table(op: DraftOp, scheme: OpScheme | None) -> None:
    """A table whose rows are read in float is stored as integers where that is what is asked for.

    A dynamic scheme is about weights. In a static one a rule has to name the op or its type: what
    reads the rows may want integers, and then the table becomes those.
    """
    if scheme is not None and (scheme.dynamic or op.decision.aimed):
        store_rows(op, op.decision.reason)


def store_rows(op: DraftOp, why: str) -> None:
    """Store the table of an op that reads rows of one in float as integers, if it can be."""
    stored = None if op.support is None else op.support.table
    if stored is None or op.match is None:
        return
    (table,) = op.match.inputs
    if not is_constant(table) or not is_float32(table):
        return
    op.table = stored
    op.reason = (
        f"its table is stored as {stored.format}, one scale a row ({why}), and its rows are read "
        "in float"
    )


def to_float(meta: torch.Tensor | None) -> str:
    """What to do about a tensor of another floating-point type."""
    if meta is None or not meta.dtype.is_floating_point:
        return ""
    return "; call model.float() and hand in float32 inputs before torch.export.export"
