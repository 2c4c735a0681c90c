"""Profiles: windows add up to 1, factors stay within their knots, and fits find what made a table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.profiles import fit_knots, fit_weights, make_windows

DEPTHS = np.linspace(0, 1, 9)
WINDOWS = make_windows(DEPTHS, 3)


def table_of(weights, knots):
    return np.asarray(weights, dtype=float) * (WINDOWS @ np.asarray(knots, dtype=float))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).map(np.array), st.integers(2, 9))
def test_windows_are_a_partition_of_unity(depths, n_knots):
    windows = make_windows(depths, n_knots)
    assert windows.shape == (len(depths), n_knots)
    assert (windows >= 0).all()
    np.testing.assert_allclose(windows.sum(axis=1), 1, rtol=1e-12)
    assert ((windows > 0).sum(axis=1) <= 2).all()


def test_a_knot_counts_alone_at_its_depth_and_halves_with_its_neighbour_between():
    np.testing.assert_allclose(make_windows(np.linspace(0, 1, 4), 4), np.eye(4), atol=1e-15)
    np.testing.assert_allclose(make_windows(np.array([0.5]), 2), [[0.5, 0.5]])
    np.testing.assert_allclose(
        make_windows(np.array([0.25]), 2), [[(1 + np.sqrt(0.5)) / 2, (1 - np.sqrt(0.5)) / 2]]
    )


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0, 1))
def test_a_factor_stays_within_the_range_of_its_knots(knots, depth):
    factor = (make_windows(np.array([depth]), 4) @ np.array(knots)).item()
    assert min(knots) - 1e-12 <= factor <= max(knots) + 1e-12


def test_a_weight_is_the_mean_over_rows():
    table = np.array([[1.0, -2.0, 0.0], [3.0, -4.0, 0.0]])
    for is_shared in (False, True):
        np.testing.assert_allclose(fit_weights(table, is_shared=is_shared, is_signed=True), [2, -3, 0])
    np.testing.assert_allclose(fit_weights(table, is_shared=False, is_signed=False), [2, 3, 0])


def test_a_profile_that_averages_to_nothing_is_weighed_by_its_size():
    table = np.array([[1.0, -2.0], [-1.0, 2.0]])
    np.testing.assert_allclose(fit_weights(table, is_shared=False, is_signed=True), [1, 2])
    shared = fit_weights(table, is_shared=True, is_signed=True)
    np.testing.assert_allclose(shared * np.sign(shared[0]), [1, -2])


@pytest.mark.parametrize("is_signed", [True, False])
@given(
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=3, max_size=3),
)
def test_a_table_made_of_profiles_is_fitted_exactly(is_signed, weights, knots):
    table = table_of(weights, knots)
    fitted = fit_weights(table, is_shared=False, is_signed=is_signed)
    found = fit_knots(table, fitted, WINDOWS, is_shared=False)
    assert is_signed or (fitted >= 0).all()
    np.testing.assert_allclose(fitted * (WINDOWS @ found), table, atol=1e-12)
    assert np.abs(found).max() < 20


@pytest.mark.parametrize("is_signed", [True, False])
@given(
    st.lists(st.integers(-5, 5), min_size=4, max_size=4),
    st.lists(st.integers(-3, 3), min_size=3, max_size=3),
)
def test_a_table_of_one_shared_profile_is_fitted_exactly(is_signed, weights, knots):
    table = table_of(weights if is_signed else np.abs(weights), np.reshape(knots, (3, 1)))
    fitted = fit_weights(table, is_shared=True, is_signed=is_signed)
    found = fit_knots(table, fitted, WINDOWS, is_shared=True)
    assert found.shape == (3, 1)
    assert is_signed or (fitted >= -1e-12).all()
    np.testing.assert_allclose(fitted * (WINDOWS @ found), table, atol=1e-12)


def test_knots_are_the_best_there_are_for_a_table_that_no_profile_makes():
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(9, 4)), np.array([0.5, -1, 2, 0.1])
    for is_shared in (True, False):
        knots = fit_knots(table, weights, WINDOWS, is_shared=is_shared)
        best = ((weights * (WINDOWS @ knots) - table) ** 2).sum()
        for _ in range(20):
            other = knots + 0.01 * rng.normal(size=knots.shape)
            assert ((weights * (WINDOWS @ other) - table) ** 2).sum() > best


def test_knots_that_no_row_tells_about_stay_flat():
    knots = fit_knots(np.array([[6.0]]), np.array([2.0]), make_windows(np.array([0.0]), 4), is_shared=False)
    np.testing.assert_allclose(knots, [[3], [1], [1], [1]])


def test_an_adapter_without_coefficients_has_a_flat_profile():
    table, weights = np.zeros((9, 2)), np.array([1e-3, 0.0])
    for is_shared in (True, False):
        assert (fit_knots(table, weights, WINDOWS, is_shared=is_shared) == 1).all()


def test_small_coefficients_have_a_profile_all_the_same():
    table = 1e-7 * table_of([1, 2], [[1], [0], [2]])
    for is_shared in (True, False):
        fitted = fit_weights(table, is_shared=is_shared, is_signed=True)
        knots = fit_knots(table, fitted, WINDOWS, is_shared=is_shared)
        np.testing.assert_allclose(fitted * (WINDOWS @ knots), table, rtol=1e-9, atol=1e-20)
