"""Means over seeds with intervals of Student's t, and differences paired by seed.

NaN and None stand for "not measured" and never count.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """mean ± half_width; both NaN without a value, half_width NaN with a single one."""

    mean: float
    half_width: float
    count: int  # values that were measured


class Difference(NamedTuple):
    """A mean difference over the seeds that both sides have, and its t-test against 0."""

    mean: float  # NaN without a common seed
    half_width: float  # NaN with fewer than two
    p_value: float  # two-sided, in [0, 1]; NaN with fewer than two
    count: int  # common seeds

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of mean ± half_width; False where there is no interval."""
        return abs(self.mean) > self.half_width


class Band(NamedTuple):
    """A mean curve with an interval at each epoch; arrays of one length."""

    epochs: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray  # NaN where fewer than two runs have the epoch
    count: np.ndarray  # runs that have the epoch


def mean_interval(values: Iterable[float | None], confidence: float = CONFIDENCE) -> Interval:
    """Mean and half width t_{(1+c)/2, n−1} s / √n, s² the sample variance (divided by n − 1).

    Args:
      values: one a run, independent of each other.
      confidence: c in (0, 1).
    """
    x = _measured(values)
    n = len(x)
    if n < 2:
        return Interval(float(x[0]) if n else math.nan, math.nan, n)
    half_width = stats.t.ppf((1 + confidence) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n)
    return Interval(float(x.mean()), float(half_width), n)


def paired_difference(
    values: Mapping[Any, float | None],
    baseline: Mapping[Any, float | None],
    confidence: float = CONFIDENCE,
) -> Difference:
    """Mean of values − baseline over common keys (seeds), its t-interval and paired t-test.

    Pairing takes out what a seed does to both, so the interval is often far narrower than those of
    the two means. It is not corrected for the number of comparisons that a table makes.
    """
    pairs = [(value, baseline.get(key)) for key, value in values.items()]
    differences = [a - b for a, b in pairs if _is_measured(a) and _is_measured(b)]
    mean, half_width, n = mean_interval(differences, confidence)
    if n < 2:
        return Difference(mean, half_width, math.nan, n)
    error = np.std(differences, ddof=1) / math.sqrt(n)
    if error == 0:  # all differences alike: no doubt, or no difference
        return Difference(mean, half_width, 1.0 if mean == 0 else 0.0, n)
    return Difference(mean, half_width, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def band(runs: Sequence[Mapping[int, float | None]], confidence: float = CONFIDENCE) -> Band:
    """Mean and interval at each epoch over runs, given as epoch ↦ value.

    Runs of unequal length count where they have a value; epochs that none has are left out.
    """
    at: dict[int, list[float]] = {}
    for run in runs:
        for epoch, value in run.items():
            if _is_measured(value):
                at.setdefault(epoch, []).append(value)
    epochs = sorted(at)
    intervals = [mean_interval(at[epoch], confidence) for epoch in epochs]
    columns = np.array(intervals, float).reshape(-1, 3).T
    return Band(np.array(epochs, int), columns[0], columns[1], columns[2].astype(int))


def _is_measured(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _measured(values: Iterable[float | None]) -> np.ndarray:
    return np.array([value for value in values if _is_measured(value)], float)
