"""The submission's CMA asks for what `BatchOptimizer` asks for, whichever library searches."""

import warnings

import numpy as np
import pytest

from search import kit_optimizer
from search.errors import InputError
from search.kit_optimizer import KitOptimizer
from search.optimizer import BatchOptimizer

LIBRARIES = ["nevergrad", "pycma", "built-in"]


def both(n_params, n_candidates, library):
    start, spread = np.linspace(0.1, 0.4, n_params), np.linspace(0.2, 0.3, n_params)
    made = (start, spread, n_candidates, 400, 3, "CMA")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit_optimizer, "find_library", lambda: library)
        return KitOptimizer(*made), BatchOptimizer(*made, library)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("n_params", "n_candidates"), [(1, 4), (5, 8), (101, 16)])
def test_it_asks_for_the_same_and_has_the_same_mean(n_params, n_candidates, library):
    ours, theirs = both(n_params, n_candidates, library)
    for generation in range(8):
        np.testing.assert_array_equal(ours.mean(), theirs.mean())
        asked = ours.ask()
        np.testing.assert_array_equal(asked, theirs.ask())
        losses = ((asked - 0.5) ** 2).mean(-1)
        losses[generation % n_candidates :: 3] = [np.nan, np.inf][generation % 2]
        if generation == 4:
            losses[:] = np.nan
        for optimizer in (ours, theirs):
            optimizer.tell(losses)


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_leaves_the_global_generator_alone(library):
    np.random.seed(5)
    expected = np.random.get_state()[1].copy()
    ours, _ = both(5, 8, library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ours.tell((ours.ask() ** 2).mean(-1))
    np.testing.assert_array_equal(np.random.get_state()[1], expected)


def test_no_finite_loss_at_all_is_refused():
    ours, _ = both(5, 8, "built-in")
    ours.ask()
    with pytest.raises(InputError, match="no candidate has a finite loss"):
        ours.tell(np.full(8, np.nan))
