"""How the population moved: spread by dimension against hand and numpy, projection against an SVD."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.movement import projection_table, spread_table
from search.trace import Generation, Trace
from tests.traces import tiny_trace


def make_search(genomes: np.ndarray) -> Trace:
    """A trace of generations (n_generations, n_candidates, n_params)."""
    n_candidates = genomes.shape[1]
    numbers = {"n_tokens": 1, "elapsed_s": 1.0, "seconds": 1.0, "evaluations": 1}
    losses, per_expert = np.ones(n_candidates), np.ones((n_candidates, 1))
    return Trace(
        {},
        [
            Generation(index=i, genomes=g, losses=losses, per_expert=per_expert, **numbers)
            for i, g in enumerate(genomes)
        ],
        [],
    )


def test_the_spread_is_the_standard_deviation_of_each_dimension():
    table = spread_table(tiny_trace())
    assert table.index.tolist() == [(0, 0), (1, 1), (1, 2)]
    np.testing.assert_allclose(table.loc[(0, 0), [0, 1]], [np.sqrt(2), np.sqrt(8)])
    assert table.loc[(0, 0), 2:].isna().all()  # stage 0 has two dimensions
    np.testing.assert_allclose(table.loc[(1, 1)], np.full(6, np.sqrt(24)))
    assert (table.loc[(1, 2)] == 0).all()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 30), st.integers(0, 9))
def test_the_projection_is_that_of_an_svd(n_generations, n_candidates, n_params, seed):
    genomes = np.random.default_rng(seed).normal(size=(n_generations, n_candidates, n_params))
    table = projection_table(make_search(genomes))
    flat = genomes.reshape(-1, n_params)
    u, s, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    expected = np.zeros((len(flat), 2))
    expected[:, : min(2, len(s))] = (u * s)[:, :2]
    np.testing.assert_allclose(np.abs(table[["x", "y"]]), np.abs(expected), atol=1e-6)
    if (s > 1e-9).any():
        assert table["explained"].iloc[0] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())


def test_two_dimensions_lose_nothing_and_one_has_no_second_direction():
    two = projection_table(make_search(np.random.default_rng(0).normal(size=(2, 5, 2))))
    assert two["explained"].unique() == pytest.approx([1.0])
    one = projection_table(make_search(np.arange(8.0).reshape(2, 4, 1)))
    assert (one["y"] == 0).all()
    assert one["x"].diff().dropna().abs().tolist() == pytest.approx([1.0] * 7)


def test_stages_are_projected_apart():
    table = projection_table(tiny_trace())
    assert table.groupby("stage").size().to_dict() == {0: 3, 1: 6}
    assert table.groupby("stage")[["x", "y"]].mean().abs().max(axis=None) == pytest.approx(0, abs=1e-12)
