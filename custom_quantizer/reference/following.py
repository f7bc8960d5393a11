"""Does each tensor that somebody computed follow from those before it?

Through many layers of float ops last bits add up, and a network may magnify them: its outputs have
no bound worth the name. Each quantized tensor has one, given those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import module_path
from custom_quantizer.reference.converted import ConvertedGraph
from custom_quantizer.reference.interpreter import IntegerReference

__all__ = [
    "FLOAT_UNITS",
    "LAST_BITS",
    "Departure",
    "TensorChecks",
    "follow",
    "relative_error",
]

FLOAT_UNITS = 1 / 64
"""How far beyond half a unit of 8 bits an integer may be from the float value it was rounded from.

That is what the last bits of float kernels come to behind one group of float ops
(docs/device_arithmetic.md): of six networks of the zoo at most 1/2000. They are a part of the
range, and so more units where these are finer.
"""

LAST_BITS = 1e-3
"""Largest relative error of an output behind one group of float ops, given the tensors before."""


@dataclass(frozen=True)
class Departure:
    """A quantized tensor that does not follow from those before it.

    Attributes:
        node: that computes it.
        path: its module path.
        values: how many it has.
        wrong: how many of them do not follow.
        units: the largest distance from what follows, in steps of its scale.
    """

    node: str
    path: str
    values: int
    wrong: int
    units: float

    def __str__(self) -> str:
        where = f"{self.node} ({self.path})" if self.path else self.node
        return (
            f"{self.wrong} of {self.values} values of {where} do not follow from the tensors "
            f"before it, by up to {self.units:.3g} units"
        )


@dataclass(frozen=True)
class TensorChecks:
    """The quantized tensors that somebody computed, each next to what follows from those before it.

    Attributes:
        tensors: how many there are.
        equal: how many of them are what follows in every value.
        units: the largest distance of the others, in steps of the tensor's scale.
        first: the first that is further off than the float arithmetic before it accounts for.
    """

    tensors: int
    equal: int
    units: int
    first: Departure | None

    def __str__(self) -> str:
        line = f"{self.equal} of {self.tensors} quantized tensors are what those before them give"
        return line if self.equal == self.tensors else f"{line}, the others up to {self.units} off"


def follow(
    graph: ConvertedGraph,
    taps: Mapping[Node, Tensor],
    inputs: Sequence[Any],
) -> tuple[TensorChecks, list[Any]]:
    """Compute each quantized tensor from what somebody else computed for those before it.

    What an integer op gives must be equal. What is rounded from float ops may be off by
    :data:`FLOAT_UNITS` more than the rounding, and what is emulated in float by one unit.

    Args:
        graph: a converted graph.
        taps: by quantize node, the integers that somebody computed.
        inputs: of the graph, flat.

    Returns:
        What was found, and the outputs that follow from the last tensors.
    """
    following = _Following(graph, taps)
    outputs = following(*inputs)
    checks = TensorChecks(len(taps), following.equal, following.units, following.found)
    return checks, pytree.tree_leaves(outputs)


class _Following(IntegerReference):
    """The integer reference, op by op on integers that somebody else computed."""

    def __init__(self, graph: ConvertedGraph, taps: Mapping[Node, Tensor]) -> None:
        super().__init__(graph)
        self._taps = taps
        self.found: Departure | None = None
        self.equal = self.units = 0

    def _evaluate(
        self, node: Node, values: dict[Node, Any], record: dict[str, Tensor] | None
    ) -> Any:
        mine = super()._evaluate(node, values, record)
        given = self._taps.get(node)
        if given is None:
            return mine
        self._compare(node, values[cast(Node, node.args[0])], mine, given)
        # In the memory format that the views behind it were captured with.
        return torch.empty_like(mine).copy_(given)

    def _compare(self, node: Node, source: Any, mine: Tensor, given: Tensor) -> None:
        """Count the tensor, and note it if it is the first that does not follow."""
        qparams = self._qparams[node]
        maker = self._outputs.get(cast(Node, node.args[0]))
        off = (given.double() - mine.double()).abs()
        units = int(off.max()) if off.numel() else 0
        self.equal += units == 0
        self.units = max(self.units, units)
        allowed = 0.0
        if maker is not None:
            allowed = 1.0 if maker.is_wide else 0.0
        elif isinstance(source, Tensor):  # float: how far from the value before it was rounded
            exact = source.double() / cast(float, qparams.scale) + qparams.zero_point
            exact = exact.clamp(qparams.quant_min, qparams.quant_max)
            off = (given.double() - exact).abs()
            allowed = 0.5 + FLOAT_UNITS * max(1.0, qparams.levels / 256)
            off = off.nan_to_num(0.0)  # a NaN is stored as whatever the processor makes of it
        wrong = off > allowed
        if self.found is None and bool(wrong.any()):
            maker_node = cast(Node, node.args[0])
            path, count = module_path(maker_node), int(wrong.sum())
            self.found = Departure(maker_node.name, path, given.numel(), count, float(off.max()))


def relative_error(want: Tensor, got: Tensor) -> float:
    """Root-mean-square difference over the root-mean-square of ``want``, of what is finite.

    Infinite where one of the two is not, and the other is another value.
    """
    reference, value = want.to(torch.float64), got.to(torch.float64)
    finite = torch.isfinite(reference) & torch.isfinite(value)
    same = (reference == value) | (torch.isnan(reference) & torch.isnan(value))
    if not bool((finite | same).all()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    noise = (value - reference)[finite].square().mean().sqrt()
    signal = reference[finite].square().mean().sqrt()
    return float(noise / signal) if signal > 0 else float(noise)
