"""The captured graph in a form that can be annotated, numerics unchanged.

Rewrites, applied in ``transform_for_annotation``:

- a dtype that an op would have anyway is not asked for;
- ends of slices that are the same for all sizes become numbers, also those of halves
  (:mod:`custom_quantizer.ops.rewrites.cuts`);
- composite ops of which nothing here knows become their steps
  (:mod:`custom_quantizer.ops.rewrites.composites`);
- ops of core ATen become those that ``torch.export`` captures
  (:mod:`custom_quantizer.ops.rewrites.core_aten`);
- memory that is not written yet holds zeros, and what does not depend on the inputs becomes a
  constant (:mod:`custom_quantizer.ops.rewrites.constants`);
- in-place ops become functional: an observer cannot stand between an op and its own input.
  Where that cannot be (:mod:`custom_quantizer.ops.rewrites.writes`), the op stays and every tensor
  in that memory is marked;
- values that a mask chooses and that are put back under it are computed everywhere
  (:mod:`custom_quantizer.ops.rewrites.chosen_values`);
- complex numbers become two real ones (:mod:`custom_quantizer.ops.rewrites.complex_numbers`);
- tensors of one number and as many values as another one, whatever its size, become that number;
- constants of integers or booleans that meet floats become floats;
- composite ops become the ops they stand for (:mod:`custom_quantizer.ops.rewrites.decompositions`);
- ops that the backend computes in another form take that form (``Backend.legalize``);
- batch norms, factors and shifts become part of the layers beside them
  (:mod:`custom_quantizer.ops.rewrites.batch_norms`, :mod:`custom_quantizer.ops.rewrites.factors`);
  in training batch norms are folded later, as functions of what is trained; a factor and the shift
  behind it that have no such layer get one;
- a relu behind a layer and what moves its values stands right behind the layer
  (:mod:`custom_quantizer.ops.rewrites.activations`);
- what is computed of integers in the same way by several layers is computed once
  (:mod:`custom_quantizer.ops.rewrites.repeated`);
- numbers in add, sub, mul and ``1 - x`` become constant tensors, so that they are quantized too;
- views become reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    add_constant,
    are_static,
    argument,
    constant_of,
    is_constant,
    is_float32,
    is_parameter,
    is_same_shape,
    reads_sizes,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion, replace, rewrite_calls
from custom_quantizer.ops import known_targets
from custom_quantizer.ops.rewrites.activations import activations_to_layers
from custom_quantizer.ops.rewrites.arithmetic import PRODUCTS_APART
from custom_quantizer.ops.rewrites.batch_norms import (
    fold_into_layers,
    give_layers,
    keep_own_statistics,
)
from custom_quantizer.ops.rewrites.chosen_values import CHOSEN
from custom_quantizer.ops.rewrites.complex_numbers import COMPLEX_OPS, complex_to_real
from custom_quantizer.ops.rewrites.composites import inline_composites
from custom_quantizer.ops.rewrites.constants import (
    MAX_GROWTH,
    ZEROED,
    fold_constants,
    zero_new_memory,
)
from custom_quantizer.ops.rewrites.core_aten import CORE_ATEN, CORE_OPS
from custom_quantizer.ops.rewrites.cuts import PARTS, ends_to_numbers
from custom_quantizer.ops.rewrites.decompositions import REWRITTEN, decompose
from custom_quantizer.ops.rewrites.factors import fold_factors, join_factors, operands
from custom_quantizer.ops.rewrites.guarded import guard_choices
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS
from custom_quantizer.ops.rewrites.regions import inline_regions
from custom_quantizer.ops.rewrites.repeated import compute_once
from custom_quantizer.ops.rewrites.training_graph import mark_computed_parameters
from custom_quantizer.ops.rewrites.vmapped import write_out_batches
from custom_quantizer.ops.rewrites.writes import copy_for_layers, functionalize, write_whole

__all__ = ["KNOWN", "canonicalize"]

aten = torch.ops.aten

_SIZED: dict[Any, tuple[int, int, float | None]] = {
    aten.full.default: (0, 1, None),
    aten.ones.default: (0, 0, 1.0),
    aten.zeros.default: (0, 0, 0.0),
    aten.new_full.default: (1, 2, None),
    aten.new_ones.default: (1, 0, 1.0),
    aten.new_zeros.default: (1, 0, 0.0),
}
"""Ops that fill a tensor of some sizes: where these stand, and where the number, or the number."""

_LIKE: dict[Any, float | None] = {
    aten.fill.Scalar: None,
    aten.full_like.default: None,
    aten.ones_like.default: 1.0,
    aten.zero.default: 0.0,
    aten.zeros_like.default: 0.0,
}
"""Ops that fill a tensor of the sizes of another one: the number; ``None``: it is an argument."""

KNOWN = frozenset(
    {
        *known_targets(),
        *_LIKE,
        *_SIZED,
        *COMPLEX_OPS,
        *CORE_OPS,
        *LEGALIZATIONS,
        *PARTS,
        *PRODUCTS_APART,
        *REWRITTEN,
        *ZEROED,
    }
)
"""Overloads that a family claims or that a rewrite replaces."""

Legalize = Callable[[GraphModule, bool], object]
"""Rewrites of one backend, in place; told whether parameters are trained."""


def canonicalize(
    model: GraphModule,
    legalize: Legalize,
    *,
    whole: Collection[Any] = (),
    training: bool = False,
) -> GraphModule:
    """Apply all rewrites to ``model`` in place and return it.

    Args:
        model: a captured graph.
        legalize: what the backend rewrites.
        whole: ops of no family that the backend computes as they are.
        training: parameters change, so nothing that is computed from them is a constant.
    """
    inline_regions(model, training=training)
    write_out_batches(model)
    _give_numbers_a_dim(model)
    _drop_checks_of_values(model)
    _drop_needless_dtypes(model)
    ends_to_numbers(model)
    inline_composites(model, KNOWN.union(whole).__contains__, training=training)
    rewrite_calls(model, CORE_ATEN, training=training)
    zero_new_memory(model)
    fold_constants(model, parameters=not training)
    keep_own_statistics(model)
    if functionalize(model):
        # What was written into, piece by piece, is written no more: zeros, masks.
        fold_constants(model, parameters=not training)
    complex_to_real(model, training=training)
    rewrite_calls(model, CHOSEN, training=training)
    _fills_to_numbers(model)
    _integers_to_floats(model)
    rewrite_calls(model, PRODUCTS_APART, training=training, of_sizes=PRODUCTS_APART.values())
    rewrite_calls(model, PARTS, training=training, of_sizes=PARTS.values())
    decompose(model, training=training)
    _fills_to_rows(model)
    _drop_neutral(model)
    if training:
        mark_computed_parameters(model)
    legalize(model, training)
    if whole:  # what has no float keeps its tables, whose entries are all numbers
        guard_choices(model, training=training)
    fold_factors(model, training=training)
    join_factors(model, training=training)
    if not training:
        # Forms may have steps that read constants alone, such as the first of a recurrent layer;
        # not every runtime computes a layer whose input is one.
        fold_constants(model)
        give_layers(model)
        fold_into_layers(model)
    activations_to_layers(model)
    compute_once(model)
    write_whole(model)
    copy_for_layers(model)
    _numbers_to_tensors(model)
    _views_to_reshapes(model)
    model.graph.eliminate_dead_code()
    model.recompile()
    return model


_ALONG_A_DIM = frozenset(
    {
        *(aten.cumprod.default, aten.cumsum.default, aten.flip.default, aten.transpose.int),
        *(aten.log_softmax.int, aten.logcumsumexp.default, aten.logsumexp.default),
        *(aten.softmax.int, aten._log_softmax.default, aten._softmax.default),
    }
)
"""Ops along a dim, or between two, that PyTorch also takes of a number, as if it had one."""


def _give_numbers_a_dim(model: GraphModule) -> None:
    """What PyTorch takes for the one dim of a number becomes one: nobody else does so."""
    for node in list(model.graph.nodes):
        if node.target not in _ALONG_A_DIM or tensor_meta(node.args[0]) is None:
            continue
        if shape_of(node.args[0]) or overwritten_by(node) is not None:
            continue
        insert = Insertion(model, node)
        row = insert.reshape(cast(Node, node.args[0]), [1])
        result = insert.call(node.target, row, *node.args[1:], **node.kwargs)
        replace(model, node, insert.reshape(result, []))


def _drop_checks_of_values(model: GraphModule) -> None:
    """``torch.distributions`` checks its arguments; no program does.

    The comparisons that only a check reads would keep tensors from integers. What is written into
    memory that others see stays.
    """
    for node in list(model.graph.nodes):
        if node.target not in (aten._assert_async.default, aten._assert_async.msg):
            continue
        unread = [node]
        for each in unread:
            sources = each.all_input_nodes
            model.graph.erase_node(each)
            for source in sources:
                said = [u for u in source.users if u.target is aten._assert_tensor_metadata.default]
                alone = source.op == "call_function" and len(said) == len(source.users)
                if alone and not source.is_impure():
                    for user in said:
                        model.graph.erase_node(user)
                    unread.append(source)


def _drop_needless_dtypes(model: GraphModule) -> None:
    """``sum(x, dtype=torch.float32)`` of floats is ``sum(x)``; what has a dtype is another op."""
    for node in model.graph.nodes:
        position = _place_of_dtype(node.target)
        if position is None or not is_float32(node.args[0] if node.args else None):
            continue
        if argument(node, position, "dtype") == torch.float32:
            later = node.args[position + 1 :]
            node.args = node.args[:position] + ((None, *later) if later else ())
            node.kwargs = {name: arg for name, arg in node.kwargs.items() if name != "dtype"}


@cache
def _place_of_dtype(target: Any) -> int | None:
    """Where an op is told a dtype that is else the one of the tensor it is called on."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.returns:
        return None
    given = target._schema.arguments
    if not given or given[0].name not in {"self", "input"}:
        return None
    has_default = [arg.name == "dtype" and arg.has_default_value() for arg in given]
    return has_default.index(True) if True in has_default else None


def _numbers_to_tensors(model: GraphModule) -> None:
    for node in list(model.graph.nodes):
        if reads_sizes(node):
            continue
        if node.target is aten.rsub.Scalar and argument(node, 2, "alpha", 1) == 1:
            data, number = node.args[:2]
            if is_float32(data):
                node.meta.setdefault("original_target", node.target)
                node.target = aten.sub.Tensor
                node.args = (_constant(model, node, cast(float, number)), data)
                node.kwargs = {}
        elif node.target is aten.div.Tensor and type(node.args[1]) is int:
            # An int would become an int64 tensor on the way, by which no delegate divides.
            if is_float32(node.args[0]):
                node.update_arg(1, float(node.args[1]))
        elif node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
            if not any(is_float32(arg) for arg in node.args[:2]):
                continue
            node.args = tuple(
                _constant(model, node, arg)
                if i < 2 and isinstance(arg, (int, float)) and not isinstance(arg, bool)
                else arg
                for i, arg in enumerate(node.args)
            )


_PROMOTING = frozenset(
    {
        aten.add.Tensor,
        aten.div.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Tensor,
        aten.pow.Tensor_Tensor,
        aten.rsub.Tensor,
        aten.sub.Tensor,
    }
)
"""They compute with two tensors in the type of both."""

_CHOOSING = frozenset({aten.where.self})

_SPREADING = _PROMOTING | _CHOOSING
"""They spread a number over all values of a tensor, those that choose also one of no integers."""


def _filling(node: Node) -> float | None:
    """The number that a tensor of float32 is filled with."""
    if not (node.target in _SIZED or node.target in _LIKE) or not is_float32(node):
        return None
    at, number = _SIZED[node.target][1:] if node.target in _SIZED else (1, _LIKE[node.target])
    number = argument(node, at, "fill_value") if number is None else number
    is_number = isinstance(number, (int, float)) and overwritten_by(node) is None
    return float(number) if is_number else None


def _fills_to_numbers(model: GraphModule) -> None:
    """What is filled with one number is that number, where it meets a tensor of its size.

    Of sizes that are known it is a constant already.
    """
    for node in list(model.graph.nodes):
        number = _filling(node)
        if number is None:
            continue
        spreading = _SPREADING if math.isfinite(number) else _CHOOSING
        for user in [user for user in node.users if user.target in spreading]:
            others = [
                n for n in user.all_input_nodes if n is not node and tensor_meta(n) is not None
            ]
            if any(is_same_shape(shape_of(other), shape_of(user)) for other in others):
                user.replace_input_with(node, _constant(model, user, number))


_NEUTRAL = {aten.div.Tensor: 1, aten.mul.Tensor: 1, aten.sub.Tensor: 0}
"""Ops that give their first input where the second is this number; not a sum: -0.0 + 0.0 is 0.0."""


def _drop_neutral(model: GraphModule) -> None:
    """What is multiplied by a mask of ones is what it was, as where nothing is masked.

    A parameter is what it is trained to be.
    """
    for node in list(model.graph.nodes):
        number = _NEUTRAL.get(node.target)
        if number is None or overwritten_by(node) is not None or argument(node, 2, "alpha", 1) != 1:
            continue
        for given, other in operands(node):
            if overwritten_by(given) is not None or is_constant(given):
                continue
            if not is_constant(other) or is_parameter(model, other):
                continue
            meta, result = tensor_meta(given), tensor_meta(node)
            if meta is None or result is None or meta.dtype != result.dtype:
                continue
            value = constant_of(model, other)
            if is_same_shape(meta.shape, result.shape) and bool((value == number).all()):
                replace(model, node, given)
                break


def _fills_to_rows(model: GraphModule) -> None:
    """What is filled with one number, for any batch, is one row that is expanded."""
    for node in list(model.graph.nodes):
        number = _filling(node)
        if number is None or not node.users or not math.isfinite(number):
            continue
        shape: tuple[Any, ...] = shape_of(node)
        row = [size if isinstance(size, int) else 1 for size in shape]
        is_known = are_static(shape)
        if is_known or math.prod(row) > MAX_GROWTH:
            continue
        insert = Insertion(model, node)
        if node.target in _SIZED:
            sizes = argument(node, _SIZED[node.target][0], "size")
        else:
            sizes = [
                -1 if isinstance(size, int) else insert.call(aten.sym_size.int, node.args[0], dim)
                for dim, size in enumerate(shape)
            ]
        filled = insert.constant("row", torch.full(row, number))
        replace(model, node, insert.call(aten.expand.default, filled, sizes))


def _integers_to_floats(model: GraphModule) -> None:
    """Constants of integers, and all booleans, that meet float32 become what they would become.

    Integers that are computed may be too many for 8 bits: what reads them stays in float.
    """
    for node in list(model.graph.nodes):
        if node.target not in _PROMOTING or not any(map(is_float32, node.args[:2])):
            continue
        for position, arg in enumerate(node.args[:2]):
            meta = tensor_meta(arg) if isinstance(arg, Node) else None
            if meta is None or meta.dtype.is_floating_point or meta.dtype.is_complex:
                continue
            source = cast(Node, arg)
            if is_constant(source) and source.op == "get_attr":
                value = constant_of(model, source).to(torch.float32)
                node.update_arg(position, _float_constant(model, node, value))
            elif meta.dtype == torch.bool and not (overwritten_by(node) or overwritten_by(source)):
                node.update_arg(position, _as_float(source, meta, node))


def _as_float(source: Node, meta: Tensor, before: Node) -> Node:
    with before.graph.inserting_before(before):
        converted = before.graph.call_function(aten.to.dtype, (source, torch.float32))
    converted.meta = {**before.meta, "val": meta.to(torch.float32)}
    return converted


def _views_to_reshapes(model: GraphModule) -> None:
    """Forms of ops may have other strides than the ops, which a view would not take.

    Of memory that is written in place a view has to be one, and inputs are as they were.
    """
    for node in model.graph.nodes:
        if node.target is not aten.view.default or overwritten_by(node) is not None:
            continue
        if cast(Node, node.args[0]).op != "placeholder":
            node.meta.setdefault("original_target", node.target)
            node.target = aten.reshape.default


def _constant(model: GraphModule, node: Node, number: float) -> Node:
    value = torch.tensor(float(number), dtype=torch.float32)
    return _float_constant(model, node, value)


def _float_constant(model: GraphModule, node: Node, value: Tensor) -> Node:
    constant = add_constant(model, f"{node.name}_constant", value, node)
    constant.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return constant
