"""Settings: each new key in its short and long form, and one line for each wrong value."""

from pathlib import Path
from typing import get_args

import pytest

from search.config import load_config
from search.errors import InputError
from search.groups import GroupKind
from search.objective import COMBINATIONS, OBJECTIVES
from search.settings import (
    OBJECTIVE_NAMES,
    CombinationName,
    ConfigSection,
    GenomeName,
    GroupName,
    ObjectiveSettings,
    SearchSettings,
    SpaceSettings,
    StageSettings,
)
from search.space import Layout

SHORT = "base: zoo/base\nadapters: zoo/adapters\n"


@pytest.fixture(autouse=True)
def zoo(tmp_path, monkeypatch):
    """A working directory with a base and an adapter."""
    (tmp_path / "zoo/base").mkdir(parents=True)
    (tmp_path / "zoo/adapters/sums").mkdir(parents=True)
    (tmp_path / "zoo/adapters/sums/adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(line="", *overrides):
    path = Path("run.yaml")
    path.write_text(f"{SHORT}{line}\n", encoding="utf-8")
    return load_config(path, overrides).search


def mistake(line, *overrides):
    with pytest.raises(InputError) as caught:
        load(line, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_space_may_be_written_as_the_name_of_its_groups():
    assert load("search: {space: model}") == load("search: {space: {groups: model}}")
    assert load("search: {space: model}").space == SpaceSettings(groups="model")
    assert load("", "search.space=block") == load("", "search.space.groups=block")
    assert load("search: {space: model}", "search.space.top_k=2").space == SpaceSettings(
        groups="model", top_k=2
    )


def test_every_setting_of_a_space_can_be_given():
    given = {
        "groups": "part",
        "layers_per_block": 2,
        "genome": "profile",
        "n_knots": 3,
        "shared_profile": True,
        "sign": "non_negative",
        "scale": "log",
        "top_k": 5,
    }
    assert set(given) == set(SpaceSettings.model_fields)
    assert load(f"search: {{space: {given}}}").space.model_dump() == given


def test_stages_replace_some_settings_of_the_space():
    stages = load("search: {stages: [{share: 1, groups: model}, {share: 3.5, genome: profile}]}").stages
    assert stages == (
        StageSettings(share=1, groups="model"),
        StageSettings(share=3.5, genome="profile"),
    )
    assert load().stages == ()
    assert load("", "search.stages=[{share: 2}]").stages == (StageSettings(share=2),)


def test_race_and_gradient_are_off_unless_asked_for():
    assert load().race_keep is None
    assert load("search: {race_keep: null}").race_keep is None
    assert load("search: {race_keep: 0.5}").race_keep == 0.5
    assert (load().gradient.refine_steps, load().gradient.inject_every) == (0, 0)
    gradient = load("", "search.gradient.refine_steps=20", "search.gradient.learning_rate=1e-2").gradient
    assert (gradient.refine_steps, gradient.inject_every, gradient.learning_rate) == (20, 0, 0.01)


def test_a_prior_is_looked_for_from_the_working_directory_then_from_the_file(zoo, monkeypatch):
    (zoo / "configs/priors").mkdir(parents=True)
    (zoo / "configs/priors/mine.json").write_text("{}")
    config = zoo / "configs/run.yaml"
    config.write_text(f"{SHORT}search: {{prior: priors/mine.json}}\n")
    assert load_config(config).search.prior_path == zoo / "configs/priors/mine.json"
    assert load("search: {prior: configs/priors/mine.json}").prior == "configs/priors/mine.json"
    (zoo / "priors").mkdir()
    (zoo / "priors/mine.json").write_text("{}")
    assert load_config(config).search.prior == "priors/mine.json"
    elsewhere = zoo / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(config).search.prior_path == zoo / "configs/priors/mine.json"


def test_without_a_prior_there_is_no_file():
    assert load().prior is None
    assert load("search: {prior: null}").prior is None
    assert load().allow_changed_adapters is False
    assert load("search: {allow_changed_adapters: true}").allow_changed_adapters is True


def test_an_objective_is_a_known_name_or_a_function_of_ones_own():
    for name in (*OBJECTIVES, "module:function", "package.module:function"):
        assert ObjectiveSettings(name=name).name == name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "search: {space: head}",
            ["search.space.groups: found 'head'", "'model', 'block', 'layer', 'part' or 'module'"],
        ),
        ("search: {space: 3}", ["search.space: found 3", "expected keys below it"]),
        ("search: {space: {genome: deep}}", ["search.space.genome: found 'deep'", "'adapter', 'profile'"]),
        (
            "search: {space: {sign: minus}}",
            ["search.space.sign: found 'minus'", "'signed' or 'non_negative'"],
        ),
        ("search: {space: {scale: exp}}", ["search.space.scale: found 'exp'", "'plain' or 'log'"]),
        ("search: {space: {top_k: 0}}", ["search.space.top_k: found 0", "greater than or equal to 1"]),
        ("search: {space: {top_k: yes}}", ["search.space.top_k: found true"]),
        ("search: {space: {n_knots: 1}}", ["search.space.n_knots: found 1", "greater than or equal to 2"]),
        ("search: {space: {layers_per_block: 0}}", ["search.space.layers_per_block: found 0"]),
        ("search: {space: {shared_profile: 7}}", ["search.space.shared_profile: found 7"]),
        ("search: {stages: 3}", ["search.stages: found 3"]),
        ("search: {stages: [model]}", ["search.stages.0: found 'model'", "expected keys below it"]),
        ("search: {stages: [{groups: model}]}", ["search.stages.0.share: missing"]),
        ("search: {stages: [{share: 0}]}", ["search.stages.0.share: found 0", "greater than 0"]),
        ("search: {stages: [{share: .inf}]}", ["search.stages.0.share: found inf", "finite"]),
        (
            "search: {stages: [{share: 1}, {share: 1, groups: head}]}",
            ["search.stages.1.groups: found 'head'", "'model', 'block'"],
        ),
        ("search: {race_keep: 1}", ["search.race_keep: found 1", "less than 1"]),
        ("search: {race_keep: 0}", ["search.race_keep: found 0", "greater than 0"]),
        ("search: {race_keep: half}", ["search.race_keep: found 'half'", "number"]),
        ("search: {gradient: 3}", ["search.gradient: found 3", "expected keys below it"]),
        ("search: {gradient: {refine_steps: -1}}", ["search.gradient.refine_steps: found -1"]),
        ("search: {gradient: {inject_every: -1}}", ["search.gradient.inject_every: found -1"]),
        ("search: {gradient: {inject_steps: 0}}", ["search.gradient.inject_steps: found 0"]),
        ("search: {gradient: {learning_rate: 0}}", ["search.gradient.learning_rate: found 0"]),
        (
            "search: {prior: none.json}",
            ["search.prior: no file 'none.json' in ", "make one with `python -m search priors`"],
        ),
        ("search: {prior: zoo}", ["search.prior: no file 'zoo' in "]),
        ("search: {prior: ''}", ["search.prior: no file '' in "]),
        ("search: {prior: 3}", ["search.prior: found 3"]),
        ("search: {allow_changed_adapters: maybe}", ["search.allow_changed_adapters: found 'maybe'"]),
        (
            "objective: {name: accuracy}",
            ["objective.name: found 'accuracy', expected package.module:function or one of entropy_excess"],
        ),
        ("objective: {name: 'a b:c'}", ["objective.name: found 'a b:c', expected package.module:function"]),
        ("objective: {name: 'a:b c'}", ["objective.name: found 'a:b c', expected package.module:function"]),
        ("objective: {name: 'module:'}", ["objective.name: found 'module:'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_known(line, expected):
    message = mistake(line)
    assert message.startswith("run.yaml: ")
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("search: {space: {grups: model}}", "search.space.grups: unknown key; did you mean 'groups'?"),
        ("search: {space: {seed: 3}}", "search.space.seed: unknown key; did you mean 'search.seed'?"),
        (
            "search: {stages: [{share: 1, group: model}]}",
            "search.stages.0.group: unknown key; did you mean 'groups'?",
        ),
        (
            "search: {gradient: {refine_step: 3}}",
            "search.gradient.refine_step: unknown key; did you mean 'refine_steps'?",
        ),
        ("search: {race_kep: 0.5}", "search.race_kep: unknown key; did you mean 'race_keep'?"),
        ("search: {groups: model}", "search.groups: unknown key; did you mean 'space.groups'?"),
    ],
)
def test_a_typo_in_a_section_within_a_section_gets_the_close_key_and_the_known_ones(line, expected):
    assert f"run.yaml: {expected} known keys: " in mistake(line)


def test_a_typo_in_a_nested_override_is_quoted():
    assert mistake("", "search.space.grups=model").startswith(
        "override 'search.space.grups=model': unknown key; did you mean 'groups'?"
    )
    assert mistake("", "search.race_keep=2").startswith("override 'search.race_keep=2': found 2")


def test_the_names_are_those_that_exist():
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES)
    assert set(get_args(CombinationName)) == set(COMBINATIONS)
    assert get_args(GroupName) == get_args(GroupKind)
    genome = Layout.__dataclass_fields__["genome"].type
    assert set(get_args(GenomeName)) == set(get_args(genome))


def test_every_setting_that_has_a_default_stands_in_the_dump():
    dump = SearchSettings().model_dump(mode="json")
    assert set(dump) == set(SearchSettings.model_fields)
    assert SearchSettings.model_validate(dump) == SearchSettings()


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        SearchSettings().seed = 3
    assert issubclass(SpaceSettings, ConfigSection)


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("search.n_candidates", 100_000),
        ("search.n_finalists", 100_000),
        ("search.tokens_per_forward", 10_000_000),
        ("search.space.n_knots", 1000),
        ("search.gradient.refine_steps", 100_000),
        ("search.gradient.inject_steps", 100_000),
        ("prompts.per_adapter", 100_000),
        ("prompts.unseen_per_adapter", 100_000),
        ("prompts.max_new_tokens", 100_000),
        ("prompts.max_slot_tokens", 100_000),
    ],
)
def test_what_no_clock_could_stop_has_a_limit(key, most):
    enough = "search.max_evaluations=100000000000"
    load("", enough, f"{key}={most}")
    message = mistake("", enough, f"{key}=100000000000")
    assert f"'{key}=100000000000'" in message
    assert f"found 100000000000; it should be less than or equal to {most}" in message


def test_many_prompts_of_many_tokens_have_a_limit_together():
    load("", "prompts.per_adapter=9000", "prompts.unseen_per_adapter=1000", "prompts.max_slot_tokens=1000")
    message = mistake("", "prompts.per_adapter=90000", "prompts.max_new_tokens=1000")
    assert "found 90008 prompts an adapter of up to 1000 tokens each" in message
    assert "expected at most 10000000 tokens together; lower either" in message
