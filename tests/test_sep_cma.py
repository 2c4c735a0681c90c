"""CMA without nevergrad: our separable strategy does what pycma does; a search goes by any of the three."""

import cma
import numpy as np
import pytest

from search.errors import InputError
from search.optimizer import BatchOptimizer, find_library
from search.plain_cma import PYCMA_OPTIONS
from search.sep_cma import SeparableCMA

TOLERANCE = 0.3
"""Of the generations that a loss takes, between medians over seeds."""
N_SEEDS, N_PARAMS = 9, 10
QUIET = {"verbose": -9, "seed": np.nan}


def sphere(x):
    return (x**2).sum(-1)


def ellipsoid(x):
    return (10.0 ** (4 * np.arange(x.shape[-1]) / (x.shape[-1] - 1)) * x**2).sum(-1)


def rastrigin(x):
    return (x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum(-1)


def losses_of(strategy, tell, loss, n_generations):
    """The least loss so far, (n_generations,), with the optimum 2 away from the start in every coordinate."""
    best = []
    for _ in range(n_generations):
        points = np.array(strategy.ask())
        losses = loss(points - 2)
        best.append(losses.min())
        tell(points, losses)
    return np.minimum.accumulate(best)


def race(loss, n_generations):
    """Least losses so far (2, N_SEEDS, n_generations): of ours, and of pycma with the same step size rule."""
    ours, theirs = [], []
    for seed in range(N_SEEDS):
        own = SeparableCMA(N_PARAMS, 16, seed)
        ours.append(losses_of(own, own.tell, loss, n_generations))
        randn = np.random.RandomState(seed).randn
        options = {**PYCMA_OPTIONS, "popsize": 16, "CMA_diagonal": True, "randn": randn, **QUIET}
        other = cma.CMAEvolutionStrategy(np.zeros(N_PARAMS), 1.0, options)
        theirs.append(
            losses_of(other, lambda x, y, es=other: es.tell(list(x), y.tolist()), loss, n_generations)
        )
    return np.array([ours, theirs])


@pytest.mark.parametrize(("loss", "target"), [(sphere, 1e-2), (sphere, 1e-6), (ellipsoid, 1e-1)])
def test_the_median_number_of_generations_to_a_loss_is_pycmas(loss, target):
    reached = race(loss, 220) < target
    assert reached[..., -1].all()
    ours, theirs = np.median(reached.argmax(axis=2), axis=1)
    assert 1 / (1 + TOLERANCE) < ours / theirs < 1 + TOLERANCE, (ours, theirs)


def test_the_median_of_many_local_optima_is_pycmas():
    ours, theirs = np.median(race(rastrigin, 150)[..., -1], axis=1)
    assert abs(np.log2(ours / theirs)) < 1, (ours, theirs)


def test_a_point_put_in_is_asked_for_and_pulls_the_mean_no_further_than_a_long_step():
    strategy = SeparableCMA(4, 8, 0)
    strategy.inject([np.full(4, 100.0)])
    points = strategy.ask()
    np.testing.assert_array_equal(points[0], 100.0)
    strategy.tell(points, np.arange(8.0))
    assert 0 < np.linalg.norm(strategy.mean) < 4


@pytest.mark.parametrize("library", ["nevergrad", "pycma", "built-in"])
@pytest.mark.parametrize("n_params", [1, 10, 300])
def test_every_library_searches_behind_one_interface(library, n_params):
    def make():
        return BatchOptimizer(np.full(n_params, 0.3), 0.15, 8, 400, seed=1, library=library)

    def run(optimizer):
        asked = []
        for generation in range(25):
            if generation == 2:
                optimizer.inject(np.full((1, n_params), 0.4))
            asked.append(optimizer.ask())
            optimizer.tell(((asked[-1] - 0.5) ** 2).mean(1))
        return np.array(asked)

    optimizer = make()
    asked = run(optimizer)
    np.testing.assert_array_equal(run(make()), asked)
    assert (np.abs(asked[2] - 0.4).max(axis=1) < 1e-12).any()
    losses = ((asked - 0.5) ** 2).mean((1, 2))
    assert losses[-5:].mean() < 0.9 * losses[0]
    assert optimizer.mean().shape == optimizer.spread().shape == (n_params,)


def test_the_best_that_is_installed_is_chosen(monkeypatch):
    assert find_library() == "nevergrad"
    monkeypatch.setattr("search.optimizer.ng", None)
    assert find_library() == "pycma"
    with pytest.raises(InputError, match="only CMA goes without nevergrad, found 'DE'"):
        BatchOptimizer(np.zeros(3), 1.0, 8, 100, 0, "DE")
    monkeypatch.setattr("search.plain_cma.cma", None)
    assert find_library() == "built-in"
