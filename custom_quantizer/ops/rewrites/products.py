"""Products of matrices in the two forms that have integer kernels: layers, batched products.

A product with a constant operand is a layer: its weights have a scale for each output, as those of
``nn.Linear`` have. What the operands share, sum over and have alone is said by labels, as in
``einsum``: one rewrite serves every spelling, and a batch that is broadcast is not copied:

- what only the operand with the rows has joins the rows, and so for the columns;
- what both have is the batch of a batched product, or the groups of a convolution.

Sums are added in another order: last bits of float32 differ.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    dynamic_sizes,
    is_constant,
    is_same_shape,
    shape_of,
)
from custom_quantizer.core.rewriting import Insertion

__all__ = ["einsum", "product", "sum_and_product", "vector_layer", "written_product"]

aten = torch.ops.aten

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Operand:
    """A tensor and what its dims mean.

    Attributes:
        node: the tensor.
        labels: one letter for each dim.
        constant: whether it depends on parameters alone.
    """

    node: Node
    labels: str
    constant: bool


def written_product(insert: Insertion) -> Node | None:
    """``matmul``, ``mm``, ``bmm``, ``mv`` and ``dot``."""
    left, right = (cast(Node, arg) for arg in insert.node.args[:2])
    return _contracted(insert, left, right) or (
        None
        if insert.node.target is aten.matmul.default
        else insert.call(aten.matmul.default, left, right)
    )


def product(insert: Insertion, left: Node, right: Node) -> Node:
    """``left @ right``, with what PyTorch says of vectors and of batches."""
    return _contracted(insert, left, right) or insert.call(aten.matmul.default, left, right)


def _contracted(insert: Insertion, left: Node, right: Node) -> Node | None:
    """A product in another form; ``None``: it is a batched product as it stands."""
    a, b = shape_of(left), shape_of(right)
    constant = is_computed_constant(left) or is_computed_constant(right)
    expanded = aten.expand.default in (left.target, right.target)
    batched = min(len(a), len(b)) >= 2 and is_same_shape(a[:-2], b[:-2])
    if batched and not (constant or expanded):
        return None
    batch = _LETTERS[: max(len(a), len(b), 2) - 2]
    left_labels = batch[len(batch) - max(len(a) - 2, 0) :] + ("ys" if len(a) > 1 else "s")
    right_labels = batch[len(batch) - max(len(b) - 2, 0) :] + ("sz" if len(b) > 1 else "s")
    output = batch + ("y" if len(a) > 1 else "") + ("z" if len(b) > 1 else "")
    return _contract(insert, (left, left_labels), (right, right_labels), output)


def sum_and_product(insert: Insertion) -> Node | None:
    """``addmm``, ``baddbmm`` and ``addmv``: a product, and a sum."""
    node = insert.node
    added, left, right = (cast(Node, arg) for arg in node.args[:3])
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    multiplied = product(insert, left, right)
    layer = multiplied.target is aten.linear.default
    if layer and is_constant(added) and shape_of(added) == shape_of(multiplied)[-1:]:
        multiplied.args = (*multiplied.args, added)
        return multiplied
    return insert.call(aten.add.Tensor, multiplied, added)


def bilinear(insert: Insertion) -> Node | None:
    """``x W y`` for each output: a linear layer of ``x``, whose rows are multiplied by ``y``."""
    left, right, weight = (cast(Node, arg) for arg in insert.node.args[:3])
    outputs, inner, _ = sizes = tuple(shape_of(weight)[i] for i in (0, 2, 1))
    if not are_static(sizes):
        return None
    rows = insert.reshape(insert.permute(weight, [0, 2, 1]), [outputs * inner, sizes[2]])
    rows = insert.call(aten.linear.default, left, insert.settled(rows, "weight"))
    batch = shape_of(insert.node)[:-1]
    rows = insert.reshape(rows, [*batch, outputs, inner])
    columns = insert.call(aten.unsqueeze.default, right, -1)
    result = insert.reshape(product(insert, rows, columns), [*batch, outputs])
    bias = argument(insert.node, 3, "bias")
    return result if bias is None else insert.call(aten.add.Tensor, result, bias)


def vector_layer(insert: Insertion) -> Node | None:
    """A linear layer whose weight is a vector, so that its result has a dim less: a product."""
    node = insert.node
    data, weight = (cast(Node, arg) for arg in node.args[:2])
    if len(shape_of(weight)) != 1:
        return None
    multiplied, bias = product(insert, data, weight), argument(node, 2, "bias")
    return multiplied if bias is None else insert.call(aten.add.Tensor, multiplied, bias)


def einsum(insert: Insertion) -> Node | None:
    """Contractions of two tensors each, from the left; where nothing is summed, plain products.

    An index that an operand has twice is its diagonal.
    """
    equation, operands = insert.node.args[:2]
    tensors = list(cast("Sequence[Node]", operands))
    labels = _labels(str(equation), [len(shape_of(tensor)) for tensor in tensors])
    if labels is None:
        return None
    *inputs, output = labels
    for i, tensor in enumerate(tensors):
        tensors[i], inputs[i] = _diagonal(insert, tensor, inputs[i])
    result, own = tensors[0], inputs[0]
    if len(tensors) == 1:
        result, own = _summed(insert, result, own, output, own)
        return insert.permute(result, [own.index(label) for label in output])
    for i in range(1, len(tensors)):
        later = set(output).union(*inputs[i + 1 :])
        both = own + "".join(label for label in inputs[i] if label not in own)
        kept = "".join(label for label in both if label in later)
        wanted = output if i == len(tensors) - 1 else kept
        pair = ((result, own), (tensors[i], inputs[i]))
        factors = [_summed(insert, node, of, wanted, own, inputs[i]) for node, of in pair]
        shared = set(own) & set(inputs[i])
        contracted = _contract if shared - set(wanted) else _multiplied
        product = contracted(insert, factors[0], factors[1], wanted)
        if product is None:
            return None
        result, own = product, wanted
    return result


def _labels(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """Labels of the operands of an equation and of its result; an ellipsis gets new ones.

    ``None``: operands whose ellipses stand for different numbers of dims.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow:
        every = inputs.replace("...", "")
        output = "".join(sorted(label for label in set(every) - {","} if every.count(label) == 1))
        output = "..." * ("..." in inputs) + output
    counts = {n - len(p) + 3 for n, p in zip(ranks, parts, strict=True) if "..." in p}
    if len(counts) > 1:
        return None
    unused = [label for label in string.ascii_letters if label not in equation]
    rest = "".join(unused[: counts.pop() if counts else 0])
    parts, output = [part.replace("...", rest) for part in parts], output.replace("...", rest)
    return None if len(set(output)) != len(output) else [*parts, output]


def _diagonal(insert: Insertion, node: Node, labels: str) -> tuple[Node, str]:
    """An operand with each label once."""
    for label in labels:
        while labels.count(label) > 1:
            first, second = labels.index(label), labels.rindex(label)
            node = insert.call(aten.diagonal.default, node, 0, first, second)
            rest = (labels[:first], labels[first + 1 : second], labels[second + 1 :])
            labels = "".join((*rest, label))
    return node, labels


def _summed(
    insert: Insertion, node: Node, labels: str, output: str, *pair: str
) -> tuple[Node, str]:
    """An operand without the dims that the other one of a pair lacks, and the result too."""
    alone = [d for d, x in enumerate(labels) if x not in output and sum(x in p for p in pair) == 1]
    if not alone:
        return node, labels
    kept = "".join(x for d, x in enumerate(labels) if d not in alone)
    return insert.call(aten.sum.dim_IntList, node, alone), kept


def _multiplied(
    insert: Insertion, left: tuple[Node, str], right: tuple[Node, str], output: str
) -> Node | None:
    """The product of two tensors, each a value for each label that it has."""
    factors = []
    for node, labels in (left, right):
        moved = insert.permute(node, [labels.index(label) for label in output if label in labels])
        for d, label in enumerate(output):
            if label not in labels:
                moved = insert.call(aten.unsqueeze.default, moved, d)
        factors.append(moved)
    return insert.call(aten.mul.Tensor, *factors)


def is_computed_constant(node: Node) -> bool:
    """Whether a tensor depends on parameters alone: one of them, or what is computed from some."""
    if is_constant(node):
        return True
    sources = node.all_input_nodes
    target = node.target
    if not sources or not isinstance(target, torch._ops.OpOverload):
        return False
    repeats = not target._schema.is_mutable and (
        torch.Tag.nondeterministic_seeded not in target.tags
    )
    return repeats and all(map(is_computed_constant, sources))


# ---------------------------------------------------------------------------------------------
# One contraction
# ---------------------------------------------------------------------------------------------


def _contract(
    insert: Insertion, left: tuple[Node, str], right: tuple[Node, str], output: str
) -> Node | None:
    """The contraction of two labelled tensors; ``None``: a view would have two dynamic sizes."""
    sizes = _sizes((left, right))
    a, b = (_operand(insert, node, labels, sizes, output) for node, labels in (left, right))
    if a.constant and not b.constant:
        a, b = b, a  # weights are the second operand; the result is permuted as asked
    batch = [label for label in output if label in a.labels and label in b.labels]
    summed = [label for label in a.labels if label in b.labels and label not in output]
    if not summed:  # a dim of size one, broadcast to a sum
        return None
    rows = [label for label in a.labels if label not in batch + summed]
    columns = [label for label in b.labels if label not in batch + summed]
    views = _Views(insert, sizes)
    layer = b.constant and not a.constant
    if layer:
        result = _layer(views, a, b, (batch, summed, rows, columns))
    else:
        factors = (
            views.joined(a, [*batch, "".join(rows), "".join(summed)]),
            views.joined(b, [*batch, "".join(summed), "".join(columns)]),
        )
        result = None
        if factors[0] is not None and factors[1] is not None:
            result = insert.call(aten.matmul.default, *factors)
    order = rows + batch + columns if layer and batch else batch + rows + columns
    return None if result is None else views.result(result, order, output)


def _layer(
    views: _Views, data: _Operand, weight: _Operand, labels: tuple[list[str], ...]
) -> Node | None:
    """A product with a constant: a linear layer, or of a batch of constants one with groups."""
    batch, summed, rows, columns = labels
    insert = views.insert
    wide = views.joined(weight, ["".join(batch + columns), "".join(summed)])
    if wide is None:
        return None
    if not batch:
        values = views.joined(data, [*rows, "".join(summed)])
        if values is None:
            return None
        return insert.call(aten.linear.default, values, insert.settled(wide, "weight"))
    values = views.joined(data, ["".join(rows), "".join(batch + summed), "", ""])
    if values is None:
        return None
    outputs, inputs = shape_of(wide)
    kernel = insert.call(aten.reshape.default, wide, [outputs, inputs, 1, 1])
    kernel = insert.settled(kernel, "weight")
    groups = math.prod(int(views.sizes[label]) for label in batch)
    return insert.call(aten.conv2d.default, values, kernel, None, [1, 1], [0, 0], [1, 1], groups)


def _sizes(operands: Iterable[tuple[Node, str]]) -> dict[str, Any]:
    """Size of each label; one of size 1 is broadcast."""
    sizes: dict[str, Any] = {}
    for node, labels in operands:
        for label, size in zip(labels, shape_of(node), strict=True):
            if label not in sizes or _is_one(sizes[label]):
                sizes[label] = size
    return sizes


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _operand(
    insert: Insertion, node: Node, labels: str, sizes: Mapping[str, Any], output: str
) -> _Operand:
    """A tensor without the dims along which it is the same everywhere."""
    constant = is_computed_constant(node)
    if constant:
        node = insert.settled(node, "operand")
    while node.target is aten.expand.default:
        source = cast(Node, node.args[0])
        labels = labels[len(labels) - len(shape_of(source)) :]
        node, constant = source, is_computed_constant(source)
    shape = shape_of(node)
    same = [
        _is_one(size) and not _is_one(sizes[label])
        for label, size in zip(labels, shape, strict=True)
    ]
    if constant and node.op == "get_attr":
        value = constant_of(insert.model, node)
        same = [
            dropped or (d < len(shape) - 2 and label in output and _repeats(value, d))
            for d, (dropped, label) in enumerate(zip(same, labels, strict=True))
        ]
    for d in reversed(range(len(shape))):
        if same[d]:
            one = _is_one(shape[d])
            drop = (aten.squeeze.dim, node, d) if one else (aten.select.int, node, d, 0)
            node = insert.call(*drop)
    kept = "".join(label for label, dropped in zip(labels, same, strict=True) if not dropped)
    return _Operand(node, kept, constant)


def _repeats(value: Tensor, dim: int) -> bool:
    """Whether a constant is the same along a dim."""
    first, size = value.narrow(dim, 0, 1), value.shape[dim]
    return (
        size > 1
        and torch.equal(value.narrow(dim, 1, 1), first)
        and torch.equal(value, first.expand_as(value))
    )


@dataclass(frozen=True)
class _Views:
    """Permutes and reshapes of labelled tensors."""

    insert: Insertion
    sizes: Mapping[str, Any]

    def size(self, labels: Iterable[str]) -> Any:
        return math.prod(self.sizes[label] for label in labels)

    def joined(self, operand: _Operand, groups: Sequence[str]) -> Node | None:
        """A tensor with one dim for each group of labels, in that order."""
        order = [operand.labels.index(label) for group in groups for label in group]
        moved = self.insert.permute(operand.node, order)
        if all(len(group) == 1 for group in groups):
            return moved
        return self.shaped(moved, [self.size(group) for group in groups])

    def result(self, value: Node, order: Sequence[str], output: str) -> Node | None:
        """The result of a contraction, whose dims are ``order``, as ``output`` wants it."""
        sizes = [self.sizes[label] for label in order]
        shaped = self.shaped(value, sizes)
        if shaped is None:
            return None
        moved = self.insert.permute(shaped, [order.index(x) for x in output if x in order])
        missing = [label for label in output if label not in order]
        if not missing:
            return moved
        rows = self.shaped(moved, [1 if x in missing else self.sizes[x] for x in output])
        wanted = [self.sizes[x] if x in missing else -1 for x in output]
        if rows is None or not are_static(wanted):
            return None
        expands = any(not _is_one(self.sizes[x]) for x in missing)
        return self.insert.call(aten.expand.default, rows, wanted) if expands else rows

    def shaped(self, value: Node, shape: Sequence[Any]) -> Node | None:
        if is_same_shape(shape_of(value), shape):
            return value
        if dynamic_sizes(shape) > 1:
            return None
        return self.insert.reshape(value, shape)
