"""The last comparison, with evaluators that are given their answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from search.ending import Pace, descend, estimate_finalists_s, judge_on_searched, judge_on_unseen, refine_best
from search.evaluate import GradientScores
from search.finalists import Bounds, make_references
from search.groups import group_modules
from search.loop import Scores
from search.space import make_space
from search.stages import Found
from search.steering import Steering
from search.trace import Trace, TraceWriter

SPACE = make_space(group_modules(["model.layers.0.mlp"], "model"), 2)
FREE = Bounds(np.full(2, -np.inf), np.full(2, np.inf))
BALANCED = np.array([0.6, 0.7])
PRIOR = np.array([[0.4, 0.1]])
TARGET = np.array([[0.7, -0.2]])


class SumEvaluator:
    """The loss is the sum of all coefficients, the top answers are kept where they are positive.

    The gradient is another loss's: of the squared distance to a target.
    """

    def __init__(self):
        self.scored = 0

    def score(self, coefficients):
        self.scored += len(coefficients)
        losses = coefficients.sum((1, 2))
        return Scores(losses, np.stack([losses, losses], -1), 0, None)

    def agreement(self, coefficients):
        self.scored += 1
        return (coefficients[0] > 0).astype(float)

    def gradient(self, coefficients):
        away = coefficients - TARGET
        return GradientScores(float((away**2).sum()), 2 * away, np.zeros(2), n_tokens=10)


def make_steering(prior=None, bounds=FREE):
    references = make_references(1, ("maths", "code"), BALANCED, prior)
    losses = np.array([1.0, 0.9, 0.95, 0.6])[: len(references) - 2]
    return Steering(
        bounds=bounds,
        searched=SumEvaluator(),
        unseen=SumEvaluator(),
        budget=None,
        weak=(),
        reasons=(),
        references=references,
        reference_scores=Scores(losses, np.stack([losses, losses], -1), 0, None),
        searched_candidate_s=1.0,
        unseen_candidate_s=2.0,
    )


def make_found(*archive, mean=(9.0, 9.0)):
    tables = np.array(archive, dtype=float).reshape(-1, 1, 2)
    losses = tables.sum((1, 2))
    per_expert = np.stack([losses, losses], -1) if len(archive) else np.empty((0, 0))
    mean = np.array([mean])
    return Found(tables, losses, per_expert, mean, mean, evaluations=8, generations=2, ended_by="evaluations")


@pytest.fixture
def recorded(tmp_path):
    """A trace to write to, and what was written."""
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    writer.header({})
    return SimpleNamespace(writer=writer, events=lambda: Trace.load(path).events)


def test_a_collapsed_merge_is_set_aside_and_recorded(recorded):
    found = make_found((-3, 1), (-1, -1), (0.1, 0.1))
    judgement = judge_on_unseen(make_steering(), found, None, recorded.writer)
    # the first two have the lower losses, but a top answer less than the uniform merge
    assert judgement.winner.name == "base"  # 0, before 0.2; a reference cannot collapse
    (event,) = recorded.events()
    assert (event["event"], event["prompts"], event["winner"]) == ("finalists", "unseen", "base")
    assert event["names"][5:] == ["archive 1", "archive 2", "archive 3", "mean"]
    assert event["verdicts"][5:] == ["collapsed", "collapsed", "beaten", "beaten"]
    assert event["losses"] == pytest.approx([0, 1, 1.3, 1, 1, -2, -2, 0.2, 18])
    assert event["agreement"][5:] == [[0, 1], [0, 0], None, None]
    assert event["agreement"][0] == [0, 0]
    assert event["winner_coefficients"] == [[0, 0]]


def test_the_prior_and_the_refined_best_are_compared_too(recorded):
    steering, refined = make_steering(PRIOR), np.array([[-0.3, 0.2]])
    judge_on_unseen(steering, make_found((0.3, 0.3)), refined, recorded.writer)
    (event,) = recorded.events()
    general, experts = ["base", "uniform", "balanced", "prior"], ["expert maths", "expert code"]
    assert event["names"] == [*general, *experts, "archive 1", "mean", "refined"]
    np.testing.assert_allclose(event["losses"], [0, 1, 1.3, 0.5, 1, 1, 0.6, 18, -0.1])
    assert steering.searched.scored == 0


@pytest.mark.parametrize("prior", [None, PRIOR])
def test_the_estimate_is_what_the_comparison_takes_at_most(recorded, prior):
    steering = make_steering(prior)
    archive = [(-index, -1) for index in range(1, 5)]
    found = make_found(*archive, mean=(-9, -9))  # all collapse
    judge_on_unseen(steering, found, np.array([[-8, -8]]), recorded.writer)
    assert estimate_finalists_s(steering, 4) == 2.0 * steering.unseen.scored


def test_what_lies_outside_the_bounds_does_not_win(recorded):
    steering = make_steering(bounds=Bounds(np.array([0.25, -np.inf]), np.array([0.75, np.inf])))
    judgement = judge_on_unseen(steering, make_found((0.2, 0.1), (0.3, 0.1)), None, recorded.writer)
    assert judgement.winner.name == "archive 2"
    assert judgement.verdicts[0] == "outside bounds"  # the base


def test_on_searched_prompts_the_archives_best_meets_base_uniform_and_balanced(recorded):
    judgement = judge_on_searched(make_steering(), make_found((0.2, 0.3), (0.4, 0.4)), recorded.writer)
    assert judgement.winner.name == "archive 1"
    assert not judgement.agreements
    (event,) = recorded.events()
    assert (event["prompts"], event["losses"]) == ("searched", [1, 0.9, 0.95, 0.5])
    assert event["names"] == ["base", "uniform", "balanced", "archive 1"]
    assert event["per_expert"][3] == [0.5, 0.5]
    assert event["agreement"] == [None] * 4


@pytest.mark.parametrize(("best", "winner"), [((0.3, 0.2), "archive 1"), ((0.4, 0.3), "prior")])
def test_on_searched_prompts_it_meets_the_prior_too(recorded, best, winner):
    judgement = judge_on_searched(make_steering(PRIOR), make_found(best), recorded.writer)
    assert judgement.winner.name == winner
    np.testing.assert_array_equal(judgement.losses[:4], [1, 0.9, 0.95, 0.6])
    assert recorded.events()[0]["names"] == ["base", "uniform", "balanced", "prior", "archive 1"]


def test_on_searched_prompts_too_the_winner_is_no_worse_than_the_references(recorded):
    judgement = judge_on_searched(make_steering(), make_found((0.8, 0.3)), recorded.writer)
    assert judgement.winner.name == "uniform"


@pytest.mark.parametrize("archive", [[], [(0.2, 0.3), (0.4, 0.4)]])
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_on_searched_prompts_nothing_is_scored_as_all_is_known(recorded, archive, prior):
    steering = make_steering(prior)
    judge_on_searched(steering, make_found(*archive), recorded.writer)
    assert (steering.searched.scored, steering.unseen.scored) == (0, 0)


def test_without_an_archive_the_best_reference_wins(recorded):
    assert judge_on_searched(make_steering(), make_found(), recorded.writer).winner.name == "uniform"
    assert judge_on_searched(make_steering(PRIOR), make_found(), recorded.writer).winner.name == "prior"


def test_descent_goes_to_the_target_and_counts_its_tokens():
    descent, n_tokens = descend(make_steering(), np.zeros((1, 2)), steps=200, learning_rate=0.05)
    np.testing.assert_allclose(descent.best, TARGET, atol=1e-2)
    assert n_tokens == 201 * 10


def test_descent_stays_within_the_bounds_of_weak_adapters():
    bounds = Bounds(np.array([-np.inf, 0.25]), np.array([np.inf, 0.75]))
    descent, _ = descend(make_steering(bounds=bounds), np.full((1, 2), 0.5), steps=200, learning_rate=0.05)
    np.testing.assert_allclose(descent.best, [[0.7, 0.25]], atol=1e-2)
    assert bounds.hold(descent.best)


def test_the_archives_best_is_refined_and_recorded(recorded):
    found = make_found((0.1, 0.0), (5, 5))
    refined = refine_best(make_steering(), found, SPACE, Pace(30, 0.05, lambda: True), recorded.writer)
    assert ((refined - TARGET) ** 2).sum() < 0.1 * ((found.archive[0] - TARGET) ** 2).sum()
    (event,) = recorded.events()
    assert (event["event"], event["steps"], event["n_tokens"]) == ("refined", 30, 310)
    assert len(event["losses"]) == 31
    assert event["losses"][0] == pytest.approx(((found.archive[0] - TARGET) ** 2).sum())


@pytest.mark.parametrize(("archive", "may"), [([], True), ([(0.1, 0.0)], False)])
def test_without_time_or_an_archive_nothing_is_refined(recorded, archive, may):
    pace = Pace(5, 0.05, lambda: may)
    assert refine_best(make_steering(), make_found(*archive), SPACE, pace, recorded.writer) is None
    assert recorded.events() == []


def test_a_refinement_ends_when_its_time_does(recorded):
    answers = iter([True] * 4 + [False])
    pace = Pace(30, 0.05, lambda: next(answers))
    refined = refine_best(make_steering(), make_found((0.1, 0.0)), SPACE, pace, recorded.writer)
    (event,) = recorded.events()
    assert len(event["losses"]) == 4  # the first answer allowed the start
    assert ((refined - TARGET) ** 2).sum() == pytest.approx(min(event["losses"]))
