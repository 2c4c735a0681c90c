"""Config: short and long forms read alike, and every mistake is one clear line."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from search.config import SearchConfig, config_hash, load_config, rebuild_config
from search.errors import InputError

SHORT = "base: zoo/base\nadapters: zoo/adapters\n"
SKELETON = "### Task: Add.\\n### Input:{input}\\n### Answer:"


@pytest.fixture(autouse=True)
def zoo(tmp_path, monkeypatch):
    """A working directory with a base, two adapters, and things that are no adapters."""
    for folder in ("base", "adapters/sums", "adapters/chat", "adapters/.sums.1.partial", "adapters/notes"):
        (tmp_path / "zoo" / folder).mkdir(parents=True)
    for name in ("sums", "chat", ".sums.1.partial"):
        (tmp_path / "zoo" / "adapters" / name / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> SearchConfig:
    path = Path("run.yaml")
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def mistake(text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_short_form_is_enough():
    config = load(SHORT)
    assert (config.base.source, config.base.name) == ("zoo/base", "zoo/base")
    assert [(a.name, a.source) for a in config.adapters] == [
        ("chat", "zoo/adapters/chat"),
        ("sums", "zoo/adapters/sums"),
    ]
    assert config.search.n_candidates == 16


def test_the_long_form_says_everything():
    config = load(f"""
base: {{source: zoo/base, revision: abc, name: org/other, dtype: bfloat16}}
adapters:
  - zoo/adapters/chat
  - {{source: zoo/adapters/sums/, name: add, about: adds, skeletons: ["{SKELETON}"], allow_pickle: true}}
  - {{source: org/on-the-hub, revision: def}}
search: {{time_box_s: 60, space: model, tokens_per_forward: 512, sigma: 1e-2}}
prompts: {{per_adapter: 4}}
objective: {{name: forward_kl, combine: worst}}
""")
    assert (config.base.revision, config.base.name, config.base.dtype) == ("abc", "org/other", "bfloat16")
    assert [a.name for a in config.adapters] == ["chat", "add", "on-the-hub"]
    assert config.adapters[1].skeletons == ("### Task: Add.\n### Input:{input}\n### Answer:",)
    assert config.adapters[2].source == "org/on-the-hub"
    assert (config.search.space.groups, config.search.sigma, config.search.time_box_s) == ("model", 0.01, 60)
    assert (config.prompts.per_adapter, config.objective.combine) == (4, "worst")


def test_short_and_long_form_of_the_same_run_are_equal():
    long = "adapters: [{source: zoo/adapters/chat}, zoo/adapters/sums]\nsearch:\nbase: {source: zoo/base}\n"
    assert load(SHORT) == load(long)
    assert config_hash(load(SHORT)) == config_hash(load(long))


def test_the_hash_tells_any_setting_apart_and_survives_json():
    config = load(SHORT)
    assert config_hash(config) != config_hash(load(SHORT, "search.seed=1"))
    assert SearchConfig.model_validate(json.loads(json.dumps(config.model_dump()))) == config


def test_a_recorded_config_is_rebuilt_and_what_is_gone_since_is_named(zoo):
    config = load(SHORT, "search.space=model", "search.stages=[{share: 1}]", "objective.combine=worst")
    recorded = json.loads(json.dumps(config.model_dump(mode="json")))
    assert rebuild_config(recorded, "out/trace.jsonl") == config
    (zoo / "zoo/adapters/sums").rename(zoo / "moved")
    with pytest.raises(
        InputError, match=r"out/trace\.jsonl: config.*no folder 'zoo/adapters/sums'"
    ) as caught:
        rebuild_config(recorded, "out/trace.jsonl")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"out/trace\.jsonl: config"):
        rebuild_config(None, "out/trace.jsonl")


def test_a_config_built_in_python_obeys_the_same_rules(zoo):
    config = SearchConfig.model_validate({"base": "zoo/base", "adapters": "zoo/adapters"})
    assert config == load(SHORT)
    with pytest.raises(ValidationError, match="no folder"):
        SearchConfig.model_validate({"base": "zoo/bas", "adapters": "zoo/adapters"})
    with pytest.raises(ValidationError, match="frozen"):
        config.device = "cpu"


def test_overrides_are_yaml_and_win():
    config = load(
        SHORT, "search.seed=3", "base.dtype=float32", "device=cpu", "search.tokens_per_forward=null"
    )
    assert (config.search.seed, config.base.dtype, config.device) == (3, "float32", "cpu")
    assert config.base.source == "zoo/base"
    assert load(SHORT, "adapters=[zoo/adapters/sums]").adapters == load(SHORT).adapters[1:]


def test_paths_start_from_the_working_directory_then_the_file_then_its_parent(zoo, monkeypatch):
    (zoo / "configs").mkdir()
    (zoo / "configs" / "demo.yaml").write_text(SHORT)
    assert load_config(Path("configs/demo.yaml")) == load(SHORT)
    elsewhere = zoo / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(zoo / "run.yaml").base.source == str(zoo / "zoo/base")
    assert load_config(zoo / "configs" / "demo.yaml").adapters[1].source == str(zoo / "zoo/adapters/sums")
    (elsewhere / "zoo/base").mkdir(parents=True)
    assert load_config(zoo / "run.yaml").base.source == "zoo/base"


def test_a_typo_gets_the_close_key():
    assert mistake(SHORT + "search: {n_candidate: 3}").startswith(
        "run.yaml: search.n_candidate: unknown key; did you mean 'n_candidates'? known keys: time_box_s, max_"
    )
    assert "did you mean 'search.seed'? known keys: base, adapters" in mistake(SHORT + "seed: 3")
    assert "did you mean 'adapters'?" in mistake("base: zoo/base\nadapter: zoo/adapters")
    assert "run.yaml: adapters.0.sorce: unknown key; did you mean 'source'?" in mistake(
        "base: zoo/base\nadapters: [{sorce: zoo/adapters/sums}]"
    )
    assert "did you mean" not in mistake(SHORT + "zzz: 1")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("search: {n_candidates: many}", "search.n_candidates: found 'many'; it should be a valid integer"),
        (
            "search: {n_candidates: 1}",
            "search.n_candidates: found 1; it should be greater than or equal to 2",
        ),
        ("search: {n_candidates: 2.5}", "found 2.5; it should be a valid integer"),
        ("search: {n_candidates: yes}", "search.n_candidates: found true, which is neither"),
        (
            "search: {max_evaluations: 8}",
            "max_evaluations is 8, less than one generation of n_candidates = 16",
        ),
        ("search: {seed: -1}", "search.seed: found -1"),
        ("search: {time_box_s: 0}", "search.time_box_s: found 0; it should be greater than 0"),
        ("search: {time_box_s: .inf}", "search.time_box_s: found inf; it should be a finite number"),
        ("search: {sigma: .nan}", "search.sigma: found nan; it should be a finite number"),
        ("search: {start: null}", "search.start: found None; it should be 'balanced' or a finite number"),
        ("search: {start: ballanced}", "search.start: found 'ballanced'; it should be 'balanced' or a"),
        ("search: {start: .nan}", "search.start: found nan; it should be 'balanced' or a finite number"),
        ("search: {start: yes}", "search.start: found True; it should be 'balanced' or a finite number"),
        ("search: {max_relative_norm: 0}", "search.max_relative_norm: found 0"),
        ("search: {tokens_per_forward: 0}", "search.tokens_per_forward: found 0"),
        ("search: 3", "search: found 3; expected keys below it"),
        ("prompts: {temperature: 0}", "prompts.temperature: found 0"),
        ("prompts: {per_adapter: 0}", "prompts.per_adapter: found 0"),
        ("objective: {combine: best}", "it should be 'mean', 'mean_sqrt' or 'worst'"),
        ("objective: {weak_signal_nats: -1}", "objective.weak_signal_nats: found -1"),
        ("device: tpu", "device: found 'tpu'; it should be auto, cpu, mps, cuda or cuda:N"),
        ("search: {stages: [{groups: model}]}", "search.stages.0.share: missing; write `share: NUMBER`"),
        ("search: {stages: model}", "search.stages: found 'model'; it should be a list, in [ ] or a line"),
        ("a: 2026-13-01", "run.yaml: not valid YAML: month must be in 1..12"),
        ("a: !!int x", "run.yaml: not valid YAML: invalid literal for int()"),
        ("a: !!bool x", "run.yaml: not valid YAML: 'x'"),
        ("a: !!timestamp x", "run.yaml: not valid YAML: "),
        ("3: 4", "Keys should be strings"),
        ("base: again", "run.yaml:3: not valid YAML: key 'base' appears twice"),
        ("a: [", "run.yaml:4: not valid YAML"),
        ("a: !!python/object:os.system x", "run.yaml:3: not valid YAML: could not determine a constructor"),
        ("a: \x07", "run.yaml: not valid YAML: unacceptable character"),
        ("a: " + "[" * 1000, "not valid YAML: maximum recursion depth"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_found(line, expected):
    assert expected in mistake(SHORT + line + "\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found an empty file, expected keys, at least `base: PATH`"),
        ("- a", "found a list, expected keys"),
        ("base: zoo/base", "adapters: missing; write `adapters: FOLDER`"),
        ("adapters: zoo/adapters\nbase:", "base: missing; write `base: FOLDER`"),
        ("base: zoo/bas\nadapters: zoo/adapters", "base.source: no folder 'zoo/bas' in "),
        ("base: ''\nadapters: zoo/adapters", "base.source: found ''"),
        ("base: 3\nadapters: zoo/adapters", "base: found 3; expected a folder, a hub id or keys below it"),
        ("base: {dtype: int8}\nadapters: zoo/adapters", "base.source: missing"),
        (
            "base: {source: zoo/base, revision: 0123}\nadapters: zoo/adapters",
            "base.revision: found 83; it should be text (quote it)",
        ),
        ("base: zoo/base\nadapters: zoo/adapter", "adapters: no folder 'zoo/adapter'"),
        (
            "base: zoo/base\nadapters: zoo/base",
            "adapters: no subfolder of zoo/base holds adapter_config.json",
        ),
        ("base: zoo/base\nadapters: []", "adapters: expected a folder of adapter folders, or a list"),
        ("base: zoo/base\nadapters: 3", "adapters: expected a folder of adapter folders, or a list"),
        (
            "base: zoo/base\nadapters: [3]",
            "adapters.0: found 3; expected a folder, a hub id or keys below it",
        ),
        ("base: zoo/base\nadapters: [zoo/adapters/sum]", "adapters.0.source: no folder 'zoo/adapters/sum'"),
        (
            "base: zoo/base\nadapters: [org/sums, zoo/adapters/sums]",
            "two adapters are named 'sums': org/sums",
        ),
    ],
)
def test_a_file_without_usable_base_or_adapters_says_what_to_write(text, expected):
    assert expected in mistake(text)


@pytest.mark.parametrize(
    ("skeleton", "expected"),
    [
        ("Answer:", "no slot"),
        ("{a} and {a} Answer:", "slot {a} comes twice"),
        ("Question: {a}", "no text after slot {a}"),
        ("{a}{b} Answer:", "no text after slot {a}"),
    ],
)
def test_a_skeleton_that_cannot_be_filled_is_refused(skeleton, expected):
    text = f"base: zoo/base\nadapters: [{{source: zoo/adapters/sums, skeletons: ['{skeleton}']}}]"
    message = mistake(text)
    assert message.startswith("run.yaml: adapters.0.skeletons: ")
    assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.seed", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("search.=3", "expected section.key=value"),
        ("adapters.0.name=x", "expected section.key=value"),
        ("search.sed=3", "unknown key; did you mean 'seed'?"),
        ("search.seed=x", "found 'x'; it should be a valid integer"),
        ("search.seed=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_quoted(override, expected):
    message = mistake(SHORT, override)
    assert message.startswith(f"override {override!r}")
    assert expected in message


def test_part_of_a_list_cannot_be_overridden():
    assert "'adapters' is a list here" in mistake("base: b\nadapters: [a]", "adapters.name=x")


def test_a_file_that_cannot_be_read_is_named(zoo):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot read the config: No such file"):
        load_config(Path("nowhere.yaml"))
    with pytest.raises(InputError, match="zoo: cannot read the config"):
        load_config(Path("zoo"))
    Path("latin.yaml").write_bytes("base: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml: not UTF-8 at byte 6"):
        load_config(Path("latin.yaml"))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just("zoo/base")
)
KEYS = st.sampled_from(
    [
        "base",
        "adapters",
        "search",
        "prompts",
        "objective",
        "space",
        "stages",
        "gradient",
        "prior",
        "race_keep",
        "source",
        "name",
        "seed",
        "n_candidates",
        "skeletons",
        "a\nb",
        3,
    ]
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, NESTED, max_size=4), st.booleans())
def test_any_yaml_is_a_config_or_one_line(document, with_valid_start):
    if with_valid_start:
        document = {"base": "zoo/base", "adapters": "zoo/adapters", **document}
    message = ""
    try:
        load(yaml.safe_dump(document))
    except InputError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_configs_that_ship_load_from_any_folder(path):
    assert len(load_config(path).adapters) >= 3


def test_the_demo_gives_every_adapter_a_skeleton_that_holds_no_row_of_data():
    root = Path(__file__).parents[1]
    with (root / "data/test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["input"].split(": ", 2)[2].removesuffix("\n### Answer:") for row in csv.DictReader(file)]
    assert len(set(texts)) > 800
    for adapter in load_config(root / "configs/demo.yaml").adapters:
        assert adapter.about
        assert adapter.skeletons
        assert not [text for text in texts for skeleton in adapter.skeletons if text in skeleton]
