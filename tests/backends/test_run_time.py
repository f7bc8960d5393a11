"""Activations that are quantized at run time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.graphs import OUTSIDE, outside
from support.models import convert
from support.run_time import Layers, inputs_of
from support.selection import slow_but
from torch import Tensor, nn
from torch.export import Dim

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import kernels, run_time
from custom_quantizer.backends.xnnpack.checks import run_time_layers
from custom_quantizer.core.rows import RowIntegers, quantize_rows
from custom_quantizer.reference.converted import read_converted


class Images(nn.Module):
    """Convolutions of all kinds: dense, depthwise, over one dim, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wider = nn.Conv2d(8, 16, 2, 2)
        self.mix = nn.Conv2d(16, 15, 1)
        self.back = nn.Conv2d(15, 16, 1)
        self.signal = nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = self.back(self.mix(torch.relu(self.wider(x))))
        return self.head(torch.relu(self.signal(x.flatten(2))).mean(2))


@pytest.mark.parametrize(("scheme", "decibels"), [("dyn8w8", 35.0), ("dyn8w4", 15.0)])
def test_dense_convolutions_and_linear_layers_in_one_delegate(scheme: str, decibels: float) -> None:
    torch.manual_seed(0)
    model = Images().eval()
    x = torch.randn(3, 3, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).reshape(3, 1, 1, 1)
    converted = convert(model, (x,), scheme)
    plan, program = converted.plan, cq.lower(converted.graph, (x,))
    assert program.report.delegates == 1
    assert program.report.outside == ()
    run = {op.node: op.backend for op in program.report.ops}
    packed = kernels.PACKED_INT4 if scheme == "dyn8w4" else kernels.DYNAMIC_INT8
    layers = {"conv2d": kernels.DYNAMIC_INT8, "conv2d_2": kernels.DYNAMIC_INT8}
    layers |= {"conv2d_3": packed, "conv2d_4": kernels.DYNAMIC_INT8, "linear": packed}
    assert {node: run[node] for node in layers} == layers
    assert {node: plan.op(node).backend for node in layers} == {
        node: kernel.label for node, kernel in layers.items()
    }
    assert run["conv2d_1"] is kernels.FLOAT
    assert "without groups" in plan.op("conv2d_1").reason
    want, got = model(x), program.run(x)
    for image in range(3):  # each has a scale of its own
        noise = (got[image] - want[image]).norm() / want[image].norm()
        assert -20 * float(torch.log10(noise)) > decibels


class Gated(nn.Module):
    """Two layers that read one tensor, as in the feed-forward part of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x) * x
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + x


def test_layers_that_share_an_input_are_one_delegate() -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 5, 8)
    program = cq.lower(convert(model, (x,), "dyn8w8").graph, (x,))
    assert program.report.delegates == 1
    noise = (program.run(x) - model(x)).norm() / model(x).norm()
    assert float(noise) < 0.02


class GroupedQueries(nn.Module):
    """Attention whose heads share keys in pairs, as language models repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(1, 6, 4, 8).transpose(1, 2)
        k = self.k(x).view(1, 6, 2, 1, 8).transpose(1, 2).expand(1, 2, 6, 2, 8)
        return torch.softmax(q @ k.transpose(2, 3).reshape(1, 4, 6, 8).transpose(2, 3), -1)


def test_keys_that_are_repeated_in_float_are_one_delegate() -> None:
    torch.manual_seed(0)
    model, x = GroupedQueries().eval(), torch.randn(1, 6, 32)
    program = cq.lower(convert(model, (x,), "dyn8w8").graph, (x,))
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert float((program.run(x) - model(x)).norm() / model(x).norm()) < 0.02


class Orders(nn.Module):
    """Layers that read images in the order of the model, and rows of images that lie otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.image = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.rows, self.last, self.other = nn.Linear(6, 6), nn.Linear(4, 4), nn.Conv2d(4, 8, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        image = self.stem(x)
        behind = self.rows(image)
        last = self.last(image.permute(0, 2, 3, 1))
        of_rows = self.image(self.rows(x) + behind)
        moved = self.image(
            nn.functional.pixel_shuffle(self.other(last.permute(0, 3, 1, 2)), 2)[:, :2].repeat(
                1, 2, 1, 1
            )
        )
        return behind, of_rows, moved, self.image(y.flatten(0, 1)), y * 2.0, self.rows(y)


@pytest.mark.parametrize("mixed", slow_but([True], [False, True]))
def test_layers_read_images_in_any_order(mixed: bool) -> None:
    """Copies between the orders of images belong in float, before the scales are chosen."""
    torch.manual_seed(0)
    model, example = Orders().eval(), (torch.randn(1, 4, 5, 6), torch.randn(1, 2, 4, 5, 6))
    quantizer = cq.IntegerQuantizer().set_global("dyn8w8")
    if mixed:  # integers with a scale from data become images whose scale is chosen again
        quantizer.set_operator_type(torch.ops.aten.add.Tensor, "a8w8").set_module_name(
            "rows", "a8w8"
        )
    program = cq.lower(convert(model, example, quantizer).graph, example)
    assert (program.report.delegates, program.report.outside) == (1, ())
    for want, got in zip(model(*example), program.run(*example), strict=True):
        assert float((got - want).norm() / want.norm()) < 0.02


class Crossing(nn.Module):
    """An image that one delegate makes, and views and a convolution read beside what lies outside.

    It is read as it is, or as what is computed of it.
    """

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.read = read

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        image = self.first(x)
        beside = outside(image)
        read = self.read(image)
        rows = read.flatten(2) * 2.0 + beside.flatten(2)
        return rows, self.second(read) + beside, self.second(image + beside)


@pytest.mark.parametrize(
    "read", [lambda image: image, torch.relu, lambda image: torch.sigmoid(image) * image]
)
def test_images_that_cross_between_delegates_keep_their_order(
    read: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Crossing(read).eval(), torch.randn(2, 4, 5, 6)
    program = cq.lower(convert(model, (x,), "dyn8w8").graph, (x,))
    assert (program.report.delegates, program.report.outside) == (2, (OUTSIDE,))
    for want, got in zip(model(x), program.run(x), strict=True):
        assert float((got - want).norm() / want.norm()) < 0.02


# ---------------------------------------------------------------------------------------------
# Bit for bit
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4", "dyn8w8-per_tensor", "dyn8w3"])
def test_each_layer_is_computed_bit_for_bit(scheme: str) -> None:
    torch.manual_seed(0)
    model = Layers(grouped=False)
    rows = Dim("rows", min=1, max=9)
    example = inputs_of(model, 8, 0)
    shapes = {"dynamic_shapes": {"inputs": tuple({0: rows} for _ in example)}}
    graph = convert(model, example, scheme, **shapes).graph
    program = cq.lower(graph, example)
    assert {row.backend for row in program.report.ops} <= {
        kernels.DYNAMIC_INT8,
        kernels.PACKED_INT4,
        kernels.FOLDED,
    }
    reference = cq.integer_reference(graph)
    for seed, size in enumerate((8, 9, 6)):
        inputs = inputs_of(model, size, seed)
        for i, (want, got) in enumerate(zip(reference(*inputs), program.run(*inputs), strict=True)):
            assert torch.equal(want, got), model.layers[i]
    checked = cq.verify(graph, program, [inputs_of(model, 8, 5)])
    assert checked.bit_exact
    assert checked.exact_expected
    assert checked.inexact_ops == ()
    assert all(output.bound == 0.0 for output in checked.outputs)


@pytest.mark.parametrize("scheme", slow_but(["dyn8w4g32"], ["dyn8w4g32", "dyn8w3g64"]))
def test_weights_in_groups_are_within_what_is_derived(scheme: str) -> None:
    torch.manual_seed(0)
    model = Layers(grouped=True)
    example = inputs_of(model, 8, 0)
    graph = convert(model, example, scheme).graph
    program = cq.lower(graph, example)
    for layer in run_time_layers(read_converted(graph), inputs_of(model, 8, 1)):
        assert layer.beyond == 0, layer
        assert not layer.exact
    checked = cq.verify(graph, program, [example])
    assert len(checked.layers) == 2
    assert checked.first is None
    assert all("groups of weights are summed in float" in op for op in checked.inexact_ops)
    # The bound says something: a change of one unit of one weight is beyond it.
    (op, _) = (op.run_time for op in read_converted(graph).floating if op.run_time is not None)
    x = example[0][6:]
    broken = replace(op, weight=op.weight.clone())
    broken.weight[0, 0] += 1
    off = (run_time.compute(op, x) - run_time.compute(broken, x)).abs()
    assert bool((off[:, 0] > run_time.error(op, x)[:, 0]).all())


def test_kernels_that_close_in_another_order_are_within_the_bound() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(48, 64), torch.randn(100, 48)
    graph = convert(model, (x,), "dyn8w8").graph
    (op,) = (op.run_time for op in read_converted(graph).floating)
    rows = quantize_rows(x, (-1,))
    acc = nn.functional.linear(rows.offsets, op.weight.float())
    unfused = acc * rows.scale * op.weight_scale + model.bias
    want, bound = run_time.compute(op, x), run_time.error(op, x)
    assert not torch.equal(unfused, want)
    assert bool(((unfused.double() - want.double()).abs() <= bound).all())
    scales_first = acc * (op.weight_scale * rows.scale) + model.bias
    assert bool(((scales_first.double() - want.double()).abs() <= bound).all())
    assert bool((bound <= 6 * 2.0**-24 * (want.abs() + op.bias.abs())).all())


def test_images_rows_and_pixels_that_read_one_tensor() -> None:
    """A layer over rows, a convolution and a pointwise one choose scales of their own."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.image, self.pixels = (
                nn.Linear(6, 6),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Conv2d(4, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.image(x) + self.pixels(x) + self.rows(x)

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(2, 4, 5, 6)
    done = convert(model, (x,), "dyn8w8")
    notes = [done.plan.op(node).note for node in ("conv2d", "conv2d_1", "linear")]
    assert [note.split(", ")[-1] for note in notes] == [
        "image by image",
        "pixel by pixel",
        "row by row",
    ]
    program = cq.lower(done.graph, (x,))
    checked = cq.verify(done.graph, program, [(torch.randn(2, 4, 5, 6),) for _ in range(3)])
    assert checked.bit_exact
    assert checked.exact_expected


def test_convolutions_with_unequal_padding() -> None:
    """Zeros of a pad change no scale: one that stands before the quantization is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, (2, 4), padding="same", bias=False),
        nn.Conv2d(6, 3, (4, 3), padding="same", dilation=(1, 2), bias=False),
    )
    example = (torch.randn(2, 4, 6, 7) + 3.0,)
    graph = convert(model, example, "dyn8w8").graph
    program = cq.lower(graph, example)
    assert program.report.passes["pad_images"] == 2
    assert (program.report.delegates, program.report.outside) == (1, ())
    assert cq.verify(graph, program, [(torch.randn(2, 4, 6, 7) - 1.0,)]).bit_exact


def test_layers_between_float_ops_follow_from_their_inputs() -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 5, 8)
    graph = convert(model, (x,), "dyn8w8").graph
    checked = cq.verify(graph, cq.lower(graph, (x,)), [x])
    assert not checked.exact_expected
    assert [(layer.mismatches, layer.exact) for layer in checked.layers] == [(0, True)] * 3
    assert "3 of 3 equal" in str(checked)
    assert {op.split(":")[0] for op in checked.inexact_ops} == {"silu"}


@pytest.mark.parametrize("what", ["weight", "weight scale", "bias"])
def test_a_constant_that_is_not_the_graphs_is_named(what: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    graph = convert(model, (x,), "dyn8w8").graph
    program = cq.lower(graph, (x,))
    last = [op.run_time for op in read_converted(graph).floating if op.run_time][-1]
    dequantize = last.match.weight
    node = {
        "weight": dequantize.args[0],
        "weight scale": dequantize.args[1],
        "bias": last.match.bias,
    }[what]
    with torch.no_grad():
        constant = operator.attrgetter(node.target)(graph)
        flat = constant.view(-1)
        flat[1] = flat[1] - 1 if what == "weight" else flat[1] * 1.0000002
    checked = cq.verify(graph, program, [(x,)])
    assert checked.first is not None
    assert (checked.first.node, checked.first.what) == ("linear_1", what)
    assert not checked.constants_equal


def test_a_row_without_a_scale_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    reference = cq.integer_reference(convert(nn.Linear(8, 4), (x,), "dyn8w8").graph)
    x[2, 1] = torch.inf
    with pytest.raises(cq.InputError, match=r"the input of linear: 1 of 3 rows hold NaN"):
        reference(x)


def test_convolutions_of_one_channel_stay_in_float() -> None:
    """The partitioner would leave their quantization outside."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 5, 3))
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 1, 6, 7)
    done = convert(model, (x,), "dyn8w8")
    assert "of one input channel for a depthwise one" in done.plan.op("conv2d").reason
    assert cq.lower(done.graph, (x,)).report.outside == ()


def test_evaluation_is_that_of_the_device() -> None:
    """Whatever the batches, and PyTorch's own call of the graph is another."""
    torch.manual_seed(0)
    model, x = nn.Linear(16, 5).eval(), torch.randn(40, 16)
    x[::2] *= 300.0
    rows = Dim("rows", max=40)
    graph = convert(model, (x,), "dyn8w8", dynamic_shapes=({0: rows},)).graph
    program = cq.lower(graph, (x,))
    for batches in ([x], list(x.split(1)), list(x.split(7))):
        found = cq.evaluate({"graph": graph, "program": program.run}, batches)
        assert found["program"].agreement == 1.0
        assert "graph: scales chosen at run time are those of the device" in found.notes[0]
    assert (
        cq.evaluate({"program": program.run, "graph": lambda v: graph(v)}, [x])["graph"].agreement
        < 1.0
    )


@pytest.mark.parametrize("scheme", ["dyn8w8", "a16w8"])
def test_activations_in_a_row(scheme: str) -> None:
    """ExecuTorch fuses both into the op before them, and would keep the limits of the last."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 32), nn.Linear(8, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            a = torch.relu(self.first(x)).clamp(-0.5, 0.3)
            b = torch.relu((x * 3.0).clamp(-0.7, 0.9)).clamp(max=0.6)
            c = nn.functional.hardtanh(self.second(x), -0.2, 0.2).clamp(0.3, 0.4)
            return a, b, c

    torch.manual_seed(0)
    model, x = Clamped(), torch.randn(5, 8)
    graph = convert(model, (x,), scheme).graph
    program = cq.lower(graph, (x,))
    checked = cq.verify(graph, program, [(x,)])
    assert checked.bit_exact or scheme == "a16w8"
    for want, got in zip(model(x), program.run(x), strict=True):
        assert float((got - want).abs().max()) < 0.02


def test_lower_names_a_layer_that_is_off_by_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a float op no output is promised, and each layer is."""
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(2, 5, 8)
    graph = convert(model, (x,), "dyn8w8").graph
    right = run_time.quantize_rows

    def off(x: Tensor, dims: tuple[int, ...]) -> RowIntegers:
        rows = right(x, dims)
        return replace(rows, offsets=rows.offsets + 1.0)

    monkeypatch.setattr(run_time, "quantize_rows", off)
    with pytest.raises(cq.VerificationError, match=r"values of linear \(gate\) do not follow"):
        cq.lower(graph, (x,))
