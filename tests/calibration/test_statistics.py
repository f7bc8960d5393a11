"""Counts, their sums and files, and what the solvers make of them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from scipy.stats import entropy as kl_divergence
from support.exact import assert_sums_are_exact, on_grid, put_on_grid
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from custom_quantizer.calibration import ranges
from custom_quantizer.calibration.ranges import (
    BINS,
    Kind,
    Statistics,
    choose_qparams,
    count_values,
    entropy_range,
    expected_error,
    histogram_qparams,
    percentile_range,
    solve,
)
from custom_quantizer.calibration.statistics import (
    Entry,
    ModelStatistics,
    activation_observers,
    load_statistics,
    merge_statistics,
    read_statistics,
    record_counts,
    reset_statistics,
    save_statistics,
    solved_qparams,
    statistics_of,
)
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.errors import CalibrationError, InputError
from custom_quantizer.planning.quantizer import IntegerQuantizer

LARGEST = torch.finfo(torch.float32).max
EXACT_OBSERVERS = ("minmax", "percentile", "percentile90", "histogram", "entropy")
SCHEMES = [
    TensorScheme(IntFormat(bits, narrow), symmetric, observer=observer)
    for bits, narrow, symmetric in [
        (2, False, False),
        (3, True, False),
        (4, False, True),
        (8, False, False),
        (8, True, True),
        (16, False, True),
    ]
    for observer in EXACT_OBSERVERS
]

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 2.0**-126, LARGEST, -LARGEST, 3.14159]
)
values = st.one_of(
    st.lists(floats | special, min_size=1, max_size=60),
    st.lists(special, min_size=1, max_size=20),
    st.builds(lambda value, n: [value] * n, floats | special, st.integers(1, 30)),
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-4, 4, width=32)).map(list),
)


def heavy_tails(n: int = 20_000) -> Tensor:
    return torch.distributions.Cauchy(0.0, 1.0).sample((n,))


DATA: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(20_000),
    "relu": lambda: torch.randn(20_000).relu(),
    "negative": lambda: -torch.rand(20_000) - 1,
    "far from zero": lambda: torch.rand(20_000) + 100,
    "silu": lambda: nn.functional.silu(2 * torch.randn(20_000)),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
    "cauchy": heavy_tails,
    "outlier": lambda: torch.cat((torch.rand(20_000), torch.tensor([-1000.0]))),
    "constant": lambda: torch.full((50,), 3.14159),
    "two values": lambda: torch.tensor([-0.3, 0.7]).repeat(50),
    "one value": lambda: torch.tensor([-2.5]),
    "denormals": lambda: torch.arange(-50, 100) * 1e-45,
    "tiny": lambda: torch.randn(1000) * 1e-37,
    "huge": lambda: torch.tensor([LARGEST, -LARGEST, 1.0, 0.0]),
    "mixed magnitudes": lambda: torch.tensor([1e-38, -1e-30, 1e30, -1e-3, 0.0, -0.0, 5.0]),
}


def tensor(data: list[float]) -> Tensor:
    return torch.tensor(data, dtype=torch.float32)


def scheme_id(scheme: TensorScheme) -> str:
    narrow = "narrow" if scheme.format.narrow else ""
    symmetric = "symmetric" if scheme.symmetric else "affine"
    return f"{scheme.format}{narrow}-{symmetric}-{scheme.observer}"


every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)


# -- counting --------------------------------------------------------------------------------------


def counted_slowly(x: Tensor) -> Tensor:
    upper = (x.numpy().astype(np.float32) + np.float32(0)).view(np.uint32) >> 16
    upper[upper == 0x8000] = 0
    return torch.from_numpy(np.bincount(upper.reshape(-1), minlength=BINS))


@given(values)
def test_a_value_is_counted_by_the_upper_half_of_its_bits(data: list[float]) -> None:
    assert torch.equal(count_values(tensor(data)), counted_slowly(tensor(data)))


@pytest.mark.parametrize("n", [0, 1, 63, 65_535, 65_536, 65_537, (1 << 20) + 77])
@pytest.mark.parametrize("make", [torch.randn, torch.rand, lambda n: torch.randn(n).relu() * -0.0])
def test_long_tensors_are_counted_in_parts(n: int, make: Callable[[int], Tensor]) -> None:
    x = make(n)
    assert torch.equal(count_values(x), counted_slowly(x))


def test_layout_does_not_matter() -> None:
    x = torch.randn(2, 3, 5, 7)
    expected = counted_slowly(x)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.flip(0),
    ):
        assert torch.equal(count_values(view), expected)
    assert torch.equal(count_values(x[:, ::2]), counted_slowly(x[:, ::2]))
    assert torch.equal(count_values(x[:1].expand(4, 3, 5, 7)), 4 * counted_slowly(x[:1]))
    assert int(count_values(torch.tensor(2.5))[0x4020]) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_values_are_counted(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or inf"):
        count_values(torch.tensor([1.0, bad]))


# -- sums ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=values, random=st.randoms(use_true_random=False), parts=st.integers(1, 5))
def test_statistics_of_parts_add_up_in_any_order(
    data: list[float], random: Any, parts: int
) -> None:
    whole = Statistics.of(tensor(data))
    random.shuffle(data)
    ends = sorted(random.choices(range(len(data) + 1), k=parts))
    pieces = [data[a:b] for a, b in itertools.pairwise([0, *ends, len(data)])]
    random.shuffle(pieces)
    total = Statistics("counts", counts=torch.zeros(BINS, dtype=torch.int64))
    for piece in pieces:
        total += Statistics.of(tensor(piece))
    assert total == whole
    # Equality would not see the sign of zero, and 1 / scale would.
    assert math.copysign(1, total.low) == math.copysign(1, whole.low)
    assert total.count == len(data) == int(whole.counts.sum())  # type: ignore[union-attr]
    for scheme in SCHEMES:
        assert solve(total, scheme) == solve(whole, scheme)


def test_a_sum_knows_what_both_know() -> None:
    ranged, counted = Statistics.of(torch.ones(2), "range"), Statistics.of(torch.zeros(3))
    assert (ranged + counted) == Statistics("range", 5, 0.0, 1.0)
    average = Statistics("average", 2, 0.0, 1.0)
    for pair in ((average, ranged), (counted, average)):
        with pytest.raises(CalibrationError, match="order of the batches"):
            pair[0] + pair[1]


KINDS: tuple[Kind, ...] = ("range", "counts", "average")


@pytest.mark.parametrize(("have", "need"), list(itertools.product(KINDS, KINDS)))
def test_what_can_be_solved_from_what(have: Kind, need: Kind) -> None:
    statistics = {
        "range": Statistics("range", 2, -1.0, 1.0),
        "counts": Statistics.of(torch.tensor([-1.0, 1.0])),
        "average": Statistics("average", 2, -1.0, 1.0),
    }[have]
    observer = {"range": "minmax", "counts": "histogram", "average": "moving_average"}[need]
    scheme = TensorScheme(IntFormat(8), observer=observer)
    if have == need or (have, need) == ("counts", "range"):
        assert solve(statistics, scheme).scale > 0
    else:
        with pytest.raises(CalibrationError, match="calibrate again"):
            solve(statistics, scheme)


# -- all solvers -----------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("name", DATA)
def test_every_solver_gives_legal_parameters_that_reach_no_farther_than_the_data(
    name: str, scheme: TensorScheme
) -> None:
    statistics = Statistics.of(DATA[name]())
    qparams = solve(statistics, scheme)  # QParams checks what is legal
    fmt = scheme.format
    assert (qparams.quant_min, qparams.quant_max) == (fmt.quant_min, fmt.quant_max)
    if scheme.symmetric:
        assert qparams.zero_point == 0
    scale = float(qparams.scale)
    below, above = qparams.zero_point - fmt.quant_min, fmt.quant_max - qparams.zero_point
    # All levels but one at each end are needed, unless the scale cannot be smaller.
    widest = max(-statistics.low, statistics.high)
    assert scale * (max(below, above) - 1) <= 2 * widest or scale < 2.0**-125


@every_scheme
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_nothing_but_zeros(scheme: TensorScheme, zero: float) -> None:
    fmt = scheme.format
    expected = QParams(1.0, 0, fmt.quant_min, fmt.quant_max)
    assert solve(Statistics.of(torch.full((9,), zero)), scheme) == expected


@every_scheme
def test_no_data(scheme: TensorScheme) -> None:
    with pytest.raises(CalibrationError, match="no data"):
        solve(Statistics.of(torch.zeros(0)), scheme)


@every_scheme
@pytest.mark.parametrize("value", [3.14159, -0.1, 1e30, 1e-30])
def test_a_constant_is_exact_up_to_the_rounding_of_the_scale(
    scheme: TensorScheme, value: float
) -> None:
    qparams = solve(Statistics.of(torch.full((7,), value)), scheme)
    scale = float(qparams.scale)
    levels = round(value / scale)
    assert qparams.quant_min <= levels + qparams.zero_point <= qparams.quant_max
    assert abs(levels * scale - value) <= abs(value) * 2.0**-23


def test_the_range_of_the_largest_floats_is_no_infinity() -> None:
    statistics = Statistics.of(DATA["huge"]())
    for scheme in SCHEMES:
        assert solve(statistics, scheme).scale <= LARGEST


# -- percentile ------------------------------------------------------------------------------------


@given(
    data=values,
    percent=st.fractions(50, 100, max_denominator=1000),
    symmetric=st.booleans(),
)
@example([0.0] * 9 + [1.0], Fraction(80), False)
@example([-1.0] * 9 + [1.0], Fraction(50), False)
def test_percentile_keeps_enough_and_cuts_what_it_may(
    data: list[float], percent: Fraction, symmetric: bool
) -> None:
    x = tensor(data)
    low, high = percentile_range(Statistics.of(x), percent, symmetric=symmetric)
    # Below 2**-133 a value shares the bin of zero; the range holds zero in any case.
    x = torch.where(x.abs() < 2.0**-133, 0.0, x).double()
    rest = len(data) * (100 - percent) / 100
    below, above = int((x < 0).sum()), int((x > 0).sum())
    if (below + above if symmetric else 2 * max(below, above)) <= rest:
        assert (low, high) == tuple(
            map(float, tensor(data).aminmax())
        )  # rather than nothing but zeros
        return
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        magnitudes = x.abs().sort(descending=True).values.tolist()
        reach = max(-low, high)
        assert sum(m > reach for m in magnitudes) <= rest
        exact = magnitudes[int(rest)] if int(rest) < len(data) else 0.0
        assert exact <= reach <= exact * (1 + 2.0**-7) + 2.0**-133
        return
    for end, ordered in (
        (high, x.sort(descending=True).values),
        (-low, (-x).sort().values.flip(0)),
    ):
        assert int((ordered > end).sum()) <= rest / 2
        exact = max(float(ordered[int(rest / 2)]), 0.0)
        assert exact <= end <= exact * (1 + 2.0**-7) + 2.0**-133


@given(values)
def test_a_hundred_percent_is_minmax(data: list[float]) -> None:
    statistics = Statistics.of(tensor(data))
    for symmetric in (False, True):
        everything = TensorScheme(IntFormat(8), symmetric, observer="percentile100")
        minmax = TensorScheme(IntFormat(8), symmetric)
        assert solve(statistics, everything) == solve(statistics, minmax)


def test_percentile_does_not_cut_rare_values_from_zeros() -> None:
    x = torch.zeros(1_000_000)
    x[:3] = torch.tensor([0.5, 2.0, 4.0])
    assert percentile_range(Statistics.of(x), Fraction(99), symmetric=False) == (0.0, 4.0)
    x[:20_000] = 1.0
    x[0] = 4.0
    _, high = percentile_range(Statistics.of(x), Fraction(99), symmetric=False)
    assert high == 1.0 + 2.0**-7


# -- least squared error ---------------------------------------------------------------------------


def exact_error(statistics: Statistics, qparams: QParams) -> Fraction:
    """The integral over every bin, cell by cell, in rational numbers."""
    scale = Fraction(float(qparams.scale))
    assert statistics.counts is not None
    total = Fraction(0)
    for index in statistics.counts.nonzero().flatten().tolist():
        upper, sign = index & 0x7FFF, -1 if index >> 15 else 1
        if upper == 0:
            continue
        ends = torch.tensor([upper << 16, (upper + 1) << 16], dtype=torch.int32)
        start, stop = (Fraction(v) for v in ends.view(torch.float32).tolist())
        near, far = sorted((statistics.low * sign, statistics.high * sign))
        start, stop = max(start, Fraction(near)), min(stop, Fraction(far))
        levels = qparams.quant_max - qparams.zero_point
        if sign < 0:
            levels = qparams.zero_point - qparams.quant_min
        count = int(statistics.counts[index])
        total += count * _bin_error(start, stop, scale, levels)
    return total / statistics.count


def _bin_error(start: Fraction, stop: Fraction, scale: Fraction, levels: int) -> Fraction:
    def level(x: Fraction) -> int:
        return min(round(x / scale), levels)

    if start == stop:
        return (start - level(start) * scale) ** 2
    edges = [start]
    edges += [(k + Fraction(1, 2)) * scale for k in range(level(start), level(stop))]
    edges.append(stop)
    integral = Fraction(0)
    for a, b in itertools.pairwise(sorted(edges)):
        r = level((a + b) / 2) * scale
        integral += ((b - r) ** 3 - (a - r) ** 3) / 3
    return integral / (stop - start)


@given(
    data=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)),
    bits=st.integers(2, 9),
    fraction=st.floats(0, 1),
    scale=st.floats(2**-7, 50, width=32),
)
@settings(max_examples=60)
def test_the_expected_error_is_the_integral(
    data: Any, bits: int, fraction: float, scale: float
) -> None:
    fmt = IntFormat(bits)
    zero_point = fmt.quant_min + round(fraction * (fmt.quant_max - fmt.quant_min))
    qparams = QParams(scale, zero_point, fmt.quant_min, fmt.quant_max)
    statistics = Statistics.of(torch.from_numpy(data))
    exact = float(exact_error(statistics, qparams))
    # Sums of the squares cancel where values are clipped: up to 2**-53 of 4 of them for each bin.
    square = float(np.square(data.astype(np.float64)).max(initial=0.0))
    slack = len(data) * 2.0**-49 * (square + scale**2 * 4.0**bits)
    assert abs(expected_error(statistics, qparams) - exact) <= 1e-9 * exact + slack


def true_error(x: Tensor, qparams: QParams) -> float:
    x, scale = x.double(), float(qparams.scale)
    q = (torch.round(x / scale) + qparams.zero_point).clamp(qparams.quant_min, qparams.quant_max)
    return float(((q - qparams.zero_point) * scale - x).square().mean())


histogram_schemes = pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES if s.observer == "histogram"], ids=scheme_id
)
CONTINUOUS = ("normal", "relu", "negative", "far from zero", "silu", "laplace", "outlier")


@histogram_schemes
@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_expected_error_is_near_the_true_one(name: str, scheme: TensorScheme) -> None:
    """Within 5 %: what 20,000 samples differ from a density constant in each bin."""
    x = DATA[name]()
    for observer in ("minmax", "histogram"):
        used = TensorScheme(scheme.format, scheme.symmetric, observer=observer)
        qparams = solve(Statistics.of(x), used)
        assert expected_error(Statistics.of(x), qparams) == pytest.approx(
            true_error(x, qparams), rel=0.05
        )


@histogram_schemes
@pytest.mark.parametrize("name", DATA)
def test_histogram_is_never_worse_than_minmax(name: str, scheme: TensorScheme) -> None:
    statistics = Statistics.of(DATA[name]())
    chosen = expected_error(statistics, histogram_qparams(statistics, scheme))
    minmax = choose_qparams(statistics.low, statistics.high, scheme)
    # The sums run over other bins with other scales, so their last bits differ.
    assert chosen <= expected_error(statistics, minmax) * (1 + 1e-9)


@histogram_schemes
@pytest.mark.parametrize("name", CONTINUOUS)
def test_no_other_parameters_are_better(name: str, scheme: TensorScheme) -> None:
    """Against scales a quarter of a percent apart: the search's own steps are 1.1 %.

    Near its minimum the error is a parabola, so half a step, 0.55 %, costs far less than 1 %.
    """
    statistics = Statistics.of(DATA[name]())
    fmt = scheme.format
    chosen = histogram_qparams(statistics, scheme)
    best = expected_error(statistics, chosen)
    widest = float(choose_qparams(statistics.low, statistics.high, scheme).scale)
    zero_points = range(fmt.quant_min, fmt.quant_max + 1)
    if scheme.symmetric:
        zero_points = range(1)
    elif fmt.bits == 8:
        zero_points = range(max(chosen.zero_point - 3, -128), min(chosen.zero_point + 4, 128))
    negative, positive, _ = ranges._sides(statistics)
    scales = ranges._rounded(widest * 1.6 * 1.0025 ** -np.arange(900.0))
    below = np.array(zero_points) - fmt.quant_min
    steps = fmt.quant_max - fmt.quant_min
    every = ranges._errors(negative, positive, scales, below, steps)
    assert best <= every.min() / statistics.count * 1.01


def test_two_levels_are_found_exactly() -> None:
    """A 2-bit format with levels at -1, 0, 1 and 2 steps holds -1 and 1; minmax's does not."""
    statistics = Statistics.of(torch.tensor([-1.0, 1.0]).repeat(100))
    fmt = TensorScheme(IntFormat(2), observer="histogram")
    assert expected_error(statistics, histogram_qparams(statistics, fmt)) < 1e-12
    minmax = TensorScheme(IntFormat(2))
    assert expected_error(statistics, solve(statistics, minmax)) > 0.01


def test_zeros_cost_nothing() -> None:
    x = torch.randn(5000).relu()
    more = torch.cat((x, torch.zeros(1_000_000)))
    for scheme in SCHEMES:
        if scheme.observer in ("histogram", "entropy"):
            assert solve(Statistics.of(x), scheme) == solve(Statistics.of(more), scheme)


# -- least divergence ------------------------------------------------------------------------------


def reference_divergence(bins: Any, i: int, cells: int) -> float:
    """As NVIDIA's pytorch-quantization computes it (calib/histogram.py), for the first i bins."""
    space = np.linspace(0, i, num=cells + 1)
    digitized = np.digitize(range(i), space) - 1
    digitized[bins[:i] == 0] = -1
    density = np.zeros(cells)
    for index, cell in enumerate(digitized):
        if cell != -1:
            density[cell] += bins[index]
    for cell in set(digitized) - {-1}:
        density[cell] /= (digitized == cell).sum()
    new = np.array([density[cell] if cell != -1 else 0.0 for cell in digitized])
    old = np.array(bins[:i], dtype=np.float64)
    old[-1] += bins[i:].sum()
    return float(kl_divergence(old, new)) if new.any() else math.inf


@pytest.mark.parametrize("name", ["relu", "far from zero", "two values", "cauchy"])
@pytest.mark.parametrize("cells", [4, 16, 128])
def test_divergence_is_that_of_the_reference(name: str, cells: int) -> None:
    magnitudes = DATA[name]().abs().numpy()
    bins = np.histogram(magnitudes, bins=2048, range=(0, magnitudes.max()))[0].astype(np.float64)
    stops = np.array([128, 136, 1000, 2040, 2048])
    found = ranges._divergence(bins, np.zeros(5, dtype=np.int64), stops, cells)
    # Exact multiples: linspace rounds an edge between two bins where the cells are no powers of 2.
    expected = [reference_divergence(bins, int(i), cells) for i in stops]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cells", [4, 5, 8, 64])
def test_what_is_clipped_joins_the_outermost_bin_however_few_there_are(cells: int) -> None:
    """With as many cells as bins, or more, each bin is a cell of its own and some are empty."""
    mass = np.array([3.0, 1.0, 5.0, 2.0, 7.0, 4.0])
    start, stop = np.array([0, 1, 1, 2]), np.array([4, 5, 4, 6])
    found = ranges._divergence(mass, start, stop, cells)
    for i, (first, last) in enumerate(zip(start, stop, strict=True)):
        inside = mass[first:last]
        clipped = inside.copy()
        clipped[0] += mass[:first].sum()
        clipped[-1] += mass[last:].sum()
        assert found[i] == pytest.approx(kl_divergence(clipped, inside), rel=1e-12)


def test_entropy_of_symmetric_formats_sees_magnitudes_only() -> None:
    x = nn.functional.silu(2 * torch.randn(20_000))
    scheme = TensorScheme(IntFormat(8, narrow=True), True, observer="entropy")
    flipped = torch.where(torch.rand(20_000) < 0.5, -x, x)
    expected = solve(Statistics.of(x), scheme)
    assert solve(Statistics.of(-x), scheme) == expected
    assert solve(Statistics.of(flipped), scheme) == expected


def test_entropy_spreads_counts_over_equal_bins() -> None:
    x = torch.randn(50_000).abs()
    _, positive, _ = ranges._sides(Statistics.of(x))
    width = float(x.max()) / 2048
    mass = ranges._linear(positive, width, 2048)
    assert mass.sum() == pytest.approx(50_000, abs=1e-6)
    # Edges of bins that are powers of two are edges of counted bins: sums there are exact.
    power = 2.0 ** math.floor(math.log2(float(x.max())))
    low = ranges._linear(positive, power / 2048, 2048)
    assert low.sum() == pytest.approx(int((x < power).sum()), abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_clips_tails_up_to_ten_bits(symmetric: bool) -> None:
    statistics = Statistics.of(nn.functional.silu(2 * torch.randn(200_000)))
    for bits in (2, 4, 8):
        scheme = TensorScheme(IntFormat(bits), symmetric, observer="entropy")
        _, high = entropy_range(statistics, scheme)
        assert high < 0.8 * statistics.high
    wide = TensorScheme(IntFormat(16), symmetric, observer="entropy")
    assert entropy_range(statistics, wide) == (statistics.low, statistics.high)


@pytest.mark.parametrize(("symmetric", "first"), [(True, 128), (False, 256)])
def test_of_equal_thresholds_the_largest_wins(symmetric: bool, first: int) -> None:
    """Between them lies one value of millions: a divergence of 1 / (2 * 2e6**2), less than 1e-12.

    All others are in the outermost bin of the first threshold.
    """
    values = torch.full((2_000_001,), (first - 1) / 2048)
    values[-1] = 1.0
    scheme = TensorScheme(IntFormat(8), symmetric, observer="entropy")
    assert entropy_range(Statistics.of(values), scheme) == ((first - 1) / 2048, 1.0)


@pytest.mark.parametrize(("more", "winner"), [(0.0, 168), (0.9e-12, 168), (1.1e-12, 152)])
def test_divergences_that_differ_by_less_than_a_trillionth_are_equal(
    more: float, winner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 128, 136, ... bins, 152 have the least one; that of 168 is larger by ``more``."""

    def divergence(_mass: Any, start: Any, stop: Any, _cells: int) -> Any:
        found = np.ones(start.shape)
        found[[3, 5]] = 0.0, more
        assert list(stop[[3, 5]] - start[[3, 5]]) == [152, 168]
        return found

    monkeypatch.setattr(ranges, "_divergence", divergence)
    values = torch.linspace(0.0, 1.0, 4097)
    scheme = TensorScheme(IntFormat(8), True, observer="entropy")
    assert entropy_range(Statistics.of(values), scheme) == (0.0, winner / 2048)


# -- models ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model of which every CPU computes the same float32 values in batches of every size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)
        put_on_grid(self, conv1=2.0**-4, conv2=2.0**-5, linear=2.0**-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = torch.cat((x, self.conv2(x)), 1)[:, 2:6]
        return self.linear(x.mean((2, 3)))


DATASET = on_grid(torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(3)), 2.0**-2)
CAPTURED: dict[str, GraphModule] = {}


def prepared(scheme: str, *data: Tensor, model: type[nn.Module] = Net, **named: str) -> GraphModule:
    if model.__name__ not in CAPTURED:
        torch.manual_seed(0)
        dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(model().eval(), (DATASET[:2],), dynamic_shapes=dynamic)
        CAPTURED[model.__name__] = program.module()  # type: ignore[assignment]
    quantizer = IntegerQuantizer().set_global(scheme)
    for name, other in named.items():
        quantizer.set_module_name(name, other)
    result: GraphModule = prepare_pt2e(copy.deepcopy(CAPTURED[model.__name__]), quantizer)
    for batch in data:
        result(batch)
    return result


def test_the_model_of_these_tests_is_exact_in_float32() -> None:
    torch.manual_seed(0)
    # 2**-2 of the data, then 2**-4, 2**-5, 2**-6 of the mean over 8x8, 2**-3.
    assert_sums_are_exact(Net(), DATASET, 2.0**-20)


def test_observers_are_named_by_what_they_watch() -> None:
    names = [observed.name for observed in activation_observers(prepared("a8w8"))]
    assert names == ["x", "relu", "cat+conv2d_1+slice_1", "mean", "linear"]
    # The same tensor in a second format is the same tensor.
    model = prepared("a8w8", DATASET, conv2="a16w8")
    assert sorted(observed.name for observed in activation_observers(model)) == [
        "cat+conv2d_1+slice_1",
        "linear",
        "mean",
        "relu",
        "relu",
        "slice_1",
        "x",
    ]


def test_statistics_of_a_fixed_batch_fit_a_dynamic_one() -> None:
    # Where the batch grows, the mean is rewritten to a linear layer between reshapes.
    torch.manual_seed(0)
    fixed_model: GraphModule = torch.export.export(Net().eval(), (DATASET,)).module()
    fixed = prepare_pt2e(fixed_model, IntegerQuantizer().set_global("a8w8"))
    fixed(DATASET)
    dynamic, expected = prepared("a8w8"), prepared("a8w8", DATASET)
    assert any(node.name == "mean_linear" for node in dynamic.graph.nodes)
    load_statistics(dynamic, fixed)
    assert solved_qparams(dynamic).keys() == solved_qparams(expected).keys()
    for name in ("x", "relu", "cat+conv2d_1+slice_1", "linear"):
        assert solved_qparams(dynamic)[name] == solved_qparams(expected)[name]


def test_observers_of_the_same_tensor_are_numbered() -> None:
    model = prepared("a8w8", DATASET, linear="a16w8")
    names = [observed.name for observed in activation_observers(model)]
    solved = solved_qparams(model)
    assert names.count("mean") == 2
    assert solved["mean"].quant_max == 127
    assert solved["mean#2"].quant_max == 32767
    assert len(solved) == len(names)


@pytest.mark.parametrize("observer", EXACT_OBSERVERS)
@pytest.mark.parametrize("base", ["a8w8", "a3w4-symmetric", "a16w8"])
def test_a_file_is_solved_again_as_if_it_were_the_data(
    tmp_path: Path, base: str, observer: str
) -> None:
    save_statistics(prepared("a8w8-histogram", DATASET[:20], DATASET[20:]), tmp_path / "s")
    name = f"{base}-{observer}"
    loaded, expected = prepared(name), prepared(name, *DATASET.split(7))
    load_statistics(loaded, tmp_path / "s")
    assert solved_qparams(loaded) == solved_qparams(expected)
    assert statistics_of(loaded) == statistics_of(expected)


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-entropy", "a8w8-moving_average"])
def test_files_round_trip(tmp_path: Path, scheme: str) -> None:
    model = prepared(scheme, *DATASET.split(10))
    save_statistics(model, tmp_path / "one")
    read = read_statistics(tmp_path / "one")
    assert read == statistics_of(model)
    save_statistics(read, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = prepared(scheme)
    load_statistics(loaded, tmp_path / "two")
    assert solved_qparams(loaded) == solved_qparams(model)


def test_an_uncalibrated_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    save_statistics(prepared("a8w8-histogram"), tmp_path / "s")
    model = prepared("a8w8-histogram", DATASET)
    load_statistics(model, tmp_path / "s")
    assert solved_qparams(model) == {}
    model(DATASET)
    assert solved_qparams(model) == solved_qparams(prepared("a8w8-histogram", DATASET))


def test_files_are_small(tmp_path: Path) -> None:
    save_statistics(prepared("a8w8-histogram", DATASET), tmp_path / "s")
    # 12 bytes for each bin in use, however much data there was.
    assert (tmp_path / "s").stat().st_size < 4 * 12 * 6000


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-percentile99.9"])
def test_merged_files_are_all_the_data(tmp_path: Path, scheme: str) -> None:
    shards = [DATASET[:1], DATASET[1:18], DATASET[18:18], DATASET[18:]]
    paths = [tmp_path / str(i) for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        # One by one: convolutions of other batch sizes differ in the last bits.
        save_statistics(prepared(scheme, *[x[None] for x in shard]), path)
    whole = prepared(scheme, *DATASET.split(1))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert merge_statistics(paths[i] for i in order) == statistics_of(whole)
    # Files, objects and models, and a single one.
    last = prepared(scheme, *shards[3].split(1))
    mixed = merge_statistics([paths[0], read_statistics(paths[1]), last])
    loaded = prepared(scheme)
    load_statistics(loaded, mixed)
    assert solved_qparams(loaded) == solved_qparams(whole)
    assert merge_statistics([whole]) == statistics_of(whole)


def test_what_cannot_be_merged() -> None:
    histogram, minmax = prepared("a8w8-histogram", DATASET), prepared("a8w8", DATASET)
    average = prepared("a8w8-moving_average", DATASET)
    with pytest.raises(CalibrationError, match="at least one source"):
        merge_statistics([])
    with pytest.raises(CalibrationError, match=r"source 1 .* linear \(counts\)"):
        merge_statistics([minmax, histogram])
    with pytest.raises(CalibrationError, match="order of the batches"):
        merge_statistics([average, average])
    with pytest.raises(CalibrationError, match=r"source 2 .*different things.*slice_1"):
        merge_statistics([minmax, minmax, prepared("a8w8", DATASET, conv2="a16w8")])


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv1(x).sigmoid().mean((2, 3)))


def test_statistics_of_another_model() -> None:
    model = prepared("a8w8", DATASET)
    before = statistics_of(model)
    with pytest.raises(CalibrationError) as error:
        load_statistics(model, prepared("a8w8", DATASET, model=Other))
    for words in (
        "do not fit the graph: 4 of its 7 observed tensors are missing",
        "cat, conv2d_1, relu, slice_1",
        "conv2d_1 did you mean conv2d",
    ):
        assert words in str(error.value)
    assert statistics_of(model) == before


def test_too_little_was_recorded(tmp_path: Path) -> None:
    save_statistics(prepared("a8w8", DATASET), tmp_path / "s")
    model = prepared("a8w8-histogram", DATASET[:3])
    before = statistics_of(model)
    with pytest.raises(CalibrationError, match=r"^x: only minimum and maximum.*record_counts"):
        load_statistics(model, tmp_path / "s")
    assert statistics_of(model) == before
    with pytest.raises(CalibrationError, match="follow the batches one by one"):
        load_statistics(prepared("a8w8-moving_average"), model)


def test_minmax_can_record_counts_too(tmp_path: Path) -> None:
    model = prepared("a8w8")
    record_counts(model)
    for batch in DATASET.split(9):
        model(batch)
    assert solved_qparams(model) == solved_qparams(prepared("a8w8", DATASET))
    loaded = prepared("a8w8-entropy")
    load_statistics(loaded, model)
    assert solved_qparams(loaded) == solved_qparams(prepared("a8w8-entropy", DATASET))
    record_counts(model)  # again: nothing to do
    with pytest.raises(CalibrationError, match="before calibrating"):
        record_counts(prepared("a8w8", DATASET))
    with pytest.raises(CalibrationError, match="averages extremes"):
        record_counts(prepared("a8w8-moving_average"))


def entry(*tensors: str, of: Tensor = DATASET, kind: Kind = "counts") -> Entry:
    return Entry(tensors, Statistics.of(of, kind))


def test_tensors_recorded_apart_are_added() -> None:
    together = statistics_of(prepared("a8w8-histogram", DATASET))
    others = [e for e in together if len(e.tensors) == 1]
    parts = [torch.rand(7), -torch.rand(5)]
    apart = [entry("cat", of=parts[0]), entry("conv2d_1", "slice_1", of=parts[1])]
    # A part of another entry, which would be counted twice.
    apart.append(entry("conv2d_1", of=DATASET))
    model = prepared("a8w8-histogram")
    load_statistics(model, ModelStatistics((*others, *apart)))
    loaded = next(e for e in statistics_of(model) if len(e.tensors) == 3)
    assert loaded.statistics == Statistics.of(torch.cat([part.flatten() for part in parts]))


def test_tensors_recorded_together_are_not_split() -> None:
    statistics = ModelStatistics((entry("a", "b"), entry("c"), entry("c", kind="range")))
    with pytest.raises(CalibrationError, match="of a were recorded together with b, which"):
        statistics.for_tensors(("a",), "range")
    with pytest.raises(CalibrationError, match="no statistics of bb; did you mean b"):
        statistics.for_tensors(("a", "bb"), "range")
    assert statistics.for_tensors(("a", "b"), "range") == Statistics.of(DATASET, "range")
    # The entry that knows more.
    assert statistics.for_tensors(("c",), "counts") == Statistics.of(DATASET)
    together = prepared("a8w8-histogram", DATASET)
    with pytest.raises(CalibrationError, match=r"recorded together with .*scale of their own"):
        load_statistics(prepared("a8w8-histogram", conv2="a16w8-histogram"), together)


def test_reset() -> None:
    model = prepared("a8w8-histogram", DATASET)
    reset_statistics(model)
    assert solved_qparams(model) == {}
    model(DATASET[:5])
    assert statistics_of(model) == statistics_of(prepared("a8w8-histogram", DATASET[:5]))


@pytest.mark.parametrize("wrong", [nn.ReLU(), torch.fx.symbolic_trace(nn.ReLU())])
def test_not_a_prepared_graph(wrong: Any) -> None:
    with pytest.raises(CalibrationError, match="prepare_pt2e"):
        statistics_of(wrong)


# -- files that are not what they should be --------------------------------------------------------

METADATA = {"custom_quantizer.statistics": "1"}


def good_file() -> dict[str, Tensor]:
    return {
        "x/counts/count": torch.tensor(5),
        "x/counts/range": torch.tensor([0.0, 1.5]),
        "x/counts/bins": torch.tensor([0, 0x3FC0], dtype=torch.int32),
        "x/counts/counts": torch.tensor([2, 3]),
    }


def with_field(field: str, value: Tensor | None) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        tensors = good_file()
        del tensors[f"x/counts/{field}"]
        return tensors if value is None else {**tensors, f"x/counts/{field}": value}

    return make


def bins(*index: int) -> Tensor:
    return torch.tensor(index, dtype=torch.int32)


TAMPERED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "a field is missing": (with_field("range", None), "instead of bins, count, counts, range"),
    "no counts": (with_field("counts", None), "holds bins, count, range instead"),
    "another dtype": (with_field("count", torch.tensor(5.0)), "count is torch.float32"),
    "another shape": (with_field("range", torch.zeros(3)), "no pair"),
    "range upside down": (with_field("range", torch.tensor([1.0, 0.0])), "impossible"),
    "range not finite": (with_field("range", torch.tensor([0.0, math.inf])), "impossible"),
    "range of NaN": (with_field("range", torch.tensor([math.nan, 1.0])), "impossible"),
    "no values in a range": (with_field("count", torch.tensor(0)), "impossible"),
    "negative count": (with_field("count", torch.tensor(-5)), "impossible"),
    "another sum": (with_field("count", torch.tensor(6)), "5 values instead of 6"),
    "bin of inf": (with_field("bins", bins(0, 0x7F80)), "finite values"),
    "bin of -NaN": (with_field("bins", bins(0, 0xFFC0)), "finite values"),
    "bin of -0.0": (with_field("bins", bins(0, 0x8000)), "finite values"),
    "bin out of range": (with_field("bins", bins(0, 70_000)), "finite values"),
    "negative bin": (with_field("bins", bins(-1, 0)), "finite values"),
    "bins twice": (with_field("bins", bins(1, 1)), "ascending"),
    "bins in disorder": (with_field("bins", bins(2, 1)), "ascending"),
    "zero counts": (with_field("counts", torch.tensor([5, 0])), "counts of 0"),
    "fewer bins": (with_field("bins", bins(0)), "same length"),
    "no entry": (lambda: {"weights": torch.zeros(1)}, "not named as an entry"),
    "unknown kind": (lambda: {"x/median/count": torch.tensor(1)}, "not named as an entry"),
}


def test_a_good_file(tmp_path: Path) -> None:
    save_file(good_file(), tmp_path / "s", metadata=METADATA)
    x = torch.tensor([0.0, 0.0, 1.5, 1.5, 1.5])
    assert read_statistics(tmp_path / "s") == ModelStatistics((Entry(("x",), Statistics.of(x)),))


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_files(tmp_path: Path, name: str) -> None:
    make, message = TAMPERED[name]
    save_file(make(), tmp_path / "s", metadata=METADATA)
    with pytest.raises(InputError, match=message) as error:
        read_statistics(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no calibration statistics"),
        ({"format": "pt", "version": "1"}, "no calibration statistics"),
        ({"custom_quantizer.statistics": "one"}, "no calibration statistics"),
        ({"custom_quantizer.statistics": "5"}, "version 5 .* up to 4"),
        ({"custom_quantizer.statistics": "2"}, "was changed after it was written"),
    ],
)
def test_other_safetensors_files(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    save_file(good_file(), tmp_path / "s", metadata=metadata)
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "s")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read|no \.safetensors"):
        read_statistics(tmp_path / "missing")
    with pytest.raises(InputError):
        read_statistics(tmp_path)
    (tmp_path / "s").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        read_statistics(tmp_path / "s")
    save_statistics(prepared("a8w8-histogram", DATASET), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (tmp_path / "s").write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_statistics(tmp_path / "s")
    assert load_file(tmp_path / "whole").keys() >= {"x/counts/count", "linear/counts/bins"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        save_statistics(prepared("a8w8", DATASET), tmp_path / "nowhere" / "s")
