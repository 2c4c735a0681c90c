"""Rank correlations against scipy, intervals that hold what they should, and the bound on made-up answers."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.fidelity_statistics import (
    COMBINES,
    WHERE,
    Judge,
    best_quarter,
    check_bound,
    draw_subsets,
    spearman,
)


@pytest.fixture
def merges():
    """Losses that follow held-in accuracy but for noise, and held-out accuracy not at all."""
    rng = np.random.default_rng(0)
    held_in, held_out = rng.uniform(size=(2, 200))
    return held_in, held_out, -held_in + rng.normal(0, 0.2, 200)


def test_a_lower_loss_should_mean_a_higher_accuracy():
    accuracies = np.array([0.1, 0.4, 0.2, 0.9])
    assert spearman(-accuracies, accuracies) == pytest.approx(1)
    assert spearman(accuracies**3, accuracies) == pytest.approx(-1)


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0], [1.0, 2.0]])
def test_what_ranks_nothing_has_no_correlation(losses):
    assert np.isnan(spearman(np.array(losses), np.arange(len(losses)) / 10))


def test_correlations_are_scipys_overall_and_in_the_best_quarter(merges):
    held_in, held_out, losses = merges
    found = Judge(held_in, held_out).judge(losses)
    best = np.argsort(-held_in)[:50]
    expected = [
        -spearmanr(losses[rows], a[rows]).statistic for a in (held_in, held_out) for rows in (..., best)
    ]
    np.testing.assert_allclose([found[name].rho for name in WHERE], expected)


def test_intervals_hold_the_correlation_and_are_those_of_a_slow_bootstrap(merges):
    held_in, held_out, losses = merges
    found = Judge(held_in, held_out, n_resamples=2_000).judge(losses)
    assert all(rank.low <= rank.rho <= rank.high for rank in found.values())
    assert found["held_in"].low > 0.5
    assert found["held_out"].low < 0 < found["held_out"].high
    rng, slow = np.random.default_rng(7), []
    for _ in range(500):
        rows = rng.integers(200, size=200)
        own = rows[best_quarter(held_in[rows])]
        slow.append((spearman(losses[rows], held_in[rows]), spearman(losses[own], held_in[own])))
    for k, name in enumerate(("held_in", "held_in_best")):
        expected = np.percentile([pair[k] for pair in slow], [2.5, 97.5])
        np.testing.assert_allclose([found[name].low, found[name].high], expected, atol=0.06)


def test_accuracies_that_are_all_equal_give_no_interval():
    found = Judge(np.linspace(0, 1, 8), np.zeros(8)).judge(np.linspace(1, 0, 8))
    assert found["held_in"].rho == pytest.approx(1)
    assert np.isnan([found["held_out"].rho, found["held_out"].low, found["held_out"].high]).all()


def test_every_combination_is_least_where_all_experts_are_met():
    distances = np.array([[0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [0.1, 0.1, 1.5]])
    for losses_of in COMBINES.values():
        assert losses_of(distances).argmin() == 0


def test_subsets_hold_so_many_prompts_of_every_expert():
    expert = np.repeat(np.arange(3), 8)
    subsets = draw_subsets(expert, 2, np.random.default_rng(0))
    assert len({tuple(sorted(rows)) for rows in subsets}) == len(subsets) == 20
    assert all(np.bincount(expert[rows]).tolist() == [2, 2, 2] for rows in subsets)
    (everything,) = draw_subsets(expert, 8, np.random.default_rng(0))
    assert sorted(everything) == list(range(24))


def test_the_bound_holds_where_answers_are_counted_on_the_same_inputs():
    rng = np.random.default_rng(0)
    right = rng.uniform(size=(40, 3, 500)) < 0.8  # of merges; experts are always right
    lost, agreement = 1 - right.mean(axis=2), right.mean(axis=2)
    found = check_bound(lost, 500, agreement, 500)
    assert (found.n_pairs, found.holds, found.holds_within_error) == (120, 1.0, 1.0)
    assert found.worst_excess == pytest.approx(0)


def test_sampling_error_excuses_little_and_the_worst_pair_is_named():
    lost, agreement = np.full((2, 2), 0.05), np.full((2, 2), 1.0)
    lost[1, 0] = 0.6
    found = check_bound(lost, 150, agreement, 32)
    assert found.holds == 0
    assert found.holds_within_error == 0.75
    assert found.worst_pair == (1, 0)
    assert found.worst_excess == pytest.approx(0.6)
