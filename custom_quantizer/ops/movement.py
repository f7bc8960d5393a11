"""Ops that only move values: the same integers in another order, shape or number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.graph import (
    are_static,
    argument,
    describe,
    reads_sizes,
    shape_of,
    tensor_meta,
    view_sizes,
)
from custom_quantizer.errors import ConversionError
from custom_quantizer.ops._rule import (
    Integers,
    OpRule,
    PatternMatch,
    QParamSharing,
    QuantizedOp,
    Trait,
)
from custom_quantizer.ops.elementwise import _case, _match_single

__all__ = [
    "CAT",
    "GETITEM",
    "IDENTITY",
    "PAD",
    "RESHAPE",
    "RULES",
    "SELECT",
    "SLICE",
    "SPLIT",
    "is_identity",
    "passes_on",
]

aten = torch.ops.aten

_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.to.dtype,
        aten.lift_fresh_copy.default,
    }
)
_RESHAPES = frozenset(
    {
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
_PERMUTES = frozenset(
    {aten.permute.default, aten.t.default, aten.transpose.int, aten.movedim.intlist}
)


def is_identity(node: Node) -> bool:
    """Whether a node passes its input on, values and shape unchanged."""
    return node.target in _IDENTITIES


def _match_move(rule: OpRule, node: Node) -> PatternMatch | str:
    meta, data = tensor_meta(node), node.args[0]
    source = tensor_meta(data) if isinstance(data, Node) else None
    if meta is not None and source is not None and meta.dtype != source.dtype:
        return f"it changes the dtype from {source.dtype} to {meta.dtype}"
    dropouts = (aten.dropout.default, aten.feature_dropout.default)
    if node.target in dropouts and argument(node, 2, "train", False):
        return "it drops values at random (training mode)"
    if node.target in _RESHAPES and isinstance(data, Node):
        # The recorded shape says what its arguments do not.
        return PatternMatch(rule, node, (data,))
    return _match_single(rule, node)


def _apply(op: QuantizedOp, inputs: Integers, _arithmetic: Arithmetic) -> Any:
    """Run the aten op itself: it works on integers as on floats."""
    node = op.node
    return cast("Callable[..., Any]", node.target)(inputs[0], *node.args[1:], **node.kwargs)


def _reshape_integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    """Reshape to the recorded shape: sizes may be symbolic, and integers have any strides."""
    sizes = view_sizes(shape_of(op.node))
    if sizes.count(-1) <= 1:
        return inputs[0].reshape(sizes)
    if reads_sizes(op.node):
        raise ConversionError(
            f"{describe(op.node)} makes a tensor of shape {shape_of(op.node)}, of which only the "
            "graph tells the dynamic sizes"
        )
    return cast(Tensor, _apply(op, inputs, arithmetic))


_move = partial(OpRule, match=_match_move, sharing=QParamSharing.SAME)
_view = partial(_move, traits=frozenset({Trait.VIEW}))

_IMAGE = (2, 8, 6, 4)

IDENTITY = _view(
    family="identity",
    targets=_IDENTITIES,
    integers=lambda _op, inputs, _arithmetic: inputs[0],
    cases=(
        _case("clone", lambda x: x.clone(), _IMAGE),
        _case("contiguous", lambda x: x.transpose(1, 2).contiguous(), _IMAGE),
        _case("dropout", lambda x: F.dropout(x, 0.5, training=False), _IMAGE),
    ),
)


def passes_on(node: Node) -> bool:
    """Whether a node passes its input on, dtype unchanged, and drops nothing in training."""
    return is_identity(node) and not isinstance(IDENTITY.match(IDENTITY, node), str)


RESHAPE = _view(
    family="reshape",
    targets=_RESHAPES,
    integers=_reshape_integers,
    cases=(
        _case("view", lambda x: x.view(2, 8, 24), _IMAGE),
        _case("reshape", lambda x: x.reshape(2, -1), _IMAGE),
        _case("flatten", lambda x: x.flatten(1), _IMAGE),
        _case("squeeze", lambda x: x.squeeze(-1), (2, 8, 6, 1)),
        _case("squeeze_all", lambda x: x.squeeze(), (2, 1, 6, 1)),
        _case("unsqueeze", lambda x: x.unsqueeze(1), (2, 8, 6)),
        _case("unsqueeze_last", lambda x: x.unsqueeze(-1), (2, 8, 6)),
        _case("permuted", lambda x: x.permute(0, 2, 3, 1).reshape(2, -1), _IMAGE),
        _case(
            "shuffle",
            lambda x: x.view(2, 2, 4, 6, 4).transpose(1, 2).contiguous().view(2, 8, 6, 4),
            _IMAGE,
        ),
    ),
)

PERMUTE = _view(
    family="permute",
    targets=_PERMUTES,
    integers=_apply,
    cases=(
        _case("permute", lambda x: x.permute(0, 2, 3, 1), _IMAGE),
        _case("transpose", lambda x: x.transpose(1, 2), _IMAGE),
        _case("t", lambda x: x.t(), (5, 7)),
    ),
)


def permutation(node: Node) -> list[int]:
    """Which dimension of the input each dimension of the result of a permute is."""
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in cast("Sequence[int]", node.args[1])]
    if node.target is aten.t.default:
        return order[::-1]
    if node.target is aten.transpose.int:
        a, b = (int(cast(int, d)) % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
        return order
    # movedim: the moved dims go to their places, the others fill the rest in order.
    source, target = ([int(d) % rank for d in cast("Sequence[int]", arg)] for arg in node.args[1:3])
    places = dict(zip(target, source, strict=True))
    rest = iter(d for d in order if d not in source)
    return [places[d] if d in places else next(rest) for d in order]


def slice_of(node: Node) -> tuple[int, int, int, int]:
    """``(dim, start, stop, step)`` of a slice, normalized to the input's size.

    What only the inputs tell stays as it is written.
    """
    shape = shape_of(cast(Node, node.args[0]))
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    size: Any = shape[dim]
    start, stop = argument(node, 2, "start"), argument(node, 3, "end")
    step = int(argument(node, 4, "step", 1))
    if not isinstance(size, int) or isinstance(start, Node) or isinstance(stop, Node):
        # Of a dynamic size only the ends that are missing are known.
        return dim, 0 if start is None else start, size if stop is None else stop, step
    first, last, _ = slice(start, stop, step).indices(size)
    return dim, first, last, step


def is_split_evenly(node: Node) -> bool:
    """Whether a strided slice takes one entry out of each group of ``step``, up to the end."""
    shape = shape_of(cast(Node, node.args[0]))
    dim, start, stop, step = slice_of(node)
    size = shape[dim]
    if step == 1 or not are_static((size, start, stop)):
        return False
    return size % step == 0 and start < step and len(range(start, stop, step)) == size // step


SLICE = _move(
    family="slice",
    targets=frozenset({aten.slice.Tensor, aten.narrow.default}),
    integers=_apply,
    cases=(
        _case("range", lambda x: x[:, 2:5], _IMAGE),
        _case("negative", lambda x: x[:, :, -3:-1], _IMAGE),
        _case("strided", lambda x: x[:, :, ::2, ::2], _IMAGE),
        _case("strided_offset", lambda x: x[:, :, 1::2], _IMAGE),
        _case("strided_channels", lambda x: x[:, 1::2], _IMAGE),
        _case("strided_last", lambda x: x[:, 0::2, 1::2], (2, 8, 6)),
        _case("strided_channels_uneven", lambda x: x[:, ::3], _IMAGE),
        _case("strided_signal", lambda x: x[:, 1::3], (2, 8, 5)),
        _case("strided_volume", lambda x: x[:, :, ::2], (2, 3, 5, 4, 6)),
    ),
)

SELECT = _move(
    family="select",
    targets=frozenset({aten.select.int}),
    integers=_apply,
    cases=(
        _case("middle", lambda x: x[:, 3], _IMAGE),
        _case("last", lambda x: x[:, :, -1], _IMAGE),
    ),
)


EXPAND = _move(
    family="expand",
    targets=frozenset({aten.expand.default}),
    integers=_apply,
    cases=(
        _case("spatial", lambda x: x.expand(2, 8, 3, 3), (2, 8, 1, 1)),
        _case("leading", lambda x: x.expand(3, -1, -1), (1, 8, 5)),
    ),
)


# Splits return a list: the split itself passes integers on, each getitem is a tensor again.
SPLIT = _move(
    family="split",
    targets=frozenset(
        {
            aten.chunk.default,
            aten.split.Tensor,
            aten.split.sizes,
            aten.split_with_sizes.default,
            aten.unbind.int,
        }
    ),
    match=_match_single,
    integers=_apply,
    cases=(
        _case("chunk", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), _IMAGE),
        _case("split", lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1), _IMAGE),
        _case("unbind", lambda x: x.unbind(2)[1] + x.unbind(2)[0], _IMAGE),
    ),
)


def _match_getitem(rule: OpRule, node: Node) -> PatternMatch | str:
    source = node.args[0]
    if not isinstance(source, Node) or source.target not in SPLIT.targets:
        return "it takes one of several results of an op that is not quantized"
    return PatternMatch(rule, node, (source,))


GETITEM = _move(
    family="getitem",
    targets=frozenset({operator.getitem}),
    match=_match_getitem,
    integers=lambda op, inputs, _arithmetic: inputs[0][cast(int, op.node.args[1])],
    cases=(),
)


def _match_cat(rule: OpRule, node: Node) -> PatternMatch | str:
    tensors = node.args[0]
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Node) for t in tensors):
        return "its inputs are not a list of tensors"
    return PatternMatch(rule, node, tuple(cast("Sequence[Node]", tensors)))


def _cat_integers(op: QuantizedOp, inputs: Integers, _arithmetic: Arithmetic) -> Tensor:
    return torch.cat(list(inputs), int(argument(op.node, 1, "dim", 0)))


CAT = _move(
    family="cat",
    targets=frozenset({aten.cat.default}),
    match=_match_cat,
    integers=_cat_integers,
    cases=(
        _case("two", lambda x, y: torch.cat([x, y], 1), (2, 3, 4, 4), (2, 5, 4, 4)),
        _case("itself", lambda x: torch.cat([x, x * 3], 1), (2, 3, 4, 4)),
        _case(
            "seven",
            lambda x: torch.cat([x * float(k) for k in range(1, 8)], 1),
            (2, 3, 4, 4),
        ),
    ),
)


def _match_pad(rule: OpRule, node: Node) -> PatternMatch | str:
    if node.target is aten.pad.default and argument(node, 2, "mode", "constant") != "constant":
        return "it pads with reflected or repeated values"
    if reads_sizes(node):
        return "how much it pads depends on a dynamic size"
    # pad(x, amounts, mode, value), but constant_pad_nd(x, amounts, value)
    value = argument(node, 3 if node.target is aten.pad.default else 2, "value", 0)
    if value not in (None, 0, 0.0):
        return f"it pads with {value}; only zero is the same number at every scale"
    return _match_move(rule, node)


def padding_of(node: Node) -> list[int]:
    """Padding amounts of a constant pad, last dim first, as ``F.pad`` takes them."""
    return [int(p) for p in cast("Sequence[int]", node.args[1])]


def _pad_integers(op: QuantizedOp, inputs: Integers, _arithmetic: Arithmetic) -> Tensor:
    return F.pad(inputs[0], padding_of(op.node), value=op.inputs[0].zero_point)


PAD = _move(
    family="pad",
    targets=frozenset({aten.pad.default, aten.constant_pad_nd.default}),
    match=_match_pad,
    integers=_pad_integers,
    cases=(
        _case("spatial", lambda x: F.pad(x, (1, 2, 0, 1)), _IMAGE),
        _case("channels", lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), _IMAGE),
    ),
)

RULES = (CAT, IDENTITY, RESHAPE, PERMUTE, SLICE, SELECT, EXPAND, SPLIT, GETITEM, PAD)
