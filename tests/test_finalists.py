"""Who wins: lowest loss, of those that are finite, within bounds and not collapsed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.finalists import (
    Bounds,
    choose_finalists,
    judge_finalists,
    make_candidates,
    make_references,
    stack_coefficients,
)

NAMES = ("maths", "code")
BALANCED = np.array([0.6, 0.8])
FREE = Bounds(np.full(2, -np.inf), np.full(2, np.inf))
PRIOR = np.array([[0.2, 0.6], [0.7, 0.1]])
ARCHIVE = np.array([[[0.3, 0.4], [0.5, 0.6]]])
MEAN = np.array([[1.5, 2], [3, 4]])


def judge(losses, *, bounds=FREE, agreement_of=None, prior=None, refined=None):
    """Base, uniform, balanced, [prior], maths, code, archive 1, mean, [refined], in this order."""
    finalists = [*make_references(2, NAMES, BALANCED, prior), *make_candidates(ARCHIVE, MEAN, refined)]
    per_expert = np.repeat(np.array(losses)[:, None], 2, 1)
    return judge_finalists(finalists, np.array(losses), per_expert, bounds, agreement_of)


def test_references_are_base_uniform_and_balanced_merge_and_every_expert():
    references = make_references(2, NAMES, BALANCED)
    names = ["base", "uniform", "balanced", "expert maths", "expert code"]
    assert [reference.name for reference in references] == names
    expected = [[[0, 0]] * 2, [[0.5, 0.5]] * 2, [[0.6, 0.8]] * 2, [[1, 0]] * 2, [[0, 1]] * 2]
    np.testing.assert_array_equal(stack_coefficients(references), expected)
    assert all(reference.is_reference for reference in references)


def test_a_priors_start_is_a_reference_between_balanced_and_experts():
    references = make_references(2, NAMES, BALANCED, PRIOR)
    assert [reference.name for reference in references][2:5] == ["balanced", "prior", "expert maths"]
    np.testing.assert_array_equal(references[3].coefficients, PRIOR)
    assert references[3].is_reference


def test_candidates_are_the_archive_the_mean_and_what_gradient_steps_made_of_the_best():
    candidates = make_candidates(np.stack([PRIOR, MEAN]), MEAN + 1, MEAN + 2)
    assert [found.name for found in candidates] == ["archive 1", "archive 2", "mean", "refined"]
    expected = [PRIOR, MEAN, MEAN + 1, MEAN + 2]
    np.testing.assert_array_equal(stack_coefficients(candidates), expected)
    assert not any(found.is_reference for found in candidates)
    assert [found.name for found in make_candidates(np.empty((0, 2, 2)), MEAN, None)] == ["mean"]


@pytest.mark.parametrize(
    ("losses", "winner"),
    [
        ([1, 0.9, 0.9, 0.8, 0.7, 0.1, 0.2], "archive 1"),
        ([1, 0.9, 0.9, 0.8, 0.7, 0.3, 0.2], "mean"),
        ([1, 0.9, 0.9, 0.8, 0.1, 0.3, 0.2], "expert code"),
        ([1, 0.2, 0.9, 0.8, 0.7, 0.2, 0.2], "uniform"),  # equal: what needs no search
        ([1, 0.9, 0.2, 0.8, 0.7, 0.2, 0.2], "balanced"),
        ([1, 0.9, 0.9, 0.8, 0.7, np.nan, np.nan], "expert code"),
        ([np.nan, np.nan, np.nan, np.inf, -np.inf, np.nan, 5], "mean"),
    ],
)
def test_the_lowest_finite_loss_wins(losses, winner):
    judgement = judge(losses)
    assert judgement.winner.name == winner
    assert judgement.verdicts.count("winner") == 1
    for loss, verdict in zip(losses, judgement.verdicts, strict=True):
        assert (verdict == "not finite") == (not np.isfinite(loss))


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, np.nan, np.inf]), min_size=9, max_size=9))
def test_the_winner_is_never_worse_than_any_reference(losses):
    finite = [loss for loss in losses if np.isfinite(loss)]
    if not finite:
        with pytest.raises(ValueError, match="no finalist can win"):
            judge(losses, prior=PRIOR, refined=MEAN)
        return
    judgement = judge(losses, prior=PRIOR, refined=MEAN)
    assert judgement.losses[judgement.place] == min(finite)
    assert judgement.place == losses.index(min(finite))


@pytest.mark.parametrize(
    ("losses", "winner"),
    [
        ([1, 0.9, 0.9, 0.1, 0.8, 0.7, 0.3, 0.2, 0.4], "prior"),
        ([1, 0.9, 0.9, 0.1, 0.8, 0.7, 0.1, 0.1, 0.1], "prior"),  # equal: what needs no search
        ([1, 0.9, 0.9, 0.3, 0.8, 0.7, 0.3, 0.2, 0.1], "refined"),
        ([1, 0.9, 0.9, 0.3, 0.8, 0.7, 0.1, 0.2, 0.1], "archive 1"),
    ],
)
def test_a_prior_and_a_refined_merge_can_win(losses, winner):
    assert judge(losses, prior=PRIOR, refined=MEAN).winner.name == winner


def test_nobody_winning_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"no finalist can win \(base: not finite, uniform: not finite"):
        judge([np.nan] * 7)


def test_a_merge_outside_the_bounds_is_compared_but_does_not_win():
    bounds = Bounds(np.array([0.25, -np.inf]), np.array([0.75, np.inf]))
    judgement = judge([1, 0.9, 0.8, 0.05, 0.1, 0.2, 0.4, 0.3], bounds=bounds, prior=PRIOR)
    assert judgement.winner.name == "archive 1"
    outside = "outside bounds"
    assert judgement.verdicts == (outside, "beaten", "beaten", outside, outside, outside, "winner", outside)


def test_bounds_hold_what_lies_on_them():
    bounds = Bounds(np.array([0.25, -np.inf]), np.array([0.75, np.inf]))
    assert bounds.hold(np.array([[0.25, 99], [0.75, -99]]))
    assert not bounds.hold(np.array([[0.25, 0], [0.7500001, 0]]))
    assert not bounds.hold(np.array([[0.2499999, 0], [0.5, 0]]))


def test_what_gives_fewer_top_answers_than_the_uniform_merge_is_set_aside():
    shares = {0.3: [0.9, 0.0], 1.5: [0.5, 0.5], 0.5: [0.5, 0.5]}  # by the first coefficient
    asked = []

    def agreement_of(coefficients):
        asked.append(coefficients[0, 0])
        return np.array(shares[coefficients[0, 0]])

    judgement = judge([1, 0.9, 0.9, 0.8, 0.7, 0.1, 0.2], agreement_of=agreement_of)
    assert judgement.verdicts[5:] == ("collapsed", "winner")
    assert sorted(asked) == [0.3, 0.5, 1.5]  # each once, and nobody else
    assert judgement.agreements[6].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("reference", ["balanced", "prior", "expert maths"])
def test_a_reference_does_not_collapse_but_its_agreement_is_asked(reference):
    def agreement_of(coefficients):
        return np.full(2, float((coefficients == 0.5).all()))  # of the uniform merge alone

    losses = [1, 0.9, 0.5, 0.5, 0.5, 0.7, 0.2, 0.3]
    losses[{"balanced": 2, "prior": 3, "expert maths": 4}[reference]] = 0.1
    judgement = judge(losses, agreement_of=agreement_of, prior=PRIOR)
    assert judgement.winner.name == reference
    assert judgement.agreements[judgement.place].tolist() == [0, 0]


def test_rivals_are_base_uniform_balanced_prior_and_the_best_single_expert():
    judgement = judge([1, 0.9, 0.75, 0.8, 0.7, 0.1, 0.2])
    assert judgement.rivals == {"base": 1, "uniform": 0.9, "balanced": 0.75, "expert code": 0.7}
    judgement = judge([1, 0.9, 0.75, 0.6, 0.7, 0.8, 0.1, 0.2], prior=PRIOR)
    first = {"base": 1, "uniform": 0.9, "balanced": 0.75}
    assert judgement.rivals == {**first, "prior": 0.6, "expert maths": 0.7}


def test_where_time_is_short_single_experts_are_given_up_first_then_the_archives_end():
    archive = np.repeat(ARCHIVE, 3, 0)
    finalists = [*make_references(2, NAMES, BALANCED, PRIOR), *make_candidates(archive, MEAN, ARCHIVE[0])]
    names = [finalist.name for finalist in finalists]

    def kept(n_most):
        return [finalist.name for finalist in choose_finalists(finalists, n_most)]

    few = ["base", "uniform", "balanced", "prior", "archive 1", "mean", "refined"]
    assert kept(len(names)) == names
    assert kept(10) == [name for name in names if name != "expert code"]
    assert kept(8) == [*few[:5], "archive 2", *few[5:]]
    assert kept(7) == kept(0) == few
