"""``verify``: equal programs pass, broken ones are caught and the op is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.models import Converted, convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import passes
from custom_quantizer.core.graph import is_quantize

SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.stem(x) * 4)
        z = F.hardtanh(self.body(y), -0.4, 0.5)
        return self.head((z + y).mean((2, 3)))


@pytest.fixture(scope="module")
def converted() -> Converted:
    torch.manual_seed(0)
    return convert(Net(), (torch.randn(SHAPE),))


def test_an_honest_program_is_bit_exact(converted: Converted) -> None:
    lowered = cq.lower(converted.graph, converted.example)
    batches = [(torch.randn(SHAPE) * scale,) for scale in (0.1, 1, 30)]
    checked = cq.verify(converted.graph, lowered, batches, float_model=Net())
    assert checked.bit_exact
    assert checked.exact_expected
    assert checked.first is None
    (output,) = checked.outputs
    assert (output.values, output.mismatches, output.max_lsb) == (60, 0, 0)
    document = json.loads(checked.to_json())
    assert document["bit_exact"] is True
    # No error against itself: an infinite ratio, which JSON does not have.
    assert (output.sqnr_graph == math.inf) == (output.graph_mismatches == 0)
    (record,) = document["outputs"]
    assert record["sqnr_graph"] == (None if output.graph_mismatches == 0 else output.sqnr_graph)
    assert "bit-exact: yes" in str(checked)


def _bias_off_by_one(model: GraphModule) -> None:
    folded = [buffer for name, buffer in model.named_buffers() if name.endswith("_folded")]
    folded[1][2] *= 1.01


def _dropped_clamp(model: GraphModule) -> None:
    for node in list(model.graph.nodes):
        if node.target is torch.ops.aten.hardtanh.default and node.args[1] == -0.4:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def _wrong_weight(model: GraphModule) -> None:
    name, stored = next((n, b) for n, b in model.named_buffers() if b.shape == (8, 3, 3, 3))
    weight = stored.clone()  # the program has the tensor itself
    weight[1, 2, 0, 0] ^= 1
    setattr(model, name, weight)


def _doubled_scale(model: GraphModule) -> None:
    """A requantization shifted by one: the scale of one tensor is doubled wherever it occurs."""
    (linear,) = (n for n in model.graph.nodes if n.target is torch.ops.aten.linear.default)
    (quantize,) = linear.users
    scale = quantize.args[1]
    for node in model.graph.nodes:
        if len(node.args) > 1 and node.args[1] == scale:
            node.args = (node.args[0], 2 * scale, *node.args[2:])


def _swapped_op(model: GraphModule) -> None:
    for node in model.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            node.target = torch.ops.aten.sub.Tensor


@contextmanager
def sabotaged(sabotage: Callable[[GraphModule], None]) -> Iterator[None]:
    """Lowering whose last pass also breaks something."""
    honest = passes.PASSES
    last = honest[-1]

    def run(model: GraphModule) -> int:
        changed = last.run(model)
        sabotage(model)
        return changed

    passes.PASSES = (*honest[:-1], dataclasses.replace(last, run=run))
    try:
        yield
    finally:
        passes.PASSES = honest


CASES = [
    (_bias_off_by_one, "conv2d_1", "body", "bias"),
    (_dropped_clamp, "conv2d_1", "body", "clamp"),
    (_wrong_weight, "conv2d", "stem", "weight"),
    (_doubled_scale, "linear", "head", "output scale"),
]


@pytest.mark.parametrize(("sabotage", "node", "path", "what"), slow_but(CASES[:1], CASES))
def test_a_broken_program_is_caught_and_the_op_named(
    converted: Converted,
    sabotage: Callable[[GraphModule], None],
    node: str,
    path: str,
    what: str,
) -> None:
    with sabotaged(sabotage):
        # That lowering itself complains is tested in tests/backends/test_lowering_checks.py.
        broken = cq.lower(converted.graph, converted.example, check=False)
    checked = cq.verify(converted.graph, broken, converted.example)
    assert not checked.bit_exact
    assert checked.first is not None
    assert (checked.first.node, checked.first.path) == (node, path)
    assert checked.first.what == what
    assert "bit-exact: NO" in str(checked)


def test_a_wrong_computation_is_found_by_taking_the_graph_apart(converted: Converted) -> None:
    # All constants are right, so only comparing tensors can tell which op is wrong.
    with sabotaged(_swapped_op):
        broken = cq.lower(converted.graph, converted.example, check=False)
        with pytest.raises(cq.VerificationError, match="differ from the integer reference"):
            cq.lower(converted.graph, converted.example)
        checked = cq.verify(converted.graph, broken, converted.example)
    assert checked.constants_equal
    assert not checked.bit_exact
    assert checked.first is not None
    assert checked.first.node == "add"
    assert checked.first.what == "output"


def test_no_inputs_is_an_error(converted: Converted) -> None:
    lowered = cq.lower(converted.graph, converted.example)
    with pytest.raises(cq.InputError, match="no inputs to verify on"):
        cq.verify(converted.graph, lowered, [])
    with pytest.raises(cq.InputError, match="an iterable of them, not int"):
        cq.verify(converted.graph, lowered, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", slow_but(["a12w8"], ["a16w8", "a16w4", "a12w8"]))
def test_emulated_int16_is_within_one_unit(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(16, 24, 3, padding=1)
    example = (torch.randn(2, 16, 12, 12),)
    wide = convert(model, example, scheme)
    lowered = cq.lower(wide.graph, example)
    batches = [(torch.randn(2, 16, 12, 12),) for _ in range(4)]
    checked = cq.verify(wide.graph, lowered, batches)
    assert checked.constants_equal
    (output,) = checked.outputs
    assert output.values == 4 * 2 * 24 * 144
    assert output.max_lsb is not None
    assert output.max_lsb <= 1
    assert checked.inexact_ops
    assert "emulated in float" in checked.inexact_ops[0]


def _wider_second_layer(model: GraphModule) -> None:
    layers = [n for n in model.graph.nodes if n.target is torch.ops.aten.linear.default]
    name = str(layers[1].args[1].target)
    setattr(model, name, model.get_buffer(name) * 1.001)


@pytest.mark.slow
def test_units_of_emulated_ops_that_add_up_are_told_from_a_wrong_op() -> None:
    torch.manual_seed(0)
    example = (torch.randn(16, 256),)
    wide = convert(nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), example, "a16w8")
    checked = cq.verify(wide.graph, cq.lower(wide.graph, example), [example])
    assert not checked.bit_exact
    assert checked.first is None
    assert checked.tensors is not None
    assert (checked.tensors.tensors, checked.tensors.units, checked.tensors.first) == (5, 1, None)
    assert str(checked.tensors) in str(checked)
    assert json.loads(checked.to_json())["tensors"]["units"] == 1
    with sabotaged(_wider_second_layer):
        broken = cq.lower(wide.graph, example, check=False)
        checked = cq.verify(wide.graph, broken, [example])
    assert checked.first is not None
    assert (checked.first.node, checked.first.path) == ("linear_1", "1")


def test_reference_records_integers(converted: Converted) -> None:
    reference = cq.integer_reference(converted.graph)
    outputs, integers = reference.with_integers(*converted.example)
    assert torch.equal(outputs, reference(*converted.example))
    quantized = [n for n in converted.graph.graph.nodes if is_quantize(n)]
    names = {n.args[0].name for n in quantized if n.args[0].op != "get_attr"}
    assert names <= set(integers)
    for name, values in integers.items():
        assert not values.dtype.is_floating_point, name
        assert int(values.min()) >= -128
        assert int(values.max()) <= 127


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(cq.InputError, match="got bytes; pass what custom_quantizer"):
        cq.verify(nn.Module(), b"a file", [])  # type: ignore[arg-type]
