"""Forms take the place of calls, or leave nothing behind."""

from __future__ import annotations

import torch
from support.graphs import Function, capture
from torch.fx import Node

from custom_quantizer.core.rewriting import Insertion, rewrite_calls

aten = torch.ops.aten


def test_of_a_form_that_sizes_forbid_nothing_is_left() -> None:
    """A reshape takes one dynamic size; the form is known to need one when its half is written."""

    def form(insert: Insertion) -> Node:
        data = insert.node.args[0]
        assert isinstance(data, Node)
        turned = insert.permute(insert.call(aten.neg.default, data), [1, 0, 2])
        first, second, third = turned.meta["val"].shape
        split = insert.reshape(turned, [first, second, 2, third // 2])
        return insert.reshape(insert.call(aten.neg.default, split), insert.node.meta["val"].shape)

    model, x = Function(lambda _, x: torch.relu(x).transpose(0, 1) + 1), torch.randn(2, 4, 6)
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", max=8)}
    for dynamic in ({}, {0: sizes[0]}, sizes):
        shapes = {"inputs": (dynamic,)} if dynamic else None
        graph = capture(model, (x,), dynamic_shapes=shapes)
        before = str(graph.graph)
        count = rewrite_calls(graph, {aten.transpose.int: form})
        assert count == (len(dynamic) < 2)
        assert (str(graph.graph) == before) is (len(dynamic) == 2)
        graph.recompile()
        assert torch.equal(graph(x), model(x))
