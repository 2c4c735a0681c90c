"""The last comparison, with evaluators that are given their answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from search.ending import estimate_finalists_s, judge_on_searched, judge_on_unseen
from search.finalists import make_references
from search.groups import Groups
from search.loop import Scores, SearchOutcome
from search.space import make_space
from search.steering import Steering
from search.trace import Trace, TraceWriter

SPACE = make_space(Groups(("model",), {"x": 0}), 2)


class SumEvaluator:
    """The loss is the sum of all coefficients, the top answers are kept where they are positive."""

    def __init__(self):
        self.scored = 0

    def score(self, coefficients):
        self.scored += len(coefficients)
        losses = coefficients.sum((1, 2))
        return Scores(losses, np.stack([losses, losses], -1), 0, None)

    def agreement(self, coefficients):
        self.scored += 1
        return (coefficients[0] > 0).astype(float)


@pytest.fixture
def steering():
    searched, unseen = SumEvaluator(), SumEvaluator()
    references = make_references(1, ("maths", "code"))
    known = Scores(np.array([1.0, 0.9]), np.ones((2, 2)), 0, None)
    return Steering(SPACE, searched, unseen, (), references, known, 1.0, unseen_candidate_s=2.0)


def outcome(*archive, mean=(9.0, 9.0)):
    genomes = np.array(archive, dtype=float).reshape(-1, 2)
    return SearchOutcome(genomes, genomes.sum(-1), np.array(mean), 8, "evaluations", 2)


@pytest.fixture
def recorded(tmp_path):
    """A trace to write to, and what was written."""
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    writer.header({})
    return SimpleNamespace(writer=writer, events=lambda: Trace.load(path).events)


def test_a_collapsed_merge_is_set_aside_and_recorded(steering, recorded):
    judgement = judge_on_unseen(steering, outcome((-3, 1), (-1, -1), (0.1, 0.1)), recorded.writer)
    # the first two have the lower losses, but a top answer less than the uniform merge
    assert judgement.winner.name == "base"  # 0, before 0.2; a reference cannot collapse
    (event,) = recorded.events()
    assert (event["event"], event["prompts"], event["winner"]) == ("finalists", "unseen", "base")
    assert event["names"][4:] == ["archive 1", "archive 2", "archive 3", "mean"]
    assert event["verdicts"][4:] == ["collapsed", "collapsed", "beaten", "beaten"]
    assert event["losses"] == [0, 1, 1, 1, -2, -2, 0.2, 18]
    assert event["agreement"][4:] == [[0, 1], [0, 0], None, None]
    assert event["agreement"][0] == [0, 0]


def test_the_estimate_is_what_the_comparison_takes_at_most(steering, recorded):
    archive = [(-index, -1) for index in range(1, 5)]
    judge_on_unseen(steering, outcome(*archive, mean=(-9, -9)), recorded.writer)  # all collapse
    assert estimate_finalists_s(steering, 4) == 2.0 * steering.unseen.scored


def test_on_searched_prompts_the_archives_best_meets_base_and_uniform(steering, recorded):
    judgement = judge_on_searched(steering, outcome((0.2, 0.3), (0.4, 0.4)), recorded.writer)
    assert judgement.winner.name == "archive 1"
    assert steering.searched.scored == 1
    assert not judgement.agreements
    (event,) = recorded.events()
    assert (event["prompts"], event["losses"]) == ("searched", [1, 0.9, 0.5])


def test_on_searched_prompts_too_the_winner_is_no_worse_than_the_references(steering, recorded):
    assert judge_on_searched(steering, outcome((0.8, 0.3)), recorded.writer).winner.name == "uniform"


def test_without_an_archive_nothing_is_scored(steering, recorded):
    assert judge_on_searched(steering, outcome(), recorded.writer).winner.name == "uniform"
    assert steering.searched.scored == 0
