"""Two models on the same samples: how far apart they are, and how sure that is.

Only samples on which the two differ say anything about their difference. Comparing the intervals
of two accuracies ignores that the samples are the same, and misses differences that are real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CONFIDENCE",
    "PairedCounts",
    "PairedDifference",
    "compare_counts",
    "compare_values",
    "share_interval",
]

CONFIDENCE = 0.95
"""Share of repetitions whose interval holds the true value."""


@dataclass(frozen=True)
class PairedCounts:
    """Samples by which of two models is right.

    Attributes:
        both: right in both.
        only_first: right in the first model only.
        only_second: right in the second model only.
        neither: wrong in both.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def samples(self) -> int:
        """All of them."""
        return self.both + self.only_first + self.only_second + self.neither


@dataclass(frozen=True)
class PairedDifference:
    """A model's mean score less that of the first, on the same samples.

    Attributes:
        difference: positive where the model is above the first.
        low: lower end of the 95 % confidence interval of the true difference.
        high: upper end.
        p_value: probability, were the two equally good, of a difference at least as large.
        method: of test and interval.
        counts: for shares of correct samples; ``None`` for other scores.
    """

    difference: float
    low: float
    high: float
    p_value: float
    method: str
    counts: PairedCounts | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the difference cannot be told from noise: the test decides, at 5 %."""
        return self.p_value >= 1 - CONFIDENCE


def share_interval(right: int, samples: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of samples, 0 to 1.

    Args:
        right: how many of the samples count.
        samples: at least one.

    References:
        E. B. Wilson. Probable inference, the law of succession, and statistical inference. Journal
        of the American Statistical Association 22, 1927.
    """
    from scipy.stats import binomtest  # half a second that only comparisons have to wait

    found = binomtest(right, samples).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def compare_counts(counts: PairedCounts) -> PairedDifference:
    """Difference of two accuracies: exact McNemar test, Newcombe's interval.

    The test is the exact binomial one on the samples where only one of the two is right. The
    interval combines the Wilson intervals of the two accuracies with their correlation; it stays
    informative where no sample differs.

    Raises:
        ValueError: there is no sample.

    References:
        Q. McNemar. Note on the sampling error of the difference between correlated proportions or
        percentages. Psychometrika 12, 1947.
        R. G. Newcombe. Improved confidence intervals for the difference between binomial
        proportions based on paired data. Statistics in Medicine 17, 1998, method 10.
    """
    from scipy.stats import binomtest

    n = counts.samples
    if n == 0:
        raise ValueError("there is no sample to compare on")
    e, f, g, h = counts.both, counts.only_second, counts.only_first, counts.neither
    shares = [(e + f) / n, (e + g) / n]
    wilson = [share_interval(right, n) for right in (e + f, e + g)]
    marginals = (e + f) * (g + h) * (e + g) * (f + h)
    product = float(e * h - f * g)
    if product > 0:
        product = max(product - n / 2, 0.0)  # the continuity correction of method 10
    phi = product / math.sqrt(marginals) if marginals else 0.0
    down = [share - low for share, (low, _) in zip(shares, wilson, strict=True)]
    up = [high - share for share, (_, high) in zip(shares, wilson, strict=True)]
    difference = (f - g) / n
    return PairedDifference(
        difference,
        difference - _hypotenuse(down[0], up[1], phi),
        difference + _hypotenuse(up[0], down[1], phi),
        float(binomtest(f, f + g).pvalue) if f + g else 1.0,
        "exact McNemar test, Newcombe's interval (method 10)",
        counts,
    )


def _hypotenuse(a: float, b: float, phi: float) -> float:
    """Third side of a triangle whose sides a and b enclose an angle of cosine phi."""
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def compare_values(differences: Sequence[float]) -> PairedDifference:
    """Mean of the differences of two scores per sample: paired t test and interval.

    Args:
        differences: the model's score less the first's, one per sample.

    Raises:
        ValueError: there is no sample.

    References:
        Student. The probable error of a mean. Biometrika 6, 1908.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("there is no sample to compare on")
    mean = math.fsum(differences) / n
    method = "paired t test and interval"
    if n == 1:
        return PairedDifference(mean, -math.inf, math.inf, 1.0, method)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    error = math.sqrt(variance / n)
    if error == 0:
        # Every sample moved by the same amount: no spread from which to estimate noise.
        return PairedDifference(mean, mean, mean, 1.0 if mean == 0 else 0.0, method)
    from scipy.stats import t

    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    p_value = 2 * float(t.sf(abs(mean) / error, n - 1))
    return PairedDifference(mean, mean - reach, mean + reach, p_value, method)
