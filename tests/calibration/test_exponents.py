"""Products that are exponents: on integers, or in float where their steps would be coarse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import Converted, convert
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.calibration.settling import settled_scales
from custom_quantizer.calibration.statistics import freeze_ranges


class Attention(nn.Module):
    """Of one head, with a factor before the softmax or none."""

    def __init__(self, wide: float, scale: float = 1.0, *, shown: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.wide, self.scale, self.shown = wide, scale, shown
        with torch.no_grad():
            self.query.weight.mul_(wide)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        flat = scores.reshape(2, 1, 36) * self.scale
        weights = flat.reshape(2, 6, 6).softmax(-1)
        result = weights @ self.value(x)
        return (result, scores.relu()) if self.shown else (result,)


DATA = torch.randn(5, 2, 6, 8, generator=torch.Generator().manual_seed(1)).split(1)
EXAMPLE = (DATA[0][0],)
INPUTS = [(batch[0],) for batch in DATA]


def converted(model: Attention, quantizer: cq.IntegerQuantizer | str = "a8w8") -> Converted:
    return convert(model, EXAMPLE, quantizer, INPUTS)


def calibrated(data: list[tuple[Tensor]] = INPUTS) -> GraphModule:
    torch.manual_seed(0)
    captured = torch.export.export(Attention(60.0).eval(), EXAMPLE).module()
    prepared: GraphModule = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    if data:
        cq.calibrate(prepared, data)
    return prepared


@torch.no_grad()
def test_coarse_scores_are_float_between_layers_on_integers() -> None:
    torch.manual_seed(0)
    result = converted(Attention(60.0).eval())
    program = cq.lower(result.graph, EXAMPLE)
    assert program.report.delegates == 1
    matmul = next(node for node in result.graph.graph.nodes if node.name == "matmul")
    why = matmul.meta[META_KEY]["reason"]
    assert why == "it is an exponent, and integers would have steps of 2"
    assert torch.equal(program.run(*EXAMPLE)[0], cq.integer_reference(result.graph)(*EXAMPLE)[0])


@torch.no_grad()
def test_frozen_and_improved_scores_are_float_as_well() -> None:
    prepared = calibrated()
    frozen = copy.deepcopy(prepared)
    freeze_ranges(frozen)
    want = convert_pt2e(copy.deepcopy(prepared))(*EXAMPLE)[0]
    assert torch.equal(convert_pt2e(frozen)(*EXAMPLE)[0], want)
    cq.improve(prepared, INPUTS, ["bias_correction"])
    scores = next(n for n in convert_pt2e(prepared).graph.nodes if n.name == "matmul")
    assert "exponent" in scores.meta[META_KEY]["reason"]


@torch.no_grad()
def test_scores_are_integers_again_where_an_improvement_ends_early() -> None:
    prepared = calibrated()
    code = str(prepared.graph)
    reasons = [node.meta.get(META_KEY) for node in prepared.graph.nodes]
    with pytest.raises(KeyboardInterrupt):
        interrupted(prepared)
    assert str(prepared.graph) == code
    assert [node.meta.get(META_KEY) for node in prepared.graph.nodes] == reasons


def interrupted(prepared: GraphModule) -> None:
    code = str(prepared.graph)
    with settled_scales(prepared):
        assert str(prepared.graph) != code
        raise KeyboardInterrupt


@torch.no_grad()
def test_statistics_with_frozen_ranges_fit_the_model(tmp_path: Path) -> None:
    prepared = calibrated()
    freeze_ranges(prepared)
    cq.save_statistics(prepared, tmp_path / "frozen.safetensors")
    other = calibrated(data=[])
    cq.load_statistics(other, tmp_path / "frozen.safetensors")
    want = convert_pt2e(prepared)(*EXAMPLE)[0]
    assert torch.equal(convert_pt2e(other)(*EXAMPLE)[0], want)


def named() -> cq.IntegerQuantizer:
    return cq.IntegerQuantizer().set_global("a8w8").set_node_name("matmul", "a8w8")


@pytest.mark.parametrize(
    ("model", "quantizer"),
    [
        (lambda: Attention(4.0), lambda: "a8w8"),
        (lambda: Attention(60.0, 0.05), lambda: "a8w8"),
        (lambda: Attention(60.0, shown=True), lambda: "a8w8"),
        (lambda: Attention(60.0), lambda: "a4w8"),
        (lambda: Attention(60.0), named),
        (
            lambda: Attention(60.0),
            lambda: cq.IntegerQuantizer(backend=None).set_global("a8w8"),
        ),
    ],
    ids=["narrow", "a factor makes it narrow", "others read it", "few bits", "a rule", "integers"],
)
@torch.no_grad()
def test_other_scores_stay_integers(
    model: Callable[[], Attention], quantizer: Callable[[], cq.IntegerQuantizer | str]
) -> None:
    torch.manual_seed(0)
    result = converted(model().eval(), quantizer())
    (node,) = [n for n in result.graph.graph.nodes if n.name == "matmul"]
    assert all("quantize" in str(user.target) for user in node.users)
