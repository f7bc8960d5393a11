"""What is lowered after PTQ is lowered after QAT: the same ops, in the same places, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
from support.graphs import Function, calls, lowered_exactly, quantized
from support.selection import slow_but
from support.shared_layers import norm
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer, Quantizer

import custom_quantizer as cq
from custom_quantizer.errors import ConversionError
from custom_quantizer.training import qat

aten = torch.ops.aten


def joints(self: Function, x: Tensor) -> Tensor:
    """A batch norm over signals, with no layer before it (ST-GCN)."""
    n, c, t, v = x.shape
    rows = x.permute(0, 3, 1, 2).reshape(n, v * c, t)
    return self.conv(self.norm(rows).reshape(n, v, c, t).permute(0, 2, 3, 1))


def dense(self: Function, x: Tensor) -> Tensor:
    """DenseNet's order: norm, relu, convolution."""
    new = self.conv(torch.relu(self.norm1(x)))
    return self.last(torch.relu(self.norm2(torch.cat([x, new], 1))))


def unet(self: Function, x: Tensor) -> Tensor:
    low = torch.relu(self.norm(self.down(x)))
    up = torch.relu(self.up_norm(self.up(low)))
    return self.last(torch.cat([up, x], 1))


class Factors(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.1, 2.0, channels))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "signals": (
        lambda: Function(joints, norm=norm(6, 3), conv=nn.Conv2d(2, 4, 1)),
        (2, 2, 5, 3),
    ),
    "dense block": (
        lambda: Function(
            dense,
            norm1=norm(3, 4),
            conv=nn.Conv2d(3, 4, 3, padding=1, bias=False),
            norm2=norm(7, 4, affine=False),
            last=nn.Conv2d(7, 4, 1),
        ),
        (2, 3, 6, 6),
    ),
    "rows": (
        lambda: nn.Sequential(norm(8, 2), nn.Linear(8, 6), norm(6, 2), nn.ReLU(), nn.Linear(6, 3)),
        (4, 8),
    ),
    "volumes, norm first": (
        lambda: nn.Sequential(norm(2, 5), nn.ReLU(), nn.Conv3d(2, 4, 1)),
        (2, 2, 3, 4, 4),
    ),
    "volumes": (
        lambda: nn.Sequential(
            nn.Conv3d(4, 6, (3, 1, 3), (2, 1, 1), (1, 0, 1), groups=2, bias=False),
            norm(6, 5),
            nn.ReLU(),
            nn.Conv3d(6, 3, (2, 3, 3)),
        ),
        (2, 4, 5, 6, 6),
    ),
    "unet over volumes": (
        lambda: Function(
            unet,
            down=nn.Conv3d(2, 4, 3, 2, padding=1),
            norm=norm(4, 5),
            up=nn.ConvTranspose3d(4, 4, 2, 2, groups=2),
            up_norm=norm(4, 5, seed=1),
            last=nn.Conv3d(6, 3, 1),
        ),
        (2, 2, 4, 6, 6),
    ),
    "transposed over volumes": (
        lambda: nn.Sequential(
            nn.ConvTranspose3d(3, 4, 3, (1, 2, 2), padding=1, bias=False), norm(4, 5), nn.ReLU6()
        ),
        (2, 3, 3, 4, 4),
    ),
    "layer scale": (
        lambda: Function(
            lambda s, x: s.last(s.drop(s.conv(x)) * s.gamma.factors.reshape(1, -1, 1, 1) + x),
            conv=nn.Conv2d(4, 4, 1),
            drop=nn.Dropout(0.0),
            gamma=Factors(4),
            last=nn.Conv2d(4, 3, 1),
        ),
        (2, 4, 6, 6),
    ),
    "float before a dropout": (
        lambda: nn.Sequential(
            nn.Linear(8, 8), nn.LayerNorm(8), nn.Flatten(), nn.Dropout(0.0), nn.Linear(24, 4)
        ),
        (2, 3, 8),
    ),
    "a table of positions": (
        lambda: Function(
            lambda s, x: s.last(s.norm(s.first(x) + s.table(torch.arange(32)))),
            first=nn.Linear(4, 32),
            table=nn.Embedding(32, 32),
            norm=nn.LayerNorm(32),
            last=nn.Linear(32, 3),
        ),
        (2, 32, 4),
    ),
    "a learned state": (
        lambda: Function(
            lambda s, x: s.last(s.steps(x, s.state.factors.reshape(1, 1, 4).expand(1, 2, 4))[0]),
            steps=nn.GRU(3, 4, batch_first=True),
            state=Factors(4),
            last=nn.Linear(4, 3),
        ),
        (2, 3, 3),
    ),
    "attention that drops": (
        lambda: Function(
            lambda s, x: s.last(s.attend(x, x, x, need_weights=False)[0]),
            attend=nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True),
            last=nn.Linear(8, 4),
        ),
        (2, 5, 8),
    ),
    "recurrent layers that drop": (
        lambda: Function(
            lambda s, x: s.last(s.steps(x)[0]),
            steps=nn.LSTM(3, 4, num_layers=2, dropout=0.3, batch_first=True),
            last=nn.Linear(4, 3),
        ),
        (2, 3, 3),
    ),
    "a computed weight over volumes": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 4, 3)), norm(4, 5), nn.ReLU()
        ),
        (2, 2, 4, 5, 5),
    ),
}
DROPS = ("attention that drops", "recurrent layers that drop")
"""In training no two calls of them give the same."""
ALIKE = [name for name in MODELS if name not in DROPS]
QUICK = ("signals", "volumes")


def trained(model: nn.Module, x: Tensor, quantizer: Quantizer | str) -> GraphModule:
    """A graph in evaluation, after a user's own loop."""
    exported = torch.export.export(copy.deepcopy(model).train(), (x,))
    if isinstance(quantizer, str):
        quantizer = cq.IntegerQuantizer().set_global(quantizer)
    prepared = prepare_qat_pt2e(exported.module(), quantizer)
    move_exported_model_to_train(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)
    move_exported_model_to_eval(prepared)
    qat.freeze_observers(prepared)
    return prepared


@pytest.mark.parametrize("scheme", slow_but(["a8w8"], ["a8w8", "a8w4"]))
@pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
def test_the_program_after_training_is_that_of_ptq(name: str, scheme: str) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    prepared = trained(model, x, scheme)
    want = prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), want)
    after = lowered_exactly(converted, (x,), []).report
    before = cq.lower(quantized(model, (x,), scheme), (x,)).report
    assert after.fully_delegated, str(after)
    if name != "unet over volumes":  # a norm behind a transposed layer of stride 2 stays apart
        assert _rows(after) == _rows(before)


def test_what_stays_in_float_ships_as_after_ptq() -> None:
    """A rule for one layer: the norm is folded like those of other layers."""
    torch.manual_seed(0)
    build, shape = MODELS["signals"]
    model, x = build(), torch.randn(shape)

    def quantizer() -> cq.IntegerQuantizer:
        return cq.IntegerQuantizer().set_module_name("conv", "a8w8")

    converted = convert_pt2e(trained(model, x, quantizer()))
    after = cq.lower(converted, (x,)).report
    assert _rows(after) == _rows(cq.lower(quantized(model, (x,), quantizer()), (x,)).report)


def sum_of_branches(self: Function, x: Tensor) -> Tensor:
    return self.drop(self.norm(self.conv(x))) + x


def test_a_graph_without_a_quantized_layer_ships_too() -> None:
    """Nothing but activations are rounded, which torchao converts by itself."""
    torch.manual_seed(0)
    model = Function(
        sum_of_branches, conv=nn.Conv2d(4, 4, 1), norm=norm(4, 4), drop=nn.Dropout(0.3)
    )
    x = torch.randn(2, 4, 5, 6)
    quantizer = cq.IntegerQuantizer().set_operator_type(torch.ops.aten.add.Tensor, "a8w8")
    prepared = trained(model, x, quantizer)
    training = move_exported_model_to_train(copy.deepcopy(prepared))
    with pytest.raises(ConversionError, match=r"dropout.* is in training mode"):
        convert_pt2e(training)
    want = prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), want)
    assert cq.lower(converted, (x,)).report.fully_delegated


@pytest.mark.slow
def test_beside_another_quantizer_norms_keep_their_shapes() -> None:
    """torchao leaves (1, 1, 3, 3) in the norms that it exchanges, and ours are not all."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(4, 4), nn.ReLU(), nn.Flatten(2), nn.Linear(12, 6))
    x = torch.randn(2, 4, 3, 4)
    ours = cq.IntegerQuantizer().set_module_name("3", "a8w8")
    converted = convert_pt2e(trained(model, x, ComposableQuantizer([ours, XNNPACKQuantizer()])))
    (left,) = calls(converted, torch.ops.aten.batch_norm.default)
    assert left.meta["val"].shape == x.shape
    lowered_exactly(converted, (x,), [])


def _rows(report: cq.LoweringReport) -> list[tuple[str, str, str]]:
    """Dropouts, which training needs, are gone once it is over."""
    kept = [op for op in report.ops if not op.node.startswith("dropout")]
    return [(op.node, op.family, op.backend.label) for op in kept]


@pytest.mark.parametrize("name", slow_but(["signals", "unet over volumes"], ALIKE))
def test_without_rounding_training_is_that_of_the_model(name: str) -> None:
    """Outputs, gradients by the model's own names, and running statistics."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, x = build().train(), torch.randn(shape)
    graph = torch.export.export(copy.deepcopy(model), (x,)).module()
    prepared = prepare_qat_pt2e(graph, cq.IntegerQuantizer().set_global("a8w8"))
    qat.rounding(prepared, False)
    for module in (model, prepared):
        module(x).square().mean().backward()
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)
    got = dict(prepared.named_parameters())
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(got[path].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    buffers = dict(prepared.named_buffers())
    for path, buffer in model.named_buffers():
        if not path.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffers[path], buffer, rtol=1e-4, atol=1e-5)


LEARNED: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "exponent": lambda s, x: x.clamp(min=1e-6) ** s.p.factors,
    "root": lambda s, x: x.clamp(min=1e-6).pow(s.p.factors).mean(-1, True) ** (1 / s.p.factors),
    "bounds": lambda s, x: torch.clamp(x, -s.p.factors.exp(), s.p.factors),
    "least": lambda s, x: torch.minimum(s.p.factors, x),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_was_learned_is_a_number(name: str) -> None:
    x = torch.rand(2, 4)
    layers = {"first": nn.Linear(4, 4), "last": nn.Linear(4, 4), "p": Factors(1)}
    layers["p"].factors.data[:] = 1.7
    model = Function(lambda s, x: s.last(LEARNED[name](s, s.first(x)) + x), **layers).eval()
    want = quantized(copy.deepcopy(model), (x,), "a8w8")
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x).sum().backward()
    layers["p"].factors.data[:] = 2.4
    converted = convert_pt2e(qat.evaluation_mode(prepared))
    targets = [
        sorted(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        for graph in (converted, want)
    ]
    assert targets[0] == targets[1]
    learned = layers["p"].factors
    numbers = [float(node.args[1]) for node in calls(converted, aten.pow.Tensor_Scalar)]
    assert numbers == [float(learned), float(1 / learned)][: len(numbers)]
    assert learned.grad is not None


@pytest.mark.parametrize("rounded_first", [True, False])
def test_a_parameter_that_integers_and_floats_read(rounded_first: bool) -> None:
    """torchao's ``constant_fold`` took one of the model itself away with its reader on integers."""

    def forward(s: Function, x: Tensor) -> Tensor:
        y = torch.relu(s.first(x))
        y = y * s.limit if rounded_first else y
        y = s.last(y) / s.limit
        return y if rounded_first else s.again(torch.relu(y) * s.limit)

    torch.manual_seed(0)
    names = ["first", "last"] if rounded_first else ["first", "last", "again"]
    layers: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in names}
    model, x = Function(forward, **layers), torch.rand(2, 4)
    model.limit = nn.Parameter(torch.tensor([1.5]))
    prepared = trained(model, x, cq.IntegerQuantizer().set_global("a8w8"))
    want = prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), want)
    lowered_exactly(converted, (x,), [])
