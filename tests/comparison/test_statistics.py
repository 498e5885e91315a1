import math

import numpy as np
import pytest
from scipy import stats

from dfkd_jax.comparison.statistics import band, mean_interval, paired_difference

NAN = math.nan


def test_the_interval_of_a_mean_is_that_computed_by_hand():
    # s² = (1.5² + 0.5² + 0.5² + 1.5²) / 3 = 5/3; t of 0.975 with 3 degrees of freedom, from a table
    mean, half_width, count = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, count) == (2.5, 4)
    assert half_width == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)


def test_two_values_use_one_degree_of_freedom():
    # Student's t with one degree of freedom is Cauchy's: its quantile is tan(π (q − 1/2)).
    _, half_width, _ = mean_interval([0.0, 2.0])
    assert half_width == pytest.approx(math.tan(math.pi * 0.475) * 1.0)
    _, half_width, _ = mean_interval([0.0, 2.0], confidence=0.5)
    assert half_width == pytest.approx(1.0)


def test_what_was_not_measured_does_not_count():
    assert mean_interval([1.0, None, NAN, math.inf, 3.0]) == mean_interval([1.0, 3.0])
    assert mean_interval([5.0])[0] == 5.0 and math.isnan(mean_interval([5.0]).half_width)
    empty = mean_interval([None])
    assert math.isnan(empty.mean) and math.isnan(empty.half_width) and empty.count == 0


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (2000, 5))
    intervals = [mean_interval(sample) for sample in samples]
    covered = np.mean([abs(mean - 3.0) <= half for mean, half, _ in intervals])
    assert 0.935 < covered < 0.965


def test_paired_differences_are_those_computed_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t = 2 √3; with two degrees of freedom the two-sided
    # p-value is 1 − t / √(2 + t²), and t of 0.975 is 4.302653.
    values, baseline = {1: 10.0, 2: 12.0, 3: 14.0}, {1: 9.0, 2: 10.0, 3: 11.0}
    found = paired_difference(values, baseline)
    t = 2 * math.sqrt(3)
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert not found.excludes_zero and found.p_value > 0.05


def test_only_common_seeds_are_paired():
    values, baseline = {1: 1.0, 2: 2.0, 7: 100.0, 8: None}, {3: 0.0, 2: 0.5, 1: 0.0, 8: 5.0}
    found = paired_difference(values, baseline)
    assert (found.mean, found.count) == (1.25, 2)
    single = paired_difference({1: 3.0, 2: 1.0}, {1: 1.0})
    assert (single.mean, single.count, single.excludes_zero) == (2.0, 1, False)
    assert math.isnan(single.half_width) and math.isnan(single.p_value)
    none = paired_difference({1: 3.0}, {2: 1.0})
    assert none.count == 0 and math.isnan(none.mean) and not none.excludes_zero


def test_the_mark_agrees_with_the_p_value_and_the_reference():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.5, 1.0, 2.0):
        a, b = rng.normal(shift, 1, 6), rng.normal(0, 1, 6)
        found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
        reference = stats.ttest_rel(a, b)
        low, high = reference.confidence_interval(0.95)
        assert found.p_value == pytest.approx(reference.pvalue)
        assert found.mean - found.half_width == pytest.approx(low)
        assert found.mean + found.half_width == pytest.approx(high)
        assert found.excludes_zero == (found.p_value < 0.05)


def test_equal_differences_leave_no_doubt():
    same = paired_difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})
    assert (same.mean, same.half_width, same.p_value, same.excludes_zero) == (0, 0, 1, False)
    shifted = paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (shifted.mean, shifted.half_width, shifted.p_value) == (1, 0, 0)
    assert shifted.excludes_zero


def test_a_band_has_each_epoch_that_some_run_has():
    curve = band([{1: 1.0, 2: 2.0, 3: None}, {1: 3.0, 2: NAN, 4: 8.0}])
    assert curve.epochs.tolist() == [1, 2, 4]
    assert curve.mean.tolist() == [2.0, 2.0, 8.0]
    assert curve.count.tolist() == [2, 1, 1]
    assert curve.half_width[0] == pytest.approx(mean_interval([1.0, 3.0]).half_width)
    assert np.isnan(curve.half_width[1:]).all()
    assert band([{1: None}]).epochs.size == 0 and band([]).mean.size == 0
