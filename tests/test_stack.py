"""Stacks against the slow, obvious sum of dense updates, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.adapters import Adapter, Factors
from search.stack import delta_output, delta_weight, stack_adapters, stack_module

D_IN, D_OUT = 6, 5
Pool = list[Factors | None]


def make_factors(rank: int, scaling: float, seed: int, dtype: torch.dtype = torch.float64) -> Factors:
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, D_IN, generator=gen, dtype=torch.float64)
    B = torch.randn(D_OUT, rank, generator=gen, dtype=torch.float64)
    return Factors(A.to(dtype), B.to(dtype), scaling)


def dense_sum(pool: Pool, coefficients: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for c, f in zip(coefficients, pool, strict=True):
        if f is not None:
            total += c * f.scaling * f.B @ f.A
    return total


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """One to five adapters of any rank and scaling, some of them without this module."""
    ranks = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
    scalings = st.floats(-4, 4, allow_nan=False)
    return [make_factors(r, draw(scalings), seed) if r else None for seed, r in enumerate(ranks)]


coefficient = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-3, 3, allow_nan=False))


def draw_coefficients(data: st.DataObject, n_rows: int, n_adapters: int) -> torch.Tensor:
    row = st.lists(coefficient, min_size=n_adapters, max_size=n_adapters)
    return torch.tensor(data.draw(st.lists(row, min_size=n_rows, max_size=n_rows)), dtype=torch.float64)


@given(pool=pools(), data=st.data())
def test_each_row_gets_its_own_mixture(pool: Pool, data: st.DataObject) -> None:
    coefficients = draw_coefficients(data, 4, len(pool))
    x = torch.randn(4, 3, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = delta_output(x, stack_module(pool), coefficients)
    for row in range(4):
        torch.testing.assert_close(together[row], x[row] @ dense_sum(pool, coefficients[row]).T)


@given(pool=pools(), data=st.data())
def test_the_dense_update_is_the_sum_without_cross_terms(pool: Pool, data: st.DataObject) -> None:
    coefficients = draw_coefficients(data, 1, len(pool))[0]
    torch.testing.assert_close(delta_weight(stack_module(pool), coefficients), dense_sum(pool, coefficients))


def test_nothing_is_padded_and_every_rank_row_has_an_owner() -> None:
    module = stack_module([make_factors(2, 1.0, 0), None, make_factors(5, 3.0, 1)])
    assert module.A.shape == (7, D_IN)
    assert module.B.shape == (D_OUT, 7)
    assert module.owner.dtype == torch.int64
    assert module.owner.tolist() == [0, 0, 2, 2, 2, 2, 2]


def test_zero_coefficients_give_exactly_zero() -> None:
    module = stack_module([make_factors(3, 2.0, 0), make_factors(4, 0.5, 1)])
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    assert not delta_output(x, module, torch.zeros(2, 2, dtype=torch.float64)).any()


def test_coefficients_closer_than_bfloat16_still_differ() -> None:
    f = make_factors(3, 1.0, 0, torch.bfloat16)
    x = torch.randn(1, 200, D_IN).to(torch.bfloat16)
    near = [delta_output(x, stack_module([f]), torch.tensor([[c]])) for c in (0.3, 0.3005)]
    assert torch.tensor(0.3).bfloat16() == torch.tensor(0.3005).bfloat16()
    assert near[0].dtype == torch.bfloat16
    assert not torch.equal(*near)


def test_a_stack_of_adapters_has_every_module_that_any_adapter_has() -> None:
    f, g, h = (make_factors(rank, 2.0, rank) for rank in (1, 2, 3))
    first = Adapter("first", {"a": f, "b": g}, "", None, "", "")
    second = Adapter("second", {"b": h}, "", None, "", "")
    stacked = stack_adapters([first, second], device="cpu", dtype=torch.float64)
    assert stacked.names == ("first", "second")
    assert stacked.n_adapters == 2
    assert {name: module.owner.tolist() for name, module in stacked.modules.items()} == {
        "a": [0],
        "b": [0, 0, 1, 1, 1],
    }
    torch.testing.assert_close(stacked.modules["b"].B, torch.cat([2 * g.B, 2 * h.B], dim=1))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_scaling_is_multiplied_in_before_rounding(stored: torch.dtype) -> None:
    f = make_factors(4, 8 / 3, 0, stored)
    module = stack_adapters([Adapter("x", {"a": f}, "", None, "", "")], device="cpu", dtype=torch.bfloat16)
    expected = (f.B.float() * (8 / 3)).bfloat16()
    assert torch.equal(module.modules["a"].B, expected)
    assert module.modules["a"].A.dtype == torch.bfloat16


def test_gradients_reach_the_coefficients() -> None:
    pool: Pool = [make_factors(2, 1.5, 0), make_factors(3, 0.5, 1)]
    module = stack_module(pool)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)

    def loss(coefficients: torch.Tensor) -> torch.Tensor:
        return delta_output(x, module, coefficients).square().sum()

    coefficients = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (coefficients,))


def test_a_stack_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to stack"):
        stack_module([None, None])


def test_widths_that_differ_are_an_error_with_both() -> None:
    wide = Factors(torch.ones(2, 9), torch.ones(D_OUT, 2), 1.0)
    with pytest.raises(ValueError, match=r"widths .* differ between adapters: \[\(5, 6\), \(5, 9\)\]"):
        stack_module([make_factors(2, 1.0, 0), wide])


def test_ranks_that_differ_in_a_pair_are_an_error_with_both() -> None:
    broken = Factors(torch.ones(2, D_IN), torch.ones(D_OUT, 3), 1.0)
    with pytest.raises(ValueError, match="adapter 1: A has rank 2 but B has rank 3"):
        stack_module([None, broken])
