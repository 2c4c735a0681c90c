"""Merges drawn at random: what each distribution promises of its tables."""

import numpy as np
import pytest

from benchmarks.drawn_merges import KINDS, draw_merges

BALANCED, DEPTHS = np.linspace(0.2, 0.6, 10), np.linspace(0, 1, 6)


@pytest.fixture(scope="module")
def drawn():
    kinds, tables = draw_merges(600, BALANCED, DEPTHS, np.random.default_rng(0))
    return {kind: tables[np.array(kinds) == kind] for kind in KINDS}


def test_every_distribution_has_its_share(drawn):
    assert {kind: tables.shape for kind, tables in drawn.items()} == dict.fromkeys(KINDS, (100, 6, 10))
    assert all(np.isfinite(tables).all() for tables in drawn.values())


@pytest.mark.parametrize("kind", ["uniform", "sparse", "scaled"])
def test_coarse_merges_are_the_same_in_all_groups(drawn, kind):
    assert (drawn[kind] == drawn[kind][:, :1]).all()


def test_sparse_merges_leave_adapters_out_but_never_all(drawn):
    n_present = (drawn["sparse"][:, 0] > 0).sum(axis=1)
    assert n_present.min() >= 1
    assert set(n_present.tolist()) >= {1, 5, 10}


def test_uniform_and_balanced_merges_lie_around_what_they_are_called_after(drawn):
    np.testing.assert_allclose(np.median(drawn["uniform"][:, 0]), 0.1, rtol=0.15)
    np.testing.assert_allclose(np.median(drawn["balanced"], axis=(0, 1)), BALANCED, rtol=0.2)


def test_smooth_merges_are_straight_lines_over_depth(drawn):
    assert np.abs(np.diff(drawn["smooth"], n=2, axis=1)).max() < 1e-12
    assert np.abs(np.diff(drawn["smooth"], axis=1)).max() > 0.01


def test_the_generator_decides():
    first, again, other = (draw_merges(12, BALANCED, DEPTHS, np.random.default_rng(s))[1] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2)).all()


def test_no_merges_are_a_table_without_lines():
    assert draw_merges(0, BALANCED, DEPTHS, np.random.default_rng(0))[1].shape == (0, 6, 10)
