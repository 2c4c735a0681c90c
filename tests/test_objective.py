"""Objectives: the algebra they promise, and scipy as the reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from search.errors import InputError
from search.objective import (
    COMBINATIONS,
    OBJECTIVES,
    combine_experts,
    disagreement,
    entropy,
    entropy_excess,
    entropy_gap,
    forward_kl,
    nll,
    normalise,
    relative_entropy_gap,
    reverse_kl,
    sum_by_index,
    top1_disagreement,
)

N_VOCAB = 7
TOKENS = torch.tensor([3])


@st.composite
def log_probabilities(draw):
    """(1, n_vocab) float64, from near-uniform to near-certain."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([1e-3, 1.0, 8.0, 60.0]))
    return torch.from_numpy(sharpness * rng.normal(size=(1, N_VOCAB))).log_softmax(-1)


def one_hot_logp(token: int) -> torch.Tensor:
    return torch.full((1, N_VOCAB), -math.inf, dtype=torch.float64).index_fill(1, torch.tensor([token]), 0.0)


@given(log_probabilities(), log_probabilities())
def test_entropies_and_divergences_equal_scipy(merged, expert):
    p, q = merged.exp().numpy()[0], expert.exp().numpy()[0]
    close = {"rel": 1e-7, "abs": 1e-12}
    assert entropy(merged).item() == pytest.approx(scipy_entropy(p), **close)
    assert forward_kl(merged, expert).item() == pytest.approx(scipy_entropy(q, p), **close)
    assert reverse_kl(merged, expert).item() == pytest.approx(scipy_entropy(p, q), **close)
    assert entropy_excess(merged, expert).item() == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-12)
    gap = abs(scipy_entropy(p) - scipy_entropy(q))
    assert entropy_gap(merged, expert).item() == pytest.approx(gap, **close)
    assert relative_entropy_gap(merged, expert).item() == pytest.approx(
        gap / (scipy_entropy(q) + 0.1), **close
    )


@given(log_probabilities(), log_probabilities())
def test_the_excess_is_symmetric_bounded_and_zero_only_where_both_agree(merged, expert):
    excess = entropy_excess(merged, expert)
    torch.testing.assert_close(excess, entropy_excess(expert, merged), rtol=0, atol=0)
    assert 0 <= excess.item() <= math.log(2) + 1e-12
    assert entropy_excess(merged, merged).item() == pytest.approx(0, abs=1e-14)
    total_variation = (merged.exp() - expert.exp()).abs().sum().item() / 2
    assert excess.item() >= total_variation**2 / 2 - 1e-12  # Pinsker's inequality, on both halves


@given(log_probabilities())
def test_a_merge_that_is_the_expert_costs_nothing(logp):
    for name in ("entropy_excess", "entropy_gap", "relative_entropy_gap", "forward_kl", "reverse_kl"):
        assert disagreement(name, logp, logp, TOKENS).item() == pytest.approx(0, abs=1e-14)
    assert top1_disagreement(logp, logp).item() == 0


def test_the_gap_cannot_tell_two_certain_answers_apart_and_the_excess_can():
    assert entropy_gap(one_hot_logp(0), one_hot_logp(1)).item() == 0
    assert entropy_excess(one_hot_logp(0), one_hot_logp(1)).item() == pytest.approx(math.log(2))


def test_zero_probabilities_give_finite_values_and_gradients():
    expert = torch.randn(1, N_VOCAB, dtype=torch.float64).log_softmax(-1)
    for name in OBJECTIVES:
        merged = one_hot_logp(0).requires_grad_()
        value = disagreement(name, merged, expert, TOKENS)
        assert torch.isfinite(value).all(), name
        if name != "top1_disagreement":
            value.sum().backward()
            assert torch.isfinite(merged.grad).all(), name
    assert forward_kl(one_hot_logp(0), one_hot_logp(1)).item() == 1e4


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "top1_disagreement"])
def test_gradients_are_right(name):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, N_VOCAB, dtype=torch.float64, generator=gen).requires_grad_()
    expert = torch.randn(4, N_VOCAB, dtype=torch.float64, generator=gen).log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 6])
    assert torch.autograd.gradcheck(lambda x: disagreement(name, x.log_softmax(-1), expert, tokens), logits)


def test_float32_over_a_real_vocabulary_stays_close_and_never_negative():
    gen = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 32_000, generator=gen)
    nudged = logits + 1e-3 * torch.randn(16, 32_000, generator=gen)
    exact = entropy_excess(logits.double().log_softmax(-1), nudged.double().log_softmax(-1))
    rough = entropy_excess(logits.log_softmax(-1), nudged.log_softmax(-1))
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=2e-6)
    assert (rough >= 0).all()
    assert (forward_kl(logits.log_softmax(-1), logits.log_softmax(-1)) >= 0).all()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_population_is_its_candidates_one_by_one(name):
    gen = torch.Generator().manual_seed(0)
    merged = torch.randn(3, 5, N_VOCAB, generator=gen).log_softmax(-1)
    expert = torch.randn(5, N_VOCAB, generator=gen).log_softmax(-1)
    tokens = torch.tensor([0, 1, 2, 3, 6])
    together = disagreement(name, merged, expert, tokens)
    assert together.shape == (3, 5)
    for candidate in range(3):
        torch.testing.assert_close(together[candidate], disagreement(name, merged[candidate], expert, tokens))


def test_top1_nll_and_entropy_minimisation_read_what_they_say():
    merged = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]).log()
    expert = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]).log()
    tokens = torch.tensor([1, 2])
    assert top1_disagreement(merged, expert).tolist() == [0, 1]
    torch.testing.assert_close(nll(merged, tokens), -torch.tensor([0.2, 0.7]).log())
    torch.testing.assert_close(disagreement("entropy_minimisation", merged, expert, tokens), entropy(merged))


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sums_by_index_equal_a_loop(size, seed):
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(size, (10,), generator=gen)
    values = torch.randn(2, 3, 10, dtype=torch.float64, generator=gen)
    sums = sum_by_index(values, index, size)
    for one in range(size):
        torch.testing.assert_close(sums[..., one], values[..., index == one].sum(-1))


def test_a_sum_that_is_nan_spoils_no_other_and_gradients_flow():
    values = torch.tensor([1.0, math.nan, 2.0], requires_grad=True)
    sums = sum_by_index(values, torch.tensor([0, 1, 0]), 3)
    torch.testing.assert_close(sums, torch.tensor([3.0, math.nan, 0.0]), equal_nan=True)
    sums[0].backward()
    assert values.grad.tolist() == [1, 0, 1]


def test_normalising_makes_the_base_one_except_below_the_floor():
    base = torch.tensor([0.5, 0.001])
    torch.testing.assert_close(normalise(base, base, 0.02), torch.tensor([1.0, 0.05]))


def test_combinations_on_hand_computed_values():
    values = torch.tensor([[0.0, 0.04, 0.16, 0.36, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(combine_experts(values, "mean"), torch.tensor([0.312, 1.0]))
    torch.testing.assert_close(combine_experts(values, "mean_sqrt"), torch.tensor([0.44, 1.0]))
    torch.testing.assert_close(combine_experts(values, "worst"), torch.tensor([0.68, 1.0]))  # 2 of 5


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.randoms())
def test_combining_ignores_the_order_of_experts_and_lies_within_their_range(values, random):
    shuffled = random.sample(values, len(values))
    for how in COMBINATIONS:
        loss = combine_experts(torch.tensor(values, dtype=torch.float64), how).item()
        other = combine_experts(torch.tensor(shuffled, dtype=torch.float64), how).item()
        assert loss == pytest.approx(other)
        reach = loss**2 if how == "mean_sqrt" else loss
        assert min(values) - 1e-9 <= reach <= max(values) + 1e-9


def test_nan_stays_nan_in_every_combination():
    for how in COMBINATIONS:
        assert combine_experts(torch.tensor([0.1, math.nan, 0.2]), how).isnan()


def test_the_root_is_exact_everywhere_and_has_a_finite_slope_at_zero():
    values = torch.tensor([0.0, 1e-40, 1e-20, 1e-6, 0.25, 4.0], dtype=torch.float64, requires_grad=True)
    loss = combine_experts(values, "mean_sqrt")
    assert loss.item() == values.detach().sqrt().mean().item()
    (slopes,) = torch.autograd.grad(loss, values)
    expected = 1 / (2 * values.detach()[3:].sqrt()) / 6
    torch.testing.assert_close(slopes, torch.cat([torch.zeros(3), expected]).double())


@pytest.mark.parametrize("how", list(COMBINATIONS))
def test_gradients_of_combinations_are_right(how):
    values = torch.tensor([[0.3, 1.1, 0.01, 0.7, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: combine_experts(x, how), values)


def own_objective(merged, expert, tokens):
    return (merged - expert).abs().amax(-1)


def test_a_user_s_function_is_called_with_what_the_shipped_ones_get():
    merged, expert = torch.rand(3, 5, N_VOCAB), torch.rand(5, N_VOCAB)
    tokens = torch.arange(5)
    calls = []

    def noted(*arguments):
        calls.append(arguments)
        return own_objective(*arguments)

    values = disagreement(noted, merged, expert, tokens)
    assert torch.equal(values, own_objective(merged, expert, tokens))
    assert calls[0][0] is merged
    assert calls[0][1] is expert
    assert calls[0][2] is tokens


class Own:
    """A callable that is no function."""

    def __call__(self, merged, expert, tokens):
        return 0.5


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda merged, expert, tokens: merged, r"<lambda> returned torch.float32 \(4, 7\)"),
        (lambda merged, expert, tokens: merged.mean(), r"<lambda> returned torch.float32 \(\)"),
        (lambda merged, expert, tokens: merged.argmax(-1), r"<lambda> returned torch.int64 \(4,\)"),
        (Own(), "test_objective:Own returned float,"),
    ],
)
def test_a_user_s_function_that_returns_something_else_is_named(function, found):
    logp = torch.zeros(4, N_VOCAB)
    expected = (
        rf"objective.name: .*{found}.* expected a floating-point tensor of shape \(n_positions,\) = \(4,\)"
    )
    with pytest.raises(InputError, match=expected):
        disagreement(function, logp, logp, torch.zeros(4, dtype=torch.int64))


def test_unknown_names_list_the_known_ones():
    logp = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"unknown objective 'js'; known: entropy_excess, entropy_gap"):
        disagreement("js", logp, logp, TOKENS)
    with pytest.raises(ValueError, match="unknown combination 'max'; known: mean, mean_sqrt, worst"):
        combine_experts(torch.ones(2), "max")
