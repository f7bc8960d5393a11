"""The same float network with numbers that integers lose less of."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.accuracy import improving
from custom_quantizer.accuracy.equalization import equalize, find_pairs
from custom_quantizer.accuracy.layers import find_layers
from custom_quantizer.accuracy.streams import values_of
from custom_quantizer.calibration.statistics import activation_observers

RESCALING = ["equalization", "bias_absorption", "smoothquant"]


class Uneven(nn.Module):
    """Convolutions of all kinds, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.max_pool2d(torch.relu(self.depthwise(x)), 2, 1)
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        return cast(Tensor, self.last(x))


class Block(nn.Module):
    """A layer norm that two linear layers read, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query = nn.Linear(16, 16)
        self.key = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.query(y) * torch.relu(self.key(y))


def _seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind().eval()


def _uneven() -> nn.Module:
    """What one layer makes small the next one makes large."""
    model = _seeded(Uneven)
    with torch.no_grad():
        spread = torch.logspace(-2, 1, 8).reshape(-1, 1, 1, 1)
        model.get_parameter("first.weight").mul_(spread)
        model.get_parameter("first.bias").mul_(spread.flatten())
        model.get_parameter("depthwise.weight").div_(spread)
    return model


def _images(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _prepared(model: nn.Module, x: Tensor, scheme: str = "a8w4-per_tensor") -> GraphModule:
    exported = torch.export.export(model, (x,)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global(scheme))
    prepared(x)
    return cast(GraphModule, prepared)


def _float_outputs(prepared: GraphModule, x: Tensor) -> Tensor:
    """What the prepared graph computes, observers aside."""
    (output,) = [node for node in prepared.graph.nodes if node.op == "output"]
    (((values,),),) = [values for _, values in values_of(prepared, [[x]], [output])]
    return cast(Tensor, values)


def _error(model: nn.Module, prepared: GraphModule, x: Tensor) -> float:
    with torch.no_grad():
        return float((convert_pt2e(prepared)(x) - model(x)).square().mean())


def test_equalization_leaves_the_float_function_as_it_was() -> None:
    model, x = _uneven(), _images()
    prepared = _prepared(model, x)
    layers = find_layers(prepared)[0]
    for layer in layers:
        layer.take_copies()
    pairs, refused = find_pairs(prepared, layers)
    assert [(pair.first.name, pair.second.name) for pair in pairs] == [
        ("conv2d", "conv2d_1"),
        ("conv2d_1", "conv2d_2"),
        ("conv2d_2", "conv_transpose2d"),
        ("conv_transpose2d", "conv2d_3"),
    ]
    assert refused == {"conv2d_3": "its output is the network's"}
    before = _float_outputs(prepared, x)
    reach = layers[0].reach_of_outputs()
    equalize(pairs)
    # Factors are powers of two, so not one bit may differ.
    assert torch.equal(_float_outputs(prepared, x), before)
    after = layers[0].reach_of_outputs()
    assert float(after.max() / after.min()) < float(reach.max() / reach.min()) / 20


def test_equalization_helps_where_channels_are_uneven() -> None:
    model, x = _uneven(), _images()
    plain = _error(model, _prepared(model, x), x)
    prepared = _prepared(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = cq.improve(prepared, x, ["equalization"])
    assert [layer.algorithms for layer in result.layers] == [("equalization",)] * 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert _error(model, prepared, x) < plain / 4


def test_what_cannot_be_equalized_has_a_reason() -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clipped = nn.Conv2d(3, 3, 1)
            self.kept = nn.Conv2d(3, 3, 1)
            self.inner = nn.Conv2d(3, 3, 1)
            self.curved = nn.Conv2d(3, 3, 1)
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.kept(nn.functional.relu6(self.clipped(x)))
            x = x + torch.relu(self.inner(x))
            return self.last(torch.sigmoid(self.curved(x)))

    prepared = _prepared(_seeded(Refused), _images())
    result = cq.improve(prepared, _images(), ["equalization"])
    assert {n.node: n.reason for n in result.not_applied} == {
        "conv2d": "relu6 clips at a number that a factor would move",
        "conv2d_1": "2 ops read its output, so its channels cannot be scaled for one",
        "conv2d_2": "add (add) does not commute with factors",
        "conv2d_3": "sigmoid (sigmoid) does not commute with factors",
        "conv2d_4": "its output is the network's",
    }


def test_a_frozen_range_is_not_moved() -> None:
    model, x = _uneven(), _images()
    prepared = _prepared(model, x)
    cq.freeze_ranges(prepared)
    ranges = [observed.observer.qparams() for observed in activation_observers(prepared)]
    result = cq.improve(prepared, x, ["equalization"])
    assert {n.reason for n in result.not_applied} == {
        "the range between it and the next layer was frozen by the caller",
        "its output is the network's",
    }
    after = [observed.observer.qparams() for observed in activation_observers(prepared)]
    assert after == ranges


def test_a_high_bias_goes_through_the_next_layer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        cast(Tensor, model[0].bias).add_(torch.linspace(20, 30, 12))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    plain = _error(model, _prepared(model, x, "a4w8"), x)
    prepared = _prepared(model, x, "a4w8")
    result = cq.improve(prepared, x, ["bias_absorption"])
    assert [layer.algorithms for layer in result.layers] == [("bias_absorption",)] * 2
    assert torch.allclose(_float_outputs(prepared, x), model(x), atol=1e-5)
    assert _error(model, prepared, x) < plain / 2


def test_what_cannot_be_absorbed_has_a_reason() -> None:
    prepared = _prepared(_uneven(), _images())
    result = cq.improve(prepared, _images(), ["bias_absorption"])
    reasons = {n.node: n.reason for n in result.not_applied}
    assert reasons["conv2d_3"] == "its output is the network's"
    assert reasons["conv2d_2"].startswith("the next layer is a transposed convolution")


def test_smoothquant_moves_outliers_behind_a_norm_into_weights() -> None:
    model = _seeded(Block)
    with torch.no_grad():
        cast(Tensor, model.get_parameter("norm.weight"))[3] = 60.0
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    plain = _error(model, _prepared(model, x, "a8w8"), x)
    prepared = _prepared(model, x, "a8w8")
    weight = model.get_parameter("norm.weight").detach().clone()
    result = cq.improve(prepared, x, ["smoothquant"])
    assert [layer.algorithms for layer in result.layers] == [("smoothquant",)] * 2
    assert torch.equal(model.get_parameter("norm.weight"), weight)
    with torch.no_grad():
        assert torch.equal(_float_outputs(prepared, x), model(x))
    assert _error(model, prepared, x) < plain / 2


def test_a_network_without_norms_says_so() -> None:
    result = cq.improve(_prepared(_uneven(), _images()), _images(), ["smoothquant"])
    assert [n.reason for n in result.not_applied] == ["it has no layer norm"]


def test_a_failure_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _seeded(Block)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    prepared = _prepared(model, x, "a8w4")
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    ranges = [observed.observer.qparams() for observed in activation_observers(prepared)]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(improving._Run, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        cq.improve(prepared, x, RESCALING)
    after = prepared.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [observed.observer.qparams() for observed in activation_observers(prepared)] == ranges
