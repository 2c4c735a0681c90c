"""Optimizer: seeded batches at every size the product meets, and nevergrad's traps stepped around."""

import warnings

import nevergrad as ng
import numpy as np
import pytest

from search.errors import InputError
from search.optimizer import BatchOptimizer

SIZES = [(1, 4), (2, 4), (10, 16), (60, 16), (299, 4), (300, 4), (864, 16)]


def make(n_params=10, n_candidates=8, *, name="CMA", seed=0, sigma=0.15, start=0.3):
    return BatchOptimizer(np.full(n_params, start), sigma, n_candidates, budget=400, seed=seed, name=name)


def sphere(genomes):
    """Least at 0.5 everywhere."""
    return ((genomes - 0.5) ** 2).mean(-1)


def run(optimizer, n_generations, loss=sphere):
    """Asked genomes (n_generations, n_candidates, n_params)."""
    asked = []
    for _ in range(n_generations):
        asked.append(optimizer.ask())
        optimizer.tell(loss(asked[-1]))
    return np.array(asked)


@pytest.mark.parametrize(("n_params", "n_candidates"), SIZES)
def test_cma_learns_at_every_size(n_params, n_candidates):
    optimizer = make(n_params, n_candidates)
    asked = run(optimizer, 30)
    assert asked.shape == (30, n_candidates, n_params)
    assert sphere(asked[-1]).mean() < 0.9 * sphere(asked[0]).mean()
    assert sphere(optimizer.mean()) < sphere(asked[-1]).mean()


def test_cma_learns_in_thousands_of_parameters():
    optimizer = make(6048, 16)
    asked = run(optimizer, 40)
    assert sphere(asked[-1]).mean() < 0.8 * sphere(asked[0]).mean()


@pytest.mark.parametrize("name", ["OnePlusOne", "DE", "TBPSA", "DiagonalCMA", "RandomSearch"])
def test_any_nevergrad_optimizer_goes_by_its_name(name):
    for n_params in (10, 864):
        optimizer = make(n_params, name=name)
        asked = run(optimizer, 12)
        assert sphere(asked.reshape(-1, n_params)).min() < sphere(np.full(n_params, 0.3)) + 0.02
        assert optimizer.mean().shape == (n_params,)
        np.testing.assert_array_equal(run(make(n_params, name=name), 12), asked)


@pytest.mark.parametrize(("n_params", "n_candidates"), SIZES)
def test_the_same_seed_asks_the_same_and_another_does_not(n_params, n_candidates):
    first, again = (run(make(n_params, n_candidates), 5) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, run(make(n_params, n_candidates, seed=1), 5))


def test_global_randomness_is_neither_used_nor_changed():
    np.random.seed(1)
    first = run(make(), 3)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    np.testing.assert_array_equal(run(make(), 3), first)


@pytest.mark.parametrize("name", ["CMA", "OnePlusOne", "DE"])
@pytest.mark.parametrize("n_params", [10, 60, 864])
def test_replaying_recorded_losses_into_a_fresh_optimizer_repeats_the_asks(n_params, name):
    rng = np.random.default_rng(0)
    recorded = [np.where(rng.random(8) < 0.2, np.nan, rng.random(8)) for _ in range(6)]
    optimizer, replayed = make(n_params, name=name), make(n_params, name=name)
    for losses in recorded:
        np.testing.assert_array_equal(optimizer.ask(), replayed.ask())
        optimizer.tell(losses)
        replayed.tell(losses.tolist())
    np.testing.assert_array_equal(run(optimizer, 3), run(replayed, 3))


def test_the_first_generation_has_the_spread_asked_for_around_the_start():
    for n_params in (10, 864):
        asked = np.concatenate([make(n_params, 16, seed=seed, sigma=0.05).ask() for seed in range(20)])
        assert asked.mean() == pytest.approx(0.3, abs=0.005)
        assert asked.std() == pytest.approx(0.05, rel=0.1)


def test_the_mean_starts_at_the_start():
    np.testing.assert_array_equal(make().mean(), np.full(10, 0.3))
    optimizer = make()
    optimizer.ask()
    np.testing.assert_allclose(optimizer.mean(), np.full(10, 0.3))


def test_the_mean_is_less_noisy_than_the_luckiest_candidate():
    rng = np.random.default_rng(0)
    optimizer = make(10, 16)
    asked = run(optimizer, 40, loss=lambda genomes: sphere(genomes) + 0.05 * rng.normal(size=len(genomes)))
    assert sphere(optimizer.mean()) < sphere(asked[-1]).mean()


def test_losses_that_are_not_finite_count_as_the_worst_finite_one():
    told = np.array([0.3, np.nan, 0.1, np.inf, 0.2, 0.4, -np.inf, 0.5])
    optimizer, reference = make(), make()
    np.testing.assert_array_equal(optimizer.ask(), reference.ask())
    optimizer.tell(told)
    reference.tell(np.where(np.isfinite(told), told, 0.5))
    np.testing.assert_array_equal(optimizer.ask(), reference.ask())
    assert np.isnan(told[1])


def test_a_generation_without_any_finite_loss_is_an_error():
    optimizer = make()
    optimizer.ask()
    with pytest.raises(ValueError, match=r"none of 8 losses is finite, the first are \[nan, nan, nan\]"):
        optimizer.tell(np.full(8, np.nan))


def test_asks_and_tells_must_take_turns_and_match():
    optimizer = make()
    with pytest.raises(ValueError, match=r"shape \(8,\) for 0 genomes"):
        optimizer.tell(np.zeros(8))
    optimizer.ask()
    with pytest.raises(RuntimeError, match="asked again before the losses of 8"):
        optimizer.ask()
    with pytest.raises(ValueError, match=r"shape \(7,\) for 8 genomes"):
        optimizer.tell(np.zeros(7))
    with pytest.raises(ValueError, match=r"shape \(8, 1\) for 8 genomes"):
        optimizer.tell(np.zeros((8, 1)))
    optimizer.tell(np.zeros(8))
    with pytest.raises(ValueError, match="for 0 genomes"):
        optimizer.tell(np.zeros(8))


def test_equal_losses_for_a_while_do_not_send_the_search_back_to_its_start():
    optimizer = make(10, 16)
    run(optimizer, 60)
    assert sphere(optimizer.mean()) < 1e-5
    run(optimizer, 5, loss=lambda genomes: np.ones(len(genomes)))
    assert sphere(optimizer.mean()) < 1e-3


def test_a_converged_search_stays_where_it_is():
    optimizer = make(2, 8)
    run(optimizer, 60)
    assert sphere(optimizer.mean()) < 1e-8
    run(optimizer, 10)
    assert sphere(optimizer.mean()) < 1e-8


def test_an_unknown_name_gets_close_matches():
    with pytest.raises(InputError, match=r"unknown optimizer 'OnePlusTow'; close: .*OnePlusOne"):
        make(name="OnePlusTow")
    with pytest.raises(InputError, match="close: none; expected CMA or another"):
        make(name="zzzzzz")


def test_optimizers_that_cannot_work_in_generations_are_refused():
    with pytest.raises(InputError, match="'Cobyla' takes one candidate at a time, not 8"):
        make(name="Cobyla")
    with pytest.raises(InputError, match="'CMA' needs at least 4 candidates a generation, found 2"):
        make(n_candidates=2)
    assert make(n_candidates=2, name="OnePlusOne").ask().shape == (2, 10)


def test_a_failure_inside_nevergrad_names_the_optimizer():
    with pytest.raises(
        InputError, match=r"'NGOpt' cannot search 864 parameters by 16: Mean shift .*; use CMA"
    ):
        run(make(864, 16, name="NGOpt"), 8)


def test_a_bad_start_is_refused():
    for start in ([], [np.nan], [[0.3]]):
        with pytest.raises(ValueError, match=r"expected \(n_params,\) finite numbers"):
            BatchOptimizer(start, 0.1, 4, 100, 0)


def test_a_search_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(2, 4), 60)


def test_nevergrad_has_what_we_lean_on():
    assert hasattr(ng.families, "ParametrizedCMA")
    assert {"CMA", "DiagonalCMA", "OnePlusOne"} <= set(ng.optimizers.registry)
