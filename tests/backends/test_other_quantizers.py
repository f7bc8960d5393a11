"""Weights that another quantizer chose, beside ours in a ``ComposableQuantizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.graphs import differences
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

import custom_quantizer as cq
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.report.graph_record import report_of

aten = torch.ops.aten


def spec(observer: Any, scheme: torch.qscheme) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=scheme,
        ch_axis=0 if scheme is torch.per_channel_affine else None,
        observer_or_fake_quant_ctr=observer,
    )


class AffineWeights(Quantizer):
    """Layers without a bias get weights with zero points."""

    def __init__(self, *, per_channel: bool) -> None:
        self._weight = (
            spec(PerChannelMinMaxObserver, torch.per_channel_affine)
            if per_channel
            else spec(MinMaxObserver, torch.per_tensor_affine)
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        data = spec(MinMaxObserver, torch.per_tensor_affine)
        for node in model.graph.nodes:
            if node.target in (aten.linear.default, aten.conv2d.default) and len(node.args) == 2:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[0]: data, node.args[1]: self._weight},
                    output_qspec=data,
                    _annotated=True,
                )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing."""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.theirs = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, bias=False)
        self.linear, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        for layer in (self.theirs, self.linear):
            nn.init.uniform_(layer.weight, -0.1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.theirs(torch.relu(self.conv(x)))).mean((2, 3))
        return self.head(torch.relu(self.linear(x)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_with_zero_points_are_computed_with_them(per_channel: bool, tmp_path: Path) -> None:
    """Kernels have none: without them the outputs have nothing to do with the graph's."""
    example = (torch.randn(2, 3, 8, 8),)
    ours = cq.IntegerQuantizer().set_global("a8w8")
    quantizer = ComposableQuantizer([AffineWeights(per_channel=per_channel), ours])
    prepared = prepare_pt2e(torch.export.export(Layers().eval(), example).module(), quantizer)
    prepared(*example)
    graph = convert_pt2e(prepared)
    floats = {op.node.name: op.reason for op in read_converted(graph).floating}
    assert floats.keys() == {"conv2d_1", "linear"}
    assert all("has zero points, which no kernel has" in reason for reason in floats.values())

    program = cq.lower(graph, example)
    got = program.run(*example)
    assert differences(got, cq.integer_reference(graph)(*example)) == []
    wanted = graph(*example)
    assert float((got - wanted).square().sum() / wanted.square().sum()) < 1e-4
    assert program.report.delegates == 1
    assert "zero points" in str(report_of(read_converted(graph), program))
    with pytest.raises(cq.ConversionError, match="zero point"):
        cq.save_integers(graph, tmp_path / "net")
    inner = cq.diagnose(Layers().eval(), graph, [example])
    assert inner.samples == 2
