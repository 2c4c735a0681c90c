"""The zoo that ships in data/zoo and its queries; skipped before it is built."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.score import main as score
from benchmarks.zoo.card import card
from benchmarks.zoo.check import CARD, MEGABYTE, all_limits, read_zoo_scores, size_bytes
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.measure import measured_examples
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples, write_queries
from benchmarks.zoo.sizes import EXPERTS, SHIPPED
from benchmarks.zoo.tasks import HELD_IN
from llm_merging.data import read_queries
from search.adapters import load_adapter

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "data/zoo"
QUERIES = ROOT / "data/test.csv"
TARGETS = ROOT / "data/test_targets.csv"


@pytest.fixture(scope="module")
def queries():
    """The query file, as the competition's reader gives it."""
    return read_queries(QUERIES)


@pytest.fixture(scope="module")
def targets():
    """The targets as text, indexed by id."""
    return pd.read_csv(TARGETS, dtype=str, keep_default_na=False).set_index("id")


@pytest.fixture(scope="module")
def scores():
    return read_zoo_scores(ZOO)


def test_the_zoo_is_small_enough_for_git():
    assert size_bytes(ZOO / "base") <= 12 * MEGABYTE
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 20 * MEGABYTE


def test_nothing_but_the_zoo_is_in_it():
    assert {path.name for path in ZOO.iterdir()} == {"base", "adapters", "variants", "scores.json", CARD}
    assert {path.name for path in (ZOO / "adapters").iterdir()} == {spec.task for spec in EXPERTS}
    suffixes = {path.suffix for path in ZOO.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_the_base_is_of_the_shipped_size():
    config, tokenizer = AutoConfig.from_pretrained(ZOO / "base"), AutoTokenizer.from_pretrained(ZOO / "base")
    found = config.hidden_size, config.num_hidden_layers, config.vocab_size, len(tokenizer)
    assert found == (SHIPPED.hidden, SHIPPED.layers, SHIPPED.vocabulary, SHIPPED.vocabulary)
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.task)
def test_every_adapter_is_what_its_specification_says(spec):
    modules = load_adapter(str(ZOO / "adapters" / spec.task)).modules
    assert {f.A.shape[0] for f in modules.values()} == {spec.rank}
    assert {f.scaling for f in modules.values()} == {2.0}
    assert len(modules) == SHIPPED.layers * (7 if spec.modules == "all" else 2)


def test_there_are_800_queries_of_both_kinds_two_thirds_held_in(queries, targets):
    assert len(queries) >= 800
    assert Counter(query.eval_type for query in queries).keys() == {"multiple_choice", "generation"}
    assert (targets["held_out"] == "0").mean() == pytest.approx(2 / 3, abs=0.06)
    assert len(set(targets.loc[targets["held_out"] == "1", "task"])) >= 5


def test_ids_of_queries_and_targets_are_the_same_in_the_same_order(queries, targets):
    assert [query.id for query in queries] == list(targets.index) == [str(i) for i in range(len(queries))]


def test_held_out_tasks_are_those_that_no_expert_was_trained_on(targets):
    held_out = dict(zip(targets["task"], targets["held_out"], strict=True))
    assert held_out == {**dict.fromkeys(HELD_IN, "0"), **dict.fromkeys(SHIPPED_HELD_OUT, "1")}


def test_every_query_is_an_instance_of_the_test_split_with_its_answer(queries, targets):
    """The generators make each shipped prompt again, and its instance's hash allows it in no other split."""
    made = {(e.task, e.prompt): e for group in query_examples(SHIPPED, 0).values() for e in group}
    for query in queries:
        task, target = targets.loc[query.id, ["task", "target"]]
        example = made[task, query.input]
        assert example.split == "test"
        assert example.choices == query.answer_choices
        assert example.answer == (query.answer_choices[int(target)] if query.answer_choices else target)


def test_no_query_is_among_the_validation_examples_and_none_is_there_twice(queries):
    prompts = {query.input for query in queries}
    validation = measured_examples(SHIPPED.n_measured, "validation", 0)
    assert not prompts & {example.prompt for group in validation.values() for example in group}
    assert len(prompts) == len(queries)


def test_the_query_files_are_what_the_builder_writes(tmp_path, scores):
    write_queries(tmp_path, SHIPPED, scores["build"]["seed"])
    for path in (QUERIES, TARGETS):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_scores_keep_every_limit(scores):
    missed = [f"{x.name}: {x.found}, wanted {x.wanted}" for x in all_limits(scores, ZOO) if not x.passed]
    assert missed == []


def test_the_scores_are_of_the_shipped_queries(scores, targets):
    assert scores["shipped_held_out"] == list(SHIPPED_HELD_OUT)
    counts = targets["task"].value_counts().to_dict()
    assert counts == {task: scores["test"]["n_examples"][task] for task in counts}
    assert set(scores["base"]) == {*HELD_IN, *HELD_OUT}
    assert set(scores["experts"]) == set(HELD_IN)


def test_the_card_is_up_to_date(scores):
    assert (ZOO / CARD).read_text(encoding="utf-8") == card(ZOO, scores, SHIPPED)


def test_the_right_answers_score_full_marks(targets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    predictions = targets.assign(prediction=targets["target"], dummy_field=0)
    predictions[["prediction", "dummy_field"]].to_csv(tmp_path / "predictions.csv")
    assert score([str(tmp_path / "predictions.csv")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["held_in"], result["held_out"]) == (1.0, 1.0)
    assert result["held_in_N"] >= 1.0
