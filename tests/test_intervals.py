"""Means and their intervals: against every resample there is, and what carries no spread."""

from itertools import product

import numpy as np
import pytest

from benchmarks.intervals import Estimate, estimate_mean


def test_the_interval_is_that_of_all_resamples_there_are():
    values = [0.90, 0.95, 0.97, 0.98, 0.99]
    means = [np.mean(resample) for resample in product(values, repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = estimate_mean(values)
    assert (found.mean, found.least, found.most, found.n) == (pytest.approx(0.958), 0.90, 0.99, 5)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))


def test_the_same_values_give_the_same_interval_and_order_does_not_matter_much():
    values = [3.0, 1.0, 2.0, 7.0]
    assert estimate_mean(values) == estimate_mean(values)
    assert estimate_mean(sorted(values)).high == pytest.approx(estimate_mean(values).high, rel=0.05)


@pytest.mark.parametrize("values", [[0.5], [0.5] * 5])
def test_without_spread_both_ends_are_the_mean(values):
    assert estimate_mean(values) == Estimate(0.5, 0.5, 0.5, 0.5, 0.5, len(values))


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([])
