"""Tables that are read by index."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from custom_quantizer.ops._rule import Case, OpRule, PatternMatch

__all__ = ["EMBEDDING", "RULES"]

aten = torch.ops.aten


def _match_embedding(rule: OpRule, node: Node) -> PatternMatch | str:
    table, indices = node.args[:2]
    if not isinstance(table, Node) or not isinstance(indices, Node):
        return "its table or its indices are not tensors of the graph"
    return PatternMatch(rule, node, (table,))


class _Rows(nn.Module):
    """An embedding by indices that are computed from real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.table(x.abs().clamp(max=5.0).to(torch.int64)))


EMBEDDING = OpRule(
    family="embedding",
    targets=frozenset({aten.embedding.default}),
    match=_match_embedding,
    cases=(Case("rows", _Rows, ((3, 4),)),),
)

RULES = (EMBEDDING,)
