"""A search in the kit races as a whole run does, and merges without one where there is no time."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from search.adapters import load_adapter
from search.base import load_base
from search.config import load_config
from search.finalists import BALANCED, PRIOR
from search.groups import group_modules
from search.kit_search import race, search_in_kit, seconds_of
from search.kit_signals import KitRun, KitSteering
from search.racing import BlockScores, Race, order_blocks, plan_race
from search.stack import stack_adapters
from search.stand_ins import make_plain_space, read_settings
from search.timebox import TimeBox
from tests.test_merges import save_toy_zoo


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
    for one, other in zip(ours.rungs, whole.rungs, strict=True):
        assert (one["prompts"], one["candidates"].tolist()) == (other["prompts"], other["candidates"])
        np.testing.assert_array_equal(one["losses"], other["losses"])


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


QUICK = ("prompts.per_adapter=2", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8", "device=cpu")
QUICK_SEARCH = ("search.max_evaluations=24", "search.n_candidates=8", "search.gradient.refine_steps=2")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Base, adapters and configuration of the toy zoo."""
    config = load_config(save_toy_zoo(tmp_path_factory.mktemp("zoo")), [*QUICK, *QUICK_SEARCH])
    base = load_base(config.base.source, device="cpu")
    return base, [load_adapter(adapter.source) for adapter in config.adapters], config


def make_run(zoo, box):
    base, adapters, config = zoo
    stacked = stack_adapters(adapters, device="cpu", dtype=base.model.dtype)
    groups = group_modules(stacked.modules, "model")
    events = []
    trace = SimpleNamespace(
        event=lambda name, **content: events.append((name, content)),
        write=lambda kind, **content: events.append((kind, content)),
    )
    balanced = np.full(len(adapters), 0.4)
    run = KitRun(
        model=base.model,
        tokenizer=base.tokenizer,
        stacked=stacked,
        groups=groups,
        skeletons=[adapter.skeletons for adapter in config.adapters],
        settings=read_settings(config.model_dump(mode="json")),
        box=box,
        trace=trace,
        start=balanced[None].copy(),
        spread=balanced[None] / 2,
        balanced=balanced,
        has_prior=False,
        make_space=lambda low, high: make_plain_space(None, groups, low, high),
        measure_later=lambda: 1.0,
        mix=lambda table: None,
    )
    return run, events


@pytest.mark.parametrize("limit_s", [20, 40, 60, 100, 160, 300, 1e6])
def test_however_little_time_there_is_somebody_wins(zoo, limit_s):
    """By a clock that goes on a second whenever somebody looks at it."""
    run, events = make_run(zoo, TimeBox(limit_s, clock=itertools.count().__next__))
    winner = search_in_kit(run)
    assert winner.coefficients.shape == (1, len(run.balanced))
    assert np.isfinite(winner.coefficients).all()
    assert run.box.reserves["later"] >= 1.0  # what the kit answers afterwards keeps its time
    last, said = events[-1]
    if last == "search_skipped":
        assert winner.name == BALANCED
        return
    assert last == "finalists"
    assert said["prompts"] in ("unseen", "searched")
    ended_by = next(content["ended_by"] for name, content in events if name == "search_ended")
    n_generations = sum(name == "generation" for name, _ in events)
    assert (ended_by == "evaluations") == (n_generations == 3)
    if limit_s > 1e5:
        assert (ended_by, said["prompts"]) == ("evaluations", "unseen")


def test_what_experts_say_is_freed_when_the_search_ends(zoo):
    """By counts of references: a GPU's memory is needed before the collector of cycles comes round."""
    run, _ = make_run(zoo, TimeBox(1e6, clock=itertools.count().__next__))
    kept = []

    def steer(run):
        steering = KitSteering(run)
        both = steering.searched, steering.unseen
        kept.extend(weakref.ref(found) for own in both for found in (own, own._signals.logits))
        return steering

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("search.kit_search.KitSteering", steer)
            search_in_kit(run)
        assert [found() for found in kept] == [None] * 4
    finally:
        gc.enable()
