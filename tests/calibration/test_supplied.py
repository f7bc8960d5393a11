"""Scales and ranges that a caller supplies: kept, saved, and what is derived follows."""

from __future__ import annotations

import copy
import logging
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from support.flow import small_images, small_model
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.calibration.observers import WeightObserver
from custom_quantizer.calibration.statistics import (
    activation_observers,
    merge_statistics,
    read_statistics,
    solved_qparams,
    statistics_of,
    weight_observers,
)
from custom_quantizer.core.bias import derived_scale
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import CalibrationError, InputError
from custom_quantizer.ops import QuantizedOp
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat


@cache
def _captured() -> GraphModule:
    return cast(GraphModule, torch.export.export(small_model(), (small_images(4),)).module())


def _prepared(name: str = "a8w4", calibrated: bool = True) -> GraphModule:
    quantizer = cq.IntegerQuantizer().set_global(name)
    prepared = cast(GraphModule, prepare_pt2e(copy.deepcopy(_captured()), quantizer))
    if calibrated:
        prepared(small_images(4))
    return prepared


def _ops(prepared: GraphModule) -> dict[str, QuantizedOp]:
    converted = convert_pt2e(prepared)
    return {op.node.name: op for op in read_converted(converted).integer}


def test_supplied_ranges_and_scales_are_those_of_the_converted_graph() -> None:
    prepared = _prepared(calibrated=False)
    ranges = {
        name: cq.QParams(2.0**-5 * (i + 1), i, -128, 127)
        for i, name in enumerate(o.name for o in activation_observers(prepared))
    }
    cq.set_ranges(prepared, ranges)
    prepared(small_images(4))  # frozen: nothing is recorded
    assert all(int(o.observer.count) == 0 for o in activation_observers(prepared))
    assert solved_qparams(prepared) == ranges
    scales = {
        name: torch.full_like(observer.scale(prepared.get_parameter(name)), 2.0**-4)
        for name, observer in weight_observers(prepared).items()
    }
    cq.set_weight_scales(prepared, scales)
    weights = {name: prepared.get_parameter(name).detach().clone() for name in scales}
    inputs = [o.observer.qparams() for o in activation_observers(prepared)]
    ops = _ops(prepared)
    layers = [op for op in ops.values() if op.weight is not None]
    assert len(layers) == 3
    for op, weight in zip(
        layers, (weights[n] for n in ("conv.weight", "wide.weight", "linear.weight")), strict=True
    ):
        assert op.inputs[0] in inputs
        assert op.weight_qparams is not None
        assert op.weight is not None
        assert torch.equal(
            cast(Tensor, op.weight_qparams.scale), torch.full((len(weight),), 2.0**-4)
        )
        assert torch.equal(op.weight, (weight / 2.0**-4).round().clamp(-7, 7).to(torch.int8))


def test_the_derived_bias_follows_the_supplied_scales() -> None:
    prepared = _prepared()
    bias = prepared.get_parameter("linear.bias").detach().clone()
    (name,) = (o.name for o in activation_observers(prepared) if "relu_1" in o.tensors)
    cq.set_ranges(prepared, {name: cq.QParams(0.0625, -128, -128, 127)})
    cq.set_weight_scales(prepared, {"linear.weight": torch.tensor([0.125, 0.25, 0.5])})
    op = _ops(prepared)["linear"]
    unit = derived_scale(0.0625, torch.tensor([0.125, 0.25, 0.5]))
    assert torch.equal(cast(Tensor, op.bias), (bias / unit).round().to(torch.int32))


def test_a_supplied_scale_is_still_raised_where_the_bias_would_not_fit() -> None:
    prepared = _prepared()
    cq.set_weight_scales(prepared, {"linear.weight": torch.full((3,), 1e-12)})
    op = _ops(prepared)["linear"]
    assert op.weight_qparams is not None
    assert float(cast(Tensor, op.weight_qparams.scale).min()) > 1e-12
    assert int(cast(Tensor, op.bias).abs().max()) <= 1 << 21


def test_a_scale_is_raised_alike_where_the_weight_is_computed_behind_the_bias() -> None:
    """A weight-standardized layer: its weight is folded to a constant that comes after the bias."""

    class Computed(torch.nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = torch.nn.functional.batch_norm(
                self.weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0
            )
            weight = 1e-6 * weight.reshape_as(self.weight)
            return torch.nn.functional.conv2d(x, weight, self.bias)

    torch.manual_seed(0)
    model, x = Computed(3, 8, 3).eval(), torch.randn(1, 3, 5, 5)
    captured = torch.export.export(model, (x,)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    (op,) = _ops(prepared).values()
    assert int(cast(Tensor, op.bias).abs().max()) == (1 << 21) - 1


def test_a_tensor_of_several_is_enough_and_unfreezing_goes_back() -> None:
    prepared = _prepared()
    before = solved_qparams(prepared)
    observed = next(o for o in activation_observers(prepared) if len(o.tensors) > 1)
    cq.set_ranges(prepared, {observed.tensors[0]: cq.QParams(0.5, 3, -128, 127)})
    assert solved_qparams(prepared)[observed.name] == cq.QParams(0.5, 3, -128, 127)
    cq.freeze_ranges(prepared, False)
    assert solved_qparams(prepared) == before
    cq.freeze_ranges(prepared)
    prepared(100 * small_images(4))
    assert solved_qparams(prepared) == before


WRONG = [
    ({"relu": cq.QParams(0.5, 0, -128, 127), "linear": (0.0, 1.0)}, "QParams, not tuple"),
    ({"relu_2": cq.QParams(0.5, 0, -128, 127)}, "relu_2 is no observed tensor"),
    ({"relu": cq.QParams(0.5, 0, -8, 7)}, r"integers are \[-128, 127\], not \[-8, 7\]"),
    ({"relu": cq.QParams(torch.ones(4), 0, -128, 127, 0)}, "one scale, not one per channel"),
    (
        {
            "relu": cq.QParams(0.5, 0, -128, 127),
            "max_pool2d": cq.QParams(0.25, 0, -128, 127),
        },
        "shares its range",
    ),
]


@pytest.mark.parametrize(("ranges", "message"), WRONG)
def test_ranges_that_do_not_fit_change_nothing(ranges: dict[str, cq.QParams], message: str) -> None:
    prepared = _prepared()
    good = {"x": cq.QParams(0.5, 0, -128, 127)}
    with pytest.raises(CalibrationError, match=message):
        cq.set_ranges(prepared, {**good, **ranges})
    assert not any(o.observer.frozen for o in activation_observers(prepared))


def test_symmetric_formats_have_no_zero_point() -> None:
    with pytest.raises(CalibrationError, match="its zero point is 0, not 5"):
        cq.set_ranges(_prepared("a8w8-symmetric"), {"x": cq.QParams(0.5, 5, -128, 127)})


def test_what_never_saw_data_is_not_frozen() -> None:
    prepared = _prepared(calibrated=False)
    with pytest.raises(CalibrationError, match="never saw data"):
        cq.freeze_ranges(prepared)
    assert not any(o.observer.frozen for o in activation_observers(prepared))


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("linear.wight", torch.ones(3), "linear.wight is no quantized weight.*linear.weight"),
        ("linear.weight", torch.ones(4), r"shape \(4,\), and its weight needs \(3,\)"),
        ("linear.weight", torch.tensor(1.0), "1 dimensions"),
        ("linear.weight", torch.ones(3).double(), "float64"),
        ("linear.weight", torch.tensor([1.0, 0.0, 1.0]), "smallest supplied is 0"),
        ("linear.weight", torch.tensor([1.0, torch.nan, 1.0]), "finite"),
    ],
)
def test_weight_scales_that_do_not_fit_change_nothing(
    name: str, scale: Tensor, message: str
) -> None:
    prepared = _prepared()
    with pytest.raises(CalibrationError, match=message):
        cq.set_weight_scales(prepared, {"conv.weight": torch.ones(4), name: scale})
    assert all(o.supplied_scale is None for o in weight_observers(prepared).values())


def test_scales_of_groups_are_those_that_the_backend_stores() -> None:
    weight = scheme("dyn8w4g32").weight
    observer = WeightObserver(weight, 0, "linear", dtype=torch.int8)
    observer.set_scale(torch.full((3, 2), 0.5))
    assert torch.equal(observer.scale(torch.randn(3, 64)), torch.full((3, 2), 0.5))
    with pytest.raises(CalibrationError, match="bfloat16"):
        observer.set_scale(torch.full((3, 2), 0.1))


def test_state_dicts_keep_them_and_their_absence() -> None:
    plain = _prepared().state_dict()
    prepared = _prepared()
    cq.freeze_ranges(prepared)
    cq.set_weight_scales(prepared, {"linear.weight": torch.tensor([0.5, 0.25, 0.125])})
    other = _prepared(calibrated=False)
    other.load_state_dict(prepared.state_dict())
    assert solved_qparams(other) == solved_qparams(prepared)
    assert all(o.observer.frozen for o in activation_observers(other))
    supplied = weight_observers(copy.deepcopy(other))["linear.weight"].supplied_scale
    assert supplied is not None
    assert supplied.tolist() == [0.5, 0.25, 0.125]
    other.load_state_dict(plain)
    assert not any(o.observer.frozen for o in activation_observers(other))
    assert weight_observers(other)["linear.weight"].supplied_scale is None


def test_statistics_files_keep_frozen_ranges(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = _prepared("a8w4-histogram")
    cq.save_statistics(prepared, tmp_path / "plain")
    assert read_statistics(tmp_path / "plain").frozen == ()
    ranges = {"x": cq.QParams(0.5, 7, -128, 127)}
    cq.set_ranges(prepared, ranges)
    cq.save_statistics(prepared, tmp_path / "frozen")
    assert read_statistics(tmp_path / "frozen") == statistics_of(prepared)
    other = _prepared("a8w8", calibrated=False)
    cq.load_statistics(other, tmp_path / "frozen")
    assert solved_qparams(other)["x"] == ranges["x"]
    cq.load_statistics(other, tmp_path / "plain")
    assert not any(o.observer.frozen for o in activation_observers(other))
    with caplog.at_level(logging.WARNING):
        narrow = _prepared("a4w4-histogram", calibrated=False)
        cq.load_statistics(narrow, tmp_path / "frozen")
    assert "1 of 1 frozen ranges are of other formats" in caplog.text
    assert not any(o.observer.frozen for o in activation_observers(narrow))
    with pytest.raises(CalibrationError, match="froze different ranges"):
        merge_statistics([tmp_path / "plain", tmp_path / "frozen"])
    merged = merge_statistics([tmp_path / "frozen", tmp_path / "frozen"])
    assert [kept.qparams for kept in merged.frozen] == [ranges["x"]]


def test_a_frozen_range_of_a_file_is_checked(tmp_path: Path) -> None:
    from custom_quantizer.core.tensor_file import write_tensors

    fields = {"scale": torch.tensor(-1.0), "zero_point": torch.tensor(0)}
    write_tensors(
        tmp_path / "f",
        {f"x/frozen:-8:7/{name}": value for name, value in fields.items()},
        {"custom_quantizer.statistics": "3"},
    )
    with pytest.raises(InputError, match=r"x/frozen:-8:7: .*positive"):
        read_statistics(tmp_path / "f")


@pytest.mark.parametrize("name", ["a8w4", "a8w4-lsq"])
def test_training_keeps_frozen_ranges_and_starts_at_supplied_scales(name: str) -> None:
    quantizer = cq.IntegerQuantizer().set_global(name)
    prepared = cast(GraphModule, prepare_qat_pt2e(copy.deepcopy(_captured()), quantizer))
    cq.set_ranges(
        prepared, {o.name: cq.QParams(0.25, 0, -128, 127) for o in activation_observers(prepared)}
    )
    supplied = torch.tensor([0.0625, 0.125, 0.03125]) / 8
    cq.set_weight_scales(prepared, {"linear.weight": supplied})
    qat.training_mode(prepared)
    weight = prepared.get_parameter("linear.weight")
    prepared(small_images(4)).square().sum().backward()
    observer = weight_observers(prepared)["linear.weight"]
    assert torch.equal(cast(Tensor, observer.step_scale), supplied)  # type: ignore[attr-defined]
    clipped = (weight.detach() / supplied[:, None]).round().abs() > 7
    assert clipped.any()
    assert weight.grad is not None
    assert bool((weight.grad[clipped] == 0).all())
    assert bool((weight.grad[~clipped] != 0).any())
    assert {q.scale for q in solved_qparams(prepared).values()} == {0.25}
    qat.evaluation_mode(prepared)
    converted = convert_pt2e(prepared)
    op = next(op for op in read_converted(converted).integer if op.node.name == "linear")
    assert torch.equal(cast(Tensor, cast(cq.QParams, op.weight_qparams).scale), supplied)
    assert op.inputs[0].scale == 0.25
