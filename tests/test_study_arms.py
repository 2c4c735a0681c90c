"""The arms of the studies: settings that the configuration takes, and skeletons that are changed as told."""

from pathlib import Path

import pytest

from benchmarks.study_arms import (
    DEFAULT,
    REWORDED,
    SHARED,
    STUDIES,
    VAGUE,
    dropped,
    every_second,
    most,
    next_ones,
    other_lines,
    other_lines_and_fields,
    shared,
    vague,
    with_other_lines,
)
from benchmarks.zoo.sets import TASKS
from search.config import config_hash, load_config
from search.errors import InputError
from search.skeleton import parse_skeleton

DEMO = Path(__file__).parents[1] / "configs/demo.yaml"
ARMS = {(study, arm.name): arm for study in STUDIES for arm in STUDIES[study].arms}
OWN = {adapter.name: adapter.skeletons for adapter in load_config(DEMO).adapters}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_compares_the_default_with_arms_of_other_names(study):
    arms = STUDIES[study].arms
    assert arms[0] == DEFAULT
    assert len({arm.name for arm in arms}) == len(arms)


@pytest.mark.parametrize("key", ARMS, ids="-".join)
def test_the_configuration_takes_every_arms_settings(key):
    assert load_config(DEMO, ARMS[key].overrides)


def test_arms_of_one_name_are_the_same_in_every_study():
    by_name = {}
    for (_, name), arm in ARMS.items():
        assert by_name.setdefault(name, arm) == arm


def test_an_ablation_changes_something():
    default = config_hash(load_config(DEMO))
    for arm in STUDIES["ablation"].arms[1:]:
        assert arm.change or config_hash(load_config(DEMO, arm.overrides)) != default


@pytest.mark.parametrize(
    "change",
    [
        next_ones,
        vague,
        shared,
        every_second,
        most,
        other_lines,
        other_lines_and_fields,
        with_other_lines,
        dropped,
    ],
)
def test_changed_skeletons_are_of_the_same_adapters_and_can_be_filled(change):
    changed = change(OWN)
    assert list(changed) == list(OWN)
    for skeletons in changed.values():
        for skeleton in skeletons:
            assert parse_skeleton(skeleton).slots


def test_each_adapter_gets_the_next_ones_and_the_last_one_the_firsts():
    assert next_ones({"a": ("A",), "b": ("B",), "c": ()}) == {"a": ("B",), "b": (), "c": ("A",)}


def test_half_of_the_adapters_keep_theirs():
    kept = [name for name, own in every_second(OWN).items() if own]
    assert kept == list(OWN)[::2]


def test_other_words_say_it_differently_in_the_same_fields():
    assert set(REWORDED) == set(TASKS)
    for name, (skeleton,) in other_lines(OWN).items():
        (own,) = OWN[name]
        assert skeleton.splitlines()[0] != own.splitlines()[0]
        assert skeleton.splitlines()[1:] == own.splitlines()[1:]
        assert with_other_lines(OWN)[name] == (own, skeleton)
    for name, (skeleton,) in other_lines_and_fields(OWN).items():
        (own,) = OWN[name]
        assert not set(skeleton.splitlines()) & set(own.splitlines())
    assert len({text for own in other_lines_and_fields(OWN).values() for text in own}) == len(OWN)


def test_vague_and_shared_skeletons_are_everybodys():
    assert set(vague(OWN).values()) == {(VAGUE,)}
    assert set(shared(OWN).values()) == {(SHARED,)}
    assert parse_skeleton(SHARED).slots == ("task", "input")


def test_an_adapter_without_other_words_is_refused():
    with pytest.raises(InputError, match="'poems': no other wording"):
        other_lines({"poems": ("### Task: Rhyme.\n### On:{on}\n### Answer:",)})
