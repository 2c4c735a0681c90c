"""Archive: the best distinct genomes, whatever the order they come in."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search.archive import Archive


def fill(size, *generations):
    """An archive of genomes (number,), given as {number: loss} a generation."""
    archive = Archive(size)
    for generation in generations:
        numbers, losses = (np.array(list(part), dtype=float) for part in (generation, generation.values()))
        archive.add(numbers[:, None], losses, np.stack([losses, 10 * losses], -1))
    return archive


def listed(archive):
    genomes, losses, per_expert = archive.contents(1, 2)
    np.testing.assert_array_equal(per_expert, np.stack([losses, 10 * losses], -1))
    return list(zip(genomes[:, 0].tolist(), losses.tolist(), strict=True))


def test_the_best_of_all_generations_come_best_first():
    assert listed(fill(3, {1: 0.4, 2: 0.2}, {3: 0.3, 4: 0.1})) == [(4, 0.1), (2, 0.2), (3, 0.3)]


def test_equal_genomes_keep_their_lower_loss():
    assert listed(fill(3, {1: 0.4}, {1: 0.2}, {1: 0.3})) == [(1, 0.2)]


def test_equal_losses_keep_their_order_of_arrival():
    assert listed(fill(3, {5: 0.1, 3: 0.1}, {4: 0.1, 2: 0.1})) == [(5, 0.1), (3, 0.1), (4, 0.1)]


def test_losses_that_are_not_finite_stay_out():
    archive = fill(3, {1: np.nan, 2: np.inf, 3: -np.inf})
    assert listed(archive) == []
    assert math.isnan(archive.best_loss())
    assert listed(fill(3, {1: 0.5}, {1: np.nan})) == [(1, 0.5)]


def test_the_best_loss_is_the_lowest():
    assert fill(2, {1: 0.4, 2: 0.2}, {3: 0.3}).best_loss() == 0.2


def test_an_empty_archive_has_its_shapes_even_before_any_expert_is_known():
    for n_experts in (0, 3):
        shapes = [part.shape for part in Archive(4).contents(5, n_experts)]
        assert shapes == [(0, 5), (0,), (0, n_experts)]


def test_it_keeps_its_own_copy():
    genomes, losses, per_expert = np.ones((1, 1)), np.ones(1), np.array([[1.0, 10.0]])
    archive = Archive(2)
    archive.add(genomes, losses, per_expert)
    for given_array in (genomes, losses, per_expert):
        given_array[:] = 7
    assert listed(archive) == [(1, 1)]


@given(
    st.integers(1, 5),
    st.lists(st.dictionaries(st.integers(0, 9), st.integers(0, 20), min_size=1), min_size=1, max_size=8),
)
def test_it_holds_what_sorting_everything_at_the_end_would(size, generations):
    lowest = {}
    for generation in generations:
        for number, loss in generation.items():
            lowest[number] = min(loss, lowest.get(number, loss))
    found = listed(fill(size, *generations))
    assert [loss for _, loss in found] == sorted(lowest.values())[:size]
    assert all(lowest[number] == loss for number, loss in found)
    assert len({number for number, _ in found}) == len(found)
