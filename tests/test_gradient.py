"""Adam against torch's, on quadratics, in a box, and where losses are not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.gradient import adam_descend

FREE = {"low": -np.inf, "high": np.inf}


def quadratic(centre, scales):
    """Sum of scales * (x - centre)^2, with its gradient."""

    def gradient_of(x):
        return float((scales * (x - centre) ** 2).sum()), 2 * scales * (x - centre)

    return gradient_of


def adam_of_torch(centre, scales, start, steps, learning_rate):
    """Points (steps, ...) that torch visits, the start first."""
    x = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=learning_rate)
    visited = []
    for _ in range(steps):
        visited.append(x.detach().numpy().copy())
        optimizer.zero_grad()
        (torch.tensor(scales) * (x - torch.tensor(centre)) ** 2).sum().backward()
        optimizer.step()
    return np.array(visited)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1e-3, 0.02, 0.5]))
def test_every_step_is_torchs(seed, steps, learning_rate):
    rng = np.random.default_rng(seed)
    centre, start = rng.normal(size=(2, 3, 4))
    scales = rng.lognormal(sigma=2, size=(3, 4))
    visited = []
    gradient_of = quadratic(centre, scales)

    def noted(x):
        visited.append(x)
        return gradient_of(x)

    descent = adam_descend(noted, start, steps=steps, learning_rate=learning_rate, **FREE)
    expected = adam_of_torch(centre, scales, start, steps, learning_rate)
    np.testing.assert_allclose(visited, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(descent.losses, [gradient_of(x)[0] for x in visited])
    assert descent.best_loss == min(descent.losses)
    assert np.array_equal(descent.best, visited[int(np.argmin(descent.losses))])


def test_a_quadratic_is_descended_to_its_minimum():
    centre = np.array([0.3, -1.2, 2.0])
    gradient_of = quadratic(centre, np.array([1.0, 10.0, 0.1]))
    descent = adam_descend(gradient_of, np.zeros(3), steps=500, learning_rate=0.1, **FREE)
    np.testing.assert_allclose(descent.best, centre, atol=1e-2)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=2), st.integers(1, 60))
def test_no_point_lies_outside_the_box_and_the_best_is_the_closest_corner(start, steps):
    low, high = np.array([-np.inf, -0.5]), np.array([0.25, 0.5])
    visited = []

    def noted(x):
        visited.append(x)
        return quadratic(np.array([3.0, -3.0]), np.ones(2))(x)

    descent = adam_descend(noted, np.array(start), steps=steps, learning_rate=0.1, low=low, high=high)
    assert all((low <= x).all() and (x <= high).all() for x in visited)
    if steps == 60:
        assert descent.best.tolist() == [0.25, -0.5]


def test_the_best_point_is_kept_when_steps_overshoot():
    descent = adam_descend(
        quadratic(np.zeros(1), np.ones(1)), np.array([0.1]), steps=3, learning_rate=5.0, **FREE
    )
    assert descent.best.tolist() == [0.1]
    assert descent.best_loss == descent.losses[0] < min(descent.losses[1:])


def test_a_loss_that_is_not_finite_ends_the_descent_with_what_it_has():
    losses = iter([3.0, 2.0, math.nan, 1.0])
    descent = adam_descend(
        lambda x: (next(losses), np.ones(2)), np.zeros(2), steps=9, learning_rate=0.1, **FREE
    )
    assert descent.losses.tolist() == [3.0, 2.0]
    assert descent.best_loss == 2.0
    np.testing.assert_allclose(descent.best, -0.1)


def test_a_gradient_that_is_not_finite_ends_it_after_the_loss_counted():
    gradients = iter([np.ones(2), np.array([0.0, math.inf])])
    descent = adam_descend(
        lambda x: (float(x.sum()), next(gradients)), np.zeros(2), steps=9, learning_rate=0.1, **FREE
    )
    np.testing.assert_allclose(descent.losses, [0, -0.2])
    np.testing.assert_allclose(descent.best, -0.1)


def test_a_start_without_a_finite_loss_is_returned_within_the_box():
    descent = adam_descend(
        lambda x: (math.nan, x), np.array([2.0, 0.5]), steps=3, learning_rate=0.1, low=0, high=1
    )
    assert descent.best.tolist() == [1.0, 0.5]
    assert math.isnan(descent.best_loss)
    assert len(descent.losses) == 0


def test_the_start_is_left_as_it_was_even_if_the_function_writes_to_its_argument():
    start = np.ones(2)

    def spoil(x):
        x[:] = 9
        return 1.0, np.ones(2)

    descent = adam_descend(spoil, start, steps=2, learning_rate=0.1, **FREE)
    assert start.tolist() == descent.best.tolist() == [1, 1]


def test_a_descent_goes_on_while_it_may():
    answers = iter([True, True, False])
    descent = adam_descend(
        lambda x: (float(x.sum()), np.ones(1)),
        np.zeros(1),
        steps=9,
        learning_rate=0.1,
        go_on=lambda: next(answers),
        **FREE,
    )
    np.testing.assert_allclose(descent.losses, [0, -0.1, -0.2])


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        adam_descend(lambda x: (0.0, x), np.zeros(1), steps=0, learning_rate=0.1, **FREE)
