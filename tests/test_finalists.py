"""Who wins: lowest loss, of those that are finite, within bounds and not collapsed."""

import numpy as np
import pytest

from search.finalists import judge_finalists, make_candidates, make_references, stack_coefficients
from search.groups import Groups
from search.space import make_space

GROUPS = Groups(("a", "b"), {"x": 0, "y": 1})
NAMES = ("maths", "code")
SPACE = make_space(GROUPS, 2)


def judge(losses, *, space=SPACE, agreement_of=None, genomes=((0.3, 0.4, 0.5, 0.6), (1, 2, 3, 4))):
    candidates = make_candidates(space, np.array(genomes[:-1]), np.array(genomes[-1]))
    finalists = [*make_references(2, NAMES), *candidates]
    per_expert = np.repeat(np.array(losses)[:, None], 2, 1)
    return judge_finalists(finalists, np.array(losses), per_expert, space, agreement_of)


def test_references_are_base_uniform_merge_and_every_expert():
    references = make_references(2, NAMES)
    assert [reference.name for reference in references] == ["base", "uniform", "expert maths", "expert code"]
    expected = [[[0, 0]] * 2, [[0.5, 0.5]] * 2, [[1, 0]] * 2, [[0, 1]] * 2]
    np.testing.assert_array_equal(stack_coefficients(references), expected)
    assert all(reference.is_reference for reference in references)


def test_candidates_are_the_archive_and_the_mean_within_bounds():
    space = make_space(GROUPS, 2, high=1)
    archive, mean = make_candidates(space, np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([5.0, 5, 5, 5]))
    assert (archive.name, mean.name) == ("archive 1", "mean")
    np.testing.assert_array_equal(archive.coefficients, [[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_array_equal(mean.coefficients, np.ones((2, 2)))
    assert [found.name for found in make_candidates(space, np.empty((0, 4)), np.zeros(4))] == ["mean"]


@pytest.mark.parametrize(
    ("losses", "winner"),
    [
        ([1, 0.9, 0.8, 0.7, 0.1, 0.2], "archive 1"),
        ([1, 0.9, 0.8, 0.7, 0.3, 0.2], "mean"),
        ([1, 0.9, 0.8, 0.1, 0.3, 0.2], "expert code"),
        ([1, 0.2, 0.8, 0.7, 0.2, 0.2], "uniform"),  # equal: what needs no search
        ([1, 0.9, 0.8, 0.7, np.nan, np.nan], "expert code"),
        ([np.nan, np.nan, np.inf, -np.inf, np.nan, 5], "mean"),
    ],
)
def test_the_lowest_finite_loss_wins(losses, winner):
    judgement = judge(losses)
    assert judgement.winner.name == winner
    assert judgement.verdicts.count("winner") == 1
    for loss, verdict in zip(losses, judgement.verdicts, strict=True):
        assert (verdict == "not finite") == (not np.isfinite(loss))


def test_nobody_winning_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"no finalist can win \(base: not finite, uniform: not finite"):
        judge([np.nan] * 6)


def test_a_merge_outside_the_bounds_is_compared_but_does_not_win():
    space = make_space(GROUPS, 2, low=[0.25, -np.inf], high=[0.75, np.inf])
    judgement = judge([1, 0.9, 0.1, 0.2, 0.3, 0.4], space=space)
    assert judgement.winner.name == "archive 1"
    assert judgement.verdicts[:4] == ("outside bounds", "beaten", "outside bounds", "outside bounds")


def test_what_gives_fewer_top_answers_than_the_uniform_merge_is_set_aside():
    shares = {0.3: [0.9, 0.0], 1.0: [0.5, 0.5], 0.5: [0.5, 0.5]}  # by the first coefficient
    asked = []

    def agreement_of(coefficients):
        asked.append(coefficients[0, 0])
        return np.array(shares[coefficients[0, 0]])

    judgement = judge([1, 0.9, 0.8, 0.7, 0.1, 0.2], agreement_of=agreement_of)
    assert judgement.verdicts[4:] == ("collapsed", "winner")
    assert sorted(asked) == [0.3, 0.5, 1.0]  # each once, and nobody else
    assert judgement.agreements[5].tolist() == [0.5, 0.5]


def test_a_reference_does_not_collapse_but_its_agreement_is_asked():
    def agreement_of(coefficients):
        return coefficients.mean(0) * 0 if coefficients[0, 0] == 1 else np.ones(2)

    judgement = judge([1, 0.9, 0.1, 0.7, 0.2, 0.3], agreement_of=agreement_of)
    assert judgement.winner.name == "expert maths"
    assert judgement.agreements[judgement.place].tolist() == [0, 0]


def test_rivals_are_base_uniform_and_the_best_single_expert():
    judgement = judge([1, 0.9, 0.8, 0.7, 0.1, 0.2])
    assert judgement.rivals == {"base": 1, "uniform": 0.9, "expert code": 0.7}
