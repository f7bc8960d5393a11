"""Does each tensor that somebody computed follow from those before it?

Through many layers of float ops last bits add up, and a network may magnify them: its outputs have
no bound worth the name. Each quantized tensor has one, given those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from custom_quantizer.core.graph import describe
from custom_quantizer.reference.converted import ConvertedGraph
from custom_quantizer.reference.interpreter import IntegerReference

__all__ = ["FLOAT_UNITS", "Departure", "first_departure"]

FLOAT_UNITS = 1 / 64
"""How far beyond half a unit an integer may be from the float value it was rounded from.

That is what the last bits of float kernels come to behind one group of float ops
(docs/device_arithmetic.md): of six networks of the zoo at most 1/2000.
"""


@dataclass(frozen=True)
class Departure:
    """A quantized tensor that does not follow from those before it.

    Attributes:
        node: that computes it, and its module path.
        values: how many it has.
        wrong: how many of them do not follow.
        units: the largest distance from what follows, in steps of its scale.
    """

    node: str
    values: int
    wrong: int
    units: float

    def __str__(self) -> str:
        return (
            f"{self.wrong} of {self.values} values of {self.node} do not follow from the tensors "
            f"before it, by up to {self.units:.3g} units"
        )


def first_departure(
    graph: ConvertedGraph,
    taps: Mapping[Node, Tensor],
    inputs: Sequence[Any],
) -> tuple[Departure | None, list[Any]]:
    """Compute each quantized tensor from what somebody else computed for those before it.

    What an integer op gives must be equal. What is rounded from float ops may be off by
    :data:`FLOAT_UNITS` more than the rounding, and what is emulated in float by one unit.

    Args:
        graph: a converted graph.
        taps: by quantize node, the integers that somebody computed.
        inputs: of the graph, flat.

    Returns:
        The first tensor that does not follow, if any, and the outputs that follow from the last.
    """
    following = _Following(graph, taps)
    outputs = following(*inputs)
    return following.found, pytree.tree_leaves(outputs)


class _Following(IntegerReference):
    """The integer reference, op by op on integers that somebody else computed."""

    def __init__(self, graph: ConvertedGraph, taps: Mapping[Node, Tensor]) -> None:
        super().__init__(graph)
        self._taps = taps
        self.found: Departure | None = None

    def _evaluate(
        self, node: Node, values: dict[Node, Any], record: dict[str, Tensor] | None
    ) -> Any:
        mine = super()._evaluate(node, values, record)
        given = self._taps.get(node)
        if given is None:
            return mine
        if self.found is None:
            self._compare(node, values[cast(Node, node.args[0])], mine, given)
        # In the memory format that the views behind it were captured with.
        return torch.empty_like(mine).copy_(given)

    def _compare(self, node: Node, source: Any, mine: Tensor, given: Tensor) -> None:
        """Note the tensor, if it does not follow."""
        qparams = self._qparams[node]
        maker = self._outputs.get(cast(Node, node.args[0]))
        off = (given.double() - mine.double()).abs()
        allowed = 0.0
        if maker is not None:
            allowed = 1.0 if maker.is_wide else 0.0
        elif isinstance(source, Tensor):  # float: how far from the value before it was rounded
            exact = source.double() / cast(float, qparams.scale) + qparams.zero_point
            exact = exact.clamp(qparams.quant_min, qparams.quant_max)
            off = (given.double() - exact).abs() - 0.5
            allowed = FLOAT_UNITS
            off = off.nan_to_num(0.0)  # a NaN is stored as whatever the processor makes of it
        wrong = off > allowed
        if bool(wrong.any()):
            name = describe(cast(Node, node.args[0]))
            units = float(off.max()) + (0.5 if allowed == FLOAT_UNITS else 0.0)
            self.found = Departure(name, given.numel(), int(wrong.sum()), units)
