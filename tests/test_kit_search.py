"""A search in the kit races as a whole run does, and merges without one where there is no time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from search.finalists import BALANCED, PRIOR
from search.kit_search import race, search_in_kit, seconds_of
from search.kit_signals import KitRun
from search.racing import BlockScores, Race, order_blocks, plan_race
from search.timebox import TimeBox


class Scorer:
    """Losses of tables (n_candidates, 1, n_experts) that differ from block to block; one expert is broken."""

    n_blocks = 4

    def score_blocks(self, table, blocks):
        table = table.reshape(len(table), -1)
        noise = np.stack([np.random.default_rng(block).normal(size=table.shape[1]) for block in blocks])
        sums = ((table[:, None] - noise) ** 2).sum(axis=1)
        sums[table[:, 0] > 1.2] = np.nan
        counts, prompts = np.full(table.shape[1], len(blocks)), np.asarray(blocks)
        means = np.zeros((len(table), len(blocks)))
        return BlockScores(sums, counts, prompts, means, 7 * len(table) * len(blocks), None)

    def combine(self, sums, counts):
        per_expert = sums / counts
        return per_expert.mean(axis=1), per_expert


@pytest.mark.parametrize("keep", [None, 0.25, 0.5])
@pytest.mark.parametrize("n_candidates", [1, 5, 16])
def test_a_race_is_the_race_of_a_whole_run(keep, n_candidates):
    table = np.random.default_rng(n_candidates).normal(size=(n_candidates, 1, 3))
    rungs, order = plan_race(n_candidates, 4, keep), order_blocks(4, 1, 2)
    whole = Race(table.reshape(n_candidates, -1), Scorer())
    whole.run(rungs, order)
    ours = race(Scorer(), table, rungs, order)
    np.testing.assert_array_equal(ours.losses, whole.losses())
    np.testing.assert_array_equal(ours.per_expert, whole.per_expert)
    assert ours.n_tokens == whole.n_tokens
    assert [rung[0].tolist() for rung in ours.rungs] == [rung["candidates"] for rung in whole.rungs]


def test_a_race_without_a_finite_loss_ends():
    table = np.full((4, 1, 3), 2.0)
    found = race(Scorer(), table, plan_race(4, 4, 0.5), order_blocks(4, 1, 2))
    assert len(found.rungs) == 1
    assert np.isnan(found.losses).all()


@pytest.mark.parametrize(("has_prior", "name"), [(False, BALANCED), (True, PRIOR)])
def test_without_time_the_merge_that_needs_no_search_wins(has_prior, name, caplog):
    events, model = [], torch.nn.Linear(1, 1)
    run = KitRun(
        model=model,
        tokenizer=None,
        stacked=SimpleNamespace(names=("a", "b")),
        groups=SimpleNamespace(names=("model",)),
        skeletons=[[], []],
        settings=None,
        box=TimeBox(10.0),
        trace=SimpleNamespace(event=lambda name, **content: events.append(name)),
        start=np.array([[0.1, 0.2]]),
        spread=np.ones((1, 2)),
        balanced=np.array([0.5, 0.25]),
        has_prior=has_prior,
        make_space=None,
        measure_later=lambda: 11.0,
        mix=None,
    )
    run.box.reserve("later", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.kit_search.KitSteering", lambda run: run.model(torch.zeros(1, 1)))
        winner = search_in_kit(run)
    assert winner.name == name
    np.testing.assert_array_equal(winner.coefficients, [[0.1, 0.2]] if has_prior else [[0.5, 0.25]])
    assert events == ["search_skipped"]
    assert "too short to search" in caplog.text
    model(torch.zeros(1, 1))  # the clock is not looked at any more


def test_seconds_are_those_of_the_step():
    done = []
    assert 0 <= seconds_of(lambda: done.append(1)) < 1
    assert done == [1]
