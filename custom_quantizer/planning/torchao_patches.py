"""What torchao 0.18 has no seam for, each in one function.

Facts about ``prepare_pt2e``, ``prepare_qat_pt2e`` and ``convert_pt2e`` that a quantizer cannot
learn or change through the ``Quantizer`` interface. ``tests/planning/test_torchao_patches.py`` pins
the version and the behaviour that each of them is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.constant_fold import ConstantFolder
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

from custom_quantizer.calibration.exponents import forget_unread
from custom_quantizer.calibration.joins import requantize_parts
from custom_quantizer.calibration.settling import settle_scales
from custom_quantizer.core.graph import STATE_KEY, is_constant, is_dequantize
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.ops.rewrites.batch_norms import fold_in_place
from custom_quantizer.ops.rewrites.training_graph import fold_for_good, recorded

__all__ = [
    "compile_converted_once",
    "finish_before_converting",
    "fold_rightly",
    "leave_state_alone",
    "leave_weights_packed",
    "prepares_for",
    "prepares_for_training",
]

_FOLDS = ("_fuse_conv_bn_", "_fuse_linear_bn_")
"""What ``prepare_pt2e`` calls to fold batch norms, before it calls the quantizer."""


def prepares_for_training() -> bool:
    """Whether ``prepare_qat_pt2e`` is who called, rather than ``prepare_pt2e``.

    Neither says so to the quantizer, not even through ``ComposableQuantizer``: the graph and its
    ``meta`` that ``transform_for_annotation`` and ``annotate`` get are the same for both. What
    differs comes too late (``is_qat`` of ``prepare``, behind ``annotate``) or does not tell all
    graphs apart: only ``prepare_pt2e`` folds batch norms before it calls the quantizer, and many
    graphs have none; a graph may be captured in either mode for training. Nor can the wrapper of
    that folding (:func:`fold_rightly`) leave a mark on the graph: it would outlive a
    preparation that failed, and the next one of that graph may be the other. So the callers are
    looked up.
    """
    found = _preparation(inspect.currentframe())
    return found is not None and found.f_code is prepare_qat_pt2e.__code__


def prepares_for(quantizer: object) -> bool:
    """Whether the preparation that called is for this quantizer alone, with no other beside it."""
    frame = _preparation(inspect.currentframe())
    return frame is not None and frame.f_locals.get("quantizer") is quantizer


def _preparation(frame: FrameType | None) -> FrameType | None:
    """The innermost call of ``prepare_pt2e`` or ``prepare_qat_pt2e`` around ``frame``."""
    while frame is not None:
        if frame.f_code in (prepare_pt2e.__code__, prepare_qat_pt2e.__code__):
            return frame
        frame = frame.f_back
    return None


def fold_rightly(quantizer_type: type) -> None:
    """For quantizers of a type, let ``prepare_pt2e`` fold batch norms as this package does.

    It multiplies the weight of the layer before a batch norm by the norm's factors, whoever else
    reads that weight or the layer's result (pytorch/ao, ``pt2e/utils.py``,
    ``fold_bn_weights_into_conv_node``), and it does so before the quantizer sees the graph. The
    weight as it was is lost by then. So what it would get wrong is left for the quantizer, which
    folds it where it can be (:mod:`custom_quantizer.ops.rewrites.batch_norms`).

    Graphs that are prepared for other quantizers are folded as ever.

    Args:
        quantizer_type: of the quantizers, alone or inside a ``ComposableQuantizer``.
    """
    for name in _FOLDS:
        setattr(quantize_pt2e, name, _careful(getattr(quantize_pt2e, name), quantizer_type))


def _careful(fold: Callable[[GraphModule], None], kind: type) -> Callable[[GraphModule], None]:
    @wraps(fold)
    def fold_rightly(model: GraphModule) -> None:
        frame = _preparation(inspect.currentframe())
        quantizer = None if frame is None else frame.f_locals.get("quantizer")
        if _is_of(quantizer, kind):
            fold_in_place(model)
        else:
            fold(model)

    return fold_rightly


def _is_of(quantizer: object, kind: type) -> bool:
    if isinstance(quantizer, ComposableQuantizer):
        return any(_is_of(inner, kind) for inner in quantizer.quantizers)
    return isinstance(quantizer, kind)


def leave_state_alone() -> None:
    """Keep ``convert_pt2e`` from folding what is computed from buffers that the graph writes.

    It takes a buffer for one that changes if a ``copy_`` or ``put_`` writes it (pytorch/ao,
    ``pt2e/constant_fold.py``, ``_find_mutable_buffers``). What a counter selects that ``add_``
    writes, and a quantize op reads, would stay what it is at conversion.
    """
    _leave_unknown(lambda node: overwritten_by(node) is not None)


def leave_weights_packed() -> None:
    """Keep ``convert_pt2e`` from computing the floats that the integers of weights stand for.

    It looks for constants that a quantize op reads by computing all that depends on constants only
    (pytorch/ao, ``pt2e/constant_fold.py``), and throws the results of dequantize ops away
    (``ConstantFolder.is_impure``): for the weights of VGG-11 that takes twice as long as all the
    rest of the conversion. Integers that are constants already, as the observers of this package
    leave them, are not dequantized any more; what other quantizers leave is a quantize op, and
    computed as ever.
    """
    _leave_unknown(lambda node: is_dequantize(node) and is_constant(node.args[0]))


def _leave_unknown(which: Callable[[Node], bool]) -> None:
    """Let constant folding take some nodes for what is not constant."""
    deduce = ConstantFolder._deduce_value

    @wraps(deduce)
    def deduce_value(self: ConstantFolder, node: Node) -> Any:
        return self.unknown_value if which(node) else deduce(self, node)

    ConstantFolder._deduce_value = deduce_value


def compile_converted_once() -> None:
    """Let ``convert_pt2e`` write and compile the code of a graph at its end alone.

    It does so after each of its passes, five times, which takes half of its time; the code is not
    run before the last (pytorch/ao, ``pt2e/quantize_pt2e.py``, ``convert_pt2e``). The graph that
    its first step makes is told not to, until its last step. Graphs that were not prepared by
    this package's quantizer, or for training, are compiled as ever.
    """
    first = quantize_pt2e._convert_to_reference_decomposed_fx
    last = quantize_pt2e._disallow_eval_train

    @wraps(first)
    def without_compiling(model: GraphModule, *args: Any, **options: Any) -> GraphModule:
        ours = STATE_KEY in model.meta
        converted: GraphModule = first(model, *args, **options)
        if ours:
            converted.__dict__["recompile"] = lambda: None
        return converted

    @wraps(last)
    def compiled(model: GraphModule) -> GraphModule:
        if model.__dict__.pop("recompile", None) is not None:
            model.recompile()
        finished: GraphModule = last(model)
        return finished

    quantize_pt2e._convert_to_reference_decomposed_fx = without_compiling
    quantize_pt2e._disallow_eval_train = compiled


def finish_before_converting() -> None:
    """Let ``convert_pt2e`` give graphs the form in which they ship, before all else.

    Observers and fake quantizers are asked to convert themselves one by one, activations not at
    all; a graph may have nothing but these. What was trained becomes what ships here.

    No more data come, so what depends on all of them is decided here
    (:mod:`custom_quantizer.calibration.settling`).

    Also put right what ``move_exported_model_to_eval`` leaves in the batch norms that it exchanges
    (pytorch/ao, ``pt2e/export_utils.py``, ``_replace_batchnorm``): the shape of its own example.
    """
    first = quantize_pt2e._convert_to_reference_decomposed_fx

    @wraps(first)
    def finished(model: GraphModule, *args: Any, **options: Any) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                node.meta["val"] = recorded(node.args[0])
        fold_for_good(model)
        settle_scales(model)
        forget_unread(model)
        requantize_parts(model)
        converted: GraphModule = first(model, *args, **options)
        return converted

    quantize_pt2e._convert_to_reference_decomposed_fx = finished
