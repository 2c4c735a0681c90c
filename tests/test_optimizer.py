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
    first = run(make(), 8)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    np.testing.assert_array_equal(run(make(), 8), first)


@pytest.mark.parametrize("name", ["CMA", "DiagonalCMA", "OnePlusOne", "DE", "TBPSA"])
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


def test_each_coordinate_has_its_own_first_spread():
    for n_params in (10, 60, 864):
        spread = np.geomspace(1e-3, 10, n_params)
        asked = np.concatenate(
            [BatchOptimizer(np.ones(n_params), spread, 16, 400, seed).ask() for seed in range(40)]
        )
        np.testing.assert_allclose(asked.std(0), spread, rtol=0.2)
        np.testing.assert_allclose(asked.mean(0), 1, atol=0.2 * spread.max())


@pytest.mark.parametrize("name", ["CMA", "OnePlusOne", "DE"])
def test_scaling_a_coordinate_and_its_spread_scales_what_is_asked(name):
    scales = 2.0 ** np.arange(-5, 5)  # exact
    plain, scaled = (
        BatchOptimizer(np.zeros(10), 0.25 * by, 8, 400, seed=0, name=name) for by in (np.ones(10), scales)
    )
    for _ in range(4):
        genomes = plain.ask()
        np.testing.assert_array_equal(scaled.ask(), genomes * scales)
        plain.tell(sphere(genomes))
        scaled.tell(sphere(genomes))
    np.testing.assert_array_equal(scaled.mean(), plain.mean() * scales)
    np.testing.assert_array_equal(scaled.spread(), plain.spread() * scales)


@pytest.mark.parametrize("n_params", [10, 60, 864, 6048])
def test_the_spread_is_the_deviation_of_what_cma_would_ask_for(n_params):
    optimizer = BatchOptimizer(np.full(n_params, 0.3), np.linspace(0.05, 0.2, n_params), 16, 400, seed=0)
    np.testing.assert_array_equal(optimizer.spread(), np.linspace(0.05, 0.2, n_params))
    for _ in range(12):  # by then neither step size nor proportions are the first
        optimizer.tell(sphere(optimizer.ask() * np.linspace(1, 5, n_params)))
    samples = draw_many(optimizer, 400)
    assert samples.std(0).mean() == pytest.approx(optimizer.spread().mean(), rel=0.03)
    np.testing.assert_allclose(samples.std(0), optimizer.spread(), rtol=0.2)
    np.testing.assert_allclose(samples.mean(0), optimizer.mean(), atol=5 * optimizer.spread().max() / 20)
    assert not np.allclose(optimizer.spread(), np.linspace(0.05, 0.2, n_params), rtol=0.01)


def draw_many(optimizer, n_samples):
    """What CMA's own distribution gives, (n_samples, n_params): `ask` gives but a generation of it."""
    standardised = np.array(optimizer._engine.strategy.ask(n_samples + 2))[2:]  # less the mirrored pair
    return np.array([optimizer._to_genome(sample) for sample in standardised])


@pytest.mark.parametrize("name", ["OnePlusOne", "DE", "TBPSA", "RandomSearch"])
def test_without_a_distribution_the_spread_is_the_last_generations(name):
    optimizer = make(name=name)
    np.testing.assert_array_equal(optimizer.spread(), np.full(10, 0.15))
    asked = run(optimizer, 3)
    np.testing.assert_array_equal(optimizer.spread(), asked[-1].std(0))


def test_a_generation_of_equal_genomes_has_a_spread_above_0():
    optimizer = BatchOptimizer(np.full(3, 1e9), 1e-12, 4, 100, seed=0, name="OnePlusOne")
    optimizer.tell(sphere(optimizer.ask()))
    assert (optimizer.spread() > 0).all()


def test_a_bad_spread_is_refused():
    for spread in (0, -0.1, np.nan, np.inf, [0.1, 0.1, 0]):
        with pytest.raises(ValueError, match="expected finite numbers above 0"):
            BatchOptimizer(np.zeros(3), spread, 4, 100, 0)


@pytest.mark.parametrize("name", ["CMA", "DiagonalCMA"])
@pytest.mark.parametrize("n_params", [1, 10, 60, 864, 6048])
def test_injected_genomes_are_asked_next_and_only_then(n_params, name):
    optimizer = make(n_params, 8, name=name)
    run(optimizer, 2)
    injected = np.random.default_rng(0).uniform(-1, 1, (3, n_params))
    optimizer.inject(injected)
    asked = optimizer.ask()
    places = [np.abs(asked - genome).max(1).argmin() for genome in injected]
    np.testing.assert_allclose(asked[places], injected, rtol=0, atol=1e-15)
    assert len(set(places)) == 3
    optimizer.tell(sphere(asked))
    distances = np.abs(optimizer.ask()[:, None] - injected).max(-1)
    assert distances.min() > 1e-6


@pytest.mark.parametrize("n_params", [10, 60, 864, 6048])
def test_cma_learns_from_an_injected_genome(n_params):
    with_it, without = make(n_params, 8), make(n_params, 8)
    run(with_it, 2), run(without, 2)
    with_it.inject(np.full((1, n_params), 0.5))  # where the loss is least
    run(with_it, 1), run(without, 1)
    assert sphere(with_it.mean()) < 0.8 * sphere(without.mean())


@pytest.mark.parametrize("n_done", range(4))
def test_injecting_where_the_mean_stands_does_no_harm(n_done):
    optimizer = make()
    run(optimizer, n_done)
    optimizer.inject(optimizer.mean()[None])
    assert np.isfinite(run(optimizer, 3)).all()


def test_into_the_first_generation_goes_one_genome_only():
    assert make(n_candidates=4).n_injectable == 0
    with pytest.raises(InputError, match=r"with 2 put in .* at most 1 can be"):
        make().inject(np.zeros((2, 10)))


def test_injecting_before_the_first_generation_works_and_keeps_the_seed():
    asked = []
    for _ in range(2):
        optimizer = make()
        optimizer.inject(np.full((1, 10), 0.25))
        asked.append(run(optimizer, 3))
    np.testing.assert_array_equal(*asked)
    assert np.abs(asked[0][0] - 0.25).max(1).min() < 1e-15


@pytest.mark.parametrize("name", ["OnePlusOne", "DE", "TBPSA", "MetaModelDiagonalCMA"])
def test_injecting_into_another_than_cma_is_refused(name):
    optimizer = make(name=name)
    assert optimizer.n_injectable == 0
    with pytest.raises(InputError, match=rf"'{name}' cannot search .* at most 0 can be; use CMA"):
        optimizer.inject(np.zeros((1, 10)))


@pytest.mark.parametrize(("n_candidates", "n_injectable"), [(4, 0), (5, 1), (16, 12)])
def test_injecting_more_than_leave_cma_enough_of_its_own_is_refused(n_candidates, n_injectable):
    optimizer = make(n_candidates=n_candidates)
    run(optimizer, 1)
    assert optimizer.n_injectable == n_injectable
    optimizer.inject(np.zeros((n_injectable, 10)))
    with pytest.raises(InputError, match=rf"with {n_injectable + 1} put in .* at most {n_injectable} can be"):
        optimizer.inject(np.zeros((n_injectable + 1, 10)))


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


def test_a_first_generation_without_any_finite_loss_is_an_error():
    optimizer = make()
    optimizer.ask()
    with pytest.raises(InputError, match=r"none of 8 candidates has a finite loss: .* Lower search.start"):
        optimizer.tell(np.full(8, np.nan))


@pytest.mark.parametrize("name", ["CMA", "OnePlusOne", "DE", "TBPSA"])
def test_a_later_generation_without_any_counts_as_the_worst_of_all_so_far(name):
    optimizer, reference = make(name=name), make(name=name)
    first, second = np.linspace(0.1, 0.9, 8), np.linspace(0.2, 0.8, 8)
    first[2] = np.nan
    for losses, known in [(first, np.where(np.isnan(first), 0.9, first)), (second, second)]:
        np.testing.assert_array_equal(optimizer.ask(), reference.ask())
        optimizer.tell(losses)
        reference.tell(known)
    np.testing.assert_array_equal(optimizer.ask(), reference.ask())
    optimizer.tell([np.nan, np.inf] * 4)
    reference.tell(np.full(8, 0.9))
    np.testing.assert_array_equal(run(optimizer, 3), run(reference, 3))


def test_a_generation_that_all_failed_is_told_as_the_worst_loss_of_any_generation():
    optimizer, told = make(), []
    for worst in (0.9, 0.8):
        optimizer.ask()
        optimizer.tell(np.linspace(0.1, worst, 8))
    optimizer.ask()
    optimizer._engine._optimizer.tell = lambda candidate, loss: told.append(loss)
    optimizer.tell([np.nan] * 8)
    assert told == [0.9] * 8


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
    assert make(n_candidates=1, name="Cobyla").ask().shape == (1, 10)
    with pytest.raises(InputError, match="'CMA' needs at least 4 candidates a generation, found 2"):
        make(n_candidates=2)
    assert make(n_candidates=2, name="OnePlusOne").ask().shape == (2, 10)


def test_a_failure_inside_nevergrad_names_the_optimizer():
    with pytest.raises(
        InputError, match=r"'NGOpt' cannot search 864 parameters by 16: Mean shift .*; use CMA"
    ):
        run(make(864, 16, name="NGOpt"), 8)
    optimizer = make(name="DE")
    optimizer._engine._optimizer.ask = lambda: float([1, 2])
    with pytest.raises(InputError, match=r"'DE' cannot search 10 parameters by 8: float\(\) .*; use CMA"):
        optimizer.ask()


def test_a_bad_start_is_refused():
    for start in ([], [np.nan], [[0.3]]):
        with pytest.raises(ValueError, match=r"expected \(n_params,\) finite numbers"):
            BatchOptimizer(start, 0.1, 4, 100, 0)


@pytest.mark.parametrize("n_params", [2, 864])
def test_a_search_warns_of_nothing(n_params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(n_params, 8)
        run(optimizer, 20)
        optimizer.inject(np.full((2, n_params), 9.0))  # far away
        run(optimizer, 20)


def test_nevergrad_has_what_we_lean_on():
    assert hasattr(ng.families, "ParametrizedCMA")
    assert {"CMA", "DiagonalCMA", "OnePlusOne"} <= set(ng.optimizers.registry)
