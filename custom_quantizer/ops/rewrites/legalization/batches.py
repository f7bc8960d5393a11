"""Layers and pools of one image, signal or volume without a batch."""

from __future__ import annotations

import torch
from torch.fx import Node

from custom_quantizer.core.graph import shape_of
from custom_quantizer.core.rewriting import Insertion, Rewrite
from custom_quantizer.ops.rewrites.legalization._common import float_input

aten = torch.ops.aten


def batched(dims: int, form: Rewrite = lambda _: None) -> Rewrite:
    """A call on one sample becomes that on a batch of one, which may have another form in turn.

    Kernels compute on batches of images.

    Args:
        dims: spatial dims of the call.
        form: of calls on batches.
    """

    def rewrite(insert: Insertion) -> Node | None:
        node, data = insert.node, float_input(insert)
        if data is None or len(shape_of(data)) != dims + 1:
            return form(insert)
        samples = insert.call(aten.unsqueeze.default, data, 0)
        result = insert.formed(form, node.target, samples, *node.args[1:], **node.kwargs)
        return insert.call(aten.squeeze.dim, result, 0)

    return rewrite
