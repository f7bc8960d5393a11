"""Layers whose activations are quantized while they run, with a scale for each row, pixel or image.

``convert_pt2e`` writes one scale for a whole tensor (``choose_qparams.tensor``), which no backend
computes. What one does compute is said by its :class:`RunTime`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from custom_quantizer.ops._rule import PatternMatch

__all__ = ["RunTime", "RunTimeOp"]


@dataclass(frozen=True)
class RunTimeOp:
    """A layer of a converted graph that reads activations quantized at run time.

    Attributes:
        match: the anchor and its roles; its input is a dequantize node.
        source: the float tensor that is quantized.
        weight: integers of at most 8 bits, in the layout of the aten op.
        weight_scale: float32, one a channel, ``(out_channels,)``, or one a group of input features,
            ``(out_channels, groups)``.
        bias: float32 ``(out_channels,)``, or ``None``.
    """

    match: PatternMatch
    source: Node
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    @property
    def node(self) -> Node:
        """The anchor."""
        return self.match.node

    @property
    def is_grouped(self) -> bool:
        """Whether input features have scales in groups."""
        return self.weight_scale.dim() == 2


@dataclass(frozen=True)
class RunTime:
    """How a backend computes such layers.

    Attributes:
        shared: dims of the input whose values share one scale; empty: it has no such layer.
        compute: the layer and its float32 input; returns the float32 result.
        error: for the same, how far the result may be from that of any of the backend's kernels,
            float32 or float64 of the shape of the result; 0 where all give the same bits.
    """

    shared: Callable[[PatternMatch], tuple[int, ...]]
    compute: Callable[[RunTimeOp, Tensor], Tensor]
    error: Callable[[RunTimeOp, Tensor], Tensor]
