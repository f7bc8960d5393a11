"""Rounding that is learned, layer by layer and block by block."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.improvement import (
    DATA,
    fresh_error,
    layer_states,
    prepared_every_layer,
)
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.accuracy import improving, learning
from custom_quantizer.accuracy.layers import find_layers
from custom_quantizer.accuracy.learning import (
    Block,
    _drawn,
    _dropped,
    find_blocks,
    learn_block,
    walk_blocks,
)
from custom_quantizer.accuracy.streams import Stream, on_grid, walk
from custom_quantizer.calibration.observers import ActivationObserver


def test_blocks_are_cut_where_one_tensor_is_alive() -> None:
    prepared = prepared_every_layer()
    layers = find_layers(prepared)[0]
    blocks = find_blocks(prepared, layers)
    assert [[layer.name for layer in block.layers] for block in blocks] == [
        ["conv2d"], ["conv2d_1"], ["conv2d_2"], ["conv_transpose2d"], ["conv2d_3"], ["mean"],
        ["linear"],
    ]  # fmt: skip
    for before, after in pairwise(blocks):
        assert before.target is after.source
    # The residual connection is inside the second block.
    assert any(node.name == "add" for node in blocks[1].nodes)
    nodes = [node for block in blocks for node in block.nodes]
    assert len(set(nodes)) == len(nodes)


@pytest.mark.parametrize("algorithm", slow_but(["brecq"], ["adaround", "brecq"]))
def test_learned_rounding_is_better_than_nearest(algorithm: str) -> None:
    prepared = prepared_every_layer("a8w3")
    before = layer_states(prepared)
    result = cq.improve(prepared, DATA, [algorithm], iterations=80)
    changed = [layer for layer in result.layers if layer.algorithms]
    assert len(changed) >= 4
    # The first layer: what follows also depends on what came before it.
    assert result.layers[0].algorithms == (algorithm,)
    assert result.layers[0].gain > 3
    after = layer_states(prepared)
    for name, value in before.items():
        if not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        scale = after.get(f"{layer}.scale")
        if scale is None:
            continue
        shape = [1, -1] if layer == "conv_transpose2d" else [-1]
        spread = scale.reshape(*shape, *[1] * (value.dim() - len(shape)))
        steps = after[name] / spread
        assert torch.allclose(steps, steps.round(), atol=1e-5), name
        # Every weight went to one of its two neighbours.
        assert bool(((after[name] - value).abs() <= spread * 1.0001).all()), name


@pytest.mark.slow
def test_learning_starts_from_what_gptq_found_and_keeps_the_better() -> None:
    prepared = prepared_every_layer("a4w3-histogram")
    cq.improve(prepared, DATA, ["gptq", "bias_correction"])
    one = fresh_error(prepared)
    prepared = prepared_every_layer("a4w3-histogram")
    result = cq.improve(prepared, DATA, ["gptq", "bias_correction", "brecq"], iterations=60)
    assert any("brecq" in layer.algorithms for layer in result.layers)
    assert fresh_error(prepared) < one * 1.1


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithms = ["gptq", "bias_correction", "brecq"]
    whole = prepared_every_layer()
    expected = cq.improve(whole, DATA, algorithms, iterations=10)
    path = tmp_path / "improvement.safetensors"
    prepared = prepared_every_layer()
    learn_block = improving._Run._learn_block
    layers = len(expected.layers)

    def interrupted(run: improving._Run, index: int, *rest: object) -> tuple[str, ...]:
        if index == layers + 2:
            raise KeyboardInterrupt
        return learn_block(run, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(improving._Run, "_learn_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cq.improve(prepared, DATA, algorithms, iterations=10, checkpoint=path)
    result = cq.improve(prepared, DATA, algorithms, iterations=10, checkpoint=path)
    assert result.resumed == layers + 2
    assert result.layers == expected.layers
    states = layer_states(whole)
    assert all(torch.equal(value, states[name]) for name, value in layer_states(prepared).items())


def test_rounding_with_gradients_is_rounding() -> None:
    observers = [m for m in prepared_every_layer().modules() if isinstance(m, ActivationObserver)]
    observer = next(o for o in observers if o.qparams().zero_point not in (-128, 0, 127))
    reach = float(observer.qparams().scale) * 200  # beyond the ends of its range
    x = torch.linspace(-reach, reach, 10_001, requires_grad=True)
    found, expected = _dropped(observer, x, 0, None), on_grid(observer, x)
    assert torch.equal(found, expected)
    weights = torch.arange(len(x), dtype=torch.float32)
    gradients = [torch.autograd.grad(y, x, weights)[0] for y in (found, expected)]
    assert torch.equal(*gradients)
    assert 0 < int((gradients[0] == 0).sum()) < len(x) - 1  # some are clipped

    generator = torch.Generator().manual_seed(1)
    dropped = _dropped(observer, x, 0.5, generator)
    kept = _drawn(x.shape, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(dropped, torch.where(kept, expected, x))
    passed = torch.autograd.grad(dropped, x, weights)[0]
    assert torch.equal(passed, torch.where(kept, gradients[0], weights))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_masks_have_their_share(share: float) -> None:
    drawn = _drawn(torch.Size((3, 100_001)), share, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 100_001)
    assert abs(float(drawn.float().mean()) - share) < 0.005
    neighbours = drawn[:, 1:] & drawn[:, :-1]  # eight come from one number: no copies of each other
    assert abs(float(neighbours.float().mean()) - share**2) < 0.005


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """By layer, which of its weights stand between two integers when they are settled."""
    found: list[Tensor] = []
    settle = learning._SoftWeight.settle

    def settled(weight: learning._SoftWeight) -> None:
        raised = weight.raised()
        found.append(((raised > 0.05) & (raised < 0.95)).flatten())
        settle(weight)

    monkeypatch.setattr(learning._SoftWeight, "settle", settled)
    return found


@pytest.mark.slow
def test_weights_are_settled_in_the_end(between: list[Tensor]) -> None:
    """What was learned is what ships: hardly a weight stays between two integers."""
    cq.improve(prepared_every_layer("a8w3"), DATA, ["adaround"], iterations=600)
    assert len(between) > 4
    assert float(torch.cat(between).float().mean()) < 0.05


def test_weights_of_a_large_layer_in_a_block_are_settled_too(between: list[Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    images = [x[..., :10, :10] for x in DATA]
    prepared = prepare_pt2e(
        torch.export.export(model, (images[0],)).module(),
        cq.IntegerQuantizer().set_global("a8w3"),
    )
    cq.calibrate(prepared, images, progress=False)
    cq.improve(prepared, images, ["brecq"], iterations=150)
    assert len(between[-1]) == 9 * 32 * 32
    assert float(between[-1].float().mean()) < 0.05


def test_biases_are_corrected_for_what_a_block_learned() -> None:
    """The mean error of each output is less than a unit of its bias, as before the block."""
    prepared = prepared_every_layer("a8w3")
    result = cq.improve(prepared, DATA, ["gptq", "bias_correction", "brecq"], iterations=40)
    learned = {layer.node for layer in result.layers if "brecq" in layer.algorithms}
    assert learned
    layers = [layer for layer in find_layers(prepared)[0] if layer.bias is not None]
    floats = {n: value for layer in layers for n, value in layer.float_constants().items()}
    calls = [[x] for x in DATA[: -len(DATA) // 8]]
    streams = Stream(prepared, calls, False, floats), Stream(prepared, calls, True)
    for layer in walk(prepared, streams, find_layers(prepared)[0]):
        for stream in streams:
            stream.run_layer(layer)
        if layer.bias is None or layer.input_observer is None:
            continue
        exact, found = (layer.channel_means(stream.batches(layer.node)) for stream in streams)
        unit = layer.final_scale().double() * float(layer.input_observer.qparams().scale)
        unit = unit.reshape(-1).repeat(len(exact) // unit.numel())
        assert bool(((found - exact).abs() <= 0.51 * unit).all()), layer.name


def test_a_block_is_judged_on_batches_that_it_did_not_learn_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = prepared_every_layer("a8w3")
    layers = find_layers(prepared)[0]
    seen: list[int] = []
    loss = learning._loss

    def counted(run: object, sources: list[Tensor], targets: list[Tensor]) -> float:
        seen.append(len(sources))
        return loss(run, sources, targets)  # type: ignore[arg-type]

    monkeypatch.setattr(learning, "_loss", counted)
    calls = [[x] for x in DATA]
    with torch.no_grad():
        floating, rounded = (Stream(prepared, calls, rounded=on) for on in (False, True))
        block = next(walk_blocks(prepared, (floating, rounded), layers))
        generator = torch.Generator().manual_seed(0)
        before = [layer.state() for layer in block.layers]
        # Made worse by what it learned from: another target on the batch that judges.
        floating.batches(block.target)[7].copy_(rounded_output(prepared, block, rounded)[7])
        reason = learn_block(prepared, block, floating, rounded, 8, 20, generator, corrects=False)
    assert seen == [1, 7, 1]
    assert reason == "no better integers were found"
    after = [layer.state() for layer in block.layers]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)


def rounded_output(prepared: GraphModule, block: Block, rounded: Stream) -> list[Tensor]:
    """What a block computes as it is rounded now."""
    run = learning._Forward(prepared, block, rounded)
    return [run(x, {}) for x in rounded.batches(block.source)]
