"""Complex numbers as two real tensors, before annotation.

Rotary embeddings turn pairs of values as complex numbers (``torch.view_as_complex(x) * freqs``),
and Fourier transforms mix tokens or filter images. No program holds such numbers. Real and
imaginary part are two tensors of the same shape, each computed by real ops, as PyTorch computes it:
a product by four products, a move by two moves. What has no such form stays, and what it reads
stays complex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    are_static,
    argument,
    constant_of,
    is_complex,
    is_constant,
    is_same_shape,
    recorded_value,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion, replace
from custom_quantizer.ops.movement import PAD
from custom_quantizer.ops.movement import RULES as MOVES
from custom_quantizer.ops.rewrites.legalization.arrangements import ARRANGEMENTS

__all__ = ["COMPLEX_OPS", "complex_to_real"]

aten = torch.ops.aten

Part = Any
"""A real tensor, a list of some, or a number; ``None`` is zero."""

Pair = tuple[Part, Part]
"""Real and imaginary part."""


def complex_to_real(model: GraphModule, *, training: bool = False) -> int:
    """Write complex numbers as pairs of real ones, in place.

    Args:
        model: a captured graph.
        training: parameters change: a complex one stays.

    Returns:
        How many real tensors are computed without complex numbers now.
    """
    pairs: dict[Node, Pair] = {}
    count = 0
    for node in list(model.graph.nodes):
        near = (node, *node.all_input_nodes)
        if not any(map(is_complex, near)) or any(map(overwritten_by, near)):
            continue
        insert = Insertion(model, node, training=training)
        if node.op == "get_attr":
            pair = _constant_parts(insert)
            if pair is not None:
                pairs[node] = pair
            continue
        forms: Mapping[Any, Any] = _PAIRS if is_complex(node) else _REALS
        form, known = forms.get(node.target), _Parts(insert, pairs)
        if form is None or not known.has_all:
            continue
        found = form(known)
        if found is None:
            continue
        if is_complex(node):
            found = tuple(map(known.expanded, found))
            if all(map(known.fits, found)):
                pairs[node] = found
        elif known.fits(found):
            replace(model, node, found)
            count += 1
    for node in pairs:
        # What asks for a dtype would keep it alive.
        for user in list(node.users):
            if user.target is aten._assert_tensor_metadata.default:
                model.graph.erase_node(user)
    if pairs:
        model.graph.eliminate_dead_code()
    return count


def _constant_parts(insert: Insertion) -> Pair | None:
    value = constant_of(insert.model, insert.node)
    if insert.training and isinstance(value, nn.Parameter):
        return None
    both = torch.view_as_real(value.detach().resolve_conj()).unbind(-1)
    real, imaginary = map(insert.constant, ("real", "imaginary"), (p.clone() for p in both))
    return real, imaginary


class _Parts:
    """Real ops before a call, with the parts of what it reads.

    Args:
        insert: at the call.
        pairs: of what stands before.
    """

    def __init__(self, insert: Insertion, pairs: Mapping[Node, Pair]) -> None:
        self.insert = insert
        self.node = insert.node
        self._pairs = pairs

    @property
    def has_all(self) -> bool:
        """Whether every complex operand has parts."""
        return all(n in self._pairs or not is_complex(n) for n in self.node.all_input_nodes)

    def of(self, operand: Any) -> Pair:
        """Both parts of an operand."""
        if isinstance(operand, Node):
            return self._pairs.get(operand, (operand, None))
        if isinstance(operand, complex):
            return operand.real or None, operand.imag or None
        return operand, None

    def part(self, operand: Any, index: int) -> Node:
        """One part as a tensor."""
        pair = self.of(operand)
        if pair[index] is not None:
            return cast(Node, pair[index])
        return self.insert.call(aten.zeros_like.default, pair[1 - index])

    def expanded(self, part: Part) -> Part:
        """A part in the shape of the result: one of ``x + 1j * y[:, :1]`` has fewer values."""
        if not isinstance(part, Node) or tensor_meta(part) is None:
            return part
        shape = shape_of(self.node)
        if is_same_shape(shape_of(part), shape):
            return part
        static = are_static(shape)
        return self.insert.call(aten.expand.default, part, list(shape)) if static else part

    def fits(self, part: Part) -> bool:
        """Whether dtype and shape are those of the result, or of its parts."""
        if not isinstance(part, Node):
            return part is None
        given, wanted = (pytree.tree_leaves(recorded_value(n)) for n in (part, self.node))
        return len(given) == len(wanted) and all(
            a.dtype == (b.dtype.to_real() if b.is_complex() else b.dtype)
            and is_same_shape(a.shape, b.shape)
            for a, b in zip(given, wanted, strict=True)
        )

    # Arithmetic of parts

    def negative(self, a: Part) -> Part:
        if isinstance(a, Node):
            return self.insert.call(aten.neg.default, a)
        return None if a is None else -a

    def plus(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return b if a is None else a
        if not isinstance(a, Node):
            a, b = b, a
        return self.insert.call(aten.add.Tensor, a, b) if isinstance(a, Node) else a + b

    def minus(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return self.negative(b) if a is None else a
        if isinstance(a, Node):
            return self.insert.call(aten.sub.Tensor, a, b)
        return self.insert.call(aten.rsub.Scalar, b, a) if isinstance(b, Node) else a - b

    def times(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        if not isinstance(a, Node):
            a, b = b, a
        if not isinstance(a, Node):
            return a * b
        return a if b == 1 else self.insert.call(aten.mul.Tensor, a, b)

    def over(self, a: Part, b: Part) -> Part:
        return a if a is None else self.insert.call(aten.div.Tensor, a, b)

    def product(self, left: Pair, right: Pair, times: Callable[[Part, Part], Part]) -> Pair:
        """``(a + bi) (c + di) = (ac - bd) + (ad + bc) i``."""
        (a, b), (c, d) = left, right
        real = self.minus(times(a, c), times(b, d))
        return real, self.plus(times(a, d), times(b, c))


# ---------------------------------------------------------------------------------------------
# Complex results
# ---------------------------------------------------------------------------------------------


def _by_parts(parts: _Parts) -> Pair | None:
    """Moves, and what is linear in the tensors that it is given first."""
    node = parts.node
    given = [leaf for leaf in pytree.tree_leaves(node.args[0]) if isinstance(leaf, Node)]
    if not all(map(is_complex, given)):
        return None
    # Parts have other strides than the whole.
    target: Any = aten.reshape.default if node.target is aten.view.default else node.target

    def apply(index: int) -> Node | None:
        pieces = [n for n in node.all_input_nodes if is_complex(n)]
        if all(parts.of(n)[index] is None for n in pieces):
            return None
        own = {n: parts.part(n, index) for n in pieces}
        mapped = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: own.get(n, n))
        args, kwargs = cast("tuple[tuple[Any, ...], dict[str, Any]]", mapped)
        return parts.insert.call(target, *args, **kwargs)

    return apply(0), apply(1)


def _sum(parts: _Parts) -> Pair | None:
    node = parts.node
    left, right = (parts.of(arg) for arg in node.args[:2])
    if argument(node, 2, "alpha", 1) != 1:
        return None
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        left, right = right, left
    is_sum = node.target in (aten.add.Tensor, aten.add.Scalar)
    real, imaginary = map(parts.plus if is_sum else parts.minus, left, right)
    return real, imaginary


def _product(parts: _Parts) -> Pair:
    left, right = map(parts.of, parts.node.args[:2])
    return parts.product(left, right, parts.times)


def _matrix_product(parts: _Parts) -> Pair:
    def times(a: Part, b: Part) -> Part:
        return None if a is None or b is None else parts.insert.call(parts.node.target, a, b)

    left, right = map(parts.of, parts.node.args[:2])
    return parts.product(left, right, times)


def _einsum(parts: _Parts) -> Pair | None:
    """Of one or two operands; the path through them needs none."""
    equation, operands = cast("tuple[str, list[Node]]", parts.node.args[:2])

    def of(*read: Part) -> Part:
        return None if None in read else parts.insert.call(parts.node.target, equation, [*read])

    if len(operands) == 1:
        real, imaginary = map(of, parts.of(operands[0]))
        return real, imaginary
    if len(operands) > 2:
        return None
    left, right = map(parts.of, operands)
    return parts.product(left, right, of)


def _quotient(parts: _Parts) -> Pair:
    """By something real; else ``z conj(w) / |w|**2``, whose square may overflow or be 0."""
    left, (real, imaginary) = map(parts.of, parts.node.args[:2])
    if imaginary is not None:
        left = parts.product(left, (real, parts.negative(imaginary)), parts.times)
        real = parts.plus(*(parts.times(part, part) for part in (real, imaginary)))
    return cast(Pair, tuple(parts.over(part, real) for part in left))


def _conjugate(parts: _Parts) -> Pair:
    real, imaginary = parts.of(parts.node.args[0])
    return real, parts.negative(imaginary)


def _adjoint(parts: _Parts) -> Pair:
    """The conjugate of matrices whose rows are columns."""
    real, imaginary = (
        parts.insert.call(aten.mT.default, part) if isinstance(part, Node) else part
        for part in parts.of(parts.node.args[0])
    )
    return real, parts.negative(imaginary)


def _joined(parts: _Parts) -> Pair:
    real, imaginary = parts.node.args[:2]
    return real, imaginary


def _polar(parts: _Parts) -> Pair:
    length, angle = parts.node.args[:2]
    turns = (parts.insert.call(f, angle) for f in (aten.cos.default, aten.sin.default))
    real, imaginary = (parts.times(length, turn) for turn in turns)
    return real, imaginary


def _exponential(parts: _Parts) -> Pair:
    """``exp(a) (cos(b) + i sin(b))``."""
    real, imaginary = parts.of(parts.node.args[0])
    length: Part = 1 if real is None else parts.insert.call(aten.exp.default, real)
    if imaginary is None:
        return length, None
    turns = (parts.insert.call(f, imaginary) for f in (aten.cos.default, aten.sin.default))
    pair = (parts.times(turn, length) for turn in turns)
    return cast(Pair, tuple(pair))


def _taken_apart(parts: _Parts) -> Pair:
    """The two values in the last dim of a real tensor."""
    data = parts.node.args[0]
    real, imaginary = (parts.insert.call(aten.select.int, data, -1, i) for i in range(2))
    return real, imaginary


def _same(parts: _Parts) -> Pair:
    """A conversion to complex numbers; of another size they do not fit."""
    return parts.of(parts.node.args[0])


# ---------------------------------------------------------------------------------------------
# Real results
# ---------------------------------------------------------------------------------------------


def _length(parts: _Parts) -> Node:
    """``|z|``, whose squares may overflow where PyTorch's do not."""
    pair = parts.of(parts.node.args[0])
    if None in pair:
        (part,) = (part for part in pair if part is not None)
        return parts.insert.call(aten.abs.default, part)
    squares = parts.plus(*(parts.times(part, part) for part in pair))
    return parts.insert.call(aten.sqrt.default, squares)


def _angle(parts: _Parts) -> Node:
    operand = parts.node.args[0]
    return parts.insert.call(aten.atan2.default, parts.part(operand, 1), parts.part(operand, 0))


def _one_part(index: int) -> Callable[[_Parts], Node]:
    return lambda parts: parts.part(parts.node.args[0], index)


def _stacked(parts: _Parts) -> Node:
    """Both parts as the last dim of a real tensor."""
    both = [parts.part(parts.node.args[0], index) for index in range(2)]
    return parts.insert.call(aten.stack.default, both, -1)


# ---------------------------------------------------------------------------------------------
# Fourier transforms
# ---------------------------------------------------------------------------------------------


def _transformed(parts: _Parts) -> Pair | None:
    """A transform along static dims is a layer with constant weights along each.

    Its weights are what the transform makes of ones; sums are added in another order.
    """
    node = parts.node
    data, sizes, dims = node.args[0], argument(node, 1, "n"), argument(node, 2, "dim", -1)
    name = cast(Any, node.target)._schema.name.removeprefix("aten::fft_")
    rank = len(shape_of(cast(Node, data)))
    if name.endswith(("2", "n")):
        sizes = argument(node, 1, "s")
        last = 2 if name.endswith("2") else rank if sizes is None else len(sizes)
        dims = argument(node, 2, "dim") or list(range(-last, 0))
    else:
        sizes, dims = None if sizes is None else [sizes], [dims]
    kind, norm = name.rstrip("2n"), argument(node, 3, "norm")
    steps = [
        [dim % rank, size, kind] for dim, size in zip(dims, sizes or [-1] * rank, strict=False)
    ]
    for step in steps[:-1]:  # only along the last dim are the numbers real before or behind
        step[2] = kind.replace("r", "")
    pair: Pair | None = parts.of(data)
    for dim, size, function in steps if kind == "irfft" else steps[::-1]:
        given = None if size == -1 else size
        transform = partial(getattr(torch.fft, function), n=given, norm=norm)
        pair = None if pair is None else _along(parts, pair, dim, transform)
    return pair


def _along(parts: _Parts, pair: Pair, dim: int, transform: Callable[..., Tensor]) -> Pair | None:
    """A function of rows that is linear in real and imaginary part, along a dim."""
    (size,) = {shape_of(part)[dim] for part in pair if part is not None}
    if not isinstance(size, int) or size > _LONGEST_ROW:
        return None
    ones = torch.eye(size, dtype=torch.float64)
    total: Pair = (None, None)
    for part, unit in zip(pair, (1, 1j), strict=True):
        if part is not None:
            made = transform(ones * unit)
            matrices = (made.real, made.imag) if made.is_complex() else (made, None)
            layers = [_layer(parts, part, dim, matrix) for matrix in matrices]
            total = parts.plus(total[0], layers[0]), parts.plus(total[1], layers[1])
    return total


_LONGEST_ROW = 1 << 11
"""Longest dim that is transformed: a layer with as many rows and columns."""


def _layer(parts: _Parts, part: Node, dim: int, matrix: Tensor | None) -> Node | None:
    meta, rank = tensor_meta(part), len(shape_of(part))
    if matrix is None or meta is None:
        return None
    weight = parts.insert.constant("weight", matrix.T.to(meta.dtype).contiguous())
    rows = parts.insert.permute(part, [*(d for d in range(rank) if d != dim), dim])
    made = parts.insert.call(aten.linear.default, rows, weight)
    return parts.insert.permute(made, [*range(dim), rank - 1, *range(dim, rank - 1)])


def _spectrogram(parts: _Parts) -> Pair | None:
    """Transforms of windows that move along a signal: convolutions with constant weights."""
    node = parts.node
    data, length = cast(Node, node.args[0]), cast(int, node.args[1])
    names = ("hop_length", "win_length", "window", "normalized", "onesided")
    hop, width, window, normalized, onesided = (
        argument(node, i, name) for i, name in enumerate(names, 2)
    )
    if is_complex(data) or length > _LONGEST_ROW or not (window is None or is_constant(window)):
        return None
    width = length if width is None else width
    values = torch.ones(width) if window is None else constant_of(parts.insert.model, window)
    before = (length - width) // 2
    values = nn.functional.pad(values.detach().double(), (before, length - width - before))
    function = torch.fft.fft if onesided is False else torch.fft.rfft
    matrix = function(torch.diag(values), norm="ortho" if normalized else None)
    stride = length // 4 if hop is None else hop
    signal = parts.insert.call(aten.unsqueeze.default, data, -2)

    def windows(weights: Tensor) -> Node:
        weight = parts.insert.constant("weight", weights.T[:, None].float().contiguous())
        return parts.insert.call(aten.conv1d.default, signal, weight, None, [stride])

    return windows(matrix.real), windows(matrix.imag)


def _signal(parts: _Parts) -> Node | None:
    """Inverse transforms of windows that are added up: transposed convolutions, and a factor."""
    node = parts.node
    names = ("hop_length", "win_length", "window", "center", "normalized", "onesided", "length")
    hop, width, window, centered, normalized, onesided, wanted = (
        argument(node, i, name, True if name == "center" else None)
        for i, name in enumerate(names, 2)
    )
    data, size = cast(Node, node.args[0]), int(cast(int, node.args[1]))
    count, known = shape_of(data)[-1], not window or is_constant(window)
    both = [parts.part(data, index) for index in range(2)]
    if onesided is False or shape_of(data)[-2] != size // 2 + 1 or size > _LONGEST_ROW:
        return None
    if not (known and isinstance(count, int)) or len(shape_of(data)) not in (2, 3):
        return None
    width = width or size
    values = constant_of(parts.insert.model, window) if window else torch.ones(width)
    before = (size - width) // 2
    values = nn.functional.pad(values.detach().double(), (before, size - width - before))
    stride, ones = hop or size // 4, torch.eye(size // 2 + 1, dtype=torch.float64)
    norm = "ortho" if normalized else None
    signals = [
        parts.insert.call(
            aten.conv_transpose1d.default,
            part,
            parts.insert.constant("weight", (matrix * values)[:, None].float()),
            None,
            [stride],
        )
        for part, matrix in zip(
            both, (torch.fft.irfft(ones * unit, size, norm=norm) for unit in (1, 1j)), strict=True
        )
    ]
    squares = (values**2).expand(1, 1, -1)
    times = torch.ones(1, 1, count, dtype=torch.float64)
    shares = nn.functional.conv_transpose1d(times, squares, stride=stride).flatten()
    start = size // 2 if centered else 0
    stop = len(shares) - start if not wanted else start + wanted
    if stop > len(shares) or bool((shares[start:stop].abs() < _LEAST_SHARE).any()):
        return None
    total = parts.insert.call(aten.add.Tensor, *signals)
    line = parts.insert.call(aten.squeeze.dim, total, -2)
    line = parts.insert.call(aten.slice.Tensor, line, -1, start, stop)
    factors = parts.insert.constant("factors", 1.0 / shares[start:stop].float())
    return parts.insert.call(aten.mul.Tensor, line, factors)


_LEAST_SHARE = 1e-11
"""What windows have to add up to, as in PyTorch."""


def _real_transformed(parts: _Parts) -> Node | None:
    pair = _transformed(parts)
    return None if pair is None else cast(Node, pair[0])


_TRANSFORMS = (
    *(aten.fft_fft.default, aten.fft_fft2.default, aten.fft_fftn.default),
    *(aten.fft_ifft.default, aten.fft_ifft2.default, aten.fft_ifftn.default),
    *(aten.fft_rfft.default, aten.fft_rfft2.default, aten.fft_rfftn.default),
)

_REAL_TRANSFORMS = (aten.fft_irfft.default, aten.fft_irfft2.default, aten.fft_irfftn.default)


_OF_DTYPES = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}

_OF_MEMORY = {aten.as_strided.default, aten.as_strided_copy.default}

_CONJUGATES = (aten._conj.default, aten.conj.default, aten.conj_physical.default)

_ADJOINTS = (aten.adjoint.default, aten.mH.default, aten.matrix_H.default)

_LINEAR = (
    *(aten.cumsum.default, aten.expand_as.default, aten.flip.default, aten.mT.default),
    *(aten.mean.default, aten.mean.dim, aten.neg.default, aten.negative.default),
    *(aten.repeat.default, aten.roll.default, aten.stack.default, aten.sum.default),
    *(aten.sum.dim_IntList, aten.swapaxes.default, aten.swapdims.default),
)

_PARTED = {
    *ARRANGEMENTS,
    *_LINEAR,
    *(target for rule in MOVES if rule is not PAD for target in rule.targets),
}

_PAIRS: Mapping[Any, Callable[[_Parts], Pair | None]] = MappingProxyType(
    {
        **dict.fromkeys(_PARTED - _OF_DTYPES - _OF_MEMORY, _by_parts),
        **dict.fromkeys(_ADJOINTS, _adjoint),
        **dict.fromkeys(_CONJUGATES, _conjugate),
        **dict.fromkeys(_TRANSFORMS, _transformed),
        aten.add.Scalar: _sum,
        aten.add.Tensor: _sum,
        aten.bmm.default: _matrix_product,
        aten.complex.default: _joined,
        aten.div.Scalar: _quotient,
        aten.div.Tensor: _quotient,
        aten.einsum.default: _einsum,
        aten.exp.default: _exponential,
        aten.matmul.default: _matrix_product,
        aten.mm.default: _matrix_product,
        aten.mul.Scalar: _product,
        aten.mul.Tensor: _product,
        aten.polar.default: _polar,
        aten.rsub.Scalar: _sum,
        aten.rsub.Tensor: _sum,
        aten.stft.default: _spectrogram,
        aten.sub.Scalar: _sum,
        aten.sub.Tensor: _sum,
        aten.to.dtype: _same,
        aten.view_as_complex.default: _taken_apart,
    }
)
"""By overload."""

_REALS: Mapping[Any, Callable[[_Parts], Node | None]] = MappingProxyType(
    {
        **dict.fromkeys(_REAL_TRANSFORMS, _real_transformed),
        aten.abs.default: _length,
        aten.angle.default: _angle,
        aten.imag.default: _one_part(1),
        aten.istft.default: _signal,
        aten.real.default: _one_part(0),
        aten.view_as_real.default: _stacked,
    }
)
"""By overload."""

COMPLEX_OPS = frozenset({*_PAIRS, *_REALS})
"""Ops that may be replaced; what replaces them answers to rules for them."""
