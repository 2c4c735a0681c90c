"""The limits that the zoo must keep, and the page that states them."""

import copy
import json

import pytest

from benchmarks.zoo.card import card, table
from benchmarks.zoo.check import CARD, all_limits, main, read_zoo_scores, size_bytes
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.queries import SHIPPED_HELD_OUT
from benchmarks.zoo.scores import normalised
from benchmarks.zoo.sizes import EXPERTS, SHIPPED, TINY
from benchmarks.zoo.tasks import HELD_IN


def everywhere(held_in, held_out):
    return {**dict.fromkeys(HELD_IN, held_in), **dict.fromkeys(HELD_OUT, held_out)}


def good_split():
    return {
        "n_examples": everywhere(55, 46),
        "base": everywhere(0.1, 0.2),
        "matrix": {spec.task: everywhere(0.1, 0.4) | {spec.task: 1.0} for spec in EXPERTS},
        "uniform": everywhere(0.4, 0.5),
        "scaled": everywhere(0.7, 0.5),
        "joint": everywhere(0.99, 0.9),
    }


@pytest.fixture
def scores():
    """Scores that keep every limit."""
    return {
        "base": everywhere(0.1, 0.2),
        "experts": dict.fromkeys(HELD_IN, 1.0),
        "shipped_held_out": list(SHIPPED_HELD_OUT),
        "picked_scale": 0.3,
        "test": good_split(),
        "validation": good_split() | {"scales": {"0.3": everywhere(0.7, 0.5), "1.0": everywhere(0.2, 0.1)}},
        "build": {
            "seed": 7,
            "versions": {"NVIDIA H200": {"torch": "2.13.0"}},
            "stages": {"base": {"NVIDIA H200": 321.4}, "experts": {"NVIDIA H200": 123.0, "CPU": 4.0}},
        },
    }


@pytest.fixture
def zoo(tmp_path, scores):
    """A folder of the zoo's shape with files of a few bytes."""
    for name, size in (("base", 3_000_000), *((f"adapters/{spec.task}", 200_000) for spec in EXPERTS)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(bytes(size))
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return tmp_path


def missed(scores, zoo):
    return [limit.name for limit in all_limits(scores, zoo) if not limit.passed]


def test_good_scores_keep_every_limit(scores, zoo):
    assert missed(scores, zoo) == []


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"base": everywhere(0.21, 0.2)}, ["base, held-in mean"]),
        ({"uniform": everywhere(0.51, 0.5)}, ["uniform average, normalised"]),
        ({"scaled": everywhere(0.86, 0.5)}, ["best label-picked scale, normalised"]),
        ({"joint": everywhere(0.94, 0.9)}, ["joint LoRA, held-in mean"]),
        ({"joint": everywhere(0.99, 0.59)}, ["joint LoRA above best single expert"]),
    ],
)
def test_each_missed_limit_is_named_with_its_split(scores, zoo, split, change, names):
    scores[split] |= change
    assert missed(scores, zoo) == [f"{split}: {name}" for name in names]


def test_one_weak_expert_is_enough_to_fail_and_is_named(scores, zoo):
    scores["test"]["matrix"]["sql"]["sql"] = 0.94
    (limit,) = [limit for limit in all_limits(scores, zoo) if not limit.passed]
    assert (limit.name, limit.wanted, limit.found) == (
        "test: each expert, own task",
        ">= 95 %",
        "94.0 % (sql)",
    )


def test_a_shipped_composition_that_one_expert_solves_fails_and_is_named(scores, zoo):
    scores["validation"]["matrix"]["tool"]["tool_maths"] = 0.61
    (limit,) = [limit for limit in all_limits(scores, zoo) if not limit.passed]
    assert limit.name == "validation: best single expert, each held-out task"
    assert limit.found == "61.0 % (tool_maths)"


def test_a_composition_that_does_not_ship_may_be_easy(scores, zoo):
    others = set(HELD_OUT) - set(SHIPPED_HELD_OUT)
    for task in others:
        scores["test"]["matrix"]["tool"][task] = 1.0
    assert others
    assert missed(scores, zoo) == []


def test_a_value_at_its_limit_passes(scores, zoo):
    scores["test"] |= {"base": everywhere(0.2, 0.2), "uniform": everywhere(0.5, 0.5)}
    scores["test"]["matrix"]["tool"]["tool_maths"] = 0.6
    assert missed(scores, zoo) == []


def test_sizes_count_every_file_but_the_card(scores, zoo):
    before = size_bytes(zoo)
    (zoo / CARD).write_text("x" * 1000)
    assert size_bytes(zoo) == before
    (zoo / "adapters/sql/weights").write_bytes(bytes(16_000_000))
    assert missed(scores, zoo) == ["whole zoo, size"]
    (zoo / "base/weights").write_bytes(bytes(12_000_001))
    assert missed(scores, zoo) == ["base, size", "whole zoo, size"]


def test_the_command_prints_a_line_a_limit_and_fails_on_a_miss(scores, zoo, capsys):
    assert main(["--zoo", str(zoo)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["pass"] * 16
    scores["test"]["base"] = everywhere(0.5, 0.5)
    (zoo / "scores.json").write_text(json.dumps(scores))
    assert main(["--zoo", str(zoo)]) == 1
    assert "FAIL  test: base, held-in mean" in capsys.readouterr().out


def test_normalised_divides_by_the_expert_and_leaves_out_experts_that_are_never_right():
    experts = everywhere(0.5, 0.0)
    assert normalised(everywhere(0.4, 1.0), experts) == pytest.approx(0.8)
    assert normalised(everywhere(0.4, 1.0) | {"sql": 1.0}, experts | {"sql": 0.0}) == pytest.approx(0.8)


def test_the_card_states_recipe_sizes_scores_and_limits(scores, zoo):
    page = card(zoo, scores, SHIPPED)
    for text in (
        "license: apache-2.0",
        "6 layers, hidden 256",
        "1,600,000 procedural texts",
        "`base/` 3,000,000 bytes; `adapters/` 2,000,000 bytes",
        "| entities | 16 | 8 / sqrt(rank), rsLoRA | all linear | sequence | 0.00015 | 300 | 200,000 |",
        "| code | 8 | 16 / rank | q_proj, v_proj | sequence | 0.0015 | 400 | 200,000 | 100.0 | 100.0 |",
        "| maths | held-in | 55 | 10 | 100 |",
        "| tool_sql | not shipped | 46 | 20 | 40 |",
        "| base | NVIDIA H200 | 321 |",
        "--seed 7",
        "picked WITH LABELS on the validation split",
        "| test: base, held-in mean | <= 20 % | 10.0 % | yes |",
    ):
        assert text in page
    assert "**no**" not in page


def test_the_card_says_which_limit_is_missed(scores, zoo):
    bad = copy.deepcopy(scores)
    bad["test"]["uniform"] = everywhere(0.9, 0.9)
    assert "| test: uniform average, normalised | <= 50 % | 90.0 % | **no** |" in card(zoo, bad, SHIPPED)


def test_the_build_writes_the_card_of_its_own_scores(tiny_zoo):
    page = (tiny_zoo.out / CARD).read_text()
    assert page == card(tiny_zoo.out, read_zoo_scores(tiny_zoo.out), TINY)
    assert "2 layers, hidden 32" in page


def test_a_table_has_one_column_to_the_left():
    assert table(("a", "b"), [(1, 2.5)]) == "| a | b |\n| --- | ---: |\n| 1 | 2.5 |"
