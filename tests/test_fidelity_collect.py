"""Measured merges of the shipped zoo: prompts of every source, distances as the search has them, lines."""

import json

import numpy as np
import pytest

from benchmarks import fidelity_collect
from benchmarks.fidelity_collect import (
    BASE,
    PROMPT_SEED,
    Batch,
    Collected,
    count_positions,
    measure_batch,
)
from benchmarks.fidelity_rows import StatisticsJob, make_rows
from benchmarks.fidelity_scene import (
    SOURCES,
    TASKS,
    LoadedScene,
    pick_examples,
    score_everywhere,
    without_updates,
)
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.objective import OBJECTIVES
from search.prompts import PromptRequest, write_prompts
from tests.fidelity_toys import shipped_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return shipped_scene(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def batches(scene):
    """The base, two single experts and the balanced merge, in two files."""
    loaded = scene.load()
    shape = loaded.parts.shape
    for source in SOURCES:
        loaded.prompts(source, 1, PROMPT_SEED)
    singles = [np.tile(np.eye(shape[1])[k], (shape[0], 1)) for k in (0, 9)]
    tables = np.array([np.zeros(shape), *singles, loaded.setup.first.start])
    whole = Batch(scene, 1, (BASE, "single", "single", "balanced"), tables)
    return [Batch(scene, 1, whole.kinds[rows], tables[rows]) for rows in (slice(2), slice(2, 4))]


@pytest.fixture(scope="module")
def paths(batches):
    """Files of arrays; in place of true accuracies, which take long, how large the weights are."""

    def accuracies(self, weights):
        return dict.fromkeys(TASKS, float(sum(weight.norm() for weight in weights.values())) / 1_000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedScene, "accuracies", accuracies)
        return tuple(measure_batch(batch) for batch in batches)


def test_every_source_has_prompts_of_its_own_and_keeps_them(scene, batches):
    loaded = scene.load()
    prompts = {source: loaded.prompts(source, 1, PROMPT_SEED) for source in SOURCES}
    names = list(loaded.parts.names)
    assert all(own.expert.tolist() == list(range(len(names))) for own in prompts.values())
    example = pick_examples(1)["sql"][0]
    for source in ("skeleton", "task"):
        text = prompts[source].texts[names.index("sql")]
        assert text.startswith(f"### Task: {example.instruction}\n### {example.field}:")
        assert prompts[source].scored[0][0] > 5
        assert "SELECT" in text
    assert {own.scored[0][0] for source, own in prompts.items() if source in ("free", "generic")} == {0}
    assert loaded.prompts("task", 1, PROMPT_SEED).sha256 == prompts["task"].sha256


@pytest.mark.slow
def test_generic_texts_are_the_bases_own(scene, batches):
    parts = scene.load().parts
    request, stacked = PromptRequest(per_adapter=1, seed=PROMPT_SEED), without_updates(parts.stacked)
    skeletons = [()] * len(parts.names)
    model, tokenizer = parts.model, parts.base.tokenizer
    written = write_prompts(model, tokenizer, stacked, parts.groups, skeletons, request)
    assert scene.load().prompts("generic", 1, PROMPT_SEED).ids == written.ids


def test_shipped_queries_come_first_and_validation_follows():
    picked = pick_examples(60)
    assert all(len(own) == 60 for own in picked.values())
    assert [e.split for e in picked["maths"]] == ["test"] * 55 + ["validation"] * 5
    assert [e.split for e in picked["chat_maths"]][30:32] == ["test", "validation"]


@pytest.mark.parametrize(("source", "positions"), [("skeleton", "answer"), ("task", "all")])
def test_distances_are_those_of_the_search(scene, paths, batches, source, positions):
    parts, prompts = scene.load().parts, scene.load().prompts(source, 1, PROMPT_SEED)
    scored = prompts if positions == "answer" else score_everywhere(prompts)
    signals = expert_signals(parts.model, parts.stacked, parts.groups, scored)
    evaluator = PopulationEvaluator(parts.model, parts.stacked, parts.groups, scored, signals, Scoring())
    tables = np.concatenate([batch.tables for batch in batches])[1:]
    found = Collected(paths).per_expert(source, "entropy_excess", positions, prompts)
    np.testing.assert_allclose(found, evaluator.score(tables).per_expert, rtol=1e-3, atol=1e-5)


def test_an_expert_agrees_with_itself_and_chosen_prompts_are_its_own(scene, paths):
    prompts, collected = scene.load().prompts("skeleton", 1, PROMPT_SEED), Collected(paths)
    misses = collected.per_prompt("skeleton", "top1_disagreement", "answer")
    assert misses.shape == (3, 10)
    assert (misses[0, 0], misses[1, 9]) == (0, 0)
    assert misses[0, 9] > 0
    assert count_positions(prompts, "answer").tolist() == [len(scored) for scored in prompts.scored]
    reordered = np.arange(10)[::-1]
    chosen = collected.per_expert("skeleton", "nll", "answer", prompts, reordered)
    np.testing.assert_allclose(chosen, collected.per_expert("skeleton", "nll", "answer", prompts))


def test_what_is_measured_is_not_measured_again_and_other_merges_are(batches, paths, monkeypatch):
    monkeypatch.setattr(fidelity_collect, "_load_rulers", lambda *_: pytest.fail("measured again"))
    assert tuple(measure_batch(batch) for batch in batches) == paths
    other = Batch(batches[0].scene, 1, batches[0].kinds, batches[0].tables + 0.1)
    assert other.path not in paths


def test_the_base_is_left_out_and_far_from_all_merges(paths):
    collected = Collected(paths)
    assert collected.of_merges("kinds").tolist() == ["single", "single", "balanced"]
    assert (collected.of_merges("retention") > 0).all()
    assert collected.of_merges("accuracies").shape == (3, len(TASKS))


@pytest.mark.slow
def test_experts_are_right_on_their_own_tasks(scene, batches):
    loaded = scene.load()
    table = batches[1].tables[0]
    assert loaded.accuracies(loaded.weights(table))["sql"] == 1
    assert loaded.summarise(loaded.accuracies(loaded.weights(np.zeros_like(table)))) == {
        "held_in_N": 0,
        "worst_task": 0,
        "held_out": 0,
    }


def test_lines_are_json_and_say_what_was_measured(scene, paths):
    for source in ("skeleton", "free"):
        rows = make_rows(StatisticsJob(scene, 1, source, paths))
        text = json.dumps(rows, allow_nan=False)
        assert [row["part"] for row in json.loads(text)][:2] == ["ranking", "prompts_needed"]
        assert len(rows) == (5 if source == "skeleton" else 2)
        assert len(rows[0]["entries"]) == len(OBJECTIVES) * (4 + 1 if source == "skeleton" else 4)
        assert {row["n_merges"] for row in rows} == {3}
        assert rows[1]["curve"]["prompts"] == [1]
    ranking, _, terms, bound, points = make_rows(StatisticsJob(scene, 1, "skeleton", paths))
    entry = dict(zip(ranking["columns"], ranking["entries"][1], strict=True))
    assert entry["combine"] == "mean_sqrt"
    assert terms["curves"]["retention"]["held_in"][0] == entry["held_in"]
    assert bound["checks"][0]["n_pairs"] == 30
    assert {kind: len(own["loss"]) for kind, own in points["points"].items()} == {"single": 2, "balanced": 1}
    assert points["points"]["balanced"]["loss"] < points["points"]["single"]["loss"]
