"""Resizing images by linear interpolation."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.arithmetic import Arithmetic
from custom_quantizer.core.graph import are_static, argument, shape_of
from custom_quantizer.core.resizing import Resizing
from custom_quantizer.ops._rule import (
    Integers,
    OpRule,
    PatternMatch,
    QParamSharing,
    QuantizedOp,
)
from custom_quantizer.ops.elementwise import _case, _match_single

__all__ = ["LAYERED", "RULES", "UPSAMPLE_BILINEAR", "resizings_of", "steps_otherwise"]

aten = torch.ops.aten

LAYERED = frozenset(
    {
        aten.upsample_linear1d.vec,
        aten.upsample_bilinear2d.vec,
        aten.upsample_trilinear3d.vec,
        aten.upsample_bicubic2d.vec,
        aten._upsample_bilinear2d_aa.vec,
        aten._upsample_bicubic2d_aa.vec,
    }
)
"""Calls that may become layers with constant weights, one for each dim."""


def resizings_of(node: Node) -> tuple[Resizing, Resizing]:
    """Rows and columns of a bilinear resize of static size."""
    align_corners = bool(argument(node, 2, "align_corners"))
    before, after = (shape_of(tensor)[-2:] for tensor in (cast(Node, node.args[0]), node))
    rows, columns = (
        Resizing(int(size), int(out), align_corners)
        for size, out in zip(before, after, strict=True)
    )
    return rows, columns


def steps_otherwise(node: Node) -> bool:
    """Whether a resize by given factors steps by other than the ratio of its static sizes.

    PyTorch steps by ``1 / factor``, and by the ratio of sizes where corners are aligned or no
    factor is given.
    """
    factors: Any = argument(node, 3, "scale_factors", None)
    if factors is None or bool(argument(node, 2, "align_corners")):
        return False
    return any(
        resizing.size * factor != resizing.out
        for resizing, factor in zip(resizings_of(node), factors, strict=True)
    )


def _match(rule: OpRule, node: Node) -> PatternMatch | str:
    sizes = (*shape_of(cast(Node, node.args[0]))[-2:], *shape_of(node)[-2:])
    if not are_static(sizes):
        return "the size of its image is dynamic"
    if steps_otherwise(node):
        return "its factors are not the ratios of its sizes"
    if argument(node, 1, "output_size") is None:
        # The factors are static, whatever it is that they were computed from.
        return PatternMatch(rule, node, (cast(Node, node.args[0]),))
    return _match_single(rule, node)


def _integers(op: QuantizedOp, inputs: Integers, arithmetic: Arithmetic) -> Tensor:
    rows, columns = resizings_of(op.node)
    return arithmetic.interpolate(inputs[0], op.output, rows, columns)


_resize = partial(F.interpolate, mode="bilinear")
_IMAGE = (2, 8, 6, 5)

UPSAMPLE_BILINEAR = OpRule(
    family="upsample_bilinear2d",
    targets=frozenset({aten.upsample_bilinear2d.vec}),
    match=_match,
    # What lies between values of the input needs no other range than they do.
    sharing=QParamSharing.SAME,
    integers=_integers,
    title="bilinear resize",
    cases=(
        _case("twice", lambda x: _resize(x, scale_factor=2.0), _IMAGE),
        _case("corners", lambda x: _resize(x, size=(11, 13), align_corners=True), _IMAGE),
        _case("smaller", lambda x: _resize(x, size=(3, 4)), _IMAGE),
        _case("from_one_pixel", lambda x: _resize(x, size=(3, 4)), (2, 8, 1, 1)),
    ),
)

RULES = (UPSAMPLE_BILINEAR,)
