"""Ops in the forms that have a meaning on integers, before annotation.

Integers are computed by convolutions, linear layers, pooling in two dims, and moves. What is the
same numbers in another form is rewritten to these, so that it is planned,
quantized, simulated and lowered like any other:

- a mean, a sum or an adaptive pooling is a linear layer (or a 1x1 convolution over channels) whose
  weights are constant; sums over two or three branches are additions;
- average pooling that counts its padding is a depthwise convolution;
- pooling, norms and convolutions over one or three dims become those over two;
- Euclidean norms are those of rows;
- maxima and minima over dims are max pools, and powers are products or roots;
- layers and pools of one sample are those of a batch of one;
- what is cut out of joined tensors is cut out of one of them, where it lies in one;
- shuffles, rolls, flips, stacks and nearest-neighbour upsampling are moves, and so is whatever
  else only moves values, by any of its names;
- resizes by other than bilinear interpolation are linear layers, dim by dim;
- what is put in constant places of a tensor takes the place of its entries, and what is added there
  is a linear layer and a sum;
- patches of images are depthwise convolutions that pick values, and their sums transposed ones;
- a layer whose weight depends on an input is a product, of that weight with patches.

Moves and max pools are the same values bit for bit. Sums are added in another order: last bits of
float32 differ.

Which of them a backend wants is its own choice (``Backend.legalize``).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import argument
from custom_quantizer.core.rewriting import Insertion, Rewrite, rewrite_calls
from custom_quantizer.ops.rewrites.legalization import (
    branches,
    interpolations,
    layers,
    maxima,
    moves,
    patches,
    powers,
    sums,
)
from custom_quantizer.ops.rewrites.legalization.arrangements import ARRANGEMENTS, arrangement
from custom_quantizer.ops.rewrites.legalization.batches import batched
from custom_quantizer.ops.rewrites.legalization.computed_weights import (
    linear,
    with_weight_of_inputs,
)
from custom_quantizer.ops.rewrites.legalization.placements import PLACEMENTS

__all__ = ["LEGALIZATIONS", "legalize_by"]

aten = torch.ops.aten


def _result(insert: Insertion) -> Node | None:
    """One of several results of an op."""
    return maxima.without_indices(insert) or moves.broadcast_result(insert)


def _pad(insert: Insertion) -> Node | None:
    """A pad of reflected or repeated values.

    One with a number stays as it is: the number may lie far from the values around it, and would
    take the scale from them.
    """
    constant = argument(insert.node, 2, "mode", "constant") == "constant"
    return None if constant else arrangement(insert)


def _moved(rewrite: Rewrite) -> Rewrite:
    """A form of its own if it has one, else the moves that numbered values tell."""
    return lambda insert: rewrite(insert) or arrangement(insert)


_FORMS: dict[Any, Rewrite] = {
    **ARRANGEMENTS,
    **PLACEMENTS,
    **interpolations.FORMS,
    aten.conv1d.default: batched(1, with_weight_of_inputs(layers.cut_short)),
    aten.conv1d.padding: batched(1, with_weight_of_inputs()),
    aten.conv2d.default: batched(2, with_weight_of_inputs(layers.cut_short)),
    aten.conv2d.padding: batched(2, with_weight_of_inputs()),
    aten.conv_transpose1d.default: batched(1, with_weight_of_inputs()),
    aten.conv_transpose2d.input: batched(2, with_weight_of_inputs()),
    aten.linear.default: linear,
    aten.mean.default: sums.mean,
    aten.mean.dim: sums.mean,
    aten.mul.Tensor: branches.product,
    aten.sum.default: sums.total,
    aten.sum.dim_IntList: sums.total,
    aten.linalg_vector_norm.default: sums.norm,
    aten.adaptive_avg_pool1d.default: batched(1, sums.adaptive_avg_pool),
    aten.adaptive_avg_pool2d.default: batched(2, sums.adaptive_avg_pool),
    aten.adaptive_avg_pool3d.default: batched(3, sums.adaptive_avg_pool),
    aten.avg_pool1d.default: batched(1, sums.avg_pool1d),
    aten.avg_pool2d.default: batched(2, sums.avg_pool2d),
    aten.avg_pool3d.default: batched(3, sums.avg_pool3d),
    aten.max_pool1d.default: batched(1, maxima.max_pool1d),
    aten.max_pool2d.default: batched(2, maxima.max_pool2d),
    aten.max_pool3d.default: batched(3, maxima.max_pool3d),
    aten.amax.default: maxima.largest,
    aten.amin.default: maxima.largest,
    aten.max.default: maxima.largest,
    aten.min.default: maxima.largest,
    getitem: _result,
    aten.pow.Tensor_Scalar: powers.power,
    aten.pow.Tensor_Tensor: powers.power_of_tensor,
    aten.square.default: powers.square,
    aten.cat.default: moves.cat,
    aten.concat.default: moves.cat,
    aten.concatenate.default: moves.cat,
    aten.column_stack.default: moves.stack_along,
    aten.dstack.default: moves.stack_along,
    aten.hstack.default: moves.stack_along,
    aten.row_stack.default: moves.stack_along,
    aten.vstack.default: moves.stack_along,
    aten.stack.default: moves.stack,
    aten.expand.default: moves.expand,
    aten.slice.Tensor: moves.piece,
    aten.select.int: moves.piece,
    aten.pad.default: _pad,
    aten.roll.default: _moved(moves.roll),
    aten.flip.default: _moved(moves.flip),
    aten.channel_shuffle.default: _moved(moves.channel_shuffle),
    aten.pixel_shuffle.default: _moved(moves.pixel_shuffle),
    aten.pixel_unshuffle.default: _moved(moves.pixel_unshuffle),
    aten.upsample_nearest1d.vec: _moved(moves.upsample_nearest),
    aten.upsample_nearest2d.vec: _moved(moves.upsample_nearest),
    aten.upsample_nearest3d.vec: _moved(moves.upsample_nearest),
    aten.upsample_nearest1d.default: _moved(moves.upsample_nearest),
    aten.upsample_nearest2d.default: _moved(moves.upsample_nearest),
    aten.upsample_nearest3d.default: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact1d.vec: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact2d.vec: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact3d.vec: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact1d.default: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact2d.default: _moved(moves.upsample_nearest),
    aten._upsample_nearest_exact3d.default: _moved(moves.upsample_nearest),
    aten.repeat.default: _moved(moves.repeat),
    aten.im2col.default: batched(2, patches.unfold),
    aten.col2im.default: patches.fold,
    aten.batch_norm.default: layers.batch_norm,
    aten.conv3d.default: batched(3, layers.conv3d),
    aten.conv3d.padding: batched(3, layers.conv3d),
    aten.conv_transpose3d.input: batched(3, layers.conv_transpose3d),
}


LEGALIZATIONS: Mapping[Any, Rewrite] = MappingProxyType(_FORMS)
"""By overload, what makes its form; what replaces a call answers to rules for it."""


_OF_SIZES = (arrangement, moves.expand)
"""Forms that take dynamic sizes as arguments: moves are told by numbers, with several tried."""


def legalize_by(model: GraphModule, forms: Mapping[Any, Rewrite], *, training: bool = False) -> int:
    """Apply rewrites in place.

    Args:
        model: a captured graph.
        forms: :data:`LEGALIZATIONS`, or some of them.
        training: parameters change: what is computed from them is no constant.

    Returns:
        How many calls were rewritten.
    """
    return rewrite_calls(model, forms, training=training, of_sizes=_OF_SIZES)
