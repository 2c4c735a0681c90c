"""Transforms: increasing, invertible, with the right slope, and Gaussians that spread as asked."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.transforms import SMALL_COEFFICIENT, Scale, Sign, invert, match_spread, pick_transform

TRANSFORMS = {
    f"{sign} {scale}": pick_transform(sign, scale) for sign in get_args(Sign) for scale in get_args(Scale)
}
ORACLES = {
    "signed plain": lambda x: x,
    "non_negative plain": lambda x: 0.1 * np.log(1 + np.exp(x / 0.1)),
    "signed log": lambda x: 0.1 * np.sinh(x / 0.1),
    "non_negative log": np.exp,
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
numbers = st.lists(st.floats(-2, 2), min_size=2, max_size=20).map(np.array)


@every_transform
@given(numbers)
def test_a_transform_is_its_formula(name, raw):
    np.testing.assert_allclose(TRANSFORMS[name].forward(raw), ORACLES[name](raw), rtol=1e-9, atol=1e-15)


@every_transform
@given(numbers)
def test_the_inverse_undoes_a_transform(name, raw):
    transform = TRANSFORMS[name]
    np.testing.assert_allclose(transform.inverse(transform.forward(raw)), raw, rtol=1e-9, atol=1e-9)


@every_transform
@given(numbers)
def test_the_slope_is_what_finite_differences_say(name, raw):
    transform, step = TRANSFORMS[name], 1e-5
    differences = (transform.forward(raw + step) - transform.forward(raw - step)) / (2 * step)
    np.testing.assert_allclose(transform.slope(raw), differences, rtol=1e-6, atol=1e-9)


@every_transform
@given(numbers)
def test_a_transform_increases_and_stays_above_its_infimum(name, raw):
    transform = TRANSFORMS[name]
    coefficients = transform.forward(np.unique(raw.round(6)))
    assert (np.diff(coefficients) > 0).all()
    assert (coefficients > transform.infimum).all()


@every_transform
@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=20).map(np.array))
def test_the_wildest_numbers_stay_finite_both_ways(name, values):
    transform = TRANSFORMS[name]
    assert np.isfinite(transform.forward(values)).all()
    assert np.isfinite(transform.slope(values)).all()
    raw = invert(transform, values)
    assert np.isfinite(raw).all()
    spread = match_spread(transform, raw, np.full_like(raw, 0.1))
    assert np.isfinite(spread).all()
    assert (spread > 0).all()


@pytest.mark.parametrize("scale", get_args(Scale))
def test_what_no_number_gives_in_a_non_negative_space_becomes_small(scale):
    transform = pick_transform("non_negative", scale)
    found = transform.forward(invert(transform, np.array([-5.0, 0.0, 1e-9, 0.3])))
    np.testing.assert_allclose(found, [SMALL_COEFFICIENT, SMALL_COEFFICIENT, 1e-9, 0.3], rtol=1e-6)


def test_a_plain_signed_number_spreads_as_its_coefficient_to_the_last_bit():
    spread = np.array([0.1, 0.3, 1e-6])
    np.testing.assert_array_equal(
        match_spread(pick_transform("signed", "plain"), np.zeros(3), spread), spread
    )


@every_transform
def test_a_small_spread_is_divided_by_the_slope(name):
    transform, raw = TRANSFORMS[name], np.array([-1.5, -0.3, 0.0, 0.4])
    found = match_spread(transform, raw, 1e-5 * transform.slope(raw))
    np.testing.assert_allclose(found, 1e-5, rtol=1e-5)


@every_transform
@pytest.mark.parametrize("value", [1e-3, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
def test_coefficients_of_a_gaussian_spread_as_asked_even_where_the_slope_vanishes(name, value, spread):
    transform = TRANSFORMS[name]
    raw = transform.inverse(np.array([value]))
    width = match_spread(transform, raw, np.array([spread]))
    z = np.linspace(-14, 14, 200_001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    coefficients = transform.forward(raw + width * z)
    deviations = coefficients - density @ coefficients
    assert np.sqrt(density @ deviations**2) == pytest.approx(spread, rel=0.02)


def test_the_spread_of_an_exponential_is_that_of_a_lognormal():
    transform, value, spread = pick_transform("non_negative", "log"), np.array([1e-3, 0.1, 2]), 0.1
    squares = (1 + np.sqrt(1 + 4 * (spread / value) ** 2)) / 2  # exp(s^2), from its variance
    found = match_spread(transform, np.log(value), np.full(3, spread))
    np.testing.assert_allclose(found, np.sqrt(np.log(squares)), rtol=1e-6)
