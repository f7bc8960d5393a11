"""What an activation held, as exact counts; and how counts become a scale and a zero point.

Values are counted by the upper 16 bits of their float32: sign, exponent and 7 bits of mantissa,
the remaining bits cut off (not rounded, which would turn the largest finite values into inf). The
bins are the same for all data, so counts of two batches, files or machines add up, and neither
the grouping nor the order of the values can be seen in the sum. Minimum and maximum are kept
exactly, beside the counts.

A solver turns counts into a range or into quantization parameters. Within a bin it takes values
as spread evenly; sums run over the bins in a fixed order. Zero is a value of every format here,
exactly, so zeros never count as error.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom_quantizer.core.arithmetic import LARGEST_FLOAT, SMALLEST_NORMAL, QParams
from custom_quantizer.core.schemes import TensorScheme, parse_observer
from custom_quantizer.errors import CalibrationError

__all__ = [
    "BINS",
    "Kind",
    "Statistics",
    "choose_qparams",
    "count_values",
    "entropy_range",
    "expected_error",
    "histogram_qparams",
    "kind_of_observer",
    "minmax_range",
    "percentile_range",
    "solve",
]

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

Kind = Literal["range", "counts", "average"]
"""What is recorded: extremes only, extremes and counts, or moving averages of the extremes."""

BINS = 1 << 16
"""Number of bins: one for each upper half of a float32."""

_NEGATIVE = 1 << 15  # first bin of the negative values, which is -0.0

_OBSERVER_KIND: dict[str, Kind] = {
    "minmax": "range",
    "percentile": "counts",
    "histogram": "counts",
    "entropy": "counts",
    "moving_average": "average",
    "lsq": "counts",
}


def kind_of_observer(observer: str) -> Kind:
    """The least that has to be recorded for an observer of a scheme."""
    return _OBSERVER_KIND[parse_observer(observer)[0]]


# -- counting -----------------------------------------------------------------------------------

_CHUNK = 1 << 20  # values at a time: bounds the scratch memory
_LANES = 4
_PATTERN = 64  # values in which the lanes repeat
_LANES_FROM = 1 << 16  # below that many values, clearing the lanes costs more than they save


def count_values(values: Tensor) -> Tensor:
    """Count values by the upper 16 bits of their float32.

    Args:
        values: finite floats of any shape.

    Returns:
        int64 ``(65536,)`` on the device of ``values``; -0.0 counts as 0.0.

    Raises:
        CalibrationError: a value is NaN or infinite.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    if values.numel():
        values = values.detach().to(torch.float32)
        low, high = (float(end) for end in torch.aminmax(values))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError("only finite values can be counted; there are NaN or inf")
        add_counts(counts, values, low, high)
    return counts


def add_counts(counts: Tensor, values: Tensor, low: float, high: float) -> None:
    """Add the counts of finite float32 ``values``, whose extremes are known, in place."""
    flat = _flat(values).view(torch.int32)
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK] >> 16
        if low < 0:
            found = torch.bincount(bits.bitwise_and_(BINS - 1), minlength=_NEGATIVE + 1)
            found[0] += found[_NEGATIVE]
            found[_NEGATIVE] = 0
            counts[: found.numel()] += found
        else:
            size = _upper_half(high) + 1
            # The mask turns -0.0 into 0.0.
            counts[:size] += _count_laned(bits.bitwise_and_(_NEGATIVE - 1), size)


def _count_laned(bits: Tensor, size: int) -> Tensor:
    """Counts of ``bits`` in ``[0, size)``.

    Equal neighbours, such as the zeros after a relu, are counted in different places, so that
    the processor need not wait for one addition to finish before the next: twice as fast.
    """
    if bits.numel() < _LANES_FROM or bits.device.type != "cpu":
        return torch.bincount(bits, minlength=size)
    even = bits.numel() - bits.numel() % _PATTERN
    lane = torch.arange(_PATTERN, dtype=torch.int32).remainder_(_LANES).mul_(size)
    bits[:even].view(-1, _PATTERN).add_(lane)
    return torch.bincount(bits, minlength=_LANES * size).view(_LANES, size).sum(0)


def _flat(values: Tensor) -> Tensor:
    """The values in one dimension, in the order of memory, which avoids copies."""
    strides: tuple[int, ...] = values.stride()
    order = sorted(range(values.dim()), key=lambda d: -strides[d])
    return values.permute(order).reshape(-1)


def _upper_half(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", abs(value)))[0]
    return bits >> 16


# -- statistics ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was recorded of one activation.

    Attributes:
        kind: what is known.
        count: number of values.
        low: smallest value (of ``average``: the averaged minimum); inf without values.
        high: largest value; -inf without values.
        counts: of ``counts`` only: int64 ``(65536,)`` on the CPU.
    """

    kind: Kind
    count: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    counts: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, kind: Kind = "counts") -> Statistics:
        """Statistics of a tensor of any shape.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        counts = count_values(values).cpu() if kind == "counts" else None
        if not values.numel():
            return cls(kind, counts=counts)
        low, high = torch.aminmax(values.detach().to(torch.float32))
        # Adding 0.0 makes 0.0 of -0.0, which would depend on the order.
        return cls(kind, values.numel(), float(low) + 0.0, float(high) + 0.0, counts)

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of the values of both.

        Raises:
            CalibrationError: one of them is a moving average, which depends on the order.
        """
        if "average" in (self.kind, other.kind):
            raise CalibrationError(
                "moving averages depend on the order of the batches and cannot be merged; "
                "calibrate with another observer"
            )
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = self.counts + other.counts
        return Statistics(
            "range" if counts is None else "counts",
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
            counts,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        mine, theirs = ((s.kind, s.count, s.low, s.high, s.counts is None) for s in (self, other))
        if mine != theirs or self.counts is None or other.counts is None:
            return mine == theirs
        return torch.equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]  # counts are mutable

    def as_kind(self, kind: Kind) -> Statistics:
        """The same with less detail, or as it is.

        Raises:
            CalibrationError: it lacks what ``kind`` needs.
        """
        if kind == self.kind:
            return self
        if (self.kind, kind) == ("counts", "range"):
            return Statistics("range", self.count, self.low, self.high)
        raise CalibrationError(_LACKS[self.kind, kind])


_ORDER = (
    "moving averages follow the batches one by one; calibrate again with observer='moving_average'"
)
_EXACT = (
    "moving averages were recorded, which say nothing about single values; calibrate again with "
    "the observer that is wanted"
)
_LACKS: dict[tuple[Kind, Kind], str] = {
    ("range", "counts"): "only minimum and maximum were recorded, which is all that minmax needs; "
    "calibrate again with observer='percentile', 'histogram' or 'entropy', or call "
    "custom_quantizer.calibration.statistics.record_counts(prepared) before calibrating",
    ("range", "average"): _ORDER,
    ("counts", "average"): _ORDER,
    ("average", "range"): _EXACT,
    ("average", "counts"): _EXACT,
}


# -- from statistics to quantization parameters -------------------------------------------------


def solve(statistics: Statistics, scheme: TensorScheme) -> QParams:
    """Scale and zero point by the scheme's observer.

    Args:
        statistics: at least one value.
        scheme: format, symmetry and observer.

    Raises:
        CalibrationError: there are no values, or the statistics lack what the observer needs.
    """
    if statistics.count == 0:
        raise CalibrationError("no data was seen, so there is no range")
    observer, percent = parse_observer(scheme.observer)
    statistics = statistics.as_kind(_OBSERVER_KIND[observer])
    if observer in ("histogram", "lsq"):
        return histogram_qparams(statistics, scheme)
    if observer == "entropy":
        low, high = entropy_range(statistics, scheme)
    elif percent is not None:
        low, high = percentile_range(statistics, percent, symmetric=scheme.symmetric)
    else:
        low, high = minmax_range(statistics)
    return choose_qparams(low, high, scheme)


def choose_qparams(low: float, high: float, scheme: TensorScheme) -> QParams:
    """Scale and zero point with which ``[low, high]`` fits the scheme's integers.

    Zero is always in range and always exact. A range of nothing but zero gets scale 1.

    Args:
        low: smallest value to represent.
        high: largest value to represent.
        scheme: format and symmetry.

    References:
        Jacob et al., CVPR 2018, section 3 (nudged zero point).
    """
    fmt = scheme.format
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return QParams(1.0, 0, fmt.quant_min, fmt.quant_max)
    if scheme.symmetric:
        reach = max(-low / -fmt.quant_min, high / fmt.quant_max)
        return QParams(_float32(reach), 0, fmt.quant_min, fmt.quant_max)
    scale = _float32((high - low) / (fmt.quant_max - fmt.quant_min))
    # A range of -r to r is a tie, which the last bits of r must not decide.
    zero_point = math.floor(fmt.quant_min - low / scale + 0.5 + 1e-4)
    zero_point = min(max(zero_point, fmt.quant_min), fmt.quant_max)
    return QParams(scale, zero_point, fmt.quant_min, fmt.quant_max)


def _float32(value: float) -> float:
    return max(float(torch.tensor(min(value, LARGEST_FLOAT), dtype=torch.float32)), SMALLEST_NORMAL)


def minmax_range(statistics: Statistics) -> tuple[float, float]:
    """The smallest and the largest value."""
    return statistics.low, statistics.high


def percentile_range(
    statistics: Statistics, percent: Fraction, *, symmetric: bool
) -> tuple[float, float]:
    """The range that holds at least ``percent`` of the values.

    Symmetric: the smallest ``[-t, t]``. Affine: at most half of the rest is cut at each end. The
    ends are edges of bins, so up to 2**-7 (of their own size) farther out than the exact
    percentile, and never beyond the smallest and the largest value. 100 percent is ``minmax``, and
    so is what would cut everything but zeros.

    Args:
        statistics: with counts.
        percent: more than 0, at most 100.
        symmetric: cut the same at both ends.

    References:
        H. Wu et al., Integer quantization for deep learning inference: principles and empirical
        evaluation, 2020, section 3.2. https://arxiv.org/abs/2004.09602
    """
    negative, positive, _ = _sides(statistics)
    rest = statistics.count * (100 - percent) / 100
    if symmetric:
        high = _cut(_fold(negative, positive), int(rest))
        low = -high
    else:
        # Where a whole side may be cut, the range ends at zero, which is part of every range.
        low, high = -_cut(negative, int(rest / 2)), _cut(positive, int(rest / 2))
    if low == high:
        return minmax_range(statistics)
    return max(statistics.low, low), min(statistics.high, high)


@dataclass(frozen=True)
class _Side:
    """Magnitudes of the values of one sign: bins ``[start, stop]`` in ascending order.

    Attributes:
        start: float64 ``(bins,)``, positive.
        stop: float64 ``(bins,)``, not less than ``start``.
        count: int64 ``(bins,)``, positive.
    """

    start: Floats
    stop: Floats
    count: Integers

    @property
    def total(self) -> int:
        return int(self.count.sum())

    @property
    def reach(self) -> float:
        return float(self.stop[-1]) if self.stop.size else 0.0

    @property
    def square(self) -> Floats:
        """Mean square of the values of each bin."""
        middle: Floats = (self.start + self.stop) / 2
        return middle**2 + (self.stop - self.start) ** 2 / 12

    def split(self, index: int) -> tuple[_Side, _Side]:
        """The first ``index`` bins, and the others."""
        parts = (slice(None, index), slice(index, None))
        first, second = (_Side(self.start[p], self.stop[p], self.count[p]) for p in parts)
        return first, second

    def coarse(self) -> _Side:
        """The same values in bins of an eighth of the resolution."""
        group = self.start.astype(np.float32).view(np.int32) >> 19
        first = np.flatnonzero(np.diff(group, prepend=-1))
        if not first.size:
            return self
        last = np.append(first[1:], group.size) - 1
        return _Side(self.start[first], self.stop[last], np.add.reduceat(self.count, first))


def _sides(statistics: Statistics) -> tuple[_Side, _Side, int]:
    """Negative and positive values, and the number of zeros.

    Magnitudes below 2**-133, which share the bin of zero, count as zero.
    """
    if statistics.counts is None:
        raise CalibrationError(_LACKS[statistics.kind, "counts"])
    counts = statistics.counts.numpy()
    sides = []
    for first, nearest, farthest in (
        (_NEGATIVE, -statistics.high, -statistics.low),
        (0, statistics.low, statistics.high),
    ):
        half = counts[first : first + _NEGATIVE].astype(np.int64)
        used = np.flatnonzero(half[1:]).astype(np.int32) + 1
        start, stop = (_magnitude(used + i) for i in (0, 1))
        # The extremes are known exactly, so the outermost bins need not be full.
        stop = np.minimum(stop, max(farthest, 0.0))
        start = np.minimum(np.maximum(start, nearest), stop)
        sides.append(_Side(start, stop, half[used]))
    return sides[0], sides[1], int(counts[0] + counts[_NEGATIVE])


def _magnitude(upper: NDArray[np.int32]) -> Floats:
    with np.errstate(invalid="ignore"):  # the bin after the largest is inf
        return (upper << 16).view(np.float32).astype(np.float64)


def _fold(negative: _Side, positive: _Side) -> _Side:
    """Magnitudes of both signs; bins that both have stay two."""
    start = np.concatenate((negative.start, positive.start))
    order = np.argsort(start, kind="stable")
    stop = np.concatenate((negative.stop, positive.stop))[order]
    count = np.concatenate((negative.count, positive.count))[order]
    return _Side(start[order], np.maximum.accumulate(stop) if stop.size else stop, count)


def _cut(side: _Side, cut: int) -> float:
    """Where a side ends when the outermost ``cut`` values may be left out; 0.0 for all of them."""
    beyond = np.cumsum(side.count[::-1])
    kept = int(np.searchsorted(beyond, cut, side="right"))
    return float(side.stop[side.stop.size - 1 - kept]) if kept < side.stop.size else 0.0


# -- least squared error ------------------------------------------------------------------------

_FEW_BINS = 256


def histogram_qparams(statistics: Statistics, scheme: TensorScheme) -> QParams:
    """Scale and zero point of the least expected squared error, rounding and clipping together.

    Scales are searched in four steps an octave, then around the best in 64 and in 1,024;
    each is rounded to float32 before it is judged, and all zero points with it (above 8 bits: 257
    of them). The parameters of ``minmax`` are a candidate, so the error is never expected to be
    larger than theirs.

    Args:
        statistics: with counts.
        scheme: format and symmetry.

    References:
        M. Nagel et al., A white paper on neural network quantization, 2021, section 3.1.
        https://arxiv.org/abs/2106.08295
    """
    fmt = scheme.format
    minmax = choose_qparams(statistics.low, statistics.high, scheme)
    negative, positive, _ = _sides(statistics)
    if not negative.total and not positive.total:
        return minmax
    steps = fmt.quant_max - fmt.quant_min
    if scheme.symmetric:
        below = np.array([-fmt.quant_min])
        largest = max(negative.reach / -fmt.quant_min, positive.reach / fmt.quant_max)
    elif not negative.total or not positive.total:
        below = np.array([0 if positive.total else steps])
        largest = max(negative.reach, positive.reach) / steps
    else:
        below = np.arange(0, steps + 1, max(1, steps // 256))
        # One step is lost where zero falls between two.
        largest = (negative.reach + positive.reach) / max(steps - 1, 1)
    smallest = largest * _least_reach(negative.total + positive.total, steps)
    # Powers of fixed fractions of 2: a scale does not inherit the last bits of the largest value.
    exponents = np.arange(_quarters(largest), _quarters(smallest) - 2, -1) / 4
    scales = _rounded(2.0**exponents)
    error = _errors(negative.coarse(), positive.coarse(), scales, below, steps)
    best = exponents[error.min(axis=1).argmin()]
    below = np.union1d(below, minmax.zero_point - fmt.quant_min)
    # Few bins: the error is jagged, and every step can be afforded.
    few = negative.count.size + positive.count.size <= _FEW_BINS
    for fraction, reach in ((1024, 256),) if few else ((64, 16), (1024, 16)):
        exponents = best + np.arange(reach, -reach - 1, -1) / fraction
        scales = np.append(minmax.scale, _rounded(2.0**exponents))
        error = _errors(negative, positive, scales, below, steps)
        best = exponents[error[1:].min(axis=1).argmin()]
    i, j = np.unravel_index(np.argmin(error), error.shape)
    return QParams(float(scales[i]), int(below[j]) + fmt.quant_min, fmt.quant_min, fmt.quant_max)


def expected_error(statistics: Statistics, qparams: QParams) -> float:
    """Mean squared quantization error that the counts let expect, clipping included.

    Args:
        statistics: with counts.
        qparams: per tensor.

    Raises:
        CalibrationError: there are no counts, or no values.
    """
    negative, positive, _ = _sides(statistics)
    if statistics.count == 0:
        raise CalibrationError("no data was seen, so no error can be expected")
    scales = np.array([float(qparams.scale)])
    below = np.array([qparams.zero_point - qparams.quant_min])
    error = _errors(negative, positive, scales, below, qparams.quant_max - qparams.quant_min)
    return float(error[0, 0]) / statistics.count


def _quarters(scale: float) -> int:
    """The logarithm to base 2 of a scale, in quarters, rounded up."""
    return math.ceil(math.log2(scale) * 4)


def _rounded(scales: Floats) -> Floats:
    return np.clip(scales, SMALLEST_NORMAL, LARGEST_FLOAT).astype(np.float32).astype(np.float64)


def _least_reach(count: int, steps: int) -> float:
    """Below what share of the whole range no scale is tried.

    One value out of ``count`` at the end of the range, the others anywhere below, are best
    served by clipping to about ``12 k**2 / count`` of it (where the derivatives of the squared
    clipping error of the one and of the rounding error of the others, ``s**2 / 12``, cancel); k
    is the number of steps to that end.
    """
    k = max(1, steps // 2)
    return min(1.0, 6.0 * k * k / count) / 4


def _errors(
    negative: _Side, positive: _Side, scales: Floats, below: Integers, steps: int
) -> Floats:
    """Expected sum of squared errors, ``(scales, zero points)``.

    Zero is a value of the format, so the two signs do not share any: with ``below`` steps for
    the negative values, the positive ones have the rest.
    """
    total = _side_errors(negative, scales, below) + _side_errors(positive, scales, steps - below)
    error: Floats = total * scales[:, None] ** 2
    return error


def _side_errors(side: _Side, scales: Floats, levels: Integers) -> Floats:
    """Expected sum of squared errors of one sign in units of the scale squared.

    With ``t = x / scale``, ``r`` the nearest integer and ``p = t - r``, the integral of ``p**2``
    from 0 to t is ``r / 12 + p**3 / 3``; where t is clipped to k, so is r. The error of a bin is
    the difference at its ends, by its width. For one scale, bins are rounded, cut in two by the
    last level, or clipped, so that sums over bins from either end serve all ``levels``.

    Args:
        side: magnitudes.
        scales: float64 ``(s,)``.
        levels: int64 ``(k,)``; steps from zero to the last level.

    Returns:
        float64 ``(s, k)``.
    """
    if not side.count.size:
        return np.zeros((scales.size, levels.size))
    s = scales[:, None]
    # Whatever the scale, these round to zero: most bins, and the cheapest to sum.
    small = int(np.searchsorted(side.stop, scales.min() / 2, side="right"))
    low, side = side.split(small)
    count = side.count.astype(np.float64)
    start, stop = side.start / s, side.stop / s
    nearest, nearest_stop = np.rint(start), np.rint(stop)
    p, q = start - nearest, stop - nearest_stop
    alone = nearest == nearest_stop  # no edge between two levels in the bin, and perhaps no width
    across = (nearest_stop - nearest) / 12 + (q**3 - p**3) / 3
    rounding = count * np.where(
        alone, (p * p + p * q + q * q) / 3, across / np.where(alone, 1.0, stop - start)
    )
    to_zero = (low.count * low.square).sum() / s**2
    rounded = np.cumsum(np.append(to_zero, rounding, axis=1), axis=1)

    last = levels.astype(np.float64)
    limit = (last + 0.5) * s
    whole = np.searchsorted(side.stop, limit, side="right")  # bins below are rounded as a whole
    clipped = np.searchsorted(side.start, limit, side="left")  # bins from here are clipped
    middle = (side.start + side.stop) / 2
    m0, m1, m2 = (_sums_from(x) for x in (count, count * middle, count * side.square))
    beyond = m2[clipped] / s**2 - 2 * last * (m1[clipped] / s) + last**2 * m0[clipped]
    total: Floats = np.take_along_axis(rounded, whole, axis=1) + np.maximum(beyond, 0.0)

    rows, columns = np.nonzero(clipped > whole)
    bins = whole[rows, columns]
    k, t = last[columns], start[rows, bins]
    r = np.minimum(nearest[rows, bins], k)
    end = stop[rows, bins]
    cut = (k - r) / 12 + ((end - k) ** 3 - (t - r) ** 3) / 3
    total[rows, columns] += count[bins] * cut / (end - t)
    return total


def _sums_from(values: Floats) -> Floats:
    """``sum(values[i:])`` for each i, and 0."""
    sums: Floats = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    return sums


# -- least divergence ---------------------------------------------------------------------------

_LINEAR_BINS = 2048
_FIRST_BINS = 128
_BINS_STEP = 8


def entropy_range(statistics: Statistics, scheme: TensorScheme) -> tuple[float, float]:
    """The range with the least Kullback-Leibler divergence between values and their integers.

    The values are spread over 2,048 equal bins up to the largest magnitude. For each threshold of
    128, 136, ... 2,048 bins, the reference is the histogram with everything beyond in its outermost
    bins, and the candidate merges the histogram's bins into as many cells as the format has
    integers and spreads each cell evenly over those of its bins that are not empty. Symmetric
    formats compare magnitudes; for affine ones the threshold cuts both signs. Of equals, the
    largest threshold wins. Where the format has as many integers as there are bins (above 10 bits),
    nothing is merged, and the range is that of ``minmax``.

    Zeros, which the reference implementation replaces by the count of the bin beside them, are
    left out: no format here changes them.

    Args:
        statistics: with counts.
        scheme: format and symmetry.

    References:
        S. Migacz, 8-bit inference with TensorRT, GTC 2017, slides 23 to 28 and 38 to 41.
        ``_compute_amax_entropy`` in NVIDIA's pytorch-quantization, ``calib/histogram.py``.
    """
    fmt = scheme.format
    negative, positive, _ = _sides(statistics)
    farthest = max(negative.reach, positive.reach)
    cells = fmt.quant_max + 1 if scheme.symmetric else fmt.quant_max - fmt.quant_min + 1
    first = max(_FIRST_BINS, cells)
    width = farthest / _LINEAR_BINS
    if first >= _LINEAR_BINS or width < SMALLEST_NORMAL:
        return minmax_range(statistics)
    if scheme.symmetric:
        mass = _linear(negative, width, _LINEAR_BINS) + _linear(positive, width, _LINEAR_BINS)
        zero = 0
    else:
        zero, above = (int(np.ceil(side.reach / width)) for side in (negative, positive))
        mass = np.append(_linear(negative, width, zero)[::-1], _linear(positive, width, above))
    threshold = np.append(np.arange(first, _LINEAR_BINS, _BINS_STEP), _LINEAR_BINS)
    start = zero - np.minimum(threshold, zero)
    stop = zero + np.minimum(threshold, mass.size - zero)
    divergence = _divergence(mass, start, stop, cells)
    # Not the least itself: equal divergences differ in their last bits.
    reach = float(threshold[divergence <= divergence.min() + 1e-12][-1]) * width
    return max(statistics.low, -reach), min(statistics.high, reach)


def _linear(side: _Side, width: float, bins: int) -> Floats:
    """Counts of a side in ``bins`` bins of equal ``width`` from zero."""
    if not side.count.size:
        return np.zeros(bins)
    nodes = np.stack((side.start, side.stop), axis=1).reshape(-1)
    after = np.cumsum(side.count).astype(np.float64)
    sums = np.stack((after - side.count, after), axis=1).reshape(-1)
    mass: Floats = np.diff(np.interp(np.arange(bins + 1) * width, nodes, sums))
    return np.maximum(mass, 0.0)


def _divergence(mass: Floats, start: Integers, stop: Integers, cells: int) -> Floats:
    """Divergence of each candidate range ``[start, stop)`` of bins, inf where it has no density.

    Args:
        mass: float64 ``(bins,)``, not negative.
        start: int64 ``(candidates,)``, first bin.
        stop: int64 ``(candidates,)``, one past the last bin.
        cells: bins are merged into that many, of widths as equal as whole bins allow.
    """
    sums, filled, logs = (
        np.append(0.0, np.cumsum(values)) for values in (mass, mass > 0, _x_log_x(mass))
    )
    spread = (stop - start)[:, None] * np.arange(cells + 1)
    edges = start[:, None] - (-spread // cells)
    cell, bins = np.diff(sums[edges]), np.diff(filled[edges])
    density = cell / np.maximum(bins, 1.0)
    total, inside = sums[-1], sums[stop] - sums[start]
    reference, cross = logs[stop] - logs[start], (cell * _log(density)).sum(axis=1)
    possible = inside > 0
    for clipped, end, edge in (
        (sums[start], start, 0),
        (total - sums[stop], stop - 1, -1),
    ):
        own = mass[end]
        # The outermost bin lies in the outermost cell that holds any bin at all.
        held = np.diff(edges) > 0
        column = held.argmax(axis=1) if edge == 0 else cells - 1 - held[:, ::-1].argmax(axis=1)
        outermost = density[np.arange(end.size), column]
        reference += _x_log_x(own + clipped) - _x_log_x(own)
        cross += clipped * _log(outermost)
        possible &= (own > 0) | (clipped == 0)
    result = (reference - cross) / total + _log(inside) - np.log(total)
    return np.where(possible, result, np.inf)


def _log(values: Floats) -> Floats:
    logs: Floats = np.log(np.where(values > 0, values, 1.0))
    return logs


def _x_log_x(values: Floats) -> Floats:
    return values * _log(values)
