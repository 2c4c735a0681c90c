"""The query file: the competition's format, the test split alone, the same bytes for the same seed."""

import csv
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.zoo import queries
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples, shipped_examples, write_queries
from benchmarks.zoo.sizes import SHIPPED, TINY
from benchmarks.zoo.tasks import HELD_IN
from llm_merging.data import read_queries


@pytest.fixture(scope="module")
def shipped():
    """The examples of the query file at the size that ships."""
    return shipped_examples(SHIPPED, 0)


@pytest.fixture
def folder(tmp_path):
    write_queries(tmp_path, TINY, 0)
    return tmp_path


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_competition_reader_gives_back_every_prompt_and_choice(folder):
    read = read_queries(folder / "test.csv")
    examples = shipped_examples(TINY, 0)
    assert [query.id for query in read] == [str(i) for i in range(len(examples))]
    assert [query.input for query in read] == [example.prompt for example in examples]
    assert [query.answer_choices for query in read] == [example.choices for example in examples]
    assert {query.eval_type for query in read} == {"multiple_choice", "generation"}
    assert all((query.eval_type == "multiple_choice") == bool(query.answer_choices) for query in read)


def test_columns_are_exactly_the_competitions(folder):
    assert (folder / "test.csv").read_text().startswith("id,input,eval_type,answer_choices\n")
    assert (folder / "test_targets.csv").read_text().startswith("id,task,target,held_out\n")


def test_targets_are_the_expert_form_or_the_index_of_the_right_choice(folder):
    examples = shipped_examples(TINY, 0)
    for i, (row, example) in enumerate(zip(rows_of(folder / "test_targets.csv"), examples, strict=True)):
        assert row["id"] == str(i)
        assert row["task"] == example.task
        assert row["held_out"] == ("1" if example.task in HELD_OUT else "0")
        found = example.choices[int(row["target"])] if example.choices else row["target"]
        assert found == example.answer


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(folder, tmp_path_factory):
    for seed, same in ((0, True), (1, False)):
        other = tmp_path_factory.mktemp("queries")
        write_queries(other, TINY, seed)
        for name in ("test.csv", "test_targets.csv"):
            assert ((folder / name).read_bytes() == (other / name).read_bytes()) == same


def test_the_shipped_size_has_800_queries_of_which_two_thirds_are_held_in(shipped):
    counts = Counter(example.task for example in shipped)
    assert set(counts) == {*HELD_IN, *SHIPPED_HELD_OUT}
    assert len(shipped) >= 800
    share = sum(example.task in HELD_IN for example in shipped) / len(shipped)
    assert share == pytest.approx(2 / 3, abs=0.06)
    assert len(SHIPPED_HELD_OUT) >= 5


def test_every_prompt_is_new_and_of_the_test_split(shipped):
    assert len({example.prompt for example in shipped}) == len(shipped)
    assert {example.split for example in shipped} == {"test"}


def test_the_order_is_mixed(shipped):
    tasks = [example.task for example in shipped]
    n_changes = sum(one != two for one, two in pairwise(tasks))
    assert n_changes > 0.8 * len(tasks)
    half = len(tasks) // 2
    assert all(task in tasks[:half] and task in tasks[half:] for task in set(tasks))


def test_a_tasks_queries_do_not_depend_on_which_compositions_ship(monkeypatch):
    measured = query_examples(TINY, 0)
    for shipped_held_out in (("code_maths",), ("chat_tool", "code_maths")):
        monkeypatch.setattr(queries, "SHIPPED_HELD_OUT", shipped_held_out)
        asked = [e for e in shipped_examples(TINY, 0) if e.task == "code_maths"]
        assert sorted(e.prompt for e in asked) == sorted(e.prompt for e in measured["code_maths"])


def test_the_numbers_of_queries_are_those_of_the_size():
    counts = Counter(
        e.task for e in shipped_examples(replace(TINY, held_in_queries=4, held_out_queries=1), 0)
    )
    assert {counts[task] for task in HELD_IN} == {4}
    assert {counts[task] for task in SHIPPED_HELD_OUT} == {1}


def test_two_tasks_with_one_prompt_are_refused(monkeypatch):
    clash = {task: [HELD_IN["code"](random.Random(1))] for task in (*HELD_IN, *HELD_OUT)}
    monkeypatch.setattr(queries, "query_examples", lambda size, seed: clash)
    with pytest.raises(ValueError, match="two tasks share a prompt"):
        shipped_examples(TINY, 0)
