"""Small models made of a function, and exact comparison of what they compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND, passes
from custom_quantizer.ops.rewrites import canonical
from support.models import convert

Inputs = tuple[Tensor, ...]


class Function(nn.Module):
    """``function(self, *inputs)`` as a module, with submodules by keyword."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    if TYPE_CHECKING:  # children are whatever the test gave

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


OUTSIDE = "aten::pow.Tensor_Tensor_out"
"""The kernel of :func:`outside`."""


def outside(x: Tensor) -> Tensor:
    """A function of numbers that no delegate has."""
    bases = torch.linspace(1.1, 1.4, x.shape[-1])
    return torch.pow(bases.expand_as(x), x)


def canonicalize(graph: GraphModule, *, training: bool = False) -> GraphModule:
    """The form in which XNNPACK's graphs are planned, in place."""
    whole = BACKEND.float_targets
    return canonical.canonicalize(graph, BACKEND.legalize, whole=whole, training=training)


def capture(model: nn.Module, inputs: Inputs, **options: Any) -> GraphModule:
    return torch.export.export(model.eval(), inputs, **options).module()


def calls(graph: GraphModule, target: Any) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and n.target is target]


def stress(shapes: Iterable[Sequence[int]]) -> list[Inputs]:
    """Random inputs of ordinary size, and inputs that saturate: far too large, and constant."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Inputs:
        return tuple(torch.randn(*shape, generator=generator) * scale for shape in shapes)

    shapes = list(shapes)
    constants = [tuple(torch.full(tuple(s), v) for s in shapes) for v in (0.0, -3.0, 3.4e38)]
    return [draw(1.0), draw(1.3), draw(0.01), draw(100.0), draw(1e30), *constants]


def differences(got: Any, want: Any) -> list[str]:
    """One line for each output that is not equal, bit for bit."""
    lines = []
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    if len(got) != len(want):
        return [f"{len(got)} outputs, not {len(want)}"]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"output {i}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
        elif not torch.equal(a, b):
            wrong, worst = int((a != b).sum()), float((a - b).abs().max())
            lines.append(f"output {i}: {wrong} of {a.numel()} differ, by up to {worst}")
    return lines


def quantized(
    model: nn.Module,
    inputs: Inputs,
    quantizer: cq.IntegerQuantizer | str = "a8w8",
    calibration: list[Inputs] | None = None,
) -> GraphModule:
    return convert(model, inputs, quantizer, calibration).graph


def lowered_exactly(
    converted: GraphModule, example: Inputs, inputs: list[Inputs] | None = None
) -> cq.LoweredProgram:
    """Lower, and compare the runtime with the integer reference on inputs that saturate too."""
    lowered = cq.lower(converted, example)
    reference = cq.integer_reference(converted)
    shapes = [tuple(t.shape) for t in example]
    for given in [example, *(stress(shapes) if inputs is None else inputs)]:
        assert differences(lowered.run(*given), reference(*given)) == []
    return lowered


def lower_sabotaged(
    graph: GraphModule, x: Tensor, change: Callable[[Node], None], name: str
) -> cq.LoweredProgram:
    """Lower with passes of which the last also changes a node."""
    honest = passes.PASSES

    def run(model: GraphModule) -> int:
        count = honest[-1].run(model)
        # Others that are called so stand before it: products with one.
        change([n for n in model.graph.nodes if name in str(n.target)][-1])
        return count

    with pytest.MonkeyPatch.context() as patch:
        last = dataclasses.replace(honest[-1], run=run)
        patch.setattr(passes, "PASSES", (*honest[:-1], last))
        return cq.lower(graph, (x,))
