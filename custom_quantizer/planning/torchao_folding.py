"""What torchao 0.18 has no seam for, each in one function.

Two facts about ``prepare_pt2e`` and ``prepare_qat_pt2e`` that a quantizer cannot learn or change
through the ``Quantizer`` interface. ``tests/planning/test_torchao_folding.py`` pins the version and
the behaviour that each of them is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

from custom_quantizer.ops.rewrites.batch_norms import is_foldable_in_place

__all__ = ["keep_from_folding", "prepares_for_training"]

aten = torch.ops.aten

_FOLDS = ("_fuse_conv_bn_", "_fuse_linear_bn_")
"""What ``prepare_pt2e`` calls to fold batch norms, before it calls the quantizer."""

_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def prepares_for_training() -> bool:
    """Whether ``prepare_qat_pt2e`` is who called, rather than ``prepare_pt2e``.

    Neither says so to the quantizer, not even through ``ComposableQuantizer``: the graph and its
    ``meta`` that ``transform_for_annotation`` and ``annotate`` get are the same for both. What
    differs comes too late (``is_qat`` of ``prepare``, behind ``annotate``) or does not tell all
    graphs apart: only ``prepare_pt2e`` folds batch norms before it calls the quantizer, and many
    graphs have none; a graph may be captured in either mode for training. Nor can the wrapper of
    that folding (:func:`keep_from_folding`) leave a mark on the graph: it would outlive a
    preparation that failed, and the next one of that graph may be the other. So the callers are
    looked up.
    """
    found = _preparation(inspect.currentframe())
    return found is not None and found.f_code is prepare_qat_pt2e.__code__


def _preparation(frame: FrameType | None) -> FrameType | None:
    """The innermost call of ``prepare_pt2e`` or ``prepare_qat_pt2e`` around ``frame``."""
    while frame is not None:
        if frame.f_code in (prepare_pt2e.__code__, prepare_qat_pt2e.__code__):
            return frame
        frame = frame.f_back
    return None


def keep_from_folding(quantizer_type: type) -> None:
    """For quantizers of a type, let ``prepare_pt2e`` fold only batch norms that it folds rightly.

    It multiplies the weight of the layer before a batch norm by the norm's factors, whoever else
    reads that weight or the layer's result (pytorch/ao, ``pt2e/utils.py``,
    ``fold_bn_weights_into_conv_node``), and it does so before the quantizer sees the graph. The
    weight as it was is lost by then. So for the time of the folding the batch norms that it would
    get wrong do not look like batch norms; the quantizer finds them in the graph and folds them
    itself where they can be (:mod:`custom_quantizer.ops.rewrites.batch_norms`).

    Graphs that are prepared for other quantizers are folded as ever.

    Args:
        quantizer_type: of the quantizers, alone or inside a ``ComposableQuantizer``.
    """
    for name in _FOLDS:
        setattr(quantize_pt2e, name, _careful(getattr(quantize_pt2e, name), quantizer_type))


def _careful(fold: Callable[[GraphModule], None], kind: type) -> Callable[[GraphModule], None]:
    @wraps(fold)
    def fold_what_can_be(model: GraphModule) -> None:
        frame = _preparation(inspect.currentframe())
        quantizer = None if frame is None else frame.f_locals.get("quantizer")
        hidden = _hide(model) if _is_of(quantizer, kind) else {}
        try:
            fold(model)
        finally:
            for node, target in hidden.items():
                node.target = target
            if hidden:
                model.recompile()

    return fold_what_can_be


def _is_of(quantizer: object, kind: type) -> bool:
    if isinstance(quantizer, ComposableQuantizer):
        return any(_is_of(inner, kind) for inner in quantizer.quantizers)
    return isinstance(quantizer, kind)


def _hide(model: GraphModule) -> dict[Node, Any]:
    """Give batch norms that would be folded wrongly another target; returns what they were."""
    hidden = {
        node: node.target
        for node in model.graph.nodes
        if node.target in _BATCH_NORMS and not is_foldable_in_place(model, node)
    }
    for node in hidden:
        node.target = _not_a_batch_norm
    return cast("dict[Node, Any]", hidden)


def _not_a_batch_norm(*_args: Any) -> None:
    """Stands in the place of a batch norm that ``prepare_pt2e`` must not see."""
