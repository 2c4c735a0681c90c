"""Balance: norms and products against dense sums in float64, coefficients, and who is left out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.adapters import Factors
from search.balance import balanced_coefficients, find_misfits, relative_norms, update_products
from search.stack import StackedFactors, stack_adapters, stack_module
from tests.toys import ARCHITECTURES

N_ADAPTERS = 3
NAMES = ("maths", "code", "chat")


@st.composite
def pools(draw):
    """Modules of other widths, each of some adapters of other ranks and scalings: name -> factors or None."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    pool = {}
    for module in range(draw(st.integers(1, 3))):
        d_out, d_in = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        ranks = draw(st.lists(st.integers(0, 4), min_size=N_ADAPTERS, max_size=N_ADAPTERS).filter(any))
        pool[f"m{module}"] = [rank and make_factors(gen, d_out, d_in, rank) for rank in ranks]
    return pool


def make_factors(gen, d_out, d_in, rank):
    A, B = (torch.randn(*size, generator=gen, dtype=torch.float64) for size in ((rank, d_in), (d_out, rank)))
    return Factors(A, B, scaling=rank / 2)


def stack(pool):
    return StackedFactors(
        {name: stack_module([f or None for f in factors]) for name, factors in pool.items()}, NAMES
    )


def dense_products(pool):
    """The slow, obvious version: every update written out, and multiplied entry by entry."""
    products = np.zeros((N_ADAPTERS, N_ADAPTERS))
    for factors in pool.values():
        updates = [(f.scaling * f.B @ f.A).numpy() if f else 0.0 for f in factors]
        products += [[np.sum(one * other) for other in updates] for one in updates]
    return products


def products_of(*updates):
    """Of updates that are flat vectors."""
    table = np.array(updates, dtype=float)
    return table @ table.T


@given(pools())
@settings(max_examples=50)
def test_products_are_those_of_the_dense_updates_summed_over_modules(pool):
    np.testing.assert_allclose(update_products(stack(pool)), dense_products(pool), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_narrow_type_is_multiplied_in_float64(toy_adapters, dtype):
    narrow = stack_adapters(toy_adapters("llama"), device="cpu", dtype=dtype)
    wide = stack_adapters(toy_adapters("llama"), device="cpu", dtype=torch.float64)
    for name, module in wide.modules.items():
        module.A.copy_(narrow.modules[name].A)
        module.B.copy_(narrow.modules[name].B)
    np.testing.assert_array_equal(update_products(narrow), update_products(wide))


def test_an_update_that_would_overflow_float32_has_a_finite_norm(toy_model, toy_adapters):
    stacked = stack_adapters(toy_adapters("llama"), device="cpu", dtype=torch.float32)
    before = relative_norms(toy_model("llama"), stacked)
    for module in stacked.modules.values():
        module.B.mul_(1e25)
    np.testing.assert_allclose(relative_norms(toy_model("llama"), stacked), before * 1e25, rtol=1e-5)
    assert np.isfinite(balanced_coefficients(update_products(stacked))).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_relative_norms_are_medians_over_an_adapters_own_modules(architecture, toy_model, toy_adapters):
    model, adapters = toy_model(architecture), toy_adapters(architecture)
    stacked = stack_adapters(adapters, device="cpu", dtype=torch.float64)
    expected = [
        np.median(
            [
                float((f.scaling * f.B @ f.A).norm() / model.get_submodule(name).weight.norm())
                for name, f in adapter.modules.items()
            ]
        )
        for adapter in adapters
    ]
    np.testing.assert_allclose(relative_norms(model, stacked), expected, rtol=1e-6)


def test_modules_that_an_adapter_leaves_alone_do_not_count_in_its_median(toy_model, toy_adapters):
    model = toy_model("llama")
    stacked = stack_adapters(toy_adapters("llama"), device="cpu", dtype=torch.float64)
    *still, moved = [module for module in stacked.modules.values() if (module.owner == 1).any()]
    whole = relative_norms(model, stacked)
    for module in still:
        module.B[:, module.owner == 1] = 0
    assert 0.5 < relative_norms(model, stacked)[1] / whole[1] < 2
    moved.B[:, moved.owner == 1] = 0
    np.testing.assert_array_equal(relative_norms(model, stacked) == 0, [False, True, False])


@given(pools())
@settings(max_examples=50)
def test_all_updates_are_equally_long_afterwards_or_as_they_are(pool):
    products = update_products(stack(pool))
    coefficients = balanced_coefficients(products)
    norms = np.sqrt(products.diagonal())
    lengths = coefficients * norms
    free = (norms > 0) & (coefficients < 1)
    if free.any():
        np.testing.assert_allclose(lengths[free], lengths[free][0])
        assert (lengths[~free] <= lengths[free][0] * (1 + 1e-9)).all()
    assert (coefficients[norms == 0] == 1 / N_ADAPTERS).all()


@given(pools(), st.permutations(range(N_ADAPTERS)))
@settings(max_examples=25)
def test_the_order_of_adapters_does_not_matter(pool, order):
    products = update_products(stack(pool))
    again = balanced_coefficients(products[np.ix_(order, order)])
    np.testing.assert_allclose(again, balanced_coefficients(products)[list(order)])


def test_equal_experts_get_one_nth_each_and_orthogonal_ones_one_over_the_root():
    np.testing.assert_allclose(balanced_coefficients(products_of([3, 4], [3, 4], [3, 4])), [1 / 3] * 3)
    np.testing.assert_allclose(balanced_coefficients(products_of(*(5 * np.eye(4)))), [1 / 2] * 4)
    assert balanced_coefficients(products_of([3, 4])).tolist() == [1]


def test_a_merge_of_experts_as_long_as_each_other_is_as_long_as_one():
    updates = np.random.default_rng(0).normal(size=(4, 9)) + 0.5
    updates *= 7 / np.linalg.norm(updates, axis=1, keepdims=True)
    assert np.linalg.norm(balanced_coefficients(products_of(*updates)) @ updates) == pytest.approx(7)


@pytest.mark.parametrize("factor", [0.8, 3.0, 100.0])
def test_an_update_k_times_as_long_gets_a_kth_of_the_coefficient_up_to_what_all_share(factor):
    updates = np.random.default_rng(1).normal(size=(4, 9))
    before = balanced_coefficients(products_of(*updates))
    updates[2] *= factor
    after = balanced_coefficients(products_of(*updates))
    shared = after / before * [1, 1, factor, 1]
    below_cap = after < 1
    assert below_cap[2]
    np.testing.assert_allclose(shared[below_cap], shared[2])


def test_no_coefficient_is_above_one():
    short, long = [0.01, 0], [0, 10]
    assert balanced_coefficients(products_of(short, long)).tolist() == [1, pytest.approx(0.5)]


def test_experts_that_cancel_each_other_are_not_blown_up():
    np.testing.assert_allclose(balanced_coefficients(products_of([2, 0], [-2, 0])), [1, 1])
    nearly = balanced_coefficients(products_of([2, 1e-9], [-2, 0]))
    np.testing.assert_allclose(nearly, [1, 1])


def test_an_adapter_without_an_update_leaves_the_others_as_they_are():
    np.testing.assert_allclose(
        balanced_coefficients(products_of([0, 0], [0, 3], [3, 0])), [1 / 3, 0.5**0.5, 0.5**0.5]
    )
    np.testing.assert_allclose(balanced_coefficients(np.zeros((2, 2))), [1 / 2] * 2)


@pytest.mark.parametrize(
    ("limit", "left_out"),
    [(2.0, {"zero", "large", "nan"}), (2.5, {"zero", "nan"}), (None, {"zero"})],
)
def test_misfits_are_what_is_zero_above_the_limit_or_no_number(limit, left_out):
    names = ("at limit", "zero", "large", "nan")
    found = find_misfits(names, np.array([2.0, 0.0, 2.5, np.nan]), limit)
    assert found.keys() == left_out
    assert found["zero"] == "its update is zero: it is the base itself"
    if limit == 2.0:
        assert found["large"] == "its update is 2.5 times as large as the weights it changes (limit 2)"
