"""Tensors that are joined: one scale, or one for each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.calibration.joins import COARSER, share_scales
from custom_quantizer.calibration.statistics import (
    freeze_ranges,
    load_statistics,
    save_statistics,
    solved_qparams,
    statistics_of,
)
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.graph import is_dequantize, is_quantize, qparams_of
from custom_quantizer.errors import CalibrationError, ConfigError


class Skip(nn.Module):
    """What a U-Net does: a tensor is read by the next layer, and joined to what comes of it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.factor = factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        y = self.second(x)
        return self.head(torch.cat([x, y * self.factor], 1)), y


class Chain(nn.Module):
    """Blocks that each join what they were given to what they make of it, as in a CSP network."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 1) for i in range(len(factors)))
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        for layer, factor in zip(self.layers, self.factors, strict=True):
            x = torch.cat([x, layer(x) * factor], 1)
        return x


DATA = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EXAMPLE = (DATA[0],)


def prepared(model: nn.Module, scheme: str = "a8w8", data: Tensor = DATA, **rules: Any) -> Any:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    for name, other in rules.items():
        quantizer.set_module_name(name, other)
    graph = prepare_pt2e(torch.export.export(model.eval(), EXAMPLE).module(), quantizer)
    for batch in data:
        graph(batch)
    return graph


def skip(factor: float) -> Skip:
    torch.manual_seed(0)
    return Skip(factor)


def scales_of_join(converted: GraphModule) -> tuple[list[QParams], QParams, list[Node]]:
    """Of each part and of the result; and the requantized parts."""
    (join,) = (n for n in converted.graph.nodes if n.target is torch.ops.aten.cat.default)
    parts = join.args[0]
    (result,) = join.users
    again = [p for p in parts if is_quantize(p.args[0]) and is_dequantize(p.args[0].args[0])]
    return [qparams_of(converted, part) for part in parts], qparams_of(converted, result), again


def sqnr(expected: Tensor, got: Tensor) -> float:
    error = (expected - got).square().sum()
    return float(10 * torch.log10(expected.square().sum() / error))


@pytest.mark.parametrize(
    ("factor", "scheme"),
    [
        (1.0, "a8w8"),
        (2.0, "a8w8-percentile99.9"),
        (2.0, "a8w8-moving_average"),
        (40.0, "a8w8"),
        (40.0, "a4w8"),
        (40.0, "a8w8-moving_average"),
    ],
)
def test_a_part_keeps_its_scale_where_that_of_the_join_is_much_coarser(
    factor: float, scheme: str
) -> None:
    graph = prepared(skip(factor), scheme)
    converted = convert_pt2e(graph)
    parts, result, again = scales_of_join(converted)
    assert parts == [result, result]
    kept = factor > COARSER
    assert len(again) == kept
    if kept:
        own = qparams_of(converted, again[0].args[0].args[0])  # type: ignore[arg-type]
        assert own.scale * COARSER < result.scale  # type: ignore[operator]
        assert own.zero_point == own.quant_min  # of a relu
    lowered = cq.lower(converted, EXAMPLE)
    reference = cq.integer_reference(converted)
    for batch in DATA:
        for got, expected in zip(lowered.run(batch), reference(batch), strict=True):
            assert torch.equal(got, expected)


def test_the_other_readers_of_a_part_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skip(40.0)
    found = []
    for coarser in (1e9, COARSER):  # the first is one scale for all
        monkeypatch.setattr("custom_quantizer.calibration.joins.COARSER", coarser)
        converted = convert_pt2e(prepared(model))
        wanted, got = (
            [torch.cat(x) for x in zip(*map(f, DATA), strict=True)] for f in (model, converted)
        )
        found.append([sqnr(a, b) for a, b in zip(wanted, got, strict=True)])
    (joined_before, read_before), (joined, read) = found
    assert read > read_before + 12
    assert joined > joined_before - 1.0


def test_two_joins_of_one_scale_read_one_requantized_part() -> None:
    class Twice(Skip):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x).relu()
            y = self.second(x) * 40.0
            far = torch.cat([x, y], 1)
            return self.head(far), torch.cat([far, x], 1)

    torch.manual_seed(0)
    converted = convert_pt2e(prepared(Twice(1.0)))
    joins = [n for n in converted.graph.nodes if n.target is torch.ops.aten.cat.default]
    parts = joins[0].args[0][0], joins[1].args[0][1]  # type: ignore[index]
    assert parts[0].args[0] is parts[1].args[0]  # type: ignore[union-attr]


def test_scales_do_not_creep_from_join_to_join() -> None:
    """The near join has nearly twice the scale of a part, and the far one that of the near one."""

    class Creep(Skip):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x).relu()
            y = self.second(x)
            return self.head(torch.cat([x, y * 4.0], 1)), torch.cat([x, y * 1.5], 1)

    torch.manual_seed(0)
    graph = prepared(Creep(1.0))
    own, near, far = (
        solved_qparams(graph)[name].scale for name in ("relu", "cat_1+mul_1", "cat+mul")
    )
    assert own < near < COARSER * own < far < COARSER * near  # type: ignore[operator]
    share_scales(graph)
    assert solved_qparams(graph)["cat_1+mul_1+relu"].scale == near
    assert solved_qparams(graph)["cat+mul"].scale == far


def test_what_is_read_by_joins_alone_has_their_scale() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x) * 100.0], 1)

    graph = prepared(Branches())
    names = [sorted(e.tensors) for e in statistics_of(graph).entries]
    assert ["cat", "conv2d", "conv2d_1"] in names
    parts, result, again = scales_of_join(convert_pt2e(graph))
    assert parts == [result, result]
    assert not again


def test_a_join_that_is_joined_is_compared_with_the_last() -> None:
    """Each is near the next, the first is not near the last: it is requantized once."""
    torch.manual_seed(0)
    model = Chain(6.0, 6.0, 6.0)
    converted = convert_pt2e(prepared(model))
    joins = [n for n in converted.graph.nodes if n.target is torch.ops.aten.cat.default]
    for join in joins:
        (result,) = join.users
        assert {qparams_of(converted, part) for part in join.args[0]} == {
            qparams_of(converted, result)
        }
    lowered = cq.lower(converted, EXAMPLE)
    assert torch.equal(lowered.run(*EXAMPLE), cq.integer_reference(converted)(*EXAMPLE))


def test_a_part_of_two_joins() -> None:
    class Two(Skip):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x).relu()
            y = self.second(x)
            return self.head(torch.cat([x, y], 1)), torch.cat([x, y * 60.0], 1)

    torch.manual_seed(0)
    converted = convert_pt2e(prepared(Two(1.0)))
    near, far = (n for n in converted.graph.nodes if n.target is torch.ops.aten.cat.default)
    scales = [qparams_of(converted, next(iter(join.users))).scale for join in (near, far)]
    assert scales[0] * COARSER < scales[1]
    lowered = cq.lower(converted, EXAMPLE)
    for got, expected in zip(
        lowered.run(*EXAMPLE), cq.integer_reference(converted)(*EXAMPLE), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_statistics_are_loaded_before_and_after_scales_are_shared(
    factor: float, tmp_path: Path
) -> None:
    model = skip(factor)
    graph = prepared(model)
    expected = convert_pt2e(copy.deepcopy(graph))(*EXAMPLE)
    for name in ("apart", "shared"):
        save_statistics(graph, tmp_path / name)
        loaded = prepared(model, data=DATA[:0])
        load_statistics(loaded, tmp_path / name)
        for got, wanted in zip(convert_pt2e(loaded)(*EXAMPLE), expected, strict=True):
            assert torch.equal(got, wanted)
        share_scales(graph)
    together = {len(entry.tensors) for entry in statistics_of(graph).entries}
    assert (3 in together) == (factor == 1.0)
    if factor == 1.0:  # what has another format here has a scale of its own for certain
        with pytest.raises(CalibrationError, match="recorded together with"):
            load_statistics(prepared(model, data=DATA[:0], second="a16w8"), tmp_path / "shared")


def test_supplied_and_frozen_ranges_stay() -> None:
    graph = prepared(skip(1.0))
    freeze_ranges(graph)
    solved = solved_qparams(graph)
    assert "cat+mul+relu" in solved
    converted = convert_pt2e(graph)
    parts, result, again = scales_of_join(converted)
    assert parts == [result, result]
    assert not again
    assert result == solved["cat+mul+relu"]


def test_no_scale_is_shared_without_data() -> None:
    graph = prepared(skip(1.0), data=DATA[:0])
    share_scales(graph)
    assert solved_qparams(graph) == {}
    with pytest.raises(CalibrationError, match="never saw data"):
        convert_pt2e(graph)


def test_improving_rounds_as_conversion_does() -> None:
    graph = prepared(skip(1.0))
    cq.improve(graph, [(batch,) for batch in DATA], ["bias_correction"])
    assert "cat+mul+relu" in solved_qparams(graph)
    before = prepared(skip(1.0))
    kept = statistics_of(before)
    with pytest.raises(ConfigError):
        cq.improve(before, [(batch,) for batch in DATA], ["nothing"])
    assert statistics_of(before) == kept


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_training_starts_with_the_scale_of_the_join(factor: float) -> None:
    class Scaled(Skip):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.head(torch.cat([x, self.second(x)], 1))

    torch.manual_seed(0)
    model = Scaled(1.0).eval()
    with torch.no_grad():
        model.second.weight.mul_(factor)
    graph, program = prepared(model), torch.export.export(model, EXAMPLE)
    trained = prepare_qat_pt2e(program.module(), cq.IntegerQuantizer().set_global("a8w8"))
    adoption = cq.adopt(trained, graph)
    assert "cat+conv2d_1+relu" in adoption.ranges
    assert not adoption.left_ranges
    # Where calibration kept two scales, training has one, with which one bias is rounded.
    assert list(adoption.left.values()) == ["its bias is rounded with another input scale"] * (
        factor > COARSER
    )
    expected, _, _ = scales_of_join(convert_pt2e(graph))
    found, result, _ = scales_of_join(convert_pt2e(trained))
    assert found == expected == [result, result]


def test_training_has_one_scale_for_what_is_joined() -> None:
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    graph = prepare_qat_pt2e(torch.export.export(skip(40.0), EXAMPLE).module(), quantizer)
    for batch in DATA:
        graph(batch)
    parts, result, again = scales_of_join(convert_pt2e(graph))
    assert parts == [result, result]
    assert not again
