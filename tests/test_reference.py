"""The integer reference in its three modes, over every op of the registry."""

from __future__ import annotations

import pytest
import torch
from support.models import Converted, convert, randomize_batch_norms
from support.registry import Surrounded
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.ops import REGISTRY, Case, OpRule

MODES = ("xnnpack", "fixed_point", "exact")
CASES = [
    pytest.param(rule, case, id=f"{rule.family}-{case.name}")
    for rule in REGISTRY
    for case in rule.cases
    if not rule.float_reason
]


def converted_case(rule: OpRule, case: Case, scheme: str) -> Converted:
    torch.manual_seed(0)
    model = randomize_batch_norms(Surrounded(rule, case)).eval()
    example = tuple(torch.randn(shape) for shape in case.shapes)
    return convert(model, example, scheme)


def integers_of(converted: Converted, mode: str, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    reference = cq.integer_reference(converted.graph, mode)
    assert not reference.float_ops
    _, integers = reference.with_integers(*inputs)
    return integers


@pytest.mark.parametrize("scheme", ["a8w8", "a8w4-per_tensor", "a16w8"])
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_fixed_point_is_within_one_unit_of_exact(rule: OpRule, case: Case, scheme: str) -> None:
    converted = converted_case(rule, case, scheme)
    generator = torch.Generator().manual_seed(1)
    for amplitude in (0.3, 1.0, 20.0):
        inputs = tuple(torch.randn(shape, generator=generator) * amplitude for shape in case.shapes)
        fixed = integers_of(converted, "fixed_point", inputs)
        exact = integers_of(converted, "exact", inputs)
        assert fixed.keys() == exact.keys()
        # An op whose inputs already differ by a unit may differ by more; the first never does.
        for name, values in fixed.items():
            difference = int((values.long() - exact[name].long()).abs().max())
            inputs_equal = _inputs_equal(converted, name, fixed, exact)
            assert difference <= 1 or not inputs_equal, name


def _inputs_equal(
    converted: Converted, name: str, a: dict[str, Tensor], b: dict[str, Tensor]
) -> bool:
    """Whether all quantized tensors before ``name`` in the graph are the same in both runs."""
    order = [node.name for node in converted.graph.graph.nodes]
    earlier = [key for key in a if order.index(key) < order.index(name)]
    return all(torch.equal(a[key], b[key]) for key in earlier)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_only_integers_between_quantize_and_dequantize(rule: OpRule, case: Case, mode: str) -> None:
    converted = converted_case(rule, case, "a8w8")
    for name, values in integers_of(converted, mode, converted.example).items():
        assert not values.dtype.is_floating_point, name
        assert int(values.min()) >= -128
        assert int(values.max()) <= 127


def test_fixed_point_sees_only_integer_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the borders no op of the reference is handed a floating-point tensor."""
    import custom_quantizer.integer.reference as reference

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    )
    example = (torch.randn(2, 3, 8, 8),)
    converted = convert(model, example)
    seen: list[str] = []
    compute = reference.IntegerReference._compute

    def spy(self, op, values):  # type: ignore[no-untyped-def]
        result = compute(self, op, values)
        given = [reference._integers(values[source]) for source in op.binding.inputs]
        seen.extend(str(tensor.dtype) for tensor in (*given, result))
        return result

    monkeypatch.setattr(reference.IntegerReference, "_compute", spy)
    cq.integer_reference(converted.graph, "fixed_point")(*example)
    assert set(seen) == {"torch.int32"}
    assert len(seen) == 8


def test_float_ops_are_listed_and_run() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.erf(self.a(x)))

    torch.manual_seed(0)
    example = (torch.randn(1, 3, 4, 4),)
    converted = convert(Net(), example)
    reference = cq.integer_reference(converted.graph)
    assert [op.node.name for op in reference.float_ops] == ["erf"]
    assert "no integer form" in reference.float_ops[0].reason
    step = (reference(*example) - converted.graph(*example)).abs().max()
    scale = next(
        n.args[1] for n in reversed(converted.graph.graph.nodes) if n.op == "call_function"
    )
    assert float(step) <= scale * 1.001


def test_wrong_graphs_and_modes() -> None:
    model = nn.Conv2d(3, 4, 1)
    example = (torch.randn(1, 3, 4, 4),)
    captured = torch.export.export(model.eval(), example).module()
    with pytest.raises(cq.ConversionError, match="no quantized tensor"):
        cq.integer_reference(captured)
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    with pytest.raises(cq.ConversionError, match="still has observers"):
        cq.integer_reference(prepared)
    converted = convert(model, example)
    with pytest.raises(cq.SchemeError, match="fixed_point"):
        cq.integer_reference(converted.graph, "fixed")
    with pytest.raises(cq.InputError, match="takes 1 input"):
        cq.integer_reference(converted.graph)(*example, *example)
