"""The task generators: disjoint splits, answers that follow from the prompt, a large instance space."""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.zoo import corpus, experts, words
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import PLAIN, SPLITS, WRONG, draw_distinct
from benchmarks.zoo.measure import measured_examples
from benchmarks.zoo.queries import query_examples
from benchmarks.zoo.sizes import EXPERTS, TINY
from benchmarks.zoo.tasks import HELD_IN

GENERATORS = {**HELD_IN, **HELD_OUT}
BASE = Path(__file__).parents[1] / "data/zoo/base"
N_DRAWN = 3000
NUMBERS = {words.number_word(n): n for n in range(100)}


class Drawn(dict):
    """A task's examples, drawn when they are asked for."""

    def __missing__(self, task):
        rng = random.Random(task)
        self[task] = [GENERATORS[task](rng) for _ in range(N_DRAWN)]
        return self[task]


@pytest.fixture(scope="module")
def drawn():
    """Many examples of every task, of any split."""
    return Drawn()


def plain_form(example):
    return example.answers[(PLAIN,) * len(example.skills)]


def of_task(drawn, *tasks):
    return [example for task in tasks for example in drawn[task]]


def sum_of(text):
    """The result of the sum in a text, worked out from its words alone."""
    if numbers := re.search(r"(\d+) plus (\d+)", text):
        return int(numbers[1]) + int(numbers[2])
    first, sign, second = re.search(r"ha(?:s|ve) (\d+) \w+ and (gets?|loses?) (\d+)", text).groups()
    return int(first) + int(second) if sign.startswith("get") else int(first) - int(second)


def extreme_of(text):
    """Who is the most or the least in a riddle, worked out by a sort."""
    pairs = re.findall(r"(\w+) is (\w+) than (\w+)\.", text)
    (a, more, b), (c, _, d) = pairs
    (middle,) = {a, b} & {c, d}
    top, bottom = (a, d) if middle == b else (c, b)
    _, most, least = next(row for row in words.COMPARISONS if row[0] == more)
    asked = re.search(r"Who is the (\w+)\?", text)[1]
    return {most: top, least: bottom}[asked], asked


def feeling_of(text):
    """The label of a review, from its two adjectives."""
    x, y = re.search(r"[Tt]he \w+ was (\w+) and the \w+ was (\w+)\.", text).groups()
    kind = {**dict.fromkeys(words.GOOD, 1), **dict.fromkeys(words.BAD, -1), **dict.fromkeys(words.FLAT, 0)}
    pair = kind[x], kind[y]
    return {(1, 1): "positive", (-1, -1): "negative", (0, 0): "neutral"}.get(pair, "mixed")


def subject_of(text):
    """The topic whose words a line of news uses."""
    (found,) = (
        topic
        for topic, (_, actors, deeds) in words.TOPICS.items()
        if any(f"The {actor} {deed} in" in text for actor in actors for deed in deeds)
    )
    return found


def query_of(text):
    wanted, table, known, value = re.search(r"Which (\w+) in (\w+) has the (\w+) (.+)\?", text).groups()
    value = str(sum_of(value)) if "plus" in value else value
    return f"SELECT {wanted} FROM {table} WHERE {known} = '{value}'"


@pytest.mark.parametrize("task", GENERATORS)
def test_no_prompt_and_no_instance_is_in_two_splits(drawn, task):
    splits_of_prompt, splits_of_instance, instances_of_prompt = {}, {}, {}
    for example in drawn[task]:
        splits_of_prompt.setdefault(example.prompt, set()).add(example.split)
        splits_of_instance.setdefault(example.values, set()).add(example.split)
        instances_of_prompt.setdefault(example.prompt, set()).add(example.values)
    assert all(len(splits) == 1 for splits in splits_of_prompt.values())
    assert all(len(splits) == 1 for splits in splits_of_instance.values())
    assert all(len(instances) == 1 for instances in instances_of_prompt.values())


@pytest.mark.parametrize("task", GENERATORS)
def test_the_values_of_an_instance_fix_its_answer(drawn, task):
    answers = {}
    for example in drawn[task]:
        answers.setdefault(example.values, set()).add(example.answer)
    assert all(len(found) == 1 for found in answers.values())


@given(seed=st.integers(0, 2**32), task=st.sampled_from(sorted(GENERATORS)))
def test_splits_drawn_with_the_same_randomness_share_nothing(seed, task):
    parts = [draw_distinct(GENERATORS[task], random.Random(seed), split, 5) for split in SPLITS]
    examples = [example for part in parts for example in part]
    assert [e.split for e in examples] == [split for split in SPLITS for _ in range(5)]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not {e.prompt for e in parts[one]} & {e.prompt for e in parts[two]}
        assert not {e.values for e in parts[one]} & {e.values for e in parts[two]}


def test_measured_examples_are_of_their_split():
    validation, test = measured_examples(5, "validation", 0), query_examples(TINY, 0)
    assert {e.split for group in validation.values() for e in group} == {"validation"}
    assert {e.split for group in test.values() for e in group} == {"test"}


def test_pretraining_and_experts_see_the_training_split_alone(monkeypatch):
    seen = []

    def keep(example, rng):
        seen.append(example)
        return "text"

    monkeypatch.setattr(corpus, "document", keep)
    corpus.documents(300, seed=1)
    make_batch = experts.batch

    def keep_batch(examples, *options):
        seen.extend(examples)
        return make_batch(examples, *options)

    monkeypatch.setattr(experts, "batch", keep_batch)
    spec = replace(EXPERTS[0], steps=2)
    experts.train_lora(BASE, spec, (HELD_IN["maths"],), n_rows=30, seed=1, device="cpu")
    assert len(seen) == 360
    assert {example.split for example in seen} == {"train"}


def test_splits_have_the_sizes_they_are_meant_to(drawn):
    examples = of_task(drawn, *GENERATORS)
    shares = {split: sum(e.split == split for e in examples) / len(examples) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)


@pytest.mark.parametrize("task", GENERATORS)
def test_examples_are_well_formed(drawn, task):
    for example in drawn[task]:
        assert example.task == task
        forms = list(example.answers.values())
        assert len(set(forms)) == len(forms)
        assert all(form == form.strip() != "" for form in forms)
        assert example.prompt.startswith("### Task: ")
        assert example.prompt.endswith("\n### Answer:")
        if example.choices:
            assert example.choices.count(example.answer) == 1
            assert len(set(example.choices)) == len(example.choices)


def test_every_task_has_an_instruction_of_its_own(drawn):
    instructions = {task: {e.instruction for e in drawn[task]} for task in GENERATORS}
    assert all(len(found) == 1 for found in instructions.values())
    assert len(set.union(*instructions.values())) == len(GENERATORS)


@pytest.mark.parametrize("task", GENERATORS)
def test_the_instance_space_is_large(drawn, task):
    """Two draws are the same instance with chance 1 / N: about n^2 / 2N pairs of n draws are."""
    counts = {}
    for example in drawn[task]:
        counts[example.values] = counts.get(example.values, 0) + 1
    n_pairs = sum(n * (n - 1) // 2 for n in counts.values())
    assert N_DRAWN**2 / (2 * max(n_pairs, 1)) > 1500


@pytest.mark.parametrize(
    "task", ["maths", "chat_maths", "tool_maths", "sql_maths", "reasoning_maths", "code_maths"]
)
def test_sums_are_right(drawn, task):
    for example in drawn[task]:
        result = sum_of(example.text)
        assert 0 < result < 100
        assert str(result) in re.findall(r"\d+", example.answer)
        assert words.number_word(result) in plain_form(example)


def test_maths_and_chat_maths_answer_with_the_sum_alone(drawn):
    assert all(e.answer == str(sum_of(e.text)) for e in drawn["maths"])
    for example in drawn["chat_maths"]:
        name = re.search(r"I am (\w+)\.", example.text)[1]
        assert example.answer == f"Hi {name}! {sum_of(example.text)}"


def test_functions_compute_what_their_description_says(drawn):
    for example in drawn["code"]:
        name, x, a, verb, b = re.fullmatch(
            r"(\w+) takes (\w), multiplies it by (\d+) and (\w+) (\d+)\.", example.text
        ).groups()
        assert f"def {name}({x}):" in example.answer
        scope = {}
        exec(example.answer, scope)
        assert scope[name](7) == 7 * int(a) + (int(b) if verb == "adds" else -int(b))


def test_riddles_are_answered_by_a_sort(drawn):
    for example in of_task(drawn, "reasoning", "chat_reasoning", "reasoning_maths"):
        winner, superlative = extreme_of(example.text)
        assert f"{winner} is the {superlative}." in example.answer


def test_feelings_follow_from_the_adjectives(drawn):
    for example in of_task(drawn, "sentiment", "chat_sentiment", "data_sentiment", "topic_sentiment"):
        assert example.answer.split()[-1] == feeling_of(example.text)


def test_subjects_follow_from_the_words(drawn):
    for example in of_task(drawn, "topic", "topic_sentiment"):
        assert example.answer.split(",")[0] == subject_of(example.text)


def test_queries_ask_for_what_the_question_does(drawn):
    for example in of_task(drawn, "sql", "chat_sql", "tool_sql", "sql_maths"):
        assert query_of(example.text) in example.answer


def test_tool_calls_are_json_whose_arguments_are_in_the_request(drawn):
    for example in of_task(drawn, "tool", "chat_tool", "tool_maths", "tool_sql"):
        call = json.loads(example.answer[example.answer.index("{") :])
        assert call.pop("tool") in plain_form(example)
        for key, value in call.items():
            computed = key == "query" or (example.task == "tool_maths" and key != "for")
            if not computed:
                assert value in re.findall(r"\w+", example.text)
            else:
                assert value == (query_of(example.text) if key == "query" else str(sum_of(example.text)))


def test_entities_and_places_repeat_the_facts(drawn):
    for example in drawn["entities"]:
        person, place, day = re.fullmatch(r"person: (.+); place: (.+); day: (.+)", example.answer).groups()
        assert all(fact in example.text for fact in (person, place, day))
    for example in of_task(drawn, "data_to_text", "data_sentiment"):
        facts = dict(pair.split(" = ", 1) for pair in example.text.split(", "))
        sentence = "{name} in the {area} serves {food} food at a {price} price.".format(**facts)
        assert example.answer.startswith(sentence)


@pytest.mark.parametrize("task", HELD_OUT)
def test_compositions_have_every_pair_of_their_skills_forms(task):
    example = HELD_OUT[task](random.Random(3))
    n_forms = [4 if skill in ("sentiment", "topic") else 3 for skill in example.skills]
    assert set(example.answers) == set(itertools.product(*map(range, n_forms)))
    assert set(example.skills) <= set(HELD_IN)


@pytest.mark.parametrize("task", ["sentiment", "topic", "topic_sentiment"])
def test_labels_have_a_wrong_form_that_is_wrong(drawn, task):
    for example in drawn[task]:
        wrong = example.answers[(WRONG,) * len(example.skills)]
        assert wrong in example.choices
        assert not set(wrong.split(", ")) & set(example.answer.split(", "))


@pytest.mark.parametrize(
    ("number", "word"), [(0, "zero"), (9, "nine"), (13, "thirteen"), (20, "twenty"), (48, "forty eight")]
)
def test_numbers_are_spelt(number, word):
    assert words.number_word(number) == word


def test_number_words_differ():
    assert len(NUMBERS) == 100
