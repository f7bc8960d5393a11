"""Values that a mask chooses and that are put back under the same mask.

``y[m] = f(x[m])`` computes with as many values as the mask has ones, which no delegate knows before
it runs. Where ``f`` computes each value for itself, that is ``where(m, f(x), y)``. A mask is the
same if it is computed in the same way: ``y[x > 0] = f(x[x > 0])`` compares twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from custom_quantizer.core.graph import are_static, argument, is_same_shape, shape_of, tensor_meta
from custom_quantizer.core.memory import overwritten_by, reached
from custom_quantizer.core.rewriting import Insertion, Rewrite

__all__ = ["CHOSEN"]

aten = torch.ops.aten

_TOTAL = frozenset(
    {
        aten.abs.default,
        aten.add.Tensor,
        aten.clamp.default,
        aten.clamp_max.default,
        aten.clamp_min.default,
        aten.cos.default,
        aten.gelu.default,
        aten.hardtanh.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Tensor,
        aten.neg.default,
        aten.relu.default,
        aten.rsub.Scalar,
        aten.sigmoid.default,
        aten.silu.default,
        aten.sin.default,
        aten.sub.Tensor,
        aten.tanh.default,
    }
)
"""Functions that are finite wherever their operands are."""

_OF_A_NUMBER = frozenset({aten.div.Tensor, aten.remainder.Scalar, aten.remainder.Tensor})
"""These are, too, where the second operand is a number other than zero."""

_SAFE = 1.0
"""Where a mask leaves a value out, a function that is not finite everywhere computes with this."""


def _put_back(insert: Insertion) -> Node | None:
    """``index_put(data, [mask], values)`` as a choice for every entry."""
    data, indices, values = cast("tuple[Node, list[Any], Node]", insert.node.args[:3])
    if argument(insert.node, 3, "accumulate", False) or len(indices) != 1:
        return None
    mask = indices[0]
    meta = tensor_meta(mask) if isinstance(mask, Node) else None
    if meta is None or meta.dtype != torch.bool or not _is_fixed(mask):
        return None
    chosen = _Chosen(insert, mask, len(shape_of(data)) - len(meta.shape))
    if not chosen.read(values):
        return None
    condition = chosen.condition()
    everywhere = chosen.everywhere(values, condition)
    result = insert.call(aten.where.self, condition, everywhere, data)
    if not is_same_shape(shape_of(result), shape_of(data)):
        return None
    _drop_checks(insert.model, [*chosen.picks, *chosen.calls])
    return result


class _Chosen:
    """What is computed of values that a mask chose, entry by entry.

    Attributes:
        calls: what is computed of them.
        picks: where values are chosen.
    """

    def __init__(self, insert: Insertion, mask: Node, rest: int) -> None:
        self._insert, self._mask, self._rest = insert, mask, rest
        self._is_total = True
        self.calls: list[Node] = []
        self.picks: list[Node] = []

    def read(self, value: Node) -> bool:
        """Whether a tensor is a function of values chosen by the mask, each of its own entry."""
        if value in self.calls or value in self.picks:
            return True
        if value.op == "call_function" and overwritten_by(value) is not None:
            return False
        if self._is_pick(value):
            self.picks.append(value)
            return True
        if self._is_row(value):
            return True
        target = value.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
            return False
        if not _is_fixed_call(value) or not all(map(self.read, value.all_input_nodes)):
            return False
        self._is_total = self._is_total and _is_total(value)
        self.calls.append(value)
        return True

    def _is_pick(self, value: Node) -> bool:
        if value.target is not aten.index.Tensor:
            return False
        source, indices = cast("tuple[Node, list[Any]]", value.args)
        dims = len(shape_of(self._mask))
        return (
            len(indices) == 1
            and isinstance(indices[0], Node)
            and _is_same(indices[0], self._mask)
            and len(shape_of(source)) == dims + self._rest
            and is_same_shape(shape_of(source)[:dims], shape_of(self._mask))
        )

    def _is_row(self, value: Node) -> bool:
        """Whether it is the same for all that are chosen, however many these are."""
        meta = tensor_meta(value)
        if meta is None or not are_static(meta.shape):
            return False
        dims = meta.dim()
        return dims <= self._rest or (dims == self._rest + 1 and meta.shape[0] == 1)

    def condition(self) -> Node:
        """The mask, with a dim for each that it does not have."""
        mask = self._mask
        for _ in range(self._rest):
            mask = self._insert.call(aten.unsqueeze.default, mask, -1)
        return mask

    def everywhere(self, value: Node, condition: Node) -> Node:
        """The function of all values."""
        made = {node: cast(Node, node.args[0]) for node in self.picks}
        if not self._is_total:
            safe = self._insert.constant("safe", torch.tensor(_SAFE))
            for node, source in made.items():
                made[node] = self._insert.call(aten.where.self, condition, source, safe)
        for node in self.calls:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
            made[node] = self._insert.call(node.target, *args, **kwargs)
        return made.get(value, value)


def _is_total(node: Node) -> bool:
    if node.target in _TOTAL:
        return True
    by = node.args[1] if len(node.args) > 1 else None
    return node.target in _OF_A_NUMBER and isinstance(by, (int, float)) and by != 0


def _is_same(a: Node, b: Node) -> bool:
    """Whether two tensors are computed in the same way, of what nobody writes in between."""
    if not _is_fixed(a) or not _is_fixed(b):
        return False
    if a is b:
        return True
    if a.op != b.op or a.target != b.target or a.op not in ("call_function", "get_attr"):
        return False
    if not _is_fixed_call(a):
        return False
    mine, theirs = a.all_input_nodes, b.all_input_nodes
    if len(mine) != len(theirs) or not all(map(_is_same, mine, theirs)):
        return False
    places = {node: place for place, node in enumerate(mine)}
    others = {node: place for place, node in enumerate(theirs)}
    written = map_arg((a.args, a.kwargs), lambda n: f"%{places[n]}")
    return repr(written) == repr(map_arg((b.args, b.kwargs), lambda n: f"%{others[n]}"))


def _is_fixed(node: Node) -> bool:
    """Whether a tensor keeps its values from where it is made."""
    return overwritten_by(node) is None


def _is_fixed_call(node: Node) -> bool:
    """Whether a call gives the same each time that it is made."""
    return not node.is_impure() and torch.Tag.nondeterministic_seeded not in getattr(
        node.target, "tags", ()
    )


def _drop_checks(model: GraphModule, sized: list[Node]) -> None:
    """Erase what says how many values were chosen, unless something is computed of it.

    Export asserts bounds of each count, and that counts of one mask are equal.
    """
    said: set[Node] = set()
    for size in [user for node in sized for user in node.users if _is_of_sizes(user)]:
        said |= reached(size, lambda node: filter(_is_of_sizes, node.users))
    while unread := [node for node in said if not node.users]:
        for node in unread:
            model.graph.erase_node(node)
        said.difference_update(unread)


def _is_of_sizes(node: Node) -> bool:
    """Whether a call gives a size or what is computed of some, or checks that."""
    is_check = node.target in (
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
    )
    return is_check or isinstance(node.meta.get("val"), (torch.SymBool, torch.SymInt))


CHOSEN: Mapping[Any, Rewrite] = MappingProxyType({aten.index_put.default: _put_back})
"""By overload."""
