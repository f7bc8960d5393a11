"""Changes of layout that undo each other are not written, and no value changes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, convert, differences, quantized
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import inline_constants, layouts

CHANNELS = 8
IMAGE = (2, CHANNELS, 6, 5)
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def conv(size: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, groups=groups)


def block(s: Any, x: Tensor) -> Tensor:
    """ConvNeXt: linear layers of channels between two permutes, and a sum with what was before."""
    y = s.norm(s.depthwise(x).permute(LAST))
    return x + s.contract(F.gelu(s.expand(y))).permute(FIRST)


def scaled(s: Any, x: Tensor) -> Tensor:
    """A factor of each channel, which no layer takes; of fewer dims, so ExecuTorch moves it."""
    y = s.first(x)
    return s.second((F.avg_pool2d(y, 3, 1, 1) - y) * s.factors + y)


def excited(s: Any, x: Tensor) -> Tensor:
    y = s.first(x)
    return s.second(y * torch.sigmoid(s.squeeze(y.mean((2, 3)))).view(-1, CHANNELS, 1, 1))


def normed(s: Any, x: Tensor) -> Tensor:
    """All values of an image in one group."""
    y = s.first(x)
    return s.second(y + s.third(s.group(y)))


def shown(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """An output with channels last is what is there."""
    y = torch.relu(s.first(x).permute(LAST) * 0.5)
    return y, s.second(y.permute(FIRST))


def turned(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two orders of dims are read, of which one is what was there before."""
    y = torch.relu(s.first(x).permute(LAST) + 0.5)
    return s.second(y.permute(FIRST)), torch.relu(y.permute(LAST) + 0.5)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "contract": lambda: nn.Linear(2 * CHANNELS, CHANNELS),
    "depthwise": lambda: conv(3, CHANNELS),
    "expand": lambda: nn.Linear(CHANNELS, 2 * CHANNELS),
    "first": conv,
    "group": lambda: nn.GroupNorm(1, CHANNELS),
    "norm": lambda: nn.LayerNorm(CHANNELS),
    "second": conv,
    "squeeze": lambda: nn.Linear(CHANNELS, CHANNELS),
    "third": conv,
}
# What is left: images come and go with channels first; one row of factors is moved.
CASES = {block: 2, scaled: 2, excited: 3, normed: 2, shown: 2, turned: 3}


def made(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    names = forward.__code__.co_names
    model = Function(forward, **{name: LAYERS[name]() for name in names if name in LAYERS})
    if "factors" in names:
        model.register_buffer("factors", torch.rand(CHANNELS, 1, 1) + 0.5)
    for layer in model.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.uniform_(layer.bias, -1, 1)
    return model.eval()


def kinds(program: cq.LoweredProgram) -> list[str]:
    return [op.kind for delegate in program.contents.delegates for op in delegate.ops]


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fewer_copies_give_the_same_values(
    forward: Callable[..., Any], dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(IMAGE)
    sizes = {0: torch.export.Dim("n", max=4)} if dynamic else {}
    graph = convert(made(forward), (x,), dynamic_shapes=((sizes,),)).graph
    program = cq.lower(graph, (x,))
    monkeypatch.setattr(inline_constants, "simplify", lambda _graph, _schema: True)
    before = cq.lower(graph, (x,))
    left = CASES[forward] + (dynamic and forward is excited)  # a mean of a dynamic batch is a layer
    assert kinds(program).count("static_transpose") == left
    (delegate,) = program.contents.delegates
    for op in delegate.ops:
        if op.kind in ("clamp", "convert"):
            assert delegate.tensors[op.inputs[0]].shape == delegate.tensors[op.outputs[0]].shape
    assert kinds(before).count("static_transpose") > CASES[forward]
    assert len(program.buffer) <= len(before.buffer)
    for given in (x, 3 * torch.randn(4 if dynamic else 2, *IMAGE[1:])):
        outputs = zip(flat(program.run(given)), flat(before.run(given)), strict=True)
        assert all(torch.equal(got, want) for got, want in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a16w8"])
@pytest.mark.parametrize("size", [(12, 10), (11, 15)], ids=["whole", "odd"])
def test_enlarged_images_are_copied_by_pixels(scheme: str, size: tuple[int, int]) -> None:
    """Between layers channels stand last, and stay there while pixels are repeated and rounded."""
    x = torch.randn(IMAGE)
    layers = {"first": conv(), "second": conv()}
    model = Function(lambda s, x: s.second(F.interpolate(s.first(x), size)), **layers)
    shapes = (({0: torch.export.Dim("n", max=4)},),)
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    graph = convert(model.eval(), (x,), quantizer, dynamic_shapes=shapes).graph
    program = cq.lower(graph, (x,))
    (delegate,) = program.contents.delegates
    assert kinds(program).count("static_transpose") == 2
    copies = [op for op in delegate.ops if op.kind.startswith("concatenate")]
    assert copies
    for op in copies:
        shape = delegate.tensors[op.outputs[0]].shape
        assert shape[-1] % CHANNELS == 0
        assert op.params["axis"] != len(shape) - 1
    if scheme == "a8w8":  # above 8 bits layers sum in float
        reference = cq.integer_reference(graph)
        for given in (x, torch.randn(4, *IMAGE[1:])):
            assert differences(program.run(given), reference(given)) == []


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def functions(s: Any, x: Tensor) -> Tensor:
    """More functions than XNNPACK takes in a row, with moves between them."""
    y = s.first(x)
    for _ in range(2):
        y = torch.tanh(torch.sigmoid(torch.tanh(y))).permute(LAST)
        y = torch.tanh(torch.sigmoid(torch.tanh(y))).permute(FIRST)
    return s.second(y)


def clamped(s: Any, x: Tensor) -> Tensor:
    """A clamp to another scale, and a layer, which XNNPACK would make one."""
    return s.second(F.relu(s.first(x).permute(LAST)).permute(FIRST))


def pooled(s: Any, x: Tensor) -> Tensor:
    """A pool would take the clamp for its own."""
    return s.second(F.relu(F.max_pool2d(s.first(x), 3, 1, 1).permute(LAST)).permute(FIRST))


def shared(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is computed between two changes of layout is read in a third order, too."""
    y = s.first(x)
    z = (F.avg_pool2d(y, 3, 1, 1) - y) * s.factors
    return s.second(z + y), F.relu(z.permute(FIRST) + 0.5)


def twice(s: Any, x: Tensor) -> Tensor:
    """Two changes of layout that are the same, and none of them undoes the other."""
    y = torch.relu(x.permute(LAST) * 0.5)
    return s.second(torch.relu(y.permute(LAST) + 0.5).permute(0, 2, 1, 3))


@pytest.mark.parametrize(
    "forward", [functions, clamped, pooled, shared, twice], ids=lambda f: f.__name__
)
def test_what_moves_keep_apart_stays_apart(forward: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type(torch.ops.aten.relu.default, "a8w8-percentile90")
    graph = quantized(made(forward), (x,), quantizer)
    program = cq.lower(graph, (x,))
    assert kinds(program).count("static_transpose") > 2
    reference = cq.integer_reference(graph)
    assert differences(program.run(x), reference(x)) == []


def read_twice(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the transposes behind an op, one would give back what was there before; another not."""
    y = torch.relu(x.permute(FIRST) * 0.5)
    return torch.relu(y.permute(LAST) + 0.5), s.squeeze(y.permute(FIRST))


def rows(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """An op that is not one of values alone."""
    y = x.permute(FIRST)
    return torch.relu(torch.softmax(y, -1).permute(LAST) - 0.1), s.squeeze(y.permute(FIRST))


@pytest.mark.parametrize("forward", [read_twice, rows], ids=lambda f: f.__name__)
def test_ops_that_need_their_order_stay(forward: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    graph = convert(made(forward), (x,)).graph
    program = cq.lower(graph, (x,))
    found = zip(flat(program.run(x)), flat(cq.integer_reference(graph)(x)), strict=True)
    for got, want in found:  # last bits of a softmax, and bits of all else
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if forward is rows else 0)


def test_ops_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """XNNPACK computes them as they are listed."""
    seen: list[layouts.Contents] = []

    def listed(graph: layouts.Contents, schema: layouts.Schema) -> bool:
        before = list(graph["xnodes"])
        layouts._Moves(graph, schema).drop_unread()
        assert all(a is b for a, b in zip(graph["xnodes"], before, strict=True))
        seen.append(graph)
        return True

    monkeypatch.setattr(inline_constants, "simplify", listed)
    x = torch.randn(IMAGE)
    cq.lower(convert(made(scaled), (x,)).graph, (x,))
    assert len(seen) == 1
