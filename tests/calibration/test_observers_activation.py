"""The observer of activations, alone and in prepared models, and its names in schemes."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.ranges import Statistics, choose_qparams, solve
from custom_quantizer.calibration.statistics import solved_qparams
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.graph import is_dequantize, qparams_of
from custom_quantizer.core.schemes import (
    OBSERVERS,
    TensorScheme,
    activation_scheme,
    coerce_scheme,
    observer_name,
    scheme,
)
from custom_quantizer.errors import CalibrationError, ConversionError, SchemeError
from custom_quantizer.planning.quantizer import IntegerQuantizer

EXACT = ("minmax", "percentile99", "histogram", "entropy")
every_observer = pytest.mark.parametrize("name", OBSERVERS)


def observer(name: str = "histogram", bits: int = 8, **spec: Any) -> ActivationObserver:
    return ActivationObserver(
        TensorScheme(IntFormat(bits), bits > 8, observer=name),
        name="layer1.conv",
        dtype=torch.int8,
        **spec,
    )


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- batches ---------------------------------------------------------------------------------------


@given(
    data=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.floats(-3, 3, width=32)
        | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0]),
        min_size=1,
        max_size=60,
    ),
    random=st.randoms(use_true_random=False),
    parts=st.integers(0, 5),
)
@settings(max_examples=50)
def test_grouping_and_order_leave_no_trace(data: list[float], random: Any, parts: int) -> None:
    whole = torch.tensor(data)
    random.shuffle(data)
    ends = sorted(random.choices(range(len(data) + 1), k=parts))
    batches = [torch.tensor(data[a:b]) for a, b in itertools.pairwise([0, *ends, len(data)])]
    for name in EXACT:
        watched, batched = _seen(name, whole), observer(name)
        for batch in batches:
            batched(batch)
        assert same(buffers(batched), buffers(watched))
        assert batched.calculate_qparams() == watched.calculate_qparams()
        assert batched.qparams() == watched.qparams()


@pytest.mark.parametrize("other", [-1.0, 1.0])
@every_observer
def test_zero_has_no_sign(name: str, other: float) -> None:
    """Or the range would depend on which of two zeros came first."""
    watched = observer(name)
    watched(torch.tensor([-0.0, other]))
    end = watched.max_val if other < 0 else watched.min_val
    assert math.copysign(1.0, float(end)) == 1.0


def test_moving_averages_depend_on_the_order() -> None:
    """By nature: the reason why they are not among the exact observers."""
    a, b = torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 9.0])
    first, second = observer("moving_average"), observer("moving_average")
    for x in (a, b):
        first(x)
    for x in (b, a):
        second(x)
    assert float(first.max_val) == float(torch.lerp(torch.tensor(1.0), torch.tensor(9.0), 0.01))
    assert float(second.max_val) == float(torch.lerp(torch.tensor(9.0), torch.tensor(1.0), 0.01))
    assert int(first.count) == int(second.count) == 4
    slow = observer("moving_average", averaging_constant=0.5)
    for x in (a, b):
        slow(x)
    assert float(slow.max_val) == 5.0


@every_observer
def test_values_pass_unchanged(name: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    watched = observer(name)
    assert watched(x) is x
    assert watched(torch.zeros(0, 4)).shape == (0, 4)
    assert int(watched.count) == 12


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    watched, expected = observer(name), observer(name)
    assert watched(x) is x
    expected(x.to(torch.float32))
    assert same(buffers(watched), buffers(expected))


@every_observer
def test_layouts(name: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    expected = observer(name)
    expected(x)
    for view in (x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1)):
        watched = observer(name)
        watched(view)
        assert same(buffers(watched), buffers(expected))


def test_memory_does_not_grow_and_minmax_pays_for_no_counts() -> None:
    def size(module: nn.Module) -> int:
        return sum(value.nbytes for value in module.buffers())

    for name in OBSERVERS:
        watched = observer(name)
        before = size(watched)
        for _ in range(3):
            watched(torch.randn(10_000))
        assert size(watched) == before
    assert size(observer("minmax")) == size(observer("moving_average")) == 16
    assert size(observer("histogram")) == 16 + 65_536 * 8


# -- values that are not finite --------------------------------------------------------------------


@every_observer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_name_the_op_and_leave_no_trace(name: str, bad: float) -> None:
    watched = observer(name)
    watched(torch.randn(8))
    before = buffers(watched)
    x = torch.randn(2, 5)
    x[1, 3] = bad
    with pytest.raises(
        CalibrationError, match=r"layer1\.conv: 1 of 10 values.*the first is -?"
    ) as e:
        watched(x)
    assert str(bad) in str(e.value)
    assert same(buffers(watched), before)


@every_observer
def test_the_largest_floats_are_finite(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    watched = observer(name)
    watched(torch.tensor([largest, -largest]))
    assert watched.qparams().scale <= largest


@every_observer
def test_no_data(name: str) -> None:
    watched = observer(name)
    watched(torch.zeros(0))
    with pytest.raises(CalibrationError, match=r"layer1\.conv never saw data"):
        watched.calculate_qparams()


@every_observer
def test_activations_quantized_at_run_time_are_not_watched(name: str) -> None:
    watched = observer(name, is_dynamic=True)
    watched(torch.tensor([math.nan]))
    assert int(watched.count) == 0
    assert watched.counts is None


# -- what modules do -------------------------------------------------------------------------------


@every_observer
def test_new_data_changes_the_answer(name: str) -> None:
    watched = observer(name)
    watched(torch.rand(50))
    first = watched.qparams()
    assert watched.qparams() is first  # solved once
    watched(100 * torch.rand(50))
    assert watched.qparams() != first
    fresh = observer(name)
    fresh.load_state_dict(watched.state_dict())
    assert fresh.qparams() == watched.qparams()
    watched.load_state_dict(_seen(name, torch.rand(50)).state_dict())
    assert watched.qparams() != fresh.qparams()


def _seen(name: str, x: Tensor) -> ActivationObserver:
    watched = observer(name)
    watched(x)
    return watched


@every_observer
def test_copies_are_independent(name: str) -> None:
    watched = _seen(name, torch.rand(50))
    watched.qparams()
    copied = copy.deepcopy(watched)
    copied(torch.full((9,), -100.0))
    assert copied.qparams() != watched.qparams()
    assert same(buffers(watched), buffers(_seen_again(watched, name)))


def _seen_again(watched: ActivationObserver, name: str) -> ActivationObserver:
    again = observer(name)
    again.statistics = watched.statistics
    return again


@every_observer
def test_statistics_are_a_copy(name: str) -> None:
    watched = _seen(name, torch.rand(50))
    statistics = watched.statistics
    before = watched.qparams()
    watched(torch.full((9,), -100.0))
    assert statistics.count == 50
    assert solve(statistics, watched.scheme) == before
    watched.statistics = statistics
    assert watched.qparams() == before


@every_observer
def test_inference_mode(name: str) -> None:
    x = torch.randn(50)
    watched = observer(name)
    with torch.inference_mode():
        watched(x)
    assert watched.qparams() == _seen(name, x).qparams()


# -- in a model ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


def prepared(name: str) -> GraphModule:
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.zeros(4, 3, 8, 8),))
    return prepare_pt2e(program.module(), IntegerQuantizer().set_global(name))


@every_observer
def test_prepared_models_copy_and_keep_their_state(name: str) -> None:
    batches = torch.randn(12, 3, 8, 8).split(4)
    model = prepared(f"a8w8-{name}")
    for batch in batches[:2]:
        model(batch)
    copied = copy.deepcopy(model)
    restored = prepared(f"a8w8-{name}")
    restored.load_state_dict(model.state_dict())
    for each in (model, copied, restored):
        each(batches[2])
    assert solved_qparams(model) == solved_qparams(copied) == solved_qparams(restored)


@every_observer
@pytest.mark.parametrize("base", ["a8w8", "a4w4", "a16w8"])
def test_the_converted_graph_has_the_solved_parameters(name: str, base: str) -> None:
    model = prepared(f"{base}-{name}")
    model(torch.randn(4, 3, 8, 8))
    expected = {(float(q.scale), q.zero_point) for q in solved_qparams(model).values()}
    converted = convert_pt2e(model)
    found = {
        (float(q.scale), q.zero_point)
        for node in converted.graph.nodes
        if is_dequantize(node) and node.args[0].op == "call_function"
        for q in [qparams_of(converted, node)]
    }
    assert found == expected
    assert torch.isfinite(converted(torch.randn(4, 3, 8, 8))).all()


def test_histogram_fits_a_model_better_than_minmax_at_four_bits() -> None:
    torch.manual_seed(1)
    data = torch.randn(64, 3, 8, 8)
    errors = {}
    for name in ("minmax", "histogram"):
        model = prepared(f"a4w8-{name}")
        for batch in data.split(4):
            model(batch)
        converted = convert_pt2e(model)
        torch.manual_seed(0)
        float_model = Net().eval()
        errors[name] = sum(
            float((converted(batch) - float_model(batch)).square().sum()) for batch in data.split(4)
        )
    assert errors["histogram"] < errors["minmax"]


# -- names -----------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 16),
    name=st.sampled_from(OBSERVERS)
    | st.decimals(50, 100, places=5).map(lambda p: f"percentile{p:f}")
    | st.integers(50, 100).map(lambda p: f"percentile{p}"),
)
def test_scheme_names_with_observers_parse_back(bits: int, name: str) -> None:
    suffix = "lsq_activations" if name == "lsq" else name  # the short one means weights, too
    parsed = scheme(f"a{bits}w8-{suffix}")
    assert parsed.activation.observer == observer_name(name)
    assert scheme(parsed.name) == parsed
    assert scheme(f"a{bits}w8", observer=name) == parsed
    assert activation_scheme(f"a{bits}-{suffix}") == parsed.activation


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("percentile", "percentile"),
        ("percentile99.99", "percentile"),
        ("percentile99.990", "percentile"),
        ("percentile99.90", "percentile99.9"),
        ("percentile099.9", "percentile99.9"),
        ("percentile100", "percentile100"),
        ("percentile100.0", "percentile100"),
        ("percentile90", "percentile90"),
        ("minmax", "minmax"),
    ],
)
def test_one_name_for_one_observer(name: str, canonical: str) -> None:
    assert observer_name(name) == canonical
    assert TensorScheme(IntFormat(8), observer=name).observer == canonical
    assert scheme(f"a8w8-{name}").name.endswith("w8" if canonical == "minmax" else canonical)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("median", "unknown observer 'median'; legal: minmax, percentile, histogram"),
        ("percentile", None),
        ("percentile49.9", "50 to 100 percent"),
        ("percentile100.1", "50 to 100 percent"),
        ("percentile99.", "unknown observer"),
        ("percentile-99", "unknown observer"),
        ("percentile1e2", "unknown observer"),
        (None, "unknown observer None"),
    ],
)
def test_unknown_observers(name: Any, message: str | None) -> None:
    if message is None:
        scheme("a8w8", observer=name)
        return
    with pytest.raises(SchemeError, match=message):
        TensorScheme(IntFormat(8), observer=name)
    with pytest.raises(SchemeError):
        scheme(f"a8w8-{name}")


def test_torchao_configs_keep_their_histogram() -> None:
    spec = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-12),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-12),
    )
    config = coerce_scheme(QuantizationConfig(spec, spec, weight, None))
    assert config is not None
    assert config.activation.observer == "histogram"


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_observer_says_what_its_scheme_says(symmetric: bool) -> None:
    """In the attributes that torchao reads of any observer."""
    watched = ActivationObserver(
        TensorScheme(IntFormat(6, narrow=True), symmetric), name="x", dtype=torch.int8
    )
    assert (watched.quant_min, watched.quant_max, watched.dtype) == (-31, 31, torch.int8)
    affine, even = torch.per_tensor_affine, torch.per_tensor_symmetric
    assert watched.qscheme == (even if symmetric else affine)


# -- choose_qparams --------------------------------------------------------------------------------


@given(
    low=st.floats(-(2.0**100), 2.0**100, width=32),
    high=st.floats(-(2.0**100), 2.0**100, width=32),
    bits=st.integers(2, 16),
    narrow=st.booleans(),
    symmetric=st.booleans(),
)
def test_the_range_fits_the_integers(
    low: float, high: float, bits: int, narrow: bool, symmetric: bool
) -> None:
    low, high = min(low, high), max(low, high)
    fmt = IntFormat(bits, narrow)
    qparams = choose_qparams(low, high, TensorScheme(fmt, symmetric))
    scale = float(qparams.scale)
    assert not symmetric or qparams.zero_point == 0
    # Half a step is lost to the rounding of the zero point, a little to that of the scale.
    slack = (0.5 + (fmt.quant_max - fmt.quant_min) * 2.0**-23) * scale
    assert (fmt.quant_min - qparams.zero_point) * scale <= low + slack or low >= 0
    assert (fmt.quant_max - qparams.zero_point) * scale >= high - slack or high <= 0


def test_statistics_of_the_observer_are_those_of_its_values() -> None:
    x = torch.randn(3, 1000)
    watched = observer("entropy")
    for row in x:
        watched(row)
    assert watched.statistics == Statistics.of(x)
    ranged = observer("minmax")
    ranged(x)
    assert ranged.statistics == Statistics.of(x, "range")


def test_a_new_batch_moves_an_average_by_a_hundredth() -> None:
    fmt = TensorScheme(IntFormat(8), observer="moving_average")
    observer = ActivationObserver(fmt, "x", dtype=torch.int8)
    observer(torch.tensor([0.0, 1.0]))
    observer(torch.tensor([-100.0, 101.0]))
    assert float(observer.min_val) == pytest.approx(-1.0, rel=1e-6)
    assert float(observer.max_val) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("scheme", ["a8w8", "dyn8w8"])
@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
def test_exporting_a_prepared_graph_says_to_convert_it(scheme: str, prepare: Any) -> None:
    inputs = (torch.randn(2, 4),)
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 3)).eval(), inputs).module()
    prepared = prepare(exported, IntegerQuantizer().set_global(scheme))
    prepared(*inputs)
    with pytest.raises(ConversionError, match=r"prepared and not converted.*call convert_pt2e"):
        torch.export.export(prepared, inputs)
