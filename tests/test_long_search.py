"""Long searches on the shipped zoo: the loss is the search's own, the curve is where it went."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import long_search as module
from benchmarks.long_search import (
    Generation,
    SearchJob,
    SearchLoss,
    SearchPlan,
    checkpoints,
    generations,
    long_search,
    penalties,
    visited_merges,
)
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from tests.fidelity_toys import shipped_scene

PLAN = SearchPlan("entropy_excess", "layer", 0, 32)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return SearchJob(shipped_scene(tmp_path_factory.getbasetemp()), PLAN, n_prompts=1)


def test_the_loss_is_that_of_the_search(job):
    loaded = job.scene.load()
    parts, prompts = loaded.parts, loaded.prompts("skeleton", 1, 0)
    signals = expert_signals(parts.model, parts.stacked, parts.groups, prompts)
    evaluator = PopulationEvaluator(parts.model, parts.stacked, parts.groups, prompts, signals, Scoring())
    tables = np.random.default_rng(0).uniform(0, 0.6, (2, *parts.shape))
    found = SearchLoss(loaded, 1, 0).losses(tables, PLAN)
    np.testing.assert_allclose(found, evaluator.score(tables).losses, rtol=1e-4)


def test_terms_are_added_by_their_weights(job):
    loss = SearchLoss(job.scene.load(), 1, 0)
    tables = np.random.default_rng(0).uniform(0, 0.6, (1, *job.scene.load().parts.shape))
    plain = loss.losses(tables, PLAN)
    held = loss.losses(tables, replace(PLAN, retention=0.5)) - plain
    np.testing.assert_allclose(loss.losses(tables, replace(PLAN, retention=1.0)) - plain, 2 * held, rtol=1e-3)
    assert held > 0
    pulled = loss.losses(tables, replace(PLAN, pull=2.0, smooth=3.0)) - plain
    np.testing.assert_allclose(pulled, np.array([2.0, 3.0]) @ penalties(tables))
    assert loss.losses(np.zeros_like(tables), replace(PLAN, retention=1.0)) == pytest.approx(1.0, abs=1e-5)


def test_penalties_are_the_mean_square_and_the_variance_over_layers():
    tables = np.array([[[1.0, 2.0], [3.0, 2.0]]])
    np.testing.assert_allclose(penalties(tables), [[4.5], [0.5]])


def test_checkpoints_are_ends_of_generations_from_first_to_last():
    found = checkpoints(10_000)
    assert (found[0], found[-1], len(found)) == (160, 10_000, 12)
    assert all(number % 16 == 0 for number in found)
    assert checkpoints(64) == [16, 32, 48, 64]
    assert checkpoints(16) == [16]


class Sphere:
    """A loss with one lowest point, and accuracies that follow it."""

    def losses(self, tables, plan):
        return ((tables - 0.4) ** 2).mean(axis=(1, 2))


@pytest.fixture
def on_sphere(job, monkeypatch):
    monkeypatch.setattr(module, "_load_loss", lambda *_: Sphere())
    loaded = job.scene.load()
    monkeypatch.setattr(type(loaded), "accuracies", lambda self, weights: {})
    monkeypatch.setattr(
        type(loaded), "summarise", lambda *_: {"held_in_N": 0.5, "worst_task": 0.25, "held_out": 1.0}
    )
    return job


def test_a_search_is_followed_from_its_start_to_its_end(on_sphere):
    found = long_search(replace(on_sphere, plan=replace(PLAN, evaluations=320)))
    assert found["ended_by"] == "evaluations"
    assert found["curve"]["evaluations"] == [0, *checkpoints(320)]
    assert found["curve"]["loss"][-1] < found["curve"]["loss"][0] / 2
    assert set(found["curve"]["held_in_N"]) == {0.5}


def test_a_search_ends_where_nothing_moves_any_more(on_sphere, monkeypatch):
    monkeypatch.setattr(module, "CONVERGED", 0.003)
    found = long_search(replace(on_sphere, plan=SearchPlan("entropy_excess", "model", 0, 10_000)))
    assert found["ended_by"] == "converged"
    assert found["curve"]["evaluations"][-1] < 2_000
    assert found["curve"]["mean_abs"][-1] == pytest.approx(0.4, abs=0.003)
    assert found["curve"]["loss"][-1] < 1e-4


def test_time_cuts_a_search_short_or_lets_it_not_begin(on_sphere, monkeypatch):
    assert long_search(replace(on_sphere, stop_at=time.time())) is None
    ticks = iter([0.0, 1.0, 2.0, 9.0])  # before, after the start, after each generation
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: next(ticks), monotonic=time.monotonic))
    found = long_search(replace(on_sphere, plan=replace(PLAN, evaluations=64), stop_at=5.0))
    assert found["ended_by"] == "seconds"
    assert found["curve"]["evaluations"] == [0, 16, 32]


def test_one_coefficient_an_adapter_is_the_same_in_all_layers(on_sphere):
    for found in generations(replace(on_sphere, plan=replace(PLAN, space="model"))):
        assert isinstance(found, Generation)
        assert (found.tables == found.tables[:, :1]).all()


def test_visited_merges_are_one_of_each_generation(on_sphere):
    found = visited_merges(on_sphere)
    assert len(found) == 3
    start = on_sphere.scene.load().setup.first.start
    np.testing.assert_allclose(found[0], start)
    assert (found[1:] != start).any(axis=(1, 2)).all()
