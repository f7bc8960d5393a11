"""What we rely on and upstream does not promise: torch 2.15, torchao 0.18, ExecuTorch 1.5.1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from hypothesis import given
from hypothesis import strategies as st
from support.models import convert
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from custom_quantizer.bias import COMFORTABLE_BIAS

_q = torch.ops.quantized_decomposed
INT32 = (-(2**31), 2**31 - 1, torch.int32)


class _Hooked(ObserverBase):
    """An observer that converts itself, as ours of weights and biases do."""

    converted: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, **_spec: Any) -> None:
        super().__init__(dtype=torch.int8)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("convert_pt2e must call convert instead")

    def convert(self, model: GraphModule, node: Node) -> None:
        self.converted.append(self.name)
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)


class _Annotating(Quantizer):
    """Two inputs of one add, same spec but for the observer's name."""

    def __init__(self, implicit: bool) -> None:
        self.implicit = implicit

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is not torch.ops.aten.add.Tensor:
                continue
            specs = {
                source: QuantizationSpec(
                    torch.int8, _Hooked.with_args(name=f"{node.name}:{source.name}"), -128, 127
                )
                for source in node.args[:2]
            }
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=specs, allow_implicit_sharing=self.implicit, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        pass


@pytest.mark.parametrize(("implicit", "observers"), [(True, 3), (False, 4)])
def test_convert_hook_and_sharing(implicit: bool, observers: int) -> None:
    class TwoAdds(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return (x + y) * 0 + (x + z)

    example = tuple(torch.randn(2) for _ in range(3))
    graph = torch.export.export(TwoAdds(), example).module()
    first_two = [n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor][:2]
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and node not in first_two:
            node.target = torch.ops.aten.sub.Tensor
    prepared = prepare_pt2e(graph, _Annotating(implicit))
    _Hooked.converted.clear()
    convert_pt2e(prepared)
    # x feeds both adds: implicit sharing gives it one observer, and would give two biases one.
    assert len(_Hooked.converted) == observers


def test_custom_meta_reaches_the_delegate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    example = (torch.randn(1, 3, 6, 6),)
    graph = convert(model, example, "a8w8-biasfloat").graph
    for node in graph.graph.nodes:
        node.meta["custom"] = {"probe": node.name}
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, example), partitioner=[XnnpackPartitioner()]
    )
    module = edge.exported_program().graph_module
    inner = module.lowered_module_0.original_module
    found = {n.meta.get("custom", {}).get("probe") for n in inner.graph.nodes}
    assert {"conv2d", "relu"} <= found
    for node in inner.graph.nodes:
        if (node.meta.get("custom") or {}).get("probe") in ("conv2d", "relu"):
            assert isinstance(node.meta["debug_handle"], int)


scales = st.floats(2.0**-20, 2.0**3, width=32)
integers = st.integers(-COMFORTABLE_BIAS, COMFORTABLE_BIAS)


@given(scales, scales, st.lists(integers, min_size=1, max_size=50))
def test_serializer_returns_folded_biases_per_tensor(sx: float, sw: float, q: list[int]) -> None:
    # QuantParams.from_bias multiplies two Python floats, quantize_tensor calls this op.
    scale = sw * sx
    folded = (torch.tensor(q, dtype=torch.float64) * scale).to(torch.float32)
    again = _q.quantize_per_tensor.default(folded, scale, 0, *INT32)
    assert again.tolist() == q


@given(scales, st.lists(st.tuples(scales, integers), min_size=1, max_size=50))
def test_serializer_returns_folded_biases_per_channel(
    sx: float, channels: list[tuple[float, int]]
) -> None:
    scale = torch.tensor([s for s, _ in channels], dtype=torch.float32) * sx
    q = torch.tensor([value for _, value in channels])
    folded = (q.to(torch.float64) * scale.to(torch.float64)).to(torch.float32)
    zeros = torch.zeros(len(channels), dtype=torch.int64)
    again = _q.quantize_per_channel.default(folded, scale, zeros, 0, *INT32)
    assert torch.equal(again.long(), q)
