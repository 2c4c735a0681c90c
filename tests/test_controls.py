"""Controls: the same coefficients, none of them where it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.controls import permuted_coefficients


def table_of(n_groups, n_adapters):
    """All entries differ."""
    return np.arange(n_groups * n_adapters, dtype=np.float64).reshape(n_groups, n_adapters)


@given(st.integers(2, 6), st.integers(2, 12), st.integers(0, 99))
def test_every_column_or_row_goes_whole_to_another_place(n_groups, n_adapters, seed):
    table = table_of(n_groups, n_adapters)
    by_adapter, by_group = permuted_coefficients(table, np.random.default_rng(seed))
    for found, expected in ((by_adapter.T, table.T), (by_group, table)):
        assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
        assert (found != expected).all()


def test_the_generator_decides_and_the_table_stays_as_it_was():
    table = table_of(6, 10)
    first = permuted_coefficients(table, np.random.default_rng(1))
    again = permuted_coefficients(table, np.random.default_rng(1))
    other = permuted_coefficients(table, np.random.default_rng(2))
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != different).any()
        assert not np.shares_memory(one, table)
    np.testing.assert_array_equal(table, table_of(6, 10))


def test_over_draws_every_adapter_gets_every_others_column():
    rng = np.random.default_rng(0)
    drawn = {tuple(permuted_coefficients(table_of(2, 4), rng)[0][0]) for _ in range(200)}
    assert len(drawn) == 6  # all cycles of four


def test_one_group_has_no_other_to_change_places_with():
    by_adapter, by_group = permuted_coefficients(table_of(1, 5), np.random.default_rng(0))
    assert by_group is None
    assert sorted(by_adapter[0]) == sorted(table_of(1, 5)[0])
    assert (by_adapter != table_of(1, 5)).all()


def test_one_adapter_alone_cannot_change_places():
    with pytest.raises(ValueError, match=r"shape \(5, 1\), expected at least 2 adapters"):
        permuted_coefficients(np.zeros((5, 1)), np.random.default_rng(0))
